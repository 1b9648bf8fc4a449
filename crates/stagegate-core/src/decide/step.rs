//! A step: what stimuli add up to, until it is taken to be committed.

use std::collections::BTreeSet;

use chrono::{DateTime, Utc};

use super::Run;
use crate::{
    Attempt, Checkpoint, Event, Json, StageId, Verdict,
    store::{Commit, Disposition},
};

/// One commit, and what to do once it is durable.
#[derive(Debug)]
pub struct Step {
    /// What to write.
    pub commit: Commit,
    /// What to do then, in order.
    pub effects: Vec<Effect>,
}

/// What to do once a commit is durable.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Begin an attempt.
    Start {
        /// The stage.
        stage: usize,
        /// Which attempt.
        attempt: u32,
    },
    /// Give a [`super::Stimulus::Due`] then.
    WakeAt {
        /// The stage.
        stage: usize,
        /// When.
        at: DateTime<Utc>,
    },
    /// Render the run's output, which is too large to be rendered while deciding; then give a
    /// [`super::Stimulus::Rendered`].
    RenderOutput,
    /// Abandon every attempt under way.
    Abort,
    /// A gate has spoken: evict the answer where it failed; where a retry passed, keep it for the first request too.
    Judged {
        /// The stage.
        stage: usize,
        /// Which attempt.
        attempt: u32,
        /// What was decided.
        verdict: Verdict,
        /// True where an assessment failed, whatever was decided then.
        gate_failed: bool,
        /// True where an earlier attempt of this round had failed its gate.
        mended: bool,
    },
}

impl Effect {
    /// Whether it begins something, which a stopped or parked run must not.
    pub(super) fn is_work(&self) -> bool {
        matches!(self, Self::Start { .. } | Self::WakeAt { .. } | Self::RenderOutput)
    }
}

/// What stimuli add up to since the last step was taken.
#[derive(Debug)]
pub(super) struct Draft {
    pub(super) events: Vec<Event>,
    pub(super) touched: BTreeSet<usize>,
    pub(super) attempts: Vec<(StageId, Attempt)>,
    pub(super) checkpoints: Vec<(StageId, Checkpoint)>,
    pub(super) output: Option<Json>,
    pub(super) output_of: Vec<StageId>,
    pub(super) consumed: Vec<i64>,
    pub(super) disposition: Disposition,
    pub(super) effects: Vec<Effect>,
    /// Stages whose attempt under way ended with the run.
    pub(super) cut_off: Vec<usize>,
}

impl Default for Draft {
    fn default() -> Self {
        Self {
            events: Vec::new(),
            touched: BTreeSet::new(),
            attempts: Vec::new(),
            checkpoints: Vec::new(),
            output: None,
            output_of: Vec::new(),
            consumed: Vec::new(),
            disposition: Disposition::Keep,
            effects: Vec::new(),
            cut_off: Vec::new(),
        }
    }
}

impl Draft {
    pub(super) fn touch(&mut self, stage: usize) {
        self.touched.insert(stage);
    }
}

impl Run {
    /// What the stimuli since the last step add up to; None where nothing is to be written. Signals that changed
    /// nothing are consumed with the next step that does.
    pub fn take_step(&mut self) -> Option<Step> {
        if self.draft.events.is_empty() {
            return None;
        }
        let draft = std::mem::take(&mut self.draft);
        let commit = Commit {
            lease: self.lease,
            events: draft.events,
            stages: draft.touched.into_iter().map(|index| self.stages[index].record.clone()).collect(),
            attempts: draft.attempts,
            checkpoints: draft.checkpoints,
            state: self.state,
            stages_done: u32::try_from(self.stages_done()).unwrap_or(u32::MAX),
            totals: self.totals,
            failure: self.failure.clone(),
            started_at: self.started_at,
            finished_at: self.finished_at,
            output: draft.output,
            output_of: draft.output_of,
            consumed: draft.consumed,
            then: draft.disposition,
        };
        Some(Step { commit, effects: draft.effects })
    }
}
