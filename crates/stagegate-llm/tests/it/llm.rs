//! The assembled layer: what is cached and what never is, who pays and who shares, which model is asked next.

use std::{collections::HashSet, sync::Arc, time::Duration};

use serde_json::json;
use stagegate_core::{
    CallPurpose, Code, Origin, PipelineName, StageId, Usd,
    cache::CacheScope,
    decide::FailureKind,
    pipeline::{CacheMode, Models, OutputFormat},
};
use stagegate_llm::{CallContext, Llm, Request};
use stagegate_telemetry::Metrics;
use stagegate_testkit::provider::{End, Reply, any, model as of_model};
use tokio::time::Instant;

use crate::bench::{
    Act, Bench, COST, Scripted, chain, config, context, in_mode, last, model, request, run, scripted, tenant,
};

#[tokio::test]
async fn a_second_identical_call_asks_no_provider() {
    let bench = Bench::new().await;
    let bought = bench.ask(&context(), &request("q")).await;
    let hit = bench.ask(&CallContext { run: run(2), ..context() }, &request("q")).await;
    assert_eq!(bench.calls(), 1);
    assert_eq!((&hit.content, hit.key), (&bought.content, bought.key));
    let (paid, saved) = (last(&bought), last(&hit));
    assert_eq!((paid.origin, paid.cost_usd, paid.saved_usd), (Origin::Provider, COST, Usd::ZERO));
    assert_eq!((saved.origin, saved.cost_usd, saved.saved_usd), (Origin::CacheLocal, Usd::ZERO, COST));
    assert_eq!(saved.usage, paid.usage, "a hit reports the original tokens");
    assert!(saved.priced);
    let metrics = bench.metrics();
    for line in [
        r#"stagegate_llm_calls_total{model="priced",outcome="ok",provider="one"} 1"#,
        r#"stagegate_llm_tokens_total{class="input",model="priced",provider="one"} 100"#,
        r#"stagegate_llm_saved_usd_total{model="priced",provider="one"} 0.00014"#,
        r#"stagegate_cache_lookups_total{outcome="hit",tier="local"} 1"#,
    ] {
        assert!(metrics.contains(line), "{line}\n{metrics}");
    }
}

/// Asks twice; the vendor answers `first` and then as usual. Returns how often it was asked.
async fn asked_twice(first: Reply, request: &Request) -> usize {
    let bench = Bench::new().await;
    bench.vendor.on(any()).once(first);
    let _ = bench.llm.complete(&context(), request).await;
    let _ = bench.llm.complete(&context(), request).await;
    bench.calls()
}

fn json_request() -> Request {
    let schema = json!({ "type": "object", "required": ["a"], "properties": { "a": { "type": "integer" } } });
    Request { format: OutputFormat::Json { schema: Some(Arc::new(schema)) }, ..request("q") }
}

#[tokio::test]
async fn an_answer_that_was_cut_is_never_stored_and_is_handed_over_for_the_critique() {
    let bench = Bench::new().await;
    bench.vendor.on(any()).once(Reply::text("half an ans").end(End::Length));
    let mut request = request("q");
    request.params.max_output_tokens = Some(20);
    let error = bench.llm.complete(&context(), &request).await.expect_err("cut");
    assert_eq!((error.code, error.kind.is_retryable()), (Code::ProviderMalformed, true));
    assert_eq!(error.message, "the answer was cut at the token limit (max_output_tokens = 20)");
    let partial = error.partial.as_ref().expect("what there is of it");
    assert_eq!((partial.content.as_str(), &partial.model), ("half an ans", &model("one/priced")));
    assert_eq!(partial.message, error.message);
    let [call] = error.calls.as_slice() else { panic!("one call: {:?}", error.calls) };
    assert_eq!((call.cost_usd, call.error), (COST, Some(Code::ProviderMalformed)), "it was paid for");
    bench.ask(&context(), &request).await;
    assert_eq!(bench.calls(), 2);
}

#[tokio::test]
async fn an_answer_that_was_cut_before_a_word_was_said_is_not_worth_another_try() {
    let bench = Bench::new().await;
    bench.vendor.on(any()).once(Reply::text("").end(End::Length));
    let mut request = request("q");
    request.params.max_output_tokens = Some(20);
    let error = bench.llm.complete(&context(), &request).await.expect_err("cut");
    assert_eq!((error.code, error.kind.is_retryable()), (Code::ProviderMalformed, false));
    assert!(error.message.contains("max_output_tokens = 20") && error.message.contains("raise"), "{}", error.message);
    assert_eq!((error.partial, error.calls.len()), (None, 1));
}

#[tokio::test]
async fn a_refused_answer_is_never_stored() {
    let bench = Bench::new().await;
    bench.vendor.on(any()).once(Reply::text("I cannot").end(End::Refused));
    let error = bench.llm.complete(&context(), &request("q")).await.expect_err("refused");
    assert_eq!((error.code, error.kind.is_retryable()), (Code::ProviderRefused, false));
    assert_eq!(error.calls[0].cost_usd, COST);
    bench.ask(&context(), &request("q")).await;
    assert_eq!(bench.calls(), 2);
}

#[tokio::test]
async fn an_empty_answer_is_never_stored() {
    let bench = Bench::new().await;
    bench.vendor.on(any()).once(Reply::text(" \n"));
    let error = bench.llm.complete(&context(), &request("q")).await.expect_err("empty");
    assert_eq!((error.code, error.kind.is_retryable(), error.partial), (Code::ProviderMalformed, true, None));
    bench.ask(&context(), &request("q")).await;
    assert_eq!(bench.calls(), 2);
}

#[tokio::test]
async fn an_error_is_never_stored() {
    assert_eq!(asked_twice(Reply::status(500, "{}"), &request("q")).await, 2);
    assert_eq!(asked_twice(Reply::raw("not JSON"), &request("q")).await, 2);
    assert_eq!(asked_twice(Reply::close(), &request("q")).await, 2);
}

#[tokio::test]
async fn an_answer_that_is_no_json_is_handed_over_and_never_stored() {
    let bench = Bench::new().await;
    bench.vendor.on(any()).once(Reply::text("Sure! Here it is: {"));
    let reply = bench.ask(&context(), &json_request()).await;
    assert_eq!(reply.content, "Sure! Here it is: {", "the gate says what is wrong with it");
    bench.llm.remember(&context(), &request("another"), &reply).await;
    assert!(bench.llm.peek(&context(), &request("another")).await.is_none());
    bench.ask(&context(), &json_request()).await;
    assert_eq!(bench.calls(), 2);
    assert_eq!(asked_twice(Reply::text("```json\n{\"a\": 1}\n```"), &json_request()).await, 1, "a fence is no flaw");
}

#[tokio::test]
async fn an_answer_whose_gate_failed_is_evicted() {
    let bench = Bench::new().await;
    let reply = bench.ask(&context(), &request("q")).await;
    bench.llm.evict(&context().tenant, reply.key).await;
    bench.ask(&context(), &request("q")).await;
    assert_eq!(bench.calls(), 2);
    assert!(bench.metrics().contains(r#"stagegate_cache_evictions_total{reason="gate"} 1"#));
}

#[tokio::test]
async fn an_answer_is_never_served_past_its_ttl() {
    let bench = Bench::new().await;
    bench.ask(&context(), &request("q")).await;
    bench.clock.advance(Duration::from_mins(53));
    assert_eq!(last(&bench.ask(&context(), &request("q")).await).origin, Origin::CacheLocal);
    bench.clock.advance(Duration::from_mins(7));
    assert_eq!(last(&bench.ask(&context(), &request("q")).await).origin, Origin::Provider);
    assert_eq!(bench.calls(), 2);
}

#[tokio::test]
async fn a_reader_with_a_shorter_ttl_does_not_take_an_older_answer() {
    let bench = Bench::new().await;
    bench.ask(&context(), &request("q")).await;
    bench.clock.advance(Duration::from_mins(10));
    let strict = CallContext { cache_ttl: Duration::from_mins(10), ..context() };
    bench.ask(&strict, &request("q")).await;
    assert_eq!(bench.calls(), 2);
}

#[tokio::test]
async fn tenants_are_walls() {
    let bench = Bench::new().await;
    let (ours, theirs) = (context(), CallContext { tenant: tenant("other"), ..context() });
    let reply = bench.ask(&ours, &request("q")).await;
    assert!(bench.llm.peek(&theirs, &request("q")).await.is_none());
    let other = bench.ask(&theirs, &request("q")).await;
    assert_eq!(bench.calls(), 2);
    assert_ne!(reply.key, other.key);
    bench.llm.evict(&theirs.tenant, reply.key).await;
    bench.llm.invalidate(&theirs.tenant, &CacheScope::Tenant).await.expect("no tier");
    assert!(bench.llm.peek(&ours, &request("q")).await.is_some(), "nor does one evict or invalidate for another");
}

#[tokio::test]
async fn with_the_cache_off_the_answer_is_kept_for_its_run_alone() {
    let bench = Bench::new().await;
    bench.ask(&context(), &request("q")).await;
    let first = bench.ask(&in_mode(CacheMode::Off, 2), &request("q")).await;
    assert_eq!((last(&first).origin, bench.calls()), (Origin::Provider, 2), "it does not read what others bought");
    let again = bench.ask(&in_mode(CacheMode::Off, 2), &request("q")).await;
    assert_eq!((last(&again).origin, bench.calls()), (Origin::CacheLocal, 2), "what was received is not bought twice");
    bench.ask(&in_mode(CacheMode::Off, 3), &request("q")).await;
    assert_eq!(bench.calls(), 3, "another run buys its own");
    bench.llm.evict(&context().tenant, again.key).await;
    bench.ask(&in_mode(CacheMode::Off, 2), &request("q")).await;
    assert_eq!(bench.calls(), 4);
}

#[tokio::test]
async fn refresh_buys_anew_and_replaces() {
    let bench = Bench::new().await;
    bench.vendor.on(any()).once(Reply::text("old")).once(Reply::text("new"));
    assert_eq!(bench.ask(&context(), &request("q")).await.content, "old");
    assert_eq!(bench.ask(&in_mode(CacheMode::Refresh, 2), &request("q")).await.content, "new");
    let again = bench.ask(&in_mode(CacheMode::Refresh, 2), &request("q")).await;
    assert_eq!((last(&again).origin, bench.calls()), (Origin::CacheLocal, 2), "its own purchase is not bought twice");
    assert_eq!(bench.ask(&in_mode(CacheMode::Use, 3), &request("q")).await.content, "new");
    bench.ask(&in_mode(CacheMode::Refresh, 4), &request("q")).await;
    assert_eq!(bench.calls(), 3);
}

#[tokio::test]
async fn read_only_reads_and_never_writes_for_others() {
    let bench = Bench::new().await;
    bench.ask(&context(), &request("there")).await;
    let hit = bench.ask(&in_mode(CacheMode::ReadOnly, 2), &request("there")).await;
    assert_eq!((last(&hit).origin, bench.calls()), (Origin::CacheLocal, 1));
    bench.ask(&in_mode(CacheMode::ReadOnly, 2), &request("missing")).await;
    bench.ask(&in_mode(CacheMode::ReadOnly, 2), &request("missing")).await;
    assert_eq!(bench.calls(), 2, "its own purchase is not bought twice");
    bench.ask(&in_mode(CacheMode::Use, 3), &request("missing")).await;
    bench.ask(&in_mode(CacheMode::ReadOnly, 4), &request("other")).await;
    bench.ask(&in_mode(CacheMode::ReadOnly, 5), &request("other")).await;
    assert_eq!(bench.calls(), 5);
}

#[tokio::test]
async fn each_scope_is_invalidated_alone() {
    let (p, q) = (PipelineName::new("p").expect("a slug"), PipelineName::new("q").expect("a slug"));
    let (s, r) = (StageId::new("s").expect("a slug"), StageId::new("r").expect("a slug"));
    let reaching = [
        CacheScope::Tenant,
        CacheScope::Pipeline(p.clone()),
        CacheScope::Version(p.clone(), 1),
        CacheScope::Stage(p.clone(), s.clone()),
        CacheScope::Model(model("one/priced")),
    ];
    let missing = [
        CacheScope::Pipeline(q.clone()),
        CacheScope::Version(p.clone(), 2),
        CacheScope::Version(q.clone(), 1),
        CacheScope::Stage(p, r),
        CacheScope::Stage(q, s),
        CacheScope::Model(model("one/other")),
    ];
    let bench = Bench::new().await;
    let mut bought = 0;
    for (scope, reaches) in reaching.iter().map(|s| (s, true)).chain(missing.iter().map(|s| (s, false))) {
        bench.ask(&context(), &request("q")).await;
        bought = bench.calls().max(bought);
        bench.llm.invalidate(&context().tenant, scope).await.expect("no tier");
        bench.ask(&context(), &request("q")).await;
        assert_eq!(bench.calls() > bought, reaches, "{scope}");
    }
}

#[tokio::test]
async fn an_answer_asked_for_before_an_invalidation_is_not_used_after_it() {
    let one = Scripted::held(Act::Answer("before"));
    let (llm, _) = scripted(&[("one", &one)], &config());
    let early = tokio::spawn({
        let llm = llm.clone();
        async move { llm.complete(&context(), &request("q")).await }
    });
    one.arrived(1).await;
    llm.invalidate(&context().tenant, &CacheScope::Tenant).await.expect("no tier");
    one.set(Act::Answer("after"));
    let late = tokio::spawn({
        let llm = llm.clone();
        async move { llm.complete(&context(), &request("q")).await }
    });
    one.arrived(2).await;
    one.turns.add_permits(2);
    assert_eq!(early.await.expect("no panic").expect("an answer").content, "before", "who asked before gets it");
    let late = late.await.expect("no panic").expect("an answer");
    assert_eq!((late.content.as_str(), last(&late).origin), ("after", Origin::Provider), "and nobody else");

    // The other way round: the old answer lands alone, and the next one asks again.
    let early = tokio::spawn({
        let llm = llm.clone();
        async move { llm.complete(&context(), &request("r")).await }
    });
    one.arrived(3).await;
    llm.invalidate(&context().tenant, &CacheScope::Tenant).await.expect("no tier");
    one.turns.add_permits(2);
    early.await.expect("no panic").expect("an answer");
    let late = llm.complete(&context(), &request("r")).await.expect("an answer");
    assert_eq!((last(&late).origin, one.calls()), (Origin::Provider, 4));
}

#[tokio::test]
async fn identical_calls_under_way_share_one() {
    let bench = Bench::new().await;
    bench.vendor.set_latency(Duration::from_millis(200));
    let calls = (0..20).map(|n| {
        let llm = bench.llm.clone();
        tokio::spawn(async move { llm.complete(&CallContext { run: run(n), ..context() }, &request("q")).await })
    });
    let replies = futures::future::join_all(calls).await;
    let replies: Vec<_> = replies.into_iter().map(|reply| reply.expect("no panic").expect("an answer")).collect();
    assert_eq!(bench.calls(), 1);
    assert_eq!(replies.iter().map(|reply| reply.key).collect::<HashSet<_>>().len(), 1);
    let rows: Vec<_> = replies.iter().map(last).collect();
    assert_eq!(rows.iter().map(|row| row.cost_usd).sum::<Usd>(), COST, "it is paid once");
    assert_eq!(rows.iter().filter(|row| row.origin == Origin::Provider).count(), 1);
    for row in rows.iter().filter(|row| row.origin != Origin::Provider) {
        assert_eq!((row.saved_usd, row.usage.output_tokens), (COST, 20), "each is told what it saved");
    }
}

#[tokio::test]
async fn calls_that_are_not_identical_do_not_share() {
    let one = Scripted::held(Act::Answer("a"));
    let (llm, _) = scripted(&[("one", &one)], &config());
    let asks = [
        (context(), request("q")),
        (CallContext { tenant: tenant("other"), ..context() }, request("q")),
        (in_mode(CacheMode::Off, 1), request("q")),
        (in_mode(CacheMode::Off, 2), request("q")),
        (in_mode(CacheMode::Refresh, 2), request("q")),
        (context(), Request { sample: 1, ..request("q") }),
        (context(), request("Q")),
    ];
    let count = asks.len();
    let tasks: Vec<_> = asks
        .into_iter()
        .map(|(context, request)| {
            let llm = llm.clone();
            tokio::spawn(async move { llm.complete(&context, &request).await })
        })
        .collect();
    one.arrived(count).await;
    one.turns.add_permits(count);
    for task in tasks {
        let reply = task.await.expect("no panic").expect("an answer");
        assert_eq!(last(&reply).origin, Origin::Provider);
    }
}

#[tokio::test]
async fn waiters_get_the_answer_when_the_one_who_began_is_gone() {
    let one = Scripted::held(Act::Answer("kept"));
    let (llm, _) = scripted(&[("one", &one)], &config());
    let task = |n| {
        let llm = llm.clone();
        tokio::spawn(async move { llm.complete(&CallContext { run: run(n), ..context() }, &request("q")).await })
    };
    let first = task(1);
    one.arrived(1).await;
    let others = [task(2), task(3)];
    // They have joined once they have been polled.
    tokio::task::yield_now().await;
    first.abort();
    assert!(first.await.expect_err("aborted").is_cancelled());
    one.turns.add_permits(1);
    for other in others {
        let reply = other.await.expect("no panic").expect("an answer");
        assert_eq!(reply.content, "kept");
        // The one who began it had it reserved, and pays; the others had nothing set aside.
        assert_eq!(
            (last(&reply).origin, last(&reply).cost_usd, last(&reply).saved_usd),
            (Origin::Coalesced, Usd::ZERO, COST)
        );
    }
    assert_eq!(one.calls(), 1);
}

#[tokio::test]
async fn a_shared_error_is_one_row_and_is_not_kept() {
    let one = Scripted::held(Act::Fail(Code::ProviderFailed, true));
    let (llm, _) = scripted(&[("one", &one)], &config());
    let tasks: Vec<_> = (0..3)
        .map(|_| {
            let llm = llm.clone();
            tokio::spawn(async move { llm.complete(&context(), &request("q")).await })
        })
        .collect();
    one.arrived(1).await;
    tokio::task::yield_now().await;
    one.turns.add_permits(2);
    let mut rows = 0;
    for task in tasks {
        let error = task.await.expect("no panic").expect_err("it failed for all");
        assert_eq!((error.code, error.kind.is_retryable()), (Code::ProviderFailed, true));
        rows += error.calls.len();
    }
    assert_eq!((one.calls(), rows), (1, 1));
    one.set(Act::Answer("now"));
    assert_eq!(llm.complete(&context(), &request("q")).await.expect("an answer").content, "now");
}

#[tokio::test]
async fn each_waiter_has_its_own_time() {
    let one = Scripted::held(Act::Answer("late"));
    let (llm, _) = scripted(&[("one", &one)], &config());
    let patient = tokio::spawn({
        let llm = llm.clone();
        async move { llm.complete(&context(), &request("q")).await }
    });
    one.arrived(1).await;
    let hasty = CallContext { timeout: Duration::from_millis(20), ..context() };
    let error = llm.complete(&hasty, &request("q")).await.expect_err("too late for this one");
    assert_eq!((error.code, error.kind.is_retryable()), (Code::ProviderTimeout, true));
    assert!(error.calls.is_empty(), "the call is another's");
    one.turns.add_permits(1);
    assert_eq!(patient.await.expect("no panic").expect("an answer").content, "late");
    assert_eq!(one.calls(), 1);
}

#[tokio::test]
async fn when_one_model_fails_the_next_is_asked_at_once() {
    for failing in [
        Reply::status(500, "{}"),
        Reply::status(400, r#"{"error":{"message":"no such parameter"}}"#),
        Reply::status(401, "{}"),
        Reply::status(429, "{}"),
        Reply::text("no").end(End::Refused),
        Reply::text("cut").end(End::Length),
        Reply::text(""),
        Reply::close(),
    ] {
        let bench = Bench::new().await;
        bench.vendor.on(of_model("first")).respond(failing.clone());
        let request = chain("q", &["one/first", "two/priced"]);
        let reply = bench.ask(&context(), &request).await;
        let [failed, answered] = reply.calls.as_slice() else { panic!("two calls: {:?}", reply.calls) };
        assert!(failed.error.is_some() && failed.model == model("one/first"), "{failing:?}");
        assert_eq!((answered.error, &answered.model), (None, &model("two/priced")));
        bench.llm.complete(&context(), &request).await.expect("an answer");
        assert_eq!(bench.calls(), 3, "the first is asked again, the second's answer is reused");
    }
}

#[tokio::test]
async fn a_model_that_nobody_serves_is_passed_over() {
    let bench = Bench::new().await;
    let reply = bench.ask(&context(), &chain("q", &["nobody/x", "openai/gpt-5-mini", "one/priced"])).await;
    assert_eq!(reply.calls.len(), 1, "who was not called has no row");
    let error = bench.llm.complete(&context(), &chain("q", &["nobody/x"])).await.expect_err("nobody");
    assert_eq!((error.code, error.kind.is_retryable()), (Code::UnknownModel, false));
    let error = bench.llm.complete(&context(), &chain("q", &["openai/gpt-5-mini"])).await.expect_err("no key");
    assert_eq!((error.code, error.kind.is_retryable()), (Code::ProviderWithoutKey, false));
}

#[tokio::test]
async fn when_all_fail_every_call_is_told() {
    let bench = Bench::new().await;
    bench.vendor.on(of_model("first")).respond(Reply::status(429, "{}").header("retry-after", "7"));
    bench.vendor.on(of_model("priced")).respond(Reply::status(400, "{}"));
    let error = bench.llm.complete(&context(), &chain("q", &["one/first", "two/priced"])).await.expect_err("all");
    assert_eq!(error.code, Code::ProviderRateLimited, "one may recover, and that is what is told");
    assert_eq!(error.kind, FailureKind::Outage { told: Some(Duration::from_secs(7)) });
    let codes: Vec<_> = error.calls.iter().map(|call| call.error).collect();
    assert_eq!(codes, [Some(Code::ProviderRateLimited), Some(Code::ProviderRejected)]);
}

#[tokio::test]
async fn each_model_of_a_chain_has_the_whole_time_of_a_call() {
    let bench = Bench::new().await;
    bench.vendor.on(of_model("first")).respond(Reply::hang());
    let hasty = CallContext { timeout: Duration::from_millis(300), ..context() };
    let reply = bench.ask(&hasty, &chain("q", &["one/first", "two/priced"])).await;
    let [slow, answered] = reply.calls.as_slice() else { panic!("two calls: {:?}", reply.calls) };
    assert_eq!((slow.error, answered.error), (Some(Code::ProviderTimeout), None));
    assert!(bench.metrics().contains(r#"outcome="SG0408""#));
}

#[tokio::test]
async fn a_call_that_is_too_slow_is_an_outage_and_nothing_begins_past_the_deadline() {
    let bench = Bench::new().await;
    bench.vendor.on(any()).once(Reply::hang());
    let hasty = CallContext { timeout: Duration::from_millis(300), ..context() };
    let error = bench.llm.complete(&hasty, &request("q")).await.expect_err("it hangs");
    assert_eq!((error.code, error.kind), (Code::ProviderTimeout, FailureKind::Outage { told: None }));
    assert_eq!(error.message, "`one/priced` did not answer within 300ms (the stage's `timeout`)");
    assert_eq!((error.calls.len(), error.calls[0].error), (1, Some(Code::ProviderTimeout)));
    let past = CallContext { deadline: Instant::now(), ..context() };
    let error = bench.llm.complete(&past, &chain("new", &["one/priced", "two/priced"])).await.expect_err("no time");
    assert_eq!((error.code, error.calls.len(), bench.calls()), (Code::ProviderTimeout, 0, 1));
}

#[tokio::test]
async fn a_provider_is_never_asked_more_at_once_than_configured() {
    let bench = Bench::with(None, |config| {
        config.providers.get_mut("one").expect("configured").max_concurrency = 2;
    })
    .await;
    bench.vendor.set_latency(Duration::from_millis(30));
    let calls = (0..8).map(|n| {
        let llm = bench.llm.clone();
        tokio::spawn(async move { llm.complete(&context(), &request(&format!("{n}"))).await })
    });
    for reply in futures::future::join_all(calls).await {
        reply.expect("no panic").expect("an answer");
    }
    assert_eq!((bench.calls(), bench.vendor.most_under_way()), (8, 2));
}

/// A layer over one provider with one slot, which is taken.
async fn one_slot(one: &Arc<Scripted>) -> (Llm, tokio::task::JoinHandle<()>) {
    let mut config = config();
    let slots = serde_json::from_value(json!({ "kind": "openai", "max_concurrency": 1 })).expect("valid");
    config.providers.insert("one".to_owned(), slots);
    let (llm, _) = scripted(&[("one", one)], &config);
    let first = tokio::spawn({
        let llm = llm.clone();
        async move { drop(llm.complete(&context(), &request("first")).await) }
    });
    one.arrived(1).await;
    (llm, first)
}

#[tokio::test(start_paused = true)]
async fn waiting_for_a_slot_costs_no_time_of_the_call() {
    let one = Scripted::held(Act::Answer("a"));
    let (llm, first) = one_slot(&one).await;
    let patient = CallContext { timeout: Duration::from_secs(5), ..context() };
    let second = tokio::spawn({
        let llm = llm.clone();
        async move { llm.complete(&patient, &request("second")).await }
    });
    tokio::task::yield_now().await;
    tokio::time::advance(Duration::from_secs(25)).await;
    one.turns.add_permits(1);
    first.await.expect("no panic");
    one.arrived(2).await;
    tokio::time::advance(Duration::from_secs(4)).await;
    one.turns.add_permits(1);
    second.await.expect("no panic").expect("an answer");
}

#[tokio::test]
async fn tenants_get_slots_one_after_the_other() {
    let one = Scripted::held(Act::Answer("a"));
    let (llm, first) = one_slot(&one).await;
    let order: Arc<std::sync::Mutex<Vec<&str>>> = Arc::default();
    let mut tasks = Vec::new();
    for (name, n) in [("a", 0), ("a", 1), ("a", 2), ("b", 3)] {
        let (llm, order, asking) = (llm.clone(), Arc::clone(&order), CallContext { tenant: tenant(name), ..context() });
        tasks.push(tokio::spawn(async move {
            llm.complete(&asking, &request(&format!("{n}"))).await.expect("an answer");
            order.lock().expect("no panic").push(name);
        }));
        tokio::task::yield_now().await;
    }
    one.turns.add_permits(5);
    for task in tasks {
        task.await.expect("no panic");
    }
    first.await.expect("no panic");
    assert_eq!(*order.lock().expect("no panic"), ["a", "b", "a", "a"]);
}

#[tokio::test]
async fn a_call_that_got_no_slot_says_so_and_gives_it_back() {
    let one = Scripted::held(Act::Answer("a"));
    let (llm, first) = one_slot(&one).await;
    let hasty = CallContext { deadline: Instant::now() + Duration::from_millis(20), ..context() };
    let error = llm.complete(&hasty, &request("r")).await.expect_err("no slot");
    assert_eq!((error.code, error.kind.is_retryable(), error.calls.len()), (Code::ProviderTimeout, true, 0));
    assert!(error.message.contains("waited for a slot"), "{}", error.message);
    first.abort();
    assert!(first.await.expect_err("aborted").is_cancelled());
    one.turns.add_permits(1);
    llm.complete(&context(), &request("r")).await.expect("an abandoned call gives its slot back");
}

#[tokio::test]
async fn a_provider_that_asked_to_wait_is_not_asked_before() {
    let bench = Bench::new().await;
    bench.vendor.on(any()).once(Reply::status(429, "{}").header("retry-after", "7"));
    let told = FailureKind::Outage { told: Some(Duration::from_secs(7)) };
    let error = bench.llm.complete(&context(), &request("q")).await.expect_err("limited");
    assert_eq!((error.code, error.kind), (Code::ProviderRateLimited, told));
    let error = bench.llm.complete(&context(), &request("r")).await.expect_err("left alone");
    assert!(error.kind.told().is_some_and(|left| left <= Duration::from_secs(7)), "{error:?}");
    assert_eq!((error.code, error.calls.len(), bench.calls()), (Code::ProviderRateLimited, 0, 1));
    bench.ask(&context(), &chain("r", &["one/other"])).await;
}

#[tokio::test]
async fn an_absurd_wish_is_cut_and_told() {
    for wish in ["999999999", "1e300", "inf"] {
        let bench = Bench::new().await;
        bench.vendor.on(any()).once(Reply::status(503, "{}").header("retry-after", wish));
        let error = bench.llm.complete(&context(), &request("q")).await.expect_err("away");
        assert_eq!(error.kind.told(), Some(Duration::from_mins(5)), "{wish}");
        assert!(error.message.contains("it is granted 300s, `llm.retry_after_max`"), "{}", error.message);
    }
    for wish in ["-5", "NaN", "soon"] {
        let bench = Bench::new().await;
        bench.vendor.on(any()).once(Reply::status(503, "{}").header("retry-after", wish));
        let error = bench.llm.complete(&context(), &request("q")).await.expect_err("away");
        assert_eq!(error.kind, FailureKind::Outage { told: None }, "{wish}");
    }
}

#[tokio::test]
async fn an_unpriced_model_is_flagged_and_never_priced_zero_in_silence() {
    let bench = Bench::new().await;
    let request = chain("q", &["one/made-up-by-a-caller"]);
    for _ in 0..2 {
        let reply = bench.ask(&context(), &request).await;
        assert_eq!((last(&reply).priced, last(&reply).saved_usd), (false, Usd::ZERO));
    }
    let metrics = bench.metrics();
    assert!(metrics.contains(r#"stagegate_llm_unpriced_calls_total{model="other",provider="one"} 1"#), "{metrics}");
    assert!(!metrics.contains("made-up"), "no label is a caller's word");
    assert_eq!(bench.llm.worst_case(&request), None);
    assert_eq!(bench.llm.worst_case(&chain("q", &["one/priced", "one/made-up-by-a-caller"])), None);
    assert_eq!(bench.llm.estimate(&request.models, 10, 10), None);
}

#[tokio::test]
async fn the_worst_case_covers_what_is_paid() {
    let bench = Bench::new().await;
    let mut request = request("q");
    request.params.max_output_tokens = Some(1_000);
    let worst = bench.llm.worst_case(&request).expect("priced");
    assert!(worst >= Usd::from_nanos(1_000 * 2_000), "every token of the longest answer: {worst:?}");
    let longer = Request { format: json_request().format, ..request.clone() };
    assert!(bench.llm.worst_case(&longer) > Some(worst), "the schema is part of the prompt");
    let estimate = bench.llm.estimate(&request.models, 10, 100).expect("priced");
    assert!(estimate < worst && estimate >= Usd::from_nanos(100 * 2_000));
}

#[tokio::test]
async fn missing_usage_is_estimated_and_says_so() {
    let bench = Bench::new().await;
    bench.vendor.on(any()).respond(Reply::text("four words of answer").without_usage());
    let reply = bench.ask(&context(), &request("some question")).await;
    let usage = last(&reply).usage;
    assert!(usage.estimated && usage.input_tokens > 0 && usage.output_tokens > 0);
    assert!(last(&reply).cost_usd > Usd::ZERO);
}

/// The series that what we do changes; those of the process change by themselves.
fn ours(metrics: &str) -> String {
    metrics.lines().filter(|line| line.starts_with("stagegate_")).collect::<Vec<_>>().join("\n")
}

#[tokio::test]
async fn peek_reads_and_changes_nothing() {
    let bench = Bench::new().await;
    assert!(bench.llm.peek(&context(), &request("q")).await.is_none());
    assert_eq!(bench.calls(), 0);
    let bought = bench.ask(&context(), &request("q")).await;
    let before = ours(&bench.metrics());
    let peeked = bench.llm.peek(&context(), &request("q")).await.expect("cached");
    assert_eq!((&peeked.content, peeked.key), (&bought.content, bought.key));
    assert_eq!((last(&peeked).cost_usd, last(&peeked).saved_usd), (Usd::ZERO, COST));
    assert_eq!(ours(&bench.metrics()), before);
    assert!(bench.llm.peek(&in_mode(CacheMode::Off, 9), &request("q")).await.is_none());
    assert!(bench.llm.peek(&in_mode(CacheMode::Refresh, 9), &request("q")).await.is_none());
}

#[tokio::test]
async fn a_remembered_answer_is_found_under_the_question_that_led_to_it() {
    let bench = Bench::new().await;
    let reply = bench.ask(&context(), &request("q, and mind the critique")).await;
    bench.llm.remember(&context(), &request("q"), &reply).await;
    let hit = bench.ask(&CallContext { run: run(2), ..context() }, &request("q")).await;
    assert_eq!((&hit.content, last(&hit).saved_usd, bench.calls()), (&reply.content, COST, 1));

    // It is as old as the original, and as stale.
    bench.clock.advance(Duration::from_mins(50));
    bench.llm.remember(&context(), &request("later"), &reply).await;
    assert!(bench.llm.peek(&context(), &request("later")).await.is_some());
    bench.clock.advance(Duration::from_mins(10));
    assert!(bench.llm.peek(&context(), &request("later")).await.is_none());

    let reply = bench.ask(&context(), &request("again")).await;
    bench.llm.invalidate(&context().tenant, &CacheScope::Tenant).await.expect("no tier");
    bench.llm.remember(&context(), &request("after"), &reply).await;
    assert!(bench.llm.peek(&context(), &request("after")).await.is_none());
}

#[tokio::test]
async fn a_fallbacks_answer_is_remembered_as_the_fallbacks() {
    let bench = Bench::new().await;
    bench.vendor.on(of_model("first")).respond(Reply::status(500, "{}"));
    let models = ["one/first", "two/priced"];
    let reply = bench.ask(&context(), &chain("q, with critique", &models)).await;
    bench.llm.remember(&context(), &chain("q", &models), &reply).await;
    assert!(bench.llm.peek(&context(), &chain("q", &["one/first"])).await.is_none());
    assert!(bench.llm.peek(&context(), &chain("q", &["two/priced"])).await.is_some());
    bench.llm.remember(&context(), &chain("r", &["one/first"]), &reply).await;
    assert!(bench.llm.peek(&context(), &chain("r", &["one/first"])).await.is_none());
}

#[tokio::test]
async fn what_a_call_is_for_stands_in_its_row_and_not_in_its_key() {
    let bench = Bench::new().await;
    bench.ask(&context(), &request("q")).await;
    let judge = bench.ask(&context(), &Request { purpose: CallPurpose::Judge, ..request("q") }).await;
    assert_eq!((last(&judge).purpose, bench.calls()), (CallPurpose::Judge, 1));
}

#[tokio::test]
async fn a_model_is_checked_before_anything_is_registered() {
    let bench = Bench::new().await;
    assert!(bench.llm.check_model(&model("one/anything")).is_ok());
    assert!(bench.llm.check_model(&model("sim/quick")).is_ok());
    let error = bench.llm.check(&model("opnai/gpt-5-mini")).expect_err("unknown");
    assert_eq!(error.code, Code::UnknownModel);
    assert!(error.detail.contains("did you mean `openai`?"), "{}", error.detail);
    let error = bench.llm.check(&model("anthropic/claude-haiku-4-5")).expect_err("no key");
    assert_eq!(error.code, Code::ProviderWithoutKey);
    assert!(error.detail.contains("ANTHROPIC_API_KEY"), "{}", error.detail);
    assert!(bench.llm.is_priced(&model("one/priced")) && !bench.llm.is_priced(&model("one/other")));
}

#[tokio::test]
async fn a_configuration_that_cannot_work_is_refused_with_every_mistake() {
    let mut config = config();
    config.answer_max_bytes = 0;
    config.breaker.min_calls = config.breaker.window_calls + 1;
    config.breaker.failure_rate = f64::NAN;
    let clock = Arc::new(crate::bench::HandClock::default());
    let error = Llm::new(&config, &crate::providers::client(), None, Metrics::new(), clock).expect_err("mistakes");
    let paths: Vec<_> = error.violations.iter().map(|violation| violation.path.as_str()).collect();
    assert_eq!(error.code, Code::InvalidConfig);
    assert_eq!(paths, ["llm.answer_max_bytes", "llm.breaker.min_calls", "llm.breaker.failure_rate"]);
    assert!(error.violations.iter().all(|violation| violation.mend.is_some()));
}

#[tokio::test]
async fn health_tells_what_was_last_seen_and_calls_nobody() {
    let one = Scripted::new(Act::Fail(Code::ProviderQuota, false));
    let (llm, _) = scripted(&[("one", &one)], &config());
    let health = llm.health().await;
    assert_eq!((health.shared_cache, health.providers[0].remaining), (None, None));
    llm.complete(&context(), &request("q")).await.expect_err("no quota");
    let provider = llm.health().await.providers.remove(0);
    assert!(provider.quota_exhausted && provider.configured);
    assert_eq!((provider.name.as_str(), provider.kind), ("one", "openai"));
    assert_eq!(provider.remaining, Some((Some(7), None)));
    one.set(Act::Answer("paid again"));
    llm.complete(&context(), &request("q")).await.expect("an answer");
    assert!(!llm.health().await.providers[0].quota_exhausted);
    assert_eq!(one.calls(), 2);
}

#[tokio::test]
async fn neither_prompts_nor_answers_are_logged() {
    let (log, _guard) = crate::cache::logs();
    let one = Scripted::new(Act::Answer("SECRET-ANSWER"));
    let (llm, _) = scripted(&[("one", &one)], &config());
    for _ in 0..2 {
        llm.complete(&context(), &request("SECRET-PROMPT")).await.expect("an answer");
    }
    one.set(Act::Fail(Code::ProviderFailed, true));
    llm.complete(&context(), &request("SECRET-PROMPT 2")).await.expect_err("it fails");
    let text = log.text();
    assert!(text.contains("model call") && text.contains("cache hit"), "{text}");
    assert!(!text.contains("SECRET"), "{text}");
}
