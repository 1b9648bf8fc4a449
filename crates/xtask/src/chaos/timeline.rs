//! One clock for all that is compared: our own, the database's and the replicas' times as seconds since the start.

use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use stagegate_core::{Clock as _, SystemClock};

/// When it began, on both clocks of this machine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timeline {
    started: Instant,
    wall: DateTime<Utc>,
}

impl Timeline {
    pub(crate) fn begin() -> Self {
        Self { started: Instant::now(), wall: SystemClock.now() }
    }

    /// Now.
    pub(crate) fn now_s(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// Of an instant in this process.
    pub(crate) fn of(&self, instant: Instant) -> f64 {
        instant.saturating_duration_since(self.started).as_secs_f64()
    }

    /// Of a time in the database or in a log: the machine is the same, so are its clocks.
    pub(crate) fn of_wall(&self, at: DateTime<Utc>) -> f64 {
        (at - self.wall).as_seconds_f64()
    }

    /// A line of progress.
    pub(crate) fn say(&self, what: &str) {
        eprintln!("[{:7.1} s] {what}", self.now_s());
    }

    /// Sleeps until then.
    pub(crate) async fn until(&self, at_s: f64) {
        let left = (at_s - self.now_s()).max(0.0);
        tokio::time::sleep(Duration::from_secs_f64(left)).await;
    }
}
