//! Runs that panic their driver or kill their process again and again.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use serde_json::json;
use stagegate_core::{Code, RunState, Store, SystemClock, TenantId, store::RunRecord};
use stagegate_engine::{Action, Engine, config::EngineConfig};
use stagegate_llm::{
    Llm,
    config::LlmConfig,
    prices::Prices,
    provider::{Answer, Finish, Limits, Provider, ProviderError, ProviderRequest},
};
use stagegate_store_sqlite::SqliteStore;
use stagegate_telemetry::Metrics;

use crate::{
    bench::{self, assert_state, finish, quick, submit},
    faulty::Faulty,
};

/// Crashes after which a run fails.
const MAX: u32 = 3;

/// What a call about the bad run does.
#[derive(Debug)]
enum Bad {
    Panics,
    Kills(Mutex<Arc<Faulty>>),
}

/// Answers, except where it is asked about the bad run.
#[derive(Debug)]
struct Deadly {
    bad: Bad,
    mended: AtomicBool,
    calls: AtomicUsize,
    /// How long the others take.
    latency: Duration,
}

impl Deadly {
    fn new(bad: Bad, latency: Duration) -> Arc<Self> {
        Arc::new(Self { bad, mended: AtomicBool::new(false), calls: AtomicUsize::new(0), latency })
    }
}

#[async_trait]
impl Provider for Deadly {
    async fn call(&self, request: ProviderRequest<'_>) -> Result<Answer, ProviderError> {
        let is_bad = request.messages.iter().any(|message| message.content.contains("bad"));
        if is_bad && !self.mended.load(Ordering::Relaxed) {
            self.calls.fetch_add(1, Ordering::Relaxed);
            match &self.bad {
                Bad::Panics => panic!("a bad run, says the test"),
                Bad::Kills(front) => {
                    front.lock().unwrap_or_else(PoisonError::into_inner).kill();
                    std::future::pending::<()>().await;
                }
            }
        }
        tokio::time::sleep(self.latency).await;
        Ok(Answer { content: "fine".to_owned(), finish: Finish::Stop, usage: None, limits: Limits::default() })
    }

    fn kind(&self) -> &'static str {
        "deadly"
    }

    fn is_configured(&self) -> bool {
        true
    }
}

async fn engine(store: Arc<dyn Store>, provider: &Arc<Deadly>) -> Engine {
    let config = LlmConfig::default();
    let prices = Prices::new(&config).expect("prices");
    let providers = BTreeMap::from([("fake".to_owned(), Arc::clone(provider) as Arc<dyn Provider>)]);
    let llm = Llm::with_providers(providers, prices, &config, None, Metrics::new(), Arc::new(SystemClock));
    let config = EngineConfig { run_crashes_max: MAX, ..quick() };
    Engine::start(config, store, Arc::new(llm), Metrics::new(), Arc::new(SystemClock)).await.expect("an engine")
}

/// One stage for each text.
fn source() -> String {
    let stages = json!([{ "id": "one", "prompt": "say {{ input.text }}" }]);
    json!({ "name": "p", "defaults": { "model": "fake/model" }, "stages": stages }).to_string()
}

async fn record(store: &SqliteStore, run: stagegate_core::RunId) -> RunRecord {
    store.run_record(&TenantId::default(), run).await.expect("read").expect("there")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_panics_its_driver_fails_after_so_many_times_and_can_be_retried() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = bench::store(folder.path()).await;
    let provider = Deadly::new(Bad::Panics, Duration::ZERO);
    let engine = engine(Arc::clone(&store) as Arc<dyn Store>, &provider).await;
    let bad = submit(&engine, &source(), json!({ "text": "bad" })).await;
    let good = submit(&engine, &source(), json!({ "text": "good" })).await;
    finish(&engine, good).await;
    assert_state(&record(&store, good).await, RunState::Succeeded);

    let events = finish(&engine, bad).await;
    let resumed = events.iter().filter(|event| event.kind.name() == "run.resumed").count();
    assert_eq!(resumed, MAX as usize, "taken again after each panic, the last time only to be ended");
    let ended = record(&store, bad).await;
    assert_state(&ended, RunState::Failed);
    let failure = ended.failure.expect("why");
    assert_eq!(failure.code, Code::RunCrashed);
    assert!(failure.message.starts_with("3 owners"), "{}", failure.message);
    assert_eq!(provider.calls.load(Ordering::Relaxed), MAX as usize);
    assert_eq!(ended.totals.unknown_calls, MAX, "what each may have bought is booked");

    provider.mended.store(true, Ordering::Relaxed);
    engine.act(&TenantId::default(), bad, Action::Retry, None).await.expect("retried");
    while !record(&store, bad).await.state.is_terminal() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_state(&record(&store, bad).await, RunState::Succeeded);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_kills_its_replicas_fails_and_takes_no_other_run_with_it() {
    const OTHERS: usize = 20;
    let folder = tempfile::tempdir().expect("a folder");
    let store = bench::store(folder.path()).await;
    let front = || Faulty::before(Arc::clone(&store) as Arc<dyn Store>);
    let first = front();
    // The others take longer than the bad run takes to kill: beside it they come to nothing.
    let provider = Deadly::new(Bad::Kills(Mutex::new(Arc::clone(&first))), Duration::from_millis(700));
    let life = engine(Arc::clone(&first) as Arc<dyn Store>, &provider).await;
    let mut others = Vec::new();
    for n in 0..OTHERS {
        others.push(submit(&life, &source(), json!({ "text": format!("good {n}") })).await);
    }
    let bad = submit(&life, &source(), json!({ "text": "bad" })).await;
    let mut lives = vec![life];
    first.died().await;
    let all: Vec<_> = others.iter().copied().chain([bad]).collect();
    'lives: loop {
        let next = front();
        if let Bad::Kills(now) = &provider.bad {
            *now.lock().expect("no panic") = Arc::clone(&next);
        }
        lives.push(engine(Arc::clone(&next) as Arc<dyn Store>, &provider).await);
        loop {
            let mut all_ended = true;
            for run in &all {
                all_ended &= record(&store, *run).await.state.is_terminal();
            }
            if all_ended {
                break 'lives;
            }
            if next.is_dead() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    assert_eq!(lives.len(), MAX as usize + 1, "as many replicas died as it may kill");
    assert_eq!(record(&store, bad).await.failure.expect("why").code, Code::RunCrashed);
    for run in others {
        assert_state(&record(&store, run).await, RunState::Succeeded);
    }
}
