//! The process under test: this very binary, told by its environment to play a role. Logging is installed once per
//! process and panics go to a process-wide hook, so neither can be tried inside the test runner itself.

use std::{
    env,
    process::{Command, Stdio},
    thread,
};

use stagegate_core::Secret;
use stagegate_telemetry::{
    config::{LogConfig, LogFormat, SentryConfig},
    init,
};

const ROLE: &str = "STAGEGATE_TELEMETRY_ROLE";
const DSN: &str = "STAGEGATE_TELEMETRY_DSN";

/// A command that plays the role, without a proxy or colours from the environment.
pub(crate) fn command(role: &str) -> Command {
    let mut command = Command::new(env::current_exe().expect("this binary"));
    command.args(["child::plays_its_role", "--exact", "--nocapture"]).env(ROLE, role).env_remove(DSN);
    for name in ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"] {
        command.env_remove(name);
    }
    for name in ["NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "RUST_BACKTRACE", "RUST_LIB_BACKTRACE"] {
        command.env_remove(name);
    }
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// The same, reporting to a DSN.
pub(crate) fn reporting(role: &str, dsn: &str) -> Command {
    let mut command = command(role);
    command.env(DSN, dsn);
    command
}

/// In the test run itself there is no role, and nothing to do.
#[test]
fn plays_its_role() {
    let Ok(role) = env::var(ROLE) else { return };
    let format = if role == "pretty" { LogFormat::Pretty } else { LogFormat::Json };
    let log = LogConfig { format, ..LogConfig::default() };
    let sentry = SentryConfig { dsn: env::var(DSN).ok().map(Secret::from), environment: Some("test".to_owned()) };
    let guard = init(&log, &sentry, "1.2.3").expect("installed");
    match role.as_str() {
        "json" | "pretty" => {
            assert!(init(&log, &SentryConfig::default(), "1.2.3").is_err(), "installed twice");
            work();
        }
        "flood" => (0..2_000).for_each(|n| tracing::info!(n, "a line that nobody reads")),
        other => panic!("no role {other}"),
    }
    drop(guard);
    println!("done");
}

/// What a stage might do on a bad day: an error with secrets in it, then a panic in a thread of its own.
fn work() {
    tracing::debug!("not asked for");
    let request = tracing::info_span!("request", request_id = "req_1", tenant = "acme");
    let run = tracing::info_span!(parent: &request, "run", run_id = "run_7");
    let stage = tracing::info_span!(parent: &run, "stage", stage_id = "spec", attempt = 3);
    stage.in_scope(|| {
        tracing::info!(tokens = 7, "stage started");
        tracing::error!(
            prompt = "PAYLOAD of a tenant",
            api_key = "KEY-OF-OURS",
            database = "postgres://app:PASSWORD@db/stagegate",
            model = "openai/gpt-5-mini",
            "refused: Bearer BEARERTOKEN"
        );
    });
    let thread = thread::Builder::new().name("worker".to_owned());
    let worker =
        thread.spawn(move || stage.in_scope(|| panic!("no such stage, said sk-SECRETSECRET"))).expect("a thread");
    assert!(worker.join().is_err(), "it panicked");
}
