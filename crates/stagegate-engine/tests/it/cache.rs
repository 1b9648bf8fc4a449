//! What is bought, what is not, and what is bought again.

use serde_json::json;
use stagegate_core::{RunState, TenantId, cache::CacheScope};
use stagegate_testkit::provider::{Reply, both, contains, stages};

use crate::bench::{Bench, assert_state, canonical};

#[tokio::test]
async fn a_second_identical_run_buys_nothing() {
    let bench = Bench::start().await;
    let first = bench.run(&canonical(), json!({ "text": "hello" })).await;
    let second = bench.run(&canonical(), json!({ "text": "hello" })).await;
    assert_eq!(bench.provider.call_count(), 5);
    assert_eq!((second.run.totals.hits, second.run.totals.cost_usd.nanos()), (5, 0));
    assert_eq!(second.run.totals.saved_usd, first.run.totals.cost_usd);
    assert_eq!(second.output, first.output);
}

#[tokio::test]
async fn an_edited_stage_buys_only_itself() {
    let bench = Bench::start().await;
    bench.run(&canonical(), json!({ "text": "hello" })).await;
    bench.provider.clear_calls();
    bench.run(&canonical().replace("stage-four", "stage-four, but better"), json!({ "text": "hello" })).await;
    let calls = bench.provider.calls();
    assert_eq!(calls.len(), 1);
    assert!(calls[0].prompt_text.contains("but better"));
}

#[tokio::test]
async fn what_is_invalidated_is_bought_again() {
    let bench = Bench::start().await;
    bench.run(&canonical(), json!({ "text": "hello" })).await;
    bench.provider.clear_calls();
    let scope = CacheScope::Pipeline("canonical".parse().expect("valid"));
    bench.engine.llm().invalidate(&TenantId::default(), &scope).await.expect("invalidated");
    bench.run(&canonical(), json!({ "text": "hello" })).await;
    assert_eq!(bench.provider.call_count(), 5);
}

#[tokio::test]
async fn an_answer_that_passed_after_a_retry_answers_the_first_request_from_then_on() {
    let bench = Bench::start().await;
    bench.provider.on(both(stages(), contains("did not pass review"))).respond(Reply::text("long enough, at last"));
    bench.provider.on(contains("write")).respond(Reply::text("short"));
    let source = r#"{ "name": "gated", "defaults": { "model": "fake/model" }, "stages": [
        { "id": "draft", "prompt": "write", "gate": { "checks": [ { "min_chars": 10 } ] } } ] }"#;
    let first = bench.run(source, json!({})).await;
    assert_state(&first.run, RunState::Succeeded);
    assert_eq!(bench.provider.call_count(), 2);
    let second = bench.run(source, json!({})).await;
    assert_state(&second.run, RunState::Succeeded);
    assert_eq!(bench.provider.call_count(), 2, "the mended answer was kept for the first request");
    assert_eq!(second.output, first.output);
}

#[tokio::test]
async fn an_answer_whose_gate_failed_is_not_reused() {
    let bench = Bench::start().await;
    bench.provider.on(contains("write")).respond(Reply::text("short"));
    let source = r#"{ "name": "gated", "defaults": { "model": "fake/model", "retry": { "max_attempts": 1 } }, "stages": [
        { "id": "draft", "prompt": "write", "gate": { "checks": [ { "min_chars": 10 } ] } } ] }"#;
    for bought in 1..=2 {
        let detail = bench.run(source, json!({})).await;
        assert_state(&detail.run, RunState::Failed);
        assert_eq!(bench.provider.call_count(), bought);
    }
}

#[tokio::test]
async fn with_the_cache_off_each_run_buys_its_own() {
    let bench = Bench::start().await;
    let source = canonical().replace("\"retry\":", "\"cache\":{\"mode\":\"off\"},\"retry\":");
    bench.run(&source, json!({ "text": "hello" })).await;
    bench.run(&source, json!({ "text": "hello" })).await;
    assert_eq!(bench.provider.call_count(), 10);
}
