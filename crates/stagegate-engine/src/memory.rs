//! Memory budgets: owns how many bytes the things that grow with what callers send may hold at once. Whatever holds
//! bytes takes a permit of its weight first, and waits, in order, where there is no room. Nothing is refused here: what is
//! larger than a whole budget goes through alone. Knows nothing of what is weighed.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

/// So much may be held where no limit is configured and none was found: half of two gibibytes.
pub const MEMORY_DEFAULT_BYTES: u64 = 1 << 30;
/// The smallest budget of all together.
const MEMORY_MIN_BYTES: u64 = 64 << 20;
/// The most that compiled pipelines are kept in, however large the machine: thousands of ordinary ones.
const COMPILED_MAX_BYTES: u64 = 128 << 20;

/// The budgets of one process.
#[derive(Debug, Clone)]
pub struct Memory {
    /// All of them together.
    pub max_bytes: u64,
    /// Bodies of requests while they are read and parsed.
    pub bodies: Budget,
    /// Runs that are under way: their inputs and outputs as text.
    pub runs: Budget,
    /// Values that are parsed for a rendering or a check.
    pub values: Budget,
    /// Inputs on their way to the store.
    pub batches: Budget,
    /// Compiled pipelines that are kept.
    pub compiled_max_bytes: u64,
}

impl Memory {
    /// Shares so many bytes out.
    pub fn new(max_bytes: u64) -> Self {
        let max_bytes = max_bytes.max(MEMORY_MIN_BYTES);
        let part = |percent: u64| max_bytes / 100 * percent;
        Self {
            max_bytes,
            bodies: Budget::new(part(30)),
            runs: Budget::new(part(25)),
            values: Budget::new(part(20)),
            batches: Budget::new(part(10)),
            compiled_max_bytes: part(10).min(COMPILED_MAX_BYTES),
        }
    }
}

/// So many bytes, shared by those who hold permits. Cheap to clone.
#[derive(Clone)]
pub struct Budget {
    inner: Arc<Inner>,
}

struct Inner {
    max_bytes: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    held: u64,
    /// In the order in which they came.
    waiting: VecDeque<(u64, oneshot::Sender<Permit>)>,
}

/// The right to hold so many bytes, until it is dropped.
pub struct Permit {
    inner: Arc<Inner>,
    bytes: u64,
}

impl fmt::Debug for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Budget").field("max_bytes", &self.max_bytes()).field("held", &self.held()).finish()
    }
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Permit({} bytes)", self.bytes)
    }
}

impl Budget {
    /// A budget of so many bytes.
    pub fn new(max_bytes: u64) -> Self {
        Self { inner: Arc::new(Inner { max_bytes, state: Mutex::default() }) }
    }

    /// How many bytes may be held at once.
    pub fn max_bytes(&self) -> u64 {
        self.inner.max_bytes
    }

    /// How many are held.
    pub fn held(&self) -> u64 {
        self.inner.state().held
    }

    /// Whether so many bytes would fit now.
    pub fn has_room(&self, bytes: u64) -> bool {
        self.inner.fits(&self.inner.state(), bytes)
    }

    /// Waits for so many bytes, behind those who came before.
    pub async fn acquire(&self, bytes: u64) -> Permit {
        let waiting = {
            let mut state = self.inner.state();
            if let Some(permit) = self.take(&mut state, bytes) {
                return permit;
            }
            let (granted, waiting) = oneshot::channel();
            state.waiting.push_back((bytes, granted));
            waiting
        };
        // The sender is only dropped after it has sent.
        waiting.await.unwrap_or_else(|_| self.overdraw(bytes))
    }

    /// So many bytes, where there is room for them now and nobody waits.
    pub fn try_acquire(&self, bytes: u64) -> Option<Permit> {
        self.take(&mut self.inner.state(), bytes)
    }

    /// So many bytes, whether there is room or not: for what is there already. Others wait the longer.
    pub fn overdraw(&self, bytes: u64) -> Permit {
        let mut state = self.inner.state();
        state.held = state.held.saturating_add(bytes);
        Permit { inner: Arc::clone(&self.inner), bytes }
    }

    fn take(&self, state: &mut State, bytes: u64) -> Option<Permit> {
        while state.waiting.front().is_some_and(|(_, granted)| granted.is_closed()) {
            state.waiting.pop_front();
        }
        if !state.waiting.is_empty() || !self.inner.fits(state, bytes) {
            return None;
        }
        state.held = state.held.saturating_add(bytes);
        Some(Permit { inner: Arc::clone(&self.inner), bytes })
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is larger than the whole budget fits once nothing else is held.
    fn fits(&self, state: &State, bytes: u64) -> bool {
        state.held == 0 || state.held.saturating_add(bytes) <= self.max_bytes
    }

    /// Gives back, and lets in who has waited longest.
    fn give_back(self: &Arc<Self>, bytes: u64) {
        let mut state = self.state();
        state.held = state.held.saturating_sub(bytes);
        while let Some((wanted, _)) = state.waiting.front()
            && self.fits(&state, *wanted)
        {
            let Some((wanted, granted)) = state.waiting.pop_front() else { return };
            if granted.is_closed() {
                continue;
            }
            state.held = state.held.saturating_add(wanted);
            let refused = granted.send(Permit { inner: Arc::clone(self), bytes: wanted });
            if let Err(mut permit) = refused {
                // It hung up in between. Its permit must not come back here while the lock is held.
                permit.bytes = 0;
                state.held -= wanted;
            }
        }
    }
}

impl Permit {
    /// How many bytes it is for.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Holds so many more, whether there is room or not.
    pub fn grow(&mut self, bytes: u64) {
        let mut state = self.inner.state();
        state.held = state.held.saturating_add(bytes);
        self.bytes = self.bytes.saturating_add(bytes);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.inner.give_back(self.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn what_does_not_fit_waits_in_order_and_is_let_in() {
        let budget = Budget::new(100);
        let (first, second) = (budget.acquire(60).await, budget.acquire(40).await);
        let mut large = Box::pin(budget.acquire(70));
        let mut small = Box::pin(budget.acquire(10));
        assert!((&mut large).now_or_never().is_none() && (&mut small).now_or_never().is_none());
        drop(second);
        assert!((&mut small).now_or_never().is_none(), "nobody overtakes who waits for more");
        assert!(budget.try_acquire(1).is_none());
        drop(first);
        assert_eq!((large.await.bytes(), small.await.bytes()), (70, 10));
        assert_eq!(budget.held(), 0);
    }

    #[tokio::test]
    async fn a_permit_larger_than_the_budget_is_granted_alone() {
        let budget = Budget::new(100);
        let held = budget.acquire(1).await;
        let mut huge = Box::pin(budget.acquire(1_000));
        assert!((&mut huge).now_or_never().is_none());
        drop(held);
        let huge = huge.await;
        assert!(budget.try_acquire(1).is_none());
        drop(huge);
        assert!(budget.try_acquire(100).is_some());
    }

    #[tokio::test]
    async fn a_waiter_that_hangs_up_takes_nothing() {
        let budget = Budget::new(100);
        let held = budget.acquire(100).await;
        let mut gone = Box::pin(budget.acquire(50));
        let mut next = Box::pin(budget.acquire(100));
        assert!((&mut gone).now_or_never().is_none() && (&mut next).now_or_never().is_none());
        let mut granted = Box::pin(budget.acquire(1));
        assert!((&mut granted).now_or_never().is_none());
        drop(gone);
        drop(held);
        drop(granted); // It waited behind.
        drop(next); // It was granted and never looked.
        assert_eq!(budget.held(), 0);
    }

    #[tokio::test]
    async fn what_grew_beyond_the_budget_makes_others_wait() {
        let budget = Budget::new(100);
        let mut permit = budget.acquire(50).await;
        permit.grow(100);
        assert_eq!((budget.held(), permit.bytes()), (150, 150));
        assert!(budget.try_acquire(1).is_none());
        drop(permit);
        assert_eq!(budget.held(), 0);
    }
}
