//! The database's time, as far as heartbeats tell it: owns the one clock by which the engine judges deadlines, pauses and
//! starts, and the bound past which a machine's own clock is not believed any more.
//!
//! Between two heartbeats it goes on by the machine's monotonic time, so that nobody who sets the machine's clock moves a
//! deadline. What an answer proves wrong is corrected: the database read its clock between question and answer.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use chrono::{DateTime, TimeDelta, Utc};
use stagegate_core::Clock;
use stagegate_telemetry::Metrics;
use tokio::time::Instant;

/// Less than this is no difference: both clocks are read in whole milliseconds, and the way there and back is not even.
const TOLERANCE: TimeDelta = TimeDelta::milliseconds(20);

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct DatabaseClock {
    /// The machine's own.
    wall: Arc<dyn Clock>,
    /// A moment, and what time it was then. None before the first heartbeat.
    anchor: Mutex<Option<(Instant, DateTime<Utc>)>>,
    skew_max: Duration,
    skewed: AtomicBool,
    metrics: Metrics,
}

impl DatabaseClock {
    pub(crate) fn new(wall: Arc<dyn Clock>, skew_max: Duration, metrics: Metrics) -> Self {
        Self { wall, anchor: Mutex::default(), skew_max, skewed: AtomicBool::new(false), metrics }
    }

    fn anchor(&self) -> std::sync::MutexGuard<'_, Option<(Instant, DateTime<Utc>)>> {
        self.anchor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in what the database told when it was asked at `asked` and has just answered.
    pub(crate) fn learn(&self, told: DateTime<Utc>, asked: Instant) {
        self.learn_between(told, asked, Instant::now());
    }

    fn learn_between(&self, told: DateTime<Utc>, asked: Instant, answered: Instant) {
        let believed = self.at(answered);
        let latest = told + delta(answered.saturating_duration_since(asked));
        let proven = believed + TOLERANCE >= told && believed <= latest + TOLERANCE;
        // What is wrong becomes the earliest time that it can be: too late is no harm, too early would end runs.
        let corrected = if proven { believed } else { told };
        *self.anchor() = Some((answered, corrected));
        self.judge(self.wall.now() - corrected);
    }

    /// What time it is at this moment.
    fn at(&self, moment: Instant) -> DateTime<Utc> {
        let Some((at, time)) = *self.anchor() else { return self.wall.now() };
        let now = time + delta(moment.saturating_duration_since(at));
        // Cut to what both stores keep.
        DateTime::from_timestamp_millis(now.timestamp_millis()).unwrap_or(now)
    }

    /// Tells of the machine's own clock, where that changes what it may do.
    fn judge(&self, skew: TimeDelta) {
        #[expect(clippy::cast_precision_loss, reason = "seconds for people")]
        self.metrics.clock_skew.set(skew.num_milliseconds() as f64 / 1000.0);
        let skewed = skew.abs() > delta(self.skew_max);
        let was = self.skewed.swap(skewed, Ordering::Relaxed);
        let skew_ms = skew.num_milliseconds();
        if skewed && !was {
            tracing::error!(
                skew_ms,
                max_ms = self.skew_max.as_millis(),
                "this machine's clock differs too much from the database's; this replica takes no work until the clock is set"
            );
        } else if was && !skewed {
            tracing::info!(skew_ms, "this machine's clock agrees with the database's again; this replica takes work");
        }
    }

    /// Whether the machine's own clock is further from the database's than it may be.
    pub(crate) fn is_skewed(&self) -> bool {
        self.skewed.load(Ordering::Relaxed)
    }
}

impl Clock for DatabaseClock {
    fn now(&self) -> DateTime<Utc> {
        self.at(Instant::now())
    }
}

fn delta(span: Duration) -> TimeDelta {
    TimeDelta::from_std(span).unwrap_or(TimeDelta::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_secs(30);

    /// A machine's clock that somebody sets.
    #[derive(Debug)]
    struct Hand(Mutex<DateTime<Utc>>);

    impl Clock for Hand {
        fn now(&self) -> DateTime<Utc> {
            *self.0.lock().expect("not poisoned")
        }
    }

    fn second(n: i64) -> DateTime<Utc> {
        DateTime::UNIX_EPOCH + TimeDelta::seconds(n)
    }

    fn clock(at: DateTime<Utc>) -> (Arc<Hand>, DatabaseClock) {
        let hand = Arc::new(Hand(Mutex::new(at)));
        let wall: Arc<dyn Clock> = hand.clone();
        (hand, DatabaseClock::new(wall, MAX, Metrics::new()))
    }

    #[test]
    fn a_fast_or_slow_clock_is_corrected_where_an_answer_proves_it_wrong() {
        for (wall, expected) in [(1_020, 1_000), (980, 1_000), (1_001, 1_001)] {
            let (_hand, clock) = clock(second(wall));
            let answered = Instant::now();
            clock.learn_between(second(1_000), answered - Duration::from_secs(2), answered);
            assert_eq!(clock.at(answered), second(expected), "a machine that says {wall}");
        }
    }

    #[test]
    fn setting_the_machines_clock_between_two_heartbeats_changes_no_time() {
        let (hand, clock) = clock(second(1_000));
        let answered = Instant::now();
        clock.learn_between(second(1_000), answered, answered);
        *hand.0.lock().expect("not poisoned") = second(9_000);
        assert_eq!(clock.at(answered + Duration::from_secs(3)), second(1_003));
    }

    #[test]
    fn a_skew_past_its_bound_is_noticed_and_forgotten_once_the_clock_is_set() {
        let (hand, clock) = clock(second(1_031));
        clock.learn(second(1_000), Instant::now());
        assert!(clock.is_skewed());
        *hand.0.lock().expect("not poisoned") = second(1_029);
        clock.learn(second(1_000), Instant::now());
        assert!(!clock.is_skewed());
        *hand.0.lock().expect("not poisoned") = second(900);
        clock.learn(second(1_000), Instant::now());
        assert!(clock.is_skewed(), "a slow one too");
    }
}
