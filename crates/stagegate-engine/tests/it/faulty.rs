//! A store whose methods fail on demand, in front of a real one.

use std::{
    collections::HashMap,
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use stagegate_core::{
    Event, KeyId, PipelineName, ReplicaId, RunId, StageId, Store, StoreError, StoreResult, TenantId, fair::Shares,
    store as s,
};

/// How a method fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing happens, and an error comes at once.
    Refuse,
    /// It happens, and its answer is lost; once.
    LoseOnce,
    /// It happens, and its answer comes when the fault is mended.
    HoldAnswer,
    /// It happens when the fault is mended.
    Hang,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Faulty {
    inner: Arc<dyn Store>,
    faults: Mutex<HashMap<&'static str, Fault>>,
    calls: Mutex<HashMap<&'static str, usize>>,
}

impl Faulty {
    pub(crate) fn before(inner: Arc<dyn Store>) -> Arc<Self> {
        Arc::new(Self { inner, faults: Mutex::default(), calls: Mutex::default() })
    }

    pub(crate) fn set(&self, method: &'static str, fault: Fault) {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).insert(method, fault);
    }

    pub(crate) fn mend(&self, method: &'static str) {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).remove(method);
    }

    /// How often it was called.
    pub(crate) fn calls(&self, method: &'static str) -> usize {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).get(method).copied().unwrap_or(0)
    }

    /// Waits until it is called again.
    pub(crate) async fn next_call(&self, method: &'static str) {
        let before = self.calls(method);
        while self.calls(method) == before {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn fault(&self, method: &'static str) -> Option<Fault> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).get(method).copied()
    }

    async fn mended(&self, method: &'static str) {
        while self.fault(method).is_some() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn through<T>(
        &self,
        method: &'static str,
        call: impl Future<Output = StoreResult<T>> + Send,
    ) -> StoreResult<T> {
        *self.calls.lock().unwrap_or_else(PoisonError::into_inner).entry(method).or_default() += 1;
        let lost = || StoreError::Unavailable(format!("{method}: a fault of the test"));
        match self.fault(method) {
            None => call.await,
            Some(Fault::Refuse) => Err(lost()),
            Some(Fault::LoseOnce) => {
                self.mend(method);
                call.await?;
                Err(lost())
            }
            Some(Fault::HoldAnswer) => {
                let answer = call.await;
                self.mended(method).await;
                answer
            }
            Some(Fault::Hang) => {
                self.mended(method).await;
                call.await
            }
        }
    }
}

macro_rules! through {
    ($($method:ident($($arg:ident: $type:ty),*) -> $answer:ty;)*) => {
        #[async_trait]
        impl Store for Faulty {
            $(async fn $method(&self, $($arg: $type),*) -> StoreResult<$answer> {
                self.through(stringify!($method), self.inner.$method($($arg),*)).await
            })*

            fn kind(&self) -> &'static str {
                self.inner.kind()
            }

            async fn close(&self) {
                self.inner.close().await;
            }
        }
    };
}

through! {
    register(new: &s::NewVersion) -> (s::PipelineVersion, bool);
    pipeline(tenant: &TenantId, name: &PipelineName, version: Option<u32>) -> Option<s::PipelineVersion>;
    pipelines(tenant: &TenantId, after: Option<&PipelineName>, limit: u32) -> Vec<s::PipelineVersion>;
    versions(tenant: &TenantId, name: &PipelineName, before: Option<u32>, limit: u32) -> Vec<s::PipelineVersion>;
    submit(runs: &[s::NewRun]) -> Vec<s::Submitted>;
    run(tenant: &TenantId, id: RunId) -> Option<s::RunDetail>;
    run_record(tenant: &TenantId, id: RunId) -> Option<s::RunRecord>;
    runs(query: &s::RunQuery) -> Vec<s::RunRecord>;
    stage(tenant: &TenantId, run: RunId, stage: &StageId) -> Option<s::StageDetail>;
    events(tenant: &TenantId, run: RunId, after: u64, limit: u32) -> Vec<Event>;
    news(seen: &[(RunId, u64)], limit: u32) -> Vec<(RunId, Vec<Event>)>;
    signal(signal: &s::NewSignal) -> s::Signalled;
    heartbeat(beat: &s::Heartbeat) -> s::Pulse;
    claim(replica: ReplicaId, limit: u32, shares: &Shares) -> Vec<s::Lease>;
    owned(replica: ReplicaId) -> Vec<s::Lease>;
    load(leases: &[s::Lease]) -> Vec<s::Snapshot>;
    signals(leases: &[s::Lease]) -> Vec<(RunId, Vec<s::Signal>)>;
    commit(commits: &[s::Commit]) -> Vec<s::Committed>;
    release(leases: &[s::Lease]) -> ();
    leave(replica: ReplicaId) -> ();
    queue() -> s::QueueStats;
    backlog(tenant: Option<&TenantId>) -> Vec<s::Backlog>;
    depths() -> Vec<(TenantId, u64)>;
    replicas(tenant: Option<&TenantId>) -> Vec<s::ReplicaRecord>;
    kept(after: Option<RunId>, created_before: DateTime<Utc>, limit: u32) -> Vec<s::Kept>;
    purge(runs: &[RunId], now: DateTime<Utc>) -> u64;
    delete(runs: &[RunId]) -> Vec<RunId>;
    create_key(key: &s::NewApiKey) -> ();
    key_by_hash(hash: &[u8; 32]) -> Option<s::ApiKey>;
    keys(tenant: Option<&TenantId>) -> Vec<s::ApiKey>;
    revoke_key(id: KeyId, now: DateTime<Utc>) -> bool;
    ping() -> ();
}
