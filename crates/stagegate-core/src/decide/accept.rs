//! Acceptance: how a submitted run begins, queued or leased in the same insert.

use std::{sync::Arc, time::Duration};

use chrono::{DateTime, TimeDelta, Utc};

use super::{Draft, Effect, Run, StageRun, Stimulus};
use crate::{
    Epoch, Event, EventKind, Json, Pipeline, ReplicaId, RunId, RunState, TenantId, Totals,
    fair::Limits,
    pipeline::{CacheMode, Labels},
    store::{Idempotency, Lease, NewRun, StageRecord},
};

/// A run to be accepted; its input has been checked.
#[derive(Debug, Clone)]
pub struct Accept {
    /// Its id.
    pub id: RunId,
    /// Whose.
    pub tenant: TenantId,
    /// What it runs.
    pub pipeline: Arc<Pipeline>,
    /// The version that it is pinned to.
    pub version: u32,
    /// The input.
    pub input: Json,
    /// Overrides the stages' cache mode.
    pub cache_mode: Option<CacheMode>,
    /// Higher goes first.
    pub priority: i16,
    /// For filters and people.
    pub labels: Labels,
    /// The client's key.
    pub idempotency: Option<Idempotency>,
    /// The correlation id.
    pub request_id: Option<String>,
    /// Before that it does not start. Its deadline counts from there.
    pub start_at: Option<DateTime<Utc>>,
    /// What bounds how many runs are under way beside it.
    pub limits: Limits,
    /// The replica that takes it at once; None leaves it queued. Nobody takes one that starts later or has limits.
    pub lease_to: Option<ReplicaId>,
    /// The longest pause that is waited out in memory.
    pub park_after: Duration,
}

/// The epoch of a lease that is taken in the insert.
const FIRST_EPOCH: Epoch = Epoch(1);

impl Accept {
    /// What is inserted; and, where it is leased at once, the run and what to begin after the insert.
    pub fn begin(self, now: DateTime<Utc>) -> (NewRun, Option<(Run, Vec<Effect>)>) {
        let lease_to = self.lease_to.filter(|_| self.start_at.is_none() && self.limits.is_empty());
        let begins = self.start_at.map_or(now, |at| at.max(now));
        let deadline_at = begins + TimeDelta::from_std(self.pipeline.deadline).unwrap_or_else(|_| TimeDelta::days(366));
        let accepted = EventKind::RunAccepted { pipeline: self.pipeline.name.clone(), version: self.version };
        let mut new = NewRun {
            id: self.id,
            tenant: self.tenant,
            pipeline: self.pipeline.name.clone(),
            version: self.version,
            stages_total: u32::try_from(self.pipeline.stages.len()).unwrap_or(u32::MAX),
            input: self.input,
            cache_mode: self.cache_mode,
            priority: self.priority,
            labels: self.labels,
            idempotency: self.idempotency,
            request_id: self.request_id,
            created_at: now,
            start_at: self.start_at,
            limits: self.limits,
            deadline_at,
            events: vec![Event::new(1, now, accepted)],
            stages: Vec::new(),
            lease_to,
        };
        if lease_to.is_none() {
            return (new, None);
        }
        let mut run = leased(&new, self.pipeline, self.park_after);
        run.on(Stimulus::Taken(Vec::new()), now, 0.0);
        let step = run.take_step();
        let (events, stages, effects) =
            step.map_or_else(Default::default, |step| (step.commit.events, step.commit.stages, step.effects));
        new.events.extend(events);
        new.stages = stages;
        (new, Some((run, effects)))
    }
}

fn leased(new: &NewRun, pipeline: Arc<Pipeline>, park_after: Duration) -> Run {
    let stages: Vec<StageRun> = pipeline
        .stages
        .iter()
        .map(|stage| StageRun { record: StageRecord::pending(stage.id.clone()), last_output: None })
        .collect();
    Run {
        lease: Lease { run: new.id, epoch: FIRST_EPOCH },
        tenant: new.tenant.clone(),
        version: new.version,
        input: new.input.clone(),
        cache_mode: new.cache_mode,
        created_at: new.created_at,
        deadline_at: new.deadline_at,
        park_after,
        state: RunState::Queued,
        last_seq: 1,
        totals: Totals::default(),
        failure: None,
        started_at: None,
        finished_at: None,
        last_signal: 0,
        has_unknown_signal: false,
        is_rendering: false,
        draining: false,
        outputs: Arc::new(vec![None; stages.len()]),
        stages,
        draft: Draft::default(),
        pipeline,
    }
}
