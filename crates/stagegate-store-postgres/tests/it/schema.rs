//! Migrations, and a database that does not fit.

use std::{sync::Arc, time::Duration};

use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection};
use stagegate_core::{Store, StoreError};
use stagegate_store_postgres::{PoolConfig, PostgresStore};
use stagegate_testkit::{
    servers::TestDatabase,
    store::fixtures::{run_with_rows_everywhere, tenant},
};

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_that_cannot_have_its_lock_lets_others_pass_and_comes_again() {
    let database = TestDatabase::fresh().await;
    let mut holder = PgConnection::connect(database.url()).await.expect("connects");
    let mut first = sqlx::migrate!("../../migrations/postgres");
    first.migrations.to_mut().retain(|migration| migration.version == 1);
    first.run(&mut holder).await.expect("schema 1");
    holder.execute("BEGIN; LOCK TABLE runs IN ACCESS SHARE MODE").await.expect("as a dump does");
    let store = crate::connect(database.url(), &PoolConfig::default()).await;
    let migrating = tokio::spawn(async move { store.migrate().await });
    // Twice: it came again.
    let mut operator = PgConnection::connect(database.url()).await.expect("connects");
    let waiting =
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    for _ in 0..2 {
        for wanted in [1_i64, 0] {
            while sqlx::query_scalar::<_, i64>(waiting).fetch_one(&mut operator).await.expect("reads") != wanted {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }
    holder.execute("COMMIT").await.expect("lets go");
    migrating.await.expect("no panic").expect("migrates");
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
        for result in [store.check_schema().await, store.migrate().await.map(drop)] {
            let error = result.expect_err("does not fit");
            assert!(matches!(&error, StoreError::SchemaAhead(message) if message.contains(word)), "{error}");
        }
    }
}

/// A newer binary migrated the database, and says which binaries still work beside its schema.
async fn migrate_beyond(database: &TestDatabase, migration: i64, oldest_binary: i64) {
    let mut connection = PgConnection::connect(database.url()).await.expect("connects");
    let applied = "INSERT INTO _sqlx_migrations SELECT $1, 'x', now(), true, checksum, 0 FROM _sqlx_migrations LIMIT 1";
    sqlx::query(applied).bind(migration).execute(&mut connection).await.expect("changes");
    let compat = "INSERT INTO schema_compat VALUES ($1, $2)";
    sqlx::query(compat).bind(migration).bind(oldest_binary).execute(&mut connection).await.expect("changes");
}

#[tokio::test]
async fn a_newer_schema_that_suits_this_binary_is_worked_on() {
    let (store, database) = crate::fresh(&PoolConfig::default()).await;
    let needed = PostgresStore::schema_version();
    migrate_beyond(&database, 9_998, needed).await;
    migrate_beyond(&database, 9_999, needed - 1).await;
    store.check_schema().await.expect("suits");
    store.migrate().await.expect("there is nothing to do");
    store.check_schema().await.expect("still suits");
    // One of several does not.
    migrate_beyond(&database, 10_000, needed + 1).await;
    for result in [store.check_schema().await, store.migrate().await.map(drop)] {
        let error = result.expect_err("does not fit");
        assert!(matches!(&error, StoreError::SchemaAhead(message) if message.contains("10000")), "{error}");
    }
}

#[tokio::test]
async fn every_migration_says_which_binaries_work_beside_it() {
    let (_store, database) = crate::fresh(&PoolConfig::default()).await;
    let mut connection = PgConnection::connect(database.url()).await.expect("connects");
    let sql = "SELECT m.version FROM _sqlx_migrations m LEFT JOIN schema_compat c ON c.migration = m.version
               WHERE m.version > 1 AND (c.migration IS NULL OR c.oldest_binary > m.version)";
    let silent: Vec<i64> = sqlx::query_scalar(sql).fetch_all(&mut connection).await.expect("reads");
    assert_eq!(silent, [0_i64; 0]);
}

/// Of every table that knows runs, but for the ledger.
#[tokio::test]
async fn a_deleted_run_leaves_only_its_ledger_rows() {
    let (store, database) = crate::fresh(&PoolConfig::default()).await;
    let store: Arc<dyn Store> = Arc::new(store);
    let run = run_with_rows_everywhere(&store).await;
    let mut connection = PgConnection::connect(database.url()).await.expect("connects");
    let tables = "SELECT table_name::text FROM information_schema.columns
                  WHERE table_schema = 'public' AND column_name = 'run_id'";
    let mut tables: Vec<String> = sqlx::query_scalar(tables).fetch_all(&mut connection).await.expect("reads");
    tables.push("runs".to_owned());
    assert!(tables.len() >= 9, "{tables:?}");
    let mut rows = async |table: &str| -> i64 {
        let key = if table == "runs" { "id" } else { "run_id" };
        let sql = AssertSqlSafe(format!("SELECT count(*) FROM {table} WHERE {key} = $1"));
        sqlx::query_scalar(sql).bind(run.0).fetch_one(&mut connection).await.expect("counts")
    };
    for table in tables.iter().filter(|table| *table != "signals") {
        assert!(rows(table).await > 0, "{table} has none, so that it shows nothing");
    }
    assert_eq!(store.delete(&[run]).await.expect("deletes"), [run]);
    for table in &tables {
        assert_eq!(rows(table).await, if table == "ledger" { 2 } else { 0 }, "{table}");
    }
}
