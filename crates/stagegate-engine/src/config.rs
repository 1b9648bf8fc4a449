//! The engine's part of the configuration.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use stagegate_core::pipeline::Span;

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
        }
    }
}
