//! Load: owns who sends when. A closed loop sends as fast as answers come; an open loop sends at a rate, whatever comes
//! back, and counts each request's time from when it was due, so that a server that stalls is not flattered.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures::future::join_all;
use tokio::{sync::Notify, task::unconstrained};

use super::{figures::Times, wire::Connection};

/// The pause between two bursts of an open loop: what is due in it is sent together.
const TICK: Duration = Duration::from_millis(1);

/// What came of a load.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Times of what succeeded.
    pub(crate) times: Times,
    pub(crate) errors: u64,
    pub(crate) first_error: Option<String>,
    pub(crate) took: Duration,
}

impl Outcome {
    /// Fails where anything did.
    pub(crate) fn clean(self) -> anyhow::Result<Self> {
        match &self.first_error {
            Some(error) => anyhow::bail!("{} of {} requests failed: {error}", self.errors, self.sent()),
            None => Ok(self),
        }
    }

    pub(crate) fn sent(&self) -> u64 {
        self.errors + self.times.len() as u64
    }

    #[expect(clippy::cast_precision_loss, reason = "far fewer than 2^52 requests")]
    pub(crate) fn per_second(&self) -> f64 {
        self.times.len() as f64 / self.took.as_secs_f64()
    }
}

/// The connections of a load, kept from one to the next.
pub(crate) async fn connections(address: SocketAddr, count: usize) -> anyhow::Result<Vec<Connection>> {
    let mut connections = Vec::with_capacity(count);
    for _ in 0..count {
        connections.push(Connection::open(address).await?);
    }
    Ok(connections)
}

/// Sends on every connection, one request after another, until `stop` is set or `limit` requests were sent. A shot is
/// given its number, counted from `first`.
pub(crate) async fn closed_loop(
    connections: &mut [Connection],
    first: u64,
    limit: u64,
    stop: &AtomicBool,
    shot: impl AsyncFn(&mut Connection, u64) -> anyhow::Result<()>,
) -> Outcome {
    let started = Instant::now();
    let (next, outcome) = (AtomicU64::new(0), Mutex::new(Outcome::default()));
    let workers = connections.iter_mut().map(async |connection| {
        while !stop.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= limit {
                return;
            }
            let began = Instant::now();
            let result = shot(connection, first + index).await;
            if !note(&outcome, began, result) && connection.reopen().await.is_err() {
                return;
            }
        }
    });
    unconstrained(join_all(workers)).await;
    finish(outcome, started)
}

/// Sends `rate` requests a second for a time. A shot is given its number and the time at which it was due.
pub(crate) async fn open_loop(
    connections: &mut [Connection],
    first: u64,
    rate: f64,
    time: Duration,
    shot: impl AsyncFn(&mut Connection, u64, Instant) -> anyhow::Result<()>,
) -> Outcome {
    let started = Instant::now();
    let queue = Arc::new(Queue::default());
    let outcome = Mutex::new(Outcome::default());
    let pacer = {
        let queue = Arc::clone(&queue);
        // A thread of its own: its sleep is exact, where the runtime's timer rounds up.
        std::thread::spawn(move || queue.fill(rate, time))
    };
    let workers = connections.iter_mut().map(async |connection| {
        while let Some((index, due)) = queue.next().await {
            let result = shot(connection, first + index, due).await;
            if !note(&outcome, due, result) && connection.reopen().await.is_err() {
                return;
            }
        }
    });
    unconstrained(join_all(workers)).await;
    // It has nothing left to send: the queue was closed by it.
    let _ = pacer.join();
    finish(outcome, started)
}

/// What is due and was not sent yet.
#[derive(Debug, Default)]
struct Queue {
    due: Mutex<VecDeque<(u64, Instant)>>,
    more: Notify,
    closed: AtomicBool,
}

impl Queue {
    fn due(&self) -> MutexGuard<'_, VecDeque<(u64, Instant)>> {
        self.due.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts in what is due, tick by tick, until the time is over.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count of requests")]
    fn fill(&self, rate: f64, time: Duration) {
        let (started, mut sent, mut tick) = (Instant::now(), 0, 0);
        let total = (rate * time.as_secs_f64()) as u64;
        while sent < total {
            tick += 1;
            let due = started + TICK * tick;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let upto = ((rate * (due - started).as_secs_f64()) as u64).min(total);
            self.due().extend((sent..upto).map(|index| (index, due)));
            (sent..upto).for_each(|_| self.more.notify_one());
            sent = upto;
        }
        self.closed.store(true, Ordering::SeqCst);
        self.more.notify_waiters();
    }

    async fn next(&self) -> Option<(u64, Instant)> {
        loop {
            // Listens before it looks, so that nothing is put in between the two.
            let mut more = std::pin::pin!(self.more.notified());
            more.as_mut().enable();
            let shot = self.due().pop_front();
            if shot.is_some() {
                return shot;
            }
            if self.closed.load(Ordering::SeqCst) {
                return None;
            }
            more.await;
        }
    }
}

/// Counts a request; whether it succeeded. After one that did not, its connection may be at any point of an answer.
fn note(outcome: &Mutex<Outcome>, since: Instant, result: anyhow::Result<()>) -> bool {
    let mut outcome = outcome.lock().unwrap_or_else(PoisonError::into_inner);
    match result {
        Ok(()) => {
            outcome.times.add(since.elapsed());
            true
        }
        Err(error) => {
            outcome.errors += 1;
            outcome.first_error.get_or_insert_with(|| format!("{error:#}"));
            false
        }
    }
}

fn finish(outcome: Mutex<Outcome>, started: Instant) -> Outcome {
    let outcome = outcome.into_inner().unwrap_or_else(PoisonError::into_inner);
    Outcome { took: started.elapsed(), ..outcome }
}
