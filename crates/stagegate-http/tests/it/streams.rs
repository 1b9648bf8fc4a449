//! Event streams: how long they stay open, and who may keep one.

use std::time::Duration;

use http::Method;
use stagegate_core::{Clock as _, SystemClock, pipeline::Span, store::Role};
use stagegate_http::config::{AuthMode, HttpConfig};

use crate::app::{Options, PIPELINE, TestApp, new_key, parse_sse};

/// Far more than anything here may take.
const LONG: Duration = Duration::from_mins(1);
/// A model that does not answer within a test.
const NEVER: Duration = Duration::from_hours(1);

fn config() -> HttpConfig {
    HttpConfig { auth: AuthMode::Keys, ..HttpConfig::default() }
}

#[tokio::test]
async fn a_stream_ends_when_its_key_is_revoked_and_others_go_on() {
    let app = TestApp::spawn(Options { http: config(), latency: NEVER }).await;
    app.register(PIPELINE).await;
    let id = app.submit("slow").await;
    let (secret, key) = new_key(&app.store, "acme", Role::Viewer, 71, None).await;
    let open = async |secret: &str| {
        let request = app.http.get(app.url(&format!("/v1/runs/{id}/events"))).bearer_auth(secret);
        request.header("accept", "text/event-stream").send().await.expect("an answer")
    };
    let (doomed, mut other) = (open(&secret).await, open(&app.viewer).await);
    app.store.revoke_key(key, SystemClock.now()).await.expect("stored");
    let text = tokio::time::timeout(LONG, doomed.text()).await.expect("it ends").expect("a clean end");
    assert!(text.ends_with(": end of stream\n") && !parse_sse(&text).is_empty(), "{text}");
    other.chunk().await.expect("no error").expect("the other goes on");
}

#[tokio::test]
async fn a_client_of_http_2_that_closes_its_window_does_not_keep_its_place() {
    let http = HttpConfig {
        max_event_streams: 1,
        request_timeout: Span(Duration::from_millis(500)),
        sse_keep_alive: Span(Duration::from_millis(100)),
        ..config()
    };
    let app = TestApp::spawn(Options { http, latency: NEVER }).await;
    app.register(PIPELINE).await;
    let id = app.submit("slow").await;
    let url = app.url(&format!("/v1/runs/{id}/events"));
    let closed = reqwest::Client::builder()
        .no_proxy()
        .http2_prior_knowledge()
        .http2_initial_stream_window_size(0)
        .build()
        .expect("a client");
    let request = closed.get(&url).bearer_auth(&app.viewer).header("accept", "text/event-stream");
    let held = request.send().await.expect("its head needs no window");
    assert_eq!((held.status().as_u16(), held.version()), (200, http::Version::HTTP_2));

    let reopened = async {
        loop {
            let request = app.request(Method::GET, &format!("/v1/runs/{id}/events"));
            let answer = request.header("accept", "text/event-stream").send().await.expect("an answer");
            match answer.status().as_u16() {
                200 => return,
                429 => tokio::time::sleep(Duration::from_millis(50)).await,
                status => panic!("{status}"),
            }
        }
    };
    tokio::time::timeout(LONG, reopened).await.expect("its place is given to another");
    drop(held);
}

#[tokio::test]
async fn a_client_of_http_2_that_reads_sees_every_event() {
    let app = TestApp::spawn(Options { http: config(), ..Options::default() }).await;
    app.register(PIPELINE).await;
    let id = app.submit("quick").await;
    let client = reqwest::Client::builder().no_proxy().http2_prior_knowledge().build().expect("a client");
    let request = client.get(app.url(&format!("/v1/runs/{id}/events"))).bearer_auth(&app.viewer);
    let answer = request.header("accept", "text/event-stream").send().await.expect("an answer");
    let events = parse_sse(&answer.text().await.expect("a clean end"));
    assert!(events.iter().enumerate().all(|(index, event)| event.id == index as u64 + 1), "{events:?}");
    assert_eq!(events.last().map(|event| event.name.as_str()), Some("run.finished"));
}

#[tokio::test]
async fn a_tenant_that_has_every_stream_gives_some_to_another_that_asks() {
    let app = TestApp::spawn(Options { http: HttpConfig { max_event_streams: 8, ..config() }, latency: NEVER }).await;
    let mut runs = Vec::new();
    for key in [&app.admin, &app.stranger] {
        let register = app.http.post(app.url("/v1/pipelines")).bearer_auth(key);
        let register = register.header("content-type", "text/yaml").body(PIPELINE).send().await.expect("an answer");
        assert_eq!(register.status(), 201);
        let body = serde_json::json!({ "pipeline": "two-steps", "input": { "brief": "b" } });
        let run = app.send(app.http.post(app.url("/v1/runs")).bearer_auth(key).json(&body)).await.body;
        runs.push(run["id"].as_str().expect("an id").to_owned());
    }
    let open = async |key: &str, run: &str| {
        let request = app.http.get(app.url(&format!("/v1/runs/{run}/events"))).bearer_auth(key);
        request.header("accept", "text/event-stream").send().await.expect("an answer")
    };
    let mut theirs = Vec::new();
    for _ in 0..8 {
        theirs.push(open(&app.viewer, &runs[0]).await);
        assert_eq!(theirs.last().expect("one").status(), 200, "alone, it may have all");
    }
    assert_eq!(open(&app.viewer, &runs[0]).await.status(), 429);
    let ours = [open(&app.stranger, &runs[1]).await, open(&app.stranger, &runs[1]).await];
    assert!(ours.iter().all(|answer| answer.status() == 200), "a quarter of them");
    assert_eq!(open(&app.stranger, &runs[1]).await.status(), 429, "and no more");
    for newest in theirs.drain(6..) {
        let text = tokio::time::timeout(LONG, newest.text()).await.expect("it ends").expect("a clean end");
        assert!(text.ends_with(": end of stream\n"), "{text}");
    }
}

#[tokio::test]
async fn a_tenant_that_has_every_stream_of_an_address_leaves_connections_to_others_behind_it() {
    let http = HttpConfig { max_connections_per_peer: Some(8), ..config() };
    let app = TestApp::spawn(Options { http, latency: NEVER }).await;
    app.register(PIPELINE).await;
    let id = app.submit("slow").await;
    let open = async |key: &str| {
        let request = app.http.get(app.url(&format!("/v1/runs/{id}/events"))).bearer_auth(key);
        request.header("accept", "text/event-stream").send().await.expect("an answer")
    };
    // Each over a connection of its own, as HTTP/1.1 needs it.
    let mut held = Vec::new();
    for _ in 0..12 {
        let answer = open(&app.viewer).await;
        match answer.status().as_u16() {
            200 => held.push(answer),
            429 => drop(answer.text().await.expect("a problem")),
            status => panic!("{status}"),
        }
    }
    assert_eq!(held.len(), 6, "three quarters of the connections");
    let others = reqwest::Client::builder().no_proxy().build().expect("a client");
    let request = others.get(app.url("/v1/runs")).bearer_auth(&app.stranger);
    assert_eq!(request.send().await.expect("an answer").status(), 200);
}
