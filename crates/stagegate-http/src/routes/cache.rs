//! The cache of model answers.

use axum::Json;
use serde::{Deserialize, Serialize};
use stagegate_core::{ModelRef, PipelineName, StageId, cache::CacheScope};
use utoipa::ToSchema;

use crate::{
    context::{Admin, Context},
    extract,
    problem::Problem,
};

/// Which answers are made stale; each scope takes exactly its own keys. Too wide a purge is dear, so that nothing is
/// ignored here.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(tag = "scope", rename_all = "lowercase", deny_unknown_fields)]
pub(crate) enum InvalidateRequest {
    /// Everything of the tenant.
    Tenant {},
    /// What a pipeline reads.
    Pipeline {
        /// The pipeline's name.
        pipeline: PipelineName,
    },
    /// What one version of it reads.
    Version {
        /// The pipeline's name.
        pipeline: PipelineName,
        /// The version.
        #[schema(minimum = 1, maximum = 2_147_483_647)]
        version: u32,
    },
    /// What one stage of it reads.
    Stage {
        /// The pipeline's name.
        pipeline: PipelineName,
        /// The stage's id.
        stage: StageId,
    },
    /// What a model answered.
    Model {
        /// The model: `openai/gpt-5-mini`.
        model: ModelRef,
    },
}

impl InvalidateRequest {
    fn scope(self) -> (CacheScope, ScopeKind) {
        match self {
            Self::Tenant {} => (CacheScope::Tenant, ScopeKind::Tenant),
            Self::Pipeline { pipeline } => (CacheScope::Pipeline(pipeline), ScopeKind::Pipeline),
            Self::Version { pipeline, version } => (CacheScope::Version(pipeline, version), ScopeKind::Version),
            Self::Stage { pipeline, stage } => (CacheScope::Stage(pipeline, stage), ScopeKind::Stage),
            Self::Model { model } => (CacheScope::Model(model), ScopeKind::Model),
        }
    }
}

/// What was made stale.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ScopeKind {
    Tenant,
    Pipeline,
    Version,
    Stage,
    Model,
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
    let (scope, kind) = body.scope();
    context.engine.llm().invalidate(&context.tenant, &scope).await?;
    tracing::info!(%scope, by = context.by.as_deref().unwrap_or("an open daemon's caller"), "cached answers invalidated");
    Ok(Json(Invalidated { scope: kind }))
}
