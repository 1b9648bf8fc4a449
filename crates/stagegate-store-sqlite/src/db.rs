//! Connections: owns who may write when. Knows no table.
//!
//! All writers of this process take turns on one fair lock, so that they never meet in SQLite's own lock, whose
//! waiters sleep and poll. Two connections write: one for the runs, which waits for the disk at each commit
//! (synchronous=FULL), and one for the cache, which does not (NORMAL: an entry survives the process, and the next
//! commit of a run makes it durable with its own). Other processes on the same file are met by `BEGIN IMMEDIATE` and
//! the busy timeout.

use std::time::{Duration, Instant};

use prometheus::IntGauge;
use sqlx::{
    ConnectOptions, Connection, Sqlite, SqliteConnection, SqlitePool, Transaction,
    pool::PoolConnection,
    sqlite::{SqliteConnectOptions, SqlitePoolOptions, SqliteSynchronous},
};
use stagegate_core::{StoreError, StoreResult};
use stagegate_telemetry::Metrics;
use tokio::sync::{Mutex, MutexGuard};

use crate::error::Sql;

/// Connections that read.
pub(crate) const READERS: u32 = 4;
/// Connections that write: the runs' and the cache's.
const WRITERS: u32 = 2;
/// How long a task waits for its turn or for a reader before it fails as unavailable.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// Which writing connection.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Lane {
    /// The runs': durable when it is acknowledged.
    Runs,
    /// The cache's.
    Cache,
}

/// The writing connections; None where one is not open, or was dropped with a transaction that did not end well.
#[derive(Debug, Default)]
struct Writers {
    runs: Option<SqliteConnection>,
    cache: Option<SqliteConnection>,
    closed: bool,
}

impl Writers {
    fn slot(&mut self, lane: Lane) -> &mut Option<SqliteConnection> {
        match lane {
            Lane::Runs => &mut self.runs,
            Lane::Cache => &mut self.cache,
        }
    }
}

/// The connections of one open file.
#[derive(Debug)]
pub(crate) struct Db {
    options: SqliteConnectOptions,
    writers: Mutex<Writers>,
    readers: SqlitePool,
    pub(crate) metrics: Metrics,
    /// Keeps a database in memory alive between connections.
    _anchor: Option<SqliteConnection>,
}

/// A write transaction and the turn that it holds. Dropped without a commit, it takes its connection with it: closing
/// rolls back, whatever state an error or a cancelled caller left behind.
pub(crate) struct Write<'a> {
    lane: Lane,
    conn: SqliteConnection,
    writers: MutexGuard<'a, Writers>,
    _in_use: Up,
}

/// A gauge that is up while this lives.
struct Up(IntGauge, Option<IntGauge>);

impl Up {
    fn new(up: IntGauge, down: Option<IntGauge>) -> Self {
        up.inc();
        if let Some(down) = &down {
            down.dec();
        }
        Self(up, down)
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        self.0.dec();
        if let Some(down) = &self.1 {
            down.inc();
        }
    }
}

/// A connection to read from: each statement sees its own moment.
pub(crate) struct Read {
    conn: PoolConnection<Sqlite>,
    _in_use: Up,
}

/// A read transaction: every statement sees the same moment.
pub(crate) struct Snapshot {
    tx: Transaction<'static, Sqlite>,
    _in_use: Up,
}

impl Db {
    /// Connections by these options. `writer` is open already (it has migrated); `anchor` is kept.
    pub(crate) fn new(
        options: SqliteConnectOptions,
        writer: SqliteConnection,
        anchor: Option<SqliteConnection>,
        metrics: Metrics,
    ) -> Self {
        let readers = SqlitePoolOptions::new()
            .max_connections(READERS)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .idle_timeout(None)
            .max_lifetime(None)
            .connect_lazy_with(options.clone().pragma("query_only", "ON"));
        metrics.pool_connections_max.set(i64::from(READERS + WRITERS));
        for (state, connections) in [("idle", READERS + WRITERS), ("in_use", 0)] {
            metrics.pool_connections.with_label_values(&[state]).set(i64::from(connections));
        }
        let writers = Mutex::new(Writers { runs: Some(writer), ..Writers::default() });
        Self { options, writers, readers, metrics, _anchor: anchor }
    }

    /// Begins a write transaction when it is this task's turn.
    pub(crate) async fn write(&self, lane: Lane) -> StoreResult<Write<'_>> {
        let mut writers = {
            let _waiting = Up::new(self.metrics.pool_waiters.clone(), None);
            let since = Instant::now();
            let turn = tokio::time::timeout(ACQUIRE_TIMEOUT, self.writers.lock()).await;
            self.metrics.pool_wait.observe(since.elapsed().as_secs_f64());
            turn.map_err(|_| StoreError::Unavailable(format!("no turn to write came within {ACQUIRE_TIMEOUT:?}")))?
        };
        if writers.closed {
            return Err(StoreError::Unavailable("the store is closed".to_owned()));
        }
        let mut conn = match writers.slot(lane).take() {
            Some(conn) => conn,
            None => self.connect(lane).await?,
        };
        // begin-write: takes SQLite's write lock at once, so that no statement in it can find the data moved on.
        sqlx::query("BEGIN IMMEDIATE").execute(&mut conn).await.sql()?;
        Ok(Write { lane, conn, writers, _in_use: self.in_use() })
    }

    /// What was read of a row, where it could be; the others are.
    pub(crate) fn readable<T>(&self, read: StoreResult<T>) -> Option<T> {
        read.map_err(|error| self.metrics.unreadable(&error)).ok()
    }

    /// A connection to read from.
    pub(crate) async fn read(&self) -> StoreResult<Read> {
        let conn = self.wait(self.readers.acquire()).await?;
        Ok(Read { conn, _in_use: self.in_use() })
    }

    /// Begins a read transaction.
    pub(crate) async fn snapshot(&self) -> StoreResult<Snapshot> {
        let tx = self.wait(self.readers.begin()).await?;
        Ok(Snapshot { tx, _in_use: self.in_use() })
    }

    async fn wait<T>(&self, connection: impl Future<Output = sqlx::Result<T>>) -> StoreResult<T> {
        let _waiting = Up::new(self.metrics.pool_waiters.clone(), None);
        let since = Instant::now();
        let connection = connection.await;
        self.metrics.pool_wait.observe(since.elapsed().as_secs_f64());
        connection.sql()
    }

    fn in_use(&self) -> Up {
        let gauge = |state| self.metrics.pool_connections.with_label_values(&[state]);
        Up::new(gauge("in_use"), Some(gauge("idle")))
    }

    async fn connect(&self, lane: Lane) -> StoreResult<SqliteConnection> {
        let options = match lane {
            Lane::Runs => self.options.clone(),
            Lane::Cache => self.options.clone().synchronous(SqliteSynchronous::Normal),
        };
        options.connect().await.sql()
    }

    /// Waits until what is under way is done, and closes.
    pub(crate) async fn close(&self) {
        let mut writers = self.writers.lock().await;
        writers.closed = true;
        self.readers.close().await;
        let Writers { runs, cache, .. } = &mut *writers;
        for conn in [cache.take(), runs.take()].into_iter().flatten() {
            // The last one to close folds the write-ahead log into the file; failing to is no loss.
            let _ = conn.close().await;
        }
    }
}

impl Write<'_> {
    /// The connection, inside its transaction.
    pub(crate) fn conn(&mut self) -> &mut SqliteConnection {
        &mut self.conn
    }

    /// Ends the transaction; what it wrote is there when this returns.
    pub(crate) async fn commit(mut self) -> StoreResult<()> {
        // commit-write
        sqlx::query("COMMIT").execute(&mut self.conn).await.sql()?;
        *self.writers.slot(self.lane) = Some(self.conn);
        Ok(())
    }
}

impl Read {
    /// The connection.
    pub(crate) fn conn(&mut self) -> &mut SqliteConnection {
        &mut self.conn
    }
}

impl Snapshot {
    /// The connection, inside its transaction.
    pub(crate) fn conn(&mut self) -> &mut SqliteConnection {
        &mut self.tx
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SqliteStore;

    async fn pragmas(conn: &mut SqliteConnection) -> (i64, String, i64) {
        let synchronous = sqlx::query_scalar("PRAGMA synchronous").fetch_one(&mut *conn).await.expect("read");
        let journal = sqlx::query_scalar("PRAGMA journal_mode").fetch_one(&mut *conn).await.expect("read");
        let foreign_keys = sqlx::query_scalar("PRAGMA foreign_keys").fetch_one(conn).await.expect("read");
        (synchronous, journal, foreign_keys)
    }

    #[tokio::test]
    async fn runs_wait_for_the_disk_and_the_cache_does_not() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = SqliteStore::open(&folder.path().join("stagegate.db"), Metrics::new()).await.expect("a store");
        let (full, normal) = (2, 1);
        for (lane, synchronous) in [(Lane::Runs, full), (Lane::Cache, normal)] {
            let mut tx = store.db.write(lane).await.expect("a turn");
            assert_eq!(pragmas(tx.conn()).await, (synchronous, "wal".to_owned(), 1), "{lane:?}");
        }
        // The connection that a write left unfinished is opened anew by the same rules.
        let mut tx = store.db.write(Lane::Runs).await.expect("a turn");
        assert_eq!(pragmas(tx.conn()).await.0, full);
    }

    #[tokio::test]
    async fn connections_and_waiters_are_counted() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = SqliteStore::open(&folder.path().join("stagegate.db"), Metrics::new()).await.expect("a store");
        let in_use = || store.db.metrics.pool_connections.with_label_values(&["in_use"]).get();
        let holder = store.db.write(Lane::Runs).await.expect("a turn");
        let reading = store.db.read().await.expect("a reader");
        assert_eq!(in_use(), 2);
        {
            let mut second = std::pin::pin!(store.db.write(Lane::Runs));
            assert!(futures::poll!(second.as_mut()).is_pending(), "one turn at a time");
            assert_eq!(store.db.metrics.pool_waiters.get(), 1);
        }
        drop((holder, reading));
        assert_eq!((in_use(), store.db.metrics.pool_waiters.get()), (0, 0));
        assert!(store.db.metrics.pool_wait.get_sample_count() >= 2);
    }
}
