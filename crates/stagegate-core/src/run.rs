//! What a run is made of: states, attempts, assessments, checkpoints, ledger rows. Owns these words and what is
//! stored of them; [`crate::decide`] owns how they change.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    Code, Json, ModelRef, StageId, Usage, Usd,
    word::{Rest, open_words},
};

open_words! {
    /// Where a run stands.
    pub enum RunState {
        /// Accepted; no replica has taken it yet.
        Queued = "queued",
        /// A replica executes it.
        Running = "running",
        /// Parked: it waits for a person or for a time, and uses no replica.
        Waiting = "waiting",
        /// Every stage has its checkpoint.
        Succeeded = "succeeded",
        /// A stage failed for good.
        Failed = "failed",
        /// Somebody cancelled it.
        Cancelled = "cancelled",
        /// Its deadline passed.
        Expired = "expired",
    }
}

impl RunState {
    /// Whether nothing more will happen to it by itself.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled | Self::Expired)
    }
}

open_words! {
    /// Where a stage stands.
    pub enum StageState {
        /// Its needs are not met yet, or the run ended before it could start.
        Pending = "pending",
        /// An attempt is under way.
        Running = "running",
        /// It waits for its next attempt.
        Waiting = "waiting",
        /// It waits for a person.
        Held = "held",
        /// It has its checkpoint.
        Succeeded = "succeeded",
        /// No attempt is left.
        Failed = "failed",
        /// Stopped with its run.
        Cancelled = "cancelled",
    }
}

#[expect(clippy::derivable_impls, reason = "the macro that makes the enum marks no default")]
impl Default for StageState {
    fn default() -> Self {
        Self::Pending
    }
}

/// Why a run or an attempt failed: a code and a sentence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Failure {
    /// The stable code.
    pub code: Code,
    /// What happened. It never quotes: it is made of names, numbers, positions, counts and codes.
    pub message: String,
    /// The same with everything that it is about, which may quote inputs, outputs and providers. Only an attempt's
    /// failure has it, and it is removed with the payloads.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub detail: Option<String>,
    /// The stage, where it was one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub stage: Option<StageId>,
    /// Of an outage that is waited out: the models that met it.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub models: Vec<ModelRef>,
    /// What a newer release wrote beside that.
    #[serde(flatten)]
    #[schema(ignore)]
    pub rest: Rest,
}

impl Failure {
    /// A failure that quotes nothing.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), detail: None, stage: None, models: Vec::new(), rest: Rest::default() }
    }

    /// The same, of a stage.
    #[must_use]
    pub fn of_stage(self, stage: StageId) -> Self {
        Self { stage: Some(stage), ..self }
    }

    /// The part that events, logs and records may show. Fields of a newer release are left out: this release cannot tell
    /// whether they quote.
    #[must_use]
    pub fn public(&self) -> Self {
        Self { stage: self.stage.clone(), ..Self::new(self.code, self.message.clone()) }
    }
}

open_words! {
    /// Where an answer came from.
    pub enum Origin {
        /// Bought from a provider.
        Provider = "provider",
        /// From the cache in this process.
        CacheLocal = "cache_local",
        /// From the shared cache (Redis, or the SQLite file).
        CacheShared = "cache_shared",
        /// From an identical call that was under way.
        Coalesced = "coalesced",
        /// No model was involved.
        None = "none",
    }
}

impl Origin {
    /// Whether nothing was paid.
    pub fn is_hit(self) -> bool {
        matches!(self, Self::CacheLocal | Self::CacheShared | Self::Coalesced)
    }
}

open_words! {
    /// Who measured an output.
    pub enum Evaluator {
        /// A deterministic check.
        Check = "check",
        /// An LLM.
        Judge = "judge",
    }
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
    /// On the evaluator's scale: a deterministic check gives 0 or 1, a judge a score of its own scale, which is from 0 to 1
    /// unless `scale` says otherwise.
    pub score: f64,
    /// The lowest score that passes, on the same scale.
    pub threshold: f64,
    /// What was found. It never quotes: it is made of names, numbers, positions and counts.
    pub reason: String,
    /// The same with everything that the next attempt needs to mend it, which may quote the output. It is removed with the payloads.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub detail: Option<String>,
    /// The model that judged.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub model: Option<ModelRef>,
    /// A judge's scale, where it is not from 0 to 1: `1..5` or `pass_fail`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub scale: Option<String>,
    /// Why the judge gave no verdict, where it failed at its own task. The score says nothing then.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub judge_failure: Option<Code>,
    /// What a newer release wrote beside that.
    #[serde(flatten)]
    #[schema(ignore)]
    pub rest: Rest,
}

impl Assessment {
    /// The score as a part of the way from the lowest to the highest of its scale: in [0, 1].
    pub fn quality(&self) -> f64 {
        let quality = match self.scale.as_deref() {
            Some("1..5") => (self.score - 1.0) / 4.0,
            _ => self.score,
        };
        quality.clamp(0.0, 1.0)
    }
}

open_words! {
    /// What the gate decided about an attempt.
    pub enum Verdict {
        /// Every assessment passed.
        Passed = "passed",
        /// It failed; another attempt follows, with the critique.
        Retry = "retry",
        /// It failed; a person decides.
        Held = "held",
        /// It failed; taken all the same, flagged.
        Accepted = "accepted",
        /// It failed for good.
        Failed = "failed",
        /// A person approved it.
        Approved = "approved",
        /// A person rejected it.
        Rejected = "rejected",
        /// There was no output to judge: the call failed.
        Errored = "errored",
    }
}

open_words! {
    /// What a model call was for.
    pub enum CallPurpose {
        /// The stage's own answer.
        Stage = "stage",
        /// Judging it.
        Judge = "judge",
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
    /// What a newer release wrote beside that.
    #[serde(flatten)]
    #[schema(ignore)]
    pub rest: Rest,
}

impl LedgerEntry {
    /// Whether a former owner of the run may have made this call, but no record shows it. Like a call that was sent and not
    /// answered its outcome is unknown, but a sent call has a latency of at least a millisecond.
    pub fn is_presumed(&self) -> bool {
        self.unknown && self.latency_ms == 0
    }
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
    /// What a newer release wrote beside that.
    #[serde(flatten)]
    #[schema(ignore)]
    pub rest: Rest,
}

impl Attempt {
    /// Removes what may quote payloads: they are purged. A newer release that writes a new member which may quote writes it
    /// only while every replica can purge it.
    pub fn purge(&mut self) {
        self.output = None;
        self.assessments.iter_mut().for_each(|assessment| assessment.detail = None);
        self.failure.iter_mut().for_each(|failure| failure.detail = None);
    }

    /// The lowest score of its assessments, in [0, 1]: the quality that was reached. None without assessments, and where
    /// the judge failed.
    pub fn score(&self) -> Option<f64> {
        if self.assessments.iter().any(|assessment| assessment.judge_failure.is_some()) {
            return None;
        }
        self.assessments.iter().map(Assessment::quality).min_by(f64::total_cmp)
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
