//! Queues and outages: no stage fails by our own queueing, nor by a provider that asks to wait or is away for a while.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use stagegate_core::{EventKind, RunId, RunState, StageState, Verdict, pipeline::Span};
use stagegate_engine::config::EngineConfig;
use stagegate_testkit::provider::{End, Matcher, Reply, any, both, model};

use crate::bench::{Bench, assert_state, quick};

/// One stage, with quick pauses and these keys beside.
fn one_stage(more: &Value) -> String {
    let mut source = json!({
        "name": "waits",
        "defaults": { "model": "fake/model", "retry": { "max_attempts": 2, "backoff": "50ms..200ms", "max_wait": "1m" } },
        "stages": [{ "id": "one", "prompt": "asks {{ input.text }}" }],
    });
    let (Some(stage), Some(more)) = (source["stages"][0].as_object_mut(), more.as_object()) else {
        return String::new();
    };
    stage.extend(more.clone());
    source.to_string()
}

async fn submit_many(bench: &Bench, source: &str, count: usize) -> Vec<RunId> {
    let mut runs = Vec::with_capacity(count);
    for n in 0..count {
        runs.push(bench.submit(source, json!({ "text": format!("number {n}") })).await);
    }
    runs
}

async fn assert_all_succeed(bench: &Bench, runs: Vec<RunId>) {
    for run in runs {
        bench.finish(run).await;
        assert_state(&bench.detail(run).await.run, RunState::Succeeded);
    }
}

#[tokio::test]
async fn runs_that_queue_for_slots_longer_than_their_timeout_all_succeed() {
    let bench = Bench::configured(quick(), |config| {
        config.providers.get_mut("fake").expect("configured").max_concurrency = 2;
    })
    .await;
    bench.provider.set_latency(Duration::from_millis(200));
    let runs = submit_many(&bench, &one_stage(&json!({ "timeout": "2s" })), 30).await;
    assert_all_succeed(&bench, runs).await;
    assert_eq!((bench.provider.call_count(), bench.provider.most_under_way()), (30, 2), "each is asked once");
}

#[tokio::test]
async fn an_outage_that_passes_fails_no_run() {
    let bench = Bench::configured(quick(), |config| config.breaker.open_for = Span(Duration::from_millis(400))).await;
    let away = Arc::new(AtomicBool::new(true));
    let is_away: Matcher = {
        let away = Arc::clone(&away);
        Arc::new(move |_| away.load(Ordering::SeqCst))
    };
    bench.provider.on(is_away).respond(Reply::status(500, "{}"));
    let runs = submit_many(&bench, &one_stage(&json!({})), 40).await;
    // More than every attempt that a run may have would have been used up.
    for run in &runs {
        while bench.detail(*run).await.stages.first().is_none_or(|stage| stage.outages < 3) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    let asked = bench.provider.call_count();
    assert!(asked < 3 * runs.len(), "the breaker spares it: {asked}");
    away.store(false, Ordering::SeqCst);
    assert_all_succeed(&bench, runs).await;
}

/// A provider that takes so many calls in each window, and says when to come back.
fn limited(calls: usize, window: Duration) -> Matcher {
    let taken: Mutex<(Option<Instant>, usize)> = Mutex::default();
    Arc::new(move |_| {
        let (since, count) = &mut *taken.lock().expect("no panic");
        if since.is_none_or(|since| since.elapsed() >= window) {
            (*since, *count) = (Some(Instant::now()), 0);
        }
        *count += 1;
        *count > calls
    })
}

#[tokio::test]
async fn a_provider_that_limits_the_rate_fails_no_run_and_is_not_stormed() {
    let bench = Bench::start().await;
    let window = Duration::from_millis(500);
    let refusal = Reply::status(429, "{}").header("retry-after-ms", "500");
    bench.provider.on(limited(10, window)).respond(refusal);
    let runs = submit_many(&bench, &one_stage(&json!({})), 60).await;
    assert_all_succeed(&bench, runs).await;
    let asked = bench.provider.call_count();
    assert!(asked < 60 * 3, "asked {asked} times for 60 answers");
}

#[tokio::test]
async fn the_next_model_is_asked_when_the_first_does_not_answer_in_its_time() {
    let bench = Bench::start().await;
    bench.provider.on(model("hangs")).respond(Reply::hang());
    let source = one_stage(&json!({ "model": ["fake/hangs", "fake/model"], "timeout": "300ms" }));
    let run = bench.submit(&source, json!({ "text": "hello" })).await;
    let events = bench.finish(run).await;
    assert_state(&bench.detail(run).await.run, RunState::Succeeded);
    assert!(!events.iter().any(|event| matches!(event.kind, EventKind::StageRetrying { .. })), "in one attempt");
}

#[tokio::test]
async fn an_answer_that_was_cut_is_mended_and_the_wait_of_the_next_model_is_kept() {
    let bench = Bench::start().await;
    bench.provider.on(model("cuts")).respond(Reply::text("half an ans").end(End::Length));
    let refusal = Reply::status(429, r#"{"error":{"message":"slow down"}}"#).header("retry-after-ms", "700");
    bench.provider.on(model("limited")).once(refusal);
    let source = one_stage(&json!({ "model": ["fake/cuts", "fake/limited"] }));
    let run = bench.submit(&source, json!({ "text": "hello" })).await;
    bench.finish(run).await;
    assert_state(&bench.detail(run).await.run, RunState::Succeeded);
    let calls = bench.provider.calls();
    let models: Vec<_> = calls.iter().map(|call| call.model.as_str()).collect();
    assert_eq!(models, ["cuts", "limited", "cuts", "limited"], "the wait is kept");
    let critique = &calls[2].prompt_text;
    assert!(critique.contains("the answer was cut at the token limit"), "{critique}");
    assert!(!critique.contains("slow down"), "{critique}");
}

#[tokio::test]
async fn answers_that_cannot_be_used_stay_bounded_beside_an_outage_and_then_the_others_are_waited_for() {
    let bench = Bench::start().await;
    bench.provider.on(model("empties")).respond(Reply::text(""));
    bench.provider.on(model("cuts")).respond(Reply::text("half an ans").end(End::Length));
    let away = Arc::new(AtomicBool::new(true));
    let is_away: Matcher = {
        let away = Arc::clone(&away);
        Arc::new(move |_| away.load(Ordering::SeqCst))
    };
    bench.provider.on(both(model("limited"), is_away)).respond(Reply::status(429, "{}"));
    let mut runs = Vec::new();
    for bad in ["empties", "cuts"] {
        let source = one_stage(&json!({ "model": [format!("fake/{bad}"), "fake/limited"] }));
        runs.push(bench.submit(&source, json!({ "text": bad })).await);
    }
    for run in &runs {
        while bench.detail(*run).await.stages.first().is_none_or(|stage| stage.outages < 5) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    away.store(false, Ordering::SeqCst);
    assert_all_succeed(&bench, runs).await;
    let calls = bench.provider.calls();
    for bad in ["empties", "cuts"] {
        let count = calls.iter().filter(|call| call.model == bad).count();
        assert_eq!(count, 2, "`{bad}` is asked as often as `max_attempts` says");
    }
}

#[tokio::test]
async fn what_a_run_waits_for_stands_in_its_record() {
    let bench = Bench::with(EngineConfig { park_after: Span(Duration::from_millis(100)), ..quick() }).await;
    bench.provider.on(any()).once(Reply::status(503, "{}").header("retry-after", "120"));
    let run = bench.submit(&one_stage(&json!({})), json!({ "text": "hello" })).await;
    let events = bench.until(run, "run.waiting").await;
    let Some(EventKind::RunWaiting { reason: Some(reason), until: Some(until) }) = events.last().map(|e| &e.kind)
    else {
        panic!("{events:?}")
    };
    assert!(reason.starts_with("stage `one` waits for an outage to pass: met once since "), "{reason}");
    let detail = bench.detail(run).await;
    let waiting = detail.stages[0].waiting().expect("it waits");
    assert_eq!((&waiting.reason, waiting.until), (reason, Some(*until)));
    let stage = &detail.stages[0];
    assert_eq!((stage.state, stage.verdict, stage.judged), (StageState::Waiting, Some(Verdict::Errored), 0));
}

#[tokio::test]
async fn an_outage_beyond_max_wait_fails_the_run_and_tells_of_it() {
    let bench = Bench::start().await;
    bench.provider.on(both(any(), model("model"))).respond(Reply::status(500, "{}"));
    let source = one_stage(&json!({ "retry": { "max_attempts": 1, "backoff": "20ms..50ms", "max_wait": "300ms" } }));
    let run = bench.submit(&source, json!({ "text": "hello" })).await;
    bench.finish(run).await;
    let detail = bench.detail(run).await;
    assert_state(&detail.run, RunState::Failed);
    let failure = detail.run.failure.expect("why");
    assert_eq!(failure.code, stagegate_core::Code::ProviderFailed);
    assert!(failure.message.contains("did not pass within `retry.max_wait` (300ms): met "), "{}", failure.message);
}
