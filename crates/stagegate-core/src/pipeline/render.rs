//! What a pipeline says: owns the rendering of prompts, rubrics and the run's output. Calls no model.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::{
    Message, Part, Pipeline, RenderContext, Rendered, Role, Seen, Stage,
    check::{CompiledCheck, OutputNode},
    path::Path,
    template::{Template, Vars},
};
use crate::{
    Code, Failure, Json, StageId, Violation,
    evaluation::{self, Interrupted},
    fair::Limits,
};

/// The most that the templates of an output mapping may give together, in bytes.
const OUTPUT_MAX_BYTES: usize = 16 * 1024 * 1024;
/// The longest concurrency key, in bytes.
const KEY_MAX_BYTES: usize = 256;
/// What a value counts beside its text, in bytes.
const VALUE_BYTES: usize = 8;

impl Seen {
    /// Parses what a part of the pipeline names.
    pub fn parse(pipeline: &Pipeline, part: Part, input: &Json, outputs: &[Option<Json>]) -> Self {
        let (mut input_seen, mut outputs_seen) = (None, vec![None; outputs.len()]);
        pipeline.each_named(part, |named| match named {
            None => {
                input_seen.get_or_insert_with(|| Arc::new(evaluation::parse(input)));
            }
            Some(stage) => {
                if let (Some(place @ None), Some(Some(output))) = (outputs_seen.get_mut(stage), outputs.get(stage)) {
                    *place = Some(Arc::new(evaluation::parse(output)));
                }
            }
        });
        Self { input: input_seen.unwrap_or_default(), outputs: outputs_seen }
    }

    /// What that takes in memory, in bytes.
    pub fn parsed_bytes(pipeline: &Pipeline, part: Part, input: &Json, outputs: &[Option<Json>]) -> u64 {
        let (mut bytes, mut met) = (0, Vec::new());
        pipeline.each_named(part, |named| {
            if !met.contains(&named) {
                met.push(named);
                let what = named.map_or(Some(input), |stage| outputs.get(stage)?.as_ref());
                bytes += what.map_or(0, |json| json.size().parsed_bytes);
            }
        });
        bytes
    }

    /// What templates see; `run_id` is the run's id as text.
    pub fn context<'a>(&'a self, run_id: &'a str) -> RenderContext<'a> {
        RenderContext { run_id, input: &self.input, outputs: &self.outputs }
    }
}

impl Pipeline {
    /// Everything that a part names: a stage by its index, or None for the input. The same can come several times.
    fn each_named(&self, part: Part, mut each: impl FnMut(Option<usize>)) {
        let mut template = |template: &Template| {
            let (stages, input) = template.names();
            if input {
                each(None);
            }
            stages.iter().filter_map(|id| self.stage_index(id)).for_each(|stage| each(Some(stage)));
        };
        match part {
            Part::Work(stage) => {
                let compiled = &self.compiled.stages[stage];
                compiled.messages.iter().map(|(_, text)| text).chain(&compiled.transform).for_each(template);
            }
            Part::Checks(stage) => self.compiled.stages[stage].checks.iter().for_each(|check| {
                if let CompiledCheck::Expression(expression) = check {
                    template(expression);
                }
            }),
            Part::Rubric(stage) => self.compiled.stages[stage].rubric.iter().for_each(template),
            Part::Output => match &self.compiled.output {
                Some(mapping) => mapping.each_template(&mut template),
                None => self.last_stages().for_each(|(stage, _)| each(Some(stage))),
            },
        }
    }

    pub(super) fn with_vars<'a, T>(
        &self,
        context: &RenderContext<'a>,
        output: Option<&'a Arc<Value>>,
        run: impl FnOnce(&Vars<'_>) -> T,
    ) -> T {
        let outputs = context.outputs;
        let stage = |id: &str| {
            let index = self.stage_index(id)?;
            outputs.get(index)?.as_ref()
        };
        run(&Vars { run_id: context.run_id, input: context.input, stage: &stage, output })
    }

    /// Renders a stage's messages or its transform.
    pub fn render(&self, stage: usize, context: &RenderContext<'_>) -> Result<Rendered, Failure> {
        let compiled = &self.compiled.stages[stage];
        self.with_vars(context, None, |vars| {
            if let Some(transform) = &compiled.transform {
                let text = transform.render(vars).map_err(|cause| self.failure(stage, "transform", &cause))?;
                return Ok(Rendered::Text(text));
            }
            let render = |(role, template): &(Role, Template)| {
                let text = template.render(vars).map_err(|cause| self.failure(stage, "prompt", &cause))?;
                Ok(Message { role: *role, content: text })
            };
            compiled.messages.iter().map(render).collect::<Result<_, Failure>>().map(Rendered::Messages)
        })
    }

    /// Renders the judge's rubric; None where the stage has no judge.
    pub fn render_rubric(&self, stage: usize, context: &RenderContext<'_>) -> Result<Option<String>, Failure> {
        let Some(rubric) = &self.compiled.stages[stage].rubric else { return Ok(None) };
        self.with_vars(context, None, |vars| rubric.render(vars))
            .map(Some)
            .map_err(|cause| self.failure(stage, "rubric", &cause))
    }

    /// What bounds how many runs are under way beside one with this input. Fails where the concurrency key gives nothing
    /// to count by.
    pub fn limits(&self, input: &Arc<Value>) -> Result<Limits, Violation> {
        let Some(concurrency) = &self.concurrency else { return Ok(Limits::default()) };
        let key = match &self.compiled.concurrency_key {
            None => None,
            Some(expression) => {
                let context = RenderContext { run_id: "", input, outputs: &[] };
                let value = self.with_vars(&context, None, |vars| expression.value(vars));
                let key = value.and_then(key_text).map_err(|cause| {
                    let message = format!("the pipeline's concurrency key cannot be made of this input: {cause}");
                    Violation::new(Code::InvalidInput, "input", message)
                })?;
                Some((key, concurrency.max_runs_per_key.unwrap_or(1)))
            }
        };
        Ok(Limits { pipeline_max: concurrency.max_runs, key })
    }

    /// Renders the run's output.
    pub fn render_output(&self, context: &RenderContext<'_>) -> Result<Value, Failure> {
        let Some(mapping) = &self.compiled.output else { return self.leaves(context) };
        let failed = |cause: String| Failure {
            detail: Some(format!("the run's output could not be rendered: {cause}")),
            ..Failure::new(Code::TemplateFailed, format!("the run's output could not be rendered{}", place(&cause)))
        };
        let mut left = OUTPUT_MAX_BYTES;
        self.with_vars(context, None, |vars| node(mapping, &Path::root().key("output"), vars, &mut left))
            .map_err(failed)
    }

    /// The outputs of the last stages, by id.
    fn leaves(&self, context: &RenderContext<'_>) -> Result<Value, Failure> {
        let mut outputs = Map::new();
        for (index, stage) in self.last_stages() {
            let output: &Arc<Value> = context.outputs.get(index).and_then(Option::as_ref).ok_or_else(|| {
                let message = format!("the run's output could not be made: stage `{}` has none yet", stage.id);
                Failure::new(Code::TemplateFailed, message).of_stage(stage.id.clone())
            })?;
            if evaluation::pay(bytes(output) as u64).is_err() {
                return Err(Failure::new(Code::TemplateFailed, Interrupted::TOLD));
            }
            outputs.insert(stage.id.to_string(), output.as_ref().clone());
        }
        Ok(Value::Object(outputs))
    }

    /// The stages that nobody needs, by index.
    fn last_stages(&self) -> impl Iterator<Item = (usize, &Stage)> {
        self.stages.iter().enumerate().filter(|(_, stage)| stage.dependents.is_empty())
    }

    /// The stages whose outputs make a run's output, in its order, where the definition declares none; else empty.
    pub fn default_output_of(&self) -> Vec<StageId> {
        if self.compiled.output.is_some() {
            return Vec::new();
        }
        self.last_stages().map(|(_, stage)| stage.id.clone()).collect()
    }

    fn failure(&self, stage: usize, what: &str, cause: &str) -> Failure {
        let id = &self.stages[stage].id;
        let message = format!("the {what} of stage `{id}` could not be rendered");
        Failure {
            detail: Some(format!("{message}: {cause}")),
            ..Failure::new(Code::TemplateFailed, format!("{message}{}", place(cause))).of_stage(id.clone())
        }
    }
}

/// Where a rendering failed, as far as its cause begins with that: the rest may quote values.
fn place(cause: &str) -> String {
    let (path, rest) = match cause.split_once(": ") {
        Some((path, rest)) if path.starts_with("output") && !path.contains(' ') => (Some(path), rest),
        _ => (None, cause),
    };
    let line =
        rest.strip_prefix("line ").and_then(|rest| rest.split(':').next()).and_then(|line| line.parse::<u32>().ok());
    let at = match (path, line) {
        (Some(path), Some(line)) => format!(" (`{path}`, line {line})"),
        (Some(path), None) => format!(" (`{path}`)"),
        (None, Some(line)) => format!(" (line {line})"),
        (None, None) => String::new(),
    };
    // Causes that are made of numbers and of the template's own words.
    let own = ["it has more than ", "it takes more than ", "it uses a value that is not there"];
    let cause = match line {
        Some(_) => rest.split_once(": ").map_or("", |(_, cause)| cause),
        None => rest,
    };
    if own.iter().any(|own| cause.starts_with(own)) { format!("{at}: {cause}") } else { at }
}

/// A concurrency key as text.
fn key_text(value: Value) -> Result<String, String> {
    let text = match value {
        Value::String(text) => text,
        Value::Number(number) => number.to_string(),
        Value::Bool(holds) => holds.to_string(),
        other => return Err(format!("it gives {}, not a text or a number", super::schema::told(&other))),
    };
    if text.is_empty() || text.len() > KEY_MAX_BYTES || text.contains('\0') {
        return Err(format!("it must have 1 to {KEY_MAX_BYTES} bytes, none of them zero"));
    }
    Ok(text)
}

/// Renders a part of the mapping; what fails is told with its place.
fn node(mapping: &OutputNode, path: &Path, vars: &Vars<'_>, left: &mut usize) -> Result<Value, String> {
    Ok(match mapping {
        OutputNode::Plain(value) => value.clone(),
        OutputNode::Template(template) => {
            let value = template.value(vars).map_err(|cause| format!("{path}: {cause}"))?;
            *left =
                left.checked_sub(bytes(&value)).ok_or_else(|| format!("it has more than {OUTPUT_MAX_BYTES} bytes"))?;
            value
        }
        OutputNode::List(items) => {
            let items = items.iter().enumerate().map(|(index, item)| node(item, &path.index(index), vars, left));
            Value::Array(items.collect::<Result<_, _>>()?)
        }
        OutputNode::Map(map) => {
            let entries = map.iter().map(|(key, inner)| Ok((key.clone(), node(inner, &path.key(key), vars, left)?)));
            Value::Object(entries.collect::<Result<_, String>>()?)
        }
    })
}

/// About what a value takes.
fn bytes(value: &Value) -> usize {
    VALUE_BYTES
        + match value {
            Value::String(text) => text.len(),
            Value::Array(items) => items.iter().map(bytes).sum(),
            Value::Object(map) => map.iter().map(|(key, inner)| key.len() + bytes(inner)).sum(),
            _ => 0,
        }
}
