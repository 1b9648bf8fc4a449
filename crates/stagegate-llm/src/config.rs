//! The model layer's part of the configuration.

use std::{collections::BTreeMap, time::Duration};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use stagegate_core::{Code, Secret, Violation, pipeline::Span};

use crate::{prices::Prices, providers};

/// Providers, prices, cache and breaker.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LlmConfig {
    /// The providers by name; the name is the part before the slash of a model (`openai/gpt-5-mini`). `openai`,
    /// `anthropic`, `gemini` and `sim` are there without being named.
    pub providers: BTreeMap<String, ProviderConfig>,
    /// Prices by model (`provider/model`), beside and above the table that ships.
    pub prices: BTreeMap<String, Price>,
    /// The largest answer that is read from a provider, in bytes.
    pub answer_max_bytes: usize,
    /// The size of the cache in this process, in bytes of answers.
    pub local_cache_max_bytes: u64,
    /// How long a shared cache may take to answer before a call goes on without it.
    pub shared_cache_timeout: Span,
    /// How long a replica that is cut off from the shared cache may miss an invalidation: after that, it uses an answer in
    /// its own memory only while the answer is younger than this.
    pub shared_cache_window: Span,
    /// When a failing model is spared.
    pub breaker: BreakerConfig,
    /// The longest wait that a provider gets when it asks for one (`Retry-After`); a longer one is cut to this.
    pub retry_after_max: Span,
}

impl Default for LlmConfig {
    fn default() -> Self {
        Self {
            providers: BTreeMap::new(),
            prices: BTreeMap::new(),
            answer_max_bytes: 4 * 1024 * 1024,
            local_cache_max_bytes: 64 * 1024 * 1024,
            shared_cache_timeout: Span(Duration::from_millis(250)),
            shared_cache_window: Span(Duration::from_mins(1)),
            breaker: BreakerConfig::default(),
            retry_after_max: Span(Duration::from_mins(5)),
        }
    }
}

impl LlmConfig {
    /// What types cannot say: every mistake at once, each at its key.
    pub fn violations(&self) -> Vec<Violation> {
        let mut violations = self.own_violations();
        violations.extend(providers::violations(self));
        violations.extend(Prices::new(self).err().into_iter().flat_map(|error| error.violations));
        violations
    }

    /// The same of everything but the providers and the prices.
    fn own_violations(&self) -> Vec<Violation> {
        let BreakerConfig { window_calls, min_calls, failure_rate, open_for: _, slow_call: _ } = &self.breaker;
        let mistakes = [
            (self.answer_max_bytes == 0, "answer_max_bytes", "no answer could ever be read", "write 1 or more"),
            (*window_calls == 0, "breaker.window_calls", "no call would count", "write 1 or more"),
            (
                min_calls > window_calls,
                "breaker.min_calls",
                "so many calls never stand in the window: the breaker would never open",
                "write at most `breaker.window_calls`",
            ),
            (
                !(*failure_rate > 0.0 && *failure_rate <= 1.0),
                "breaker.failure_rate",
                "a share is a number above 0 and up to 1",
                "write, for example, 0.5 for half of the calls",
            ),
        ];
        mistakes
            .into_iter()
            .filter(|(wrong, ..)| *wrong)
            .map(|(_, key, message, mend)| {
                Violation::new(Code::InvalidConfig, format!("llm.{key}"), message).mend(mend)
            })
            .collect()
    }
}

/// A provider of models.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProviderConfig {
    /// Which protocol it speaks.
    pub kind: ProviderKind,
    /// Where it listens; default: the vendor's own address. With or without the version and the endpoint's own path, with a
    /// path before them, and with a query, which is sent along; docs/providers.md has an example for each vendor.
    #[serde(default)]
    pub base_url: Option<String>,
    /// Its key. Default: the vendor's usual environment variable (`OPENAI_API_KEY`, `ANTHROPIC_API_KEY`,
    /// `GEMINI_API_KEY`). A server with a base URL of its own needs none.
    #[serde(default)]
    pub api_key: Option<Secret>,
    /// The header that takes the key: `authorization` (as `Bearer KEY`), `x-api-key`, `api-key`, or any other one. Default: as
    /// its protocol has it, and `api-key` at Azure.
    #[serde(default)]
    pub key_header: Option<String>,
    /// Further headers of each call. In a variable's name, `_` stands for `-`.
    #[serde(default)]
    pub headers: BTreeMap<String, Secret>,
    /// Calls under way at once, at most. Further calls wait for their turn, tenant by tenant; the wait uses up neither an
    /// attempt nor `timeout`.
    #[serde(default = "default_max_concurrency")]
    pub max_concurrency: usize,
    /// What its server knows of its protocol. Default: found out, model by model, from what it refuses.
    #[serde(default)]
    pub dialect: DialectConfig,
    /// How the simulator behaves; for `kind = "sim"` only.
    #[serde(default)]
    pub sim: SimConfig,
}

impl ProviderConfig {
    /// A provider of a kind, with nothing said beside that.
    pub fn new(kind: ProviderKind) -> Self {
        Self {
            kind,
            base_url: None,
            api_key: None,
            key_header: None,
            headers: BTreeMap::new(),
            max_concurrency: DEFAULT_MAX_CONCURRENCY,
            dialect: DialectConfig::default(),
            sim: SimConfig::default(),
        }
    }
}

/// What a server knows of its protocol. What is `auto` is found out: where a server refuses a request and names what it does
/// not know, the request is mended and sent again in the same call, and the finding is remembered for that model until the
/// process ends. `/health` tells it. What is set here holds for all models of the provider, and is never changed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DialectConfig {
    /// How the longest answer is called; for `kind = "openai"` only.
    pub limit: LimitKey,
    /// How JSON is asked for.
    pub json: JsonForm,
    /// Who says the system messages.
    pub system: SystemRole,
    /// The messages must hold the word "json" where JSON is asked for as an object. `false`: only where a server says so.
    pub say_json: bool,
    /// Parameters that are never sent. With `stop`, answers are cut at its texts here.
    pub leave_out: Vec<Sampling>,
}

/// How the longest answer is called.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LimitKey {
    /// `max_completion_tokens` at OpenAI itself, else `max_tokens`, until a server says otherwise.
    #[default]
    Auto,
    /// `max_tokens`.
    MaxTokens,
    /// `max_completion_tokens`.
    MaxCompletionTokens,
}

/// How JSON is asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum JsonForm {
    /// By its schema, until a server says that it does not know that.
    #[default]
    Auto,
    /// By its schema: `response_format: json_schema`, a forced tool (Anthropic), `responseJsonSchema` (Gemini).
    Schema,
    /// As any object, with the schema in the messages: `response_format: json_object`, `responseMimeType` (Gemini).
    Object,
    /// In the messages alone.
    Words,
}

/// Who says the system messages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SystemRole {
    /// The system, until a server says that it does not know that role.
    #[default]
    Auto,
    /// The system.
    System,
    /// The developer; for `kind = "openai"` only.
    Developer,
    /// The user, at the beginning of what the user says.
    User,
}

/// A parameter that not every model takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Sampling {
    /// `params.temperature`.
    Temperature,
    /// `params.top_p`.
    TopP,
    /// `params.seed`.
    Seed,
    /// `params.stop`.
    Stop,
    /// `params.frequency_penalty`.
    FrequencyPenalty,
    /// `params.presence_penalty`.
    PresencePenalty,
    /// `params.logit_bias`.
    LogitBias,
    /// `params.reasoning`.
    Reasoning,
}

/// Calls under way at once to a provider whose configuration does not say otherwise.
pub const DEFAULT_MAX_CONCURRENCY: usize = 64;

fn default_max_concurrency() -> usize {
    DEFAULT_MAX_CONCURRENCY
}

/// Which protocol a provider speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ProviderKind {
    /// OpenAI's chat completions, and every server that is compatible with them.
    Openai,
    /// Anthropic's messages.
    Anthropic,
    /// Google's Gemini.
    Gemini,
    /// The simulator: needs no key, and says in every answer that it is simulated.
    Sim,
}

impl ProviderKind {
    /// As it stands in the configuration, in metrics and in `/health`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Openai => "openai",
            Self::Anthropic => "anthropic",
            Self::Gemini => "gemini",
            Self::Sim => "sim",
        }
    }
}

/// How the simulator behaves.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SimConfig {
    /// The seed of its answers, latencies and faults.
    pub seed: u64,
    /// The median time of an answer.
    pub latency: Span,
    /// The share of calls, 0 to 1, that fail with a fault drawn from every kind that real providers have.
    pub fault_rate: f64,
    /// The share of judged outputs, 0 to 1, that the simulated judge finds lacking at the first attempt.
    pub first_attempt_fail_rate: f64,
}

impl Default for SimConfig {
    fn default() -> Self {
        Self { seed: 1, latency: Span(Duration::from_millis(300)), fault_rate: 0.0, first_attempt_fail_rate: 0.0 }
    }
}

/// US dollars per million tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Price {
    /// Prompt tokens.
    pub input: f64,
    /// Answer tokens, reasoning included.
    pub output: f64,
    /// Prompt tokens read from the provider's cache. Default: as `input`.
    #[serde(default)]
    pub cache_read: Option<f64>,
    /// Prompt tokens written to the provider's cache. Default: as `input`.
    #[serde(default)]
    pub cache_write: Option<f64>,
}

/// When a failing model is spared: a sliding window of calls per provider and model.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BreakerConfig {
    /// How many of the last calls count.
    pub window_calls: usize,
    /// Calls needed before it may open.
    pub min_calls: usize,
    /// The share of failures, 0 to 1, at which it opens.
    pub failure_rate: f64,
    /// How long it stays open before a few calls probe the model.
    pub open_for: Span,
    /// A call that a stage's `timeout` ended counts as a failure only if the model had this long to answer. A call that
    /// probes leaves its place to another one after this time.
    pub slow_call: Span,
}

impl Default for BreakerConfig {
    fn default() -> Self {
        Self {
            window_calls: 20,
            min_calls: 10,
            failure_rate: 0.5,
            open_for: Span(Duration::from_secs(10)),
            slow_call: Span(Duration::from_secs(30)),
        }
    }
}
