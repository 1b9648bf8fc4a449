//! A replica that dies with many runs, and attempts that do not end by themselves.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use serde_json::json;
use stagegate_core::{Code, RunState, Store, SystemClock, pipeline::Span};
use stagegate_engine::{Engine, config::EngineConfig};
use stagegate_llm::{
    Llm,
    config::LlmConfig,
    prices::Prices,
    provider::{Answer, Provider, ProviderError, ProviderRequest},
};
use stagegate_telemetry::Metrics;
use stagegate_testkit::provider::FakeProvider;

use crate::{
    bench::{self, Bench, assert_state, canonical, finish, quick},
    faulty::Faulty,
};

/// Runs that the dead replica leaves.
const LEFT: usize = 200;

/// A lease that a busy machine does not lose.
fn patient() -> EngineConfig {
    EngineConfig { lease_ttl: Span(Duration::from_secs(3)), ..quick() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dead_replica_leaves_is_taken_up_in_batches_and_ends_once() {
    let folder = Arc::new(tempfile::tempdir().expect("a folder"));
    let store = bench::store(folder.path()).await;
    let provider = FakeProvider::start().await;
    provider.set_latency(Duration::from_mins(1));
    let llm = bench::llm(&provider, &store);
    // A crash is the end of a runtime, with everything in it: no drain, no farewell.
    let doomed = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let left = doomed.spawn({
        let (store, folder) = (Arc::clone(&store), Arc::clone(&folder));
        async move {
            let engine = bench::engine(patient(), &store, &llm).await;
            let bench = Bench { engine, provider, store, llm, folder };
            let mut runs = Vec::new();
            for n in 0..LEFT {
                runs.push(bench.submit(&canonical(), json!({ "text": format!("number {n}") })).await);
            }
            (bench, runs)
        }
    });
    let (bench, runs) = left.await.expect("submitted");
    doomed.shutdown_background();
    bench.provider.set_latency(Duration::ZERO);

    // Another process: nothing in common but the file.
    let counted = Faulty::before(Arc::clone(&bench.store) as Arc<dyn Store>);
    let llm = bench::llm(&bench.provider, &bench.store);
    let front = Arc::clone(&counted) as Arc<dyn Store>;
    let next = Engine::start(patient(), front, llm, Metrics::new(), Arc::new(SystemClock)).await.expect("an engine");
    for run in runs {
        let events = finish(&next, run).await;
        assert_eq!(events.iter().filter(|event| event.kind.name() == "run.resumed").count(), 1);
        assert_state(&bench.detail(run).await.run, RunState::Succeeded);
    }
    let (loads, readings) = (counted.calls("load"), counted.calls("signals"));
    assert!(loads <= 10 && readings <= 10, "{LEFT} runs took {loads} loads and {readings} readings of signals");
    assert_eq!(counted.calls("pipeline"), 1, "they are of one version");
}

/// A provider that works and works, and never comes to an end.
#[derive(Debug)]
struct Busy;

#[async_trait]
impl Provider for Busy {
    async fn call(&self, _: ProviderRequest<'_>) -> Result<Answer, ProviderError> {
        loop {
            tokio::task::yield_now().await;
        }
    }

    fn kind(&self) -> &'static str {
        "busy"
    }

    fn is_configured(&self) -> bool {
        true
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attempt_that_is_busy_for_ever_is_abandoned_at_its_timeout() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = bench::store(folder.path()).await;
    let busy: Arc<dyn Provider> = Arc::new(Busy);
    let config = LlmConfig::default();
    let prices = Prices::new(&config).expect("prices");
    let providers = BTreeMap::from([("fake".to_owned(), busy)]);
    let llm = Llm::with_providers(providers, prices, &config, None, Metrics::new(), Arc::new(SystemClock));
    let llm = Arc::new(llm);
    let engine = bench::engine(quick(), &store, &llm).await;
    let provider = FakeProvider::start().await;
    let bench = Bench { engine, provider, store, llm, folder: Arc::new(folder) };
    let source = canonical()
        .replace("\"max_attempts\":3", "\"max_attempts\":1,\"max_wait\":\"1ms\"")
        .replace("\"id\":\"one\"", "\"id\":\"one\",\"timeout\":\"200ms\"");
    let detail = bench.run(&source, json!({ "text": "hello" })).await;
    assert_state(&detail.run, RunState::Failed);
    let code = detail.run.failure.expect("why").code;
    assert!(matches!(code, Code::StageTimeout | Code::ProviderTimeout), "{code}");
}
