//! The pool: owns connections, their settings, how long anything may take, and the numbers about it. No statement
//! waits for ever: the database ends it after the statement timeout, and if the database itself is silent, we do.
//!
//! Whoever reads must not keep a replica from its own work: heartbeats have connections of their own, and guests (what
//! the API reads and writes) never have all of the others.

use std::{
    str::FromStr as _,
    sync::Arc,
    time::{Duration, Instant},
};

use sqlx::{
    Connection as _, PgConnection, Postgres,
    pool::PoolConnection,
    postgres::{PgArguments, PgConnectOptions, PgPool, PgPoolOptions, PgRow},
    query::Query,
};
use stagegate_core::{Secret, StoreError, StoreResult};
use stagegate_telemetry::Metrics;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{config::PoolConfig, error};

/// How long the network may add to the statement timeout before we give a connection up.
const SILENCE_LIMIT: Duration = Duration::from_secs(2);
/// A connection that was used within this time is handed out without a test: the test is a round trip.
const TRUST_LIMIT: Duration = Duration::from_secs(1);
/// Connections that guests leave to commits, submits and claims, where there are as many.
const RESERVED: u32 = 4;
/// Connections for heartbeats and probes alone, beside all others: one each, and one for when one of them is dead.
const PULSE: u32 = 3;

/// Settings of every session. Our statements are large and take arrays whose length the planner cannot know: to plan
/// them anew each time costs more than to run them. A plan that is kept must also suit the table that it meets later:
/// one that was made while the table was empty would read the whole of it, until statistics are taken.
pub const SESSION: &[(&str, &str)] = &[
    ("plan_cache_mode", "force_generic_plan"),
    ("enable_seqscan", "off"),
    // An index has the order of a list. Half of the order, and a sort of what one tenant has, is no substitute.
    ("enable_incremental_sort", "off"),
    ("jit", "off"),
    // What is counted after a lock is counted anew only so.
    ("default_transaction_isolation", "read committed"),
];

/// The pool's state at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolStats {
    /// Connections that a task holds.
    pub in_use: u32,
    /// Connections that are open and free.
    pub idle: u32,
    /// The limit.
    pub max: u32,
    /// Tasks that wait for a connection.
    pub waiters: u32,
}

/// Connections and their settings.
#[derive(Debug, Clone)]
pub(crate) struct Pool {
    inner: PgPool,
    pulse: PgPool,
    /// Room for guests.
    guests: Arc<Semaphore>,
    guests_max: usize,
    options: Arc<PgConnectOptions>,
    acquire_timeout: Duration,
    statement_limit: Duration,
    metrics: Metrics,
}

impl Pool {
    /// Connects once, so that a wrong address is told at once, and keeps the rest for later.
    pub(crate) async fn connect(url: &Secret, config: &PoolConfig, metrics: Metrics) -> StoreResult<Self> {
        // sqlx's message could quote a part of the URL.
        let options = PgConnectOptions::from_str(url.expose())
            .map_err(|_| StoreError::Defect("the database URL is not of the form postgres://user@host/name".into()))?
            .application_name("stagegate");
        let acquire_timeout = config.acquire_timeout.0;
        let probe = connect_once(&options, acquire_timeout).await?;
        let _ = probe.close().await;

        let statement_timeout = config.statement_timeout.0;
        // A replica that vanished inside a transaction would hold a run's row for as long as the network takes to
        // notice, and every batch of commits with that run in it would wait.
        let timeouts = ["statement_timeout", "idle_in_transaction_session_timeout"]
            .map(|setting| (setting, statement_timeout.as_millis()));
        let session = options.clone().options(timeouts).options(SESSION.iter().copied());
        let test = config.test_on_checkout;
        let pool = PgPoolOptions::new()
            .acquire_timeout(acquire_timeout)
            .idle_timeout(config.idle_timeout.0)
            .max_lifetime(config.max_lifetime.0)
            .test_before_acquire(false)
            .before_acquire(move |connection, meta| {
                Box::pin(async move {
                    if test && meta.idle_for > TRUST_LIMIT {
                        connection.ping().await?;
                    }
                    Ok(true)
                })
            });
        let pulse = pool.clone().max_connections(PULSE).connect_lazy_with(session.clone());
        let max = config.max_connections.max(1);
        let inner =
            pool.max_connections(max).min_connections(config.min_connections.min(max)).connect_lazy_with(session);
        let guests_max = max.saturating_sub(RESERVED).max(1) as usize;
        let guests = Arc::new(Semaphore::new(guests_max));
        let statement_limit = statement_timeout + SILENCE_LIMIT;
        let options = Arc::new(options);
        let pool = Self { inner, pulse, guests, guests_max, options, acquire_timeout, statement_limit, metrics };
        pool.observe();
        Ok(pool)
    }

    /// A pool of one connection without a statement timeout, for what may take long once it has its locks. To be closed
    /// by its user.
    pub(crate) fn patient(&self, lock_timeout: Duration) -> PgPool {
        let options = PgPoolOptions::new().max_connections(1).acquire_timeout(self.acquire_timeout);
        let session = self.options.as_ref().clone().options([("lock_timeout", lock_timeout.as_millis())]);
        options.connect_lazy_with(session)
    }

    /// A connection for the replica's own work, for the statement that is named in errors.
    pub(crate) async fn acquire(&self, name: &'static str) -> StoreResult<Connection> {
        self.waiting(name, async { Ok((self.inner.acquire().await?, None)) }).await
    }

    /// The same for what the API asks.
    pub(crate) async fn acquire_as_guest(&self, name: &'static str) -> StoreResult<Connection> {
        let acquiring = async {
            let room = Arc::clone(&self.guests).acquire_owned().await.map_err(|_| sqlx::Error::PoolClosed)?;
            Ok((self.inner.acquire().await?, Some(room)))
        };
        self.waiting(name, acquiring).await
    }

    /// Connections that guests may have at once.
    pub(crate) fn room_for_guests(&self) -> usize {
        self.guests_max
    }

    /// The same for heartbeats and probes.
    pub(crate) async fn acquire_for_pulse(&self, name: &'static str) -> StoreResult<Connection> {
        self.waiting(name, async { Ok((self.pulse.acquire().await?, None)) }).await
    }

    /// A row cannot be read, and the others are.
    pub(crate) fn unreadable(&self, error: &StoreError) {
        self.metrics.unreadable(error);
    }

    /// What was read of a row, where it could be.
    pub(crate) fn readable<T>(&self, read: StoreResult<T>) -> Option<T> {
        read.map_err(|error| self.unreadable(&error)).ok()
    }

    async fn waiting(
        &self,
        name: &'static str,
        acquiring: impl Future<Output = Result<(PoolConnection<Postgres>, Option<OwnedSemaphorePermit>), sqlx::Error>>,
    ) -> StoreResult<Connection> {
        let waiting = Waiting::new(&self.metrics);
        let started = Instant::now();
        let acquired = tokio::time::timeout(self.acquire_timeout, acquiring).await;
        self.metrics.pool_wait.observe(started.elapsed().as_secs_f64());
        drop(waiting);
        self.observe();
        let acquired = acquired.unwrap_or(Err(sqlx::Error::PoolTimedOut));
        let (inner, room) = acquired.map_err(|failure| error::connecting(name, &failure))?;
        Ok(Connection { inner, limit: self.statement_limit, under_way: false, in_transaction: false, _room: room })
    }

    pub(crate) fn stats(&self) -> PoolStats {
        let idle = u32::try_from(self.inner.num_idle()).unwrap_or(u32::MAX);
        PoolStats {
            in_use: self.inner.size().saturating_sub(idle),
            idle,
            max: self.inner.options().get_max_connections(),
            waiters: u32::try_from(self.metrics.pool_waiters.get()).unwrap_or(0),
        }
    }

    /// Brings the gauges up to date.
    pub(crate) fn observe(&self) {
        let stats = self.stats();
        self.metrics.pool_connections_max.set(i64::from(stats.max));
        for (state, value) in [("in_use", stats.in_use), ("idle", stats.idle)] {
            self.metrics.pool_connections.with_label_values(&[state]).set(i64::from(value));
        }
    }

    pub(crate) async fn close(&self) {
        self.inner.close().await;
        self.pulse.close().await;
        self.observe();
    }
}

async fn connect_once(options: &PgConnectOptions, limit: Duration) -> StoreResult<PgConnection> {
    let place = match options.get_socket() {
        Some(socket) => socket.display().to_string(),
        None => format!("{}:{}", options.get_host(), options.get_port()),
    };
    match tokio::time::timeout(limit, PgConnection::connect_with(options)).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(failure)) => Err(match error::statement("connect", &failure) {
            StoreError::Unavailable(message) => StoreError::Unavailable(format!("{message} (at {place})")),
            StoreError::Defect(message) => StoreError::Defect(format!("{message} (at {place})")),
            other => other,
        }),
        Err(_) => Err(StoreError::Unavailable(format!("connect: no answer within {limit:?} (at {place})"))),
    }
}

/// Counts a waiter, also when its future is dropped.
struct Waiting<'a>(&'a Metrics);

impl<'a> Waiting<'a> {
    fn new(metrics: &'a Metrics) -> Self {
        metrics.pool_waiters.inc();
        Self(metrics)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.pool_waiters.dec();
    }
}

/// A connection that runs named statements under a limit.
pub(crate) struct Connection {
    inner: PoolConnection<Postgres>,
    limit: Duration,
    /// A statement was sent and not answered.
    under_way: bool,
    in_transaction: bool,
    /// A guest's, given back with the connection.
    _room: Option<OwnedSemaphorePermit>,
}

/// A statement with its parameters.
pub(crate) type Statement<'q> = Query<'q, Postgres, PgArguments>;

impl Connection {
    /// Runs it and returns its rows.
    pub(crate) async fn rows(&mut self, name: &'static str, query: Statement<'_>) -> StoreResult<Vec<PgRow>> {
        self.under_way = true;
        let answer = tokio::time::timeout(self.limit, query.fetch_all(&mut *self.inner)).await;
        let silent = |_| StoreError::Unavailable(format!("{name}: no answer within {:?}", self.limit));
        let answer = answer.map_err(silent)?;
        self.under_way = false;
        answer.map_err(|failure| error::statement(name, &failure))
    }

    /// Runs it and returns its first row.
    pub(crate) async fn row(&mut self, name: &'static str, query: Statement<'_>) -> StoreResult<Option<PgRow>> {
        Ok(self.rows(name, query).await?.into_iter().next())
    }

    /// Begins a transaction. Unless [`Connection::commit`] follows, the connection is closed with it.
    pub(crate) async fn begin(&mut self) -> StoreResult<()> {
        self.in_transaction = true;
        self.rows("begin", sqlx::query("BEGIN")).await.map(|_| ())
    }

    /// Commits.
    pub(crate) async fn commit(&mut self) -> StoreResult<()> {
        self.rows("commit", sqlx::query("COMMIT")).await?;
        self.in_transaction = false;
        Ok(())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // It may still answer to what nobody waits for: nobody else may have it. The pool would wait for that answer.
        if self.under_way || self.in_transaction {
            self.inner.close_on_drop();
        }
    }
}
