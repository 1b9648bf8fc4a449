//! Signals: what others ask of a run's owner. Leaves them, wakes the run, and hands them over; writes no events.

use sqlx::SqliteConnection;
use stagegate_core::{
    ReplicaId, RunId, RunState, StageId, StageState, StoreResult,
    store::{Lease, NewSignal, Signal, SignalKind, Signalled},
};
use uuid::Uuid;

use crate::{
    db::{Db, Lane},
    error::Sql,
    records::run_id,
    rows::{Cells, id_list, lease_list, ms, now_ms, unencodable},
};

// signal-head
pub(crate) const HEAD: &str =
    "SELECT state, owner, cancel_requested, purged_at IS NOT NULL AS purged FROM runs WHERE id = ?1 AND tenant = ?2";

// decision-head: the stage, and whether a decision on it is pending.
pub(crate) const DECISION: &str = "SELECT state, \
    EXISTS (SELECT 1 FROM signals WHERE signals.run_id = ?1 AND signals.stage = ?2) AS pending \
    FROM stages WHERE run_id = ?1 AND stage = ?2";

// insert-signal
const INSERT: &str = concat!(
    "INSERT INTO signals (run_id, tenant, kind, stage, asked_by, created_at) VALUES (?1, ?2, ?3, ?4, ?5, ",
    now_ms!(),
    ")"
);

// wake: an owned run is marked, another one is ready.
pub(crate) const WAKE: &str = concat!(
    "UPDATE runs SET signalled = owner IS NOT NULL, cancel_requested = cancel_requested OR ?2, \
     ready_at = CASE WHEN owner IS NULL THEN coalesce(ready_at, ",
    now_ms!(),
    ") END, wake_at = NULL WHERE id = ?1"
);

// reopen: the epoch moves on, so that whoever owned it before writes nothing more.
pub(crate) const REOPEN: &str = concat!(
    "UPDATE runs SET state = 'queued', cancel_requested = 0, failure = NULL, finished_at = NULL, deadline_at = ?2, \
     epoch = epoch + 1, owner = NULL, leased_at = NULL, signalled = 0, wake_at = NULL, ready_at = ",
    now_ms!(),
    " WHERE id = ?1"
);

// owned-runs: which of these leases still hold.
pub(crate) const OWNED: &str = "SELECT id FROM runs WHERE owner IS NOT NULL \
    AND (id, epoch) IN (SELECT unhex(value ->> 0), value ->> 1 FROM json_each(?1))";

// signals-of
pub(crate) const PENDING: &str = "SELECT run_id, id, kind, asked_by FROM signals \
    WHERE run_id IN (SELECT unhex(value) FROM json_each(?1)) ORDER BY run_id, id";

// clear-marks: the caller has found that it owns them.
pub(crate) const CLEAR: &str =
    "UPDATE runs SET signalled = 0 WHERE id IN (SELECT unhex(value) FROM json_each(?1)) AND signalled = 1";

/// What is left to do for a signal.
enum Next {
    /// Nothing: this is the answer.
    Answer(Signalled),
    /// Leave it and wake the run.
    Leave,
    /// Open the run again, then leave it.
    Reopen,
}

pub(crate) async fn signal(db: &Db, signal: &NewSignal) -> StoreResult<Signalled> {
    let mut tx = db.write(Lane::Runs).await?;
    let head =
        sqlx::query(HEAD).bind(signal.run.0).bind(signal.tenant.as_str()).fetch_optional(tx.conn()).await.sql()?;
    let Some(row) = head else {
        tx.commit().await?;
        return Ok(Signalled::NoSuchRun);
    };
    let cells = Cells::new(&row, "runs", || signal.run.to_string());
    let (state, cancelled) = (cells.word::<RunState>("state")?, cells.get::<bool>("cancel_requested")?);
    let owner = cells.get::<Option<Uuid>>("owner")?.map(ReplicaId);
    let next = match &signal.kind {
        SignalKind::Retry { .. } if !state.is_terminal() || state == RunState::Succeeded => {
            Next::Answer(Signalled::WrongRunState(state))
        }
        SignalKind::Retry { .. } if cells.get("purged")? => Next::Answer(Signalled::Purged),
        SignalKind::Retry { .. } => Next::Reopen,
        _ if state.is_terminal() => Next::Answer(Signalled::WrongRunState(state)),
        SignalKind::Cancel if cancelled => Next::Answer(Signalled::Accepted { owner }),
        SignalKind::Cancel | SignalKind::Unknown(_) => Next::Leave,
        SignalKind::Approve { stage, .. } | SignalKind::Reject { stage, .. } => {
            decide(tx.conn(), signal, stage).await?
        }
    };
    let answer = match next {
        Next::Answer(answer) => answer,
        Next::Leave => {
            leave(tx.conn(), signal).await?;
            Signalled::Accepted { owner }
        }
        Next::Reopen => {
            reopen(tx.conn(), signal).await?;
            Signalled::Accepted { owner: None }
        }
    };
    tx.commit().await?;
    Ok(answer)
}

/// A decision needs a stage that is held and on which none is pending.
async fn decide(conn: &mut SqliteConnection, signal: &NewSignal, stage: &StageId) -> StoreResult<Next> {
    let row = sqlx::query(DECISION).bind(signal.run.0).bind(stage.as_str()).fetch_optional(conn).await.sql()?;
    let Some(row) = row else { return Ok(Next::Answer(Signalled::StageNotHeld(None))) };
    let cells = Cells::new(&row, "stages", || format!("{}/{stage}", signal.run));
    let (standing, pending) = (cells.word::<StageState>("state")?, cells.get::<bool>("pending")?);
    Ok(if standing == StageState::Held && !pending {
        Next::Leave
    } else {
        Next::Answer(Signalled::StageNotHeld(Some(standing)))
    })
}

async fn leave(conn: &mut SqliteConnection, signal: &NewSignal) -> StoreResult<()> {
    insert(conn, signal).await?;
    let cancel = signal.kind == SignalKind::Cancel;
    sqlx::query(WAKE).bind(signal.run.0).bind(cancel).execute(conn).await.sql().map(drop)
}

async fn reopen(conn: &mut SqliteConnection, signal: &NewSignal) -> StoreResult<()> {
    let SignalKind::Retry { deadline_at } = &signal.kind else { return Ok(()) };
    sqlx::query(crate::commit::DROP_SIGNALS).bind(id_list([signal.run.0])).execute(&mut *conn).await.sql()?;
    sqlx::query(REOPEN).bind(signal.run.0).bind(ms(*deadline_at)).execute(&mut *conn).await.sql()?;
    insert(conn, signal).await
}

async fn insert(conn: &mut SqliteConnection, signal: &NewSignal) -> StoreResult<()> {
    sqlx::query(INSERT)
        .bind(signal.run.0)
        .bind(signal.tenant.as_str())
        .bind(signal.kind.body().map_err(|error| unencodable(&error))?)
        .bind(signal.kind.stage().map(StageId::as_str))
        .bind(signal.by.as_deref())
        .execute(conn)
        .await
        .sql()
        .map(drop)
}

pub(crate) async fn signals(db: &Db, leases: &[Lease]) -> StoreResult<Vec<(RunId, Vec<Signal>)>> {
    if leases.is_empty() {
        return Ok(Vec::new());
    }
    let mut tx = db.write(Lane::Runs).await?;
    let owned: Vec<Uuid> = sqlx::query_scalar(OWNED).bind(lease_list(leases)?).fetch_all(tx.conn()).await.sql()?;
    let owned = id_list(owned);
    sqlx::query(CLEAR).bind(owned.as_str()).execute(tx.conn()).await.sql()?;
    let mut found: Vec<(RunId, Vec<Signal>)> = Vec::new();
    for row in sqlx::query(PENDING).bind(owned.as_str()).fetch_all(tx.conn()).await.sql()? {
        let run = run_id(&row, "signals", "run_id")?;
        let cells = Cells::new(&row, "signals", || run.to_string());
        let signal = readable(db, &cells)?;
        match found.last_mut() {
            Some((last, signals)) if *last == run => signals.push(signal),
            _ => found.push((run, vec![signal])),
        }
    }
    tx.commit().await?;
    Ok(found)
}

/// A signal that cannot be read is one that this release does not know: its run neither parks on it, for it would be claimed
/// again at once, nor consumes it. A cancel is obeyed even where it does not tell by whom it is.
fn readable<K: Fn() -> String>(db: &Db, cells: &Cells<'_, K>) -> StoreResult<Signal> {
    let (kind, by) = match (cells.read("kind", SignalKind::read), cells.get("asked_by")) {
        (Ok(kind), Ok(by)) => (kind, by),
        (Ok(SignalKind::Cancel), Err(error)) => {
            db.metrics.unreadable(&error);
            (SignalKind::Cancel, None)
        }
        (Err(error), _) | (_, Err(error)) => {
            db.metrics.unreadable(&error);
            (SignalKind::Unknown(cells.get::<&str>("kind").unwrap_or_default().into()), None)
        }
    };
    Ok(Signal { id: cells.get("id")?, kind, by })
}
