//! The pipelines that ship: each is valid and has an input that fits.

use std::{fs, path::PathBuf};

use serde_json::Value;
use stagegate_core::{Pipeline, pipeline::Bundle};

use crate::{Served, valid};

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
        let mut bundle = Bundle::from(&fs::read_to_string(&path).expect("text"));
        for name in bundle.file_names() {
            bundle.files.insert(name.clone(), fs::read_to_string(directory().join(name)).expect("a file beside it"));
        }
        let pipeline = Pipeline::parse_bundle(&bundle, &Served)
            .unwrap_or_else(|mistakes| panic!("{}: {mistakes:#?}", path.display()));
        let input = fs::read_to_string(path.with_extension("input.json")).expect("an input beside it");
        let input: Value = serde_json::from_str(&input).expect("JSON");
        assert_eq!(pipeline.check_input(&input), Ok(()), "{}", path.display());
        assert!(pipeline.check_input(&Value::Null).is_err(), "{}", path.display());
        count += 1;
    }
    assert_eq!(count, 11);
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

#[test]
fn every_row_of_the_extraction_fits_its_pipeline() {
    let pipeline = valid(&fs::read_to_string(directory().join("lead-extraction.yaml")).expect("text"));
    let rows = fs::read_to_string(directory().join("lead-extraction.rows.jsonl")).expect("rows");
    assert!(rows.lines().count() >= 3);
    for row in rows.lines() {
        let mut row: Value = serde_json::from_str(row).expect("JSON");
        pipeline.fill_defaults(&mut row);
        assert_eq!(pipeline.check_input(&row), Ok(()), "{row}");
        assert!(row["languages"].is_array(), "the default is filled in: {row}");
    }
}
