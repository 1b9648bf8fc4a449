//! Sleeps of tests. A sleep inside a loop polls something that can be observed; one outside waits for a fixed time, and is
//! either too short on a slow machine or too long on a fast one. Tests in virtual time (`start_paused`) do not count.

use proc_macro2::{TokenStream, TokenTree};
use syn::{
    Attribute, Expr, ExprCall, ExprForLoop, ExprLoop, ExprWhile, File, ImplItemFn, ItemFn, Macro,
    visit::{self, Visit},
};

const NAMES: [&str; 2] = ["sleep", "sleep_until"];

/// A call that sleeps.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Sleep {
    /// The function that it stands in.
    pub(super) function: String,
    pub(super) line: usize,
    pub(super) polls: bool,
}

/// The sleeps of a file's code, or of its tests.
pub(super) fn sleeps(file: &File) -> Vec<Sleep> {
    let mut finder = SleepFinder::default();
    finder.visit_file(file);
    finder.found
}

#[derive(Default)]
struct SleepFinder {
    function: String,
    is_virtual: bool,
    loops: usize,
    found: Vec<Sleep>,
}

impl SleepFinder {
    fn within(&mut self, name: String, attributes: &[Attribute], visit: impl FnOnce(&mut Self)) {
        let (function, loops) = (std::mem::replace(&mut self.function, name), std::mem::take(&mut self.loops));
        let is_virtual = self.is_virtual;
        self.is_virtual |= attributes.iter().any(is_paused);
        visit(self);
        (self.function, self.loops, self.is_virtual) = (function, loops, is_virtual);
    }

    fn looped(&mut self, visit: impl FnOnce(&mut Self)) {
        self.loops += 1;
        visit(self);
        self.loops -= 1;
    }

    fn add(&mut self, line: usize) {
        if !self.is_virtual {
            self.found.push(Sleep { function: self.function.clone(), line, polls: self.loops > 0 });
        }
    }

    fn tokens(&mut self, tokens: TokenStream) {
        let (mut name, mut is_loop) = (None, false);
        for token in tokens {
            match token {
                TokenTree::Ident(ident) => {
                    is_loop |= ident == "loop" || ident == "while" || ident == "for";
                    name = NAMES.iter().any(|sleep| ident == sleep).then(|| ident.span().start().line);
                }
                TokenTree::Group(group) => {
                    if let Some(line) = name.take() {
                        self.add(line);
                    }
                    let is_body = is_loop && group.delimiter() == proc_macro2::Delimiter::Brace;
                    self.loops += usize::from(is_body);
                    self.tokens(group.stream());
                    self.loops -= usize::from(is_body);
                    is_loop &= !is_body;
                }
                TokenTree::Punct(_) | TokenTree::Literal(_) => name = None,
            }
        }
    }
}

/// `#[tokio::test(start_paused = true)]`.
fn is_paused(attribute: &Attribute) -> bool {
    let syn::Meta::List(list) = &attribute.meta else { return false };
    list.tokens.clone().into_iter().any(|token| matches!(token, TokenTree::Ident(ident) if ident == "start_paused"))
}

impl<'ast> Visit<'ast> for SleepFinder {
    fn visit_item_fn(&mut self, function: &'ast ItemFn) {
        self.within(function.sig.ident.to_string(), &function.attrs, |finder| {
            visit::visit_item_fn(finder, function);
        });
    }

    fn visit_impl_item_fn(&mut self, function: &'ast ImplItemFn) {
        self.within(function.sig.ident.to_string(), &function.attrs, |finder| {
            visit::visit_impl_item_fn(finder, function);
        });
    }

    fn visit_expr_loop(&mut self, body: &'ast ExprLoop) {
        self.looped(|finder| visit::visit_expr_loop(finder, body));
    }

    fn visit_expr_while(&mut self, body: &'ast ExprWhile) {
        self.looped(|finder| visit::visit_expr_while(finder, body));
    }

    fn visit_expr_for_loop(&mut self, body: &'ast ExprForLoop) {
        self.looped(|finder| visit::visit_expr_for_loop(finder, body));
    }

    fn visit_expr_call(&mut self, call: &'ast ExprCall) {
        if let Expr::Path(path) = &*call.func
            && let Some(last) = path.path.segments.last()
            && NAMES.iter().any(|sleep| last.ident == sleep)
        {
            self.add(last.ident.span().start().line);
        }
        visit::visit_expr_call(self, call);
    }

    fn visit_macro(&mut self, call: &'ast Macro) {
        self.tokens(call.tokens.clone());
    }
}
