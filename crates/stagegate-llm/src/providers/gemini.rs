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
    dialect::{self, Dialect, Dialects, Sent},
    http::{self, Endpoint, Exchange, error, malformed, paid, retryable, unusable},
    retry_after,
    words::{self, Told},
};
use crate::{
    config::{DialectConfig, JsonForm, Sampling, SystemRole},
    provider::{Answer, Finish, Limits, Provider, ProviderError, ProviderRequest},
};

/// Gemini.
#[derive(Debug)]
pub(super) struct Gemini {
    name: String,
    endpoint: Endpoint,
    is_configured: bool,
    dialects: Dialects,
}

impl Gemini {
    pub(super) fn new(parts: Parts) -> Self {
        let is_configured = parts.is_configured();
        let Parts { name, endpoint, dialect, .. } = parts;
        Self { name, endpoint, is_configured, dialects: Dialects::new(dialect) }
    }

    fn read(&self, exchange: &Exchange) -> Result<Answer, ProviderError> {
        let answer = self.endpoint.json(exchange)?;
        let is_answer = ["candidates", "promptFeedback"].iter().any(|key| answer.get(key).is_some());
        if words::is_error(&answer) || (!is_answer && Told::of(&answer).words().is_some()) {
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
        let finish = finish(candidate["finishReason"].as_str());
        let parts = candidate.pointer("/content/parts").and_then(Value::as_array);
        let is_thought = |part: &&Value| part["thought"] == true;
        let texts =
            parts.into_iter().flatten().filter(|part| !is_thought(part)).filter_map(|part| part["text"].as_str());
        let content: String = texts.collect();
        let thinks = || {
            parts.into_iter().flatten().any(|part| is_thought(&part))
                || usage.is_some_and(|usage| usage.reasoning_tokens > 0)
        };
        let finish = match finish {
            Finish::Stop if content.trim().is_empty() && thinks() => Finish::Silent,
            Finish::Stop if parts.is_none() => {
                return Err(paid(unusable("the answer's candidate has no parts"), usage));
            }
            finish => finish,
        };
        Ok(Answer { content, finish, usage, limits: Limits::default() })
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
        let is_known = exchange.status != StatusCode::OK || told["status"] != Value::Null;
        let refused = self.endpoint.refused(code, &self.name, exchange, &Told::of_body(&exchange.body));
        let error = ProviderError { answered: !is_known, ..refused };
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
        let model = request.model.strip_prefix("models/").unwrap_or(request.model);
        let url = self.endpoint.url(model);
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

    fn dialects(&self) -> Vec<(String, DialectConfig)> {
        self.dialects.found()
    }
}

/// Why a candidate ended.
fn finish(reason: Option<&str>) -> Finish {
    match reason {
        None | Some("STOP" | "FINISH_REASON_UNSPECIFIED") => Finish::Stop,
        Some("MAX_TOKENS") => Finish::Length,
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
        Some(reason) => Finish::other(reason),
    }
}

/// What of the request could be said otherwise.
fn sent(request: &ProviderRequest<'_>, dialect: &Dialect) -> Sent {
    let has_system = request.messages.iter().any(|message| message.role == Role::System);
    Sent {
        limit: None,
        json: match (request.format, dialect.json) {
            (OutputFormat::Text, _) => None,
            (OutputFormat::Json { schema: None }, JsonForm::Auto | JsonForm::Schema) => Some(JsonForm::Object),
            (_, form) => Some(form),
        },
        system: has_system.then_some(dialect.system),
    }
}

fn body(request: &ProviderRequest<'_>, dialect: &Dialect) -> Value {
    let systems = request.messages.iter().filter(|message| message.role == Role::System);
    let mut system = systems.map(|message| message.content.as_str()).collect::<Vec<_>>().join("\n\n");
    let addition = dialect::addition(request, dialect).unwrap_or_default();
    let is_by_user = dialect.system == SystemRole::User || system.is_empty();
    let [first, last] = if is_by_user {
        [std::mem::take(&mut system), addition]
    } else {
        if !addition.is_empty() {
            system.push_str("\n\n");
            system.push_str(&addition);
        }
        [String::new(), String::new()]
    };
    let mut body = json!({ "contents": contents(request.messages, &first, &last) });
    if !system.is_empty() {
        body["systemInstruction"] = json!({ "parts": [{ "text": system }] });
    }
    let config = generation_config(request, dialect);
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

/// What is said by user and model. `first` and `last` are what the user says before all of it and after.
fn contents(messages: &[Message], first: &str, last: &str) -> Vec<Value> {
    let mut said: Vec<(&str, Vec<&str>)> = messages
        .iter()
        .filter(|message| message.role != Role::System)
        .map(|message| (if message.role == Role::Assistant { "model" } else { "user" }, vec![message.content.as_str()]))
        .collect();
    if !first.is_empty() {
        match said.first_mut().filter(|(role, _)| *role == "user") {
            Some((_, texts)) => texts.insert(0, first),
            None => said.insert(0, ("user", vec![first])),
        }
    }
    if said.is_empty() {
        said.push(("user", vec![http::NOTHING_SAID]));
    }
    if !last.is_empty() {
        match said.last_mut().filter(|(role, _)| *role == "user") {
            Some((_, texts)) => texts.push(last),
            None => said.push(("user", vec![last])),
        }
    }
    let written = said.iter().map(|(role, texts)| {
        let parts: Vec<Value> = texts.iter().map(|text| json!({ "text": text })).collect();
        json!({ "role": role, "parts": parts })
    });
    written.collect()
}

fn generation_config(request: &ProviderRequest<'_>, dialect: &Dialect) -> Value {
    let params = request.params;
    let mut config = json!({});
    if let Some(temperature) = dialect::kept(dialect, Sampling::Temperature, params.temperature) {
        config["temperature"] = json!(temperature);
    }
    if let Some(top_p) = dialect::kept(dialect, Sampling::TopP, params.top_p) {
        config["topP"] = json!(top_p);
    }
    if let Some(limit) = params.max_output_tokens {
        config["maxOutputTokens"] = json!(limit);
    }
    if let Some(seed) = dialect::kept(dialect, Sampling::Seed, params.seed) {
        config["seed"] = json!(seed);
    }
    let stop = dialect::kept_stop(dialect, params);
    if !stop.is_empty() {
        config["stopSequences"] = json!(stop);
    }
    if let Some(penalty) = dialect::kept(dialect, Sampling::FrequencyPenalty, params.frequency_penalty) {
        config["frequencyPenalty"] = json!(penalty);
    }
    if let Some(penalty) = dialect::kept(dialect, Sampling::PresencePenalty, params.presence_penalty) {
        config["presencePenalty"] = json!(penalty);
    }
    if let Some(reasoning) = dialect::kept(dialect, Sampling::Reasoning, params.reasoning) {
        config["thinkingConfig"] = json!({ "thinkingBudget": thinking_budget(reasoning.effort) });
    }
    if let OutputFormat::Json { schema } = request.format
        && dialect.json != JsonForm::Words
    {
        config["responseMimeType"] = json!("application/json");
        if let Some(schema) = schema.as_ref().filter(|_| dialect.json != JsonForm::Object) {
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
    let count = |name: &str| http::tokens(&told[name]).unwrap_or(0);
    let prompt = http::tokens(&told["promptTokenCount"])?;
    let cached = count("cachedContentTokenCount").min(prompt);
    let thoughts = count("thoughtsTokenCount");
    Some(Usage {
        input_tokens: prompt - cached,
        cache_read_tokens: cached,
        output_tokens: count("candidatesTokenCount").saturating_add(thoughts),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversation_of_instructions_alone_is_begun_for_the_user() {
        let instructions = Message { role: Role::System, content: "Say hi.".to_owned() };
        let said = contents(&[instructions], "", "");
        assert_eq!((said.len(), &said[0]["role"]), (1, &json!("user")));
    }
}
