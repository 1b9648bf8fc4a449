//! Who goes next: owns shares of tenants, limits of runs, and the order in which waiting runs are taken. Pure; the
//! stores bring what waits and what is leased.
//!
//! Runs are taken one by one. The next one is of the tenant that has the fewest leases for its weight; within a tenant
//! the highest priority, then the one that has waited longest. So a priority never reaches beyond its tenant, and a
//! tenant with a hundred thousand waiting runs does not stand before another one's first. A run whose limit is used
//! up is passed over, and waits without standing in anybody's way.
//!
//! A run that is to be cancelled is not weighed here: it does no work and ends at once, so that a store takes it before
//! all others, and no limit keeps it.

use std::collections::{BTreeMap, HashMap};

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{PipelineName, RunId, TenantId};

/// What one tenant may have of the replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Share {
    /// While others wait too, a tenant of weight 2 has twice the runs under way that one of weight 1 has.
    #[schemars(range(min = 1, max = 1000))]
    pub weight: u32,
    /// Runs of the tenant that are under way at once, over all replicas. None for as many as there is room for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_runs: Option<u32>,
}

impl Default for Share {
    fn default() -> Self {
        Self { weight: 1, max_runs: None }
    }
}

/// The shares of all tenants.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shares {
    /// Of a tenant that is not named.
    pub default: Share,
    /// By name.
    pub named: BTreeMap<TenantId, Share>,
}

impl Shares {
    /// A tenant's share.
    pub fn of(&self, tenant: &TenantId) -> Share {
        self.named.get(tenant).copied().unwrap_or(self.default)
    }
}

/// What bounds how many runs are under way beside a run. Fixed when the run is accepted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Runs of the tenant's pipeline, whatever version, that are under way at once.
    pub pipeline_max: Option<u32>,
    /// The run's concurrency key within its pipeline, and how many runs with it are under way at once.
    pub key: Option<(String, u32)>,
}

impl Limits {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.pipeline_max.is_none() && self.key.is_none()
    }

    /// Which of its tenant's queues a run waits in: runs that share their limits wait together, so that those who
    /// must wait are passed over as a whole. Runs that were accepted with other limits wait apart. Empty for a run
    /// without limits.
    pub fn lane(&self, pipeline: &PipelineName) -> String {
        // A name holds no slash.
        let max = self.pipeline_max.map_or_else(|| "-".to_owned(), |max| max.to_string());
        match &self.key {
            Some((key, key_max)) => format!("{pipeline}/{max}/{key_max}/{key}"),
            None if self.pipeline_max.is_some() => format!("{pipeline}/{max}"),
            None => String::new(),
        }
    }
}

/// A run that could be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Which.
    pub run: RunId,
    /// Whose.
    pub tenant: TenantId,
    /// Of which pipeline.
    pub pipeline: PipelineName,
    /// Its limits.
    pub limits: Limits,
    /// Higher goes first, within the tenant.
    pub priority: i16,
    /// Since when it waits.
    pub available_at: DateTime<Utc>,
}

/// Runs that live replicas own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InUse {
    /// By tenant.
    pub tenants: HashMap<TenantId, u32>,
    /// By tenant and pipeline.
    pub pipelines: HashMap<(TenantId, PipelineName), u32>,
    /// By tenant, pipeline and concurrency key.
    pub keys: HashMap<(TenantId, PipelineName, String), u32>,
}

impl InUse {
    /// Counts one more.
    pub fn add(&mut self, tenant: &TenantId, pipeline: &PipelineName, key: Option<&str>) {
        *self.tenants.entry(tenant.clone()).or_default() += 1;
        *self.pipelines.entry((tenant.clone(), pipeline.clone())).or_default() += 1;
        if let Some(key) = key {
            *self.keys.entry((tenant.clone(), pipeline.clone(), key.to_owned())).or_default() += 1;
        }
    }

    fn tenant(&self, tenant: &TenantId) -> u32 {
        self.tenants.get(tenant).copied().unwrap_or(0)
    }

    /// Whether a run's limits, and its tenant's, leave room for it.
    fn has_room(&self, candidate: &Candidate, share: Share) -> bool {
        let Candidate { tenant, pipeline, limits, .. } = candidate;
        let below = |max: Option<u32>, used: Option<&u32>| max.is_none_or(|max| used.copied().unwrap_or(0) < max);
        below(share.max_runs, self.tenants.get(tenant))
            && below(limits.pipeline_max, self.pipelines.get(&(tenant.clone(), pipeline.clone())))
            && limits.key.as_ref().is_none_or(|(key, max)| {
                below(Some(*max), self.keys.get(&(tenant.clone(), pipeline.clone(), key.clone())))
            })
    }
}

/// Which of the candidates are taken, in this order. See the module's documentation for the rule; runs of tenants with
/// equally few leases go by how long the tenant's next run has waited, then by its name.
pub fn choose(mut candidates: Vec<Candidate>, mut used: InUse, shares: &Shares, limit: usize) -> Vec<RunId> {
    // Best first; then each tenant's runs are a queue of its own.
    candidates.sort_by_key(|c| (std::cmp::Reverse(c.priority), c.available_at, c.run));
    let mut queues: BTreeMap<TenantId, std::collections::VecDeque<Candidate>> = BTreeMap::new();
    for candidate in candidates {
        queues.entry(candidate.tenant.clone()).or_default().push_back(candidate);
    }
    let mut chosen = Vec::new();
    while chosen.len() < limit {
        for (tenant, queue) in &mut queues {
            let share = shares.of(tenant);
            while queue.front().is_some_and(|candidate| !used.has_room(candidate, share)) {
                queue.pop_front(); // What is used up stays used up in this look.
            }
        }
        let weighed = |tenant: &TenantId, first: &Candidate| {
            // Compared as fractions: leases / weight, without rounding.
            (u64::from(used.tenant(tenant)), u64::from(shares.of(tenant).weight.max(1)), first.available_at)
        };
        let next = queues
            .iter()
            .filter_map(|(tenant, queue)| Some((tenant, weighed(tenant, queue.front()?))))
            .min_by(|(_, a), (_, b)| (a.0 * b.1).cmp(&(b.0 * a.1)).then(a.2.cmp(&b.2)))
            .map(|(tenant, _)| tenant.clone());
        let Some(first) = next.and_then(|tenant| queues.get_mut(&tenant)?.pop_front()) else { break };
        used.add(&first.tenant, &first.pipeline, first.limits.key.as_ref().map(|(key, _)| key.as_str()));
        chosen.push(first.run);
    }
    chosen
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;

    use super::*;

    fn candidate(tenant: &str, n: i64, priority: i16, limits: Limits) -> Candidate {
        let at = DateTime::UNIX_EPOCH + TimeDelta::seconds(n);
        Candidate {
            run: RunId::new(at, [tenant.as_bytes()[0]; 10]),
            tenant: TenantId::new(tenant).expect("a tenant"),
            pipeline: PipelineName::new("p").expect("a name"),
            limits,
            priority,
            available_at: at,
        }
    }

    fn plain(tenant: &str, n: i64) -> Candidate {
        candidate(tenant, n, 0, Limits::default())
    }

    #[test]
    fn a_tenants_first_run_goes_before_anothers_backlog() {
        let mut candidates: Vec<_> = (0..100).map(|n| plain("busy", n)).collect();
        let small = plain("small", 500);
        candidates.push(small.clone());
        let mut used = InUse::default();
        let tenant = TenantId::new("busy").expect("a tenant");
        used.tenants.insert(tenant, 50);
        assert_eq!(choose(candidates, used, &Shares::default(), 3)[0], small.run);
    }

    #[test]
    fn weights_share_the_room() {
        let candidates: Vec<_> = (0..100).flat_map(|n| [plain("a", n), plain("b", n)]).collect();
        let heavy = TenantId::new("b").expect("a tenant");
        let shares = Shares { named: [(heavy, Share { weight: 3, max_runs: None })].into(), ..Shares::default() };
        let of_b: Vec<_> = (0..100).map(|n| plain("b", n).run).collect();
        let chosen = choose(candidates, InUse::default(), &shares, 40);
        assert_eq!(chosen.iter().filter(|run| of_b.contains(run)).count(), 30);
    }

    #[test]
    fn within_a_tenant_priority_goes_first_then_age() {
        let limits = Limits::default;
        let candidates =
            vec![candidate("t", 3, 0, limits()), candidate("t", 2, 5, limits()), candidate("t", 1, 0, limits())];
        let order: Vec<_> = [1_usize, 2, 0].iter().map(|at| candidates[*at].run).collect();
        assert_eq!(choose(candidates, InUse::default(), &Shares::default(), 9), order);
    }

    #[test]
    fn a_used_up_limit_holds_up_nobody_else() {
        let keyed = |key: &str| Limits { pipeline_max: Some(3), key: Some((key.to_owned(), 1)) };
        let candidates = vec![
            candidate("t", 1, 9, keyed("x")),
            candidate("t", 2, 9, keyed("x")),
            candidate("t", 3, 0, keyed("y")),
            candidate("t", 4, 0, keyed("z")),
            candidate("t", 5, 0, keyed("w")),
        ];
        let order: Vec<_> = [0_usize, 2, 3].iter().map(|at| candidates[*at].run).collect();
        assert_eq!(choose(candidates, InUse::default(), &Shares::default(), 9), order);
        let shares = Shares { default: Share { max_runs: Some(2), ..Share::default() }, ..Shares::default() };
        let two: Vec<_> = (0..9).map(|n| plain("t", n)).collect();
        assert_eq!(choose(two, InUse::default(), &shares, 9).len(), 2);
    }
}
