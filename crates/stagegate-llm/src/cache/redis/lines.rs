//! The connections to Redis: owns when one is made, shared and given up. Knows no key and no command.
//!
//! A line is one connection that everybody shares: what is asked at the same time goes out in one write and comes back
//! in one read, and nobody pays for a test of the connection first. A line that fails or does not answer in time is
//! given up by the caller that notices, and the next caller makes a new one. The pool makes them and bounds how many
//! there are and how long making one may take; a line stays checked out of it for as long as it lives.
//!
//! A connection is read and written on the runtime that made it. Probes run on a runtime of their own, and so have a line
//! of their own: over it they are answered while the other runtime is busy, and no other caller's commands cross threads.

use std::{
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use deadpool_redis::{
    Connection, Manager, Pool, Runtime,
    redis::{AsyncConnectionConfig, Cmd, RedisResult, ScriptInvocation, Value, aio::MultiplexedConnection},
};
use stagegate_core::{Code, Error, Secret, cache::CacheError, pipeline::Span};
use tokio::{sync::Mutex, time::timeout};

use super::{RedisConfig, describe, unconnected};

/// Connections, at most, whatever the configuration says.
const LINES_MAX: usize = 64;

/// A few shared connections, each made when it is first needed.
pub(super) struct Lines {
    pool: Pool,
    shared: Box<[Line]>,
    probes: Line,
    next: AtomicUsize,
    response_timeout: Duration,
}

/// What is asked.
#[derive(Clone, Copy)]
pub(super) enum Question<'a> {
    /// One command.
    Command(&'a Cmd),
    /// A script, which is sent along where the server does not have it yet.
    Script(&'a ScriptInvocation<'a>),
}

impl Question<'_> {
    async fn put_to(self, connection: &mut MultiplexedConnection) -> RedisResult<Value> {
        match self {
            Self::Command(command) => command.query_async(connection).await,
            Self::Script(script) => script.invoke_async(connection).await,
        }
    }
}

#[derive(Default)]
struct Line {
    open: RwLock<Option<Arc<Connection>>>,
    /// Held by whoever makes it, so that the others wait instead of making more.
    making: Mutex<()>,
}

impl Lines {
    /// To the server at `url`. Connects to nothing yet; fails on a URL that is none.
    pub(super) fn new(url: &Secret, config: &RedisConfig) -> Result<Self, Error> {
        let invalid = |detail: String| Error::new(Code::InvalidConfig, detail);
        // Answers are timed here, so that a line that is late is given up.
        let settings = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(config.connect_timeout.0))
            .set_response_timeout(None);
        // The error of a wrong URL could repeat it, and with it the password.
        let manager = Manager::new_with_config(url.expose(), settings).map_err(|error| {
            invalid(format!("the Redis URL is not valid ({}): write `redis://host:6379/0`", error.category()))
        })?;
        let count = config.max_connections.clamp(1, LINES_MAX);
        let pool = Pool::builder(manager)
            .max_size(count + 1)
            .wait_timeout(Some(config.response_timeout.0))
            .create_timeout(Some(config.connect_timeout.0))
            .recycle_timeout(Some(config.response_timeout.0))
            .runtime(Runtime::Tokio1)
            .build()
            .map_err(|error| invalid(format!("the Redis pool: {error}")))?;
        let shared = (0..count).map(|_| Line::default()).collect();
        let (probes, next) = (Line::default(), AtomicUsize::new(0));
        Ok(Self { pool, shared, probes, next, response_timeout: config.response_timeout.0 })
    }

    /// How many are open.
    pub(super) fn open(&self) -> usize {
        self.shared.iter().chain([&self.probes]).filter(|line| line.current().is_some()).count()
    }

    /// Asks over one of them, within the time that an answer may take. What broke with its connection is asked once
    /// more over a new one: an idle connection may have been closed by the server or by something between.
    pub(super) async fn ask(&self, question: Question<'_>) -> Result<Value, CacheError> {
        let line = &self.shared[self.next.fetch_add(1, Ordering::Relaxed) % self.shared.len()];
        self.ask_over(line, question).await
    }

    /// The same over the probes' line.
    pub(super) async fn ask_for_a_probe(&self, question: Question<'_>) -> Result<Value, CacheError> {
        self.ask_over(&self.probes, question).await
    }

    async fn ask_over(&self, line: &Line, question: Question<'_>) -> Result<Value, CacheError> {
        let mut is_fresh = false;
        loop {
            let connection = if let Some(connection) = line.current() {
                connection
            } else {
                is_fresh = true;
                line.make(&self.pool).await?
            };
            let mut share = MultiplexedConnection::clone(&connection);
            let error = match timeout(self.response_timeout, question.put_to(&mut share)).await {
                Ok(Ok(answer)) => return Ok(answer),
                // What Redis itself refuses says nothing against the connection.
                Ok(Err(error)) if !error.is_unrecoverable_error() && !error.is_io_error() => {
                    return Err(describe(&error));
                }
                Ok(Err(error)) => describe(&error),
                Err(_) => {
                    line.give_up(connection);
                    return Err(CacheError(format!("Redis: no answer within {}", Span(self.response_timeout))));
                }
            };
            line.give_up(connection);
            if std::mem::replace(&mut is_fresh, true) {
                return Err(error);
            }
        }
    }
}

impl Line {
    fn current(&self) -> Option<Arc<Connection>> {
        // Nothing panics while it is held.
        self.open.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn make(&self, pool: &Pool) -> Result<Arc<Connection>, CacheError> {
        let _making = self.making.lock().await;
        if let Some(made) = self.current() {
            return Ok(made);
        }
        let made = Arc::new(pool.get().await.map_err(|error| unconnected(&error))?);
        *self.open.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&made));
        Ok(made)
    }

    /// Takes a failed connection out of use, unless somebody else was first. Others that wait for answers over it may
    /// still get them.
    fn give_up(&self, failed: Arc<Connection>) {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        if open.as_ref().is_some_and(|open| Arc::ptr_eq(open, &failed)) {
            *open = None;
        }
        drop(open);
        // Not back to the pool. Where others still hold it, it goes there, and is tested before it is used again.
        if let Some(last) = Arc::into_inner(failed) {
            drop(Connection::take(last));
        }
    }
}
