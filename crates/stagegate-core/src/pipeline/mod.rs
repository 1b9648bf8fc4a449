//! Pipelines: owns the way from an author's text to a [`Pipeline`] that cannot be wrong. Calls no model, reads no clock.
//!
//! text → [`source`] (a value with positions) → schema and decoding → [`check`] (everything that a schema cannot
//! say) → [`Pipeline`]. Every mistake found on the way is reported at once.

mod definition;

use std::{sync::Arc, time::Duration};

use serde_json::Value;

pub use definition::{
    Backoff, Budget, Cache, CacheMode, Check, Defaults, Definition, Gate, InvalidSpan, Judge, Labels, MessageTemplate,
    ModelChain, OnExhausted, OnFail, Output, OutputSchema, OutputWord, Params, Retry, Role, SPAN_MAX, Span,
    StageDefinition,
};

use crate::{ModelRef, PipelineName, StageId};

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
    /// How long one attempt may take.
    pub timeout: Duration,
}

/// What a stage does: its kind.
#[derive(Debug)]
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

impl Pipeline {
    /// The index of a stage.
    pub fn stage_index(&self, id: &str) -> Option<usize> {
        self.stages.iter().position(|stage| stage.id.as_str() == id)
    }
}
