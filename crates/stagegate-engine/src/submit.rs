//! Submitting: owns the way from a request to an accepted run.

use std::{sync::Arc, time::Duration};

use chrono::{DateTime, Utc};
use serde_json::{Map, Value};
use stagegate_core::{
    Code, Error, Json, Pipeline, RunId, RunState, TenantId, Totals, Violation,
    decide::Accept,
    evaluation,
    fair::Limits,
    pipeline::SPAN_MAX,
    store::{Idempotency, NewRun, RunRecord, Submitted},
};

use crate::{
    Submit, admission, memory,
    shared::{Life, Place, Shared, weight_of_run},
};

/// Labels of a run at most, and the longest of a key or value in characters.
const LABELS_MAX: usize = 32;
const LABEL_MAX_CHARS: usize = 128;

/// How long an input waits for room on its way to the database.
const ROOM_PATIENCE: Duration = Duration::from_secs(5);

/// What became of a submit that was not refused.
#[derive(Debug)]
pub(crate) enum Answer {
    /// A new run.
    New(Box<RunRecord>),
    /// The run that its idempotency key stands for.
    Existing(RunId),
}

/// What is answered to a submit. A repeated request is its run, whatever would be said of it today: a stricter version may
/// be there since, the queue may be full, this replica may drain. The insert finds that by itself; where none is made, the
/// key is looked up. What is read beside the insert waits for its turn.
pub(crate) async fn or_replay<T>(
    shared: &Shared,
    tenant: &TenantId,
    key: Option<Idempotency>,
    answer: Result<Answer, Error>,
    turn: impl Future<Output = T>,
) -> Result<(RunRecord, bool), Error> {
    match (answer, key) {
        (Ok(Answer::New(record)), _) => Ok((*record, true)),
        (Ok(Answer::Existing(run)), _) => {
            let _turn = turn.await;
            existing(shared, tenant, run).await
        }
        (Err(refusal), Some(asked)) if is_judgement(refusal.code) => {
            let _turn = turn.await;
            match shared.store.replay(tenant, &asked, shared.clock.now()).await {
                Ok(Some(Submitted::Existing(run))) => existing(shared, tenant, run).await,
                Ok(Some(Submitted::Conflict(run))) => Err(conflict(run)),
                Ok(_) => Err(refusal),
                Err(error) => {
                    tracing::warn!(%error, "whether a refused submit is a repetition could not be looked up");
                    Err(refusal)
                }
            }
        }
        (Err(refusal), _) => Err(refusal),
    }
}

/// Whether a submit was refused for what it is or when it came, and nothing was inserted.
fn is_judgement(code: Code) -> bool {
    !matches!(
        code,
        Code::Unavailable | Code::DatabaseUnreachable | Code::IdempotencyConflict | Code::Internal | Code::CorruptRow
    )
}

async fn existing(shared: &Shared, tenant: &TenantId, run: RunId) -> Result<(RunRecord, bool), Error> {
    let existing = shared.store.run_record(tenant, run).await?;
    existing.map(|record| (record, false)).ok_or_else(|| Error::new(Code::RunNotFound, format!("run {run}")))
}

fn conflict(run: RunId) -> Error {
    Error::new(
        Code::IdempotencyConflict,
        format!("this Idempotency-Key was used with a different request, for run {run}: use a new key"),
    )
}

/// A submit whose pipeline is known and whose input fits it.
#[derive(Debug)]
pub(crate) struct Judged {
    submit: Submit,
    pipeline: Arc<Pipeline>,
    version: u32,
    limits: Limits,
}

/// Finds the pipeline and judges the input. Changes nothing, so that a caller who hangs up costs no more.
pub(crate) async fn judge(shared: &Arc<Shared>, submit: Submit) -> Result<Judged, Error> {
    if shared.drain.is_cancelled() {
        return Err(Error::new(Code::Draining, "this replica is shutting down; send the request again")
            .retry_after(std::time::Duration::from_secs(1)));
    }
    if shared.database_clock.is_skewed() {
        let message =
            "this replica's clock differs too much from the database's (engine.clock_skew_max); ask another replica";
        return Err(Error::new(Code::Unavailable, message).retry_after(std::time::Duration::from_secs(1)));
    }
    let (pipeline, version) = crate::known_pipeline(shared, &submit.tenant, &submit.pipeline, submit.version).await?;
    check_labels(&submit.labels)?;
    let (limits, filled) = judge_input(shared, &submit.tenant, &pipeline, &submit.input).await?;
    let submit = match filled {
        Some(input) => Submit { input, ..submit },
        None => submit,
    };
    Ok(Judged { submit, pipeline, version, limits })
}

/// See [`crate::Engine::submit`].
pub(crate) async fn submit(shared: &Arc<Shared>, judged: Judged) -> Result<Answer, Error> {
    let Judged { submit, pipeline, version, limits } = judged;
    let Submit { tenant, input, cache_mode, priority, labels, idempotency, start_at, request_id, .. } = submit;
    let _on_its_way = on_its_way(shared, &tenant, input.text_bytes()).await?;
    let now = shared.clock.now();
    let start_at = start_at.filter(|at| *at > now);
    check_start(start_at, now)?;
    let may_lease = shared.may_lease(&tenant, &limits, start_at);
    let lease = may_lease.then(|| lease(shared, input.text_bytes())).flatten();
    if lease.is_none() {
        admission::admit(shared, &tenant)?;
    }
    let admitted = shared.admission.now();
    let accept = Accept {
        id: RunId::new(now, shared.random()),
        tenant: tenant.clone(),
        pipeline,
        version,
        input,
        cache_mode,
        priority,
        labels,
        idempotency,
        request_id: request_id.clone(),
        start_at,
        limits,
        lease_to: lease.as_ref().map(|(life, _)| life.replica),
        park_after: shared.config.park_after.0,
    };
    let (new, leased) = accept.begin(now);
    let record = record(&new);
    // Entered before the insert: what is owned and not in the table is taken for an insert whose answer was lost.
    let handle = lease.as_ref().and_then(|(life, _)| shared.enter(new.id, life));
    let submitted = shared.submits.offer(new).await;
    let epoch = match &submitted {
        Ok(Submitted::Accepted(epoch)) => *epoch,
        _ => None,
    };
    match (leased, handle, lease) {
        (Some((run, effects)), Some(handle), Some((_, place))) if epoch == Some(run.lease().epoch) => {
            shared.drive(handle, run, effects, place, request_id.as_deref());
        }
        (_, Some(handle), _) => shared.forget(record.id, &handle),
        _ => {}
    }
    match submitted {
        Ok(Submitted::Accepted(epoch)) => {
            shared.metrics.runs_accepted.inc();
            if epoch.is_none() {
                shared.admission.queued(&tenant, admitted);
                if start_at.is_none() {
                    shared.work.notify_one();
                    if shared.room.available_permits() == 0 {
                        shared.whisper.work();
                    }
                }
                let queued = RunRecord { state: RunState::Queued, started_at: None, last_seq: 1, ..record };
                return Ok(Answer::New(Box::new(queued)));
            }
            Ok(Answer::New(Box::new(record)))
        }
        Ok(Submitted::Existing(id)) => Ok(Answer::Existing(id)),
        Ok(Submitted::Conflict(id)) => Err(conflict(id)),
        Err(error) => {
            shared.doubt(); // It may have happened.
            Err(error)
        }
    }
}

/// Whether an input fits the pipeline, and what bounds how many runs with it are under way at once; and the input with the
/// defaults of its schema, where it left some out. An input is parsed only where the pipeline looks into it.
async fn judge_input(
    shared: &Shared,
    tenant: &TenantId,
    pipeline: &Arc<Pipeline>,
    input: &Json,
) -> Result<(Limits, Option<Json>), Error> {
    let is_read = pipeline.reads_inputs() || !input.is_object();
    let value_bytes = if is_read { input.size().parsed_bytes } else { 0 };
    let (judged, input) = (Arc::clone(pipeline), input.clone());
    let fits = move || {
        let mut seen = if is_read { evaluation::parse(&input) } else { Value::Object(Map::new()) };
        let is_filled = judged.fill_defaults(&mut seen);
        let seen = Arc::new(seen);
        judged.check_input(&seen)?;
        let limits = judged.limits(&seen).map_err(|violation| vec![violation])?;
        Ok::<_, Vec<Violation>>((limits, is_filled.then(|| Json::from(Arc::unwrap_or_clone(seen)))))
    };
    let fitting = shared.evaluations.evaluate(tenant, || value_bytes, fits).await?;
    fitting.map_err(|violations| Error::violations(Code::InvalidInput, violations))
}

/// Room for an input that waits to be inserted. A database that is slow or away must not gather inputs without end.
async fn on_its_way(shared: &Shared, tenant: &TenantId, text_bytes: u64) -> Result<memory::Permit, Error> {
    tokio::select! {
        biased;
        permit = shared.memory.batches.acquire_for(tenant, text_bytes) => Ok(permit),
        () = tokio::time::sleep(ROOM_PATIENCE) => {
            let message = "the inputs of other runs wait for the database and fill their memory budget; submit again later";
            Err(Error::new(Code::QueueFull, message).retry_after(Duration::from_secs(1)))
        }
    }
}

/// A lease in this life and the room for it, where there is some.
fn lease(shared: &Shared, text_bytes: u64) -> Option<(Life, Place)> {
    let life = shared.life()?;
    let among_runs = Arc::clone(&shared.room).try_acquire_owned().ok()?;
    let in_memory = shared.memory.runs.try_acquire(weight_of_run(text_bytes))?;
    Some((life, Place { among_runs, in_memory, crashes: 0, stay: None }))
}

fn check_start(start_at: Option<DateTime<Utc>>, now: DateTime<Utc>) -> Result<(), Error> {
    match start_at {
        Some(at) if (at - now).to_std().is_ok_and(|ahead| ahead > SPAN_MAX) => {
            let days = SPAN_MAX.as_secs() / 86_400;
            Err(Error::new(
                Code::InvalidStart,
                format!("start_at: {} is more than {days} days ahead; submit it nearer to its time", at.to_rfc3339()),
            ))
        }
        _ => Ok(()),
    }
}

fn check_labels(labels: &stagegate_core::pipeline::Labels) -> Result<(), Error> {
    let too_long = |text: &str| text.chars().count() > LABEL_MAX_CHARS;
    if labels.len() > LABELS_MAX || labels.iter().any(|(key, value)| key.is_empty() || too_long(key) || too_long(value))
    {
        return Err(Error::new(
            Code::InvalidRequest,
            format!("labels: at most {LABELS_MAX}, with keys and values of at most {LABEL_MAX_CHARS} characters"),
        ));
    }
    Ok(())
}

/// A new run, as a read of it would answer.
fn record(new: &NewRun) -> RunRecord {
    let leased = new.lease_to.is_some();
    RunRecord {
        id: new.id,
        tenant: new.tenant.clone(),
        pipeline: new.pipeline.clone(),
        version: new.version,
        state: if leased { RunState::Running } else { RunState::Queued },
        cancel_requested: false,
        priority: new.priority,
        labels: new.labels.clone(),
        cache_mode: new.cache_mode,
        stages_total: new.stages_total,
        stages_done: 0,
        totals: Totals::default(),
        failure: None,
        request_id: new.request_id.clone(),
        created_at: new.created_at,
        start_at: new.start_at,
        started_at: leased.then_some(new.created_at),
        finished_at: None,
        deadline_at: new.deadline_at,
        purged_at: None,
        last_seq: new.events.len() as u64,
    }
}
