//! The metrics catalogue: owns every metric's name, labels and buckets. Nothing else registers one, and no metric has
//! a label whose values a caller can make up.
//!
//! To add a metric, add an entry below: its doc comment is the help text.

use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
};

#[cfg(target_os = "linux")]
use prometheus::process_collector::ProcessCollector;
use prometheus::{
    CounterVec, Encoder, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};
use stagegate_core::{Code, StoreError};

/// Seconds, for things that take from half a millisecond to a minute.
const LATENCY_S: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
/// Seconds, for things that take from a tenth of a second to a day.
const LONG_S: &[f64] = &[0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0, 86400.0];
/// Scores in [0, 1].
const SCORE: &[f64] = &[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];
/// Rows in a batch.
const BATCH: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

/// Makes one metric of each type from the catalogue's entry.
macro_rules! make {
    (IntCounter, $name:literal, $help:expr, []) => { IntCounter::new($name, $help) };
    (IntGauge, $name:literal, $help:expr, []) => { IntGauge::new($name, $help) };
    (Gauge, $name:literal, $help:expr, []) => { Gauge::new($name, $help) };
    (IntCounterVec, $name:literal, $help:expr, [$($label:literal),+]) => { IntCounterVec::new(Opts::new($name, $help), &[$($label),+]) };
    (CounterVec, $name:literal, $help:expr, [$($label:literal),+]) => { CounterVec::new(Opts::new($name, $help), &[$($label),+]) };
    (IntGaugeVec, $name:literal, $help:expr, [$($label:literal),+]) => { IntGaugeVec::new(Opts::new($name, $help), &[$($label),+]) };
    (Histogram, $name:literal, $help:expr, [] $buckets:expr) => {
        Histogram::with_opts(HistogramOpts::new($name, $help).buckets($buckets.to_vec()))
    };
    (HistogramVec, $name:literal, $help:expr, [$($label:literal),+] $buckets:expr) => {
        HistogramVec::new(HistogramOpts::new($name, $help).buckets($buckets.to_vec()), &[$($label),+])
    };
}

macro_rules! catalogue {
    ($($(#[doc = $help:literal])+ $field:ident: $kind:ident = $name:literal [$($label:literal),*] $($buckets:expr)?;)*) => {
        /// Every metric. Cheap to clone; handed to whoever measures.
        #[derive(Debug, Clone)]
        pub struct Metrics {
            registry: Registry,
            $($(#[doc = $help])+ pub $field: $kind,)*
        }

        impl Metrics {
            /// A fresh catalogue with its own registry.
            pub fn new() -> Self {
                let registry = Registry::new();
                $(
                    let help = concat!($($help),+).trim();
                    let $field = make!($kind, $name, help, [$($label),*] $($buckets)?).expect("a valid literal");
                    registry.register(Box::new($field.clone())).expect("a unique literal");
                )*
                // What the process itself takes, by the names that every Prometheus client has for it. Linux tells it.
                #[cfg(target_os = "linux")]
                registry.register(Box::new(ProcessCollector::for_self())).expect("unique names");
                let metrics = Self { registry, $($field,)* };
                metrics.begin();
                metrics
            }

            /// Name, type, labels and help of each metric, for the documentation.
            pub const CATALOGUE: &'static [(&'static str, &'static str, &'static [&'static str], &'static str)] =
                &[$(($name, stringify!($kind), &[$($label),*], concat!($($help),+)),)*];
        }
    };
}

catalogue! {
    /// Which version runs; always 1.
    build_info: IntGaugeVec = "stagegate_build_info" ["version"];

    /// HTTP requests answered, by method, route template and status.
    http_requests: IntCounterVec = "stagegate_http_requests_total" ["method", "route", "status"];
    /// Seconds from a request's head to its response's head, by method and route template.
    http_duration: HistogramVec = "stagegate_http_request_duration_seconds" ["method", "route"] LATENCY_S;
    /// HTTP requests under way.
    http_in_flight: IntGauge = "stagegate_http_requests_in_flight" [];
    /// Event streams open.
    sse_streams: IntGauge = "stagegate_sse_streams" [];

    /// Runs accepted by this replica.
    runs_accepted: IntCounter = "stagegate_runs_accepted_total" [];
    /// Runs finished by this replica, by terminal state.
    runs_finished: IntCounterVec = "stagegate_runs_finished_total" ["state"];
    /// Seconds from a run's acceptance to its end, by terminal state.
    run_duration: HistogramVec = "stagegate_run_duration_seconds" ["state"] LONG_S;
    /// Runs that this replica executes.
    runs_in_flight: IntGauge = "stagegate_runs_in_flight" [];

    /// Large evaluations of templates, checks, schemas and definitions, by outcome (done, refused, late, panicked,
    /// abandoned). Refused ones would have taken too long or too much memory. Small ones run at once and are not counted.
    evaluations: IntCounterVec = "stagegate_evaluations_total" ["outcome"];
    /// Seconds that a large evaluation took, its wait for a thread included.
    evaluation_duration: Histogram = "stagegate_evaluation_duration_seconds" [] LATENCY_S;
    /// Large evaluations that wait for a thread.
    evaluations_waiting: IntGauge = "stagegate_evaluations_waiting" [];
    /// Seconds that an attempt at a stage took, by the gate's verdict.
    stage_duration: HistogramVec = "stagegate_stage_attempt_duration_seconds" ["verdict"] LONG_S;
    /// Stages that ended, by outcome: succeeded, failed, held.
    stages_ended: IntCounterVec = "stagegate_stages_total" ["outcome"];

    /// Assessments, by evaluator and whether they passed.
    assessments: IntCounterVec = "stagegate_assessments_total" ["evaluator", "passed"];
    /// Verdicts of gates.
    gate_verdicts: IntCounterVec = "stagegate_gate_verdicts_total" ["verdict"];
    /// Quality scores of outputs, by evaluator.
    quality_score: HistogramVec = "stagegate_quality_score" ["evaluator"] SCORE;

    /// Model calls, by provider, model and outcome (`ok` or the error's code).
    llm_calls: IntCounterVec = "stagegate_llm_calls_total" ["provider", "model", "outcome"];
    /// Seconds that a model call took, by provider and model.
    llm_duration: HistogramVec = "stagegate_llm_call_duration_seconds" ["provider", "model"] LONG_S;
    /// Tokens bought, by provider, model and class (`input`, `cache_read`, `cache_write`, `output`).
    llm_tokens: IntCounterVec = "stagegate_llm_tokens_total" ["provider", "model", "class"];
    /// US dollars paid, by provider and model.
    llm_cost: CounterVec = "stagegate_llm_cost_usd_total" ["provider", "model"];
    /// US dollars that cache hits saved, by provider and model.
    llm_saved: CounterVec = "stagegate_llm_saved_usd_total" ["provider", "model"];
    /// Calls to models that the price table does not know.
    llm_unpriced: IntCounterVec = "stagegate_llm_unpriced_calls_total" ["provider", "model"];
    /// State of the breaker of a model: 0 closed, 1 half open, 2 open.
    breaker_state: IntGaugeVec = "stagegate_llm_breaker_state" ["provider", "model"];

    /// Look-ups in the response cache, by tier (local, shared) and outcome (hit, miss, stale, error).
    cache_lookups: IntCounterVec = "stagegate_cache_lookups_total" ["tier", "outcome"];
    /// Answers written to the response cache, by tier and outcome (ok, error).
    cache_writes: IntCounterVec = "stagegate_cache_writes_total" ["tier", "outcome"];
    /// Answers removed before their time, by reason (gate, invalidate).
    cache_evictions: IntCounterVec = "stagegate_cache_evictions_total" ["reason"];

    /// Seconds that a commit of checkpoints took, from its batch's start to its acknowledgement.
    checkpoint_save: Histogram = "stagegate_checkpoint_save_seconds" [] LATENCY_S;
    /// Seconds that it took to load a batch of runs.
    checkpoint_load: Histogram = "stagegate_checkpoint_load_seconds" [] LATENCY_S;
    /// Steps in one commit.
    commit_batch: Histogram = "stagegate_commit_batch_steps" [] BATCH;
    /// Events written.
    events_written: IntCounter = "stagegate_events_written_total" [];

    /// Runs in the store, by what they do: queued, running, waiting.
    queue_runs: IntGaugeVec = "stagegate_queue_runs" ["state"];
    /// Seconds that the oldest queued run has waited.
    queue_oldest: Gauge = "stagegate_queue_oldest_age_seconds" [];
    /// Leases that this replica holds.
    leases_held: IntGauge = "stagegate_leases_held" [];
    /// Leases that this replica lost to a take-over.
    leases_lost: IntCounter = "stagegate_leases_lost_total" [];
    /// Seconds by which this machine's clock is ahead of the database's, as of the last heartbeat.
    clock_skew: Gauge = "stagegate_clock_skew_seconds" [];
    /// Runs that this replica claimed from the queue or from dead replicas.
    runs_claimed: IntCounter = "stagegate_runs_claimed_total" [];

    /// Runs from which retention removed the payloads, or the whole (`payloads`, `run`), by this replica.
    retention_removed: IntCounterVec = "stagegate_retention_removed_total" ["what"];

    /// Database connections that are open, by state: `in_use`, `idle`.
    pool_connections: IntGaugeVec = "stagegate_db_pool_connections" ["state"];
    /// Database connections that may be open at once.
    pool_connections_max: IntGauge = "stagegate_db_pool_connections_max" [];
    /// Tasks that wait for a database connection.
    pool_waiters: IntGauge = "stagegate_db_pool_waiters" [];
    /// Seconds waited for a database connection.
    pool_wait: Histogram = "stagegate_db_pool_wait_seconds" [] LATENCY_S;

    /// Errors, by stable code.
    errors: IntCounterVec = "stagegate_errors_total" ["code"];
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// The values of a closed set of labels, as they stand in a series.
type Labels = &'static [&'static str];

/// Verdicts that an attempt can end with.
const VERDICTS: Labels = &["passed", "retry", "held", "accepted", "failed", "errored"];
/// States that a run can end in.
const ENDS: Labels = &["succeeded", "failed", "cancelled", "expired"];

impl Metrics {
    /// Begins every series whose labels are known, at nought: a rate needs a first value, and an alert on what never happened
    /// must see that it did not. Labels of models, routes and statuses are met when they come.
    fn begin(&self) {
        let counters: [(&IntCounterVec, &[Labels]); 10] = [
            (&self.runs_finished, &[ENDS]),
            (&self.evaluations, &[&["done", "refused", "late", "panicked", "abandoned"]]),
            (&self.stages_ended, &[&["succeeded", "failed", "held"]]),
            (&self.assessments, &[&["check", "judge"], &["true", "false"]]),
            (&self.gate_verdicts, &[VERDICTS]),
            (&self.cache_lookups, &[&["local", "shared"], &["hit", "miss", "stale", "error"]]),
            (&self.cache_writes, &[&["local", "shared"], &["ok", "error"]]),
            (&self.cache_evictions, &[&["gate", "invalidate"]]),
            (&self.retention_removed, &[&["payloads", "run"]]),
            (&self.errors, &[]),
        ];
        for (counter, sets) in counters {
            each(sets, |labels| drop(counter.with_label_values(labels)));
        }
        for code in Code::ALL {
            self.errors.with_label_values(&[code.as_str()]);
        }
        for (histogram, values) in [
            (&self.run_duration, ENDS),
            (&self.stage_duration, VERDICTS),
            (&self.quality_score, &["check", "judge"][..]),
        ] {
            each(&[values], |labels| drop(histogram.with_label_values(labels)));
        }
        let gauges: [(&IntGaugeVec, Labels); 2] =
            [(&self.queue_runs, &["queued", "running", "waiting"]), (&self.pool_connections, &["in_use", "idle"])];
        for (gauge, values) in gauges {
            each(&[values], |labels| drop(gauge.with_label_values(labels)));
        }
    }

    /// A stored row cannot be read, and the others are: it is counted each time and told once.
    pub fn unreadable(&self, error: &StoreError) {
        const TOLD_MAX: usize = 1_000;
        static TOLD: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
        self.errors.with_label_values(&[Code::CorruptRow.as_str()]).inc();
        let mut told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
        if told.len() < TOLD_MAX && told.insert(error.to_string()) {
            tracing::error!(%error, "a stored row cannot be read; the others are");
        }
    }

    /// The Prometheus text format, as `/metrics` answers it.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        let mut text = Vec::with_capacity(16 * 1024);
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        String::from_utf8(text).map_err(|error| prometheus::Error::Msg(error.to_string()))
    }
}

/// Each combination of the values of one or two labels.
fn each(sets: &[Labels], mut begin: impl FnMut(&[&str])) {
    match sets {
        [only] => only.iter().for_each(|value| begin(&[*value])),
        [first, second] => first.iter().for_each(|one| second.iter().for_each(|other| begin(&[*one, *other]))),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_named_by_the_rules() {
        let _ = Metrics::new();
        for (name, kind, _, help) in Metrics::CATALOGUE {
            assert!(name.starts_with("stagegate_"), "{name}");
            assert_eq!(name.ends_with("_total"), kind.contains("Counter"), "{name}: counters end in _total");
            assert!(help.trim().ends_with('.'), "{name}: the help is a sentence");
        }
    }
}
