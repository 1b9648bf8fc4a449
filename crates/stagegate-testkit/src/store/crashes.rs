//! Promises about runs whose owners die or panic.

use std::{sync::Arc, time::Duration};

use stagegate_core::{
    Epoch, ReplicaId, RunState, Store,
    store::{Committed, Lease, PutBack, SignalKind, Weighed},
};

use super::{
    Subject,
    fixtures::{
        at, beat, claim_all, claim_until_one, commit, end, live_replica, new_run, park, signal, step, submit,
        submit_leased,
    },
};

/// The owner dies, and another one takes the run.
async fn next_owner(store: &Arc<dyn Store>, dead: ReplicaId) -> (ReplicaId, Lease) {
    beat(store, dead, Duration::from_millis(1)).await;
    let heir = live_replica(store).await;
    (heir, claim_until_one(store, heir).await)
}

async fn weighed(store: &Arc<dyn Store>, lease: Lease) -> Weighed {
    store.weigh(&[lease]).await.expect("weigh").pop().expect("it is leased")
}

async fn crashes(store: &Arc<dyn Store>, lease: Lease) -> u32 {
    weighed(store, lease).await.crashes
}

/// Once for each, from the first owner on, whether it was leased with its insert or claimed, and whether or not an owner
/// came as far as to say that it resumes.
pub async fn each_owner_that_dies_is_counted(subject: Subject) {
    let store = &subject.store;
    let mut owner = live_replica(store).await;
    let (_, mut lease) = submit_leased(store, 1, owner).await;
    assert_eq!(crashes(store, lease).await, 0);
    for died in 1..4 {
        (owner, lease) = next_owner(store, owner).await;
        assert_eq!(crashes(store, lease).await, died);
    }
    assert_eq!(commit(store, &step(lease, 3)).await, Committed::Now);
    assert_eq!(crashes(store, lease).await, 3, "to resume is no progress");
    (owner, lease) = next_owner(store, owner).await;
    assert_eq!(crashes(store, lease).await, 4);
    store.leave(owner).await.expect("leave");

    let queued = live_replica(store).await;
    assert_eq!(commit(store, &end(claim_all(store, queued).await[0], 4, RunState::Failed)).await, Committed::Now);
    let run = new_run(2);
    submit(store, &run).await;
    let lease = claim_until_one(store, queued).await;
    assert_eq!((lease.run, crashes(store, lease).await), (run.id, 0));
    let (_, lease) = next_owner(store, queued).await;
    assert_eq!(weighed(store, lease).await.tenant, run.tenant);
    assert_eq!(crashes(store, lease).await, 1);
}

/// More than one event since the last crash.
pub async fn progress_begins_the_count_anew(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    submit_leased(store, 1, owner).await;
    let (owner, _) = next_owner(store, owner).await;
    let (owner, lease) = next_owner(store, owner).await;
    assert_eq!(crashes(store, lease).await, 2);
    for last_seq in [3, 4] {
        assert_eq!(commit(store, &step(lease, last_seq)).await, Committed::Now);
    }
    assert_eq!(crashes(store, lease).await, 0);
    let (_, lease) = next_owner(store, owner).await;
    assert_eq!(crashes(store, lease).await, 1);
}

/// However it was handed back.
pub async fn what_is_handed_back_has_not_crashed(subject: Subject) {
    let store = &subject.store;
    let (owner, other) = (live_replica(store).await, live_replica(store).await);
    let (_, lease) = submit_leased(store, 1, owner).await;
    store.release(&[lease]).await.expect("release");
    let lease = claim_until_one(store, owner).await;
    store.put_back(&[PutBack { lease, after: Duration::ZERO, crashed: false }]).await.expect("put back");
    let lease = claim_until_one(store, owner).await;
    assert_eq!(crashes(store, lease).await, 0);
    assert_eq!(commit(store, &park(lease, 3, Some(Duration::ZERO))).await, Committed::Now);
    let lease = claim_until_one(store, owner).await;
    store.leave(owner).await.expect("leave");
    let last = claim_until_one(store, other).await;
    assert!(last.epoch > lease.epoch);
    assert_eq!(crashes(store, last).await, 0);
}

/// It counts, and it waits for its time. A lease that is gone is passed over.
pub async fn a_panic_counts_and_the_run_waits(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let (_, now) = submit_leased(store, 1, owner).await;
    let (_, later) = submit_leased(store, 2, owner).await;
    let (_, kept) = submit_leased(store, 3, owner).await;
    let back = |lease, after| PutBack { lease, after, crashed: true };
    store.put_back(&[]).await.expect("nothing to do");
    let stale = Lease { epoch: Epoch(9), ..kept };
    let hour = Duration::from_hours(1);
    let all = [back(now, Duration::ZERO), back(later, hour), back(stale, Duration::ZERO)];
    store.put_back(&all).await.expect("put back");
    store.put_back(&all).await.expect("put back again");
    assert_eq!(commit(store, &step(now, 3)).await, Committed::Stale);
    assert_eq!(store.owned(owner).await.expect("owned"), [kept]);
    let taken = claim_all(store, owner).await;
    assert_eq!(taken, [Lease { epoch: Epoch(2), ..now }], "the other one waits");
    assert_eq!(crashes(store, taken[0]).await, 1, "it counts once");
    store.put_back(&[back(taken[0], Duration::from_millis(1))]).await.expect("put back");
    let lease = claim_until_one(store, owner).await;
    assert_eq!((lease.run, crashes(store, lease).await), (now.run, 2));
    signal(store, later.run, SignalKind::Cancel).await;
    let lease = claim_until_one(store, owner).await;
    assert_eq!((lease.run, crashes(store, lease).await), (later.run, 1), "a signal wakes it");
}

/// Its end is progress.
pub async fn a_retry_begins_the_count_anew(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let (run, _) = submit_leased(store, 1, owner).await;
    let (_, lease) = next_owner(store, owner).await;
    assert_eq!(commit(store, &step(lease, 3)).await, Committed::Now);
    assert_eq!(commit(store, &end(lease, 4, RunState::Failed)).await, Committed::Now);
    signal(store, run.id, SignalKind::Retry { deadline_at: at(99) }).await;
    let owner = live_replica(store).await;
    let lease = claim_until_one(store, owner).await;
    assert_eq!(crashes(store, lease).await, 0);
    let (_, lease) = next_owner(store, owner).await;
    assert_eq!(crashes(store, lease).await, 1);
}
