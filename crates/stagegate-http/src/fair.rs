//! Fair limits: owns how tenants share a limit, or peers if the tenant is not known yet.
//!
//! - A tenant that is alone may have all of it, or three quarters where what it holds may come back late
//!   ([`FairLimit::with_reserve`]).
//! - While others ask too, a tenant that has a quarter gets more only while a quarter stays free for them.
//! - A free place goes to the waiting tenant that has the least.
//! - A tenant that asks for more than a quarter has a quarter of the line at most, and the line has as many places again for
//!   tenants that ask for less.
//!
//! So a tenant that asks after others took everything waits for one return at most, or not at all if holders can be told to
//! give way ([`FairLimit::take_over`]).

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use stagegate_core::TenantId;
use tokio::{sync::oneshot, time::Instant};
use tokio_util::sync::CancellationToken;

/// How long a tenant counts as asking after it asked.
const ASKS_FOR: Duration = Duration::from_secs(10);

/// Who shares a limit: tenants, unless said otherwise.
pub(crate) trait Sharer: Ord + Clone {}
impl<T: Ord + Clone> Sharer for T {}

/// A limit that tenants share.
#[derive(Debug)]
pub(crate) struct FairLimit<T: Sharer = TenantId> {
    capacity: usize,
    waiting_max: usize,
    /// A quarter stays free for others also while a tenant is alone: what is held here may come back late.
    has_reserve: bool,
    state: Mutex<State<T>>,
}

#[derive(Debug)]
struct State<T: Sharer> {
    used: usize,
    waiting: usize,
    /// Those that hold something or wait.
    tenants: BTreeMap<T, Tenant<T>>,
    /// The tenant that asked last, and the one before that was another.
    asked: [Option<(T, Instant)>; 2],
    next: u64,
}

#[derive(Debug)]
struct Tenant<T: Sharer> {
    used: usize,
    waiting: VecDeque<Waiting<T>>,
    /// Those of its permits that can be told to give way, the oldest first.
    holders: BTreeMap<u64, (usize, CancellationToken)>,
}

impl<T: Sharer> Default for Tenant<T> {
    fn default() -> Self {
        Self { used: 0, waiting: VecDeque::new(), holders: BTreeMap::new() }
    }
}

#[derive(Debug)]
struct Waiting<T: Sharer> {
    id: u64,
    weight: usize,
    granted: oneshot::Sender<Permit<T>>,
}

/// Refused: the tenant has its share, or too many wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Full;

/// What a tenant holds; given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Permit<T: Sharer = TenantId> {
    limit: Arc<FairLimit<T>>,
    tenant: T,
    weight: usize,
    /// Of one that can be told to give way.
    id: Option<u64>,
}

impl<T: Sharer> FairLimit<T> {
    /// A limit of `capacity`. `waiting_max` requests of tenants past a quarter may wait, and as many again of other tenants.
    pub(crate) fn new(capacity: usize, waiting_max: usize) -> Arc<Self> {
        Arc::new(Self::of(capacity, waiting_max, false))
    }

    /// The same for a thing that a client can hold for long: a tenant that holds some gets more only while a quarter stays
    /// free, also while it is alone.
    pub(crate) fn with_reserve(capacity: usize, waiting_max: usize) -> Arc<Self> {
        Arc::new(Self::of(capacity, waiting_max, true))
    }

    fn of(capacity: usize, waiting_max: usize, has_reserve: bool) -> Self {
        let state = State { used: 0, waiting: 0, tenants: BTreeMap::new(), asked: [None, None], next: 0 };
        Self { capacity: capacity.max(1), waiting_max, has_reserve, state: Mutex::new(state) }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes one place. A tenant that has its share is refused at once; a tenant that has less waits for a return.
    pub(crate) async fn take(self: &Arc<Self>, tenant: &T) -> Result<Permit<T>, Full> {
        self.acquire(tenant, 1, false).await
    }

    /// Takes `weight` places, and waits for them, also beyond the tenant's share.
    pub(crate) async fn wait_for(self: &Arc<Self>, tenant: &T, weight: usize) -> Result<Permit<T>, Full> {
        self.acquire(tenant, weight.clamp(1, self.capacity), true).await
    }

    async fn acquire(self: &Arc<Self>, tenant: &T, weight: usize, patient: bool) -> Result<Permit<T>, Full> {
        let (id, granted) = {
            let mut state = self.state();
            state.note_asker(tenant, Instant::now());
            if state.may_have(self, tenant, weight, Instant::now()) {
                return Ok(self.grant(&mut state, tenant, weight, None));
            }
            if !state.may_wait(self, tenant, weight, patient) {
                return Err(Full);
            }
            state.next += 1;
            state.waiting += 1;
            let (sender, granted) = oneshot::channel();
            let id = state.next;
            state.tenants.entry(tenant.clone()).or_default().waiting.push_back(Waiting { id, weight, granted: sender });
            (id, granted)
        };
        let mut place = InLine { limit: self, tenant, id, waits: true };
        let permit = granted.await.map_err(|_| Full);
        place.waits = false;
        permit
    }

    /// Takes one place whose holder can be told to give way by `gives_way`. A tenant that has less than a quarter takes over
    /// the newest place of the tenant that has the most, if that one has more than a quarter. Never waits.
    pub(crate) fn take_over(self: &Arc<Self>, tenant: &T, gives_way: &CancellationToken) -> Result<Permit<T>, Full> {
        let mut state = self.state();
        state.note_asker(tenant, Instant::now());
        if !state.may_have(self, tenant, 1, Instant::now()) {
            if !state.is_within(self.capacity, tenant, 1) {
                return Err(Full);
            }
            let quarter = quarter(self.capacity);
            let largest = state.tenants.iter().max_by_key(|(_, each)| each.used);
            let largest = largest.filter(|(_, each)| each.used > quarter).map(|(name, _)| name.clone());
            let newest = largest.and_then(|name| {
                let (_, (weight, told)) = state.tenants.get_mut(&name)?.holders.pop_last()?;
                Some((name, weight, told))
            });
            let (name, weight, told) = newest.ok_or(Full)?;
            told.cancel();
            state.give_back(&name, weight);
        }
        Ok(self.grant(&mut state, tenant, 1, Some(gives_way)))
    }

    fn grant(
        self: &Arc<Self>,
        state: &mut State<T>,
        tenant: &T,
        weight: usize,
        gives_way: Option<&CancellationToken>,
    ) -> Permit<T> {
        state.used += weight;
        state.next += 1;
        let id = gives_way.map(|_| state.next);
        let entry = state.tenants.entry(tenant.clone()).or_default();
        entry.used += weight;
        if let (Some(id), Some(token)) = (id, gives_way) {
            entry.holders.insert(id, (weight, token.clone()));
        }
        Permit { limit: Arc::clone(self), tenant: tenant.clone(), weight, id }
    }

    /// Hands out what is free, to the one that has least first.
    fn hand_out(self: &Arc<Self>, state: &mut State<T>) -> Vec<(oneshot::Sender<Permit<T>>, Permit<T>)> {
        let mut given = Vec::new();
        while state.waiting > 0 {
            let first = |tenant: &Tenant<T>| tenant.waiting.front().map(|first| first.id);
            let next =
                state.tenants.iter().filter_map(|(name, tenant)| Some((tenant.used, first(tenant)?, name))).min();
            let Some((_, _, name)) = next else { break };
            let name = name.clone();
            let Some(weight) = state.tenants.get(&name).and_then(|tenant| Some(tenant.waiting.front()?.weight)) else {
                break;
            };
            if !state.may_have(self, &name, weight, Instant::now()) {
                break;
            }
            state.waiting -= 1;
            let waiting = state.tenants.get_mut(&name).and_then(|tenant| tenant.waiting.pop_front());
            let permit = self.grant(state, &name, weight, None);
            if let Some(waiting) = waiting {
                given.push((waiting.granted, permit));
            }
        }
        given
    }

    /// After something was given back. A permit whose asker has gone is given back in turn.
    fn settle(self: &Arc<Self>, change: impl FnOnce(&mut State<T>)) {
        let given = {
            let mut state = self.state();
            change(&mut state);
            self.hand_out(&mut state)
        };
        for (asker, permit) in given {
            drop(asker.send(permit));
        }
    }
}

fn quarter(capacity: usize) -> usize {
    (capacity / 4).max(1)
}

impl<T: Sharer> State<T> {
    fn note_asker(&mut self, tenant: &T, now: Instant) {
        match &mut self.asked {
            [Some((last, at)), _] if last == tenant => *at = now,
            asked => {
                asked.swap(0, 1);
                asked[0] = Some((tenant.clone(), now));
            }
        }
    }

    fn used_by(&self, tenant: &T) -> usize {
        self.tenants.get(tenant).map_or(0, |each| each.used)
    }

    /// Whether it would have no more than a quarter. The first place of a tenant is within, at any weight.
    fn is_within(&self, capacity: usize, tenant: &T, weight: usize) -> bool {
        let used = self.used_by(tenant);
        used == 0 || used + weight <= quarter(capacity)
    }

    /// Whether it may stand in line: those whose wishes, with all that they wait for, are within their share, find a place
    /// though others fill theirs.
    fn may_wait(&self, limit: &FairLimit<T>, tenant: &T, weight: usize, patient: bool) -> bool {
        let (used, waiting, in_line) = self.tenants.get(tenant).map_or((0, 0, 0), |each| {
            (each.used, each.waiting.len(), each.waiting.iter().map(|waiting| waiting.weight).sum::<usize>())
        });
        let wished = used + in_line;
        if wished == 0 || wished + weight <= quarter(limit.capacity) {
            self.waiting < 2 * limit.waiting_max
        } else {
            patient && waiting < limit.waiting_max / 4 && self.waiting < limit.waiting_max
        }
    }

    /// Whether it may have so much now.
    fn may_have(&self, limit: &FairLimit<T>, tenant: &T, weight: usize, now: Instant) -> bool {
        let capacity = limit.capacity;
        let free = capacity - self.used.min(capacity);
        if weight > free {
            return false;
        }
        if self.is_within(capacity, tenant, weight) {
            return true;
        }
        let others = || self.tenants.iter().filter(|(name, _)| *name != tenant);
        if others().any(|(name, each)| each.waiting.front().is_some_and(|w| self.is_within(capacity, name, w.weight))) {
            return false;
        }
        let asks = |(name, at): &(T, Instant)| name != tenant && now.duration_since(*at) < ASKS_FOR;
        let has_all = !limit.has_reserve && others().all(|(_, each)| each.used == 0);
        (has_all && !self.asked.iter().flatten().any(asks)) || free - weight >= quarter(capacity)
    }

    fn give_back(&mut self, tenant: &T, weight: usize) {
        self.used -= weight;
        if let Some(each) = self.tenants.get_mut(tenant) {
            each.used -= weight;
            self.forget(tenant);
        }
    }

    /// Forgets a tenant that holds nothing and does not wait.
    fn forget(&mut self, tenant: &T) {
        if self.tenants.get(tenant).is_some_and(|each| each.used == 0 && each.waiting.is_empty()) {
            self.tenants.remove(tenant);
        }
    }
}

impl<T: Sharer> Drop for Permit<T> {
    fn drop(&mut self) {
        let (tenant, weight, id) = (&self.tenant, self.weight, self.id);
        self.limit.settle(|state| {
            if let Some(id) = id
                && state.tenants.get_mut(tenant).is_none_or(|each| each.holders.remove(&id).is_none())
            {
                return; // Another has taken it over.
            }
            state.give_back(tenant, weight);
        });
    }
}

/// A place in line; left when the asker goes away.
struct InLine<'a, T: Sharer> {
    limit: &'a Arc<FairLimit<T>>,
    tenant: &'a T,
    id: u64,
    waits: bool,
}

impl<T: Sharer> Drop for InLine<'_, T> {
    fn drop(&mut self) {
        if !self.waits {
            return;
        }
        let (tenant, id) = (self.tenant, self.id);
        self.limit.settle(|state| {
            let Some(each) = state.tenants.get_mut(tenant) else { return };
            let before = each.waiting.len();
            each.waiting.retain(|waiting| waiting.id != id);
            state.waiting -= before - each.waiting.len();
            state.forget(tenant);
        });
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    fn tenant(name: &str) -> TenantId {
        TenantId::new(name).expect("valid")
    }

    fn now(limit: &Arc<FairLimit>, name: &str) -> Option<Result<Permit, Full>> {
        let tenant = tenant(name);
        limit.take(&tenant).now_or_never()
    }

    #[test]
    fn a_tenant_that_is_alone_leaves_a_reserve_to_those_that_come_later() {
        let limit = FairLimit::with_reserve(8, 10);
        let all: Vec<_> = (0..8).map_while(|_| limit.wait_for(&tenant("a"), 1).now_or_never()).collect();
        assert_eq!(all.len(), 6);
        let newcomer = tenant("b");
        assert!(limit.wait_for(&newcomer, 2).now_or_never().is_some(), "it waits for no return");
    }

    #[test]
    fn a_tenant_that_is_alone_has_all_of_it() {
        let limit = FairLimit::new(8, 8);
        let held: Vec<_> = (0..8).map(|_| now(&limit, "a").expect("at once").expect("a permit")).collect();
        assert_eq!(now(&limit, "a").expect("at once").expect_err("none is left"), Full);
        drop(held);
        assert!(limit.state().tenants.is_empty() && limit.state().used == 0);
    }

    #[test]
    fn a_tenant_that_comes_late_gets_what_is_returned_first() {
        let limit = FairLimit::new(8, 8);
        let mut held: Vec<_> = (0..8).map(|_| now(&limit, "a").expect("at once").expect("a permit")).collect();
        let late = tenant("b");
        let mut waits = Box::pin(limit.take(&late));
        assert!((&mut waits).now_or_never().is_none());
        assert_eq!(now(&limit, "a").expect("at once").expect_err("a has more than a quarter"), Full);
        held.pop();
        let permit = waits.now_or_never().expect("granted").expect("a permit");
        assert_eq!(limit.state().used_by(&late), 1);
        drop((permit, held));
        assert!(limit.state().tenants.is_empty());
    }

    #[test]
    fn while_others_ask_a_quarter_stays_free_for_them() {
        let limit = FairLimit::new(8, 8);
        drop(now(&limit, "b"));
        let held: Vec<_> = (0..8).filter_map(|_| now(&limit, "a").expect("at once").ok()).collect();
        assert_eq!(held.len(), 6);
        let others: Vec<_> = (0..2).map(|_| now(&limit, "b").expect("at once").expect("a permit")).collect();
        drop((held, others));
    }

    #[test]
    fn one_that_goes_away_while_it_waits_leaves_nothing_behind() {
        let limit = FairLimit::new(1, 1);
        let held = now(&limit, "a").expect("at once").expect("a permit");
        let other = tenant("b");
        let mut waits = Box::pin(limit.take(&other));
        assert!((&mut waits).now_or_never().is_none());
        let third = tenant("c");
        let also_waits = Box::pin(limit.take(&third));
        assert!(also_waits.now_or_never().is_none(), "within its share");
        assert_eq!(limit.state().waiting, 1, "and gone again");
        drop(waits);
        assert_eq!(limit.state().waiting, 0);
        let mut granted = Box::pin(limit.take(&other));
        assert!((&mut granted).now_or_never().is_none());
        drop(held);
        drop(granted); // Granted, and never looked at.
        assert!(limit.state().tenants.is_empty() && limit.state().used == 0);
    }

    #[test]
    fn a_tenant_that_wants_more_than_its_share_leaves_the_line_to_others() {
        let limit = FairLimit::new(8, 8);
        let (a, b) = (tenant("a"), tenant("b"));
        let take = |weight| limit.wait_for(&a, weight).now_or_never().expect("at once").expect("a permit");
        let (one, other) = (take(4), take(4));
        let mut line: Vec<_> = (0..2).map(|_| Box::pin(limit.wait_for(&a, 1))).collect();
        assert!(line.iter_mut().all(|waits| waits.now_or_never().is_none()), "a quarter of the line");
        assert_eq!(limit.wait_for(&a, 1).now_or_never().expect("at once").expect_err("no more"), Full);
        let mut first = Box::pin(limit.wait_for(&b, 4));
        assert!((&mut first).now_or_never().is_none(), "another finds its place");
        drop(one);
        let first = first.now_or_never().expect("before those of a").expect("a permit");
        assert!(line.iter_mut().all(|waits| waits.now_or_never().is_none()));
        drop((other, first));
        assert!(line.iter_mut().all(|waits| waits.now_or_never().is_some_and(|permit| permit.is_ok())));
    }

    #[test]
    fn what_can_give_way_does_so_for_a_tenant_that_has_less_than_a_quarter() {
        let limit = FairLimit::new(8, 0);
        let (a, b) = (tenant("a"), tenant("b"));
        let tokens: Vec<_> = (0..8).map(|_| CancellationToken::new()).collect();
        let held: Vec<_> = tokens.iter().map(|token| limit.take_over(&a, token).expect("alone")).collect();
        let new = CancellationToken::new();
        let first = limit.take_over(&b, &new).expect("the newest of a gives way");
        assert!(tokens[7].is_cancelled() && !tokens[6].is_cancelled());
        let second = limit.take_over(&b, &new).expect("b has a quarter then");
        assert_eq!(limit.take_over(&b, &new).expect_err("and no more"), Full);
        drop(held);
        let used = limit.state().used;
        assert_eq!((used, limit.state().used_by(&b)), (2, 2), "what was taken over is not returned twice");
        drop((first, second));
        assert!(limit.state().tenants.is_empty());
    }

    #[test]
    fn a_large_weight_waits_until_it_fits_and_is_not_overtaken_for_ever() {
        let limit = FairLimit::new(8, 8);
        let (a, b) = (tenant("a"), tenant("b"));
        let small = limit.wait_for(&a, 4).now_or_never().expect("at once").expect("a permit");
        let mut large = Box::pin(limit.wait_for(&b, 100));
        assert!((&mut large).now_or_never().is_none(), "it is cut to all there is");
        assert!(limit.wait_for(&a, 1).now_or_never().is_none(), "a has more than a quarter, and b waits");
        drop(small);
        let large = large.now_or_never().expect("granted").expect("a permit");
        assert_eq!(limit.state().used, 8);
        drop(large);
        assert_eq!(limit.state().used, 0);
    }
}
