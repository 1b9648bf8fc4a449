//! Deterministic simulation of the engine: several replicas, one store, one cache and one provider in one thread and in
//! virtual time, with a fault at every border. Owns the world and the checks; never a second implementation of what it
//! checks: the engine and the model layer are the real ones.
//!
//! A seed decides everything: pipelines, runs, what people ask, latencies, faults. So a seed that fails can be run
//! again and read ([`Options::record`]). Time is tokio's, paused: it jumps to the next timer, and a minute of a world
//! takes milliseconds.
//!
//! - `store` keeps the rows, exactly as the contract says; `cache` the shared answers.
//! - `front` is how one replica reaches them: every call there can fail before or after it happened, be delayed,
//!   arrive twice, or kill its replica.
//! - `provider` answers, errs, limits, hangs.
//! - `script` makes up pipelines and runs; `director` plays a seed to its end.
//! - `crasher` picks the run that crashes its owners.
//! - `panics` notices what is swallowed.
//! - `check` watches every step against the promises of the design.

mod cache;
mod check;
mod crasher;
mod director;
mod front;
mod panics;
mod provider;
mod script;
mod store;
mod watcher;
mod world;

pub use check::{Promise, Violation};
pub use director::{Counts, Options, Outcome, simulate};
pub use store::MemoryStore;

/// A promise that the store breaks on purpose: what the checks are tested with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Flaw {
    /// None is broken.
    #[default]
    None,
    /// Every step is written, whatever its epoch.
    FencingOff,
    /// A step is acknowledged before it is durable: a crash of the replica takes what it wrote in the last moment.
    FlushNotAwaited,
    /// A reading of events begins one too early.
    CursorRepeats,
    /// A reading of events begins one too late.
    CursorSkips,
    /// A replica that is gone keeps its runs.
    LeasesNeverExpire,
    /// A claim leaves the epoch as it was.
    ClaimKeepsEpoch,
    /// A step that was committed and is repeated is told to be stale.
    RepetitionIsStale,
    /// The shared cache acknowledges what it does not keep.
    CacheForgets,
    /// A cancel is noted, but the owner's heartbeat does not tell of it.
    CancelIsSilent,
    /// A claim takes whatever waits, however many run beside it.
    LimitsIgnored,
    /// A claim takes what is not due yet.
    StartIgnored,
    /// A claim takes whoever has waited longest, whatever the priorities.
    PriorityIgnored,
    /// A heartbeat does not tell the database's time, so that replicas judge by clocks that are wrong.
    TimeUntold,
    /// A run that is loaded is told that its outage began long ago.
    OutageAges,
    /// The edited output of an approval is not handed over.
    EditsDropped,
    /// Loading a run ends its attempts under way, so that no owner books their calls.
    OwnersForgotten,
    /// The first call makes its driver panic; the engine catches that and goes on.
    DriverPanics,
    /// The provider charges twice for what it answers.
    ChargesTwice,
    /// A crash of a run's owner is not counted.
    CrashesUncounted,
    /// Each claim of a run that had an owner counts as a crash of that owner.
    TakeOversCount,
}
