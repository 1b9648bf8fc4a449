//! Accepting runs: one statement for many, each on its own.

use std::collections::HashSet;

use chrono::{DateTime, Utc};
use sqlx::Row as _;
use stagegate_core::{
    Epoch, Event, EventKind, RunId, StoreError, StoreResult, TenantId,
    pipeline::{CacheMode, Labels},
    store::{IDEMPOTENCY_TTL, Idempotency, NewRun, Submitted},
};
use uuid::Uuid;

use crate::{
    error,
    first::FirstAttempts,
    pool::{Connection, Pool, Statement},
    rows::{self, Time},
    shared::{EventColumns, StageColumns, insert_events, insert_stages, stages_given},
};

/// Inserts runs with their payloads, first events and first stages.
///
/// - `claimed`: keys that are new, or whose time is over. They are taken in order, so that two batches never wait for
///   each other in a circle; a key that another transaction is just taking is waited for.
/// - `made`: runs without an idempotency key, or whose key was claimed; not those that are there. A replica that is not alive gets
///   no lease: the run is queued, with only those of its events that tell of its acceptance.
/// - `event`: a run that asks for a lease comes with the events of both outcomes; each row names the `last_seq` of its own.
pub const SUBMIT: &str = concat!(
    "/* runs.submit */
WITH new AS (
    SELECT * FROM unnest(
        $20::uuid[], $21::text[], $22::text[], $23::int4[], $24::int4[], $25::text[], $26::int2[], $27::text[],
        $28::text[], $29::timestamptz[], $30::timestamptz[], $31::uuid[], $32::int8[], $33::int8[], $34::text[],
        $35::bytea[], $36::bytea[], $38::timestamptz[], $39::int4[], $40::text[], $41::int4[], $42::text[], $43::text[]
    ) AS t(id, tenant, pipeline, version, stages_total, cache_mode, priority, labels, request_id,
           created_at, deadline_at, lease_to, last_seq, queued_seq, input, idempotency, digest, start_at,
           pipeline_max, key, key_max, lane, first_attempts)
), claimed AS (
    INSERT INTO idempotency_keys AS k (tenant, key, digest, run_id, created_at)
    SELECT tenant, idempotency, digest, id, created_at FROM new WHERE idempotency IS NOT NULL
    ORDER BY tenant, idempotency
    ON CONFLICT (tenant, key) DO UPDATE
        SET digest = excluded.digest, run_id = excluded.run_id, created_at = excluded.created_at
        WHERE k.created_at <= excluded.created_at - make_interval(secs => $37)
    RETURNING k.run_id
), made AS (
    INSERT INTO runs (id, tenant, pipeline, version, stages_total, cache_mode, priority, labels, request_id, created_at,
                      deadline_at, start_at, pipeline_max, key, key_max, lane, state, owner, epoch, available_at,
                      ready, leased_at, started_at, first_attempts, last_seq)
    SELECT n.id, n.tenant, n.pipeline, n.version, n.stages_total, n.cache_mode, n.priority, n.labels::text[],
           n.request_id, n.created_at, n.deadline_at, n.start_at, n.pipeline_max, n.key, n.key_max, n.lane,
           CASE WHEN p.id IS NULL THEN 'queued' ELSE 'running' END,
           p.id,
           CASE WHEN p.id IS NULL THEN 0 ELSE 1 END,
           CASE WHEN p.id IS NULL THEN greatest(now(), n.start_at) END,
           CASE WHEN p.id IS NULL AND (n.start_at IS NULL OR n.start_at <= now()) THEN true END,
           CASE WHEN p.id IS NOT NULL THEN now() END,
           CASE WHEN p.id IS NOT NULL THEN n.created_at END,
           CASE WHEN p.id IS NOT NULL OR n.lease_to IS NULL THEN n.first_attempts::jsonb END,
           CASE WHEN p.id IS NULL THEN n.queued_seq ELSE n.last_seq END
    FROM new n
    LEFT JOIN replicas p ON p.id = n.lease_to AND p.dead_at IS NULL AND p.expires_at > now()
    WHERE n.idempotency IS NULL OR n.id IN (SELECT run_id FROM claimed)
    ON CONFLICT (id) DO NOTHING
    RETURNING id, tenant, owner, last_seq
), target AS (
    SELECT m.id, m.tenant, m.last_seq, n.input, m.owner IS NOT NULL OR n.lease_to IS NULL AS started
    FROM made m JOIN new n ON n.id = m.id
), payload AS (
    INSERT INTO run_payloads (run_id, tenant, input) SELECT id, tenant, input FROM target
), stage AS (
    ",
    insert_stages!(),
    " (",
    stages_given!("false"),
    ") given WHERE NOT fresh AND NOT there
), event AS (
    ",
    insert_events!(" AND run.last_seq = ($44::int8[])[t.i]"),
    "
)
SELECT id, owner IS NOT NULL AS leased FROM made"
);

/// How often what can be inserted after all is tried again, beyond one round for each run of a batch.
const ROUNDS_MORE: usize = 3;

/// What became of runs that were not inserted: they are there, or their key names another run.
const SUBMITTED: &str = "/* runs.submitted */
SELECT r.id IS NOT NULL AS there, coalesce(r.owner = n.lease_to, false) AS leased, r.epoch, k.run_id AS existing,
       coalesce(k.digest = n.digest, false) AS same
FROM unnest($1::uuid[], $2::text[], $3::uuid[], $4::bytea[], $5::bytea[])
    WITH ORDINALITY AS n(id, tenant, lease_to, key, digest, ordinal)
LEFT JOIN runs r ON r.id = n.id AND r.tenant = n.tenant
LEFT JOIN idempotency_keys k ON k.tenant = n.tenant AND k.key = n.key
ORDER BY n.ordinal";

/// What a key stands for, unless its time is over.
const REPLAY: &str = "/* runs.replay */
SELECT run_id, digest = $3 AS same FROM idempotency_keys
WHERE tenant = $1 AND key = $2 AND created_at > $4 - make_interval(secs => $5)";

pub(crate) async fn replay(
    pool: &Pool,
    tenant: &TenantId,
    asked: &Idempotency,
    now: DateTime<Utc>,
) -> StoreResult<Option<Submitted>> {
    let query = sqlx::query(REPLAY)
        .bind(tenant.as_str())
        .bind(asked.key.as_bytes())
        .bind(&asked.digest[..])
        .bind(now)
        .bind(IDEMPOTENCY_TTL.as_secs_f64());
    let Some(row) = pool.acquire_as_guest("runs.replay").await?.row("runs.replay", query).await? else {
        return Ok(None);
    };
    let decoded = || Ok((RunId(row.try_get("run_id")?), row.try_get("same")?));
    let (run, same) = decoded().map_err(|failure: sqlx::Error| error::statement("runs.replay", &failure))?;
    Ok(Some(if same { Submitted::Existing(run) } else { Submitted::Conflict(run) }))
}

pub(crate) async fn submit(pool: &Pool, runs: &[NewRun], compact: bool) -> StoreResult<Vec<Submitted>> {
    let mut answers: Vec<Option<Submitted>> = vec![None; runs.len()];
    if runs.is_empty() {
        return Ok(Vec::new());
    }
    let mut connection = pool.acquire("runs.submit").await?;
    // One statement cannot meet one id or key twice. What repeats inside the batch goes in a later round; so does what
    // met a key that was gone when it was looked up.
    let mut waiting: Vec<usize> = (0..runs.len()).collect();
    for _ in 0..runs.len() + ROUNDS_MORE {
        if waiting.is_empty() {
            break;
        }
        let (round, mut later) = split(runs, &waiting);
        let batch: Vec<&NewRun> = round.iter().map(|index| &runs[*index]).collect();
        let made = insert(&mut connection, &batch, compact).await?;
        for index in &round {
            let found = made.iter().find(|(id, _)| *id == runs[*index].id);
            answers[*index] = found.map(|(_, leased)| Submitted::Accepted(leased.then_some(Epoch(1))));
        }
        let open: Vec<usize> = round.into_iter().filter(|index| answers[*index].is_none()).collect();
        if !open.is_empty() {
            let batch: Vec<&NewRun> = open.iter().map(|index| &runs[*index]).collect();
            for (index, answer) in open.into_iter().zip(look_up(&mut connection, &batch).await?) {
                match answer {
                    Some(answer) => answers[index] = Some(answer),
                    None => later.push(index),
                }
            }
        }
        waiting = later;
    }
    let missing = || StoreError::Defect("runs.submit: the run's id is another tenant's".into());
    answers.into_iter().map(|answer| answer.ok_or_else(missing)).collect()
}

/// The first of each id and key, and the rest.
fn split(runs: &[NewRun], waiting: &[usize]) -> (Vec<usize>, Vec<usize>) {
    let (mut ids, mut keys) = (HashSet::new(), HashSet::new());
    waiting.iter().partition(|index| {
        let run = &runs[**index];
        let key = run.idempotency.as_ref().map(|idempotency| (&run.tenant, &idempotency.key));
        // Both are entered, so that what follows a repeated run with its key follows it into the later round.
        let new_id = ids.insert(run.id);
        let new_key = key.is_none_or(|key| keys.insert(key));
        new_id && new_key
    })
}

async fn insert(connection: &mut Connection, runs: &[&NewRun], compact: bool) -> StoreResult<Vec<(RunId, bool)>> {
    let mut columns = Columns::default();
    for run in runs {
        columns.push(run, compact)?;
    }
    let made = connection.rows("runs.submit", columns.query()).await?;
    let decoded = made.iter().map(|row| Ok((RunId(row.try_get("id")?), row.try_get("leased")?)));
    decoded.collect::<Result<_, _>>().map_err(|failure: sqlx::Error| error::statement("runs.submit", &failure))
}

/// None where neither the run nor its key is there: the key's run was deleted meanwhile.
async fn look_up(connection: &mut Connection, runs: &[&NewRun]) -> StoreResult<Vec<Option<Submitted>>> {
    let key = |run: &NewRun| run.idempotency.as_ref().map(|idempotency| idempotency.key.as_bytes().to_vec());
    let digest = |run: &NewRun| run.idempotency.as_ref().map(|idempotency| idempotency.digest.to_vec());
    let query = sqlx::query(SUBMITTED)
        .bind(runs.iter().map(|run| run.id.0).collect::<Vec<_>>())
        .bind(runs.iter().map(|run| run.tenant.as_str()).collect::<Vec<_>>())
        .bind(runs.iter().map(|run| run.lease_to.map(|replica| replica.0)).collect::<Vec<_>>())
        .bind(runs.iter().map(|run| key(run)).collect::<Vec<_>>())
        .bind(runs.iter().map(|run| digest(run)).collect::<Vec<_>>());
    let found = connection.rows("runs.submitted", query).await?;
    let answer = |row: &sqlx::postgres::PgRow| -> Result<Option<Submitted>, sqlx::Error> {
        if row.try_get("there")? {
            let leased: bool = row.try_get("leased")?;
            let epoch = Epoch(row.try_get("epoch")?);
            return Ok(Some(Submitted::Accepted(leased.then_some(epoch))));
        }
        let existing: Option<Uuid> = row.try_get("existing")?;
        let same: bool = row.try_get("same")?;
        Ok(existing.map(RunId).map(|id| if same { Submitted::Existing(id) } else { Submitted::Conflict(id) }))
    };
    found.iter().map(answer).collect::<Result<_, _>>().map_err(|failure| error::statement("runs.submitted", &failure))
}

/// The parameters of [`SUBMIT`], in its order.
#[derive(Default)]
struct Columns<'a> {
    stages: StageColumns<'a>,
    events: EventColumns,
    ids: Vec<Uuid>,
    tenants: Vec<&'a str>,
    pipelines: Vec<&'a str>,
    versions: Vec<i32>,
    stages_totals: Vec<i32>,
    cache_modes: Vec<Option<&'static str>>,
    priorities: Vec<i16>,
    labels: Vec<String>,
    request_ids: Vec<Option<String>>,
    created: Vec<Time>,
    deadlines: Vec<Time>,
    lease_to: Vec<Option<Uuid>>,
    last_seqs: Vec<i64>,
    queued_seqs: Vec<i64>,
    inputs: Vec<&'a str>,
    keys: Vec<Option<&'a [u8]>>,
    digests: Vec<Option<&'a [u8]>>,
    starts: Vec<Option<Time>>,
    pipeline_maxima: Vec<Option<i32>>,
    limit_keys: Vec<Option<String>>,
    key_maxima: Vec<Option<i32>>,
    lanes: Vec<String>,
    first_attempts: Vec<Option<String>>,
    event_of: Vec<i64>,
}

impl<'a> Columns<'a> {
    fn push(&mut self, run: &'a NewRun, compact: bool) -> StoreResult<()> {
        let last_seq = rows::integer(run.events.len() as u64);
        let accepted = |kind: &EventKind| matches!(kind, EventKind::RunAccepted { .. });
        let acceptance = run.events.iter().take_while(|event| accepted(&event.kind)).count();
        self.ids.push(run.id.0);
        self.tenants.push(run.tenant.as_str());
        self.pipelines.push(run.pipeline.as_str());
        self.versions.push(rows::small(run.version));
        self.stages_totals.push(rows::small(run.stages_total));
        self.cache_modes.push(run.cache_mode.map(cache_mode));
        self.priorities.push(run.priority);
        self.labels.push(labels(&run.labels)?);
        self.request_ids.push(run.request_id.as_deref().map(rows::printable));
        self.created.push(run.created_at);
        self.deadlines.push(run.deadline_at);
        self.lease_to.push(run.lease_to.map(|replica| replica.0));
        self.last_seqs.push(last_seq);
        self.queued_seqs.push(if run.lease_to.is_some() { rows::integer(acceptance as u64) } else { last_seq });
        self.inputs.push(run.input.as_str());
        self.keys.push(run.idempotency.as_ref().map(|idempotency| idempotency.key.as_bytes()));
        self.digests.push(run.idempotency.as_ref().map(|idempotency| &idempotency.digest[..]));
        self.starts.push(run.start_at);
        self.pipeline_maxima.push(run.limits.pipeline_max.map(rows::small));
        self.limit_keys.push(run.limits.key.as_ref().map(|(key, _)| rows::without_nul(key)));
        self.key_maxima.push(run.limits.key.as_ref().map(|(_, max)| rows::small(*max)));
        self.lanes.push(rows::without_nul(&run.limits.lane(&run.pipeline)));
        self.first_attempts.push(FirstAttempts::of(&run.stages).to_json()?);
        for stage in &run.stages {
            self.stages.push(run.id.0, stage, FirstAttempts::started_at(stage).is_some())?;
        }
        self.push_events(run, &run.events, compact)?;
        if run.lease_to.is_some() && acceptance < run.events.len() {
            self.push_events(run, &run.events[..acceptance], compact)?;
        }
        Ok(())
    }

    /// The events of one outcome.
    fn push_events(&mut self, run: &NewRun, events: &[Event], compact: bool) -> StoreResult<()> {
        self.events.push_all(run.id.0, events, compact)?;
        self.event_of.resize(self.events.len(), rows::integer(events.len() as u64));
        Ok(())
    }

    fn query(self) -> Statement<'a> {
        let query = self.events.bind(self.stages.bind(sqlx::query(SUBMIT)));
        query
            .bind(self.ids)
            .bind(self.tenants)
            .bind(self.pipelines)
            .bind(self.versions)
            .bind(self.stages_totals)
            .bind(self.cache_modes)
            .bind(self.priorities)
            .bind(self.labels)
            .bind(self.request_ids)
            .bind(self.created)
            .bind(self.deadlines)
            .bind(self.lease_to)
            .bind(self.last_seqs)
            .bind(self.queued_seqs)
            .bind(self.inputs)
            .bind(self.keys)
            .bind(self.digests)
            .bind(IDEMPOTENCY_TTL.as_secs_f64())
            .bind(self.starts)
            .bind(self.pipeline_maxima)
            .bind(self.limit_keys)
            .bind(self.key_maxima)
            .bind(self.lanes)
            .bind(self.first_attempts)
            .bind(self.event_of)
    }
}

/// As stored.
fn cache_mode(mode: CacheMode) -> &'static str {
    match mode {
        CacheMode::Use => "use",
        CacheMode::Refresh => "refresh",
        CacheMode::ReadOnly => "read_only",
        CacheMode::Off => "off",
    }
}

/// Labels as the text of a Postgres array, because an array of arrays cannot be unnested one level only.
fn labels(labels: &Labels) -> StoreResult<String> {
    let mut text = String::from("{");
    for label in labels {
        if text.len() > 1 {
            text.push(',');
        }
        text.push('"');
        for char in rows::to_json("a label", &label)?.chars() {
            if matches!(char, '"' | '\\') {
                text.push('\\');
            }
            text.push(char);
        }
        text.push('"');
    }
    text.push('}');
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_quoted_for_an_array() {
        let given: Labels = [("a\"b".to_owned(), "c\\d,{}\0".to_owned())].into();
        assert_eq!(labels(&given).expect("strings"), r#"{"[\"a\\\"b\",\"c\\\\d,{}\\u0000\"]"}"#);
        assert_eq!(labels(&Labels::new()).expect("nothing"), "{}");
    }

    #[test]
    fn cache_modes_are_stored_as_they_are_shown() {
        for mode in [CacheMode::Use, CacheMode::Refresh, CacheMode::ReadOnly, CacheMode::Off] {
            assert_eq!(serde_json::to_value(mode).expect("a word"), cache_mode(mode));
        }
    }
}
