//! Servers that know a part of their protocol: each is asked for everything, in all of its forms.

use serde_json::{Value, json};
use stagegate_core::{Code, pipeline::Role};
use stagegate_llm::config::{DialectConfig, JsonForm, LimitKey, ProviderKind, Sampling, SystemRole};
use stagegate_testkit::{
    FakeProvider,
    provider::{
        Protocol, Reply, any,
        dialects::{self, Dialect},
    },
};

use super::{Ask, at, at_with, full, message};

fn kind(protocol: Protocol) -> ProviderKind {
    match protocol {
        Protocol::Anthropic => ProviderKind::Anthropic,
        Protocol::Gemini => ProviderKind::Gemini,
        Protocol::Openai | Protocol::Unknown => ProviderKind::Openai,
    }
}

fn schema() -> Value {
    json!({ "type": "object", "required": ["a"], "properties": { "a": { "type": "integer" } } })
}

async fn server(dialect: &Dialect) -> FakeProvider {
    let fake = FakeProvider::start().await;
    fake.speak(dialect);
    fake.on(any()).respond(Reply::text(r#"{"a":1}"#));
    fake
}

/// The longest way to an answer: every refusal of a server, one after the other.
const REFUSALS_MAX: usize = 5;

#[tokio::test]
async fn each_server_of_the_suite_answers_in_one_call_and_refuses_nothing_from_the_second_on() {
    for dialect in dialects::all() {
        for ask in [full(), full().json(None), full().json(Some(schema()))] {
            let fake = server(&dialect).await;
            let provider = at(&fake, kind(dialect.protocol));
            let answer = ask.of(&provider).await.unwrap_or_else(|error| panic!("{}: {error:?}", dialect.name));
            assert_eq!(answer.content, r#"{"a":1}"#, "{}", dialect.name);
            let first = fake.call_count();
            assert!(first <= 1 + REFUSALS_MAX, "{}: {first} requests", dialect.name);
            ask.of(&provider).await.expect("an answer");
            assert_eq!(fake.call_count(), first + 1, "{}: no refusal is met twice", dialect.name);
            assert_eq!(provider.dialects().len(), usize::from(first > 1), "{}", dialect.name);
            // Whatever was left out or moved, what was said is all there.
            let last = fake.calls().pop().expect("a call");
            for text in ["Be brief.", "What is the capital of France?", "Paris.", "And of Spain?"] {
                assert!(last.prompt_text.contains(text), "{}: {}", dialect.name, last.body);
            }
            let is_by_schema = last.schema.is_some();
            let is_asked_for = ask.format != stagegate_core::pipeline::OutputFormat::Text;
            let is_said = last.prompt_text.contains("\"required\":[\"a\"]");
            let has_schema = matches!(&ask.format, stagegate_core::pipeline::OutputFormat::Json { schema: Some(_) });
            assert_eq!(is_by_schema || is_said, is_asked_for && has_schema, "{}: {}", dialect.name, last.body);
        }
    }
}

fn found(dialects: &[(String, DialectConfig)], model: &str) -> DialectConfig {
    dialects.iter().find(|(name, _)| name == model).map(|(_, found)| found.clone()).unwrap_or_default()
}

fn named(name: &str) -> Dialect {
    dialects::all().into_iter().find(|dialect| dialect.name == name).expect("it is in the suite")
}

#[tokio::test]
async fn what_was_found_out_is_told_by_model_in_the_words_of_the_configuration() {
    let fake = server(&named("a model that reasons")).await;
    let provider = at(&fake, ProviderKind::Openai);
    full().of(&provider).await.expect("an answer");
    let dialect = found(&provider.dialects(), "model-1");
    assert_eq!(dialect.limit, LimitKey::MaxCompletionTokens);
    assert_eq!(dialect.leave_out, [Sampling::Temperature, Sampling::TopP, Sampling::Stop]);
    let body = fake.calls().pop().expect("a call").body;
    assert_eq!((&body["max_completion_tokens"], &body["seed"]), (&json!(300), &json!(7)));
    // Another model of the provider is asked anew.
    let before = fake.call_count();
    full().model("model-2").of(&provider).await.expect("an answer");
    assert_eq!(fake.call_count(), before + 5);

    let fake = server(&named("a server that knows json_object alone")).await;
    let provider = at(&fake, ProviderKind::Openai);
    Ask::user("Hi").json(Some(schema())).of(&provider).await.expect("an answer");
    assert_eq!(found(&provider.dialects(), "model-1").json, JsonForm::Object);
    Ask::user("Hi").json(None).model("model-2").of(&provider).await.expect("an answer");
    assert!(found(&provider.dialects(), "model-2").say_json);
}

#[tokio::test]
async fn a_server_that_changes_its_mind_is_followed() {
    let fake = server(&named("a model that reasons")).await;
    let provider = at(&fake, ProviderKind::Openai);
    full().of(&provider).await.expect("an answer");
    fake.clear_rules();
    fake.on(std::sync::Arc::new(|call: &stagegate_testkit::provider::Call| {
        call.body.get("max_completion_tokens").is_some()
    }))
    .respond(Reply::status(
        422,
        json!({ "detail": [{ "loc": ["body", "max_completion_tokens"], "msg": "Extra inputs are not permitted" }] })
            .to_string(),
    ));
    full().of(&provider).await.expect("an answer");
    assert_eq!(fake.calls().pop().expect("a call").body["max_tokens"], 300);
    assert_eq!(found(&provider.dialects(), "model-1").limit, LimitKey::MaxTokens);
}

#[tokio::test]
async fn a_server_that_takes_neither_form_is_asked_twice_and_its_error_is_told() {
    let fake = FakeProvider::start().await;
    fake.on(any()).respond(Reply::status(
        400,
        json!({ "error": { "message": "'max_tokens' and 'max_completion_tokens' are not supported" } }).to_string(),
    ));
    let provider = at(&fake, ProviderKind::Openai);
    let error = full().of(&provider).await.expect_err("refused");
    assert_eq!((error.code, error.retryable, error.unheard), (Code::ProviderRejected, false, false));
    assert!(error.detail.is_some_and(|words| words.contains("'max_tokens'")));
    assert_eq!((fake.call_count(), provider.dialects().len()), (2, 0), "what did not help is not remembered");
}

#[tokio::test]
async fn a_refusal_that_names_nothing_is_passed_on_at_once() {
    for (status, words) in [
        (400, "max_tokens is too large: 300000. This model supports at most 16384 completion tokens."),
        (400, "temperature must be between 0 and 2"),
        (400, ""),
        (401, "'temperature' is not supported"),
        (429, "'temperature' is not supported"),
        (500, "'temperature' is not supported"),
    ] {
        for kind in [ProviderKind::Openai, ProviderKind::Anthropic, ProviderKind::Gemini] {
            let fake = FakeProvider::start().await;
            fake.on(any()).respond(Reply::status(status, json!({ "error": { "message": words } }).to_string()));
            full().json(Some(schema())).of(&at(&fake, kind)).await.expect_err("refused");
            assert_eq!(fake.call_count(), 1, "{kind:?} {status} {words}");
        }
    }
}

#[tokio::test]
async fn what_is_set_is_used_from_the_first_request_and_never_changed() {
    let fake = server(&named("a server that knows no response_format")).await;
    let set = |dialect: DialectConfig| {
        at_with(&fake, ProviderKind::Openai, |llm| {
            for provider in llm.providers.values_mut() {
                provider.dialect = dialect.clone();
            }
        })
    };
    let words = set(DialectConfig {
        limit: LimitKey::MaxCompletionTokens,
        json: JsonForm::Words,
        system: SystemRole::User,
        leave_out: vec![Sampling::Seed, Sampling::Stop],
        ..DialectConfig::default()
    });
    full().json(Some(schema())).of(&words).await.expect("an answer");
    let calls = fake.calls();
    assert_eq!((calls.len(), words.dialects().len()), (1, 0));
    let body = &calls[0].body;
    assert_eq!(body["max_completion_tokens"], 300);
    assert!(["max_tokens", "seed", "stop", "response_format"].iter().all(|key| body.get(*key).is_none()), "{body}");
    assert_eq!(
        body["messages"][0],
        json!({ "role": "user", "content": "Be brief.\n\nWhat is the capital of France?" })
    );

    let pinned = set(DialectConfig { json: JsonForm::Schema, ..DialectConfig::default() });
    let error = full().json(Some(schema())).of(&pinned).await.expect_err("refused");
    assert_eq!((error.code, fake.call_count()), (Code::ProviderRejected, 2));
}

#[tokio::test]
async fn a_stop_that_a_server_does_not_know_is_obeyed_here() {
    let fake = FakeProvider::start().await;
    fake.speak(&named("a model that reasons"));
    fake.on(any()).respond(Reply::text("Madrid. END and more END"));
    let answer = full().of(&at(&fake, ProviderKind::Openai)).await.expect("an answer");
    assert_eq!(answer.content, "Madrid. ");
}

#[tokio::test]
async fn the_schema_stands_with_the_system_or_at_the_end_of_what_the_user_says() {
    let fake = server(&named("a server that knows no response_format")).await;
    let provider = at(&fake, ProviderKind::Openai);
    Ask::user("Hi").json(Some(schema())).of(&provider).await.expect("an answer");
    let mut ask = Ask::user("Hi").json(Some(schema()));
    ask.messages.insert(0, message(Role::System, "Be brief."));
    ask.of(&provider).await.expect("an answer");
    let calls = fake.calls();
    let texts = |index: usize| -> Vec<String> {
        let messages = calls[index].body["messages"].as_array().cloned().unwrap_or_default();
        messages.iter().map(|said| said["content"].as_str().unwrap_or_default().to_owned()).collect()
    };
    let alone = texts(calls.len() - 2);
    assert!(alone.len() == 1 && alone[0].starts_with("Hi\n\nAnswer with one JSON value"), "{alone:?}");
    let with_system = texts(calls.len() - 1);
    assert!(with_system[0].starts_with("Be brief.\n\nAnswer with one JSON value") && with_system[1] == "Hi");
}

#[tokio::test]
async fn one_schema_that_is_beyond_a_server_says_nothing_of_others() {
    let fake = FakeProvider::start().await;
    let is_odd = |call: &stagegate_testkit::provider::Call| call.body["response_format"].to_string().contains("oneOf");
    let words = "Invalid schema for response_format 'answer': In context=(), 'oneOf' is not permitted.";
    fake.on(std::sync::Arc::new(is_odd))
        .respond(Reply::status(400, json!({ "error": { "message": words, "param": "response_format" } }).to_string()));
    fake.on(any()).respond(Reply::text("{}"));
    let provider = at(&fake, ProviderKind::Openai);
    Ask::user("Hi").json(Some(json!({ "type": "object", "oneOf": [] }))).of(&provider).await.expect("an answer");
    assert!(fake.call_count() > 1 && provider.dialects().is_empty());
    Ask::user("Hi").json(Some(schema())).of(&provider).await.expect("an answer");
    assert_eq!(fake.calls().pop().expect("a call").body["response_format"]["type"], "json_schema");
}
