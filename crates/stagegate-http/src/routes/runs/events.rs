//! The events of a run: as a stream, or as JSON.

use axum::{
    Extension, Json,
    response::{IntoResponse, Response},
};
use http::{HeaderMap, StatusCode, header::VARY};
use serde::Serialize;
use stagegate_core::{Code, Event, RunId, Violation};
use utoipa::ToSchema;

use crate::{
    accept,
    auth::Credential,
    context::{Context, Viewer},
    cursor::Paging,
    extract::{Fields, FromQuery, Path, Query},
    problem::Problem,
    routes::{NUMBER_MAX, header_text, run_id, runs::not_found},
    serve::Peer,
    sse,
};

/// An event stream.
const STREAM: &str = "text/event-stream";
/// The forms of the answer; the first for a caller who names none.
const FORMS: [&str; 2] = ["application/json", STREAM];

/// Where to begin.
#[derive(Debug, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct EventsQuery {
    /// The `next_cursor` of the page before. The header `Last-Event-ID` stands above it.
    cursor: Option<String>,
    /// Only events after this `seq`. A `cursor` and the header `Last-Event-ID` stand above it.
    #[param(minimum = 0, maximum = 9_007_199_254_740_991_u64, default = 0, required = false)]
    after: u64,
    /// The most events in one answer; of JSON alone.
    #[param(minimum = 1, maximum = 1000, default = 100, required = false)]
    limit: u32,
}

impl FromQuery for EventsQuery {
    const NAMES: &'static [&'static str] = &["cursor", "after", "limit"];

    fn read(fields: &mut Fields) -> Self {
        let cursor = fields.parsed::<String>("cursor").filter(|cursor| !cursor.is_empty());
        let after = fields.number("after", 0, NUMBER_MAX);
        Self {
            cursor,
            after: after.unwrap_or(0),
            limit: fields.number("limit", 1, 1_000).and_then(|limit| u32::try_from(limit).ok()).unwrap_or(100),
        }
    }
}

/// Events of a run.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct EventPage {
    /// In order, without gaps.
    items: Vec<Event>,
    /// Give it back as `cursor` for the next ones; null when nothing more will come by itself.
    next_cursor: Option<String>,
    /// True when nothing more will come by itself: the run is finished, and these were the last.
    finished: bool,
    /// The same as `items`, by the name that they had before; not where you asked with a `cursor`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(deprecated)]
    events: Option<Vec<Event>>,
    /// The `seq` that `next_cursor` stands for.
    next_after: u64,
}

/// Follow a run
///
/// If `Accept` prefers `text/event-stream`, a stream: `id` is the event's `seq`, `event` its type, `data` its JSON. It ends
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
    let paging = Paging::new("events", &context.tenant, &id.to_string());
    let from_cursor = paging.read::<u64>(query.cursor.as_deref())?.filter(|seq| *seq <= NUMBER_MAX);
    let after = last_event_id(&headers)?.or(from_cursor).unwrap_or(query.after);
    let run = context.store().run_record(&context.tenant, id).await?.ok_or_else(|| not_found(id))?;
    let has_all = run.state.is_terminal() && after >= run.last_seq;
    if FORMS[accept::preferred(&headers, &FORMS)] == STREAM {
        return if has_all {
            Ok(StatusCode::NO_CONTENT.into_response())
        } else {
            let credential = credential.map(|Extension(credential)| credential);
            let peer = peer.map(|Extension(peer)| peer);
            let asked = sse::Asked { tenant: context.tenant, run: id, after, credential, peer };
            sse::respond(&context.shared, asked)
        };
    }
    let items = context.store().events(&context.tenant, id, after, query.limit).await?;
    let next_after = items.last().map_or(after, |event| event.seq);
    let finished = run.state.is_terminal() && next_after >= run.last_seq;
    let next_cursor = (!finished).then(|| paging.cursor(next_after));
    let events = query.cursor.is_none().then(|| items.clone());
    Ok(([(VARY, "accept")], Json(EventPage { items, next_cursor, finished, events, next_after })).into_response())
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
