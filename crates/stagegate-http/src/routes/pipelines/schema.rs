//! The JSON Schema of a definition, for editors.

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use http::HeaderMap;
use stagegate_core::pipeline::definition_schema;

use crate::{
    context::{Context, Viewer},
    etag::{REVALIDATE, Tag},
};

/// Read the definition's JSON Schema
///
/// For editors that complete and check while one types.
#[utoipa::path(
    get, path = "/v1/schemas/pipeline", tag = "pipelines", operation_id = "getPipelineSchema",
    responses(
        (status = 200, description = "A JSON Schema (2020-12).", body = Value, headers(("ETag" = String))),
        (status = 304, description = "`If-None-Match` names it."),
    )
)]
pub(crate) async fn schema(_: Context<Viewer>, headers: HeaderMap) -> Response {
    let schema = definition_schema();
    let tag = Tag::new(blake3::hash(schema.to_string().as_bytes()).to_hex());
    tag.answer(&headers, REVALIDATE, || Json(schema).into_response())
}
