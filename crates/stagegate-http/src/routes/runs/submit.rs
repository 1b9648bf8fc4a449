//! Submits a run.

use std::collections::BTreeMap;

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use chrono::{DateTime, Utc};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header::LOCATION};
use serde::Deserialize;
use serde_json::Value;
use stagegate_core::{
    Code, Json as Payload, PipelineName, Violation,
    pipeline::{CacheMode, Labels},
    store::Idempotency,
};
use stagegate_engine::Submit;
use utoipa::ToSchema;

use crate::{
    context::{Context, Operator},
    extract,
    problem::Problem,
    routes::header_text,
    time,
    views::{RunView, labels_schema, run_path},
};

/// The client's key: the same key with the same request is the same run.
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Tells that the run was there already.
const IDEMPOTENCY_REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");
/// The longest idempotency key.
const IDEMPOTENCY_KEY_MAX_BYTES: usize = 255;

/// A run to be submitted.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct SubmitRequest {
    /// The pipeline's name.
    pipeline: PipelineName,
    /// The version; the newest one where it is left out.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 2_147_483_647)]
    version: Option<u32>,
    /// The input. It must fit the pipeline's schema.
    #[schema(value_type = Object)]
    input: Payload,
    /// Overrides the cache mode of every stage.
    #[serde(default)]
    cache_mode: Option<CacheMode>,
    /// Higher goes first; 0 is usual.
    #[serde(default)]
    #[schema(minimum = -100, maximum = 100)]
    priority: i16,
    /// For filters and people.
    #[serde(default)]
    #[schema(schema_with = labels_schema)]
    labels: Labels,
    /// Before that it does not start; its deadline counts from there. At once where it is left out or past.
    #[serde(default, deserialize_with = "time::optional")]
    start_at: Option<DateTime<Utc>>,
}

/// Submit a run
///
/// After 202 the run reaches exactly one terminal state, whatever crashes. With an `Idempotency-Key`, the same request
/// gives the same run for 24 hours (told by `Idempotency-Replayed: true`); another request with the same key is
/// refused. Needs the role `operator`.
#[utoipa::path(
    post, path = "/v1/runs", tag = "runs", operation_id = "submitRun",
    params(("Idempotency-Key" = Option<String>, Header, description = "1 to 255 visible ASCII characters.",
        min_length = 1, max_length = 255, pattern = "^[!-~]+$")),
    request_body = SubmitRequest,
    responses(
        (status = 202, description = "Accepted.", body = RunView, headers(("Location" = String))),
        (status = 404, description = "No such pipeline or version (SG0201, SG0202)."),
        (status = 409, description = "The idempotency key was used with a different request (SG0205)."),
        (status = 422, description = "The input does not fit the pipeline's schema (SG0200)."),
    )
)]
pub(crate) async fn submit(
    context: Context<Operator>,
    headers: HeaderMap,
    extract::Json(body): extract::Json<SubmitRequest>,
) -> Result<Response, Problem> {
    let idempotency = match idempotency_key(&headers)? {
        Some(key) => {
            // The digest stands for the values, whatever their order and spacing, so it parses them.
            let values = &context.engine.memory().values;
            let _room = values.acquire_for(&context.tenant, body.input.size().parsed_bytes).await;
            Some(Idempotency { key, digest: digest(&body) })
        }
        None => None,
    };
    let submit = Submit {
        tenant: context.tenant.clone(),
        pipeline: body.pipeline,
        version: body.version,
        input: body.input,
        cache_mode: body.cache_mode,
        priority: body.priority,
        labels: body.labels,
        idempotency,
        start_at: body.start_at,
        request_id: Some(context.request_id.clone()),
    };
    let turn = context.shared.reads.wait_for(&context.tenant, 1);
    let (run, is_new) = context.engine.submit_in_turn(submit, turn).await?;
    tracing::info!(run_id = %run.id, pipeline = %run.pipeline, version = run.version, is_new, "run accepted");
    let base = context.base();
    let location = [(LOCATION, run_path(base, run.id))];
    let mut response = (StatusCode::ACCEPTED, location, Json(RunView::new(run, context.now(), base))).into_response();
    if !is_new {
        response.headers_mut().insert(IDEMPOTENCY_REPLAYED, HeaderValue::from_static("true"));
    }
    Ok(response)
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let Some(key) = header_text(headers, IDEMPOTENCY_KEY.as_str())? else { return Ok(None) };
    if !(1..=IDEMPOTENCY_KEY_MAX_BYTES).contains(&key.len()) || !key.bytes().all(|b| b.is_ascii_graphic()) {
        let message = format!("write 1 to {IDEMPOTENCY_KEY_MAX_BYTES} visible ASCII characters");
        let violation = Violation::new(Code::WrongValue, "Idempotency-Key", message);
        return Err(Problem::violations(Code::InvalidRequest, vec![violation]));
    }
    Ok(Some(key.to_owned()))
}

/// What a request stands for, whatever the order and the spacing of its keys.
fn digest(body: &SubmitRequest) -> [u8; 32] {
    let SubmitRequest { pipeline, version, input, cache_mode, priority, labels, start_at } = body;
    let mut hasher = blake3::Hasher::new();
    hasher.update(format!("submit 1\n{pipeline}\n{version:?}\n{cache_mode:?}\n{priority}\n{labels:?}\n").as_bytes());
    if let Some(at) = start_at {
        // Only where it is given: a key that an older version has seen stands for the same request.
        hasher.update(format!("start_at {at:?}\n").as_bytes());
    }
    hash_canonical(&mut hasher, &input.parse());
    hasher.finalize().into()
}

/// Hashes JSON with its keys in order.
fn hash_canonical(hasher: &mut blake3::Hasher, value: &Value) {
    match value {
        Value::Object(map) => {
            hasher.update(b"{");
            for (key, value) in map.iter().collect::<BTreeMap<_, _>>() {
                hasher.update(Value::from(key.as_str()).to_string().as_bytes()).update(b":");
                hash_canonical(hasher, value);
                hasher.update(b",");
            }
            hasher.update(b"}");
        }
        Value::Array(items) => {
            hasher.update(b"[");
            for item in items {
                hash_canonical(hasher, item);
                hasher.update(b",");
            }
            hasher.update(b"]");
        }
        scalar => {
            hasher.update(scalar.to_string().as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_tells_requests_apart_and_not_their_spelling() {
        let of = |text: &str| digest(&serde_json::from_str(text).expect("valid"));
        let one = of(r#"{"pipeline":"p","input":{"a":1,"b":[1,2]}}"#);
        assert_eq!(one, of(r#"{ "input": {"b": [1, 2], "a": 1}, "pipeline": "p", "labels": {} }"#));
        for other in [
            r#"{"pipeline":"q","input":{"a":1,"b":[1,2]}}"#,
            r#"{"pipeline":"p","version":1,"input":{"a":1,"b":[1,2]}}"#,
            r#"{"pipeline":"p","input":{"a":1,"b":[2,1]}}"#,
            r#"{"pipeline":"p","input":{"a":"1","b":[1,2]}}"#,
            r#"{"pipeline":"p","input":{"a":1,"b":[1,2]},"cache_mode":"off"}"#,
        ] {
            assert_ne!(one, of(other), "{other}");
        }
    }
}
