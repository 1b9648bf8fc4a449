//! Promises of the one way out, over real sockets.

mod guard;
mod proxies;
mod raw;
mod sending;
mod tls;

use std::sync::LazyLock;

use bytes::Bytes;
use http::{HeaderMap, Method};
use stagegate_net::{Bounds, Client, NetConfig, Outgoing};

/// Without proxies, whatever the environment says: the crate reads none.
fn client() -> Client {
    Client::new(&NetConfig::default()).expect("a client")
}

const BOUNDS: Bounds = Bounds { answer_max_bytes: 10_000, error_max_bytes: 1_000 };

static NO_HEADERS: LazyLock<HeaderMap> = LazyLock::new(HeaderMap::new);

/// A small request.
fn post() -> Outgoing<'static> {
    let (method, headers) = (Method::POST, &*NO_HEADERS);
    Outgoing { method, headers, body: Bytes::from_static(b"{}"), bounds: BOUNDS, timeout: None }
}
