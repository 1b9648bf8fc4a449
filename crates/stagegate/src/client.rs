//! A client of the HTTP API, as any other program could be one: owns how requests are made and problems are read. It
//! knows nothing of the engine.

use std::time::Duration;

use futures::StreamExt as _;
use reqwest::{Method, StatusCode};
use serde_json::Value;
use sse_stream::SseStream;
use stagegate_core::{Code, Error, Event, Violation};

/// How long one request may take; event streams are exempt.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How often an event stream that broke is taken up again without an event in between.
const RECONNECTS_MAX: u32 = 20;

/// The API at one address.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    base: String,
    http: reqwest::Client,
}

impl Client {
    /// For the API at this address, without a path.
    pub(crate) fn new(base: impl Into<String>) -> Result<Self, Error> {
        let http = reqwest::Client::builder()
            .connect_timeout(Duration::from_secs(3))
            .no_proxy()
            .user_agent(concat!("stagegate/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| Error::new(Code::Internal, format!("the HTTP client could not be built: {error}")))?;
        Ok(Self { base: base.into(), http })
    }

    /// Where it is.
    pub(crate) fn base(&self) -> &str {
        &self.base
    }

    fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method, format!("{}{path}", self.base))
    }

    /// Reads a resource.
    pub(crate) async fn get(&self, path: &str) -> Result<Value, Error> {
        answer(self.request(Method::GET, path).timeout(TIMEOUT)).await
    }

    /// Posts JSON.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> Result<Value, Error> {
        answer(self.request(Method::POST, path).timeout(TIMEOUT).json(body)).await
    }

    /// Posts a text of a type.
    pub(crate) async fn post_text(&self, path: &str, content_type: &str, body: String) -> Result<Value, Error> {
        let request = self.request(Method::POST, path).timeout(TIMEOUT);
        answer(request.header("content-type", content_type).body(body)).await
    }

    /// The status and body of a probe.
    pub(crate) async fn probe(&self, path: &str, timeout: Duration) -> Result<(StatusCode, String), Error> {
        let response = self.request(Method::GET, path).timeout(timeout).send().await.map_err(|e| unreached(&e))?;
        let status = response.status();
        Ok((status, response.text().await.unwrap_or_default()))
    }

    /// Follows a run to its end. A stream that breaks is taken up after the last event that was seen.
    pub(crate) async fn follow(&self, run: &str, mut seen: impl FnMut(&Event)) -> Result<Event, Error> {
        let mut last_seq = 0_u64;
        let mut fruitless = 0;
        loop {
            let before = last_seq;
            let end = self.follow_once(run, &mut last_seq, &mut seen).await;
            match end {
                Ok(Some(end)) => return Ok(end),
                Err(error) if !matches!(error.code, Code::Unavailable | Code::Overloaded) => return Err(error),
                Ok(None) | Err(_) => {}
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

    /// One connection's worth of events; the last one, where the run ended in it.
    async fn follow_once(
        &self,
        run: &str,
        last_seq: &mut u64,
        seen: &mut impl FnMut(&Event),
    ) -> Result<Option<Event>, Error> {
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
            let Ok(item) = item else { return Ok(None) };
            let Some(data) = item.data else { continue };
            let event: Event = serde_json::from_str(&data)
                .map_err(|error| Error::new(Code::Internal, format!("an event could not be read: {error}")))?;
            if event.seq != *last_seq + 1 {
                let message = format!("event {} follows event {last_seq}: the stream has a gap", event.seq);
                return Err(Error::new(Code::Internal, message));
            }
            *last_seq = event.seq;
            seen(&event);
            if event.kind.ends_run() {
                return Ok(Some(event));
            }
        }
        Ok(None)
    }
}

/// Sends, and reads JSON or the problem.
async fn answer(request: reqwest::RequestBuilder) -> Result<Value, Error> {
    let response = request.send().await.map_err(|error| unreached(&error))?;
    if !response.status().is_success() {
        return Err(problem(response).await);
    }
    let body = response.bytes().await.map_err(|error| unreached(&error))?;
    serde_json::from_slice(&body).map_err(|error| Error::new(Code::Internal, format!("the answer is no JSON: {error}")))
}

fn unreached(error: &reqwest::Error) -> Error {
    if error.is_connect() {
        let address = error.url().map(|url| url.origin().ascii_serialization()).unwrap_or_default();
        let mend = "start a daemon with `stagegate serve`, or name another address";
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
    let body: Value = response.json().await.unwrap_or_default();
    let code = body["code"].as_str().and_then(Code::parse).unwrap_or(Code::Unavailable);
    let detail = body["detail"].as_str().map_or_else(|| format!("the answer was {status}"), str::to_owned);
    let violations: Vec<Violation> = serde_json::from_value(body["violations"].clone()).unwrap_or_default();
    Error { code, detail, violations, retry_after: None }
}
