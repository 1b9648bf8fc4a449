//! Bodies: owns how the server receives a request's body before it handles the request, and the room that an answer's
//! body holds until it is sent.
//!
//! A request takes its slot when its whole body has arrived, so that bodies that do not come hold no slot. Bytes bound the
//! bodies: from its first byte until its request is answered, a body holds room for its whole size, which tenants share
//! fairly. The server does not read a body that does not fit until there is room.
//!
//! An answer that is not small holds room until it is sent. It waits for room while it keeps its turn to read the store, so
//! that a client that does not read its answers cannot make the server read on.

use axum::{
    body::{Body, BodyDataStream},
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use http::header::CONTENT_LENGTH;
use hyper::body::Body as _;
use stagegate_core::{Code, Error, TenantId};
use tokio::time::{Duration, timeout};

use crate::{context::Identity, fair::Permit, problem::Problem, state::Shared};

/// How much of an over-large body is still read, in multiples of the limit: a client that is cut off while it sends
/// often does not see the answer that says why.
const DRAIN_FACTOR: usize = 4;
/// Answers up to this size need no room: most are smaller.
const SMALL_ANSWER_BYTES: usize = 64 * 1024;
/// How long an over-large body is still read.
const DRAIN_TIME: Duration = Duration::from_secs(2);

/// Layer 10: receives the whole body.
pub(crate) async fn receive(State(shared): State<Shared>, request: Request, next: Next) -> Result<Response, Problem> {
    if request.body().is_end_stream() {
        return Ok(next.run(request).await);
    }
    let tenant = tenant_of(&request)?;
    let announced = request.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    let (head, body) = request.into_parts();
    let (bytes, _room) = read(&shared, &tenant, body, announced).await?;
    Ok(next.run(Request::from_parts(head, Body::from(bytes))).await)
}

/// The answer, with room for its body until that is sent or given up.
pub(crate) async fn hold_room(shared: &Shared, tenant: &TenantId, response: Response) -> Response {
    let size = usize::try_from(response.body().size_hint().lower()).unwrap_or(usize::MAX);
    if size <= SMALL_ANSWER_BYTES {
        return response;
    }
    // As many may wait as there are requests, so that no request is refused here.
    let Ok(room) = shared.answers.wait_for(tenant, size).await else { return response };
    let (head, body) = response.into_parts();
    match axum::body::to_bytes(body, usize::MAX).await {
        Ok(bytes) => Response::from_parts(head, Body::from(Bytes::from_owner(Held { bytes, _room: room }))),
        Err(error) => Problem::new(Code::Internal, format!("the answer could not be made: {error}")).into_response(),
    }
}

/// Bytes that hold room for themselves until they are sent.
struct Held {
    bytes: Bytes,
    _room: Permit,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// The tenant of a request.
pub(crate) fn tenant_of(request: &Request) -> Result<TenantId, Problem> {
    let identity = request.extensions().get::<Identity>();
    // A route outside of the authentication layer is a defect, and must not be open because of it.
    let identity = identity.ok_or_else(|| Problem::new(Code::Internal, "the route is not authenticated"))?;
    Ok(identity.tenant.clone())
}

async fn read(
    shared: &Shared,
    tenant: &TenantId,
    body: Body,
    announced: Option<u64>,
) -> Result<(Bytes, Option<Permit>), Problem> {
    let max_bytes = shared.config.body_max_bytes;
    let too_large = || Problem::new(Code::BodyTooLarge, format!("The body is over the limit of {max_bytes} bytes."));
    let mut stream = body.into_data_stream();
    if announced.is_some_and(|length| length > max_bytes as u64) {
        drain(&mut stream, max_bytes).await;
        return Err(too_large());
    }
    let mut room = None;
    let mut bytes = BytesMut::new();
    while let Some(chunk) = stream.next().await {
        let broken = |_| Problem::new(Code::InvalidRequest, "The body ended before it was complete.");
        let chunk = chunk.map_err(broken)?;
        if room.is_none() {
            let size = announced.and_then(|length| usize::try_from(length).ok()).unwrap_or(max_bytes);
            room = Some(room_for(shared, tenant, size).await?);
            bytes.reserve(size); // It does not grow by copying, which would take twice the room.
        }
        if bytes.len() + chunk.len() > max_bytes {
            drop(bytes);
            drain(&mut stream, max_bytes).await;
            return Err(too_large());
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok((bytes.freeze(), room))
}

async fn room_for(shared: &Shared, tenant: &TenantId, size: usize) -> Result<Permit, Problem> {
    shared.bodies.wait_for(tenant, size).await.map_err(|_| {
        let error = Error::new(Code::Overloaded, "Too many bodies are being sent; try again in a second.");
        error.retry_after(Duration::from_secs(1)).into()
    })
}

/// Reads and drops the rest of a body, within limits.
async fn drain(stream: &mut BodyDataStream, max_bytes: usize) {
    let _ = timeout(DRAIN_TIME, async {
        let mut left = max_bytes.saturating_mul(DRAIN_FACTOR);
        while let Some(Ok(chunk)) = stream.next().await {
            left = left.saturating_sub(chunk.len());
            if left == 0 {
                break;
            }
        }
    })
    .await;
}
