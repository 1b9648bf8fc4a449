//! The Postgres store on a real Postgres.

mod capabilities;
mod claims;
mod compact;
mod contract;
mod corrupt;
mod faults;
mod plans;
mod pool;
mod schema;
mod skew;

use std::{sync::Arc, time::Duration};

use stagegate_core::{Secret, pipeline::Span};
use stagegate_store_postgres::{PoolConfig, PostgresStore};
use stagegate_telemetry::Metrics;
use stagegate_testkit::{servers::TestDatabase, store::Subject};

/// A store on this URL, not migrated.
async fn connect(url: &str, pool: &PoolConfig) -> PostgresStore {
    PostgresStore::connect(&Secret::from(url.to_owned()), pool, Metrics::new()).await.expect("connects")
}

/// A store on a fresh database, migrated.
async fn fresh(pool: &PoolConfig) -> (PostgresStore, TestDatabase) {
    let database = TestDatabase::fresh().await;
    let store = connect(database.url(), pool).await;
    store.migrate().await.expect("migrates");
    (store, database)
}

/// What the contract suite runs on.
async fn subject() -> Subject {
    let (store, database) = fresh(&PoolConfig::default()).await;
    Subject::new(Arc::new(store), database)
}

/// So many milliseconds.
fn ms(number: u64) -> Span {
    Span(Duration::from_millis(number))
}
