//! Money: what a run is booked is what its provider charged, and where nobody heard, the most that it can have charged.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use stagegate_core::{Code, EventKind, RunState, TenantId, Totals, Usd, store::RunDetail};
use stagegate_engine::Action;
use stagegate_testkit::provider::{FakeProvider, Reply, any, contains, model};

use crate::bench::{self, Bench, assert_state, finish, quick};

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
async fn what_a_dead_replica_may_have_bought_is_booked_by_its_successor() {
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
async fn a_drained_replica_books_what_it_cuts_off_before_it_gives_the_run_back() {
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
