//! Memory budgets: owns how many bytes callers' data may take at once. Code that holds such data takes a permit of its
//! size first, and waits if there is no room. A budget refuses nothing: an item that is larger than a whole budget is
//! admitted when at most half of the budget is held. Knows nothing of the data.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use stagegate_core::TenantId;
use tokio::sync::oneshot;

/// All budgets together, if no limit is configured and the daemon found none: half of two gibibytes.
pub const MEMORY_DEFAULT_BYTES: u64 = 1 << 30;
/// The smallest budget of all together.
const MEMORY_MIN_BYTES: u64 = 64 << 20;
/// The upper bound for kept compiled pipelines on any machine: room for thousands of ordinary ones.
const COMPILED_MAX_BYTES: u64 = 128 << 20;
/// Items of a tenant up to this size are not counted: most inputs and bodies are smaller.
const UNCOUNTED_BYTES: u64 = 64 * 1024;

/// The budgets of one process.
#[derive(Debug, Clone)]
pub struct Memory {
    /// All of them together.
    pub max_bytes: u64,
    /// Bodies of requests as they came, in bytes at once.
    pub texts_max_bytes: u64,
    /// Bodies of requests while they are parsed.
    pub bodies: Budget,
    /// Runs under way: their inputs and outputs as text.
    pub runs: Budget,
    /// Values that are parsed for a rendering or a check.
    pub values: Budget,
    /// Inputs on their way to the store.
    pub batches: Budget,
    /// Answers to requests until they are sent, in bytes at once.
    pub answers_max_bytes: u64,
    /// Kept compiled pipelines, in bytes.
    pub compiled_max_bytes: u64,
}

impl Memory {
    /// Divides `max_bytes` among the budgets.
    pub fn new(max_bytes: u64) -> Self {
        let max_bytes = max_bytes.max(MEMORY_MIN_BYTES);
        let part = |percent: u64| max_bytes / 100 * percent;
        Self {
            max_bytes,
            texts_max_bytes: part(12),
            bodies: Budget::new(part(18)),
            runs: Budget::new(part(20)),
            values: Budget::new(part(20)),
            batches: Budget::new(part(8)),
            answers_max_bytes: part(12),
            compiled_max_bytes: part(10).min(COMPILED_MAX_BYTES),
        }
    }
}

/// A number of bytes that the holders of permits share. Cheap to clone.
///
/// A request for bytes waits in the line of its tenant. The tenant that holds the least is served first. A tenant that has
/// a quarter gets more only while a quarter stays free for the others, so that no tenant can keep the others out.
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
    /// The tenants that hold bytes or wait. Requests of no tenant (None) have no share to keep to.
    lines: BTreeMap<Option<TenantId>, Line>,
    waiting: usize,
    next: u64,
}

#[derive(Default)]
struct Line {
    held: u64,
    waiting: VecDeque<Waiting>,
}

struct Waiting {
    id: u64,
    bytes: u64,
    granted: oneshot::Sender<Permit>,
}

/// The right to hold a number of bytes, until it is dropped.
pub struct Permit {
    /// None if the bytes were too few to be counted.
    inner: Option<Arc<Inner>>,
    tenant: Option<TenantId>,
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
    /// A budget of `max_bytes`.
    pub fn new(max_bytes: u64) -> Self {
        Self { inner: Arc::new(Inner { max_bytes, state: Mutex::default() }) }
    }

    /// How many bytes may be held at once.
    pub fn max_bytes(&self) -> u64 {
        self.inner.max_bytes
    }

    /// How many bytes are held.
    pub fn held(&self) -> u64 {
        self.inner.state().held
    }

    /// Whether `bytes` would fit now.
    pub fn has_room(&self, bytes: u64) -> bool {
        self.inner.fits(&self.inner.state(), None, bytes)
    }

    /// Waits for bytes of a tenant. A small number is granted at once and not counted: the limits on requests and threads
    /// bound the number of small requests.
    pub async fn acquire_for(&self, tenant: &TenantId, bytes: u64) -> Permit {
        if bytes <= UNCOUNTED_BYTES {
            return Permit { inner: None, tenant: None, bytes };
        }
        self.line_up(Some(tenant.clone()), bytes).await
    }

    /// Waits for bytes of no tenant.
    pub async fn acquire(&self, bytes: u64) -> Permit {
        self.line_up(None, bytes).await
    }

    /// Bytes of no tenant, if there is room for them now and no request waits.
    pub fn try_acquire(&self, bytes: u64) -> Option<Permit> {
        let mut state = self.inner.state();
        (state.waiting == 0 && self.inner.fits(&state, None, bytes)).then(|| self.inner.grant(&mut state, None, bytes))
    }

    async fn line_up(&self, tenant: Option<TenantId>, bytes: u64) -> Permit {
        let (id, granted) = {
            let mut state = self.inner.state();
            if state.waiting == 0 && self.inner.fits(&state, tenant.as_ref(), bytes) {
                return self.inner.grant(&mut state, tenant, bytes);
            }
            state.next += 1;
            state.waiting += 1;
            let (sender, granted) = oneshot::channel();
            let id = state.next;
            let line = state.lines.entry(tenant.clone()).or_default();
            line.waiting.push_back(Waiting { id, bytes, granted: sender });
            (id, granted)
        };
        let mut place = InLine { inner: &self.inner, tenant, id, waits: true };
        // This tenant may be the one that holds the least.
        self.inner.settle(|_| {});
        let permit = granted.await;
        place.waits = false;
        // A sender is dropped only after it has sent.
        permit.unwrap_or(Permit { inner: None, tenant: None, bytes })
    }
}

/// A place in a line. Dropped, it leaves the line.
struct InLine<'a> {
    inner: &'a Arc<Inner>,
    tenant: Option<TenantId>,
    id: u64,
    waits: bool,
}

impl Drop for InLine<'_> {
    fn drop(&mut self) {
        if self.waits {
            self.inner.settle(|state| {
                let Some(line) = state.lines.get_mut(&self.tenant) else { return };
                let before = line.waiting.len();
                line.waiting.retain(|waiting| waiting.id != self.id);
                state.waiting -= before - line.waiting.len();
                state.forget(&self.tenant);
            });
        }
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An item that is larger than half of the budget fits while at most half of the budget is held: so it is admitted at
    /// some time, and waits for no more than that.
    fn fits(&self, state: &State, tenant: Option<&TenantId>, bytes: u64) -> bool {
        let fits = |held: u64, max: u64| held.saturating_add(bytes) <= max;
        if fits(state.held, self.max_bytes) {
            let own = match tenant {
                None => return true,
                Some(_) => state.lines.get(&tenant.cloned()).map_or(0, |line| line.held),
            };
            return own == 0 || fits(own, self.max_bytes / 4) || fits(state.held, self.max_bytes / 4 * 3);
        }
        bytes > self.max_bytes / 2 && state.held <= self.max_bytes / 2
    }

    fn grant(self: &Arc<Self>, state: &mut State, tenant: Option<TenantId>, bytes: u64) -> Permit {
        state.held = state.held.saturating_add(bytes);
        let line = state.lines.entry(tenant.clone()).or_default();
        line.held = line.held.saturating_add(bytes);
        Permit { inner: Some(Arc::clone(self)), tenant, bytes }
    }

    /// Changes the state, then admits waiting requests that fit, first those of the tenant that holds the least.
    fn settle(self: &Arc<Self>, change: impl FnOnce(&mut State)) {
        let mut granted = Vec::new();
        {
            let mut state = self.state();
            change(&mut state);
            while state.waiting > 0 {
                let fronts = state.lines.iter().filter_map(|(tenant, line)| {
                    let front = line.waiting.front()?;
                    Some((line.held, front.id, front.bytes, tenant))
                });
                let Some((_, _, bytes, tenant)) = fronts.min() else { break };
                if !self.fits(&state, tenant.as_ref(), bytes) {
                    break;
                }
                let tenant = tenant.clone();
                let front = state.lines.get_mut(&tenant).and_then(|line| line.waiting.pop_front());
                state.waiting -= 1;
                let permit = self.grant(&mut state, tenant, bytes);
                granted.extend(front.map(|front| (front.granted, permit)));
            }
        }
        for (asker, permit) in granted {
            drop(asker.send(permit)); // One that is gone gives its permit back here.
        }
    }
}

impl State {
    /// Removes an empty line of a tenant that holds nothing.
    #[expect(clippy::ref_option, reason = "it is the key of a line")]
    fn forget(&mut self, tenant: &Option<TenantId>) {
        if self.lines.get(tenant).is_some_and(|line| line.held == 0 && line.waiting.is_empty()) {
            self.lines.remove(tenant);
        }
    }
}

impl Permit {
    /// How many bytes the permit is for.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Adds bytes to the permit, whether there is room or not.
    pub fn grow(&mut self, bytes: u64) {
        let Some(inner) = &self.inner else { return };
        let mut state = inner.state();
        state.held = state.held.saturating_add(bytes);
        if let Some(line) = state.lines.get_mut(&self.tenant) {
            line.held = line.held.saturating_add(bytes);
        }
        self.bytes = self.bytes.saturating_add(bytes);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let Some(inner) = self.inner.take() else { return };
        inner.settle(|state| {
            state.held = state.held.saturating_sub(self.bytes);
            if let Some(line) = state.lines.get_mut(&self.tenant) {
                line.held = line.held.saturating_sub(self.bytes);
                state.forget(&self.tenant);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::task::Poll;

    use futures::{FutureExt, future::BoxFuture};

    use super::*;

    const MB: u64 = 1 << 20;

    fn tenant(name: &str) -> TenantId {
        TenantId::new(name).expect("valid")
    }

    /// A request that waits.
    fn waiting<'a>(budget: &'a Budget, of: Option<&'a TenantId>, bytes: u64) -> BoxFuture<'a, Permit> {
        let mut asked = match of {
            Some(tenant) => budget.acquire_for(tenant, bytes).boxed(),
            None => budget.acquire(bytes).boxed(),
        };
        assert!((&mut asked).now_or_never().is_none(), "{bytes} bytes fit");
        asked
    }

    #[tokio::test]
    async fn requests_that_do_not_fit_wait_and_are_admitted_in_order() {
        let budget = Budget::new(100);
        let (first, second) = (budget.acquire(60).await, budget.acquire(40).await);
        let large = waiting(&budget, None, 45);
        let mut small = waiting(&budget, None, 10);
        drop(second);
        assert!((&mut small).now_or_never().is_none(), "it does not overtake the one that needs more");
        assert!(budget.try_acquire(1).is_none());
        drop(first);
        assert_eq!((large.await.bytes(), small.await.bytes()), (45, 10));
        assert_eq!(budget.held(), 0);
    }

    #[tokio::test]
    async fn a_request_larger_than_the_budget_is_admitted_beside_half_of_it() {
        let budget = Budget::new(100);
        let held = (budget.acquire(50).await, budget.acquire(1).await);
        let huge = waiting(&budget, None, 1_000);
        drop(held.1);
        let huge = huge.await;
        assert!(budget.try_acquire(1).is_none());
        drop((huge, held.0));
        assert!(budget.try_acquire(100).is_some());
    }

    #[tokio::test]
    async fn a_dropped_waiter_admits_the_next_one_and_holds_nothing() {
        let budget = Budget::new(100);
        let held = budget.acquire(60).await;
        let gone = waiting(&budget, None, 45);
        let mut next = waiting(&budget, None, 40);
        drop(gone);
        let next = match futures::poll!(&mut next) {
            Poll::Ready(permit) => permit,
            Poll::Pending => panic!("there is room since the one before it is gone"),
        };
        let never_looked = waiting(&budget, None, 50);
        drop((held, next));
        drop(never_looked); // It was granted.
        assert_eq!(budget.held(), 0);
    }

    #[tokio::test]
    async fn a_permit_that_grew_beyond_the_budget_makes_others_wait() {
        let budget = Budget::new(100);
        let mut permit = budget.acquire(50).await;
        permit.grow(100);
        assert_eq!((budget.held(), permit.bytes()), (150, 150));
        assert!(budget.try_acquire(1).is_none());
        drop(permit);
        assert_eq!(budget.held(), 0);
    }

    #[tokio::test]
    async fn a_tenant_that_holds_most_leaves_a_quarter_and_its_line_delays_no_other() {
        let budget = Budget::new(100 * MB);
        let (greedy, other) = (tenant("greedy"), tenant("other"));
        let held = (budget.acquire_for(&greedy, 40 * MB).await, budget.acquire_for(&greedy, 35 * MB).await);
        let lines = (waiting(&budget, Some(&greedy), MB), waiting(&budget, Some(&greedy), 30 * MB));
        let small = budget.acquire_for(&other, 20 * MB).await;
        let more = waiting(&budget, Some(&other), 20 * MB);
        drop(held.0);
        let more = more.now_or_never().expect("the one that holds less is served first");
        drop((small, more, held.1));
        assert_eq!((lines.0.await.bytes(), lines.1.await.bytes()), (MB, 30 * MB));
        assert_eq!(budget.held(), 0);
    }

    #[tokio::test]
    async fn small_requests_never_wait() {
        let budget = Budget::new(100);
        let of = tenant("t");
        let held = budget.acquire(100).await;
        assert_eq!(budget.acquire_for(&of, UNCOUNTED_BYTES).now_or_never().expect("at once").bytes(), UNCOUNTED_BYTES);
        drop(waiting(&budget, Some(&of), UNCOUNTED_BYTES + 1));
        drop(held);
        assert_eq!(budget.held(), 0);
    }
}
