//! Inputs that do not fit into memory together: they wait for each other, and none is lost.

use chrono::TimeDelta;
use serde_json::json;
use stagegate_core::{Clock, Code, Json, RunState, SystemClock, TenantId};
use stagegate_engine::{Submit, config::EngineConfig};

use super::bench::{Bench, assert_state, quick};

/// A fifth of the smallest budget is for runs; a run holds its input twice.
const MEMORY_BYTES: u64 = 64 << 20;
const INPUT_BYTES: usize = 3 << 20;
const RUNS: usize = 8;

#[tokio::test]
async fn runs_whose_inputs_do_not_fit_together_wait_for_room_and_all_finish() {
    let bench = Bench::with(EngineConfig { memory_max_bytes: Some(MEMORY_BYTES), ..quick() }).await;
    let definition =
        json!({ "name": "large", "stages": [{ "id": "only", "prompt": "{{ run.id }}", "model": "fake/model" }] });
    let tenant = TenantId::default();
    let (version, _) = bench.engine.register(&tenant, &definition.to_string()).await.expect("valid");
    let input = Json::from(json!({ "text": "x".repeat(INPUT_BYTES) }));
    let start_at = Some(SystemClock.now() + TimeDelta::milliseconds(500));
    let mut runs = Vec::new();
    for n in 0..RUNS {
        let submit = Submit {
            tenant: tenant.clone(),
            pipeline: version.name.clone(),
            version: Some(version.version),
            input: input.clone(),
            cache_mode: None,
            priority: 0,
            labels: [].into(),
            idempotency: None,
            // Half of them fall due together; the others are leased with their insert, or queued where nothing is free.
            start_at: start_at.filter(|_| n % 2 == 0),
            request_id: None,
        };
        runs.push(bench.engine.submit(submit).await.expect("accepted").0.id);
    }
    let most = bench.engine.memory().runs.max_bytes();
    for run in runs {
        let mut events = bench.engine.follow(tenant.clone(), run, 0);
        while let Some(batch) = futures::StreamExt::next(&mut events).await {
            batch.expect("readable");
            assert!(bench.engine.memory().runs.held() <= most, "what is under way fits the budget");
        }
        assert_state(&bench.detail(run).await.run, RunState::Succeeded);
    }
}

#[tokio::test]
async fn a_run_larger_than_the_whole_budget_goes_through_alone() {
    let bench = Bench::with(EngineConfig { memory_max_bytes: Some(MEMORY_BYTES), ..quick() }).await;
    let definition = json!({ "name": "huge", "stages": [{ "id": "only", "transform": "{{ input.text | length }}" }] });
    let bytes = usize::try_from(bench.engine.memory().runs.max_bytes()).expect("small");
    let detail = bench.run(&definition.to_string(), json!({ "text": "x".repeat(bytes) })).await;
    assert_state(&detail.run, RunState::Succeeded);
    assert_eq!(detail.output.expect("there"), json!({ "only": bytes.to_string() }));
}

#[tokio::test]
async fn a_stage_that_names_more_values_than_fit_into_memory_fails_and_harms_nothing_else() {
    let bench = Bench::with(EngineConfig { memory_max_bytes: Some(MEMORY_BYTES), ..quick() }).await;
    let values = |id: &str| {
        // Some 20 MB each once they are parsed.
        let transform = "[{% for n in range(9000) %}[{\"\":0},{\"\":0},{\"\":0}],{% endfor %}0]";
        json!({ "id": id, "transform": transform, "output": "json" })
    };
    let all: Vec<String> = (0..6).map(|n| format!("a{n}")).collect();
    let named = all.iter().map(|id| format!("{{{{ stages.{id}.output | length }}}}")).collect::<Vec<_>>().join(" ");
    let mut stages: Vec<_> = all.iter().map(|id| values(id)).collect();
    stages.push(json!({ "id": "last", "needs": all, "transform": named }));
    let detail = bench.run(&json!({ "name": "large", "stages": stages }).to_string(), json!({})).await;
    assert_state(&detail.run, RunState::Failed);
    let failure = detail.run.failure.expect("there");
    assert_eq!(failure.code, Code::TemplateFailed);
    assert!(failure.message.contains("engine.memory_max_bytes"), "{failure:?}");
    let small = json!({ "name": "small", "stages": [{ "id": "only", "transform": "done" }] });
    assert_state(&bench.run(&small.to_string(), json!({})).await.run, RunState::Succeeded);
}
