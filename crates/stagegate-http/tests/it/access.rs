//! Who may call: keys, roles, tenants, and the guard of an open daemon.

use std::time::Duration;

use http::Method;
use serde_json::json;
use stagegate_core::{Clock as _, Code, SystemClock, store::Role};
use stagegate_http::{
    App,
    config::{AuthMode, HttpConfig},
};
use stagegate_telemetry::Metrics;
use tokio::net::TcpListener;

use crate::app::{HELD, Options, PIPELINE, TestApp, new_key, spawn_app};

#[tokio::test]
async fn without_a_valid_key_nothing_of_the_api_answers() {
    let app = spawn_app().await;
    for key in [None, Some("sg_unknown"), Some("not-a-key")] {
        for (method, path) in [(Method::GET, "/v1/runs"), (Method::POST, "/v1/pipelines"), (Method::POST, "/v1/plan")] {
            let mut request = app.http.request(method, app.url(path));
            if let Some(key) = key {
                request = request.bearer_auth(key);
            }
            let answer = app.send(request).await;
            answer.is_problem(401, "SG0010");
            assert!(answer.header("www-authenticate").starts_with("Bearer"));
        }
    }
    let by_header = app.http.get(app.url("/v1/runs")).header("x-api-key", &app.viewer);
    assert_eq!(app.send(by_header).await.status, 200);
}

#[tokio::test]
async fn a_peer_that_fails_too_often_waits_and_keeps_no_right_key_of_its_address_out() {
    let http = HttpConfig { auth: AuthMode::Keys, max_auth_failures_per_minute: 5, ..HttpConfig::default() };
    let app = TestApp::spawn(Options { http, ..Options::default() }).await;
    let call = async |key: &str| app.send(app.http.get(app.url("/v1/runs")).bearer_auth(key)).await;
    call("sg_wrong").await.is_problem(401, "SG0010");
    // What is known to be wrong, and what has not the form of a key, is refused without the store.
    app.stalling.hang(true);
    for _ in 0..2 {
        call("sg_wrong").await.is_problem(401, "SG0010");
        call("of-another-form").await.is_problem(401, "SG0010");
    }
    for key in ["sg_wrong", "of-another-form"] {
        let refused = call(key).await;
        refused.is_problem(429, "SG0014");
        assert!(refused.header("retry-after").parse::<u64>().is_ok_and(|seconds| (1..=60).contains(&seconds)));
    }
    app.send(app.http.get(app.url("/v1/runs"))).await.is_problem(401, "SG0010");
    app.stalling.hang(false);
    // None of these keys was ever in use here, as after a restart.
    for key in [&app.viewer, &app.stranger] {
        assert_eq!(call(key).await.status, 200);
    }
    call("sg_made_up").await.is_problem(401, "SG0010");
    call("sg_made_up").await.is_problem(429, "SG0014");
}

#[tokio::test]
async fn a_flood_of_made_up_keys_does_not_keep_a_right_key_of_the_same_address_out() {
    let app = spawn_app().await;
    let call = async |key: String| app.send(app.http.get(app.url("/v1/runs")).bearer_auth(key)).await.status.as_u16();
    let flood = (0..300).map(|n| call(format!("sg_{n}")));
    let (flood, right) = futures::join!(futures::future::join_all(flood), call(app.stranger.clone()));
    assert_eq!(right, 200);
    assert!(flood.iter().all(|status| *status == 401), "each was looked up: {flood:?}");
}

#[tokio::test]
async fn expired_and_revoked_keys_are_refused() {
    let app = spawn_app().await;
    let now = SystemClock.now();
    let (expired, _) = new_key(&app.store, "acme", Role::Admin, 50, Some(now - Duration::from_secs(1))).await;
    let (lasting, _) = new_key(&app.store, "acme", Role::Admin, 51, Some(now + Duration::from_hours(1))).await;
    let (revoked, id) = new_key(&app.store, "acme", Role::Admin, 52, None).await;
    assert!(app.store.revoke_key(id, now).await.expect("stored"));
    let call = async |key: &str| app.send(app.http.get(app.url("/v1/runs")).bearer_auth(key)).await;
    call(&expired).await.is_problem(401, "SG0010");
    call(&revoked).await.is_problem(401, "SG0010");
    assert_eq!(call(&lasting).await.status, 200);
}

#[tokio::test]
async fn a_revocation_is_obeyed_though_the_key_was_in_use() {
    let app = spawn_app().await;
    let (key, id) = new_key(&app.store, "acme", Role::Viewer, 53, None).await;
    let call = async || app.send(app.http.get(app.url("/v1/runs")).bearer_auth(&key)).await.status;
    assert_eq!(call().await, 200);
    app.store.revoke_key(id, SystemClock.now()).await.expect("stored");
    // Obeyed once what is remembered of the key has run out; a test that hangs here has found otherwise.
    while call().await != 401 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_role_may_do_what_it_says_and_no_more() {
    let app = spawn_app().await;
    app.register(PIPELINE).await;
    let run = app.submit("a brief").await;
    let submit = json!({ "pipeline": "two-steps", "input": { "brief": "b" } });
    let purge = json!({ "scope": "tenant" });
    let cancel = format!("/v1/runs/{run}/cancel");
    let send = async |key: &str, path: &str, body: &serde_json::Value| {
        app.send(app.http.post(app.url(path)).bearer_auth(key).json(body)).await
    };
    send(&app.viewer, "/v1/runs", &submit).await.is_problem(403, "SG0011");
    send(&app.viewer, &cancel, &json!({})).await.is_problem(403, "SG0011");
    send(&app.viewer, "/v1/cache/invalidate", &purge).await.is_problem(403, "SG0011");
    send(&app.operator, "/v1/cache/invalidate", &purge).await.is_problem(403, "SG0011");
    let register = app.http.post(app.url("/v1/pipelines")).bearer_auth(&app.operator);
    app.send(register.header("content-type", "text/yaml").body(HELD)).await.is_problem(403, "SG0011");
    assert_eq!(send(&app.viewer, "/v1/plan", &submit).await.status, 200);
    assert_eq!(send(&app.operator, "/v1/runs", &submit).await.status, 202);
    assert_eq!(send(&app.admin, "/v1/cache/invalidate", &purge).await.status, 200);
}

#[tokio::test]
async fn tenants_are_walls() {
    let app = spawn_app().await;
    app.register(PIPELINE).await;
    let run = app.submit("ours").await;
    app.finish(&run).await;
    let theirs = async |method: Method, path: String| {
        app.send(app.http.request(method, app.url(&path)).bearer_auth(&app.stranger)).await
    };
    for path in ["/v1/pipelines", "/v1/runs"] {
        assert_eq!(theirs(Method::GET, path.to_owned()).await.body["items"], json!([]));
    }
    for path in ["", "/events", "/stages/first"] {
        let answer = theirs(Method::GET, format!("/v1/runs/{run}{path}")).await;
        answer.is_problem(404, "SG0203");
        assert!(!answer.text.contains("acme") && !answer.text.contains("two-steps"), "{}", answer.text);
    }
    for path in ["/cancel", "/retry", "/stages/first/approve"] {
        theirs(Method::POST, format!("/v1/runs/{run}{path}")).await.is_problem(404, "SG0203");
    }
    theirs(Method::GET, "/v1/pipelines/two-steps".to_owned()).await.is_problem(404, "SG0201");
    theirs(Method::GET, "/v1/pipelines/two-steps/versions/1".to_owned()).await.is_problem(404, "SG0201");
    let stream = app.http.get(app.url(&format!("/v1/runs/{run}/events"))).header("accept", "text/event-stream");
    app.send(stream.bearer_auth(&app.stranger)).await.is_problem(404, "SG0203");
    let submit = app.http.post(app.url("/v1/runs")).bearer_auth(&app.stranger);
    let submit = submit.json(&json!({ "pipeline": "two-steps", "input": { "brief": "b" } }));
    app.send(submit).await.is_problem(404, "SG0201");
    // The same idempotency key is another one in another tenant.
    let with_key = |key: &str| {
        let body = json!({ "pipeline": "two-steps", "input": { "brief": key } });
        app.http.post(app.url("/v1/runs")).bearer_auth(key).header("idempotency-key", "same").json(&body)
    };
    assert_eq!(app.send(with_key(&app.admin)).await.status, 202);
    app.send(with_key(&app.stranger)).await.is_problem(404, "SG0201");
}

#[tokio::test]
async fn the_replicas_and_the_queue_count_ones_own_runs_alone() {
    let app = TestApp::spawn(Options { latency: Duration::from_mins(5), ..Options::default() }).await;
    app.register(PIPELINE).await;
    let run = app.submit("ours").await;
    let read = async |key: &str, path: &str| app.send(app.http.get(app.url(path)).bearer_auth(key)).await.body;
    let replicas = read(&app.viewer, "/v1/replicas").await;
    let [replica] = replicas["items"].as_array().expect("a list").as_slice() else { panic!("{replicas}") };
    assert_eq!((&replica["runs"], &replica["alive"], &replica["draining"]), (&json!(1), &json!(true), &json!(false)));
    assert!(replica["oldest_lease_ms"].is_u64() && replica["heartbeat_age_ms"].is_u64(), "{replica}");
    let queue = read(&app.viewer, "/v1/queue").await;
    assert_eq!((&queue["running"], &queue["pipelines"][0]["pipeline"]), (&json!(1), &json!("two-steps")), "{queue}");
    let theirs = read(&app.stranger, "/v1/replicas").await;
    assert_eq!((&theirs["items"][0]["runs"], &theirs["items"][0]["oldest_lease_ms"]), (&json!(0), &json!(null)));
    let theirs = read(&app.stranger, "/v1/queue").await;
    assert_eq!((&theirs["running"], &theirs["pipelines"]), (&json!(0), &json!([])), "{theirs}");
    app.post_empty(&format!("/v1/runs/{run}/cancel")).await;
    app.finish(&run).await;
}

#[tokio::test]
async fn only_an_admin_of_its_tenant_deletes_a_run_and_only_once_it_has_ended() {
    let app = spawn_app().await;
    app.register(HELD).await;
    let submitted = app.post("/v1/runs", &json!({ "pipeline": "held", "input": {} })).await;
    let run = submitted.body["id"].as_str().expect("an id").to_owned();
    let path = format!("/v1/runs/{run}");
    let delete = async |key: &str| app.send(app.http.delete(app.url(&path)).bearer_auth(key)).await;
    delete(&app.viewer).await.is_problem(403, "SG0011");
    delete(&app.operator).await.is_problem(403, "SG0011");
    delete(&app.stranger).await.is_problem(404, "SG0203");
    delete(&app.admin).await.is_problem(409, "SG0207");
    app.post_empty(&format!("{path}/cancel")).await;
    app.finish(&run).await;
    delete(&app.operator).await.is_problem(403, "SG0011");
    assert_eq!(delete(&app.admin).await.status, 204);
    delete(&app.admin).await.is_problem(404, "SG0203");
    app.get(&path).await.is_problem(404, "SG0203");
}

fn open() -> Options {
    Options { http: HttpConfig { auth: AuthMode::Auto, ..HttpConfig::default() }, ..Options::default() }
}

#[tokio::test]
async fn an_embedded_daemon_on_loopback_is_open_to_this_machine_alone() {
    let app = TestApp::spawn(open()).await;
    let get = |host: &str| app.http.get(app.url("/v1/runs")).header("host", host);
    assert_eq!(app.send(app.http.get(app.url("/v1/runs"))).await.status, 200);
    assert_eq!(app.send(get("localhost:8080")).await.status, 200);
    app.send(get("rebound.example")).await.is_problem(403, "SG0011");
    let post = |origin: &str| {
        let request = app.http.post(app.url("/v1/pipelines")).header("content-type", "text/yaml");
        request.header("origin", origin.to_owned()).body(PIPELINE)
    };
    app.send(post("https://evil.example")).await.is_problem(403, "SG0011");
    app.send(post("null")).await.is_problem(403, "SG0011");
    assert_eq!(app.send(post("http://localhost:3000")).await.status, 201);
}

#[tokio::test]
async fn an_open_listener_beyond_loopback_is_refused() {
    let app = spawn_app().await;
    let listener = TcpListener::bind("0.0.0.0:0").await.expect("a port");
    let config = HttpConfig { auth: AuthMode::Open, ..HttpConfig::default() };
    let open = App {
        engine: app.engine.clone(),
        metrics: Metrics::new(),
        config,
        embedded: true,
        handlers: None,
        reads_max: 6,
    };
    let refused = stagegate_http::serve(open, listener, std::future::pending()).await.expect_err("refused");
    assert_eq!(refused.code, Code::OpenListener);
    assert!(refused.detail.contains("http.auth") && refused.detail.contains("keys create"), "{}", refused.detail);
}
