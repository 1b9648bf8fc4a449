//! What a person asks of a run: cancel, retry, approve, reject. Each is durable when it is answered; the replica that
//! owns the run obeys within a heartbeat.

use axum::{Json, http::StatusCode};
use serde::Deserialize;
use stagegate_core::{Code, Json as Payload, RunId, StageId, Violation};
use stagegate_engine::{Action, Approval};
use utoipa::ToSchema;

use crate::{
    context::{Context, Operator},
    extract,
    extract::Path,
    problem::Problem,
    routes::{run_id, stage_id},
    views::RunView,
};

type Accepted = Result<(StatusCode, Json<RunView>), Problem>;

async fn act(context: Context<Operator>, id: RunId, action: Action, attempt: Option<u32>) -> Accepted {
    let asked = match &action {
        Action::Cancel => "cancel",
        Action::Retry => "retry",
        Action::Approve(_) | Action::ApproveWith(_) => "approve",
        Action::Reject(..) => "reject",
    };
    tracing::info!(run_id = %id, asked, by = context.by.as_deref().unwrap_or("an open daemon's caller"), "an action on a run was asked for");
    let run = context.engine.act_on(&context.tenant, id, action, attempt, context.by.clone()).await?;
    Ok((StatusCode::ACCEPTED, Json(RunView::new(run, context.now(), context.base()))))
}

/// Cancel a run
///
/// No model call starts later than one heartbeat after this. Needs the role `operator`.
#[utoipa::path(
    post, path = "/v1/runs/{id}/cancel", tag = "runs", operation_id = "cancelRun",
    params(("id" = RunId, Path, description = "The run's id.")),
    responses(
        (status = 202, description = "It will be cancelled.", body = RunView),
        (status = 409, description = "It is finished already (SG0207)."),
    )
)]
pub(crate) async fn cancel(context: Context<Operator>, Path(id): Path<String>) -> Accepted {
    let id = run_id(&id)?;
    act(context, id, Action::Cancel, None).await
}

/// Retry a run
///
/// Starts over what failed, with a new deadline; checkpoints are kept. Needs the role `operator`.
#[utoipa::path(
    post, path = "/v1/runs/{id}/retry", tag = "runs", operation_id = "retryRun",
    params(("id" = RunId, Path, description = "The run's id.")),
    responses(
        (status = 202, description = "It will go on.", body = RunView),
        (status = 409, description = "It did not fail, was not cancelled and did not expire (SG0207)."),
    )
)]
pub(crate) async fn retry(context: Context<Operator>, Path(id): Path<String>) -> Accepted {
    let id = run_id(&id)?;
    act(context, id, Action::Retry, None).await
}

/// Which held output is taken, and what the person says to it.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ApproveRequest {
    /// The attempt that is meant; refused where another one is held. Left out: whichever is held.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 2_147_483_647)]
    attempt: Option<u32>,
    /// Why, in your words. It stands in the run's events: put no secret into it.
    #[serde(default)]
    #[schema(min_length = 1, max_length = 2000, pattern = "^[^\\u0000]*$")]
    comment: Option<String>,
    /// Take this in place of the held output: text for a stage whose output is text, else JSON. It must have the stage's
    /// format, fit its schema and pass the gate's deterministic checks; the judge is not asked. Left out (or null): the held
    /// output as it is.
    #[serde(default)]
    #[schema(value_type = Option<Value>)]
    output: Option<Payload>,
}

/// Approve a held output
///
/// The output becomes the stage's checkpoint, and the run goes on. With `output`, the one that you edited does; the held one
/// stays with its attempt. The body may be left out. Needs the role `operator`.
#[utoipa::path(
    post, path = "/v1/runs/{id}/stages/{stage}/approve", tag = "stages", operation_id = "approveStage",
    params(("id" = RunId, Path, description = "The run's id."), ("stage" = StageId, Path, description = "The stage's id.")),
    request_body(content = ApproveRequest, description = "May be left out."),
    responses(
        (status = 202, description = "It will go on.", body = RunView),
        (status = 409, description = "The stage is not held, or another attempt of it is (SG0207); or a replica of an older \
            release would not understand the comment or the output (SG0213)."),
        (status = 422, description = "The edited output does not fit the stage (SG0215)."),
    )
)]
pub(crate) async fn approve(
    context: Context<Operator>,
    Path((id, stage)): Path<(String, String)>,
    extract::JsonOrNothing(body): extract::JsonOrNothing<ApproveRequest>,
) -> Accepted {
    let (id, stage) = (run_id(&id)?, stage_id(&stage)?);
    let ApproveRequest { attempt, comment, output } = body.unwrap_or_default();
    let action = match (comment, output) {
        (None, None) => Action::Approve(stage),
        (comment, output) => Action::ApproveWith(Box::new(Approval { stage, comment, output })),
    };
    act(context, id, action, attempt).await
}

/// Why a held output is not taken: `reason`, or `comment`, which means the same.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct RejectRequest {
    /// Why, for the record and for whoever mends it. It stands in the run's events: put no secret into it. This, or
    /// `comment`.
    #[serde(default)]
    #[schema(min_length = 1, max_length = 2000, pattern = "^[^\\u0000]*$")]
    reason: Option<String>,
    /// The same, by the name that it has in an approval. This, or `reason`.
    #[serde(default)]
    #[schema(min_length = 1, max_length = 2000, pattern = "^[^\\u0000]*$")]
    comment: Option<String>,
    /// The attempt that is meant; refused where another one is held. Left out: whichever is held.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 2_147_483_647)]
    attempt: Option<u32>,
}

/// Reject a held output
///
/// The stage and its run fail with the reason; a retry starts the stage over. Needs the role `operator`.
#[utoipa::path(
    post, path = "/v1/runs/{id}/stages/{stage}/reject", tag = "stages", operation_id = "rejectStage",
    params(("id" = RunId, Path, description = "The run's id."), ("stage" = StageId, Path, description = "The stage's id.")),
    request_body = RejectRequest,
    responses(
        (status = 202, description = "It will fail.", body = RunView),
        (status = 409, description = "The stage is not held, or another attempt of it is (SG0207)."),
    )
)]
pub(crate) async fn reject(
    context: Context<Operator>,
    Path((id, stage)): Path<(String, String)>,
    extract::Json(body): extract::Json<RejectRequest>,
) -> Accepted {
    let (id, stage) = (run_id(&id)?, stage_id(&stage)?);
    let reason = match (body.reason, body.comment) {
        (Some(reason), None) | (None, Some(reason)) => reason,
        (None, None) => {
            let violation = Violation::new(Code::MissingKey, "reason", "say why: `reason` is required");
            return Err(Problem::violations(Code::InvalidRequest, vec![violation]));
        }
        (Some(_), Some(_)) => {
            let message = "`comment` means the same as `reason`: give one of them";
            let violation = Violation::new(Code::WrongValue, "comment", message);
            return Err(Problem::violations(Code::InvalidRequest, vec![violation]));
        }
    };
    act(context, id, Action::Reject(stage, reason), body.attempt).await
}
