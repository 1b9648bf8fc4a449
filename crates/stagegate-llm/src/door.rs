//! Doors: owns whether a model is asked now. One door a model: its breaker, and its pace once it asked to wait.

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

/// Models that have a door, at most. Past it those are forgotten whose breaker is closed: they hold little else.
const DOORS_MAX: usize = 1_024;

/// The door of one model.
#[derive(Debug)]
pub(crate) struct Door {
    breaker: Breaker,
    pace: Mutex<Pace>,
    /// Who goes next where the pace keeps calls apart.
    queue: Turns,
}

/// Why a call does not go out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shut {
    /// The breaker is open, so long.
    Breaker(Duration),
    /// The model asked to be left alone, so long.
    Told(Duration),
    /// Others probe: it is worth another look at once, see [`Door::pass`].
    Probing,
    /// Too many wait.
    Full,
}

impl Door {
    fn new(config: Arc<BreakerConfig>) -> Self {
        Self { breaker: Breaker::new(config), pace: Mutex::default(), queue: Turns::new(1) }
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for what others find out who probe, and for a place among the calls that the pace keeps apart.
    pub(crate) async fn pass(&self, tenant: &TenantId) -> Result<(), Shut> {
        self.breaker.passable().await.map_err(Shut::Breaker)?;
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
            None => Ok(pace.is_paced(now)),
        }
    }

    /// Lets a call go out now, or says why not.
    pub(crate) fn admit(&self) -> Result<Permit, Shut> {
        self.paced()?;
        self.breaker.admit().map_err(|refusal| match refusal {
            Refusal::Open(left) => Shut::Breaker(left),
            Refusal::Probing => Shut::Probing,
        })
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

    fn may_be_forgotten(&self) -> bool {
        self.state() == BreakerState::Closed && self.pace().held(Instant::now()).is_none()
    }
}

/// The doors of the models.
#[derive(Debug)]
pub(crate) struct Doors {
    config: Arc<BreakerConfig>,
    by_model: Mutex<HashMap<ModelRef, Arc<Door>>>,
}

impl Doors {
    /// None yet.
    pub(crate) fn new(config: BreakerConfig) -> Self {
        Self { config: Arc::new(config), by_model: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ModelRef, Arc<Door>>> {
        self.by_model.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The door of a model.
    pub(crate) fn of(&self, model: &ModelRef) -> Arc<Door> {
        let mut by_model = self.lock();
        if let Some(door) = by_model.get(model) {
            return Arc::clone(door);
        }
        if by_model.len() >= DOORS_MAX {
            by_model.retain(|_, door| !door.may_be_forgotten());
        }
        if by_model.len() >= DOORS_MAX {
            by_model.clear();
        }
        let door = by_model.entry(model.clone()).or_insert_with(|| Arc::new(Door::new(Arc::clone(&self.config))));
        Arc::clone(door)
    }

    /// Models of a provider whose breaker is open.
    pub(crate) fn open_of(&self, provider: &str) -> Vec<String> {
        let by_model = self.lock();
        let mut open: Vec<_> = by_model
            .iter()
            .filter(|(model, door)| model.provider() == provider && door.state() == BreakerState::Open)
            .map(|(model, _)| model.model().to_owned())
            .collect();
        open.sort();
        open
    }

    /// Publishes the state of a model. Models that share a label show the worst of them.
    pub(crate) fn publish(&self, model: &ModelRef, meter: &Meter) {
        let label = meter.labels(model);
        let by_model = self.lock();
        let worst = by_model
            .iter()
            .filter(|(other, _)| meter.labels(other) == label)
            .map(|(_, door)| door.state())
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

    #[tokio::test(start_paused = true)]
    async fn doors_are_bounded() {
        let doors = Doors::new(BreakerConfig::default());
        for n in 0..3 * DOORS_MAX {
            let _ = doors.of(&ModelRef::new(format!("sim/{n}")).expect("a model"));
        }
        assert!(doors.lock().len() <= DOORS_MAX);
    }
}
