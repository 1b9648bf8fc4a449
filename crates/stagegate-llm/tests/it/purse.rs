//! Who pays: the caller that began a call, and nobody else.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt, future::BoxFuture};
use stagegate_core::{Code, LedgerEntry, Origin, Usd};
use stagegate_llm::{
    CallContext,
    purse::{Purse, Refusal, Reservation},
};
use tokio::time::Instant;

use crate::bench::{Act, COST, Scripted, chain, config, context, last, request, run, scripted};

/// A purse that notes what it is asked for.
#[derive(Debug, Default)]
struct Noting {
    reserved: Mutex<Vec<LedgerEntry>>,
    settled: Arc<Mutex<Vec<LedgerEntry>>>,
    closed: Arc<AtomicBool>,
    refuses: Option<&'static str>,
}

#[derive(Debug)]
struct Noted {
    settled: Arc<Mutex<Vec<LedgerEntry>>>,
    closed: Arc<AtomicBool>,
}

impl Reservation for Noted {
    fn send(&mut self) -> bool {
        !self.closed.load(Ordering::SeqCst)
    }

    fn settle(self: Box<Self>, row: LedgerEntry) {
        self.settled.lock().expect("no panic").push(row);
    }
}

impl Purse for Noting {
    fn reserve(&self, worst: LedgerEntry) -> BoxFuture<'_, Result<Box<dyn Reservation>, Refusal>> {
        let refused = self.refuses == Some(worst.model.model());
        self.reserved.lock().expect("no panic").push(worst);
        let (settled, closed) = (Arc::clone(&self.settled), Arc::clone(&self.closed));
        let reserved = Noted { settled, closed };
        async move {
            if refused {
                Err(Refusal::TooDear { left: Usd::ZERO })
            } else {
                Ok(Box::new(reserved) as Box<dyn Reservation>)
            }
        }
        .boxed()
    }

    fn inherits(&self) -> bool {
        false
    }

    fn inherited(&self, _: LedgerEntry, _: Vec<LedgerEntry>, _: Vec<LedgerEntry>) {}

    fn lost(&self, _: Vec<LedgerEntry>) {}
}

fn paying(purse: &Arc<Noting>, n: u128) -> CallContext {
    CallContext { run: run(n), purse: Some(Arc::clone(purse) as Arc<dyn Purse>), ..context() }
}

#[tokio::test]
async fn a_call_is_reserved_before_it_is_made_and_a_hit_is_not() {
    let one = Scripted::new(Act::Answer("a"));
    let (llm, _) = scripted(&[("one", &one)], &config());
    let purse = Arc::new(Noting::default());
    llm.complete(&paying(&purse, 1), &request("q")).await.expect("an answer");
    llm.complete(&paying(&purse, 2), &request("q")).await.expect("a hit");
    let reserved = purse.reserved.lock().expect("no panic").clone();
    let settled = purse.settled.lock().expect("no panic").clone();
    let [worst] = reserved.as_slice() else { panic!("one call: {reserved:?}") };
    let [row] = settled.as_slice() else { panic!("one call: {settled:?}") };
    assert!(worst.unknown && worst.cost_usd >= row.cost_usd && !row.unknown);
    assert_eq!((row.cost_usd, row.origin), (COST, Origin::Provider));
}

#[tokio::test]
async fn a_model_that_does_not_fit_is_passed_over_without_a_call() {
    let (one, two) = (Scripted::new(Act::Answer("dear")), Scripted::new(Act::Answer("cheap")));
    let (llm, _) = scripted(&[("one", &one), ("two", &two)], &config());
    let purse = Arc::new(Noting { refuses: Some("dear"), ..Noting::default() });
    let reply = llm.complete(&paying(&purse, 1), &chain("q", &["one/dear", "two/priced"])).await.expect("an answer");
    assert_eq!((reply.content.as_str(), one.calls()), ("cheap", 0));
    let error = llm.complete(&paying(&purse, 1), &chain("q", &["one/dear"])).await.expect_err("refused");
    assert_eq!((error.code, one.calls()), (Code::BudgetExhausted, 0));
}

#[tokio::test]
async fn followers_begin_again_if_the_leader_left_before_its_call_was_sent() {
    let one = Scripted::held(Act::Answer("a"));
    let mut narrow = config();
    let slots = serde_json::from_value(serde_json::json!({ "kind": "openai", "max_concurrency": 1 })).expect("valid");
    narrow.providers.insert("one".to_owned(), slots);
    let (llm, _) = scripted(&[("one", &one)], &narrow);
    let ask = |context: CallContext, prompt: &'static str| {
        let llm = llm.clone();
        tokio::spawn(async move { llm.complete(&context, &request(prompt)).await })
    };
    // It has the only slot.
    let other = ask(context(), "another question");
    one.arrived(1).await;
    let (first, second) = (Arc::new(Noting::default()), Arc::new(Noting::default()));
    let leaving = ask(paying(&first, 1), "q");
    while first.reserved.lock().expect("no panic").is_empty() {
        tokio::task::yield_now().await;
    }
    let staying = ask(paying(&second, 2), "q");
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert!(second.reserved.lock().expect("no panic").is_empty(), "it follows, and has nothing reserved");
    first.closed.store(true, Ordering::SeqCst);
    leaving.abort();
    one.turns.add_permits(2);
    other.await.expect("no panic").expect("an answer");
    let reply = staying.await.expect("no panic").expect("an answer");
    assert_eq!((last(&reply).origin, last(&reply).cost_usd), (Origin::Provider, COST));
    assert_eq!((first.settled.lock().expect("no panic").len(), second.settled.lock().expect("no panic").len()), (0, 1));
    assert_eq!(one.calls(), 2);
}

#[tokio::test]
async fn a_caller_that_waits_for_its_purse_gives_up_at_its_deadline() {
    #[derive(Debug)]
    struct Full;
    impl Purse for Full {
        fn reserve(&self, _: LedgerEntry) -> BoxFuture<'_, Result<Box<dyn Reservation>, Refusal>> {
            std::future::pending().boxed()
        }
        fn inherits(&self) -> bool {
            false
        }
        fn inherited(&self, _: LedgerEntry, _: Vec<LedgerEntry>, _: Vec<LedgerEntry>) {}
        fn lost(&self, _: Vec<LedgerEntry>) {}
    }
    let one = Scripted::new(Act::Answer("a"));
    let (llm, _) = scripted(&[("one", &one)], &config());
    let deadline = Instant::now() + Duration::from_millis(20);
    let context = CallContext { purse: Some(Arc::new(Full)), deadline, ..context() };
    let error = llm.complete(&context, &request("q")).await.expect_err("too late");
    assert_eq!((error.code, one.calls()), (Code::ProviderTimeout, 0));
}
