//! Runs, from their submission to their end.

use std::time::Duration;

use futures::StreamExt as _;
use http::Method;
use serde_json::{Value, json};
use stagegate_core::{Clock as _, SystemClock};
use stagegate_engine::config::{EngineConfig, TenantLimits};
use stagegate_http::config::{AuthMode, HttpConfig};

use crate::app::{HELD, Options, PIPELINE, TestApp, parse_sse, spawn_app};

#[tokio::test]
async fn a_run_is_accepted_followed_and_read() {
    let app = spawn_app().await;
    app.register(PIPELINE).await;
    let body = json!({ "pipeline": "two-steps", "input": { "brief": "a brief" }, "labels": { "team": "core" } });
    let accepted = app.send(app.request(Method::POST, "/v1/runs").header("x-request-id", "req-7").json(&body)).await;
    assert_eq!(accepted.status, 202, "{}", accepted.text);
    let id = accepted.body["id"].as_str().expect("an id");
    assert_eq!(accepted.header("location"), format!("/v1/runs/{id}"));
    assert_eq!((accepted.header("x-request-id"), &accepted.body["request_id"]), ("req-7", &json!("req-7")));

    let events = app.stream(&format!("/v1/runs/{id}/events"), None).await;
    assert_eq!(events.iter().map(|event| event.id).collect::<Vec<_>>(), (1..=events.len() as u64).collect::<Vec<_>>());
    assert!(events.iter().all(|event| event.data["type"] == event.name && event.data["seq"] == event.id));
    assert_eq!((events[0].name.as_str(), events.last().expect("last").name.as_str()), ("run.accepted", "run.finished"));

    let run = app.get(&format!("/v1/runs/{id}")).await.body;
    assert_eq!((&run["state"], &run["stages_done"]), (&json!("succeeded"), &json!(2)), "{run:#}");
    assert_eq!(run["input"], json!({ "brief": "a brief" }));
    assert!(run["output"].is_object() || run["output"].is_string(), "{run:#}");
    let stages: Vec<&Value> = run["stages"].as_array().expect("stages").iter().map(|stage| &stage["id"]).collect();
    assert_eq!(stages, ["first", "second"]);
    assert_eq!(run["stages"][1]["needs"], json!(["first"]));

    let stage = app.get(&format!("/v1/runs/{id}/stages/second")).await.body;
    assert_eq!((&stage["state"], &stage["checkpoint"]["verdict"]), (&json!("succeeded"), &json!("passed")));
    assert_eq!(stage["attempts"][0]["calls"][0]["purpose"], "stage");
    assert_eq!(stage["attempts_total"], 1);
}

#[tokio::test]
async fn stages_that_have_not_begun_are_shown_too() {
    let app = TestApp::spawn(Options { latency: Duration::from_hours(1), ..Options::default() }).await;
    app.register(PIPELINE).await;
    let id = app.submit("slow").await;
    let run = app.get(&format!("/v1/runs/{id}")).await;
    assert_eq!(run.body["stages"].as_array().map(Vec::len), Some(2));
    assert_eq!(run.body["stages"][1]["state"], "pending");
    assert_eq!((run.header("etag"), &run.body["output"]), ("", &Value::Null));
    let stage = app.get(&format!("/v1/runs/{id}/stages/second")).await.body;
    assert_eq!(
        (&stage["state"], &stage["attempts"], &stage["checkpoint"]),
        (&json!("pending"), &json!([]), &Value::Null)
    );
}

#[tokio::test]
async fn a_stream_goes_on_after_the_last_event_without_gap_or_repetition() {
    let app = spawn_app().await;
    app.register(PIPELINE).await;
    let id = app.submit("a brief").await;
    let path = format!("/v1/runs/{id}/events");
    // The first connection is cut after its third event, while the run goes on.
    let request = app.request(Method::GET, &path).header("accept", "text/event-stream");
    let mut stream = request.send().await.expect("an answer").bytes_stream();
    let mut text = String::new();
    while parse_sse(&text).len() < 3 {
        let chunk = stream.next().await.expect("not the end").expect("a chunk");
        text.push_str(std::str::from_utf8(&chunk).expect("UTF-8"));
    }
    drop(stream);
    let seen: Vec<u64> = parse_sse(&text).iter().map(|event| event.id).collect();
    let last = *seen.last().expect("three events");
    let rest: Vec<u64> = app.stream(&path, Some(last)).await.iter().map(|event| event.id).collect();
    let all: Vec<u64> = seen.into_iter().chain(rest).collect();
    let last_seq = app.get(&format!("/v1/runs/{id}")).await.body["last_seq"].as_u64().expect("a number");
    assert_eq!(all, (1..=last_seq).collect::<Vec<_>>());
    assert!(text.starts_with("retry: "), "{text}");

    // By query instead of by header; and at the end there is nothing to stream.
    let from_query = app.stream(&format!("{path}?after=2"), None).await;
    assert_eq!(from_query[0].id, 3);
    let request = app.request(Method::GET, &path).header("accept", "text/event-stream");
    let answer = app.send(request.header("last-event-id", last_seq.to_string())).await;
    assert_eq!((answer.status.as_u16(), answer.text.as_str()), (204, ""));
    let request = app.request(Method::GET, &path).header("last-event-id", "x");
    app.send(request).await.is_problem(400, "SG0001");
}

#[tokio::test]
async fn events_are_paged_as_json() {
    let app = spawn_app().await;
    app.register(PIPELINE).await;
    let id = app.submit("a brief").await;
    app.finish(&id).await;
    let (mut after, mut seqs) = (0, Vec::new());
    loop {
        let page = app.get(&format!("/v1/runs/{id}/events?limit=2&after={after}")).await;
        assert_eq!(page.status, 200, "{}", page.text);
        let events = page.body["events"].as_array().expect("events");
        assert!(events.len() <= 2);
        seqs.extend(events.iter().filter_map(|event| event["seq"].as_u64()));
        after = page.body["next_after"].as_u64().expect("a number");
        if page.body["finished"] == true {
            break;
        }
    }
    assert_eq!(seqs, (1..=after).collect::<Vec<_>>());
    app.get(&format!("/v1/runs/{id}/events?limit=0")).await.is_problem(400, "SG0208");
}

#[tokio::test]
async fn a_finished_run_is_not_sent_twice() {
    let app = spawn_app().await;
    app.register(PIPELINE).await;
    let id = app.submit("a brief").await;
    app.finish(&id).await;
    let path = format!("/v1/runs/{id}");
    let full = app.get(&path).await;
    let tag = full.header("etag").to_owned();
    assert!(!tag.is_empty());
    let again = app.send(app.request(Method::GET, &path).header("if-none-match", &tag)).await;
    assert_eq!((again.status.as_u16(), again.text.as_str()), (304, ""));
    let head = app.send(app.request(Method::HEAD, &path)).await;
    assert_eq!((head.status.as_u16(), head.text.as_str(), head.header("etag")), (200, "", tag.as_str()));
}

#[tokio::test]
async fn runs_are_listed_by_filters() {
    let app = spawn_app().await;
    app.register(PIPELINE).await;
    app.register(HELD).await;
    let mut ids = Vec::new();
    for team in ["core", "web", "core"] {
        let body =
            json!({ "pipeline": "two-steps", "input": { "brief": team }, "labels": { "team": team, "env": "t" } });
        ids.push(app.post("/v1/runs", &body).await.body["id"].as_str().expect("an id").to_owned());
    }
    for id in &ids {
        app.finish(id).await;
    }
    let list = async |query: &str| {
        let answer = app.get(&format!("/v1/runs?{query}")).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        let items = answer.body["items"].as_array().expect("items").clone();
        items.iter().map(|item| item["id"].as_str().expect("an id").to_owned()).collect::<Vec<_>>()
    };
    let newest_first = |indices: &[usize]| indices.iter().map(|index| ids[*index].clone()).collect::<Vec<_>>();
    assert_eq!(list("").await, newest_first(&[2, 1, 0]));
    assert_eq!(list("label=team:core&label=env:t").await, newest_first(&[2, 0]));
    assert_eq!(list("state=succeeded,failed&state=queued&pipeline=two-steps&version=1").await.len(), 3);
    assert!(list("pipeline=held").await.is_empty());
    assert!(list("state=failed").await.is_empty());
    assert!(list("created_before=2020-01-01T00:00:00Z").await.is_empty());
    assert_eq!(list("created_from=2020-01-01T00:00:00+02:00").await.len(), 3);
}

#[tokio::test]
async fn a_held_output_waits_for_a_person() {
    let app = spawn_app().await;
    app.register(HELD).await;
    let held = async || {
        let accepted = app.post("/v1/runs", &json!({ "pipeline": "held", "input": {} })).await;
        let id = accepted.body["id"].as_str().expect("an id").to_owned();
        let mut after = 0;
        loop {
            let page = app.get(&format!("/v1/runs/{id}/events?after={after}")).await.body;
            if page["events"].as_array().expect("events").iter().any(|event| event["type"] == "run.waiting") {
                return id;
            }
            after = page["next_after"].as_u64().expect("a number");
            tokio::task::yield_now().await;
        }
    };
    let id = held().await;
    app.post_empty(&format!("/v1/runs/{id}/stages/last/approve")).await.is_problem(409, "SG0207");
    app.post_empty(&format!("/v1/runs/{id}/retry")).await.is_problem(409, "SG0207");
    let approve = format!("/v1/runs/{id}/stages/draft/approve");
    let other = app.post(&approve, &json!({ "attempt": 2 })).await;
    other.is_problem(409, "SG0207");
    assert!(other.text.contains("attempt 1"), "{}", other.text);
    app.post(&approve, &json!({ "attempt": 0 })).await.is_problem(400, "SG0001");
    assert_eq!(app.post(&approve, &json!({ "attempt": 1 })).await.status, 202);
    assert_eq!(app.finish(&id).await["state"], "succeeded");
    app.post_empty(&format!("/v1/runs/{id}/cancel")).await.is_problem(409, "SG0207");

    let id = held().await;
    let reject = format!("/v1/runs/{id}/stages/draft/reject");
    app.post(&reject, &json!({ "reason": "" })).await.is_problem(400, "SG0001");
    app.post(&reject, &json!({ "reason": "no", "attempt": 7 })).await.is_problem(409, "SG0207");
    assert_eq!(app.post(&reject, &json!({ "reason": "not what was asked" })).await.status, 202);
    let finished = app.finish(&id).await;
    assert_eq!((&finished["state"], &finished["failure"]["code"]), (&json!("failed"), &json!("SG0306")));
    // A failed run can be tried again, and followed from where it ended.
    let ended_at = finished["seq"].as_u64().expect("a number");
    assert_eq!(app.post_empty(&format!("/v1/runs/{id}/retry")).await.status, 202);
    let again = app.get(&format!("/v1/runs/{id}/events?after={ended_at}")).await.body;
    assert_eq!(again["finished"], false, "{again:#}");
}

#[tokio::test]
async fn a_cancel_ends_a_run() {
    let app = TestApp::spawn(Options { latency: Duration::from_hours(1), ..Options::default() }).await;
    app.register(PIPELINE).await;
    let id = app.submit("slow").await;
    assert_eq!(app.post_empty(&format!("/v1/runs/{id}/cancel")).await.status, 202);
    assert_eq!(app.finish(&id).await["state"], "cancelled");
}

#[tokio::test]
async fn a_plan_tells_what_a_run_would_buy() {
    let app = spawn_app().await;
    app.register(PIPELINE).await;
    let by_name = json!({ "pipeline": "two-steps", "input": { "brief": "a brief" } });
    let before = app.post("/v1/plan", &by_name).await;
    assert_eq!(before.status, 200, "{}", before.text);
    assert_eq!(before.body["critical_path"], json!(["first", "second"]));
    let id = app.submit("a brief").await;
    app.finish(&id).await;
    let after = app.post("/v1/plan", &by_name).await.body;
    assert_eq!((&after["stages"][0]["outcome"], &after["tokens"]), (&json!("hit"), &json!(0)), "{after:#}");
    assert_eq!(
        app.post("/v1/cache/invalidate", &json!({ "scope": "pipeline", "pipeline": "two-steps" })).await.status,
        200
    );
    assert_eq!(app.post("/v1/plan", &by_name).await.body["stages"][0]["outcome"], "buy");
    // Of a definition that is not registered, as text or as an object.
    let by_text = json!({ "definition": PIPELINE.replace("two-steps", "other"), "input": { "brief": "b" } });
    assert_eq!(app.post("/v1/plan", &by_text).await.body["pipeline"], "other");
    let object = app.get("/v1/pipelines/two-steps").await.body["definition"].clone();
    let by_object = app.post("/v1/plan", &json!({ "definition": object, "input": { "brief": "b" } })).await;
    assert_eq!(by_object.status, 200, "{}", by_object.text);
    app.post("/v1/plan", &json!({ "definition": "name: x", "input": {} })).await.is_problem(422, "SG0100");
}

#[tokio::test]
async fn streams_are_limited_and_end_with_the_shutdown() {
    let http = HttpConfig { auth: AuthMode::Keys, max_event_streams: 1, ..HttpConfig::default() };
    let mut app = TestApp::spawn(Options { http, latency: Duration::from_hours(1) }).await;
    app.register(PIPELINE).await;
    let id = app.submit("slow").await;
    let follow = || app.request(Method::GET, &format!("/v1/runs/{id}/events")).header("accept", "text/event-stream");
    let mut open = follow().send().await.expect("an answer");
    let refused = app.send(follow()).await;
    refused.is_problem(429, "SG0007");
    assert!(!refused.header("retry-after").is_empty());
    let mut text = String::new();
    while !text.contains("run.accepted") {
        let chunk = open.chunk().await.expect("no error").expect("not the end");
        text.push_str(std::str::from_utf8(&chunk).expect("UTF-8"));
    }
    app.begin_shutdown();
    text.push_str(&open.text().await.expect("a clean end"));
    assert!(text.ends_with(": end of stream\n"), "{text}");
    app.ended().await;
    assert!(app.http.get(app.url("/healthz")).send().await.is_err(), "nobody listens any more");
}

#[tokio::test]
async fn a_delayed_run_waits_with_its_priority_until_its_time() {
    let app = spawn_app().await;
    app.register(PIPELINE).await;
    let body = json!({
        "pipeline": "two-steps", "input": { "brief": "b" }, "priority": -7, "start_at": "2126-01-01T00:00:00Z",
    });
    app.post("/v1/runs", &body).await.is_problem(422, "SG0212");
    let tomorrow = SystemClock.now() + chrono::TimeDelta::days(1);
    let mut body = body;
    body["start_at"] = json!(tomorrow);
    let answer = app.post("/v1/runs", &body).await;
    assert_eq!((answer.status.as_u16(), &answer.body["state"]), (202, &json!("queued")), "{}", answer.text);
    let run = answer.body["id"].as_str().expect("an id").to_owned();
    let read = app.get(&format!("/v1/runs/{run}")).await.body;
    assert_eq!((&read["priority"], &read["started_at"]), (&json!(-7), &json!(null)), "{read}");
    let start_at: chrono::DateTime<chrono::Utc> = read["start_at"].as_str().expect("a time").parse().expect("a time");
    assert_eq!(start_at.timestamp_millis(), tomorrow.timestamp_millis());
    assert_eq!(app.get("/v1/queue").await.body["waiting"], json!(1), "it could not be claimed now");
    app.post_empty(&format!("/v1/runs/{run}/cancel")).await;
    assert_eq!(app.finish(&run).await["state"], json!("cancelled"));
}

#[tokio::test]
async fn a_repeated_request_returns_its_run_even_if_it_would_be_refused_today() {
    let limits = TenantLimits { max_queued: 1, ..TenantLimits::default() };
    let engine = EngineConfig { max_runs: 0, tenant_defaults: limits, ..EngineConfig::default() };
    let app = TestApp::spawn_with(Options::default(), engine, None).await;
    app.register(PIPELINE).await;
    let submit = async |key: &str, brief: &str| {
        let body = json!({ "pipeline": "two-steps", "input": { "brief": brief } });
        app.send(app.request(Method::POST, "/v1/runs").header("idempotency-key", key).json(&body)).await
    };
    let first = submit("k", "a brief").await;
    assert_eq!(first.status, 202, "{}", first.text);
    let is_repeated = async || {
        let again = submit("k", "a brief").await;
        assert_eq!((again.status.as_u16(), &again.body["id"]), (202, &first.body["id"]), "{}", again.text);
        assert_eq!(again.header("idempotency-replayed"), "true");
        submit("k", "another brief").await.is_problem(409, "SG0205");
    };
    // The queue is full.
    let mut others = 0;
    while submit(&format!("other-{others}"), "a brief").await.status != 429 {
        others += 1;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    is_repeated().await;
    // A version came that takes no such input.
    app.register(STRICTER).await;
    submit("new", "a brief").await.is_problem(422, "SG0200");
    is_repeated().await;
    app.engine.drain(Duration::ZERO).await;
    submit("new", "a brief").await.is_problem(503, "SG0012");
    is_repeated().await;
}

const STRICTER: &str = "
name: two-steps
input: { type: object, required: [brief, more], properties: { brief: { type: string }, more: { type: string } } }
stages: [ { id: first, transform: 'x' } ]
";

#[tokio::test]
async fn refused_submits_with_a_key_take_turns_at_the_store_with_other_reads() {
    let app = spawn_app().await;
    app.register(PIPELINE).await;
    let known = json!({ "pipeline": "two-steps", "version": 1, "input": { "brief": "b" } });
    assert_eq!(app.post("/v1/runs", &known).await.status, 202);
    app.stalling.hang(true);
    let refused = (0..20).map(|n| {
        let body = json!({ "pipeline": "two-steps", "version": 1, "input": { "brief": 7 } });
        app.send(app.request(Method::POST, "/v1/runs").header("idempotency-key", format!("k{n}")).json(&body))
    });
    let full = async {
        while app.stalling.hung("replay") < 6 {
            tokio::task::yield_now().await;
        }
        // What comes later has come by then.
        for _ in 0..20 {
            assert_eq!(app.http.get(app.url("/healthz")).send().await.expect("an answer").status(), 200);
        }
        assert_eq!(app.stalling.hung("replay"), 6, "as many as may read at once");
        app.stalling.hang(false);
    };
    let (answers, ()) = futures::join!(futures::future::join_all(refused), full);
    for answer in answers {
        answer.is_problem(422, "SG0200");
    }
}
