//! Google's Gemini: owns the shapes of its `generateContent`.
//!
//! `POST …/models/{model}:generateContent`. The key goes into a header, never into the address, which
//! proxies and logs keep.

use std::time::Duration;

use ::http::StatusCode;
use async_trait::async_trait;
use serde_json::{Value, json};
use stagegate_core::{
    Code, Usage,
    pipeline::{Effort, Message, OutputFormat, Params, Role},
};

use super::{
    Parts,
    http::{self, Endpoint, Exchange, error, malformed, paid, retryable, unusable},
    retry_after,
};
use crate::provider::{Answer, Finish, Limits, Provider, ProviderError, ProviderRequest};

/// Gemini.
#[derive(Debug)]
pub(super) struct Gemini {
    name: String,
    endpoint: Endpoint,
    is_configured: bool,
}

impl Gemini {
    pub(super) fn new(parts: Parts) -> Self {
        let is_configured = parts.is_configured();
        let Parts { name, endpoint, .. } = parts;
        Self { name, endpoint, is_configured }
    }

    fn read(&self, exchange: &Exchange) -> Result<Answer, ProviderError> {
        let answer = self.endpoint.json(exchange)?;
        if answer.get("error").is_some_and(Value::is_object) {
            return Err(self.error(exchange, &answer));
        }
        let usage = usage(&answer);
        let Some(candidate) = answer.pointer("/candidates/0") else {
            let reason = answer.pointer("/promptFeedback/blockReason").and_then(Value::as_str);
            return Err(paid(
                match reason {
                    Some(reason) => {
                        let reason = self.endpoint.clean(reason);
                        let blocked = error(Code::ProviderRefused, format!("{}: the prompt was blocked", self.name));
                        http::quoting(blocked, format!("{}: the prompt was blocked ({reason})", self.name))
                    }
                    None if usage.is_some() => unusable("the answer has no `candidates`"),
                    None => malformed("the answer has no `candidates`"),
                },
                usage,
            ));
        };
        let finish = match candidate["finishReason"].as_str() {
            Some("MAX_TOKENS") => Finish::Length,
            None | Some("STOP" | "FINISH_REASON_UNSPECIFIED") => Finish::Stop,
            Some(
                "SAFETY"
                | "RECITATION"
                | "LANGUAGE"
                | "BLOCKLIST"
                | "PROHIBITED_CONTENT"
                | "SPII"
                | "IMAGE_SAFETY"
                | "IMAGE_PROHIBITED_CONTENT"
                | "IMAGE_RECITATION",
            ) => Finish::Refused,
            Some(other) => {
                let other = self.endpoint.clean(other);
                let unknown = unusable("the answer ended for a reason that is not known");
                return Err(paid(http::quoting(unknown, format!("the answer ended with `{other}`")), usage));
            }
        };
        let parts = candidate.pointer("/content/parts").and_then(Value::as_array);
        if parts.is_none() && finish == Finish::Stop {
            return Err(paid(unusable("the answer's candidate has no parts"), usage));
        }
        let thought = |part: &Value| part["thought"] == true;
        let texts = parts.into_iter().flatten().filter(|part| !thought(part)).filter_map(|part| part["text"].as_str());
        Ok(Answer { content: texts.collect(), finish, usage, limits: Limits::default() })
    }

    /// From `{ "error": { code, status, message, details } }`, which may stand in a list.
    fn error(&self, exchange: &Exchange, body: &Value) -> ProviderError {
        let told = body.pointer("/0/error").unwrap_or(&body["error"]);
        let words = told["message"].as_str().unwrap_or_default();
        let details = || told["details"].as_array().into_iter().flatten();
        let bad_key = details().any(|detail| detail["reason"] == "API_KEY_INVALID")
            || words.contains("API key not valid")
            || words.contains("API key expired");
        let (code, may_pass) = match told["status"].as_str() {
            Some("UNAUTHENTICATED" | "PERMISSION_DENIED") => (Code::ProviderAuth, false),
            Some("INVALID_ARGUMENT") if bad_key => (Code::ProviderAuth, false),
            Some("INVALID_ARGUMENT" | "FAILED_PRECONDITION" | "OUT_OF_RANGE") => (Code::ProviderRejected, false),
            Some("NOT_FOUND") => (Code::ProviderModel, false),
            Some("RESOURCE_EXHAUSTED") if details().any(is_daily_quota) => (Code::ProviderQuota, false),
            Some("RESOURCE_EXHAUSTED") => (Code::ProviderRateLimited, true),
            Some("INTERNAL" | "UNAVAILABLE" | "DEADLINE_EXCEEDED" | "CANCELLED" | "ABORTED" | "UNKNOWN") => {
                (Code::ProviderFailed, true)
            }
            _ if exchange.status == StatusCode::OK => (Code::ProviderFailed, true),
            _ => http::by_status(exchange.status),
        };
        let words = (!words.is_empty()).then(|| self.endpoint.clean(words));
        let error = http::refused(code, &self.name, exchange, words);
        if may_pass {
            let retry_after = exchange.retry_after().or_else(|| details().find_map(retry_delay));
            return retryable(ProviderError { retry_after, ..error });
        }
        error
    }
}

#[async_trait]
impl Provider for Gemini {
    async fn call(&self, request: ProviderRequest<'_>) -> Result<Answer, ProviderError> {
        if !self.is_configured {
            return Err(http::without_key(&self.name, "GEMINI_API_KEY"));
        }
        if request.messages.iter().all(|message| message.role == Role::System) {
            return Err(http::without_user(&self.name));
        }
        let model = request.model.strip_prefix("models/").unwrap_or(request.model);
        let url = self.endpoint.url(model);
        let exchange = self.endpoint.post(url, &body(&request)).await?;
        if exchange.status.is_success() {
            self.read(&exchange)
        } else {
            Err(self.error(&exchange, &exchange.error_json()))
        }
    }

    fn kind(&self) -> &'static str {
        "gemini"
    }

    fn unsupported(&self, params: &Params) -> Vec<(&'static str, String)> {
        if params.logit_bias.is_empty() {
            return Vec::new();
        }
        vec![("logit_bias", "remove it, or take the model out of the chain".to_owned())]
    }

    fn is_configured(&self) -> bool {
        self.is_configured
    }
}

fn body(request: &ProviderRequest<'_>) -> Value {
    let systems = request.messages.iter().filter(|message| message.role == Role::System);
    let system = systems.map(|message| message.content.as_str()).collect::<Vec<_>>().join("\n\n");
    let mut body = json!({ "contents": contents(request.messages) });
    if !system.is_empty() {
        body["systemInstruction"] = json!({ "parts": [{ "text": system }] });
    }
    let config = generation_config(request);
    if config.as_object().is_some_and(|config| !config.is_empty()) {
        body["generationConfig"] = config;
    }
    for (key, value) in &request.params.extra {
        match (key.as_str(), value, body.get_mut(key)) {
            // Beside what is written already.
            ("generationConfig", Value::Object(more), Some(Value::Object(config))) => {
                for (key, value) in more {
                    config.entry(key.clone()).or_insert_with(|| value.clone());
                }
            }
            _ => body[key] = value.clone(),
        }
    }
    body
}

fn contents(messages: &[Message]) -> Vec<Value> {
    messages
        .iter()
        .filter(|message| message.role != Role::System)
        .map(|message| {
            let role = if message.role == Role::Assistant { "model" } else { "user" };
            json!({ "role": role, "parts": [{ "text": message.content }] })
        })
        .collect()
}

fn generation_config(request: &ProviderRequest<'_>) -> Value {
    let params = request.params;
    let mut config = json!({});
    if let Some(temperature) = params.temperature {
        config["temperature"] = json!(temperature);
    }
    if let Some(top_p) = params.top_p {
        config["topP"] = json!(top_p);
    }
    if let Some(limit) = params.max_output_tokens {
        config["maxOutputTokens"] = json!(limit);
    }
    if let Some(seed) = params.seed {
        config["seed"] = json!(seed);
    }
    if !params.stop.is_empty() {
        config["stopSequences"] = json!(params.stop);
    }
    if let Some(penalty) = params.frequency_penalty {
        config["frequencyPenalty"] = json!(penalty);
    }
    if let Some(penalty) = params.presence_penalty {
        config["presencePenalty"] = json!(penalty);
    }
    if let Some(reasoning) = params.reasoning {
        config["thinkingConfig"] = json!({ "thinkingBudget": thinking_budget(reasoning.effort) });
    }
    if let OutputFormat::Json { schema } = request.format {
        config["responseMimeType"] = json!("application/json");
        if let Some(schema) = schema {
            config["responseJsonSchema"] = schema.as_ref().clone();
        }
    }
    config
}

/// How many tokens a model may think.
fn thinking_budget(effort: Effort) -> u32 {
    match effort {
        Effort::None => 0,
        Effort::Minimal => 512,
        Effort::Low => 1_024,
        Effort::Medium => 8_192,
        Effort::High => 24_576,
    }
}

/// Gemini's prompt count includes the cached part; its candidates' count leaves out the thoughts, which are billed as
/// output.
fn usage(answer: &Value) -> Option<Usage> {
    let told = answer.get("usageMetadata").filter(|usage| usage.is_object())?;
    let count = |name: &str| told[name].as_u64().unwrap_or(0);
    let prompt = told["promptTokenCount"].as_u64()?;
    let cached = count("cachedContentTokenCount").min(prompt);
    let thoughts = count("thoughtsTokenCount");
    Some(Usage {
        input_tokens: prompt - cached,
        cache_read_tokens: cached,
        output_tokens: count("candidatesTokenCount") + thoughts,
        reasoning_tokens: thoughts,
        ..Usage::default()
    })
}

fn is_kind(detail: &Value, kind: &str) -> bool {
    detail["@type"].as_str().is_some_and(|name| name.ends_with(kind))
}

/// A quota that is used up for the day: waiting for a retry is of no use.
fn is_daily_quota(detail: &Value) -> bool {
    let violations = detail["violations"].as_array();
    is_kind(detail, "google.rpc.QuotaFailure")
        && violations.into_iter().flatten().any(|v| v["quotaId"].as_str().is_some_and(|id| id.contains("PerDay")))
}

fn retry_delay(detail: &Value) -> Option<Duration> {
    if !is_kind(detail, "google.rpc.RetryInfo") {
        return None;
    }
    detail["retryDelay"].as_str().and_then(retry_after::span)
}
