//! Reading runs for callers, always inside a tenant.

use sqlx::{Postgres, QueryBuilder, postgres::PgRow};
use stagegate_core::{
    Event, EventKind, RunId, RunState, StageId, StoreResult, TenantId,
    store::{RunDetail, RunQuery, RunRecord, StageDetail, StageRecord},
};

use crate::{
    first::FirstAttempts,
    pool::Pool,
    rows::{self, Reader, attempt_columns, checkpoint_columns, run_columns, stage_columns},
};

/// The longest page of a list.
const PAGE_MAX: u32 = 200;

/// A run without payloads and stages.
pub const RUN_RECORD: &str =
    concat!("/* runs.record */ SELECT ", run_columns!(), " FROM runs r WHERE r.id = $1 AND r.tenant = $2");

/// A run with its payloads, one row per stage; the payloads stand in the first.
pub const RUN: &str = concat!(
    "/* runs.read */ SELECT ",
    run_columns!(),
    ", ",
    stage_columns!(),
    ", p.input, p.output, r.first_attempts::text AS first_attempts
     FROM runs r
     LEFT JOIN stages s ON s.run_id = r.id
     LEFT JOIN run_payloads p
         ON p.run_id = r.id AND (s.stage_id IS NULL OR s.stage_id = (SELECT min(stage_id) FROM stages WHERE run_id = r.id))
     WHERE r.id = $1 AND r.tenant = $2
     ORDER BY s.stage_id"
);

/// A stage with its checkpoint, one row per attempt; the checkpoint's output stands in the first.
pub const STAGE: &str = concat!(
    "/* stages.read */ SELECT ",
    stage_columns!(),
    ", ",
    checkpoint_columns!(),
    ", ",
    attempt_columns!(),
    ", CASE WHEN row_number() OVER (ORDER BY a.number) = 1 THEN c.output END AS c_output,
     r.first_attempts::text AS first_attempts
     FROM runs r
     LEFT JOIN stages s ON s.run_id = r.id AND s.stage_id = $2
     LEFT JOIN checkpoints c ON c.run_id = s.run_id AND c.stage_id = s.stage_id
     LEFT JOIN LATERAL (
         SELECT number, started_at, finished_at, verdict, body, output FROM attempts
         WHERE run_id = s.run_id AND stage_id = s.stage_id
         UNION ALL
         SELECT c.attempt, c.attempt_started_at, c.attempt_finished_at, c.attempt_verdict, c.attempt_body, NULL
         WHERE c.attempt_body IS NOT NULL
     ) a ON true
     WHERE r.id = $1 AND r.tenant = $3
     ORDER BY a.number"
);

/// Events after a seq.
pub const EVENTS: &str = "/* events.read */
SELECT seq, at, body FROM events WHERE run_id = $1 AND tenant = $2 AND seq > $3 ORDER BY seq LIMIT $4";

pub(crate) async fn run_record(pool: &Pool, tenant: &TenantId, id: RunId) -> StoreResult<Option<RunRecord>> {
    let query = sqlx::query(RUN_RECORD).bind(id.0).bind(tenant.as_str());
    let row = pool.acquire_as_guest("runs.record").await?.row("runs.record", query).await?;
    row.as_ref().map(rows::run).transpose()
}

pub(crate) async fn run(pool: &Pool, tenant: &TenantId, id: RunId) -> StoreResult<Option<RunDetail>> {
    let query = sqlx::query(RUN).bind(id.0).bind(tenant.as_str());
    let found = pool.acquire_as_guest("runs.read").await?.rows("runs.read", query).await?;
    let Some(first) = found.first() else { return Ok(None) };
    let payloads = Reader::new(first, "run_payloads", id.0);
    let stages = found.iter().map(|row| rows::stage(Reader::new(row, "stages", id.0)));
    let mut stages: Vec<StageRecord> = stages.filter_map(Result::transpose).collect::<StoreResult<_>>()?;
    let read = Reader::new(first, "runs", id.0);
    let started = FirstAttempts::read(&read)?.without(&read, &stages)?;
    stages.extend(started);
    Ok(Some(RunDetail {
        run: rows::run(first)?,
        input: payloads.json("input")?,
        output: payloads.maybe_json("output")?,
        stages,
    }))
}

/// Runs of a tenant, by the filters that are there. Each combination is its own statement, so that each finds its index.
pub(crate) async fn runs(pool: &Pool, query: &RunQuery) -> StoreResult<Vec<RunRecord>> {
    let mut builder = list(query)?;
    let found = pool.acquire_as_guest("runs.list").await?.rows("runs.list", builder.build()).await?;
    found.iter().map(rows::run).collect()
}

/// The statement of a list. Only constants are pushed; every value is bound.
pub(crate) fn list(query: &RunQuery) -> StoreResult<QueryBuilder<Postgres>> {
    let mut sql = QueryBuilder::new(concat!(
        "/* runs.list */ SELECT * FROM (SELECT ",
        run_columns!(),
        " FROM runs r WHERE r.tenant = "
    ));
    sql.push_bind(query.tenant.as_str());
    if let Some(pipeline) = &query.pipeline {
        sql.push(" AND r.pipeline = ").push_bind(pipeline.as_str());
    }
    if let Some(version) = query.version {
        sql.push(" AND r.version = ").push_bind(rows::small(version));
    }
    if !query.states.is_empty() {
        let states: Vec<&str> = query.states.iter().map(|state| state.as_str()).collect();
        sql.push(" AND r.state = ANY(").push_bind(states).push(")");
        sql.push(partial_index(&query.states));
    }
    if !query.labels.is_empty() {
        let labels =
            query.labels.iter().map(|label| rows::to_json("a label", &label)).collect::<StoreResult<Vec<_>>>()?;
        // The second half names the partial index.
        sql.push(" AND r.labels @> ").push_bind(labels).push(" AND r.labels <> '{}'");
    }
    if let Some(from) = query.created_from {
        sql.push(" AND r.created_at >= ").push_bind(from);
    }
    if let Some(before) = query.created_before {
        sql.push(" AND r.created_at < ").push_bind(before);
    }
    if let Some(before) = query.before {
        sql.push(" AND r.id < ").push_bind(before.0);
    }
    // The planner sees the constant, and so that a page is short; the caller's limit is within it.
    sql.push(" ORDER BY r.id DESC LIMIT 200) page LIMIT ").push_bind(i64::from(query.limit.min(PAGE_MAX)));
    Ok(sql)
}

/// The condition of the partial index that covers these states, if one does.
fn partial_index(states: &[RunState]) -> &'static str {
    if states.iter().all(|state| !state.is_terminal()) {
        " AND r.state IN ('queued', 'running', 'waiting')"
    } else if states.iter().all(|state| state.is_terminal() && *state != RunState::Succeeded) {
        " AND r.state IN ('failed', 'cancelled', 'expired')"
    } else {
        ""
    }
}

pub(crate) async fn stage(
    pool: &Pool,
    tenant: &TenantId,
    run: RunId,
    stage: &StageId,
) -> StoreResult<Option<StageDetail>> {
    let query = sqlx::query(STAGE).bind(run.0).bind(stage.as_str()).bind(tenant.as_str());
    let found = pool.acquire_as_guest("stages.read").await?.rows("stages.read", query).await?;
    let Some(first) = found.first() else { return Ok(None) };
    let read = Reader::new(first, "stages", run.0);
    let Some(stage) = rows::stage(read)? else {
        let of_run = Reader::new(first, "runs", run.0);
        let started = FirstAttempts::read(&of_run)?.without(&of_run, &[])?;
        let found = started.into_iter().find(|started| started.id == *stage);
        return Ok(found.map(|stage| StageDetail { stage, checkpoint: None, attempts: Vec::new() }));
    };
    let attempts = found.iter().map(|row| rows::attempt(Reader::new(row, "attempts", run.0)));
    Ok(Some(StageDetail {
        stage,
        checkpoint: rows::checkpoint(read)?,
        attempts: attempts.filter_map(Result::transpose).collect::<StoreResult<_>>()?,
    }))
}

pub(crate) async fn events(
    pool: &Pool,
    tenant: &TenantId,
    run: RunId,
    after: u64,
    limit: u32,
) -> StoreResult<Vec<Event>> {
    let query = sqlx::query(EVENTS).bind(run.0).bind(tenant.as_str()).bind(rows::integer(after)).bind(i64::from(limit));
    let found = pool.acquire_as_guest("events.read").await?.rows("events.read", query).await?;
    found.iter().map(|row| event(row, run)).collect()
}

/// The events of many runs: a probe each for those that have none.
pub const NEWS: &str = "/* events.news */
SELECT e.run_id, e.seq, e.at, e.body FROM unnest($1::uuid[], $2::int8[]) AS s(run_id, after)
CROSS JOIN LATERAL (
    SELECT run_id, seq, at, body FROM events e
    WHERE e.run_id = s.run_id AND e.seq > s.after ORDER BY e.run_id, e.seq LIMIT $3
) e";

pub(crate) async fn news(pool: &Pool, seen: &[(RunId, u64)], limit: u32) -> StoreResult<Vec<(RunId, Vec<Event>)>> {
    if seen.is_empty() {
        return Ok(Vec::new());
    }
    let query = sqlx::query(NEWS)
        .bind(seen.iter().map(|(run, _)| run.0).collect::<Vec<_>>())
        .bind(seen.iter().map(|(_, seq)| rows::integer(*seq)).collect::<Vec<_>>())
        .bind(i64::from(limit));
    let found = pool.acquire_as_guest("events.news").await?.rows("events.news", query).await?;
    // The rows come run by run, each run's in order.
    let mut news: Vec<(RunId, Vec<Event>)> = Vec::new();
    for row in &found {
        let run = RunId(rows::id(row, "run_id", "events")?);
        let event = event(row, run)?;
        match news.last_mut().filter(|(last, _)| *last == run) {
            Some((_, events)) => events.push(event),
            None => news.push((run, vec![event])),
        }
    }
    Ok(news)
}

fn event(row: &PgRow, run: RunId) -> StoreResult<Event> {
    let read = Reader::new(row, "events", run.0);
    Ok(Event { seq: read.seq("seq")?, at: read.get("at")?, kind: read.json::<EventKind>("body")? })
}
