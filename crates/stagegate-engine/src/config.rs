//! The engine's part of the configuration.

use std::{collections::BTreeMap, time::Duration};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use stagegate_core::{
    TenantId,
    fair::{Share, Shares},
    pipeline::{Retention, Span},
    store::PipelineQuota,
};

/// How runs are executed.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct EngineConfig {
    /// Runs that one replica executes at once.
    pub max_runs: usize,
    /// How long a replica counts as alive after its last heartbeat; others take its runs over after that. It renews
    /// every third of it, and stops its own work when it could not for 70 % of it.
    pub lease_ttl: Span,
    /// The longest pause between looks for work; each look that finds some is followed by another at once.
    pub poll_interval: Span,
    /// A pause longer than this gives the run's memory back and waits in the store.
    pub park_after: Span,
    /// How long the stages under way may take to finish on shutdown.
    pub drain_grace: Span,
    /// The largest number of steps in one commit.
    pub commit_batch_max: usize,
    /// Runs that may wait to be claimed, of all tenants together; past it a submit is answered 429. Each replica counts
    /// them about once a second (less often where that takes long, at least every ten), so that it can be overstepped
    /// by what comes in between.
    pub max_queued: u64,
    /// What each tenant may have that is not named in `tenants`.
    pub tenant_defaults: TenantLimits,
    /// What a tenant may have, by its name. What is left out is as for a tenant that is not named at all.
    #[schemars(with = "BTreeMap<String, TenantLimits>")]
    pub tenants: BTreeMap<TenantId, TenantLimits>,
    /// How long runs and their inputs and outputs are kept after their end, unless their pipeline says otherwise.
    /// State it as long as you may need them: what is removed is gone. Without `payloads` they are kept as long as their run.
    pub retention: Retention,
    /// How often one of the replicas looks for what is too old.
    pub retention_every: Span,
    /// How much memory, in bytes, callers' data may take: request bodies, runs under way, parsed values, inputs on their
    /// way to the database, answers, compiled pipelines. Data that does not fit waits. At least 64 MiB. Left out: half of
    /// the lowest of the container's limit (cgroup), the process's limits (`ulimit -d`, `ulimit -v`) and the machine's
    /// memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_max_bytes: Option<u64>,
    /// How long this release, after it last saw a replica of the previous release, writes nothing that the previous release
    /// cannot read. Until then you can go back to that release; after that the database refuses its replicas.
    pub way_back: Span,
    /// How far a machine's clock may differ from the database's, which decides about all times. Past it the replica takes
    /// no work, and `/readyz` answers 503, until the clock is set.
    pub clock_skew_max: Span,
    /// After how many crashes in a row, without progress in between, a run fails with SG0308. A crash is an owner that
    /// died, or a panic of the run. 0 for never, else at least 3: all runs of a dead replica count a crash, and the nearer
    /// runs come to this limit, the fewer of them a replica executes side by side.
    #[schemars(range(max = 1000))]
    pub run_crashes_max: u32,
    /// How long one evaluation of templates, checks, schemas or a definition may take on its thread. A step that cannot be
    /// interrupted (a regular expression, a schema) and could take longer, by its estimated price, is refused before it
    /// starts.
    pub evaluation_timeout: Span,
    /// Threads for evaluations that are not small. Left out: one less than the number of cores, at least 2. A tenant never
    /// has all of them.
    #[schemars(range(min = 1, max = 1024))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evaluation_threads: Option<usize>,
}

/// What one tenant may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TenantLimits {
    /// While others wait too, a tenant of weight 2 has twice the runs under way that one of weight 1 has.
    #[schemars(range(min = 1, max = 1000))]
    pub weight: u32,
    /// Runs under way at once, over all replicas. Left out: as many as there is room for.
    #[schemars(range(min = 1))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_runs: Option<u32>,
    /// Runs that may wait to be claimed; past it a submit is answered 429.
    pub max_queued: u64,
    /// Pipelines that may be registered.
    #[schemars(range(min = 1))]
    pub max_pipelines: u32,
    /// Versions that may be registered, of all pipelines together. They are kept for ever, because runs refer to them.
    #[schemars(range(min = 1))]
    pub max_versions: u32,
}

impl TenantLimits {
    /// How many pipelines and versions.
    pub fn pipeline_quota(&self) -> PipelineQuota {
        PipelineQuota { pipelines: self.max_pipelines, versions: self.max_versions }
    }
}

impl Default for TenantLimits {
    fn default() -> Self {
        Self { weight: 1, max_runs: None, max_queued: 200_000, max_pipelines: 10_000, max_versions: 100_000 }
    }
}

impl EngineConfig {
    /// What a tenant may have.
    pub fn limits_of(&self, tenant: &TenantId) -> TenantLimits {
        self.tenants.get(tenant).copied().unwrap_or(self.tenant_defaults)
    }

    /// Threads for evaluations.
    pub(crate) fn evaluation_threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        self.evaluation_threads.unwrap_or_else(|| (cores() - 1).max(2))
    }

    /// The shares by which waiting runs are taken.
    pub fn shares(&self) -> Shares {
        let share = |limits: &TenantLimits| Share { weight: limits.weight.max(1), max_runs: limits.max_runs };
        Shares {
            default: share(&self.tenant_defaults),
            named: self.tenants.iter().map(|(tenant, limits)| (tenant.clone(), share(limits))).collect(),
        }
    }
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_runs: 1_000,
            lease_ttl: Span(Duration::from_secs(10)),
            poll_interval: Span(Duration::from_secs(1)),
            park_after: Span(Duration::from_secs(5)),
            drain_grace: Span(Duration::from_secs(20)),
            commit_batch_max: 256,
            max_queued: 1_000_000,
            tenant_defaults: TenantLimits::default(),
            tenants: BTreeMap::new(),
            retention: default_retention(),
            retention_every: Span(Duration::from_mins(15)),
            memory_max_bytes: None,
            way_back: Span(Duration::from_hours(1)),
            clock_skew_max: Span(Duration::from_secs(30)),
            run_crashes_max: 5,
            evaluation_timeout: Span(Duration::from_mins(1)),
            evaluation_threads: None,
        }
    }
}

/// Ninety days of everything: long enough to be asked about last quarter, short enough that no table grows for ever.
fn default_retention() -> Retention {
    let days = Some(Span(Duration::from_hours(90 * 24)));
    Retention { succeeded: days, failed: days, cancelled: days, expired: days, payloads: None }
}
