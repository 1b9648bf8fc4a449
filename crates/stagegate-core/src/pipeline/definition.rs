//! The definition as its author writes it: owns its keys, their defaults and the published JSON Schema. Never
//! holds anything resolved; that is [`super::Pipeline`].

use std::{collections::BTreeMap, fmt, str::FromStr, time::Duration};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{ModelRef, PipelineName, StageId, Usd};

/// A pipeline: a DAG of stages, each gated, checkpointed, cached and metered.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Definition {
    /// The pipeline's name, unique within its tenant.
    pub name: PipelineName,
    /// What it is for, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 2000))]
    pub description: Option<String>,
    /// A JSON Schema of the input. A run whose input does not fit is refused. Default: any JSON object.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<Value>,
    /// What holds for each stage that does not say otherwise.
    #[serde(default)]
    pub defaults: Defaults,
    /// What one run may spend.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<Budget>,
    /// How long a run may take from its acceptance (or its `start_at`), holds included; then it expires. Default: 24h.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Span>,
    /// How many runs are under way at once. Default: as many as there is room for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<Concurrency>,
    /// How long what has ended is kept. Default: as the replica's configuration says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<Retention>,
    /// The stages, in any order.
    #[schemars(length(min = 1, max = 100))]
    pub stages: Vec<StageDefinition>,
    /// The run's output: any JSON whose strings are templates. Default: the outputs of the last stages, by id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<Value>,
}

/// What holds for each stage that does not say otherwise.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Defaults {
    /// The model, or a fallback chain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelChain>,
    /// Sampling parameters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub params: Option<Params>,
    /// How often, and with which pauses, a stage is tried.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<Retry>,
    /// How long one model call may take, from when its request is sent; then the next model of the chain is asked.
    /// Waiting for a slot does not count. Default: 60s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Span>,
    /// Whether and how long answers are reused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<Cache>,
}

/// A node of the DAG. It has exactly one of `prompt`, `messages` and `transform`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("oneOf" = [
    {"required": ["prompt"]}, {"required": ["prompt_file"]}, {"required": ["messages"]}, {"required": ["transform"]}
]))]
pub struct StageDefinition {
    /// The stage's id, unique within the pipeline.
    pub id: StageId,
    /// What it is for, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 2000))]
    pub description: Option<String>,
    /// The stages whose outputs it uses; it starts once their checkpoints are durable.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100))]
    pub needs: Vec<StageId>,
    /// A template that becomes the one user message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 131_072))]
    pub prompt: Option<String>,
    /// A template that becomes the system message before `prompt`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 131_072))]
    pub system: Option<String>,
    /// A file that holds the prompt, by its path below the definition's directory. Instead of `prompt`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 255))]
    pub prompt_file: Option<String>,
    /// A file that holds the system message. Instead of `system`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 255))]
    pub system_file: Option<String>,
    /// The whole conversation as templates, or made from data with `{ from: expression }`; instead of `prompt`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub messages: Option<Messages>,
    /// A template whose text is the output itself: no model is called. Instead of `prompt`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 131_072))]
    pub transform: Option<String>,
    /// The model, or a fallback chain that is tried in order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelChain>,
    /// Sampling parameters; each one given here replaces the default's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub params: Option<Params>,
    /// Which of several answers to the same prompt: each number has an answer of its own, also in the cache, so that stages
    /// that ask the same get different ones (best of n). 0 where it is not given.
    #[serde(default, skip_serializing_if = "is_first")]
    #[schemars(range(max = 1_000_000))]
    pub sample: u32,
    /// What the answer must be: `text` (the default), `json`, or `{ schema: … }`.
    #[serde(default)]
    pub output: Output,
    /// What the output must pass before it becomes a checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gate: Option<Gate>,
    /// How often, and with which pauses, it is tried.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<Retry>,
    /// How long one model call may take, from when its request is sent; then the next model of the chain is asked.
    /// Waiting for a slot does not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Span>,
    /// Whether and how long its answers are reused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<Cache>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_first(sample: &u32) -> bool {
    *sample == 0
}

/// A conversation: a list of messages, or where it comes from.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Messages {
    /// Each message as a template.
    List(#[schemars(length(min = 1, max = 100))] Vec<MessageTemplate>),
    /// Made from data.
    From(MessagesFrom),
}

/// `{ from: expression }`
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MessagesFrom {
    /// An expression that gives a list of `{ role, content }`, such as `input.history`.
    #[schemars(length(min = 1, max = 10_000))]
    pub from: String,
}

/// One message of a conversation.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MessageTemplate {
    /// Who speaks.
    pub role: Role,
    /// A template.
    #[schemars(length(max = 131_072))]
    pub content: String,
}

/// Who speaks in a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions that stand above the conversation.
    System,
    /// The one who asks.
    User,
    /// The model.
    Assistant,
}

/// A model, or a list that is tried in order when one fails.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum ModelChain {
    /// One model: `openai/gpt-5-mini`.
    One(ModelRef),
    /// A fallback chain.
    Chain(#[schemars(length(min = 1, max = 8))] Vec<ModelRef>),
}

impl ModelChain {
    /// The models in order.
    pub fn models(&self) -> &[ModelRef] {
        match self {
            Self::One(model) => std::slice::from_ref(model),
            Self::Chain(models) => models,
        }
    }
}

/// Sampling parameters. What is absent is left to the provider.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Params {
    /// 0 to 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 2.0))]
    pub temperature: Option<f64>,
    /// 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub top_p: Option<f64>,
    /// The longest answer, in tokens. Default: 4096 where the provider demands one and for budgets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_output_tokens: Option<u32>,
    /// For providers that sample reproducibly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    /// Texts at which the answer ends.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 4), inner(length(min = 1, max = 256)))]
    pub stop: Vec<String>,
    /// Makes words that were said often less likely: -2 to 2. Anthropic has no such thing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = -2.0, max = 2.0))]
    pub frequency_penalty: Option<f64>,
    /// Makes words that were said at all less likely: -2 to 2. Anthropic has no such thing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = -2.0, max = 2.0))]
    pub presence_penalty: Option<f64>,
    /// Makes tokens, by their numbers, more or less likely: -100 to 100. For OpenAI's dialect alone.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(length(max = 300), extend("additionalProperties" = { "type": "number", "minimum": -100, "maximum": 100 }))]
    pub logit_bias: BTreeMap<String, f64>,
    /// How much a model reasons before it answers, where it can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<Reasoning>,
    /// Keys that are passed on to the provider as they are, beside the request's own. At most 50 keys and 16 KiB.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    #[schemars(length(max = 50))]
    pub extra: serde_json::Map<String, Value>,
}

/// How much a model reasons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Reasoning {
    /// The effort: `none`, `minimal`, `low`, `medium`, `high`.
    pub effort: Effort,
}

/// How much effort goes into reasoning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Effort {
    /// No reasoning.
    None,
    /// As little as there is.
    Minimal,
    /// A little.
    Low,
    /// Some.
    Medium,
    /// Much.
    High,
}

impl Effort {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Minimal => "minimal",
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
        }
    }
}

/// What a stage's answer must be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Output {
    /// `text` or `json`.
    Word(OutputWord),
    /// A JSON value that fits a schema.
    Schema(OutputSchema),
}

impl Default for Output {
    fn default() -> Self {
        Self::Word(OutputWord::Text)
    }
}

/// `text` or `json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OutputWord {
    /// Text as it comes.
    Text,
    /// Any JSON value.
    Json,
}

/// `{ schema: … }`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OutputSchema {
    /// The JSON Schema (2020-12) that the answer must fit.
    #[serde(default)]
    pub schema: Value,
    /// A file that holds it, in JSON or YAML.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 255))]
    pub schema_file: Option<String>,
}

/// What an output must pass: deterministic checks first, a judge only if they pass.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Gate {
    /// Deterministic checks, all of which must pass.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 50))]
    pub checks: Vec<Check>,
    /// An LLM that scores the output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub judge: Option<Judge>,
    /// What to do when it passes: `pass` (the default), or `hold` for a person who approves each output. With `hold`, an
    /// `accept` below holds as well.
    #[serde(default, skip_serializing_if = "OnPass::is_default")]
    pub on_pass: OnPass,
    /// What to do when it fails.
    #[serde(default)]
    pub on_fail: OnFail,
    /// What to do when it fails and `retry` has no attempt left.
    #[serde(default)]
    pub on_exhausted: OnExhausted,
}

/// One deterministic check: a map with a single key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// At least so many characters.
    MinChars(u32),
    /// At most so many characters.
    MaxChars(u32),
    /// A regular expression that must match somewhere.
    Matches(#[schemars(length(min = 1, max = 10_000))] String),
    /// A regular expression that must match nowhere.
    NotMatches(#[schemars(length(min = 1, max = 10_000))] String),
    /// A text that must stand in it.
    Contains(#[schemars(length(min = 1, max = 10_000))] String),
    /// A text that must not stand in it.
    NotContains(#[schemars(length(min = 1, max = 10_000))] String),
    /// A JSON Schema that the (JSON) output must fit.
    Schema(Value),
    /// An expression over `output`, `input` and `stages` that must be true.
    Expression(#[schemars(length(min = 1, max = 10_000))] String),
}

/// An LLM that scores the output against a rubric, or as its own prompt says; its verdict is cached like any other answer.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Judge {
    /// A template that says what a good output is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 131_072))]
    pub rubric: Option<String>,
    /// The whole prompt as a template, instead of `rubric`. It sees `output`, `input` and `stages`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 131_072))]
    pub prompt: Option<String>,
    /// The system message as a template, instead of the usual one. The form of the verdict is added to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 131_072))]
    pub system: Option<String>,
    /// A file that holds the rubric. Instead of `rubric`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 255))]
    pub rubric_file: Option<String>,
    /// A file that holds the prompt. Instead of `prompt`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 255))]
    pub prompt_file: Option<String>,
    /// A file that holds the system message. Instead of `system`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 255))]
    pub system_file: Option<String>,
    /// What it scores on: `0..1` (the default), `1..5`, or `pass_fail`.
    #[serde(default, skip_serializing_if = "Scale::is_default")]
    pub scale: Scale,
    /// The lowest score that passes, on the judge's scale. Default: 0.7 of `0..1`, 4 of `1..5`. `pass_fail` has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 5.0))]
    pub threshold: Option<f64>,
    /// The judging model, or a fallback chain. Default: the stage's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelChain>,
    /// The judge's own parameters; the stage's are not used. Default: `max_output_tokens: 8192`, with room for reasoning; for
    /// a judge that has only `rubric`, `threshold` and `model`: 1024, and 8192 once that has cut its answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub params: Option<Params>,
}

impl Judge {
    /// The lowest score that passes, on its scale.
    pub fn threshold(&self) -> f64 {
        self.threshold.unwrap_or_else(|| self.scale.default_threshold())
    }

    /// Its parameters, with what is left out.
    pub fn params(&self) -> Params {
        let max = if self.is_plain() { PLAIN_JUDGE_MAX_OUTPUT_TOKENS } else { JUDGE_MAX_OUTPUT_TOKENS };
        self.params_within(max)
    }

    /// The same with room for an answer that these have cut. None where they have that room, or the definition says how
    /// long a verdict may be.
    pub fn params_with_room(&self) -> Option<Params> {
        self.is_plain().then(|| self.params_within(JUDGE_MAX_OUTPUT_TOKENS))
    }

    fn params_within(&self, max_output_tokens: u32) -> Params {
        let mut params = self.params.clone().unwrap_or_default();
        params.max_output_tokens.get_or_insert(max_output_tokens);
        params
    }

    /// Whether it has only keys that every release knows. Its first request is the one that these releases make, so that
    /// they share its cached verdicts.
    fn is_plain(&self) -> bool {
        self.prompt.is_none() && self.system.is_none() && self.scale == Scale::Unit && self.params.is_none()
    }
}

/// The longest verdict where a definition does not say, in tokens: a few lines, and room to reason before them.
const JUDGE_MAX_OUTPUT_TOKENS: u32 = 8_192;
/// The same at first, for a judge that has no newer key.
const PLAIN_JUDGE_MAX_OUTPUT_TOKENS: u32 = 1_024;

/// What a judge scores on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Scale {
    /// Any number from 0 to 1.
    #[default]
    #[serde(rename = "0..1")]
    Unit,
    /// A whole number from 1 to 5.
    #[serde(rename = "1..5")]
    OneToFive,
    /// Pass or fail.
    #[serde(rename = "pass_fail")]
    PassFail,
}

impl Scale {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
    fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// The lowest and the highest score.
    pub fn range(self) -> (f64, f64) {
        match self {
            Self::Unit | Self::PassFail => (0.0, 1.0),
            Self::OneToFive => (1.0, 5.0),
        }
    }

    /// The lowest score that passes, where a definition does not say.
    pub fn default_threshold(self) -> f64 {
        match self {
            Self::Unit => 0.7,
            Self::OneToFive => 4.0,
            Self::PassFail => 1.0,
        }
    }

    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unit => "0..1",
            Self::OneToFive => "1..5",
            Self::PassFail => "pass_fail",
        }
    }
}

/// What to do when a gate passes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnPass {
    /// Take the output.
    #[default]
    Pass,
    /// Wait for a person to approve or reject each output.
    Hold,
}

impl OnPass {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// What to do when a gate fails.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnFail {
    /// Try again with the critique, while attempts are left.
    #[default]
    Retry,
    /// Wait for a person to approve or reject.
    Hold,
    /// Take it, flagged.
    Accept,
    /// Fail the stage and the run.
    Fail,
}

/// What to do when a gate fails and no attempt is left.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnExhausted {
    /// Fail the stage and the run.
    #[default]
    Fail,
    /// Wait for a person to approve or reject.
    Hold,
    /// Take the last output, flagged.
    Accept,
}

/// How often, how long and with which pauses a stage is tried. One loop serves failed calls and failed gates alike.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Retry {
    /// Answers that are judged, the first included: a failed gate and an answer that cannot be used count. An outage
    /// (no connection, a rate limit, an error of the provider's, no answer within `timeout`) does not.
    #[serde(default = "default_max_attempts")]
    #[schemars(range(min = 1, max = 20))]
    pub max_attempts: u32,
    /// The pause after a failed call: from the first to the longest, doubling, with jitter. A failed gate is
    /// retried at once.
    #[serde(default)]
    pub backoff: Backoff,
    /// How long an outage is waited out, from its first failed call to its last; the run's deadline ends it earlier.
    /// Default: 15m.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_wait: Option<Span>,
}

impl Retry {
    /// How long an outage is waited out.
    pub fn max_wait(&self) -> Duration {
        self.max_wait.map_or(DEFAULT_MAX_WAIT, |span| span.0)
    }
}

/// How long an outage is waited out where a definition does not say.
const DEFAULT_MAX_WAIT: Duration = Duration::from_mins(15);

fn default_max_attempts() -> u32 {
    3
}

impl Default for Retry {
    fn default() -> Self {
        Self { max_attempts: default_max_attempts(), backoff: Backoff::default(), max_wait: None }
    }
}

/// Whether and how long answers are reused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Cache {
    /// How long an answer may be reused.
    #[serde(default = "default_cache_ttl")]
    pub ttl: Span,
    /// `use`, `refresh`, `read_only` or `off`.
    #[serde(default)]
    pub mode: CacheMode,
}

fn default_cache_ttl() -> Span {
    Span(Duration::from_hours(24))
}

impl Default for Cache {
    fn default() -> Self {
        Self { ttl: default_cache_ttl(), mode: CacheMode::Use }
    }
}

/// How the response cache is used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CacheMode {
    /// Read and write.
    #[default]
    Use,
    /// Do not read, but write: buys anew and replaces.
    Refresh,
    /// Read, but never write.
    ReadOnly,
    /// Neither; the answer is kept for its run alone, so that a crash does not buy it twice.
    Off,
}

/// What one run may spend.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// US dollars. A call starts only if its worst case still fits.
    #[schemars(extend("exclusiveMinimum" = 0, "maximum" = 1_000_000_000))]
    pub max_cost_usd: Usd,
}

/// How many runs of a pipeline are under way at once, over all replicas. What is over a limit waits in the queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("anyOf" = [{"required": ["max_runs"]}, {"required": ["key"]}]))]
pub struct Concurrency {
    /// Runs of this pipeline, all of its versions together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_runs: Option<u32>,
    /// An expression over the input, such as `input.customer`: runs that give the same value share a limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 10_000))]
    pub key: Option<String>,
    /// Runs with the same key. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_runs_per_key: Option<u32>,
}

/// How long runs are kept after their end. What is left out is as the replica's configuration says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Retention {
    /// Runs that succeeded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub succeeded: Option<Span>,
    /// Runs that failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<Span>,
    /// Runs that were cancelled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cancelled: Option<Span>,
    /// Runs that expired.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expired: Option<Span>,
    /// Inputs and outputs, whatever the run's state; the run's record stays as long as its state says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub payloads: Option<Span>,
}

/// A length of time: `250ms`, `30s`, `5m`, `24h`, `7d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Span(pub Duration);

/// The longest time that a definition may name.
pub const SPAN_MAX: Duration = Duration::from_hours(366 * 24);

/// Why a text is no length of time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a length of time: write a number and a unit, such as `250ms`, `30s`, `5m`, `24h` or `7d`")]
pub struct InvalidSpan(String);

impl FromStr for Span {
    type Err = InvalidSpan;
    fn from_str(text: &str) -> Result<Self, InvalidSpan> {
        let invalid = || InvalidSpan(text.chars().take(40).collect());
        let span = humantime::parse_duration(text).map_err(|_| invalid())?;
        if span.is_zero() || span > SPAN_MAX { Err(invalid()) } else { Ok(Self(span)) }
    }
}

impl TryFrom<String> for Span {
    type Error = InvalidSpan;
    fn try_from(text: String) -> Result<Self, InvalidSpan> {
        text.parse()
    }
}

impl From<Span> for String {
    fn from(span: Span) -> String {
        span.to_string()
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const DAY: Duration = Duration::from_hours(24);
        // What is said in days stays so: a month of 30.44 days is nobody's word.
        match u32::try_from(self.0.as_secs() / DAY.as_secs()) {
            Ok(days) if days > 30 && DAY * days == self.0 => write!(f, "{days}d"),
            _ => humantime::format_duration(self.0).fmt(f),
        }
    }
}

impl JsonSchema for Span {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Span".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "format": "span",
            "pattern": r"^ *([0-9]+ *[a-z]+ *)+$",
            "description": "A length of time: a number and a unit, such as `250ms`, `30s`, `5m`, `24h` or `7d`"
        })
    }
}

/// A growing pause: `1s..30s`, from the first to the longest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Backoff {
    /// The first pause.
    pub first: Duration,
    /// The longest pause.
    pub longest: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { first: Duration::from_secs(1), longest: Duration::from_secs(30) }
    }
}

impl TryFrom<String> for Backoff {
    type Error = InvalidSpan;
    fn try_from(text: String) -> Result<Self, InvalidSpan> {
        let (first, longest) = text.split_once("..").ok_or_else(|| InvalidSpan(text.chars().take(40).collect()))?;
        let (first, longest) = (first.trim().parse::<Span>()?.0, longest.trim().parse::<Span>()?.0);
        if first > longest {
            return Err(InvalidSpan(text));
        }
        Ok(Self { first, longest })
    }
}

impl From<Backoff> for String {
    fn from(backoff: Backoff) -> String {
        format!("{}..{}", Span(backoff.first), Span(backoff.longest))
    }
}

impl JsonSchema for Backoff {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Backoff".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "format": "backoff",
            "pattern": r"^[0-9a-z ]+\.\.[0-9a-z ]+$",
            "description": "The pause after a failed call, from the first to the longest: `1s..30s`"
        })
    }
}

/// Labels that a run carries, for filters and for people.
pub type Labels = BTreeMap<String, String>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_as_people_write_them() {
        assert_eq!("250ms".parse(), Ok(Span(Duration::from_millis(250))));
        for bad in ["", "5", "0s", "1000d", "soon"] {
            assert!(bad.parse::<Span>().is_err(), "{bad}");
        }
        let backoff = Backoff::try_from("1s..30s".to_owned()).expect("valid");
        assert_eq!((backoff.first.as_secs(), backoff.longest.as_secs()), (1, 30));
        assert!(Backoff::try_from("30s..1s".to_owned()).is_err());
    }

    #[test]
    fn an_output_is_a_word_or_a_schema() {
        let read = |json| serde_json::from_value::<Output>(json);
        assert_eq!(read(serde_json::json!("text")).expect("text"), Output::default());
        assert_eq!(read(serde_json::json!("json")).expect("json"), Output::Word(OutputWord::Json));
        assert!(matches!(read(serde_json::json!({"schema": {}})), Ok(Output::Schema(_))));
        assert!(read(serde_json::json!("xml")).is_err());
    }
}
