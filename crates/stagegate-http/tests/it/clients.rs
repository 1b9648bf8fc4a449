//! What other software relies on: how a form is asked for, how streams are framed, by which names pages go on, and where
//! the API lies behind a proxy.

use http::Method;
use serde_json::{Value, json};
use stagegate_core::{Clock as _, SystemClock};
use stagegate_http::config::{AuthMode, HttpConfig};

use crate::app::{Options, PIPELINE, TestApp, spawn_app};

async fn finished_run(app: &TestApp) -> String {
    app.register(PIPELINE).await;
    let id = app.submit("something").await;
    app.finish(&id).await;
    id
}

#[tokio::test]
async fn the_form_of_events_is_chosen_by_the_rules_of_accept() {
    let app = spawn_app().await;
    let path = format!("/v1/runs/{}/events", finished_run(&app).await);
    let (json, stream) = ("application/json", "text/event-stream");
    for (accept, expected) in [
        ("TEXT/EVENT-STREAM", stream),
        ("text/event-stream;q=0, application/json", json),
        ("application/json, text/event-stream;q=0.5", json),
        ("text/*", stream),
        ("*/*", json),
        ("text/html", json),
    ] {
        let answer = app.request(Method::GET, &path).header("accept", accept).send().await.expect("an answer");
        assert_eq!(answer.headers()["content-type"], expected, "{accept}");
        assert!(answer.headers()["vary"].to_str().expect("text").contains("accept"), "{accept}");
    }
}

/// By the letter of the standard nothing comes of a blank line without data; some clients make an event of it.
#[tokio::test]
async fn every_blank_line_of_a_stream_ends_an_event_with_data() {
    let app = spawn_app().await;
    let path = format!("/v1/runs/{}/events", finished_run(&app).await);
    let answer = app.request(Method::GET, &path).header("accept", "text/event-stream").send().await.expect("an answer");
    let text = answer.text().await.expect("a stream");
    let (blocks, rest) = text.rsplit_once("\n\n").expect("events");
    for block in blocks.split("\n\n") {
        assert_eq!(block.lines().filter(|line| line.starts_with("data: ")).count(), 1, "{block:?}");
    }
    assert!(text.starts_with("retry: 1000\nid: 1\n"), "{text}");
    assert!(rest.lines().all(|line| line.starts_with(':')), "{rest:?}");
}

#[tokio::test]
async fn events_page_by_the_names_of_every_list_and_by_their_old_ones() {
    let app = spawn_app().await;
    let id = finished_run(&app).await;
    let path = format!("/v1/runs/{id}/events");
    let whole = app.get(&path).await.body;
    assert_eq!((&whole["events"], &whole["finished"]), (&whole["items"], &json!(true)));
    assert_eq!(whole["next_cursor"], Value::Null);
    let (mut seen, mut cursor, mut after) = (Vec::new(), String::new(), 0);
    loop {
        let page = app.get(&format!("{path}?limit=3&cursor={cursor}")).await.body;
        let old = app.get(&format!("{path}?limit=3&after={after}")).await.body;
        assert_eq!((&page["items"], &page["next_after"]), (&old["events"], &old["next_after"]));
        seen.extend(page["items"].as_array().expect("items").clone());
        after = old["next_after"].as_u64().expect("a number");
        match page["next_cursor"].as_str() {
            Some(next) => next.clone_into(&mut cursor),
            None => break,
        }
        assert!(app.get(&format!("{path}?cursor={cursor}")).await.body.get("events").is_none());
    }
    assert_eq!(Value::from(seen), whole["items"]);
    let both = app.get(&format!("{path}?cursor={cursor}&after=0")).await.body;
    let seq = both["items"][0]["seq"].as_u64().expect("a number");
    assert!(seq > 1, "generated clients send the default of `after` beside a cursor: {both:#}");
    app.get(&format!("/v1/runs?cursor={cursor}")).await.is_problem(400, "SG0206");
    app.get(&format!("{path}?cursor=c1.0.0")).await.is_problem(400, "SG0206");
}

#[tokio::test]
async fn a_time_is_refused_in_our_words_and_shown_as_it_is_stored() {
    let app = spawn_app().await;
    app.register(PIPELINE).await;
    let submit = async |start_at: Value| {
        app.post("/v1/runs", &json!({ "pipeline": "two-steps", "input": { "brief": "b" }, "start_at": start_at })).await
    };
    for wrong in [json!("tomorrow"), json!("2027-01-01"), json!("2027-01-01T00:00:00"), json!("")] {
        let refused = submit(wrong.clone()).await;
        refused.is_problem(400, "SG0001");
        assert_eq!(refused.paths(), ["start_at"]);
        assert!(refused.text.contains("2026-11-05T13:00:00Z"), "{wrong}: {}", refused.text);
    }
    let soon = SystemClock.now() + chrono::TimeDelta::hours(1);
    let precise = soon.to_rfc3339_opts(chrono::SecondsFormat::Nanos, true);
    let accepted = submit(json!(precise)).await;
    assert_eq!(accepted.status, 202, "{}", accepted.text);
    let id = accepted.body["id"].as_str().expect("an id");
    let read = app.get(&format!("/v1/runs/{id}")).await.body;
    for field in ["start_at", "created_at", "deadline_at", "labels", "priority", "state", "links"] {
        assert_eq!(accepted.body[field], read[field], "{field}");
    }
    let refused = app.get("/v1/runs?created_from=yesterday").await;
    refused.is_problem(400, "SG0208");
    assert!(refused.text.contains("2026-11-05T13:00:00Z"), "{}", refused.text);
}

fn open(change: impl FnOnce(&mut HttpConfig)) -> Options {
    let mut http = HttpConfig { auth: AuthMode::Open, ..HttpConfig::default() };
    change(&mut http);
    Options { http, ..Options::default() }
}

#[tokio::test]
async fn probes_answer_whatever_host_they_are_called_by_and_a_refusal_says_how_to_allow_one() {
    let app = TestApp::spawn(open(|_| {})).await;
    let get = async |path: &str, host: &str| app.send(app.http.get(app.url(path)).header("host", host)).await;
    for path in ["/healthz", "/readyz", "/health", "/metrics"] {
        assert_eq!(get(path, "stagegate.default.svc:8080").await.status, 200, "{path}");
    }
    let refused = get("/v1/runs", "nas.lan:8080").await;
    refused.is_problem(403, "SG0011");
    for part in ["`nas.lan`", "localhost", "http.allowed_hosts", "http.auth"] {
        assert!(refused.text.contains(part), "{part} in {}", refused.text);
    }
    let app = TestApp::spawn(open(|http| http.allowed_hosts = vec!["nas.lan".to_owned()])).await;
    let get = async |host: &str| app.send(app.http.get(app.url("/v1/runs")).header("host", host)).await.status;
    for (host, status) in [("NAS.lan:8080", 200), ("localhost", 200), ("other.lan", 403)] {
        assert_eq!(get(host).await, status, "{host}");
    }
}

#[tokio::test]
async fn below_a_base_path_every_link_leads_where_a_proxy_takes_it() {
    let base = "/tools/gate".to_owned().try_into().expect("a base path");
    let app = TestApp::spawn(open(|http| http.base_path = base)).await;
    let get = async |path: &str| app.http.get(app.url(path)).send().await.expect("an answer");
    let post = async |path: &str, kind: &str, body: String| {
        let request = app.http.post(app.url(path)).header("content-type", kind).body(body);
        request.send().await.expect("an answer")
    };
    // A proxy may cut the base path off, or not.
    for cut in ["", "/tools/gate"] {
        let registered = post(&format!("{cut}/v1/pipelines"), "application/yaml", PIPELINE.to_owned()).await;
        assert!(registered.status().is_success());
        let location = registered.headers()["location"].to_str().expect("text").to_owned();
        assert_eq!(location, "/tools/gate/v1/pipelines/two-steps/versions/1");
        assert_eq!(get(&location).await.status(), 200);
        let run = json!({ "pipeline": "two-steps", "input": { "brief": "b" } }).to_string();
        let accepted = post(&format!("{cut}/v1/runs"), "application/json", run).await;
        let location = accepted.headers()["location"].to_str().expect("text").to_owned();
        let run: Value = accepted.json().await.expect("JSON");
        assert_eq!(run["links"]["self"], location);
        let detail: Value = get(&location).await.json().await.expect("JSON");
        let stages = detail["stages"].as_array().expect("stages").iter().map(|stage| &stage["links"]["self"]);
        let links = ["self", "events", "pipeline"].map(|name| &detail["links"][name]);
        for link in links.into_iter().chain(stages) {
            let link = link.as_str().expect("a link");
            assert!(link.starts_with("/tools/gate/v1/"), "{link}");
            assert_eq!(get(link).await.status(), 200, "{link}");
        }
        assert_eq!(get(&format!("{cut}/healthz")).await.status(), 200);
    }
    let document: Value = get("/tools/gate/openapi.json").await.json().await.expect("JSON");
    assert_eq!(document["servers"][0]["url"], "/tools/gate");
    let docs = get("/tools/gate").await;
    assert!(docs.status() == 200 && docs.url().path() == "/tools/gate/docs/", "{}", docs.url());
    let script = get("/tools/gate/docs/swagger-initializer.js").await.text().await.expect("text");
    assert!(script.contains("/tools/gate/openapi.json"), "{script}");
}
