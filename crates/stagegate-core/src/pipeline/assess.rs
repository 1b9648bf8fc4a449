//! What an output is worth without asking a model: owns reading an answer and the deterministic assessments. Decides
//! nothing; that is the gate's.

use std::{borrow::Cow, sync::Arc};

use jsonschema::error::ValidationErrorKind;
use serde_json::Value;

use super::{
    Check, OutputFormat, Pipeline, RenderContext,
    check::CompiledCheck,
    json_schema::Schema,
    path::{Path, cut},
    schema,
};
use crate::{
    Assessment, Code, Evaluator, Violation,
    answer::{self, Unread},
    evaluation,
    json::Size,
};

/// The version of these rules; a verdict is stored with it.
const RULES_VERSION: u32 = 1;
/// The most values in an output, those inside of others included: a parsed value takes much more memory than its text.
pub(super) const OUTPUT_NODES_MAX: u64 = 1_000_000;
/// How many violations of a schema a reason lists.
const REASONS_MAX: usize = 5;
/// How many violations of an input are listed.
const INPUT_MISTAKES_MAX: usize = 100;

fn assessment(name: &str, passed: bool, reason: String, detail: Option<String>) -> Assessment {
    Assessment {
        evaluator: Evaluator::Check,
        name: name.to_owned(),
        version: RULES_VERSION,
        passed,
        score: if passed { 1.0 } else { 0.0 },
        threshold: 1.0,
        reason,
        detail: detail.filter(|_| !passed),
        model: None,
        scale: None,
        judge_failure: None,
        rest: crate::Rest::default(),
    }
}

impl Check {
    /// Its key in a definition, which names its assessments too.
    pub fn name(&self) -> &'static str {
        match self {
            Self::MinChars(_) => "min_chars",
            Self::MaxChars(_) => "max_chars",
            Self::Matches(_) => "matches",
            Self::NotMatches(_) => "not_matches",
            Self::Contains(_) => "contains",
            Self::NotContains(_) => "not_contains",
            Self::Schema(_) => "schema",
            Self::Expression(_) => "expression",
        }
    }
}

impl Pipeline {
    /// Reads an answer as the stage's output: text as it is; JSON parsed, with what stands around it taken off. An answer
    /// that is no JSON is told by the assessment that says so.
    #[expect(clippy::result_large_err, reason = "it is kept with the attempt, not passed on")]
    pub fn read_output(&self, stage: usize, content: &str) -> Result<Value, Assessment> {
        if evaluation::pay(content.len() as u64).is_err() {
            return Ok(Value::Null); // Thrown away.
        }
        match self.stages[stage].output {
            OutputFormat::Text => Ok(Value::String(content.to_owned())),
            OutputFormat::Json { .. } => {
                let unread = |why: Unread| assessment("json", false, why.to_string(), None);
                let text = answer::find(content).map_err(unread)?;
                let not_json = |error| unread(Unread::NotJson(error));
                let nodes = Size::of_text(&text).map_err(not_json)?.nodes;
                if nodes > OUTPUT_NODES_MAX {
                    let reason = format!("the answer holds {nodes} values, at most {OUTPUT_NODES_MAX} are allowed");
                    return Err(assessment("json", false, reason, None));
                }
                serde_json::from_str(&text).map_err(not_json)
            }
        }
    }

    /// The deterministic assessments of an output: its schema first, then the gate's checks, all of them.
    pub fn assess(&self, stage: usize, output: &Arc<Value>, context: &RenderContext<'_>) -> Vec<Assessment> {
        let compiled = &self.compiled.stages[stage];
        let own = compiled.schema.iter().map(|validator| assess_schema(validator, output));
        let checks = self.stages[stage].gate.checks.iter().zip(&compiled.checks);
        let text = match output.as_ref() {
            Value::String(text) => Cow::Borrowed(text.as_str()),
            _ if compiled.checks.is_empty() => Cow::Borrowed(""),
            json => Cow::Owned(json.to_string()),
        };
        let checks = (1..).zip(checks);
        own.chain(checks.map(|(n, (check, compiled))| self.assess_check(n, check, compiled, output, &text, context)))
            .collect()
    }

    fn assess_check(
        &self,
        number_of: usize,
        check: &Check,
        compiled: &CompiledCheck,
        output: &Arc<Value>,
        text: &str,
        context: &RenderContext<'_>,
    ) -> Assessment {
        if evaluation::pay(text.len() as u64).is_err() {
            return assessment(check.name(), false, "the check was ended early".to_owned(), None);
        }
        let chars = || text.chars().count();
        let told = |chars| schema::counted(chars, "character");
        let number = |limit: &u32| usize::try_from(*limit).unwrap_or(usize::MAX);
        let here = format!("(check {number_of} of the gate)");
        let (passed, reason, detail) = match (check, compiled) {
            (Check::MinChars(min), _) => {
                let chars = chars();
                (chars >= number(min), format!("has {}, at least {min} are needed", told(chars)), None)
            }
            (Check::MaxChars(max), _) => {
                let chars = chars();
                (chars <= number(max), format!("has {}, at most {max} are allowed", told(chars)), None)
            }
            (Check::Contains(part), _) => {
                let found = text.contains(part.as_str());
                let told = if found { "contains" } else { "does not contain" };
                let detail = format!("{told} `{}`, which it must contain", cut(part, 200));
                (found, format!("{told} what it must {here}"), Some(detail))
            }
            (Check::NotContains(part), _) => {
                let found = text.contains(part.as_str());
                let told = if found { "contains" } else { "does not contain" };
                let detail = format!("{told} `{}`, which it must not contain", cut(part, 200));
                (!found, format!("{told} what it must not {here}"), Some(detail))
            }
            (Check::Matches(_) | Check::NotMatches(_), CompiledCheck::Regex(regex))
                if let Err(why) = regex.claim(text) =>
            {
                (false, why, None)
            }
            (Check::Matches(pattern), CompiledCheck::Regex(regex)) => {
                if regex.find(text).is_some() {
                    let detail = format!("matches `{}`, as it must", cut(pattern, 200));
                    (true, format!("matches the pattern, as it must {here}"), Some(detail))
                } else {
                    let detail = format!("does not match `{}`, which it must", cut(pattern, 200));
                    (false, format!("does not match the pattern, which it must {here}"), Some(detail))
                }
            }
            (Check::NotMatches(pattern), CompiledCheck::Regex(regex)) => {
                if let Some(found) = regex.find(text) {
                    let (from, to) = (found.start(), found.end());
                    let found = cut(found.as_str(), 80);
                    let detail = format!("matches `{}`, which it must not: it says `{found}`", cut(pattern, 200));
                    let reason = format!("matches the pattern, which it must not, at bytes {from} to {to} {here}");
                    (false, reason, Some(detail))
                } else {
                    let detail = format!("does not match `{}`, as it must not", cut(pattern, 200));
                    (true, format!("does not match the pattern, as it must not {here}"), Some(detail))
                }
            }
            (Check::Schema(_), CompiledCheck::Schema(validator)) => return assess_schema(validator, output),
            (Check::Expression(source), CompiledCheck::Expression(expression)) => {
                let source = cut(source, 200);
                match self.with_vars(context, Some(output), |vars| expression.holds(vars)) {
                    Ok(true) => (true, format!("the expression holds {here}"), Some(format!("`{source}` holds"))),
                    Ok(false) => {
                        let detail = format!("`{source}` does not hold, but must");
                        (false, format!("the expression does not hold, but must {here}"), Some(detail))
                    }
                    Err(cause) => {
                        let detail = format!("`{source}` could not be evaluated: {cause}");
                        (false, format!("the expression could not be evaluated {here}"), Some(detail))
                    }
                }
            }
            // Checks and their compiled forms are made pairwise; a mismatch must not let an output through.
            _ => (false, "the check was not compiled".to_owned(), None),
        };
        assessment(check.name(), passed, reason, detail)
    }

    /// Whether [`Self::check_input`] and [`Self::limits`] look into an input, beyond that it is a map.
    pub fn reads_inputs(&self) -> bool {
        self.compiled.input.is_some() || self.compiled.concurrency_key.is_some()
    }

    /// Fills in what an input leaves out and its schema has a `default` for, inside of the maps that are there. Says whether
    /// it filled in anything. Defaults inside of lists, and behind `$ref` and branches, are not filled in. Where an input fits
    /// as it is, and would not with the defaults, it is left as it is.
    pub fn fill_defaults(&self, input: &mut Value) -> bool {
        let Some(schema) = self.definition.get("input") else { return false };
        let made = filled(schema, input);
        if made.is_empty() || self.check_input(input).is_ok() {
            return !made.is_empty();
        }
        for path in made.iter().rev() {
            remove(path, input);
        }
        if self.check_input(input).is_ok() {
            return false;
        }
        filled(schema, input);
        true
    }

    /// Every way in which an input does not fit, with paths below `input`.
    pub fn check_input(&self, input: &Value) -> Result<(), Vec<Violation>> {
        let root = Path::root().key("input");
        let Some(validator) = &self.compiled.input else {
            if input.is_object() {
                return Ok(());
            }
            let message = format!("is {}, but an input is a map", schema::told(input));
            return Err(vec![Violation::new(Code::InvalidInput, "input", message)]);
        };
        let mut found = Vec::new();
        let errors = validator.errors(input).map_err(|why| vec![Violation::new(Code::InvalidInput, "input", why)])?;
        for error in errors {
            let path = root.below(error.instance_path());
            let mut push = |path: Path, message: String| {
                found.push(Violation::new(Code::InvalidInput, path.to_string(), message));
            };
            match error.kind() {
                ValidationErrorKind::Required { property } => {
                    push(path.key(property.as_str().unwrap_or_default()), "is required".to_owned());
                }
                ValidationErrorKind::AdditionalProperties { unexpected } => {
                    for key in unexpected.iter().take(INPUT_MISTAKES_MAX) {
                        push(path.key(key), "is not a key of this input".to_owned());
                    }
                }
                _ => push(path, schema::sentence(&error)),
            }
            if found.len() >= INPUT_MISTAKES_MAX {
                break;
            }
        }
        found.truncate(INPUT_MISTAKES_MAX);
        if found.is_empty() { Ok(()) } else { Err(found) }
    }
}

/// Fills in the defaults; returns where, in order.
pub(super) fn filled(schema: &Value, value: &mut Value) -> Vec<Vec<String>> {
    let mut made = Vec::new();
    fill(schema, value, &mut Vec::new(), &mut made);
    made
}

fn fill(schema: &Value, value: &mut Value, at: &mut Vec<String>, made: &mut Vec<Vec<String>>) {
    let (Some(properties), Some(map)) = (schema.get("properties").and_then(Value::as_object), value.as_object_mut())
    else {
        return;
    };
    for (key, inner) in properties {
        at.push(key.clone());
        if let Some(default) = inner.get("default").filter(|_| !map.contains_key(key)) {
            map.insert(key.clone(), default.clone());
            made.push(at.clone());
        }
        if let Some(value) = map.get_mut(key) {
            fill(inner, value, at, made);
        }
        at.pop();
    }
}

fn remove(path: &[String], value: &mut Value) {
    let Some((last, maps)) = path.split_last() else { return };
    let map = maps.iter().try_fold(value, |value, key| value.get_mut(key)).and_then(Value::as_object_mut);
    if let Some(map) = map {
        map.remove(last);
    }
}

fn assess_schema(validator: &Schema, output: &Value) -> Assessment {
    let mut errors = match validator.errors(output) {
        Ok(errors) => errors,
        Err(why) => return assessment("schema", false, format!("the output {why}"), None),
    };
    let mut first = None;
    let mut reasons: Vec<String> = errors
        .by_ref()
        .take(REASONS_MAX)
        .map(|error| {
            // The place in the schema is the author's; the one in the output may be made of what was said.
            first.get_or_insert_with(|| error.schema_path().to_string());
            let path = Path::root().below(error.instance_path()).to_string();
            let place = if path.is_empty() { "the output".to_owned() } else { format!("`{path}`") };
            match error.kind() {
                ValidationErrorKind::Required { property } => {
                    format!("{place} lacks `{}`", property.as_str().unwrap_or_default())
                }
                _ => format!("{place} {}", schema::sentence(&error)),
            }
        })
        .collect();
    if reasons.is_empty() {
        return assessment("schema", true, "fits the schema".to_owned(), None);
    }
    let mistakes = schema::counted(reasons.len(), "mistake");
    let more = if errors.next().is_some() { " and more" } else { "" };
    let reason = format!(
        "does not fit the schema: {mistakes}{more}, the first at `{}` of the schema",
        first.unwrap_or_default()
    );
    if !more.is_empty() {
        reasons.push("and more".to_owned());
    }
    assessment("schema", false, reason, Some(format!("does not fit the schema: {}", reasons.join("; "))))
}
