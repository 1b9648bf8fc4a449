//! What servers say: bodies that no strict parser takes, and errors of every shape.

use serde_json::json;
use stagegate_core::Code;
use stagegate_llm::{config::ProviderKind, provider::Finish};
use stagegate_testkit::{
    FakeProvider,
    provider::{Reply, any},
};

use super::{Ask, at};

const VENDORS: [ProviderKind; 3] = [ProviderKind::Openai, ProviderKind::Anthropic, ProviderKind::Gemini];

/// An answer of each vendor with these texts in places of it.
fn answer(kind: ProviderKind, content: &str, beside: &str, tokens: &str) -> String {
    match kind {
        ProviderKind::Anthropic => format!(
            r#"{{"content":[{{"type":"text","text":"{content}"}}],"stop_reason":"end_turn","x":{beside},
                "usage":{{"input_tokens":{tokens},"output_tokens":{tokens}}}}}"#
        ),
        ProviderKind::Gemini => format!(
            r#"{{"candidates":[{{"content":{{"parts":[{{"text":"{content}"}}]}},"finishReason":"STOP","x":{beside}}}],
                "usageMetadata":{{"promptTokenCount":{tokens},"candidatesTokenCount":{tokens},"thoughtsTokenCount":{tokens}}}}}"#
        ),
        _ => format!(
            r#"{{"choices":[{{"message":{{"content":"{content}"}},"finish_reason":"stop","logprobs":{beside}}}],
                "usage":{{"prompt_tokens":{tokens},"completion_tokens":{tokens}}}}}"#
        ),
    }
}

#[tokio::test]
async fn a_paid_answer_is_read_whatever_stands_around_and_beside_it() {
    for kind in VENDORS {
        let fake = FakeProvider::start().await;
        let provider = at(&fake, kind);
        let plain = answer(kind, "Madrid.", "null", "7");
        for body in [
            format!("\u{feff}{plain}"),
            format!("\r\n\n {plain}\n\0"),
            answer(kind, "Madrid.", "[NaN, -Infinity, {\"y\": Infinity}]", "7"),
            answer(kind, "Madrid.", "\"\\ud83d\"", "7"),
            answer(kind, "Madrid.", "123456789012345678901234567890", "7.0"),
        ] {
            fake.on(any()).once(Reply::raw(body.clone()));
            let answer = Ask::user("Hi").of(&provider).await.unwrap_or_else(|error| panic!("{body}: {error:?}"));
            assert_eq!((answer.content.as_str(), &answer.finish), ("Madrid.", &Finish::Stop), "{body}");
            assert_eq!(answer.usage.expect("it is told").input_tokens, 7, "{body}");
        }
        fake.on(any()).once(Reply::raw(answer(kind, "Madrid \\ud83d", "null", "7")));
        assert_eq!(Ask::user("Hi").of(&provider).await.expect("an answer").content, "Madrid \u{fffd}");
    }
}

#[tokio::test]
async fn token_counts_at_the_end_of_the_range_are_taken_as_they_are_told() {
    for kind in VENDORS {
        let fake = FakeProvider::start().await;
        for tokens in ["18446744073709551615", "18446744073709551616", "1e300"] {
            fake.on(any()).once(Reply::raw(answer(kind, "Madrid.", "null", tokens)));
            let answer = Ask::user("Hi").of(&at(&fake, kind)).await.expect("an answer");
            assert_eq!(answer.usage.expect("it is told").output_tokens, u64::MAX, "{kind:?} {tokens}");
        }
    }
}

#[tokio::test]
async fn the_reason_is_told_in_whatever_shape_and_only_to_who_may_read_prompts() {
    for (status, body, words) in [
        (400, r#"{"detail": "the model is loading"}"#, "the model is loading"),
        (422, r#"{"detail": [{"loc": ["body", "model"], "msg": "field required"}]}"#, "body.model: field required"),
        (400, r#"{"errors": [{"message": "no such deployment"}]}"#, "no such deployment"),
        (400, r#"{"error": ["one", "two"]}"#, "one; two"),
        (200, r#"{"object": "error", "message": "out of memory", "code": 50001}"#, "out of memory"),
        (200, r#"{"detail": "out of memory"}"#, "out of memory"),
        (200, r#"{"error": "out of memory"}"#, "out of memory"),
        (502, "<html><head><title>nginx is out</title></head><body>…</body></html>", "nginx is out"),
        (503, "upstream connect error", "upstream connect error"),
    ] {
        for kind in VENDORS {
            let fake = FakeProvider::start().await;
            fake.on(any()).respond(Reply::status(status, body));
            let error = Ask::user("Hi").of(&at(&fake, kind)).await.expect_err("an error");
            assert_eq!(error.detail.as_deref(), Some(format!("vendor: {words}").as_str()), "{kind:?} {status} {body}");
            let place = format!("(POST 127.0.0.1:{}/v1", fake.address().port());
            assert!(error.message.starts_with(&format!("answered {status} ")), "{}", error.message);
            assert!(error.message.contains(&place) && !error.message.contains(words), "{}", error.message);
            // A gateway's page does not tell what the model charges; all others were refused, or failed.
            assert_eq!(error.unheard, status == 502, "{kind:?} {status} {body}");
            assert_eq!(
                error.answered,
                status == 200,
                "what does not say that it is an outage is not waited out as one"
            );
        }
    }
}

#[tokio::test]
async fn a_page_in_place_of_an_answer_is_told_by_its_title() {
    for kind in VENDORS {
        let fake = FakeProvider::start().await;
        let page = "<!DOCTYPE html><html><title>Sign in</title><p>…</html>";
        fake.on(any()).respond(Reply::raw(page).header("content-type", "text/html"));
        let error = Ask::user("Hi").of(&at(&fake, kind)).await.expect_err("a page");
        assert_eq!((error.code, error.retryable), (Code::ProviderMalformed, true));
        assert_eq!(error.detail.as_deref(), Some("answered with text/html that is no JSON: Sign in"));
    }
}

#[tokio::test]
async fn a_prompt_that_is_too_long_is_named() {
    for words in [
        "This model's maximum context length is 8192 tokens, however you requested 9000.",
        "prompt is too long: 210000 tokens > 200000 maximum",
        "The input token count (2000000) exceeds the maximum number of tokens allowed (1048576).",
        "the request exceeds the available context size. try increasing the context size",
    ] {
        for kind in VENDORS {
            let fake = FakeProvider::start().await;
            fake.on(any()).respond(Reply::status(400, json!({ "error": { "message": words } }).to_string()));
            let error = Ask::user("Hi").of(&at(&fake, kind)).await.expect_err("too long");
            assert_eq!((error.code, error.retryable), (Code::ProviderRejected, false));
            assert!(error.message.contains("the prompt does not fit the model's context"), "{}", error.message);
        }
    }
}

#[tokio::test]
async fn a_choice_without_a_message_is_what_its_end_says_and_is_not_bought_again() {
    let fake = FakeProvider::start().await;
    let provider = at(&fake, ProviderKind::Openai);
    for (reason, finish) in [("length", Finish::Length), ("content_filter", Finish::Refused)] {
        let body = json!({ "choices": [{ "index": 0, "finish_reason": reason }], "usage": { "prompt_tokens": 9 } });
        fake.on(any()).once(Reply::raw(body.to_string()));
        assert_eq!(Ask::user("Hi").of(&provider).await.expect("it ended").finish, finish);
    }
    fake.on(any()).once(Reply::raw(json!({ "choices": [{ "finish_reason": "stop" }] }).to_string()));
    let error = Ask::user("Hi").of(&provider).await.expect_err("nothing was said");
    assert_eq!((error.code, error.retryable, error.answered), (Code::ProviderMalformed, false, true));
    // Servers of plain completions have a text there.
    fake.on(any()).once(Reply::raw(json!({ "choices": [{ "text": "Madrid.", "finish_reason": "stop" }] }).to_string()));
    assert_eq!(Ask::user("Hi").of(&provider).await.expect("an answer").content, "Madrid.");
}
