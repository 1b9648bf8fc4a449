//! Planning: owns the estimate of what a run would cost. Calls no model and writes nothing.

use std::{sync::Arc, time::Duration};

use serde_json::Value;
use stagegate_core::{
    Error, Pipeline, RunId, StageId, TenantId, Usd,
    pipeline::{CacheMode, ModelWork, RenderContext, Work},
};
use stagegate_llm::{CallContext, Llm, Request};
use tokio::time::Instant;
use uuid::Uuid;

use crate::{Plan, PlannedOutcome, PlannedStage, kinds};

/// Characters in a token, on average over English text: for estimates only.
const CHARS_PER_TOKEN: u64 = 4;
/// The answer that is expected where nothing is known, in tokens; less where the stage caps it.
const EXPECTED_OUTPUT_TOKENS: u64 = 500;
/// How long one look into the cache may take.
const PEEK_TIMEOUT: Duration = Duration::from_secs(2);

/// See [`crate::Engine::plan`].
pub(crate) async fn plan(
    llm: &Llm,
    tenant: &TenantId,
    pipeline: &Arc<Pipeline>,
    version: u32,
    input: &Value,
) -> Result<Plan, Error> {
    let mut outputs: Vec<Option<Arc<Value>>> = vec![None; pipeline.stages.len()];
    let mut stages: Vec<PlannedStage> = Vec::with_capacity(pipeline.stages.len());
    for index in 0..pipeline.stages.len() {
        let context = RenderContext { run_id: "00000000-0000-0000-0000-000000000000", input, outputs: &outputs };
        let (planned, output) = plan_stage(llm, tenant, pipeline, version, index, &context, &stages).await;
        outputs[index] = output.map(Arc::new);
        stages.push(planned);
    }
    let bought = |stage: &&PlannedStage| stage.outcome == PlannedOutcome::Buy;
    Ok(Plan {
        pipeline: pipeline.name.clone(),
        cost_usd: stages.iter().filter_map(|stage| stage.cost_usd).sum(),
        saved_usd: stages.iter().map(|stage| stage.saved_usd).sum(),
        tokens: stages.iter().filter(bought).map(|stage| stage.input_tokens + stage.output_tokens).sum(),
        critical_path: critical_path(pipeline, &stages),
        stages,
    })
}

async fn plan_stage(
    llm: &Llm,
    tenant: &TenantId,
    pipeline: &Pipeline,
    version: u32,
    index: usize,
    context: &RenderContext<'_>,
    before: &[PlannedStage],
) -> (PlannedStage, Option<Value>) {
    let stage = &pipeline.stages[index];
    let mut planned = PlannedStage {
        id: stage.id.clone(),
        needs: stage.needs.iter().map(|need| pipeline.stages[*need].id.clone()).collect(),
        model: None,
        outcome: PlannedOutcome::Free,
        input_tokens: 0,
        output_tokens: 0,
        cost_usd: Some(Usd::ZERO),
        saved_usd: Usd::ZERO,
    };
    let known = stage.needs.iter().all(|need| context.outputs[*need].is_some());
    let Work::Model(work) = &stage.work else {
        let rendered = known.then(|| pipeline.render(index, context).ok()).flatten();
        let output = rendered.and_then(|rendered| match rendered {
            stagegate_core::pipeline::Rendered::Text(text) => pipeline.read_output(index, &text).ok(),
            stagegate_core::pipeline::Rendered::Messages(_) => None,
        });
        return (planned, output);
    };
    planned.model = work.models.first().cloned();
    planned.outcome = PlannedOutcome::Buy;
    planned.output_tokens =
        work.params.max_output_tokens.map_or(EXPECTED_OUTPUT_TOKENS, |max| EXPECTED_OUTPUT_TOKENS.min(max.into()));
    let request = known.then(|| kinds::request(pipeline, index, work, context, None).ok()).flatten();
    if let Some(request) = &request {
        if let Some(hit) = peek(llm, tenant, pipeline, version, index, work, request).await {
            let call = hit.calls.last();
            planned.outcome = PlannedOutcome::Hit;
            planned.input_tokens = call.map_or(0, |call| call.usage.total_tokens() - call.usage.output_tokens);
            planned.output_tokens = call.map_or(0, |call| call.usage.output_tokens);
            planned.saved_usd = call.map_or(Usd::ZERO, |call| call.saved_usd);
            return (planned, pipeline.read_output(index, &hit.content).ok());
        }
        planned.input_tokens = tokens(request.messages.iter().map(|message| message.content.len()).sum());
    } else {
        // What it needs is not known yet: its own text, the input, and what its needs will probably answer.
        let needs: u64 = stage.needs.iter().map(|need| before[*need].output_tokens).sum();
        planned.input_tokens = needs + tokens(context.input.to_string().len()) + EXPECTED_OUTPUT_TOKENS / 4;
    }
    let judged = u64::from(stage.gate.judge.is_some());
    let judge_tokens = judged * (planned.output_tokens + EXPECTED_OUTPUT_TOKENS / 4);
    planned.cost_usd = llm.estimate(&work.models, planned.input_tokens + judge_tokens, planned.output_tokens);
    (planned, None)
}

async fn peek(
    llm: &Llm,
    tenant: &TenantId,
    pipeline: &Pipeline,
    version: u32,
    index: usize,
    work: &ModelWork,
    request: &Request,
) -> Option<stagegate_llm::Reply> {
    if matches!(work.cache.mode, CacheMode::Off | CacheMode::Refresh) {
        return None;
    }
    let call = CallContext {
        tenant: tenant.clone(),
        pipeline: pipeline.name.clone(),
        version,
        stage: pipeline.stages[index].id.clone(),
        run: RunId(Uuid::nil()),
        cache_mode: work.cache.mode,
        cache_ttl: work.cache.ttl.0,
        deadline: Instant::now() + PEEK_TIMEOUT,
    };
    llm.peek(&call, request).await
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
