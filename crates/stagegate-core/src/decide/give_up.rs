//! The end of a run that cannot even be ended in the usual way: owns a step that is made of its rows alone. Reads no input
//! and no output, renders nothing, needs no pipeline.

use chrono::{DateTime, Utc};

use crate::{
    Event, EventKind, Failure, RunState, StageState,
    store::{Commit, Disposition, Lease, RunRecord, StageRecord},
};

/// The last event of a run that is accepted and was never owned.
const ACCEPTED_SEQ: u64 = 1;

/// Ends a run whose owners crashed even when they only ended it. What they may have bought is not booked: to know what it
/// can have cost, the prompt would have to be rendered. None where it is in a state that this release does not know.
pub fn give_up(
    lease: Lease,
    run: &RunRecord,
    stages: Vec<StageRecord>,
    failure: Failure,
    now: DateTime<Utc>,
) -> Option<Commit> {
    let unknown = stages.iter().any(|stage| matches!(stage.state, StageState::Unknown(_)));
    if unknown || run.state.is_terminal() || matches!(run.state, RunState::Unknown(_)) {
        return None;
    }
    let under_way =
        |stage: &StageRecord| matches!(stage.state, StageState::Running | StageState::Waiting | StageState::Held);
    let cancelled = |stage: StageRecord| StageRecord {
        state: StageState::Cancelled,
        not_before: None,
        finished_at: Some(now),
        ..stage
    };
    let first = match run.started_at {
        // It was accepted and is queued again: a retry that no owner has obeyed. It starts nothing over.
        _ if run.state == RunState::Queued && run.last_seq > ACCEPTED_SEQ => {
            EventKind::RunRetried { stages: Vec::new() }
        }
        Some(_) => EventKind::RunResumed { checkpoints: run.stages_done },
        None => EventKind::RunStarted,
    };
    let last = EventKind::RunFinished { state: RunState::Failed, failure: Some(failure.clone()), totals: run.totals };
    Some(Commit {
        lease,
        events: vec![Event::new(run.last_seq + 1, now, first), Event::new(run.last_seq + 2, now, last)],
        stages: stages.into_iter().filter(under_way).map(cancelled).collect(),
        attempts: Vec::new(),
        checkpoints: Vec::new(),
        state: RunState::Failed,
        stages_done: run.stages_done,
        totals: run.totals,
        failure: Some(failure),
        started_at: run.started_at.or(Some(now)),
        finished_at: Some(now),
        output: None,
        output_of: Vec::new(),
        consumed: Vec::new(),
        then: Disposition::End,
    })
}
