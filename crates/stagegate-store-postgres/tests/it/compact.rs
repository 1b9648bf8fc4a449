//! The compact form, the form that a replica of schema 1 reads, and databases that hold both.

use std::sync::Arc;

use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection};
use stagegate_core::Store;
use stagegate_store_postgres::{PoolConfig, PostgresStore};
use stagegate_testkit::{
    servers::TestDatabase,
    store::{
        Subject,
        fixtures::live_replica,
        plain::{STEPS, Story},
        random,
    },
};

/// The heartbeat of a binary of schema 1, word for word.
const HEARTBEAT_OF_SCHEMA_1: &str = "
WITH beat AS (
    INSERT INTO replicas (id, name, version, draining, seen_at, expires_at)
    VALUES ('00000000-0000-4000-8000-000000000001', 'old', '0.1.0', false, now(), now() + interval '1 hour')
    ON CONFLICT (id) DO UPDATE
        SET draining = excluded.draining, seen_at = excluded.seen_at, expires_at = excluded.expires_at
        WHERE replicas.dead_at IS NULL
    RETURNING id
)
SELECT EXISTS (SELECT FROM beat) AS alive";

/// How many rows tell what only a replica of schema 2 can read, and how many rows it would not have.
const ROWS: &str = "SELECT (SELECT count(*) FROM checkpoints WHERE seq IS NOT NULL)
    + (SELECT count(*) FROM events WHERE body LIKE '[%') + (SELECT count(*) FROM runs WHERE output_of IS NOT NULL),
    (SELECT count(*) FROM stages) + (SELECT count(*) FROM run_payloads WHERE output IS NOT NULL)";

async fn fresh() -> (Arc<dyn Store>, PgConnection, TestDatabase) {
    let (store, database) = crate::fresh(&PoolConfig::default()).await;
    let mut connection = PgConnection::connect(database.url()).await.expect("connects");
    // As a database that older replicas have used before.
    run(&mut connection, "DELETE FROM capabilities").await;
    (Arc::new(store), connection, database)
}

async fn run(connection: &mut PgConnection, sql: &str) {
    connection.execute(AssertSqlSafe(sql.to_owned())).await.expect("works");
}

async fn rows(connection: &mut PgConnection) -> (i64, i64) {
    sqlx::query_as(ROWS).fetch_one(connection).await.expect("counts")
}

/// As if a replica of schema 1 lived for ever.
async fn never_compact() -> (PostgresStore, TestDatabase) {
    let (store, database) = crate::fresh(&PoolConfig::default()).await;
    let mut connection = PgConnection::connect(database.url()).await.expect("connects");
    let never = "CREATE OR REPLACE FUNCTION compact_2() RETURNS boolean LANGUAGE sql AS 'SELECT false'";
    run(&mut connection, never).await;
    (store, database)
}

async fn subject() -> Subject {
    let (store, database) = never_compact().await;
    Subject::new(Arc::new(store), database)
}

/// The form that a replica of schema 1 reads keeps the whole contract, too.
mod never {
    stagegate_testkit::store_contract!(crate::compact::subject);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_forms_answer_alike() {
    for seed in 11..=13 {
        let (compact, other) = (crate::subject().await, subject().await);
        random::compare(&compact.store, &other.store, seed, 250).await;
    }
}

#[tokio::test]
async fn while_a_replica_of_schema_1_lives_it_can_read_every_row() {
    let (store, mut connection, _database) = fresh().await;
    run(&mut connection, HEARTBEAT_OF_SCHEMA_1).await;
    let mut tale = Story::begin(&store, 1).await;
    for _ in 0..STEPS {
        tale.advance(&store).await;
    }
    tale.check(&store).await;
    assert_eq!(rows(&mut connection).await, (0, 8), "seven stages and an output");
    run(&mut connection, HEARTBEAT_OF_SCHEMA_1).await;
}

#[tokio::test]
async fn the_compact_form_is_written_once_the_last_of_schema_1_is_gone() {
    let long_ago = "expires_at = now() - interval '1 second', seen_at = now() - interval '11 minutes'";
    for gone in ["dead_at = now()", long_ago] {
        let (store, mut connection, database) = fresh().await;
        run(&mut connection, HEARTBEAT_OF_SCHEMA_1).await;
        live_replica(&store).await;
        run(&mut connection, &format!("UPDATE replicas SET {gone} WHERE schema = 1")).await;
        live_replica(&store).await;
        let mut tale = Story::begin(&store, 1).await;
        for _ in 0..STEPS {
            tale.advance(&store).await;
        }
        tale.check(&store).await;
        let (compact, other) = rows(&mut connection).await;
        assert!(compact > 5, "{compact}");
        assert_eq!(other, 1, "of all stages the one that failed once");
        // It slept, and wakes up: it would misread what is there.
        let refused = connection.execute(HEARTBEAT_OF_SCHEMA_1).await.expect_err("too late");
        assert!(refused.to_string().contains("start the newer one"), "{refused}");
        // Whoever starts now knows it from the first heartbeat on.
        let other = crate::connect(database.url(), &PoolConfig::default()).await;
        Story::begin(&(Arc::new(other) as Arc<dyn Store>), 2).await;
        assert!(rows(&mut connection).await.0 > compact, "its first row");
    }
}

/// It may wake, and answer readers before it is refused.
#[tokio::test]
async fn one_of_schema_1_that_vanished_a_moment_ago_is_waited_for() {
    for vanished in ["expires_at = now()", "expires_at = now(), dead_at = now() + interval '1 second'"] {
        let (store, mut connection, _database) = fresh().await;
        run(&mut connection, HEARTBEAT_OF_SCHEMA_1).await;
        run(&mut connection, &format!("UPDATE replicas SET {vanished} WHERE schema = 1")).await;
        live_replica(&store).await;
        let mut tale = Story::begin(&store, 1).await;
        for _ in 0..STEPS {
            tale.advance(&store).await;
        }
        tale.check(&store).await;
        assert_eq!(rows(&mut connection).await.0, 0);
    }
}

#[tokio::test]
async fn a_run_that_began_in_one_form_ends_in_the_other() {
    for switched in 0..=STEPS {
        let (store, mut connection, _database) = fresh().await;
        run(&mut connection, HEARTBEAT_OF_SCHEMA_1).await;
        let mut tale = Story::begin(&store, 1).await;
        for step in 0..STEPS {
            if step == switched {
                run(&mut connection, "UPDATE replicas SET dead_at = now() WHERE schema = 1").await;
                live_replica(&store).await;
            }
            tale.advance(&store).await;
            if step + 1 < STEPS {
                tale.hand_over(&store).await;
            }
        }
        tale.check(&store).await;
    }
}
