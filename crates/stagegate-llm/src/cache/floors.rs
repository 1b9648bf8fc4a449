//! What this process knows of generations and floors: owns how old that knowledge may be. With a shared tier the truth
//! is there and this is a memory of it; without one, this is the truth.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use stagegate_core::{
    ModelRef, PipelineName, StageId, TenantId,
    cache::{CacheLookup, CacheScope},
};
use tokio::time::Instant;

/// How old the knowledge of floors may be for a hit without asking the shared tier: an invalidation by another
/// replica is seen within this.
pub(crate) const FLOORS_FRESH_FOR: Duration = Duration::from_secs(1);
/// Readers whose floors are remembered, at most.
const READERS_MAX: usize = 4_096;
/// Scopes of one tenant whose own invalidations are remembered; past it they become one of the whole tenant.
const SCOPES_MAX: usize = 1_024;
/// The first generation where there is no shared tier.
const FIRST_GENERATION: u64 = 1;

/// Who reads: the scopes that an answer must not be stale in.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Reader {
    pub(crate) tenant: TenantId,
    pub(crate) pipeline: PipelineName,
    pub(crate) version: u32,
    pub(crate) stage: StageId,
    pub(crate) model: ModelRef,
}

impl Reader {
    pub(crate) fn scopes(&self) -> [CacheScope; 5] {
        [
            CacheScope::Tenant,
            CacheScope::Pipeline(self.pipeline.clone()),
            CacheScope::Version(self.pipeline.clone(), self.version),
            CacheScope::Stage(self.pipeline.clone(), self.stage.clone()),
            CacheScope::Model(self.model.clone()),
        ]
    }
}

/// What stands for a reader now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Standing {
    /// What an answer asked for from here on is stored under.
    pub(crate) generation: u64,
    /// Entries below it do not count.
    pub(crate) floor: u64,
    /// Whether the shared tier ever told the generation: only then may something be stored there.
    pub(crate) shared: bool,
}

#[derive(Debug, Default)]
struct Tenant {
    generation: u64,
    shared: bool,
    /// Invalidations made here, which the memory of the tier's floors may not know yet.
    own: HashMap<CacheScope, (u64, Instant)>,
}

#[derive(Debug, Clone, Copy)]
struct Known {
    floor: u64,
    at: Instant,
}

#[derive(Debug, Default)]
struct State {
    /// As many as there are tenants that ask: administrators make them, callers do not.
    tenants: HashMap<TenantId, Tenant>,
    readers: HashMap<Reader, Known>,
}

/// Generations by tenant, floors by reader.
#[derive(Debug)]
pub(crate) struct Floors {
    has_tier: bool,
    state: Mutex<State>,
}

impl Floors {
    pub(crate) fn new(has_tier: bool) -> Self {
        Self { has_tier, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn first(&self) -> Tenant {
        // Unknown with a tier: 0 is below every floor that the tier can have.
        Tenant { generation: if self.has_tier { 0 } else { FIRST_GENERATION }, ..Tenant::default() }
    }

    /// What stands by what is known here, and whether that is fresh enough to hit without asking the tier.
    pub(crate) fn standing(&self, reader: &Reader) -> (Standing, bool) {
        let state = self.lock();
        let known = state.readers.get(reader).copied();
        let fresh = !self.has_tier || known.is_some_and(|known| known.at.elapsed() <= FLOORS_FRESH_FOR);
        let Some(tenant) = state.tenants.get(&reader.tenant) else {
            let first = self.first();
            return (Standing { generation: first.generation, floor: 0, shared: false }, fresh);
        };
        let floor = known.map_or(0, |known| known.floor).max(tenant.own_floor(reader, known.map(|known| known.at)));
        (Standing { generation: tenant.generation, floor, shared: tenant.shared }, fresh)
    }

    /// Whether the tier told this reader's floors within this time, or there is none to tell any.
    pub(crate) fn is_known_within(&self, reader: &Reader, window: Duration) -> bool {
        !self.has_tier || self.lock().readers.get(reader).is_some_and(|known| known.at.elapsed() <= window)
    }

    /// Takes in what the tier told, asked at `asked`.
    pub(crate) fn learn(&self, reader: &Reader, lookup: &CacheLookup, asked: Instant) -> Standing {
        let mut state = self.lock();
        let State { tenants, readers } = &mut *state;
        let tenant = tenants.entry(reader.tenant.clone()).or_insert_with(|| self.first());
        (tenant.generation, tenant.shared) = (lookup.generation, true);
        let floor = lookup.floor.max(tenant.own_floor(reader, Some(asked)));
        if readers.len() >= READERS_MAX {
            readers.retain(|_, known| known.at.elapsed() <= FLOORS_FRESH_FOR);
        }
        if readers.len() >= READERS_MAX {
            readers.clear();
        }
        readers.insert(reader.clone(), Known { floor: lookup.floor, at: asked });
        Standing { generation: lookup.generation, floor, shared: true }
    }

    /// What stands, after the tier told it, without taking it in.
    pub(crate) fn weigh(&self, reader: &Reader, lookup: &CacheLookup, asked: Instant) -> Standing {
        let state = self.lock();
        let own = state.tenants.get(&reader.tenant).map_or(0, |tenant| tenant.own_floor(reader, Some(asked)));
        Standing { generation: lookup.generation, floor: lookup.floor.max(own), shared: true }
    }

    /// The generation that a purge of the whole tenant left as the lowest that counts, as far as this process knows.
    pub(crate) fn of_tenant(&self, tenant: &TenantId) -> u64 {
        let state = self.lock();
        let own = state.tenants.get(tenant).and_then(|tenant| tenant.own.get(&CacheScope::Tenant));
        own.map_or(0, |(floor, _)| *floor)
    }

    /// Notes an invalidation: under the generation that the tier gave it, or, without a tier, under the next one.
    pub(crate) fn invalidate(&self, tenant: &TenantId, scope: &CacheScope, generation: Option<u64>) {
        let mut state = self.lock();
        let tenant = state.tenants.entry(tenant.clone()).or_insert_with(|| self.first());
        let generation = generation.unwrap_or(tenant.generation + 1);
        (tenant.generation, tenant.shared) = (generation, self.has_tier);
        let mut scope = scope.clone();
        if tenant.own.len() >= SCOPES_MAX && !tenant.own.contains_key(&scope) {
            // Too much rather than too little: the whole tenant.
            tenant.own.clear();
            scope = CacheScope::Tenant;
        }
        // Of two at once the later generation may be told first.
        let earlier = tenant.own.get(&scope).map_or(0, |(floor, _)| *floor);
        tenant.own.insert(scope, (generation.max(earlier), Instant::now()));
    }
}

impl Tenant {
    /// The highest floor of invalidations made here that an answer of the tier asked for at `told` may not know.
    fn own_floor(&self, reader: &Reader, told: Option<Instant>) -> u64 {
        if self.own.is_empty() {
            return 0;
        }
        let unknown = |(floor, at): &(u64, Instant)| told.is_none_or(|told| told <= *at).then_some(*floor);
        reader.scopes().iter().filter_map(|scope| self.own.get(scope).and_then(unknown)).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader(stage: &str) -> Reader {
        Reader {
            tenant: TenantId::default(),
            pipeline: PipelineName::new("p").expect("a slug"),
            version: 1,
            stage: StageId::new(stage).expect("a slug"),
            model: ModelRef::new("sim/a").expect("a model"),
        }
    }

    fn told(generation: u64, floor: u64) -> CacheLookup {
        CacheLookup { generation, floor, entry: None }
    }

    #[tokio::test(start_paused = true)]
    async fn knowledge_of_the_tier_is_fresh_for_a_second() {
        let floors = Floors::new(true);
        assert!(!floors.standing(&reader("a")).1, "nothing is known yet");
        floors.learn(&reader("a"), &told(9, 7), Instant::now());
        let standing = Standing { generation: 9, floor: 7, shared: true };
        assert_eq!(floors.standing(&reader("a")), (standing, true));
        assert!(!floors.standing(&reader("b")).1, "of one reader nothing follows for another");
        tokio::time::advance(FLOORS_FRESH_FOR + Duration::from_millis(1)).await;
        assert_eq!(floors.standing(&reader("a")), (standing, false));
    }

    #[tokio::test(start_paused = true)]
    async fn an_invalidation_made_here_counts_at_once() {
        let floors = Floors::new(true);
        floors.learn(&reader("a"), &told(9, 7), Instant::now());
        let asked_before = Instant::now();
        let scope = CacheScope::Stage(reader("a").pipeline, reader("a").stage);
        floors.invalidate(&TenantId::default(), &scope, Some(10));
        assert_eq!(floors.standing(&reader("a")).0.floor, 10);
        assert_eq!(floors.standing(&reader("b")).0.floor, 0);
        let late = floors.learn(&reader("a"), &told(9, 7), asked_before);
        assert_eq!(late.floor, 10, "an answer of the tier from before does not undo it");
        tokio::time::advance(Duration::from_millis(1)).await;
        floors.learn(&reader("a"), &told(20, 12), Instant::now());
        assert_eq!(floors.standing(&reader("a")).0.floor, 12, "what the tier says later counts alone");
    }

    #[tokio::test(start_paused = true)]
    async fn of_two_invalidations_at_once_the_later_one_counts() {
        let floors = Floors::new(true);
        floors.learn(&reader("a"), &told(9, 7), Instant::now());
        floors.invalidate(&TenantId::default(), &CacheScope::Tenant, Some(11));
        floors.invalidate(&TenantId::default(), &CacheScope::Tenant, Some(10));
        assert_eq!(floors.standing(&reader("a")).0.floor, 11);
    }

    #[tokio::test]
    async fn without_a_tier_this_is_the_truth() {
        let floors = Floors::new(false);
        let before = floors.standing(&reader("a"));
        assert_eq!(before, (Standing { generation: 1, floor: 0, shared: false }, true));
        floors.invalidate(&TenantId::default(), &CacheScope::Model(reader("a").model), None);
        assert_eq!(floors.standing(&reader("a")).0, Standing { generation: 2, floor: 2, shared: false });
    }

    #[tokio::test]
    async fn many_invalidations_become_one_of_the_tenant() {
        let floors = Floors::new(false);
        for version in 0..=u32::try_from(SCOPES_MAX).expect("small") {
            floors.invalidate(&TenantId::default(), &CacheScope::Version(reader("a").pipeline, version + 2), None);
        }
        let standing = floors.standing(&reader("a")).0;
        assert_eq!(standing.floor, standing.generation);
        assert!(floors.lock().tenants[&TenantId::default()].own.len() <= SCOPES_MAX);
    }

    #[tokio::test]
    async fn readers_are_bounded() {
        let floors = Floors::new(true);
        for n in 0..2 * READERS_MAX {
            floors.learn(&reader(&format!("s{n}")), &told(1, 1), Instant::now());
        }
        assert!(floors.lock().readers.len() <= READERS_MAX);
    }
}
