//! Providers: recorded-shape conversations over a real socket, and every way in which one can go wrong.

mod anthropic;
mod dialects;
mod faults;
mod gemini;
mod openai;
mod page;
mod registry;
mod sim;
mod words;

use std::sync::Arc;

use serde_json::Value;
use stagegate_core::{
    Secret,
    pipeline::{Message, OutputFormat, Params, Role},
};
use stagegate_llm::{
    config::{LlmConfig, ProviderConfig, ProviderKind},
    provider::{Answer, Provider, ProviderError, ProviderRequest},
    providers,
};
use stagegate_net::{Client, NetConfig};
use stagegate_testkit::{FakeProvider, provider::Call};

/// A key that would be noticed wherever it appeared.
pub(crate) const KEY: &str = "sk-test-0123456789-do-not-print";

pub(crate) fn config(kind: ProviderKind) -> ProviderConfig {
    ProviderConfig { max_concurrency: 8, ..ProviderConfig::new(kind) }
}

/// The headers of an answer, and the wait that they ask for.
pub(crate) type Wait<'a> = (&'a [(&'a str, &'a str)], Option<std::time::Duration>);

/// One provider of a kind whose vendor is the fake one.
pub(crate) fn at(fake: &FakeProvider, kind: ProviderKind) -> Arc<dyn Provider> {
    at_with(fake, kind, |_| {})
}

pub(crate) fn at_with(
    fake: &FakeProvider,
    kind: ProviderKind,
    change: impl FnOnce(&mut LlmConfig),
) -> Arc<dyn Provider> {
    let base_url = match kind {
        ProviderKind::Openai => fake.openai_base_url(),
        ProviderKind::Anthropic => fake.anthropic_base_url(),
        ProviderKind::Gemini | ProviderKind::Sim => fake.gemini_base_url(),
    };
    let provider =
        ProviderConfig { base_url: Some(base_url), api_key: Some(Secret::from(KEY.to_owned())), ..config(kind) };
    let mut llm = LlmConfig::default();
    llm.providers.insert("vendor".to_owned(), provider);
    change(&mut llm);
    build(&llm, "vendor")
}

/// A client without proxies.
pub(crate) fn client() -> Client {
    Client::new(&NetConfig::default()).expect("a client")
}

pub(crate) fn build(config: &LlmConfig, name: &str) -> Arc<dyn Provider> {
    Arc::clone(&providers::build(config, &client()).expect("a valid configuration")[name])
}

/// A question that a test asks.
#[derive(Debug, Clone)]
pub(crate) struct Ask {
    pub(crate) model: &'static str,
    pub(crate) messages: Vec<Message>,
    pub(crate) params: Params,
    pub(crate) format: OutputFormat,
    pub(crate) sample: u32,
}

pub(crate) fn message(role: Role, content: &str) -> Message {
    Message { role, content: content.to_owned() }
}

impl Ask {
    pub(crate) fn user(content: &str) -> Self {
        Self {
            model: "model-1",
            messages: vec![message(Role::User, content)],
            params: Params::default(),
            format: OutputFormat::Text,
            sample: 0,
        }
    }

    pub(crate) fn model(mut self, model: &'static str) -> Self {
        self.model = model;
        self
    }

    pub(crate) fn json(mut self, schema: Option<Value>) -> Self {
        self.format = OutputFormat::Json { schema: schema.map(Arc::new) };
        self
    }

    pub(crate) async fn of(&self, provider: &Arc<dyn Provider>) -> Result<Answer, ProviderError> {
        let Self { model, messages, params, format, sample } = self;
        provider.call(ProviderRequest { model, messages, params, format, sample: *sample }).await
    }
}

/// A conversation with everything in it.
pub(crate) fn full() -> Ask {
    Ask {
        messages: vec![
            message(Role::System, "Be brief."),
            message(Role::User, "What is the capital of France?"),
            message(Role::Assistant, "Paris."),
            message(Role::User, "And of Spain?"),
        ],
        params: Params {
            temperature: Some(0.5),
            top_p: Some(0.9),
            max_output_tokens: Some(300),
            seed: Some(7),
            stop: vec!["END".to_owned()],
            ..Params::default()
        },
        ..Ask::user("")
    }
}

/// The one call that the fake vendor saw.
pub(crate) fn only_call(fake: &FakeProvider) -> Call {
    let calls = fake.calls();
    assert_eq!(calls.len(), 1, "one call was expected");
    calls.into_iter().next().expect("one call")
}
