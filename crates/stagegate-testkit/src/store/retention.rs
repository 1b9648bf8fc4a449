//! Promises about what is kept, and how it goes: purged of its payloads, or deleted whole.

use std::sync::Arc;

use stagegate_core::{
    Json, ReplicaId, RunId, RunState, StageId, Store,
    store::{Commit, Committed, Kept, Lease, NewRun, RunQuery, SignalKind, Signalled, Submitted},
};

use super::{
    Subject,
    fixtures::{
        Dump, at, checkpoint, claim_all, commit, dump, end, full_attempt, full_stage, idempotency, leased_run,
        live_replica, new_run, of_tenant, pipeline, record, run_id, signal, stage, step, submit, submit_leased, tenant,
    },
};

/// A run that has everything that a run can have, and has ended so.
async fn ended(store: &Arc<dyn Store>, ms: i64, owner: ReplicaId, state: RunState) -> (NewRun, Lease) {
    let (run, lease) = submit_leased(store, ms, owner).await;
    let work = Commit {
        stages: vec![full_stage("s1", "x"), full_stage("s2", "y")],
        attempts: vec![(stage("s1"), full_attempt(1, "x")), (stage("s2"), full_attempt(1, "y"))],
        checkpoints: vec![(stage("s1"), checkpoint("a secret".into()))],
        ..step(lease, 3)
    };
    assert_eq!(commit(store, &work).await, Committed::Now);
    let output = (state == RunState::Succeeded).then(|| "another secret".into());
    assert_eq!(commit(store, &Commit { output, ..end(lease, 4, state) }).await, Committed::Now);
    (run, lease)
}

fn retry() -> SignalKind {
    SignalKind::Retry { deadline_at: at(9_000) }
}

async fn walk(store: &Arc<dyn Store>, before: i64, limit: u32) -> Vec<Kept> {
    let (mut all, mut after) = (Vec::new(), None);
    loop {
        let page = store.kept(after, at(before), limit).await.expect("kept");
        assert!(page.len() <= limit as usize);
        let Some(last) = page.last() else { return all };
        after = Some(last.run);
        all.extend(page);
    }
}

/// Every run of every tenant and state, once, in order; those that are too young are left out.
pub async fn retention_walks_through_all_runs(subject: Subject) {
    let store = &subject.store;
    assert_eq!(walk(store, 1_000, 5).await, []);
    let owner = live_replica(store).await;
    let mut expected = Vec::new();
    let kept = |run: &NewRun, state, finished_at| Kept {
        run: run.id,
        tenant: run.tenant.clone(),
        pipeline: run.pipeline.clone(),
        version: run.version,
        state,
        finished_at,
        purged: false,
    };
    for (n, state) in (0..).zip(RunState::ALL.iter().copied().filter(|state| state.is_terminal())) {
        let (run, _) = ended(store, n, owner, state).await;
        expected.push(kept(&run, state, Some(at(20))));
    }
    let (running, _) = submit_leased(store, 10, owner).await;
    let queued = NewRun { pipeline: pipeline("other"), version: 7, ..of_tenant("umbrella", 11) };
    let parked = leased_run(12, owner);
    store.submit(&[queued.clone(), parked.clone()]).await.expect("submit");
    let lease = Lease { run: parked.id, epoch: stagegate_core::Epoch(1) };
    commit(store, &super::fixtures::park(lease, 3, None)).await;
    expected.push(kept(&running, RunState::Running, None));
    expected.push(kept(&queued, RunState::Queued, None));
    expected.push(kept(&parked, RunState::Waiting, None));
    submit(store, &new_run(500)).await;
    for limit in [1, 3, 100] {
        assert_eq!(walk(store, 500, limit).await, expected, "by {limit}");
    }
    assert_eq!(walk(store, 501, 100).await.len(), expected.len() + 1);
    assert_eq!(walk(store, 11, 2).await.len(), 5, "accepted before, not at");
    assert_eq!(walk(store, 0, 2).await, []);
    store.purge(&[expected[1].run], at(600)).await.expect("purge");
    expected[1].purged = true;
    assert_eq!(walk(store, 500, 100).await, expected);
}

/// What remains of a run that was purged.
fn without_payloads(mut dump: Dump, at: chrono::DateTime<chrono::Utc>) -> Dump {
    dump.detail.run.purged_at = Some(at);
    dump.detail.input = Json::null();
    dump.detail.output = None;
    for stage in &mut dump.stages {
        if let Some(checkpoint) = &mut stage.checkpoint {
            checkpoint.output = Json::null();
        }
        for attempt in &mut stage.attempts {
            attempt.purge();
        }
    }
    dump
}

/// Input, output, the checkpoints' and attempts' outputs go; the record, stages, attempts, calls and events stay.
pub async fn a_purge_removes_payloads_and_nothing_else(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    for (n, state) in (0..).zip([RunState::Succeeded, RunState::Failed, RunState::Cancelled, RunState::Expired]) {
        let (run, lease) = ended(store, n, owner, state).await;
        let (other, _) = ended(store, n, owner, state).await;
        let before = dump(store, &run.tenant, run.id).await;
        let untouched = dump(store, &other.tenant, other.id).await;
        assert_eq!((before.detail.run.purged_at, before.stages.len()), (None, 2));
        assert_eq!(store.purge(&[run.id], at(700)).await.expect("purge"), 1);
        assert_eq!(dump(store, &run.tenant, run.id).await, without_payloads(before, at(700)));
        assert_eq!(dump(store, &other.tenant, other.id).await, untouched);
        assert!(!serde_json::to_string(&record(store, run.id).await).expect("JSON").contains("secret"));
        let last = Commit { output: None, ..end(lease, 4, state) };
        assert_eq!(commit(store, &last).await, Committed::Already, "the record still knows what happened");
    }
}

/// The first time is what is noted, and only what is purged now is counted.
pub async fn a_purge_can_be_repeated(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let (first, _) = ended(store, 1, owner, RunState::Failed).await;
    let (second, _) = ended(store, 2, owner, RunState::Succeeded).await;
    assert_eq!(store.purge(&[], at(1)).await.expect("purge"), 0);
    assert_eq!(store.purge(&[first.id], at(100)).await.expect("purge"), 1);
    assert_eq!(store.purge(&[first.id], at(200)).await.expect("purge"), 0);
    assert_eq!(store.purge(&[first.id, second.id, run_id(3)], at(300)).await.expect("purge"), 1);
    assert_eq!(record(store, first.id).await.purged_at, Some(at(100)));
    assert_eq!(record(store, second.id).await.purged_at, Some(at(300)));
}

/// Queued, running, parked, delayed: nothing that a live run needs goes.
pub async fn what_has_not_ended_is_neither_purged_nor_deleted(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let (running, _) = submit_leased(store, 1, owner).await;
    let (parked, lease) = submit_leased(store, 2, owner).await;
    commit(store, &super::fixtures::park(lease, 3, None)).await;
    let (again, _) = ended(store, 3, owner, RunState::Failed).await;
    assert_eq!(signal(store, again.id, retry()).await, Signalled::Accepted { owner: None });
    let far = super::fixtures::database_now(store).await + chrono::TimeDelta::hours(1);
    let (queued, delayed) = (new_run(4), NewRun { start_at: Some(far), ..new_run(5) });
    store.submit(&[queued.clone(), delayed.clone()]).await.expect("submit");
    let ids = [running.id, parked.id, again.id, queued.id, delayed.id];
    let mut before = Vec::new();
    for id in ids {
        before.push(dump(store, &tenant("acme"), id).await);
    }
    assert_eq!(store.purge(&ids, at(700)).await.expect("purge"), 0);
    assert_eq!(store.delete(&ids).await.expect("delete"), []);
    for (id, before) in ids.into_iter().zip(before) {
        assert_eq!(dump(store, &tenant("acme"), id).await, before);
    }
    let taken = claim_all(store, owner).await;
    assert_eq!(taken.len(), 2, "the queued one, and the one that is tried again");
}

/// There is nothing to go on with. One that succeeded could not be retried anyway.
pub async fn what_was_purged_cannot_be_retried(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    for state in [RunState::Failed, RunState::Cancelled, RunState::Expired] {
        let (run, _) = ended(store, 1, owner, state).await;
        store.purge(&[run.id], at(100)).await.expect("purge");
        let before = dump(store, &run.tenant, run.id).await;
        assert_eq!(signal(store, run.id, retry()).await, Signalled::Purged);
        assert_eq!(signal(store, run.id, SignalKind::Cancel).await, Signalled::WrongRunState(state));
        assert_eq!(dump(store, &run.tenant, run.id).await, before);
    }
    let (done, _) = ended(store, 2, owner, RunState::Succeeded).await;
    store.purge(&[done.id], at(100)).await.expect("purge");
    assert_eq!(signal(store, done.id, retry()).await, Signalled::WrongRunState(RunState::Succeeded));
    assert_eq!(claim_all(store, owner).await, []);
}

async fn is_gone(store: &Arc<dyn Store>, run: &NewRun, lease: Lease) {
    assert_eq!(store.run(&run.tenant, run.id).await.expect("read"), None);
    assert_eq!(store.run_record(&run.tenant, run.id).await.expect("read"), None);
    for of in ["s1", "s2"] {
        let of: StageId = stage(of);
        assert_eq!(store.stage(&run.tenant, run.id, &of).await.expect("read"), None);
    }
    assert_eq!(store.events(&run.tenant, run.id, 0, 10).await.expect("read"), []);
    assert_eq!(store.news(&[(run.id, 0)], 10).await.expect("news"), []);
    assert_eq!(store.load(&[lease]).await.expect("load"), []);
    assert_eq!(signal(store, run.id, retry()).await, Signalled::NoSuchRun);
    assert_eq!(commit(store, &end(lease, 4, RunState::Failed)).await, Committed::Stale);
    assert_eq!(commit(store, &step(lease, 5)).await, Committed::Stale);
}

/// Purged before or not; its neighbours stay.
pub async fn a_deleted_run_is_gone_whole(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let mut expected = Vec::new();
    let (kept, _) = ended(store, 50, owner, RunState::Failed).await;
    let untouched = dump(store, &kept.tenant, kept.id).await;
    for (n, state) in (0..).zip([RunState::Succeeded, RunState::Failed, RunState::Cancelled, RunState::Expired]) {
        expected.push(ended(store, n, owner, state).await);
    }
    store.purge(&[expected[0].0.id], at(100)).await.expect("purge");
    let mut ids: Vec<RunId> = expected.iter().map(|(run, _)| run.id).collect();
    assert_eq!(store.delete(&[]).await.expect("delete"), []);
    let asked = [ids.clone(), vec![run_id(9)]].concat();
    let mut deleted = store.delete(&asked).await.expect("delete");
    deleted.sort();
    ids.sort();
    assert_eq!(deleted, ids);
    for (run, lease) in &expected {
        is_gone(store, run, *lease).await;
    }
    assert_eq!(store.delete(&asked).await.expect("delete"), [], "once");
    assert_eq!(dump(store, &kept.tenant, kept.id).await, untouched);
    assert_eq!(walk(store, 1_000, 10).await.len(), 1);
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
    assert_eq!(store.runs(&query).await.expect("list").len(), 1);
}

/// The next request with it makes a run.
pub async fn a_deleted_runs_idempotency_key_is_free_again(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let first = NewRun { idempotency: idempotency("k", 1), ..leased_run(1, owner) };
    submit(store, &first).await;
    let lease = Lease { run: first.id, epoch: stagegate_core::Epoch(1) };
    commit(store, &end(lease, 3, RunState::Succeeded)).await;
    let next = NewRun { idempotency: idempotency("k", 2), ..new_run(2) };
    store.purge(&[first.id], at(50)).await.expect("purge");
    assert_eq!(submit(store, &next).await, Submitted::Conflict(first.id), "what was purged still has its key");
    assert_eq!(store.delete(&[first.id]).await.expect("delete"), [first.id]);
    assert_eq!(submit(store, &next).await, Submitted::Accepted(None));
    assert!(store.run_record(&tenant("acme"), next.id).await.expect("read").is_some());
}

/// Whichever comes first: a run that a retry has opened is there, whole, and one that is gone was not opened.
pub async fn a_run_that_is_being_retried_is_not_deleted(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    for round in 0..40 {
        let (run, _) = ended(store, round, owner, RunState::Failed).await;
        let (purging, id) = (round % 2 == 0, run.id);
        let removing = tokio::spawn({
            let store = store.clone();
            async move {
                if purging {
                    store.purge(&[id], at(800)).await.expect("purge") == 1
                } else {
                    store.delete(&[id]).await.expect("delete") == [id]
                }
            }
        });
        let retrying = tokio::spawn({
            let store = store.clone();
            async move { signal(&store, id, retry()).await }
        });
        let (removed, answer) = (removing.await.expect("no panic"), retrying.await.expect("no panic"));
        let refused = if purging { Signalled::Purged } else { Signalled::NoSuchRun };
        assert_eq!(answer, if removed { refused } else { Signalled::Accepted { owner: None } }, "round {round}");
        if !removed {
            let taken = claim_all(store, owner).await;
            let loaded = store.load(&taken).await.expect("load").remove(0);
            assert_eq!((loaded.run.id, &loaded.input), (run.id, &run.input));
            assert_eq!((loaded.stages.len(), loaded.checkpoints.len()), (2, 1));
            commit(store, &end(taken[0], 5, RunState::Failed)).await;
        }
    }
}
