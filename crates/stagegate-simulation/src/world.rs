//! What all parts of one simulated world share: the dice, the replicas and how they stand, the history. Everything
//! happens in one thread; the lock is there because the engine's traits ask for it.

use std::{
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use chrono::{DateTime, Utc};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use stagegate_core::{Clock, ReplicaId, RunId};
use stagegate_engine::Engine;
use tokio::{sync::Notify, time::Instant};

use crate::{
    MemoryStore, Options,
    cache::Tier,
    check::{Checks, Violation},
    crasher::{Crasher, Moment},
    director::Counts,
    store::{EPOCH_MS, Row},
};

/// How a process stands. A restarted one is another process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It works.
    Up,
    /// It is stopped: nothing that it sends leaves, nothing that is sent to it arrives.
    Paused,
    /// It is gone.
    Dead,
}

/// One process.
#[derive(Debug)]
pub(crate) struct Process {
    /// Which replica it is a life of, and which life.
    pub(crate) name: String,
    pub(crate) place: usize,
    pub(crate) standing: Standing,
    pub(crate) engine: Option<Engine>,
    /// Its present life, as its last heartbeat said.
    pub(crate) replica: Option<ReplicaId>,
    /// What it wrote a moment ago, and what was there before: lost with it where the flush is not awaited.
    pub(crate) unflushed: Vec<(i64, RunId, Row)>,
}

/// How likely what is, in this seed: some worlds know one kind of fault only.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Weather {
    /// Where it is given, the way to the store is bad for this call alone, and worse.
    pub(crate) only: Option<&'static str>,
    pub(crate) fail: f64,
    pub(crate) delay: f64,
    pub(crate) duplicate: f64,
    pub(crate) kill: f64,
    /// Its leases are declared lost under a replica that makes a call.
    pub(crate) lose: f64,
    pub(crate) cache: f64,
    pub(crate) provider: f64,
    /// How many times longer than usual the provider takes.
    pub(crate) slowness: u64,
    /// The provider is away for a part of the storm, and errs in no other way.
    pub(crate) outage: Option<Outage>,
}

/// An outage of the provider, in milliseconds of the world.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Outage {
    pub(crate) kind: Away,
    pub(crate) from_ms: i64,
    pub(crate) until_ms: i64,
}

/// How a provider is away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Away {
    /// It fails.
    Fails,
    /// It cannot be reached.
    Unreachable,
    /// It answers nobody.
    Hangs,
    /// It takes so many calls in three seconds, and says when to come back.
    Limited(u64),
    /// It asks to wait for longer than anybody would.
    Absurd,
    /// It fails and answers by turns, as long as a breaker is open.
    Flaps,
    /// It has one slot, and takes its time.
    FewSlots,
}

/// A world.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) store: MemoryStore,
    pub(crate) tier: Tier,
    pub(crate) crasher: Option<Crasher>,
    /// Somebody was let go on, or died.
    pub(crate) changed: Notify,
    /// A promise was broken.
    pub(crate) broken: Notify,
    /// The first panic, in words.
    pub(crate) panic: OnceLock<String>,
    /// A process died, and its place is empty.
    pub(crate) vacancy: Notify,
    began: Instant,
    inner: Mutex<Inner>,
}

/// The part that is borrowed for a moment.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) rng: StdRng,
    pub(crate) weather: Weather,
    /// False once the faults have ended.
    pub(crate) stormy: bool,
    /// True once nobody submits or asks any more, and every run has ended.
    pub(crate) closing: bool,
    /// Watchers that are not done.
    pub(crate) watching: usize,
    pub(crate) processes: Vec<Process>,
    pub(crate) checks: Checks,
    pub(crate) counts: Counts,
    pub(crate) vacant: Vec<usize>,
    /// What a provider that limits the rate has taken: since when, and how many.
    pub(crate) taken: (i64, u64),
    history: Option<Vec<String>>,
}

impl World {
    pub(crate) fn new(seed: u64, options: Options) -> Arc<Self> {
        let mut rng = StdRng::seed_from_u64(seed);
        let weather = weather(&mut rng);
        let crasher = Crasher::of_seed(seed);
        let mut checks = Checks::default();
        checks.crasher.clone_from(&crasher);
        let inner = Inner {
            rng,
            weather,
            stormy: false,
            closing: false,
            watching: 0,
            processes: Vec::new(),
            checks,
            counts: Counts::default(),
            vacant: Vec::new(),
            taken: (0, 0),
            history: options.record.then(Vec::new),
        };
        Arc::new(Self {
            store: MemoryStore::with_flaw(options.flaw),
            tier: Tier::new(options.flaw),
            crasher,
            changed: Notify::new(),
            broken: Notify::new(),
            panic: OnceLock::new(),
            vacancy: Notify::new(),
            began: Instant::now(),
            inner: Mutex::new(inner),
        })
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Milliseconds since the world began.
    pub(crate) fn now_ms(&self) -> i64 {
        i64::try_from(self.began.elapsed().as_millis()).unwrap_or(i64::MAX)
    }

    /// One line of the history. The text is only made where it is kept.
    pub(crate) fn note(&self, who: &str, what: impl FnOnce() -> String) {
        if self.is_recorded() {
            let (at, what) = (self.now_ms(), what());
            let line = format!("{:>5}.{:03}  {who:<9} {what}", at / 1_000, at % 1_000);
            if let Some(history) = &mut self.lock().history {
                history.push(line);
            }
        }
    }

    /// A run, as the history calls it.
    pub(crate) fn name_of(&self, run: RunId) -> String {
        self.lock().checks.name(run)
    }

    /// The same, by a process.
    pub(crate) fn note_by(&self, process: usize, what: impl FnOnce() -> String) {
        if self.is_recorded() {
            let name = self.lock().processes.get(process).map_or_else(String::new, |process| process.name.clone());
            self.note(&name, what);
        }
    }

    pub(crate) fn is_recorded(&self) -> bool {
        self.lock().history.is_some()
    }

    pub(crate) fn take_history(&self) -> Vec<String> {
        self.lock().history.take().unwrap_or_default()
    }

    /// Writes down what happened.
    pub(crate) fn book(&self, entry: impl FnOnce(&mut Checks)) {
        let now = self.now_ms();
        let inner = &mut *self.lock();
        inner.checks.now_ms = now;
        entry(&mut inner.checks);
    }

    /// Runs a check. The first promise that is broken ends the world.
    pub(crate) fn check(&self, check: impl FnOnce(&mut Checks) -> Result<(), Violation>) {
        let now = self.now_ms();
        let result = {
            let inner = &mut *self.lock();
            inner.checks.now_ms = now;
            check(&mut inner.checks)
        };
        if let Err(violation) = result {
            self.note("CHECK", || violation.to_string());
            self.lock().checks.first.get_or_insert(violation);
            self.broken.notify_one();
        }
    }

    /// True with this probability; never while there is no storm.
    pub(crate) fn strikes(&self, probability: impl FnOnce(&Weather) -> f64) -> bool {
        let inner = &mut *self.lock();
        let probability = probability(&inner.weather);
        inner.stormy && probability > 0.0 && inner.rng.random_bool(probability)
    }

    /// What becomes of a call that meets the provider's outage; None where there is none.
    pub(crate) fn away(&self) -> Option<Away> {
        let now = self.now_ms();
        let inner = &mut *self.lock();
        let outage = inner.weather.outage.filter(|outage| (outage.from_ms..outage.until_ms).contains(&now))?;
        match outage.kind {
            Away::Flaps if (now / FLAP_MS) % 2 == 1 => None,
            Away::Limited(most) => {
                if now - inner.taken.0 >= LIMIT_MS {
                    inner.taken = (now, 0);
                }
                inner.taken.1 += 1;
                (inner.taken.1 > most).then_some(outage.kind)
            }
            kind => Some(kind),
        }
    }

    /// A duration between two, in milliseconds.
    pub(crate) fn between(&self, from_ms: u64, to_ms: u64) -> Duration {
        Duration::from_millis(self.lock().rng.random_range(from_ms..to_ms))
    }

    pub(crate) fn standing(&self, process: usize) -> Standing {
        self.lock().processes[process].standing
    }

    /// Returns once the process may go on; never where it is dead.
    pub(crate) async fn gate(&self, process: usize) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            match self.standing(process) {
                Standing::Up => return,
                Standing::Paused => changed.await,
                Standing::Dead => std::future::pending().await,
            }
        }
    }

    /// Ends a process as a SIGKILL does. What it had sent may still arrive; what is sent to it does not.
    pub(crate) fn kill(&self, process: usize) {
        let now = self.now_ms();
        let (engine, lost) = {
            let inner = &mut *self.lock();
            let dying = &mut inner.processes[process];
            if dying.standing == Standing::Dead {
                return;
            }
            dying.standing = Standing::Dead;
            inner.vacant.push(dying.place);
            inner.counts.kills += 1;
            (dying.engine.take(), std::mem::take(&mut dying.unflushed))
        };
        self.note_by(process, || "KILLED".to_owned());
        self.lose(now, lost);
        self.changed.notify_waiters();
        self.vacancy.notify_one();
        // Its tasks reach nobody any more; this only frees what they hold.
        if let Some(engine) = engine {
            tokio::spawn(async move { engine.drain(Duration::ZERO).await });
        }
    }

    /// Kills a process if one of these runs crashes its owner at this moment.
    pub(crate) fn crash(&self, process: usize, moment: Moment, runs: impl IntoIterator<Item = RunId>) {
        let crashing = {
            let checks = &self.lock().checks;
            runs.into_iter().find(|run| checks.crashes_at(*run, moment))
        };
        if let Some(run) = crashing {
            self.strike(process, Some(run));
        }
    }

    /// Kills a process by a run that crashes its owners.
    pub(crate) fn strike(&self, process: usize, run: Option<RunId>) {
        let replica = {
            let inner = &mut *self.lock();
            if inner.processes[process].standing == Standing::Dead {
                return;
            }
            inner.counts.crashes += 1;
            // What it wrote is stored: only the answer is lost.
            inner.processes[process].unflushed.clear();
            inner.processes[process].replica
        };
        self.book(|checks| checks.struck(replica, run));
        self.kill(process);
    }

    /// Where the flush is not awaited: what was acknowledged in the last moment was not on the disk. A later claim was, and
    /// with it what came before.
    fn lose(&self, now: i64, lost: Vec<(i64, RunId, Row)>) {
        for (at, run, before) in lost.into_iter().rev() {
            if now - at <= UNFLUSHED_MS {
                self.store.with(|state, _| {
                    if let Some(row) = state.runs.get_mut(&run).filter(|row| row.epoch == before.epoch) {
                        *row = before;
                    }
                });
            }
        }
    }

    /// Declares a process dead while it lives, as if its heartbeat had come too late: others may have its runs at once, and
    /// it learns of that from its next heartbeat, or by being fenced.
    pub(crate) fn lose_lease(&self, process: usize, when: &str) {
        let Some(replica) = self.lock().processes[process].replica else { return };
        self.store.with(|state, now| state.leave(replica, now));
        self.lock().counts.lost += 1;
        self.note_by(process, || format!("LEASE LOST {when}"));
        self.book(|checks| checks.left(replica));
    }

    /// Stops a process for a while, as SIGSTOP and SIGCONT do.
    pub(crate) fn pause(self: &Arc<Self>, process: usize, length: Duration) {
        {
            let inner = &mut *self.lock();
            let stopped = &mut inner.processes[process];
            if stopped.standing != Standing::Up {
                return;
            }
            stopped.standing = Standing::Paused;
            inner.counts.pauses += 1;
        }
        self.note_by(process, || format!("PAUSED for {length:?}"));
        self.book(|checks| checks.disturbed(process));
        let world = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(length).await;
            world.resume(process);
        });
    }

    pub(crate) fn resume(&self, process: usize) {
        {
            let inner = &mut *self.lock();
            if inner.processes[process].standing != Standing::Paused {
                return;
            }
            inner.processes[process].standing = Standing::Up;
        }
        self.note_by(process, || "goes on".to_owned());
        self.book(|checks| checks.disturbed(process));
        self.changed.notify_waiters();
    }

    /// A random process that is not dead, and its engine.
    pub(crate) fn any_engine(&self) -> Option<(usize, Engine)> {
        let inner = &mut *self.lock();
        let up: Vec<usize> = (0..inner.processes.len()).filter(|n| inner.processes[*n].engine.is_some()).collect();
        if up.is_empty() {
            return None;
        }
        let chosen = up[inner.rng.random_range(0..up.len())];
        inner.processes[chosen].engine.clone().map(|engine| (chosen, engine))
    }
}

/// How long a provider that flaps stays as it is.
const FLAP_MS: i64 = 2_000;
/// In how long a time a provider that limits the rate counts.
pub(crate) const LIMIT_MS: i64 = 3_000;
/// How long a step stays in memory where the flush is not awaited.
const UNFLUSHED_MS: i64 = 300;

/// Each kind of fault is absent, rare or frequent, each on its own.
fn weather(rng: &mut StdRng) -> Weather {
    let mut of = |rare: f64, frequent: f64| match rng.random_range(0..4) {
        0 => 0.0,
        1 | 2 => rare,
        _ => frequent,
    };
    let mut weather = Weather {
        only: None,
        fail: of(0.02, 0.15),
        delay: of(0.02, 0.1),
        duplicate: of(0.05, 0.3),
        kill: of(0.003, 0.02),
        lose: of(0.005, 0.03),
        cache: of(0.02, 0.2),
        provider: of(0.3, 0.8),
        slowness: 1,
        outage: None,
    };
    weather.slowness = [1, 1, 5].choose(rng).copied().unwrap_or(1);
    if rng.random_bool(0.4) {
        weather.only = METHODS.choose(rng).copied();
        (weather.fail, weather.delay, weather.lose) = (0.25, 0.25, 0.3);
    }
    if rng.random_bool(0.35) {
        let kinds = [
            Away::Fails,
            Away::Unreachable,
            Away::Hangs,
            Away::Limited(rng.random_range(1..4)),
            Away::Absurd,
            Away::Flaps,
            Away::FewSlots,
        ];
        let kind = kinds.choose(rng).copied().unwrap_or(Away::Fails);
        let from_ms = rng.random_range(0..6_000);
        weather.outage = Some(Outage { kind, from_ms, until_ms: from_ms + rng.random_range(4_000..40_000) });
        weather.provider = 0.0;
    }
    weather
}

/// The calls that an engine lives by.
const METHODS: [&str; 10] =
    ["submit", "commit", "commit", "claim", "load", "heartbeat", "signals", "signal", "release", "owned"];

/// A replica's wall clock: a little wrong.
#[derive(Debug)]
pub(crate) struct SkewedClock {
    pub(crate) began: Instant,
    pub(crate) skew_ms: i64,
}

impl Clock for SkewedClock {
    fn now(&self) -> DateTime<Utc> {
        let elapsed = i64::try_from(self.began.elapsed().as_millis()).unwrap_or(0);
        DateTime::from_timestamp_millis(EPOCH_MS + elapsed + self.skew_ms).unwrap_or_default()
    }
}

impl World {
    pub(crate) fn clock(&self, skew_ms: i64) -> Arc<dyn Clock> {
        Arc::new(SkewedClock { began: self.began, skew_ms })
    }
}
