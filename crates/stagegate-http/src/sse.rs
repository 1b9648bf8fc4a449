//! Event streams: owns their form on the wire, and how long they may stay open. An event's `id` is its seq, so that a
//! client which reconnects with `Last-Event-ID`, to any replica, misses nothing and sees nothing twice.
//!
//! There may be ten thousand of them, so each is one small task; what is sent is written once for all who watch the same
//! run.

use std::{io::Write as _, sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes},
    response::{IntoResponse, Response},
};
use futures::{FutureExt as _, Stream, StreamExt as _, future::BoxFuture, stream, stream::BoxStream};
use http::{
    HeaderValue,
    header::{CACHE_CONTROL, CONTENT_TYPE, VARY},
};
use stagegate_core::{Code, Error, Event, RunId, TenantId};
use stagegate_engine::EventBatch;
use stagegate_telemetry::Metrics;
use tokio::{
    sync::mpsc,
    time::{Instant, Interval, MissedTickBehavior, interval_at, timeout},
};

use tokio_util::sync::CancellationToken;

use crate::{
    auth::{Credential, KEY_CACHE_TTL},
    problem::Problem,
    serve::Peer,
    state::Shared,
    streams::StreamPlace,
};

/// What a client is told to wait before it reconnects.
const RECONNECT_AFTER: Duration = Duration::from_secs(1);
/// How often a stream asks whether its key may still be used: a revocation is obeyed within this and the time that a
/// look-up is remembered.
pub(crate) const KEY_CHECK_INTERVAL: Duration = KEY_CACHE_TTL;
/// The first line of every stream: how long to wait before reconnecting. Like the comments it stands without a blank line
/// after it: some clients (httpx-sse, for one) make an empty event of a blank line that follows no data. So each of them
/// begins the block of the event that comes next.
const OPENING: &str = "retry: 1000\n";
const KEEP_ALIVE: &str = ": keep-alive\n";
const END: &str = ": end of stream\n";

/// One open stream: a place and a gauge, given back when it is dropped.
struct Slot {
    metrics: Metrics,
    _place: StreamPlace,
}

impl Slot {
    fn take(shared: &Shared, asked: &Asked, gives_way: &CancellationToken) -> Result<Self, Problem> {
        let Ok(place) = shared.streams.take(asked.peer, &asked.tenant, gives_way) else {
            let error =
                Error::new(Code::Overloaded, "Too many event streams are open; poll the events as JSON instead.");
            return Err(error.retry_after(RECONNECT_AFTER).into());
        };
        shared.metrics.sse_streams.inc();
        Ok(Self { metrics: shared.metrics.clone(), _place: place })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.metrics.sse_streams.dec();
    }
}

/// What a client wants to follow, and by which right.
pub(crate) struct Asked {
    pub(crate) tenant: TenantId,
    pub(crate) run: RunId,
    pub(crate) after: u64,
    /// None for an open daemon.
    pub(crate) credential: Option<Credential>,
    /// From where it asks.
    pub(crate) peer: Option<Peer>,
}

/// The stream of a run's events after a seq. It ends after `run.finished`, when the replica shuts down, when its key is
/// revoked or expires, and when its place goes to a tenant that has fewer: the client goes on after what it has.
///
/// A task of its own drives it, where requests are handled, and gives it up when a chunk is not taken in time: a client
/// can close the window of one HTTP/2 stream and leave its connection alive, and nothing here would be polled any more.
pub(crate) fn respond(shared: &Shared, asked: Asked) -> Result<Response, Problem> {
    let ended = shared.shutdown.child_token();
    let slot = Slot::take(shared, &asked, &ended)?;
    let chunks = chunks(shared, asked, slot, ended);
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(pump(chunks, sender, shared.config.request_timeout.0));
    let pumped = stream::unfold(receiver, |mut receiver| async {
        let chunk = receiver.recv().await?;
        Some((chunk, receiver))
    });
    let body = Body::from_stream(pumped.map(Ok::<_, std::convert::Infallible>));
    let mut response = body.into_response();
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(VARY, HeaderValue::from_static("accept"));
    // Proxies that buffer would hold events back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

/// Drives a stream until its end, or until its client is gone or takes nothing for too long.
async fn pump(chunks: impl Stream<Item = Bytes>, sender: mpsc::Sender<Bytes>, limit: Duration) {
    tokio::pin!(chunks);
    loop {
        let chunk = tokio::select! {
            () = sender.closed() => return,
            chunk = chunks.next() => chunk,
        };
        let Some(chunk) = chunk else { return };
        if !matches!(timeout(limit, sender.send(chunk)).await, Ok(Ok(()))) {
            return;
        }
    }
}

/// A stream under way.
struct Open {
    batches: BoxStream<'static, Result<Arc<EventBatch>, Error>>,
    run: RunId,
    keep_alive: Interval,
    key_check: Option<(Credential, Interval)>,
    /// The shutdown has begun, or its place is another's.
    ended: BoxFuture<'static, ()>,
    shared: Shared,
    _slot: Slot,
}

fn chunks(
    shared: &Shared,
    asked: Asked,
    slot: Slot,
    ended: CancellationToken,
) -> impl Stream<Item = Bytes> + Send + 'static {
    let Asked { tenant, run, after, credential, peer: _ } = asked;
    let open = Open {
        batches: shared.engine.watch(tenant, run, after),
        run,
        keep_alive: every(shared.config.sse_keep_alive.0),
        key_check: credential.map(|credential| (credential, every(KEY_CHECK_INTERVAL))),
        ended: ended.cancelled_owned().boxed(),
        shared: Arc::clone(shared),
        _slot: slot,
    };
    let chunks = stream::unfold(Some(open), |open| async {
        let mut open = open?;
        Some(match open.next().await {
            Some(chunk) => (chunk, Some(open)),
            None => (Bytes::from_static(END.as_bytes()), None),
        })
    });
    stream::iter([Bytes::from_static(OPENING.as_bytes())]).chain(chunks)
}

fn every(period: Duration) -> Interval {
    let period = period.max(Duration::from_millis(1)); // An interval of nothing is refused.
    let mut interval = interval_at(Instant::now() + period, period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

impl Open {
    /// What is sent next; None at the end.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            tokio::select! {
                biased;
                () = &mut self.ended => return None,
                credential = due(&mut self.key_check) => {
                    if !credential.is_alive(&self.shared).await {
                        return None;
                    }
                }
                batch = self.batches.next() => {
                    self.keep_alive.reset();
                    return match batch? {
                        Ok(batch) => Some(batch.rendered(render)),
                        Err(error) => {
                            // A broken stream just ends: the client reconnects and goes on after what it has.
                            tracing::warn!(%error, run_id = %self.run, "an event stream broke off");
                            None
                        }
                    };
                }
                _ = self.keep_alive.tick() => return Some(Bytes::from_static(KEEP_ALIVE.as_bytes())),
            }
        }
    }
}

/// When the key is to be looked at again.
async fn due(key_check: &mut Option<(Credential, Interval)>) -> Credential {
    match key_check {
        Some((credential, interval)) => {
            interval.tick().await;
            *credential
        }
        None => std::future::pending().await,
    }
}

/// Events in their form on the wire.
fn render(events: &[Event]) -> Bytes {
    let mut text = Vec::with_capacity(events.len() * 256);
    for event in events {
        // Writing to memory cannot fail, and an event holds strings, numbers and times: it always serialises, on one
        // line.
        let _ = write!(text, "id: {}\nevent: {}\ndata: ", event.seq, event.kind.name());
        let _ = serde_json::to_writer(&mut text, event);
        text.extend_from_slice(b"\n\n");
    }
    Bytes::from(text)
}
