//! What people and retention ask of the whole: queues, replicas, what is kept.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use stagegate_core::{
    Json, RunId, TenantId,
    store::{Backlog, Kept, ReplicaRecord},
};

use super::state::{Row, State};

fn span(from: i64, to: i64) -> u64 {
    u64::try_from(to - from).unwrap_or(0)
}

impl State {
    pub(crate) fn backlog(&self, tenant: Option<&TenantId>, now: i64) -> Vec<Backlog> {
        let mut found: BTreeMap<_, Backlog> = BTreeMap::new();
        for row in self.runs.values().filter(|row| tenant.is_none_or(|tenant| row.record.tenant == *tenant)) {
            if row.record.state.is_terminal() {
                continue;
            }
            let (tenant, pipeline) = (row.record.tenant.clone(), row.record.pipeline.clone());
            let entry = found.entry((tenant.clone(), pipeline.clone())).or_insert_with(|| Backlog {
                tenant,
                pipeline,
                queued: 0,
                waiting: 0,
                running: 0,
                oldest_queued_ms: 0,
            });
            if let Some(since) = row.claimable_since(|owner| self.expired(owner, now), now) {
                entry.queued += 1;
                entry.oldest_queued_ms = entry.oldest_queued_ms.max(span(since, now));
            } else if row.owner.is_some() {
                entry.running += 1;
            } else {
                entry.waiting += 1;
            }
        }
        found.into_values().collect()
    }

    pub(crate) fn depths(&self, now: i64) -> Vec<(TenantId, u64)> {
        let mut found: BTreeMap<TenantId, u64> = BTreeMap::new();
        let orphaned = |row: &Row| row.owner.is_some_and(|owner| self.expired(owner, now).is_some());
        let waits = |row: &&Row| row.ready_at.is_some() || row.wake_at.is_some() || orphaned(row);
        for row in self.runs.values().filter(waits) {
            *found.entry(row.record.tenant.clone()).or_default() += 1;
        }
        found.into_iter().collect()
    }

    pub(crate) fn replicas(&self, tenant: Option<&TenantId>, now: i64) -> Vec<ReplicaRecord> {
        let mut found: Vec<ReplicaRecord> = Vec::new();
        for (id, replica) in &self.replicas {
            let owned = self.runs.values().filter(|row| row.owner == Some(*id));
            let owned = owned.filter(|row| tenant.is_none_or(|tenant| row.record.tenant == *tenant));
            let (runs, oldest) = owned.fold((0, None::<i64>), |(runs, oldest), row| {
                (runs + 1, Some(oldest.map_or(row.leased_at, |oldest| oldest.min(row.leased_at))))
            });
            found.push(ReplicaRecord {
                id: *id,
                name: replica.name.clone(),
                version: replica.version.clone(),
                alive: replica.is_alive(now),
                draining: replica.draining,
                left: replica.dead_at.is_some_and(|at| at < replica.expires_at),
                started_at: DateTime::from_timestamp_millis(replica.entered_at).unwrap_or_default(),
                heartbeat_age_ms: span(replica.beat_at, now),
                runs,
                oldest_lease_ms: oldest.map(|since| span(since, now)),
                failure: None,
            });
        }
        found.sort_by_key(|replica| !replica.alive);
        found
    }

    pub(crate) fn kept(&self, after: Option<RunId>, created_before: DateTime<Utc>, limit: u32) -> Vec<Kept> {
        let later = self.runs.values().map(|row| &row.record).filter(|run| after.is_none_or(|after| run.id > after));
        let old = later.filter(|run| run.created_at < created_before).take(limit as usize);
        old.map(|run| Kept {
            run: run.id,
            tenant: run.tenant.clone(),
            pipeline: run.pipeline.clone(),
            version: run.version,
            state: run.state,
            finished_at: run.finished_at,
            purged: run.purged_at.is_some(),
        })
        .collect()
    }

    pub(crate) fn purge(&mut self, runs: &[RunId], now: DateTime<Utc>) -> u64 {
        let mut purged = 0;
        for run in runs {
            let Some(row) = self.runs.get_mut(run).filter(|row| row.record.state.is_terminal()) else { continue };
            if row.record.purged_at.is_some() {
                continue;
            }
            row.record.purged_at = Some(now);
            (row.input, row.output) = (Json::null(), None);
            for attempt in row.attempts.values_mut().flat_map(BTreeMap::values_mut) {
                attempt.purge();
            }
            for checkpoint in row.checkpoints.values_mut() {
                checkpoint.output = Json::null();
            }
            purged += 1;
        }
        purged
    }

    pub(crate) fn delete(&mut self, runs: &[RunId]) -> Vec<RunId> {
        let terminal = |run: &&RunId| self.runs.get(run).is_some_and(|row| row.record.state.is_terminal());
        let gone: Vec<RunId> = runs.iter().filter(terminal).copied().collect();
        for run in &gone {
            self.runs.remove(run);
            self.keys.retain(|_, key| key.run != *run);
        }
        gone
    }
}
