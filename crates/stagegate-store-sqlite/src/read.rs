//! Reading runs, for whoever asks over the API. Every statement names the tenant.

use std::collections::HashMap;

use sqlx::{QueryBuilder, Sqlite, SqliteConnection, sqlite::SqliteRow};
use stagegate_core::{
    Attempt, Event, Json, LedgerEntry, RunId, RunState, StageId, StoreResult, TenantId,
    store::{ATTEMPTS_READ_MAX, RunDetail, RunQuery, RunRecord, StageDetail, StageRecord},
};

use crate::{
    db::Db,
    error::Sql,
    records::{self, attempt_columns, checkpoint_columns, ledger_columns, run_columns, stage_columns},
    rows::{Cells, int, json, ms},
};

// run-record
pub(crate) const RUN: &str = concat!("SELECT ", run_columns!(), " FROM runs WHERE id = ?1 AND tenant = ?2");

// run-payloads: the caller has checked the tenant.
pub(crate) const PAYLOADS: &str = "SELECT run_id, kind, body FROM run_payloads WHERE run_id = ?1";

// events-after
pub(crate) const EVENTS: &str =
    "SELECT body FROM events WHERE run_id = ?1 AND tenant = ?2 AND seq > ?3 ORDER BY seq LIMIT ?4";

// news: a run's seqs are gap-free, so that the limit is one on them.
pub(crate) const NEWS: &str = "SELECT events.run_id, events.body FROM json_each(?1) AS asked CROSS JOIN events \
    ON events.run_id = unhex(asked.value ->> 0) AND events.seq > asked.value ->> 1 \
    AND events.seq <= (asked.value ->> 1) + ?2 ORDER BY asked.key, events.seq";

pub(crate) async fn record(db: &Db, tenant: &TenantId, id: RunId) -> StoreResult<Option<RunRecord>> {
    find(db.read().await?.conn(), tenant, id).await
}

async fn find(conn: &mut SqliteConnection, tenant: &TenantId, id: RunId) -> StoreResult<Option<RunRecord>> {
    let row = sqlx::query(RUN).bind(id.0).bind(tenant.as_str()).fetch_optional(conn).await.sql()?;
    row.map(|row| records::run(&row)).transpose()
}

pub(crate) async fn run(db: &Db, tenant: &TenantId, id: RunId) -> StoreResult<Option<RunDetail>> {
    let mut snapshot = db.snapshot().await?;
    let Some(run) = find(snapshot.conn(), tenant, id).await? else { return Ok(None) };
    let mut detail = RunDetail { run, input: Json::null(), output: None, stages: Vec::new() };
    for row in sqlx::query(PAYLOADS).bind(id.0).fetch_all(snapshot.conn()).await.sql()? {
        let cells = Cells::new(&row, "run_payloads", || id.to_string());
        match cells.get("kind")? {
            "input" => detail.input = cells.payload("body")?,
            _ => detail.output = Some(cells.payload("body")?),
        }
    }
    // run-stages
    let mut stages = QueryBuilder::<Sqlite>::new("SELECT ");
    stages.push(stage_columns!()).push(" FROM stages WHERE run_id = ").push_bind(id.0);
    for row in stages.build().fetch_all(snapshot.conn()).await.sql()? {
        detail.stages.push(records::stage(&row)?.1);
    }
    Ok(Some(detail))
}

pub(crate) async fn runs(db: &Db, query: &RunQuery) -> StoreResult<Vec<RunRecord>> {
    let rows = list(query).build().fetch_all(db.read().await?.conn()).await.sql()?;
    let readable = |row| {
        let id = records::run_id(row, "runs", "id")?;
        Ok(records::run(row).unwrap_or_else(|error| {
            db.metrics.unreadable(&error);
            RunRecord::unreadable(id, query.tenant.clone(), &error)
        }))
    };
    rows.iter().map(readable).collect()
}

/// The states of the partial indexes by state. Most runs have succeeded, and those are in neither.
const BY_STATE: [(&str, [RunState; 3]); 2] = [
    ("runs_live", [RunState::Queued, RunState::Running, RunState::Waiting]),
    ("runs_lost", [RunState::Failed, RunState::Cancelled, RunState::Expired]),
];

/// The index that holds all of these states, if one does. By itself SQLite would walk all runs of the tenant for the
/// sake of their order.
fn by_state(states: &[RunState]) -> Option<(&'static str, [RunState; 3])> {
    let holds =
        |(_, index): &(_, [RunState; 3])| !states.is_empty() && states.iter().all(|state| index.contains(state));
    BY_STATE.into_iter().find(holds)
}

fn words(states: &[RunState]) -> String {
    states.iter().map(|state| format!("'{}'", state.as_str())).collect::<Vec<_>>().join(", ")
}

/// list-runs: the index is named, and begins with the tenant, so that no plan walks through the runs of others.
pub(crate) fn list(query: &RunQuery) -> QueryBuilder<Sqlite> {
    let mut sql = QueryBuilder::new(concat!("SELECT ", run_columns!(), " FROM runs INDEXED BY "));
    let all = if query.pipeline.is_some() { "runs_by_pipeline" } else { "runs_by_tenant" };
    sql.push(by_state(&query.states).map_or(all, |(index, _)| index))
        .push(" WHERE tenant = ")
        .push_bind(query.tenant.to_string());
    if let Some(pipeline) = &query.pipeline {
        sql.push(" AND pipeline = ").push_bind(pipeline.to_string());
    }
    if let Some(version) = query.version {
        sql.push(" AND version = ").push_bind(version);
    }
    if !query.states.is_empty() {
        sql.push(format!(" AND state IN ({})", words(&query.states)));
        if let Some((_, all)) = by_state(&query.states) {
            // Word for word the condition of the index: SQLite takes a partial index for nothing less.
            sql.push(format!(" AND state IN ({})", words(&all)));
        }
    }
    for (key, value) in &query.labels {
        sql.push(" AND EXISTS (SELECT 1 FROM json_each(labels) AS label WHERE label.key = ").push_bind(key.clone());
        sql.push(" AND label.value = ").push_bind(value.clone()).push(")");
    }
    if let Some(from) = query.created_from {
        sql.push(" AND created_at >= ").push_bind(ms(from));
    }
    if let Some(before) = query.created_before {
        sql.push(" AND created_at < ").push_bind(ms(before));
    }
    if let Some(before) = query.before {
        sql.push(" AND id < ").push_bind(before.0);
    }
    sql.push(" ORDER BY id DESC LIMIT ").push_bind(query.limit);
    sql
}

pub(crate) async fn stage(db: &Db, tenant: &TenantId, run: RunId, id: &StageId) -> StoreResult<Option<StageDetail>> {
    let mut snapshot = db.snapshot().await?;
    let conn = snapshot.conn();
    let Some(stage) = find_stage(conn, tenant, run, id).await? else { return Ok(None) };
    // stage-checkpoint
    let checkpoint =
        of_stage(checkpoint_columns!(), "checkpoints", run, id, "").build().fetch_optional(&mut *conn).await.sql()?;
    let checkpoint = checkpoint.map(|row| records::checkpoint(&row)).transpose()?.map(|(_, _, checkpoint)| checkpoint);
    // stage-attempts: the newest of them.
    let mut attempts = Vec::new();
    let mut newest = of_stage(attempt_columns!(), "attempts", run, id, " ORDER BY number DESC LIMIT ");
    newest.push_bind(i64::try_from(ATTEMPTS_READ_MAX).unwrap_or(i64::MAX));
    for row in newest.build().fetch_all(&mut *conn).await.sql()?.iter().rev() {
        attempts.push(records::attempt(row)?.2);
    }
    // stage-calls
    let mut calls: HashMap<u32, Vec<LedgerEntry>> = HashMap::new();
    let mut of_those = of_stage(ledger_columns!(), "ledger", run, id, " AND attempt >= ");
    of_those.push_bind(attempts.first().map_or(0, |attempt| attempt.number)).push(" ORDER BY attempt, call");
    for row in of_those.build().fetch_all(conn).await.sql()? {
        let (_, _, attempt, call) = records::call(&row)?;
        calls.entry(attempt).or_default().push(call);
    }
    let with_calls = |attempt: Attempt| Attempt { calls: calls.remove(&attempt.number).unwrap_or_default(), ..attempt };
    Ok(Some(StageDetail { stage, checkpoint, attempts: attempts.into_iter().map(with_calls).collect() }))
}

async fn find_stage(
    conn: &mut SqliteConnection,
    tenant: &TenantId,
    run: RunId,
    id: &StageId,
) -> StoreResult<Option<StageRecord>> {
    // stage-record
    let mut sql = of_stage(stage_columns!(), "stages", run, id, " AND tenant = ");
    let row = sql.push_bind(tenant.to_string()).build().fetch_optional(conn).await.sql()?;
    Ok(row.map(|row| records::stage(&row)).transpose()?.map(|(_, stage)| stage))
}

/// The rows of one stage in one of the tables that lead with run and stage.
fn of_stage(columns: &str, table: &str, run: RunId, stage: &StageId, tail: &str) -> QueryBuilder<Sqlite> {
    let mut sql = QueryBuilder::new("SELECT ");
    sql.push(columns).push(" FROM ").push(table).push(" WHERE run_id = ").push_bind(run.0);
    sql.push(" AND stage = ").push_bind(stage.to_string()).push(tail);
    sql
}

pub(crate) async fn events(db: &Db, tenant: &TenantId, run: RunId, after: u64, limit: u32) -> StoreResult<Vec<Event>> {
    let rows = sqlx::query(EVENTS)
        .bind(run.0)
        .bind(tenant.as_str())
        .bind(int(after))
        .bind(limit)
        .fetch_all(db.read().await?.conn())
        .await
        .sql()?;
    // The rows first: past the last seq there is none, and no number for it.
    Ok(rows.iter().zip(after.saturating_add(1)..).map(|(row, seq)| event(db, row, run, seq)).collect())
}

/// An event, or what stands in its place where its row cannot be read.
fn event(db: &Db, row: &SqliteRow, run: RunId, seq: u64) -> Event {
    Cells::new(row, "events", || run.to_string()).read("body", Event::read_whole).unwrap_or_else(|error| {
        db.metrics.unreadable(&error);
        Event::unreadable(seq, run.created_at())
    })
}

pub(crate) async fn news(db: &Db, seen: &[(RunId, u64)], limit: u32) -> StoreResult<Vec<(RunId, Vec<Event>)>> {
    if seen.is_empty() {
        return Ok(Vec::new());
    }
    let asked: Vec<(String, i64)> = seen.iter().map(|(run, seq)| (run.0.simple().to_string(), int(*seq))).collect();
    let rows = sqlx::query(NEWS).bind(json(&asked)?).bind(limit).fetch_all(db.read().await?.conn()).await.sql()?;
    let after: HashMap<RunId, u64> = seen.iter().copied().collect();
    let mut found: Vec<(RunId, Vec<Event>)> = Vec::new();
    for row in &rows {
        let run = records::run_id(row, "events", "run_id")?;
        let of_run = found.last().filter(|(last, _)| *last == run).and_then(|(_, events)| events.last());
        let seen = of_run.map_or_else(|| after.get(&run).copied().unwrap_or(0), |event| event.seq);
        let event = event(db, row, run, seen.saturating_add(1));
        match found.last_mut() {
            Some((last, events)) if *last == run => events.push(event),
            _ => found.push((run, vec![event])),
        }
    }
    Ok(found)
}
