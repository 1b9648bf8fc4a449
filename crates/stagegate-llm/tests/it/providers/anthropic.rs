//! Anthropic's Messages.

use std::time::Duration;

use serde_json::{Value, json};
use stagegate_core::{Code, Usage, pipeline::Role};
use stagegate_llm::{
    config::ProviderKind,
    provider::{Finish, Limits},
};
use stagegate_testkit::{
    FakeProvider,
    provider::{Reply, any},
};

use super::{Ask, KEY, Wait, at, full, message, only_call};

fn recorded() -> Value {
    json!({
        "id": "msg_01XFDUDYJgAACzvnptvVoYEL",
        "type": "message",
        "role": "assistant",
        "model": "claude-haiku-4-5-20251001",
        "content": [
            { "type": "thinking", "thinking": "Spain …", "signature": "EqQB" },
            { "type": "text", "text": "Mad" },
            { "type": "text", "text": "rid." }
        ],
        "stop_reason": "end_turn",
        "stop_sequence": null,
        "usage": {
            "input_tokens": 119,
            "cache_creation_input_tokens": 50,
            "cache_read_input_tokens": 900,
            "output_tokens": 210,
            "service_tier": "standard"
        }
    })
}

#[tokio::test]
async fn a_conversation_goes_out_and_comes_back_in_anthropics_shape() {
    let fake = FakeProvider::start().await;
    fake.on(any()).respond(
        Reply::raw(recorded().to_string())
            .header("anthropic-ratelimit-requests-remaining", "49")
            .header("anthropic-ratelimit-tokens-remaining", "50000"),
    );
    let answer = full().of(&at(&fake, ProviderKind::Anthropic)).await.expect("an answer");

    assert_eq!((answer.content.as_str(), answer.finish), ("Madrid.", Finish::Stop));
    // Anthropic's input tokens leave out what its cache gave and took.
    let usage = Usage {
        input_tokens: 119,
        cache_read_tokens: 900,
        cache_write_tokens: 50,
        output_tokens: 210,
        ..Usage::default()
    };
    assert_eq!(answer.usage, Some(usage));
    assert_eq!(answer.limits, Limits { requests_remaining: Some(49), tokens_remaining: Some(50_000) });

    let call = only_call(&fake);
    assert_eq!(call.path, "/v1/messages");
    assert_eq!(call.headers["x-api-key"], KEY);
    assert_eq!(call.headers["anthropic-version"], "2023-06-01");
    assert!(!call.headers.contains_key("authorization"));
    assert_eq!(
        call.body,
        json!({
            "model": "model-1",
            "max_tokens": 300,
            "messages": [
                { "role": "user", "content": "What is the capital of France?" },
                { "role": "assistant", "content": "Paris." },
                { "role": "user", "content": "And of Spain?" },
            ],
            "system": "Be brief.",
            "temperature": 0.5,
            "top_p": 0.9,
            "stop_sequences": ["END"],
        })
    );
}

#[tokio::test]
async fn roles_alternate_and_the_user_begins() {
    let fake = FakeProvider::start().await;
    let provider = at(&fake, ProviderKind::Anthropic);
    let mut ask = Ask::user("one");
    ask.messages.extend([
        message(Role::User, "two"),
        message(Role::System, "late words"),
        message(Role::User, "three"),
        message(Role::Assistant, "  "),
        message(Role::Assistant, "four\n"),
    ]);
    ask.of(&provider).await.expect("an answer");
    ask.messages = vec![message(Role::Assistant, "Hi"), message(Role::User, "x")];
    let refused = ask.of(&provider).await.expect_err("nothing is put before what was said");
    assert_eq!((refused.code, refused.retryable), (Code::ProviderRejected, false));
    assert!(refused.message.contains("begin `messages` with `role: user`"), "{refused}");

    let calls = fake.calls();
    assert_eq!(
        calls[0].body["messages"],
        json!([{ "role": "user", "content": "one\n\ntwo\n\nthree" }, { "role": "assistant", "content": "four" }])
    );
    assert_eq!(calls[0].body["system"], "late words");
    assert_eq!(calls[0].body["max_tokens"], 4096, "Anthropic demands a limit");
    assert_eq!(calls.len(), 1, "what is refused is not sent");
}

#[tokio::test]
async fn an_object_is_the_input_of_a_forced_tool() {
    let fake = FakeProvider::start().await;
    let schema = json!({ "type": "object", "required": ["a"], "properties": { "a": { "type": "integer" } } });
    let ask = Ask::user("Hi").json(Some(schema.clone()));
    let answer = ask.of(&at(&fake, ProviderKind::Anthropic)).await.expect("an answer");
    assert_eq!(serde_json::from_str::<Value>(&answer.content).expect("JSON"), json!({ "a": 1 }));
    assert_eq!(answer.finish, Finish::Stop);

    let body = only_call(&fake).body;
    assert_eq!(body["tools"][0]["name"], "answer");
    assert_eq!(body["tools"][0]["input_schema"], schema);
    assert_eq!(body["tool_choice"], json!({ "type": "tool", "name": "answer", "disable_parallel_tool_use": true }));
    assert_eq!(body.get("system"), None);
}

#[tokio::test]
async fn json_that_no_tool_can_carry_is_asked_for_in_words() {
    let fake = FakeProvider::start().await;
    let provider = at(&fake, ProviderKind::Anthropic);
    let union = json!({ "type": "object", "anyOf": [{ "required": ["a"] }, { "required": ["b"] }] });
    for schema in [None, Some(json!({ "type": "array", "items": { "type": "integer" } })), Some(union)] {
        fake.on(any()).once(Reply::text("[1]"));
        let answer = Ask::user("Hi").json(schema.clone()).of(&provider).await.expect("an answer");
        assert_eq!(answer.content, "[1]");
        let body = fake.calls().pop().expect("a call").body;
        assert_eq!(body.get("tools"), None);
        let system = body["system"].as_str().expect("a system prompt");
        assert!(system.starts_with("Answer with one JSON value"), "{system}");
        assert_eq!(system.contains("JSON Schema"), schema.is_some());
    }
}

#[tokio::test]
async fn a_model_that_cannot_be_forced_is_asked_in_words_at_once_and_remembered() {
    let fake = FakeProvider::start().await;
    let provider = at(&fake, ProviderKind::Anthropic);
    let refusal =
        told("invalid_request_error", "tool_choice: type \"tool\" and \"any\" are not supported for this model.");
    let forced = std::sync::Arc::new(|call: &stagegate_testkit::provider::Call| call.body.get("tools").is_some());
    fake.on(forced).respond(Reply::status(400, refusal));
    fake.on(any()).respond(Reply::text(r#"{"a":1}"#));
    let ask = Ask::user("Hi").json(Some(json!({ "type": "object", "properties": { "a": { "type": "integer" } } })));

    assert_eq!(ask.of(&provider).await.expect("an answer").content, r#"{"a":1}"#);
    assert_eq!(fake.call_count(), 2);
    ask.of(&provider).await.expect("an answer");
    assert_eq!(fake.call_count(), 3, "the refusal is not met twice");
    // Another model is still forced first.
    ask.clone().model("model-2").of(&provider).await.expect("an answer");
    assert_eq!(fake.call_count(), 5);
}

#[tokio::test]
async fn each_end_is_told_apart() {
    let fake = FakeProvider::start().await;
    let provider = at(&fake, ProviderKind::Anthropic);
    for (stop_reason, finish) in [
        (json!("end_turn"), Finish::Stop),
        (json!("stop_sequence"), Finish::Stop),
        (json!("max_tokens"), Finish::Length),
        (json!("model_context_window_exceeded"), Finish::ContextFull),
        (json!("pause_turn"), Finish::Paused),
        (json!("tool_use"), Finish::Stop),
        (json!("something_new"), Finish::other("something_new")),
        (json!("words that may quote"), Finish::other("")),
        (json!("refusal"), Finish::Refused),
        (Value::Null, Finish::Stop),
    ] {
        let mut body = recorded();
        body["stop_reason"] = stop_reason;
        fake.on(any()).once(Reply::raw(body.to_string()));
        assert_eq!(Ask::user("Hi").of(&provider).await.expect("an answer").finish, finish);
    }
}

#[tokio::test]
async fn usage_that_was_not_told_is_not_made_up() {
    let fake = FakeProvider::start().await;
    fake.on(any()).respond(Reply::text("Madrid.").without_usage());
    let answer = Ask::user("Hi").of(&at(&fake, ProviderKind::Anthropic)).await.expect("an answer");
    assert_eq!((answer.content.as_str(), answer.usage), ("Madrid.", None));
}

#[tokio::test]
async fn an_answer_that_is_not_of_the_shape_is_malformed_and_worth_another_try() {
    let fake = FakeProvider::start().await;
    let provider = at(&fake, ProviderKind::Anthropic);
    for body in ["", "{", "[]", "{}", r#"{"content":"text"}"#] {
        fake.on(any()).once(Reply::raw(body));
        let error = Ask::user("Hi").of(&provider).await.expect_err("malformed");
        assert_eq!((error.code, error.retryable), (Code::ProviderMalformed, true), "{body}");
    }
}

fn told(kind: &str, message: &str) -> String {
    json!({ "type": "error", "error": { "type": kind, "message": message }, "request_id": "req_011CSHoEeqs5" })
        .to_string()
}

#[tokio::test]
async fn each_error_has_its_code_and_only_what_may_pass_is_retryable() {
    let fake = FakeProvider::start().await;
    let provider = at(&fake, ProviderKind::Anthropic);
    let credit = "Your credit balance is too low to access the Anthropic API. Please go to Plans & Billing.";
    let spent = "You have reached your specified API usage limits. You will regain access on 2026-12-01 at 00:00 UTC.";
    for (status, body, code, retryable) in [
        (400, told("invalid_request_error", "messages: roles must alternate"), Code::ProviderRejected, false),
        (400, told("invalid_request_error", credit), Code::ProviderQuota, false),
        (400, told("invalid_request_error", spent), Code::ProviderQuota, false),
        (401, told("authentication_error", "invalid x-api-key"), Code::ProviderAuth, false),
        (402, told("billing_error", "payment required"), Code::ProviderQuota, false),
        (403, told("permission_error", "not allowed"), Code::ProviderAuth, false),
        (404, told("not_found_error", "model: claude-9"), Code::ProviderModel, false),
        (413, told("request_too_large", "too large"), Code::ProviderRejected, false),
        (429, told("rate_limit_error", "slow down"), Code::ProviderRateLimited, true),
        (500, told("api_error", "Internal server error"), Code::ProviderFailed, true),
        (504, told("timeout_error", "timed out"), Code::ProviderFailed, true),
        (529, told("overloaded_error", "Overloaded"), Code::ProviderFailed, true),
        (503, "upstream connect error".to_owned(), Code::ProviderFailed, true),
        // Inside a 200.
        (200, told("overloaded_error", "Overloaded"), Code::ProviderFailed, true),
        (200, told("some_new_error", "?"), Code::ProviderFailed, true),
    ] {
        fake.on(any()).once(Reply::status(status, body.clone()));
        let error = Ask::user("Hi").of(&provider).await.expect_err("an error");
        assert_eq!((error.code, error.retryable), (code, retryable), "{status} {body}");
    }
}

#[tokio::test]
async fn a_wait_is_heard_in_every_form() {
    let fake = FakeProvider::start().await;
    let provider = at(&fake, ProviderKind::Anthropic);
    let reset = [
        ("date", "Tue, 27 Jan 2026 12:00:00 GMT"),
        ("anthropic-ratelimit-requests-remaining", "0"),
        ("anthropic-ratelimit-requests-reset", "2026-01-27T12:00:30Z"),
        ("anthropic-ratelimit-tokens-remaining", "50000"),
        ("anthropic-ratelimit-tokens-reset", "2026-01-27T12:00:01Z"),
    ];
    let cases: [Wait<'_>; 3] = [
        (&[("retry-after", "41")], Some(Duration::from_secs(41))),
        (&reset, Some(Duration::from_secs(30))),
        (&[], None),
    ];
    for (headers, wait) in cases {
        let limited = Reply::status(429, told("rate_limit_error", "slow down"));
        fake.on(any()).once(headers.iter().fold(limited, |reply, (name, value)| reply.header(name, value)));
        let error = Ask::user("Hi").of(&provider).await.expect_err("limited");
        assert_eq!((error.code, error.retry_after), (Code::ProviderRateLimited, wait), "{headers:?}");
    }
    fake.on(any()).once(Reply::status(529, told("overloaded_error", "Overloaded")).header("retry-after", "3"));
    let error = Ask::user("Hi").of(&provider).await.expect_err("overloaded");
    assert_eq!(error.retry_after, Some(Duration::from_secs(3)));
}
