//! Rows that cannot be read: the error names table, column and row.

use std::{path::Path, sync::Arc};

use sqlx::{AssertSqlSafe, Executor as _};
use stagegate_core::{
    RunId, Store, StoreError, StoreResult,
    store::{ApiKey, Commit, NewApiKey, NewVersion, PipelineQuota, Role},
};
use stagegate_testkit::store::fixtures::{
    at, checkpoint, commit, full_attempt, full_stage, key_id, live_replica, new_run, of_tenant, pipeline, stage, step,
    submit, submit_leased, tenant,
};

use crate::support::{folder, open_dyn, raw};

async fn spoil(path: &Path, sql: &'static str) {
    raw(path).await.execute(AssertSqlSafe(sql)).await.expect("spoilt");
}

fn assert_names<T: std::fmt::Debug>(result: StoreResult<T>, place: (&str, &str), row: &str) {
    let error = result.expect_err("it cannot be read");
    let StoreError::Corrupt { table, column, id, .. } = &error else { panic!("{error:?}") };
    assert_eq!((*table, *column), place, "{error}");
    assert!(id.contains(row), "{error}");
    assert!(!error.is_retryable());
}

async fn run_with_everything(store: &Arc<dyn Store>) -> RunId {
    let owner = live_replica(store).await;
    let (run, lease) = submit_leased(store, 1, owner).await;
    let whole = Commit {
        stages: vec![full_stage("s1", "x")],
        attempts: vec![(stage("s1"), full_attempt(1, "x"))],
        checkpoints: vec![(stage("s1"), checkpoint("out".into()))],
        ..step(lease, 3)
    };
    commit(store, &whole).await;
    run.id
}

#[tokio::test]
async fn a_run_that_cannot_be_read_is_named() {
    for (sql, column) in [
        ("UPDATE runs SET state = 'no word'", "state"),
        ("UPDATE runs SET labels = '{'", "labels"),
        ("UPDATE runs SET pipeline = 'No Slug'", "pipeline"),
        ("UPDATE runs SET stages_done = -1", "stages_done"),
        ("UPDATE runs SET created_at = 9223372036854775807", "created_at"),
        ("UPDATE runs SET failure = '{\"code\": \"no code\", \"message\": \"\"}'", "failure"),
    ] {
        let (_folder, path) = folder();
        let store = open_dyn(&path).await;
        let run = run_with_everything(&store).await;
        spoil(&path, sql).await;
        assert_names(store.run_record(&tenant("acme"), run).await, ("runs", column), &run.to_string());
    }
}

#[tokio::test]
async fn what_belongs_to_a_run_and_cannot_be_read_is_named() {
    for (sql, place) in [
        ("UPDATE stages SET verdict = 'may be'", ("stages", "verdict")),
        ("UPDATE stages SET model = 'nobody'", ("stages", "model")),
        ("UPDATE attempts SET assessments = '[{}]'", ("attempts", "assessments")),
        ("UPDATE ledger SET purpose = 'no word'", ("ledger", "purpose")),
        ("UPDATE ledger SET error = 'no code'", ("ledger", "error")),
        ("UPDATE checkpoints SET output = 'no json'", ("checkpoints", "output")),
    ] {
        let (_folder, path) = folder();
        let store = open_dyn(&path).await;
        let run = run_with_everything(&store).await;
        spoil(&path, sql).await;
        let row = format!("{run}/s1");
        assert_names(store.stage(&tenant("acme"), run, &stage("s1")).await, place, &row);
    }
    let (_folder, path) = folder();
    let store = open_dyn(&path).await;
    let run = run_with_everything(&store).await;
    spoil(&path, "UPDATE events SET body = '{\"seq\": 1}'").await;
    let events = store.events(&tenant("acme"), run, 0, 10).await.expect("the others are read");
    assert!(events.iter().all(|event| event.kind.name() == "unreadable"), "{events:?}");
    spoil(&path, "UPDATE run_payloads SET body = ''").await;
    assert_names(store.run(&tenant("acme"), run).await, ("run_payloads", "body"), &run.to_string());
}

#[tokio::test]
async fn pipelines_and_keys_that_cannot_be_read_are_named() {
    let (_folder, path) = folder();
    let store = open_dyn(&path).await;
    let (of, name) = (tenant("acme"), pipeline("p"));
    let new = NewVersion {
        tenant: of.clone(),
        name: name.clone(),
        digest: [1; 32],
        definition: serde_json::json!({}),
        now: at(1),
        quota: PipelineQuota { pipelines: 1, versions: 1 },
    };
    store.register(&new).await.expect("register");
    spoil(&path, "UPDATE pipeline_versions SET definition = '{'").await;
    assert_names(store.pipeline(&of, &name, None).await, ("pipeline_versions", "definition"), "p@1");

    let id = key_id();
    let key = ApiKey {
        id,
        tenant: of,
        role: Role::Admin,
        name: "k".to_owned(),
        created_at: at(1),
        expires_at: None,
        revoked_at: None,
        failure: None,
    };
    store.create_key(&NewApiKey { key, hash: [2; 32] }).await.expect("create");
    spoil(&path, "UPDATE api_keys SET role = 'king'").await;
    assert_names(store.key_by_hash(&[2; 32]).await, ("api_keys", "role"), &id.to_string());
}

#[tokio::test]
async fn a_row_that_cannot_be_read_stands_in_its_place_and_the_others_are_listed() {
    let (_folder, path) = folder();
    let store = open_dyn(&path).await;
    let (of, name) = (tenant("acme"), pipeline("p"));
    for digest in [1, 2] {
        let new = NewVersion {
            tenant: of.clone(),
            name: name.clone(),
            digest: [digest; 32],
            definition: serde_json::json!({}),
            now: at(1),
            quota: PipelineQuota { pipelines: 9, versions: 9 },
        };
        store.register(&new).await.expect("register");
        let key = ApiKey {
            id: key_id(),
            tenant: of.clone(),
            role: Role::Admin,
            name: format!("k{digest}"),
            created_at: at(1),
            expires_at: None,
            revoked_at: None,
            failure: None,
        };
        store.create_key(&NewApiKey { key, hash: [digest; 32] }).await.expect("create");
    }
    let (bad, good) = (live_replica(&store).await, live_replica(&store).await);
    for ms in [1, 2] {
        submit(&store, &new_run(ms)).await;
    }
    submit(&store, &of_tenant("globex", 3)).await;
    spoil(&path, "UPDATE pipeline_versions SET definition = '{' WHERE version = 1").await;
    let versions = store.versions(&of, &name, None, 10).await.expect("lists");
    let told: Vec<_> = versions.iter().map(|each| (each.version, each.failure.is_some())).collect();
    assert_eq!(told, [(2, false), (1, true)]);
    spoil(&path, "UPDATE pipeline_versions SET definition = '{'").await;
    let newest = store.pipelines(&of, None, 10).await.expect("lists");
    assert!(
        newest[0].name == name && newest[0].failure.as_ref().is_some_and(|failure| failure.message.contains("p@2"))
    );
    spoil(&path, "UPDATE api_keys SET role = 'king' WHERE name = 'k1'").await;
    for asked in [Some(&of), None] {
        let keys = store.keys(asked).await.expect("lists");
        let unreadable: Vec<_> = keys.iter().filter(|key| key.failure.is_some()).collect();
        assert_eq!((keys.len(), unreadable.len()), (2, 1));
        assert_eq!((&unreadable[0].tenant, unreadable[0].role), (&of, Role::Viewer));
    }
    let sql = format!("UPDATE replicas SET entered_at = 9223372036854775807 WHERE id = x'{}'", bad.0.simple());
    raw(&path).await.execute(AssertSqlSafe(sql)).await.expect("spoilt");
    let replicas = store.replicas(None).await.expect("lists");
    let failed = |id| replicas.iter().find(|each| each.id == id).map(|each| each.failure.is_some());
    assert_eq!((failed(bad), failed(good)), (Some(true), Some(false)));
    spoil(&path, "UPDATE runs SET tenant = 'No Tenant' WHERE tenant = 'globex'").await;
    spoil(&path, "UPDATE runs SET pipeline = 'No Slug' WHERE created_at % 2 = 1").await;
    let backlog = store.backlog(Some(&of)).await.expect("counts");
    let counted: Vec<_> = backlog.iter().map(|line| (line.pipeline.as_str(), line.queued)).collect();
    assert_eq!(counted, [("unreadable", 1), ("brief-to-spec", 1)]);
    assert_eq!(store.depths().await.expect("counts"), [(of, 2)]);
}
