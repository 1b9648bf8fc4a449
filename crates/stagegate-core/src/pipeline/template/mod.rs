//! Templates and expressions: owns their language, its limits and their rendering. Never reaches beyond the values
//! that it is given: there is no include, no import, no function that does I/O.
//!
//! The language is Jinja's, less what could run away. A syntax tree is checked ([`references`]), rewritten so that
//! whatever copies or compares data is charged for it ([`sandbox`]), and run with limited fuel on an environment that
//! holds only charged filters and tests ([`library`]).
//!
//! Maps are rendered with their keys sorted: the same data is the same prompt (and the same cache key) wherever it
//! has been stored in between.

mod compiled;
mod data;
mod filters;
mod guards;
mod library;
mod methods;
mod references;
mod sandbox;

use std::{collections::BTreeMap, sync::Arc};

use minijinja::{
    Error, ErrorKind,
    machinery::{Token, ast, make_string_output, parse, parse_expr, tokenize},
    syntax::SyntaxConfig,
};
use serde_json::Value;

pub(super) use references::{Keys, Scope};

use self::compiled::Compiled;
use crate::{Code, evaluation};

/// The longest template, in bytes.
pub(super) const TEMPLATE_MAX_BYTES: usize = 128 * 1024;
/// The longest expression or tag, in tokens. It bounds how deep the parser and all that follows it can go.
const TAG_MAX_TOKENS: usize = 300;
/// The most `elif` in a template: each is a level of nesting.
const ELIF_MAX: usize = 100;
/// The most steps that a rendering may take.
const FUEL: u64 = 250_000;
/// What a rendering costs beside the data that it handles, in units of [`evaluation`].
const RENDERING_UNITS: u64 = 4_000;
/// The longest text that a rendering may give, in bytes.
pub(super) const RENDERED_MAX_BYTES: usize = 1024 * 1024;

/// What is wrong with a template, and where in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Flaw {
    pub(super) code: Code,
    pub(super) message: String,
    pub(super) mend: Option<String>,
    /// The line in the template, counted from 1; 0 where it is not known.
    pub(super) line: usize,
    /// The column in that line, counted from 0.
    pub(super) column: usize,
}

/// What a template may see.
#[derive(Clone, Copy)]
pub(super) struct Vars<'a> {
    pub(super) run_id: &'a str,
    pub(super) input: &'a Arc<Value>,
    /// The output of a stage, if it is there.
    pub(super) stage: &'a dyn Fn(&str) -> Option<&'a Arc<Value>>,
    /// The output under judgement; for expressions.
    pub(super) output: Option<&'a Arc<Value>>,
}

/// What a text is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A template whose rendering is a text.
    Text,
    /// A template that is nothing but one expression; in an output mapping it keeps its type.
    Single,
    /// An expression without braces.
    Expression,
}

/// A checked template or expression, compiled.
#[derive(Debug, Clone)]
pub(super) struct Template {
    compiled: Compiled,
    kind: Kind,
    /// The stages whose outputs it names.
    stages: Vec<String>,
    /// Whether it names the input.
    input: bool,
    /// Whether it names the output under judgement.
    output: bool,
    /// Something that the release before this one cannot render.
    newest: Option<String>,
}

impl Template {
    /// A template; every flaw at once.
    pub(super) fn text(source: &str, scope: &Scope<'_>) -> Result<Self, Vec<Flaw>> {
        Self::check(source, Kind::Text, scope)
    }

    /// An expression; every flaw at once.
    pub(super) fn expression(source: &str, scope: &Scope<'_>) -> Result<Self, Vec<Flaw>> {
        Self::check(source, Kind::Expression, scope)
    }

    fn check(source: &str, kind: Kind, scope: &Scope<'_>) -> Result<Self, Vec<Flaw>> {
        bounded(source, kind == Kind::Expression).map_err(|flaw| vec![flaw])?;
        let tree = tree(source, kind).map_err(|error| vec![syntax_flaw(&error)])?;
        let kind = match &tree {
            ast::Stmt::Template(template) => match template.children.as_slice() {
                [ast::Stmt::EmitExpr(_)] => Kind::Single,
                _ => kind,
            },
            _ => kind,
        };
        let (named, flaws) = references::check(&tree, scope);
        if !flaws.is_empty() {
            return Err(flaws);
        }
        let compiled = Compiled::new(source, kind).map_err(|error| vec![syntax_flaw(&error)])?;
        let references::Named { stages, input, output, newest } = named;
        Ok(Self { compiled, kind, stages, input, output, newest })
    }

    /// The stages whose outputs it names, and whether it names the input.
    pub(super) fn names(&self) -> (&[String], bool) {
        (&self.stages, self.input)
    }

    /// Whether it names the output under judgement.
    pub(super) fn names_output(&self) -> bool {
        self.output
    }

    /// Something in it that the release before this one cannot render.
    pub(super) fn newest(&self) -> Option<&str> {
        self.newest.as_deref()
    }

    /// Renders to text.
    pub(super) fn render(&self, vars: &Vars<'_>) -> Result<String, String> {
        let context = self.context(vars)?;
        let mut text = String::new();
        let written = self.compiled.write(context, &mut make_string_output(&mut text));
        written.map_err(|error| describe(&error, self.compiled.source()))?;
        if text.len() > RENDERED_MAX_BYTES {
            return Err(format!("the text has {} bytes, at most {RENDERED_MAX_BYTES} are allowed", text.len()));
        }
        Ok(text)
    }

    /// Renders to a value: what is nothing but one expression keeps its type, all else becomes text.
    pub(super) fn value(&self, vars: &Vars<'_>) -> Result<Value, String> {
        if self.kind == Kind::Text {
            return self.render(vars).map(Value::String);
        }
        let context = self.context(vars)?;
        let mut sink = String::new();
        let value = self.compiled.value(context, &mut make_string_output(&mut sink));
        value
            .and_then(|value| library::to_json(&value.unwrap_or(minijinja::Value::UNDEFINED)))
            .map_err(|error| describe(&error, self.compiled.source()))
    }

    /// Whether an expression holds; it must give true or false.
    pub(super) fn holds(&self, vars: &Vars<'_>) -> Result<bool, String> {
        match self.value(vars)? {
            Value::Bool(holds) => Ok(holds),
            other => Err(format!("it gives {}, not true or false", super::schema::told(&other))),
        }
    }

    /// Only what the template names is in it.
    fn context(&self, vars: &Vars<'_>) -> Result<minijinja::Value, String> {
        let mut stages = BTreeMap::new();
        for id in &self.stages {
            let output = (vars.stage)(id).ok_or_else(|| format!("the output of stage `{id}` is not there yet"))?;
            let stage = BTreeMap::from([("output", data::view(output))]);
            stages.insert(id.as_str(), minijinja::Value::from(stage));
        }
        let run = BTreeMap::from([("id", minijinja::Value::from(vars.run_id))]);
        let mut context =
            BTreeMap::from([("stages", minijinja::Value::from(stages)), ("run", minijinja::Value::from(run))]);
        if self.input {
            context.insert("input", data::view(vars.input));
        }
        if let Some(output) = vars.output {
            context.insert("output", data::view(output));
        }
        Ok(minijinja::Value::from(context))
    }
}

fn tree(source: &str, kind: Kind) -> Result<ast::Stmt<'_>, Error> {
    if kind == Kind::Expression {
        let expr = parse_expr(source)?;
        let span = expr.span();
        return Ok(ast::Stmt::EmitExpr(ast::Spanned::new(ast::EmitExpr { expr }, span)));
    }
    parse(source, "template", SyntaxConfig::default())
}

/// Refuses what would take the parser too deep; it recurses along some of these without a limit of its own.
fn bounded(source: &str, expression: bool) -> Result<(), Flaw> {
    let too_large = |line: usize, message: String, mend: &str| Flaw {
        code: Code::DefinitionTooLarge,
        message,
        mend: Some(mend.to_owned()),
        line,
        column: 0,
    };
    if source.len() > TEMPLATE_MAX_BYTES {
        let message = format!("the template has {} bytes, at most {TEMPLATE_MAX_BYTES} are allowed", source.len());
        return Err(too_large(0, message, "pass long texts in the input"));
    }
    let (mut in_tag, mut elifs) = (0, 0);
    for token in tokenize(source, expression, SyntaxConfig::default()) {
        let (token, span) = token.map_err(|error| syntax_flaw(&error))?;
        match token {
            Token::TemplateData(_) | Token::VariableStart | Token::BlockStart => in_tag = 0,
            Token::Ident("elif") => elifs += 1,
            _ => in_tag += 1,
        }
        if in_tag > TAG_MAX_TOKENS {
            let message = format!("a single tag has more than {TAG_MAX_TOKENS} words and signs");
            return Err(too_large(span.start_line.into(), message, "split it up with `{% set %}`"));
        }
        if elifs > ELIF_MAX {
            let message = format!("the template has more than {ELIF_MAX} `elif`");
            return Err(too_large(span.start_line.into(), message, "use a map and look the value up in it"));
        }
    }
    Ok(())
}

fn syntax_flaw(error: &Error) -> Flaw {
    let detail = error.detail().unwrap_or("it is not complete");
    let mend = (detail.starts_with("unknown statement"))
        .then(|| "known are for, if, set, with, raw and filter; includes, imports and macros do not exist".to_owned());
    Flaw {
        code: Code::TemplateSyntax,
        message: format!("the template could not be parsed: {detail}"),
        mend,
        line: error.line().unwrap_or(0),
        column: 0,
    }
}

/// An error of a rendering as a sentence, without the engine's own vocabulary.
fn describe(error: &Error, text: &str) -> String {
    let mut source = std::error::Error::source(error);
    let mut detail = match error.kind() {
        ErrorKind::OutOfFuel => {
            evaluation::out_of_steps();
            format!("it takes more than {FUEL} steps")
        }
        ErrorKind::UndefinedError => match error.detail() {
            Some(detail) => detail.to_owned(),
            None => match error.range().and_then(|range| text.get(range)) {
                Some(part) => format!("it uses a value that is not there: `{}`", super::path::cut(part.trim(), 120)),
                None => "it uses a value that is not there".to_owned(),
            },
        },
        kind => error.detail().map_or_else(|| kind.to_string(), str::to_owned),
    };
    while let Some(cause) = source {
        detail = cause.downcast_ref::<Error>().and_then(Error::detail).map_or_else(|| cause.to_string(), str::to_owned);
        source = cause.source();
    }
    match error.line() {
        Some(line) => format!("line {line}: {detail}"),
        None => detail,
    }
}

#[cfg(test)]
mod tests;
