//! A store in memory: the contract of [`stagegate_core::Store`] without a database, so that a simulation can run
//! thousands of lives in a second. Owns its clock, which is tokio's and so can be virtual; never a fault: those are
//! [`crate::front`]'s. Held to the same contract suite as Postgres and SQLite.

mod lease;
mod state;
mod view;
mod write;

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use stagegate_core::{
    Event, KeyId, PipelineName, ReplicaId, RunId, StageId, StageState, Store, StoreError, StoreResult, TenantId,
    fair::Shares,
    store::{
        ATTEMPTS_READ_MAX, ApiKey, Backlog, Commit, Committed, Heartbeat, Idempotency, Kept, Lease, NewApiKey, NewRun,
        NewSignal, NewVersion, PipelineVersion, Pulse, PutBack, QueueStats, Registered, ReplicaRecord, RunDetail,
        RunQuery, RunRecord, Signal, SignalKind, Signalled, Snapshot, StageDetail, Submitted, Weighed,
    },
};
use tokio::time::Instant;

pub(crate) use state::{Row, State};

use crate::Flaw;

/// Where the store's clock begins: some day, the same in each simulation, and later than every time of the contract suite.
pub(crate) const EPOCH_MS: i64 = 1_800_000_000_000;

/// The store. Share it behind an `Arc`.
#[derive(Debug)]
pub struct MemoryStore {
    state: Mutex<State>,
    began: Instant,
    closed: AtomicBool,
    pub(crate) flaw: Flaw,
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryStore {
    /// An empty one; its clock begins now.
    pub fn new() -> Self {
        Self::with_flaw(Flaw::None)
    }

    /// One that breaks a promise.
    pub fn with_flaw(flaw: Flaw) -> Self {
        Self { state: Mutex::default(), began: Instant::now(), closed: AtomicBool::new(false), flaw }
    }

    /// The database's clock.
    pub(crate) fn now(&self) -> i64 {
        EPOCH_MS + i64::try_from(self.began.elapsed().as_millis()).unwrap_or(i64::MAX)
    }

    /// Everything, for one step. Nothing is awaited inside.
    pub(crate) fn with<T>(&self, step: impl FnOnce(&mut State, i64) -> T) -> T {
        let now = self.now();
        step(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner), now)
    }
}

fn hex(bytes: &[u8; 32]) -> String {
    stagegate_core::cache::CacheKey(*bytes).to_string()
}

impl State {
    pub(crate) fn row(&self, tenant: &TenantId, run: RunId) -> Option<&Row> {
        self.runs.get(&run).filter(|row| row.record.tenant == *tenant)
    }

    fn register(&mut self, new: &NewVersion) -> Registered {
        let own = self.versions.iter().filter(|((tenant, _), _)| *tenant == new.tenant);
        let counts = own.fold((0, 0), |(pipelines, all), (_, versions)| (pipelines + 1, all + versions.len() as u64));
        let key = (new.tenant.clone(), new.name.clone());
        let is_known = self.versions.contains_key(&key);
        let digest = hex(&new.digest);
        let same = |versions: &Vec<PipelineVersion>| versions.iter().find(|version| version.digest == digest).cloned();
        if let Some(known) = self.versions.get(&key).and_then(same) {
            return Registered::Known(known);
        }
        if !new.quota.fits(counts.0, counts.1, is_known) {
            return Registered::Full { pipelines: counts.0, versions: counts.1 };
        }
        let versions = self.versions.entry(key).or_default();
        let version = PipelineVersion {
            name: new.name.clone(),
            version: u32::try_from(versions.len()).map_or(u32::MAX, |count| count + 1),
            digest,
            created_at: new.now,
            definition: new.definition.clone(),
            failure: None,
        };
        versions.push(version.clone());
        Registered::New(version)
    }

    fn list(&self, query: &RunQuery) -> Vec<RunRecord> {
        let wanted = |run: &&RunRecord| {
            run.tenant == query.tenant
                && query.pipeline.as_ref().is_none_or(|pipeline| run.pipeline == *pipeline)
                && query.version.is_none_or(|version| run.version == version)
                && (query.states.is_empty() || query.states.contains(&run.state))
                && query.labels.iter().all(|(key, value)| run.labels.get(key) == Some(value))
                && query.created_from.is_none_or(|from| run.created_at >= from)
                && query.created_before.is_none_or(|before| run.created_at < before)
                && query.before.is_none_or(|before| run.id < before)
        };
        let newest_first = self.runs.values().rev().map(|row| &row.record);
        newest_first.filter(wanted).take(query.limit as usize).cloned().collect()
    }

    pub(crate) fn events(&self, tenant: &TenantId, run: RunId, after: u64, limit: u32, flaw: Flaw) -> Vec<Event> {
        let Some(row) = self.row(tenant, run) else { return Vec::new() };
        let after = match flaw {
            Flaw::CursorRepeats => after.saturating_sub(1),
            Flaw::CursorSkips if after > 0 => after + 1,
            _ => after,
        };
        row.events.iter().filter(|event| event.seq > after).take(limit as usize).cloned().collect()
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn register(&self, new: &NewVersion) -> StoreResult<Registered> {
        Ok(self.with(|state, _| state.register(new)))
    }

    async fn pipeline(
        &self,
        tenant: &TenantId,
        name: &PipelineName,
        version: Option<u32>,
    ) -> StoreResult<Option<PipelineVersion>> {
        Ok(self.with(|state, _| {
            let versions = state.versions.get(&(tenant.clone(), name.clone()))?;
            match version {
                None => versions.last().cloned(),
                Some(number) => versions.iter().find(|version| version.version == number).cloned(),
            }
        }))
    }

    async fn pipelines(
        &self,
        tenant: &TenantId,
        after: Option<&PipelineName>,
        limit: u32,
    ) -> StoreResult<Vec<PipelineVersion>> {
        Ok(self.with(|state, _| {
            let ours = state.versions.iter().filter(|((of, name), _)| of == tenant && after.is_none_or(|a| name > a));
            ours.filter_map(|(_, versions)| versions.last().cloned()).take(limit as usize).collect()
        }))
    }

    async fn versions(
        &self,
        tenant: &TenantId,
        name: &PipelineName,
        before: Option<u32>,
        limit: u32,
    ) -> StoreResult<Vec<PipelineVersion>> {
        Ok(self.with(|state, _| {
            let versions = state.versions.get(&(tenant.clone(), name.clone())).map_or(&[][..], Vec::as_slice);
            let older = versions.iter().rev().filter(|version| before.is_none_or(|before| version.version < before));
            older.take(limit as usize).cloned().collect()
        }))
    }

    async fn submit(&self, runs: &[NewRun]) -> StoreResult<Vec<Submitted>> {
        Ok(self.with(|state, now| state.submit(runs, now)))
    }

    async fn replay(
        &self,
        tenant: &TenantId,
        asked: &Idempotency,
        now: DateTime<Utc>,
    ) -> StoreResult<Option<Submitted>> {
        Ok(self.with(|state, _| state.replay(tenant, asked, now)))
    }

    async fn run(&self, tenant: &TenantId, id: RunId) -> StoreResult<Option<RunDetail>> {
        Ok(self.with(|state, _| {
            state.row(tenant, id).map(|row| RunDetail {
                run: row.record.clone(),
                input: row.input.clone(),
                output: row.output.clone(),
                stages: row.stages.values().cloned().collect(),
            })
        }))
    }

    async fn run_record(&self, tenant: &TenantId, id: RunId) -> StoreResult<Option<RunRecord>> {
        Ok(self.with(|state, _| state.row(tenant, id).map(|row| row.record.clone())))
    }

    async fn runs(&self, query: &RunQuery) -> StoreResult<Vec<RunRecord>> {
        Ok(self.with(|state, _| state.list(query)))
    }

    async fn stage(&self, tenant: &TenantId, run: RunId, stage: &StageId) -> StoreResult<Option<StageDetail>> {
        Ok(self.with(|state, _| {
            let row = state.row(tenant, run)?;
            let newest = row.attempts.get(stage).into_iter().flat_map(|all| all.values().rev().take(ATTEMPTS_READ_MAX));
            let mut attempts: Vec<_> = newest.cloned().collect();
            attempts.reverse();
            Some(StageDetail {
                stage: row.stages.get(stage)?.clone(),
                checkpoint: row.checkpoints.get(stage).cloned(),
                attempts,
            })
        }))
    }

    async fn events(&self, tenant: &TenantId, run: RunId, after: u64, limit: u32) -> StoreResult<Vec<Event>> {
        Ok(self.with(|state, _| state.events(tenant, run, after, limit, self.flaw)))
    }

    async fn signal(&self, signal: &NewSignal) -> StoreResult<Signalled> {
        Ok(self.with(|state, now| state.signal(signal, now)))
    }

    async fn heartbeat(&self, beat: &Heartbeat) -> StoreResult<Pulse> {
        Ok(self.with(|state, now| state.heartbeat(beat, self.flaw, now)))
    }

    async fn claim(&self, replica: ReplicaId, limit: u32, shares: &Shares) -> StoreResult<Vec<Lease>> {
        Ok(self.with(|state, now| state.claim(replica, limit, shares, self.flaw, now)))
    }

    async fn owned(&self, replica: ReplicaId) -> StoreResult<Vec<Lease>> {
        Ok(self.with(|state, _| state.owned(replica)))
    }

    async fn weigh(&self, leases: &[Lease]) -> StoreResult<Vec<Weighed>> {
        Ok(self.with(|state, _| state.weigh(leases)))
    }

    async fn load(&self, leases: &[Lease]) -> StoreResult<Vec<Snapshot>> {
        let mut found = self.with(|state, _| state.load(leases));
        if self.flaw == Flaw::OutageAges {
            for record in found.iter_mut().flat_map(|snapshot| &mut snapshot.stages) {
                record.outage_since = record.outage_since.map(|since| since - Duration::from_hours(1));
            }
        }
        if self.flaw == Flaw::OwnersForgotten {
            for record in found.iter_mut().flat_map(|snapshot| &mut snapshot.stages) {
                if record.state == StageState::Running {
                    (record.state, record.not_before) = (StageState::Waiting, record.started_at);
                }
            }
        }
        Ok(found)
    }

    async fn signals(&self, leases: &[Lease]) -> StoreResult<Vec<(RunId, Vec<Signal>)>> {
        let mut found = self.with(|state, _| state.signals(leases));
        if self.flaw == Flaw::EditsDropped {
            for signal in found.iter_mut().flat_map(|(_, signals)| signals) {
                if let SignalKind::Approve { output, .. } = &mut signal.kind {
                    *output = None;
                }
            }
        }
        Ok(found)
    }

    async fn commit(&self, commits: &[Commit]) -> StoreResult<Vec<Committed>> {
        self.with(|state, now| state.commit(commits, self.flaw, now))
    }

    async fn release(&self, leases: &[Lease]) -> StoreResult<()> {
        self.with(|state, now| state.release(leases, now));
        Ok(())
    }

    async fn put_back(&self, back: &[PutBack]) -> StoreResult<()> {
        self.with(|state, now| state.put_back(back, self.flaw, now));
        Ok(())
    }

    async fn leave(&self, replica: ReplicaId) -> StoreResult<()> {
        self.with(|state, now| state.leave(replica, now));
        Ok(())
    }

    async fn queue(&self) -> StoreResult<QueueStats> {
        Ok(self.with(|state, now| state.queue(now)))
    }

    async fn news(&self, seen: &[(RunId, u64)], limit: u32) -> StoreResult<Vec<(RunId, Vec<Event>)>> {
        let news = |state: &mut State, (run, after): &(RunId, u64)| {
            let tenant = state.runs.get(run)?.record.tenant.clone();
            Some((*run, state.events(&tenant, *run, *after, limit, self.flaw)))
        };
        Ok(self.with(|state, _| {
            seen.iter().filter_map(|seen| news(state, seen)).filter(|(_, events)| !events.is_empty()).collect()
        }))
    }

    async fn backlog(&self, tenant: Option<&TenantId>) -> StoreResult<Vec<Backlog>> {
        Ok(self.with(|state, now| state.backlog(tenant, now)))
    }

    async fn depths(&self) -> StoreResult<Vec<(TenantId, u64)>> {
        Ok(self.with(|state, now| state.depths(now)))
    }

    async fn replicas(&self, tenant: Option<&TenantId>) -> StoreResult<Vec<ReplicaRecord>> {
        Ok(self.with(|state, now| state.replicas(tenant, now)))
    }

    async fn kept(&self, after: Option<RunId>, created_before: DateTime<Utc>, limit: u32) -> StoreResult<Vec<Kept>> {
        Ok(self.with(|state, _| state.kept(after, created_before, limit)))
    }

    async fn purge(&self, runs: &[RunId], now: DateTime<Utc>) -> StoreResult<u64> {
        Ok(self.with(|state, _| state.purge(runs, now)))
    }

    async fn delete(&self, runs: &[RunId]) -> StoreResult<Vec<RunId>> {
        Ok(self.with(|state, _| state.delete(runs)))
    }

    async fn create_key(&self, key: &NewApiKey) -> StoreResult<()> {
        self.with(|state, _| {
            if state.api_keys.iter().all(|(_, known)| known.id != key.key.id) {
                state.api_keys.push((key.hash, key.key.clone()));
            }
        });
        Ok(())
    }

    async fn key_by_hash(&self, hash: &[u8; 32]) -> StoreResult<Option<ApiKey>> {
        Ok(self.with(|state, _| state.api_keys.iter().find(|(known, _)| known == hash).map(|(_, key)| key.clone())))
    }

    async fn keys(&self, tenant: Option<&TenantId>) -> StoreResult<Vec<ApiKey>> {
        let mut keys: Vec<ApiKey> = self.with(|state, _| {
            let ours = state.api_keys.iter().filter(|(_, key)| tenant.is_none_or(|tenant| key.tenant == *tenant));
            ours.map(|(_, key)| key.clone()).collect()
        });
        keys.sort_by(|a, b| (&a.tenant, a.created_at, a.id).cmp(&(&b.tenant, b.created_at, b.id)));
        Ok(keys)
    }

    async fn revoke_key(&self, id: KeyId, now: DateTime<Utc>) -> StoreResult<bool> {
        Ok(self.with(|state, _| {
            let Some((_, key)) = state.api_keys.iter_mut().find(|(_, key)| key.id == id) else { return false };
            key.revoked_at.get_or_insert(now);
            true
        }))
    }

    async fn ping(&self) -> StoreResult<()> {
        if self.closed.load(Ordering::Relaxed) {
            return Err(StoreError::Unavailable("the store is closed".to_owned()));
        }
        Ok(())
    }

    fn kind(&self) -> &'static str {
        "memory"
    }

    async fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }
}
