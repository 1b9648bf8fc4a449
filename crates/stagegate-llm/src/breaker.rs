//! Breakers: owns when a failing dependency is spared. One state machine serves the models (one breaker each) and the
//! shared cache. It counts only what says that the other side is ill; what counts is the caller's to say.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};

use crate::config::BreakerConfig;

/// Calls that probe at once. More than one, so that a slow one does not keep the others from a model that is back.
const PROBES_MAX: usize = 3;
/// How long a probe keeps its place at least, whatever `slow_call` says: with 0 a half-open breaker would let all pass.
const PROBE_PLACE_MIN: Duration = Duration::from_secs(1);

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
    /// Others probe, and keep their places so long at most; see [`Breaker::passable`].
    Probing(Duration),
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
    /// When each probe began that has a place. One that has taken `slow_call` loses it, so that a few calls that hang do
    /// not keep everybody from a model that is back; its answer still counts.
    HalfOpen {
        probes: Vec<Instant>,
    },
}

impl Inner {
    fn turn(&mut self, phase: Phase) {
        self.phase = phase;
        self.round += 1;
    }

    /// An open breaker whose time is over is half open, whether or not anybody asked yet; a probe whose time is over has
    /// no place any more.
    fn wake(&mut self, place: Duration) {
        let now = Instant::now();
        if matches!(self.phase, Phase::Open { until } if now >= until) {
            self.turn(Phase::HalfOpen { probes: Vec::new() });
        }
        if let Phase::HalfOpen { probes } = &mut self.phase {
            probes.retain(|began| now.duration_since(*began) < place);
        }
    }

    fn refusal(&self, place: Duration) -> Option<Refusal> {
        match &self.phase {
            Phase::Open { until } => Some(Refusal::Open(until.saturating_duration_since(Instant::now()))),
            Phase::HalfOpen { probes } if probes.len() >= PROBES_MAX => {
                let oldest = probes.iter().min().map_or(Duration::ZERO, Instant::elapsed);
                Some(Refusal::Probing(place.saturating_sub(oldest)))
            }
            Phase::Closed { .. } | Phase::HalfOpen { .. } => None,
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

    /// How long a probe keeps its place.
    fn place(&self) -> Duration {
        self.config.slow_call.0.max(PROBE_PLACE_MIN)
    }

    /// Lets a call pass, or says why not. Whoever got a permit says how the call went; a permit that is dropped says
    /// nothing.
    pub(crate) fn admit(&self) -> Result<Permit, Refusal> {
        let mut inner = self.lock();
        inner.wake(self.place());
        if let Some(refusal) = inner.refusal(self.place()) {
            return Err(refusal);
        }
        let began = Instant::now();
        if let Phase::HalfOpen { probes } = &mut inner.phase {
            probes.push(began);
        }
        let round = inner.round;
        Ok(Permit { breaker: self.clone(), round, began, told: false })
    }

    /// Why a call would be refused now, if it would. Admits nothing.
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        let mut inner = self.lock();
        inner.wake(self.place());
        inner.refusal(self.place())
    }

    /// Returns once a call may pass, for which it waits while others probe; or how long the breaker is open.
    pub(crate) async fn passable(&self) -> Result<(), Duration> {
        loop {
            match self.refusal() {
                None => return Ok(()),
                Some(Refusal::Open(left)) => return Err(left),
                Some(Refusal::Probing(_)) => {}
            }
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            // It may have changed before this began to listen.
            if let Some(Refusal::Probing(left)) = self.refusal() {
                let _ = timeout(left, changed).await;
            }
        }
    }

    /// Whether it is closed, and no call of its window failed.
    pub(crate) fn has_no_failure(&self) -> bool {
        matches!(&self.lock().phase, Phase::Closed { window } if !window.contains(&true))
    }

    /// Where it stands.
    pub(crate) fn state(&self) -> BreakerState {
        let mut inner = self.lock();
        inner.wake(self.place());
        match inner.phase {
            Phase::Closed { .. } => BreakerState::Closed,
            Phase::HalfOpen { .. } => BreakerState::HalfOpen,
            Phase::Open { .. } => BreakerState::Open,
        }
    }

    /// Whether it changed where the breaker stands.
    fn tell(&self, round: u64, began: Instant, outcome: Outcome) -> bool {
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
                if let Some(at) = probes.iter().position(|probe| *probe == began) {
                    probes.swap_remove(at);
                    self.changed.notify_waiters();
                }
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
    began: Instant,
    told: bool,
}

impl Permit {
    fn tell(&mut self, outcome: Outcome) -> bool {
        !std::mem::replace(&mut self.told, true) && self.breaker.tell(self.round, self.began, outcome)
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
    async fn a_half_open_breaker_lets_a_few_calls_probe_and_the_others_wait() {
        let breaker = open();
        assert_eq!(breaker.passable().await, Err(OPEN_FOR));
        tokio::time::advance(OPEN_FOR).await;
        assert_eq!(breaker.state(), BreakerState::HalfOpen);
        let mut probes: Vec<_> = (0..PROBES_MAX).map(|_| breaker.admit().expect("a probe")).collect();
        let place = BreakerConfig::default().slow_call.0;
        assert_eq!(breaker.admit().expect_err("these are enough"), Refusal::Probing(place));
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
    async fn a_probe_that_hangs_loses_its_place_and_its_result_still_counts() {
        let breaker = open();
        tokio::time::advance(OPEN_FOR).await;
        let hang: Vec<_> = (0..PROBES_MAX).map(|_| breaker.admit().expect("a probe")).collect();
        let start = Instant::now();
        assert_eq!(breaker.passable().await, Ok(()), "though none of them has ended");
        assert_eq!(start.elapsed(), BreakerConfig::default().slow_call.0);
        let next: Vec<_> = (0..PROBES_MAX).map(|_| breaker.admit().expect("a place")).collect();
        assert!(matches!(breaker.admit(), Err(Refusal::Probing(_))));
        drop(hang);
        assert!(matches!(breaker.admit(), Err(Refusal::Probing(_))), "they had no place to leave");
        next.into_iter().next().expect("one of them").success();
        assert_eq!(breaker.state(), BreakerState::Closed);
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
