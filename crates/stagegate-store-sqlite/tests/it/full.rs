//! A disk that is full.

use serde_json::json;
use stagegate_core::{
    Epoch, Store, StoreError,
    store::{Committed, Lease, NewRun},
};
use stagegate_store_sqlite::SqliteStore;
use stagegate_telemetry::Metrics;
use stagegate_testkit::store::fixtures::{
    checkpoint, commit, dump, large_json, leased_run, live_replica, new_run, stage, step, submit,
};

use crate::support::{folder, open_dyn};

async fn bounded(path: &std::path::Path) -> std::sync::Arc<dyn Store> {
    let store = SqliteStore::open_bounded(path, 2 * 1024 * 1024, Metrics::new()).await.expect("the store opens");
    std::sync::Arc::new(store)
}

#[tokio::test]
async fn a_full_disk_is_told_and_nothing_is_half_written() {
    let (_folder, path) = folder();
    let store = bounded(&path).await;
    let big = |n| NewRun { input: json!("x".repeat(50_000)).into(), ..new_run(n) };
    let (mut there, mut refused) = (Vec::new(), None);
    for n in 0..200 {
        let batch = [big(n), big(n), big(n)];
        match store.submit(&batch).await {
            Ok(_) => there.extend(batch),
            Err(error) => {
                assert!(matches!(error, StoreError::Full(_)) && error.is_retryable(), "{error}");
                refused = Some(batch);
                break;
            }
        }
    }
    let refused = refused.expect("the limit is reached");
    assert!(there.len() > 9);
    for run in &refused {
        assert_eq!(store.run(&run.tenant, run.id).await.expect("reading goes on"), None);
    }
    for run in &there {
        assert_eq!(dump(&store, &run.tenant, run.id).await.detail.input, run.input);
    }
    // With space again, the same submit is accepted.
    store.close().await;
    let store = open_dyn(&path).await;
    store.submit(&refused).await.expect("submit");
    for run in &refused {
        assert_eq!(dump(&store, &run.tenant, run.id).await.events, run.events);
    }
}

#[tokio::test]
async fn a_commit_that_does_not_fit_can_be_repeated() {
    let (_folder, path) = folder();
    let store = bounded(&path).await;
    let owner = live_replica(&store).await;
    let run = leased_run(1, owner);
    submit(&store, &run).await;
    let lease = Lease { run: run.id, epoch: Epoch(1) };
    let before = dump(&store, &run.tenant, run.id).await;
    let mut large = step(lease, 3);
    large.checkpoints = ["a", "b", "c"].map(|of| (stage(of), checkpoint(large_json()))).to_vec();
    for _ in 0..3 {
        let error = store.commit(std::slice::from_ref(&large)).await.expect_err("it does not fit");
        assert!(matches!(error, StoreError::Full(_)), "{error}");
        assert_eq!(dump(&store, &run.tenant, run.id).await, before);
    }
    assert_eq!(commit(&store, &step(lease, 3)).await, Committed::Now, "a small one fits");
}

#[tokio::test]
async fn a_ping_tells_of_a_full_disk_until_a_write_succeeds() {
    let (_folder, path) = folder();
    let store = bounded(&path).await;
    store.ping().await.expect("there is room");
    let big = |n| NewRun { input: json!("x".repeat(50_000)).into(), ..new_run(n) };
    let mut n = 0;
    while store.submit(&[big(n)]).await.is_ok() {
        n += 1;
    }
    for _ in 0..2 {
        let error = store.ping().await.expect_err("the disk is full");
        assert!(matches!(error, StoreError::Full(_)), "{error}");
    }
    submit(&store, &new_run(1_000)).await;
    store.ping().await.expect("a write succeeded");
}
