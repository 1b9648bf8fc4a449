//! The store's contract: one method per atomic transition. Owns what recovery may rely on; holds no SQL and no
//! transaction handle. Implemented by Postgres and SQLite, proven by one suite (`stagegate-testkit`).
//!
//! What every implementation promises:
//! - A method either happens whole or not at all, and is durable when it returns `Ok`.
//! - A method that returned `Err` may have happened (a connection can break after the commit). So every write can
//!   be repeated: [`Store::commit`] answers [`Committed::Already`], [`Store::submit`] finds the run by its id.
//! - Leases run on the database's clock alone. An owner's write names its epoch; a stale one changes nothing.
//! - Only the owner of a run writes its events, so `seq` is gap-free. Others leave a [`Signal`].

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

mod records;

pub use records::{
    ATTEMPTS_READ_MAX, Backlog, Kept, QueueStats, ReplicaRecord, RunDetail, RunQuery, RunRecord, StageDetail,
    StageRecord, Waiting, unreadable_pipeline,
};

pub use crate::access::{ApiKey, NewApiKey, Role};
use crate::{
    Attempt, Capabilities, Capability, Checkpoint, Epoch, Event, Failure, Json, KeyId, PipelineName, ReplicaId, RunId,
    RunState, StageId, StageState, TenantId, Totals,
    fair::{Limits, Shares},
    pipeline::{CacheMode, Labels},
};

/// Why a store method failed. What a method answers in the ordinary course is in its result, not here.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database is away, the pool is exhausted, or a statement timed out. Worth trying again.
    #[error("the database is unavailable: {0}")]
    Unavailable(String),
    /// A stored row cannot be read.
    #[error("corrupt row: {table}.{column} of {id}: {message}")]
    Corrupt {
        /// The table.
        table: &'static str,
        /// The column.
        column: &'static str,
        /// The row.
        id: String,
        /// What is wrong with it.
        message: String,
    },
    /// The schema is older than this binary needs.
    #[error("the database's schema is at version {found}, this binary needs {needed}: run `stagegate migrate`")]
    SchemaBehind {
        /// The newest migration applied.
        found: i64,
        /// The newest migration that this binary has.
        needed: i64,
    },
    /// The schema is newer than this binary knows, or a migration was changed after it ran.
    #[error("the database's schema does not fit this binary: {0}")]
    SchemaAhead(String),
    /// The disk is full.
    #[error("the database has no space left: {0}")]
    Full(String),
    /// Anything else: a defect of ours.
    #[error("the database refused a statement: {0}")]
    Defect(String),
}

impl StoreError {
    /// Whether the same call may succeed later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Full(_))
    }
}

/// The result of a store method.
pub type StoreResult<T> = Result<T, StoreError>;

/// Whether the disk was full when runs were last written, so that a store's answer to [`Store::ping`] tells of it.
#[derive(Debug, Default)]
pub struct DiskWatch(std::sync::atomic::AtomicBool);

impl DiskWatch {
    /// Notes what came of a write.
    pub fn note<T>(&self, written: StoreResult<T>) -> StoreResult<T> {
        match &written {
            Ok(_) => self.0.store(false, std::sync::atomic::Ordering::Relaxed),
            Err(StoreError::Full(_)) => self.0.store(true, std::sync::atomic::Ordering::Relaxed),
            Err(_) => {}
        }
        written
    }

    /// Whether it was full.
    pub fn is_full(&self) -> bool {
        self.0.load(std::sync::atomic::Ordering::Relaxed)
    }
}

// ---- Pipelines ----------------------------------------------------------------------------------------------

/// A definition to be registered.
#[derive(Debug, Clone)]
pub struct NewVersion {
    /// Whose.
    pub tenant: TenantId,
    /// Its name.
    pub name: PipelineName,
    /// BLAKE3 of the canonical JSON.
    pub digest: [u8; 32],
    /// The canonical JSON.
    pub definition: Value,
    /// When.
    pub now: DateTime<Utc>,
    /// How much the tenant may have with it.
    pub quota: PipelineQuota,
}

/// How many pipelines and versions a tenant may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PipelineQuota {
    /// Pipelines.
    pub pipelines: u32,
    /// Versions of all its pipelines together.
    pub versions: u32,
}

impl PipelineQuota {
    /// Whether one more version fits beside what is there, as the first of a new pipeline or of a known one.
    pub fn fits(self, pipelines: u64, versions: u64, is_known: bool) -> bool {
        versions < u64::from(self.versions) && (is_known || pipelines < u64::from(self.pipelines))
    }
}

/// What became of a registration.
#[derive(Debug, Clone, PartialEq)]
pub enum Registered {
    /// A new version.
    New(PipelineVersion),
    /// The version with this content, which was there.
    Known(PipelineVersion),
    /// The quota leaves no room for it. Nothing changed.
    Full {
        /// Pipelines that the tenant has.
        pipelines: u64,
        /// Versions that it has.
        versions: u64,
    },
}

/// A registered version. Immutable.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PipelineVersion {
    /// Its name.
    pub name: PipelineName,
    /// Counted from 1 per name.
    pub version: u32,
    /// BLAKE3 of the canonical JSON, hex.
    pub digest: String,
    /// When it was registered.
    pub created_at: DateTime<Utc>,
    /// The canonical JSON.
    pub definition: Value,
    /// That its row cannot be read, and which column it is (SG0505): then only the other fields that could be read count.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub failure: Option<Failure>,
}

// ---- Submitting ---------------------------------------------------------------------------------------------

/// A run to be accepted.
#[derive(Debug, Clone)]
pub struct NewRun {
    /// Its id, made by the caller, so that a repeated insert is recognised.
    pub id: RunId,
    /// Whose.
    pub tenant: TenantId,
    /// The pipeline.
    pub pipeline: PipelineName,
    /// The version that it is pinned to.
    pub version: u32,
    /// How many stages it has.
    pub stages_total: u32,
    /// The input.
    pub input: Json,
    /// Overrides the stages' cache mode.
    pub cache_mode: Option<CacheMode>,
    /// Higher goes first.
    pub priority: i16,
    /// For filters and people.
    pub labels: Labels,
    /// The client's key and what it stands for.
    pub idempotency: Option<Idempotency>,
    /// The correlation id of the request that submitted it.
    pub request_id: Option<String>,
    /// When it was accepted.
    pub created_at: DateTime<Utc>,
    /// Before that it cannot be claimed; None for at once. Never together with `lease_to`.
    pub start_at: Option<DateTime<Utc>>,
    /// What bounds how many runs are under way beside it. Only a run without limits has a `lease_to`: the others are
    /// counted when they are claimed.
    pub limits: Limits,
    /// When it expires.
    pub deadline_at: DateTime<Utc>,
    /// Its first events, from seq 1.
    pub events: Vec<Event>,
    /// The stages that the events start, where it is leased at once.
    pub stages: Vec<StageRecord>,
    /// The replica that takes it in the same insert, at epoch 1. None leaves it queued.
    pub lease_to: Option<ReplicaId>,
}

/// A client's idempotency key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Idempotency {
    /// The key, unique within its tenant.
    pub key: String,
    /// BLAKE3 of the request that it stands for.
    pub digest: [u8; 32],
}

/// How the longest an idempotency key is remembered.
pub const IDEMPOTENCY_TTL: Duration = Duration::from_hours(24);

/// What became of a submitted run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Submitted {
    /// It is there (now, or since an earlier try with the same id). With an epoch, `lease_to` owns it.
    Accepted(Option<Epoch>),
    /// The key was used for this run, with the same request.
    Existing(RunId),
    /// The key was used with another request.
    Conflict(RunId),
}

// ---- Leases and progress ------------------------------------------------------------------------------------

/// A replica, as it reports itself.
#[derive(Debug, Clone)]
pub struct Heartbeat {
    /// Which.
    pub replica: ReplicaId,
    /// Its host name, for people.
    pub name: String,
    /// Its version, for people.
    pub version: String,
    /// It is shutting down.
    pub draining: bool,
    /// How long it counts as alive after this.
    pub ttl: Duration,
    /// What it can read and do.
    pub capabilities: Capabilities,
    /// How long a capability that settles must have been common before it does: so long the previous release may return.
    pub way_back: Duration,
}

/// What a heartbeat found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pulse {
    /// False where the replica had been declared dead: its leases are gone, it must stop its work and take a new id.
    pub alive: bool,
    /// Runs of this replica that have signals.
    pub signalled: Vec<RunId>,
    /// What every live replica can read and do; see [`Capabilities::common`].
    pub common: Capabilities,
    /// The database's time, between when it was asked and when it answered; None where it was not told.
    pub now: Option<DateTime<Utc>>,
}

/// A replica's exclusive right to execute a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Lease {
    /// The run.
    pub run: RunId,
    /// The generation that fences every write.
    pub epoch: Epoch,
}

/// The size and the crashes of a leased run, known before the run is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Weighed {
    /// The lease.
    pub lease: Lease,
    /// Whose run it is.
    pub tenant: TenantId,
    /// How many bytes the inputs and outputs have that [`Store::load`] would read, with those of signals of more than 64 KiB.
    pub bytes: u64,
    /// How many owners in a row died or panicked over it without any progress between: more than one event after the last
    /// crash is progress, because an owner's first step may be nothing but `run.resumed`.
    pub crashes: u32,
}

/// A lease to be handed back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PutBack {
    /// Which.
    pub lease: Lease,
    /// Others can claim it after this.
    pub after: Duration,
    /// Whether it counts as a crash of its owner.
    pub crashed: bool,
}

/// Everything that an owner needs to go on with a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    /// The lease under which it was read.
    pub lease: Lease,
    /// The run.
    pub run: RunRecord,
    /// The input.
    pub input: Json,
    /// The stages that have a row.
    pub stages: Vec<StageRecord>,
    /// The checkpoints.
    pub checkpoints: Vec<(StageId, Checkpoint)>,
    /// The last attempt with an output of each stage without a checkpoint: what is held, or what a critique is about.
    pub last_attempts: Vec<(StageId, Attempt)>,
}

impl Snapshot {
    /// How many bytes its inputs and outputs have.
    pub fn text_bytes(&self) -> u64 {
        let checkpoints = self.checkpoints.iter().map(|(_, checkpoint)| &checkpoint.output);
        let attempts = self.last_attempts.iter().filter_map(|(_, attempt)| attempt.output.as_ref());
        checkpoints.chain(attempts).chain([&self.input]).map(Json::text_bytes).sum()
    }
}

/// What somebody else asks of a run's owner. Consumed by a commit of the owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signal {
    /// Its id, growing.
    pub id: i64,
    /// What is asked.
    pub kind: SignalKind,
    /// Who asks, for the record.
    pub by: Option<String>,
}

/// What can be asked of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum SignalKind {
    /// Stop.
    Cancel,
    /// Start over what failed. Only of a run that failed, was cancelled or expired; it gets a new deadline.
    Retry {
        /// The new deadline.
        deadline_at: DateTime<Utc>,
    },
    /// Take the held output.
    Approve {
        /// The held stage.
        stage: StageId,
        /// The attempt that is meant; None for whichever is held.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        attempt: Option<u32>,
        /// Why, in the words of the person who approves.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        comment: Option<String>,
        /// Take this instead: the output as the person edited it. Whoever leaves the signal has checked it.
        #[serde(default, skip_serializing_if = "Option::is_none", with = "as_text")]
        output: Option<Json>,
    },
    /// Do not take the held output: the stage fails.
    Reject {
        /// The held stage.
        stage: StageId,
        /// Why.
        reason: String,
        /// The attempt that is meant; None for whichever is held.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        attempt: Option<u32>,
    },
    /// Something of a newer release, as it was written: of an unknown kind, or with fields that this release does not
    /// know and that may change what is asked. It is left for a replica that knows it.
    #[serde(skip)]
    Unknown(Arc<str>),
}

impl SignalKind {
    /// Take the held output as it is, with no more to say.
    pub fn approve(stage: StageId, attempt: Option<u32>) -> Self {
        Self::Approve { stage, attempt, comment: None, output: None }
    }

    /// From its stored body, a JSON object with a `kind`, which may also say `by` whom. A cancel is obeyed whatever else
    /// it says.
    pub fn read(body: &str) -> Result<Self, serde_json::Error> {
        let stored: Value = serde_json::from_str(body)?;
        if let Ok(kind) = serde_json::from_value::<Self>(stored.clone()) {
            let known = serde_json::to_value(&kind)?;
            let is_known = |key: &String| key == "by" || known.get(key).is_some();
            if kind == Self::Cancel || stored.as_object().is_some_and(|stored| stored.keys().all(is_known)) {
                return Ok(kind);
            }
        }
        match stored.get("kind") {
            Some(Value::String(_)) => Ok(Self::Unknown(body.into())),
            _ => Err(serde::de::Error::missing_field("kind")),
        }
    }

    /// Its body, as [`Self::read`] takes it.
    pub fn body(&self) -> Result<String, serde_json::Error> {
        match self {
            Self::Unknown(raw) => Ok(raw.as_ref().to_owned()),
            known => serde_json::to_string(known),
        }
    }

    /// What every live replica must understand before this may be asked; None for what all releases know.
    pub fn needs(&self) -> Option<Capability> {
        match self {
            Self::Approve { comment: Some(_), .. } | Self::Approve { output: Some(_), .. } => {
                Some(Capability::EditedApproval)
            }
            Self::Approve { attempt: Some(_), .. } | Self::Reject { attempt: Some(_), .. } => {
                Some(Capability::ApprovalNamesAttempt)
            }
            Self::Cancel | Self::Retry { .. } | Self::Approve { .. } | Self::Reject { .. } => None,
            Self::Unknown(_) => Some(Capability::OpenVocabulary),
        }
    }

    /// How many bytes the output that it brings has.
    pub fn text_bytes(&self) -> u64 {
        match self {
            Self::Approve { output: Some(output), .. } => output.text_bytes(),
            _ => 0,
        }
    }

    /// The stage that a decision is about.
    pub fn stage(&self) -> Option<&StageId> {
        match self {
            Self::Approve { stage, .. } | Self::Reject { stage, .. } => Some(stage),
            Self::Cancel | Self::Retry { .. } | Self::Unknown(_) => None,
        }
    }
}

/// A document inside of a signal is a text in it, so that it comes back to the digit.
mod as_text {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    use crate::Json;

    #[expect(clippy::ref_option, reason = "serde calls it so")]
    pub(super) fn serialize<S: Serializer>(document: &Option<Json>, serializer: S) -> Result<S::Ok, S::Error> {
        match document {
            Some(document) => serializer.serialize_some(document.as_str()),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Json>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| Json::from_text(&text)).transpose().map_err(D::Error::custom)
    }
}

/// A signal to be left.
#[derive(Debug, Clone)]
pub struct NewSignal {
    /// Whose run.
    pub tenant: TenantId,
    /// The run.
    pub run: RunId,
    /// What is asked.
    pub kind: SignalKind,
    /// Who asks.
    pub by: Option<String>,
}

/// What became of a signal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Signalled {
    /// It is there, and the run is awake: its owner sees it at its next heartbeat, or somebody claims the run.
    Accepted {
        /// The replica that owns the run now.
        owner: Option<ReplicaId>,
    },
    /// No such run for this tenant.
    NoSuchRun,
    /// The run's state does not allow it.
    WrongRunState(RunState),
    /// The stage is not held (or does not exist, or a decision on it is already pending).
    StageNotHeld(Option<StageState>),
    /// It cannot be retried: its input and outputs are gone.
    Purged,
}

/// What an owner writes: one atomic step of one run.
#[derive(Debug, Clone, PartialEq)]
pub struct Commit {
    /// The run and the epoch that fences the write.
    pub lease: Lease,
    /// The events, gap-free; never empty. The first one's `seq` must be the run's `last_seq` + 1.
    pub events: Vec<Event>,
    /// Rows of the stages that changed, whole.
    pub stages: Vec<StageRecord>,
    /// Attempts that ended, with their ledger rows.
    pub attempts: Vec<(StageId, Attempt)>,
    /// New checkpoints; at most one per stage, ever.
    pub checkpoints: Vec<(StageId, Checkpoint)>,
    /// The run's new state.
    pub state: RunState,
    /// Stages that have their checkpoint.
    pub stages_done: u32,
    /// What the run took so far.
    pub totals: Totals,
    /// Why it failed.
    pub failure: Option<Failure>,
    /// When it was first taken.
    pub started_at: Option<DateTime<Utc>>,
    /// When it reached a terminal state.
    pub finished_at: Option<DateTime<Utc>>,
    /// The output, when it succeeds.
    pub output: Option<Json>,
    /// Where that output is the default one, an object of the outputs of these stages in this order: a store may keep
    /// their names instead of a copy. Else empty.
    pub output_of: Vec<StageId>,
    /// Signals that this answers; they are removed.
    pub consumed: Vec<i64>,
    /// What becomes of the lease.
    pub then: Disposition,
}

impl Commit {
    /// How many bytes its outputs have.
    pub fn text_bytes(&self) -> u64 {
        let checkpoints = self.checkpoints.iter().map(|(_, checkpoint)| &checkpoint.output);
        let attempts = self.attempts.iter().filter_map(|(_, attempt)| attempt.output.as_ref());
        checkpoints.chain(attempts).chain(&self.output).map(Json::text_bytes).sum()
    }
}

/// What becomes of a lease with a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// The owner goes on.
    Keep,
    /// The lease ends; the run can be claimed after the delay, or with None only once it is signalled. A run that
    /// has unconsumed signals can be claimed at once.
    Park(Option<Duration>),
    /// The lease ends with the run.
    End,
}

/// What became of a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Committed {
    /// It happened now.
    Now,
    /// It had happened: an earlier try was committed but reported failed.
    Already,
    /// The lease is gone. Nothing changed; the author must stop.
    Stale,
}

/// The store. See the module's documentation for what every implementation promises.
#[async_trait]
pub trait Store: Send + Sync + std::fmt::Debug + 'static {
    /// Registers a version, where its quota has room; the same content of the same name gives the version that is there,
    /// quota or not. Registrations at the same time never overstep the quota together.
    async fn register(&self, new: &NewVersion) -> StoreResult<Registered>;

    /// A version, or with None the newest.
    async fn pipeline(
        &self,
        tenant: &TenantId,
        name: &PipelineName,
        version: Option<u32>,
    ) -> StoreResult<Option<PipelineVersion>>;

    /// The newest version of each pipeline, by name, after `after`.
    async fn pipelines(
        &self,
        tenant: &TenantId,
        after: Option<&PipelineName>,
        limit: u32,
    ) -> StoreResult<Vec<PipelineVersion>>;

    /// The versions of a pipeline, newest first, below `before`.
    async fn versions(
        &self,
        tenant: &TenantId,
        name: &PipelineName,
        before: Option<u32>,
        limit: u32,
    ) -> StoreResult<Vec<PipelineVersion>>;

    /// Accepts runs, each on its own: one conflict leaves the others alone. Answers in the same order.
    async fn submit(&self, runs: &[NewRun]) -> StoreResult<Vec<Submitted>>;

    /// What an idempotency key stands for at this moment: [`Submitted::Existing`] or [`Submitted::Conflict`]; None where
    /// it is free. For a submit that is refused: one that is made finds it by itself.
    async fn replay(
        &self,
        tenant: &TenantId,
        asked: &Idempotency,
        now: DateTime<Utc>,
    ) -> StoreResult<Option<Submitted>>;

    /// A run of this tenant.
    async fn run(&self, tenant: &TenantId, id: RunId) -> StoreResult<Option<RunDetail>>;

    /// A run of this tenant, without payloads and stages.
    async fn run_record(&self, tenant: &TenantId, id: RunId) -> StoreResult<Option<RunRecord>>;

    /// Runs of a tenant.
    async fn runs(&self, query: &RunQuery) -> StoreResult<Vec<RunRecord>>;

    /// A stage of a run, with its newest attempts; None where it has no row.
    async fn stage(&self, tenant: &TenantId, run: RunId, stage: &StageId) -> StoreResult<Option<StageDetail>>;

    /// Events after a seq, in order, at most `limit`.
    async fn events(&self, tenant: &TenantId, run: RunId, after: u64, limit: u32) -> StoreResult<Vec<Event>>;

    /// The events of many runs, each after its own seq: in order, at most `limit` of each run. Runs without any are
    /// left out. Whoever asks has seen to it that the runs may be read.
    async fn news(&self, seen: &[(RunId, u64)], limit: u32) -> StoreResult<Vec<(RunId, Vec<Event>)>>;

    /// Leaves a signal and wakes the run.
    async fn signal(&self, signal: &NewSignal) -> StoreResult<Signalled>;

    /// Reports a replica alive. The first one enters it.
    async fn heartbeat(&self, beat: &Heartbeat) -> StoreResult<Pulse>;

    /// Takes up to `limit` runs that can go on: queued, due, or left by replicas that are dead. Those that are to be
    /// cancelled come first, by their ids, whatever their limits, up to half of `limit`; the others in the order and within the limits of
    /// [`crate::fair`], counted over the leases of live replicas, never beyond them however many claim at once. May take
    /// fewer than there are; a claim that takes none leaves none that could be taken. Each gets a higher
    /// epoch. Takes nothing for a replica that is not alive. What it finds that a dead replica owned counts one more crash
    /// ([`Weighed::crashes`]), once for each owner.
    async fn claim(&self, replica: ReplicaId, limit: u32, shares: &Shares) -> StoreResult<Vec<Lease>>;

    /// What this replica owns according to the database: after an error, the truth about a claim or submit.
    async fn owned(&self, replica: ReplicaId) -> StoreResult<Vec<Lease>>;

    /// The sizes and crashes of leased runs, in the order of the leases. Reads no input and no output. A lease that is gone
    /// is left out.
    async fn weigh(&self, leases: &[Lease]) -> StoreResult<Vec<Weighed>>;

    /// Everything needed to go on with leased runs. A lease that is gone is left out.
    async fn load(&self, leases: &[Lease]) -> StoreResult<Vec<Snapshot>>;

    /// The unconsumed signals of leased runs, oldest first. Clears their marks, so that a later signal marks its run
    /// anew. Runs without any, and leases that are gone, are left out.
    async fn signals(&self, leases: &[Lease]) -> StoreResult<Vec<(RunId, Vec<Signal>)>>;

    /// Writes steps, each fenced on its own: a stale one fails alone. Answers in the same order. Two steps of one
    /// run must not be in one call.
    async fn commit(&self, commits: &[Commit]) -> StoreResult<Vec<Committed>>;

    /// Hands runs back: others can claim them at once. A lease that is gone is passed over.
    async fn release(&self, leases: &[Lease]) -> StoreResult<()>;

    /// Hands runs back, each after its own delay, and counts those that crashed. A lease that is gone is passed over.
    async fn put_back(&self, back: &[PutBack]) -> StoreResult<()>;

    /// The replica is gone for good: whatever it still owns is handed back.
    async fn leave(&self, replica: ReplicaId) -> StoreResult<()>;

    /// How much waits and works.
    async fn queue(&self) -> StoreResult<QueueStats>;

    /// The same by tenant and pipeline, those with something active only. Of one tenant, or of all.
    async fn backlog(&self, tenant: Option<&TenantId>) -> StoreResult<Vec<Backlog>>;

    /// How many runs of each tenant wait to be claimed, those that wait for their time included. Cheap enough to be
    /// asked every few seconds with a hundred thousand of them.
    async fn depths(&self) -> StoreResult<Vec<(TenantId, u64)>>;

    /// Every replica that is not forgotten, the living first. `runs` and `oldest_lease_ms` count one tenant's, or all.
    async fn replicas(&self, tenant: Option<&TenantId>) -> StoreResult<Vec<ReplicaRecord>>;

    /// The next runs of all tenants by id, after `after`, accepted before `created_before`: at most `limit`, whatever
    /// their state. For retention, which walks through all of them.
    async fn kept(&self, after: Option<RunId>, created_before: DateTime<Utc>, limit: u32) -> StoreResult<Vec<Kept>>;

    /// Removes the inputs, outputs, and attempts' outputs of those of these runs that are terminal, with what quotes them, and
    /// notes when. The quotes go also where the release before has removed the rest.
    async fn purge(&self, runs: &[RunId], now: DateTime<Utc>) -> StoreResult<u64>;

    /// Removes those of these runs that are terminal, whole: payloads first, the run last. The ledger keeps its rows.
    /// Returns which were removed.
    async fn delete(&self, runs: &[RunId]) -> StoreResult<Vec<RunId>>;

    /// Stores a key.
    async fn create_key(&self, key: &NewApiKey) -> StoreResult<()>;

    /// The key with this hash, whatever its state.
    async fn key_by_hash(&self, hash: &[u8; 32]) -> StoreResult<Option<ApiKey>>;

    /// The keys of a tenant, or of all.
    async fn keys(&self, tenant: Option<&TenantId>) -> StoreResult<Vec<ApiKey>>;

    /// Revokes a key; false where there is none. Revoking twice changes nothing.
    async fn revoke_key(&self, id: KeyId, now: DateTime<Utc>) -> StoreResult<bool>;

    /// Answers if the database does. Where its disk was full when runs were last written, it is tried with a write of
    /// its own, and fails with [`StoreError::Full`] until one succeeds.
    async fn ping(&self) -> StoreResult<()>;

    /// `postgres` or `sqlite`, for people and metrics.
    fn kind(&self) -> &'static str;

    /// Waits until what is under way is done, and closes.
    async fn close(&self);
}
