//! Money: what a run is booked is what its provider charged, and where nobody heard, the most that it can have charged.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use stagegate_core::{Code, EventKind, RunId, RunState, Store, SystemClock, TenantId, Totals, Usd, store::RunDetail};
use stagegate_engine::{Action, Engine};
use stagegate_store_sqlite::SqliteStore;
use stagegate_telemetry::Metrics;
use stagegate_testkit::provider::{FakeProvider, Reply, any, contains, model};
use tokio::sync::watch;

use crate::{
    bench::{self, Bench, assert_state, finish, quick},
    faulty::{Fault, Faulty, How, Injection},
};

/// What [`FakeProvider`]'s usual answer costs: 100 tokens in, 20 out, at 1 and 2 USD per million.
const COST: Usd = Usd::from_nanos(100 * 1_000 + 20 * 2_000);
/// The longest answer that the stages here ask for.
const LONGEST: i64 = 1_000;

/// A pipeline whose stages are not retried.
fn pipeline(budget_usd: Option<f64>, stages: &Value) -> String {
    let mut source = json!({
        "name": "money",
        "defaults": {
            "model": ["fake/a"],
            "params": { "max_output_tokens": LONGEST },
            "retry": { "max_attempts": 1, "max_wait": "1ms" },
        },
        "stages": stages,
    });
    if let Some(max) = budget_usd {
        source["budget"] = json!({ "max_cost_usd": max });
    }
    source.to_string()
}

fn code(detail: &RunDetail) -> Code {
    detail.run.failure.as_ref().expect("it failed").code
}

/// Whether so many calls of unknown outcome are booked, each with its longest answer at least.
fn assert_unknown(totals: &Totals, calls: u32) {
    assert_eq!(totals.unknown_calls, calls, "{totals:?}");
    let longest = Usd::from_nanos(i64::from(calls) * LONGEST * 2_000);
    assert!(totals.unknown_usd > longest && totals.cost_usd >= totals.unknown_usd, "{totals:?}");
}

async fn asked(provider: &FakeProvider, calls: usize) {
    while provider.call_count() < calls {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn siblings_that_do_not_fit_beside_each_other_wait_and_the_run_succeeds() {
    let bench = Bench::start().await;
    let stages =
        json!([{ "id": "a", "prompt": "ask a" }, { "id": "b", "prompt": "ask b" }, { "id": "c", "prompt": "ask c" }]);
    // Two worst cases are more than that; three answers are not.
    let detail = bench.run(&pipeline(Some(0.003), &stages), json!({})).await;
    assert_state(&detail.run, RunState::Succeeded);
    assert_eq!((bench.provider.call_count(), bench.provider.most_under_way()), (3, 1));
    assert_eq!(detail.run.totals.cost_usd, Usd::from_nanos(3 * COST.nanos()));
}

#[tokio::test]
async fn a_budget_holds_over_a_whole_fallback_chain() {
    let bench = Bench::start().await;
    // An empty answer is charged, and the next model is asked.
    bench.provider.on(any()).respond(Reply::text("").usage(100, 1_000));
    let stages = json!([{ "id": "a", "prompt": "ask", "model": ["fake/a", "fake/b", "fake/c"] }]);
    let detail = bench.run(&pipeline(Some(0.003), &stages), json!({})).await;
    assert_state(&detail.run, RunState::Failed);
    assert_eq!((code(&detail), bench.provider.call_count()), (Code::BudgetExhausted, 1));
    assert_eq!(detail.run.totals.cost_usd, Usd::from_dollars(0.0021));
}

#[tokio::test]
async fn the_next_model_is_asked_where_it_fits_beside_what_is_spent() {
    let bench = Bench::start().await;
    bench.provider.on(model("a")).respond(Reply::text("").usage(100, 500));
    let stages = json!([{ "id": "a", "prompt": "ask", "model": ["fake/a", "fake/b"] }]);
    let detail = bench.run(&pipeline(Some(0.0040), &stages), json!({})).await;
    assert_state(&detail.run, RunState::Succeeded);
    assert_eq!(bench.provider.call_count(), 2);
    assert_eq!(detail.run.totals.cost_usd, Usd::from_dollars(0.0011) + COST);
}

#[tokio::test]
async fn an_answer_that_was_cached_needs_no_room_in_the_budget() {
    let bench = Bench::start().await;
    let stages = json!([{ "id": "a", "prompt": "ask" }]);
    bench.run(&pipeline(None, &stages), json!({})).await;
    // No call fits into this.
    let detail = bench.run(&pipeline(Some(0.0001), &stages), json!({})).await;
    assert_state(&detail.run, RunState::Succeeded);
    assert_eq!((bench.provider.call_count(), detail.run.totals.cost_usd), (1, Usd::ZERO));
}

#[tokio::test]
async fn a_call_that_times_out_is_booked_at_its_worst_case() {
    let bench = Bench::start().await;
    bench.provider.on(any()).respond(Reply::hang());
    let stages = json!([{ "id": "a", "prompt": "ask", "timeout": "300ms" }]);
    let detail = bench.run(&pipeline(None, &stages), json!({})).await;
    assert_state(&detail.run, RunState::Failed);
    // Once, and once more after `max_wait`.
    assert_unknown(&detail.run.totals, u32::try_from(bench.provider.call_count()).expect("few"));
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_booked_at_its_worst_case() {
    let bench = Bench::start().await;
    bench.provider.on(any()).respond(Reply::echo().cut_halfway());
    let detail = bench.run(&pipeline(None, &json!([{ "id": "a", "prompt": "ask" }])), json!({})).await;
    assert_state(&detail.run, RunState::Failed);
    // Once, and once more after `max_wait`.
    assert_unknown(&detail.run.totals, u32::try_from(bench.provider.call_count()).expect("few"));
}

#[tokio::test]
async fn a_refused_call_is_booked_at_nothing() {
    for status in [401, 429, 500, 529] {
        let bench = Bench::start().await;
        bench.provider.on(any()).respond(Reply::status(status, "{}"));
        let detail = bench.run(&pipeline(None, &json!([{ "id": "a", "prompt": "ask" }])), json!({})).await;
        assert_state(&detail.run, RunState::Failed);
        assert_eq!((detail.run.totals.unknown_calls, detail.run.totals.cost_usd), (0, Usd::ZERO), "{status}");
    }
}

#[tokio::test]
async fn an_answer_of_a_gateway_in_the_models_place_is_booked_at_its_worst_case() {
    for (status, body) in [
        (408, ""),
        (499, ""),
        (502, "<html>502 Bad Gateway</html>"),
        (504, r#"{"message":"The upstream server is timing out"}"#),
        (524, ""),
    ] {
        let bench = Bench::start().await;
        bench.provider.on(any()).respond(Reply::status(status, body));
        let detail = bench.run(&pipeline(None, &json!([{ "id": "a", "prompt": "ask" }])), json!({})).await;
        assert_state(&detail.run, RunState::Failed);
        assert_unknown(&detail.run.totals, u32::try_from(bench.provider.call_count()).expect("few"));
    }
    // The vendor itself says that it did not answer: it charges nothing.
    let bench = Bench::start().await;
    let body = r#"{"error":{"message":"the model took too long","type":"server_error"}}"#;
    bench.provider.on(any()).respond(Reply::status(504, body));
    let detail = bench.run(&pipeline(None, &json!([{ "id": "a", "prompt": "ask" }])), json!({})).await;
    assert_eq!((detail.run.totals.unknown_calls, detail.run.totals.cost_usd), (0, Usd::ZERO));
}

#[tokio::test]
async fn a_cancelled_run_books_the_calls_under_way_in_the_step_that_ends_it() {
    let bench = Bench::start().await;
    bench.provider.on(any()).respond(Reply::hang());
    let stages = json!([{ "id": "a", "prompt": "ask a" }, { "id": "b", "prompt": "ask b" }]);
    let run = bench.submit(&pipeline(None, &stages), json!({})).await;
    asked(&bench.provider, 2).await;
    bench.engine.act(&TenantId::default(), run, Action::Cancel, None).await.expect("accepted");
    let events = bench.finish(run).await;
    let detail = bench.detail(run).await;
    assert_state(&detail.run, RunState::Cancelled);
    assert_unknown(&detail.run.totals, 2);
    let Some(EventKind::RunFinished { totals, .. }) = events.last().map(|event| &event.kind) else { panic!("no end") };
    assert_eq!(*totals, detail.run.totals);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_owner_books_the_calls_that_a_dead_replica_may_have_bought() {
    let folder = Arc::new(tempfile::tempdir().expect("a folder"));
    let store = bench::store(folder.path()).await;
    let provider = FakeProvider::start().await;
    provider.on(any()).once(Reply::hang());
    let llm = bench::llm(&provider, &store);
    let doomed = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let left = doomed.spawn({
        let (store, folder) = (Arc::clone(&store), Arc::clone(&folder));
        async move {
            let engine = bench::engine(quick(), &store, &llm).await;
            let bench = Bench { engine, provider, store, llm, folder };
            let run = bench.submit(&pipeline(None, &json!([{ "id": "a", "prompt": "ask" }])), json!({})).await;
            asked(&bench.provider, 1).await;
            (bench, run)
        }
    });
    let (bench, run) = left.await.expect("submitted");
    doomed.shutdown_background();
    let next = bench::engine(quick(), &bench.store, &bench::llm(&bench.provider, &bench.store)).await;
    finish(&next, run).await;
    let detail = bench.detail(run).await;
    assert_state(&detail.run, RunState::Succeeded);
    assert_eq!(bench.provider.call_count(), 2);
    assert_unknown(&detail.run.totals, 1);
    assert_eq!(detail.run.totals.cost_usd, detail.run.totals.unknown_usd + COST);
}

#[tokio::test]
async fn with_the_cache_off_two_stages_that_ask_the_same_get_an_answer_each() {
    let bench = Bench::start().await;
    let off = json!({ "mode": "off" });
    let stages = json!([
        { "id": "a", "prompt": "the same", "cache": off },
        { "id": "b", "prompt": "the same", "cache": off },
    ]);
    let detail = bench.run(&pipeline(None, &stages), json!({})).await;
    assert_state(&detail.run, RunState::Succeeded);
    assert_eq!(bench.provider.calls_where(&contains("the same")).len(), 2);
    assert_eq!(detail.run.totals.cost_usd, COST + COST);
}

#[tokio::test]
async fn each_sample_of_a_prompt_is_an_answer_of_its_own_and_is_cached_by_itself() {
    let bench = Bench::start().await;
    let stages = json!([
        { "id": "a", "prompt": "the same" },
        { "id": "b", "prompt": "the same", "sample": 1 },
        { "id": "c", "prompt": "the same", "sample": 2 },
    ]);
    bench.run(&pipeline(None, &stages), json!({})).await;
    assert_eq!(bench.provider.call_count(), 3);
    let detail = bench.run(&pipeline(None, &stages), json!({})).await;
    assert_eq!((bench.provider.call_count(), detail.run.totals.hits), (3, 3));
}

#[tokio::test]
async fn a_drained_replica_books_its_aborted_calls_before_it_hands_the_run_back() {
    let bench = Bench::start().await;
    bench.provider.on(any()).once(Reply::hang());
    let run = bench.submit(&pipeline(None, &json!([{ "id": "a", "prompt": "ask" }])), json!({})).await;
    asked(&bench.provider, 1).await;
    bench.engine.drain(Duration::ZERO).await;
    let left = bench.detail(run).await;
    assert_unknown(&left.run.totals, 1);
    let next = bench::engine(quick(), &bench.store, &bench.llm).await;
    finish(&next, run).await;
    let detail = bench.detail(run).await;
    // Although it is the second attempt of one: what a shut-down interrupts does not count.
    assert_state(&detail.run, RunState::Succeeded);
    assert_unknown(&detail.run.totals, 1);
    assert_eq!(detail.run.totals.cost_usd, left.run.totals.cost_usd + COST);
}

#[tokio::test]
async fn a_run_that_ends_as_it_is_taken_over_books_what_its_former_owner_may_have_bought() {
    let folder = Arc::new(tempfile::tempdir().expect("a folder"));
    let store = bench::store(folder.path()).await;
    let provider = FakeProvider::start().await;
    provider.on(any()).respond(Reply::hang());
    let llm = bench::llm(&provider, &store);
    let doomed = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let left = doomed.spawn({
        let (store, folder) = (Arc::clone(&store), Arc::clone(&folder));
        async move {
            let engine = bench::engine(quick(), &store, &llm).await;
            let bench = Bench { engine, provider, store, llm, folder };
            let source =
                pipeline(None, &json!([{ "id": "a", "prompt": "ask" }])).replacen('{', "{\"deadline\":\"1s\",", 1);
            let run = bench.submit(&source, json!({})).await;
            asked(&bench.provider, 1).await;
            (bench, run)
        }
    });
    let (bench, run) = left.await.expect("submitted");
    doomed.shutdown_background();
    // It is over by then.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let next = bench::engine(quick(), &bench.store, &bench::llm(&bench.provider, &bench.store)).await;
    finish(&next, run).await;
    let detail = bench.detail(run).await;
    assert_state(&detail.run, RunState::Expired);
    assert_eq!(bench.provider.call_count(), 1);
    assert_unknown(&detail.run.totals, 1);
}

/// Replicas that come and go before one store and one provider.
struct Stand {
    store: Arc<SqliteStore>,
    provider: FakeProvider,
    /// Calls to it that may be under way at once.
    slots: usize,
    _folder: tempfile::TempDir,
}

impl Stand {
    async fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let (store, provider) = (bench::store(folder.path()).await, FakeProvider::start().await);
        Self { store, provider, slots: 64, _folder: folder }
    }

    /// A replica that has nothing in common with others but the store, and the front at which it fails.
    async fn replica(&self, front: &Arc<Faulty>) -> Engine {
        let llm = bench::llm_configured(self.provider.openai_base_url(), self.store.cache_tier(), |config| {
            config.providers.get_mut("fake").expect("configured").max_concurrency = self.slots;
        });
        let front = Arc::clone(front) as Arc<dyn Store>;
        Engine::start(quick(), front, llm, Metrics::new(), Arc::new(SystemClock)).await.expect("an engine")
    }

    fn front(&self) -> Arc<Faulty> {
        Faulty::before(Arc::clone(&self.store) as Arc<dyn Store>)
    }

    /// The front of a replica that dies before this commit.
    fn dies_before_commit(&self, nth: usize) -> Arc<Faulty> {
        let at = Injection { method: "commit", nth, telling: false, how: How::KillBefore };
        Faulty::with(Arc::clone(&self.store) as Arc<dyn Store>, vec![(at, watch::Sender::new(false))])
    }

    /// A replica finishes the run; what is kept of it.
    async fn finish(&self, run: RunId) -> RunDetail {
        let next = self.replica(&self.front()).await;
        finish(&next, run).await;
        let detail = self.store.run(&TenantId::default(), run).await.expect("read").expect("there");
        assert_state(&detail.run, RunState::Succeeded);
        detail
    }
}

#[tokio::test]
async fn a_take_over_that_finds_the_answer_books_the_models_that_were_asked_in_vain_before_it() {
    let stand = Stand::start().await;
    // Charged, and kept nowhere.
    stand.provider.on(model("a")).respond(Reply::text("").usage(100, 500));
    let first = stand.dies_before_commit(1);
    let doomed = stand.replica(&first).await;
    let stages = json!([{ "id": "a", "prompt": "ask", "model": ["fake/a", "fake/b"] }]);
    let run = bench::submit(&doomed, &pipeline(None, &stages), json!({})).await;
    first.died().await;
    let detail = stand.finish(run).await;
    assert_eq!(stand.provider.call_count(), 2, "the answer was found");
    assert_unknown(&detail.run.totals, 1);
    assert_eq!(detail.run.totals.cost_usd, detail.run.totals.unknown_usd + COST);
}

#[tokio::test]
async fn a_take_over_that_finds_the_answer_of_one_former_owner_books_the_call_of_the_other() {
    let stand = Stand::start().await;
    stand.provider.on(any()).once(Reply::hang());
    let first = stand.front();
    let doomed = stand.replica(&first).await;
    let run = bench::submit(&doomed, &pipeline(None, &json!([{ "id": "a", "prompt": "ask" }])), json!({})).await;
    asked(&stand.provider, 1).await;
    first.kill();
    // It commits that it has the run; then it buys, and dies before it commits what it bought.
    let second = stand.dies_before_commit(2);
    let _doomed = stand.replica(&second).await;
    second.died().await;
    let detail = stand.finish(run).await;
    assert_eq!(stand.provider.call_count(), 2, "the second answer was found");
    assert_unknown(&detail.run.totals, 1);
    assert_eq!(detail.run.totals.cost_usd, detail.run.totals.unknown_usd + COST);
}

/// A replica takes the run over and drains before it has begun anything: its first commit tells only that it has it.
async fn take_over_and_drain(stand: &Stand) {
    let front = stand.front();
    front.set("commit", Fault::HoldAnswer);
    let drained = stand.replica(&front).await;
    front.call_after("commit", 0).await;
    drained.begin_drain();
    front.mend("commit");
    drained.drain(Duration::from_secs(10)).await;
}

#[tokio::test]
async fn a_replica_that_drains_before_it_has_begun_leaves_former_owners_to_the_next_one() {
    let stand = Stand::start().await;
    stand.provider.on(any()).once(Reply::hang());
    let first = stand.front();
    let doomed = stand.replica(&first).await;
    let run = bench::submit(&doomed, &pipeline(None, &json!([{ "id": "a", "prompt": "ask" }])), json!({})).await;
    asked(&stand.provider, 1).await;
    first.kill();
    take_over_and_drain(&stand).await;
    let detail = stand.finish(run).await;
    assert_eq!(stand.provider.call_count(), 2);
    assert_unknown(&detail.run.totals, 1);
    assert_eq!(detail.run.totals.cost_usd, detail.run.totals.unknown_usd + COST);
}

#[tokio::test]
async fn an_answer_that_a_dead_replica_bought_stays_a_purchase_after_a_drain() {
    let stand = Stand::start().await;
    let first = stand.dies_before_commit(1);
    let doomed = stand.replica(&first).await;
    let run = bench::submit(&doomed, &pipeline(None, &json!([{ "id": "a", "prompt": "ask" }])), json!({})).await;
    first.died().await;
    take_over_and_drain(&stand).await;
    let totals = stand.finish(run).await.run.totals;
    assert_eq!((stand.provider.call_count(), totals.cost_usd, totals.saved_usd), (1, COST, Usd::ZERO));
    assert_eq!((totals.calls, totals.unknown_calls), (1, 0));
}

#[tokio::test]
async fn a_crash_does_not_use_up_a_budget_with_calls_that_are_only_presumed() {
    let stand = Stand::start().await;
    stand.provider.on(contains("ask one")).once(Reply::hang());
    stand.provider.on(contains("ask two")).once(Reply::hang());
    // One worst case fits into this.
    let stages = json!([
        { "id": "one", "prompt": "ask one", "model": ["fake/a", "fake/b", "fake/c"] },
        { "id": "two", "needs": ["one"], "prompt": "ask two" },
    ]);
    let first = stand.front();
    let doomed = stand.replica(&first).await;
    let run = bench::submit(&doomed, &pipeline(Some(0.003), &stages), json!({})).await;
    asked(&stand.provider, 1).await;
    first.kill();
    let second = stand.front();
    let _doomed = stand.replica(&second).await;
    asked(&stand.provider, 3).await;
    second.kill();
    let detail = stand.finish(run).await;
    assert_eq!(stand.provider.call_count(), 4);
    assert_unknown(&detail.run.totals, 4);
    assert_eq!(detail.run.totals.cost_usd, detail.run.totals.unknown_usd + COST + COST);
}

#[tokio::test]
async fn a_replica_that_stops_and_lives_on_books_what_it_sent_and_nothing_else() {
    let mut stand = Stand::start().await;
    stand.slots = 1;
    stand.provider.on(contains("ask first")).once(Reply::hang());
    let front = stand.front();
    let engine = stand.replica(&front).await;
    let one_stage = |prompt: &str| json!([{ "id": "a", "prompt": prompt }]);
    let called = bench::submit(&engine, &pipeline(None, &one_stage("ask first")), json!({})).await;
    asked(&stand.provider, 1).await;
    // It waits for the only slot, and one call fits into its budget.
    let queued = bench::submit(&engine, &pipeline(Some(0.003), &one_stage("ask second")), json!({})).await;
    // The database is away until the replica stops its own work.
    let commits = front.calls("commit");
    let methods = ["claim", "commit", "release", "heartbeat"];
    for method in methods {
        front.set(method, Fault::Refuse);
    }
    front.call_after("commit", commits).await;
    front.mend("heartbeat");
    front.next_call("heartbeat").await;
    for method in methods {
        front.mend(method);
    }
    for run in [called, queued] {
        finish(&engine, run).await;
    }
    let totals = async |run| {
        let detail = stand.store.run(&TenantId::default(), run).await.expect("read").expect("there");
        assert_state(&detail.run, RunState::Succeeded);
        detail.run.totals
    };
    let (called, queued) = (totals(called).await, totals(queued).await);
    assert_unknown(&called, 1);
    assert_eq!(called.cost_usd, called.unknown_usd + COST);
    assert_eq!((queued.unknown_calls, queued.cost_usd), (0, COST));
    assert_eq!(stand.provider.call_count(), 3);
}
