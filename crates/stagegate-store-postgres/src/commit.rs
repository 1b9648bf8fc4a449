//! Committing steps: the statement that recovery relies on. Many runs, one statement, each run fenced by its own row.

use std::collections::{HashMap, HashSet};

use sqlx::Row as _;
use stagegate_core::{
    Attempt, Checkpoint, LedgerEntry, StageId, StoreError, StoreResult,
    store::{Commit, Committed, Disposition},
};
use uuid::Uuid;

use crate::{
    error,
    first::FirstAttempts,
    pool::{Connection, Pool, Statement},
    rows::{self, AttemptBody, Time},
    shared::{EventColumns, StageColumns, insert_events, insert_stages, stages_given},
};

/// Writes steps.
///
/// - `target` is the fence: it updates a run only if the step's epoch is the run's, somebody owns it, and the step's
///   events follow the last one. Two writers of one run wait for each other at its row, and the second one looks at
///   what the first one left. Everything else joins `target`, so that a stale step writes nothing at all.
/// - A run is parked by the number of signals on its row, not by the rows of `signals`: a signal that was left while we
///   waited for the row is in its number, and not in what this statement can see.
/// - A stage that has its checkpoint keeps it.
/// - Whether a row is there is looked up before it is inserted or updated: nobody else writes rows of a run whose fence
///   has let us in, and `ON CONFLICT` would write two records more for each.
pub const COMMIT: &str = concat!(
    "/* runs.commit */
WITH step AS (
    SELECT t.*, (
        SELECT count(*)::int4 FROM unnest($54::uuid[], $55::int8[]) AS c(run_id, id)
        JOIN signals g ON g.run_id = c.run_id AND g.id = c.id
        WHERE c.run_id = t.run_id
    ) AS answered
    FROM unnest(
        $20::uuid[], $21::int8[], $22::int8[], $23::int8[], $24::text[], $25::int4[], $26::text[], $27::timestamptz[],
        $28::timestamptz[], $29::bool[], $30::bool[], $31::int8[], $65::text[], $66::text[]
    ) WITH ORDINALITY AS t(run_id, epoch, first_seq, last_seq, state, stages_done, failure, started_at, finished_at,
                           keeps, ends, delay_ms, first_attempts, settled, i)
), target AS (
    UPDATE runs r SET
        state = s.state, last_seq = s.last_seq, stages_done = s.stages_done, failure = s.failure,
        started_at = s.started_at, finished_at = s.finished_at,
        input_tokens = ($32::int8[])[s.i * 11 - 10], cache_read_tokens = ($32::int8[])[s.i * 11 - 9],
        cache_write_tokens = ($32::int8[])[s.i * 11 - 8], output_tokens = ($32::int8[])[s.i * 11 - 7],
        reasoning_tokens = ($32::int8[])[s.i * 11 - 6], usage_estimated = ($32::int8[])[s.i * 11 - 5] <> 0,
        cost_nanos = ($32::int8[])[s.i * 11 - 4], saved_nanos = ($32::int8[])[s.i * 11 - 3],
        calls = ($32::int8[])[s.i * 11 - 2]::int4, hits = ($32::int8[])[s.i * 11 - 1]::int4,
        unpriced_calls = ($32::int8[])[s.i * 11]::int4,
        owner = CASE WHEN s.keeps THEN r.owner END,
        available_at = CASE
            WHEN s.keeps OR s.ends THEN NULL
            WHEN r.pending > s.answered THEN now()
            ELSE now() + s.delay_ms * interval '1 millisecond'
        END,
        pending = CASE WHEN s.ends THEN 0 ELSE greatest(0, r.pending - s.answered) END,
        signalled = r.signalled AND NOT s.ends,
        first_attempts = nullif(coalesce(r.first_attempts - s.settled::text[], r.first_attempts, '{}')
                                || coalesce(s.first_attempts, '{}')::jsonb, '{}')
    FROM step s
    WHERE r.id = s.run_id AND r.epoch = s.epoch AND r.owner IS NOT NULL AND r.last_seq + 1 = s.first_seq
    RETURNING r.id, r.tenant, r.pipeline, r.version, r.last_seq, s.ends, true AS started
), output AS (
    UPDATE run_payloads p SET output = t.output
    FROM unnest($33::uuid[], $34::text[]) AS t(run_id, output) JOIN target run ON run.id = t.run_id
    WHERE p.run_id = run.id
), given AS MATERIALIZED (
    ",
    stages_given!(),
    "
), stage AS (
    ",
    insert_stages!(),
    "
), changed AS (
    UPDATE stages s SET
        state = g.state, attempt = g.attempt, round_start = g.round_start, not_before = g.not_before,
        verdict = g.verdict, score = g.score, model = g.model, origin = g.origin, failure = g.failure,
        started_at = g.started_at, finished_at = g.finished_at, input_tokens = g.input_tokens,
        cache_read_tokens = g.cache_read_tokens, cache_write_tokens = g.cache_write_tokens,
        output_tokens = g.output_tokens, reasoning_tokens = g.reasoning_tokens, usage_estimated = g.usage_estimated,
        cost_nanos = g.cost_nanos, saved_nanos = g.saved_nanos, calls = g.calls, hits = g.hits,
        unpriced_calls = g.unpriced_calls
    FROM given g WHERE g.there AND s.run_id = g.run_id AND s.stage_id = g.stage_id
), event AS (
    ",
    insert_events!(),
    "
), tried AS MATERIALIZED (
    SELECT run.id AS run_id, run.tenant, t.stage_id, t.number, t.started_at, t.finished_at, t.verdict, t.body, t.output,
           (SELECT true FROM attempts a
            WHERE a.run_id = t.run_id AND a.stage_id = t.stage_id AND a.number = t.number) IS TRUE AS there
    FROM unnest($35::uuid[], $36::text[], $37::int4[], $38::timestamptz[], $39::timestamptz[], $40::text[], $41::text[],
                $42::text[]) AS t(run_id, stage_id, number, started_at, finished_at, verdict, body, output)
    JOIN target run ON run.id = t.run_id
), attempt AS (
    INSERT INTO attempts (run_id, tenant, stage_id, number, started_at, finished_at, verdict, body, output)
    SELECT run_id, tenant, stage_id, number, started_at, finished_at, verdict, body, output FROM tried WHERE NOT there
), repeated AS (
    UPDATE attempts a SET
        started_at = t.started_at, finished_at = t.finished_at, verdict = t.verdict, body = t.body, output = t.output
    FROM tried t
    WHERE t.there AND a.run_id = t.run_id AND a.stage_id = t.stage_id AND a.number = t.number
), checkpoint AS (
    INSERT INTO checkpoints (run_id, tenant, stage_id, output, digest, attempt, verdict, score, model, origin, created_at)
    SELECT run.id, run.tenant, t.stage_id, t.output, t.digest, t.attempt, t.verdict, t.score, t.model, t.origin,
           t.created_at
    FROM unnest($43::uuid[], $44::text[], $45::text[], $46::text[], $47::int4[], $48::text[], $49::float8[], $50::text[],
                $51::text[], $52::timestamptz[])
        AS t(run_id, stage_id, output, digest, attempt, verdict, score, model, origin, created_at)
    JOIN target run ON run.id = t.run_id
    WHERE (SELECT true FROM checkpoints c WHERE c.run_id = t.run_id AND c.stage_id = t.stage_id) IS NULL
), entry AS (
    INSERT INTO ledger (run_id, tenant, pipeline, version, stage_id, attempt, at, purpose, provider, model, origin, error,
                        input_tokens, cache_read_tokens, cache_write_tokens, output_tokens, reasoning_tokens,
                        usage_estimated, cost_nanos, saved_nanos, priced, latency_ms)
    SELECT run.id, run.tenant, run.pipeline, run.version, t.stage_id, t.attempt, t.at, t.purpose, t.provider, t.model,
           t.origin, t.error,
           ($53::int8[])[t.i * 10 - 9], ($53::int8[])[t.i * 10 - 8], ($53::int8[])[t.i * 10 - 7],
           ($53::int8[])[t.i * 10 - 6], ($53::int8[])[t.i * 10 - 5], ($53::int8[])[t.i * 10 - 4] <> 0,
           ($53::int8[])[t.i * 10 - 3], ($53::int8[])[t.i * 10 - 2], ($53::int8[])[t.i * 10 - 1] <> 0,
           ($53::int8[])[t.i * 10]
    FROM unnest($56::uuid[], $57::text[], $58::int4[], $59::timestamptz[], $60::text[], $61::text[], $62::text[],
                $63::text[], $64::text[])
        WITH ORDINALITY AS t(run_id, stage_id, attempt, at, purpose, provider, model, origin, error, i)
    JOIN target run ON run.id = t.run_id
), answered AS (
    DELETE FROM signals g USING target run
    WHERE g.run_id = run.id AND (run.ends OR g.id = ANY($55::int8[]))
)
SELECT id FROM target"
);

/// The numbers of one ledger row in `$53`.
const LEDGER_NUMBERS: usize = 10;

/// Where runs stand, read after the fence refused them. It waits for a writer that holds the row: an earlier try of
/// the same step may still be under way.
const STANDING: &str = "/* runs.standing */
SELECT id, epoch, last_seq FROM runs WHERE id = ANY($1) ORDER BY id FOR SHARE";

pub(crate) async fn commit(pool: &Pool, commits: &[Commit]) -> StoreResult<Vec<Committed>> {
    if commits.is_empty() {
        return Ok(Vec::new());
    }
    let mut columns = Columns::default();
    let mut runs = HashSet::with_capacity(commits.len());
    for commit in commits {
        if !runs.insert(commit.lease.run) {
            return Err(StoreError::Defect("runs.commit: two steps of one run in one call".into()));
        }
        columns.push(commit)?;
    }
    let mut connection = pool.acquire("runs.commit").await?;
    let found = connection.rows("runs.commit", columns.query()).await?;
    let written = found.iter().map(|row| row.try_get("id")).collect::<Result<HashSet<Uuid>, _>>();
    let written = written.map_err(|failure| error::statement("runs.commit", &failure))?;
    let refused: Vec<&Commit> = commits.iter().filter(|commit| !written.contains(&commit.lease.run.0)).collect();
    let already = if refused.is_empty() { HashSet::new() } else { repeated(&mut connection, &refused).await? };
    let answer = |commit: &Commit| match commit.lease.run.0 {
        run if written.contains(&run) => Committed::Now,
        run if already.contains(&run) => Committed::Already,
        _ => Committed::Stale,
    };
    Ok(commits.iter().map(answer).collect())
}

/// Which of these steps had happened: the epoch is theirs, and the run's last event is their last one. Only the owner
/// of that epoch, who is their author, can have written it.
async fn repeated(connection: &mut Connection, refused: &[&Commit]) -> StoreResult<HashSet<Uuid>> {
    let ids: Vec<Uuid> = refused.iter().map(|commit| commit.lease.run.0).collect();
    let found = connection.rows("runs.standing", sqlx::query(STANDING).bind(ids)).await?;
    let standing = found.iter().map(|row| Ok((row.try_get("id")?, (row.try_get("epoch")?, row.try_get("last_seq")?))));
    let standing = standing.collect::<Result<HashMap<Uuid, (i64, i64)>, sqlx::Error>>();
    let standing = standing.map_err(|failure| error::statement("runs.standing", &failure))?;
    let repeats = |commit: &&&Commit| {
        let last_seq = commit.events.last().map(|event| rows::integer(event.seq));
        standing
            .get(&commit.lease.run.0)
            .is_some_and(|(epoch, last)| *epoch == commit.lease.epoch.0 && Some(*last) == last_seq)
    };
    Ok(refused.iter().filter(repeats).map(|commit| commit.lease.run.0).collect())
}

/// The parameters of [`COMMIT`], in groups.
#[derive(Default)]
struct Columns<'a> {
    stages: StageColumns<'a>,
    events: EventColumns,
    runs: RunColumns,
    output_runs: Vec<Uuid>,
    outputs: Vec<String>,
    attempts: AttemptColumns<'a>,
    checkpoints: CheckpointColumns<'a>,
    ledger: LedgerColumns<'a>,
    consumed_runs: Vec<Uuid>,
    consumed: Vec<i64>,
    /// Parameters $65 and $66.
    first_attempts: Vec<Option<String>>,
    settled: Vec<Option<String>>,
}

impl<'a> Columns<'a> {
    fn push(&mut self, commit: &'a Commit) -> StoreResult<()> {
        let run = commit.lease.run.0;
        self.runs.push(commit)?;
        for event in &commit.events {
            self.events.push(run, event)?;
        }
        let fresh = FirstAttempts::of_step(commit);
        let mut settled = Vec::new();
        for (at, stage) in commit.stages.iter().enumerate() {
            // One statement can write a row once: of a row that is given twice the last one counts.
            if !commit.stages[at + 1..].iter().any(|later| later.id == stage.id) {
                let fresh = fresh.contains(stage);
                self.stages.push(run, stage, fresh)?;
                if !fresh {
                    settled.push(stage.id.as_str());
                }
            }
        }
        self.first_attempts.push(fresh.to_json()?);
        // Ids need no quotes inside an array's text.
        self.settled.push((!settled.is_empty()).then(|| format!("{{{}}}", settled.join(","))));
        for (at, (stage, attempt)) in commit.attempts.iter().enumerate() {
            let same = |(id, later): &(StageId, Attempt)| id == stage && later.number == attempt.number;
            if !commit.attempts[at + 1..].iter().any(same) {
                self.attempts.push(run, stage, attempt)?;
            }
            for call in &attempt.calls {
                self.ledger.push(run, stage, attempt, call);
            }
        }
        for (stage, checkpoint) in &commit.checkpoints {
            self.checkpoints.push(run, stage, checkpoint)?;
        }
        if let Some(output) = &commit.output {
            self.output_runs.push(run);
            self.outputs.push(rows::to_json("an output", output)?);
        }
        self.consumed_runs.extend(commit.consumed.iter().map(|_| run));
        self.consumed.extend(&commit.consumed);
        Ok(())
    }

    fn query(self) -> Statement<'a> {
        let query = self.events.bind(self.stages.bind(sqlx::query(COMMIT)));
        let query = self.runs.bind(query).bind(self.output_runs).bind(self.outputs);
        let query = self.checkpoints.bind(self.attempts.bind(query));
        let (numbers, ledger) = self.ledger.split();
        let query = ledger.bind(query.bind(numbers).bind(self.consumed_runs).bind(self.consumed));
        query.bind(self.first_attempts).bind(self.settled)
    }
}

/// Parameters $20 to $32.
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
}

impl RunColumns {
    fn push(&mut self, commit: &Commit) -> StoreResult<()> {
        let gap = || StoreError::Defect("runs.commit: a step's events are empty or have a gap".into());
        let first = commit.events.first().ok_or_else(gap)?.seq;
        if (first..).zip(&commit.events).any(|(seq, event)| seq != event.seq) {
            return Err(gap());
        }
        self.ids.push(commit.lease.run.0);
        self.epochs.push(commit.lease.epoch.0);
        self.first_seqs.push(rows::integer(first));
        self.last_seqs.push(rows::integer(first.saturating_add(commit.events.len() as u64 - 1)));
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
    }
}

/// Parameters $35 to $42.
#[derive(Default)]
struct AttemptColumns<'a> {
    runs: Vec<Uuid>,
    stages: Vec<&'a str>,
    numbers: Vec<i32>,
    started: Vec<Time>,
    finished: Vec<Time>,
    verdicts: Vec<&'static str>,
    bodies: Vec<String>,
    outputs: Vec<Option<String>>,
}

impl<'a> AttemptColumns<'a> {
    fn push(&mut self, run: Uuid, stage: &'a StageId, attempt: &Attempt) -> StoreResult<()> {
        self.runs.push(run);
        self.stages.push(stage.as_str());
        self.numbers.push(rows::small(attempt.number));
        self.started.push(attempt.started_at);
        self.finished.push(attempt.finished_at);
        self.verdicts.push(attempt.verdict.as_str());
        self.bodies.push(rows::to_json("an attempt", &AttemptBody::of(attempt))?);
        self.outputs.push(rows::maybe_json("an output", attempt.output.as_ref())?);
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

/// Parameters $43 to $52.
#[derive(Default)]
struct CheckpointColumns<'a> {
    runs: Vec<Uuid>,
    stages: Vec<&'a str>,
    outputs: Vec<String>,
    digests: Vec<&'a str>,
    attempts: Vec<i32>,
    verdicts: Vec<&'static str>,
    scores: Vec<Option<f64>>,
    models: Vec<Option<String>>,
    origins: Vec<&'static str>,
    created: Vec<Time>,
}

impl<'a> CheckpointColumns<'a> {
    fn push(&mut self, run: Uuid, stage: &'a StageId, checkpoint: &'a Checkpoint) -> StoreResult<()> {
        self.runs.push(run);
        self.stages.push(stage.as_str());
        self.outputs.push(rows::to_json("an output", &checkpoint.output)?);
        self.digests.push(&checkpoint.digest);
        self.attempts.push(rows::small(checkpoint.attempt));
        self.verdicts.push(checkpoint.verdict.as_str());
        self.scores.push(checkpoint.score);
        self.models.push(checkpoint.model.as_ref().map(ToString::to_string));
        self.origins.push(checkpoint.origin.as_str());
        self.created.push(checkpoint.created_at);
        Ok(())
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

/// Parameters $53 (the numbers) and $56 to $64.
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

    fn split(mut self) -> (Vec<i64>, Self) {
        (std::mem::take(&mut self.numbers), self)
    }

    fn bind(self, query: Statement<'_>) -> Statement<'_> {
        query
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
