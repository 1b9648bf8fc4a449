//! The compact form of what most steps write, which a replica of schema 1 cannot read: it is written once none is left,
//! and the other form is read for ever. Owns what is left out, and how it comes back.
//!
//! - A stage that succeeds at its first attempt has no row in `stages`: its checkpoint, which tells of the attempt too,
//!   says all of it.
//! - The events of a step stand in the row of its checkpoint: `checkpoints.events` is a JSON array of their bodies,
//!   `seq` is that of the last one, and their time is the checkpoint's. The one that tells of the checkpoint is `null`.
//! - Other events of one step and one time share a row of `events` in the same way, each with its body.
//! - A run's default output is kept as the names of its stages, in `runs.output_of`.
//!
//! Whatever would not come back exactly as it was is written in the other form, so that nothing depends on how the
//! core decides.

use std::{
    borrow::Cow,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use serde_json::value::RawValue;
use sqlx::postgres::PgRow;
use stagegate_core::{
    Attempt, Capabilities, Capability, Checkpoint, Event, EventKind, LedgerEntry, ModelRef, Origin, RunId, StageId,
    StageState, StoreResult, Totals, Verdict,
    store::{Commit, StageRecord},
};

use crate::rows::{self, Reader, Time};

/// Whether the compact form is written. Off until a heartbeat has found that [`Capability::CompactRows`] is common; never
/// off again, because that capability settles: the database lets no replica of schema 1 in from then on.
#[derive(Debug, Clone, Default)]
pub(crate) struct Gate(Arc<AtomicBool>);

impl Gate {
    pub(crate) fn is_open(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Takes note of a heartbeat's answer.
    pub(crate) fn learn(&self, common: &Capabilities) {
        if common.common(Capability::CompactRows) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

/// A success at the first attempt, as a checkpoint's row tells it.
#[derive(Debug)]
pub(crate) struct Success {
    stage: StageId,
    attempt: u32,
    verdict: Verdict,
    score: Option<f64>,
    model: Option<ModelRef>,
    origin: Origin,
    /// When the stage began; its attempt starts a little later.
    began_at: Time,
    started_at: Time,
    finished_at: Time,
    totals: Totals,
}

impl Success {
    fn of(stage: &StageId, checkpoint: &Checkpoint, attempt: &Attempt, began_at: Option<Time>) -> Self {
        Self {
            stage: stage.clone(),
            attempt: checkpoint.attempt,
            verdict: checkpoint.verdict,
            score: checkpoint.score,
            model: checkpoint.model.clone(),
            origin: checkpoint.origin,
            began_at: began_at.unwrap_or(attempt.started_at),
            started_at: attempt.started_at,
            finished_at: attempt.finished_at,
            totals: totals(&attempt.calls),
        }
    }

    /// From the columns of [`stages_of`] or [`events_of`].
    pub(crate) fn read(read: &Reader<'_>) -> StoreResult<Self> {
        Ok(Self {
            stage: read.parse("s_id")?,
            attempt: read.number("s_attempt")?,
            verdict: read.word("s_verdict")?,
            score: read.get("s_score")?,
            model: read.maybe_word("s_model")?,
            origin: read.word("s_origin")?,
            began_at: read.get("s_started_at")?,
            started_at: read.get("s_attempt_started_at")?,
            finished_at: read.get("s_finished_at")?,
            totals: totals(&read.json::<rows::Calls>("s_attempt_body")?.calls),
        })
    }

    /// The stage's record.
    pub(crate) fn record(self) -> StageRecord {
        StageRecord {
            state: StageState::Succeeded,
            attempt: self.attempt,
            verdict: Some(self.verdict),
            score: self.score,
            model: self.model,
            origin: Some(self.origin),
            totals: self.totals,
            started_at: Some(self.began_at),
            finished_at: Some(self.finished_at),
            ..StageRecord::pending(self.stage)
        }
    }

    /// The event that tells of it.
    fn event(self) -> EventKind {
        let latency_ms = u64::try_from((self.finished_at - self.started_at).num_milliseconds()).unwrap_or(0);
        EventKind::StageSucceeded {
            stage: self.stage,
            attempt: self.attempt,
            verdict: self.verdict,
            score: self.score,
            model: self.model,
            origin: self.origin,
            latency_ms,
            totals: self.totals,
            decision: None,
        }
    }
}

fn totals(calls: &[LedgerEntry]) -> Totals {
    calls.iter().fold(Totals::default(), |mut totals, call| {
        totals.add(call);
        totals
    })
}

/// What a stage of a plain step has, of which the attempts and checkpoints go together.
fn success_of(commit: &Commit, at: usize) -> Option<Success> {
    let ((stage, checkpoint), (_, attempt)) = (commit.checkpoints.get(at)?, commit.attempts.get(at)?);
    let began_at = commit.stages.iter().find(|record| record.id == *stage).and_then(|record| record.started_at);
    Some(Success::of(stage, checkpoint, attempt, began_at))
}

/// Whether a stage of a plain step needs no row.
pub(crate) fn tells_all(commit: &Commit, stage: &StageRecord) -> bool {
    let of_stage = commit.checkpoints.iter().position(|(id, _)| *id == stage.id);
    of_stage.and_then(|at| success_of(commit, at)).is_some_and(|success| success.record() == *stage)
}

/// Events in spans of one time each, which can share a row.
pub(crate) fn spans(events: &[Event]) -> impl Iterator<Item = &[Event]> {
    events.chunk_by(|event, next| event.at == next.at)
}

/// Which checkpoint of a plain step bears these events, if one can: of several the one that they tell of.
pub(crate) fn bearer(commit: &Commit, span: &[Event], free: impl Fn(usize) -> bool) -> Option<usize> {
    let at = span.first()?.at;
    let suits = |index: &usize| free(*index) && commit.checkpoints[*index].1.created_at == at;
    let told = |index: &usize| span.iter().any(|event| event.kind.stage() == Some(&commit.checkpoints[*index].0));
    let all = || 0..commit.checkpoints.len();
    all().filter(suits).find(told).or_else(|| all().find(suits))
}

/// The events that a checkpoint of a plain step bears, as stored.
pub(crate) fn borne(commit: &Commit, index: usize, span: &[Event]) -> StoreResult<String> {
    let success = success_of(commit, index).map(Success::event);
    let told = |event: &Event| success.as_ref() == Some(&event.kind) && !event.is_of_newer_release();
    bodies(span.iter().map(|event| Some(event).filter(|event| !told(event))))
}

/// The events of a span, as stored in a row of their own: one is itself.
pub(crate) fn body(span: &[Event]) -> StoreResult<String> {
    match span {
        [event] => Ok(body_of(event)?.into_owned()),
        several => bodies(several.iter().map(Some)),
    }
}

fn bodies<'a>(events: impl Iterator<Item = Option<&'a Event>>) -> StoreResult<String> {
    let mut list = String::from("[");
    for event in events {
        if list.len() > 1 {
            list.push(',');
        }
        list.push_str(&event.map_or(Ok(Cow::Borrowed("null")), body_of)?);
    }
    list.push(']');
    Ok(list)
}

fn body_of(event: &Event) -> StoreResult<Cow<'_, str>> {
    event.body().map_err(|_| crate::error::unencodable("an event"))
}

/// The events of a row, from [`events_of`], that come after this seq.
pub(crate) fn events(row: &PgRow, run: RunId, after: u64) -> StoreResult<Vec<Event>> {
    let read = Reader::new(row, "events", run.0);
    let (last, at) = (read.seq("seq")?, read.get("at")?);
    let text: &str = read.get("body")?;
    let unreadable = |error: serde_json::Error| read.corrupt("body", rows::json_problem(&error));
    let bodies: Vec<Option<&str>> = if text.starts_with('[') {
        let bodies: Vec<Option<&RawValue>> = serde_json::from_str(text).map_err(unreadable)?;
        bodies.into_iter().map(|body| body.map(RawValue::get)).collect()
    } else {
        vec![Some(text)]
    };
    let first = (last + 1).checked_sub(bodies.len() as u64).ok_or_else(|| read.corrupt("seq", "too small"))?;
    let event = |(seq, body): (u64, Option<&str>)| match body {
        Some(body) => Event::read(seq, at, body).map_err(unreadable),
        None => Success::read(&Reader::new(row, "checkpoints", run.0)).map(|told| Event::new(seq, at, told.event())),
    };
    (first..).zip(bodies).filter(|(seq, _)| *seq > after).map(event).collect()
}

/// The rows that tell of a run's events after a seq, in order; of the last one not all events may be wanted.
macro_rules! events_of {
    ($run:literal, $after:literal, $limit:literal) => {
        concat!(
            "(
    SELECT e.seq, e.at, e.body, NULL::text AS s_id, NULL::int4 AS s_attempt, NULL::text AS s_verdict,
           NULL::float8 AS s_score, NULL::text AS s_model, NULL::text AS s_origin, NULL::timestamptz AS s_started_at,
           NULL::timestamptz AS s_attempt_started_at, NULL::timestamptz AS s_finished_at, NULL::text AS s_attempt_body
    FROM events e WHERE e.run_id = ",
            $run,
            " AND e.seq > ",
            $after,
            " ORDER BY e.run_id, e.seq LIMIT ",
            $limit,
            "
) UNION ALL (
    SELECT c.seq, c.created_at, c.events, c.stage_id, c.attempt, c.verdict, c.score, c.model, c.origin,
           coalesce(c.stage_started_at, c.attempt_started_at), c.attempt_started_at,
           coalesce(c.attempt_finished_at, c.created_at), c.attempt_body
    FROM checkpoints c WHERE c.run_id = ",
            $run,
            " AND c.seq > ",
            $after,
            "
) ORDER BY seq LIMIT ",
            $limit
        )
    };
}

/// The stages of the run `r`: their rows, and those that are told by their checkpoints.
macro_rules! stages_of {
    () => {
        "LATERAL (
         SELECT g.stage_id, g.state, g.attempt, g.round_start, g.not_before, g.verdict, g.score, g.model, g.origin,
                g.failure, g.started_at, g.finished_at, g.judged, g.outages, g.outage_since,
                ARRAY[g.input_tokens, g.cache_read_tokens, g.cache_write_tokens, g.output_tokens, g.reasoning_tokens,
                      g.usage_estimated::int, g.cost_nanos, g.saved_nanos, g.calls, g.hits, g.unpriced_calls,
                      g.unknown_calls, g.unknown_nanos] AS totals, g.former_owners,
                NULL::timestamptz AS attempt_started_at, NULL::text AS attempt_body
         FROM stages g WHERE g.run_id = r.id
         UNION ALL
         SELECT k.stage_id, NULL, k.attempt, NULL, NULL, k.verdict, k.score, k.model, k.origin, NULL,
                coalesce(k.stage_started_at, k.attempt_started_at), coalesce(k.attempt_finished_at, k.created_at), NULL,
                NULL, NULL, NULL, 0, k.attempt_started_at, k.attempt_body
         FROM checkpoints k WHERE k.run_id = r.id AND k.attempt_body IS NOT NULL AND (
             SELECT true FROM stages g WHERE g.run_id = k.run_id AND g.stage_id = k.stage_id
         ) IS NULL
     ) s"
    };
}

pub(crate) use {events_of, stages_of};
