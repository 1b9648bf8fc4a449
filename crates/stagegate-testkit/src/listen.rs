//! HTTP on loopback for what stands in for a provider: owns accepting, and how a connection is closed on purpose.
//! What is answered is the caller's.

use std::future::Future;

use axum::body::Body;
use hyper::{
    Request, Response,
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{net::TcpListener, task::JoinSet};
use tokio_rustls::TlsAcceptor;

/// The connection is to be closed, with no answer or in the middle of one.
#[derive(Debug)]
pub(crate) struct Closed;

impl std::fmt::Display for Closed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("closed on purpose")
    }
}

impl std::error::Error for Closed {}

/// Answers every request by `serve`, until it is aborted.
pub(crate) async fn accept<F, Answer>(listener: TcpListener, serve: F)
where
    F: Fn(Request<Incoming>) -> Answer + Clone + Send + 'static,
    Answer: Future<Output = Result<Response<Body>, Closed>> + Send + 'static,
{
    // The set ends every connection when the server is aborted.
    let mut connections = JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        while connections.try_join_next().is_some() {}
        let _ = stream.set_nodelay(true);
        let serve = serve.clone();
        connections.spawn(async move {
            // An error here is a caller that went away, or a fault that was asked for.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(serve)).await;
        });
    }
}

/// The same over TLS, in the protocol that the client agrees to.
pub(crate) async fn accept_tls<F, Answer>(listener: TcpListener, tls: TlsAcceptor, streams_max: u32, serve: F)
where
    F: Fn(Request<Incoming>) -> Answer + Clone + Send + 'static,
    Answer: Future<Output = Result<Response<Body>, Closed>> + Send + 'static,
{
    let mut connections = JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        while connections.try_join_next().is_some() {}
        let (serve, tls) = (serve.clone(), tls.clone());
        connections.spawn(async move {
            // A client that does not trust us goes away here.
            let Ok(stream) = tls.accept(stream).await else { return };
            let is_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
            let stream = TokioIo::new(stream);
            let _ = if is_http2 {
                let mut builder = http2::Builder::new(TokioExecutor::new());
                builder.max_concurrent_streams(streams_max).serve_connection(stream, service_fn(serve)).await
            } else {
                http1::Builder::new().serve_connection(stream, service_fn(serve)).await
            };
        });
    }
}
