//! Stages whose first attempt is under way: kept on their run's row, which each step writes anyway, until something else
//! is to be told of them. So a stage that succeeds at once costs one row, written once.

use std::collections::BTreeMap;

use chrono::DateTime;
use stagegate_core::{
    StageState, StoreResult,
    store::{Commit, StageRecord},
};

use crate::rows::{self, Reader, Time};

/// Stages by id, and when their first attempt started, in microseconds since 1970.
#[derive(Default)]
pub(crate) struct FirstAttempts(BTreeMap<String, i64>);

impl FirstAttempts {
    /// When a stage's first attempt started, if that is all that there is to tell of it.
    pub(crate) fn started_at(stage: &StageRecord) -> Option<Time> {
        let started_at = stage.started_at?;
        (*stage == Self::record(stage.id.clone(), started_at)).then_some(started_at)
    }

    /// Those of a new run.
    pub(crate) fn of(stages: &[StageRecord]) -> Self {
        let started = stages.iter().filter_map(|stage| Some((stage, Self::started_at(stage)?)));
        Self(started.map(|(stage, at)| (stage.id.to_string(), at.timestamp_micros())).collect())
    }

    /// Those of a step. What comes with an attempt or a checkpoint has more to tell.
    pub(crate) fn of_step(commit: &Commit) -> Self {
        let mut of_step = Self::of(&commit.stages);
        let ended = commit.attempts.iter().map(|(id, _)| id).chain(commit.checkpoints.iter().map(|(id, _)| id));
        for id in ended {
            of_step.0.remove(id.as_str());
        }
        // Given twice, the last one counts.
        for (at, stage) in commit.stages.iter().enumerate() {
            if Self::started_at(stage).is_none() && !commit.stages[at + 1..].iter().any(|later| later.id == stage.id) {
                of_step.0.remove(stage.id.as_str());
            }
        }
        of_step
    }

    /// Whether this stage is among them.
    pub(crate) fn contains(&self, stage: &StageRecord) -> bool {
        self.0.contains_key(stage.id.as_str())
    }

    /// As stored; None where there are none.
    pub(crate) fn to_json(&self) -> StoreResult<Option<String>> {
        if self.0.is_empty() { Ok(None) } else { rows::to_json("stages", &self.0).map(Some) }
    }

    /// From a run's `first_attempts`.
    pub(crate) fn read(read: &Reader<'_>) -> StoreResult<Self> {
        Ok(Self(read.maybe_json("first_attempts")?.unwrap_or_default()))
    }

    /// The records of those that have no row.
    pub(crate) fn without(self, read: &Reader<'_>, rows: &[StageRecord]) -> StoreResult<Vec<StageRecord>> {
        let missing = self.0.into_iter().filter(|(id, _)| rows.iter().all(|row| row.id.as_str() != id));
        let record = |(id, micros): (String, i64)| {
            let corrupt = || read.corrupt("first_attempts", "not a stage and a time");
            let started_at = DateTime::from_timestamp_micros(micros).ok_or_else(corrupt)?;
            Ok(Self::record(id.parse().map_err(|_| corrupt())?, started_at))
        };
        missing.map(record).collect()
    }

    fn record(id: stagegate_core::StageId, started_at: Time) -> StageRecord {
        let started_at = Some(started_at);
        StageRecord { state: StageState::Running, attempt: 1, started_at, ..StageRecord::pending(id) }
    }
}
