//! A throwaway Postgres, and databases on it.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tokio::sync::Mutex;
use url::Url;

use super::{
    DATABASE_URL_ENV,
    watchdog::{self, Server, Spec},
};

/// How long a server may take until it answers.
const START_LIMIT: Duration = Duration::from_mins(1);
/// How often a start is tried: somebody else can take the port first.
const START_TRIES: u32 = 3;

/// Settings of every throwaway server.
const COMMON: &[&str] = &["listen_addresses=127.0.0.1", "unix_socket_directories=", "max_connections=200"];
/// Nobody needs the data of a test after a power cut. What was committed still survives a crash of the server.
const FAST: &[&str] = &["fsync=off", "full_page_writes=off"];
/// As in production, with room enough that the disk is what is measured.
const DURABLE: &[&str] = &[
    "fsync=on",
    "synchronous_commit=on",
    "shared_buffers=512MB",
    "min_wal_size=2GB",
    "max_wal_size=4GB",
    "checkpoint_timeout=15min",
];
/// Segments of the WAL (16 MB each) that a durable server has in store: its `min_wal_size`.
const SEGMENTS: u32 = 128;

/// A Postgres server.
#[derive(Debug)]
pub struct Postgres {
    url: String,
    /// None where the environment named it.
    server: Option<Server>,
}

impl Postgres {
    /// A server of one's own, to be stopped and frozen at will.
    pub async fn private() -> anyhow::Result<Self> {
        Self::launch(FAST).await
    }

    /// A server of one's own that is as durable as a production one.
    pub async fn durable() -> anyhow::Result<Self> {
        Self::launch(DURABLE).await
    }

    /// The same, for measurements: like one that has run for a while it has old segments of the WAL to use again. A
    /// fresh one makes each anew, zeroed and synced, while commits wait.
    pub async fn seasoned() -> anyhow::Result<Self> {
        let server = Self::durable().await?;
        let mut admin = PgConnection::connect(server.url()).await?;
        let fill = format!(
            "DO $$ BEGIN FOR n IN 1..{SEGMENTS} LOOP
                 PERFORM pg_logical_emit_message(false, 'stagegate', ''), pg_switch_wal();
             END LOOP; END $$"
        );
        sqlx::query(AssertSqlSafe(fill)).execute(&mut admin).await.context("cannot fill the WAL")?;
        let _ = admin.close().await;
        server.checkpoint().await?;
        Ok(server)
    }

    /// Makes a checkpoint: dirty pages are written, the segments of the WAL before it can be used again.
    pub async fn checkpoint(&self) -> anyhow::Result<()> {
        let mut admin = PgConnection::connect(&self.url).await?;
        sqlx::query("CHECKPOINT").execute(&mut admin).await.context("cannot make a checkpoint")?;
        let _ = admin.close().await;
        Ok(())
    }

    /// The server that the environment names, else one for this process.
    pub async fn shared() -> anyhow::Result<Arc<Self>> {
        static SHARED: Mutex<Option<Arc<Postgres>>> = Mutex::const_new(None);
        if let Ok(url) = std::env::var(DATABASE_URL_ENV) {
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

    /// The URL of its maintenance database.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Stops it in order: sessions are ended, everything is written.
    pub async fn stop(&self) -> anyhow::Result<()> {
        self.server()?.stop("INT").await.map(|_| ())
    }

    /// Stops it as a crash would: sessions break, the next start recovers.
    pub async fn crash(&self) -> anyhow::Result<()> {
        self.server()?.stop("QUIT").await.map(|_| ())
    }

    /// Starts it again on the same port and data; returns when it answers.
    pub async fn start(&self) -> anyhow::Result<()> {
        let server = self.server()?;
        server.start_again()?;
        answers(&self.url, server).await
    }

    /// Stops and starts it.
    pub async fn restart(&self) -> anyhow::Result<()> {
        self.stop().await?;
        self.start().await
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

    /// The user and group that it runs as, where that is not us: whoever gives it a folder must make it theirs.
    pub fn user(&self) -> Option<(u32, u32)> {
        self.server.as_ref().and_then(Server::user)
    }

    /// Everything that it wrote, over all its starts; None where the environment named it.
    pub fn log_path(&self) -> Option<PathBuf> {
        self.server.as_ref().map(|server| server.home().join("log"))
    }

    /// The end of what it wrote.
    pub fn log_tail(&self) -> String {
        self.server.as_ref().map(Server::log_tail).unwrap_or_default()
    }

    /// Whether its process is there.
    pub fn is_running(&self) -> bool {
        self.server.as_ref().is_none_or(Server::is_running)
    }

    fn server(&self) -> anyhow::Result<&Server> {
        self.server.as_ref().context("only a private server may be stopped or frozen")
    }

    async fn launch(settings: &[&str]) -> anyhow::Result<Self> {
        let mut last = None;
        for _ in 0..START_TRIES {
            match Self::try_launch(settings).await {
                Ok(server) => return Ok(server),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| anyhow::anyhow!("no try was made")))
    }

    async fn try_launch(settings: &[&str]) -> anyhow::Result<Self> {
        let bin = binaries()?;
        let (home, user) = watchdog::home("postgres")?;
        let data = home.join("data");
        let mut initdb = tokio::process::Command::new(bin.join("initdb"));
        initdb.arg("-D").arg(&data).args(["-U", "stagegate", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]);
        initdb.current_dir(&home).stdin(Stdio::null());
        if let Some((uid, gid)) = user {
            initdb.uid(uid).gid(gid);
        }
        let output = initdb.output().await.context("cannot run initdb")?;
        if !output.status.success() {
            bail!("initdb failed: {}", String::from_utf8_lossy(&output.stderr));
        }
        let port = watchdog::free_port()?;
        let mut command = vec![text(&bin.join("postgres")), "-D".into(), text(&data), "-p".into(), port.to_string()];
        for setting in COMMON.iter().chain(settings) {
            command.extend(["-c".to_owned(), (*setting).to_owned()]);
        }
        let server = Server::start(Spec { home, user, command, stop_signal: "QUIT" })?;
        let url = format!("postgres://stagegate@127.0.0.1:{port}/postgres");
        answers(&url, &server).await?;
        Ok(Self { url, server: Some(server) })
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// The folder of the newest `initdb` and `postgres`.
fn binaries() -> anyhow::Result<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut folders: Vec<(u32, PathBuf)> = versions
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin"))))
        .collect();
    folders.sort_by(|a, b| b.cmp(a));
    let folders: Vec<PathBuf> = folders.into_iter().map(|(_, folder)| folder).collect();
    let initdb = watchdog::find("initdb", &folders).with_context(|| {
        format!("no Postgres server binaries: `apt-get install postgresql`, or name a server in {DATABASE_URL_ENV}")
    })?;
    let initdb = initdb.canonicalize()?;
    Ok(initdb.parent().context("initdb is in no folder")?.to_path_buf())
}

async fn answers(url: &str, server: &Server) -> anyhow::Result<()> {
    let limit = tokio::time::Instant::now() + START_LIMIT;
    loop {
        match PgConnection::connect(url).await {
            Ok(connection) => {
                let _ = connection.close().await;
                return Ok(());
            }
            Err(error) if tokio::time::Instant::now() > limit || !server.is_running() => {
                bail!("Postgres does not answer: {error}\n{}", server.log_tail());
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// An empty database; dropped with this value.
#[derive(Debug)]
pub struct TestDatabase {
    url: String,
    name: String,
    server: Arc<Postgres>,
}

impl TestDatabase {
    /// An empty database on the shared server.
    ///
    /// # Panics
    /// Where there is no server; the message says what to install.
    pub async fn fresh() -> Self {
        let database = async { Self::on(Postgres::shared().await?).await };
        database.await.expect("a throwaway database")
    }

    /// An empty database on this server.
    pub async fn on(server: Arc<Postgres>) -> anyhow::Result<Self> {
        let name = format!("t_{}", uuid::Uuid::new_v4().simple());
        let mut admin = PgConnection::connect(server.url()).await.context("cannot reach the test server")?;
        // template0: nobody can be connected to it, which would make the copy fail.
        let create = format!("CREATE DATABASE {name} TEMPLATE template0");
        sqlx::query(AssertSqlSafe(create)).execute(&mut admin).await.context("cannot create a test database")?;
        let _ = admin.close().await;
        let mut url = Url::parse(server.url()).context("the test server's URL")?;
        url.set_path(&name);
        Ok(Self { url: url.into(), name, server })
    }

    /// Its URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The server that it is on.
    pub fn server(&self) -> &Postgres {
        &self.server
    }
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        // A server of ours goes as a whole.
        if self.server.server.is_some() {
            return;
        }
        let (url, drop) = (self.server.url.clone(), format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", self.name));
        let dropping = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime
                .block_on(async {
                    let work = async {
                        let mut admin = PgConnection::connect(&url).await?;
                        sqlx::query(AssertSqlSafe(drop)).execute(&mut admin).await
                    };
                    tokio::time::timeout(Duration::from_secs(10), work).await
                })?
                .map_err(std::io::Error::other)
        });
        // What is left behind is the server owner's to remove; a test must not fail for it.
        let _ = dropping.join();
    }
}
