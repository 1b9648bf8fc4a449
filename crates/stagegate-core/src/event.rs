//! Events: the thin, ordered, replayable record of what happened to a run. Owns their names and fields; they carry
//! no prompts and no outputs.

use std::{borrow::Cow, sync::Arc};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::{PartialSchema, ToSchema};

use crate::{Code, Failure, ModelRef, Origin, PipelineName, RunState, StageId, Totals, Verdict, Word};

/// One event of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Gap-free per run, from 1.
    pub seq: u64,
    /// When it was decided.
    pub at: DateTime<Utc>,
    /// What happened.
    pub kind: EventKind,
    /// Where `kind` does not tell all of it (a newer release wrote it): the JSON object that does, as it was written.
    raw: Option<Arc<str>>,
}

/// One event of a run.
#[derive(Serialize, Deserialize, ToSchema)]
struct Wire<K> {
    /// Gap-free per run, from 1.
    seq: u64,
    /// When it was decided.
    at: DateTime<Utc>,
    /// What happened.
    #[serde(flatten)]
    kind: K,
}

impl PartialSchema for Event {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        Wire::<EventKind>::schema()
    }
}

impl ToSchema for Event {
    fn schemas(schemas: &mut Vec<(String, utoipa::openapi::RefOr<utoipa::openapi::Schema>)>) {
        schemas.push((<EventKind as ToSchema>::name().into_owned(), EventKind::schema()));
        EventKind::schemas(schemas);
    }
}

impl Event {
    /// An event of this release.
    pub fn new(seq: u64, at: DateTime<Utc>, kind: EventKind) -> Self {
        Self { seq, at, kind, raw: None }
    }

    /// From its stored body, a JSON object of everything but `seq` and `at`. An event of a newer release is carried as it is: of an unknown type, or with
    /// fields or values that this release does not know. Fails where the body is no object that has a `type`.
    pub fn read(seq: u64, at: DateTime<Utc>, body: &str) -> Result<Self, serde_json::Error> {
        let kind = match serde_json::from_str::<EventKind>(body) {
            Ok(kind) => {
                // Where it would be written the same there is nothing in it that this release does not know.
                let whole = serde_json::to_string(&kind)?;
                if whole == body || lean(whole) == body {
                    return Ok(Self::new(seq, at, kind));
                }
                kind
            }
            Err(_) => EventKind::Unknown(serde_json::from_str(body)?),
        };
        Ok(Self { seq, at, kind, raw: Some(body.trim().into()) })
    }

    /// What stands for an event whose row cannot be read, so that the others keep their places.
    pub fn unreadable(seq: u64, at: DateTime<Utc>) -> Self {
        let name = Word::new("unreadable");
        let kind = name.map_or(EventKind::RunStarted, |name| EventKind::Unknown(UnknownEvent { name, stage: None }));
        let body = format!("{{\"type\":\"unreadable\",\"code\":\"{}\"}}", Code::CorruptRow);
        Self { seq, at, kind, raw: Some(body.into()) }
    }

    /// From the whole of it, as it is shown.
    pub fn read_whole(text: &str) -> Result<Self, serde_json::Error> {
        #[derive(Deserialize)]
        struct Head {
            seq: u64,
            at: DateTime<Utc>,
        }
        let Head { seq, at } = serde_json::from_str(text)?;
        let head = format!("{{\"seq\":{seq},\"at\":{},", serde_json::to_string(&at)?);
        match text.strip_prefix(&head) {
            Some(members) => Self::read(seq, at, &format!("{{{members}")),
            None => serde_json::from_str(text),
        }
    }

    /// Its body, as [`Self::read`] takes it.
    pub fn body(&self) -> Result<Cow<'_, str>, serde_json::Error> {
        match &self.raw {
            Some(raw) => Ok(Cow::Borrowed(raw)),
            None => serde_json::to_string(&self.kind).map(|whole| Cow::Owned(lean(whole))),
        }
    }

    /// Whether a newer release wrote it, with more than `kind` tells.
    pub fn is_of_newer_release(&self) -> bool {
        self.raw.is_some()
    }
}

impl Serialize for Event {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Some(raw) = &self.raw else {
            return Wire { seq: self.seq, at: self.at, kind: &self.kind }.serialize(serializer);
        };
        let at = serde_json::to_string(&self.at).map_err(serde::ser::Error::custom)?;
        let members = raw[1..].trim_start(); // What follows its brace: it is an object.
        let whole = format!("{{\"seq\":{},\"at\":{at},{members}", self.seq);
        RawValue::from_string(whole).map_err(serde::ser::Error::custom)?.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Event {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Wire { seq, at, kind } = Wire::<serde_json::Map<String, serde_json::Value>>::deserialize(deserializer)?;
        let body = serde_json::to_string(&kind).map_err(serde::de::Error::custom)?;
        Self::read(seq, at, &body).map_err(serde::de::Error::custom)
    }
}

/// What a person said who decided about a held output. The output itself, edited or not, is in the checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Decision {
    /// Who decided; absent where the daemon asks for no keys.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub by: Option<String>,
    /// Why, in the person's words.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub comment: Option<String>,
    /// True where the person edited the output.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub edited: bool,
}

impl Decision {
    /// None where there is nothing to tell.
    pub fn told(self) -> Option<Self> {
        Some(self).filter(|decision| *decision != Self::default())
    }

    fn text_bytes(&self) -> usize {
        self.by.as_ref().map_or(0, String::len) + self.comment.as_ref().map_or(0, String::len)
    }
}

/// What is known of an event of a newer release.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct UnknownEvent {
    /// Its type.
    #[serde(rename = "type")]
    pub name: Word,
    /// The stage that it is about, where it says so.
    #[serde(default, deserialize_with = "stage_if_any")]
    pub stage: Option<StageId>,
}

fn stage_if_any<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<StageId>, D::Error> {
    let value = serde_json::Value::deserialize(deserializer)?;
    Ok(value.as_str().and_then(|stage| StageId::new(stage).ok()))
}

/// Counts that are mostly nought, as JSON text has them. Who reads them takes what is missing for nought.
const NOUGHTS: [&str; 9] = [
    ",\"cache_read_tokens\":0",
    ",\"cache_write_tokens\":0",
    ",\"output_tokens\":0",
    ",\"reasoning_tokens\":0",
    ",\"estimated\":false",
    ",\"hits\":0",
    ",\"unpriced_calls\":0",
    ",\"unknown_calls\":0",
    ",\"unknown_usd\":0.0",
];

/// A document without its noughts: of an event or an attempt they are a third. The words cannot be part of a text,
/// where their quotes would be escaped.
pub fn lean(mut json: String) -> String {
    for nought in NOUGHTS {
        let mut from = 0;
        while let Some(at) = json[from..].find(nought).map(|at| from + at) {
            let end = at + nought.len();
            if matches!(json.as_bytes().get(end), Some(b',' | b'}')) {
                json.replace_range(at..end, "");
                from = at;
            } else {
                from = end;
            }
        }
    }
    json
}

/// What happened. `type` is the SSE event's name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type")]
pub enum EventKind {
    /// The run was accepted; it will reach a terminal state.
    #[serde(rename = "run.accepted")]
    RunAccepted {
        /// Its pipeline.
        pipeline: PipelineName,
        /// Its version.
        version: u32,
    },
    /// A replica began to execute it.
    #[serde(rename = "run.started")]
    RunStarted,
    /// Another replica, or the same after a restart, went on from the last checkpoint.
    #[serde(rename = "run.resumed")]
    RunResumed {
        /// Checkpoints that were found.
        checkpoints: u32,
    },
    /// Nothing can go on by itself now: a person or a time is awaited.
    #[serde(rename = "run.waiting")]
    RunWaiting {
        /// When it goes on by itself, where it does.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        until: Option<DateTime<Utc>>,
        /// What for, in a sentence.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        reason: Option<String>,
    },
    /// Somebody asked for another try of what failed.
    #[serde(rename = "run.retried")]
    RunRetried {
        /// The stages that start over.
        stages: Vec<StageId>,
    },
    /// The run reached a terminal state. The last event, unless it is retried.
    #[serde(rename = "run.finished")]
    RunFinished {
        /// Succeeded, failed, cancelled or expired.
        state: RunState,
        /// Why, where it did not succeed.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        failure: Option<Failure>,
        /// What it took.
        totals: Totals,
    },
    /// An attempt at a stage began.
    #[serde(rename = "stage.started")]
    StageStarted {
        /// The stage.
        stage: StageId,
        /// Counted from 1.
        attempt: u32,
    },
    /// An attempt ended and another follows.
    #[serde(rename = "stage.retrying")]
    StageRetrying {
        /// The stage.
        stage: StageId,
        /// The attempt that ended.
        attempt: u32,
        /// `retry` after a failed gate, `errored` after a failed call.
        verdict: Verdict,
        /// The quality that was reached.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        score: Option<f64>,
        /// Why, in a sentence.
        reason: String,
        /// When the next attempt starts.
        next_at: DateTime<Utc>,
        /// What the attempt took.
        totals: Totals,
    },
    /// The stage waits for a person.
    #[serde(rename = "stage.held")]
    StageHeld {
        /// The stage.
        stage: StageId,
        /// The attempt whose output is held.
        attempt: u32,
        /// The quality that was reached.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        score: Option<f64>,
        /// Why, in a sentence.
        reason: String,
        /// What the attempt took.
        totals: Totals,
    },
    /// The stage has its checkpoint.
    #[serde(rename = "stage.succeeded")]
    StageSucceeded {
        /// The stage.
        stage: StageId,
        /// The attempt that produced it.
        attempt: u32,
        /// `passed`, `accepted` (flagged) or `approved` (by a person).
        verdict: Verdict,
        /// The quality that was reached.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        score: Option<f64>,
        /// The model that answered.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        model: Option<ModelRef>,
        /// Where the answer came from.
        origin: Origin,
        /// From the attempt's start to its end.
        latency_ms: u64,
        /// What the attempt took.
        totals: Totals,
        /// Who approved it, and why, where a person did.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        decision: Option<Decision>,
    },
    /// The stage failed for good.
    #[serde(rename = "stage.failed")]
    StageFailed {
        /// The stage.
        stage: StageId,
        /// The last attempt.
        attempt: u32,
        /// The quality that was reached, where there was an output.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        score: Option<f64>,
        /// Why.
        failure: Failure,
        /// What the attempt took.
        totals: Totals,
        /// Who rejected it, and why, where a person did.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        decision: Option<Decision>,
    },
    /// Something of a newer release. [`Event`] carries it as it was written.
    #[serde(skip)]
    Unknown(UnknownEvent),
}

impl Event {
    /// What its texts take, in bytes: its size but for what every event has.
    pub fn text_bytes(&self) -> usize {
        if let Some(raw) = &self.raw {
            return raw.len();
        }
        let failure = |failure: &Failure| failure.message.len() + failure.detail.as_ref().map_or(0, String::len);
        match &self.kind {
            EventKind::RunWaiting { reason, .. } => reason.as_ref().map_or(0, String::len),
            EventKind::RunRetried { stages } => stages.iter().map(|stage| stage.as_str().len()).sum(),
            EventKind::RunFinished { failure: Some(cause), .. } => failure(cause),
            EventKind::StageFailed { failure: cause, decision, .. } => {
                failure(cause) + decision.as_ref().map_or(0, Decision::text_bytes)
            }
            EventKind::StageSucceeded { decision, .. } => decision.as_ref().map_or(0, Decision::text_bytes),
            EventKind::StageRetrying { reason, .. } | EventKind::StageHeld { reason, .. } => reason.len(),
            EventKind::Unknown(_)
            | EventKind::RunAccepted { .. }
            | EventKind::RunStarted
            | EventKind::RunResumed { .. }
            | EventKind::RunFinished { failure: None, .. }
            | EventKind::StageStarted { .. } => 0,
        }
    }
}

impl EventKind {
    /// The SSE event's name: `run.accepted`, `stage.succeeded` …
    pub fn name(&self) -> &'static str {
        match self {
            Self::RunAccepted { .. } => "run.accepted",
            Self::RunStarted => "run.started",
            Self::RunResumed { .. } => "run.resumed",
            Self::RunWaiting { .. } => "run.waiting",
            Self::RunRetried { .. } => "run.retried",
            Self::RunFinished { .. } => "run.finished",
            Self::StageStarted { .. } => "stage.started",
            Self::StageRetrying { .. } => "stage.retrying",
            Self::StageHeld { .. } => "stage.held",
            Self::StageSucceeded { .. } => "stage.succeeded",
            Self::StageFailed { .. } => "stage.failed",
            Self::Unknown(event) => event.name.as_str(),
        }
    }

    /// The stage that it is about, where it is about one.
    pub fn stage(&self) -> Option<&StageId> {
        match self {
            Self::StageStarted { stage, .. }
            | Self::StageRetrying { stage, .. }
            | Self::StageHeld { stage, .. }
            | Self::StageSucceeded { stage, .. }
            | Self::StageFailed { stage, .. } => Some(stage),
            Self::Unknown(event) => event.stage.as_ref(),
            _ => None,
        }
    }

    /// Whether the run reached a terminal state with it. So does one of that type that says more than is known.
    pub fn ends_run(&self) -> bool {
        self.name() == "run.finished"
    }
}
