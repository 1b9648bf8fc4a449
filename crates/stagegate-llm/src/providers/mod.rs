//! The providers: owns which ones there are. Each is a file of its own that implements [`Provider`]; to add one, write
//! that file, give it a [`ProviderKind`] and name it in `of_kind` below.

#![expect(clippy::result_large_err, reason = "an error carries usage and limits, and ends a call that took seconds")]

mod address;
mod anthropic;
mod dialect;
mod gemini;
mod http;
mod openai;
mod plan;
pub mod retry_after;
pub mod sim;
mod words;

use std::{collections::BTreeMap, sync::Arc};

use stagegate_core::{Code, Error, Violation};
use stagegate_net::Client;

use self::{http::Endpoint, plan::Plan};
use crate::{
    config::{DialectConfig, LlmConfig, ProviderConfig, ProviderKind},
    provider::Provider,
};

/// The providers that are there without being named, each under its kind's name.
pub const IMPLICIT: [ProviderKind; 4] =
    [ProviderKind::Openai, ProviderKind::Anthropic, ProviderKind::Gemini, ProviderKind::Sim];

/// Every provider by name: the implicit ones and the configured ones. One without a key is there too, and says so. Reads
/// no environment: whoever reads the configuration puts the vendors' variables into it. Every mistake is reported at
/// once.
pub fn build(config: &LlmConfig, client: &Client) -> Result<BTreeMap<String, Arc<dyn Provider>>, Error> {
    let implicit = IMPLICIT
        .into_iter()
        .filter(|kind| !config.providers.contains_key(kind.as_str()))
        .map(|kind| (kind.as_str().to_owned(), ProviderConfig::new(kind)));
    let configured = config.providers.iter().map(|(name, provider)| (name.clone(), provider.clone()));
    let mut providers: BTreeMap<String, Arc<dyn Provider>> = BTreeMap::new();
    let mut violations = Vec::new();
    for (name, provider) in implicit.chain(configured) {
        match Plan::of(&name, &provider) {
            Ok(plan) => {
                let client = client.for_exchanges(provider.max_concurrency)?;
                let endpoint = Endpoint::new(client, &plan, config.answer_max_bytes);
                let (has_key, dialect) = (plan.key.is_some(), provider.dialect.clone());
                providers.insert(name.clone(), of_kind(Parts { name, endpoint, has_key, plan, dialect }, &provider));
            }
            Err(found) => violations.extend(found),
        }
    }
    if violations.is_empty() { Ok(providers) } else { Err(Error::violations(Code::InvalidConfig, violations)) }
}

/// Every mistake in what is said of the providers.
pub(crate) fn violations(config: &LlmConfig) -> Vec<Violation> {
    config.providers.iter().filter_map(|(name, provider)| Plan::of(name, provider).err()).flatten().collect()
}

/// What every provider over HTTP is built from.
pub(crate) struct Parts {
    /// Its name in the configuration.
    name: String,
    /// Where it listens, and how it is asked.
    endpoint: Endpoint,
    has_key: bool,
    plan: Plan,
    dialect: DialectConfig,
}

impl Parts {
    /// Whether calls can succeed: it has a key, or may need none.
    fn is_configured(&self) -> bool {
        self.has_key || !self.plan.place.needs_key
    }
}

/// The registry: one line a kind.
fn of_kind(parts: Parts, config: &ProviderConfig) -> Arc<dyn Provider> {
    match config.kind {
        ProviderKind::Openai => Arc::new(openai::OpenAi::new(parts)),
        ProviderKind::Anthropic => Arc::new(anthropic::Anthropic::new(parts)),
        ProviderKind::Gemini => Arc::new(gemini::Gemini::new(parts)),
        ProviderKind::Sim => Arc::new(sim::Sim::new(&config.sim)),
    }
}
