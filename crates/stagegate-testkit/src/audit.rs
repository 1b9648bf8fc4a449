//! Reads a Stagegate database on Postgres as an auditor would: from outside, with statements of its own, so that a
//! mistake of the product's reading cannot hide one of its writing. Never writes a row of the product's.

use std::collections::HashMap;

use anyhow::Context as _;
use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection as _, FromRow, PgConnection};
use uuid::Uuid;

/// A run's row, as far as it is audited.
#[derive(Debug, Clone, FromRow)]
pub struct RunRow {
    /// Its id.
    pub id: Uuid,
    /// Its state.
    pub state: String,
    /// Its pipeline.
    pub pipeline: String,
    /// Who has the lease.
    pub owner: Option<Uuid>,
    /// How often it was leased.
    pub epoch: i64,
    /// The seq of its last event.
    pub last_seq: i64,
    /// Stages of its pipeline.
    pub stages_total: i32,
    /// Stages with a checkpoint.
    pub stages_done: i32,
    /// Model calls that were paid.
    pub calls: i32,
    /// Answers that were reused.
    pub hits: i32,
    /// Prompt tokens.
    pub input_tokens: i64,
    /// Answer tokens.
    pub output_tokens: i64,
    /// What was paid, in nano-dollars.
    pub cost_nanos: i64,
    /// What reuse saved, in nano-dollars.
    pub saved_nanos: i64,
}

/// An event's row.
#[derive(Debug, Clone)]
pub struct EventRow {
    /// Its number.
    pub seq: i64,
    /// When it was decided.
    pub at: DateTime<Utc>,
    /// Its type.
    pub kind: String,
    /// Its other fields.
    pub body: Value,
}

/// A checkpoint, as far as it is audited.
#[derive(Debug, Clone, FromRow)]
pub struct CheckpointRow {
    /// Whose.
    pub run_id: Uuid,
    /// Of which stage.
    pub stage_id: String,
    /// The output as JSON text.
    pub output: String,
}

/// Sums over a run's rows of the ledger.
#[derive(Debug, Clone, Default, FromRow)]
pub struct LedgerSum {
    /// Whose.
    pub run_id: Uuid,
    /// Rows that were paid: answered by a provider, whether or not that went well.
    pub calls: i64,
    /// Rows of reused answers.
    pub hits: i64,
    /// Paid rows with an answer.
    pub answered: i64,
    /// Paid rows that are known to have cost something.
    pub charged: i64,
    /// Paid rows of unknown outcome.
    pub unknown: i64,
    /// Prompt tokens of paid rows.
    pub input_tokens: i64,
    /// Answer tokens of paid rows.
    pub output_tokens: i64,
    /// What was paid.
    pub cost_nanos: i64,
    /// What was saved.
    pub saved_nanos: i64,
}

/// Everything at one moment.
#[derive(Debug)]
pub struct Audit {
    /// The runs.
    pub runs: HashMap<Uuid, RunRow>,
    /// Idempotency keys and their runs.
    pub keys: HashMap<String, Uuid>,
    /// Each run's events, by seq.
    pub events: HashMap<Uuid, Vec<EventRow>>,
    /// The checkpoints.
    pub checkpoints: HashMap<Uuid, Vec<CheckpointRow>>,
    /// How many stages are in the state `succeeded`, by run: by their row, or by a checkpoint that stands for it.
    pub stages_succeeded: HashMap<Uuid, i64>,
    /// The ledger's sums.
    pub ledger: HashMap<Uuid, LedgerSum>,
    /// Replicas that count as alive now: id, name.
    pub living: HashMap<Uuid, String>,
}

/// A connection to a database that is audited.
#[derive(Debug)]
pub struct Auditor {
    connection: PgConnection,
}

impl Auditor {
    /// Connects.
    pub async fn connect(url: &str) -> anyhow::Result<Self> {
        Ok(Self { connection: PgConnection::connect(url).await.context("the auditor cannot reach the database")? })
    }

    /// How many runs are in no terminal state, and how many are.
    pub async fn open_runs(&mut self) -> anyhow::Result<(i64, i64)> {
        let sql = "SELECT count(*) FILTER (WHERE state IN ('queued', 'running', 'waiting')),
                          count(*) FILTER (WHERE state NOT IN ('queued', 'running', 'waiting')) FROM runs";
        Ok(sqlx::query_as(sql).fetch_one(&mut self.connection).await?)
    }

    /// The runs in no terminal state: id, state, pipeline, and since when they may be claimed, where they may.
    pub async fn unfinished(&mut self) -> anyhow::Result<Vec<(Uuid, String, String, Option<DateTime<Utc>>)>> {
        let sql = "SELECT id, state, pipeline, available_at FROM runs
                   WHERE state IN ('queued', 'running', 'waiting') ORDER BY id LIMIT 1000";
        Ok(sqlx::query_as(sql).fetch_all(&mut self.connection).await?)
    }

    /// The runs that the replicas of this name own and execute.
    pub async fn owned_by(&mut self, name: &str) -> anyhow::Result<Vec<Uuid>> {
        let sql = "SELECT r.id FROM runs r JOIN replicas p ON p.id = r.owner
                   WHERE p.name = $1 AND p.dead_at IS NULL AND r.state = 'running'";
        let rows: Vec<(Uuid,)> = sqlx::query_as(sql).bind(name).fetch_all(&mut self.connection).await?;
        Ok(rows.into_iter().map(|(id,)| id).collect())
    }

    /// Which replicas, by name, own these runs now; those that nobody owns are left out.
    pub async fn owners_of(&mut self, runs: &[Uuid]) -> anyhow::Result<Vec<(Uuid, String)>> {
        let sql = "SELECT r.id, p.name FROM runs r JOIN replicas p ON p.id = r.owner WHERE r.id = ANY($1)";
        Ok(sqlx::query_as(sql).bind(runs).fetch_all(&mut self.connection).await?)
    }

    /// Ends every other session on this database; how many there were.
    pub async fn terminate_sessions(&mut self) -> anyhow::Result<i64> {
        let sql = "SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM pg_stat_activity
                   WHERE datname = current_database() AND pid <> pg_backend_pid()";
        let (count,) = sqlx::query_as(sql).fetch_one(&mut self.connection).await?;
        Ok(count)
    }

    /// Makes a database, in a folder of its own where one is given.
    pub async fn create_database(&mut self, name: &str, folder: Option<&std::path::Path>) -> anyhow::Result<()> {
        let mut place = String::new();
        if let Some(folder) = folder {
            let sql = format!("CREATE TABLESPACE {name} LOCATION '{}'", folder.display());
            sqlx::query(AssertSqlSafe(sql)).execute(&mut self.connection).await.context("cannot use the folder")?;
            place = format!(" TABLESPACE {name}");
        }
        let sql = format!("CREATE DATABASE {name} TEMPLATE template0{place}");
        sqlx::query(AssertSqlSafe(sql)).execute(&mut self.connection).await.context("cannot create the database")?;
        Ok(())
    }

    /// Reads everything, as of one moment.
    pub async fn read(&mut self) -> anyhow::Result<Audit> {
        let mut tx = self.connection.begin().await?;
        sqlx::query("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ").execute(&mut *tx).await?;
        let runs: Vec<RunRow> = sqlx::query_as(
            "SELECT id, state, pipeline, owner, epoch, last_seq, stages_total, stages_done, calls, hits, input_tokens,
                    output_tokens, cost_nanos, saved_nanos FROM runs",
        )
        .fetch_all(&mut *tx)
        .await?;
        let keys: Vec<(Vec<u8>, Uuid)> =
            sqlx::query_as("SELECT key, run_id FROM idempotency_keys").fetch_all(&mut *tx).await?;
        let events: Vec<(Uuid, i64, DateTime<Utc>, String)> = sqlx::query_as(EVENTS).fetch_all(&mut *tx).await?;
        let checkpoints: Vec<CheckpointRow> =
            sqlx::query_as("SELECT run_id, stage_id, output FROM checkpoints").fetch_all(&mut *tx).await?;
        let stages: Vec<(Uuid, i64)> = sqlx::query_as(STAGES_SUCCEEDED).fetch_all(&mut *tx).await?;
        let ledger: Vec<LedgerSum> = sqlx::query_as(LEDGER).fetch_all(&mut *tx).await?;
        let living: Vec<(Uuid, String)> =
            sqlx::query_as("SELECT id, name FROM replicas WHERE dead_at IS NULL AND expires_at > clock_timestamp()")
                .fetch_all(&mut *tx)
                .await?;
        tx.commit().await?;
        let mut audit = Audit {
            runs: runs.into_iter().map(|run| (run.id, run)).collect(),
            keys: keys.into_iter().map(|(key, run)| (String::from_utf8_lossy(&key).into_owned(), run)).collect(),
            events: HashMap::new(),
            checkpoints: HashMap::new(),
            stages_succeeded: stages.into_iter().collect(),
            ledger: ledger.into_iter().map(|sum| (sum.run_id, sum)).collect(),
            living: living.into_iter().collect(),
        };
        for (run, seq, at, body) in events {
            let body: Value = serde_json::from_str(&body).with_context(|| format!("event {seq} of run {run}"))?;
            let kind = body["type"].as_str().unwrap_or_default().to_owned();
            audit.events.entry(run).or_default().push(EventRow { seq, at, kind, body });
        }
        for checkpoint in checkpoints {
            audit.checkpoints.entry(checkpoint.run_id).or_default().push(checkpoint);
        }
        Ok(audit)
    }
}

/// A row holds one event, or an array of events of which the last one has the row's number. A checkpoint's row may hold
/// such an array too, in which null tells of that checkpoint.
const EVENTS: &str = "
    SELECT run_id, seq - json_array_length(bodies) + n, at,
           (CASE WHEN json_typeof(body) = 'null'
                 THEN json_build_object('type', 'stage.succeeded', 'stage', stage_id, 'attempt', attempt)
                 ELSE body END)::text
    FROM (
        SELECT run_id, seq, at, NULL::text AS stage_id, NULL::integer AS attempt,
               CASE WHEN body LIKE '[%' THEN body::json ELSE json_build_array(body::json) END AS bodies FROM events
        UNION ALL
        SELECT run_id, seq, created_at, stage_id, attempt, events::json FROM checkpoints WHERE events IS NOT NULL
    ) AS told CROSS JOIN LATERAL json_array_elements(bodies) WITH ORDINALITY AS each(body, n)
    ORDER BY 1, 2";

/// A stage that passed at once has no row: the checkpoint tells of its attempt.
const STAGES_SUCCEEDED: &str = "
    SELECT run_id, count(*) FROM (
        SELECT run_id FROM stages WHERE state = 'succeeded'
        UNION ALL
        SELECT c.run_id FROM checkpoints c WHERE c.attempt_body IS NOT NULL
            AND NOT EXISTS (SELECT FROM stages s WHERE s.run_id = c.run_id AND s.stage_id = c.stage_id)
    ) AS succeeded GROUP BY run_id";

/// A reused answer reports the original's tokens; only what was paid is summed.
const LEDGER: &str = "
    SELECT run_id,
           count(*) FILTER (WHERE NOT reused) AS calls,
           count(*) FILTER (WHERE reused) AS hits,
           count(*) FILTER (WHERE NOT reused AND error IS NULL) AS answered,
           count(*) FILTER (WHERE NOT reused AND NOT unknown AND input_tokens > 0) AS charged,
           count(*) FILTER (WHERE unknown) AS unknown,
           coalesce(sum(input_tokens) FILTER (WHERE NOT reused), 0)::bigint AS input_tokens,
           coalesce(sum(output_tokens) FILTER (WHERE NOT reused), 0)::bigint AS output_tokens,
           coalesce(sum(cost_nanos), 0)::bigint AS cost_nanos,
           coalesce(sum(saved_nanos), 0)::bigint AS saved_nanos
    FROM (SELECT *, origin IN ('cache_local', 'cache_shared', 'coalesced') AS reused FROM ledger) AS rows
    GROUP BY run_id";
