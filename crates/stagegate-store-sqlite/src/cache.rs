//! The response cache's shared tier in the same file, so that a laptop's next invocation still hits. Owns entries,
//! generations and floors; knows nothing of runs.
//!
//! Reads use the readers. Puts that come while another is being written are gathered into one transaction, on a
//! connection that does not wait for the disk, so that the runs' commits wait for one short write at most.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use sqlx::SqliteConnection;
use stagegate_core::{
    StoreError, StoreResult, TenantId,
    cache::{CacheError, CacheKey, CacheLookup, CacheScope, CacheTier, CacheUsage},
};
use tokio::sync::oneshot;

use crate::{
    bulk::{Bulk, Row},
    db::{Db, Lane},
    error::Sql,
    rows::{int, json, now_ms},
};

/// What all entries may take together. Past it the oldest go.
pub const CACHE_MAX_BYTES: u64 = 256 * 1024 * 1024;
/// An entry larger than this is not kept: one answer must not push everything else out.
pub const CACHE_ENTRY_MAX_BYTES: u64 = 16 * 1024 * 1024;
/// Expired entries that one write removes at most.
const PURGE_EXPIRED: i64 = 64;
/// Oldest entries that are removed at once while there are too many bytes.
const EVICT_OLDEST: i64 = 8;
/// Entries in one transaction.
const BATCH: usize = 64;

// cache-get: the generation, the highest floor of the reader's scopes, and the entry if it counts.
pub(crate) const GET: &str = concat!(
    "WITH lowest AS MATERIALIZED (SELECT max(floor) AS floor FROM cache_floors WHERE tenant = ?1 \
     AND scope IN (SELECT value FROM json_each(?3))) \
     SELECT g.generation, lowest.floor, e.entry, e.generation FROM cache_generations g CROSS JOIN lowest \
     LEFT JOIN cache_entries e ON e.tenant = ?1 AND e.key = ?2 AND e.generation >= coalesce(lowest.floor, 0) \
     AND e.expires_at > ",
    now_ms!(),
    " WHERE g.tenant = ?1"
);

// cache-start: a missing generation starts at the clock, in microseconds.
const START: &str = concat!(
    "INSERT INTO cache_generations (tenant, generation) VALUES (?1, ",
    now_ms!(),
    " * 1000) ON CONFLICT (tenant) DO NOTHING RETURNING generation"
);

// cache-advance
const ADVANCE: &str = "UPDATE cache_generations SET generation = generation + 1 WHERE tenant = ?1 RETURNING generation";

// cache-floor
const FLOOR: &str = "INSERT INTO cache_floors (tenant, scope, floor) VALUES (?1, ?2, ?3) \
    ON CONFLICT (tenant, scope) DO UPDATE SET floor = excluded.floor";

// cache-replace: an entry of a later generation stays.
pub(crate) static REPLACE: Bulk = Bulk::new(
    "WITH new (tenant, key, generation) AS (VALUES",
    3,
    ") DELETE FROM cache_entries WHERE age IN (SELECT old.age FROM new CROSS JOIN cache_entries AS old \
     ON old.tenant = new.tenant AND old.key = new.key AND old.generation <= new.generation)",
);

// cache-put
pub(crate) static PUT: Bulk = Bulk::new(
    "WITH new (tenant, key, generation, ttl, bytes, entry) AS (VALUES",
    6,
    concat!(
        ") INSERT INTO cache_entries (tenant, key, generation, expires_at, bytes, entry) \
         SELECT tenant, key, generation, ",
        now_ms!(),
        " + ttl, bytes, entry FROM new WHERE true ON CONFLICT (tenant, key) DO NOTHING"
    ),
);

// cache-purge
pub(crate) const PURGE: &str = concat!(
    "DELETE FROM cache_entries WHERE age IN (SELECT age FROM cache_entries WHERE expires_at <= ",
    now_ms!(),
    " ORDER BY expires_at LIMIT ?1)"
);

// cache-size
const SIZE: &str = "SELECT bytes FROM cache_size WHERE one = 1";

// cache-evict-oldest
pub(crate) const OLDEST: &str =
    "DELETE FROM cache_entries WHERE age IN (SELECT age FROM cache_entries ORDER BY age LIMIT ?1)";

// cache-evict
pub(crate) const EVICT: &str = "DELETE FROM cache_entries WHERE tenant = ?1 AND key = ?2";

// cache-usage: what is alive and not stale as a whole. The bytes stand before the entries, so that these are not read.
pub(crate) const USAGE: &str = concat!(
    "SELECT count(*), coalesce(sum(bytes), 0) FROM cache_entries WHERE tenant = ?1 AND expires_at > ",
    now_ms!(),
    " AND generation >= coalesce((SELECT floor FROM cache_floors WHERE tenant = ?1 AND scope = ?2), 0)"
);

/// An entry on its way to the file.
#[derive(Debug)]
struct Put {
    tenant: TenantId,
    key: CacheKey,
    entry: Vec<u8>,
    generation: u64,
    ttl: Duration,
    done: oneshot::Sender<Result<(), CacheError>>,
}

/// Generation, floor, entry, the entry's generation.
type Found = (i64, Option<i64>, Option<Vec<u8>>, Option<i64>);

/// What is on its way.
#[derive(Debug, Default)]
struct Waiting {
    puts: Vec<Put>,
    /// Somebody is writing, and goes on until nothing waits.
    flushing: bool,
}

/// The tier: a table of the store's file.
#[derive(Debug, Clone)]
pub(crate) struct SqliteCache {
    db: Arc<Db>,
    waiting: Arc<Mutex<Waiting>>,
    max_bytes: u64,
}

/// The one that writes. Should it be cut off, the next put finds the way free and takes along what waits.
struct Flushing {
    cache: SqliteCache,
    ended: bool,
}

impl Drop for Flushing {
    fn drop(&mut self) {
        if !self.ended {
            self.cache.lock().flushing = false;
        }
    }
}

fn unavailable(error: &StoreError) -> CacheError {
    CacheError(error.to_string())
}

impl SqliteCache {
    pub(crate) fn new(db: Arc<Db>, max_bytes: u64) -> Self {
        Self { db, waiting: Arc::default(), max_bytes }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // A panic elsewhere leaves the list whole: it is only pushed to and drained.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what waits until nothing does. There is one of it, so that a hundred answers of one moment take turns
    /// with the runs once, and not a hundred times.
    async fn flush(self) {
        let mut flushing = Flushing { cache: self, ended: false };
        while !flushing.ended {
            let written = flushing.cache.flush_some().await;
            let left = {
                let mut waiting = flushing.cache.lock();
                let left = if written.is_err() { std::mem::take(&mut waiting.puts) } else { Vec::new() };
                // In the same moment in which nothing waits: whoever comes after it starts another one.
                waiting.flushing = !waiting.puts.is_empty();
                flushing.ended = !waiting.flushing;
                left
            };
            if let Err(error) = written {
                answer(left, &Err(unavailable(&error)));
            }
        }
    }

    /// Writes a batch. Fails where no turn came.
    async fn flush_some(&self) -> StoreResult<()> {
        let mut tx = self.db.write(Lane::Cache).await?;
        // Taken only now, so that what came while this task waited for its turn goes along.
        let batch = {
            let mut waiting = self.lock();
            let count = waiting.puts.len().min(BATCH);
            waiting.puts.drain(..count).collect::<Vec<_>>()
        };
        let written = match self.write(tx.conn(), &batch).await {
            Ok(()) => tx.commit().await,
            Err(error) => Err(error),
        };
        answer(batch, &written.map_err(|error| unavailable(&error)));
        Ok(())
    }

    async fn write(&self, conn: &mut SqliteConnection, batch: &[Put]) -> StoreResult<()> {
        let batch = newest(batch);
        REPLACE
            .execute(&mut *conn, &batch, |row, put| {
                row.add(put.tenant.as_str()).add(put.key.0.as_slice()).add(int(put.generation));
            })
            .await?;
        let bind = |row: &mut Row, put: &&Put| {
            // Not past its time: a part of a millisecond is cut off.
            let ttl = int(put.ttl.as_millis().try_into().unwrap_or(u64::MAX)).min(i64::MAX / 4);
            row.add(put.tenant.as_str()).add(put.key.0.as_slice()).add(int(put.generation)).add(ttl);
            row.add(int(put.entry.len() as u64)).add(put.entry.as_slice());
        };
        PUT.execute(&mut *conn, &batch, bind).await?;
        sqlx::query(PURGE).bind(PURGE_EXPIRED).execute(&mut *conn).await.sql()?;
        self.shrink(conn).await
    }

    /// Removes the oldest while there are too many bytes; that is about as much as the batch brought.
    async fn shrink(&self, conn: &mut SqliteConnection) -> StoreResult<()> {
        loop {
            let bytes: i64 = sqlx::query_scalar(SIZE).fetch_one(&mut *conn).await.sql()?;
            if bytes <= int(self.max_bytes) {
                return Ok(());
            }
            let gone = sqlx::query(OLDEST).bind(EVICT_OLDEST).execute(&mut *conn).await.sql()?;
            if gone.rows_affected() == 0 {
                return Ok(());
            }
        }
    }

    async fn look(&self, tenant: &TenantId, key: CacheKey, scopes: &[CacheScope]) -> StoreResult<Option<CacheLookup>> {
        // The tenant's own floor always counts: it is where a fresh tier begins.
        let mut names: Vec<String> = scopes.iter().map(ToString::to_string).collect();
        names.push(CacheScope::Tenant.to_string());
        let row: Option<Found> = sqlx::query_as(GET)
            .bind(tenant.as_str())
            .bind(key.0.as_slice())
            .bind(json(&names)?)
            .fetch_optional(self.db.read().await?.conn())
            .await
            .sql()?;
        let unsigned = |stored: i64| u64::try_from(stored).unwrap_or(0);
        Ok(row.map(|(generation, floor, entry, stored)| CacheLookup {
            generation: unsigned(generation),
            floor: floor.map_or(0, unsigned),
            entry: entry.zip(stored.map(unsigned)),
        }))
    }

    /// Starts a tenant's generation, unless somebody has. Returns it if this call did.
    async fn start(conn: &mut SqliteConnection, tenant: &TenantId) -> StoreResult<Option<i64>> {
        let started: Option<i64> =
            sqlx::query_scalar(START).bind(tenant.as_str()).fetch_optional(&mut *conn).await.sql()?;
        if let Some(generation) = started {
            floor(conn, tenant, &CacheScope::Tenant, generation).await?;
        }
        Ok(started)
    }

    async fn lookup(&self, tenant: &TenantId, key: CacheKey, scopes: &[CacheScope]) -> StoreResult<CacheLookup> {
        if let Some(found) = self.look(tenant, key, scopes).await? {
            return Ok(found);
        }
        let mut tx = self.db.write(Lane::Cache).await?;
        Self::start(tx.conn(), tenant).await?;
        tx.commit().await?;
        let found = self.look(tenant, key, scopes).await?;
        found.ok_or_else(|| StoreError::Unavailable("the cache was emptied just now".to_owned()))
    }

    async fn advance(&self, tenant: &TenantId, scope: &CacheScope) -> StoreResult<u64> {
        let mut tx = self.db.write(Lane::Cache).await?;
        Self::start(tx.conn(), tenant).await?;
        let generation: i64 = sqlx::query_scalar(ADVANCE).bind(tenant.as_str()).fetch_one(tx.conn()).await.sql()?;
        floor(tx.conn(), tenant, scope, generation).await?;
        tx.commit().await?;
        Ok(u64::try_from(generation).unwrap_or(0))
    }

    async fn count(&self, tenant: &TenantId) -> StoreResult<CacheUsage> {
        let query = sqlx::query_as(USAGE).bind(tenant.as_str()).bind(CacheScope::Tenant.to_string());
        let (entries, bytes): (i64, i64) = query.fetch_one(self.db.read().await?.conn()).await.sql()?;
        let unsigned = |stored: i64| u64::try_from(stored).unwrap_or(0);
        Ok(CacheUsage { entries: unsigned(entries), bytes: unsigned(bytes) })
    }

    async fn remove(&self, tenant: &TenantId, key: CacheKey) -> StoreResult<()> {
        let mut tx = self.db.write(Lane::Cache).await?;
        sqlx::query(EVICT).bind(tenant.as_str()).bind(key.0.as_slice()).execute(tx.conn()).await.sql()?;
        tx.commit().await
    }
}

async fn floor(conn: &mut SqliteConnection, tenant: &TenantId, scope: &CacheScope, floor: i64) -> StoreResult<()> {
    let query = sqlx::query(FLOOR).bind(tenant.as_str()).bind(scope.to_string()).bind(floor);
    query.execute(conn).await.sql().map(drop)
}

/// Of entries with one key the last one of the latest generation: the one that would be left of them.
fn newest(batch: &[Put]) -> Vec<&Put> {
    let mut places: HashMap<(&TenantId, &[u8]), usize> = HashMap::with_capacity(batch.len());
    let mut kept: Vec<&Put> = Vec::with_capacity(batch.len());
    for put in batch {
        match places.entry((&put.tenant, put.key.0.as_slice())) {
            Entry::Vacant(place) => {
                place.insert(kept.len());
                kept.push(put);
            }
            Entry::Occupied(place) if kept[*place.get()].generation <= put.generation => kept[*place.get()] = put,
            Entry::Occupied(_) => {}
        }
    }
    kept
}

fn answer(batch: Vec<Put>, with: &Result<(), CacheError>) {
    for put in batch {
        // Whoever no longer waits need not know.
        let _ = put.done.send(with.clone());
    }
}

#[async_trait]
impl CacheTier for SqliteCache {
    async fn get(&self, tenant: &TenantId, key: CacheKey, scopes: &[CacheScope]) -> Result<CacheLookup, CacheError> {
        self.lookup(tenant, key, scopes).await.map_err(|error| unavailable(&error))
    }

    async fn put(
        &self,
        tenant: &TenantId,
        key: CacheKey,
        entry: &[u8],
        generation: u64,
        ttl: Duration,
    ) -> Result<(), CacheError> {
        if entry.len() as u64 > CACHE_ENTRY_MAX_BYTES.min(self.max_bytes) {
            return self.evict(tenant, key).await;
        }
        let (done, written) = oneshot::channel();
        let put = Put { tenant: tenant.clone(), key, entry: entry.to_vec(), generation, ttl, done };
        let first = {
            let mut waiting = self.lock();
            waiting.puts.push(put);
            !std::mem::replace(&mut waiting.flushing, true)
        };
        if first {
            // A task of its own: others' entries are in its hands, whatever becomes of this caller.
            tokio::spawn(self.clone().flush());
        }
        written.await.unwrap_or_else(|_| Err(CacheError("the writing task is gone".to_owned())))
    }

    async fn evict(&self, tenant: &TenantId, key: CacheKey) -> Result<(), CacheError> {
        self.remove(tenant, key).await.map_err(|error| unavailable(&error))
    }

    async fn invalidate(&self, tenant: &TenantId, scope: &CacheScope) -> Result<u64, CacheError> {
        self.advance(tenant, scope).await.map_err(|error| unavailable(&error))
    }

    async fn usage(&self, tenant: &TenantId) -> Result<Option<CacheUsage>, CacheError> {
        self.count(tenant).await.map(Some).map_err(|error| unavailable(&error))
    }

    async fn ping(&self) -> Result<(), CacheError> {
        crate::ping(&self.db).await.map_err(|error| unavailable(&error))
    }

    fn kind(&self) -> &'static str {
        "sqlite"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SqliteStore;

    fn put(key: u8, generation: u64, entry: &str) -> Put {
        let (tenant, entry, ttl) = (TenantId::default(), entry.into(), Duration::from_mins(1));
        Put { tenant, key: CacheKey([key; 32]), entry, generation, ttl, done: oneshot::channel().0 }
    }

    #[test]
    fn of_one_key_the_last_of_the_latest_generation_stays() {
        let batch = [put(1, 5, "a"), put(2, 1, "b"), put(1, 4, "late"), put(1, 5, "c"), put(2, 2, "d")];
        let kept: Vec<_> = newest(&batch).into_iter().map(|put| (put.key.0[0], put.entry.as_slice())).collect();
        assert_eq!(kept, [(1, b"c".as_slice()), (2, b"d".as_slice())]);
    }

    /// A hundred answers of one moment wait for the runs' turn once.
    #[tokio::test]
    async fn puts_of_one_moment_take_one_turn() {
        let store = SqliteStore::in_memory().await.expect("a store");
        let cache = store.cache_tier();
        let tenant = TenantId::default();
        let waits = || store.db.metrics.pool_wait.get_sample_count();
        let before = waits();
        let turn = store.db.write(Lane::Runs).await.expect("a turn");
        let key = |n: u8| CacheKey([n; 32]);
        let ttl = Duration::from_mins(1);
        let puts = futures::future::join_all((0..60).map(|n| cache.put(&tenant, key(n), b"entry", 1, ttl)));
        let mut puts = std::pin::pin!(puts);
        assert!(futures::poll!(puts.as_mut()).is_pending());
        tokio::task::yield_now().await;
        turn.commit().await.expect("committed");
        assert!(puts.await.iter().all(Result::is_ok));
        assert_eq!(waits() - before, 2, "the runs' turn and the cache's");
        for n in 0..60 {
            let found = cache.get(&tenant, key(n), &[]).await.expect("a lookup");
            assert!(found.entry.is_some() || found.floor > 1, "{found:?}");
        }
        // The way is free again.
        cache.put(&tenant, key(99), b"entry", 1, ttl).await.expect("put");
    }
}
