//! HTTP/1.1 in the clear, straight to one server: owns the connections to it and one exchange over one of them. A
//! provider in the same machine or cluster answers in less time than a general client takes for proxies, redirects,
//! protocols and encodings; wherever one of these is needed, [`super::http`] uses the general client.
//!
//! An exchange and its connection are one future: there is no task for each connection, nothing is handed from task to
//! task, and an exchange that is dropped takes its connection with it. A connection at rest is not driven; whether the
//! server closed it meanwhile is seen when it is taken up again.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::{Mutex, PoisonError},
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Request, Response, Uri,
    body::Incoming,
    client::conn::http1::{self, Connection, SendRequest},
};
use hyper_util::{
    client::{legacy::connect::HttpConnector, proxy::matcher::Matcher},
    rt::TokioIo,
};
use tokio::{
    net::TcpStream,
    time::{Instant, timeout},
};
use tower::{Service as _, ServiceExt as _};

/// How many connections at rest are looked through for one that is still open, before a new one is made.
const STALE_MAX: usize = 8;

/// What is read at once. Thousands of connections wait for their answer at one time, each with such a buffer; the usual
/// size is four times as much.
const READ_BUFFER_BYTES: usize = 2 * 1024;

/// The connections to one server.
#[derive(Debug)]
pub(super) struct Plain {
    origin: Uri,
    connector: HttpConnector,
    idle_max: usize,
    idle_for: Duration,
    connect_timeout: Duration,
    /// The one last used is at the end.
    idle: Mutex<Vec<Idle>>,
}

/// How connections are kept.
#[derive(Debug, Clone, Copy)]
pub(super) struct Keeping {
    /// Connections at rest, at most.
    pub(super) idle_max: usize,
    /// How long one may rest.
    pub(super) idle_for: Duration,
    /// How long making one may take.
    pub(super) connect_timeout: Duration,
    /// How often the system tests a silent one.
    pub(super) keepalive: Duration,
}

#[derive(Debug)]
struct Idle {
    line: Line,
    since: Instant,
}

/// Why an exchange failed.
#[derive(Debug)]
pub(super) enum Broken {
    /// There was no connection.
    Unconnected(Box<dyn std::error::Error + Send + Sync>),
    /// It broke before the head of the answer was there.
    Unanswered(hyper::Error),
}

/// The connection over which the body of an answer comes.
pub(super) struct Answering<'a> {
    home: &'a Plain,
    line: Line,
}

impl Plain {
    /// For the server of this address; None where it is not reached in the clear and directly.
    pub(super) fn to(address: &str, keeping: Keeping) -> Option<Self> {
        let origin: Uri = address.parse().ok()?;
        if origin.scheme_str() != Some("http") || Matcher::from_system().intercept(&origin).is_some() {
            return None;
        }
        let Keeping { idle_max, idle_for, connect_timeout, keepalive } = keeping;
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_keepalive(Some(keepalive));
        Some(Self { origin, connector, idle_max, idle_for, connect_timeout, idle: Mutex::default() })
    }

    /// Sends a request and waits for the head of its answer. What was not sent because a connection that had rested
    /// turned out to be closed is sent over another one. The body of the answer comes while [`Answering`] is driven.
    pub(super) async fn send(
        &self,
        mut request: Request<Full<Bytes>>,
    ) -> Result<(Response<Incoming>, Answering<'_>), Broken> {
        for _ in 0..STALE_MAX {
            let Some(mut line) = self.take().await else { break };
            match line.send(request).await {
                Ok(response) => return Ok((response, Answering { home: self, line })),
                Err(mut failed) => match failed.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(Broken::Unanswered(failed.into_error())),
                },
            }
        }
        let mut line = self.connect().await.map_err(Broken::Unconnected)?;
        match line.send(request).await {
            Ok(response) => Ok((response, Answering { home: self, line })),
            Err(failed) => Err(Broken::Unanswered(failed.into_error())),
        }
    }

    /// A connection that rests and is still open.
    async fn take(&self) -> Option<Line> {
        loop {
            let Idle { mut line, since } = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
            if since.elapsed() < self.idle_for && line.is_free().await {
                return Some(line);
            }
        }
    }

    /// Keeps a connection for the next exchange, and lets go of those that have rested too long.
    fn keep(&self, line: Line) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.first().is_some_and(|oldest| oldest.since.elapsed() >= self.idle_for) {
            idle.retain(|resting| resting.since.elapsed() < self.idle_for);
        }
        if idle.len() < self.idle_max {
            idle.push(Idle { line, since: Instant::now() });
        }
    }

    async fn connect(&self) -> Result<Line, Box<dyn std::error::Error + Send + Sync>> {
        let mut connector = self.connector.clone();
        let connecting = async {
            let stream = connector.ready().await?.call(self.origin.clone()).await?;
            let (sender, connection) =
                http1::Builder::new().read_buf_exact_size(Some(READ_BUFFER_BYTES)).handshake(stream).await?;
            Ok(Line { sender, connection: Some(Box::pin(connection)) })
        };
        timeout(self.connect_timeout, connecting).await.unwrap_or_else(|elapsed| Err(elapsed.into()))
    }
}

impl Answering<'_> {
    /// Drives the connection while the body is read. One that is free afterwards is kept.
    pub(super) async fn during<T>(self, reading: impl Future<Output = T>) -> T {
        let Self { home, mut line } = self;
        let read = drive(&mut line.connection, reading).await;
        if line.is_free().await {
            home.keep(line);
        }
        read
    }
}

/// One connection.
#[derive(Debug)]
struct Line {
    sender: SendRequest<Full<Bytes>>,
    connection: Driven,
}

/// None once it has ended.
type Driven = Option<Pin<Box<Connection<TokioIo<TcpStream>, Full<Bytes>>>>>;

type Unsent = hyper::client::conn::TrySendError<Request<Full<Bytes>>>;

impl Line {
    async fn send(&mut self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, Unsent> {
        let sending = self.sender.try_send_request(request);
        drive(&mut self.connection, sending).await
    }

    /// Whether it is open and may carry the next exchange, after it has seen what happened meanwhile. It waits for
    /// nothing.
    async fn is_free(&mut self) -> bool {
        let Self { sender, connection } = self;
        poll_fn(|context| {
            advance(connection, context);
            Poll::Ready(connection.is_some() && sender.is_ready())
        })
        .await
    }
}

/// Its errors are told to whoever waits for an answer, and otherwise concern nobody.
fn advance(connection: &mut Driven, context: &mut std::task::Context<'_>) {
    if let Some(open) = connection
        && open.as_mut().poll(context).is_ready()
    {
        *connection = None;
    }
}

async fn drive<T>(connection: &mut Driven, work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    poll_fn(|context| {
        advance(connection, context);
        work.as_mut().poll(context)
    })
    .await
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
        sync::mpsc,
    };

    use super::*;

    const KEEPING: Keeping = Keeping {
        idle_max: 2,
        idle_for: Duration::from_mins(1),
        connect_timeout: Duration::from_secs(10),
        keepalive: Duration::from_secs(30),
    };

    /// A server that gives so many answers over each connection and then closes it; it tells of each connection.
    async fn server(answers: usize) -> (String, mpsc::UnboundedReceiver<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let (told, connections) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let _ = told.send(());
                tokio::spawn(async move {
                    for _ in 0..answers {
                        let mut heard = Vec::new();
                        while !heard.ends_with(b"Hi") {
                            if !matches!(stream.read_buf(&mut heard).await, Ok(1..)) {
                                return;
                            }
                        }
                        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nYes").await.expect("a listener");
                    }
                });
            }
        });
        (format!("http://{address}/"), connections)
    }

    fn request() -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(Bytes::from_static(b"Hi")));
        *request.method_mut() = hyper::Method::POST;
        request
    }

    async fn ask(plain: &Plain) -> Bytes {
        let (response, answering) = plain.send(request()).await.expect("an answer");
        answering.during(response.into_body().collect()).await.expect("a body").to_bytes()
    }

    fn count(connections: &mut mpsc::UnboundedReceiver<()>) -> usize {
        std::iter::from_fn(|| connections.try_recv().ok()).count()
    }

    #[tokio::test]
    async fn a_connection_is_used_again() {
        let (address, mut connections) = server(10).await;
        let plain = Plain::to(&address, KEEPING).expect("in the clear");
        for _ in 0..10 {
            assert_eq!(ask(&plain).await, "Yes");
        }
        assert_eq!(count(&mut connections), 1);
    }

    #[tokio::test]
    async fn one_that_was_closed_while_it_rested_fails_nobody() {
        let (address, mut connections) = server(1).await;
        let plain = Plain::to(&address, KEEPING).expect("in the clear");
        for _ in 0..3 {
            assert_eq!(ask(&plain).await, "Yes");
            // Until the end of it has arrived.
            while let Some(line) = plain.take().await {
                plain.keep(line);
                tokio::task::yield_now().await;
            }
        }
        assert_eq!(count(&mut connections), 3);
    }

    #[tokio::test]
    async fn an_exchange_that_is_dropped_takes_its_connection_with_it() {
        let (address, mut connections) = server(10).await;
        let plain = Plain::to(&address, KEEPING).expect("in the clear");
        let (response, answering) = plain.send(request()).await.expect("an answer");
        drop((response, answering));
        assert_eq!(ask(&plain).await, "Yes");
        assert_eq!(count(&mut connections), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn only_so_many_rest_and_not_for_ever() {
        let (address, mut connections) = server(10).await;
        let plain = Plain::to(&address, KEEPING).expect("in the clear");
        let all = futures::future::join_all((0..5).map(|_| ask(&plain))).await;
        assert!(all.iter().all(|answer| answer == "Yes"));
        assert_eq!(count(&mut connections), 5);
        assert_eq!(plain.idle.lock().expect("no panic").len(), 2);
        tokio::time::advance(KEEPING.idle_for).await;
        assert!(plain.take().await.is_none());
    }
}
