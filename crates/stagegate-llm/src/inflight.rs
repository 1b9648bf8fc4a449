//! Coalescing: owns which calls are under way in this process, so that identical requests share one. It knows nothing
//! of what they do.
//!
//! A flight is driven by whoever waits for it: it goes on while one of them is left, and is abandoned with the last.
//! It has no deadline; each waiter has its own.

use std::{
    collections::HashMap,
    fmt,
    future::Future,
    hash::Hash,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{
    FutureExt,
    future::{BoxFuture, Shared, WeakShared},
};
use tokio::{sync::Notify, time::Instant};

type Future_<T> = BoxFuture<'static, Arc<T>>;

/// What the waiters of one flight know of each other.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    called_at: OnceLock<Instant>,
    called: Notify,
    storing: AtomicBool,
    late: AtomicBool,
}

impl Progress {
    /// The provider is being asked from here on; before, it waits for its turn.
    pub(crate) fn calls(&self) {
        if self.called_at.set(Instant::now()).is_ok() {
            self.called.notify_waiters();
        }
    }

    /// Since when the provider is being asked; None while the call waits for its turn.
    pub(crate) fn called_at(&self) -> Option<Instant> {
        self.called_at.get().copied()
    }

    /// Waits until the provider is being asked.
    pub(crate) async fn called(&self) -> Instant {
        let called = self.called.notified();
        tokio::pin!(called);
        called.as_mut().enable();
        if let Some(at) = self.called_at() {
            return at;
        }
        called.await;
        self.called_at().unwrap_or_else(Instant::now)
    }

    /// Whether the provider has been asked for as long as one call may take, without an answer. A caller that joins it
    /// would keep a call that hangs from being abandoned, as long as there is always another caller.
    fn is_stale(&self, longest: Duration) -> bool {
        !self.is_storing() && self.called_at().is_some_and(|at| at.elapsed() >= longest)
    }

    /// The answer is there, and is being stored.
    pub(crate) fn stores(&self) {
        self.storing.store(true, Ordering::Relaxed);
    }

    /// Whether the answer is there, and is being stored: what is left takes no longer than the shared cache may.
    pub(crate) fn is_storing(&self) -> bool {
        self.storing.load(Ordering::Relaxed)
    }

    /// A waiter's deadline passed.
    pub(crate) fn is_late(&self) -> bool {
        self.late.load(Ordering::Relaxed)
    }

    pub(crate) fn note_deadline(&self) {
        self.late.store(true, Ordering::Relaxed);
    }
}

/// A share in a flight.
pub(crate) struct Ticket<T> {
    /// The outcome.
    pub(crate) flight: Shared<Future_<T>>,
    pub(crate) progress: Arc<Progress>,
    /// Whether this one began it.
    pub(crate) began: bool,
}

struct Slot<T> {
    id: u64,
    generation: u64,
    flight: WeakShared<Future_<T>>,
    progress: Arc<Progress>,
}

/// The flights under way, by key.
pub(crate) struct Flights<K, T> {
    under_way: Mutex<HashMap<K, Slot<T>>>,
    next_id: AtomicU64,
}

impl<K, T> fmt::Debug for Flights<K, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Flights")
    }
}

impl<K, T> Default for Flights<K, T> {
    fn default() -> Self {
        Self { under_way: Mutex::default(), next_id: AtomicU64::new(0) }
    }
}

impl<K: Eq + Hash + Clone + Send + 'static, T: Send + Sync + 'static> Flights<K, T> {
    fn lock(&self) -> MutexGuard<'_, HashMap<K, Slot<T>>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn share(under_way: &HashMap<K, Slot<T>>, key: &K, floor: u64, longest: Duration) -> Option<Ticket<T>> {
        // The generation first: a share that was taken and dropped in here could be the last, and its end needs the lock.
        let slot = under_way.get(key).filter(|slot| slot.generation >= floor && !slot.progress.is_stale(longest))?;
        let flight = slot.flight.upgrade()?;
        Some(Ticket { flight, progress: Arc::clone(&slot.progress), began: false })
    }

    /// Joins the flight under this key, if there is one that is not too old.
    pub(crate) fn follow(&self, key: &K, floor: u64, longest: Duration) -> Option<Ticket<T>> {
        Self::share(&self.lock(), key, floor, longest)
    }

    /// Joins the flight under this key, or begins one under `generation`. A flight that began below `floor` is too
    /// old: what it brings was asked for before an invalidation. So is one whose call has taken `longest` already.
    pub(crate) fn join<F>(
        self: &Arc<Self>,
        key: &K,
        generation: u64,
        floor: u64,
        longest: Duration,
        begin: impl FnOnce(Arc<Progress>) -> F,
    ) -> Ticket<T>
    where
        F: Future<Output = T> + Send + 'static,
    {
        let mut under_way = self.lock();
        if let Some(ticket) = Self::share(&under_way, key, floor, longest) {
            return ticket;
        }
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let progress = Arc::new(Progress::default());
        let landing = Landing { flights: Arc::clone(self), key: key.clone(), id };
        let work = begin(Arc::clone(&progress));
        let flight: Shared<Future_<T>> = async move {
            let _landing = landing;
            Arc::new(work.await)
        }
        .boxed()
        .shared();
        if let Some(weak) = flight.downgrade() {
            let slot = Slot { id, generation, flight: weak, progress: Arc::clone(&progress) };
            under_way.insert(key.clone(), slot);
        }
        Ticket { flight, progress, began: true }
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.lock().len()
    }
}

/// Takes a flight off the list when it ends or is abandoned.
struct Landing<K: Eq + Hash, T> {
    flights: Arc<Flights<K, T>>,
    key: K,
    id: u64,
}

impl<K: Eq + Hash, T> Drop for Landing<K, T> {
    fn drop(&mut self) {
        let mut under_way = self.flights.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        if under_way.get(&self.key).is_some_and(|slot| slot.id == self.id) {
            under_way.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use tokio::sync::Notify;

    use super::*;

    const LONG: Duration = Duration::from_mins(1);

    type Lot = Arc<Flights<&'static str, usize>>;

    /// A flight that counts its beginnings and ends when told.
    fn join(flights: &Lot, floor: u64, begun: &Arc<AtomicUsize>, end: &Arc<Notify>) -> Ticket<usize> {
        let (begun, end) = (Arc::clone(begun), Arc::clone(end));
        flights.join(&"key", 5, floor, LONG, |_| async move {
            let nth = begun.fetch_add(1, Ordering::Relaxed);
            end.notified().await;
            nth
        })
    }

    fn lot() -> (Lot, Arc<AtomicUsize>, Arc<Notify>) {
        (Arc::default(), Arc::default(), Arc::default())
    }

    #[tokio::test]
    async fn identical_requests_share_one_flight() {
        let (flights, begun, end) = lot();
        let first = join(&flights, 0, &begun, &end);
        let others: Vec<_> = (0..19).map(|_| join(&flights, 5, &begun, &end)).collect();
        assert!(first.began && others.iter().all(|ticket| !ticket.began));
        end.notify_one();
        for ticket in others.into_iter().chain([first]) {
            assert_eq!(*ticket.flight.await, 0);
        }
        assert_eq!((begun.load(Ordering::Relaxed), flights.len()), (1, 0));
    }

    #[tokio::test]
    async fn waiters_go_on_when_the_one_who_began_is_dropped() {
        let (flights, begun, end) = lot();
        let mut first = Box::pin(join(&flights, 0, &begun, &end).flight);
        assert!(futures::poll!(&mut first).is_pending());
        let second = join(&flights, 0, &begun, &end);
        drop(first);
        end.notify_one();
        assert_eq!(*second.flight.await, 0);
    }

    #[tokio::test]
    async fn a_flight_that_nobody_waits_for_is_abandoned() {
        let (flights, begun, end) = lot();
        let mut first = Box::pin(join(&flights, 0, &begun, &end).flight);
        assert!(futures::poll!(&mut first).is_pending());
        drop(first);
        assert_eq!(flights.len(), 0);
        let next = join(&flights, 0, &begun, &end);
        assert!(next.began);
        drop(next);
        assert_eq!(flights.len(), 0, "even one that never moved");
    }

    #[tokio::test]
    async fn a_flight_from_before_an_invalidation_is_not_joined() {
        let (flights, begun, end) = lot();
        let old = join(&flights, 0, &begun, &end);
        let new = join(&flights, 6, &begun, &end);
        assert!(new.began);
        drop(old);
        assert_eq!(flights.len(), 1, "the end of the old one does not take the new one off the list");
    }

    #[tokio::test]
    async fn only_a_flight_under_way_can_be_followed() {
        let (flights, begun, end) = lot();
        assert!(flights.follow(&"key", 0, LONG).is_none());
        let first = join(&flights, 0, &begun, &end);
        assert!(flights.follow(&"key", 5, LONG).is_some_and(|ticket| !ticket.began));
        assert!(flights.follow(&"key", 6, LONG).is_none(), "it is from before an invalidation");
        drop(first);
        assert!(flights.follow(&"key", 0, LONG).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_hangs_is_not_joined_once_it_took_as_long_as_a_call_may() {
        let flights: Lot = Arc::default();
        let hangs = |progress: Arc<Progress>| {
            progress.calls();
            std::future::pending::<usize>()
        };
        let _first = flights.join(&"key", 0, 0, LONG, hangs);
        tokio::time::advance(LONG / 2).await;
        assert!(flights.follow(&"key", 0, LONG).is_some(), "there is time left");
        tokio::time::advance(LONG / 2).await;
        assert!(flights.follow(&"key", 0, LONG).is_none());
        let next = flights.join(&"key", 0, 0, LONG, hangs);
        assert!(next.began);
        assert!(flights.follow(&"key", 0, LONG).is_some(), "the new call takes its place");
    }
}
