//! Promises about leases.

use std::{collections::HashMap, time::Duration};

use stagegate_core::{
    Epoch, RunState,
    fair::Shares,
    store::{Committed, Lease, NewRun, QueueStats, StageRecord},
};

use super::{
    Subject,
    fixtures::{
        alive, at, beat, checkpoint, claim_all, commit, dump, end, full_attempt, full_stage, live_replica, new_run,
        park, record, replica, stage, step, submit, submit_leased,
    },
};

/// Longer than the shortest time to live, which is a millisecond.
async fn outlive_the_ttl() {
    tokio::time::sleep(Duration::from_millis(30)).await;
}

/// Whatever the order of submission inside one priority, and whatever the limit.
pub async fn priority_goes_first_then_who_has_waited_longest(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let mut expected = Vec::new();
    for (n, priority) in (0_i64..).zip([0, 5, -5, 5, 0, i16::MAX, i16::MIN]) {
        let run = NewRun { priority, ..new_run(n) };
        submit(store, &run).await;
        expected.push((priority, n, run.id));
        // The database's clock tells who has waited longer; its unit is a millisecond.
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
    expected.sort_by_key(|(priority, n, _)| (-i32::from(*priority), *n));
    assert_eq!(store.claim(owner, 0, &Shares::default()).await.expect("claim"), []);
    let mut claimed = Vec::new();
    for limit in [1, 2, 1, 10] {
        let mut page = store.claim(owner, limit, &Shares::default()).await.expect("claim");
        assert!(page.len() <= limit as usize);
        let rank = |lease: &Lease| expected.iter().position(|(_, _, id)| *id == lease.run);
        page.sort_by_key(rank);
        claimed.extend(page.into_iter().map(|lease| lease.run));
    }
    assert_eq!(claimed, expected.into_iter().map(|(_, _, id)| id).collect::<Vec<_>>());
}

/// What the run is stays what the last commit made of it, until its new owner commits.
pub async fn a_claim_changes_only_the_lease(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let run = new_run(1);
    submit(store, &run).await;
    let before = dump(store, &run.tenant, run.id).await;
    let lease = Lease { run: run.id, epoch: Epoch(1) };
    assert_eq!(claim_all(store, owner).await, [lease]);
    assert_eq!(dump(store, &run.tenant, run.id).await, before);
    assert_eq!(store.owned(owner).await.expect("owned"), [lease]);
}

/// Eight claimers at once; every run has one owner, and each knows what it owns.
pub async fn two_claimers_never_share_a_run(subject: Subject) {
    let store = &subject.store;
    let runs: Vec<NewRun> = (0..120).map(new_run).collect();
    store.submit(&runs).await.expect("submit");
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move {
                let owner = live_replica(&store).await;
                let mut mine = Vec::new();
                // A claimer that finds nothing may have met only runs that another one was taking.
                for _ in 0..40 {
                    mine.extend(store.claim(owner, 5, &Shares::default()).await.expect("claim"));
                }
                mine.sort_by_key(|lease| lease.run);
                let mut held = store.owned(owner).await.expect("owned");
                held.sort_by_key(|lease| lease.run);
                assert_eq!(held, mine);
                mine
            })
        })
        .collect();
    let mut owners = HashMap::new();
    for task in tasks {
        for lease in task.await.expect("no panic") {
            assert_eq!(owners.insert(lease.run, lease.epoch), None, "a run was claimed twice");
        }
    }
    assert_eq!(owners.len(), runs.len());
    assert!(owners.values().all(|epoch| *epoch == Epoch(1)));
}

/// Unknown, out of time, or gone.
pub async fn a_replica_that_is_not_alive_claims_nothing(subject: Subject) {
    let store = &subject.store;
    submit(store, &new_run(1)).await;
    let (late, gone) = (replica(), live_replica(store).await);
    beat(store, late, Duration::from_millis(1)).await;
    store.leave(gone).await.expect("leave");
    outlive_the_ttl().await;
    for dead in [replica(), late, gone] {
        assert_eq!(store.claim(dead, 10, &Shares::default()).await.expect("claim"), []);
    }
    let owner = live_replica(store).await;
    assert_eq!(claim_all(store, owner).await.len(), 1);
}

/// By one of many that look for them.
pub async fn a_dead_replicas_runs_are_taken_once_with_a_higher_epoch(subject: Subject) {
    let store = &subject.store;
    let dead = replica();
    beat(store, dead, Duration::from_mins(1)).await;
    let mut expected = HashMap::new();
    for n in 0..10 {
        let (run, _) = submit_leased(store, n, dead).await;
        expected.insert(run.id, Epoch(2));
    }
    beat(store, dead, Duration::from_millis(1)).await;
    outlive_the_ttl().await;
    let tasks: Vec<_> = (0..4)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move {
                let owner = live_replica(&store).await;
                let mut mine = Vec::new();
                for _ in 0..20 {
                    mine.extend(store.claim(owner, 3, &Shares::default()).await.expect("claim"));
                }
                mine
            })
        })
        .collect();
    let mut taken = HashMap::new();
    for task in tasks {
        for lease in task.await.expect("no panic") {
            assert_eq!(taken.insert(lease.run, lease.epoch), None, "a run was taken twice");
        }
    }
    assert_eq!(taken, expected);
    assert_eq!(store.owned(dead).await.expect("owned"), []);
}

/// Its heartbeat says so, its writes change nothing, and it takes nothing any more.
pub async fn a_replica_that_was_declared_dead_is_told_so(subject: Subject) {
    let store = &subject.store;
    let (dead, heir) = (live_replica(store).await, live_replica(store).await);
    let (run, lease) = submit_leased(store, 1, dead).await;
    beat(store, dead, Duration::from_millis(1)).await;
    outlive_the_ttl().await;
    let mut taken = claim_all(store, heir).await;
    while taken.is_empty() {
        taken = claim_all(store, heir).await;
    }
    assert_eq!(taken, [Lease { run: run.id, epoch: Epoch(2) }]);
    let before = dump(store, &run.tenant, run.id).await;
    let pulse = beat(store, dead, Duration::from_mins(1)).await;
    assert!(!pulse.alive && pulse.signalled.is_empty());
    assert_eq!(commit(store, &step(lease, 3)).await, Committed::Stale);
    store.release(&[lease]).await.expect("passed over");
    submit(store, &new_run(2)).await;
    assert_eq!(store.claim(dead, 10, &Shares::default()).await.expect("claim"), []);
    assert_eq!(dump(store, &run.tenant, run.id).await, before);
    assert_eq!(store.owned(heir).await.expect("owned"), taken);
    assert!(!beat(store, dead, Duration::from_mins(1)).await.alive, "it stays dead");
}

/// However often others look.
pub async fn a_live_replicas_runs_are_left_alone(subject: Subject) {
    let store = &subject.store;
    let (owner, other) = (live_replica(store).await, live_replica(store).await);
    let (_, lease) = submit_leased(store, 1, owner).await;
    beat(store, owner, Duration::from_millis(1)).await;
    outlive_the_ttl().await;
    // Late, but nobody had declared it dead.
    alive(store, owner).await;
    for _ in 0..3 {
        assert_eq!(claim_all(store, other).await, []);
    }
    assert_eq!(commit(store, &step(lease, 3)).await, Committed::Now);
}

/// By anybody, and a lease that is gone is passed over.
pub async fn released_runs_can_be_claimed_at_once(subject: Subject) {
    let store = &subject.store;
    let (owner, other) = (live_replica(store).await, live_replica(store).await);
    let (run, lease) = submit_leased(store, 1, owner).await;
    let (_, kept) = submit_leased(store, 2, owner).await;
    store.release(&[]).await.expect("nothing to do");
    store.release(&[lease, Lease { epoch: Epoch(9), ..kept }]).await.expect("release");
    assert_eq!(store.owned(owner).await.expect("owned"), [kept]);
    assert_eq!(commit(store, &step(lease, 3)).await, Committed::Stale);
    let taken = Lease { run: run.id, epoch: Epoch(2) };
    assert_eq!(claim_all(store, other).await, [taken]);
    store.release(&[lease]).await.expect("passed over");
    assert_eq!(store.owned(other).await.expect("owned"), [taken]);
}

/// At once, without waiting for its time to pass; and it is gone for good.
pub async fn a_replica_that_leaves_hands_everything_back(subject: Subject) {
    let store = &subject.store;
    let (owner, other) = (live_replica(store).await, live_replica(store).await);
    let mut expected = Vec::new();
    for n in 0..3 {
        let (run, _) = submit_leased(store, n, owner).await;
        expected.push(Lease { run: run.id, epoch: Epoch(2) });
    }
    let (_, kept) = submit_leased(store, 9, other).await;
    store.leave(owner).await.expect("leave");
    store.leave(replica()).await.expect("a replica that nobody knows");
    assert_eq!(store.owned(owner).await.expect("owned"), []);
    assert_eq!(store.owned(other).await.expect("owned"), [kept]);
    assert_eq!(claim_all(store, other).await, expected);
    assert!(!beat(store, owner, Duration::from_mins(1)).await.alive);
}

/// Over release, park, leave and retry alike.
pub async fn epochs_only_grow(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let (run, mut lease) = submit_leased(store, 1, owner).await;
    let again = async |before: Lease| -> Lease {
        let taken = claim_all(store, live_replica(store).await).await;
        assert_eq!(taken.len(), 1);
        assert_eq!(taken[0].run, run.id);
        assert!(taken[0].epoch > before.epoch, "{taken:?} after {before:?}");
        taken[0]
    };
    store.release(&[lease]).await.expect("release");
    lease = again(lease).await;
    assert_eq!(commit(store, &park(lease, 3, Some(Duration::ZERO))).await, Committed::Now);
    lease = again(lease).await;
    assert_eq!(commit(store, &end(lease, 4, RunState::Failed)).await, Committed::Now);
    let retry = stagegate_core::store::SignalKind::Retry { deadline_at: at(99) };
    super::fixtures::signal(store, run.id, retry).await;
    again(lease).await;
}

/// Input, stages, checkpoints, and the last attempt with an output of what has none; leases that are gone are left out.
pub async fn load_gives_everything_that_an_owner_needs(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let (run, lease) = submit_leased(store, 1, owner).await;
    let (bare, bare_lease) = submit_leased(store, 2, owner).await;
    let queued = new_run(3);
    submit(store, &queued).await;
    let mut first = step(lease, 3);
    first.stages = vec![full_stage("s1", "x"), full_stage("s2", "y")];
    first.attempts = vec![(stage("s1"), full_attempt(1, "x")), (stage("s2"), full_attempt(1, "y"))];
    first.checkpoints = vec![(stage("s1"), checkpoint("out".into()))];
    assert_eq!(commit(store, &first).await, Committed::Now);
    let mut second = step(lease, 4);
    // What failed without an output does not hide the output that a critique is about.
    let failed = stagegate_core::Attempt { output: None, ..full_attempt(3, "no output") };
    second.attempts = vec![(stage("s2"), full_attempt(2, "z")), (stage("s2"), failed)];
    second.stages = vec![StageRecord::pending(stage("s3"))];
    assert_eq!(commit(store, &second).await, Committed::Now);

    let stale = Lease { epoch: Epoch(7), ..bare_lease };
    let unleased = Lease { run: queued.id, epoch: Epoch(0) };
    assert_eq!(store.load(&[]).await.expect("load"), []);
    assert_eq!(store.load(&[stale, unleased]).await.expect("load"), []);
    assert_eq!(store.weigh(&[stale, unleased]).await.expect("weigh"), []);
    let weighed: Vec<(Lease, u64)> = store
        .weigh(&[bare_lease, unleased, lease])
        .await
        .expect("weigh")
        .into_iter()
        .map(|each| (each.lease, each.bytes))
        .collect();
    let mut loaded = store.load(&[bare_lease, unleased, lease]).await.expect("load");
    let bytes = |of: Lease| loaded.iter().find(|snapshot| snapshot.lease == of).expect("loaded").text_bytes();
    assert_eq!(weighed, [(bare_lease, bytes(bare_lease)), (lease, bytes(lease))], "as much as is loaded");
    loaded.sort_by_key(|snapshot| snapshot.lease.run);
    assert_eq!(loaded.len(), 2);
    let mut whole = loaded.remove(0);
    whole.stages.sort_by(|a, b| a.id.cmp(&b.id));
    assert_eq!((whole.lease, &whole.run, &whole.input), (lease, &record(store, run.id).await, &run.input));
    let pending = StageRecord::pending(stage("s3"));
    assert_eq!(whole.stages, [full_stage("s1", "x"), full_stage("s2", "y"), pending]);
    assert_eq!(whole.checkpoints, [(stage("s1"), checkpoint("out".into()))]);
    assert_eq!(whole.last_attempts, [(stage("s2"), full_attempt(2, "z"))]);
    let small = loaded.remove(0);
    assert_eq!((small.run.id, small.stages), (bare.id, bare.stages));
    assert!(small.checkpoints.is_empty() && small.last_attempts.is_empty());
    store.leave(owner).await.expect("leave");
    assert_eq!(store.load(&[lease]).await.expect("load"), []);
}

/// Over every state that a run can be in.
pub async fn the_queue_is_counted(subject: Subject) {
    let store = &subject.store;
    assert_eq!(store.queue().await.expect("queue"), QueueStats::default());
    let owner = live_replica(store).await;
    let mut leases = Vec::new();
    for n in 0..6 {
        leases.push(submit_leased(store, n, owner).await.1);
    }
    submit(store, &new_run(10)).await;
    let hour = Some(Duration::from_hours(1));
    commit(store, &park(leases[0], 3, None)).await;
    commit(store, &park(leases[1], 3, hour)).await;
    commit(store, &park(leases[2], 3, Some(Duration::ZERO))).await;
    commit(store, &end(leases[3], 3, RunState::Succeeded)).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    let stats = store.queue().await.expect("queue");
    assert_eq!((stats.queued, stats.running, stats.waiting), (2, 2, 2));
    assert!(stats.oldest_queued_ms >= 10);
    claim_all(store, owner).await;
    let stats = store.queue().await.expect("queue");
    assert_eq!(stats, QueueStats { queued: 0, running: 4, waiting: 2, oldest_queued_ms: 0 });
}
