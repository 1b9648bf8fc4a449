//! The rewriting that makes a template safe to run: owns a copy of the syntax tree in which everything that copies,
//! joins or compares data is charged for it. Decides nothing about names; that is [`super::references`].
//!
//! Fuel alone counts steps, and one step may double a text: forty of them would fill any memory. So each operand of
//! such a step passes through the filter `charge`, which takes its size from the rendering's budget. Fixed text is
//! emitted as a value for the same reason: the formatter counts it.

use minijinja::{
    Value,
    machinery::{
        Span,
        ast::{self, BinOpKind, CallArg, Expr, Spanned, Stmt},
    },
};

use super::guards;

/// Charges for its value's size.
pub(super) const CHARGE: &str = "(charge)";
/// Passes numbers alone: texts and lists cannot be multiplied.
pub(super) const NUMBER: &str = "(number)";
/// Charges for looking a place up in its value.
pub(super) const INDEXED: &str = "(indexed)";
/// Takes a part of a text or a list.
pub(super) const SLICE: &str = "(slice)";
/// Makes its value a text, as it would be inserted.
pub(super) const TEXT: &str = "(text)";
/// Calls the method that its first argument names.
pub(super) const METHOD: &str = "(method)";
/// The value of `loop.cycle(…)` in this round.
pub(super) const CYCLE: &str = "(cycle)";

fn at<T>(span: Span, node: T) -> Spanned<T> {
    Spanned::new(node, span)
}

fn through<'a>(filter: &'static str, expr: Expr<'a>) -> Expr<'a> {
    let span = expr.span();
    Expr::Filter(at(span, ast::Filter { name: filter, expr: Some(expr), args: Vec::new() }))
}

fn charge<'a>(expr: &Expr<'a>) -> Expr<'a> {
    match expr {
        Expr::Const(_) => expression(expr),
        _ => through(CHARGE, expression(expr)),
    }
}

fn all<'a>(exprs: &[Expr<'a>]) -> Vec<Expr<'a>> {
    exprs.iter().map(expression).collect()
}

fn optional<'a>(expr: Option<&Expr<'a>>) -> Option<Expr<'a>> {
    expr.map(expression)
}

/// The arguments of what pays for them itself.
fn arguments<'a>(args: &[CallArg<'a>]) -> Vec<CallArg<'a>> {
    arguments_through(args, expression)
}

fn arguments_through<'a>(args: &[CallArg<'a>], single: impl Fn(&Expr<'a>) -> Expr<'a>) -> Vec<CallArg<'a>> {
    args.iter()
        .map(|arg| match arg {
            CallArg::Pos(expr) => CallArg::Pos(single(expr)),
            CallArg::Kwarg(name, expr) => CallArg::Kwarg(name, single(expr)),
            CallArg::PosSplat(expr) => CallArg::PosSplat(charge(expr)),
            CallArg::KwargSplat(expr) => CallArg::KwargSplat(charge(expr)),
        })
        .collect()
}

fn binary<'a>(node: &ast::BinOp<'a>) -> ast::BinOp<'a> {
    let op = node.op;
    let (left, right) = match op {
        BinOpKind::ScAnd | BinOpKind::ScOr => (expression(&node.left), expression(&node.right)),
        BinOpKind::Concat => (through(TEXT, expression(&node.left)), through(TEXT, expression(&node.right))),
        BinOpKind::Mul => (through(NUMBER, expression(&node.left)), through(NUMBER, expression(&node.right))),
        _ => (through(CHARGE, expression(&node.left)), through(CHARGE, expression(&node.right))),
    };
    ast::BinOp { op, left, right }
}

/// The safe form of what may be missing: `a if b` is missing where `b` does not hold.
fn optional_value<'a>(expr: &Expr<'a>) -> Expr<'a> {
    match expr {
        Expr::IfExpr(node) if node.false_expr.is_none() => {
            let (test_expr, true_expr) = (expression(&node.test_expr), expression(&node.true_expr));
            Expr::IfExpr(at(expr.span(), ast::IfExpr { test_expr, true_expr, false_expr: None }))
        }
        other => expression(other),
    }
}

/// The safe form of an expression. `a if b` without an `else` is an empty text where `b` does not hold, as in Jinja; only
/// what asks whether it is there sees that it is missing.
pub(super) fn expression<'a>(expr: &Expr<'a>) -> Expr<'a> {
    let span = expr.span();
    match expr {
        Expr::Var(node) => Expr::Var(at(span, ast::Var { id: node.id })),
        Expr::Const(node) => Expr::Const(at(span, ast::Const { value: node.value.clone() })),
        Expr::Slice(node) => {
            let place = |part: Option<&Expr<'a>>| {
                CallArg::Pos(optional(part).unwrap_or_else(|| Expr::Const(at(span, ast::Const { value: ().into() }))))
            };
            let args = vec![place(node.start.as_ref()), place(node.stop.as_ref()), place(node.step.as_ref())];
            Expr::Filter(at(span, ast::Filter { name: SLICE, expr: Some(expression(&node.expr)), args }))
        }
        Expr::UnaryOp(node) => {
            // Built anew because the operator is no copy.
            let op =
                if matches!(node.op, ast::UnaryOpKind::Not) { ast::UnaryOpKind::Not } else { ast::UnaryOpKind::Neg };
            Expr::UnaryOp(at(span, ast::UnaryOp { op, expr: expression(&node.expr) }))
        }
        Expr::BinOp(node) => Expr::BinOp(at(span, binary(node))),
        Expr::Compare(node) => {
            let ops = node.ops.iter().map(|op| ast::CompareOp { op: op.op, expr: charge(&op.expr) }).collect();
            Expr::Compare(at(span, ast::Compare { expr: charge(&node.expr), ops }))
        }
        Expr::IfExpr(node) => Expr::IfExpr(at(
            span,
            ast::IfExpr {
                test_expr: expression(&node.test_expr),
                true_expr: expression(&node.true_expr),
                false_expr: Some(
                    node.false_expr
                        .as_ref()
                        .map_or_else(|| Expr::Const(at(span, ast::Const { value: Value::from("") })), expression),
                ),
            },
        )),
        Expr::Filter(node) => {
            let inner = if guards::is_default(node.name) { optional_value } else { expression };
            let (expr, args) = (node.expr.as_ref().map(inner), arguments(&node.args));
            // From what is filtered on, so that an error shows it.
            let span = expr.as_ref().map_or(span, |expr| Span {
                start_line: expr.span().start_line,
                start_col: expr.span().start_col,
                start_offset: expr.span().start_offset,
                ..span
            });
            Expr::Filter(at(span, ast::Filter { name: node.name, expr, args }))
        }
        Expr::Test(node) => {
            let is_asked = ["defined", "undefined"].contains(&node.name);
            let inner = if is_asked { optional_value } else { expression };
            let (expr, args) = (inner(&node.expr), arguments(&node.args));
            Expr::Test(at(span, ast::Test { name: node.name, expr, args }))
        }
        Expr::GetAttr(node) => Expr::GetAttr(at(span, ast::GetAttr { expr: expression(&node.expr), name: node.name })),
        Expr::GetItem(node) => {
            let is_key = matches!(&node.subscript_expr, Expr::Const(key) if key.value.as_str().is_some());
            let expr = expression(&node.expr);
            // Only a map has keys, and finds them at once.
            let expr = if is_key { expr } else { through(INDEXED, expr) };
            Expr::GetItem(at(span, ast::GetItem { expr, subscript_expr: expression(&node.subscript_expr) }))
        }
        Expr::Call(node) => match &node.expr {
            Expr::GetAttr(method) if method.name == "cycle" => {
                // The library's own divides by the number of its arguments, also where there are none.
                let round = ast::GetAttr { expr: expression(&method.expr), name: "index0" };
                let expr = Some(Expr::GetAttr(at(span, round)));
                Expr::Filter(at(span, ast::Filter { name: CYCLE, expr, args: arguments(&node.args) }))
            }
            Expr::GetAttr(method) if !is_loop(&method.expr) => {
                let name = CallArg::Pos(Expr::Const(at(span, ast::Const { value: Value::from(method.name) })));
                let args = std::iter::once(name).chain(arguments(&node.args)).collect();
                let expr = Some(expression(&method.expr));
                Expr::Filter(at(method.expr.span(), ast::Filter { name: METHOD, expr, args }))
            }
            _ => {
                let args = arguments_through(&node.args, charge);
                Expr::Call(at(span, ast::Call { expr: expression(&node.expr), args }))
            }
        },
        Expr::List(node) => through(CHARGE, Expr::List(at(span, ast::List { items: all(&node.items) }))),
        Expr::Tuple(node) => through(CHARGE, Expr::Tuple(at(span, ast::Tuple { items: all(&node.items) }))),
        Expr::Map(node) => {
            let (keys, values) = (all(&node.keys), all(&node.values));
            through(CHARGE, Expr::Map(at(span, ast::Map { keys, values })))
        }
    }
}

fn is_loop(expr: &Expr<'_>) -> bool {
    matches!(expr, Expr::Var(var) if var.id == "loop")
}

fn body<'a>(statements: &[Stmt<'a>]) -> Vec<Stmt<'a>> {
    statements.iter().map(statement).collect()
}

/// A target of an assignment: names and tuples of names, which must stay what they are.
fn target<'a>(expr: &Expr<'a>) -> Expr<'a> {
    let span = expr.span();
    match expr {
        Expr::List(node) => Expr::List(at(span, ast::List { items: node.items.iter().map(target).collect() })),
        Expr::Tuple(node) => Expr::Tuple(at(span, ast::Tuple { items: node.items.iter().map(target).collect() })),
        other => expression(other),
    }
}

/// The safe form of a statement.
pub(super) fn statement<'a>(stmt: &Stmt<'a>) -> Stmt<'a> {
    match stmt {
        Stmt::Template(node) => Stmt::Template(at(node.span(), ast::Template { children: body(&node.children) })),
        Stmt::EmitExpr(node) => Stmt::EmitExpr(at(node.span(), ast::EmitExpr { expr: expression(&node.expr) })),
        Stmt::EmitRaw(node) => {
            let expr = Expr::Const(at(node.span(), ast::Const { value: Value::from(node.raw) }));
            Stmt::EmitExpr(at(node.span(), ast::EmitExpr { expr }))
        }
        Stmt::ForLoop(node) => Stmt::ForLoop(at(
            node.span(),
            ast::ForLoop {
                target: target(&node.target),
                iter: charge(&node.iter),
                filter_expr: optional(node.filter_expr.as_ref()),
                recursive: false,
                body: body(&node.body),
                else_body: body(&node.else_body),
            },
        )),
        Stmt::IfCond(node) => Stmt::IfCond(at(
            node.span(),
            ast::IfCond {
                expr: expression(&node.expr),
                true_body: body(&node.true_body),
                false_body: body(&node.false_body),
            },
        )),
        Stmt::WithBlock(node) => {
            let assignments = node.assignments.iter().map(|(to, expr)| (target(to), expression(expr))).collect();
            Stmt::WithBlock(at(node.span(), ast::WithBlock { assignments, body: body(&node.body) }))
        }
        Stmt::Set(node) => {
            let (target, expr) = (target(&node.target), expression(&node.expr));
            Stmt::Set(at(node.span(), ast::Set { target, expr }))
        }
        Stmt::SetBlock(node) => {
            let (target, filter) = (target(&node.target), optional(node.filter.as_ref()));
            Stmt::SetBlock(at(node.span(), ast::SetBlock { target, filter, body: body(&node.body) }))
        }
        Stmt::FilterBlock(node) => {
            let (filter, body) = (expression(&node.filter), body(&node.body));
            Stmt::FilterBlock(at(node.span(), ast::FilterBlock { filter, body }))
        }
        Stmt::Continue(node) => Stmt::Continue(at(node.span(), ast::Continue)),
        Stmt::Break(node) => Stmt::Break(at(node.span(), ast::Break)),
        // Refused when the template was checked; were one left, it would render as nothing.
        Stmt::AutoEscape(_) | Stmt::Do(_) => {
            Stmt::Template(at(Span::default(), ast::Template { children: Vec::new() }))
        }
    }
}
