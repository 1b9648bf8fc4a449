//! The rows: what the two real stores keep in tables. Owns nothing of how they change.

use std::collections::{BTreeMap, btree_map::Entry};

use stagegate_core::{
    Attempt, Capabilities, Checkpoint, Epoch, Event, Json, PipelineName, ReplicaId, RunId, StageId, TenantId,
    fair::Limits,
    store::{ApiKey, Lease, NewRun, PipelineVersion, RunRecord, Signal, StageRecord},
};

/// Everything that is kept.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) versions: BTreeMap<(TenantId, PipelineName), Vec<PipelineVersion>>,
    pub(crate) runs: BTreeMap<RunId, Row>,
    pub(crate) keys: BTreeMap<(TenantId, String), KeyRow>,
    pub(crate) replicas: BTreeMap<ReplicaId, ReplicaRow>,
    pub(crate) api_keys: Vec<([u8; 32], ApiKey)>,
    pub(crate) last_signal: i64,
}

/// A run and all that belongs to it.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub(crate) record: RunRecord,
    pub(crate) input: Json,
    pub(crate) output: Option<Json>,
    pub(crate) stages: BTreeMap<StageId, StageRecord>,
    pub(crate) attempts: BTreeMap<StageId, BTreeMap<u32, Attempt>>,
    pub(crate) checkpoints: BTreeMap<StageId, Checkpoint>,
    pub(crate) events: Vec<Event>,
    pub(crate) epoch: Epoch,
    pub(crate) owner: Option<ReplicaId>,
    /// Since when it can be claimed, in milliseconds of the store's clock.
    pub(crate) ready_at: Option<i64>,
    /// When it can be claimed.
    pub(crate) wake_at: Option<i64>,
    /// It has signals that its owner was not told of.
    pub(crate) signalled: bool,
    pub(crate) signals: Vec<Signal>,
    pub(crate) limits: Limits,
    /// Since when it is owned.
    pub(crate) leased_at: i64,
    /// How many owners in a row crashed, and the last event at the last time.
    pub(crate) crashes: u32,
    pub(crate) crashed_seq: Option<u64>,
}

impl Row {
    pub(crate) fn new(new: &NewRun, owner: Option<ReplicaId>, now: i64) -> Self {
        let refused = owner.is_none() && new.lease_to.is_some();
        // A run that asked for a lease and got none was only accepted: whoever claims it starts it.
        let events = if refused { new.events[..new.events.len().min(1)].to_vec() } else { new.events.clone() };
        let stages = if refused { &[][..] } else { &new.stages[..] };
        let later = new.start_at.map(|at| at.timestamp_millis()).filter(|at| *at > now);
        let state = if owner.is_some() { stagegate_core::RunState::Running } else { stagegate_core::RunState::Queued };
        Self {
            record: RunRecord {
                id: new.id,
                tenant: new.tenant.clone(),
                pipeline: new.pipeline.clone(),
                version: new.version,
                state,
                cancel_requested: false,
                priority: new.priority,
                labels: new.labels.clone(),
                cache_mode: new.cache_mode,
                stages_total: new.stages_total,
                stages_done: 0,
                totals: stagegate_core::Totals::default(),
                failure: None,
                request_id: new.request_id.clone(),
                created_at: new.created_at,
                start_at: new.start_at,
                started_at: owner.map(|_| new.created_at),
                finished_at: None,
                deadline_at: new.deadline_at,
                purged_at: None,
                last_seq: events.last().map_or(0, |event| event.seq),
            },
            input: new.input.clone(),
            output: None,
            stages: stages.iter().map(|stage| (stage.id.clone(), stage.clone())).collect(),
            attempts: BTreeMap::new(),
            checkpoints: BTreeMap::new(),
            events,
            epoch: Epoch(i64::from(owner.is_some())),
            owner,
            ready_at: (owner.is_none() && later.is_none()).then_some(now),
            wake_at: later,
            signalled: false,
            signals: Vec::new(),
            limits: new.limits.clone(),
            leased_at: now,
            crashes: 0,
            crashed_seq: None,
        }
    }

    pub(crate) fn is_leased(&self, lease: Lease) -> bool {
        self.owner.is_some() && self.epoch == lease.epoch
    }

    /// Whether it could be claimed at this time, and since when it could.
    pub(crate) fn claimable_since(&self, expired: impl Fn(ReplicaId) -> Option<i64>, now: i64) -> Option<i64> {
        self.ready_at.or(self.wake_at.filter(|at| *at <= now)).or_else(|| self.owner.and_then(expired))
    }

    /// Nobody owns it; it can be claimed from now on.
    pub(crate) fn hand_back(&mut self, now: i64) {
        (self.owner, self.signalled, self.ready_at) = (None, false, Some(now));
    }

    /// How many owners in a row crashed without any progress between.
    pub(crate) fn crashes(&self) -> u32 {
        if self.crashed_seq.is_some_and(|at| self.record.last_seq <= at + 1) { self.crashes } else { 0 }
    }

    /// Its owner crashed.
    pub(crate) fn crashed(&mut self) {
        self.crashes = self.crashes() + 1;
        self.crashed_seq = Some(self.record.last_seq);
    }

    /// Whether this attempt is there already.
    pub(crate) fn has_attempt(&self, stage: &StageId, number: u32) -> bool {
        self.attempts.get(stage).is_some_and(|attempts| attempts.contains_key(&number))
    }

    /// A second checkpoint of a stage is passed over.
    pub(crate) fn add_checkpoint(&mut self, stage: &StageId, checkpoint: &Checkpoint) {
        if let Entry::Vacant(vacant) = self.checkpoints.entry(stage.clone()) {
            vacant.insert(checkpoint.clone());
        }
    }
}

/// An idempotency key.
#[derive(Debug, Clone)]
pub(crate) struct KeyRow {
    pub(crate) digest: [u8; 32],
    pub(crate) run: RunId,
    pub(crate) created_at: i64,
}

/// One life of a replica.
#[derive(Debug, Clone)]
pub(crate) struct ReplicaRow {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) draining: bool,
    pub(crate) entered_at: i64,
    pub(crate) beat_at: i64,
    pub(crate) expires_at: i64,
    pub(crate) dead_at: Option<i64>,
    pub(crate) capabilities: Capabilities,
}

impl ReplicaRow {
    pub(crate) fn is_alive(&self, now: i64) -> bool {
        self.dead_at.is_none() && self.expires_at > now
    }
}
