//! What fails for one run, or for many together, must not hold up the others.

use std::{sync::Arc, time::Duration};

use serde_json::json;
use sqlx::{Connection as _, PgConnection};
use stagegate_core::{RunId, RunState, Secret, Store, TenantId, pipeline::Span};
use stagegate_engine::{Engine, config::EngineConfig};
use stagegate_store_postgres::{PoolConfig, PostgresStore};
use stagegate_telemetry::Metrics;
use stagegate_testkit::{
    provider::{FakeProvider, Reply, contains},
    servers::TestDatabase,
};
use tokio::sync::watch;

use crate::{
    bench::{self, Bench, assert_state, canonical, finish, quick},
    faulty::{Fault, Faulty},
};

/// Far more than anything here may take.
const LONG: Duration = Duration::from_secs(40);

/// A bench on Postgres: its own database, and the SQLite file for the cache alone.
async fn on_postgres(pool: &PoolConfig) -> (Engine, FakeProvider, Arc<dyn Store>, TestDatabase, Bench) {
    let bench = Bench::start().await;
    let database = TestDatabase::fresh().await;
    let url = Secret::from(database.url().to_owned());
    let store = PostgresStore::connect(&url, pool, Metrics::new()).await.expect("connects");
    store.migrate().await.expect("migrates");
    let store: Arc<dyn Store> = Arc::new(store);
    let provider = FakeProvider::start().await;
    let llm = bench::llm(&provider, &bench.store);
    let config = EngineConfig { lease_ttl: Span(LONG), ..quick() };
    let clock = Arc::new(stagegate_core::SystemClock);
    let engine = Engine::start(config, Arc::clone(&store), llm, Metrics::new(), clock).await.expect("an engine");
    (engine, provider, store, database, bench)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_somebody_holds_holds_up_its_own_run_alone() {
    let pool = PoolConfig { statement_timeout: Span(Duration::from_millis(700)), ..PoolConfig::default() };
    let (engine, provider, store, database, _bench) = on_postgres(&pool).await;
    let gate = watch::Sender::new(false);
    provider.on(contains("stage-one")).respond(Reply::echo().when(gate.subscribe()));
    let mut runs: Vec<RunId> = Vec::new();
    for n in 0..20 {
        runs.push(bench::submit(&engine, &canonical(), json!({ "text": format!("number {n}.") })).await);
    }
    while provider.call_count() < runs.len() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // An operator's session that was left open.
    let mut operator = PgConnection::connect(database.url()).await.expect("connects");
    let mut held = operator.begin().await.expect("begins");
    let lock = "SELECT id FROM runs WHERE id = $1 FOR UPDATE";
    sqlx::query(lock).bind(runs[7].0).execute(&mut *held).await.expect("locks");
    gate.send_replace(true); // All twenty commit their first stage, in few batches.

    for run in runs.iter().filter(|run| **run != runs[7]) {
        tokio::time::timeout(LONG, finish(&engine, *run)).await.expect("it is not held up");
    }
    let tenant = TenantId::default();
    let stuck = store.run_record(&tenant, runs[7]).await.expect("reads").expect("there");
    assert_eq!((stuck.state, stuck.stages_done), (RunState::Running, 0), "its first stage is not committed yet");
    assert!(provider.calls_where(&contains("stage-two number 7.")).is_empty(), "and nothing follows before it is");

    held.rollback().await.expect("lets go");
    tokio::time::timeout(LONG, finish(&engine, runs[7])).await.expect("it goes on");
    assert_state(&store.run_record(&tenant, runs[7]).await.expect("reads").expect("there"), RunState::Succeeded);
    assert_eq!(provider.call_count(), 100, "nothing was asked twice");
}

/// A bench on SQLite, behind a store that can fail.
async fn faulty(config: EngineConfig) -> (Bench, Arc<Faulty>) {
    let mut bench = Bench::start().await;
    bench.engine.drain(Duration::ZERO).await;
    let faulty = Faulty::before(Arc::clone(&bench.store) as Arc<dyn Store>);
    let front = Arc::clone(&faulty) as Arc<dyn Store>;
    let (llm, clock) = (Arc::clone(&bench.llm), Arc::new(stagegate_core::SystemClock));
    bench.engine = Engine::start(config, front, llm, Metrics::new(), clock).await.expect("an engine");
    (bench, faulty)
}

const ONE_STAGE: &str = r#"{ "name": "short", "defaults": { "model": "fake/model" },
    "stages": [ { "id": "one", "prompt": "stage-one {{ input.text }}" } ] }"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_makes_room_only_once_its_last_commit_is_acknowledged() {
    let (bench, faulty) = faulty(EngineConfig { max_runs: 1, ..quick() }).await;
    let gate = watch::Sender::new(false);
    bench.provider.on(contains("first")).respond(Reply::echo().when(gate.subscribe()));
    let first = bench.submit(ONE_STAGE, json!({ "text": "first" })).await;
    // Now its start is committed, be it by its submit or, where that met a look for work, by a claim; what follows is its end.
    while bench.provider.call_count() == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    faulty.set("commit", Fault::HoldAnswer);
    gate.send_replace(true);
    while bench.detail(first).await.run.state != RunState::Succeeded {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let second = bench.submit(ONE_STAGE, json!({ "text": "second" })).await;
    assert_state(&bench.detail(second).await.run, RunState::Queued);
    assert!(bench.provider.calls_where(&contains("second")).is_empty(), "the first one has the room still");
    faulty.mend("commit");
    tokio::time::timeout(LONG, bench.finish(second)).await.expect("there is room now");
    assert_state(&bench.detail(second).await.run, RunState::Succeeded);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runs_that_cannot_be_read_together_are_read_apart() {
    let (bench, faulty) = faulty(quick()).await;
    faulty.set("claim", Fault::Refuse);
    faulty.set("load", Fault::RefuseMany);
    let full = EngineConfig { max_runs: 0, ..quick() };
    let acceptor = bench::engine(full, &bench.store, &bench.llm).await;
    let mut runs = Vec::new();
    for n in 0..8 {
        runs.push(bench::submit(&acceptor, ONE_STAGE, json!({ "text": format!("number {n}.") })).await);
    }
    faulty.mend("claim"); // It takes all eight at once, and could hand them back and take them again for ever.
    for run in runs {
        tokio::time::timeout(LONG, finish(&acceptor, run)).await.expect("it is taken up");
        assert_state(&bench.detail(run).await.run, RunState::Succeeded);
    }
}
