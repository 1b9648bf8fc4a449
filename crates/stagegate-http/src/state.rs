//! What every request shares: owns nothing that a request may change but bounded caches and counters.

use std::sync::Arc;

use stagegate_core::Clock;
use stagegate_engine::Engine;
use stagegate_telemetry::Metrics;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    App, auth::KeyCache, config::HttpConfig, failures::Failures, fair::FairLimit, openapi::Document,
    routes::probes::Probes, serve::Peer, streams::Streams,
};

/// Requests under way at once, event streams and probes aside. Past it callers are told to come back (SG0007).
pub(crate) const MAX_REQUESTS_IN_FLIGHT: usize = 1_024;
/// Requests of tenants with less than their share that wait for a slot, and bodies that wait for room.
const WAITING_MAX: usize = 1_024;
/// Look-ups at once of keys that are not known here: whose they are is not known before, so that peers share them.
const LOOKUPS_MAX: usize = 2;
/// Requests that wait for such a look-up, a quarter of them of one peer: a new replica knows none of the keys of those who
/// come to it at once.
const LOOKUPS_WAITING_MAX: usize = 16_384;
/// Requests that wait to read: a quarter is as many as there are slots, so that none is refused.
const READS_WAITING_MAX: usize = 4 * MAX_REQUESTS_IN_FLIGHT;

/// What every request shares.
pub(crate) struct Parts {
    pub(crate) engine: Engine,
    pub(crate) metrics: Metrics,
    pub(crate) config: HttpConfig,
    /// Anybody on this machine may call, as the default tenant.
    pub(crate) open: bool,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) keys: KeyCache,
    pub(crate) failures: Failures,
    /// A permit a look-up of a key that is not known here.
    pub(crate) lookups: Arc<FairLimit<Option<Peer>>>,
    /// A permit a byte of a body.
    pub(crate) bodies: Arc<FairLimit>,
    /// A permit a byte of an answer that is not small, until it is sent.
    pub(crate) answers: Arc<FairLimit>,
    /// A permit a request under way.
    pub(crate) slots: Arc<FairLimit>,
    /// A permit a request that asks the store.
    pub(crate) reads: Arc<FairLimit>,
    /// A place an event stream.
    pub(crate) streams: Arc<Streams>,
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
        let memory = app.engine.memory();
        let bytes = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        let bodies = app.config.bodies_max_bytes.unwrap_or(bytes(memory.texts_max_bytes));
        Arc::new(Self {
            keys: KeyCache::new(),
            failures: Failures::new(app.config.max_auth_failures_per_minute),
            lookups: FairLimit::new(LOOKUPS_MAX, LOOKUPS_WAITING_MAX),
            bodies: FairLimit::with_reserve(bodies.max(app.config.body_max_bytes), WAITING_MAX),
            answers: FairLimit::with_reserve(bytes(memory.answers_max_bytes), READS_WAITING_MAX),
            slots: FairLimit::new(MAX_REQUESTS_IN_FLIGHT, WAITING_MAX),
            reads: FairLimit::new(app.reads_max, READS_WAITING_MAX),
            streams: Streams::new(app.config.max_event_streams, app.config.max_event_streams_per_peer()),
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
