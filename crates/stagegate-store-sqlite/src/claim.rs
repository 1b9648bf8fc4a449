//! Claiming: which waiting runs a replica takes. Brings what waits and what is leased to [`fair::choose`], inside the
//! transaction that takes what it chose; decides nothing itself.
//!
//! What waits is read lane by lane, and of each lane only its first runs, so that a claim costs as much with a hundred
//! thousand waiting runs as with a hundred. The runs of one lane have the same limits: where its first one must wait,
//! all of them must.

use std::collections::{HashMap, HashSet};

use chrono::DateTime;
use sqlx::{SqliteConnection, sqlite::SqliteRow};
use stagegate_core::{
    Epoch, PipelineName, ReplicaId, RunId, StoreResult, TenantId,
    fair::{self, Candidate, InUse, Limits, Shares},
    store::Lease,
};

use crate::{
    db::{Db, Lane},
    error::Sql,
    lease,
    records::run_id,
    rows::{Cells, id_list, int, json, now_ms},
};

/// Parked runs that are woken at once at most.
const WAKE: u64 = 1000;
/// Runs that are read of each lane at least.
const FIRST: usize = 4;

/// The states in which this release knows how to go on: a run in another is left to those that know it.
macro_rules! known {
    ($run:literal) => {
        concat!($run, "state IN ('queued', 'running', 'waiting')")
    };
}

// anything-to-claim: what a claim would find, without taking the write lock.
pub(crate) const ANYTHING: &str = concat!(
    "SELECT EXISTS (SELECT 1 FROM runs WHERE ready_at IS NOT NULL) \
     OR EXISTS (SELECT 1 FROM runs WHERE wake_at <= ",
    now_ms!(),
    ") OR EXISTS (SELECT 1 FROM replicas WHERE dead_at IS NULL AND expires_at <= ",
    now_ms!(),
    ")"
);

// wake-due
pub(crate) const WAKE_DUE: &str = concat!(
    "UPDATE runs SET ready_at = wake_at, wake_at = NULL WHERE rowid IN \
     (SELECT rowid FROM runs INDEXED BY runs_due WHERE wake_at <= ",
    now_ms!(),
    " ORDER BY wake_at LIMIT ?1)"
);

// cancelled: what ends as soon as it is claimed.
pub(crate) const CANCELLED: &str = concat!(
    "SELECT id, epoch FROM runs INDEXED BY runs_cancelled WHERE ready_at IS NOT NULL AND cancel_requested = 1 AND ",
    known!(""),
    " ORDER BY id LIMIT ?1"
);

/// The lanes in which something waits: each is found by one look into the index, or two, from the one before it.
macro_rules! lanes {
    () => {
        "WITH RECURSIVE lanes (tenant, lane) AS (SELECT * FROM (SELECT tenant, lane FROM runs INDEXED BY runs_lanes \
         WHERE ready_at IS NOT NULL ORDER BY tenant, lane LIMIT 1) AS first_lane \
         UNION ALL SELECT next.tenant, next.lane FROM lanes CROSS JOIN runs AS next ON next.rowid = coalesce(\
         (SELECT later.rowid FROM runs AS later INDEXED BY runs_lanes WHERE later.ready_at IS NOT NULL \
         AND later.tenant = lanes.tenant AND later.lane > lanes.lane ORDER BY later.lane LIMIT 1), \
         (SELECT later.rowid FROM runs AS later INDEXED BY runs_lanes WHERE later.ready_at IS NOT NULL \
         AND later.tenant > lanes.tenant ORDER BY later.tenant, later.lane LIMIT 1))) "
    };
}

// count-lanes
pub(crate) const COUNT_LANES: &str = concat!(lanes!(), "SELECT count(*) FROM lanes");

// candidates: of each lane the first ones.
pub(crate) const CANDIDATES: &str = concat!(
    lanes!(),
    "SELECT c.id, c.epoch, c.tenant, c.lane, c.pipeline, c.pipeline_max, c.key, c.key_max, c.priority, c.ready_at \
     FROM lanes CROSS JOIN runs AS c ON c.rowid IN (SELECT first.rowid FROM runs AS first INDEXED BY runs_lanes \
     WHERE first.ready_at IS NOT NULL AND first.tenant = lanes.tenant AND first.lane = lanes.lane AND ",
    known!("first."),
    " ORDER BY first.priority DESC, first.ready_at, first.id LIMIT ?1)"
);

// deeper-candidates: the same of these lanes, each a tenant and a lane.
pub(crate) const DEEPER: &str = concat!(
    "SELECT c.id, c.epoch, c.tenant, c.lane, c.pipeline, c.pipeline_max, c.key, c.key_max, \
    c.priority, c.ready_at FROM json_each(?2) AS asked CROSS JOIN runs AS c ON c.rowid IN (SELECT first.rowid \
    FROM runs AS first INDEXED BY runs_lanes WHERE first.ready_at IS NOT NULL AND first.tenant = asked.value ->> 0 \
    AND first.lane = asked.value ->> 1 AND ",
    known!("first."),
    " ORDER BY first.priority DESC, first.ready_at, first.id LIMIT ?1)"
);

// leases-by-tenant: in the order of the index, so that nothing is sorted.
pub(crate) const BY_TENANT: &str = "SELECT tenant, NULL, NULL, count(*) FROM runs INDEXED BY runs_leased \
    WHERE owner IS NOT NULL GROUP BY owner, tenant";

// leases-by-pipeline
pub(crate) const BY_PIPELINE: &str = "SELECT tenant, pipeline, NULL, count(*) FROM runs INDEXED BY runs_leased \
    WHERE owner IS NOT NULL GROUP BY owner, tenant, pipeline";

// leases-by-key
pub(crate) const BY_KEY: &str = "SELECT tenant, pipeline, key, count(*) FROM runs INDEXED BY runs_leased \
    WHERE owner IS NOT NULL GROUP BY owner, tenant, pipeline, key";

// take: a new owner is told of what its predecessor left.
pub(crate) const TAKE: &str = concat!(
    "UPDATE runs SET owner = ?1, epoch = epoch + 1, ready_at = NULL, leased_at = ",
    now_ms!(),
    ", signalled = EXISTS (SELECT 1 FROM signals WHERE signals.run_id = runs.id) \
     WHERE id IN (SELECT unhex(value) FROM json_each(?2))"
);

/// A run that could be taken, and what the rule does not ask for.
struct Waiting {
    candidate: Candidate,
    lane: String,
    epoch: Epoch,
}

pub(crate) async fn claim(db: &Db, replica: ReplicaId, limit: u32, shares: &Shares) -> StoreResult<Vec<Lease>> {
    // Most polls find nothing, and need not take turns with those who write.
    let anything: bool = sqlx::query_scalar(ANYTHING).fetch_one(db.read().await?.conn()).await.sql()?;
    if !anything || limit == 0 {
        return Ok(Vec::new());
    }
    let mut tx = db.write(Lane::Runs).await?;
    lease::reap(tx.conn()).await?;
    let alive: bool = sqlx::query_scalar(lease::IS_ALIVE).bind(replica.0).fetch_one(tx.conn()).await.sql()?;
    let leases = if alive { take(tx.conn(), replica, limit, shares).await? } else { Vec::new() };
    tx.commit().await?;
    Ok(leases)
}

async fn take(conn: &mut SqliteConnection, replica: ReplicaId, limit: u32, shares: &Shares) -> StoreResult<Vec<Lease>> {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    loop {
        let woken = sqlx::query(WAKE_DUE).bind(int(WAKE)).execute(&mut *conn).await.sql()?.rows_affected();
        // At most half: they must not keep others' runs from their turn.
        let mut leases = cancelled(conn, limit.div_ceil(2)).await?;
        own(conn, replica, &leases).await?;
        let chosen = choose(conn, limit - leases.len(), shares).await?;
        own(conn, replica, &chosen).await?;
        leases.extend(chosen);
        if !leases.is_empty() {
            return Ok(leases);
        }
        // All that were woken must wait; those that are due behind them may not have to.
        if woken < WAKE {
            return Ok(leases);
        }
    }
}

async fn own(conn: &mut SqliteConnection, replica: ReplicaId, leases: &[Lease]) -> StoreResult<()> {
    if !leases.is_empty() {
        let ids = id_list(leases.iter().map(|lease| lease.run.0));
        sqlx::query(TAKE).bind(replica.0).bind(ids).execute(conn).await.sql()?;
    }
    Ok(())
}

/// What is to be cancelled, with the epochs that it is going to have.
async fn cancelled(conn: &mut SqliteConnection, limit: usize) -> StoreResult<Vec<Lease>> {
    let rows = sqlx::query(CANCELLED).bind(int(limit as u64)).fetch_all(conn).await.sql()?;
    let lease = |row: &SqliteRow| {
        let run = run_id(row, "runs", "id")?;
        let epoch: i64 = Cells::new(row, "runs", || run.to_string()).get("epoch")?;
        Ok(Lease { run, epoch: Epoch(epoch + 1) })
    };
    rows.iter().map(lease).collect()
}

/// What the rule takes, with the epochs that it is going to have.
async fn choose(conn: &mut SqliteConnection, limit: usize, shares: &Shares) -> StoreResult<Vec<Lease>> {
    if limit == 0 {
        return Ok(Vec::new());
    }
    let lanes: i64 = sqlx::query_scalar(COUNT_LANES).fetch_one(&mut *conn).await.sql()?;
    let Ok(lanes @ 1..) = usize::try_from(lanes) else { return Ok(Vec::new()) };
    // With many lanes a claim takes few runs of each. Only where all that was read of a lane is chosen, more of it is read:
    // a claim reads a few runs of each lane, and a multiple of what it takes.
    let first = (limit.saturating_mul(2) / lanes).clamp(FIRST.min(limit), limit);
    let mut waiting = candidates(conn, first).await?;
    let used = in_use(conn, &waiting, shares).await?;
    let mut depths: HashMap<(TenantId, String), usize> = HashMap::new();
    loop {
        let candidates = waiting.iter().map(|each| each.candidate.clone()).collect();
        let chosen = fair::choose(candidates, used.clone(), shares, limit);
        let cut = cut_short(&waiting, &chosen, |lane| depths.get(lane).copied().unwrap_or(first));
        let Some(deepest) = cut.iter().map(|(_, depth)| *depth).filter(|depth| *depth < limit).max() else {
            let epochs: HashMap<RunId, Epoch> = waiting.iter().map(|each| (each.candidate.run, each.epoch)).collect();
            let lease = |run: RunId| Some(Lease { run, epoch: Epoch(epochs.get(&run)?.0 + 1) });
            return Ok(chosen.into_iter().filter_map(lease).collect());
        };
        let depth = deepest.saturating_mul(4).min(limit);
        let lanes: HashSet<(TenantId, String)> = cut.into_iter().map(|(lane, _)| lane).collect();
        waiting.retain(|each| !lanes.contains(&each.lane()));
        waiting.extend(deeper(conn, &lanes, depth).await?);
        depths.extend(lanes.into_iter().map(|lane| (lane, depth)));
    }
}

/// The lanes of which all that was read was chosen, each with how much that was: the next run in it might have been
/// chosen, too.
fn cut_short(
    waiting: &[Waiting],
    chosen: &[RunId],
    depth: impl Fn(&(TenantId, String)) -> usize,
) -> Vec<((TenantId, String), usize)> {
    let chosen: HashSet<RunId> = chosen.iter().copied().collect();
    let mut taken: HashMap<(TenantId, String), usize> = HashMap::new();
    for each in waiting.iter().filter(|each| chosen.contains(&each.candidate.run)) {
        *taken.entry(each.lane()).or_default() += 1;
    }
    let all = |(lane, count): ((TenantId, String), usize)| (count >= depth(&lane)).then_some((lane, count));
    taken.into_iter().filter_map(all).collect()
}

impl Waiting {
    /// Where it waits.
    fn lane(&self) -> (TenantId, String) {
        (self.candidate.tenant.clone(), self.lane.clone())
    }
}

async fn deeper(
    conn: &mut SqliteConnection,
    lanes: &HashSet<(TenantId, String)>,
    depth: usize,
) -> StoreResult<Vec<Waiting>> {
    let asked: Vec<(&str, &str)> = lanes.iter().map(|(tenant, lane)| (tenant.as_str(), lane.as_str())).collect();
    let rows = sqlx::query(DEEPER).bind(int(depth as u64)).bind(json(&asked)?).fetch_all(conn).await.sql()?;
    rows.iter().map(waiting).collect()
}

async fn candidates(conn: &mut SqliteConnection, depth: usize) -> StoreResult<Vec<Waiting>> {
    let rows = sqlx::query(CANDIDATES).bind(int(depth as u64)).fetch_all(conn).await.sql()?;
    rows.iter().map(waiting).collect()
}

fn waiting(row: &SqliteRow) -> StoreResult<Waiting> {
    let run = run_id(row, "runs", "id")?;
    let cells = Cells::new(row, "runs", || run.to_string());
    let key: Option<String> = cells.get("key")?;
    let pipeline_max: Option<u32> = cells.get("pipeline_max")?;
    let key_max: Option<u32> = cells.get("key_max")?;
    let available_at: i64 = cells.get("ready_at")?;
    let candidate = Candidate {
        run,
        tenant: cells.parsed("tenant")?,
        pipeline: cells.parsed("pipeline")?,
        limits: Limits { pipeline_max, key: key.zip(key_max) },
        priority: cells.number("priority")?,
        // The database's own clock: it is in range.
        available_at: DateTime::from_timestamp_millis(available_at).unwrap_or_default(),
    };
    Ok(Waiting { candidate, lane: cells.get("lane")?, epoch: Epoch(cells.get("epoch")?) })
}

/// Counts the leases as finely as these runs make it matter, or not at all.
async fn in_use(conn: &mut SqliteConnection, waiting: &[Waiting], shares: &Shares) -> StoreResult<InUse> {
    let candidates = || waiting.iter().map(|each| &each.candidate);
    let keys = candidates().any(|each| each.limits.key.is_some());
    let pipelines = candidates().any(|each| each.limits.pipeline_max.is_some());
    // A tenant that is alone is first in any case.
    let first = candidates().next().map(|each| &each.tenant);
    let tenants = candidates().any(|each| Some(&each.tenant) != first || shares.of(&each.tenant).max_runs.is_some());
    let sql = match (keys, pipelines, tenants) {
        (true, _, _) => BY_KEY,
        (false, true, _) => BY_PIPELINE,
        (false, false, true) => BY_TENANT,
        (false, false, false) => return Ok(InUse::default()),
    };
    let mut used = InUse::default();
    let rows: Vec<(String, Option<String>, Option<String>, u32)> = sqlx::query_as(sql).fetch_all(conn).await.sql()?;
    for (tenant, pipeline, key, count) in rows {
        // What cannot be read is nobody's that waits: those were read.
        let Ok(tenant) = TenantId::new(&tenant) else { continue };
        *used.tenants.entry(tenant.clone()).or_default() += count;
        let Some(Ok(pipeline)) = pipeline.map(PipelineName::new) else { continue };
        *used.pipelines.entry((tenant.clone(), pipeline.clone())).or_default() += count;
        if let Some(key) = key {
            *used.keys.entry((tenant, pipeline, key)).or_default() += count;
        }
    }
    Ok(used)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn waiting(tenant: &str, lane: &str, n: u128) -> Waiting {
        let candidate = Candidate {
            run: RunId(Uuid::from_u128(n)),
            tenant: TenantId::new(tenant).expect("a tenant"),
            pipeline: PipelineName::new("p").expect("a name"),
            limits: Limits::default(),
            priority: 0,
            available_at: DateTime::default(),
        };
        Waiting { candidate, lane: lane.to_owned(), epoch: Epoch(0) }
    }

    #[test]
    fn a_lane_that_was_used_up_may_have_had_more() {
        let read = [waiting("a", "", 1), waiting("a", "", 2), waiting("b", "", 3), waiting("a", "p/1", 4)];
        let ids = |list: &[u128]| list.iter().map(|n| RunId(Uuid::from_u128(*n))).collect::<Vec<_>>();
        let cut =
            |chosen: &[u128]| cut_short(&read, &ids(chosen), |(tenant, _)| if tenant.as_str() == "a" { 2 } else { 9 });
        assert_eq!(cut(&[1, 2]), [(waiting("a", "", 1).lane(), 2)]);
        assert_eq!(cut(&[1, 3, 4]), []);
    }
}
