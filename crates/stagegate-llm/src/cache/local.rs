//! The first level: answers in this process, bounded by their bytes, each with its own time to live. Owns nothing
//! that would be missed: whatever is here was bought once and may be bought again.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use moka::{Expiry, policy::EvictionPolicy, sync::Cache};
use stagegate_core::{
    TenantId,
    cache::{CacheKey, CacheUsage},
};

use super::entry::Entry;

/// What an entry costs beside its text, roughly: keys, ids, the cache's own book-keeping.
const OVERHEAD_BYTES: usize = 512;

/// An answer, and the generation that stood when it was asked for.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) entry: Arc<Entry>,
    pub(crate) generation: u64,
    /// Whether the shared tier has (or had) it too: then its absence there means that it was evicted.
    shared: AtomicBool,
    life: Duration,
}

impl Held {
    pub(crate) fn is_shared(&self) -> bool {
        self.shared.load(Ordering::Relaxed)
    }

    pub(crate) fn mark_shared(&self) {
        self.shared.store(true, Ordering::Relaxed);
    }
}

type LocalKey = (TenantId, CacheKey);

struct ByLife;

impl Expiry<LocalKey, Arc<Held>> for ByLife {
    fn expire_after_create(&self, _: &LocalKey, held: &Arc<Held>, _: Instant) -> Option<Duration> {
        Some(held.life)
    }

    fn expire_after_update(&self, _: &LocalKey, held: &Arc<Held>, _: Instant, _: Option<Duration>) -> Option<Duration> {
        Some(held.life)
    }
}

/// Answers by tenant and key.
#[derive(Debug)]
pub(crate) struct Local(Cache<LocalKey, Arc<Held>>);

impl Local {
    pub(crate) fn new(max_bytes: u64) -> Self {
        let weigh = |_: &LocalKey, held: &Arc<Held>| {
            u32::try_from(held.entry.content.len().saturating_add(OVERHEAD_BYTES)).unwrap_or(u32::MAX)
        };
        Self(
            Cache::builder()
                .max_capacity(max_bytes)
                .weigher(weigh)
                .eviction_policy(EvictionPolicy::lru())
                .expire_after(ByLife)
                .build(),
        )
    }

    pub(crate) fn get(&self, tenant: &TenantId, key: CacheKey) -> Option<Arc<Held>> {
        let key = (tenant.clone(), key);
        // Most look-ups find nothing, and only what is found needs to be counted as used.
        if self.0.contains_key(&key) { self.0.get(&key) } else { None }
    }

    pub(crate) fn insert(
        &self,
        tenant: &TenantId,
        key: CacheKey,
        entry: Arc<Entry>,
        generation: u64,
        shared: bool,
        life: Duration,
    ) -> Arc<Held> {
        let held = Arc::new(Held { entry, generation, shared: AtomicBool::new(shared), life });
        self.0.insert((tenant.clone(), key), Arc::clone(&held));
        held
    }

    pub(crate) fn remove(&self, tenant: &TenantId, key: CacheKey) {
        self.0.invalidate(&(tenant.clone(), key));
    }

    /// What is kept of a tenant from this generation on. Looks at the entries of all tenants.
    pub(crate) fn usage(&self, tenant: &TenantId, floor: u64) -> CacheUsage {
        let mut usage = CacheUsage::default();
        for (key, held) in &self.0 {
            if key.0 == *tenant && held.generation >= floor {
                usage.entries += 1;
                usage.bytes += held.entry.content.len() as u64;
            }
        }
        usage
    }

    pub(crate) fn clear(&self) {
        self.0.invalidate_all();
    }
}

#[cfg(test)]
mod tests {
    use stagegate_core::{ModelRef, RunId, Usage, Usd};
    use uuid::Uuid;

    use super::{
        super::entry::{Buyer, NewEntry},
        *,
    };

    fn entry(content: &str) -> Arc<Entry> {
        Arc::new(Entry::new(&NewEntry {
            content,
            model: &ModelRef::new("sim/a").expect("a model"),
            usage: Usage::default(),
            cost: Usd::ZERO,
            priced: true,
            stored_at_ms: 0,
            ttl: Duration::from_hours(1),
            buyer: &Buyer {
                run: RunId(Uuid::nil()),
                stage: stagegate_core::StageId::new("s").expect("a slug"),
                attempt: 1,
            },
        }))
    }

    #[test]
    fn it_is_bounded_by_bytes() {
        let local = Local::new(100_000);
        let tenant = TenantId::default();
        for n in 0..100 {
            let entry = entry(&"x".repeat(10_000));
            local.insert(&tenant, CacheKey([n; 32]), entry, 1, false, Duration::from_hours(1));
        }
        local.0.run_pending_tasks();
        assert!(local.0.weighted_size() <= 100_000);
        assert!(local.get(&tenant, CacheKey([99; 32])).is_some(), "the newest stays");
        assert!(local.get(&tenant, CacheKey([0; 32])).is_none(), "the oldest went");
    }

    #[test]
    fn tenants_do_not_see_each_other() {
        let local = Local::new(100_000);
        let (one, other) = (TenantId::default(), TenantId::new("other").expect("a slug"));
        local.insert(&one, CacheKey([1; 32]), entry("mine"), 1, false, Duration::from_hours(1));
        assert!(local.get(&other, CacheKey([1; 32])).is_none());
        local.remove(&other, CacheKey([1; 32]));
        assert!(local.get(&one, CacheKey([1; 32])).is_some());
    }
}
