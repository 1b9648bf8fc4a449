//! The parameters of the statements that commit steps: arrays, one element for each row.

use stagegate_core::{
    Attempt, Checkpoint, Json, LedgerEntry, StageId, StoreError, StoreResult,
    store::{Commit, Disposition},
};
use uuid::Uuid;

use super::statements::LEDGER_NUMBERS;
use crate::{
    compact,
    first::FirstAttempts,
    pool::Statement,
    rows::{self, AttemptBody, Time},
    shared::{EventColumns, StageColumns},
};

/// The parameters of a statement, in groups. Those of the first fifty-four are the same in all.
#[derive(Default)]
pub(super) struct Columns<'a> {
    stages: StageColumns<'a>,
    events: EventColumns,
    runs: RunColumns,
    checkpoints: CheckpointColumns<'a>,
    ledger: LedgerColumns<'a>,
    tries: TryColumns,
    attempts: AttemptColumns<'a>,
    borne: BorneColumns,
    output_of: Vec<Option<String>>,
    output_runs: Vec<Uuid>,
    outputs: Vec<&'a str>,
    consumed_runs: Vec<Uuid>,
    consumed: Vec<i64>,
}

impl<'a> Columns<'a> {
    /// With `plain`, each attempt goes with its checkpoint, and stages that need no row are left out. With `compact`, the
    /// form of [`compact`](crate::compact) is written.
    pub(super) fn of(commits: &[&'a Commit], plain: bool, compact: bool) -> StoreResult<Self> {
        let mut columns = Self::default();
        for commit in commits {
            columns.push(commit, plain, compact)?;
        }
        Ok(columns)
    }

    fn push(&mut self, commit: &'a Commit, plain: bool, compact: bool) -> StoreResult<()> {
        let run = commit.lease.run.0;
        let first = FirstAttempts::of_step(commit);
        self.runs.push(commit, &first)?;
        if plain && compact {
            self.push_borne(commit)?;
            self.borne.push_began(commit);
        } else {
            self.events.push_all(run, &commit.events, compact)?;
            self.borne.push_none(commit.checkpoints.len());
            self.borne.began.resize(self.borne.seqs.len(), None);
        }
        for (at, stage) in commit.stages.iter().enumerate() {
            let fresh = first.contains(stage);
            // One statement can write a row once: of a row that is given twice the last one counts.
            let last = !commit.stages[at + 1..].iter().any(|later| later.id == stage.id);
            let told = plain && (fresh || (compact && compact::tells_all(commit, stage)));
            if last && !told {
                self.stages.push(run, stage, fresh)?;
            }
        }
        for (at, (stage, attempt)) in commit.attempts.iter().enumerate() {
            let same = |(id, later): &(StageId, Attempt)| id == stage && later.number == attempt.number;
            if plain {
                self.tries.push(attempt)?;
            } else if !commit.attempts[at + 1..].iter().any(same) {
                self.attempts.push(run, stage, attempt)?;
            }
            for call in &attempt.calls {
                self.ledger.push(run, stage, attempt, call);
            }
        }
        for (stage, checkpoint) in &commit.checkpoints {
            self.checkpoints.push(run, stage, checkpoint);
        }
        let by_name = compact && commit.output.is_some() && !commit.output_of.is_empty();
        let names = || commit.output_of.iter().map(StageId::as_str).collect::<Vec<_>>().join(",");
        self.output_of.push(by_name.then(names));
        if let Some(output) = commit.output.as_ref().filter(|_| !by_name) {
            self.output_runs.push(run);
            self.outputs.push(output.as_str());
        }
        self.consumed_runs.extend(commit.consumed.iter().map(|_| run));
        self.consumed.extend(&commit.consumed);
        Ok(())
    }

    /// The events of a plain step go with its checkpoints, as far as they can.
    fn push_borne(&mut self, commit: &Commit) -> StoreResult<()> {
        let run = commit.lease.run.0;
        let from = self.borne.seqs.len();
        self.borne.push_none(commit.checkpoints.len());
        for span in compact::spans(&commit.events) {
            let free = |index: usize| self.borne.seqs[from + index].is_none();
            if let Some(index) = compact::bearer(commit, span, free) {
                self.borne.seqs[from + index] = span.last().map(|event| rows::integer(event.seq));
                self.borne.events[from + index] = Some(compact::borne(commit, index, span)?);
            } else {
                self.events.push(run, span)?;
            }
        }
        Ok(())
    }

    /// Whether a run's output is among them.
    pub(super) fn has_outputs(&self) -> bool {
        !self.outputs.is_empty()
    }

    pub(super) fn bind_plain(self, query: Statement<'a>) -> Statement<'a> {
        let outputs = self.has_outputs().then_some((self.output_runs, self.outputs));
        let query = self.runs.bind(self.events.bind(self.stages.bind(query)));
        let query = self.borne.bind(self.tries.bind(self.ledger.bind(self.checkpoints.bind(query))));
        let query = query.bind(self.output_of);
        match outputs {
            Some((runs, outputs)) => query.bind(runs).bind(outputs),
            None => query,
        }
    }

    pub(super) fn bind(self, query: Statement<'a>) -> Statement<'a> {
        let query = self.runs.bind(self.events.bind(self.stages.bind(query)));
        let query = self.attempts.bind(self.ledger.bind(self.checkpoints.bind(query)));
        query
            .bind(self.output_runs)
            .bind(self.outputs)
            .bind(self.consumed_runs)
            .bind(self.consumed)
            .bind(self.output_of)
    }
}

/// Parameters $20 to $34.
#[derive(Default)]
struct RunColumns {
    ids: Vec<Uuid>,
    epochs: Vec<i64>,
    first_seqs: Vec<i64>,
    last_seqs: Vec<i64>,
    states: Vec<&'static str>,
    stages_done: Vec<i32>,
    failures: Vec<Option<String>>,
    started: Vec<Option<Time>>,
    finished: Vec<Option<Time>>,
    keeps: Vec<bool>,
    ends: Vec<bool>,
    delays_ms: Vec<Option<i64>>,
    totals: Vec<i64>,
    first_attempts: Vec<Option<String>>,
    given: Vec<String>,
}

impl RunColumns {
    fn push(&mut self, commit: &Commit, first: &FirstAttempts) -> StoreResult<()> {
        let gap = || StoreError::Defect("runs.commit: a step's events are empty or have a gap".into());
        let first_seq = commit.events.first().ok_or_else(gap)?.seq;
        if (first_seq..).zip(&commit.events).any(|(seq, event)| seq != event.seq) {
            return Err(gap());
        }
        self.ids.push(commit.lease.run.0);
        self.epochs.push(commit.lease.epoch.0);
        self.first_seqs.push(rows::integer(first_seq));
        self.last_seqs.push(rows::integer(first_seq.saturating_add(commit.events.len() as u64 - 1)));
        self.states.push(commit.state.as_str());
        self.stages_done.push(rows::small(commit.stages_done));
        self.failures.push(rows::maybe_json("a failure", commit.failure.as_ref())?);
        self.started.push(commit.started_at);
        self.finished.push(commit.finished_at);
        self.keeps.push(commit.then == Disposition::Keep);
        self.ends.push(commit.then == Disposition::End);
        self.delays_ms.push(match commit.then {
            Disposition::Park(delay) => delay.map(rows::millis),
            Disposition::Keep | Disposition::End => None,
        });
        self.totals.extend(rows::totals_numbers(&commit.totals));
        self.first_attempts.push(first.to_json()?);
        // The text of an array, in which ids need no quotes.
        let given: Vec<&str> = commit.stages.iter().map(|stage| stage.id.as_str()).collect();
        self.given.push(format!("{{{}}}", given.join(",")));
        Ok(())
    }

    fn bind(self, query: Statement<'_>) -> Statement<'_> {
        query
            .bind(self.ids)
            .bind(self.epochs)
            .bind(self.first_seqs)
            .bind(self.last_seqs)
            .bind(self.states)
            .bind(self.stages_done)
            .bind(self.failures)
            .bind(self.started)
            .bind(self.finished)
            .bind(self.keeps)
            .bind(self.ends)
            .bind(self.delays_ms)
            .bind(self.totals)
            .bind(self.first_attempts)
            .bind(self.given)
    }
}

/// Parameters $55 to $62 of the full statement.
#[derive(Default)]
struct AttemptColumns<'a> {
    runs: Vec<Uuid>,
    stages: Vec<&'a str>,
    numbers: Vec<i32>,
    started: Vec<Time>,
    finished: Vec<Time>,
    verdicts: Vec<&'static str>,
    bodies: Vec<String>,
    outputs: Vec<Option<&'a str>>,
}

impl<'a> AttemptColumns<'a> {
    fn push(&mut self, run: Uuid, stage: &'a StageId, attempt: &'a Attempt) -> StoreResult<()> {
        self.runs.push(run);
        self.stages.push(stage.as_str());
        self.numbers.push(rows::small(attempt.number));
        self.started.push(attempt.started_at);
        self.finished.push(attempt.finished_at);
        self.verdicts.push(attempt.verdict.as_str());
        self.bodies.push(rows::lean(rows::to_json("an attempt", &AttemptBody::of(attempt))?));
        self.outputs.push(attempt.output.as_ref().map(Json::as_str));
        Ok(())
    }

    fn bind(self, query: Statement<'_>) -> Statement<'_> {
        query
            .bind(self.runs)
            .bind(self.stages)
            .bind(self.numbers)
            .bind(self.started)
            .bind(self.finished)
            .bind(self.verdicts)
            .bind(self.bodies)
            .bind(self.outputs)
    }
}

/// Parameters $55 to $58 of the plain statements: the attempts that the checkpoints come from.
#[derive(Default)]
struct TryColumns {
    started: Vec<Time>,
    finished: Vec<Time>,
    verdicts: Vec<&'static str>,
    bodies: Vec<String>,
}

impl TryColumns {
    fn push(&mut self, attempt: &Attempt) -> StoreResult<()> {
        self.started.push(attempt.started_at);
        self.finished.push(attempt.finished_at);
        self.verdicts.push(attempt.verdict.as_str());
        self.bodies.push(rows::lean(rows::to_json("an attempt", &AttemptBody::of(attempt))?));
        Ok(())
    }

    fn bind(self, query: Statement<'_>) -> Statement<'_> {
        query.bind(self.started).bind(self.finished).bind(self.verdicts).bind(self.bodies)
    }
}

/// Parameters $59 to $61 of the plain statements: the events that the checkpoints bear, and when their stages began.
#[derive(Default)]
struct BorneColumns {
    seqs: Vec<Option<i64>>,
    events: Vec<Option<String>>,
    began: Vec<Option<Time>>,
}

impl BorneColumns {
    fn push_began(&mut self, commit: &Commit) {
        let began = |(of, _): &(StageId, _)| commit.stages.iter().find(|stage| stage.id == *of)?.started_at;
        self.began.extend(commit.checkpoints.iter().map(began));
    }

    fn push_none(&mut self, checkpoints: usize) {
        self.seqs.resize(self.seqs.len() + checkpoints, None);
        self.events.resize(self.events.len() + checkpoints, None);
    }

    fn bind(self, query: Statement<'_>) -> Statement<'_> {
        query.bind(self.seqs).bind(self.events).bind(self.began)
    }
}

/// Parameters $35 to $44.
#[derive(Default)]
struct CheckpointColumns<'a> {
    runs: Vec<Uuid>,
    stages: Vec<&'a str>,
    outputs: Vec<&'a str>,
    digests: Vec<&'a str>,
    attempts: Vec<i32>,
    verdicts: Vec<&'static str>,
    scores: Vec<Option<f64>>,
    models: Vec<Option<String>>,
    origins: Vec<&'static str>,
    created: Vec<Time>,
}

impl<'a> CheckpointColumns<'a> {
    fn push(&mut self, run: Uuid, stage: &'a StageId, checkpoint: &'a Checkpoint) {
        self.runs.push(run);
        self.stages.push(stage.as_str());
        self.outputs.push(checkpoint.output.as_str());
        self.digests.push(&checkpoint.digest);
        self.attempts.push(rows::small(checkpoint.attempt));
        self.verdicts.push(checkpoint.verdict.as_str());
        self.scores.push(checkpoint.score);
        self.models.push(checkpoint.model.as_ref().map(ToString::to_string));
        self.origins.push(checkpoint.origin.as_str());
        self.created.push(checkpoint.created_at);
    }

    fn bind(self, query: Statement<'_>) -> Statement<'_> {
        query
            .bind(self.runs)
            .bind(self.stages)
            .bind(self.outputs)
            .bind(self.digests)
            .bind(self.attempts)
            .bind(self.verdicts)
            .bind(self.scores)
            .bind(self.models)
            .bind(self.origins)
            .bind(self.created)
    }
}

/// Parameters $45 to $54, the numbers first.
#[derive(Default)]
struct LedgerColumns<'a> {
    numbers: Vec<i64>,
    runs: Vec<Uuid>,
    stages: Vec<&'a str>,
    attempts: Vec<i32>,
    times: Vec<Time>,
    purposes: Vec<&'static str>,
    providers: Vec<&'a str>,
    models: Vec<&'a str>,
    origins: Vec<&'static str>,
    errors: Vec<Option<&'static str>>,
}

impl<'a> LedgerColumns<'a> {
    fn push(&mut self, run: Uuid, stage: &'a StageId, attempt: &Attempt, call: &'a LedgerEntry) {
        let usage = &call.usage;
        let numbers: [i64; LEDGER_NUMBERS] = [
            rows::integer(usage.input_tokens),
            rows::integer(usage.cache_read_tokens),
            rows::integer(usage.cache_write_tokens),
            rows::integer(usage.output_tokens),
            rows::integer(usage.reasoning_tokens),
            i64::from(usage.estimated),
            call.cost_usd.nanos(),
            call.saved_usd.nanos(),
            i64::from(call.priced),
            rows::integer(call.latency_ms),
            i64::from(call.unknown),
        ];
        self.numbers.extend(numbers);
        self.runs.push(run);
        self.stages.push(stage.as_str());
        self.attempts.push(rows::small(attempt.number));
        self.times.push(attempt.finished_at);
        self.purposes.push(call.purpose.as_str());
        self.providers.push(call.model.provider());
        self.models.push(call.model.model());
        self.origins.push(call.origin.as_str());
        self.errors.push(call.error.map(stagegate_core::Code::as_str));
    }

    fn bind(self, query: Statement<'_>) -> Statement<'_> {
        query
            .bind(self.numbers)
            .bind(self.runs)
            .bind(self.stages)
            .bind(self.attempts)
            .bind(self.times)
            .bind(self.purposes)
            .bind(self.providers)
            .bind(self.models)
            .bind(self.origins)
            .bind(self.errors)
    }
}
