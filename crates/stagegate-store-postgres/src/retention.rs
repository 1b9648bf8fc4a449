//! What is kept, and how it goes: purged of its payloads, or removed whole. Both look at the run under its row's lock, so
//! that a retry which comes first wins, and one that comes later finds what is left.

use chrono::TimeDelta;
use serde_json::{Map, Value};
use sqlx::postgres::PgRow;
use stagegate_core::{RunId, StoreResult, store::Kept};
use uuid::Uuid;

use crate::{
    pool::{Connection, Pool},
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

/// The attempts of runs that may quote payloads: rows of their own, and those that are told beside their checkpoint.
const QUOTING: &str = "/* runs.quoting */
SELECT run_id, stage_id, number, body FROM attempts WHERE run_id = ANY ($1) AND body LIKE '%\"detail\":%'
UNION ALL
SELECT run_id, stage_id, NULL, attempt_body FROM checkpoints
WHERE run_id = ANY ($1) AND attempt_body LIKE '%\"detail\":%'";

/// Writes them without that, where their run has ended.
const UNQUOTE: &str = "/* runs.unquote */
WITH given AS (
    SELECT t.* FROM unnest($1::uuid[], $2::text[], $3::int4[], $4::text[]) AS t(run_id, stage_id, number, body)
    JOIN runs r ON r.id = t.run_id
    WHERE r.state IN ('succeeded', 'failed', 'cancelled', 'expired') AND r.owner IS NULL
), beside AS (
    UPDATE checkpoints c SET attempt_body = g.body FROM given g
    WHERE g.number IS NULL AND c.run_id = g.run_id AND c.stage_id = g.stage_id
)
UPDATE attempts a SET body = g.body FROM given g
WHERE a.run_id = g.run_id AND a.stage_id = g.stage_id AND a.number = g.number";

/// Removes runs; the function is migration 0002's.
const DELETE: &str = "/* runs.delete */ SELECT delete_runs_2($1) AS ids";

pub(crate) async fn kept(pool: &Pool, after: Option<RunId>, before: Time, limit: u32) -> StoreResult<Vec<Kept>> {
    let last = before.checked_add_signed(ID_LEAD).map_or(RunId(Uuid::max()), |time| RunId::new(time, [0xff; 10]));
    let query =
        sqlx::query(KEPT).bind(after.map_or(Uuid::nil(), |run| run.0)).bind(last.0).bind(before).bind(i64::from(limit));
    let found = pool.acquire_as_guest("runs.kept").await?.rows("runs.kept", query).await?;
    let readable = |row| {
        let id = RunId(rows::id(row, "id", "runs")?);
        Ok(kept_run(row).unwrap_or_else(|error| {
            pool.unreadable(&error);
            Kept::unreadable(id)
        }))
    };
    found.iter().map(readable).collect()
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
    let mut connection = pool.acquire_as_guest("runs.purge").await?;
    unquote(&mut connection, runs).await?;
    let query = sqlx::query(PURGE).bind(ids(runs)).bind(now);
    let row = connection.row("runs.purge", query).await?;
    row.map_or(Ok(0), |row| Reader::new(&row, "runs", Uuid::nil()).number("number").map(u64::from))
}

/// Before the run is marked as purged, so that what is cut off in between is done again.
async fn unquote(connection: &mut Connection, runs: &[RunId]) -> StoreResult<()> {
    let found = connection.rows("runs.quoting", sqlx::query(QUOTING).bind(ids(runs))).await?;
    let (mut of, mut stages, mut numbers, mut bodies) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for row in &found {
        let run = rows::id(row, "run_id", "attempts")?;
        let read = Reader::new(row, "attempts", run);
        let mut body: Map<String, Value> = read.json("body")?;
        body.get_mut("failure").map(forget_detail);
        let assessments = body.get_mut("assessments").and_then(Value::as_array_mut);
        assessments.into_iter().flatten().for_each(forget_detail);
        of.push(run);
        stages.push(read.get::<String>("stage_id")?);
        numbers.push(read.get::<Option<i32>>("number")?);
        bodies.push(Value::Object(body).to_string());
    }
    if of.is_empty() {
        return Ok(());
    }
    let query = sqlx::query(UNQUOTE).bind(of).bind(stages).bind(numbers).bind(bodies);
    connection.rows("runs.unquote", query).await.map(|_| ())
}

fn forget_detail(of: &mut Value) {
    of.as_object_mut().map(|of| of.shift_remove("detail"));
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
