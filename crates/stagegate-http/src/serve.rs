//! The listener's side: owns connections, from their acceptance to their end. Knows nothing of routes.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::Router;
use hyper::server::conn::{http1, http2};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::graceful::{GracefulShutdown, Watcher},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncReadExt as _, join},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{config::HttpConfig, stall::StallLimit};

/// What an HTTP/2 connection begins with; anything else is HTTP/1.
const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Requests at once on one HTTP/2 connection.
const H2_STREAMS_MAX: u32 = 256;
/// How often an HTTP/2 connection is asked whether it is still there, and how long it may take to say so.
const H2_PING_INTERVAL: Duration = Duration::from_secs(30);
/// See [`H2_PING_INTERVAL`].
const H2_PING_TIMEOUT: Duration = Duration::from_secs(10);
/// The pause after a connection could not be accepted (too many open files, mostly).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How much longer than a request the last connections may take when the shutdown begins.
const SHUTDOWN_SLACK: Duration = Duration::from_secs(5);
/// What a connection's task may hold; there is one for each event stream.
const CONNECTION_MAX_BYTES: usize = 1536;
/// The smallest buffer that hyper takes for a head.
const HEAD_MIN_BYTES: usize = 8 * 1024;

/// Accepts until the shutdown begins, then waits for what is under way.
pub(crate) async fn run(router: Router, listener: TcpListener, config: &HttpConfig, shutdown: CancellationToken) {
    let server = Arc::new(Server::new(router, config));
    let connections = Arc::new(Semaphore::new(config.max_connections.clamp(1, Semaphore::MAX_PERMITS)));
    let graceful = GracefulShutdown::new();
    while !shutdown.is_cancelled() {
        let accepted = async {
            // With every permit out, new connections wait in the kernel's backlog.
            let permit = Arc::clone(&connections).acquire_owned().await;
            (permit, listener.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            accepted = accepted => accepted,
            () = shutdown.cancelled() => break,
        };
        match accepted {
            Ok((stream, peer)) => {
                let (server, watcher) = (Arc::clone(&server), graceful.watcher());
                let shutdown = shutdown.clone();
                let work = async move {
                    let _held_until_the_end = permit;
                    server.connection(stream, peer, watcher, shutdown).await;
                };
                debug_assert!(std::mem::size_of_val(&work) <= CONNECTION_MAX_BYTES, "{}", std::mem::size_of_val(&work));
                tokio::spawn(work);
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    let left = graceful.count();
    if timeout(config.request_timeout.0 + SHUTDOWN_SLACK, graceful.shutdown()).await.is_err() {
        tracing::warn!(connections = left, "connections were still busy when the time for them was over");
    }
}

struct Server {
    service: TowerToHyperService<Router>,
    http1: http1::Builder,
    http2: http2::Builder<TokioExecutor>,
    header_timeout: Duration,
    stall_limit: Duration,
}

impl Server {
    fn new(router: Router, config: &HttpConfig) -> Self {
        let head_max_bytes = config.head_max_bytes.max(HEAD_MIN_BYTES);
        let mut http1 = http1::Builder::new();
        http1.timer(TokioTimer::new()).header_read_timeout(config.header_timeout.0).max_buf_size(head_max_bytes);
        let mut http2 = http2::Builder::new(TokioExecutor::new());
        http2
            .timer(TokioTimer::new())
            .max_concurrent_streams(H2_STREAMS_MAX)
            .max_header_list_size(u32::try_from(head_max_bytes).unwrap_or(u32::MAX))
            .keep_alive_interval(H2_PING_INTERVAL)
            .keep_alive_timeout(H2_PING_TIMEOUT);
        Self {
            service: TowerToHyperService::new(router),
            http1,
            http2,
            header_timeout: config.header_timeout.0,
            stall_limit: config.request_timeout.0,
        }
    }

    /// Serves one connection to its end.
    async fn connection(&self, stream: TcpStream, peer: SocketAddr, watcher: Watcher, shutdown: CancellationToken) {
        // Small answers and events must not wait for more to send.
        let _ = stream.set_nodelay(true);
        let begun = tokio::select! {
            begun = timeout(self.header_timeout, first_bytes(&stream)) => begun,
            () = shutdown.cancelled() => return,
        };
        let Ok(Ok(first)) = begun else {
            tracing::debug!(%peer, "a connection closed, or sent nothing in time");
            return;
        };
        let is_http2 = first == H2_PREFACE;
        let (reader, writer) = stream.into_split();
        let writer = StallLimit::new(writer, self.stall_limit);
        let io = TokioIo::new(join(io::Cursor::new(first).chain(reader), writer));
        let service = self.service.clone();
        let served = if is_http2 {
            // Large, and rare beside the others: ten thousand event streams must not have room for it.
            Box::pin(watcher.watch(self.http2.serve_connection(io, service))).await
        } else {
            watcher.watch(self.http1.serve_connection(io, service)).await
        };
        if let Err(error) = served {
            tracing::debug!(%peer, %error, "a connection broke");
        }
    }
}

/// Reads until it is known whether the connection begins as HTTP/2 does; what was read. Whoever sends nothing runs into
/// the time limit that stands around this.
///
/// Nothing is taken of what can be told by a look: hyper's buffer for a connection would grow to twice its size over a
/// first read of a few bytes.
async fn first_bytes(stream: &TcpStream) -> io::Result<Vec<u8>> {
    let mut first = Vec::new();
    while first.len() < H2_PREFACE.len() {
        let expected = &H2_PREFACE[first.len()..];
        let mut seen = [0; H2_PREFACE.len()];
        let length = stream.peek(&mut seen[..expected.len()]).await?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if !expected.starts_with(&seen[..length]) {
            break;
        }
        // It is there, so that this waits for nothing.
        let taken = stream.try_read(&mut seen[..length])?;
        first.extend_from_slice(&seen[..taken]);
    }
    Ok(first)
}
