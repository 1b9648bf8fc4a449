//! The client: owns its connections and one exchange over them (send, read within the bound, say where it broke). It makes
//! no second try of its own: what was not processed for sure (a connection that was closed meanwhile, HTTP/2's refusals)
//! is sent again by the library below.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header::ACCEPT_ENCODING};
use reqwest::{ClientBuilder, Request, redirect};
use stagegate_core::{Code, Error};
use url::Url;

use crate::{
    address::Trusted,
    body::{Gathering, TooLarge},
    config::NetConfig,
    guard::{Guard, GuardedClient, Lookup, Refused, system_lookup},
    proxy::Proxies,
    roots,
};

/// How long an idle connection is kept; shorter than the idle time-outs of the vendors' and the clouds' balancers.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(50);

/// Idle connections kept per server: as many as calls that may be under way at once in a busy deployment, since one
/// more would be opened and closed with each call.
const POOL_MAX_IDLE_PER_HOST: usize = 1_024;

/// How often a silent connection of HTTP/2 is tested while something waits on it, and how long the test may take: all
/// that wait on a dead one would else wait for their deadlines.
const HTTP2_PING_EVERY: Duration = Duration::from_secs(20);
const HTTP2_PING_TIMEOUT: Duration = Duration::from_secs(20);

/// Exchanges at once over one connection of HTTP/2, before another one is made. Servers allow a hundred as a rule, and
/// what is beyond their limit waits without a word.
const STREAMS_PER_CONNECTION: usize = 64;

/// Exchanges on one connection of HTTP/2 from which the others share the work: some servers allow fewer than a hundred.
const STREAMS_BEFORE_SPREADING: usize = 16;

/// Connections of HTTP/2 to one server, at most.
const LANES_MAX: usize = 32;

/// What we call ourselves.
const OUR_NAME: &str = concat!("stagegate/", env!("CARGO_PKG_VERSION"));

/// A request.
#[derive(Debug, Clone)]
pub struct Outgoing<'a> {
    /// The method.
    pub method: Method,
    /// The headers; `host`, `user-agent`, `accept` and the length are added.
    pub headers: &'a HeaderMap,
    /// The body.
    pub body: Bytes,
    /// What is read of the answer.
    pub bounds: Bounds,
    /// How long all of it may take; without one, the deadline is the caller's.
    pub timeout: Option<Duration>,
}

/// What is read of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// The largest body of a success, in bytes, after decompression. A larger one is a failure.
    pub answer_max_bytes: usize,
    /// How much of any other body is read, in bytes; the rest tells nothing more.
    pub error_max_bytes: usize,
}

/// A whole answer, whatever its status.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The status. Redirects are answers like others.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    /// The body, within its bound.
    pub body: Bytes,
}

/// Where an exchange ended that brought no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    /// The address was refused: nothing was sent.
    Refused(Refused),
    /// No connection was made: nothing was sent.
    Connecting,
    /// The connection broke, or the time was over, before the head of the answer was there.
    Asking,
    /// It broke while the body was read.
    Reading(StatusCode),
    /// The body was larger than this, in bytes.
    TooLarge(usize),
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the exchange failed ({stage:?}): {}", .reason.as_deref().unwrap_or("no reason is known"))]
pub struct Failure {
    /// Where it ended.
    pub stage: Stage,
    /// The innermost reason, which holds neither the address nor what was sent.
    pub reason: Option<String>,
    /// The proxy before the server, as `host:port`.
    pub proxy: Option<String>,
}

impl Failure {
    pub(crate) fn refused(why: Refused) -> Self {
        Self { stage: Stage::Refused(why), reason: None, proxy: None }
    }

    /// Whether the server showed a certificate of an authority that is not trusted here.
    pub fn is_unknown_authority(&self) -> bool {
        self.reason
            .as_ref()
            .is_some_and(|reason| ["UnknownIssuer", "BadSignature"].iter().any(|word| reason.contains(word)))
    }

    fn too_large(max_bytes: usize) -> Self {
        Self { stage: Stage::TooLarge(max_bytes), reason: None, proxy: None }
    }

    fn broken(error: &reqwest::Error, status: Option<StatusCode>, setup: Option<&Setup>) -> Self {
        let mut inner: &(dyn std::error::Error + 'static) = error;
        loop {
            if let Some(refused) = inner.downcast_ref::<Refused>() {
                return Self::refused(refused.clone());
            }
            let Some(source) = inner.source() else { break };
            inner = source;
        }
        let stage = match status {
            Some(status) => Stage::Reading(status),
            None if error.is_connect() => Stage::Connecting,
            None => Stage::Asking,
        };
        // The outer texts of such an error hold the address; the innermost says what happened.
        let reason = std::error::Error::source(error).map(|_| inner.to_string());
        let proxy = setup.zip(error.url()).and_then(|(setup, url)| setup.proxies.before(url));
        Self { stage, reason, proxy: proxy.map(crate::proxy::Proxy::shown) }
    }
}

/// The client for addresses that the operator configured. Cheap to clone; clones share their connections. There is no
/// time-out on answers: deadlines are the caller's.
#[derive(Debug, Clone)]
pub struct Client {
    setup: Arc<Setup>,
    lanes: Arc<Lanes>,
}

/// At least one lane.
#[derive(Debug)]
struct Lanes {
    first: Lane,
    others: Vec<Lane>,
}

impl Client {
    /// A client of this configuration. Reads the files of certificates; connects to nothing.
    pub fn new(config: &NetConfig) -> Result<Self, Error> {
        let proxies = Proxies::of(config).map_err(|violations| Error::violations(Code::InvalidConfig, violations))?;
        let tls = roots::tls(config)?;
        let setup = Setup { tls, proxies: Arc::new(proxies), connect_timeout: config.connect_timeout.0 };
        let lanes = Lanes { first: setup.lane()?, others: Vec::new() };
        Ok(Self { setup: Arc::new(setup), lanes: Arc::new(lanes) })
    }

    /// A client of the same configuration for so many exchanges at once with one server: over HTTP/2, it makes as many
    /// connections as they need.
    pub fn for_exchanges(&self, exchanges_max: usize) -> Result<Self, Error> {
        let least = if exchanges_max > STREAMS_BEFORE_SPREADING { 2 } else { 1 };
        let count = exchanges_max.div_ceil(STREAMS_PER_CONNECTION).clamp(least, LANES_MAX);
        let others = (1..count).map(|_| self.setup.lane()).collect::<Result<Vec<_>, _>>()?;
        let lanes = Lanes { first: self.setup.lane()?, others };
        Ok(Self { setup: Arc::clone(&self.setup), lanes: Arc::new(lanes) })
    }

    /// A client of the same configuration for addresses that callers wrote.
    pub fn guarded(&self, guard: Guard) -> Result<GuardedClient, Error> {
        self.guarded_with(guard, system_lookup())
    }

    /// The same with another way to resolve names.
    pub fn guarded_with(&self, guard: Guard, lookup: Lookup) -> Result<GuardedClient, Error> {
        GuardedClient::new(self, guard, lookup)
    }

    /// Sends a request, and reads the answer within its bounds.
    pub async fn send(&self, to: Trusted, request: Outgoing<'_>) -> Result<Answer, Failure> {
        self.lane().send(to.into_url(), request, Some(&self.setup)).await
    }

    /// The proxy before an address, as `host:port`.
    pub fn proxy_before(&self, to: &Trusted) -> Option<String> {
        self.setup.proxies.before(to.url()).map(crate::proxy::Proxy::shown)
    }

    pub(crate) fn setup(&self) -> Arc<Setup> {
        Arc::clone(&self.setup)
    }

    /// The first lane with few calls, so that few calls share one connection; where none has few, the least busy one.
    fn lane(&self) -> &Lane {
        let Lanes { first, others } = &*self.lanes;
        let lanes = std::iter::once(first).chain(others);
        let quiet = lanes.clone().find(|lane| lane.busy() < STREAMS_BEFORE_SPREADING);
        quiet.or_else(|| lanes.min_by_key(|lane| lane.busy())).unwrap_or(first)
    }
}

/// What every lane is built from.
#[derive(Debug)]
pub(crate) struct Setup {
    tls: rustls::ClientConfig,
    proxies: Arc<Proxies>,
    connect_timeout: Duration,
}

impl Setup {
    /// One that reaches whatever it is sent to.
    pub(crate) fn lane(&self) -> Result<Lane, Error> {
        Lane::build(self.proxied(self.builder()))
    }

    /// One that uses no proxy and connects only to what this resolver gives.
    pub(crate) fn judging_lane<R: reqwest::dns::Resolve + 'static>(&self, resolver: Arc<R>) -> Result<Lane, Error> {
        Lane::build(self.builder().no_proxy().dns_resolver(resolver))
    }

    pub(crate) fn has_proxy_before(&self, url: &Url) -> bool {
        self.proxies.before(url).is_some()
    }

    fn builder(&self) -> ClientBuilder {
        // Compression costs both sides more than it saves on answers of some KB. What comes compressed is read all the
        // same.
        let plain = HeaderMap::from_iter([(ACCEPT_ENCODING, HeaderValue::from_static("identity"))]);
        reqwest::Client::builder()
            .tls_backend_preconfigured(self.tls.clone())
            .user_agent(OUR_NAME)
            .default_headers(plain)
            .redirect(redirect::Policy::none())
            .referer(false)
            .connect_timeout(self.connect_timeout)
            .pool_idle_timeout(POOL_IDLE_TIMEOUT)
            .pool_max_idle_per_host(POOL_MAX_IDLE_PER_HOST)
            .http2_keep_alive_interval(HTTP2_PING_EVERY)
            .http2_keep_alive_timeout(HTTP2_PING_TIMEOUT)
    }

    fn proxied(&self, builder: ClientBuilder) -> ClientBuilder {
        if self.proxies.is_empty() {
            // Desktops keep a proxy in their settings.
            let has_settings = cfg!(any(target_os = "macos", windows));
            return if has_settings { builder } else { builder.no_proxy() };
        }
        let proxies = Arc::clone(&self.proxies);
        builder.proxy(reqwest::Proxy::custom(move |url| proxies.before(url).map(|proxy| proxy.url().clone())))
    }
}

/// Connections of their own: over HTTP/2, one for each server.
#[derive(Debug)]
pub(crate) struct Lane {
    http: reqwest::Client,
    busy: AtomicUsize,
}

impl Lane {
    fn build(builder: ClientBuilder) -> Result<Self, Error> {
        let http = builder
            .build()
            .map_err(|error| Error::new(Code::InvalidConfig, format!("the HTTP client could not be built: {error}")))?;
        Ok(Self { http, busy: AtomicUsize::new(0) })
    }

    fn busy(&self) -> usize {
        self.busy.load(Ordering::Relaxed)
    }

    /// One exchange. `setup` tells of proxies, where they are used.
    pub(crate) async fn send(
        &self,
        url: Url,
        request: Outgoing<'_>,
        setup: Option<&Arc<Setup>>,
    ) -> Result<Answer, Failure> {
        let _busy = Busy::begin(&self.busy);
        let Outgoing { method, headers, body, bounds, timeout } = request;
        let mut message = Request::new(method, url);
        message.headers_mut().clone_from(headers);
        *message.body_mut() = Some(body.into());
        *message.timeout_mut() = timeout;
        let setup = setup.map(AsRef::as_ref);
        let sent = self.http.execute(message).await;
        let mut response = sent.map_err(|error| Failure::broken(&error, None, setup))?;
        let (status, headers) = (response.status(), std::mem::take(response.headers_mut()));
        let is_error = !status.is_success();
        let max_bytes = if is_error { bounds.error_max_bytes } else { bounds.answer_max_bytes };
        let too_large = |TooLarge| Failure::too_large(max_bytes);
        let mut body = Gathering::new(response.content_length(), max_bytes, is_error).map_err(too_large)?;
        loop {
            match response.chunk().await {
                Ok(Some(piece)) if body.add(&piece).map_err(too_large)? => {}
                // Of an error, what has come is enough.
                Ok(_) => break,
                Err(_) if is_error => break,
                Err(error) => return Err(Failure::broken(&error, Some(status), setup)),
            }
        }
        Ok(Answer { status, headers, body: body.whole() })
    }
}

/// Counts an exchange while it lasts, however it ends.
struct Busy<'a>(&'a AtomicUsize);

impl<'a> Busy<'a> {
    fn begin(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
