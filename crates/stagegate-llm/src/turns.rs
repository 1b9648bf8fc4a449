//! Turns: owns who goes next where only so many may go at once. Those who wait go one tenant after the other, each
//! tenant's in the order in which they came, so that a tenant that asks much delays others by one turn each.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use stagegate_core::TenantId;
use tokio::sync::oneshot;

/// Who may wait at once; past it the caller is told to come back.
const WAITING_MAX: usize = 65_536;

/// So many may go at once.
#[derive(Debug, Clone)]
pub(crate) struct Turns {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    free: usize,
    /// Those who wait, or waited until they gave up.
    waiting: usize,
    by_tenant: HashMap<TenantId, VecDeque<oneshot::Sender<Turn>>>,
    /// The tenants that have somebody waiting; the first of them is next.
    order: VecDeque<TenantId>,
}

/// A turn; the next one begins when it is dropped.
#[derive(Debug)]
pub(crate) struct Turn {
    turns: Turns,
}

/// Too many wait already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Full;

impl Turns {
    pub(crate) fn new(at_once: usize) -> Self {
        let inner = Inner { free: at_once.max(1), waiting: 0, by_tenant: HashMap::new(), order: VecDeque::new() };
        Self { inner: Arc::new(Mutex::new(inner)) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a turn.
    pub(crate) async fn take(&self, tenant: &TenantId) -> Result<Turn, Full> {
        let waiter = {
            let inner = &mut *self.lock();
            if inner.free > 0 {
                inner.free -= 1;
                return Ok(Turn { turns: self.clone() });
            }
            if inner.waiting >= WAITING_MAX {
                inner.forget_those_who_gave_up();
            }
            if inner.waiting >= WAITING_MAX {
                return Err(Full);
            }
            inner.enqueue(tenant)
        };
        waiter.await.map_err(|_| Full)
    }

    /// Gives a turn to whoever is next.
    fn pass_on(&self) {
        let mut turn = Turn { turns: self.clone() };
        loop {
            let next = {
                let inner = &mut *self.lock();
                let next = inner.next();
                if next.is_none() {
                    inner.free += 1;
                }
                next
            };
            let Some(next) = next else { break };
            // A waiter that is dropped later gives on what it was given, for it holds the turn.
            match next.send(turn) {
                Ok(()) => return,
                Err(back) => turn = back,
            }
        }
        // It is free: nothing is left to be given on.
        std::mem::forget(turn);
    }
}

impl Inner {
    fn enqueue(&mut self, tenant: &TenantId) -> oneshot::Receiver<Turn> {
        let (sender, receiver) = oneshot::channel();
        self.waiting += 1;
        if let Some(queue) = self.by_tenant.get_mut(tenant) {
            queue.push_back(sender);
        } else {
            self.by_tenant.insert(tenant.clone(), VecDeque::from([sender]));
            self.order.push_back(tenant.clone());
        }
        receiver
    }

    fn next(&mut self) -> Option<oneshot::Sender<Turn>> {
        let tenant = self.order.pop_front()?;
        let queue = self.by_tenant.get_mut(&tenant)?;
        let next = queue.pop_front();
        self.waiting -= usize::from(next.is_some());
        if queue.is_empty() {
            self.by_tenant.remove(&tenant);
        } else {
            self.order.push_back(tenant);
        }
        next
    }

    fn forget_those_who_gave_up(&mut self) {
        let by_tenant = &mut self.by_tenant;
        self.order.retain(|tenant| {
            let Some(queue) = by_tenant.get_mut(tenant) else { return false };
            queue.retain(|waiter| !waiter.is_closed());
            let is_left = !queue.is_empty();
            if !is_left {
                by_tenant.remove(tenant);
            }
            is_left
        });
        self.waiting = self.by_tenant.values().map(VecDeque::len).sum();
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.turns.pass_on();
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt, future::BoxFuture};

    use super::*;

    fn tenant(name: &str) -> TenantId {
        TenantId::new(name).expect("a slug")
    }

    /// Somebody who waits.
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
    async fn those_who_wait_are_bounded_and_those_who_gave_up_do_not_count() {
        let turns = Turns::new(1);
        let _first = turns.take(&tenant("a")).await.expect("free");
        let waiters: Vec<_> = (0..WAITING_MAX).map(|_| waiter(&turns, "a")).collect();
        assert_eq!(turns.take(&tenant("b")).await.expect_err("full"), Full);
        drop(waiters);
        drop(waiter(&turns, "b"));
        assert_eq!(turns.lock().waiting, 1);
    }
}
