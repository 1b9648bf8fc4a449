//! The providers: owns which ones there are. Each is a file of its own that implements [`Provider`]; to add one, write
//! that file, give it a [`ProviderKind`] and name it in `of_kind` below.

#![expect(clippy::result_large_err, reason = "an error carries usage and limits, and ends a call that took seconds")]

mod anthropic;
mod gemini;
mod http;
mod openai;
pub mod retry_after;
pub mod sim;

use std::{collections::BTreeMap, sync::Arc};

use stagegate_core::{Code, Error, Secret, Violation};
use stagegate_net::Client;
use url::Url;

use crate::{
    config::{LlmConfig, ProviderConfig, ProviderKind, SimConfig},
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
        .map(|kind| (kind.as_str().to_owned(), defaults(kind)));
    let configured = config.providers.iter().map(|(name, provider)| (name.clone(), provider.clone()));
    let mut providers: BTreeMap<String, Arc<dyn Provider>> = BTreeMap::new();
    let mut violations = Vec::new();
    for (name, provider) in implicit.chain(configured) {
        let client = client.for_exchanges(provider.max_concurrency)?;
        match of_kind(&name, &provider, config.answer_max_bytes, &client) {
            Ok(built) => {
                providers.insert(name, built);
            }
            Err(found) => violations.extend(found),
        }
    }
    if violations.is_empty() { Ok(providers) } else { Err(Error::violations(Code::InvalidConfig, violations)) }
}

fn defaults(kind: ProviderKind) -> ProviderConfig {
    ProviderConfig { kind, base_url: None, api_key: None, max_concurrency: 64, sim: SimConfig::default() }
}

/// What every provider over HTTP is built from.
pub(crate) struct Parts {
    /// Its name in the configuration.
    name: String,
    client: Client,
    /// An address of its own, checked.
    base: Option<Url>,
    /// Without blanks around it; never empty.
    key: Option<Secret>,
    answer_max_bytes: usize,
}

/// The registry: one line a kind.
fn of_kind(
    name: &str,
    config: &ProviderConfig,
    answer_max_bytes: usize,
    client: &Client,
) -> Result<Arc<dyn Provider>, Vec<Violation>> {
    let mut violations = check(name, config);
    let base = match config.base_url.as_deref().map(|text| http::base_url(name, text)).transpose() {
        Ok(base) => base,
        Err(violation) => {
            violations.push(violation);
            None
        }
    };
    if !violations.is_empty() {
        return Err(violations);
    }
    // Keys come from files and shells, often with a line break at their end.
    let key = config.api_key.as_ref().map(|key| key.expose().trim()).filter(|key| !key.is_empty());
    let key = key.map(|key| Secret::from(key.to_owned()));
    let parts = Parts { name: name.to_owned(), client: client.clone(), base, key, answer_max_bytes };
    let built: Result<Arc<dyn Provider>, Violation> = match config.kind {
        ProviderKind::Openai => openai::OpenAi::new(parts).map(|p| Arc::new(p) as _),
        ProviderKind::Anthropic => anthropic::Anthropic::new(parts).map(|p| Arc::new(p) as _),
        ProviderKind::Gemini => gemini::Gemini::new(parts).map(|p| Arc::new(p) as _),
        ProviderKind::Sim => Ok(Arc::new(sim::Sim::new(&config.sim))),
    };
    built.map_err(|violation| vec![violation])
}

fn check(name: &str, config: &ProviderConfig) -> Vec<Violation> {
    let at = |key: &str| format!("llm.providers.{name}.{key}");
    let mut violations = Vec::new();
    if config.max_concurrency == 0 {
        violations.push(
            Violation::new(Code::InvalidConfig, at("max_concurrency"), "no call could ever be made")
                .mend("write 1 or more"),
        );
    }
    for (key, rate) in
        [("fault_rate", config.sim.fault_rate), ("first_attempt_fail_rate", config.sim.first_attempt_fail_rate)]
    {
        if !(0.0..=1.0).contains(&rate) {
            violations.push(
                Violation::new(Code::InvalidConfig, at(&format!("sim.{key}")), "a share is a number from 0 to 1")
                    .mend("write, for example, 0.1 for one call in ten"),
            );
        }
    }
    violations
}
