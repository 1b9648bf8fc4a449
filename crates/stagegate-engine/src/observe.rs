//! What is told of a step once it is durable: metrics and one log line a transition. Never prompts or outputs.

use chrono::TimeDelta;
use stagegate_core::{
    Assessment, Attempt, Code, Evaluator, Event, EventKind, Failure, RunState, Verdict,
    decide::Run,
    store::{Commit, RunRecord},
};

use crate::shared::Shared;

/// What of a commit is told once it is durable.
#[derive(Debug)]
pub(crate) struct Committing {
    events: Vec<Event>,
    attempts: Vec<Ended>,
}

/// What is counted of an attempt: nothing of what it said.
#[derive(Debug)]
struct Ended {
    verdict: Verdict,
    seconds: f64,
    /// Who measured, whether it passed, and the score.
    assessments: Vec<(Evaluator, bool, f64)>,
    failure: Option<Code>,
}

impl Ended {
    fn of(attempt: &Attempt) -> Self {
        let measured = |assessment: &Assessment| (assessment.evaluator, assessment.passed, assessment.quality());
        // A judge that failed at its own task measured nothing.
        let assessments = attempt.assessments.iter().filter(|assessment| assessment.judge_failure.is_none());
        Self {
            verdict: attempt.verdict,
            seconds: (attempt.finished_at - attempt.started_at).as_seconds_f64(),
            assessments: assessments.map(measured).collect(),
            failure: attempt.failure.as_ref().map(|failure| failure.code),
        }
    }
}

impl Committing {
    pub(crate) fn of(commit: &Commit) -> Self {
        let attempts = commit.attempts.iter().map(|(_, attempt)| Ended::of(attempt)).collect();
        Self { events: commit.events.clone(), attempts }
    }

    /// The events, for whoever watches.
    pub(crate) fn into_events(self) -> Vec<Event> {
        self.events
    }
}

/// Counts and logs a durable step.
pub(crate) fn committed(shared: &Shared, run: &Run, step: &Committing) {
    let metrics = &shared.metrics;
    metrics.events_written.inc_by(step.events.len() as u64);
    for attempt in &step.attempts {
        count_attempt(shared, attempt);
    }
    for event in &step.events {
        log(&event.kind);
        match &event.kind {
            EventKind::StageSucceeded { .. } => metrics.stages_ended.with_label_values(&["succeeded"]).inc(),
            EventKind::StageFailed { failure, .. } => {
                metrics.stages_ended.with_label_values(&["failed"]).inc();
                metrics.errors.with_label_values(&[failure.code.label()]).inc();
            }
            EventKind::StageHeld { .. } => metrics.stages_ended.with_label_values(&["held"]).inc(),
            EventKind::RunFinished { state, failure, .. } => {
                count_end(shared, *state, failure.as_ref(), event.at - run.created_at());
            }
            _ => {}
        }
    }
}

/// The same of a run that was ended by its rows alone.
pub(crate) fn given_up(shared: &Shared, run: &RunRecord, step: &Commit) {
    shared.metrics.events_written.inc_by(step.events.len() as u64);
    let span =
        tracing::info_span!(parent: None, "run", run_id = %run.id, tenant = %run.tenant, pipeline = %run.pipeline);
    span.in_scope(|| step.events.iter().for_each(|event| log(&event.kind)));
    let ended = step.finished_at.unwrap_or(run.created_at);
    count_end(shared, step.state, step.failure.as_ref(), ended - run.created_at);
}

fn count_end(shared: &Shared, state: RunState, failure: Option<&Failure>, took: TimeDelta) {
    let metrics = &shared.metrics;
    metrics.runs_finished.with_label_values(&[state.label()]).inc();
    metrics.run_duration.with_label_values(&[state.label()]).observe(took.as_seconds_f64());
    // The failures of stages are counted where they fail.
    if failure.is_some_and(|failure| failure.code == Code::RunCrashed) {
        metrics.errors.with_label_values(&[Code::RunCrashed.label()]).inc();
    }
}

fn count_attempt(shared: &Shared, attempt: &Ended) {
    let metrics = &shared.metrics;
    let verdict = attempt.verdict.label();
    metrics.gate_verdicts.with_label_values(&[verdict]).inc();
    metrics.stage_duration.with_label_values(&[verdict]).observe(attempt.seconds);
    for (evaluator, passed, score) in &attempt.assessments {
        let evaluator = evaluator.label();
        let passed = if *passed { "true" } else { "false" };
        metrics.assessments.with_label_values(&[evaluator, passed]).inc();
        metrics.quality_score.with_label_values(&[evaluator]).observe(*score);
    }
    if let Some(code) = &attempt.failure {
        metrics.errors.with_label_values(&[code.label()]).inc();
    }
}

/// One line a transition; the run's id is on the span.
fn log(kind: &EventKind) {
    let event = kind.name();
    match kind {
        EventKind::RunAccepted { .. } => tracing::debug!(event, "run accepted"),
        EventKind::RunStarted => tracing::debug!(event, "run started"),
        EventKind::RunResumed { checkpoints } => tracing::info!(event, checkpoints, "run resumed"),
        EventKind::RunWaiting { until, .. } => tracing::info!(event, ?until, "run waiting"),
        EventKind::RunRetried { stages } => tracing::info!(event, stages = stages.len(), "run retried"),
        EventKind::RunFinished { state, failure, totals } => {
            let (cost_usd, hits) = (totals.cost_usd.dollars(), totals.hits);
            let (cancelled, state) = (*state == RunState::Cancelled, state.as_str());
            match failure {
                Some(failure) if !cancelled => {
                    let (code, reason) = (failure.code.as_str(), &failure.message);
                    tracing::warn!(event, state, code, %reason, cost_usd, hits, "run finished");
                }
                _ => tracing::info!(event, state, cost_usd, hits, "run finished"),
            }
        }
        EventKind::StageStarted { stage, attempt } => {
            tracing::info!(event, stage_id = %stage, attempt, "stage started");
        }
        EventKind::StageRetrying { stage, attempt, verdict, score, reason, .. } => {
            tracing::info!(event, stage_id = %stage, attempt, verdict = verdict.as_str(), score, %reason, "stage retrying");
        }
        EventKind::StageHeld { stage, attempt, score, reason, .. } => {
            tracing::info!(event, stage_id = %stage, attempt, score, %reason, "stage held");
        }
        EventKind::StageSucceeded { stage, attempt, verdict, score, origin, latency_ms, totals, .. } => {
            let (verdict, origin, cost_usd) = (verdict.as_str(), origin.as_str(), totals.cost_usd.dollars());
            tracing::info!(
                event, stage_id = %stage, attempt, verdict, score, origin, latency_ms, cost_usd, "stage succeeded"
            );
        }
        EventKind::StageFailed { stage, attempt, failure, .. } => {
            let (code, reason) = (failure.code.as_str(), &failure.message);
            tracing::warn!(event, stage_id = %stage, attempt, code, %reason, "stage failed");
        }
        // This replica decides nothing that it does not know.
        EventKind::Unknown(_) => tracing::debug!(event, "an event of a newer release"),
    }
}
