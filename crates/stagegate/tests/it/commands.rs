//! Promises of the commands that need no daemon.

use serde_json::Value;

use crate::support::{Place, repository};

const BAD: &str = "\
name: bad
stages:
  - id: one
    promt: hello
    model: sim/quick
  - id: two
    needs: [three]
    prompt: '{{ stages.one.output }}'
    model: sim/quick
";

const GOOD: &str = "name: good\nstages: [{ id: one, prompt: hello, model: sim/quick }]\n";

#[test]
fn every_mistake_of_every_file_is_told_with_its_place_and_its_mend() {
    let place = Place::new();
    place.write("bad.yaml", BAD);
    place.write("good.yaml", GOOD);
    place.write("broken.yaml", "stages: [");
    std::fs::write(place.path("latin.yaml"), [0x6e, 0xe9]).expect("writable");
    let files = ["validate", "bad.yaml", "good.yaml", "broken.yaml", "latin.yaml", "none.yaml"];
    let (code, stdout, stderr) = place.run(&files);
    assert_eq!(code, 2, "{stdout}{stderr}");
    let line = |start: &str| stdout.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("{stdout}"));
    assert!(line("bad.yaml:4:").contains("SG0102") && line("bad.yaml:4:").contains("prompt"), "{stdout}");
    assert!(stdout.lines().any(|line| line.starts_with("bad.yaml:7:") && line.contains("SG0106")), "{stdout}");
    assert!(line("✓ good.yaml").contains("good is valid (1 stage)"));
    assert!(line("broken.yaml").contains("SG0101"));
    assert!(line("latin.yaml").contains("not UTF-8"));
    assert!(line("none.yaml").contains("no such file"));
    assert!(stderr.contains("mistakes, in 4 files"), "{stderr}");
}

#[test]
fn mistakes_can_be_read_by_programs() {
    let place = Place::new();
    place.write("bad.yaml", BAD);
    place.write("good.yaml", GOOD);
    let (code, stdout, _) = place.run(&["validate", "--json", "bad.yaml", "good.yaml"]);
    let list: Value = serde_json::from_str(&stdout).expect("stdout is JSON");
    assert_eq!((code, &list[0]["valid"], &list[1]["valid"]), (2, &Value::from(false), &Value::from(true)));
    let violation = &list[0]["violations"][0];
    assert!(violation["code"].is_string() && violation["line"].is_u64() && violation["path"].is_string());
    assert_eq!(place.run(&["validate", "good.yaml"]).0, 0);
}

#[test]
fn a_model_that_nobody_serves_is_a_mistake_unless_any_will_do() {
    let place = Place::new();
    let definition = |model: &str| format!("name: m\nstages: [{{ id: one, prompt: hi, model: {model} }}]\n");
    place.write("unknown.yaml", &definition("nobody/x"));
    place.write("keyless.yaml", &definition("openai/gpt-5-mini"));
    let (code, stdout, _) = place.run(&["validate", "unknown.yaml", "keyless.yaml"]);
    assert!(code == 2 && stdout.contains("SG0112") && stdout.contains("SG0113"), "{stdout}");
    assert!(stdout.contains("OPENAI_API_KEY"), "the mend names the variable: {stdout}");
    assert_eq!(place.run(&["validate", "--any-model", "unknown.yaml", "keyless.yaml"]).0, 0);
    let keyed = place.stagegate(&["validate", "keyless.yaml"]).env("OPENAI_API_KEY", "sk-test").output().expect("runs");
    assert!(keyed.status.success());
}

#[test]
fn the_shipped_examples_are_valid() {
    let place = Place::new();
    let directory = repository().join("docs/examples");
    let mut files: Vec<String> = std::fs::read_dir(directory)
        .expect("the examples are there")
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "yaml"))
        .map(|path| path.display().to_string())
        .collect();
    files.sort();
    assert!(!files.is_empty());
    let mut arguments = vec!["validate"];
    arguments.extend(files.iter().map(String::as_str));
    let (code, stdout, stderr) = place.run(&arguments);
    assert_eq!(code, 0, "{stdout}{stderr}");
}

#[test]
fn the_schema_describes_definitions() {
    let (code, stdout, stderr) = Place::new().run(&["schema"]);
    let schema: Value = serde_json::from_str(&stdout).expect("stdout is JSON");
    assert!(code == 0 && stderr.is_empty() && schema["properties"]["stages"].is_object(), "{stderr}");
}

#[test]
fn the_configuration_tells_where_each_value_came_from_and_no_secret() {
    let place = Place::new();
    let mut command = place.stagegate(&["config", "--log", "debug"]);
    let output = command.env("DATABASE_URL", "postgres://me:hunter2@db/x").env("STAGEGATE_HTTP__LISTEN", "127.0.0.1:9");
    let stdout = String::from_utf8(output.output().expect("runs").stdout).expect("UTF-8");
    let line = |part: &str| stdout.lines().find(|line| line.starts_with(part)).unwrap_or_else(|| panic!("{stdout}"));
    assert!(line("listen = \"127.0.0.1:9\"").ends_with("# variable STAGEGATE_HTTP__LISTEN"));
    assert!(line("database_url = \"[redacted]\"").ends_with("# variable DATABASE_URL"));
    assert!(line("filter = \"debug\"").ends_with("# flag --log"));
    assert!(line("latency = \"1ms\"").ends_with("# file stagegate.toml"));
    assert!(line("auth = ").ends_with("# default") && !stdout.contains("hunter2"));
}

#[test]
fn a_wrong_configuration_is_refused_by_every_command_with_all_its_mistakes() {
    let place = Place::new();
    place.write("stagegate.toml", "[http]\nlistn = '127.0.0.1:1'\n[engine]\nmax_runs = -1\n");
    for arguments in [&["config"][..], &["serve"], &["migrate"], &["validate", "x.yaml"], &["keys", "list"]] {
        let (code, stdout, stderr) = place.run(arguments);
        assert_eq!((code, stdout.as_str()), (2, ""), "{arguments:?}: {stderr}");
        for part in ["error: SG0500", "stagegate.toml: http.listn", "did you mean `listen`?", "engine.max_runs"] {
            assert!(stderr.contains(part), "{arguments:?}: {part}: {stderr}");
        }
        assert!(stderr.contains("stagegate explain SG0500"), "{stderr}");
    }
}

#[test]
fn every_command_has_help_with_examples() {
    let place = Place::new();
    let (code, help, _) = place.run(&["--help"]);
    assert!(code == 0 && help.contains("Start here"), "{help}");
    let commands = ["demo", "run", "validate", "plan", "serve", "keys", "migrate", "config", "schema", "healthcheck"];
    for command in commands.into_iter().chain(["completions"]) {
        assert!(help.contains(&format!("\n  {command} ")), "{command} is listed: {help}");
        let (code, text, stderr) = place.run(&[command, "--help"]);
        assert!(code == 0 && stderr.is_empty() && text.contains("Examples:"), "{command}: {text}");
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{command}: a line is too wide: {text}");
    }
}

#[test]
fn a_slip_on_the_command_line_exits_with_2_and_a_hint() {
    let place = Place::new();
    let (code, stdout, stderr) = place.run(&["valdate", "x.yaml"]);
    assert!(code == 2 && stdout.is_empty() && stderr.contains("validate"), "{stderr}");
    assert_eq!(place.run(&["run"]).0, 2);
    let (code, _, stderr) = place.run(&["serve", "--listen", "nowhere"]);
    assert!(code == 2 && stderr.contains("ADDRESS:PORT"), "{stderr}");
}

#[test]
fn completions_are_made_for_every_shell() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let (code, stdout, stderr) = place.run(&["completions", shell]);
        assert!(code == 0 && stderr.is_empty() && stdout.contains("healthcheck"), "{shell}");
    }
}

#[test]
fn a_closed_pipe_is_no_panic() {
    let place = Place::new();
    let script = format!("{} schema | head -c 1 >/dev/null; exit ${{PIPESTATUS[0]}}", crate::support::binary());
    let output = std::process::Command::new("bash").arg("-c").arg(script).current_dir(place.path("")).output();
    let output = output.expect("bash is there");
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""));
}

#[test]
fn a_health_check_of_nobody_fails_in_one_line() {
    let place = Place::new();
    let (code, stdout, stderr) = place.run(&["healthcheck", "--url", "http://127.0.0.1:1"]);
    assert!(code == 1 && stdout.is_empty() && stderr.starts_with("error: SG0009"), "{stderr}");
    assert_eq!(place.run(&["healthcheck", "--url", "nonsense"]).0, 2);
}
