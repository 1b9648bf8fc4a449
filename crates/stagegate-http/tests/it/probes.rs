//! Probes and pages: they ask for no key, and hurt nobody.

use std::time::Duration;

use futures::future::join_all;
use serde_json::json;
use stagegate_core::pipeline::Span;
use stagegate_http::config::{AuthMode, HttpConfig};

use crate::app::{Options, PIPELINE, TestApp, spawn_app};

#[tokio::test]
async fn a_dead_store_is_not_ready_but_alive() {
    let app = spawn_app().await;
    let get = async |path: &str| app.send(app.http.get(app.url(path))).await;
    let ready = get("/readyz").await;
    assert_eq!((ready.status.as_u16(), &ready.body["ready"]), (200, &json!(true)), "{}", ready.text);
    let names: Vec<&str> =
        ready.body["dependencies"].as_array().expect("a list").iter().filter_map(|d| d["name"].as_str()).collect();
    assert!(["store", "schema", "providers"].iter().all(|name| names.contains(name)), "{names:?}");

    app.store.close().await;
    // The last answer stands for a second.
    let ready = loop {
        let ready = get("/readyz").await;
        if ready.status == 503 {
            break ready;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert_eq!((&ready.body["state"], &ready.body["dependencies"][0]["state"]), (&json!("down"), &json!("down")));
    assert_eq!(get("/healthz").await.text, "ok\n");
    let health = get("/health").await;
    assert_eq!((health.status.as_u16(), &health.body["state"]), (200, &json!("down")));
    assert_eq!(get("/metrics").await.status, 200);
    let read = app.get("/v1/runs").await;
    read.is_problem(503, "SG0009");
    assert!(!read.header("retry-after").is_empty());
}

#[tokio::test]
async fn a_store_that_hangs_is_not_ready_and_holds_up_no_probe() {
    let request_timeout = Span(Duration::from_millis(500));
    let http = HttpConfig { auth: AuthMode::Keys, request_timeout, ..HttpConfig::default() };
    let app = TestApp::spawn(Options { http, ..Options::default() }).await;
    let get = async |path: &str| app.send(app.http.get(app.url(path)).timeout(Duration::from_secs(20))).await;
    app.stalling.hang(true);
    // Callers that give up before there is an answer do not keep it from the others.
    let impatient = (0..20).map(|_| app.http.get(app.url("/readyz")).timeout(Duration::from_millis(50)).send());
    assert!(join_all(impatient).await.iter().all(Result::is_err), "nothing is known yet");
    for ready in join_all((0..50).map(|_| get("/readyz"))).await {
        assert_eq!((ready.status.as_u16(), &ready.body["state"]), (503, &json!("down")), "{}", ready.text);
        let store = &ready.body["dependencies"][0];
        assert_eq!((&store["state"], &store["latency_ms"]), (&json!("down"), &json!(null)), "{}", ready.text);
        assert!(!ready.header("retry-after").is_empty());
    }
    assert_eq!(get("/healthz").await.text, "ok\n");
    assert_eq!(get("/health").await.body["state"], json!("down"));
    assert_eq!(get("/metrics").await.status, 200);
    app.get("/v1/runs").await.is_problem(408, "SG0006");

    app.stalling.hang(false);
    while get("/readyz").await.status != 200 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(app.get("/v1/runs").await.status, 200);
}

#[tokio::test]
async fn a_draining_replica_is_not_ready() {
    let app = spawn_app().await;
    app.register(PIPELINE).await;
    assert_eq!(app.get("/readyz").await.status, 200);
    app.engine.drain(Duration::from_secs(5)).await;
    let ready = app.get("/readyz").await;
    assert_eq!((ready.status.as_u16(), &ready.body["draining"]), (503, &json!(true)));
    let body = json!({ "pipeline": "two-steps", "input": { "brief": "b" } });
    app.post("/v1/runs", &body).await.is_problem(503, "SG0012");
}

#[tokio::test]
async fn health_tells_version_and_providers() {
    let app = spawn_app().await;
    let health = app.send(app.http.get(app.url("/health"))).await.body;
    assert_eq!(health["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(health["replica"], app.engine.replica().to_string());
    assert!(health["providers"].as_array().expect("a list").iter().any(|p| p["kind"] == "sim"), "{health:#}");
}

#[tokio::test]
async fn metrics_are_labelled_by_route_and_never_by_what_a_caller_makes_up() {
    let app = spawn_app().await;
    app.get("/v1/pipelines/some-name").await;
    app.get("/made/up/path").await;
    app.send(app.request("BREW".parse().expect("a method"), "/v1/runs")).await;
    let text = app.send(app.http.get(app.url("/metrics"))).await.text;
    assert!(text.contains(r#"route="/v1/pipelines/{name}",status="404""#), "{text}");
    assert!(text.contains(r#"route="unmatched""#) && text.contains(r#"method="OTHER""#));
    assert!(text.contains("stagegate_queue_runs") && text.contains("stagegate_errors_total{code=\"SG0201\"} 1"));
    for made_up in ["some-name", "made/up", "BREW", "acme"] {
        assert!(!text.contains(made_up), "{made_up}");
    }
}

#[tokio::test]
async fn the_pages_work_without_a_network() {
    let app = spawn_app().await;
    let page = app.http.get(app.url("/docs")).send().await.expect("an answer");
    assert_eq!(page.url().path(), "/docs/");
    let policy = page.headers()["content-security-policy"].to_str().expect("text").to_owned();
    assert!(policy.contains("default-src 'none'") && !policy.contains("http"), "{policy}");
    let html = page.text().await.expect("a page");
    let sources = html.split(['"', '\'']).filter(|part| part.starts_with("./") || part.starts_with("http"));
    let sources: Vec<&str> = sources.collect();
    assert!(sources.iter().any(|source| source.contains("bundle.js")), "{html}");
    for source in sources {
        assert!(source.starts_with("./"), "{source} is not served by the daemon");
        let file = app.http.get(app.url(&format!("/docs/{source}"))).send().await.expect("an answer");
        assert_eq!(file.status(), 200, "{source}");
    }
    let setup = app.http.get(app.url("/docs/swagger-initializer.js")).send().await.expect("an answer");
    let setup = setup.text().await.expect("a script");
    assert!(setup.contains("/openapi.json") && !setup.contains("petstore"), "{setup}");
    app.send(app.http.get(app.url("/docs/none.js"))).await.is_problem(404, "SG0004");
}

#[tokio::test]
async fn every_answer_tells_browsers_what_not_to_do() {
    let app = spawn_app().await;
    for path in ["/healthz", "/v1/runs", "/nothing", "/docs/"] {
        let answer = app.get(path).await;
        assert_eq!(answer.header("x-content-type-options"), "nosniff", "{path}");
        assert_eq!(answer.header("x-frame-options"), "DENY", "{path}");
        assert!(answer.header("content-security-policy").contains("default-src 'none'"), "{path}");
        assert!(!answer.header("x-request-id").is_empty(), "{path}");
    }
}

#[tokio::test]
async fn large_answers_are_compressed_for_those_who_ask() {
    let app = spawn_app().await;
    let plain = reqwest::Client::builder().no_proxy().no_gzip().build().expect("a client");
    let request = plain.get(app.url("/openapi.json")).header("accept-encoding", "gzip");
    let answer = request.send().await.expect("an answer");
    assert_eq!(answer.headers()["content-encoding"], "gzip");
    assert_eq!(app.get("/openapi.json").await.body["openapi"], "3.1.0");
}
