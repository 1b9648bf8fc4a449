//! The floors: a crate imports only from lower ones, and what is dangerous to spread stays where it belongs. Read from
//! `cargo metadata`, so that nothing here depends on how code is written.

use cargo_metadata::{Dependency, DependencyKind, Metadata, MetadataCommand, Package};

use crate::root;

/// Every crate of the product and the floor that it is on. The test kit, the simulation and xtask stand beside.
const FLOORS: [(&str, u8); 9] = [
    ("stagegate-core", 0),
    ("stagegate-telemetry", 1),
    ("stagegate-net", 1),
    ("stagegate-store-postgres", 2),
    ("stagegate-store-sqlite", 2),
    ("stagegate-llm", 3),
    ("stagegate-engine", 4),
    ("stagegate-http", 5),
    ("stagegate", 6),
];
const BESIDE: [&str; 3] = ["stagegate-simulation", "stagegate-testkit", "xtask"];

/// Libraries that only these crates of the product may use.
const HOMES: [(&str, &[&str]); 13] = [
    ("axum", &["stagegate-http"]),
    ("tower-http", &["stagegate-http"]),
    ("utoipa-axum", &["stagegate-http"]),
    ("sqlx", &["stagegate-store-postgres", "stagegate-store-sqlite"]),
    ("deadpool-redis", &["stagegate-llm"]),
    ("redis", &["stagegate-llm"]),
    // The one way out; error reports, and the command line as a client of its own API, do not go through it yet.
    ("reqwest", &["stagegate-net", "stagegate-telemetry", "stagegate"]),
    ("rustls", &["stagegate-net", "stagegate-telemetry"]),
    ("rustls-native-certs", &["stagegate-net"]),
    ("webpki-roots", &["stagegate-net"]),
    ("sentry", &["stagegate-telemetry"]),
    ("tracing-subscriber", &["stagegate-telemetry"]),
    ("clap", &["stagegate"]),
];

/// What the pure floor must not have: anything that waits, talks or listens.
const NOT_PURE: [&str; 8] = ["tokio", "reqwest", "hyper", "axum", "sqlx", "tracing", "deadpool-redis", "futures"];

fn workspace() -> Metadata {
    let mut command = MetadataCommand::new();
    command.manifest_path(root().join("Cargo.toml")).no_deps().other_options(vec!["--offline".to_owned()]);
    command.exec().expect("cargo metadata")
}

fn floor(name: &str) -> Option<u8> {
    FLOORS.iter().find(|(known, _)| *known == name).map(|(_, floor)| *floor)
}

/// What a package needs to run, tests left out.
fn needs(package: &Package) -> impl Iterator<Item = &Dependency> {
    package.dependencies.iter().filter(|dependency| dependency.kind != DependencyKind::Development)
}

#[test]
fn every_crate_is_on_a_floor_or_beside() {
    let workspace = workspace();
    let mut names: Vec<_> = workspace.packages.iter().map(|package| package.name.to_string()).collect();
    names.sort();
    let mut known: Vec<_> = FLOORS.iter().map(|(name, _)| *name).chain(BESIDE).map(str::to_owned).collect();
    known.sort();
    assert_eq!(names, known);
}

#[test]
fn a_crate_imports_only_from_lower_floors() {
    for package in &workspace().packages {
        let Some(own) = floor(&package.name) else { continue };
        for dependency in needs(package) {
            assert!(!BESIDE.contains(&dependency.name.as_str()), "{} ships {}", package.name, dependency.name);
            if let Some(other) = floor(&dependency.name) {
                assert!(other < own, "{} (floor {own}) imports {} (floor {other})", package.name, dependency.name);
            }
        }
    }
}

#[test]
fn libraries_stay_in_the_crates_that_they_belong_to() {
    for package in &workspace().packages {
        if BESIDE.contains(&package.name.as_str()) {
            continue;
        }
        for dependency in needs(package) {
            let home = HOMES.iter().find(|(library, _)| *library == dependency.name);
            let allowed = home.is_none_or(|(_, homes)| homes.contains(&package.name.as_str()));
            assert!(allowed, "{} imports {}, which belongs to {:?}", package.name, dependency.name, home.map(|h| h.1));
        }
    }
}

#[test]
fn the_core_is_pure() {
    let workspace = workspace();
    let core = workspace.packages.iter().find(|package| package.name.as_str() == "stagegate-core").expect("it");
    let impure: Vec<_> = needs(core).map(|d| &d.name).filter(|name| NOT_PURE.contains(&name.as_str())).collect();
    assert!(impure.is_empty(), "stagegate-core imports {impure:?}");
}

/// One place for versions, lints and the licence; nothing is published by accident.
#[test]
fn every_crate_follows_the_workspace() {
    for package in &workspace().packages {
        let manifest = std::fs::read_to_string(&package.manifest_path).expect("a manifest");
        let manifest = manifest.replace("\r\n", "\n");
        assert!(manifest.contains("[lints]\nworkspace = true"), "{}: lints of its own", package.name);
        assert_eq!(package.license.as_deref(), Some("Apache-2.0"), "{}", package.name);
        assert_eq!(package.publish.as_deref(), Some(&[] as &[String]), "{} could be published", package.name);
        for dependency in &package.dependencies {
            let inherited = ["{name}.workspace = true", "{name} = { workspace = true"]
                .iter()
                .any(|form| manifest.contains(&form.replace("{name}", &dependency.name)));
            assert!(inherited, "{}: {} has a version of its own", package.name, dependency.name);
        }
    }
}
