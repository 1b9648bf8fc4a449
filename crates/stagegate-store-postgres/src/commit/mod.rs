//! Committing steps: what recovery relies on. Many runs, one statement, each run fenced by its own row.

mod columns;
pub(crate) mod statements;

use std::collections::{HashMap, HashSet};

use sqlx::Row as _;
use stagegate_core::{
    StageState, StoreError, StoreResult,
    store::{Commit, Committed, Disposition, StageRecord},
};
use uuid::Uuid;

use self::{
    columns::Columns,
    statements::{COMMIT, COMMIT_PLAIN, COMMIT_PLAIN_END, STANDING},
};
use crate::{
    error,
    first::FirstAttempts,
    pool::{Connection, Pool, Statement},
    rows,
};

pub(crate) async fn commit(pool: &Pool, commits: &[Commit], compact: bool) -> StoreResult<Vec<Committed>> {
    if commits.is_empty() {
        return Ok(Vec::new());
    }
    let mut runs = HashSet::with_capacity(commits.len());
    if !commits.iter().all(|commit| runs.insert(commit.lease.run)) {
        return Err(StoreError::Defect("runs.commit: two steps of one run in one call".into()));
    }
    let all: Vec<&Commit> = commits.iter().collect();
    let mut written = HashSet::with_capacity(commits.len());
    // Read before a connection is asked for: what the caller must not write costs none.
    let plain = if all.iter().all(|commit| is_plain(commit)) { Some(Columns::of(&all, true, compact)?) } else { None };
    let full = if plain.is_none() { Some(Columns::of(&all, false, compact)?) } else { None };
    let mut connection = pool.acquire("runs.commit").await?;
    if let Some(columns) = plain {
        let sql = if columns.has_outputs() { COMMIT_PLAIN_END } else { COMMIT_PLAIN };
        match write(&mut connection, columns.bind_plain(sqlx::query(sql))).await {
            Ok(runs) => written.extend(runs),
            // A row was there that no plain step would have left: nothing was written.
            Err(StoreError::Defect(message)) if message.contains("23505") => {}
            Err(other) => return Err(other),
        }
    }
    let missing = |written: &HashSet<Uuid>| -> Vec<&Commit> {
        commits.iter().filter(|commit| !written.contains(&commit.lease.run.0)).collect()
    };
    let refused = missing(&written);
    if !refused.is_empty() {
        let columns = if let Some(columns) = full { columns } else { Columns::of(&refused, false, compact)? };
        written.extend(write(&mut connection, columns.bind(sqlx::query(COMMIT))).await?);
    }
    let refused = missing(&written);
    let already = if refused.is_empty() { HashSet::new() } else { repeated(&mut connection, &refused).await? };
    let answer = |commit: &Commit| match commit.lease.run.0 {
        run if written.contains(&run) => Committed::Now,
        run if already.contains(&run) => Committed::Already,
        _ => Committed::Stale,
    };
    Ok(commits.iter().map(answer).collect())
}

/// Whether a step is one of those that most are: stages end their first attempt with a checkpoint or begin it, and nobody
/// has asked for anything.
fn is_plain(commit: &Commit) -> bool {
    let first = FirstAttempts::of_step(commit);
    let distinct = |at: usize, stage: &StageRecord| !commit.stages[at + 1..].iter().any(|later| later.id == stage.id);
    commit.consumed.is_empty()
        && !matches!(commit.then, Disposition::Park(_))
        && commit.stages.iter().enumerate().all(|(at, stage)| {
            let ended = stage.state == StageState::Succeeded && stage.attempt == 1 && stage.round_start == 1;
            (ended || first.contains(stage)) && distinct(at, stage)
        })
        // In the same order, one for one.
        && commit.attempts.len() == commit.checkpoints.len()
        && commit.attempts.iter().zip(&commit.checkpoints).enumerate().all(|(at, ((of, attempt), (stage, checkpoint)))| {
            let again = commit.checkpoints[at + 1..].iter().any(|(later, _)| later == stage);
            let given = commit.stages.iter().any(|record| record.id == *stage && record.state == StageState::Succeeded);
            given && of == stage && attempt.number == checkpoint.attempt && attempt.output.is_none() && !again
        })
}

/// Runs one of the statements; returns the runs that it wrote.
async fn write(connection: &mut Connection, query: Statement<'_>) -> StoreResult<Vec<Uuid>> {
    let found = connection.rows("runs.commit", query).await?;
    let written = found.iter().map(|row| row.try_get("id")).collect::<Result<_, _>>();
    written.map_err(|failure| error::statement("runs.commit", &failure))
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
