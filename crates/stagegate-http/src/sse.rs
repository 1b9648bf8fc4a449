//! Event streams: owns their form on the wire. An event's `id` is its seq, so that a client which reconnects with
//! `Last-Event-ID`, to any replica, misses nothing and sees nothing twice.

use std::{convert::Infallible, future::ready, sync::Arc, time::Duration};

use axum::response::{
    IntoResponse, Response,
    sse::{Event as Frame, KeepAlive, Sse},
};
use futures::{Stream, StreamExt as _, stream};
use http::HeaderValue;
use stagegate_core::{Code, Error, Event, RunId, TenantId};
use stagegate_telemetry::Metrics;
use tokio::sync::OwnedSemaphorePermit;

use crate::{problem::Problem, state::Shared};

/// What a client is told to wait before it reconnects.
const RECONNECT_AFTER: Duration = Duration::from_secs(1);

/// One open stream: a permit and a gauge, given back when it is dropped.
struct Slot {
    metrics: Metrics,
    _permit: OwnedSemaphorePermit,
}

impl Slot {
    fn take(shared: &Shared) -> Result<Self, Problem> {
        let Ok(permit) = Arc::clone(&shared.streams).try_acquire_owned() else {
            let error =
                Error::new(Code::Overloaded, "Too many event streams are open; poll the events as JSON instead.");
            return Err(error.retry_after(RECONNECT_AFTER).into());
        };
        shared.metrics.sse_streams.inc();
        Ok(Self { metrics: shared.metrics.clone(), _permit: permit })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.metrics.sse_streams.dec();
    }
}

/// The stream of a run's events after a seq. It ends after `run.finished`, and when the replica shuts down.
pub(crate) fn respond(shared: &Shared, tenant: TenantId, run: RunId, after: u64) -> Result<Response, Problem> {
    let slot = Slot::take(shared)?;
    let batches = shared.engine.follow(tenant, run, after);
    let frames = frames(batches, run)
        .take_until(shared.shutdown.clone().cancelled_owned())
        .chain(stream::once(ready(Frame::default().comment("end of stream"))))
        .map(move |frame| {
            let _held_until_the_stream_is_dropped = &slot;
            Ok::<_, Infallible>(frame)
        });
    let keep_alive = KeepAlive::new().interval(shared.config.sse_keep_alive.0).text("keep-alive");
    let mut response = Sse::new(frames).keep_alive(keep_alive).into_response();
    // Proxies that buffer would hold events back.
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

fn frames(
    batches: impl Stream<Item = Result<Vec<Event>, Error>> + Send + 'static,
    run: RunId,
) -> impl Stream<Item = Frame> + Send + 'static {
    let opening = Frame::default().retry(RECONNECT_AFTER);
    let events = batches
        .scan((), move |(), batch| {
            // A broken stream just ends: the client reconnects and goes on after the last event that it has.
            ready(batch.inspect_err(|error| tracing::warn!(%error, run_id = %run, "an event stream broke off")).ok())
        })
        .flat_map(|batch| stream::iter(batch.into_iter().map(|event| frame(&event))));
    stream::once(ready(opening)).chain(events)
}

fn frame(event: &Event) -> Frame {
    let frame = Frame::default().id(event.seq.to_string()).event(event.kind.name());
    // An event holds strings, numbers and times: it always serialises.
    let data = serde_json::to_string(event).unwrap_or_default();
    frame.data(data)
}
