//! Reads a stage of a run.

use axum::Json;
use stagegate_core::{Code, RunId, StageId, store::StageRecord};

use crate::{
    context::{Context, Viewer},
    extract::Path,
    problem::Problem,
    routes::{run_id, runs::not_found, stage_id},
    views::{StageDetailView, StageView, needs_of},
};

/// Read a stage
///
/// A stage of a run with its newest attempts (at most 200, each with its assessments and its model calls) and its
/// checkpoint. A stage that waits for an outage to pass may have had more: `attempts_total` tells.
#[utoipa::path(
    get, path = "/v1/runs/{id}/stages/{stage}", tag = "stages", operation_id = "getStage",
    params(("id" = RunId, Path, description = "The run's id."), ("stage" = StageId, Path, description = "The stage's id.")),
    responses((status = 200, description = "The stage.", body = StageDetailView))
)]
pub(crate) async fn stage(
    context: Context<Viewer>,
    Path((id, stage)): Path<(String, String)>,
) -> Result<Json<StageDetailView>, Problem> {
    let (id, stage) = (run_id(&id)?, stage_id(&stage)?);
    let run = context.store().run_record(&context.tenant, id).await?.ok_or_else(|| not_found(id))?;
    let (pipeline, _) = context.engine.pipeline(&context.tenant, &run.pipeline, Some(run.version)).await?;
    let index = pipeline.stage_index(stage.as_str()).ok_or_else(|| {
        let ids: Vec<&str> = pipeline.stages.iter().map(|stage| stage.id.as_str()).collect();
        let detail = format!("The run's pipeline has no stage `{stage}`; it has {}.", ids.join(", "));
        Problem::new(Code::StageNotFound, detail)
    })?;
    let found = context.store().stage(&context.tenant, id, &stage).await?;
    let (row, checkpoint, attempts) = match found {
        Some(detail) => (detail.stage, detail.checkpoint, detail.attempts),
        None => (StageRecord::pending(stage), None, Vec::new()),
    };
    let mut attempts = attempts;
    if run.purged_at.is_some() {
        // A replica of the release before, which purges too, does not know what may quote.
        attempts.iter_mut().for_each(stagegate_core::Attempt::purge);
    }
    // They are counted from 1, without gaps.
    let attempts_total = attempts.last().map_or(0, |attempt| attempt.number);
    let stage = StageView::new(id, row, needs_of(&pipeline, index), context.now());
    Ok(Json(StageDetailView { stage, checkpoint, attempts, attempts_total }))
}
