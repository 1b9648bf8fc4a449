//! The same random commands into two stores: whatever one answers, the other must answer too, and afterwards both
//! must hold the same.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    sync::Arc,
    time::Duration,
};

use chrono::{DateTime, Utc};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use serde_json::{Value, json};
use stagegate_core::{
    Event, EventKind, Origin, ReplicaId, RunId, RunState, StageId, StageState, Store, TenantId, Verdict,
    fair::{Limits, Share, Shares},
    pipeline::{CacheMode, Labels},
    store::{
        Backlog, Commit, Committed, Disposition, Lease, NewRun, NewSignal, NewVersion, PipelineQuota, PutBack,
        QueueStats, ReplicaRecord, RunQuery, Signal, SignalKind, StageRecord,
    },
};
use uuid::Uuid;

use super::fixtures::{
    NASTY, at, beat, checkpoint, dump, failure, full_attempt, model, nasty_json, pipeline, stage, tenant, totals,
};
use super::plain::passing;

const TENANTS: [&str; 3] = ["acme", "initech", "umbrella"];
const PIPELINES: [&str; 3] = ["a", "b", "c"];
const STAGES: [&str; 3] = ["s1", "s2", "s3"];
/// How often both stores are compared whole.
const COMPARE_EVERY: u32 = 25;

/// Runs `steps` random commands into both stores, which must be fresh.
///
/// # Panics
/// Where they differ; the message names the seed and the step.
pub async fn compare(left: &Arc<dyn Store>, right: &Arc<dyn Store>, seed: u64, steps: u32) {
    let mut world = World::new(left.clone(), right.clone(), seed);
    for step in 1..=steps {
        world.step = step;
        world.random_command().await;
        if step % COMPARE_EVERY == 0 || step == steps {
            world.compare_everything().await;
        }
    }
}

/// What the author of the commands knows.
struct World {
    left: Arc<dyn Store>,
    right: Arc<dyn Store>,
    rng: StdRng,
    seed: u64,
    step: u32,
    now: i64,
    runs: Vec<(TenantId, RunId)>,
    submitted: Vec<NewRun>,
    replicas: Vec<ReplicaId>,
    leases: Vec<Lease>,
    last_seqs: BTreeMap<RunId, u64>,
    attempts: BTreeMap<(RunId, StageId), u32>,
    /// Stages that a commit told something of.
    touched: BTreeSet<(RunId, StageId)>,
    /// The ids of a run's signals in each store, as last read.
    signals: BTreeMap<RunId, (Vec<i64>, Vec<i64>)>,
    /// The last commit, on the left and on the right.
    last_commit: Option<(Commit, Commit)>,
}

/// Asks both stores the same and compares the answers.
macro_rules! both {
    ($world:ident, $store:ident => $ask:expr) => {{
        let $store = &$world.left;
        let left = $ask.await.expect("the left store answers");
        let $store = &$world.right;
        let right = $ask.await.expect("the right store answers");
        assert_eq!(left, right, "{}", $world.place(stringify!($ask)));
        left
    }};
}

fn sorted_signals(mut found: Vec<(RunId, Vec<Signal>)>) -> Vec<(RunId, Vec<Signal>)> {
    found.sort_by_key(|(run, _)| *run);
    found
}

fn pick<T: Clone>(rng: &mut StdRng, from: &[T]) -> Option<T> {
    from.choose(rng).cloned()
}

impl World {
    fn new(left: Arc<dyn Store>, right: Arc<dyn Store>, seed: u64) -> Self {
        Self {
            left,
            right,
            rng: StdRng::seed_from_u64(seed),
            seed,
            step: 0,
            now: 0,
            runs: Vec::new(),
            submitted: Vec::new(),
            replicas: Vec::new(),
            leases: Vec::new(),
            last_seqs: BTreeMap::new(),
            attempts: BTreeMap::new(),
            touched: BTreeSet::new(),
            signals: BTreeMap::new(),
            last_commit: None,
        }
    }

    fn place(&self, ask: &str) -> String {
        let (left, right) = (self.left.kind(), self.right.kind());
        format!("left ({left}) and right ({right}) differ at seed {}, step {}: {ask}", self.seed, self.step)
    }

    async fn random_command(&mut self) {
        self.now += self.rng.random_range(1..50);
        // Each command has milliseconds of its own by both databases' clocks, so that both agree on what has waited
        // longer, and what was made due a moment ago is due.
        tokio::time::sleep(Duration::from_millis(2)).await;
        match self.rng.random_range(0..112) {
            0..5 => self.register().await,
            5..20 => self.submit().await,
            20..28 => self.heartbeat().await,
            28..40 => self.claim().await,
            40..70 => self.commit().await,
            70..74 => self.repeat_commit().await,
            74..86 => self.signal().await,
            86..91 => self.read_signals().await,
            91..95 => self.hand_back().await,
            95..97 => self.leave().await,
            97..100 => self.list().await,
            100..103 => self.news().await,
            103..106 => self.walk().await,
            106..109 => self.purge().await,
            109..111 => self.delete().await,
            _ => self.gauges().await,
        }
    }

    fn uuid(&mut self) -> Uuid {
        uuid::Builder::from_random_bytes(self.rng.random()).into_uuid()
    }

    fn tenant(&mut self) -> TenantId {
        tenant(pick(&mut self.rng, &TENANTS).unwrap_or("acme"))
    }

    fn text(&mut self) -> String {
        let length = self.rng.random_range(0..12);
        let chars: Vec<char> = NASTY.chars().chain('a'..='z').collect();
        (0..length).filter_map(|_| pick(&mut self.rng, &chars)).collect()
    }

    fn json(&mut self) -> Value {
        match self.rng.random_range(0..8) {
            0 => nasty_json(),
            1 => json!(self.rng.random::<f64>()),
            2 => json!(self.rng.random::<u64>()),
            3 => Value::Null,
            4 => json!({ self.text(): [self.text(), self.rng.random::<bool>()] }),
            _ => json!(self.text()),
        }
    }

    async fn register(&mut self) {
        let content: u8 = self.rng.random_range(0..6);
        let name = pipeline(pick(&mut self.rng, &PIPELINES).unwrap_or("a"));
        let definition = json!({"name": name, "content": content});
        let quota = PipelineQuota { pipelines: 2, versions: 8 };
        let (tenant, now) = (self.tenant(), at(self.now));
        let new = NewVersion { tenant, name, digest: [content; 32], definition, now, quota };
        both!(self, store => store.register(&new));
        both!(self, store => store.versions(&new.tenant, &new.name, None, 10));
    }

    async fn submit(&mut self) {
        let mut batch = Vec::new();
        for _ in 0..self.rng.random_range(1..4) {
            // Now and then one that was submitted before, as it was or under another id.
            let again = self.rng.random_bool(0.15).then(|| pick(&mut self.rng, &self.submitted)).flatten();
            let mut run = match again {
                Some(run) => run,
                None => self.new_run(),
            };
            if self.rng.random_bool(0.05) {
                run.id = self.run_id();
            }
            batch.push(run);
        }
        // Two runs of one priority have no order that both stores must share.
        let answers = both!(self, store => store.submit(&batch));
        for (run, answer) in batch.into_iter().zip(answers) {
            use stagegate_core::store::Submitted::Accepted;
            if let Accepted(epoch) = answer {
                self.leases.extend(epoch.map(|epoch| Lease { run: run.id, epoch }));
                if let Entry::Vacant(entry) = self.last_seqs.entry(run.id) {
                    entry.insert(run.events.len() as u64);
                    self.runs.push((run.tenant.clone(), run.id));
                }
                self.submitted.push(run);
            }
        }
    }

    fn run_id(&mut self) -> RunId {
        RunId::new(at(self.now), self.rng.random())
    }

    fn new_run(&mut self) -> NewRun {
        let id = self.run_id();
        // Only a replica that is alive: what remains of a run whose lease is refused is the suite's to say.
        let lease_to = if self.rng.random_bool(0.5) { pick(&mut self.rng, &self.replicas) } else { None };
        let name = pipeline(pick(&mut self.rng, &PIPELINES).unwrap_or("a"));
        let mut events = vec![self.event(1, EventKind::RunAccepted { pipeline: name.clone(), version: 1 })];
        let mut stages = Vec::new();
        if lease_to.is_some() {
            events.push(self.event(2, EventKind::RunStarted));
            stages.push(self.stage_record("s1"));
        }
        let key = self.rng.random_range(0..8_u8);
        let labels: Labels = (0..self.rng.random_range(0..3)).map(|n| (format!("k{n}"), self.text())).collect();
        NewRun {
            id,
            tenant: self.tenant(),
            pipeline: name,
            version: self.rng.random_range(1..3),
            stages_total: 3,
            input: self.json().into(),
            cache_mode: pick(&mut self.rng, &[None, Some(CacheMode::Refresh), Some(CacheMode::Off)]).flatten(),
            // Every run of a tenant has its own, so that its order is decided by more than its time.
            priority: i16::try_from(self.runs.len()).unwrap_or(0) * 7 % 10_007,
            labels,
            idempotency: super::fixtures::idempotency(&format!("key-{key}"), self.rng.random_range(0..2))
                .filter(|_| key < 4),
            request_id: self.rng.random_bool(0.5).then(|| "request".to_owned()),
            created_at: at(self.now),
            start_at: if lease_to.is_none() { self.start_at() } else { None },
            limits: if lease_to.is_none() { self.limits() } else { Limits::default() },
            deadline_at: at(self.now + 60_000),
            events,
            stages,
            lease_to,
        }
    }

    /// None, long ago, or long after this test.
    fn start_at(&mut self) -> Option<DateTime<Utc>> {
        const YEARS_MS: i64 = 20 * 365 * 24 * 3_600_000;
        pick(&mut self.rng, &[None, None, None, Some(at(self.now - 500)), Some(at(self.now + YEARS_MS))]).flatten()
    }

    fn limits(&mut self) -> Limits {
        let pipeline_max = self.rng.random_bool(0.3).then(|| self.rng.random_range(1..4));
        let key = self.rng.random_bool(0.3).then(|| {
            let key = pick(&mut self.rng, &[NASTY, "k", "K/k", ""]).unwrap_or("k");
            (key.to_owned(), self.rng.random_range(1..3))
        });
        Limits { pipeline_max, key }
    }

    fn shares(&mut self) -> Shares {
        let mut shares = Shares::default();
        for name in TENANTS {
            if self.rng.random_bool(0.4) {
                let max_runs = self.rng.random_bool(0.4).then(|| self.rng.random_range(1..6));
                shares.named.insert(tenant(name), Share { weight: self.rng.random_range(1..4), max_runs });
            }
        }
        shares
    }

    fn event(&self, seq: u64, kind: EventKind) -> Event {
        Event::new(seq, at(self.now), kind)
    }

    fn stage_record(&mut self, id: &str) -> StageRecord {
        let state = pick(&mut self.rng, StageState::ALL).unwrap_or_default();
        let some = self.rng.random_bool(0.5);
        StageRecord {
            id: stage(id),
            state,
            attempt: self.rng.random_range(0..9),
            round_start: self.rng.random_range(1..4),
            former_owners: self.rng.random_range(0..3),
            not_before: some.then(|| at(self.now + 5)),
            verdict: some.then_some(Verdict::Accepted),
            score: some.then(|| self.rng.random()),
            model: some.then(model),
            origin: some.then_some(Origin::CacheLocal),
            totals: totals(self.rng.random_range(0..1_000)),
            judged: self.rng.random_range(0..4),
            outages: self.rng.random_range(0..4),
            outage_since: some.then(|| at(self.now)),
            failure: (!some).then(|| failure(&self.text())),
            started_at: some.then(|| at(self.now)),
            finished_at: (!some).then(|| at(self.now)),
        }
    }

    async fn heartbeat(&mut self) {
        let known = self.rng.random_bool(0.6).then(|| pick(&mut self.rng, &self.replicas)).flatten();
        let replica = match known {
            Some(replica) => replica,
            None => ReplicaId(self.uuid()),
        };
        let mut left = beat(&self.left, replica, Duration::from_mins(10)).await;
        let mut right = beat(&self.right, replica, Duration::from_mins(10)).await;
        left.signalled.sort();
        right.signalled.sort();
        let told = |pulse: &stagegate_core::store::Pulse| (pulse.alive, pulse.signalled.clone());
        assert_eq!(told(&left), told(&right), "{}", self.place("heartbeat"));
        if known.is_none() {
            self.replicas.push(replica);
        }
    }

    async fn claim(&mut self) {
        let replica = match pick(&mut self.rng, &self.replicas) {
            Some(replica) if self.rng.random_bool(0.95) => replica,
            _ => ReplicaId(self.uuid()),
        };
        let limit = self.rng.random_range(0..6);
        let shares = self.shares();
        // The order is decided by the rule, so it is compared too.
        let leases = both!(self, store => store.claim(replica, limit, &shares));
        self.leases.extend(leases);
    }

    async fn commit(&mut self) {
        // Leases are never forgotten, so that many of these are stale.
        let recent = self.leases.len().saturating_sub(12);
        let from = if self.rng.random_bool(0.8) { recent } else { 0 };
        let Some(lease) = pick(&mut self.rng, &self.leases[from..]) else { return };
        let step = self.random_step(lease);
        let (left_ids, right_ids) = self.signals.get(&lease.run).cloned().unwrap_or_default();
        let consume = self.rng.random_range(0..=left_ids.len());
        let left = Commit { consumed: left_ids[..consume].to_vec(), ..step.clone() };
        let right = Commit { consumed: right_ids[..consume].to_vec(), ..step };
        self.commit_both(left, right).await;
    }

    fn random_step(&mut self, lease: Lease) -> Commit {
        let last_seq = self.last_seqs.get(&lease.run).copied().unwrap_or(0);
        let first = if self.rng.random_bool(0.95) { last_seq + 1 } else { self.rng.random_range(1..20) };
        let untouched = STAGES.into_iter().find(|id| !self.touched.contains(&(lease.run, stage(id))));
        if let Some(id) = untouched.filter(|_| self.rng.random_bool(0.3)) {
            self.touched.insert((lease.run, stage(id)));
            self.attempts.insert((lease.run, stage(id)), 1);
            return passing(lease, first - 1, &[(id, self.now.max(10))], &[]);
        }
        let count = self.rng.random_range(1..4);
        let events = (first..first + count).map(|seq| self.event(seq, EventKind::RunStarted)).collect();
        let mut stages = Vec::new();
        let mut attempts = Vec::new();
        let mut checkpoints = Vec::new();
        for id in STAGES {
            if self.rng.random_bool(0.5) {
                continue;
            }
            stages.push(self.stage_record(id));
            self.touched.insert((lease.run, stage(id)));
            if self.rng.random_bool(0.5) {
                let number = self.attempts.entry((lease.run, stage(id))).or_default();
                *number += 1;
                attempts.push((stage(id), full_attempt(*number, NASTY)));
            }
            if self.rng.random_bool(0.3) {
                checkpoints.push((stage(id), checkpoint(self.json())));
            }
        }
        let delay = pick(&mut self.rng, &[None, Some(Duration::ZERO), Some(Duration::from_hours(1))]).flatten();
        let (state, then) = match self.rng.random_range(0..10) {
            0..6 => (RunState::Running, Disposition::Keep),
            6..8 => (RunState::Waiting, Disposition::Park(delay)),
            n => (if n == 8 { RunState::Failed } else { RunState::Succeeded }, Disposition::End),
        };
        let ended = then == Disposition::End;
        Commit {
            lease,
            events,
            stages,
            attempts,
            checkpoints,
            state,
            stages_done: self.rng.random_range(0..4),
            totals: totals(self.rng.random_range(0..1_000)),
            failure: (state == RunState::Failed).then(|| failure(&self.text())),
            started_at: Some(at(self.now)),
            finished_at: ended.then(|| at(self.now)),
            output: (state == RunState::Succeeded).then(|| self.json().into()),
            output_of: Vec::new(),
            consumed: Vec::new(),
            then,
        }
    }

    async fn commit_both(&mut self, left: Commit, right: Commit) {
        let answer = self.left.commit(std::slice::from_ref(&left)).await.expect("commit");
        let other = self.right.commit(std::slice::from_ref(&right)).await.expect("commit");
        assert_eq!(answer, other, "{}", self.place(&format!("commit {left:?}")));
        if answer == [Committed::Now] {
            let last = left.events.last().map_or(0, |event| event.seq);
            self.last_seqs.insert(left.lease.run, last);
            self.signals.remove(&left.lease.run);
        }
        self.last_commit = Some((left, right));
    }

    async fn repeat_commit(&mut self) {
        if let Some((left, right)) = self.last_commit.clone() {
            self.commit_both(left, right).await;
        }
    }

    async fn signal(&mut self) {
        // Mostly a young one.
        let recent = if self.rng.random_bool(0.8) { self.runs.len().saturating_sub(10) } else { 0 };
        let Some((owner, run)) = pick(&mut self.rng, &self.runs[recent..]) else { return };
        let of = stage(pick(&mut self.rng, &STAGES).unwrap_or("s1"));
        let kind = match self.rng.random_range(0..6) {
            0 => SignalKind::Cancel,
            1 | 2 => SignalKind::Retry { deadline_at: at(self.now + 1_000) },
            3 => SignalKind::Reject { stage: of, reason: self.text(), attempt: None },
            4 => SignalKind::Approve {
                stage: of,
                attempt: Some(1),
                comment: Some(self.text()),
                output: Some(self.text().as_str().into()),
            },
            _ => SignalKind::approve(of, None),
        };
        let tenant = if self.rng.random_bool(0.9) { owner } else { self.tenant() };
        let signal = NewSignal { tenant, run, kind, by: self.rng.random_bool(0.5).then(|| self.text()) };
        both!(self, store => store.signal(&signal));
    }

    async fn read_signals(&mut self) {
        let recent = self.leases.len().saturating_sub(8);
        let mut leases: Vec<Lease> =
            (0..self.rng.random_range(1..4)).filter_map(|_| pick(&mut self.rng, &self.leases[recent..])).collect();
        leases.sort_by_key(|lease| (lease.run, lease.epoch));
        leases.dedup();
        let left = sorted_signals(self.left.signals(&leases).await.expect("signals"));
        let right = sorted_signals(self.right.signals(&leases).await.expect("signals"));
        let shape = |found: &[(RunId, Vec<Signal>)]| -> Vec<(RunId, SignalKind, Option<String>)> {
            let of = |(run, signals): &(RunId, Vec<Signal>)| {
                let run = *run;
                let flat = signals.clone().into_iter().map(move |each| (run, each.kind, each.by));
                flat.collect::<Vec<_>>()
            };
            found.iter().flat_map(of).collect()
        };
        assert_eq!(shape(&left), shape(&right), "{}", self.place("signals"));
        let ids = |signals: &[Signal]| signals.iter().map(|signal| signal.id).collect();
        for lease in &leases {
            self.signals.remove(&lease.run);
        }
        for ((run, left), (_, right)) in left.iter().zip(&right) {
            self.signals.insert(*run, (ids(left), ids(right)));
        }
    }

    async fn hand_back(&mut self) {
        let recent = self.leases.len().saturating_sub(8);
        let count = self.rng.random_range(1..3);
        let mut leases: Vec<Lease> = (0..count).filter_map(|_| pick(&mut self.rng, &self.leases[recent..])).collect();
        leases.dedup();
        both!(self, store => store.weigh(&leases));
        if self.rng.random_bool(0.5) {
            both!(self, store => store.release(&leases));
            return;
        }
        let crashed = self.rng.random_bool(0.7);
        let after = if self.rng.random_bool(0.8) { Duration::ZERO } else { Duration::from_hours(1) };
        let back: Vec<PutBack> = leases.into_iter().map(|lease| PutBack { lease, after, crashed }).collect();
        both!(self, store => store.put_back(&back));
    }

    async fn leave(&mut self) {
        let Some(replica) = pick(&mut self.rng, &self.replicas) else { return };
        both!(self, store => store.leave(replica));
        self.replicas.retain(|id| *id != replica);
    }

    /// Some runs, old and new.
    fn some_runs(&mut self, most: usize) -> Vec<RunId> {
        let mut ids: Vec<RunId> = (0..self.rng.random_range(0..=most))
            .filter_map(|_| pick(&mut self.rng, &self.runs).map(|(_, run)| run))
            .collect();
        ids.sort();
        ids.dedup();
        ids
    }

    async fn news(&mut self) {
        let runs = self.some_runs(8);
        let seen: Vec<(RunId, u64)> = runs.into_iter().map(|run| (run, self.rng.random_range(0..12))).collect();
        let limit = self.rng.random_range(1..6);
        let sorted = |mut news: Vec<(RunId, Vec<Event>)>| {
            news.sort_by_key(|(run, _)| *run);
            news
        };
        let left = sorted(self.left.news(&seen, limit).await.expect("news"));
        let right = sorted(self.right.news(&seen, limit).await.expect("news"));
        assert_eq!(left, right, "{}", self.place("news"));
    }

    async fn walk(&mut self) {
        let after = pick(&mut self.rng, &self.runs).map(|(_, run)| run).filter(|_| self.now % 3 > 0);
        let before = at(self.rng.random_range(0..self.now + 10));
        let limit = self.rng.random_range(1..30);
        both!(self, store => store.kept(after, before, limit));
    }

    async fn purge(&mut self) {
        let ids = self.some_runs(6);
        let now = at(self.now);
        both!(self, store => store.purge(&ids, now));
    }

    /// What was deleted is forgotten here too, so that it is not submitted anew: its ledger rows are still there.
    async fn delete(&mut self) {
        let ids = self.some_runs(3);
        let sorted = |mut ids: Vec<RunId>| {
            ids.sort();
            ids
        };
        let left = sorted(self.left.delete(&ids).await.expect("delete"));
        let right = sorted(self.right.delete(&ids).await.expect("delete"));
        assert_eq!(left, right, "{}", self.place("delete"));
        self.runs.retain(|(_, run)| !left.contains(run));
        self.submitted.retain(|run| !left.contains(&run.id));
        for run in &left {
            self.last_seqs.remove(run);
        }
    }

    /// What is counted, but for the times.
    async fn gauges(&mut self) {
        let of = self.rng.random_bool(0.5).then(|| self.tenant());
        let timeless = |rows: Vec<Backlog>| {
            let mut rows: Vec<Backlog> = rows.into_iter().map(|row| Backlog { oldest_queued_ms: 0, ..row }).collect();
            rows.sort_by(|a, b| (&a.tenant, &a.pipeline).cmp(&(&b.tenant, &b.pipeline)));
            rows
        };
        let left = timeless(self.left.backlog(of.as_ref()).await.expect("backlog"));
        let right = timeless(self.right.backlog(of.as_ref()).await.expect("backlog"));
        assert_eq!(left, right, "{}", self.place("backlog"));
        let sorted = |mut rows: Vec<(TenantId, u64)>| {
            rows.sort();
            rows
        };
        let left = sorted(self.left.depths().await.expect("depths"));
        let right = sorted(self.right.depths().await.expect("depths"));
        assert_eq!(left, right, "{}", self.place("depths"));
        let timeless = |rows: Vec<ReplicaRecord>| {
            let mut rows: Vec<_> = rows
                .into_iter()
                .map(|row| {
                    (row.id, row.name, row.version, row.alive, row.draining, row.runs, row.oldest_lease_ms.is_some())
                })
                .collect();
            rows.sort();
            rows
        };
        let left = timeless(self.left.replicas(of.as_ref()).await.expect("replicas"));
        let right = timeless(self.right.replicas(of.as_ref()).await.expect("replicas"));
        assert_eq!(left, right, "{}", self.place("replicas"));
    }

    async fn list(&mut self) {
        let of = self.tenant();
        let labels = if self.rng.random_bool(0.3) {
            self.submitted.choose(&mut self.rng).map(|run| run.labels.clone()).unwrap_or_default()
        } else {
            Labels::new()
        };
        let states: Vec<RunState> = RunState::ALL.iter().copied().filter(|_| self.rng.random_bool(0.5)).collect();
        let query = RunQuery {
            tenant: of,
            pipeline: self.rng.random_bool(0.3).then(|| pipeline(pick(&mut self.rng, &PIPELINES).unwrap_or("a"))),
            version: self.rng.random_bool(0.2).then(|| self.rng.random_range(1..3)),
            states,
            labels,
            created_from: self.rng.random_bool(0.2).then(|| at(self.rng.random_range(0..self.now))),
            created_before: self.rng.random_bool(0.2).then(|| at(self.rng.random_range(0..self.now))),
            before: self.rng.random_bool(0.3).then(|| pick(&mut self.rng, &self.runs)).flatten().map(|(_, id)| id),
            limit: self.rng.random_range(1..20),
        };
        both!(self, store => store.runs(&query));
    }

    async fn compare_everything(&mut self) {
        self.gauges().await;
        for (of, run) in &self.runs {
            let (left, right) = (dump(&self.left, of, *run).await, dump(&self.right, of, *run).await);
            assert_eq!(left, right, "{}", self.place("dump"));
        }
        for replica in &self.replicas {
            let mut left = self.left.owned(*replica).await.expect("owned");
            let mut right = self.right.owned(*replica).await.expect("owned");
            left.sort_by_key(|lease| lease.run);
            right.sort_by_key(|lease| lease.run);
            assert_eq!(left, right, "{}", self.place("owned"));
        }
        self.compare_loads().await;
        let timeless = |stats: QueueStats| QueueStats { oldest_queued_ms: 0, ..stats };
        let left = timeless(self.left.queue().await.expect("queue"));
        let right = timeless(self.right.queue().await.expect("queue"));
        assert_eq!(left, right, "{}", self.place("queue"));
        for name in TENANTS {
            both!(self, store => store.pipelines(&tenant(name), None, 10));
        }
    }

    async fn compare_loads(&self) {
        let sorted = |mut snapshots: Vec<stagegate_core::store::Snapshot>| {
            snapshots.sort_by_key(|snapshot| snapshot.lease.run);
            for snapshot in &mut snapshots {
                snapshot.stages.sort_by(|a, b| a.id.cmp(&b.id));
                snapshot.checkpoints.sort_by(|a, b| a.0.cmp(&b.0));
                snapshot.last_attempts.sort_by(|a, b| a.0.cmp(&b.0));
            }
            snapshots
        };
        let mut leases = self.leases.clone();
        leases.sort_by_key(|lease| (lease.run, lease.epoch));
        leases.dedup();
        let left = sorted(self.left.load(&leases).await.expect("load"));
        let right = sorted(self.right.load(&leases).await.expect("load"));
        assert_eq!(left, right, "{}", self.place("load"));
    }
}
