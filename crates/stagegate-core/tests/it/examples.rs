//! The pipelines that ship: each is valid and has an input that fits.

use std::{fs, path::PathBuf};

use serde_json::Value;

use crate::valid;

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/examples")
}

#[test]
fn every_example_is_valid_and_has_an_input_that_fits() {
    let mut count = 0;
    for entry in fs::read_dir(directory()).expect("docs/examples") {
        let path = entry.expect("entry").path();
        if path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        let pipeline = valid(&fs::read_to_string(&path).expect("text"));
        let input = fs::read_to_string(path.with_extension("input.json")).expect("an input beside it");
        let input: Value = serde_json::from_str(&input).expect("JSON");
        assert_eq!(pipeline.check_input(&input), Ok(()), "{}", path.display());
        assert!(pipeline.check_input(&Value::Null).is_err(), "{}", path.display());
        count += 1;
    }
    assert_eq!(count, 5);
}

#[test]
fn the_canonical_pipeline_has_five_stages_of_which_the_last_two_run_side_by_side() {
    let pipeline = valid(&fs::read_to_string(directory().join("brief-to-spec.yaml")).expect("text"));
    let ids: Vec<_> = pipeline.stages.iter().map(|stage| stage.id.as_str()).collect();
    assert_eq!(ids, ["requirements", "design", "spec", "test-plan", "risk-review"]);
    assert_eq!((&pipeline.stages[3].needs, &pipeline.stages[4].needs), (&vec![0, 2], &vec![2]));
    let brief = fs::read_to_string(directory().join("brief.md")).expect("brief");
    let input = fs::read_to_string(directory().join("brief-to-spec.input.json")).expect("input");
    let input: Value = serde_json::from_str(&input).expect("JSON");
    assert_eq!(input["brief"], brief);
}
