//! The figures: every measure with its name, its value and what it is made of. To add one: a line in [`measure`], and its
//! ceiling with `cargo xtask ratchet --lower`.

use anyhow::Result;
use serde::Serialize;

use super::{
    circles::{self, Circle},
    dependencies, kinds, shape,
    sources::{Crate, Scope, Source, Workspace},
    waits::{self, Sleep},
};

/// A file's and a function's lines that fit a sitting and a screen.
const FILE_LINES_MAX: usize = 600;
const FUNCTION_LINES_MAX: usize = 70;

/// One measure of the workspace.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Measure {
    pub(super) name: &'static str,
    /// What it counts, in a few words.
    pub(super) what: &'static str,
    /// What to do if it rises.
    #[serde(skip)]
    pub(super) advice: &'static str,
    /// Whether it counts `found`; else it is the size of the largest.
    #[serde(skip)]
    pub(super) is_count: bool,
    pub(super) value: usize,
    pub(super) found: Vec<Found>,
}

/// One thing that a figure counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Found {
    /// The same as long as it stays where it is.
    pub(super) name: String,
    /// Its file, with a line where one fits.
    pub(super) place: String,
    pub(super) note: String,
}

impl Found {
    fn new(name: impl Into<String>, place: impl Into<String>, note: impl Into<String>) -> Self {
        Self { name: name.into(), place: place.into(), note: note.into() }
    }
}

impl Measure {
    fn count(name: &'static str, what: &'static str, advice: &'static str, found: Vec<Found>) -> Self {
        Self { name, what, advice, is_count: true, value: found.len(), found }
    }
}

/// Every figure, in the order in which it is shown.
pub(super) fn measure(workspace: &Workspace, circles: &[Circle]) -> Result<Vec<Measure>> {
    let mut figures = vec![files_in_circles(circles), type_names_twice(workspace)];
    figures.extend(lengths(workspace));
    figures.push(unused_dependencies(workspace));
    figures.push(files_naming_provider_kinds(workspace)?);
    figures.extend(sleeps(workspace));
    Ok(figures)
}

/// Every circle of the workspace.
pub(super) fn every_circle(workspace: &Workspace) -> Vec<Circle> {
    workspace.crates.iter().flat_map(circles::find).collect()
}

fn files_in_circles(circles: &[Circle]) -> Measure {
    let found = circles.iter().flat_map(|circle| {
        let first = circle.files.first().map(|file| short(file)).unwrap_or_default();
        let note = format!("circle of {} with {first}", circle.files.len());
        circle.files.iter().map(move |file| Found::new(file, file, note.clone()))
    });
    Measure::count(
        "files_in_circles",
        "files that need each other",
        "move what both need into a file below them, or hand it in as an argument",
        found.collect(),
    )
}

/// A path without the part that all of a crate share.
fn short(path: &str) -> String {
    path.split_once("/src/").map_or(path, |(_, rest)| rest).to_owned()
}

fn type_names_twice(workspace: &Workspace) -> Measure {
    let mut found = Vec::new();
    for package in &workspace.crates {
        for (name, places) in shape::types(package).into_iter().filter(|(_, places)| places.len() > 1) {
            let others: Vec<String> = places[1..].iter().map(|place| short(place)).collect();
            let name = format!("{}: {name}", package.name);
            found.push(Found::new(name, &places[0], format!("also {}", others.join(", "))));
        }
    }
    Measure::count(
        "type_names_twice",
        "type names with two meanings in a crate",
        "give the newer type a name that says what it adds",
        found,
    )
}

fn lengths(workspace: &Workspace) -> Vec<Measure> {
    let sources = || workspace.crates.iter().flat_map(|package| &package.sources);
    let (mut files, mut test_files, mut functions, mut test_functions) = (vec![], vec![], vec![], vec![]);
    for source in sources() {
        let (code, tests) = source.lengths();
        if source.scope == Scope::Tests {
            test_files.push((tests, source.path.clone(), source.path.clone()));
        } else {
            files.push((code, source.path.clone(), source.path.clone()));
        }
        let parts = [(&source.code, &mut functions), (&source.tests, &mut test_functions)];
        for (file, found) in parts {
            found.extend(shape::functions(file).into_iter().map(|function| {
                let name = format!("{}: {}", source.path, function.name);
                (function.lines, name, format!("{}:{}", source.path, function.line))
            }));
        }
    }
    let file = "split off the second thing that the file does";
    let function = "name a step of it and make that a function";
    let mut figures = Vec::new();
    for (longest, long, what, most, advice, sizes) in [
        (
            "longest_file",
            "long_files",
            ["lines of the longest file", "files over 600 lines"],
            FILE_LINES_MAX,
            file,
            files,
        ),
        (
            "longest_function",
            "long_functions",
            ["lines of the longest function", "functions over 70 lines"],
            FUNCTION_LINES_MAX,
            function,
            functions,
        ),
        (
            "longest_test_file",
            "long_test_files",
            ["lines of the longest test file", "test files over 600 lines"],
            FILE_LINES_MAX,
            file,
            test_files,
        ),
        (
            "longest_test_function",
            "long_test_functions",
            ["lines of the longest test function", "test functions over 70 lines"],
            FUNCTION_LINES_MAX,
            function,
            test_functions,
        ),
    ] {
        figures.extend(longest_and_long([longest, long], what, most, advice, sizes));
    }
    figures
}

type Size = (usize, String, String);

fn longest_and_long(
    names: [&'static str; 2],
    what: [&'static str; 2],
    most: usize,
    advice: &'static str,
    mut sizes: Vec<Size>,
) -> [Measure; 2] {
    sizes.sort_by(|one, other| other.0.cmp(&one.0).then_with(|| one.1.cmp(&other.1)));
    let found = |(lines, name, place): &Size| Found::new(name, place, format!("{lines} lines"));
    let longest = Measure {
        name: names[0],
        what: what[0],
        advice,
        is_count: false,
        value: sizes.first().map_or(0, |size| size.0),
        found: sizes.first().map(found).into_iter().collect(),
    };
    let long = sizes.iter().filter(|size| size.0 > most).map(found).collect();
    [longest, Measure::count(names[1], what[1], advice, long)]
}

fn unused_dependencies(workspace: &Workspace) -> Measure {
    let found = dependencies::find(workspace).into_iter().map(|unused| {
        let folder = unused.package.map(|package| format!("crates/{package}/")).unwrap_or_default();
        let manifest = format!("{folder}Cargo.toml");
        Found::new(format!("{manifest}: {}", unused.dependency), manifest, unused.advice)
    });
    Measure::count(
        "unused_dependencies",
        "dependencies that no code names",
        "do what stands beside it; a library that is named in no path is not used",
        found.collect(),
    )
}

fn files_naming_provider_kinds(workspace: &Workspace) -> Result<Measure> {
    let found = kinds::find(workspace)?.into_iter().map(|(file, kinds)| {
        let line = kinds.values().min().copied().unwrap_or(1);
        let kinds: Vec<String> = kinds.into_keys().collect();
        Found::new(&file, format!("{file}:{line}"), kinds.join(", "))
    });
    Ok(Measure::count(
        "files_naming_provider_kinds",
        "files beside its own that name a provider kind",
        "ask the kind (a method, a field of its descriptor) instead of naming it",
        found.collect(),
    ))
}

fn sleeps(workspace: &Workspace) -> [Measure; 2] {
    let (mut polls, mut fixed) = (vec![], vec![]);
    for (source, sleep) in workspace.crates.iter().flat_map(sleeps_of) {
        let name = format!("{}: {}", source.path, sleep.function);
        let found = Found::new(name, format!("{}:{}", source.path, sleep.line), "");
        (if sleep.polls { &mut polls } else { &mut fixed }).push(found);
    }
    [
        Measure::count(
            "fixed_waits_in_tests",
            "sleeps of tests for a fixed time",
            "wait for what the test can see: a channel, a notification, an event, a state",
            fixed,
        ),
        Measure::count(
            "polls_in_tests",
            "sleeps of tests that poll",
            "wait with the helper that is there, or be told instead of asking",
            polls,
        ),
    ]
}

/// The sleeps of a crate's tests; all of the test kit is for tests.
fn sleeps_of(package: &Crate) -> impl Iterator<Item = (&Source, Sleep)> {
    let all = package.name == "stagegate-testkit";
    package.sources.iter().flat_map(move |source| {
        let code = if all { waits::sleeps(&source.code) } else { Vec::new() };
        code.into_iter().chain(waits::sleeps(&source.tests)).map(move |sleep| (source, sleep))
    })
}
