//! Promises about limits: of a tenant, of a pipeline, of a key. They are counted from the leases of live replicas.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use stagegate_core::{
    PipelineName, ReplicaId, RunId, RunState, Store,
    fair::{Limits, Shares},
    store::{Committed, Lease, NewRun, SignalKind},
};

use super::{
    Subject,
    fixtures::{
        beat, claim_out, commit, end, keyed, live_replica, new_run, of_tenant, park, pipeline, shares, signal, submit,
        submit_leased,
    },
};

/// Ways in which a lease ends.
#[derive(Debug, Clone, Copy)]
enum Way {
    End,
    Park,
    Release,
    Leave,
    Die,
}

const WAYS: [Way; 5] = [Way::End, Way::Park, Way::Release, Way::Leave, Way::Die];

async fn free(store: &Arc<dyn Store>, owner: ReplicaId, lease: Lease, way: Way) {
    match way {
        Way::End => assert_eq!(commit(store, &end(lease, 1, RunState::Succeeded)).await, Committed::Now),
        Way::Park => {
            let hour = Some(Duration::from_hours(1));
            assert_eq!(commit(store, &park(lease, 1, hour)).await, Committed::Now);
        }
        Way::Release => store.release(&[lease]).await.expect("release"),
        Way::Leave => store.leave(owner).await.expect("leave"),
        Way::Die => {
            beat(store, owner, Duration::from_millis(1)).await;
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }
}

/// Of three runs that share a limit of one, one is taken at a time, in whatever way the lease of the one before ends.
async fn one_at_a_time(store: &Arc<dyn Store>, shares: &Shares, make: impl Fn(usize, i64) -> NewRun) {
    for (n, way) in WAYS.into_iter().enumerate() {
        let runs: Vec<NewRun> = (0..3).map(|ms| make(n, ms)).collect();
        store.submit(&runs).await.expect("submit");
        let (owner, heir) = (live_replica(store).await, live_replica(store).await);
        let first = claim_out(store, owner, 10, shares).await;
        assert_eq!(first.len(), 1, "{way:?}");
        assert_eq!(claim_out(store, heir, 10, shares).await, [], "{way:?}");
        free(store, owner, first[0], way).await;
        let mut second = Vec::new();
        for _ in 0..1_000 {
            second = claim_out(store, heir, 10, shares).await;
            if !second.is_empty() {
                break;
            }
            // One that is late counts until somebody has found it so.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(second.len(), 1, "{way:?}");
        assert_eq!(claim_out(store, heir, 10, shares).await, [], "{way:?}");
    }
}

/// Whether it ends, parks, is released, or its owner leaves or dies.
pub async fn a_pipelines_limit_is_freed_with_the_lease(subject: Subject) {
    one_at_a_time(&subject.store, &Shares::default(), |n, ms| NewRun {
        pipeline: pipeline(&format!("p{n}")),
        limits: Limits { pipeline_max: Some(1), key: None },
        ..new_run(ms)
    })
    .await;
}

/// The same of a key.
pub async fn a_keys_limit_is_freed_with_the_lease(subject: Subject) {
    one_at_a_time(&subject.store, &Shares::default(), |n, ms| keyed(ms, &format!("k{n}"), 1)).await;
}

/// The same of a tenant.
pub async fn a_tenants_limit_is_freed_with_the_lease(subject: Subject) {
    let named: Vec<(String, u32, Option<u32>)> = (0..5).map(|n| (format!("t{n}"), 1, Some(1))).collect();
    let named: Vec<(&str, u32, Option<u32>)> = named.iter().map(|(name, a, b)| (name.as_str(), *a, *b)).collect();
    one_at_a_time(&subject.store, &shares(&named), |n, ms| of_tenant(&format!("t{n}"), ms)).await;
}

/// A tenant's limit that is nobody's own is everybody's.
pub async fn the_default_share_bounds_each_tenant_on_its_own(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let runs: Vec<NewRun> = (0..5).flat_map(|n| ["a", "b", "free"].map(|name| of_tenant(name, n))).collect();
    store.submit(&runs).await.expect("submit");
    let mut shares = shares(&[("free", 1, None)]);
    shares.default.max_runs = Some(2);
    let taken = claim_out(store, owner, 100, &shares).await;
    let of = |name: &str| {
        let of: Vec<RunId> = runs.iter().filter(|run| run.tenant.as_str() == name).map(|run| run.id).collect();
        taken.iter().filter(|lease| of.contains(&lease.run)).count()
    };
    assert_eq!((of("a"), of("b"), of("free")), (2, 2, 5));
}

/// A key belongs to its pipeline, a pipeline to its tenant.
pub async fn limits_keep_to_their_pipeline_and_tenant(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let mut runs = Vec::new();
    for (tenant, name) in [("a", "p"), ("a", "q"), ("b", "p")] {
        for ms in 0..3 {
            let limits = Limits { pipeline_max: Some(2), key: Some(("k".to_owned(), 1)) };
            runs.push(NewRun { pipeline: pipeline(name), limits, ..of_tenant(tenant, ms) });
        }
    }
    store.submit(&runs).await.expect("submit");
    assert_eq!(claim_out(store, owner, 100, &Shares::default()).await.len(), 3, "one of each");
}

/// Those behind it go on, whatever its priority and however many wait for it.
pub async fn a_used_up_limit_holds_up_nobody_else(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let mut runs: Vec<NewRun> = (0..300).map(|ms| NewRun { priority: 9, ..keyed(ms, "busy", 1) }).collect();
    let others = [keyed(900, "quiet", 1), new_run(901), NewRun { pipeline: pipeline("q"), ..keyed(902, "busy", 1) }];
    runs.extend(others.clone());
    store.submit(&runs).await.expect("submit");
    let taken: Vec<RunId> =
        claim_out(store, owner, 3, &Shares::default()).await.into_iter().map(|lease| lease.run).collect();
    assert_eq!(taken.len(), 4, "one of the busy key, and the others");
    assert!(others.iter().all(|run| taken.contains(&run.id)));
}

/// A definition's limit was raised: those that were accepted before keep theirs, and do not hold up those after.
pub async fn each_run_has_the_limit_that_it_was_accepted_with(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let old: Vec<NewRun> = (0..200).map(|ms| NewRun { priority: 5, ..keyed(ms, "k", 1) }).collect();
    let new: Vec<NewRun> = (0..200).map(|ms| keyed(1_000 + ms, "k", 3)).collect();
    store.submit(&[old, new.clone()].concat()).await.expect("submit");
    let taken = claim_out(store, owner, 2, &Shares::default()).await;
    let of_new = taken.iter().filter(|lease| new.iter().any(|run| run.id == lease.run)).count();
    assert_eq!((taken.len(), of_new), (3, 2));
}

/// Even one that has no limit itself, and was leased with its insert.
pub async fn every_lease_of_a_pipeline_counts(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let (_, lease) = submit_leased(store, 1, owner).await;
    let limits = Limits { pipeline_max: Some(2), key: None };
    let runs: Vec<NewRun> = (2..6).map(|ms| NewRun { limits: limits.clone(), ..new_run(ms) }).collect();
    store.submit(&runs).await.expect("submit");
    assert_eq!(claim_out(store, owner, 10, &Shares::default()).await.len(), 1);
    commit(store, &end(lease, 3, RunState::Succeeded)).await;
    assert_eq!(claim_out(store, owner, 10, &Shares::default()).await.len(), 1);
    assert_eq!(claim_out(store, owner, 10, &Shares::default()).await, []);
}

/// It does no work and ends at once.
pub async fn what_is_to_be_cancelled_is_kept_by_no_limit(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let shares = shares(&[("acme", 1, Some(1))]);
    let runs: Vec<NewRun> = (0..4).map(|ms| keyed(ms, "k", 1)).collect();
    store.submit(&runs).await.expect("submit");
    let first = claim_out(store, owner, 10, &shares).await;
    assert_eq!(first.len(), 1, "the others wait");
    let waiting: Vec<RunId> = runs.iter().map(|run| run.id).filter(|run| *run != first[0].run).collect();
    for run in &waiting[1..] {
        signal(store, *run, SignalKind::Cancel).await;
    }
    assert_eq!(store.claim(owner, 1, &shares).await.expect("claim").len(), 1, "no more than was asked for");
    assert_eq!(claim_out(store, owner, 10, &shares).await.len(), 1);
    let taken: Vec<RunId> = store.owned(owner).await.expect("owned").into_iter().map(|lease| lease.run).collect();
    assert!(waiting[1..].iter().all(|run| taken.contains(run)) && !taken.contains(&waiting[0]), "{taken:?}");
}

/// What waits for its time, for a person, or for its turn has no lease and uses up nothing.
pub async fn what_only_waits_uses_up_nothing(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let far = super::fixtures::database_now(store).await + chrono::TimeDelta::hours(1);
    for ms in 0..3 {
        submit(store, &NewRun { start_at: Some(far), ..keyed(ms, "k", 1) }).await;
    }
    let held = keyed(4, "k", 1);
    submit(store, &held).await;
    let lease = claim_out(store, owner, 10, &Shares::default()).await;
    assert_eq!(lease.len(), 1);
    commit(store, &park(lease[0], 1, None)).await;
    let next = keyed(5, "k", 1);
    submit(store, &next).await;
    let taken = claim_out(store, owner, 10, &Shares::default()).await;
    assert_eq!(taken.iter().map(|lease| lease.run).collect::<Vec<_>>(), [next.id]);
}

/// What many claimers hold at one time, by what bounds it.
#[derive(Default)]
struct Held {
    tenant: AtomicU32,
    pipelines: HashMap<PipelineName, AtomicU32>,
    keys: HashMap<(PipelineName, String), AtomicU32>,
    ended: AtomicU32,
}

impl Held {
    fn each(&self, run: &NewRun, what: impl Fn(&AtomicU32, u32)) {
        what(&self.tenant, TENANT_MAX);
        what(&self.pipelines[&run.pipeline], PIPELINE_MAX);
        let (key, _) = run.limits.key.clone().expect("each has one");
        what(&self.keys[&(run.pipeline.clone(), key)], KEY_MAX);
    }
}

const TENANT_MAX: u32 = 5;
const PIPELINE_MAX: u32 = 3;
const KEY_MAX: u32 = 2;

/// While leases are taken and ended all the time; and every run is taken at last.
pub async fn limits_are_never_exceeded_however_many_claim_at_once(subject: Subject) {
    let store = &subject.store;
    let mut held = Held::default();
    let mut runs = HashMap::new();
    for n in 0..90 {
        let (name, key) = (pipeline(&format!("p{}", n % 3)), format!("k{}", n % 2));
        held.pipelines.entry(name.clone()).or_default();
        held.keys.entry((name.clone(), key.clone())).or_default();
        let limits = Limits { pipeline_max: Some(PIPELINE_MAX), key: Some((key, KEY_MAX)) };
        let run = NewRun { pipeline: name, limits, ..new_run(n) };
        submit(store, &run).await;
        runs.insert(run.id, run);
    }
    let (held, runs) = (Arc::new(held), Arc::new(runs));
    let tasks: Vec<_> = (0..6)
        .map(|_| {
            let (store, held, runs) = (store.clone(), held.clone(), runs.clone());
            tokio::spawn(async move { work(&store, &held, &runs).await })
        })
        .collect();
    for task in tasks {
        task.await.expect("no panic");
    }
    assert_eq!(held.ended.load(Ordering::SeqCst) as usize, runs.len());
}

/// Claims, holds for a moment, ends; until all runs have ended.
async fn work(store: &Arc<dyn Store>, held: &Held, runs: &HashMap<RunId, NewRun>) {
    let owner = live_replica(store).await;
    let shares = shares(&[("acme", 1, Some(TENANT_MAX))]);
    let mut idle = 0;
    while (held.ended.load(Ordering::SeqCst) as usize) < runs.len() {
        let taken = store.claim(owner, 2, &shares).await.expect("claim");
        idle = if taken.is_empty() { idle + 1 } else { 0 };
        assert!(idle < 10_000, "{} have ended, and nobody takes the rest", held.ended.load(Ordering::SeqCst));
        for lease in &taken {
            held.each(&runs[&lease.run], |count, max| {
                let now = count.fetch_add(1, Ordering::SeqCst) + 1;
                assert!(now <= max, "{now} are under way where {max} may be");
            });
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
        for lease in taken {
            // Counted out before its end, as it was counted in after its claim: never more than there are leases.
            held.each(&runs[&lease.run], |count, _| {
                count.fetch_sub(1, Ordering::SeqCst);
            });
            assert_eq!(commit(store, &end(lease, 1, RunState::Succeeded)).await, Committed::Now);
            held.ended.fetch_add(1, Ordering::SeqCst);
        }
    }
}
