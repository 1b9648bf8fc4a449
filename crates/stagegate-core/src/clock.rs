//! Time as an argument: owns the clock that everything else is handed. The only place that reads the wall clock.

use chrono::{DateTime, Utc};

/// Where the time comes from. Leases never use it: theirs is the database's clock.
pub trait Clock: Send + Sync + std::fmt::Debug + 'static {
    /// The wall clock.
    fn now(&self) -> DateTime<Utc>;
}

/// The machine's clock, cut to milliseconds, which is what both stores keep.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "the one reader of the wall clock")]
    fn now(&self) -> DateTime<Utc> {
        let now = Utc::now();
        DateTime::from_timestamp_millis(now.timestamp_millis()).unwrap_or(now)
    }
}
