//! What the providers over HTTP share: owns one exchange (send, read within a bound, name what went wrong on the way)
//! and the making of errors. Knows no vendor's body.

use std::{fmt::Write, time::Duration};

use bytes::{Bytes, BytesMut};
use chrono::{DateTime, Utc};
use reqwest::{
    Client, Method, Request, StatusCode,
    header::{ACCEPT, CONTENT_TYPE, HOST, HeaderMap, HeaderValue, LOCATION, USER_AGENT},
};
use serde::Serialize;
use serde_json::Value;
use stagegate_core::{Clock, Code, Error, Secret, SystemClock, Usage, Violation};
use url::Url;

use super::{
    plain::{self, Broken, Keeping, Plain},
    retry_after,
};
use crate::provider::{Limits, ProviderError};

/// The longest part of a provider's own message that is passed on, in characters.
pub(super) const MESSAGE_MAX_CHARS: usize = 500;

/// The most of an error's body that is read, in bytes; the rest tells nothing more.
const ERROR_BODY_MAX_BYTES: usize = 64 * 1024;

/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long an idle connection is kept; shorter than the idle time-outs of the vendors' and the clouds' balancers.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(50);

/// Idle connections kept per provider: as many as calls that may be under way at once in a busy deployment, since one
/// more would be opened and closed with each call.
const POOL_MAX_IDLE_PER_HOST: usize = 1_024;

/// How often the system tests a silent connection.
const TCP_KEEPALIVE: Duration = Duration::from_secs(30);

/// What we call ourselves.
const OUR_NAME: &str = concat!("stagegate/", env!("CARGO_PKG_VERSION"));

/// The HTTP client that all providers share. Redirects are not followed: a key goes only where it was meant to go.
/// There is no time-out on answers here: deadlines are the caller's.
pub fn client() -> Result<Client, Error> {
    crate::tls::install_tls();
    Client::builder()
        .user_agent(OUR_NAME)
        .connect_timeout(CONNECT_TIMEOUT)
        .pool_idle_timeout(POOL_IDLE_TIMEOUT)
        .pool_max_idle_per_host(POOL_MAX_IDLE_PER_HOST)
        .tcp_keepalive(TCP_KEEPALIVE)
        .redirect(reqwest::redirect::Policy::none())
        .build()
        .map_err(|error| Error::new(Code::InvalidConfig, format!("the HTTP client could not be built: {error}")))
}

/// Where a provider listens and how it is asked.
#[derive(Debug)]
pub(super) struct Endpoint {
    client: Client,
    /// The short way, where there is one.
    plain: Option<Plain>,
    base: Url,
    headers: HeaderMap,
    key: Option<Secret>,
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
    /// `base` is what comes before the vendor's own paths.
    pub(super) fn new(client: Client, base: Url, key: Option<Secret>, answer_max_bytes: usize) -> Self {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
        headers.insert(USER_AGENT, HeaderValue::from_static(OUR_NAME));
        let keeping = Keeping {
            idle_max: POOL_MAX_IDLE_PER_HOST,
            idle_for: POOL_IDLE_TIMEOUT,
            connect_timeout: CONNECT_TIMEOUT,
            keepalive: TCP_KEEPALIVE,
        };
        let host = HeaderValue::from_str(base.authority()).ok();
        let plain = host.and_then(|host| {
            let plain = Plain::to(base.as_str(), keeping)?;
            headers.insert(HOST, host);
            Some(plain)
        });
        Self { client, plain, base, headers, key, answer_max_bytes }
    }

    /// The same with a header on every request.
    pub(super) fn header(mut self, name: &'static str, value: HeaderValue) -> Self {
        self.headers.insert(name, value);
        self
    }

    /// The address below the base, each segment encoded.
    pub(super) fn url(&self, segments: &[&str]) -> Url {
        let mut url = self.base.clone();
        // `base_url` made sure that it is an http address, which has a path.
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(segments);
        }
        url
    }

    /// Sends the body and reads the answer within the bound.
    pub(super) async fn post(&self, url: Url, body: &impl Serialize) -> Result<Exchange, ProviderError> {
        let body = serde_json::to_vec(body)
            .map_err(|_| error(Code::ProviderRejected, "the request cannot be written as JSON"))?;
        match &self.plain {
            Some(plain) => self.post_plainly(plain, &url, body).await,
            None => self.post_anyhow(url, body).await,
        }
    }

    /// Over the general client.
    async fn post_anyhow(&self, url: Url, body: Vec<u8>) -> Result<Exchange, ProviderError> {
        let mut request = Request::new(Method::POST, url);
        request.headers_mut().clone_from(&self.headers);
        *request.body_mut() = Some(body.into());
        let mut response = self.client.execute(request).await.map_err(|error| self.unreachable(&error))?;
        let (status, headers) = (response.status(), std::mem::take(response.headers_mut()));
        let mut body = self.gathering(status, response.content_length())?;
        loop {
            match response.chunk().await {
                Ok(Some(chunk)) => {
                    if body.add(&chunk)? {
                        continue;
                    }
                }
                Ok(None) => {}
                Err(error) => body.cut(|| self.unreachable(&error))?,
            }
            return Ok(Exchange { status, headers, body: body.whole() });
        }
    }

    /// Straight to the server.
    async fn post_plainly(&self, plain: &Plain, url: &Url, body: Vec<u8>) -> Result<Exchange, ProviderError> {
        let message = plain::post(url.path(), &self.headers, body);
        let mut answer = plain.send(message).await.map_err(|broken| match broken {
            Broken::Unconnected(cause) => self.broken(Stage::Connecting, &*cause),
            Broken::Unanswered(cause) => self.broken(Stage::Asking, &cause),
        })?;
        let (status, headers) = (answer.status, std::mem::take(&mut answer.headers));
        let mut body = self.gathering(status, answer.announced())?;
        loop {
            match answer.piece().await {
                Ok(Some(piece)) => {
                    if body.add(&piece)? {
                        continue;
                    }
                }
                Ok(None) => {}
                Err(error) => body.cut(|| self.broken(Stage::Reading, &error))?,
            }
            answer.end();
            return Ok(Exchange { status, headers, body: body.whole() });
        }
    }

    /// An empty body of so many announced bytes, to be filled within the bound.
    fn gathering(&self, status: StatusCode, announced: Option<u64>) -> Result<Gathering, ProviderError> {
        let announced = announced.and_then(|length| usize::try_from(length).ok()).unwrap_or(0);
        let max_bytes = if status.is_success() { self.answer_max_bytes } else { ERROR_BODY_MAX_BYTES };
        let body = Gathering { is_error: !status.is_success(), max_bytes, announced, ..Gathering::default() };
        if announced > max_bytes && !body.is_error { Err(body.too_large()) } else { Ok(body) }
    }

    fn unreachable(&self, cause: &reqwest::Error) -> ProviderError {
        let stage = if cause.is_connect() {
            Stage::Connecting
        } else if cause.is_body() || cause.is_decode() {
            Stage::Reading
        } else {
            Stage::Asking
        };
        self.broken(stage, cause)
    }

    fn broken(&self, stage: Stage, cause: &(dyn std::error::Error + 'static)) -> ProviderError {
        let host = self.base.host_str().unwrap_or("the provider");
        let what = match stage {
            Stage::Connecting => format!("could not connect to {host}"),
            Stage::Asking => format!("the connection to {host} broke"),
            Stage::Reading => format!("the connection to {host} broke while the answer was read"),
        };
        // The outer texts of such an error hold the address; the innermost says what happened.
        let mut inner = cause;
        while let Some(source) = inner.source() {
            inner = source;
        }
        let inner =
            if cause.source().is_some() || cause.is::<std::io::Error>() { format!(": {inner}") } else { String::new() };
        let unheard = !matches!(stage, Stage::Connecting);
        let broken = error(Code::ProviderUnreachable, self.clean(&format!("{what}{inner}")));
        retryable(ProviderError { unheard, ..broken })
    }

    /// A provider's own words, fit to be passed on: bounded, on one line, without the key.
    pub(super) fn clean(&self, text: &str) -> String {
        let text = match &self.key {
            Some(key) => without_key_in(text, key.expose()),
            _ => text.to_owned(),
        };
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
        serde_json::from_slice(&exchange.body).map_err(|_| {
            let kind = exchange.headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
            let kind = self.clean(kind.unwrap_or("no content type"));
            let message = format!("answered {} with something that is no JSON", exchange.status.as_u16());
            quoting(malformed(message), format!("answered with {kind} that is no JSON"))
        })
    }
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
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    /// Whether the body is an error as vendors write it: an `error` that is an object.
    fn has_vendor_error(&self) -> bool {
        let body = self.error_json();
        body.pointer("/0/error").unwrap_or(&body["error"]).is_object()
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

/// Where an exchange broke.
#[derive(Debug, Clone, Copy)]
enum Stage {
    Connecting,
    Asking,
    Reading,
}

/// A body on its way, within its bound.
#[derive(Debug, Default)]
struct Gathering {
    /// An error's body: what there is of it will do, and what is beyond the bound tells nothing more.
    is_error: bool,
    max_bytes: usize,
    announced: usize,
    /// Most bodies come in one piece, which needs no copy.
    first: Bytes,
    /// All of it, once there is a second piece.
    joined: BytesMut,
}

impl Gathering {
    /// Takes a piece. False where no more is wanted.
    fn add(&mut self, piece: &Bytes) -> Result<bool, ProviderError> {
        let room = self.max_bytes - self.first.len().max(self.joined.len());
        if piece.len() > room && !self.is_error {
            return Err(self.too_large());
        }
        let piece = piece.slice(..piece.len().min(room));
        let is_full = piece.len() == room;
        if self.first.is_empty() && self.joined.is_empty() {
            self.first = piece;
        } else {
            if self.joined.is_empty() {
                self.joined.reserve(self.announced.min(self.max_bytes).max(self.first.len() + piece.len()));
                self.joined.extend_from_slice(&std::mem::take(&mut self.first));
            }
            self.joined.extend_from_slice(&piece);
        }
        Ok(!(self.is_error && is_full))
    }

    /// The connection broke: of an error, what has come is enough.
    fn cut(&self, why: impl FnOnce() -> ProviderError) -> Result<(), ProviderError> {
        if self.is_error { Ok(()) } else { Err(why()) }
    }

    fn too_large(&self) -> ProviderError {
        let limit = self.max_bytes;
        let message = format!("the answer is larger than {limit} bytes (`llm.answer_max_bytes`)");
        ProviderError { unheard: true, ..error(Code::ProviderTooLarge, message) }
    }

    fn whole(self) -> Bytes {
        if self.joined.is_empty() { self.first } else { self.joined.freeze() }
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
fn without_key_in(text: &str, key: &str) -> String {
    if key.len() < KEY_MIN_BYTES {
        return text.to_owned();
    }
    let is_inside = |c: char| c.is_alphanumeric() || c == '_';
    let mut clean = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(key) {
        let (before, after) = (&rest[..at], &rest[at + key.len()..]);
        clean.push_str(before);
        let joined = key.len() < KEY_SURE_BYTES && (clean.ends_with(is_inside) || after.starts_with(is_inside));
        clean.push_str(if joined { key } else { "[redacted]" });
        rest = after;
    }
    clean.push_str(rest);
    clean
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

/// A refusal of a provider, with its words where it had some. They may echo the prompt. A vendor refuses with an error
/// object of its own, and charges nothing; what a gateway answers in its place does not tell what the model charges.
pub(super) fn refused(code: Code, name: &str, exchange: &Exchange, words: Option<String>) -> ProviderError {
    let unheard = is_of_gateway(exchange.status) && !exchange.has_vendor_error();
    let refused = ProviderError { unheard, ..error(code, format!("{name}: {}", exchange.wordless())) };
    match words {
        Some(words) => quoting(refused, format!("{name}: {words}")),
        None => refused,
    }
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

/// A header that carries a key. It is marked as sensitive, so that nothing prints it.
pub(super) fn key_header(name: &str, prefix: &str, key: &Secret) -> Result<HeaderValue, Violation> {
    let mut value = HeaderValue::from_str(&format!("{prefix}{}", key.expose())).map_err(|_| {
        Violation::new(
            Code::InvalidConfig,
            format!("llm.providers.{name}.api_key"),
            "the key holds characters that no HTTP header can carry",
        )
        .mend("give the key alone, on one line")
    })?;
    value.set_sensitive(true);
    Ok(value)
}

/// Checks an address of one's own.
pub(super) fn base_url(name: &str, text: &str) -> Result<Url, Violation> {
    let wrong = |what: &str, mend: &str| {
        Violation::new(Code::InvalidConfig, format!("llm.providers.{name}.base_url"), what.to_owned()).mend(mend)
    };
    let example = "write an address such as `http://localhost:11434/v1`";
    let url = Url::parse(text.trim()).map_err(|_| wrong("it is no absolute URL", example))?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(wrong("it is no http or https address", example));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(wrong("it holds credentials", "give the key as `api_key`"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(wrong("it holds a query or a fragment", "end it before `?` or `#`"));
    }
    Ok(url)
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use stagegate_testkit::{
        FakeProvider,
        provider::{Reply, any},
    };

    use super::*;

    const MAX_BYTES: usize = 10_000;

    /// The short way and the general one.
    fn both_ways(base: &str) -> [Endpoint; 2] {
        [true, false].map(|short| {
            let base = Url::parse(base).expect("an address");
            let endpoint = Endpoint::new(client().expect("a client"), base, None, MAX_BYTES);
            assert!(endpoint.plain.is_some());
            Endpoint { plain: endpoint.plain.filter(|_| short), ..endpoint }
        })
    }

    #[test]
    fn a_key_is_taken_out_as_a_token_and_a_short_one_not_at_all() {
        for (key, text, clean) in [
            ("local", "the localhost is local", "the localhost is local"),
            ("sk-12345678", "key sk-12345678: wrong", "key [redacted]: wrong"),
            ("sk-12345678", "(sk-12345678,sk-12345678)", "([redacted],[redacted])"),
            ("production", "productions of production", "productions of [redacted]"),
        ] {
            assert_eq!(without_key_in(text, key), clean);
        }
    }

    async fn ask(endpoint: &Endpoint) -> Result<Exchange, ProviderError> {
        let body = json!({ "model": "m", "messages": [{ "role": "user", "content": "Hi" }] });
        endpoint.post(endpoint.url(&["chat", "completions"]), &body).await
    }

    #[tokio::test]
    async fn both_ways_bring_the_same() {
        let fake = FakeProvider::start().await;
        let pause = Duration::from_millis(1);
        let replies = [
            Reply::raw("{}"),
            Reply::raw("x".repeat(MAX_BYTES)),
            Reply::raw("x".repeat(MAX_BYTES)).drip(3_000, pause),
            Reply::raw(""),
            Reply::status(500, "y".repeat(100)),
            Reply::status(500, "y".repeat(2 * ERROR_BODY_MAX_BYTES)),
            Reply::status(500, "y".repeat(2 * ERROR_BODY_MAX_BYTES)).drip(50_000, pause),
            Reply::status(500, "y".repeat(100)).cut_halfway(),
            Reply::status(302, "").header("location", "http://elsewhere/"),
            Reply::huge(MAX_BYTES + 1),
            Reply::huge(MAX_BYTES + 1).drip(2_000, pause),
            Reply::text("Madrid.").cut_halfway(),
            Reply::close(),
        ];
        let [short, general] = both_ways(&fake.openai_base_url());
        for reply in replies {
            fake.on(any()).once(reply.clone()).once(reply.clone());
            match (ask(&short).await, ask(&general).await) {
                (Ok(one), Ok(other)) => {
                    assert_eq!((one.status, &one.body), (other.status, &other.body), "{reply:?}");
                    assert_eq!(one.text("location"), other.text("location"));
                }
                (Err(one), Err(other)) => {
                    assert_eq!((one.code, one.retryable), (other.code, other.retryable), "{reply:?}");
                }
                (one, other) => panic!("{reply:?}: {one:?} but {other:?}"),
            }
        }
        let [one, other] = [0, 1].map(|index| {
            let mut headers = fake.calls()[index].headers.clone();
            headers.remove("accept-encoding");
            headers
        });
        assert_eq!(one, other);
        let [one, other] = [0, 1].map(|index| (fake.calls()[index].body.clone(), fake.calls()[index].path.clone()));
        assert_eq!(one, other);
    }

    #[test]
    fn only_what_is_in_the_clear_goes_the_short_way() {
        let endpoint = |base: &str| {
            Endpoint::new(client().expect("a client"), Url::parse(base).expect("an address"), None, MAX_BYTES)
        };
        assert!(endpoint("http://127.0.0.1:1/v1").plain.is_some());
        assert!(endpoint("https://127.0.0.1:1/v1").plain.is_none());
    }
}
