//! Doors: owns whether a call to a model may start now. Each model has one door: its breaker, and its pace after it asked
//! for a pause.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use stagegate_core::{ModelRef, TenantId};
use tokio::time::Instant;

use crate::{
    breaker::{Breaker, BreakerState, Permit, Refusal},
    config::BreakerConfig,
    meter::Meter,
    pace::Pace,
    turns::{Full, Turns},
};

/// Models that have a door. Past it the least recently used door is removed, but never one that a call uses.
const DOORS_MAX: usize = 1_024;

/// The door of one model.
#[derive(Debug)]
pub(crate) struct Door {
    breaker: Breaker,
    pace: Mutex<Pace>,
    /// The order of calls while the pace spaces them.
    queue: Turns,
}

/// Why a call does not start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shut {
    /// The breaker is open, for this long.
    Breaker(Duration),
    /// The model asked for a pause, for this long.
    Told(Duration),
    /// Other calls probe, and keep their places for this long at most: see [`Door::probed`].
    Probing(Duration),
    /// Too many wait.
    Full,
}

impl From<Refusal> for Shut {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Open(left) => Self::Breaker(left),
            Refusal::Probing(left) => Self::Probing(left),
        }
    }
}

impl Door {
    fn new(config: Arc<BreakerConfig>) -> Self {
        Self { breaker: Breaker::new(config), pace: Mutex::default(), queue: Turns::new(1) }
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a probing call has a result, or leaves its place.
    pub(crate) async fn probed(&self) -> Result<(), Shut> {
        self.breaker.passable().await.map_err(Shut::Breaker)
    }

    /// Waits for a place among the calls that the pace spaces. A call that would be refused does not wait.
    pub(crate) async fn pass(&self, tenant: &TenantId) -> Result<(), Shut> {
        if let Some(refusal) = self.breaker.refusal() {
            return Err(refusal.into());
        }
        if !self.paced()? {
            return Ok(());
        }
        let turn = self.queue.take(tenant).await.map_err(|Full| Shut::Full)?;
        if self.paced()? {
            let at = self.pace().next(Instant::now());
            tokio::time::sleep_until(at).await;
        }
        drop(turn);
        Ok(())
    }

    fn paced(&self) -> Result<bool, Shut> {
        let (mut pace, now) = (self.pace(), Instant::now());
        match pace.held(now) {
            Some(left) => Err(Shut::Told(left)),
            None => Ok(pace.is_paced()),
        }
    }

    /// Lets a call start now, or returns why not.
    pub(crate) fn admit(&self) -> Result<Permit, Shut> {
        self.paced()?;
        self.breaker.admit().map_err(Shut::from)
    }

    /// The model answered.
    pub(crate) fn answered(&self) {
        self.pace().answered(Instant::now());
    }

    /// The model asked to wait so long.
    pub(crate) fn asked_to_wait(&self, told: Duration) {
        self.pace().asked_to_wait(told, Instant::now());
    }

    /// Where its breaker stands.
    pub(crate) fn state(&self) -> BreakerState {
        self.breaker.state()
    }

    /// Whether it knows nothing that matters: neither a failure nor a wish to wait.
    fn is_untroubled(&self) -> bool {
        let mut pace = self.pace();
        self.breaker.has_no_failure() && pace.held(Instant::now()).is_none() && !pace.is_paced()
    }
}

/// The doors of the models.
#[derive(Debug)]
pub(crate) struct Doors {
    config: Arc<BreakerConfig>,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    by_model: HashMap<ModelRef, Kept>,
    /// Counts uses.
    uses: u64,
}

#[derive(Debug)]
struct Kept {
    door: Arc<Door>,
    /// Its last use.
    used: u64,
}

impl Known {
    /// Makes room for one more: of those that no call is at, one that knows nothing that matters, else one that is closed,
    /// else any; the least recently used of them. Where all are in use there are more of them for a while, as many as calls.
    fn make_room(&mut self) {
        if self.by_model.len() < DOORS_MAX {
            return;
        }
        let rank = |kept: &Kept| {
            let troubled = !kept.door.is_untroubled();
            (troubled, troubled && kept.door.state() != BreakerState::Closed, kept.used)
        };
        let idle = self.by_model.iter().filter(|(_, kept)| Arc::strong_count(&kept.door) == 1);
        let first = idle.min_by_key(|(_, kept)| rank(kept)).map(|(model, _)| model.clone());
        if let Some(model) = first {
            self.by_model.remove(&model);
        }
    }
}

impl Doors {
    /// None yet.
    pub(crate) fn new(config: BreakerConfig) -> Self {
        Self { config: Arc::new(config), known: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The door of a model.
    pub(crate) fn of(&self, model: &ModelRef) -> Arc<Door> {
        let known = &mut *self.lock();
        known.uses += 1;
        let used = known.uses;
        if let Some(kept) = known.by_model.get_mut(model) {
            kept.used = used;
            return Arc::clone(&kept.door);
        }
        known.make_room();
        let door = Arc::new(Door::new(Arc::clone(&self.config)));
        known.by_model.insert(model.clone(), Kept { door: Arc::clone(&door), used });
        door
    }

    /// Removes the door of a model that the provider does not have: a made-up name must not take a real model's place.
    /// `door` is the caller's own; if another call still uses the door, that call removes it.
    pub(crate) fn forget(&self, model: &ModelRef, door: Arc<Door>) {
        let known = &mut *self.lock();
        drop(door);
        let is_idle = |kept: &Kept| Arc::strong_count(&kept.door) == 1 && kept.door.is_untroubled();
        if known.by_model.get(model).is_some_and(is_idle) {
            known.by_model.remove(model);
        }
    }

    /// Models of a provider whose breaker is open.
    pub(crate) fn open_of(&self, provider: &str) -> Vec<String> {
        let known = self.lock();
        let mut open: Vec<_> = known
            .by_model
            .iter()
            .filter(|(model, kept)| model.provider() == provider && kept.door.state() == BreakerState::Open)
            .map(|(model, _)| model.model().to_owned())
            .collect();
        open.sort();
        open
    }

    /// Publishes the state of a model. Models that share a label show the worst of them.
    pub(crate) fn publish(&self, model: &ModelRef, meter: &Meter) {
        let label = meter.labels(model);
        let known = self.lock();
        let worst = known
            .by_model
            .iter()
            .filter(|(other, _)| meter.labels(other) == label)
            .map(|(_, kept)| kept.door.state())
            .max()
            .unwrap_or(BreakerState::Closed);
        meter.breaker(model, worst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(name: &str) -> TenantId {
        TenantId::new(name).expect("a slug")
    }

    #[tokio::test(start_paused = true)]
    async fn a_model_that_asked_to_wait_is_left_alone_and_then_asked_at_its_pace() {
        let door = Arc::new(Door::new(Arc::default()));
        let told = Duration::from_secs(3);
        (0..10).for_each(|_| door.answered());
        door.asked_to_wait(told);
        assert_eq!(door.pass(&tenant("a")).await, Err(Shut::Told(told)));
        assert!(matches!(door.admit(), Err(Shut::Told(_))));
        tokio::time::advance(told).await;
        let start = Instant::now();
        // The last one is of another tenant, and does not go last.
        let callers: Vec<_> = ["a", "a", "a", "a", "b"]
            .into_iter()
            .map(|name| {
                let door = Arc::clone(&door);
                tokio::spawn(async move {
                    door.pass(&tenant(name)).await.expect("a place");
                    start.elapsed()
                })
            })
            .collect();
        let mut went = Vec::new();
        for caller in callers {
            went.push(caller.await.expect("no panic").as_millis() / 100);
        }
        assert_eq!(went, [0, 3, 6, 12, 9]);
    }

    fn model(n: usize) -> ModelRef {
        ModelRef::new(format!("sim/{n}")).expect("a model")
    }

    #[tokio::test(start_paused = true)]
    async fn doors_are_bounded_and_made_up_names_evict_no_door_with_a_state() {
        let doors = Doors::new(BreakerConfig { min_calls: 2, ..BreakerConfig::default() });
        let (paced, failing, open, used) = (model(0), model(1), model(2), model(3));
        (0..20).for_each(|_| doors.of(&paced).answered());
        doors.of(&paced).asked_to_wait(Duration::from_secs(3));
        tokio::time::advance(Duration::from_secs(3)).await;
        assert_eq!(doors.of(&paced).paced(), Ok(true));
        doors.of(&failing).admit().expect("closed").failure();
        for _ in 0..2 {
            doors.of(&open).admit().expect("closed").failure();
        }
        let at_it = doors.of(&used);
        for n in 4..3 * DOORS_MAX {
            let _ = doors.of(&model(n));
        }
        assert_eq!(doors.lock().by_model.len(), DOORS_MAX);
        assert_eq!(doors.of(&paced).paced(), Ok(true));
        assert!(!doors.of(&failing).breaker.has_no_failure());
        assert_eq!(doors.of(&open).state(), BreakerState::Open);
        assert!(Arc::ptr_eq(&at_it, &doors.of(&used)), "a call is at it");
    }

    #[tokio::test(start_paused = true)]
    async fn a_model_that_does_not_exist_has_no_door_once_its_last_call_is_over() {
        let doors = Doors::new(BreakerConfig::default());
        let (first, second) = (doors.of(&model(1)), doors.of(&model(1)));
        doors.forget(&model(1), first);
        assert_eq!(doors.lock().by_model.len(), 1, "another call is at it");
        doors.forget(&model(1), second);
        assert_eq!(doors.lock().by_model.len(), 0);
    }
}
