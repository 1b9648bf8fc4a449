//! Stage kinds: owns what an attempt does. To add a kind, add a file here, a variant to
//! [`stagegate_core::pipeline::Work`], and an arm to [`attempt`].

mod judge;
mod model;
mod transform;

pub(crate) use judge::request as judge_request;
pub(crate) use model::{rendered_request, request};

use std::sync::Arc;

use stagegate_core::{
    Assessment, Evaluator, Failure, Json, ModelRef, Origin, Pipeline, PipelineName, RunId, TenantId,
    decide::{AttemptResult, Critique, FailureKind, Tried},
    json::Size,
    pipeline::{CacheMode, OutputFormat, Part, RenderContext, Seen, Stage, Work},
};
use stagegate_llm::{CallContext, CallError, Llm, Partial, Reply, Request, purse::Purse};
use tokio::time::Instant;

use self::judge::Judged;
use crate::{books::Books, evaluation::Evaluations};

/// Everything that an attempt works with. It holds no store: an attempt cannot write.
#[derive(Debug)]
pub(crate) struct AttemptContext {
    pub(crate) llm: Arc<Llm>,
    pub(crate) evaluations: Arc<Evaluations>,
    pub(crate) tenant: TenantId,
    pub(crate) pipeline: Arc<Pipeline>,
    pub(crate) version: u32,
    pub(crate) run: RunId,
    pub(crate) input: Json,
    pub(crate) outputs: Arc<Vec<Option<Json>>>,
    pub(crate) stage: usize,
    pub(crate) attempt: u32,
    pub(crate) critique: Option<Critique>,
    /// The models of the chain that are asked; all of them where this is empty.
    pub(crate) models_left: Vec<ModelRef>,
    pub(crate) cache_mode: Option<CacheMode>,
    pub(crate) books: Arc<Books>,
    pub(crate) outage_until: Instant,
    pub(crate) deadline: Instant,
}

/// An answer that may take so much once it is parsed is measured before that.
const MEASURED_FROM_BYTES: u64 = 64 << 20;

/// What came of an attempt, and what the cache must hear once the gate's verdict is durable.
#[derive(Debug)]
pub(crate) struct Attempted {
    pub(crate) result: AttemptResult,
    pub(crate) reply: Option<Reply>,
}

/// One try at a stage: its work, then its assessments. Its calls are in its books as they end.
pub(crate) async fn attempt(context: &AttemptContext) -> Attempted {
    let mut reply = None;
    let result = match &context.stage().work {
        Work::Model(work) => model::attempt(context, work, &mut reply).await,
        Work::Transform => transform::attempt(context).await,
    };
    Attempted { result: result.unwrap_or_else(|stopped| stopped), reply }
}

/// An attempt's early end.
type Stopped = AttemptResult;

impl AttemptContext {
    pub(crate) fn stage(&self) -> &Stage {
        &self.pipeline.stages[self.stage]
    }

    /// Evaluates a part of the pipeline with what it names.
    pub(crate) async fn evaluate<T: Send + 'static>(
        &self,
        part: Part,
        work: impl Fn(&Pipeline, &RenderContext<'_>) -> T + Send + 'static,
    ) -> Result<T, Stopped> {
        self.evaluate_with(part, || 0, work).await
    }

    /// The same where the work parses values beside those that are named; `beside` tells what they take, in bytes.
    async fn evaluate_with<T: Send + 'static>(
        &self,
        part: Part,
        beside: impl FnOnce() -> u64,
        work: impl Fn(&Pipeline, &RenderContext<'_>) -> T + Send + 'static,
    ) -> Result<T, Stopped> {
        let (pipeline, input, outputs) = (Arc::clone(&self.pipeline), self.input.clone(), Arc::clone(&self.outputs));
        let run = self.run;
        let seen = move || {
            let run_id = run.to_string();
            let seen = Seen::parse(&pipeline, part, &input, &outputs);
            work(&pipeline, &seen.context(&run_id))
        };
        let value_bytes =
            || beside().saturating_add(Seen::parsed_bytes(&self.pipeline, part, &self.input, &self.outputs));
        self.evaluations
            .evaluate(&self.tenant, value_bytes, seen)
            .await
            .map_err(|unevaluated| failed_render(unevaluated.failure(Some(self.stage().id.clone()))))
    }

    pub(crate) fn call_context(&self, cache: &stagegate_core::pipeline::Cache) -> CallContext {
        CallContext {
            tenant: self.tenant.clone(),
            pipeline: self.pipeline_name(),
            version: self.version,
            stage: self.stage().id.clone(),
            run: self.run,
            attempt: self.attempt,
            cache_mode: self.cache_mode.unwrap_or(cache.mode),
            cache_ttl: cache.ttl.0,
            timeout: self.stage().timeout,
            outage_until: self.outage_until,
            deadline: self.deadline,
            purse: Some(Arc::clone(&self.books) as Arc<dyn Purse>),
        }
    }

    fn pipeline_name(&self) -> PipelineName {
        self.pipeline.name.clone()
    }

    /// Asks the model layer. Calls to providers are in the books as they end; answers that were found are booked here.
    async fn complete(&self, call: &CallContext, request: &Request) -> Result<Reply, CallError> {
        let result = self.llm.complete(call, request).await;
        let calls = match &result {
            Ok(reply) => &reply.calls,
            Err(error) => &error.calls,
        };
        self.books.found(calls.iter().filter(|call| call.origin.is_hit()));
        result
    }

    /// Measures an output: deterministic checks first, the judge only if they pass.
    async fn assess(&self, content: String, model: Option<ModelRef>, origin: Origin) -> Result<AttemptResult, Stopped> {
        let stage = self.stage;
        let content: Arc<str> = content.into();
        let answer = Arc::clone(&content);
        let beside = move || match self.stage().output {
            OutputFormat::Text => answer.len() as u64,
            OutputFormat::Json { .. } => match Size::parsed_bytes_at_most(&answer) {
                // Worth to be measured.
                most if most > MEASURED_FROM_BYTES => Size::of_text(&answer).map_or(most, |size| size.parsed_bytes),
                most => most,
            },
        };
        let measure = move |pipeline: &Pipeline, seen: &RenderContext<'_>| measure(pipeline, stage, &content, seen);
        let measured = self.evaluate_with(Part::Checks(stage), beside, measure).await?;
        let Measured { output, usable, mut assessments } = measured;
        if assessments.iter().all(|assessment| assessment.passed) {
            match judge::judge(self, &output).await? {
                None => {}
                Some(Judged::Told(verdict)) => assessments.push(verdict),
                Some(Judged::Failed { assessment, code, message, detail, kind }) => {
                    assessments.push(assessment);
                    return Ok(AttemptResult::Unjudged {
                        output,
                        assessments,
                        model,
                        origin,
                        code,
                        message,
                        detail,
                        kind,
                    });
                }
            }
        }
        Ok(AttemptResult::Output { output, usable, assessments, model, origin })
    }
}

/// An answer, read and held against the deterministic checks.
pub(crate) struct Measured {
    pub(crate) output: Json,
    /// Whether it has the form that the stage's output must have.
    pub(crate) usable: bool,
    pub(crate) assessments: Vec<Assessment>,
}

/// Reads an answer, and holds it against the stage's schema and the gate's deterministic checks.
pub(crate) fn measure(pipeline: &Pipeline, stage: usize, answer: &str, context: &RenderContext<'_>) -> Measured {
    let output = match pipeline.read_output(stage, answer) {
        Ok(output) => Arc::new(output),
        Err(assessment) => {
            return Measured { output: answer.into(), usable: false, assessments: vec![assessment] };
        }
    };
    let assessments = pipeline.assess(stage, &output, context);
    // The stage's own schema is assessed first; a `schema` check of the gate is a check like any other.
    let has_schema = matches!(pipeline.stages[stage].output, OutputFormat::Json { schema: Some(_) });
    let usable = !has_schema || assessments.first().is_none_or(|assessment| assessment.passed);
    Measured { output: Arc::unwrap_or_clone(output).into(), usable, assessments }
}

fn failed_call(error: CallError) -> Stopped {
    let CallError { code, message, detail, kind, tried, .. } = error;
    AttemptResult::Failed { code, message, detail, kind, tried }
}

fn failed_render(failure: Failure) -> Stopped {
    let Failure { code, message, detail, .. } = failure;
    AttemptResult::Failed { code, message, detail, kind: FailureKind::Final, tried: Tried::default() }
}

/// An answer that came but was cut: an output that is measured as incomplete, so that the critique can say so. Where
/// another model of the chain may answer later, that is waited for as well.
fn incomplete(partial: Partial, error: CallError) -> AttemptResult {
    let Partial { content, model, message, is_too_long } = partial;
    let output = content.as_str().into();
    let assessments = vec![Assessment {
        evaluator: Evaluator::Check,
        name: "complete".to_owned(),
        version: 1,
        passed: false,
        score: 0.0,
        threshold: 1.0,
        reason: format!("{message}; give the whole answer{}", if is_too_long { " in fewer words" } else { "" }),
        detail: None,
        model: None,
        scale: None,
        judge_failure: None,
        rest: stagegate_core::Rest::default(),
    }];
    let model = Some(model);
    match error.kind {
        FailureKind::Outage { told } => {
            let CallError { code, message, detail, tried, .. } = error;
            AttemptResult::Cut { output, assessments, model, code, message, detail, told, tried }
        }
        FailureKind::Unusable | FailureKind::Final => {
            AttemptResult::Output { output, usable: false, assessments, model, origin: Origin::Provider }
        }
    }
}
