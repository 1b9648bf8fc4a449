//! Decisions: owns how a run changes. Pure: (run, stimulus, time, jitter) → one commit, then effects.
//!
//! The owner of a run keeps a [`Run`] in memory. It feeds it stimuli ([`Run::on`]), takes what they add up to
//! ([`Run::take_step`]), has that committed, and only then performs the effects. A stale commit means that the lease
//! is gone: the whole `Run` is dropped, so nothing that was decided after it matters.

mod accept;
mod give_up;
mod stages;
mod step;
#[cfg(test)]
mod tests;

use std::{fmt::Write, sync::Arc, time::Duration};

use chrono::{DateTime, Utc};

pub use accept::Accept;
pub use give_up::give_up;
pub use step::{Effect, Step};

use crate::{
    Assessment, Attempt, Checkpoint, Code, Decision, EventKind, Failure, Json, LedgerEntry, ModelRef, Origin, Pipeline,
    RunState, StageId, StageState, TenantId, Totals, Verdict,
    decide::step::Draft,
    evaluation,
    pipeline::{CacheMode, Part, Seen},
    store::{Disposition, Lease, Signal, SignalKind, Snapshot, StageRecord, Waiting},
};

/// What happened to a run.
#[derive(Debug)]
pub enum Stimulus {
    /// A replica took it, with the signals that were waiting.
    Taken(Vec<Signal>),
    /// A replica took it to end it: its owners crashed too often.
    GivenUp {
        /// The signals that were waiting.
        signals: Vec<Signal>,
        /// Why it ends.
        failure: Failure,
    },
    /// An attempt ended.
    Attempted {
        /// The stage.
        stage: usize,
        /// Which attempt; an answer to an older one is ignored.
        attempt: u32,
        /// How.
        outcome: Outcome,
    },
    /// A waiting stage's time has come.
    Due {
        /// The stage.
        stage: usize,
    },
    /// The run's output was rendered, as an [`Effect::RenderOutput`] asked.
    Rendered(Result<Json, Failure>),
    /// Somebody asks something.
    Signalled(Vec<Signal>),
    /// The run's deadline passed.
    DeadlinePassed,
}

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// When it started.
    pub started_at: DateTime<Utc>,
    /// Its model calls, in order.
    pub calls: Vec<LedgerEntry>,
    /// What came of it.
    pub result: AttemptResult,
}

/// What came of an attempt.
#[derive(Debug, Clone, PartialEq)]
pub enum AttemptResult {
    /// An output, measured.
    Output {
        /// The output.
        output: Json,
        /// False where it cannot be a checkpoint whatever the gate says: no JSON, or not of the stage's schema.
        usable: bool,
        /// What was measured.
        assessments: Vec<Assessment>,
        /// The model that answered.
        model: Option<ModelRef>,
        /// Where the answer came from.
        origin: Origin,
    },
    /// No output.
    Failed {
        /// Why.
        code: Code,
        /// In a sentence that quotes nothing.
        message: String,
        /// The same with what may quote payloads, where there is more to tell.
        detail: Option<String>,
        /// Whether another attempt may fare better, and what bounds the attempts.
        kind: FailureKind,
        /// What came of the models that were asked.
        tried: Tried,
    },
    /// The output passed its checks, and its judge failed at its own task: it was cut or refused, or gave no verdict. The
    /// output is not to blame.
    Unjudged {
        /// The output.
        output: Json,
        /// The assessments of the output, the judge's failure last.
        assessments: Vec<Assessment>,
        /// The model that answered.
        model: Option<ModelRef>,
        /// Where the answer came from.
        origin: Origin,
        /// The judge's failure.
        code: Code,
        /// In a sentence that quotes nothing.
        message: String,
        /// The same with what may quote payloads, where there is more to tell.
        detail: Option<String>,
        /// Whether it may fare better if it is asked again, and what bounds that.
        kind: FailureKind,
    },
    /// One model of the chain gave an answer that was cut, another may answer later: the answer is kept and judged as
    /// what it is, and the wait is kept as well.
    Cut {
        /// What there is of the answer.
        output: Json,
        /// What was measured: that it is not complete.
        assessments: Vec<Assessment>,
        /// The model that gave it.
        model: Option<ModelRef>,
        /// The outage of the others.
        code: Code,
        /// In a sentence that quotes nothing.
        message: String,
        /// The same with what may quote payloads, where there is more to tell.
        detail: Option<String>,
        /// How long they asked to wait.
        told: Option<Duration>,
        /// What came of the models that were asked.
        tried: Tried,
    },
}

/// What came of the models of a chain of which none gave an answer that can be used.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tried {
    /// Those that met an outage, and may answer later. Empty where they are not the stage's own but its judge's.
    pub away: Vec<ModelRef>,
    /// Whether one gave an answer that was paid for. It counts among the answers that `retry.max_attempts` bounds, also
    /// beside an outage.
    pub answered: bool,
}

/// Whether another attempt may fare better, and what bounds the attempts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// It would fail in the same way again.
    Final,
    /// An answer came that cannot be used. It counts: `retry.max_attempts` bounds it.
    Unusable,
    /// No answer came, for a reason that may pass: no connection, a rate limit, an error of the provider's, no answer in
    /// time, a breaker of our own. It does not count: `retry.max_wait` and the run's deadline bound it.
    Outage {
        /// When to come back, where that was told.
        told: Option<Duration>,
    },
}

impl FailureKind {
    /// Whether another attempt may fare better.
    pub fn is_retryable(self) -> bool {
        self != Self::Final
    }

    /// When to come back, where that was told.
    pub fn told(self) -> Option<Duration> {
        match self {
            Self::Outage { told } => told,
            Self::Final | Self::Unusable => None,
        }
    }
}

/// A previous answer that did not pass, for the next attempt to mend.
#[derive(Debug, Clone, PartialEq)]
pub struct Critique {
    /// The answer.
    pub output: Json,
    /// What was wrong with it.
    pub reasons: Vec<String>,
}

/// A run in its owner's memory.
#[derive(Debug)]
pub struct Run {
    lease: Lease,
    tenant: TenantId,
    pipeline: Arc<Pipeline>,
    version: u32,
    input: Json,
    cache_mode: Option<CacheMode>,
    created_at: DateTime<Utc>,
    deadline_at: DateTime<Utc>,
    park_after: Duration,

    state: RunState,
    last_seq: u64,
    totals: Totals,
    failure: Option<Failure>,
    started_at: Option<DateTime<Utc>>,
    finished_at: Option<DateTime<Utc>>,
    stages: Vec<StageRun>,
    /// It was asked something that this release does not know.
    has_unknown_signal: bool,
    /// Its owner is about to leave: nothing starts any more.
    draining: bool,
    /// The newest signal that was taken in. Until its commit is durable it can be read again.
    last_signal: i64,
    /// Whether every stage has succeeded and the output is being rendered.
    is_rendering: bool,
    /// By stage index; shared with the attempts that render from it.
    outputs: Arc<Vec<Option<Json>>>,
    draft: Draft,
}

/// A stage in its owner's memory.
#[derive(Debug)]
struct StageRun {
    record: StageRecord,
    /// The last attempt with an output that did not become the checkpoint: held, or to be mended.
    last_output: Option<Attempt>,
}

impl Run {
    /// From what the store keeps. `park_after` is the longest pause that is waited out in memory.
    pub fn from_snapshot(snapshot: Snapshot, pipeline: Arc<Pipeline>, park_after: Duration) -> Self {
        let Snapshot { lease, run, input, stages, checkpoints, last_attempts } = snapshot;
        let mut outputs = vec![None; pipeline.stages.len()];
        for (id, checkpoint) in checkpoints {
            if let Some(index) = pipeline.stage_index(id.as_str()) {
                outputs[index] = Some(checkpoint.output);
            }
        }
        let mut states: Vec<StageRun> = pipeline
            .stages
            .iter()
            .map(|stage| StageRun { record: StageRecord::pending(stage.id.clone()), last_output: None })
            .collect();
        for record in stages {
            if let Some(index) = pipeline.stage_index(record.id.as_str()) {
                states[index].record = record;
            }
        }
        for (id, attempt) in last_attempts {
            if let Some(index) = pipeline.stage_index(id.as_str()) {
                states[index].last_output = Some(attempt);
            }
        }
        Self {
            lease,
            tenant: run.tenant,
            version: run.version,
            input,
            cache_mode: run.cache_mode,
            created_at: run.created_at,
            deadline_at: run.deadline_at,
            park_after,
            state: run.state,
            last_seq: run.last_seq,
            totals: run.totals,
            failure: run.failure,
            started_at: run.started_at,
            finished_at: run.finished_at,
            stages: states,
            has_unknown_signal: false,
            draining: false,
            last_signal: 0,
            is_rendering: false,
            outputs: Arc::new(outputs),
            draft: Draft::default(),
            pipeline,
        }
    }

    /// Takes in what happened. `jitter` in [0, 1) spreads a back-off.
    pub fn on(&mut self, stimulus: Stimulus, now: DateTime<Utc>, jitter: f64) {
        if self.draft.disposition != Disposition::Keep {
            // Ended or parked by an earlier stimulus of this step. A signal that is not consumed here keeps a parked
            // run claimable, and timers are set anew by whoever takes it.
            return;
        }
        match stimulus {
            Stimulus::Taken(signals) => self.on_taken(signals, now),
            Stimulus::GivenUp { signals, failure } => self.on_given_up(signals, failure, now),
            Stimulus::Attempted { stage, attempt, outcome } => self.on_attempted(stage, attempt, outcome, now, jitter),
            Stimulus::Due { stage } => {
                if self.stages[stage].record.state == StageState::Waiting && !self.draining {
                    self.start_attempt(stage, now);
                }
            }
            Stimulus::Rendered(output) => {
                if std::mem::take(&mut self.is_rendering) && !self.state.is_terminal() {
                    self.conclude(output, now);
                }
            }
            Stimulus::Signalled(signals) => self.on_signals(signals, now),
            Stimulus::DeadlinePassed => self.expire(now),
        }
        self.settle(now);
    }

    /// A cancel that waits comes before it.
    fn on_given_up(&mut self, signals: Vec<Signal>, failure: Failure, now: DateTime<Utc>) {
        self.resume(&signals, now);
        self.on_signals(signals, now);
        self.stop(RunState::Failed, failure, now);
    }

    /// It has another owner.
    fn resume(&mut self, signals: &[Signal], now: DateTime<Utc>) {
        let retried = signals.iter().any(|signal| matches!(signal.kind, SignalKind::Retry { .. }));
        if self.started_at.is_none() {
            self.started_at = Some(now);
            self.emit(now, EventKind::RunStarted);
        } else if !retried {
            let checkpoints = u32::try_from(self.stages_done()).unwrap_or(u32::MAX);
            self.emit(now, EventKind::RunResumed { checkpoints });
        }
        self.state = RunState::Running;
        for stage in 0..self.stages.len() {
            let record = &mut self.stages[stage].record;
            if record.state == StageState::Running {
                // Durable before this owner asks anything, so that the count is right however often the run is taken.
                record.former_owners = record.former_owners.saturating_add(1);
                self.draft.touch(stage);
            }
        }
    }

    fn on_taken(&mut self, signals: Vec<Signal>, now: DateTime<Utc>) {
        self.resume(&signals, now);
        self.on_signals(signals, now);
        if now >= self.deadline_at {
            return self.expire(now);
        }
        for stage in 0..self.stages.len() {
            let record = &self.stages[stage].record;
            match record.state {
                StageState::Running => {
                    self.draft.effects.push(Effect::Start { stage, attempt: record.attempt });
                }
                StageState::Waiting => {
                    let at = record.not_before.unwrap_or(now);
                    self.draft.effects.push(Effect::WakeAt { stage, at });
                }
                _ => {}
            }
        }
    }

    fn on_signals(&mut self, mut signals: Vec<Signal>, now: DateTime<Utc>) {
        signals.retain(|signal| signal.id > self.last_signal);
        self.last_signal = signals.last().map_or(self.last_signal, |signal| signal.id);
        // What came before a retry was meant for the life that had ended.
        let moot = signals.iter().rposition(|signal| matches!(signal.kind, SignalKind::Retry { .. })).unwrap_or(0);
        for (index, signal) in signals.into_iter().enumerate() {
            if matches!(signal.kind, SignalKind::Unknown(_)) && index >= moot {
                self.has_unknown_signal = true; // Left for a replica that knows it.
                continue;
            }
            self.draft.consumed.push(signal.id);
            if index < moot || self.state.is_terminal() {
                continue;
            }
            match signal.kind {
                SignalKind::Cancel => {
                    let by = signal.by.map_or_else(String::new, |by| format!(" by {by}"));
                    let failure = Failure::new(Code::Cancelled, format!("the run was cancelled{by}"));
                    self.stop(RunState::Cancelled, failure, now);
                }
                SignalKind::Retry { deadline_at } => self.reopen(deadline_at, now),
                SignalKind::Approve { stage, attempt, comment, output } => {
                    let decision = Decision { by: signal.by, comment, edited: output.is_some() };
                    self.approve(&stage, attempt, output, decision, now);
                }
                SignalKind::Reject { stage, reason, attempt } => {
                    let decision = Decision { by: signal.by, comment: Some(reason), edited: false };
                    self.reject(&stage, attempt, decision, now);
                }
                SignalKind::Unknown(_) => {}
            }
        }
    }

    /// Starts over whatever has no checkpoint. Attempts go on counting, so that their record stays whole.
    fn reopen(&mut self, deadline_at: DateTime<Utc>, now: DateTime<Utc>) {
        self.failure = None;
        self.finished_at = None;
        self.deadline_at = deadline_at;
        let mut stages = Vec::new();
        for index in 0..self.stages.len() {
            let stage = &mut self.stages[index];
            let record = &mut stage.record;
            if record.state == StageState::Succeeded || record.attempt == 0 {
                continue;
            }
            record.state = StageState::Pending;
            record.round_start = record.attempt + 1;
            record.judged = 0;
            record.end_outage();
            record.not_before = None;
            record.failure = None;
            record.finished_at = None;
            stage.last_output = None;
            stages.push(record.id.clone());
            self.draft.touch(index);
        }
        self.emit(now, EventKind::RunRetried { stages });
    }

    /// Its owner is about to leave. What is under way may end and be checkpointed; nothing starts, not even on paper: the
    /// next owner begins what is ready.
    pub fn drain(&mut self) {
        self.draining = true;
    }

    /// Whether it was asked something that this release does not know: another replica may.
    pub fn has_unknown_signal(&self) -> bool {
        self.has_unknown_signal
    }

    fn expire(&mut self, now: DateTime<Utc>) {
        let mut message = format!("the run was not finished by its deadline, {}", self.deadline_at.to_rfc3339());
        let under_way = |record: &&StageRecord| matches!(record.state, StageState::Running | StageState::Waiting);
        let mut records = self.stages.iter().map(|stage| &stage.record).filter(under_way);
        if let Some((stage, outage)) = records.find_map(|record| Some((&record.id, record.outage()?))) {
            let _ = write!(message, "; stage `{stage}` waited for an outage to pass: {outage}");
        }
        let failure = Failure::new(Code::DeadlinePassed, message);
        self.stop(RunState::Expired, failure, now);
    }

    /// Ends the run at once: attempts under way are abandoned.
    fn stop(&mut self, state: RunState, failure: Failure, now: DateTime<Utc>) {
        if self.state.is_terminal() {
            return;
        }
        self.draft.effects.retain(|effect| !effect.is_work());
        self.draft.effects.push(Effect::Abort);
        for index in 0..self.stages.len() {
            let record = &mut self.stages[index].record;
            if matches!(record.state, StageState::Running | StageState::Waiting | StageState::Held) {
                if record.state == StageState::Running {
                    self.draft.cut_off.push(index);
                }
                record.state = StageState::Cancelled;
                record.not_before = None;
                record.finished_at = Some(now);
                self.draft.touch(index);
            }
        }
        self.failure = Some(failure);
        self.finish(state, now);
    }

    /// Books an attempt that ended with its run, in the step that ends it: its calls were made, and those under way are
    /// of unknown outcome. Nothing where that step is taken already.
    pub fn abandoned(
        &mut self,
        stage: usize,
        attempt: u32,
        started_at: DateTime<Utc>,
        calls: Vec<LedgerEntry>,
        now: DateTime<Utc>,
    ) {
        let record = &mut self.stages[stage].record;
        if self.draft.disposition != Disposition::End || calls.is_empty() || record.attempt != attempt {
            return;
        }
        for call in &calls {
            record.totals.add(call);
            self.totals.add(call);
        }
        record.verdict = Some(Verdict::Errored);
        let (id, failure) = (record.id.clone(), self.failure.clone());
        let ended = Attempt {
            number: attempt,
            started_at,
            finished_at: now,
            verdict: Verdict::Errored,
            assessments: Vec::new(),
            calls,
            output: None,
            failure,
            rest: crate::Rest::default(),
        };
        self.draft.touch(stage);
        self.draft.attempts.push((id, ended));
        for event in &mut self.draft.events {
            if let EventKind::RunFinished { totals, .. } = &mut event.kind {
                *totals = self.totals;
            }
        }
    }

    /// Why it ended or is about to, where it did not succeed.
    pub fn failure_code(&self) -> Option<Code> {
        self.failure.as_ref().map(|failure| failure.code)
    }

    /// The stages whose attempt under way ended with the run, in a step that is not taken yet, and which attempt. Each is
    /// told once, so that its calls are booked once however long the step before this one is under way.
    pub fn take_cut_off(&mut self) -> Vec<(usize, u32)> {
        let stages = std::mem::take(&mut self.draft.cut_off);
        stages.into_iter().map(|stage| (stage, self.stages[stage].record.attempt)).collect()
    }

    /// Gives the run back, for another replica to take at once: the attempts under way end here, with the calls that
    /// were made, and others begin in their place. An attempt that is not among `ended` had
    /// asked no model. If it had former owners it keeps its number, under which the cache has the answers that they bought.
    pub fn hand_back(&mut self, mut ended: Vec<(usize, DateTime<Utc>, Vec<LedgerEntry>)>, now: DateTime<Utc>) {
        if self.is_leaving() || self.state.is_terminal() {
            return;
        }
        for stage in 0..self.stages.len() {
            let record = &mut self.stages[stage].record;
            if record.state != StageState::Running {
                continue;
            }
            let at = ended.iter().position(|(of, ..)| *of == stage);
            if at.is_none() && record.former_owners > 0 {
                record.former_owners -= 1; // The next owner counts this one again.
                self.draft.touch(stage);
                continue;
            }
            let (_, started_at, calls) = at.map_or((stage, now, Vec::new()), |at| ended.swap_remove(at));
            self.interrupt(stage, started_at, calls, now);
        }
        self.state = RunState::Waiting;
        self.emit(now, EventKind::RunWaiting { until: Some(now), reason: None });
        self.draft.disposition = Disposition::Park(Some(Duration::ZERO));
        self.draft.effects.retain(|effect| !effect.is_work());
    }

    /// The stages with calls of unknown outcome.
    pub fn unknown_stages(&self) -> impl Iterator<Item = &StageId> {
        let records = self.stages.iter().map(|stage| &stage.record);
        records.filter(|record| record.totals.unknown_calls > 0).map(|record| &record.id)
    }

    /// How many owners the attempt under way at a stage had before this one.
    pub fn former_owners(&self, stage: usize) -> u32 {
        self.stages[stage].record.former_owners
    }

    /// Whatever follows from where things stand: successors start, or the run ends, or it parks.
    fn settle(&mut self, now: DateTime<Utc>) {
        if self.state.is_terminal() {
            return;
        }
        let any = |run: &Self, state| run.stages.iter().any(|stage| stage.record.state == state);
        if self.failure.is_some() {
            // Siblings under way are paid for: they may finish and be checkpointed, nothing new starts.
            for index in 0..self.stages.len() {
                let record = &mut self.stages[index].record;
                if matches!(record.state, StageState::Waiting | StageState::Held) {
                    record.state = StageState::Cancelled;
                    record.not_before = None;
                    record.finished_at = Some(now);
                    self.draft.touch(index);
                }
            }
            if !any(self, StageState::Running) {
                self.finish(RunState::Failed, now);
            }
            return;
        }
        let ready: Vec<usize> = (0..self.stages.len()).filter(|index| self.is_ready(*index)).collect();
        if !self.draining {
            for index in &ready {
                self.start_attempt(*index, now);
            }
        }
        if self.stages.iter().all(|stage| stage.record.state == StageState::Succeeded) {
            self.succeed(now);
        } else if !any(self, StageState::Running) && (!self.draining || ready.is_empty()) {
            self.wait(now);
        }
    }

    fn is_ready(&self, index: usize) -> bool {
        self.stages[index].record.state == StageState::Pending
            && self.pipeline.stages[index]
                .needs
                .iter()
                .all(|need| self.stages[*need].record.state == StageState::Succeeded)
    }

    /// Nothing is under way: either a short pause in memory, or the run parks until its next time, at the latest its
    /// deadline.
    fn wait(&mut self, now: DateTime<Utc>) {
        let next = self.stages.iter().filter_map(|stage| stage.record.not_before).min();
        let until = next.map_or(self.deadline_at, |next| next.min(self.deadline_at));
        let pause = (until - now).to_std().unwrap_or(Duration::ZERO);
        if pause <= self.park_after || self.has_unknown_signal {
            // A parked run with a signal that nobody consumes would be claimed again at once. The driver hands it back
            // after a while, so that a replica that knows the signal may take it.
            return; // The timer (of the stage or of the deadline) is already set.
        }
        self.state = RunState::Waiting;
        let waiting = Waiting::of_run(self.stages.iter().map(|stage| &stage.record));
        self.emit(now, EventKind::RunWaiting { until: next, reason: waiting.map(|waiting| waiting.reason) });
        self.draft.disposition = Disposition::Park(Some(pause));
        self.draft.effects.retain(|effect| !effect.is_work());
    }

    /// Every stage has succeeded: a small output is rendered at once, a large one where it delays nothing else.
    fn succeed(&mut self, now: DateTime<Utc>) {
        if self.is_rendering {
            return;
        }
        let id = self.lease.run.to_string();
        let render = || {
            let seen = Seen::parse(&self.pipeline, Part::Output, &self.input, &self.outputs);
            self.pipeline.render_output(&seen.context(&id)).map(Json::from)
        };
        if let Ok(output) = evaluation::brief(render) {
            return self.conclude(output, now);
        }
        // On the pool it is fenced as well, and its end is told there.
        self.is_rendering = true;
        self.draft.effects.push(Effect::RenderOutput);
    }

    fn conclude(&mut self, output: Result<Json, Failure>, now: DateTime<Utc>) {
        match output {
            Ok(output) => {
                self.draft.output = Some(output);
                self.draft.output_of = self.pipeline.default_output_of();
                self.finish(RunState::Succeeded, now);
            }
            Err(failure) => {
                self.failure = Some(failure.public());
                self.finish(RunState::Failed, now);
            }
        }
    }

    fn finish(&mut self, state: RunState, now: DateTime<Utc>) {
        self.state = state;
        self.finished_at = Some(now);
        self.draft.disposition = Disposition::End;
        let (failure, totals) = (self.failure.clone(), self.totals);
        self.emit(now, EventKind::RunFinished { state, failure, totals });
    }

    fn emit(&mut self, now: DateTime<Utc>, kind: EventKind) {
        self.last_seq += 1;
        self.draft.events.push(crate::Event::new(self.last_seq, now, kind));
    }

    fn stages_done(&self) -> usize {
        self.stages.iter().filter(|stage| stage.record.state == StageState::Succeeded).count()
    }

    /// The lease that every write carries.
    pub fn lease(&self) -> Lease {
        self.lease
    }

    /// The first event that is not durable yet, or else the next one.
    pub fn first_seq(&self) -> u64 {
        self.last_seq + 1 - self.draft.events.len() as u64
    }

    /// Whose run it is.
    pub fn tenant(&self) -> &TenantId {
        &self.tenant
    }

    /// What it runs.
    pub fn pipeline(&self) -> &Arc<Pipeline> {
        &self.pipeline
    }

    /// The version that it is pinned to.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The input.
    pub fn input(&self) -> &Json {
        &self.input
    }

    /// The outputs that are there, by stage index.
    pub fn outputs(&self) -> &Arc<Vec<Option<Json>>> {
        &self.outputs
    }

    /// Overrides the stages' cache mode.
    pub fn cache_mode(&self) -> Option<CacheMode> {
        self.cache_mode
    }

    /// When it was accepted.
    pub fn created_at(&self) -> DateTime<Utc> {
        self.created_at
    }

    /// When it expires.
    pub fn deadline_at(&self) -> DateTime<Utc> {
        self.deadline_at
    }

    /// Whether it was parked or ended by a step that is not taken yet. Until that is taken nothing is taken in.
    pub fn is_leaving(&self) -> bool {
        self.draft.disposition != Disposition::Keep
    }

    /// Where it stands.
    pub fn state(&self) -> RunState {
        self.state
    }

    /// Whether this attempt is still wanted: a stop may have been decided after its start was.
    pub fn is_under_way(&self, stage: usize, attempt: u32) -> bool {
        let record = &self.stages[stage].record;
        record.state == StageState::Running && record.attempt == attempt
    }

    /// Whether an attempt at some stage is under way, begun or not.
    pub fn has_under_way(&self) -> bool {
        self.stages.iter().any(|stage| stage.record.state == StageState::Running)
    }

    /// What it took so far.
    pub fn totals(&self) -> &Totals {
        &self.totals
    }

    /// What the next attempt at a stage must mend: the last answer of this round whose gate failed.
    pub fn critique(&self, stage: usize) -> Option<Critique> {
        let stage = &self.stages[stage];
        let last = stage.last_output.as_ref()?;
        if last.verdict != Verdict::Retry || last.number < stage.record.round_start {
            return None;
        }
        let reasons = last
            .assessments
            .iter()
            .filter(|assessment| !assessment.passed)
            .map(|assessment| {
                // The author may read everything.
                format!("{}: {}", assessment.name, assessment.detail.as_ref().unwrap_or(&assessment.reason))
            })
            .collect();
        Some(Critique { output: last.output.clone()?, reasons })
    }

    fn set_output(&mut self, stage: usize, checkpoint: &Checkpoint) {
        // Attempts under way hold the old vector; they do not see outputs that they do not need.
        Arc::make_mut(&mut self.outputs)[stage] = Some(checkpoint.output.clone());
    }
}
