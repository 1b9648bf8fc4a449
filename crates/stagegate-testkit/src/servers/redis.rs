//! A throwaway Redis.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::Mutex,
};
use url::Url;

use super::{
    REDIS_URL_ENV,
    watchdog::{self, Server, Spec},
};

/// How long a server may take until it answers.
const START_LIMIT: Duration = Duration::from_secs(20);
/// How often a start is tried: somebody else can take the port first.
const START_TRIES: u32 = 3;

/// A Redis server.
#[derive(Debug)]
pub struct Redis {
    url: String,
    /// None where the environment named it.
    server: Option<Server>,
}

impl Redis {
    /// A server of one's own, to be stopped, frozen and flushed at will.
    pub async fn private() -> anyhow::Result<Self> {
        let mut last = None;
        for _ in 0..START_TRIES {
            match Self::launch().await {
                Ok(server) => return Ok(server),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| anyhow::anyhow!("no try was made")))
    }

    /// The server that the environment names, else one for this process. Shared with other tests: keep to keys under
    /// [`Redis::unique_prefix`].
    pub async fn shared() -> anyhow::Result<Arc<Self>> {
        static SHARED: Mutex<Option<Arc<Redis>>> = Mutex::const_new(None);
        if let Ok(url) = std::env::var(REDIS_URL_ENV) {
            return Ok(Arc::new(Self { url, server: None }));
        }
        let mut shared = SHARED.lock().await;
        if let Some(server) = shared.as_ref() {
            return Ok(server.clone());
        }
        let server = Arc::new(Self::private().await?);
        *shared = Some(server.clone());
        Ok(server)
    }

    /// Its URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A key prefix that no other test uses.
    pub fn unique_prefix(&self) -> String {
        format!("t{}:", uuid::Uuid::new_v4().simple())
    }

    /// Stops it; its data is lost, as it keeps none on disk.
    pub async fn stop(&self) -> anyhow::Result<()> {
        self.server()?.stop("KILL").await.map(|_| ())
    }

    /// Starts it again on the same port, empty; returns when it answers.
    pub async fn start(&self) -> anyhow::Result<()> {
        self.server()?.start_again()?;
        self.answers().await
    }

    /// Freezes it: connections stay open and nothing answers.
    pub fn freeze(&self) -> anyhow::Result<()> {
        self.server()?.freeze()
    }

    /// Lets a frozen server go on.
    pub fn thaw(&self) -> anyhow::Result<()> {
        self.server()?.thaw();
        Ok(())
    }

    /// Removes every key. Only of a private server.
    pub async fn flush(&self) -> anyhow::Result<()> {
        self.server()?;
        self.command("FLUSHALL").await.map(|_| ())
    }

    fn server(&self) -> anyhow::Result<&Server> {
        self.server.as_ref().context("only a private server may be stopped, frozen or flushed")
    }

    async fn launch() -> anyhow::Result<Self> {
        let binary = watchdog::find("redis-server", &[]).with_context(|| {
            format!("no redis-server: `apt-get install redis-server`, or name a server in {REDIS_URL_ENV}")
        })?;
        let (home, user) = watchdog::home("redis")?;
        let port = watchdog::free_port()?.to_string();
        let folder = home.to_string_lossy().into_owned();
        let options =
            ["--port", &port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", folder.as_str()];
        let mut command = vec![binary.to_string_lossy().into_owned()];
        command.extend(options.iter().map(|option| (*option).to_owned()));
        let server = Server::start(Spec { home, user, command, stop_signal: "KILL" })?;
        let redis = Self { url: format!("redis://127.0.0.1:{port}/"), server: Some(server) };
        redis.answers().await?;
        Ok(redis)
    }

    async fn answers(&self) -> anyhow::Result<()> {
        let limit = tokio::time::Instant::now() + START_LIMIT;
        let server = self.server()?;
        loop {
            match self.command("PING").await {
                Ok(_) => return Ok(()),
                Err(error) if tokio::time::Instant::now() > limit || !server.is_running() => {
                    bail!("Redis does not answer: {error}\n{}", server.log_tail());
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }

    /// One command without arguments, answered by a simple string.
    async fn command(&self, command: &str) -> anyhow::Result<String> {
        let url = Url::parse(&self.url)?;
        let address = (url.host_str().unwrap_or("127.0.0.1").to_owned(), url.port().unwrap_or(6379));
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(format!("{command}\r\n").as_bytes()).await?;
        let mut answer = [0; 64];
        let length = stream.read(&mut answer).await?;
        let answer = String::from_utf8_lossy(&answer[..length]).into_owned();
        if answer.starts_with('+') { Ok(answer) } else { bail!("Redis answered {answer:?} to {command}") }
    }
}
