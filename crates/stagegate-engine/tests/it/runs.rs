//! Runs from their acceptance to their end.

use std::time::Duration;

use serde_json::json;
use stagegate_core::{Code, Json, RunState, StageState, TenantId, Verdict};
use stagegate_engine::{Action, PlannedOutcome};
use stagegate_testkit::provider::{Reply, contains};

use crate::bench::{Bench, assert_state, canonical, engine, finish, quick};

#[tokio::test]
async fn five_stages_run_in_order_and_the_last_two_overlap() {
    let bench = Bench::start().await;
    bench.provider.set_latency(Duration::from_millis(150));
    let detail = bench.run(&canonical(), json!({ "text": "hello" })).await;
    assert_state(&detail.run, RunState::Succeeded);
    assert_eq!(detail.run.totals.calls, 5);
    let calls = bench.provider.calls();
    assert_eq!(calls.len(), 5);
    assert!(calls[3].overlaps(&calls[4]), "four and five run side by side");
    assert!(detail.stages.iter().all(|stage| stage.state == StageState::Succeeded));
    assert!(detail.run.totals.cost_usd.nanos() > 0);
}

#[tokio::test]
async fn an_input_that_does_not_fit_is_refused_and_nothing_is_kept() {
    let bench = Bench::start().await;
    let source = canonical().replace("\"stages\":", r#""input": {"type":"object","required":["text"]},"stages":"#);
    let tenant = TenantId::default();
    let (version, _) = bench.engine.register(&tenant, &source).await.expect("valid");
    let submit = stagegate_engine::Submit {
        tenant: tenant.clone(),
        pipeline: version.name,
        version: None,
        input: json!({}).into(),
        cache_mode: None,
        priority: 0,
        labels: stagegate_core::pipeline::Labels::new(),
        idempotency: None,
        start_at: None,
        request_id: None,
    };
    let error = bench.engine.submit(submit).await.expect_err("refused");
    assert_eq!(error.code, Code::InvalidInput);
    assert!(error.violations[0].path.starts_with("input"), "{error:?}");
}

#[tokio::test]
async fn a_definition_that_is_put_first_again_is_the_newest_under_one_new_number() {
    let bench = Bench::start().await;
    let tenant = TenantId::default();
    let (old, new) = (canonical(), canonical().replace("stage-one", "stage-uno"));
    let put = async |source: &str| {
        let (version, is_new) = bench.engine.register_as_newest(&tenant, source).await.expect("valid");
        (version.version, is_new)
    };
    assert_eq!((put(&old).await, put(&old).await), ((1, true), (1, false)));
    assert_eq!(put(&new).await, (2, true));
    // As replicas do that read the same directory.
    assert_eq!(tokio::join!(put(&old), put(&old), put(&old)).1.0, 3);
    assert_eq!((put(&old).await, put(&new).await, put(&old).await), ((3, false), (4, true), (5, true)));
    let (pipeline, newest) =
        bench.engine.pipeline(&tenant, &"canonical".parse().expect("a name"), None).await.expect("there");
    let (first, _) = bench.engine.pipeline(&tenant, &pipeline.name, Some(1)).await.expect("there");
    assert!(newest == 5 && pipeline.definition == first.definition);
    let (version, is_new) = bench.engine.register(&tenant, &old).await.expect("valid");
    assert_eq!((version.version, is_new), (1, false), "the API's registrations know it as ever");
}

#[tokio::test]
async fn a_failed_call_is_retried_and_seen() {
    let bench = Bench::start().await;
    bench.provider.on(contains("stage-two")).once(Reply::status(503, "{}")).respond(Reply::echo());
    let detail = bench.run(&canonical(), json!({ "text": "hello" })).await;
    assert_state(&detail.run, RunState::Succeeded);
    let two = "two".parse().expect("valid");
    let stage = bench.engine.store().stage(&TenantId::default(), detail.run.id, &two).await.expect("read");
    let attempts = stage.expect("there").attempts;
    assert_eq!(attempts.iter().map(|a| a.verdict).collect::<Vec<_>>(), [Verdict::Errored, Verdict::Passed]);
    assert_eq!(attempts[0].failure.as_ref().expect("why").code, Code::ProviderFailed);
}

#[tokio::test]
async fn an_exhausted_quota_is_never_retried() {
    let bench = Bench::start().await;
    let body = json!({ "error": { "code": "insufficient_quota", "type": "insufficient_quota", "message": "no more" } });
    bench.provider.on(contains("stage-one")).respond(Reply::status(429, body.to_string()));
    let detail = bench.run(&canonical(), json!({ "text": "hello" })).await;
    assert_state(&detail.run, RunState::Failed);
    assert_eq!(detail.run.failure.expect("why").code, Code::ProviderQuota);
    assert_eq!(bench.provider.call_count(), 1);
}

#[tokio::test]
async fn a_failed_run_is_retried_from_its_failed_stage() {
    let bench = Bench::start().await;
    bench.provider.on(contains("stage-three")).once(Reply::status(400, "{}")).respond(Reply::echo());
    let detail = bench.run(&canonical(), json!({ "text": "hello" })).await;
    assert_state(&detail.run, RunState::Failed);
    let before = bench.provider.call_count();
    bench.engine.act(&TenantId::default(), detail.run.id, Action::Retry, None).await.expect("accepted");
    bench.until(detail.run.id, "run.retried").await;
    let detail = wait_for(&bench, detail.run.id, RunState::Succeeded).await;
    assert_eq!(bench.provider.call_count() - before, 3, "one and two have their checkpoints");
    assert_eq!(detail.run.failure, None);
}

#[tokio::test]
async fn a_cancel_stops_the_calls_and_ends_the_run() {
    let bench = Bench::start().await;
    bench.provider.on(contains("stage-two")).respond(Reply::hang());
    let run = bench.submit(&canonical(), json!({ "text": "hello" })).await;
    bench.until(run, "stage.succeeded").await;
    bench.engine.act(&TenantId::default(), run, Action::Cancel, Some("ada".to_owned())).await.expect("accepted");
    bench.finish(run).await;
    let detail = bench.detail(run).await;
    assert_state(&detail.run, RunState::Cancelled);
    let error = bench.engine.act(&TenantId::default(), run, Action::Cancel, None).await.expect_err("ended");
    assert_eq!(error.code, Code::WrongState);
}

#[tokio::test]
async fn a_call_that_hangs_meets_its_timeout() {
    let bench = Bench::start().await;
    bench.provider.on(contains("stage-one")).respond(Reply::hang());
    let source = canonical()
        .replace("\"max_attempts\":3", "\"max_attempts\":1,\"max_wait\":\"1ms\"")
        .replace("\"id\":\"one\"", "\"id\":\"one\",\"timeout\":\"200ms\"");
    let detail = bench.run(&source, json!({ "text": "hello" })).await;
    assert_state(&detail.run, RunState::Failed);
    let code = detail.run.failure.expect("why").code;
    assert!(matches!(code, Code::StageTimeout | Code::ProviderTimeout), "{code}");
}

#[tokio::test]
async fn a_run_expires_at_its_deadline_even_while_it_is_parked() {
    let bench = Bench::start().await;
    bench.provider.on(contains("stage-one")).respond(Reply::status(429, "{}").header("retry-after", "3600"));
    let source = canonical().replace("\"name\":", "\"deadline\":\"700ms\",\"name\":");
    let detail = bench.run(&source, json!({ "text": "hello" })).await;
    assert_state(&detail.run, RunState::Expired);
    assert_eq!(bench.provider.call_count(), 1);
}

#[tokio::test]
async fn a_long_wait_gives_the_memory_back_and_goes_on() {
    let bench = Bench::start().await;
    let slow_down = Reply::status(429, "{}").header("retry-after", "1");
    bench.provider.on(contains("stage-one")).once(slow_down).respond(Reply::echo());
    let run = bench.submit(&canonical(), json!({ "text": "hello" })).await;
    let events = bench.finish(run).await;
    let names: Vec<_> = events.iter().map(|event| event.kind.name()).collect();
    assert!(names.contains(&"run.waiting") && names.contains(&"run.resumed"), "{names:?}");
    assert_state(&bench.detail(run).await.run, RunState::Succeeded);
}

#[tokio::test]
async fn a_budget_refuses_the_call_that_could_pass_it() {
    let bench = Bench::start().await;
    let source = canonical().replace("\"name\":", "\"budget\":{\"max_cost_usd\":0.0084},\"name\":");
    let detail = bench.run(&source, json!({ "text": "hello" })).await;
    assert_state(&detail.run, RunState::Failed);
    assert_eq!(detail.run.failure.expect("why").code, Code::BudgetExhausted);
    assert!(detail.run.totals.cost_usd.dollars() <= 0.0084);
    assert_eq!(bench.provider.call_count(), 1, "the first call fits; beside what it cost, the next does not");
}

#[tokio::test]
async fn a_plan_spends_nothing_and_knows_what_is_cached() {
    let bench = Bench::start().await;
    let tenant = TenantId::default();
    let (version, _) = bench.engine.register(&tenant, &canonical()).await.expect("valid");
    let (pipeline, number) = bench.engine.pipeline(&tenant, &version.name, None).await.expect("there");
    let input = Json::from(json!({ "text": "hello" }));
    let plan = bench.engine.plan(&tenant, pipeline.clone(), number, input.clone()).await.expect("a plan");
    assert_eq!(bench.provider.call_count(), 0);
    assert!(plan.stages.iter().all(|stage| stage.outcome == PlannedOutcome::Buy));
    assert_eq!(plan.critical_path.len(), 4);
    assert!(plan.cost_usd.nanos() > 0 && plan.tokens > 0);

    bench.run(&canonical(), json!({ "text": "hello" })).await;
    let plan = bench.engine.plan(&tenant, pipeline, number, input.clone()).await.expect("a plan");
    assert!(plan.stages.iter().all(|stage| stage.outcome == PlannedOutcome::Hit), "{plan:?}");
    assert_eq!(plan.cost_usd.nanos(), 0);
    assert!(plan.saved_usd.nanos() > 0 && plan.critical_path.is_empty());
}

#[tokio::test]
async fn a_drained_replica_hands_its_run_to_the_next() {
    let bench = Bench::start().await;
    bench.provider.set_latency(Duration::from_millis(150));
    let run = bench.submit(&canonical(), json!({ "text": "hello" })).await;
    bench.until(run, "stage.succeeded").await;
    bench.engine.drain(Duration::from_secs(5)).await;
    let calls = bench.provider.call_count();
    assert!(calls < 5, "the drain came in the middle");
    let store: &dyn stagegate_core::Store = &*bench.store;
    let events = store.events(&TenantId::default(), run, 0, 1_000).await.expect("reads");
    let count = |name: &str| events.iter().filter(|event| event.kind.name() == name).count();
    assert_eq!(count("stage.started"), count("stage.succeeded"), "no stage starts while draining");
    let next = engine(quick(), &bench.store, &bench.llm).await;
    finish(&next, run).await;
    assert_state(&bench.detail(run).await.run, RunState::Succeeded);
    assert_eq!(bench.provider.call_count(), 5, "what was under way was finished and kept");
}

async fn wait_for(bench: &Bench, run: stagegate_core::RunId, state: RunState) -> stagegate_core::store::RunDetail {
    let mut after = 0;
    loop {
        let detail = bench.detail(run).await;
        if detail.run.state == state {
            return detail;
        }
        let mut events = bench.engine.follow(TenantId::default(), run, after.max(detail.run.last_seq));
        if let Some(Ok(batch)) = futures::StreamExt::next(&mut events).await {
            after = batch.last().map_or(after, |event| event.seq);
        }
    }
}
