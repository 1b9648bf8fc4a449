//! What durable runs cost on a file: submits runs and commits their steps in batches, as the engine's group commit
//! does, and prints what a second does. `cargo run --release -p stagegate-store-sqlite --example load -- [batch] [runs]
//! [folder] [puts]`; `puts` adds a cache entry a stage, as a provider's answer makes one.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use serde_json::json;
use stagegate_core::{
    Assessment, Attempt, CallPurpose, Checkpoint, Epoch, Evaluator, Event, EventKind, LedgerEntry, ModelRef, Origin,
    PipelineName, ReplicaId, RunId, RunState, StageId, StageState, Store, TenantId, Totals, Usage, Usd, Verdict,
    cache::{CacheKey, CacheTier},
    fair::Limits,
    store::{Commit, Disposition, Heartbeat, Lease, NewRun, StageRecord},
};
use stagegate_store_sqlite::SqliteStore;
use stagegate_telemetry::Metrics;
use uuid::Uuid;

const STAGES: usize = 5;
/// Groups of runs under way beside each other: one is being written while the others' providers answer.
const GROUPS: usize = 2;

type Failure = Box<dyn std::error::Error + Send + Sync>;

struct Load {
    store: Arc<dyn Store>,
    cache: Arc<dyn CacheTier>,
    replica: ReplicaId,
    tenant: TenantId,
    pipeline: PipelineName,
    stages: Vec<StageId>,
    text: String,
    now: DateTime<Utc>,
    with_puts: bool,
}

impl Load {
    fn run(&self, n: usize) -> NewRun {
        let id = RunId::new(self.now + Duration::from_micros(n as u64 * 500), random(n));
        let event = |seq, kind| Event::new(seq, self.now, kind);
        NewRun {
            id,
            tenant: self.tenant.clone(),
            pipeline: self.pipeline.clone(),
            version: 1,
            stages_total: 5,
            input: json!({"brief": self.text}).into(),
            cache_mode: None,
            priority: 0,
            labels: [].into(),
            idempotency: None,
            request_id: Some("0190aaaa-aaaa-7aaa-8aaa-aaaaaaaaaaaa".to_owned()),
            created_at: self.now,
            start_at: None,
            limits: Limits::default(),
            deadline_at: self.now + Duration::from_hours(1),
            events: vec![
                event(1, EventKind::RunAccepted { pipeline: self.pipeline.clone(), version: 1 }),
                event(2, EventKind::RunStarted),
                event(3, EventKind::StageStarted { stage: self.stages[0].clone(), attempt: 1 }),
            ],
            stages: vec![self.record(0, StageState::Running)],
            lease_to: Some(self.replica),
        }
    }

    fn record(&self, n: usize, state: StageState) -> StageRecord {
        let done = state == StageState::Succeeded;
        StageRecord {
            state,
            attempt: 1,
            verdict: done.then_some(Verdict::Accepted),
            score: done.then_some(1.0),
            model: done.then(model),
            origin: done.then_some(Origin::Provider),
            totals: if done { totals() } else { Totals::default() },
            started_at: Some(self.now),
            finished_at: done.then_some(self.now),
            ..StageRecord::pending(self.stages[n].clone())
        }
    }

    /// A stage ends and the next one starts, or the run ends.
    fn step(&self, run: RunId, n: usize) -> Commit {
        let last = n + 1 == STAGES;
        let first_seq = 4 + n as u64 * 3;
        let id = &self.stages[n];
        let mut stages = vec![self.record(n, StageState::Succeeded)];
        let started = |of: &StageId| EventKind::StageStarted { stage: of.clone(), attempt: 1 };
        let mut kinds = vec![started(id), started(id)];
        if last {
            kinds.push(EventKind::RunStarted);
        } else {
            stages.push(self.record(n + 1, StageState::Running));
            kinds.push(started(&self.stages[n + 1]));
        }
        let event = |(seq, kind)| Event::new(seq, self.now, kind);
        Commit {
            lease: Lease { run, epoch: Epoch(1) },
            events: (first_seq..).zip(kinds).map(event).collect(),
            stages,
            attempts: vec![(id.clone(), self.attempt())],
            checkpoints: vec![(id.clone(), self.checkpoint())],
            state: if last { RunState::Succeeded } else { RunState::Running },
            stages_done: u32::try_from(n + 1).unwrap_or(0),
            totals: totals(),
            failure: None,
            started_at: Some(self.now),
            finished_at: last.then_some(self.now),
            output: last.then(|| json!({"text": self.text}).into()),
            output_of: Vec::new(),
            consumed: Vec::new(),
            then: if last { Disposition::End } else { Disposition::Keep },
        }
    }

    fn attempt(&self) -> Attempt {
        Attempt {
            number: 1,
            started_at: self.now,
            finished_at: self.now,
            verdict: Verdict::Accepted,
            assessments: vec![Assessment {
                evaluator: Evaluator::Judge,
                name: "schema".to_owned(),
                version: 1,
                passed: true,
                score: 1.0,
                threshold: 1.0,
                reason: String::new(),
                detail: None,
                model: None,
                scale: None,
                judge_failure: None,
                rest: stagegate_core::Rest::default(),
            }],
            calls: vec![LedgerEntry {
                purpose: CallPurpose::Stage,
                model: model(),
                origin: Origin::Provider,
                usage: Usage::default(),
                cost_usd: Usd::from_nanos(1_000),
                saved_usd: Usd::from_nanos(0),
                unknown: false,
                priced: true,
                latency_ms: 12,
                error: None,
                rest: stagegate_core::Rest::default(),
            }],
            // The checkpoint has it.
            output: None,
            failure: None,
            rest: stagegate_core::Rest::default(),
        }
    }

    fn checkpoint(&self) -> Checkpoint {
        Checkpoint {
            output: json!({"text": self.text}).into(),
            digest: "ab".repeat(32),
            attempt: 1,
            verdict: Verdict::Accepted,
            score: Some(1.0),
            model: Some(model()),
            origin: Origin::Provider,
            created_at: self.now,
        }
    }

    async fn put(&self, run: RunId, n: usize) -> Result<(), Failure> {
        let mut key = [0; 32];
        key[..16].copy_from_slice(run.0.as_bytes());
        key[16] = u8::try_from(n).unwrap_or(0);
        let key = CacheKey(key);
        let ttl = Duration::from_hours(1);
        self.cache
            .put(&self.tenant, key, self.text.as_bytes(), 1, ttl)
            .await
            .map_err(|error| format!("{error:?}").into())
    }

    /// A group of runs from their submit to their end, all of them in step.
    async fn group(&self, first: usize, batch: usize) -> Result<(), Failure> {
        let runs: Vec<NewRun> = (first..first + batch).map(|n| self.run(n)).collect();
        self.store.submit(&runs).await?;
        for n in 0..STAGES {
            if self.with_puts {
                for put in futures::future::join_all(runs.iter().map(|run| self.put(run.id, n))).await {
                    put?;
                }
            }
            let steps: Vec<Commit> = runs.iter().map(|run| self.step(run.id, n)).collect();
            self.store.commit(&steps).await?;
        }
        Ok(())
    }
}

fn random(n: usize) -> [u8; 10] {
    let hash = (n as u128).wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835).to_le_bytes();
    let mut bytes = [0; 10];
    bytes.copy_from_slice(&hash[3..13]);
    bytes
}

fn model() -> ModelRef {
    ModelRef::new("sim/quick").unwrap_or_else(|_| unreachable!("a valid literal"))
}

fn totals() -> Totals {
    Totals { calls: 1, ..Totals::default() }
}

fn megabytes(path: &std::path::Path) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    path.metadata().map_or(0.0, |of| of.len() as f64 / 1e6)
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, or: usize| arguments.get(at).and_then(|text| text.parse().ok()).unwrap_or(or);
    let (batch, runs) = (number(0, 64), number(1, 20_000));
    let folder = arguments.get(2).map_or_else(std::env::temp_dir, PathBuf::from);
    let folder = tempfile::tempdir_in(folder)?;
    let path = folder.path().join("stagegate.db");
    let store = SqliteStore::open(&path, Metrics::new()).await?;
    let replica = ReplicaId(Uuid::from_u128(7));
    let load = Arc::new(Load {
        cache: store.cache_tier(),
        store: Arc::new(store),
        replica,
        tenant: TenantId::default(),
        pipeline: PipelineName::new("brief-to-spec")?,
        stages: (1..=STAGES).map(|n| StageId::new(format!("stage-{n}"))).collect::<Result<_, _>>()?,
        text: "durable words ".repeat(73),
        now: DateTime::from_timestamp_millis(1_767_225_600_000).unwrap_or_default(),
        with_puts: arguments.get(3).is_some_and(|word| word == "puts"),
    });
    let ttl = Duration::from_hours(1);
    let beat = Heartbeat {
        replica,
        name: "load".to_owned(),
        version: "0".to_owned(),
        draining: false,
        ttl,
        capabilities: stagegate_core::Capabilities::own(),
        way_back: Duration::ZERO,
    };
    load.store.heartbeat(&beat).await?;
    let next = Arc::new(AtomicUsize::new(0));
    let since = Instant::now();
    let tasks: Vec<_> = (0..GROUPS)
        .map(|_| {
            let (load, next) = (load.clone(), next.clone());
            tokio::spawn(async move {
                loop {
                    let first = next.fetch_add(batch, Ordering::Relaxed);
                    if first >= runs {
                        return Ok::<(), Failure>(());
                    }
                    load.group(first, batch).await?;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await??;
    }
    let took = since.elapsed().as_secs_f64();
    let done = next.load(Ordering::Relaxed) - GROUPS * batch;
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let rate = done as f64 / took;
    println!(
        "batch {batch}: {done} runs in {took:.1} s = {rate:.0} runs/s; file {:.0} MB, log {:.0} MB",
        megabytes(&path),
        megabytes(&path.with_extension("db-wal"))
    );
    load.store.close().await;
    Ok(())
}
