//! Pipelines: register, list, read, keep.

use http::Method;
use serde_json::{Value, json};

use stagegate_engine::config::{EngineConfig, TenantLimits};

use crate::app::{HELD, Options, PIPELINE, TestApp, spawn_app};

#[tokio::test]
async fn the_same_content_is_the_same_version() {
    let app = spawn_app().await;
    let first = app.post_text("/v1/pipelines", "application/yaml", PIPELINE).await;
    assert_eq!((first.status.as_u16(), &first.body["version"]), (201, &json!(1)));
    assert_eq!(first.header("location"), "/v1/pipelines/two-steps/versions/1");
    // As JSON, from the canonical form: still the same.
    let again = app.post("/v1/pipelines", &first.body["definition"]).await;
    assert_eq!((again.status.as_u16(), &again.body["digest"]), (200, &first.body["digest"]));
    let changed = PIPELINE.replace("Go on", "Continue");
    let second = app.post_text("/v1/pipelines", "text/yaml", changed).await;
    assert_eq!((second.status.as_u16(), &second.body["version"]), (201, &json!(2)));
    let read = app.get("/v1/pipelines/two-steps").await;
    assert_eq!(read.body["version"], 2);
    let old = app.get("/v1/pipelines/two-steps/versions/1").await;
    assert_eq!(old.body["definition"], first.body["definition"]);
}

#[tokio::test]
async fn a_registration_past_the_quota_is_refused_with_what_to_do() {
    let limits = TenantLimits { max_pipelines: 1, max_versions: 2, ..TenantLimits::default() };
    let engine = EngineConfig { tenant_defaults: limits, ..EngineConfig::default() };
    let app = TestApp::spawn_with(Options::default(), engine, None).await;
    let register = async |source: String| app.post_text("/v1/pipelines", "application/yaml", source).await;
    assert_eq!(register(PIPELINE.to_owned()).await.status, 201);
    let full = register(HELD.to_owned()).await;
    full.is_problem(403, "SG0214");
    let detail = full.body["detail"].to_string();
    assert!(detail.contains("has 1 pipelines and may have 1") && detail.contains("max_pipelines"), "{detail}");
    assert_eq!(register(PIPELINE.replace("Go on", "Continue")).await.status, 201);
    let full = register(PIPELINE.replace("Go on", "Finish")).await;
    full.is_problem(403, "SG0214");
    let detail = full.body["detail"].to_string();
    assert!(detail.contains("has 2 versions") && detail.contains("max_versions"), "{detail}");
    assert_eq!(register(PIPELINE.to_owned()).await.status, 200, "what is there stays there");
}

#[tokio::test]
async fn lists_are_paged_to_their_end() {
    let app = spawn_app().await;
    app.register(PIPELINE).await;
    app.register(HELD).await;
    app.post_text("/v1/pipelines", "text/yaml", PIPELINE.replace("Go on", "Continue")).await;
    let mut names = Vec::new();
    let mut path = "/v1/pipelines?limit=1".to_owned();
    loop {
        let page = app.get(&path).await;
        assert_eq!(page.status, 200, "{}", page.text);
        for item in page.body["items"].as_array().expect("items") {
            names.push((item["name"].clone(), item["version"].clone(), item["stages"].clone()));
        }
        let Some(cursor) = page.body["next_cursor"].as_str() else { break };
        path = format!("/v1/pipelines?limit=1&cursor={cursor}");
    }
    let stages = |ids: [&str; 2]| json!(ids);
    assert_eq!(
        names,
        [
            (json!("held"), json!(1), stages(["draft", "last"])),
            (json!("two-steps"), json!(2), stages(["first", "second"])),
        ]
    );
    let versions = app.get("/v1/pipelines/two-steps/versions?limit=1").await;
    assert_eq!(versions.body["items"][0]["version"], 2);
    let cursor = versions.body["next_cursor"].as_str().expect("another page");
    let older = app.get(&format!("/v1/pipelines/two-steps/versions?cursor={cursor}")).await;
    assert_eq!((&older.body["items"][0]["version"], &older.body["next_cursor"]), (&json!(1), &Value::Null));
}

#[tokio::test]
async fn what_never_changes_is_not_sent_twice() {
    let app = spawn_app().await;
    app.register(PIPELINE).await;
    for path in
        ["/v1/pipelines/two-steps/versions/1", "/v1/pipelines/two-steps", "/v1/schemas/pipeline", "/openapi.json"]
    {
        let full = app.get(path).await;
        let tag = full.header("etag").to_owned();
        assert!(tag.starts_with("W/\""), "{path}: {tag}");
        let again = app.send(app.request(Method::GET, path).header("if-none-match", &tag)).await;
        assert_eq!(
            (again.status.as_u16(), again.text.as_str(), again.header("etag")),
            (304, "", tag.as_str()),
            "{path}"
        );
        let other = app.send(app.request(Method::GET, path).header("if-none-match", "\"other\"")).await;
        assert_eq!(other.status, 200, "{path}");
    }
    let version = app.get("/v1/pipelines/two-steps/versions/1").await;
    assert!(version.header("cache-control").contains("immutable"));
    assert_eq!(app.get("/v1/pipelines").await.header("cache-control"), "no-store");
}

#[tokio::test]
async fn a_valid_definition_is_told_so_and_not_registered() {
    let app = spawn_app().await;
    let answer = app.post_text("/v1/pipelines/validate", "application/yaml", PIPELINE).await;
    assert_eq!(answer.body, json!({ "valid": true, "violations": [] }));
    assert_eq!(app.get("/v1/pipelines").await.body["items"], json!([]));
}

#[tokio::test]
async fn the_schema_of_a_definition_is_published() {
    let app = spawn_app().await;
    let schema = app.get("/v1/schemas/pipeline").await.body;
    assert_eq!(schema, stagegate_core::pipeline::definition_schema());
    let validator = jsonschema::validator_for(&schema).expect("a schema");
    let definition = app.register(PIPELINE).await["definition"].clone();
    assert!(validator.is_valid(&definition), "{definition:#}");
}

#[tokio::test]
async fn a_bundle_brings_the_files_that_its_definition_names() {
    let app = spawn_app().await;
    let definition = "name: filed\nstages:\n  - id: a\n    model: sim/quick\n    prompt_file: prompts/a.md\n    output: { schema_file: a.json }\n";
    let files = json!({ "./prompts/a.md": "Say it.", "a.json": "{\"type\": \"object\"}" });
    let bundle = json!({ "definition": definition, "files": files });
    let created = app.post("/v1/pipelines", &bundle).await;
    assert_eq!(created.status, 201, "{}", created.text);
    let stage = &created.body["definition"]["stages"][0];
    assert_eq!((&stage["prompt"], &stage["output"]), (&json!("Say it."), &json!({ "schema": { "type": "object" } })));
    // The definition may be an object as well, and the media type may say what it is.
    let object = json!({ "name": "filed", "stages": [{ "id": "a", "model": "sim/quick", "prompt_file": "prompts/a.md",
        "output": { "schema_file": "a.json" } }] });
    let bundle = json!({ "definition": object, "files": files }).to_string();
    let same = app.post_text("/v1/pipelines", "application/vnd.stagegate.bundle+json", bundle).await;
    assert_eq!((same.status.as_u16(), &same.body["digest"]), (200, &created.body["digest"]));
    // Without its files it has mistakes, each with its place.
    let bare = app.post_text("/v1/pipelines/validate", "application/yaml", definition).await;
    assert_eq!(
        (&bare.body["valid"], &bare.body["violations"][0]["path"]),
        (&json!(false), &json!("stages[0].prompt_file"))
    );
    assert_eq!(bare.body["violations"][0]["line"], 5);
    let wrong = app.post("/v1/pipelines", &json!({ "definition": definition, "files": ["a"] })).await;
    wrong.is_problem(400, "SG0001");
    let outside = json!({ "definition": definition.replace("prompts/a.md", "../a.md"), "files": { "../a.md": "x" } });
    app.post("/v1/pipelines", &outside).await.is_problem(422, "SG0100");
}

#[tokio::test]
async fn a_body_may_begin_with_a_byte_order_mark_and_other_encodings_are_named() {
    let app = spawn_app().await;
    let marked =
        app.post_text("/v1/pipelines", "application/yaml", format!("\u{feff}{}", PIPELINE.replace('\n', "\r\n"))).await;
    assert_eq!(marked.status, 201, "{}", marked.text);
    let plain = app.post_text("/v1/pipelines", "application/yaml", PIPELINE).await;
    assert_eq!((plain.status.as_u16(), &plain.body["digest"]), (200, &marked.body["digest"]));
    let body = "\u{feff}{\"pipeline\": \"two-steps\", \"input\": {\"text\": \"x\"}}";
    let run = app.post_text("/v1/runs", "application/json", body).await;
    assert!(run.status == 202 || run.status == 422, "it is read: {}", run.text);
    let wide: Vec<u8> = PIPELINE.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let request = app.request(Method::POST, "/v1/pipelines").header("content-type", "application/yaml").body(wide);
    let refused = app.send(request).await;
    refused.is_problem(400, "SG0001");
    assert!(refused.body["detail"].as_str().is_some_and(|detail| detail.contains("UTF-16")), "{}", refused.text);
}

#[tokio::test]
async fn what_may_be_left_out_of_a_submit_may_be_null() {
    let app = spawn_app().await;
    app.register(
        r#"{"name": "p", "input": {"type": "object"}, "stages": [{"id": "a", "transform": "{{ input | tojson }}"}]}"#,
    )
    .await;
    for key in ["version", "start_at", "cache_mode", "priority", "labels"] {
        let mut body = json!({ "pipeline": "p", "input": {} });
        body[key] = Value::Null;
        let answer = app.post("/v1/runs", &body).await;
        assert_eq!(answer.status, 202, "{key}: {}", answer.text);
    }
    app.post("/v1/runs", &json!({ "pipeline": null, "input": {} })).await.is_problem(400, "SG0001");
}
