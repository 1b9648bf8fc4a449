//! Gemini's generateContent.

use std::time::Duration;

use serde_json::{Value, json};
use stagegate_core::{Code, Usage};
use stagegate_llm::{config::ProviderKind, provider::Finish};
use stagegate_testkit::{
    FakeProvider,
    provider::{Reply, any},
};

use super::{Ask, KEY, at, full, only_call};

fn recorded() -> Value {
    json!({
        "candidates": [{
            "content": {
                "role": "model",
                "parts": [{ "text": "Thinking of Spain …", "thought": true }, { "text": "Mad" }, { "text": "rid." }]
            },
            "finishReason": "STOP",
            "index": 0
        }],
        "usageMetadata": {
            "promptTokenCount": 1019,
            "cachedContentTokenCount": 900,
            "candidatesTokenCount": 18,
            "thoughtsTokenCount": 192,
            "totalTokenCount": 1229,
            "promptTokensDetails": [{ "modality": "TEXT", "tokenCount": 1019 }]
        },
        "modelVersion": "gemini-2.5-flash",
        "responseId": "mAitaLmkHPPlz7IPvtfUqQ4"
    })
}

#[tokio::test]
async fn a_conversation_goes_out_and_comes_back_in_geminis_shape() {
    let fake = FakeProvider::start().await;
    fake.on(any()).respond(Reply::raw(recorded().to_string()));
    let answer = full().of(&at(&fake, ProviderKind::Gemini)).await.expect("an answer");

    assert_eq!((answer.content.as_str(), answer.finish), ("Madrid.", Finish::Stop));
    // The cached part is in the prompt's count; the thoughts are not in the candidates', but are billed as output.
    let usage = Usage {
        input_tokens: 119,
        cache_read_tokens: 900,
        output_tokens: 210,
        reasoning_tokens: 192,
        ..Usage::default()
    };
    assert_eq!(answer.usage, Some(usage));

    let call = only_call(&fake);
    assert_eq!(call.path, "/v1beta/models/model-1:generateContent");
    assert_eq!(call.query, None, "a key never stands in an address");
    assert_eq!(call.headers["x-goog-api-key"], KEY);
    assert_eq!(
        call.body,
        json!({
            "contents": [
                { "role": "user", "parts": [{ "text": "What is the capital of France?" }] },
                { "role": "model", "parts": [{ "text": "Paris." }] },
                { "role": "user", "parts": [{ "text": "And of Spain?" }] },
            ],
            "systemInstruction": { "parts": [{ "text": "Be brief." }] },
            "generationConfig": {
                "temperature": 0.5,
                "topP": 0.9,
                "maxOutputTokens": 300,
                "seed": 7,
                "stopSequences": ["END"],
            },
        })
    );
}

#[tokio::test]
async fn json_is_asked_for_by_schema_or_by_type() {
    let fake = FakeProvider::start().await;
    let provider = at(&fake, ProviderKind::Gemini);
    let schema = json!({ "type": "object", "required": ["a"], "properties": { "a": { "type": "integer" } } });
    let answer = Ask::user("Hi").json(Some(schema.clone())).of(&provider).await.expect("an answer");
    assert_eq!(serde_json::from_str::<Value>(&answer.content).expect("JSON"), json!({ "a": 1 }));
    Ask::user("Hi").json(None).of(&provider).await.expect("an answer");
    let calls = fake.calls();
    let by_schema = json!({ "responseMimeType": "application/json", "responseJsonSchema": schema });
    assert_eq!(calls[0].body["generationConfig"], by_schema);
    assert_eq!(calls[1].body["generationConfig"], json!({ "responseMimeType": "application/json" }));
}

#[tokio::test]
async fn a_models_name_cannot_leave_its_place_in_the_address() {
    let fake = FakeProvider::start().await;
    let provider = at(&fake, ProviderKind::Gemini);
    Ask::user("Hi").model("models/gemini-2.5-flash").of(&provider).await.expect("an answer");
    let _ = Ask::user("Hi").model("../../evil?key=1#x").of(&provider).await;
    let calls = fake.calls();
    assert_eq!(calls[0].path, "/v1beta/models/gemini-2.5-flash:generateContent");
    assert_eq!(calls[1].path, "/v1beta/models/..%2F..%2Fevil%3Fkey=1%23x:generateContent");
}

#[tokio::test]
async fn each_end_is_told_apart() {
    let fake = FakeProvider::start().await;
    let provider = at(&fake, ProviderKind::Gemini);
    for (reason, finish) in [
        ("STOP", Finish::Stop),
        ("MAX_TOKENS", Finish::Length),
        ("SAFETY", Finish::Refused),
        ("RECITATION", Finish::Refused),
        ("BLOCKLIST", Finish::Refused),
        ("PROHIBITED_CONTENT", Finish::Refused),
        ("SPII", Finish::Refused),
        ("MALFORMED_FUNCTION_CALL", Finish::other("MALFORMED_FUNCTION_CALL")),
    ] {
        let mut body = recorded();
        body["candidates"][0]["finishReason"] = json!(reason);
        if finish != Finish::Stop {
            body["candidates"][0]["content"] = json!({});
        }
        fake.on(any()).once(Reply::raw(body.to_string()));
        let answer = Ask::user("Hi").of(&provider).await.expect("an answer");
        assert_eq!(answer.finish, finish, "{reason}");
        assert!(answer.usage.is_some());
    }
}

#[tokio::test]
async fn a_blocked_prompt_is_a_200_without_candidates_and_a_refusal() {
    let fake = FakeProvider::start().await;
    let body = json!({
        "promptFeedback": { "blockReason": "PROHIBITED_CONTENT" },
        "usageMetadata": { "promptTokenCount": 7, "totalTokenCount": 7 },
        "modelVersion": "gemini-2.5-flash"
    });
    fake.on(any()).respond(Reply::raw(body.to_string()));
    let error = Ask::user("Hi").of(&at(&fake, ProviderKind::Gemini)).await.expect_err("refused");
    assert_eq!((error.code, error.retryable), (Code::ProviderRefused, false));
    assert!(error.detail.as_ref().is_some_and(|words| words.contains("PROHIBITED_CONTENT")), "{error:?}");
    assert_eq!(error.usage.map(|usage| usage.input_tokens), Some(7));
}

#[tokio::test]
async fn an_answer_that_is_not_of_the_shape_is_malformed_and_worth_another_try() {
    let fake = FakeProvider::start().await;
    let provider = at(&fake, ProviderKind::Gemini);
    let mut no_parts = recorded();
    no_parts["candidates"][0]["content"] = json!({ "role": "model" });
    no_parts["usageMetadata"]["thoughtsTokenCount"] = json!(0);
    let no_parts = no_parts.to_string();
    let bodies = ["", "{", "[]", "{}", r#"{"candidates":[]}"#].map(|body| (body, false));
    // A prompt can bring these about: the model answers.
    for (body, answered) in bodies.into_iter().chain([(no_parts.as_str(), true)]) {
        fake.on(any()).once(Reply::raw(body));
        let error = Ask::user("Hi").of(&provider).await.expect_err("malformed");
        assert_eq!((error.code, error.retryable, error.answered), (Code::ProviderMalformed, true, answered), "{body}");
    }
}

#[tokio::test]
async fn usage_that_was_not_told_is_not_made_up() {
    let fake = FakeProvider::start().await;
    fake.on(any()).respond(Reply::text("Madrid.").without_usage());
    let answer = Ask::user("Hi").of(&at(&fake, ProviderKind::Gemini)).await.expect("an answer");
    assert_eq!((answer.content.as_str(), answer.usage), ("Madrid.", None));
}

#[expect(clippy::needless_pass_by_value, reason = "cases read better")]
fn told(code: u16, status: &str, message: &str, details: Value) -> String {
    json!({ "error": { "code": code, "message": message, "status": status, "details": details } }).to_string()
}

fn quota(ids: &[&str]) -> Value {
    let violations: Vec<Value> = ids
        .iter()
        .map(|id| json!({ "quotaMetric": "generativelanguage.googleapis.com/generate_content", "quotaId": id }))
        .collect();
    json!({ "@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": violations })
}

#[tokio::test]
async fn each_error_has_its_code_and_only_what_may_pass_is_retryable() {
    let fake = FakeProvider::start().await;
    let provider = at(&fake, ProviderKind::Gemini);
    let invalid_key = json!([{ "@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID" }]);
    let bad_key = "API key not valid. Please pass a valid API key.";
    let minute = json!([quota(&["GenerateRequestsPerMinutePerProjectPerModel-FreeTier"])]);
    let day =
        json!([quota(&["GenerateRequestsPerMinutePerProjectPerModel", "GenerateRequestsPerDayPerProjectPerModel"])]);
    let none = || json!([]);
    for (status, body, code, retryable) in [
        (400, told(400, "INVALID_ARGUMENT", bad_key, none()), Code::ProviderAuth, false),
        (400, told(400, "INVALID_ARGUMENT", "?", invalid_key), Code::ProviderAuth, false),
        (400, told(400, "INVALID_ARGUMENT", "Unknown name \"x\"", none()), Code::ProviderRejected, false),
        (
            400,
            told(400, "FAILED_PRECONDITION", "User location is not supported", none()),
            Code::ProviderRejected,
            false,
        ),
        (401, told(401, "UNAUTHENTICATED", "no credentials", none()), Code::ProviderAuth, false),
        (403, told(403, "PERMISSION_DENIED", "blocked", none()), Code::ProviderAuth, false),
        (404, told(404, "NOT_FOUND", "models/gemini-9 is not found", none()), Code::ProviderModel, false),
        (429, told(429, "RESOURCE_EXHAUSTED", "Resource has been exhausted", none()), Code::ProviderRateLimited, true),
        (
            429,
            told(429, "RESOURCE_EXHAUSTED", "You exceeded your current quota", minute),
            Code::ProviderRateLimited,
            true,
        ),
        (429, told(429, "RESOURCE_EXHAUSTED", "You exceeded your current quota", day), Code::ProviderQuota, false),
        (500, told(500, "INTERNAL", "An internal error has occurred", none()), Code::ProviderFailed, true),
        (503, told(503, "UNAVAILABLE", "The model is overloaded", none()), Code::ProviderFailed, true),
        (504, told(504, "DEADLINE_EXCEEDED", "too slow", none()), Code::ProviderFailed, true),
        (502, String::new(), Code::ProviderFailed, true),
        // In a list, and inside a 200.
        (503, format!("[{}]", told(503, "UNAVAILABLE", "overloaded", none())), Code::ProviderFailed, true),
        (200, told(503, "UNAVAILABLE", "overloaded", none()), Code::ProviderFailed, true),
    ] {
        fake.on(any()).once(Reply::status(status, body.clone()));
        let error = Ask::user("Hi").of(&provider).await.expect_err("an error");
        assert_eq!((error.code, error.retryable), (code, retryable), "{status} {body}");
    }
}

#[tokio::test]
async fn a_wait_is_heard_in_the_header_and_in_the_details() {
    let fake = FakeProvider::start().await;
    let provider = at(&fake, ProviderKind::Gemini);
    let info = |delay: &str| json!({ "@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay });
    let limited = |details: Value| Reply::status(429, told(429, "RESOURCE_EXHAUSTED", "slow down", details));
    let minute = quota(&["GenerateContentInputTokensPerModelPerMinute"]);
    for (reply, wait) in [
        (limited(json!([minute, info("34s")])), Some(Duration::from_secs(34))),
        (limited(json!([info("34.074824224s")])), Some(Duration::from_secs_f64(34.074_824_224))),
        (limited(json!([info("34s")])).header("retry-after", "5"), Some(Duration::from_secs(5))),
        (limited(json!([])), None),
    ] {
        fake.on(any()).once(reply);
        let error = Ask::user("Hi").of(&provider).await.expect_err("limited");
        assert_eq!((error.code, error.retry_after), (Code::ProviderRateLimited, wait));
    }
}
