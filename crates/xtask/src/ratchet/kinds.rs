//! Files that name a provider kind. A kind is one file and one line of the registry; a name elsewhere is a place that the
//! next kind has to be added to. Names and string literals of shipped code count, documentation and tests do not.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use proc_macro2::{Ident, TokenStream, TokenTree};
use syn::{
    Attribute, Item, LitStr, Macro,
    visit::{self, Visit},
};

use super::sources::{Scope, Workspace};

/// Where kinds are listed: the enum's variants are the names that are looked for.
const LIST: (&str, &str) = ("stagegate-llm", "ProviderKind");
/// The module of the same crate that may name each of them.
const REGISTRY: &str = "providers";

/// Each file that names a kind, with the kinds and the first line of each.
pub(super) fn find(workspace: &Workspace) -> Result<BTreeMap<String, BTreeMap<String, usize>>> {
    let kinds = kinds(workspace);
    if kinds.is_empty() {
        bail!("no `enum {}` in {}: tell crates/xtask/src/ratchet/kinds.rs where kinds are listed now", LIST.1, LIST.0);
    }
    let mut found = BTreeMap::new();
    for package in workspace.crates.iter().filter(|package| !package.is_for_development()) {
        for source in package.sources.iter().filter(|source| source.scope == Scope::Code) {
            let mut finder = KindFinder { kinds: &kinds, found: BTreeMap::new() };
            finder.visit_file(&source.code);
            let is_registry = source.module.get(1..).is_some_and(|module| module == [REGISTRY]);
            let own = |kind: &String| package.name == LIST.0 && (is_registry || source.module.contains(kind));
            let named: BTreeMap<_, _> = finder.found.into_iter().filter(|(kind, _)| !own(kind)).collect();
            if !named.is_empty() {
                found.insert(source.path.clone(), named);
            }
        }
    }
    Ok(found)
}

fn kinds(workspace: &Workspace) -> Vec<String> {
    let sources = workspace.crates.iter().filter(|package| package.name == LIST.0).flat_map(|package| &package.sources);
    let enums = sources.flat_map(|source| &source.code.items).filter_map(|item| match item {
        Item::Enum(item) if item.ident == LIST.1 => Some(item),
        _ => None,
    });
    enums.flat_map(|item| &item.variants).map(|variant| variant.ident.to_string().to_lowercase()).collect()
}

struct KindFinder<'k> {
    kinds: &'k [String],
    found: BTreeMap<String, usize>,
}

impl KindFinder<'_> {
    fn text(&mut self, text: &str, line: usize) {
        for kind in self.kinds.iter().filter(|kind| names(text, kind)) {
            self.found.entry(kind.clone()).or_insert(line);
        }
    }

    fn tokens(&mut self, tokens: TokenStream) {
        for token in tokens {
            match token {
                TokenTree::Ident(ident) => self.text(&ident.to_string(), ident.span().start().line),
                TokenTree::Literal(literal) => self.text(&literal.to_string(), literal.span().start().line),
                TokenTree::Group(group) => self.tokens(group.stream()),
                TokenTree::Punct(_) => {}
            }
        }
    }
}

/// Whether a text has the kind as a word, or as two words that were written together (`OpenAi`, `open_ai`).
fn names(text: &str, kind: &str) -> bool {
    let words = words(text);
    words.iter().any(|word| word == kind)
        || words.windows(2).any(|pair| pair[0].len() + pair[1].len() == kind.len() && pair.concat() == kind)
}

/// The words of a name or a sentence, in lower case: they end before a capital and at everything but letters and digits.
fn words(text: &str) -> Vec<String> {
    let (mut words, mut word, mut was_lower) = (Vec::new(), String::new(), false);
    for letter in text.chars() {
        if !letter.is_alphanumeric() || (letter.is_uppercase() && was_lower) {
            words.extend((!word.is_empty()).then(|| std::mem::take(&mut word)));
        }
        if letter.is_alphanumeric() {
            word.extend(letter.to_lowercase());
        }
        was_lower = letter.is_lowercase();
    }
    words.extend((!word.is_empty()).then_some(word));
    words
}

impl<'ast> Visit<'ast> for KindFinder<'_> {
    fn visit_ident(&mut self, ident: &'ast Ident) {
        self.text(&ident.to_string(), ident.span().start().line);
    }

    fn visit_lit_str(&mut self, text: &'ast LitStr) {
        self.text(&text.value(), text.span().start().line);
    }

    fn visit_macro(&mut self, call: &'ast Macro) {
        visit::visit_macro(self, call);
        self.tokens(call.tokens.clone());
    }

    fn visit_attribute(&mut self, attribute: &'ast Attribute) {
        if !attribute.path().is_ident("doc") {
            visit::visit_attribute(self, attribute);
            if let syn::Meta::List(list) = &attribute.meta {
                self.tokens(list.tokens.clone());
            }
        }
    }
}
