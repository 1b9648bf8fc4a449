//! The cache tier's contract, and what is SQLite's own: bounds, and runs and cache side by side.

use std::{sync::Arc, time::Duration};

use futures::future::join_all;
use sqlx::Executor as _;
use stagegate_core::{
    TenantId,
    cache::{CacheKey, CacheScope, CacheTier},
    store::Committed,
};
use stagegate_store_sqlite::CACHE_ENTRY_MAX_BYTES;
use stagegate_testkit::{
    cache::CacheFixture,
    store::fixtures::{commit, live_replica, step, submit_leased},
};

use crate::support::{folder, open, open_dyn, raw};

const HOUR: Duration = Duration::from_hours(1);

mod contract {
    stagegate_testkit::cache_tier_contract!(super::fixture);
}

async fn fixture() -> CacheFixture {
    let (folder, path) = folder();
    let (tier, peer) = (open(&path).await.cache_tier(), open(&path).await.cache_tier());
    let reset = Box::new(move || -> futures::future::BoxFuture<'static, ()> {
        let path = path.clone();
        Box::pin(async move {
            let all = "DELETE FROM cache_entries; DELETE FROM cache_generations; DELETE FROM cache_floors";
            raw(&path).await.execute(all).await.expect("emptied");
            // The tier's clock ticks in milliseconds, and a flush takes longer than one.
            tokio::time::sleep(Duration::from_millis(5)).await;
        })
    });
    CacheFixture { tier, peer, reset, keep: Box::new(folder) }
}

fn key(n: u8) -> CacheKey {
    CacheKey([n; 32])
}

async fn has(tier: &Arc<dyn CacheTier>, n: u8) -> bool {
    let found = tier.get(&TenantId::default(), key(n), &[CacheScope::Tenant]).await.expect("a look-up");
    found.entry.is_some()
}

async fn put(tier: &Arc<dyn CacheTier>, n: u8, bytes: usize, ttl: Duration) {
    let of = TenantId::default();
    let generation = tier.get(&of, key(n), &[CacheScope::Tenant]).await.expect("a look-up").generation;
    tier.put(&of, key(n), &vec![n; bytes], generation, ttl).await.expect("a put");
}

#[tokio::test]
async fn the_oldest_entries_go_when_there_are_too_many_bytes() {
    let (_folder, path) = folder();
    let tier = open(&path).await.cache_tier_sized(100_000);
    for n in 0..40 {
        put(&tier, n, 10_000, HOUR).await;
    }
    // Written again, the first of those that are left is the youngest.
    put(&tier, 35, 10_000, HOUR).await;
    let bytes: i64 = sqlx::query_scalar("SELECT sum(length(entry)) FROM cache_entries")
        .fetch_one(&mut raw(&path).await)
        .await
        .expect("a sum");
    assert!((10_000..=100_000).contains(&bytes), "{bytes}");
    let counted: i64 =
        sqlx::query_scalar("SELECT bytes FROM cache_size").fetch_one(&mut raw(&path).await).await.expect("a count");
    assert_eq!(counted, bytes);
    assert!(has(&tier, 39).await && has(&tier, 35).await);
    assert!(!has(&tier, 0).await && !has(&tier, 10).await);
}

#[tokio::test]
async fn an_entry_that_is_too_large_is_not_kept() {
    let (_folder, path) = folder();
    let tier = open(&path).await.cache_tier();
    put(&tier, 1, 10, HOUR).await;
    put(&tier, 2, 10, HOUR).await;
    let too_large = usize::try_from(CACHE_ENTRY_MAX_BYTES).expect("small") + 1;
    put(&tier, 1, too_large, HOUR).await;
    assert!(!has(&tier, 1).await, "the one that it replaces must not be served in its place");
    assert!(has(&tier, 2).await);
}

#[tokio::test]
async fn expired_entries_are_removed_by_later_writes() {
    let (_folder, path) = folder();
    let tier = open(&path).await.cache_tier();
    for n in 0..20 {
        put(&tier, n, 100, Duration::from_millis(1)).await;
    }
    while has(&tier, 19).await {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    put(&tier, 100, 100, HOUR).await;
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM cache_entries")
        .fetch_one(&mut raw(&path).await)
        .await
        .expect("a count");
    assert_eq!(left, 1);
}

#[tokio::test]
async fn an_entry_outlives_its_process() {
    let (_folder, path) = folder();
    let store = open(&path).await;
    put(&store.cache_tier(), 1, 100, HOUR).await;
    stagegate_core::Store::close(&store).await;
    assert!(has(&open(&path).await.cache_tier(), 1).await);
}

/// Neither waits in vain for the other: every put and every commit happens.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runs_and_cache_write_side_by_side() {
    let (_folder, path) = folder();
    let store = open_dyn(&path).await;
    let tier = open(&path).await.cache_tier();
    let owner = live_replica(&store).await;
    let committing = async {
        for n in 0..10 {
            let (_, lease) = submit_leased(&store, n, owner).await;
            for last_seq in 3..8 {
                assert_eq!(commit(&store, &step(lease, last_seq)).await, Committed::Now);
            }
        }
    };
    let putting = join_all((0..100).map(|n| {
        let tier = &tier;
        async move { put(tier, n, 20_000, HOUR).await }
    }));
    tokio::join!(committing, putting);
    for n in 0..100 {
        assert!(has(&tier, n).await, "{n}");
    }
}
