//! The HTTP API's part of the configuration.

use std::{net::SocketAddr, time::Duration};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use stagegate_core::pipeline::Span;

use crate::base::BasePath;

/// The listener, its limits, and who may call.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HttpConfig {
    /// Where it listens. An address beyond loopback needs `auth = "keys"`.
    #[schemars(with = "String")]
    pub listen: SocketAddr,
    /// Who may call: `keys` (a valid API key), `open` (anybody, as the default tenant; loopback only), or `auto`:
    /// open for an embedded daemon on loopback, else keys.
    pub auth: AuthMode,
    /// Where the API lies behind a proxy, as in `/stagegate`; empty for the root. Links, `Location`, `/docs` and the OpenAPI
    /// document begin with it. Requests are taken with it and without it, so that the proxy may cut it off or not.
    #[schemars(with = "String")]
    pub base_path: BasePath,
    /// Names, without a port, by which an open daemon may be called beside `localhost` and loopback addresses: of the
    /// proxy in front, or of the container. Whoever can reach the daemon under such a name needs no key. A daemon that asks
    /// for keys takes any name.
    pub allowed_hosts: Vec<String>,
    /// The largest body, in bytes.
    pub body_max_bytes: usize,
    /// Bytes of bodies at once, from their first byte until their request is answered; a body that does not fit waits.
    /// While others send too, a tenant that has a quarter gets more only while a quarter stays free. Left out: 12 % of
    /// `engine.memory_max_bytes`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bodies_max_bytes: Option<usize>,
    /// The most values in a JSON body, nested ones included. A parsed value takes much more memory than its text. A body
    /// of the default size cannot hold so many.
    pub body_max_nodes: u64,
    /// The deepest nesting of a JSON body.
    pub json_max_depth: usize,
    /// The longest wait for an answer to begin, and the longest time that a client may read nothing of it.
    pub request_timeout: Span,
    /// How long a client may take to send a head that it has begun, and to begin its first head.
    pub header_timeout: Span,
    /// How long a connection may stay open without a request. Set it higher than the keep-alive time of your balancer
    /// (60 s, mostly): else the balancer can send a request on a connection that this replica is closing.
    pub keepalive_timeout: Span,
    /// The largest head of a request, in bytes.
    pub head_max_bytes: usize,
    /// Connections at once. Probes have 64 places beyond it; any other request there gets 503.
    pub max_connections: usize,
    /// Connections of one address at once (IPv6: of one /64 network). Left out: three quarters of `max_connections`,
    /// because all may come from one proxy; set it lower if clients connect directly.
    #[schemars(range(min = 1))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_connections_per_peer: Option<usize>,
    /// Failed authentications of one address a minute (IPv6: of one /64 network); past it, keys that the replica knows to
    /// be wrong get 429. It looks other keys up as before, so that it refuses no right key.
    #[schemars(range(min = 1))]
    pub max_auth_failures_per_minute: u32,
    /// Event streams at once, three quarters of `max_connections_per_peer` of one address at most. A tenant that has less
    /// than a quarter of them takes over one of the tenant that has the most.
    pub max_event_streams: usize,
    /// The pause between two keep-alive comments of an event stream.
    pub sse_keep_alive: Span,
    /// How long the replica serves on after SIGTERM while `/readyz` already says 503: as long as the load balancer takes
    /// to notice, so that a restart refuses no connection. Unset: it drains at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drain_delay: Option<Span>,
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            auth: AuthMode::Auto,
            base_path: BasePath::default(),
            allowed_hosts: Vec::new(),
            body_max_bytes: 2 * 1024 * 1024,
            bodies_max_bytes: None,
            body_max_nodes: 1_500_000,
            json_max_depth: 64,
            request_timeout: Span(Duration::from_secs(30)),
            header_timeout: Span(Duration::from_secs(10)),
            keepalive_timeout: Span(Duration::from_secs(75)),
            head_max_bytes: 32 * 1024,
            max_connections: 20_000,
            max_connections_per_peer: None,
            max_auth_failures_per_minute: 60,
            max_event_streams: 15_000,
            sse_keep_alive: Span(Duration::from_secs(15)),
            drain_delay: None,
        }
    }
}

impl HttpConfig {
    /// Connections of one peer at once.
    pub(crate) fn max_connections_per_peer(&self) -> usize {
        self.max_connections_per_peer.unwrap_or((self.max_connections - self.max_connections / 4).max(1))
    }

    /// Event streams of one peer at once: the rest of its connections is for others behind the same address.
    pub(crate) fn max_event_streams_per_peer(&self) -> usize {
        let connections = self.max_connections_per_peer();
        (connections - connections / 4).max(1)
    }
}

/// Who may call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AuthMode {
    /// Open for an embedded daemon on loopback, else keys.
    Auto,
    /// A valid API key.
    Keys,
    /// Anybody, as the default tenant. Refused beyond loopback.
    Open,
}
