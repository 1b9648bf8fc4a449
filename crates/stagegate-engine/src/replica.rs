//! This replica among the others: owns its heartbeat, its fence, and its claims.

use std::{
    cmp::Reverse,
    collections::{HashMap, hash_map::Entry},
    panic::AssertUnwindSafe,
    sync::{Arc, LazyLock, atomic::Ordering},
    time::Duration,
};

use chrono::{DateTime, Utc};
use futures::{FutureExt, future::BoxFuture};
use stagegate_core::{
    Capabilities, Code, Error, Pipeline, ReplicaId, RunId, RunState, StageState, Store, StoreError, StoreResult,
    TenantId, Word,
    decide::{self, Run, Stimulus},
    store::{Committed, Heartbeat, Lease, Pulse, PutBack, Signal, Snapshot, Weighed},
};
use tokio::{sync::OwnedSemaphorePermit, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    memory, observe,
    quarantine::{self, Standing, Stay},
    shared::{CLAIM_MAX, Life, Place, Shared, weight_of_run},
};

/// Heartbeats in one TTL.
const BEATS_PER_TTL: u32 = 3;
/// The share of the TTL, in percent, after which a replica that could not renew stops its own work.
const FENCE_PERCENT: u32 = 70;
/// How long claimed runs wait for room in memory before they are handed back.
const ROOM_PATIENCE: Duration = Duration::from_secs(2);
/// The most bytes of inputs and outputs that are loaded at once, as one part of the runs' budget in so many.
const LOAD_PARTS: u64 = 4;
/// How long runs that were claimed together are read in ever smaller parts, before the rest is handed back.
const READ_PATIENCE: Duration = Duration::from_mins(1);
/// Looks for work between two looks at what is owned.
const LOOKS_PER_AUDIT: u32 = 30;

/// A new life of this replica, beginning at `now`; `random` fills the rest.
pub(crate) fn new_replica_id(now: DateTime<Utc>, random: [u8; 10]) -> ReplicaId {
    let millis = u64::try_from(now.timestamp_millis()).unwrap_or(0);
    ReplicaId(uuid::Builder::from_unix_timestamp_millis(millis, &random).into_uuid())
}

pub(crate) fn heartbeat(shared: &Shared, draining: bool) -> Heartbeat {
    Heartbeat {
        replica: shared.replica(),
        name: HOST_NAME.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        draining,
        ttl: shared.config.lease_ttl.0,
        capabilities: Capabilities::own(),
        way_back: shared.config.way_back.0,
    }
}

/// Read once: a heartbeat touches no file.
static HOST_NAME: LazyLock<String> = LazyLock::new(|| {
    std::env::var("HOSTNAME")
        .ok()
        .or_else(|| std::fs::read_to_string("/proc/sys/kernel/hostname").ok())
        .map_or_else(|| "unknown".to_owned(), |name| name.trim().chars().take(100).collect())
});

/// How long after it asked for its last heartbeat that succeeded a replica stops its own work.
fn fence_after(ttl: Duration) -> Duration {
    ttl * FENCE_PERCENT / 100
}

/// Beats until `stop`. A replica that could not renew in time stops its own work before others may take it over; one
/// that was declared dead takes a new id. `renewed` is when the first heartbeat was asked for.
pub(crate) async fn beat(shared: Arc<Shared>, mut renewed: Instant, stop: CancellationToken) {
    let ttl = shared.config.lease_ttl.0;
    let every = ttl / BEATS_PER_TTL;
    let fence_after = fence_after(ttl);
    let mut next = renewed + every;
    shared.renewed(renewed + fence_after);
    loop {
        // Wakes for the fence too: a beat that failed must not put it off to the next one.
        let fence = shared.life().map(|_| renewed + fence_after);
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = tokio::time::sleep_until(fence.map_or(next, |fence| fence.min(next))) => {}
        }
        let asked = Instant::now();
        let mut patience = every;
        if let Some(fence) = fence {
            patience = fence.saturating_duration_since(asked);
            if patience.is_zero() {
                let stopped = shared.end_life();
                tracing::warn!(stopped, "the lease could not be renewed in time; this replica stops its own work");
                continue;
            }
        }
        next = asked + every / 4;
        if shared.is_stuck() {
            tracing::error!("the threads that execute runs do nothing; this replica stops renewing its lease");
            continue;
        }
        let beat = heartbeat(&shared, shared.drain.is_cancelled());
        match ask(&*shared.store, &beat, patience).await {
            Some((asked, Ok(pulse))) if pulse.alive => {
                (renewed, next) = (asked, asked + every);
                shared.learn_common(pulse.common);
                if let Some(now) = pulse.now {
                    shared.database_clock.learn(now, asked);
                }
                shared.renewed(renewed + fence_after);
                if shared.life().is_none() {
                    shared.begin_life(beat.replica);
                    shared.doubt();
                    tracing::info!("the database answers; this replica goes on");
                }
                shared.forget_untold();
                if pulse.signalled.into_iter().filter(|run| !shared.notify(*run)).count() > 0 {
                    shared.doubt();
                }
            }
            Some((_, Ok(_))) => {
                let lost = shared.end_life();
                shared.rename(new_replica_id(shared.clock.now(), shared.random()));
                tracing::warn!(lost, "this replica had been declared dead; it begins a new life");
            }
            Some((_, Err(error))) => tracing::warn!(%error, "the heartbeat failed"),
            None => tracing::warn!("the heartbeat got no answer"),
        }
    }
}

/// Shows, on the runtime that executes runs, that it does so.
pub(crate) async fn show_progress(shared: Arc<Shared>, stop: CancellationToken) {
    let every = shared.config.lease_ttl.0 / BEATS_PER_TTL;
    loop {
        shared.progressed();
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = tokio::time::sleep(every) => {}
        }
    }
}

/// Beats, and once more beside that where half of the patience brought no answer: the first may have gone out over a
/// connection that is dead. Returns the first answer, and when it was asked for.
async fn ask(store: &dyn Store, beat: &Heartbeat, patience: Duration) -> Option<(Instant, StoreResult<Pulse>)> {
    let asked = Instant::now();
    let mut first = store.heartbeat(beat);
    tokio::select! {
        biased;
        answer = &mut first => return Some((asked, answer)),
        () = tokio::time::sleep(patience / 2) => {}
    }
    let asked_again = Instant::now();
    tokio::select! {
        biased;
        answer = first => Some((asked, answer)),
        answer = store.heartbeat(beat) => Some((asked_again, answer)),
        () = tokio::time::sleep(patience / 2) => None,
    }
}

/// Claims and drives until the drain begins.
pub(crate) async fn claim(shared: Arc<Shared>) {
    let mut looks = 0;
    loop {
        let pause = shared.config.poll_interval.0.mul_f64(0.5 + shared.random::<f64>() / 2.0);
        let permit = tokio::select! {
            biased;
            () = shared.drain.cancelled() => return,
            permit = Arc::clone(&shared.room).acquire_owned() => permit.ok(),
            () = tokio::time::sleep(pause) => None, // Full: but what is owned is looked after.
        };
        looks += 1;
        if shared.doubt.swap(false, Ordering::Relaxed) || looks >= LOOKS_PER_AUDIT {
            looks = 0;
            audit(&shared).await;
        }
        let Some(permit) = permit else { continue };
        let driven = match look(&shared, permit).await {
            Ok(driven) => driven,
            Err(error) => {
                tracing::warn!(%error, "no look for work was possible");
                shared.doubt(); // It may have happened.
                0
            }
        };
        if driven > 0 {
            continue;
        }
        tokio::select! {
            biased;
            () = shared.drain.cancelled() => return,
            () = shared.work.notified() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// One look for work, as much as there is room for. Returns how many runs it took up.
async fn look(shared: &Arc<Shared>, first: OwnedSemaphorePermit) -> Result<usize, Error> {
    let Some(life) = shared.life().filter(|_| !shared.database_clock.is_skewed()) else { return Ok(0) };
    // Nothing is begun beside a run that has its last chance.
    if shared.quarantine.is_closed() {
        return Ok(0);
    }
    let wanted = shared.wanted_bytes.load(Ordering::Relaxed);
    if !shared.memory.runs.has_room(wanted) {
        // It lapses: another replica may have taken what needs so much, and smaller runs may be due.
        shared.wanted_bytes.store(wanted / 2, Ordering::Relaxed);
        return Ok(0);
    }
    let mut permits = vec![first];
    let claim_max = shared.claim_max.load(Ordering::Relaxed);
    while permits.len() < claim_max
        && let Ok(permit) = Arc::clone(&shared.room).try_acquire_owned()
    {
        permits.push(permit);
    }
    let limit = u32::try_from(permits.len()).unwrap_or(u32::MAX);
    let leases = shared.store.claim(life.replica, limit, &shared.shares).await?;
    shared.metrics.runs_claimed.inc_by(leases.len() as u64);
    shared.backlog.store(!leases.is_empty(), Ordering::Relaxed);
    take(shared, &life, &leases, permits).await
}

/// What the database says that we own and no driver knows: its insert or claim succeeded and its answer was lost, or it
/// could not be gone on with. It is handed back, not driven under the lease that is there: a step that somebody wrote
/// under that lease may still be on its way, and only a new epoch fences it.
async fn audit(shared: &Arc<Shared>) {
    let Some(life) = shared.life() else { return shared.doubt() };
    let released = match shared.store.owned(life.replica).await {
        Ok(mut owned) => {
            owned.retain(|lease| !shared.is_driven(lease.run));
            if owned.is_empty() {
                Ok(())
            } else {
                // One that somebody holds is passed over: the next look tells whether there are any.
                shared.doubt();
                shared.store.release(&owned).await
            }
        }
        Err(error) => Err(error),
    };
    if let Err(error) = released {
        tracing::warn!(%error, "what this replica owns and does not drive could not be handed back");
        shared.doubt();
    }
}

/// Loads leased runs and drives each, in parts that fit into memory. What finds no room there soon is handed back: others
/// may have some, and the next claim takes less.
async fn take(
    shared: &Arc<Shared>,
    life: &Life,
    leases: &[Lease],
    permits: Vec<OwnedSemaphorePermit>,
) -> Result<usize, Error> {
    if leases.is_empty() {
        return Ok(0);
    }
    let weighed = readable(&*shared.store, leases, "the size of a run", |store, leases| store.weigh(leases)).await?;
    let admitted = admit(shared, weighed).await?;
    let part_max = shared.memory.runs.max_bytes() / LOAD_PARTS;
    let (mut admitted, mut permits) = (admitted.into_iter().peekable(), permits.into_iter());
    let mut taken = 0;
    while let (Some(first), Some(among_runs)) = (admitted.next(), permits.next()) {
        let Some(in_memory) = room_for(shared, weight_of_run(first.bytes)).await else {
            // One run goes beside half of the budget, however large it is.
            let wanted = weight_of_run(first.bytes).min(shared.memory.runs.max_bytes() / 2);
            let rest: Vec<Lease> = [first].into_iter().chain(admitted).map(|each| each.lease).collect();
            tracing::warn!(runs = rest.len(), "claimed runs do not fit into memory now; this replica hands them back");
            shared.claim_max.store(taken.max(1), Ordering::Relaxed);
            shared.wanted_bytes.store(wanted, Ordering::Relaxed);
            shared.store.release(&rest).await?;
            return Ok(taken);
        };
        let mut part_bytes = in_memory.bytes();
        let mut part = vec![first.placed(among_runs, in_memory)];
        while let Some(bytes) = admitted.peek().map(|each| each.bytes)
            && part_bytes + weight_of_run(bytes) <= part_max
            && let Some(in_memory) = shared.memory.runs.try_acquire(weight_of_run(bytes))
            && let Some(among_runs) = permits.next()
            && let Some(next) = admitted.next()
        {
            part_bytes += in_memory.bytes();
            part.push(next.placed(among_runs, in_memory));
        }
        taken += take_part(shared, life, part).await?;
    }
    shared.wanted_bytes.store(0, Ordering::Relaxed);
    let claim_max = shared.claim_max.load(Ordering::Relaxed);
    shared.claim_max.store((claim_max * 2).min(CLAIM_MAX), Ordering::Relaxed);
    Ok(taken)
}

/// A claimed run that may be driven now.
struct Admitted {
    lease: Lease,
    bytes: u64,
    crashes: u32,
    stay: Option<Stay>,
}

impl Admitted {
    fn placed(self, among_runs: OwnedSemaphorePermit, in_memory: memory::Permit) -> (Lease, Place) {
        (self.lease, Place { among_runs, in_memory, crashes: self.crashes, stay: self.stay })
    }
}

/// Which claimed runs may be driven now: before anything of them is read, because that may be what crashed their owners.
/// The others are put back.
async fn admit(shared: &Shared, mut weighed: Vec<Weighed>) -> Result<Vec<Admitted>, Error> {
    let max = shared.config.run_crashes_max;
    let (mut admitted, mut back): (Vec<Admitted>, Vec<PutBack>) = (Vec::with_capacity(weighed.len()), Vec::new());
    // The nearest to the limit first; the others stay as they were claimed.
    weighed.sort_by_key(|each| Reverse(quarantine::room_wanted(each.crashes, max)));
    for Weighed { lease, tenant, bytes, crashes } in weighed {
        if crashes > max && max > 0 {
            // Its last owner had only to end it.
            if let Err(error) = give_up(shared, lease, &tenant, crashes).await {
                tracing::warn!(run_id = %lease.run, %error, "a run crashed too often and could not be ended; another attempt follows");
                shared.doubt();
            }
            continue;
        }
        let stay = match shared.quarantine.admit(crashes, max) {
            _ if shared.quarantine.is_closed() && !admitted.is_empty() => {
                back.push(PutBack { lease, after: Duration::ZERO, crashed: false });
                continue;
            }
            Standing::Free => None,
            Standing::Suspect(stay) => {
                tracing::warn!(run_id = %lease.run, crashes, "the last owners of this run crashed; this replica tries the run again");
                Some(stay)
            }
            Standing::Later => {
                back.push(PutBack { lease, after: quarantine::later(shared), crashed: false });
                continue;
            }
        };
        admitted.push(Admitted { lease, bytes, crashes, stay });
    }
    if !back.is_empty() {
        shared.store.put_back(&back).await?;
    }
    Ok(admitted)
}

/// Ends a run by its rows alone.
async fn give_up(shared: &Shared, lease: Lease, tenant: &TenantId, crashes: u32) -> Result<(), Error> {
    let Some(detail) = shared.store.run(tenant, lease.run).await? else { return Ok(()) };
    let (now, failure) = (shared.clock.now(), quarantine::failure(shared, crashes));
    let Some(commit) = decide::give_up(lease, &detail.run, detail.stages, failure, now) else {
        tracing::warn!(run_id = %lease.run, "a leased run is in a state of a newer release; it is left to others");
        return Ok(());
    };
    let committed = shared.store.commit(std::slice::from_ref(&commit)).await?;
    if committed == [Committed::Now] {
        observe::given_up(shared, &detail.run, &commit);
        shared.tell(lease.run, commit.events);
    }
    Ok(())
}

/// Room in memory for a run, where there is some soon.
async fn room_for(shared: &Shared, bytes: u64) -> Option<memory::Permit> {
    tokio::select! {
        biased;
        permit = shared.memory.runs.acquire(bytes) => Some(permit),
        () = shared.drain.cancelled() => None,
        () = tokio::time::sleep(ROOM_PATIENCE) => None,
    }
}

/// Loads leased runs together and drives each. A run that cannot be read keeps its lease and is left to the next audit, so
/// that it neither holds up the others nor is claimed again and again.
async fn take_part(shared: &Arc<Shared>, life: &Life, part: Vec<(Lease, Place)>) -> Result<usize, Error> {
    let leases: Vec<Lease> = part.iter().map(|(lease, _)| *lease).collect();
    let leases = &leases[..];
    let mut places: HashMap<Lease, Place> = part.into_iter().collect();
    let started = Instant::now();
    let snapshots = readable(&*shared.store, leases, "a run", |store, leases| store.load(leases)).await?;
    // A run that was never started has at most a cancel; all else has been seen by an owner before.
    let may_be_signalled = |run: &Snapshot| run.run.started_at.is_some() || run.run.cancel_requested;
    let signalled: Vec<Lease> = snapshots.iter().filter(|run| may_be_signalled(run)).map(|run| run.lease).collect();
    let signals = readable(&*shared.store, &signalled, "what is asked of a run", signals_of_each).await?;
    let mut signals: HashMap<RunId, Vec<Signal>> = signals.into_iter().collect();
    shared.metrics.checkpoint_load.observe(started.elapsed().as_secs_f64());
    let mut pipelines = HashMap::new();
    let mut taken = 0;
    for snapshot in snapshots {
        let lease = snapshot.lease;
        let Some(place) = places.remove(&lease) else { continue };
        if let Some(word) = unknown_state(&snapshot) {
            tracing::warn!(run_id = %lease.run, state = %word, "a leased run is in a state of a newer release; it is left to others");
            continue;
        }
        let noted = if may_be_signalled(&snapshot) { signals.remove(&lease.run) } else { Some(Vec::new()) };
        let Some(noted) = noted else { continue };
        let (name, version) = (&snapshot.run.pipeline, snapshot.run.version);
        let key = (snapshot.run.tenant.clone(), name.clone(), version);
        let pipeline = match pipelines.entry(key) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => unknown.insert(pipeline_of(shared, &snapshot).await),
        };
        match pipeline.clone() {
            Ok(pipeline) => {
                take_one(shared, life, snapshot, pipeline, noted, place).await;
                taken += 1;
            }
            Err(error) if error.code == Code::Unavailable => {
                tracing::warn!(run_id = %lease.run, %error, "a leased run could not be taken up; it is handed back");
                shared.doubt();
            }
            Err(error) => {
                tracing::error!(run_id = %lease.run, %error, "a leased run could not be taken up; it is tried again later");
            }
        }
    }
    Ok(taken)
}

/// The state of the run or of one of its stages that this release does not know: it would not know how to go on.
fn unknown_state(snapshot: &Snapshot) -> Option<Word> {
    let of_stages = snapshot.stages.iter().find_map(|stage| match stage.state {
        StageState::Unknown(word) => Some(word),
        _ => None,
    });
    if let RunState::Unknown(word) = snapshot.run.state { Some(word) } else { of_stages }
}

/// Something of each lease, as the store tells it.
type Reading<T> = for<'a> fn(&'a dyn Store, &'a [Lease]) -> BoxFuture<'a, StoreResult<Vec<T>>>;

type Signals = (RunId, Vec<Signal>);

/// The signals of each lease that was asked about, those without any included.
fn signals_of_each<'a>(store: &'a dyn Store, leases: &'a [Lease]) -> BoxFuture<'a, StoreResult<Vec<Signals>>> {
    Box::pin(async {
        let mut found: HashMap<RunId, Vec<Signal>> = store.signals(leases).await?.into_iter().collect();
        Ok(leases.iter().map(|lease| (lease.run, found.remove(&lease.run).unwrap_or_default())).collect())
    })
}

/// Reads something of every lease that it can be read of. A batch that cannot be read though the database answers (for a
/// row of it, or because it is more than can be read in a statement's time) is halved until those that are to blame are
/// found: handed back, it would be claimed and fail as one again. They are left to the next audit. Fails where nothing
/// can be read now.
async fn readable<T>(store: &dyn Store, leases: &[Lease], what: &str, read: Reading<T>) -> Result<Vec<T>, Error> {
    let until = Instant::now() + READ_PATIENCE;
    let mut found = Vec::with_capacity(leases.len());
    let mut parts = vec![leases];
    let mut passing = None;
    while let Some(part) = parts.pop() {
        if part.is_empty() {
            continue;
        }
        let panicked = |_| Err(StoreError::Defect("reading it panicked".to_owned()));
        match AssertUnwindSafe(read(store, part)).catch_unwind().await.unwrap_or_else(panicked) {
            Ok(some) => found.extend(some),
            Err(error) if error.is_retryable() && (Instant::now() >= until || store.ping().await.is_err()) => {
                return Err(error.into());
            }
            Err(error) if part.len() == 1 => {
                tracing::error!(run_id = %part[0].run, %error, "{what} cannot be read; it is tried again later");
                passing = Some(error).filter(StoreError::is_retryable).or(passing);
            }
            Err(error) => {
                tracing::warn!(%error, runs = part.len(), "a batch of runs cannot be read; it is halved");
                let (left, right) = part.split_at(part.len() / 2);
                parts.extend([right, left]);
            }
        }
    }
    match passing {
        Some(error) if found.is_empty() => Err(error.into()),
        _ => Ok(found),
    }
}

async fn pipeline_of(shared: &Shared, snapshot: &Snapshot) -> Result<Arc<Pipeline>, Error> {
    let (name, version) = (&snapshot.run.pipeline, snapshot.run.version);
    let found = shared.pipeline(&snapshot.run.tenant, name, Some(version)).await?;
    found.map(|(pipeline, _)| pipeline).ok_or_else(|| {
        Error::new(Code::CorruptRow, format!("the run's pipeline version {name}@{version} is not there"))
    })
}

/// Begins to drive a run, or to end one that crashed too often. A panic over it counts as one of its driver.
async fn take_one(
    shared: &Arc<Shared>,
    life: &Life,
    snapshot: Snapshot,
    pipeline: Arc<Pipeline>,
    signals: Vec<Signal>,
    place: Place,
) {
    let lease = snapshot.lease;
    let request_id = snapshot.run.request_id.clone();
    shared.admission.claimed(&snapshot.run.tenant);
    let (crashes, max) = (place.crashes, shared.config.run_crashes_max);
    let began = std::panic::catch_unwind(AssertUnwindSafe(|| {
        let mut run = Run::from_snapshot(snapshot, pipeline, shared.config.park_after.0);
        let stimulus = if crashes >= max && max > 0 {
            Stimulus::GivenUp { signals, failure: quarantine::failure(shared, crashes) }
        } else {
            Stimulus::Taken(signals)
        };
        run.on(stimulus, shared.clock.now(), 0.0);
        run
    }));
    let Ok(run) = began else {
        tracing::error!(run_id = %lease.run, crashes, "this run panicked while the replica loaded it; another attempt follows");
        return shared.panicked(lease, crashes).await;
    };
    let handle = shared.take_over(lease.run, life);
    shared.drive(handle, run, Vec::new(), place, request_id.as_deref());
}

#[cfg(test)]
mod tests {
    use stagegate_core::Epoch;
    use stagegate_store_sqlite::SqliteStore;
    use stagegate_telemetry::Metrics;

    use super::*;

    /// Runs 3 and 7 cannot be read, and a batch with them neither. A batch with run 100 takes too long.
    fn reading<'a>(_: &'a dyn Store, leases: &'a [Lease]) -> BoxFuture<'a, StoreResult<Vec<u128>>> {
        Box::pin(async {
            let runs: Vec<u128> = leases.iter().map(|lease| lease.run.0.as_u128()).collect();
            if runs.contains(&100) {
                return Err(StoreError::Unavailable("away".to_owned()));
            }
            let is_bad = |run: &&u128| matches!(run, 3 | 7);
            match runs.iter().find(is_bad) {
                Some(run) => Err(StoreError::Corrupt {
                    table: "runs",
                    column: "input",
                    id: run.to_string(),
                    message: "no JSON".to_owned(),
                }),
                None => Ok(runs),
            }
        })
    }

    #[test]
    fn a_replica_stops_at_seventy_percent_of_its_lease_after_more_than_one_beat() {
        let ttl = Duration::from_secs(10);
        assert_eq!(fence_after(ttl), Duration::from_secs(7));
        assert!(fence_after(ttl) > ttl / BEATS_PER_TTL * 2, "a beat that fails can be repeated");
    }

    fn leases(runs: impl IntoIterator<Item = u128>) -> Vec<Lease> {
        runs.into_iter().map(|run| Lease { run: RunId(uuid::Uuid::from_u128(run)), epoch: Epoch(1) }).collect()
    }

    #[tokio::test]
    async fn runs_that_cannot_be_read_hold_up_no_other() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = SqliteStore::open(&folder.path().join("test.db"), Metrics::new()).await.expect("a store");
        let found = readable(&store, &leases(0..20), "a run", reading).await.expect("the others");
        assert_eq!(found, (0..20).filter(|run| ![3, 7].contains(run)).collect::<Vec<_>>());
        let found = readable(&store, &leases([1, 3, 100]), "a run", reading).await.expect("one of them");
        assert_eq!(found, [1], "what could not be read for now is left to the audit");
        readable(&store, &leases([100]), "a run", reading).await.expect_err("nothing can be read");
    }
}
