//! Reading runs for callers, always inside a tenant.

use std::collections::HashMap;

use sqlx::{Postgres, QueryBuilder, postgres::PgRow};
use stagegate_core::{
    Event, RunId, RunState, StageId, StoreResult, TenantId,
    store::{ATTEMPTS_READ_MAX, RunDetail, RunQuery, RunRecord, StageDetail, StageRecord},
};
use uuid::Uuid;

use crate::{
    compact::{self, events_of, stages_of},
    first::FirstAttempts,
    pool::Pool,
    rows::{self, Reader, attempt_columns, checkpoint_columns, run_columns, stage_columns},
};

/// The longest page of a list.
const PAGE_MAX: u32 = 200;
/// How many events one row tells of at most.
const UNREADABLE_MAX: u64 = 1_000;

/// A run without payloads and stages.
pub const RUN_RECORD: &str =
    concat!("/* runs.record */ SELECT ", run_columns!(), " FROM runs r WHERE r.id = $1 AND r.tenant = $2");

/// A run with its payloads, one row per stage; the payloads stand in the first. A default output is put together from
/// those of its stages.
pub const RUN: &str = concat!(
    "/* runs.read */ SELECT ",
    run_columns!(),
    ", ",
    stage_columns!(),
    ", r.first_attempts::text AS first_attempts,
     CASE WHEN row_number() OVER (ORDER BY s.stage_id) = 1 THEN p.input END AS input,
     CASE WHEN row_number() OVER (ORDER BY s.stage_id) = 1 THEN coalesce(p.output, (
         SELECT '{' || string_agg(to_json(o.stage_id)::text || ':' || c.output, ',' ORDER BY o.n) || '}'
         FROM unnest(string_to_array(r.output_of, ',')) WITH ORDINALITY AS o(stage_id, n)
         JOIN checkpoints c ON c.run_id = r.id AND c.stage_id = o.stage_id
     )) END AS output
     FROM runs r
     LEFT JOIN run_payloads p ON p.run_id = r.id
     LEFT JOIN ",
    stages_of!(),
    " ON true
     WHERE r.id = $1 AND r.tenant = $2
     ORDER BY s.stage_id"
);

/// A stage with its checkpoint, one row for each of its newest attempts; the checkpoint's output stands in the first.
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
     LEFT JOIN ",
    stages_of!(),
    " ON s.stage_id = $2
     LEFT JOIN checkpoints c ON c.run_id = r.id AND c.stage_id = s.stage_id
     LEFT JOIN LATERAL (
         (SELECT number, started_at, finished_at, verdict, body, output FROM attempts
          WHERE run_id = r.id AND stage_id = s.stage_id
          ORDER BY number DESC LIMIT $4)
         UNION ALL
         SELECT c.attempt, c.attempt_started_at, coalesce(c.attempt_finished_at, c.created_at),
                coalesce(c.attempt_verdict, c.verdict), c.attempt_body, NULL
         WHERE c.attempt_body IS NOT NULL
         ORDER BY number DESC LIMIT $4
     ) a ON true
     WHERE r.id = $1 AND r.tenant = $3
     ORDER BY a.number"
);

/// Events after a seq.
pub const EVENTS: &str = concat!(
    "/* events.read */
SELECT e.* FROM runs r CROSS JOIN LATERAL (",
    events_of!("r.id", "$3", "$4"),
    ") e WHERE r.id = $1 AND r.tenant = $2 ORDER BY e.seq"
);

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
        input: payloads.payload("input")?,
        output: payloads.maybe_payload("output")?,
        stages,
    }))
}

/// Runs of a tenant, by the filters that are there. Each combination is its own statement, so that each finds its index.
pub(crate) async fn runs(pool: &Pool, query: &RunQuery) -> StoreResult<Vec<RunRecord>> {
    let mut builder = list(query)?;
    let found = pool.acquire_as_guest("runs.list").await?.rows("runs.list", builder.build()).await?;
    let readable = |row| {
        let id = RunId(rows::id(row, "id", "runs")?);
        Ok(rows::run(row).unwrap_or_else(|error| {
            pool.unreadable(&error);
            RunRecord::unreadable(id, query.tenant.clone(), &error)
        }))
    };
    found.iter().map(readable).collect()
}

/// The statement of a list. Only constants are pushed; every value is bound.
///
/// A page costs its tenant's rows, however many others have. So the order begins with the tenant, and the tenant is
/// told as a range: of `tenant = $1` the planner knows that it does not matter for the order, and where one tenant has
/// most of the runs it would walk over the primary key, through everybody's. Only the indexes that begin with the tenant
/// have this order, and both ends of the range are places in them. A filter that no index has stands in a CASE, of which
/// the planner expects nothing: where it expects that few rows are left, it reads and sorts the whole range.
pub(crate) fn list(query: &RunQuery) -> StoreResult<QueryBuilder<Postgres>> {
    let mut sql = QueryBuilder::new(concat!("/* runs.list */ SELECT * FROM (SELECT ", run_columns!(), " FROM runs r "));
    let tenant = query.tenant.as_str();
    // No run has this id, and it stands after all others.
    let before = query.before.map_or(Uuid::max(), |before| before.0);
    let few = partial_index(&query.states);
    let order = match &query.pipeline {
        // Unless an index of few states is there: what it holds of a tenant is less than what a pipeline has.
        Some(pipeline) if few.is_empty() => {
            let pipeline = pipeline.as_str();
            sql.push("WHERE (r.tenant, r.pipeline) >= (").push_bind(tenant).push(", ").push_bind(pipeline);
            sql.push(") AND (r.tenant, r.pipeline, r.id) < (").push_bind(tenant).push(", ").push_bind(pipeline);
            "r.tenant DESC, r.pipeline DESC, r.id DESC"
        }
        other => {
            sql.push("WHERE r.tenant >= ").push_bind(tenant);
            if let Some(pipeline) = other {
                sql.push(" AND CASE WHEN r.pipeline = ").push_bind(pipeline.as_str()).push(" THEN true ELSE false END");
            }
            sql.push(" AND (r.tenant, r.id) < (").push_bind(tenant);
            "r.tenant DESC, r.id DESC"
        }
    };
    sql.push(", ").push_bind(before).push(")");
    if let Some(version) = query.version {
        sql.push(" AND CASE WHEN r.version = ").push_bind(rows::small(version)).push(" THEN true ELSE false END");
    }
    if !query.states.is_empty() {
        let states: Vec<&str> = query.states.iter().map(|state| state.as_str()).collect();
        sql.push(" AND r.state = ANY(").push_bind(states).push(")").push(few);
    }
    if !query.labels.is_empty() {
        let mut labels =
            query.labels.iter().map(|label| rows::to_json("a label", &label)).collect::<StoreResult<Vec<_>>>()?;
        // As the index has it: the tenant is one more of them, which no label looks like. The last part names the index.
        labels.push(tenant.to_owned());
        sql.push(" AND array_append(r.labels, r.tenant) COLLATE \"C\" @> ").push_bind(labels);
        sql.push(" AND r.labels <> '{}'");
    }
    if let Some(from) = query.created_from {
        sql.push(" AND r.created_at >= ").push_bind(from);
    }
    if let Some(before) = query.created_before {
        sql.push(" AND r.created_at < ").push_bind(before);
    }
    // The planner sees the constant, and so that a page is short; the caller's limit is within it.
    sql.push(" ORDER BY ").push(order).push(" LIMIT 200) page LIMIT ").push_bind(i64::from(query.limit.min(PAGE_MAX)));
    Ok(sql)
}

/// The condition of the partial index that covers these states, if one does.
fn partial_index(states: &[RunState]) -> &'static str {
    if states.is_empty() {
        ""
    } else if states.iter().all(|state| !state.is_terminal()) {
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
    let most = i64::try_from(ATTEMPTS_READ_MAX).unwrap_or(i64::MAX);
    let query = sqlx::query(STAGE).bind(run.0).bind(stage.as_str()).bind(tenant.as_str()).bind(most);
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
    let mut events = Vec::with_capacity(found.len());
    for row in &found {
        let seen = events.last().map_or(after, |event: &Event| event.seq);
        events.extend(readable(pool, row, run, seen)?);
    }
    events.truncate(limit as usize);
    Ok(events)
}

/// The events of a row after a seq. Where the row cannot be read, something stands in each of their places.
fn readable(pool: &Pool, row: &PgRow, run: RunId, after: u64) -> StoreResult<Vec<Event>> {
    compact::events(row, run, after).or_else(|error| {
        let read = Reader::new(row, "events", run.0);
        let (last, at) = (read.seq("seq")?, read.get("at")?);
        if last.saturating_sub(after) > UNREADABLE_MAX {
            return Err(error);
        }
        pool.unreadable(&error);
        Ok((after + 1..=last).map(|seq| Event::unreadable(seq, at)).collect())
    })
}

/// The events of many runs: a look at its row for each that has none.
pub const NEWS: &str = concat!(
    "/* events.news */
SELECT w.run_id, e.* FROM unnest($1::uuid[], $2::int8[]) AS w(run_id, after)
JOIN runs r ON r.id = w.run_id AND r.last_seq > w.after
CROSS JOIN LATERAL (",
    events_of!("r.id", "w.after", "$3"),
    ") e"
);

pub(crate) async fn news(pool: &Pool, seen: &[(RunId, u64)], limit: u32) -> StoreResult<Vec<(RunId, Vec<Event>)>> {
    if seen.is_empty() {
        return Ok(Vec::new());
    }
    let query = sqlx::query(NEWS)
        .bind(seen.iter().map(|(run, _)| run.0).collect::<Vec<_>>())
        .bind(seen.iter().map(|(_, seq)| rows::integer(*seq)).collect::<Vec<_>>())
        .bind(i64::from(limit));
    let found = pool.acquire_as_guest("events.news").await?.rows("events.news", query).await?;
    let after: HashMap<RunId, u64> = seen.iter().copied().collect();
    // The rows come run by run, each run's in order.
    let mut news: Vec<(RunId, Vec<Event>)> = Vec::new();
    for row in &found {
        let run = RunId(rows::id(row, "run_id", "events")?);
        let of_run = news.last().filter(|(last, _)| *last == run).and_then(|(_, events)| events.last());
        let seen = of_run.map_or_else(|| after.get(&run).copied().unwrap_or(0), |event| event.seq);
        let told = match readable(pool, row, run, seen) {
            Ok(told) => told,
            Err(error) => {
                pool.unreadable(&error);
                continue;
            }
        };
        match news.last_mut().filter(|(last, _)| *last == run) {
            Some((_, events)) => events.extend(told),
            None => news.push((run, told)),
        }
    }
    for (_, events) in &mut news {
        events.truncate(limit as usize);
    }
    Ok(news)
}
