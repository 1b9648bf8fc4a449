//! The listener's side: owns connections, from their acceptance to their end. Knows nothing of routes but which of them
//! are probes.

mod activity;
mod answer;
mod bare;
mod dispatch;
mod places;
mod socket;

use std::{
    future::{Future, poll_fn},
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::Router;
use http::Method;
use hyper::server::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::ReadBuf,
    net::{TcpListener, TcpStream},
    runtime::Handle,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{base::BasePath, config::HttpConfig};
use activity::{Activity, Due, Limits};
use answer::Executor;
use dispatch::{Dispatch, Service};
use places::{Place, Places};
use socket::Socket;

pub(crate) use dispatch::OnReservedPlace;
pub(crate) use places::{Peer, RESERVED};

/// What an HTTP/2 connection begins with; anything else is HTTP/1.
const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Requests at once on one HTTP/2 connection.
const H2_STREAMS_MAX: u32 = 256;
/// What a client may send of a body that is not read yet, on one HTTP/2 stream: it waits in our memory.
const H2_STREAM_WINDOW_BYTES: u32 = 64 * 1024;
/// How often an HTTP/2 connection is asked whether it is still there, and how long it may take to say so.
const H2_PING_INTERVAL: Duration = Duration::from_secs(30);
/// See [`H2_PING_INTERVAL`].
const H2_PING_TIMEOUT: Duration = Duration::from_secs(10);
/// The pause after a connection could not be accepted (too many open files, mostly).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long a connection that was told to end, and has nothing under way, may take to do so.
const CLOSE_GRACE: Duration = Duration::from_secs(1);
/// The longest that a connection on a reserved place may take to ask.
const RESERVED_LIMIT: Duration = Duration::from_secs(2);
/// How much longer than a request the last connections may take when the shutdown begins.
const SHUTDOWN_SLACK: Duration = Duration::from_secs(5);
/// What a connection's task may hold; there is one for each event stream.
const CONNECTION_MAX_BYTES: usize = 1792;
/// How much of a request line is looked at: a base path of the longest kind, and a probe's path.
const LINE_MAX_BYTES: usize = 256;
/// The smallest buffer that hyper takes for a head.
const HEAD_MIN_BYTES: usize = 8 * 1024;

/// Accepts until the shutdown begins, then waits for what is under way. Connections of the API are served on `handlers`
/// where they are HTTP/1, all others here.
pub(crate) async fn run(
    router: Router,
    handlers: Option<Handle>,
    listener: TcpListener,
    config: &HttpConfig,
    shutdown: CancellationToken,
) {
    let server = Arc::new(Server::new(router, handlers, config));
    let places = Places::new(config.max_connections, config.max_connections_per_peer());
    let connections = TaskTracker::new();
    while !shutdown.is_cancelled() {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shutdown.cancelled() => break,
        };
        match accepted {
            Ok((stream, peer)) => {
                let place = places.take(Peer::of(peer.ip()));
                let (server, shutdown) = (Arc::clone(&server), shutdown.clone());
                let accepted = Accepted { stream, peer, place, shutdown };
                connections.spawn(server.begin(accepted, connections.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    connections.close();
    let left = connections.len();
    if timeout(config.request_timeout.0 + SHUTDOWN_SLACK, connections.wait()).await.is_err() {
        tracing::warn!(connections = left, "connections were still busy at the end of their grace period");
    }
}

struct Server {
    /// For connections that are served here.
    here: Arc<Dispatch>,
    /// For connections that are served on the handlers' runtime, where that is another one.
    there: Option<(Arc<Dispatch>, Handle)>,
    http1: http1::Builder,
    http2: http2::Builder<Executor>,
    limits: Limits,
    stall_limit: Duration,
}

/// A connection, and what it needs to be served.
struct Accepted {
    stream: TcpStream,
    peer: SocketAddr,
    place: Place,
    shutdown: CancellationToken,
}

/// How a connection came to its end.
enum End {
    Served,
    Broke(hyper::Error),
    /// Its head did not come in time.
    LateHead,
    /// It sent no request for too long, or gave its place to another.
    Closed,
}

impl Server {
    fn new(router: Router, handlers: Option<Handle>, config: &HttpConfig) -> Self {
        let head_max_bytes = config.head_max_bytes.max(HEAD_MIN_BYTES);
        let mut http1 = http1::Builder::new();
        // Heads and idle times are ours: hyper has one time limit for both.
        http1.timer(TokioTimer::new()).header_read_timeout(None).max_buf_size(head_max_bytes);
        let mut http2 = http2::Builder::new(Executor { limit: config.request_timeout.0 });
        http2
            .timer(TokioTimer::new())
            .max_concurrent_streams(H2_STREAMS_MAX)
            .initial_stream_window_size(H2_STREAM_WINDOW_BYTES)
            .max_header_list_size(u32::try_from(head_max_bytes).unwrap_or(u32::MAX))
            .keep_alive_interval(H2_PING_INTERVAL)
            .keep_alive_timeout(H2_PING_TIMEOUT);
        let dispatch = Dispatch { router, handlers: None, base: config.base_path.clone() };
        let there = handlers.clone().map(|handle| (Arc::new(dispatch.clone()), handle));
        Self {
            here: Arc::new(Dispatch { handlers, ..dispatch }),
            there,
            http1,
            http2,
            limits: Limits { head: config.header_timeout.0, idle: config.keepalive_timeout.0 },
            stall_limit: config.request_timeout.0,
        }
    }

    /// Waits for a connection's first bytes, and serves it where it belongs: on this runtime where a probe may come over it
    /// (it begins with one, has a reserved place, or is HTTP/2 of which a probe may be one stream); otherwise on the
    /// handlers' runtime, so that no request of it crosses threads.
    async fn begin(self: Arc<Self>, accepted: Accepted, connections: TaskTracker) {
        // Small answers and events must not wait for more to send.
        let _ = accepted.stream.set_nodelay(true);
        let Accepted { stream, peer, place, shutdown } = &accepted;
        let limits = self.limits.at(place);
        let begun = tokio::select! {
            begun = timeout(limits.head, First::of(stream, &self.here.base)) => begun,
            () = place.given_away() => return,
            () = shutdown.cancelled() => return,
        };
        let Ok(Ok(first)) = begun else {
            tracing::debug!(%peer, "a connection closed, or sent nothing in time");
            return;
        };
        let elsewhere = self.there.clone().filter(|_| !place.is_reserved() && matches!(first, First::Http1(_)));
        let Some((dispatch, handlers)) = elsewhere else {
            let dispatch = Arc::clone(&self.here);
            return self.connection(accepted, first, dispatch).await;
        };
        let Accepted { stream, peer, place, shutdown } = accepted;
        // From one runtime's poll to the other's; it fails only where the process is out of resources.
        let Ok(stream) = stream.into_std() else { return };
        let work = async move {
            let Ok(stream) = TcpStream::from_std(stream) else { return };
            self.connection(Accepted { stream, peer, place, shutdown }, first, dispatch).await;
        };
        debug_assert!(std::mem::size_of_val(&work) <= CONNECTION_MAX_BYTES, "{}", std::mem::size_of_val(&work));
        connections.spawn_on(work, &handlers);
    }

    /// Serves one connection to its end.
    async fn connection(&self, accepted: Accepted, first: First, dispatch: Arc<Dispatch>) {
        let Accepted { stream, peer, place, shutdown } = accepted;
        let limits = self.limits.at(&place);
        let activity = Activity::new();
        let service =
            Service { dispatch, activity: Arc::clone(&activity), peer: peer.ip(), is_reserved: place.is_reserved() };
        let watch = Watch { activity: &activity, limits, place: &place, shutdown: &shutdown };
        let end = if first == First::Http2 {
            let first = H2_PREFACE.to_vec();
            let io = TokioIo::new(Socket::new(stream, first, activity.clone(), false, self.stall_limit));
            // Large, and rare beside the others: ten thousand event streams must not have room for it.
            let mut connection = Box::pin(self.http2.serve_connection(io, service));
            watch.drive(connection.as_mut(), http2::Connection::graceful_shutdown).await
        } else {
            let first = first.taken();
            let io = TokioIo::new(Socket::new(stream, first, activity.clone(), true, self.stall_limit));
            let mut connection = self.http1.serve_connection(io, service);
            let end = watch.drive(Pin::new(&mut connection), http1::Connection::graceful_shutdown).await;
            if matches!(end, End::LateHead) {
                connection.into_parts().io.into_inner().last_words(408);
            }
            end
        };
        match end {
            End::Served => {}
            End::Broke(error) => tracing::debug!(%peer, %error, "a connection broke"),
            End::LateHead => tracing::debug!(%peer, "a head did not come in time"),
            End::Closed => tracing::debug!(%peer, "a connection was idle for too long, or gave its place to another"),
        }
    }
}

impl Limits {
    fn at(self, place: &Place) -> Self {
        if place.is_reserved() {
            return Self { head: self.head.min(RESERVED_LIMIT), idle: self.idle.min(CLOSE_GRACE) };
        }
        self
    }
}

/// What decides that a connection ends, beside itself.
struct Watch<'a> {
    activity: &'a Activity,
    limits: Limits,
    place: &'a Place,
    shutdown: &'a CancellationToken,
}

impl Watch<'_> {
    /// Drives a connection until it ends by itself, breaks a limit, or is told to end and has nothing under way.
    async fn drive<C>(&self, mut connection: Pin<&mut C>, tell_to_end: impl Fn(Pin<&mut C>)) -> End
    where
        C: Future<Output = Result<(), hyper::Error>>,
    {
        let mut limits = self.limits;
        let mut ends = false;
        let mut check = Instant::now();
        loop {
            tokio::select! {
                biased;
                served = connection.as_mut() => return served.map_or_else(End::Broke, |()| End::Served),
                () = self.shutdown.cancelled(), if !ends => {}
                () = self.place.given_away() => return End::Closed,
                () = sleep_until(check) => match self.activity.due(Instant::now(), limits) {
                    Due::At(next) => {
                        check = next;
                        continue;
                    }
                    Due::Head => return End::LateHead,
                    Due::Idle if ends => return End::Closed,
                    Due::Idle => {}
                },
            }
            // It is told, and has a moment to say goodbye in. What is under way goes on.
            ends = true;
            tell_to_end(connection.as_mut());
            limits.idle = CLOSE_GRACE;
            check = Instant::now() + CLOSE_GRACE;
        }
    }
}

/// What a connection begins with.
#[derive(Debug, PartialEq, Eq)]
enum First {
    Http2,
    /// HTTP/1, and its first request is a probe.
    Probe,
    /// HTTP/1, after these bytes, which were read already.
    Http1(Vec<u8>),
}

impl First {
    /// Reads until it is known how the connection begins. A client that sends nothing runs into the time limit that stands
    /// around this.
    ///
    /// Nothing is taken of what can be told by a look: hyper's buffer for a connection would grow to twice its size over a
    /// first read of a few bytes.
    async fn of(stream: &TcpStream, base: &BasePath) -> io::Result<Self> {
        let mut first = Vec::new();
        while first.len() < H2_PREFACE.len() {
            let expected = &H2_PREFACE[first.len()..];
            let mut seen = [0; H2_PREFACE.len()];
            let length = stream.peek(&mut seen[..expected.len()]).await?;
            if length == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if !expected.starts_with(&seen[..length]) {
                let probe = first.is_empty() && poll_fn(|context| looks_like_a_probe(stream, base, context)).await?;
                return Ok(if probe { Self::Probe } else { Self::Http1(first) });
            }
            // It is there, so that this waits for nothing.
            let taken = stream.try_read(&mut seen[..length])?;
            first.extend_from_slice(&seen[..taken]);
        }
        Ok(Self::Http2)
    }

    /// What was read of it.
    fn taken(self) -> Vec<u8> {
        match self {
            Self::Http1(taken) => taken,
            Self::Http2 | Self::Probe => Vec::new(),
        }
    }
}

/// Whether what has come begins with a probe. The look takes nothing away, and its buffer is no part of the connection's
/// task.
fn looks_like_a_probe(stream: &TcpStream, base: &BasePath, context: &mut Context<'_>) -> Poll<io::Result<bool>> {
    let mut seen = [0; LINE_MAX_BYTES];
    let mut seen = ReadBuf::new(&mut seen);
    ready!(stream.poll_peek(context, &mut seen))?;
    Poll::Ready(Ok(begins_with_a_probe(seen.filled(), base)))
}

/// Whether a request line is that of a probe, as far as one look shows it. Probes are small, and come in one piece.
fn begins_with_a_probe(line: &[u8], base: &BasePath) -> bool {
    let mut words = line.splitn(2, |byte| *byte == b' ');
    let (Some(method), Some(target)) = (words.next(), words.next()) else { return false };
    let Some(end) = target.iter().position(|byte| b" ?".contains(byte)) else { return false };
    let (Ok(method), Ok(path)) = (Method::from_bytes(method), std::str::from_utf8(&target[..end])) else {
        return false;
    };
    dispatch::is_probe(&method, base.below(path).unwrap_or(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_that_begins_with_a_probe_is_known_by_its_first_line() {
        let (root, gate) = (BasePath::default(), BasePath::try_from("/gate".to_owned()).expect("a base path"));
        for probe in ["GET /healthz HTTP/1.1", "HEAD /readyz HTTP", "GET /metrics ", "GET /readyz?verbose=true&of=eve"]
        {
            assert!(begins_with_a_probe(probe.as_bytes(), &root), "{probe}");
            assert!(begins_with_a_probe(probe.as_bytes(), &gate), "{probe}: without the base path");
        }
        assert!(begins_with_a_probe(b"GET /gate/readyz HTTP/1.1", &gate));
        for other in
            ["GET /healthz", "POST /healthz HTTP/1.1", "GET /healthzz HTTP/1.1", "GET /v1/runs HTTP/1.1", "", " "]
        {
            assert!(!begins_with_a_probe(other.as_bytes(), &root), "{other}");
        }
        assert!(!begins_with_a_probe(b"GET /gate/readyz HTTP/1.1", &root));
    }
}
