//! Reads a stage of a run.

use axum::Json;
use stagegate_core::{Code, RunId, StageId, Verdict, store::StageRecord};

use crate::{
    context::{Context, Viewer},
    extract::Path,
    problem::Problem,
    routes::{run_id, runs::not_found, stage_id},
    views::{DecisionView, StageDetailView, StageView, needs_of},
};

/// Events that are read at once to find decisions, and how often.
const EVENTS_AT_ONCE: u32 = 1_000;
/// See [`EVENTS_AT_ONCE`]: a run that waited out outages for days can have many.
const EVENT_PAGES_MAX: usize = 20;

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
    let was_held = attempts.iter().any(|attempt| attempt.verdict == Verdict::Held);
    let decisions = if was_held { decisions(&context, id, &row.id).await? } else { Vec::new() };
    let stage = StageView::new(id, row, needs_of(&pipeline, index), context.now(), context.base());
    Ok(Json(StageDetailView { stage, checkpoint, attempts, attempts_total, decisions }))
}

/// What people decided about held outputs of a stage, as the run's events tell it.
async fn decisions(context: &Context<Viewer>, run: RunId, of: &StageId) -> Result<Vec<DecisionView>, Problem> {
    let (mut decisions, mut after) = (Vec::new(), 0);
    for _ in 0..EVENT_PAGES_MAX {
        let events = context.store().events(&context.tenant, run, after, EVENTS_AT_ONCE).await?;
        let is_last = events.len() < EVENTS_AT_ONCE as usize;
        after = events.last().map_or(after, |event| event.seq);
        decisions
            .extend(events.iter().filter(|event| event.kind.stage() == Some(of)).filter_map(DecisionView::of_event));
        if is_last {
            break;
        }
    }
    Ok(decisions)
}
