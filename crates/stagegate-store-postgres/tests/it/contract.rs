//! The contract that every store keeps.

use stagegate_testkit::store::random;

stagegate_testkit::store_contract!(crate::subject);

/// A store agrees with itself, so that the comparison itself is known to be sound.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_commands_have_one_outcome() {
    for seed in 1..=2 {
        let (left, right) = (crate::subject().await, crate::subject().await);
        random::compare(&left.store, &right.store, seed, 250).await;
    }
}
