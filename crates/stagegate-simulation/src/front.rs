//! How one process reaches the store: owns the faults of that way. A call may fail before or after it happened, be
//! late, arrive a second time, cost its process the leases, or be the last that it ever makes. Records each step for the checks.

use std::{future::Future, sync::Arc, time::Duration};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use rand::Rng;
use stagegate_core::{
    Event, KeyId, LedgerEntry, PipelineName, ReplicaId, RunId, StageId, Store, StoreError, StoreResult, TenantId,
    Totals,
    fair::Shares,
    store::{
        ApiKey, Backlog, Commit, Committed, Disposition, Heartbeat, Idempotency, Kept, Lease, NewApiKey, NewRun,
        NewSignal, NewVersion, PipelineVersion, Pulse, PutBack, QueueStats, Registered, ReplicaRecord, RunDetail,
        RunQuery, RunRecord, Signal, Signalled, Snapshot, StageDetail, Submitted, Weighed,
    },
};

use crate::{
    Flaw,
    crasher::Moment,
    store::Row,
    world::{Standing, World},
};

/// Latest that a second arrival comes.
const DUPLICATE_MS: u64 = 20_000;

/// What becomes of one call.
#[derive(Debug, Clone, Copy)]
struct Fate {
    before: Duration,
    after: Duration,
    fails_before: bool,
    fails_after: bool,
    kills_before: bool,
    kills_after: bool,
    /// The leases of its process are gone before it happens, or before its answer is heard.
    lost_before: bool,
    lost_after: bool,
    /// Should its process stop or die meanwhile, it arrives all the same.
    on_the_wire: bool,
    again_after: Option<Duration>,
}

/// The way.
#[derive(Debug, Clone)]
pub(crate) struct Front {
    pub(crate) world: Arc<World>,
    pub(crate) process: usize,
}

impl Front {
    fn fate(&self, method: &'static str) -> Fate {
        let inner = &mut *self.world.lock();
        let (stormy, weather, ttl) = (inner.stormy, inner.weather, inner.checks.ttl_ms);
        let rng = &mut inner.rng;
        let mut fate = Fate {
            before: Duration::from_millis(rng.random_range(0..3)),
            after: Duration::from_millis(rng.random_range(0..2)),
            fails_before: false,
            fails_after: false,
            kills_before: false,
            kills_after: false,
            lost_before: false,
            lost_after: false,
            on_the_wire: false,
            again_after: None,
        };
        if !stormy {
            return fate;
        }
        let bad = weather.only.is_none_or(|only| only == method);
        let longest = u64::try_from(ttl * 3 / 2).unwrap_or(1).max(51);
        let late = |rng: &mut rand::rngs::StdRng| {
            let most = if rng.random_bool(0.3) { longest } else { 400 };
            Duration::from_millis(rng.random_range(50..most))
        };
        if bad && rng.random_bool(weather.delay) {
            fate.before = late(rng);
        }
        if bad && rng.random_bool(weather.delay) {
            fate.after = late(rng);
        }
        let fails = bad && rng.random_bool(weather.fail);
        fate.fails_before = fails && rng.random_bool(0.5);
        fate.fails_after = fails && !fate.fails_before;
        let kills = rng.random_bool(weather.kill);
        fate.kills_before = kills && rng.random_bool(0.5);
        fate.kills_after = kills && !fate.kills_before;
        let lost = bad && rng.random_bool(weather.lose);
        fate.lost_before = lost && rng.random_bool(0.5);
        fate.lost_after = lost && !fate.lost_before;
        fate.on_the_wire = rng.random_bool(0.5);
        if rng.random_bool(weather.duplicate) {
            fate.again_after = Some(Duration::from_millis(rng.random_range(1..DUPLICATE_MS)));
        }
        fate
    }

    /// The way there.
    async fn begin(&self, method: &'static str) -> StoreResult<Fate> {
        self.world.gate(self.process).await;
        let fate = self.fate(method);
        if fate.fails_before || fate.fails_after || fate.before + fate.after > Duration::from_millis(10) {
            self.world.lock().counts.store_faults += 1;
            if ["heartbeat", "signals"].contains(&method) {
                self.world.book(|checks| checks.disturbed(self.process));
            }
        }
        if fate.kills_before && !fate.on_the_wire {
            self.world.kill(self.process);
        }
        sleep(fate.before).await;
        if !(fate.on_the_wire && self.world.standing(self.process) != Standing::Up) {
            self.world.gate(self.process).await;
        }
        if fate.lost_before {
            self.world.lose_lease(self.process, &format!("before {method}"));
        }
        if fate.fails_before {
            self.world.note_by(self.process, || format!("{method} fails before it happened"));
            return Err(StoreError::Unavailable(format!("simulated, before {method}")));
        }
        Ok(fate)
    }

    /// The way back.
    async fn end<T>(&self, method: &'static str, fate: Fate, answer: StoreResult<T>) -> StoreResult<T> {
        if fate.lost_after {
            self.world.lose_lease(self.process, &format!("after {method}"));
        }
        if fate.kills_after || fate.kills_before {
            self.world.kill(self.process);
        }
        sleep(fate.after).await;
        self.world.gate(self.process).await;
        if ["heartbeat", "signals"].contains(&method) && (fate.fails_after || fate.after.as_millis() > 10) {
            self.world.book(|checks| checks.disturbed(self.process));
        }
        if fate.fails_after {
            self.world.note_by(self.process, || format!("{method} fails after it happened"));
            return Err(StoreError::Unavailable(format!("simulated, after {method}")));
        }
        answer
    }

    /// A call that changes nothing, or nothing that the checks are about.
    async fn plain<T>(&self, method: &'static str, call: impl Future<Output = StoreResult<T>>) -> StoreResult<T> {
        let fate = self.begin(method).await?;
        let answer = call.await;
        self.end(method, fate, answer).await
    }

    /// The same call arrives once more, later, whoever is alive then. Nobody hears its answer.
    fn again<F>(&self, fate: Fate, call: impl FnOnce(Self) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        if let Some(later) = fate.again_after {
            self.world.lock().counts.duplicates += 1;
            let call = call(self.clone());
            tokio::spawn(async move {
                tokio::time::sleep(later).await;
                call.await;
            });
        }
    }

    async fn do_submit(&self, runs: &[NewRun]) -> StoreResult<Vec<Submitted>> {
        let answers = self.world.store.submit(runs).await?;
        for (run, answer) in runs.iter().zip(&answers) {
            self.world.check(|checks| checks.submitted(run, answer));
            self.world.note_by(self.process, || format!("SUBMIT {}: {answer:?}", self.world.name_of(run.id)));
        }
        let leased = runs.iter().zip(&answers).filter(|(_, answer)| matches!(answer, Submitted::Accepted(Some(_))));
        self.world.crash(self.process, Moment::Starts, leased.map(|(run, _)| run.id));
        Ok(answers)
    }

    async fn do_commit(&self, commits: &[Commit]) -> StoreResult<Vec<Committed>> {
        let before = self.remember(commits);
        let answers = self.world.store.commit(commits).await?;
        self.world.lock().counts.commits += 1;
        for (commit, answer) in commits.iter().zip(&answers) {
            self.note_commit(commit, *answer);
            let ledger = self.ledger(commit);
            self.world.check(|checks| checks.repeated(commit, *answer));
            self.world.check(|checks| checks.committed(commit, *answer, ledger));
            self.world.check(|checks| checks.bought(self.process, commit, *answer));
            if *answer == Committed::Now {
                self.world.lock().counts.steps(commit);
            }
        }
        let now = self.world.now_ms();
        let written = before.into_iter().zip(&answers).filter(|(_, answer)| **answer == Committed::Now);
        let written = written.filter_map(|(before, _)| before);
        self.world.lock().processes[self.process].unflushed.extend(written.map(|(run, row)| (now, run, row)));
        let goes_on =
            |(commit, answer): &(&Commit, &Committed)| **answer == Committed::Now && commit.then == Disposition::Keep;
        let going_on = commits.iter().zip(&answers).filter(goes_on).map(|(commit, _)| commit.lease.run);
        self.world.crash(self.process, Moment::Starts, going_on);
        Ok(answers)
    }

    /// What was there before, where a crash will bring it back.
    fn remember(&self, commits: &[Commit]) -> Vec<Option<(RunId, Row)>> {
        if self.world.store.flaw != Flaw::FlushNotAwaited {
            return Vec::new();
        }
        let row = |run: RunId| self.world.store.with(|state, _| state.runs.get(&run).map(|row| (run, row.clone())));
        commits.iter().map(|commit| row(commit.lease.run)).collect()
    }

    /// What the run's ledger says, at its end.
    fn ledger(&self, commit: &Commit) -> Option<Totals> {
        (commit.then == Disposition::End).then(|| {
            self.world.store.with(|state, _| {
                let mut totals = Totals::default();
                let row = state.runs.get(&commit.lease.run);
                let attempts = row.into_iter().flat_map(|row| row.attempts.values().flat_map(|all| all.values()));
                attempts.flat_map(|attempt| &attempt.calls).for_each(|call: &LedgerEntry| totals.add(call));
                totals
            })
        })
    }

    fn note_commit(&self, commit: &Commit, answer: Committed) {
        if self.world.is_recorded() {
            let events: Vec<String> = commit
                .events
                .iter()
                .map(|event| match event.kind.stage() {
                    Some(stage) => format!("{} {} {stage}", event.seq, event.kind.name()),
                    None => format!("{} {}", event.seq, event.kind.name()),
                })
                .collect();
            let name = self.world.name_of(commit.lease.run);
            let (epoch, events) = (commit.lease.epoch.0, events.join(", "));
            self.world.note_by(self.process, || format!("COMMIT {name} under epoch {epoch}: {events}: {answer:?}"));
        }
    }

    fn note_leases(&self, what: &str, leases: &[Lease]) {
        if self.world.is_recorded() && !leases.is_empty() {
            let names: Vec<String> = {
                let checks = &self.world.lock().checks;
                leases.iter().map(|lease| format!("{} under epoch {}", checks.name(lease.run), lease.epoch.0)).collect()
            };
            self.world.note_by(self.process, || format!("{what} {}", names.join(", ")));
        }
    }

    async fn do_heartbeat(&self, beat: &Heartbeat) -> StoreResult<Pulse> {
        let pulse = self.world.store.heartbeat(beat).await?;
        self.world.book(|checks| checks.beat(self.process, beat, &pulse));
        if !pulse.alive {
            self.world.note_by(self.process, || "was declared dead".to_owned());
        }
        Ok(pulse)
    }

    async fn slow_heartbeat(&self, beat: &Heartbeat) -> StoreResult<Pulse> {
        self.world.lock().processes[self.process].replica = Some(beat.replica);
        let fate = self.begin("heartbeat").await?;
        let pulse = self.do_heartbeat(beat).await;
        let copy = beat.clone();
        self.again(fate, |front| async move { _ = front.do_heartbeat(&copy).await });
        self.end("heartbeat", fate, pulse).await
    }

    async fn do_release(&self, leases: &[Lease]) -> StoreResult<()> {
        self.world.store.release(leases).await?;
        self.note_leases("hands back", leases);
        self.world.book(|checks| checks.released(leases));
        Ok(())
    }

    async fn do_put_back(&self, back: &[PutBack]) -> StoreResult<()> {
        self.world.store.put_back(back).await?;
        let leases: Vec<Lease> = back.iter().map(|each| each.lease).collect();
        self.note_leases("puts back", &leases);
        self.world.book(|checks| checks.put_back(back));
        Ok(())
    }
}

async fn sleep(length: Duration) {
    if !length.is_zero() {
        tokio::time::sleep(length).await;
    }
}

#[async_trait]
impl Store for Front {
    async fn register(&self, new: &NewVersion) -> StoreResult<Registered> {
        self.plain("register", self.world.store.register(new)).await
    }

    async fn pipeline(
        &self,
        tenant: &TenantId,
        name: &PipelineName,
        version: Option<u32>,
    ) -> StoreResult<Option<PipelineVersion>> {
        self.plain("pipeline", self.world.store.pipeline(tenant, name, version)).await
    }

    async fn pipelines(
        &self,
        tenant: &TenantId,
        after: Option<&PipelineName>,
        limit: u32,
    ) -> StoreResult<Vec<PipelineVersion>> {
        self.plain("pipelines", self.world.store.pipelines(tenant, after, limit)).await
    }

    async fn versions(
        &self,
        tenant: &TenantId,
        name: &PipelineName,
        before: Option<u32>,
        limit: u32,
    ) -> StoreResult<Vec<PipelineVersion>> {
        self.plain("versions", self.world.store.versions(tenant, name, before, limit)).await
    }

    async fn submit(&self, runs: &[NewRun]) -> StoreResult<Vec<Submitted>> {
        let fate = self.begin("submit").await?;
        let answers = self.do_submit(runs).await;
        if fate.again_after.is_some() {
            let copy = runs.to_vec();
            self.again(fate, |front| async move { _ = front.do_submit(&copy).await });
        }
        self.end("submit", fate, answers).await
    }

    async fn replay(
        &self,
        tenant: &TenantId,
        asked: &Idempotency,
        now: DateTime<Utc>,
    ) -> StoreResult<Option<Submitted>> {
        self.plain("replay", self.world.store.replay(tenant, asked, now)).await
    }

    async fn run(&self, tenant: &TenantId, id: RunId) -> StoreResult<Option<RunDetail>> {
        self.plain("run", self.world.store.run(tenant, id)).await
    }

    async fn run_record(&self, tenant: &TenantId, id: RunId) -> StoreResult<Option<RunRecord>> {
        self.plain("run_record", self.world.store.run_record(tenant, id)).await
    }

    async fn runs(&self, query: &RunQuery) -> StoreResult<Vec<RunRecord>> {
        self.plain("runs", self.world.store.runs(query)).await
    }

    async fn stage(&self, tenant: &TenantId, run: RunId, stage: &StageId) -> StoreResult<Option<StageDetail>> {
        self.plain("stage", self.world.store.stage(tenant, run, stage)).await
    }

    async fn events(&self, tenant: &TenantId, run: RunId, after: u64, limit: u32) -> StoreResult<Vec<Event>> {
        self.plain("events", self.world.store.events(tenant, run, after, limit)).await
    }

    async fn news(&self, seen: &[(RunId, u64)], limit: u32) -> StoreResult<Vec<(RunId, Vec<Event>)>> {
        self.plain("news", self.world.store.news(seen, limit)).await
    }

    async fn signal(&self, signal: &NewSignal) -> StoreResult<Signalled> {
        let fate = self.begin("signal").await?;
        let answer = self.world.store.signal(signal).await?;
        self.world.book(|checks| checks.signalled(signal, &answer));
        self.world.note_by(self.process, || {
            format!("SIGNAL {}: {:?}: {answer:?}", self.world.name_of(signal.run), signal.kind)
        });
        self.end("signal", fate, Ok(answer)).await
    }

    async fn heartbeat(&self, beat: &Heartbeat) -> StoreResult<Pulse> {
        // In a task of its own: whoever stops waiting for it does not call it back.
        let (front, beat) = (self.clone(), beat.clone());
        let answer = tokio::spawn(async move { front.slow_heartbeat(&beat).await }).await;
        answer.unwrap_or_else(|_| Err(StoreError::Unavailable("the simulation ends".to_owned())))
    }

    async fn claim(&self, replica: ReplicaId, limit: u32, shares: &Shares) -> StoreResult<Vec<Lease>> {
        let fate = self.begin("claim").await?;
        let leases = self.world.store.claim(replica, limit, shares).await?;
        self.note_leases("CLAIMS", &leases);
        self.world.check(|checks| checks.claimed(replica, &leases));
        {
            let counts = &mut self.world.lock().counts;
            counts.claims += leases.len() as u64;
            counts.resumed += leases.iter().filter(|lease| lease.epoch.0 > 1).count() as u64;
        }
        self.end("claim", fate, Ok(leases)).await
    }

    async fn owned(&self, replica: ReplicaId) -> StoreResult<Vec<Lease>> {
        self.plain("owned", self.world.store.owned(replica)).await
    }

    async fn weigh(&self, leases: &[Lease]) -> StoreResult<Vec<Weighed>> {
        self.plain("weigh", self.world.store.weigh(leases)).await
    }

    async fn load(&self, leases: &[Lease]) -> StoreResult<Vec<Snapshot>> {
        let load = async {
            let snapshots = self.world.store.load(leases).await;
            self.world.crash(self.process, Moment::Loads, snapshots.iter().flatten().map(|each| each.lease.run));
            snapshots
        };
        self.plain("load", load).await
    }

    async fn signals(&self, leases: &[Lease]) -> StoreResult<Vec<(RunId, Vec<Signal>)>> {
        self.plain("signals", self.world.store.signals(leases)).await
    }

    async fn commit(&self, commits: &[Commit]) -> StoreResult<Vec<Committed>> {
        let fate = self.begin("commit").await?;
        let answers = self.do_commit(commits).await;
        if fate.again_after.is_some() {
            let copy = commits.to_vec();
            self.again(fate, |front| async move { _ = front.do_commit(&copy).await });
        }
        let answers = self.end("commit", fate, answers).await?;
        for (commit, answer) in commits.iter().zip(&answers) {
            self.world.book(|checks| checks.acknowledged(commit, *answer));
        }
        Ok(answers)
    }

    async fn release(&self, leases: &[Lease]) -> StoreResult<()> {
        let fate = self.begin("release").await?;
        let answer = self.do_release(leases).await;
        let copy = leases.to_vec();
        self.again(fate, |front| async move { _ = front.do_release(&copy).await });
        self.end("release", fate, answer).await
    }

    async fn put_back(&self, back: &[PutBack]) -> StoreResult<()> {
        let fate = self.begin("put_back").await?;
        let answer = self.do_put_back(back).await;
        let copy = back.to_vec();
        self.again(fate, |front| async move { _ = front.do_put_back(&copy).await });
        self.end("put_back", fate, answer).await
    }

    async fn leave(&self, replica: ReplicaId) -> StoreResult<()> {
        let fate = self.begin("leave").await?;
        self.world.store.leave(replica).await?;
        self.world.note_by(self.process, || "leaves".to_owned());
        self.world.book(|checks| checks.left(replica));
        self.end("leave", fate, Ok(())).await
    }

    async fn queue(&self) -> StoreResult<QueueStats> {
        self.plain("queue", self.world.store.queue()).await
    }

    async fn backlog(&self, tenant: Option<&TenantId>) -> StoreResult<Vec<Backlog>> {
        self.plain("backlog", self.world.store.backlog(tenant)).await
    }

    async fn depths(&self) -> StoreResult<Vec<(TenantId, u64)>> {
        self.plain("depths", self.world.store.depths()).await
    }

    async fn replicas(&self, tenant: Option<&TenantId>) -> StoreResult<Vec<ReplicaRecord>> {
        self.plain("replicas", self.world.store.replicas(tenant)).await
    }

    async fn kept(&self, after: Option<RunId>, created_before: DateTime<Utc>, limit: u32) -> StoreResult<Vec<Kept>> {
        self.plain("kept", self.world.store.kept(after, created_before, limit)).await
    }

    async fn purge(&self, runs: &[RunId], now: DateTime<Utc>) -> StoreResult<u64> {
        self.plain("purge", self.world.store.purge(runs, now)).await
    }

    async fn delete(&self, runs: &[RunId]) -> StoreResult<Vec<RunId>> {
        self.plain("delete", self.world.store.delete(runs)).await
    }

    async fn create_key(&self, key: &NewApiKey) -> StoreResult<()> {
        self.plain("create_key", self.world.store.create_key(key)).await
    }

    async fn key_by_hash(&self, hash: &[u8; 32]) -> StoreResult<Option<ApiKey>> {
        self.plain("key_by_hash", self.world.store.key_by_hash(hash)).await
    }

    async fn keys(&self, tenant: Option<&TenantId>) -> StoreResult<Vec<ApiKey>> {
        self.plain("keys", self.world.store.keys(tenant)).await
    }

    async fn revoke_key(&self, id: KeyId, now: DateTime<Utc>) -> StoreResult<bool> {
        self.plain("revoke_key", self.world.store.revoke_key(id, now)).await
    }

    async fn ping(&self) -> StoreResult<()> {
        self.plain("ping", self.world.store.ping()).await
    }

    fn kind(&self) -> &'static str {
        self.world.store.kind()
    }

    async fn close(&self) {}
}
