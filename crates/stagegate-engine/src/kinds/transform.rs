//! The `transform` kind: a template is rendered, no model is asked. Its output is gated like any other.

use stagegate_core::{
    Origin,
    decide::AttemptResult,
    pipeline::{Part, Rendered},
};

use super::{AttemptContext, Stopped, failed_render};

pub(super) async fn attempt(context: &AttemptContext) -> Result<AttemptResult, Stopped> {
    let stage = context.stage;
    let rendered = context.evaluate(Part::Work(stage), move |pipeline, seen| pipeline.render(stage, seen)).await?;
    let rendered = rendered.map_err(failed_render)?;
    let output = match rendered {
        Rendered::Text(text) => text,
        Rendered::Messages(messages) => messages.into_iter().map(|message| message.content).collect(),
    };
    context.assess(output, None, Origin::None).await
}
