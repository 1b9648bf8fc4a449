//! What is shown: owns the shapes of answers. They follow the core's words; durations are in milliseconds, money in US
//! dollars, times in RFC 3339.

use crate::base::BasePath;
use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;
use stagegate_core::{
    Attempt, Checkpoint, Code, Decision, Event, EventKind, Failure, Json, ModelRef, Origin, Pipeline, PipelineName,
    RunId, RunState, StageId, StageState, TenantId, Totals, Verdict,
    pipeline::{CacheMode, Labels},
    store::{PipelineVersion, RunRecord, StageRecord, Waiting},
};
use utoipa::{
    ToSchema,
    openapi::schema::{Object, ObjectBuilder, Schema, SchemaType, Type},
};

/// One page of a list.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Page<T> {
    /// The items.
    pub(crate) items: Vec<T>,
    /// Give it back as `cursor` for the next page; null on the last one.
    pub(crate) next_cursor: Option<String>,
}

impl<T> Page<T> {
    /// From one item more than fits: its presence tells that there is another page.
    pub(crate) fn new(mut items: Vec<T>, limit: u32, cursor_after: impl FnOnce(&T) -> String) -> Self {
        let more = items.len() > limit as usize;
        items.truncate(limit as usize);
        let next_cursor = if more { items.last().map(cursor_after) } else { None };
        Self { items, next_cursor }
    }
}

/// A pipeline's version, without its definition.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct PipelineSummary {
    /// Its name.
    pub(crate) name: PipelineName,
    /// Counted from 1 per name.
    #[schema(minimum = 1)]
    pub(crate) version: u32,
    /// What it is for.
    description: Option<String>,
    /// BLAKE3 of the canonical definition, hex. A version that brings an older content back has a digest of its own.
    digest: String,
    /// When it was registered.
    created_at: DateTime<Utc>,
    /// The ids of its stages.
    stages: Vec<StageId>,
    /// That it is registered and cannot be read, and which column it is (SG0505).
    #[serde(skip_serializing_if = "Option::is_none")]
    failure: Option<Failure>,
    /// Where to go from here.
    links: PipelineLinks,
}

/// A pipeline's version.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct PipelineView {
    /// Its name.
    name: PipelineName,
    /// Counted from 1 per name.
    #[schema(minimum = 1)]
    version: u32,
    /// BLAKE3 of the canonical definition, hex. A version that brings an older content back has a digest of its own.
    digest: String,
    /// When it was registered.
    created_at: DateTime<Utc>,
    /// The definition, as canonical JSON.
    definition: Value,
    /// Where to go from here.
    links: PipelineLinks,
}

/// Where to go from a pipeline.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct PipelineLinks {
    /// This version, which never changes.
    #[serde(rename = "self")]
    own: String,
    /// The newest version.
    pipeline: String,
    /// Every version.
    versions: String,
    /// Its runs.
    runs: String,
}

impl PipelineLinks {
    fn new(name: &PipelineName, version: u32, base: &BasePath) -> Self {
        let pipeline = base.to(&format!("/v1/pipelines/{name}"));
        Self {
            own: pipeline_version_path(base, name, version),
            versions: format!("{pipeline}/versions"),
            runs: base.to(&format!("/v1/runs?pipeline={name}")),
            pipeline,
        }
    }
}

/// Where a version is read.
pub(crate) fn pipeline_version_path(base: &BasePath, name: &PipelineName, version: u32) -> String {
    base.to(&format!("/v1/pipelines/{name}/versions/{version}"))
}

impl PipelineSummary {
    /// A version without its definition.
    pub(crate) fn new(version: PipelineVersion, base: &BasePath) -> Self {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let ids = version.definition.get("stages").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let ids = ids.iter().filter_map(|stage| stage.get("id").and_then(Value::as_str));
        Self {
            links: PipelineLinks::new(&version.name, version.version, base),
            description: version.definition.get("description").and_then(text),
            stages: ids.filter_map(|id| StageId::new(id).ok()).collect(),
            name: version.name,
            version: version.version,
            digest: version.digest,
            created_at: version.created_at,
            failure: version.failure,
        }
    }
}

impl PipelineView {
    /// A version.
    pub(crate) fn new(version: PipelineVersion, base: &BasePath) -> Self {
        Self {
            links: PipelineLinks::new(&version.name, version.version, base),
            name: version.name,
            version: version.version,
            digest: version.digest,
            created_at: version.created_at,
            definition: version.definition,
        }
    }
}

/// At most 32 labels of a short name and a short text each.
pub(crate) fn labels_schema() -> Object {
    let text = |pattern: &str| ObjectBuilder::new().schema_type(SchemaType::Type(Type::String)).pattern(Some(pattern));
    ObjectBuilder::new()
        .schema_type(SchemaType::Type(Type::Object))
        .property_names(Some(text("^[A-Za-z0-9_.-]{1,63}$").build()))
        .additional_properties(Some(Schema::Object(text("^[^\\u0000-\\u001f\\u007f]*$").max_length(Some(128)).build())))
        .max_properties(Some(32))
        .description(Some("Up to 32 labels: names of 1 to 63 of `A-Z a-z 0-9 _ . -`, values of up to 128 characters."))
        .build()
}

/// A run, without its payloads and stages.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct RunView {
    /// Its id.
    pub(crate) id: RunId,
    /// Whose.
    tenant: TenantId,
    /// The pipeline.
    pipeline: PipelineName,
    /// The version that it is pinned to.
    #[schema(minimum = 1)]
    version: u32,
    /// Where it stands.
    state: RunState,
    /// True once somebody asked to cancel it.
    cancel_requested: bool,
    /// Higher goes first.
    priority: i16,
    /// For filters and people.
    #[schema(schema_with = labels_schema)]
    labels: Labels,
    /// Overrides the stages' cache mode.
    cache_mode: Option<CacheMode>,
    /// How many stages it has.
    stages_total: u32,
    /// How many have their checkpoint.
    stages_done: u32,
    /// What it took so far.
    totals: Totals,
    /// Why it did not succeed.
    failure: Option<Failure>,
    /// The correlation id of the request that submitted it.
    request_id: Option<String>,
    /// When it was accepted.
    created_at: DateTime<Utc>,
    /// Before that it does not start; null for at once.
    start_at: Option<DateTime<Utc>>,
    /// When a replica first took it.
    started_at: Option<DateTime<Utc>>,
    /// When it reached a terminal state.
    finished_at: Option<DateTime<Utc>>,
    /// When its input and outputs were removed, as retention has it.
    purged_at: Option<DateTime<Utc>>,
    /// When it expires.
    deadline_at: DateTime<Utc>,
    /// From its acceptance to its end, or until now.
    duration_ms: u64,
    /// The `seq` of its last event.
    last_seq: u64,
    /// Where to go from here.
    links: RunLinks,
}

/// Where to go from a run.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct RunLinks {
    /// The run with its stages, input and output.
    #[serde(rename = "self")]
    own: String,
    /// Its events, as a stream or as JSON.
    events: String,
    /// POST here to stop it.
    cancel: String,
    /// POST here to start over what failed.
    retry: String,
    /// The pipeline's version.
    pipeline: String,
}

/// Where a run is read.
pub(crate) fn run_path(base: &BasePath, id: RunId) -> String {
    base.to(&format!("/v1/runs/{id}"))
}

impl RunView {
    /// A run as it stands at `now`.
    pub(crate) fn new(run: RunRecord, now: DateTime<Utc>, base: &BasePath) -> Self {
        let own = run_path(base, run.id);
        Self {
            links: RunLinks {
                events: format!("{own}/events"),
                cancel: format!("{own}/cancel"),
                retry: format!("{own}/retry"),
                pipeline: pipeline_version_path(base, &run.pipeline, run.version),
                own,
            },
            duration_ms: millis_between(run.created_at, run.finished_at.unwrap_or(now)),
            id: run.id,
            tenant: run.tenant,
            pipeline: run.pipeline,
            version: run.version,
            state: run.state,
            cancel_requested: run.cancel_requested,
            priority: run.priority,
            labels: run.labels,
            cache_mode: run.cache_mode,
            stages_total: run.stages_total,
            stages_done: run.stages_done,
            totals: run.totals,
            failure: run.failure,
            request_id: run.request_id,
            created_at: run.created_at,
            start_at: run.start_at,
            started_at: run.started_at,
            finished_at: run.finished_at,
            purged_at: run.purged_at,
            deadline_at: run.deadline_at,
            last_seq: run.last_seq,
        }
    }
}

fn millis_between(from: DateTime<Utc>, to: DateTime<Utc>) -> u64 {
    u64::try_from((to - from).num_milliseconds()).unwrap_or(0)
}

/// A run with its payloads and stages.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct RunDetailView {
    /// The run.
    #[serde(flatten)]
    pub(crate) run: RunView,
    /// What it waits for, where it does.
    pub(crate) waiting: Option<Waiting>,
    /// The stages in topological order, those that have not begun included.
    pub(crate) stages: Vec<StageView>,
    /// The input.
    #[schema(value_type = Value)]
    pub(crate) input: Json,
    /// The output; null until the run succeeded.
    #[schema(value_type = Value)]
    pub(crate) output: Json,
}

/// A stage of a run, without its payloads.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct StageView {
    /// The stage.
    id: StageId,
    /// The stages that it needs.
    needs: Vec<StageId>,
    /// Where it stands.
    state: StageState,
    /// The attempt that is under way, or the last one; 0 before the first.
    attempt: u32,
    /// When the next attempt starts, while it waits.
    not_before: Option<DateTime<Utc>>,
    /// What the gate decided last.
    verdict: Option<Verdict>,
    /// The quality that was reached last, in [0, 1].
    score: Option<f64>,
    /// The model that answered last.
    model: Option<ModelRef>,
    /// Where that answer came from.
    origin: Option<Origin>,
    /// What it took so far, over all attempts.
    totals: Totals,
    /// What it waits for, where it does.
    waiting: Option<Waiting>,
    /// Why it failed.
    failure: Option<Failure>,
    /// When its first attempt started.
    started_at: Option<DateTime<Utc>>,
    /// When it got its checkpoint or failed.
    finished_at: Option<DateTime<Utc>>,
    /// From its first attempt to its end, or until now; null before it began.
    duration_ms: Option<u64>,
    /// Where to go from here.
    links: StageLinks,
}

/// Where to go from a stage.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct StageLinks {
    /// The stage with its attempts and its checkpoint.
    #[serde(rename = "self")]
    own: String,
    /// POST here to take a held output.
    approve: String,
    /// POST here not to take it.
    reject: String,
}

impl StageView {
    /// A stage as it stands at `now`.
    pub(crate) fn new(
        run: RunId,
        stage: StageRecord,
        needs: Vec<StageId>,
        now: DateTime<Utc>,
        base: &BasePath,
    ) -> Self {
        let own = format!("{}/stages/{}", run_path(base, run), stage.id);
        let duration = |from| millis_between(from, stage.finished_at.unwrap_or(now));
        Self {
            links: StageLinks { approve: format!("{own}/approve"), reject: format!("{own}/reject"), own },
            duration_ms: stage.started_at.map(duration),
            waiting: stage.waiting(),
            needs,
            id: stage.id,
            state: stage.state,
            attempt: stage.attempt,
            not_before: stage.not_before,
            verdict: stage.verdict,
            score: stage.score,
            model: stage.model,
            origin: stage.origin,
            totals: stage.totals,
            // Of a stage that goes on, it is what it waits out, which `waiting` tells.
            failure: stage.failure.filter(|_| !matches!(stage.state, StageState::Running | StageState::Waiting)),
            started_at: stage.started_at,
            finished_at: stage.finished_at,
        }
    }
}

/// A stage with everything that is kept of it.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct StageDetailView {
    /// The stage.
    #[serde(flatten)]
    pub(crate) stage: StageView,
    /// Its committed result; null until it has one.
    pub(crate) checkpoint: Option<Checkpoint>,
    /// Its newest attempts that ended, at most 200, in order; each with its assessments and its model calls.
    pub(crate) attempts: Vec<Attempt>,
    /// How many attempts have ended.
    pub(crate) attempts_total: u32,
    /// What people decided about held outputs of the stage, in order.
    pub(crate) decisions: Vec<DecisionView>,
}

/// What a person decided about a held output.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct DecisionView {
    /// The attempt whose output was held.
    attempt: u32,
    /// `approved` or `rejected`.
    verdict: Verdict,
    /// Who decided: the key; null on an open daemon.
    by: Option<String>,
    /// Why, in the person's words.
    comment: Option<String>,
    /// Whether the person edited the output; the held one is with its attempt.
    edited: bool,
    /// When it took effect.
    at: DateTime<Utc>,
}

impl DecisionView {
    /// The decision that an event tells of, if it tells of one.
    pub(crate) fn of_event(event: &Event) -> Option<Self> {
        let (attempt, verdict, decision) = match &event.kind {
            EventKind::StageSucceeded { attempt, verdict: Verdict::Approved, decision, .. } => {
                (*attempt, Verdict::Approved, decision)
            }
            EventKind::StageFailed { attempt, failure, decision, .. } if failure.code == Code::Rejected => {
                (*attempt, Verdict::Rejected, decision)
            }
            _ => return None,
        };
        let Decision { by, comment, edited } = decision.clone().unwrap_or_default();
        Some(Self { attempt, verdict, by, comment, edited, at: event.at })
    }
}

/// The ids of the stages that a stage needs.
pub(crate) fn needs_of(pipeline: &Pipeline, index: usize) -> Vec<StageId> {
    pipeline.stages[index].needs.iter().map(|need| pipeline.stages[*need].id.clone()).collect()
}
