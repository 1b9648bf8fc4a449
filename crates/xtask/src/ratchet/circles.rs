//! Circles of files inside a crate: which file needs which, and which need each other.
//!
//! File A needs file B if A's code names something that B defines, by a private `use` or by a path, also inside macros and
//! attributes. Re-exports are followed to the definition. No edge are: what a module
//! takes from its own submodules, of which it is made; `mod` declarations; re-exports (`pub use` shows a name and does not
//! need it); method calls; tests; documentation.

use std::collections::{BTreeMap, BTreeSet};

use proc_macro2::{TokenStream, TokenTree};
use serde::Serialize;
use syn::{
    Attribute, ItemMod, ItemUse, Macro, Path,
    visit::{self, Visit},
};

use super::{
    sources::{Crate, Scope, Source},
    tree::{Meaning, Tree, imports},
};

/// Files of one crate that all need each other, directly or by way of others.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Circle {
    pub(super) files: Vec<String>,
    /// Between these files, the weakest first.
    pub(super) edges: Vec<Edge>,
}

/// One file needs another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Edge {
    pub(super) from: String,
    pub(super) to: String,
    /// What it names, and in which line first.
    pub(super) names: BTreeMap<String, usize>,
}

/// Every circle of a crate, the largest first.
pub(super) fn find(package: &Crate) -> Vec<Circle> {
    let edges = edges(package);
    let mut reached: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
    for from in edges.keys().map(|(from, _)| *from) {
        reached.entry(from).or_insert_with(|| reachable(&edges, from));
    }
    let mut seen = BTreeSet::new();
    let mut circles = Vec::new();
    for (file, others) in &reached {
        if !others.contains(file) || !seen.insert(*file) {
            continue;
        }
        let returns = |other: &usize| reached.get(other).is_some_and(|back| back.contains(file));
        let files: BTreeSet<usize> = others.iter().copied().filter(returns).collect();
        seen.extend(&files);
        circles.push(circle(package, &files, &edges));
    }
    circles.sort_by(|one, other| other.files.len().cmp(&one.files.len()).then(one.files.cmp(&other.files)));
    circles
}

type Edges = BTreeMap<(usize, usize), BTreeMap<String, usize>>;

fn circle(package: &Crate, files: &BTreeSet<usize>, edges: &Edges) -> Circle {
    let path = |file: &usize| package.sources[*file].path.clone();
    let inside = edges.iter().filter(|((from, to), _)| files.contains(from) && files.contains(to));
    let mut edges: Vec<Edge> =
        inside.map(|((from, to), names)| Edge { from: path(from), to: path(to), names: names.clone() }).collect();
    edges.sort_by_key(|edge| edge.names.len());
    Circle { files: files.iter().map(path).collect(), edges }
}

fn reachable(edges: &Edges, from: usize) -> BTreeSet<usize> {
    let (mut found, mut open) = (BTreeSet::new(), vec![from]);
    while let Some(file) = open.pop() {
        let next = edges.range((file, 0)..=(file, usize::MAX)).map(|((_, to), _)| *to);
        open.extend(next.filter(|to| found.insert(*to)));
    }
    found
}

fn edges(package: &Crate) -> Edges {
    let tree = Tree::of(package);
    let mut edges = Edges::new();
    for (file, source) in package.sources.iter().enumerate() {
        if source.scope == Scope::Code {
            let mut finder =
                EdgeFinder { package, tree: &tree, file, module: source.module.clone(), edges: &mut edges };
            finder.source(source);
        }
    }
    edges
}

struct EdgeFinder<'t> {
    package: &'t Crate,
    tree: &'t Tree,
    file: usize,
    /// The module that is being read.
    module: Vec<String>,
    edges: &'t mut Edges,
}

impl EdgeFinder<'_> {
    fn source(&mut self, source: &Source) {
        source.code.items.iter().for_each(|item| self.visit_item(item));
    }

    fn names(&mut self, path: &[String], line: usize) {
        let Some(Meaning::Item(to)) = self.tree.resolve(&self.module, path) else { return };
        let is_own_part = self.package.sources[to].module.starts_with(&self.package.sources[self.file].module);
        if !is_own_part {
            let names = self.edges.entry((self.file, to)).or_default();
            names.entry(path.join("::")).or_insert(line);
        }
    }

    /// Paths of at least two names, as macros and attributes hold them.
    fn tokens(&mut self, tokens: TokenStream) {
        let mut path: Vec<String> = Vec::new();
        let (mut line, mut colons) = (0, 0);
        for token in tokens {
            match token {
                TokenTree::Ident(ident) => {
                    if colons < 2 {
                        self.path_ended(&mut path, line);
                        line = ident.span().start().line;
                    }
                    path.push(ident.to_string());
                    colons = 0;
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' && !path.is_empty() => colons += 1,
                other => {
                    self.path_ended(&mut path, line);
                    colons = 0;
                    if let TokenTree::Group(group) = other {
                        self.tokens(group.stream());
                    }
                }
            }
        }
        self.path_ended(&mut path, line);
    }

    fn path_ended(&mut self, path: &mut Vec<String>, line: usize) {
        if path.len() > 1 {
            self.names(path, line);
        }
        path.clear();
    }
}

impl<'ast> Visit<'ast> for EdgeFinder<'_> {
    fn visit_item_mod(&mut self, module: &'ast ItemMod) {
        self.module.push(module.ident.to_string());
        visit::visit_item_mod(self, module);
        self.module.pop();
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        let line = item.use_token.span.start().line;
        for import in imports(item) {
            if !import.is_export && import.name.is_some() {
                self.names(&import.path, line);
            }
        }
    }

    fn visit_path(&mut self, path: &'ast Path) {
        if path.leading_colon.is_none()
            && let Some(first) = path.segments.first()
        {
            let names: Vec<String> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
            self.names(&names, first.ident.span().start().line);
        }
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, call: &'ast Macro) {
        visit::visit_macro(self, call);
        self.tokens(call.tokens.clone());
    }

    fn visit_attribute(&mut self, attribute: &'ast Attribute) {
        if let syn::Meta::List(list) = &attribute.meta {
            self.tokens(list.tokens.clone());
        }
    }
}
