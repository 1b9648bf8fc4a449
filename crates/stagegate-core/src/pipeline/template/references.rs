//! What a template names: owns the check that everything it names will be there when it is rendered. Runs nothing.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    rc::Rc,
};

use minijinja::machinery::{
    Span,
    ast::{self, CallArg, Expr, Stmt},
};

use super::{Flaw, filters, guards, library, methods};
use crate::{
    Code,
    error::nearest,
    pipeline::{
        path::{cut, listed},
        pattern::{self, Pattern},
    },
};

/// The most flaws of one template that are told.
const FLAWS_MAX: usize = 100;

/// The keys that a schema declares.
#[derive(Debug, Clone, Default)]
pub(in crate::pipeline) struct Keys<'a> {
    in_order: Vec<&'a str>,
    known: HashSet<&'a str>,
    /// Those that may be left out.
    optional: HashSet<&'a str>,
    /// Those that may be left out and are filled in.
    filled: HashSet<&'a str>,
}

impl<'a> FromIterator<&'a str> for Keys<'a> {
    fn from_iter<I: IntoIterator<Item = &'a str>>(keys: I) -> Self {
        let in_order: Vec<&str> = keys.into_iter().collect();
        let known = in_order.iter().copied().collect();
        Self { known, in_order, optional: HashSet::new(), filled: HashSet::new() }
    }
}

impl<'a> Keys<'a> {
    /// Whether there are none.
    pub(in crate::pipeline) fn is_empty(&self) -> bool {
        self.in_order.is_empty()
    }

    /// The same, where these may be left out.
    pub(in crate::pipeline) fn optional(mut self, is_optional: impl Fn(&str) -> bool) -> Self {
        self.optional = self.in_order.iter().copied().filter(|key| is_optional(key)).collect();
        self
    }

    /// The same, where these are filled in when they are left out.
    pub(in crate::pipeline) fn filled(mut self, is_filled: impl Fn(&str) -> bool) -> Self {
        self.filled = self.in_order.iter().copied().filter(|key| is_filled(key)).collect();
        self
    }

    fn has(&self, key: &str) -> bool {
        self.known.contains(key)
    }

    fn nearest(&self, key: &str) -> Option<&'a str> {
        nearest(key, self.in_order.iter().copied())
    }

    fn told(&self) -> String {
        listed(self.in_order.iter().copied())
    }
}

/// What a template may name.
#[derive(Debug, Clone, Default)]
pub(in crate::pipeline) struct Scope<'a> {
    /// The stage that the template belongs to.
    pub(in crate::pipeline) stage: Option<&'a str>,
    /// Every stage of the pipeline.
    pub(in crate::pipeline) stages: Vec<&'a str>,
    /// Those whose outputs are there: the stages upstream.
    pub(in crate::pipeline) upstream: HashSet<&'a str>,
    /// The keys that the input's schema declares, where it declares any.
    pub(in crate::pipeline) input: Option<Rc<Keys<'a>>>,
    /// The keys that the schemas of the stages' outputs declare, where they declare any.
    pub(in crate::pipeline) outputs: Rc<HashMap<&'a str, Keys<'a>>>,
    /// Whether `run` is known here.
    pub(in crate::pipeline) run: bool,
    /// Whether `output` is known here: an expression of a gate.
    pub(in crate::pipeline) output: bool,
    /// Whether a key that may be left out is only used where it is surely there, or with a default. Stored definitions
    /// were registered under whatever rules there were.
    pub(in crate::pipeline) strict: bool,
}

/// What a template names.
#[derive(Debug, Default)]
pub(super) struct Named {
    pub(super) stages: Vec<String>,
    pub(super) input: bool,
    /// Whether it names the output under judgement.
    pub(super) output: bool,
    /// Something that the release before this one cannot render.
    pub(super) newest: Option<String>,
}

/// Walks the tree; every flaw at once.
pub(super) fn check(tree: &Stmt<'_>, scope: &Scope<'_>) -> (Named, Vec<Flaw>) {
    let mut walker = Walker {
        scope,
        locals: vec![BTreeSet::new()],
        named: Named::default(),
        flaws: Vec::new(),
        dashed: false,
        proven: Vec::new(),
    };
    walker.statement(tree);
    (walker.named, walker.flaws)
}

struct Walker<'a, 's> {
    scope: &'s Scope<'s>,
    /// The names that the template itself has given, innermost last.
    locals: Vec<BTreeSet<&'a str>>,
    named: Named,
    flaws: Vec<Flaw>,
    /// Whether what was last looked at was the front of an id with `-`, which reads as a subtraction.
    dashed: bool,
    /// The names with keys that are surely there, for the conditions that stand around.
    proven: Vec<String>,
}

/// What a condition proves.
type Proof = fn(&Expr<'_>, &mut Vec<String>);

impl<'a> Walker<'a, '_> {
    fn flaw(&mut self, span: Span, message: impl Into<String>, mend: impl Into<String>) {
        if self.flaws.len() >= FLAWS_MAX {
            return;
        }
        self.flaws.push(Flaw {
            code: Code::TemplateReference,
            message: message.into(),
            mend: Some(mend.into()),
            line: span.start_line.into(),
            column: span.start_col.into(),
        });
    }

    fn globals(&self) -> Vec<&'static str> {
        let names = [("input", true), ("stages", true), ("run", self.scope.run), ("output", self.scope.output)];
        names.into_iter().filter(|(_, known)| *known).map(|(name, _)| name).collect()
    }

    fn is_local(&self, name: &str) -> bool {
        self.locals.iter().any(|names| names.contains(name))
    }

    fn scoped(&mut self, inside: impl FnOnce(&mut Self)) {
        self.locals.push(BTreeSet::new());
        inside(self);
        self.locals.pop();
    }

    /// Looks at what is reached only where a condition holds, or only where it does not.
    fn where_proven(&mut self, condition: &Expr<'a>, proof: Proof, inside: impl FnOnce(&mut Self)) {
        let before = self.proven.len();
        proof(condition, &mut self.proven);
        inside(self);
        self.proven.truncate(before);
    }

    fn is_newer(&mut self, what: impl FnOnce() -> String) {
        self.named.newest.get_or_insert_with(what);
    }

    fn body(&mut self, statements: &[Stmt<'a>]) {
        for statement in statements {
            self.statement(statement);
        }
    }

    fn assign(&mut self, target: &Expr<'a>) {
        match target {
            Expr::Var(var) => {
                if self.globals().contains(&var.id) || var.id == "range" {
                    self.flaw(var.span(), format!("`{}` is taken", var.id), "use another name");
                } else if let Some(names) = self.locals.last_mut() {
                    names.insert(var.id);
                }
            }
            Expr::List(list) => list.items.iter().for_each(|item| self.assign(item)),
            Expr::Tuple(tuple) => tuple.items.iter().for_each(|item| self.assign(item)),
            other => self.flaw(other.span(), "only a name can be assigned to", "set a variable: `{% set name = … %}`"),
        }
    }

    fn statement(&mut self, statement: &Stmt<'a>) {
        match statement {
            Stmt::Template(node) => self.body(&node.children),
            Stmt::EmitExpr(node) => self.expression(&node.expr),
            Stmt::EmitRaw(_) | Stmt::Continue(_) | Stmt::Break(_) => {}
            Stmt::ForLoop(node) => self.for_loop(node, node.span()),
            Stmt::IfCond(node) => {
                self.expression(&node.expr);
                // A name set in a branch is there afterwards, if the branch was taken.
                self.where_proven(&node.expr, guards::if_true, |walker| walker.body(&node.true_body));
                self.where_proven(&node.expr, guards::if_false, |walker| walker.body(&node.false_body));
            }
            Stmt::WithBlock(node) => self.scoped(|walker| {
                for (target, value) in &node.assignments {
                    walker.expression(value);
                    walker.assign(target);
                }
                walker.body(&node.body);
            }),
            Stmt::Set(node) => {
                self.expression(&node.expr);
                self.assign(&node.target);
            }
            Stmt::SetBlock(node) => {
                self.scoped(|walker| walker.body(&node.body));
                node.filter.iter().for_each(|filter| self.expression(filter));
                self.assign(&node.target);
            }
            Stmt::FilterBlock(node) => {
                self.expression(&node.filter);
                self.scoped(|walker| walker.body(&node.body));
            }
            Stmt::AutoEscape(node) => self.unsupported(node.span(), "autoescape"),
            Stmt::Do(node) => self.unsupported(node.span(), "do"),
        }
    }

    fn unsupported(&mut self, span: Span, what: &str) {
        self.flaw(span, format!("`{what}` does not exist here"), "known are for, if, set, with, raw and filter");
    }

    fn for_loop(&mut self, node: &ast::ForLoop<'a>, span: Span) {
        if node.recursive {
            self.unsupported(span, "recursive");
        }
        self.expression(&node.iter);
        self.scoped(|walker| {
            walker.assign(&node.target);
            node.filter_expr.iter().for_each(|filter| walker.expression(filter));
            let before = walker.proven.len();
            node.filter_expr.iter().for_each(|filter| guards::if_true(filter, &mut walker.proven));
            if let Some(names) = walker.locals.last_mut() {
                names.insert("loop");
            }
            walker.body(&node.body);
            walker.proven.truncate(before);
        });
        self.scoped(|walker| walker.body(&node.else_body));
    }

    fn arguments(&mut self, args: &[CallArg<'a>]) {
        for arg in args {
            match arg {
                CallArg::Pos(expr) | CallArg::Kwarg(_, expr) | CallArg::PosSplat(expr) | CallArg::KwargSplat(expr) => {
                    self.expression(expr);
                }
            }
        }
    }

    fn expression(&mut self, expr: &Expr<'a>) {
        if self.path(expr, false) {
            return;
        }
        match expr {
            Expr::Const(_) | Expr::Var(_) => {}
            Expr::Slice(node) => {
                self.expression(&node.expr);
                [&node.start, &node.stop, &node.step].into_iter().flatten().for_each(|e| self.expression(e));
            }
            Expr::UnaryOp(node) => self.expression(&node.expr),
            Expr::BinOp(node) => {
                self.dashed = false;
                if matches!(node.op, ast::BinOpKind::Sub) && self.dashed_key(&node.left, &node.right) {
                    return;
                }
                self.expression(&node.left);
                match node.op {
                    ast::BinOpKind::Sub if self.dashed => {}
                    ast::BinOpKind::ScAnd => {
                        self.where_proven(&node.left, guards::if_true, |walker| walker.expression(&node.right));
                    }
                    ast::BinOpKind::ScOr => {
                        self.where_proven(&node.left, guards::if_false, |walker| walker.expression(&node.right));
                    }
                    _ => self.expression(&node.right),
                }
            }
            Expr::Compare(node) => {
                self.expression(&node.expr);
                node.ops.iter().for_each(|op| self.expression(&op.expr));
            }
            Expr::IfExpr(node) => {
                self.expression(&node.test_expr);
                self.where_proven(&node.test_expr, guards::if_true, |walker| walker.expression(&node.true_expr));
                match &node.false_expr {
                    Some(otherwise) => {
                        self.where_proven(&node.test_expr, guards::if_false, |walker| walker.expression(otherwise));
                    }
                    None => self.is_newer(|| "an `if` without `else`".to_owned()),
                }
            }
            Expr::Filter(node) => {
                self.known("filter", node.name, library::FILTERS, node.span());
                self.filter(node);
                match &node.expr {
                    Some(expr) if guards::is_default(node.name) => self.tolerant(expr),
                    expr => expr.iter().for_each(|e| self.expression(e)),
                }
                self.arguments(&node.args);
            }
            Expr::Test(node) => {
                self.known("test", node.name, library::TESTS, node.span());
                if ["defined", "undefined"].contains(&node.name) {
                    self.tolerant(&node.expr);
                } else {
                    self.expression(&node.expr);
                }
                self.arguments(&node.args);
            }
            Expr::GetAttr(node) => self.expression(&node.expr),
            Expr::GetItem(node) => {
                self.expression(&node.expr);
                self.expression(&node.subscript_expr);
            }
            Expr::Call(node) => self.call(node, node.span()),
            Expr::List(node) => node.items.iter().for_each(|e| self.expression(e)),
            Expr::Tuple(node) => node.items.iter().for_each(|e| self.expression(e)),
            Expr::Map(node) => node.keys.iter().chain(&node.values).for_each(|e| self.expression(e)),
        }
    }

    /// What may be missing.
    fn tolerant(&mut self, expr: &Expr<'a>) {
        if !self.path(expr, true) {
            self.expression(expr);
        }
    }

    /// Notes whether a filter is newer than the release before, and checks a pattern that is a constant.
    fn filter(&mut self, node: &ast::Filter<'a>) {
        if filters::NAMES.contains(&node.name) || is_join_of_attributes(node) {
            self.is_newer(|| format!("the filter `{}`", node.name));
        }
        if node.name == "format"
            && let Some(pattern @ Expr::Const(constant)) = &node.expr
            && constant.value.as_str().is_some_and(filters::is_too_wide)
        {
            self.flaw(pattern.span(), filters::TOO_WIDE, "write the width into the pattern, such as `%10s`");
        }
        if node.name != "regex_replace" {
            return;
        }
        for arg in &node.args {
            let (CallArg::Pos(expr) | CallArg::Kwarg("pattern", expr)) = arg else { continue };
            if let Expr::Const(constant) = expr
                && let Some(source) = constant.value.as_str()
                && let Err(error) = Pattern::compile(source)
            {
                let (message, mend) = pattern::why_not(source, &error);
                self.flaw(expr.span(), message, mend);
            }
            return;
        }
    }

    fn known(&mut self, what: &str, name: &str, known: &[&str], span: Span) {
        if known.contains(&name) {
            return;
        }
        let mend = match nearest(name, known.iter().copied()) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("known: {}", known.join(", ")),
        };
        self.flaw(span, format!("there is no {what} `{name}`"), mend);
    }

    /// Only `range(…)`, the methods of `loop`, and those of texts, maps and lists can be called.
    fn call(&mut self, node: &ast::Call<'a>, span: Span) {
        match &node.expr {
            Expr::Var(var) if var.id == "range" && !self.is_local("range") => {}
            Expr::GetAttr(attr) if matches!(&attr.expr, Expr::Var(var) if var.id == "loop") => {
                if !["cycle", "changed"].contains(&attr.name) {
                    self.flaw(span, format!("`loop` has no method `{}`", attr.name), "it has `cycle` and `changed`");
                }
            }
            Expr::GetAttr(attr) => {
                self.expression(&attr.expr);
                self.method(attr.name, span);
            }
            Expr::Var(var) => {
                let mend = match nearest(var.id, library::FILTERS.iter().copied()) {
                    Some(filter) => {
                        format!("only range(…) can be called; `{filter}` is a filter: `{{{{ value | {filter} }}}}`")
                    }
                    None => "only range(…) can be called; use filters instead: `{{ text | upper }}`".to_owned(),
                };
                self.flaw(span, format!("`{}` cannot be called", cut(var.id, 80)), mend);
            }
            _ => self.flaw(span, "this cannot be called", "use filters instead: `{{ text | upper }}`"),
        }
        self.arguments(&node.args);
    }

    fn method(&mut self, name: &str, span: Span) {
        if methods::METHODS.contains(&name) {
            return self.is_newer(|| format!("the method `{name}`"));
        }
        let mend = if let Some((_, instead)) = methods::INSTEAD.iter().find(|(of, _)| *of == name) {
            (*instead).to_owned()
        } else if let Some(near) = nearest(name, methods::METHODS.iter().copied()) {
            format!("did you mean `{near}`?")
        } else if library::FILTERS.contains(&name) {
            format!("it is a filter: `{{{{ value | {name} }}}}`")
        } else {
            format!("known: {}; or use filters", methods::METHODS.join(", "))
        };
        self.flaw(span, format!("there is no method `{}`", cut(name, 80)), mend);
    }

    /// A key with `-` that is written without brackets, such as `input.user-name`: it reads as a subtraction.
    fn dashed_key(&mut self, left: &Expr<'a>, right: &Expr<'a>) -> bool {
        let (Expr::GetAttr(front), Some(back)) = (left, first_name(right)) else { return false };
        let is_known = self.is_local(back) || self.globals().contains(&back) || back == "range";
        if is_known || !matches!(&front.expr, Expr::Var(var) if var.id == "input" && !self.is_local("input")) {
            return false;
        }
        let key = format!("{}-{back}", front.name);
        let declared = self.scope.input.as_ref().and_then(|keys| {
            keys.in_order.iter().copied().filter(|known| *known == key || known.starts_with(&format!("{key}-"))).min()
        });
        if declared.is_none() && self.scope.input.as_ref().is_some_and(|keys| keys.has(front.name)) {
            return false;
        }
        let shown = declared.unwrap_or(&key).to_owned();
        let message = format!("`input.{}` reads as a subtraction", cut(&shown, 80));
        self.named.input = true;
        self.flaw(
            left.span(),
            message,
            format!("write `input['{}']`: a key with `-` stands in brackets", cut(&shown, 80)),
        );
        true
    }

    /// Checks a name with the keys that follow it, such as `stages['a'].output.b`; false if `expr` is no such thing.
    /// Where it is `tolerant`, the last key may be missing.
    fn path(&mut self, expr: &Expr<'a>, tolerant: bool) -> bool {
        let mut keys = Vec::new();
        let mut inner = expr;
        let var = loop {
            match inner {
                Expr::Var(var) => break var,
                Expr::GetAttr(node) => {
                    keys.push(Some(node.name.to_owned()));
                    inner = &node.expr;
                }
                Expr::GetItem(node) => {
                    let key = match &node.subscript_expr {
                        Expr::Const(constant) => constant.value.as_str().map(str::to_owned),
                        computed => {
                            self.expression(computed);
                            None
                        }
                    };
                    keys.push(key);
                    inner = &node.expr;
                }
                _ => return false,
            }
        };
        keys.reverse();
        let span = var.span();
        let tolerated = if tolerant { keys.len() } else { usize::MAX };
        match var.id {
            name if self.is_local(name) => {}
            "input" => self.input(&keys, tolerated == 1, span),
            "stages" => self.stage(&keys, tolerated == 3, span),
            "run" if self.scope.run => {
                if !matches!(keys.as_slice(), [Some(id)] if id == "id") {
                    self.flaw(span, "a run has nothing but its id", "write `run.id`");
                }
            }
            "output" if self.scope.output => {
                self.named.output = true;
                if let Some(id) = self.scope.stage {
                    self.output_key(id, keys.first(), "output", span);
                    self.optional_output_key(id, keys.first(), tolerated == 1, span);
                }
            }
            name => self.unknown(name, span),
        }
        true
    }

    fn unknown(&mut self, name: &str, span: Span) {
        let globals = self.globals();
        let known = globals.iter().copied().chain(self.locals.iter().flatten().copied());
        let mend = if self.scope.stages.contains(&name) {
            format!("write `{}`", stage_output(name))
        } else if let Some(near) = nearest(name, known) {
            format!("did you mean `{near}`?")
        } else if self.scope.input.as_ref().is_some_and(|keys| keys.has(name)) {
            format!("write `input.{name}`")
        } else {
            format!("known are {}", globals.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", "))
        };
        self.flaw(span, format!("there is no `{name}`"), mend);
    }

    fn is_proven(&self, map: &str, key: &str) -> bool {
        let name = guards::name(map, [key]);
        self.proven.contains(&name)
    }

    /// Tells a key that may be left out, and is used as if it were always there.
    fn may_be_missing(&mut self, path: &str, written: &str, mend: &str, span: Span) {
        if self.scope.strict && !self.proven.iter().any(|proven| proven == path) {
            let message = format!("`{written}` may be left out, and then this would fail");
            let mend = format!("write `{written} | default('')`, ask `{written} is defined` first, or {mend}");
            self.flaw(span, message, mend);
        }
    }

    fn input(&mut self, keys: &[Option<String>], tolerant: bool, span: Span) {
        self.named.input = true;
        let (Some(Some(key)), Some(known)) = (keys.first(), &self.scope.input) else { return };
        if known.has(key) {
            if known.optional.contains(key.as_str()) && !tolerant {
                let mend = format!("add `{key}` to the `required` of the input, or a `default` to its schema");
                self.may_be_missing(&guards::name("input", [key.as_str()]), &written("input", key), &mend, span);
            }
            // The release before this one fills in nothing.
            if known.filled.contains(key.as_str()) && !tolerant && !self.is_proven("input", key) {
                self.is_newer(|| format!("`{}` with the default of the input's schema", written("input", key)));
            }
            return;
        }
        let mend = match known.nearest(key) {
            Some(near) => format!("did you mean `input.{near}`?"),
            None => format!("add it to the input's `properties`, which has: {}", known.told()),
        };
        self.flaw(span, format!("the input's schema declares no `{}`", cut(key, 80)), mend);
    }

    /// Checks a key of a stage's output, written after `prefix`, against what its schema declares.
    fn output_key(&mut self, id: &str, key: Option<&Option<String>>, prefix: &str, span: Span) {
        let (Some(Some(key)), Some(known)) = (key, self.scope.outputs.get(id)) else { return };
        if known.has(key) {
            return;
        }
        let mend = match known.nearest(key) {
            Some(near) => format!("did you mean `{prefix}.{near}`?"),
            None => format!("add it to the output's `properties`, which has: {}", known.told()),
        };
        let (id, key) = (cut(id, 80), cut(key, 80));
        self.flaw(span, format!("the schema of the output of stage `{id}` declares no `{key}`"), mend);
    }

    /// Tells a key of the output under judgement that may be left out, and is used as if it were always there.
    fn optional_output_key(&mut self, id: &str, key: Option<&Option<String>>, tolerant: bool, span: Span) {
        if let Some(Some(key)) = key
            && !tolerant
            && self.scope.outputs.get(id).is_some_and(|known| known.optional.contains(key.as_str()))
        {
            let mend = format!("add `{key}` to the `required` of the output's schema");
            self.may_be_missing(&guards::name("output", [key.as_str()]), &written("output", key), &mend, span);
        }
    }

    fn stage(&mut self, keys: &[Option<String>], tolerant: bool, span: Span) {
        let mend_form = "write `stages.id.output` or `stages['the-id'].output`";
        let Some(Some(id)) = keys.first() else {
            return self.flaw(span, "`stages` is used without the id of a stage", mend_form);
        };
        if !self.scope.stages.contains(&id.as_str()) {
            let mend =
                self.scope.stages.iter().find(|known| known.split('-').next() == Some(id) && known.contains('-'));
            self.dashed = mend.is_some();
            let mend = match (mend, nearest(id, self.scope.stages.iter().copied())) {
                (Some(known), _) => format!("write `{}`: an id with `-` stands in brackets", stage_output(known)),
                (None, Some(near)) => format!("did you mean `{}`?", stage_output(near)),
                (None, None) => format!("known stages: {}", listed(self.scope.stages.iter().copied())),
            };
            return self.flaw(span, format!("there is no stage `{id}`"), mend);
        }
        match keys.get(1) {
            Some(Some(key)) if key == "output" => {}
            Some(Some(key)) => {
                let message = format!("a stage has no `{key}`, only its `output`");
                return self.flaw(span, message, format!("write `{}`", stage_output(id)));
            }
            _ => {
                let dashed = self.scope.stages.iter().find(|known| known.starts_with(&format!("{id}-")));
                let mend = dashed
                    .map_or_else(|| mend_form.to_owned(), |known| format!("{mend_form}; or `{}`", stage_output(known)));
                return self.flaw(span, format!("stage `{id}` is used without `.output`"), mend);
            }
        }
        if self.scope.stage == Some(id.as_str()) {
            let mend = "a template sees only the stages that come before it";
            return self.flaw(span, format!("stage `{id}` cannot use its own output"), mend);
        }
        if !self.scope.upstream.contains(id.as_str()) {
            let message = format!("stage `{id}` is not upstream, so its output may not be there yet");
            return self.flaw(span, message, format!("add `{id}` to `needs`"));
        }
        if !self.named.stages.contains(id) {
            self.named.stages.push(id.clone());
        }
        self.output_key(id, keys.get(2), &stage_output(id), span);
        if let Some(Some(key)) = keys.get(2)
            && !tolerant
            && self.scope.outputs.get(id.as_str()).is_some_and(|known| known.optional.contains(key.as_str()))
        {
            let path = guards::name("stages", [id.as_str(), "output", key]);
            let mend = format!("add `{key}` to the `required` of that output's schema");
            self.may_be_missing(&path, &written(&stage_output(id), key), &mend, span);
        }
    }
}

/// Whether a `join` has more than the text between the items, by position, by name or in a way that does not show it.
fn is_join_of_attributes(node: &ast::Filter<'_>) -> bool {
    node.name == "join" && !matches!(node.args.as_slice(), [] | [CallArg::Pos(_)])
}

/// The name that an expression begins with.
fn first_name<'a>(expr: &Expr<'a>) -> Option<&'a str> {
    match expr {
        Expr::Var(var) => Some(var.id),
        Expr::GetAttr(node) => first_name(&node.expr),
        Expr::GetItem(node) => first_name(&node.expr),
        Expr::Filter(node) => first_name(node.expr.as_ref()?),
        Expr::BinOp(node) => first_name(&node.left),
        _ => None,
    }
}

/// How a key is written in a template.
fn written(map: &str, key: &str) -> String {
    let is_name = key.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        && !key.starts_with(|c: char| c.is_ascii_digit());
    if is_name { format!("{map}.{key}") } else { format!("{map}['{}']", cut(key, 80)) }
}

/// How the output of a stage is written in a template.
fn stage_output(id: &str) -> String {
    let is_name = !id.contains('-') && !id.starts_with(|c: char| c.is_ascii_digit());
    if is_name { format!("stages.{id}.output") } else { format!("stages['{id}'].output") }
}
