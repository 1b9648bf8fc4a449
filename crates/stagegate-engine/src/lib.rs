//! The engine: owns runs from their acceptance to their end. It is the only caller of the model layer and the only
//! writer of a run's progress; it knows nothing of HTTP.

pub mod config;

use std::{sync::Arc, time::Duration};

use chrono::{DateTime, Utc};
use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use stagegate_core::{
    Clock, Code, Error, Event, ModelRef, Pipeline, PipelineName, ReplicaId, RunId, StageId, Store, TenantId, Usd,
    Violation,
    pipeline::{CacheMode, Labels},
    store::{Idempotency, PipelineVersion, RunRecord},
};
use stagegate_llm::Llm;
use stagegate_telemetry::Metrics;
use utoipa::ToSchema;

/// A running engine. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Engine {}

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
    pub input: Value,
    /// Overrides the stages' cache mode.
    pub cache_mode: Option<CacheMode>,
    /// Higher goes first; 0 is usual.
    pub priority: i16,
    /// For filters and people.
    pub labels: Labels,
    /// The client's key, and the digest of the request that it stands for.
    pub idempotency: Option<Idempotency>,
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
    /// Take a held output.
    Approve(StageId),
    /// Do not take a held output.
    Reject(StageId, String),
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

impl Engine {
    /// Starts: enters this replica, and begins to claim and to execute. Must be called inside a tokio runtime.
    pub async fn start(
        _config: config::EngineConfig,
        _store: Arc<dyn Store>,
        _llm: Arc<Llm>,
        _metrics: Metrics,
        _clock: Arc<dyn Clock>,
    ) -> Result<Self, Error> {
        unimplemented!()
    }

    /// Registers a definition (YAML or JSON text). The flag tells whether the version is new.
    pub async fn register(&self, _tenant: &TenantId, _source: &str) -> Result<(PipelineVersion, bool), Error> {
        unimplemented!()
    }

    /// Every mistake of a definition, models included; the pipeline where there is none.
    pub fn validate(&self, _source: &str) -> Result<Pipeline, Vec<Violation>> {
        unimplemented!()
    }

    /// Accepts a run. The flag tells whether it is new, or the one that the idempotency key stands for.
    pub async fn submit(&self, _submit: Submit) -> Result<(RunRecord, bool), Error> {
        unimplemented!()
    }

    /// What a run would cost. Calls no model and changes nothing. With a source, of that definition instead of a
    /// registered one.
    pub async fn plan(
        &self,
        _tenant: &TenantId,
        _pipeline: Arc<Pipeline>,
        _version: u32,
        _input: &Value,
    ) -> Result<Plan, Error> {
        unimplemented!()
    }

    /// A registered version, compiled. None for the newest.
    pub async fn pipeline(
        &self,
        _tenant: &TenantId,
        _name: &PipelineName,
        _version: Option<u32>,
    ) -> Result<(Arc<Pipeline>, u32), Error> {
        unimplemented!()
    }

    /// Asks something of a run. It is durable when this returns; the owner obeys within a heartbeat.
    pub async fn act(
        &self,
        _tenant: &TenantId,
        _run: RunId,
        _action: Action,
        _by: Option<String>,
    ) -> Result<RunRecord, Error> {
        unimplemented!()
    }

    /// The events of a run after a seq, as they come, in order and gap-free; ends after `run.finished`. The run must
    /// exist; yields at least one batch or nothing.
    pub fn follow(&self, _tenant: TenantId, _run: RunId, _after: u64) -> BoxStream<'static, Result<Vec<Event>, Error>> {
        unimplemented!()
    }

    /// The store, for reads.
    pub fn store(&self) -> &Arc<dyn Store> {
        unimplemented!()
    }

    /// The model layer, for cache operations and health.
    pub fn llm(&self) -> &Arc<Llm> {
        unimplemented!()
    }

    /// This life of this replica.
    pub fn replica(&self) -> ReplicaId {
        unimplemented!()
    }

    /// True once it is shutting down: `/readyz` says so, submits are refused.
    pub fn is_draining(&self) -> bool {
        unimplemented!()
    }

    /// Takes nothing new, gives what is under way `grace`, hands the rest back, leaves. Idempotent.
    pub async fn drain(&self, _grace: Duration) {
        unimplemented!()
    }
}

#[expect(dead_code, reason = "the skeleton names what the parts will need")]
type Parts = (Arc<dyn Clock>, Metrics, DateTime<Utc>, Code);
