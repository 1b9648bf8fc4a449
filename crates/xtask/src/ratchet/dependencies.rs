//! Dependencies that nothing uses: a library counts as used if the code that it is for names it at the start of a path or
//! of a `use`, also inside macros and attributes.

use std::collections::{BTreeMap, BTreeSet};

use proc_macro2::{TokenStream, TokenTree};
use syn::{
    Attribute, File, ItemUse, Macro, Path, UseTree,
    visit::{self, Visit},
};

use super::sources::{Crate, Dependency, Scope, Workspace};

/// A line of a manifest that can go or move.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Unused {
    /// The package; none for the workspace's own manifest.
    pub(super) package: Option<String>,
    pub(super) dependency: String,
    pub(super) advice: &'static str,
}

/// Every dependency that can go.
pub(super) fn find(workspace: &Workspace) -> Vec<Unused> {
    let mut found = Vec::new();
    let mut inherited = BTreeSet::new();
    for package in &workspace.crates {
        let used = used(package);
        for dependency in &package.dependencies {
            inherited.insert(&dependency.name);
            if let Some(advice) = advice(package, dependency, &used) {
                let (package, dependency) = (Some(package.name.clone()), dependency.name.clone());
                found.push(Unused { package, dependency, advice });
            }
        }
    }
    for name in workspace.offered.iter().filter(|name| !inherited.contains(name)) {
        let advice = "remove it from the workspace's Cargo.toml";
        found.push(Unused { package: None, dependency: name.clone(), advice });
    }
    found
}

fn advice(package: &Crate, dependency: &Dependency, used: &BTreeMap<Scope, BTreeSet<String>>) -> Option<&'static str> {
    let is_used = |scope| used.get(&scope).is_some_and(|names| names.contains(&dependency.library));
    if dependency.scope == Scope::Tests {
        let same = |other: &&Dependency| other.name == dependency.name && other.scope == Scope::Code;
        if let Some(other) = package.dependencies.iter().find(same)
            && dependency.features.is_subset(&other.features)
        {
            return Some("remove it from dev-dependencies: it is in dependencies");
        }
    }
    match dependency.scope {
        scope if is_used(scope) => None,
        Scope::Code if is_used(Scope::Tests) => Some("move it to dev-dependencies: only tests use it"),
        Scope::Code if is_used(Scope::Build) => Some("move it to build-dependencies: only build.rs uses it"),
        _ => Some("remove it"),
    }
}

/// The names that each scope of a crate begins paths with.
fn used(package: &Crate) -> BTreeMap<Scope, BTreeSet<String>> {
    let mut found: BTreeMap<Scope, BTreeSet<String>> = BTreeMap::new();
    for source in &package.sources {
        let mut collect = |file: &File, scope| {
            let mut finder = RootFinder { found: found.entry(scope).or_default() };
            finder.visit_file(file);
        };
        collect(&source.code, source.scope);
        collect(&source.tests, Scope::Tests);
    }
    found
}

struct RootFinder<'f> {
    found: &'f mut BTreeSet<String>,
}

impl RootFinder<'_> {
    fn roots(&mut self, tree: &UseTree) {
        match tree {
            UseTree::Path(path) => _ = self.found.insert(path.ident.to_string()),
            UseTree::Name(name) => _ = self.found.insert(name.ident.to_string()),
            UseTree::Rename(rename) => _ = self.found.insert(rename.ident.to_string()),
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.roots(tree)),
            UseTree::Glob(_) => {}
        }
    }

    /// Names with `::` after them and none before.
    fn tokens(&mut self, tokens: TokenStream) {
        let (mut name, mut colons) = (None, 0);
        for token in tokens {
            match token {
                TokenTree::Ident(ident) => {
                    name = (colons < 2).then(|| ident.to_string());
                    colons = 0;
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' => {
                    colons += 1;
                    if colons == 2 {
                        self.found.extend(name.take());
                    }
                }
                other => {
                    (name, colons) = (None, 0);
                    if let TokenTree::Group(group) = other {
                        self.tokens(group.stream());
                    }
                }
            }
        }
    }
}

impl<'ast> Visit<'ast> for RootFinder<'_> {
    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        self.roots(&item.tree);
    }

    fn visit_path(&mut self, path: &'ast Path) {
        if path.segments.len() > 1 || path.leading_colon.is_some() {
            self.found.extend(path.segments.first().map(|segment| segment.ident.to_string()));
        }
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, call: &'ast Macro) {
        visit::visit_macro(self, call);
        self.tokens(call.tokens.clone());
    }

    fn visit_attribute(&mut self, attribute: &'ast Attribute) {
        visit::visit_attribute(self, attribute);
        if let syn::Meta::List(list) = &attribute.meta {
            self.tokens(list.tokens.clone());
        }
    }
}
