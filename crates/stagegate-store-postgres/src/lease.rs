//! Leases: who is alive, who owns what, and the way from a dead owner to the next one. The database's clock is the only
//! one.
//!
//! A replica that was declared dead keeps its row, and every claim frees what such a replica still owns. So a run that
//! it was given in the very moment of its death (its submit or claim had begun before) is found by the next claim.

use std::collections::HashSet;

use sqlx::{Row as _, postgres::PgRow};
use stagegate_core::{
    Epoch, ReplicaId, RunId, StoreResult,
    store::{Heartbeat, Lease, Pulse, QueueStats, Snapshot},
};
use uuid::Uuid;

use crate::{
    error,
    pool::Pool,
    rows::{self, Reader, attempt_columns, checkpoint_columns, run_columns, stage_columns},
};

/// Reports a replica alive, unless it was declared dead, and tells which of its runs have news.
pub const HEARTBEAT: &str = "/* replicas.heartbeat */
WITH beat AS (
    INSERT INTO replicas (id, name, version, draining, seen_at, expires_at)
    VALUES ($1, $2, $3, $4, now(), now() + $5 * interval '1 millisecond')
    ON CONFLICT (id) DO UPDATE
        SET draining = excluded.draining, seen_at = excluded.seen_at, expires_at = excluded.expires_at
        WHERE replicas.dead_at IS NULL
    RETURNING id
)
SELECT EXISTS (SELECT FROM beat) AS alive,
       ARRAY(SELECT r.id FROM runs r JOIN beat ON beat.id = r.owner WHERE r.signalled ORDER BY r.id) AS signalled";

/// Takes runs that can go on.
///
/// - `lost`: replicas that are out of time are declared dead, each by one claimer.
/// - `freed`: what dead replicas own can be claimed, by the next claim: this statement does not see its own changes.
/// - `taken`: what can be claimed, for a replica that is alive. A run that another claimer holds is passed over. What
///   is left of its signals is news to the new owner.
pub const CLAIM: &str = "/* runs.claim */
WITH me AS (
    SELECT id FROM replicas WHERE id = $1 AND dead_at IS NULL AND expires_at > now()
), lost AS (
    UPDATE replicas SET dead_at = now()
    WHERE id IN (SELECT id FROM replicas WHERE dead_at IS NULL AND expires_at <= now() FOR UPDATE SKIP LOCKED)
    RETURNING id
), freed AS (
    UPDATE runs SET owner = NULL, available_at = now()
    WHERE id IN (
        SELECT r.id
        FROM (SELECT id FROM lost UNION SELECT id FROM replicas WHERE dead_at IS NOT NULL) dead
        JOIN runs r ON r.owner = dead.id
        FOR UPDATE OF r SKIP LOCKED
    )
    RETURNING id
), due AS (
    SELECT id FROM runs
    WHERE available_at <= now() AND EXISTS (SELECT FROM me)
    ORDER BY priority DESC, available_at, id
    LIMIT $2
    FOR UPDATE SKIP LOCKED
), taken AS (
    UPDATE runs r SET owner = $1, epoch = r.epoch + 1, available_at = NULL, signalled = r.pending > 0
    FROM due WHERE r.id = due.id
    RETURNING r.id, r.epoch, r.priority, r.created_at
)
SELECT t.id, t.epoch, f.freed, f.lost
FROM (SELECT (SELECT count(*) FROM freed) AS freed, (SELECT count(*) FROM lost) AS lost) f
LEFT JOIN taken t ON true
ORDER BY t.priority DESC, t.created_at, t.id";

/// Forgets replicas that died long ago and own nothing. Should one of them wake up after all, it is a new one to us; what
/// it still believes to own is stale.
const FORGET: &str = "/* replicas.forget */
DELETE FROM replicas p
WHERE p.dead_at < now() - interval '1 hour' AND NOT EXISTS (SELECT FROM runs r WHERE r.owner = p.id)";

/// What a replica owns.
pub const OWNED: &str = "/* runs.owned */ SELECT id, epoch FROM runs WHERE owner = $1 ORDER BY id";

/// Everything that an owner needs, one row per stage; the input stands in the first row of each run.
pub const LOAD: &str = concat!(
    "/* runs.load */ SELECT ",
    run_columns!(),
    ", ",
    stage_columns!(),
    ", ",
    checkpoint_columns!(),
    ", c.output AS c_output, ",
    attempt_columns!(),
    ", r.epoch,
     CASE WHEN row_number() OVER (PARTITION BY r.id ORDER BY s.stage_id) = 1 THEN p.input END AS input
     FROM unnest($1::uuid[], $2::int8[]) AS l(run_id, epoch)
     JOIN runs r ON r.id = l.run_id AND r.epoch = l.epoch AND r.owner IS NOT NULL
     JOIN run_payloads p ON p.run_id = r.id
     LEFT JOIN stages s ON s.run_id = r.id
     LEFT JOIN checkpoints c ON c.run_id = s.run_id AND c.stage_id = s.stage_id
     LEFT JOIN LATERAL (
         SELECT * FROM attempts a
         WHERE a.run_id = s.run_id AND a.stage_id = s.stage_id AND c.run_id IS NULL AND a.output IS NOT NULL
         ORDER BY a.number DESC LIMIT 1
     ) a ON true
     ORDER BY r.id, s.stage_id"
);

/// Hands runs back.
const RELEASE: &str = "/* runs.release */
UPDATE runs r SET owner = NULL, available_at = now()
FROM unnest($1::uuid[], $2::int8[]) AS l(run_id, epoch)
WHERE r.id = l.run_id AND r.epoch = l.epoch AND r.owner IS NOT NULL";

/// A replica is gone for good. It is declared dead rather than forgotten, so that what it was still being given is
/// found.
const LEAVE: &str = "/* replicas.leave */
WITH gone AS (
    UPDATE replicas SET dead_at = coalesce(dead_at, now()) WHERE id = $1
)
UPDATE runs SET owner = NULL, available_at = now() WHERE owner = $1";

/// How much waits and works.
pub const QUEUE: &str = "/* runs.queue */
SELECT count(*) FILTER (WHERE available_at <= now() OR lost) AS queued,
       count(*) FILTER (WHERE owner IS NOT NULL AND NOT lost) AS running,
       count(*) FILTER (WHERE owner IS NULL AND (available_at IS NULL OR available_at > now())) AS waiting,
       coalesce(greatest(0, extract(epoch FROM
           now() - min(available_at) FILTER (WHERE available_at <= now())) * 1000), 0)::int8 AS oldest_ms
FROM (
    SELECT r.owner, r.available_at,
           r.owner IS NOT NULL AND (p.id IS NULL OR p.dead_at IS NOT NULL OR p.expires_at <= now()) AS lost
    FROM runs r LEFT JOIN replicas p ON p.id = r.owner
    WHERE r.state IN ('queued', 'running', 'waiting')
) active";

pub(crate) async fn heartbeat(pool: &Pool, beat: &Heartbeat) -> StoreResult<Pulse> {
    let query = sqlx::query(HEARTBEAT)
        .bind(beat.replica.0)
        .bind(rows::printable(&beat.name))
        .bind(rows::printable(&beat.version))
        .bind(beat.draining)
        .bind(rows::millis(beat.ttl));
    let row = pool.acquire("replicas.heartbeat").await?.row("replicas.heartbeat", query).await?;
    let Some(row) = row else { return Ok(Pulse { alive: false, signalled: Vec::new() }) };
    let read = Reader::new(&row, "replicas", beat.replica.0);
    let signalled: Vec<Uuid> = read.get("signalled")?;
    Ok(Pulse { alive: read.get("alive")?, signalled: signalled.into_iter().map(RunId).collect() })
}

pub(crate) async fn claim(pool: &Pool, replica: ReplicaId, limit: u32) -> StoreResult<Vec<Lease>> {
    let mut connection = pool.acquire("runs.claim").await?;
    let mut leases = Vec::new();
    loop {
        let room = i64::from(limit) - i64::try_from(leases.len()).unwrap_or(i64::MAX);
        let query = sqlx::query(CLAIM).bind(replica.0).bind(room.max(0));
        let found = connection.rows("runs.claim", query).await?;
        let (mut freed, mut lost) = (0, 0);
        for row in &found {
            let claimed = claimed(row).map_err(|failure| error::statement("runs.claim", &failure))?;
            leases.extend(claimed.lease);
            (freed, lost) = (claimed.freed, claimed.lost);
        }
        if lost > 0 {
            connection.rows("replicas.forget", sqlx::query(FORGET)).await?;
        }
        // What was freed can be claimed now; what is freed is never freed again, so that this ends.
        if freed == 0 || leases.len() >= limit as usize {
            return Ok(leases);
        }
    }
}

/// A row of [`CLAIM`]: a lease where one was taken, and the same counts in each.
struct Claimed {
    lease: Option<Lease>,
    freed: i64,
    lost: i64,
}

fn claimed(row: &PgRow) -> Result<Claimed, sqlx::Error> {
    let run: Option<Uuid> = row.try_get("id")?;
    let epoch: Option<i64> = row.try_get("epoch")?;
    let lease = run.zip(epoch).map(|(run, epoch)| Lease { run: RunId(run), epoch: Epoch(epoch) });
    Ok(Claimed { lease, freed: row.try_get("freed")?, lost: row.try_get("lost")? })
}

pub(crate) async fn owned(pool: &Pool, replica: ReplicaId) -> StoreResult<Vec<Lease>> {
    let query = sqlx::query(OWNED).bind(replica.0);
    let found = pool.acquire("runs.owned").await?.rows("runs.owned", query).await?;
    let lease = |row: &PgRow| {
        let id = rows::id(row, "id", "runs")?;
        Ok(Lease { run: RunId(id), epoch: Epoch(Reader::new(row, "runs", id).get("epoch")?) })
    };
    found.iter().map(lease).collect()
}

pub(crate) async fn load(pool: &Pool, leases: &[Lease]) -> StoreResult<Vec<Snapshot>> {
    let distinct: HashSet<Lease> = leases.iter().copied().collect();
    if distinct.is_empty() {
        return Ok(Vec::new());
    }
    let query = sqlx::query(LOAD)
        .bind(distinct.iter().map(|lease| lease.run.0).collect::<Vec<_>>())
        .bind(distinct.iter().map(|lease| lease.epoch.0).collect::<Vec<_>>());
    let found = pool.acquire("runs.load").await?.rows("runs.load", query).await?;
    // The rows come run by run.
    let mut snapshots: Vec<Snapshot> = Vec::with_capacity(distinct.len());
    for row in &found {
        let id = rows::id(row, "id", "runs")?;
        let read = Reader::new(row, "runs", id);
        if snapshots.last().is_none_or(|snapshot| snapshot.lease.run.0 != id) {
            snapshots.push(Snapshot {
                lease: Lease { run: RunId(id), epoch: Epoch(read.get("epoch")?) },
                run: rows::run(row)?,
                input: Reader::new(row, "run_payloads", id).json("input")?,
                stages: Vec::new(),
                checkpoints: Vec::new(),
                last_attempts: Vec::new(),
            });
        }
        let (Some(snapshot), Some(stage)) = (snapshots.last_mut(), rows::stage(read)?) else { continue };
        snapshot.checkpoints.extend(rows::checkpoint(read)?.map(|checkpoint| (stage.id.clone(), checkpoint)));
        snapshot.last_attempts.extend(rows::attempt(read)?.map(|attempt| (stage.id.clone(), attempt)));
        snapshot.stages.push(stage);
    }
    Ok(snapshots)
}

pub(crate) async fn release(pool: &Pool, leases: &[Lease]) -> StoreResult<()> {
    if leases.is_empty() {
        return Ok(());
    }
    let query = sqlx::query(RELEASE)
        .bind(leases.iter().map(|lease| lease.run.0).collect::<Vec<_>>())
        .bind(leases.iter().map(|lease| lease.epoch.0).collect::<Vec<_>>());
    pool.acquire("runs.release").await?.rows("runs.release", query).await.map(|_| ())
}

pub(crate) async fn leave(pool: &Pool, replica: ReplicaId) -> StoreResult<()> {
    let query = sqlx::query(LEAVE).bind(replica.0);
    let mut connection = pool.acquire("replicas.leave").await?;
    connection.rows("replicas.leave", query).await?;
    connection.rows("replicas.forget", sqlx::query(FORGET)).await.map(|_| ())
}

pub(crate) async fn queue(pool: &Pool) -> StoreResult<QueueStats> {
    let row = pool.acquire("runs.queue").await?.row("runs.queue", sqlx::query(QUEUE)).await?;
    let Some(row) = row else { return Ok(QueueStats::default()) };
    let read = Reader::new(&row, "runs", Uuid::nil());
    Ok(QueueStats {
        queued: read.seq("queued")?,
        running: read.seq("running")?,
        waiting: read.seq("waiting")?,
        oldest_queued_ms: read.seq("oldest_ms")?,
    })
}
