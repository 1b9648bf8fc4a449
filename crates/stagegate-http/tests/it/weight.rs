//! Limits by weight: what one tenant holds of memory keeps no other tenant out.

use futures::{FutureExt as _, future::join_all};
use http::Method;
use serde_json::{Value, json};
use stagegate_core::TenantId;
use stagegate_engine::config::EngineConfig;

use crate::app::{Options, PIPELINE, TestApp};

/// The smallest budget: some 7 MB of it are for answers.
const MEMORY_BYTES: u64 = 64 << 20;

async fn spawn() -> TestApp {
    let engine = EngineConfig { memory_max_bytes: Some(MEMORY_BYTES), ..EngineConfig::default() };
    TestApp::spawn_with(Options::default(), engine, None).await
}

/// Registers the pipeline and submits a run, with an admin's key.
async fn submit(app: &TestApp, key: &str, input: Value) -> crate::app::Answer {
    let post = |path: &str| app.http.request(Method::POST, app.url(path)).bearer_auth(key);
    app.send(post("/v1/pipelines").header("content-type", "application/yaml").body(PIPELINE)).await;
    app.send(post("/v1/runs").json(&json!({ "pipeline": "two-steps", "input": input }))).await
}

#[tokio::test]
async fn answers_that_are_not_read_are_held_back_and_keep_no_other_tenant_waiting() {
    let app = spawn().await;
    let large = submit(&app, &app.admin, json!({ "brief": "b".repeat(1_900_000) })).await;
    let large = format!("/v1/runs/{}", large.body["id"].as_str().expect("accepted"));
    let stream = tokio::net::TcpStream::connect(app.address).await.expect("a connection");
    let (mut client, connection) =
        h2::client::Builder::new().initial_window_size(0).handshake::<_, bytes::Bytes>(stream).await.expect("HTTP/2");
    tokio::spawn(connection);
    let mut answers = Vec::new();
    for _ in 0..8 {
        client = client.ready().await.expect("ready");
        let request = http::Request::get(app.url(&large)).header("authorization", format!("Bearer {}", app.viewer));
        answers.push(client.send_request(request.body(()).expect("valid"), true).expect("sent").0);
    }
    // Whichever comes first.
    let (first, _, answers) = futures::future::select_all(answers).await;
    let first = first.expect("an answer");
    assert_eq!(first.status(), 200);

    let other = submit(&app, &app.stranger, json!({ "brief": "b".repeat(200_000) })).await;
    let other = format!("/v1/runs/{}", other.body["id"].as_str().expect("accepted"));
    for _ in 0..3 {
        let read = app.send(app.http.get(app.url(&other)).bearer_auth(&app.stranger)).await;
        assert_eq!(read.status, 200, "{}", &read.text[..200]);
    }
    let mut held = vec![first.into_body()];
    let mut waiting = Vec::new();
    for mut answer in answers {
        match (&mut answer).now_or_never() {
            Some(answer) => held.push(answer.expect("an answer").into_body()),
            None => waiting.push(answer),
        }
    }
    assert!(held.len() <= 4 && !waiting.is_empty(), "{} answers of 1.9 MB are under way", held.len());
    drop(held);
    while !waiting.is_empty() {
        // Each that is given up makes room for others.
        let (answer, _, rest) = futures::future::select_all(waiting).await;
        assert_eq!(answer.expect("an answer").status(), 200);
        waiting = rest;
    }
}

#[tokio::test]
async fn plans_of_one_tenant_that_fill_the_memory_for_values_block_no_other_tenants_submits() {
    let app = spawn().await;
    let values = &app.engine.memory().values;
    let greedy = TenantId::new("acme").expect("valid");
    let quarter = values.max_bytes() / 4;
    let _held = join_all([quarter, quarter, quarter].map(|bytes| values.acquire_for(&greedy, bytes))).await;
    let mut next = Box::pin(values.acquire_for(&greedy, quarter));
    assert!((&mut next).now_or_never().is_none(), "what it asks for beyond that waits");
    // Parsed it takes more than goes without a permit, and the pipeline's schema reads it.
    let brief = json!({ "brief": "a brief", "more": vec![json!({ "k": 0 }); 2_000] });
    let submitted = submit(&app, &app.stranger, brief).await;
    assert_eq!(submitted.status, 202, "{}", submitted.text);
}
