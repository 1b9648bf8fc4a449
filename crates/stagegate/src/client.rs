//! A client of the HTTP API, as any other program could be one: owns how requests are made and problems are read. It
//! knows nothing of the engine.

use std::time::Duration;

use futures::StreamExt as _;
use reqwest::{Method, StatusCode};
use serde_json::Value;
use sse_stream::SseStream;
use stagegate_core::{Code, Error, Event, Secret, Violation};
use url::{Host, Url};

/// How long one request may take; event streams are exempt.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How often an event stream that broke is taken up again without an event in between.
const RECONNECTS_MAX: u32 = 20;

/// The API at one address.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    base: String,
    key: Option<Secret>,
    http: reqwest::Client,
}

impl Client {
    /// For the API at this address, which may have a path, with the key that opens it.
    pub(crate) fn new(base: impl Into<String>, key: Option<Secret>) -> Result<Self, Error> {
        let base = base.into().trim_end_matches('/').to_owned();
        let mut http = reqwest::Client::builder()
            .connect_timeout(Duration::from_secs(3))
            // A key is for the address that was given.
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("stagegate/", env!("CARGO_PKG_VERSION")));
        if is_of_this_machine(&base) {
            http = http.no_proxy();
        }
        let http = http
            .build()
            .map_err(|error| Error::new(Code::Internal, format!("the HTTP client could not be built: {error}")))?;
        Ok(Self { base, key, http })
    }

    /// Where it is.
    pub(crate) fn base(&self) -> &str {
        &self.base
    }

    fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.base));
        match &self.key {
            Some(key) => request.bearer_auth(key.expose()),
            None => request,
        }
    }

    /// Reads a resource.
    pub(crate) async fn get(&self, path: &str) -> Result<Value, Error> {
        answer(self.request(Method::GET, path).timeout(TIMEOUT)).await
    }

    /// Posts JSON.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> Result<Value, Error> {
        answer(self.request(Method::POST, path).timeout(TIMEOUT).json(body)).await
    }

    /// Posts JSON that counts once, however often it is posted under this key.
    pub(crate) async fn post_once(&self, path: &str, body: &Value, key: &str) -> Result<Value, Error> {
        let request = self.request(Method::POST, path).timeout(TIMEOUT);
        answer(request.header("idempotency-key", key).json(body)).await
    }

    /// Posts a text of a type.
    pub(crate) async fn post_text(&self, path: &str, content_type: &str, body: String) -> Result<Value, Error> {
        let request = self.request(Method::POST, path).timeout(TIMEOUT);
        answer(request.header("content-type", content_type).body(body)).await
    }

    /// Removes a resource.
    pub(crate) async fn delete(&self, path: &str) -> Result<Value, Error> {
        answer(self.request(Method::DELETE, path).timeout(TIMEOUT)).await
    }

    /// The status and body of a probe.
    pub(crate) async fn probe(&self, path: &str, timeout: Duration) -> Result<(StatusCode, String), Error> {
        let response = self.request(Method::GET, path).timeout(timeout).send().await.map_err(|e| unreached(&e))?;
        let status = response.status();
        Ok((status, response.text().await.unwrap_or_default()))
    }

    /// Follows a run to its end. A stream that breaks is taken up after the last event that was seen.
    pub(crate) async fn follow(&self, run: &str, mut seen: impl FnMut(&Event)) -> Result<(), Error> {
        let all = |event: &Event| {
            seen(event);
            true
        };
        self.follow_while(run, all).await.map(drop)
    }

    /// The same for as long as `seen` says that it goes on; None where it said no before the run's end.
    pub(crate) async fn follow_while(
        &self,
        run: &str,
        mut seen: impl FnMut(&Event) -> bool,
    ) -> Result<Option<Event>, Error> {
        let mut last_seq = 0_u64;
        let mut fruitless = 0;
        loop {
            let before = last_seq;
            match self.follow_once(run, &mut last_seq, &mut seen).await {
                Ok(Followed::ToItsEnd(end)) => return Ok(Some(*end)),
                Ok(Followed::Enough) => return Ok(None),
                Err(error) if !matches!(error.code, Code::Unavailable | Code::Overloaded) => return Err(error),
                Ok(Followed::Broken) | Err(_) => {}
            }
            fruitless = if last_seq > before { 0 } else { fruitless + 1 };
            if fruitless > RECONNECTS_MAX {
                return Err(Error::new(
                    Code::Unavailable,
                    format!("the events of run {run} break off again and again"),
                ));
            }
            tokio::time::sleep(Duration::from_millis(100) * fruitless.min(20)).await;
        }
    }

    /// One connection's worth of events.
    async fn follow_once(
        &self,
        run: &str,
        last_seq: &mut u64,
        seen: &mut impl FnMut(&Event) -> bool,
    ) -> Result<Followed, Error> {
        let mut request = self.request(Method::GET, &format!("/v1/runs/{run}/events"));
        request = request.header("accept", "text/event-stream");
        if *last_seq > 0 {
            request = request.header("last-event-id", last_seq.to_string());
        }
        let response = request.send().await.map_err(|error| unreached(&error))?;
        if !response.status().is_success() {
            return Err(problem(response).await);
        }
        let mut stream = SseStream::from_bytes_stream(response.bytes_stream());
        while let Some(item) = stream.next().await {
            // A connection that breaks is taken up again by the caller.
            let Ok(item) = item else { return Ok(Followed::Broken) };
            let Some(data) = item.data else { continue };
            let event: Event = serde_json::from_str(&data)
                .map_err(|error| Error::new(Code::Internal, format!("an event could not be read: {error}")))?;
            if event.seq != *last_seq + 1 {
                let message = format!("event {} follows event {last_seq}: the stream has a gap", event.seq);
                return Err(Error::new(Code::Internal, message));
            }
            *last_seq = event.seq;
            let goes_on = seen(&event);
            if event.kind.ends_run() {
                return Ok(Followed::ToItsEnd(Box::new(event)));
            }
            if !goes_on {
                return Ok(Followed::Enough);
            }
        }
        Ok(Followed::Broken)
    }
}

/// How one connection's worth of events ended.
enum Followed {
    /// With the run's last event.
    ToItsEnd(Box<Event>),
    /// The one who watches has seen enough.
    Enough,
    /// Before that.
    Broken,
}

/// Whether an address is of this machine: then no proxy stands between.
pub(crate) fn is_of_this_machine(base: &str) -> bool {
    match Url::parse(base).ok().as_ref().and_then(Url::host) {
        Some(Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(Host::Ipv4(ip)) => ip.is_loopback(),
        Some(Host::Ipv6(ip)) => ip.is_loopback(),
        None => false,
    }
}

/// Sends, and reads JSON or the problem.
async fn answer(request: reqwest::RequestBuilder) -> Result<Value, Error> {
    let response = request.send().await.map_err(|error| unreached(&error))?;
    if !response.status().is_success() {
        return Err(problem(response).await);
    }
    let body = response.bytes().await.map_err(|error| unreached(&error))?;
    if body.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(&body).map_err(|error| Error::new(Code::Internal, format!("the answer is no JSON: {error}")))
}

fn unreached(error: &reqwest::Error) -> Error {
    if error.is_connect() {
        let address = error.url().map(|url| url.origin().ascii_serialization()).unwrap_or_default();
        let mend = "start a daemon with `stagegate serve`, or name another one with --server";
        return Error::new(Code::Unavailable, format!("nothing answers at {address}: {mend}"));
    }
    let mut detail = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        detail = format!("{detail}: {inner}");
        cause = inner.source();
    }
    Error::new(Code::Unavailable, detail)
}

/// A problem document as the error that it tells of.
async fn problem(response: reqwest::Response) -> Error {
    let status = response.status();
    let origin = response.url().origin().ascii_serialization();
    let body: Value = response.json().await.unwrap_or_default();
    let code = body["code"].as_str().and_then(Code::parse);
    // Only what comes later may be different: a redirect or a page of something else stays what it is.
    let unknown = if status.is_server_error() { Code::Unavailable } else { Code::InvalidRequest };
    let code = code.unwrap_or(unknown);
    let other = || format!("{origin} answered {status}, and not as Stagegate does: is this the daemon's address?");
    let detail = body["detail"].as_str().map_or_else(other, str::to_owned);
    let violations: Vec<Violation> = serde_json::from_value(body["violations"].clone()).unwrap_or_default();
    Error { code, detail, violations, retry_after: None }
}
