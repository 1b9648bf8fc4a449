//! Problem details (RFC 9457): owns how an error looks on the wire, and its one log line. It never shows what only
//! operators may see: the text of an internal error goes to the log, the caller gets the request id to quote.

use std::{sync::Arc, time::Duration};

use axum::{
    body::Body,
    response::{IntoResponse, Response},
};
use http::{
    HeaderName, HeaderValue, Method, StatusCode,
    header::{CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER},
};
use serde::Serialize;
use stagegate_core::{Code, Error, InvalidId, StoreError, Violation};
use stagegate_telemetry::Metrics;
use utoipa::ToSchema;

/// The media type of every error.
pub(crate) const PROBLEM_JSON: &str = "application/problem+json";
/// The most violations that one problem tells.
pub(crate) const VIOLATIONS_MAX: usize = 100;
/// What a caller is told to wait where the error itself does not say.
const DEFAULT_RETRY_AFTER: Duration = Duration::from_secs(1);

/// An error, as every route answers it (RFC 9457).
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Problem)]
pub(crate) struct ProblemBody {
    /// The page about this code.
    #[serde(rename = "type")]
    #[schema(example = "https://github.com/stagegate/stagegate/blob/main/docs/errors/SG0203.md")]
    kind: String,
    /// What kind of problem it is; the same for every occurrence.
    #[schema(example = "No such run")]
    title: String,
    /// The HTTP status.
    #[schema(example = 404, minimum = 400, maximum = 599)]
    status: u16,
    /// What happened this time, and what to do about it.
    detail: String,
    /// The stable code; one page each in `docs/errors/`.
    #[schema(example = "SG0203")]
    code: Code,
    /// The correlation id, also in the header `x-request-id`. Quote it to your operator.
    request_id: String,
    /// Every mistake found, where there can be several.
    violations: Vec<Violation>,
}

/// An error on its way to the caller.
#[derive(Debug, Clone)]
pub(crate) struct Problem(Arc<Raised>);

#[derive(Debug, Clone)]
struct Raised {
    error: Error,
    header: Option<(HeaderName, HeaderValue)>,
}

impl Problem {
    /// With a sentence.
    pub(crate) fn new(code: Code, detail: impl Into<String>) -> Self {
        Error::new(code, detail).into()
    }

    /// With every mistake, up to as many as anybody reads.
    pub(crate) fn violations(code: Code, mut violations: Vec<Violation>) -> Self {
        violations.truncate(VIOLATIONS_MAX);
        Error::violations(code, violations).into()
    }

    /// The same, with a header of its own.
    pub(crate) fn header(self, name: HeaderName, value: &'static str) -> Self {
        let raised = Raised { header: Some((name, HeaderValue::from_static(value))), ..(*self.0).clone() };
        Self(Arc::new(raised))
    }

    #[cfg(test)]
    pub(crate) fn violations_told(&self) -> usize {
        self.0.error.violations.len()
    }

    fn status(&self) -> StatusCode {
        StatusCode::from_u16(self.0.error.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    /// What the caller reads. The codes below carry an operator's text.
    fn shown_detail(&self) -> String {
        let error = &self.0.error;
        match error.code {
            Code::Internal | Code::CorruptRow | Code::InvalidConfig | Code::OpenListener => {
                "Something is wrong on our side. It is logged; quote the request id to your operator.".to_owned()
            }
            Code::Unavailable
            | Code::DatabaseUnreachable
            | Code::SchemaBehind
            | Code::SchemaAhead
            | Code::CacheUnavailable => {
                "A dependency does not answer. The same request may succeed later; `/readyz` tells which one it is."
                    .to_owned()
            }
            _ => error.detail.clone(),
        }
    }

    fn retry_after(&self) -> Option<u64> {
        let error = &self.0.error;
        let default = matches!(error.code.status(), 429 | 503).then_some(DEFAULT_RETRY_AFTER);
        error.retry_after.or(default).map(|wait| wait.as_millis().div_ceil(1_000).max(1).try_into().unwrap_or(u64::MAX))
    }

    /// The one log line of an error: what callers did wrong is only worth debug, what we did wrong is an error.
    fn log(&self) {
        let error = &self.0.error;
        let (code, detail) = (error.code.as_str(), error.detail.as_str());
        match error.code.status() {
            500 => tracing::error!(code, detail, "a request failed"),
            501..=599 => tracing::warn!(code, detail, "a request could not be served"),
            _ => tracing::debug!(code, detail, "a request was refused"),
        }
    }

    fn write(&self, request_id: &str) -> Response {
        let body = ProblemBody {
            kind: self.0.error.code.docs_url(),
            title: self.0.error.code.title().to_owned(),
            status: self.status().as_u16(),
            detail: self.shown_detail(),
            code: self.0.error.code,
            request_id: request_id.to_owned(),
            violations: self.0.error.violations.clone(),
        };
        // Strings and numbers alone: this cannot fail to serialise.
        let json = serde_json::to_vec(&body).unwrap_or_default();
        let mut response = (self.status(), [(CONTENT_TYPE, PROBLEM_JSON)], json).into_response();
        if let Some(seconds) = self.retry_after() {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Some((name, value)) = &self.0.header {
            response.headers_mut().insert(name, value.clone());
        }
        response
    }
}

impl IntoResponse for Problem {
    /// Leaves itself in the response: [`finish`] knows the request id and writes the body.
    fn into_response(self) -> Response {
        let mut response = self.write("");
        response.extensions_mut().insert(self);
        response
    }
}

/// Writes the problem of a response, with the request's id, and logs and counts it. An error that is no problem yet
/// (from a library) becomes one.
pub(crate) fn finish(mut response: Response, method: &Method, request_id: &str, metrics: &Metrics) -> Response {
    let status = response.status();
    let problem = match response.extensions_mut().remove::<Problem>() {
        Some(problem) => problem,
        None if status.is_client_error() || status.is_server_error() => match of_status(&response) {
            Some(problem) => problem,
            None => return response,
        },
        None => return response,
    };
    problem.log();
    metrics.errors.with_label_values(&[problem.0.error.code.label()]).inc();
    // The header `Allow` of a 405 is not lost: the router adds it outside of the layers.
    let mut written = problem.write(request_id);
    if method == Method::HEAD {
        // The answer to HEAD has the headers of GET, and no body.
        let length = http_body_length(&written);
        *written.body_mut() = Body::empty();
        if let Some(length) = length {
            written.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
        }
    }
    written
}

fn http_body_length(response: &Response) -> Option<u64> {
    use hyper::body::Body as _;
    response.body().size_hint().exact()
}

/// The reason phrase and the body of a problem with a head that could not be read.
pub(crate) fn of_the_listener(status: u16, request_id: &str) -> (&'static str, Vec<u8>) {
    let (code, detail) = match status {
        408 => (Code::RequestTimeout, "The head of the request did not come in time."),
        414 => (Code::InvalidRequest, "The request's target is too long."),
        431 => {
            (Code::InvalidRequest, "The head of the request is over `http.head_max_bytes`, or has too many headers.")
        }
        _ => (Code::InvalidRequest, "The head of the request is not HTTP."),
    };
    tracing::debug!(code = code.as_str(), status, request_id, "a head could not be read");
    let body = ProblemBody {
        kind: code.docs_url(),
        title: code.title().to_owned(),
        status,
        detail: detail.to_owned(),
        code,
        request_id: request_id.to_owned(),
        violations: Vec::new(),
    };
    let reason = StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason()).unwrap_or("Error");
    // Strings and numbers alone: this cannot fail to serialise.
    (reason, serde_json::to_vec(&body).unwrap_or_default())
}

/// The problem for an error status that came without one; None where the response is a probe's own report.
fn of_status(response: &Response) -> Option<Problem> {
    let json = response.headers().get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/"));
    if json {
        return None;
    }
    let code = match response.status() {
        StatusCode::NOT_FOUND => Code::RouteNotFound,
        StatusCode::METHOD_NOT_ALLOWED => Code::MethodNotAllowed,
        StatusCode::PAYLOAD_TOO_LARGE => Code::BodyTooLarge,
        StatusCode::UNSUPPORTED_MEDIA_TYPE => Code::UnsupportedMediaType,
        StatusCode::REQUEST_TIMEOUT => Code::RequestTimeout,
        StatusCode::TOO_MANY_REQUESTS => Code::Overloaded,
        status if status.is_client_error() => Code::InvalidRequest,
        _ => Code::Internal,
    };
    let detail = match code {
        Code::RouteNotFound => "No route has this path; `/docs` shows them all.".to_owned(),
        Code::MethodNotAllowed => {
            "This path does not take the method; the header `Allow` names those it takes.".to_owned()
        }
        _ => code.title().to_owned(),
    };
    Some(Problem::new(code, detail))
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        Self(Arc::new(Raised { error, header: None }))
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        Error::from(error).into()
    }
}

/// A path segment that is no identifier names nothing that could be there.
pub(crate) fn unknown(code: Code, invalid: &InvalidId) -> Problem {
    Problem::new(code, invalid.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_operators_may_see_is_not_shown() {
        let problem = Problem::from(StoreError::Defect("relation \"runs\" of host db-1".to_owned()));
        assert_eq!(problem.status(), 500);
        assert!(!problem.shown_detail().contains("db-1"));
        let problem = Problem::from(StoreError::Unavailable("connect to db-1".to_owned()));
        assert_eq!((problem.status().as_u16(), problem.retry_after()), (503, Some(1)));
        assert!(!problem.shown_detail().contains("db-1"));
    }

    #[test]
    fn a_wait_is_told_in_whole_seconds_and_never_zero() {
        let after =
            |ms| Problem::from(Error::new(Code::QueueFull, "").retry_after(Duration::from_millis(ms))).retry_after();
        assert_eq!((after(0), after(1), after(2_001)), (Some(1), Some(1), Some(3)));
        assert_eq!(Problem::new(Code::RunNotFound, "").retry_after(), None);
    }
}
