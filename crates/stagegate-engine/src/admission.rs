//! Admission: owns how much may wait. A submit that would have to wait is refused once its tenant's queue, or the whole
//! one, is full; what can be taken at once is never refused.
//!
//! The depths are counted by the store, at most every second and never on the path of a submit; what this replica has
//! queued since is added. So a limit can be overstepped by what all replicas accept within that second.

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

#[derive(Debug, Default)]
struct Known {
    counted: Depths,
    /// What this replica has queued since the count that is known began: it may be in it, or not.
    since: Depths,
    /// The same of the count that is under way.
    since_next: Depths,
    /// When to count again; None before the first time.
    due: Option<Instant>,
    counting: bool,
    counted_at: Option<Instant>,
}

/// By tenant, and all together.
#[derive(Debug, Default)]
struct Depths {
    of: HashMap<TenantId, u64>,
    total: u64,
}

impl Depths {
    fn add(&mut self, tenant: TenantId, runs: u64) {
        self.total += runs;
        *self.of.entry(tenant).or_default() += runs;
    }
}

impl Known {
    fn depth(&self, tenant: &TenantId) -> u64 {
        [&self.counted, &self.since, &self.since_next].iter().filter_map(|part| part.of.get(tenant)).sum()
    }

    fn total(&self) -> u64 {
        self.counted.total + self.since.total + self.since_next.total
    }

    fn counted(&mut self, depths: Vec<(TenantId, u64)>) {
        self.counted = Depths::default();
        for (tenant, depth) in depths {
            self.counted.add(tenant, depth);
        }
        self.since = std::mem::take(&mut self.since_next);
    }
}

impl Admission {
    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a run that has to wait, once it does.
    pub(crate) fn queued(&self, tenant: &TenantId) {
        let mut known = self.known();
        let since = if known.counting { &mut known.since_next } else { &mut known.since };
        since.add(tenant.clone(), 1);
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
        if known.counting || known.due.is_some_and(|due| Instant::now() < due) {
            return;
        }
        known.counting = true;
    }
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        let started = Instant::now();
        let counted = shared.store.depths().await;
        let took = started.elapsed();
        let mut known = shared.admission.known();
        known.counting = false;
        known.due = Some(Instant::now() + (took * SHARE).clamp(FRESH, STALE));
        match counted {
            Ok(depths) => {
                known.counted(depths);
                known.counted_at = Some(started);
            }
            Err(error) => {
                tracing::warn!(%error, "the queue could not be counted");
                for (tenant, queued) in std::mem::take(&mut known.since_next).of {
                    known.since.add(tenant, queued);
                }
            }
        }
    });
}
