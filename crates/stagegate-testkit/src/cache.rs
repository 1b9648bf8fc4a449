//! The contract suite of [`CacheTier`]: one function a promise, one test each by [`cache_tier_contract!`](crate::cache_tier_contract). Owns what
//! every shared tier must prove; knows no implementation.
//!
//! Every test works in tenants of its own (random names), so that tests may share a server.

#![expect(clippy::missing_panics_doc, reason = "a broken promise panics: that is what the suite is for")]

use std::{any::Any, sync::Arc, time::Duration};

use futures::future::{BoxFuture, join_all};
use stagegate_core::{
    ModelRef, PipelineName, StageId, TenantId,
    cache::{CacheKey, CacheLookup, CacheScope, CacheTier},
};
use uuid::Uuid;

/// Empties the tier as a flush or a lost file would: entries, generations and floors are gone.
pub type Reset = Box<dyn Fn() -> BoxFuture<'static, ()> + Send + Sync>;

/// A tier under test.
pub struct CacheFixture {
    /// The tier.
    pub tier: Arc<dyn CacheTier>,
    /// The same tier as another replica sees it: another handle with connections of its own.
    pub peer: Arc<dyn CacheTier>,
    /// Empties this fixture's tier, and nothing that another test uses.
    pub reset: Reset,
    /// What must outlive the test: a temporary directory, a server.
    pub keep: Box<dyn Any + Send>,
}

/// Makes one test of each promise. `$make` is a path to an `async fn() -> CacheFixture`.
///
/// ```ignore
/// mod contract {
///     stagegate_testkit::cache_tier_contract!(super::make);
/// }
/// ```
#[macro_export]
macro_rules! cache_tier_contract {
    ($make:path) => {
        $crate::cache_tier_contract! { @tests $make;
            a_key_that_was_never_stored_is_a_miss,
            what_was_stored_is_found,
            an_entry_is_never_served_past_its_ttl,
            a_later_entry_replaces_an_earlier_one,
            an_evicted_entry_is_gone,
            keys_that_differ_in_one_bit_are_two_keys,
            invalidating_a_tenant_reaches_all_its_readers,
            invalidating_a_pipeline_reaches_only_its_readers,
            invalidating_a_version_reaches_only_its_readers,
            invalidating_a_stage_reaches_only_its_readers,
            invalidating_a_model_reaches_only_its_readers,
            one_invalidation_makes_many_entries_stale,
            an_answer_asked_for_before_an_invalidation_does_not_count,
            an_answer_asked_for_after_an_invalidation_counts,
            generations_only_grow,
            the_floor_is_the_highest_of_the_scopes_asked_for,
            tenants_are_walls,
            a_flushed_tier_starts_above_everything_before_it,
            a_large_entry_comes_back_byte_by_byte,
            replicas_share_entries_and_invalidations,
            replicas_that_start_together_agree_on_a_generation,
            concurrent_writers_never_mix_their_entries,
            concurrent_invalidations_each_get_their_own_generation,
            it_answers_a_ping_and_says_what_it_is,
        }
    };
    (@tests $make:path; $($name:ident),+ $(,)?) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                $crate::cache::$name(&$make().await).await;
            }
        )+
    };
}

const HOUR: Duration = Duration::from_hours(1);

fn tenant() -> TenantId {
    TenantId::new(format!("t-{}", Uuid::new_v4().simple())).expect("a slug")
}

fn key(n: u64) -> CacheKey {
    let mut bytes = [0xA5; 32];
    bytes[..8].copy_from_slice(&n.to_be_bytes());
    CacheKey(bytes)
}

fn pipeline(name: &str) -> PipelineName {
    PipelineName::new(name).expect("a slug")
}

fn stage(id: &str) -> StageId {
    StageId::new(id).expect("a slug")
}

fn model(name: &str) -> ModelRef {
    ModelRef::new(name).expect("a model")
}

/// The scopes of a reader: those that the engine asks with.
fn reader(name: &str, version: u32, id: &str, answers: &str) -> Vec<CacheScope> {
    vec![
        CacheScope::Tenant,
        CacheScope::Pipeline(pipeline(name)),
        CacheScope::Version(pipeline(name), version),
        CacheScope::Stage(pipeline(name), stage(id)),
        CacheScope::Model(model(answers)),
    ]
}

async fn look(tier: &dyn CacheTier, of: &TenantId, key: CacheKey, scopes: &[CacheScope]) -> CacheLookup {
    tier.get(of, key, scopes).await.expect("a look-up")
}

/// The entry alone.
async fn read(tier: &dyn CacheTier, of: &TenantId, key: CacheKey, scopes: &[CacheScope]) -> Option<Vec<u8>> {
    look(tier, of, key, scopes).await.entry.map(|(bytes, _)| bytes)
}

/// Asks, misses or not, and stores: what the engine does on a miss.
async fn store(tier: &dyn CacheTier, of: &TenantId, key: CacheKey, scopes: &[CacheScope], entry: &[u8]) -> u64 {
    let generation = look(tier, of, key, scopes).await.generation;
    tier.put(of, key, entry, generation, HOUR).await.expect("a put");
    generation
}

/// A miss tells the generation to store under, and its floor is not above it.
pub async fn a_key_that_was_never_stored_is_a_miss(fixture: &CacheFixture) {
    let (of, scopes) = (tenant(), reader("p", 1, "s", "sim/a"));
    let found = look(&*fixture.tier, &of, key(1), &scopes).await;
    assert_eq!(found.entry, None);
    assert!(found.generation > 0, "a generation starts at the clock");
    assert_eq!(found.floor, found.generation, "a fresh generation is noted as the tenant's floor");
    assert_eq!(look(&*fixture.tier, &of, key(2), &scopes).await, found, "and stays until something is invalidated");
}

/// A hit has the bytes and the generation that they were stored under, as often as it is asked for.
pub async fn what_was_stored_is_found(fixture: &CacheFixture) {
    let (of, scopes) = (tenant(), reader("p", 1, "s", "sim/a"));
    let generation = store(&*fixture.tier, &of, key(1), &scopes, b"one").await;
    for _ in 0..3 {
        let found = look(&*fixture.tier, &of, key(1), &scopes).await;
        assert_eq!(found.entry, Some((b"one".to_vec(), generation)));
        assert_eq!(found.generation, generation);
    }
    fixture.tier.put(&of, key(2), b"", generation, HOUR).await.expect("an empty entry");
    assert_eq!(read(&*fixture.tier, &of, key(2), &scopes).await, Some(Vec::new()));
    let longest = stagegate_core::pipeline::SPAN_MAX;
    fixture.tier.put(&of, key(3), b"long", generation, longest).await.expect("the longest time to live");
    assert_eq!(read(&*fixture.tier, &of, key(3), &scopes).await, Some(b"long".to_vec()));
}

/// An entry with a tiny TTL goes and does not come back; one beside it stays.
pub async fn an_entry_is_never_served_past_its_ttl(fixture: &CacheFixture) {
    let (of, scopes) = (tenant(), reader("p", 1, "s", "sim/a"));
    let generation = store(&*fixture.tier, &of, key(1), &scopes, b"stays").await;
    fixture.tier.put(&of, key(2), b"goes", generation, Duration::from_millis(30)).await.expect("a put");
    let gone = async {
        while read(&*fixture.tier, &of, key(2), &scopes).await.is_some() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), gone).await.expect("it expires");
    fixture.tier.put(&of, key(3), b"another", generation, HOUR).await.expect("a put");
    assert_eq!(read(&*fixture.tier, &of, key(2), &scopes).await, None);
    assert_eq!(read(&*fixture.peer, &of, key(2), &scopes).await, None);
    assert_eq!(read(&*fixture.tier, &of, key(1), &scopes).await, Some(b"stays".to_vec()));
}

/// The last entry counts, with its own TTL.
pub async fn a_later_entry_replaces_an_earlier_one(fixture: &CacheFixture) {
    let (of, scopes) = (tenant(), reader("p", 1, "s", "sim/a"));
    let first = store(&*fixture.tier, &of, key(1), &scopes, b"a long first entry").await;
    fixture.tier.put(&of, key(1), b"second", first, HOUR).await.expect("a put");
    assert_eq!(read(&*fixture.tier, &of, key(1), &scopes).await, Some(b"second".to_vec()));

    fixture.tier.invalidate(&of, &CacheScope::Model(model("sim/a"))).await.expect("an invalidation");
    let second = store(&*fixture.tier, &of, key(1), &scopes, b"third").await;
    assert!(second > first);
    let found = look(&*fixture.tier, &of, key(1), &scopes).await;
    assert_eq!(found.entry, Some((b"third".to_vec(), second)));
}

/// Eviction removes one key, and evicting what is not there is no error.
pub async fn an_evicted_entry_is_gone(fixture: &CacheFixture) {
    let (of, scopes) = (tenant(), reader("p", 1, "s", "sim/a"));
    store(&*fixture.tier, &of, key(1), &scopes, b"one").await;
    store(&*fixture.tier, &of, key(2), &scopes, b"two").await;
    fixture.tier.evict(&of, key(1)).await.expect("an eviction");
    fixture.tier.evict(&of, key(1)).await.expect("an eviction of nothing");
    assert_eq!(read(&*fixture.tier, &of, key(1), &scopes).await, None);
    assert_eq!(read(&*fixture.tier, &of, key(2), &scopes).await, Some(b"two".to_vec()));
    store(&*fixture.tier, &of, key(1), &scopes, b"again").await;
    assert_eq!(read(&*fixture.tier, &of, key(1), &scopes).await, Some(b"again".to_vec()));
}

/// All 256 bits count.
pub async fn keys_that_differ_in_one_bit_are_two_keys(fixture: &CacheFixture) {
    let (of, scopes) = (tenant(), reader("p", 1, "s", "sim/a"));
    store(&*fixture.tier, &of, key(1), &scopes, b"one").await;
    for byte in 0..32 {
        let mut other = key(1);
        other.0[byte] ^= 0x80;
        assert_eq!(read(&*fixture.tier, &of, other, &scopes).await, None, "byte {byte}");
    }
    for (n, bytes) in [[0x00; 32], [0xFF; 32]].into_iter().enumerate() {
        let entry = [u8::try_from(n).expect("small")];
        store(&*fixture.tier, &of, CacheKey(bytes), &scopes, &entry).await;
        assert_eq!(read(&*fixture.tier, &of, CacheKey(bytes), &scopes).await, Some(entry.to_vec()));
    }
}

/// Stores one entry per reader, invalidates `scope`, and compares who still hits.
async fn invalidation_reaches(fixture: &CacheFixture, scope: CacheScope, readers: &[(Vec<CacheScope>, bool)]) {
    let (of, tier) = (tenant(), &*fixture.tier);
    for (n, (scopes, _)) in readers.iter().enumerate() {
        store(tier, &of, key(n as u64), scopes, b"entry").await;
    }
    tier.invalidate(&of, &scope).await.expect("an invalidation");
    for (n, (scopes, reached)) in readers.iter().enumerate() {
        let hit = read(tier, &of, key(n as u64), scopes).await.is_some();
        assert_eq!(hit, !reached, "invalidating {scope}: reader {n} in {scopes:?}");
    }
    // What is stored from here on counts again, for everybody.
    for (n, (scopes, _)) in readers.iter().enumerate() {
        store(tier, &of, key(n as u64), scopes, b"anew").await;
        assert_eq!(read(tier, &of, key(n as u64), scopes).await, Some(b"anew".to_vec()), "reader {n}");
    }
}

/// Scope: the whole tenant.
pub async fn invalidating_a_tenant_reaches_all_its_readers(fixture: &CacheFixture) {
    let readers = [(reader("p", 1, "s", "sim/a"), true), (reader("q", 2, "r", "sim/b"), true)];
    invalidation_reaches(fixture, CacheScope::Tenant, &readers).await;
}

/// Scope: a pipeline. Names that begin alike, or that are elsewhere a stage, are others.
pub async fn invalidating_a_pipeline_reaches_only_its_readers(fixture: &CacheFixture) {
    let readers = [
        (reader("p", 1, "s", "sim/a"), true),
        (reader("p", 2, "r", "sim/b"), true),
        (reader("p-2", 1, "s", "sim/a"), false),
        (reader("q", 1, "p", "sim/p"), false),
    ];
    invalidation_reaches(fixture, CacheScope::Pipeline(pipeline("p")), &readers).await;
}

/// Scope: a version. Another version, and a stage whose id is the number, are others.
pub async fn invalidating_a_version_reaches_only_its_readers(fixture: &CacheFixture) {
    let readers = [
        (reader("p", 1, "s", "sim/a"), true),
        (reader("p", 1, "r", "sim/b"), true),
        (reader("p", 2, "1", "sim/a"), false),
        (reader("p", 11, "s", "sim/a"), false),
        (reader("q", 1, "s", "sim/a"), false),
    ];
    invalidation_reaches(fixture, CacheScope::Version(pipeline("p"), 1), &readers).await;
}

/// Scope: a stage, in every version of its pipeline.
pub async fn invalidating_a_stage_reaches_only_its_readers(fixture: &CacheFixture) {
    let readers = [
        (reader("p", 1, "s", "sim/a"), true),
        (reader("p", 2, "s", "sim/b"), true),
        (reader("p", 1, "s2", "sim/a"), false),
        (reader("q", 1, "s", "sim/a"), false),
        (reader("s", 1, "p", "sim/s"), false),
    ];
    invalidation_reaches(fixture, CacheScope::Stage(pipeline("p"), stage("s")), &readers).await;
}

/// Scope: a model, in every pipeline. The name is compared whole, whatever characters it has.
pub async fn invalidating_a_model_reaches_only_its_readers(fixture: &CacheFixture) {
    let readers = [
        (reader("p", 1, "s", "local/meta/llama:3*"), true),
        (reader("q", 2, "r", "local/meta/llama:3*"), true),
        (reader("p", 1, "s", "local/meta/llama:3"), false),
        (reader("p", 1, "s", "other/meta/llama:3*"), false),
    ];
    invalidation_reaches(fixture, CacheScope::Model(model("local/meta/llama:3*")), &readers).await;
}

/// Every entry of the scope is stale at once, and none of the others.
pub async fn one_invalidation_makes_many_entries_stale(fixture: &CacheFixture) {
    const ENTRIES: u64 = 400;
    let (of, tier) = (tenant(), &*fixture.tier);
    let scopes = [reader("p", 1, "s", "sim/a"), reader("p", 1, "r", "sim/a")];
    let generation = look(tier, &of, key(0), &scopes[0]).await.generation;
    for n in 0..ENTRIES {
        tier.put(&of, key(n), &n.to_be_bytes(), generation, HOUR).await.expect("a put");
    }
    tier.invalidate(&of, &CacheScope::Stage(pipeline("p"), stage("s"))).await.expect("an invalidation");
    for n in 0..ENTRIES {
        let [stale, fresh] = [&scopes[0], &scopes[1]];
        assert_eq!(read(tier, &of, key(n), fresh).await, Some(n.to_be_bytes().to_vec()));
        assert_eq!(read(tier, &of, key(n), stale).await, None);
    }
}

/// The race that a time of storing could not decide: asked before, stored after.
pub async fn an_answer_asked_for_before_an_invalidation_does_not_count(fixture: &CacheFixture) {
    let (of, scopes, tier) = (tenant(), reader("p", 1, "s", "sim/a"), &*fixture.tier);
    let asked = look(tier, &of, key(1), &scopes).await.generation;
    tier.invalidate(&of, &CacheScope::Pipeline(pipeline("p"))).await.expect("an invalidation");
    tier.put(&of, key(1), b"old", asked, HOUR).await.expect("a put");
    let found = look(tier, &of, key(1), &scopes).await;
    assert_eq!(found.entry, None);
    assert!(found.floor > asked);
    // A reader that the invalidation does not concern may have it.
    assert_eq!(read(tier, &of, key(1), &reader("q", 1, "s", "sim/a")).await, Some(b"old".to_vec()));
}

/// The generation that an invalidation returns is the one that counts from then on.
pub async fn an_answer_asked_for_after_an_invalidation_counts(fixture: &CacheFixture) {
    let (of, scopes, tier) = (tenant(), reader("p", 1, "s", "sim/a"), &*fixture.tier);
    let generation =
        tier.invalidate(&of, &CacheScope::Stage(pipeline("p"), stage("s"))).await.expect("on a fresh tier");
    let found = look(tier, &of, key(1), &scopes).await;
    assert_eq!((found.generation, found.floor), (generation, generation));
    tier.put(&of, key(1), b"new", found.generation, HOUR).await.expect("a put");
    assert_eq!(read(tier, &of, key(1), &scopes).await, Some(b"new".to_vec()));
}

/// Each invalidation moves the generation on, whatever its scope, even the same scope again.
pub async fn generations_only_grow(fixture: &CacheFixture) {
    let (of, scopes, tier) = (tenant(), reader("p", 1, "s", "sim/a"), &*fixture.tier);
    let mut last = look(tier, &of, key(1), &scopes).await.generation;
    for scope in scopes.iter().chain(&scopes) {
        let next = tier.invalidate(&of, scope).await.expect("an invalidation");
        assert!(next > last, "{scope}: {next} after {last}");
        assert_eq!(look(tier, &of, key(1), &scopes).await.generation, next);
        last = next;
    }
}

/// So that a tier nearer to the reader can drop what it holds.
pub async fn the_floor_is_the_highest_of_the_scopes_asked_for(fixture: &CacheFixture) {
    let (of, tier) = (tenant(), &*fixture.tier);
    let (one, two) = (reader("p", 1, "s", "sim/a"), reader("q", 1, "s", "sim/b"));
    let start = look(tier, &of, key(1), &one).await.floor;
    let first = tier.invalidate(&of, &CacheScope::Model(model("sim/a"))).await.expect("an invalidation");
    assert_eq!(look(tier, &of, key(1), &one).await.floor, first);
    assert_eq!(look(tier, &of, key(1), &two).await.floor, start);
    let second = tier.invalidate(&of, &CacheScope::Pipeline(pipeline("q"))).await.expect("an invalidation");
    assert_eq!(look(tier, &of, key(1), &one).await.floor, first);
    assert_eq!(look(tier, &of, key(1), &two).await.floor, second);
    let third = tier.invalidate(&of, &CacheScope::Tenant).await.expect("an invalidation");
    assert_eq!(look(tier, &of, key(1), &one).await.floor, third);
    assert_eq!(look(tier, &of, key(1), &two).await.floor, third);
}

/// The same key in two tenants is two entries; nothing done to one is felt by the other.
pub async fn tenants_are_walls(fixture: &CacheFixture) {
    let (mine, yours, tier) = (tenant(), tenant(), &*fixture.tier);
    let scopes = reader("p", 1, "s", "sim/a");
    store(tier, &mine, key(1), &scopes, b"mine").await;
    assert_eq!(read(tier, &yours, key(1), &scopes).await, None);
    store(tier, &yours, key(1), &scopes, b"yours").await;
    assert_eq!(read(tier, &mine, key(1), &scopes).await, Some(b"mine".to_vec()));

    let before = look(tier, &yours, key(1), &scopes).await;
    for scope in &scopes {
        tier.invalidate(&mine, scope).await.expect("an invalidation");
    }
    tier.evict(&mine, key(1)).await.expect("an eviction");
    assert_eq!(look(tier, &yours, key(1), &scopes).await, before);
    assert_eq!(read(tier, &mine, key(1), &scopes).await, None);
}

/// What was stored, or is still on its way with a generation from before, does not count after a flush.
pub async fn a_flushed_tier_starts_above_everything_before_it(fixture: &CacheFixture) {
    let (of, scopes, tier) = (tenant(), reader("p", 1, "s", "sim/a"), &*fixture.tier);
    let before = tier.invalidate(&of, &CacheScope::Tenant).await.expect("an invalidation");
    store(tier, &of, key(1), &scopes, b"before").await;
    (fixture.reset)().await;

    let found = look(tier, &of, key(1), &scopes).await;
    assert_eq!(found.entry, None);
    assert!(found.floor > before, "the floor {} is not above {before}", found.floor);
    assert_eq!(found.floor, found.generation);
    tier.put(&of, key(1), b"late", before, HOUR).await.expect("a put");
    assert_eq!(read(tier, &of, key(1), &scopes).await, None, "stored late, under a generation from before");
    store(tier, &of, key(1), &scopes, b"after").await;
    assert_eq!(read(tier, &of, key(1), &scopes).await, Some(b"after".to_vec()));
}

/// 1 MiB with every byte value.
pub async fn a_large_entry_comes_back_byte_by_byte(fixture: &CacheFixture) {
    let (of, scopes, tier) = (tenant(), reader("p", 1, "s", "sim/a"), &*fixture.tier);
    let entry: Vec<u8> = (0..1024 * 1024_u32).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
    store(tier, &of, key(1), &scopes, &entry).await;
    let found = read(tier, &of, key(1), &scopes).await.expect("a hit");
    assert_eq!(found.len(), entry.len());
    assert!(found == entry, "the bytes differ");
}

/// Two handles, one tier.
pub async fn replicas_share_entries_and_invalidations(fixture: &CacheFixture) {
    let (of, scopes) = (tenant(), reader("p", 1, "s", "sim/a"));
    store(&*fixture.tier, &of, key(1), &scopes, b"one").await;
    assert_eq!(read(&*fixture.peer, &of, key(1), &scopes).await, Some(b"one".to_vec()));
    let generation = fixture.peer.invalidate(&of, &CacheScope::Tenant).await.expect("an invalidation");
    let found = look(&*fixture.tier, &of, key(1), &scopes).await;
    assert_eq!((found.entry, found.generation), (None, generation));
    store(&*fixture.peer, &of, key(1), &scopes, b"two").await;
    fixture.tier.evict(&of, key(1)).await.expect("an eviction");
    assert_eq!(read(&*fixture.peer, &of, key(1), &scopes).await, None);
}

/// The first look-ups race to set the generation; one wins and all use it.
pub async fn replicas_that_start_together_agree_on_a_generation(fixture: &CacheFixture) {
    let (of, scopes) = (tenant(), reader("p", 1, "s", "sim/a"));
    let lookups = (0..16).map(|n| {
        let tier = if n % 2 == 0 { &fixture.tier } else { &fixture.peer };
        look(&**tier, &of, key(1), &scopes)
    });
    let found = join_all(lookups).await;
    assert!(found.iter().all(|each| *each == found[0]), "{found:?}");
}

/// Sixteen writers on four keys: whatever is read was written whole by one of them.
pub async fn concurrent_writers_never_mix_their_entries(fixture: &CacheFixture) {
    let (of, scopes) = (tenant(), reader("p", 1, "s", "sim/a"));
    let generation = look(&*fixture.tier, &of, key(0), &scopes).await.generation;
    let writers = (0..16_u8).map(|writer| {
        let tier = if writer % 2 == 0 { &fixture.tier } else { &fixture.peer };
        let (of, scopes) = (&of, &scopes);
        async move {
            for round in 0..10_u64 {
                let at = key((u64::from(writer) + round) % 4);
                tier.put(of, at, &vec![writer; 1000 + usize::from(writer)], generation, HOUR).await.expect("a put");
                let found = read(&**tier, of, at, scopes).await.expect("a hit");
                assert_eq!(found.len(), 1000 + usize::from(found[0]));
                assert!(found.iter().all(|byte| *byte == found[0]), "two writers' bytes in one entry");
            }
        }
    });
    join_all(writers).await;
}

/// Two at once never share a generation: each moves it on.
pub async fn concurrent_invalidations_each_get_their_own_generation(fixture: &CacheFixture) {
    let of = tenant();
    let invalidations = (0..16).map(|n| {
        let tier = if n % 2 == 0 { &fixture.tier } else { &fixture.peer };
        let scope = CacheScope::Stage(pipeline("p"), stage(&format!("s{}", n % 3)));
        let of = &of;
        async move { tier.invalidate(of, &scope).await.expect("an invalidation") }
    });
    let mut generations = join_all(invalidations).await;
    generations.sort_unstable();
    let highest = generations[15];
    generations.dedup();
    assert_eq!(generations.len(), 16, "{generations:?}");
    let found = look(&*fixture.tier, &of, key(1), &reader("p", 1, "s0", "sim/a")).await;
    assert_eq!(found.generation, highest);
}

/// For `/readyz` and the metrics.
pub async fn it_answers_a_ping_and_says_what_it_is(fixture: &CacheFixture) {
    fixture.tier.ping().await.expect("a ping");
    assert!(["redis", "sqlite"].contains(&fixture.tier.kind()), "{}", fixture.tier.kind());
}
