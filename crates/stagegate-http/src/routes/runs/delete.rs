//! Deletes a run.

use http::StatusCode;
use stagegate_core::RunId;

use crate::{
    context::{Admin, Context},
    extract::Path,
    problem::Problem,
    routes::run_id,
};

/// Delete a run
///
/// Removes a run that has ended, whole: its input and outputs, stages, attempts, checkpoints and events. What it cost
/// stays in the ledger. Cached answers stay until their time is over; invalidate them to be rid of them too. Needs the
/// role `admin`.
#[utoipa::path(
    delete, path = "/v1/runs/{id}", tag = "runs", operation_id = "deleteRun",
    params(("id" = RunId, Path, description = "The run's id.")),
    responses(
        (status = 204, description = "It is gone."),
        (status = 409, description = "It has not ended: cancel it first (SG0207)."),
    )
)]
pub(crate) async fn delete(context: Context<Admin>, Path(id): Path<String>) -> Result<StatusCode, Problem> {
    let id = run_id(&id)?;
    context.engine.delete(&context.tenant, id).await?;
    tracing::info!(run_id = %id, by = context.by.as_deref().unwrap_or("an open daemon's caller"), "run deleted");
    Ok(StatusCode::NO_CONTENT)
}
