//! Group commit: owns how single requests become batches. A batch is whatever has gathered while the one before it was
//! under way, up to a number of requests and of bytes: no timer, so one request alone waits for nothing and a thousand
//! share one transaction.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use stagegate_core::{Code, Error};
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::TaskTracker;

/// Requests that may wait for their batch before senders are held back.
const QUEUE_MAX: usize = 4_096;

/// The most bytes of payloads in one batch; a request with more goes alone. A statement holds them two or three times.
const BATCH_MAX_BYTES: u64 = 16 << 20;

/// When to come back where the queue is full.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// One request and where its answer goes.
pub(crate) type Entry<T, R> = (T, oneshot::Sender<Result<R, Error>>);

/// The sending side. Cheap to clone.
pub(crate) struct Batcher<T, R> {
    queue: mpsc::Sender<Entry<T, R>>,
}

impl<T, R> Clone for Batcher<T, R> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone() }
    }
}

impl<T, R> fmt::Debug for Batcher<T, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batcher").field("free", &self.queue.capacity()).finish()
    }
}

impl<T: Send + 'static, R: Send + 'static> Batcher<T, R> {
    /// Starts the writer: `flush` answers each entry of a batch of at most `batch_max`. `weigh` tells the bytes of a
    /// request's payloads.
    pub(crate) fn start<F, Fut>(tracker: &TaskTracker, batch_max: usize, weigh: fn(&T) -> u64, flush: F) -> Self
    where
        F: Fn(Vec<Entry<T, R>>) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send,
    {
        let (queue, mut entries) = mpsc::channel::<Entry<T, R>>(QUEUE_MAX);
        tracker.spawn(async move {
            loop {
                let mut gathered = Vec::new();
                if entries.recv_many(&mut gathered, batch_max.max(1)).await == 0 {
                    return;
                }
                let mut rest = gathered.into_iter().peekable();
                while let Some(first) = rest.next() {
                    let mut bytes = weigh(&first.0);
                    let mut batch = vec![first];
                    while let Some(next) = rest.next_if(|(request, _)| bytes + weigh(request) <= BATCH_MAX_BYTES) {
                        bytes += weigh(&next.0);
                        batch.push(next);
                    }
                    flush(batch).await;
                }
            }
        });
        Self { queue }
    }

    /// Sends one request. What is returned waits for its answer, and for room in the queue where there is none; the
    /// request is in the queue already where there was.
    pub(crate) fn begin(&self, request: T) -> Sent<R> {
        let (answer, answered) = oneshot::channel();
        match self.queue.try_send((request, answer)) {
            // A queue that is closed has dropped the answer's sender, which says so.
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Sent::Queued(answered),
            Err(mpsc::error::TrySendError::Full(entry)) => {
                let queue = self.queue.clone();
                Sent::Held(Box::pin(async move {
                    queue.send(entry).await.map_err(|_| gone())?;
                    answered.await.map_err(|_| gone())?
                }))
            }
        }
    }

    /// Sends one request and waits for its answer, refused at once where the queue is full.
    pub(crate) async fn offer(&self, request: T) -> Result<R, Error> {
        let (answer, answered) = oneshot::channel();
        self.queue.try_send((request, answer)).map_err(|refused| match refused {
            mpsc::error::TrySendError::Closed(_) => gone(),
            mpsc::error::TrySendError::Full(_) => {
                let message = format!("{QUEUE_MAX} requests wait for the database already; come back later");
                Error::new(Code::QueueFull, message).retry_after(RETRY_AFTER)
            }
        })?;
        answered.await.map_err(|_| gone())?
    }
}

/// A request on its way to its answer. Small, as there is one for every run that commits.
pub(crate) enum Sent<R> {
    /// It is in the queue.
    Queued(oneshot::Receiver<Result<R, Error>>),
    /// The queue is full.
    Held(Pin<Box<dyn Future<Output = Result<R, Error>> + Send>>),
}

impl<R> Future for Sent<R> {
    type Output = Result<R, Error>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match self.get_mut() {
            Self::Queued(answered) => {
                let answer = ready!(Pin::new(answered).poll(context));
                Poll::Ready(answer.unwrap_or_else(|_| Err(gone())))
            }
            Self::Held(held) => held.as_mut().poll(context),
        }
    }
}

fn gone() -> Error {
    Error::new(Code::Draining, "this replica is shutting down")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures::FutureExt;
    use tokio::sync::Semaphore;

    use super::*;

    #[tokio::test]
    async fn a_batch_holds_so_many_bytes_and_what_is_larger_goes_alone() {
        let (tracker, disk) = (TaskTracker::new(), Arc::new(Semaphore::new(0)));
        let slow = Arc::clone(&disk);
        let batcher = Batcher::start(
            &tracker,
            100,
            |bytes| *bytes,
            move |batch: Vec<Entry<u64, usize>>| {
                let slow = Arc::clone(&slow);
                async move {
                    let _turn = slow.acquire().await;
                    let together = batch.len();
                    for (_, answer) in batch {
                        let _ = answer.send(Ok(together));
                    }
                }
            },
        );
        let half = BATCH_MAX_BYTES / 2;
        let sent: Vec<_> =
            [half, half, half, 2 * BATCH_MAX_BYTES, 1, 1].map(|bytes| batcher.begin(bytes)).into_iter().collect();
        disk.add_permits(1);
        let together: Vec<usize> = futures::future::try_join_all(sent).await.expect("answered");
        assert_eq!(together, [2, 2, 1, 1, 2, 2]);
    }

    #[tokio::test]
    async fn senders_wait_or_are_refused_while_the_writer_lags() {
        const BATCH: usize = 8;
        let (tracker, disk) = (TaskTracker::new(), Arc::new(Semaphore::new(0)));
        let slow = Arc::clone(&disk);
        let batcher = Batcher::start(
            &tracker,
            BATCH,
            |_| 0,
            move |batch: Vec<Entry<usize, usize>>| {
                let slow = Arc::clone(&slow);
                async move {
                    let _turn = slow.acquire().await;
                    for (number, answer) in batch {
                        let _ = answer.send(Ok(number));
                    }
                }
            },
        );
        // One batch is with the writer, the rest fills the queue.
        let room = BATCH + QUEUE_MAX;
        let mut sent: Vec<_> = (0..=room).map(|number| batcher.begin(number)).collect();
        for _ in 0..2 {
            for sending in &mut sent {
                assert!(sending.now_or_never().is_none(), "nothing is answered yet");
            }
            tokio::task::yield_now().await; // The writer takes its batch, which makes room for as many.
        }
        let refused = batcher.offer(0).await.expect_err("no room");
        assert_eq!(refused.code, Code::QueueFull);
        assert!(refused.retry_after.is_some());
        disk.add_permits(1);
        for (number, sending) in sent.into_iter().enumerate() {
            assert_eq!(sending.await.expect("answered"), number);
        }
    }
}
