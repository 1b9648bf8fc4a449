//! Migrations, and a database that does not fit.

use sqlx::{Connection as _, Executor as _, PgConnection};
use stagegate_core::{Store as _, StoreError};
use stagegate_store_postgres::{PoolConfig, PostgresStore};
use stagegate_testkit::{servers::TestDatabase, store::fixtures::tenant};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_that_start_at_once_migrate_once() {
    let database = TestDatabase::fresh().await;
    let url = database.url().to_owned();
    let tasks: Vec<_> = (0..6)
        .map(|_| {
            let url = url.clone();
            tokio::spawn(async move {
                let store = crate::connect(&url, &PoolConfig::default()).await;
                store.migrate().await.expect("migrates");
                store.check_schema().await.expect("fits");
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("no panic");
    }
    crate::connect(&url, &PoolConfig::default()).await.migrate().await.expect("migrating again changes nothing");
}

#[tokio::test]
async fn a_database_without_the_schema_is_behind() {
    let database = TestDatabase::fresh().await;
    let store = crate::connect(database.url(), &PoolConfig::default()).await;
    let needed = PostgresStore::schema_version();
    let error = store.check_schema().await.expect_err("empty");
    assert!(matches!(error, StoreError::SchemaBehind { found: 0, needed: n } if n == needed), "{error}");
    assert!(error.to_string().contains("stagegate migrate"), "{error} names the mend");
    let error = store.keys(Some(&tenant("acme"))).await.expect_err("no table");
    assert!(matches!(error, StoreError::Defect(_)), "{error}");
    store.migrate().await.expect("migrates");
    store.check_schema().await.expect("fits");
    assert_eq!(store.keys(None).await.expect("works"), []);
}

#[tokio::test]
async fn a_schema_that_is_newer_or_was_changed_is_refused() {
    for (change, word) in [
        (
            "INSERT INTO _sqlx_migrations SELECT 9999, 'x', now(), true, checksum, 0 FROM _sqlx_migrations LIMIT 1",
            "9999",
        ),
        ("UPDATE _sqlx_migrations SET checksum = '\\x00' WHERE version = 1", "changed"),
    ] {
        let (store, database) = crate::fresh(&PoolConfig::default()).await;
        let mut connection = PgConnection::connect(database.url()).await.expect("connects");
        connection.execute(change).await.expect("changes");
        for result in [store.check_schema().await, store.migrate().await] {
            let error = result.expect_err("does not fit");
            assert!(matches!(&error, StoreError::SchemaAhead(message) if message.contains(word)), "{error}");
        }
    }
}
