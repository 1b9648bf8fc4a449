//! The sources that are measured: every crate of the workspace, each file parsed once and split into code and tests. Owns
//! how files are found, by the `mod` declarations that the compiler follows; measures nothing.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package, TargetKind};
use proc_macro2::{TokenStream, TokenTree};
use syn::{Attribute, File, ImplItem, Item, spanned::Spanned};

/// Crates that serve the others' development and never ship.
const DEVELOPMENT: [&str; 3] = ["stagegate-simulation", "stagegate-testkit", "xtask"];

/// The whole workspace.
#[derive(Default)]
pub(super) struct Workspace {
    pub(super) crates: Vec<Crate>,
    /// Lines of `[workspace.dependencies]`.
    pub(super) offered: BTreeSet<String>,
}

/// One package.
pub(super) struct Crate {
    pub(super) name: String,
    pub(super) dependencies: Vec<Dependency>,
    pub(super) sources: Vec<Source>,
}

impl Crate {
    /// Whether it never ships.
    pub(super) fn is_for_development(&self) -> bool {
        DEVELOPMENT.contains(&self.name.as_str())
    }

    /// The name by which its own binary and tests import it.
    pub(super) fn library(&self) -> String {
        self.name.replace('-', "_")
    }
}

/// A line of a manifest.
#[derive(Debug, Clone)]
pub(super) struct Dependency {
    pub(super) name: String,
    /// As the code names it.
    pub(super) library: String,
    pub(super) scope: Scope,
    pub(super) features: BTreeSet<String>,
}

/// Which code a dependency or a target is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Scope {
    /// A library or a binary.
    Code,
    /// A build script.
    Build,
    /// Integration tests, benchmarks and examples.
    Tests,
}

/// One file.
pub(super) struct Source {
    /// From the workspace's folder, with `/`.
    pub(super) path: String,
    pub(super) scope: Scope,
    /// The target that it belongs to, then the modules down to it.
    pub(super) module: Vec<String>,
    /// Its items without tests; empty for a test file.
    pub(super) code: File,
    /// Items under `#[cfg(test)]`, or everything of a test file.
    pub(super) tests: File,
    /// For each line: whether it belongs to a test.
    pub(super) is_test_line: Vec<bool>,
    /// For each line: whether it holds more than blanks and a comment.
    pub(super) is_code_line: Vec<bool>,
}

impl Source {
    /// Parses the text of a file.
    pub(super) fn parse(path: &str, scope: Scope, module: Vec<String>, text: &str) -> Result<Self> {
        let file = syn::parse_file(text).with_context(|| format!("{path} is not Rust"))?;
        let is_code_line: Vec<bool> = text.lines().map(is_code).collect();
        let is_test = scope == Scope::Tests || file.attrs.iter().any(is_for_tests);
        let mut is_test_line = vec![is_test; is_code_line.len()];
        let empty = || File { shebang: None, attrs: Vec::new(), items: Vec::new() };
        let (mut code, mut tests) = (empty(), empty());
        if is_test {
            tests = file;
        } else {
            code.attrs = file.attrs;
            code.items = split(file.items, &mut tests.items);
            for item in &tests.items {
                let (first, last) = (item.span().start().line, item.span().end().line);
                is_test_line[first - 1..last].fill(true);
            }
        }
        Ok(Self { path: path.to_owned(), scope, module, code, tests, is_test_line, is_code_line })
    }

    /// Lines of code and of tests, comments and blanks included.
    pub(super) fn lengths(&self) -> (usize, usize) {
        let tests = self.is_test_line.iter().filter(|is_test| **is_test).count();
        (self.is_test_line.len() - tests, tests)
    }
}

fn is_code(line: &str) -> bool {
    let line = line.trim_start();
    !line.is_empty() && !line.starts_with("//")
}

/// Moves what is only compiled for tests into `tests` and returns the rest.
fn split(items: Vec<Item>, tests: &mut Vec<Item>) -> Vec<Item> {
    let mut code = Vec::new();
    for mut item in items {
        if attributes(&item).iter().any(is_for_tests) {
            tests.push(item);
            continue;
        }
        if let Item::Mod(module) = &mut item
            && let Some((_, items)) = &mut module.content
        {
            *items = split(std::mem::take(items), tests);
        }
        if let Item::Impl(block) = &mut item {
            let (for_tests, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut block.items)
                .into_iter()
                .partition(|item| matches!(item, ImplItem::Fn(function) if function.attrs.iter().any(is_for_tests)));
            block.items = rest;
            tests.extend(for_tests.into_iter().filter_map(free_function));
        }
        code.push(item);
    }
    code
}

/// A method that only tests have is measured as a function of its own.
fn free_function(item: ImplItem) -> Option<Item> {
    let ImplItem::Fn(method) = item else { return None };
    let (attrs, vis, sig, block) = (method.attrs, method.vis, method.sig, Box::new(method.block));
    Some(Item::Fn(syn::ItemFn { attrs, vis, sig, block }))
}

/// `#[cfg(test)]`, also as one condition of several.
fn is_for_tests(attribute: &Attribute) -> bool {
    let syn::Meta::List(list) = &attribute.meta else { return false };
    let words = words(list.tokens.clone());
    list.path.is_ident("cfg") && words.iter().any(|word| word == "test") && !words.iter().any(|word| word == "not")
}

fn words(tokens: TokenStream) -> Vec<String> {
    let mut found = Vec::new();
    for token in tokens {
        match token {
            TokenTree::Ident(ident) => found.push(ident.to_string()),
            TokenTree::Group(group) => found.extend(words(group.stream())),
            TokenTree::Punct(_) | TokenTree::Literal(_) => {}
        }
    }
    found
}

/// The attributes of any item.
fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::ExternCrate(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Union(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

/// Reads the workspace from its folder. Asks `cargo metadata` for packages and targets, which needs no network.
pub(super) fn read(root: &Path) -> Result<Workspace> {
    let mut command = MetadataCommand::new();
    command.manifest_path(root.join("Cargo.toml")).no_deps().other_options(vec!["--offline".to_owned()]);
    let metadata = command.exec().context("cargo metadata")?;
    let mut crates =
        metadata.packages.iter().map(|package| read_package(&metadata, package)).collect::<Result<Vec<_>>>()?;
    crates.sort_by(|one, other| one.name.cmp(&other.name));
    let manifest = std::fs::read_to_string(root.join("Cargo.toml")).context("Cargo.toml")?;
    let manifest: toml::Table = toml::from_str(&manifest).context("Cargo.toml")?;
    let offered = manifest.get("workspace").and_then(|workspace| workspace.get("dependencies"));
    let offered = offered.and_then(toml::Value::as_table).map(|table| table.keys().cloned().collect());
    Ok(Workspace { crates, offered: offered.unwrap_or_default() })
}

fn read_package(metadata: &Metadata, package: &Package) -> Result<Crate> {
    let root = metadata.workspace_root.as_std_path();
    let mut sources = Vec::new();
    for target in &package.targets {
        let scope = match target.kind.first() {
            Some(TargetKind::CustomBuild) => Scope::Build,
            Some(TargetKind::Test | TargetKind::Bench | TargetKind::Example) => Scope::Tests,
            _ => Scope::Code,
        };
        let mut reader = |path: &Path| match std::fs::read_to_string(path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| path.display().to_string()),
        };
        let place = target.src_path.as_std_path();
        // The library and the binary of a package may have one name.
        let name = format!("{} ({})", target.name, target.kind.first().map(ToString::to_string).unwrap_or_default());
        Walk { root, scope, read: &mut reader, sources: &mut sources }.file(place, true, &[name])?;
    }
    sources.sort_by(|one, other| one.path.cmp(&other.path));
    sources.dedup_by(|one, other| one.path == other.path);
    let dependencies = package.dependencies.iter().map(|dependency| Dependency {
        name: dependency.name.clone(),
        library: dependency.rename.as_ref().unwrap_or(&dependency.name).replace('-', "_"),
        scope: match dependency.kind {
            DependencyKind::Development => Scope::Tests,
            DependencyKind::Build => Scope::Build,
            _ => Scope::Code,
        },
        features: dependency.features.iter().cloned().collect(),
    });
    Ok(Crate { name: package.name.to_string(), dependencies: dependencies.collect(), sources })
}

/// Follows `mod` declarations from a target's root.
pub(super) struct Walk<'w> {
    /// What paths are told from.
    pub(super) root: &'w Path,
    pub(super) scope: Scope,
    /// The text of a file, or that there is none.
    pub(super) read: &'w mut dyn FnMut(&Path) -> Result<Option<String>>,
    pub(super) sources: &'w mut Vec<Source>,
}

impl Walk<'_> {
    /// Reads a file and the files of the modules that it declares.
    pub(super) fn file(&mut self, path: &Path, is_root: bool, module: &[String]) -> Result<()> {
        let Some(text) = (self.read)(path)? else { bail!("{} is not there", path.display()) };
        self.parsed(path, is_root, module, &text)
    }

    fn parsed(&mut self, path: &Path, is_root: bool, module: &[String], text: &str) -> Result<()> {
        let told = path.strip_prefix(self.root).unwrap_or(path);
        let told = told.components().map(|part| part.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("/");
        let source = Source::parse(&told, self.scope, module.to_vec(), text)?;
        let beside = path.parent().map(Path::to_path_buf).unwrap_or_default();
        let stands_for_folder = is_root || path.file_name().is_some_and(|name| name == "mod.rs");
        let below = if stands_for_folder { beside.clone() } else { path.with_extension("") };
        let mut declared = Vec::new();
        for (items, scope) in [(&source.code.items, self.scope), (&source.tests.items, Scope::Tests)] {
            declarations(items, scope, &Place { beside: &beside, below: below.clone() }, module, &mut declared);
        }
        self.sources.push(source);
        for Declared { scope, places, module } in declared {
            let before = std::mem::replace(&mut self.scope, scope);
            self.first_of(&places, &module)?;
            self.scope = before;
        }
        Ok(())
    }

    fn first_of(&mut self, places: &[PathBuf], module: &[String]) -> Result<()> {
        for place in places {
            if let Some(text) = (self.read)(place)? {
                return self.parsed(place, false, module, &text);
            }
        }
        bail!("no file for `mod {}`: looked for {places:?}", module.join("::"))
    }
}

/// Where the files of a module's children are.
struct Place<'p> {
    /// Beside the file, for `#[path]`.
    beside: &'p Path,
    /// In the folder that is named as the module.
    below: PathBuf,
}

/// A module with a file of its own.
struct Declared {
    scope: Scope,
    places: Vec<PathBuf>,
    module: Vec<String>,
}

fn declarations(items: &[Item], scope: Scope, place: &Place<'_>, module: &[String], found: &mut Vec<Declared>) {
    for item in items {
        let Item::Mod(child) = item else { continue };
        let name = child.ident.to_string();
        let module: Vec<String> = module.iter().cloned().chain([name.clone()]).collect();
        if let Some((_, items)) = &child.content {
            let below = Place { beside: place.beside, below: place.below.join(&name) };
            declarations(items, scope, &below, &module, found);
            continue;
        }
        let places = match named_path(&child.attrs) {
            Some(path) => vec![place.beside.join(path)],
            None => vec![place.below.join(format!("{name}.rs")), place.below.join(&name).join("mod.rs")],
        };
        found.push(Declared { scope, places, module });
    }
}

/// What `#[path = "…"]` says.
fn named_path(attributes: &[Attribute]) -> Option<String> {
    let attribute = attributes.iter().find(|attribute| attribute.path().is_ident("path"))?;
    let syn::Meta::NameValue(pair) = &attribute.meta else { return None };
    let syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Str(text), .. }) = &pair.value else { return None };
    Some(text.value())
}
