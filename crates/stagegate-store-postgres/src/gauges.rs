//! What is counted: the queue, the backlog, its depths, and replicas.

use sqlx::postgres::PgRow;
use stagegate_core::{
    ReplicaId, StoreResult, TenantId,
    store::{Backlog, QueueStats, ReplicaRecord, unreadable_pipeline},
};
use uuid::Uuid;

use crate::{
    pool::Pool,
    rows::{self, Reader},
};

/// Active runs, each with whether its owner is dead; to be completed by what is counted of them.
macro_rules! active {
    ($tenant:literal) => {
        concat!(
            "SELECT r.tenant, r.pipeline, r.owner, r.available_at,
                    r.owner IS NOT NULL AND (p.id IS NULL OR p.dead_at IS NOT NULL OR p.expires_at <= now()) AS lost
             FROM runs r LEFT JOIN replicas p ON p.id = r.owner
             WHERE r.state IN ('queued', 'running', 'waiting')",
            $tenant
        )
    };
}

/// How many of the active runs wait, work and are parked, and since when the oldest waits.
macro_rules! counts {
    () => {
        "count(*) FILTER (WHERE available_at <= now() OR lost) AS queued,
         count(*) FILTER (WHERE owner IS NOT NULL AND NOT lost) AS running,
         count(*) FILTER (WHERE owner IS NULL AND (available_at IS NULL OR available_at > now())) AS waiting,
         coalesce(greatest(0, extract(epoch FROM
             now() - min(available_at) FILTER (WHERE available_at <= now())) * 1000), 0)::int8 AS oldest_ms"
    };
}

/// How much waits and works.
pub const QUEUE: &str = concat!("/* runs.queue */ SELECT ", counts!(), " FROM (", active!(""), ") active");

/// The same by tenant and pipeline.
const BACKLOG: &str = concat!(
    "/* runs.backlog */ SELECT tenant, pipeline, ",
    counts!(),
    " FROM (",
    active!(""),
    ") active GROUP BY tenant, pipeline ORDER BY tenant, pipeline"
);

/// The same of one tenant.
pub const BACKLOG_OF: &str = concat!(
    "/* runs.backlog */ SELECT tenant, pipeline, ",
    counts!(),
    " FROM (",
    active!(" AND r.tenant = $1"),
    ") active GROUP BY tenant, pipeline ORDER BY tenant, pipeline"
);

/// How many runs of each tenant wait, those of dead replicas among them. The index of what waits begins with the tenant,
/// so that this reads the index alone, but for pages that vacuum has not seen yet.
pub const DEPTHS: &str = "/* runs.depths */
SELECT tenant, sum(number)::int8 AS number FROM (
    SELECT r.tenant, count(*) AS number FROM runs r WHERE r.available_at IS NOT NULL GROUP BY r.tenant
    UNION ALL
    SELECT r.tenant, count(*) FROM replicas p JOIN runs r ON r.owner = p.id
    WHERE p.dead_at IS NOT NULL OR p.expires_at <= now() GROUP BY r.tenant
) waiting
GROUP BY tenant ORDER BY tenant";

/// Every replica, the living first, and what it owns; to be completed by whose runs are counted.
macro_rules! replicas {
    ($tenant:literal) => {
        concat!(
            "/* replicas.list */
SELECT p.id, p.name, p.version, p.draining, p.started_at, p.dead_at IS NULL AND p.expires_at > now() AS alive,
       coalesce(p.dead_at < p.expires_at, false) AS gone,
       greatest(0, extract(epoch FROM now() - p.seen_at) * 1000)::int8 AS age_ms, o.runs,
       CASE WHEN o.since IS NOT NULL THEN greatest(0, extract(epoch FROM now() - o.since) * 1000)::int8 END AS oldest_ms
FROM replicas p CROSS JOIN LATERAL (
    SELECT count(*) AS runs, min(r.leased_at) AS since FROM runs r WHERE r.owner = p.id",
            $tenant,
            "
) o
ORDER BY alive DESC, p.name, p.started_at, p.id"
        )
    };
}

/// What each replica owns of all tenants.
const REPLICAS: &str = replicas!("");

/// What each replica owns of one tenant. A statement of its own: a plan that serves all tenants too reads what all own.
pub const REPLICAS_OF: &str = replicas!(" AND r.tenant = $1");

pub(crate) async fn queue(pool: &Pool) -> StoreResult<QueueStats> {
    let row = pool.acquire_as_guest("runs.queue").await?.row("runs.queue", sqlx::query(QUEUE)).await?;
    let Some(row) = row else { return Ok(QueueStats::default()) };
    let read = Reader::new(&row, "runs", Uuid::nil());
    Ok(QueueStats {
        queued: read.seq("queued")?,
        running: read.seq("running")?,
        waiting: read.seq("waiting")?,
        oldest_queued_ms: read.seq("oldest_ms")?,
    })
}

pub(crate) async fn backlog(pool: &Pool, tenant: Option<&TenantId>) -> StoreResult<Vec<Backlog>> {
    let query = match tenant {
        Some(tenant) => sqlx::query(BACKLOG_OF).bind(tenant.as_str()),
        None => sqlx::query(BACKLOG),
    };
    let found = pool.acquire_as_guest("runs.backlog").await?.rows("runs.backlog", query).await?;
    let backlog = |row: &PgRow| {
        let read = Reader::new(row, "runs", Uuid::nil());
        Ok(Backlog {
            tenant: read.parse("tenant")?,
            // Counted all the same.
            pipeline: pool.readable(read.parse("pipeline")).unwrap_or_else(unreadable_pipeline),
            queued: read.seq("queued")?,
            waiting: read.seq("waiting")?,
            running: read.seq("running")?,
            oldest_queued_ms: read.seq("oldest_ms")?,
        })
    };
    Ok(found.iter().filter_map(|row| pool.readable(backlog(row))).collect())
}

pub(crate) async fn depths(pool: &Pool) -> StoreResult<Vec<(TenantId, u64)>> {
    let found = pool.acquire_as_guest("runs.depths").await?.rows("runs.depths", sqlx::query(DEPTHS)).await?;
    let depth = |row: &PgRow| {
        let read = Reader::new(row, "runs", Uuid::nil());
        Ok((read.parse("tenant")?, read.seq("number")?))
    };
    Ok(found.iter().filter_map(|row| pool.readable(depth(row))).collect())
}

pub(crate) async fn replicas(pool: &Pool, tenant: Option<&TenantId>) -> StoreResult<Vec<ReplicaRecord>> {
    let query = match tenant {
        Some(tenant) => sqlx::query(REPLICAS_OF).bind(tenant.as_str()),
        None => sqlx::query(REPLICAS),
    };
    let found = pool.acquire_as_guest("replicas.list").await?.rows("replicas.list", query).await?;
    let readable = |row| {
        let id = rows::id(row, "id", "replicas")?;
        Ok(replica(row).unwrap_or_else(|error| {
            pool.unreadable(&error);
            ReplicaRecord::unreadable(ReplicaId(id), &error)
        }))
    };
    found.iter().map(readable).collect()
}

fn replica(row: &PgRow) -> StoreResult<ReplicaRecord> {
    let id = rows::id(row, "id", "replicas")?;
    let read = Reader::new(row, "replicas", id);
    let oldest: Option<i64> = read.get("oldest_ms")?;
    Ok(ReplicaRecord {
        id: ReplicaId(id),
        name: read.get("name")?,
        version: read.get("version")?,
        alive: read.get("alive")?,
        draining: read.get("draining")?,
        // Before its time was over nobody but itself could end it.
        left: read.get("gone")?,
        started_at: read.get("started_at")?,
        heartbeat_age_ms: read.seq("age_ms")?,
        runs: read.seq("runs")?,
        oldest_lease_ms: oldest
            .map(|ms| u64::try_from(ms).map_err(|_| read.corrupt("leased_at", "negative")))
            .transpose()?,
        failure: None,
    })
}
