//! What callers write, evaluated: at its limits it ends a run or a request with a clear error, never a replica.

use std::sync::Arc;

use serde_json::json;
use stagegate_core::{Code, RunState, TenantId};

use crate::bench::{Bench, assert_state};

#[tokio::test]
async fn numbers_at_their_ends_end_a_run_wherever_they_are_written() {
    let bench = Bench::start().await;
    for (name, rest) in [
        ("transform", "stages: [{ id: a, transform: '{{ 10 is divisibleby input.n }}' }]"),
        (
            "gate",
            "stages: [{ id: a, transform: x, gate: { checks: [{ expression: 10 is divisibleby input.n }] }, retry: { max_attempts: 1 } }]",
        ),
        ("output", "stages: [{ id: a, transform: x }]\noutput: { r: '{{ 10 is divisibleby input.n }}' }"),
        ("concurrency", "concurrency: { key: 10 is divisibleby input.n }\nstages: [{ id: a, transform: x }]"),
    ] {
        let detail = bench.run(&format!("name: {name}\n{rest}\n"), json!({ "n": 0 })).await;
        let expected = if name == "gate" { RunState::Failed } else { RunState::Succeeded };
        assert_state(&detail.run, expected);
    }
}

#[tokio::test]
async fn a_large_output_of_a_run_is_rendered_whole() {
    let bench = Bench::start().await;
    let source = "name: large\nstages: [{ id: a, transform: x }]\noutput: { text: '{% for i in range(9000) %}{{ i }}{% endfor %}' }\n";
    let detail = bench.run(source, json!({})).await;
    assert_state(&detail.run, RunState::Succeeded);
    let length = detail.output.and_then(|output| output.parse()["text"].as_str().map(str::len));
    assert_eq!(length, Some(34_890));
}

#[tokio::test]
async fn an_output_that_cannot_be_rendered_fails_its_run_also_where_it_is_large() {
    let bench = Bench::start().await;
    let source = "name: large\nstages: [{ id: a, transform: x }]\noutput: { text: '{% for i in range(9000) %}{{ i }}{% endfor %}{{ 1 // 0 }}' }\n";
    let detail = bench.run(source, json!({})).await;
    assert_state(&detail.run, RunState::Failed);
    assert_eq!(detail.run.failure.expect("why").code, Code::TemplateFailed);
}

#[tokio::test]
async fn a_large_gate_is_judged_as_a_small_one_is() {
    let bench = Bench::start().await;
    let source = "name: gate\nstages: [{ id: a, transform: '{{ input.text }}', gate: { checks: [{ matches: '(?i)needle$' }, { max_chars: 900000 }, { expression: \"output | length > 5\" }] } }]\n";
    for (text, expected) in
        [("hay needle".to_owned(), RunState::Succeeded), ("hay ".repeat(100_000) + "needle", RunState::Succeeded)]
    {
        let detail = bench.run(source, json!({ "text": text })).await;
        assert_state(&detail.run, expected);
    }
}

#[tokio::test]
async fn a_plan_of_many_renderings_over_a_large_input_is_made() {
    let bench = Bench::start().await;
    let message = json!({ "role": "user", "content": "{{ input.b }}" });
    let stages: Vec<_> = (0..14)
        .map(|n| json!({ "id": format!("a{n}"), "model": "fake/model", "messages": vec![message.clone(); 100] }))
        .collect();
    let definition = json!({ "name": "p", "stages": stages }).to_string();
    let tenant = TenantId::default();
    let pipeline = bench.engine.validate(&tenant, &definition).await.expect("valid");
    let input = json!({ "b": 1, "a": vec![0; 100_000] });
    let plan = bench.engine.plan(&tenant, Arc::new(pipeline), 1, input.into()).await.expect("a plan");
    assert_eq!(plan.stages.len(), 14);
}

#[tokio::test]
async fn mistakes_in_long_names_are_told_without_comparing_them() {
    let bench = Bench::start().await;
    let long = |letter: &str, n: usize| format!("{}{n}", letter.repeat(4_000));
    let needs: Vec<_> = (0..40).map(|n| long("z", n)).collect();
    let mut stages: Vec<_> = (0..60).map(|n| json!({ "id": long("a", n), "transform": "x" })).collect();
    stages.push(json!({ "id": "b", "transform": "{{ input.aaaa }}", "needs": needs }));
    let keys: serde_json::Map<_, _> = (0..50).map(|n| (long("k", n), json!(true))).collect();
    let definition = json!({ "name": "p", "input": { "properties": keys }, "stages": stages }).to_string();
    let error = bench.engine.validate(&TenantId::default(), &definition).await.expect_err("mistakes");
    assert_eq!(error.code, Code::InvalidDefinition);
    assert!(error.violations.len() >= 90, "{}", error.violations.len());
    let told: usize = error.violations.iter().map(|violation| violation.to_string().len()).sum();
    assert!(told < 500_000, "{told} bytes of mistakes");
}
