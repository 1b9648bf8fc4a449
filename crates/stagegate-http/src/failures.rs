//! Failed authentications: owns how many a peer may have before it is told to wait.
//!
//! Each peer has a token bucket: a failure takes a token, and the bucket fills again within a minute. An empty bucket refuses
//! only keys that are known to be wrong without a look-up, so that an attacker does not lock out others at the same address:
//! see [`crate::auth`].

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use moka::sync::Cache;
use tokio::time::Instant;

use crate::serve::Peer;

/// Peers remembered at once.
const PEERS_MAX: u64 = 10_000;
/// How long a full bucket takes to fill.
const PERIOD: Duration = Duration::from_mins(1);

/// The failures of every peer.
#[derive(Debug)]
pub(crate) struct Failures {
    max: f64,
    buckets: Cache<Peer, Arc<Mutex<Bucket>>>,
}

/// What a peer may still fail.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    left: f64,
    at: Instant,
}

impl Failures {
    /// So many a minute.
    pub(crate) fn new(max_per_minute: u32) -> Self {
        let buckets = Cache::builder().max_capacity(PEERS_MAX).time_to_idle(PERIOD).build();
        Self { max: f64::from(max_per_minute.max(1)), buckets }
    }

    /// How long the peer has to wait before it may fail again; None for not at all.
    pub(crate) fn wait_of(&self, peer: Peer, now: Instant) -> Option<Duration> {
        let bucket = self.buckets.get(&peer)?;
        let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
        bucket.fill(self.max, now);
        (bucket.left < 1.0).then(|| PERIOD.mul_f64((1.0 - bucket.left) / self.max))
    }

    /// Notes a failure.
    pub(crate) fn note(&self, peer: Peer, now: Instant) {
        let full = || Arc::new(Mutex::new(Bucket { left: self.max, at: now }));
        let bucket = self.buckets.get_with(peer, full);
        let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
        bucket.fill(self.max, now);
        bucket.left = (bucket.left - 1.0).max(0.0);
    }
}

impl Bucket {
    fn fill(&mut self, max: f64, now: Instant) {
        let passed = now.saturating_duration_since(self.at);
        self.left = (self.left + passed.div_duration_f64(PERIOD) * max).min(max);
        self.at = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_failed_too_often_waits_for_its_bucket_to_fill() {
        let failures = Failures::new(3);
        let (peer, other) = (Peer::of([10, 0, 0, 1].into()), Peer::of([10, 0, 0, 2].into()));
        let now = Instant::now();
        for _ in 0..3 {
            assert_eq!(failures.wait_of(peer, now), None);
            failures.note(peer, now);
        }
        assert_eq!(failures.wait_of(peer, now), Some(Duration::from_secs(20)));
        assert_eq!(failures.wait_of(other, now), None, "another peer is not hindered");
        assert_eq!(failures.wait_of(peer, now + Duration::from_secs(20)), None);
        failures.note(peer, now + Duration::from_secs(20));
        assert!(failures.wait_of(peer, now + Duration::from_secs(21)).is_some());
        assert_eq!(failures.wait_of(peer, now + PERIOD * 2), None);
    }
}
