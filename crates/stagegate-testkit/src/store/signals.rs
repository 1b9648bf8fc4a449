//! Promises about signals.

use std::{sync::Arc, time::Duration};

use stagegate_core::{
    Epoch, Json, RunId, RunState, StageState, Store,
    store::{Commit, Committed, Lease, NewSignal, SignalKind, Signalled, StageRecord},
};

use super::{
    Subject,
    fixtures::{
        NASTY, at, beat, claim_all, commit, dump, end, live_replica, new_run, park, record, run_id, signal, signals_of,
        stage, step, submit, submit_leased, tenant,
    },
};

const MINUTE: Duration = Duration::from_mins(1);

fn approve(of: &str) -> SignalKind {
    SignalKind::approve(stage(of), None)
}

fn reject(of: &str) -> SignalKind {
    SignalKind::Reject { stage: stage(of), reason: NASTY.to_owned(), attempt: None }
}

fn retry() -> SignalKind {
    SignalKind::Retry { deadline_at: at(9_000) }
}

async fn kinds(store: &Arc<dyn Store>, lease: Lease) -> Vec<SignalKind> {
    let signals = signals_of(store, lease).await;
    assert!(signals.is_sorted_by(|a, b| a.id < b.id), "oldest first");
    signals.into_iter().map(|signal| signal.kind).collect()
}

/// A step that holds these stages.
fn hold(lease: Lease, last_seq: u64, stages: &[&str]) -> Commit {
    let held = |of: &&str| StageRecord { state: StageState::Held, attempt: 1, ..StageRecord::pending(stage(of)) };
    Commit { stages: stages.iter().map(held).collect(), ..step(lease, last_seq) }
}

/// Asked again, it is accepted again, but there is one signal.
pub async fn a_cancel_marks_the_run_once(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let (run, lease) = submit_leased(store, 1, owner).await;
    let before = dump(store, &run.tenant, run.id).await;
    for _ in 0..3 {
        assert_eq!(signal(store, run.id, SignalKind::Cancel).await, Signalled::Accepted { owner: Some(owner) });
    }
    let after = dump(store, &run.tenant, run.id).await;
    assert!(after.detail.run.cancel_requested);
    assert_eq!(after.events, before.events, "only the owner writes events");
    assert_eq!(after.detail.run.state, RunState::Running);
    let signals = signals_of(store, lease).await;
    assert_eq!(signals.len(), 1);
    assert_eq!((&signals[0].kind, signals[0].by.as_deref()), (&SignalKind::Cancel, Some("ann")));
    // A queued run takes it as well; whoever claims it finds it.
    let queued = new_run(2);
    submit(store, &queued).await;
    assert_eq!(signal(store, queued.id, SignalKind::Cancel).await, Signalled::Accepted { owner: None });
    let taken = claim_all(store, owner).await;
    assert_eq!(taken.len(), 1);
    assert!(store.load(&taken).await.expect("load")[0].run.cancel_requested);
    assert_eq!(kinds(store, taken[0]).await, [SignalKind::Cancel]);
}

/// Whether it was parked for an hour or for ever.
pub async fn a_signal_wakes_a_parked_run(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    for delay in [None, Some(Duration::from_hours(1))] {
        for kind in [SignalKind::Cancel, approve("s2"), reject("s2")] {
            let (run, lease) = submit_leased(store, 1, owner).await;
            let held = Commit { stages: hold(lease, 3, &["s2"]).stages, ..park(lease, 3, delay) };
            commit(store, &held).await;
            assert_eq!(claim_all(store, owner).await, []);
            assert_eq!(signal(store, run.id, kind.clone()).await, Signalled::Accepted { owner: None });
            let taken = claim_all(store, owner).await;
            assert_eq!(taken, [Lease { run: run.id, epoch: Epoch(2) }]);
            assert_eq!(kinds(store, taken[0]).await, [kind]);
        }
    }
}

/// Only its owner's heartbeat, and again when another one comes.
pub async fn a_heartbeat_tells_of_each_signal_until_it_is_read(subject: Subject) {
    let store = &subject.store;
    let (owner, other) = (live_replica(store).await, live_replica(store).await);
    let (run, lease) = submit_leased(store, 1, owner).await;
    let (_, quiet) = submit_leased(store, 2, owner).await;
    commit(store, &hold(lease, 3, &["s1"])).await;
    assert_eq!(beat(store, owner, MINUTE).await.signalled, []);
    signal(store, run.id, SignalKind::Cancel).await;
    assert_eq!(beat(store, other, MINUTE).await.signalled, []);
    assert_eq!(beat(store, owner, MINUTE).await.signalled, [run.id]);
    assert_eq!(beat(store, owner, MINUTE).await.signalled, [run.id], "told until it is read");
    assert_eq!(kinds(store, lease).await.len(), 1);
    assert_eq!(kinds(store, quiet).await, []);
    assert_eq!(beat(store, owner, MINUTE).await.signalled, []);
    signal(store, run.id, approve("s1")).await;
    assert_eq!(beat(store, owner, MINUTE).await.signalled, [run.id], "a later one marks it anew");
    assert_eq!(kinds(store, lease).await, [SignalKind::Cancel, approve("s1")]);
}

/// By a commit that happens; one that is stale consumes nothing, and an heir finds what is left.
pub async fn signals_stay_until_they_are_consumed(subject: Subject) {
    let store = &subject.store;
    let (owner, heir) = (live_replica(store).await, live_replica(store).await);
    let (run, lease) = submit_leased(store, 1, owner).await;
    commit(store, &hold(lease, 3, &["s1", "s2"])).await;
    for kind in [approve("s1"), reject("s2"), SignalKind::Cancel] {
        assert!(matches!(signal(store, run.id, kind).await, Signalled::Accepted { .. }));
    }
    let ids: Vec<i64> = signals_of(store, lease).await.iter().map(|signal| signal.id).collect();
    assert_eq!(ids.len(), 3);
    let stale = Lease { epoch: Epoch(9), ..lease };
    let consume = |lease, last_seq, consumed: &[i64]| Commit { consumed: consumed.to_vec(), ..step(lease, last_seq) };
    assert_eq!(commit(store, &consume(stale, 4, &ids)).await, Committed::Stale);
    assert_eq!(kinds(store, lease).await.len(), 3);
    assert_eq!(commit(store, &consume(lease, 4, &ids[..1])).await, Committed::Now);
    assert_eq!(kinds(store, lease).await, [reject("s2"), SignalKind::Cancel]);
    store.release(&[lease]).await.expect("release");
    let taken = claim_all(store, heir).await;
    assert_eq!(beat(store, heir, MINUTE).await.signalled, [run.id], "a new owner is told of what is left");
    assert_eq!(kinds(store, taken[0]).await, [reject("s2"), SignalKind::Cancel]);
    assert_eq!(commit(store, &consume(taken[0], 5, &ids)).await, Committed::Now);
    assert_eq!(kinds(store, taken[0]).await, []);
}

/// Unless its last commit consumed it.
pub async fn a_run_parked_over_a_signal_can_be_claimed_at_once(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    for (consume, delay) in [(false, None), (false, Some(Duration::from_hours(1))), (true, None)] {
        let (run, lease) = submit_leased(store, 1, owner).await;
        signal(store, run.id, SignalKind::Cancel).await;
        let ids: Vec<i64> = signals_of(store, lease).await.iter().map(|signal| signal.id).collect();
        let consumed = if consume { ids } else { Vec::new() };
        assert_eq!(commit(store, &Commit { consumed, ..park(lease, 3, delay) }).await, Committed::Now);
        assert_eq!(claim_all(store, owner).await.len(), usize::from(!consume));
    }
}

/// Whichever comes first, the run can be claimed when both are done.
pub async fn a_signal_that_races_a_park_is_never_lost(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    for round in 0..60 {
        let (run, lease) = submit_leased(store, round, owner).await;
        let parking = tokio::spawn({
            let store = store.clone();
            async move { commit(&store, &park(lease, 3, None)).await }
        });
        let signalling = tokio::spawn({
            let store = store.clone();
            async move { signal(&store, run.id, SignalKind::Cancel).await }
        });
        assert_eq!(parking.await.expect("no panic"), Committed::Now);
        assert!(matches!(signalling.await.expect("no panic"), Signalled::Accepted { .. }));
        let taken = claim_all(store, owner).await;
        assert_eq!(taken, [Lease { epoch: Epoch(2), ..lease }], "round {round}: nobody would ever wake it");
        assert_eq!(kinds(store, taken[0]).await, [SignalKind::Cancel]);
        commit(store, &end(taken[0], 4, RunState::Cancelled)).await;
    }
}

/// It is in what was read, or the next heartbeat tells of it.
pub async fn a_signal_that_races_its_reading_is_never_lost(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    for round in 0..40 {
        let (run, lease) = submit_leased(store, round, owner).await;
        commit(store, &hold(lease, 3, &["s1", "s2"])).await;
        signal(store, run.id, approve("s1")).await;
        let reading = tokio::spawn({
            let store = store.clone();
            async move { kinds(&store, lease).await }
        });
        let signalling = tokio::spawn({
            let store = store.clone();
            async move { signal(&store, run.id, approve("s2")).await }
        });
        let read = reading.await.expect("no panic");
        signalling.await.expect("no panic");
        let told = beat(store, owner, MINUTE).await.signalled.contains(&run.id);
        assert!(told || read.len() == 2, "round {round}: the owner would never learn of it");
        commit(store, &end(lease, 4, RunState::Cancelled)).await;
    }
}

/// Queued, with a new deadline and nothing left of its end; what was asked before is void.
pub async fn a_retry_reopens_what_failed(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    for state in [RunState::Failed, RunState::Cancelled, RunState::Expired] {
        let (run, lease) = submit_leased(store, 1, owner).await;
        signal(store, run.id, SignalKind::Cancel).await;
        commit(store, &end(lease, 3, state)).await;
        let before = dump(store, &run.tenant, run.id).await;
        assert_eq!(signal(store, run.id, retry()).await, Signalled::Accepted { owner: None });
        let after = dump(store, &run.tenant, run.id).await;
        let mut expected = before;
        expected.detail.run.state = RunState::Queued;
        expected.detail.run.cancel_requested = false;
        expected.detail.run.failure = None;
        expected.detail.run.finished_at = None;
        expected.detail.run.deadline_at = at(9_000);
        assert_eq!(after, expected);
        let taken = claim_all(store, owner).await;
        assert_eq!(taken.len(), 1);
        assert_eq!(kinds(store, taken[0]).await, [retry()]);
        assert_eq!(commit(store, &step(taken[0], 4)).await, Committed::Now, "events go on where they ended");
        assert_eq!(signal(store, run.id, SignalKind::Cancel).await, Signalled::Accepted { owner: Some(owner) });
        commit(store, &end(taken[0], 5, RunState::Succeeded)).await;
    }
}

/// Even a repeated commit of the end: the run has begun anew.
pub async fn a_retry_makes_every_earlier_lease_stale(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let (run, lease) = submit_leased(store, 1, owner).await;
    let last = end(lease, 3, RunState::Failed);
    commit(store, &last).await;
    signal(store, run.id, retry()).await;
    let before = dump(store, &run.tenant, run.id).await;
    assert_eq!(commit(store, &last).await, Committed::Stale);
    assert_eq!(commit(store, &step(lease, 4)).await, Committed::Stale);
    assert_eq!(dump(store, &run.tenant, run.id).await, before);
}

/// Not what is under way, not what succeeded, and not twice.
pub async fn only_what_failed_can_be_retried(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let (run, lease) = submit_leased(store, 1, owner).await;
    assert_eq!(signal(store, run.id, retry()).await, Signalled::WrongRunState(RunState::Running));
    commit(store, &end(lease, 3, RunState::Succeeded)).await;
    assert_eq!(signal(store, run.id, retry()).await, Signalled::WrongRunState(RunState::Succeeded));
    let queued = new_run(2);
    submit(store, &queued).await;
    assert_eq!(signal(store, queued.id, retry()).await, Signalled::WrongRunState(RunState::Queued));
    let (failed, lease) = submit_leased(store, 3, owner).await;
    commit(store, &end(lease, 3, RunState::Failed)).await;
    assert_eq!(signal(store, failed.id, retry()).await, Signalled::Accepted { owner: None });
    assert_eq!(signal(store, failed.id, retry()).await, Signalled::WrongRunState(RunState::Queued));
    assert_eq!(signal(store, run_id(4), retry()).await, Signalled::NoSuchRun);
}

/// One decision at a time; once it is answered and the stage is held again, the next one.
pub async fn a_decision_needs_a_held_stage(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let (run, lease) = submit_leased(store, 1, owner).await;
    commit(store, &hold(lease, 3, &["s2", "s3"])).await;
    assert_eq!(signal(store, run.id, approve("s9")).await, Signalled::StageNotHeld(None));
    assert_eq!(signal(store, run.id, reject("s1")).await, Signalled::StageNotHeld(Some(StageState::Running)));
    let accepted = Signalled::Accepted { owner: Some(owner) };
    let pending = Signalled::StageNotHeld(Some(StageState::Held));
    assert_eq!(signal(store, run.id, reject("s2")).await, accepted);
    assert_eq!(signal(store, run.id, approve("s2")).await, pending);
    assert_eq!(signal(store, run.id, reject("s2")).await, pending);
    assert_eq!(signal(store, run.id, approve("s3")).await, accepted, "another stage is another decision");
    let signals = signals_of(store, lease).await;
    assert_eq!(signals.len(), 2);
    let consumed = Commit { consumed: vec![signals[0].id], ..step(lease, 4) };
    commit(store, &consumed).await;
    assert_eq!(signal(store, run.id, approve("s2")).await, accepted);
    assert_eq!(signal(store, run.id, approve("s3")).await, pending);
}

/// The first edit of a held output is the one that is read, by an heir too, and a run's weight tells of it.
pub async fn an_edited_output_comes_back_byte_for_byte_and_has_a_weight(subject: Subject) {
    let store = &subject.store;
    let (owner, heir) = (live_replica(store).await, live_replica(store).await);
    let (run, lease) = submit_leased(store, 1, owner).await;
    commit(store, &Commit { stages: hold(lease, 3, &["s2"]).stages, ..park(lease, 3, None) }).await;
    let edit = |filler: usize| {
        let text = format!(r#"{{ "n" : 123456789012345678901234567890, "t": "\u0000{}" }}"#, "x".repeat(filler));
        SignalKind::Approve {
            stage: stage("s2"),
            attempt: Some(1),
            comment: Some(NASTY.to_owned()),
            output: Some(Json::from_text(&text).expect("JSON")),
        }
    };
    let first = edit(100_000);
    assert_eq!(signal(store, run.id, first.clone()).await, Signalled::Accepted { owner: None });
    assert_eq!(signal(store, run.id, edit(1)).await, Signalled::StageNotHeld(Some(StageState::Held)));
    let taken = claim_all(store, heir).await;
    let weight = store.weigh(&taken).await.expect("weigh")[0].bytes;
    let loaded = store.load(&taken).await.expect("load")[0].text_bytes();
    assert!(weight >= loaded + 100_000, "{weight} of {loaded}");
    let read = kinds(store, taken[0]).await;
    let text = |kind: &SignalKind| match kind {
        SignalKind::Approve { output: Some(output), comment, .. } => (output.as_str().to_owned(), comment.clone()),
        other => panic!("{other:?}"),
    };
    assert_eq!((read.len(), text(&read[0])), (1, text(&first)));
}

/// It only takes a retry, and that only if it failed.
pub async fn a_finished_run_takes_no_cancel_and_no_decision(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    for state in [RunState::Succeeded, RunState::Failed, RunState::Cancelled, RunState::Expired] {
        let (run, lease) = submit_leased(store, 1, owner).await;
        let last = Commit { stages: hold(lease, 3, &["s2"]).stages, ..end(lease, 3, state) };
        commit(store, &last).await;
        let before = dump(store, &run.tenant, run.id).await;
        for kind in [SignalKind::Cancel, approve("s2"), reject("s2")] {
            assert_eq!(signal(store, run.id, kind).await, Signalled::WrongRunState(state));
        }
        assert_eq!(dump(store, &run.tenant, run.id).await, before);
    }
    assert_eq!(claim_all(store, owner).await, []);
}

/// Another tenant leaves none; a lost lease reads none and clears nothing.
pub async fn signals_keep_to_their_tenant_and_owner(subject: Subject) {
    let store = &subject.store;
    let (owner, heir) = (live_replica(store).await, live_replica(store).await);
    let (run, old) = submit_leased(store, 1, owner).await;
    let foreign =
        NewSignal { tenant: tenant("umbrella"), run: run.id, kind: SignalKind::Cancel, by: Some(NASTY.to_owned()) };
    assert_eq!(store.signal(&foreign).await.expect("signal"), Signalled::NoSuchRun);
    assert!(!record(store, run.id).await.cancel_requested);
    store.release(&[old]).await.expect("release");
    let taken = claim_all(store, heir).await[0];
    let ours = NewSignal { tenant: run.tenant.clone(), ..foreign };
    assert_eq!(store.signal(&ours).await.expect("signal"), Signalled::Accepted { owner: Some(heir) });
    assert_eq!(kinds(store, old).await, []);
    assert_eq!(beat(store, heir, MINUTE).await.signalled, [run.id]);
    let signals = signals_of(store, taken).await;
    assert_eq!(signals[0].by.as_deref(), Some(NASTY));
}

/// Of each its own, oldest first; all marks are cleared; who has none and what is gone is left out.
pub async fn the_signals_of_many_runs_are_read_at_once(subject: Subject) {
    let store = &subject.store;
    let (owner, heir) = (live_replica(store).await, live_replica(store).await);
    assert_eq!(store.signals(&[]).await.expect("signals"), []);
    let mut leases = Vec::new();
    for n in 0..5 {
        let (_, lease) = submit_leased(store, n, owner).await;
        commit(store, &hold(lease, 3, &["s1", "s2"])).await;
        leases.push(lease);
    }
    // The first has two, the second has one, the third has none; the fourth is gone, the fifth is named wrongly.
    for (n, kind) in [(1, SignalKind::Cancel), (0, approve("s2")), (3, approve("s1")), (0, reject("s1"))] {
        signal(store, leases[n].run, kind).await;
    }
    signal(store, leases[4].run, approve("s1")).await;
    store.release(&[leases[3]]).await.expect("release");
    let heirs = claim_all(store, heir).await;
    let asked = [leases[4], leases[3], leases[2], leases[1], leases[0]]
        .map(|lease| if lease == leases[4] { Lease { epoch: Epoch(7), ..lease } } else { lease });
    let mut found = store.signals(&asked).await.expect("signals");
    found.sort_by_key(|(run, _)| *run);
    assert!(found.iter().all(|(_, signals)| signals.is_sorted_by(|a, b| a.id < b.id)), "oldest first");
    let kinds_of = |found: Vec<(RunId, Vec<stagegate_core::store::Signal>)>| -> Vec<(RunId, Vec<SignalKind>)> {
        let kinds = |signals: Vec<stagegate_core::store::Signal>| signals.into_iter().map(|each| each.kind).collect();
        found.into_iter().map(|(run, signals)| (run, kinds(signals))).collect()
    };
    let expected = [(leases[0].run, vec![approve("s2"), reject("s1")]), (leases[1].run, vec![SignalKind::Cancel])];
    assert_eq!(kinds_of(found), expected);
    assert_eq!(beat(store, owner, MINUTE).await.signalled, [leases[4].run], "the others were read");
    assert_eq!(beat(store, heir, MINUTE).await.signalled, [leases[3].run], "another's question clears nothing");
    let theirs = store.signals(&heirs).await.expect("signals");
    assert_eq!(kinds_of(theirs), [(leases[3].run, vec![approve("s1")])]);
    signal(store, leases[2].run, SignalKind::Cancel).await;
    signal(store, leases[1].run, approve("s2")).await;
    let mut told = beat(store, owner, MINUTE).await.signalled;
    told.sort();
    assert_eq!(told, [leases[1].run, leases[2].run, leases[4].run], "a later one marks its run anew");
    assert_eq!(store.signals(&asked).await.expect("signals").len(), 3, "they stay until they are consumed");
}
