//! One replica: the built binary, its configuration, and the proxies through which it reaches Postgres and Redis.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, bail};
use stagegate_testkit::{
    proxy::Proxy,
    servers::{Program, free_port},
};
use tokio::time::{Instant, sleep};

/// How long it may take until it answers.
const START_LIMIT: Duration = Duration::from_secs(40);

/// What a replica is started with.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    pub(crate) name: String,
    pub(crate) binary: PathBuf,
    pub(crate) lease_ttl_ms: u64,
    /// A setting that older binaries do not know.
    pub(crate) drain_delay_ms: Option<u64>,
    pub(crate) provider_url: String,
    pub(crate) postgres: SocketAddr,
    pub(crate) redis: SocketAddr,
}

/// A replica.
#[derive(Debug)]
pub(crate) struct Replica {
    setup: Setup,
    port: u16,
    program: OnceLock<Program>,
    pub(crate) postgres: Proxy,
    pub(crate) redis: Proxy,
    /// It was ended for good: nobody starts it again to mend the world.
    pub(crate) retired: AtomicBool,
    /// Held by the fault that it is under.
    pub(crate) busy: tokio::sync::Mutex<()>,
}

impl Replica {
    /// Prepares one; it is started by [`Replica::launch`].
    pub(crate) async fn prepare(setup: Setup) -> anyhow::Result<Self> {
        let (postgres, redis) = (Proxy::start(setup.postgres).await?, Proxy::start(setup.redis).await?);
        let busy = tokio::sync::Mutex::new(());
        let (port, program, retired) = (free_port()?, OnceLock::new(), AtomicBool::new(false));
        Ok(Self { setup, port, program, postgres, redis, retired, busy })
    }

    pub(crate) fn name(&self) -> &str {
        &self.setup.name
    }

    pub(crate) fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    /// Its process, once it was launched.
    pub(crate) fn program(&self) -> anyhow::Result<&Program> {
        self.program.get().context("the replica was not launched")
    }

    /// Starts it, for the first time or again.
    pub(crate) fn launch(&self) -> anyhow::Result<()> {
        self.retired.store(false, Ordering::Relaxed);
        if let Some(program) = self.program.get() {
            return program.start_again();
        }
        let program = Program::start("replica", "KILL", |home| {
            let path = home.join("stagegate.toml");
            std::fs::write(&path, self.config())?;
            let home = home.to_string_lossy();
            let path_variable = std::env::var("PATH").unwrap_or_default();
            // Nothing that could spend money or reach a real server is passed on from our own environment.
            let mut command = vec!["env".to_owned(), "-i".to_owned(), format!("PATH={path_variable}")];
            command.extend([format!("HOME={home}"), format!("HOSTNAME={}", self.setup.name)]);
            command.extend([self.setup.binary.to_string_lossy().into_owned(), "serve".to_owned()]);
            command.extend(["--config".to_owned(), path.to_string_lossy().into_owned()]);
            Ok(command)
        })?;
        // Nobody else launches it: faults hold its lock.
        let _ = self.program.set(program);
        Ok(())
    }

    fn config(&self) -> String {
        let Setup { lease_ttl_ms, drain_delay_ms, provider_url, .. } = &self.setup;
        let drain_delay = drain_delay_ms.map_or_else(String::new, |ms| format!("drain_delay = \"{ms}ms\"\n"));
        // Older binaries do not know this key either; this test does not go back to them.
        let way_back = drain_delay_ms.map_or("", |_| "way_back = \"1ms\"\n");
        format!(
            "[http]\nlisten = \"{}\"\nauth = \"open\"\nsse_keep_alive = \"2s\"\n{drain_delay}\
             [engine]\nlease_ttl = \"{lease_ttl_ms}ms\"\npark_after = \"2s\"\npoll_interval = \"500ms\"\n\
             drain_grace = \"5s\"\n{way_back}\
             [store]\ndatabase_url = \"postgres://stagegate@{}/stagegate\"\n\
             [redis]\nurl = \"redis://{}/\"\n\
             [llm.providers.storm]\nkind = \"openai\"\nbase_url = \"{provider_url}\"\nmax_concurrency = 2000\n\
             [llm.prices.\"storm/m\"]\ninput = 1.0\noutput = 4.0\n\
             [log]\nformat = \"json\"\nfilter = \"info,stagegate_llm::cache=debug\"\n",
            self.address(),
            self.postgres.address(),
            self.redis.address(),
        )
    }

    /// Waits until it is ready for requests.
    pub(crate) async fn ready(&self) -> anyhow::Result<()> {
        let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(2)).build()?;
        let limit = Instant::now() + START_LIMIT;
        let url = format!("http://{}/readyz", self.address());
        loop {
            let program = self.program()?;
            match client.get(&url).send().await {
                Ok(answer) if answer.status().is_success() => return Ok(()),
                _ if !program.is_running() => bail!("{} ended:\n{}", self.name(), program.log_tail()),
                _ if Instant::now() > limit => bail!("{} is not ready:\n{}", self.name(), program.log_tail()),
                _ => sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// Starts it until it stays up: with its database away it ends at once, and its supervisor starts it again.
    pub(crate) async fn launch_until_ready(&self, limit: Duration) -> anyhow::Result<()> {
        let limit = Instant::now() + limit;
        loop {
            self.launch()?;
            match self.ready().await {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > limit => return Err(error),
                Err(_) => {
                    if !self.program()?.is_running() {
                        self.program()?.stop("KILL").await?;
                    }
                    sleep(Duration::from_millis(300)).await;
                }
            }
        }
    }
}
