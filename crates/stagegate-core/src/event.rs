//! Events: the thin, ordered, replayable record of what happened to a run. Owns their names and fields; they carry
//! no prompts and no outputs.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Failure, ModelRef, Origin, PipelineName, RunState, StageId, Totals, Verdict};

/// One event of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Gap-free per run, from 1.
    pub seq: u64,
    /// When it was decided.
    pub at: DateTime<Utc>,
    /// What happened.
    #[serde(flatten)]
    pub kind: EventKind,
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
    },
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
            _ => None,
        }
    }
}
