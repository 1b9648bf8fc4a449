//! The shared cache in memory, and how one replica reaches it. Owns generations and entries as the contract says; it
//! can be flushed and go away.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use stagegate_core::{
    TenantId,
    cache::{CacheError, CacheKey, CacheLookup, CacheScope, CacheTier},
};
use tokio::time::Instant;

use crate::{Flaw, world::World};

#[derive(Debug)]
struct Stored {
    entry: Vec<u8>,
    generation: u64,
    expires_at: Instant,
}

#[derive(Debug, Default)]
struct Kept {
    generations: BTreeMap<TenantId, u64>,
    floors: BTreeMap<(TenantId, String), u64>,
    entries: BTreeMap<(TenantId, [u8; 32]), Stored>,
    away_until: Option<Instant>,
}

/// The tier.
#[derive(Debug)]
pub(crate) struct Tier {
    kept: Mutex<Kept>,
    began: Instant,
    flaw: Flaw,
}

impl Tier {
    pub(crate) fn new(flaw: Flaw) -> Self {
        Self { kept: Mutex::default(), began: Instant::now(), flaw }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything is gone, generations too.
    pub(crate) fn flush(&self) {
        let kept = &mut *self.lock();
        *kept = Kept { away_until: kept.away_until, ..Kept::default() };
    }

    /// Nobody reaches it for so long.
    pub(crate) fn go_away(&self, length: Duration) {
        self.lock().away_until = Some(Instant::now() + length);
    }

    fn is_away(&self) -> bool {
        self.lock().away_until.is_some_and(|until| Instant::now() < until)
    }

    /// A missing generation starts at the clock, and is the tenant's floor.
    fn start(&self, kept: &mut Kept, tenant: &TenantId) -> u64 {
        if let Some(generation) = kept.generations.get(tenant) {
            return *generation;
        }
        let first = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX).saturating_add(1_000_000);
        kept.generations.insert(tenant.clone(), first);
        kept.floors.insert((tenant.clone(), CacheScope::Tenant.to_string()), first);
        first
    }

    fn get(&self, tenant: &TenantId, key: CacheKey, scopes: &[CacheScope]) -> CacheLookup {
        let kept = &mut *self.lock();
        let generation = self.start(kept, tenant);
        let floors = scopes.iter().filter_map(|scope| kept.floors.get(&(tenant.clone(), scope.to_string())));
        let floor = floors.copied().max().unwrap_or(0);
        let found = kept.entries.get(&(tenant.clone(), key.0));
        let entry = found.filter(|stored| stored.generation >= floor && stored.expires_at > Instant::now());
        CacheLookup { generation, floor, entry: entry.map(|stored| (stored.entry.clone(), stored.generation)) }
    }

    /// Whether it counts from now on.
    fn put(&self, tenant: &TenantId, key: CacheKey, entry: &[u8], generation: u64, ttl: Duration) -> bool {
        let kept = &mut *self.lock();
        let at = (tenant.clone(), key.0);
        if self.flaw == Flaw::CacheForgets || kept.entries.get(&at).is_some_and(|there| there.generation > generation) {
            return self.flaw == Flaw::CacheForgets;
        }
        // After a flush, and until somebody looks, there is no floor: the next one will be above whatever is here.
        let floor = kept.floors.get(&(tenant.clone(), CacheScope::Tenant.to_string())).copied().unwrap_or(u64::MAX);
        kept.entries.insert(at, Stored { entry: entry.to_vec(), generation, expires_at: Instant::now() + ttl });
        generation >= floor
    }
}

/// How one process reaches the tier.
#[derive(Debug)]
pub(crate) struct TierFront {
    pub(crate) world: Arc<World>,
    pub(crate) process: usize,
}

impl TierFront {
    /// The way there: it may take too long, or end nowhere.
    async fn travel(&self) -> Result<(), CacheError> {
        self.world.gate(self.process).await;
        let away = self.world.tier.is_away();
        if !away && !self.world.strikes(|weather| weather.cache) {
            return Ok(());
        }
        self.world.book(|checks| checks.cache_failed(self.process));
        self.world.lock().counts.cache_faults += 1;
        if away || self.world.between(0, 3).as_millis() > 0 {
            tokio::time::sleep(self.world.between(0, 400)).await; // Past the time-out of the model layer, or not.
        }
        self.world.gate(self.process).await;
        Err(CacheError("simulated".to_owned()))
    }
}

/// The call of the provider whose answer this is: every answer names its call.
pub(crate) fn mark(text: &str) -> Option<u64> {
    let (_, rest) = text.split_once("[c")?;
    rest.split_once(']')?.0.parse().ok()
}

#[async_trait]
impl CacheTier for TierFront {
    async fn get(&self, tenant: &TenantId, key: CacheKey, scopes: &[CacheScope]) -> Result<CacheLookup, CacheError> {
        self.travel().await?;
        let found = self.world.tier.get(tenant, key, scopes);
        self.world.note_by(self.process, || {
            let found = found.entry.as_ref().and_then(|(entry, _)| mark(std::str::from_utf8(entry).ok()?));
            format!("looks for an answer under {:02x}{:02x}…: {found:?}", key.0[0], key.0[1])
        });
        self.world.check(|checks| checks.cache_looked(self.process, key.0, found.entry.is_some()));
        self.world.gate(self.process).await;
        Ok(found)
    }

    async fn put(
        &self,
        tenant: &TenantId,
        key: CacheKey,
        entry: &[u8],
        generation: u64,
        ttl: Duration,
    ) -> Result<(), CacheError> {
        self.travel().await?;
        let counts = self.world.tier.put(tenant, key, entry, generation, ttl);
        let mark = std::str::from_utf8(entry).ok().and_then(mark);
        self.world.note_by(self.process, || {
            format!("caches the answer of call {} under {:02x}{:02x}…", mark.unwrap_or(0), key.0[0], key.0[1])
        });
        self.world.book(|checks| checks.cache_put(key.0, mark, counts));
        self.world.gate(self.process).await;
        Ok(())
    }

    async fn evict(&self, tenant: &TenantId, key: CacheKey) -> Result<(), CacheError> {
        self.travel().await?;
        self.world.tier.lock().entries.remove(&(tenant.clone(), key.0));
        self.world.note_by(self.process, || "evicts an answer".to_owned());
        self.world.book(|checks| checks.cache_evicted(key.0));
        self.world.gate(self.process).await;
        Ok(())
    }

    async fn invalidate(&self, tenant: &TenantId, scope: &CacheScope) -> Result<u64, CacheError> {
        let kept = &mut *self.world.tier.lock();
        let generation = self.world.tier.start(kept, tenant) + 1;
        kept.generations.insert(tenant.clone(), generation);
        kept.floors.insert((tenant.clone(), scope.to_string()), generation);
        Ok(generation)
    }

    async fn ping(&self) -> Result<(), CacheError> {
        Ok(())
    }

    fn kind(&self) -> &'static str {
        "memory"
    }
}
