//! Promises about who goes next.

use std::{collections::HashMap, sync::Arc, time::Duration};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use stagegate_core::{
    ReplicaId, RunId, Store,
    fair::{self, Candidate, InUse, Limits, Shares},
    store::{Lease, NewRun},
};

use super::{
    Subject,
    fixtures::{claim_out, live_replica, new_run, of_tenant, pipeline, shares, submit, tenant},
};

/// How many of these runs each tenant has.
fn by_tenant(leases: &[Lease], runs: &[NewRun]) -> HashMap<String, usize> {
    let tenants: HashMap<RunId, &NewRun> = runs.iter().map(|run| (run.id, run)).collect();
    let mut counts = HashMap::new();
    for lease in leases {
        *counts.entry(tenants[&lease.run].tenant.to_string()).or_default() += 1;
    }
    counts
}

fn counts(expected: &[(&str, usize)]) -> HashMap<String, usize> {
    expected.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
}

/// Takes exactly so many, in as many claims as it needs.
async fn claim_exactly(store: &Arc<dyn Store>, owner: ReplicaId, count: usize, shares: &Shares) -> Vec<Lease> {
    let mut taken = Vec::new();
    while taken.len() < count {
        let room = u32::try_from(count - taken.len()).expect("a small count");
        let page = store.claim(owner, room, shares).await.expect("claim");
        assert!(!page.is_empty(), "a claim that takes none leaves none that could be taken");
        taken.extend(page);
    }
    assert_eq!(taken.len(), count);
    taken
}

/// Its first run is the next one that is taken, whoever asks.
pub async fn a_tenants_first_run_goes_before_anothers_backlog(subject: Subject) {
    let store = &subject.store;
    let (owner, other) = (live_replica(store).await, live_replica(store).await);
    let mut runs: Vec<NewRun> = (0..200).map(|n| NewRun { priority: 9, ..of_tenant("busy", n) }).collect();
    store.submit(&runs).await.expect("submit");
    claim_exactly(store, owner, 50, &Shares::default()).await;
    runs.push(of_tenant("small", 500));
    submit(store, &runs[200]).await;
    let taken = claim_exactly(store, other, 3, &Shares::default()).await;
    assert_eq!(taken[0].run, runs[200].id);
    assert_eq!(by_tenant(&taken, &runs), counts(&[("small", 1), ("busy", 2)]));
}

/// Tenants that wait have leases in the proportion of their weights, over all replicas and claims.
pub async fn weights_share_the_room(subject: Subject) {
    let store = &subject.store;
    let owners = [live_replica(store).await, live_replica(store).await];
    let runs: Vec<NewRun> = (0..40).flat_map(|n| [of_tenant("heavy", n), of_tenant("light", n)]).collect();
    store.submit(&runs).await.expect("submit");
    let shares = shares(&[("heavy", 3, None)]);
    let mut taken = claim_exactly(store, owners[0], 20, &shares).await;
    assert_eq!(by_tenant(&taken, &runs), counts(&[("heavy", 15), ("light", 5)]));
    for owner in [owners[1], owners[0], owners[1]] {
        taken.extend(claim_exactly(store, owner, 4, &shares).await);
    }
    assert_eq!(by_tenant(&taken, &runs), counts(&[("heavy", 24), ("light", 8)]));
    // What one does not use, the other has.
    taken.extend(claim_out(store, owners[0], 100, &shares).await);
    assert_eq!(by_tenant(&taken, &runs), counts(&[("heavy", 40), ("light", 40)]));
}

/// However high.
pub async fn a_priority_never_reaches_beyond_its_tenant(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let high = (0..10).map(|n| NewRun { priority: i16::MAX, ..of_tenant("loud", n) });
    let low = (0..10).map(|n| NewRun { priority: i16::MIN, ..of_tenant("calm", n) });
    let runs: Vec<NewRun> = high.chain(low).collect();
    store.submit(&runs).await.expect("submit");
    let taken = claim_exactly(store, owner, 10, &Shares::default()).await;
    assert_eq!(by_tenant(&taken, &runs), counts(&[("loud", 5), ("calm", 5)]));
}

/// With one lane or with many, and with room for more.
pub async fn a_claim_is_bounded(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let runs: Vec<NewRun> = (0..30)
        .zip(["a", "b", "c"].into_iter().cycle())
        .map(|(n, name)| {
            let limits = Limits { pipeline_max: None, key: Some((format!("k{}", n % 7), 100)) };
            NewRun { limits, ..of_tenant(name, n) }
        })
        .collect();
    store.submit(&runs).await.expect("submit");
    let mut left = runs.len();
    for limit in [0, 1, 4, 9] {
        let taken = store.claim(owner, limit, &Shares::default()).await.expect("claim").len();
        assert!(taken <= limit as usize && (limit == 0 || taken > 0), "{taken} of {limit}");
        left -= taken;
    }
    assert_eq!(claim_out(store, owner, 5, &Shares::default()).await.len(), left);
}

/// Whatever the tenants, priorities, ages, limits and shares: the runs that are taken, and their order, are those of
/// [`fair::choose`]; and it ends only where nothing could be taken.
pub async fn claims_follow_the_rule_to_the_letter(subject: Subject) {
    let store = &subject.store;
    for seed in 0..4 {
        let owner = live_replica(store).await;
        let (runs, shares) = random_queue(seed);
        let mut candidates = Vec::new();
        for run in &runs {
            submit(store, run).await;
            candidates.push(candidate(run));
            // The database's clock tells who has waited longer; its unit is a millisecond.
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let expected = fair::choose(candidates, InUse::default(), &shares, usize::MAX);
        assert!(expected.len() < runs.len(), "some limit is used up");
        let mut taken = Vec::new();
        for limit in (1..4).cycle() {
            let page = store.claim(owner, limit, &shares).await.expect("claim");
            if page.is_empty() {
                break;
            }
            taken.extend(page.into_iter().map(|lease| lease.run));
        }
        assert_eq!(taken, expected, "seed {seed}");
        let all: Vec<RunId> = runs.iter().map(|run| run.id).collect();
        finish(store, owner, &shares, &all).await;
    }
}

fn candidate(run: &NewRun) -> Candidate {
    Candidate {
        run: run.id,
        tenant: run.tenant.clone(),
        pipeline: run.pipeline.clone(),
        limits: run.limits.clone(),
        priority: run.priority,
        available_at: run.created_at,
    }
}

/// Runs whose limits differ even where their lanes have one name, and shares of which some are used up.
fn random_queue(seed: u64) -> (Vec<NewRun>, Shares) {
    let mut rng = StdRng::seed_from_u64(seed);
    let runs = (0..40)
        .map(|n| {
            let pipeline_max = rng.random_bool(0.5).then(|| rng.random_range(1..5));
            let key = rng.random_bool(0.5).then(|| (format!("k{}", rng.random_range(0..3)), rng.random_range(1..4)));
            NewRun {
                pipeline: pipeline(["p", "q"][rng.random_range(0..2)]),
                priority: rng.random_range(-1..2),
                limits: Limits { pipeline_max, key },
                ..of_tenant(["acme", "initech", "umbrella"][rng.random_range(0..3)], n)
            }
        })
        .collect();
    let max_runs = rng.random_range(3..8);
    (runs, shares(&[("acme", rng.random_range(1..4), None), ("umbrella", rng.random_range(1..4), Some(max_runs))]))
}

/// Ends all runs, so that the next round begins with none.
async fn finish(store: &Arc<dyn Store>, owner: ReplicaId, shares: &Shares, runs: &[RunId]) {
    use super::fixtures::{commit, end};
    let mut ended = 0;
    while ended < runs.len() {
        let leases = store.owned(owner).await.expect("owned");
        assert!(!leases.is_empty(), "{ended} of {} are done, and nobody takes the rest", runs.len());
        for lease in leases {
            commit(store, &end(lease, 1, stagegate_core::RunState::Succeeded)).await;
            ended += 1;
        }
        claim_out(store, owner, 100, shares).await;
    }
}

/// The first of a tenant that has nothing under way: ties go by age, and a replica's claim is no privilege.
pub async fn among_equals_who_has_waited_longest_goes_first(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let mut expected = Vec::new();
    for (n, name) in (0..).zip(["zeta", "acme", "mid"]) {
        let run = of_tenant(name, n);
        submit(store, &run).await;
        expected.push(run.id);
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
    let taken = claim_exactly(store, owner, 3, &Shares::default()).await;
    assert_eq!(taken.into_iter().map(|lease| lease.run).collect::<Vec<_>>(), expected);
    // Of one moment: by name.
    let (last, first) = (of_tenant("zz", 10), of_tenant("aa", 11));
    store.submit(&[last.clone(), first.clone(), new_run(12)]).await.expect("submit");
    let taken = claim_exactly(store, owner, 3, &Shares::default()).await;
    assert_eq!(tenant("acme"), new_run(12).tenant, "it has one lease already");
    assert_eq!([taken[0].run, taken[1].run], [first.id, last.id]);
}
