//! What every request shares: owns nothing that a request may change but bounded caches and counters.

use std::sync::Arc;

use stagegate_core::Clock;
use stagegate_engine::Engine;
use stagegate_telemetry::Metrics;
use tokio::{sync::Semaphore, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{App, auth::KeyCache, config::HttpConfig, openapi::Document, routes::probes::Probes};

/// Requests under way at once, event streams and probes aside. Past it callers are told to come back (SG0007).
pub(crate) const MAX_REQUESTS_IN_FLIGHT: usize = 1_024;

/// What every request shares.
pub(crate) struct Parts {
    pub(crate) engine: Engine,
    pub(crate) metrics: Metrics,
    pub(crate) config: HttpConfig,
    /// Anybody on this machine may call, as the default tenant.
    pub(crate) open: bool,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) keys: KeyCache,
    /// A permit a request under way.
    pub(crate) slots: Semaphore,
    /// A permit an event stream.
    pub(crate) streams: Arc<Semaphore>,
    /// Cancelled when the shutdown begins: event streams end.
    pub(crate) shutdown: CancellationToken,
    pub(crate) probes: Probes,
    pub(crate) started: Instant,
    pub(crate) document: Document,
}

/// The state of the router.
pub(crate) type Shared = Arc<Parts>;

impl Parts {
    pub(crate) fn new(app: App, open: bool, document: Document, shutdown: CancellationToken) -> Shared {
        Arc::new(Self {
            keys: KeyCache::new(),
            slots: Semaphore::new(MAX_REQUESTS_IN_FLIGHT),
            streams: Arc::new(Semaphore::new(app.config.max_event_streams.min(Semaphore::MAX_PERMITS))),
            metrics: app.metrics,
            config: app.config,
            open,
            clock: Arc::clone(app.engine.clock()),
            engine: app.engine,
            shutdown,
            probes: Probes::default(),
            started: Instant::now(),
            document,
        })
    }
}
