//! The HTTP API: owns routes, layers, problem details and the OpenAPI document. It reads through the store's contract
//! and changes things through the engine; it holds no SQL and calls no model.

pub mod config;

use std::future::Future;

use stagegate_core::Error;
use stagegate_engine::Engine;
use stagegate_telemetry::Metrics;
use tokio::net::TcpListener;

/// What the API is made from.
#[derive(Debug, Clone)]
pub struct App {
    /// The engine.
    pub engine: Engine,
    /// The metrics.
    pub metrics: Metrics,
    /// Its configuration.
    pub config: config::HttpConfig,
    /// True for a daemon on SQLite: `auth = "auto"` is then open on loopback.
    pub embedded: bool,
}

/// Serves until `shutdown` resolves, then lets requests under way finish (event streams end with a comment). Fails at
/// once with [`stagegate_core::Code::OpenListener`] where the listener may not be open.
pub async fn serve(
    _app: App,
    _listener: TcpListener,
    _shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    unimplemented!()
}
