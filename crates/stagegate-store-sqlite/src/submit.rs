//! Accepting runs. A run is recognised by its id, and a client's repetition by its idempotency key.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use sqlx::SqliteConnection;
use stagegate_core::{
    Epoch, Event, ReplicaId, RunId, RunState, StoreResult, TenantId,
    store::{IDEMPOTENCY_TTL, Idempotency, NewRun, StageRecord, Submitted},
};
use uuid::Uuid;

use crate::{
    bulk::{Bulk, Row},
    db::{Db, Lane},
    error::Sql,
    rows::{hex, id_list, int, json, ms, now_ms},
    write::{self, Of},
};

/// Outdated idempotency keys that one submit removes at most.
const PURGE_KEYS: i64 = 100;

// submit-now: the runs of one call have waited equally long.
const NOW: &str = concat!("SELECT ", now_ms!());

// live-replicas
pub(crate) const LIVE: &str = concat!(
    "SELECT id FROM replicas WHERE id IN (SELECT unhex(value) FROM json_each(?1)) \
     AND dead_at IS NULL AND expires_at > ",
    now_ms!()
);

// runs-there
pub(crate) const THERE: &str = "SELECT id, owner, epoch FROM runs WHERE id IN (SELECT unhex(value) FROM json_each(?1))";

// keys-there
pub(crate) const KEYS: &str = "SELECT tenant, key, digest, run_id, created_at FROM idempotency_keys \
    WHERE (tenant, key) IN (SELECT value ->> 0, CAST(unhex(value ->> 1) AS TEXT) FROM json_each(?1))";

// replay: what a key stands for, unless its time is over.
pub(crate) const REPLAY: &str =
    "SELECT run_id, digest FROM idempotency_keys WHERE tenant = ?1 AND key = ?2 AND created_at > ?3";

// purge-keys
pub(crate) const PURGE: &str = "DELETE FROM idempotency_keys WHERE (tenant, key) IN \
    (SELECT tenant, key FROM idempotency_keys WHERE created_at <= ?1 ORDER BY created_at LIMIT ?2)";

// insert-runs
static RUNS: Bulk = Bulk::new(
    "INSERT INTO runs (id, tenant, pipeline, version, state, priority, labels, cache_mode, request_id, stages_total, \
     created_at, start_at, started_at, deadline_at, last_seq, epoch, owner, leased_at, ready_at, wake_at, \
     pipeline_max, key, key_max, lane) VALUES",
    24,
    "",
);

// insert-keys: a key that outlived its time is taken over.
static INSERT_KEYS: Bulk = Bulk::new(
    "INSERT INTO idempotency_keys (tenant, key, digest, run_id, created_at) VALUES",
    5,
    "ON CONFLICT (tenant, key) DO UPDATE SET digest = excluded.digest, run_id = excluded.run_id, \
     created_at = excluded.created_at",
);

/// What is known of a key.
struct Key {
    digest: Vec<u8>,
    run: RunId,
    created_at: i64,
}

/// What the database knows before this submit.
struct Known {
    replicas: HashSet<ReplicaId>,
    runs: HashMap<RunId, (Option<ReplicaId>, Epoch)>,
    keys: HashMap<(String, String), Key>,
}

/// A run to be inserted, leased or not.
struct Insert<'a> {
    run: &'a NewRun,
    owner: Option<ReplicaId>,
    labels: String,
    cache_mode: Option<String>,
}

impl Insert<'_> {
    fn of(&self) -> Of<'_> {
        Of { run: self.run.id, tenant: self.run.tenant.as_str() }
    }

    /// Its events. A run that asked for a lease and got none was only accepted: whoever claims it starts it.
    fn events(&self) -> &[Event] {
        let events = self.run.events.as_slice();
        if self.is_refused() { &events[..events.len().min(1)] } else { events }
    }

    /// Its stages, for the same reason.
    fn stages(&self) -> &[StageRecord] {
        if self.is_refused() { &[] } else { &self.run.stages }
    }

    fn is_refused(&self) -> bool {
        self.owner.is_none() && self.run.lease_to.is_some()
    }
}

pub(crate) async fn submit(db: &Db, runs: &[NewRun]) -> StoreResult<Vec<Submitted>> {
    if runs.is_empty() {
        return Ok(Vec::new());
    }
    let mut tx = db.write(Lane::Runs).await?;
    let mut known = known(tx.conn(), runs).await?;
    let (mut answers, mut inserts) = (Vec::with_capacity(runs.len()), Vec::with_capacity(runs.len()));
    for run in runs {
        answers.push(accept(run, &mut known, &mut inserts)?);
    }
    let now: i64 = sqlx::query_scalar(NOW).fetch_one(tx.conn()).await.sql()?;
    insert(tx.conn(), &inserts, now).await?;
    tx.commit().await?;
    Ok(answers)
}

/// Decides what becomes of a run, and notes it for the ones after it.
fn accept<'a>(run: &'a NewRun, known: &mut Known, inserts: &mut Vec<Insert<'a>>) -> StoreResult<Submitted> {
    if let Some((owner, epoch)) = known.runs.get(&run.id) {
        let ours = owner.is_some() && *owner == run.lease_to;
        return Ok(Submitted::Accepted(ours.then_some(*epoch)));
    }
    if let Some(Idempotency { key, digest }) = &run.idempotency {
        let at = (run.tenant.to_string(), key.clone());
        let horizon = ms(run.created_at).saturating_sub_unsigned(ttl_ms());
        match known.keys.get(&at) {
            Some(used) if used.created_at > horizon => {
                let same = used.digest == digest;
                return Ok(if same { Submitted::Existing(used.run) } else { Submitted::Conflict(used.run) });
            }
            _ => known.keys.insert(at, Key { digest: digest.to_vec(), run: run.id, created_at: ms(run.created_at) }),
        };
    }
    let owner = run.lease_to.filter(|replica| known.replicas.contains(replica));
    let epoch = Epoch(i64::from(owner.is_some()));
    known.runs.insert(run.id, (owner, epoch));
    let cache_mode =
        run.cache_mode.map(|mode| json(&mode)).transpose()?.map(|quoted| quoted.trim_matches('"').to_owned());
    inserts.push(Insert { run, owner, labels: json(&run.labels)?, cache_mode });
    Ok(Submitted::Accepted(owner.map(|_| epoch)))
}

pub(crate) async fn replay(
    db: &Db,
    tenant: &TenantId,
    asked: &Idempotency,
    now: DateTime<Utc>,
) -> StoreResult<Option<Submitted>> {
    let query =
        sqlx::query_as(REPLAY).bind(tenant.as_str()).bind(&asked.key).bind(ms(now).saturating_sub_unsigned(ttl_ms()));
    let found: Option<(Uuid, Vec<u8>)> = query.fetch_optional(db.read().await?.conn()).await.sql()?;
    Ok(found.map(|(run, digest)| {
        if digest == asked.digest { Submitted::Existing(RunId(run)) } else { Submitted::Conflict(RunId(run)) }
    }))
}

fn ttl_ms() -> u64 {
    u64::try_from(IDEMPOTENCY_TTL.as_millis()).unwrap_or(u64::MAX)
}

async fn known(conn: &mut SqliteConnection, runs: &[NewRun]) -> StoreResult<Known> {
    let mut known = Known { replicas: HashSet::new(), runs: HashMap::new(), keys: HashMap::new() };
    let replicas: HashSet<Uuid> = runs.iter().filter_map(|run| run.lease_to).map(|replica| replica.0).collect();
    if !replicas.is_empty() {
        let live: Vec<Uuid> = sqlx::query_scalar(LIVE).bind(id_list(replicas)).fetch_all(&mut *conn).await.sql()?;
        known.replicas.extend(live.into_iter().map(ReplicaId));
    }
    let there: Vec<(Uuid, Option<Uuid>, i64)> =
        sqlx::query_as(THERE).bind(id_list(runs.iter().map(|run| run.id.0))).fetch_all(&mut *conn).await.sql()?;
    known.runs.extend(there.into_iter().map(|(id, owner, epoch)| (RunId(id), (owner.map(ReplicaId), Epoch(epoch)))));
    // A key is a client's text: as hex, SQLite's JSON cannot read it differently than it was bound.
    let keys: Vec<(&str, String)> = runs
        .iter()
        .filter_map(|run| Some((run.tenant.as_str(), hex(run.idempotency.as_ref()?.key.as_bytes()))))
        .collect();
    if !keys.is_empty() {
        let used: Vec<(String, String, Vec<u8>, Uuid, i64)> =
            sqlx::query_as(KEYS).bind(json(&keys)?).fetch_all(conn).await.sql()?;
        let used = used
            .into_iter()
            .map(|(tenant, key, digest, run, created_at)| ((tenant, key), Key { digest, run: RunId(run), created_at }));
        known.keys.extend(used);
    }
    Ok(known)
}

async fn insert(conn: &mut SqliteConnection, inserts: &[Insert<'_>], now: i64) -> StoreResult<()> {
    let bind = |row: &mut Row, each: &Insert<'_>| {
        let run = each.run;
        let started_at = each.owner.map(|_| ms(run.created_at));
        let state = if each.owner.is_some() { RunState::Running } else { RunState::Queued };
        row.add(run.id.0).add(run.tenant.as_str()).add(run.pipeline.as_str()).add(run.version).add(state.as_str());
        row.add(i64::from(run.priority)).add(each.labels.as_str()).add(each.cache_mode.as_deref());
        row.add(run.request_id.as_deref()).add(run.stages_total).add(ms(run.created_at));
        row.add(run.start_at.map(ms)).add(started_at);
        row.add(ms(run.deadline_at)).add(int(each.events().last().map_or(0, |event| event.seq)));
        row.add(i64::from(each.owner.is_some())).add(each.owner.map(|replica| replica.0));
        row.add(each.owner.is_some().then_some(now));
        // It waits from now on, or sleeps until it is to start.
        let later = run.start_at.map(ms).filter(|at| *at > now && each.owner.is_none());
        row.add((each.owner.is_none() && later.is_none()).then_some(now)).add(later);
        let key = run.limits.key.as_ref();
        row.add(run.limits.pipeline_max).add(key.map(|(key, _)| key.as_str())).add(key.map(|(_, max)| *max));
        row.add(run.limits.lane(&run.pipeline));
    };
    RUNS.execute(conn, inserts, bind).await?;
    write::payloads(conn, "input", inserts.iter().map(|each| (each.of(), &each.run.input))).await?;
    write::events(conn, inserts.iter().map(|each| (each.of(), each.events()))).await?;
    write::stages(conn, inserts.iter().map(|each| (each.of(), each.stages()))).await?;
    keys(conn, inserts).await
}

async fn keys(conn: &mut SqliteConnection, inserts: &[Insert<'_>]) -> StoreResult<()> {
    let keyed: Vec<(&NewRun, &Idempotency)> =
        inserts.iter().filter_map(|each| Some((each.run, each.run.idempotency.as_ref()?))).collect();
    let Some(newest) = keyed.iter().map(|(run, _)| ms(run.created_at)).max() else { return Ok(()) };
    let bind = |row: &mut Row, (run, key): &(&NewRun, &Idempotency)| {
        row.add(run.tenant.as_str()).add(key.key.as_str()).add(key.digest.as_slice());
        row.add(run.id.0).add(ms(run.created_at));
    };
    INSERT_KEYS.execute(conn, &keyed, bind).await?;
    let horizon = newest.saturating_sub_unsigned(ttl_ms());
    sqlx::query(PURGE).bind(horizon).bind(PURGE_KEYS).execute(conn).await.sql().map(drop)
}
