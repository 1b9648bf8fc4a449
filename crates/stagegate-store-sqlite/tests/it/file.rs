//! Files: what is made, what is refused, and many that open at once.

use std::{path::Path, sync::Arc};

use sqlx::Executor as _;
use stagegate_core::{
    PipelineName, RunState, Store, StoreError,
    store::{Commit, NewRun, RunQuery},
};
use stagegate_store_sqlite::SqliteStore;
use stagegate_telemetry::Metrics;
use stagegate_testkit::store::fixtures::{
    at, commit, dump, end, full_attempt, live_replica, new_run, pipeline, stage, step, submit, submit_leased, tenant,
};

use crate::support::{folder, open, open_dyn, raw};

async fn refused(path: &Path) -> StoreError {
    SqliteStore::open(path, Metrics::new()).await.expect_err("it is refused")
}

#[cfg(unix)]
#[tokio::test]
async fn what_it_makes_is_for_its_owner_alone() {
    use std::os::unix::fs::PermissionsExt as _;
    let (_folder, path) = folder();
    let store = open_dyn(&path).await;
    submit(&store, &new_run(1)).await;
    let mode = |path: &Path| path.metadata().expect("it is there").permissions().mode() & 0o777;
    assert_eq!(mode(path.parent().expect("a folder")), 0o700);
    for file in ["stagegate.db", "stagegate.db-wal", "stagegate.db-shm"] {
        assert_eq!(mode(&path.with_file_name(file)), 0o600, "{file}");
    }
}

#[tokio::test]
async fn a_file_that_was_closed_opens_again() {
    let (_folder, path) = folder();
    let store = open_dyn(&path).await;
    let run = new_run(1);
    submit(&store, &run).await;
    let before = dump(&store, &run.tenant, run.id).await;
    store.close().await;
    assert!(!path.with_file_name("stagegate.db-wal").exists(), "the log is folded in");
    assert!(store.submit(&[new_run(2)]).await.is_err(), "a closed store takes nothing");
    assert_eq!(dump(&open_dyn(&path).await, &run.tenant, run.id).await, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_that_open_a_new_file_at_once_migrate_it_once() {
    for _ in 0..5 {
        let (_folder, path) = folder();
        let opening: Vec<_> = (0..8)
            .map(|n| {
                let path = path.clone();
                tokio::spawn(async move {
                    let store = open_dyn(&path).await;
                    submit(&store, &new_run(n)).await
                })
            })
            .collect();
        for task in opening {
            task.await.expect("it opened and works");
        }
        let versions: Vec<i64> = sqlx::query_scalar("SELECT version FROM _sqlx_migrations ORDER BY version")
            .fetch_all(&mut raw(&path).await)
            .await
            .expect("read");
        assert_eq!(versions, (1..=i64::try_from(versions.len()).expect("few")).collect::<Vec<_>>());
        let store = open(&path).await;
        store.check_schema().await.expect("the schema fits");
        assert_eq!(store.queue().await.expect("queue").queued, 8);
    }
}

#[tokio::test]
async fn a_file_that_is_no_database_is_refused_and_left_alone() {
    let (_folder, path) = folder();
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
    let text = "name: brief-to-spec\n".repeat(200);
    std::fs::write(&path, &text).expect("written");
    let error = refused(&path).await.to_string();
    assert!(error.contains("is not a SQLite database") && error.contains("stagegate.db"), "{error}");
    assert_eq!(std::fs::read_to_string(&path).expect("read"), text);
}

#[tokio::test]
async fn a_database_of_something_else_is_refused_and_left_alone() {
    let (folder, _) = folder();
    let path = folder.path().join("other.db");
    std::fs::write(&path, "").expect("an empty file is a new database");
    raw(&path).await.execute("CREATE TABLE runs (id INTEGER)").await.expect("made");
    let error = refused(&path).await;
    assert!(matches!(&error, StoreError::SchemaAhead(why) if why.contains("something else")), "{error}");
    let tables: i64 =
        sqlx::query_scalar("SELECT count(*) FROM sqlite_schema").fetch_one(&mut raw(&path).await).await.expect("read");
    assert_eq!(tables, 1);
}

#[tokio::test]
async fn a_path_that_cannot_be_a_file_is_refused_by_name() {
    let (folder, _) = folder();
    let file = folder.path().join("file");
    std::fs::write(&file, "x").expect("written");
    for path in [folder.path().to_owned(), file.join("stagegate.db"), Path::new("/proc/stagegate/x.db").to_owned()] {
        let error = refused(&path).await;
        assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
        let text = error.to_string();
        assert!(text.contains(&*path.to_string_lossy()) && text.contains("can write"), "{text}");
    }
}

#[tokio::test]
async fn a_newer_schema_is_refused() {
    let (_folder, path) = folder();
    let store = open(&path).await;
    let newer = "INSERT INTO _sqlx_migrations VALUES (9999, 'later', CURRENT_TIMESTAMP, TRUE, x'00', 0)";
    raw(&path).await.execute(newer).await.expect("written");
    let error = refused(&path).await;
    assert!(matches!(&error, StoreError::SchemaAhead(why) if why.contains("9999")), "{error}");
    assert!(matches!(store.check_schema().await, Err(StoreError::SchemaAhead(_))));
}

#[tokio::test]
async fn a_migration_that_was_changed_is_refused() {
    let (_folder, path) = folder();
    open(&path).await;
    raw(&path).await.execute("UPDATE _sqlx_migrations SET checksum = x'00' WHERE version = 1").await.expect("written");
    let error = refused(&path).await;
    assert!(matches!(&error, StoreError::SchemaAhead(why) if why.contains("changed")), "{error}");
}

#[tokio::test]
async fn a_file_that_another_process_locks_is_unavailable_for_now() {
    let (_folder, path) = folder();
    let store = open_dyn(&path).await;
    let mut other = raw(&path).await;
    other.execute("BEGIN EXCLUSIVE").await.expect("locked");
    let error = store.submit(&[new_run(1)]).await.expect_err("it is locked");
    assert!(matches!(error, StoreError::Unavailable(_)) && error.is_retryable(), "{error}");
    other.execute("ROLLBACK").await.expect("unlocked");
    submit(&store, &new_run(2)).await;
}

/// Dropped in the middle, a write leaves nothing, and the next one finds the way free.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_that_gives_up_leaves_nothing_half_done() {
    let (_folder, path) = folder();
    let memory: Arc<dyn Store> = Arc::new(SqliteStore::in_memory().await.expect("a store"));
    for store in [open_dyn(&path).await, memory] {
        for n in 0..40_u64 {
            // A pipeline of its own, so that one statement, which sees one moment, finds the round's runs.
            let of = pipeline(&format!("round-{n}"));
            let runs: Vec<_> = (0..20).map(|ms| NewRun { pipeline: of.clone(), ..new_run(ms) }).collect();
            let write = store.submit(&runs);
            let gave_up = tokio::time::timeout(std::time::Duration::from_micros(n * 50), write).await.is_err();
            let found = store.runs(&all_of(of)).await.expect("read").len();
            assert!(found == 20 || (found == 0 && gave_up), "{found} of 20");
        }
        submit(&store, &new_run(1)).await;
    }
}

fn all_of(name: PipelineName) -> RunQuery {
    RunQuery {
        tenant: tenant("acme"),
        pipeline: Some(name),
        version: None,
        states: Vec::new(),
        labels: [].into(),
        created_from: None,
        created_before: None,
        before: None,
        limit: 200,
    }
}

#[tokio::test]
async fn what_quotes_payloads_goes_though_the_release_before_has_purged_the_run() {
    let (_folder, path) = folder();
    let store = open_dyn(&path).await;
    let owner = live_replica(&store).await;
    let (run, lease) = submit_leased(&store, 1, owner).await;
    let attempts = vec![(stage("s1"), full_attempt(1, "x"))];
    commit(&store, &Commit { attempts, ..step(lease, 3) }).await;
    commit(&store, &end(lease, 4, RunState::Failed)).await;
    // It knew of no quotes.
    raw(&path).await.execute("UPDATE runs SET purged_at = 1").await.expect("purged");
    assert_eq!(store.purge(&[run.id], at(700)).await.expect("purges"), 0, "it is purged");
    let detail = store.stage(&run.tenant, run.id, &stage("s1")).await.expect("reads").expect("there");
    let attempt = &detail.attempts[0];
    assert_eq!(attempt.failure.as_ref().and_then(|failure| failure.detail.as_ref()), None);
    assert!(attempt.assessments.iter().all(|each| each.detail.is_none()));
}
