//! What the parts of one engine share, and the table of the runs that it drives.

use std::{
    collections::{BTreeSet, HashMap},
    hash::{BuildHasherDefault, DefaultHasher},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use chrono::{DateTime, Utc};
use rand::{
    Rng,
    distr::{Distribution, StandardUniform},
    rngs::StdRng,
};
use stagegate_core::{
    Capabilities, Capability, Clock, Error, Event, Pipeline, PipelineName, ReplicaId, RunId, Store, TenantId,
    decide::{Effect, Run},
    fair::{Limits, Shares},
    hint::Hints,
    store::{Commit, Committed, Lease, NewRun, PutBack, Submitted},
};
use stagegate_llm::Llm;
use stagegate_telemetry::Metrics;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument;

use crate::{
    admission::Admission,
    batch::Batcher,
    clock::DatabaseClock,
    config::EngineConfig,
    evaluation::Evaluations,
    follow::Hub,
    memory::{self, Memory},
    pipelines::Pipelines,
    quarantine::{self, Quarantine, Stay},
    runner::{Driver, Ended, Handle},
    whisper::Whisper,
};

/// What a driver's task may hold beside its run; there is one for each run in flight.
const DRIVER_MAX_BYTES: usize = 2 * 1024;

/// Runs claimed at once: what a dead replica leaves is taken up in a few steps, and a step is a few queries.
pub(crate) const CLAIM_MAX: usize = 256;

/// What a run takes beside its inputs and outputs, in bytes: about what its driver and its stages hold.
const RUN_BYTES: u64 = 4 * 1024;
/// How often a payload is held at once: by its run, and on its way from or to the store.
const RUN_COPIES: u64 = 2;

/// Runs without a driver here that something was asked of, kept between two heartbeats.
const UNTOLD_MAX: usize = 10_000;

/// How long the runtime that executes runs may do nothing before this replica counts as stuck. Longer than anything that
/// keeps it busy may take, so that what is only slow is not repeated elsewhere.
const STUCK_AFTER: Duration = Duration::from_mins(1);

/// A time in which this replica may count on its leases: from a heartbeat until it could not renew, or was declared
/// dead. Whatever is leased belongs to one life and stops with it, also what was still being leased when it ended.
#[derive(Debug, Clone)]
pub(crate) struct Life {
    pub(crate) replica: ReplicaId,
    pub(crate) ended: CancellationToken,
}

impl Life {
    fn of(replica: ReplicaId) -> Self {
        Self { replica, ended: CancellationToken::new() }
    }
}

/// Room for one run: among the runs under way, and in memory.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) among_runs: OwnedSemaphorePermit,
    pub(crate) in_memory: memory::Permit,
    /// How often it crashed before.
    pub(crate) crashes: u32,
    /// Where it is suspected for that.
    pub(crate) stay: Option<Stay>,
}

/// What a run with so many bytes of inputs and outputs takes in memory.
pub(crate) fn weight_of_run(text_bytes: u64) -> u64 {
    RUN_BYTES + text_bytes.saturating_mul(RUN_COPIES)
}

/// The runs that are driven. Hashed without a random key, so that they are walked through in an order that a simulation's
/// seed decides; nobody outside can choose a run's id.
type Driven = HashMap<RunId, Arc<Handle>, BuildHasherDefault<DefaultHasher>>;

/// What the parts of one engine share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: EngineConfig,
    pub(crate) shares: Shares,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) llm: Arc<Llm>,
    pub(crate) metrics: Metrics,
    /// What is judged by time is judged by this: the database's time.
    pub(crate) clock: Arc<dyn Clock>,
    /// The same, where heartbeats correct it.
    pub(crate) database_clock: Arc<DatabaseClock>,
    rng: Mutex<StdRng>,
    /// Until when the leases count, as far as the last heartbeat told; None before the first.
    fence_at: Mutex<Option<Instant>>,
    /// When the runtime that executes runs last did anything, where the heartbeat has one of its own.
    progress_at: Mutex<Option<Instant>>,
    pub(crate) hub: Arc<Hub>,
    pub(crate) whisper: Whisper,
    pub(crate) steps: Batcher<Commit, Committed>,
    pub(crate) submits: Batcher<NewRun, Submitted>,
    /// Room for runs; a driver holds a permit until its last commit is acknowledged.
    pub(crate) room: Arc<Semaphore>,
    /// Room in memory.
    pub(crate) memory: Memory,
    /// The most runs that the next claim takes: fewer where the last one took more than there was memory for.
    pub(crate) claim_max: AtomicUsize,
    /// What a claimed run would have taken in memory that was handed back for want of it: until there is as much, nothing
    /// is claimed.
    pub(crate) wanted_bytes: AtomicU64,
    pub(crate) admission: Admission,
    /// Others wait to be claimed: what is submitted now waits behind them. Cleared by a claim that finds nobody.
    pub(crate) backlog: AtomicBool,
    /// There may be work to claim.
    pub(crate) work: Notify,
    /// Something may be owned that no driver knows: an insert or a claim whose answer was lost. A flag and no wake-up,
    /// so that a store that fails is not asked without a pause.
    pub(crate) doubt: AtomicBool,
    /// Set once: nothing new starts.
    pub(crate) drain: CancellationToken,
    /// It will drain soon: readiness says so already, everything else goes on.
    pub(crate) leaving: AtomicBool,
    pub(crate) drivers: TaskTracker,
    life: Mutex<Life>,
    driven: Mutex<Driven>,
    /// Runs of ours that are asked something and have no driver yet: it is told when it begins.
    untold: Mutex<BTreeSet<RunId>>,
    pipelines: Pipelines,
    /// What every live replica can read and do, as the last heartbeat told.
    common: Mutex<Capabilities>,
    pub(crate) evaluations: Arc<Evaluations>,
    pub(crate) quarantine: Quarantine,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.hub.close();
    }
}

impl Shared {
    #[expect(clippy::too_many_arguments, reason = "called once, by `Engine::start`")]
    pub(crate) fn new(
        config: EngineConfig,
        store: Arc<dyn Store>,
        llm: Arc<Llm>,
        metrics: Metrics,
        database_clock: Arc<DatabaseClock>,
        rng: StdRng,
        steps: Batcher<Commit, Committed>,
        submits: Batcher<NewRun, Submitted>,
        pipelines: Pipelines,
        evaluations: Arc<Evaluations>,
        replica: ReplicaId,
        hints: Option<Arc<dyn Hints>>,
        memory: Memory,
    ) -> Self {
        Self {
            room: Arc::new(Semaphore::new(config.max_runs.min(Semaphore::MAX_PERMITS))),
            shares: config.shares(),
            config,
            store,
            llm,
            metrics,
            clock: Arc::<DatabaseClock>::clone(&database_clock),
            database_clock,
            rng: Mutex::new(rng),
            hub: Arc::default(),
            whisper: Whisper::new(hints),
            steps,
            submits,
            memory,
            claim_max: AtomicUsize::new(CLAIM_MAX),
            wanted_bytes: AtomicU64::new(0),
            admission: Admission::default(),
            backlog: AtomicBool::new(false),
            work: Notify::new(),
            doubt: AtomicBool::new(false),
            drain: CancellationToken::new(),
            leaving: AtomicBool::new(false),
            drivers: TaskTracker::new(),
            life: Mutex::new(Life::of(replica)),
            driven: Mutex::default(),
            fence_at: Mutex::default(),
            progress_at: Mutex::default(),
            untold: Mutex::default(),
            pipelines,
            common: Mutex::default(),
            evaluations,
            quarantine: Quarantine::default(),
        }
    }

    /// Something random: every id and jitter of this engine comes from here, so that a seed decides them.
    pub(crate) fn random<T>(&self) -> T
    where
        StandardUniform: Distribution<T>,
    {
        self.rng.lock().unwrap_or_else(PoisonError::into_inner).random()
    }

    fn present(&self) -> std::sync::MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn replica(&self) -> ReplicaId {
        self.present().replica
    }

    /// The present life; None while nothing may be leased.
    pub(crate) fn life(&self) -> Option<Life> {
        let life = self.present().clone();
        (!life.ended.is_cancelled()).then_some(life)
    }

    /// The id of the next life.
    pub(crate) fn rename(&self, replica: ReplicaId) {
        self.present().replica = replica;
    }

    pub(crate) fn begin_life(&self, replica: ReplicaId) {
        *self.present() = Life::of(replica);
    }

    /// Every driver gives its run back, with what is under way cut off and booked.
    pub(crate) fn give_back(&self) {
        self.driven().values().for_each(|handle| handle.give_back());
    }

    /// Ends the present life: every driver stops at once. Returns how many there were.
    pub(crate) fn end_life(&self) -> usize {
        self.present().ended.cancel();
        // A driver leaves the table after it has given its run back; until then the audit leaves the run alone.
        let driven = self.driven();
        driven.values().for_each(|handle| handle.stop());
        driven.len()
    }

    /// Whether a run may be taken in its submit: nobody waits before it, and nothing is to be counted.
    pub(crate) fn may_lease(&self, tenant: &TenantId, limits: &Limits, start_at: Option<DateTime<Utc>>) -> bool {
        start_at.is_none()
            && limits.is_empty()
            && self.shares.of(tenant).max_runs.is_none()
            && !self.backlog.load(Ordering::Relaxed)
            && !self.quarantine.is_closed()
    }

    /// A heartbeat told what every live replica can read and do.
    pub(crate) fn learn_common(&self, common: Capabilities) {
        *self.common.lock().unwrap_or_else(PoisonError::into_inner) = common;
    }

    /// Whether every live replica understands it: only then is anything of it written.
    pub(crate) fn common(&self, capability: Capability) -> bool {
        self.common.lock().unwrap_or_else(PoisonError::into_inner).common(capability)
    }

    /// A heartbeat succeeded: the leases count until then.
    pub(crate) fn renewed(&self, fence_at: Instant) {
        *self.fence_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(fence_at);
    }

    /// Whether the leases count no more, also where nobody has noticed yet.
    pub(crate) fn is_past_fence(&self) -> bool {
        self.fence_at.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|at| Instant::now() >= at)
    }

    /// The runtime that executes runs does something.
    pub(crate) fn progressed(&self) {
        *self.progress_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Whether it has done nothing for too long.
    pub(crate) fn is_stuck(&self) -> bool {
        let at = *self.progress_at.lock().unwrap_or_else(PoisonError::into_inner);
        at.is_some_and(|at| at.elapsed() > STUCK_AFTER)
    }

    pub(crate) fn doubt(&self) {
        self.doubt.store(true, Ordering::Relaxed);
    }

    fn driven(&self) -> std::sync::MutexGuard<'_, Driven> {
        self.driven.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a run that is leased in this life in the table; None where it is driven already.
    pub(crate) fn enter(&self, run: RunId, life: &Life) -> Option<Arc<Handle>> {
        let mut driven = self.driven();
        if driven.contains_key(&run) {
            return None;
        }
        Some(self.insert(&mut driven, run, life))
    }

    /// The same for a run that was claimed: its epoch is newer than any that is driven here. A driver that is still there
    /// has nothing left to do (its last step ended the lease) or is fenced.
    pub(crate) fn take_over(&self, run: RunId, life: &Life) -> Arc<Handle> {
        let mut driven = self.driven();
        if let Some(former) = driven.remove(&run) {
            former.stop();
        }
        self.insert(&mut driven, run, life)
    }

    fn insert(&self, driven: &mut Driven, run: RunId, life: &Life) -> Arc<Handle> {
        let handle = Arc::new(Handle::default());
        driven.insert(run, Arc::clone(&handle));
        // Either the end of the life finds it in the table, or it is seen here.
        if life.ended.is_cancelled() {
            handle.stop();
        }
        if self.untold().remove(&run) {
            handle.signal();
        }
        self.count(driven.len());
        handle
    }

    fn untold(&self) -> std::sync::MutexGuard<'_, BTreeSet<RunId>> {
        self.untold.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A heartbeat is about to tell anew which runs are asked something.
    pub(crate) fn forget_untold(&self) {
        self.untold().clear();
    }

    /// Takes a run out of the table, if it is still this entry.
    pub(crate) fn forget(&self, run: RunId, handle: &Arc<Handle>) {
        let mut driven = self.driven();
        if driven.get(&run).is_some_and(|entry| Arc::ptr_eq(entry, handle)) {
            driven.remove(&run);
        }
        self.count(driven.len());
    }

    fn count(&self, driven: usize) {
        let driven = i64::try_from(driven).unwrap_or(i64::MAX);
        self.metrics.runs_in_flight.set(driven);
        self.metrics.leases_held.set(driven);
    }

    pub(crate) fn is_driven(&self, run: RunId) -> bool {
        self.driven().contains_key(&run)
    }

    /// Leaves the runs that no driver of ours has.
    pub(crate) fn retain_elsewhere(&self, runs: &mut Vec<(RunId, u64)>) {
        let driven = self.driven();
        runs.retain(|(run, _)| !driven.contains_key(run));
    }

    /// Hands durable events of a run to those who watch it, here and elsewhere.
    pub(crate) fn tell(&self, run: RunId, events: Vec<Event>) {
        self.hub.tell(run, events);
        self.whisper.news(run);
    }

    /// Nothing new starts; what is under way goes on to its next commit.
    pub(crate) fn begin_drain(&self) {
        self.drain.cancel();
        for handle in self.driven().values() {
            handle.wake();
        }
    }

    /// Tells a run's driver that there are signals. False where no driver of ours has it.
    pub(crate) fn notify(&self, run: RunId) -> bool {
        let driven = self.driven();
        if let Some(handle) = driven.get(&run) {
            handle.signal();
        } else {
            let mut untold = self.untold();
            if untold.len() < UNTOLD_MAX {
                untold.insert(run);
            } else {
                drop(untold);
                self.doubt(); // Too many to be kept: the next heartbeat tells of those that are ours.
            }
        }
        driven.contains_key(&run)
    }

    /// Drives a leased run in a task of its own.
    pub(crate) fn drive(
        self: &Arc<Self>,
        handle: Arc<Handle>,
        run: Run,
        first: Vec<Effect>,
        place: Place,
        request_id: Option<&str>,
    ) {
        let shared = Arc::clone(self);
        let lease = run.lease();
        let Place { among_runs, in_memory, crashes, stay } = place;
        // Its end may make room for one that waits for its limit.
        let limited = run.pipeline().concurrency.is_some() || self.shares.of(run.tenant()).max_runs.is_some();
        let span = tracing::info_span!(
            parent: None,
            "run",
            run_id = %lease.run,
            tenant = %run.tenant(),
            pipeline = %run.pipeline().name,
            request_id,
        );
        let mut driver = Box::new(Driver::new(Arc::clone(&shared), Arc::clone(&handle), run, in_memory, stay));
        let work = async move {
            let outcome = futures::FutureExt::catch_unwind(std::panic::AssertUnwindSafe(driver.drive(first))).await;
            drop(driver);
            let ended = outcome.unwrap_or_else(|_| {
                tracing::error!(crashes, "the driver of this run panicked; the run is tried again later");
                Ended::Panicked
            });
            shared.forget(lease.run, &handle);
            match ended {
                // One that was given back waits for whoever looks first.
                Ended::Committed if shared.drain.is_cancelled() => shared.whisper.work(),
                Ended::Committed | Ended::Broken => {}
                Ended::Lost => {
                    shared.metrics.leases_lost.inc();
                    tracing::warn!(epoch = lease.epoch.0, "the lease is gone; another replica has this run");
                }
                Ended::Panicked => shared.panicked(lease, crashes).await,
                Ended::HandBack => {
                    // Where this fails too, the heartbeat's end hands it back, or the next look at what we own.
                    if let Err(error) = shared.store.release(&[lease]).await {
                        tracing::warn!(%error, "the run could not be handed back");
                        shared.doubt();
                    } else {
                        shared.whisper.work();
                    }
                }
            }
            drop(among_runs); // Whoever waits for room to claim is woken by this.
            if limited {
                shared.work.notify_one();
            }
        };
        debug_assert!(std::mem::size_of_val(&work) <= DRIVER_MAX_BYTES, "{}", std::mem::size_of_val(&work));
        self.drivers.spawn(work.instrument(span));
    }

    /// Hands back a run over which this replica panicked, after so many crashes before: others try it again, later.
    pub(crate) async fn panicked(&self, lease: Lease, crashes: u32) {
        let back = PutBack { lease, after: quarantine::backoff(self, crashes), crashed: true };
        if let Err(error) = self.store.put_back(&[back]).await {
            tracing::warn!(%error, "the run could not be handed back");
            self.doubt();
        }
    }

    /// A compiled version; None for the newest.
    pub(crate) async fn pipeline(
        &self,
        tenant: &TenantId,
        name: &PipelineName,
        version: Option<u32>,
    ) -> Result<Option<(Arc<Pipeline>, u32)>, Error> {
        self.pipelines.get(tenant, name, version).await
    }
}
