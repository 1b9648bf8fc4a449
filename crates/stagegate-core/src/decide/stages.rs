//! How a stage changes: attempts, verdicts, retries, holds.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};

use super::{AttemptResult, Effect, FailureKind, Outcome, Run, Tried};
use crate::{
    Assessment, Attempt, Checkpoint, Code, Decision, Evaluator, EventKind, Failure, Json, ModelRef, Origin, StageId,
    StageState, Totals, Verdict,
    pipeline::{OnExhausted, OnFail, OnPass, Stage},
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
            rest: crate::Rest::default(),
        };
        match result {
            AttemptResult::Output { output, usable, assessments, model, origin } => {
                let record = &mut self.stages[stage].record;
                record.end_outage();
                record.failure = None;
                let judged = Judged { output, usable, model, origin, totals, next_at: now };
                self.on_output(stage, Attempt { assessments, ..ended }, judged, now);
            }
            AttemptResult::Unjudged { output, assessments, model, origin, code, message, detail, kind } => {
                let id = self.stages[stage].record.id.clone();
                let failure = Failure { detail, ..Failure::new(code, message).of_stage(id) };
                let public = failure.public();
                let again = match kind {
                    _ if self.failure.is_some() => None,
                    FailureKind::Outage { told } => {
                        self.after_outage(stage, &public, told, Tried::default(), now, jitter)
                    }
                    FailureKind::Unusable if self.attempts_left(stage) => self.after_unusable(stage, now, jitter),
                    FailureKind::Unusable | FailureKind::Final => None,
                };
                if again.is_some() {
                    let ended = Attempt { assessments, failure: Some(failure), ..ended };
                    return self.on_failed_attempt(stage, ended, public, again, totals, now);
                }
                self.forget_outage(stage);
                let judged = Judged { output, usable: true, model, origin, totals, next_at: now };
                let verdict = unjudged_verdict(&self.pipeline.stages[stage]);
                self.on_verdict(stage, Attempt { verdict, assessments, ..ended }, judged, false, now);
            }
            AttemptResult::Cut { output, assessments, model, code, message, detail, told, tried } => {
                let id = self.stages[stage].record.id.clone();
                let failure = Failure { detail, ..Failure::new(code, message).of_stage(id) };
                let public = failure.public();
                let outage = Outage { told, away: tried.away };
                let next_at = self.meet_outage(stage, &public, outage, now, jitter);
                if self.attempts_left(stage) {
                    let judged = Judged { output, usable: false, model, origin: Origin::Provider, totals, next_at };
                    return self.on_output(stage, Attempt { assessments, ..ended }, judged, now);
                }
                // The answers are used up, the other models are not: they are waited for, and they alone are asked.
                self.stages[stage].record.judged += 1;
                let ended = Attempt { assessments, failure: Some(failure), ..ended };
                let again = self.outage_may_pass(stage, now).then_some(next_at);
                self.on_failed_attempt(stage, ended, public, again, totals, now);
            }
            AttemptResult::Failed { code, message, detail, kind, tried } => {
                let id = self.stages[stage].record.id.clone();
                let failure = Failure { detail, ..Failure::new(code, message).of_stage(id) };
                let public = failure.public();
                let ended = Attempt { failure: Some(failure), ..ended };
                let again = match kind {
                    FailureKind::Outage { told } => self.after_outage(stage, &public, told, tried, now, jitter),
                    FailureKind::Unusable => self.after_unusable(stage, now, jitter),
                    FailureKind::Final => {
                        self.forget_outage(stage);
                        None
                    }
                };
                self.on_failed_attempt(stage, ended, public, again, totals, now);
            }
        }
    }

    fn forget_outage(&mut self, stage: usize) {
        let record = &mut self.stages[stage].record;
        record.end_outage();
        record.failure = None;
    }

    /// When the stage is tried again after an answer that cannot be used, if it is.
    fn after_unusable(&mut self, stage: usize, now: DateTime<Utc>, jitter: f64) -> Option<DateTime<Utc>> {
        let may_retry = self.attempts_left(stage);
        self.forget_outage(stage);
        let record = &mut self.stages[stage].record;
        record.judged += 1;
        let doublings = record.judged - 1;
        may_retry.then(|| self.at_most_deadline(now, self.backoff(stage, doublings, jitter)))
    }

    /// When the stage is tried again after an outage, if it is. An answer beside it that was paid for counts; once answers
    /// are used up only the models that met the outage are asked.
    fn after_outage(
        &mut self,
        stage: usize,
        failure: &Failure,
        told: Option<Duration>,
        tried: Tried,
        now: DateTime<Utc>,
        jitter: f64,
    ) -> Option<DateTime<Utc>> {
        if tried.answered {
            self.stages[stage].record.judged += 1;
        }
        let next_at = self.meet_outage(stage, failure, Outage { told, away: tried.away }, now, jitter);
        self.outage_may_pass(stage, now).then_some(next_at)
    }

    /// Whether as many answers were judged as may be.
    fn are_answers_used_up(&self, stage: usize) -> bool {
        self.stages[stage].record.judged >= self.pipeline.stages[stage].retry.max_attempts
    }

    /// The models of a stage that its next attempt asks; all of its chain where this is empty. Once answers are used up,
    /// they are those that met the outage that is waited out: the others have answered, and would be paid again.
    pub fn models_left(&self, stage: usize) -> &[ModelRef] {
        let outage = self.stages[stage].record.failure.as_ref().filter(|_| self.are_answers_used_up(stage));
        outage.map_or(&[], |outage| &outage.models)
    }

    /// One more attempt met an outage. Returns when the stage is tried again: after what was told, spread so that not all
    /// who were told the same come back together, else after the back-off; at the latest once when `max_wait` is over.
    fn meet_outage(
        &mut self,
        stage: usize,
        failure: &Failure,
        outage: Outage,
        now: DateTime<Utc>,
        jitter: f64,
    ) -> DateTime<Utc> {
        let Outage { told, away } = outage;
        let record = &mut self.stages[stage].record;
        // The judge's outage says nothing of the stage's own models.
        let before = record.failure.take().map_or_else(Vec::new, |before| before.models);
        let models = if away.is_empty() { before } else { away };
        let since = *record.outage_since.get_or_insert(now);
        record.outages = record.outages.saturating_add(1);
        record.failure = Some(Failure { models, ..failure.clone() });
        let met = record.outages - 1;
        let wait = match told {
            None => self.pause(stage, met, jitter),
            // Whoever is told too short a wait again and again asks ever less often.
            Some(told) => spread(told, jitter).max(self.pause(stage, met / 4, jitter)),
        };
        let next_at = self.at_most_deadline(now, wait);
        let last = since.checked_add_signed(delta(self.pipeline.stages[stage].retry.max_wait()));
        last.map_or(next_at, |last| next_at.min(last.max(now)))
    }

    /// Whether an outage that was just met is waited out any longer.
    fn outage_may_pass(&self, stage: usize, now: DateTime<Utc>) -> bool {
        let since = self.stages[stage].record.outage_since.unwrap_or(now);
        now - since < delta(self.pipeline.stages[stage].retry.max_wait())
    }

    /// How much longer an outage of this stage is waited out: all of `max_wait` where it has met none yet.
    pub fn outage_left(&self, stage: usize, now: DateTime<Utc>) -> Duration {
        let max_wait = self.pipeline.stages[stage].retry.max_wait();
        let waited = self.stages[stage].record.outage_since.map_or(TimeDelta::zero(), |since| now - since);
        max_wait.saturating_sub(waited.to_std().unwrap_or(Duration::ZERO))
    }

    /// A provider may wish for more than a calendar holds; past the deadline there is nothing to wait for.
    fn at_most_deadline(&self, now: DateTime<Utc>, wait: Duration) -> DateTime<Utc> {
        let longest = (self.deadline_at - now).max(TimeDelta::zero());
        now + delta(wait).min(longest)
    }

    fn on_output(&mut self, stage: usize, mut ended: Attempt, judged: Judged, now: DateTime<Utc>) {
        let gate_failed = ended.assessments.iter().any(|assessment| !assessment.passed);
        ended.verdict = verdict(
            &self.pipeline.stages[stage],
            gate_failed,
            judged.usable,
            self.attempts_left(stage) && self.failure.is_none(),
        );
        self.on_verdict(stage, ended, judged, gate_failed, now);
    }

    /// What follows from what the gate decided. Where it `gate_failed`, the answer is not reused.
    fn on_verdict(&mut self, stage: usize, mut ended: Attempt, judged: Judged, gate_failed: bool, now: DateTime<Utc>) {
        let attempt = ended.number;
        let score = ended.score();
        let mut reason = reasons(&ended.assessments);
        if reason.is_empty() && ended.verdict == Verdict::Held {
            HELD_ALWAYS.clone_into(&mut reason);
        }
        let run = &mut self.stages[stage];
        run.record.judged += u32::from(ended.verdict == Verdict::Retry);
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
                let (verdict, totals, next_at) = (ended.verdict, judged.totals, judged.next_at);
                self.keep_attempt(stage, ended);
                self.emit(
                    now,
                    EventKind::StageRetrying { stage: id, attempt, verdict, score, reason, next_at, totals },
                );
                if self.draining {
                    let record = &mut self.stages[stage].record;
                    (record.state, record.not_before) = (StageState::Waiting, Some(next_at));
                } else if next_at > now {
                    self.wait_until(stage, next_at);
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
        again: Option<DateTime<Utc>>,
        totals: Totals,
        now: DateTime<Utc>,
    ) {
        let attempt = ended.number;
        let record = &mut self.stages[stage].record;
        record.verdict = Some(Verdict::Errored);
        let (id, judged) = (record.id.clone(), record.judged);
        self.draft.attempts.push((id.clone(), ended));
        match again {
            Some(next_at) if self.failure.is_none() => {
                self.wait_until(stage, next_at);
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
            // It never passed.
            None if self.stages[stage].record.outages > 0 => {
                let outage = self.stages[stage].record.outage().unwrap_or_default();
                let max_wait = self.pipeline.stages[stage].retry.max_wait();
                let message = format!("an outage did not pass within `retry.max_wait` ({max_wait:?}): {outage}");
                self.fail(stage, Failure { message, ..failure }, totals, now);
            }
            None if judged > 1 && judged >= self.pipeline.stages[stage].retry.max_attempts => {
                let message = format!("{judged} attempts failed; the last: {}: {}", failure.code, failure.message);
                let failure = Failure { stage: failure.stage, ..Failure::new(Code::AttemptsExhausted, message) };
                self.fail(stage, failure, totals, now);
            }
            _ => self.fail(stage, failure, totals, now),
        }
    }

    fn wait_until(&mut self, stage: usize, next_at: DateTime<Utc>) {
        let record = &mut self.stages[stage].record;
        record.state = StageState::Waiting;
        record.not_before = Some(next_at);
        self.draft.effects.push(Effect::WakeAt { stage, at: next_at });
    }

    /// Ends an attempt that its replica cannot finish. It says nothing of the stage, so that it does not count among its
    /// attempts, and the next one follows at once.
    pub(super) fn interrupt(
        &mut self,
        stage: usize,
        started_at: DateTime<Utc>,
        calls: Vec<crate::LedgerEntry>,
        now: DateTime<Utc>,
    ) {
        let run = &mut self.stages[stage];
        let record = &mut run.record;
        let mut totals = Totals::default();
        for call in &calls {
            totals.add(call);
            record.totals.add(call);
            self.totals.add(call);
        }
        let (id, attempt) = (record.id.clone(), record.attempt);
        let message = "its replica stopped before it had ended".to_owned();
        let reason = format!("{}: {message}", Code::Draining);
        let failure = Failure { stage: Some(id.clone()), ..Failure::new(Code::Draining, message) };
        record.verdict = Some(Verdict::Errored);
        record.state = StageState::Waiting;
        record.not_before = Some(now);
        let ended = Attempt {
            number: attempt,
            started_at,
            finished_at: now,
            verdict: Verdict::Errored,
            assessments: Vec::new(),
            calls,
            output: None,
            failure: Some(failure),
            rest: crate::Rest::default(),
        };
        self.draft.touch(stage);
        self.draft.attempts.push((id.clone(), ended));
        self.emit(
            now,
            EventKind::StageRetrying {
                stage: id,
                attempt,
                verdict: Verdict::Errored,
                score: None,
                reason,
                next_at: now,
                totals,
            },
        );
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
        self.succeed_stage(stage, checkpoint, latency_ms, judged.totals, None, now);
    }

    fn succeed_stage(
        &mut self,
        stage: usize,
        checkpoint: Checkpoint,
        latency_ms: u64,
        totals: Totals,
        decision: Option<Decision>,
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
                decision,
            },
        );
        self.draft.checkpoints.push((id, checkpoint));
    }

    fn fail(&mut self, stage: usize, failure: Failure, totals: Totals, now: DateTime<Utc>) {
        self.fail_by(stage, failure, totals, None, now);
    }

    fn fail_by(
        &mut self,
        stage: usize,
        failure: Failure,
        totals: Totals,
        decision: Option<Decision>,
        now: DateTime<Utc>,
    ) {
        let record = &mut self.stages[stage].record;
        record.state = StageState::Failed;
        record.failure = Some(failure.clone());
        record.finished_at = Some(now);
        let (id, attempt) = (record.id.clone(), record.attempt);
        // The call of an errored attempt brought nothing that could have a score.
        let score = record.score.filter(|_| record.verdict != Some(Verdict::Errored));
        self.draft.touch(stage);
        let told = failure.clone();
        self.emit(now, EventKind::StageFailed { stage: id, attempt, score, failure: told, totals, decision });
        self.failure.get_or_insert(failure);
    }

    /// Takes the held output, or in its place the one that the person edited. An edited one has no score: none was measured.
    pub(super) fn approve(
        &mut self,
        stage: &StageId,
        attempt: Option<u32>,
        edited: Option<Json>,
        decision: Decision,
        now: DateTime<Utc>,
    ) {
        let Some((index, held)) = self.take_held(stage, attempt) else { return };
        let record = &self.stages[index].record;
        let score = held.score().filter(|_| edited.is_none());
        let output = edited.or_else(|| held.output.clone()).unwrap_or_else(Json::null);
        let checkpoint = Checkpoint {
            digest: output_digest(&output),
            output,
            attempt: held.number,
            verdict: Verdict::Approved,
            score,
            model: record.model.clone(),
            origin: record.origin.unwrap_or(Origin::None),
            created_at: now,
        };
        self.succeed_stage(index, checkpoint, 0, Totals::default(), decision.told(), now);
    }

    pub(super) fn reject(&mut self, stage: &StageId, attempt: Option<u32>, decision: Decision, now: DateTime<Utc>) {
        let Some((index, _)) = self.take_held(stage, attempt) else { return };
        self.stages[index].record.verdict = Some(Verdict::Rejected);
        let message = format!("the held output was rejected: {}", decision.comment.as_deref().unwrap_or_default());
        let failure = Failure::new(Code::Rejected, message).of_stage(stage.clone());
        self.fail_by(index, failure, Totals::default(), decision.told(), now);
    }

    /// The held output of a stage, unless another attempt than the held one is meant: what was decided about an earlier
    /// output says nothing of a later one.
    fn take_held(&mut self, stage: &StageId, attempt: Option<u32>) -> Option<(usize, Attempt)> {
        let index = self.pipeline.stage_index(stage.as_str())?;
        let run = &mut self.stages[index];
        if run.record.state != StageState::Held || attempt.is_some_and(|attempt| attempt != run.record.attempt) {
            return None;
        }
        run.last_output.take().map(|attempt| (index, attempt))
    }

    fn keep_attempt(&mut self, stage: usize, attempt: Attempt) {
        let run = &mut self.stages[stage];
        self.draft.attempts.push((run.record.id.clone(), attempt.clone()));
        run.last_output = Some(attempt);
    }

    /// Whether an answer more may be judged, should the one that is judged now not pass.
    fn attempts_left(&self, stage: usize) -> bool {
        self.stages[stage].record.judged + 1 < self.pipeline.stages[stage].retry.max_attempts
    }

    /// The pause after an outage that so many others came before: the definition's back-off, and never less than the floor.
    fn pause(&self, stage: usize, met: u32, jitter: f64) -> Duration {
        self.backoff(stage, met, jitter).max(outage_floor(met).map_or(Duration::ZERO, |floor| spread(floor, jitter)))
    }

    /// The back-off after so many doublings, between half and all of it.
    fn backoff(&self, stage: usize, doublings: u32, jitter: f64) -> Duration {
        let backoff = self.pipeline.stages[stage].retry.backoff;
        let full = backoff.first.saturating_mul(1 << doublings.min(20)).min(backoff.longest);
        full.mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0)
    }
}

/// What was told, and up to half as much again, so that not all who were told the same come back together.
fn spread(told: Duration, jitter: f64) -> Duration {
    told.saturating_add((told / 2).min(SPREAD_MAX).mul_f64(jitter.clamp(0.0, 1.0)))
}

/// Outages in a row whose pauses are the definition's alone.
const OUTAGES_FREE: u32 = 5;
/// The longest floor.
const OUTAGE_FLOOR_MAX: Duration = Duration::from_secs(30);

/// The least pause after an outage that so many others came before, whatever the definition says: each attempt costs the
/// store two commits, so that without it a back-off of a millisecond would take them from all other runs.
fn outage_floor(met: u32) -> Option<Duration> {
    let doublings = met.checked_sub(OUTAGES_FREE)?;
    Some(Duration::from_secs(1 << doublings.min(5)).min(OUTAGE_FLOOR_MAX))
}

/// The most that is added to a wait that was told.
const SPREAD_MAX: Duration = Duration::from_secs(30);

fn delta(span: Duration) -> TimeDelta {
    TimeDelta::from_std(span).unwrap_or(TimeDelta::MAX)
}

/// An outage that an attempt met: how long to wait, where that was told, and the models that met it.
struct Outage {
    told: Option<Duration>,
    away: Vec<ModelRef>,
}

/// An output on its way through the gate.
struct Judged {
    output: Json,
    usable: bool,
    model: Option<ModelRef>,
    origin: Origin,
    totals: Totals,
    /// When the next attempt starts, should it not pass.
    next_at: DateTime<Utc>,
}

/// The gate: pass, retry with the critique, hold, accept with a flag, or fail.
fn verdict(stage: &Stage, gate_failed: bool, usable: bool, may_retry: bool) -> Verdict {
    if !gate_failed {
        return match stage.gate.on_pass {
            OnPass::Pass => Verdict::Passed,
            OnPass::Hold => Verdict::Held,
        };
    }
    // Where a person decides on each output, none is accepted without one.
    let accepted = match stage.gate.on_pass {
        OnPass::Pass => Verdict::Accepted,
        OnPass::Hold => Verdict::Held,
    };
    // What does not even have the stage's form would break its successors: nobody can wave it through.
    let on_fail = if usable { stage.gate.on_fail } else { OnFail::Retry };
    match on_fail {
        OnFail::Retry if may_retry => Verdict::Retry,
        OnFail::Retry if !usable => Verdict::Failed,
        OnFail::Retry => match stage.gate.on_exhausted {
            OnExhausted::Fail => Verdict::Failed,
            OnExhausted::Hold => Verdict::Held,
            OnExhausted::Accept => accepted,
        },
        OnFail::Hold => Verdict::Held,
        OnFail::Accept => accepted,
        OnFail::Fail => Verdict::Failed,
    }
}

/// Why an output is held that passed everything.
const HELD_ALWAYS: &str = "the gate holds every output for a person (`on_pass: hold`)";

/// What becomes of an output that could not be judged. It may be good, so that it is never failed for it: where a failed
/// gate would fail the stage, a person decides.
fn unjudged_verdict(stage: &Stage) -> Verdict {
    let is_accepted = stage.gate.on_fail == OnFail::Accept
        || (stage.gate.on_fail == OnFail::Retry && stage.gate.on_exhausted == OnExhausted::Accept);
    if is_accepted && stage.gate.on_pass == OnPass::Pass { Verdict::Accepted } else { Verdict::Held }
}

/// What failed, in one bounded sentence that quotes nothing.
fn reasons(assessments: &[Assessment]) -> String {
    const MAX_CHARS: usize = 500;
    let failed: Vec<String> = assessments
        .iter()
        .filter(|assessment| !assessment.passed)
        .map(|assessment| match assessment.evaluator {
            Evaluator::Check | Evaluator::Unknown(_) => format!("{}: {}", assessment.name, assessment.reason),
            // Its reason is made of numbers, too.
            Evaluator::Judge => format!("{} {}", assessment.name, assessment.reason),
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
