//! Promises about what is counted: the backlog, depths, and replicas.

use std::{sync::Arc, time::Duration};

use chrono::TimeDelta;
use stagegate_core::{
    ReplicaId, RunState, Store, TenantId,
    fair::Shares,
    store::{Backlog, Heartbeat, NewRun, ReplicaRecord, SignalKind},
};

use super::{
    Subject,
    fixtures::{
        beat, claim_all, commit, database_now, end, leased_run, live_replica, new_run, of_tenant, park, pipeline,
        replica, signal, submit, submit_leased, tenant,
    },
};

const HOUR: Option<Duration> = Some(Duration::from_hours(1));

/// The backlog in order of its names, without ages.
async fn backlog(store: &Arc<dyn Store>, of: Option<&TenantId>) -> Vec<(String, String, [u64; 3])> {
    let mut rows = store.backlog(of).await.expect("backlog");
    rows.sort_by(|a, b| (&a.tenant, &a.pipeline).cmp(&(&b.tenant, &b.pipeline)));
    let row = |row: Backlog| (row.tenant.to_string(), row.pipeline.to_string(), [row.queued, row.waiting, row.running]);
    rows.into_iter().map(row).collect()
}

async fn depths(store: &Arc<dyn Store>) -> Vec<(String, u64)> {
    let mut rows: Vec<_> =
        store.depths().await.expect("depths").into_iter().map(|(of, count)| (of.to_string(), count)).collect();
    rows.sort();
    rows
}

fn row(of: &str, name: &str, counts: [u64; 3]) -> (String, String, [u64; 3]) {
    (of.to_owned(), name.to_owned(), counts)
}

/// Queued, waiting for a time or a person, under way; what has ended is in none, and what has none is left out.
pub async fn the_backlog_is_counted_by_tenant_and_pipeline(subject: Subject) {
    let store = &subject.store;
    assert_eq!(backlog(store, None).await, []);
    let owner = live_replica(store).await;
    let far = database_now(store).await + TimeDelta::hours(1);
    let mut leases = Vec::new();
    for n in 0..5 {
        leases.push(submit_leased(store, n, owner).await.1);
    }
    commit(store, &park(leases[0], 3, None)).await;
    commit(store, &park(leases[1], 3, HOUR)).await;
    commit(store, &park(leases[2], 3, Some(Duration::ZERO))).await;
    commit(store, &end(leases[3], 3, RunState::Failed)).await;
    let other = pipeline("other");
    let queue = [
        new_run(10),
        NewRun { start_at: Some(far), ..new_run(11) },
        NewRun { pipeline: other.clone(), ..new_run(12) },
        NewRun { pipeline: other, ..of_tenant("umbrella", 13) },
        NewRun { start_at: Some(far), ..of_tenant("umbrella", 14) },
    ];
    store.submit(&queue).await.expect("submit");
    tokio::time::sleep(Duration::from_millis(5)).await;
    let ours = [row("acme", "brief-to-spec", [2, 3, 1]), row("acme", "other", [1, 0, 0])];
    let theirs = [row("umbrella", "brief-to-spec", [0, 1, 0]), row("umbrella", "other", [1, 0, 0])];
    assert_eq!(backlog(store, Some(&tenant("acme"))).await, ours);
    assert_eq!(backlog(store, Some(&tenant("umbrella"))).await, theirs);
    assert_eq!(backlog(store, Some(&tenant("nobody"))).await, []);
    assert_eq!(backlog(store, None).await, [ours, theirs].concat());
    // What was parked for ever, and what is delayed, is awake once it is signalled.
    signal(store, leases[0].run, SignalKind::Cancel).await;
    signal(store, queue[1].id, SignalKind::Cancel).await;
    assert_eq!(backlog(store, Some(&tenant("acme"))).await[0], row("acme", "brief-to-spec", [4, 1, 1]));
}

/// A dead replica's runs are not under way: they can be claimed, and so they wait.
pub async fn what_dead_replicas_own_counts_as_queued(subject: Subject) {
    let store = &subject.store;
    let (owner, dead) = (live_replica(store).await, live_replica(store).await);
    submit_leased(store, 1, owner).await;
    for n in 2..5 {
        submit_leased(store, n, dead).await;
    }
    assert_eq!(backlog(store, None).await, [row("acme", "brief-to-spec", [0, 0, 4])]);
    assert_eq!(depths(store).await, []);
    beat(store, dead, Duration::from_millis(1)).await;
    tokio::time::sleep(Duration::from_millis(30)).await;
    assert_eq!(backlog(store, None).await, [row("acme", "brief-to-spec", [3, 0, 1])]);
    assert_eq!(depths(store).await, [("acme".to_owned(), 3)]);
    let taken = claim_until(store, owner, 3).await;
    assert_eq!(taken, 3);
    assert_eq!(backlog(store, None).await, [row("acme", "brief-to-spec", [0, 0, 4])]);
    assert_eq!(depths(store).await, []);
}

async fn claim_until(store: &Arc<dyn Store>, owner: ReplicaId, count: usize) -> usize {
    let mut taken = 0;
    for _ in 0..1_000 {
        taken += claim_all(store, owner).await.len();
        if taken >= count {
            break;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    taken
}

/// Of those that can be claimed: what is young hides what is old nowhere.
pub async fn a_backlog_tells_its_age(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    submit(store, &new_run(1)).await;
    tokio::time::sleep(Duration::from_millis(40)).await;
    submit(store, &NewRun { priority: 9, ..new_run(2) }).await;
    submit(store, &of_tenant("umbrella", 3)).await;
    let age = async |of: &str| {
        store.backlog(Some(&tenant(of))).await.expect("backlog").into_iter().map(|row| row.oldest_queued_ms).max()
    };
    // Asked in this order, the older one can only be the older.
    let young = age("umbrella").await.expect("there is one");
    let old = age("acme").await.expect("there is one");
    assert!(old >= 35 && old > young, "{old} ms and {young} ms");
    claim_all(store, owner).await;
    assert_eq!((age("acme").await, age("umbrella").await), (Some(0), Some(0)));
}

/// Those that wait for their time are among them, those that wait for a person and those under way are not.
pub async fn depths_are_counted_by_tenant(subject: Subject) {
    let store = &subject.store;
    assert_eq!(depths(store).await, []);
    let owner = live_replica(store).await;
    let far = database_now(store).await + TimeDelta::hours(1);
    let mut leases = Vec::new();
    for n in 0..4 {
        leases.push(submit_leased(store, n, owner).await.1);
    }
    commit(store, &park(leases[0], 3, None)).await;
    commit(store, &park(leases[1], 3, HOUR)).await;
    commit(store, &end(leases[2], 3, RunState::Succeeded)).await;
    let limited: Vec<NewRun> = (10..20).map(|n| super::fixtures::keyed(n, "k", 1)).collect();
    store.submit(&limited).await.expect("submit");
    submit(store, &NewRun { start_at: Some(far), ..of_tenant("umbrella", 30) }).await;
    assert_eq!(depths(store).await, [("acme".to_owned(), 11), ("umbrella".to_owned(), 1)]);
    let taken = store.claim(owner, 100, &Shares::default()).await.expect("claim").len();
    assert_eq!(taken, 1);
    assert_eq!(depths(store).await, [("acme".to_owned(), 10), ("umbrella".to_owned(), 1)]);
}

async fn replicas(store: &Arc<dyn Store>, of: Option<&TenantId>) -> Vec<ReplicaRecord> {
    store.replicas(of).await.expect("replicas")
}

fn find(rows: &[ReplicaRecord], id: ReplicaId) -> ReplicaRecord {
    rows.iter().find(|row| row.id == id).expect("it is there").clone()
}

/// As it reported itself last; the living first.
pub async fn replicas_are_listed_alive_draining_and_dead(subject: Subject) {
    let store = &subject.store;
    assert_eq!(replicas(store, None).await, []);
    let (late, gone) = (live_replica(store).await, live_replica(store).await);
    let (living, draining) = (live_replica(store).await, replica());
    let report = |version: &str, draining_now| Heartbeat {
        replica: draining,
        name: "blade-7".to_owned(),
        version: version.to_owned(),
        draining: draining_now,
        ttl: Duration::from_mins(1),
        capabilities: stagegate_core::Capabilities::own(),
        way_back: Duration::ZERO,
    };
    store.heartbeat(&report("1.2.3", false)).await.expect("heartbeat");
    let first = find(&replicas(store, None).await, draining);
    assert_eq!((first.name.as_str(), first.version.as_str(), first.draining), ("blade-7", "1.2.3", false));
    tokio::time::sleep(Duration::from_millis(5)).await;
    store.heartbeat(&report("1.2.3", true)).await.expect("heartbeat");
    store.leave(gone).await.expect("leave");
    beat(store, late, Duration::from_millis(1)).await;
    tokio::time::sleep(Duration::from_millis(30)).await;
    let rows = replicas(store, None).await;
    assert_eq!(rows.len(), 4);
    assert!(rows.is_sorted_by_key(|row| !row.alive), "the living first: {rows:?}");
    for (id, alive) in [(late, false), (gone, false), (living, true), (draining, true)] {
        assert_eq!(find(&rows, id).alive, alive);
        assert_eq!(find(&rows, id).left, id == gone, "it alone said that it leaves");
    }
    let now = find(&rows, draining);
    assert!(now.draining && !find(&rows, living).draining);
    assert_eq!(now.started_at, first.started_at, "its life began once");
    assert!(find(&rows, late).heartbeat_age_ms >= 25);
    // Late, but nobody had declared it dead.
    beat(store, late, Duration::from_mins(1)).await;
    assert!(find(&replicas(store, None).await, late).alive);
}

/// Over all tenants, or of one; whatever ends a lease ends its count.
pub async fn replicas_tell_what_they_own(subject: Subject) {
    let store = &subject.store;
    let (owner, idle) = (live_replica(store).await, live_replica(store).await);
    let (_, lease) = submit_leased(store, 1, owner).await;
    let theirs = NewRun { tenant: tenant("umbrella"), ..leased_run(2, owner) };
    tokio::time::sleep(Duration::from_millis(40)).await;
    submit(store, &theirs).await;
    submit(store, &new_run(3)).await;
    claim_all(store, owner).await;
    let of = async |tenant: Option<&TenantId>| find(&replicas(store, tenant).await, owner);
    // Asked in this order, what is older can only be older.
    let umbrella = of(Some(&tenant("umbrella"))).await;
    let all = of(None).await;
    let acme = of(Some(&tenant("acme"))).await;
    assert_eq!((all.runs, acme.runs, umbrella.runs), (3, 2, 1));
    let age = |row: &ReplicaRecord| row.oldest_lease_ms.expect("it owns one");
    assert!(age(&acme) >= age(&all) && age(&all) >= 35 && age(&all) > age(&umbrella), "{acme:?} {all:?} {umbrella:?}");
    let nobody = of(Some(&tenant("nobody"))).await;
    assert_eq!((nobody.runs, nobody.oldest_lease_ms), (0, None));
    let other = find(&replicas(store, None).await, idle);
    assert_eq!((other.runs, other.oldest_lease_ms), (0, None));
    commit(store, &end(lease, 3, RunState::Succeeded)).await;
    let before = of(None).await;
    assert_eq!(before.runs, 2);
    // Asked in this order, what began together can only be older the second time.
    let umbrella = of(Some(&tenant("umbrella"))).await;
    assert!(age(&before) <= age(&umbrella), "the oldest one has ended: {before:?} {umbrella:?}");
    store.leave(owner).await.expect("leave");
    let after = of(None).await;
    assert_eq!((after.alive, after.runs, after.oldest_lease_ms), (false, 0, None));
}

/// A lease that was taken anew is young, however old the run and whoever had it before.
pub async fn a_leases_age_begins_with_its_owner(subject: Subject) {
    let store = &subject.store;
    let (first, second) = (live_replica(store).await, live_replica(store).await);
    let (_, lease) = submit_leased(store, 1, first).await;
    tokio::time::sleep(Duration::from_millis(60)).await;
    let old = find(&replicas(store, None).await, first).oldest_lease_ms.expect("it owns one");
    assert!(old >= 55);
    store.release(&[lease]).await.expect("release");
    let began = database_now(store).await;
    assert_eq!(claim_all(store, second).await.len(), 1);
    let young = find(&replicas(store, None).await, second).oldest_lease_ms.expect("it owns one");
    let since = (database_now(store).await - began).num_milliseconds();
    assert!(i64::try_from(young).expect("small") <= since + 2, "{young} ms, taken at most {since} ms ago");
}
