//! `cargo xtask test`: owns the servers that tests share, and which runner runs them.

use std::process::ExitCode;

use anyhow::Context as _;
use stagegate_testkit::servers::{DATABASE_URL_ENV, Postgres, REDIS_URL_ENV, Redis};
use tokio::process::Command;

use crate::system::{self, cargo, exit_code, say};

/// Run every test, with a Postgres and a Redis of its own.
///
/// The servers that `STAGEGATE_TEST_DATABASE_URL` and `STAGEGATE_TEST_REDIS_URL` name are used; else throwaway ones are
/// started from the machine's binaries; else they are installed from the system's packages.
#[derive(Debug, clap::Args)]
pub(crate) struct Test {
    /// Only tests whose name holds this
    #[arg(long)]
    filter: Option<String>,
    /// Only this crate's tests; may be given several times
    #[arg(long, short, value_name = "CRATE")]
    package: Vec<String>,
    /// What follows `--` goes to the test runner
    #[arg(last = true)]
    arguments: Vec<String>,
}

impl Test {
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        let servers = Servers::ready().await?;
        let mut run = runner(&self.package).await;
        run.args(self.filter.as_deref()).args(&self.arguments);
        servers.name_to(&mut run);
        let mut code = exit_code(&mut run).await?;
        if code == 0 && self.filter.is_none() && self.arguments.is_empty() && self.package.is_empty() {
            say("examples in the documentation");
            let mut docs = cargo();
            docs.args(["test", "--workspace", "--doc", "--quiet"]);
            servers.name_to(&mut docs);
            code = exit_code(&mut docs).await?;
        }
        drop(servers);
        Ok(system::code(code))
    }
}

/// nextest where it is installed, else Cargo's own runner.
async fn runner(packages: &[String]) -> Command {
    let mut command = cargo();
    if has_nextest().await {
        command.args(["nextest", "run"]);
        if std::env::var_os("CI").is_some() {
            command.args(["--profile", "ci"]);
        }
    } else {
        say("cargo-nextest is not installed: using `cargo test` (`cargo install cargo-nextest --locked` is faster)");
        command.args(["test", "--all-targets"]);
    }
    if packages.is_empty() {
        command.arg("--workspace");
    }
    for package in packages {
        command.args(["--package", package]);
    }
    command
}

/// Whether `cargo nextest` is there.
pub(crate) async fn has_nextest() -> bool {
    cargo().args(["nextest", "--version"]).output().await.is_ok_and(|output| output.status.success())
}

/// The servers that all tests share. Those that we started end with this value, and with our process however it ends.
pub(crate) struct Servers {
    postgres: Option<Postgres>,
    redis: Option<Redis>,
}

impl Servers {
    /// Starts what the environment does not name.
    pub(crate) async fn ready() -> anyhow::Result<Self> {
        let postgres = match std::env::var_os(DATABASE_URL_ENV) {
            Some(_) => None,
            None => Some(postgres().await?),
        };
        let redis = match std::env::var_os(REDIS_URL_ENV) {
            Some(_) => None,
            None => Some(redis().await?),
        };
        let missing: Vec<&str> = TOUR_TOOLS.into_iter().filter(|tool| !in_path(tool)).collect();
        if !missing.is_empty() {
            system::install(&missing, "the test of the API's tour runs it as it stands").await?;
        }
        Ok(Self { postgres, redis })
    }

    /// Tells a command where they are.
    pub(crate) fn name_to(&self, command: &mut Command) {
        if let Some(postgres) = &self.postgres {
            command.env(DATABASE_URL_ENV, postgres.url());
        }
        if let Some(redis) = &self.redis {
            command.env(REDIS_URL_ENV, redis.url());
        }
    }
}

/// What docs/api.md uses; Debian's packages are called the same.
const TOUR_TOOLS: [&str; 2] = ["curl", "jq"];

async fn postgres() -> anyhow::Result<Postgres> {
    let error = match Postgres::private().await {
        Ok(server) => return Ok(server),
        Err(error) => error,
    };
    // A server that is there and does not start is not mended by another package.
    if has_postgres() {
        return Err(error);
    }
    system::install(&["postgresql"], "tests need a Postgres server").await?;
    Postgres::private().await.context("the installed Postgres does not start")
}

async fn redis() -> anyhow::Result<Redis> {
    let error = match Redis::private().await {
        Ok(server) => return Ok(server),
        Err(error) => error,
    };
    if in_path("redis-server") {
        return Err(error);
    }
    system::install(&["redis-server"], "tests need a Redis server").await?;
    Redis::private().await.context("the installed Redis does not start")
}

fn has_postgres() -> bool {
    let debian = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    in_path("initdb") || debian.into_iter().any(|entry| entry.path().join("bin/initdb").is_file())
}

fn in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}
