//! What the tests of the assembled layer share: a fake vendor on a socket or a scripted provider in the process, a clock
//! that is moved by hand, and short ways to say what is asked.

use std::{
    collections::BTreeMap,
    future::pending,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use stagegate_core::{
    CallPurpose, Clock, Code, LedgerEntry, ModelRef, PipelineName, RunId, StageId, TenantId, Usage, Usd,
    cache::CacheTier,
    pipeline::{CacheMode, Message, OutputFormat, Params, Role},
};
use stagegate_llm::{
    CallContext, Llm, Reply, Request,
    config::{LlmConfig, Price, ProviderConfig, ProviderKind},
    prices::Prices,
    provider::{Answer, Finish, Limits, Provider, ProviderError, ProviderRequest},
};
use stagegate_telemetry::Metrics;
use stagegate_testkit::FakeProvider;
use tokio::{sync::Semaphore, time::Instant};
use uuid::Uuid;

/// A clock that stands until it is moved.
#[derive(Debug)]
pub(crate) struct HandClock(Mutex<DateTime<Utc>>);

impl Default for HandClock {
    fn default() -> Self {
        Self(Mutex::new(DateTime::from_timestamp(1_800_000_000, 0).expect("in range")))
    }
}

impl HandClock {
    pub(crate) fn advance(&self, by: Duration) {
        *self.0.lock().expect("no panic") += by;
    }
}

impl Clock for HandClock {
    fn now(&self) -> DateTime<Utc> {
        *self.0.lock().expect("no panic")
    }
}

/// A layer over two vendors (`one` and `two`) on one socket. `one/priced` costs 1 and 2 USD per million tokens.
pub(crate) struct Bench {
    pub(crate) vendor: Arc<FakeProvider>,
    pub(crate) llm: Llm,
    pub(crate) clock: Arc<HandClock>,
    pub(crate) metrics: Metrics,
}

/// What [`FakeProvider`]'s usual answer costs: 100 tokens in, 20 out.
pub(crate) const COST: Usd = Usd::from_nanos(100 * 1_000 + 20 * 2_000);

pub(crate) fn config() -> LlmConfig {
    let mut config = LlmConfig::default();
    let price = Price { input: 1.0, output: 2.0, cache_read: None, cache_write: None };
    for model in ["one/priced", "two/priced"] {
        config.prices.insert(model.to_owned(), price);
    }
    config
}

impl Bench {
    pub(crate) async fn new() -> Self {
        Self::with(None, |_| {}).await
    }

    pub(crate) async fn with(tier: Option<Arc<dyn CacheTier>>, change: impl FnOnce(&mut LlmConfig)) -> Self {
        Self::at(Arc::new(FakeProvider::start().await), tier, change)
    }

    /// Another replica before the same vendor.
    pub(crate) fn at(
        vendor: Arc<FakeProvider>,
        tier: Option<Arc<dyn CacheTier>>,
        change: impl FnOnce(&mut LlmConfig),
    ) -> Self {
        let mut config = config();
        for name in ["one", "two"] {
            let provider = ProviderConfig {
                base_url: Some(vendor.openai_base_url()),
                ..ProviderConfig::new(ProviderKind::Openai)
            };
            config.providers.insert(name.to_owned(), provider);
        }
        change(&mut config);
        let (clock, metrics) = (Arc::new(HandClock::default()), Metrics::new());
        let client = crate::providers::client();
        let llm = Llm::new(&config, &client, tier, metrics.clone(), clock.clone()).expect("a valid configuration");
        Self { vendor, llm, clock, metrics }
    }

    /// Asks, and expects an answer.
    pub(crate) async fn ask(&self, context: &CallContext, request: &Request) -> Reply {
        self.llm.complete(context, request).await.expect("an answer")
    }

    /// How often the vendor was asked.
    pub(crate) fn calls(&self) -> usize {
        self.vendor.call_count()
    }

    pub(crate) fn metrics(&self) -> String {
        self.metrics.render().expect("metrics render")
    }
}

pub(crate) fn run(n: u128) -> RunId {
    RunId(Uuid::from_u128(n))
}

pub(crate) fn tenant(name: &str) -> TenantId {
    TenantId::new(name).expect("a slug")
}

pub(crate) fn model(name: &str) -> ModelRef {
    ModelRef::new(name).expect("a model")
}

/// Run 1 of stage `s` of version 1 of pipeline `p`, with an hour's TTL and half a minute's time.
pub(crate) fn context() -> CallContext {
    CallContext {
        tenant: TenantId::default(),
        pipeline: PipelineName::new("p").expect("a slug"),
        version: 1,
        stage: StageId::new("s").expect("a slug"),
        run: run(1),
        cache_mode: CacheMode::Use,
        cache_ttl: Duration::from_hours(1),
        attempt: 1,
        purse: None,
        timeout: Duration::from_secs(30),
        outage_until: Instant::now() + Duration::from_mins(15),
        deadline: Instant::now() + Duration::from_hours(1),
    }
}

pub(crate) fn in_mode(mode: CacheMode, n: u128) -> CallContext {
    CallContext { cache_mode: mode, run: run(n), ..context() }
}

pub(crate) fn request(prompt: &str) -> Request {
    Request {
        models: vec![model("one/priced")],
        messages: vec![Message { role: Role::User, content: prompt.to_owned() }],
        params: Params::default(),
        format: OutputFormat::Text,
        sample: 0,
        purpose: CallPurpose::Stage,
    }
}

pub(crate) fn chain(prompt: &str, models: &[&str]) -> Request {
    Request { models: models.iter().map(|name| model(name)).collect(), ..request(prompt) }
}

/// The row of the answering call.
pub(crate) fn last(reply: &Reply) -> &LedgerEntry {
    reply.calls.last().expect("a reply has a call")
}

/// What a scripted provider does.
#[derive(Debug, Clone)]
pub(crate) enum Act {
    Answer(&'static str),
    Fail(Code, bool),
    Hang,
}

/// A provider in the process, for tests that stop the time or need to hold a call.
#[derive(Debug)]
pub(crate) struct Scripted {
    act: Mutex<Act>,
    calls: AtomicUsize,
    /// Each call needs one before it does what it does.
    pub(crate) turns: Semaphore,
}

impl Scripted {
    pub(crate) fn new(act: Act) -> Arc<Self> {
        Arc::new(Self {
            act: Mutex::new(act),
            calls: AtomicUsize::new(0),
            turns: Semaphore::new(Semaphore::MAX_PERMITS),
        })
    }

    /// One whose calls wait for a turn.
    pub(crate) fn held(act: Act) -> Arc<Self> {
        Arc::new(Self { act: Mutex::new(act), calls: AtomicUsize::new(0), turns: Semaphore::new(0) })
    }

    pub(crate) fn set(&self, act: Act) {
        *self.act.lock().expect("no panic") = act;
    }

    pub(crate) fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    /// Returns once so many calls have arrived.
    pub(crate) async fn arrived(&self, calls: usize) {
        while self.calls() < calls {
            tokio::task::yield_now().await;
        }
    }
}

#[async_trait]
impl Provider for Scripted {
    async fn call(&self, _: ProviderRequest<'_>) -> Result<Answer, ProviderError> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let act = self.act.lock().expect("no panic").clone();
        self.turns.acquire().await.expect("never closed").forget();
        let usage = Some(Usage { input_tokens: 100, output_tokens: 20, ..Usage::default() });
        let limits = Limits { requests_remaining: Some(7), tokens_remaining: None };
        match act {
            Act::Answer(text) => Ok(Answer { content: text.to_owned(), finish: Finish::Stop, usage, limits }),
            Act::Fail(code, retryable) => {
                let message = code.title().to_owned();
                Err(ProviderError {
                    code,
                    message,
                    detail: None,
                    retryable,
                    retry_after: None,
                    usage: None,
                    unheard: false,
                    answered: false,
                    limits,
                })
            }
            Act::Hang => pending().await,
        }
    }

    fn kind(&self) -> &'static str {
        "openai"
    }

    fn is_configured(&self) -> bool {
        true
    }
}

/// A layer over one scripted provider, and a tier.
pub(crate) fn scripted_over(one: &Arc<Scripted>, tier: Arc<dyn CacheTier>) -> Llm {
    let (config, clock) = (config(), Arc::new(HandClock::default()));
    let providers = BTreeMap::from([("one".to_owned(), Arc::clone(one) as Arc<dyn Provider>)]);
    let prices = Prices::new(&config).expect("valid prices");
    Llm::with_providers(providers, prices, &config, Some(tier), Metrics::new(), clock)
}

/// A layer over scripted providers, without a tier.
pub(crate) fn scripted(providers: &[(&str, &Arc<Scripted>)], config: &LlmConfig) -> (Llm, Metrics) {
    let providers: BTreeMap<String, Arc<dyn Provider>> = providers
        .iter()
        .map(|(name, provider)| ((*name).to_owned(), Arc::clone(provider) as Arc<dyn Provider>))
        .collect();
    let (prices, metrics) = (Prices::new(config).expect("valid prices"), Metrics::new());
    let llm = Llm::with_providers(providers, prices, config, None, metrics.clone(), Arc::new(HandClock::default()));
    (llm, metrics)
}
