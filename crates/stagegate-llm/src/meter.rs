//! What this layer measures: owns the labels. Callers cannot make up a label's value: providers are the configured
//! ones, models those with a price, and of these only so many.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use stagegate_core::{Code, ModelRef, Usage, Usd};
use stagegate_telemetry::Metrics;

use crate::{breaker::BreakerState, prices::Prices};

/// Models with a label of their own, at most; a wildcard price would otherwise let callers make them up.
const MODEL_LABELS_MAX: usize = 256;
/// The label of everything else.
const OTHER: &str = "other";

/// Measures. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Meter {
    metrics: Metrics,
    prices: Arc<Prices>,
    providers: Arc<HashSet<String>>,
    named: Arc<Mutex<HashSet<ModelRef>>>,
}

impl Meter {
    /// For these providers.
    pub(crate) fn new(metrics: Metrics, prices: Arc<Prices>, providers: impl IntoIterator<Item = String>) -> Self {
        Self { metrics, prices, providers: Arc::new(providers.into_iter().collect()), named: Arc::default() }
    }

    /// The labels of a model: its provider and itself, each as far as it is known.
    pub(crate) fn labels<'a>(&self, model: &'a ModelRef) -> [&'a str; 2] {
        if !self.providers.contains(model.provider()) {
            return [OTHER, OTHER];
        }
        if !self.prices.is_priced(model) {
            return [model.provider(), OTHER];
        }
        let mut named = self.named.lock().unwrap_or_else(PoisonError::into_inner);
        let known = named.contains(model) || (named.len() < MODEL_LABELS_MAX && named.insert(model.clone()));
        [model.provider(), if known { model.model() } else { OTHER }]
    }

    /// A provider was called: what came of it, and how long it took.
    pub(crate) fn call(&self, model: &ModelRef, error: Option<Code>, latency: Duration) {
        let [provider, name] = self.labels(model);
        self.metrics.llm_calls.with_label_values(&[provider, name, error.map_or("ok", Code::label)]).inc();
        self.metrics.llm_duration.with_label_values(&[provider, name]).observe(latency.as_secs_f64());
    }

    /// Tokens were bought, at this cost; None where the model has no price.
    pub(crate) fn bought(&self, model: &ModelRef, usage: &Usage, cost: Option<Usd>) {
        let labels @ [provider, name] = self.labels(model);
        let classes = [
            ("input", usage.input_tokens),
            ("cache_read", usage.cache_read_tokens),
            ("cache_write", usage.cache_write_tokens),
            ("output", usage.output_tokens),
        ];
        for (class, tokens) in classes {
            self.metrics.llm_tokens.with_label_values(&[provider, name, class]).inc_by(tokens);
        }
        match cost {
            Some(cost) => self.metrics.llm_cost.with_label_values(&labels).inc_by(cost.dollars().max(0.0)),
            None => self.metrics.llm_unpriced.with_label_values(&labels).inc(),
        }
    }

    /// A hit saved this.
    pub(crate) fn saved(&self, model: &ModelRef, saved: Usd) {
        self.metrics.llm_saved.with_label_values(&self.labels(model)).inc_by(saved.dollars().max(0.0));
    }

    /// The breaker of a model stands so.
    pub(crate) fn breaker(&self, model: &ModelRef, state: BreakerState) {
        let state = match state {
            BreakerState::Closed => 0,
            BreakerState::HalfOpen => 1,
            BreakerState::Open => 2,
        };
        self.metrics.breaker_state.with_label_values(&self.labels(model)).set(state);
    }

    /// A look-up in a tier of the cache.
    pub(crate) fn cache_lookup(&self, tier: &'static str, outcome: &'static str) {
        self.metrics.cache_lookups.with_label_values(&[tier, outcome]).inc();
    }

    /// A write to a tier of the cache.
    pub(crate) fn cache_write(&self, tier: &'static str, done: bool) {
        self.metrics.cache_writes.with_label_values(&[tier, if done { "ok" } else { "error" }]).inc();
    }

    /// Answers were removed before their time.
    pub(crate) fn cache_eviction(&self, reason: &'static str) {
        self.metrics.cache_evictions.with_label_values(&[reason]).inc();
    }
}
