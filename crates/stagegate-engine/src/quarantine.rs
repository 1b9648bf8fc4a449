//! Runs whose owners crashed: owns how many of them this replica executes side by side, and when one fails for good.
//!
//! The store cannot know which run killed a replica, so it counts a crash for each of the replica's runs
//! ([`stagegate_core::store::Weighed::crashes`]). The guilty run must not bring the others to the limit. So the nearer runs
//! are to the limit, the fewer of them run side by side, and a run with its last crash left runs without any other of them;
//! meanwhile the replica begins no other run. A run that makes progress leaves the quarantine.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use stagegate_core::{Capability, Code, Failure};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::shared::Shared;

/// Room for suspects. A run with three crashes left takes 1 of it, one with two takes 8, and one with its last takes all.
const ROOM: u32 = 64;
/// The longest wait for the next try of a run that finds no room.
const LATER: Duration = Duration::from_secs(6);
/// The longest pause after a panic; the first is a second, and each is twice as long as the one before.
const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// The room for suspects on one replica.
#[derive(Debug)]
pub(crate) struct Quarantine {
    room: Arc<Semaphore>,
    is_last_chance: Arc<AtomicBool>,
}

/// A suspect's part of the room; free again when it is dropped.
#[derive(Debug)]
pub(crate) struct Stay {
    _room: OwnedSemaphorePermit,
    /// Set if it has all of the room.
    is_last_chance: Option<Arc<AtomicBool>>,
}

impl Drop for Stay {
    fn drop(&mut self) {
        if let Some(last_chance) = &self.is_last_chance {
            last_chance.store(false, Ordering::Relaxed);
        }
    }
}

/// How a claimed run may be executed.
#[derive(Debug)]
pub(crate) enum Standing {
    /// Like any other run.
    Free,
    /// It runs, and takes part of the room until it makes progress.
    Suspect(Stay),
    /// There is no room for it now.
    Later,
}

impl Default for Quarantine {
    fn default() -> Self {
        Self { room: Arc::new(Semaphore::new(ROOM as usize)), is_last_chance: Arc::default() }
    }
}

/// How much room a run takes after `crashes` of at most `max`; None if it is not a suspect yet.
pub(crate) fn room_wanted(crashes: u32, max: u32) -> Option<u32> {
    if crashes == 0 || max == 0 {
        return None;
    }
    match max.saturating_sub(crashes) {
        0 | 1 => Some(ROOM),
        2 => Some(ROOM / 8),
        3 => Some(1),
        _ => None,
    }
}

impl Quarantine {
    /// How a run may be executed after `crashes` of at most `max`.
    pub(crate) fn admit(&self, crashes: u32, max: u32) -> Standing {
        let Some(wanted) = room_wanted(crashes, max) else { return Standing::Free };
        match Arc::clone(&self.room).try_acquire_many_owned(wanted) {
            Ok(room) => {
                let is_last_chance = (wanted == ROOM).then(|| Arc::clone(&self.is_last_chance));
                if let Some(last_chance) = &is_last_chance {
                    last_chance.store(true, Ordering::Relaxed);
                }
                Standing::Suspect(Stay { _room: room, is_last_chance })
            }
            Err(_) => Standing::Later,
        }
    }

    /// Whether a run with its last chance is under way, beside which no other run begins.
    pub(crate) fn is_closed(&self) -> bool {
        self.is_last_chance.load(Ordering::Relaxed)
    }
}

/// The pause before the next try of a run that found no room.
pub(crate) fn later(shared: &Shared) -> Duration {
    LATER.mul_f64(0.3 + 0.7 * shared.random::<f64>())
}

/// The pause before the next try of a run whose driver panicked.
pub(crate) fn backoff(shared: &Shared, crashes: u32) -> Duration {
    let longest = Duration::from_secs(1 << crashes.min(10)).min(BACKOFF_MAX);
    longest.mul_f64(0.5 + shared.random::<f64>() / 2.0)
}

/// The failure of a run after too many crashes.
pub(crate) fn failure(shared: &Shared, crashes: u32) -> Failure {
    let known = shared.common(Capability::OpenVocabulary);
    let message = format!(
        "{crashes} owners of this run in a row died or panicked, without progress in between (engine.run_crashes_max). \
         Search the logs of the replicas for the run's id, for panics, and for kills at the memory limit; then retry the run"
    );
    Failure::new(if known { Code::RunCrashed } else { Code::Internal }, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_admitted(quarantine: &Quarantine, crashes: u32) -> Option<Stay> {
        match quarantine.admit(crashes, 5) {
            Standing::Suspect(stay) => Some(stay),
            Standing::Free | Standing::Later => None,
        }
    }

    #[test]
    fn fewer_suspects_run_side_by_side_the_nearer_they_are_to_the_limit() {
        let quarantine = Quarantine::default();
        assert!(matches!(quarantine.admit(0, 5), Standing::Free) && matches!(quarantine.admit(1, 5), Standing::Free));
        for (crashes, at_once) in [(2, 64), (3, 8), (4, 1), (5, 1), (9, 1)] {
            let stays: Vec<Stay> = std::iter::from_fn(|| is_admitted(&quarantine, crashes)).collect();
            assert_eq!(stays.len(), at_once, "after {crashes} crashes");
        }
    }

    #[test]
    fn a_last_chance_is_given_alone_and_ends() {
        let quarantine = Quarantine::default();
        let other = is_admitted(&quarantine, 2).expect("room");
        assert!(matches!(quarantine.admit(4, 5), Standing::Later), "another suspect is there");
        assert!(!quarantine.is_closed());
        drop(other);
        let stay = is_admitted(&quarantine, 4).expect("room");
        assert!(quarantine.is_closed() && stay.is_last_chance.is_some());
        assert!(matches!(quarantine.admit(2, 5), Standing::Later));
        drop(stay);
        assert!(!quarantine.is_closed());
    }

    #[test]
    fn without_a_limit_nothing_is_suspected() {
        assert!(matches!(Quarantine::default().admit(1_000, 0), Standing::Free));
    }
}
