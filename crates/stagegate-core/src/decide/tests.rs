//! Decisions, one promise a test; and every promise at once under random histories.

use std::collections::HashSet;

use chrono::TimeDelta;
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::{
    Capability, Error, Evaluator, ReplicaId, RunId, StageId,
    pipeline::Models,
    store::{Commit, NewRun, RunRecord},
};

#[derive(Debug)]
struct AnyModel;

impl Models for AnyModel {
    fn check(&self, _: &ModelRef) -> Result<(), Error> {
        Ok(())
    }

    fn is_priced(&self, _: &ModelRef) -> bool {
        true
    }
}

const CANONICAL: &str = "
name: canonical
defaults: { model: sim/quick, retry: { max_attempts: 2, backoff: 1s..30s } }
stages:
  - { id: one, prompt: p }
  - { id: two, needs: [one], prompt: p }
  - { id: three, needs: [two], prompt: p, gate: { checks: [ { min_chars: 1 } ] } }
  - { id: four, needs: [three], prompt: p }
  - { id: five, needs: [three], prompt: p }
";

fn pipeline(source: &str) -> Arc<Pipeline> {
    Arc::new(Pipeline::parse(source, &AnyModel).expect("a valid definition"))
}

fn at(second: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_000_000 + second, 0).expect("in range")
}

fn begin(source: &str) -> (NewRun, Run, Vec<Effect>) {
    let accept = Accept {
        id: RunId(uuid::Uuid::from_u128(1)),
        tenant: TenantId::default(),
        pipeline: pipeline(source),
        version: 1,
        input: json!({}).into(),
        cache_mode: None,
        priority: 0,
        labels: crate::pipeline::Labels::new(),
        idempotency: None,
        request_id: None,
        start_at: None,
        limits: crate::fair::Limits::default(),
        lease_to: Some(ReplicaId(uuid::Uuid::from_u128(2))),
        park_after: Duration::from_secs(5),
    };
    let (new, leased) = accept.begin(at(0));
    let (run, effects) = leased.expect("leased");
    (new, run, effects)
}

fn assessment(passed: bool) -> Assessment {
    Assessment {
        evaluator: Evaluator::Check,
        name: "min_chars".to_owned(),
        version: 1,
        passed,
        score: f64::from(u8::from(passed)),
        threshold: 1.0,
        reason: "too short".to_owned(),
        detail: None,
        model: None,
        scale: None,
        judge_failure: None,
        rest: crate::Rest::default(),
    }
}

fn output(passed: bool, usable: bool) -> Outcome {
    let result = AttemptResult::Output {
        output: json!("an answer").into(),
        usable,
        assessments: vec![assessment(passed)],
        model: None,
        origin: Origin::Provider,
    };
    Outcome { started_at: at(0), calls: Vec::new(), result }
}

fn failed(kind: FailureKind) -> Outcome {
    failed_as(kind, Tried::default())
}

fn failed_as(kind: FailureKind, tried: Tried) -> Outcome {
    let (code, message) = (Code::ProviderFailed, "503".to_owned());
    Outcome {
        started_at: at(0),
        calls: Vec::new(),
        result: AttemptResult::Failed { code, message, detail: None, kind, tried },
    }
}

fn models(names: &[&str]) -> Vec<ModelRef> {
    names.iter().map(|name| ModelRef::new(*name).expect("a model")).collect()
}

fn outage(told: Option<Duration>) -> Outcome {
    failed(FailureKind::Outage { told })
}

/// One model's answer was cut, another asked to wait.
fn cut(told: Duration) -> Outcome {
    let result = AttemptResult::Cut {
        output: "half an ans".into(),
        assessments: vec![Assessment { name: "complete".to_owned(), reason: "cut".to_owned(), ..assessment(false) }],
        model: None,
        code: Code::ProviderRateLimited,
        message: "slow down".to_owned(),
        detail: None,
        told: Some(told),
        tried: Tried { away: models(&["sim/slow"]), answered: true },
    };
    Outcome { started_at: at(0), calls: Vec::new(), result }
}

/// The stage's next attempt starts at this time.
fn due(run: &mut Run, stage: usize, now: DateTime<Utc>) -> u32 {
    run.on(Stimulus::Due { stage }, now, 0.0);
    let step = run.take_step().expect("due");
    let [(_, attempt)] = started(&step.effects)[..] else { panic!("{:?}", step.effects) };
    attempt
}

fn attempted(run: &mut Run, stage: usize, attempt: u32, outcome: Outcome) -> Step {
    run.on(Stimulus::Attempted { stage, attempt, outcome }, at(1), 0.5);
    run.take_step().expect("something was decided")
}

fn started(effects: &[Effect]) -> Vec<(usize, u32)> {
    effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Start { stage, attempt } => Some((*stage, *attempt)),
            _ => None,
        })
        .collect()
}

fn names(commit: &Commit) -> Vec<&'static str> {
    commit.events.iter().map(|event| event.kind.name()).collect()
}

fn signal(kind: SignalKind) -> Vec<Signal> {
    vec![Signal { id: 7, kind, by: Some("ada".to_owned()) }]
}

fn stage_id(id: &str) -> StageId {
    StageId::new(id).expect("valid")
}

#[test]
fn an_accepted_run_begins_in_its_insert() {
    let (new, run, effects) = begin(CANONICAL);
    let names: Vec<_> = new.events.iter().map(|event| event.kind.name()).collect();
    assert_eq!(names, ["run.accepted", "run.started", "stage.started"]);
    assert_eq!(started(&effects), [(0, 1)]);
    assert_eq!(run.state(), RunState::Running);
}

#[test]
fn one_commit_a_stage_and_the_last_one_ends_the_run() {
    let (_, mut run, _) = begin(CANONICAL);
    let step = attempted(&mut run, 0, 1, output(true, true));
    assert_eq!(names(&step.commit), ["stage.succeeded", "stage.started"]);
    assert_eq!(started(&step.effects), [(1, 1)]);
    attempted(&mut run, 1, 1, output(true, true));
    let step = attempted(&mut run, 2, 1, output(true, true));
    assert_eq!(started(&step.effects), [(3, 1), (4, 1)], "4 and 5 begin together");
    let step = attempted(&mut run, 4, 1, output(true, true));
    assert_eq!(names(&step.commit), ["stage.succeeded"]);
    let step = attempted(&mut run, 3, 1, output(true, true));
    assert_eq!(names(&step.commit), ["stage.succeeded", "run.finished"]);
    assert_eq!((step.commit.state, step.commit.then), (RunState::Succeeded, Disposition::End));
    assert_eq!(step.commit.output, Some(json!({ "four": "an answer", "five": "an answer" }).into()));
}

#[test]
fn what_happens_while_a_commit_is_under_way_makes_the_next_one() {
    let (_, mut run, _) = begin(CANONICAL);
    for stage in 0..3 {
        attempted(&mut run, stage, 1, output(true, true));
    }
    for stage in [3, 4] {
        run.on(Stimulus::Attempted { stage, attempt: 1, outcome: output(true, true) }, at(1), 0.0);
    }
    let step = run.take_step().expect("both");
    assert_eq!(names(&step.commit), ["stage.succeeded", "stage.succeeded", "run.finished"]);
    assert!(run.take_step().is_none());
}

#[test]
fn a_failed_gate_is_retried_with_the_critique_and_the_pass_is_marked_as_mended() {
    let (_, mut run, _) = begin(CANONICAL);
    let step = attempted(&mut run, 0, 1, output(false, true));
    assert_eq!(names(&step.commit), ["stage.retrying", "stage.started"]);
    assert_eq!(started(&step.effects), [(0, 2)]);
    let critique = run.critique(0).expect("a critique");
    assert_eq!(critique.reasons, ["min_chars: too short"]);
    let step = attempted(&mut run, 0, 2, output(true, true));
    assert!(step.effects.contains(&Effect::Judged {
        stage: 0,
        attempt: 2,
        verdict: Verdict::Passed,
        gate_failed: false,
        mended: true
    }));
}

#[test]
fn a_gate_that_fails_to_the_end_fails_the_run_after_its_siblings() {
    let (_, mut run, _) = begin(CANONICAL);
    for stage in 0..3 {
        attempted(&mut run, stage, 1, output(true, true));
    }
    attempted(&mut run, 3, 1, output(false, true));
    let step = attempted(&mut run, 3, 2, output(false, true));
    assert_eq!(names(&step.commit), ["stage.failed"], "five is under way and paid for");
    let step = attempted(&mut run, 4, 1, output(true, true));
    assert_eq!(names(&step.commit), ["stage.succeeded", "run.finished"]);
    assert_eq!(step.commit.checkpoints.len(), 1);
    let failure = step.commit.failure.expect("why");
    assert_eq!((failure.code, failure.stage), (Code::GateFailed, Some(stage_id("four"))));
}

const HELD: &str = "
name: held
defaults: { model: sim/quick }
stages:
  - { id: one, prompt: p, gate: { checks: [ { min_chars: 9 } ], on_fail: hold } }
  - { id: two, needs: [one], prompt: p }
";

#[test]
fn a_hold_parks_the_run_and_an_approval_goes_on() {
    let (_, mut run, _) = begin(HELD);
    let step = attempted(&mut run, 0, 1, output(false, true));
    assert_eq!(names(&step.commit), ["stage.held", "run.waiting"]);
    assert!(matches!(step.commit.then, Disposition::Park(Some(_))), "the deadline wakes it at the latest");
    run.on(Stimulus::Taken(signal(SignalKind::approve(stage_id("one"), None))), at(60), 0.0);
    let step = run.take_step().expect("approved");
    assert_eq!(names(&step.commit), ["run.resumed", "stage.succeeded", "stage.started"]);
    assert_eq!(step.commit.checkpoints[0].1.verdict, Verdict::Approved);
    assert_eq!(step.commit.consumed, [7]);
}

#[test]
fn a_decision_about_another_attempt_than_the_held_one_changes_nothing() {
    for named in [0, 2] {
        let (_, mut run, _) = begin(HELD);
        attempted(&mut run, 0, 1, output(false, true));
        let approve = SignalKind::approve(stage_id("one"), Some(named));
        let reject = SignalKind::Reject { stage: stage_id("one"), reason: "r".to_owned(), attempt: Some(named) };
        let held = SignalKind::approve(stage_id("one"), Some(1));
        let signals = [(7, approve), (8, reject), (9, held)].map(|(id, kind)| Signal { id, kind, by: None });
        run.on(Stimulus::Taken(signals.into()), at(60), 0.0);
        let commit = run.take_step().expect("approved").commit;
        assert_eq!(commit.checkpoints[0].1.verdict, Verdict::Approved);
        assert_eq!(commit.consumed, [7, 8, 9]);
    }
}

#[test]
fn a_rejection_fails_the_stage_with_its_reason() {
    let (_, mut run, _) = begin(HELD);
    attempted(&mut run, 0, 1, output(false, true));
    let reject = SignalKind::Reject { stage: stage_id("one"), reason: "off topic".to_owned(), attempt: None };
    run.on(Stimulus::Taken(signal(reject)), at(60), 0.0);
    let commit = run.take_step().expect("rejected").commit;
    assert_eq!(commit.state, RunState::Failed);
    let failure = commit.failure.expect("why");
    assert_eq!(failure.code, Code::Rejected);
    assert!(failure.message.contains("off topic"));
    let decided = commit.events.iter().find_map(|event| match &event.kind {
        EventKind::StageFailed { decision, .. } => decision.clone(),
        _ => None,
    });
    let (by, comment) = (Some("ada".to_owned()), Some("off topic".to_owned()));
    assert_eq!(decided, Some(Decision { by, comment, edited: false }));
}

#[test]
fn an_edited_output_becomes_the_checkpoint_and_the_event_says_who_decided_and_why() {
    let (_, mut run, _) = begin(HELD);
    attempted(&mut run, 0, 1, output(false, true));
    let (stage, comment) = (stage_id("one"), Some("clearer".to_owned()));
    let edited = Json::from_text(r#"{ "n": 123456789012345678901234567890 }"#).expect("JSON");
    let kind = SignalKind::Approve { stage, attempt: Some(1), comment: comment.clone(), output: Some(edited.clone()) };
    let read = SignalKind::read(&kind.body().expect("a body")).expect("read");
    let SignalKind::Approve { output: Some(stored), .. } = &read else { panic!("{read:?}") };
    assert_eq!(stored.as_str(), edited.as_str(), "to the digit");
    run.on(Stimulus::Taken(signal(read)), at(60), 0.0);
    let commit = run.take_step().expect("approved").commit;
    let checkpoint = &commit.checkpoints[0].1;
    assert_eq!((checkpoint.output.as_str(), checkpoint.score), (edited.as_str(), None));
    assert_eq!(checkpoint.digest, blake3::hash(edited.as_str().as_bytes()).to_hex().to_string());
    let EventKind::StageSucceeded { decision, .. } = &commit.events[1].kind else { panic!("{:?}", commit.events) };
    assert_eq!(*decision, Some(Decision { by: Some("ada".to_owned()), comment, edited: true }));
    assert!(!serde_json::to_string(&commit.events).expect("JSON").contains("12345678901"), "events hold no output");
}

#[test]
fn a_second_edit_of_an_output_that_was_approved_changes_nothing() {
    let (_, mut run, _) = begin(HELD);
    attempted(&mut run, 0, 1, output(false, true));
    let edit = |id, text: &str| {
        let kind = SignalKind::Approve {
            stage: stage_id("one"),
            attempt: Some(1),
            comment: None,
            output: Some(Json::from(text)),
        };
        Signal { id, kind, by: None }
    };
    run.on(Stimulus::Taken(vec![edit(7, "first"), edit(8, "second")]), at(60), 0.0);
    let commit = run.take_step().expect("approved").commit;
    assert_eq!((commit.checkpoints.len(), &commit.checkpoints[0].1.output), (1, &Json::from("first")));
    assert_eq!(commit.consumed, [7, 8]);
}

#[test]
fn only_what_an_older_release_would_not_read_of_an_approval_needs_a_capability() {
    let stage = || stage_id("one");
    let needs = |comment: Option<&str>, output: Option<&str>| {
        let (comment, output) = (comment.map(str::to_owned), output.map(Json::from));
        SignalKind::Approve { stage: stage(), attempt: Some(1), comment, output }.needs()
    };
    assert_eq!(SignalKind::approve(stage(), None).needs(), None);
    assert_eq!(needs(None, None), Some(Capability::ApprovalNamesAttempt));
    assert_eq!(needs(Some("c"), None), Some(Capability::EditedApproval));
    assert_eq!(needs(None, Some("o")), Some(Capability::EditedApproval));
    let plain = SignalKind::approve(stage(), None).body().expect("a body");
    assert_eq!(plain, r#"{"kind":"approve","stage":"one"}"#, "as every release reads it");
}

#[test]
fn an_output_without_the_stages_form_is_never_accepted() {
    let source = CANONICAL.replace("prompt: p }", "prompt: p, gate: { on_fail: accept } }");
    let (_, mut run, _) = begin(&source);
    let step = attempted(&mut run, 0, 1, output(false, true));
    assert_eq!(step.commit.checkpoints[0].1.verdict, Verdict::Accepted);
    attempted(&mut run, 1, 1, output(false, false));
    let step = attempted(&mut run, 1, 2, output(false, false));
    assert_eq!(step.commit.state, RunState::Failed);
}

#[test]
fn a_short_pause_is_waited_out_and_a_long_one_parks() {
    let (_, mut run, _) = begin(CANONICAL);
    let step = attempted(&mut run, 0, 1, outage(Some(Duration::from_secs(2))));
    assert_eq!(step.commit.then, Disposition::Keep);
    let spread = TimeDelta::milliseconds(500);
    assert!(step.effects.contains(&Effect::WakeAt { stage: 0, at: at(3) + spread }), "half a second of jitter on two");

    let (_, mut run, _) = begin(CANONICAL);
    let step = attempted(&mut run, 0, 1, outage(Some(Duration::from_mins(10))));
    assert_eq!(step.commit.then, Disposition::Park(Some(Duration::from_secs(615))), "and at most half a minute");
    assert_eq!(names(&step.commit), ["stage.retrying", "run.waiting"]);
    let EventKind::RunWaiting { until, reason: Some(reason) } = &step.commit.events[1].kind else {
        panic!("no reason")
    };
    assert_eq!(*until, Some(at(616)));
    let expected = "stage `one` waits for an outage to pass: met once since 1970-01-12T13:46:41Z; last SG0406: 503";
    assert_eq!(reason, expected);
    run.on(Stimulus::Taken(Vec::new()), at(616), 0.0);
    let step = run.take_step().expect("resumed");
    assert!(step.effects.contains(&Effect::WakeAt { stage: 0, at: at(616) }));
    assert_eq!(due(&mut run, 0, at(616)), 2);
}

#[test]
fn what_cannot_be_retried_fails_at_once_and_what_can_fails_at_the_end() {
    let (_, mut run, _) = begin(CANONICAL);
    let commit = attempted(&mut run, 0, 1, failed(FailureKind::Final)).commit;
    assert_eq!(commit.failure.expect("why").code, Code::ProviderFailed);

    let (_, mut run, _) = begin(CANONICAL);
    attempted(&mut run, 0, 1, failed(FailureKind::Unusable));
    due(&mut run, 0, at(9));
    let commit = attempted(&mut run, 0, 2, failed(FailureKind::Unusable)).commit;
    assert_eq!(commit.failure.expect("why").code, Code::AttemptsExhausted);
}

#[test]
fn outages_do_not_count_as_attempts() {
    let (_, mut run, _) = begin(CANONICAL);
    for attempt in 1..=20 {
        attempted(&mut run, 0, attempt, outage(None));
        assert_eq!(due(&mut run, 0, at(40)), attempt + 1);
    }
    // A gate that fails once and an outage beside it leave the second of two attempts.
    attempted(&mut run, 0, 21, output(false, true));
    attempted(&mut run, 0, 22, outage(None));
    assert_eq!(due(&mut run, 0, at(80)), 23);
    assert_eq!(run.critique(0).expect("of the answer").reasons, ["min_chars: too short"]);
    let commit = attempted(&mut run, 0, 23, output(false, true)).commit;
    assert_eq!(commit.failure.expect("why").code, Code::GateFailed);
}

#[test]
fn attempts_during_a_long_outage_become_rarer_despite_a_short_backoff() {
    let source = CANONICAL.replace("backoff: 1s..30s", "backoff: 1ms..1ms, max_wait: 366d");
    for told in [None, Some(Duration::from_millis(1))] {
        let (_, mut run, _) = begin(&source);
        let mut pauses_ms = Vec::new();
        for attempt in 1..=60 {
            run.on(Stimulus::Attempted { stage: 0, attempt, outcome: outage(told) }, at(1), 0.0);
            let step = run.take_step().expect("decided");
            pauses_ms.push((step.commit.stages[0].not_before.expect("a time") - at(1)).num_milliseconds());
            if step.commit.then != Disposition::Keep {
                run.on(Stimulus::Taken(Vec::new()), at(1), 0.0);
                run.take_step();
            }
            due(&mut run, 0, at(1));
        }
        // A wait that the provider told is honoured four times as often.
        let doubled_each = if told.is_some() { 4 } else { 1 };
        assert!(pauses_ms[..5 * doubled_each].iter().all(|pause| *pause <= 1), "{pauses_ms:?}");
        let floor: Vec<_> = pauses_ms.iter().skip(5 * doubled_each).step_by(doubled_each).take(7).copied().collect();
        assert_eq!(floor, [1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000], "{pauses_ms:?}");
    }
}

#[test]
fn an_outage_is_waited_out_for_max_wait_and_its_failure_tells_of_it() {
    let source = CANONICAL.replace("backoff: 1s..30s", "backoff: 1s..30s, max_wait: 1m");
    let (_, mut run, _) = begin(&source);
    let step = attempted(&mut run, 0, 1, outage(None));
    assert_eq!(step.commit.stages[0].outage_since, Some(at(1)));
    due(&mut run, 0, at(30));
    run.on(Stimulus::Attempted { stage: 0, attempt: 2, outcome: outage(Some(Duration::MAX)) }, at(31), 0.5);
    let step = run.take_step().expect("decided");
    assert_eq!(step.commit.stages[0].not_before, Some(at(61)), "once more when the time is over, whatever was told");
    due(&mut run, 0, at(61));
    run.on(Stimulus::Attempted { stage: 0, attempt: 3, outcome: outage(None) }, at(62), 0.5);
    let failure = run.take_step().expect("decided").commit.failure.expect("why");
    assert_eq!(failure.code, Code::ProviderFailed);
    let expected = "an outage did not pass within `retry.max_wait` (60s): met 3 times since 1970-01-12T13:46:41Z; \
                    last SG0406: 503";
    assert_eq!(failure.message, expected);
}

#[test]
fn an_answer_ends_the_row_of_outages() {
    let source = CANONICAL.replace("backoff: 1s..30s", "backoff: 1s..30s, max_wait: 1m");
    let (_, mut run, _) = begin(&source);
    attempted(&mut run, 0, 1, outage(None));
    due(&mut run, 0, at(61));
    let commit = attempted(&mut run, 0, 2, output(false, true)).commit;
    let record = &commit.stages[0];
    assert_eq!((record.outage_since, record.outages, &record.failure), (None, 0, &None));
    run.on(Stimulus::Attempted { stage: 0, attempt: 3, outcome: outage(None) }, at(100), 0.5);
    let step = run.take_step().expect("decided");
    assert_eq!(step.commit.stages[0].outage_since, Some(at(100)), "another row");
}

#[test]
fn a_run_that_expires_in_an_outage_tells_of_it() {
    let (_, mut run, _) = begin(CANONICAL);
    attempted(&mut run, 0, 1, outage(Some(Duration::from_secs(1))));
    run.on(Stimulus::DeadlinePassed, run.deadline_at(), 0.0);
    let failure = run.take_step().expect("expired").commit.failure.expect("why");
    assert_eq!(failure.code, Code::DeadlinePassed);
    assert!(
        failure.message.contains("stage `one` waited for an outage to pass: met once since"),
        "{}",
        failure.message
    );
    assert!(failure.message.ends_with("SG0406: 503"), "{}", failure.message);
}

#[test]
fn an_answer_that_was_cut_beside_an_outage_is_judged_and_the_wait_is_kept() {
    let wait = Duration::from_secs(30);
    let (_, mut run, _) = begin(CANONICAL);
    let step = attempted(&mut run, 0, 1, cut(wait));
    assert_eq!(names(&step.commit), ["stage.retrying", "run.waiting"]);
    assert!(step.commit.stages[0].not_before.expect("a time") >= at(31));
    assert_eq!(step.commit.attempts[0].1.verdict, Verdict::Retry);
    assert_eq!(run.critique(0).expect("of the answer").reasons, ["complete: cut"]);

    // No answer more may be judged, but the other model may still give one: it alone is asked.
    assert_eq!(run.models_left(0), []);
    run.on(Stimulus::Taken(Vec::new()), at(40), 0.0);
    let attempt = due(&mut run, 0, at(40));
    let step = attempted(&mut run, 0, attempt, cut(wait));
    assert_eq!(step.commit.state, RunState::Waiting);
    assert_eq!(run.models_left(0), models(&["sim/slow"]));
    run.on(Stimulus::Taken(Vec::new()), at(80), 0.0);
    let attempt = due(&mut run, 0, at(80));
    let step = attempted(&mut run, 0, attempt, output(true, true));
    assert_eq!(step.commit.checkpoints.len(), 1);
}

#[test]
fn answers_that_are_paid_count_beside_an_outage_and_then_only_the_models_that_are_away_are_asked() {
    let beside =
        |away: &[&str], answered| failed_as(FailureKind::Outage { told: None }, Tried { away: models(away), answered });
    let (_, mut run, _) = begin(CANONICAL);
    attempted(&mut run, 0, 1, beside(&["sim/b", "sim/c"], true));
    assert_eq!(run.models_left(0), [], "one more answer may be judged");
    due(&mut run, 0, at(9));
    let step = attempted(&mut run, 0, 2, beside(&["sim/b", "sim/c"], true));
    assert_eq!(step.commit.stages[0].judged, 2);
    assert_eq!(run.models_left(0), models(&["sim/b", "sim/c"]));
    due(&mut run, 0, at(19));
    attempted(&mut run, 0, 3, beside(&["sim/c"], true));
    assert_eq!(run.models_left(0), models(&["sim/c"]), "the other has answered since");
    due(&mut run, 0, at(29));
    attempted(&mut run, 0, 4, beside(&[], false));
    assert_eq!(run.models_left(0), models(&["sim/c"]), "the judge was away, which says nothing of the stage's models");
}

#[test]
fn a_signal_that_is_read_twice_is_obeyed_once() {
    let (_, mut run, _) = begin(CANONICAL);
    attempted(&mut run, 0, 1, failed(FailureKind::Final));
    let retry = || signal(SignalKind::Retry { deadline_at: at(5_000) });
    run.on(Stimulus::Taken(retry()), at(60), 0.0);
    // Read again before the commit that consumes it is durable.
    run.on(Stimulus::Signalled(retry()), at(60), 0.0);
    let step = run.take_step().expect("retried");
    assert_eq!(names(&step.commit), ["run.retried", "stage.started"]);
    assert_eq!(started(&step.effects), [(0, 2)]);
    run.on(Stimulus::Signalled(retry()), at(61), 0.0);
    assert!(run.take_step().is_none(), "nor when that commit is under way");
}

#[test]
fn a_run_taken_after_its_deadline_starts_nothing() {
    let (_, mut run, _) = begin(CANONICAL);
    let late = run.deadline_at();
    run.on(Stimulus::Taken(Vec::new()), late, 0.0);
    let step = run.take_step().expect("expired");
    assert_eq!(step.commit.state, RunState::Expired);
    assert_eq!(step.effects, [Effect::Abort]);
}

#[test]
fn a_pause_beyond_all_bounds_is_a_pause_to_the_deadline() {
    let (_, mut run, _) = begin(&CANONICAL.replace("backoff: 1s..30s", "backoff: 1s..30s, max_wait: 365d"));
    let step = attempted(&mut run, 0, 1, outage(Some(Duration::MAX)));
    assert!(matches!(step.commit.then, Disposition::Park(Some(_))));
    assert!(step.commit.stages[0].not_before.expect("a time") >= run.deadline_at());
}

#[test]
fn a_cancel_abandons_what_is_under_way_and_late_answers_change_nothing() {
    let (_, mut run, _) = begin(CANONICAL);
    run.on(Stimulus::Signalled(signal(SignalKind::Cancel)), at(1), 0.0);
    let step = run.take_step().expect("cancelled");
    assert_eq!(step.effects, [Effect::Abort]);
    assert_eq!((step.commit.state, step.commit.then), (RunState::Cancelled, Disposition::End));
    run.on(Stimulus::Attempted { stage: 0, attempt: 1, outcome: output(true, true) }, at(2), 0.0);
    assert!(run.take_step().is_none());
}

#[test]
fn a_retry_starts_over_only_what_has_no_checkpoint_and_ignores_what_was_asked_before() {
    let (_, mut run, _) = begin(CANONICAL);
    attempted(&mut run, 0, 1, output(true, true));
    attempted(&mut run, 1, 1, failed(FailureKind::Final));
    let signals = vec![
        Signal { id: 1, kind: SignalKind::Cancel, by: None },
        Signal { id: 2, kind: SignalKind::Retry { deadline_at: at(9_999) }, by: None },
    ];
    run.state = RunState::Queued; // As the store leaves a run that is to be retried.
    run.on(Stimulus::Taken(signals), at(100), 0.0);
    let step = run.take_step().expect("retried");
    assert_eq!(names(&step.commit), ["run.retried", "stage.started"]);
    assert_eq!(started(&step.effects), [(1, 2)]);
    assert_eq!(step.commit.failure, None);
    assert_eq!(run.deadline_at(), at(9_999));
    let step = attempted(&mut run, 1, 2, output(false, true));
    assert_eq!(started(&step.effects), [(1, 3)], "a round has all its attempts");
}

#[test]
fn the_deadline_ends_a_run_wherever_it_stands() {
    let (_, mut run, _) = begin(HELD);
    attempted(&mut run, 0, 1, output(false, true));
    run.on(Stimulus::Taken(Vec::new()), run.deadline_at(), 0.0);
    run.on(Stimulus::DeadlinePassed, run.deadline_at(), 0.0);
    let commit = run.take_step().expect("expired").commit;
    assert_eq!(commit.state, RunState::Expired);
}

#[test]
fn a_resumed_run_repeats_the_attempt_that_was_under_way() {
    let (_, mut run, _) = begin(CANONICAL);
    attempted(&mut run, 0, 1, output(true, true));
    run.on(Stimulus::Taken(Vec::new()), at(50), 0.0);
    let step = run.take_step().expect("resumed");
    assert_eq!(names(&step.commit), ["run.resumed"]);
    assert_eq!(started(&step.effects), [(1, 1)]);
}

#[test]
fn a_run_that_is_given_back_before_it_asked_anybody_keeps_its_attempt_and_its_former_owners() {
    let (_, mut run, _) = begin(CANONICAL);
    run.on(Stimulus::Taken(Vec::new()), at(50), 0.0);
    let step = run.take_step().expect("resumed");
    assert_eq!(step.commit.stages[0].former_owners, 1);
    run.hand_back(Vec::new(), at(51));
    let step = run.take_step().expect("given back");
    let record = &step.commit.stages[0];
    assert_eq!((record.state, record.attempt, record.former_owners), (StageState::Running, 1, 0));
    assert_eq!((names(&step.commit), step.commit.attempts.len()), (vec!["run.waiting"], 0));
    run.on(Stimulus::Taken(Vec::new()), at(52), 0.0);
    let step = run.take_step().expect("resumed");
    assert_eq!((step.commit.stages[0].former_owners, started(&step.effects)), (1, vec![(0, 1)]));

    // What asked something ends, and what had no other owner has nothing to keep.
    run.hand_back(vec![(0, at(52), Vec::new())], at(53));
    let step = run.take_step().expect("given back");
    assert_eq!((step.commit.stages[0].state, step.commit.attempts.len()), (StageState::Waiting, 1));
}

fn crashed() -> Failure {
    Failure::new(Code::RunCrashed, "its owners crashed")
}

#[test]
fn a_run_that_is_given_up_starts_nothing_and_its_attempt_counts_one_more_owner() {
    let (_, mut run, _) = begin(CANONICAL);
    attempted(&mut run, 0, 1, output(true, true));
    run.on(Stimulus::GivenUp { signals: Vec::new(), failure: crashed() }, at(50), 0.0);
    assert_eq!(run.take_cut_off(), [(1, 1)]);
    assert_eq!(run.former_owners(1), 1);
    let step = run.take_step().expect("ended");
    assert_eq!((names(&step.commit), step.effects), (vec!["run.resumed", "run.finished"], vec![Effect::Abort]));
    assert_eq!((step.commit.state, step.commit.then), (RunState::Failed, Disposition::End));
    assert_eq!(step.commit.failure, Some(crashed()));
    assert_eq!(step.commit.stages[0].state, StageState::Cancelled);
}

#[test]
fn a_cancel_that_waits_comes_before_giving_up() {
    let (_, mut run, _) = begin(CANONICAL);
    run.on(Stimulus::GivenUp { signals: signal(SignalKind::Cancel), failure: crashed() }, at(50), 0.0);
    assert_eq!(run.take_step().expect("ended").commit.state, RunState::Cancelled);
}

#[test]
fn a_run_is_ended_by_its_rows_alone() {
    let (_, run, _) = begin(CANONICAL);
    let record = RunRecord {
        started_at: None,
        last_seq: 1,
        ..RunRecord::unreadable(run.lease().run, TenantId::default(), &crate::StoreError::Defect("none".to_owned()))
    };
    let queued = RunRecord { state: RunState::Queued, ..record.clone() };
    let of = |id: &str, state| StageRecord { state, ..StageRecord::pending(stage_id(id)) };
    let stages =
        || vec![of("one", StageState::Succeeded), of("two", StageState::Waiting), of("three", StageState::Pending)];
    let commit = give_up(run.lease(), &queued, stages(), crashed(), at(9)).expect("a step");
    assert_eq!(names(&commit), ["run.started", "run.finished"]);
    assert_eq!(commit.events.iter().map(|event| event.seq).collect::<Vec<_>>(), [2, 3]);
    assert_eq!(commit.stages, [StageRecord { finished_at: Some(at(9)), ..of("two", StageState::Cancelled) }]);
    assert_eq!((commit.state, commit.then, commit.started_at), (RunState::Failed, Disposition::End, Some(at(9))));
    assert_eq!(give_up(run.lease(), &record, stages(), crashed(), at(9)), None, "its state is unknown");

    let retried = RunRecord { started_at: Some(at(1)), last_seq: 7, ..queued.clone() };
    let commit = give_up(run.lease(), &retried, stages(), crashed(), at(9)).expect("a step");
    assert_eq!(names(&commit), ["run.retried", "run.finished"], "a run that had ended goes on only by a retry");
    let running = RunRecord { state: RunState::Running, ..retried };
    let commit = give_up(run.lease(), &running, stages(), crashed(), at(9)).expect("a step");
    assert_eq!(names(&commit), ["run.resumed", "run.finished"]);
}

/// What may happen next, drawn at random.
#[derive(Debug, Clone)]
enum Move {
    Attempt { pick: usize, outcome: u8 },
    Due { pick: usize },
    Taken,
    Signal(u8),
    Commit,
    Deadline,
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let one = prop_oneof![
        8 => (0..5_usize, 0..10_u8).prop_map(|(pick, outcome)| Move::Attempt { pick, outcome }),
        3 => (0..5_usize).prop_map(|pick| Move::Due { pick }),
        1 => Just(Move::Taken),
        1 => (0..5_u8).prop_map(Move::Signal),
        6 => Just(Move::Commit),
        1 => Just(Move::Deadline),
    ];
    proptest::collection::vec(one, 1..60)
}

/// The promises, held against what was committed.
#[derive(Debug, Default)]
struct Ledger {
    last_seq: u64,
    checkpointed: HashSet<StageId>,
    ended: bool,
}

impl Ledger {
    fn commit(&mut self, pipeline: &Pipeline, commit: &Commit) {
        assert!(!self.ended, "nothing is written after the end");
        for event in &commit.events {
            assert_eq!(event.seq, self.last_seq + 1, "seq is gap-free");
            self.last_seq = event.seq;
        }
        for (stage, _) in &commit.checkpoints {
            assert!(self.checkpointed.insert(stage.clone()), "at most one checkpoint per stage");
        }
        for event in &commit.events {
            if let EventKind::StageStarted { stage, .. } = &event.kind {
                let index = pipeline.stage_index(stage.as_str()).expect("known");
                for need in &pipeline.stages[index].needs {
                    assert!(self.checkpointed.contains(&pipeline.stages[*need].id), "needs are durable first");
                }
            }
        }
        self.ended = commit.then == Disposition::End;
        assert_eq!(self.ended, commit.state.is_terminal());
        assert_eq!(commit.stages_done as usize, self.checkpointed.len());
    }
}

proptest! {
    #[test]
    fn the_promises_hold_under_every_history(moves in moves()) {
        let source = CANONICAL.replace("id: four, needs: [three], prompt: p",
            "id: four, needs: [three], prompt: p, gate: { on_fail: hold }");
        let (new, mut run, _) = begin(&source);
        let pipeline = Arc::clone(run.pipeline());
        let mut ledger = Ledger { last_seq: new.events.len() as u64, ..Ledger::default() };
        let mut now = at(1);
        for one in moves {
            now += TimeDelta::seconds(1);
            match one {
                Move::Attempt { pick, outcome } => {
                    let attempt = run.stages[pick].record.attempt;
                    let outcome = match outcome {
                        0..=3 => output(true, true),
                        4 => output(false, true),
                        5 => output(false, false),
                        6 => outage(Some(Duration::from_mins(1))),
                        7 => cut(Duration::from_secs(9)),
                        8 => failed(FailureKind::Unusable),
                        _ => outage(None),
                    };
                    run.on(Stimulus::Attempted { stage: pick, attempt, outcome }, now, 0.3);
                }
                Move::Due { pick } => run.on(Stimulus::Due { stage: pick }, now, 0.0),
                Move::Taken => if run.draft.events.is_empty() && !run.state.is_terminal() {
                    run.on(Stimulus::Taken(Vec::new()), now, 0.0);
                },
                Move::Signal(which) => {
                    let kind = match which {
                        0 => SignalKind::Cancel,
                        1 | 2 => SignalKind::approve(stage_id("four"), None),
                        3 => SignalKind::approve(stage_id("one"), None),
                        _ => SignalKind::Reject { stage: stage_id("four"), reason: "no".to_owned(), attempt: None },
                    };
                    run.on(Stimulus::Signalled(signal(kind)), now, 0.0);
                }
                Move::Commit => if let Some(step) = run.take_step() {
                    ledger.commit(&pipeline, &step.commit);
                },
                Move::Deadline => run.on(Stimulus::DeadlinePassed, now, 0.0),
            }
        }
        if let Some(step) = run.take_step() {
            ledger.commit(&pipeline, &step.commit);
        }
        let busy = run.stages.iter().any(|stage| matches!(stage.record.state,
            StageState::Running | StageState::Waiting | StageState::Held));
        prop_assert!(run.state.is_terminal() || busy, "a run that has not ended has something to wait for");
    }
}

const LARGE: &str = "
name: large
stages:
  - { id: one, transform: x }
output: { text: '{% for i in range(9000) %}{{ i }} {% endfor %}' }
";

#[test]
fn a_large_output_is_rendered_after_the_last_checkpoint_is_durable() {
    let (_, mut run, _) = begin(LARGE);
    let step = attempted(&mut run, 0, 1, output(true, true));
    assert!(step.effects.contains(&Effect::RenderOutput), "{:?}", step.effects);
    assert_eq!((step.commit.checkpoints.len(), step.commit.then), (1, Disposition::Keep));
    run.on(Stimulus::Signalled(Vec::new()), at(2), 0.0);
    assert!(run.take_step().is_none(), "it is asked for once");
    run.on(Stimulus::Rendered(Ok(json!({ "text": "…" }).into())), at(3), 0.0);
    let step = run.take_step().expect("the end");
    assert_eq!((step.commit.output, step.commit.then), (Some(json!({ "text": "…" }).into()), Disposition::End));
    assert_eq!(run.state(), RunState::Succeeded);
}

#[test]
fn an_output_that_comes_after_the_end_changes_nothing() {
    let (_, mut run, _) = begin(LARGE);
    attempted(&mut run, 0, 1, output(true, true));
    run.on(Stimulus::DeadlinePassed, at(1_000_000), 0.0);
    let step = run.take_step().expect("the end");
    assert!(step.effects.contains(&Effect::Abort));
    run.on(Stimulus::Rendered(Ok(json!({}).into())), at(1_000_001), 0.0);
    assert!(run.take_step().is_none());
    assert_eq!(run.state(), RunState::Expired);
}

#[test]
fn while_its_owner_drains_a_run_is_checkpointed_and_starts_nothing() {
    let (_, mut run, _) = begin(CANONICAL);
    run.drain();
    let step = attempted(&mut run, 0, 1, output(true, true));
    assert_eq!(started(&step.effects), []);
    assert!(!names(&step.commit).contains(&"stage.started"), "{:?}", names(&step.commit));
    assert_eq!((step.commit.checkpoints.len(), step.commit.then), (1, Disposition::Keep), "handed back, not parked");
}
