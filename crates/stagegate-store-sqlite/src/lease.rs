//! Leases: who is alive, and who owns which run. Runs on the database's clock alone; who takes what is `claim`'s.
//!
//! A run that is not leased is either ready (`ready_at` tells since when) or parked (`wake_at`, or nothing at all).
//! A claim first declares dead what outlived its time and wakes what is due, so that "ready" is one index that holds
//! nothing else.

use sqlx::SqliteConnection;
use stagegate_core::{
    Epoch, ReplicaId, RunId, StoreResult,
    store::{Heartbeat, Lease, Pulse, PutBack},
};
use uuid::Uuid;

use crate::{
    db::{Db, Lane},
    error::Sql,
    rows::{json, lease_list, now_ms, span_ms},
};

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

// database-time
const NOW: &str = concat!("SELECT ", now_ms!());

// signalled-runs
pub(crate) const SIGNALLED: &str = "SELECT id FROM runs WHERE owner = ?1 AND signalled = 1";

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
pub(crate) const HAND_BACK_ALL: &str = concat!(
    "UPDATE runs SET owner = NULL, leased_at = NULL, signalled = 0, ready_at = ",
    now_ms!(),
    " WHERE owner = ?1"
);

// take-from-dead: the same of one that died, whose crash counts: anew where there was progress since the last one.
pub(crate) const TAKE_FROM_DEAD: &str = concat!(
    "UPDATE runs SET owner = NULL, leased_at = NULL, signalled = 0, crashes = CASE WHEN last_seq <= crashed_seq + 1 \
     THEN crashes + 1 ELSE 1 END, crashed_seq = last_seq, ready_at = ",
    now_ms!(),
    " WHERE owner = ?1"
);

// is-alive
pub(crate) const IS_ALIVE: &str = concat!(
    "SELECT EXISTS (SELECT 1 FROM replicas WHERE id = ?1 AND dead_at IS NULL AND expires_at > ",
    now_ms!(),
    ")"
);

// owned
pub(crate) const OWNED: &str = "SELECT id, epoch FROM runs WHERE owner = ?1 ORDER BY id";

// release: fenced by the epoch.
pub(crate) const RELEASE: &str = concat!(
    "UPDATE runs SET owner = NULL, leased_at = NULL, signalled = 0, ready_at = ",
    now_ms!(),
    " WHERE owner IS NOT NULL AND (id, epoch) IN (SELECT unhex(value ->> 0), value ->> 1 FROM json_each(?1))"
);

// put-back: the same, each after its own delay, and with its crash counted.
pub(crate) const PUT_BACK: &str = concat!(
    "UPDATE runs SET owner = NULL, leased_at = NULL, signalled = 0, \
     ready_at = CASE WHEN asked.after = 0 THEN ",
    now_ms!(),
    " END, wake_at = CASE WHEN asked.after > 0 THEN ",
    now_ms!(),
    " + asked.after END, crashes = CASE WHEN NOT asked.crashed THEN crashes WHEN last_seq <= crashed_seq + 1 \
     THEN crashes + 1 ELSE 1 END, crashed_seq = CASE WHEN asked.crashed THEN last_seq ELSE crashed_seq END \
     FROM (SELECT unhex(value ->> 0) AS run, value ->> 1 AS epoch, value ->> 2 AS after, value ->> 3 AS crashed \
     FROM json_each(?1)) AS asked WHERE runs.id = asked.run AND runs.epoch = asked.epoch AND runs.owner IS NOT NULL"
);

// bury
const BURY: &str = concat!("UPDATE replicas SET dead_at = ", now_ms!(), " WHERE id = ?1 AND dead_at IS NULL");

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
    let now: i64 = sqlx::query_scalar(NOW).fetch_one(tx.conn()).await.sql()?;
    let now = chrono::DateTime::from_timestamp_millis(now);
    tx.commit().await?;
    // One process uses the file: what it can do is common.
    Ok(Pulse { alive: alive.is_some(), signalled, common: beat.capabilities.clone(), now })
}

/// Declares dead the replicas that are out of time; their runs are ready.
pub(crate) async fn reap(conn: &mut SqliteConnection) -> StoreResult<()> {
    let dead: Vec<Uuid> = sqlx::query_scalar(DECLARE_DEAD).fetch_all(&mut *conn).await.sql()?;
    for replica in &dead {
        sqlx::query(TAKE_FROM_DEAD).bind(replica).execute(&mut *conn).await.sql()?;
    }
    if !dead.is_empty() {
        sqlx::query(FORGET_DEAD).bind(TOMBSTONE_MS).execute(conn).await.sql()?;
    }
    Ok(())
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
    let mut tx = db.write(Lane::Runs).await?;
    sqlx::query(RELEASE).bind(lease_list(leases)?).execute(tx.conn()).await.sql()?;
    tx.commit().await
}

pub(crate) async fn put_back(db: &Db, back: &[PutBack]) -> StoreResult<()> {
    if back.is_empty() {
        return Ok(());
    }
    let asked: Vec<_> = back
        .iter()
        .map(|each| {
            let run = each.lease.run.0.simple().to_string();
            (run, each.lease.epoch.0, span_ms(each.after), each.crashed)
        })
        .collect();
    let mut tx = db.write(Lane::Runs).await?;
    sqlx::query(PUT_BACK).bind(json(&asked)?).execute(tx.conn()).await.sql()?;
    tx.commit().await
}

pub(crate) async fn leave(db: &Db, replica: ReplicaId) -> StoreResult<()> {
    let mut tx = db.write(Lane::Runs).await?;
    sqlx::query(BURY).bind(replica.0).execute(tx.conn()).await.sql()?;
    sqlx::query(HAND_BACK_ALL).bind(replica.0).execute(tx.conn()).await.sql()?;
    tx.commit().await
}
