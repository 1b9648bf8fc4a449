//! Pipelines: owns the way from an author's text to a [`Pipeline`] that cannot be wrong. Calls no model, reads no clock.
//!
//! text → `source` (a value with positions) → `schema` (form) → `check` (everything that a schema cannot say) →
//! `resolve` → [`Pipeline`]. Every mistake found on the way is reported at once.

mod assess;
mod check;
mod definition;
mod files;
mod graph;
mod json;
mod json_schema;
mod judges;
mod params;
mod path;
mod pattern;
mod render;
mod resolve;
mod schema;
mod slips;
mod source;
mod template;

use std::{sync::Arc, time::Duration};

use serde_json::Value;

pub use definition::{
    Backoff, Budget, Cache, CacheMode, Check, Concurrency, Defaults, Definition, Effort, Gate, InvalidSpan, Judge,
    Labels, MessageTemplate, Messages, MessagesFrom, ModelChain, OnExhausted, OnFail, OnPass, Output, OutputSchema,
    OutputWord, Params, Reasoning, Retention, Retry, Role, SPAN_MAX, Scale, Span, StageDefinition,
};
pub use files::{Bundle, FILES_MAX, FILES_MAX_BYTES};
pub use render::NOT_RENDERED;

use self::{
    check::{Compiled, Report},
    source::Source,
};
use crate::{Error, ModelRef, PipelineName, StageId, Violation};

/// A checked, resolved pipeline: what the engine runs. Immutable; shared by every run of its version.
#[derive(Debug)]
pub struct Pipeline {
    /// Its name.
    pub name: PipelineName,
    /// What it is for.
    pub description: Option<String>,
    /// The definition, as canonical JSON: what is stored and shown.
    pub definition: Value,
    /// BLAKE3 of the canonical JSON: the same content is the same version.
    pub digest: [u8; 32],
    /// The stages in topological order; every index below points into this.
    pub stages: Vec<Stage>,
    /// What a run may spend.
    pub budget: Option<Budget>,
    /// How long a run may take.
    pub deadline: Duration,
    /// How many runs are under way at once.
    pub concurrency: Option<Concurrency>,
    /// How long what has ended is kept.
    pub retention: Option<Retention>,
    /// Something in it that the release before this one cannot read, or cannot render.
    newest: Option<String>,
    /// Templates, validators and regular expressions; stages in the order of `stages`.
    compiled: Compiled,
    /// About what all of it takes in memory.
    compiled_bytes: u64,
}

/// A stage with every default resolved.
#[derive(Debug)]
pub struct Stage {
    /// Its id.
    pub id: StageId,
    /// What it is for.
    pub description: Option<String>,
    /// Indices of the stages that it needs; all smaller than its own.
    pub needs: Vec<usize>,
    /// Indices of the stages that need it; all larger than its own.
    pub dependents: Vec<usize>,
    /// What it does.
    pub work: Work,
    /// What its output must be.
    pub output: OutputFormat,
    /// What its output must pass.
    pub gate: Gate,
    /// How often it is tried.
    pub retry: Retry,
    /// How long one model call may take, from when its request is sent.
    pub timeout: Duration,
}

/// What a stage does: its kind.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one for each stage, and nearly all of them call a model")]
pub enum Work {
    /// Calls a model.
    Model(ModelWork),
    /// Renders a template; the text is the output.
    Transform,
}

/// A model call's fixed part.
#[derive(Debug, Clone)]
pub struct ModelWork {
    /// The fallback chain, in order; never empty.
    pub models: Vec<ModelRef>,
    /// Sampling parameters.
    pub params: Params,
    /// Which of several answers to the same prompt.
    pub sample: u32,
    /// Cache policy.
    pub cache: Cache,
}

/// What an output must be.
#[derive(Debug, Clone, PartialEq)]
pub enum OutputFormat {
    /// Text as it comes.
    Text,
    /// JSON; with a schema, JSON that fits it.
    Json {
        /// The JSON Schema, where there is one.
        schema: Option<Arc<Value>>,
    },
}

/// A rendered message.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// The text.
    pub content: String,
}

/// What the model layer knows of models, for checking a definition.
pub trait Models {
    /// Whether some configured provider serves the model; else the code and what to configure.
    fn check(&self, model: &ModelRef) -> Result<(), Error>;
    /// Whether the price table knows it.
    fn is_priced(&self, model: &ModelRef) -> bool;
    /// The parameters that its provider has no counterpart for: the key of each, and what to do about it.
    fn unsupported(&self, _model: &ModelRef, _params: &Params) -> Vec<(&'static str, String)> {
        Vec::new()
    }
}

/// What templates and expressions see: `input`, `stages.<id>.output`, `run.id`.
#[derive(Debug, Clone, Copy)]
pub struct RenderContext<'a> {
    /// The run's id, or a placeholder where there is none yet (a plan).
    pub run_id: &'a str,
    /// The run's input.
    pub input: &'a Arc<Value>,
    /// The outputs that are there, by stage index.
    pub outputs: &'a [Option<Arc<Value>>],
}

/// A part of a pipeline that is rendered at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The messages or the transform of a stage.
    Work(usize),
    /// The checks of a stage's gate.
    Checks(usize),
    /// The rubric of a stage's judge, or its own prompt.
    Rubric(usize),
    /// The output of the run.
    Output,
}

/// What a part names of an input and of outputs, parsed; what it does not name is left out. Parsed values are large: this
/// is dropped as soon as the part is rendered.
#[derive(Debug)]
pub struct Seen {
    input: Arc<Value>,
    outputs: Vec<Option<Arc<Value>>>,
}

/// A rendered stage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rendered {
    /// Messages for a model.
    Messages(Vec<Message>),
    /// The output itself.
    Text(String),
}

/// What a judge is asked with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JudgeTexts {
    /// The rubric, or the whole prompt.
    pub text: String,
    /// Whether it is the whole prompt.
    pub is_prompt: bool,
    /// A system message instead of the usual one.
    pub system: Option<String>,
}

impl Pipeline {
    /// From YAML or JSON text. Every mistake at once, each with line and column.
    pub fn parse(source: &str, models: &dyn Models) -> Result<Self, Vec<Violation>> {
        Self::parse_bundle(&source.into(), models)
    }

    /// The same, with the files that the definition names. What they hold becomes a part of the definition.
    pub fn parse_bundle(bundle: &Bundle, models: &dyn Models) -> Result<Self, Vec<Violation>> {
        let (mut source, mut mistakes) = Source::read(&bundle.definition)?;
        mistakes.extend(files::resolve(&mut source, &bundle.files));
        schema::settle(&mut source.value);
        Self::from_source(&source, mistakes, models)
    }

    /// From a stored definition; models are not checked again. Fails only on a definition that an older version
    /// accepted and this one does not.
    pub fn from_stored(definition: Value) -> Result<Self, Vec<Violation>> {
        let mut source = Source::without_text(definition);
        schema::settle(&mut source.value);
        Self::from_source(&source, Vec::new(), &AnyModels)
    }

    fn from_source(source: &Source, mistakes: Vec<Violation>, models: &dyn Models) -> Result<Self, Vec<Violation>> {
        let mut report = Report::new(source, mistakes);
        let compiled = check::check(source, models, &mut report);
        report.finish()?;
        let definition = check::decode(source)?;
        Ok(resolve::resolve(definition, &source.value, compiled))
    }

    /// About what it takes in memory, in bytes. Never less than it takes.
    pub fn compiled_bytes(&self) -> u64 {
        self.compiled_bytes
    }

    /// Something in it that the release before this one cannot read, or cannot render.
    pub fn newest(&self) -> Option<&str> {
        self.newest.as_deref()
    }

    /// The index of a stage.
    pub fn stage_index(&self, id: &str) -> Option<usize> {
        self.stages.iter().position(|stage| stage.id.as_str() == id)
    }
}

/// Takes every model: what was registered once stays runnable where a provider is away.
struct AnyModels;

impl Models for AnyModels {
    fn check(&self, _: &ModelRef) -> Result<(), Error> {
        Ok(())
    }

    fn is_priced(&self, _: &ModelRef) -> bool {
        true
    }
}

/// The published JSON Schema (2020-12) of a definition.
pub fn definition_schema() -> Value {
    schema::definition_schema()
}
