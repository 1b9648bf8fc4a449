//! Retention: walking through what is kept, removing payloads, removing whole runs. Touches nothing but runs that have
//! ended, and never the ledger.

use chrono::{DateTime, TimeDelta, Utc};
use sqlx::SqliteConnection;
use stagegate_core::{RunId, StoreResult, store::Kept};
use uuid::Uuid;

use crate::{
    db::{Db, Lane},
    error::Sql,
    records::run_id,
    rows::{Cells, id_list, ms},
};

/// How much later than its `created_at` a run's id may be: one that was tried again keeps the time of its first try.
const ID_LAG: TimeDelta = TimeDelta::days(1);

// kept: an id is time-ordered, so that the walk need not read all that are too young.
pub(crate) const KEPT: &str = "SELECT id, tenant, pipeline, version, state, finished_at, purged_at IS NOT NULL AS purged \
    FROM runs WHERE id > ?1 AND id < ?2 AND created_at < ?3 ORDER BY id LIMIT ?4";

// ended-runs: which of these have ended; since the transaction has the write lock, nobody can open them again.
pub(crate) const ENDED: &str = "SELECT id FROM runs WHERE id IN (SELECT unhex(value) FROM json_each(?1)) \
    AND state IN ('succeeded', 'failed', 'cancelled', 'expired')";

// unpurged-runs
pub(crate) const UNPURGED: &str = "SELECT id FROM runs WHERE id IN (SELECT unhex(value) FROM json_each(?1)) \
    AND state IN ('succeeded', 'failed', 'cancelled', 'expired') AND purged_at IS NULL";

// purge-payloads
pub(crate) const PURGE_PAYLOADS: &str =
    "DELETE FROM run_payloads WHERE run_id IN (SELECT unhex(value) FROM json_each(?1))";

// purge-checkpoints: the row tells what was decided, the output is gone.
pub(crate) const PURGE_CHECKPOINTS: &str =
    "UPDATE checkpoints SET output = 'null' WHERE run_id IN (SELECT unhex(value) FROM json_each(?1))";

// purge-attempts: with what may quote payloads.
pub(crate) const PURGE_ATTEMPTS: &str = "UPDATE attempts SET output = NULL, failure = json_remove(failure, '$.detail'), assessments = ( \
        SELECT json_group_array(json_remove(value, '$.detail')) FROM json_each(attempts.assessments) \
    ) WHERE run_id IN (SELECT unhex(value) FROM json_each(?1))";

// purge-runs
pub(crate) const PURGE_RUNS: &str =
    "UPDATE runs SET purged_at = ?2 WHERE id IN (SELECT unhex(value) FROM json_each(?1))";

// delete-run: whatever refers to a run, payloads first, the run last. The ledger does not.
pub(crate) const DELETE: [&str; 8] = [
    PURGE_PAYLOADS,
    "DELETE FROM checkpoints WHERE run_id IN (SELECT unhex(value) FROM json_each(?1))",
    "DELETE FROM attempts WHERE run_id IN (SELECT unhex(value) FROM json_each(?1))",
    "DELETE FROM stages WHERE run_id IN (SELECT unhex(value) FROM json_each(?1))",
    "DELETE FROM events WHERE run_id IN (SELECT unhex(value) FROM json_each(?1))",
    "DELETE FROM signals WHERE run_id IN (SELECT unhex(value) FROM json_each(?1))",
    "DELETE FROM idempotency_keys WHERE run_id IN (SELECT unhex(value) FROM json_each(?1))",
    "DELETE FROM runs WHERE id IN (SELECT unhex(value) FROM json_each(?1))",
];

pub(crate) async fn kept(
    db: &Db,
    after: Option<RunId>,
    created_before: DateTime<Utc>,
    limit: u32,
) -> StoreResult<Vec<Kept>> {
    let last = created_before.checked_add_signed(ID_LAG).unwrap_or(DateTime::<Utc>::MAX_UTC);
    let rows = sqlx::query(KEPT)
        .bind(after.map_or_else(Uuid::nil, |run| run.0))
        .bind(RunId::new(last, [0xff; 10]).0)
        .bind(ms(created_before))
        .bind(limit)
        .fetch_all(db.read().await?.conn())
        .await
        .sql()?;
    let kept = |row| {
        let run = run_id(row, "runs", "id")?;
        let cells = Cells::new(row, "runs", || run.to_string());
        Ok(Kept {
            run,
            tenant: cells.parsed("tenant")?,
            pipeline: cells.parsed("pipeline")?,
            version: cells.number("version")?,
            state: cells.word("state")?,
            finished_at: cells.opt_time("finished_at")?,
            purged: cells.get("purged")?,
        })
    };
    let readable = |row| {
        let run = run_id(row, "runs", "id")?;
        Ok(kept(row).unwrap_or_else(|error: stagegate_core::StoreError| {
            db.metrics.unreadable(&error);
            Kept::unreadable(run)
        }))
    };
    rows.iter().map(readable).collect()
}

pub(crate) async fn purge(db: &Db, runs: &[RunId], now: DateTime<Utc>) -> StoreResult<u64> {
    if runs.is_empty() {
        return Ok(0);
    }
    let mut tx = db.write(Lane::Runs).await?;
    let which = these(tx.conn(), UNPURGED, runs).await?;
    // Of all that have ended: the release before leaves what quotes payloads.
    let ended = id_list(these(tx.conn(), ENDED, runs).await?);
    sqlx::query(PURGE_ATTEMPTS).bind(ended).execute(tx.conn()).await.sql()?;
    if !which.is_empty() {
        let ids = id_list(which.iter().copied());
        for sql in [PURGE_PAYLOADS, PURGE_CHECKPOINTS] {
            sqlx::query(sql).bind(ids.as_str()).execute(tx.conn()).await.sql()?;
        }
        sqlx::query(PURGE_RUNS).bind(ids.as_str()).bind(ms(now)).execute(tx.conn()).await.sql()?;
    }
    tx.commit().await?;
    Ok(which.len() as u64)
}

pub(crate) async fn delete(db: &Db, runs: &[RunId]) -> StoreResult<Vec<RunId>> {
    if runs.is_empty() {
        return Ok(Vec::new());
    }
    let mut tx = db.write(Lane::Runs).await?;
    let which = these(tx.conn(), ENDED, runs).await?;
    if !which.is_empty() {
        let ids = id_list(which.iter().copied());
        for sql in DELETE {
            sqlx::query(sql).bind(ids.as_str()).execute(tx.conn()).await.sql()?;
        }
    }
    tx.commit().await?;
    Ok(which.into_iter().map(RunId).collect())
}

async fn these(conn: &mut SqliteConnection, sql: &'static str, runs: &[RunId]) -> StoreResult<Vec<Uuid>> {
    sqlx::query_scalar(sql).bind(id_list(runs.iter().map(|run| run.0))).fetch_all(conn).await.sql()
}
