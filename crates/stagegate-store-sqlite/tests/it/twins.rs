//! The two stores side by side: the same random commands, the same answers, the same rows at the end.

use std::sync::Arc;

use stagegate_core::{Secret, Store};
use stagegate_store_postgres::{PoolConfig, PostgresStore};
use stagegate_telemetry::Metrics;
use stagegate_testkit::{servers::TestDatabase, store::random};

use crate::support::{folder, open_dyn};

async fn compare(seeds: std::ops::Range<u64>) {
    for seed in seeds {
        let database = TestDatabase::fresh().await;
        let url = Secret::from(database.url().to_owned());
        let postgres = PostgresStore::connect(&url, &PoolConfig::default(), Metrics::new()).await.expect("connects");
        postgres.migrate().await.expect("migrates");
        let postgres: Arc<dyn Store> = Arc::new(postgres);
        let (_folder, path) = folder();
        random::compare(&postgres, &open_dyn(&path).await, seed, 300).await;
        postgres.close().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_commands_end_the_same_on_postgres_and_sqlite() {
    compare(100..104).await;
}
