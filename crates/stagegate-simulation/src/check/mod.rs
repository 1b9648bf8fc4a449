//! The promises, watched: owns what each step must not do. It keeps a book of its own from what it sees happen, and
//! never asks the store whether the store was right.

mod calls;
mod crashes;
mod runs;
mod turns;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use stagegate_core::{PipelineName, ReplicaId, RunId, StageId};

use crate::crasher::Crasher;

/// What is promised: section 3 of the design, and what a store must do for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Promise {
    /// 1. Accepted means finished: exactly one end in each life of a run, and none that is stuck.
    AcceptedMeansFinished,
    /// 1. What was acknowledged stays.
    AcknowledgedMeansDurable,
    /// 2. One owner: at most one live lease of a run, epochs that only grow, no write under a stale one.
    OneOwner,
    /// 3. Order: a stage starts after the checkpoints of its needs; one checkpoint a stage.
    Order,
    /// 4. A crash buys nothing twice that was received and cached.
    CrashBuysNothingTwice,
    /// 5. Cancel is obeyed: no call starts later than one heartbeat after it.
    CancelIsObeyed,
    /// 6. What a run took is the sum of its ledger.
    TotalsAddUp,
    /// 6. Money is exact: what a provider charged is between what is known to be spent and what is booked in all.
    MoneyIsExact,
    /// 7. Events are complete: gap-free, and every watcher sees each once, in order.
    EventsAreComplete,
    /// 11. Slots are leases: no more live ones than a limit allows, over all replicas.
    SlotsAreLeases,
    /// A run that is to start later does not start before.
    StartIsKept,
    /// A run does not expire before its deadline, by the database's time.
    DeadlineIsKept,
    /// A claim passes over nobody of a higher priority who waits in the same lane.
    PriorityIsKept,
    /// A provider that recovers in time fails no stage by its outage.
    OutagesPass,
    /// A run that crashes its owners ends after a given number of crashes, and ends no other run.
    CrashersEnd,
    /// An edited output that was accepted is the stage's, or the stage has none.
    EditsAreKept,
    /// Nothing panics, whoever catches it.
    NoPanic,
}

impl fmt::Display for Promise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AcceptedMeansFinished => "1, accepted means finished",
            Self::AcknowledgedMeansDurable => "1, acknowledged means durable",
            Self::OneOwner => "2, one owner",
            Self::Order => "3, order",
            Self::CrashBuysNothingTwice => "4, a crash buys nothing twice",
            Self::CancelIsObeyed => "5, cancel is obeyed",
            Self::TotalsAddUp => "6, totals add up",
            Self::MoneyIsExact => "6, money is exact",
            Self::EventsAreComplete => "7, events are complete",
            Self::SlotsAreLeases => "11, slots are leases",
            Self::StartIsKept => "that a run starts when it is due",
            Self::DeadlineIsKept => "that a run does not expire before its deadline",
            Self::PriorityIsKept => "that priority goes first",
            Self::OutagesPass => "that an outage that passes fails nothing",
            Self::CrashersEnd => "that a run which crashes its owners ends, and no other with it",
            Self::EditsAreKept => "that an edited output is kept",
            Self::NoPanic => "that nothing panics",
        })
    }
}

/// A promise that was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Which.
    pub promise: Promise,
    /// When, in milliseconds of virtual time.
    pub at_ms: i64,
    /// How.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "promise {} is broken after {} ms: {}", self.promise, self.at_ms, self.what)
    }
}

type Checked = Result<(), Violation>;

/// The book.
#[derive(Debug, Default)]
pub(crate) struct Checks {
    pub(crate) now_ms: i64,
    /// The first promise that was broken.
    pub(crate) first: Option<Violation>,
    /// What a lease lives without a heartbeat.
    pub(crate) ttl_ms: i64,
    /// After so many crashes of its owners a run is given up.
    pub(crate) crashes_max: u32,
    /// Which runs crash their owners.
    pub(crate) crasher: Option<Crasher>,
    /// The needs of each stage, by pipeline.
    pub(crate) dags: BTreeMap<PipelineName, BTreeMap<StageId, Vec<StageId>>>,
    runs: BTreeMap<RunId, runs::Book>,
    tags: BTreeMap<String, Vec<RunId>>,
    /// Until when each replica counts as alive.
    replicas: BTreeMap<ReplicaId, i64>,
    /// Which process each replica is a life of.
    processes: BTreeMap<ReplicaId, usize>,
    /// When a process was last kept from hearing what is asked of its runs.
    disturbed: BTreeMap<usize, i64>,
    calls: calls::Calls,
    /// Replicas that a crasher killed.
    struck: BTreeSet<ReplicaId>,
    /// Runs that were ended by their rows alone.
    given_up_unbooked: BTreeSet<RunId>,
}

impl Checks {
    fn broken(&self, promise: Promise, what: impl Into<String>) -> Checked {
        Err(Violation { promise, at_ms: self.now_ms, what: what.into() })
    }

    /// A run, as the history calls it.
    pub(crate) fn name(&self, run: RunId) -> String {
        self.runs.get(&run).map_or_else(|| run.to_string(), |book| book.name.clone())
    }

    /// Something panicked.
    pub(crate) fn panicked(&self, what: &str) -> Checked {
        self.broken(Promise::NoPanic, what)
    }

    /// The process could not hear for a moment.
    pub(crate) fn disturbed(&mut self, process: usize) {
        self.disturbed.insert(process, self.now_ms);
    }
}
