//! What is kept, and how it goes: purged of its payloads, or removed whole. Both look at the run under its row's lock, so
//! that a retry which comes first wins, and one that comes later finds what is left.

use chrono::TimeDelta;
use sqlx::postgres::PgRow;
use stagegate_core::{RunId, StoreResult, store::Kept};
use uuid::Uuid;

use crate::{
    pool::Pool,
    rows::{self, Reader, Time},
};

/// How far a run's id, which begins with the time at which it was made, may be ahead of the time at which it was accepted.
const ID_LEAD: TimeDelta = TimeDelta::days(1);

/// The next runs by id. Ids are in the order of time: past the last one that could be old enough, nothing is read.
pub const KEPT: &str = "/* runs.kept */
SELECT id, tenant, pipeline, version, state, finished_at, purged_at IS NOT NULL AS purged FROM runs
WHERE id > $1 AND id < $2 AND created_at < $3 ORDER BY id LIMIT $4";

/// Removes payloads; the function is migration 0002's.
const PURGE: &str = "/* runs.purge */ SELECT purge_runs_2($1, $2) AS number";

/// Removes runs; the function is migration 0002's.
const DELETE: &str = "/* runs.delete */ SELECT delete_runs_2($1) AS ids";

pub(crate) async fn kept(pool: &Pool, after: Option<RunId>, before: Time, limit: u32) -> StoreResult<Vec<Kept>> {
    let last = before.checked_add_signed(ID_LEAD).map_or(RunId(Uuid::max()), |time| RunId::new(time, [0xff; 10]));
    let query =
        sqlx::query(KEPT).bind(after.map_or(Uuid::nil(), |run| run.0)).bind(last.0).bind(before).bind(i64::from(limit));
    let found = pool.acquire_as_guest("runs.kept").await?.rows("runs.kept", query).await?;
    found.iter().map(kept_run).collect()
}

fn kept_run(row: &PgRow) -> StoreResult<Kept> {
    let id = rows::id(row, "id", "runs")?;
    let read = Reader::new(row, "runs", id);
    Ok(Kept {
        run: RunId(id),
        tenant: read.parse("tenant")?,
        pipeline: read.parse("pipeline")?,
        version: read.number("version")?,
        state: rows::run_state(&read, "state")?,
        finished_at: read.get("finished_at")?,
        purged: read.get("purged")?,
    })
}

pub(crate) async fn purge(pool: &Pool, runs: &[RunId], now: Time) -> StoreResult<u64> {
    if runs.is_empty() {
        return Ok(0);
    }
    let query = sqlx::query(PURGE).bind(ids(runs)).bind(now);
    let row = pool.acquire_as_guest("runs.purge").await?.row("runs.purge", query).await?;
    row.map_or(Ok(0), |row| Reader::new(&row, "runs", Uuid::nil()).number("number").map(u64::from))
}

pub(crate) async fn delete(pool: &Pool, runs: &[RunId]) -> StoreResult<Vec<RunId>> {
    if runs.is_empty() {
        return Ok(Vec::new());
    }
    let query = sqlx::query(DELETE).bind(ids(runs));
    let Some(row) = pool.acquire_as_guest("runs.delete").await?.row("runs.delete", query).await? else {
        return Ok(Vec::new());
    };
    let deleted: Vec<Uuid> = Reader::new(&row, "runs", Uuid::nil()).get("ids")?;
    Ok(deleted.into_iter().map(RunId).collect())
}

fn ids(runs: &[RunId]) -> Vec<Uuid> {
    runs.iter().map(|run| run.0).collect()
}
