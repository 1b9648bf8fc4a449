//! Every route, in one flat list, and the layers around them.
//!
//! The layers, outermost first:
//!
//! 1. **Headers**: nosniff, no frames, no referrer, no-store unless a route said otherwise, a closed CSP; on every
//!    answer, so it stands outside of all that may answer.
//! 2. **Request id**: the caller's `x-request-id` where it is sane, else a new one; always answered.
//! 3. **Observation**: a span (method, route template, request id, trace id of `traceparent`, tenant once known), one
//!    log line and the metrics of each request; whatever problem comes out is written, logged and counted here, once.
//! 4. **Catch panic**: a panic is a problem like any other (SG0008); it stands inside of 2 and 3 so that it has its id.
//! 5. **Compression**: gzip; never of event streams.
//! 6. **Guard of the listener**: one `Host`, and nothing but probes over a connection beyond the limit (SG0013).
//! 7. **Guard of an open daemon**: `Host` and `Origin` must be of this machine or allowed; probes answer any.
//!
//! And around the API alone, so that probes answer under any load:
//!
//! 8. **Time**: until the head of the answer (SG0006).
//! 9. **Authentication**: who calls (SG0010), and who failed to say so too often (SG0014). The role is checked by the
//!    route's own [`crate::context::Context`].
//! 10. **Body**: receives it, within its limits (SG0003) and those of all bodies together.
//! 11. **Load**: requests under way at once, and of these the ones that ask the store, by tenant (SG0007). After the body,
//!     so that one that does not come takes no slot.
//!
//! Inside, a route's extractors limit the depth of a body, and event streams. Around all of this, [`crate::serve`]
//! limits connections, heads and how slowly they may come.

use axum::{Router, middleware};
use tokio_util::sync::CancellationToken;
use tower_http::compression::CompressionLayer;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    App, auth, body, layers,
    openapi::{self, Document},
    routes::{cache, docs, pipelines, plan, probes, replicas, runs},
    state::{Parts, Shared},
};

/// The API: authenticated.
fn api() -> OpenApiRouter<Shared> {
    OpenApiRouter::with_openapi(openapi::fixed())
        .routes(routes!(pipelines::list::list, pipelines::register::register))
        .routes(routes!(pipelines::validate::validate))
        .routes(routes!(pipelines::read::read))
        .routes(routes!(pipelines::versions::versions))
        .routes(routes!(pipelines::version::version))
        .routes(routes!(pipelines::schema::schema))
        .routes(routes!(runs::list::list, runs::submit::submit))
        .routes(routes!(runs::read::read, runs::delete::delete))
        .routes(routes!(runs::events::events))
        .routes(routes!(runs::actions::cancel))
        .routes(routes!(runs::actions::retry))
        .routes(routes!(runs::stage::stage))
        .routes(routes!(runs::actions::approve))
        .routes(routes!(runs::actions::reject))
        .routes(routes!(plan::plan))
        .routes(routes!(cache::read))
        .routes(routes!(cache::invalidate))
        .routes(routes!(replicas::replicas))
        .routes(routes!(replicas::queue))
}

/// Probes: open to whoever reaches the listener.
fn probes() -> OpenApiRouter<Shared> {
    OpenApiRouter::default()
        .routes(routes!(probes::healthz))
        .routes(routes!(probes::readyz))
        .routes(routes!(probes::health))
        .routes(routes!(probes::metrics))
        .routes(routes!(docs::openapi_json))
}

/// The document of every route.
pub(crate) fn document() -> utoipa::openapi::OpenApi {
    api().merge(probes()).into_openapi()
}

/// The router with its layers.
pub(crate) fn build(app: App, open: bool, shutdown: CancellationToken) -> Router {
    let base = app.config.base_path.clone();
    let shared = Parts::new(app, open, Document::new(&document(), open, &base), shutdown);
    let api: Router<Shared> = api().into();
    let api = api
        .route_layer(middleware::from_fn_with_state(shared.clone(), layers::limit_load))
        .route_layer(middleware::from_fn_with_state(shared.clone(), body::receive))
        .route_layer(middleware::from_fn_with_state(shared.clone(), auth::authenticate))
        .route_layer(middleware::from_fn_with_state(shared.clone(), layers::limit_time));
    let probes: Router<Shared> = probes().into();
    Router::new()
        .merge(api)
        .merge(probes)
        .merge(docs::ui(&base))
        .layer(middleware::from_fn_with_state(shared.clone(), auth::guard_open))
        .layer(middleware::from_fn(layers::guard_listener))
        .layer(CompressionLayer::new())
        .layer(middleware::from_fn_with_state(shared.clone(), layers::observe))
        .layer(middleware::from_fn(layers::secure_headers))
        .with_state(shared)
}
