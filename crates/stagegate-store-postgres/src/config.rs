//! The Postgres store's part of the configuration.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use stagegate_core::pipeline::Span;

/// The connection pool.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PoolConfig {
    /// Connections at most; four of them are kept for commits, submits and claims. Heartbeats have two more of their own.
    pub max_connections: u32,
    /// Connections kept open when idle.
    pub min_connections: u32,
    /// How long a task waits for a connection before it fails as unavailable.
    pub acquire_timeout: Span,
    /// How long one statement may run; enforced by the database.
    pub statement_timeout: Span,
    /// How long an idle connection is kept.
    pub idle_timeout: Span,
    /// How long any connection is kept.
    pub max_lifetime: Span,
    /// Whether a connection is tested before it is handed out. One that was used within the last second is trusted.
    pub test_on_checkout: bool,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            max_connections: 10,
            min_connections: 1,
            acquire_timeout: Span(Duration::from_secs(5)),
            statement_timeout: Span(Duration::from_secs(10)),
            idle_timeout: Span(Duration::from_mins(5)),
            max_lifetime: Span(Duration::from_mins(30)),
            test_on_checkout: true,
        }
    }
}
