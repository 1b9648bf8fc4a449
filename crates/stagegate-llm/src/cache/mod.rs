//! The answer cache: owns which answer may be reused, by whom, and for how long. Two levels: this process, and a
//! shared tier (Redis, or the SQLite file) where there is one. Nothing here is ever an error to the caller: a tier that
//! fails or hangs is a miss, and a breaker spares it.

pub(crate) mod entry;
pub(crate) mod floors;
mod local;
pub(crate) mod redis;

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use stagegate_core::{
    Clock, Code, Error, Origin, TenantId,
    cache::{CacheError, CacheKey, CacheLookup, CacheScope, CacheTier, CacheUsage},
    pipeline::Span,
};
use tokio::time::{Instant, timeout};

use self::{
    entry::{Entry, Only},
    floors::{Floors, Reader, Standing},
    local::{Held, Local},
};
use crate::{
    breaker::{Breaker, BreakerState},
    config::{BreakerConfig, LlmConfig},
    meter::Meter,
};

/// Failures of the shared tier in a row that open its breaker.
const TIER_FAILURES_MAX: usize = 3;
/// How long the shared tier is spared before one look-up probes it.
pub(crate) const TIER_OPEN_FOR: Duration = Duration::from_secs(5);
/// How long an operator's invalidation may wait for the tier: longer than a look-up, since it must not be skipped.
const INVALIDATE_TIMEOUT: Duration = Duration::from_secs(2);

/// One look-up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Look<'a> {
    pub(crate) reader: &'a Reader,
    pub(crate) key: CacheKey,
    /// The oldest answer that the reader accepts.
    pub(crate) ttl: Duration,
    /// Where it is given, only what these bought counts.
    pub(crate) only: Option<Only<'a>>,
}

/// What a look-up found.
#[derive(Debug, Clone)]
pub(crate) enum Found {
    Hit(Arc<Entry>, Origin),
    /// Nothing; an answer asked for now is stored under this standing.
    Miss(Standing),
}

/// Both levels.
#[derive(Debug)]
pub(crate) struct AnswerCache {
    local: Local,
    floors: Floors,
    tier: Option<Spared>,
    /// How long an invalidation may go unnoticed while the tier is away.
    window: Duration,
    clock: DebugClock,
    meter: Meter,
}

struct DebugClock(Arc<dyn Clock>);

impl std::fmt::Debug for DebugClock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Clock")
    }
}

impl AnswerCache {
    pub(crate) fn new(
        config: &LlmConfig,
        tier: Option<Arc<dyn CacheTier>>,
        clock: Arc<dyn Clock>,
        meter: Meter,
    ) -> Self {
        Self {
            local: Local::new(config.local_cache_max_bytes),
            floors: Floors::new(tier.is_some()),
            tier: tier.map(|tier| Spared::new(tier, config.shared_cache_timeout.0)),
            window: config.shared_cache_window.0,
            clock: DebugClock(clock),
            meter,
        }
    }

    pub(crate) fn now_ms(&self) -> i64 {
        self.clock.0.now().timestamp_millis()
    }

    /// Looks in this process, then in the shared tier. At most one round trip; none where a local answer is there and
    /// the floors are freshly known.
    pub(crate) async fn find(&self, look: Look<'_>) -> Found {
        self.look_up(look, true).await
    }

    /// The same, leaving no trace: nothing is counted, learnt, promoted or removed.
    pub(crate) async fn peek(&self, look: Look<'_>) -> Option<(Arc<Entry>, Origin)> {
        match self.look_up(look, false).await {
            Found::Hit(entry, origin) => Some((entry, origin)),
            Found::Miss(_) => None,
        }
    }

    /// What this process holds, without asking anybody.
    pub(crate) fn find_local(&self, look: Look<'_>) -> Option<Arc<Entry>> {
        let (standing, _) = self.floors.standing(look.reader);
        let held = self.local.get(&look.reader.tenant, look.key)?;
        (held.generation >= standing.floor && self.suits(look, &held.entry) && self.is_bounded(look, &held.entry))
            .then(|| Arc::clone(&held.entry))
    }

    /// Whether an answer held here cannot be stale for longer than the window: the tier told of invalidations within it,
    /// or the answer is younger. What only the run that bought it reads is never stale for that run.
    fn is_bounded(&self, look: Look<'_>, entry: &Entry) -> bool {
        look.only.is_some()
            || self.floors.is_known_within(look.reader, self.window)
            || entry.life_left(self.now_ms(), self.window).is_some()
    }

    fn suits(&self, look: Look<'_>, entry: &Entry) -> bool {
        look.only.is_none_or(|only| entry.is_by(only)) && entry.life_left(self.now_ms(), look.ttl).is_some()
    }

    async fn look_up(&self, look: Look<'_>, trace: bool) -> Found {
        let (standing, fresh) = self.floors.standing(look.reader);
        let held = self.local.get(&look.reader.tenant, look.key);
        let counts =
            held.as_ref().is_some_and(|held| held.generation >= standing.floor && self.suits(look, &held.entry));
        let asked = Instant::now();
        let told = match &self.tier {
            Some(tier) if !(fresh && counts) => {
                let scopes = look.reader.scopes();
                let told = tier.attempt(tier.tier.get(&look.reader.tenant, look.key, &scopes)).await;
                if let (Some(Err(_)), true) = (&told, trace) {
                    self.meter.cache_lookup("shared", "error");
                }
                told.and_then(Result::ok)
            }
            _ => None,
        };
        let Some(told) = told else {
            return self.settle_local(look, held, standing, trace);
        };
        let standing = if trace {
            self.floors.learn(look.reader, &told, asked)
        } else {
            self.floors.weigh(look.reader, &told, asked)
        };
        self.settle_shared(look, held, told, standing, trace).await
    }

    /// Without word from the tier: what is held counts by what is known of the floors.
    fn settle_local(&self, look: Look<'_>, held: Option<Arc<Held>>, standing: Standing, trace: bool) -> Found {
        let Some(held) = held else {
            if trace {
                self.meter.cache_lookup("local", "miss");
            }
            return Found::Miss(standing);
        };
        if held.generation >= standing.floor && self.suits(look, &held.entry) && self.is_bounded(look, &held.entry) {
            if trace {
                self.meter.cache_lookup("local", "hit");
            }
            return Found::Hit(Arc::clone(&held.entry), Origin::CacheLocal);
        }
        if trace {
            self.meter.cache_lookup("local", "stale");
        }
        Found::Miss(standing)
    }

    /// With the tier's word: its answer counts, unless this process holds the same one, or one that could not be shared
    /// yet. One that the tier had and has no more was evicted, or its time is over.
    async fn settle_shared(
        &self,
        look: Look<'_>,
        held: Option<Arc<Held>>,
        told: CacheLookup,
        standing: Standing,
        trace: bool,
    ) -> Found {
        let tenant = &look.reader.tenant;
        let had_entry = told.entry.is_some();
        let shared = told.entry.and_then(|(bytes, generation)| {
            Entry::decode(&bytes, &look.reader.model, look.key).map(|entry| (Arc::new(entry), generation))
        });
        if had_entry && shared.is_none() && trace {
            // Not ours, or broken: out of the way of the next reader. Should this fail, the next write replaces it.
            if let Some(tier) = &self.tier {
                tier.attempt(tier.tier.evict(tenant, look.key)).await;
            }
        }
        let had_held = held.is_some();
        let held = held.filter(|held| held.generation >= standing.floor && (shared.is_some() || !held.is_shared()));
        let local_counts = held.as_ref().is_some_and(|held| {
            let is_current = |shared: &Entry| {
                // What was shared and is another one there now was replaced, whatever the clocks of replicas say.
                let (ours, theirs) = (held.entry.stored_at_ms(), shared.stored_at_ms());
                ours == theirs || (ours > theirs && !held.is_shared())
            };
            self.suits(look, &held.entry) && shared.as_ref().is_none_or(|(shared, _)| is_current(shared))
        });
        if trace {
            self.meter.cache_lookup("local", if local_counts { "hit" } else { "miss" });
        }
        if let (Some(held), true) = (&held, local_counts) {
            return Found::Hit(Arc::clone(&held.entry), Origin::CacheLocal);
        }
        if had_held && held.is_none() && trace {
            self.local.remove(tenant, look.key);
        }
        let usable =
            shared.as_ref().filter(|(entry, generation)| *generation >= standing.floor && self.suits(look, entry));
        if trace {
            let outcome = match (&usable, &shared) {
                (Some(_), _) => "hit",
                (None, Some(_)) => "stale",
                (None, None) => "miss",
            };
            self.meter.cache_lookup("shared", outcome);
        }
        let Some((entry, generation)) = usable else { return Found::Miss(standing) };
        if trace && let Some(life) = entry.life_left(self.now_ms(), Duration::MAX) {
            self.local.insert(tenant, look.key, Arc::clone(entry), *generation, true, life);
        }
        Found::Hit(Arc::clone(entry), Origin::CacheShared)
    }

    /// Stores an answer in both levels, under the standing that its look-up gave. Once begun it is not abandoned,
    /// whatever happens to the caller: the answer is paid for.
    pub(crate) async fn store(self: &Arc<Self>, tenant: &TenantId, key: CacheKey, entry: Entry, standing: Standing) {
        let Some(life) = entry.life_left(self.now_ms(), Duration::MAX) else { return };
        let entry = Arc::new(entry.under(key));
        let held = self.local.insert(tenant, key, Arc::clone(&entry), standing.generation, false, life);
        self.meter.cache_write("local", true);
        if self.tier.is_none() || !standing.shared {
            return;
        }
        let (cache, tenant) = (Arc::clone(self), tenant.clone());
        let writing = async move {
            let Some(tier) = &cache.tier else { return };
            let put = async {
                // Encoded here, so that a large answer is not copied where the breaker is open.
                tier.tier.put(&tenant, key, &entry.encode(), standing.generation, life).await
            };
            if let Some(done) = tier.attempt(put).await {
                cache.meter.cache_write("shared", done.is_ok());
                if done.is_ok() {
                    held.mark_shared();
                }
            }
        };
        Unabandoned(Some(Box::pin(writing))).await;
    }

    /// The generation under which a stored answer counts, and the answer, wherever it is.
    pub(crate) async fn stored(&self, look: Look<'_>) -> Option<(Arc<Entry>, Standing)> {
        let (mut standing, _) = self.floors.standing(look.reader);
        if let Some(held) = self.local.get(&look.reader.tenant, look.key) {
            standing.generation = held.generation;
            let counts = held.generation >= standing.floor && self.suits(look, &held.entry);
            return counts.then(|| (Arc::clone(&held.entry), standing));
        }
        let tier = self.tier.as_ref()?;
        let told = tier.attempt(tier.tier.get(&look.reader.tenant, look.key, &look.reader.scopes())).await?.ok()?;
        let (bytes, generation) = told.entry?;
        let entry = Entry::decode(&bytes, &look.reader.model, look.key).filter(|entry| self.suits(look, entry))?;
        Some((Arc::new(entry), Standing { generation, floor: told.floor, shared: true }))
    }

    /// Removes an answer from both levels: its gate failed.
    pub(crate) async fn evict(&self, tenant: &TenantId, key: CacheKey) {
        self.local.remove(tenant, key);
        self.meter.cache_eviction("gate");
        if let Some(tier) = &self.tier {
            tier.attempt(tier.tier.evict(tenant, key)).await;
        }
    }

    /// Makes a scope stale. An unreachable tier is an error: others would go on to use what it holds.
    pub(crate) async fn invalidate(&self, tenant: &TenantId, scope: &CacheScope) -> Result<(), Error> {
        let generation = match &self.tier {
            None => None,
            Some(tier) => match tier.insist(tier.tier.invalidate(tenant, scope)).await {
                Ok(generation) => Some(generation),
                Err(error) => {
                    // What can be done here is done: this process forgets everything.
                    self.local.clear();
                    let detail = format!("nothing was invalidated beyond this replica: {error}; try again");
                    return Err(Error::new(Code::CacheUnavailable, detail).retry_after(TIER_OPEN_FOR));
                }
            },
        };
        self.floors.invalidate(tenant, scope, generation);
        self.meter.cache_eviction("invalidate");
        Ok(())
    }

    /// How much is kept of a tenant here, and in the tier; of that None where it does not tell.
    pub(crate) async fn usage(&self, tenant: &TenantId) -> (CacheUsage, Option<(&'static str, Option<CacheUsage>)>) {
        let local = self.local.usage(tenant, self.floors.of_tenant(tenant));
        let Some(tier) = &self.tier else { return (local, None) };
        let told = tier.attempt(tier.tier.usage(tenant)).await;
        (local, Some((tier.tier.kind(), told.and_then(Result::ok).flatten())))
    }

    /// The tier's kind, and how long a ping took or why it failed.
    pub(crate) async fn ping(&self) -> Option<(&'static str, Result<Duration, String>)> {
        let tier = self.tier.as_ref()?;
        let started = Instant::now();
        let answer = match timeout(tier.timeout, tier.tier.ping()).await {
            Ok(Ok(())) => Ok(started.elapsed()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(no_answer(tier.timeout).to_string()),
        };
        Some((tier.tier.kind(), answer))
    }
}

/// Work that goes on when whoever awaits it goes away: as a task of its own from then on, and without one before.
struct Unabandoned(Option<Pin<Box<dyn Future<Output = ()> + Send>>>);

impl Future for Unabandoned {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        // Taken out, so that work that panicked is not taken up again.
        let Some(mut work) = self.0.take() else { return Poll::Ready(()) };
        let polled = work.as_mut().poll(context);
        if polled.is_pending() {
            self.0 = Some(work);
        }
        polled
    }
}

impl Drop for Unabandoned {
    fn drop(&mut self) {
        if let (Some(work), Ok(runtime)) = (self.0.take(), tokio::runtime::Handle::try_current()) {
            runtime.spawn(work);
        }
    }
}

fn no_answer(limit: Duration) -> CacheError {
    CacheError(format!("no answer within {}", Span(limit)))
}

/// The shared tier behind a short timeout and a breaker.
#[derive(Debug)]
struct Spared {
    tier: Arc<dyn CacheTier>,
    timeout: Duration,
    breaker: Breaker,
}

impl Spared {
    fn new(tier: Arc<dyn CacheTier>, timeout: Duration) -> Self {
        // As many calls as the window holds, all failed: failures in a row.
        let config = BreakerConfig {
            window_calls: TIER_FAILURES_MAX,
            min_calls: TIER_FAILURES_MAX,
            failure_rate: 1.0,
            open_for: Span(TIER_OPEN_FOR),
            ..BreakerConfig::default()
        };
        Self { tier, timeout, breaker: Breaker::new(Arc::new(config)) }
    }

    /// Asks the tier; None while it is spared.
    async fn attempt<T>(&self, ask: impl Future<Output = Result<T, CacheError>>) -> Option<Result<T, CacheError>> {
        let permit = self.breaker.admit().ok()?;
        let probing = self.breaker.state() == BreakerState::HalfOpen;
        let answer = timeout(self.timeout, ask).await.unwrap_or_else(|_| Err(no_answer(self.timeout)));
        match &answer {
            Ok(_) => {
                if permit.success() && probing {
                    tracing::info!(tier = self.tier.kind(), "the shared cache is back");
                }
            }
            Err(error) => {
                tracing::debug!(tier = self.tier.kind(), %error, "the shared cache failed");
                if permit.failure() && !probing {
                    tracing::warn!(tier = self.tier.kind(), %error, "the shared cache is spared; calls go on without it");
                }
            }
        }
        Some(answer)
    }

    /// Asks the tier even while it is spared, and waits longer.
    async fn insist<T>(&self, ask: impl Future<Output = Result<T, CacheError>>) -> Result<T, CacheError> {
        let limit = self.timeout.max(INVALIDATE_TIMEOUT);
        timeout(limit, ask).await.unwrap_or_else(|_| Err(no_answer(limit)))
    }
}
