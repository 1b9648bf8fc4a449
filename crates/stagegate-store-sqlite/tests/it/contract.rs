//! The store's contract, on a file and in memory, and the same random commands into both.

use std::sync::Arc;

use stagegate_core::Store;
use stagegate_store_sqlite::SqliteStore;
use stagegate_testkit::store::{Subject, random};

use crate::support::{folder, open_dyn};

async fn on_a_file() -> Subject {
    let (folder, path) = folder();
    Subject::new(open_dyn(&path).await, folder)
}

async fn in_memory() -> Subject {
    Subject::new(Arc::new(SqliteStore::in_memory().await.expect("a store")), ())
}

mod file {
    stagegate_testkit::store_contract!(crate::contract::on_a_file);
}

mod memory {
    stagegate_testkit::store_contract!(crate::contract::in_memory);
}

#[tokio::test]
async fn random_commands_end_the_same_on_a_file_and_in_memory() {
    for seed in 0..4 {
        let subject = on_a_file().await;
        let memory: Arc<dyn Store> = Arc::new(SqliteStore::in_memory().await.expect("a store"));
        random::compare(&subject.store, &memory, seed, 250).await;
    }
}
