//! What a run would cost.

use axum::Json;
use serde::Deserialize;
use serde_json::Value;
use stagegate_core::{Code, Json as Payload, PipelineName, Violation};
use stagegate_engine::Plan;
use utoipa::{
    ToSchema,
    openapi::schema::{Object, ObjectBuilder, SchemaType, Type},
};

use crate::{
    context::{Context, Viewer},
    extract,
    problem::Problem,
};

/// A run to be planned: of a registered pipeline, or of a definition that is not registered.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct PlanRequest {
    /// The pipeline's name. This, or `definition`.
    #[serde(default)]
    pipeline: Option<PipelineName>,
    /// The version; the newest one where it is left out.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 2_147_483_647)]
    version: Option<u32>,
    /// A definition: an object, or YAML in a string. This, or `pipeline`.
    #[serde(default)]
    #[schema(schema_with = definition_schema)]
    definition: Option<Value>,
    /// The input. It must fit the pipeline's schema.
    #[schema(value_type = Object)]
    input: Payload,
}

/// What is in the text or the object is checked as a definition is, with its own codes.
fn definition_schema() -> Object {
    let kinds = SchemaType::Array(vec![Type::Object, Type::String, Type::Null]);
    let description = "A definition: an object, or YAML in a string. This, or `pipeline`.";
    ObjectBuilder::new().schema_type(kinds).description(Some(description)).build()
}

/// Plan a run
///
/// Tells, without calling a model or changing anything, which stages would be cache hits, what the others would cost,
/// and the critical path.
#[utoipa::path(
    post, path = "/v1/plan", tag = "plan", operation_id = "planRun", request_body = PlanRequest,
    responses(
        (status = 200, description = "The plan.", body = Plan),
        (status = 404, description = "No such pipeline or version (SG0201, SG0202)."),
        (status = 422, description = "The definition has mistakes (SG0100), or the input does not fit (SG0200)."),
    )
)]
pub(crate) async fn plan(
    context: Context<Viewer>,
    extract::Json(body): extract::Json<PlanRequest>,
) -> Result<Json<Plan>, Problem> {
    let (pipeline, version) = match (body.pipeline, body.definition) {
        (Some(name), None) => context.engine.pipeline(&context.tenant, &name, body.version).await?,
        (None, Some(definition)) => {
            let source = definition.as_str().map_or_else(|| definition.to_string(), str::to_owned);
            (context.engine.validate(&context.tenant, &source).await?.into(), 0)
        }
        _ => {
            let violation = Violation::new(Code::WrongValue, "", "give either `pipeline` or `definition`");
            return Err(Problem::violations(Code::InvalidRequest, vec![violation]));
        }
    };
    Ok(Json(context.engine.plan(&context.tenant, pipeline, version, body.input).await?))
}
