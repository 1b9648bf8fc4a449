//! Reads the newest version of a pipeline.

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use http::HeaderMap;
use stagegate_core::{Code, PipelineName, TenantId};

use crate::{
    context::{Context, Viewer},
    etag::{REVALIDATE, Tag},
    extract::Path,
    problem::Problem,
    routes::pipeline_name,
    views::PipelineView,
};

/// Read a pipeline
///
/// Its newest version.
#[utoipa::path(
    get, path = "/v1/pipelines/{name}", tag = "pipelines", operation_id = "getPipeline",
    params(("name" = PipelineName, Path, description = "The pipeline's name.")),
    responses(
        (status = 200, description = "The newest version.", body = PipelineView, headers(("ETag" = String))),
        (status = 304, description = "It is the one that `If-None-Match` names."),
    )
)]
pub(crate) async fn read(
    context: Context<Viewer>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let name = pipeline_name(&name)?;
    let found = context.store().pipeline(&context.tenant, &name, None).await?;
    let version = found.ok_or_else(|| not_found(&name, &context.tenant))?;
    let tag = Tag::new(format_args!("{}-{}", version.version, version.digest));
    Ok(tag.answer(&headers, REVALIDATE, || Json(PipelineView::new(version, context.base())).into_response()))
}

/// Says that there is no such pipeline, and how to see which there are.
pub(crate) fn not_found(name: &PipelineName, tenant: &TenantId) -> Problem {
    let detail =
        format!("The tenant `{tenant}` has no pipeline `{name}`; `GET /v1/pipelines` lists those that it has.");
    Problem::new(Code::PipelineNotFound, detail)
}
