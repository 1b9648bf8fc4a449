//! `stagegate serve`: the daemon. Owns its start and its end; everything between is the engine's and the API's.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use stagegate_core::{Code, Error, TenantId};
use stagegate_telemetry::logs;
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};

use super::run::Signals;
use crate::{
    cli::Global,
    config::{Config, listen_address},
    daemon::{Daemon, Options},
    open_files,
    pipelines_dir::PipelinesDir,
};

const EXAMPLES: &str = "\
Examples:
  stagegate serve                            embedded, open on loopback
  OPENAI_API_KEY=… stagegate serve --listen 9000
  stagegate serve --pipelines pipelines/     registered at start, and watched
  DATABASE_URL=postgres://… REDIS_URL=redis://… OPENAI_API_KEY=… \\
    stagegate serve --listen 0.0.0.0:8080 --migrate     in production

Embedded it needs nothing: SQLite, and models that are simulated until a provider has its key. In production run as many \
replicas as you like on one database.

API docs are at /docs, metrics at /metrics, probes at /healthz and /readyz.

SIGTERM and SIGINT drain: no new work, what is under way may finish (engine.drain_grace), the rest is handed back; a \
second signal leaves at once. SIGTERM first serves on for http.drain_delay, not ready, so that no balancer sends \
anything to a closed door. SIGHUP is ignored: the daemon outlives the terminal that it was started from.

--pipelines registers every .yaml, .yml and .json file directly in the directory before the daemon is ready; mistakes \
are told all at once, and it does not start. Later changes are registered once nothing of them has changed for two \
seconds; an older text that comes back is in force again, as a new version. A file that is broken by then is told in the \
log and leaves the version before it in force; a file that is removed changes nothing.

Exit codes: 0 drained, 1 failed, 2 a mistake in the configuration or in a pipeline.";

/// What [`Signals::next`] calls SIGTERM.
const SIGTERM_CODE: i32 = 143;
/// How long requests under way may take to finish once the engine has drained.
const CLOSE_GRACE: Duration = Duration::from_secs(5);

/// Serve the HTTP API and execute runs.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Serve {
    /// Where to listen: ADDRESS:PORT, or a port on loopback [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDRESS", value_parser = listen_address)]
    listen: Option<SocketAddr>,
    /// Who may call [default: auto]
    #[arg(long, value_name = "MODE", value_parser = ["auto", "keys", "open"])]
    auth: Option<String>,
    /// Bring the database's schema up to date first; safe when several replicas start at once
    #[arg(long)]
    migrate: bool,
    /// Register the pipelines of this directory, and what changes in it
    #[arg(long, value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    pipelines: Option<PathBuf>,
    /// Whose those pipelines are
    #[arg(long, value_name = "TENANT", default_value = "default", requires = "pipelines")]
    pipelines_tenant: TenantId,
}

impl Serve {
    pub(crate) async fn run(self, global: &Global) -> Result<u8, Error> {
        let mut signals = Signals::listen()?;
        let mut flags = global.flags();
        flags.set("--listen", &["http", "listen"], self.listen);
        flags.set("--auth", &["http", "auth"], self.auth.as_ref());
        let config = global.load_with(&flags)?.config;
        let _guard = logs::init(&config.log, &config.sentry, env!("CARGO_PKG_VERSION"))?;
        if let Some(mend) = open_files::raise(&config) {
            tracing::warn!("{mend}");
        }
        // The API holds to this as well; here it is told before a database is touched.
        let embedded = config.store.database_url.is_none();
        stagegate_http::is_open(&config.http, embedded, config.http.listen)?;
        // Bound before anything is started, so that a taken port costs nothing.
        let listener = bind(config.http.listen).await?;
        let options = Options { migrate: self.migrate, ..Options::default() };
        let daemon = tokio::select! {
            daemon = Box::pin(Daemon::start(&config, options)) => daemon?,
            code = signals.next() => std::process::exit(code),
        };
        let watching = match self.pipelines {
            None => None,
            Some(path) => {
                let watching = tokio::select! {
                    biased;
                    code = signals.next() => {
                        daemon.stop(Duration::ZERO).await;
                        return Ok(u8::try_from(code).unwrap_or(1));
                    }
                    watching = watched(&daemon, path, self.pipelines_tenant) => watching,
                };
                match watching {
                    Ok(watching) => Some(watching),
                    Err(error) => {
                        daemon.stop(Duration::ZERO).await;
                        return Err(error);
                    }
                }
            }
        };
        let served = serve(config, daemon, listener, &mut signals).await;
        if let Some(watching) = watching {
            watching.abort();
        }
        served
    }
}

/// Registers what the directory holds, and then what changes in it.
async fn watched(daemon: &Daemon, path: PathBuf, tenant: TenantId) -> Result<JoinHandle<()>, Error> {
    let directory = PipelinesDir::new(path, tenant).register_all(&daemon.engine).await?;
    Ok(tokio::spawn(directory.watch(daemon.engine.clone())))
}

/// Serves until a signal, then drains.
async fn serve(config: Config, daemon: Daemon, listener: TcpListener, signals: &mut Signals) -> Result<u8, Error> {
    let address = listener.local_addr().unwrap_or(config.http.listen);
    announce(&config, &daemon, address).await;
    let grace = config.engine.drain_grace.0;
    let mut delay = config.http.drain_delay.map(|delay| delay.0);
    let (stop, stopped) = oneshot::channel::<()>();
    let mut server = daemon.serve(config.http, listener, async move {
        // A dropped sender stops it as well.
        let _ = stopped.await;
    })?;
    tokio::select! {
        ended = &mut server => {
            daemon.stop(Duration::ZERO).await;
            return ended.unwrap_or_else(|error| Err(Error::new(Code::Internal, error.to_string()))).map(|()| 1);
        }
        code = signals.next() => {
            // Ctrl-C is a person, who has no balancer.
            delay = delay.filter(|_| code == SIGTERM_CODE);
            let delay_ms = delay.unwrap_or_default().as_millis();
            tracing::info!(signal = code - 128, delay_ms, grace_ms = grace.as_millis(), "draining");
        }
    }
    let drained = async {
        if let Some(delay) = delay {
            // Whoever balances the load learns that this replica leaves before it refuses anything.
            daemon.engine.announce_leave();
            tokio::time::sleep(delay).await;
        }
        // Probes and event streams go on while the engine drains.
        daemon.engine.drain(grace).await;
        let _ = stop.send(());
        let closed = tokio::time::timeout(CLOSE_GRACE, &mut server).await;
        daemon.store.close().await;
        match closed {
            Ok(Ok(result)) => result,
            Ok(Err(error)) => Err(Error::new(Code::Internal, error.to_string())),
            Err(_) => Ok(()),
        }
    };
    tokio::select! {
        result = drained => {
            result?;
            tracing::info!("stopped");
            Ok(0)
        }
        code = signals.next() => {
            tracing::warn!("a second signal: leaving at once; what was under way goes on at the next start");
            std::process::exit(code)
        }
    }
}

/// Binds, or says what to do about it.
pub(crate) async fn bind(listen: SocketAddr) -> Result<TcpListener, Error> {
    TcpListener::bind(listen).await.map_err(|error| {
        let mend = match error.kind() {
            std::io::ErrorKind::AddrInUse => "another process listens there; choose another address with --listen",
            std::io::ErrorKind::PermissionDenied => "ports below 1024 need privileges; choose another with --listen",
            _ => "choose another address with --listen",
        };
        Error::new(Code::InvalidConfig, format!("http.listen: {listen} cannot be used: {error}; {mend}"))
    })
}

/// Says what is used and what that costs, a line each.
async fn announce(config: &Config, daemon: &Daemon, address: SocketAddr) {
    tracing::info!(version = env!("CARGO_PKG_VERSION"), replica = %daemon.engine.replica(), "stagegate starts");
    for note in &daemon.notes {
        tracing::info!("{note}");
    }
    let open = stagegate_http::is_open(&config.http, daemon.embedded, address).unwrap_or(false);
    if open {
        tracing::info!(
            "access: open to everybody on this machine, as tenant `default`; `http.auth = \"keys\"` asks for API keys"
        );
    } else {
        if daemon.is_simulated {
            // Who asks for keys means it: a forgotten provider key must not pass for an answer.
            tracing::warn!(
                "every answer of this daemon is simulated, though it asks for keys as one in production does: no \
                 provider has a key"
            );
        }
        tracing::info!("access: an API key on every call but the probes");
        if daemon.store.keys(None).await.is_ok_and(|keys| keys.is_empty()) {
            tracing::warn!("there is no API key yet: make one with `stagegate keys create --role admin --name …`");
        }
    }
    tracing::info!("listening: http://{address} (API docs: http://{address}/docs)");
}
