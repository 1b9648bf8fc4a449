//! The query plans of the hot statements: no scan of a table that grows with the runs.

use sqlx::{AssertSqlSafe, Row, SqliteConnection};
use stagegate_core::{RunId, RunState, TenantId, store::RunQuery};
use uuid::Uuid;

use crate::{
    SqliteStore, cache, claim, commit, db::Lane, gauges, keys, lease, load, pipelines, read, retention, signal, submit,
};

/// What stays small whatever runs, so that a scan of it is no matter: lists, rows of parameters, sums, replicas.
const SMALL: [&str; 19] = [
    "json_each",
    "CONSTANT",
    "step",
    "clock",
    "lowest",
    "replicas",
    "owners",
    "ready",
    "due",
    "orphaned",
    "owned",
    "parked",
    "held",
    "lanes",
    "first_lane",
    "leased",
    "parts",
    "asked",
    "new",
];
/// Indexes that hold only what they are about: few runs, however many there are.
const PARTIAL: [&str; 9] = [
    "runs_lanes",
    "runs_cancelled",
    "runs_due",
    "runs_parked",
    "runs_leased",
    "runs_held",
    "runs_signalled",
    "runs_live",
    "runs_lost",
];

/// What leases, claims, counts and removes.
const LEASES: [&str; 36] = [
    lease::SIGNALLED,
    lease::HAND_BACK_ALL,
    lease::OWNED,
    lease::RELEASE,
    lease::TAKE_FROM_DEAD,
    lease::PUT_BACK,
    claim::ANYTHING,
    claim::WAKE_DUE,
    claim::CANCELLED,
    claim::COUNT_LANES,
    claim::CANDIDATES,
    claim::DEEPER,
    claim::BY_TENANT,
    claim::BY_PIPELINE,
    claim::BY_KEY,
    claim::TAKE,
    gauges::QUEUE,
    gauges::BACKLOG,
    gauges::BACKLOG_OF,
    gauges::DEPTHS,
    gauges::REPLICAS,
    gauges::REPLICAS_OF,
    retention::KEPT,
    retention::ENDED,
    retention::UNPURGED,
    retention::PURGE_CHECKPOINTS,
    retention::PURGE_ATTEMPTS,
    retention::PURGE_RUNS,
    retention::DELETE[0],
    retention::DELETE[1],
    retention::DELETE[2],
    retention::DELETE[3],
    retention::DELETE[4],
    retention::DELETE[5],
    retention::DELETE[6],
    retention::DELETE[7],
];

async fn plan(conn: &mut SqliteConnection, sql: &str) -> Vec<String> {
    let explain = AssertSqlSafe(format!("EXPLAIN QUERY PLAN {sql}"));
    let rows = sqlx::query(explain).fetch_all(conn).await.unwrap_or_else(|error| panic!("{error}: {sql}"));
    rows.iter().map(|row| row.get("detail")).collect()
}

/// Whether a step of a plan walks a table that grows.
fn is_bad(sql: &str, step: &str) -> bool {
    let mut words = step.split_whitespace();
    if words.next() != Some("SCAN") {
        return false;
    }
    let small = words.clone().any(|word| SMALL.contains(&word));
    let partial = words.any(|word| PARTIAL.contains(&word));
    // The oldest entries are the first rows, and the limit ends the walk.
    let limited = sql == cache::OLDEST;
    !small && !partial && !limited
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
    let live = RunQuery { states: vec![RunState::Queued, RunState::Running], ..everything.clone() };
    let lost = RunQuery { states: vec![RunState::Failed], ..everything.clone() };
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
        read::NEWS,
        read::list(&everything).sql().as_str(),
        read::list(&live).sql().as_str(),
        read::list(&lost).sql().as_str(),
        load::RUNS,
        load::WEIGH,
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
        signal::OWNED,
        signal::PENDING,
        signal::CLEAR,
        keys::BY_HASH,
        keys::OF_TENANT,
        cache::GET,
        cache::REPLACE.text(0),
        cache::PURGE,
        cache::OLDEST,
        cache::EVICT,
    ]
    .map(str::to_owned);
    let mut tx = store.db.write(Lane::Runs).await.expect("a turn");
    let mut bad = Vec::new();
    for sql in statements.iter().map(String::as_str).chain(LEASES) {
        let steps = plan(tx.conn(), sql).await;
        if steps.iter().any(|step| is_bad(sql, step)) {
            bad.push(format!("{sql}\n    {}", steps.join("\n    ")));
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n\n"));
    // A claim's lanes and their first runs are looked up, and what is leased is counted in the index's own order.
    let steps = plan(tx.conn(), claim::CANDIDATES).await;
    let looks = steps.iter().filter(|step| step.contains("SEARCH") && step.contains("runs_lanes")).count();
    assert_eq!(looks, 3, "{steps:?}");
    assert!(steps.iter().any(|step| step.contains("(tenant=? AND lane>?)")), "past a lane in one look: {steps:?}");
    for sql in [claim::COUNT_LANES, claim::CANDIDATES, claim::BY_TENANT, claim::BY_PIPELINE, claim::BY_KEY] {
        let steps = plan(tx.conn(), sql).await;
        assert!(!steps.iter().any(|step| step.contains("TEMP B-TREE")), "{steps:?}");
    }
    for (query, index) in [(&everything, "runs_by_tenant"), (&live, "runs_live"), (&lost, "runs_lost")] {
        let steps = plan(tx.conn(), read::list(query).sql().as_str()).await;
        assert!(steps.iter().any(|step| step.contains(index)), "{index}: {steps:?}");
    }
}

/// Of one tenant most, of others little, in a database whose statistics were taken or not.
const SKEWED: &str = "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 3000) \
    INSERT INTO runs (id, tenant, pipeline, version, state, priority, labels, stages_total, created_at, deadline_at, \
    last_seq) SELECT randomblob(16), CASE WHEN n % 100 = 0 THEN 'small-' || n ELSE 'giant' END, 'p', 1, \
    CASE n % 3 WHEN 0 THEN 'queued' WHEN 1 THEN 'failed' ELSE 'succeeded' END, 0, '{}', 5, n, n, 1 FROM n";

#[tokio::test]
async fn reads_of_a_tenant_look_rows_up_by_tenant_with_any_statistics() {
    let store = SqliteStore::in_memory().await.expect("a store");
    let all = RunQuery {
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
    let of_pipeline = RunQuery { pipeline: Some("p".parse().expect("a name")), ..all.clone() };
    let created = Some(chrono::DateTime::UNIX_EPOCH);
    let lists = [
        all.clone(),
        RunQuery { before: None, ..all.clone() },
        of_pipeline.clone(),
        RunQuery { states: vec![RunState::Running], ..of_pipeline.clone() },
        RunQuery { states: vec![RunState::Failed], ..of_pipeline },
        RunQuery { states: vec![RunState::Queued, RunState::Running], ..all.clone() },
        RunQuery { states: vec![RunState::Failed], ..all.clone() },
        RunQuery { states: vec![RunState::Succeeded], ..all.clone() },
        RunQuery { version: Some(1), ..all.clone() },
        RunQuery { labels: [("team".to_owned(), "a".to_owned())].into(), ..all.clone() },
        RunQuery { created_from: created, created_before: created, ..all },
    ];
    let mut asked: Vec<String> = lists.iter().map(|query| read::list(query).sql().as_str().to_owned()).collect();
    let others =
        [gauges::BACKLOG_OF, gauges::REPLICAS_OF, keys::OF_TENANT, pipelines::NEWEST, pipelines::VERSIONS, read::RUN];
    asked.extend(others.map(str::to_owned));
    for statistics in ["none", "of an empty table", "fresh"] {
        let mut tx = store.db.write(Lane::Runs).await.expect("a turn");
        match statistics {
            "of an empty table" => {
                sqlx::query("ANALYZE").execute(tx.conn()).await.expect("analyses");
            }
            "fresh" => {
                sqlx::query(SKEWED).execute(tx.conn()).await.expect("generates");
                sqlx::query("ANALYZE").execute(tx.conn()).await.expect("analyses");
            }
            _ => {}
        }
        for sql in &asked {
            let steps = plan(tx.conn(), sql).await;
            let walks = |step: &&String| step.split_whitespace().next() == Some("SCAN") || step.contains(" USING ");
            let small = |step: &str| step.split_whitespace().any(|word| SMALL.contains(&word));
            let own = |step: &str| ["tenant=?", "(id=?)", "VIRTUAL TABLE"].iter().any(|part| step.contains(part));
            let bad: Vec<&String> = steps.iter().filter(walks).filter(|step| !small(step) && !own(step)).collect();
            assert!(bad.is_empty(), "statistics {statistics}: {sql}\n{bad:?}");
        }
        tx.commit().await.expect("commits");
    }
}
