//! Leases: who is alive, who owns which run, and who may take it. Runs on the database's clock alone.
//!
//! A run that is not leased is either ready (`ready_at` tells since when) or parked (`wake_at`, or nothing at all).
//! A claim first declares dead what outlived its time and wakes what is due, so that "ready" is one index that holds
//! nothing else.

use sqlx::SqliteConnection;
use stagegate_core::{
    Epoch, ReplicaId, RunId, StoreResult,
    store::{Heartbeat, Lease, Pulse, QueueStats},
};
use uuid::Uuid;

use crate::{
    db::{Db, Lane},
    error::Sql,
    rows::{json, now_ms, span_ms},
};

/// Parked runs that one claim wakes at most.
const WAKE: i64 = 1000;
/// How long a dead replica is remembered. One that returns later is a new one: its leases are long gone.
const TOMBSTONE_MS: i64 = 7 * 24 * 3600 * 1000;

// heartbeat: a dead replica stays dead.
const BEAT: &str = concat!(
    "INSERT INTO replicas (id, name, version, draining, entered_at, beat_at, expires_at) SELECT ?1, ?2, ?3, ?4, now, \
     now, now + ?5 FROM (SELECT ",
    now_ms!(),
    " AS now) WHERE true ON CONFLICT (id) DO UPDATE SET name = excluded.name, version = excluded.version, \
     draining = excluded.draining, beat_at = excluded.beat_at, expires_at = excluded.expires_at \
     WHERE dead_at IS NULL RETURNING id"
);

// signalled-runs
pub(crate) const SIGNALLED: &str = "SELECT id FROM runs WHERE owner = ?1 AND signalled = 1";

// anything-to-claim: what a claim would find, without taking the write lock.
pub(crate) const ANYTHING: &str = concat!(
    "SELECT EXISTS (SELECT 1 FROM runs WHERE ready_at IS NOT NULL) \
     OR EXISTS (SELECT 1 FROM runs WHERE wake_at <= ",
    now_ms!(),
    ") OR EXISTS (SELECT 1 FROM replicas WHERE dead_at IS NULL AND expires_at <= ",
    now_ms!(),
    ")"
);

// declare-dead
const DECLARE_DEAD: &str = concat!(
    "UPDATE replicas SET dead_at = ",
    now_ms!(),
    " WHERE dead_at IS NULL AND expires_at <= ",
    now_ms!(),
    " RETURNING id"
);

// forget-dead
const FORGET_DEAD: &str = concat!("DELETE FROM replicas WHERE dead_at <= ", now_ms!(), " - ?1");

// hand-back-all: everything that a replica owns.
pub(crate) const HAND_BACK_ALL: &str =
    concat!("UPDATE runs SET owner = NULL, signalled = 0, ready_at = ", now_ms!(), " WHERE owner = ?1");

// is-alive
const IS_ALIVE: &str = concat!(
    "SELECT EXISTS (SELECT 1 FROM replicas WHERE id = ?1 AND dead_at IS NULL AND expires_at > ",
    now_ms!(),
    ")"
);

// wake-due
pub(crate) const WAKE_DUE: &str = concat!(
    "UPDATE runs SET ready_at = wake_at, wake_at = NULL WHERE id IN (SELECT id FROM runs WHERE wake_at <= ",
    now_ms!(),
    " ORDER BY wake_at LIMIT ?1)"
);

// next-ready
pub(crate) const NEXT: &str =
    "SELECT id, epoch FROM runs WHERE ready_at IS NOT NULL ORDER BY priority DESC, ready_at, id LIMIT ?1";

// take: a new owner is told of what its predecessor left.
pub(crate) const TAKE: &str = "UPDATE runs SET owner = ?1, epoch = epoch + 1, ready_at = NULL, \
    signalled = EXISTS (SELECT 1 FROM signals WHERE signals.run_id = runs.id) \
    WHERE id IN (SELECT unhex(value) FROM json_each(?2))";

// owned
pub(crate) const OWNED: &str = "SELECT id, epoch FROM runs WHERE owner = ?1 ORDER BY id";

// release: fenced by the epoch.
pub(crate) const RELEASE: &str = concat!(
    "UPDATE runs SET owner = NULL, signalled = 0, ready_at = ",
    now_ms!(),
    " WHERE owner IS NOT NULL AND (id, epoch) IN (SELECT unhex(value ->> 0), value ->> 1 FROM json_each(?1))"
);

// bury
const BURY: &str = concat!("UPDATE replicas SET dead_at = ", now_ms!(), " WHERE id = ?1 AND dead_at IS NULL");

// queue-stats: parked runs that are due and runs of replicas that are out of time can be claimed, so they count.
pub(crate) const QUEUE: &str = concat!(
    "WITH clock AS MATERIALIZED (SELECT ",
    now_ms!(),
    " AS now), \
     ready AS (SELECT count(*) AS n, min(ready_at) AS since FROM runs WHERE ready_at IS NOT NULL), \
     due AS (SELECT count(*) AS n, min(wake_at) AS since FROM runs WHERE wake_at <= (SELECT now FROM clock)), \
     orphaned AS (SELECT count(*) AS n, min(expires_at) AS since FROM replicas CROSS JOIN runs ON runs.owner = \
     replicas.id WHERE expires_at <= (SELECT now FROM clock)), \
     owned AS (SELECT count(*) AS n FROM runs WHERE owner IS NOT NULL), \
     parked AS (SELECT count(*) AS n FROM runs WHERE state IN ('queued', 'running', 'waiting') AND owner IS NULL \
     AND ready_at IS NULL) \
     SELECT ready.n + due.n + orphaned.n, owned.n - orphaned.n, parked.n - due.n, \
     coalesce(max(0, now - min(coalesce(ready.since, now), coalesce(due.since, now), coalesce(orphaned.since, now))), 0) \
     FROM clock, ready, due, orphaned, owned, parked"
);

pub(crate) async fn heartbeat(db: &Db, beat: &Heartbeat) -> StoreResult<Pulse> {
    let mut tx = db.write(Lane::Runs).await?;
    let alive: Option<Uuid> = sqlx::query_scalar(BEAT)
        .bind(beat.replica.0)
        .bind(beat.name.as_str())
        .bind(beat.version.as_str())
        .bind(beat.draining)
        .bind(span_ms(beat.ttl))
        .fetch_optional(tx.conn())
        .await
        .sql()?;
    let mut signalled = Vec::new();
    if alive.is_some() {
        let runs: Vec<Uuid> = sqlx::query_scalar(SIGNALLED).bind(beat.replica.0).fetch_all(tx.conn()).await.sql()?;
        signalled.extend(runs.into_iter().map(RunId));
    }
    tx.commit().await?;
    Ok(Pulse { alive: alive.is_some(), signalled })
}

pub(crate) async fn claim(db: &Db, replica: ReplicaId, limit: u32) -> StoreResult<Vec<Lease>> {
    // Most polls find nothing, and need not take turns with those who write.
    let anything: bool = sqlx::query_scalar(ANYTHING).fetch_one(db.read().await?.conn()).await.sql()?;
    if !anything || limit == 0 {
        return Ok(Vec::new());
    }
    let mut tx = db.write(Lane::Runs).await?;
    reap(tx.conn()).await?;
    let alive: bool = sqlx::query_scalar(IS_ALIVE).bind(replica.0).fetch_one(tx.conn()).await.sql()?;
    let leases = if alive { take(tx.conn(), replica, limit).await? } else { Vec::new() };
    tx.commit().await?;
    Ok(leases)
}

/// Declares dead the replicas that are out of time; their runs are ready.
async fn reap(conn: &mut SqliteConnection) -> StoreResult<()> {
    let dead: Vec<Uuid> = sqlx::query_scalar(DECLARE_DEAD).fetch_all(&mut *conn).await.sql()?;
    for replica in &dead {
        sqlx::query(HAND_BACK_ALL).bind(replica).execute(&mut *conn).await.sql()?;
    }
    if !dead.is_empty() {
        sqlx::query(FORGET_DEAD).bind(TOMBSTONE_MS).execute(conn).await.sql()?;
    }
    Ok(())
}

async fn take(conn: &mut SqliteConnection, replica: ReplicaId, limit: u32) -> StoreResult<Vec<Lease>> {
    sqlx::query(WAKE_DUE).bind(WAKE).execute(&mut *conn).await.sql()?;
    let next: Vec<(Uuid, i64)> = sqlx::query_as(NEXT).bind(limit).fetch_all(&mut *conn).await.sql()?;
    if next.is_empty() {
        return Ok(Vec::new());
    }
    let ids = crate::rows::id_list(next.iter().map(|(id, _)| *id));
    sqlx::query(TAKE).bind(replica.0).bind(ids).execute(conn).await.sql()?;
    Ok(next.into_iter().map(|(id, epoch)| Lease { run: RunId(id), epoch: Epoch(epoch + 1) }).collect())
}

pub(crate) async fn owned(db: &Db, replica: ReplicaId) -> StoreResult<Vec<Lease>> {
    let rows: Vec<(Uuid, i64)> =
        sqlx::query_as(OWNED).bind(replica.0).fetch_all(db.read().await?.conn()).await.sql()?;
    Ok(rows.into_iter().map(|(id, epoch)| Lease { run: RunId(id), epoch: Epoch(epoch) }).collect())
}

pub(crate) async fn release(db: &Db, leases: &[Lease]) -> StoreResult<()> {
    if leases.is_empty() {
        return Ok(());
    }
    let pairs: Vec<(String, i64)> =
        leases.iter().map(|lease| (lease.run.0.simple().to_string(), lease.epoch.0)).collect();
    let mut tx = db.write(Lane::Runs).await?;
    sqlx::query(RELEASE).bind(json(&pairs)?).execute(tx.conn()).await.sql()?;
    tx.commit().await
}

pub(crate) async fn leave(db: &Db, replica: ReplicaId) -> StoreResult<()> {
    let mut tx = db.write(Lane::Runs).await?;
    sqlx::query(BURY).bind(replica.0).execute(tx.conn()).await.sql()?;
    sqlx::query(HAND_BACK_ALL).bind(replica.0).execute(tx.conn()).await.sql()?;
    tx.commit().await
}

pub(crate) async fn queue(db: &Db) -> StoreResult<QueueStats> {
    let counts: (i64, i64, i64, i64) = sqlx::query_as(QUEUE).fetch_one(db.read().await?.conn()).await.sql()?;
    let count = |n: i64| u64::try_from(n).unwrap_or(0);
    Ok(QueueStats {
        queued: count(counts.0),
        running: count(counts.1),
        waiting: count(counts.2),
        oldest_queued_ms: count(counts.3),
    })
}
