//! Promises of what ships to be copied: every example runs to its end by one command, and the README's commands are
//! those that the tests run.

use std::fs;

use serde_json::Value;

use crate::support::{Place, repository};

/// The examples that end as they should by waiting for a person.
const HELD: [&str; 2] = ["approve.yaml", "review-hold.yaml"];

#[test]
fn every_example_runs_to_its_end_with_the_input_beside_it() {
    let mut count = 0;
    for entry in fs::read_dir(repository().join("docs/examples")).expect("the examples are there") {
        let path = entry.expect("readable").path();
        if path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        let place = Place::new();
        let (file, input) = (path.display().to_string(), format!("@{}", path.with_extension("input.json").display()));
        let arguments = ["run", &file, "--input", &input];
        let (code, stdout, stderr) = place.run(&arguments);
        if HELD.iter().any(|held| path.ends_with(held)) {
            assert_eq!((code, stdout.as_str()), (4, ""), "{file}: {stderr}");
            assert!(stderr.contains("waits for a person"), "{file}: {stderr}");
        } else {
            assert_eq!(code, 0, "{file}: {stderr}");
            assert!(stderr.contains("succeeded in"), "{file}: {stderr}");
            let result: Value =
                serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{file}: {error}: {stdout}"));
            assert!(result.as_object().is_some_and(|result| !result.is_empty()), "{file}: {stdout}");
        }
        count += 1;
    }
    assert_eq!(count, 11);
}

#[test]
fn every_row_of_the_extraction_gives_its_fields() {
    let examples = repository().join("docs/examples");
    let rows = fs::read_to_string(examples.join("lead-extraction.rows.jsonl")).expect("the rows");
    let (place, file) = (Place::new(), examples.join("lead-extraction.yaml").display().to_string());
    for row in rows.lines() {
        let (code, stdout, stderr) = place.run(&["run", &file, "--input", row]);
        assert_eq!(code, 0, "{row}: {stderr}");
        let result: Value = serde_json::from_str(&stdout).expect("JSON");
        for key in ["company", "wish", "urgency", "seats"] {
            assert!(result.get(key).is_some(), "{row}: {stdout}");
        }
    }
}

/// The lines of the page's shell blocks, without their comments.
fn commands(page: &str) -> Vec<String> {
    let blocks = page.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next());
    let lines = blocks.flat_map(str::lines).map(|line| line.split(" #").next().unwrap_or(line).trim().to_owned());
    lines.filter(|line| !line.is_empty()).collect()
}

#[test]
fn the_commands_of_the_readme_are_the_tested_ones() {
    let readme = fs::read_to_string(repository().join("README.md")).expect("the README");
    let commands = commands(&readme);
    // `cargo run -- demo` is what `demo.rs` runs with `--once`; `cargo xtask test` is what runs this.
    assert_eq!(commands[..2], ["cargo run -- demo", "cargo xtask test"]);
    assert!(readme.contains("`--once`"), "the README names the form that ends by itself");
    let aliases = fs::read_to_string(repository().join(".cargo/config.toml")).expect("the aliases");
    assert!(aliases.contains("xtask = "), "{aliases}");
    let checks = fs::read_to_string(repository().join(".ci/run")).expect("the checks");
    assert!(checks.contains("cargo xtask test"), "the second command is what the checks call");

    // Those that spend nothing and end are run here, from where a reader would.
    let place = Place::new();
    let quick = |command: &&String| {
        ["validate ", "plan ", "run "].iter().any(|word| command.starts_with(&format!("stagegate {word}")))
    };
    let quick: Vec<&String> = commands.iter().filter(quick).collect();
    assert_eq!(quick.len(), 3, "{commands:#?}");
    for command in quick {
        let (code, stdout, stderr) = place.shell(command);
        assert_eq!(code, 0, "{command}: {stderr}");
        assert!(!stdout.is_empty(), "{command}");
    }
}

/// Needs curl and jq, as the tour does; where they are missing there is nothing to hold it to.
#[tokio::test(flavor = "multi_thread")]
async fn the_tour_of_the_api_runs_as_it_stands() {
    let there = |tool: &str| std::process::Command::new(tool).arg("--version").output().is_ok();
    assert!(there("curl") && there("jq"), "the tour needs curl and jq: install them, or let `cargo xtask test` do it");
    let place = Place::new();
    let daemon = place.serve(&[], &[]).await;
    let page = fs::read_to_string(repository().join("docs/api.md")).expect("the tour");
    let blocks = page.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next());
    let script = blocks.collect::<String>().replace("http://127.0.0.1:8080", &daemon.base);
    let script = script.replace("/tmp/", &format!("{}/", place.path("").display()));
    // Every status goes to stderr, in order.
    let watch = "curl() { command curl --noproxy '*' -w '%{stderr}%{http_code} ' \"$@\"; }; STAGEGATE_KEY=any\n";
    let (code, stdout, stderr) = place.shell(&format!("{watch}{script}"));
    assert_eq!(code, 0, "{stdout}\n{stderr}");
    let told: Vec<&str> = stderr.split_whitespace().collect();
    let expected =
        "201 200 202 202 200 200 200 200 200 200 200 409 409 409 409 409 409 204 200 200 200 200 200 200 200 200 200";
    assert_eq!(told.join(" "), expected, "{stdout}");
}
