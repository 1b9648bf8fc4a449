//! Leases: who is alive, who owns what, and the way from a dead owner to the next one. The database's clock is the only
//! one.
//!
//! A replica that was declared dead keeps its row, and every claim frees what such a replica still owns. So a run that
//! it was given in the very moment of its death (its submit or claim had begun before) is found by the next claim.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Mutex, PoisonError},
};

use sqlx::{Row as _, postgres::PgRow};
use stagegate_core::{
    Capabilities, Capability, Epoch, ReplicaId, RunId, StoreError, StoreResult, TenantId,
    fair::{Share, Shares},
    store::{Heartbeat, Lease, Pulse, PutBack, Snapshot, Weighed},
};
use uuid::Uuid;

use crate::{
    compact::{Gate, stages_of},
    error,
    first::FirstAttempts,
    pool::{Connection, Pool},
    rows::{self, Reader, attempt_columns, checkpoint_columns, run_columns, stage_columns},
};

/// Reports a replica alive, unless it was declared dead, and tells which of its runs have news and which capabilities are
/// common. A replica that lacks what is settled is refused (migration 0003).
pub const HEARTBEAT: &str = "/* replicas.heartbeat */
WITH beat AS (
    INSERT INTO replicas (id, name, version, draining, seen_at, expires_at, schema, capabilities)
    VALUES ($1, $2, $3, $4, now(), now() + $5 * interval '1 millisecond', 4, $6)
    ON CONFLICT (id) DO UPDATE
        SET draining = excluded.draining, seen_at = excluded.seen_at, expires_at = excluded.expires_at
        WHERE replicas.dead_at IS NULL
    RETURNING id
)
SELECT EXISTS (SELECT FROM beat) AS alive,
       ARRAY(SELECT r.id FROM runs r JOIN beat ON beat.id = r.owner WHERE r.signalled ORDER BY r.id) AS signalled,
       common_capabilities_3($1, $6, $7, $8 * interval '1 millisecond') AS common,
       clock_timestamp() AS moment";

/// Takes runs that can go on: one look at some of the lanes. What it does is told at the function (migration 0004).
pub const CLAIM: &str = "/* runs.claim */
SELECT ids, epochs, freed, woken, lost, last_tenant, last_lane, cut_tenants, cut_lanes, wake_last
FROM claim_runs_4($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)";

/// How many lanes one look covers, and how many tenants. They are found and read in some ten microseconds each; the next
/// look goes on there.
const LANES_MAX: i32 = 512;
/// How many runs of dead replicas one look frees at most, and how many it notes as due: a few milliseconds of work.
const FREE_MAX: i32 = 500;
/// How many runs one look takes at most.
const TAKE_MAX: u32 = 500;

/// Forgets replicas that died long ago and own nothing. Should one of them wake up after all, it is a new one to us; what
/// it still believes to own is stale.
const FORGET: &str = "/* replicas.forget */
DELETE FROM replicas p
WHERE p.dead_at < now() - interval '1 hour' AND NOT EXISTS (SELECT FROM runs r WHERE r.owner = p.id)";

/// What a replica owns.
pub const OWNED: &str = "/* runs.owned */ SELECT id, epoch FROM runs WHERE owner = $1 ORDER BY id";

/// Everything that an owner needs, one row per stage; the input stands in the first row of each run.
pub const LOAD: &str = concat!(
    "/* runs.load */ SELECT ",
    run_columns!(),
    ", ",
    stage_columns!(),
    ", ",
    checkpoint_columns!(),
    ", c.output AS c_output, ",
    attempt_columns!(),
    ", r.epoch, r.first_attempts::text AS first_attempts,
     CASE WHEN row_number() OVER (PARTITION BY r.id ORDER BY s.stage_id) = 1 THEN p.input END AS input
     FROM unnest($1::uuid[], $2::int8[]) AS l(run_id, epoch)
     JOIN runs r ON r.id = l.run_id AND r.epoch = l.epoch AND r.owner IS NOT NULL
     JOIN run_payloads p ON p.run_id = r.id
     LEFT JOIN ",
    stages_of!(),
    " ON true
     LEFT JOIN checkpoints c ON c.run_id = r.id AND c.stage_id = s.stage_id
     LEFT JOIN LATERAL (
         SELECT * FROM attempts a
         WHERE a.run_id = r.id AND a.stage_id = s.stage_id AND c.run_id IS NULL AND a.output IS NOT NULL
         ORDER BY a.number DESC LIMIT 1
     ) a ON true
     ORDER BY r.id, s.stage_id"
);

/// How large the payloads are that [`LOAD`] would read, and how often the runs crashed. A text's length is told without
/// reading it.
pub const WEIGH: &str = "/* runs.weigh */
SELECT r.id, r.tenant, CASE WHEN r.last_seq <= r.crashed_seq + 1 THEN r.crashes ELSE 0 END AS crashes,
       octet_length(p.input) + c.bytes + a.bytes + g.bytes AS bytes
FROM unnest($1::uuid[], $2::int8[]) AS l(run_id, epoch)
JOIN runs r ON r.id = l.run_id AND r.epoch = l.epoch AND r.owner IS NOT NULL
JOIN run_payloads p ON p.run_id = r.id
CROSS JOIN LATERAL (
    SELECT coalesce(sum(octet_length(c.output)), 0)::int8 AS bytes FROM checkpoints c WHERE c.run_id = r.id
) c
CROSS JOIN LATERAL (
    SELECT coalesce(sum(bytes), 0)::int8 AS bytes FROM (
        SELECT DISTINCT ON (a.stage_id) octet_length(a.output) AS bytes FROM attempts a
        WHERE a.run_id = r.id AND a.output IS NOT NULL
          AND NOT EXISTS (SELECT FROM checkpoints c WHERE c.run_id = r.id AND c.stage_id = a.stage_id)
        ORDER BY a.stage_id, a.number DESC
    ) a
) a
CROSS JOIN LATERAL (
    SELECT coalesce(sum(octet_length(g.body)), 0)::int8 AS bytes FROM signals g
    WHERE g.run_id = r.id AND octet_length(g.body) > 65536
) g";

/// Hands runs back. One that somebody holds is passed over, so that it does not keep the others: the owner's next look at
/// what it owns finds it.
const RELEASE: &str = "/* runs.release */
UPDATE runs SET owner = NULL, available_at = now(), ready = true
WHERE id IN (
    SELECT r.id FROM unnest($1::uuid[], $2::int8[]) AS l(run_id, epoch)
    JOIN runs r ON r.id = l.run_id AND r.epoch = l.epoch AND r.owner IS NOT NULL
    FOR UPDATE OF r SKIP LOCKED
)";

/// The same, each after its own delay, and with its crash counted: anew where there was progress since the last one.
pub const PUT_BACK: &str = "/* runs.put_back */
UPDATE runs r SET
    owner = NULL, available_at = now() + b.after_ms * interval '1 millisecond', ready = CASE WHEN b.after_ms = 0 THEN true END,
    crashes = CASE WHEN NOT b.crashed THEN r.crashes WHEN r.last_seq <= r.crashed_seq + 1 THEN r.crashes + 1 ELSE 1 END,
    crashed_seq = CASE WHEN b.crashed THEN r.last_seq ELSE r.crashed_seq END
FROM (
    SELECT x.id, l.after_ms, l.crashed
    FROM unnest($1::uuid[], $2::int8[], $3::int8[], $4::bool[]) AS l(run_id, epoch, after_ms, crashed)
    JOIN runs x ON x.id = l.run_id AND x.epoch = l.epoch AND x.owner IS NOT NULL
    FOR UPDATE OF x SKIP LOCKED
) b
WHERE r.id = b.id";

/// A replica is gone for good. It is declared dead rather than forgotten, so that what it was still being given, and
/// what somebody holds now, is found by the next claim.
const LEAVE: &str = "/* replicas.leave */
WITH gone AS (
    UPDATE replicas SET dead_at = coalesce(dead_at, now()) WHERE id = $1
)
UPDATE runs SET owner = NULL, available_at = now(), ready = true
WHERE id IN (SELECT id FROM runs WHERE owner = $1 FOR UPDATE SKIP LOCKED)";

pub(crate) async fn heartbeat(pool: &Pool, compact: &Gate, beat: &Heartbeat) -> StoreResult<Pulse> {
    let query = sqlx::query(HEARTBEAT)
        .bind(beat.replica.0)
        .bind(rows::printable(&beat.name))
        .bind(rows::printable(&beat.version))
        .bind(beat.draining)
        .bind(rows::millis(beat.ttl))
        .bind(beat.capabilities.words().collect::<Vec<_>>())
        .bind(Capability::ALL.iter().filter(|one| one.settles()).map(|one| one.as_str()).collect::<Vec<_>>())
        .bind(rows::millis(beat.way_back));
    let mut connection = pool.acquire_for_pulse("replicas.heartbeat").await?;
    let row = connection.row("replicas.heartbeat", query).await?;
    let Some(row) = row else { return Ok(Pulse::default()) };
    let read = Reader::new(&row, "replicas", beat.replica.0);
    let (signalled, common): (Vec<Uuid>, Vec<String>) = (read.get("signalled")?, read.get("common")?);
    let common = Capabilities::of_words(common.iter().map(String::as_str));
    compact.learn(&common);
    let signalled = signalled.into_iter().map(RunId).collect();
    Ok(Pulse { alive: read.get("alive")?, signalled, common, now: Some(read.get("moment")?) })
}

/// For how many tenants with many lanes it is remembered where the next look goes on.
const CUT_MAX: usize = 1_000;

/// Where the next look at the lanes begins; only a hint, so that all tenants and all of their lanes get their turn where
/// they are too many for one look.
#[derive(Debug, Clone, Default)]
pub(crate) struct Place {
    /// At this tenant; the first one where it is empty.
    tenant: String,
    /// The lanes after this one, of the tenants that have more than their part of a look.
    cut: BTreeMap<String, String>,
    /// What becomes due is noted of the tenants after this one.
    wake: String,
}

/// The place of a store's claims.
pub(crate) type Turn = Mutex<Place>;

/// How a claim goes through the lanes.
enum Pass {
    /// Some of each tenant's, from a place on.
    Fair,
    /// One after the other, from after this lane of this tenant on. Only where a claim has found nothing and has not seen
    /// all: it leaves none that could be taken.
    OfAll(String, String),
}

pub(crate) async fn claim(
    pool: &Pool,
    turn: &Turn,
    replica: ReplicaId,
    limit: u32,
    shares: &Shares,
) -> StoreResult<Vec<Lease>> {
    let mut connection = pool.acquire("runs.claim").await?;
    let mut place = turn.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let mut pass = Pass::Fair;
    let mut leases: Vec<Lease> = Vec::new();
    // Whether this claim has begun at the first tenant, and whether all of each tenant's lanes were seen since.
    let (mut from_the_first, mut were_cut) = (false, false);
    // What earlier looks made claimable, maybe in lanes that they had passed.
    let mut made_ready = 0;
    loop {
        let room = limit.saturating_sub(u32::try_from(leases.len()).unwrap_or(u32::MAX)).min(TAKE_MAX);
        if matches!(pass, Pass::Fair) && place.tenant.is_empty() && place.wake.is_empty() {
            (from_the_first, were_cut, made_ready) = (true, false, 0);
        }
        were_cut |= !place.cut.is_empty();
        let look = look(&mut connection, replica, room, shares, &place, &pass).await?;
        if look.lost > 0 {
            connection.rows("replicas.forget", sqlx::query(FORGET)).await?;
        }
        let took = u32::try_from(look.leases.len()).unwrap_or(u32::MAX);
        leases.extend(look.leases);
        made_ready += look.freed + look.woken;
        if (took == room && leases.len() < limit as usize) || (look.freed == FREE_MAX && leases.is_empty()) {
            // More can be had of these lanes, or at least be freed. What is freed is never freed again: this ends.
            continue;
        }
        place.wake = look.wake.unwrap_or_default();
        if matches!(pass, Pass::Fair) {
            place.goes_on(look.last.as_ref().map(|(tenant, _)| tenant.clone()), look.cut);
            were_cut |= !place.cut.is_empty();
        }
        if !leases.is_empty() || limit == 0 {
            break;
        }
        pass = match (pass, look.last) {
            (Pass::Fair, None) if from_the_first && place.wake.is_empty() && made_ready == 0 => {
                if !were_cut {
                    break;
                }
                Pass::OfAll(String::new(), String::new())
            }
            (Pass::Fair, _) => Pass::Fair,
            (Pass::OfAll(..), Some((tenant, lane))) => Pass::OfAll(tenant, lane),
            (Pass::OfAll(..), None) => break,
        };
    }
    *turn.lock().unwrap_or_else(PoisonError::into_inner) = place;
    Ok(leases)
}

impl Place {
    /// After a look at the tenants from here to before the next place, or to the last one.
    fn goes_on(&mut self, next: Option<String>, cut: Vec<(String, String)>) {
        let next = next.unwrap_or_default();
        let seen = |tenant: &String| *tenant >= self.tenant && (next.is_empty() || *tenant < next);
        self.cut.retain(|tenant, _| !seen(tenant));
        self.cut.extend(cut);
        if self.cut.len() > CUT_MAX {
            self.cut.clear();
        }
        self.tenant = next;
    }
}

/// What one look found.
struct Look {
    leases: Vec<Lease>,
    freed: i32,
    woken: i32,
    lost: i32,
    /// Where the next look begins, where there is more.
    last: Option<(String, String)>,
    /// Tenants that have more lanes than their part, each with the last one that was looked at.
    cut: Vec<(String, String)>,
    /// The last tenant whose due runs were noted, where there are more tenants.
    wake: Option<String>,
}

async fn look(
    connection: &mut Connection,
    replica: ReplicaId,
    limit: u32,
    shares: &Shares,
    place: &Place,
    pass: &Pass,
) -> StoreResult<Look> {
    let most = |share: &Share| share.max_runs.map(rows::small);
    let (of_all, tenant, lane) = match pass {
        Pass::Fair => (false, place.tenant.as_str(), ""),
        Pass::OfAll(tenant, lane) => (true, tenant.as_str(), lane.as_str()),
    };
    let query = sqlx::query(CLAIM)
        .bind(replica.0)
        .bind(rows::small(limit))
        .bind(shares.named.keys().map(TenantId::as_str).collect::<Vec<_>>())
        .bind(shares.named.values().map(|share| rows::small(share.weight)).collect::<Vec<_>>())
        .bind(shares.named.values().map(most).collect::<Vec<_>>())
        .bind(rows::small(shares.default.weight))
        .bind(most(&shares.default))
        .bind(tenant)
        .bind(lane)
        .bind(of_all)
        .bind(place.cut.keys().cloned().collect::<Vec<_>>())
        .bind(place.cut.values().cloned().collect::<Vec<_>>())
        .bind(place.wake.as_str())
        .bind(LANES_MAX)
        .bind(FREE_MAX);
    let found = connection.row("runs.claim", query).await?;
    let row = found.ok_or_else(|| StoreError::Defect("runs.claim: no answer".into()))?;
    claimed(&row).map_err(|failure| error::statement("runs.claim", &failure))
}

fn claimed(row: &PgRow) -> Result<Look, sqlx::Error> {
    let (ids, epochs): (Vec<Uuid>, Vec<i64>) = (row.try_get("ids")?, row.try_get("epochs")?);
    let lease = |(id, epoch)| Lease { run: RunId(id), epoch: Epoch(epoch) };
    let last: (Option<String>, Option<String>) = (row.try_get("last_tenant")?, row.try_get("last_lane")?);
    let cut: (Vec<String>, Vec<String>) = (row.try_get("cut_tenants")?, row.try_get("cut_lanes")?);
    Ok(Look {
        leases: ids.into_iter().zip(epochs).map(lease).collect(),
        freed: row.try_get("freed")?,
        woken: row.try_get("woken")?,
        lost: row.try_get("lost")?,
        last: last.0.zip(last.1),
        cut: cut.0.into_iter().zip(cut.1).collect(),
        wake: row.try_get("wake_last")?,
    })
}

pub(crate) async fn owned(pool: &Pool, replica: ReplicaId) -> StoreResult<Vec<Lease>> {
    let query = sqlx::query(OWNED).bind(replica.0);
    let found = pool.acquire("runs.owned").await?.rows("runs.owned", query).await?;
    let lease = |row: &PgRow| {
        let id = rows::id(row, "id", "runs")?;
        Ok(Lease { run: RunId(id), epoch: Epoch(Reader::new(row, "runs", id).get("epoch")?) })
    };
    found.iter().map(lease).collect()
}

pub(crate) async fn weigh(pool: &Pool, leases: &[Lease]) -> StoreResult<Vec<Weighed>> {
    if leases.is_empty() {
        return Ok(Vec::new());
    }
    let query = sqlx::query(WEIGH)
        .bind(leases.iter().map(|lease| lease.run.0).collect::<Vec<_>>())
        .bind(leases.iter().map(|lease| lease.epoch.0).collect::<Vec<_>>());
    let mut found = HashMap::with_capacity(leases.len());
    for row in pool.acquire("runs.weigh").await?.rows("runs.weigh", query).await? {
        let id = rows::id(&row, "id", "runs")?;
        let read = Reader::new(&row, "runs", id);
        let bytes = Reader::new(&row, "run_payloads", id).seq("bytes")?;
        found.insert(id, (read.parse("tenant")?, bytes, read.number("crashes")?));
    }
    let weighed = leases.iter().filter_map(|lease| {
        let (tenant, bytes, crashes) = found.remove(&lease.run.0)?;
        Some(Weighed { lease: *lease, tenant, bytes, crashes })
    });
    Ok(weighed.collect())
}

pub(crate) async fn load(pool: &Pool, leases: &[Lease]) -> StoreResult<Vec<Snapshot>> {
    let distinct: HashSet<Lease> = leases.iter().copied().collect();
    if distinct.is_empty() {
        return Ok(Vec::new());
    }
    let query = sqlx::query(LOAD)
        .bind(distinct.iter().map(|lease| lease.run.0).collect::<Vec<_>>())
        .bind(distinct.iter().map(|lease| lease.epoch.0).collect::<Vec<_>>());
    let found = pool.acquire("runs.load").await?.rows("runs.load", query).await?;
    // The rows come run by run.
    let mut snapshots: Vec<Snapshot> = Vec::with_capacity(distinct.len());
    let mut first_attempts = Vec::with_capacity(distinct.len());
    for row in &found {
        let id = rows::id(row, "id", "runs")?;
        let read = Reader::new(row, "runs", id);
        if snapshots.last().is_none_or(|snapshot| snapshot.lease.run.0 != id) {
            first_attempts.push((FirstAttempts::read(&read)?, read));
            snapshots.push(Snapshot {
                lease: Lease { run: RunId(id), epoch: Epoch(read.get("epoch")?) },
                run: rows::run(row)?,
                input: Reader::new(row, "run_payloads", id).payload("input")?,
                stages: Vec::new(),
                checkpoints: Vec::new(),
                last_attempts: Vec::new(),
            });
        }
        let (Some(snapshot), Some(stage)) = (snapshots.last_mut(), rows::stage(read)?) else { continue };
        snapshot.checkpoints.extend(rows::checkpoint(read)?.map(|checkpoint| (stage.id.clone(), checkpoint)));
        snapshot.last_attempts.extend(rows::attempt(read)?.map(|attempt| (stage.id.clone(), attempt)));
        snapshot.stages.push(stage);
    }
    for (snapshot, (first, read)) in snapshots.iter_mut().zip(first_attempts) {
        let started = first.without(&read, &snapshot.stages)?;
        snapshot.stages.extend(started);
    }
    Ok(snapshots)
}

pub(crate) async fn release(pool: &Pool, leases: &[Lease]) -> StoreResult<()> {
    if leases.is_empty() {
        return Ok(());
    }
    let query = sqlx::query(RELEASE)
        .bind(leases.iter().map(|lease| lease.run.0).collect::<Vec<_>>())
        .bind(leases.iter().map(|lease| lease.epoch.0).collect::<Vec<_>>());
    pool.acquire("runs.release").await?.rows("runs.release", query).await.map(|_| ())
}

pub(crate) async fn put_back(pool: &Pool, back: &[PutBack]) -> StoreResult<()> {
    if back.is_empty() {
        return Ok(());
    }
    let query = sqlx::query(PUT_BACK)
        .bind(back.iter().map(|each| each.lease.run.0).collect::<Vec<_>>())
        .bind(back.iter().map(|each| each.lease.epoch.0).collect::<Vec<_>>())
        .bind(back.iter().map(|each| rows::millis(each.after)).collect::<Vec<_>>())
        .bind(back.iter().map(|each| each.crashed).collect::<Vec<_>>());
    pool.acquire("runs.put_back").await?.rows("runs.put_back", query).await.map(|_| ())
}

pub(crate) async fn leave(pool: &Pool, replica: ReplicaId) -> StoreResult<()> {
    let query = sqlx::query(LEAVE).bind(replica.0);
    let mut connection = pool.acquire("replicas.leave").await?;
    connection.rows("replicas.leave", query).await?;
    connection.rows("replicas.forget", sqlx::query(FORGET)).await.map(|_| ())
}
