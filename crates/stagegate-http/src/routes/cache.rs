//! The cache of model answers.

use axum::Json;
use serde::{Deserialize, Serialize};
use stagegate_core::{
    ModelRef, PipelineName, StageId,
    cache::{CacheScope, CacheUsage},
};
use utoipa::ToSchema;

use crate::{
    context::{Admin, Context, Viewer},
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
    /// How many answers that are, where it is known: of a whole tenant, in a store that counts. An answer belongs to no
    /// pipeline or stage, since each that asks the same reads it; so for those it is null.
    entries: Option<u64>,
}

/// What is cached of a tenant.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct CacheView {
    /// In the process that answers.
    local: CacheUsage,
    /// Beyond it; null where there is no shared cache.
    shared: Option<SharedCacheView>,
}

/// What is cached of a tenant, shared by every replica.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct SharedCacheView {
    /// What keeps it: `redis` or `sqlite`.
    kind: &'static str,
    /// Answers; null where that is not counted (Redis), or not to be had now.
    entries: Option<u64>,
    /// What they take; null as `entries` is.
    bytes: Option<u64>,
}

/// Read the cache's size
///
/// How many answers are kept of this tenant, and where. What was made stale as a whole is not counted.
#[utoipa::path(
    get, path = "/v1/cache", tag = "cache", operation_id = "getCache",
    responses((status = 200, description = "How much is kept.", body = CacheView))
)]
pub(crate) async fn read(context: Context<Viewer>) -> Result<Json<CacheView>, Problem> {
    let (local, shared) = context.engine.llm().cache_usage(&context.tenant).await;
    let shared = shared.map(|(kind, usage)| SharedCacheView {
        kind,
        entries: usage.map(|usage| usage.entries),
        bytes: usage.map(|usage| usage.bytes),
    });
    Ok(Json(CacheView { local, shared }))
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
    let entries = match kind {
        ScopeKind::Tenant => match context.engine.llm().cache_usage(&context.tenant).await {
            (local, None) => Some(local.entries),
            (_, Some((_, usage))) => usage.map(|usage| usage.entries),
        },
        _ => None,
    };
    context.engine.llm().invalidate(&context.tenant, &scope).await?;
    tracing::info!(%scope, by = context.by.as_deref().unwrap_or("an open daemon's caller"), "cached answers invalidated");
    Ok(Json(Invalidated { scope: kind, entries }))
}
