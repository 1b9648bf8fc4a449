//! Answers on their way: owns the pieces in which they are sent, and how long the client of an HTTP/2 stream may read none.
//!
//! A client of HTTP/2 can close the window of one stream and leave its connection alive. hyper then waits, with the
//! whole answer in memory. So the body is cut into pieces, the last one a single byte: while hyper asks for no more of
//! them, the client takes nothing, and [`Executor`] drops the stream once that lasted too long, which resets it.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use axum::body::Body;
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use tokio::time::{Instant, sleep_until};

use super::activity::Open;

/// The largest piece of an answer that HTTP/2 is given at once.
const PIECE_MAX_BYTES: usize = 16 * 1024;
/// An answer up to this size is sent in one piece.
const WHOLE_MAX_BYTES: usize = 1024;

/// The body of an answer.
pub(crate) struct Answer {
    source: Source,
    /// Of a stream of HTTP/2.
    progress: Option<Arc<Progress>>,
    _open: Open,
}

enum Source {
    Whole(Bytes),
    Stream(Body),
}

impl Answer {
    /// All of it is there.
    pub(crate) fn whole(bytes: Bytes, open: Open) -> Self {
        Self { source: Source::Whole(bytes), progress: Progress::of_stream(), _open: open }
    }

    /// It comes bit by bit.
    pub(crate) fn stream(body: Body, open: Open) -> Self {
        Self { source: Source::Stream(body), progress: Progress::of_stream(), _open: open }
    }
}

impl hyper::body::Body for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        if let Some(progress) = &this.progress {
            progress.asked();
        }
        let frame = match &mut this.source {
            Source::Whole(bytes) if bytes.is_empty() => return Poll::Ready(None),
            Source::Whole(bytes) => {
                let piece = if this.progress.is_some() { next_piece(bytes) } else { std::mem::take(bytes) };
                Some(Ok(Frame::data(piece)))
            }
            Source::Stream(body) => match Pin::new(body).poll_frame(context) {
                Poll::Ready(frame) => frame,
                Poll::Pending => return Poll::Pending,
            },
        };
        if let Some(progress) = &this.progress {
            progress.handed_over();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Whole(bytes) => bytes.is_empty(),
            Source::Stream(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Source::Stream(body) => body.size_hint(),
        }
    }
}

/// The next piece; the last one is a single byte, so that hyper asks for it only when all before it are taken.
fn next_piece(bytes: &mut Bytes) -> Bytes {
    if bytes.len() <= WHOLE_MAX_BYTES && bytes.len() > 1 || bytes.len() == 1 {
        return std::mem::take(bytes);
    }
    bytes.split_to(PIECE_MAX_BYTES.min(bytes.len() - 1))
}

tokio::task_local! {
    /// How the stream of HTTP/2 that this task serves goes on.
    static PROGRESS: Arc<Progress>;
}

/// How a stream goes on.
#[derive(Debug, Default)]
pub(crate) struct Progress(Mutex<Option<Instant>>);

impl Progress {
    /// That of the stream whose task this is; None for HTTP/1, whose connections have a limit of their own.
    fn of_stream() -> Option<Arc<Self>> {
        PROGRESS.try_with(Arc::clone).ok()
    }

    fn since(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next piece is asked for: all before it are taken.
    fn asked(&self) {
        *self.since() = None;
    }

    /// A piece waits to be taken.
    fn handed_over(&self) {
        *self.since() = Some(Instant::now());
    }

    /// Resolves once a piece was not taken for the limit.
    async fn stalled(&self, limit: Duration) {
        let mut check = Instant::now() + limit;
        loop {
            sleep_until(check).await;
            let now = Instant::now();
            match *self.since() {
                Some(since) if since + limit <= now => return,
                Some(since) => check = since + limit,
                None => check = now + limit,
            }
        }
    }
}

/// Runs each HTTP/2 stream in a task of its own, and ends a stream whose client reads nothing for the limit.
#[derive(Debug, Clone)]
pub(crate) struct Executor {
    pub(crate) limit: Duration,
}

impl<F> hyper::rt::Executor<F> for Executor
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, stream: F) {
        let limit = self.limit;
        let progress = Arc::new(Progress::default());
        let scope = Arc::clone(&progress);
        tokio::spawn(PROGRESS.scope(scope, async move {
            tokio::select! {
                biased;
                () = stream => {}
                () = progress.stalled(limit) => tracing::debug!("a client read nothing of its answer; its stream ends"),
            }
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_cut_so_that_its_end_waits_for_all_before_it() {
        for length in [1_usize, 2, 1_024, 1_025, 16_384, 16_385, 100_000] {
            let whole: Bytes = (0..length).map(|at| u8::try_from(at % 251).unwrap_or(0)).collect();
            let (mut left, mut pieces) = (whole.clone(), Vec::new());
            while !left.is_empty() {
                pieces.push(next_piece(&mut left));
            }
            assert_eq!(pieces.concat(), whole);
            assert!(pieces.iter().all(|piece| !piece.is_empty() && piece.len() <= PIECE_MAX_BYTES));
            assert!(length <= WHOLE_MAX_BYTES || pieces.last().is_some_and(|last| last.len() == 1), "{length}");
        }
    }
}
