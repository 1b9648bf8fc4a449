//! The query plans of the hot statements: no scan of a table that grows with the runs.

use sqlx::{AssertSqlSafe, Row, SqliteConnection};
use stagegate_core::{RunId, RunState, TenantId, store::RunQuery};
use uuid::Uuid;

use crate::{SqliteStore, cache, commit, db::Lane, keys, lease, load, pipelines, read, signal, submit};

/// Tables that stay small whatever runs: a scan of them is no matter.
const SMALL: [&str; 6] = ["replicas", "json_each", "step", "clock", "lowest", "CONSTANT ROW"];

async fn plan(conn: &mut SqliteConnection, sql: &str) -> Vec<String> {
    let explain = AssertSqlSafe(format!("EXPLAIN QUERY PLAN {sql}"));
    let rows = sqlx::query(explain).fetch_all(conn).await.unwrap_or_else(|error| panic!("{error}: {sql}"));
    rows.iter().map(|row| row.get("detail")).collect()
}

/// A scan that reads a partial index holds only what the index is about; one of a whole table holds everything.
fn is_bad(step: &str) -> bool {
    let partial = ["runs_ready", "runs_wake", "runs_owned", "runs_signalled", "runs_live"];
    let oldest_first = "SCAN cache_entries";
    step.starts_with("SCAN")
        && !SMALL.iter().any(|table| step.contains(table))
        && !partial.iter().any(|index| step.contains(index))
        // The oldest entries are the first rows; the limit ends it.
        && step != oldest_first
        && !step.starts_with("SCAN (subquery")
        && !["ready", "due", "orphaned", "owned", "parked", "p"].contains(&step.trim_start_matches("SCAN "))
}

#[tokio::test]
async fn hot_statements_use_indexes() {
    let store = SqliteStore::in_memory().await.expect("a store");
    let everything = RunQuery {
        tenant: TenantId::default(),
        pipeline: None,
        version: None,
        states: Vec::new(),
        labels: [].into(),
        created_from: None,
        created_before: None,
        before: Some(RunId(Uuid::nil())),
        limit: 50,
    };
    let live = RunQuery { states: vec![RunState::Queued], ..everything.clone() };
    let statements = [
        pipelines::NEWEST,
        pipelines::VERSIONS,
        submit::LIVE,
        submit::THERE,
        submit::KEYS,
        submit::PURGE,
        read::RUN,
        read::PAYLOADS,
        read::EVENTS,
        read::list(&everything).sql().as_str(),
        read::list(&live).sql().as_str(),
        lease::SIGNALLED,
        lease::ANYTHING,
        lease::HAND_BACK_ALL,
        lease::WAKE_DUE,
        lease::NEXT,
        lease::TAKE,
        lease::OWNED,
        lease::RELEASE,
        lease::QUEUE,
        load::RUNS,
        load::INPUTS,
        load::STAGES,
        load::CHECKPOINTS,
        load::LAST_ATTEMPTS,
        load::CALLS,
        commit::HEADS,
        commit::ADVANCE.text(0),
        commit::MOVE.text(1),
        commit::END.text(2),
        commit::CONSUME,
        commit::WAKE_SIGNALLED,
        commit::DROP_SIGNALS,
        signal::HEAD,
        signal::DECISION,
        signal::WAKE,
        signal::REOPEN,
        signal::PENDING,
        signal::CLEAR,
        keys::BY_HASH,
        keys::OF_TENANT,
        cache::GET,
        cache::PURGE,
        cache::OLDEST,
        cache::EVICT,
    ]
    .map(str::to_owned);
    let mut tx = store.db.write(Lane::Runs).await.expect("a turn");
    let mut bad = Vec::new();
    for sql in &statements {
        let steps = plan(tx.conn(), sql).await;
        if steps.iter().any(|step| is_bad(step)) {
            bad.push(format!("{sql}\n    {}", steps.join("\n    ")));
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n\n"));
}
