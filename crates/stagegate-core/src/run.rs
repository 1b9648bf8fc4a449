//! What a run is made of: states, attempts, assessments, checkpoints, ledger rows. Owns these words and what is
//! stored of them; [`crate::decide`] owns how they change.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Code, Json, ModelRef, StageId, Usage, Usd};

/// Where a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum RunState {
    /// Accepted; no replica has taken it yet.
    Queued,
    /// A replica executes it.
    Running,
    /// Parked: it waits for a person or for a time, and uses no replica.
    Waiting,
    /// Every stage has its checkpoint.
    Succeeded,
    /// A stage failed for good.
    Failed,
    /// Somebody cancelled it.
    Cancelled,
    /// Its deadline passed.
    Expired,
}

impl RunState {
    /// Every state, in the order of a run's life.
    pub const ALL: [Self; 7] =
        [Self::Queued, Self::Running, Self::Waiting, Self::Succeeded, Self::Failed, Self::Cancelled, Self::Expired];

    /// Whether nothing more will happen to it by itself.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled | Self::Expired)
    }

    /// As stored and shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Waiting => "waiting",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
        }
    }

    /// From its stored form.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == text)
    }
}

/// Where a stage stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum StageState {
    /// Its needs are not met yet, or the run ended before it could start.
    #[default]
    Pending,
    /// An attempt is under way.
    Running,
    /// It waits for its next attempt.
    Waiting,
    /// It waits for a person.
    Held,
    /// It has its checkpoint.
    Succeeded,
    /// No attempt is left.
    Failed,
    /// Stopped with its run.
    Cancelled,
}

impl StageState {
    /// Every state.
    pub const ALL: [Self; 7] =
        [Self::Pending, Self::Running, Self::Waiting, Self::Held, Self::Succeeded, Self::Failed, Self::Cancelled];

    /// As stored and shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Waiting => "waiting",
            Self::Held => "held",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// From its stored form.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == text)
    }
}

/// Why a run or an attempt failed: a code and a sentence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Failure {
    /// The stable code.
    pub code: Code,
    /// What happened.
    pub message: String,
    /// The stage, where it was one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub stage: Option<StageId>,
}

/// Where an answer came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// Bought from a provider.
    Provider,
    /// From the cache in this process.
    CacheLocal,
    /// From the shared cache (Redis, or the SQLite file).
    CacheShared,
    /// From an identical call that was under way.
    Coalesced,
    /// No model was involved.
    None,
}

impl Origin {
    /// As stored and shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Provider => "provider",
            Self::CacheLocal => "cache_local",
            Self::CacheShared => "cache_shared",
            Self::Coalesced => "coalesced",
            Self::None => "none",
        }
    }

    /// From its stored form.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Provider, Self::CacheLocal, Self::CacheShared, Self::Coalesced, Self::None]
            .into_iter()
            .find(|origin| origin.as_str() == text)
    }

    /// Whether nothing was paid.
    pub fn is_hit(self) -> bool {
        matches!(self, Self::CacheLocal | Self::CacheShared | Self::Coalesced)
    }
}

/// Who measured an output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Evaluator {
    /// A deterministic check.
    Check,
    /// An LLM.
    Judge,
}

/// A measured judgement of an output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Assessment {
    /// Who measured.
    pub evaluator: Evaluator,
    /// What was measured: `min_chars`, `schema`, `judge` …
    pub name: String,
    /// The version of the evaluator: of the check's rules or of the judge's prompt.
    pub version: u32,
    /// Whether it passed.
    pub passed: bool,
    /// In [0, 1]; a deterministic check gives 0 or 1.
    pub score: f64,
    /// The lowest score that passes.
    pub threshold: f64,
    /// What was found, so that the next attempt can mend it.
    pub reason: String,
    /// The model that judged.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub model: Option<ModelRef>,
}

/// What the gate decided about an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Every assessment passed.
    Passed,
    /// It failed; another attempt follows, with the critique.
    Retry,
    /// It failed; a person decides.
    Held,
    /// It failed; taken all the same, flagged.
    Accepted,
    /// It failed for good.
    Failed,
    /// A person approved it.
    Approved,
    /// A person rejected it.
    Rejected,
    /// There was no output to judge: the call failed.
    Errored,
}

impl Verdict {
    /// As stored, shown and counted.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Retry => "retry",
            Self::Held => "held",
            Self::Accepted => "accepted",
            Self::Failed => "failed",
            Self::Approved => "approved",
            Self::Rejected => "rejected",
            Self::Errored => "errored",
        }
    }
}

/// What a model call was for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum CallPurpose {
    /// The stage's own answer.
    Stage,
    /// Judging it.
    Judge,
}

impl CallPurpose {
    /// As stored, shown and counted.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stage => "stage",
            Self::Judge => "judge",
        }
    }
}

/// One model call: a row of the ledger.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LedgerEntry {
    /// What it was for.
    pub purpose: CallPurpose,
    /// The model that answered, or that failed.
    pub model: ModelRef,
    /// Where the answer came from.
    pub origin: Origin,
    /// The tokens: of this call, or on a hit those of the original one.
    pub usage: Usage,
    /// What was paid; of a call whose outcome is unknown, the most that it can have cost. Zero on a hit.
    pub cost_usd: Usd,
    /// What a hit saved.
    pub saved_usd: Usd,
    /// True where nobody heard what came of the call (it was abandoned, or its connection broke): the provider may have
    /// charged for it, at most `cost_usd`.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub unknown: bool,
    /// False where the price table does not know the model: then the cost is unknown, not zero.
    pub priced: bool,
    /// From sending to having it whole.
    pub latency_ms: u64,
    /// Why it failed, where it did.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<Code>,
}

/// One try at a stage: a model call plus its assessments.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Attempt {
    /// Counted from 1, over the whole life of the run.
    pub number: u32,
    /// When it started.
    pub started_at: DateTime<Utc>,
    /// When it ended.
    pub finished_at: DateTime<Utc>,
    /// What the gate decided.
    pub verdict: Verdict,
    /// What was measured.
    pub assessments: Vec<Assessment>,
    /// Its model calls, in order.
    pub calls: Vec<LedgerEntry>,
    /// The output, where there was one that did not become the checkpoint.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schema(value_type = Option<Value>)]
    pub output: Option<Json>,
    /// Why it failed, where it did.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub failure: Option<Failure>,
}

impl Attempt {
    /// The lowest score of its assessments: the quality that was reached. None without assessments.
    pub fn score(&self) -> Option<f64> {
        self.assessments.iter().map(|a| a.score).min_by(f64::total_cmp)
    }
}

/// The committed result of a stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Checkpoint {
    /// The output: a string, or JSON where the stage says so.
    #[schema(value_type = Value)]
    pub output: Json,
    /// BLAKE3 of the output's canonical JSON, hex.
    pub digest: String,
    /// The attempt that produced it.
    pub attempt: u32,
    /// Passed, accepted or approved.
    pub verdict: Verdict,
    /// The quality that was reached.
    pub score: Option<f64>,
    /// The model that answered.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub model: Option<ModelRef>,
    /// Where the answer came from.
    pub origin: Origin,
    /// When it was committed.
    pub created_at: DateTime<Utc>,
}

/// Sums over the model calls of a stage or a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Totals {
    /// Tokens that were bought, as far as they are known.
    pub usage: Usage,
    /// What was paid, calls of unknown outcome at the most that they can have cost.
    pub cost_usd: Usd,
    /// What hits saved.
    pub saved_usd: Usd,
    /// Calls that a provider answered.
    pub calls: u32,
    /// Calls that the cache answered.
    pub hits: u32,
    /// Calls whose cost is unknown because the model has no price.
    pub unpriced_calls: u32,
    /// Calls of unknown outcome: they were made, and nobody heard what came of them.
    pub unknown_calls: u32,
    /// What those can have cost at most; a part of `cost_usd`, not beside it.
    pub unknown_usd: Usd,
}

impl Totals {
    /// Adds one call. A hit's usage was bought before, so that only what it saved counts.
    pub fn add(&mut self, call: &LedgerEntry) {
        self.cost_usd += call.cost_usd;
        self.saved_usd += call.saved_usd;
        if call.origin.is_hit() {
            self.hits = self.hits.saturating_add(1);
        } else {
            self.usage += call.usage;
            self.calls = self.calls.saturating_add(1);
            self.unpriced_calls = self.unpriced_calls.saturating_add(u32::from(!call.priced));
        }
        if call.unknown {
            self.unknown_calls = self.unknown_calls.saturating_add(1);
            self.unknown_usd += call.cost_usd;
        }
    }
}
