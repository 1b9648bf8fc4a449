//! What the API reads costs the rows of the tenant that asks, whatever other tenants have: one has most of everything,
//! beside it are many that have little. Told by the pages that each statement touches, under plans that are kept and plans
//! that are made for their values, with statistics that are fresh, of another day, and of an empty database.

use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection, Row as _};
use stagegate_core::{RunState, store::RunQuery};
use stagegate_store_postgres::{PoolConfig, statements};
use stagegate_testkit::store::fixtures::{pipeline, tenant};

/// Of 500 small tenants, ten of everything each.
const SMALL: &str = "
INSERT INTO replicas (id, name, version, draining, seen_at, expires_at, capabilities)
SELECT md5('replica' || n)::uuid, 'r', '1', false, now(), now() + interval '1 day', '{compact_rows,open_vocabulary}' FROM generate_series(1, 5) n;
INSERT INTO pipelines (tenant, name, latest) SELECT 'small-' || n, 'p', 2 FROM generate_series(1, 500) n;
INSERT INTO pipeline_versions (tenant, name, version, digest, created_at, definition)
SELECT 'small-' || n, 'p', v, decode(md5(n || '/' || v), 'hex'), now(), '{}' FROM generate_series(1, 500) n,
       generate_series(1, 2) v;
INSERT INTO api_keys (id, tenant, role, name, hash, created_at)
SELECT md5('key' || n)::uuid, 'small-' || n, 'admin', 'k', decode(md5('key' || n), 'hex'), now()
FROM generate_series(1, 500) n";

/// What one tenant has, by name and number.
fn runs(of: &str, from: u32, to: u32) -> String {
    format!(
        "INSERT INTO runs (id, tenant, pipeline, version, stages_total, priority, labels, created_at, deadline_at, state,
                           owner, leased_at, epoch, available_at, last_seq)
         SELECT (lpad(to_hex(1890000000000 + n), 12, '0') || '70008000' || lpad(to_hex(n), 12, '0'))::uuid, {of},
                CASE WHEN n % 10 = 0 THEN 'rare' ELSE 'p' END, 1 + n % 2, 5, 0, '{{\"[\\\"team\\\",\\\"a\\\"]\"}}', now(),
                now(), (ARRAY['succeeded', 'succeeded', 'failed', 'running', 'queued'])[1 + n / 10 % 5],
                CASE WHEN n / 10 % 5 = 3 THEN md5('replica' || 1 + n % 5)::uuid END,
                CASE WHEN n / 10 % 5 = 3 THEN now() END, 1, CASE WHEN n / 10 % 5 = 4 THEN now() END, 5
         FROM generate_series({from}, {to}) n"
    )
}

/// The tenant that has most of everything.
const GIANT: &str = "
INSERT INTO pipelines (tenant, name, latest) SELECT 'giant', 'p' || n, 1 FROM generate_series(1, 3000) n;
INSERT INTO pipeline_versions (tenant, name, version, digest, created_at, definition)
SELECT 'giant', 'p' || n, 1, decode(md5('g' || n), 'hex'), now(), '{}' FROM generate_series(1, 3000) n;
INSERT INTO api_keys (id, tenant, role, name, hash, created_at)
SELECT md5('giant' || n)::uuid, 'giant', 'admin', 'k', decode(md5('giant' || n), 'hex'), now()
FROM generate_series(1, 10000) n";

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// The arguments of the statement of a list, in its order.
fn arguments(query: &RunQuery) -> String {
    let (tenant, limit) = (quoted(query.tenant.as_str()), query.limit.to_string());
    let few = !query.states.is_empty() && !query.states.contains(&RunState::Succeeded);
    let before = quoted(&query.before.map_or(uuid::Uuid::max(), |before| before.0).to_string());
    let mut all = match &query.pipeline {
        Some(name) if !few => vec![tenant.clone(), quoted(name.as_str()), tenant, quoted(name.as_str()), before],
        Some(name) => vec![tenant.clone(), quoted(name.as_str()), tenant, before],
        None => vec![tenant.clone(), tenant, before],
    };
    all.extend(query.version.map(|version| version.to_string()));
    let states = || query.states.iter().map(|state| quoted(state.as_str())).collect::<Vec<_>>().join(", ");
    all.extend((!query.states.is_empty()).then(|| format!("ARRAY[{}]", states())));
    if !query.labels.is_empty() {
        let labels = query.labels.iter().map(|label| quoted(&serde_json::to_string(&label).expect("JSON")));
        let labels: Vec<String> = labels.chain([quoted(query.tenant.as_str())]).collect();
        all.push(format!("ARRAY[{}]", labels.join(", ")));
    }
    all.extend(query.created_from.iter().chain(&query.created_before).map(|at| quoted(&at.to_rfc3339())));
    all.push(limit);
    all.join(", ")
}

/// Every list, with each of its filters.
fn lists(of: &str) -> Vec<Asked> {
    let all = || RunQuery {
        tenant: tenant(of),
        pipeline: None,
        version: None,
        states: Vec::new(),
        labels: [].into(),
        created_from: None,
        created_before: None,
        before: None,
        limit: 50,
    };
    let rare = || RunQuery { pipeline: Some(pipeline("rare")), ..all() };
    let now = stagegate_testkit::store::fixtures::at(0);
    let team = || [("team".to_owned(), "a".to_owned())].into();
    let cursor = "01b80e6a-4800-7000-8000-0000000000ff".parse().map(stagegate_core::RunId).expect("an id");
    let queries = [
        ("all", all()),
        ("after a cursor", RunQuery { before: Some(cursor), ..all() }),
        ("by pipeline", rare()),
        ("by pipeline, after a cursor", RunQuery { before: Some(cursor), ..rare() }),
        ("by a pipeline that is not there", RunQuery { pipeline: Some(pipeline("none")), ..all() }),
        ("by version", RunQuery { version: Some(1), ..all() }),
        ("by pipeline and version", RunQuery { version: Some(1), ..rare() }),
        ("active", RunQuery { states: vec![RunState::Running, RunState::Queued], ..all() }),
        ("failed", RunQuery { states: vec![RunState::Failed], ..all() }),
        ("succeeded", RunQuery { states: vec![RunState::Succeeded], ..all() }),
        ("active of a pipeline", RunQuery { states: vec![RunState::Queued], ..rare() }),
        ("by label", RunQuery { labels: team(), ..all() }),
        ("by label and state", RunQuery { labels: team(), states: vec![RunState::Failed], ..all() }),
        ("created since", RunQuery { created_from: Some(now), ..all() }),
        ("created before", RunQuery { created_before: Some(now), ..all() }),
    ];
    let list = |(name, query): (&str, RunQuery)| {
        let sql = statements::list(&query).expect("builds");
        (format!("runs {name}"), sql, arguments(&query))
    };
    queries.into_iter().map(list).collect()
}

/// What else is asked for one tenant.
fn others(of: &str) -> Vec<Asked> {
    let of = quoted(of);
    [
        ("backlog", statements::BACKLOG_OF, of.clone()),
        ("replicas", statements::REPLICAS_OF, of.clone()),
        ("keys", statements::KEYS_OF, of.clone()),
        ("pipelines", statements::PIPELINES, format!("{of}, '', 50")),
        ("versions", statements::VERSIONS, format!("{of}, 'p', 1000, 50")),
    ]
    .map(|(name, sql, arguments)| (name.to_owned(), sql.to_owned(), arguments))
    .into()
}

/// How many pages a statement touches.
async fn pages(connection: &mut PgConnection, sql: &str, arguments: &str) -> i64 {
    connection.execute(AssertSqlSafe(format!("PREPARE asked AS {sql}"))).await.expect("prepares");
    let explain = format!("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE asked ({arguments})");
    let row = sqlx::query(AssertSqlSafe(explain)).fetch_one(&mut *connection).await.expect("explains");
    connection.execute("DEALLOCATE asked").await.expect("forgets");
    let plan = &row.get::<Value, _>(0)[0]["Plan"];
    ["Shared Hit Blocks", "Shared Read Blocks"].iter().map(|name| plan[*name].as_i64().unwrap_or(0)).sum()
}

/// What is asked: its name, its statement, its arguments.
type Asked = (String, String, String);

/// The store's own plans are kept ones; that nobody pays for others must not hang on it.
const MODES: [&str; 2] = ["force_generic_plan", "force_custom_plan"];

/// Which statements of this tenant touch more pages than that.
async fn complaints(
    connection: &mut PgConnection,
    of: &str,
    most: i64,
    modes: &[&str],
    asked: &[Asked],
) -> Vec<String> {
    let mut dear = Vec::new();
    for mode in modes {
        connection.execute(AssertSqlSafe(format!("SET plan_cache_mode = {mode}"))).await.expect("sets");
        for (name, sql, arguments) in asked {
            let pages = pages(connection, sql, arguments).await;
            if pages > most {
                dear.push(format!("{of}, {name}, {mode}: {pages} pages"));
            }
        }
    }
    dear
}

#[tokio::test]
async fn reads_of_a_tenant_cost_its_own_rows_beside_large_tenants() {
    let (_store, database) = crate::fresh(&PoolConfig::default()).await;
    let mut connection = PgConnection::connect(database.url()).await.expect("connects");
    for (name, value) in statements::SESSION {
        connection.execute(AssertSqlSafe(format!("SET {name} = '{value}'"))).await.expect("as the store does");
    }
    // Statistics are taken when this test says so.
    for table in ["runs", "pipelines", "pipeline_versions", "api_keys"] {
        let never = format!("ALTER TABLE {table} SET (autovacuum_enabled = false)");
        connection.execute(AssertSqlSafe(never)).await.expect("sets");
    }
    connection.execute(SMALL).await.expect("generates");
    let few = runs("'small-' || 1 + n / 100 % 500", 100_000, 105_000);
    connection.execute(AssertSqlSafe(few)).await.expect("generates");
    let mut dear = Vec::new();
    for statistics in ["of none", "of the day before the giant came", "fresh"] {
        match statistics {
            "of none" => {
                connection.execute(GIANT).await.expect("generates");
                // Some are older and most are newer than those of the small tenants.
                for (from, to) in [(1, 20_000), (200_000, 300_000)] {
                    connection.execute(AssertSqlSafe(runs("'giant'", from, to))).await.expect("generates");
                }
            }
            "fresh" => drop(connection.execute("VACUUM ANALYZE").await.expect("analyses")),
            _ => {
                let taken = "DELETE FROM runs WHERE tenant = 'giant'; DELETE FROM api_keys WHERE tenant = 'giant'";
                connection.execute(taken).await.expect("deletes");
                connection.execute("VACUUM ANALYZE").await.expect("analyses");
                for (from, to) in [(1, 20_000), (200_000, 300_000)] {
                    connection.execute(AssertSqlSafe(runs("'giant'", from, to))).await.expect("generates");
                }
            }
        }
        for small in ["small-7", "small-301", "nobody"] {
            let asked: Vec<_> = lists(small).into_iter().chain(others(small)).collect();
            let found = complaints(&mut connection, small, 200, &MODES, &asked).await;
            dear.extend(found.into_iter().map(|line| format!("statistics {statistics}: {line}")));
        }
        // A page of the giant's own, where an index tells which rows are on it.
        let paged: Vec<_> = lists("giant")
            .into_iter()
            .filter(|(name, ..)| !name.contains("label") && !name.contains("before"))
            .collect();
        let found = complaints(&mut connection, "giant", 2_000, &MODES[..1], &paged).await;
        dear.extend(found.into_iter().map(|line| format!("statistics {statistics}: {line}")));
    }
    assert_eq!(dear, Vec::<String>::new());
}
