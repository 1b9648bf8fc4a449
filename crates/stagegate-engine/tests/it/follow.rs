//! Watchers: how events reach them, on the replica that executes a run and on every other.

use std::{collections::HashMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::StreamExt as _;
use serde_json::json;
use stagegate_core::{
    Event, RunId, RunState, Store, SystemClock, TenantId,
    hint::{Hint, Hints},
    pipeline::Span,
};
use stagegate_engine::{Action, Engine, config::EngineConfig};
use stagegate_telemetry::Metrics;
use stagegate_testkit::provider::{Reply, contains};
use tokio::sync::{Mutex, broadcast};

use crate::{
    bench::{self, Bench, assert_state, canonical, finish, quick},
    faulty::{Fault, Faulty},
};

/// Far more than anything here may take, and far less than the waits that a hint cuts short.
const LONG: Duration = Duration::from_secs(20);
/// So long that nothing happens by polling within a test.
const NEVER: Duration = Duration::from_mins(50);

/// Hints between the engines of one test.
#[derive(Debug)]
struct Room {
    others: broadcast::Sender<(usize, Hint)>,
    heard: Mutex<broadcast::Receiver<(usize, Hint)>>,
    me: usize,
}

impl Room {
    fn of<const N: usize>() -> [Arc<dyn Hints>; N] {
        let (others, _) = broadcast::channel(1_024);
        std::array::from_fn(|me| {
            let heard = Mutex::new(others.subscribe());
            Arc::new(Self { others: others.clone(), heard, me }) as Arc<dyn Hints>
        })
    }
}

#[async_trait]
impl Hints for Room {
    fn publish(&self, hint: Hint) {
        let _ = self.others.send((self.me, hint));
    }

    async fn next(&self) -> Vec<Hint> {
        let mut heard = self.heard.lock().await;
        loop {
            match heard.recv().await {
                Ok((from, hint)) if from != self.me => return vec![hint],
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
            }
        }
    }
}

/// A bench, and another replica on its store that executes nothing and counts what it asks.
async fn with_onlooker(bench: &Bench) -> (Engine, Arc<Faulty>) {
    let counted = Faulty::before(Arc::clone(&bench.store) as Arc<dyn Store>);
    let config = EngineConfig { max_runs: 0, ..quick() };
    let front = Arc::clone(&counted) as Arc<dyn Store>;
    let engine = Engine::start(config, front, Arc::clone(&bench.llm), Metrics::new(), Arc::new(SystemClock));
    (engine.await.expect("an engine"), counted)
}

async fn collect(engine: &Engine, run: RunId, after: u64) -> Vec<Event> {
    let mut seen = Vec::new();
    let mut events = engine.follow(TenantId::default(), run, after);
    while let Some(batch) = events.next().await {
        seen.extend(batch.expect("readable"));
    }
    seen
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_replica_commits_reaches_its_watchers_without_a_question() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = bench::store(folder.path()).await;
    let counted = Faulty::before(Arc::clone(&store) as Arc<dyn Store>);
    let provider = stagegate_testkit::provider::FakeProvider::start().await;
    let llm = bench::llm(&provider, &store);
    let front = Arc::clone(&counted) as Arc<dyn Store>;
    let engine = Engine::start(quick(), front, Arc::clone(&llm), Metrics::new(), Arc::new(SystemClock));
    let engine = engine.await.expect("an engine");
    let bench = Bench { engine, provider, store, llm, folder: Arc::new(folder) };
    bench.provider.on(contains("stage-one")).respond(Reply::echo().after(Duration::from_millis(500)));
    let run = bench.submit(&canonical(), json!({ "text": "hello" })).await;

    let watchers: Vec<_> = (0..10)
        .map(|_| {
            let engine = bench.engine.clone();
            tokio::spawn(async move { finish(&engine, run).await })
        })
        .collect();
    let mut all = Vec::new();
    for watcher in watchers {
        all.push(watcher.await.expect("no panic"));
    }
    assert!(all.iter().all(|seen| *seen == all[0]), "each sees the same");
    assert_eq!(counted.calls("news"), 0, "nobody else executes it");
    assert_eq!(counted.calls("events"), 10, "each reads what was there when it came, and no more");
    assert_eq!(counted.calls("run_record"), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watchers_on_another_replica_see_every_event_once_and_ask_together() {
    let bench = Bench::start().await;
    bench.provider.set_latency(Duration::from_millis(100));
    let (onlooker, counted) = with_onlooker(&bench).await;
    let mut runs = Vec::new();
    for n in 0..10 {
        runs.push(bench.submit(&canonical(), json!({ "text": format!("number {n}") })).await);
    }
    let watchers: Vec<_> = (0..100)
        .map(|n| {
            let (engine, run) = (onlooker.clone(), runs[n % runs.len()]);
            tokio::spawn(async move { (run, finish(&engine, run).await) })
        })
        .collect();
    let mut seen: HashMap<RunId, Vec<Event>> = HashMap::new();
    for watcher in watchers {
        let (run, events) = watcher.await.expect("no panic");
        assert_eq!(*seen.entry(run).or_insert_with(|| events.clone()), events, "each sees the same");
    }
    assert!(counted.calls("news") > 0);
    assert!(counted.calls("events") < 250, "one look each to begin with, few later: {}", counted.calls("events"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_goes_on_where_it_left_off_on_any_replica() {
    let bench = Bench::start().await;
    bench.provider.set_latency(Duration::from_millis(50));
    let (onlooker, _) = with_onlooker(&bench).await;
    let run = bench.submit(&canonical(), json!({ "text": "hello" })).await;
    let mut seen: Vec<Event> = Vec::new();
    for turn in 0.. {
        let engine = if turn % 2 == 0 { &onlooker } else { &bench.engine };
        let after = seen.last().map_or(0, |event| event.seq);
        let Some(batch) = engine.follow(TenantId::default(), run, after).next().await else { break };
        seen.extend(batch.expect("readable"));
    }
    assert_eq!(seen, collect(&bench.engine, run, 0).await);
    assert!(seen.iter().enumerate().all(|(index, event)| event.seq == index as u64 + 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_moves_to_another_replica_is_followed_without_a_gap_on_both() {
    let bench = Bench::start().await;
    bench.provider.set_latency(Duration::from_millis(150));
    let run = bench.submit(&canonical(), json!({ "text": "hello" })).await;
    bench.until(run, "stage.succeeded").await;
    let watch = |engine: &Engine| {
        let engine = engine.clone();
        tokio::spawn(async move { finish(&engine, run).await })
    };
    let first = watch(&bench.engine);
    bench.engine.drain(Duration::from_secs(5)).await;
    let next = bench::engine(quick(), &bench.store, &bench.llm).await;
    let second = watch(&next);
    let (first, second) = (first.await.expect("no panic"), second.await.expect("no panic"));
    assert_eq!(first, second);
    assert!(first.iter().any(|event| event.kind.name() == "run.resumed"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn news_that_cannot_be_asked_for_comes_later_and_whole() {
    let bench = Bench::start().await;
    let (onlooker, faulty) = with_onlooker(&bench).await;
    let (open, gate) = tokio::sync::watch::channel(false);
    bench.provider.on(contains("stage-one")).respond(Reply::echo().when(gate));
    faulty.set("news", Fault::Refuse);
    let run = bench.submit(&canonical(), json!({ "text": "hello" })).await;
    let watcher = tokio::spawn(async move { finish(&onlooker, run).await });
    // The watcher has caught up and asks for news, in vain, before there are any.
    faulty.next_call("news").await;
    open.send_replace(true);
    bench.finish(run).await;
    faulty.next_call("news").await;
    faulty.mend("news");
    let seen = tokio::time::timeout(LONG, watcher).await.expect("it comes").expect("no panic");
    assert_eq!(seen, collect(&bench.engine, run, 0).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_tenant_sees_nothing_of_a_run_that_is_being_watched() {
    let bench = Bench::start().await;
    bench.provider.on(contains("stage-one")).respond(Reply::echo().after(Duration::from_millis(300)));
    let run = bench.submit(&canonical(), json!({ "text": "hello" })).await;
    let owner = tokio::spawn({
        let engine = bench.engine.clone();
        async move { finish(&engine, run).await }
    });
    let stranger: TenantId = "stranger".parse().expect("valid");
    for after in [0, 1, 1_000] {
        let seen: Vec<_> = bench.engine.follow(stranger.clone(), run, after).collect().await;
        assert!(seen.is_empty(), "{seen:?}");
    }
    owner.await.expect("no panic");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hint_wakes_the_owner_of_a_run_that_is_cancelled_elsewhere() {
    let bench = Bench::start().await;
    bench.engine.drain(Duration::ZERO).await;
    let [here, there] = Room::of();
    let config = || EngineConfig { lease_ttl: Span(NEVER), ..quick() };
    let owner = hinted(&bench, config(), here).await;
    let other = hinted(&bench, EngineConfig { max_runs: 0, ..config() }, there).await;
    bench.provider.on(contains("stage-one")).respond(Reply::hang());
    let bench = Bench { engine: owner, ..bench };
    let run = bench.submit(&canonical(), json!({ "text": "hello" })).await;
    other.act(&TenantId::default(), run, Action::Cancel, None).await.expect("accepted");
    tokio::time::timeout(LONG, bench.finish(run)).await.expect("no heartbeat tells of it for long");
    assert_state(&bench.detail(run).await.run, RunState::Cancelled);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hint_has_a_queued_run_claimed_by_whoever_has_room() {
    let bench = Bench::start().await;
    bench.engine.drain(Duration::ZERO).await;
    let [full, free] = Room::of();
    let full = hinted(&bench, EngineConfig { max_runs: 0, ..quick() }, full).await;
    let counted = Faulty::before(Arc::clone(&bench.store) as Arc<dyn Store>);
    let config = EngineConfig { poll_interval: Span(NEVER), ..quick() };
    let (front, llm) = (Arc::clone(&counted) as Arc<dyn Store>, Arc::clone(&bench.llm));
    let free = Engine::start_hinted(config, front, llm, Metrics::new(), Arc::new(SystemClock), Some(free));
    let free = free.await.expect("an engine");
    while counted.calls("claim") == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let bench = Bench { engine: full, ..bench };
    let run = bench.submit(&canonical(), json!({ "text": "hello" })).await;
    tokio::time::timeout(LONG, finish(&free, run)).await.expect("no look finds it for long");
    assert_state(&bench.detail(run).await.run, RunState::Succeeded);
}

/// Another engine on the bench's store, in a room of hints.
async fn hinted(bench: &Bench, config: EngineConfig, hints: Arc<dyn Hints>) -> Engine {
    let (store, llm) = (Arc::clone(&bench.store) as Arc<dyn Store>, Arc::clone(&bench.llm));
    let engine = Engine::start_hinted(config, store, llm, Metrics::new(), Arc::new(SystemClock), Some(hints));
    engine.await.expect("an engine")
}
