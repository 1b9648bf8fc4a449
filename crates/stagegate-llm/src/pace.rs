//! Pace: owns when a model that asked to wait is asked again, and how fast then. Until its time is over no call goes
//! out; after that calls go as far apart as the model took them before it refused, and closer with each time that it
//! does not refuse again.

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;

/// Answers that are remembered, to learn how many a model takes.
const ANSWERS_MAX: usize = 256;
/// A pace that is faster than this is none.
const GAP_MIN: Duration = Duration::from_millis(3);
/// The slowest pace: a model that told too much must not be left alone by that.
const GAP_MAX: Duration = Duration::from_secs(5);

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
    /// When the pace grows, and how long after that again.
    eases_at: Option<Instant>,
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
    }

    /// How long it is still to be left alone.
    pub(crate) fn held(&mut self, now: Instant) -> Option<Duration> {
        let hold = self.hold?;
        if now < hold.until {
            return Some(hold.until - now);
        }
        self.hold = None;
        self.learn(hold, now);
        None
    }

    /// What it took in as long a time as it asked to wait.
    fn learn(&mut self, hold: Hold, now: Instant) {
        let since = hold.from.checked_sub(self.told).unwrap_or(hold.from);
        let taken = self.answers.iter().filter(|at| **at >= since && **at <= hold.until).count();
        let taken = u32::try_from(taken.max(1)).unwrap_or(u32::MAX);
        self.gap = (self.told / taken).min(GAP_MAX);
        self.next = Some(now);
        self.eases_at = Some(now + self.told);
        self.answers.clear();
    }

    /// Whether calls are to be kept apart.
    pub(crate) fn is_paced(&mut self, now: Instant) -> bool {
        while let Some(at) = self.eases_at.filter(|at| now >= *at) {
            self.gap = self.gap * 3 / 4;
            self.eases_at = (self.gap >= GAP_MIN).then_some(at + self.told);
            if self.eases_at.is_none() {
                self.gap = Duration::ZERO;
            }
        }
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
        assert!(!pace.is_paced(start));
        (0..4).for_each(|_| pace.answered(start));
        pace.asked_to_wait(TOLD, start);
        // Of those that were under way six are answered, the others refused.
        (0..6).for_each(|_| pace.answered(start + Duration::from_millis(50)));
        pace.asked_to_wait(TOLD, start + Duration::from_millis(50));
        assert_eq!(pace.held(start + TOLD), Some(Duration::from_millis(50)));
        let over = start + TOLD + Duration::from_millis(50);
        assert_eq!(pace.held(over), None);
        assert!(pace.is_paced(over));
        let times: Vec<_> = (0..10).map(|_| pace.next(over)).collect();
        assert_eq!(times[0], over);
        assert!(times.windows(2).all(|pair| pair[1] - pair[0] == TOLD / 10), "ten in three seconds");
        assert!(pace.is_paced(over + TOLD), "a little faster");
        assert_eq!(pace.gap, TOLD / 10 * 3 / 4);
        assert!(!pace.is_paced(over + Duration::from_mins(2)), "and at last at will");
    }

    #[test]
    fn a_model_that_asks_for_no_time_is_not_left_alone() {
        let (mut pace, now) = (Pace::default(), Instant::now());
        pace.asked_to_wait(Duration::ZERO, now);
        assert_eq!(pace.held(now), None);
        assert!(!pace.is_paced(now));
    }
}
