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
/// How long a stream may be silent: the server sends a comment every 15 seconds.
const SILENCE_MAX: Duration = Duration::from_mins(1);
/// The largest answer that is read.
const ANSWER_MAX_BYTES: usize = 256 << 20;
/// The largest problem or answer of a probe that is read: it may be of something else than Stagegate.
const PROBLEM_MAX_BYTES: usize = 1 << 20;
/// The longest wait that an answer may ask for and that is told.
const RETRY_AFTER_MAX: Duration = Duration::from_hours(24);
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
        Self::with_silence(&base.into(), key, SILENCE_MAX)
    }

    fn with_silence(base: &str, key: Option<Secret>, silence_max: Duration) -> Result<Self, Error> {
        let base = base.trim_end_matches('/').to_owned();
        let mut http = reqwest::Client::builder()
            .connect_timeout(Duration::from_secs(3))
            .read_timeout(silence_max)
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
        let body = bounded(response, PROBLEM_MAX_BYTES).await.unwrap_or_default();
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
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
    let body = bounded(response, ANSWER_MAX_BYTES).await?;
    if body.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(&body).map_err(|error| Error::new(Code::Internal, format!("the answer is no JSON: {error}")))
}

/// A body of at most so many bytes.
async fn bounded(mut response: reqwest::Response, max_bytes: usize) -> Result<Vec<u8>, Error> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| unreached(&error))? {
        if body.len() + chunk.len() > max_bytes {
            return Err(Error::new(Code::Internal, format!("the answer has more than {max_bytes} bytes")));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
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
    let seconds = response.headers().get("retry-after").and_then(|wait| wait.to_str().ok()?.trim().parse().ok());
    let retry_after = seconds.map(Duration::from_secs).filter(|wait| *wait <= RETRY_AFTER_MAX);
    let body = bounded(response, PROBLEM_MAX_BYTES).await.unwrap_or_default();
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let code = body["code"].as_str().and_then(Code::parse);
    // Only what comes later may be different: a redirect or a page of something else stays what it is.
    let unknown = if status.is_server_error() { Code::Unavailable } else { Code::InvalidRequest };
    let code = code.unwrap_or(unknown);
    let other = || format!("{origin} answered {status}, and not as Stagegate does: is this the daemon's address?");
    let detail = body["detail"].as_str().map_or_else(other, str::to_owned);
    let violations: Vec<Violation> = serde_json::from_value(body["violations"].clone()).unwrap_or_default();
    Error { code, detail, violations, retry_after }
}

#[cfg(test)]
mod tests {
    use stagegate_core::EventKind;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    /// Answers one connection after another with these texts, and leaves each open.
    async fn server(answers: Vec<String>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let base = format!("http://{}", listener.local_addr().expect("bound"));
        tokio::spawn(async move {
            let mut open = Vec::new();
            for answer in answers {
                let (mut connection, _) = listener.accept().await.expect("a caller");
                let mut request = [0; 4096];
                let _ = connection.read(&mut request).await.expect("a request");
                connection.write_all(answer.as_bytes()).await.expect("written");
                open.push(connection);
            }
            std::future::pending::<()>().await;
        });
        base
    }

    fn stream(events: &[Event]) -> String {
        let data = events.iter().map(|event| serde_json::to_string(event).expect("JSON"));
        let data = data.map(|data| ["data: ", &*data, "\n\n"].concat()).collect::<String>();
        format!(
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{data}\r\n",
            data.len()
        )
    }

    fn client(base: &str) -> Client {
        stagegate_net::install_tls();
        Client::with_silence(base, None, Duration::from_millis(50)).expect("a client")
    }

    #[tokio::test]
    async fn a_stream_that_falls_silent_is_taken_up_again_after_the_last_event() {
        let event = |seq| Event::new(seq, chrono::DateTime::UNIX_EPOCH, EventKind::RunStarted);
        let base = server(vec![stream(&[event(1)]), String::new(), stream(&[event(2)])]).await;
        let mut seen = Vec::new();
        let until_second = |event: &Event| {
            seen.push(event.seq);
            event.seq < 2
        };
        let followed = client(&base).follow_while("r", until_second).await.expect("followed");
        assert!(followed.is_none() && seen == [1, 2], "{seen:?}");
    }

    #[tokio::test]
    async fn a_refusal_keeps_when_to_try_again() {
        let body = "{\"code\":\"SG0209\",\"detail\":\"full\"}";
        let answer =
            format!("HTTP/1.1 429 Too Many Requests\r\nretry-after: 7\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        let error = client(&server(vec![answer]).await).get("/x").await.expect_err("refused");
        assert_eq!((error.code, error.retry_after), (Code::QueueFull, Some(Duration::from_secs(7))));
    }

    #[tokio::test]
    async fn an_answer_without_an_end_is_not_kept() {
        let endless = "x".repeat(PROBLEM_MAX_BYTES + 1);
        let answer = format!("HTTP/1.1 502 Bad Gateway\r\ncontent-length: 9999999999\r\n\r\n{endless}");
        let error = client(&server(vec![answer]).await).get("/x").await.expect_err("refused");
        assert!(error.code == Code::Unavailable && error.detail.contains("not as Stagegate does"), "{error}");
    }
}
