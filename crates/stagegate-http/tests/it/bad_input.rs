//! Bad input: each kind has a stable code and a message that names the field and the mend, and changes nothing.

use http::Method;
use serde_json::json;
use stagegate_http::config::{AuthMode, HttpConfig};

use crate::app::{Options, PIPELINE, TestApp, spawn_app};

/// Nothing is there: neither pipelines nor runs.
async fn nothing_changed(app: &TestApp) {
    assert_eq!(app.get("/v1/pipelines").await.body["items"], json!([]));
    assert_eq!(app.get("/v1/runs").await.body["items"], json!([]));
}

async fn small_app() -> TestApp {
    let http = HttpConfig { auth: AuthMode::Keys, body_max_bytes: 1_000, ..HttpConfig::default() };
    TestApp::spawn(Options { http, ..Options::default() }).await
}

#[tokio::test]
async fn an_over_large_body_is_refused_whether_it_is_announced_or_not() {
    let app = small_app().await;
    let body = "x".repeat(3_000);
    for path in ["/v1/runs", "/v1/plan", "/v1/cache/invalidate"] {
        app.post_text(path, "application/json", body.clone()).await.is_problem(413, "SG0003");
    }
    for path in ["/v1/pipelines", "/v1/pipelines/validate"] {
        app.post_text(path, "application/yaml", body.clone()).await.is_problem(413, "SG0003");
        // Chunked: its length is not announced.
        let chunks = futures::stream::iter((0..30).map(|_| Ok::<_, std::io::Error>("x".repeat(100))));
        let chunked = reqwest::Body::wrap_stream(chunks);
        app.post_text(path, "application/yaml", chunked).await.is_problem(413, "SG0003");
    }
    nothing_changed(&app).await;
}

#[tokio::test]
async fn a_body_that_is_no_text_is_refused() {
    let app = spawn_app().await;
    for (path, kind) in [("/v1/runs", "application/json"), ("/v1/pipelines", "application/yaml")] {
        let answer = app.post_text(path, kind, &b"{\"a\": \"\xff\"}"[..]).await;
        answer.is_problem(400, "SG0001");
        assert!(answer.text.contains("UTF-8"));
    }
    nothing_changed(&app).await;
}

#[tokio::test]
async fn deep_json_is_refused_before_it_is_parsed() {
    let app = spawn_app().await;
    let deep = |depth: usize| {
        format!("{{\"pipeline\":\"p\",\"input\":{{\"a\":{}{}}}}}", "[".repeat(depth - 2), "]".repeat(depth - 2))
    };
    app.post_text("/v1/runs", "application/json", deep(65)).await.is_problem(400, "SG0001");
    app.post_text("/v1/runs", "application/json", deep(100_000)).await.is_problem(400, "SG0001");
    // One level less is read, and then there is no such pipeline.
    app.post_text("/v1/runs", "application/json", deep(64)).await.is_problem(404, "SG0201");
}

#[tokio::test]
async fn a_wrong_content_type_is_refused() {
    let app = spawn_app().await;
    let body = r#"{"pipeline":"p","input":{}}"#;
    for kind in ["text/plain", "application/xml", "application/yaml", "application/json; charset=latin1", "json"] {
        app.post_text("/v1/runs", kind, body).await.is_problem(415, "SG0002");
    }
    app.send(app.request(Method::POST, "/v1/runs").body(body)).await.is_problem(415, "SG0002");
    app.post_text("/v1/pipelines", "text/html", PIPELINE).await.is_problem(415, "SG0002");
    let gzipped = app.request(Method::POST, "/v1/runs").header("content-type", "application/json");
    app.send(gzipped.header("content-encoding", "gzip").body(body)).await.is_problem(415, "SG0002");
    nothing_changed(&app).await;
}

#[tokio::test]
async fn a_syntax_error_names_its_line_and_column() {
    let app = spawn_app().await;
    let answer = app.post_text("/v1/runs", "application/json", "{\n  \"pipeline\": nope }").await;
    answer.is_problem(400, "SG0001");
    assert_eq!(answer.body["violations"][0]["line"], 2);
    assert_eq!(answer.body["violations"][0]["code"], "SG0101");
}

#[tokio::test]
async fn every_mistake_of_a_body_is_told_at_once() {
    let app = spawn_app().await;
    let body =
        json!({ "pipelin": "p", "version": 0, "priority": 99_999, "cache_mode": "sometimes", "labels": { "a": 1 } });
    let answer = app.post("/v1/runs", &body).await;
    answer.is_problem(400, "SG0001");
    let mut paths = answer.paths();
    paths.sort_unstable();
    assert_eq!(
        paths,
        ["cache_mode", "input", "labels.a", "pipelin", "pipeline", "priority", "version"],
        "{}",
        answer.text
    );
    assert!(answer.text.contains("did you mean `pipeline`?"), "{}", answer.text);
    nothing_changed(&app).await;
}

#[tokio::test]
async fn every_mistake_of_a_query_is_told_at_once() {
    let app = spawn_app().await;
    let answer = app.get("/v1/runs?limit=0&state=done&version=x&label=team&created_from=soon&stat=failed").await;
    answer.is_problem(400, "SG0208");
    let mut paths = answer.paths();
    paths.sort_unstable();
    assert_eq!(paths, ["created_from", "label", "limit", "stat", "state", "version"], "{}", answer.text);
    app.get("/v1/runs?pipeline=%00").await.is_problem(400, "SG0208");
}

#[tokio::test]
async fn what_is_not_there_is_told_by_its_kind() {
    let app = spawn_app().await;
    app.register(PIPELINE).await;
    let run = app.submit("a brief").await;
    let nowhere = "018f0000-0000-7000-8000-000000000000";
    for (path, code) in [
        ("/v1/pipelines/none", "SG0201"),
        ("/v1/pipelines/Not%20A%20Name", "SG0201"),
        ("/v1/pipelines/none/versions", "SG0201"),
        ("/v1/pipelines/none/versions/1", "SG0201"),
        ("/v1/pipelines/two-steps/versions/2", "SG0202"),
        ("/v1/pipelines/two-steps/versions/x", "SG0202"),
        ("/v1/pipelines/two-steps/versions/99999999999", "SG0202"),
        (&format!("/v1/runs/{nowhere}"), "SG0203"),
        ("/v1/runs/not-an-id", "SG0203"),
        (&format!("/v1/runs/{nowhere}/events"), "SG0203"),
        (&format!("/v1/runs/{nowhere}/stages/first"), "SG0203"),
        (&format!("/v1/runs/{run}/stages/third"), "SG0204"),
        ("/v1/nothing", "SG0004"),
        ("/nothing", "SG0004"),
    ] {
        app.get(path).await.is_problem(404, code);
    }
    app.post_empty(&format!("/v1/runs/{nowhere}/cancel")).await.is_problem(404, "SG0203");
    app.post("/v1/runs", &json!({ "pipeline": "none", "input": {} })).await.is_problem(404, "SG0201");
    let body = json!({ "pipeline": "two-steps", "version": 9, "input": { "brief": "b" } });
    app.post("/v1/runs", &body).await.is_problem(404, "SG0202");
}

#[tokio::test]
async fn a_wrong_method_names_the_right_ones() {
    let app = spawn_app().await;
    let answer = app.send(app.request(Method::DELETE, "/v1/runs")).await;
    answer.is_problem(405, "SG0005");
    for method in ["GET", "POST"] {
        assert!(answer.header("allow").contains(method), "{}", answer.header("allow"));
    }
    assert!(answer.text.contains("`Allow`"));
}

#[tokio::test]
async fn a_cursor_of_another_list_is_refused() {
    let app = spawn_app().await;
    app.register(PIPELINE).await;
    for brief in ["one", "two", "three"] {
        app.submit(brief).await;
    }
    let page = app.get("/v1/runs?limit=2").await;
    let cursor = page.body["next_cursor"].as_str().expect("another page").to_owned();
    assert_eq!(app.get(&format!("/v1/runs?limit=1&cursor={cursor}")).await.status, 200);
    app.get(&format!("/v1/runs?state=failed&cursor={cursor}")).await.is_problem(400, "SG0206");
    app.get(&format!("/v1/pipelines?cursor={cursor}")).await.is_problem(400, "SG0206");
    app.get("/v1/runs?cursor=garbage").await.is_problem(400, "SG0206");
    let foreign = app.http.get(app.url(&format!("/v1/runs?cursor={cursor}"))).bearer_auth(&app.stranger);
    app.send(foreign).await.is_problem(400, "SG0206");
}

#[tokio::test]
async fn an_idempotency_key_stands_for_one_request() {
    let app = spawn_app().await;
    app.register(PIPELINE).await;
    let send = async |key: &str, body: &str| {
        let request = app.request(Method::POST, "/v1/runs").header("idempotency-key", key);
        app.send(request.header("content-type", "application/json").body(body.to_owned())).await
    };
    let first = send("k-1", r#"{"pipeline":"two-steps","input":{"brief":"one"}}"#).await;
    assert_eq!((first.status.as_u16(), first.header("idempotency-replayed")), (202, ""));
    let again = send("k-1", r#"{ "input": { "brief": "one" }, "pipeline": "two-steps", "labels": {} }"#).await;
    assert_eq!((again.status.as_u16(), again.header("idempotency-replayed")), (202, "true"));
    assert_eq!(again.body["id"], first.body["id"]);
    assert_eq!(again.header("location"), first.header("location"));
    send("k-1", r#"{"pipeline":"two-steps","input":{"brief":"two"}}"#).await.is_problem(409, "SG0205");
    for bad in ["", "a b", &"k".repeat(256)] {
        send(bad, r#"{"pipeline":"two-steps","input":{"brief":"one"}}"#).await.is_problem(400, "SG0001");
    }
    assert_eq!(app.get("/v1/runs").await.body["items"].as_array().map(Vec::len), Some(1));
}

#[tokio::test]
async fn an_input_that_does_not_fit_is_refused_with_its_fields() {
    let app = spawn_app().await;
    app.register(PIPELINE).await;
    for (path, input) in [("/v1/runs", json!({})), ("/v1/plan", json!({ "brief": 7 }))] {
        let answer = app.post(path, &json!({ "pipeline": "two-steps", "input": input })).await;
        answer.is_problem(422, "SG0200");
        assert!(answer.text.contains("brief"), "{}", answer.text);
    }
    assert_eq!(app.get("/v1/runs").await.body["items"], json!([]));
}

#[tokio::test]
async fn a_definition_with_mistakes_is_refused_with_all_of_them() {
    let app = spawn_app().await;
    let source = "name: bad\nstages:\n  - id: a\n    needs: [zzz]\n    promt: hi\n    model: nobody/knows\n";
    let answer = app.post_text("/v1/pipelines", "application/yaml", source).await;
    answer.is_problem(422, "SG0100");
    let codes: Vec<&str> =
        answer.body["violations"].as_array().expect("a list").iter().filter_map(|v| v["code"].as_str()).collect();
    assert!(codes.contains(&"SG0102") && codes.len() > 1, "{}", answer.text);
    assert!(answer.body["violations"][0]["line"].is_number());
    let validation = app.post_text("/v1/pipelines/validate", "text/yaml", source).await;
    assert_eq!((validation.status.as_u16(), &validation.body["valid"]), (200, &json!(false)));
    assert_eq!(validation.body["violations"], answer.body["violations"]);
    nothing_changed(&app).await;
}

#[tokio::test]
async fn a_purge_that_is_not_clear_is_refused() {
    let app = spawn_app().await;
    let answer = app.post("/v1/cache/invalidate", &json!({ "scope": "stage", "version": 1 })).await;
    answer.is_problem(400, "SG0001");
    let mut paths = answer.paths();
    paths.sort_unstable();
    assert_eq!(paths, ["pipeline", "stage", "version"]);
    app.post("/v1/cache/invalidate", &json!({ "scope": "everything" })).await.is_problem(400, "SG0001");
    app.post("/v1/plan", &json!({ "input": {} })).await.is_problem(400, "SG0001");
}
