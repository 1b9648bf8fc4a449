//! What arrives at stderr.

use std::{collections::BTreeSet, process::Stdio};

use serde_json::Value;

use crate::child;

fn json_lines(stderr: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(stderr).expect("UTF-8");
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}"))).collect()
}

#[test]
fn every_line_is_json_with_the_ids_and_panics_are_among_them() {
    let output = child::command("json").output().expect("it ran");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = json_lines(&output.stderr);
    let messages: Vec<_> = lines.iter().filter_map(|line| line["msg"].as_str()).collect();
    assert_eq!(messages, ["stage started", "refused: Bearer [redacted]", "panicked: no such stage, said [redacted]"]);
    for line in &lines {
        let ids = ["request_id", "run_id", "stage_id", "tenant"].map(|key| line[key].as_str().unwrap_or_default());
        assert_eq!(ids, ["req_1", "run_7", "spec", "acme"], "{line}");
        assert_eq!(line["attempt"], 3);
    }
    let panic = &lines[2];
    assert_eq!((&panic["level"], &panic["target"]), (&"error".into(), &"panic".into()));
    assert!(panic["fields"]["location"].as_str().is_some_and(|at| at.contains("child.rs:")), "{panic}");
    assert_eq!(panic["fields"]["thread"], "worker");
}

#[test]
fn the_documented_keys_are_those_of_real_lines() {
    let page =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/logging.md")).expect("the page");
    let documented: BTreeSet<_> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`').map(|(key, _)| key.to_owned()))
        .collect();
    let output = child::command("json").output().expect("it ran");
    let seen: BTreeSet<_> = json_lines(&output.stderr)
        .iter()
        .filter_map(Value::as_object)
        .flat_map(|line| line.keys().cloned().collect::<Vec<_>>())
        .collect();
    let rare = BTreeSet::from(["trace_id".to_owned(), "truncated".to_owned()]);
    assert_eq!(documented, &seen | &rare);
}

#[test]
fn pretty_lines_are_plain_text_where_there_is_no_terminal() {
    let output = child::command("pretty").output().expect("it ran");
    let text = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(!text.contains('\u{1b}'), "colours into a pipe: {text}");
    let line = text.lines().find(|line| line.contains("stage started")).expect("the line");
    assert!(line.contains(" INFO ") && line.contains("run_id=run_7") && line.ends_with("tokens=7"), "{line}");
    let coloured = child::command("pretty").env("CLICOLOR_FORCE", "1").output().expect("it ran");
    assert!(coloured.stderr.contains(&0x1b), "asked for, colours are there");
}

#[test]
fn a_closed_stderr_stops_nothing() {
    let mut child = child::command("flood").stderr(Stdio::piped()).spawn().expect("it runs");
    drop(child.stderr.take());
    assert!(child.wait().expect("it ended").success());
}
