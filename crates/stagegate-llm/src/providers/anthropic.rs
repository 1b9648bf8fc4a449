//! Anthropic's Messages: owns that protocol's request and response shapes.
//!
//! `POST …/v1/messages`. JSON by an object schema is asked for as the input of a tool that the model must use.
//! Some models refuse to be forced: then the schema stands in the system prompt ([`super::dialect`]). The same words serve
//! JSON that is no object. `seed` has no counterpart and is left out.

use std::time::Duration;

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
    dialect::{self, Dialect, Dialects, Sent},
    http::{self, Endpoint, Exchange, malformed, paid, retryable},
    retry_after,
    words::{self, Told},
};
use crate::{
    config::{DialectConfig, JsonForm, Sampling, SystemRole},
    prices::DEFAULT_MAX_OUTPUT_TOKENS,
    provider::{Answer, Finish, Limits, Provider, ProviderError, ProviderRequest},
};

const API_VERSION: &str = "2023-06-01";

/// The tool whose input is the answer.
const ANSWER_TOOL: &str = "answer";

/// Anthropic, or a server that speaks its protocol.
#[derive(Debug)]
pub(super) struct Anthropic {
    name: String,
    endpoint: Endpoint,
    is_configured: bool,
    dialects: Dialects,
}

impl Anthropic {
    pub(super) fn new(parts: Parts) -> Self {
        let is_configured = parts.is_configured();
        let Parts { name, endpoint, dialect, .. } = parts;
        let endpoint = endpoint.header("anthropic-version", HeaderValue::from_static(API_VERSION));
        Self { name, endpoint, is_configured, dialects: Dialects::new(dialect) }
    }

    fn read(&self, exchange: &Exchange) -> Result<Answer, ProviderError> {
        let answer = self.endpoint.json(exchange)?;
        if words::is_error(&answer) || (answer["content"].is_null() && Told::of(&answer).words().is_some()) {
            return Err(self.error(exchange, &answer));
        }
        let usage = usage(&answer);
        let Some(blocks) = answer["content"].as_array() else {
            return Err(paid(malformed("the answer has no `content`"), usage));
        };
        let tool = blocks.iter().find(|block| block["type"] == "tool_use" && block["name"] == ANSWER_TOOL);
        let content = match tool {
            Some(tool) => tool["input"].to_string(),
            None => {
                blocks.iter().filter(|b| b["type"] == "text").filter_map(|b| b["text"].as_str()).collect::<String>()
            }
        };
        let is_blank = content.trim().is_empty();
        let thinks = || blocks.iter().any(|b| b["type"] == "thinking" || b["type"] == "redacted_thinking");
        let finish = match answer["stop_reason"].as_str() {
            Some("tool_use") if is_blank => Finish::other("tool_use"),
            None | Some("end_turn" | "stop_sequence" | "tool_use") if is_blank && thinks() => Finish::Silent,
            None | Some("end_turn" | "stop_sequence" | "tool_use") => Finish::Stop,
            Some("max_tokens") => Finish::Length,
            Some("model_context_window_exceeded") => Finish::ContextFull,
            Some("pause_turn") => Finish::Paused,
            Some("refusal") => Finish::Refused,
            Some(reason) => Finish::other(reason),
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
        let is_known = exchange.status != StatusCode::OK || code != Code::ProviderFailed || told["type"] != Value::Null;
        let mut error = self.endpoint.refused(code, &self.name, exchange, &Told::of_body(&exchange.body));
        error.answered = !is_known;
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
        if said(request.messages).next().is_some_and(|first| first.role != Role::User) {
            return Err(http::without_user(&self.name));
        }
        let url = self.endpoint.url(request.model);
        let mut talk = self.dialects.talk(request.model);
        loop {
            let body = body(&request, &talk.dialect);
            let exchange = self.endpoint.post(url.clone(), &body).await.map_err(|error| http::at(error, &url))?;
            let read = if exchange.status.is_success() {
                self.read(&exchange)
            } else {
                Err(self.error(&exchange, &exchange.error_json()))
            };
            let error = match read {
                Ok(answer) => return Ok(talk.done(&self.name, request.params, answer)),
                Err(error) => error,
            };
            let sent = sent(&request, &talk.dialect);
            let told = Told::of_body(&exchange.body);
            if error.usage.is_some() || !talk.mend(exchange.status.as_u16(), &told, request.params, &sent) {
                return Err(http::at(error, &url));
            }
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

    fn dialects(&self) -> Vec<(String, DialectConfig)> {
        self.dialects.found()
    }
}

/// The schema of the tool that the model must use, where JSON is asked for so.
fn tool_schema<'a>(request: &ProviderRequest<'a>, dialect: &Dialect) -> Option<&'a Value> {
    let OutputFormat::Json { schema } = request.format else { return None };
    let is_by_schema = matches!(dialect.json, JsonForm::Auto | JsonForm::Schema);
    // A model that thinks may not be forced.
    let thinks = dialect::kept(dialect, Sampling::Reasoning, thinking(request.params)).is_some();
    schema.as_deref().filter(|schema| is_by_schema && !thinks && fits_a_tool(schema))
}

/// What of the request could be said otherwise.
fn sent(request: &ProviderRequest<'_>, dialect: &Dialect) -> Sent {
    Sent {
        limit: None,
        json: tool_schema(request, dialect).map(|_| JsonForm::Schema),
        system: (!system(request, dialect).is_empty()).then_some(dialect.system),
    }
}

/// A tool's input is an object, and its schema may not be a union at the top.
fn fits_a_tool(schema: &Value) -> bool {
    schema["type"] == "object" && ["anyOf", "oneOf", "allOf", "$ref"].into_iter().all(|key| schema.get(key).is_none())
}

fn body(request: &ProviderRequest<'_>, dialect: &Dialect) -> Value {
    let params = request.params;
    let system = system(request, dialect);
    let is_by_user = dialect.system == SystemRole::User;
    let mut body = json!({
        "model": request.model,
        "max_tokens": params.max_output_tokens.unwrap_or(DEFAULT_MAX_OUTPUT_TOKENS),
        "messages": messages(request.messages, if is_by_user { &system } else { "" }),
    });
    if !system.is_empty() && !is_by_user {
        body["system"] = json!(system);
    }
    let thinking = dialect::kept(dialect, Sampling::Reasoning, thinking(params));
    if let Some(budget) = thinking {
        body["thinking"] = json!({ "type": "enabled", "budget_tokens": budget });
    }
    if let Some(temperature) = dialect::kept(dialect, Sampling::Temperature, params.temperature) {
        body["temperature"] = json!(temperature);
    }
    if let Some(top_p) = dialect::kept(dialect, Sampling::TopP, params.top_p) {
        body["top_p"] = json!(top_p);
    }
    let stop = dialect::kept_stop(dialect, params);
    if !stop.is_empty() {
        body["stop_sequences"] = json!(stop);
    }
    if let Some(schema) = tool_schema(request, dialect) {
        body["tools"] = json!([{
            "name": ANSWER_TOOL,
            "description": "Gives the answer. Its input is the whole answer.",
            "input_schema": schema,
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
fn system(request: &ProviderRequest<'_>, dialect: &Dialect) -> String {
    let systems = request.messages.iter().filter(|message| message.role == Role::System);
    let mut system = systems.map(|message| message.content.as_str()).collect::<Vec<_>>().join("\n\n");
    if let (None, OutputFormat::Json { schema }) = (tool_schema(request, dialect), request.format) {
        if !system.is_empty() {
            system.push_str("\n\n");
        }
        system.push_str(&dialect::in_words(schema.as_deref()));
    }
    system
}

/// The conversation, without the system messages and those that say nothing.
fn said(messages: &[Message]) -> impl Iterator<Item = &Message> {
    messages.iter().filter(|message| message.role != Role::System && !message.content.trim().is_empty())
}

/// Roles must alternate: neighbours of one role become one message, empty ones are left out. `first` is what the user says
/// before all of it.
fn messages(messages: &[Message], first: &str) -> Vec<Value> {
    let mut merged: Vec<(&str, String)> = Vec::new();
    if !first.is_empty() {
        merged.push(("user", first.to_owned()));
    }
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
    if merged.is_empty() {
        merged.push(("user", http::NOTHING_SAID.to_owned()));
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
    let count = |name: &str| http::tokens(&told[name]).unwrap_or(0);
    let output = count("output_tokens");
    let thinking = told.pointer("/output_tokens_details/thinking_tokens").and_then(http::tokens).unwrap_or(0);
    http::tokens(&told["input_tokens"]).map(|input| Usage {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversation_of_instructions_alone_is_begun_for_the_user() {
        let instructions = Message { role: Role::System, content: "Say hi.".to_owned() };
        let said = messages(&[instructions], "");
        assert_eq!((said.len(), &said[0]["role"]), (1, &json!("user")));
    }
}
