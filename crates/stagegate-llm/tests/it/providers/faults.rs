//! What goes wrong on the way, the same for every vendor.

use std::time::Duration;

use serde_json::json;
use stagegate_core::Code;
use stagegate_llm::config::ProviderKind;
use stagegate_testkit::{
    FakeProvider,
    provider::{Reply, any},
};

use super::{Ask, KEY, at, at_with};

const VENDORS: [ProviderKind; 3] = [ProviderKind::Openai, ProviderKind::Anthropic, ProviderKind::Gemini];

#[tokio::test]
async fn a_connection_that_breaks_is_unreachable_and_worth_another_try() {
    let fake = FakeProvider::start().await;
    for kind in VENDORS {
        let provider = at(&fake, kind);
        for reply in [Reply::close(), Reply::text("Madrid.").cut_halfway()] {
            fake.on(any()).once(reply);
            let error = Ask::user("Hi").of(&provider).await.expect_err("broken");
            assert_eq!((error.code, error.retryable), (Code::ProviderUnreachable, true), "{kind:?}");
            assert!(error.message.contains("127.0.0.1"), "{}", error.message);
        }
    }
}

#[tokio::test]
async fn a_port_where_nobody_listens_is_unreachable() {
    let fake = FakeProvider::start().await;
    let gone = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("its address");
    for kind in VENDORS {
        let provider = at_with(&fake, kind, |llm| {
            for provider in llm.providers.values_mut() {
                provider.base_url = Some(format!("http://{gone}/v1"));
            }
        });
        let error = Ask::user("Hi").of(&provider).await.expect_err("refused");
        assert_eq!((error.code, error.retryable), (Code::ProviderUnreachable, true), "{kind:?}");
        assert!(error.message.starts_with("could not connect to 127.0.0.1"), "{}", error.message);
    }
    assert_eq!(fake.call_count(), 0);
}

#[tokio::test]
async fn an_answer_over_the_limit_is_not_read() {
    let fake = FakeProvider::start().await;
    for kind in VENDORS {
        let provider = at_with(&fake, kind, |llm| llm.answer_max_bytes = 10_000);
        // With an announced length, and without one.
        for reply in [Reply::huge(10_001), Reply::huge(10_001).drip(2_000, Duration::from_millis(1))] {
            fake.on(any()).once(reply);
            let error = Ask::user("Hi").of(&provider).await.expect_err("too large");
            assert_eq!((error.code, error.retryable), (Code::ProviderTooLarge, false), "{kind:?}");
            assert!(error.message.contains("10000"), "{}", error.message);
        }
        fake.on(any()).once(Reply::text("short"));
        Ask::user("Hi").of(&provider).await.expect("an answer within the limit");
    }
}

#[tokio::test]
async fn a_huge_error_is_still_that_error() {
    let fake = FakeProvider::start().await;
    for kind in VENDORS {
        let provider = at(&fake, kind);
        fake.on(any()).once(Reply::status(500, "x".repeat(1_000_000)));
        let error = Ask::user("Hi").of(&provider).await.expect_err("an error");
        assert_eq!(error.code, Code::ProviderFailed, "{kind:?}");
    }
}

#[tokio::test]
async fn an_answer_that_drips_in_is_whole_in_the_end() {
    let fake = FakeProvider::start().await;
    for kind in VENDORS {
        let provider = at(&fake, kind);
        fake.on(any()).once(Reply::text("Madrid é.").drip(7, Duration::from_millis(1)));
        assert_eq!(Ask::user("Hi").of(&provider).await.expect("an answer").content, "Madrid é.", "{kind:?}");
    }
}

#[tokio::test]
async fn a_hanging_provider_is_left_when_the_caller_leaves() {
    let fake = FakeProvider::start().await;
    let provider = at(&fake, ProviderKind::Openai);
    fake.on(any()).once(Reply::hang());
    let ask = Ask::user("Hi");
    let asking = tokio::spawn({
        let (ask, provider) = (ask.clone(), provider.clone());
        async move { ask.of(&provider).await.is_ok() }
    });
    while fake.call_count() == 0 {
        tokio::task::yield_now().await;
    }
    asking.abort();
    while fake.calls()[0].finished.is_none() {
        tokio::task::yield_now().await;
    }
    assert!(fake.calls()[0].abandoned);
    ask.of(&provider).await.expect("the next call is served");
}

#[tokio::test]
async fn a_providers_words_are_bounded_and_never_hold_the_key() {
    let fake = FakeProvider::start().await;
    let words = format!("your key {KEY} is\n\n\twrong \u{1b}[31m{}", "é".repeat(2_000));
    for kind in VENDORS {
        let provider = at(&fake, kind);
        let body = json!({ "type": "error", "error": { "type": "x", "status": "x", "message": words } }).to_string();
        fake.on(any()).once(Reply::status(401, body));
        let error = Ask::user("Hi").of(&provider).await.expect_err("refused");
        assert_eq!(error.code, Code::ProviderAuth, "{kind:?}");
        let place = format!("(POST 127.0.0.1:{}/", fake.address().port());
        let told = error.message.strip_prefix("answered 401 Unauthorized ").unwrap_or_default();
        assert!(told.starts_with(&place), "its words are told to those who may read prompts: {}", error.message);
        let detail = error.detail.as_deref().unwrap_or_default();
        assert!(detail.starts_with("vendor: your key [redacted] is wrong"), "{detail}");
        assert!(detail.chars().count() <= 500 + "vendor: ".len());
        assert!(!detail.chars().any(char::is_control));
        assert!(!format!("{error:?} {provider:?}").contains(KEY));
    }
}
