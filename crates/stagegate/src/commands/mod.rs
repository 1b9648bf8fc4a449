//! The commands, one file each: owns nothing itself.

pub(crate) mod completions;
pub(crate) mod config;
pub(crate) mod demo;
pub(crate) mod healthcheck;
pub(crate) mod keys;
pub(crate) mod migrate;
pub(crate) mod plan;
pub(crate) mod run;
pub(crate) mod schema;
pub(crate) mod serve;
pub(crate) mod validate;

use stagegate_core::Error;
use stagegate_telemetry::{config::SentryConfig, logs};

use crate::config::Loaded;

/// Starts logging for a command that a person runs: only what wants attention, unless the configuration says more.
/// What is logged stays logged while the guard lives.
fn quiet_logs(loaded: &mut Loaded) -> Result<logs::Guard, Error> {
    let chosen = loaded.values.iter().any(|value| value.path == ["log", "filter"] && value.source != "default");
    if !chosen {
        "error".clone_into(&mut loaded.config.log.filter);
    }
    logs::init(&loaded.config.log, &SentryConfig::default(), env!("CARGO_PKG_VERSION"))
}
