//! Every measure, over small sources.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use super::{
    ceilings::{Ceilings, Verdict},
    circles, dependencies,
    figures::{Found, Measure},
    kinds, shape,
    sources::{Crate, Dependency, Scope, Walk, Workspace},
    waits,
};

/// A crate of these files below `src/`, the first of which is the root.
fn package(name: &str, files: &[(&str, &str)]) -> Crate {
    let texts: BTreeMap<String, &str> = files.iter().map(|(path, text)| (format!("/src/{path}"), *text)).collect();
    let mut read = |path: &Path| Ok(texts.get(&*path.to_string_lossy()).map(|text| (*text).to_owned()));
    let mut sources = Vec::new();
    let mut walk = Walk { root: Path::new("/"), scope: Scope::Code, read: &mut read, sources: &mut sources };
    walk.file(Path::new(&format!("/src/{}", files[0].0)), true, &[name.to_owned()]).expect("files that parse");
    Crate { name: name.to_owned(), dependencies: Vec::new(), sources }
}

fn circles_of(files: &[(&str, &str)]) -> Vec<Vec<String>> {
    circles::find(&package("a", files)).into_iter().map(|circle| circle.files).collect()
}

#[test]
fn two_files_that_need_each_other_are_a_circle() {
    let found = circles_of(&[
        ("lib.rs", "mod a; mod b;"),
        ("a.rs", "use crate::b::B; pub struct A(B);"),
        ("b.rs", "pub struct B; fn f() -> Option<super::a::A> { None }"),
    ]);
    assert_eq!(found, [["src/a.rs", "src/b.rs"]]);
}

#[test]
fn a_broken_circle_is_none() {
    let found = circles_of(&[
        ("lib.rs", "mod a; mod b; mod c;"),
        ("a.rs", "use crate::b::B; pub struct A(B);"),
        ("b.rs", "pub struct B(crate::c::C);"),
        ("c.rs", "pub struct C;"),
    ]);
    assert!(found.is_empty(), "{found:?}");
}

#[test]
fn a_circle_is_found_through_re_exports_globs_and_macros() {
    let found = circles_of(&[
        ("lib.rs", "mod a; mod b; mod c; pub use a::A; pub use b::*;"),
        ("a.rs", "pub struct A; fn f() { crate::B::new(); }"),
        ("b.rs", "pub struct B; fn f() { println!(\"{}\", crate::c::made()); }"),
        ("c.rs", "use crate::A; pub fn made() -> A { A }"),
    ]);
    assert_eq!(found, [["src/a.rs", "src/b.rs", "src/c.rs"]]);
}

#[test]
fn a_module_that_uses_its_own_submodule_and_is_used_by_it_is_no_circle() {
    let found = circles_of(&[
        ("lib.rs", "mod a;"),
        ("a.rs", "mod part; pub struct Shared; fn f() { part::run(&Shared) }"),
        ("a/part.rs", "use super::Shared; pub fn run(_: &Shared) {}"),
    ]);
    assert!(found.is_empty(), "{found:?}");
}

#[test]
fn tests_and_re_exports_close_no_circle() {
    let found = circles_of(&[
        ("lib.rs", "mod a; mod b;"),
        ("a.rs", "pub use crate::b::B; #[cfg(test)] mod tests { use crate::b::B; fn f(_: B) {} }"),
        ("b.rs", "use crate::a::A2; pub struct B; fn f(_: A2) {}"),
    ]);
    assert!(found.is_empty(), "{found:?}");
}

#[test]
fn a_local_variable_that_is_named_as_a_module_needs_nothing() {
    let found = circles_of(&[
        ("lib.rs", "mod a; mod b;"),
        ("a.rs", "pub fn f() { let b = 1; drop(b); }"),
        ("b.rs", "pub fn g() { crate::a::f() }"),
    ]);
    assert!(found.is_empty(), "{found:?}");
}

#[test]
fn a_type_name_with_two_meanings_is_found_in_code_alone() {
    let files = [
        ("lib.rs", "mod a; struct Twice; struct Once; #[cfg(test)] mod tests { struct Once; }"),
        ("a.rs", "enum Twice {}\nfn f() { struct Once; }"),
    ];
    let types = shape::types(&package("a", &files));
    assert_eq!(types["Twice"].len(), 2);
    assert_eq!(types["Once"].len(), 1);
}

#[test]
fn functions_are_measured_from_fn_to_brace_and_tests_apart() {
    let text = "/// Says.\n#[inline]\nfn code() {\n    one();\n}\nstruct A;\nimpl A {\n    fn short() {}\n}\n\
                #[cfg(test)]\nmod tests {\n    fn test() {\n    }\n}\n";
    let package = package("a", &[("lib.rs", text)]);
    let source = &package.sources[0];
    let told = |file| {
        let found = shape::functions(file).into_iter();
        found.map(|function| (function.name, function.line, function.lines)).collect::<Vec<_>>()
    };
    assert_eq!(told(&source.code), [("code".to_owned(), 3, 3), ("A::short".to_owned(), 8, 1)]);
    assert_eq!(told(&source.tests), [("test".to_owned(), 12, 2)]);
    assert_eq!(source.lengths(), (9, 5));
    assert_eq!(shape::lines(&package), (8, 5));
}

#[test]
fn a_sleep_in_a_loop_polls_and_one_outside_waits() {
    let text = "async fn t() { sleep(D).await; loop { tokio::select! { () = tokio::time::sleep(D) => {} } } }\n\
                #[tokio::test(start_paused = true)] async fn v() { sleep(D).await; }";
    let found = waits::sleeps(&syn::parse_file(text).expect("Rust"));
    assert_eq!(found.iter().map(|sleep| sleep.polls).collect::<Vec<_>>(), [false, true]);
    assert!(found.iter().all(|sleep| sleep.function == "t"));
}

#[test]
fn a_provider_kind_is_found_where_it_does_not_belong() {
    let files = [
        ("lib.rs", "mod config; mod providers; /// Like openai.\nmod plain;"),
        ("config.rs", "enum ProviderKind { Openai, Sim }"),
        ("providers/mod.rs", "mod openai;"),
        ("providers/openai.rs", "struct OpenAi; const URL: &str = \"openai.com\";"),
        ("plain.rs", "fn similar() { simple(\"a simulation\") }"),
    ];
    let other = package("stagegate", &[("lib.rs", "fn key() { variable(\"OPENAI_API_KEY\", OpenAi) }")]);
    let found =
        kinds::find(&Workspace { crates: vec![package("stagegate-llm", &files), other], ..Workspace::default() });
    let found = found.expect("kinds");
    assert_eq!(found.keys().collect::<Vec<_>>(), ["src/config.rs", "src/lib.rs"]);
    assert_eq!(found["src/lib.rs"], BTreeMap::from([("openai".to_owned(), 1)]));
}

#[test]
fn a_dependency_that_no_path_begins_with_is_unused() {
    let text = "use named::A; fn f() { println!(\"{}\", in_a_macro::a()); unused(); }\n\
                #[cfg(test)] mod tests { use of_tests::B; }";
    let mut package = package("a", &[("lib.rs", text)]);
    let line = |name: &str, scope| Dependency {
        name: name.to_owned(),
        library: name.replace('-', "_"),
        scope,
        features: BTreeSet::new(),
    };
    let code = ["named", "in-a-macro", "unused", "of-tests"].map(|name| line(name, Scope::Code));
    package.dependencies = code.into_iter().chain([line("named", Scope::Tests)]).collect();
    let offered = ["named", "never"].map(str::to_owned).into();
    let found = dependencies::find(&Workspace { crates: vec![package], offered });
    let told: Vec<_> = found.iter().map(|unused| (unused.dependency.as_str(), unused.advice)).collect();
    let expected = [
        ("unused", "remove it"),
        ("of-tests", "move it to dev-dependencies: only tests use it"),
        ("named", "remove it from dev-dependencies: it is in dependencies"),
        ("never", "remove it from the workspace's Cargo.toml"),
    ];
    assert_eq!(told, expected);
}

fn figure(names: &[&str]) -> Measure {
    let found =
        names.iter().map(|name| Found { name: (*name).to_owned(), place: (*name).to_owned(), note: String::new() });
    let found: Vec<Found> = found.collect();
    Measure { name: "files", what: "files", advice: "mend it", is_count: true, value: found.len(), found }
}

#[test]
fn a_figure_that_rises_fails_and_names_what_is_new() {
    let mut ceilings = Ceilings::default();
    assert!(ceilings.judge(&figure(&["a"])).fails(), "there is no ceiling yet");
    ceilings.lower(&[figure(&["a", "b"])]);
    let risen = figure(&["a", "c", "b"]);
    assert_eq!(ceilings.judge(&risen), Verdict::Rose);
    assert_eq!(ceilings.news(&risen).iter().map(|found| found.name.as_str()).collect::<Vec<_>>(), ["c"]);
}

#[test]
fn lowering_writes_what_fell_and_never_raises() {
    let mut ceilings = Ceilings::default();
    ceilings.lower(&[figure(&["a", "b"])]);
    assert!(ceilings.lower(&[figure(&["a", "b", "c"])]).is_empty());
    assert_eq!(ceilings.0["files"].ceiling, 2);
    assert_eq!(ceilings.judge(&figure(&["a"])), Verdict::Fell);
    assert_eq!(ceilings.lower(&[figure(&["a"])]), ["files"]);
    assert_eq!(ceilings.0["files"].ceiling, 1);
    ceilings.lower(&[figure(&[])]);
    assert_eq!(ceilings.judge(&figure(&[])), Verdict::Done);
}
