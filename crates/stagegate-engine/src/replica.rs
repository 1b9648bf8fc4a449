//! This replica among the others: owns its heartbeat, its fence, and its claims.

use std::sync::{Arc, LazyLock, atomic::Ordering};

use rand::{Rng, SeedableRng, rngs::StdRng};
use stagegate_core::{
    Code, Error, ReplicaId,
    decide::{Run, Stimulus},
    store::{Heartbeat, Lease, Snapshot},
};
use tokio::{sync::OwnedSemaphorePermit, time::Instant};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::shared::{Life, Shared};

/// Heartbeats in one TTL.
const BEATS_PER_TTL: u32 = 3;
/// The share of the TTL, in percent, after which a replica that could not renew stops its own work.
const FENCE_PERCENT: u32 = 70;
/// Runs claimed at once.
const CLAIM_MAX: usize = 64;
/// Looks for work between two looks at what is owned.
const LOOKS_PER_AUDIT: u32 = 30;

/// A new life of this replica.
pub(crate) fn new_replica_id() -> ReplicaId {
    ReplicaId(Uuid::now_v7())
}

pub(crate) fn heartbeat(shared: &Shared, draining: bool) -> Heartbeat {
    Heartbeat {
        replica: shared.replica(),
        name: HOST_NAME.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        draining,
        ttl: shared.config.lease_ttl.0,
    }
}

/// Read once: a heartbeat touches no file.
static HOST_NAME: LazyLock<String> = LazyLock::new(|| {
    std::env::var("HOSTNAME")
        .ok()
        .or_else(|| std::fs::read_to_string("/proc/sys/kernel/hostname").ok())
        .map_or_else(|| "unknown".to_owned(), |name| name.trim().chars().take(100).collect())
});

/// Beats until `stop`. A replica that could not renew in time stops its own work before others may take it over; one
/// that was declared dead takes a new id. `renewed` is when the first heartbeat was asked for.
pub(crate) async fn beat(shared: Arc<Shared>, mut renewed: Instant, stop: CancellationToken) {
    let ttl = shared.config.lease_ttl.0;
    let every = ttl / BEATS_PER_TTL;
    let fence_after = ttl * FENCE_PERCENT / 100;
    let mut next = renewed + every;
    loop {
        // Wakes for the fence too: a beat that failed must not put it off to the next one.
        let fence = shared.life().map(|_| renewed + fence_after);
        tokio::select! {
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
        let beat = heartbeat(&shared, shared.drain.is_cancelled());
        next = asked + every / 4;
        match tokio::time::timeout(patience, shared.store.heartbeat(&beat)).await {
            Ok(Ok(pulse)) if pulse.alive => {
                (renewed, next) = (asked, asked + every);
                if shared.life().is_none() {
                    shared.begin_life(beat.replica);
                    shared.doubt();
                    tracing::info!("the database answers; this replica goes on");
                }
                if pulse.signalled.into_iter().filter(|run| !shared.notify(*run)).count() > 0 {
                    shared.doubt();
                }
            }
            Ok(Ok(_)) => {
                let lost = shared.end_life();
                shared.rename(new_replica_id());
                tracing::warn!(lost, "this replica had been declared dead; it begins a new life");
            }
            Ok(Err(error)) => tracing::warn!(%error, "the heartbeat failed"),
            Err(_) => tracing::warn!("the heartbeat got no answer"),
        }
    }
}

/// Claims and drives until the drain begins.
pub(crate) async fn claim(shared: Arc<Shared>) {
    let mut rng = StdRng::from_os_rng();
    let mut looks = 0;
    loop {
        let pause = shared.config.poll_interval.0.mul_f64(rng.random_range(0.5..1.0));
        let permit = tokio::select! {
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
            () = shared.drain.cancelled() => return,
            () = shared.work.notified() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// One look for work, as much as there is room for. Returns how many runs it took up.
async fn look(shared: &Arc<Shared>, first: OwnedSemaphorePermit) -> Result<usize, Error> {
    let Some(life) = shared.life() else { return Ok(0) };
    let mut permits = vec![first];
    while permits.len() < CLAIM_MAX
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
            shared.store.release(&owned).await
        }
        Err(error) => Err(error),
    };
    if let Err(error) = released {
        tracing::warn!(%error, "what this replica owns and does not drive could not be handed back");
        shared.doubt();
    }
}

/// Loads leased runs and drives each. A run that cannot be read keeps its lease and is left to the next audit, so that
/// it neither holds up the others nor is claimed again and again.
async fn take(
    shared: &Arc<Shared>,
    life: &Life,
    leases: &[Lease],
    permits: Vec<OwnedSemaphorePermit>,
) -> Result<usize, Error> {
    if leases.is_empty() {
        return Ok(0);
    }
    let started = Instant::now();
    let snapshots = match shared.store.load(leases).await {
        Ok(snapshots) => snapshots,
        Err(error) if error.is_retryable() => return Err(error.into()),
        Err(error) => {
            tracing::error!(%error, runs = leases.len(), "a batch of runs could not be read; each is read alone");
            load_one_by_one(shared, leases).await
        }
    };
    shared.metrics.checkpoint_load.observe(started.elapsed().as_secs_f64());
    let mut taken = 0;
    for (snapshot, permit) in snapshots.into_iter().zip(permits) {
        let lease = snapshot.lease;
        match take_one(shared, life, snapshot, permit).await {
            Ok(()) => taken += 1,
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

async fn load_one_by_one(shared: &Shared, leases: &[Lease]) -> Vec<Snapshot> {
    let mut snapshots = Vec::new();
    for lease in leases {
        match shared.store.load(std::slice::from_ref(lease)).await {
            Ok(loaded) => snapshots.extend(loaded),
            Err(error) => tracing::error!(run_id = %lease.run, %error, "a run cannot be read"),
        }
    }
    snapshots
}

async fn take_one(
    shared: &Arc<Shared>,
    life: &Life,
    snapshot: Snapshot,
    permit: OwnedSemaphorePermit,
) -> Result<(), Error> {
    let (lease, record) = (snapshot.lease, &snapshot.run);
    let request_id = record.request_id.clone();
    let pipeline = shared.pipeline(&record.tenant, &record.pipeline, Some(record.version)).await?;
    let Some((pipeline, _)) = pipeline else {
        return Err(Error::new(
            Code::CorruptRow,
            format!("the run's pipeline version {}@{} is not there", record.pipeline, record.version),
        ));
    };
    // A run that was never started has at most a cancel; all else has been seen by an owner before.
    let signals = if record.started_at.is_some() || record.cancel_requested {
        let mut found = shared.store.signals(&[lease]).await?;
        found.pop().map(|(_, signals)| signals).unwrap_or_default()
    } else {
        Vec::new()
    };
    let mut run = Run::from_snapshot(snapshot, pipeline, shared.config.park_after.0);
    run.on(Stimulus::Taken(signals), shared.clock.now(), 0.0);
    if let Some(handle) = shared.enter(lease.run, life) {
        shared.drive(handle, run, Vec::new(), permit, request_id.as_deref());
    }
    Ok(())
}
