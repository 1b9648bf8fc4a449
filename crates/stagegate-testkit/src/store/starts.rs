//! Promises about runs that start later.

use std::time::Duration;

use chrono::TimeDelta;
use stagegate_core::{
    RunState,
    store::{NewRun, RunQuery, SignalKind, Signalled},
};

use super::{
    Subject,
    fixtures::{
        at, claim_all, claim_until_one, commit, database_now, end, live_replica, new_run, record, signal, signals_of,
        submit, tenant,
    },
};

/// A start that is not reached while a test runs.
async fn later(subject: &Subject) -> chrono::DateTime<chrono::Utc> {
    database_now(&subject.store).await + TimeDelta::hours(1)
}

/// However often somebody looks, and whatever its priority; those beside it go on.
pub async fn a_delayed_run_cannot_be_claimed_before_its_time(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let delayed = NewRun { start_at: Some(later(&subject).await), priority: i16::MAX, ..new_run(1) };
    let prompt = new_run(2);
    store.submit(&[delayed.clone(), prompt.clone()]).await.expect("submit");
    let taken = claim_all(store, owner).await;
    assert_eq!(taken.iter().map(|lease| lease.run).collect::<Vec<_>>(), [prompt.id]);
    assert_eq!(claim_all(store, owner).await, []);
    let there = record(store, delayed.id).await;
    assert_eq!((there.state, there.started_at), (RunState::Queued, None));
}

/// It is never taken earlier, and nobody has to wake it.
pub async fn a_delayed_run_can_be_claimed_after_its_time_by_the_databases_clock(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    for delay_ms in [1, 40, 120] {
        let start_at = database_now(store).await + TimeDelta::milliseconds(delay_ms);
        let run = NewRun { start_at: Some(start_at), ..new_run(delay_ms) };
        submit(store, &run).await;
        let lease = claim_until_one(store, owner).await;
        let now = database_now(store).await;
        assert_eq!(lease.run, run.id);
        assert!(now >= start_at, "taken at {now}, before {start_at}");
    }
}

/// Nobody jumps the queue by naming a time that is long gone.
pub async fn a_start_in_the_past_is_at_once_and_goes_ahead_of_nobody(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let first = new_run(1);
    submit(store, &first).await;
    tokio::time::sleep(Duration::from_millis(3)).await;
    let past = NewRun { start_at: Some(at(-1_000_000)), ..new_run(2) };
    submit(store, &past).await;
    for expected in [first.id, past.id] {
        let taken = store.claim(owner, 1, &stagegate_core::fair::Shares::default()).await.expect("claim");
        assert_eq!(taken.iter().map(|lease| lease.run).collect::<Vec<_>>(), [expected]);
    }
}

/// It is claimed for it, and ends without ever having started.
pub async fn a_cancel_before_its_start_is_obeyed_at_once(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let run = NewRun { start_at: Some(later(&subject).await), ..new_run(1) };
    submit(store, &run).await;
    assert_eq!(claim_all(store, owner).await, []);
    assert_eq!(signal(store, run.id, SignalKind::Cancel).await, Signalled::Accepted { owner: None });
    let taken = claim_all(store, owner).await;
    assert_eq!(taken.len(), 1);
    assert_eq!(signals_of(store, taken[0]).await.len(), 1);
    commit(store, &end(taken[0], 1, RunState::Cancelled)).await;
    assert_eq!(record(store, run.id).await.state, RunState::Cancelled);
    assert_eq!(claim_all(store, owner).await, []);
}

/// By its record, by a list, and by whoever loads it; a run without one has none.
pub async fn a_start_time_is_read_back(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let start_at = at(12_345);
    let run = NewRun { start_at: Some(start_at), ..new_run(1) };
    let plain = new_run(2);
    store.submit(&[run.clone(), plain.clone()]).await.expect("submit");
    assert_eq!(record(store, run.id).await.start_at, Some(start_at));
    assert_eq!(record(store, plain.id).await.start_at, None);
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
    let listed = store.runs(&query).await.expect("list");
    assert_eq!(listed.iter().map(|run| run.start_at).collect::<Vec<_>>(), [None, Some(start_at)]);
    let leases = claim_all(store, owner).await;
    let loaded = store.load(&leases).await.expect("load");
    let of_run = loaded.iter().find(|snapshot| snapshot.run.id == run.id).expect("it is loaded");
    assert_eq!(of_run.run.start_at, Some(start_at));
}
