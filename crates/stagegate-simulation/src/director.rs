//! One world from its seed to its end: owns what happens from outside, and when it is over.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, LazyLock},
    time::Duration,
};

use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serde_json::json;
use stagegate_core::{
    Code, RunId, StageId, StageState, TenantId,
    pipeline::{Labels, Span},
    store::{Commit, Idempotency},
};
use stagegate_engine::{Action, Approval, Engine, Submit, config::EngineConfig};
use stagegate_llm::{
    Llm,
    config::{BreakerConfig, LlmConfig, Price, ProviderConfig, ProviderKind},
    prices::Prices,
    provider::Provider,
};
use stagegate_telemetry::Metrics;
use tokio::{task::JoinSet, time::timeout};

use crate::{
    Flaw, Violation,
    cache::TierFront,
    front::Front,
    panics,
    provider::{GOOD, Scripted},
    script::{self, Act, Made},
    watcher,
    world::{Away, Outage, Process, Standing, World},
};

/// How long after the storm the last run may take to end.
const CALM_MS: i64 = 240_000;
/// The same where a run crashes its owners: each crash costs the time of a lease.
const CRASHING_CALM_MS: i64 = 600_000;
/// How long what was sent in the storm may be on its way: a submit whose client has given up still makes a run.
const ON_THE_WAY_MS: i64 = 16_000;
/// How long a client waits for an answer.
const CLIENT_PATIENCE: Duration = Duration::from_secs(6);
/// How long a start may take.
const START_PATIENCE: Duration = Duration::from_secs(5);
/// How long after the last end the world goes on: late arrivals must change nothing.
const AFTERMATH: Duration = Duration::from_secs(4);
/// How often the end is looked for.
const LOOK: Duration = Duration::from_millis(500);

/// How a world is played.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// What is broken in it.
    pub flaw: Flaw,
    /// Whether its history is kept.
    pub record: bool,
}

/// What happened, so that one sees that something did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Runs that were accepted.
    pub runs: u64,
    /// Commits, batches each.
    pub commits: u64,
    /// Leases that were claimed.
    pub claims: u64,
    /// Of them, of runs that had an owner before.
    pub resumed: u64,
    /// Calls of the provider.
    pub calls: u64,
    /// Attempts that were followed by another.
    pub retries: u64,
    /// Outputs that waited for a person.
    pub holds: u64,
    /// Runs that waited in the store.
    pub parks: u64,
    /// Processes that were killed.
    pub kills: u64,
    /// Owners that were crashed by their runs.
    pub crashes: u64,
    /// Runs that were given up for that.
    pub given_up: u64,
    /// Replicas that were declared dead while they lived.
    pub lost: u64,
    /// Processes that were stopped for a while.
    pub pauses: u64,
    /// Processes that were asked to stop.
    pub drains: u64,
    /// Store calls that failed or were late.
    pub store_faults: u64,
    /// Store calls that arrived twice.
    pub duplicates: u64,
    /// Cache calls that failed or were late.
    pub cache_faults: u64,
    /// Virtual seconds.
    pub seconds: u64,
}

impl Counts {
    /// Counts what a step says.
    pub(crate) fn steps(&mut self, commit: &Commit) {
        use stagegate_core::EventKind::{RunFinished, RunWaiting, StageHeld, StageRetrying};
        for event in &commit.events {
            match event.kind {
                StageRetrying { .. } => self.retries += 1,
                StageHeld { .. } => self.holds += 1,
                RunWaiting { .. } => self.parks += 1,
                RunFinished { failure: Some(ref failure), .. } if failure.code == Code::RunCrashed => {
                    self.given_up += 1;
                }
                _ => {}
            }
        }
    }

    /// Adds another world's.
    pub fn add(&mut self, other: &Self) {
        let Self {
            runs,
            commits,
            claims,
            resumed,
            calls,
            retries,
            holds,
            parks,
            kills,
            crashes,
            given_up,
            lost,
            pauses,
            drains,
            store_faults,
            duplicates,
            cache_faults,
            seconds,
        } = other;
        self.runs += runs;
        self.commits += commits;
        self.claims += claims;
        self.resumed += resumed;
        self.calls += calls;
        self.retries += retries;
        self.holds += holds;
        self.parks += parks;
        self.kills += kills;
        self.crashes += crashes;
        self.given_up += given_up;
        self.lost += lost;
        self.pauses += pauses;
        self.drains += drains;
        self.store_faults += store_faults;
        self.duplicates += duplicates;
        self.cache_faults += cache_faults;
        self.seconds += seconds;
    }
}

/// What came of a seed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The first promise that was broken.
    pub violation: Option<Violation>,
    /// What happened, line by line, where it was kept.
    pub history: Vec<String>,
    /// What happened, in numbers.
    pub counts: Counts,
}

/// Plays a seed. A panic in it is a broken promise like any other.
///
/// # Panics
/// Where the machine gives no runtime.
pub fn simulate(seed: u64, options: Options) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.unwrap_or_else(|error| panic!("no runtime: {error}"));
    let world = runtime.block_on(async { World::new(seed, options) });
    let listening = panics::listen(&world);
    let played = catch_unwind(AssertUnwindSafe(|| {
        runtime.block_on(async {
            tokio::select! {
                biased;
                () = world.broken.notified() => {}
                () = Box::pin(play(&world)) => {}
            }
        });
    }));
    drop(listening);
    runtime.block_on(async {
        if let Some(what) = world.panic.get() {
            world.check(|checks| checks.panicked(what));
        }
        // The hook has noted it.
        drop(played);
        world.lock().processes.iter_mut().for_each(|process| process.engine = None);
        let (violation, mut counts) = {
            let inner = world.lock();
            (inner.checks.first.clone(), inner.counts)
        };
        counts.runs = world.store.with(|state, _| state.runs.len() as u64);
        counts.seconds = u64::try_from(world.now_ms() / 1_000).unwrap_or(0);
        Outcome { violation, history: world.take_history(), counts }
    })
}

/// What is the same for all processes of a world.
#[derive(Debug, Clone)]
struct Setup {
    config: EngineConfig,
    skews_ms: Vec<i64>,
}

/// What is the same in all worlds: prices and metrics take longer to make than a world to play.
static PRICED: LazyLock<(LlmConfig, Prices)> = LazyLock::new(|| {
    let price = Price { input: 1.0, output: 2.0, cache_read: None, cache_write: None };
    let config = LlmConfig { prices: [("sim/*".to_owned(), price)].into(), ..LlmConfig::default() };
    let prices = Prices::new(&config).unwrap_or_else(|error| unreachable!("a price that is an amount: {error:?}"));
    (config, prices)
});
static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

async fn play(world: &Arc<World>) {
    let (places, storm_ms, ttl_ms, park_s, max_runs, made) = {
        let rng = &mut world.lock().rng;
        let pipelines = rng.random_range(1..=2_usize);
        let made: Vec<Made> = (0..pipelines).map(|n| script::pipeline(rng, n)).collect();
        let ttl = [3_000_u64, 6_000, 10_000].choose(rng).copied().unwrap_or(10_000);
        let max_runs = [1, 3, 1_000].choose(rng).copied().unwrap_or(1_000);
        (rng.random_range(1..=3_usize), rng.random_range(12_000..40_000), ttl, rng.random_range(1..6), max_runs, made)
    };
    let mut config = EngineConfig {
        max_runs,
        lease_ttl: Span(Duration::from_millis(ttl_ms)),
        poll_interval: Span(Duration::from_secs(1)),
        park_after: Span(Duration::from_secs(park_s)),
        ..EngineConfig::default()
    };
    if let Some(crasher) = &world.crasher {
        config.run_crashes_max = crasher.crashes_max;
    }
    // Most are a little wrong. Some are wrong by as much as is not refused yet.
    let skew = |rng: &mut StdRng| {
        let most = if rng.random_ratio(1, 3) { 25_000 } else { 800 };
        rng.random_range(-most..most)
    };
    let skews_ms = (0..places).map(|_| skew(&mut world.lock().rng)).collect();
    let setup = Arc::new(Setup { config, skews_ms });
    {
        let checks = &mut world.lock().checks;
        checks.ttl_ms = i64::try_from(ttl_ms).unwrap_or(0);
        checks.crashes_max = setup.config.run_crashes_max;
        checks.dags = made.iter().map(|made| (made.name.clone(), made.needs.clone())).collect();
    }
    for place in 0..places {
        start(Arc::clone(world), Arc::clone(&setup), place).await;
    }
    world.note("world", || format!("{places} replicas, {setup:?}"));
    world.note("world", || format!("the storm: {:?}, {storm_ms} ms long", world.lock().weather));
    world.note("world", || format!("{:?}", world.crasher));
    for made in &made {
        world.note("world", || format!("pipeline {}", made.source));
    }
    register(world, &made).await;
    let acts = script::acts(&mut world.lock().rng, made.len(), storm_ms, ttl_ms);
    world.lock().stormy = true;
    tokio::spawn(keep(Arc::clone(world), setup));
    let mut crowd = Crowd::default();
    for (at, act) in acts {
        sleep_until(world, at).await;
        crowd.act(world, act, &made);
    }
    sleep_until(world, storm_ms).await;
    calm(world, crowd).await;
}

async fn sleep_until(world: &World, at_ms: u64) {
    let now = u64::try_from(world.now_ms()).unwrap_or(0);
    tokio::time::sleep(Duration::from_millis(at_ms.saturating_sub(now))).await;
}

async fn register(world: &World, made: &[Made]) {
    if let Some((_, engine)) = world.any_engine() {
        for each in made {
            let registered = engine.register(&TenantId::default(), &each.source).await;
            registered
                .unwrap_or_else(|error| unreachable!("the script makes valid pipelines: {error:?}\n{}", each.source));
        }
    }
}

/// Starts a process in this place, and again until it runs.
async fn start(world: Arc<World>, setup: Arc<Setup>, place: usize) {
    loop {
        let (process, rng) = {
            let inner = &mut *world.lock();
            let life = inner.processes.iter().filter(|process| process.place == place).count() + 1;
            let name = format!("r{}.{life}", place + 1);
            inner.processes.push(Process {
                name,
                place,
                standing: Standing::Up,
                engine: None,
                replica: None,
                unflushed: Vec::new(),
            });
            (inner.processes.len() - 1, StdRng::seed_from_u64(inner.rng.random()))
        };
        world.note_by(process, || "starts".to_owned());
        match timeout(START_PATIENCE, engine(&world, &setup, process, place, rng)).await {
            Ok(Ok(engine)) => {
                let started = &mut world.lock().processes[process];
                if started.standing != Standing::Dead {
                    started.engine = Some(engine);
                }
                return;
            }
            // Killed in its first moment: its place is vacant again already.
            _ if world.standing(process) == Standing::Dead => return,
            _ => world.lock().processes[process].standing = Standing::Dead,
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

async fn engine(
    world: &Arc<World>,
    setup: &Setup,
    process: usize,
    place: usize,
    rng: StdRng,
) -> Result<Engine, stagegate_core::Error> {
    let provider: Arc<dyn Provider> = Arc::new(Scripted { world: Arc::clone(world), process });
    let tier = Arc::new(TierFront { world: Arc::clone(world), process });
    let clock = world.clock(setup.skews_ms[place]);
    let (config, prices) = &*PRICED;
    let providers = [("sim".to_owned(), provider)].into();
    let config = llm_config(config, world.lock().weather.outage);
    let llm = Llm::with_providers(providers, prices.clone(), &config, Some(tier), METRICS.clone(), Arc::clone(&clock));
    let front = Arc::new(Front { world: Arc::clone(world), process });
    Engine::start_seeded(setup.config.clone(), front, Arc::new(llm), METRICS.clone(), clock, None, rng).await
}

/// A breaker that opens soon and not for long, and few slots, as the provider's outage has it.
fn llm_config(config: &LlmConfig, outage: Option<Outage>) -> LlmConfig {
    let mut config = config.clone();
    let Some(outage) = outage else { return config };
    config.breaker = BreakerConfig { min_calls: 2, open_for: Span(Duration::from_secs(2)), ..config.breaker };
    // No world lasts long enough to wait for an absurd wish again and again.
    config.retry_after_max = Span(Duration::from_secs(20));
    let sim = ProviderConfig {
        max_concurrency: if outage.kind == Away::FewSlots { 1 } else { 64 },
        ..ProviderConfig::new(ProviderKind::Sim)
    };
    config.providers.insert("sim".to_owned(), sim);
    config
}

/// Puts a new process where one died.
async fn keep(world: Arc<World>, setup: Arc<Setup>) {
    loop {
        let vacant = std::mem::take(&mut world.lock().vacant);
        for place in vacant {
            let (world, setup) = (Arc::clone(&world), Arc::clone(&setup));
            tokio::spawn(async move {
                let pause = if world.lock().stormy { world.between(100, 8_000) } else { Duration::from_millis(100) };
                tokio::time::sleep(pause).await;
                start(world, setup, place).await;
            });
        }
        world.vacancy.notified().await;
    }
}

/// Everybody outside: clients, watchers, whoever kills.
#[derive(Debug, Default)]
struct Crowd {
    clients: JoinSet<Option<RunId>>,
    submitted: usize,
}

impl Crowd {
    fn act(&mut self, world: &Arc<World>, act: Act, made: &[Made]) {
        let up: Vec<usize> = {
            let inner = world.lock();
            (0..inner.processes.len()).filter(|n| inner.processes[*n].standing == Standing::Up).collect()
        };
        let victim = up.choose(&mut world.lock().rng).copied();
        match (act, victim) {
            (Act::Submit { pipeline, tag, priority, start_in_ms, keyed, watchers }, _) => {
                self.submitted += 1;
                let key = Idempotency { key: format!("key{}", self.submitted), digest: [1; 32] };
                let start_at = start_in_ms.map(|ms| world.clock(0).now() + Duration::from_millis(ms));
                let submit = Submit {
                    tenant: TenantId::default(),
                    pipeline: made[pipeline].name.clone(),
                    version: None,
                    input: json!({ "tag": tag }).into(),
                    cache_mode: None,
                    priority,
                    labels: Labels::new(),
                    idempotency: keyed.then_some(key),
                    start_at,
                    request_id: None,
                };
                self.clients.spawn(client(Arc::clone(world), submit, watchers));
            }
            (act @ (Act::Cancel | Act::Decide | Act::Retry), _) => {
                self.clients.spawn(ask(Arc::clone(world), act));
            }
            (Act::Kill, Some(process)) => world.kill(process),
            (Act::Pause(ms), Some(process)) => world.pause(process, Duration::from_millis(ms)),
            (Act::Drain(ms), Some(process)) => drain(world, process, Duration::from_millis(ms)),
            (Act::Flush, _) => {
                world.note("world", || "the cache is flushed".to_owned());
                world.tier.flush();
                world.book(crate::check::Checks::cache_flushed);
            }
            (Act::Away(ms), _) => {
                world.note("world", || format!("the cache is away for {ms} ms"));
                world.tier.go_away(Duration::from_millis(ms));
            }
            (Act::Kill | Act::Pause(_) | Act::Drain(_), None) => {}
        }
    }
}

/// Stops a process as SIGTERM does; its place is taken again.
fn drain(world: &Arc<World>, process: usize, grace: Duration) {
    let Some(engine) = world.lock().processes[process].engine.take() else { return };
    world.lock().counts.drains += 1;
    world.note_by(process, || format!("drains, with {grace:?} of grace"));
    let world = Arc::clone(world);
    tokio::spawn(async move {
        engine.drain(grace).await;
        let vacated = {
            let inner = &mut *world.lock();
            let left = &mut inner.processes[process];
            let vacated = left.standing != Standing::Dead;
            left.standing = Standing::Dead;
            if vacated {
                let place = left.place;
                inner.vacant.push(place);
            }
            vacated
        };
        if vacated {
            world.note_by(process, || "exits".to_owned());
            world.vacancy.notify_one();
        }
    });
}

/// A client that submits, again where it may, and watches what it submitted.
async fn client(world: Arc<World>, submit: Submit, watchers: usize) -> Option<RunId> {
    loop {
        if let Some((_, engine)) = world.any_engine() {
            if let Ok(Ok((record, _))) = timeout(CLIENT_PATIENCE, engine.submit(submit.clone())).await {
                world.note("client", || format!("has {} accepted", world.name_of(record.id)));
                for _ in 0..watchers {
                    tokio::spawn(watcher::watch(Arc::clone(&world), record.id));
                }
                return Some(record.id);
            }
            // Without a key, trying again would be another run.
            submit.idempotency.as_ref()?;
        }
        tokio::time::sleep(world.between(100, 2_000)).await;
    }
}

/// A person who asks something of a run that is in the state for it, where there is one.
async fn ask(world: Arc<World>, act: Act) -> Option<RunId> {
    let fitting: Vec<(RunId, Option<StageId>)> = world.store.with(|state, _| {
        let rows = state.runs.values();
        match act {
            Act::Decide => rows
                .flat_map(|row| {
                    let held = row.stages.values().filter(|stage| stage.state == StageState::Held);
                    held.map(|stage| (row.record.id, Some(stage.id.clone())))
                })
                .collect(),
            Act::Retry => rows
                .filter(|row| row.record.state.is_terminal() && row.record.state != stagegate_core::RunState::Succeeded)
                .map(|row| (row.record.id, None))
                .collect(),
            _ => rows.filter(|row| !row.record.state.is_terminal()).map(|row| (row.record.id, None)).collect(),
        }
    });
    let (run, stage) = fitting.choose(&mut world.lock().rng).cloned()?;
    let action = match (act, stage) {
        (Act::Decide, Some(stage)) if world.lock().rng.random_bool(0.75) => approve(&world, stage),
        (Act::Decide, Some(stage)) => Action::Reject(stage, "no".to_owned()),
        (Act::Retry, _) => Action::Retry,
        _ => Action::Cancel,
    };
    let (_, engine) = world.any_engine()?;
    _ = timeout(CLIENT_PATIENCE, engine.act(&TenantId::default(), run, action, None)).await;
    None
}

/// Takes what is held, or what the person made of it.
fn approve(world: &World, stage: StageId) -> Action {
    let edit = {
        let rng = &mut world.lock().rng;
        rng.random_bool(0.4).then(|| rng.random_range(0..1_000_u32))
    };
    let Some(edit) = edit else { return Action::Approve(stage) };
    // Stages whose output is JSON refuse it, as they should.
    let (comment, output) = (Some("clearer".to_owned()), Some(format!("{GOOD} edited {edit}").as_str().into()));
    Action::ApproveWith(Box::new(Approval { stage, comment, output }))
}

/// The storm is over: everything works again, and everything must come to its end.
async fn calm(world: &Arc<World>, mut crowd: Crowd) {
    world.note("world", || "the storm is over".to_owned());
    world.lock().stormy = false;
    let processes = world.lock().processes.len();
    (0..processes).for_each(|process| world.resume(process));
    let calm_ms = if world.crasher.is_some() { CRASHING_CALM_MS } else { CALM_MS };
    let (over_at, arrived_at) = (world.now_ms() + calm_ms, world.now_ms() + ON_THE_WAY_MS);
    let mut accepted = Vec::new();
    for look in 0_u64.. {
        while let Some(client) = crowd.clients.try_join_next() {
            accepted.extend(client.ok().flatten());
        }
        let live = world.store.with(|state, _| state.runs.values().any(|row| !row.record.state.is_terminal()));
        if !live && crowd.clients.is_empty() && world.now_ms() > arrived_at {
            break;
        }
        if world.now_ms() > over_at {
            world.check(|checks| world.store.with(|state, _| checks.stuck(state)));
            return std::future::pending().await;
        }
        if look % 4 == 0 {
            crowd.clients.spawn(ask(Arc::clone(world), Act::Decide));
        }
        tokio::time::sleep(LOOK).await;
    }
    world.lock().closing = true;
    // What is still on its way, and the watchers' last connections.
    tokio::time::sleep(AFTERMATH).await;
    while world.lock().watching > 0 {
        tokio::time::sleep(LOOK).await;
    }
    world.check(|checks| world.store.with(|state, _| checks.finish(state, &accepted)));
}
