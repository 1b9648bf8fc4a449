//! The hot statements find their rows by index, however many there are, and the hot updates stay on their page.

use std::{collections::BTreeMap, sync::Arc};

use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection, Row as _};
use stagegate_core::{
    RunState, Store as _,
    store::{Committed, Lease, RunQuery},
};
use stagegate_store_postgres::{PoolConfig, statements};
use stagegate_testkit::{
    servers::{Postgres, TestDatabase},
    store::fixtures::{full_stage, leased_run, pipeline, replica, run_id, step, tenant},
};

/// Tables that grow with the number of runs.
const BIG: [&str; 7] = ["runs", "run_payloads", "stages", "attempts", "checkpoints", "events", "ledger"];

/// 200,000 runs: most are done, a few wait, run or failed.
const GENERATE: &str = "
INSERT INTO replicas (id, name, version, draining, seen_at, expires_at, capabilities)
SELECT md5('replica' || n)::uuid, 'r', '1', false, now(), now() + interval '1 day', '{compact_rows,open_vocabulary}' FROM generate_series(1, 5) n;
INSERT INTO runs (id, tenant, pipeline, version, stages_total, priority, labels, created_at, deadline_at, state, owner,
                  epoch, available_at, last_seq)
SELECT md5('run' || n)::uuid, 'tenant-' || n % 7, 'pipeline-' || n % 11, 1, 5, n % 3,
       CASE WHEN n % 1000 = 0 THEN ARRAY['[\"team\",\"a\"]'] ELSE '{}' END, now(), now(),
       CASE WHEN n % 100 < 94 THEN 'succeeded' WHEN n % 100 = 94 THEN 'failed' WHEN n % 100 = 95 THEN 'waiting'
            WHEN n % 100 < 98 THEN 'running' ELSE 'queued' END,
       CASE WHEN n % 100 IN (96, 97) THEN md5('replica' || n / 100 % 5 + 1)::uuid END,
       1, CASE WHEN n % 100 IN (98, 99) THEN now() END, 5
FROM generate_series(1, 200000) n;
INSERT INTO run_payloads (run_id, tenant, input) SELECT id, tenant, '{}' FROM runs;
INSERT INTO stages (run_id, tenant, stage_id, state, attempt, round_start, usage_estimated, calls, hits, unpriced_calls,
                    input_tokens, cache_read_tokens, cache_write_tokens, output_tokens, reasoning_tokens, cost_nanos,
                    saved_nanos)
SELECT id, tenant, 's1', 'succeeded', 1, 1, false, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 FROM runs;
INSERT INTO attempts (run_id, tenant, stage_id, number, started_at, finished_at, verdict, body)
SELECT id, tenant, 's1', 1, now(), now(), 'passed', '{}' FROM runs;
INSERT INTO checkpoints (run_id, tenant, stage_id, output, digest, attempt, verdict, origin, created_at)
SELECT id, tenant, 's1', '{}', '', 1, 'passed', 'provider', now() FROM runs;
INSERT INTO events (run_id, tenant, seq, at, body)
SELECT id, tenant, seq, now(), '{}' FROM runs, generate_series(1, 2) seq;
";

/// Every node of a plan, as (type, table, index).
fn nodes(plan: &Value, into: &mut Vec<(String, String, String)>) {
    match plan {
        Value::Array(items) => items.iter().for_each(|item| nodes(item, into)),
        Value::Object(fields) => {
            let text = |name: &str| fields.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
            if fields.contains_key("Node Type") {
                into.push((text("Node Type"), text("Relation Name"), text("Index Name")));
            }
            fields.values().for_each(|value| nodes(value, into));
        }
        _ => {}
    }
}

/// The plan that every execution of a prepared statement uses.
async fn generic_plan(connection: &mut PgConnection, sql: &str) -> Vec<(String, String, String)> {
    let parameters = (1..=100).take_while(|n| sql.contains(&format!("${n}"))).count();
    let nulls = if parameters == 0 { String::new() } else { format!("({})", vec!["NULL"; parameters].join(", ")) };
    connection.execute(AssertSqlSafe(format!("PREPARE hot AS {sql}"))).await.expect("prepares");
    let explain = format!("EXPLAIN (FORMAT JSON) EXECUTE hot {nulls}");
    let row = sqlx::query(AssertSqlSafe(explain)).fetch_one(&mut *connection).await.expect("explains");
    connection.execute("DEALLOCATE hot").await.expect("forgets");
    let mut found = Vec::new();
    nodes(&row.get::<Value, _>(0), &mut found);
    found
}

fn lists() -> Vec<(&'static str, RunQuery, &'static str)> {
    let all = || RunQuery {
        tenant: tenant("tenant-1"),
        pipeline: None,
        version: None,
        states: Vec::new(),
        labels: [].into(),
        created_from: None,
        created_before: None,
        before: None,
        limit: 50,
    };
    let by_pipeline = RunQuery { pipeline: Some(pipeline("pipeline-1")), before: Some(run_id(1)), ..all() };
    let active = RunQuery { states: vec![RunState::Running, RunState::Waiting], ..all() };
    let failed = RunQuery { states: vec![RunState::Failed], ..all() };
    let labelled = RunQuery { labels: [("team".to_owned(), "a".to_owned())].into(), ..all() };
    vec![
        ("list", all(), "runs_by_tenant"),
        ("list after a cursor", RunQuery { before: Some(run_id(1)), ..all() }, "runs_by_tenant"),
        ("list of a pipeline", by_pipeline, "runs_by_pipeline"),
        ("list of active runs", active, "runs_active"),
        ("list of failed runs", failed, "runs_unsuccessful"),
        ("list by label", labelled, "runs_by_label"),
    ]
}

/// Every hot statement, with an index that its plan must use.
fn hot() -> BTreeMap<&'static str, (String, &'static str)> {
    let mut hot: BTreeMap<&str, (String, &str)> = [
        ("submit", statements::SUBMIT, "replicas_pkey"),
        ("commit", statements::COMMIT, "runs_pkey"),
        ("plain commit", statements::COMMIT_PLAIN, "runs_pkey"),
        ("plain commit with outputs", statements::COMMIT_PLAIN_END, "run_payloads_pkey"),
        ("load", statements::LOAD, "runs_pkey"),
        ("weigh", statements::WEIGH, "runs_pkey"),
        ("put back", statements::PUT_BACK, "runs_pkey"),
        ("owned", statements::OWNED, "runs_leased"),
        ("heartbeat", statements::HEARTBEAT, "runs_signalled"),
        // By tenant and id: as good as by id alone, for both are unique.
        ("run", statements::RUN, "runs_by_tenant"),
        ("run record", statements::RUN_RECORD, "runs_by_tenant"),
        ("stage", statements::STAGE, "stages_pkey"),
        ("events", statements::EVENTS, "events_pkey"),
        ("queue", statements::QUEUE, "runs_active"),
        ("backlog", statements::BACKLOG_OF, "runs_active"),
        ("depths", statements::DEPTHS, "runs_waiting"),
        ("replicas", statements::REPLICAS_OF, "runs_leased"),
        ("news", statements::NEWS, "events_pkey"),
        ("kept", statements::KEPT, "runs_pkey"),
    ]
    .into_iter()
    .map(|(name, sql, index)| (name, (sql.to_owned(), index)))
    .collect();
    for (name, query, index) in lists() {
        hot.insert(name, (statements::list(&query).expect("builds"), index));
    }
    hot
}

/// What is wrong with the plans, as they are now.
async fn complaints(connection: &mut PgConnection, and_indexes: bool) -> Vec<String> {
    let mut wrong = Vec::new();
    for (name, (sql, index)) in hot() {
        let plan = generic_plan(connection, &sql).await;
        let scans = plan.iter().filter(|(node, table, _)| node == "Seq Scan" && BIG.contains(&table.as_str()));
        wrong.extend(scans.map(|(_, table, _)| format!("{name}: scans the whole of {table}")));
        if and_indexes && !plan.iter().any(|(_, _, used)| used == index) {
            wrong.push(format!("{name}: does not use {index}: {plan:?}"));
        }
    }
    wrong
}

#[tokio::test]
async fn hot_statements_find_their_rows_by_index() {
    let (_store, database) = crate::fresh(&PoolConfig::default()).await;
    let mut connection = PgConnection::connect(database.url()).await.expect("connects");
    for (name, value) in statements::SESSION {
        let set = format!("SET {name} = '{value}'");
        connection.execute(AssertSqlSafe(set)).await.expect("as the store does");
    }
    // A plan is kept. The one that is made on the first day must still do on the second.
    assert_eq!(complaints(&mut connection, false).await, Vec::<String>::new(), "on an empty database");
    connection.execute(GENERATE).await.expect("generates");
    assert_eq!(complaints(&mut connection, false).await, Vec::<String>::new(), "without statistics");
    connection.execute("VACUUM ANALYZE").await.expect("analyses");
    assert_eq!(complaints(&mut connection, true).await, Vec::<String>::new(), "with statistics");
}

#[tokio::test]
async fn a_commit_that_keeps_its_lease_stays_on_its_page() {
    // On a server of its own: a transaction in another database keeps old rows from making room.
    let server = Arc::new(Postgres::private().await.expect("binaries"));
    let database = TestDatabase::on(server.clone()).await.expect("creates");
    let store = crate::connect(database.url(), &PoolConfig::default()).await;
    store.migrate().await.expect("migrates");
    let owner = replica();
    let beat = stagegate_core::store::Heartbeat {
        replica: owner,
        name: "host".to_owned(),
        version: "1".to_owned(),
        draining: false,
        ttl: std::time::Duration::from_mins(1),
        capabilities: stagegate_core::Capabilities::own(),
        way_back: std::time::Duration::ZERO,
    };
    store.heartbeat(&beat).await.expect("alive");
    let runs: Vec<_> = (0..50).map(|n| leased_run(n, owner)).collect();
    store.submit(&runs).await.expect("submits");
    for last_seq in 3..8 {
        let steps: Vec<_> = runs
            .iter()
            .map(|run| {
                let lease = Lease { run: run.id, epoch: stagegate_core::Epoch(1) };
                let mut step = step(lease, last_seq);
                step.stages = vec![full_stage("s1", "x")];
                step
            })
            .collect();
        assert_eq!(store.commit(&steps).await.expect("commits"), vec![Committed::Now; 50]);
    }
    // A session reports its numbers when it ends.
    store.close().await;
    let mut connection = PgConnection::connect(database.url()).await.expect("connects");
    for (table, least, percent) in [("runs", 250, 90), ("stages", 200, 50)] {
        let sql = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = $1";
        let (updates, hot) = loop {
            let row = sqlx::query(sql).bind(table).fetch_one(&mut connection).await.expect("reads");
            let counts: (i64, i64) = (row.get(0), row.get(1));
            if counts.0 >= least {
                break counts;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        };
        assert!(hot * 100 >= updates * percent, "{table}: {hot} of {updates} updates were heap-only");
    }
}
