//! Wiring: owns how a configuration becomes a store, a cache, a model layer and an engine, and what it tells of them.
//! It decides nothing that the configuration does not say.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use stagegate_core::{Clock, Code, Error, Secret, Store, StoreError, SystemClock, cache::CacheTier, hint::Hints};
use stagegate_engine::{Engine, config::EngineConfig, memory::MEMORY_DEFAULT_BYTES};
use stagegate_http::{App, config::HttpConfig};
use stagegate_llm::{
    Llm, RedisHints, RedisTier,
    config::{ProviderConfig, ProviderKind},
};
use stagegate_net::Client;
use stagegate_store_postgres::PostgresStore;
use stagegate_store_sqlite::SqliteStore;
use stagegate_telemetry::Metrics;
use tokio::{
    net::TcpListener,
    runtime::{Handle, Runtime},
    task::JoinHandle,
};

use crate::{
    config::{Config, Environment},
    memory,
};

/// The name of the SQLite file in the data directory.
const FILE: &str = "stagegate.db";

/// How a daemon is put together, beside its configuration.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Options {
    /// Bring Postgres' schema up to date first.
    pub migrate: bool,
    /// Use the data directory's SQLite file, whatever database is configured.
    pub embedded: bool,
    /// Execute no runs: for what only reads.
    pub idle: bool,
}

/// Everything that runs in this process.
#[derive(Debug)]
pub(crate) struct Daemon {
    /// The engine.
    pub engine: Engine,
    /// The store.
    pub store: Arc<dyn Store>,
    /// The metrics.
    pub metrics: Metrics,
    /// True on SQLite.
    pub embedded: bool,
    /// What is used and what that costs, a line each.
    pub notes: Vec<String>,
    /// True where no provider but the simulator can be called.
    pub is_simulated: bool,
    /// Requests of the API that may ask the store at once.
    pub reads_max: usize,
    vital: Vital,
}

/// The runtime of connections, probes and heartbeats, with threads of its own: they go on while all others are busy.
#[derive(Debug)]
struct Vital(Option<Runtime>);

/// Its threads: two, so that one long answer of a probe does not hold up the rest.
const VITAL_THREADS: usize = 2;

impl Vital {
    fn start() -> Result<Self, Error> {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(VITAL_THREADS).thread_name("stagegate-vital").enable_all().build();
        let failed = |error| Error::new(Code::Internal, format!("the runtime could not start: {error}"));
        runtime.map(|runtime| Self(Some(runtime))).map_err(failed)
    }
}

impl Drop for Vital {
    fn drop(&mut self) {
        // A runtime that is dropped inside of another one may not wait for its threads.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// A store and what there is to say of it.
pub(crate) struct OpenStore {
    /// The store.
    pub store: Arc<dyn Store>,
    /// The cache that comes with it.
    pub tier: Option<Arc<dyn CacheTier>>,
    /// What it is and what that costs.
    pub note: String,
    /// Connections that it has for what the API asks.
    pub reads_max: usize,
    /// The migrations that were applied when it was opened: number and name.
    pub migrated: Vec<(i64, String)>,
}

impl Daemon {
    /// Puts everything together and starts the engine.
    pub(crate) async fn start(config: &Config, options: Options) -> Result<Self, Error> {
        let metrics = Metrics::new();
        metrics.build_info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let opened = open_store(config, options, &metrics).await?;
        let mut notes = vec![opened.note];
        let embedded = opened.tier.is_some();
        let tier = if embedded {
            notes.push("cache: in the same SQLite file; survives restarts, is not shared between machines".to_owned());
            opened.tier
        } else {
            shared_cache(config, &mut notes)?
        };
        let real = real_models(config);
        notes.push(models(&real));
        notes.extend(proxies(config));
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let client = Client::new(&config.net)?;
        let llm = Arc::new(Llm::new(&config.llm, &client, tier, metrics.clone(), Arc::clone(&clock))?);
        let mut engine_config = config.engine.clone();
        if options.idle {
            engine_config.max_runs = 0;
        }
        notes.push(memory_of(&mut engine_config));
        let store = opened.store;
        let hints = if embedded { None } else { hints(config)? };
        let shared_store = Arc::clone(&store);
        let vital = Vital::start()?;
        let Some(runtime) = vital.0.as_ref().map(Runtime::handle) else {
            return Err(Error::new(Code::Internal, "the runtime of heartbeats is not there"));
        };
        let engine = Engine::start_beating_on(runtime, engine_config, shared_store, llm, metrics.clone(), clock, hints);
        let engine = engine.await?;
        let is_simulated = real.is_empty();
        Ok(Self { engine, store, metrics, embedded, notes, is_simulated, reads_max: opened.reads_max, vital })
    }

    /// Serves the API until `until` resolves: connections and probes on their own runtime, the rest on this one.
    pub(crate) fn serve(
        &self,
        config: HttpConfig,
        listener: TcpListener,
        until: impl Future<Output = ()> + Send + 'static,
    ) -> Result<JoinHandle<Result<(), Error>>, Error> {
        let moved = |error: std::io::Error| Error::new(Code::Internal, format!("the listener is lost: {error}"));
        let listener = listener.into_std().map_err(moved)?;
        let app = App {
            engine: self.engine.clone(),
            metrics: self.metrics.clone(),
            config,
            embedded: self.embedded,
            handlers: Some(Handle::current()),
            reads_max: self.reads_max,
        };
        let work = async move {
            let listener = TcpListener::from_std(listener).map_err(moved)?;
            stagegate_http::serve(app, listener, until).await
        };
        let Some(runtime) = &self.vital.0 else {
            return Err(Error::new(Code::Internal, "the runtime of connections is not there"));
        };
        Ok(runtime.spawn(work))
    }

    /// Gives what is under way `grace`, hands the rest back, and closes the store.
    pub(crate) async fn stop(&self, grace: Duration) {
        self.engine.drain(grace).await;
        self.store.close().await;
    }
}

/// Opens the configured store: Postgres where there is a URL, else SQLite.
pub(crate) async fn open_store(config: &Config, options: Options, metrics: &Metrics) -> Result<OpenStore, Error> {
    match &config.store.database_url {
        Some(url) if !options.embedded => {
            let (store, migrated) = open_postgres(config, url, options.migrate, metrics).await?;
            let pool = config.store.pool.max_connections;
            let note = format!("store: Postgres at {} (up to {pool} connections)", host_of(url));
            let reads_max = store.connections_for_guests();
            Ok(OpenStore { store: Arc::new(store), tier: None, note, reads_max, migrated })
        }
        _ => {
            let directory = data_dir(config)?;
            let path = directory.join(FILE);
            let store = SqliteStore::open(&path, metrics.clone()).await.map_err(|error| told(&error, "SQLite"))?;
            let tier = Some(store.cache_tier());
            let note = format!("store: embedded SQLite at {}: this machine alone, no replicas", path.display());
            let migrated = store.migrated().to_vec();
            Ok(OpenStore { store: Arc::new(store), tier, note, reads_max: SqliteStore::READERS, migrated })
        }
    }
}

/// Connects to Postgres; checks its schema, or brings it up to date and says with which migrations.
pub(crate) async fn open_postgres(
    config: &Config,
    url: &Secret,
    migrate: bool,
    metrics: &Metrics,
) -> Result<(PostgresStore, Vec<(i64, String)>), Error> {
    is_postgres(url)?;
    let host = host_of(url);
    let unreachable = |error: StoreError| told(&error, &format!("Postgres at {host}"));
    let store =
        PostgresStore::connect(url, &config.store.pool, metrics.clone()).await.map_err(|error| match error {
            // No statement was asked for yet: it is the door that was not opened.
            StoreError::Defect(reason) => Error::new(
                Code::DatabaseUnreachable,
                format!(
                    "Postgres at {host} refused us: {reason}; check the user, the password and the database's name"
                ),
            ),
            other => unreachable(other),
        })?;
    if migrate {
        let migrated = store.migrate().await.map_err(unreachable)?;
        return Ok((store, migrated));
    }
    store.check_schema().await.map_err(unreachable)?;
    Ok((store, Vec::new()))
}

/// Refuses what is no address of a Postgres database, without showing it.
fn is_postgres(url: &Secret) -> Result<(), Error> {
    let wrong = |what: String| {
        let mend = "write postgres://user:password@host/database, special characters percent-encoded";
        Err(Error::new(Code::InvalidConfig, format!("store.database_url (DATABASE_URL): {what}; {mend}")))
    };
    match url::Url::parse(url.expose()) {
        Ok(url) if matches!(url.scheme(), "postgres" | "postgresql") => Ok(()),
        Ok(url) => wrong(format!("`{}` is not a scheme of Postgres", url.scheme())),
        Err(error) => wrong(format!("this is no URL ({error})")),
    }
}

/// A store's error as a person can mend it.
pub(crate) fn told(error: &StoreError, what: &str) -> Error {
    match error {
        StoreError::Unavailable(reason) => Error::new(
            Code::DatabaseUnreachable,
            format!("{what} could not be reached: {reason}; is it running, and is the URL right?"),
        ),
        StoreError::SchemaBehind { found, needed } => Error::new(
            Code::SchemaBehind,
            format!(
                "{what}: the schema is at version {found}, this binary needs {needed}; run `stagegate migrate`, or \
                 start with `stagegate serve --migrate`"
            ),
        ),
        StoreError::SchemaAhead(reason) => Error::new(Code::SchemaAhead, format!("{what}: {reason}")),
        StoreError::Corrupt { .. } => Error::new(Code::CorruptRow, format!("{what}: {error}")),
        StoreError::Full(_) => Error::new(Code::Unavailable, format!("{what}: {error}")),
        StoreError::Defect(_) => Error::new(Code::Internal, format!("{what}: {error}")),
    }
}

/// Finds out how much memory may be held, where that is not configured.
fn memory_of(config: &mut EngineConfig) -> String {
    let megabytes = |bytes: u64| bytes >> 20;
    if let Some(configured) = config.memory_max_bytes {
        return format!("memory: up to {} MB are held for callers (engine.memory_max_bytes)", megabytes(configured));
    }
    let Some((limit, name)) = memory::limit() else {
        let held = megabytes(MEMORY_DEFAULT_BYTES);
        return format!("memory: no limit was found; up to {held} MB are held for callers (engine.memory_max_bytes)");
    };
    let held = memory::budget_of(limit);
    config.memory_max_bytes = Some(held);
    format!("memory: up to {} MB are held for callers, half of {name}", megabytes(held))
}

/// The shared cache of a daemon on Postgres: Redis, or none.
fn shared_cache(config: &Config, notes: &mut Vec<String>) -> Result<Option<Arc<dyn CacheTier>>, Error> {
    let Some(url) = &config.redis.url else {
        notes.push("cache: in this process only: replicas do not share answers; set REDIS_URL to share".to_owned());
        return Ok(None);
    };
    let tier = RedisTier::connect(url, &config.redis.limits)?;
    notes.push(format!("cache: Redis at {}, shared by every replica", host_of(url)));
    Ok(Some(Arc::new(tier)))
}

/// The way for hints between the replicas of a daemon on Postgres: Redis, or none.
fn hints(config: &Config) -> Result<Option<Arc<dyn Hints>>, Error> {
    let Some(url) = &config.redis.url else { return Ok(None) };
    Ok(Some(Arc::new(RedisHints::start(url, &config.redis.limits)?)))
}

/// The providers beside the simulator that can be called, as people write their models.
fn real_models(config: &Config) -> Vec<String> {
    let can_be_called = |name: &str, provider: &ProviderConfig| {
        name != "sim"
            && provider.kind != ProviderKind::Sim
            && (provider.api_key.is_some() || provider.base_url.is_some())
    };
    let providers = config.llm.providers.iter().filter(|(name, provider)| can_be_called(name, provider));
    providers.map(|(name, _)| format!("{name}/…")).collect()
}

/// Which models can be called.
fn models(real: &[String]) -> String {
    if real.is_empty() {
        return "models: simulated only (sim/…); for real ones set OPENAI_API_KEY, ANTHROPIC_API_KEY, GEMINI_API_KEY"
            .to_owned();
    }
    format!("models: {}, which cost what their providers charge, and simulated ones (sim/…)", real.join(", "))
}

/// Which proxies stand before the providers, where there are any.
fn proxies(config: &Config) -> Option<String> {
    let shown = config.net.proxies_shown();
    if shown.is_empty() { None } else { Some(format!("proxies: {}", shown.join(", "))) }
}

/// The host and database of a URL: never its user, password or parameters.
pub(crate) fn host_of(url: &Secret) -> String {
    match url::Url::parse(url.expose()) {
        Ok(url) => {
            let host = url.host_str().filter(|host| !host.is_empty()).unwrap_or("localhost");
            let port = url.port().map_or_else(String::new, |port| format!(":{port}"));
            format!("{host}{port}{}", url.path().trim_end_matches('/'))
        }
        Err(_) => "(a URL that cannot be read)".to_owned(),
    }
}

/// The data directory; made, for this user alone, where it is not there yet.
pub(crate) fn data_dir(config: &Config) -> Result<PathBuf, Error> {
    let directory = match &config.store.data_dir {
        Some(directory) => directory.clone(),
        None => default_data_dir(&Environment::of_process()).ok_or_else(|| {
            Error::new(
                Code::InvalidConfig,
                "there is no home directory to keep state in; set `store.data_dir`, STAGEGATE_DATA_DIR or --data-dir",
            )
        })?,
    };
    private_directory(&directory).map_err(|error| {
        Error::new(Code::InvalidConfig, format!("store.data_dir: {} cannot be made: {error}", directory.display()))
    })?;
    Ok(directory)
}

fn default_data_dir(environment: &Environment) -> Option<PathBuf> {
    let absolute = |name: &str| environment.variables.get(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_DATA_HOME").or_else(|| Some(absolute("HOME")?.join(".local/share")));
    base.map(|base| base.join("stagegate"))
}

/// Makes a directory that only its owner may enter. One that is there keeps its mode.
fn private_directory(path: &Path) -> std::io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_is_named_without_its_secrets() {
        let host = |url: &str| host_of(&Secret::from(url.to_owned()));
        assert_eq!(host("postgres://me:hunter2@db.example:5433/runs?password=x"), "db.example:5433/runs");
        assert_eq!(host("redis://:hunter2@cache"), "cache");
        assert!(!host("not a url hunter2").contains("hunter2"));
    }

    #[test]
    fn what_is_no_address_of_a_postgres_database_is_refused_and_not_shown() {
        let check = |url: &str| is_postgres(&Secret::from(url.to_owned()));
        assert_eq!(check("postgres://me:x@db/runs").or(check("postgresql:///runs?host=/run")), Ok(()));
        for url in ["hunter2", "mysql://me:hunter2@db/runs", "postgres://me:hunter2@db:port/runs"] {
            let error = check(url).expect_err("refused");
            assert_eq!(error.code, Code::InvalidConfig, "{error}");
            assert!(error.detail.contains("DATABASE_URL") && !error.detail.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn the_data_directory_follows_the_desktop_rules() {
        let with = |pairs: &[(&str, &str)]| {
            let variables = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            default_data_dir(&Environment { variables, directory: PathBuf::new() })
        };
        assert_eq!(with(&[("HOME", "/h"), ("XDG_DATA_HOME", "/x")]), Some("/x/stagegate".into()));
        assert_eq!(with(&[("HOME", "/h"), ("XDG_DATA_HOME", "relative")]), Some("/h/.local/share/stagegate".into()));
        assert_eq!(with(&[]), None);
    }

    #[test]
    fn a_schema_that_is_behind_tells_how_to_mend_it() {
        let error = told(&StoreError::SchemaBehind { found: 1, needed: 2 }, "Postgres at db/x");
        assert_eq!(error.code, Code::SchemaBehind);
        assert!(error.detail.contains("stagegate migrate") && error.detail.contains("--migrate"), "{error}");
    }
}
