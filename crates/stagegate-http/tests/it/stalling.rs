//! A store that can be made to hang: it takes every question and answers none.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use stagegate_core::{
    Event, KeyId, PipelineName, ReplicaId, RunId, StageId, Store, StoreResult, TenantId,
    fair::Shares,
    store::{
        ApiKey, Backlog, Commit, Committed, Heartbeat, Idempotency, Kept, Lease, NewApiKey, NewRun, NewSignal,
        NewVersion, PipelineVersion, Pulse, PutBack, QueueStats, Registered, ReplicaRecord, RunDetail, RunQuery,
        RunRecord, Signal, Signalled, Snapshot, StageDetail, Submitted, Weighed,
    },
};
use tokio::sync::watch;

/// Passes everything on, except while it hangs.
#[derive(Debug)]
pub(crate) struct Stalling {
    inner: Arc<dyn Store>,
    hangs: watch::Sender<bool>,
    /// How many calls have hung, by their names.
    hung: Mutex<HashMap<&'static str, usize>>,
}

impl Stalling {
    pub(crate) fn new(inner: Arc<dyn Store>) -> Self {
        Self { inner, hangs: watch::Sender::new(false), hung: Mutex::default() }
    }

    /// Whether it hangs from here on.
    pub(crate) fn hang(&self, hangs: bool) {
        self.hangs.send_replace(hangs);
    }

    /// How many calls of this name came while it hung.
    pub(crate) fn hung(&self, name: &str) -> usize {
        self.hung.lock().unwrap_or_else(PoisonError::into_inner).get(name).copied().unwrap_or(0)
    }

    async fn wait(&self, name: &'static str) {
        if *self.hangs.borrow() {
            *self.hung.lock().unwrap_or_else(PoisonError::into_inner).entry(name).or_default() += 1;
        }
        // The sender lives as long as this does.
        let _ = self.hangs.subscribe().wait_for(|hangs| !hangs).await;
    }
}

macro_rules! pass_on {
    ($(fn $name:ident($($arg:ident: $kind:ty),*) -> $answer:ty;)*) => {
        #[async_trait]
        impl Store for Stalling {
            $(async fn $name(&self, $($arg: $kind),*) -> $answer {
                self.wait(stringify!($name)).await;
                self.inner.$name($($arg),*).await
            })*

            fn kind(&self) -> &'static str {
                self.inner.kind()
            }
        }
    };
}

pass_on! {
    fn register(new: &NewVersion) -> StoreResult<Registered>;
    fn pipeline(tenant: &TenantId, name: &PipelineName, version: Option<u32>) -> StoreResult<Option<PipelineVersion>>;
    fn pipelines(tenant: &TenantId, after: Option<&PipelineName>, limit: u32) -> StoreResult<Vec<PipelineVersion>>;
    fn versions(tenant: &TenantId, name: &PipelineName, before: Option<u32>, limit: u32)
        -> StoreResult<Vec<PipelineVersion>>;
    fn submit(runs: &[NewRun]) -> StoreResult<Vec<Submitted>>;
    fn replay(tenant: &TenantId, asked: &Idempotency, now: DateTime<Utc>) -> StoreResult<Option<Submitted>>;
    fn run(tenant: &TenantId, id: RunId) -> StoreResult<Option<RunDetail>>;
    fn run_record(tenant: &TenantId, id: RunId) -> StoreResult<Option<RunRecord>>;
    fn runs(query: &RunQuery) -> StoreResult<Vec<RunRecord>>;
    fn stage(tenant: &TenantId, run: RunId, stage: &StageId) -> StoreResult<Option<StageDetail>>;
    fn events(tenant: &TenantId, run: RunId, after: u64, limit: u32) -> StoreResult<Vec<Event>>;
    fn news(seen: &[(RunId, u64)], limit: u32) -> StoreResult<Vec<(RunId, Vec<Event>)>>;
    fn signal(signal: &NewSignal) -> StoreResult<Signalled>;
    fn heartbeat(beat: &Heartbeat) -> StoreResult<Pulse>;
    fn claim(replica: ReplicaId, limit: u32, shares: &Shares) -> StoreResult<Vec<Lease>>;
    fn owned(replica: ReplicaId) -> StoreResult<Vec<Lease>>;
    fn weigh(leases: &[Lease]) -> StoreResult<Vec<Weighed>>;
    fn load(leases: &[Lease]) -> StoreResult<Vec<Snapshot>>;
    fn signals(leases: &[Lease]) -> StoreResult<Vec<(RunId, Vec<Signal>)>>;
    fn commit(commits: &[Commit]) -> StoreResult<Vec<Committed>>;
    fn release(leases: &[Lease]) -> StoreResult<()>;
    fn put_back(back: &[PutBack]) -> StoreResult<()>;
    fn leave(replica: ReplicaId) -> StoreResult<()>;
    fn queue() -> StoreResult<QueueStats>;
    fn backlog(tenant: Option<&TenantId>) -> StoreResult<Vec<Backlog>>;
    fn depths() -> StoreResult<Vec<(TenantId, u64)>>;
    fn replicas(tenant: Option<&TenantId>) -> StoreResult<Vec<ReplicaRecord>>;
    fn kept(after: Option<RunId>, created_before: DateTime<Utc>, limit: u32) -> StoreResult<Vec<Kept>>;
    fn purge(runs: &[RunId], now: DateTime<Utc>) -> StoreResult<u64>;
    fn delete(runs: &[RunId]) -> StoreResult<Vec<RunId>>;
    fn create_key(key: &NewApiKey) -> StoreResult<()>;
    fn key_by_hash(hash: &[u8; 32]) -> StoreResult<Option<ApiKey>>;
    fn keys(tenant: Option<&TenantId>) -> StoreResult<Vec<ApiKey>>;
    fn revoke_key(id: KeyId, now: DateTime<Utc>) -> StoreResult<bool>;
    fn ping() -> StoreResult<()>;
    fn close() -> ();
}
