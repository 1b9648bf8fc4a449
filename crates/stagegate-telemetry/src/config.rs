//! Telemetry's part of the configuration.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use stagegate_core::Secret;

/// Logs.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// `json` (one object a line), `pretty` (for terminals), or `auto`: pretty on a terminal, else json.
    pub format: LogFormat,
    /// What is logged, as `tracing` filters: `info`, `info,stagegate_engine=debug`.
    pub filter: String,
    /// Whether prompts and outputs may be logged (at debug). Off unless asked.
    pub payloads: bool,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { format: LogFormat::Auto, filter: "info".to_owned(), payloads: false }
    }
}

/// The form of the log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Pretty on a terminal, else JSON.
    Auto,
    /// One JSON object a line.
    Json,
    /// For people.
    Pretty,
}

/// Error reports.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SentryConfig {
    /// Where to send panics and errors; nothing is sent without it. Also `SENTRY_DSN`.
    pub dsn: Option<Secret>,
    /// The environment that reports are filed under.
    pub environment: Option<String>,
}
