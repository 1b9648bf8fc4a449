//! The store in memory keeps the contract of the real ones, and answers random commands as SQLite does.

use std::sync::Arc;

use stagegate_core::Store;
use stagegate_simulation::MemoryStore;
use stagegate_store_sqlite::SqliteStore;
use stagegate_testkit::store::{Subject, random};

async fn subject() -> Subject {
    Subject::new(Arc::new(MemoryStore::new()), ())
}

stagegate_testkit::store_contract!(crate::contract::subject);

#[tokio::test]
async fn random_commands_end_the_same_in_memory_and_on_sqlite() {
    for seed in 0..6 {
        let memory: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let sqlite: Arc<dyn Store> = Arc::new(SqliteStore::in_memory().await.expect("a store"));
        random::compare(&memory, &sqlite, seed, 250).await;
    }
}
