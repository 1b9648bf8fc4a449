//! Compiled templates: owns the source together with the code that borrows it, so that a template is parsed when its
//! pipeline is, and not once more at each rendering. Knows no values.

use std::{collections::BTreeMap, fmt, sync::Arc};

use minijinja::{
    AutoEscape, Error, Output, Value,
    machinery::{CodeGenerator, Instructions, ast, eval},
};
use self_cell::self_cell;

use super::{Kind, RENDERING_UNITS, library, sandbox, tree};
use crate::evaluation::{self, Interrupted};

/// What the template is called where the engine wants a name.
const NAME: &str = "template";

/// The code of a template in one of its forms.
struct Code<'s> {
    instructions: Instructions<'s>,
    blocks: BTreeMap<&'s str, Instructions<'s>>,
}

/// The forms that a template has.
struct Forms<'s> {
    /// Writes its text; none for an expression.
    text: Option<Code<'s>>,
    /// Gives its value; none for what is more than one expression.
    value: Option<Code<'s>>,
}

self_cell!(
    struct Cell {
        owner: Box<str>,
        #[covariant]
        dependent: Forms,
    }
);

/// A template's source and its code. Cheap to clone.
#[derive(Clone)]
pub(super) struct Compiled(Arc<Cell>);

impl fmt::Debug for Compiled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.source(), f)
    }
}

impl Compiled {
    /// Compiles a source that was parsed as this kind before.
    pub(super) fn new(source: &str, kind: Kind) -> Result<Self, Error> {
        Cell::try_new(source.into(), |source| forms(source, kind)).map(|cell| Self(Arc::new(cell)))
    }

    pub(super) fn source(&self) -> &str {
        self.0.borrow_owner()
    }

    /// Runs the form that writes text.
    pub(super) fn write(&self, context: Value, output: &mut Output<'_>) -> Result<(), Error> {
        match &self.0.borrow_dependent().text {
            Some(code) => run(code, context, output).map(drop),
            None => Err(library::failed("an expression has no text")),
        }
    }

    /// Runs the form that gives a value; none where there is none to give.
    pub(super) fn value(&self, context: Value, output: &mut Output<'_>) -> Result<Option<Value>, Error> {
        match &self.0.borrow_dependent().value {
            Some(code) => run(code, context, output),
            None => Err(library::failed("a text has no other value")),
        }
    }
}

fn run(code: &Code<'_>, context: Value, output: &mut Output<'_>) -> Result<Option<Value>, Error> {
    evaluation::pay(RENDERING_UNITS).map_err(|_| library::failed(Interrupted::TOLD))?;
    library::charged(|| {
        eval(library::environment(), &code.instructions, context, &code.blocks, output, AutoEscape::None)
            .map(|(value, _)| value)
    })
}

fn forms(source: &str, kind: Kind) -> Result<Forms<'_>, Error> {
    let tree = tree(source, kind)?;
    let only = match &tree {
        ast::Stmt::EmitExpr(only) => Some(&only.expr),
        ast::Stmt::Template(template) if kind == Kind::Single => match template.children.as_slice() {
            [ast::Stmt::EmitExpr(only)] => Some(&only.expr),
            _ => None,
        },
        _ => None,
    };
    let value = only.map(|only| {
        let mut generator = CodeGenerator::new(NAME, source);
        generator.compile_expr(&sandbox::expression(only));
        finish(generator)
    });
    let text = (kind != Kind::Expression).then(|| {
        let mut generator = CodeGenerator::new(NAME, source);
        generator.compile_stmt(&sandbox::statement(&tree));
        finish(generator)
    });
    Ok(Forms { text, value })
}

fn finish(generator: CodeGenerator<'_>) -> Code<'_> {
    let (instructions, blocks) = generator.finish();
    Code { instructions, blocks }
}
