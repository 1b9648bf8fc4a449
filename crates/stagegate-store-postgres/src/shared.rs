//! What [`crate::submit::SUBMIT`] and [`crate::commit::COMMIT`] both write: stages and events. Their parameters are the
//! first nineteen of both statements, so that the pieces of SQL can be shared.

use stagegate_core::{Event, StoreResult, store::StageRecord};
use uuid::Uuid;

use crate::{
    compact,
    pool::Statement,
    rows::{self, Time},
};

/// The stages that are given for the runs in the statement's `target`, and whether each has its row, which is told
/// by this expression. Numbers come as one array, seventeen a stage: the totals, the number of former owners, and where it
/// stands in an outage.
macro_rules! stages_given {
    ($there:literal) => {
        concat!(
        "SELECT run.id AS run_id, run.tenant, t.stage_id, t.state, t.attempt, t.round_start, t.not_before, t.verdict,
                t.score, t.model, t.origin, t.failure, t.started_at, t.finished_at,
                ($14::int8[])[t.i * 17 - 16] AS input_tokens, ($14::int8[])[t.i * 17 - 15] AS cache_read_tokens,
                ($14::int8[])[t.i * 17 - 14] AS cache_write_tokens, ($14::int8[])[t.i * 17 - 13] AS output_tokens,
                ($14::int8[])[t.i * 17 - 12] AS reasoning_tokens, ($14::int8[])[t.i * 17 - 11] <> 0 AS usage_estimated,
                ($14::int8[])[t.i * 17 - 10] AS cost_nanos, ($14::int8[])[t.i * 17 - 9] AS saved_nanos,
                ($14::int8[])[t.i * 17 - 8]::int4 AS calls, ($14::int8[])[t.i * 17 - 7]::int4 AS hits,
                ($14::int8[])[t.i * 17 - 6]::int4 AS unpriced_calls, ($14::int8[])[t.i * 17 - 5]::int4 AS unknown_calls,
                ($14::int8[])[t.i * 17 - 4] AS unknown_nanos, ($14::int8[])[t.i * 17 - 3]::int4 AS former_owners,
                ($14::int8[])[t.i * 17 - 2]::int4 AS judged, ($14::int8[])[t.i * 17 - 1]::int4 AS outages,
                CASE WHEN ($14::int8[])[t.i * 17] <> 0
                     THEN timestamptz 'epoch' + ($14::int8[])[t.i * 17] * interval '1 microsecond' END AS outage_since,
                t.fresh,
                ",
        $there,
        " AS there
         FROM unnest($1::uuid[], $2::text[], $3::text[], $4::int4[], $5::int4[], $6::timestamptz[], $7::text[],
                     $8::float8[], $9::text[], $10::text[], $11::text[], $12::timestamptz[], $13::timestamptz[],
                     $15::bool[])
             WITH ORDINALITY AS t(run_id, stage_id, state, attempt, round_start, not_before, verdict, score, model,
                                  origin, failure, started_at, finished_at, fresh, i)
         JOIN target run ON run.id = t.run_id AND run.started"
        )
    };
}

/// Inserts stages; to be followed by where they are given, and which of them.
macro_rules! insert_stages {
    () => {
        "INSERT INTO stages (
             run_id, tenant, stage_id, state, attempt, round_start, not_before, verdict, score, model, origin, failure,
             started_at, finished_at, input_tokens, cache_read_tokens, cache_write_tokens, output_tokens,
             reasoning_tokens, usage_estimated, cost_nanos, saved_nanos, calls, hits, unpriced_calls, unknown_calls,
             unknown_nanos, former_owners, judged, outages, outage_since)
         SELECT run_id, tenant, stage_id, state, attempt, round_start, not_before, verdict, score, model, origin, failure,
                started_at, finished_at, input_tokens, cache_read_tokens, cache_write_tokens, output_tokens,
                reasoning_tokens, usage_estimated, cost_nanos, saved_nanos, calls, hits, unpriced_calls, unknown_calls,
                unknown_nanos, former_owners, judged, outages, outage_since
         FROM"
    };
}

/// Inserts events of the runs in the statement's `target`; takes what else is asked of a row and its run.
macro_rules! insert_events {
    ($which:literal) => {
        concat!(
            "INSERT INTO events (run_id, tenant, seq, at, body)
         SELECT run.id, run.tenant, t.seq, t.at, t.body
         FROM unnest($16::uuid[], $17::int8[], $18::timestamptz[], $19::text[])
             WITH ORDINALITY AS t(run_id, seq, at, body, i)
         JOIN target run ON run.id = t.run_id",
            $which
        )
    };
}

pub(crate) use {insert_events, insert_stages, stages_given};

/// Parameters $1 to $15.
#[derive(Default)]
pub(crate) struct StageColumns<'a> {
    runs: Vec<Uuid>,
    ids: Vec<&'a str>,
    states: Vec<&'static str>,
    attempts: Vec<i32>,
    rounds: Vec<i32>,
    not_before: Vec<Option<Time>>,
    verdicts: Vec<Option<&'static str>>,
    scores: Vec<Option<f64>>,
    models: Vec<Option<String>>,
    origins: Vec<Option<&'static str>>,
    failures: Vec<Option<String>>,
    started: Vec<Option<Time>>,
    finished: Vec<Option<Time>>,
    numbers: Vec<i64>,
    fresh: Vec<bool>,
}

impl<'a> StageColumns<'a> {
    /// A fresh stage is kept on its run's row; where it has a row of its own, that is written.
    pub(crate) fn push(&mut self, run: Uuid, stage: &'a StageRecord, fresh: bool) -> StoreResult<()> {
        self.runs.push(run);
        self.ids.push(stage.id.as_str());
        self.states.push(stage.state.as_str());
        self.attempts.push(rows::small(stage.attempt));
        self.rounds.push(rows::small(stage.round_start));
        self.not_before.push(stage.not_before);
        self.verdicts.push(stage.verdict.map(stagegate_core::Verdict::as_str));
        self.scores.push(stage.score);
        self.models.push(stage.model.as_ref().map(ToString::to_string));
        self.origins.push(stage.origin.map(stagegate_core::Origin::as_str));
        self.failures.push(rows::maybe_json("a failure", stage.failure.as_ref())?);
        self.started.push(stage.started_at);
        self.finished.push(stage.finished_at);
        self.numbers.extend(rows::totals_numbers(&stage.totals));
        self.numbers.push(i64::from(rows::small(stage.former_owners)));
        self.numbers.extend(rows::outage_numbers(stage));
        self.fresh.push(fresh);
        Ok(())
    }

    pub(crate) fn bind(self, query: Statement<'_>) -> Statement<'_> {
        query
            .bind(self.runs)
            .bind(self.ids)
            .bind(self.states)
            .bind(self.attempts)
            .bind(self.rounds)
            .bind(self.not_before)
            .bind(self.verdicts)
            .bind(self.scores)
            .bind(self.models)
            .bind(self.origins)
            .bind(self.failures)
            .bind(self.started)
            .bind(self.finished)
            .bind(self.numbers)
            .bind(self.fresh)
    }
}

/// Parameters $16 to $19.
#[derive(Default)]
pub(crate) struct EventColumns {
    runs: Vec<Uuid>,
    seqs: Vec<i64>,
    times: Vec<Time>,
    bodies: Vec<String>,
}

impl EventColumns {
    /// Events of one time, in one row that bears the last one's seq.
    pub(crate) fn push(&mut self, run: Uuid, span: &[Event]) -> StoreResult<()> {
        let Some(last) = span.last() else { return Ok(()) };
        self.runs.push(run);
        self.seqs.push(rows::integer(last.seq));
        self.times.push(last.at);
        self.bodies.push(compact::body(span)?);
        Ok(())
    }

    /// How many rows there are.
    pub(crate) fn len(&self) -> usize {
        self.runs.len()
    }

    /// Events, each in a row of its own where the compact form is not written.
    pub(crate) fn push_all(&mut self, run: Uuid, events: &[Event], compact: bool) -> StoreResult<()> {
        if compact {
            compact::spans(events).try_for_each(|span| self.push(run, span))
        } else {
            events.chunks(1).try_for_each(|event| self.push(run, event))
        }
    }

    pub(crate) fn bind(self, query: Statement<'_>) -> Statement<'_> {
        query.bind(self.runs).bind(self.seqs).bind(self.times).bind(self.bodies)
    }
}
