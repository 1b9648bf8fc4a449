//! The pool's limits and numbers.

use std::{sync::Arc, time::Duration};

use sqlx::{Connection as _, Executor as _, PgConnection, Row as _};
use stagegate_core::{Secret, Store, StoreError, store::Committed};
use stagegate_store_postgres::{PoolConfig, PoolStats, PostgresStore};
use stagegate_telemetry::Metrics;
use stagegate_testkit::{
    servers::TestDatabase,
    store::fixtures::{commit, live_replica, run_id, step, submit_leased, tenant},
};

use crate::ms;

/// Far more than anything here may take.
const LONG: Duration = Duration::from_secs(30);

/// Holds a lock that makes every read of a run wait.
async fn lock_runs(database: &TestDatabase) -> PgConnection {
    let mut connection = PgConnection::connect(database.url()).await.expect("connects");
    connection.execute("BEGIN; LOCK TABLE runs IN ACCESS EXCLUSIVE MODE").await.expect("locks");
    connection
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exhausted_pool_is_unavailable_and_counts_its_waiters() {
    let database = TestDatabase::fresh().await;
    let metrics = Metrics::new();
    let config = PoolConfig { max_connections: 1, acquire_timeout: ms(400), ..PoolConfig::default() };
    let secret = Secret::from(database.url().to_owned());
    let store = PostgresStore::connect(&secret, &config, metrics.clone()).await.expect("connects");
    store.migrate().await.expect("migrates");
    let lock = lock_runs(&database).await;
    let reading = tokio::spawn({
        let store = store.clone();
        async move { store.run_record(&tenant("acme"), run_id(1)).await }
    });
    // A task that waits for its connection to be opened is a waiter, too.
    while store.pool_stats() != (PoolStats { in_use: 1, idle: 0, max: 1, waiters: 0 }) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let waiting = tokio::spawn({
        let store = store.clone();
        async move { store.run_record(&tenant("acme"), run_id(2)).await }
    });
    while store.pool_stats().waiters == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let error = tokio::time::timeout(LONG, waiting).await.expect("in time").expect("no panic").expect_err("exhausted");
    assert!(matches!(&error, StoreError::Unavailable(message) if message.contains("acquire timeout")), "{error}");
    assert!(error.is_retryable());
    assert_eq!(store.pool_stats().waiters, 0);
    drop(lock);
    assert_eq!(reading.await.expect("no panic").expect("answers"), None);
    store.run_record(&tenant("acme"), run_id(2)).await.expect("free again");
    store.observe_pool();
    let text = metrics.render().expect("renders");
    assert!(text.contains("stagegate_db_pool_connections_max 1\n"), "{text}");
    assert!(!text.contains("state=\"max\""), "beside its parts it would make a sum wrong: {text}");
    assert!(metrics.pool_wait.get_sample_count() >= 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_that_wait_keep_no_replica_from_its_own_work() {
    let config = PoolConfig { max_connections: 6, acquire_timeout: ms(30_000), ..PoolConfig::default() };
    let (store, database) = crate::fresh(&config).await;
    let store: Arc<dyn Store> = Arc::new(store);
    let mut lock = PgConnection::connect(database.url()).await.expect("connects");
    lock.execute("BEGIN; LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE").await.expect("locks");
    let readers: Vec<_> = (0..20)
        .map(|_| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { store.keys(None).await })
        })
        .collect();
    let waiting =
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    let mut operator = PgConnection::connect(database.url()).await.expect("connects");
    while sqlx::query_scalar::<_, i64>(waiting).fetch_one(&mut operator).await.expect("reads") < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let (run, lease) = submit_leased(&store, 1, live_replica(&store).await).await;
    assert_eq!(commit(&store, &step(lease, 3)).await, Committed::Now);
    assert_eq!(lease.run, run.id);
    assert!(readers.iter().all(|reader| !reader.is_finished()), "they wait all this time");
    drop(lock);
    for reader in readers {
        reader.await.expect("no panic").expect("answers");
    }
}

#[tokio::test]
async fn a_statement_that_takes_too_long_is_unavailable() {
    let config = PoolConfig { statement_timeout: ms(150), ..PoolConfig::default() };
    let (store, database) = crate::fresh(&config).await;
    let lock = lock_runs(&database).await;
    let of = tenant("acme");
    let read = store.run_record(&of, run_id(1));
    let error = tokio::time::timeout(LONG, read).await.expect("in time").expect_err("timed out");
    assert!(matches!(&error, StoreError::Unavailable(message) if message.contains("timed out")), "{error}");
    drop(lock);
    assert_eq!(store.run_record(&tenant("acme"), run_id(1)).await.expect("answers"), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_sees_who_runs_which_statement() {
    let (store, database) = crate::fresh(&PoolConfig::default()).await;
    let lock = lock_runs(&database).await;
    let reading = tokio::spawn(async move { store.run_record(&tenant("acme"), run_id(1)).await });
    let mut operator = PgConnection::connect(database.url()).await.expect("connects");
    let sql = "SELECT query FROM pg_stat_activity
               WHERE datname = current_database() AND application_name = 'stagegate' AND wait_event_type = 'Lock'";
    let query: String = loop {
        match sqlx::query(sql).fetch_optional(&mut operator).await.expect("reads") {
            Some(row) => break row.get(0),
            None => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    assert!(query.starts_with("/* runs.record */"), "{query}");
    drop(lock);
    reading.await.expect("no panic").expect("answers");
}

#[tokio::test]
async fn a_database_that_cannot_be_used_is_told_at_once_and_without_its_password() {
    let database = TestDatabase::fresh().await;
    let closed = std::net::TcpListener::bind("127.0.0.1:0").expect("binds").local_addr().expect("bound").port();
    let no_such = database.url().replace("/t_", "/nobodys_");
    let cases = [
        (format!("postgres://ann:hunter2@127.0.0.1:{closed}/x"), true, format!("127.0.0.1:{closed}")),
        (no_such, false, "does not exist".to_owned()),
        ("hunter2 is no URL".to_owned(), false, "postgres://user@host/name".to_owned()),
    ];
    for (url, retryable, expected) in cases {
        let (secret, config) = (Secret::from(url), PoolConfig::default());
        let connecting = PostgresStore::connect(&secret, &config, Metrics::new());
        let error = tokio::time::timeout(LONG, connecting).await.expect("in time").expect_err("cannot be used");
        assert_eq!(error.is_retryable(), retryable, "{error}");
        assert!(error.to_string().contains(&expected), "{error}");
        assert!(!error.to_string().contains("hunter2"), "{error}");
    }
}
