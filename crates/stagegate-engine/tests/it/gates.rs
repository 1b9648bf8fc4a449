//! Gates: checks, judges, retries with the critique, holds.

use serde_json::json;
use stagegate_core::{
    Code, Evaluator, RunState, Store as _, TenantId, Verdict,
    store::{NewSignal, SignalKind, Signalled},
};
use stagegate_engine::Action;
use stagegate_testkit::provider::{Reply, both, contains, judges, stages};

use crate::bench::{Bench, assert_state};

fn gated(gate: &str) -> String {
    format!(
        r#"{{ "name": "gated", "defaults": {{ "model": "fake/model" }},
            "stages": [ {{ "id": "draft", "prompt": "write {{{{ input.text }}}}", "gate": {gate} }},
                        {{ "id": "after", "needs": ["draft"], "prompt": "after {{{{ stages.draft.output }}}}" }} ] }}"#
    )
}

#[tokio::test]
async fn a_critique_mends_what_failed_its_checks() {
    let bench = Bench::start().await;
    bench.provider.on(both(stages(), contains("did not pass review"))).respond(Reply::text("long enough, at last"));
    bench.provider.on(contains("write")).respond(Reply::text("short"));
    let detail = bench.run(&gated(r#"{ "checks": [ { "min_chars": 10 } ] }"#), json!({ "text": "x" })).await;
    assert_state(&detail.run, RunState::Succeeded);
    let calls = bench.provider.calls();
    let retried = &calls[1];
    assert!(retried.prompt_text.contains("min_chars"), "the critique names what failed: {}", retried.prompt_text);
    assert!(retried.prompt_text.contains("short"), "and shows the previous answer");
}

#[tokio::test]
async fn a_judge_is_asked_only_when_the_checks_pass_and_its_verdict_is_kept() {
    let bench = Bench::start().await;
    bench.provider.on(judges()).once(Reply::verdict(0.2, "too dry")).respond(Reply::verdict(0.9, "good"));
    bench.provider.on(both(contains("write"), contains("did not pass"))).respond(Reply::text("second, long enough"));
    bench.provider.on(contains("write")).once(Reply::text("x")).respond(Reply::text("first, long enough"));
    let gate = r#"{ "checks": [ { "min_chars": 5 } ], "judge": { "rubric": "Is it lively?", "threshold": 0.8 } }"#;
    let detail = bench.run(&gated(gate), json!({ "text": "x" })).await;
    let stage = "draft".parse().expect("valid");
    let stage = bench.engine.store().stage(&TenantId::default(), detail.run.id, &stage).await.expect("read");
    let attempts = stage.expect("there").attempts;
    assert_eq!(attempts[0].verdict, Verdict::Retry);
    assert!(attempts[0].assessments.iter().all(|assessment| assessment.evaluator == Evaluator::Check));
    let judged: Vec<_> =
        attempts.iter().flat_map(|a| &a.assessments).filter(|a| a.evaluator == Evaluator::Judge).collect();
    assert!(!judged.is_empty());
    let verdict = judged[0];
    assert_eq!((verdict.threshold, verdict.version), (0.8, 1));
    assert!(verdict.model.is_some());
}

#[tokio::test]
async fn a_held_output_waits_for_a_person() {
    let bench = Bench::start().await;
    bench.provider.on(contains("write")).respond(Reply::text("short"));
    let gate = r#"{ "checks": [ { "min_chars": 10 } ], "on_fail": "hold" }"#;
    let run = bench.submit(&gated(gate), json!({ "text": "x" })).await;
    bench.until(run, "run.waiting").await;
    assert_eq!(bench.detail(run).await.run.state, RunState::Waiting);
    let tenant = TenantId::default();
    let draft: stagegate_core::StageId = "draft".parse().expect("valid");
    let after: stagegate_core::StageId = "after".parse().expect("valid");
    let error = bench.engine.act(&tenant, run, Action::Approve(after), None).await.expect_err("not held");
    assert_eq!(error.code, Code::WrongState);
    bench.engine.act(&tenant, run, Action::Approve(draft.clone()), Some("ada".to_owned())).await.expect("accepted");
    bench.finish(run).await;
    assert_state(&bench.detail(run).await.run, RunState::Succeeded);
    let stage = bench.engine.store().stage(&tenant, run, &draft).await.expect("read").expect("there");
    assert_eq!(stage.checkpoint.expect("approved").verdict, Verdict::Approved);
}

#[tokio::test]
async fn a_held_run_whose_signal_cannot_be_read_does_not_park_and_wake_without_end() {
    let bench = Bench::start().await;
    bench.provider.on(contains("write")).respond(Reply::text("short"));
    let gate = r#"{ "checks": [ { "min_chars": 10 } ], "on_fail": "hold" }"#;
    let run = bench.submit(&gated(gate), json!({ "text": "x" })).await;
    bench.until(run, "run.waiting").await;
    let tenant = TenantId::default();
    let unreadable = NewSignal { tenant: tenant.clone(), run, kind: SignalKind::Unknown("}{".into()), by: None };
    let answer = bench.store.signal(&unreadable).await.expect("left");
    assert!(matches!(answer, Signalled::Accepted { .. }), "{answer:?}");
    bench.until(run, "run.resumed").await;
    let draft = "draft".parse().expect("valid");
    bench.engine.act(&tenant, run, Action::Approve(draft), None).await.expect("accepted");
    let events = bench.finish(run).await;
    assert_state(&bench.detail(run).await.run, RunState::Succeeded);
    let parked = events.iter().filter(|event| event.kind.name() == "run.waiting").count();
    assert_eq!(parked, 1, "before the signal came");
}

#[tokio::test]
async fn a_rejected_output_fails_the_run() {
    let bench = Bench::start().await;
    bench.provider.on(contains("write")).respond(Reply::text("short"));
    let gate = r#"{ "checks": [ { "min_chars": 10 } ], "on_fail": "hold" }"#;
    let run = bench.submit(&gated(gate), json!({ "text": "x" })).await;
    bench.until(run, "run.waiting").await;
    let action = Action::Reject("draft".parse().expect("valid"), "too thin".to_owned());
    bench.engine.act(&TenantId::default(), run, action, None).await.expect("accepted");
    bench.finish(run).await;
    let detail = bench.detail(run).await;
    assert_state(&detail.run, RunState::Failed);
    assert_eq!(detail.run.failure.expect("why").code, Code::Rejected);
}

#[tokio::test]
async fn an_answer_that_is_cut_is_retried_with_that_said() {
    let bench = Bench::start().await;
    let cut = Reply::text("half an ans").end(stagegate_testkit::provider::End::Length);
    bench.provider.on(both(contains("write"), contains("did not pass"))).respond(Reply::text("whole"));
    bench.provider.on(contains("write")).respond(cut);
    let detail = bench.run(&gated("{}"), json!({ "text": "x" })).await;
    assert_state(&detail.run, RunState::Succeeded);
}
