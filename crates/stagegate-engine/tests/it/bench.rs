//! What every test here stands on: an engine on SQLite, and a fake provider.

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use futures::StreamExt;
use serde_json::{Value, json};
use stagegate_core::{
    Event, EventKind, RunId, RunState, Store, SystemClock, TenantId,
    cache::CacheTier,
    pipeline::{Labels, Span},
    store::{RunDetail, RunRecord},
};
use stagegate_engine::{Engine, Submit, config::EngineConfig};
use stagegate_llm::{
    Llm,
    config::{LlmConfig, Price, ProviderConfig, ProviderKind},
};
use stagegate_net::{Client, NetConfig};
use stagegate_store_sqlite::SqliteStore;
use stagegate_telemetry::Metrics;
use stagegate_testkit::provider::FakeProvider;

/// An engine, its parts, and the provider that it asks.
pub(crate) struct Bench {
    pub(crate) engine: Engine,
    pub(crate) provider: FakeProvider,
    pub(crate) store: Arc<SqliteStore>,
    pub(crate) llm: Arc<Llm>,
    pub(crate) folder: Arc<tempfile::TempDir>,
}

pub(crate) fn quick() -> EngineConfig {
    EngineConfig {
        lease_ttl: Span(Duration::from_millis(900)),
        poll_interval: Span(Duration::from_millis(50)),
        park_after: Span(Duration::from_millis(200)),
        ..EngineConfig::default()
    }
}

pub(crate) async fn store(folder: &Path) -> Arc<SqliteStore> {
    Arc::new(SqliteStore::open(&folder.join("test.db"), Metrics::new()).await.expect("a store"))
}

/// The model layer of a process: its own local cache, the file's shared one.
pub(crate) fn llm(provider: &FakeProvider, store: &SqliteStore) -> Arc<Llm> {
    llm_with(provider.openai_base_url(), store.cache_tier())
}

/// The same, with any shared tier.
pub(crate) fn llm_with(base_url: String, tier: Arc<dyn CacheTier>) -> Arc<Llm> {
    llm_configured(base_url, tier, |_| {})
}

/// The same, configured otherwise.
pub(crate) fn llm_configured(
    base_url: String,
    tier: Arc<dyn CacheTier>,
    change: impl FnOnce(&mut LlmConfig),
) -> Arc<Llm> {
    let fake = ProviderConfig { base_url: Some(base_url), ..ProviderConfig::new(ProviderKind::Openai) };
    let price = Price { input: 1.0, output: 2.0, cache_read: None, cache_write: None };
    let mut config = LlmConfig {
        providers: BTreeMap::from([("fake".to_owned(), fake)]),
        prices: BTreeMap::from([("fake/*".to_owned(), price)]),
        // A machine that is busy with other tests must not make a cache look away.
        shared_cache_timeout: Span(Duration::from_secs(5)),
        ..LlmConfig::default()
    };
    change(&mut config);
    let client = Client::new(&NetConfig::default()).expect("a client");
    let llm = Llm::new(&config, &client, Some(tier), Metrics::new(), Arc::new(SystemClock));
    Arc::new(llm.expect("a model layer"))
}

pub(crate) async fn engine(config: EngineConfig, store: &Arc<SqliteStore>, llm: &Arc<Llm>) -> Engine {
    let store: Arc<dyn Store> = Arc::clone(store) as Arc<dyn Store>;
    Engine::start(config, store, Arc::clone(llm), Metrics::new(), Arc::new(SystemClock)).await.expect("an engine")
}

impl Bench {
    pub(crate) async fn start() -> Self {
        Self::with(quick()).await
    }

    pub(crate) async fn with(config: EngineConfig) -> Self {
        Self::configured(config, |_| {}).await
    }

    /// With a model layer that is configured otherwise.
    pub(crate) async fn configured(config: EngineConfig, change: impl FnOnce(&mut LlmConfig)) -> Self {
        let folder = Arc::new(tempfile::tempdir().expect("a folder"));
        let store = store(folder.path()).await;
        let provider = FakeProvider::start().await;
        let llm = llm_configured(provider.openai_base_url(), store.cache_tier(), change);
        let engine = engine(config, &store, &llm).await;
        Self { engine, provider, store, llm, folder }
    }

    /// Registers a definition and submits a run of it.
    pub(crate) async fn submit(&self, source: &str, input: Value) -> RunId {
        submit(&self.engine, source, input).await
    }

    /// All events to the end of the run.
    pub(crate) async fn finish(&self, run: RunId) -> Vec<Event> {
        finish(&self.engine, run).await
    }

    /// Runs to the end; what is kept of it.
    pub(crate) async fn run(&self, source: &str, input: Value) -> RunDetail {
        let run = self.submit(source, input).await;
        self.finish(run).await;
        self.detail(run).await
    }

    pub(crate) async fn detail(&self, run: RunId) -> RunDetail {
        self.store.run(&TenantId::default(), run).await.expect("read").expect("there")
    }

    /// Waits until an event of this name is there.
    pub(crate) async fn until(&self, run: RunId, name: &str) -> Vec<Event> {
        let mut seen = Vec::new();
        let mut events = self.engine.follow(TenantId::default(), run, 0);
        while let Some(batch) = events.next().await {
            seen.extend(batch.expect("readable"));
            if seen.iter().any(|event| event.kind.name() == name) {
                return seen;
            }
        }
        panic!("the run ended without {name}: {seen:?}");
    }
}

/// Registers a definition and submits a run of it.
pub(crate) async fn submit(engine: &Engine, source: &str, input: Value) -> RunId {
    let tenant = TenantId::default();
    let (version, _) = engine.register(&tenant, source).await.expect("a valid definition");
    let submit = Submit {
        tenant,
        pipeline: version.name,
        version: Some(version.version),
        input: input.into(),
        cache_mode: None,
        priority: 0,
        labels: Labels::new(),
        idempotency: None,
        start_at: None,
        request_id: Some("test".to_owned()),
    };
    engine.submit(submit).await.expect("accepted").0.id
}

pub(crate) async fn finish(engine: &Engine, run: RunId) -> Vec<Event> {
    let mut seen = Vec::new();
    let mut events = engine.follow(TenantId::default(), run, 0);
    while let Some(batch) = events.next().await {
        seen.extend(batch.expect("readable"));
    }
    for (index, event) in seen.iter().enumerate() {
        assert_eq!(event.seq, index as u64 + 1, "events are gap-free");
    }
    let last = seen.last().expect("events");
    assert!(matches!(last.kind, EventKind::RunFinished { .. }), "the last event ends the run: {last:?}");
    seen
}

pub(crate) fn assert_state(run: &RunRecord, state: RunState) {
    assert_eq!(run.state, state, "{:?}", run.failure);
}

/// 1→2→3→{4,5}, each stage's prompt naming it and what it needs.
pub(crate) fn canonical() -> String {
    json!({
        "name": "canonical",
        "defaults": { "model": "fake/model", "retry": { "max_attempts": 3, "backoff": "10ms..50ms" } },
        "stages": [
            { "id": "one", "prompt": "stage-one {{ input.text }}" },
            { "id": "two", "needs": ["one"], "prompt": "stage-two {{ input.text }} {{ stages.one.output | length }}" },
            { "id": "three", "needs": ["two"], "prompt": "stage-three {{ input.text }} {{ stages.two.output | length }}" },
            { "id": "four", "needs": ["three"], "prompt": "stage-four {{ input.text }} {{ stages.three.output | length }}" },
            { "id": "five", "needs": ["three"], "prompt": "stage-five {{ input.text }} {{ stages.three.output | length }}" }
        ]
    })
    .to_string()
}
