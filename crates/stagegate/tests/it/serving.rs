//! Promises of the daemon's start and end.

use std::net::TcpListener;

use serde_json::json;
use stagegate_testkit::{
    provider::{FakeProvider, Reply, contains},
    servers::{Redis, TestDatabase},
};

use crate::support::{Api, PATIENCE, Place};

#[tokio::test(flavor = "multi_thread")]
async fn an_embedded_daemon_says_what_it_uses_and_ends_with_0_on_sigterm() {
    let place = Place::new();
    let daemon = place.serve(&[], &[]).await;
    let (code, stdout, stderr) = place.run(&["healthcheck", "--url", &daemon.base]);
    assert!(code == 0 && stdout.contains("sqlite"), "{stdout}{stderr}");
    assert_eq!(Api::new(&daemon.base, None).status("/v1/pipelines").await, 200, "open on loopback");
    let (code, log) = daemon.end("TERM");
    assert_eq!(code, 0, "{log:#?}");
    for part in [
        "store: embedded SQLite at",
        "this machine alone, no replicas",
        "cache: in the same SQLite file",
        "models: simulated only",
        "access: open to everybody on this machine",
        "/docs",
        "draining",
        "stopped",
    ] {
        assert!(log.iter().any(|line| line.contains(part)), "{part}: {log:#?}");
    }
    for line in &log {
        assert!(serde_json::from_str::<serde_json::Value>(line).is_ok(), "one schema, JSON alone: {line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_leaves_says_so_before_it_refuses_anything() {
    let place = Place::new();
    place.write("stagegate.toml", "[http]\ndrain_delay = '10m'\n");
    let daemon = place.serve(&[], &[]).await;
    let api = Api::new(&daemon.base, None);
    api.register("{ name: p, defaults: { model: sim/quick }, stages: [{ id: one, prompt: one }] }").await;
    daemon.signal("TERM");
    let told = async {
        while api.status("/readyz").await != 503 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, told).await.expect("it is not ready any more");
    let run = api.submit("p", json!({})).await;
    assert_eq!(api.finish(&run).await["state"], "succeeded", "what comes all the same is served as ever");
    daemon.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_under_way_at_sigterm_goes_on_at_the_next_start() {
    let place = Place::new();
    let provider = FakeProvider::start().await;
    provider.on(contains("SECOND")).once(Reply::hang()).always(Reply::text("two"));
    let url = provider.openai_base_url();
    let config = format!(
        "[engine]\ndrain_grace = '100ms'\n[llm.providers.fake]\nkind = 'openai'\nbase_url = '{url}'\n\
         [log]\nfilter = 'info'\n"
    );
    place.write("stagegate.toml", &config);
    let daemon = place.serve(&[], &[]).await;
    let api = Api::new(&daemon.base, None);
    api.register(
        "name: p\ndefaults: { model: fake/m }\nstages: [{ id: one, prompt: FIRST }, { id: two, needs: [one], prompt: SECOND }]\n",
    )
    .await;
    let run = api.submit("p", json!({})).await;
    let is_second = |event: &stagegate_core::Event| {
        event.kind.name() == "stage.started" && event.kind.stage().is_some_and(|stage| stage.as_str() == "two")
    };
    api.follow(&run, 0, is_second).await;
    // The call that hangs is the first process's: it must have arrived before the signal.
    let called = async {
        while provider.calls_where(&contains("SECOND")).is_empty() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, called).await.expect("the second stage is called");
    assert_eq!(daemon.end("TERM").0, 0);

    let daemon = place.serve(&[], &[]).await;
    let detail = Api::new(&daemon.base, None).finish(&run).await;
    assert_eq!(detail["state"], "succeeded", "{detail:#}");
    assert_eq!(provider.calls_where(&contains("FIRST")).len(), 1, "what was checkpointed is not bought again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hang_up_ends_no_daemon() {
    let place = Place::new();
    let daemon = place.serve(&[], &[]).await;
    daemon.signal("HUP");
    // Signals of a process come in no order: the second ends it, and the first was met before.
    assert_eq!(Api::new(&daemon.base, None).status("/healthz").await, 200);
    let (code, log) = daemon.end("TERM");
    assert_eq!(code, 0, "{log:#?}");
}

#[test]
fn a_taken_port_is_told_with_what_to_do() {
    let place = Place::new();
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("bound").to_string();
    let (code, _, stderr) = place.run(&["serve", "--listen", &address]);
    assert!(code == 2 && stderr.contains(&address) && stderr.contains("--listen"), "{stderr}");
}

#[test]
fn an_unreachable_database_is_told_without_its_password() {
    let place = Place::new();
    for command in ["serve", "migrate"] {
        let mut command = place.stagegate(&[command]);
        command.env("DATABASE_URL", "postgres://me:hunter2@127.0.0.1:1/runs");
        command.env("STAGEGATE_STORE__POOL__ACQUIRE_TIMEOUT", "500ms");
        if command.get_args().any(|argument| argument == "serve") {
            command.args(["--listen", "127.0.0.1:0"]);
        }
        let (code, _, stderr) = crate::support::ended(command.output().expect("runs"));
        assert!(code == 1 && stderr.contains("SG0501") && stderr.contains("127.0.0.1:1/runs"), "{stderr}");
        assert!(!stderr.contains("hunter2"), "{stderr}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_that_is_behind_is_told_with_its_mend() {
    let place = Place::new();
    let database = TestDatabase::fresh().await;
    let mut command = place.stagegate(&["serve", "--listen", "127.0.0.1:0"]);
    let (code, _, stderr) = crate::support::ended(command.env("DATABASE_URL", database.url()).output().expect("runs"));
    assert!(code == 1 && stderr.contains("SG0502") && stderr.contains("stagegate migrate"), "{stderr}");
    for _ in 0..2 {
        let mut command = place.stagegate(&["migrate"]);
        let (code, _, stderr) =
            crate::support::ended(command.env("DATABASE_URL", database.url()).output().expect("runs"));
        assert!(code == 0 && stderr.contains("up to date"), "{stderr}");
    }
    let daemon = place.serve(&[], &[("DATABASE_URL", database.url())]).await;
    assert_eq!(Api::new(&daemon.base, None).status("/v1/pipelines").await, 401, "Postgres asks for keys");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_not_there_is_told_as_one() {
    let place = Place::new();
    let database = TestDatabase::fresh().await;
    let (server, _) = database.url().rsplit_once('/').expect("a database's name");
    for (url, code, part) in [
        (format!("{server}/nobody_made_this"), "SG0501", "nobody_made_this"),
        ("nonsense".to_owned(), "SG0500", "postgres://user:password@host/database"),
    ] {
        let mut command = place.stagegate(&["serve", "--listen", "127.0.0.1:0"]);
        let (_, _, stderr) = crate::support::ended(command.env("DATABASE_URL", url).output().expect("runs"));
        assert!(stderr.contains(&format!("error: {code}")) && stderr.contains(part), "{stderr}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_is_away_degrades_and_stops_nothing() {
    let place = Place::new();
    let database = TestDatabase::fresh().await;
    let redis = Redis::private().await.expect("a Redis");
    redis.stop().await.expect("stopped");
    let environment = [("DATABASE_URL", database.url()), ("REDIS_URL", redis.url())];
    let daemon = place.serve(&["--migrate", "--auth", "open"], &environment).await;
    let api = Api::new(&daemon.base, None);
    api.register("name: p\nstages: [{ id: one, prompt: hi, model: sim/quick }]\n").await;
    api.succeed("p", json!({})).await;
    let ready = api.get("/readyz").await;
    assert!(ready.to_string().contains("degraded"), "{ready:#}");
}
