//! The model layer: owns how a request becomes an answer. It knows nothing of runs or stores.
//!
//! From the outside in: cache → coalescing → breaker → concurrency limit → provider. There is no retry here: a failed
//! attempt is the engine's to record and to repeat (docs/decisions.md), so that each one is seen, paid for and bounded
//! in one place. The fallback chain is here: when one model fails, the next is asked at once.

pub mod config;
pub mod prices;
pub mod provider;
pub mod providers;
pub mod tls;

use std::{sync::Arc, time::Duration};

use stagegate_core::{
    CallPurpose, Clock, Code, Error, LedgerEntry, ModelRef, PipelineName, RunId, StageId, TenantId, Usd,
    cache::{CacheKey, CacheScope, CacheTier},
    pipeline::{CacheMode, Message, OutputFormat, Params},
};
use stagegate_telemetry::Metrics;
use tokio::time::Instant;

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
    /// With the cache off, the answer is kept for this run alone.
    pub run: RunId,
    /// How the cache is used.
    pub cache_mode: CacheMode,
    /// How long the answer may be reused.
    pub cache_ttl: Duration,
    /// When the answer must be there.
    pub deadline: Instant,
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
    /// The last model's error.
    pub code: Code,
    /// A sentence, without prompts or keys.
    pub message: String,
    /// Whether the same call may succeed later.
    pub retryable: bool,
    /// What the provider asked for, in whichever form it did.
    pub retry_after: Option<Duration>,
    /// An answer that came but cannot be used (truncated, malformed), so that a critique can name it.
    pub partial: Option<String>,
    /// The calls that failed, in order.
    pub calls: Vec<LedgerEntry>,
}

/// The model layer. Shared by every run.
#[derive(Debug)]
pub struct Llm {}

impl Llm {
    /// From the configuration. `tier` is the shared cache: Redis, the SQLite file, or none.
    pub fn new(
        _config: &config::LlmConfig,
        _tier: Option<Arc<dyn CacheTier>>,
        _metrics: Metrics,
        _clock: Arc<dyn Clock>,
    ) -> Result<Self, Error> {
        unimplemented!()
    }

    /// Whether some configured provider serves the model; else [`Code::UnknownModel`] or [`Code::ProviderWithoutKey`]
    /// with what to configure.
    pub fn check_model(&self, _model: &ModelRef) -> Result<(), Error> {
        unimplemented!()
    }

    /// The worst case of one call to the dearest model of the chain; None where a model has no price.
    pub fn worst_case(&self, _request: &Request) -> Option<Usd> {
        unimplemented!()
    }

    /// What the call would probably cost with so many output tokens; None where the first model has no price.
    pub fn estimate(&self, _request: &Request, _output_tokens: u64) -> Option<Usd> {
        unimplemented!()
    }

    /// What so many tokens would cost at the first model's price; None where it has none.
    pub fn estimate_tokens(&self, _models: &[ModelRef], _input_tokens: u64, _output_tokens: u64) -> Option<Usd> {
        unimplemented!()
    }

    /// Asks. Dropping the future abandons the call (a coalesced one goes on for the others).
    pub async fn complete(&self, _context: &CallContext, _request: &Request) -> Result<Reply, CallError> {
        unimplemented!()
    }

    /// The cached answer of the first model, if there is one. Never calls a provider.
    pub async fn peek(&self, _context: &CallContext, _request: &Request) -> Option<Reply> {
        unimplemented!()
    }

    /// Stores an answer under another request too: the one whose attempts led to it.
    pub async fn remember(&self, _context: &CallContext, _request: &Request, _reply: &Reply) {
        unimplemented!()
    }

    /// Removes an answer: its gate failed.
    pub async fn evict(&self, _tenant: &TenantId, _key: CacheKey) {
        unimplemented!()
    }

    /// Makes every answer in a scope stale.
    pub async fn invalidate(&self, _tenant: &TenantId, _scope: &CacheScope) -> Result<(), Error> {
        unimplemented!()
    }

    /// The providers and the shared cache, for `/readyz` and `/health`.
    pub async fn health(&self) -> LlmHealth {
        unimplemented!()
    }
}

impl stagegate_core::pipeline::Models for Llm {
    fn check(&self, model: &ModelRef) -> Result<(), Error> {
        self.check_model(model)
    }

    fn is_priced(&self, _model: &ModelRef) -> bool {
        unimplemented!()
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
}

#[expect(dead_code, reason = "the skeleton names what the parts will need")]
type Parts = (Arc<dyn CacheTier>, Arc<dyn Clock>, Metrics);
