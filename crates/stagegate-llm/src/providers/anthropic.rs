//! Anthropic's Messages: owns that protocol's request and response shapes.
//!
//! `POST …/v1/messages`. JSON by an object schema is asked for as the input of a tool that the model must use.
//! Some models refuse to be forced; the first such refusal (which costs nothing) is answered by asking again at once
//! with the schema in the system prompt, and the model is remembered. The same words serve JSON that is no object.
//! `seed` has no counterpart and is left out.

use std::{
    collections::BTreeSet,
    fmt::Write,
    sync::{PoisonError, RwLock},
    time::Duration,
};

use ::http::{HeaderValue, StatusCode};
use async_trait::async_trait;
use chrono::DateTime;
use serde_json::{Value, json};
use stagegate_core::{
    Code, Usage,
    pipeline::{Effort, Message, OutputFormat, Params, Role},
};

use super::{
    Parts,
    http::{self, Endpoint, Exchange, malformed, paid, retryable},
    retry_after,
};
use crate::{
    prices::DEFAULT_MAX_OUTPUT_TOKENS,
    provider::{Answer, Finish, Limits, Provider, ProviderError, ProviderRequest},
};

const API_VERSION: &str = "2023-06-01";

/// The tool whose input is the answer.
const ANSWER_TOOL: &str = "answer";

/// How many models are remembered as not to be forced; past that the refusal is met again.
const UNFORCED_MODELS_MAX: usize = 256;

/// Anthropic, or a server that speaks its protocol.
#[derive(Debug)]
pub(super) struct Anthropic {
    name: String,
    endpoint: Endpoint,
    is_configured: bool,
    /// Models that refused to be forced to use a tool.
    unforced: RwLock<BTreeSet<String>>,
}

/// How JSON is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asking {
    /// As a tool's input.
    Tool,
    /// In words.
    Words,
}

impl Anthropic {
    pub(super) fn new(parts: Parts) -> Self {
        let is_configured = parts.is_configured();
        let Parts { name, endpoint, .. } = parts;
        let endpoint = endpoint.header("anthropic-version", HeaderValue::from_static(API_VERSION));
        Self { name, endpoint, is_configured, unforced: RwLock::default() }
    }

    fn asking(&self, request: &ProviderRequest<'_>) -> Asking {
        let unforced = self.unforced.read().unwrap_or_else(PoisonError::into_inner);
        match request.format {
            OutputFormat::Json { schema: Some(schema) }
                if fits_a_tool(schema) && !unforced.contains(request.model) && thinking(request.params).is_none() =>
            {
                Asking::Tool
            }
            _ => Asking::Words,
        }
    }

    fn remember_unforced(&self, model: &str) {
        let mut unforced = self.unforced.write().unwrap_or_else(PoisonError::into_inner);
        if unforced.len() < UNFORCED_MODELS_MAX {
            unforced.insert(model.to_owned());
        }
    }

    async fn ask(&self, request: &ProviderRequest<'_>, asking: Asking) -> Result<Answer, ProviderError> {
        let exchange = self.endpoint.post(self.endpoint.url(request.model), &body(request, asking)).await?;
        if exchange.status.is_success() {
            self.read(&exchange)
        } else {
            Err(self.error(&exchange, &exchange.error_json()))
        }
    }

    fn read(&self, exchange: &Exchange) -> Result<Answer, ProviderError> {
        let answer = self.endpoint.json(exchange)?;
        if answer["type"] == "error" || answer.get("error").is_some_and(Value::is_object) {
            return Err(self.error(exchange, &answer));
        }
        let usage = usage(&answer);
        let Some(blocks) = answer["content"].as_array() else {
            return Err(paid(malformed("the answer has no `content`"), usage));
        };
        let finish = match answer["stop_reason"].as_str() {
            // A paused turn is not a whole answer either.
            Some("max_tokens" | "model_context_window_exceeded" | "pause_turn") => Finish::Length,
            Some("refusal") => Finish::Refused,
            _ => Finish::Stop,
        };
        let tool = blocks.iter().find(|block| block["type"] == "tool_use" && block["name"] == ANSWER_TOOL);
        let content = match tool {
            Some(tool) => tool["input"].to_string(),
            None => blocks.iter().filter(|b| b["type"] == "text").filter_map(|b| b["text"].as_str()).collect(),
        };
        Ok(Answer { content, finish, usage, limits: limits(exchange) })
    }

    /// From `{ "type": "error", "error": { type, message } }`.
    fn error(&self, exchange: &Exchange, body: &Value) -> ProviderError {
        let told = &body["error"];
        let words = told["message"].as_str().unwrap_or_default();
        let unpaid = words.contains("credit balance is too low") || words.contains("specified API usage limits");
        let (code, may_pass) = match told["type"].as_str() {
            Some("billing_error") => (Code::ProviderQuota, false),
            _ if unpaid => (Code::ProviderQuota, false),
            Some("authentication_error" | "permission_error") => (Code::ProviderAuth, false),
            Some("not_found_error") => (Code::ProviderModel, false),
            Some("invalid_request_error" | "request_too_large") => (Code::ProviderRejected, false),
            Some("rate_limit_error") => (Code::ProviderRateLimited, true),
            Some("overloaded_error" | "api_error" | "timeout_error") => (Code::ProviderFailed, true),
            _ if exchange.status == StatusCode::OK => (Code::ProviderFailed, true),
            _ => http::by_status(exchange.status),
        };
        let words = (!words.is_empty()).then(|| self.endpoint.clean(words));
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
impl Provider for Anthropic {
    async fn call(&self, request: ProviderRequest<'_>) -> Result<Answer, ProviderError> {
        if !self.is_configured {
            return Err(http::without_key(&self.name, "ANTHROPIC_API_KEY"));
        }
        if said(request.messages).next().is_none_or(|first| first.role != Role::User) {
            return Err(http::without_user(&self.name));
        }
        let asking = self.asking(&request);
        match self.ask(&request, asking).await {
            Err(error) if asking == Asking::Tool && is_refusal_of_force(&error) => {
                self.remember_unforced(request.model);
                self.ask(&request, Asking::Words).await
            }
            result => result,
        }
    }

    fn kind(&self) -> &'static str {
        "anthropic"
    }

    fn unsupported(&self, params: &Params) -> Vec<(&'static str, String)> {
        let given = [
            ("frequency_penalty", params.frequency_penalty.is_some()),
            ("presence_penalty", params.presence_penalty.is_some()),
            ("logit_bias", !params.logit_bias.is_empty()),
        ];
        let given = given.into_iter().filter(|(_, is_given)| *is_given);
        let mut found: Vec<_> =
            given.map(|(key, _)| (key, "remove it, or take the model out of the chain".to_owned())).collect();
        let thinks = params.reasoning.is_some_and(|r| !matches!(r.effort, Effort::None | Effort::Minimal));
        if thinks && thinking(params).is_none() {
            let least = 2 * THINKING_MIN;
            found.push((
                "reasoning",
                format!("thinking needs `max_output_tokens` of {least} or more, which hold it too"),
            ));
        }
        if thinks && params.temperature.is_some() {
            found.push(("temperature", "remove it: a model that thinks takes no temperature".to_owned()));
        }
        found
    }

    fn is_configured(&self) -> bool {
        self.is_configured
    }
}

/// `tool_choice: type "tool" and "any" are not supported for this model.`, or its older kin about thinking.
fn is_refusal_of_force(error: &ProviderError) -> bool {
    error.code == Code::ProviderRejected && error.detail.as_ref().is_some_and(|words| words.contains("tool_choice"))
}

/// A tool's input is an object, and its schema may not be a union at the top.
fn fits_a_tool(schema: &Value) -> bool {
    schema["type"] == "object" && ["anyOf", "oneOf", "allOf", "$ref"].into_iter().all(|key| schema.get(key).is_none())
}

fn body(request: &ProviderRequest<'_>, asking: Asking) -> Value {
    let params = request.params;
    let mut body = json!({
        "model": request.model,
        "max_tokens": params.max_output_tokens.unwrap_or(DEFAULT_MAX_OUTPUT_TOKENS),
        "messages": messages(request.messages),
    });
    let system = system(request, asking);
    if !system.is_empty() {
        body["system"] = json!(system);
    }
    let thinking = thinking(params);
    if let Some(budget) = thinking {
        body["thinking"] = json!({ "type": "enabled", "budget_tokens": budget });
    }
    if let Some(temperature) = params.temperature {
        body["temperature"] = json!(temperature);
    }
    if let Some(top_p) = params.top_p {
        body["top_p"] = json!(top_p);
    }
    if !params.stop.is_empty() {
        body["stop_sequences"] = json!(params.stop);
    }
    if let (Asking::Tool, OutputFormat::Json { schema: Some(schema) }) = (asking, request.format) {
        body["tools"] = json!([{
            "name": ANSWER_TOOL,
            "description": "Gives the answer. Its input is the whole answer.",
            "input_schema": schema.as_ref(),
        }]);
        body["tool_choice"] = json!({ "type": "tool", "name": ANSWER_TOOL, "disable_parallel_tool_use": true });
    }
    for (key, value) in &params.extra {
        body[key] = value.clone();
    }
    body
}

/// The fewest tokens that thinking is given; the answer needs as many beside them.
const THINKING_MIN: u32 = 1_024;

/// How many tokens a model may think: a part of the limit on its answer, which holds the thinking too. None where it shall
/// not think, or where there is no room for it.
fn thinking(params: &Params) -> Option<u32> {
    let most = params.max_output_tokens.unwrap_or(DEFAULT_MAX_OUTPUT_TOKENS);
    let part = match params.reasoning?.effort {
        Effort::None | Effort::Minimal => return None,
        Effort::Low => most / 4,
        Effort::Medium => most / 2,
        Effort::High => most / 4 * 3,
    };
    (most >= 2 * THINKING_MIN).then_some(part.max(THINKING_MIN))
}

/// The system messages, wherever they stood, and what is asked in words.
fn system(request: &ProviderRequest<'_>, asking: Asking) -> String {
    let systems = request.messages.iter().filter(|message| message.role == Role::System);
    let mut system = systems.map(|message| message.content.as_str()).collect::<Vec<_>>().join("\n\n");
    if let (Asking::Words, OutputFormat::Json { schema }) = (asking, request.format) {
        if !system.is_empty() {
            system.push_str("\n\n");
        }
        system.push_str("Answer with one JSON value and nothing else: no introduction, no code fence.");
        if let Some(schema) = schema {
            let _ = write!(system, " It must fit this JSON Schema:\n{schema}");
        }
    }
    system
}

/// The conversation, without the system messages and those that say nothing.
fn said(messages: &[Message]) -> impl Iterator<Item = &Message> {
    messages.iter().filter(|message| message.role != Role::System && !message.content.trim().is_empty())
}

/// Roles must alternate: neighbours of one role become one message, empty ones are left out.
fn messages(messages: &[Message]) -> Vec<Value> {
    let mut merged: Vec<(&str, String)> = Vec::new();
    for message in said(messages) {
        let role = if message.role == Role::Assistant { "assistant" } else { "user" };
        match merged.last_mut() {
            Some((last, text)) if *last == role => {
                text.push_str("\n\n");
                text.push_str(&message.content);
            }
            _ => merged.push((role, message.content.clone())),
        }
    }
    // Blanks at the end of a prefilled answer are refused.
    if let Some((_, text)) = merged.last_mut().filter(|(role, _)| *role == "assistant") {
        text.truncate(text.trim_end().len());
    }
    merged.into_iter().map(|(role, content)| json!({ "role": role, "content": content })).collect()
}

/// Anthropic's input tokens leave out what was read from and written to its cache; its output includes the thinking.
fn usage(answer: &Value) -> Option<Usage> {
    let told = answer.get("usage").filter(|usage| usage.is_object())?;
    let count = |name: &str| told[name].as_u64().unwrap_or(0);
    let output = count("output_tokens");
    let thinking = told.pointer("/output_tokens_details/thinking_tokens").and_then(Value::as_u64).unwrap_or(0);
    told["input_tokens"].as_u64().map(|input| Usage {
        input_tokens: input,
        cache_read_tokens: count("cache_read_input_tokens"),
        cache_write_tokens: count("cache_creation_input_tokens"),
        output_tokens: output,
        reasoning_tokens: thinking.min(output),
        estimated: false,
    })
}

fn limits(exchange: &Exchange) -> Limits {
    Limits {
        requests_remaining: exchange.number("anthropic-ratelimit-requests-remaining"),
        tokens_remaining: exchange.number("anthropic-ratelimit-tokens-remaining"),
    }
}

/// `anthropic-ratelimit-requests-reset: 2026-01-27T12:00:30Z`, for a 429 that says nothing plainer.
fn resets(exchange: &Exchange) -> Option<Duration> {
    let reset = |name: &str| {
        let at = DateTime::parse_from_rfc3339(exchange.text(name)?).ok()?;
        Some(retry_after::until(at.to_utc(), exchange.answered_at()))
    };
    let limits = limits(exchange);
    retry_after::from_resets(&[
        (limits.requests_remaining, reset("anthropic-ratelimit-requests-reset")),
        (limits.tokens_remaining, reset("anthropic-ratelimit-tokens-reset")),
    ])
}
