//! What the suite's tests are made of: ids, runs, steps, and a dump of all that is stored of a run.

use std::{sync::Arc, time::Duration};

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use stagegate_core::{
    Assessment, Attempt, CallPurpose, Checkpoint, Code, Epoch, Evaluator, Event, EventKind, Failure, KeyId,
    LedgerEntry, ModelRef, Origin, PipelineName, ReplicaId, Rest, RunId, RunState, StageId, StageState, Store,
    TenantId, Totals, Usage, Usd, Verdict,
    fair::{Limits, Share, Shares},
    store::{
        Commit, Disposition, Heartbeat, Idempotency, Lease, NewRun, NewSignal, RunDetail, RunRecord, Signal,
        SignalKind, Signalled, StageDetail, StageRecord, Submitted,
    },
};
use uuid::Uuid;

/// A text with everything in it that a database may stumble over.
pub const NASTY: &str = "NUL \0 quote ' \" back\\slash \\u0000 {brace,} 🦀 é e\u{301} \u{202e} \u{feff} tab\t line\r\n";

/// Milliseconds after the suite's epoch.
pub fn at(ms: i64) -> DateTime<Utc> {
    DateTime::from_timestamp_millis(1_767_225_600_000 + ms).expect("in range")
}

/// A tenant.
pub fn tenant(name: &str) -> TenantId {
    TenantId::new(name).expect("a valid literal")
}

/// A stage id.
pub fn stage(name: &str) -> StageId {
    StageId::new(name).expect("a valid literal")
}

/// A pipeline name.
pub fn pipeline(name: &str) -> PipelineName {
    PipelineName::new(name).expect("a valid literal")
}

/// A model.
pub fn model() -> ModelRef {
    ModelRef::new("sim/quick").expect("a valid literal")
}

/// A replica that nobody knows yet.
pub fn replica() -> ReplicaId {
    ReplicaId(Uuid::new_v4())
}

/// A key id.
pub fn key_id() -> KeyId {
    KeyId(Uuid::new_v4())
}

/// A run id of that time.
pub fn run_id(ms: i64) -> RunId {
    let random = *Uuid::new_v4().as_bytes();
    RunId::new(at(ms), random[..10].try_into().expect("ten bytes"))
}

/// A queued run of tenant `acme`, accepted at that time.
pub fn new_run(ms: i64) -> NewRun {
    NewRun {
        id: run_id(ms),
        tenant: tenant("acme"),
        pipeline: pipeline("brief-to-spec"),
        version: 1,
        stages_total: 2,
        input: json!({"brief": "a kettle"}).into(),
        cache_mode: None,
        priority: 0,
        labels: [].into(),
        idempotency: None,
        request_id: Some("req-1".to_owned()),
        created_at: at(ms),
        start_at: None,
        limits: Limits::default(),
        deadline_at: at(ms + 3_600_000),
        events: vec![accepted(ms)],
        stages: Vec::new(),
        lease_to: None,
    }
}

/// The same of another tenant.
pub fn of_tenant(name: &str, ms: i64) -> NewRun {
    NewRun { tenant: tenant(name), ..new_run(ms) }
}

/// A queued run with a concurrency key, of which so many may be under way.
pub fn keyed(ms: i64, key: &str, max: u32) -> NewRun {
    NewRun { limits: Limits { pipeline_max: None, key: Some((key.to_owned(), max)) }, ..new_run(ms) }
}

/// Shares by tenant: the weight, and how many runs at most.
pub fn shares(named: &[(&str, u32, Option<u32>)]) -> Shares {
    let named =
        named.iter().map(|(name, weight, max_runs)| (tenant(name), Share { weight: *weight, max_runs: *max_runs }));
    Shares { named: named.collect(), ..Shares::default() }
}

/// The first event of a run.
pub fn accepted(ms: i64) -> Event {
    Event::new(1, at(ms), EventKind::RunAccepted { pipeline: pipeline("brief-to-spec"), version: 1 })
}

/// A run that this replica takes in the same insert, with its first stage under way.
pub fn leased_run(ms: i64, to: ReplicaId) -> NewRun {
    let mut run = new_run(ms);
    run.lease_to = Some(to);
    run.events.push(Event::new(2, at(ms), EventKind::RunStarted));
    run.events.push(event(3, ms, "s1"));
    run.stages = vec![StageRecord {
        state: StageState::Running,
        attempt: 1,
        started_at: Some(at(ms)),
        ..StageRecord::pending(stage("s1"))
    }];
    run
}

/// An event about a stage.
pub fn event(seq: u64, ms: i64, of: &str) -> Event {
    Event::new(seq, at(ms), EventKind::StageStarted { stage: stage(of), attempt: 1 })
}

/// An idempotency key whose request is told by a byte.
pub fn idempotency(key: &str, request: u8) -> Option<Idempotency> {
    Some(Idempotency { key: key.to_owned(), digest: [request; 32] })
}

/// A step that only starts the run: seq `last_seq + 1`, and the owner goes on.
pub fn step(lease: Lease, last_seq: u64) -> Commit {
    Commit {
        lease,
        events: vec![event(last_seq + 1, 10, "s1")],
        stages: Vec::new(),
        attempts: Vec::new(),
        checkpoints: Vec::new(),
        state: RunState::Running,
        stages_done: 0,
        totals: Totals::default(),
        failure: None,
        started_at: Some(at(5)),
        finished_at: None,
        output: None,
        output_of: Vec::new(),
        consumed: Vec::new(),
        then: Disposition::Keep,
    }
}

/// The same, parking the run.
pub fn park(lease: Lease, last_seq: u64, delay: Option<Duration>) -> Commit {
    Commit { state: RunState::Waiting, then: Disposition::Park(delay), ..step(lease, last_seq) }
}

/// The same, ending the run.
pub fn end(lease: Lease, last_seq: u64, state: RunState) -> Commit {
    let failure = (state != RunState::Succeeded).then(|| failure("it broke"));
    Commit { state, failure, finished_at: Some(at(20)), then: Disposition::End, ..step(lease, last_seq) }
}

/// A failure with this message.
pub fn failure(message: &str) -> Failure {
    Failure::new(Code::GateFailed, message).of_stage(stage("s1"))
}

/// Members that this release does not know.
pub fn rest() -> Rest {
    let members = json!({ "retry_hint": { "b": 1, "a": [null, "x"] }, "later": true });
    Rest::of(members.as_object().cloned().unwrap_or_default())
}

/// Totals with a different number everywhere.
pub fn totals(n: u32) -> Totals {
    let base = u64::from(n) * 1_000;
    Totals {
        usage: Usage {
            input_tokens: base + 1,
            cache_read_tokens: base + 2,
            cache_write_tokens: base + 3,
            output_tokens: base + 4,
            reasoning_tokens: base + 5,
            estimated: n % 2 == 1,
        },
        cost_usd: Usd::from_nanos(i64::from(n) * 1_234_567 + 1),
        saved_usd: Usd::from_nanos(i64::from(n) * 7_654_321 + 3),
        calls: n + 6,
        hits: n + 7,
        unpriced_calls: n + 8,
        unknown_calls: n + 9,
        unknown_usd: Usd::from_nanos(i64::from(n) * 11 + 5),
    }
}

/// A stage's row with every field set.
pub fn full_stage(of: &str, text: &str) -> StageRecord {
    StageRecord {
        id: stage(of),
        state: StageState::Waiting,
        attempt: 3,
        round_start: 2,
        former_owners: 4,
        not_before: Some(at(77)),
        verdict: Some(Verdict::Retry),
        score: Some(0.1 + 0.2),
        model: Some(model()),
        origin: Some(Origin::CacheShared),
        totals: totals(1),
        judged: 1,
        outages: 4,
        outage_since: Some(at(70)),
        failure: Some(Failure { rest: rest(), ..failure(text) }),
        started_at: Some(at(11)),
        finished_at: Some(at(12)),
    }
}

/// An attempt with every field set.
pub fn full_attempt(number: u32, text: &str) -> Attempt {
    let usage = totals(number).usage;
    let call = |purpose, origin, error: Option<Code>| LedgerEntry {
        purpose,
        model: model(),
        origin,
        usage,
        cost_usd: Usd::from_nanos(1_234_567_891),
        saved_usd: Usd::from_nanos(7),
        unknown: error.is_some(),
        priced: false,
        latency_ms: 1_234,
        error,
        rest: stagegate_core::Rest::default(),
    };
    Attempt {
        number,
        started_at: at(13),
        finished_at: at(14),
        verdict: Verdict::Held,
        assessments: vec![Assessment {
            evaluator: Evaluator::Judge,
            name: "judge".to_owned(),
            version: 2,
            passed: false,
            score: 1.0 / 3.0,
            threshold: 0.8,
            reason: text.to_owned(),
            detail: Some(format!("it says {text}")),
            model: Some(model()),
            scale: None,
            judge_failure: None,
            rest: rest(),
        }],
        calls: vec![
            call(CallPurpose::Stage, Origin::Provider, None),
            call(CallPurpose::Judge, Origin::Coalesced, Some(Code::ProviderTimeout)),
        ],
        output: Some(nasty_json().into()),
        failure: Some(Failure { detail: Some(format!("the provider says {text}")), rest: rest(), ..failure(text) }),
        rest: Rest::default(),
    }
}

/// A checkpoint with this output.
pub fn checkpoint(output: Value) -> Checkpoint {
    Checkpoint {
        output: output.into(),
        digest: "ab".repeat(32),
        attempt: 1,
        verdict: Verdict::Accepted,
        score: Some(2.0 / 3.0),
        model: Some(model()),
        origin: Origin::Provider,
        created_at: at(15),
    }
}

/// JSON with everything in it that a database may stumble over.
pub fn nasty_json() -> Value {
    json!({
        "z": NASTY, "a": [null, true, -0.0, 1e-320, 1.797_693_134_862_315_7e308, 0.1, u64::MAX, i64::MIN],
        NASTY: {"": [], "empty": {}, "third": 1.0 / 3.0, "whole": 3.0, "int": 3},
    })
}

/// About a mebibyte of JSON that does not compress to nothing.
pub fn large_json() -> Value {
    let words: Vec<String> =
        (0_u32..60_000).map(|n| format!("{:x}-{}", n.wrapping_mul(2_654_435_761), n % 97)).collect();
    let value = json!({"text": words.join(" "), "list": words});
    assert!(value.to_string().len() > 1024 * 1024);
    value
}

/// Reports a replica alive for a minute.
pub async fn alive(store: &Arc<dyn Store>, replica: ReplicaId) {
    assert!(beat(store, replica, Duration::from_mins(1)).await.alive);
}

/// Reports a replica alive for so long.
pub async fn beat(store: &Arc<dyn Store>, replica: ReplicaId, ttl: Duration) -> stagegate_core::store::Pulse {
    let beat = Heartbeat {
        replica,
        name: "host".to_owned(),
        version: "0.1.0".to_owned(),
        draining: false,
        ttl,
        capabilities: stagegate_core::Capabilities::own(),
        way_back: Duration::ZERO,
    };
    store.heartbeat(&beat).await.expect("heartbeat")
}

/// A new replica that is alive for a minute.
pub async fn live_replica(store: &Arc<dyn Store>) -> ReplicaId {
    let id = replica();
    alive(store, id).await;
    id
}

/// Submits one run.
pub async fn submit(store: &Arc<dyn Store>, run: &NewRun) -> Submitted {
    let mut answers = store.submit(std::slice::from_ref(run)).await.expect("submit");
    assert_eq!(answers.len(), 1);
    answers.remove(0)
}

/// Submits a run that `to` owns at once; its last seq is 3.
pub async fn submit_leased(store: &Arc<dyn Store>, ms: i64, to: ReplicaId) -> (NewRun, Lease) {
    let run = leased_run(ms, to);
    assert_eq!(submit(store, &run).await, Submitted::Accepted(Some(Epoch(1))));
    let lease = Lease { run: run.id, epoch: Epoch(1) };
    (run, lease)
}

/// Commits one step.
pub async fn commit(store: &Arc<dyn Store>, step: &Commit) -> stagegate_core::store::Committed {
    let mut answers = store.commit(std::slice::from_ref(step)).await.expect("commit");
    assert_eq!(answers.len(), 1);
    answers.remove(0)
}

/// Leaves a signal as tenant `acme`.
pub async fn signal(store: &Arc<dyn Store>, run: RunId, kind: SignalKind) -> Signalled {
    let signal = NewSignal { tenant: tenant("acme"), run, kind, by: Some("ann".to_owned()) };
    store.signal(&signal).await.expect("signal")
}

/// Claims what there is, lowest run id first.
pub async fn claim_all(store: &Arc<dyn Store>, replica: ReplicaId) -> Vec<Lease> {
    let mut leases = store.claim(replica, 1_000, &Shares::default()).await.expect("claim");
    leases.sort_by_key(|lease| lease.run);
    leases
}

/// Claims until a claim takes none; in the order in which they were taken.
pub async fn claim_out(store: &Arc<dyn Store>, replica: ReplicaId, limit: u32, shares: &Shares) -> Vec<Lease> {
    let mut taken = Vec::new();
    loop {
        let page = store.claim(replica, limit, shares).await.expect("claim");
        assert!(page.len() <= limit as usize, "{} of {limit}", page.len());
        if page.is_empty() {
            return taken;
        }
        taken.extend(page);
    }
}

/// Claims until there is a run to be taken, and takes one.
pub async fn claim_until_one(store: &Arc<dyn Store>, replica: ReplicaId) -> Lease {
    for _ in 0..10_000 {
        if let Some(lease) = store.claim(replica, 1, &Shares::default()).await.expect("claim").pop() {
            return lease;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("there was nothing to claim in ten seconds");
}

/// The database's clock, as it tells it: when a new replica's life began. The replica is gone at once.
pub async fn database_now(store: &Arc<dyn Store>) -> DateTime<Utc> {
    let id = live_replica(store).await;
    let replicas = store.replicas(None).await.expect("replicas");
    store.leave(id).await.expect("leave");
    replicas.into_iter().find(|each| each.id == id).expect("it is there").started_at
}

/// The record of a run of tenant `acme`.
pub async fn record(store: &Arc<dyn Store>, run: RunId) -> RunRecord {
    store.run_record(&tenant("acme"), run).await.expect("read").expect("the run is there")
}

/// Everything that can be read of a run.
#[derive(Debug, PartialEq)]
pub struct Dump {
    /// The run; its stages by id.
    pub detail: RunDetail,
    /// Every stage that has a row.
    pub stages: Vec<StageDetail>,
    /// Every event.
    pub events: Vec<Event>,
}

/// Everything that can be read of a run.
pub async fn dump(store: &Arc<dyn Store>, of: &TenantId, run: RunId) -> Dump {
    let mut detail = store.run(of, run).await.expect("read").expect("the run is there");
    detail.stages.sort_by(|a, b| a.id.cmp(&b.id));
    let mut stages = Vec::new();
    for row in &detail.stages {
        stages.push(store.stage(of, run, &row.id).await.expect("read").expect("the stage is there"));
    }
    let events = store.events(of, run, 0, 10_000).await.expect("read");
    assert_eq!(store.run_record(of, run).await.expect("read").as_ref(), Some(&detail.run));
    Dump { detail, stages, events }
}

/// The signals of one leased run.
pub async fn signals_of(store: &Arc<dyn Store>, lease: Lease) -> Vec<Signal> {
    let mut found = store.signals(&[lease]).await.expect("signals");
    assert!(found.len() <= 1 && found.iter().all(|(run, _)| *run == lease.run), "of this run alone: {found:?}");
    found.pop().map(|(_, signals)| signals).unwrap_or_default()
}

/// A run that has ended and has rows in every table that knows runs, two of them in the ledger.
pub async fn run_with_rows_everywhere(store: &Arc<dyn Store>) -> RunId {
    let owner = live_replica(store).await;
    let run = NewRun { idempotency: idempotency("k", 1), ..leased_run(1, owner) };
    submit(store, &run).await;
    let lease = Lease { run: run.id, epoch: Epoch(1) };
    let work = Commit {
        stages: vec![full_stage("s1", "x")],
        attempts: vec![(stage("s1"), full_attempt(1, "x"))],
        checkpoints: vec![(stage("s1"), checkpoint("out".into()))],
        ..step(lease, 3)
    };
    commit(store, &work).await;
    signal(store, run.id, SignalKind::Cancel).await;
    commit(store, &Commit { output: Some("out".into()), ..end(lease, 4, RunState::Succeeded) }).await;
    run.id
}
