//! Who goes next, who waits, and who is turned away.

use std::{collections::BTreeMap, time::Duration};

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Value, json};
use stagegate_core::{Clock as _, Code, Error, RunId, RunState, SystemClock, TenantId, pipeline::Labels};
use stagegate_engine::{
    Action, Submit,
    config::{EngineConfig, TenantLimits},
};
use stagegate_testkit::provider::{Reply, contains};

use crate::bench::{Bench, assert_state, quick};

fn tenant(name: &str) -> TenantId {
    TenantId::new(name).expect("a name")
}

/// One stage that asks for `input.text`; `more` are further keys of the definition.
fn one_stage(more: &Value) -> String {
    let mut definition = json!({
        "name": "one",
        "defaults": { "model": "fake/model", "retry": { "max_attempts": 1 } },
        "stages": [{ "id": "only", "prompt": "say {{ input.text }}" }]
    });
    let keys = definition.as_object_mut().expect("a map");
    keys.extend(more.as_object().cloned().unwrap_or_default());
    definition.to_string()
}

struct Order {
    bench: Bench,
}

impl Order {
    async fn with(config: EngineConfig, more: Value) -> Self {
        let bench = Bench::with(config).await;
        for name in ["default", "busy", "small"] {
            bench.engine.register(&tenant(name), &one_stage(&more)).await.expect("valid");
        }
        Self { bench }
    }

    async fn submit(&self, of: &str, input: Value, priority: i16, at: Option<DateTime<Utc>>) -> Result<RunId, Error> {
        let submit = Submit {
            tenant: tenant(of),
            pipeline: "one".parse().expect("a name"),
            version: None,
            input: input.into(),
            cache_mode: None,
            priority,
            labels: Labels::new(),
            idempotency: None,
            start_at: at,
            request_id: None,
        };
        Ok(self.bench.engine.submit(submit).await?.0.id)
    }

    async fn said(&self, of: &str, text: &str, priority: i16) -> RunId {
        self.submit(of, json!({ "text": text }), priority, None).await.expect("accepted")
    }

    /// Submits until the queue is full. It is counted about once a second, so that a few more may come in before that is
    /// known.
    async fn refused(&self, of: &str) -> Error {
        loop {
            match self.submit(of, json!({ "text": "one more" }), 0, None).await {
                Ok(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                Err(error) => {
                    assert_eq!(error.code, Code::QueueFull);
                    assert!(error.retry_after.is_some(), "{error:?}");
                    return error;
                }
            }
        }
    }

    async fn ended(&self, of: &str, run: RunId) -> RunState {
        loop {
            let record = self.bench.engine.store().run_record(&tenant(of), run).await.expect("read").expect("there");
            if record.state.is_terminal() {
                return record.state;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// The place of a call among all calls.
    fn place(&self, text: &str) -> usize {
        let found = self.bench.provider.calls_where(&contains(text));
        assert_eq!(found.len(), 1, "{text} is asked for once");
        found[0].index
    }
}

#[tokio::test]
async fn a_higher_priority_goes_first() {
    let order = Order::with(EngineConfig { max_runs: 1, ..quick() }, json!({})).await;
    order.bench.provider.on(contains("blocker")).respond(Reply::echo().after(Duration::from_millis(400)));
    let mut runs = vec![order.said("default", "blocker", 0).await];
    for n in 0..3 {
        runs.push(order.said("default", &format!("usual {n}"), 0).await);
    }
    runs.push(order.said("default", "urgent", 9).await);
    for run in runs {
        assert_eq!(order.ended("default", run).await, RunState::Succeeded);
    }
    assert_eq!(order.place("urgent"), 1, "right after the one that was under way");
    assert!(order.place("usual 0") < order.place("usual 1"), "then by age");
}

#[tokio::test]
async fn a_tenants_first_run_does_not_wait_behind_anothers_many() {
    let order = Order::with(EngineConfig { max_runs: 2, ..quick() }, json!({})).await;
    order.bench.provider.set_latency(Duration::from_millis(20));
    let mut busy = Vec::new();
    for n in 0..60 {
        busy.push(order.said("busy", &format!("busy {n}."), 9).await);
    }
    let small = order.said("small", "the small one", 0).await;
    let before = order.bench.provider.call_count();
    assert_eq!(order.ended("small", small).await, RunState::Succeeded);
    let place = order.place("the small one");
    // The two under way when it came, and what was claimed with them; far from the sixty.
    assert!(place <= before + 6, "it was number {place}, {before} had begun before it came");
    for run in busy {
        assert_eq!(order.ended("busy", run).await, RunState::Succeeded);
    }
}

#[tokio::test]
async fn runs_with_the_same_key_never_overlap_and_others_do() {
    let limits = json!({ "concurrency": { "key": "input.customer", "max_runs_per_key": 1 } });
    let order = Order::with(quick(), limits).await;
    order.bench.provider.set_latency(Duration::from_millis(60));
    let mut runs = Vec::new();
    for n in 0..4 {
        for customer in ["ann", "bob"] {
            let input = json!({ "text": format!("{customer} {n}"), "customer": customer });
            runs.push(order.submit("default", input, 0, None).await.expect("accepted"));
        }
    }
    for run in runs {
        assert_eq!(order.ended("default", run).await, RunState::Succeeded);
    }
    for customer in ["ann", "bob"] {
        let calls = order.bench.provider.calls_where(&contains(customer));
        assert_eq!(calls.len(), 4);
        let overlap = calls.iter().enumerate().any(|(n, call)| calls[n + 1..].iter().any(|other| call.overlaps(other)));
        assert!(!overlap, "{customer}'s runs go one after the other");
    }
    assert_eq!(order.bench.provider.most_under_way(), 2, "two customers at once");
}

#[tokio::test]
async fn an_input_that_gives_no_key_is_refused() {
    let order = Order::with(quick(), json!({ "concurrency": { "key": "input.customer" } })).await;
    let error = order.submit("default", json!({ "text": "x" }), 0, None).await.expect_err("refused");
    assert_eq!(error.code, Code::InvalidInput);
    assert!(error.violations[0].message.contains("concurrency key"), "{error:?}");
}

#[tokio::test]
async fn a_pipelines_and_a_tenants_limit_hold() {
    let order = Order::with(quick(), json!({ "concurrency": { "max_runs": 2 } })).await;
    order.bench.provider.set_latency(Duration::from_millis(40));
    let mut runs = Vec::new();
    for n in 0..8 {
        runs.push(order.said("default", &format!("number {n}"), 0).await);
    }
    for run in runs {
        assert_eq!(order.ended("default", run).await, RunState::Succeeded);
    }
    assert_eq!(order.bench.provider.most_under_way(), 2);

    let tenants = BTreeMap::from([(tenant("small"), TenantLimits { max_runs: Some(1), ..TenantLimits::default() })]);
    let order = Order::with(EngineConfig { tenants, ..quick() }, json!({})).await;
    order.bench.provider.set_latency(Duration::from_millis(40));
    let mut runs = Vec::new();
    for n in 0..4 {
        runs.push(order.said("small", &format!("number {n}"), 0).await);
    }
    for run in runs {
        assert_eq!(order.ended("small", run).await, RunState::Succeeded);
    }
    assert_eq!(order.bench.provider.most_under_way(), 1);
}

#[tokio::test]
async fn a_delayed_run_starts_at_its_time_and_not_before() {
    let order = Order::with(quick(), json!({})).await;
    let at = SystemClock.now() + TimeDelta::milliseconds(700);
    let run = order.submit("default", json!({ "text": "later" }), 0, Some(at)).await.expect("accepted");
    let record = order.bench.detail(run).await.run;
    assert_eq!((record.state, record.start_at.is_some()), (RunState::Queued, true));
    assert!(record.deadline_at >= at, "its deadline counts from there");
    assert_eq!(order.ended("default", run).await, RunState::Succeeded);
    let record = order.bench.detail(run).await.run;
    assert!(record.started_at >= Some(at), "{record:?}");
}

#[tokio::test]
async fn a_delayed_run_that_is_cancelled_never_starts() {
    let order = Order::with(quick(), json!({})).await;
    let at = SystemClock.now() + TimeDelta::days(30);
    let run = order.submit("default", json!({ "text": "never" }), 0, Some(at)).await.expect("accepted");
    order.bench.engine.act(&tenant("default"), run, Action::Cancel, None).await.expect("asked");
    assert_eq!(order.ended("default", run).await, RunState::Cancelled);
    assert_eq!(order.bench.provider.call_count(), 0);

    let far = SystemClock.now() + TimeDelta::days(400);
    let error = order.submit("default", json!({ "text": "x" }), 0, Some(far)).await.expect_err("refused");
    assert_eq!(error.code, Code::InvalidStart);
}

#[tokio::test]
async fn past_the_queues_limit_a_submit_is_told_when_to_come_back() {
    let tenants = BTreeMap::from([(tenant("busy"), TenantLimits { max_queued: 3, ..TenantLimits::default() })]);
    // No room at all: everything waits.
    let order = Order::with(EngineConfig { max_runs: 0, tenants, ..quick() }, json!({})).await;
    for n in 0..3 {
        order.said("busy", &format!("number {n}"), 0).await;
    }
    let error = order.refused("busy").await;
    assert!(error.detail.contains("engine.tenants.NAME.max_queued"), "{error:?}");
    order.said("small", "another tenant's", 0).await;
}

#[tokio::test]
async fn past_the_whole_queues_limit_every_tenant_is_told_and_none_of_another() {
    let order = Order::with(EngineConfig { max_runs: 0, max_queued: 2, ..quick() }, json!({})).await;
    for n in 0..2 {
        order.said("busy", &format!("number {n}"), 0).await;
    }
    let error = order.refused("small").await;
    assert!(error.detail.contains("engine.max_queued") && !error.detail.contains("busy"), "{error:?}");
}

#[tokio::test]
async fn runs_that_go_through_a_short_queue_do_not_fill_it() {
    let limits = TenantLimits { max_queued: 2, max_runs: Some(1), ..TenantLimits::default() };
    let order =
        Order::with(EngineConfig { tenants: BTreeMap::from([(tenant("busy"), limits)]), ..quick() }, json!({})).await;
    for n in 0..20 {
        let run = order.said("busy", &format!("number {n}"), 0).await;
        assert_eq!(order.ended("busy", run).await, RunState::Succeeded, "none waits when the next one comes");
    }
}

#[tokio::test]
async fn what_was_run_before_is_gone_after_its_time() {
    let short = json!({ "retention": { "succeeded": "200ms", "failed": "1h", "payloads": "1ms" } });
    let every = stagegate_core::pipeline::Span(Duration::from_millis(50));
    let order = Order::with(EngineConfig { retention_every: every, ..quick() }, short).await;
    order.bench.provider.on(contains("fails")).respond(Reply::status(400, "{}"));
    let good = order.said("default", "works", 0).await;
    let bad = order.said("default", "fails", 0).await;
    assert_eq!(order.ended("default", bad).await, RunState::Failed);
    let store = order.bench.engine.store();
    while store.run_record(&tenant("default"), good).await.expect("read").is_some() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(store.events(&tenant("default"), good, 0, 10).await.expect("read").is_empty(), "whole");
    let kept = loop {
        let detail = order.bench.detail(bad).await;
        if detail.run.purged_at.is_some() {
            break detail;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_state(&kept.run, RunState::Failed);
    assert_eq!(kept.input, Value::Null, "its input is gone, its record is not");
    let retried = order.bench.engine.act(&tenant("default"), bad, Action::Retry, None).await.expect_err("refused");
    assert_eq!(retried.code, Code::Purged);
    order.bench.engine.delete(&tenant("default"), bad).await.expect("deleted");
    let again = order.bench.engine.delete(&tenant("default"), bad).await.expect_err("there is none");
    assert_eq!(again.code, Code::RunNotFound);
}
