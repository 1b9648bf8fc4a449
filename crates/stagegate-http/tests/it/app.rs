//! The fixture: a daemon on SQLite and the simulator behind a real socket, and a client that holds every answer
//! against the published document.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use chrono::{DateTime, Utc};
use http::{HeaderMap, Method, StatusCode};
use rand::{SeedableRng as _, rngs::StdRng};
use serde_json::{Value, json};
use stagegate_core::{
    Clock as _, KeyId, Store, SystemClock, TenantId,
    pipeline::Span,
    store::{ApiKey, NewApiKey, Role},
};
use stagegate_engine::{Engine, config::EngineConfig};
use stagegate_http::{
    App,
    config::{AuthMode, HttpConfig},
};
use stagegate_llm::{
    Llm,
    config::{LlmConfig, ProviderConfig, ProviderKind, SimConfig},
};
use stagegate_net::{Client, NetConfig};
use stagegate_store_sqlite::SqliteStore;
use stagegate_telemetry::Metrics;
use tempfile::TempDir;
use tokio::{net::TcpListener, runtime::Handle, sync::oneshot, task::JoinHandle};

use crate::{conformance::Conformance, stalling::Stalling};

/// Two stages on the simulator.
pub(crate) const PIPELINE: &str = r"
name: two-steps
description: Two stages, for tests.
input:
  type: object
  required: [brief]
  properties: { brief: { type: string, minLength: 1 } }
defaults: { model: sim/quick }
stages:
  - id: first
    prompt: 'Say something about {{ input.brief }}'
  - id: second
    needs: [first]
    prompt: 'Go on from {{ stages.first.output }}'
";

/// One stage whose output is held for a person.
pub(crate) const HELD: &str = r"
name: held
defaults: { model: sim/quick }
stages:
  - id: draft
    prompt: 'Draft something'
    gate: { checks: [ { contains: 'a text that no answer has' } ], on_fail: hold }
  - id: last
    needs: [draft]
    transform: 'done'
";

/// How a daemon is made.
pub(crate) struct Options {
    pub(crate) http: HttpConfig,
    /// How long the simulated model takes.
    pub(crate) latency: Duration,
}

impl Default for Options {
    fn default() -> Self {
        let http = HttpConfig { auth: AuthMode::Keys, ..HttpConfig::default() };
        Self { http, latency: Duration::from_millis(5) }
    }
}

/// A daemon, and the secrets of its keys.
pub(crate) struct TestApp {
    pub(crate) address: SocketAddr,
    pub(crate) store: Arc<dyn Store>,
    /// The same, to be stalled.
    pub(crate) stalling: Arc<Stalling>,
    pub(crate) engine: Engine,
    pub(crate) http: reqwest::Client,
    /// Keys of the tenant `acme`, by role; what a request is sent with unless it says otherwise.
    pub(crate) viewer: String,
    pub(crate) operator: String,
    pub(crate) admin: String,
    /// An admin of another tenant.
    pub(crate) stranger: String,
    conformance: Arc<Conformance>,
    stop: Option<oneshot::Sender<()>>,
    server: Option<JoinHandle<()>>,
    _dir: TempDir,
}

/// What came back.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Value,
    pub(crate) text: String,
}

impl Answer {
    /// The problem's code.
    pub(crate) fn code(&self) -> &str {
        self.body["code"].as_str().unwrap_or_default()
    }

    /// A header as text; empty where it is not there.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// Checks status and code of a problem, and that it is a whole one.
    #[track_caller]
    pub(crate) fn is_problem(&self, status: u16, code: &str) {
        assert_eq!((self.status.as_u16(), self.code()), (status, code), "{}", self.text);
        assert_eq!(self.header("content-type"), "application/problem+json");
        assert_eq!(self.body["status"], status);
        assert_eq!(self.body["request_id"], self.header("x-request-id"));
        assert!(
            self.body["type"].as_str().is_some_and(|kind| kind.ends_with(&format!("/docs/errors/{code}.md"))),
            "{}",
            self.text
        );
        assert!(!self.body["detail"].as_str().unwrap_or_default().is_empty(), "{}", self.text);
    }

    /// The paths of the problem's violations.
    pub(crate) fn paths(&self) -> Vec<&str> {
        let violations = self.body["violations"].as_array().map(Vec::as_slice).unwrap_or_default();
        violations.iter().filter_map(|violation| violation["path"].as_str()).collect()
    }
}

/// A daemon that asks for keys.
pub(crate) async fn spawn_app() -> TestApp {
    TestApp::spawn(Options::default()).await
}

impl TestApp {
    pub(crate) async fn spawn(options: Options) -> Self {
        Self::spawn_with(options, EngineConfig::default(), None).await
    }

    /// The same, with an engine of one's own, and requests of the API handled on another runtime.
    pub(crate) async fn spawn_with(options: Options, engine: EngineConfig, handlers: Option<Handle>) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = tempfile::tempdir().expect("a directory");
        let metrics = Metrics::new();
        let store = SqliteStore::open(&dir.path().join("test.db"), metrics.clone()).await.expect("a store");
        let tier = store.cache_tier();
        let stalling = Arc::new(Stalling::new(Arc::new(store)));
        let store: Arc<dyn Store> = Arc::clone(&stalling) as Arc<dyn Store>;
        let clock = Arc::new(SystemClock);
        let client = Client::new(&NetConfig::default()).expect("a client");
        let config = llm_config(options.latency);
        let llm = Llm::new(&config, &client, Some(tier), metrics.clone(), clock.clone()).expect("a model");
        let engine = Engine::start(engine, Arc::clone(&store), Arc::new(llm), metrics.clone(), clock);
        let engine = engine.await.expect("an engine");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let app = App { engine: engine.clone(), metrics, config: options.http, embedded: true, handlers, reads_max: 6 };
        let (stop, stopped) = oneshot::channel::<()>();
        let server = tokio::spawn(async move {
            let until = async { drop(stopped.await) };
            stagegate_http::serve(app, listener, until).await.expect("may listen");
        });
        let key = async |tenant, role, seed| new_key(&store, tenant, role, seed, None).await.0;
        Self {
            viewer: key("acme", Role::Viewer, 1).await,
            operator: key("acme", Role::Operator, 2).await,
            admin: key("acme", Role::Admin, 3).await,
            stranger: key("globex", Role::Admin, 4).await,
            address,
            store,
            stalling,
            engine,
            http: reqwest::Client::builder().no_proxy().build().expect("a client"),
            conformance: Arc::new(Conformance::new()),
            stop: Some(stop),
            server: Some(server),
            _dir: dir,
        }
    }

    /// Begins the shutdown.
    pub(crate) fn begin_shutdown(&mut self) {
        drop(self.stop.take());
    }

    /// Waits until the listener's side has ended.
    pub(crate) async fn ended(&mut self) {
        if let Some(server) = self.server.take() {
            server.await.expect("no panic");
        }
    }

    /// The address of a path.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// A request as the admin.
    pub(crate) fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method, self.url(path)).bearer_auth(&self.admin)
    }

    /// Sends a request, and holds the answer against the document.
    pub(crate) async fn send(&self, request: reqwest::RequestBuilder) -> Answer {
        let request = request.build().expect("a request");
        let (method, path) = (request.method().clone(), request.url().path().to_owned());
        let response = self.http.execute(request).await.expect("an answer");
        let (status, headers) = (response.status(), response.headers().clone());
        let text = response.text().await.expect("a body");
        let body = serde_json::from_str(&text).unwrap_or(Value::Null);
        self.conformance.check(&method, &path, status, &headers, &body);
        Answer { status, headers, body, text }
    }

    /// Reads as the admin.
    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(self.request(Method::GET, path)).await
    }

    /// Posts JSON as the admin.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(self.request(Method::POST, path).json(body)).await
    }

    /// Posts nothing as the admin.
    pub(crate) async fn post_empty(&self, path: &str) -> Answer {
        self.send(self.request(Method::POST, path)).await
    }

    /// Posts a text of a type as the admin.
    pub(crate) async fn post_text(&self, path: &str, kind: &str, body: impl Into<reqwest::Body>) -> Answer {
        self.send(self.request(Method::POST, path).header("content-type", kind).body(body)).await
    }

    /// Registers a definition.
    #[track_caller]
    pub(crate) fn register(&self, source: &'static str) -> impl Future<Output = Value> {
        let sent = self.post_text("/v1/pipelines", "application/yaml", source);
        async {
            let answer = sent.await;
            assert!(answer.status.is_success(), "{}", answer.text);
            answer.body
        }
    }

    /// Submits a run of [`PIPELINE`]; its id.
    pub(crate) async fn submit(&self, brief: &str) -> String {
        let answer = self.post("/v1/runs", &json!({ "pipeline": "two-steps", "input": { "brief": brief } })).await;
        assert_eq!(answer.status, 202, "{}", answer.text);
        answer.body["id"].as_str().expect("an id").to_owned()
    }

    /// Follows a run until it is finished; its last event.
    pub(crate) async fn finish(&self, id: &str) -> Value {
        let events = self.stream(&format!("/v1/runs/{id}/events"), None).await;
        events.into_iter().last().expect("an event").data
    }

    /// Reads an event stream to its end.
    pub(crate) async fn stream(&self, path: &str, last_event_id: Option<u64>) -> Vec<SseEvent> {
        let mut request = self.request(Method::GET, path).header("accept", "text/event-stream");
        if let Some(id) = last_event_id {
            request = request.header("last-event-id", id.to_string());
        }
        let response = request.send().await.expect("an answer");
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        assert!(!response.headers().contains_key("content-encoding"));
        parse_sse(&response.text().await.expect("a stream"))
    }
}

/// One event of a stream.
#[derive(Debug)]
pub(crate) struct SseEvent {
    pub(crate) id: u64,
    pub(crate) name: String,
    pub(crate) data: Value,
}

/// The events of a stream's text.
pub(crate) fn parse_sse(text: &str) -> Vec<SseEvent> {
    let field = |block: &str, name: &str| {
        block.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ").map(str::to_owned))
    };
    let blocks = text.split("\n\n").filter(|block| block.contains("data: "));
    let events = blocks.map(|block| SseEvent {
        id: field(block, "id").expect("an id").parse().expect("a number"),
        name: field(block, "event").expect("a name"),
        data: serde_json::from_str(&field(block, "data").expect("data")).expect("JSON"),
    });
    events.collect()
}

/// Stores a new key; its secret and its id.
pub(crate) async fn new_key(
    store: &Arc<dyn Store>,
    tenant: &str,
    role: Role,
    seed: u64,
    expires_at: Option<DateTime<Utc>>,
) -> (String, KeyId) {
    let (secret, hash) = stagegate_http::generate_key(&mut StdRng::seed_from_u64(seed));
    let id = KeyId(uuid::Uuid::new_v4());
    let key = ApiKey {
        id,
        tenant: TenantId::new(tenant).expect("valid"),
        role,
        name: "test".to_owned(),
        created_at: SystemClock.now(),
        expires_at,
        revoked_at: None,
        failure: None,
    };
    store.create_key(&NewApiKey { key, hash }).await.expect("stored");
    (secret, id)
}

fn llm_config(latency: Duration) -> LlmConfig {
    let sim = ProviderConfig {
        sim: SimConfig { latency: Span(latency), ..SimConfig::default() },
        ..ProviderConfig::new(ProviderKind::Sim)
    };
    LlmConfig { providers: [("sim".to_owned(), sim)].into(), ..LlmConfig::default() }
}
