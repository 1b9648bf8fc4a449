//! Prices: owns what a call costs. The table that ships (`prices.toml`) is extended and overridden by the
//! configuration. A model without a price has no cost; it is never priced 0 in silence.

use std::{collections::BTreeMap, sync::LazyLock};

use serde::Deserialize;
use stagegate_core::{
    Code, Error, ModelRef, Usage, Usd, Violation,
    pipeline::{Message, OutputFormat},
};

use crate::config::{LlmConfig, Price, ProviderKind};

/// Tokens of an answer where a request does not bound them: what is sent to providers that demand a bound, and what
/// budgets reckon with.
pub const DEFAULT_MAX_OUTPUT_TOKENS: u32 = 4096;

/// Tokens that a message costs beside its text, at most (role, separators, a marker for the beginning of a text).
const MESSAGE_OVERHEAD_TOKENS: u64 = 16;

/// What a message usually costs beside its text.
const MESSAGE_TYPICAL_TOKENS: u64 = 4;

/// Tokens that a request costs beside its messages, at most (the opening of the answer, a vendor's own preamble).
const REQUEST_OVERHEAD_TOKENS: u64 = 64;

/// Tokens that asking for JSON costs beside the schema, at most: vendors add instructions of their own.
const FORMAT_OVERHEAD_TOKENS: u64 = 512;

/// In a configured price's model, and in the shipped table: every other model of the provider.
const ANY_MODEL: &str = "*";

#[derive(Debug, Deserialize)]
struct Shipped {
    as_of: String,
    #[serde(flatten)]
    providers: BTreeMap<String, BTreeMap<String, Tariff>>,
}

/// A model's price, with what holds for long prompts.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
struct Tariff {
    #[serde(flatten)]
    price: Rates,
    #[serde(default)]
    long: Option<Long>,
}

#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
struct Long {
    above: u64,
    #[serde(flatten)]
    price: Rates,
}

/// [`Price`] without its refusal of unknown keys, which does not go with flattening.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
struct Rates {
    input: f64,
    output: f64,
    #[serde(default)]
    cache_read: Option<f64>,
    #[serde(default)]
    cache_write: Option<f64>,
}

impl From<Price> for Tariff {
    fn from(price: Price) -> Self {
        let Price { input, output, cache_read, cache_write } = price;
        Self { price: Rates { input, output, cache_read, cache_write }, long: None }
    }
}

#[expect(clippy::expect_used, reason = "the table is part of the binary, and a test reads it")]
static SHIPPED: LazyLock<Shipped> =
    LazyLock::new(|| toml::from_str(include_str!("prices.toml")).expect("the shipped price table is valid"));

/// What models cost.
#[derive(Debug, Clone)]
pub struct Prices {
    /// By provider and model, from the configuration.
    own: BTreeMap<String, BTreeMap<String, Tariff>>,
    /// The section of the shipped table that a configured provider falls back to: its kind's, where it is the
    /// vendor itself under another name.
    sections: BTreeMap<String, &'static str>,
}

impl Prices {
    /// The shipped table under the configuration's prices. Fails on a price that is no amount or names no model.
    pub fn new(config: &LlmConfig) -> Result<Self, Error> {
        let mut own: BTreeMap<String, BTreeMap<String, Tariff>> = BTreeMap::new();
        let mut violations = Vec::new();
        for (name, price) in &config.prices {
            let path = format!("llm.prices.{name}");
            match ModelRef::new(name) {
                Ok(model) => {
                    let section = own.entry(model.provider().to_owned()).or_default();
                    section.insert(model.model().to_owned(), Tariff::from(*price));
                }
                Err(invalid) => violations.push(Violation::new(Code::InvalidConfig, &path, invalid.to_string())),
            }
            let amounts = [Some(price.input), Some(price.output), price.cache_read, price.cache_write];
            if amounts.into_iter().flatten().any(|amount| !(0.0..=1e6).contains(&amount)) {
                violations.push(
                    Violation::new(Code::InvalidConfig, &path, "a price is a number of US dollars per million tokens")
                        .mend("write a number from 0 to 1000000"),
                );
            }
        }
        if !violations.is_empty() {
            return Err(Error::violations(Code::InvalidConfig, violations));
        }
        let sections = config
            .providers
            .iter()
            .filter(|(_, provider)| provider.base_url.is_none() || provider.kind == ProviderKind::Sim)
            .map(|(name, provider)| (name.clone(), provider.kind.as_str()))
            .collect();
        Ok(Self { own, sections })
    }

    /// The day on which the shipped table was last compared with the vendors' pages.
    pub fn as_of() -> &'static str {
        &SHIPPED.as_of
    }

    fn tariff(&self, model: &ModelRef) -> Option<Tariff> {
        let shipped = |section: &str| SHIPPED.providers.get(section).and_then(|models| find(models, model.model()));
        self.own
            .get(model.provider())
            .and_then(|models| find(models, model.model()))
            .or_else(|| shipped(model.provider()))
            .or_else(|| self.sections.get(model.provider()).and_then(|section| shipped(section)))
            .copied()
    }

    /// Whether the model has a price.
    pub fn is_priced(&self, model: &ModelRef) -> bool {
        self.tariff(model).is_some()
    }

    /// What these tokens cost; None where the model has no price.
    pub fn cost(&self, model: &ModelRef, usage: &Usage) -> Option<Usd> {
        let rates = self.tariff(model)?.rates(usage.prompt_tokens());
        Some(sum(&[
            (usage.input_tokens, rates.input),
            (usage.cache_read_tokens, rates.cache_read.unwrap_or(rates.input)),
            (usage.cache_write_tokens, rates.cache_write.unwrap_or(rates.input)),
            (usage.output_tokens, rates.output),
        ]))
    }

    /// The most that a call can cost: no cache hit, every prompt token at the dearest rate, the longest answer.
    /// None where the model has no price.
    pub fn worst_case(&self, model: &ModelRef, input_tokens_upper: u64, max_output_tokens: u64) -> Option<Usd> {
        let tariff = self.tariff(model)?;
        let at = |rates: Rates| {
            let input = rates.input.max(rates.cache_write.unwrap_or(0.0)).max(rates.cache_read.unwrap_or(0.0));
            sum(&[(input_tokens_upper, input), (max_output_tokens, rates.output)])
        };
        // A long prompt is not always dearer by table, and the prompt may be shorter than its bound: the dearer of the two.
        Some(at(tariff.rates(input_tokens_upper)).max(at(tariff.price)))
    }
}

impl Tariff {
    fn rates(&self, prompt_tokens: u64) -> Rates {
        match self.long {
            Some(long) if prompt_tokens > long.above => long.price,
            _ => self.price,
        }
    }
}

/// The model itself, else the longest name that it is a dated or tagged form of, else the wildcard.
fn find<'a>(models: &'a BTreeMap<String, Tariff>, model: &str) -> Option<&'a Tariff> {
    models.get(model).or_else(|| {
        models
            .iter()
            .filter(|(name, _)| model.strip_prefix(name.as_str()).is_some_and(is_snapshot))
            .max_by_key(|(name, _)| name.len())
            .map(|(_, tariff)| tariff)
            .or_else(|| models.get(ANY_MODEL))
    })
}

/// Whether what follows a model's name only says which edition of it: `-2025-08-07`, `-20251001`, `-001`, `-latest`,
/// `-preview-09-2025`. One or two digits are a version, and so another model: `claude-opus-4` is not `claude-opus-4-5`.
fn is_snapshot(rest: &str) -> bool {
    let Some(rest) = rest.strip_prefix(['-', '@', ':']) else { return false };
    let digits = rest.bytes().filter(u8::is_ascii_digit).count();
    let mut words = rest.split('-');
    words.all(|word| {
        matches!(word, "latest" | "preview" | "exp") || (!word.is_empty() && word.bytes().all(|b| b.is_ascii_digit()))
    }) && (digits == 0 || digits >= 3)
}

/// Exact: a dollar per million tokens is a million pico-dollars per token. Rounded up to a whole nano-dollar, so that
/// no cost is rounded away.
fn sum(parts: &[(u64, f64)]) -> Usd {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "prices are checked: 0 to a million")]
    let picos = |price: f64| (price * 1e6).round() as u128;
    let cost = |(tokens, price): &(u64, f64)| u128::from(*tokens).saturating_mul(picos(*price));
    let total = parts.iter().map(cost).fold(0, u128::saturating_add);
    Usd::from_nanos(i64::try_from(total.div_ceil(1_000)).unwrap_or(i64::MAX))
}

/// A bound on a prompt's tokens that holds for any text: a tokenizer makes at most one token of a byte (those that fall
/// back to bytes do, for what they do not know), and messages and formats have their overhead.
pub fn count_tokens_upper(messages: &[Message], format: &OutputFormat) -> u64 {
    let size = |bytes: usize| u64::try_from(bytes).unwrap_or(u64::MAX);
    let message = |message: &Message| size(message.content.len()).saturating_add(MESSAGE_OVERHEAD_TOKENS);
    let format = match format {
        OutputFormat::Text => 0,
        OutputFormat::Json { schema } => {
            let schema = schema.as_ref().map_or(0, |schema| written_bytes(schema));
            schema.saturating_add(FORMAT_OVERHEAD_TOKENS)
        }
    };
    messages.iter().map(message).fold(format.saturating_add(REQUEST_OVERHEAD_TOKENS), u64::saturating_add)
}

/// How long a document is as JSON, without writing it down.
fn written_bytes(document: &serde_json::Value) -> u64 {
    struct Counted(u64);
    impl std::io::Write for Counted {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0 = self.0.saturating_add(bytes.len() as u64);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut counted = Counted(0);
    // Counting does not fail, and a document always serialises.
    if serde_json::to_writer(&mut counted, document).is_err() {
        return u64::MAX;
    }
    counted.0
}

/// What a prompt's tokens usually are: a quarter of its characters. For estimates, never for budgets.
pub fn count_tokens_typical(messages: &[Message]) -> u64 {
    messages.iter().map(|message| text_tokens_typical(&message.content) + MESSAGE_TYPICAL_TOKENS).sum()
}

/// What a text's tokens usually are: a quarter of its characters.
pub fn text_tokens_typical(text: &str) -> u64 {
    u64::try_from(text.chars().count().div_ceil(4)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(text: &str) -> ModelRef {
        ModelRef::new(text).expect("a model")
    }

    fn prices() -> Prices {
        Prices::new(&LlmConfig::default()).expect("valid")
    }

    fn usage(input: u64, output: u64) -> Usage {
        Usage { input_tokens: input, output_tokens: output, ..Usage::default() }
    }

    #[test]
    fn the_shipped_table_is_whole_and_plausible() {
        assert_eq!(Prices::as_of().len(), "2026-10-27".len());
        for section in ["openai", "anthropic", "gemini", "sim"] {
            for (name, tariff) in &SHIPPED.providers[section] {
                for rates in [Some(tariff.price), tariff.long.map(|long| long.price)].into_iter().flatten() {
                    assert!(rates.input > 0.0 && rates.output > rates.input, "{name}");
                    assert!(rates.cache_read.is_none_or(|read| read < rates.input), "{name}");
                    assert!(rates.cache_write.is_none_or(|write| write >= rates.input), "{name}");
                }
                assert!(tariff.long.is_none_or(|long| long.above >= 100_000 && long.price.input > tariff.price.input));
            }
        }
        assert!(prices().is_priced(&model("anthropic/claude-haiku-4-5")));
    }

    #[test]
    fn costs_are_exact_to_the_nano_dollar() {
        let mini = model("openai/gpt-5-mini");
        assert_eq!(prices().cost(&mini, &usage(1, 0)), Some(Usd::from_nanos(250)));
        let mixed = Usage { input_tokens: 3, cache_read_tokens: 7, output_tokens: 11, ..Usage::default() };
        assert_eq!(prices().cost(&mini, &mixed), Some(Usd::from_nanos(3 * 250 + 7 * 25 + 11 * 2_000)));
        // 12.5 nano-dollars are not rounded away.
        let read = Usage { cache_read_tokens: 1, ..Usage::default() };
        assert_eq!(prices().cost(&model("openai/gpt-5-nano"), &read), Some(Usd::from_nanos(5)));
        let write = Usage { cache_write_tokens: 2, ..Usage::default() };
        assert_eq!(prices().cost(&model("anthropic/claude-haiku-4-5"), &write), Some(Usd::from_nanos(2_500)));
    }

    #[test]
    fn reasoning_is_part_of_the_output_and_not_paid_twice() {
        let thinking = Usage { output_tokens: 100, reasoning_tokens: 90, ..Usage::default() };
        let o3 = model("openai/o3");
        assert_eq!(prices().cost(&o3, &thinking), prices().cost(&o3, &usage(0, 100)));
    }

    #[test]
    fn a_snapshot_costs_what_its_model_costs() {
        for (snapshot, of) in [
            ("openai/gpt-5-mini-2025-08-07", "openai/gpt-5-mini"),
            ("openai/gpt-5-2025-08-07", "openai/gpt-5"),
            ("anthropic/claude-haiku-4-5-20251001", "anthropic/claude-haiku-4-5"),
            ("anthropic/claude-opus-4-20250514", "anthropic/claude-opus-4"),
            ("gemini/gemini-2.5-flash-preview-09-2025", "gemini/gemini-2.5-flash"),
            ("gemini/gemini-3.1-pro-preview", "gemini/gemini-3.1-pro"),
        ] {
            let bought = usage(1_000, 1_000);
            let cost = prices().cost(&model(snapshot), &bought);
            assert!(cost.is_some(), "{snapshot}");
            assert_eq!(cost, prices().cost(&model(of), &bought), "{snapshot}");
        }
    }

    #[test]
    fn an_unknown_model_has_no_price() {
        for unknown in [
            "openai/gpt-5-turbo",
            "openai/gpt-5-mini-large",
            "openai/gpt-5.7",
            "openai/gpt-50",
            "anthropic/claude-opus-4-9",
            "local/llama-3",
        ] {
            assert_eq!(prices().cost(&model(unknown), &usage(1, 1)), None, "{unknown}");
            assert_eq!(prices().worst_case(&model(unknown), 1, 1), None, "{unknown}");
        }
    }

    #[test]
    fn a_long_prompt_costs_its_own_rate() {
        let pro = model("gemini/gemini-2.5-pro");
        assert_eq!(prices().cost(&pro, &usage(200_000, 0)), Some(Usd::from_dollars(0.25)));
        assert_eq!(prices().cost(&pro, &usage(200_001, 0)), Some(Usd::from_nanos(200_001 * 2_500)));
    }

    #[test]
    fn the_worst_case_is_no_less_than_any_cost_within_its_bounds() {
        for name in ["openai/gpt-6-sol", "anthropic/claude-sonnet-4-5", "gemini/gemini-2.5-pro", "sim/quick"] {
            let worst = prices().worst_case(&model(name), 1_000, 500).expect("priced");
            for (input, read, write) in [(1_000, 0, 0), (0, 1_000, 0), (0, 0, 1_000), (300, 300, 400)] {
                let usage = Usage {
                    input_tokens: input,
                    cache_read_tokens: read,
                    cache_write_tokens: write,
                    output_tokens: 500,
                    ..Usage::default()
                };
                assert!(prices().cost(&model(name), &usage).expect("priced") <= worst, "{name}");
            }
        }
    }

    #[test]
    fn configured_prices_stand_above_the_table() {
        let price = |input| Price { input, output: 1.0, cache_read: None, cache_write: None };
        let mut config = LlmConfig::default();
        config.prices.insert("openai/gpt-5-mini".into(), price(9.0));
        config.prices.insert("local/*".into(), price(0.0));
        let prices = Prices::new(&config).expect("valid");
        assert_eq!(prices.cost(&model("openai/gpt-5-mini"), &usage(1, 0)), Some(Usd::from_nanos(9_000)));
        assert_eq!(prices.cost(&model("local/llama-3"), &usage(1, 0)), Some(Usd::ZERO));
        assert_eq!(prices.cost(&model("openai/gpt-5"), &usage(1, 0)), Some(Usd::from_nanos(1_250)));

        config.prices.insert("nameless".into(), price(-1.0));
        let error = Prices::new(&config).expect_err("refused");
        assert_eq!((error.code, error.violations.len()), (Code::InvalidConfig, 2));
        assert_eq!(error.violations[0].path, "llm.prices.nameless");
    }

    #[test]
    fn the_bound_on_tokens_counts_every_byte_of_any_text() {
        let message = |content: &str| Message { role: stagegate_core::pipeline::Role::User, content: content.into() };
        // Each of these is one token a byte, or nearly, for some tokenizer in use.
        for text in
            ["", "a", "\u{10ffff}\u{10fffe}", "日本語の文章です。", "q\u{0}\u{1}\u{2}", "ꙮꙮꙮ", "1 2 3 4 5 6 7 8"]
        {
            let messages = [message(text)];
            let bound = count_tokens_upper(&messages, &OutputFormat::Text);
            assert!(bound >= text.len() as u64, "{text}");
            assert!(bound >= count_tokens_typical(&messages), "{text}");
        }
    }

    #[test]
    fn the_bound_on_tokens_counts_the_schema_and_the_format() {
        let schema = serde_json::json!({ "type": "object", "description": "a".repeat(1_000) });
        let bytes = schema.to_string().len() as u64;
        let json = |schema| count_tokens_upper(&[], &OutputFormat::Json { schema });
        assert!(json(None) > count_tokens_upper(&[], &OutputFormat::Text));
        assert_eq!(json(Some(std::sync::Arc::new(schema))), json(None) + bytes);
    }

    #[test]
    fn costs_of_impossible_counts_saturate() {
        let all =
            Usage { input_tokens: u64::MAX, cache_read_tokens: u64::MAX, output_tokens: u64::MAX, ..Usage::default() };
        assert_eq!(prices().cost(&model("openai/gpt-5"), &all), Some(Usd::from_nanos(i64::MAX)));
        assert_eq!(prices().worst_case(&model("openai/gpt-5"), u64::MAX, u64::MAX), Some(Usd::from_nanos(i64::MAX)));
    }
}
