//! Where the fault loops stand: a real store of either kind with its shared cache tier, what its tables say, and
//! replicas that die as processes do.

use std::{
    future::Future,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use sqlx::{Connection as _, PgConnection, Row as _, SqliteConnection, sqlite::SqliteConnectOptions};
use stagegate_core::{
    RunId, Secret, Store, SystemClock, TenantId,
    cache::{CacheError, CacheKey, CacheLookup, CacheScope, CacheTier},
    pipeline::Span,
};
use stagegate_engine::{Engine, config::EngineConfig};
use stagegate_llm::{RedisConfig, RedisTier};
use stagegate_store_postgres::{PoolConfig, PostgresStore};
use stagegate_store_sqlite::SqliteStore;
use stagegate_telemetry::Metrics;
use stagegate_testkit::servers::{Redis, TestDatabase};
use tokio::{
    runtime::{Builder, Handle, Runtime},
    sync::watch,
};

use crate::{
    bench::llm_with,
    faulty::{Faulty, Injection},
};

/// Which store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Sqlite,
    Postgres,
}

/// Where a process finds its store and its shared cache.
#[derive(Debug, Clone)]
enum Place {
    Sqlite(PathBuf),
    Postgres { url: String, redis: String, prefix: String },
}

/// Connections of one process. Few: many of these stand beside each other on one server.
const POOL: u32 = 2;

impl Place {
    async fn open(&self) -> (Arc<dyn Store>, Arc<dyn CacheTier>) {
        match self {
            Self::Sqlite(path) => {
                let store = SqliteStore::open(path, Metrics::new()).await.expect("a store");
                let tier = store.cache_tier();
                (Arc::new(store), tier)
            }
            Self::Postgres { url, redis, prefix } => {
                let pool = PoolConfig { max_connections: POOL, acquire_timeout: long(), ..PoolConfig::default() };
                let url = Secret::from(url.clone());
                let store = PostgresStore::connect(&url, &pool, Metrics::new()).await.expect("connects");
                let config = RedisConfig {
                    key_prefix: prefix.clone(),
                    connect_timeout: long(),
                    response_timeout: long(),
                    ..RedisConfig::default()
                };
                let tier = RedisTier::connect(&Secret::from(redis.clone()), &config).expect("a tier");
                (Arc::new(store), Arc::new(tier))
            }
        }
    }
}

/// A machine that is busy with other tests must not look like a server that is away.
fn long() -> Span {
    Span(Duration::from_secs(20))
}

/// A database and a shared tier, and a connection to both that outlives the replicas.
#[derive(Debug)]
pub(crate) struct Stand {
    place: Place,
    pub(crate) store: Arc<dyn Store>,
    tier: Arc<dyn CacheTier>,
    /// What must live as long.
    _kept: (Option<tempfile::TempDir>, Option<TestDatabase>, Option<Arc<Redis>>),
}

/// What the tables say of a run.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Rows {
    pub(crate) checkpoints: i64,
    pub(crate) calls: i64,
    pub(crate) cost_nanos: i64,
    pub(crate) saved_nanos: i64,
    pub(crate) bought_tokens: i64,
}

const LEDGER: &str = "SELECT CAST(count(*) AS bigint), CAST(coalesce(sum(cost_nanos), 0) AS bigint),
    CAST(coalesce(sum(saved_nanos), 0) AS bigint),
    CAST(coalesce(sum(CASE WHEN origin IN ('cache_local', 'cache_shared', 'coalesced') THEN 0 ELSE input_tokens END), 0) AS bigint)
    FROM ledger WHERE run_id = $1";
const CHECKPOINTS: &str = "SELECT CAST(count(*) AS bigint) FROM checkpoints WHERE run_id = $1";

impl Stand {
    pub(crate) async fn new(kind: Kind) -> Self {
        match kind {
            Kind::Sqlite => {
                let folder = tempfile::tempdir().expect("a folder");
                let place = Place::Sqlite(folder.path().join("test.db"));
                let (store, tier) = place.open().await;
                Self { place, store, tier, _kept: (Some(folder), None, None) }
            }
            Kind::Postgres => {
                let (database, redis) = (TestDatabase::fresh().await, Redis::shared().await.expect("a Redis"));
                let url = database.url().to_owned();
                let (secret, pool) = (Secret::from(url.clone()), PoolConfig::default());
                let migrating = PostgresStore::connect(&secret, &pool, Metrics::new()).await.expect("connects");
                migrating.migrate().await.expect("migrates");
                migrating.close().await;
                let place = Place::Postgres { url, redis: redis.url().to_owned(), prefix: redis.unique_prefix() };
                let (store, tier) = place.open().await;
                Self { place, store, tier, _kept: (None, Some(database), Some(redis)) }
            }
        }
    }

    /// What the tables say of a run, read past the store.
    pub(crate) async fn rows(&self, run: RunId) -> Rows {
        let (ledger, checkpoints) = match &self.place {
            Place::Sqlite(path) => {
                let options = SqliteConnectOptions::new().filename(path);
                let mut connection = SqliteConnection::connect_with(&options).await.expect("opens");
                let checkpoints = sqlx::query_scalar(CHECKPOINTS).bind(run.0).fetch_one(&mut connection).await;
                let ledger = sqlx::query(LEDGER).bind(run.0).fetch_one(&mut connection).await.expect("reads");
                (std::array::from_fn::<i64, 4, _>(|at| ledger.get(at)), checkpoints)
            }
            Place::Postgres { url, .. } => {
                let mut connection = PgConnection::connect(url).await.expect("connects");
                let checkpoints = sqlx::query_scalar(CHECKPOINTS).bind(run.0).fetch_one(&mut connection).await;
                let ledger = sqlx::query(LEDGER).bind(run.0).fetch_one(&mut connection).await.expect("reads");
                let ledger = std::array::from_fn::<i64, 4, _>(|at| ledger.get(at));
                let _ = connection.close().await;
                (ledger, checkpoints)
            }
        };
        let [calls, cost_nanos, saved_nanos, bought_tokens] = ledger;
        Rows { checkpoints: checkpoints.expect("reads"), calls, cost_nanos, saved_nanos, bought_tokens }
    }

    /// A replica that lives as long as the test, on the stand's own connections.
    pub(crate) async fn lasting(&self, base_url: String, noted: &Noted, config: EngineConfig) -> Engine {
        let llm = llm_with(base_url, noted.before(&self.tier));
        let (store, clock) = (Arc::clone(&self.store), Arc::new(SystemClock));
        Engine::start(config, store, llm, Metrics::new(), clock).await.expect("an engine")
    }

    /// A replica with a runtime, connections and a local cache of its own, as a process has. A start that fails is
    /// repeated, as whoever starts processes does; None where it died at it.
    pub(crate) async fn doomed(
        &self,
        base_url: String,
        noted: &Noted,
        config: EngineConfig,
        injections: Vec<(Injection, watch::Sender<bool>)>,
    ) -> Doomed {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let handle = runtime.handle().clone();
        let (place, noted) = (self.place.clone(), noted.clone());
        let opened = handle.spawn(async move {
            let (store, tier) = place.open().await;
            (Faulty::with(store, injections), llm_with(base_url, noted.before(&tier)))
        });
        let (faulty, llm) = opened.await.expect("opens");
        let front = Arc::clone(&faulty);
        let starting = handle.spawn(async move {
            loop {
                let (store, llm) = (Arc::clone(&front) as Arc<dyn Store>, Arc::clone(&llm));
                match Engine::start(config.clone(), store, llm, Metrics::new(), Arc::new(SystemClock)).await {
                    Ok(engine) => return engine,
                    Err(error) => assert!(error.code == stagegate_core::Code::Unavailable, "{error}"),
                }
            }
        });
        let engine = tokio::select! {
            engine = starting => Some(engine.expect("started")),
            () = faulty.died() => None,
        };
        Doomed { engine, faulty, handle, runtime: Some(runtime) }
    }
}

/// See [`Stand::doomed`].
#[derive(Debug)]
pub(crate) struct Doomed {
    pub(crate) engine: Option<Engine>,
    pub(crate) faulty: Arc<Faulty>,
    pub(crate) handle: Handle,
    runtime: Option<Runtime>,
}

impl Doomed {
    /// No drain, no farewell: its tasks are dropped where they stand, and its connections break.
    pub(crate) async fn kill(&mut self) {
        self.faulty.kill();
        self.engine = None;
        if let Some(runtime) = self.runtime.take() {
            let dropped = tokio::task::spawn_blocking(move || runtime.shutdown_timeout(Duration::from_secs(5)));
            dropped.await.expect("dropped");
        }
    }

    /// Runs it as a task of the replica; None where the replica died before it was done.
    pub(crate) async fn run<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> Option<T> {
        tokio::select! {
            done = self.handle.spawn(work) => done.ok(),
            () = self.faulty.died() => None,
        }
    }
}

impl Drop for Doomed {
    fn drop(&mut self) {
        self.faulty.kill();
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// What reached the shared tier, and when it was surely there.
#[derive(Debug, Clone, Default)]
pub(crate) struct Noted {
    entries: Arc<Mutex<Vec<(String, Instant)>>>,
    forgets: bool,
}

impl Noted {
    /// Before a tier that says that it has stored what it has not.
    pub(crate) fn forgetful() -> Self {
        Self { forgets: true, ..Self::default() }
    }

    fn before(&self, tier: &Arc<dyn CacheTier>) -> Arc<dyn CacheTier> {
        Arc::new(Noting { inner: Arc::clone(tier), noted: self.clone() })
    }

    /// When an entry that holds this text was first there.
    pub(crate) fn held(&self, text: &str) -> Option<Instant> {
        let noted = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        noted.iter().find(|(entry, _)| entry.contains(text)).map(|(_, at)| *at)
    }
}

#[derive(Debug)]
struct Noting {
    inner: Arc<dyn CacheTier>,
    noted: Noted,
}

#[async_trait]
impl CacheTier for Noting {
    async fn get(&self, tenant: &TenantId, key: CacheKey, scopes: &[CacheScope]) -> Result<CacheLookup, CacheError> {
        self.inner.get(tenant, key, scopes).await
    }

    async fn put(
        &self,
        tenant: &TenantId,
        key: CacheKey,
        entry: &[u8],
        generation: u64,
        ttl: Duration,
    ) -> Result<(), CacheError> {
        if self.noted.forgets {
            return Ok(());
        }
        self.inner.put(tenant, key, entry, generation, ttl).await?;
        let entry = String::from_utf8_lossy(entry).into_owned();
        self.noted.entries.lock().unwrap_or_else(PoisonError::into_inner).push((entry, Instant::now()));
        Ok(())
    }

    async fn evict(&self, tenant: &TenantId, key: CacheKey) -> Result<(), CacheError> {
        self.inner.evict(tenant, key).await
    }

    async fn invalidate(&self, tenant: &TenantId, scope: &CacheScope) -> Result<u64, CacheError> {
        self.inner.invalidate(tenant, scope).await
    }

    async fn ping(&self) -> Result<(), CacheError> {
        self.inner.ping().await
    }

    fn kind(&self) -> &'static str {
        self.inner.kind()
    }
}
