//! A store whose methods fail on demand, in front of a real one.

use std::{
    any::Any,
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
use tokio::sync::watch;

/// How a method fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing happens, and an error comes at once.
    Refuse,
    /// Nothing happens, and an error comes at once, where it is asked for more than one run.
    RefuseMany,
    /// It happens, and its answer is lost; once.
    LoseOnce,
    /// It happens, and its answer comes when the fault is mended.
    HoldAnswer,
    /// It happens when the fault is mended.
    Hang,
    /// It never happens, and is never answered; once.
    HangOnce,
}

/// One fault, at one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Injection {
    pub(crate) method: &'static str,
    /// Which call of the method, from 1. Counted by method and not over all, because the order in which a heartbeat, a
    /// look for work and a commit come is chance, and each of them must be met.
    pub(crate) nth: usize,
    /// Counts only calls whose answer tells something: leases that were found, runs that have signals.
    pub(crate) telling: bool,
    pub(crate) how: How,
}

/// What happens at that call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    /// It does not happen, and an error is reported.
    FailBefore,
    /// It happens, and an error is reported.
    FailAfter,
    /// It does not happen, and the caller's process is gone.
    KillBefore,
    /// It happens, and the caller's process is gone before it knows.
    KillAfter,
}

impl How {
    pub(crate) fn is_before(self) -> bool {
        matches!(self, Self::FailBefore | Self::KillBefore)
    }

    pub(crate) fn kills(self) -> bool {
        matches!(self, Self::KillBefore | Self::KillAfter)
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Faulty {
    inner: Arc<dyn Store>,
    faults: Mutex<HashMap<&'static str, Fault>>,
    calls: Mutex<HashMap<&'static str, usize>>,
    /// Calls whose answer told something.
    telling: Mutex<HashMap<&'static str, usize>>,
    injections: Vec<(Injection, watch::Sender<bool>)>,
    /// The process on this side of the store is gone: nothing of it comes through any more.
    dead: watch::Sender<bool>,
}

impl Faulty {
    pub(crate) fn before(inner: Arc<dyn Store>) -> Arc<Self> {
        Self::with(inner, Vec::new())
    }

    /// With faults that strike by themselves; each tells when it did.
    pub(crate) fn with(inner: Arc<dyn Store>, injections: Vec<(Injection, watch::Sender<bool>)>) -> Arc<Self> {
        let (faults, calls, telling) = (Mutex::default(), Mutex::default(), Mutex::default());
        Arc::new(Self { inner, faults, calls, telling, injections, dead: watch::Sender::new(false) })
    }

    /// Nothing of its caller comes through any more, and nothing is answered.
    pub(crate) fn kill(&self) {
        self.dead.send_replace(true);
    }

    pub(crate) fn is_dead(&self) -> bool {
        *self.dead.borrow()
    }

    /// Waits for its caller's death.
    pub(crate) async fn died(&self) {
        let _ = self.dead.subscribe().wait_for(|dead| *dead).await;
    }

    /// How often each method was called, and how often its answer told something.
    pub(crate) fn counts(&self) -> [HashMap<&'static str, usize>; 2] {
        [&self.calls, &self.telling].map(|counts| counts.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    fn struck(&self, method: &'static str, nth: usize, telling: bool) -> Option<&(Injection, watch::Sender<bool>)> {
        let is = |at: &Injection| (at.method, at.nth, at.telling) == (method, nth, telling);
        self.injections.iter().find(|(at, _)| is(at))
    }

    /// The call as it is, or as an injection wants it.
    async fn injected<T: Send + 'static>(
        &self,
        method: &'static str,
        nth: usize,
        call: impl Future<Output = StoreResult<T>> + Send,
    ) -> StoreResult<T> {
        let strikes = self.struck(method, nth, false);
        if let Some((at, fired)) = strikes.filter(|(at, _)| at.how.is_before()) {
            return self.strike(*at, fired).await;
        }
        let answer = call.await;
        let strikes =
            if tells(&answer) { strikes.or(self.struck(method, count(&self.telling, method), true)) } else { strikes };
        match strikes {
            Some((at, fired)) => self.strike(*at, fired).await,
            None => answer,
        }
    }

    async fn strike<T: Send>(&self, at: Injection, fired: &watch::Sender<bool>) -> StoreResult<T> {
        if at.how.kills() {
            self.kill();
        }
        fired.send_replace(true);
        if at.how.kills() {
            std::future::pending::<()>().await;
        }
        Err(StoreError::Unavailable(format!("{}, call {}: a fault of the test", at.method, at.nth)))
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
        self.call_after(method, self.calls(method)).await;
    }

    /// Waits until it was called more than so many times: of what may be called before one begins to wait.
    pub(crate) async fn call_after(&self, method: &'static str, calls: usize) {
        while self.calls(method) <= calls {
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

    async fn through<T: Send + 'static>(
        &self,
        method: &'static str,
        call: impl Future<Output = StoreResult<T>> + Send,
    ) -> StoreResult<T> {
        if self.is_dead() {
            std::future::pending::<()>().await;
        }
        let nth = count(&self.calls, method);
        let answer = self.by_fault(method, self.injected(method, nth, call)).await;
        if self.is_dead() {
            std::future::pending::<()>().await;
        }
        answer
    }

    async fn by_fault<T: Send>(
        &self,
        method: &'static str,
        call: impl Future<Output = StoreResult<T>> + Send,
    ) -> StoreResult<T> {
        let lost = || StoreError::Unavailable(format!("{method}: a fault of the test"));
        match self.fault(method) {
            None | Some(Fault::RefuseMany) => call.await,
            Some(Fault::Refuse) => Err(lost()),
            Some(Fault::LoseOnce) => {
                self.mend(method);
                call.await?;
                Err(lost())
            }
            Some(Fault::HangOnce) => {
                self.mend(method);
                std::future::pending().await
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

/// Counts one more, and says how many that makes.
fn count(counts: &Mutex<HashMap<&'static str, usize>>, method: &'static str) -> usize {
    let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
    let calls = counts.entry(method).or_default();
    *calls += 1;
    *calls
}

/// Whether there is something in the answer of a method that is called again and again, mostly for nothing.
fn tells<T: 'static>(answer: &StoreResult<T>) -> bool {
    let Ok(answer) = answer else { return false };
    let answer: &dyn Any = answer;
    answer.downcast_ref::<Vec<s::Lease>>().is_some_and(|leases| !leases.is_empty())
        || answer.downcast_ref::<s::Pulse>().is_some_and(|pulse| !pulse.signalled.is_empty())
}

macro_rules! through {
    ($($method:ident($($arg:ident: $type:ty),*) -> $answer:ty;)*) => {
        #[async_trait]
        impl Store for Faulty {
            $(async fn $method(&self, $($arg: $type),*) -> StoreResult<$answer> {
                self.through(stringify!($method), self.inner.$method($($arg),*)).await
            })*

            async fn load(&self, leases: &[s::Lease]) -> StoreResult<Vec<s::Snapshot>> {
                if leases.len() > 1 && self.fault("load") == Some(Fault::RefuseMany) {
                    return Err(StoreError::Unavailable("load: too much at once, says the test".to_owned()));
                }
                self.through("load", self.inner.load(leases)).await
            }

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
    register(new: &s::NewVersion) -> s::Registered;
    pipeline(tenant: &TenantId, name: &PipelineName, version: Option<u32>) -> Option<s::PipelineVersion>;
    pipelines(tenant: &TenantId, after: Option<&PipelineName>, limit: u32) -> Vec<s::PipelineVersion>;
    versions(tenant: &TenantId, name: &PipelineName, before: Option<u32>, limit: u32) -> Vec<s::PipelineVersion>;
    submit(runs: &[s::NewRun]) -> Vec<s::Submitted>;
    run(tenant: &TenantId, id: RunId) -> Option<s::RunDetail>;
    run_record(tenant: &TenantId, id: RunId) -> Option<s::RunRecord>;
    runs(query: &s::RunQuery) -> Vec<s::RunRecord>;
    stage(tenant: &TenantId, run: RunId, stage: &StageId) -> Option<s::StageDetail>;
    events(tenant: &TenantId, run: RunId, after: u64, limit: u32) -> Vec<Event>;
    replay(tenant: &TenantId, asked: &s::Idempotency, now: DateTime<Utc>) -> Option<s::Submitted>;
    news(seen: &[(RunId, u64)], limit: u32) -> Vec<(RunId, Vec<Event>)>;
    signal(signal: &s::NewSignal) -> s::Signalled;
    heartbeat(beat: &s::Heartbeat) -> s::Pulse;
    claim(replica: ReplicaId, limit: u32, shares: &Shares) -> Vec<s::Lease>;
    owned(replica: ReplicaId) -> Vec<s::Lease>;
    weigh(leases: &[s::Lease]) -> Vec<s::Weighed>;
    signals(leases: &[s::Lease]) -> Vec<(RunId, Vec<s::Signal>)>;
    commit(commits: &[s::Commit]) -> Vec<s::Committed>;
    release(leases: &[s::Lease]) -> ();
    put_back(back: &[s::PutBack]) -> ();
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
