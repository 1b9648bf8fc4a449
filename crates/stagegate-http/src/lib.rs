//! The HTTP API: owns routes, layers, problem details and the OpenAPI document. It reads through the store's contract
//! and changes things through the engine; it holds no SQL and calls no model.
//!
//! To add a route: one file in `routes/`, one line in `router.rs`, one test in `tests/it/`.

mod accept;
pub mod auth;
pub mod base;
mod body;
pub mod config;
mod context;
mod cursor;
mod etag;
mod examples;
mod extract;
mod failures;
mod fair;
mod layers;
mod openapi;
mod problem;
mod router;
mod routes;
mod serve;
mod sse;
mod state;
mod streams;
mod tidy;
mod time;
mod views;

use std::{future::Future, net::SocketAddr};

/// Connections beyond `http.max_connections`, for probes.
pub const RESERVED_CONNECTIONS: usize = serve::RESERVED;

pub use auth::{KEY_CACHE_TTL, generate_key, hash_secret};
use config::{AuthMode, HttpConfig};
use stagegate_core::{Code, Error};
use stagegate_engine::Engine;
use stagegate_telemetry::Metrics;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// What the API is made from.
#[derive(Debug, Clone)]
pub struct App {
    /// The engine.
    pub engine: Engine,
    /// The metrics.
    pub metrics: Metrics,
    /// Its configuration.
    pub config: HttpConfig,
    /// True for a daemon on SQLite: `auth = "auto"` is then open on loopback.
    pub embedded: bool,
    /// Where requests of the API are handled, when [`serve`] is called on a runtime that is for connections and probes
    /// alone. None: all on the same.
    pub handlers: Option<tokio::runtime::Handle>,
    /// Requests that may ask the store at once: as many as it has connections for them.
    pub reads_max: usize,
}

/// Whether anybody who reaches the listener may call, as the default tenant. Fails with [`Code::OpenListener`] where
/// that would be others than this machine.
pub fn is_open(config: &HttpConfig, embedded: bool, address: SocketAddr) -> Result<bool, Error> {
    let loopback = address.ip().to_canonical().is_loopback();
    match config.auth {
        AuthMode::Keys => Ok(false),
        AuthMode::Auto => Ok(embedded && loopback),
        AuthMode::Open if loopback => Ok(true),
        AuthMode::Open => Err(Error::new(
            Code::OpenListener,
            format!(
                "`http.auth` is `open`, but others can reach {address}: set `http.auth = \"keys\"` and make a key with \
                 `stagegate keys create`, or listen on 127.0.0.1"
            ),
        )),
    }
}

/// Serves until `shutdown` resolves, then lets requests under way finish (event streams end with a comment). Fails at
/// once with [`Code::OpenListener`] where the listener may not be open.
pub async fn serve(
    app: App,
    listener: TcpListener,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    let address = listener.local_addr().map_err(|error| Error::new(Code::Internal, error.to_string()))?;
    let open = is_open(&app.config, app.embedded, address)?;
    let config = app.config.clone();
    let stop = CancellationToken::new();
    let stopper = tokio::spawn({
        let stop = stop.clone();
        async move {
            shutdown.await;
            stop.cancel();
        }
    });
    let handlers = app.handlers.clone();
    serve::run(router::build(app, open, stop.clone()), handlers, listener, &config, stop).await;
    stopper.abort();
    Ok(())
}

/// The OpenAPI document, as a daemon that asks for keys publishes it.
pub fn openapi_document() -> serde_json::Value {
    openapi::document(&router::document(), false, &base::BasePath::default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_beyond_loopback_is_never_open() {
        let config = |auth| HttpConfig { auth, ..HttpConfig::default() };
        let (near, far) = (SocketAddr::from(([127, 0, 0, 1], 80)), SocketAddr::from(([0, 0, 0, 0], 80)));
        assert_eq!(is_open(&config(AuthMode::Auto), true, near), Ok(true));
        assert_eq!(is_open(&config(AuthMode::Auto), false, near), Ok(false));
        assert_eq!(is_open(&config(AuthMode::Auto), true, far), Ok(false));
        assert_eq!(is_open(&config(AuthMode::Open), false, near), Ok(true));
        let refused = is_open(&config(AuthMode::Open), true, far).expect_err("others could call");
        assert_eq!(refused.code, Code::OpenListener);
        assert!(refused.detail.contains("http.auth"));
    }
}
