//! Pace: owns when a model that asked for a pause gets calls again, and how fast. No call starts before the end of the
//! pause. After it, calls start at the rate at which the model took them before it refused, and faster with each answer, until
//! the model refuses again.

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;

/// Answers that are remembered, to learn the rate that a model takes.
const ANSWERS_MAX: usize = 256;
/// Fewer answers say nothing about the rate that a model takes: it got hardly any calls.
const ANSWERS_MIN: usize = 8;
/// A pace that is faster than this is no limit.
const GAP_MIN: Duration = Duration::from_millis(3);
/// The slowest pace: a model that asked for too long a pause must still get calls.
const GAP_MAX: Duration = Duration::from_secs(1);
/// The longest time until the pace grows, however long the model asked to wait. From the slowest pace to none it takes 21
/// such steps.
const EASES_AFTER_MAX: Duration = Duration::from_secs(5);

/// The pace of one model.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// Nothing goes out before.
    hold: Option<Hold>,
    /// When it answered last.
    answers: VecDeque<Instant>,
    /// Between two calls; zero where nothing is paced.
    gap: Duration,
    next: Option<Instant>,
    /// When the pace grew last.
    eased_at: Option<Instant>,
    told: Duration,
}

#[derive(Debug, Clone, Copy)]
struct Hold {
    from: Instant,
    until: Instant,
}

impl Pace {
    /// It asked to wait so long.
    pub(crate) fn asked_to_wait(&mut self, told: Duration, now: Instant) {
        if told.is_zero() {
            return;
        }
        // Calls that were under way when it refused the first are refused for the same reason.
        let from = self.hold.filter(|hold| now < hold.until).map_or(now, |hold| hold.from);
        let until = self.hold.map_or(now + told, |hold| hold.until.max(now + told));
        self.hold = Some(Hold { from, until });
        self.told = told;
    }

    /// It answered.
    pub(crate) fn answered(&mut self, now: Instant) {
        if self.answers.len() >= ANSWERS_MAX {
            self.answers.pop_front();
        }
        self.answers.push_back(now);
        self.ease(now);
    }

    /// An answer is what shows that it can be asked faster.
    fn ease(&mut self, now: Instant) {
        let wait = self.told.min(EASES_AFTER_MAX);
        if self.gap.is_zero() || self.eased_at.is_some_and(|at| now.duration_since(at) < wait) {
            return;
        }
        self.eased_at = Some(now);
        self.gap = Some(self.gap * 3 / 4).filter(|gap| *gap >= GAP_MIN).unwrap_or_default();
    }

    /// How long the pause still lasts.
    pub(crate) fn held(&mut self, now: Instant) -> Option<Duration> {
        let hold = self.hold?;
        if now < hold.until {
            return Some(hold.until - now);
        }
        self.hold = None;
        self.learn(hold, now);
        None
    }

    /// What it took in as long a time as it asked to wait; or, where it took more than is remembered, in the time that the
    /// remembered answers span.
    fn learn(&mut self, hold: Hold, now: Instant) {
        let since = hold.from.checked_sub(self.told).unwrap_or(hold.from);
        let mut taken: Vec<Instant> = self.answers.drain(..).collect();
        let is_more = taken.len() >= ANSWERS_MAX && taken.first().is_some_and(|at| *at > since);
        taken.retain(|at| *at >= since && *at <= hold.until);
        let span = match (taken.first(), taken.last()) {
            (Some(first), Some(last)) if is_more => last.duration_since(*first),
            _ => self.told,
        };
        let known = u32::try_from(taken.len()).ok().filter(|_| taken.len() >= ANSWERS_MIN).map(|taken| span / taken);
        // Too few answers say nothing new; but a pace at which it refused was too fast.
        self.gap = known.unwrap_or(self.gap * 4 / 3).min(GAP_MAX);
        self.next = Some(now);
        self.eased_at = Some(now);
    }

    /// Whether calls must be spaced.
    pub(crate) fn is_paced(&self) -> bool {
        !self.gap.is_zero()
    }

    /// When the next call may go, which is counted as gone.
    pub(crate) fn next(&mut self, now: Instant) -> Instant {
        let at = self.next.unwrap_or(now).max(now);
        self.next = Some(at + self.gap);
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOLD: Duration = Duration::from_secs(3);

    #[test]
    fn calls_after_a_wait_go_as_far_apart_as_the_model_took_them_before() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        assert!(!pace.is_paced());
        (0..4).for_each(|_| pace.answered(start));
        pace.asked_to_wait(TOLD, start);
        // Of those that were under way six are answered, the others refused.
        (0..6).for_each(|_| pace.answered(start + Duration::from_millis(50)));
        pace.asked_to_wait(TOLD, start + Duration::from_millis(50));
        assert_eq!(pace.held(start + TOLD), Some(Duration::from_millis(50)));
        let over = start + TOLD + Duration::from_millis(50);
        assert_eq!(pace.held(over), None);
        assert!(pace.is_paced());
        let times: Vec<_> = (0..10).map(|_| pace.next(over)).collect();
        assert_eq!(times[0], over);
        assert!(times.windows(2).all(|pair| pair[1] - pair[0] == TOLD / 10), "ten in three seconds");
        pace.answered(over + TOLD / 2);
        assert_eq!(pace.gap, TOLD / 10);
        pace.answered(over + TOLD);
        assert_eq!(pace.gap, TOLD / 10 * 3 / 4, "a little faster, since it answers");
    }

    /// A pace that was learned from these answers, and a refusal with this wish right after them.
    fn learned(answers: impl IntoIterator<Item = Duration>, told: Duration) -> (Pace, Instant) {
        let (mut pace, start, mut last) = (Pace::default(), Instant::now(), Duration::ZERO);
        for at in answers {
            pace.answered(start + at);
            last = at;
        }
        pace.asked_to_wait(told, start + last);
        let over = start + last + told;
        assert_eq!(pace.held(over), None);
        (pace, over)
    }

    #[test]
    fn too_few_answers_make_no_pace() {
        let few = (0..ANSWERS_MIN as u64 - 1).map(Duration::from_secs);
        assert!(!learned(few, Duration::from_mins(5)).0.is_paced());
        assert!(!learned([], TOLD).0.is_paced());
    }

    #[test]
    fn a_model_that_refuses_again_after_a_few_answers_is_asked_more_slowly() {
        let (mut pace, over) = learned((0..10).map(|_| Duration::ZERO), TOLD);
        (0..3).for_each(|_| pace.answered(over));
        pace.asked_to_wait(TOLD, over);
        assert_eq!(pace.held(over + TOLD), None);
        assert_eq!(pace.gap, TOLD / 10 * 4 / 3);
    }

    #[test]
    fn a_model_that_took_more_than_is_remembered_is_asked_as_fast_as_before() {
        // A hundred in a second for a minute, then `Retry-After: 60`.
        let (pace, _) = learned((0..6_000).map(|n| Duration::from_millis(10 * n)), Duration::from_mins(1));
        assert!(pace.gap <= Duration::from_millis(10), "{:?}", pace.gap);
        assert!(pace.gap >= Duration::from_millis(9), "{:?}", pace.gap);
    }

    #[test]
    fn the_slowest_pace_is_over_within_minutes_of_answers() {
        let told = Duration::from_mins(5);
        let (mut pace, mut now) = learned((0..ANSWERS_MIN as u64).map(Duration::from_secs), told);
        assert_eq!(pace.gap, GAP_MAX);
        let start = now;
        while pace.is_paced() {
            now = pace.next(now);
            pace.answered(now);
        }
        assert!(now - start < Duration::from_mins(2), "{:?}", now - start);
    }

    #[test]
    fn a_model_that_asks_for_no_time_is_not_left_alone() {
        let (mut pace, now) = (Pace::default(), Instant::now());
        pace.asked_to_wait(Duration::ZERO, now);
        assert_eq!(pace.held(now), None);
        assert!(!pace.is_paced());
    }
}
