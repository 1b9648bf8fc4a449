//! Committing steps: many runs, one transaction, each fenced on its own.
//!
//! Writes are serialised, so that a check at the start of the transaction holds to its end: a step that is stale is
//! left out before anything is written.

use std::collections::{HashMap, HashSet};

use sqlx::SqliteConnection;
use stagegate_core::{
    Epoch, Event, RunId, StoreError, StoreResult,
    store::{Commit, Committed, Disposition},
};
use uuid::Uuid;

use crate::{
    bulk::{Bulk, Row},
    db::{Db, Lane},
    error::Sql,
    rows::{add_totals, id_list, int, json, ms, opt_json, span_ms},
    write::{self, Of},
};

// commit-heads
pub(crate) const HEADS: &str = "SELECT id, tenant, pipeline, state, epoch, owner IS NOT NULL, last_seq FROM runs \
    WHERE id IN (SELECT unhex(value) FROM json_each(?1))";

/// The start of an update of many runs from rows of values.
macro_rules! update_runs {
    ($columns:literal) => {
        concat!(
            "WITH step (id, stages_done, failure, started_at, finished_at, last_seq, input_tokens, cache_read_tokens, \
             cache_write_tokens, output_tokens, reasoning_tokens, usage_estimated, cost_nanos, saved_nanos, calls, \
             hits, unpriced_calls, unknown_calls, unknown_nanos",
            $columns,
            ") AS (VALUES"
        )
    };
}

/// Its end.
macro_rules! set_runs {
    ($columns:literal) => {
        concat!(
            ") UPDATE runs SET stages_done = step.stages_done, failure = step.failure, started_at = step.started_at, \
             finished_at = step.finished_at, last_seq = step.last_seq, input_tokens = step.input_tokens, \
             cache_read_tokens = step.cache_read_tokens, cache_write_tokens = step.cache_write_tokens, \
             output_tokens = step.output_tokens, reasoning_tokens = step.reasoning_tokens, \
             usage_estimated = step.usage_estimated, cost_nanos = step.cost_nanos, saved_nanos = step.saved_nanos, \
             calls = step.calls, hits = step.hits, unpriced_calls = step.unpriced_calls, \
             unknown_calls = step.unknown_calls, unknown_nanos = step.unknown_nanos",
            $columns,
            " FROM step WHERE runs.id = step.id"
        )
    };
}

// advance-runs: the lease and the state stay, and with them every index on runs is left alone.
pub(crate) static ADVANCE: Bulk = Bulk::new(update_runs!(""), 19, set_runs!(""));

// move-runs: the owner goes on, the state is another.
pub(crate) static MOVE: Bulk = Bulk::new(update_runs!(", state"), 20, set_runs!(", state = step.state"));

// end-leases: the run is parked (a delay of 0 is no delay, none waits for a signal) or has ended.
pub(crate) static END: Bulk = Bulk::new(
    update_runs!(", state, delay_ms"),
    21,
    set_runs!(
        ", state = step.state, owner = NULL, leased_at = NULL, signalled = 0, \
         ready_at = CASE WHEN delay_ms = 0 THEN CAST(round(unixepoch('subsec') * 1000) AS INTEGER) END, \
         wake_at = CASE WHEN delay_ms > 0 THEN CAST(round(unixepoch('subsec') * 1000) AS INTEGER) + delay_ms END"
    ),
);

// consume-signals
pub(crate) const CONSUME: &str = "DELETE FROM signals WHERE id IN (SELECT value FROM json_each(?1)) \
    AND run_id IN (SELECT unhex(value) FROM json_each(?2))";

// wake-signalled: a run that was parked over a signal can be claimed at once.
pub(crate) const WAKE_SIGNALLED: &str = "UPDATE runs SET ready_at = CAST(round(unixepoch('subsec') * 1000) AS INTEGER), \
    wake_at = NULL WHERE id IN (SELECT unhex(value) FROM json_each(?1)) AND ready_at IS NULL \
    AND EXISTS (SELECT 1 FROM signals WHERE signals.run_id = runs.id)";

// drop-signals: nothing is asked of a run that has ended, and a retry begins without what was asked before.
pub(crate) const DROP_SIGNALS: &str = "DELETE FROM signals WHERE run_id IN (SELECT unhex(value) FROM json_each(?1))";

/// What fences a run's next step.
struct Head {
    tenant: String,
    pipeline: String,
    state: String,
    epoch: Epoch,
    owned: bool,
    last_seq: i64,
}

/// A step that passed its fence.
#[derive(Clone, Copy)]
struct Step<'a> {
    commit: &'a Commit,
    head: &'a Head,
}

impl<'a> Step<'a> {
    fn of(&self) -> Of<'a> {
        Of { run: self.commit.lease.run, tenant: &self.head.tenant }
    }
}

pub(crate) async fn commit(db: &Db, commits: &[Commit]) -> StoreResult<Vec<Committed>> {
    check(commits)?;
    if commits.is_empty() {
        return Ok(Vec::new());
    }
    let mut tx = db.write(Lane::Runs).await?;
    let heads = heads(tx.conn(), commits).await?;
    let (mut answers, mut steps) = (Vec::with_capacity(commits.len()), Vec::with_capacity(commits.len()));
    for commit in commits {
        let head = heads.get(&commit.lease.run);
        let answer = head.map_or(Committed::Stale, |head| fence(head, commit));
        if let (Committed::Now, Some(head)) = (answer, head) {
            steps.push(Step { commit, head });
        }
        answers.push(answer);
    }
    if !steps.is_empty() {
        write_steps(tx.conn(), &steps).await?;
    }
    tx.commit().await?;
    Ok(answers)
}

/// Refuses what no owner may ask: it would leave a gap, or two steps on one head.
fn check(commits: &[Commit]) -> StoreResult<()> {
    let mut runs = HashSet::with_capacity(commits.len());
    for commit in commits {
        let run = commit.lease.run;
        let gap_free = commit.events.is_sorted_by(|a, b| a.seq + 1 == b.seq);
        if commit.events.is_empty() || !gap_free || !runs.insert(run) {
            return Err(StoreError::Defect(format!("a step of run {run} has no events, a gap in them, or a twin")));
        }
    }
    Ok(())
}

fn fence(head: &Head, commit: &Commit) -> Committed {
    let seq = |event: Option<&Event>| event.map_or(0, |event| int(event.seq));
    if head.epoch != commit.lease.epoch {
        Committed::Stale
    } else if head.owned && head.last_seq + 1 == seq(commit.events.first()) {
        Committed::Now
    } else if head.last_seq == seq(commit.events.last()) {
        Committed::Already
    } else {
        Committed::Stale
    }
}

async fn heads(conn: &mut SqliteConnection, commits: &[Commit]) -> StoreResult<HashMap<RunId, Head>> {
    let ids = id_list(commits.iter().map(|commit| commit.lease.run.0));
    let rows: Vec<(Uuid, String, String, String, i64, bool, i64)> =
        sqlx::query_as(HEADS).bind(ids).fetch_all(conn).await.sql()?;
    let head = |(id, tenant, pipeline, state, epoch, owned, last_seq)| {
        (RunId(id), Head { tenant, pipeline, state, epoch: Epoch(epoch), owned, last_seq })
    };
    Ok(rows.into_iter().map(head).collect())
}

async fn write_steps(conn: &mut SqliteConnection, steps: &[Step<'_>]) -> StoreResult<()> {
    update(conn, steps).await?;
    write::events(conn, steps.iter().map(|step| (step.of(), step.commit.events.as_slice()))).await?;
    write::stages(conn, steps.iter().map(|step| (step.of(), step.commit.stages.as_slice()))).await?;
    let attempts = steps.iter().map(|step| (step.of(), step.head.pipeline.as_str(), step.commit));
    write::attempts(conn, attempts).await?;
    write::checkpoints(conn, steps.iter().map(|step| (step.of(), step.commit.checkpoints.as_slice()))).await?;
    let outputs = steps.iter().filter_map(|step| Some((step.of(), step.commit.output.as_ref()?)));
    write::payloads(conn, "output", outputs).await?;
    signals(conn, steps).await
}

/// The runs' rows, by what becomes of their leases.
async fn update(conn: &mut SqliteConnection, steps: &[Step<'_>]) -> StoreResult<()> {
    let mut failures = Vec::with_capacity(steps.len());
    for step in steps {
        failures.push((step, opt_json(step.commit.failure.as_ref())?));
    }
    let keeps = |step: &Step<'_>| step.commit.then == Disposition::Keep;
    let (kept, ended): (Vec<_>, Vec<_>) = failures.into_iter().partition(|(step, _)| keeps(step));
    let (same, moved): (Vec<_>, Vec<_>) =
        kept.into_iter().partition(|(step, _)| step.head.state == step.commit.state.as_str());
    let bind = |row: &mut Row, (step, failure): &(&Step<'_>, Option<String>)| {
        let Commit { lease, events, stages_done, totals, started_at, finished_at, .. } = step.commit;
        row.add(lease.run.0).add(*stages_done).add(failure.as_deref());
        row.add(started_at.map(ms)).add(finished_at.map(ms)).add(events.last().map_or(0, |event| int(event.seq)));
        add_totals(row, totals);
    };
    let changed = ADVANCE.execute(conn, &same, bind).await?
        + MOVE
            .execute(conn, &moved, |row, each| {
                bind(row, each);
                row.add(each.0.commit.state.as_str());
            })
            .await?
        + END
            .execute(conn, &ended, |row, each| {
                bind(row, each);
                row.add(each.0.commit.state.as_str()).add(delay_ms(each.0.commit.then));
            })
            .await?;
    if changed == steps.len() as u64 {
        Ok(())
    } else {
        Err(StoreError::Defect(format!("{changed} runs were written where {} had passed their fence", steps.len())))
    }
}

/// When a parked run goes on by itself.
fn delay_ms(then: Disposition) -> Option<i64> {
    match then {
        Disposition::Park(Some(delay)) => Some(span_ms(delay)),
        Disposition::Keep | Disposition::Park(None) | Disposition::End => None,
    }
}

/// Removes what was answered; wakes what was parked over the rest; drops the rest of what has ended.
async fn signals(conn: &mut SqliteConnection, steps: &[Step<'_>]) -> StoreResult<()> {
    let consumed: Vec<i64> = steps.iter().flat_map(|step| &step.commit.consumed).copied().collect();
    if !consumed.is_empty() {
        let runs = id_list(steps.iter().map(|step| step.commit.lease.run.0));
        sqlx::query(CONSUME).bind(json(&consumed)?).bind(runs).execute(&mut *conn).await.sql()?;
    }
    let which = |wanted: fn(&Disposition) -> bool| {
        let steps = steps.iter().filter(move |step| wanted(&step.commit.then));
        let ids: Vec<Uuid> = steps.map(|step| step.commit.lease.run.0).collect();
        (!ids.is_empty()).then(|| id_list(ids))
    };
    if let Some(parked) = which(|then| matches!(then, Disposition::Park(_))) {
        sqlx::query(WAKE_SIGNALLED).bind(parked).execute(&mut *conn).await.sql()?;
    }
    if let Some(ended) = which(|then| *then == Disposition::End) {
        sqlx::query(DROP_SIGNALS).bind(ended).execute(conn).await.sql()?;
    }
    Ok(())
}
