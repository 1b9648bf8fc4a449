//! OpenAI's chat completions.

use std::time::Duration;

use serde_json::{Value, json};
use stagegate_core::{Code, Usage};
use stagegate_llm::{
    config::{LlmConfig, ProviderKind},
    provider::{Finish, Limits},
};
use stagegate_testkit::{
    FakeProvider,
    provider::{Reply, any},
};

use super::{Ask, KEY, Wait, at, build, config, full, only_call};

fn recorded() -> Value {
    json!({
        "id": "chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT",
        "object": "chat.completion",
        "created": 1_741_569_952,
        "model": "gpt-5-mini-2025-08-07",
        "choices": [{
            "index": 0,
            "message": { "role": "assistant", "content": "Madrid.", "refusal": null, "annotations": [] },
            "logprobs": null,
            "finish_reason": "stop"
        }],
        "usage": {
            "prompt_tokens": 1019,
            "completion_tokens": 210,
            "total_tokens": 1229,
            "prompt_tokens_details": { "cached_tokens": 900, "audio_tokens": 0 },
            "completion_tokens_details": { "reasoning_tokens": 192, "audio_tokens": 0 }
        },
        "service_tier": "default",
        "system_fingerprint": null
    })
}

#[tokio::test]
async fn a_conversation_goes_out_and_comes_back_in_openais_shape() {
    let fake = FakeProvider::start().await;
    fake.on(any()).respond(
        Reply::raw(recorded().to_string())
            .header("x-ratelimit-remaining-requests", "4999")
            .header("x-ratelimit-remaining-tokens", "149984"),
    );
    let answer = full().of(&at(&fake, ProviderKind::Openai)).await.expect("an answer");

    assert_eq!((answer.content.as_str(), answer.finish), ("Madrid.", Finish::Stop));
    let usage = answer.usage.expect("usage");
    // Cached tokens are a part of OpenAI's prompt tokens; our classes are disjoint.
    assert_eq!(
        usage,
        Usage {
            input_tokens: 119,
            cache_read_tokens: 900,
            output_tokens: 210,
            reasoning_tokens: 192,
            ..Usage::default()
        }
    );
    assert_eq!(answer.limits, Limits { requests_remaining: Some(4999), tokens_remaining: Some(149_984) });

    let call = only_call(&fake);
    assert_eq!((call.path.as_str(), call.query.as_deref()), ("/v1/chat/completions", None));
    assert_eq!(call.headers["authorization"], format!("Bearer {KEY}"));
    assert_eq!(call.headers["user-agent"], concat!("stagegate/", env!("CARGO_PKG_VERSION")));
    assert_eq!(call.headers["content-type"], "application/json");
    assert_eq!(
        call.body,
        json!({
            "model": "model-1",
            "messages": [
                { "role": "system", "content": "Be brief." },
                { "role": "user", "content": "What is the capital of France?" },
                { "role": "assistant", "content": "Paris." },
                { "role": "user", "content": "And of Spain?" },
            ],
            "max_tokens": 300,
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": 7,
            "stop": ["END"],
        })
    );
}

#[tokio::test]
async fn what_is_not_asked_for_is_not_sent() {
    let fake = FakeProvider::start().await;
    Ask::user("Hi").of(&at(&fake, ProviderKind::Openai)).await.expect("an answer");
    assert_eq!(only_call(&fake).body, json!({ "model": "model-1", "messages": [{ "role": "user", "content": "Hi" }] }));
}

#[tokio::test]
async fn json_is_asked_for_by_schema_or_as_any_object() {
    let fake = FakeProvider::start().await;
    let provider = at(&fake, ProviderKind::Openai);
    let schema = json!({ "type": "object", "required": ["a"], "properties": { "a": { "type": "integer" } } });
    let answer = Ask::user("Hi").json(Some(schema.clone())).of(&provider).await.expect("an answer");
    assert_eq!(serde_json::from_str::<Value>(&answer.content).expect("JSON"), json!({ "a": 1 }));
    Ask::user("Hi").json(None).of(&provider).await.expect("an answer");

    let calls = fake.calls();
    assert_eq!(
        calls[0].body["response_format"],
        json!({ "type": "json_schema", "json_schema": { "name": "answer", "schema": schema, "strict": false } })
    );
    assert_eq!(calls[1].body["response_format"], json!({ "type": "json_object" }));
}

#[tokio::test]
async fn a_server_of_ones_own_needs_no_key() {
    let fake = FakeProvider::start().await;
    let mut llm = LlmConfig::default();
    let mut local = config(ProviderKind::Openai);
    // Without a path, `/v1` is meant.
    local.base_url = Some(format!("http://{}/", fake.address()));
    llm.providers.insert("local".to_owned(), local);
    let provider = build(&llm, "local");
    assert!(provider.is_configured());
    Ask::user("Hi").of(&provider).await.expect("an answer");
    assert!(!only_call(&fake).headers.contains_key("authorization"));
}

#[tokio::test]
async fn an_answer_that_a_compatible_server_broke_off_is_no_answer() {
    for reason in ["error", "abort", "cancelled", "time_limit", "insufficient_system_resource"] {
        let fake = FakeProvider::start().await;
        let mut body = recorded();
        body["choices"][0]["finish_reason"] = json!(reason);
        fake.on(any()).once(Reply::raw(body.to_string()));
        let error = Ask::user("Hi").of(&at(&fake, ProviderKind::Openai)).await.expect_err(reason);
        assert_eq!((error.code, error.retryable), (Code::ProviderMalformed, true), "{reason}");
        assert!(error.usage.is_some(), "what came is paid for");
    }
}

#[tokio::test]
async fn each_end_is_told_apart() {
    let fake = FakeProvider::start().await;
    let provider = at(&fake, ProviderKind::Openai);
    let refusal = json!({ "role": "assistant", "content": null, "refusal": "I can't help with that." });
    let message = |content: Value| json!({ "role": "assistant", "content": content });
    let thoughtful = json!({ "role": "assistant", "content": null, "reasoning_content": "Spain …" });
    for (message, finish_reason, content, finish) in [
        (message(json!("Mad")), "length", "Mad", Finish::Length),
        (message(Value::Null), "length", "", Finish::Length),
        (message(json!("")), "content_filter", "", Finish::Refused),
        (refusal, "stop", "I can't help with that.", Finish::Refused),
        (message(json!("")), "stop", "", Finish::Silent),
        (thoughtful, "stop", "", Finish::Silent),
        (Value::Null, "length", "", Finish::Length),
        (Value::Null, "content_filter", "", Finish::Refused),
        (message(json!("Madrid.")), "EOS", "Madrid.", Finish::Stop),
        (message(json!("Mad")), "model_length", "Mad", Finish::ContextFull),
        (message(json!("Mad")), "pause_turn", "Mad", Finish::Paused),
        (message(json!("Mad")), "something_new", "Mad", Finish::other("something_new")),
        (message(json!("Madrid.")), "tool_calls", "Madrid.", Finish::Stop),
        (message(Value::Null), "tool_calls", "", Finish::other("tool_calls")),
        (
            message(json!([{ "type": "text", "text": "Mad" }, { "type": "text", "text": "rid" }])),
            "stop",
            "Madrid",
            Finish::Stop,
        ),
    ] {
        let mut body = recorded();
        body["choices"][0]["message"] = message;
        body["choices"][0]["finish_reason"] = json!(finish_reason);
        fake.on(any()).once(Reply::raw(body.to_string()));
        let answer = Ask::user("Hi").of(&provider).await.expect("an answer");
        assert_eq!((answer.content.as_str(), answer.finish), (content, finish));
        assert!(answer.usage.is_some());
    }
}

#[tokio::test]
async fn usage_that_was_not_told_is_not_made_up() {
    let fake = FakeProvider::start().await;
    fake.on(any()).respond(Reply::text("Madrid.").without_usage());
    let answer = Ask::user("Hi").of(&at(&fake, ProviderKind::Openai)).await.expect("an answer");
    assert_eq!((answer.content.as_str(), answer.usage), ("Madrid.", None));
}

#[tokio::test]
async fn an_answer_that_is_not_of_the_shape_is_malformed_and_worth_another_try() {
    let fake = FakeProvider::start().await;
    let provider = at(&fake, ProviderKind::Openai);
    let mut no_content = recorded();
    no_content["choices"][0]["message"]["content"] = Value::Null;
    no_content["usage"]["completion_tokens_details"]["reasoning_tokens"] = json!(0);
    let no_content = no_content.to_string();
    for body in ["", "{", "<html>", "[]", "null", "{}", r#"{"choices":[]}"#, r#"{"choices":[{}]}"#, &no_content] {
        fake.on(any()).once(Reply::raw(body));
        let error = Ask::user("Hi").of(&provider).await.expect_err("malformed");
        assert_eq!((error.code, error.retryable), (Code::ProviderMalformed, true), "{body}");
        // What was paid is told even so.
        assert_eq!(error.usage.is_some(), body == no_content, "{body}");
    }
}

#[expect(clippy::needless_pass_by_value, reason = "cases read better")]
fn told(message: &str, kind: &str, code: Value) -> String {
    json!({ "error": { "message": message, "type": kind, "param": null, "code": code } }).to_string()
}

#[tokio::test]
async fn each_error_has_its_code_and_only_what_may_pass_is_retryable() {
    let fake = FakeProvider::start().await;
    let provider = at(&fake, ProviderKind::Openai);
    let key = "Incorrect API key provided: sk-test-************. You can find your API key at …";
    let quota = "You exceeded your current quota, please check your plan and billing details.";
    let cases = [
        (401, told(key, "invalid_request_error", json!("invalid_api_key")), Code::ProviderAuth, false),
        (
            403,
            told(
                "Country, region, or territory not supported",
                "request_forbidden",
                json!("unsupported_country_region_territory"),
            ),
            Code::ProviderAuth,
            false,
        ),
        (
            404,
            told("The model `gpt-9` does not exist", "invalid_request_error", json!("model_not_found")),
            Code::ProviderModel,
            false,
        ),
        (404, "page not found".to_owned(), Code::ProviderModel, false),
        (
            400,
            told("Unsupported value: 'temperature'", "invalid_request_error", json!("unsupported_value")),
            Code::ProviderRejected,
            false,
        ),
        (
            400,
            told(
                "This model's maximum context length is 128000 tokens.",
                "invalid_request_error",
                json!("context_length_exceeded"),
            ),
            Code::ProviderRejected,
            false,
        ),
        (
            400,
            told("The response was filtered", "invalid_request_error", json!("content_filter")),
            Code::ProviderRefused,
            false,
        ),
        (413, String::new(), Code::ProviderRejected, false),
        (422, r#"{"error":"wrong","detail":[]}"#.to_owned(), Code::ProviderRejected, false),
        (
            429,
            told("Rate limit reached for gpt-5-mini", "requests", json!("rate_limit_exceeded")),
            Code::ProviderRateLimited,
            true,
        ),
        (429, told(quota, "insufficient_quota", json!("insufficient_quota")), Code::ProviderQuota, false),
        (429, String::new(), Code::ProviderRateLimited, true),
        (402, told("Insufficient credits", "billing", json!(402)), Code::ProviderQuota, false),
        (408, String::new(), Code::ProviderFailed, true),
        (409, String::new(), Code::ProviderFailed, true),
        (500, told("The server had an error", "server_error", Value::Null), Code::ProviderFailed, true),
        (502, "<html>Bad gateway</html>".to_owned(), Code::ProviderFailed, true),
        (503, told("The engine is currently overloaded", "server_error", Value::Null), Code::ProviderFailed, true),
        (529, String::new(), Code::ProviderFailed, true),
        (302, String::new(), Code::ProviderRejected, false),
    ];
    for (status, body, code, retryable) in cases {
        fake.on(any()).once(Reply::status(status, body.clone()).header("location", "http://127.0.0.1:1/"));
        let error = Ask::user("Hi").of(&provider).await.expect_err("an error");
        assert_eq!((error.code, error.retryable), (code, retryable), "{status} {body}");
        assert!(error.message.starts_with(&format!("answered {status} ")) || status == 302, "{}", error.message);
    }
    assert_eq!(fake.call_count(), 20, "no redirect was followed and nothing was retried here");
}

#[tokio::test]
async fn an_error_inside_a_200_is_an_error() {
    let fake = FakeProvider::start().await;
    let provider = at(&fake, ProviderKind::Openai);
    let choice =
        json!({ "choices": [{ "error": { "code": 502, "message": "upstream died" }, "finish_reason": "error" }] });
    for (body, code, retryable) in [
        (told("overloaded", "server_error", Value::Null), Code::ProviderFailed, true),
        (told("slow down", "", json!(429)), Code::ProviderRateLimited, true),
        (told("no money", "", json!("insufficient_quota")), Code::ProviderQuota, false),
        (told("bad", "invalid_request_error", Value::Null), Code::ProviderRejected, false),
        (r#"{"error":"boom"}"#.to_owned(), Code::ProviderFailed, true),
        (choice.to_string(), Code::ProviderFailed, true),
    ] {
        fake.on(any()).once(Reply::raw(body.clone()));
        let error = Ask::user("Hi").of(&provider).await.expect_err("an error");
        assert_eq!((error.code, error.retryable), (code, retryable), "{body}");
    }
    // An explicit null is no error.
    let mut fine = recorded();
    fine["error"] = Value::Null;
    fake.on(any()).once(Reply::raw(fine.to_string()));
    Ask::user("Hi").of(&provider).await.expect("an answer");
}

#[tokio::test]
async fn a_wait_is_heard_in_every_form() {
    let fake = FakeProvider::start().await;
    let provider = at(&fake, ProviderKind::Openai);
    let day = [("date", "Sun, 06 Nov 2044 08:49:37 GMT"), ("retry-after", "Sun, 06 Nov 2044 08:49:49 GMT")];
    let tokens_gone = [
        ("x-ratelimit-remaining-requests", "10"),
        ("x-ratelimit-remaining-tokens", "0"),
        ("x-ratelimit-reset-requests", "20ms"),
        ("x-ratelimit-reset-tokens", "6m0s"),
    ];
    let cases: [Wait<'_>; 7] = [
        (&[("retry-after", "20")], Some(Duration::from_secs(20))),
        (&[("retry-after", "1.5")], Some(Duration::from_millis(1_500))),
        (&[("retry-after-ms", "350"), ("retry-after", "1")], Some(Duration::from_millis(350))),
        (&day, Some(Duration::from_secs(12))),
        (&tokens_gone, Some(Duration::from_mins(6))),
        (&[("x-ratelimit-reset-requests", "20ms")], Some(Duration::from_millis(20))),
        (&[], None),
    ];
    for (headers, wait) in cases {
        let limited = Reply::status(429, told("Rate limit reached", "tokens", json!("rate_limit_exceeded")));
        fake.on(any()).once(headers.iter().fold(limited, |reply, (name, value)| reply.header(name, value)));
        let error = Ask::user("Hi").of(&provider).await.expect_err("limited");
        assert_eq!((error.code, error.retry_after), (Code::ProviderRateLimited, wait), "{headers:?}");
    }
    // A quota that is used up is not waited for, whatever the header says.
    let quota = told("You exceeded your current quota", "insufficient_quota", json!("insufficient_quota"));
    fake.on(any()).once(Reply::status(429, quota).header("retry-after", "1"));
    let error = Ask::user("Hi").of(&provider).await.expect_err("no quota");
    assert_eq!((error.retryable, error.retry_after), (false, None));
}

#[tokio::test]
async fn limits_are_told_on_errors_too() {
    let fake = FakeProvider::start().await;
    fake.on(any()).respond(Reply::status(429, "{}").header("x-ratelimit-remaining-requests", "0"));
    let error = Ask::user("Hi").of(&at(&fake, ProviderKind::Openai)).await.expect_err("limited");
    assert_eq!(error.limits, Limits { requests_remaining: Some(0), tokens_remaining: None });
}
