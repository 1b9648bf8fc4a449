//! Admission: owns how much may wait. A submit that would have to wait is refused once its tenant's queue, or the whole
//! one, is full; what can be taken at once is never refused.
//!
//! The depths are counted by the store, at most every second and never on the path of a submit; what this replica has
//! queued since is added, and what it has claimed is taken off. A run that was being inserted while the store counted may
//! be in the count or not: it is taken to be, so that nobody is refused for a run that was counted twice. So a limit can
//! be overstepped by what all replicas accept between two counts.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use stagegate_core::{Code, Error, TenantId};
use tokio::time::Instant;

use crate::shared::Shared;

/// How old the depths may be before they are counted again.
const FRESH: Duration = Duration::from_secs(1);
/// A count that took long is repeated the later: it takes at most one part in so many of the database's time.
const SHARE: u32 = 20;
/// The longest time between two counts, and how old a count may be by which somebody is refused.
const STALE: Duration = Duration::from_secs(10);
/// When to come back where a queue is full: about the time after which it is counted anew.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// What waits, as far as this replica knows.
#[derive(Debug, Default)]
pub(crate) struct Admission {
    known: Mutex<Known>,
}

/// When a run was admitted, told by the counts that had begun and ended by then.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Admitted(u64);

#[derive(Debug, Default)]
struct Known {
    counted: Depths,
    /// What this replica has queued since, less what it has claimed.
    since: Depths,
    /// What it has claimed since the count began that is under way.
    since_begun: Depths,
    /// How many counts have begun, and ended: odd while one is under way.
    borders: u64,
    /// When to count again; None before the first time.
    due: Option<Instant>,
    counted_at: Option<Instant>,
}

/// By tenant, and all together.
#[derive(Debug, Default)]
struct Depths {
    of: HashMap<TenantId, i64>,
    total: i64,
}

impl Depths {
    fn add(&mut self, tenant: &TenantId, runs: i64) {
        self.total += runs;
        match self.of.get_mut(tenant) {
            Some(depth) => *depth += runs,
            None => drop(self.of.insert(tenant.clone(), runs)),
        }
    }

    fn of(&self, tenant: &TenantId) -> i64 {
        self.of.get(tenant).copied().unwrap_or(0)
    }
}

impl Known {
    fn is_counting(&self) -> bool {
        self.borders % 2 == 1
    }

    fn depth(&self, tenant: &TenantId) -> u64 {
        u64::try_from(self.counted.of(tenant) + self.since.of(tenant)).unwrap_or(0)
    }

    fn total(&self) -> u64 {
        u64::try_from(self.counted.total + self.since.total).unwrap_or(0)
    }

    fn begin_count(&mut self) {
        self.borders += 1;
        self.since_begun = Depths::default();
    }

    /// None where it could not be counted: what is known stays, as if nobody had counted.
    fn end_count(&mut self, depths: Option<Vec<(TenantId, u64)>>) {
        let Some(depths) = depths else {
            self.borders -= 1;
            return;
        };
        self.borders += 1;
        self.counted = Depths::default();
        for (tenant, depth) in depths {
            self.counted.add(&tenant, i64::try_from(depth).unwrap_or(i64::MAX / 2));
        }
        self.since = std::mem::take(&mut self.since_begun);
    }

    fn queued(&mut self, tenant: &TenantId, admitted: Admitted) {
        // Where a count has ended since it was admitted, it is taken to be in that count.
        if admitted.0 | 1 == self.borders | 1 {
            self.since.add(tenant, 1);
        }
    }

    fn claimed(&mut self, tenant: &TenantId) {
        self.since.add(tenant, -1);
        if self.is_counting() {
            self.since_begun.add(tenant, -1);
        }
    }
}

impl Admission {
    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The present, for a run whose insert is about to begin.
    pub(crate) fn now(&self) -> Admitted {
        Admitted(self.known().borders)
    }

    /// Notes a run that waits now.
    pub(crate) fn queued(&self, tenant: &TenantId, admitted: Admitted) {
        self.known().queued(tenant, admitted);
    }

    /// Notes a run that waits no more.
    pub(crate) fn claimed(&self, tenant: &TenantId) {
        self.known().claimed(tenant);
    }
}

/// Admits a run that has to wait, or says that too many wait already.
pub(crate) fn admit(shared: &Arc<Shared>, tenant: &TenantId) -> Result<(), Error> {
    count_if_due(shared);
    let (own, total) = {
        let known = shared.admission.known();
        if known.counted_at.is_some_and(|at| at.elapsed() > STALE + FRESH) {
            return Ok(()); // Long ago is no reason to refuse; the count has just been asked for.
        }
        (known.depth(tenant), known.total())
    };
    let full = |what: &str, depth: u64, limit: u64, key: &str| {
        let message = format!("{depth} runs wait already{what}, at most {limit} may ({key}); come back later");
        Err(Error::new(Code::QueueFull, message).retry_after(RETRY_AFTER))
    };
    let limit = shared.config.limits_of(tenant).max_queued;
    if own >= limit {
        return full(" in this tenant's queue", own, limit, "engine.tenants.NAME.max_queued");
    }
    if total >= shared.config.max_queued {
        // How many others' runs wait is not this tenant's to know.
        return full("", shared.config.max_queued, shared.config.max_queued, "engine.max_queued");
    }
    Ok(())
}

/// Counts in the background, where it is time for it. A store that is away leaves what is known.
fn count_if_due(shared: &Arc<Shared>) {
    {
        let mut known = shared.admission.known();
        if known.is_counting() || known.due.is_some_and(|due| Instant::now() < due) {
            return;
        }
        known.begin_count();
    }
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        let started = Instant::now();
        let counted = shared.store.depths().await;
        let took = started.elapsed();
        let mut known = shared.admission.known();
        known.due = Some(Instant::now() + (took * SHARE).clamp(FRESH, STALE));
        if let Err(error) = &counted {
            tracing::warn!(%error, "the queue could not be counted");
        } else {
            known.counted_at = Some(started);
        }
        known.end_count(counted.ok());
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn busy() -> TenantId {
        "busy".parse().expect("a name")
    }

    #[test]
    fn a_run_is_never_counted_twice() {
        let (mut known, busy) = (Known::default(), busy());
        let before = Admitted(known.borders);
        known.begin_count();
        let during = Admitted(known.borders);
        known.queued(&busy, before);
        known.queued(&busy, during);
        assert_eq!(known.depth(&busy), 2, "until the count is there");
        known.end_count(Some(vec![(busy.clone(), 2)]));
        assert_eq!(known.depth(&busy), 2, "both are in it");
        known.queued(&busy, before);
        known.queued(&busy, during);
        assert_eq!(known.depth(&busy), 2, "whatever was being inserted meanwhile may be in it");
        known.queued(&busy, Admitted(known.borders));
        assert_eq!((known.depth(&busy), known.total()), (3, 3), "what began later is not");
    }

    #[test]
    fn what_was_claimed_waits_no_more() {
        let (mut known, busy) = (Known::default(), busy());
        for _ in 0..3 {
            known.queued(&busy, Admitted(0));
        }
        known.claimed(&busy);
        assert_eq!(known.depth(&busy), 2);
        known.begin_count();
        known.claimed(&busy); // The count may tell of it still.
        known.end_count(Some(vec![(busy.clone(), 2)]));
        assert_eq!(known.depth(&busy), 1);
        known.claimed(&busy);
        known.claimed(&busy); // Somebody else's, which the count did not know.
        assert_eq!((known.depth(&busy), known.total()), (0, 0));
    }

    #[test]
    fn a_count_that_failed_changes_nothing() {
        let (mut known, busy) = (Known::default(), busy());
        let before = Admitted(known.borders);
        known.begin_count();
        known.queued(&busy, Admitted(known.borders));
        let during = Admitted(known.borders);
        known.end_count(None);
        for admitted in [before, during, Admitted(known.borders)] {
            known.queued(&busy, admitted);
        }
        assert_eq!(known.depth(&busy), 4);
    }
}
