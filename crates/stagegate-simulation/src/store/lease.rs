//! Leases and signals: who is alive, who may take what, and what is asked of owners.

use chrono::DateTime;
use stagegate_core::{
    ReplicaId, RunId, RunState, StageState,
    fair::{Candidate, InUse, Limits, Shares, choose},
    store::{
        Heartbeat, Lease, NewSignal, Pulse, PutBack, QueueStats, Signal, SignalKind, Signalled, Snapshot, Weighed,
    },
};

use super::state::{ReplicaRow, Row, State};
use crate::Flaw;

/// Parked runs that one claim wakes at most.
const WAKE_MAX: usize = 1_000;
/// How long a dead replica is remembered.
const TOMBSTONE_MS: i64 = 7 * 24 * 3600 * 1000;

impl State {
    pub(crate) fn heartbeat(&mut self, beat: &Heartbeat, flaw: Flaw, now: i64) -> Pulse {
        let ttl = i64::try_from(beat.ttl.as_millis()).unwrap_or(i64::MAX);
        let known = self.replicas.get(&beat.replica);
        if known.is_some_and(|replica| replica.dead_at.is_some()) {
            return Pulse::default();
        }
        let fresh = ReplicaRow {
            name: beat.name.clone(),
            version: beat.version.clone(),
            draining: beat.draining,
            entered_at: known.map_or(now, |replica| replica.entered_at),
            beat_at: now,
            expires_at: now.saturating_add(ttl),
            dead_at: None,
            capabilities: beat.capabilities.clone(),
        };
        self.replicas.insert(beat.replica, fresh);
        let marked = self.owned_rows(beat.replica).filter(|row| row.signalled && flaw != Flaw::CancelIsSilent);
        let signalled = marked.map(|row| row.record.id).collect();
        let live = self.replicas.values().filter(|replica| replica.is_alive(now));
        let common = live.fold(beat.capabilities.clone(), |common, replica| common.and(&replica.capabilities));
        let told = chrono::DateTime::from_timestamp_millis(now).filter(|_| flaw != Flaw::TimeUntold);
        Pulse { alive: true, signalled, common, now: told }
    }

    fn owned_rows(&self, replica: ReplicaId) -> impl Iterator<Item = &Row> {
        self.runs.values().filter(move |row| row.owner == Some(replica))
    }

    pub(crate) fn claim(
        &mut self,
        replica: ReplicaId,
        limit: u32,
        shares: &Shares,
        flaw: Flaw,
        now: i64,
    ) -> Vec<Lease> {
        if limit == 0 {
            return Vec::new();
        }
        if flaw != Flaw::LeasesNeverExpire {
            self.reap(flaw, now);
        }
        if !self.replicas.get(&replica).is_some_and(|replica| replica.is_alive(now)) {
            return Vec::new();
        }
        let is_due = |at: &i64| *at <= now || flaw == Flaw::StartIgnored;
        let mut due: Vec<(i64, RunId)> =
            self.runs.values().filter_map(|row| Some((row.wake_at.filter(is_due)?, row.record.id))).collect();
        due.sort_unstable();
        for (at, run) in due.into_iter().take(WAKE_MAX) {
            if let Some(row) = self.runs.get_mut(&run) {
                (row.ready_at, row.wake_at) = (Some(at), None);
            }
        }
        // In the order of their ids, and at most half.
        let cancelled = self.runs.values().filter(|row| row.ready_at.is_some() && row.record.cancel_requested);
        let cancelled = cancelled.filter(|row| !matches!(row.record.state, RunState::Unknown(_)));
        let mut ready: Vec<RunId> = cancelled.map(|row| row.record.id).take(limit.div_ceil(2) as usize).collect();
        let (candidates, mut used) = self.candidates(flaw);
        let (taken, candidates): (Vec<_>, Vec<_>) = candidates.into_iter().partition(|each| ready.contains(&each.run));
        for each in &taken {
            used.add(&each.tenant, &each.pipeline, each.limits.key.as_ref().map(|(key, _)| key.as_str()));
        }
        ready.extend(choose(candidates, used, shares, limit as usize - ready.len()));
        let mut leases = Vec::with_capacity(ready.len());
        for run in ready {
            let Some(row) = self.runs.get_mut(&run) else { continue };
            if flaw == Flaw::TakeOversCount && row.epoch.0 > 0 {
                row.crashed();
            }
            if flaw != Flaw::ClaimKeepsEpoch || row.epoch.0 == 0 {
                row.epoch.0 += 1;
            }
            (row.owner, row.ready_at, row.signalled) = (Some(replica), None, !row.signals.is_empty());
            row.leased_at = now;
            leases.push(Lease { run, epoch: row.epoch });
        }
        leases
    }

    /// What could be taken, and what is under way. Whoever is out of time has been declared dead.
    fn candidates(&self, flaw: Flaw) -> (Vec<Candidate>, InUse) {
        let (mut candidates, mut used) = (Vec::new(), InUse::default());
        for row in self.runs.values() {
            let (tenant, pipeline, limits) = (&row.record.tenant, &row.record.pipeline, &row.limits);
            if let Some(at) = row.ready_at.and_then(DateTime::from_timestamp_millis) {
                if matches!(row.record.state, RunState::Unknown(_)) {
                    continue; // Left to those who know how to go on with it.
                }
                candidates.push(Candidate {
                    run: row.record.id,
                    tenant: tenant.clone(),
                    pipeline: pipeline.clone(),
                    limits: if flaw == Flaw::LimitsIgnored { Limits::default() } else { limits.clone() },
                    priority: if flaw == Flaw::PriorityIgnored { 0 } else { row.record.priority },
                    available_at: at,
                });
            } else if row.owner.is_some() {
                used.add(tenant, pipeline, limits.key.as_ref().map(|(key, _)| key.as_str()));
            }
        }
        (candidates, used)
    }

    /// Declares dead the replicas that are out of time; their runs are ready.
    fn reap(&mut self, flaw: Flaw, now: i64) {
        let mut dead = Vec::new();
        for (id, replica) in &mut self.replicas {
            if replica.dead_at.is_none() && replica.expires_at <= now {
                replica.dead_at = Some(now);
                dead.push(*id);
            }
        }
        for id in &dead {
            let owned = |row: &&mut Row| row.owner == Some(*id) && flaw != Flaw::CrashesUncounted;
            self.runs.values_mut().filter(owned).for_each(Row::crashed);
            self.hand_back_all(*id, now);
        }
        if !dead.is_empty() {
            self.replicas.retain(|_, replica| replica.dead_at.is_none_or(|at| at > now - TOMBSTONE_MS));
        }
    }

    fn hand_back_all(&mut self, replica: ReplicaId, now: i64) {
        for row in self.runs.values_mut().filter(|row| row.owner == Some(replica)) {
            row.hand_back(now);
        }
    }

    pub(crate) fn owned(&self, replica: ReplicaId) -> Vec<Lease> {
        self.owned_rows(replica).map(|row| Lease { run: row.record.id, epoch: row.epoch }).collect()
    }

    pub(crate) fn release(&mut self, leases: &[Lease], now: i64) {
        for lease in leases {
            if let Some(row) = self.runs.get_mut(&lease.run).filter(|row| row.is_leased(*lease)) {
                row.hand_back(now);
            }
        }
    }

    pub(crate) fn put_back(&mut self, back: &[PutBack], flaw: Flaw, now: i64) {
        for PutBack { lease, after, crashed } in back {
            let Some(row) = self.runs.get_mut(&lease.run).filter(|row| row.is_leased(*lease)) else { continue };
            if *crashed && flaw != Flaw::CrashesUncounted {
                row.crashed();
            }
            row.hand_back(now);
            let after = i64::try_from(after.as_millis()).unwrap_or(i64::MAX);
            if after > 0 {
                (row.ready_at, row.wake_at) = (None, Some(now.saturating_add(after)));
            }
        }
    }

    pub(crate) fn leave(&mut self, replica: ReplicaId, now: i64) {
        if let Some(row) = self.replicas.get_mut(&replica) {
            row.dead_at.get_or_insert(now);
        }
        self.hand_back_all(replica, now);
    }

    pub(crate) fn weigh(&self, leases: &[Lease]) -> Vec<Weighed> {
        let weighed = leases.iter().filter_map(|lease| {
            let row = self.runs.get(&lease.run).filter(|row| row.is_leased(*lease))?;
            let asked = row.signals.iter().map(|signal| signal.kind.text_bytes()).filter(|bytes| *bytes > 65_536);
            let bytes = row.snapshot(*lease).text_bytes() + asked.sum::<u64>();
            let tenant = row.record.tenant.clone();
            Some(Weighed { lease: *lease, tenant, bytes, crashes: row.crashes() })
        });
        weighed.collect()
    }

    pub(crate) fn load(&self, leases: &[Lease]) -> Vec<Snapshot> {
        let mut found: Vec<Snapshot> = Vec::with_capacity(leases.len());
        for lease in leases {
            let Some(row) = self.runs.get(&lease.run).filter(|row| row.is_leased(*lease)) else { continue };
            if found.iter().all(|snapshot| snapshot.lease.run != lease.run) {
                found.push(row.snapshot(*lease));
            }
        }
        found
    }

    pub(crate) fn queue(&self, now: i64) -> QueueStats {
        let mut stats = QueueStats::default();
        let mut oldest = now;
        for row in self.runs.values() {
            if let Some(since) = row.claimable_since(|owner| self.expired(owner, now), now) {
                stats.queued += 1;
                oldest = oldest.min(since);
            } else if row.owner.is_some() {
                stats.running += 1;
            } else if !row.record.state.is_terminal() {
                stats.waiting += 1;
            }
        }
        stats.oldest_queued_ms = u64::try_from(now - oldest).unwrap_or(0);
        stats
    }

    /// Since when a replica is out of time.
    pub(crate) fn expired(&self, replica: ReplicaId, now: i64) -> Option<i64> {
        self.replicas.get(&replica).map(|replica| replica.expires_at).filter(|at| *at <= now)
    }

    pub(crate) fn signal(&mut self, signal: &NewSignal, now: i64) -> Signalled {
        let Some(row) = self.runs.get_mut(&signal.run).filter(|row| row.record.tenant == signal.tenant) else {
            return Signalled::NoSuchRun;
        };
        let (state, owner) = (row.record.state, row.owner);
        match &signal.kind {
            SignalKind::Retry { deadline_at } => {
                if !state.is_terminal() || state == RunState::Succeeded {
                    return Signalled::WrongRunState(state);
                }
                if row.record.purged_at.is_some() {
                    return Signalled::Purged;
                }
                row.signals.clear();
                row.record.state = RunState::Queued;
                row.record.cancel_requested = false;
                row.record.failure = None;
                row.record.finished_at = None;
                row.record.deadline_at = *deadline_at;
                row.epoch.0 += 1;
                row.hand_back(now);
                row.wake_at = None;
            }
            _ if state.is_terminal() => return Signalled::WrongRunState(state),
            SignalKind::Cancel if row.record.cancel_requested => return Signalled::Accepted { owner },
            SignalKind::Approve { stage, .. } | SignalKind::Reject { stage, .. } => {
                let Some(standing) = row.stages.get(stage).map(|stage| stage.state) else {
                    return Signalled::StageNotHeld(None);
                };
                let pending = row.signals.iter().any(|signal| signal.kind.stage() == Some(stage));
                if standing != StageState::Held || pending {
                    return Signalled::StageNotHeld(Some(standing));
                }
                row.wake(now);
            }
            SignalKind::Cancel => {
                row.record.cancel_requested = true;
                row.wake(now);
            }
            SignalKind::Unknown(_) => row.wake(now),
        }
        self.last_signal += 1;
        row.signals.push(Signal { id: self.last_signal, kind: signal.kind.clone(), by: signal.by.clone() });
        Signalled::Accepted { owner: if matches!(signal.kind, SignalKind::Retry { .. }) { None } else { owner } }
    }

    pub(crate) fn signals(&mut self, leases: &[Lease]) -> Vec<(RunId, Vec<Signal>)> {
        let mut found = Vec::new();
        for lease in leases {
            let Some(row) = self.runs.get_mut(&lease.run).filter(|row| row.is_leased(*lease)) else { continue };
            row.signalled = false;
            if !row.signals.is_empty() {
                found.push((lease.run, row.signals.clone()));
            }
        }
        found
    }
}

impl Row {
    /// An owned run is marked, another one is ready.
    fn wake(&mut self, now: i64) {
        self.signalled = self.owner.is_some();
        self.ready_at = if self.owner.is_none() { self.ready_at.or(Some(now)) } else { None };
        self.wake_at = None;
    }

    fn snapshot(&self, lease: Lease) -> Snapshot {
        let last = |attempts: &std::collections::BTreeMap<u32, stagegate_core::Attempt>| {
            attempts.values().rev().find(|attempt| attempt.output.is_some()).cloned()
        };
        Snapshot {
            lease,
            run: self.record.clone(),
            input: self.input.clone(),
            stages: self.stages.values().cloned().collect(),
            checkpoints: self.checkpoints.iter().map(|(id, checkpoint)| (id.clone(), checkpoint.clone())).collect(),
            last_attempts: self
                .attempts
                .iter()
                .filter(|(stage, _)| !self.checkpoints.contains_key(*stage))
                .filter_map(|(stage, attempts)| Some((stage.clone(), last(attempts)?)))
                .collect(),
        }
    }
}
