//! The documentation against what it is about.

use std::{collections::BTreeSet, path::PathBuf};

use serde_json::Value;
use stagegate_core::Code;

use crate::{read, root};

/// Every code on a page of its own, and every page a code's.
#[test]
fn every_error_code_has_its_page() {
    let folder = root().join("docs/errors");
    let mut pages: BTreeSet<String> = std::fs::read_dir(folder)
        .expect("docs/errors")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
        .collect();
    assert!(pages.remove("README.md"), "the index");
    for code in Code::ALL {
        assert!(pages.remove(&format!("{code}.md")), "docs/errors/{code}.md is missing");
        let page = read(&format!("docs/errors/{code}.md"));
        let title = page.lines().next().expect("a line");
        assert_eq!(title, format!("# {code}: {}", code.title()));
        for part in ["## What it means", "## Why it happens", "## What to do", "## Example"] {
            assert!(page.contains(part), "{code}: no `{part}`");
        }
        let word = format!("`{code:?}` · ");
        assert!(page.contains(&word), "{code}: `{word}`");
    }
    assert!(pages.is_empty(), "pages of no code: {pages:?}");
}

#[test]
fn the_index_lists_every_code_with_its_status() {
    let index = read("docs/errors/README.md");
    for code in Code::ALL {
        let row = format!("| [{code}]({code}.md) | {} | {} |", code.status(), code.title());
        assert!(index.contains(&row), "{row}");
    }
    assert_eq!(index.matches("](SG").count(), Code::ALL.len());
}

/// The examples are what the API would say: a problem, or a run's failure.
#[test]
fn the_examples_on_the_pages_are_of_their_code() {
    for code in Code::ALL {
        let page = read(&format!("docs/errors/{code}.md"));
        let (_, rest) = page.split_once("```json\n").unwrap_or_else(|| panic!("{code}: no JSON"));
        let (json, _) = rest.split_once("```").expect("closed");
        let example: Value = serde_json::from_str(json).unwrap_or_else(|error| panic!("{code}: {error}"));
        let named = example["code"].as_str().expect("a code");
        let shown = Code::parse(named).unwrap_or_else(|| panic!("{code}: {named}"));
        let inside = example["violations"].as_array().into_iter().flatten().any(|v| v["code"] == code.as_str());
        assert!(shown == *code || inside, "{code}: an example of {shown}");
        if example.get("status").is_some() {
            assert_eq!((&example["status"], &example["title"]), (&shown.status().into(), &shown.title().into()));
            let keys: Vec<_> = example.as_object().expect("an object").keys().map(String::as_str).collect();
            assert_eq!(keys, ["type", "title", "status", "detail", "code", "request_id", "violations"], "{code}");
        }
    }
}

/// No link of the documentation leads nowhere.
#[test]
fn links_between_pages_lead_somewhere() {
    let mut pages = vec![root().join("README.md")];
    let mut folders = vec![root().join("docs")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("a folder") {
            let path: PathBuf = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                pages.push(path);
            }
        }
    }
    let mut broken = Vec::new();
    for page in pages {
        let Ok(text) = std::fs::read_to_string(&page) else { continue };
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = link.split(['#', ' ']).next().unwrap_or_default();
            if target.is_empty() || target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let folder = page.parent().expect("a folder");
            // Only what is meant as a path: code in examples also has brackets before parentheses.
            let path_like = target.bytes().all(|b| b.is_ascii_alphanumeric() || b"./_-".contains(&b));
            if path_like && !folder.join(target).exists() {
                broken.push(format!("{}: {target}", page.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}
