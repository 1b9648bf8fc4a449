//! The statements that commit steps. Their pieces are shared, and so is the order of their parameters.

use crate::shared::{insert_events, insert_stages, stages_given};

/// The steps, and the fence: it updates a run only if the step's epoch is the run's, somebody owns it, and the step's
/// events follow the last one. Takes how many signals a step answers, the parameter that names the stages of outputs, and
/// what else the fence asks.
macro_rules! fenced {
    ($answered:literal, $output_of:literal, $fence:literal) => {
        concat!(
            "WITH step AS MATERIALIZED (
    SELECT t.*, ",
            $answered,
            " AS answered
    FROM unnest(
        $20::uuid[], $21::int8[], $22::int8[], $23::int8[], $24::text[], $25::int4[], $26::text[], $27::timestamptz[],
        $28::timestamptz[], $29::bool[], $30::bool[], $31::int8[], $33::text[], $34::text[],
        ",
            $output_of,
            "::text[]
    ) WITH ORDINALITY AS t(run_id, epoch, first_seq, last_seq, state, stages_done, failure, started_at, finished_at,
                           keeps, ends, delay_ms, first_attempts, given, output_of, i)
), target AS (
    UPDATE runs r SET
        state = s.state, last_seq = s.last_seq, stages_done = s.stages_done, failure = s.failure,
        started_at = s.started_at, finished_at = s.finished_at,
        input_tokens = ($32::int8[])[s.i * 13 - 12], cache_read_tokens = ($32::int8[])[s.i * 13 - 11],
        cache_write_tokens = ($32::int8[])[s.i * 13 - 10], output_tokens = ($32::int8[])[s.i * 13 - 9],
        reasoning_tokens = ($32::int8[])[s.i * 13 - 8], usage_estimated = ($32::int8[])[s.i * 13 - 7] <> 0,
        cost_nanos = ($32::int8[])[s.i * 13 - 6], saved_nanos = ($32::int8[])[s.i * 13 - 5],
        calls = ($32::int8[])[s.i * 13 - 4]::int4, hits = ($32::int8[])[s.i * 13 - 3]::int4,
        unpriced_calls = ($32::int8[])[s.i * 13 - 2]::int4,
        unknown_calls = ($32::int8[])[s.i * 13 - 1]::int4, unknown_nanos = ($32::int8[])[s.i * 13],
        owner = CASE WHEN s.keeps THEN r.owner END,
        available_at = CASE
            WHEN s.keeps OR s.ends THEN NULL
            WHEN r.pending > s.answered THEN now()
            ELSE now() + s.delay_ms * interval '1 millisecond'
        END,
        pending = CASE WHEN s.ends THEN 0 ELSE greatest(0, r.pending - s.answered) END,
        signalled = r.signalled AND NOT s.ends,
        output_of = s.output_of,
        first_attempts = nullif(coalesce(r.first_attempts - s.given::text[], '{}')
                                || coalesce(s.first_attempts, '{}')::jsonb, '{}')
    FROM step s
    WHERE r.id = s.run_id AND r.epoch = s.epoch AND r.owner IS NOT NULL AND r.last_seq + 1 = s.first_seq",
            $fence,
            "
    RETURNING r.id, r.tenant, r.pipeline, r.version, r.last_seq, s.ends, true AS started
), event AS (
    ",
            insert_events!(""),
            "
), entry AS (
    INSERT INTO ledger (run_id, tenant, pipeline, version, stage_id, attempt, at, purpose, provider, model, origin, error,
                        input_tokens, cache_read_tokens, cache_write_tokens, output_tokens, reasoning_tokens,
                        usage_estimated, cost_nanos, saved_nanos, priced, latency_ms, unknown)
    SELECT run.id, run.tenant, run.pipeline, run.version, t.stage_id, t.attempt, t.at, t.purpose, t.provider, t.model,
           t.origin, t.error,
           ($45::int8[])[t.i * 11 - 10], ($45::int8[])[t.i * 11 - 9], ($45::int8[])[t.i * 11 - 8],
           ($45::int8[])[t.i * 11 - 7], ($45::int8[])[t.i * 11 - 6], ($45::int8[])[t.i * 11 - 5] <> 0,
           ($45::int8[])[t.i * 11 - 4], ($45::int8[])[t.i * 11 - 3], ($45::int8[])[t.i * 11 - 2] <> 0,
           ($45::int8[])[t.i * 11 - 1], ($45::int8[])[t.i * 11] <> 0
    FROM unnest($46::uuid[], $47::text[], $48::int4[], $49::timestamptz[], $50::text[], $51::text[], $52::text[],
                $53::text[], $54::text[])
        WITH ORDINALITY AS t(run_id, stage_id, attempt, at, purpose, provider, model, origin, error, i)
    JOIN target run ON run.id = t.run_id
), "
        )
    };
}

/// Writes the outputs of runs; the parameters are these two.
macro_rules! outputs {
    ($runs:literal, $outputs:literal) => {
        concat!(
            "output AS (
    UPDATE run_payloads p SET output = t.output
    FROM unnest(",
            $runs,
            "::uuid[], ",
            $outputs,
            "::text[]) AS t(run_id, output) JOIN target run ON run.id = t.run_id
    WHERE p.run_id = run.id
), "
        )
    };
}

/// What plain steps have in common: stages without a row, each with its checkpoint, which tells of the attempt too, and
/// may bear events.
macro_rules! plain {
    ($outputs:expr) => {
        concat!(
            "/* runs.commit */ ",
            fenced!(
                "0",
                "$62",
                " AND NOT (s.ends AND r.pending > 0) AND (
          SELECT true FROM stages g WHERE g.run_id = s.run_id AND g.stage_id = ANY (s.given::text[]) LIMIT 1
      ) IS NULL"
            ),
            $outputs,
            "stage AS (
    ",
            insert_stages!(),
            " (",
            stages_given!("false"),
            ") given WHERE NOT fresh AND NOT there
), checkpoint AS (
    INSERT INTO checkpoints (run_id, tenant, stage_id, output, digest, attempt, verdict, score, model, origin, created_at,
                             attempt_started_at, attempt_finished_at, attempt_verdict, attempt_body, seq, events,
                             stage_started_at)
    SELECT run.id, run.tenant, t.stage_id, t.output, t.digest, t.attempt, t.verdict, t.score, t.model, t.origin,
           t.created_at, t.attempt_started_at, nullif(t.attempt_finished_at, t.created_at),
           nullif(t.attempt_verdict, t.verdict), t.attempt_body, t.seq,
           t.events, nullif(t.stage_started_at, t.attempt_started_at)
    FROM unnest($35::uuid[], $36::text[], $37::text[], $38::text[], $39::int4[], $40::text[], $41::float8[], $42::text[],
                $43::text[], $44::timestamptz[], $55::timestamptz[], $56::timestamptz[], $57::text[], $58::text[],
                $59::int8[], $60::text[], $61::timestamptz[])
        AS t(run_id, stage_id, output, digest, attempt, verdict, score, model, origin, created_at,
             attempt_started_at, attempt_finished_at, attempt_verdict, attempt_body, seq, events,
             stage_started_at)
    JOIN target run ON run.id = t.run_id
)
SELECT id FROM target"
        )
    };
}

/// Writes plain steps: what most steps are. Each part of a statement costs some ten microseconds before it has done
/// anything, so these have only the parts that they need. A run that is not plain after all is refused, as a stale one.
pub const COMMIT_PLAIN: &str = plain!("");

/// The same, where runs end with an output.
pub const COMMIT_PLAIN_END: &str = plain!(outputs!("$63", "$64"));

/// Writes any steps.
///
/// - Two writers of one run wait for each other at its row, and the second one looks at what the first one left.
///   Everything else joins `target`, so that a stale step writes nothing at all.
/// - A run is parked by the number of signals on its row, not by the rows of `signals`: a signal that was left while we
///   waited for the row is in its number, and not in what this statement can see.
/// - A stage that has its checkpoint keeps it.
/// - Whether a row is there is looked up before it is inserted or updated: nobody else writes rows of a run whose fence
///   has let us in, and `ON CONFLICT` would write two records more for each.
pub const COMMIT: &str = concat!(
    "/* runs.commit */ ",
    fenced!(
        "(
        SELECT count(*)::int4 FROM unnest($65::uuid[], $66::int8[]) AS c(run_id, id)
        JOIN signals g ON g.run_id = c.run_id AND g.id = c.id
        WHERE c.run_id = t.run_id
    )",
        "$67",
        ""
    ),
    outputs!("$63", "$64"),
    "given AS MATERIALIZED (
    ",
    stages_given!(
        "(SELECT true FROM stages s WHERE s.run_id = t.run_id AND s.stage_id = t.stage_id) IS TRUE"
    ),
    "
), stage AS (
    ",
    insert_stages!(),
    " given WHERE NOT fresh AND NOT there
), changed AS (
    UPDATE stages s SET
        state = g.state, attempt = g.attempt, round_start = g.round_start, not_before = g.not_before,
        verdict = g.verdict, score = g.score, model = g.model, origin = g.origin, failure = g.failure,
        started_at = g.started_at, finished_at = g.finished_at, input_tokens = g.input_tokens,
        cache_read_tokens = g.cache_read_tokens, cache_write_tokens = g.cache_write_tokens,
        output_tokens = g.output_tokens, reasoning_tokens = g.reasoning_tokens, usage_estimated = g.usage_estimated,
        cost_nanos = g.cost_nanos, saved_nanos = g.saved_nanos, calls = g.calls, hits = g.hits,
        unpriced_calls = g.unpriced_calls, unknown_calls = g.unknown_calls, unknown_nanos = g.unknown_nanos,
        former_owners = g.former_owners, judged = g.judged, outages = g.outages, outage_since = g.outage_since
    FROM given g WHERE g.there AND s.run_id = g.run_id AND s.stage_id = g.stage_id
), tried AS MATERIALIZED (
    SELECT run.id AS run_id, run.tenant, t.stage_id, t.number, t.started_at, t.finished_at, t.verdict, t.body, t.output,
           (SELECT true FROM attempts a
            WHERE a.run_id = t.run_id AND a.stage_id = t.stage_id AND a.number = t.number) IS TRUE AS there
    FROM unnest($55::uuid[], $56::text[], $57::int4[], $58::timestamptz[], $59::timestamptz[], $60::text[], $61::text[],
                $62::text[]) AS t(run_id, stage_id, number, started_at, finished_at, verdict, body, output)
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
    FROM unnest($35::uuid[], $36::text[], $37::text[], $38::text[], $39::int4[], $40::text[], $41::float8[], $42::text[],
                $43::text[], $44::timestamptz[])
        AS t(run_id, stage_id, output, digest, attempt, verdict, score, model, origin, created_at)
    JOIN target run ON run.id = t.run_id
    WHERE (SELECT true FROM checkpoints c WHERE c.run_id = t.run_id AND c.stage_id = t.stage_id) IS NULL
), answered AS (
    DELETE FROM signals g USING target run
    WHERE g.run_id = run.id AND (run.ends OR g.id = ANY($66::int8[]))
)
SELECT id FROM target"
);

/// The numbers of one ledger row in `$45`.
pub(super) const LEDGER_NUMBERS: usize = 11;

/// Where runs stand, read after the fence refused them. It waits for a writer that holds the row: an earlier try of
/// the same step may still be under way.
pub(super) const STANDING: &str = "/* runs.standing */
SELECT id, epoch, last_seq FROM runs WHERE id = ANY($1) ORDER BY id FOR SHARE";
