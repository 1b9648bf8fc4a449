//! Stored rows as the core's records: owns which column is which field. Runs no statement.

use sqlx::sqlite::SqliteRow;
use stagegate_core::{
    Attempt, Checkpoint, Code, LedgerEntry, RunId, StageId, StoreResult, Usd,
    store::{RunRecord, StageRecord},
};
use uuid::Uuid;

use crate::rows::Cells;

/// The columns of a [`RunRecord`].
macro_rules! run_columns {
    () => {
        concat!(
            "runs.id, runs.tenant, pipeline, version, state, cancel_requested, priority, labels, cache_mode, \
             stages_total, stages_done, failure, request_id, created_at, start_at, started_at, finished_at, \
             deadline_at, purged_at, last_seq, ",
            crate::rows::totals_columns!()
        )
    };
}
pub(crate) use run_columns;

/// The columns of a [`StageRecord`].
macro_rules! stage_columns {
    () => {
        concat!(
            "run_id, stage, state, attempt, round_start, not_before, verdict, score, model, origin, failure, \
             started_at, finished_at, former_owners, judged, outages, outage_since, ",
            crate::rows::totals_columns!()
        )
    };
}
pub(crate) use stage_columns;

/// The columns of an [`Attempt`] but its calls.
macro_rules! attempt_columns {
    () => {
        "run_id, stage, number, started_at, finished_at, verdict, assessments, output, failure"
    };
}
pub(crate) use attempt_columns;

/// The columns of a [`LedgerEntry`].
macro_rules! ledger_columns {
    () => {
        "run_id, stage, attempt, call, purpose, model, origin, input_tokens, cache_read_tokens, cache_write_tokens, \
         output_tokens, reasoning_tokens, usage_estimated, cost_nanos, saved_nanos, priced, latency_ms, error, unknown"
    };
}
pub(crate) use ledger_columns;

/// The columns of a [`Checkpoint`].
macro_rules! checkpoint_columns {
    () => {
        "run_id, stage, attempt, verdict, score, model, origin, digest, created_at, output"
    };
}
pub(crate) use checkpoint_columns;

/// The run that a row belongs to.
pub(crate) fn run_id(row: &SqliteRow, table: &'static str, column: &'static str) -> StoreResult<RunId> {
    Cells::new(row, table, || "unknown".to_owned()).get::<Uuid>(column).map(RunId)
}

/// The run and the stage that a row belongs to.
pub(crate) fn stage_key(row: &SqliteRow, table: &'static str) -> StoreResult<(RunId, StageId)> {
    let run = run_id(row, table, "run_id")?;
    let stage = Cells::new(row, table, || run.to_string()).parsed("stage")?;
    Ok((run, stage))
}

/// A run.
pub(crate) fn run(row: &SqliteRow) -> StoreResult<RunRecord> {
    let id = run_id(row, "runs", "id")?;
    let cells = Cells::new(row, "runs", || id.to_string());
    Ok(RunRecord {
        id,
        tenant: cells.parsed("tenant")?,
        pipeline: cells.parsed("pipeline")?,
        version: cells.number("version")?,
        state: cells.word("state")?,
        cancel_requested: cells.get("cancel_requested")?,
        priority: cells.number("priority")?,
        labels: cells.json("labels")?,
        cache_mode: cells.opt_word("cache_mode")?,
        stages_total: cells.number("stages_total")?,
        stages_done: cells.number("stages_done")?,
        totals: cells.totals()?,
        failure: cells.opt_json("failure")?,
        request_id: cells.get("request_id")?,
        created_at: cells.time("created_at")?,
        start_at: cells.opt_time("start_at")?,
        purged_at: cells.opt_time("purged_at")?,
        started_at: cells.opt_time("started_at")?,
        finished_at: cells.opt_time("finished_at")?,
        deadline_at: cells.time("deadline_at")?,
        last_seq: cells.number("last_seq")?,
    })
}

/// A stage and its run.
pub(crate) fn stage(row: &SqliteRow) -> StoreResult<(RunId, StageRecord)> {
    let (run, id) = stage_key(row, "stages")?;
    let cells = Cells::new(row, "stages", || format!("{run}/{id}"));
    let (attempt, round_start) = (cells.number("attempt")?, cells.number("round_start")?);
    let record = StageRecord {
        id: id.clone(),
        state: cells.word("state")?,
        attempt,
        round_start,
        former_owners: cells.number("former_owners")?,
        not_before: cells.opt_time("not_before")?,
        verdict: cells.opt_word("verdict")?,
        score: cells.get("score")?,
        model: cells.opt_parsed("model")?,
        origin: cells.opt_word("origin")?,
        totals: cells.totals()?,
        // Written before there was such a column: every attempt counted.
        judged: cells.get::<Option<u32>>("judged")?.unwrap_or_else(|| attempt.saturating_sub(round_start)),
        outages: cells.get::<Option<u32>>("outages")?.unwrap_or(0),
        outage_since: cells.opt_time("outage_since")?,
        failure: cells.opt_json("failure")?,
        started_at: cells.opt_time("started_at")?,
        finished_at: cells.opt_time("finished_at")?,
    };
    Ok((run, record))
}

/// An attempt with its stage and run, without its calls: [`LedgerEntry`]s come from their own table.
pub(crate) fn attempt(row: &SqliteRow) -> StoreResult<(RunId, StageId, Attempt)> {
    let (run, stage) = stage_key(row, "attempts")?;
    let cells = Cells::new(row, "attempts", || format!("{run}/{stage}"));
    let number = cells.number("number")?;
    let cells = Cells::new(row, "attempts", || format!("{run}/{stage}/{number}"));
    let attempt = Attempt {
        number,
        started_at: cells.time("started_at")?,
        finished_at: cells.time("finished_at")?,
        verdict: cells.word("verdict")?,
        assessments: cells.json("assessments")?,
        calls: Vec::new(),
        output: cells.opt_payload("output")?,
        failure: cells.opt_json("failure")?,
        rest: stagegate_core::Rest::default(),
    };
    Ok((run, stage, attempt))
}

/// A model call with its attempt, stage and run.
pub(crate) fn call(row: &SqliteRow) -> StoreResult<(RunId, StageId, u32, LedgerEntry)> {
    let (run, stage) = stage_key(row, "ledger")?;
    let cells = Cells::new(row, "ledger", || format!("{run}/{stage}"));
    let (attempt, number): (u32, u32) = (cells.number("attempt")?, cells.number("call")?);
    let cells = Cells::new(row, "ledger", || format!("{run}/{stage}/{attempt}/{number}"));
    let entry = LedgerEntry {
        purpose: cells.word("purpose")?,
        model: cells.parsed("model")?,
        origin: cells.word("origin")?,
        usage: cells.usage()?,
        cost_usd: Usd::from_nanos(cells.get("cost_nanos")?),
        saved_usd: Usd::from_nanos(cells.get("saved_nanos")?),
        unknown: cells.get("unknown")?,
        priced: cells.get("priced")?,
        latency_ms: cells.number("latency_ms")?,
        error: cells.opt_word::<Code>("error")?,
        rest: stagegate_core::Rest::default(),
    };
    Ok((run, stage, attempt, entry))
}

/// A checkpoint with its stage and run.
pub(crate) fn checkpoint(row: &SqliteRow) -> StoreResult<(RunId, StageId, Checkpoint)> {
    let (run, stage) = stage_key(row, "checkpoints")?;
    let cells = Cells::new(row, "checkpoints", || format!("{run}/{stage}"));
    let checkpoint = Checkpoint {
        output: cells.payload("output")?,
        digest: cells.get("digest")?,
        attempt: cells.number("attempt")?,
        verdict: cells.word("verdict")?,
        score: cells.get("score")?,
        model: cells.opt_parsed("model")?,
        origin: cells.word("origin")?,
        created_at: cells.time("created_at")?,
    };
    Ok((run, stage, checkpoint))
}
