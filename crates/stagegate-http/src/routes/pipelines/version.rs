//! Reads one version of a pipeline. It never changes.

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use http::HeaderMap;
use stagegate_core::{Code, PipelineName};

use crate::{
    context::{Context, Viewer},
    etag::{IMMUTABLE, Tag},
    extract::Path,
    problem::Problem,
    routes::{pipeline_name, pipelines::read::not_found, version_number},
    views::PipelineView,
};

/// Read a version
///
/// A version never changes: keep it as long as you like.
#[utoipa::path(
    get, path = "/v1/pipelines/{name}/versions/{version}", tag = "pipelines", operation_id = "getVersion",
    params(
        ("name" = PipelineName, Path, description = "The pipeline's name."),
        ("version" = u32, Path, description = "The version's number.", minimum = 1, maximum = 2_147_483_647),
    ),
    responses(
        (status = 200, description = "The version.", body = PipelineView, headers(("ETag" = String))),
        (status = 304, description = "`If-None-Match` names it."),
    )
)]
pub(crate) async fn version(
    context: Context<Viewer>,
    Path((name, version)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let (name, number) = (pipeline_name(&name)?, version_number(&version)?);
    let Some(found) = context.store().pipeline(&context.tenant, &name, Some(number)).await? else {
        // Tell which of the two is missing.
        return Err(match context.store().pipeline(&context.tenant, &name, None).await? {
            Some(newest) => {
                let detail = format!("`{name}` has the versions 1 to {}, and no {number}.", newest.version);
                Problem::new(Code::VersionNotFound, detail)
            }
            None => not_found(&name, &context.tenant),
        });
    };
    let tag = Tag::new(format_args!("{number}-{}", found.digest));
    Ok(tag.answer(&headers, IMMUTABLE, || Json(PipelineView::new(found, context.base())).into_response()))
}
