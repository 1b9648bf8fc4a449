//! Promises of `run` and `plan`: one run in this process, whose cache outlives it.

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

use serde_json::{Value, json};
use stagegate_testkit::provider::{FakeProvider, Reply, contains};

use crate::support::{Place, binary, repository};

const PIPELINE: &str = "\
name: two
input: { type: object, required: [topic], properties: { topic: { type: string } } }
defaults: { model: sim/quick }
stages:
  - { id: outline, prompt: 'Outline {{ input.topic }}' }
  - { id: text, needs: [outline], prompt: 'Write: {{ stages.outline.output }}' }
output: { text: '{{ stages.text.output }}' }
";

fn place() -> Place {
    let place = Place::new();
    place.write("two.yaml", PIPELINE);
    place
}

#[test]
fn the_result_alone_goes_to_stdout_and_a_second_run_buys_nothing() {
    let place = place();
    let arguments = ["run", "two.yaml", "--input", "{\"topic\": \"tea\"}"];
    let (code, first, progress) = place.run(&arguments);
    assert_eq!(code, 0, "{progress}");
    let result: Value = serde_json::from_str(&first).expect("stdout is the result");
    assert!(result["text"].as_str().is_some_and(|text| text.contains("imulated")), "{first}");
    assert!(progress.contains("✓ outline") && progress.contains("✓ text"), "{progress}");
    assert!(progress.contains("succeeded in") && progress.contains("2 calls"), "{progress}");

    let (code, second, progress) = place.run(&arguments);
    assert_eq!((code, &second), (0, &first), "the same answers, from the cache of an earlier process");
    assert!(progress.contains("2 cache hits saved $") && !progress.contains("calls,"), "{progress}");

    let (code, _, progress) = place.run(&["run", "two.yaml", "--set", "topic=tea", "--no-cache"]);
    assert!(code == 0 && progress.contains("2 calls"), "{progress}");
    let (code, _, progress) = place.run(&["run", "two.yaml", "--set", "topic=tea", "--tenant", "other"]);
    assert!(code == 0 && progress.contains("2 calls"), "another tenant's cache is another one: {progress}");
}

#[test]
fn a_plan_spends_nothing_and_knows_what_is_cached() {
    let place = place();
    let plan = |arguments: &[&str]| {
        let (code, stdout, stderr) = place.run(&[&["plan", "two.yaml", "--set", "topic=tea"], arguments].concat());
        assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
        stdout
    };
    let json = |text: &str| serde_json::from_str::<Value>(text).expect("stdout is JSON");
    let before = json(&plan(&["--json"]));
    assert_eq!(
        (&before["stages"][0]["outcome"], &before["critical_path"]),
        (&json!("buy"), &json!(["outline", "text"]))
    );
    let text = plan(&[]);
    assert!(text.contains("2 to buy, 0 cached") && text.contains("critical path: outline → text"), "{text}");

    assert_eq!(place.run(&["run", "two.yaml", "--set", "topic=tea"]).0, 0);
    let after = json(&plan(&["--json"]));
    assert_eq!((&after["stages"][1]["outcome"], &after["tokens"]), (&json!("hit"), &json!(0)), "{after:#}");
    let changed = PIPELINE.replace("Write:", "Write well:");
    place.write("two.yaml", &changed);
    let changed = json(&plan(&["--json"]));
    let outcomes: Vec<_> =
        changed["stages"].as_array().expect("stages").iter().map(|stage| &stage["outcome"]).collect();
    assert_eq!(outcomes, ["hit", "buy"]);
}

#[test]
fn a_brief_in_a_file_becomes_the_text_that_is_asked_for() {
    let place = place();
    place.write("brief.md", "# Tea\nHow to make it.\n");
    let (code, _, stderr) = place.run(&["run", "two.yaml", "--input", "@brief.md"]);
    assert_eq!(code, 0, "{stderr}");
    let mut piped = place.stagegate(&["run", "two.yaml", "--input", "-"]);
    let output = piped.write_stdin("# Tea\nHow to make it.\n").output().expect("runs");
    let stderr = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(output.status.success() && stderr.contains("2 cache hits"), "{stderr}");
}

#[test]
fn the_shipped_pipeline_runs_on_the_shipped_brief_as_it_is() {
    let place = Place::new();
    let file = |name: &str| repository().join("docs/examples").join(name).display().to_string();
    let input = format!("@{}", file("brief.md"));
    let (code, stdout, stderr) = place.run(&["run", &file("brief-to-spec.yaml"), "--input", &input]);
    assert_eq!(code, 0, "{stderr}");
    assert!(serde_json::from_str::<Value>(&stdout).expect("JSON")["spec"].is_string(), "{stdout}");
}

#[test]
fn mistakes_exit_with_2_and_change_nothing() {
    let place = place();
    place.write("bad.yaml", "name: bad\nstages: [{ id: one, promt: x }]\n");
    let cases: [(&[&str], &str); 6] = [
        (&["run", "bad.yaml"], "bad.yaml:2:"),
        (&["run", "none.yaml"], "none.yaml: no such file"),
        (&["run", "two.yaml"], "SG0200"),
        (&["run", "two.yaml", "--input", "{\"topic\": }"], "no JSON"),
        (&["run", "two.yaml", "--set", "topic"], "--set key=value"),
        (&["plan", "two.yaml"], "SG0200"),
    ];
    for (arguments, part) in cases {
        let (code, stdout, stderr) = place.run(arguments);
        assert_eq!((code, stdout.as_str()), (2, ""), "{arguments:?}: {stderr}");
        assert!(stderr.contains(part), "{arguments:?}: {part}: {stderr}");
    }
}

#[test]
fn the_exit_code_tells_the_outcome() {
    let place = Place::new();
    let pipeline = |gate: &str, deadline: &str, model: &str| {
        let retry = "retry: { max_attempts: 1 }";
        format!(
            "name: gated\n{deadline}stages:\n  - id: one\n    prompt: hi\n    model: {model}\n    {retry}\n    gate: {gate}\n"
        )
    };
    place.write("fail.yaml", &pipeline("{ checks: [{ min_chars: 99999 }], on_fail: fail }", "", "sim/quick"));
    place.write("hold.yaml", &pipeline("{ checks: [{ min_chars: 99999 }], on_fail: hold }", "", "sim/quick"));
    let (code, stdout, stderr) = place.run(&["run", "fail.yaml"]);
    assert!(code == 1 && stdout.is_empty() && stderr.contains("SG0300") && stderr.contains("✗ one"), "{stderr}");
    let (code, stdout, stderr) = place.run(&["run", "hold.yaml"]);
    assert!(code == 4 && stdout.is_empty() && stderr.contains("runs approve") && stderr.contains("serve"), "{stderr}");
    place.write("stagegate.toml", "[llm.providers.sim.sim]\nlatency = '10m'\n");
    place.write("late.yaml", &pipeline("{}", "deadline: 1s\n", "sim/quick"));
    let (code, stdout, stderr) = place.run(&["run", "late.yaml"]);
    assert!(code == 5 && stdout.is_empty() && stderr.contains("SG0304"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_cancels_the_run() {
    let place = Place::new();
    let provider = FakeProvider::start().await;
    provider.on(contains("hello")).respond(Reply::hang());
    let url = provider.openai_base_url();
    place.write("stagegate.toml", &format!("[llm.providers.fake]\nkind = 'openai'\nbase_url = '{url}'\n"));
    place.write("one.yaml", "name: one\nstages: [{ id: one, prompt: hello, model: fake/m }]\n");
    let mut child = Command::new(binary())
        .args(["run", "one.yaml"])
        .current_dir(place.path(""))
        .env("STAGEGATE_DATA_DIR", place.path("data"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    while provider.call_count() == 0 {
        assert!(child.try_wait().expect("ours").is_none(), "it ended before it asked");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().expect("kill is there").success());
    let told: Vec<String> = BufReader::new(child.stderr.take().expect("piped")).lines().map_while(Result::ok).collect();
    let status = child.wait().expect("it ends");
    assert_eq!(status.code(), Some(3), "{told:#?}");
    assert!(told.iter().any(|line| line.starts_with("cancelled in")), "{told:#?}");
}
