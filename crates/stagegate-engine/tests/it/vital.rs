//! The heartbeat on a runtime of its own.

use std::{sync::Arc, time::Duration};

use stagegate_core::{Store, SystemClock, pipeline::Span};
use stagegate_engine::{Engine, config::EngineConfig};
use stagegate_store_sqlite::SqliteStore;
use stagegate_telemetry::Metrics;
use tokio::runtime::{Builder, Runtime};

use crate::bench::llm_with;

/// A runtime of one thread, dropped without waiting for it.
struct Threads(Option<Runtime>);

impl Threads {
    fn one() -> Self {
        Self(Some(Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")))
    }

    fn get(&self) -> &Runtime {
        self.0.as_ref().expect("it is there until it is dropped")
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.0.take().expect("once").shutdown_background();
    }
}

#[tokio::test]
async fn a_lease_is_renewed_while_every_thread_that_executes_runs_is_busy() {
    let (work, vital) = (Threads::one(), Threads::one());
    let folder = tempfile::tempdir().expect("a folder");
    let store = SqliteStore::open(&folder.path().join("test.db"), Metrics::new()).await.expect("a store");
    let tier = store.cache_tier();
    let store: Arc<dyn Store> = Arc::new(store);
    let config = EngineConfig { lease_ttl: Span(Duration::from_millis(600)), ..EngineConfig::default() };
    let (shared, beats) = (Arc::clone(&store), vital.get().handle().clone());
    let started = work.get().spawn(async move {
        let llm = llm_with("http://127.0.0.1:1".to_owned(), tier);
        Engine::start_beating_on(&beats, config, shared, llm, Metrics::new(), Arc::new(SystemClock), None).await
    });
    let engine = started.await.expect("no panic").expect("an engine");
    let life = engine.replica();
    let (free, busy) = std::sync::mpsc::channel::<()>();
    work.get().spawn(async move { busy.recv().is_err() });
    // Each time it is younger than before, it beat; more often than its lease could last without.
    let (mut beats, mut last) = (0, u64::MAX);
    while beats < 6 {
        let replicas = store.replicas(None).await.expect("read");
        let ours = replicas.iter().find(|replica| replica.id == life).expect("it is there");
        assert!(ours.alive, "declared dead after {beats} heartbeats");
        beats += u32::from(ours.heartbeat_age_ms < last);
        last = ours.heartbeat_age_ms;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(!engine.is_stuck(), "a few seconds are no reason to give up");
    drop(free);
}
