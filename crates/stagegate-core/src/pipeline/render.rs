//! What a pipeline says: owns the rendering of prompts, rubrics and the run's output. Calls no model.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::{
    JudgeTexts, Message, Part, Pipeline, RenderContext, Rendered, Role, Seen, Stage,
    check::{CompiledCheck, OutputNode},
    path::Path,
    template::{RENDERED_MAX_BYTES, Template, Vars},
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
/// Stands in every failure of a rendering: with the same values it would fail again.
pub const NOT_RENDERED: &str = "could not be rendered";
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
    pub fn each_named(&self, part: Part, mut each: impl FnMut(Option<usize>)) {
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
                let own = compiled.messages.iter().map(|(_, text)| text);
                own.chain(&compiled.history).chain(&compiled.transform).for_each(template);
            }
            Part::Checks(stage) => self.compiled.stages[stage].checks.iter().for_each(|check| {
                if let CompiledCheck::Expression(expression) = check {
                    template(expression);
                }
            }),
            Part::Rubric(stage) => {
                let compiled = &self.compiled.stages[stage];
                compiled.rubric.iter().chain(&compiled.judge_system).for_each(template);
            }
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
            let mut messages = compiled.messages.iter().map(render).collect::<Result<Vec<_>, Failure>>()?;
            if let Some(history) = &compiled.history {
                let value = history.value(vars).map_err(|cause| self.failure(stage, "conversation", &cause))?;
                messages.extend(conversation(value).map_err(|cause| self.failure(stage, "conversation", &cause))?);
            }
            // A stored definition may have instructions alone: it was registered when that was allowed.
            let asks = compiled.history.is_some() || compiled.messages.iter().any(|(role, _)| *role == Role::User);
            if asks && !messages.iter().any(|message| message.role == Role::User && !message.content.trim().is_empty())
            {
                return Err(self.failure(stage, "prompt", BLANK));
            }
            Ok(Rendered::Messages(messages))
        })
    }

    /// Renders the rubric of the judge, or its own prompt, and its own system message where it has one. None where the
    /// stage has no judge.
    pub fn render_judge(
        &self,
        stage: usize,
        context: &RenderContext<'_>,
        output: &Arc<Value>,
    ) -> Result<Option<JudgeTexts>, Failure> {
        let compiled = &self.compiled.stages[stage];
        let Some(rubric) = &compiled.rubric else { return Ok(None) };
        self.with_vars(context, Some(output), |vars| {
            let is_prompt = self.stages[stage].gate.judge.as_ref().is_some_and(|judge| judge.prompt.is_some());
            let what = if is_prompt { "judge's prompt" } else { "rubric" };
            let text = rubric.render(vars).map_err(|cause| self.failure(stage, what, &cause))?;
            if text.trim().is_empty() {
                return Err(self.failure(stage, what, BLANK));
            }
            let system = compiled.judge_system.as_ref().map(|system| system.render(vars)).transpose();
            let system = system.map_err(|cause| self.failure(stage, "judge's system message", &cause))?;
            Ok(Some(JudgeTexts { text, is_prompt, system }))
        })
    }

    /// Whether the judge's own templates name the output that it judges.
    pub fn judge_reads_output(&self, stage: usize) -> bool {
        let compiled = &self.compiled.stages[stage];
        compiled.rubric.iter().chain(&compiled.judge_system).any(Template::names_output)
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
            detail: Some(format!("the run's output {NOT_RENDERED}: {cause}")),
            ..Failure::new(Code::TemplateFailed, format!("the run's output {NOT_RENDERED}{}", place(&cause)))
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
        let message = format!("the {what} of stage `{id}` {NOT_RENDERED}");
        Failure {
            detail: Some(format!("{message}: {cause}")),
            ..Failure::new(Code::TemplateFailed, format!("{message}{}", place(cause))).of_stage(id.clone())
        }
    }
}

/// Why a prompt is not sent: a model would be asked nothing.
const BLANK: &str = "it is blank: it has no text but white space";

/// The most messages that a conversation made from data has.
const MESSAGES_MAX: usize = 1_000;

/// Data as the messages of a conversation.
fn conversation(value: Value) -> Result<Vec<Message>, String> {
    let Value::Array(items) = value else {
        return Err(format!("it gives {}, not a list of messages", super::schema::told(&value)));
    };
    if items.len() > MESSAGES_MAX {
        return Err(format!("it has more than {MESSAGES_MAX} messages"));
    }
    let mut left = RENDERED_MAX_BYTES;
    let items = items.into_iter().enumerate();
    items.map(|(index, item)| message(item, &mut left).map_err(|why| format!("message {} {why}", index + 1))).collect()
}

fn message(item: Value, left: &mut usize) -> Result<Message, String> {
    let Value::Object(mut map) = item else {
        return Err(format!("is {}, but must be a map with `role` and `content`", super::schema::told(&item)));
    };
    let role = match map.remove("role") {
        Some(role) => <Role as serde::Deserialize>::deserialize(&role).map_err(|_| {
            format!("has the role {}, but must have system, user or assistant", super::schema::told(&role))
        })?,
        None => return Err("has no `role`".to_owned()),
    };
    let content = match map.remove("content") {
        Some(Value::String(content)) => content,
        Some(other) => return Err(format!("has as its content {}, but must have a text", super::schema::told(&other))),
        None => return Err("has no `content`".to_owned()),
    };
    if let Some(key) = map.keys().next() {
        let key = super::path::cut(key, 80);
        return Err(format!("has the key `{key}`, but has only `role` and `content`"));
    }
    *left = left.checked_sub(content.len()).ok_or_else(|| {
        format!("goes over the limit: the messages have more than {RENDERED_MAX_BYTES} bytes together")
    })?;
    Ok(Message { role, content })
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
    let own = ["it has more than ", "it takes more than ", "it uses a value that is not there", BLANK];
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
