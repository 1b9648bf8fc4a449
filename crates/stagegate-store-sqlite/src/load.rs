//! Loading: everything that an owner needs to go on with its runs, in one moment's view.

use std::collections::HashMap;

use sqlx::{SqliteConnection, sqlite::SqliteRow};
use stagegate_core::{
    Attempt, Json, LedgerEntry, RunId, StageId, StoreResult,
    store::{Lease, Snapshot, Weighed},
};

use crate::{
    db::Db,
    error::Sql,
    records::{self, attempt_columns, checkpoint_columns, ledger_columns, run_columns, stage_columns},
    rows::{Cells, id_list, json, lease_list},
};

// load-runs
pub(crate) const RUNS: &str = concat!(
    "SELECT ",
    run_columns!(),
    ", epoch, owner IS NOT NULL AS owned FROM runs WHERE id IN (SELECT unhex(value) FROM json_each(?1))"
);

// load-inputs
pub(crate) const INPUTS: &str = "SELECT run_id, body FROM run_payloads \
    WHERE kind = 'input' AND run_id IN (SELECT unhex(value) FROM json_each(?1))";

// load-stages
pub(crate) const STAGES: &str =
    concat!("SELECT ", stage_columns!(), " FROM stages WHERE run_id IN (SELECT unhex(value) FROM json_each(?1))");

// load-checkpoints
pub(crate) const CHECKPOINTS: &str = concat!(
    "SELECT ",
    checkpoint_columns!(),
    " FROM checkpoints WHERE run_id IN (SELECT unhex(value) FROM json_each(?1))"
);

// load-last-attempts: the last with an output, of the stages without a checkpoint.
pub(crate) const LAST_ATTEMPTS: &str = concat!(
    "SELECT ",
    attempt_columns!(),
    " FROM attempts a WHERE run_id IN (SELECT unhex(value) FROM json_each(?1)) AND a.output IS NOT NULL \
     AND number = (SELECT max(number) FROM attempts b WHERE b.run_id = a.run_id AND b.stage = a.stage \
     AND b.output IS NOT NULL) \
     AND NOT EXISTS (SELECT 1 FROM checkpoints c WHERE c.run_id = a.run_id AND c.stage = a.stage)"
);

// load-calls: of those attempts.
pub(crate) const CALLS: &str = concat!(
    "SELECT ",
    ledger_columns!(),
    " FROM ledger WHERE (run_id, stage, attempt) IN \
     (SELECT unhex(value ->> 0), value ->> 1, value ->> 2 FROM json_each(?1)) ORDER BY call"
);

// weigh-runs: octet_length reads no payload.
pub(crate) const WEIGH: &str = "SELECT r.id AS run_id, r.tenant AS tenant, \
    CASE WHEN r.last_seq <= r.crashed_seq + 1 THEN r.crashes ELSE 0 END AS crashes, \
    (SELECT coalesce(sum(octet_length(body)), 0) FROM run_payloads p WHERE p.run_id = r.id AND p.kind = 'input') \
    + (SELECT coalesce(sum(octet_length(output)), 0) FROM checkpoints c WHERE c.run_id = r.id) \
    + (SELECT coalesce(sum(octet_length(output)), 0) FROM attempts a WHERE a.run_id = r.id \
       AND number = (SELECT max(number) FROM attempts b WHERE b.run_id = a.run_id AND b.stage = a.stage \
       AND b.output IS NOT NULL) \
       AND NOT EXISTS (SELECT 1 FROM checkpoints c WHERE c.run_id = a.run_id AND c.stage = a.stage)) \
    + (SELECT coalesce(sum(octet_length(kind)), 0) FROM signals g WHERE g.run_id = r.id \
       AND octet_length(kind) > 65536) AS bytes \
    FROM runs r WHERE (r.id, r.epoch) IN (SELECT unhex(value ->> 0), value ->> 1 FROM json_each(?1)) \
    AND r.owner IS NOT NULL";

pub(crate) async fn weigh(db: &Db, leases: &[Lease]) -> StoreResult<Vec<Weighed>> {
    if leases.is_empty() {
        return Ok(Vec::new());
    }
    let rows = all(db.read().await?.conn(), WEIGH, lease_list(leases)?).await?;
    let mut found = HashMap::new();
    for row in rows {
        let run = records::run_id(&row, "runs", "run_id")?;
        let cells = Cells::new(&row, "runs", || run.to_string());
        let weighed = (cells.parsed("tenant")?, cells.number("bytes")?, cells.number("crashes")?);
        found.insert(run, weighed);
    }
    let weighed = leases.iter().filter_map(|lease| {
        let (tenant, bytes, crashes) = found.remove(&lease.run)?;
        Some(Weighed { lease: *lease, tenant, bytes, crashes })
    });
    Ok(weighed.collect())
}

pub(crate) async fn load(db: &Db, leases: &[Lease]) -> StoreResult<Vec<Snapshot>> {
    if leases.is_empty() {
        return Ok(Vec::new());
    }
    let mut moment = db.snapshot().await?;
    let conn = moment.conn();
    let mut runs = HashMap::new();
    for row in all(conn, RUNS, id_list(leases.iter().map(|lease| lease.run.0))).await? {
        let run = records::run(&row)?;
        let cells = Cells::new(&row, "runs", || run.id.to_string());
        if cells.get::<bool>("owned")? {
            runs.insert(run.id, (cells.get::<i64>("epoch")?, run));
        }
    }
    let mut found: Vec<Snapshot> = Vec::with_capacity(leases.len());
    let mut index = HashMap::new();
    for lease in leases {
        if runs.get(&lease.run).is_some_and(|(epoch, _)| *epoch == lease.epoch.0)
            && let Some((_, run)) = runs.remove(&lease.run)
        {
            index.insert(lease.run, found.len());
            found.push(Snapshot {
                lease: *lease,
                run,
                input: Json::null(),
                stages: Vec::new(),
                checkpoints: Vec::new(),
                last_attempts: Vec::new(),
            });
        }
    }
    fill(conn, &mut found, &index).await?;
    Ok(found)
}

async fn fill(conn: &mut SqliteConnection, found: &mut [Snapshot], index: &HashMap<RunId, usize>) -> StoreResult<()> {
    if found.is_empty() {
        return Ok(());
    }
    // A row of a run that was not asked for cannot come; it would be passed over.
    let ids = id_list(found.iter().map(|snapshot| snapshot.lease.run.0));
    for row in all(conn, INPUTS, ids.clone()).await? {
        let run = records::run_id(&row, "run_payloads", "run_id")?;
        if let Some(at) = index.get(&run) {
            found[*at].input = Cells::new(&row, "run_payloads", || run.to_string()).payload("body")?;
        }
    }
    for row in all(conn, STAGES, ids.clone()).await? {
        let (run, stage) = records::stage(&row)?;
        if let Some(at) = index.get(&run) {
            found[*at].stages.push(stage);
        }
    }
    for row in all(conn, CHECKPOINTS, ids.clone()).await? {
        let (run, stage, checkpoint) = records::checkpoint(&row)?;
        if let Some(at) = index.get(&run) {
            found[*at].checkpoints.push((stage, checkpoint));
        }
    }
    for (run, stage, attempt) in last_attempts(conn, ids).await? {
        if let Some(at) = index.get(&run) {
            found[*at].last_attempts.push((stage, attempt));
        }
    }
    Ok(())
}

async fn last_attempts(conn: &mut SqliteConnection, ids: String) -> StoreResult<Vec<(RunId, StageId, Attempt)>> {
    let rows = all(conn, LAST_ATTEMPTS, ids).await?;
    let mut attempts: Vec<_> = rows.iter().map(records::attempt).collect::<StoreResult<_>>()?;
    if attempts.is_empty() {
        return Ok(attempts);
    }
    let keys: Vec<(String, &str, u32)> = attempts
        .iter()
        .map(|(run, stage, attempt)| (run.0.simple().to_string(), stage.as_str(), attempt.number))
        .collect();
    let mut calls: HashMap<(RunId, StageId), Vec<LedgerEntry>> = HashMap::new();
    for row in all(conn, CALLS, json(&keys)?).await? {
        let (run, stage, _, call) = records::call(&row)?;
        calls.entry((run, stage)).or_default().push(call);
    }
    for (run, stage, attempt) in &mut attempts {
        attempt.calls = calls.remove(&(*run, stage.clone())).unwrap_or_default();
    }
    Ok(attempts)
}

async fn all(conn: &mut SqliteConnection, sql: &'static str, list: String) -> StoreResult<Vec<SqliteRow>> {
    sqlx::query(sql).bind(list).fetch_all(conn).await.sql()
}
