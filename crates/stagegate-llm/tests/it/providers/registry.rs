//! Which providers there are, and what their configuration may say.

use stagegate_core::{Code, Secret};
use stagegate_llm::{
    config::{LlmConfig, ProviderKind},
    providers,
};

use super::{Ask, build, client, config};

#[tokio::test]
async fn the_vendors_and_the_simulator_are_there_without_being_named() {
    let client = client();
    let built = providers::build(&LlmConfig::default(), &client).expect("valid");
    let told: Vec<_> = built.iter().map(|(name, p)| (name.as_str(), p.kind(), p.is_configured())).collect();
    assert_eq!(
        told,
        [
            ("anthropic", "anthropic", false),
            ("gemini", "gemini", false),
            ("openai", "openai", false),
            ("sim", "sim", true)
        ]
    );
}

#[tokio::test]
async fn a_vendor_without_its_key_says_what_to_set() {
    for (name, variable) in
        [("openai", "OPENAI_API_KEY"), ("anthropic", "ANTHROPIC_API_KEY"), ("gemini", "GEMINI_API_KEY")]
    {
        let error = Ask::user("Hi").of(&build(&LlmConfig::default(), name)).await.expect_err("no key");
        assert_eq!((error.code, error.retryable), (Code::ProviderAuth, false));
        assert!(error.message.contains(variable), "{}", error.message);
    }
}

#[tokio::test]
async fn a_configured_provider_stands_beside_or_in_place_of_an_implicit_one() {
    let mut llm = LlmConfig::default();
    let mut keyed = config(ProviderKind::Openai);
    keyed.api_key = Some(Secret::from("sk-x\n".to_owned()));
    llm.providers.insert("openai".to_owned(), keyed.clone());
    llm.providers.insert("openai-eu".to_owned(), keyed);
    // A key of blanks is none.
    let mut blank = config(ProviderKind::Gemini);
    blank.api_key = Some(Secret::from(" \n".to_owned()));
    llm.providers.insert("gemini".to_owned(), blank);
    assert!(build(&llm, "openai").is_configured());
    assert!(build(&llm, "openai-eu").is_configured());
    assert!(!build(&llm, "gemini").is_configured());
    assert!(build(&llm, "sim").is_configured());
}

#[test]
fn every_mistake_is_reported_at_once_with_its_place() {
    let client = client();
    let mut llm = LlmConfig::default();
    for (name, base_url) in [
        ("b1", "localhost:8000"),
        ("b2", "ftp://example.com"),
        ("b3", "http://user:secret@example.com/v1"),
        ("b4", "http://example.com/v1?key=secret"),
        ("b5", "not a url"),
    ] {
        let mut provider = config(ProviderKind::Openai);
        provider.base_url = Some(base_url.to_owned());
        llm.providers.insert(name.to_owned(), provider);
    }
    let mut keyed = config(ProviderKind::Anthropic);
    keyed.api_key = Some(Secret::from("two\nlines".to_owned()));
    llm.providers.insert("k".to_owned(), keyed);
    let mut sim = config(ProviderKind::Sim);
    sim.max_concurrency = 0;
    sim.sim.fault_rate = 1.5;
    sim.sim.first_attempt_fail_rate = f64::NAN;
    llm.providers.insert("s".to_owned(), sim);

    let error = providers::build(&llm, &client).expect_err("refused");
    assert_eq!(error.code, Code::InvalidConfig);
    let paths: Vec<_> = error.violations.iter().map(|violation| violation.path.as_str()).collect();
    assert_eq!(
        paths,
        [
            "llm.providers.b1.base_url",
            "llm.providers.b2.base_url",
            "llm.providers.b3.base_url",
            "llm.providers.b4.base_url",
            "llm.providers.b5.base_url",
            "llm.providers.k.api_key",
            "llm.providers.s.max_concurrency",
            "llm.providers.s.sim.fault_rate",
            "llm.providers.s.sim.first_attempt_fail_rate",
        ]
    );
    assert!(error.violations.iter().all(|violation| violation.mend.is_some()));
    assert!(!format!("{error:?}").contains("secret"), "credentials are not repeated");
}
