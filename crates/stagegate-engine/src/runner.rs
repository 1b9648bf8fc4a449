//! Driving one run: owns the loop of decide → commit → act. One task a run; its attempts are futures inside it, so
//! that dropping the task abandons everything at once.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use chrono::{DateTime, Utc};
use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use stagegate_core::{
    Code, Error, Failure, Json, LedgerEntry, StageId, Verdict,
    decide::{AttemptResult, Effect, FailureKind, Outcome, Run, Stimulus, Tried},
    pipeline::{Part, Seen, Work},
    store::{Committed, Disposition, Signal},
};
use stagegate_llm::Reply;
use tokio::{sync::Notify, time::Instant};
use tracing::Instrument;

use crate::{
    batch::Sent,
    books::Books,
    budget::Budget,
    kinds::{self, AttemptContext, Attempted},
    memory, observe,
    quarantine::Stay,
    shared::Shared,
};

/// The pause before what could not be read is read again.
const STORE_RETRY: Duration = Duration::from_secs(1);

/// How long a run that was asked something unknown is kept: others of this release would fare no better, so that it must not go round
/// without a pause.
const UNKNOWN_SIGNAL_PATIENCE: chrono::TimeDelta = chrono::TimeDelta::seconds(30);

/// What an attempt's future may hold, the model layer's part of it included; thousands are under way at once.
const ATTEMPT_MAX_BYTES: usize = 6 * 1024;

/// How others reach a run's driver: they set a mark and wake it.
#[derive(Debug, Default)]
pub(crate) struct Handle {
    woken: Notify,
    signalled: AtomicBool,
    stopped: AtomicBool,
    given_back: AtomicBool,
}

impl Handle {
    /// There are signals to be read.
    pub(crate) fn signal(&self) {
        self.signalled.store(true, Ordering::Release);
        self.woken.notify_one();
    }

    /// Stop at once and begin nothing more: the life in which the run was leased has ended.
    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.woken.notify_one();
    }

    /// Give the run back: what is under way is cut off, booked, and left to another replica.
    pub(crate) fn give_back(&self) {
        self.given_back.store(true, Ordering::Release);
        self.woken.notify_one();
    }

    /// Look around: the drain has begun.
    pub(crate) fn wake(&self) {
        self.woken.notify_one();
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    fn is_given_back(&self) -> bool {
        self.given_back.load(Ordering::Acquire)
    }

    fn take_signalled(&self) -> bool {
        self.signalled.swap(false, Ordering::AcqRel)
    }
}

/// Why a driver ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The run ended or parked; the lease went with the commit.
    Committed,
    /// The lease is gone.
    Lost,
    /// The lease is still ours and must be handed back.
    HandBack,
    /// It panicked. The lease is still ours and must be handed back, later than at once.
    Panicked,
    /// The run cannot go on for a defect of ours or of its rows. The lease stays, so that it is not claimed again and
    /// again; the next audit tries it anew.
    Broken,
}

type AttemptFuture = BoxFuture<'static, (usize, u32, Attempted)>;
type SignalsFuture = BoxFuture<'static, Vec<Signal>>;
type RenderingFuture = BoxFuture<'static, Result<Json, Failure>>;

/// A run, and what is under way for it.
pub(crate) struct Driver {
    shared: Arc<Shared>,
    handle: Arc<Handle>,
    run: Run,
    budget: Option<Arc<Budget>>,
    attempts: FuturesUnordered<AttemptFuture>,
    /// The books of the attempts under way.
    open: Vec<Open>,
    timers: BTreeSet<(DateTime<Utc>, usize)>,
    /// When it is handed back because it was asked something that this release does not know.
    hand_back_at: Option<DateTime<Utc>>,
    /// The run's output, where it is large.
    rendering: Option<RenderingFuture>,
    /// The answer of the attempt last ended of a stage, until its verdict is durable.
    replies: Vec<(usize, Reply)>,
    /// What the run holds in memory; it grows with its outputs.
    in_memory: memory::Permit,
    /// Whether anything is durable that this owner decided.
    has_written: bool,
    /// Where the run is suspected for its crashes: until it has come further than this event.
    stay: Option<(Stay, u64)>,
}

/// An attempt under way.
struct Open {
    stage: usize,
    attempt: u32,
    started_at: DateTime<Utc>,
    books: Arc<Books>,
}

/// A step on its way to the store, and what follows.
struct Committing {
    sent: Sent<Committed>,
    step: observe::Committing,
    effects: Vec<Effect>,
    then: Disposition,
}

impl Driver {
    pub(crate) fn new(
        shared: Arc<Shared>,
        handle: Arc<Handle>,
        run: Run,
        in_memory: memory::Permit,
        stay: Option<Stay>,
    ) -> Self {
        let max = run.pipeline().budget.as_ref().map(|budget| budget.max_cost_usd);
        let budget = max.map(|max| Arc::new(Budget::new(max, run.totals().cost_usd)));
        // The first event since it was taken is no progress.
        let stay = stay.map(|stay| (stay, run.first_seq()));
        let (attempts, open, timers, replies) = (FuturesUnordered::new(), Vec::new(), BTreeSet::new(), Vec::new());
        Self {
            shared,
            handle,
            run,
            budget,
            attempts,
            open,
            timers,
            hand_back_at: None,
            rendering: None,
            replies,
            in_memory,
            has_written: false,
            stay,
        }
    }

    /// Drives the run until it ends, parks, is lost, or must be handed back. `first` is what was decided and is
    /// already durable.
    pub(crate) async fn drive(&mut self, first: Vec<Effect>) -> Ended {
        self.has_written = !first.is_empty();
        if !self.hear_first().await {
            return Box::pin(self.stopped(None)).await;
        }
        if let Some(budget) = self.budget.clone().filter(|_| self.run.totals().unknown_calls > 0) {
            self.pass_over_presumed(budget).await;
        }
        self.perform(first).await;
        let handle = Arc::clone(&self.handle);
        let mut committing: Option<Committing> = None;
        let mut reading: Option<SignalsFuture> = None;
        let alarm = tokio::time::sleep_until(Instant::now());
        tokio::pin!(alarm);
        let mut alarm_at = None;
        loop {
            if self.run.state().is_terminal() {
                // Not only when that is durable: a commit can take long, and meanwhile an attempt would call its judge.
                self.abandon().await;
            } else if handle.is_given_back() && committing.is_none() {
                self.give_back();
            }
            if handle.is_stopped() {
                return Box::pin(self.stopped(committing.take())).await;
            }
            if reading.is_none() && handle.take_signalled() {
                reading = Some(self.signals());
            }
            if committing.is_none() {
                committing = self.begin_commit();
            }
            let draining = self.shared.drain.is_cancelled();
            if draining && committing.is_none() && self.attempts.is_empty() && self.rendering.is_none() {
                if self.run.has_under_way() {
                    // Its start was durable when the drain began: it is told that it has not begun.
                    self.give_back();
                    continue;
                }
                return Ended::HandBack;
            }
            if committing.is_none() && self.is_for_others() {
                return Ended::HandBack;
            }
            // Nothing is awaited any more once the run has ended or is about to park: a deadline that passes before that is
            // durable would be due again and again, and nothing would be done about it.
            let timed = !draining && !self.run.state().is_terminal() && !self.run.is_leaving();
            let next = self.next_due();
            if timed && alarm_at != Some(next) {
                alarm_at = Some(next);
                alarm.as_mut().reset(self.instant_of(next));
            }
            tokio::select! {
                biased;
                () = handle.woken.notified() => {}
                acked = acked(&mut committing), if committing.is_some() => {
                    let Some(Committing { step, effects, then, .. }) = committing.take() else { continue };
                    if let Some(ended) = self.acknowledged(acked, step, effects, then).await {
                        return ended;
                    }
                }
                signals = read(&mut reading), if reading.is_some() => {
                    reading = None;
                    self.hear(signals);
                }
                output = rendered(&mut self.rendering), if self.rendering.is_some() => {
                    self.rendering = None;
                    self.run.on(Stimulus::Rendered(output), self.shared.clock.now(), 0.0);
                }
                Some((stage, attempt, attempted)) = self.attempts.next() => {
                    self.attempted(stage, attempt, attempted);
                }
                () = alarm.as_mut(), if timed => {
                    alarm_at = None; // The wall clock may have been set meanwhile: what is not due yet is set anew.
                    self.due();
                }
            }
        }
    }

    /// What was asked while the insert was under way is heard before anything starts. False where the life in which the
    /// run was leased ended meanwhile.
    async fn hear_first(&mut self) -> bool {
        if !self.handle.take_signalled() {
            return true;
        }
        let (handle, mut signals) = (Arc::clone(&self.handle), self.signals());
        while !handle.is_stopped() {
            tokio::select! {
                biased;
                () = handle.woken.notified() => {}
                signals = &mut signals => {
                    self.hear(signals);
                    return true;
                }
            }
        }
        false
    }

    fn begin_commit(&mut self) -> Option<Committing> {
        let step = self.run.take_step()?;
        let then = step.commit.then;
        let observed = observe::Committing::of(&step.commit);
        let sent = self.shared.steps.begin(step.commit);
        Some(Committing { sent, step: observed, effects: step.effects, then })
    }

    /// What follows from the store's answer to a step. Returns how the driver ends, where it does.
    async fn acknowledged(
        &mut self,
        acked: Result<Committed, Error>,
        step: observe::Committing,
        effects: Vec<Effect>,
        then: Disposition,
    ) -> Option<Ended> {
        match acked {
            Ok(Committed::Now | Committed::Already) => {
                self.has_written = true;
                observe::committed(&self.shared, &self.run, &step);
                let events = step.into_events();
                let last = events.last().map_or(0, |event| event.seq);
                self.stay.take_if(|(_, at)| last > *at);
                self.shared.tell(self.run.lease().run, events);
                self.perform(effects).await;
                (then != Disposition::Keep).then_some(Ended::Committed)
            }
            Ok(Committed::Stale) => Some(Ended::Lost),
            Err(error) => {
                // Only a defect comes here: the store retries what can be retried.
                tracing::error!(%error, "a step of this run cannot be stored");
                Some(Ended::Broken)
            }
        }
    }

    async fn perform(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Start { stage, attempt } => {
                    // A cancel may have been read while this start was being committed.
                    if !self.shared.drain.is_cancelled() && self.run.is_under_way(stage, attempt) {
                        if self.shared.is_past_fence() {
                            // A replica that slept past its fence and wakes here, before its heartbeat does: another one
                            // may have started this already.
                            return self.handle.stop();
                        }
                        self.start(stage, attempt);
                    }
                }
                Effect::WakeAt { stage, at } => {
                    self.timers.insert((at, stage));
                }
                Effect::RenderOutput => self.rendering = Some(self.render_output()),
                Effect::Abort => self.abandon().await,
                Effect::Judged { stage, verdict, gate_failed, mended, .. } => {
                    let reply = self.take_reply(stage);
                    let mends = mended && verdict == Verdict::Passed;
                    if let Some(reply) = reply.filter(|_| gate_failed || mends) {
                        // Rare and large: it must not be a part of every driver.
                        Box::pin(self.judged(stage, reply, gate_failed)).await;
                    }
                }
            }
        }
    }

    /// The run's output, rendered beside whatever else goes on.
    fn render_output(&self) -> RenderingFuture {
        let (run, evaluations) = (&self.run, Arc::clone(&self.shared.evaluations));
        let (pipeline, input, outputs) = (Arc::clone(run.pipeline()), run.input().clone(), Arc::clone(run.outputs()));
        let (tenant, run_id) = (run.tenant().clone(), run.lease().run.to_string());
        let value_bytes = Seen::parsed_bytes(&pipeline, Part::Output, &input, &outputs);
        async move {
            let output = move || {
                let seen = Seen::parse(&pipeline, Part::Output, &input, &outputs);
                pipeline.render_output(&seen.context(&run_id)).map(Json::from)
            };
            evaluations
                .evaluate_large(&tenant, value_bytes, output)
                .await
                .unwrap_or_else(|late| Err(late.failure(None)))
        }
        .boxed()
    }

    fn start(&mut self, stage: usize, attempt: u32) {
        let started_at = self.shared.clock.now();
        let books = Books::open(self.budget.clone(), self.run.former_owners(stage));
        let context = self.context(stage, attempt, started_at, Arc::clone(&books));
        let span = tracing::info_span!("stage", stage_id = %context.stage().id, attempt);
        let work = async move {
            let deadline = context.deadline;
            let ended = tokio::time::timeout_at(deadline, kinds::attempt(&context)).await;
            let attempted = ended.unwrap_or_else(|_| Attempted { result: out_of_time(), reply: None });
            (stage, attempt, attempted)
        };
        debug_assert!(std::mem::size_of_val(&work) <= ATTEMPT_MAX_BYTES, "{}", std::mem::size_of_val(&work));
        self.attempts.push(work.instrument(span).boxed());
        self.open.push(Open { stage, attempt, started_at, books });
    }

    /// The life in which the run was leased has ended: what is under way is cut off at once. The lease may be ours all the same,
    /// and only we know what was sent: so the run is given back with that, where the store answers in the time of a lease. Where
    /// others have the run the step changes nothing, and they presume the worst.
    async fn stopped(&mut self, committing: Option<Committing>) -> Ended {
        if !self.has_written && committing.is_none() {
            return Ended::HandBack; // As it was found.
        }
        if self.run.state().is_terminal() {
            self.abandon().await;
        }
        let ended = self.cut_off();
        if self.shared.drain.is_cancelled() {
            return Ended::HandBack; // The store had its time.
        }
        let patience = self.shared.config.lease_ttl.0;
        let given_back = async {
            if let Some(Committing { sent, step, then, .. }) = committing
                && let Some(ended) = self.acknowledged(sent.await, step, Vec::new(), then).await
            {
                return ended;
            }
            if self.run.has_under_way() {
                self.run.hand_back(ended, self.shared.clock.now());
            }
            let Some(Committing { sent, step, then, .. }) = self.begin_commit() else { return Ended::HandBack };
            let acked = sent.await;
            self.acknowledged(acked, step, Vec::new(), then).await.unwrap_or(Ended::HandBack)
        };
        match tokio::time::timeout(patience, given_back).await {
            Ok(Ended::Committed) => {
                self.shared.whisper.work();
                Ended::Committed
            }
            Ok(ended) => ended,
            Err(_) => Ended::HandBack,
        }
    }

    /// The budget passes over what former owners are only presumed to have spent. Read anew: the run's totals tell of it and
    /// of calls that were sent in one sum.
    fn pass_over_presumed(&self, budget: Arc<Budget>) -> BoxFuture<'static, ()> {
        let (store, handle) = (Arc::clone(&self.shared.store), Arc::clone(&self.handle));
        let (tenant, run) = (self.run.tenant().clone(), self.run.lease().run);
        let stages: Vec<StageId> = self.run.unknown_stages().cloned().collect();
        async move {
            for stage in stages {
                let detail = loop {
                    match store.stage(&tenant, run, &stage).await {
                        Ok(detail) => break detail,
                        Err(error) if error.is_retryable() && !handle.is_stopped() => {
                            tracing::warn!(%error, "the calls of this run could not be read; they are read again");
                            tokio::time::sleep(STORE_RETRY).await;
                        }
                        Err(error) => {
                            tracing::error!(%error, "the calls of this run cannot be read; all of them count");
                            break None;
                        }
                    }
                };
                let attempts = detail.into_iter().flat_map(|detail| detail.attempts);
                let calls = attempts.flat_map(|attempt| attempt.calls).filter(LedgerEntry::is_presumed);
                calls.for_each(|call| budget.pass_over(call.cost_usd));
            }
        }
        .boxed()
    }

    /// Cuts off what is under way, and gives the run back with what was booked.
    fn give_back(&mut self) {
        let ended = self.cut_off();
        self.run.hand_back(ended, self.shared.clock.now());
    }

    /// Cuts the attempts under way off. Returns those that had asked a model, with their calls.
    fn cut_off(&mut self) -> Vec<(usize, DateTime<Utc>, Vec<LedgerEntry>)> {
        // While former owners are not booked yet nothing was asked: what they bought is left for the next one to find.
        let ended = self.open.drain(..).filter_map(|Open { stage, started_at, books, .. }| {
            let calls = books.close(Code::Draining);
            (books.former_owners() == 0).then_some((stage, started_at, calls))
        });
        let ended = ended.collect();
        self.attempts.clear();
        self.timers.clear();
        self.rendering = None;
        ended
    }

    /// Ends everything under way. Where the run ends by it, the calls are booked in the step that ends it, with what former
    /// owners of an attempt may have bought and nobody has looked for.
    async fn abandon(&mut self) {
        let (now, reason) = (self.shared.clock.now(), self.run.failure_code().unwrap_or(Code::Cancelled));
        for (stage, attempt) in self.run.take_cut_off() {
            let open = self.open.iter().position(|open| (open.stage, open.attempt) == (stage, attempt));
            let (started_at, mut calls, former_owners) = match open.map(|at| self.open.swap_remove(at)) {
                Some(open) => (open.started_at, open.books.close(reason), open.books.former_owners()),
                None => (now, Vec::new(), self.run.former_owners(stage)),
            };
            if former_owners > 0 {
                // Rare and large: it must not be a part of every driver.
                let context = self.context(stage, attempt, now, Books::open(None, 0));
                let worst = Box::pin(worst_cases(context, reason)).await;
                (0..former_owners).for_each(|_| calls.extend(worst.iter().cloned()));
            }
            self.run.abandoned(stage, attempt, started_at, calls, now);
        }
        self.open.clear();
        self.attempts.clear();
        self.timers.clear();
        self.rendering = None;
    }

    fn context(&self, stage: usize, attempt: u32, now: DateTime<Utc>, books: Arc<Books>) -> AttemptContext {
        let run = &self.run;
        // A little past the run's deadline, so that it is the run that expires there and not the attempt that fails.
        let left = (run.deadline_at() - now).to_std().unwrap_or(Duration::ZERO) + Duration::from_secs(1);
        AttemptContext {
            llm: Arc::clone(&self.shared.llm),
            evaluations: Arc::clone(&self.shared.evaluations),
            tenant: run.tenant().clone(),
            pipeline: Arc::clone(run.pipeline()),
            version: run.version(),
            run: run.lease().run,
            input: run.input().clone(),
            outputs: Arc::clone(run.outputs()),
            stage,
            attempt,
            critique: run.critique(stage),
            models_left: run.models_left(stage).to_vec(),
            cache_mode: run.cache_mode(),
            books,
            outage_until: Instant::now() + run.outage_left(stage, now),
            deadline: Instant::now() + left,
        }
    }

    fn attempted(&mut self, stage: usize, attempt: u32, attempted: Attempted) {
        let Attempted { result, reply } = attempted;
        if let AttemptResult::Output { output, .. } | AttemptResult::Unjudged { output, .. } = &result {
            self.in_memory.grow(output.text_bytes());
        }
        let at = self.open.iter().position(|open| (open.stage, open.attempt) == (stage, attempt));
        let Some(Open { started_at, books, .. }) = at.map(|at| self.open.swap_remove(at)) else { return };
        let calls = books.close(Code::StageTimeout);
        self.take_reply(stage);
        self.replies.extend(reply.map(|reply| (stage, reply)));
        let outcome = Outcome { started_at, calls, result };
        let jitter = self.jitter(stage, attempt);
        self.on(Stimulus::Attempted { stage, attempt, outcome }, jitter);
    }

    /// The id is random enough to spread the back-offs of runs that failed together.
    fn jitter(&self, stage: usize, attempt: u32) -> f64 {
        let seed = self.run.lease().run.0.as_u64_pair().1;
        let which = (stage as u64) << 32 | u64::from(attempt);
        SmallRng::seed_from_u64(seed ^ which).random()
    }

    fn take_reply(&mut self, stage: usize) -> Option<Reply> {
        let index = self.replies.iter().position(|(of, _)| *of == stage)?;
        Some(self.replies.swap_remove(index).1)
    }

    /// The verdict is durable: what failed its gate leaves the cache; what passed after a retry also answers the
    /// request that the stage began with, so that the next run of it starts from there.
    async fn judged(&mut self, stage: usize, reply: Reply, gate_failed: bool) {
        if gate_failed {
            return self.shared.llm.evict(self.run.tenant(), reply.key).await;
        }
        // No call is made, so that the attempt does not matter.
        let context = self.context(stage, 0, self.shared.clock.now(), Books::open(None, 0));
        let Work::Model(work) = &context.stage().work else { return };
        if let Ok(first) = kinds::rendered_request(&context, None).await {
            let call = context.call_context(&work.cache);
            self.shared.llm.remember(&call, &first, &reply).await;
        }
    }

    /// Whether it is time to hand the run back, so that a replica that knows what was asked of it may take it. What is
    /// under way is finished first.
    fn is_for_others(&mut self) -> bool {
        if !self.run.has_unknown_signal() || !self.attempts.is_empty() {
            return false;
        }
        let now = self.shared.clock.now();
        now >= *self.hand_back_at.get_or_insert(now + UNKNOWN_SIGNAL_PATIENCE)
    }

    /// When something is due by itself: a pause ends, or the run expires.
    fn next_due(&self) -> DateTime<Utc> {
        let deadline = self.run.deadline_at();
        let due = self.timers.first().map_or(deadline, |(at, _)| (*at).min(deadline));
        self.hand_back_at.filter(|_| self.attempts.is_empty()).map_or(due, |at| at.min(due))
    }

    fn instant_of(&self, at: DateTime<Utc>) -> Instant {
        Instant::now() + (at - self.shared.clock.now()).to_std().unwrap_or(Duration::ZERO)
    }

    /// Takes in what happened now. While this replica drains nothing starts.
    fn on(&mut self, stimulus: Stimulus, jitter: f64) {
        if self.shared.drain.is_cancelled() {
            self.run.drain();
        }
        self.run.on(stimulus, self.shared.clock.now(), jitter);
    }

    /// Takes in what was asked. The run holds the outputs that came with it.
    fn hear(&mut self, signals: Vec<Signal>) {
        self.in_memory.grow(signals.iter().map(|signal| signal.kind.text_bytes()).sum());
        self.on(Stimulus::Signalled(signals), 0.0);
    }

    fn due(&mut self) {
        let now = self.shared.clock.now();
        if now >= self.run.deadline_at() {
            self.run.on(Stimulus::DeadlinePassed, now, 0.0);
            return;
        }
        while let Some(&(at, stage)) = self.timers.first() {
            if at > now {
                return;
            }
            self.timers.pop_first();
            self.run.on(Stimulus::Due { stage }, now, 0.0);
        }
    }

    /// Reads the signals, beside whatever else goes on. It is repeated until the store answers: a reading that failed
    /// may have cleared the mark, so that no heartbeat would tell of them again.
    fn signals(&self) -> SignalsFuture {
        let (store, lease) = (Arc::clone(&self.shared.store), self.run.lease());
        async move {
            loop {
                match store.signals(&[lease]).await {
                    Ok(mut found) => return found.pop().map(|(_, signals)| signals).unwrap_or_default(),
                    Err(error) if error.is_retryable() => {
                        tracing::warn!(%error, "the signals of this run could not be read; they are read again");
                        tokio::time::sleep(STORE_RETRY).await;
                    }
                    Err(error) => {
                        tracing::error!(%error, "the signals of this run cannot be read");
                        return Vec::new();
                    }
                }
            }
        }
        .boxed()
    }
}

/// What a call to each model of a stage's chain can have cost. Nothing where its prompt cannot be rendered, for then none
/// was made.
async fn worst_cases(context: AttemptContext, reason: Code) -> Vec<LedgerEntry> {
    if !matches!(context.stage().work, Work::Model(_)) {
        return Vec::new();
    }
    let Ok(request) = kinds::rendered_request(&context, context.critique.clone()).await else { return Vec::new() };
    let rows = context.llm.worst_cases(&request).into_iter();
    rows.map(|row| LedgerEntry { error: Some(reason), ..row }).collect()
}

async fn read(reading: &mut Option<SignalsFuture>) -> Vec<Signal> {
    match reading {
        Some(reading) => reading.await,
        None => std::future::pending().await,
    }
}

async fn rendered(rendering: &mut Option<RenderingFuture>) -> Result<Json, Failure> {
    match rendering {
        Some(rendering) => rendering.await,
        None => std::future::pending().await,
    }
}

async fn acked(committing: &mut Option<Committing>) -> Result<Committed, Error> {
    match committing {
        Some(committing) => (&mut committing.sent).await,
        None => std::future::pending().await,
    }
}

/// The run has expired by then.
fn out_of_time() -> AttemptResult {
    AttemptResult::Failed {
        code: stagegate_core::Code::StageTimeout,
        message: "the attempt was not over at the run's deadline".to_owned(),
        detail: None,
        kind: FailureKind::Outage { told: None },
        tried: Tried::default(),
    }
}
