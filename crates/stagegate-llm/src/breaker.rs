//! Breakers: owns when a failing dependency is spared. One state machine serves the models (one breaker each) and the
//! shared cache. It counts only what says that the other side is ill; what counts is the caller's to say.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use crate::config::BreakerConfig;

/// Calls that probe at once. More than one, so that a slow one does not keep the others from a model that is back.
const PROBES_MAX: usize = 3;

/// Where a breaker stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum BreakerState {
    /// Calls pass.
    Closed,
    /// A few calls probe; others wait for what comes of them.
    HalfOpen,
    /// Calls are refused.
    Open,
}

/// One breaker. Cheap to clone; clones share its state.
#[derive(Debug, Clone)]
pub(crate) struct Breaker {
    config: Arc<BreakerConfig>,
    inner: Arc<Mutex<Inner>>,
    /// It stands otherwise than before, or a probe was abandoned.
    changed: Arc<Notify>,
}

/// Why a call does not pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// It is open, so long.
    Open(Duration),
    /// Others probe; see [`Breaker::passable`].
    Probing,
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
        probes: usize,
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
            self.turn(Phase::HalfOpen { probes: 0 });
        }
    }
}

impl Breaker {
    /// A closed one.
    pub(crate) fn new(config: Arc<BreakerConfig>) -> Self {
        let phase = Phase::Closed { window: VecDeque::new() };
        Self { config, inner: Arc::new(Mutex::new(Inner { phase, round: 0 })), changed: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics while it is held; a poisoned window is still a window.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a call pass, or says why not. Whoever got a permit says how the call went; a permit that is dropped says
    /// nothing.
    pub(crate) fn admit(&self) -> Result<Permit, Refusal> {
        let mut inner = self.lock();
        inner.wake();
        match &mut inner.phase {
            Phase::Closed { .. } => {}
            Phase::Open { until } => return Err(Refusal::Open(until.saturating_duration_since(Instant::now()))),
            Phase::HalfOpen { probes } if *probes >= PROBES_MAX => return Err(Refusal::Probing),
            Phase::HalfOpen { probes } => *probes += 1,
        }
        let round = inner.round;
        Ok(Permit { breaker: self.clone(), round, told: false })
    }

    /// Why a call would be refused now, if it would. Admits nothing.
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        let mut inner = self.lock();
        inner.wake();
        match inner.phase {
            Phase::Open { until } => Some(Refusal::Open(until.saturating_duration_since(Instant::now()))),
            Phase::HalfOpen { probes } if probes >= PROBES_MAX => Some(Refusal::Probing),
            _ => None,
        }
    }

    /// Returns once a call may pass, for which it waits while others probe; or how long the breaker is open.
    pub(crate) async fn passable(&self) -> Result<(), Duration> {
        loop {
            match self.refusal() {
                None => return Ok(()),
                Some(Refusal::Open(left)) => return Err(left),
                Some(Refusal::Probing) => {}
            }
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            // It may have changed before this began to listen.
            if self.refusal() == Some(Refusal::Probing) {
                changed.await;
            }
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
            (Phase::HalfOpen { probes }, Outcome::Abandoned) => {
                *probes = probes.saturating_sub(1);
                self.changed.notify_waiters();
                None
            }
            _ => None,
        };
        let changes = next.is_some();
        if let Some(phase) = next {
            inner.turn(phase);
            self.changed.notify_waiters();
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

#[cfg(test)]
mod tests {
    use stagegate_core::pipeline::Span;

    use super::*;

    const OPEN_FOR: Duration = Duration::from_secs(10);

    fn breaker() -> Breaker {
        let config =
            BreakerConfig { window_calls: 4, min_calls: 2, open_for: Span(OPEN_FOR), ..BreakerConfig::default() };
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
        assert_eq!(breaker.admit().expect_err("open"), Refusal::Open(OPEN_FOR));
        tokio::time::advance(Duration::from_secs(4)).await;
        let left = Refusal::Open(Duration::from_secs(6));
        assert_eq!(breaker.admit().expect_err("open"), left, "it says how long is left");
        assert_eq!(breaker.refusal(), Some(left));
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
    async fn half_open_lets_a_few_calls_probe_and_the_others_wait_for_what_comes_of_them() {
        let breaker = open();
        assert_eq!(breaker.passable().await, Err(OPEN_FOR));
        tokio::time::advance(OPEN_FOR).await;
        assert_eq!(breaker.state(), BreakerState::HalfOpen);
        let mut probes: Vec<_> = (0..PROBES_MAX).map(|_| breaker.admit().expect("a probe")).collect();
        assert_eq!(breaker.admit().expect_err("these are enough"), Refusal::Probing);
        let waiting = breaker.clone();
        let waiter = tokio::spawn(async move { waiting.passable().await });
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        probes.pop().expect("one of them").failure();
        assert_eq!(waiter.await.expect("no panic"), Err(OPEN_FOR), "open again");
        assert_eq!(breaker.admit().expect_err("open again"), Refusal::Open(OPEN_FOR));
        drop(probes);

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
        assert_eq!(breaker.passable().await, Ok(()));
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
}
