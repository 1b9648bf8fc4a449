//! The events of a run: as a stream, or as JSON.

use axum::{
    Extension, Json,
    response::{IntoResponse, Response},
};
use http::{HeaderMap, StatusCode, header::ACCEPT};
use serde::Serialize;
use stagegate_core::{Code, Event, RunId, Violation};
use utoipa::ToSchema;

use crate::{
    auth::Credential,
    context::{Context, Viewer},
    extract::{Fields, FromQuery, Path, Query},
    problem::Problem,
    routes::{NUMBER_MAX, header_text, run_id, runs::not_found},
    serve::Peer,
    sse,
};

/// Where to begin.
#[derive(Debug, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct EventsQuery {
    /// Only events after this `seq`. The header `Last-Event-ID` stands above it.
    #[param(minimum = 0, maximum = 9_007_199_254_740_991_u64, default = 0, required = false)]
    after: u64,
    /// The most events in one answer; of JSON alone.
    #[param(minimum = 1, maximum = 1000, default = 100, required = false)]
    limit: u32,
}

impl FromQuery for EventsQuery {
    const NAMES: &'static [&'static str] = &["after", "limit"];

    fn read(fields: &mut Fields) -> Self {
        Self {
            after: fields.number("after", 0, NUMBER_MAX).unwrap_or(0),
            limit: fields.number("limit", 1, 1_000).and_then(|limit| u32::try_from(limit).ok()).unwrap_or(100),
        }
    }
}

/// Events of a run.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct EventPage {
    /// In order, without gaps.
    events: Vec<Event>,
    /// Ask for the next ones with `after=` this.
    next_after: u64,
    /// True when nothing more will come by itself: the run is finished, and these were the last.
    finished: bool,
}

/// Follow a run
///
/// With `Accept: text/event-stream`, a stream: `id` is the event's `seq`, `event` its type, `data` its JSON. It ends
/// after `run.finished`; reconnect with `Last-Event-ID`, to any replica, and nothing is missed and nothing comes twice.
/// A finished run that was read to its end is answered with 204, which tells an `EventSource` to stop. Otherwise the
/// events come as JSON.
#[utoipa::path(
    get, path = "/v1/runs/{id}/events", tag = "runs", operation_id = "getEvents",
    params(
        ("id" = RunId, Path, description = "The run's id."),
        EventsQuery,
        ("Last-Event-ID" = Option<u64>, Header, description = "The `seq` of the last event that you have.",
            minimum = 0, maximum = 9_007_199_254_740_991_u64),
    ),
    responses(
        (status = 200, description = "The events.",
            content((EventPage = "application/json"), (String = "text/event-stream"))),
        (status = 204, description = "The run is finished, and you have its last event (streams alone)."),
    )
)]
pub(crate) async fn events(
    context: Context<Viewer>,
    Path(id): Path<String>,
    Query(query): Query<EventsQuery>,
    credential: Option<Extension<Credential>>,
    peer: Option<Extension<Peer>>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let id = run_id(&id)?;
    let after = last_event_id(&headers)?.unwrap_or(query.after);
    let run = context.store().run_record(&context.tenant, id).await?.ok_or_else(|| not_found(id))?;
    let has_all = run.state.is_terminal() && after >= run.last_seq;
    if wants_stream(&headers) {
        return if has_all {
            Ok(StatusCode::NO_CONTENT.into_response())
        } else {
            let credential = credential.map(|Extension(credential)| credential);
            let peer = peer.map(|Extension(peer)| peer);
            let asked = sse::Asked { tenant: context.tenant, run: id, after, credential, peer };
            sse::respond(&context.shared, asked)
        };
    }
    let events = context.store().events(&context.tenant, id, after, query.limit).await?;
    let next_after = events.last().map_or(after, |event| event.seq);
    let finished = run.state.is_terminal() && next_after >= run.last_seq;
    Ok(Json(EventPage { events, next_after, finished }).into_response())
}

fn wants_stream(headers: &HeaderMap) -> bool {
    headers
        .get_all(ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|accept| accept.split(',').any(|kind| kind.trim().split(';').next() == Some("text/event-stream")))
}

fn last_event_id(headers: &HeaderMap) -> Result<Option<u64>, Problem> {
    let Some(text) = header_text(headers, "last-event-id")? else { return Ok(None) };
    match text.parse::<u64>() {
        Ok(seq) if seq <= NUMBER_MAX => Ok(Some(seq)),
        // An `EventSource` that has had no event yet sends nothing; some clients send an empty one.
        _ if text.is_empty() => Ok(None),
        _ => {
            let message = "write the `id` of an event of this run: a whole number";
            let violation = Violation::new(Code::WrongValue, "Last-Event-ID", message);
            Err(Problem::violations(Code::InvalidRequest, vec![violation]))
        }
    }
}
