//! Probes: alive, ready, healthy, and the metrics. Owns how dependencies are asked without hurting them or hanging on
//! them. Tells nothing of tenants, and nothing of a dependency but its state: the reason goes to the log.

use std::{future::Future, sync::Arc, time::Duration};

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use http::{HeaderValue, StatusCode, header::CONTENT_TYPE};
use serde::Serialize;
use stagegate_core::{Code, ReplicaId, StoreError};
use stagegate_engine::memory::Budget;
use stagegate_llm::{
    LlmHealth, ProviderHealth,
    config::{DialectConfig, JsonForm, LimitKey, Sampling, SystemRole},
};
use tokio::{
    sync::Mutex,
    time::{Instant, timeout},
};
use utoipa::ToSchema;

use crate::{problem::Problem, state::Shared};

/// How long an answer about the dependencies stands: however many probe, they are asked once in that time.
const READINESS_TTL: Duration = Duration::from_secs(1);
/// How long a dependency may take to answer a probe; below the second that a kubelet gives by default.
const PROBE_TIMEOUT: Duration = Duration::from_millis(800);
/// How old the queue's gauges may be.
const QUEUE_TTL: Duration = Duration::from_secs(5);

/// So many models' dialects are told of each provider.
const DIALECTS_MAX: usize = 64;

/// What the probes remember.
#[derive(Default)]
pub(crate) struct Probes {
    /// One look at a time; the others wait for its answer.
    readiness: Mutex<Option<(Instant, Arc<Readiness>)>>,
    queue: Mutex<Option<Instant>>,
}

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Condition {
    /// As it should be.
    Ok,
    /// Slower or dearer, but working.
    Degraded,
    /// Not working.
    Down,
}

/// A dependency.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct Dependency {
    /// `store`, `schema`, `shared_cache` or `providers`.
    name: &'static str,
    /// What it is: `postgres`, `sqlite`, `redis` …
    kind: String,
    /// How it is.
    state: Condition,
    /// How long it took to answer; null where it was not asked or did not answer.
    latency_ms: Option<u64>,
    /// What is wrong, for people.
    message: Option<String>,
}

/// Whether this replica should get requests.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct Readiness {
    /// Whether it should.
    ready: bool,
    /// The worst of what matters.
    state: Condition,
    /// It is shutting down.
    draining: bool,
    /// Each dependency.
    dependencies: Vec<Dependency>,
}

/// Alive?
///
/// Touches no dependency: a replica whose database is away must not be killed for it. Busy is alive; one whose threads have
/// done nothing for a minute is not.
#[utoipa::path(
    get, path = "/healthz", tag = "probes", operation_id = "getHealthz",
    responses(
        (status = 200, description = "Alive.", body = String, content_type = "text/plain"),
        (status = 503, description = "Stuck: restart it.", body = String, content_type = "text/plain"),
    )
)]
pub(crate) async fn healthz(State(shared): State<Shared>) -> (StatusCode, &'static str) {
    if shared.engine.is_stuck() { (StatusCode::SERVICE_UNAVAILABLE, "stuck\n") } else { (StatusCode::OK, "ok\n") }
}

/// Ready?
///
/// Each dependency with its state and latency. Ready while the store answers and the replica is not shutting down;
/// degraded is still ready. The answer stands for a second.
#[utoipa::path(
    get, path = "/readyz", tag = "probes", operation_id = "getReadyz",
    responses(
        (status = 200, description = "Ready, perhaps degraded.", body = Readiness),
        (status = 503, description = "Not ready.", body = Readiness),
    )
)]
pub(crate) async fn readyz(State(shared): State<Shared>) -> Response {
    let readiness = readiness(&shared).await;
    let status = if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let mut response = (status, Json(&*readiness)).into_response();
    if !readiness.ready {
        response.headers_mut().insert(http::header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

async fn readiness(shared: &Shared) -> Arc<Readiness> {
    let mut last = shared.probes.readiness.lock().await;
    if let Some((at, readiness)) = &*last
        && at.elapsed() < READINESS_TTL
        && readiness.draining == shared.engine.is_leaving()
    {
        return Arc::clone(readiness);
    }
    let readiness = Arc::new(look(shared).await);
    *last = Some((Instant::now(), Arc::clone(&readiness)));
    readiness
}

async fn look(shared: &Shared) -> Readiness {
    let store = shared.engine.store();
    let (ping, health) = tokio::join!(timed(store.ping()), timed(shared.engine.llm().health()));
    let mut dependencies = of_store(store.kind(), ping);
    if shared.engine.is_skewed() {
        let message =
            "this machine's clock differs too much from the database's (engine.clock_skew_max): set the clock";
        dependencies.push(dependency("clock", store.kind(), Condition::Down, None, Some(message)));
    }
    match health {
        Some((health, _)) => dependencies.extend(of_llm(&health)),
        None => dependencies.push(dependency(
            "shared_cache",
            "unknown",
            Condition::Degraded,
            None,
            Some("no answer in time"),
        )),
    }
    let draining = shared.engine.is_leaving();
    let state = dependencies.iter().map(|dependency| dependency.state).max().unwrap_or(Condition::Ok);
    let state = if draining { Condition::Down } else { state };
    Readiness { ready: state != Condition::Down, state, draining, dependencies }
}

/// The answer and how long it took; None when it did not come in time.
async fn timed<T>(future: impl Future<Output = T>) -> Option<(T, Duration)> {
    let started = Instant::now();
    timeout(PROBE_TIMEOUT, future).await.ok().map(|answer| (answer, started.elapsed()))
}

fn dependency(
    name: &'static str,
    kind: &str,
    state: Condition,
    latency: Option<Duration>,
    message: Option<&str>,
) -> Dependency {
    let latency_ms = latency.map(|latency| u64::try_from(latency.as_millis()).unwrap_or(u64::MAX));
    Dependency { name, kind: kind.to_owned(), state, latency_ms, message: message.map(str::to_owned) }
}

fn of_store(kind: &str, ping: Option<(Result<(), StoreError>, Duration)>) -> Vec<Dependency> {
    let store = |state, latency, message| dependency("store", kind, state, latency, message);
    let schema = |state, message| dependency("schema", kind, state, None, message);
    match ping {
        Some((Ok(()), latency)) => vec![store(Condition::Ok, Some(latency), None), schema(Condition::Ok, None)],
        Some((Err(error @ (StoreError::SchemaBehind { .. } | StoreError::SchemaAhead(_))), latency)) => {
            tracing::warn!(%error, "the database's schema does not fit");
            let message = "the schema does not fit this binary: see `stagegate migrate`";
            vec![store(Condition::Ok, Some(latency), None), schema(Condition::Down, Some(message))]
        }
        Some((Err(error @ StoreError::Full(_)), latency)) => {
            tracing::warn!(%error, "the store's disk is full");
            let message = "its disk is full: the replica accepts nothing until there is room";
            vec![store(Condition::Down, Some(latency), Some(message))]
        }
        Some((Err(error), latency)) => {
            tracing::warn!(%error, "the store does not answer a probe");
            vec![store(Condition::Down, Some(latency), Some("it does not answer; the log says why"))]
        }
        None => {
            tracing::warn!(timeout_ms = PROBE_TIMEOUT.as_millis(), "the store did not answer a probe in time");
            vec![store(Condition::Down, None, Some("no answer in time"))]
        }
    }
}

fn of_llm(health: &LlmHealth) -> Vec<Dependency> {
    let mut dependencies = Vec::new();
    match &health.shared_cache {
        Some((kind, Ok(latency))) => {
            dependencies.push(dependency("shared_cache", kind, Condition::Ok, Some(*latency), None));
        }
        Some((kind, Err(error))) => {
            tracing::warn!(error, "the shared cache does not answer a probe");
            let message = Some("it does not answer; runs go on without it");
            dependencies.push(dependency("shared_cache", kind, Condition::Degraded, None, message));
        }
        None => {}
    }
    let configured: Vec<&ProviderHealth> = health.providers.iter().filter(|provider| provider.configured).collect();
    let kind = configured.iter().map(|provider| provider.name.as_str()).collect::<Vec<_>>().join(", ");
    let message = if configured.is_empty() {
        Some("no provider is configured")
    } else if configured.iter().any(|provider| provider.quota_exhausted) {
        Some("a provider's quota is exhausted")
    } else if configured.iter().any(|provider| !provider.open_breakers.is_empty()) {
        Some("a provider is failing and is being spared")
    } else {
        None
    };
    let state = if message.is_some() { Condition::Degraded } else { Condition::Ok };
    dependencies.push(dependency("providers", &kind, state, None, message));
    dependencies
}

/// A provider, as it was last seen.
#[derive(Debug, Serialize, ToSchema)]
struct Provider {
    /// Its name in the configuration.
    name: String,
    /// `openai`, `anthropic`, `gemini` or `sim`.
    kind: &'static str,
    /// Whether it has a key, or needs none.
    configured: bool,
    /// Models that are failing and being spared.
    open_breakers: Vec<String>,
    /// Requests that the provider last said are left; null where it did not say.
    requests_remaining: Option<u64>,
    /// Tokens that the provider last said are left; null where it did not say.
    tokens_remaining: Option<u64>,
    /// The provider says that the account has no quota left.
    quota_exhausted: bool,
    /// What was found out about the dialects of its models; the first ones where there are many.
    dialects: Vec<Dialect>,
}

/// How a model wants to be asked. Each key is one of `llm.providers.<name>.dialect`; what is `auto` is as usual.
#[derive(Debug, Serialize, ToSchema)]
struct Dialect {
    /// The model.
    model: String,
    /// `auto`, `max_tokens` or `max_completion_tokens`.
    #[schema(value_type = String)]
    limit: LimitKey,
    /// `auto`, `schema`, `object` or `words`.
    #[schema(value_type = String)]
    json: JsonForm,
    /// `auto`, `system`, `developer` or `user`.
    #[schema(value_type = String)]
    system: SystemRole,
    /// Its server demands the word "json" in the messages.
    say_json: bool,
    /// Parameters that it does not take, by their names in `params`: `temperature`, `stop` …
    #[schema(value_type = Vec<String>)]
    leave_out: Vec<Sampling>,
}

impl From<(String, DialectConfig)> for Dialect {
    fn from((model, dialect): (String, DialectConfig)) -> Self {
        let DialectConfig { limit, json, system, say_json, leave_out } = dialect;
        Self { model, limit, json, system, say_json, leave_out }
    }
}

impl From<ProviderHealth> for Provider {
    fn from(health: ProviderHealth) -> Self {
        let (requests_remaining, tokens_remaining) = health.remaining.unwrap_or_default();
        Self {
            name: health.name,
            kind: health.kind,
            configured: health.configured,
            open_breakers: health.open_breakers,
            requests_remaining,
            tokens_remaining,
            quota_exhausted: health.quota_exhausted,
            dialects: health.dialects.into_iter().take(DIALECTS_MAX).map(Into::into).collect(),
        }
    }
}

/// Everything about this replica, for people.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Health {
    /// Its version.
    version: &'static str,
    /// This life of this replica.
    replica: ReplicaId,
    /// Seconds since it began to listen.
    uptime_s: u64,
    /// The worst of what matters.
    state: Condition,
    /// It is shutting down.
    draining: bool,
    /// Each dependency.
    dependencies: Vec<Dependency>,
    /// Each provider.
    providers: Vec<Provider>,
    /// Memory that grows with what callers send.
    memory: MemoryHealth,
}

/// Memory that grows with what callers send, in bytes. What does not fit waits.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct MemoryHealth {
    /// All budgets together: `engine.memory_max_bytes`.
    max_bytes: u64,
    /// Bodies that are being parsed.
    bodies: BudgetHealth,
    /// Runs that are under way.
    runs: BudgetHealth,
    /// Values that are parsed for a check.
    values: BudgetHealth,
}

/// A budget, in bytes.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct BudgetHealth {
    /// What may be held at once. A single thing that is larger goes through alone.
    max_bytes: u64,
    /// What is held.
    held_bytes: u64,
}

impl From<&Budget> for BudgetHealth {
    fn from(budget: &Budget) -> Self {
        Self { max_bytes: budget.max_bytes(), held_bytes: budget.held() }
    }
}

/// How is it?
///
/// Version, state, dependencies and the providers' limits, for people. Always 200: use `/readyz` to decide.
#[utoipa::path(
    get, path = "/health", tag = "probes", operation_id = "getHealth",
    responses((status = 200, description = "How it is.", body = Health))
)]
pub(crate) async fn health(State(shared): State<Shared>) -> Json<Health> {
    let readiness = readiness(&shared).await;
    let providers = timed(shared.engine.llm().health()).await.map(|(health, _)| health.providers).unwrap_or_default();
    let memory = shared.engine.memory();
    Json(Health {
        version: env!("CARGO_PKG_VERSION"),
        replica: shared.engine.replica(),
        uptime_s: shared.started.elapsed().as_secs(),
        state: readiness.state,
        draining: readiness.draining,
        dependencies: readiness.dependencies.clone(),
        providers: providers.into_iter().map(Into::into).collect(),
        memory: MemoryHealth {
            max_bytes: memory.max_bytes,
            bodies: (&memory.bodies).into(),
            runs: (&memory.runs).into(),
            values: (&memory.values).into(),
        },
    })
}

/// Metrics
///
/// In the Prometheus text format.
#[utoipa::path(
    get, path = "/metrics", tag = "probes", operation_id = "getMetrics",
    responses((status = 200, description = "The metrics.", body = String, content_type = "text/plain"))
)]
pub(crate) async fn metrics(State(shared): State<Shared>) -> Result<Response, Problem> {
    refresh_queue(&shared).await;
    let text = shared.metrics.render().map_err(|error| Problem::new(Code::Internal, error.to_string()))?;
    Ok(([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}

/// Brings the queue's gauges up to date, unless somebody did so lately or is doing so. A store that is away leaves them.
async fn refresh_queue(shared: &Shared) {
    let Ok(mut last) = shared.probes.queue.try_lock() else { return };
    if last.is_some_and(|at| at.elapsed() < QUEUE_TTL) {
        return;
    }
    if let Some((Ok(queue), _)) = timed(shared.engine.store().queue()).await {
        for (state, runs) in [("queued", queue.queued), ("running", queue.running), ("waiting", queue.waiting)] {
            let runs = i64::try_from(runs).unwrap_or(i64::MAX);
            shared.metrics.queue_runs.with_label_values(&[state]).set(runs);
        }
        shared.metrics.queue_oldest.set(Duration::from_millis(queue.oldest_queued_ms).as_secs_f64());
    }
    *last = Some(Instant::now());
}
