//! A failing model is spared, and tried again in time. The time is tokio's, and stands still.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use stagegate_core::{Code, Origin};

use stagegate_llm::CallContext;
use stagegate_testkit::provider::{Matcher, Reply as Body};

use crate::bench::{Act, Bench, Scripted, chain, config, context, last, model, request, scripted, tenant};

const OPEN_FOR: Duration = Duration::from_secs(10);

/// Asks until the default breaker has seen enough failures.
async fn trip(llm: &stagegate_llm::Llm) {
    for n in 0..10 {
        let error = llm.complete(&context(), &request(&format!("trip {n}"))).await.expect_err("it fails");
        assert_eq!(error.code, Code::ProviderFailed);
    }
}

#[tokio::test(start_paused = true)]
async fn a_failing_model_is_spared_and_says_when_to_come_back() {
    let one = Scripted::new(Act::Fail(Code::ProviderFailed, true));
    let (llm, metrics) = scripted(&[("one", &one)], &config());
    trip(&llm).await;
    tokio::time::advance(Duration::from_secs(3)).await;
    let error = llm.complete(&context(), &request("spared")).await.expect_err("spared");
    assert_eq!((error.code, error.kind.is_retryable()), (Code::BreakerOpen, true));
    assert_eq!(error.kind.told(), Some(Duration::from_secs(7)));
    assert!(error.calls.is_empty(), "no provider was called, so there is no row");
    assert_eq!(one.calls(), 10);
    assert_eq!(llm.health().await.providers[0].open_breakers, ["priced"]);
    let text = metrics.render().expect("metrics render");
    assert!(text.contains(r#"stagegate_llm_breaker_state{model="priced",provider="one"} 2"#), "{text}");
}

#[tokio::test(start_paused = true)]
async fn a_spared_model_leaves_its_fallback_at_once() {
    let (one, two) = (Scripted::new(Act::Fail(Code::ProviderFailed, true)), Scripted::new(Act::Answer("from two")));
    let (llm, _) = scripted(&[("one", &one), ("two", &two)], &config());
    trip(&llm).await;
    let reply = llm.complete(&context(), &chain("q", &["one/priced", "two/priced"])).await.expect("an answer");
    assert_eq!((reply.content.as_str(), &last(&reply).model), ("from two", &model("two/priced")));
    assert_eq!((reply.calls.len(), one.calls()), (1, 10));
}

#[tokio::test(start_paused = true)]
async fn one_probe_decides_whether_a_model_is_back() {
    let one = Scripted::new(Act::Fail(Code::ProviderFailed, true));
    let (llm, metrics) = scripted(&[("one", &one)], &config());
    trip(&llm).await;
    tokio::time::advance(OPEN_FOR).await;
    let error = llm.complete(&context(), &request("probe")).await.expect_err("still ill");
    assert_eq!((error.code, one.calls()), (Code::ProviderFailed, 11));
    let error = llm.complete(&context(), &request("after")).await.expect_err("open again");
    assert_eq!((error.code, one.calls()), (Code::BreakerOpen, 11));

    tokio::time::advance(OPEN_FOR).await;
    one.set(Act::Answer("well again"));
    for n in 0..3 {
        let reply = llm.complete(&context(), &request(&format!("well {n}"))).await.expect("an answer");
        assert_eq!(last(&reply).origin, Origin::Provider);
    }
    let text = metrics.render().expect("metrics render");
    assert!(text.contains(r#"stagegate_llm_breaker_state{model="priced",provider="one"} 0"#), "{text}");
}

#[tokio::test(start_paused = true)]
async fn while_a_few_calls_probe_others_wait_for_their_result() {
    let one = Scripted::new(Act::Fail(Code::ProviderUnreachable, true));
    let (llm, _) = scripted(&[("one", &one)], &config());
    for n in 0..10 {
        llm.complete(&context(), &request(&format!("{n}"))).await.expect_err("it fails");
    }
    tokio::time::advance(OPEN_FOR).await;
    one.set(Act::Hang);
    let ask = |n: usize| {
        let (llm, asking) = (llm.clone(), context());
        tokio::spawn(async move { llm.complete(&asking, &request(&format!("probe {n}"))).await })
    };
    let probes: Vec<_> = (0..3).map(ask).collect();
    one.arrived(13).await;
    one.set(Act::Answer("well again"));
    let beside = (3..30).map(ask).collect::<Vec<_>>();
    tokio::task::yield_now().await;
    assert_eq!(one.calls(), 13, "a slow probe burns nobody");
    for probe in probes {
        probe.abort();
        assert!(probe.await.expect_err("aborted").is_cancelled());
    }
    for waited in beside {
        waited.await.expect("no panic").expect("an abandoned probe leaves room for another, which closes it");
    }
}

/// A model that is half open, and three calls that hang where they probe it.
async fn probed_by_calls_that_hang(one: &Arc<Scripted>, llm: &stagegate_llm::Llm) {
    trip(llm).await;
    tokio::time::advance(OPEN_FOR).await;
    one.set(Act::Hang);
    for n in 0..3 {
        let (llm, asking) = (llm.clone(), CallContext { timeout: Duration::from_hours(24), ..context() });
        tokio::spawn(async move { llm.complete(&asking, &request(&format!("probe {n}"))).await });
        one.arrived(11 + n).await;
    }
    one.set(Act::Answer("well again"));
}

#[tokio::test(start_paused = true)]
async fn while_a_model_is_probed_the_next_one_of_a_chain_is_asked_at_once() {
    let (one, two) = (Scripted::new(Act::Fail(Code::ProviderFailed, true)), Scripted::new(Act::Answer("from two")));
    let (llm, _) = scripted(&[("one", &one), ("two", &two)], &config());
    probed_by_calls_that_hang(&one, &llm).await;
    let start = tokio::time::Instant::now();
    let reply = llm.complete(&context(), &chain("q", &["one/priced", "two/priced"])).await.expect("an answer");
    assert_eq!((reply.content.as_str(), start.elapsed(), one.calls()), ("from two", Duration::ZERO, 13));
}

#[tokio::test(start_paused = true)]
async fn probes_that_hang_delay_other_calls_for_the_floor_at_most() {
    let one = Scripted::new(Act::Fail(Code::ProviderFailed, true));
    let (llm, _) = scripted(&[("one", &one)], &config());
    probed_by_calls_that_hang(&one, &llm).await;
    let start = tokio::time::Instant::now();
    llm.complete(&context(), &request("q")).await.expect("a place was free, and the model is well");
    assert_eq!(start.elapsed(), config().breaker.slow_call.0);
}

#[tokio::test(start_paused = true)]
async fn a_wait_for_probes_ends_when_the_run_waits_no_longer_and_says_how_long_it_may_take() {
    let one = Scripted::new(Act::Fail(Code::ProviderFailed, true));
    let (llm, _) = scripted(&[("one", &one)], &config());
    probed_by_calls_that_hang(&one, &llm).await;
    let left = Duration::from_secs(4);
    let hasty = CallContext { outage_until: tokio::time::Instant::now() + left, ..context() };
    let start = tokio::time::Instant::now();
    let error = llm.complete(&hasty, &request("q")).await.expect_err("others probe");
    assert_eq!((error.code, start.elapsed(), one.calls()), (Code::BreakerOpen, left, 13));
    assert_eq!(error.kind.told(), Some(config().breaker.slow_call.0));
    assert!(error.calls.is_empty(), "no provider was called");
}

#[tokio::test(start_paused = true)]
async fn calls_that_hang_beyond_the_floor_count_as_failures() {
    let one = Scripted::new(Act::Hang);
    let (llm, _) = scripted(&[("one", &one)], &config());
    for n in 0..10 {
        let error = llm.complete(&context(), &request(&format!("{n}"))).await.expect_err("too slow");
        assert_eq!((error.code, error.kind.is_retryable()), (Code::ProviderTimeout, true));
    }
    let error = llm.complete(&context(), &request("spared")).await.expect_err("spared");
    assert_eq!((error.code, one.calls()), (Code::BreakerOpen, 10));
}

#[tokio::test(start_paused = true)]
async fn a_callers_short_time_out_says_nothing_about_the_model() {
    let one = Scripted::new(Act::Hang);
    let (llm, _) = scripted(&[("one", &one)], &config());
    let hasty = || CallContext { tenant: tenant("hasty"), timeout: Duration::from_millis(50), ..context() };
    for n in 0..30 {
        let error = llm.complete(&hasty(), &request(&format!("{n}"))).await.expect_err("too slow for this one");
        assert_eq!(error.code, Code::ProviderTimeout);
    }
    one.set(Act::Answer("fine"));
    llm.complete(&context(), &request("q")).await.expect("the breaker is closed for the others");
}

#[tokio::test(start_paused = true)]
async fn calls_that_nobody_wants_any_more_do_not_count() {
    let one = Scripted::new(Act::Hang);
    let (llm, _) = scripted(&[("one", &one)], &config());
    for n in 0..20 {
        let (caller, asking) = (llm.clone(), context());
        let call = tokio::spawn(async move { caller.complete(&asking, &request(&format!("{n}"))).await });
        one.arrived(n + 1).await;
        call.abort();
        assert!(call.await.expect_err("aborted").is_cancelled());
    }
    one.set(Act::Answer("fine"));
    llm.complete(&context(), &request("q")).await.expect("the breaker is closed");
}

#[tokio::test(start_paused = true)]
async fn refusals_and_rate_limits_do_not_count() {
    for (code, retryable) in [
        (Code::ProviderRateLimited, true),
        (Code::ProviderQuota, false),
        (Code::ProviderAuth, false),
        (Code::ProviderRejected, false),
        (Code::ProviderRefused, false),
        (Code::ProviderModel, false),
    ] {
        let one = Scripted::new(Act::Fail(code, retryable));
        let (llm, _) = scripted(&[("one", &one)], &config());
        for n in 0..30 {
            let error = llm.complete(&context(), &request(&format!("{n}"))).await.expect_err("it fails");
            assert_eq!(error.code, code);
        }
        assert_eq!(one.calls(), 30);
    }
}

#[tokio::test]
async fn answers_that_cannot_be_used_do_not_close_a_model_and_bodies_of_no_shape_do() {
    let empty = r#"{"choices":[{"finish_reason":"stop","message":{"role":"assistant","content":null}}]}"#;
    for (body, code) in [(empty, None), ("<html>", Some(Code::BreakerOpen))] {
        let bench = Bench::new().await;
        let bad = Arc::new(AtomicBool::new(true));
        let is_bad: Matcher = {
            let bad = Arc::clone(&bad);
            Arc::new(move |_| bad.load(Ordering::SeqCst))
        };
        bench.vendor.on(is_bad).respond(Body::raw(body));
        for n in 0..20 {
            let error = bench.llm.complete(&context(), &request(&format!("{n}"))).await.expect_err("no answer");
            if n < 10 {
                assert_eq!(error.code, Code::ProviderMalformed);
            }
        }
        bad.store(false, Ordering::SeqCst);
        let last = bench.llm.complete(&context(), &request("q")).await;
        assert_eq!(last.err().map(|error| error.code), code, "{body}");
    }
}

#[tokio::test(start_paused = true)]
async fn each_model_has_a_breaker_of_its_own() {
    let one = Scripted::new(Act::Fail(Code::ProviderFailed, true));
    let (llm, _) = scripted(&[("one", &one)], &config());
    trip(&llm).await;
    one.set(Act::Answer("the other model is well"));
    llm.complete(&context(), &chain("q", &["one/other"])).await.expect("an answer");
}
