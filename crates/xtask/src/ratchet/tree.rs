//! The modules of a crate and what a path in one of them means. Owns the resolution of names as far as files are concerned:
//! it follows `crate`, `self`, `super`, imports, re-exports and globs, and knows no types and no methods.

use std::collections::{BTreeMap, BTreeSet};

use syn::{Item, ItemUse, UseTree, Visibility};

use super::sources::{Crate, Scope};

/// How far imports are followed from one to the next.
const DEPTH_MAX: usize = 16;

/// Every module of the crate's library and binaries, by its path.
#[derive(Debug, Default)]
pub(super) struct Tree {
    modules: BTreeMap<Vec<String>, Module>,
    /// The crate's own name, and the module path of its library.
    library: Option<(String, Vec<String>)>,
}

#[derive(Debug, Default)]
struct Module {
    /// The index of its source.
    file: usize,
    items: BTreeSet<String>,
    imports: Vec<Import>,
}

/// One name that a `use` brings in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Import {
    /// The name that it has here; none for a glob.
    pub(super) name: Option<String>,
    pub(super) path: Vec<String>,
    /// Whether others see it too.
    pub(super) is_export: bool,
}

/// What a path leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Meaning {
    Module(Vec<String>),
    /// An item, told by the source that defines it.
    Item(usize),
}

impl Tree {
    pub(super) fn of(package: &Crate) -> Self {
        let mut tree = Self::default();
        for (file, source) in package.sources.iter().enumerate() {
            if source.scope != Scope::Code {
                continue;
            }
            if source.module.len() == 1 && source.path.ends_with("/lib.rs") {
                tree.library = Some((package.library(), source.module.clone()));
            }
            tree.add(file, &source.module, &source.code.items);
        }
        tree
    }

    fn add(&mut self, file: usize, path: &[String], items: &[Item]) {
        let mut module = Module { file, ..Module::default() };
        for item in items {
            match item {
                Item::Use(item) => module.imports.extend(imports(item)),
                Item::Mod(child) => {
                    if let Some((_, items)) = &child.content {
                        let path: Vec<String> = path.iter().cloned().chain([child.ident.to_string()]).collect();
                        self.add(file, &path, items);
                    }
                }
                item => module.items.extend(name(item)),
            }
        }
        self.modules.insert(path.to_vec(), module);
    }

    /// What the path means in that module; none for what another crate, the prelude or a local variable is.
    pub(super) fn resolve(&self, module: &[String], path: &[String]) -> Option<Meaning> {
        self.resolve_within(module, path, DEPTH_MAX)
    }

    fn resolve_within(&self, module: &[String], path: &[String], depth: usize) -> Option<Meaning> {
        let depth = depth.checked_sub(1)?;
        let (first, mut rest) = path.split_first()?;
        let mut at = match first.as_str() {
            "crate" => module.get(..1)?.to_vec(),
            "self" => module.to_vec(),
            "super" => module.get(..module.len() - 1)?.to_vec(),
            name => match self.look_up(module, name, rest.is_empty(), depth) {
                Some(Meaning::Module(path)) => path,
                Some(item) => return Some(item),
                None => match &self.library {
                    Some((library, root)) if library == name => root.clone(),
                    _ => return None,
                },
            },
        };
        while let Some((name, after)) = rest.split_first() {
            if name == "super" {
                at.pop();
            } else {
                match self.look_up(&at, name, after.is_empty(), depth) {
                    Some(Meaning::Module(path)) => at = path,
                    Some(item) => return Some(item),
                    // A macro made it, so that no source shows it: it belongs to the module that it is asked from.
                    None => return self.modules.get(&at).map(|module| Meaning::Item(module.file)),
                }
            }
            rest = after;
        }
        self.modules.contains_key(&at).then_some(Meaning::Module(at))
    }

    /// One name, seen from inside a module or asked from it.
    fn look_up(&self, at: &[String], name: &str, is_last: bool, depth: usize) -> Option<Meaning> {
        let module = self.modules.get(at)?;
        let has_item = module.items.contains(name);
        if has_item && is_last {
            return Some(Meaning::Item(module.file));
        }
        let child: Vec<String> = at.iter().cloned().chain([name.to_owned()]).collect();
        if self.modules.contains_key(&child) {
            return Some(Meaning::Module(child));
        }
        if has_item {
            return Some(Meaning::Item(module.file));
        }
        let mut named = module.imports.iter().filter(|import| import.name.as_deref() == Some(name));
        // An import of a name by itself (`use serde;`) is another crate's.
        if let Some(found) = named.find_map(|import| self.imported(at, &import.path, name, depth)) {
            return Some(found);
        }
        let mut globs = module.imports.iter().filter(|import| import.name.is_none());
        globs.find_map(|import| match self.resolve_within(at, &import.path, depth) {
            Some(Meaning::Module(path)) if path != at => self.look_up(&path, name, is_last, depth.checked_sub(1)?),
            _ => None,
        })
    }

    fn imported(&self, at: &[String], path: &[String], name: &str, depth: usize) -> Option<Meaning> {
        if path.len() == 1 && path[0] == name { None } else { self.resolve_within(at, path, depth) }
    }
}

/// The names that a `use` brings in.
pub(super) fn imports(item: &ItemUse) -> Vec<Import> {
    let mut found = Vec::new();
    if item.leading_colon.is_none() {
        let is_export = !matches!(item.vis, Visibility::Inherited);
        flatten(&item.tree, &mut Vec::new(), is_export, &mut found);
    }
    found
}

fn flatten(tree: &UseTree, path: &mut Vec<String>, is_export: bool, found: &mut Vec<Import>) {
    let mut push = |path: &[String], last: String, name: String| {
        let mut path = path.to_vec();
        // `use a::{self}` names the module itself.
        let is_self = last == "self" && !path.is_empty();
        let name = if is_self && name == "self" { path.last().cloned().unwrap_or_default() } else { name };
        if !is_self {
            path.push(last);
        }
        found.push(Import { name: Some(name), path, is_export });
    };
    match tree {
        UseTree::Name(tree) => push(path, tree.ident.to_string(), tree.ident.to_string()),
        UseTree::Rename(tree) => push(path, tree.ident.to_string(), tree.rename.to_string()),
        UseTree::Glob(_) => found.push(Import { name: None, path: path.clone(), is_export }),
        UseTree::Path(tree) => {
            path.push(tree.ident.to_string());
            flatten(&tree.tree, path, is_export, found);
            path.pop();
        }
        UseTree::Group(group) => group.items.iter().for_each(|tree| flatten(tree, path, is_export, found)),
    }
}

/// The name that an item defines.
fn name(item: &Item) -> Option<String> {
    let ident = match item {
        Item::Const(item) => &item.ident,
        Item::Enum(item) => &item.ident,
        Item::Fn(item) => &item.sig.ident,
        Item::Macro(item) => item.ident.as_ref()?,
        Item::Static(item) => &item.ident,
        Item::Struct(item) => &item.ident,
        Item::Trait(item) => &item.ident,
        Item::Type(item) => &item.ident,
        Item::Union(item) => &item.ident,
        _ => return None,
    };
    Some(ident.to_string())
}
