//! A server that goes, comes back, hangs or refuses; rows that nobody wrote.

use std::{future::Future, sync::Arc, time::Duration};

use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection};
use stagegate_core::{
    Epoch, RunState, Store, StoreError, StoreResult,
    store::{Commit, Committed, Lease, NewSignal, SignalKind, Signalled},
};
use stagegate_store_postgres::PoolConfig;
use stagegate_testkit::{
    proxy::{Mode, Proxy},
    servers::{Postgres, TestDatabase},
    store::fixtures::{
        NASTY, at, claim_all, commit, end, full_attempt, full_stage, live_replica, new_run, replica, signal,
        signals_of, stage, step, submit, submit_leased,
    },
};
use uuid::Uuid;

use crate::ms;

/// Asks until it is answered; whatever comes before must be worth trying again.
async fn until_answered<T, F: Future<Output = StoreResult<T>>>(mut ask: impl FnMut() -> F) -> T {
    loop {
        match ask().await {
            Ok(answer) => return answer,
            Err(error) if error.is_retryable() => tokio::time::sleep(Duration::from_millis(20)).await,
            Err(error) => panic!("{error}"),
        }
    }
}

async fn private(pool: &PoolConfig) -> (Arc<dyn Store>, Arc<Postgres>, TestDatabase) {
    let server = Arc::new(Postgres::private().await.expect("binaries"));
    let database = TestDatabase::on(server.clone()).await.expect("creates");
    let store = crate::connect(database.url(), pool).await;
    store.migrate().await.expect("migrates");
    (Arc::new(store), server, database)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_restarts_is_found_again() {
    let config = PoolConfig { acquire_timeout: ms(500), ..PoolConfig::default() };
    let (store, server, _database) = private(&config).await;
    let owner = live_replica(&store).await;
    let (run, lease) = submit_leased(&store, 1, owner).await;
    for round in 0..2 {
        if round == 0 { server.stop().await } else { server.crash().await }.expect("stops");
        let error = store.ping().await.expect_err("nobody there");
        assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
        server.start().await.expect("starts");
        let step = step(lease, 3 + round);
        let answer = until_answered(|| store.commit(std::slice::from_ref(&step))).await;
        assert!(matches!(answer[..], [Committed::Now | Committed::Already]), "{answer:?}");
    }
    let record = until_answered(|| store.run_record(&run.tenant, run.id)).await.expect("it was kept");
    assert_eq!(record.last_seq, 5);
}

/// As a proxy or a balancer does while the server behind it restarts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_is_accepted_and_closed_is_worth_another_try() {
    let server = Arc::new(Postgres::private().await.expect("binaries"));
    let database = TestDatabase::on(server.clone()).await.expect("creates");
    let (_, rest) = database.url().split_once('@').expect("a user");
    let (address, _) = rest.split_once('/').expect("a database");
    let proxy = Proxy::start(address.parse().expect("an address")).await.expect("a proxy");
    let through = database.url().replace(address, &proxy.address().to_string());
    let store = crate::connect(&through, &PoolConfig { acquire_timeout: ms(500), ..PoolConfig::default() }).await;
    store.ping().await.expect("it passes");
    proxy.set(Mode::Refuse);
    for _ in 0..3 {
        let error = store.ping().await.expect_err("broken off");
        assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
    }
    proxy.set(Mode::Pass);
    until_answered(|| store.ping()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_hangs_hangs_nobody() {
    let config = PoolConfig { acquire_timeout: ms(500), statement_timeout: ms(100), ..PoolConfig::default() };
    let (store, server, _database) = private(&config).await;
    store.ping().await.expect("answers");
    server.freeze().expect("freezes");
    for _ in 0..2 {
        let answer = tokio::time::timeout(Duration::from_secs(30), store.ping()).await.expect("does not hang");
        assert!(matches!(answer, Err(StoreError::Unavailable(_))), "{answer:?}");
    }
    server.thaw().expect("thaws");
    until_answered(|| store.ping()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_that_its_caller_gave_up_does_not_keep_its_connection() {
    // Not tested before it is handed out: that test, too, would be given up, and is the pool's own.
    let config = PoolConfig { min_connections: 0, test_on_checkout: false, ..PoolConfig::default() };
    let server = Arc::new(Postgres::private().await.expect("binaries"));
    let database = TestDatabase::on(server.clone()).await.expect("creates");
    let store = crate::connect(database.url(), &config).await;
    store.ping().await.expect("answers");
    server.freeze().expect("freezes");
    tokio::time::timeout(Duration::from_millis(100), store.ping()).await.expect_err("given up");
    let freed = async {
        while store.pool_stats().in_use > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let freed = tokio::time::timeout(Duration::from_secs(15), freed).await;
    server.thaw().expect("thaws");
    freed.expect("while the server is still silent");
}

#[tokio::test]
async fn a_replica_that_vanished_inside_a_transaction_holds_its_rows_no_longer_than_a_statement_may_run() {
    let config = PoolConfig { statement_timeout: ms(500), ..PoolConfig::default() };
    let (store, database) = crate::fresh(&config).await;
    let store: Arc<dyn Store> = Arc::new(store);
    let owner = live_replica(&store).await;
    let (run, _) = submit_leased(&store, 1, owner).await;
    let cancel = NewSignal { tenant: run.tenant.clone(), run: run.id, kind: SignalKind::Cancel, by: None };
    let mut operator = PgConnection::connect(database.url()).await.expect("connects");
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
               AND application_name = 'stagegate' AND state LIKE 'idle in transaction%'";
    let mut inside = async || sqlx::query_scalar::<_, i64>(sql).fetch_one(&mut operator).await.expect("reads") > 0;
    // Never asked to go on: what a partition looks like from the server, which sees no connection end.
    let mut leaving = store.signal(&cancel);
    while !inside().await {
        let polled = std::future::poll_fn(|context| std::task::Poll::Ready(leaving.as_mut().poll(context))).await;
        if polled.is_ready() {
            // It was through before it was seen between two statements: another is begun, to be left there.
            leaving = store.signal(&cancel);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let ended = async {
        while inside().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(15), ended).await.expect("the server ends it");
}

#[tokio::test]
async fn a_run_given_to_a_replica_in_the_moment_of_its_death_is_found() {
    let (store, database) = crate::fresh(&PoolConfig::default()).await;
    let store: Arc<dyn Store> = Arc::new(store);
    let dead = live_replica(&store).await;
    store.leave(dead).await.expect("leaves");
    let run = new_run(1);
    submit(&store, &run).await;
    // As if the dead replica's submit had begun before it was declared dead, and committed after.
    let mut connection = PgConnection::connect(database.url()).await.expect("connects");
    sqlx::query("UPDATE runs SET owner = $1, available_at = NULL, epoch = 1 WHERE id = $2")
        .bind(dead.0)
        .bind(run.id.0)
        .execute(&mut connection)
        .await
        .expect("changes");
    let heir = live_replica(&store).await;
    assert_eq!(claim_all(&store, heir).await, [Lease { run: run.id, epoch: Epoch(2) }]);
}

#[tokio::test]
async fn a_row_that_cannot_be_read_is_named() {
    let (store, database) = crate::fresh(&PoolConfig::default()).await;
    let store: Arc<dyn Store> = Arc::new(store);
    let owner = live_replica(&store).await;
    let (run, lease) = submit_leased(&store, 1, owner).await;
    let mut whole = step(lease, 3);
    whole.stages = vec![full_stage("s1", "x")];
    whole.attempts = vec![(stage("s1"), full_attempt(1, "x"))];
    commit(&store, &whole).await;
    let mut connection = PgConnection::connect(database.url()).await.expect("connects");
    let changes = [
        ("UPDATE attempts SET body = '{\"hunter2\"'", "attempts", "body"),
        ("UPDATE stages SET verdict = 'no word: hunter2'", "stages", "verdict"),
        ("UPDATE runs SET state = 'no word: hunter2'", "runs", "state"),
    ];
    for (change, expected_table, expected_column) in changes {
        connection.execute(change).await.expect("changes");
        let error = match store.stage(&run.tenant, run.id, &stage("s1")).await {
            Err(error) if expected_table != "runs" => error,
            _ => store.run_record(&run.tenant, run.id).await.expect_err("corrupt"),
        };
        assert!(!error.to_string().contains("hunter2"), "{error}");
        let StoreError::Corrupt { table, column, id, .. } = error else { panic!("{error}") };
        assert_eq!((table, column, id), (expected_table, expected_column, run.id.to_string()));
    }
}

#[tokio::test]
async fn a_signal_that_does_not_tell_by_whom_it_is_obeyed_if_it_is_a_cancel_and_else_left_alone() {
    let (store, database) = crate::fresh(&PoolConfig::default()).await;
    let store: Arc<dyn Store> = Arc::new(store);
    let owner = live_replica(&store).await;
    let (run, lease) = submit_leased(&store, 1, owner).await;
    for kind in [SignalKind::Unknown(r#"{"kind":"pause"}"#.into()), SignalKind::Cancel] {
        assert!(matches!(signal(&store, run.id, kind).await, Signalled::Accepted { .. }));
    }
    let mut connection = PgConnection::connect(database.url()).await.expect("connects");
    let approve =
        "UPDATE signals SET body = '{\"kind\":\"approve\",\"stage\":\"s1\",\"by\":7}' WHERE body LIKE '%pause%'";
    for change in [approve, "UPDATE signals SET body = '{\"kind\":\"cancel\",\"by\":7}' WHERE body LIKE '%cancel%'"] {
        connection.execute(change).await.expect("changes");
    }
    let left = signals_of(&store, lease).await;
    assert!(matches!(left[0].kind, SignalKind::Unknown(_)), "{left:?}");
    assert_eq!((&left[1].kind, &left[1].by), (&SignalKind::Cancel, &None));
}

#[tokio::test]
async fn an_attempt_that_cannot_be_read_fails_the_purge_of_its_own_run_alone() {
    let (store, database) = crate::fresh(&PoolConfig::default()).await;
    let store: Arc<dyn Store> = Arc::new(store);
    let owner = live_replica(&store).await;
    let mut runs = Vec::new();
    for ms in 1..=2 {
        let (run, lease) = submit_leased(&store, ms, owner).await;
        let attempts = vec![(stage("s1"), full_attempt(1, "x"))];
        commit(&store, &Commit { attempts, ..step(lease, 3) }).await;
        commit(&store, &end(lease, 4, RunState::Failed)).await;
        runs.push(run.id);
    }
    let mut connection = PgConnection::connect(database.url()).await.expect("connects");
    for body in [r#"[{"detail":"hunter2"}]"#, r#"{"detail":"#] {
        let change = sqlx::query("UPDATE attempts SET body = $1 WHERE run_id = $2").bind(body).bind(runs[0].0);
        change.execute(&mut connection).await.expect("changes");
        let error = store.purge(&runs, at(700)).await.expect_err("corrupt");
        assert!(matches!(error, StoreError::Corrupt { table: "attempts", column: "body", .. }), "{error}");
    }
    assert_eq!(store.purge(&runs[1..], at(700)).await.expect("purges"), 1);
}

#[tokio::test]
async fn what_quotes_payloads_goes_though_the_release_before_has_purged_the_run() {
    let (store, database) = crate::fresh(&PoolConfig::default()).await;
    let store: Arc<dyn Store> = Arc::new(store);
    let owner = live_replica(&store).await;
    let (run, lease) = submit_leased(&store, 1, owner).await;
    let (stages, attempts) = (vec![full_stage("s1", "x")], vec![(stage("s1"), full_attempt(1, "x"))]);
    commit(&store, &Commit { stages, attempts, ..step(lease, 3) }).await;
    commit(&store, &end(lease, 4, RunState::Failed)).await;
    let mut connection = PgConnection::connect(database.url()).await.expect("connects");
    let of_before = sqlx::query("SELECT purge_runs_2(ARRAY[$1], now())").bind(run.id.0);
    of_before.execute(&mut connection).await.expect("purges");
    let quotes = async || {
        let detail = store.stage(&run.tenant, run.id, &stage("s1")).await.expect("reads").expect("there");
        let failures = detail.attempts.iter().filter_map(|attempt| attempt.failure.as_ref()?.detail.clone());
        let judged = detail.attempts.iter().flat_map(|attempt| &attempt.assessments);
        failures.chain(judged.filter_map(|each| each.detail.clone())).count()
    };
    assert_eq!(quotes().await, 2);
    assert_eq!(store.purge(&[run.id], at(700)).await.expect("purges"), 0, "it is purged");
    assert_eq!(quotes().await, 0);
}

#[tokio::test]
async fn what_the_server_refuses_is_told_by_its_kind_and_without_values() {
    let (store, database) = crate::fresh(&PoolConfig::default()).await;
    let mut connection = PgConnection::connect(database.url()).await.expect("connects");
    let refuse = |code: &str| {
        format!(
            "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN RAISE EXCEPTION 'refused' USING ERRCODE = '{code}'; END $$;
             CREATE OR REPLACE TRIGGER refuse BEFORE INSERT ON runs FOR EACH ROW EXECUTE FUNCTION refuse()"
        )
    };
    for code in ["53100", "53200", "40001", "40P01", "57P01", "08006", "23514", "22021", "XX000"] {
        connection.execute(AssertSqlSafe(refuse(code))).await.expect("changes");
        let mut run = new_run(1);
        run.request_id = Some("hunter2".to_owned());
        let error = store.submit(&[run]).await.expect_err("refused");
        assert!(!error.to_string().contains("hunter2") && error.to_string().contains("runs.submit"), "{error}");
        match code {
            "53100" => assert!(matches!(error, StoreError::Full(_)), "{code}: {error}"),
            "53200" | "40001" | "40P01" | "57P01" | "08006" => {
                assert!(matches!(error, StoreError::Unavailable(_)), "{code}: {error}");
            }
            _ => assert!(matches!(error, StoreError::Defect(_)), "{code}: {error}"),
        }
    }
}

#[tokio::test]
async fn what_an_owner_must_not_write_is_refused_whole() {
    let (store, _database) = crate::fresh(&PoolConfig::default()).await;
    let store: Arc<dyn Store> = Arc::new(store);
    let owner = live_replica(&store).await;
    let (run, lease) = submit_leased(&store, 1, owner).await;
    let (_, other) = submit_leased(&store, 2, owner).await;
    let mut empty = step(lease, 3);
    empty.events.clear();
    let mut gap = step(lease, 3);
    gap.events.push(stagegate_testkit::store::fixtures::event(9, 1, "s1"));
    for wrong in [vec![empty], vec![gap], vec![step(lease, 3), step(lease, 4)]] {
        let mut batch = vec![step(other, 3)];
        batch.extend(wrong);
        let error = store.commit(&batch).await.expect_err("a defect of the caller");
        assert!(matches!(error, StoreError::Defect(_)), "{error}");
    }
    assert_eq!(store.run_record(&run.tenant, run.id).await.expect("reads").expect("there").last_seq, 3);
    assert_eq!(commit(&store, &step(other, 3)).await, Committed::Now);
}

#[tokio::test]
async fn what_is_shown_to_people_may_hold_anything() {
    let (store, database) = crate::fresh(&PoolConfig::default()).await;
    let id = replica();
    let beat = stagegate_core::store::Heartbeat {
        replica: id,
        name: NASTY.to_owned(),
        version: NASTY.to_owned(),
        draining: true,
        ttl: Duration::from_mins(1),
        capabilities: stagegate_core::Capabilities::own(),
        way_back: Duration::ZERO,
    };
    assert!(store.heartbeat(&beat).await.expect("beats").alive);
    let mut run = new_run(1);
    run.request_id = Some("a\0b".to_owned());
    store.submit(std::slice::from_ref(&run)).await.expect("submits");
    let record = store.run_record(&run.tenant, run.id).await.expect("reads").expect("there");
    assert_eq!((record.request_id.as_deref(), record.state), (Some("a\u{fffd}b"), RunState::Queued));
    let mut connection = PgConnection::connect(database.url()).await.expect("connects");
    let row: (Uuid, bool) =
        sqlx::query_as("SELECT id, draining FROM replicas").fetch_one(&mut connection).await.expect("reads");
    assert_eq!(row, (id.0, true));
}

#[tokio::test]
async fn a_run_that_somebody_holds_does_not_keep_the_others_from_being_handed_back() {
    // Were the held row waited for, the statement would end with this time-out's error.
    let config = PoolConfig { statement_timeout: ms(500), ..PoolConfig::default() };
    let (store, database) = crate::fresh(&config).await;
    let store: Arc<dyn Store> = Arc::new(store);
    let owner = live_replica(&store).await;
    let (held, held_lease) = submit_leased(&store, 1, owner).await;
    let (_, free_lease) = submit_leased(&store, 2, owner).await;
    let mut operator = PgConnection::connect(database.url()).await.expect("connects");
    let mut hand = operator.begin().await.expect("begins");
    sqlx::query("SELECT FROM runs WHERE id = $1 FOR UPDATE").bind(held.id.0).execute(&mut *hand).await.expect("holds");

    store.release(&[held_lease, free_lease]).await.expect("the other is handed back");
    assert_eq!(store.owned(owner).await.expect("read"), [held_lease], "found by the next look at what is owned");
    store.leave(owner).await.expect("leaves all the same");
    hand.rollback().await.expect("lets go");
    let next = live_replica(&store).await;
    let mut taken: Vec<_> = claim_all(&store, next).await.into_iter().map(|lease| lease.run).collect();
    taken.sort_unstable();
    let mut both = vec![held_lease.run, free_lease.run];
    both.sort_unstable();
    assert_eq!(taken, both, "what a replica that left still owned is found by a claim");
}

#[tokio::test]
async fn a_ping_tells_of_a_full_disk_until_a_write_succeeds() {
    let (store, database) = crate::fresh(&PoolConfig::default()).await;
    let mut connection = PgConnection::connect(database.url()).await.expect("connects");
    let full = "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$
                BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = '53100'; END $$;
                CREATE TRIGGER full_disk BEFORE INSERT ON run_payloads FOR EACH ROW EXECUTE FUNCTION full_disk()";
    connection.execute(full).await.expect("fills the disk");
    store.ping().await.expect("nothing was written yet");
    let error = store.submit(&[new_run(1)]).await.expect_err("the disk is full");
    assert!(matches!(error, StoreError::Full(_)), "{error}");
    for _ in 0..2 {
        let error = store.ping().await.expect_err("the disk is full");
        assert!(matches!(error, StoreError::Full(_)), "{error}");
    }
    connection.execute("DROP TRIGGER full_disk ON run_payloads").await.expect("makes room");
    store.ping().await.expect("there is room");
    store.submit(&[new_run(1)]).await.expect("accepted");
    let row: (i64,) =
        sqlx::query_as("SELECT count(*) FROM run_payloads").fetch_one(&mut connection).await.expect("reads");
    assert_eq!(row.0, 1, "the trial left nothing");
}

#[tokio::test]
async fn a_login_that_is_refused_for_a_while_is_an_outage() {
    let (_store, server, database) = private(&PoolConfig::default()).await;
    let mut operator = PgConnection::connect(database.url()).await.expect("connects");
    operator.execute("CREATE ROLE rotated SUPERUSER LOGIN").await.expect("makes a role");
    let url = database.url().replace("stagegate@", "rotated@");
    assert_ne!(url, database.url());
    let store = crate::connect(&url, &PoolConfig::default()).await;
    store.ping().await.expect("it may log in");
    operator.execute("ALTER ROLE rotated NOLOGIN").await.expect("alters");
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'rotated'";
    operator.execute(end).await.expect("ends its sessions");
    for _ in 0..3 {
        let error = store.ping().await.expect_err("it may not log in");
        assert!(error.is_retryable(), "{error}");
    }
    operator.execute("ALTER ROLE rotated LOGIN").await.expect("alters");
    until_answered(|| store.ping()).await;
    drop(server);
}
