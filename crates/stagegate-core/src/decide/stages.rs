//! How a stage changes: attempts, verdicts, retries, holds.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};

use super::{AttemptResult, Effect, Outcome, Run};
use crate::{
    Assessment, Attempt, Checkpoint, Code, Evaluator, EventKind, Failure, Json, ModelRef, Origin, StageId, StageState,
    Totals, Verdict,
    pipeline::{OnExhausted, OnFail, Stage},
};

impl Run {
    pub(super) fn start_attempt(&mut self, stage: usize, now: DateTime<Utc>) {
        let record = &mut self.stages[stage].record;
        record.state = StageState::Running;
        record.attempt += 1;
        record.former_owners = 0;
        record.not_before = None;
        record.started_at.get_or_insert(now);
        let (id, attempt) = (record.id.clone(), record.attempt);
        self.draft.touch(stage);
        self.draft.effects.push(Effect::Start { stage, attempt });
        self.emit(now, EventKind::StageStarted { stage: id, attempt });
    }

    pub(super) fn on_attempted(
        &mut self,
        stage: usize,
        attempt: u32,
        outcome: Outcome,
        now: DateTime<Utc>,
        jitter: f64,
    ) {
        if !self.is_under_way(stage, attempt) {
            return;
        }
        let record = &mut self.stages[stage].record;
        let mut totals = Totals::default();
        for call in &outcome.calls {
            totals.add(call);
            record.totals.add(call);
            self.totals.add(call);
        }
        self.draft.touch(stage);
        let Outcome { started_at, calls, result } = outcome;
        let ended = Attempt {
            number: attempt,
            started_at,
            finished_at: now,
            verdict: Verdict::Errored,
            assessments: Vec::new(),
            calls,
            output: None,
            failure: None,
        };
        match result {
            AttemptResult::Output { output, usable, assessments, model, origin } => {
                let judged = Judged { output, usable, model, origin, totals };
                self.on_output(stage, Attempt { assessments, ..ended }, judged, now);
            }
            AttemptResult::Failed { code, message, detail, retryable, retry_after } => {
                let failure = Failure { code, message, detail, stage: Some(self.stages[stage].record.id.clone()) };
                let wait = retryable.then(|| self.pause(stage, attempt, retry_after, jitter));
                let public = failure.public();
                let ended = Attempt { failure: Some(failure), ..ended };
                self.on_failed_attempt(stage, ended, public, wait, totals, now);
            }
        }
    }

    fn on_output(&mut self, stage: usize, mut ended: Attempt, judged: Judged, now: DateTime<Utc>) {
        let attempt = ended.number;
        let gate_failed = ended.assessments.iter().any(|assessment| !assessment.passed);
        ended.verdict = verdict(
            &self.pipeline.stages[stage],
            gate_failed,
            judged.usable,
            self.attempts_left(stage, attempt) && self.failure.is_none(),
        );
        let score = ended.score();
        let reason = reasons(&ended.assessments);
        let run = &mut self.stages[stage];
        run.record.verdict = Some(ended.verdict);
        run.record.score = score;
        run.record.model.clone_from(&judged.model);
        run.record.origin = Some(judged.origin);
        let id = run.record.id.clone();
        let mended = run.last_output.as_ref().is_some_and(|last| {
            last.verdict == Verdict::Retry && last.number >= run.record.round_start && last.number < attempt
        });
        self.draft.effects.push(Effect::Judged { stage, attempt, verdict: ended.verdict, gate_failed, mended });
        if matches!(ended.verdict, Verdict::Passed | Verdict::Accepted) {
            return self.checkpoint(stage, ended, judged, now);
        }
        ended.output = Some(judged.output);
        match ended.verdict {
            Verdict::Retry => {
                let (verdict, totals) = (ended.verdict, judged.totals);
                self.keep_attempt(stage, ended);
                self.emit(
                    now,
                    EventKind::StageRetrying { stage: id, attempt, verdict, score, reason, next_at: now, totals },
                );
                if self.draining {
                    let record = &mut self.stages[stage].record;
                    (record.state, record.not_before) = (StageState::Waiting, Some(now));
                } else {
                    self.start_attempt(stage, now);
                }
            }
            Verdict::Held => {
                self.keep_attempt(stage, ended);
                self.stages[stage].record.state = StageState::Held;
                self.emit(now, EventKind::StageHeld { stage: id, attempt, score, reason, totals: judged.totals });
            }
            _ => {
                let message = format!("the gate failed at attempt {attempt}: {reason}");
                let failure = Failure::new(Code::GateFailed, message).of_stage(id);
                ended.failure = Some(failure.clone());
                self.keep_attempt(stage, ended);
                self.fail(stage, failure, judged.totals, now);
            }
        }
    }

    fn on_failed_attempt(
        &mut self,
        stage: usize,
        ended: Attempt,
        failure: Failure,
        wait: Option<Duration>,
        totals: Totals,
        now: DateTime<Utc>,
    ) {
        let attempt = ended.number;
        let record = &mut self.stages[stage].record;
        record.verdict = Some(Verdict::Errored);
        let id = record.id.clone();
        self.draft.attempts.push((id.clone(), ended));
        let exhausted = !self.attempts_left(stage, attempt);
        match wait {
            Some(wait) if !exhausted && self.failure.is_none() => {
                // A provider may wish for more than a calendar holds; past the deadline there is nothing to wait for.
                let longest = (self.deadline_at - now).max(TimeDelta::zero());
                let next_at = now + TimeDelta::from_std(wait).map_or(longest, |wait| wait.min(longest));
                let record = &mut self.stages[stage].record;
                record.state = StageState::Waiting;
                record.not_before = Some(next_at);
                self.draft.effects.push(Effect::WakeAt { stage, at: next_at });
                let reason = format!("{}: {}", failure.code, failure.message);
                self.emit(
                    now,
                    EventKind::StageRetrying {
                        stage: id,
                        attempt,
                        verdict: Verdict::Errored,
                        score: None,
                        reason,
                        next_at,
                        totals,
                    },
                );
            }
            Some(_) if exhausted && attempt > self.stages[stage].record.round_start => {
                let round = attempt + 1 - self.stages[stage].record.round_start;
                let message = format!("{round} attempts failed; the last: {}: {}", failure.code, failure.message);
                let failure = Failure { stage: failure.stage, ..Failure::new(Code::AttemptsExhausted, message) };
                self.fail(stage, failure, totals, now);
            }
            _ => self.fail(stage, failure, totals, now),
        }
    }

    fn checkpoint(&mut self, stage: usize, ended: Attempt, judged: Judged, now: DateTime<Utc>) {
        let latency_ms = u64::try_from((ended.finished_at - ended.started_at).num_milliseconds()).unwrap_or(0);
        let checkpoint = Checkpoint {
            digest: output_digest(&judged.output),
            output: judged.output,
            attempt: ended.number,
            verdict: ended.verdict,
            score: ended.score(),
            model: judged.model,
            origin: judged.origin,
            created_at: now,
        };
        self.draft.attempts.push((self.stages[stage].record.id.clone(), ended));
        self.succeed_stage(stage, checkpoint, latency_ms, judged.totals, now);
    }

    fn succeed_stage(
        &mut self,
        stage: usize,
        checkpoint: Checkpoint,
        latency_ms: u64,
        totals: Totals,
        now: DateTime<Utc>,
    ) {
        let run = &mut self.stages[stage];
        run.last_output = None;
        let record = &mut run.record;
        record.state = StageState::Succeeded;
        record.verdict = Some(checkpoint.verdict);
        record.finished_at = Some(now);
        let id = record.id.clone();
        self.set_output(stage, &checkpoint);
        self.draft.touch(stage);
        self.emit(
            now,
            EventKind::StageSucceeded {
                stage: id.clone(),
                attempt: checkpoint.attempt,
                verdict: checkpoint.verdict,
                score: checkpoint.score,
                model: checkpoint.model.clone(),
                origin: checkpoint.origin,
                latency_ms,
                totals,
            },
        );
        self.draft.checkpoints.push((id, checkpoint));
    }

    fn fail(&mut self, stage: usize, failure: Failure, totals: Totals, now: DateTime<Utc>) {
        let record = &mut self.stages[stage].record;
        record.state = StageState::Failed;
        record.failure = Some(failure.clone());
        record.finished_at = Some(now);
        let (id, attempt) = (record.id.clone(), record.attempt);
        // The call of an errored attempt brought nothing that could have a score.
        let score = record.score.filter(|_| record.verdict != Some(Verdict::Errored));
        self.draft.touch(stage);
        self.emit(now, EventKind::StageFailed { stage: id, attempt, score, failure: failure.clone(), totals });
        self.failure.get_or_insert(failure);
    }

    pub(super) fn approve(&mut self, stage: &StageId, now: DateTime<Utc>) {
        let Some((index, held)) = self.take_held(stage) else { return };
        let record = &self.stages[index].record;
        let output = held.output.clone().unwrap_or_else(Json::null);
        let checkpoint = Checkpoint {
            digest: output_digest(&output),
            output,
            attempt: held.number,
            verdict: Verdict::Approved,
            score: held.score(),
            model: record.model.clone(),
            origin: record.origin.unwrap_or(Origin::None),
            created_at: now,
        };
        self.succeed_stage(index, checkpoint, 0, Totals::default(), now);
    }

    pub(super) fn reject(&mut self, stage: &StageId, reason: &str, now: DateTime<Utc>) {
        let Some((index, _)) = self.take_held(stage) else { return };
        self.stages[index].record.verdict = Some(Verdict::Rejected);
        let message = format!("the held output was rejected: {reason}");
        let failure = Failure::new(Code::Rejected, message).of_stage(stage.clone());
        self.fail(index, failure, Totals::default(), now);
    }

    fn take_held(&mut self, stage: &StageId) -> Option<(usize, Attempt)> {
        let index = self.pipeline.stage_index(stage.as_str())?;
        let run = &mut self.stages[index];
        if run.record.state != StageState::Held {
            return None;
        }
        run.last_output.take().map(|attempt| (index, attempt))
    }

    fn keep_attempt(&mut self, stage: usize, attempt: Attempt) {
        let run = &mut self.stages[stage];
        self.draft.attempts.push((run.record.id.clone(), attempt.clone()));
        run.last_output = Some(attempt);
    }

    fn attempts_left(&self, stage: usize, attempt: u32) -> bool {
        attempt + 1 - self.stages[stage].record.round_start < self.pipeline.stages[stage].retry.max_attempts
    }

    /// The provider's wish where it has one, else the back-off of this attempt, between half and all of it.
    fn pause(&self, stage: usize, attempt: u32, retry_after: Option<Duration>, jitter: f64) -> Duration {
        let backoff = self.pipeline.stages[stage].retry.backoff;
        let doublings = (attempt - self.stages[stage].record.round_start).min(20);
        let full = backoff.first.saturating_mul(1 << doublings).min(backoff.longest);
        let jittered = full.mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0);
        retry_after.map_or(jittered, |wish| wish.max(jittered.min(backoff.first)))
    }
}

/// An output on its way through the gate.
struct Judged {
    output: Json,
    usable: bool,
    model: Option<ModelRef>,
    origin: Origin,
    totals: Totals,
}

/// The gate: pass, retry with the critique, hold, accept with a flag, or fail.
fn verdict(stage: &Stage, gate_failed: bool, usable: bool, may_retry: bool) -> Verdict {
    if !gate_failed {
        return Verdict::Passed;
    }
    // What does not even have the stage's form would break its successors: nobody can wave it through.
    let on_fail = if usable { stage.gate.on_fail } else { OnFail::Retry };
    match on_fail {
        OnFail::Retry if may_retry => Verdict::Retry,
        OnFail::Retry if !usable => Verdict::Failed,
        OnFail::Retry => match stage.gate.on_exhausted {
            OnExhausted::Fail => Verdict::Failed,
            OnExhausted::Hold => Verdict::Held,
            OnExhausted::Accept => Verdict::Accepted,
        },
        OnFail::Hold => Verdict::Held,
        OnFail::Accept => Verdict::Accepted,
        OnFail::Fail => Verdict::Failed,
    }
}

/// What failed, in one bounded sentence that quotes nothing.
fn reasons(assessments: &[Assessment]) -> String {
    const MAX_CHARS: usize = 500;
    let failed: Vec<String> = assessments
        .iter()
        .filter(|assessment| !assessment.passed)
        .map(|assessment| match assessment.evaluator {
            Evaluator::Check | Evaluator::Unknown(_) => format!("{}: {}", assessment.name, assessment.reason),
            Evaluator::Judge => {
                let Assessment { name, score, threshold, .. } = assessment;
                format!("{name} gave {score:.2}, {threshold:.2} is needed")
            }
        })
        .collect();
    let text = failed.join("; ");
    match text.char_indices().nth(MAX_CHARS) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text,
    }
}

/// BLAKE3 of the output's JSON, hex.
fn output_digest(output: &Json) -> String {
    blake3::hash(output.as_str().as_bytes()).to_hex().to_string()
}
