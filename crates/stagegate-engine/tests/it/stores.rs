//! A store that refuses, hangs, or loses its answers under the engine.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use serde_json::json;
use stagegate_core::{
    Clock, Code, RunId, RunState, Store, SystemClock, TenantId,
    pipeline::{Labels, Span},
    store::Idempotency,
};
use stagegate_engine::{Action, Engine, Submit, config::EngineConfig};
use stagegate_telemetry::Metrics;
use stagegate_testkit::provider::{FakeProvider, Reply, contains};
use tokio::sync::watch;

use crate::{
    bench::{self, Bench, assert_state, canonical, quick},
    faulty::{Fault, Faulty},
};

/// Far more than anything here may take.
const LONG: Duration = Duration::from_secs(20);

/// A clock that counts how often it is read.
#[derive(Debug, Default)]
struct Counting(AtomicUsize);

impl Clock for Counting {
    fn now(&self) -> DateTime<Utc> {
        self.0.fetch_add(1, Ordering::Relaxed);
        SystemClock.now()
    }
}

/// A bench whose store can fail.
struct Setup {
    bench: Bench,
    faulty: Arc<Faulty>,
    metrics: Metrics,
    clock: Arc<Counting>,
}

impl Setup {
    async fn with(config: EngineConfig) -> Self {
        let folder = Arc::new(tempfile::tempdir().expect("a folder"));
        let store = bench::store(folder.path()).await;
        let faulty = Faulty::before(Arc::clone(&store) as Arc<dyn Store>);
        let provider = FakeProvider::start().await;
        let llm = bench::llm(&provider, &store);
        let (metrics, clock) = (Metrics::new(), Arc::new(Counting::default()));
        let front = Arc::clone(&faulty) as Arc<dyn Store>;
        let engine =
            Engine::start(config, front, Arc::clone(&llm), metrics.clone(), Arc::clone(&clock) as Arc<dyn Clock>);
        let engine = engine.await.expect("an engine");
        Self { bench: Bench { engine, provider, store, llm, folder }, faulty, metrics, clock }
    }

    async fn start() -> Self {
        Self::with(quick()).await
    }

    /// The run waits for the hung commit without spinning, and expires once that is mended.
    async fn expires_in_peace(&self, run: RunId) {
        let before = self.clock.0.load(Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(500)).await;
        let read = self.clock.0.load(Ordering::Relaxed) - before;
        assert!(read < 100, "the clock was read {read} times by a run that waits");
        self.faulty.mend("commit");
        self.bench.finish(run).await;
        assert_state(&self.bench.detail(run).await.run, RunState::Expired);
    }

    async fn until_called(&self, stage: &str) {
        while self.bench.provider.calls_where(&contains(stage)).is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn until_idle(&self) {
        while self.metrics.runs_in_flight.get() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// A run of the canonical pipeline, which is registered.
fn hello() -> Submit {
    Submit {
        tenant: TenantId::default(),
        pipeline: "canonical".parse().expect("valid"),
        version: None,
        input: json!({ "text": "hello" }).into(),
        cache_mode: None,
        priority: 0,
        labels: Labels::new(),
        idempotency: None,
        start_at: None,
        request_id: None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_cannot_renew_stops_before_others_may_take_over_and_takes_nothing_new() {
    let ttl = Duration::from_secs(3);
    let setup = Setup::with(EngineConfig { lease_ttl: Span(ttl), ..quick() }).await;
    let provider = &setup.bench.provider;
    provider.on(contains("stage-one")).once(Reply::hang()).respond(Reply::echo());
    let run = setup.bench.submit(&canonical(), json!({ "text": "hello" })).await;
    setup.until_called("stage-one").await;
    setup.faulty.next_call("heartbeat").await;
    let renewed = Instant::now();
    setup.faulty.set("heartbeat", Fault::Refuse);
    setup.until_idle().await;
    assert!(renewed.elapsed() < ttl, "stopped after {:?} of {ttl:?}", renewed.elapsed());

    let second = setup.bench.submit(&canonical(), json!({ "text": "second" })).await;
    assert_state(&setup.bench.detail(second).await.run, RunState::Queued);
    setup.faulty.mend("heartbeat");
    for run in [run, second] {
        setup.bench.finish(run).await;
        assert_state(&setup.bench.detail(run).await.run, RunState::Succeeded);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_heartbeat_that_hangs_on_a_dead_connection_costs_no_run_its_owner() {
    let setup = Setup::with(EngineConfig { lease_ttl: Span(Duration::from_secs(3)), ..quick() }).await;
    let gate = watch::Sender::new(false);
    setup.bench.provider.on(contains("stage-one")).respond(Reply::echo().when(gate.subscribe()));
    let run = setup.bench.submit(&canonical(), json!({ "text": "hello" })).await;
    setup.until_called("stage-one").await;
    let replica = setup.bench.engine.replica();
    for _ in 0..3 {
        setup.faulty.set("heartbeat", Fault::HangOnce);
        setup.faulty.next_call("heartbeat").await; // It hangs,
        setup.faulty.next_call("heartbeat").await; // and is asked beside that,
        setup.faulty.next_call("heartbeat").await; // and it goes on.
    }
    assert_eq!(setup.bench.engine.replica(), replica, "it is the same life");
    gate.send_replace(true);
    setup.bench.finish(run).await;
    assert_eq!(setup.bench.provider.call_count(), 5, "nobody stopped it, and nothing was asked twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_that_outlives_its_replicas_life_is_not_driven() {
    let setup = Setup::start().await;
    let (provider, faulty) = (&setup.bench.provider, &setup.faulty);
    faulty.set("claim", Fault::Refuse);
    let other = bench::engine(EngineConfig { max_runs: 0, ..quick() }, &setup.bench.store, &setup.bench.llm).await;
    let elsewhere = Bench {
        engine: other,
        provider: FakeProvider::start().await,
        store: Arc::clone(&setup.bench.store),
        llm: Arc::clone(&setup.bench.llm),
        folder: Arc::clone(&setup.bench.folder),
    };
    let run = elsewhere.submit(&canonical(), json!({ "text": "hello" })).await;
    faulty.set("claim", Fault::HoldAnswer);
    while setup.bench.store.owned(setup.bench.engine.replica()).await.expect("read").is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    faulty.set("heartbeat", Fault::Refuse);
    tokio::time::sleep(Duration::from_millis(800)).await; // Past the fence, which nothing shows from outside.
    faulty.mend("claim");
    tokio::time::timeout(LONG, faulty.next_call("release")).await.expect("it is handed back");
    assert_eq!(provider.call_count(), 0, "nothing is called for it");
    faulty.mend("heartbeat");
    setup.bench.finish(run).await;
    assert_eq!(provider.call_count(), 5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_refuses_is_not_asked_without_a_pause() {
    let setup = Setup::start().await;
    for method in ["claim", "owned"] {
        setup.faulty.set(method, Fault::Refuse);
    }
    let before = setup.faulty.calls("claim") + setup.faulty.calls("owned");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let asked = setup.faulty.calls("claim") + setup.faulty.calls("owned") - before;
    assert!(asked < 200, "asked {asked} times in a second, with a pause of 25 to 50 ms");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_answer_to_a_claim_or_a_submit_loses_no_run() {
    let setup = Setup::start().await;
    setup.faulty.set("claim", Fault::LoseOnce);
    let _ = setup.bench.submit(&canonical(), json!({ "text": "warm" })).await;
    setup.faulty.set("submit", Fault::LoseOnce);
    let idempotency = Some(Idempotency { key: "k".to_owned(), digest: [1; 32] });
    let submit = Submit { idempotency, ..hello() };
    setup.bench.engine.submit(submit.clone()).await.expect_err("its answer is lost");
    let (found, new) = setup.bench.engine.submit(submit).await.expect("found by its key");
    assert!(!new);
    setup.bench.finish(found.id).await;
    assert_state(&setup.bench.detail(found.id).await.run, RunState::Succeeded);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claimed_run_that_could_not_be_loaded_is_claimed_again() {
    let setup = Setup::start().await;
    let slow_down = Reply::status(429, "{}").header("retry-after", "1");
    setup.bench.provider.on(contains("stage-one")).once(slow_down).respond(Reply::echo());
    let run = setup.bench.submit(&canonical(), json!({ "text": "hello" })).await;
    setup.bench.until(run, "run.waiting").await;
    setup.faulty.set("load", Fault::LoseOnce);
    setup.faulty.next_call("load").await;
    setup.faulty.set("signals", Fault::LoseOnce);
    setup.bench.finish(run).await;
    assert_state(&setup.bench.detail(run).await.run, RunState::Succeeded);
    assert!(setup.faulty.calls("load") >= 3, "the first answer was lost, the second run could not be taken up");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_whose_reading_was_lost_is_obeyed_all_the_same() {
    let setup = Setup::start().await;
    setup.bench.provider.on(contains("stage-one")).respond(Reply::hang());
    let run = setup.bench.submit(&canonical(), json!({ "text": "hello" })).await;
    setup.until_called("stage-one").await;
    setup.faulty.set("signals", Fault::LoseOnce);
    setup.bench.engine.act(&TenantId::default(), run, Action::Cancel, None).await.expect("accepted");
    tokio::time::timeout(LONG, setup.bench.finish(run)).await.expect("it is read again");
    assert_state(&setup.bench.detail(run).await.run, RunState::Cancelled);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reading_of_signals_that_hangs_holds_up_no_stage() {
    let setup = Setup::start().await;
    setup.bench.provider.on(contains("stage-one")).respond(Reply::echo().after(Duration::from_millis(200)));
    setup.bench.provider.on(contains("stage-three")).respond(Reply::hang());
    let run = setup.bench.submit(&canonical(), json!({ "text": "hello" })).await;
    setup.until_called("stage-one").await;
    setup.faulty.set("signals", Fault::Hang);
    setup.bench.engine.act(&TenantId::default(), run, Action::Cancel, None).await.expect("accepted");
    tokio::time::timeout(LONG, setup.until_called("stage-three")).await.expect("the run goes on");
    setup.faulty.mend("signals");
    setup.bench.finish(run).await;
    assert_state(&setup.bench.detail(run).await.run, RunState::Cancelled);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_starts_once_a_cancel_was_read() {
    let setup = Setup::start().await;
    let run = setup.bench.submit(&canonical(), json!({ "text": "hello" })).await;
    setup.faulty.set("commit", Fault::Hang);
    setup.faulty.next_call("commit").await; // Stage one is being committed; stage two starts with it.
    let read = setup.faulty.calls("signals");
    setup.bench.engine.act(&TenantId::default(), run, Action::Cancel, None).await.expect("accepted");
    while setup.faulty.calls("signals") == read {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::time::sleep(Duration::from_millis(500)).await; // The reading ends, which nothing shows from outside.
    setup.faulty.mend("commit");
    setup.bench.finish(run).await;
    assert_state(&setup.bench.detail(run).await.run, RunState::Cancelled);
    assert!(setup.bench.provider.calls_where(&contains("stage-two")).is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_was_cancelled_before_its_insert_was_answered_calls_nothing() {
    let setup = Setup::start().await;
    setup.bench.run(&canonical(), json!({ "text": "warm" })).await;
    let calls = setup.bench.provider.call_count();
    setup.faulty.set("submit", Fault::HoldAnswer);
    let engine = setup.bench.engine.clone();
    let submitting = tokio::spawn(async move { engine.submit(hello()).await });
    let run = loop {
        match setup.bench.store.owned(setup.bench.engine.replica()).await.expect("read").first() {
            Some(lease) => break lease.run,
            None => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    setup.bench.engine.act(&TenantId::default(), run, Action::Cancel, None).await.expect("accepted");
    setup.faulty.mend("submit");
    submitting.await.expect("no panic").expect("accepted");
    setup.bench.finish(run).await;
    assert_state(&setup.bench.detail(run).await.run, RunState::Cancelled);
    assert_eq!(setup.bench.provider.call_count(), calls);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_was_cancelled_while_it_was_loaded_calls_nothing() {
    let setup = Setup::start().await;
    setup.bench.run(&canonical(), json!({ "text": "warm" })).await;
    let calls = setup.bench.provider.call_count();
    let other = bench::engine(EngineConfig { max_runs: 0, ..quick() }, &setup.bench.store, &setup.bench.llm).await;
    setup.faulty.set("load", Fault::HoldAnswer);
    let run = other.submit(hello()).await.expect("accepted").0.id;
    setup.faulty.next_call("load").await;
    tokio::time::sleep(Duration::from_millis(50)).await; // It is read, which nothing shows from outside.
    setup.bench.engine.act(&TenantId::default(), run, Action::Cancel, None).await.expect("accepted");
    setup.faulty.mend("load");
    setup.bench.finish(run).await;
    assert_state(&setup.bench.detail(run).await.run, RunState::Cancelled);
    assert_eq!(setup.bench.provider.call_count(), calls);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_whose_commit_hangs_calls_no_judge() {
    let setup = Setup::start().await;
    let provider = &setup.bench.provider;
    provider.on(contains("Rubric:")).respond(Reply::echo());
    provider.on(contains("stage-one")).respond(Reply::echo().after(Duration::from_secs(1)));
    let judged = "\"id\":\"one\",\"gate\":{\"judge\":{\"rubric\":\"good\",\"threshold\":0.5}}";
    let source = canonical().replace("\"id\":\"one\"", judged);
    let run = setup.bench.submit(&source, json!({ "text": "hello" })).await;
    setup.until_called("stage-one").await;
    setup.faulty.set("commit", Fault::Hang);
    let before = setup.faulty.calls("commit");
    setup.bench.engine.act(&TenantId::default(), run, Action::Cancel, None).await.expect("accepted");
    setup.faulty.call_after("commit", before).await;
    tokio::time::sleep(Duration::from_millis(1_500)).await; // The answer would come, which nothing shows from outside.
    setup.faulty.mend("commit");
    setup.bench.finish(run).await;
    assert_state(&setup.bench.detail(run).await.run, RunState::Cancelled);
    assert!(provider.calls_where(&contains("Rubric:")).is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_run_waits_for_its_commit_in_peace() {
    let setup = Setup::start().await;
    setup.bench.provider.on(contains("stage-one")).respond(Reply::hang());
    let source = canonical().replace("\"name\":", "\"deadline\":\"400ms\",\"name\":");
    let before = setup.faulty.calls("commit");
    let run = setup.bench.submit(&source, json!({ "text": "hello" })).await;
    setup.faulty.set("commit", Fault::Hang);
    setup.faulty.call_after("commit", before).await;
    setup.expires_in_peace(run).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_parks_behind_a_slow_commit_waits_in_peace_past_its_deadline() {
    let setup = Setup::start().await;
    let provider = &setup.bench.provider;
    provider.on(contains("stage-four")).respond(Reply::echo().after(Duration::from_millis(200)));
    let limited = Reply::status(429, "{}").header("retry-after", "30").after(Duration::from_millis(400));
    provider.on(contains("stage-five")).respond(limited);
    let source = canonical().replace("\"name\":", "\"deadline\":\"2s\",\"name\":");
    let run = setup.bench.submit(&source, json!({ "text": "hello" })).await;
    setup.until_called("stage-five").await;
    setup.faulty.set("commit", Fault::Hang); // Of stage four; the run parks behind it, for stage five must wait.
    tokio::time::sleep(Duration::from_millis(2_200)).await; // The deadline passes, which nothing shows from outside.
    setup.expires_in_peace(run).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_claims_to_have_seen_the_future_still_sees_the_end() {
    let setup = Setup::start().await;
    let run = setup.bench.submit(&canonical(), json!({ "text": "hello" })).await;
    let events = setup.bench.engine.follow(TenantId::default(), run, 1_000_000);
    let seen = futures::StreamExt::collect::<Vec<_>>(events);
    tokio::time::timeout(LONG, seen).await.expect("it ends");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_was_paid_before_its_judge_timed_out_is_booked_and_held() {
    let setup = Setup::start().await;
    setup.bench.provider.on(contains("Rubric:")).respond(Reply::hang());
    let source = canonical().replace("\"max_attempts\":3", "\"max_attempts\":1,\"max_wait\":\"1ms\"").replace(
        "\"id\":\"one\"",
        "\"id\":\"one\",\"timeout\":\"400ms\",\"gate\":{\"judge\":{\"rubric\":\"good\",\"threshold\":0.5}}",
    );
    let run = setup.bench.submit(&source, json!({ "text": "hello" })).await;
    setup.bench.until(run, "run.waiting").await;
    let detail = setup.bench.detail(run).await;
    assert_state(&detail.run, RunState::Waiting);
    assert!(detail.run.totals.cost_usd.nanos() > 0, "{:?}", detail.run.totals);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn submits_that_the_store_cannot_keep_up_with_are_refused() {
    let setup = Setup::start().await;
    setup.bench.run(&canonical(), json!({ "text": "register" })).await;
    setup.faulty.set("submit", Fault::Hang);
    let waiting: Vec<_> = (0..5_000)
        .map(|_| {
            let engine = setup.bench.engine.clone();
            tokio::spawn(async move { engine.submit(hello()).await })
        })
        .collect();
    let (first, _) = futures::future::select_ok(waiting.into_iter().map(|task| {
        Box::pin(async move {
            match task.await.expect("no panic") {
                Err(error) => Ok(error),
                Ok(_) => Err(()),
            }
        })
    }))
    .await
    .expect("some are refused");
    assert_eq!(first.code, Code::QueueFull);
}
