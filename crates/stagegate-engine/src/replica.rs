//! This replica among the others: owns its heartbeat, its fence, and its claims.

use std::{sync::Arc, time::Duration};

use rand::{Rng, SeedableRng, rngs::StdRng};
use stagegate_core::{
    Error, ReplicaId,
    decide::{Run, Stimulus},
    store::{Heartbeat, Lease, Snapshot},
};
use tokio::{sync::OwnedSemaphorePermit, time::Instant};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::shared::Shared;

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
        name: host_name(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        draining,
        ttl: shared.config.lease_ttl.0,
    }
}

fn host_name() -> String {
    std::env::var("HOSTNAME")
        .ok()
        .or_else(|| std::fs::read_to_string("/proc/sys/kernel/hostname").ok())
        .map_or_else(|| "unknown".to_owned(), |name| name.trim().chars().take(100).collect())
}

/// Beats until `stop`. A replica that could not renew in time stops its own work before others may take it over; one
/// that was declared dead takes a new id.
pub(crate) async fn beat(shared: Arc<Shared>, stop: CancellationToken) {
    let ttl = shared.config.lease_ttl.0;
    let every = ttl / BEATS_PER_TTL;
    let fence_after = ttl * FENCE_PERCENT / 100;
    let mut renewed = Instant::now();
    let mut fenced = false;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(every) => {}
        }
        let asked = Instant::now();
        let beat = heartbeat(&shared, shared.drain.is_cancelled());
        let left = (renewed + fence_after).saturating_duration_since(asked).max(Duration::from_millis(50));
        match tokio::time::timeout(left, shared.store.heartbeat(&beat)).await {
            Ok(Ok(pulse)) if pulse.alive => {
                renewed = asked;
                if fenced {
                    fenced = false;
                    tracing::info!("the database answers again; this replica goes on");
                    shared.doubt.notify_one();
                }
                for run in pulse.signalled {
                    if !shared.notify(run) {
                        shared.doubt.notify_one();
                    }
                }
            }
            Ok(Ok(_)) => {
                let lost = shared.stop_all();
                shared.set_replica(new_replica_id());
                tracing::warn!(lost, "this replica had been declared dead; it begins a new life");
                renewed = Instant::now() - fence_after; // Not alive until its first heartbeat.
                shared.work.notify_one();
            }
            Ok(Err(error)) => tracing::warn!(%error, "the heartbeat failed"),
            Err(_) => tracing::warn!("the heartbeat got no answer"),
        }
        if !fenced && renewed.elapsed() >= fence_after {
            fenced = true;
            let stopped = shared.stop_all();
            tracing::warn!(stopped, "the lease could not be renewed in time; this replica stops its own work");
        }
    }
}

/// Claims and drives until the drain begins.
pub(crate) async fn claim(shared: Arc<Shared>) {
    let mut rng = StdRng::from_os_rng();
    let mut looks = 0;
    loop {
        let permit = tokio::select! {
            () = shared.drain.cancelled() => return,
            permit = Arc::clone(&shared.room).acquire_owned() => permit,
        };
        let Ok(first) = permit else { return };
        let mut permits = vec![first];
        while permits.len() < CLAIM_MAX
            && let Ok(permit) = Arc::clone(&shared.room).try_acquire_owned()
        {
            permits.push(permit);
        }
        let found = match look(&shared, permits).await {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(%error, "no look for work was possible");
                0
            }
        };
        looks += 1;
        if looks >= LOOKS_PER_AUDIT {
            looks = 0;
            audit(&shared).await;
        }
        if found > 0 {
            continue;
        }
        let pause = shared.config.poll_interval.0.mul_f64(rng.random_range(0.5..1.0));
        tokio::select! {
            () = shared.drain.cancelled() => return,
            () = shared.work.notified() => {}
            () = shared.doubt.notified() => audit(&shared).await,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// One look for work, as much as there is room for.
async fn look(shared: &Arc<Shared>, permits: Vec<OwnedSemaphorePermit>) -> Result<usize, Error> {
    let limit = u32::try_from(permits.len()).unwrap_or(u32::MAX);
    let leases = match shared.store.claim(shared.replica(), limit).await {
        Ok(leases) => leases,
        Err(error) => {
            shared.doubt.notify_one(); // It may have happened.
            return Err(error.into());
        }
    };
    shared.metrics.runs_claimed.inc_by(leases.len() as u64);
    take(shared, &leases, permits).await?;
    Ok(leases.len())
}

/// What the database says that we own and no driver knows: its insert or claim succeeded, its answer was lost.
async fn audit(shared: &Arc<Shared>) {
    let owned = match shared.store.owned(shared.replica()).await {
        Ok(owned) => owned,
        Err(error) => {
            tracing::warn!(%error, "what this replica owns could not be read");
            return shared.doubt.notify_one();
        }
    };
    let unknown: Vec<Lease> = owned.into_iter().filter(|lease| !shared.is_driven(lease.run)).collect();
    let mut permits = Vec::new();
    while permits.len() < unknown.len()
        && let Ok(permit) = Arc::clone(&shared.room).try_acquire_owned()
    {
        permits.push(permit);
    }
    let (taken, left) = unknown.split_at(permits.len());
    if let Err(error) = take(shared, taken, permits).await {
        tracing::warn!(%error, "runs of this replica could not be taken up");
    }
    if !left.is_empty()
        && let Err(error) = shared.store.release(left).await
    {
        tracing::warn!(%error, "runs of this replica could not be handed back");
    }
}

/// Loads leased runs and drives each. A run that cannot be read keeps its lease and is left to the next audit, so that
/// it neither holds up the others nor is claimed again and again.
async fn take(shared: &Arc<Shared>, leases: &[Lease], permits: Vec<OwnedSemaphorePermit>) -> Result<(), Error> {
    if leases.is_empty() {
        return Ok(());
    }
    let started = Instant::now();
    let snapshots = match shared.store.load(leases).await {
        Ok(snapshots) => snapshots,
        Err(error) if error.is_retryable() => {
            if shared.store.release(leases).await.is_err() {
                shared.doubt.notify_one();
            }
            return Err(error.into());
        }
        Err(error) => {
            tracing::error!(%error, runs = leases.len(), "a batch of runs could not be read; each is read alone");
            load_one_by_one(shared, leases).await
        }
    };
    shared.metrics.checkpoint_load.observe(started.elapsed().as_secs_f64());
    for (snapshot, permit) in snapshots.into_iter().zip(permits) {
        let lease = snapshot.lease;
        if let Err(error) = take_one(shared, snapshot, permit).await {
            tracing::error!(run_id = %lease.run, %error, "a leased run could not be taken up; it is tried again later");
        }
    }
    Ok(())
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

async fn take_one(shared: &Arc<Shared>, snapshot: Snapshot, permit: OwnedSemaphorePermit) -> Result<(), Error> {
    let (lease, record) = (snapshot.lease, &snapshot.run);
    let request_id = record.request_id.clone();
    let pipeline = shared.pipeline(&record.tenant, &record.pipeline, Some(record.version)).await?;
    let Some((pipeline, _)) = pipeline else {
        return Err(Error::new(
            stagegate_core::Code::CorruptRow,
            format!("the run's pipeline version {}@{} is not there", record.pipeline, record.version),
        ));
    };
    // A run that was never started has at most a cancel; all else has been seen by an owner before.
    let signals = if record.started_at.is_some() || record.cancel_requested {
        shared.store.signals(lease).await?
    } else {
        Vec::new()
    };
    let mut run = Run::from_snapshot(snapshot, pipeline, shared.config.park_after.0);
    run.on(Stimulus::Taken(signals), shared.clock.now(), 0.0);
    if let Some(handle) = shared.enter(lease.run) {
        shared.drive(handle, run, Vec::new(), permit, request_id.as_deref());
    }
    Ok(())
}
