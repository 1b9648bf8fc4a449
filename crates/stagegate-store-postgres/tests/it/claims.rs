//! Claims where much waits, where many lanes are used up, and where a replica left much behind; and rows that a replica of
//! schema 1 wrote.

use std::sync::Arc;

use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection, Row as _};
use stagegate_core::{
    StageState, Store,
    fair::{Limits, Shares},
    store::{Commit, Committed, NewRun, StageRecord},
};
use stagegate_store_postgres::{PoolConfig, statements};
use stagegate_testkit::store::fixtures::{
    at, beat, checkpoint, claim_all, commit, dump, live_replica, new_run, pipeline, replica, stage, step,
    submit_leased, tenant,
};

/// Runs that wait: half of them for their time, at a higher priority; in front of them as many that have ended.
const CROWD: &str = "
INSERT INTO runs (id, tenant, pipeline, version, stages_total, priority, labels, created_at, deadline_at, state, epoch,
                  available_at, ready, last_seq)
SELECT md5('crowd' || n)::uuid, 'acme', 'p', 1, 5, CASE WHEN n % 4 = 0 THEN 9 ELSE 0 END, '{}', now(), now(),
       CASE WHEN n % 2 = 0 THEN 'queued' ELSE 'succeeded' END, 1,
       CASE n % 4 WHEN 0 THEN now() + interval '1 day' WHEN 2 THEN now() - interval '1 hour' END,
       CASE n % 4 WHEN 2 THEN true END, 5
FROM generate_series(1, 120000) n";

async fn connection_as_the_stores(url: &str) -> PgConnection {
    let mut connection = PgConnection::connect(url).await.expect("connects");
    for (name, value) in statements::SESSION {
        connection.execute(AssertSqlSafe(format!("SET {name} = '{value}'"))).await.expect("as the store does");
    }
    connection
}

/// How many pages a claim of ten looks at. It is rolled back, so that each finds the same.
async fn pages(connection: &mut PgConnection, me: uuid::Uuid) -> i64 {
    let arguments = format!("'{me}', 10, '{{}}', '{{}}', '{{}}', 1, NULL, '', '', false, '{{}}', '{{}}', '', 512, 500");
    let names = (1..=15).map(|n| format!("${n}")).collect::<Vec<_>>().join(", ");
    let sql = statements::CLAIM.replace(&names, &arguments);
    assert!(!sql.contains('$'), "every argument is given: {sql}");
    connection.execute("BEGIN").await.expect("begins");
    let explain = format!("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}");
    let row = sqlx::query(AssertSqlSafe(explain)).fetch_one(&mut *connection).await.expect("explains");
    let taken = "SELECT count(*) FROM runs WHERE owner = $1";
    let taken: i64 = sqlx::query(taken).bind(me).fetch_one(&mut *connection).await.expect("counts").get(0);
    assert_eq!(taken, 10);
    connection.execute("ROLLBACK").await.expect("rolls back");
    let plan = &row.get::<Value, _>(0)[0]["Plan"];
    let count = |name: &str| plan[name].as_i64().unwrap_or_default();
    count("Shared Hit Blocks") + count("Shared Read Blocks")
}

#[tokio::test]
async fn a_claim_looks_at_no_more_however_many_wait() {
    let (store, database) = crate::fresh(&PoolConfig::default()).await;
    let store: Arc<dyn Store> = Arc::new(store);
    let me = live_replica(&store).await;
    let few: Vec<NewRun> = (0..20).map(new_run).collect();
    store.submit(&few).await.expect("submits");
    // The functions keep their plans: those of the first day must still do on the second.
    let mut connection = connection_as_the_stores(database.url()).await;
    for _ in 0..3 {
        pages(&mut connection, me.0).await;
    }
    let alone = pages(&mut connection, me.0).await;
    connection.execute(CROWD).await.expect("generates");
    pages(&mut connection, me.0).await;
    let crowded = pages(&mut connection, me.0).await;
    connection.execute("VACUUM ANALYZE").await.expect("analyses");
    pages(&mut connection, me.0).await;
    let with_statistics = pages(&mut connection, me.0).await;
    let most = alone * 2 + 100;
    assert!(crowded <= most && with_statistics <= most, "{alone}, {crowded} and {with_statistics} pages");
}

/// Runs that wait for tomorrow, in 500 lanes and 200 priorities: half of them above what is due.
const DELAYED: &str = "
INSERT INTO runs (id, tenant, pipeline, version, stages_total, priority, labels, created_at, deadline_at, state, epoch,
                  available_at, start_at, key, key_max, lane, last_seq)
SELECT md5('delayed' || n)::uuid, 'acme', 'p', 1, 5, n / 500 % 200 - 100, '{}', now(), now(), 'queued', 0,
       now() + interval '1 day', now() + interval '1 day', 'k' || n % 500, 5, 'p/-/5/k' || n % 500, 1
FROM generate_series(1, 100000) n";

/// Runs that are due: of 300 tenants 300 each.
const DEEP: &str = "
INSERT INTO runs (id, tenant, pipeline, version, stages_total, priority, labels, created_at, deadline_at, state, epoch,
                  available_at, ready, last_seq)
SELECT md5('deep' || n)::uuid, 't' || n % 300, 'p', 1, 5, n % 3, '{}', now(), now(), 'queued', 0,
       now() - interval '1 hour', true, 1
FROM generate_series(1, 90000) n";

#[tokio::test]
async fn a_claim_reads_nothing_of_what_waits_for_its_time_in_however_many_lanes_and_priorities() {
    let (store, database) = crate::fresh(&PoolConfig::default()).await;
    let store: Arc<dyn Store> = Arc::new(store);
    let me = live_replica(&store).await;
    let few: Vec<NewRun> = (0..20).map(new_run).collect();
    store.submit(&few).await.expect("submits");
    let mut connection = connection_as_the_stores(database.url()).await;
    for _ in 0..3 {
        pages(&mut connection, me.0).await;
    }
    let alone = pages(&mut connection, me.0).await;
    connection.execute(DELAYED).await.expect("generates");
    pages(&mut connection, me.0).await;
    let crowded = pages(&mut connection, me.0).await;
    connection.execute("VACUUM ANALYZE").await.expect("analyses");
    pages(&mut connection, me.0).await;
    let with_statistics = pages(&mut connection, me.0).await;
    let most = alone * 2 + 100;
    assert!(crowded <= most && with_statistics <= most, "{alone}, {crowded} and {with_statistics} pages");
}

#[tokio::test]
async fn a_claim_reads_a_few_runs_of_each_tenant_however_deep_their_queues_are() {
    let (store, database) = crate::fresh(&PoolConfig::default()).await;
    let store: Arc<dyn Store> = Arc::new(store);
    let me = live_replica(&store).await;
    let mut connection = connection_as_the_stores(database.url()).await;
    connection.execute(DEEP).await.expect("generates");
    pages(&mut connection, me.0).await;
    let without = pages(&mut connection, me.0).await;
    connection.execute("VACUUM ANALYZE").await.expect("analyses");
    pages(&mut connection, me.0).await;
    let with_statistics = pages(&mut connection, me.0).await;
    // About ten a tenant, to find its lane and read its head, and what is taken.
    let most = 300 * 20;
    assert!(without <= most && with_statistics <= most, "{without} and {with_statistics} pages");
}

#[tokio::test]
async fn a_flood_that_becomes_due_at_once_does_not_stand_before_another_tenants_first_run() {
    let (store, database) = crate::fresh(&PoolConfig::default()).await;
    let store: Arc<dyn Store> = Arc::new(store);
    let me = live_replica(&store).await;
    let mut connection = PgConnection::connect(database.url()).await.expect("connects");
    connection.execute(DELAYED).await.expect("generates");
    let due = "UPDATE runs SET available_at = now() - interval '1 minute'";
    connection.execute(due).await.expect("moves");
    // Of another tenant, due after all of those; as a replica of schema 2 leaves it.
    let first = NewRun { tenant: tenant("small"), ..new_run(1) };
    store.submit(std::slice::from_ref(&first)).await.expect("submits");
    let unready = "UPDATE runs SET ready = NULL WHERE tenant = 'small'";
    connection.execute(unready).await.expect("moves");
    let taken = store.claim(me, 10, &Shares::default()).await.expect("claims");
    assert!(taken.iter().any(|lease| lease.run == first.id), "{taken:?}");
}

#[tokio::test]
async fn a_tenant_with_more_lanes_than_a_look_covers_does_not_keep_the_others_from_their_turn() {
    let (store, _database) = crate::fresh(&PoolConfig::default()).await;
    let store: Arc<dyn Store> = Arc::new(store);
    let me = live_replica(&store).await;
    let keyed = |key: usize| NewRun {
        tenant: tenant("busy"),
        limits: Limits { pipeline_max: None, key: Some((format!("k{key:05}"), 1)) },
        ..new_run(i64::try_from(key).expect("small"))
    };
    let busy: Vec<NewRun> = (0..1_500).map(keyed).collect();
    store.submit(&busy).await.expect("submits");
    let others: Vec<NewRun> =
        (0..5).map(|n| NewRun { tenant: tenant(&format!("small-{n}")), ..new_run(5_000 + n) }).collect();
    store.submit(&others).await.expect("submits");
    let taken = store.claim(me, 10, &Shares::default()).await.expect("claims");
    for run in &others {
        assert!(taken.iter().any(|lease| lease.run == run.id), "{} waits", run.tenant);
    }
    // And each of its own lanes gets its turn.
    let mut left = busy.len() + others.len() - taken.len();
    while left > 0 {
        let page = store.claim(me, 500, &Shares::default()).await.expect("claims").len();
        assert!(page > 0, "{left} were left, and a claim took none");
        left -= page;
    }
}

#[tokio::test]
async fn the_lanes_of_a_pipeline_that_is_full_are_skipped_as_a_whole() {
    let (store, database) = crate::fresh(&PoolConfig::default()).await;
    let store: Arc<dyn Store> = Arc::new(store);
    let me = live_replica(&store).await;
    let full = |key: i64, max| NewRun {
        limits: Limits { pipeline_max: Some(max), key: Some((format!("k{key:05}"), 1)) },
        ..new_run(key)
    };
    let runs: Vec<NewRun> = (0..2_000).map(|key| full(key, 3)).collect();
    store.submit(&runs).await.expect("submits");
    assert_eq!(claim_all(&store, me).await.len(), 3);
    // Ten of another pipeline can be taken, whose lanes come after all of these.
    let others: Vec<NewRun> = (0..20).map(|n| NewRun { pipeline: pipeline("q"), ..full(9_000 + n, 10) }).collect();
    store.submit(&others).await.expect("submits");
    let (other, mut connection) = (live_replica(&store).await, connection_as_the_stores(database.url()).await);
    pages(&mut connection, other.0).await;
    let touched = pages(&mut connection, other.0).await;
    assert!(touched < 1_500, "{touched} pages");
}

/// A claim of the previous release, as its binary makes it.
async fn old_claim(url: &str, me: uuid::Uuid, most: i32) -> Vec<uuid::Uuid> {
    let mut connection = connection_as_the_stores(url).await;
    let sql = "SELECT ids FROM claim_runs_2($1, $2, '{}', '{}', '{}', 1, NULL, '', '', 512, 500)";
    sqlx::query(sql).bind(me).bind(most).fetch_one(&mut connection).await.expect("claims").get(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn claims_of_the_previous_release_and_of_this_one_share_what_waits_and_its_limits() {
    let (store, database) = crate::fresh(&PoolConfig::default()).await;
    let store: Arc<dyn Store> = Arc::new(store);
    let (old, new) = (live_replica(&store).await, live_replica(&store).await);
    let limited = |n| NewRun { limits: Limits { pipeline_max: Some(7), key: None }, ..new_run(n) };
    let runs: Vec<NewRun> = (0..40).map(limited).chain((100..160).map(new_run)).collect();
    store.submit(&runs).await.expect("submits");
    let (shares, mut taken) = (Shares::default(), Vec::<uuid::Uuid>::new());
    loop {
        let (theirs, ours) = tokio::join!(old_claim(database.url(), old.0, 6), store.claim(new, 6, &shares));
        let ours = ours.expect("claims");
        if theirs.is_empty() && ours.is_empty() {
            break;
        }
        taken.extend(theirs);
        taken.extend(ours.iter().map(|lease| lease.run.0));
    }
    taken.sort_unstable();
    taken.dedup();
    assert_eq!(taken.len(), 67, "each once: all that have no limit, and seven");
}

#[tokio::test]
async fn a_tenants_first_run_is_in_the_next_look_however_many_of_another_wait() {
    let (store, database) = crate::fresh(&PoolConfig::default()).await;
    let store: Arc<dyn Store> = Arc::new(store);
    let me = live_replica(&store).await;
    let mut connection = PgConnection::connect(database.url()).await.expect("connects");
    connection.execute(CROWD).await.expect("generates");
    // The crowd has been at it for a while.
    assert_eq!(store.claim(me, 50, &Shares::default()).await.expect("claims").len(), 50);
    let first = NewRun { tenant: tenant("small"), ..new_run(1) };
    store.submit(std::slice::from_ref(&first)).await.expect("submits");
    let next = store.claim(me, 1, &Shares::default()).await.expect("claims");
    assert_eq!(next.iter().map(|lease| lease.run).collect::<Vec<_>>(), [first.id]);
}

fn keyed(ms: i64, key: usize) -> NewRun {
    NewRun { limits: Limits { pipeline_max: None, key: Some((format!("k{key:05}"), 1)) }, ..new_run(ms) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_go_on_is_found_among_more_lanes_than_one_look_covers() {
    const LANES: usize = 1_300;
    let (store, _database) = crate::fresh(&PoolConfig::default()).await;
    let store: Arc<dyn Store> = Arc::new(store);
    let me = live_replica(&store).await;
    for round in 0..2 {
        let runs: Vec<NewRun> = (0..LANES).map(|key| keyed(round, key)).collect();
        store.submit(&runs).await.expect("submits");
        let mut taken = 0;
        // The first round fills every lane; what waits behind it can only wait.
        while round == 0 && taken < LANES {
            let page = store.claim(me, 1_000, &Shares::default()).await.expect("claims").len();
            assert!(page > 0, "{taken} of {LANES} were taken, and a claim took none");
            taken += page;
        }
        assert_eq!(claim_all(&store, me).await, []);
    }
    // One lane after another gets room, wherever the last look ended.
    for key in [LANES - 1, 0, LANES / 2, 3] {
        let free = NewRun { limits: Limits { pipeline_max: None, key: Some((format!("k{key:05}"), 2)) }, ..new_run(9) };
        store.submit(std::slice::from_ref(&free)).await.expect("submits");
        let taken = store.claim(me, 5, &Shares::default()).await.expect("claims");
        assert_eq!(taken.iter().map(|lease| lease.run).collect::<Vec<_>>(), [free.id]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dead_replica_left_is_freed_in_parts() {
    const RUNS: usize = 1_300;
    let (store, database) = crate::fresh(&PoolConfig::default()).await;
    let store: Arc<dyn Store> = Arc::new(store);
    let (dead, heir) = (live_replica(&store).await, live_replica(&store).await);
    let runs: Vec<NewRun> = (0..1_300).map(|ms| NewRun { lease_to: Some(dead), ..new_run(ms) }).collect();
    store.submit(&runs).await.expect("submits");
    beat(&store, dead, std::time::Duration::ZERO).await;
    assert_eq!(store.claim(heir, 1, &Shares::default()).await.expect("claims").len(), 1);
    let mut connection = PgConnection::connect(database.url()).await.expect("connects");
    let left = "SELECT count(*) FROM runs WHERE owner = $1";
    let left: i64 = sqlx::query(left).bind(dead.0).fetch_one(&mut connection).await.expect("counts").get(0);
    assert!(left < 1_300, "some were freed");
    let mut taken = 1;
    while taken < RUNS {
        let page = store.claim(heir, 100, &Shares::default()).await.expect("claims").len();
        assert!(page > 0, "{taken} of {RUNS} were taken, and a claim took none");
        taken += page;
    }
    assert_eq!(claim_all(&store, heir).await, []);
}

#[tokio::test]
async fn what_a_replica_of_schema_1_wrote_is_gone_on_with() {
    let (store, database) = crate::fresh(&PoolConfig::default()).await;
    let store: Arc<dyn Store> = Arc::new(store);
    let owner = live_replica(&store).await;
    let mut connection = PgConnection::connect(database.url()).await.expect("connects");
    // Queued: it names no lane.
    let queued = "INSERT INTO runs (id, tenant, pipeline, version, stages_total, priority, labels, created_at,
                  deadline_at, state, epoch, available_at, last_seq)
                  VALUES ($1, 'acme', 'p', 1, 5, 0, '{}', now(), now(), 'queued', 0, now(), 1)";
    sqlx::query(queued).bind(replica().0).execute(&mut connection).await.expect("inserts");
    assert_eq!(claim_all(&store, owner).await.len(), 1);
    // Under way: its first stage has a row already.
    let (run, lease) = submit_leased(&store, 1, owner).await;
    let row = "INSERT INTO stages (run_id, tenant, stage_id, state, attempt, round_start, started_at, usage_estimated,
               calls, hits, unpriced_calls, input_tokens, cache_read_tokens, cache_write_tokens, output_tokens,
               reasoning_tokens, cost_nanos, saved_nanos)
               VALUES ($1, 'acme', 's1', 'running', 1, 1, now(), false, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)";
    sqlx::query(row).bind(run.id.0).execute(&mut connection).await.expect("inserts");
    let done = StageRecord {
        state: StageState::Succeeded,
        attempt: 1,
        finished_at: Some(at(9)),
        ..StageRecord::pending(stage("s1"))
    };
    let mut attempt = stagegate_testkit::store::fixtures::full_attempt(1, "x");
    attempt.output = None;
    let plain = Commit {
        stages: vec![done.clone()],
        attempts: vec![(stage("s1"), attempt.clone())],
        checkpoints: vec![(stage("s1"), checkpoint("done".into()))],
        ..step(lease, 3)
    };
    assert_eq!(commit(&store, &plain).await, Committed::Now);
    assert_eq!(commit(&store, &plain).await, Committed::Already);
    let found = dump(&store, &tenant("acme"), run.id).await;
    assert_eq!(found.detail.stages, [done]);
    assert_eq!(found.stages[0].attempts, [attempt]);
}

#[tokio::test]
async fn a_step_whose_rows_are_there_is_not_taken_for_a_plain_one() {
    let (store, database) = crate::fresh(&PoolConfig::default()).await;
    let store: Arc<dyn Store> = Arc::new(store);
    let owner = live_replica(&store).await;
    let (run, lease) = submit_leased(&store, 1, owner).await;
    let (other, other_lease) = submit_leased(&store, 2, owner).await;
    // A checkpoint without its stage's row: nobody writes that, and nothing is lost over it.
    let mut connection = PgConnection::connect(database.url()).await.expect("connects");
    let row = "INSERT INTO checkpoints (run_id, tenant, stage_id, output, digest, attempt, verdict, origin, created_at)
               VALUES ($1, 'acme', 's1', '\"first\"', '', 1, 'passed', 'provider', now())";
    sqlx::query(row).bind(run.id.0).execute(&mut connection).await.expect("inserts");
    let plain = |lease| {
        let done = StageRecord { state: StageState::Succeeded, attempt: 1, ..StageRecord::pending(stage("s1")) };
        let mut attempt = stagegate_testkit::store::fixtures::full_attempt(1, "x");
        attempt.output = None;
        Commit {
            stages: vec![done],
            attempts: vec![(stage("s1"), attempt)],
            checkpoints: vec![(stage("s1"), checkpoint("second".into()))],
            ..step(lease, 3)
        }
    };
    let answers = store.commit(&[plain(lease), plain(other_lease)]).await.expect("commits");
    assert_eq!(answers, [Committed::Now, Committed::Now]);
    for (run, expected) in [(run.id, "first"), (other.id, "second")] {
        let found = store.stage(&tenant("acme"), run, &stage("s1")).await.expect("reads").expect("there");
        assert_eq!(found.checkpoint.expect("there").output.parse(), expected);
        assert_eq!(found.attempts.len(), 1);
    }
}
