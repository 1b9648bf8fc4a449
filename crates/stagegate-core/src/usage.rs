//! Tokens and money: owns their units and arithmetic. Never rounds a cost away.

use std::{
    iter::Sum,
    ops::{Add, AddAssign, Sub},
};

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::ToSchema;

/// US dollars, held as whole nano-dollars so that sums are exact. JSON shows a number of dollars.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, ToSchema)]
#[schema(value_type = f64)]
pub struct Usd(i64);

impl Usd {
    /// Nothing.
    pub const ZERO: Self = Self(0);

    /// From whole nano-dollars.
    pub const fn from_nanos(nanos: i64) -> Self {
        Self(nanos)
    }

    /// From dollars, rounded to the nearest nano-dollar. Not a number becomes zero.
    #[expect(clippy::cast_possible_truncation, reason = "float casts saturate; amounts stay below 9 billion dollars")]
    pub fn from_dollars(dollars: f64) -> Self {
        Self((dollars * 1e9).round() as i64)
    }

    /// Whole nano-dollars.
    pub const fn nanos(self) -> i64 {
        self.0
    }

    /// Dollars, for people and JSON.
    #[expect(clippy::cast_precision_loss, reason = "for display; sums are made in nanos")]
    pub fn dollars(self) -> f64 {
        self.0 as f64 / 1e9
    }
}

impl Add for Usd {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl Sub for Usd {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl AddAssign for Usd {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sum for Usd {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::ZERO, Add::add)
    }
}

impl Serialize for Usd {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.dollars())
    }
}

impl<'de> Deserialize<'de> for Usd {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        f64::deserialize(deserializer).map(Self::from_dollars)
    }
}

impl JsonSchema for Usd {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Usd".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "number", "minimum": 0, "description": "US dollars" })
    }
}

/// Tokens of one or more model calls. The four priced classes are disjoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Usage {
    /// Prompt tokens billed at the full input price (cache reads and writes not included).
    pub input_tokens: u64,
    /// Prompt tokens that the provider read from its own prompt cache.
    pub cache_read_tokens: u64,
    /// Prompt tokens that the provider wrote to its own prompt cache.
    pub cache_write_tokens: u64,
    /// Tokens of the answer, reasoning included.
    pub output_tokens: u64,
    /// How many of the output tokens were reasoning; a part of `output_tokens`, not beside it.
    pub reasoning_tokens: u64,
    /// True where the provider reported no usage and these are our estimate.
    pub estimated: bool,
}

impl Usage {
    /// Tokens of the prompt, of every class.
    pub fn prompt_tokens(&self) -> u64 {
        self.input_tokens.saturating_add(self.cache_read_tokens).saturating_add(self.cache_write_tokens)
    }

    /// Every token, in and out.
    pub fn total_tokens(&self) -> u64 {
        self.prompt_tokens().saturating_add(self.output_tokens)
    }

    /// The same with no class above [`TOKENS_MAX`]; None where none is, so that there is nothing to tell.
    pub fn capped(&self) -> Option<Self> {
        let cap = |tokens: u64| tokens.min(TOKENS_MAX);
        let capped = Self {
            input_tokens: cap(self.input_tokens),
            cache_read_tokens: cap(self.cache_read_tokens),
            cache_write_tokens: cap(self.cache_write_tokens),
            output_tokens: cap(self.output_tokens),
            reasoning_tokens: cap(self.reasoning_tokens),
            estimated: self.estimated,
        };
        (capped != *self).then_some(Self { estimated: true, ..capped })
    }
}

/// The most tokens of one class that one call can have taken: a hundred times the longest context of any model. A
/// provider that tells more is not believed.
pub const TOKENS_MAX: u64 = 100_000_000;

impl AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        let add = |sum: &mut u64, tokens: u64| *sum = sum.saturating_add(tokens);
        add(&mut self.input_tokens, other.input_tokens);
        add(&mut self.cache_read_tokens, other.cache_read_tokens);
        add(&mut self.cache_write_tokens, other.cache_write_tokens);
        add(&mut self.output_tokens, other.output_tokens);
        add(&mut self.reasoning_tokens, other.reasoning_tokens);
        self.estimated = self.estimated || other.estimated;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_small_costs_are_exact() {
        let total: Usd = (0..1_000_000).map(|_| Usd::from_dollars(0.000_000_25)).sum();
        assert_eq!(total, Usd::from_dollars(0.25));
    }

    #[test]
    fn token_counts_at_the_end_of_the_range_saturate_and_never_wrap() {
        let all = Usage { input_tokens: u64::MAX, output_tokens: u64::MAX, ..Usage::default() };
        let mut sum = all;
        sum += all;
        assert_eq!((sum.input_tokens, sum.total_tokens()), (u64::MAX, u64::MAX));
        let capped = all.capped().expect("what cannot be is told");
        assert_eq!((capped.input_tokens, capped.output_tokens, capped.estimated), (TOKENS_MAX, TOKENS_MAX, true));
        assert_eq!(Usage { input_tokens: TOKENS_MAX, ..Usage::default() }.capped(), None);
    }
}
