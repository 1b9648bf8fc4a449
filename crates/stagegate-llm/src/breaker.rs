//! Breakers: owns when a failing dependency is spared. One state machine serves the models (one breaker each) and the
//! shared cache. It counts only what says that the other side is ill; what counts is the caller's to say.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use stagegate_core::ModelRef;
use tokio::time::Instant;

use crate::{config::BreakerConfig, meter::Meter};

/// Models that have a breaker, at most. Past it the closed ones are forgotten: they hold nothing but a window.
const BREAKERS_MAX: usize = 1_024;
/// How soon to ask again while another call probes.
const PROBE_WAIT: Duration = Duration::from_secs(1);

/// Where a breaker stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum BreakerState {
    /// Calls pass.
    Closed,
    /// One call probes; others are refused.
    HalfOpen,
    /// Calls are refused.
    Open,
}

/// One breaker. Cheap to clone; clones share its state.
#[derive(Debug, Clone)]
pub(crate) struct Breaker {
    config: Arc<BreakerConfig>,
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    phase: Phase,
    /// Grows with every change of phase, so that a call that began before it says nothing about what came after.
    round: u64,
}

#[derive(Debug)]
enum Phase {
    /// True for each failure among the last calls.
    Closed {
        window: VecDeque<bool>,
    },
    Open {
        until: Instant,
    },
    HalfOpen {
        probing: bool,
    },
}

impl Inner {
    fn turn(&mut self, phase: Phase) {
        self.phase = phase;
        self.round += 1;
    }

    /// An open breaker whose time is over is half open, whether or not anybody asked yet.
    fn wake(&mut self) {
        if matches!(self.phase, Phase::Open { until } if Instant::now() >= until) {
            self.turn(Phase::HalfOpen { probing: false });
        }
    }
}

impl Breaker {
    /// A closed one.
    pub(crate) fn new(config: Arc<BreakerConfig>) -> Self {
        let phase = Phase::Closed { window: VecDeque::new() };
        Self { config, inner: Arc::new(Mutex::new(Inner { phase, round: 0 })) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics while it is held; a poisoned window is still a window.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a call pass, or says how long to wait. Whoever got a permit says how the call went; a permit that is
    /// dropped says nothing.
    pub(crate) fn admit(&self) -> Result<Permit, Duration> {
        let mut inner = self.lock();
        inner.wake();
        match &mut inner.phase {
            Phase::Closed { .. } => {}
            Phase::Open { until } => return Err(until.saturating_duration_since(Instant::now())),
            Phase::HalfOpen { probing: true } => return Err(PROBE_WAIT.min(self.config.open_for.0)),
            Phase::HalfOpen { probing } => *probing = true,
        }
        let round = inner.round;
        Ok(Permit { breaker: self.clone(), round, told: false })
    }

    /// How long to wait, if a call would be refused now. Admits nothing.
    pub(crate) fn refusal(&self) -> Option<Duration> {
        let mut inner = self.lock();
        inner.wake();
        match inner.phase {
            Phase::Open { until } => Some(until.saturating_duration_since(Instant::now())),
            Phase::HalfOpen { probing: true } => Some(PROBE_WAIT.min(self.config.open_for.0)),
            _ => None,
        }
    }

    /// Where it stands.
    pub(crate) fn state(&self) -> BreakerState {
        let mut inner = self.lock();
        inner.wake();
        match inner.phase {
            Phase::Closed { .. } => BreakerState::Closed,
            Phase::HalfOpen { .. } => BreakerState::HalfOpen,
            Phase::Open { .. } => BreakerState::Open,
        }
    }

    /// Whether it changed where the breaker stands.
    fn tell(&self, round: u64, outcome: Outcome) -> bool {
        let mut inner = self.lock();
        if inner.round != round {
            return false;
        }
        let next = match (&mut inner.phase, outcome) {
            (Phase::Closed { window }, Outcome::Success | Outcome::Failure) => {
                window.push_back(outcome == Outcome::Failure);
                while window.len() > self.config.window_calls.max(1) {
                    window.pop_front();
                }
                self.is_tripped(window).then(|| self.open())
            }
            (Phase::HalfOpen { .. }, Outcome::Failure) => Some(self.open()),
            (Phase::HalfOpen { .. }, Outcome::Success | Outcome::Reached) => {
                Some(Phase::Closed { window: VecDeque::new() })
            }
            (Phase::HalfOpen { probing }, Outcome::Abandoned) => {
                *probing = false;
                None
            }
            _ => None,
        };
        let changes = next.is_some();
        if let Some(phase) = next {
            inner.turn(phase);
        }
        changes
    }

    #[expect(clippy::cast_precision_loss, reason = "a window is small")]
    fn is_tripped(&self, window: &VecDeque<bool>) -> bool {
        let failures = window.iter().filter(|failed| **failed).count();
        window.len() >= self.config.min_calls.max(1)
            && failures > 0
            && failures as f64 >= self.config.failure_rate * window.len() as f64
    }

    fn open(&self) -> Phase {
        Phase::Open { until: Instant::now() + self.config.open_for.0 }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Success,
    Failure,
    Reached,
    Abandoned,
}

/// The right to make one call.
#[derive(Debug)]
#[must_use = "say how the call went"]
pub(crate) struct Permit {
    breaker: Breaker,
    round: u64,
    told: bool,
}

impl Permit {
    fn tell(&mut self, outcome: Outcome) -> bool {
        !std::mem::replace(&mut self.told, true) && self.breaker.tell(self.round, outcome)
    }

    /// The call succeeded. True where this closed the breaker.
    pub(crate) fn success(mut self) -> bool {
        self.tell(Outcome::Success)
    }

    /// The other side is ill. True where this opened the breaker.
    pub(crate) fn failure(mut self) -> bool {
        self.tell(Outcome::Failure)
    }

    /// The other side answered, and refused: it is reachable, and that is all that is known. True where this closed
    /// the breaker.
    pub(crate) fn reached(mut self) -> bool {
        self.tell(Outcome::Reached)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.tell(Outcome::Abandoned);
    }
}

/// The breakers of the models.
#[derive(Debug)]
pub(crate) struct Breakers {
    config: Arc<BreakerConfig>,
    by_model: Mutex<HashMap<ModelRef, Breaker>>,
}

impl Breakers {
    /// None yet.
    pub(crate) fn new(config: BreakerConfig) -> Self {
        Self { config: Arc::new(config), by_model: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ModelRef, Breaker>> {
        self.by_model.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The breaker of a model.
    pub(crate) fn of(&self, model: &ModelRef) -> Breaker {
        let mut by_model = self.lock();
        if let Some(breaker) = by_model.get(model) {
            return breaker.clone();
        }
        if by_model.len() >= BREAKERS_MAX {
            by_model.retain(|_, breaker| breaker.state() != BreakerState::Closed);
        }
        if by_model.len() >= BREAKERS_MAX {
            by_model.clear();
        }
        by_model.entry(model.clone()).or_insert_with(|| Breaker::new(Arc::clone(&self.config))).clone()
    }

    /// Models of a provider whose breaker is open.
    pub(crate) fn open_of(&self, provider: &str) -> Vec<String> {
        let by_model = self.lock();
        let mut open: Vec<_> = by_model
            .iter()
            .filter(|(model, breaker)| model.provider() == provider && breaker.state() == BreakerState::Open)
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
            .map(|(_, breaker)| breaker.state())
            .max()
            .unwrap_or(BreakerState::Closed);
        meter.breaker(model, worst);
    }
}

#[cfg(test)]
mod tests {
    use stagegate_core::pipeline::Span;

    use super::*;

    const OPEN_FOR: Duration = Duration::from_secs(10);

    fn breaker() -> Breaker {
        let config = BreakerConfig { window_calls: 4, min_calls: 2, failure_rate: 0.5, open_for: Span(OPEN_FOR) };
        Breaker::new(Arc::new(config))
    }

    fn open() -> Breaker {
        let breaker = breaker();
        for _ in 0..2 {
            breaker.admit().expect("closed").failure();
        }
        assert_eq!(breaker.state(), BreakerState::Open);
        breaker
    }

    #[tokio::test(start_paused = true)]
    async fn it_opens_at_the_failure_rate_and_not_before_the_least_number_of_calls() {
        let breaker = breaker();
        breaker.admit().expect("closed").failure();
        assert_eq!(breaker.state(), BreakerState::Closed, "one call is too few");
        breaker.admit().expect("closed").success();
        assert_eq!(breaker.state(), BreakerState::Open, "one of two is half");
        assert_eq!(breaker.admit().expect_err("open"), OPEN_FOR);
        tokio::time::advance(Duration::from_secs(4)).await;
        assert_eq!(breaker.admit().expect_err("open"), Duration::from_secs(6), "it says how long is left");
        assert_eq!(breaker.refusal(), Some(Duration::from_secs(6)));
    }

    #[tokio::test(start_paused = true)]
    async fn old_calls_slide_out_of_the_window() {
        let breaker = breaker();
        for _ in 0..4 {
            breaker.admit().expect("closed").success();
        }
        breaker.admit().expect("closed").failure();
        for _ in 0..3 {
            breaker.admit().expect("closed").success();
        }
        breaker.admit().expect("closed").failure();
        assert_eq!(breaker.state(), BreakerState::Closed, "one failure of the last four");
        breaker.admit().expect("closed").failure();
        assert_eq!(breaker.state(), BreakerState::Open, "two of the last four");
    }

    #[tokio::test(start_paused = true)]
    async fn refusals_of_the_other_side_do_not_count() {
        let breaker = breaker();
        for _ in 0..10 {
            breaker.admit().expect("closed").reached();
            drop(breaker.admit().expect("closed"));
        }
        assert_eq!(breaker.state(), BreakerState::Closed);
    }

    #[tokio::test(start_paused = true)]
    async fn half_open_lets_one_call_probe() {
        let breaker = open();
        tokio::time::advance(OPEN_FOR).await;
        assert_eq!(breaker.state(), BreakerState::HalfOpen);
        let probe = breaker.admit().expect("the probe");
        assert!(breaker.admit().is_err(), "one is enough");
        probe.failure();
        assert_eq!(breaker.admit().expect_err("open again"), OPEN_FOR);

        tokio::time::advance(OPEN_FOR).await;
        breaker.admit().expect("the next probe").success();
        assert_eq!(breaker.state(), BreakerState::Closed);
        breaker.admit().expect("closed").failure();
        assert_eq!(breaker.state(), BreakerState::Closed, "the window began anew");
    }

    #[tokio::test(start_paused = true)]
    async fn an_abandoned_probe_leaves_room_for_another() {
        let breaker = open();
        tokio::time::advance(OPEN_FOR).await;
        drop(breaker.admit().expect("the probe"));
        assert_eq!(breaker.state(), BreakerState::HalfOpen);
        breaker.admit().expect("another probe").reached();
        assert_eq!(breaker.state(), BreakerState::Closed, "a refusal shows that it is back");
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_from_before_says_nothing_about_after() {
        let breaker = breaker();
        let late = breaker.admit().expect("closed");
        for _ in 0..2 {
            breaker.admit().expect("closed").failure();
        }
        tokio::time::advance(OPEN_FOR).await;
        late.failure();
        assert_eq!(breaker.state(), BreakerState::HalfOpen);
    }

    #[tokio::test(start_paused = true)]
    async fn breakers_are_bounded() {
        let breakers = Breakers::new(BreakerConfig::default());
        for n in 0..3 * BREAKERS_MAX {
            let _ = breakers.of(&ModelRef::new(format!("sim/{n}")).expect("a model"));
        }
        assert!(breakers.lock().len() <= BREAKERS_MAX);
    }
}
