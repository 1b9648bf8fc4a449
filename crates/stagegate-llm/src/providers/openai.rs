//! OpenAI's chat completions, and every server that is compatible with them (local ones, gateways, other vendors): owns that protocol's request and response shapes.
//!
//! `POST …/chat/completions` ([`super::address`] has the rest of the address). OpenAI itself is told `max_completion_tokens`, which its reasoning models demand;
//! every other address is told `max_tokens`, which compatible servers have known for longer.

use std::{collections::BTreeMap, time::Duration};

use ::http::StatusCode;
use async_trait::async_trait;
use serde::{
    Deserialize, Serialize, Serializer,
    de::IgnoredAny,
    ser::{SerializeMap as _, SerializeSeq as _},
};
use serde_json::Value;
use stagegate_core::{
    Code, Usage,
    pipeline::{Message, OutputFormat, Role},
};

use super::{
    Parts,
    http::{self, Endpoint, Exchange, malformed, paid, retryable, unusable},
    retry_after,
};
use crate::provider::{Answer, Finish, Limits, Provider, ProviderError, ProviderRequest};

/// A chat completions server.
#[derive(Debug)]
pub(super) struct OpenAi {
    name: String,
    endpoint: Endpoint,
    is_vendor: bool,
    is_configured: bool,
}

impl OpenAi {
    pub(super) fn new(parts: Parts) -> Self {
        let is_configured = parts.is_configured();
        let Parts { name, endpoint, plan, .. } = parts;
        Self { name, endpoint, is_vendor: plan.place.is_openai, is_configured }
    }

    fn body<'a>(&self, request: &ProviderRequest<'a>) -> Body<'a> {
        let params = request.params;
        let limit = params.max_output_tokens;
        Body {
            model: request.model,
            messages: Messages(request.messages),
            max_completion_tokens: limit.filter(|_| self.is_vendor),
            max_tokens: limit.filter(|_| !self.is_vendor),
            temperature: params.temperature,
            top_p: params.top_p,
            seed: params.seed,
            stop: &params.stop,
            frequency_penalty: params.frequency_penalty,
            presence_penalty: params.presence_penalty,
            logit_bias: &params.logit_bias,
            reasoning_effort: params.reasoning.map(|reasoning| reasoning.effort.as_str()),
            extra: &params.extra,
            response_format: match request.format {
                OutputFormat::Text => None,
                OutputFormat::Json { schema } => Some(ResponseFormat(schema.as_deref())),
            },
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
        if answer.get("error").is_some_and(|error| !error.is_null()) {
            return Err(self.error(exchange, &answer));
        }
        let usage = usage(&answer);
        let choice = &answer["choices"][0];
        if choice.get("error").is_some_and(|error| !error.is_null()) {
            return Err(paid(self.error(exchange, choice), usage));
        }
        let message = &choice["message"];
        if !message.is_object() {
            return Err(paid(malformed("the answer has no `choices[0].message`"), usage));
        }
        let finish = match choice["finish_reason"].as_str() {
            Some("length" | "model_length") => Finish::Length,
            Some("content_filter") => Finish::Refused,
            // How compatible servers say that they broke off; what came until then is no whole answer.
            Some(other @ ("error" | "abort" | "cancelled" | "insufficient_system_resource")) => {
                return Err(paid(malformed(format!("{}: the answer broke off (`{other}`)", self.name)), usage));
            }
            Some("time_limit") => {
                return Err(paid(unusable(format!("{}: the answer broke off (`time_limit`)", self.name)), usage));
            }
            // Others have words of their own for a natural end, or none.
            _ => Finish::Stop,
        };
        let limits = limits(exchange);
        if let Some(refusal) = message["refusal"].as_str().filter(|refusal| !refusal.is_empty()) {
            return Ok(Answer { content: refusal.to_owned(), finish: Finish::Refused, usage, limits });
        }
        match (content(&message["content"]), finish) {
            (Some(content), _) => Ok(Answer { content, finish, usage, limits }),
            // Reasoning may use up the limit before a word is said, and a filter may leave nothing.
            (None, Finish::Length | Finish::Refused) => Ok(Answer { content: String::new(), finish, usage, limits }),
            (None, Finish::Stop) => Err(paid(unusable("the answer's message has no content"), usage)),
        }
    }

    /// From `{ "error": { message, type, code } }`; some servers write a text instead of the object.
    fn error(&self, exchange: &Exchange, body: &Value) -> ProviderError {
        let told = &body["error"];
        let (kind, code) = (told["type"].as_str().unwrap_or_default(), told["code"].as_str().unwrap_or_default());
        let status = status_of(exchange.status, told);
        let says = |word: &str| code == word || kind == word;
        let (code, may_pass) =
            if ["insufficient_quota", "billing_hard_limit_reached", "billing_not_active"].into_iter().any(says) {
                (Code::ProviderQuota, false)
            } else if says("model_not_found") {
                (Code::ProviderModel, false)
            } else if says("context_length_exceeded") {
                (Code::ProviderRejected, false)
            } else if ["content_filter", "content_policy_violation"].into_iter().any(says) {
                (Code::ProviderRefused, false)
            } else if says("invalid_api_key") {
                (Code::ProviderAuth, false)
            } else if says("rate_limit_exceeded") {
                (Code::ProviderRateLimited, true)
            } else {
                http::by_status(status)
            };
        let words = told["message"].as_str().or_else(|| told.as_str()).or_else(|| body["message"].as_str());
        let words = words.map(|words| self.endpoint.clean(words));
        let mut error = http::refused(code, &self.name, exchange, words);
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

#[async_trait]
impl Provider for OpenAi {
    async fn call(&self, request: ProviderRequest<'_>) -> Result<Answer, ProviderError> {
        if !self.is_configured {
            return Err(http::without_key(&self.name, "OPENAI_API_KEY"));
        }
        let exchange = self.endpoint.post(self.endpoint.url(request.model), &self.body(&request)).await?;
        if exchange.status.is_success() {
            self.read(&exchange)
        } else {
            Err(self.error(&exchange, &exchange.error_json()))
        }
    }

    fn kind(&self) -> &'static str {
        "openai"
    }

    fn is_configured(&self) -> bool {
        self.is_configured
    }
}

/// A request's body. It borrows what it says, so that a prompt is written once: into the bytes that are sent.
#[derive(Serialize)]
struct Body<'a> {
    model: &'a str,
    messages: Messages<'a>,
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
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    logit_bias: &'a BTreeMap<String, f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_effort: Option<&'static str>,
    /// Its keys are none of the others: those are refused where a definition is registered.
    #[serde(flatten)]
    extra: &'a serde_json::Map<String, Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    response_format: Option<ResponseFormat<'a>>,
}

struct Messages<'a>(&'a [Message]);

impl Serialize for Messages<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Said<'a> {
            role: &'static str,
            content: &'a str,
        }
        let mut list = serializer.serialize_seq(Some(self.0.len()))?;
        for message in self.0 {
            let role = match message.role {
                Role::System => "system",
                Role::User => "user",
                Role::Assistant => "assistant",
            };
            list.serialize_element(&Said { role, content: &message.content })?;
        }
        list.end()
    }
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
        let is_plain = error.is_none() && inner.is_none() && message.refusal.is_none();
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

/// The status that an error means: its own, or, inside a 200, the one that it names; a failure where it names none.
fn status_of(status: StatusCode, told: &Value) -> StatusCode {
    if !status.is_success() {
        return status;
    }
    let named = told["code"].as_u64().or_else(|| told["status"].as_u64()).and_then(|code| u16::try_from(code).ok());
    let named = named.and_then(|code| StatusCode::from_u16(code).ok());
    let by_type = match told["type"].as_str() {
        Some("invalid_request_error") => StatusCode::BAD_REQUEST,
        Some("authentication_error") => StatusCode::UNAUTHORIZED,
        Some("tokens" | "requests") => StatusCode::TOO_MANY_REQUESTS,
        _ => StatusCode::BAD_GATEWAY,
    };
    named.filter(|code| code.is_client_error() || code.is_server_error()).unwrap_or(by_type)
}

/// The usage of an answer, as far as it is told.
fn usage(answer: &Value) -> Option<Usage> {
    let told = answer.get("usage").filter(|usage| usage.is_object())?;
    let detail = |path: &str| told.pointer(path).and_then(Value::as_u64);
    let tokens = Tokens {
        prompt: told["prompt_tokens"].as_u64()?,
        completion: told["completion_tokens"].as_u64().unwrap_or(0),
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
