//! Promises of the commands that people work with: on a daemon's runs, with a directory of pipelines, and without either.

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

use serde_json::{Value, json};

use crate::support::{Api, Daemon, PATIENCE, Place, binary};

const PASSES: &str = "name: passes\nstages: [{ id: one, transform: 'well done' }]\noutput: '{{ stages.one.output }}'\n";

const HOLDS: &str = "\
name: holds
stages:
  - { id: one, transform: 'a draft', gate: { checks: [{ expression: 'false' }], on_fail: hold } }
output: '{{ stages.one.output }}'
";

/// Runs a command on a daemon: exit code, stdout, stderr.
fn on(place: &Place, daemon: &Daemon, arguments: &[&str]) -> (i32, String, String) {
    place.run(&[arguments, &["--server", &daemon.base]].concat())
}

fn read(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("no JSON ({error}): {text}"))
}

async fn until_registered(api: &Api, path: &str, version: u64) -> Value {
    let waiting = async {
        loop {
            if api.status(path).await == 200 {
                let found = api.get(path).await;
                if found["version"] == version {
                    return found;
                }
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.expect("it is registered")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_runs_of_a_daemon_are_submitted_watched_decided_and_removed_by_commands() {
    let place = Place::new();
    let daemon = place.serve(&[], &[]).await;
    let api = Api::new(&daemon.base, None);
    api.register(PASSES).await;
    api.register(HOLDS).await;

    let (code, stdout, stderr) = on(&place, &daemon, &["runs", "submit", "passes", "--watch", "--label", "of:test"]);
    assert_eq!((code, stdout.as_str()), (0, "\"well done\"\n"), "{stderr}");
    assert!(stderr.contains("✓ one") && stderr.contains("succeeded in"), "{stderr}");

    let (code, run, stderr) = on(&place, &daemon, &["runs", "submit", "holds"]);
    assert_eq!(code, 0, "{stderr}");
    let run = run.trim();
    let (code, _, stderr) = on(&place, &daemon, &["runs", "watch", run, "--until-held"]);
    assert_eq!(code, 4, "{stderr}");
    let (_, listed, _) = on(&place, &daemon, &["runs", "list", "--state", "waiting", "--output", "json"]);
    assert_eq!(read(&listed)[0]["id"], run);
    let (code, shown, _) = on(&place, &daemon, &["runs", "get", run]);
    assert!(code == 0 && shown.contains("holds v1") && shown.contains("held"), "{shown}");

    let (code, _, stderr) = on(&place, &daemon, &["runs", "approve", run, "one", "--attempt", "7"]);
    assert!(code == 2 && stderr.contains("SG0207"), "another attempt is meant: {stderr}");
    let (code, _, stderr) = on(&place, &daemon, &["runs", "approve", run, "one"]);
    assert!(code == 0 && stderr.contains("approved"), "{stderr}");
    let (code, events, stderr) = on(&place, &daemon, &["runs", "watch", run, "--output", "json"]);
    assert_eq!(code, 0, "{stderr}");
    let kinds: Vec<Value> = events.lines().map(|line| read(line)["type"].clone()).collect();
    assert!(kinds.first() == Some(&json!("run.accepted")) && kinds.last() == Some(&json!("run.finished")), "{kinds:?}");

    let (code, _, _) = on(&place, &daemon, &["runs", "delete", run]);
    assert_eq!(code, 0);
    let (code, _, stderr) = on(&place, &daemon, &["runs", "get", run]);
    assert!(code == 2 && stderr.contains("SG0203"), "{stderr}");
    let (code, listed, _) = on(&place, &daemon, &["runs", "list", "--label", "of:test"]);
    assert!(code == 0 && listed.lines().count() == 2 && listed.contains("passes v1"), "{listed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rejected_and_a_cancelled_run_end_with_their_own_exit_codes() {
    let place = Place::new();
    let daemon = place.serve(&[], &[]).await;
    Api::new(&daemon.base, None).register(HOLDS).await;
    let ends = [("failed", 1), ("cancelled", 3)];
    for (state, exit_code) in ends {
        let (_, run, _) = on(&place, &daemon, &["runs", "submit", "holds"]);
        let run = run.trim();
        on(&place, &daemon, &["runs", "watch", run, "--until-held"]);
        let (code, _, stderr) = if state == "failed" {
            on(&place, &daemon, &["runs", "reject", run, "one", "--reason", "off topic"])
        } else {
            on(&place, &daemon, &["runs", "cancel", run])
        };
        assert_eq!(code, 0, "{stderr}");
        let (code, stdout, stderr) = on(&place, &daemon, &["runs", "watch", run]);
        assert_eq!((code, stdout.as_str()), (exit_code, ""), "{state}: {stderr}");
        assert!(stderr.contains(state), "{stderr}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_with_keys_is_opened_by_the_environment_or_a_file_and_warns_that_it_simulates() {
    let place = Place::new();
    let (_, key, _) = place.run(&["keys", "create", "--name", "t", "--role", "viewer"]);
    let mut daemon = place.serve(&["--auth", "keys"], &[]).await;
    assert!(daemon.log().iter().any(|line| line.contains("is simulated") && line.to_lowercase().contains("warn")));
    let (code, _, stderr) = on(&place, &daemon, &["runs", "list"]);
    assert!(code != 0 && stderr.contains("SG0010"), "{stderr}");
    place.write("key", &key);
    let (code, _, stderr) = on(&place, &daemon, &["runs", "list", "--api-key-file", "key"]);
    assert_eq!(code, 0, "{stderr}");
    let mut command = place.stagegate(&["runs", "list"]);
    command.env("STAGEGATE_SERVER", &daemon.base).env("STAGEGATE_API_KEY", key.trim());
    command.assert().success();
    let (code, _, stderr) = place.run(&["runs", "list", "--server", "127.0.0.1:1"]);
    assert!(code == 1 && stderr.contains("stagegate serve"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_of_pipelines_is_registered_and_its_changes_are_and_a_broken_file_is_told() {
    let place = Place::new();
    std::fs::create_dir(place.path("pipelines")).expect("writable");
    place.write("pipelines/passes.yaml", PASSES);
    place.write("pipelines/notes.md", "no pipeline");
    let mut daemon = place.serve(&["--pipelines", "pipelines"], &[]).await;
    let api = Api::new(&daemon.base, None);
    assert_eq!(api.get("/v1/pipelines/passes").await["version"], 1, "before it is ready");
    place.write("pipelines/passes.yaml", &PASSES.replace("well", "better"));
    until_registered(&api, "/v1/pipelines/passes", 2).await;
    place.write("pipelines/holds.yml", HOLDS);
    until_registered(&api, "/v1/pipelines/holds", 1).await;
    place.write("pipelines/passes.yaml", "name: passes\nstages: [{ id: one, promt: hi }]\n");
    daemon.wait_for_line("stays in force");
    assert!(daemon.log().iter().any(|line| line.contains("passes.yaml:2:") && line.contains("SG0102")));
    assert_eq!(api.get("/v1/pipelines/passes").await["version"], 2);
    // Mended, it counts again.
    place.write("pipelines/passes.yaml", &PASSES.replace("well", "best"));
    until_registered(&api, "/v1/pipelines/passes", 3).await;
    // Reverted, the old text is in force.
    let first = api.get("/v1/pipelines/passes/versions/1").await;
    place.write("pipelines/passes.yaml", PASSES);
    until_registered(&api, "/v1/pipelines/passes", 4).await;
    assert_eq!(api.get("/v1/pipelines/passes").await["definition"], first["definition"]);
    // A second file with the same pipeline is a mistake; alone, it is right.
    place.write("pipelines/twin.yaml", &PASSES.replace("well", "twice"));
    daemon.wait_for_line("`passes` is defined in");
    assert_eq!(api.get("/v1/pipelines/passes").await["version"], 4);
    std::fs::remove_file(place.path("pipelines/passes.yaml")).expect("there");
    until_registered(&api, "/v1/pipelines/passes", 5).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_the_quota_has_no_room_for_stops_no_start() {
    let place = Place::new();
    place.write("stagegate.toml", "[engine.tenants.default]\nmax_versions = 1\n");
    std::fs::create_dir(place.path("pipelines")).expect("writable");
    place.write("pipelines/a.yaml", PASSES);
    place.write("pipelines/b.yaml", HOLDS);
    let mut daemon = place.serve(&["--pipelines", "pipelines"], &[]).await;
    let told = |daemon: &mut crate::support::Daemon| {
        daemon.log().iter().filter(|line| line.contains("is tried again")).count()
    };
    assert_eq!(told(&mut daemon), 1);
    assert!(daemon.log().iter().any(|line| line.contains("SG0214") && line.contains("b.yaml")));
    let api = Api::new(&daemon.base, None);
    assert_eq!((api.status("/v1/pipelines/passes").await, api.status("/v1/pipelines/holds").await), (200, 404));
    // Beside it, changes go on.
    std::fs::remove_file(place.path("pipelines/b.yaml")).expect("there");
    daemon.wait_for_line("the file is gone");
    assert_eq!(told(&mut daemon), 1);
}

#[test]
fn a_directory_with_mistakes_stops_the_daemon_which_tells_all_of_them() {
    let place = Place::new();
    std::fs::create_dir(place.path("pipelines")).expect("writable");
    place.write("pipelines/a.yaml", "name: a\nstages: [{ id: one, promt: hi }]\n");
    place.write("pipelines/b.json", "{\"name\": \"b\"}");
    place.write("pipelines/c.yaml", PASSES);
    place.write("pipelines/d.yaml", PASSES);
    let (code, _, stderr) = place.run(&["serve", "--listen", "127.0.0.1:0", "--pipelines", "pipelines"]);
    assert_eq!(code, 2, "{stderr}");
    for part in ["a.yaml:2:", "SG0102", "b.json", "`passes` is defined in"] {
        assert!(stderr.contains(part), "{part}: {stderr}");
    }
    let (code, _, stderr) = place.run(&["serve", "--listen", "127.0.0.1:0", "--pipelines", "nowhere"]);
    assert!(code == 2 && stderr.contains("--pipelines: nowhere"), "{stderr}");
}

#[test]
fn a_starter_pipeline_is_valid_and_runs_as_it_says() {
    let place = Place::new();
    let (code, _, stderr) = place.run(&["init"]);
    assert_eq!(code, 0, "{stderr}");
    let starter = std::fs::read_to_string(place.path("pipeline.yaml")).expect("written");
    let (code, stdout, _) = place.run(&["validate", "pipeline.yaml"]);
    assert_eq!(code, 0, "{stdout}");
    let line = starter.lines().find_map(|line| line.strip_prefix("#   stagegate run ")).expect("it says how");
    let script = format!("exec {} run {line}", binary());
    let output = place.stagegate_in("bash", &["-c", &script]);
    assert_eq!(output.0, 0, "{}", output.2);
    assert!(read(&output.1)["summary"].is_string(), "{}", output.1);
    let (code, _, stderr) = place.run(&["init"]);
    assert!(code == 2 && stderr.contains("--force"), "{stderr}");
    assert_eq!(std::fs::read_to_string(place.path("pipeline.yaml")).expect("there"), starter);
}

#[test]
fn a_seed_brings_runs_of_every_outcome_and_only_once() {
    let place = Place::new();
    let seed = |arguments: &[&str]| {
        let (code, stdout, stderr) = place.run(&[&["seed", "--output", "json"], arguments].concat());
        assert_eq!(code, 0, "{stderr}");
        read(&stdout)
    };
    let first = seed(&["--runs", "10"]);
    assert_eq!(first["states"], json!({ "succeeded": 7, "failed": 1, "waiting": 1, "cancelled": 1 }), "{first}");
    assert_eq!((&first["new"], &seed(&["--runs", "10"])["new"]), (&json!(10), &json!(0)));
    assert_eq!(seed(&["--runs", "12"])["new"], 2);
    assert_eq!(seed(&["--runs", "10", "--seed", "2"])["new"], 10);
    let of_another = seed(&["--runs", "5", "--tenant", "acme"]);
    assert_eq!(of_another["new"], 5, "tenants are apart: {of_another}");
    // The key of each command is revoked when it ends.
    let (_, keys, _) = place.run(&["keys", "list", "--json"]);
    for key in read(&keys).as_array().expect("a list") {
        assert!(key["state"].as_str().is_some_and(|state| state.starts_with("revoked")), "{key}");
    }
}

#[test]
fn a_password_in_an_address_is_not_told_by_any_command() {
    let place = Place::new();
    for address in ["http://me:hunter2@127.0.0.1:1", "me:hunter2@127.0.0.1:1", "http://me:hunter2@"] {
        for arguments in [["healthcheck", "--url", address].as_slice(), &["runs", "list", "--server", address]] {
            let (code, stdout, stderr) = place.run(arguments);
            assert!(code > 0 && !format!("{stdout}{stderr}").contains("hunter2"), "{arguments:?}: {stdout}{stderr}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_takes_up_no_run_that_is_not_its_own() {
    let place = Place::new();
    let daemon = place.serve(&[], &[]).await;
    let api = Api::new(&daemon.base, None);
    api.register(HOLDS).await;
    let run = api.submit("holds", json!({})).await;
    api.follow(&run, 0, |event| event.kind.name() == "run.waiting").await;
    assert_eq!(daemon.end("TERM").0, 0);
    let (code, _, stderr) = place.run(&["seed", "--runs", "1"]);
    assert!(code == 2 && stderr.contains("`holds` of tenant `default`") && stderr.contains("--data-dir"), "{stderr}");
    let (code, _, stderr) = place.run(&["seed", "--runs", "1", "--data-dir", "other"]);
    assert_eq!(code, 0, "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_fills_a_daemon() {
    let place = Place::new();
    let daemon = place.serve(&[], &[]).await;
    let (code, stdout, stderr) = on(&place, &daemon, &["seed", "--runs", "5"]);
    assert!(code == 0 && stdout.contains("waiting"), "{stdout}{stderr}");
    let runs = Api::new(&daemon.base, None).get("/v1/runs?label=seed:1").await;
    assert_eq!(runs["items"].as_array().map(Vec::len), Some(5));
}

#[test]
fn one_shot_runs_leave_no_dead_replicas() {
    let place = Place::new();
    place.write("p.yaml", PASSES);
    for _ in 0..2 {
        assert_eq!(place.run(&["run", "p.yaml"]).0, 0);
    }
    let (_, listed, _) = place.run(&["replicas", "--json"]);
    assert_eq!(read(&listed)["replicas"], json!([]));
    let (_, all, _) = place.run(&["replicas", "--all"]);
    assert!(all.contains("left") && !all.contains("dead"), "{all}");
}

#[test]
fn a_run_is_told_as_json_however_it_ends() {
    let place = Place::new();
    place.write("passes.yaml", PASSES);
    place.write("holds.yaml", HOLDS);
    place.write("fails.yaml", &HOLDS.replace("on_fail: hold", "on_fail: fail").replace("name: holds", "name: fails"));
    for (file, exit_code, state, stage) in [
        ("passes.yaml", 0, "succeeded", "succeeded"),
        ("fails.yaml", 1, "failed", "failed"),
        ("holds.yaml", 4, "waiting", "held"),
    ] {
        let (code, stdout, stderr) = place.run(&["run", file, "--output", "json"]);
        assert_eq!(code, exit_code, "{stderr}");
        let told = read(&stdout);
        assert_eq!((&told["state"], &told["stages"][0]["state"]), (&json!(state), &json!(stage)), "{told:#}");
        assert!(told["id"].is_string() && told["cost_usd"].is_number(), "{told:#}");
        assert_eq!(told["output"].is_null(), state != "succeeded", "{told:#}");
    }
}

/// With a data directory that needs quotes, and a tenant that an open daemon does not serve.
#[tokio::test(flavor = "multi_thread")]
async fn the_commands_that_a_held_run_prints_work_as_they_are_pasted() {
    for tenant in ["default", "acme"] {
        let place = Place::new();
        let port =
            std::net::TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a port").port();
        let config = std::fs::read_to_string(place.path("stagegate.toml")).expect("there");
        place.write("stagegate.toml", &format!("[http]\nlisten = '127.0.0.1:{port}'\n{config}"));
        place.write("p.yaml", HOLDS);
        let (code, _, stderr) = place.run(&["run", "p.yaml", "--data-dir", "it's my data", "--tenant", tenant]);
        assert_eq!(code, 4, "{stderr}");
        let lines: Vec<&str> = stderr.lines().map(str::trim).collect();
        let line = |part: &str| lines.iter().find(|line| line.contains(part)).copied().unwrap_or_default().to_owned();
        let key = line("keys create");
        assert_eq!(key.is_empty(), tenant == "default", "{stderr}");
        let script = format!(
            "{key}\n{} --log-format json & PID=$!\ntrap 'kill $PID; wait $PID' EXIT\n\
             until {} healthcheck >/dev/null 2>&1; do kill -0 $PID; sleep 0.1; done\n{}\n",
            line(" serve"),
            binary(),
            line("runs approve"),
        );
        let (code, _, told) = place.stagegate_in("bash", &["-euc", &script]);
        assert_eq!(code, 0, "{script}\n{told}");
        assert!(told.contains("stage one is approved"), "{told}");
    }
}

#[test]
fn errors_are_explained_and_manual_pages_and_completions_are_made_without_a_network() {
    let place = Place::new();
    let (code, page, _) = place.run(&["explain", "sg0200"]);
    assert!(code == 0 && page.starts_with("# SG0200") && page.contains("## What to do"), "{page}");
    let (code, list, _) = place.run(&["explain"]);
    assert!(code == 0 && list.lines().any(|line| line.starts_with("SG0303")), "{list}");
    assert_eq!(place.run(&["explain", "SG9999"]).0, 2);
    let (code, _, stderr) = place.run(&["man", "man"]);
    assert_eq!(code, 0, "{stderr}");
    for page in ["stagegate.1", "stagegate-run.1", "stagegate-runs-list.1"] {
        assert!(place.path("man").join(page).is_file(), "{page}");
    }
    let (_, script, _) = place.run(&["completions", "bash"]);
    for value in ["succeeded", "SG0303", "operator", "pretty"] {
        assert!(script.contains(value), "{value}");
    }
}

#[test]
fn a_migration_tells_what_it_applied() {
    let place = Place::new();
    let (code, first, stderr) = place.run(&["migrate"]);
    assert!(code == 0 && first.lines().count() >= 5 && first.starts_with("applied 0001"), "{first}{stderr}");
    let (code, again, stderr) = place.run(&["migrate"]);
    assert!(code == 0 && again.is_empty() && stderr.contains("nothing to apply"), "{again}{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hang_up_ends_no_daemon() {
    let place = Place::new();
    let mut daemon = place.serve(&[], &[]).await;
    daemon.signal("HUP");
    daemon.wait_for_line("SIGHUP");
    assert_eq!(Api::new(&daemon.base, None).status("/readyz").await, 200);
    assert_eq!(daemon.end("TERM").0, 0);
}

/// What is of no use without its terminal ends with it.
#[test]
fn a_hang_up_ends_the_demo() {
    let place = Place::new();
    let mut child = Command::new(binary())
        .arg("demo")
        .current_dir(place.path(""))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the binary starts");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains("The daemon stays up")));
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-HUP", &pid]).status().expect("kill is there").success());
    assert_eq!(lines.filter(|line| line.contains("panicked")).count(), 0);
    assert!(child.wait().expect("it ends").success());
}
