//! The model layer: owns how a request becomes an answer. It knows nothing of runs or stores.
//!
//! From the outside in: cache → coalescing → reservation → breaker and pace → concurrency limit → provider. There is no
//! retry here: a failed attempt is the engine's to record and to repeat (docs/decisions.md), so that each one is seen, paid
//! for and bounded in one place. The fallback chain is here: when one model fails, the next is asked at once.

mod ask;
mod breaker;
mod cache;
mod call;
pub mod config;
mod door;
mod hint;
mod inflight;
mod key;
mod limit;
mod meter;
mod pace;
pub mod prices;
pub mod provider;
pub mod providers;
pub mod purse;
mod turns;

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use stagegate_core::{
    CallPurpose, Clock, Code, Error, LedgerEntry, ModelRef, Pipeline, PipelineName, RunId, StageId, TenantId, Usage,
    Usd, Violation,
    cache::{CacheKey, CacheScope, CacheTier, CacheUsage},
    decide::{FailureKind, Tried},
    error::nearest,
    pipeline::{CacheMode, Message, Models, OutputFormat, Params, Work},
};
use stagegate_net::Client;
use stagegate_telemetry::Metrics;
use tokio::time::Instant;

use self::{
    call::Caller,
    config::{DialectConfig, LlmConfig},
    prices::Prices,
    provider::Provider,
    purse::Purse,
};

pub use self::{
    cache::redis::{RedisConfig, RedisTier},
    hint::RedisHints,
};

/// Who asks, for cache scopes, limits and logs. Not part of the request itself.
#[derive(Debug, Clone)]
pub struct CallContext {
    /// The wall of the cache.
    pub tenant: TenantId,
    /// For invalidation.
    pub pipeline: PipelineName,
    /// For invalidation.
    pub version: u32,
    /// For invalidation.
    pub stage: StageId,
    /// With the cache off, the answer is kept for this run's stage alone.
    pub run: RunId,
    /// The stage's attempt. An answer remembers the run, the stage and the attempt that bought it.
    pub attempt: u32,
    /// How the cache is used.
    pub cache_mode: CacheMode,
    /// How long the answer may be reused.
    pub cache_ttl: Duration,
    /// How long one call of a provider may take, from when its request is sent; then the next model is asked.
    pub timeout: Duration,
    /// Until when a model that is away is waited for in the call; not later than the run waits an outage out.
    pub outage_until: Instant,
    /// When the answer must be there, whatever is waited for.
    pub deadline: Instant,
    /// Who pays; None where calls are neither limited nor booked.
    pub purse: Option<Arc<dyn Purse>>,
}

/// What is asked. Every field is part of the cache key.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The fallback chain, in order; never empty. The key of an answer holds only the model that gave it.
    pub models: Vec<ModelRef>,
    /// The conversation.
    pub messages: Vec<Message>,
    /// Sampling parameters.
    pub params: Params,
    /// What the answer must be.
    pub format: OutputFormat,
    /// Which of several answers to the same question; 0 for the first.
    pub sample: u32,
    /// What it is for. Not part of the key.
    pub purpose: CallPurpose,
}

/// A whole, usable answer: never truncated, filtered, refused or empty; valid JSON where JSON was asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    /// The text.
    pub content: String,
    /// The calls that it took, in order: failed ones of the fallback chain first, the answering one last.
    pub calls: Vec<LedgerEntry>,
    /// Under which key it is cached, for [`Llm::evict`].
    pub key: CacheKey,
}

/// Why no model of the chain answered.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct CallError {
    /// Of an outage that may pass, where there is one in the chain; else of the last model.
    pub code: Code,
    /// A sentence that quotes neither prompts nor keys nor the provider.
    pub message: String,
    /// The provider's words, which may echo the prompt; without keys.
    pub detail: Option<String>,
    /// Whether the same call may succeed later, and when.
    pub kind: FailureKind,
    /// What came of the models of the chain.
    pub tried: Tried,
    /// An answer that came but was cut, so that a critique can name it.
    pub partial: Option<Partial>,
    /// The calls that failed, in order.
    pub calls: Vec<LedgerEntry>,
}

/// An answer that was cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partial {
    /// What there is of it.
    pub content: String,
    /// The model that gave it.
    pub model: ModelRef,
    /// Why it ended, in a sentence.
    pub message: String,
    /// Whether a shorter answer would have been whole.
    pub is_too_long: bool,
}

/// The model layer. Shared by every run; cheap to clone.
#[derive(Clone)]
pub struct Llm {
    caller: Arc<Caller>,
}

impl fmt::Debug for Llm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Llm").field("providers", &self.caller.providers.keys()).finish_non_exhaustive()
    }
}

impl Llm {
    /// From the configuration. `client` is the way to the providers, `tier` the shared cache: Redis, the SQLite file, or
    /// none. Fails on a configuration that has mistakes; connects to nothing.
    pub fn new(
        config: &LlmConfig,
        client: &Client,
        tier: Option<Arc<dyn CacheTier>>,
        metrics: Metrics,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, Error> {
        let violations = config.violations();
        if !violations.is_empty() {
            return Err(Error::violations(Code::InvalidConfig, violations));
        }
        let providers = providers::build(config, client)?;
        Ok(Self::with_providers(providers, Prices::new(config)?, config, tier, metrics, clock))
    }

    /// With these providers instead of the configured ones: for tests, and for providers from elsewhere.
    pub fn with_providers(
        providers: BTreeMap<String, Arc<dyn Provider>>,
        prices: Prices,
        config: &LlmConfig,
        tier: Option<Arc<dyn CacheTier>>,
        metrics: Metrics,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self { caller: Arc::new(Caller::new(providers, prices, config, tier, metrics, clock)) }
    }

    /// Whether some configured provider serves the model; else [`Code::UnknownModel`] or [`Code::ProviderWithoutKey`]
    /// with what to configure.
    pub fn check_model(&self, model: &ModelRef) -> Result<(), Error> {
        let name = model.provider();
        match self.caller.providers.get(name) {
            Some(served) if served.provider.is_configured() => match served.provider.models() {
                Some(known) if !known.contains(&model.model()) => {
                    let mend = nearest(model.model(), known.iter().copied()).map_or_else(
                        || format!("it has {}", known.join(", ")),
                        |near| format!("did you mean `{name}/{near}`?"),
                    );
                    Err(Error::new(
                        Code::UnknownModel,
                        format!("`{model}`: the provider `{name}` has no such model; {mend}"),
                    ))
                }
                _ => Ok(()),
            },
            Some(served) => {
                let variable = match served.provider.kind() {
                    "openai" => "set OPENAI_API_KEY or ",
                    "anthropic" => "set ANTHROPIC_API_KEY or ",
                    "gemini" => "set GEMINI_API_KEY or ",
                    _ => "set ",
                };
                let detail =
                    format!("`{model}`: the provider `{name}` has no key: {variable}`llm.providers.{name}.api_key`");
                Err(Error::new(Code::ProviderWithoutKey, detail))
            }
            None => {
                let known: Vec<_> = self.caller.providers.keys().map(String::as_str).collect();
                let mend = nearest(name, known.iter().copied()).map_or_else(
                    || format!("configured are {}", known.join(", ")),
                    |near| format!("did you mean `{near}`?"),
                );
                let detail = format!("`{model}`: no provider is called `{name}`; {mend}");
                Err(Error::new(Code::UnknownModel, detail))
            }
        }
    }

    /// The worst case of one call to the dearest model of the chain; None where a model has no price.
    pub fn worst_case(&self, request: &Request) -> Option<Usd> {
        let costs = request.models.iter().map(|model| self.caller.worst_case(request, model));
        costs.map(|row| row.priced.then_some(row.cost_usd)).collect::<Option<Vec<_>>>()?.into_iter().max()
    }

    /// The worst case of a call to each model of the chain, as rows of unknown outcome: what a request can have cost
    /// whose end nobody heard.
    pub fn worst_cases(&self, request: &Request) -> Vec<LedgerEntry> {
        request.models.iter().map(|model| self.caller.worst_case(request, model)).collect()
    }

    /// What so many tokens would cost at the first model's price; None where it has none.
    pub fn estimate(&self, models: &[ModelRef], input_tokens: u64, output_tokens: u64) -> Option<Usd> {
        let usage = Usage { input_tokens, output_tokens, estimated: true, ..Usage::default() };
        self.caller.prices.cost(models.first()?, &usage)
    }

    /// Asks. Dropping the future abandons the call (a coalesced one goes on for the others).
    ///
    /// Each model of the chain in order: the cache, then a call. Whatever goes wrong with one, a refusal too, the next
    /// is asked at once, until the deadline.
    pub async fn complete(&self, context: &CallContext, request: &Request) -> Result<Reply, CallError> {
        ask::complete(&self.caller, context, request).await
    }

    /// The cached answer of the first model, if there is one. Never calls a provider, and changes nothing.
    pub async fn peek(&self, context: &CallContext, request: &Request) -> Option<Reply> {
        ask::peek(&self.caller, context, request).await
    }

    /// Stores an answer under another request too: the one whose attempts led to it. It is stored as the answer of the
    /// model that gave it, and only where that is one of the request's; it counts as long, and is stale as soon, as the
    /// original. An answer that is not cached (any more) is not remembered.
    pub async fn remember(&self, context: &CallContext, request: &Request, reply: &Reply) {
        ask::remember(&self.caller, context, request, reply).await;
    }

    /// Removes an answer: its gate failed.
    pub async fn evict(&self, tenant: &TenantId, key: CacheKey) {
        self.caller.cache.evict(tenant, key).await;
    }

    /// Makes every answer in a scope stale. [`Code::CacheUnavailable`] where the shared cache could not be told.
    pub async fn invalidate(&self, tenant: &TenantId, scope: &CacheScope) -> Result<(), Error> {
        self.caller.cache.invalidate(tenant, scope).await
    }

    /// How many answers are kept of a tenant: in this process, and in the shared cache with its kind; None for what is not
    /// there or cannot be counted.
    pub async fn cache_usage(&self, tenant: &TenantId) -> (CacheUsage, Option<(&'static str, Option<CacheUsage>)>) {
        self.caller.cache.usage(tenant).await
    }

    /// The stages of a pipeline whose output the simulator would have to make and cannot: it found no value that fits.
    pub fn unanswerable(&self, pipeline: &Pipeline) -> Vec<Violation> {
        let is_simulated = |model: &ModelRef| {
            self.caller.providers.get(model.provider()).is_some_and(|served| served.provider.kind() == "sim")
        };
        let asked = pipeline.stages.iter().filter(|stage| match &stage.work {
            Work::Model(work) => work.models.iter().any(is_simulated),
            Work::Transform => false,
        });
        let ids = pipeline.definition["stages"].as_array().map(Vec::as_slice).unwrap_or_default();
        let unmet = asked.filter(|stage| !providers::sim::can_answer(&stage.output)).map(|stage| {
            let at = ids.iter().position(|defined| defined["id"] == stage.id.as_str()).unwrap_or_default();
            let place = format!("stages[{at}].output.schema");
            let message = "the simulator found no value that fits this schema";
            let mend = "use a real model for this stage, or ask for less in the schema";
            Violation::new(Code::InvalidSchema, place, message).mend(mend)
        });
        unmet.collect()
    }

    /// The providers and the shared cache, for `/readyz` and `/health`.
    pub async fn health(&self) -> LlmHealth {
        let shared_cache = self.caller.cache.ping().await;
        let providers = self.caller.providers.iter().map(|(name, served)| {
            let seen = served.seen();
            let remaining = (seen.limits.requests_remaining, seen.limits.tokens_remaining);
            ProviderHealth {
                name: name.clone(),
                kind: served.provider.kind(),
                configured: served.provider.is_configured(),
                open_breakers: self.caller.doors.open_of(name),
                remaining: (remaining != (None, None)).then_some(remaining),
                quota_exhausted: seen.quota_exhausted,
                dialects: served.provider.dialects(),
            }
        });
        LlmHealth { shared_cache, providers: providers.collect() }
    }
}

impl Models for Llm {
    fn check(&self, model: &ModelRef) -> Result<(), Error> {
        self.check_model(model)
    }

    fn unsupported(&self, model: &ModelRef, params: &Params) -> Vec<(&'static str, String)> {
        let served = self.caller.providers.get(model.provider());
        served.map_or_else(Vec::new, |served| served.provider.unsupported(params))
    }

    fn is_priced(&self, model: &ModelRef) -> bool {
        self.caller.prices.is_priced(model)
    }
}

/// What `/readyz` and `/health` tell of this layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LlmHealth {
    /// The shared cache tier: its kind, how long a ping took, or why it failed. None where there is no tier.
    pub shared_cache: Option<(&'static str, Result<Duration, String>)>,
    /// Each provider.
    pub providers: Vec<ProviderHealth>,
}

/// A provider, as it was last seen. No call is made to find out.
#[derive(Debug, Clone, PartialEq)]
pub struct ProviderHealth {
    /// Its name in the configuration.
    pub name: String,
    /// `openai`, `anthropic`, `gemini` or `sim`.
    pub kind: &'static str,
    /// Whether it has a key, or needs none.
    pub configured: bool,
    /// Models whose breaker is open.
    pub open_breakers: Vec<String>,
    /// What the provider last told of its limits, as it told it: (`requests remaining`, `tokens remaining`).
    pub remaining: Option<(Option<u64>, Option<u64>)>,
    /// Set while the provider says that the account has no quota left.
    pub quota_exhausted: bool,
    /// What was found out about the dialects of its models, by model.
    pub dialects: Vec<(String, DialectConfig)>,
}
