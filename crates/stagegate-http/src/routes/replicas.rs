//! Who runs, and what waits.

use axum::Json;
use serde::Serialize;
use stagegate_core::store::{Backlog, ReplicaRecord};
use utoipa::ToSchema;

use crate::{
    context::{Context, Viewer},
    problem::Problem,
};

/// The replicas.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ReplicasView {
    /// Those that live first. `runs` and `oldest_lease_ms` count this tenant's runs alone.
    items: Vec<ReplicaRecord>,
}

/// List replicas
///
/// Every replica on this database: how long ago it was heard of, its version, whether it is draining, and how many of
/// this tenant's runs it owns. One that is not alive has its runs taken over; it is forgotten after an hour. For all
/// tenants together, `stagegate replicas` reads the database.
#[utoipa::path(
    get, path = "/v1/replicas", tag = "operations", operation_id = "listReplicas",
    responses((status = 200, description = "The replicas.", body = ReplicasView))
)]
pub(crate) async fn replicas(context: Context<Viewer>) -> Result<Json<ReplicasView>, Problem> {
    let items = context.store().replicas(Some(&context.tenant)).await?;
    Ok(Json(ReplicasView { items }))
}

/// What waits and works.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct QueueView {
    /// Runs that could be claimed now.
    queued: u64,
    /// Runs that wait for a time or for a person.
    waiting: u64,
    /// Runs that live replicas own.
    running: u64,
    /// How long the oldest claimable run has waited.
    oldest_queued_ms: u64,
    /// Past this many waiting runs a submit is answered 429.
    max_queued: u64,
    /// The same by pipeline, those with something active only.
    pipelines: Vec<Backlog>,
}

/// Read the queue
///
/// How much of this tenant waits and works now, and for how long, by pipeline.
#[utoipa::path(
    get, path = "/v1/queue", tag = "operations", operation_id = "getQueue",
    responses((status = 200, description = "The queue.", body = QueueView))
)]
pub(crate) async fn queue(context: Context<Viewer>) -> Result<Json<QueueView>, Problem> {
    let pipelines = context.store().backlog(Some(&context.tenant)).await?;
    let sum = |part: fn(&Backlog) -> u64| pipelines.iter().map(part).sum();
    Ok(Json(QueueView {
        queued: sum(|line| line.queued),
        waiting: sum(|line| line.waiting),
        running: sum(|line| line.running),
        oldest_queued_ms: pipelines.iter().map(|line| line.oldest_queued_ms).max().unwrap_or(0),
        max_queued: context.engine.limits_of(&context.tenant).max_queued,
        pipelines,
    }))
}
