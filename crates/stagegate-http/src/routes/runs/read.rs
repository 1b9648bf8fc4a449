//! Reads a run.

use std::collections::HashMap;

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use http::HeaderMap;
use stagegate_core::{
    Json as Payload, RunId, StageId,
    store::{RunDetail, RunRecord, StageRecord, Waiting},
};

use crate::{
    context::{Context, Viewer},
    etag::{REVALIDATE, Tag},
    extract::Path,
    problem::Problem,
    routes::{run_id, runs::not_found},
    views::{RunDetailView, RunView, StageView, needs_of},
};

/// Read a run
///
/// The run with its stages in topological order, what it took, its input and its output. A finished run has an `ETag`.
#[utoipa::path(
    get, path = "/v1/runs/{id}", tag = "runs", operation_id = "getRun",
    params(("id" = RunId, Path, description = "The run's id.")),
    responses(
        (status = 200, description = "The run.", body = RunDetailView),
        (status = 304, description = "It is finished, and `If-None-Match` names it."),
    )
)]
pub(crate) async fn read(
    context: Context<Viewer>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let id = run_id(&id)?;
    if headers.contains_key(http::header::IF_NONE_MATCH) {
        // What did not change is not read whole.
        let record = context.store().run_record(&context.tenant, id).await?.ok_or_else(|| not_found(id))?;
        if let Some(tag) = tag(&record).filter(|tag| tag.is_held_by(&headers)) {
            return Ok(tag.answer(&headers, REVALIDATE, || ().into_response()));
        }
    }
    let detail = context.store().run(&context.tenant, id).await?.ok_or_else(|| not_found(id))?;
    let tag = tag(&detail.run);
    let view = view(&context, detail).await?;
    Ok(match tag {
        Some(tag) => tag.answer(&headers, REVALIDATE, || Json(view).into_response()),
        None => Json(view).into_response(),
    })
}

/// Only an event changes a finished run (somebody retries it), and every event has a new seq; or its payloads are purged.
fn tag(run: &RunRecord) -> Option<Tag> {
    let purged = if run.purged_at.is_some() { "-purged" } else { "" };
    run.state.is_terminal().then(|| Tag::new(format_args!("{}-{}{purged}", run.state.as_str(), run.last_seq)))
}

async fn view(context: &Context<Viewer>, detail: RunDetail) -> Result<RunDetailView, Problem> {
    let RunDetail { run, input, output, stages } = detail;
    let (pipeline, _) = context.engine.pipeline(&context.tenant, &run.pipeline, Some(run.version)).await?;
    let waiting = if run.state.is_terminal() { None } else { Waiting::of_run(&stages) };
    let mut rows: HashMap<StageId, StageRecord> = stages.into_iter().map(|row| (row.id.clone(), row)).collect();
    let now = context.now();
    let stages = pipeline.stages.iter().enumerate().map(|(index, stage)| {
        let row = rows.remove(&stage.id).unwrap_or_else(|| StageRecord::pending(stage.id.clone()));
        StageView::new(run.id, row, needs_of(&pipeline, index), now, context.base())
    });
    let stages = stages.collect();
    Ok(RunDetailView {
        run: RunView::new(run, now, context.base()),
        waiting,
        stages,
        input,
        output: output.unwrap_or_else(Payload::null),
    })
}
