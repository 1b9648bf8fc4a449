//! The OpenAPI document, and Swagger UI from the binary itself: it works without a network.

use std::sync::Arc;

use axum::{
    Router,
    extract::{Path, State},
    response::{IntoResponse, Redirect, Response},
    routing::get,
};
use http::{
    HeaderMap, HeaderValue,
    header::{CACHE_CONTROL, CONTENT_ENCODING, CONTENT_SECURITY_POLICY, CONTENT_TYPE},
};
use stagegate_core::Code;
use utoipa_swagger_ui::{Config, serve};

use crate::{
    base::BasePath,
    etag::{REVALIDATE, Tag},
    problem::Problem,
    state::Shared,
};

/// Swagger UI writes styles inline; nothing may come from, or go to, anywhere else.
const CSP: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; \
                   font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Read the OpenAPI document
///
/// This document, as this daemon serves it: with its base path, and without keys where it asks for none.
#[utoipa::path(
    get, path = "/openapi.json", tag = "probes", operation_id = "getOpenapi",
    responses(
        (status = 200, description = "OpenAPI 3.1.", body = Value, headers(("ETag" = String))),
        (status = 304, description = "`If-None-Match` names it."),
    )
)]
pub(crate) async fn openapi_json(State(shared): State<Shared>, headers: HeaderMap) -> Response {
    let tag: &Tag = &shared.document.tag;
    tag.answer(&headers, REVALIDATE, || {
        ([(CONTENT_TYPE, "application/json")], shared.document.json.clone()).into_response()
    })
}

/// The pages of Swagger UI. They are no part of the API, and not in its document.
pub(crate) fn ui(base: &BasePath) -> Router<Shared> {
    // The validator's badge would call home.
    let config = Arc::new(Config::from(base.to("/openapi.json")).validator_url("none"));
    let (first, found) = (base.to("/docs/"), base.to("/docs/"));
    let index = {
        let config = config.clone();
        get(move || async move { page("index.html", config) })
    };
    let file = get(move |Path(name): Path<String>| async move { page(&name, config) });
    Router::new()
        // Whoever opens the printed address in a browser.
        .route("/", get(move || async move { Redirect::temporary(&found) }))
        .route("/docs", get(move || async move { Redirect::permanent(&first) }))
        .route("/docs/", index)
        .route("/docs/{*file}", file)
}

fn page(name: &str, config: Arc<Config<'static>>) -> Result<Response, Problem> {
    let file = serve(name, config).map_err(|error| Problem::new(Code::Internal, error.to_string()))?;
    let file =
        file.ok_or_else(|| Problem::new(Code::RouteNotFound, "There is no such page; `/docs/` is the first."))?;
    let mut response = file.bytes.into_owned().into_response();
    let headers = response.headers_mut();
    let kind =
        HeaderValue::from_str(&file.content_type).unwrap_or(HeaderValue::from_static("application/octet-stream"));
    headers.insert(CONTENT_TYPE, kind);
    if file.gzpipped {
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(CSP));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("public, max-age=3600"));
    Ok(response)
}
