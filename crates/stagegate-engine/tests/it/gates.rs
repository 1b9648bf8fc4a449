//! Gates: checks, judges, retries with the critique, holds.

use std::time::Duration;

use futures::StreamExt as _;
use serde_json::{Value, json};
use stagegate_core::{
    Capabilities, Code, Decision, Evaluator, EventKind, Json, ReplicaId, RunState, StageState, Store as _, TenantId,
    Verdict,
    store::{Heartbeat, NewSignal, SignalKind, Signalled},
};
use stagegate_engine::{Action, Approval};
use stagegate_testkit::provider::{FakeProvider, Reply, both, contains, judges, stages};

use crate::{
    bench::{Bench, assert_state, finish, quick, submit},
    stand::{Kind, Noted, Stand},
};

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

fn approval(stage: &str, comment: Option<&str>, output: Option<Value>) -> Action {
    let (stage, comment) = (stage.parse().expect("valid"), comment.map(str::to_owned));
    Action::ApproveWith(Box::new(Approval { stage, comment, output: output.map(Json::from) }))
}

#[tokio::test]
async fn an_edited_output_is_held_to_what_every_output_of_its_stage_is() {
    let bench = Bench::start().await;
    bench.provider.on(contains("write")).respond(Reply::text("short"));
    let gate = r#"{ "checks": [ { "min_chars": 10 }, { "not_contains": "lorem" },
                                { "expression": "input.text in output" } ], "on_fail": "hold" }"#;
    let run = bench.submit(&gated(gate), json!({ "text": "x" })).await;
    bench.until(run, "run.waiting").await;
    let tenant = TenantId::default();
    let act = async |output| bench.engine.act(&tenant, run, approval("draft", None, Some(output)), None).await;
    for (output, failed) in [
        (json!("tiny"), &["min_chars", "expression"][..]),
        (json!("lorem ipsum x"), &["not_contains"]),
        (json!({ "x": "a map, where text is asked for" }), &["text"]),
        (json!(null), &["text"]),
    ] {
        let refused = act(output.clone()).await.expect_err("it does not fit");
        assert_eq!(refused.code, Code::OutputRefused, "{output}");
        let told: Vec<&str> = refused.violations.iter().map(|violation| violation.message.as_str()).collect();
        assert_eq!(told.len(), failed.len(), "{told:?}");
        assert!(failed.iter().all(|part| told.iter().any(|told| told.contains(part))), "{failed:?} in {told:?}");
    }
    assert_eq!(bench.detail(run).await.run.state, RunState::Waiting, "nothing changed");
    act(json!("long enough, with an x")).await.expect("it fits");
    bench.finish(run).await;
    let stage = bench.engine.store().stage(&tenant, run, &"draft".parse().expect("valid")).await.expect("read");
    let stage = stage.expect("there");
    assert_eq!(stage.checkpoint.expect("approved").output, json!("long enough, with an x"));
    assert_eq!(stage.attempts[0].output, Some("short".into()), "what was held is kept with its attempt");
    let calls = bench.provider.calls();
    assert!(calls.iter().any(|call| call.prompt_text.contains("after long enough, with an x")), "others build on it");
}

#[tokio::test]
async fn an_edited_json_output_must_fit_the_stages_schema() {
    let bench = Bench::start().await;
    bench.provider.on(contains("write")).respond(Reply::text(r#"{ "n": 1 }"#));
    let source = r#"{ "name": "shaped", "defaults": { "model": "fake/model" }, "stages": [ { "id": "draft", "prompt": "write",
        "output": { "schema": { "type": "object", "required": ["n"], "properties": { "n": { "type": "integer" } } } },
        "gate": { "checks": [ { "expression": "output.n > 1" } ], "on_fail": "hold" } } ] }"#;
    let run = bench.submit(source, json!({})).await;
    bench.until(run, "run.waiting").await;
    let tenant = TenantId::default();
    for wrong in [json!({ "n": "two" }), json!({}), json!("text"), json!({ "n": 1 })] {
        let action = approval("draft", None, Some(wrong.clone()));
        let refused = bench.engine.act(&tenant, run, action, None).await.expect_err("it does not fit");
        assert_eq!(refused.code, Code::OutputRefused, "{wrong}");
    }
    bench.engine.act(&tenant, run, approval("draft", None, Some(json!({ "n": 2 }))), None).await.expect("it fits");
    bench.finish(run).await;
    assert_eq!(bench.detail(run).await.output.expect("ended"), json!({ "draft": { "n": 2 } }));
}

#[tokio::test]
async fn a_held_output_is_edited_once_and_by_the_attempt_that_is_held() {
    let bench = Bench::start().await;
    bench.provider.on(contains("write")).respond(Reply::text("short"));
    let gate = r#"{ "checks": [ { "min_chars": 6 } ], "on_fail": "hold" }"#;
    let run = bench.submit(&gated(gate), json!({ "text": "x" })).await;
    bench.until(run, "run.waiting").await;
    let tenant = TenantId::default();
    let reject = Action::Reject("draft".parse().expect("valid"), "again".to_owned());
    bench.engine.act(&tenant, run, reject, None).await.expect("accepted");
    bench.finish(run).await;
    bench.engine.act(&tenant, run, Action::Retry, None).await.expect("accepted");
    loop {
        let detail = bench.engine.store().stage(&tenant, run, &"draft".parse().expect("valid")).await.expect("read");
        if detail.is_some_and(|detail| detail.stage.attempt == 2 && detail.stage.state == StageState::Held) {
            break;
        }
        tokio::task::yield_now().await;
    }
    let (ada, ben) = (Some("ada".to_owned()), Some("ben".to_owned()));
    let edit = |text: &str| approval("draft", Some("why"), Some(json!(text)));
    let older = bench.engine.act_on(&tenant, run, edit("of an older attempt"), Some(1), ada.clone()).await;
    assert_eq!(older.expect_err("attempt 2 is held").code, Code::WrongState);
    let both = futures::future::join(
        bench.engine.act_on(&tenant, run, edit("the first edit"), Some(2), ada.clone()),
        bench.engine.act_on(&tenant, run, edit("the second edit"), None, ben.clone()),
    );
    let (winner, output, loser) = match both.await {
        (Ok(_), Err(error)) => (ada, "the first edit", error),
        (Err(error), Ok(_)) => (ben, "the second edit", error),
        both => panic!("one decides: {both:?}"),
    };
    assert_eq!(loser.code, Code::WrongState);
    let events = bench.finish(run).await;
    let decided = events.iter().find_map(|event| match &event.kind {
        EventKind::StageSucceeded { decision: Some(decision), .. } => Some(decision.clone()),
        _ => None,
    });
    assert_eq!(decided, Some(Decision { by: winner, comment: Some("why".to_owned()), edited: true }));
    let stage = bench.engine.store().stage(&tenant, run, &"draft".parse().expect("valid")).await.expect("read");
    assert_eq!(stage.and_then(|stage| stage.checkpoint).expect("approved").output, json!(output));
    let told = serde_json::to_string(&events).expect("JSON");
    assert!(!told.contains(" edit\""), "events hold no output: {told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edit_is_refused_while_a_replica_of_an_older_release_lives_and_the_output_can_be_taken_as_it_is() {
    let stand = Stand::new(Kind::Postgres).await;
    let provider = FakeProvider::start().await;
    provider.on(contains("write")).respond(Reply::text("short"));
    let own = Capabilities::own();
    let older = Heartbeat {
        replica: ReplicaId(uuid::Uuid::from_u128(1)),
        name: "older".to_owned(),
        version: "0.0.1".to_owned(),
        draining: false,
        ttl: Duration::from_mins(1),
        capabilities: Capabilities::of_words(own.words().filter(|word| *word != "edited_approval")),
        way_back: Duration::ZERO,
    };
    stand.store.heartbeat(&older).await.expect("entered");
    let engine = stand.lasting(provider.openai_base_url(), &Noted::default(), quick()).await;
    let gate = r#"{ "checks": [ { "min_chars": 6 } ], "on_fail": "hold" }"#;
    let run = submit(&engine, &gated(gate), json!({ "text": "x" })).await;
    let mut events = engine.follow(TenantId::default(), run, 0);
    while let Some(batch) = events.next().await {
        if batch.expect("readable").iter().any(|event| event.kind.name() == "run.waiting") {
            break;
        }
    }
    let tenant = TenantId::default();
    for (comment, output) in [(Some("why"), None), (None, Some(json!("long enough")))] {
        let refused = engine.act(&tenant, run, approval("draft", comment, output), None).await.expect_err("refused");
        assert_eq!(refused.code, Code::OlderReplica);
    }
    assert_eq!(stand.store.run_record(&tenant, run).await.expect("read").expect("there").state, RunState::Waiting);
    engine
        .act(&tenant, run, Action::Approve("draft".parse().expect("valid")), None)
        .await
        .expect("as every release can");
    finish(&engine, run).await;
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

/// A judge that fails, with this answer, at two attempts.
async fn unjudged(gate: &str, answer: Reply) -> (Bench, stagegate_core::RunId) {
    let bench = Bench::start().await;
    bench.provider.on(judges()).respond(answer);
    bench.provider.on(contains("write")).respond(Reply::text("a good one"));
    let source = gated(gate)
        .replace(r#""id": "draft","#, r#""id": "draft", "retry": { "max_attempts": 2, "backoff": "1ms..1ms" },"#);
    let run = bench.submit(&source, json!({ "text": "x" })).await;
    (bench, run)
}

#[tokio::test]
async fn a_judge_that_fails_is_asked_again_and_then_a_person_decides() {
    use stagegate_testkit::provider::End;
    for (answer, told) in [
        (Reply::text("{\"note\": \"no verdict\"}"), "was not a verdict"),
        (Reply::text("{\"score\": 0.9, \"rea").end(End::Length), "gate.judge.params.max_output_tokens"),
        (Reply::text("").end(End::Length), "gate.judge.params.max_output_tokens"),
        (Reply::text("I cannot").end(End::Refused), "refused"),
    ] {
        // A gate that fails would fail the stage; a judge that fails holds it.
        let (bench, run) = unjudged(r#"{ "judge": { "rubric": "Is it lively?" } }"#, answer).await;
        let events = bench.until(run, "run.waiting").await;
        let shown = format!("{events:?}");
        assert!(shown.contains("the judge failed") && shown.contains(told), "{told}: {shown}");
        let calls = bench.provider.calls();
        assert_eq!(calls.iter().filter(|call| call.prompt_text.contains("write x")).count(), 1, "{told}: bought once");
        let asked = bench.provider.calls_where(&judges());
        let limits: Vec<_> = asked.iter().map(|call| call.body["max_tokens"].as_u64()).collect();
        let was_cut = told.contains("max_output_tokens");
        // An answer that is cut is asked for once more at once, with room to reason.
        let expected =
            if was_cut { vec![Some(1_024), Some(8_192), Some(1_024), Some(8_192)] } else { vec![Some(1_024); 2] };
        assert_eq!(limits, expected, "{told}: asked again");
        let draft: stagegate_core::StageId = "draft".parse().expect("valid");
        let stage = bench.engine.store().stage(&TenantId::default(), run, &draft).await.expect("read").expect("there");
        let held = stage.attempts.last().expect("an attempt");
        assert_eq!(
            (held.verdict, held.output.as_ref().map(stagegate_core::Json::parse)),
            (Verdict::Held, Some(json!("a good one")))
        );
        let judged = held.assessments.last().expect("the judge's");
        assert!(
            judged.judge_failure.is_some() && !judged.passed && judged.reason.contains("was not judged"),
            "{judged:?}"
        );
        assert_eq!(held.score(), None, "nothing was measured");
        bench.engine.act(&TenantId::default(), run, Action::Approve(draft), None).await.expect("accepted");
        bench.provider.on(contains("after a good one")).respond(Reply::text("end"));
        bench.finish(run).await;
        assert_state(&bench.detail(run).await.run, RunState::Succeeded);
    }
}

#[tokio::test]
async fn an_output_whose_judge_failed_is_taken_where_the_gate_says_so() {
    for gate in [
        r#"{ "judge": { "rubric": "Is it lively?" }, "on_exhausted": "accept" }"#,
        r#"{ "judge": { "rubric": "Is it lively?" }, "on_fail": "accept" }"#,
    ] {
        let (bench, run) = unjudged(gate, Reply::text("{}")).await;
        bench.finish(run).await;
        assert_state(&bench.detail(run).await.run, RunState::Succeeded);
        let draft = "draft".parse().expect("valid");
        let stage = bench.engine.store().stage(&TenantId::default(), run, &draft).await.expect("read").expect("there");
        assert_eq!(stage.checkpoint.expect("taken").verdict, Verdict::Accepted);
    }
}

#[tokio::test]
async fn a_judge_that_finds_its_words_again_judges_the_answer_that_is_there() {
    let bench = Bench::start().await;
    bench.provider.on(judges()).once(Reply::text("{}")).respond(Reply::verdict(0.9, "fine"));
    bench.provider.on(contains("write")).respond(Reply::text("a good one"));
    let source = gated(r#"{ "judge": { "rubric": "r" } }"#)
        .replace(r#""id": "draft","#, r#""id": "draft", "retry": { "backoff": "1ms..1ms" },"#);
    let detail = bench.run(&source, json!({ "text": "x" })).await;
    assert_state(&detail.run, RunState::Succeeded);
    let calls = bench.provider.calls();
    assert_eq!(calls.iter().filter(|call| call.prompt_text.contains("write x")).count(), 1);
    assert!(calls.iter().all(|call| !call.prompt_text.contains("did not pass review")), "the output was not to blame");
}

#[tokio::test]
async fn a_judge_has_its_own_prompt_scale_and_parameters() {
    let judge = r#"{ "judge": { "scale": "1..5", "threshold": 4, "system": "Grade for {{ input.text }}.",
        "prompt": "Look at <{{ output }}>", "params": { "max_output_tokens": 99, "temperature": 0.5, "reasoning": { "effort": "low" } } },
        "on_fail": "accept" }"#;
    let bench = Bench::start().await;
    bench.provider.on(contains("Look at")).respond(Reply::json(json!({ "score": 3, "reason": "so so" })));
    bench.provider.on(contains("write")).respond(Reply::text("the draft"));
    let detail = bench.run(&gated(judge), json!({ "text": "x" })).await;
    assert_state(&detail.run, RunState::Succeeded);
    let call = bench.provider.calls_where(&contains("Look at")).pop().expect("judged");
    assert_eq!(call.last_user_text, "Look at <the draft>");
    assert!(
        call.prompt_text.starts_with("Grade for x.") && call.prompt_text.contains("from 1 to 5"),
        "{}",
        call.prompt_text
    );
    assert_eq!((&call.body["max_tokens"], &call.body["reasoning_effort"]), (&json!(99), &json!("low")));
    assert_eq!(call.schema.expect("a schema")["properties"]["score"]["maximum"], 5);
    let draft = "draft".parse().expect("valid");
    let stage =
        bench.engine.store().stage(&TenantId::default(), detail.run.id, &draft).await.expect("read").expect("there");
    let judged = stage.attempts[0].assessments[0].clone();
    assert_eq!((judged.score, judged.threshold, judged.scale.as_deref()), (3.0, 4.0, Some("1..5")));
    assert!(judged.reason.contains("gave 3, 4 is needed (of 1 to 5)"), "{}", judged.reason);
    assert_eq!(stage.attempts[0].score(), Some(0.5), "in [0, 1] for charts");
}

#[tokio::test]
async fn a_judge_that_reasons_past_its_first_limit_judges_with_more_room() {
    use stagegate_testkit::provider::End;
    let bench = Bench::start().await;
    bench.provider.on(judges()).once(Reply::text("").end(End::Length)).respond(Reply::verdict(0.9, "fine"));
    bench.provider.on(contains("write")).respond(Reply::text("a good one"));
    let detail = bench.run(&gated(r#"{ "judge": { "rubric": "r" } }"#), json!({ "text": "x" })).await;
    assert_state(&detail.run, RunState::Succeeded);
    assert_eq!(detail.stages[0].attempt, 1);
    // One that says how long a verdict may be is asked with that alone.
    let bench = Bench::start().await;
    bench.provider.on(judges()).respond(Reply::text("").end(End::Length));
    let gate = r#"{ "judge": { "rubric": "r", "params": { "max_output_tokens": 50 } }, "on_fail": "accept" }"#;
    let source = gated(gate).replace(r#""id": "draft","#, r#""id": "draft", "retry": { "max_attempts": 1 },"#);
    assert_state(&bench.run(&source, json!({ "text": "x" })).await.run, RunState::Succeeded);
    let limits: Vec<_> = bench.provider.calls_where(&judges()).iter().map(|c| c.body["max_tokens"].clone()).collect();
    assert_eq!(limits, [json!(50)]);
}

/// The verdict on a draft whose judge fails for good.
async fn verdict_without_judge(bench: &Bench, gate: &str, input: Value) -> (Verdict, String) {
    let retry = r#""id": "draft", "retry": { "max_attempts": 1, "backoff": "1ms..1ms", "max_wait": "20ms" },"#;
    let source = gated(gate).replace(r#""id": "draft","#, retry);
    let run = bench.submit(&source, input).await;
    let events = bench.until(run, "run.waiting").await;
    let draft = "draft".parse().expect("valid");
    let stage = bench.engine.store().stage(&TenantId::default(), run, &draft).await.expect("read").expect("there");
    let held = stage.attempts.last().expect("an attempt");
    assert_eq!(held.output.as_ref().map(Json::parse), Some(json!("a good one")), "the output is kept");
    (held.verdict, format!("{events:?}"))
}

#[tokio::test]
async fn an_output_whose_judge_cannot_be_asked_is_held_for_a_person() {
    let bench = Bench::start().await;
    bench.provider.on(contains("write")).respond(Reply::text("a good one"));
    for (rubric, told) in [("{{ input.note.more }}", "the rubric of stage"), ("{{ input.blank }}", "it is blank")] {
        let gate = json!({ "judge": { "rubric": rubric } }).to_string();
        let (verdict, events) = verdict_without_judge(&bench, &gate, json!({ "text": "x", "blank": " " })).await;
        assert_eq!(verdict, Verdict::Held);
        assert!(events.contains("the judge failed") && events.contains(told), "{told}: {events}");
    }
}

#[tokio::test]
async fn an_output_is_held_once_its_judges_outage_lasted_too_long() {
    let bench = Bench::start().await;
    bench.provider.on(judges()).respond(Reply::status(503, "{}"));
    bench.provider.on(contains("write")).respond(Reply::text("a good one"));
    let gate = r#"{ "judge": { "rubric": "r" } }"#;
    let (verdict, events) = verdict_without_judge(&bench, gate, json!({ "text": "x" })).await;
    assert_eq!(verdict, Verdict::Held);
    assert!(events.contains("the judge failed"), "{events}");
}

#[tokio::test]
async fn a_gate_that_always_holds_accepts_nothing_without_a_person() {
    let bench = Bench::start().await;
    bench.provider.on(judges()).respond(Reply::text("{}"));
    bench.provider.on(contains("write")).respond(Reply::text("a good one"));
    for measure in [r#""judge": { "rubric": "r" }"#, r#""checks": [ { "min_chars": 99 } ]"#] {
        for accept in [r#""on_fail": "accept""#, r#""on_exhausted": "accept""#] {
            let gate = format!(r#"{{ {measure}, {accept}, "on_pass": "hold" }}"#);
            let (verdict, _) = verdict_without_judge(&bench, &gate, json!({ "text": "x" })).await;
            assert_eq!(verdict, Verdict::Held, "{gate}");
        }
    }
}

#[tokio::test]
async fn a_judge_may_say_pass_or_fail() {
    for (word, verdict) in [("pass", Verdict::Passed), ("fail", Verdict::Accepted)] {
        let bench = Bench::start().await;
        bench.provider.on(judges()).respond(Reply::json(json!({ "verdict": word, "reason": "r" })));
        let gate = r#"{ "judge": { "rubric": "r", "scale": "pass_fail" }, "on_fail": "accept" }"#;
        let detail = bench.run(&gated(gate), json!({ "text": "x" })).await;
        let draft = "draft".parse().expect("valid");
        let stage = bench.engine.store().stage(&TenantId::default(), detail.run.id, &draft).await.expect("read");
        assert_eq!(stage.expect("there").checkpoint.expect("taken").verdict, verdict);
    }
}

#[tokio::test]
async fn a_gate_that_always_holds_waits_for_a_person_though_all_passed() {
    let bench = Bench::start().await;
    bench.provider.on(contains("write")).respond(Reply::text("short"));
    let run = bench.submit(&gated(r#"{ "on_pass": "hold" }"#), json!({ "text": "x" })).await;
    let events = bench.until(run, "run.waiting").await;
    assert!(format!("{events:?}").contains("on_pass: hold"), "{events:?}");
    let draft = "draft".parse().expect("valid");
    bench.engine.act(&TenantId::default(), run, Action::Approve(draft), None).await.expect("accepted");
    bench.finish(run).await;
    assert_state(&bench.detail(run).await.run, RunState::Succeeded);
    // The answer was good: it is still there for the next run.
    let again = bench.submit(&gated(r#"{ "on_pass": "hold" }"#), json!({ "text": "x" })).await;
    bench.until(again, "run.waiting").await;
    assert_eq!(bench.provider.calls_where(&contains("write x")).len(), 1);
}

#[tokio::test]
async fn a_retry_that_would_fail_in_the_same_way_is_refused() {
    let bench = Bench::start().await;
    let source = r#"{ "name": "broken", "stages": [ { "id": "a", "transform": "{{ (input.text | fromjson).k }}" } ] }"#;
    let detail = bench.run(source, json!({ "text": "no json" })).await;
    assert_state(&detail.run, RunState::Failed);
    let error = bench.engine.act(&TenantId::default(), detail.run.id, Action::Retry, None).await.expect_err("in vain");
    assert_eq!(error.code, Code::WrongState);
    assert!(error.detail.contains("in the same way") && error.detail.contains("stage `a`"), "{error}");
    let failed = gated(r#"{ "checks": [ { "max_chars": 1 } ], "on_fail": "fail" }"#);
    let detail = bench.run(&failed, json!({ "text": "x" })).await;
    assert_state(&detail.run, RunState::Failed);
    bench.engine.act(&TenantId::default(), detail.run.id, Action::Retry, None).await.expect("another answer may pass");
}

#[tokio::test]
async fn a_run_shows_its_input_with_the_defaults_of_its_schema() {
    let bench = Bench::start().await;
    let source = r#"{ "name": "filled", "input": { "type": "object", "required": ["n"], "properties": { "n": { "type": "integer", "default": 7 } } },
        "stages": [ { "id": "a", "transform": "{{ input.n }}" } ] }"#;
    let detail = bench.run(source, json!({})).await;
    assert_state(&detail.run, RunState::Succeeded);
    assert_eq!(detail.input.parse(), json!({ "n": 7 }));
    assert_eq!(detail.output.as_ref().map(stagegate_core::Json::parse), Some(json!({ "a": "7" })));
}
