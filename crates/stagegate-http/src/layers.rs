//! The layers around every route: request ids, the span, the access log line, metrics, limits and headers. Their order
//! is told in [`crate::router`].

use std::{borrow::Cow, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use axum::{
    extract::{MatchedPath, Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use futures::FutureExt;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Version,
    header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, HOST, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS},
};
use stagegate_core::{Code, Error};
use stagegate_telemetry::Metrics;
use tokio::time::Instant;
use tracing::Instrument as _;

use crate::{
    body,
    problem::{self, Problem},
    serve::OnReservedPlace,
    state::Shared,
};

/// The header of the correlation id.
pub(crate) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The longest correlation id that is taken from a caller.
const REQUEST_ID_MAX_BYTES: usize = 128;
/// The route of a request that met none; also the metrics' label.
const UNMATCHED: &str = "unmatched";

/// The correlation id of a request.
#[derive(Debug, Clone)]
pub(crate) struct RequestId(pub(crate) Arc<str>);

impl RequestId {
    /// The caller's own where it is sane, else a new one.
    fn of(headers: &HeaderMap) -> Self {
        let given = headers.get(X_REQUEST_ID).and_then(|value| value.to_str().ok());
        let sane =
            |id: &&str| (1..=REQUEST_ID_MAX_BYTES).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic());
        match given.filter(sane) {
            Some(id) => Self(Arc::from(id)),
            None => Self(Arc::from(uuid::Uuid::new_v4().to_string())),
        }
    }
}

/// Layers 2 to 4: gives the request its id, follows it with a span, a log line and metrics, turns a panic into a
/// problem, and writes whatever problem comes out.
pub(crate) async fn observe(State(shared): State<Shared>, mut request: Request, next: Next) -> Response {
    let id = RequestId::of(request.headers());
    request.extensions_mut().insert(id.clone());
    let method = request.method().clone();
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or(Cow::Borrowed(UNMATCHED), |path| Cow::Owned(path.as_str().to_owned()));
    let span = tracing::info_span!(
        "request",
        method = method.as_str(),
        route = %route,
        request_id = %id.0,
        tenant = tracing::field::Empty,
        trace_id = tracing::field::Empty,
    );
    if let Some(trace_id) = trace_id(request.headers()) {
        span.record("trace_id", trace_id);
    }
    let watch = Watch::start(shared.metrics.clone(), &method, route, span.clone());
    async move {
        let outcome = AssertUnwindSafe(next.run(request)).catch_unwind().await;
        let response = outcome.unwrap_or_else(|panic| panicked(panic.as_ref()).into_response());
        let mut response = problem::finish(response, &method, &id.0, &shared.metrics);
        // What was accepted as an id is visible ASCII, or our own UUID.
        if let Ok(value) = HeaderValue::from_str(&id.0) {
            response.headers_mut().insert(X_REQUEST_ID, value);
        }
        watch.finish(response.status().as_u16());
        response
    }
    .instrument(span)
    .await
}

fn panicked(panic: &(dyn std::any::Any + Send)) -> Problem {
    let text = panic.downcast_ref::<&str>().copied().map(str::to_owned);
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned());
    Problem::new(Code::Internal, format!("a handler panicked: {text}"))
}

/// The trace id of a W3C `traceparent`: `00-<32 hex>-<16 hex>-<2 hex>`.
fn trace_id(headers: &HeaderMap) -> Option<&str> {
    let text = headers.get("traceparent")?.to_str().ok()?;
    let mut parts = text.split('-');
    let (version, trace, parent, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let hex = |part: &str, length: usize| {
        part.len() == length && part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let known = hex(version, 2) && version != "ff" && hex(trace, 32) && hex(parent, 16) && hex(flags, 2);
    (known && trace.bytes().any(|b| b != b'0')).then_some(trace)
}

/// A request that is being followed. Dropped unfinished, its client went away.
struct Watch {
    metrics: Metrics,
    method: &'static str,
    route: Cow<'static, str>,
    span: tracing::Span,
    started: Instant,
    finished: bool,
}

/// The status that is counted for a client that went away before its answer.
const CLIENT_GONE: u16 = 499;

impl Watch {
    fn start(metrics: Metrics, method: &Method, route: Cow<'static, str>, span: tracing::Span) -> Self {
        metrics.http_in_flight.inc();
        Self { metrics, method: method_label(method), route, span, started: Instant::now(), finished: false }
    }

    fn finish(mut self, status: u16) {
        self.finished = true;
        self.tell(status);
    }

    fn tell(&self, status: u16) {
        let elapsed = self.started.elapsed();
        let (method, route) = (self.method, self.route.as_ref());
        self.metrics.http_requests.with_label_values(&[method, route, status.to_string().as_str()]).inc();
        self.metrics.http_duration.with_label_values(&[method, route]).observe(elapsed.as_secs_f64());
        let latency_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
        let _entered = self.span.enter();
        if is_probe(route) {
            tracing::debug!(method, route, status, latency_ms, "answered");
        } else {
            tracing::info!(method, route, status, latency_ms, "answered");
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.metrics.http_in_flight.dec();
        if !self.finished {
            self.tell(CLIENT_GONE);
        }
    }
}

/// A closed set: a caller can make up methods.
fn method_label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "OTHER",
    }
}

/// Whether this is the path of a probe.
pub(crate) fn is_probe(route: &str) -> bool {
    matches!(route, "/healthz" | "/readyz" | "/health" | "/metrics")
}

/// What every answer tells browsers and caches.
pub(crate) const SECURITY_HEADERS: [(HeaderName, &str); 5] = [
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (X_FRAME_OPTIONS, "DENY"),
    (REFERRER_POLICY, "no-referrer"),
    (CACHE_CONTROL, "no-store"),
    (CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
];

/// Layer 1: what every answer tells browsers and caches, unless the route said otherwise.
pub(crate) async fn secure_headers(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    for (name, value) in SECURITY_HEADERS {
        response.headers_mut().entry(name).or_insert(HeaderValue::from_static(value));
    }
    response
}

/// Layer 6: refuses what did not come as HTTP asks for it, and what came over a connection beyond the limit. Probes are
/// answered however they ask.
pub(crate) async fn guard_listener(request: Request, next: Next) -> Result<Response, Problem> {
    if !is_probe(request.uri().path()) {
        if request.extensions().get::<OnReservedPlace>().is_some() {
            let detail =
                "Too many connections are open; this one is beyond the limit, where only probes get an answer.";
            return Err(Error::new(Code::TooManyConnections, detail).retry_after(Duration::from_secs(1)).into());
        }
        check_host(&request).map_err(|detail| Problem::new(Code::InvalidRequest, detail))?;
    }
    Ok(next.run(request).await)
}

/// HTTP/1.1 has exactly one `Host` (RFC 9112, 3.2); HTTP/1.0 and HTTP/2 at most one. Proxies that disagree about which of
/// two is meant can be played off against each other.
fn check_host(request: &Request) -> Result<(), &'static str> {
    let mut hosts = request.headers().get_all(HOST).iter();
    match (hosts.next(), hosts.next()) {
        (Some(_), Some(_)) => Err("There is more than one `Host` header; send one."),
        (None, _) if request.version() == Version::HTTP_11 => Err("There is no `Host` header; HTTP/1.1 asks for one."),
        // One without a name is what a target without an authority asks for.
        (Some(host), None) if !host.is_empty() && !is_authority(host) => Err("`Host` is not a host and port."),
        _ => Ok(()),
    }
}

fn is_authority(host: &HeaderValue) -> bool {
    host.to_str().is_ok_and(|host| !host.contains('@') && host.parse::<http::uri::Authority>().is_ok())
}

/// Layer 8: the time until the head of the answer. The body of an event stream comes after that.
pub(crate) async fn limit_time(
    State(shared): State<Shared>,
    request: Request,
    next: Next,
) -> Result<Response, Problem> {
    let limit: Duration = shared.config.request_timeout.0;
    let late = |_| {
        let detail = format!("The request took longer than {} ms. It may still take effect.", limit.as_millis());
        Problem::new(Code::RequestTimeout, detail)
    };
    tokio::time::timeout(limit, next.run(request)).await.map_err(late)
}

/// Layer 11: requests under way at once, fairly shared out between tenants. A tenant that has its share is told so at once;
/// one that has less waits for the next slot, and its time limit bounds that.
pub(crate) async fn limit_load(
    State(shared): State<Shared>,
    request: Request,
    next: Next,
) -> Result<Response, Problem> {
    let tenant = body::tenant_of(&request)?;
    let Ok(_slot) = shared.slots.take(&tenant).await else {
        let error = Error::new(Code::Overloaded, "Too many requests are under way; come back in a second.");
        return Err(error.retry_after(Duration::from_secs(1)).into());
    };
    // Submits go to the store in batches that all share, and take their turn where they read beside that; the other two ask it
    // for the pipeline alone.
    let asks_little = request.method() == Method::POST
        && matches!(request.uri().path(), "/v1/runs" | "/v1/plan" | "/v1/pipelines/validate");
    if asks_little {
        return Ok(next.run(request).await);
    }
    // As many may wait as there are slots, so that no request is refused here.
    let _read = shared.reads.wait_for(&tenant, 1).await;
    let response = next.run(request).await;
    Ok(body::hold_room(&shared, &tenant, response).await)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(HeaderName::from_static(name), HeaderValue::from_str(value).expect("valid"))])
    }

    #[test]
    fn only_a_sane_request_id_is_taken_over() {
        assert_eq!(&*RequestId::of(&headers("x-request-id", "abc-1")).0, "abc-1");
        for bad in ["", "a b", &"x".repeat(129)] {
            assert_ne!(&*RequestId::of(&headers("x-request-id", bad)).0, bad);
        }
    }

    #[test]
    fn a_trace_is_taken_from_a_valid_traceparent() {
        let id = "4bf92f3577b34da6a3ce929d0e0e4736";
        let valid = format!("00-{id}-00f067aa0ba902b7-01");
        assert_eq!(trace_id(&headers("traceparent", &valid)), Some(id));
        for bad in ["", "00-0-0-0", &valid.to_uppercase(), &valid.replace(id, &"0".repeat(32))] {
            assert_eq!(trace_id(&headers("traceparent", bad)), None, "{bad}");
        }
    }
}
