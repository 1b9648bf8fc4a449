//! Registers a version.

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use http::{StatusCode, header::LOCATION};

use crate::{
    context::{Admin, Context},
    extract::Source,
    openapi::DefinitionDocument,
    problem::Problem,
    views::{PipelineView, pipeline_version_path},
};

/// Register a definition
///
/// Registers a new version of the pipeline that the definition names. The same content gives the version that is
/// there. Needs the role `admin`.
#[utoipa::path(
    post, path = "/v1/pipelines", tag = "pipelines", operation_id = "registerPipeline",
    request_body(
        content = DefinitionDocument,
        description = "A definition: JSON, or YAML with the type `application/yaml` or `text/yaml`; or, with the type \
            `application/vnd.stagegate.bundle+json`, a definition and the files that it names: `{ definition, files }`.",
    ),
    responses(
        (status = 201, description = "A new version.", body = PipelineView, headers(("Location" = String))),
        (status = 200, description = "The version with this content, which was there.", body = PipelineView),
        (status = 403, description = "The tenant may have no more pipelines or versions (SG0214), or the key's role is too low (SG0011)."),
        (status = 422, description = "The definition has mistakes (SG0100); `violations` lists every one."),
    )
)]
pub(crate) async fn register(context: Context<Admin>, Source(source): Source) -> Result<Response, Problem> {
    let (version, is_new) = context.engine.register(&context.tenant, &source).await?;
    let location = pipeline_version_path(context.base(), &version.name, version.version);
    let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, [(LOCATION, location)], Json(PipelineView::new(version, context.base()))).into_response())
}
