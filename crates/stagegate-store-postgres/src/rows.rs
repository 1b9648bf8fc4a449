//! Reading rows: owns the column lists and how each becomes a word of the core. A row that cannot be read is reported
//! by table, column and id.

use std::{fmt::Display, str::FromStr};

use chrono::{DateTime, Utc};
use serde::de::{DeserializeOwned, IntoDeserializer as _};
use serde::{Deserialize, Serialize};
use sqlx::{
    Decode, Postgres, Row as _, Type,
    postgres::{PgRow, PgValueFormat},
};
use stagegate_core::{
    Assessment, Attempt, Checkpoint, Failure, Json, LedgerEntry, Rest, RunState, StageState, StoreError, StoreResult,
    Totals, Usage, Usd,
    store::{RunRecord, StageRecord},
};
use uuid::Uuid;

use crate::compact::Success;

/// The columns of a run `r` that [`run`] reads.
macro_rules! run_columns {
    () => {
        "r.id, r.tenant, r.pipeline, r.version, r.state, r.cancel_requested, r.priority, r.labels, r.cache_mode,
         r.stages_total, r.stages_done, r.failure, r.request_id, r.created_at, r.started_at, r.finished_at,
         r.deadline_at, r.last_seq, r.start_at, r.purged_at,
         ARRAY[r.input_tokens, r.cache_read_tokens, r.cache_write_tokens, r.output_tokens, r.reasoning_tokens,
               r.usage_estimated::int, r.cost_nanos, r.saved_nanos, r.calls, r.hits, r.unpriced_calls, r.unknown_calls,
               r.unknown_nanos] AS totals"
    };
}

/// The columns of a stage `s` of [`stages_of`](crate::compact::stages_of) that [`stage`] reads.
macro_rules! stage_columns {
    () => {
        "s.stage_id AS s_id, s.state AS s_state, s.attempt AS s_attempt, s.round_start AS s_round_start,
         s.not_before AS s_not_before, s.verdict AS s_verdict, s.score AS s_score, s.model AS s_model,
         s.origin AS s_origin, s.failure AS s_failure, s.started_at AS s_started_at, s.finished_at AS s_finished_at,
         s.totals AS s_totals, s.judged AS s_judged, s.outages AS s_outages, s.outage_since AS s_outage_since,
         s.former_owners AS s_former_owners,
         s.attempt_started_at AS s_attempt_started_at, s.attempt_body AS s_attempt_body"
    };
}

/// The columns of a checkpoint `c` that [`checkpoint`] reads; `c_output` is selected beside them.
macro_rules! checkpoint_columns {
    () => {
        "c.digest AS c_digest, c.attempt AS c_attempt, c.verdict AS c_verdict, c.score AS c_score, c.model AS c_model,
         c.origin AS c_origin, c.created_at AS c_created_at"
    };
}

/// The columns of an attempt `a` that [`attempt`] reads.
macro_rules! attempt_columns {
    () => {
        "a.number AS a_number, a.started_at AS a_started_at, a.finished_at AS a_finished_at, a.verdict AS a_verdict,
         a.body AS a_body, a.output AS a_output"
    };
}

pub(crate) use stagegate_core::event::lean;
pub(crate) use {attempt_columns, checkpoint_columns, run_columns, stage_columns};

/// The farthest time from the year 2000 that is read: some two hundred thousand years.
const TIME_MAX_MICROS: u64 = 200_000 * 365 * 24 * 3_600 * 1_000_000;

/// How many numbers make up [`Totals`].
pub(crate) const TOTALS: usize = 13;

/// A row that knows where it comes from.
#[derive(Clone, Copy)]
pub(crate) struct Reader<'r> {
    row: &'r PgRow,
    table: &'static str,
    id: Uuid,
}

impl<'r> Reader<'r> {
    /// A row of a table, about the thing with this id.
    pub(crate) fn new(row: &'r PgRow, table: &'static str, id: Uuid) -> Self {
        Self { row, table, id }
    }

    fn of(self, table: &'static str) -> Self {
        Self { table, ..self }
    }

    /// This row's column cannot be read. Joined columns are named as in their table.
    pub(crate) fn corrupt(&self, column: &'static str, message: impl Display) -> StoreError {
        let column = ["s_", "c_", "a_"].iter().find_map(|alias| column.strip_prefix(alias)).unwrap_or(column);
        StoreError::Corrupt { table: self.table, column, id: self.id.to_string(), message: message.to_string() }
    }

    pub(crate) fn get<T: Decode<'r, Postgres> + Type<Postgres>>(&self, column: &'static str) -> StoreResult<T> {
        if T::type_info() == <Time as Type<Postgres>>::type_info() && self.is_beyond_time(column) {
            return Err(self.corrupt(column, "no time"));
        }
        // sqlx's message names types, not values.
        self.row.try_get(column).map_err(|error| self.corrupt(column, error))
    }

    /// Whether a column holds `infinity`, or a time that chrono has none for: sqlx would panic.
    fn is_beyond_time(&self, column: &'static str) -> bool {
        let Ok(value) = self.row.try_get_raw(column) else { return false };
        // Microseconds since 2000.
        let micros = value.as_bytes().ok().filter(|_| value.format() == PgValueFormat::Binary);
        let micros = micros.and_then(|bytes| bytes.try_into().ok()).map(i64::from_be_bytes);
        micros.is_some_and(|micros| micros.unsigned_abs() > TIME_MAX_MICROS)
    }

    /// A count or an ordinal.
    pub(crate) fn number(&self, column: &'static str) -> StoreResult<u32> {
        u32::try_from(self.get::<i32>(column)?).map_err(|_| self.corrupt(column, "negative"))
    }

    /// A seq.
    pub(crate) fn seq(&self, column: &'static str) -> StoreResult<u64> {
        u64::try_from(self.get::<i64>(column)?).map_err(|_| self.corrupt(column, "negative"))
    }

    /// An identifier by its grammar.
    pub(crate) fn parse<T: FromStr>(&self, column: &'static str) -> StoreResult<T> {
        self.get::<&str>(column)?.parse().map_err(|_| self.corrupt(column, "not a valid identifier"))
    }

    /// A word of a closed vocabulary.
    pub(crate) fn word<T: DeserializeOwned>(&self, column: &'static str) -> StoreResult<T> {
        self.maybe_word(column)?.ok_or_else(|| self.corrupt(column, "missing"))
    }

    /// A word of a closed vocabulary, or NULL.
    pub(crate) fn maybe_word<T: DeserializeOwned>(&self, column: &'static str) -> StoreResult<Option<T>> {
        let Some(text) = self.get::<Option<String>>(column)? else { return Ok(None) };
        let deserializer: serde::de::value::StringDeserializer<serde::de::value::Error> = text.into_deserializer();
        T::deserialize(deserializer).map(Some).map_err(|_| self.corrupt(column, "not a known word"))
    }

    /// A JSON document.
    pub(crate) fn json<T: DeserializeOwned>(&self, column: &'static str) -> StoreResult<T> {
        self.maybe_json(column)?.ok_or_else(|| self.corrupt(column, "missing"))
    }

    /// A JSON document, or NULL.
    pub(crate) fn maybe_json<T: DeserializeOwned>(&self, column: &'static str) -> StoreResult<Option<T>> {
        let Some(text) = self.get::<Option<&str>>(column)? else { return Ok(None) };
        serde_json::from_str(text).map(Some).map_err(|error| self.corrupt(column, json_problem(&error)))
    }

    /// A payload, which stays text.
    pub(crate) fn payload(&self, column: &'static str) -> StoreResult<Json> {
        self.maybe_payload(column)?.ok_or_else(|| self.corrupt(column, "missing"))
    }

    /// A payload, or NULL.
    pub(crate) fn maybe_payload(&self, column: &'static str) -> StoreResult<Option<Json>> {
        let Some(text) = self.get::<Option<&str>>(column)? else { return Ok(None) };
        Json::from_text(text).map(Some).map_err(|error| self.corrupt(column, json_problem(&error)))
    }
}

/// What is wrong with a document, without quoting it.
pub(crate) fn json_problem(error: &serde_json::Error) -> String {
    format!("no valid JSON document of its kind (line {}, column {})", error.line(), error.column())
}

/// The id in a column, for the [`Reader`] of the rest.
pub(crate) fn id(row: &PgRow, column: &'static str, table: &'static str) -> StoreResult<Uuid> {
    Reader::new(row, table, Uuid::nil()).get(column)
}

/// A run, from [`run_columns`].
pub(crate) fn run(row: &PgRow) -> StoreResult<RunRecord> {
    let id = id(row, "id", "runs")?;
    let read = Reader::new(row, "runs", id);
    let labels = read.get::<Vec<String>>("labels")?;
    let labels = labels.iter().map(|label| serde_json::from_str::<(String, String)>(label));
    Ok(RunRecord {
        id: stagegate_core::RunId(id),
        tenant: read.parse("tenant")?,
        pipeline: read.parse("pipeline")?,
        version: read.number("version")?,
        state: run_state(&read, "state")?,
        cancel_requested: read.get("cancel_requested")?,
        priority: read.get("priority")?,
        labels: labels.collect::<Result<_, _>>().map_err(|error| read.corrupt("labels", json_problem(&error)))?,
        cache_mode: read.maybe_word("cache_mode")?,
        stages_total: read.number("stages_total")?,
        stages_done: read.number("stages_done")?,
        totals: totals(&read, "totals")?,
        failure: read.maybe_json("failure")?,
        request_id: read.get("request_id")?,
        created_at: read.get("created_at")?,
        start_at: read.get("start_at")?,
        purged_at: read.get("purged_at")?,
        started_at: read.get("started_at")?,
        finished_at: read.get("finished_at")?,
        deadline_at: read.get("deadline_at")?,
        last_seq: read.seq("last_seq")?,
    })
}

/// A run's state.
pub(crate) fn run_state(read: &Reader<'_>, column: &'static str) -> StoreResult<RunState> {
    RunState::parse(read.get(column)?).ok_or_else(|| read.corrupt(column, "not a known word"))
}

/// A stage, from [`stage_columns`]; None where the join found none.
pub(crate) fn stage(read: Reader<'_>) -> StoreResult<Option<StageRecord>> {
    let read = read.of("stages");
    if read.get::<Option<&str>>("s_id")?.is_none() {
        return Ok(None);
    }
    if read.get::<Option<&str>>("s_attempt_body")?.is_some() {
        return Success::read(&read.of("checkpoints")).map(|success| Some(success.record()));
    }
    let state: &str = read.get("s_state")?;
    let (attempt, round_start) = (read.number("s_attempt")?, read.number("s_round_start")?);
    let (judged, outages) = (read.get::<Option<i32>>("s_judged")?, read.get::<Option<i32>>("s_outages")?);
    Ok(Some(StageRecord {
        id: read.parse("s_id")?,
        state: StageState::parse(state).ok_or_else(|| read.corrupt("state", "not a known word"))?,
        attempt,
        round_start,
        former_owners: read.number("s_former_owners")?,
        not_before: read.get("s_not_before")?,
        verdict: read.maybe_word("s_verdict")?,
        score: read.get("s_score")?,
        model: read.maybe_word("s_model")?,
        origin: read.maybe_word("s_origin")?,
        totals: totals(&read, "s_totals")?,
        // A replica of schema 2 does not tell: to it every attempt counts.
        judged: judged.map_or_else(|| attempt.saturating_sub(round_start), count_or_none),
        outages: outages.map_or(0, count_or_none),
        outage_since: read.get("s_outage_since")?,
        failure: read.maybe_json::<Failure>("s_failure")?,
        started_at: read.get("s_started_at")?,
        finished_at: read.get("s_finished_at")?,
    }))
}

/// A checkpoint, from [`checkpoint_columns`]; None where the join found none.
pub(crate) fn checkpoint(read: Reader<'_>) -> StoreResult<Option<Checkpoint>> {
    let read = read.of("checkpoints");
    let Some(digest) = read.get("c_digest")? else { return Ok(None) };
    Ok(Some(Checkpoint {
        output: read.payload("c_output")?,
        digest,
        attempt: read.number("c_attempt")?,
        verdict: read.word("c_verdict")?,
        score: read.get("c_score")?,
        model: read.maybe_word("c_model")?,
        origin: read.word("c_origin")?,
        created_at: read.get("c_created_at")?,
    }))
}

/// What an attempt's `body` holds, on its way in.
#[derive(Serialize)]
pub(crate) struct AttemptBody<'a> {
    assessments: &'a [Assessment],
    calls: &'a [LedgerEntry],
    #[serde(skip_serializing_if = "Option::is_none")]
    failure: Option<&'a Failure>,
    #[serde(flatten)]
    rest: &'a Rest,
}

impl<'a> AttemptBody<'a> {
    pub(crate) fn of(attempt: &'a Attempt) -> Self {
        Self {
            assessments: &attempt.assessments,
            calls: &attempt.calls,
            failure: attempt.failure.as_ref(),
            rest: &attempt.rest,
        }
    }
}

/// And on its way out.
#[derive(Deserialize)]
struct StoredAttemptBody {
    assessments: Vec<Assessment>,
    calls: Vec<LedgerEntry>,
    #[serde(default)]
    failure: Option<Failure>,
    #[serde(flatten)]
    rest: Rest,
}

/// What was called, of an attempt's `body`.
#[derive(Deserialize)]
pub(crate) struct Calls {
    pub(crate) calls: Vec<LedgerEntry>,
}

/// An attempt, from [`attempt_columns`]; None where the join found none.
pub(crate) fn attempt(read: Reader<'_>) -> StoreResult<Option<Attempt>> {
    let read = read.of("attempts");
    if read.get::<Option<i32>>("a_number")?.is_none() {
        return Ok(None);
    }
    let body: StoredAttemptBody = read.json("a_body")?;
    Ok(Some(Attempt {
        number: read.number("a_number")?,
        started_at: read.get("a_started_at")?,
        finished_at: read.get("a_finished_at")?,
        verdict: read.word("a_verdict")?,
        assessments: body.assessments,
        calls: body.calls,
        output: read.maybe_payload("a_output")?,
        failure: body.failure,
        rest: body.rest,
    }))
}

fn totals(read: &Reader<'_>, column: &'static str) -> StoreResult<Totals> {
    let numbers: Vec<i64> = read.get(column)?;
    let numbers: [i64; TOTALS] = numbers.try_into().map_err(|_| read.corrupt(column, "not thirteen numbers"))?;
    let [input, cache_read, cache_write, output, reasoning, estimated, cost, saved, calls, hits, unpriced, rest @ ..] =
        numbers;
    let [unknown, unknown_nanos] = rest;
    let tokens = |number: i64| u64::try_from(number).map_err(|_| read.corrupt(column, "negative"));
    let count = |number: i64| u32::try_from(number).map_err(|_| read.corrupt(column, "out of range"));
    Ok(Totals {
        usage: Usage {
            input_tokens: tokens(input)?,
            cache_read_tokens: tokens(cache_read)?,
            cache_write_tokens: tokens(cache_write)?,
            output_tokens: tokens(output)?,
            reasoning_tokens: tokens(reasoning)?,
            estimated: estimated != 0,
        },
        cost_usd: Usd::from_nanos(cost),
        saved_usd: Usd::from_nanos(saved),
        calls: count(calls)?,
        hits: count(hits)?,
        unpriced_calls: count(unpriced)?,
        unknown_calls: count(unknown)?,
        unknown_usd: Usd::from_nanos(unknown_nanos),
    })
}

/// Totals as the numbers that [`totals`] reads. Amounts past what a column holds are kept at its limit.
pub(crate) fn totals_numbers(totals: &Totals) -> [i64; TOTALS] {
    let usage = &totals.usage;
    [
        integer(usage.input_tokens),
        integer(usage.cache_read_tokens),
        integer(usage.cache_write_tokens),
        integer(usage.output_tokens),
        integer(usage.reasoning_tokens),
        i64::from(usage.estimated),
        totals.cost_usd.nanos(),
        totals.saved_usd.nanos(),
        i64::from(small(totals.calls)),
        i64::from(small(totals.hits)),
        i64::from(small(totals.unpriced_calls)),
        i64::from(small(totals.unknown_calls)),
        totals.unknown_usd.nanos(),
    ]
}

/// Where a stage stands in an outage, as the numbers that follow its totals: the time in microseconds since 1970, 0 for
/// none.
pub(crate) fn outage_numbers(stage: &StageRecord) -> [i64; 3] {
    let since = stage.outage_since.map_or(0, |at| at.timestamp_micros());
    [i64::from(small(stage.judged)), i64::from(small(stage.outages)), since]
}

fn count_or_none(number: i32) -> u32 {
    u32::try_from(number).unwrap_or(0)
}

/// As a column holds it, at most its limit.
pub(crate) fn integer(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// As a column holds it, at most its limit.
pub(crate) fn small(number: u32) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

/// A span as whole milliseconds.
pub(crate) fn millis(span: std::time::Duration) -> i64 {
    i64::try_from(span.as_millis()).unwrap_or(i64::MAX)
}

/// A text for people: Postgres text cannot hold NUL, which is shown as the replacement character. What must come back
/// as it was is kept as JSON or as bytes instead.
pub(crate) fn printable(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

/// A text that is only ever compared, as Postgres can hold it: distinct texts stay distinct.
pub(crate) fn without_nul(text: &str) -> String {
    if text.contains(['\0', '\\']) { text.replace('\\', "\\\\").replace('\0', "\\0") } else { text.to_owned() }
}

/// A document as JSON text.
pub(crate) fn to_json<T: Serialize + ?Sized>(what: &'static str, value: &T) -> StoreResult<String> {
    serde_json::to_string(value).map_err(|_| crate::error::unencodable(what))
}

/// An optional document as JSON text.
pub(crate) fn maybe_json<T: Serialize>(what: &'static str, value: Option<&T>) -> StoreResult<Option<String>> {
    value.map(|value| to_json(what, value)).transpose()
}

/// A time, as stored.
pub(crate) type Time = DateTime<Utc>;

#[cfg(test)]
mod tests {
    use stagegate_core::{Event, EventKind, RunState};

    use super::*;

    #[test]
    fn a_lean_document_reads_as_the_whole_one() {
        let finished = |totals: Totals, message: &str| {
            let kind = EventKind::RunFinished {
                state: RunState::Failed,
                failure: Some(Failure::new(stagegate_core::Code::GateFailed, message)),
                totals,
            };
            Event::new(1, DateTime::UNIX_EPOCH, kind)
        };
        let ten = Totals { usage: Usage { cache_read_tokens: 10, ..Usage::default() }, hits: 100, ..Totals::default() };
        for totals in [Totals::default(), ten] {
            let event = finished(totals, ",\"hits\":0, and ,\"hits\":0}");
            let whole = serde_json::to_string(&event).expect("JSON");
            let lean = lean(whole.clone());
            assert!(lean.len() < whole.len(), "{lean}");
            assert_eq!(serde_json::from_str::<Event>(&lean).expect("reads"), event);
        }
    }

    #[test]
    fn texts_without_nul_stay_distinct() {
        let given = ["", "a", "a\0", "a\\0", "a\\\\0", "\0", "\\"];
        let stored: std::collections::HashSet<_> = given.iter().map(|text| without_nul(text)).collect();
        assert_eq!(stored.len(), given.len());
        assert!(stored.iter().all(|text| !text.contains('\0')));
    }
}
