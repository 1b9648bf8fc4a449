//! A replica that dies, hangs, or lost its lease.

use std::{sync::Arc, time::Duration};

use serde_json::json;
use stagegate_core::{RunState, SystemClock, TenantId};
use stagegate_engine::Engine;
use stagegate_telemetry::Metrics;
use stagegate_testkit::provider::{Reply, contains};

use crate::bench::{self, Bench, assert_state, canonical, finish, quick};

/// An engine in a runtime of its own, so that dropping the runtime is a crash: no drain, no farewell.
struct Doomed {
    runtime: Option<tokio::runtime::Runtime>,
    engine: Engine,
}

impl Doomed {
    fn start(store: Arc<stagegate_store_sqlite::SqliteStore>, llm: Arc<stagegate_llm::Llm>) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let engine = runtime
            .block_on(Engine::start(quick(), store, llm, Metrics::new(), Arc::new(SystemClock)))
            .expect("an engine");
        Self { runtime: Some(runtime), engine }
    }

    fn crash(mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_replicas_run_goes_on_elsewhere_from_its_last_checkpoint() {
    let bench = Bench::start().await;
    bench.engine.drain(Duration::ZERO).await;
    bench.provider.on(contains("stage-three")).once(Reply::hang()).respond(Reply::echo());
    let (store, llm) = (Arc::clone(&bench.store), Arc::clone(&bench.llm));
    let doomed = tokio::task::spawn_blocking(move || Doomed::start(store, llm)).await.expect("started");
    let first = Bench {
        engine: doomed.engine.clone(),
        provider: bench.provider,
        store: bench.store,
        llm: bench.llm,
        folder: bench.folder,
    };
    let run = first.submit(&canonical(), json!({ "text": "hello" })).await;
    while first.provider.calls_where(&contains("stage-three")).is_empty() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tokio::task::spawn_blocking(move || doomed.crash()).await.expect("crashed");

    // Another process: nothing in common but the file.
    let llm = bench::llm(&first.provider, &first.store);
    let next = bench::engine(quick(), &first.store, &llm).await;
    let events = finish(&next, run).await;
    assert!(events.iter().any(|event| event.kind.name() == "run.resumed"));
    let detail = first.detail(run).await;
    assert_state(&detail.run, RunState::Succeeded);
    for stage in ["stage-one", "stage-two", "stage-four", "stage-five"] {
        assert_eq!(first.provider.calls_where(&contains(stage)).len(), 1, "{stage} is bought once");
    }
    assert_eq!(first.provider.calls_where(&contains("stage-three")).len(), 2, "the unanswered call is repeated");
}

#[tokio::test]
async fn many_runs_at_once_all_end_exactly_once() {
    let bench = Bench::start().await;
    let mut runs = Vec::new();
    for n in 0..40 {
        runs.push(bench.submit(&canonical(), json!({ "text": format!("number {n}") })).await);
    }
    for run in runs {
        let events = bench.finish(run).await;
        assert_eq!(events.iter().filter(|event| event.kind.name() == "run.finished").count(), 1);
        assert_state(&bench.detail(run).await.run, RunState::Succeeded);
    }
    assert_eq!(bench.provider.call_count(), 200);
}

#[tokio::test]
async fn runs_beyond_the_room_are_queued_and_claimed() {
    let bench = Bench::with(stagegate_engine::config::EngineConfig { max_runs: 2, ..quick() }).await;
    bench.provider.set_latency(Duration::from_millis(20));
    let mut runs = Vec::new();
    for n in 0..8 {
        runs.push(bench.submit(&canonical(), json!({ "text": format!("number {n}") })).await);
    }
    for run in runs {
        bench.finish(run).await;
        assert_state(&bench.detail(run).await.run, RunState::Succeeded);
    }
    assert!(bench.provider.most_under_way() <= 4, "two runs of at most two stages at once");
}

#[tokio::test]
async fn a_cancel_of_a_queued_run_needs_no_room_to_be_recorded() {
    let bench = Bench::with(stagegate_engine::config::EngineConfig { max_runs: 1, ..quick() }).await;
    bench.provider.on(contains("first")).respond(Reply::echo().after(Duration::from_millis(600)));
    let first = bench.submit(&canonical(), json!({ "text": "first" })).await;
    let queued = bench.submit(&canonical(), json!({ "text": "second" })).await;
    let tenant = TenantId::default();
    let record = bench.engine.act(&tenant, queued, stagegate_engine::Action::Cancel, None).await.expect("accepted");
    assert!(record.cancel_requested);
    bench.finish(first).await;
    bench.finish(queued).await;
    assert_state(&bench.detail(queued).await.run, RunState::Cancelled);
    assert!(bench.provider.calls_where(&contains("second")).is_empty(), "no call for a cancelled run");
}
