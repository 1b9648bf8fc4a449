//! The one extractor of every API route: who calls, under which id, and what the handler works with. A route states
//! the role that it needs in the type: [`Context<Operator>`].

use std::{marker::PhantomData, sync::Arc};

use axum::extract::FromRequestParts;
use chrono::{DateTime, Utc};
use http::request::Parts;
use stagegate_core::{Code, KeyId, Store, TenantId, store::Role};
use stagegate_engine::Engine;

use crate::{base::BasePath, layers::RequestId, problem::Problem, state::Shared};

/// Who calls. Put there by the authentication layer.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) tenant: TenantId,
    pub(crate) role: Role,
    /// None for an open daemon.
    pub(crate) key: Option<KeyId>,
}

/// The lowest role that may call a route.
pub(crate) trait Needs: Send + Sync {
    const ROLE: Role;
}

/// Reads.
pub(crate) struct Viewer;
/// Submits, cancels, retries, approves.
pub(crate) struct Operator;
/// Registers pipelines, purges the cache.
pub(crate) struct Admin;

impl Needs for Viewer {
    const ROLE: Role = Role::Viewer;
}
impl Needs for Operator {
    const ROLE: Role = Role::Operator;
}
impl Needs for Admin {
    const ROLE: Role = Role::Admin;
}

/// What a handler works with.
pub(crate) struct Context<R: Needs> {
    pub(crate) tenant: TenantId,
    /// For the record: who asked.
    pub(crate) by: Option<String>,
    pub(crate) request_id: String,
    pub(crate) engine: Engine,
    pub(crate) shared: Shared,
    role: PhantomData<R>,
}

impl<R: Needs> Context<R> {
    /// The store, for reads.
    pub(crate) fn store(&self) -> &Arc<dyn Store> {
        self.engine.store()
    }

    /// Where the API lies for its callers.
    pub(crate) fn base(&self) -> &BasePath {
        &self.shared.config.base_path
    }

    /// The wall clock.
    pub(crate) fn now(&self) -> DateTime<Utc> {
        self.shared.clock.now()
    }
}

impl<R: Needs> FromRequestParts<Shared> for Context<R> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, shared: &Shared) -> Result<Self, Problem> {
        let identity = parts.extensions.get::<Identity>().cloned();
        // A route outside of the authentication layer is a defect, and must not be open because of it.
        let identity = identity.ok_or_else(|| Problem::new(Code::Internal, "the route is not authenticated"))?;
        if identity.role < R::ROLE {
            let (has, needs) = (identity.role.as_str(), R::ROLE.as_str());
            return Err(Problem::new(Code::Forbidden, format!("This needs the role `{needs}`; the key has `{has}`.")));
        }
        let request_id = parts.extensions.get::<RequestId>().map(|id| id.0.to_string()).unwrap_or_default();
        Ok(Self {
            by: identity.key.map(|key| format!("key {key}")),
            tenant: identity.tenant,
            request_id,
            engine: shared.engine.clone(),
            shared: shared.clone(),
            role: PhantomData,
        })
    }
}
