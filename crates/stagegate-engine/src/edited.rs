//! Edited outputs: owns what an output must be that a person gives in place of a held one. It is held to what is asked of
//! every output of its stage: the format, the schema, the gate's deterministic checks. No judge is asked: the person is
//! one. Writes nothing.

use std::{collections::BTreeSet, sync::Arc};

use stagegate_core::{
    Code, Error, Json, Pipeline, RunId, StageId, StageState, TenantId, Violation,
    pipeline::{OutputFormat, Part, Seen},
    store::StageDetail,
};

use crate::{kinds, shared::Shared};

/// The largest edited output, in bytes: what the answer of a provider may have by default.
const EDITED_MAX_BYTES: u64 = 4 << 20;
/// The path of an edited output's mistakes.
const PATH: &str = "output";

/// What an edited output is held against.
pub(crate) struct Edited<'a> {
    pub(crate) tenant: &'a TenantId,
    pub(crate) run: RunId,
    pub(crate) pipeline: &'a Arc<Pipeline>,
    /// The held stage.
    pub(crate) stage: usize,
    /// The attempt that is meant; None for the one that is held.
    pub(crate) attempt: Option<u32>,
}

impl Edited<'_> {
    /// Refuses an output that the stage must not have. Returns the attempt in whose place it stands, so that the decision
    /// is about no later one.
    pub(crate) async fn check(&self, shared: &Shared, output: &Json) -> Result<u32, Error> {
        let attempt = self.held(shared).await?;
        if output.text_bytes() > EDITED_MAX_BYTES {
            let bytes = output.text_bytes();
            let detail = format!("the edited output has {bytes} bytes; at most {EDITED_MAX_BYTES} are allowed");
            return Err(Error::new(Code::BodyTooLarge, detail));
        }
        let content = self.content(output)?;
        let (input, outputs) = self.named(shared).await?;
        let (pipeline, stage, run) = (Arc::clone(self.pipeline), self.stage, self.run);
        let value_bytes = Seen::parsed_bytes(&pipeline, Part::Checks(stage), &input, &outputs);
        let value_bytes = value_bytes.saturating_add(output.size().parsed_bytes);
        let measure = move || {
            let run_id = run.to_string();
            let seen = Seen::parse(&pipeline, Part::Checks(stage), &input, &outputs);
            kinds::measure(&pipeline, stage, &content, &seen.context(&run_id)).assessments
        };
        let assessments = shared.evaluations.evaluate(self.tenant, || value_bytes, measure).await?;
        let failed = assessments.into_iter().filter(|assessment| !assessment.passed);
        let violations: Vec<Violation> = failed
            .map(|failed| {
                // The author of the output may read everything of it.
                let message = format!("{}: {}", failed.name, failed.detail.unwrap_or(failed.reason));
                Violation::new(Code::OutputRefused, PATH, message)
            })
            .collect();
        if violations.is_empty() { Ok(attempt) } else { Err(Error::violations(Code::OutputRefused, violations)) }
    }

    /// The attempt whose output is held.
    async fn held(&self, shared: &Shared) -> Result<u32, Error> {
        let detail = self.detail(shared, &self.pipeline.stages[self.stage].id).await?;
        let (state, last) =
            detail.map_or((StageState::Pending, 0), |detail| (detail.stage.state, detail.stage.attempt));
        if state != StageState::Held {
            let message = format!("the stage is {}: only a held output can be approved", state.as_str());
            return Err(Error::new(Code::WrongState, message));
        }
        match self.attempt {
            Some(attempt) if attempt != last => Err(other_attempt(attempt, last)),
            _ => Ok(last),
        }
    }

    /// The output as a model would have written it.
    fn content(&self, output: &Json) -> Result<String, Error> {
        if let OutputFormat::Json { .. } = self.pipeline.stages[self.stage].output {
            return Ok(output.as_str().to_owned());
        }
        serde_json::from_str::<String>(output.as_str()).map_err(|_| {
            let violation =
                Violation::new(Code::OutputRefused, PATH, "the stage's output is text").mend("give a string");
            Error::violations(Code::OutputRefused, vec![violation])
        })
    }

    /// The input and the outputs that the stage's checks name; others are left out.
    async fn named(&self, shared: &Shared) -> Result<(Json, Vec<Option<Json>>), Error> {
        let mut named = BTreeSet::new();
        self.pipeline.each_named(Part::Checks(self.stage), |what| {
            named.insert(what);
        });
        let mut input = Json::null();
        let mut outputs = vec![None; self.pipeline.stages.len()];
        for what in named {
            match what {
                None => {
                    let run = shared.store.run(self.tenant, self.run).await?;
                    input = run.map_or_else(Json::null, |run| run.input);
                }
                Some(stage) => {
                    let detail = self.detail(shared, &self.pipeline.stages[stage].id).await?;
                    outputs[stage] = detail.and_then(|detail| detail.checkpoint).map(|checkpoint| checkpoint.output);
                }
            }
        }
        Ok((input, outputs))
    }

    async fn detail(&self, shared: &Shared, stage: &StageId) -> Result<Option<StageDetail>, Error> {
        Ok(shared.store.stage(self.tenant, self.run, stage).await?)
    }
}

/// A decision about another attempt than the one that is held.
pub(crate) fn other_attempt(attempt: u32, last: u32) -> Error {
    let message = format!("attempt {attempt} is not the one that is held: the stage is at attempt {last}");
    Error::new(Code::WrongState, message)
}
