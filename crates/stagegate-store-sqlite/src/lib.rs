//! The SQLite store and cache tier: owns every statement that runs on the embedded database. Implements
//! [`stagegate_core::Store`] and [`stagegate_core::cache::CacheTier`]; knows nothing of Postgres.
//!
//! One file, write-ahead log, synchronous=FULL: what is acknowledged survives the machine. Writers of a process take
//! turns (`db`), batches are one transaction of few prepared statements (`bulk`), and other processes on the same
//! file (`stagegate run` beside `stagegate serve`) are kept right by SQLite's lock and by the leases' epochs.

mod bulk;
mod cache;
mod claim;
mod commit;
mod db;
mod error;
mod gauges;
mod keys;
mod lease;
mod load;
mod pipelines;
#[cfg(test)]
mod plans;
mod read;
mod records;
mod retention;
mod rows;
mod schema;
mod signal;
mod submit;
mod write;

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use sqlx::{ConnectOptions, sqlite::SqliteConnectOptions};
use stagegate_core::{
    Event, KeyId, PipelineName, ReplicaId, RunId, StageId, Store, StoreResult, TenantId,
    cache::CacheTier,
    fair::Shares,
    store::{
        ApiKey, Backlog, Commit, Committed, DiskWatch, Heartbeat, Idempotency, Kept, Lease, NewApiKey, NewRun,
        NewSignal, NewVersion, PipelineVersion, Pulse, PutBack, QueueStats, Registered, ReplicaRecord, RunDetail,
        RunQuery, RunRecord, Signal, Signalled, Snapshot, StageDetail, Submitted, Weighed,
    },
};
use stagegate_telemetry::Metrics;

pub use cache::{CACHE_ENTRY_MAX_BYTES, CACHE_MAX_BYTES};
use db::Db;
use error::Sql;

/// The store on one SQLite file. Cheap to clone; clones share the connections.
#[derive(Debug, Clone)]
pub struct SqliteStore {
    db: Arc<Db>,
    disk: Arc<DiskWatch>,
    migrated: Arc<[(i64, String)]>,
}

impl SqliteStore {
    /// Connections that read.
    pub const READERS: usize = db::READERS as usize;

    /// Opens the file, makes it where it is missing, and migrates it.
    pub async fn open(path: &Path, metrics: Metrics) -> StoreResult<Self> {
        Self::open_with(schema::file_options(path)?, path, metrics).await
    }

    /// The same, with a limit on the size of the file: past it writes fail as on a full disk.
    pub async fn open_bounded(path: &Path, max_bytes: u64, metrics: Metrics) -> StoreResult<Self> {
        let pages = max_bytes / schema::PAGE_BYTES;
        let options = schema::file_options(path)?.pragma("max_page_count", pages.to_string());
        Self::open_with(options, path, metrics).await
    }

    async fn open_with(options: SqliteConnectOptions, path: &Path, metrics: Metrics) -> StoreResult<Self> {
        schema::create_file(path)?;
        let (writer, migrated) = schema::open(&options, path).await?;
        let db = Arc::new(Db::new(options, writer, None, metrics));
        Ok(Self { db, disk: Arc::default(), migrated: migrated.into() })
    }

    /// A store that lives in memory, for tests: gone with its last clone.
    pub async fn in_memory() -> StoreResult<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = format!("stagegate-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let options = schema::memory_options(&name);
        let anchor = options.connect().await.sql()?;
        let (writer, migrated) = schema::open(&options, Path::new(&name)).await?;
        let db = Arc::new(Db::new(options, writer, Some(anchor), Metrics::new()));
        Ok(Self { db, disk: Arc::default(), migrated: migrated.into() })
    }

    /// The migrations that opening it applied: number and name.
    pub fn migrated(&self) -> &[(i64, String)] {
        &self.migrated
    }

    /// The response cache's shared tier, in the same file.
    pub fn cache_tier(&self) -> Arc<dyn CacheTier> {
        self.cache_tier_sized(CACHE_MAX_BYTES)
    }

    /// The same, with another limit on what all entries take together.
    pub fn cache_tier_sized(&self, max_bytes: u64) -> Arc<dyn CacheTier> {
        Arc::new(cache::SqliteCache::new(self.db.clone(), max_bytes))
    }

    /// Whether the schema is the one that this binary was built with: another process may have migrated since.
    pub async fn check_schema(&self) -> StoreResult<()> {
        schema::check(self.db.read().await?.conn()).await
    }
}

async fn ping(db: &Db) -> StoreResult<()> {
    // ping: reads the file, not just the connection.
    let _: i64 =
        sqlx::query_scalar("SELECT count(*) FROM cache_size").fetch_one(db.read().await?.conn()).await.sql()?;
    Ok(())
}

/// Writes some pages where no tenant can be, and removes them.
async fn try_to_write(db: &Db) -> StoreResult<()> {
    // ping-write, ping-unwrite
    let statements = [
        "INSERT INTO cache_floors (tenant, scope, floor) VALUES ('', hex(randomblob(100000)), 0)",
        "DELETE FROM cache_floors WHERE tenant = ''",
    ];
    for sql in statements {
        let mut tx = db.write(db::Lane::Runs).await?;
        sqlx::query(sql).execute(tx.conn()).await.sql()?;
        tx.commit().await?;
    }
    Ok(())
}

#[async_trait]
impl Store for SqliteStore {
    async fn register(&self, new: &NewVersion) -> StoreResult<Registered> {
        pipelines::register(&self.db, new).await
    }

    async fn pipeline(
        &self,
        tenant: &TenantId,
        name: &PipelineName,
        version: Option<u32>,
    ) -> StoreResult<Option<PipelineVersion>> {
        pipelines::pipeline(&self.db, tenant, name, version).await
    }

    async fn pipelines(
        &self,
        tenant: &TenantId,
        after: Option<&PipelineName>,
        limit: u32,
    ) -> StoreResult<Vec<PipelineVersion>> {
        pipelines::pipelines(&self.db, tenant, after, limit).await
    }

    async fn versions(
        &self,
        tenant: &TenantId,
        name: &PipelineName,
        before: Option<u32>,
        limit: u32,
    ) -> StoreResult<Vec<PipelineVersion>> {
        pipelines::versions(&self.db, tenant, name, before, limit).await
    }

    async fn submit(&self, runs: &[NewRun]) -> StoreResult<Vec<Submitted>> {
        self.disk.note(submit::submit(&self.db, runs).await)
    }

    async fn replay(
        &self,
        tenant: &TenantId,
        asked: &Idempotency,
        now: DateTime<Utc>,
    ) -> StoreResult<Option<Submitted>> {
        submit::replay(&self.db, tenant, asked, now).await
    }

    async fn run(&self, tenant: &TenantId, id: RunId) -> StoreResult<Option<RunDetail>> {
        read::run(&self.db, tenant, id).await
    }

    async fn run_record(&self, tenant: &TenantId, id: RunId) -> StoreResult<Option<RunRecord>> {
        read::record(&self.db, tenant, id).await
    }

    async fn runs(&self, query: &RunQuery) -> StoreResult<Vec<RunRecord>> {
        read::runs(&self.db, query).await
    }

    async fn stage(&self, tenant: &TenantId, run: RunId, stage: &StageId) -> StoreResult<Option<StageDetail>> {
        read::stage(&self.db, tenant, run, stage).await
    }

    async fn events(&self, tenant: &TenantId, run: RunId, after: u64, limit: u32) -> StoreResult<Vec<Event>> {
        read::events(&self.db, tenant, run, after, limit).await
    }

    async fn signal(&self, signal: &NewSignal) -> StoreResult<Signalled> {
        signal::signal(&self.db, signal).await
    }

    async fn heartbeat(&self, beat: &Heartbeat) -> StoreResult<Pulse> {
        lease::heartbeat(&self.db, beat).await
    }

    async fn claim(&self, replica: ReplicaId, limit: u32, shares: &Shares) -> StoreResult<Vec<Lease>> {
        claim::claim(&self.db, replica, limit, shares).await
    }

    async fn owned(&self, replica: ReplicaId) -> StoreResult<Vec<Lease>> {
        lease::owned(&self.db, replica).await
    }

    async fn weigh(&self, leases: &[Lease]) -> StoreResult<Vec<Weighed>> {
        load::weigh(&self.db, leases).await
    }

    async fn load(&self, leases: &[Lease]) -> StoreResult<Vec<Snapshot>> {
        load::load(&self.db, leases).await
    }

    async fn signals(&self, leases: &[Lease]) -> StoreResult<Vec<(RunId, Vec<Signal>)>> {
        signal::signals(&self.db, leases).await
    }

    async fn commit(&self, commits: &[Commit]) -> StoreResult<Vec<Committed>> {
        self.disk.note(commit::commit(&self.db, commits).await)
    }

    async fn release(&self, leases: &[Lease]) -> StoreResult<()> {
        lease::release(&self.db, leases).await
    }

    async fn put_back(&self, back: &[PutBack]) -> StoreResult<()> {
        lease::put_back(&self.db, back).await
    }

    async fn leave(&self, replica: ReplicaId) -> StoreResult<()> {
        lease::leave(&self.db, replica).await
    }

    async fn queue(&self) -> StoreResult<QueueStats> {
        gauges::queue(&self.db).await
    }

    async fn news(&self, seen: &[(RunId, u64)], limit: u32) -> StoreResult<Vec<(RunId, Vec<Event>)>> {
        read::news(&self.db, seen, limit).await
    }

    async fn backlog(&self, tenant: Option<&TenantId>) -> StoreResult<Vec<Backlog>> {
        gauges::backlog(&self.db, tenant).await
    }

    async fn depths(&self) -> StoreResult<Vec<(TenantId, u64)>> {
        gauges::depths(&self.db).await
    }

    async fn replicas(&self, tenant: Option<&TenantId>) -> StoreResult<Vec<ReplicaRecord>> {
        gauges::replicas(&self.db, tenant).await
    }

    async fn kept(&self, after: Option<RunId>, created_before: DateTime<Utc>, limit: u32) -> StoreResult<Vec<Kept>> {
        retention::kept(&self.db, after, created_before, limit).await
    }

    async fn purge(&self, runs: &[RunId], now: DateTime<Utc>) -> StoreResult<u64> {
        retention::purge(&self.db, runs, now).await
    }

    async fn delete(&self, runs: &[RunId]) -> StoreResult<Vec<RunId>> {
        retention::delete(&self.db, runs).await
    }

    async fn create_key(&self, key: &NewApiKey) -> StoreResult<()> {
        keys::create(&self.db, key).await
    }

    async fn key_by_hash(&self, hash: &[u8; 32]) -> StoreResult<Option<ApiKey>> {
        keys::by_hash(&self.db, hash).await
    }

    async fn keys(&self, tenant: Option<&TenantId>) -> StoreResult<Vec<ApiKey>> {
        keys::list(&self.db, tenant).await
    }

    async fn revoke_key(&self, id: KeyId, now: DateTime<Utc>) -> StoreResult<bool> {
        keys::revoke(&self.db, id, now).await
    }

    async fn ping(&self) -> StoreResult<()> {
        ping(&self.db).await?;
        if self.disk.is_full() { self.disk.note(try_to_write(&self.db).await) } else { Ok(()) }
    }

    fn kind(&self) -> &'static str {
        "sqlite"
    }

    async fn close(&self) {
        self.db.close().await;
    }
}
