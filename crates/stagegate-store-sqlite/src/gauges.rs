//! What is counted: the queue, the backlog, depths, and replicas. Reads the indexes of what waits and of what is
//! leased, which hold nothing that has ended. Changes nothing.

use sqlx::sqlite::SqliteRow;
use stagegate_core::{
    ReplicaId, StoreResult, TenantId,
    store::{Backlog, QueueStats, ReplicaRecord, unreadable_pipeline},
};

use crate::{
    db::Db,
    error::Sql,
    rows::{Cells, now_ms},
};

/// Word for word the condition of `runs_held`.
macro_rules! held {
    () => {
        "owner IS NULL AND ready_at IS NULL AND wake_at IS NULL AND state IN ('queued', 'running', 'waiting')"
    };
}

/// The clock, once for all of a statement.
macro_rules! clock {
    () => {
        concat!("WITH clock AS MATERIALIZED (SELECT ", now_ms!(), " AS now), ")
    };
}

// queue-stats: parked runs that are due and runs of replicas that are out of time can be claimed, so they count.
pub(crate) const QUEUE: &str = concat!(
    clock!(),
    "ready AS (SELECT count(*) AS n, min(ready_at) AS since FROM runs WHERE ready_at IS NOT NULL), \
     due AS (SELECT count(*) AS n, min(wake_at) AS since FROM runs WHERE wake_at <= (SELECT now FROM clock)), \
     orphaned AS (SELECT count(*) AS n, min(expires_at) AS since FROM replicas CROSS JOIN runs ON runs.owner = \
     replicas.id WHERE expires_at <= (SELECT now FROM clock)), \
     owned AS (SELECT count(*) AS n FROM runs WHERE owner IS NOT NULL), \
     parked AS (SELECT count(*) AS n FROM runs WHERE wake_at IS NOT NULL), \
     held AS (SELECT count(*) AS n FROM runs INDEXED BY runs_held WHERE ",
    held!(),
    ") SELECT ready.n + due.n + orphaned.n, owned.n - orphaned.n, held.n + parked.n - due.n, \
     coalesce(max(0, now - min(coalesce(ready.since, now), coalesce(due.since, now), coalesce(orphaned.since, now))), 0) \
     FROM clock, ready, due, orphaned, owned, parked, held"
);

/// The same by tenant and pipeline; to be completed by whose runs are counted.
macro_rules! backlog {
    ($tenant:literal) => {
        concat!(
            clock!(),
            "parts (tenant, pipeline, queued, waiting, running, since) AS (\
             SELECT tenant, pipeline, count(*), 0, 0, min(ready_at) FROM runs INDEXED BY runs_lanes \
             WHERE ready_at IS NOT NULL",
            $tenant,
            " GROUP BY tenant, pipeline \
             UNION ALL SELECT tenant, pipeline, sum(wake_at <= now), sum(wake_at > now), 0, \
             min(CASE WHEN wake_at <= now THEN wake_at END) FROM clock CROSS JOIN runs INDEXED BY runs_parked \
             WHERE wake_at IS NOT NULL",
            $tenant,
            " GROUP BY tenant, pipeline \
             UNION ALL SELECT tenant, pipeline, sum(expires_at <= now), 0, sum(expires_at > now), \
             min(CASE WHEN expires_at <= now THEN expires_at END) FROM clock CROSS JOIN replicas \
             CROSS JOIN runs INDEXED BY runs_leased ON runs.owner = replicas.id",
            $tenant,
            " GROUP BY tenant, pipeline \
             UNION ALL SELECT tenant, pipeline, 0, count(*), 0, NULL FROM runs INDEXED BY runs_held WHERE ",
            held!(),
            $tenant,
            " GROUP BY tenant, pipeline) \
             SELECT tenant, pipeline, sum(queued) AS queued, sum(waiting) AS waiting, sum(running) AS running, \
             max(0, now - coalesce(min(since), now)) AS oldest_queued_ms \
             FROM clock CROSS JOIN parts GROUP BY tenant, pipeline ORDER BY tenant, pipeline"
        )
    };
}

// backlog
pub(crate) const BACKLOG: &str = backlog!("");

// backlog-of: of one tenant. What serves all tenants too reads the runs of all.
pub(crate) const BACKLOG_OF: &str = backlog!(" AND tenant = ?1");

// depths
pub(crate) const DEPTHS: &str = concat!(
    clock!(),
    "parts (tenant, n) AS (\
     SELECT tenant, count(*) FROM runs INDEXED BY runs_lanes WHERE ready_at IS NOT NULL GROUP BY tenant \
     UNION ALL SELECT tenant, count(*) FROM runs INDEXED BY runs_parked WHERE wake_at IS NOT NULL GROUP BY tenant \
     UNION ALL SELECT tenant, count(*) FROM clock CROSS JOIN replicas CROSS JOIN runs INDEXED BY runs_leased \
     ON runs.owner = replicas.id WHERE expires_at <= now GROUP BY tenant) \
     SELECT tenant, sum(n) AS n FROM parts GROUP BY tenant ORDER BY tenant"
);

/// Every replica and what it owns; to be completed by whose runs are counted.
macro_rules! replicas {
    ($tenant:literal) => {
        concat!(
            clock!(),
            "leased AS (SELECT owner, count(*) AS n, min(leased_at) AS since FROM replicas AS owners \
             CROSS JOIN runs INDEXED BY runs_leased ON runs.owner = owners.id",
            $tenant,
            " GROUP BY owner) \
             SELECT id, name, version, draining, entered_at, dead_at IS NULL AND expires_at > now AS alive, \
             coalesce(dead_at < expires_at, 0) AS gone, \
             max(0, now - beat_at) AS age, coalesce(leased.n, 0) AS runs, max(0, now - leased.since) AS oldest \
             FROM clock CROSS JOIN replicas LEFT JOIN leased ON leased.owner = replicas.id \
             ORDER BY alive DESC, entered_at, id"
        )
    };
}

// replicas
pub(crate) const REPLICAS: &str = replicas!("");

// replicas-of: what they own of one tenant.
pub(crate) const REPLICAS_OF: &str = replicas!(" AND tenant = ?1");

fn count(n: i64) -> u64 {
    u64::try_from(n).unwrap_or(0)
}

pub(crate) async fn queue(db: &Db) -> StoreResult<QueueStats> {
    let counts: (i64, i64, i64, i64) = sqlx::query_as(QUEUE).fetch_one(db.read().await?.conn()).await.sql()?;
    Ok(QueueStats {
        queued: count(counts.0),
        running: count(counts.1),
        waiting: count(counts.2),
        oldest_queued_ms: count(counts.3),
    })
}

pub(crate) async fn backlog(db: &Db, tenant: Option<&TenantId>) -> StoreResult<Vec<Backlog>> {
    let query = match tenant {
        Some(tenant) => sqlx::query(BACKLOG_OF).bind(tenant.as_str()),
        None => sqlx::query(BACKLOG),
    };
    let rows = query.fetch_all(db.read().await?.conn()).await.sql()?;
    let backlog = |row: &SqliteRow| {
        let cells = Cells::new(row, "runs", || "a backlog".to_owned());
        Ok(Backlog {
            tenant: cells.parsed("tenant")?,
            // Counted all the same.
            pipeline: db.readable(cells.parsed("pipeline")).unwrap_or_else(unreadable_pipeline),
            queued: cells.number("queued")?,
            waiting: cells.number("waiting")?,
            running: cells.number("running")?,
            oldest_queued_ms: cells.number("oldest_queued_ms")?,
        })
    };
    Ok(rows.iter().filter_map(|row| db.readable(backlog(row))).collect())
}

pub(crate) async fn depths(db: &Db) -> StoreResult<Vec<(TenantId, u64)>> {
    let rows = sqlx::query(DEPTHS).fetch_all(db.read().await?.conn()).await.sql()?;
    let depth = |row: &SqliteRow| {
        let cells = Cells::new(row, "runs", || "a depth".to_owned());
        Ok((cells.parsed("tenant")?, cells.number("n")?))
    };
    Ok(rows.iter().filter_map(|row| db.readable(depth(row))).collect())
}

pub(crate) async fn replicas(db: &Db, tenant: Option<&TenantId>) -> StoreResult<Vec<ReplicaRecord>> {
    let query = match tenant {
        Some(tenant) => sqlx::query(REPLICAS_OF).bind(tenant.as_str()),
        None => sqlx::query(REPLICAS),
    };
    let rows = query.fetch_all(db.read().await?.conn()).await.sql()?;
    let readable = |row| {
        let id = ReplicaId(Cells::new(row, "replicas", || "unknown".to_owned()).get("id")?);
        Ok(replica(row, id).unwrap_or_else(|error| {
            db.metrics.unreadable(&error);
            ReplicaRecord::unreadable(id, &error)
        }))
    };
    rows.iter().map(readable).collect()
}

fn replica(row: &SqliteRow, id: ReplicaId) -> StoreResult<ReplicaRecord> {
    let cells = Cells::new(row, "replicas", || id.0.to_string());
    Ok(ReplicaRecord {
        id,
        name: cells.get("name")?,
        version: cells.get("version")?,
        alive: cells.get("alive")?,
        draining: cells.get("draining")?,
        // Before its time was over nobody but itself could end it.
        left: cells.get("gone")?,
        started_at: cells.time("entered_at")?,
        heartbeat_age_ms: cells.number("age")?,
        runs: cells.number("runs")?,
        oldest_lease_ms: cells.get::<Option<i64>>("oldest")?.map(count),
        failure: None,
    })
}
