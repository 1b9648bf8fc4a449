//! Turns: owns the order of calls under a limit on concurrent calls. Waiting tenants take turns, and the calls of one
//! tenant keep their order, so that a tenant with many calls delays the next call of another tenant by one call.
//!
//! A turn may take hours, and no holder is told to give way. So there are shares, too:
//!
//! - A tenant that is alone may have all turns.
//! - While others ask, a tenant that has a quarter gets more only while a quarter stays free for them, and none while
//!   a tenant with less than a quarter waits.
//! - A free turn goes to the waiting tenant that has the fewest.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use stagegate_core::TenantId;
use tokio::{
    sync::oneshot,
    time::{Instant, timeout},
};

/// Calls that may wait at once; a further call is refused with a wait.
const WAITING_MAX: usize = 65_536;
/// How long a tenant counts as asking after it asked.
const ASKS_FOR: Duration = Duration::from_secs(10);

/// So many may go at once.
#[derive(Debug, Clone)]
pub(crate) struct Turns {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    at_once: usize,
    free: usize,
    /// Those who wait, or waited until they gave up.
    waiting: usize,
    /// The tenants that have a turn or wait for one.
    by_tenant: HashMap<TenantId, Tenant>,
    /// The tenants with waiting calls. The first of those with the fewest turns is next.
    order: VecDeque<TenantId>,
    /// The tenant that asked last, and the one before that was another.
    asked: [Option<(TenantId, Instant)>; 2],
}

#[derive(Debug, Default)]
struct Tenant {
    turns: usize,
    waiting: VecDeque<oneshot::Sender<Turn>>,
}

/// A turn; the next one begins when it is dropped.
#[derive(Debug)]
pub(crate) struct Turn {
    turns: Turns,
    tenant: TenantId,
}

/// Too many wait already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Full;

impl Turns {
    pub(crate) fn new(at_once: usize) -> Self {
        let at_once = at_once.max(1);
        let inner = Inner {
            at_once,
            free: at_once,
            waiting: 0,
            by_tenant: HashMap::new(),
            order: VecDeque::new(),
            asked: [None, None],
        };
        Self { inner: Arc::new(Mutex::new(inner)) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a turn.
    pub(crate) async fn take(&self, tenant: &TenantId) -> Result<Turn, Full> {
        let mut waiter = {
            let inner = &mut *self.lock();
            let now = Instant::now();
            inner.note_asker(tenant, now);
            // Who waits already goes first.
            let has_line = inner.by_tenant.get(tenant).is_some_and(|of| !of.waiting.is_empty());
            if !has_line && inner.may_have(tenant, now) {
                inner.begin(tenant);
                return Ok(Turn { turns: self.clone(), tenant: tenant.clone() });
            }
            if inner.waiting >= WAITING_MAX {
                inner.forget_those_who_gave_up();
            }
            if inner.waiting >= WAITING_MAX {
                return Err(Full);
            }
            inner.enqueue(tenant)
        };
        self.settle(|_| {});
        loop {
            match timeout(ASKS_FOR, &mut waiter).await {
                Ok(turn) => return turn.map_err(|_| Full),
                // What is kept free for others is given away once they ask no more.
                Err(_) => self.settle(|_| {}),
            }
        }
    }

    /// Makes a change, and gives what is free to those who are next.
    fn settle(&self, change: impl FnOnce(&mut Inner)) {
        let given = {
            let inner = &mut *self.lock();
            change(inner);
            let mut given = Vec::new();
            while let Some((tenant, waiter)) = inner.next(Instant::now()) {
                given.push((waiter, Turn { turns: self.clone(), tenant }));
            }
            given
        };
        // A waiter that is dropped gives back what it was given, for it holds the turn.
        for (waiter, turn) in given {
            drop(waiter.send(turn));
        }
    }
}

fn quarter(at_once: usize) -> usize {
    (at_once / 4).max(1)
}

impl Inner {
    fn note_asker(&mut self, tenant: &TenantId, now: Instant) {
        match &mut self.asked {
            [Some((last, at)), _] if last == tenant => *at = now,
            asked => {
                asked.swap(0, 1);
                asked[0] = Some((tenant.clone(), now));
            }
        }
    }

    /// Whether it would have no more than a quarter with one more.
    fn is_within(&self, tenant: &TenantId) -> bool {
        self.by_tenant.get(tenant).is_none_or(|of| of.turns < quarter(self.at_once))
    }

    /// Whether it may have one more now.
    fn may_have(&mut self, tenant: &TenantId, now: Instant) -> bool {
        if self.free == 0 {
            return false;
        }
        if self.is_within(tenant) {
            return true;
        }
        self.forget_first_that_gave_up();
        if self.order.iter().any(|other| other != tenant && self.is_within(other)) {
            return false;
        }
        let asks = |(name, at): &(TenantId, Instant)| name != tenant && now.duration_since(*at) < ASKS_FOR;
        let has_turns = |(name, of): (&TenantId, &Tenant)| name != tenant && of.turns > 0;
        let is_alone = !self.asked.iter().flatten().any(asks) && !self.by_tenant.iter().any(has_turns);
        is_alone || self.free > quarter(self.at_once)
    }

    fn begin(&mut self, tenant: &TenantId) {
        self.free -= 1;
        self.by_tenant.entry(tenant.clone()).or_default().turns += 1;
    }

    fn end(&mut self, tenant: &TenantId) {
        self.free += 1;
        if let Some(of) = self.by_tenant.get_mut(tenant) {
            of.turns -= 1;
            if of.turns == 0 && of.waiting.is_empty() {
                self.by_tenant.remove(tenant);
            }
        }
    }

    fn enqueue(&mut self, tenant: &TenantId) -> oneshot::Receiver<Turn> {
        let (sender, receiver) = oneshot::channel();
        self.waiting += 1;
        let of = self.by_tenant.entry(tenant.clone()).or_default();
        if of.waiting.is_empty() {
            self.order.push_back(tenant.clone());
        }
        of.waiting.push_back(sender);
        receiver
    }

    /// Who is next, and has its turn from here on.
    fn next(&mut self, now: Instant) -> Option<(TenantId, oneshot::Sender<Turn>)> {
        if self.free == 0 {
            return None;
        }
        self.forget_first_that_gave_up();
        let turns = |tenant: &TenantId| self.by_tenant.get(tenant).map_or(0, |of| of.turns);
        // The first of those that have as few.
        let (at, _) = self.order.iter().enumerate().min_by_key(|(_, tenant)| turns(tenant))?;
        let tenant = self.order.get(at)?.clone();
        if !self.may_have(&tenant, now) {
            return None;
        }
        self.order.remove(at);
        let of = self.by_tenant.get_mut(&tenant)?;
        let waiter = of.waiting.pop_front()?;
        self.waiting -= 1;
        if !of.waiting.is_empty() {
            self.order.push_back(tenant.clone());
        }
        self.begin(&tenant);
        Some((tenant, waiter))
    }

    /// Those at the head of their tenant's queue: a tenant whose waiters are all gone does not ask.
    fn forget_first_that_gave_up(&mut self) {
        let waiting = &mut self.waiting;
        forget(&mut self.order, &mut self.by_tenant, |queue| {
            while queue.front().is_some_and(oneshot::Sender::is_closed) {
                queue.pop_front();
                *waiting -= 1;
            }
        });
    }

    fn forget_those_who_gave_up(&mut self) {
        forget(&mut self.order, &mut self.by_tenant, |queue| queue.retain(|waiter| !waiter.is_closed()));
        self.waiting = self.by_tenant.values().map(|of| of.waiting.len()).sum();
    }
}

/// Removes some waiting calls, and the tenants that have none left.
fn forget(
    order: &mut VecDeque<TenantId>,
    by_tenant: &mut HashMap<TenantId, Tenant>,
    mut some: impl FnMut(&mut VecDeque<oneshot::Sender<Turn>>),
) {
    order.retain(|tenant| {
        let Some(of) = by_tenant.get_mut(tenant) else { return false };
        some(&mut of.waiting);
        let is_left = !of.waiting.is_empty();
        if !is_left && of.turns == 0 {
            by_tenant.remove(tenant);
        }
        is_left
    });
}

impl Drop for Turn {
    fn drop(&mut self) {
        let tenant = &self.tenant;
        self.turns.settle(|inner| inner.end(tenant));
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt, future::BoxFuture};

    use super::*;

    fn tenant(name: &str) -> TenantId {
        TenantId::new(name).expect("a slug")
    }

    /// A waiting call.
    fn waiter(turns: &Turns, name: &str) -> BoxFuture<'static, Result<Turn, Full>> {
        let (turns, tenant) = (turns.clone(), tenant(name));
        let mut waiter = async move { turns.take(&tenant).await }.boxed();
        assert!((&mut waiter).now_or_never().is_none(), "no turn is free");
        waiter
    }

    fn has_turn(waiter: &mut BoxFuture<'static, Result<Turn, Full>>) -> Option<Turn> {
        waiter.now_or_never().map(|turn| turn.expect("a turn"))
    }

    #[tokio::test]
    async fn tenants_go_one_after_the_other() {
        let turns = Turns::new(1);
        let first = turns.take(&tenant("a")).await.expect("free");
        let mut many: Vec<_> = (0..3).map(|_| waiter(&turns, "a")).collect();
        let mut other = waiter(&turns, "b");
        drop(first);
        let turn = has_turn(&mut many[0]).expect("who came first");
        drop(turn);
        let turn = has_turn(&mut other).expect("the other tenant, though two came before it");
        drop(turn);
        drop(has_turn(&mut many[1]).expect("the first tenant again"));
        drop(has_turn(&mut many[2]).expect("and again"));
        turns.take(&tenant("a")).now_or_never().expect("free").expect("a turn");
    }

    #[tokio::test]
    async fn a_waiter_that_gives_up_costs_no_turn() {
        let turns = Turns::new(1);
        let first = turns.take(&tenant("a")).await.expect("free");
        let (gone, mut given, mut last) = (waiter(&turns, "a"), waiter(&turns, "a"), waiter(&turns, "a"));
        drop(gone);
        drop(first);
        // This one was given the turn and is dropped before it knew.
        drop(std::mem::replace(&mut given, futures::future::pending().boxed()));
        drop(has_turn(&mut last).expect("the last of them"));
        turns.take(&tenant("b")).now_or_never().expect("free").expect("a turn");
    }

    #[tokio::test]
    async fn waiting_calls_are_bounded_and_abandoned_ones_do_not_count() {
        let turns = Turns::new(1);
        let _first = turns.take(&tenant("a")).await.expect("free");
        let waiters: Vec<_> = (0..WAITING_MAX).map(|_| waiter(&turns, "a")).collect();
        assert_eq!(turns.take(&tenant("b")).await.expect_err("full"), Full);
        drop(waiters);
        drop(waiter(&turns, "b"));
        assert_eq!(turns.lock().waiting, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_tenant_that_is_alone_has_all_and_gets_no_more_once_another_waits() {
        let (turns, a, b) = (Turns::new(8), tenant("a"), tenant("b"));
        let mut of_a = Vec::new();
        for _ in 0..8 {
            of_a.push(turns.take(&a).now_or_never().expect("alone").expect("a turn"));
        }
        let (mut more_of_a, mut first, mut second) = (waiter(&turns, "a"), waiter(&turns, "b"), waiter(&turns, "b"));
        drop(of_a.pop());
        let of_b = has_turn(&mut first).expect("who has the least");
        assert!(has_turn(&mut more_of_a).is_none());
        drop(of_a.pop());
        let also_of_b = has_turn(&mut second).expect("up to a quarter");
        // Two stay free for the others from here on.
        drop(of_a.pop());
        drop(of_a.pop());
        assert!(has_turn(&mut more_of_a).is_none());
        drop(of_a.pop());
        let third = has_turn(&mut more_of_a).expect("a quarter is free beside it");
        let mut fourth = waiter(&turns, "a");
        drop((of_b, also_of_b));
        drop(has_turn(&mut fourth).expect("more is free"));
        let of_b = turns.take(&b).now_or_never().expect("it is kept for others").expect("a turn");
        drop((third, of_b));
    }

    #[tokio::test(start_paused = true)]
    async fn reserved_turns_are_granted_once_no_other_tenant_asks() {
        let (turns, a) = (Turns::new(4), tenant("a"));
        drop(turns.take(&tenant("b")).await.expect("free"));
        let _of_a: Vec<_> = [turns.take(&a).await, turns.take(&a).await, turns.take(&a).await].into();
        let start = Instant::now();
        let _last = turns.take(&a).await.expect("all of it, in the end");
        assert_eq!(start.elapsed(), ASKS_FOR);
    }

    #[tokio::test]
    async fn a_tenant_whose_waiters_gave_up_keeps_nothing_from_others() {
        let (turns, a) = (Turns::new(4), tenant("a"));
        let mut of_a = Vec::new();
        for _ in 0..4 {
            of_a.push(turns.take(&a).await.expect("alone"));
        }
        drop(waiter(&turns, "b"));
        let mut more_of_a = waiter(&turns, "a");
        drop(of_a.pop());
        drop(of_a.pop());
        assert!(has_turn(&mut more_of_a).is_some(), "one stays free beside it");
    }
}
