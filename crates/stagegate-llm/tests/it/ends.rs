//! How answers end: what each end is called, whether it is bought again, and that nothing but a whole answer is kept.

use serde_json::{Value, json};
use stagegate_core::{CallPurpose, Code, decide::FailureKind};
use stagegate_llm::{CallError, Request};
use stagegate_testkit::provider::{Reply, any, dialects};

use crate::bench::{Bench, context, last, request};

/// A choice of an OpenAI-compatible server.
fn choice(content: &Value, reason: &str, reasoning: u64) -> Reply {
    let body = json!({
        "choices": [{ "message": { "content": content }, "finish_reason": reason }],
        "usage": {
            "prompt_tokens": 100,
            "completion_tokens": 20,
            "completion_tokens_details": { "reasoning_tokens": reasoning },
        },
    });
    Reply::raw(body.to_string())
}

async fn ended(reply: Reply, request: &Request) -> CallError {
    let bench = Bench::new().await;
    bench.vendor.on(any()).once(reply);
    let error = bench.llm.complete(&context(), request).await.expect_err("no whole answer");
    assert_eq!(error.calls.len(), 1, "it is paid for, and told");
    assert!(!error.calls[0].unknown && error.calls[0].usage.output_tokens == 20, "{error:?}");
    bench.ask(&context(), request).await;
    assert_eq!(bench.calls(), 2, "it is not kept: {error:?}");
    error
}

#[tokio::test]
async fn each_end_is_named_as_what_it_is_and_bought_again_only_where_that_may_help() {
    let cases = [
        (json!("half"), "length", 0, "cut at the token limit (max_output_tokens = 50)", FailureKind::Unusable),
        (json!(""), "length", 0, "before a word was said: raise `params.max_output_tokens`", FailureKind::Final),
        (json!(""), "length", 20, "used up max_output_tokens = 50 while reasoning (20 tokens)", FailureKind::Final),
        (json!("half"), "model_length", 0, "filled the model's context", FailureKind::Final),
        (json!("half"), "pause_turn", 0, "paused its turn (`pause_turn`)", FailureKind::Unusable),
        (json!("half"), "something_new", 0, "not known as an end (`something_new`)", FailureKind::Unusable),
        (json!("half"), "or so says the prompt", 0, "not known as an end (`an unknown reason`)", FailureKind::Unusable),
        (Value::Null, "stop", 20, "reasoned, and then ended without an answer", FailureKind::Final),
        (json!("no"), "content_filter", 0, "the model refused, or the provider filtered", FailureKind::Final),
    ];
    for (content, reason, reasoning, named, kind) in cases {
        let mut request = request("q");
        request.params.max_output_tokens = Some(50);
        let error = ended(choice(&content, reason, reasoning), &request).await;
        assert!(error.message.contains(named), "{reason}: {}", error.message);
        assert_eq!(error.message.contains("max_output_tokens"), reason == "length", "{}", error.message);
        assert_eq!(error.kind, kind, "{reason}");
        let refused = reason == "content_filter";
        assert_eq!(error.code, if refused { Code::ProviderRefused } else { Code::ProviderMalformed }, "{reason}");
        // What there is of it is handed over where a critique can be made of it.
        let partial = error.partial.filter(|_| content == "half");
        assert_eq!(partial.is_some(), content == "half" && kind == FailureKind::Unusable, "{reason}");
        assert!(partial.is_none_or(|partial| partial.is_too_long == (reason == "length")), "{reason}");
    }
}

#[tokio::test]
async fn a_judge_that_met_its_limit_is_told_the_key_that_reaches_it() {
    for (content, reasoning) in [("", 20), ("", 0), ("{\"score\":", 0)] {
        let mut request = Request { purpose: CallPurpose::Judge, ..request("q") };
        request.params.max_output_tokens = Some(1_024);
        let error = ended(choice(&json!(content), "length", reasoning), &request).await;
        assert!(error.message.contains("max_output_tokens = 1024"), "{}", error.message);
        assert!(error.message.ends_with("raise `gate.judge.params.max_output_tokens`"), "{}", error.message);
    }
}

#[tokio::test]
async fn token_counts_at_the_end_of_the_range_stop_nothing_and_are_told_as_estimates() {
    let bench = Bench::new().await;
    for tokens in ["18446744073709551615", "18446744073709551616", "1e300"] {
        let body = format!(
            r#"{{"choices":[{{"message":{{"content":"fine"}},"finish_reason":"stop"}}],
                "usage":{{"prompt_tokens":{tokens},"completion_tokens":{tokens}}}}}"#
        );
        bench.vendor.on(any()).once(Reply::raw(body));
        let reply = bench.ask(&context(), &request(tokens)).await;
        assert_eq!(reply.content, "fine");
        assert!(last(&reply).usage.estimated && last(&reply).cost_usd.nanos() > 0);
    }
}

#[tokio::test]
async fn a_request_is_kept_under_its_own_key_however_its_server_wanted_it_said() {
    let bench = Bench::new().await;
    let name = "a model that reasons";
    let dialect = dialects::all().into_iter().find(|dialect| dialect.name == name).expect("it is in the suite");
    let mut request = request("q");
    request.params.max_output_tokens = Some(50);
    let plain = Bench::new().await.ask(&context(), &request).await;
    bench.vendor.speak(&dialect);
    let reply = bench.ask(&context(), &request).await;
    assert_eq!((reply.key, bench.calls()), (plain.key, 2));
    assert_eq!(reply.calls.len(), 1, "a refusal costs nothing, and is no call of its own");
    bench.ask(&context(), &request).await;
    assert_eq!(bench.calls(), 2, "it is kept");
    let told =
        bench.llm.health().await.providers.into_iter().find(|provider| provider.name == "one").expect("it is there");
    assert_eq!(told.dialects.len(), 1);
    assert_eq!(told.dialects[0].0, "priced");
}
