//! Checks a definition without registering it.

use axum::Json;
use serde::Serialize;
use stagegate_core::{Code, Violation};
use utoipa::ToSchema;

use crate::{
    context::{Context, Viewer},
    extract::Source,
    openapi::DefinitionDocument,
    problem::Problem,
};

/// What was found.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Validation {
    /// Whether it could be registered.
    valid: bool,
    /// Every mistake, each with its line, its path and what to write instead.
    violations: Vec<Violation>,
}

/// Check a definition
///
/// Reports every mistake of a definition at once, and changes nothing. A definition with mistakes is still a good
/// question: the answer is 200.
#[utoipa::path(
    post, path = "/v1/pipelines/validate", tag = "pipelines", operation_id = "validatePipeline",
    request_body(
        content = DefinitionDocument,
        description = "A definition: JSON, or YAML with the type `application/yaml` or `text/yaml`; or, with the type \
            `application/vnd.stagegate.bundle+json`, a definition and the files that it names: `{ definition, files }`.",
    ),
    responses((status = 200, description = "What was found.", body = Validation))
)]
pub(crate) async fn validate(context: Context<Viewer>, Source(source): Source) -> Result<Json<Validation>, Problem> {
    let violations = match context.engine.validate(&context.tenant, &source).await {
        Ok(_) => Vec::new(),
        Err(error) if error.code == Code::InvalidDefinition => error.violations,
        Err(error) => return Err(error.into()),
    };
    Ok(Json(Validation { valid: violations.is_empty(), violations }))
}
