//! The document itself.

use std::collections::HashSet;

use http::Method;
use serde_json::Value;

use crate::app::spawn_app;

fn operations(document: &Value) -> Vec<(String, Method, &Value)> {
    let paths = document["paths"].as_object().expect("paths");
    let operations = paths.iter().flat_map(|(path, item)| {
        item.as_object().expect("an item").iter().map(move |(method, operation)| {
            let method = method.to_ascii_uppercase().parse().expect("a method");
            (path.clone(), method, operation)
        })
    });
    operations.collect()
}

#[tokio::test]
async fn every_documented_operation_is_routed_and_no_other() {
    let app = spawn_app().await;
    let document = app.get("/openapi.json").await.body;
    let mut routed = Vec::new();
    for (path, method, _) in operations(&document) {
        let filled = path.replace("{id}", "018f0000-0000-7000-8000-000000000000").replace("{version}", "1");
        let filled = filled.replace("{name}", "none").replace("{stage}", "none");
        let answer = app.send(app.request(method.clone(), &filled)).await;
        assert!(!["SG0004", "SG0005"].contains(&answer.code()), "{method} {path}: {}", answer.text);
        routed.push(format!("{method} {path}"));
    }
    routed.sort();
    assert_eq!(
        routed,
        [
            "DELETE /v1/runs/{id}",
            "GET /health",
            "GET /healthz",
            "GET /metrics",
            "GET /openapi.json",
            "GET /readyz",
            "GET /v1/cache",
            "GET /v1/pipelines",
            "GET /v1/pipelines/{name}",
            "GET /v1/pipelines/{name}/versions",
            "GET /v1/pipelines/{name}/versions/{version}",
            "GET /v1/queue",
            "GET /v1/replicas",
            "GET /v1/runs",
            "GET /v1/runs/{id}",
            "GET /v1/runs/{id}/events",
            "GET /v1/runs/{id}/stages/{stage}",
            "GET /v1/schemas/pipeline",
            "POST /v1/cache/invalidate",
            "POST /v1/pipelines",
            "POST /v1/pipelines/validate",
            "POST /v1/plan",
            "POST /v1/runs",
            "POST /v1/runs/{id}/cancel",
            "POST /v1/runs/{id}/retry",
            "POST /v1/runs/{id}/stages/{stage}/approve",
            "POST /v1/runs/{id}/stages/{stage}/reject",
        ],
        "a new route is a new line here: the API's surface changes on purpose only"
    );
}

#[test]
fn every_operation_says_what_it_is_and_how_it_fails() {
    let document = stagegate_http::openapi_document();
    assert_eq!(document["openapi"], "3.1.0");
    let mut ids = HashSet::new();
    for (path, method, operation) in operations(&document) {
        let name = format!("{method} {path}");
        assert!(ids.insert(operation["operationId"].as_str().expect("an id").to_owned()), "{name}");
        assert!(operation["summary"].is_string() && operation["description"].is_string(), "{name}");
        assert!(operation["tags"][0].is_string(), "{name}");
        let mut statuses = vec!["400", "500"];
        if path == "/openapi.json" {
            statuses.push("403");
        }
        if path.starts_with("/v1/") {
            statuses.extend(["400", "401", "403", "408", "429", "503"]);
            assert!(operation["security"][0].is_object(), "{name}");
        }
        if operation["requestBody"].is_object() {
            statuses.extend(["413", "415"]);
        }
        for status in statuses {
            let content = &operation["responses"][status]["content"];
            assert_eq!(
                content["application/problem+json"]["schema"]["$ref"], "#/components/schemas/Problem",
                "{name} {status}"
            );
        }
    }
}

#[test]
fn every_reference_leads_somewhere() {
    fn references<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
        match value {
            Value::Object(map) => {
                found.extend(map.get("$ref").and_then(Value::as_str));
                map.values().for_each(|value| references(value, found));
            }
            Value::Array(items) => items.iter().for_each(|item| references(item, found)),
            _ => {}
        }
    }
    let document = stagegate_http::openapi_document();
    let mut found = Vec::new();
    references(&document, &mut found);
    assert!(found.contains(&"#/components/schemas/Definition"));
    for reference in found {
        let pointer = reference.strip_prefix('#').expect("inside the document");
        assert!(document.pointer(pointer).is_some(), "{reference} leads nowhere");
    }
    for name in document["components"]["schemas"].as_object().expect("schemas").keys() {
        assert!(name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c)), "{name}");
    }
}

#[test]
fn request_bodies_refuse_keys_that_they_do_not_know() {
    let document = stagegate_http::openapi_document();
    for name in ["SubmitRequest", "PlanRequest", "InvalidateRequest", "RejectRequest", "ApproveRequest"] {
        let schema = &document["components"]["schemas"][name];
        let branches = schema["oneOf"].as_array().map_or_else(|| vec![schema], |branches| branches.iter().collect());
        for branch in branches {
            assert_eq!(branch["additionalProperties"], false, "{name}");
        }
    }
}

#[test]
fn nothing_in_the_document_is_null_by_accident() {
    fn check(path: &str, value: &Value) {
        match value {
            Value::Null => panic!("{path} is null"),
            Value::Object(map) => {
                for (key, value) in
                    map.iter().filter(|(key, _)| !["default", "const", "enum", "example"].contains(&key.as_str()))
                {
                    check(&format!("{path}/{key}"), value);
                }
            }
            Value::Array(items) => items.iter().for_each(|item| check(path, item)),
            _ => {}
        }
    }
    check("", &stagegate_http::openapi_document());
}
