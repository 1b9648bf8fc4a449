//! Planning: owns the estimate of what a run would cost. Calls no model and writes nothing.

use std::{sync::Arc, time::Duration};

use serde_json::Value;
use stagegate_core::{
    Code, Error, Failure, Json, Pipeline, RunId, StageId, TenantId, Usd, Violation, evaluation,
    pipeline::{Cache, CacheMode, ModelWork, RenderContext, Rendered, Work},
};
use stagegate_llm::{CallContext, Reply, Request, prices::DEFAULT_MAX_OUTPUT_TOKENS};
use tokio::time::Instant;
use uuid::Uuid;

use crate::{Plan, PlannedOutcome, PlannedStage, evaluation::Unevaluated, kinds, memory::Permit, shared::Shared};

/// Characters in a token, on average over English text: for estimates only.
const CHARS_PER_TOKEN: u64 = 4;
/// The answer that is expected where nothing is known, in tokens; less where the stage caps it.
const EXPECTED_OUTPUT_TOKENS: u64 = 500;
/// A rubric and the judge's own instructions, in tokens.
const JUDGE_TOKENS: u64 = 125;
/// How long one look into the cache may take.
const PEEK_TIMEOUT: Duration = Duration::from_secs(2);
/// What templates see as the run's id.
const NO_RUN: &str = "00000000-0000-0000-0000-000000000000";

/// See [`crate::Engine::plan`].
pub(crate) async fn plan(
    shared: &Shared,
    tenant: &TenantId,
    pipeline: Arc<Pipeline>,
    version: u32,
    input: Json,
) -> Result<Plan, Error> {
    let is_guessed = pipeline.stages.iter().any(|stage| !stage.needs.is_empty());
    let input_tokens = if is_guessed { tokens(input.as_str().len()) } else { 0 };
    let room = Arc::new(shared.evaluations.room(tenant, input.size().parsed_bytes).await?);
    let (judged, held) = (Arc::clone(&pipeline), Arc::clone(&room));
    let fits = move || {
        let _held = &held;
        let mut seen = evaluation::parse(&input);
        judged.fill_defaults(&mut seen);
        let seen = Arc::new(seen);
        judged.check_input(&seen)?;
        // What a run's submit refuses is refused here.
        judged.limits(&seen).map_err(|violation| vec![violation])?;
        Ok::<_, Vec<Violation>>(seen)
    };
    let input = shared.evaluations.evaluate(tenant, || 0, fits).await?;
    let input = input.map_err(|violations| Error::violations(Code::InvalidInput, violations))?;
    let outputs = Arc::new(vec![None; pipeline.stages.len()]);
    let stages = Vec::new();
    let mut planner =
        Planner { shared, tenant, pipeline: &pipeline, version, input, room, input_tokens, outputs, stages };
    for index in 0..pipeline.stages.len() {
        let (stage, output) = planner.stage(index).await?;
        Arc::make_mut(&mut planner.outputs)[index] = output.map(Arc::new);
        planner.stages.push(stage);
    }
    let stages = planner.stages;
    let bought = |stage: &&PlannedStage| stage.outcome == PlannedOutcome::Buy;
    Ok(Plan {
        pipeline: pipeline.name.clone(),
        cost_usd: stages.iter().filter_map(|stage| stage.cost_usd).sum(),
        saved_usd: stages.iter().map(|stage| stage.saved_usd).sum(),
        worst_case_usd: stages.iter().map(|stage| stage.worst_case_usd).sum(),
        budget_usd: pipeline.budget.as_ref().map(|budget| budget.max_cost_usd),
        tokens: stages.iter().filter(bought).map(|stage| stage.input_tokens + stage.output_tokens).sum(),
        critical_path: critical_path(&pipeline, &stages),
        stages,
    })
}

/// A plan under way: what is known of the stages so far.
struct Planner<'a> {
    shared: &'a Shared,
    tenant: &'a TenantId,
    pipeline: &'a Arc<Pipeline>,
    version: u32,
    input: Arc<Value>,
    /// The room that the input takes in memory, held by each evaluation that has it.
    room: Arc<Permit>,
    /// What a stage may get of it whose needs are not known; none where no stage needs another.
    input_tokens: u64,
    outputs: Arc<Vec<Option<Arc<Value>>>>,
    stages: Vec<PlannedStage>,
}

impl Planner<'_> {
    /// A stage, and its output where that is known without buying it.
    async fn stage(&self, index: usize) -> Result<(PlannedStage, Option<Value>), Error> {
        let stage = &self.pipeline.stages[index];
        let planned = PlannedStage {
            id: stage.id.clone(),
            needs: stage.needs.iter().map(|need| self.pipeline.stages[*need].id.clone()).collect(),
            model: None,
            outcome: PlannedOutcome::Free,
            input_tokens: 0,
            output_tokens: 0,
            cost_usd: Some(Usd::ZERO),
            saved_usd: Usd::ZERO,
            worst_case_usd: Usd::ZERO,
        };
        let known = stage.needs.iter().all(|need| self.outputs[*need].is_some());
        match &stage.work {
            Work::Model(work) => self.model(index, work, known, planned).await,
            Work::Transform if known => {
                let rendered = move |pipeline: &Pipeline, context: &RenderContext<'_>| {
                    pipeline.render(index, context).map(|rendered| match rendered {
                        Rendered::Text(text) => pipeline.read_output(index, &text).ok(),
                        Rendered::Messages(_) => None,
                    })
                };
                Ok((planned, self.evaluate(rendered).await?.map_err(refused)?))
            }
            Work::Transform => Ok((planned, None)),
        }
    }

    async fn model(
        &self,
        index: usize,
        work: &ModelWork,
        known: bool,
        mut planned: PlannedStage,
    ) -> Result<(PlannedStage, Option<Value>), Error> {
        planned.model = work.models.first().cloned();
        let longest = u64::from(work.params.max_output_tokens.unwrap_or(DEFAULT_MAX_OUTPUT_TOKENS));
        if known {
            let request = move |pipeline: &Pipeline, context: &RenderContext<'_>| match &pipeline.stages[index].work {
                Work::Model(work) => kinds::request(pipeline, index, work, context, None).map(Some),
                Work::Transform => Ok(None),
            };
            let Some(request) = self.evaluate(request).await?.map_err(refused)? else { return Ok((planned, None)) };
            if let Some(hit) = self.peek(index, &work.cache, &request).await {
                return self.hit(index, work, hit, planned).await;
            }
            planned.input_tokens = tokens(request.messages.iter().map(|message| message.content.len()).sum());
            planned.worst_case_usd = self.shared.llm.worst_case(&request).unwrap_or_default();
        } else {
            // What it needs is not known yet: its own text, the input, and what its needs will probably answer.
            let needs = &self.pipeline.stages[index].needs;
            let answers: u64 = needs.iter().map(|need| self.stages[*need].output_tokens).sum();
            planned.input_tokens = answers + self.input_tokens + JUDGE_TOKENS;
            let dearest = work.models.iter().filter_map(|model| {
                self.shared.llm.estimate(std::slice::from_ref(model), 2 * planned.input_tokens, longest)
            });
            planned.worst_case_usd = dearest.max().unwrap_or_default();
        }
        planned.outcome = PlannedOutcome::Buy;
        planned.output_tokens = EXPECTED_OUTPUT_TOKENS.min(longest);
        let judged = u64::from(self.pipeline.stages[index].gate.judge.is_some());
        let judge_tokens = judged * (planned.output_tokens + JUDGE_TOKENS);
        planned.cost_usd =
            self.shared.llm.estimate(&work.models, planned.input_tokens + judge_tokens, planned.output_tokens);
        Ok((planned, None))
    }

    /// A stage whose answer is there; its judge's verdict is there too, or is what remains to be paid.
    async fn hit(
        &self,
        index: usize,
        work: &ModelWork,
        hit: Reply,
        mut planned: PlannedStage,
    ) -> Result<(PlannedStage, Option<Value>), Error> {
        planned.outcome = PlannedOutcome::Hit;
        for call in &hit.calls {
            planned.input_tokens += call.usage.total_tokens() - call.usage.output_tokens;
            planned.output_tokens += call.usage.output_tokens;
            planned.saved_usd += call.saved_usd;
        }
        let stage = &self.pipeline.stages[index];
        let content = hit.content;
        let read = move |pipeline: &Pipeline, context: &RenderContext<'_>| {
            let output = pipeline.read_output(index, &content).ok().map(Arc::new);
            let texts = output.as_ref().and_then(|output| pipeline.render_judge(index, context, output).ok().flatten());
            (output.map(Arc::unwrap_or_clone), texts)
        };
        let (output, texts) = self.evaluate(read).await?;
        let judged = output.as_ref().map(|output: &Value| Json::from(output.clone()));
        if let (Some(judge), Some(texts), Some(judged)) = (&stage.gate.judge, texts, &judged) {
            let (request, cache) = kinds::judge_request(judge, &stage.work, texts, judged);
            if let Some(verdict) = self.peek(index, &cache, &request).await {
                planned.saved_usd += verdict.calls.iter().map(|call| call.saved_usd).sum();
            } else {
                planned.cost_usd =
                    self.shared.llm.estimate(&work.models, planned.output_tokens + JUDGE_TOKENS, JUDGE_TOKENS);
                planned.worst_case_usd = self.shared.llm.worst_case(&request).unwrap_or_default();
            }
        }
        Ok((planned, output))
    }

    /// Evaluates with what the plan knows so far.
    async fn evaluate<T: Send + 'static>(
        &self,
        work: impl Fn(&Pipeline, &RenderContext<'_>) -> T + Send + 'static,
    ) -> Result<T, Unevaluated> {
        let (pipeline, input, outputs) =
            (Arc::clone(self.pipeline), Arc::clone(&self.input), Arc::clone(&self.outputs));
        let room = Arc::clone(&self.room);
        let seen = move || {
            let _held = &room;
            work(&pipeline, &RenderContext { run_id: NO_RUN, input: &input, outputs: &outputs })
        };
        self.shared.evaluations.evaluate(self.tenant, || 0, seen).await
    }

    async fn peek(&self, index: usize, cache: &Cache, request: &Request) -> Option<Reply> {
        if matches!(cache.mode, CacheMode::Off | CacheMode::Refresh) {
            return None;
        }
        let call = CallContext {
            tenant: self.tenant.clone(),
            pipeline: self.pipeline.name.clone(),
            version: self.version,
            stage: self.pipeline.stages[index].id.clone(),
            run: RunId(Uuid::nil()),
            attempt: 1,
            cache_mode: cache.mode,
            cache_ttl: cache.ttl.0,
            timeout: PEEK_TIMEOUT,
            outage_until: Instant::now(),
            deadline: Instant::now() + PEEK_TIMEOUT,
            purse: None,
        };
        self.shared.llm.peek(&call, request).await
    }
}

/// A template that fails with the values that are there would fail the run in the same way.
fn refused(failure: Failure) -> Error {
    let stage = failure.stage.map(|stage| format!("stage `{stage}`: ")).unwrap_or_default();
    Error::new(failure.code, format!("{stage}{}", failure.message))
}

fn tokens(chars: usize) -> u64 {
    (chars as u64).div_ceil(CHARS_PER_TOKEN)
}

/// The longest chain of stages that would be bought.
fn critical_path(pipeline: &Pipeline, stages: &[PlannedStage]) -> Vec<StageId> {
    let mut best: Vec<(usize, Option<usize>)> = Vec::with_capacity(stages.len());
    for (index, stage) in pipeline.stages.iter().enumerate() {
        let longest = stage.needs.iter().copied().max_by_key(|need| best[*need].0);
        let before = longest.map_or(0, |need| best[need].0);
        let own = usize::from(stages[index].outcome == PlannedOutcome::Buy);
        best.push((before + own, longest));
    }
    let mut path = Vec::new();
    let mut at = (0..best.len()).max_by_key(|index| (best[*index].0, std::cmp::Reverse(*index)));
    while let Some(index) = at {
        if stages[index].outcome == PlannedOutcome::Buy {
            path.push(stages[index].id.clone());
        }
        at = best[index].1;
    }
    path.reverse();
    path
}
