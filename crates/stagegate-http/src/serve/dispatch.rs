//! From a connection to the router and back: owns on which runtime a request is handled.
//!
//! Probes have a runtime of their own (docs/decisions.md), so that they go on while every thread of the other one is
//! busy. A connection over which one may come stays there (it begins with a probe, or is HTTP/2); a request of the API that
//! comes over it is handled on the other runtime, and only finished pieces come back. Every other connection is served on
//! the other runtime from its first request on.

use std::{future::Future, net::IpAddr, pin::Pin, sync::Arc};

use axum::{
    Router,
    body::Body,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use http::{
    HeaderValue, Method, Request,
    header::{CONNECTION, CONTENT_TYPE},
};
use hyper::body::Incoming;
use tokio::runtime::Handle;
use tokio_util::task::AbortOnDropHandle;
use tower::ServiceExt as _;

use crate::base::BasePath;

use super::{
    activity::{Activity, Open},
    answer::Answer,
    places::Peer,
};

/// What ends a connection instead of an answer.
pub(crate) type Broken = Box<dyn std::error::Error + Send + Sync>;

/// Set on a request that came over a reserved place: it is answered if it is a probe.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OnReservedPlace;

/// What the connections of one listener share.
#[derive(Debug, Clone)]
pub(crate) struct Dispatch {
    pub(crate) router: Router,
    /// Where requests of the API are handled; None for the connection's own runtime.
    pub(crate) handlers: Option<Handle>,
    /// What a request's path may begin with.
    pub(crate) base: BasePath,
}

/// Answers the requests of one connection.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    pub(crate) dispatch: Arc<Dispatch>,
    pub(crate) activity: Arc<Activity>,
    pub(crate) peer: IpAddr,
    pub(crate) is_reserved: bool,
}

/// An answer whose body is still to be sent.
enum Made {
    Whole(http::response::Parts, Bytes),
    Stream(Response),
}

impl hyper::service::Service<Request<Incoming>> for Service {
    type Response = http::Response<Answer>;
    type Error = Broken;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Broken>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let open = self.activity.open();
        let dispatch = Arc::clone(&self.dispatch);
        let is_reserved = self.is_reserved;
        let mut request = request.map(Body::new);
        dispatch.base.strip(request.uri_mut());
        request.extensions_mut().insert(Peer::of(self.peer));
        if is_reserved {
            request.extensions_mut().insert(OnReservedPlace);
        }
        let is_here = is_reserved || is_probe(request.method(), request.uri().path());
        Box::pin(async move {
            let made = match &dispatch.handlers {
                Some(handlers) if !is_here => {
                    let work = make(dispatch.router.clone(), request);
                    AbortOnDropHandle::new(handlers.spawn(work)).await??
                }
                _ => make(dispatch.router.clone(), request).await?,
            };
            Ok(send(made, open, is_reserved))
        })
    }
}

/// Lets the router answer. All of the answer is made here, unless it is an event stream.
async fn make(router: Router, request: Request<Body>) -> Result<Made, Broken> {
    let response = router.oneshot(request).await.into_response();
    let kind = response.headers().get(CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    if kind.starts_with(b"text/event-stream") {
        return Ok(Made::Stream(response));
    }
    let (head, body) = response.into_parts();
    // It is made, not received: its size has the limits of what made it.
    Ok(Made::Whole(head, axum::body::to_bytes(body, usize::MAX).await?))
}

fn send(made: Made, open: Open, is_last: bool) -> http::Response<Answer> {
    let (mut head, body) = match made {
        Made::Whole(head, bytes) => (head, Answer::whole(bytes, open)),
        Made::Stream(response) => {
            let (head, body) = response.into_parts();
            (head, Answer::stream(body, open))
        }
    };
    if is_last {
        head.headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    http::Response::from_parts(head, body)
}

/// Whether this is a probe, which must get an answer under any load.
pub(crate) fn is_probe(method: &Method, path: &str) -> bool {
    matches!(*method, Method::GET | Method::HEAD) && matches!(path, "/healthz" | "/readyz" | "/health" | "/metrics")
}
