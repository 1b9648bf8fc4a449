//! Rows that cannot be read stand in their places; columns and tables of newer releases are passed over.

use std::sync::Arc;

use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection};
use stagegate_core::{
    RunState, StageState, Store,
    fair::Shares,
    store::{ApiKey, Commit, Committed, NewApiKey, NewVersion, PipelineQuota, Role, SignalKind, StageRecord},
};
use stagegate_store_postgres::PoolConfig;
use stagegate_testkit::store::fixtures::{
    at, checkpoint, commit, end, full_attempt, full_stage, key_id, live_replica, new_run, of_tenant, pipeline, signal,
    signals_of, stage, step, submit, tenant,
};

async fn run(connection: &mut PgConnection, sql: &str) {
    connection.execute(AssertSqlSafe(sql.to_owned())).await.expect("works");
}

async fn with_versions_and_keys(store: &Arc<dyn Store>) {
    for digest in [1, 2] {
        let new = NewVersion {
            tenant: tenant("acme"),
            name: pipeline("p"),
            digest: [digest; 32],
            definition: serde_json::json!({}),
            now: at(1),
            quota: PipelineQuota { pipelines: 9, versions: 9 },
        };
        store.register(&new).await.expect("register");
        let key = ApiKey {
            id: key_id(),
            tenant: tenant("acme"),
            role: Role::Admin,
            name: format!("k{digest}"),
            created_at: at(1),
            expires_at: None,
            revoked_at: None,
            failure: None,
        };
        store.create_key(&NewApiKey { key, hash: [digest; 32] }).await.expect("create");
    }
}

#[tokio::test]
async fn a_row_that_cannot_be_read_stands_in_its_place_and_the_others_are_listed() {
    let (store, database) = crate::fresh(&PoolConfig::default()).await;
    let store: Arc<dyn Store> = Arc::new(store);
    let mut sql = PgConnection::connect(database.url()).await.expect("connects");
    let of = tenant("acme");
    with_versions_and_keys(&store).await;
    let (bad, good) = (live_replica(&store).await, live_replica(&store).await);
    for ms in [1, 2] {
        submit(&store, &new_run(ms)).await;
    }
    submit(&store, &of_tenant("globex", 3)).await;
    run(&mut sql, "UPDATE pipeline_versions SET definition = '{' WHERE version = 1").await;
    let versions = store.versions(&of, &pipeline("p"), None, 10).await.expect("lists");
    let told: Vec<_> = versions.iter().map(|each| (each.version, each.failure.is_some())).collect();
    assert_eq!(told, [(2, false), (1, true)]);
    run(&mut sql, "UPDATE pipeline_versions SET definition = '{'").await;
    let newest = store.pipelines(&of, None, 10).await.expect("lists");
    assert!(newest[0].failure.as_ref().is_some_and(|failure| failure.message.contains("pipeline_versions.definition")));
    run(&mut sql, "UPDATE api_keys SET created_at = 'infinity' WHERE name = 'k1'").await;
    for asked in [Some(&of), None] {
        let keys = store.keys(asked).await.expect("lists");
        let unreadable: Vec<_> = keys.iter().filter(|key| key.failure.is_some()).collect();
        assert_eq!((keys.len(), unreadable.len()), (2, 1));
        assert_eq!((&unreadable[0].tenant, unreadable[0].role), (&of, Role::Viewer));
    }
    run(&mut sql, &format!("UPDATE replicas SET started_at = 'infinity' WHERE id = '{}'", bad.0)).await;
    let replicas = store.replicas(None).await.expect("lists");
    let failed = |id| replicas.iter().find(|each| each.id == id).map(|each| each.failure.is_some());
    assert_eq!((failed(bad), failed(good)), (Some(true), Some(false)));
    run(&mut sql, "UPDATE runs SET tenant = 'No Tenant' WHERE tenant = 'globex'").await;
    run(&mut sql, "UPDATE runs SET pipeline = 'No Slug' WHERE id = (SELECT min(id::text)::uuid FROM runs)").await;
    let backlog = store.backlog(Some(&of)).await.expect("counts");
    let counted: Vec<_> = backlog.iter().map(|line| (line.pipeline.as_str(), line.queued)).collect();
    assert_eq!(counted, [("unreadable", 1), ("brief-to-spec", 1)]);
    assert_eq!(store.depths().await.expect("counts"), [(of, 2)]);
}

#[tokio::test]
async fn unknown_columns_and_tables_are_passed_over_by_statements_that_were_prepared_before() {
    const TABLES: &str = "replicas runs stages checkpoints run_payloads ledger attempts events signals pipelines \
                          pipeline_versions api_keys idempotency_keys";
    let (store, database) = crate::fresh(&PoolConfig::default()).await;
    let store: Arc<dyn Store> = Arc::new(store);
    let mut sql = PgConnection::connect(database.url()).await.expect("connects");
    for ms in [1, 100] {
        life_of_a_run(&store, ms).await;
        for table in TABLES.split(' ') {
            let add = format!("ALTER TABLE {table} ADD COLUMN of_next_{ms} jsonb DEFAULT '{{\"x\": [1, null]}}'");
            run(&mut sql, &add).await;
        }
        run(&mut sql, &format!("CREATE TABLE next_{ms} (id integer PRIMARY KEY)")).await;
    }
    life_of_a_run(&store, 200).await;
}

/// Everything that a run goes through, over and over the same statements.
async fn life_of_a_run(store: &Arc<dyn Store>, ms: i64) {
    let owner = live_replica(store).await;
    submit(store, &new_run(ms)).await;
    let leases = store.claim(owner, 10, &Shares::default()).await.expect("claims");
    let lease = *leases.first().expect("one");
    store.weigh(&leases).await.expect("weighs");
    let loaded = store.load(&leases).await.expect("loads").remove(0);
    let held = StageRecord { state: StageState::Held, ..full_stage("s1", "x") };
    let first = Commit {
        stages: vec![held],
        attempts: vec![(stage("s1"), full_attempt(1, "x"))],
        ..step(lease, loaded.run.last_seq)
    };
    assert_eq!(commit(store, &first).await, Committed::Now);
    signal(store, lease.run, SignalKind::approve(stage("s1"), None)).await;
    assert_eq!(signals_of(store, lease).await.len(), 1);
    let found = store.load(&leases).await.expect("loads").remove(0);
    assert_eq!(found.last_attempts, [(stage("s1"), full_attempt(1, "x"))]);
    let last = Commit {
        checkpoints: vec![(stage("s2"), checkpoint("out".into()))],
        stages: vec![full_stage("s2", "y")],
        ..end(lease, found.run.last_seq, RunState::Failed)
    };
    assert_eq!(commit(store, &last).await, Committed::Now);
    let of = tenant("acme");
    let shown = store.run(&of, lease.run).await.expect("reads").expect("there");
    assert_eq!((shown.run.state, shown.stages.len()), (RunState::Failed, 2));
    assert_eq!(store.events(&of, lease.run, 0, 10).await.expect("reads").len(), 3);
    assert_eq!(store.news(&[(lease.run, 0)], 10).await.expect("reads")[0].1.len(), 3);
    assert!(store.stage(&of, lease.run, &stage("s1")).await.expect("reads").is_some());
    assert!(!store.replicas(None).await.expect("lists").is_empty());
    store.backlog(None).await.expect("counts");
    assert_eq!(store.purge(&[lease.run], at(900)).await.expect("purges"), 1);
    assert_eq!(store.delete(&[lease.run]).await.expect("deletes"), [lease.run]);
    store.leave(owner).await.expect("leaves");
}
