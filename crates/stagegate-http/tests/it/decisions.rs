//! What a person decides about a held output: comments, edited outputs, and how they are kept and told.

use serde_json::{Value, json};
use stagegate_core::{Clock as _, SystemClock};

use crate::app::{HELD, TestApp, spawn_app};

/// Submits a run of the pipeline, and waits until its first stage is held; the run's id.
async fn held(app: &TestApp, pipeline: &str) -> String {
    let accepted = app.post("/v1/runs", &json!({ "pipeline": pipeline, "input": {} })).await;
    let id = accepted.body["id"].as_str().expect("an id").to_owned();
    let mut cursor = String::new();
    loop {
        let page = app.get(&format!("/v1/runs/{id}/events?cursor={cursor}")).await.body;
        if page["items"].as_array().expect("events").iter().any(|event| event["type"] == "run.waiting") {
            return id;
        }
        cursor = page["next_cursor"].as_str().expect("a run that has not ended goes on").to_owned();
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn an_approval_takes_a_comment_and_an_edited_output_that_fits() {
    let app = spawn_app().await;
    app.register(HELD).await;
    let id = held(&app, "held").await;
    let approve = format!("/v1/runs/{id}/stages/draft/approve");
    let refused = app.post(&approve, &json!({ "output": "not it" })).await;
    refused.is_problem(422, "SG0215");
    assert_eq!(refused.paths(), ["output"]);
    assert!(refused.text.contains("contains"), "the check is named: {}", refused.text);
    app.post(&approve, &json!({ "output": { "a": 1 } })).await.is_problem(422, "SG0215");
    app.post(&approve, &json!({ "output": "x", "attempt": 7 })).await.is_problem(409, "SG0207");
    let edited = "here is a text that no answer has";
    let body = json!({ "attempt": 1, "comment": "the tone was off", "output": edited });
    assert_eq!(app.post(&approve, &body).await.status, 202);
    assert_eq!(app.finish(&id).await["state"], "succeeded");

    let stage = app.get(&format!("/v1/runs/{id}/stages/draft")).await.body;
    assert_eq!(stage["checkpoint"]["output"], edited);
    assert_eq!(stage["checkpoint"]["verdict"], "approved");
    assert_ne!(stage["attempts"][0]["output"], edited, "what was held is with its attempt");
    let decision = &stage["decisions"][0];
    let told = json!([decision["attempt"], decision["verdict"], decision["comment"], decision["edited"]]);
    assert_eq!(told, json!([1, "approved", "the tone was off", true]));
    assert!(decision["by"].as_str().is_some_and(|by| by.starts_with("key ")), "{decision}");
    let events = app.get(&format!("/v1/runs/{id}/events")).await;
    let of_event = events.body["items"].as_array().expect("events").iter().find(|event| event["decision"].is_object());
    assert_eq!(of_event.expect("an event")["decision"]["comment"], "the tone was off");
    assert!(!events.text.contains(edited), "events hold no output");
}

#[tokio::test]
async fn a_rejection_says_why_by_either_name() {
    let app = spawn_app().await;
    app.register(HELD).await;
    for (body, comment) in
        [(json!({ "reason": "off topic" }), "off topic"), (json!({ "comment": "too long" }), "too long")]
    {
        let id = held(&app, "held").await;
        let reject = format!("/v1/runs/{id}/stages/draft/reject");
        app.post(&reject, &json!({})).await.is_problem(400, "SG0001");
        app.post(&reject, &json!({ "reason": "a", "comment": "b" })).await.is_problem(400, "SG0001");
        assert_eq!(app.post(&reject, &body).await.status, 202);
        let finished = app.finish(&id).await;
        assert!(finished["failure"]["message"].as_str().is_some_and(|text| text.contains(comment)), "{finished}");
        let stage = app.get(&format!("/v1/runs/{id}/stages/draft")).await.body;
        let decision = &stage["decisions"][0];
        assert_eq!((&decision["verdict"], &decision["comment"]), (&json!("rejected"), &json!(comment)));
    }
}

#[tokio::test]
async fn unknown_keys_of_a_decision_are_refused_with_the_nearest_known_one() {
    let app = spawn_app().await;
    app.register(HELD).await;
    let id = held(&app, "held").await;
    let decide =
        async |action: &str, body: Value| app.post(&format!("/v1/runs/{id}/stages/draft/{action}"), &body).await;
    for (action, body, path) in [
        ("approve", json!({ "ouput": "x" }), "ouput"),
        ("approve", json!({ "reason": "x" }), "reason"),
        ("reject", json!({ "reason": "x", "output": "y" }), "output"),
    ] {
        let refused = decide(action, body).await;
        refused.is_problem(400, "SG0001");
        assert_eq!(refused.paths(), [path]);
    }
    for body in [json!({ "comment": "" }), json!({ "comment": "x".repeat(2_001) }), json!({ "comment": "nul\u{0}" })] {
        decide("approve", body).await.is_problem(400, "SG0001");
    }
    assert_eq!(decide("approve", json!({ "comment": null, "output": null, "attempt": null })).await.status, 202);
    assert_eq!(app.finish(&id).await["state"], "succeeded");
    let stage = app.get(&format!("/v1/runs/{id}/stages/draft")).await.body;
    assert_eq!((&stage["decisions"][0]["comment"], &stage["decisions"][0]["edited"]), (&Value::Null, &json!(false)));
}

#[tokio::test]
async fn a_purge_removes_an_edited_output_as_it_removes_every_other() {
    let app = spawn_app().await;
    app.register(HELD).await;
    let id = held(&app, "held").await;
    let edited = "an edit with a text that no answer has";
    let approve = format!("/v1/runs/{id}/stages/draft/approve");
    assert_eq!(app.post(&approve, &json!({ "output": edited })).await.status, 202);
    app.finish(&id).await;
    let run = id.parse().expect("an id");
    assert_eq!(app.store.purge(&[run], SystemClock.now()).await.expect("purged"), 1);
    for path in [format!("/v1/runs/{id}"), format!("/v1/runs/{id}/stages/draft"), format!("/v1/runs/{id}/events")] {
        let left = app.get(&path).await;
        assert!(left.status == 200 && !left.text.contains("an edit"), "{path}: {}", left.text);
    }
}
