//! OpenAI's chat completions, and every server that is compatible with them (local ones, gateways, other vendors): owns that protocol's request and response shapes.
//!
//! `POST …/chat/completions` ([`super::address`] has the rest of the address). OpenAI itself is told `max_completion_tokens`, which its reasoning models demand;
//! every other address is told `max_tokens`, which compatible servers have known for longer.

use std::{borrow::Cow, collections::BTreeMap, time::Duration};

use ::http::StatusCode;
use async_trait::async_trait;
use serde::{Deserialize, Serialize, Serializer, de::IgnoredAny, ser::SerializeMap as _};
use serde_json::Value;
use stagegate_core::{
    Code, Usage,
    pipeline::{OutputFormat, Role},
};

use super::{
    Parts,
    dialect::{self, Dialect, Dialects, Sent},
    http::{self, Endpoint, Exchange, malformed, paid, retryable, unusable},
    retry_after,
    words::{self, Told},
};
use crate::{
    config::{DialectConfig, JsonForm, LimitKey, Sampling, SystemRole},
    provider::{Answer, Finish, Limits, Provider, ProviderError, ProviderRequest},
};

/// A chat completions server.
#[derive(Debug)]
pub(super) struct OpenAi {
    name: String,
    endpoint: Endpoint,
    is_vendor: bool,
    is_configured: bool,
    dialects: Dialects,
}

impl OpenAi {
    pub(super) fn new(parts: Parts) -> Self {
        let is_configured = parts.is_configured();
        let Parts { name, endpoint, plan, dialect, .. } = parts;
        Self { name, endpoint, is_vendor: plan.place.is_openai, is_configured, dialects: Dialects::new(dialect) }
    }

    fn body<'a>(&self, request: &ProviderRequest<'a>, dialect: &Dialect) -> Body<'a> {
        let params = request.params;
        let limit = params.max_output_tokens;
        let is_new = self.limit_key(dialect) == LimitKey::MaxCompletionTokens;
        Body {
            model: request.model,
            messages: messages(request, dialect),
            max_completion_tokens: limit.filter(|_| is_new),
            max_tokens: limit.filter(|_| !is_new),
            temperature: dialect::kept(dialect, Sampling::Temperature, params.temperature),
            top_p: dialect::kept(dialect, Sampling::TopP, params.top_p),
            seed: dialect::kept(dialect, Sampling::Seed, params.seed),
            stop: dialect::kept_stop(dialect, params),
            frequency_penalty: dialect::kept(dialect, Sampling::FrequencyPenalty, params.frequency_penalty),
            presence_penalty: dialect::kept(dialect, Sampling::PresencePenalty, params.presence_penalty),
            logit_bias: dialect::kept(
                dialect,
                Sampling::LogitBias,
                Some(&params.logit_bias).filter(|bias| !bias.is_empty()),
            ),
            reasoning_effort: dialect::kept(dialect, Sampling::Reasoning, params.reasoning)
                .map(|reasoning| reasoning.effort.as_str()),
            extra: &params.extra,
            response_format: match (request.format, dialect.json) {
                (OutputFormat::Text, _) | (_, JsonForm::Words) => None,
                (_, JsonForm::Object) => Some(ResponseFormat(None)),
                (OutputFormat::Json { schema }, _) => Some(ResponseFormat(schema.as_deref())),
            },
        }
    }

    fn limit_key(&self, dialect: &Dialect) -> LimitKey {
        match dialect.limit {
            LimitKey::Auto if self.is_vendor => LimitKey::MaxCompletionTokens,
            LimitKey::Auto => LimitKey::MaxTokens,
            set => set,
        }
    }

    /// What of the request could be said otherwise.
    fn sent(&self, request: &ProviderRequest<'_>, dialect: &Dialect) -> Sent {
        let has_system = request.messages.iter().any(|message| message.role == Role::System);
        Sent {
            limit: request.params.max_output_tokens.map(|_| self.limit_key(dialect)),
            json: match (request.format, dialect.json) {
                (OutputFormat::Text, _) => None,
                (OutputFormat::Json { schema: None }, JsonForm::Auto | JsonForm::Schema) => Some(JsonForm::Object),
                (_, form) => Some(form),
            },
            system: has_system.then_some(dialect.system),
        }
    }

    fn read(&self, exchange: &Exchange) -> Result<Answer, ProviderError> {
        if let Ok(plain) = serde_json::from_slice::<Plain>(&exchange.body)
            && let Some((content, usage)) = plain.whole()
        {
            return Ok(Answer { content, finish: Finish::Stop, usage: Some(usage), limits: limits(exchange) });
        }
        self.read_any(exchange)
    }

    /// Reads an answer of whatever shape.
    fn read_any(&self, exchange: &Exchange) -> Result<Answer, ProviderError> {
        let answer = self.endpoint.json(exchange)?;
        let choice = &answer["choices"][0];
        if words::is_error(&answer) || (choice.is_null() && Told::of(&answer).words().is_some()) {
            return Err(self.error(exchange, &Told::of(&answer)));
        }
        let usage = usage(&answer);
        if words::is_error(choice) {
            return Err(paid(self.error(exchange, &Told::of(choice)), usage));
        }
        let (message, reason) = (&choice["message"], &choice["finish_reason"]);
        // Servers of plain completions have a text in the message's place.
        let content = content(&message["content"]).or_else(|| content(&choice["text"]));
        if content.is_none() && !message.is_object() && reason.is_null() {
            return Err(paid(malformed("the answer has no `choices[0].message`"), usage));
        }
        let finish = match finish(reason) {
            Ok(finish) => finish,
            // What came until then is no whole answer.
            Err(broken) => {
                let message = format!("{}: the answer broke off (`{broken}`)", self.name);
                let error = if broken == "time_limit" { unusable(message) } else { malformed(message) };
                return Err(paid(error, usage));
            }
        };
        let limits = limits(exchange);
        if let Some(refusal) = message["refusal"].as_str().filter(|refusal| !refusal.is_empty()) {
            return Ok(Answer { content: refusal.to_owned(), finish: Finish::Refused, usage, limits });
        }
        let is_blank = content.as_deref().is_none_or(|content| content.trim().is_empty());
        let reasoned = || {
            let says = |key: &str| message[key].as_str().is_some_and(|thoughts| !thoughts.trim().is_empty());
            ["reasoning_content", "reasoning", "thinking"].into_iter().any(says)
                || usage.is_some_and(|usage| usage.reasoning_tokens > 0)
        };
        let finish = match finish {
            Finish::Stop if is_blank && message["tool_calls"][0].is_object() => Finish::other("tool_calls"),
            Finish::Stop if is_blank && reasoned() => Finish::Silent,
            // It answered, and asks for a tool beside it.
            Finish::Other(reason) if !is_blank && matches!(&*reason, "tool_calls" | "function_call") => Finish::Stop,
            Finish::Stop if content.is_none() => {
                let what = if message.is_object() { "message has no content" } else { "choice has no message" };
                let retryable = message.is_object();
                return Err(paid(ProviderError { retryable, ..unusable(format!("the answer's {what}")) }, usage));
            }
            finish => finish,
        };
        Ok(Answer { content: content.unwrap_or_default(), finish, usage, limits })
    }

    fn error(&self, exchange: &Exchange, told: &Told) -> ProviderError {
        let status = status_of(exchange.status, told);
        let kind = KINDS.iter().find(|(words, ..)| told.says(words)).map(|(_, code, may_pass)| (*code, *may_pass));
        let (code, may_pass) = kind.or_else(|| status.map(http::by_status)).unwrap_or((Code::ProviderFailed, true));
        let mut error = self.endpoint.refused(code, &self.name, exchange, told);
        error.answered = kind.is_none() && status.is_none();
        error.limits = limits(exchange);
        if may_pass {
            error.retry_after = exchange.retry_after();
            if code == Code::ProviderRateLimited {
                error.retry_after = error.retry_after.or_else(|| resets(exchange));
            }
            return retryable(error);
        }
        error
    }
}

/// What servers call an error in words, where that says more than the status: what it means, and whether it may pass.
const KINDS: [(&[&str], Code, bool); 6] = [
    (
        &[
            "insufficient_quota",
            "billing_hard_limit_reached",
            "billing_not_active",
            "credit_balance_exhausted",
            "exceeded_current_quota_error",
        ],
        Code::ProviderQuota,
        false,
    ),
    (&["model_not_found"], Code::ProviderModel, false),
    (&["context_length_exceeded", "exceed_context_size_error"], Code::ProviderRejected, false),
    (&["content_filter", "content_policy_violation"], Code::ProviderRefused, false),
    (&["invalid_api_key"], Code::ProviderAuth, false),
    (&["rate_limit_exceeded"], Code::ProviderRateLimited, true),
];

/// Why a choice ended, by the words of OpenAI and of servers that are compatible with it; an error where it broke off.
fn finish(reason: &Value) -> Result<Finish, String> {
    let Some(reason) = reason.as_str() else { return Ok(Finish::Stop) };
    let finish = match reason.to_ascii_lowercase().as_str() {
        "" | "stop" | "eos" | "eos_token" | "end_turn" | "stop_sequence" | "stop_token" | "end" | "complete"
        | "completed" | "finished" | "done" | "success" => Finish::Stop,
        "length" | "max_tokens" | "max_output_tokens" => Finish::Length,
        "content_filter" | "safety" | "refusal" | "blocked" | "sensitive" => Finish::Refused,
        "model_length"
        | "context_length"
        | "context_length_exceeded"
        | "context_window_exceeded"
        | "model_context_window_exceeded" => Finish::ContextFull,
        "pause_turn" => Finish::Paused,
        broken
        @ ("error" | "abort" | "cancelled" | "insufficient_system_resource" | "network_error" | "time_limit") => {
            return Err(broken.to_owned());
        }
        _ => Finish::other(reason),
    };
    Ok(finish)
}

#[async_trait]
impl Provider for OpenAi {
    async fn call(&self, request: ProviderRequest<'_>) -> Result<Answer, ProviderError> {
        if !self.is_configured {
            return Err(http::without_key(&self.name, "OPENAI_API_KEY"));
        }
        let url = self.endpoint.url(request.model);
        let mut talk = self.dialects.talk(request.model);
        loop {
            let body = self.body(&request, &talk.dialect);
            let exchange = self.endpoint.post(url.clone(), &body).await.map_err(|error| http::at(error, &url))?;
            let read = if exchange.status.is_success() {
                self.read(&exchange)
            } else {
                Err(self.error(&exchange, &Told::of_body(&exchange.body)))
            };
            let error = match read {
                Ok(answer) => return Ok(talk.done(&self.name, request.params, answer)),
                Err(error) => error,
            };
            let told = Told::of_body(&exchange.body);
            let status = status_of(exchange.status, &told).map_or(exchange.status.as_u16(), |status| status.as_u16());
            let sent = self.sent(&request, &talk.dialect);
            if error.usage.is_some() || !talk.mend(status, &told, request.params, &sent) {
                return Err(http::at(error, &url));
            }
        }
    }

    fn kind(&self) -> &'static str {
        "openai"
    }

    fn is_configured(&self) -> bool {
        self.is_configured
    }

    fn dialects(&self) -> Vec<(String, DialectConfig)> {
        self.dialects.found()
    }
}

/// A request's body. It borrows what it says, so that a prompt is written once: into the bytes that are sent.
#[derive(Serialize)]
struct Body<'a> {
    model: &'a str,
    messages: Vec<Spoken<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_completion_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<i64>,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    stop: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    frequency_penalty: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    presence_penalty: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logit_bias: Option<&'a BTreeMap<String, f64>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_effort: Option<&'static str>,
    /// Its keys are none of the others: those are refused where a definition is registered.
    #[serde(flatten)]
    extra: &'a serde_json::Map<String, Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    response_format: Option<ResponseFormat<'a>>,
}

/// A message. What the dialect adds to it is the only part that is not borrowed.
#[derive(Serialize)]
struct Spoken<'a> {
    role: &'static str,
    content: Cow<'a, str>,
}

fn messages<'a>(request: &ProviderRequest<'a>, dialect: &Dialect) -> Vec<Spoken<'a>> {
    let system = match dialect.system {
        SystemRole::Auto | SystemRole::System => "system",
        SystemRole::Developer => "developer",
        SystemRole::User => "user",
    };
    let mut said: Vec<Spoken<'a>> = Vec::with_capacity(request.messages.len());
    for message in request.messages {
        let role = match message.role {
            Role::System => system,
            Role::User => "user",
            Role::Assistant => "assistant",
        };
        // Servers that know no system mostly demand that user and assistant take turns.
        match said.last_mut().filter(|last| system == "user" && last.role == role) {
            Some(last) => join(&mut last.content, &message.content),
            None => said.push(Spoken { role, content: Cow::Borrowed(&message.content) }),
        }
    }
    if let Some(addition) = dialect::addition(request, dialect) {
        let by_system = said.iter().position(|said| said.role == system && system != "user");
        let at = by_system.or_else(|| said.iter().rposition(|said| said.role == "user"));
        match at.and_then(|at| said.get_mut(at)) {
            Some(said) => join(&mut said.content, &addition),
            None => said.push(Spoken { role: "user", content: Cow::Owned(addition) }),
        }
    }
    said
}

fn join(text: &mut Cow<'_, str>, more: &str) {
    let text = text.to_mut();
    if !text.is_empty() {
        text.push_str("\n\n");
    }
    text.push_str(more);
}

/// JSON, with a schema where there is one.
struct ResponseFormat<'a>(Option<&'a Value>);

impl Serialize for ResponseFormat<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Guide<'a> {
            name: &'static str,
            schema: &'a Value,
            strict: bool,
        }
        let mut map = serializer.serialize_map(None)?;
        match self.0 {
            None => map.serialize_entry("type", "json_object")?,
            // Not strict: strict mode takes only a part of JSON Schema and refuses the rest. The schema guides; the
            // stage's own check decides.
            Some(schema) => {
                map.serialize_entry("type", "json_schema")?;
                map.serialize_entry("json_schema", &Guide { name: "answer", schema, strict: false })?;
            }
        }
        map.end()
    }
}

/// The usual answer: one text, complete, with its usage. It is read without building a tree; what is of any other
/// shape, in whichever respect, is read by [`OpenAi::read_any`].
#[derive(Deserialize)]
struct Plain {
    error: Option<IgnoredAny>,
    choices: (Choice,),
    usage: Tokens,
}

#[derive(Deserialize)]
struct Choice {
    error: Option<IgnoredAny>,
    finish_reason: Ended,
    message: Said,
}

#[derive(Deserialize)]
enum Ended {
    #[serde(rename = "stop")]
    Stop,
}

#[derive(Deserialize)]
struct Said {
    content: String,
    refusal: Option<IgnoredAny>,
}

/// OpenAI's prompt tokens include the cached ones; its completion tokens include the reasoning.
#[derive(Deserialize)]
struct Tokens {
    #[serde(rename = "prompt_tokens")]
    prompt: u64,
    #[serde(rename = "completion_tokens")]
    completion: u64,
    prompt_tokens_details: Option<PromptDetails>,
    completion_tokens_details: Option<CompletionDetails>,
}

#[derive(Deserialize)]
struct PromptDetails {
    cached_tokens: Option<u64>,
}

#[derive(Deserialize)]
struct CompletionDetails {
    reasoning_tokens: Option<u64>,
}

impl Plain {
    /// The text and its usage, if nothing else was said.
    fn whole(self) -> Option<(String, Usage)> {
        let Self { error, choices: (choice,), usage } = self;
        let Choice { error: inner, finish_reason: Ended::Stop, message } = choice;
        let says = !message.content.trim().is_empty();
        let is_plain = error.is_none() && inner.is_none() && message.refusal.is_none() && says;
        is_plain.then(|| (message.content, usage.usage()))
    }
}

impl Tokens {
    fn usage(&self) -> Usage {
        let cached = self.prompt_tokens_details.as_ref().and_then(|details| details.cached_tokens).unwrap_or(0);
        let reasoning = self.completion_tokens_details.as_ref().and_then(|details| details.reasoning_tokens);
        let cached = cached.min(self.prompt);
        Usage {
            input_tokens: self.prompt - cached,
            cache_read_tokens: cached,
            output_tokens: self.completion,
            reasoning_tokens: reasoning.unwrap_or(0).min(self.completion),
            ..Usage::default()
        }
    }
}

/// The text; compatible servers may send it as a list of parts.
fn content(content: &Value) -> Option<String> {
    match content {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => Some(parts.iter().filter_map(|part| part["text"].as_str()).collect()),
        _ => None,
    }
}

/// The status that an error means: its own, or, inside a 200, the one that it names or that its kind stands for. None where
/// it says neither: nothing tells that it is an outage, so that it is not waited out like one.
fn status_of(status: StatusCode, told: &Told) -> Option<StatusCode> {
    if !status.is_success() {
        return Some(status);
    }
    told.status.and_then(|code| StatusCode::from_u16(code).ok()).or(match told.kind.as_str() {
        "invalid_request_error" | "BadRequestError" => Some(StatusCode::BAD_REQUEST),
        "authentication_error" => Some(StatusCode::UNAUTHORIZED),
        "not_found_error" | "NotFoundError" => Some(StatusCode::NOT_FOUND),
        "tokens" | "requests" | "rate_limit_error" => Some(StatusCode::TOO_MANY_REQUESTS),
        "server_error" | "internal_error" | "InternalServerError" | "api_error" => {
            Some(StatusCode::INTERNAL_SERVER_ERROR)
        }
        "overloaded_error" | "engine_overloaded_error" | "service_unavailable" | "timeout_error" => {
            Some(StatusCode::SERVICE_UNAVAILABLE)
        }
        _ => None,
    })
}

/// The usage of an answer, as far as it is told.
fn usage(answer: &Value) -> Option<Usage> {
    let told = answer.get("usage").filter(|usage| usage.is_object())?;
    let detail = |path: &str| told.pointer(path).and_then(http::tokens);
    let tokens = Tokens {
        prompt: http::tokens(&told["prompt_tokens"])?,
        completion: http::tokens(&told["completion_tokens"]).unwrap_or(0),
        prompt_tokens_details: Some(PromptDetails { cached_tokens: detail("/prompt_tokens_details/cached_tokens") }),
        completion_tokens_details: Some(CompletionDetails {
            reasoning_tokens: detail("/completion_tokens_details/reasoning_tokens"),
        }),
    };
    Some(tokens.usage())
}

fn limits(exchange: &Exchange) -> Limits {
    Limits {
        requests_remaining: exchange.number("x-ratelimit-remaining-requests"),
        tokens_remaining: exchange.number("x-ratelimit-remaining-tokens"),
    }
}

/// `x-ratelimit-reset-requests: 6m0s`, for a 429 that says nothing plainer.
fn resets(exchange: &Exchange) -> Option<Duration> {
    let limits = limits(exchange);
    let reset = |name: &str| exchange.text(name).and_then(retry_after::span);
    retry_after::from_resets(&[
        (limits.requests_remaining, reset("x-ratelimit-reset-requests")),
        (limits.tokens_remaining, reset("x-ratelimit-reset-tokens")),
    ])
}
