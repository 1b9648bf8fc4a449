//! What a condition proves: owns which keys are surely there where it holds, or where it does not. Judges nothing.

use minijinja::machinery::ast::{BinOpKind, CompareOpKind, Expr, UnaryOpKind};

/// Separates the parts of a name.
const STEP: char = '\u{1f}';

/// A name with the keys that follow it, such as `input.note`; None for anything else, and for keys that are computed.
pub(super) fn dotted(expr: &Expr<'_>) -> Option<String> {
    match expr {
        Expr::Var(var) => Some(var.id.to_owned()),
        Expr::GetAttr(node) => Some(format!("{}{STEP}{}", dotted(&node.expr)?, node.name)),
        Expr::GetItem(node) => match &node.subscript_expr {
            Expr::Const(key) => Some(format!("{}{STEP}{}", dotted(&node.expr)?, key.value.as_str()?)),
            _ => None,
        },
        _ => None,
    }
}

/// The same of a name and its keys.
pub(super) fn name<'k>(first: &str, keys: impl IntoIterator<Item = &'k str>) -> String {
    keys.into_iter().fold(first.to_owned(), |name, key| format!("{name}{STEP}{key}"))
}

/// Notes what is there where the expression is true.
pub(super) fn if_true(expr: &Expr<'_>, proven: &mut Vec<String>) {
    match expr {
        Expr::Var(_) | Expr::GetAttr(_) | Expr::GetItem(_) => proven.extend(dotted(expr)),
        Expr::Test(node) if node.name != "undefined" && node.name != "none" => proven.extend(dotted(&node.expr)),
        Expr::UnaryOp(node) if matches!(node.op, UnaryOpKind::Not) => if_false(&node.expr, proven),
        Expr::BinOp(node) => match node.op {
            BinOpKind::ScAnd => {
                if_true(&node.left, proven);
                if_true(&node.right, proven);
            }
            BinOpKind::In => proven.extend(membership(&node.left, &node.right)),
            _ => {}
        },
        Expr::Compare(node) => {
            if let [op] = node.ops.as_slice()
                && matches!(op.op, CompareOpKind::In)
            {
                proven.extend(membership(&node.expr, &op.expr));
            }
        }
        // What stands in its place is not true, so that it is there itself.
        Expr::Filter(node) if is_default(node.name) => {
            let is_false = match node.args.as_slice() {
                [] => true,
                [minijinja::machinery::ast::CallArg::Pos(Expr::Const(value)), ..] => !value.value.is_true(),
                [minijinja::machinery::ast::CallArg::Pos(Expr::List(list)), ..] => list.items.is_empty(),
                [minijinja::machinery::ast::CallArg::Pos(Expr::Map(map)), ..] => map.keys.is_empty(),
                _ => false,
            };
            if is_false {
                proven.extend(node.expr.as_ref().and_then(dotted));
            }
        }
        // `input.get('note')`
        Expr::Call(node) => {
            if let Expr::GetAttr(method) = &node.expr
                && let [minijinja::machinery::ast::CallArg::Pos(key)] = node.args.as_slice()
                && method.name == "get"
            {
                proven.extend(membership(key, &method.expr));
            }
        }
        _ => {}
    }
}

/// Notes what is there where the expression is not true.
pub(super) fn if_false(expr: &Expr<'_>, proven: &mut Vec<String>) {
    match expr {
        Expr::Test(node) if node.name == "undefined" => proven.extend(dotted(&node.expr)),
        Expr::UnaryOp(node) if matches!(node.op, UnaryOpKind::Not) => if_true(&node.expr, proven),
        Expr::BinOp(node) if matches!(node.op, BinOpKind::ScOr) => {
            if_false(&node.left, proven);
            if_false(&node.right, proven);
        }
        Expr::Compare(node) => {
            if let [op] = node.ops.as_slice()
                && matches!(op.op, CompareOpKind::NotIn)
            {
                proven.extend(membership(&node.expr, &op.expr));
            }
        }
        _ => {}
    }
}

/// Whether a filter stands in for what is not there.
pub(super) fn is_default(filter: &str) -> bool {
    ["d", "default"].contains(&filter)
}

/// `'note' in input`
fn membership(key: &Expr<'_>, map: &Expr<'_>) -> Option<String> {
    let Expr::Const(key) = key else { return None };
    Some(format!("{}{STEP}{}", dotted(map)?, key.value.as_str()?))
}
