//! HTTP/1.1 in the clear, straight to one server: owns the connections to it and one exchange over one of them. A
//! provider in the same machine or cluster answers in less time than a general client takes for proxies, redirects,
//! protocols and encodings; wherever one of these is needed, [`super::http`] uses the general client.
//!
//! Thousands of exchanges wait for their answers at one time, so one that waits is its socket and nothing else: what was
//! sent is let go of, and there is no buffer until there is something to read. An exchange that is dropped takes its
//! connection with it. A connection at rest is not driven; whether the server closed it meanwhile is seen when it is
//! taken up again. What the bytes mean is told by [`super::wire`].

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    sync::{Mutex, PoisonError},
    task::{Poll, ready},
    time::Duration,
};

use bytes::{Buf as _, Bytes, BytesMut, buf::Chain};
use http::{HeaderMap, StatusCode, Uri};
use hyper_util::client::{legacy::connect::HttpConnector, proxy::matcher::Matcher};
use tokio::{
    net::TcpStream,
    time::{Instant, timeout},
};
use tokio_util::io::{poll_read_buf, poll_write_buf};
use tower::{Service as _, ServiceExt as _};

use super::wire::{self, Left};

/// How many connections at rest are looked through for one that is still open, before a new one is made.
const STALE_MAX: usize = 8;

/// What is read at once.
const READ_BYTES: usize = 8 * 1024;

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
    stream: TcpStream,
    since: Instant,
}

/// Why an exchange failed.
#[derive(Debug)]
pub(super) enum Broken {
    /// There was no connection.
    Unconnected(Box<dyn std::error::Error + Send + Sync>),
    /// It broke before the head of the answer was there.
    Unanswered(io::Error),
}

/// A request: its head, then its body.
type Message = Chain<Bytes, Bytes>;

/// A request to post a body.
pub(super) fn post(path: &str, headers: &HeaderMap, body: Vec<u8>) -> Message {
    let mut head = Vec::with_capacity(512);
    head.extend_from_slice(b"POST ");
    head.extend_from_slice(path.as_bytes());
    head.extend_from_slice(b" HTTP/1.1\r\n");
    for (name, value) in headers {
        head.extend_from_slice(name.as_str().as_bytes());
        head.extend_from_slice(b": ");
        head.extend_from_slice(value.as_bytes());
        head.extend_from_slice(b"\r\n");
    }
    head.extend_from_slice(format!("content-length: {}\r\n\r\n", body.len()).as_bytes());
    Bytes::from(head).chain(Bytes::from(body))
}

/// An answer whose head is there. Its body comes piece by piece.
#[derive(Debug)]
pub(super) struct Answer<'a> {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    home: &'a Plain,
    line: Line,
    left: Left,
    is_kept: bool,
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
    /// turned out to be closed is sent over another one.
    pub(super) async fn send(&self, mut message: Message) -> Result<Answer<'_>, Broken> {
        let length = message.remaining();
        for _ in 0..STALE_MAX {
            let Some(stream) = self.take() else { break };
            let mut line = Line::new(stream, message);
            match line.head().await {
                Ok(head) => return Ok(self.answer(head, line)),
                Err(_) if line.unsent.remaining() == length => message = line.unsent,
                Err(error) => return Err(Broken::Unanswered(error)),
            }
        }
        let mut line = Line::new(self.connect().await.map_err(Broken::Unconnected)?, message);
        let head = line.head().await.map_err(Broken::Unanswered)?;
        Ok(self.answer(head, line))
    }

    fn answer(&self, head: wire::Head, line: Line) -> Answer<'_> {
        let wire::Head { status, headers, left, is_kept } = head;
        Answer { status, headers, home: self, line, left, is_kept }
    }

    /// A connection that rests and is still open: one that has something to say, its end included, is not.
    fn take(&self) -> Option<TcpStream> {
        loop {
            let Idle { stream, since } = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
            let is_silent =
                || matches!(stream.try_read(&mut [0]), Err(error) if error.kind() == io::ErrorKind::WouldBlock);
            if since.elapsed() < self.idle_for && is_silent() {
                return Some(stream);
            }
        }
    }

    /// Keeps a connection for the next exchange, and lets go of those that have rested too long.
    fn keep(&self, stream: TcpStream) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.first().is_some_and(|oldest| oldest.since.elapsed() >= self.idle_for) {
            idle.retain(|resting| resting.since.elapsed() < self.idle_for);
        }
        if idle.len() < self.idle_max {
            idle.push(Idle { stream, since: Instant::now() });
        }
    }

    async fn connect(&self) -> Result<TcpStream, Box<dyn std::error::Error + Send + Sync>> {
        let mut connector = self.connector.clone();
        let connecting = async {
            let stream = connector.ready().await?.call(self.origin.clone()).await?;
            Ok(stream.into_inner())
        };
        // Rare and large: whoever waits for an answer must not have room for it.
        Box::pin(timeout(self.connect_timeout, connecting)).await.unwrap_or_else(|elapsed| Err(elapsed.into()))
    }
}

impl Answer<'_> {
    /// The length of the body, where it was announced.
    pub(super) fn announced(&self) -> Option<u64> {
        match self.left {
            Left::Nothing => Some(0),
            Left::Bytes(length) => Some(length),
            _ => None,
        }
    }

    /// The next piece of the body; None at its end.
    pub(super) async fn piece(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            let Self { line, left, .. } = self;
            match *left {
                Left::Nothing => return Ok(None),
                Left::Bytes(length) => {
                    let piece = line.some(length).await?;
                    *left = match length - piece.len() as u64 {
                        0 => Left::Nothing,
                        more => Left::Bytes(more),
                    };
                    return Ok(Some(piece));
                }
                Left::Chunk => {
                    *left = match line.whole(wire::chunk).await? {
                        0 => Left::Trailers,
                        size => Left::InChunk(size),
                    };
                }
                Left::InChunk(0) => {
                    line.whole(wire::chunk_end).await?;
                    *left = Left::Chunk;
                }
                Left::InChunk(size) => {
                    let piece = line.some(size).await?;
                    *left = Left::InChunk(size - piece.len() as u64);
                    return Ok(Some(piece));
                }
                Left::Trailers => {
                    if line.whole(wire::trailer).await? {
                        *left = Left::Nothing;
                    }
                }
                Left::UntilClosed => {
                    if line.heard.is_empty() && line.hear().await? == 0 {
                        *left = Left::Nothing;
                        return Ok(None);
                    }
                    return Ok(Some(line.heard.split().freeze()));
                }
            }
        }
    }

    /// Leaves the connection to the next exchange, where this one is complete and there may be another.
    pub(super) fn end(self) {
        let Self { home, line, left, is_kept, .. } = self;
        if is_kept && left == Left::Nothing && line.heard.is_empty() && !line.unsent.has_remaining() {
            home.keep(line.stream);
        }
    }
}

/// One exchange over one connection.
#[derive(Debug)]
struct Line {
    stream: TcpStream,
    unsent: Message,
    /// Why no more can be sent. The answer may be there all the same.
    deaf: Option<io::Error>,
    /// Received and not taken yet.
    heard: BytesMut,
}

impl Line {
    fn new(stream: TcpStream, unsent: Message) -> Self {
        Self { stream, unsent, deaf: None, heard: BytesMut::new() }
    }

    /// The head of the answer; what comes before it (100 Continue and its like) says nothing.
    async fn head(&mut self) -> io::Result<wire::Head> {
        loop {
            let head = self.whole(wire::head).await?;
            if !head.status.is_informational() || head.status == StatusCode::SWITCHING_PROTOCOLS {
                return Ok(head);
            }
        }
    }

    /// Reads until there is enough for `parse`, and takes that.
    async fn whole<T>(&mut self, parse: impl Fn(&[u8]) -> io::Result<Option<(T, usize)>>) -> io::Result<T> {
        loop {
            if !self.heard.is_empty()
                && let Some((parsed, length)) = parse(&self.heard)?
            {
                self.heard.advance(length);
                return Ok(parsed);
            }
            self.more().await?;
        }
    }

    /// Some of what there is, at most so many bytes.
    async fn some(&mut self, max: u64) -> io::Result<Bytes> {
        if self.heard.is_empty() {
            self.more().await?;
        }
        let length = usize::try_from(max).unwrap_or(usize::MAX).min(self.heard.len());
        Ok(self.heard.split_to(length).freeze())
    }

    /// Hears more: there must be some.
    async fn more(&mut self) -> io::Result<()> {
        if self.hear().await? == 0 {
            let closed =
                || io::Error::new(io::ErrorKind::UnexpectedEof, "it was closed before the answer was complete");
            return Err(self.deaf.take().unwrap_or_else(closed));
        }
        Ok(())
    }

    /// Reads what comes, and sends meanwhile what is still to be sent. 0 where the other side has closed.
    async fn hear(&mut self) -> io::Result<usize> {
        let Self { stream, unsent, deaf, heard } = self;
        poll_fn(|context| {
            while unsent.has_remaining() && deaf.is_none() {
                match poll_write_buf(Pin::new(&mut *stream), context, unsent) {
                    Poll::Ready(Ok(1..)) if unsent.has_remaining() => {}
                    Poll::Ready(Ok(1..)) => *unsent = Bytes::new().chain(Bytes::new()), // Lets go of the prompt.
                    Poll::Ready(Ok(0)) => *deaf = Some(io::ErrorKind::WriteZero.into()),
                    Poll::Ready(Err(error)) => *deaf = Some(error),
                    Poll::Pending => break,
                }
            }
            ready!(stream.poll_read_ready(context))?;
            heard.reserve(READ_BYTES);
            poll_read_buf(Pin::new(stream), context, heard)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
        sync::mpsc,
        task::JoinHandle,
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

    fn request(body: &str) -> Message {
        post("/", &HeaderMap::new(), body.into())
    }

    async fn read(mut answer: Answer<'_>) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        while let Some(piece) = answer.piece().await? {
            body.extend_from_slice(&piece);
        }
        answer.end();
        Ok(body)
    }

    async fn ask(plain: &Plain) -> Vec<u8> {
        read(plain.send(request("Hi")).await.expect("an answer")).await.expect("a body")
    }

    fn count(connections: &mut mpsc::UnboundedReceiver<()>) -> usize {
        std::iter::from_fn(|| connections.try_recv().ok()).count()
    }

    #[tokio::test]
    async fn a_connection_is_used_again() {
        let (address, mut connections) = server(10).await;
        let plain = Plain::to(&address, KEEPING).expect("in the clear");
        for _ in 0..10 {
            assert_eq!(ask(&plain).await, b"Yes");
        }
        assert_eq!(count(&mut connections), 1);
    }

    #[tokio::test]
    async fn one_that_was_closed_while_it_rested_fails_nobody() {
        let (address, mut connections) = server(1).await;
        let plain = Plain::to(&address, KEEPING).expect("in the clear");
        for _ in 0..3 {
            assert_eq!(ask(&plain).await, b"Yes");
            // Until the end of it has arrived.
            while let Some(stream) = plain.take() {
                plain.keep(stream);
                tokio::task::yield_now().await;
            }
        }
        assert_eq!(count(&mut connections), 3);
    }

    #[tokio::test]
    async fn an_exchange_that_is_dropped_takes_its_connection_with_it() {
        let (address, mut connections) = server(10).await;
        let plain = Plain::to(&address, KEEPING).expect("in the clear");
        drop(plain.send(request("Hi")).await.expect("an answer"));
        assert_eq!(ask(&plain).await, b"Yes");
        assert_eq!(count(&mut connections), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn only_so_many_rest_and_not_for_ever() {
        let (address, mut connections) = server(10).await;
        let plain = Plain::to(&address, KEEPING).expect("in the clear");
        let all = futures::future::join_all((0..5).map(|_| ask(&plain))).await;
        assert!(all.iter().all(|answer| answer == b"Yes"));
        assert_eq!(count(&mut connections), 5);
        assert_eq!(plain.idle.lock().expect("no panic").len(), 2);
        tokio::time::advance(KEEPING.idle_for).await;
        assert!(plain.take().is_none());
    }

    /// A server that gives one answer, a byte at a time, and then reads what there is until the end.
    async fn slow(answer: &'static str) -> (Plain, JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let served = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("a client");
            stream.set_nodelay(true).expect("a socket");
            for byte in answer.bytes() {
                stream.write_all(&[byte]).await.expect("a listener");
                tokio::task::yield_now().await;
            }
            stream.shutdown().await.expect("a listener");
            let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
        });
        (Plain::to(&format!("http://{address}/"), KEEPING).expect("in the clear"), served)
    }

    #[tokio::test]
    async fn an_answer_is_read_however_it_comes() {
        let bodies = [
            "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nYes",
            "HTTP/1.1 200 OK\r\n\r\nYes",
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nx: y\r\n\r\nHTTP/1.0 200 OK\r\n\r\nYes",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nY\r\n02;x=y\r\nes\r\n0\r\nx: y\r\n\r\n",
        ];
        for body in bodies {
            let (plain, _) = slow(body).await;
            assert_eq!(ask(&plain).await, b"Yes", "{body}");
        }
    }

    #[tokio::test]
    async fn an_answer_that_is_not_whole_is_an_error() {
        let heads = ["", "HTTP/1.1 200 OK\r\ncontent-le"];
        for head in heads {
            let (plain, _) = slow(head).await;
            assert!(matches!(plain.send(request("Hi")).await, Err(Broken::Unanswered(_))), "{head}");
        }
        let bodies = [
            "content-length: 3\r\n\r\nYe",
            "transfer-encoding: chunked\r\n\r\n3\r\nYe",
            "transfer-encoding: chunked\r\n\r\n3\r\nYes\r\n",
            "transfer-encoding: chunked\r\n\r\n2\r\nYes\r\n0\r\n\r\n",
            "transfer-encoding: chunked\r\n\r\nYes",
            "transfer-encoding: chunked\r\n\r\n2\r\nYe\r\n\r\n\r\n",
            "transfer-encoding: chunked\r\n\r\n2\r\nYe\r\n;x=y\r\n\r\n",
        ];
        for body in bodies {
            let whole: &'static str = format!("HTTP/1.1 200 OK\r\n{body}").leak();
            let (plain, _) = slow(whole).await;
            let answer = plain.send(request("Hi")).await.expect("a head");
            assert!(read(answer).await.is_err(), "{body}");
            assert!(plain.take().is_none());
        }
    }

    #[tokio::test]
    async fn whoever_answers_before_it_has_read_all_is_heard() {
        let (plain, _) = slow("HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nNo").await;
        let long = "x".repeat(16 * 1024 * 1024);
        let answer = plain.send(request(&long)).await.expect("an answer");
        assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
        assert_eq!(read(answer).await.expect("a body"), b"No");
        assert!(plain.take().is_none(), "what was not sent whole is not kept");
    }
}
