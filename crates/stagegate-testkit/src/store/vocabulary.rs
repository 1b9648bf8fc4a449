//! Promises about words of newer releases: they are carried, never taken for corruption.

use std::{collections::HashMap, sync::Arc, time::Duration};

use serde_json::{Value, json};
use stagegate_core::{
    Attempt, CallPurpose, Checkpoint, Code, Evaluator, Event, Failure, Origin, RunState, StageState, Store, Verdict,
    fair::Shares,
    store::{Commit, RunQuery, SignalKind, Signalled, StageRecord},
};

use super::{
    Subject,
    fixtures::{
        at, checkpoint, commit, full_attempt, full_stage, live_replica, new_run, park, record, rest, signal,
        signals_of, stage, step, submit, submit_leased, tenant,
    },
};

/// Bodies that this release would write in no way like this: another order, other numbers, spaces, keys given twice.
const UNKNOWN: [&str; 2] = [
    r#"{"type":"stage.skipped","stage":"s1","why":{"b":1e2,"a":1.10,"b":"\u00e9"},"list":[ 1, 2 ]}"#,
    r#"{"x":18446744073709551616,"type":"run.dreamt"}"#,
];
const EXTENDED: [&str; 2] = [
    r#"{"type":"stage.started","stage":"s1","attempt":1,"item":{"index":3}}"#,
    r#"{"type":"run.waiting","until":null,"for":"the moon"}"#,
];

fn parse<T>(parse: impl Fn(&str) -> Option<T>, word: &str) -> T {
    parse(word).expect("a word")
}

async fn events_come_back(subject: &Subject, bodies: [&str; 2], names: [&str; 2]) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let (run, lease) = submit_leased(store, 1, owner).await;
    let of_body = |(seq, body)| Event::read(seq, at(20), body).expect("an event");
    let events: Vec<Event> = (4..).zip(bodies).map(of_body).collect();
    commit(store, &Commit { events: events.clone(), ..step(lease, 3) }).await;
    let read = store.events(&run.tenant, run.id, 3, 10).await.expect("events");
    assert_eq!(read, events);
    let (news_of, news) = store.news(&[(run.id, 3)], 10).await.expect("news").remove(0);
    assert_eq!((news_of, &news), (run.id, &events));
    for ((event, body), name) in read.iter().zip(bodies).zip(names) {
        assert_eq!(event.kind.name(), name);
        let shown = serde_json::to_string(event).expect("JSON");
        assert!(shown.ends_with(&body[1..]), "{shown}");
        assert!(event.is_of_newer_release());
    }
    assert_eq!(record(store, run.id).await.last_seq, 5, "and the run goes on");
}

/// Its type, its fields, their order and the way in which its numbers are written.
pub async fn an_unknown_event_comes_back_byte_for_byte(subject: Subject) {
    events_come_back(&subject, UNKNOWN, ["stage.skipped", "run.dreamt"]).await;
}

/// Beside those that are known.
pub async fn unknown_fields_of_a_known_event_come_back_byte_for_byte(subject: Subject) {
    events_come_back(&subject, EXTENDED, ["stage.started", "run.waiting"]).await;
}

/// Verdicts, states of stages, origins, evaluators, purposes and codes, in rows and in documents.
pub async fn unknown_words_of_rows_come_back_as_they_were(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let (run, lease) = submit_leased(store, 1, owner).await;
    let (verdict, origin) = (parse(Verdict::parse, "deferred"), parse(Origin::parse, "cache_tape"));
    let code = parse(Code::parse, "SG9999");
    let failure = Failure::new(code, "of the future");
    let rich = full_attempt(1, "x");
    let of_future = Attempt {
        verdict,
        assessments: rich
            .assessments
            .iter()
            .map(|known| stagegate_core::Assessment { evaluator: parse(Evaluator::parse, "oracle"), ..known.clone() })
            .collect(),
        calls: rich
            .calls
            .iter()
            .map(|known| stagegate_core::LedgerEntry {
                purpose: parse(CallPurpose::parse, "embedding"),
                origin,
                error: Some(code),
                ..known.clone()
            })
            .collect(),
        failure: Some(failure.clone()),
        ..rich
    };
    let skipped = StageRecord {
        state: parse(StageState::parse, "skipped"),
        verdict: Some(verdict),
        origin: Some(origin),
        failure: Some(failure.clone()),
        ..full_stage("s1", "x")
    };
    let passed = Checkpoint { verdict, origin, ..checkpoint(json!("out")) };
    let written = Commit {
        stages: vec![skipped.clone(), StageRecord { verdict: Some(verdict), ..full_stage("s2", "y") }],
        attempts: vec![(stage("s1"), of_future.clone())],
        checkpoints: vec![(stage("s2"), passed.clone())],
        failure: Some(failure.clone()),
        ..step(lease, 3)
    };
    commit(store, &written).await;
    let shown = store.stage(&run.tenant, run.id, &stage("s1")).await.expect("reads").expect("there");
    assert_eq!((shown.stage, shown.attempts), (skipped.clone(), vec![of_future.clone()]));
    let shown = store.stage(&run.tenant, run.id, &stage("s2")).await.expect("reads").expect("there");
    assert_eq!(shown.checkpoint, Some(passed.clone()));
    let loaded = store.load(&[lease]).await.expect("loads").remove(0);
    assert_eq!(loaded.run.failure, Some(failure));
    let stages: HashMap<_, _> = loaded.stages.into_iter().map(|stage| (stage.id.clone(), stage)).collect();
    assert_eq!(stages[&stage("s1")], skipped);
    assert_eq!(loaded.checkpoints, [(stage("s2"), passed)]);
    assert_eq!(loaded.last_attempts, [(stage("s1"), of_future)]);
}

/// In lists too, beside others.
pub async fn an_unknown_run_state_is_shown_as_it_is(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let (run, lease) = submit_leased(store, 1, owner).await;
    let (other, _) = submit_leased(store, 2, owner).await;
    let state = parse(RunState::parse, "hibernating");
    commit(store, &Commit { state, ..park(lease, 3, None) }).await;
    assert_eq!(record(store, run.id).await.state, state);
    let query = RunQuery {
        tenant: tenant("acme"),
        pipeline: None,
        version: None,
        states: Vec::new(),
        labels: [].into(),
        created_from: None,
        created_before: None,
        before: None,
        limit: 10,
    };
    let listed = store.runs(&query).await.expect("lists");
    let states: Vec<_> = listed.iter().map(|run| (run.id, run.state)).collect();
    assert_eq!(states, [(other.id, RunState::Running), (run.id, state)]);
    for kind in [SignalKind::Retry { deadline_at: at(99) }] {
        assert_eq!(signal(store, run.id, kind).await, Signalled::WrongRunState(state), "it has not ended");
    }
    assert_eq!(store.purge(&[run.id], at(50)).await.expect("purges"), 0);
    assert_eq!(store.delete(&[run.id]).await.expect("deletes"), []);
}

/// Whether its kind is unknown, or a field of it that may change what is asked.
pub async fn an_unknown_signal_is_carried_until_it_is_consumed(subject: Subject) {
    let store: &Arc<dyn Store> = &subject.store;
    let owner = live_replica(store).await;
    let (run, lease) = submit_leased(store, 1, owner).await;
    let bodies = [r#"{"kind":"pause","until":1.50}"#, r#"{"kind":"approve","stage":"s1","outputs":{"b":1,"a":2}}"#];
    for body in bodies {
        let kind = SignalKind::read(body).expect("a signal");
        assert_eq!(kind, SignalKind::Unknown(body.into()));
        assert!(matches!(signal(store, run.id, kind).await, Signalled::Accepted { .. }));
    }
    signal(store, run.id, SignalKind::Cancel).await;
    let left = signals_of(store, lease).await;
    let kinds: Vec<_> = left.iter().map(|signal| signal.kind.clone()).collect();
    assert_eq!(kinds[..2], bodies.map(|body| SignalKind::Unknown(body.into())));
    assert_eq!(kinds[2], SignalKind::Cancel);
    commit(store, &Commit { consumed: vec![left[2].id], ..step(lease, 3) }).await;
    let left = signals_of(store, lease).await;
    assert_eq!(left.iter().map(|signal| signal.kind.clone()).collect::<Vec<_>>(), kinds[..2]);
    assert_eq!(SignalKind::read(r#"{"kind":"cancel","why":"x"}"#).expect("a signal"), SignalKind::Cancel);
    assert!(SignalKind::read("[]").is_err() && SignalKind::read(&Value::Null.to_string()).is_err());
}

/// Neither lost, for then a parked run would be woken by it for ever and not know why, nor in the way of the others.
pub async fn a_signal_that_cannot_be_read_is_an_unknown_one(subject: Subject) {
    let store: &Arc<dyn Store> = &subject.store;
    let owner = live_replica(store).await;
    let (run, lease) = submit_leased(store, 1, owner).await;
    let unreadable = ["}{", "[]", r#"{"kind":7}"#].map(|body| SignalKind::Unknown(body.into()));
    for kind in unreadable.iter().cloned().chain([SignalKind::Cancel]) {
        assert!(matches!(signal(store, run.id, kind).await, Signalled::Accepted { .. }));
    }
    let left = signals_of(store, lease).await;
    let kinds: Vec<_> = left.iter().map(|signal| signal.kind.clone()).collect();
    assert_eq!(kinds[..3], unreadable);
    assert_eq!(kinds[3..], [SignalKind::Cancel]);
    assert_eq!(left[3].by.as_deref(), Some("ann"));
    assert!(left.is_sorted_by(|a, b| a.id < b.id), "each has the id that it has in its row: {left:?}");
}

/// Fields of failures, assessments and attempts, when the row that has them is loaded and written again.
pub async fn unknown_fields_survive_a_rewrite(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let (run, lease) = submit_leased(store, 1, owner).await;
    let failure = Failure { rest: rest(), ..Failure::new(Code::GateFailed, "of the future") };
    let written = Commit {
        stages: vec![full_stage("s1", "x")],
        attempts: vec![(stage("s1"), full_attempt(1, "x"))],
        failure: Some(failure.clone()),
        ..step(lease, 3)
    };
    commit(store, &written).await;
    let loaded = store.load(&[lease]).await.expect("loads").remove(0);
    assert_eq!(loaded.run.failure, Some(failure.clone()));
    let (of, attempt) = loaded.last_attempts[0].clone();
    assert!(!attempt.assessments[0].rest.is_empty());
    let again = Attempt { number: 2, verdict: Verdict::Approved, ..attempt.clone() };
    let rewritten = Commit {
        stages: loaded.stages.clone(),
        attempts: vec![(of, again.clone())],
        failure: loaded.run.failure,
        ..step(lease, 4)
    };
    commit(store, &rewritten).await;
    assert_eq!(record(store, run.id).await.failure, Some(failure));
    let shown = store.stage(&run.tenant, run.id, &stage("s1")).await.expect("reads").expect("there");
    assert_eq!((&shown.stage, &shown.attempts), (&full_stage("s1", "x"), &vec![attempt, again]));
    let shown = serde_json::to_value(&shown.attempts[0]).expect("JSON");
    for place in ["/failure/later", "/assessments/0/later"] {
        assert_eq!(shown.pointer(place), Some(&json!(true)), "{shown:#}");
    }
}

/// However often it is claimed, beside others that are taken; whether its owner died or it was parked.
pub async fn a_run_in_an_unknown_state_is_left_to_those_who_know_it(subject: Subject) {
    let store = &subject.store;
    let newer = live_replica(store).await;
    let state = parse(RunState::parse, "hibernating");
    let (owned, lease) = submit_leased(store, 1, newer).await;
    commit(store, &Commit { state, ..step(lease, 3) }).await;
    let (parked, lease) = submit_leased(store, 2, newer).await;
    commit(store, &Commit { state, ..park(lease, 3, Some(Duration::ZERO)) }).await;
    submit(store, &new_run(3)).await;
    store.leave(newer).await.expect("leaves");
    let older = live_replica(store).await;
    let taken = store.claim(older, 10, &Shares::default()).await.expect("claims");
    assert_eq!(taken.len(), 1, "the others are taken");
    for _ in 0..3 {
        assert_eq!(store.claim(older, 10, &Shares::default()).await.expect("claims"), []);
    }
    for run in [owned, parked] {
        assert_eq!(record(store, run.id).await.state, state);
        assert!(taken.iter().all(|lease| lease.run != run.id));
    }
}
