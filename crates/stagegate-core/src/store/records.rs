//! What a store answers when it is read: runs, stages, queues, replicas, as they stand. Owns these words; changes nothing.

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::{
    Attempt, Checkpoint, Code, Failure, Json, KeyId, ModelRef, Origin, PipelineName, ReplicaId, RunId, RunState,
    StageId, StageState, StoreError, TenantId, Totals, Verdict,
    access::{ApiKey, Role},
    pipeline::{CacheMode, Labels},
    store::PipelineVersion,
};

/// A run without its payloads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RunRecord {
    /// Its id.
    pub id: RunId,
    /// Whose.
    pub tenant: TenantId,
    /// The pipeline.
    pub pipeline: PipelineName,
    /// The version that it is pinned to.
    pub version: u32,
    /// Where it stands.
    pub state: RunState,
    /// True once somebody asked to cancel it.
    pub cancel_requested: bool,
    /// Higher goes first.
    pub priority: i16,
    /// For filters and people.
    pub labels: Labels,
    /// Overrides the stages' cache mode.
    pub cache_mode: Option<CacheMode>,
    /// How many stages it has.
    pub stages_total: u32,
    /// How many have their checkpoint.
    pub stages_done: u32,
    /// What it took so far.
    pub totals: Totals,
    /// Why it failed.
    pub failure: Option<Failure>,
    /// The correlation id of the request that submitted it.
    pub request_id: Option<String>,
    /// When it was accepted.
    pub created_at: DateTime<Utc>,
    /// Before that it does not start; None for at once.
    pub start_at: Option<DateTime<Utc>>,
    /// When a replica first took it.
    pub started_at: Option<DateTime<Utc>>,
    /// When it reached a terminal state.
    pub finished_at: Option<DateTime<Utc>>,
    /// When it expires.
    pub deadline_at: DateTime<Utc>,
    /// When retention removed its input and outputs.
    pub purged_at: Option<DateTime<Utc>>,
    /// The seq of its last event.
    pub last_seq: u64,
}

/// The state that an unreadable run is shown in.
const UNREADABLE: &str = "unreadable";

impl RunRecord {
    /// What stands in a list for a run whose row cannot be read: its id, and a failure that says which column it is. Its
    /// state is unknown, so that nothing is done about it.
    pub fn unreadable(id: RunId, tenant: TenantId, error: &StoreError) -> Self {
        let created_at = id.created_at();
        Self {
            id,
            tenant,
            pipeline: unreadable_name(),
            version: 0,
            state: unreadable_state(),
            cancel_requested: false,
            priority: 0,
            labels: Labels::default(),
            cache_mode: None,
            stages_total: 0,
            stages_done: 0,
            totals: Totals::default(),
            failure: Some(Failure::new(Code::CorruptRow, error.to_string())),
            request_id: None,
            created_at,
            start_at: None,
            started_at: None,
            finished_at: None,
            deadline_at: created_at,
            purged_at: None,
            last_seq: 0,
        }
    }
}

impl Kept {
    /// What stands for a run whose row cannot be read: retention leaves it alone.
    pub fn unreadable(run: RunId) -> Self {
        Self {
            run,
            tenant: TenantId::default(),
            pipeline: unreadable_name(),
            version: 0,
            state: unreadable_state(),
            finished_at: None,
            purged: false,
        }
    }
}

impl PipelineVersion {
    /// What stands in a list for a version whose row cannot be read: its name and number, and which column it is.
    pub fn unreadable(name: PipelineName, version: u32, error: &StoreError) -> Self {
        Self {
            name,
            version,
            digest: String::new(),
            created_at: DateTime::UNIX_EPOCH,
            definition: Value::Null,
            failure: Some(Failure::new(Code::CorruptRow, error.to_string())),
        }
    }
}

impl ApiKey {
    /// Stands in a list for a key whose row cannot be read: its id, and the column. Such a key authenticates no request; it
    /// can be revoked.
    pub fn unreadable(id: KeyId, tenant: Option<TenantId>, error: &StoreError) -> Self {
        Self {
            id,
            tenant: tenant.unwrap_or_else(unreadable_tenant),
            role: Role::Viewer,
            name: UNREADABLE.to_owned(),
            created_at: DateTime::UNIX_EPOCH,
            expires_at: None,
            revoked_at: None,
            failure: Some(Failure::new(Code::CorruptRow, error.to_string())),
        }
    }
}

impl ReplicaRecord {
    /// What stands in a list for a replica whose row cannot be read: its id, and which column it is.
    pub fn unreadable(id: ReplicaId, error: &StoreError) -> Self {
        Self {
            id,
            name: UNREADABLE.to_owned(),
            version: UNREADABLE.to_owned(),
            alive: false,
            draining: false,
            left: false,
            started_at: DateTime::UNIX_EPOCH,
            heartbeat_age_ms: 0,
            runs: 0,
            oldest_lease_ms: None,
            failure: Some(Failure::new(Code::CorruptRow, error.to_string())),
        }
    }
}

/// The pipeline in whose place the backlog counts the runs of pipelines whose name cannot be read.
pub fn unreadable_pipeline() -> PipelineName {
    unreadable_name()
}

#[expect(clippy::unwrap_used, reason = "the literal is a name; a test reads it")]
fn unreadable_tenant() -> TenantId {
    TenantId::new(UNREADABLE).unwrap()
}

#[expect(clippy::unwrap_used, reason = "the literal is a name; a test reads it")]
fn unreadable_name() -> PipelineName {
    PipelineName::new(UNREADABLE).unwrap()
}

#[expect(clippy::unwrap_used, reason = "the literal is a word; a test reads it")]
fn unreadable_state() -> RunState {
    RunState::parse(UNREADABLE).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unreadable_run_tells_its_id_and_which_column_it_is() {
        let now = DateTime::from_timestamp_millis(1_767_225_600_000).expect("in range");
        let id = RunId::new(now, [7; 10]);
        let error =
            StoreError::Corrupt { table: "runs", column: "labels", id: id.to_string(), message: "no JSON".into() };
        let run = RunRecord::unreadable(id, TenantId::default(), &error);
        assert_eq!((run.id, run.created_at, run.state.as_str()), (id, now, UNREADABLE));
        assert!(run.failure.is_some_and(|failure| failure.message.contains("runs.labels")));
        assert!(!Kept::unreadable(id).state.is_terminal());
        assert_eq!(ApiKey::unreadable(KeyId(id.0), None, &error).tenant.as_str(), UNREADABLE);
        assert_eq!(unreadable_pipeline().as_str(), UNREADABLE);
    }
}

/// A stage of a run, without its payloads. A stage that was never started may have no row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StageRecord {
    /// The stage.
    pub id: StageId,
    /// Where it stands.
    pub state: StageState,
    /// The attempt that is under way, or the last one; 0 before the first.
    pub attempt: u32,
    /// The first attempt of the present round; a retried run begins a new round.
    pub round_start: u32,
    /// How many owners the attempt under way had before this one. Each may have asked a model and not told.
    #[serde(default)]
    pub former_owners: u32,
    /// When the next attempt starts, while it waits.
    pub not_before: Option<DateTime<Utc>>,
    /// What the gate decided last.
    pub verdict: Option<Verdict>,
    /// The quality that was reached last.
    pub score: Option<f64>,
    /// The model that answered last.
    pub model: Option<ModelRef>,
    /// Where that answer came from.
    pub origin: Option<Origin>,
    /// What it took so far, over all attempts.
    pub totals: Totals,
    /// Answers of the present round that were judged and did not pass: what `retry.max_attempts` bounds.
    pub judged: u32,
    /// Attempts in a row that met an outage; 0 while there is none.
    pub outages: u32,
    /// When the first of them ended.
    pub outage_since: Option<DateTime<Utc>>,
    /// Why it failed; while it waits for an outage to pass, the last that was heard of it.
    pub failure: Option<Failure>,
    /// When its first attempt started.
    pub started_at: Option<DateTime<Utc>>,
    /// When it got its checkpoint or failed.
    pub finished_at: Option<DateTime<Utc>>,
}

impl StageRecord {
    /// A stage before its first attempt.
    pub fn pending(id: StageId) -> Self {
        Self {
            id,
            state: StageState::Pending,
            attempt: 0,
            round_start: 1,
            former_owners: 0,
            not_before: None,
            verdict: None,
            score: None,
            model: None,
            origin: None,
            totals: Totals::default(),
            judged: 0,
            outages: 0,
            outage_since: None,
            failure: None,
            started_at: None,
            finished_at: None,
        }
    }

    /// Something else than an outage came of an attempt.
    pub(crate) fn end_outage(&mut self) {
        self.outages = 0;
        self.outage_since = None;
    }

    /// What it waits for, where it does.
    pub fn waiting(&self) -> Option<Waiting> {
        let reason = match self.state {
            StageState::Held => format!("stage `{}` waits for a person to approve or reject its output", self.id),
            StageState::Waiting => match self.outage() {
                Some(outage) => format!("stage `{}` waits for an outage to pass: {outage}", self.id),
                None => format!("stage `{}` waits for its next attempt", self.id),
            },
            _ => return None,
        };
        Some(Waiting { reason, until: self.not_before })
    }

    /// The outage that it has met, since when, how often, and the last that was heard of it.
    pub fn outage(&self) -> Option<String> {
        let since = self.outage_since?.to_rfc3339_opts(SecondsFormat::Secs, true);
        let times = if self.outages == 1 { "once".to_owned() } else { format!("{} times", self.outages) };
        let last =
            self.failure.as_ref().map_or(String::new(), |last| format!("; last {}: {}", last.code, last.message));
        Some(format!("met {times} since {since}{last}"))
    }
}

/// What a run or a stage waits for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Waiting {
    /// In one sentence.
    pub reason: String,
    /// When it goes on by itself; absent where a person is awaited.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub until: Option<DateTime<Utc>>,
}

impl Waiting {
    /// What a run waits for: of its stages the one that goes on first.
    pub fn of_run<'a>(stages: impl IntoIterator<Item = &'a StageRecord>) -> Option<Self> {
        let waiting = stages.into_iter().filter_map(StageRecord::waiting);
        waiting.min_by_key(|waiting| (waiting.until.is_none(), waiting.until))
    }
}

/// A run with its payloads and stages.
#[derive(Debug, Clone, PartialEq)]
pub struct RunDetail {
    /// The run.
    pub run: RunRecord,
    /// The input; null once it was purged.
    pub input: Json,
    /// The output, once it succeeded and until it is purged.
    pub output: Option<Json>,
    /// The stages that have a row, in no particular order.
    pub stages: Vec<StageRecord>,
}

/// A stage with everything that is kept of it.
#[derive(Debug, Clone, PartialEq)]
pub struct StageDetail {
    /// The stage.
    pub stage: StageRecord,
    /// Its checkpoint.
    pub checkpoint: Option<Checkpoint>,
    /// Its newest attempts that ended, in order; at most [`ATTEMPTS_READ_MAX`].
    pub attempts: Vec<Attempt>,
}

/// How many attempts of a stage are read at most: outages are bounded by time, so that there may be many.
pub const ATTEMPTS_READ_MAX: usize = 200;

/// Which runs to list. Newest first.
#[derive(Debug, Clone)]
pub struct RunQuery {
    /// Whose.
    pub tenant: TenantId,
    /// Only of this pipeline.
    pub pipeline: Option<PipelineName>,
    /// Only of this version.
    pub version: Option<u32>,
    /// Only in one of these states; empty for all.
    pub states: Vec<RunState>,
    /// Only those that carry all of these labels.
    pub labels: Labels,
    /// Only those accepted at or after this.
    pub created_from: Option<DateTime<Utc>>,
    /// Only those accepted before this.
    pub created_before: Option<DateTime<Utc>>,
    /// Only those older than this run (the cursor).
    pub before: Option<RunId>,
    /// At most so many, 1 to 200.
    pub limit: u32,
}

/// How much waits and works, over all tenants.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// Runs that could be claimed now.
    pub queued: u64,
    /// Runs that a live replica owns.
    pub running: u64,
    /// Parked runs.
    pub waiting: u64,
    /// How long the oldest claimable run has waited.
    pub oldest_queued_ms: u64,
}

/// What waits and works of one pipeline of one tenant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Backlog {
    /// Whose.
    pub tenant: TenantId,
    /// The pipeline.
    pub pipeline: PipelineName,
    /// Runs that could be claimed now.
    pub queued: u64,
    /// Runs that wait for a time or for a person: delayed starts, long back-offs, holds.
    pub waiting: u64,
    /// Runs that live replicas own.
    pub running: u64,
    /// How long the oldest claimable run has waited.
    pub oldest_queued_ms: u64,
}

/// A replica, as the others see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReplicaRecord {
    /// This life of it.
    pub id: ReplicaId,
    /// Its host name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// False once its time is over: its runs are taken over.
    pub alive: bool,
    /// It is shutting down.
    pub draining: bool,
    /// It is not alive because it said that it leaves, and handed its runs back: it is not missing.
    #[serde(default)]
    pub left: bool,
    /// When this life began.
    pub started_at: DateTime<Utc>,
    /// How long ago it was last heard of.
    pub heartbeat_age_ms: u64,
    /// Runs that it owns.
    pub runs: u64,
    /// How long it has owned the one that it has owned longest.
    pub oldest_lease_ms: Option<u64>,
    /// That its row cannot be read, and which column it is (SG0505): then only the other fields that could be read count.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub failure: Option<Failure>,
}

/// A run, as retention looks at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// Which.
    pub run: RunId,
    /// Whose.
    pub tenant: TenantId,
    /// Of which pipeline.
    pub pipeline: PipelineName,
    /// Of which version.
    pub version: u32,
    /// Where it stands.
    pub state: RunState,
    /// When it reached a terminal state.
    pub finished_at: Option<DateTime<Utc>>,
    /// Whether its input and outputs are gone already.
    pub purged: bool,
}
