//! Signals. Whoever leaves one locks the run's row first and changes it in the same transaction: so an owner that
//! parks the run, or reads its signals, comes before (and the row says that the run must be woken) or after (and sees it).

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use sqlx::postgres::PgRow;
use stagegate_core::{
    ReplicaId, RunId, RunState, StageId, StageState, StoreResult,
    store::{Lease, NewSignal, Signal, SignalKind, Signalled},
};

use crate::{
    pool::{Connection, Pool},
    rows::{self, Reader, Time, json_problem},
};

/// Locks a run of a tenant.
const LOCK: &str = "/* signals.lock */
SELECT state, owner, cancel_requested, purged_at IS NOT NULL AS purged FROM runs WHERE id = $1 AND tenant = $2 FOR NO KEY UPDATE";

/// A stage's state, and whether a decision on it is pending. One in its first attempt may have no row, nor may one that
/// has its checkpoint.
const HELD: &str = "/* signals.held */
SELECT coalesce(s.state, c.state, 'running') AS state, EXISTS (
    SELECT FROM signals g WHERE g.run_id = $1 AND g.stage_id = $2
) AS decided
FROM runs r
LEFT JOIN stages s ON s.run_id = r.id AND s.stage_id = $2
LEFT JOIN (SELECT run_id, stage_id, 'succeeded' AS state FROM checkpoints WHERE attempt_body IS NOT NULL) c
    ON c.run_id = r.id AND c.stage_id = $2
WHERE r.id = $1 AND (s.state IS NOT NULL OR c.state IS NOT NULL OR r.first_attempts ? $2)";

/// Leaves a signal on a locked run that is under way, and wakes it where it is parked.
const LEAVE: &str = "/* signals.leave */
WITH left_behind AS (
    INSERT INTO signals (run_id, tenant, body, stage_id) VALUES ($1, $2, $3, $5)
)
UPDATE runs SET
    pending = pending + 1,
    signalled = true,
    cancel_requested = cancel_requested OR $4,
    available_at = CASE WHEN owner IS NULL THEN least(available_at, now()) END
WHERE id = $1";

/// Reopens a locked run that failed. What was asked of it before is void. The epoch grows, so that a repeated commit of
/// its end is stale.
const REOPEN: &str = "/* signals.reopen */
WITH void AS (
    DELETE FROM signals WHERE run_id = $1
), left_behind AS (
    INSERT INTO signals (run_id, tenant, body) VALUES ($1, $2, $3)
)
UPDATE runs SET
    state = 'queued', epoch = epoch + 1, owner = NULL, available_at = now(), pending = 1, signalled = true,
    cancel_requested = false, failure = NULL, finished_at = NULL, deadline_at = $4
WHERE id = $1";

/// Clears the marks of leased runs, and reads their signals after that; the function is migration 0002's.
pub const READ: &str = "/* signals.read */ SELECT run_id, id, body FROM read_signals_2($1, $2)";

/// What a signal's `body` holds.
#[derive(Serialize)]
struct Body<'a> {
    #[serde(flatten)]
    kind: &'a SignalKind,
    #[serde(skip_serializing_if = "Option::is_none")]
    by: Option<&'a str>,
}

/// Who asks.
#[derive(Deserialize)]
struct By {
    #[serde(default)]
    by: Option<String>,
}

pub(crate) async fn signal(pool: &Pool, new: &NewSignal) -> StoreResult<Signalled> {
    let mut connection = pool.acquire_as_guest("signals.leave").await?;
    connection.begin().await?;
    let lock = sqlx::query(LOCK).bind(new.run.0).bind(new.tenant.as_str());
    let answer = match connection.row("signals.lock", lock).await? {
        Some(run) => on_locked(&mut connection, new, &run).await?,
        None => Signalled::NoSuchRun,
    };
    connection.commit().await?;
    Ok(answer)
}

async fn on_locked(connection: &mut Connection, new: &NewSignal, run: &PgRow) -> StoreResult<Signalled> {
    let read = Reader::new(run, "runs", new.run.0);
    let state = rows::run_state(&read, "state")?;
    let owner = read.get::<Option<uuid::Uuid>>("owner")?.map(ReplicaId);
    match &new.kind {
        SignalKind::Retry { deadline_at } => {
            if !state.is_terminal() || state == RunState::Succeeded {
                return Ok(Signalled::WrongRunState(state));
            }
            if read.get("purged")? {
                return Ok(Signalled::Purged);
            }
            reopen(connection, new, *deadline_at).await?;
            return Ok(Signalled::Accepted { owner: None });
        }
        _ if state.is_terminal() => return Ok(Signalled::WrongRunState(state)),
        // Asked again: the first one stands.
        SignalKind::Cancel if read.get("cancel_requested")? => return Ok(Signalled::Accepted { owner }),
        SignalKind::Cancel | SignalKind::Unknown(_) => {}
        SignalKind::Approve { stage, .. } | SignalKind::Reject { stage, .. } => {
            if let Some(refusal) = not_held(connection, new, stage).await? {
                return Ok(refusal);
            }
        }
    }
    let query = sqlx::query(LEAVE)
        .bind(new.run.0)
        .bind(new.tenant.as_str())
        .bind(body(new)?)
        .bind(new.kind == SignalKind::Cancel)
        .bind(new.kind.stage().map(StageId::as_str));
    connection.rows("signals.leave", query).await?;
    Ok(Signalled::Accepted { owner })
}

async fn not_held(connection: &mut Connection, new: &NewSignal, stage: &StageId) -> StoreResult<Option<Signalled>> {
    let query = sqlx::query(HELD).bind(new.run.0).bind(stage.as_str());
    let Some(row) = connection.row("signals.held", query).await? else {
        return Ok(Some(Signalled::StageNotHeld(None)));
    };
    let read = Reader::new(&row, "stages", new.run.0);
    let found = StageState::parse(read.get("state")?).ok_or_else(|| read.corrupt("state", "not a known word"))?;
    let refused = found != StageState::Held || read.get("decided")?;
    Ok(refused.then_some(Signalled::StageNotHeld(Some(found))))
}

async fn reopen(connection: &mut Connection, new: &NewSignal, deadline_at: Time) -> StoreResult<()> {
    let query = sqlx::query(REOPEN).bind(new.run.0).bind(new.tenant.as_str()).bind(body(new)?).bind(deadline_at);
    connection.rows("signals.reopen", query).await.map(|_| ())
}

fn body(new: &NewSignal) -> StoreResult<String> {
    match &new.kind {
        SignalKind::Unknown(raw) => Ok(raw.as_ref().to_owned()),
        kind => rows::to_json("a signal", &Body { kind, by: new.by.as_deref() }),
    }
}

pub(crate) async fn signals(pool: &Pool, leases: &[Lease]) -> StoreResult<Vec<(RunId, Vec<Signal>)>> {
    let distinct: HashSet<Lease> = leases.iter().copied().collect();
    if distinct.is_empty() {
        return Ok(Vec::new());
    }
    let query = sqlx::query(READ)
        .bind(distinct.iter().map(|lease| lease.run.0).collect::<Vec<_>>())
        .bind(distinct.iter().map(|lease| lease.epoch.0).collect::<Vec<_>>());
    let found = pool.acquire("signals.read").await?.rows("signals.read", query).await?;
    // The rows come run by run, each run's oldest first.
    let mut signals: Vec<(RunId, Vec<Signal>)> = Vec::new();
    for row in &found {
        let run = RunId(rows::id(row, "run_id", "signals")?);
        let read = Reader::new(row, "signals", run.0);
        let signal = readable(pool, &read)?;
        match signals.last_mut().filter(|(last, _)| *last == run) {
            Some((_, of_run)) => of_run.push(signal),
            None => signals.push((run, vec![signal])),
        }
    }
    Ok(signals)
}

/// A signal that cannot be read is one that this release does not know: its run neither parks on it, for it would be claimed
/// again at once, nor consumes it. A cancel is obeyed even where it does not tell by whom it is.
fn readable(pool: &Pool, read: &Reader<'_>) -> StoreResult<Signal> {
    let (id, body) = (read.get("id")?, read.get::<&str>("body")?);
    let kind = SignalKind::read(body).map_err(|error| read.corrupt("body", json_problem(&error)));
    let by = read.json::<By>("body");
    let (kind, by) = match (kind, by) {
        (Ok(kind), Ok(By { by })) => (kind, by),
        (Ok(SignalKind::Cancel), Err(error)) => {
            pool.unreadable(&error);
            (SignalKind::Cancel, None)
        }
        (Err(error), _) | (_, Err(error)) => {
            pool.unreadable(&error);
            (SignalKind::Unknown(body.into()), None)
        }
    };
    Ok(Signal { id, kind, by })
}
