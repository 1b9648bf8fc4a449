//! The built daemon as a child process: owns its environment, its wait for readiness and its end.

use std::{
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, bail};
use tokio::{
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};

use crate::system::{cargo, exit_code, say, target_dir};

/// How long it may take until it is ready.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// How long it may take to drain.
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// A running daemon. Killed when dropped; [`Daemon::stop`] ends it in order.
pub(crate) struct Daemon {
    child: Child,
    url: String,
    log: PathBuf,
}

impl Daemon {
    /// Starts `stagegate serve` on a free port of loopback with this environment, and waits until it is ready. Nothing
    /// that could spend money or reach a real server is passed on from our own environment.
    pub(crate) async fn start(binary: &Path, data: &Path, environment: &[(&str, String)]) -> anyhow::Result<Self> {
        let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
        let log = data.join("daemon.log");
        let mut command = Command::new(binary);
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            let private = name.starts_with("STAGEGATE_") || name.ends_with("_API_KEY") || name.starts_with("SENTRY_");
            if private || ["DATABASE_URL", "REDIS_URL"].contains(&name.as_str()) {
                command.env_remove(name);
            }
        }
        command
            .arg("serve")
            .current_dir(data)
            .env("STAGEGATE_HTTP__LISTEN", format!("127.0.0.1:{port}"))
            .env("STAGEGATE_DATA_DIR", data)
            .env("STAGEGATE_LOG__FORMAT", "json")
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log)?)
            .kill_on_drop(true);
        let child = command.spawn().with_context(|| format!("cannot run {}", binary.display()))?;
        let mut daemon = Self { child, url: format!("http://127.0.0.1:{port}"), log };
        daemon.ready().await?;
        Ok(daemon)
    }

    /// The address that it listens on.
    pub(crate) fn address(&self) -> anyhow::Result<SocketAddr> {
        self.url.trim_start_matches("http://").parse().context("the daemon's address")
    }

    /// Its process.
    pub(crate) fn pid(&self) -> anyhow::Result<u32> {
        self.child.id().context("the daemon has ended")
    }

    /// Ends it as a crash would.
    pub(crate) async fn kill(mut self) -> anyhow::Result<()> {
        self.child.kill().await.context("cannot kill the daemon")
    }

    /// Its address, without a slash at the end.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    async fn ready(&mut self) -> anyhow::Result<()> {
        let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(2)).build()?;
        let limit = Instant::now() + READY_LIMIT;
        loop {
            if let Some(status) = self.child.try_wait()? {
                bail!("the daemon ended ({status}):\n{}", self.log_tail());
            }
            let answer = client.get(format!("{}/readyz", self.url)).send().await;
            match answer {
                Ok(answer) if answer.status().is_success() => return Ok(()),
                _ if Instant::now() > limit => bail!("the daemon is not ready:\n{}", self.log_tail()),
                _ => sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// Asks it to end, as an operator would; fails where it does not end well.
    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        if let Some(id) = self.child.id() {
            exit_code(Command::new("kill").args(["-TERM", &id.to_string()])).await?;
        }
        let Ok(ended) = timeout(STOP_LIMIT, self.child.wait()).await else {
            bail!("the daemon does not end on SIGTERM:\n{}", self.log_tail());
        };
        let status = ended?;
        if !status.success() {
            bail!("the daemon ended badly ({status}):\n{}", self.log_tail());
        }
        Ok(())
    }

    /// The end of what it logged.
    pub(crate) fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

/// Builds the binary and tells where it is.
pub(crate) async fn build(profile: &str) -> anyhow::Result<PathBuf> {
    say(&format!("building stagegate ({profile} profile)"));
    crate::system::must(cargo().args(["build", "--bin", "stagegate", "--profile", profile]), "the build").await?;
    let folder = if profile == "dev" { "debug" } else { profile };
    Ok(target_dir().join(folder).join("stagegate"))
}
