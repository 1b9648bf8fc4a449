//! The engine: owns runs from their acceptance to their end. It is the only caller of the model layer and the only
//! writer of a run's progress; it knows nothing of HTTP.
//!
//! submit → one insert, leased at once where there is room → a driver per run: decide → commit (in batches with
//! others) → act → … → the last commit ends the run and the lease. What is queued, due, or left by a dead replica is
//! claimed. Nothing here reads a database clock or holds a connection while a model is awaited.

mod admission;
mod api;
mod batch;
mod books;
mod budget;
mod clock;
pub mod config;
mod edited;
mod evaluation;
mod follow;
mod kinds;
pub mod memory;
mod observe;
mod pipelines;
mod plan;
mod quarantine;
mod replica;
mod retention;
mod runner;
mod shared;
mod submit;
mod whisper;
mod writer;

use std::{sync::Arc, time::Duration};

use futures::{StreamExt, TryStreamExt, stream::BoxStream};
use rand::{Rng, SeedableRng, rngs::StdRng};
use stagegate_core::{
    Capability, Clock, Code, Error, Event, Json, Pipeline, PipelineName, ReplicaId, RunId, RunState, StageId,
    StageState, Store, TenantId,
    hint::Hints,
    pipeline::{Bundle, NOT_RENDERED},
    store::{NewSignal, NewVersion, PipelineVersion, Registered, RunRecord, SignalKind, Signalled},
};
use stagegate_llm::Llm;
use stagegate_telemetry::Metrics;
use tokio::{runtime::Handle, time::Instant};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use api::{Action, Approval, Plan, PlannedOutcome, PlannedStage, Submit};
pub use follow::EventBatch;

use clock::DatabaseClock;
use edited::Edited;
use evaluation::Evaluations;
use memory::Memory;
use pipelines::Pipelines;
use shared::Shared;

/// How often a definition is put before versions that others register meanwhile.
const REVERTS_MAX: u32 = 5;
/// How long the store may take to note what is handed back, and the farewell, at the end of a drain.
const FAREWELL: Duration = Duration::from_secs(5);

/// A running engine. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Engine {
    shared: Arc<Shared>,
    /// Ends the heartbeat, once everything is handed back.
    stop: CancellationToken,
    background: TaskTracker,
}

impl Engine {
    /// Starts: enters this replica, and begins to claim and to execute. Must be called inside a tokio runtime.
    pub async fn start(
        config: config::EngineConfig,
        store: Arc<dyn Store>,
        llm: Arc<Llm>,
        metrics: Metrics,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, Error> {
        Self::start_hinted(config, store, llm, metrics, clock, None).await
    }

    /// The same, with a way for hints between replicas: they wake each other earlier than their next look would.
    pub async fn start_hinted(
        config: config::EngineConfig,
        store: Arc<dyn Store>,
        llm: Arc<Llm>,
        metrics: Metrics,
        clock: Arc<dyn Clock>,
        hints: Option<Arc<dyn Hints>>,
    ) -> Result<Self, Error> {
        Self::start_with(None, config, store, llm, metrics, clock, hints, StdRng::from_os_rng(), true).await
    }

    /// The same, with its heartbeat on a runtime of its own, so that it goes on while every thread of this one is busy.
    /// Where that lasts ([`Engine::is_stuck`]) it stops, and others take the runs over.
    pub async fn start_beating_on(
        vital: &Handle,
        config: config::EngineConfig,
        store: Arc<dyn Store>,
        llm: Arc<Llm>,
        metrics: Metrics,
        clock: Arc<dyn Clock>,
        hints: Option<Arc<dyn Hints>>,
    ) -> Result<Self, Error> {
        Self::start_with(Some(vital), config, store, llm, metrics, clock, hints, StdRng::from_os_rng(), true).await
    }

    /// The same, with everything that it draws at random (ids, jitter) drawn from `rng`, and on no thread but the
    /// runtime's: for simulations, which must be repeatable.
    pub async fn start_seeded(
        config: config::EngineConfig,
        store: Arc<dyn Store>,
        llm: Arc<Llm>,
        metrics: Metrics,
        clock: Arc<dyn Clock>,
        hints: Option<Arc<dyn Hints>>,
        rng: StdRng,
    ) -> Result<Self, Error> {
        Self::start_with(None, config, store, llm, metrics, clock, hints, rng, false).await
    }

    #[expect(clippy::too_many_arguments, reason = "each is a part that the engine is made of")]
    async fn start_with(
        vital: Option<&Handle>,
        config: config::EngineConfig,
        store: Arc<dyn Store>,
        llm: Arc<Llm>,
        metrics: Metrics,
        clock: Arc<dyn Clock>,
        hints: Option<Arc<dyn Hints>>,
        mut rng: StdRng,
        has_threads: bool,
    ) -> Result<Self, Error> {
        let memory = Memory::new(config.memory_max_bytes.unwrap_or(memory::MEMORY_DEFAULT_BYTES));
        let mut evaluations = Evaluations::inline(config.evaluation_timeout.0, &memory, metrics.clone());
        if has_threads {
            evaluations = evaluations.on_threads(config.evaluation_threads());
        }
        let evaluations = Arc::new(evaluations);
        let background = TaskTracker::new();
        let batch_max = config.commit_batch_max;
        let steps = writer::steps(&background, &store, &metrics, batch_max);
        let submits = writer::submits(&background, &store, batch_max);
        let pipelines =
            Pipelines::new(&background, Arc::clone(&store), Arc::clone(&evaluations), memory.compiled_max_bytes);
        let replica = replica::new_replica_id(clock.now(), rng.random());
        let clock = Arc::new(DatabaseClock::new(clock, config.clock_skew_max.0, metrics.clone()));
        let shared = Arc::new(Shared::new(
            config,
            store,
            llm,
            metrics,
            clock,
            rng,
            steps,
            submits,
            pipelines,
            evaluations,
            replica,
            hints,
            memory,
        ));
        let entered = Instant::now();
        let pulse = shared.store.heartbeat(&replica::heartbeat(&shared, false)).await?;
        shared.learn_common(pulse.common);
        if let Some(now) = pulse.now {
            shared.database_clock.learn(now, entered);
        }
        let stop = CancellationToken::new();
        let beat = replica::beat(Arc::clone(&shared), entered, stop.clone());
        match vital {
            Some(vital) => {
                background.spawn(replica::show_progress(Arc::clone(&shared), stop.clone()));
                background.spawn_on(beat, vital);
            }
            None => drop(background.spawn(beat)),
        }
        background.spawn(replica::claim(Arc::clone(&shared)));
        background.spawn(follow::poll(Arc::clone(&shared.hub), Arc::downgrade(&shared)));
        background.spawn(whisper::hear(Arc::clone(&shared), stop.clone()));
        background.spawn(retention::walk(Arc::clone(&shared)));
        Ok(Self { shared, stop, background })
    }

    /// Whether the threads that execute runs have done nothing for a minute. Only one whose heartbeat has a runtime of its
    /// own can tell.
    pub fn is_stuck(&self) -> bool {
        self.shared.is_stuck()
    }

    /// Registers a definition (YAML or JSON text). The flag tells whether the version is new.
    pub async fn register(
        &self,
        tenant: &TenantId,
        source: impl Into<Bundle>,
    ) -> Result<(PipelineVersion, bool), Error> {
        let new = self.new_version(tenant, source).await?;
        self.keep_version(&new).await
    }

    /// The same, so that the definition is the newest version afterwards: where it is an older one, it comes back under a number
    /// of its own. The flag tells whether the version is new.
    pub async fn register_as_newest(
        &self,
        tenant: &TenantId,
        source: impl Into<Bundle>,
    ) -> Result<(PipelineVersion, bool), Error> {
        let mut new = self.new_version(tenant, source).await?;
        let content = new.digest;
        for _ in 0..REVERTS_MAX {
            let (version, is_new) = self.keep_version(&new).await?;
            if is_new {
                return Ok((version, true));
            }
            match self.shared.store.pipeline(tenant, &new.name, None).await? {
                Some(newest) if newest.version == version.version => return Ok((version, false)),
                Some(newest) if newest.definition == new.definition => return Ok((newest, false)),
                Some(newest) => new.digest = pipelines::reverted_digest(content, newest.version),
                None => {}
            }
        }
        Err(Error::new(Code::Unavailable, format!("`{}` gets other versions all the time; try again", new.name)))
    }

    /// What a definition is registered as, where every live replica can read it.
    async fn new_version(&self, tenant: &TenantId, source: impl Into<Bundle>) -> Result<NewVersion, Error> {
        let pipeline = self.validate(tenant, source).await?;
        if let Some(what) = pipelines::unreadable(&pipeline, |capability| self.shared.common(capability)) {
            let what = if what.contains('`') { what } else { format!("`{what}`") };
            let detail = format!(
                "the pipeline uses {what}, which a replica of an older version that is running cannot read: register it \
                 again when every replica is of this version"
            );
            return Err(Error::new(Code::Unavailable, detail));
        }
        Ok(NewVersion {
            tenant: tenant.clone(),
            name: pipeline.name,
            digest: pipeline.digest,
            definition: pipeline.definition,
            now: self.shared.clock.now(),
            quota: self.shared.config.limits_of(tenant).pipeline_quota(),
        })
    }

    async fn keep_version(&self, new: &NewVersion) -> Result<(PipelineVersion, bool), Error> {
        match self.shared.store.register(new).await? {
            Registered::New(version) => Ok((version, true)),
            Registered::Known(version) => Ok((version, false)),
            Registered::Full { pipelines, versions } => Err(pipelines::full(new.quota, pipelines, versions)),
        }
    }

    /// The pipeline that a definition stands for; else every mistake of it, models included, as the violations of an
    /// [`Code::InvalidDefinition`].
    pub async fn validate(&self, tenant: &TenantId, source: impl Into<Bundle>) -> Result<Pipeline, Error> {
        let (bundle, llm) = (source.into(), Arc::clone(&self.shared.llm));
        let read = move || {
            let pipeline = Pipeline::parse_bundle(&bundle, &*llm)?;
            let unanswerable = llm.unanswerable(&pipeline);
            if unanswerable.is_empty() { Ok(pipeline) } else { Err(unanswerable) }
        };
        let read = self.shared.evaluations.evaluate_large(tenant, 0, read).await?;
        read.map_err(|violations| Error::violations(Code::InvalidDefinition, violations))
    }

    /// Accepts a run. The flag tells whether it is new, or the one that the idempotency key stands for.
    pub async fn submit(&self, submit: Submit) -> Result<(RunRecord, bool), Error> {
        self.submit_in_turn(submit, async {}).await
    }

    /// The same. Where the answer is in the store, `turn` is awaited before that is asked, and what it brings is held until
    /// it has answered.
    pub async fn submit_in_turn<T>(
        &self,
        submit: Submit,
        turn: impl Future<Output = T>,
    ) -> Result<(RunRecord, bool), Error> {
        let (tenant, key) = (submit.tenant.clone(), submit.idempotency.clone());
        let answer = self.accept(submit).await;
        submit::or_replay(&self.shared, &tenant, key, answer, turn).await
    }

    async fn accept(&self, submit: Submit) -> Result<submit::Answer, Error> {
        let judged = submit::judge(&self.shared, submit).await?;
        // In a task of its own: a caller who hangs up must not leave the insert without a driver.
        let shared = Arc::clone(&self.shared);
        let submitted = tokio::spawn(async move { submit::submit(&shared, judged).await });
        submitted.await.map_err(|_| Error::new(Code::Internal, "the submit did not end as it should"))?
    }

    /// What a run would cost. Calls no model and changes nothing.
    pub async fn plan(
        &self,
        tenant: &TenantId,
        pipeline: Arc<Pipeline>,
        version: u32,
        input: Json,
    ) -> Result<Plan, Error> {
        plan::plan(&self.shared, tenant, pipeline, version, input).await
    }

    /// Refuses a decision about another attempt than the stage's last one. The run's owner holds to it as well.
    async fn check_attempt(&self, tenant: &TenantId, run: RunId, stage: &StageId, attempt: u32) -> Result<(), Error> {
        let detail = self.shared.store.stage(tenant, run, stage).await?;
        match detail.map(|detail| detail.stage.attempt) {
            Some(last) if last != attempt => Err(edited::other_attempt(attempt, last)),
            _ => Ok(()),
        }
    }

    /// A registered version, compiled. None for the newest.
    pub async fn pipeline(
        &self,
        tenant: &TenantId,
        name: &PipelineName,
        version: Option<u32>,
    ) -> Result<(Arc<Pipeline>, u32), Error> {
        known_pipeline(&self.shared, tenant, name, version).await
    }

    /// Asks something of a run, of whichever attempt is held. See [`Engine::act_on`].
    pub async fn act(
        &self,
        tenant: &TenantId,
        run: RunId,
        action: Action,
        by: Option<String>,
    ) -> Result<RunRecord, Error> {
        self.act_on(tenant, run, action, None, by).await
    }

    /// Asks something of a run; a decision may name the attempt that it means, and is refused where another one is held. It is
    /// durable when this returns; the owner obeys within a heartbeat.
    pub async fn act_on(
        &self,
        tenant: &TenantId,
        run: RunId,
        action: Action,
        attempt: Option<u32>,
        by: Option<String>,
    ) -> Result<RunRecord, Error> {
        let not_found = || Error::new(Code::RunNotFound, format!("there is no run {run}"));
        let record = self.shared.store.run_record(tenant, run).await?.ok_or_else(not_found)?;
        let asked = describe(&action);
        let kind = self.signal_of(tenant, &record, action, attempt).await?;
        let signal = NewSignal { tenant: tenant.clone(), run, kind, by };
        match self.shared.store.signal(&signal).await? {
            Signalled::Accepted { owner } => {
                if owner.is_none() || (owner == Some(self.replica()) && !self.shared.notify(run)) {
                    self.shared.work.notify_one();
                    self.shared.whisper.work();
                } else if owner != Some(self.replica()) {
                    self.shared.whisper.signal(run);
                }
            }
            Signalled::NoSuchRun => return Err(not_found()),
            Signalled::WrongRunState(state) => {
                let message = format!("the run is {}: it cannot be {asked}", state.as_str());
                return Err(Error::new(Code::WrongState, message));
            }
            Signalled::Purged => {
                let message = "its input and outputs were removed by retention: submit it anew";
                return Err(Error::new(Code::Purged, message));
            }
            Signalled::StageNotHeld(state) => {
                let is = state.map_or("not started", StageState::as_str);
                let message = format!("the stage is {is}: only a held output can be {asked}, and only once");
                return Err(Error::new(Code::WrongState, message));
            }
        }
        self.shared.store.run_record(tenant, run).await?.ok_or_else(not_found)
    }

    /// The signal that an action leaves, where it may be asked of the run.
    async fn signal_of(
        &self,
        tenant: &TenantId,
        record: &RunRecord,
        action: Action,
        attempt: Option<u32>,
    ) -> Result<SignalKind, Error> {
        let asked = describe(&action);
        if action == Action::Cancel {
            return Ok(SignalKind::Cancel); // Its pipeline may be unreadable.
        }
        let (pipeline, _) = self.pipeline(tenant, &record.pipeline, Some(record.version)).await?;
        let index = |stage: &StageId| {
            let message = format!("the pipeline `{}` has no stage `{stage}`", record.pipeline);
            pipeline.stage_index(stage.as_str()).ok_or_else(|| Error::new(Code::StageNotFound, message))
        };
        let mut kind = match action {
            Action::Cancel => return Ok(SignalKind::Cancel),
            Action::Retry => {
                if let Some(why) = why_in_vain(record, &pipeline) {
                    let message = format!("a retry would fail in the same way: {why}");
                    return Err(Error::new(Code::WrongState, message));
                }
                let span =
                    chrono::TimeDelta::from_std(pipeline.deadline).unwrap_or_else(|_| chrono::TimeDelta::days(1));
                SignalKind::Retry { deadline_at: self.shared.clock.now() + span }
            }
            Action::Approve(stage) => SignalKind::approve(stage, attempt),
            Action::ApproveWith(approval) => {
                let Approval { stage, comment, output } = *approval;
                SignalKind::Approve { stage, attempt, comment, output }
            }
            Action::Reject(stage, reason) => SignalKind::Reject { stage, reason, attempt },
        };
        if let Some(stage) = kind.stage() {
            index(stage)?;
        }
        if kind.needs().is_some_and(|capability| !self.common(capability)) {
            let message = format!("the run cannot be {asked} in this way while a replica of an older release runs");
            return Err(Error::new(Code::OlderReplica, message));
        }
        match &mut kind {
            SignalKind::Approve { stage, attempt, output: Some(output), .. } => {
                let (run, stage) = (record.id, index(stage)?);
                let edited = Edited { tenant, run, pipeline: &pipeline, stage, attempt: *attempt };
                *attempt = Some(edited.check(&self.shared, output).await?);
            }
            SignalKind::Approve { stage, attempt: Some(attempt), .. }
            | SignalKind::Reject { stage, attempt: Some(attempt), .. } => {
                self.check_attempt(tenant, record.id, stage, *attempt).await?;
            }
            _ => {}
        }
        Ok(kind)
    }

    /// Removes a run that has ended, whole: input, outputs, stages, events. The ledger keeps what was paid.
    pub async fn delete(&self, tenant: &TenantId, run: RunId) -> Result<(), Error> {
        let not_found = || Error::new(Code::RunNotFound, format!("there is no run {run}"));
        let record = self.shared.store.run_record(tenant, run).await?.ok_or_else(not_found)?;
        if record.state.is_terminal() && !self.shared.store.delete(&[run]).await?.is_empty() {
            return Ok(());
        }
        // It lives, or has just been retried, or somebody else was faster.
        let record = self.shared.store.run_record(tenant, run).await?.ok_or_else(not_found)?;
        let message = format!("the run is {}: cancel it first, then delete it", record.state.as_str());
        Err(Error::new(Code::WrongState, message))
    }

    /// The events of a run after a seq, as they come, in order and gap-free; ends after `run.finished`. Ends at once
    /// where the run does not exist, or has ended and all its events were seen.
    pub fn follow(&self, tenant: TenantId, run: RunId, after: u64) -> BoxStream<'static, Result<Vec<Event>, Error>> {
        self.watch(tenant, run, after).map_ok(|batch| batch.events().to_vec()).boxed()
    }

    /// The same, in batches that everybody who watches the run shares.
    pub fn watch(
        &self,
        tenant: TenantId,
        run: RunId,
        after: u64,
    ) -> BoxStream<'static, Result<Arc<EventBatch>, Error>> {
        follow::watch(Arc::clone(&self.shared.store), &self.shared.hub, tenant, run, after)
    }

    /// Whether every live replica understands it, as the last heartbeat told. Only then it may be asked of a run.
    pub fn common(&self, capability: Capability) -> bool {
        self.shared.common(capability)
    }

    /// What a tenant may have.
    pub fn limits_of(&self, tenant: &TenantId) -> config::TenantLimits {
        self.shared.config.limits_of(tenant)
    }

    /// The store, for reads.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.shared.store
    }

    /// The model layer, for cache operations and health.
    pub fn llm(&self) -> &Arc<Llm> {
        &self.shared.llm
    }

    /// The clock that everything here runs by.
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.shared.clock
    }

    /// Whether this machine's clock is further from the database's than it may be: this replica takes no work.
    pub fn is_skewed(&self) -> bool {
        self.shared.database_clock.is_skewed()
    }

    /// The budgets of memory, and what is held of them.
    pub fn memory(&self) -> &Memory {
        &self.shared.memory
    }

    /// This life of this replica.
    pub fn replica(&self) -> ReplicaId {
        self.shared.replica()
    }

    /// True once it is shutting down: `/readyz` says so, submits are refused.
    pub fn is_draining(&self) -> bool {
        self.shared.drain.is_cancelled()
    }

    /// Readiness goes false, so that balancers send nothing more; everything is still served and executed.
    pub fn announce_leave(&self) {
        self.shared.leaving.store(true, std::sync::atomic::Ordering::Relaxed);
    }

    /// True once it is to get no more traffic: it is about to drain, or drains.
    pub fn is_leaving(&self) -> bool {
        self.shared.leaving.load(std::sync::atomic::Ordering::Relaxed) || self.is_draining()
    }

    /// Stops taking anything new: readiness goes false. What is under way goes on.
    pub fn begin_drain(&self) {
        self.shared.begin_drain();
    }

    /// Takes nothing new, gives the attempts under way `grace` to end and be checkpointed, hands the rest back, and
    /// leaves. Idempotent.
    pub async fn drain(&self, grace: Duration) {
        self.begin_drain();
        self.shared.drivers.close();
        if tokio::time::timeout(grace, self.shared.drivers.wait()).await.is_err() {
            self.shared.give_back();
            let given_back = tokio::time::timeout(FAREWELL, self.shared.drivers.wait()).await;
            tracing::warn!("the grace period is over; the attempts under way are abandoned");
            if given_back.is_err() {
                // The store does not answer: whoever takes these runs books what they may have bought.
                let stopped = self.shared.end_life();
                tracing::warn!(stopped, "runs could not be given back");
            }
            let _ = tokio::time::timeout(FAREWELL, self.shared.drivers.wait()).await;
        }
        self.stop.cancel();
        match tokio::time::timeout(FAREWELL, self.shared.store.leave(self.replica())).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(%error, "this replica could not leave; its runs are taken over when its lease ends");
            }
            Err(_) => tracing::warn!("no answer to the farewell; the runs are taken over when the lease ends"),
        }
        self.background.close();
    }
}

/// Why a run that failed would fail again, whatever is tried: its version and its input are fixed.
fn why_in_vain(record: &RunRecord, pipeline: &Pipeline) -> Option<String> {
    if record.state != RunState::Failed {
        return None;
    }
    let failure = record.failure.as_ref()?;
    // A judge whose own texts cannot be made fails no output any more.
    let is_of_judge = ["the rubric of ", "the judge's "].iter().any(|what| failure.message.starts_with(what));
    let is_rendering = failure.code == Code::TemplateFailed && failure.message.contains(NOT_RENDERED) && !is_of_judge;
    if is_rendering {
        let message = &failure.message;
        return Some(format!("{message}; register a version that is mended, or submit another input"));
    }
    let budget = pipeline.budget.as_ref().map(|budget| budget.max_cost_usd)?;
    (failure.code == Code::BudgetExhausted && record.totals.cost_usd >= budget)
        .then(|| format!("its budget of {} USD is spent; submit it anew, with a larger one", budget.dollars()))
}

fn describe(action: &Action) -> &'static str {
    match action {
        Action::Cancel => "cancelled",
        Action::Retry => "retried",
        Action::Approve(_) | Action::ApproveWith(_) => "approved",
        Action::Reject(..) => "rejected",
    }
}

/// A registered version, or the error that says which part is not there.
async fn known_pipeline(
    shared: &Shared,
    tenant: &TenantId,
    name: &PipelineName,
    version: Option<u32>,
) -> Result<(Arc<Pipeline>, u32), Error> {
    match (shared.pipeline(tenant, name, version).await?, version) {
        (Some(found), _) => Ok(found),
        (None, Some(version)) if shared.store.pipeline(tenant, name, None).await?.is_some() => {
            Err(Error::new(Code::VersionNotFound, format!("pipeline `{name}` has no version {version}")))
        }
        (None, _) => Err(Error::new(
            Code::PipelineNotFound,
            format!("there is no pipeline `{name}`: register it with POST /v1/pipelines"),
        )),
    }
}
