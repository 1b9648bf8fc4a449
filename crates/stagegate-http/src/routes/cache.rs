//! The cache of model answers.

use axum::Json;
use serde::{Deserialize, Serialize};
use stagegate_core::{Code, ModelRef, PipelineName, StageId, Violation, cache::CacheScope};
use utoipa::ToSchema;

use crate::{
    context::{Admin, Context},
    extract,
    problem::Problem,
};

/// What is made stale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ScopeKind {
    /// Everything of the tenant.
    Tenant,
    /// What a pipeline reads; needs `pipeline`.
    Pipeline,
    /// What one version of it reads; needs `pipeline` and `version`.
    Version,
    /// What one stage of it reads; needs `pipeline` and `stage`.
    Stage,
    /// What a model answered; needs `model`.
    Model,
}

/// Which answers are made stale.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct InvalidateRequest {
    /// `tenant`, `pipeline` (with `pipeline`), `version` (with `pipeline` and `version`), `stage` (with `pipeline` and
    /// `stage`) or `model` (with `model`).
    scope: ScopeKind,
    /// The pipeline's name.
    #[serde(default)]
    pipeline: Option<PipelineName>,
    /// The version.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 2_147_483_647)]
    version: Option<u32>,
    /// The stage's id.
    #[serde(default)]
    stage: Option<StageId>,
    /// The model: `openai/gpt-5-mini`.
    #[serde(default)]
    model: Option<ModelRef>,
}

/// What was made stale.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Invalidated {
    /// Of which scope.
    scope: ScopeKind,
}

/// Invalidate cached answers
///
/// Makes every answer of a scope stale at once, in constant time, on every replica. Needs the role `admin`.
#[utoipa::path(
    post, path = "/v1/cache/invalidate", tag = "cache", operation_id = "invalidateCache",
    request_body = InvalidateRequest,
    responses((status = 200, description = "They are stale.", body = Invalidated))
)]
pub(crate) async fn invalidate(
    context: Context<Admin>,
    extract::Json(body): extract::Json<InvalidateRequest>,
) -> Result<Json<Invalidated>, Problem> {
    let kind = body.scope;
    let scope = scope(body).map_err(|mistakes| Problem::violations(Code::InvalidRequest, mistakes))?;
    context.engine.llm().invalidate(&context.tenant, &scope).await?;
    tracing::info!(%scope, by = context.by, "cached answers invalidated");
    Ok(Json(Invalidated { scope: kind }))
}

/// The scope, or every key that it lacks and every key that it has no use for. Too wide a purge is dear, so that
/// nothing is ignored here.
fn scope(body: InvalidateRequest) -> Result<CacheScope, Vec<Violation>> {
    let InvalidateRequest { scope, pipeline, version, stage, model } = body;
    let needed: &[&str] = match scope {
        ScopeKind::Tenant => &[],
        ScopeKind::Pipeline => &["pipeline"],
        ScopeKind::Version => &["pipeline", "version"],
        ScopeKind::Stage => &["pipeline", "stage"],
        ScopeKind::Model => &["model"],
    };
    let given = [
        ("pipeline", pipeline.is_some()),
        ("version", version.is_some()),
        ("stage", stage.is_some()),
        ("model", model.is_some()),
    ];
    let mistakes = given.into_iter().filter_map(|(key, is_given)| match (needed.contains(&key), is_given) {
        (true, false) => Some(Violation::new(Code::MissingKey, key, format!("this scope needs `{key}`"))),
        (false, true) => Some(Violation::new(Code::WrongValue, key, format!("this scope has no use for `{key}`"))),
        _ => None,
    });
    let mistakes: Vec<Violation> = mistakes.collect();
    match (scope, pipeline, version, stage, model) {
        _ if !mistakes.is_empty() => Err(mistakes),
        (ScopeKind::Tenant, ..) => Ok(CacheScope::Tenant),
        (ScopeKind::Pipeline, Some(pipeline), ..) => Ok(CacheScope::Pipeline(pipeline)),
        (ScopeKind::Version, Some(pipeline), Some(version), ..) => Ok(CacheScope::Version(pipeline, version)),
        (ScopeKind::Stage, Some(pipeline), _, Some(stage), _) => Ok(CacheScope::Stage(pipeline, stage)),
        (ScopeKind::Model, .., Some(model)) => Ok(CacheScope::Model(model)),
        _ => Err(mistakes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_needs_exactly_its_own_keys() {
        let read = |text: &str| scope(serde_json::from_str(text).expect("valid"));
        assert_eq!(read(r#"{"scope":"tenant"}"#), Ok(CacheScope::Tenant));
        let stage = CacheScope::Stage(PipelineName::new("p").expect("valid"), StageId::new("s").expect("valid"));
        assert_eq!(read(r#"{"scope":"stage","pipeline":"p","stage":"s"}"#), Ok(stage));
        let mistakes = read(r#"{"scope":"stage","version":1}"#).expect_err("three mistakes");
        assert_eq!(mistakes.iter().map(|m| m.path.as_str()).collect::<Vec<_>>(), ["pipeline", "version", "stage"]);
        assert!(read(r#"{"scope":"tenant","pipeline":"p"}"#).is_err());
    }
}
