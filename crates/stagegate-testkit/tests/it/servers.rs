//! Throwaway servers come and go as they should.

use std::{os::unix::process::CommandExt as _, process::Command, time::Duration};

use sqlx::{Connection as _, PgConnection};
use stagegate_testkit::servers::{Postgres, Program, Redis, TestDatabase};

async fn reachable(url: &str) -> bool {
    let work = async { PgConnection::connect(url).await?.ping().await };
    matches!(tokio::time::timeout(Duration::from_secs(2), work).await, Ok(Ok(())))
}

#[tokio::test]
async fn each_test_database_is_its_own() {
    let (a, b) = (TestDatabase::fresh().await, TestDatabase::fresh().await);
    assert_ne!(a.url(), b.url());
    assert!(reachable(a.url()).await && reachable(b.url()).await);
}

#[tokio::test]
async fn a_private_postgres_stops_starts_freezes_and_ends_with_its_owner() {
    let server = Postgres::private().await.expect("binaries");
    let url = server.url().to_owned();
    assert!(reachable(&url).await);
    server.crash().await.expect("crashes");
    assert!(!reachable(&url).await);
    server.start().await.expect("starts");
    assert!(reachable(&url).await);
    server.freeze().expect("freezes");
    assert!(!reachable(&url).await);
    server.thaw().expect("thaws");
    assert!(reachable(&url).await);
    drop(server);
    assert!(!reachable(&url).await);
}

#[tokio::test]
async fn a_private_redis_stops_starts_freezes_and_flushes() {
    let server = Redis::private().await.expect("binaries");
    server.flush().await.expect("flushes");
    server.stop().await.expect("stops");
    assert!(server.flush().await.is_err());
    server.start().await.expect("starts");
    server.freeze().expect("freezes");
    let hanging = tokio::time::timeout(Duration::from_millis(300), server.flush()).await;
    assert!(hanging.is_err(), "a frozen server accepts and never answers");
    server.thaw().expect("thaws");
    server.flush().await.expect("flushes");
    assert!(Redis::shared().await.expect("a server").unique_prefix().ends_with(':'));
}

#[tokio::test]
async fn a_program_tells_how_it_ended_and_starts_again_in_its_folder() {
    let script = "trap 'exit 7' TERM; echo here; while :; do sleep 0.02; done";
    let program = Program::start("test", "KILL", |_| Ok(["sh", "-c", script].map(str::to_owned).to_vec()));
    let program = program.expect("starts");
    let said_so = async |times: usize| {
        while program.log_from(0).map_or(0, |(text, _)| text.lines().count()) < times {
            tokio::task::yield_now().await;
        }
    };
    said_so(1).await;
    assert!(program.is_running());
    assert_eq!(program.stop("TERM").await.expect("stops"), Some(7));
    assert!(!program.is_running());
    assert_eq!(program.stop("TERM").await.expect("nothing to do"), None);
    program.start_again().expect("starts");
    said_so(2).await;
    assert_eq!(program.stop("KILL").await.expect("stops"), Some(128 + 9));
}

/// Run by the test below in a process of its own, which is then killed.
#[tokio::test]
async fn helper_that_starts_a_server_and_waits() {
    let Ok(file) = std::env::var("STAGEGATE_TESTKIT_URL_FILE") else { return };
    let server = Postgres::private().await.expect("binaries");
    std::fs::write(&file, server.url()).expect("writable");
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn a_server_ends_even_when_its_owner_is_killed() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("url");
    let mut owner = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "servers::helper_that_starts_a_server_and_waits"])
        .env("STAGEGATE_TESTKIT_URL_FILE", &file)
        .process_group(0)
        .spawn()
        .expect("spawns");
    let url = loop {
        match std::fs::read_to_string(&file) {
            Ok(url) if !url.is_empty() => break url,
            _ => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    assert!(reachable(&url).await);
    owner.kill().expect("SIGKILL");
    owner.wait().expect("reaped");
    while reachable(&url).await {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
