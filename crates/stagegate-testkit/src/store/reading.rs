//! Promises about reading.

use stagegate_core::{
    RunId, RunState, Store,
    pipeline::Labels,
    store::{ATTEMPTS_READ_MAX, NewRun, NewSignal, RunQuery, SignalKind, Signalled},
};

use super::{
    Subject,
    fixtures::{
        at, checkpoint, commit, end, event, full_attempt, full_stage, live_replica, new_run, pipeline, replica, run_id,
        stage, step, submit, submit_leased, tenant,
    },
};

fn everything() -> RunQuery {
    RunQuery {
        tenant: tenant("acme"),
        pipeline: None,
        version: None,
        states: Vec::new(),
        labels: Labels::new(),
        created_from: None,
        created_before: None,
        before: None,
        limit: 200,
    }
}

async fn list(store: &dyn Store, query: &RunQuery) -> Vec<RunId> {
    store.runs(query).await.expect("list").into_iter().map(|run| run.id).collect()
}

/// Nowhere an error.
pub async fn what_is_not_there_is_none(subject: Subject) {
    let (store, of, id) = (&subject.store, tenant("acme"), run_id(1));
    assert_eq!(store.run(&of, id).await.expect("read"), None);
    assert_eq!(store.run_record(&of, id).await.expect("read"), None);
    assert_eq!(store.stage(&of, id, &stage("s1")).await.expect("read"), None);
    assert_eq!(store.events(&of, id, 0, 10).await.expect("read"), []);
    assert_eq!(store.owned(replica()).await.expect("read"), []);
    assert_eq!(list(store.as_ref(), &everything()).await, []);
    let run = new_run(1);
    submit(store, &run).await;
    assert_eq!(store.stage(&of, run.id, &stage("s1")).await.expect("read"), None);
    assert_eq!(store.events(&of, run.id, 1, 10).await.expect("read"), []);
}

/// Another tenant's run is not there, whatever is asked.
pub async fn tenants_are_walls_for_every_read(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let (run, lease) = submit_leased(store, 1, owner).await;
    let mut whole = step(lease, 3);
    whole.stages = vec![full_stage("s1", "x")];
    whole.attempts = vec![(stage("s1"), full_attempt(1, "x"))];
    whole.checkpoints = vec![(stage("s1"), checkpoint("out".into()))];
    commit(store, &whole).await;

    let other = tenant("umbrella");
    assert_eq!(store.run(&other, run.id).await.expect("read"), None);
    assert_eq!(store.run_record(&other, run.id).await.expect("read"), None);
    assert_eq!(store.stage(&other, run.id, &stage("s1")).await.expect("read"), None);
    assert_eq!(store.events(&other, run.id, 0, 10).await.expect("read"), []);
    assert_eq!(list(store.as_ref(), &RunQuery { tenant: other.clone(), ..everything() }).await, []);
    let signal = NewSignal { tenant: other, run: run.id, kind: SignalKind::Cancel, by: None };
    assert_eq!(store.signal(&signal).await.expect("signal"), Signalled::NoSuchRun);
    assert!(!store.run_record(&run.tenant, run.id).await.expect("read").expect("there").cancel_requested);
}

/// Those are its end; earlier ones stay in the ledger and the events.
pub async fn a_stage_is_read_with_its_newest_attempts_alone(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let (run, lease) = submit_leased(store, 1, owner).await;
    let many = u32::try_from(ATTEMPTS_READ_MAX).expect("a small number") + 3;
    let mut step = step(lease, 3);
    step.stages = vec![full_stage("s1", "x"), full_stage("s2", "x")];
    step.attempts = (1..=many).map(|number| (stage("s1"), full_attempt(number, "x"))).collect();
    step.attempts.push((stage("s2"), full_attempt(1, "x")));
    commit(store, &step).await;
    let read = store.stage(&run.tenant, run.id, &stage("s1")).await.expect("read").expect("there");
    assert!(read.attempts.iter().map(|attempt| attempt.number).eq(4..=many), "the newest, in order");
    assert_eq!(read.attempts[0], full_attempt(4, "x"), "whole, with their calls");
    let other = store.stage(&run.tenant, run.id, &stage("s2")).await.expect("read").expect("there");
    assert_eq!(other.attempts, [full_attempt(1, "x")]);
}

/// Page by page, by cursor, nothing twice and nothing missing, while new runs come in.
pub async fn lists_are_newest_first_and_page_without_gaps(subject: Subject) {
    let store = &subject.store;
    let runs: Vec<NewRun> = (0..23).map(|n| new_run(n * 10)).collect();
    store.submit(&runs).await.expect("submit");
    submit(store, &NewRun { tenant: tenant("umbrella"), ..new_run(5) }).await;
    let mut seen = Vec::new();
    let mut query = RunQuery { limit: 5, ..everything() };
    loop {
        let page = list(store.as_ref(), &query).await;
        assert!(page.len() <= 5);
        let Some(last) = page.last() else { break };
        query.before = Some(*last);
        seen.extend(page);
        submit(store, &new_run(1_000)).await;
    }
    let expected: Vec<RunId> = runs.iter().rev().map(|run| run.id).collect();
    assert_eq!(seen, expected);
    let records = store.runs(&RunQuery { before: Some(runs[1].id), ..everything() }).await.expect("list");
    let read = store.run_record(&runs[0].tenant, runs[0].id).await.expect("read");
    assert_eq!(records, Vec::from_iter(read));
}

/// Alone and together.
pub async fn lists_filter_by_everything(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let label = |key: &str, value: &str| -> Labels { [(key.to_owned(), value.to_owned())].into() };
    let mut both = label("team", "a");
    both.extend(label("env", "prod"));
    let one = NewRun { labels: label("team", "a"), ..new_run(10) };
    let two = NewRun { labels: both.clone(), pipeline: pipeline("other"), ..new_run(20) };
    let three = NewRun { labels: label("team", "b"), version: 2, ..new_run(30) };
    store.submit(&[one.clone(), two.clone(), three.clone()]).await.expect("submit");
    let (failed, lease) = submit_leased(store, 40, owner).await;
    commit(store, &end(lease, 3, RunState::Failed)).await;
    let (running, _) = submit_leased(store, 50, owner).await;

    let check = async |query: RunQuery, expected: &[&NewRun]| {
        let expected: Vec<RunId> = expected.iter().map(|run| run.id).collect();
        assert_eq!(list(store.as_ref(), &query).await, expected, "{query:?}");
    };
    check(everything(), &[&running, &failed, &three, &two, &one]).await;
    check(RunQuery { pipeline: Some(pipeline("other")), ..everything() }, &[&two]).await;
    check(RunQuery { version: Some(2), ..everything() }, &[&three]).await;
    check(RunQuery { states: vec![RunState::Failed], ..everything() }, &[&failed]).await;
    let states = vec![RunState::Running, RunState::Expired, RunState::Queued];
    check(RunQuery { states: states.clone(), ..everything() }, &[&running, &three, &two, &one]).await;
    check(RunQuery { states: vec![RunState::Failed, RunState::Running], ..everything() }, &[&running, &failed]).await;
    check(RunQuery { states: vec![RunState::Succeeded], ..everything() }, &[]).await;
    check(RunQuery { labels: label("team", "a"), ..everything() }, &[&two, &one]).await;
    check(RunQuery { labels: both, ..everything() }, &[&two]).await;
    check(RunQuery { labels: label("a", "team"), ..everything() }, &[]).await;
    check(RunQuery { created_from: Some(at(40)), ..everything() }, &[&running, &failed]).await;
    check(RunQuery { created_before: Some(at(20)), ..everything() }, &[&one]).await;
    let together = RunQuery {
        pipeline: Some(pipeline("brief-to-spec")),
        version: Some(1),
        states,
        labels: label("team", "a"),
        created_from: Some(at(10)),
        created_before: Some(at(11)),
        before: Some(two.id),
        ..everything()
    };
    check(together, &[&one]).await;
}

/// From 1, in order, page by page.
pub async fn events_are_gap_free_and_page(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let (run, lease) = submit_leased(store, 1, owner).await;
    for last_seq in [3, 6, 9] {
        let mut three = step(lease, last_seq);
        three.events = (1..=3).map(|n| event(last_seq + n, 100, "s2")).collect();
        commit(store, &three).await;
    }
    let read = async |after, limit| -> Vec<u64> {
        let events = store.events(&run.tenant, run.id, after, limit).await.expect("read");
        events.iter().map(|event| event.seq).collect()
    };
    assert_eq!(read(0, 100).await, (1..=12).collect::<Vec<u64>>());
    assert_eq!(read(0, 5).await, [1, 2, 3, 4, 5]);
    assert_eq!(read(5, 3).await, [6, 7, 8]);
    assert!(read(12, 3).await.is_empty());
    assert!(read(u64::MAX, 3).await.is_empty());
}
