//! What the providers over HTTP share: owns one exchange (send, read within a bound, name what went wrong on the way)
//! and the making of errors. Knows no vendor's body.

use std::{borrow::Cow, fmt::Write, time::Duration};

use bytes::Bytes;
use chrono::{DateTime, Utc};
use http::{
    HeaderMap, HeaderValue, Method, StatusCode,
    header::{CONTENT_TYPE, LOCATION},
};
use serde::Serialize;
use serde_json::Value;
use stagegate_core::{Clock, Code, Secret, SystemClock, Usage, answer};
use stagegate_net::{Answer, Bounds, Client, Failure, Outgoing, Stage, Trusted};
use url::Url;

use super::{
    address::Place,
    plan::Plan,
    retry_after,
    words::{self, Told},
};
use crate::provider::{Limits, ProviderError};

/// The longest part of a provider's own message that is passed on, in characters.
pub(super) const MESSAGE_MAX_CHARS: usize = 500;

/// The most of an error's body that is read, in bytes; the rest tells nothing more.
const ERROR_BODY_MAX_BYTES: usize = 64 * 1024;

/// Where a provider listens and how it is asked.
#[derive(Debug)]
pub(super) struct Endpoint {
    client: Client,
    place: Place,
    headers: HeaderMap,
    secrets: Vec<Secret>,
    answer_max_bytes: usize,
}

/// A whole answer, whatever its status.
#[derive(Debug)]
pub(super) struct Exchange {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

impl Endpoint {
    /// With the headers of the plan on every request.
    pub(super) fn new(client: Client, plan: &Plan, answer_max_bytes: usize) -> Self {
        let mut headers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static("application/json"))]);
        headers.extend(plan.headers.iter().chain(&plan.key).cloned());
        Self { client, place: plan.place.clone(), headers, secrets: plan.secrets.clone(), answer_max_bytes }
    }

    /// The same with a header on every request.
    pub(super) fn header(mut self, name: &'static str, value: HeaderValue) -> Self {
        self.headers.insert(name, value);
        self
    }

    /// The address of calls of this model.
    pub(super) fn url(&self, model: &str) -> Url {
        self.place.url(model)
    }

    /// Sends the body and reads the answer within the bound.
    pub(super) async fn post(&self, url: Url, body: &impl Serialize) -> Result<Exchange, ProviderError> {
        let body = serde_json::to_vec(body)
            .map_err(|_| error(Code::ProviderRejected, "the request cannot be written as JSON"))?;
        let request = Outgoing {
            method: Method::POST,
            headers: &self.headers,
            body: body.into(),
            bounds: Bounds { answer_max_bytes: self.answer_max_bytes, error_max_bytes: ERROR_BODY_MAX_BYTES },
            timeout: None,
        };
        let answer =
            self.client.send(Trusted::from_operator(url), request).await.map_err(|failure| self.failed(&failure))?;
        let Answer { status, headers, body } = answer;
        Ok(Exchange { status, headers, body })
    }

    /// What broke on the way.
    fn failed(&self, failure: &Failure) -> ProviderError {
        let host = self.place.base().host_str().unwrap_or("the provider");
        let over = failure.proxy.as_ref().map(|proxy| format!(" over the proxy {proxy}")).unwrap_or_default();
        let what = match &failure.stage {
            Stage::Refused(why) => return error(Code::ProviderRejected, why.to_string()),
            Stage::TooLarge(limit) => {
                let message = format!("the answer is larger than {limit} bytes (`llm.answer_max_bytes`)");
                return ProviderError { unheard: true, ..error(Code::ProviderTooLarge, message) };
            }
            Stage::Connecting => format!("could not connect to {host}{over}"),
            Stage::Asking => format!("the connection to {host}{over} broke"),
            Stage::Reading(_) => format!("the connection to {host}{over} broke while the answer was read"),
        };
        let reason = failure.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
        let mend =
            if failure.is_unknown_authority() { " (an authority of your own is named by `net.ca_file`)" } else { "" };
        let broken = error(Code::ProviderUnreachable, self.clean(&format!("{what}{reason}{mend}")));
        retryable(ProviderError { unheard: failure.stage != Stage::Connecting, ..broken })
    }

    /// A provider's own words, fit to be passed on: bounded, on one line, without the key.
    pub(super) fn clean(&self, text: &str) -> String {
        let text = self.secrets.iter().fold(Cow::Borrowed(text), |text, secret| without_key_in(text, secret.expose()));
        let mut clean = String::new();
        for word in text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty()) {
            let separator = if clean.is_empty() { "" } else { " " };
            let _ = write!(clean, "{separator}{word}");
        }
        if clean.chars().count() > MESSAGE_MAX_CHARS {
            clean = clean.chars().take(MESSAGE_MAX_CHARS - 1).collect();
            clean.push('…');
        }
        clean
    }

    /// The body of a 200 as JSON.
    pub(super) fn json(&self, exchange: &Exchange) -> Result<Value, ProviderError> {
        answer::body(&exchange.body).ok_or_else(|| {
            let kind = exchange.text(CONTENT_TYPE.as_str()).unwrap_or("no content type");
            let said = Told::of_body(&exchange.body).words().map_or_else(String::new, |words| format!(": {words}"));
            let message = format!("answered {} with something that is no JSON", exchange.status.as_u16());
            quoting(malformed(message), self.clean(&format!("answered with {kind} that is no JSON{said}")))
        })
    }

    /// A refusal of a provider, with its words where it had some. They may echo the prompt. A vendor refuses with an error
    /// object of its own, and charges nothing; what a gateway answers in its place does not tell what the model charges.
    pub(super) fn refused(&self, code: Code, name: &str, exchange: &Exchange, told: &Told) -> ProviderError {
        let unheard = is_of_gateway(exchange.status) && !exchange.has_vendor_error();
        let mut message = exchange.wordless();
        if code == Code::ProviderRejected && told.is_about_context() {
            message.push_str(": the prompt does not fit the model's context");
        }
        let refused = ProviderError { unheard, ..error(code, message) };
        match told.words() {
            Some(words) => quoting(refused, format!("{name}: {}", self.clean(&words))),
            None => refused,
        }
    }
}

/// The same error with the place that was asked: host, port and path, without the query.
pub(super) fn at(error: ProviderError, url: &Url) -> ProviderError {
    let host = url.host_str().unwrap_or("the provider");
    let port = url.port_or_known_default().map_or_else(String::new, |port| format!(":{port}"));
    let message = format!("{} (POST {host}{port}{})", error.message, url.path());
    ProviderError { message, ..error }
}

impl Exchange {
    /// A number in a header.
    pub(super) fn number(&self, name: &str) -> Option<u64> {
        self.text(name)?.trim().parse().ok()
    }

    /// A header's text.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The body of an error as JSON, null where it is none.
    pub(super) fn error_json(&self) -> Value {
        answer::body(&self.body).unwrap_or(Value::Null)
    }

    /// Whether the body is an error as vendors write it: an object that says so.
    fn has_vendor_error(&self) -> bool {
        let body = self.error_json();
        let told = body.pointer("/0/error").unwrap_or(&body["error"]);
        told.is_object() || (told.is_null() && words::is_error(&body))
    }

    /// When it was answered, for dates that must be compared with something.
    pub(super) fn answered_at(&self) -> DateTime<Utc> {
        retry_after::answered_at(&self.headers, SystemClock.now())
    }

    /// What the headers ask to wait.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        retry_after::from_headers(&self.headers, self.answered_at())
    }

    /// What to say of an error that came without words of its own.
    pub(super) fn wordless(&self) -> String {
        let status = self.status;
        match self.text(LOCATION.as_str()) {
            Some(_) if status.is_redirection() => {
                format!(
                    "answered with a redirect ({status}), which is not followed: put the final address into `base_url`"
                )
            }
            _ => format!("answered {status}"),
        }
    }
}

/// What a status means where the body does not say it better.
pub(super) fn by_status(status: StatusCode) -> (Code, bool) {
    match status.as_u16() {
        401 | 403 => (Code::ProviderAuth, false),
        402 => (Code::ProviderQuota, false),
        404 => (Code::ProviderModel, false),
        408 | 409 | 425 | 499 | 500.. => (Code::ProviderFailed, true),
        429 => (Code::ProviderRateLimited, true),
        _ => (Code::ProviderRejected, false),
    }
}

/// A number of tokens. Some servers write it as a fraction; one at the end of the range is one that is capped later.
pub(super) fn tokens(told: &Value) -> Option<u64> {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "float casts saturate")]
    let whole = |number: f64| (number >= 0.0).then_some(number as u64);
    told.as_u64().or_else(|| told.as_f64().and_then(whole))
}

/// An error that will not go away by itself.
pub(super) fn error(code: Code, message: impl Into<String>) -> ProviderError {
    ProviderError {
        code,
        message: message.into(),
        detail: None,
        retryable: false,
        retry_after: None,
        usage: None,
        unheard: false,
        answered: false,
        limits: Limits::default(),
    }
}

/// The least length of a key that is looked for in texts. A shorter one (`local`, `none`, which keyless servers are given)
/// is a word like others: to take it out would make riddles, and tell where it stood.
const KEY_MIN_BYTES: usize = 8;
/// From this length on it is no word by chance, and is taken out also inside of another.
const KEY_SURE_BYTES: usize = 16;

/// The text without the key, wherever it stands as a token of its own.
fn without_key_in<'a>(text: Cow<'a, str>, key: &str) -> Cow<'a, str> {
    if key.len() < KEY_MIN_BYTES || !text.contains(key) {
        return text;
    }
    let is_inside = |c: char| c.is_alphanumeric() || c == '_';
    let mut clean = String::with_capacity(text.len());
    let mut rest = text.as_ref();
    while let Some(at) = rest.find(key) {
        let (before, after) = (&rest[..at], &rest[at + key.len()..]);
        clean.push_str(before);
        let joined = key.len() < KEY_SURE_BYTES && (clean.ends_with(is_inside) || after.starts_with(is_inside));
        clean.push_str(if joined { key } else { "[redacted]" });
        rest = after;
    }
    clean.push_str(rest);
    Cow::Owned(clean)
}

/// The same error with the provider's words.
pub(super) fn quoting(error: ProviderError, words: String) -> ProviderError {
    ProviderError { detail: Some(words), ..error }
}

/// Whether a status says that something between us and the model stopped waiting for it: the model may have gone on, and
/// may charge for that. 503 is not among them: it says that no
/// server took the request.
fn is_of_gateway(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 499 | 502 | 504 | 520..=524)
}

/// The same error as one that may.
pub(super) fn retryable(error: ProviderError) -> ProviderError {
    ProviderError { retryable: true, ..error }
}

/// An answer that is not of its vendor's shape. Another try may bring a better one. It was an answer, so that it is
/// charged for; for how many tokens may be told beside it.
pub(super) fn malformed(message: impl Into<String>) -> ProviderError {
    ProviderError { unheard: true, ..retryable(error(Code::ProviderMalformed, message)) }
}

/// An answer of its vendor's shape that cannot be used.
pub(super) fn unusable(message: impl Into<String>) -> ProviderError {
    ProviderError { answered: true, ..malformed(message) }
}

/// The same with what was paid all the same.
pub(super) fn paid(error: ProviderError, usage: Option<Usage>) -> ProviderError {
    ProviderError { unheard: error.unheard && usage.is_none(), usage, ..error }
}

/// What a provider without its key answers.
pub(super) fn without_key(name: &str, variable: &str) -> ProviderError {
    error(Code::ProviderAuth, format!("provider `{name}` has no key: set {variable} or `llm.providers.{name}.api_key`"))
}

/// What is said for the user of a conversation of instructions alone, which definitions may have that were registered when
/// that was allowed.
pub(super) const NOTHING_SAID: &str = "Begin.";

/// What a provider answers that must be asked by a user first. Nothing is put in that place: the author did not write it.
pub(super) fn without_user(name: &str) -> ProviderError {
    let message = "the conversation does not begin with a user's message, which this provider demands: begin `messages` \
                   with `role: user`";
    error(Code::ProviderRejected, format!("{name}: {message}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_taken_out_as_a_token_and_a_short_one_not_at_all() {
        for (key, text, clean) in [
            ("local", "the localhost is local", "the localhost is local"),
            ("sk-12345678", "key sk-12345678: wrong", "key [redacted]: wrong"),
            ("sk-12345678", "(sk-12345678,sk-12345678)", "([redacted],[redacted])"),
            ("production", "productions of production", "productions of [redacted]"),
        ] {
            assert_eq!(without_key_in(Cow::Borrowed(text), key), clean);
        }
    }
}
