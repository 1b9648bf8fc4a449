//! The rows that runs leave behind: owns the inserts of events, stages, attempts, ledger rows, checkpoints and
//! payloads, whoever's transaction they are part of. Decides nothing.

use sqlx::SqliteConnection;
use stagegate_core::{
    Attempt, Checkpoint, Code, Event, Json, LedgerEntry, Origin, RunId, StageId, StoreResult, Verdict,
    store::{Commit, StageRecord},
};

use crate::{
    bulk::Bulk,
    rows::{add_totals, add_usage, int, json, ms, opt_json, totals_columns},
};

/// Whose rows these are.
#[derive(Clone, Copy)]
pub(crate) struct Of<'a> {
    pub(crate) run: RunId,
    pub(crate) tenant: &'a str,
}

// insert-events
pub(crate) static EVENTS: Bulk = Bulk::new("INSERT INTO events (run_id, seq, tenant, body) VALUES", 4, "");

// upsert-stages
pub(crate) static STAGES: Bulk = Bulk::new(
    concat!(
        "INSERT INTO stages (run_id, stage, tenant, state, attempt, round_start, not_before, verdict, score, model, \
         origin, failure, started_at, finished_at, ",
        totals_columns!(),
        ", former_owners, judged, outages, outage_since) VALUES"
    ),
    31,
    "ON CONFLICT (run_id, stage) DO UPDATE SET state = excluded.state, attempt = excluded.attempt, \
     round_start = excluded.round_start, not_before = excluded.not_before, verdict = excluded.verdict, \
     score = excluded.score, model = excluded.model, origin = excluded.origin, failure = excluded.failure, \
     started_at = excluded.started_at, finished_at = excluded.finished_at, input_tokens = excluded.input_tokens, \
     cache_read_tokens = excluded.cache_read_tokens, cache_write_tokens = excluded.cache_write_tokens, \
     output_tokens = excluded.output_tokens, reasoning_tokens = excluded.reasoning_tokens, \
     usage_estimated = excluded.usage_estimated, cost_nanos = excluded.cost_nanos, \
     saved_nanos = excluded.saved_nanos, calls = excluded.calls, hits = excluded.hits, \
     unpriced_calls = excluded.unpriced_calls, unknown_calls = excluded.unknown_calls, \
     unknown_nanos = excluded.unknown_nanos, former_owners = excluded.former_owners, judged = excluded.judged, \
     outages = excluded.outages, outage_since = excluded.outage_since",
);

// insert-attempts
pub(crate) static ATTEMPTS: Bulk = Bulk::new(
    "INSERT INTO attempts (run_id, stage, number, tenant, started_at, finished_at, verdict, assessments, output, \
     failure) VALUES",
    10,
    "",
);

// insert-ledger
pub(crate) static LEDGER: Bulk = Bulk::new(
    "INSERT INTO ledger (run_id, stage, attempt, call, tenant, pipeline, at, purpose, model, origin, input_tokens, \
     cache_read_tokens, cache_write_tokens, output_tokens, reasoning_tokens, usage_estimated, cost_nanos, \
     saved_nanos, priced, latency_ms, error, unknown) VALUES",
    22,
    "",
);

// insert-checkpoints: the first one of a stage stays.
pub(crate) static CHECKPOINTS: Bulk = Bulk::new(
    "INSERT INTO checkpoints (run_id, stage, tenant, attempt, verdict, score, model, origin, digest, created_at, \
     output) VALUES",
    11,
    "ON CONFLICT (run_id, stage) DO NOTHING",
);

// insert-payloads: a run that ended with an output and was retried may end with another.
pub(crate) static PAYLOADS: Bulk = Bulk::new(
    "INSERT INTO run_payloads (run_id, kind, tenant, body) VALUES",
    4,
    "ON CONFLICT (run_id, kind) DO UPDATE SET body = excluded.body",
);

/// Appends events.
pub(crate) async fn events<'a>(
    conn: &mut SqliteConnection,
    of: impl IntoIterator<Item = (Of<'a>, &'a [Event])>,
) -> StoreResult<()> {
    let mut rows = Vec::new();
    for (of, events) in of {
        for event in events {
            rows.push((of, event.seq, json(event)?));
        }
    }
    let bind = |row: &mut crate::bulk::Row, (of, seq, body): &(Of<'_>, u64, String)| {
        row.add(of.run.0).add(int(*seq)).add(of.tenant).add(body.as_str());
    };
    EVENTS.execute(conn, &rows, bind).await.map(drop)
}

/// Writes stages whole.
pub(crate) async fn stages<'a>(
    conn: &mut SqliteConnection,
    of: impl IntoIterator<Item = (Of<'a>, &'a [StageRecord])>,
) -> StoreResult<()> {
    let mut rows = Vec::new();
    for (of, stages) in of {
        for stage in stages {
            rows.push((of, stage, opt_json(stage.failure.as_ref())?));
        }
    }
    let bind = |row: &mut crate::bulk::Row, (of, stage, failure): &(Of<'_>, &StageRecord, Option<String>)| {
        row.add(of.run.0).add(stage.id.as_str()).add(of.tenant);
        row.add(stage.state.as_str()).add(stage.attempt).add(stage.round_start).add(stage.not_before.map(ms));
        row.add(stage.verdict.map(Verdict::as_str)).add(stage.score);
        row.add(stage.model.as_ref().map(ToString::to_string)).add(stage.origin.map(Origin::as_str));
        row.add(failure.as_deref()).add(stage.started_at.map(ms)).add(stage.finished_at.map(ms));
        add_totals(row, &stage.totals);
        row.add(stage.former_owners);
        row.add(stage.judged).add(stage.outages).add(stage.outage_since.map(ms));
    };
    STAGES.execute(conn, &rows, bind).await.map(drop)
}

/// Appends payloads of one kind: `input` or `output`.
pub(crate) async fn payloads<'a>(
    conn: &mut SqliteConnection,
    kind: &'static str,
    of: impl IntoIterator<Item = (Of<'a>, &'a Json)>,
) -> StoreResult<()> {
    let rows: Vec<_> = of.into_iter().collect();
    let bind = |row: &mut crate::bulk::Row, (of, body): &(Of<'_>, &Json)| {
        row.add(of.run.0).add(kind).add(of.tenant).add(body.as_str());
    };
    PAYLOADS.execute(conn, &rows, bind).await.map(drop)
}

/// Appends attempts and their ledger rows.
pub(crate) async fn attempts<'a>(
    conn: &mut SqliteConnection,
    of: impl IntoIterator<Item = (Of<'a>, &'a str, &'a Commit)>,
) -> StoreResult<()> {
    struct Row<'a> {
        of: Of<'a>,
        stage: &'a StageId,
        attempt: &'a Attempt,
        assessments: String,
        output: Option<&'a str>,
        failure: Option<String>,
    }
    let (mut rows, mut calls) = (Vec::new(), Vec::new());
    for (of, pipeline, commit) in of {
        for (stage, attempt) in &commit.attempts {
            rows.push(Row {
                of,
                stage,
                attempt,
                assessments: json(&attempt.assessments)?,
                output: attempt.output.as_ref().map(Json::as_str),
                failure: opt_json(attempt.failure.as_ref())?,
            });
            let numbered = (1_i64..).zip(&attempt.calls);
            calls.extend(numbered.map(|(number, entry)| Call { of, pipeline, stage, attempt, number, entry }));
        }
    }
    let bind = |row: &mut crate::bulk::Row, each: &Row<'_>| {
        row.add(each.of.run.0).add(each.stage.as_str()).add(each.attempt.number).add(each.of.tenant);
        row.add(ms(each.attempt.started_at)).add(ms(each.attempt.finished_at)).add(each.attempt.verdict.as_str());
        row.add(each.assessments.as_str()).add(each.output).add(each.failure.as_deref());
    };
    ATTEMPTS.execute(conn, &rows, bind).await?;
    ledger(conn, &calls).await
}

/// One model call and what it belongs to.
struct Call<'a> {
    of: Of<'a>,
    pipeline: &'a str,
    stage: &'a StageId,
    attempt: &'a Attempt,
    number: i64,
    entry: &'a LedgerEntry,
}

async fn ledger(conn: &mut SqliteConnection, calls: &[Call<'_>]) -> StoreResult<()> {
    let bind = |row: &mut crate::bulk::Row, each: &Call<'_>| {
        let entry = each.entry;
        row.add(each.of.run.0).add(each.stage.as_str()).add(each.attempt.number).add(each.number);
        row.add(each.of.tenant).add(each.pipeline).add(ms(each.attempt.finished_at));
        row.add(entry.purpose.as_str()).add(entry.model.to_string()).add(entry.origin.as_str());
        add_usage(row, &entry.usage);
        row.add(entry.cost_usd.nanos()).add(entry.saved_usd.nanos()).add(entry.priced).add(int(entry.latency_ms));
        row.add(entry.error.map(Code::as_str)).add(entry.unknown);
    };
    LEDGER.execute(conn, calls, bind).await.map(drop)
}

/// Appends checkpoints.
pub(crate) async fn checkpoints<'a>(
    conn: &mut SqliteConnection,
    of: impl IntoIterator<Item = (Of<'a>, &'a [(StageId, Checkpoint)])>,
) -> StoreResult<()> {
    let each = |(of, checkpoints): (Of<'a>, &'a [(StageId, Checkpoint)])| {
        checkpoints.iter().map(move |(stage, checkpoint)| (of, stage, checkpoint))
    };
    let rows: Vec<_> = of.into_iter().flat_map(each).collect();
    let bind = |row: &mut crate::bulk::Row, (of, stage, point): &(Of<'_>, &StageId, &Checkpoint)| {
        row.add(of.run.0).add(stage.as_str()).add(of.tenant).add(point.attempt).add(point.verdict.as_str());
        row.add(point.score).add(point.model.as_ref().map(ToString::to_string)).add(point.origin.as_str());
        row.add(point.digest.as_str()).add(ms(point.created_at)).add(point.output.as_str());
    };
    CHECKPOINTS.execute(conn, &rows, bind).await.map(drop)
}
