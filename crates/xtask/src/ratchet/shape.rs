//! What a file shows by itself: the names of its types, the lengths of its functions, the lines of a crate.

use std::collections::BTreeMap;

use syn::{
    File, ImplItemFn, Item, ItemFn, ItemImpl, ItemMod, ItemTrait, TraitItemFn, Type,
    visit::{self, Visit},
};

use super::sources::{Crate, Scope, Source};

/// A function with its body.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Function {
    /// With the type or trait that it belongs to.
    pub(super) name: String,
    /// Where its `fn` stands.
    pub(super) line: usize,
    /// From `fn` to the closing brace; attributes and documentation do not count.
    pub(super) lines: usize,
}

/// The functions of a file's code, or of its tests.
pub(super) fn functions(file: &File) -> Vec<Function> {
    let mut finder = Functions::default();
    finder.visit_file(file);
    finder.found
}

#[derive(Default)]
struct Functions {
    owner: Option<String>,
    found: Vec<Function>,
}

impl Functions {
    fn add(&mut self, signature: &syn::Signature, block: &syn::Block) {
        let name = match &self.owner {
            Some(owner) => format!("{owner}::{}", signature.ident),
            None => signature.ident.to_string(),
        };
        let line = signature.fn_token.span.start().line;
        let last = block.brace_token.span.close().end().line;
        self.found.push(Function { name, line, lines: last + 1 - line });
    }

    fn owned_by(&mut self, owner: Option<String>, within: impl FnOnce(&mut Self)) {
        let before = std::mem::replace(&mut self.owner, owner);
        within(self);
        self.owner = before;
    }
}

impl<'ast> Visit<'ast> for Functions {
    fn visit_item_fn(&mut self, function: &'ast ItemFn) {
        self.owned_by(None, |finder| {
            finder.add(&function.sig, &function.block);
            visit::visit_item_fn(finder, function);
        });
    }

    fn visit_impl_item_fn(&mut self, function: &'ast ImplItemFn) {
        self.add(&function.sig, &function.block);
        visit::visit_impl_item_fn(self, function);
    }

    fn visit_trait_item_fn(&mut self, function: &'ast TraitItemFn) {
        if let Some(block) = &function.default {
            self.add(&function.sig, block);
        }
        visit::visit_trait_item_fn(self, function);
    }

    fn visit_item_impl(&mut self, block: &'ast ItemImpl) {
        let owner = match &*block.self_ty {
            Type::Path(path) => path.path.segments.last().map(|segment| segment.ident.to_string()),
            _ => None,
        };
        self.owned_by(owner, |finder| visit::visit_item_impl(finder, block));
    }

    fn visit_item_trait(&mut self, item: &'ast ItemTrait) {
        self.owned_by(Some(item.ident.to_string()), |finder| visit::visit_item_trait(finder, item));
    }

    fn visit_item_mod(&mut self, module: &'ast ItemMod) {
        self.owned_by(None, |finder| visit::visit_item_mod(finder, module));
    }
}

/// The places of each type name that a crate's code defines, as `path:line`. Types inside functions and types that macros
/// make do not count.
pub(super) fn types(package: &Crate) -> BTreeMap<String, Vec<String>> {
    let mut found = BTreeMap::new();
    for source in package.sources.iter().filter(|source| source.scope == Scope::Code) {
        add_types(source, &source.code.items, &mut found);
    }
    found
}

fn add_types(source: &Source, items: &[Item], found: &mut BTreeMap<String, Vec<String>>) {
    for item in items {
        let ident = match item {
            Item::Struct(item) => &item.ident,
            Item::Enum(item) => &item.ident,
            Item::Union(item) => &item.ident,
            Item::Trait(item) => &item.ident,
            Item::Type(item) => &item.ident,
            Item::Mod(module) => {
                if let Some((_, items)) = &module.content {
                    add_types(source, items, found);
                }
                continue;
            }
            _ => continue,
        };
        let place = format!("{}:{}", source.path, ident.span().start().line);
        found.entry(ident.to_string()).or_default().push(place);
    }
}

/// Lines of a crate that are neither blank nor only a comment: of code, and of tests.
pub(super) fn lines(package: &Crate) -> (usize, usize) {
    let (mut code, mut tests) = (0, 0);
    for source in &package.sources {
        for (is_test, is_code) in source.is_test_line.iter().zip(&source.is_code_line) {
            *(if *is_test { &mut tests } else { &mut code }) += usize::from(*is_code);
        }
    }
    (code, tests)
}
