//! What every live replica understands: how a capability becomes common, and who is shut out then.

use std::time::Duration;

use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection};
use stagegate_core::{
    Capabilities, Capability, Store as _, StoreError, StoreResult,
    store::{Heartbeat, Pulse},
};
use stagegate_store_postgres::{PoolConfig, PostgresStore};
use stagegate_testkit::{servers::TestDatabase, store::fixtures::replica};

const HOUR: Duration = Duration::from_hours(1);

/// The heartbeat of a binary of schema 2, word for word.
const HEARTBEAT_OF_SCHEMA_2: &str = "
WITH beat AS (
    INSERT INTO replicas (id, name, version, draining, seen_at, expires_at, schema)
    VALUES ('00000000-0000-4000-8000-000000000002', 'old', '0.1.0', false, now(), now() + interval '1 hour', 2)
    ON CONFLICT (id) DO UPDATE
        SET draining = excluded.draining, seen_at = excluded.seen_at, expires_at = excluded.expires_at
        WHERE replicas.dead_at IS NULL
    RETURNING id
)
SELECT EXISTS (SELECT FROM beat) AS alive";

const FAREWELL: &str = "UPDATE replicas SET dead_at = now() WHERE schema = 2";

async fn old_database() -> (PostgresStore, PgConnection, TestDatabase) {
    let (store, database) = crate::fresh(&PoolConfig::default()).await;
    let mut connection = PgConnection::connect(database.url()).await.expect("connects");
    run(&mut connection, "DELETE FROM capabilities").await;
    run(&mut connection, HEARTBEAT_OF_SCHEMA_2).await;
    (store, connection, database)
}

async fn run(connection: &mut PgConnection, sql: &str) {
    connection.execute(AssertSqlSafe(sql.to_owned())).await.expect("works");
}

fn own_and(more: &[&str]) -> Capabilities {
    let own = Capabilities::own();
    Capabilities::of_words(own.words().chain(more.iter().copied()))
}

async fn beat(
    store: &PostgresStore,
    replica: stagegate_core::ReplicaId,
    capabilities: Capabilities,
    way_back: Duration,
) -> StoreResult<Pulse> {
    let (name, version, ttl) = ("host".to_owned(), "1".to_owned(), HOUR);
    store.heartbeat(&Heartbeat { replica, name, version, draining: false, ttl, capabilities, way_back }).await
}

/// Whether the vocabulary is open for a new replica.
async fn is_open(store: &PostgresStore, way_back: Duration) -> bool {
    let pulse = beat(store, replica(), Capabilities::own(), way_back).await.expect("beats");
    assert!(pulse.common.common(Capability::CompactRows), "schema 2 reads it");
    pulse.common.common(Capability::OpenVocabulary)
}

#[tokio::test]
async fn on_a_new_database_every_capability_is_common_at_once() {
    let (store, _database) = crate::fresh(&PoolConfig::default()).await;
    assert!(is_open(&store, HOUR).await);
}

#[tokio::test]
async fn a_capability_settles_when_the_last_replica_without_it_is_gone_and_shuts_it_out() {
    let (store, mut connection, _database) = old_database().await;
    assert!(!is_open(&store, Duration::ZERO).await, "one of schema 2 lives");
    run(&mut connection, FAREWELL).await;
    assert!(is_open(&store, Duration::ZERO).await);
    let refused = connection.execute(HEARTBEAT_OF_SCHEMA_2).await.expect_err("too late");
    assert!(refused.to_string().contains("start the newer one"), "{refused}");
    assert!(is_open(&store, HOUR).await, "for good");
}

#[tokio::test]
async fn a_replica_that_vanished_a_moment_ago_is_waited_for() {
    let (store, mut connection, _database) = old_database().await;
    run(&mut connection, "UPDATE replicas SET expires_at = now() WHERE schema = 2").await;
    assert!(!is_open(&store, Duration::ZERO).await);
    run(&mut connection, "UPDATE replicas SET seen_at = now() - interval '11 minutes' WHERE schema = 2").await;
    assert!(is_open(&store, Duration::ZERO).await);
}

#[tokio::test]
async fn within_the_way_back_the_previous_release_may_return() {
    let (store, mut connection, _database) = old_database().await;
    run(&mut connection, FAREWELL).await;
    assert!(!is_open(&store, HOUR).await);
    run(&mut connection, "UPDATE capabilities SET common_since = now() - interval '59 minutes'").await;
    assert!(!is_open(&store, HOUR).await);
    run(&mut connection, "UPDATE replicas SET dead_at = NULL WHERE schema = 2").await;
    run(&mut connection, HEARTBEAT_OF_SCHEMA_2).await;
    assert!(!is_open(&store, HOUR).await);
    run(&mut connection, FAREWELL).await;
    assert!(!is_open(&store, HOUR).await, "the time begins anew");
    run(&mut connection, "UPDATE capabilities SET common_since = now() - interval '61 minutes'").await;
    assert!(is_open(&store, HOUR).await);
}

#[tokio::test]
async fn a_later_capability_is_common_while_every_live_replica_tells_it() {
    let (store, _database) = crate::fresh(&PoolConfig::default()).await;
    let later = Capability::parse("later").expect("a word");
    let (first, second, older) = (replica(), replica(), replica());
    for one in [first, second, first] {
        let pulse = beat(&store, one, own_and(&["later", "much_later"]), HOUR).await.expect("beats");
        assert!(pulse.common.common(later));
    }
    let pulse = beat(&store, older, Capabilities::own(), HOUR).await.expect("an older replica may join");
    assert_eq!(pulse.common, Capabilities::own(), "and is not told of what it does not know");
    let pulse = beat(&store, first, own_and(&["later"]), HOUR).await.expect("beats");
    assert!(!pulse.common.common(later), "it ends that");
    store.leave(older).await.expect("leaves");
    let pulse = beat(&store, first, own_and(&["later"]), HOUR).await.expect("beats");
    assert!(pulse.common.common(later));
}

#[tokio::test]
async fn a_replica_without_a_settled_capability_is_told_to_start_a_newer_release() {
    let (store, database) = crate::fresh(&PoolConfig::default()).await;
    let mut connection = PgConnection::connect(database.url()).await.expect("connects");
    run(&mut connection, "INSERT INTO capabilities VALUES ('of_the_future', now(), now())").await;
    let refused = beat(&store, replica(), Capabilities::own(), HOUR).await.expect_err("refused");
    assert!(matches!(&refused, StoreError::SchemaAhead(reason) if reason.contains("newer one")), "{refused}");
}
