//! Migrations: what an older file becomes, what a newer one allows, and what a deleted run leaves in the tables.

use sqlx::{AssertSqlSafe, Executor as _, SqliteConnection};
use stagegate_core::{
    Epoch, RunState, StoreError, Totals, Usd,
    fair::Shares,
    store::{Commit, SignalKind},
};
use stagegate_store_sqlite::SqliteStore;
use stagegate_telemetry::Metrics;
use stagegate_testkit::store::fixtures::{
    checkpoint, claim_all, commit, dump, end, full_attempt, full_stage, live_replica, new_run, park,
    run_with_rows_everywhere, signal, stage, step, submit, submit_leased,
};

use crate::support::{folder, open, open_dyn, raw};

/// Takes a file back to the first migration, as a binary before the second one left it.
async fn make_old(conn: &mut SqliteConnection) {
    for sql in [
        "DROP INDEX runs_lanes",
        "DROP INDEX runs_cancelled",
        "DROP INDEX runs_due",
        "DROP INDEX runs_leased",
        "DROP INDEX runs_held",
        "DROP INDEX runs_parked",
        "ALTER TABLE ledger DROP COLUMN unknown",
        "ALTER TABLE runs DROP COLUMN unknown_calls",
        "ALTER TABLE runs DROP COLUMN unknown_nanos",
        "ALTER TABLE stages DROP COLUMN unknown_calls",
        "ALTER TABLE stages DROP COLUMN unknown_nanos",
        "ALTER TABLE stages DROP COLUMN former_owners",
        "ALTER TABLE stages DROP COLUMN judged",
        "ALTER TABLE stages DROP COLUMN outages",
        "ALTER TABLE stages DROP COLUMN outage_since",
        "ALTER TABLE runs DROP COLUMN crashes",
        "ALTER TABLE runs DROP COLUMN crashed_seq",
        "ALTER TABLE runs DROP COLUMN start_at",
        "ALTER TABLE runs DROP COLUMN leased_at",
        "ALTER TABLE runs DROP COLUMN purged_at",
        "ALTER TABLE runs DROP COLUMN pipeline_max",
        "ALTER TABLE runs DROP COLUMN key",
        "ALTER TABLE runs DROP COLUMN key_max",
        "ALTER TABLE runs DROP COLUMN lane",
        "CREATE INDEX runs_ready ON runs (priority DESC, ready_at, id) WHERE ready_at IS NOT NULL",
        "CREATE INDEX runs_wake ON runs (wake_at) WHERE wake_at IS NOT NULL",
        "CREATE INDEX runs_owned ON runs (owner) WHERE owner IS NOT NULL",
        "DROP TABLE schema_compat",
        "DELETE FROM _sqlx_migrations WHERE version >= 2",
    ] {
        conn.execute(sql).await.unwrap_or_else(|error| panic!("{error}: {sql}"));
    }
}

/// What an older binary can have written: nothing of unknown outcome.
fn as_older(mut step: Commit) -> Commit {
    let certain = |totals: &mut Totals| (totals.unknown_calls, totals.unknown_usd) = (0, Usd::ZERO);
    certain(&mut step.totals);
    for stage in &mut step.stages {
        certain(&mut stage.totals);
        stage.former_owners = 0;
        // To it every attempt of a round but the last one counts, and no outage is told apart.
        stage.judged = stage.attempt.saturating_sub(stage.round_start);
        (stage.outages, stage.outage_since) = (0, None);
    }
    for call in step.attempts.iter_mut().flat_map(|(_, attempt)| &mut attempt.calls) {
        call.unknown = false;
    }
    step
}

/// With runs in every state: nothing is lost, and everything goes on.
#[tokio::test]
async fn a_file_of_an_older_binary_is_migrated_with_what_it_holds() {
    let (_folder, path) = folder();
    let store = open_dyn(&path).await;
    let owner = live_replica(&store).await;
    let (done, lease) = submit_leased(&store, 1, owner).await;
    let work = Commit {
        stages: vec![full_stage("s1", "x")],
        attempts: vec![(stage("s1"), full_attempt(1, "x"))],
        checkpoints: vec![(stage("s1"), checkpoint("out".into()))],
        ..step(lease, 3)
    };
    commit(&store, &as_older(work)).await;
    commit(&store, &as_older(end(lease, 4, RunState::Succeeded))).await;
    let (held, lease) = submit_leased(&store, 2, owner).await;
    commit(&store, &as_older(park(lease, 3, None))).await;
    let (leased, _) = submit_leased(&store, 3, owner).await;
    let queued = new_run(4);
    submit(&store, &queued).await;
    let mut before = Vec::new();
    for run in [&done, &held, &leased, &queued] {
        before.push(dump(&store, &run.tenant, run.id).await);
    }
    store.close().await;
    make_old(&mut raw(&path).await).await;
    let store = open_dyn(&path).await;
    for (run, before) in [&done, &held, &leased, &queued].into_iter().zip(before) {
        assert_eq!(dump(&store, &run.tenant, run.id).await, before);
    }
    signal(&store, held.id, SignalKind::Cancel).await;
    let taken = claim_all(&store, owner).await;
    assert_eq!(taken.iter().map(|lease| lease.run).collect::<Vec<_>>(), [held.id, queued.id]);
    assert_eq!(store.owned(owner).await.expect("owned").len(), 3);
    let row = store.replicas(None).await.expect("replicas").remove(0);
    assert!(row.runs == 3 && row.oldest_lease_ms.is_some());
}

/// What a binary before the second migration writes has no lane and no limits: it waits as any other.
#[tokio::test]
async fn what_an_older_binary_accepts_is_claimed() {
    let (_folder, path) = folder();
    let store = open_dyn(&path).await;
    let owner = live_replica(&store).await;
    let insert = "INSERT INTO runs (id, tenant, pipeline, version, state, priority, labels, stages_total, created_at, \
        deadline_at, last_seq, ready_at) VALUES (unhex('0190aaaaaaaa7aaa8aaaaaaaaaaaaaaa'), 'acme', 'p', 1, 'queued', \
        0, '{}', 1, 1, 2, 1, 3)";
    raw(&path).await.execute(insert).await.expect("written");
    let taken = store.claim(owner, 1, &Shares::default()).await.expect("claim");
    assert_eq!(taken.iter().map(|lease| lease.epoch).collect::<Vec<_>>(), [Epoch(1)]);
}

/// An unknown migration is no obstacle where it says that this binary may go on; one that does not say so is.
#[tokio::test]
async fn a_newer_schema_that_only_added_is_accepted() {
    let (_folder, path) = folder();
    open(&path).await;
    let newer = "INSERT INTO _sqlx_migrations VALUES (9999, 'later', CURRENT_TIMESTAMP, TRUE, x'00', 0)";
    raw(&path).await.execute(newer).await.expect("written");
    for (oldest, fits) in [(5, true), (1, true), (6, false), (9999, false)] {
        let sql = format!("INSERT OR REPLACE INTO schema_compat VALUES (9999, {oldest})");
        raw(&path).await.execute(AssertSqlSafe(sql)).await.expect("written");
        let opened = SqliteStore::open(&path, Metrics::new()).await;
        match opened {
            Ok(store) => {
                assert!(fits, "{oldest}");
                store.check_schema().await.expect("it fits");
            }
            Err(error) => assert!(!fits && matches!(error, StoreError::SchemaAhead(_)), "{oldest}: {error}"),
        }
    }
}

/// Of every table that knows runs, but for the ledger.
#[tokio::test]
async fn a_deleted_run_leaves_only_its_ledger_rows() {
    let (_folder, path) = folder();
    let store = open_dyn(&path).await;
    let run = run_with_rows_everywhere(&store).await;
    let mut conn = raw(&path).await;
    let tables: Vec<String> = sqlx::query_scalar(
        "SELECT m.name FROM sqlite_schema m JOIN pragma_table_info(m.name) c WHERE m.type = 'table' AND c.name = 'run_id'",
    )
    .fetch_all(&mut conn)
    .await
    .expect("read");
    assert!(tables.len() >= 8, "{tables:?}");
    assert_eq!(store.delete(&[run]).await.expect("delete"), [run]);
    for table in tables {
        let sql = AssertSqlSafe(format!("SELECT count(*) FROM {table}"));
        let left: i64 = sqlx::query_scalar(sql).fetch_one(&mut conn).await.expect("read");
        assert_eq!(left, if table == "ledger" { 2 } else { 0 }, "{table}");
    }
    let broken = sqlx::query("PRAGMA foreign_key_check").fetch_all(&mut conn).await.expect("checked");
    assert!(broken.is_empty());
}
