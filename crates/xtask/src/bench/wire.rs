//! A lean HTTP/1.1 client over one kept connection: owns the bytes on the wire. Its CPU counts against the cores that
//! are measured, so it parses no more than the status, the length and what it is asked to look for.

use std::{net::SocketAddr, time::Instant};

use anyhow::{Context as _, bail};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// What a run's last event is called on its stream.
const LAST_EVENT: &[u8] = b"run.finished";

/// A kept connection.
#[derive(Debug)]
pub(crate) struct Connection {
    address: SocketAddr,
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// An answer; its body lies in the connection's buffer.
#[derive(Debug)]
pub(crate) struct Answer<'a> {
    pub(crate) status: u16,
    pub(crate) body: &'a [u8],
}

impl Connection {
    pub(crate) async fn open(address: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await.with_context(|| format!("cannot connect to {address}"))?;
        stream.set_nodelay(true)?;
        Ok(Self { address, stream, buffer: Vec::new() })
    }

    /// Starts over on a new connection.
    pub(crate) async fn reopen(&mut self) -> anyhow::Result<()> {
        *self = Self::open(self.address).await?;
        Ok(())
    }

    /// Sends bytes and waits for nothing.
    pub(crate) async fn send(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.stream.write_all(bytes).await?;
        Ok(())
    }

    /// Sends a whole request and reads its whole answer.
    pub(crate) async fn call(&mut self, request: &[u8]) -> anyhow::Result<Answer<'_>> {
        self.stream.write_all(request).await?;
        let (status, head, length) = self.head().await?;
        let Some(length) = length else { bail!("an answer ({status}) without a length") };
        while self.buffer.len() < head + length {
            self.more().await?;
        }
        Ok(Answer { status, body: &self.buffer[head..head + length] })
    }

    /// Sends the request for a run's event stream and reads it to its end; when the last event came.
    pub(crate) async fn follow(&mut self, request: &[u8]) -> anyhow::Result<Instant> {
        self.open_stream(request).await?;
        self.last_event().await
    }

    /// Sends the request for a run's event stream and returns when it has begun.
    pub(crate) async fn open_stream(&mut self, request: &[u8]) -> anyhow::Result<()> {
        self.stream.write_all(request).await?;
        let (status, head, length) = self.head().await?;
        if status != 200 || length.is_some() {
            bail!("no event stream but {status}");
        }
        self.buffer.drain(..head);
        Ok(())
    }

    /// Reads an open event stream up to its end. The connection can be used again.
    pub(crate) async fn last_event(&mut self) -> anyhow::Result<Instant> {
        let mut seen = None;
        loop {
            if seen.is_none() && find(&self.buffer, LAST_EVENT).is_some() {
                seen = Some(Instant::now());
            }
            if self.buffer.ends_with(b"\r\n0\r\n\r\n") || self.buffer == b"0\r\n\r\n" {
                return seen.context("the event stream ended before the run");
            }
            // Of what was looked through only the end can still matter: both needles may be cut anywhere.
            let tail = self.buffer.len().saturating_sub(LAST_EVENT.len() + 8);
            self.buffer.drain(..tail);
            self.more().await?;
        }
    }

    /// Reads up to the end of the answer's head: status, the head's length, the body's length.
    async fn head(&mut self) -> anyhow::Result<(u16, usize, Option<usize>)> {
        self.buffer.clear();
        loop {
            self.more().await?;
            if let Some(end) = find(&self.buffer, b"\r\n\r\n") {
                let status = std::str::from_utf8(self.buffer.get(9..12).unwrap_or_default())?.parse()?;
                let length = if status == 204 { Some(0) } else { header(&self.buffer[..end], b"content-length") };
                return Ok((status, end + 4, length));
            }
        }
    }

    async fn more(&mut self) -> anyhow::Result<()> {
        self.buffer.reserve(2048);
        if self.stream.read_buf(&mut self.buffer).await? == 0 {
            bail!("the connection was closed: {:?}", String::from_utf8_lossy(&self.buffer));
        }
        Ok(())
    }

    /// Reads whatever comes next on a connection that carries raw bytes.
    pub(crate) async fn raw(&mut self) -> anyhow::Result<&mut Vec<u8>> {
        self.more().await?;
        Ok(&mut self.buffer)
    }
}

/// A header's number; names are compared without regard to case.
pub(crate) fn header(head: &[u8], name: &[u8]) -> Option<usize> {
    let line = head.split(|byte| *byte == b'\n').find(|line| {
        line.len() > name.len() && line[name.len()] == b':' && line[..name.len()].eq_ignore_ascii_case(name)
    })?;
    std::str::from_utf8(&line[name.len() + 1..]).ok()?.trim().parse().ok()
}

/// Where the needle first stands.
pub(crate) fn find(hay: &[u8], needle: &[u8]) -> Option<usize> {
    let first = *needle.first()?;
    let mut from = 0;
    while let Some(at) = hay.get(from..)?.iter().position(|byte| *byte == first) {
        let at = from + at;
        if hay[at..].starts_with(needle) {
            return Some(at);
        }
        from = at + 1;
    }
    None
}

/// A GET of this path.
pub(crate) fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n").into_bytes()
}

/// A GET of a run's event stream.
pub(crate) fn get_events(run: &str) -> Vec<u8> {
    format!("GET /v1/runs/{run}/events HTTP/1.1\r\nhost: localhost\r\naccept: text/event-stream\r\n\r\n").into_bytes()
}

/// A POST of this body.
pub(crate) fn post(path: &str, content_type: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    let head = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {content_type}\r\n");
    format!("{head}content-length: {length}\r\n\r\n{body}").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_is_found_whatever_its_case() {
        let head = b"HTTP/1.1 200 OK\r\nx-content-length: 1\r\nContent-Length: 42\r\n";
        assert_eq!(header(head, b"content-length"), Some(42));
        assert_eq!(header(b"HTTP/1.1 200 OK\r\n", b"content-length"), None);
    }

    #[test]
    fn a_needle_is_found_where_it_stands() {
        assert_eq!(find(b"aab", b"ab"), Some(1));
        assert_eq!(find(b"aab", b"aab"), Some(0));
        assert_eq!(find(b"aab", b"aabb"), None);
        assert_eq!(find(b"", b"a"), None);
    }
}
