//! Submits and steps: what is fenced, and what is recognised as a repetition.

use std::collections::BTreeSet;

use chrono::{DateTime, Utc};
use stagegate_core::{
    Epoch, RunId, StoreError, StoreResult, TenantId,
    store::{Commit, Committed, Disposition, IDEMPOTENCY_TTL, Idempotency, NewRun, Submitted},
};

use super::state::{KeyRow, Row, State};
use crate::Flaw;

impl State {
    pub(crate) fn submit(&mut self, runs: &[NewRun], now: i64) -> Vec<Submitted> {
        runs.iter().map(|run| self.submit_one(run, now)).collect()
    }

    fn submit_one(&mut self, run: &NewRun, now: i64) -> Submitted {
        if let Some(row) = self.runs.get(&run.id) {
            let ours = row.owner.is_some() && row.owner == run.lease_to;
            return Submitted::Accepted(ours.then_some(row.epoch));
        }
        if let Some(Idempotency { key, digest }) = &run.idempotency {
            let (at, created_at) = ((run.tenant.clone(), key.clone()), run.created_at.timestamp_millis());
            let ttl = u64::try_from(IDEMPOTENCY_TTL.as_millis()).unwrap_or(u64::MAX);
            match self.keys.get(&at) {
                Some(used) if used.created_at > created_at.saturating_sub_unsigned(ttl) => {
                    let same = used.digest == *digest;
                    return if same { Submitted::Existing(used.run) } else { Submitted::Conflict(used.run) };
                }
                _ => self.keys.insert(at, KeyRow { digest: *digest, run: run.id, created_at }),
            };
        }
        let owner = run.lease_to.filter(|id| self.replicas.get(id).is_some_and(|replica| replica.is_alive(now)));
        self.runs.insert(run.id, Row::new(run, owner, now));
        Submitted::Accepted(owner.map(|_| Epoch(1)))
    }

    pub(crate) fn replay(&self, tenant: &TenantId, asked: &Idempotency, now: DateTime<Utc>) -> Option<Submitted> {
        let used = self.keys.get(&(tenant.clone(), asked.key.clone()))?;
        let ttl = u64::try_from(IDEMPOTENCY_TTL.as_millis()).unwrap_or(u64::MAX);
        let is_valid = used.created_at > now.timestamp_millis().saturating_sub_unsigned(ttl);
        let found = |same| if same { Submitted::Existing(used.run) } else { Submitted::Conflict(used.run) };
        is_valid.then(|| found(used.digest == asked.digest))
    }

    pub(crate) fn commit(&mut self, commits: &[Commit], flaw: Flaw, now: i64) -> StoreResult<Vec<Committed>> {
        let mut runs = BTreeSet::new();
        for commit in commits {
            let gap_free = commit.events.is_sorted_by(|a, b| a.seq + 1 == b.seq);
            if commit.events.is_empty() || !gap_free || !runs.insert(commit.lease.run) {
                return Err(defect(commit.lease.run, "has no events, a gap in them, or a twin"));
            }
        }
        let fences: Vec<Committed> = commits.iter().map(|commit| self.fence(commit, flaw)).collect();
        let passed = || commits.iter().zip(&fences).filter(|(_, fence)| **fence == Committed::Now);
        for (commit, _) in passed() {
            let there = |(stage, attempt): &(_, stagegate_core::Attempt)| {
                self.runs.get(&commit.lease.run).is_some_and(|row| row.has_attempt(stage, attempt.number))
            };
            if flaw != Flaw::FencingOff && commit.attempts.iter().any(there) {
                return Err(defect(commit.lease.run, "has an attempt that is there"));
            }
        }
        let consumed: BTreeSet<i64> = passed().flat_map(|(commit, _)| &commit.consumed).copied().collect();
        for (commit, _) in passed() {
            if let Some(row) = self.runs.get_mut(&commit.lease.run) {
                row.apply(commit, &consumed, now);
            }
        }
        Ok(fences)
    }

    fn fence(&self, commit: &Commit, flaw: Flaw) -> Committed {
        let Some(row) = self.runs.get(&commit.lease.run) else { return Committed::Stale };
        let first = commit.events.first().map_or(0, |event| event.seq);
        let last = commit.events.last().map_or(0, |event| event.seq);
        if flaw == Flaw::FencingOff {
            let there = commit.events.last().is_some_and(|last| row.events.contains(last));
            return if there { Committed::Already } else { Committed::Now };
        }
        if row.epoch != commit.lease.epoch {
            Committed::Stale
        } else if row.owner.is_some() && row.record.last_seq + 1 == first {
            Committed::Now
        } else if row.record.last_seq == last && flaw != Flaw::RepetitionIsStale {
            Committed::Already
        } else {
            Committed::Stale
        }
    }
}

fn defect(run: RunId, what: &str) -> StoreError {
    StoreError::Defect(format!("a step of run {run} {what}"))
}

impl Row {
    fn apply(&mut self, commit: &Commit, consumed: &BTreeSet<i64>, now: i64) {
        let record = &mut self.record;
        record.state = commit.state;
        record.stages_done = commit.stages_done;
        record.totals = commit.totals;
        record.failure.clone_from(&commit.failure);
        record.started_at = commit.started_at;
        record.finished_at = commit.finished_at;
        record.last_seq = commit.events.last().map_or(record.last_seq, |event| event.seq);
        self.events.extend(commit.events.iter().cloned());
        for stage in &commit.stages {
            self.stages.insert(stage.id.clone(), stage.clone());
        }
        for (stage, attempt) in &commit.attempts {
            self.attempts.entry(stage.clone()).or_default().insert(attempt.number, attempt.clone());
        }
        for (stage, checkpoint) in &commit.checkpoints {
            self.add_checkpoint(stage, checkpoint);
        }
        if let Some(output) = &commit.output {
            self.output = Some(output.clone());
        }
        self.signals.retain(|signal| !consumed.contains(&signal.id));
        match commit.then {
            Disposition::Keep => {}
            Disposition::Park(delay) => {
                (self.owner, self.signalled) = (None, false);
                let delay = delay.map(|delay| i64::try_from(delay.as_millis()).unwrap_or(i64::MAX));
                self.ready_at = delay.filter(|delay| *delay == 0).map(|_| now);
                self.wake_at = delay.filter(|delay| *delay > 0).map(|delay| now.saturating_add(delay));
                if self.ready_at.is_none() && !self.signals.is_empty() {
                    (self.ready_at, self.wake_at) = (Some(now), None);
                }
            }
            Disposition::End => {
                (self.owner, self.signalled, self.ready_at, self.wake_at) = (None, false, None, None);
                self.signals.clear();
            }
        }
    }
}
