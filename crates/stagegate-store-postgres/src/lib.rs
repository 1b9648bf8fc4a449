//! The Postgres store: owns every statement that runs on it. Implements [`stagegate_core::Store`].
//!
//! One file a topic. Each statement is a constant, named in a comment that also shows in `pg_stat_activity`. What runs
//! for every run (`runs.submit`, `runs.claim`, `runs.load`, `runs.commit`) is one statement for many runs, so that it is
//! one round trip and one transaction.

mod commit;
mod compact;
pub mod config;
mod error;
mod first;
mod gauges;
mod keys;
mod lease;
mod migrate;
mod pipelines;
mod pool;
mod read;
mod retention;
mod rows;
mod shared;
mod signal;
pub mod statements;
mod submit;

use std::sync::Arc;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use stagegate_core::{
    Event, KeyId, PipelineName, ReplicaId, RunId, Secret, StageId, Store, StoreResult, TenantId,
    fair::Shares,
    store::{
        ApiKey, Backlog, Commit, Committed, DiskWatch, Heartbeat, Idempotency, Kept, Lease, NewApiKey, NewRun,
        NewSignal, NewVersion, PipelineVersion, Pulse, PutBack, QueueStats, Registered, ReplicaRecord, RunDetail,
        RunQuery, RunRecord, Signal, Signalled, Snapshot, StageDetail, Submitted, Weighed,
    },
};
use stagegate_telemetry::Metrics;

pub use config::PoolConfig;
pub use pool::PoolStats;

use pool::Pool;

/// A store on Postgres. Cheap to clone; clones share the pool.
#[derive(Debug, Clone)]
pub struct PostgresStore {
    pool: Pool,
    turn: Arc<lease::Turn>,
    compact: compact::Gate,
    disk: Arc<DiskWatch>,
}

/// Writes where payloads go, and more than the free room of a page.
const TRIAL: &str = "/* ping.write */
INSERT INTO run_payloads (run_id, tenant, input)
SELECT gen_random_uuid(), '', string_agg(md5(random()::text), '') FROM generate_series(1, 2000)";

impl PostgresStore {
    /// Connects, so that a wrong address is told at once. Does not look at the schema.
    pub async fn connect(url: &Secret, pool: &PoolConfig, metrics: Metrics) -> StoreResult<Self> {
        Ok(Self {
            pool: Pool::connect(url, pool, metrics).await?,
            turn: Arc::default(),
            compact: compact::Gate::default(),
            disk: Arc::default(),
        })
    }

    /// Applies the migrations that are missing, and says which: number and name. Safe when several replicas start at once.
    pub async fn migrate(&self) -> StoreResult<Vec<(i64, String)>> {
        migrate::migrate(&self.pool).await
    }

    /// Whether this binary can work on the database's schema: its own, or a newer one that says so.
    pub async fn check_schema(&self) -> StoreResult<()> {
        migrate::check(&self.pool).await
    }

    /// The newest migration that this binary has.
    pub fn schema_version() -> i64 {
        migrate::needed()
    }

    /// The pool's state now.
    pub fn pool_stats(&self) -> PoolStats {
        self.pool.stats()
    }

    /// Connections that what the API asks may have at once.
    pub fn connections_for_guests(&self) -> usize {
        self.pool.room_for_guests()
    }

    /// Brings the pool's gauges up to date; every checkout does so, too.
    pub fn observe_pool(&self) {
        self.pool.observe();
    }
}

#[async_trait]
impl Store for PostgresStore {
    async fn register(&self, new: &NewVersion) -> StoreResult<Registered> {
        pipelines::register(&self.pool, new).await
    }

    async fn pipeline(
        &self,
        tenant: &TenantId,
        name: &PipelineName,
        version: Option<u32>,
    ) -> StoreResult<Option<PipelineVersion>> {
        pipelines::get(&self.pool, tenant, name, version).await
    }

    async fn pipelines(
        &self,
        tenant: &TenantId,
        after: Option<&PipelineName>,
        limit: u32,
    ) -> StoreResult<Vec<PipelineVersion>> {
        pipelines::list(&self.pool, tenant, after, limit).await
    }

    async fn versions(
        &self,
        tenant: &TenantId,
        name: &PipelineName,
        before: Option<u32>,
        limit: u32,
    ) -> StoreResult<Vec<PipelineVersion>> {
        pipelines::versions(&self.pool, tenant, name, before, limit).await
    }

    async fn submit(&self, runs: &[NewRun]) -> StoreResult<Vec<Submitted>> {
        self.disk.note(submit::submit(&self.pool, runs, self.compact.is_open()).await)
    }

    async fn replay(
        &self,
        tenant: &TenantId,
        asked: &Idempotency,
        now: DateTime<Utc>,
    ) -> StoreResult<Option<Submitted>> {
        submit::replay(&self.pool, tenant, asked, now).await
    }

    async fn run(&self, tenant: &TenantId, id: RunId) -> StoreResult<Option<RunDetail>> {
        read::run(&self.pool, tenant, id).await
    }

    async fn run_record(&self, tenant: &TenantId, id: RunId) -> StoreResult<Option<RunRecord>> {
        read::run_record(&self.pool, tenant, id).await
    }

    async fn runs(&self, query: &RunQuery) -> StoreResult<Vec<RunRecord>> {
        read::runs(&self.pool, query).await
    }

    async fn stage(&self, tenant: &TenantId, run: RunId, stage: &StageId) -> StoreResult<Option<StageDetail>> {
        read::stage(&self.pool, tenant, run, stage).await
    }

    async fn events(&self, tenant: &TenantId, run: RunId, after: u64, limit: u32) -> StoreResult<Vec<Event>> {
        read::events(&self.pool, tenant, run, after, limit).await
    }

    async fn signal(&self, signal: &NewSignal) -> StoreResult<Signalled> {
        signal::signal(&self.pool, signal).await
    }

    async fn heartbeat(&self, beat: &Heartbeat) -> StoreResult<Pulse> {
        lease::heartbeat(&self.pool, &self.compact, beat).await
    }

    async fn claim(&self, replica: ReplicaId, limit: u32, shares: &Shares) -> StoreResult<Vec<Lease>> {
        lease::claim(&self.pool, &self.turn, replica, limit, shares).await
    }

    async fn owned(&self, replica: ReplicaId) -> StoreResult<Vec<Lease>> {
        lease::owned(&self.pool, replica).await
    }

    async fn weigh(&self, leases: &[Lease]) -> StoreResult<Vec<Weighed>> {
        lease::weigh(&self.pool, leases).await
    }

    async fn load(&self, leases: &[Lease]) -> StoreResult<Vec<Snapshot>> {
        lease::load(&self.pool, leases).await
    }

    async fn signals(&self, leases: &[Lease]) -> StoreResult<Vec<(RunId, Vec<Signal>)>> {
        signal::signals(&self.pool, leases).await
    }

    async fn commit(&self, commits: &[Commit]) -> StoreResult<Vec<Committed>> {
        self.disk.note(commit::commit(&self.pool, commits, self.compact.is_open()).await)
    }

    async fn release(&self, leases: &[Lease]) -> StoreResult<()> {
        lease::release(&self.pool, leases).await
    }

    async fn put_back(&self, back: &[PutBack]) -> StoreResult<()> {
        lease::put_back(&self.pool, back).await
    }

    async fn leave(&self, replica: ReplicaId) -> StoreResult<()> {
        lease::leave(&self.pool, replica).await
    }

    async fn queue(&self) -> StoreResult<QueueStats> {
        gauges::queue(&self.pool).await
    }

    async fn news(&self, seen: &[(RunId, u64)], limit: u32) -> StoreResult<Vec<(RunId, Vec<Event>)>> {
        read::news(&self.pool, seen, limit).await
    }

    async fn backlog(&self, tenant: Option<&TenantId>) -> StoreResult<Vec<Backlog>> {
        gauges::backlog(&self.pool, tenant).await
    }

    async fn depths(&self) -> StoreResult<Vec<(TenantId, u64)>> {
        gauges::depths(&self.pool).await
    }

    async fn replicas(&self, tenant: Option<&TenantId>) -> StoreResult<Vec<ReplicaRecord>> {
        gauges::replicas(&self.pool, tenant).await
    }

    async fn kept(&self, after: Option<RunId>, created_before: DateTime<Utc>, limit: u32) -> StoreResult<Vec<Kept>> {
        retention::kept(&self.pool, after, created_before, limit).await
    }

    async fn purge(&self, runs: &[RunId], now: DateTime<Utc>) -> StoreResult<u64> {
        retention::purge(&self.pool, runs, now).await
    }

    async fn delete(&self, runs: &[RunId]) -> StoreResult<Vec<RunId>> {
        retention::delete(&self.pool, runs).await
    }

    async fn create_key(&self, key: &NewApiKey) -> StoreResult<()> {
        keys::create(&self.pool, key).await
    }

    async fn key_by_hash(&self, hash: &[u8; 32]) -> StoreResult<Option<ApiKey>> {
        keys::by_hash(&self.pool, hash).await
    }

    async fn keys(&self, tenant: Option<&TenantId>) -> StoreResult<Vec<ApiKey>> {
        keys::list(&self.pool, tenant).await
    }

    async fn revoke_key(&self, id: KeyId, now: DateTime<Utc>) -> StoreResult<bool> {
        keys::revoke(&self.pool, id, now).await
    }

    async fn ping(&self) -> StoreResult<()> {
        let mut connection = self.pool.acquire_for_pulse("ping").await?;
        connection.rows("ping", sqlx::query("/* ping */ SELECT 1")).await?;
        if self.disk.is_full() {
            // Ends with its connection, and leaves nothing.
            connection.begin().await?;
            self.disk.note(connection.rows("ping.write", sqlx::query(TRIAL)).await)?;
        }
        Ok(())
    }

    fn kind(&self) -> &'static str {
        "postgres"
    }

    async fn close(&self) {
        self.pool.close().await;
    }
}
