//! The commands, one file each: owns nothing itself.

pub(crate) mod cache;
pub(crate) mod completions;
pub(crate) mod config;
pub(crate) mod demo;
pub(crate) mod explain;
pub(crate) mod healthcheck;
pub(crate) mod held;
pub(crate) mod init;
pub(crate) mod keys;
pub(crate) mod man;
pub(crate) mod migrate;
pub(crate) mod plan;
pub(crate) mod remote;
pub(crate) mod replicas;
pub(crate) mod run;
pub(crate) mod runs;
pub(crate) mod schema;
pub(crate) mod seed;
pub(crate) mod serve;
pub(crate) mod validate;

use stagegate_core::{Code, Error, Violation};
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

/// The mistakes of a definition, each told as compilers do: `file:line:column: SGnnnn path: message (mend)`.
/// Any other error stays as it is.
pub(crate) fn in_file(file: &str, error: Error) -> Error {
    if error.code != Code::InvalidDefinition {
        return error;
    }
    let located = |violation: Violation| {
        let place = match (violation.line, violation.column) {
            (Some(line), Some(column)) => format!("{file}:{line}:{column}"),
            _ => file.to_owned(),
        };
        let separator = if violation.path.is_empty() { "" } else { " " };
        let message = format!("{}{separator}{}: {}", violation.code, violation.path, violation.message);
        Violation { mend: violation.mend, ..Violation::new(Code::InvalidDefinition, place, message) }
    };
    Error::violations(Code::InvalidDefinition, error.violations.into_iter().map(located).collect())
}
