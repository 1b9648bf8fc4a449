//! The words of the engine's API: what is asked of it and what it answers.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use stagegate_core::{
    Json, ModelRef, PipelineName, StageId, TenantId, Usd,
    pipeline::{CacheMode, Labels},
    store::Idempotency,
};
use utoipa::ToSchema;

/// A run to be submitted.
#[derive(Debug, Clone)]
pub struct Submit {
    /// Whose.
    pub tenant: TenantId,
    /// The pipeline.
    pub pipeline: PipelineName,
    /// None for the newest version.
    pub version: Option<u32>,
    /// The input; refused with every violation where it does not fit.
    pub input: Json,
    /// Overrides the stages' cache mode.
    pub cache_mode: Option<CacheMode>,
    /// Higher goes first; 0 is usual.
    pub priority: i16,
    /// For filters and people.
    pub labels: Labels,
    /// The client's key, and the digest of the request that it stands for.
    pub idempotency: Option<Idempotency>,
    /// Before that it does not start; None for at once.
    pub start_at: Option<DateTime<Utc>>,
    /// The correlation id.
    pub request_id: Option<String>,
}

/// What a person asks of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Stop it.
    Cancel,
    /// Start over what failed.
    Retry,
    /// Take a held output as it is.
    Approve(StageId),
    /// Take a held output, with more to say.
    ApproveWith(Box<Approval>),
    /// Do not take a held output.
    Reject(StageId, String),
}

/// What a person says who approves a held output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Approval {
    /// The held stage.
    pub stage: StageId,
    /// Why, in the person's words.
    pub comment: Option<String>,
    /// The output as the person edited it; None takes the held one. It is held to what every output of the stage is held
    /// to: its format, its schema, the gate's deterministic checks.
    pub output: Option<Json>,
}

/// What a run would cost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Plan {
    /// The pipeline.
    pub pipeline: PipelineName,
    /// Each stage, in topological order.
    pub stages: Vec<PlannedStage>,
    /// What would probably be paid; hits cost nothing. Leaves out unpriced stages.
    pub cost_usd: Usd,
    /// What hits would save.
    pub saved_usd: Usd,
    /// The most that one pass could cost: every stage that is bought answers as long as it may. Retries come on top.
    pub worst_case_usd: Usd,
    /// The pipeline's budget. A call whose worst case no longer fits is not made.
    pub budget_usd: Option<Usd>,
    /// Tokens that would probably be bought.
    pub tokens: u64,
    /// The longest chain of stages that would be bought: it sets the run's time.
    pub critical_path: Vec<StageId>,
}

/// What a stage would cost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PlannedStage {
    /// The stage.
    pub id: StageId,
    /// The stages that it needs.
    pub needs: Vec<StageId>,
    /// The first model of its chain; none for a transform.
    pub model: Option<ModelRef>,
    /// `hit` (the cache has it), `buy` (it would be bought), or `free` (no model is called).
    pub outcome: PlannedOutcome,
    /// Estimated prompt tokens.
    pub input_tokens: u64,
    /// Estimated answer tokens.
    pub output_tokens: u64,
    /// What would probably be paid; null where the model has no price.
    pub cost_usd: Option<Usd>,
    /// What a hit would save.
    pub saved_usd: Usd,
    /// The most that one attempt could cost.
    pub worst_case_usd: Usd,
}

/// What would happen to a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PlannedOutcome {
    /// The cache has its answer.
    Hit,
    /// It would be bought.
    Buy,
    /// No model is called.
    Free,
}
