//! A connection's bytes: owns the limit on slow readers, what is put back after a look at the first bytes, and that the
//! server's own answers are replaced by ours ([`super::bare`]).
//!
//! The server closes a connection whose client reads nothing for too long, so that such a client can hold neither an event
//! stream nor a large answer open for ever.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Sleep, sleep},
};

use super::{activity::Activity, bare};

/// A connection, as hyper reads and writes it.
pub(crate) struct Socket {
    stream: TcpStream,
    /// What was read already.
    first: Vec<u8>,
    activity: Arc<Activity>,
    /// Whether bytes that come between two requests begin a head.
    tells_heads: bool,
    stall_limit: Duration,
    /// While nothing can be written.
    stalled: Option<Pin<Box<Sleep>>>,
    /// What is written in place of an answer of the server's own.
    replacement: Option<Box<Replacement>>,
}

struct Replacement {
    text: Vec<u8>,
    written: usize,
    /// The length of what it stands for.
    replaces: usize,
}

impl Socket {
    pub(crate) fn new(
        stream: TcpStream,
        first: Vec<u8>,
        activity: Arc<Activity>,
        tells_heads: bool,
        stall_limit: Duration,
    ) -> Self {
        Self { stream, first, activity, tells_heads, stall_limit, stalled: None, replacement: None }
    }

    /// Says with a whole answer why the connection ends, as far as it is taken at once.
    pub(crate) fn last_words(&self, status: u16) {
        let _ = self.stream.try_write(&bare::answer(status));
    }

    /// Writes the replacement to its end; how much of what hyper wrote is done with by that.
    fn write_replacement(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        while let Some(replacement) = &mut self.replacement {
            let left = &replacement.text[replacement.written..];
            if left.is_empty() {
                let replaces = replacement.replaces;
                self.replacement = None;
                return Poll::Ready(Ok(replaces));
            }
            let attempt = Pin::new(&mut self.stream).poll_write(context, left);
            let written = ready!(self.watch(context, attempt))?;
            if let Some(replacement) = &mut self.replacement {
                replacement.written += written;
            }
        }
        Poll::Ready(Ok(0))
    }

    /// Passes on what came of an attempt to write; the clock runs from the first one that had to wait.
    fn watch<T>(&mut self, context: &mut Context<'_>, attempt: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if attempt.is_ready() {
            if self.stalled.take().is_some() {
                self.activity.blocked(false);
            }
            return attempt;
        }
        let (limit, activity) = (self.stall_limit, &self.activity);
        let timer = self.stalled.get_or_insert_with(|| {
            activity.blocked(true);
            Box::pin(sleep(limit))
        });
        ready!(timer.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.first.is_empty() {
            let length = self.first.len().min(buffer.remaining());
            buffer.put_slice(&self.first[..length]);
            self.first.drain(..length);
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        if self.tells_heads && buffer.filled().len() > before {
            self.activity.bytes();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, mut bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.replacement.is_some() {
            return self.write_replacement(context);
        }
        if self.tells_heads
            && self.activity.is_idle()
            && let Some((at, status)) = bare::find(bytes)
        {
            if at == 0 {
                let text = bare::answer(status);
                self.replacement = Some(Box::new(Replacement { text, written: 0, replaces: bytes.len() }));
                return self.write_replacement(context);
            }
            bytes = &bytes[..at];
        }
        let attempt = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.watch(context, attempt)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut filled = slices.iter().filter(|slice| !slice.is_empty());
        if let (Some(only), None) = (filled.next(), filled.next()) {
            return self.poll_write(context, only);
        }
        let attempt = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.watch(context, attempt)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let attempt = Pin::new(&mut self.stream).poll_flush(context);
        self.watch(context, attempt)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let attempt = Pin::new(&mut self.stream).poll_shutdown(context);
        self.watch(context, attempt)
    }
}
