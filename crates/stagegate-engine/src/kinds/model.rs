//! The `prompt` and `messages` kind: a model is asked. Owns how a stage becomes a request, critique included.

use stagegate_core::{
    CallPurpose, Code, Failure, Origin,
    decide::{AttemptResult, Critique},
    pipeline::{Message, ModelWork, Part, RenderContext, Rendered, Role, Work},
};
use stagegate_llm::{Reply, Request, prices::DEFAULT_MAX_OUTPUT_TOKENS, providers::sim::CRITIQUE_GREETING};

use super::{AttemptContext, Stopped, failed_call, failed_render, incomplete};

pub(super) async fn attempt(
    context: &AttemptContext,
    work: &ModelWork,
    kept: &mut Option<Reply>,
) -> Result<AttemptResult, Stopped> {
    let request = rendered_request(context, context.critique.clone()).await?;
    let reply = match context.complete(&context.call_context(&work.cache), &request).await {
        Ok(reply) => reply,
        Err(mut error) => {
            return match error.partial.take() {
                Some(partial) => Ok(incomplete(partial, error)),
                None => Err(failed_call(error)),
            };
        }
    };
    let (model, origin) =
        reply.calls.last().map_or((None, Origin::None), |call| (Some(call.model.clone()), call.origin));
    let answer = reply.content.clone();
    *kept = Some(reply);
    context.assess(answer, model, origin).await
}

/// The request of the attempt's stage.
pub(crate) async fn rendered_request(
    context: &AttemptContext,
    critique: Option<Critique>,
) -> Result<Request, AttemptResult> {
    let stage = context.stage;
    let rendered = context.evaluate(Part::Work(stage), move |pipeline, seen| match &pipeline.stages[stage].work {
        Work::Model(work) => request(pipeline, stage, work, seen, critique.as_ref()),
        Work::Transform => {
            let failure = Failure::new(Code::Internal, "a transform asks no model");
            Err(failure.of_stage(pipeline.stages[stage].id.clone()))
        }
    });
    let mut request = rendered.await?.map_err(failed_render)?;
    let left = &context.models_left;
    if request.models.iter().any(|model| left.contains(model)) {
        request.models.retain(|model| left.contains(model));
    }
    Ok(request)
}

/// The request of a stage, with the previous answer and what was wrong with it where there is a critique.
pub(crate) fn request(
    pipeline: &stagegate_core::Pipeline,
    stage: usize,
    work: &ModelWork,
    context: &RenderContext<'_>,
    critique: Option<&Critique>,
) -> Result<Request, Failure> {
    let mut messages = match pipeline.render(stage, context)? {
        Rendered::Messages(messages) => messages,
        Rendered::Text(text) => vec![Message { role: Role::User, content: text }],
    };
    if let Some(critique) = critique {
        messages.extend(mend(critique));
    }
    let mut params = work.params.clone();
    if pipeline.budget.is_some() {
        // A budget reckons with the longest answer, so there must be one.
        params.max_output_tokens.get_or_insert(DEFAULT_MAX_OUTPUT_TOKENS);
    }
    Ok(Request {
        models: work.models.clone(),
        messages,
        params,
        format: pipeline.stages[stage].output.clone(),
        sample: work.sample,
        purpose: CallPurpose::Stage,
    })
}

fn mend(critique: &Critique) -> [Message; 2] {
    let previous = critique.output.to_plain_text();
    let reasons = critique.reasons.join("\n- ");
    [
        Message { role: Role::Assistant, content: previous },
        Message {
            role: Role::User,
            content: format!(
                "{CRITIQUE_GREETING}:\n- {reasons}\n\nAnswer the original request again, whole, with \
                 these points mended. Give the answer alone, without comments on the review."
            ),
        },
    ]
}
