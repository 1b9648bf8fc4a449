//! The fault loops: for every call that an engine makes of its store in the course of a run, it fails before it, fails
//! after it, or the replica dies at it, just before it takes effect or just after. Each time the run must end as it does
//! undisturbed, and nothing be bought twice that had been received.
//!
//! A dry run tells which calls there are. They are counted by method: what comes when a timer says so (heartbeats, looks
//! for work, a watcher's reading) falls between the others by chance, and is met for sure only by a count of its own.
//! There, the first stage's answer is held back until the fault has struck, so that it strikes during the run.

use std::{
    collections::{BTreeMap, HashMap},
    panic::AssertUnwindSafe,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt, StreamExt, stream};
use serde_json::{Value, json};
use stagegate_core::{
    Code, Event, RunId, RunState, StageId, TenantId,
    pipeline::{Labels, Span},
    store::Idempotency,
};
use stagegate_engine::{Action, Approval, Engine, Submit, config::EngineConfig};
use stagegate_testkit::provider::{FakeProvider, Matcher, Reply, both, contains};
use tokio::sync::{mpsc, watch};

use crate::{
    bench::canonical,
    faulty::{How, Injection},
    stand::{Doomed, Kind, Noted, Rows, Stand},
};

/// What the provider charges for a call: 100 tokens in and 20 out, at 1 and 2 USD per million.
const CALL_NANOS: i64 = 140_000;

/// Cases under way at once. Mostly they wait: for a lease to end, for a pause to be over.
const AT_ONCE: usize = 20;
/// A case that is not through by then hangs.
const PATIENCE: Duration = Duration::from_secs(45);
/// Calls that follow from what happens to the run alone: each of a dry run's comes again.
const EXACT: [&str; 11] =
    ["register", "pipeline", "submit", "weigh", "load", "signals", "signal", "stage", "commit", "release", "leave"];
/// Calls that come by the clock whatever happens, and how many of them are met: at the start and during the run.
const TIMED: [(&str, usize); 3] = [("heartbeat", 2), ("claim", 2), ("owned", 1)];
/// Calls of a watcher, of which at most so many are met. How many it needs is chance, so that a fault may find nothing
/// left to strike; most of them must.
const WATCHING: [&str; 3] = ["events", "run_record", "news"];
const WATCHING_MAX: usize = 3;

/// Calls that come by chance and that nobody waits for: the queue is counted where a submit met a look for work and had to
/// wait. What follows from their faults is tested where it is decided.
const ASIDE: [&str; 1] = ["depths"];

// ---- Scenarios ----------------------------------------------------------------------------------------------

/// What the outside does, and when.
#[derive(Debug, Clone)]
enum Act {
    /// Once this event was seen.
    On(&'static str, Action),
    /// Once the provider was asked for this, on another replica than the run's.
    ElsewhereWhenAsked(&'static str, Action),
    /// Once the provider was asked for this: the replica is shut down in order, and another one started.
    DrainWhenAsked(&'static str),
}

/// What the provider's rules depend on.
struct Rules<'a> {
    provider: &'a FakeProvider,
    /// Open from the start, or once the fault has struck.
    gate: watch::Receiver<bool>,
    /// Open once the replica is not the first one any more.
    moved: watch::Receiver<bool>,
    /// Whether the provider has been mended.
    mended: Arc<AtomicBool>,
}

/// A way that a run can go.
struct Scenario {
    name: &'static str,
    source: String,
    rules: fn(&Rules<'_>),
    acts: Vec<Act>,
    /// It is submitted to a replica that has no room.
    queued: bool,
    /// Strikes in every case: the answer to the submit is lost, so that the run is owned and driven by nobody.
    base: Option<Injection>,
    ends: RunState,
    /// Calls that can be under way at once.
    side_by_side: usize,
    /// Calls that the provider refuses at first: what was not received is asked again.
    refused: usize,
}

impl Scenario {
    /// How many calls can have no answer yet when the replica dies here: they, and no others, are asked again. A step
    /// is committed once its answer is there, and was cached; a run that is being taken up has no call under way.
    fn unanswered(&self, at: Injection) -> usize {
        match at.method {
            _ if is_timed(at) => self.side_by_side,
            "commit" => self.side_by_side - 1 + self.refused,
            _ => 0,
        }
    }
}

/// Whether the call comes when a timer says so.
fn is_timed(at: Injection) -> bool {
    !at.telling && !EXACT.contains(&at.method)
}

/// The answer to the stage whose prompt holds this. No prompt holds it.
fn answer(marker: &str) -> Reply {
    Reply::text(format!("an-answer-to({marker})"))
}

fn all_stages(rules: &Rules<'_>) {
    let provider = rules.provider;
    provider.on(contains("stage-one")).respond(answer("stage-one").when(rules.gate.clone()));
    for stage in ["stage-two", "stage-three", "stage-four"] {
        provider.on(contains(stage)).respond(answer(stage));
    }
    // Later than the fourth, so that each has a commit of its own.
    provider.on(contains("stage-five")).respond(answer("stage-five").after(Duration::from_millis(60)));
}

fn two_stages(gate: &str) -> String {
    format!(
        r#"{{ "name": "two", "defaults": {{ "model": "fake/model", "retry": {{ "max_attempts": 3, "backoff": "10ms..20ms" }} }},
            "stages": [ {{ "id": "one", "prompt": "stage-one {{{{ input.text }}}}", "gate": {gate} }},
                        {{ "id": "two", "needs": ["one"], "prompt": "stage-two {{{{ stages.one.output | length }}}}" }} ] }}"#
    )
}

fn edited(stage: &str, output: &str) -> Action {
    let (stage, comment) = (stage.parse().expect("valid"), Some("clearer".to_owned()));
    Action::ApproveWith(Box::new(Approval { stage, comment, output: Some(output.into()) }))
}

fn scenarios() -> Vec<Scenario> {
    let plain = |name| Scenario {
        name,
        source: two_stages("{}"),
        rules: all_stages,
        acts: Vec::new(),
        queued: false,
        base: None,
        ends: RunState::Succeeded,
        side_by_side: 1,
        refused: 0,
    };
    let held = r#"{ "checks": [ { "min_chars": 1000 } ], "on_fail": "hold" }"#;
    let lost_submit = Injection { method: "submit", nth: 1, telling: false, how: How::FailAfter };
    vec![
        Scenario { source: canonical(), side_by_side: 2, ..plain("canonical") },
        Scenario {
            source: two_stages(r#"{ "checks": [ { "min_chars": 40 } ] }"#),
            rules: |rules| {
                let mended: Matcher = both(contains("stage-one"), contains("did not pass review"));
                rules.provider.on(mended).respond(Reply::text(format!("an-answer-to(review){}", "long ".repeat(20))));
                all_stages(rules);
            },
            ..plain("gated")
        },
        Scenario {
            rules: |rules| {
                let later = Reply::status(429, "{}").header("retry-after-ms", "400");
                rules.provider.on(contains("stage-two")).once(later);
                all_stages(rules);
            },
            ..plain("parked")
        },
        Scenario {
            source: two_stages(held),
            acts: vec![Act::On("run.waiting", Action::Approve("one".parse().expect("valid")))],
            ..plain("held")
        },
        Scenario {
            source: two_stages(held),
            acts: vec![Act::On("run.waiting", edited("one", &"better ".repeat(200)))],
            ..plain("edited")
        },
        Scenario {
            rules: |rules| {
                rules.provider.on(contains("stage-two")).respond(Reply::hang());
                all_stages(rules);
            },
            acts: vec![Act::ElsewhereWhenAsked("stage-two", Action::Cancel)],
            ends: RunState::Cancelled,
            ..plain("cancelled")
        },
        Scenario {
            rules: |rules| {
                let mended = Arc::clone(&rules.mended);
                let broken: Matcher = Arc::new(move |_| !mended.load(Ordering::SeqCst));
                rules.provider.on(both(contains("stage-two"), broken)).respond(Reply::status(400, "{}"));
                all_stages(rules);
            },
            acts: vec![Act::On("run.finished", Action::Retry)],
            refused: 1,
            ..plain("retried")
        },
        Scenario { queued: true, ..plain("queued") },
        Scenario { base: Some(lost_submit), ..plain("orphaned") },
        Scenario {
            rules: |rules| {
                rules.provider.on(contains("stage-two")).respond(answer("stage-two").when(rules.moved.clone()));
                all_stages(rules);
            },
            acts: vec![Act::DrainWhenAsked("stage-two")],
            ..plain("drained")
        },
    ]
}

// ---- One case -----------------------------------------------------------------------------------------------

/// What became of a run.
#[derive(Debug)]
struct Seen {
    state: RunState,
    output: Option<Value>,
    digests: BTreeMap<StageId, String>,
    /// The names of its events but for `run.resumed`, sorted.
    events: Vec<&'static str>,
    provider_calls: usize,
    /// Calls that are booked as of unknown outcome.
    unknown_calls: u32,
    counts: [HashMap<&'static str, usize>; 2],
    fired: bool,
}

/// Whoever submits, watches and decides. It knows a load balancer's address: whichever replica lives answers.
struct Client<'a> {
    stand: &'a Stand,
    provider: &'a FakeProvider,
    noted: Noted,
    first: Doomed,
    second: Option<Engine>,
    moved: watch::Sender<bool>,
    tenant: TenantId,
    events: Vec<Event>,
    /// Events that were looked at for what comes next.
    looked_at: usize,
}

fn config(ttl: Duration) -> EngineConfig {
    EngineConfig {
        lease_ttl: Span(ttl),
        poll_interval: Span(Duration::from_millis(20)),
        park_after: Span(Duration::from_millis(100)),
        ..EngineConfig::default()
    }
}

impl Client<'_> {
    /// Another process takes the place of the one that is gone.
    async fn move_on(&mut self) {
        if self.second.is_none() {
            let long = config(Duration::from_secs(10));
            let second = self.stand.lasting(self.provider.openai_base_url(), &self.noted, long).await;
            self.second = Some(second);
            self.moved.send_replace(true);
        }
    }

    /// Asks whichever replica lives until it answers. The number tells how often it was asked.
    async fn ask<T, F>(&mut self, question: impl Fn(Engine) -> F) -> (Result<T, Code>, usize)
    where
        T: Send + 'static,
        F: Future<Output = Result<T, stagegate_core::Error>> + Send + 'static,
    {
        for tries in 1.. {
            if self.first.faulty.is_dead() {
                self.move_on().await;
            }
            let answer = match (&self.second, &self.first.engine) {
                (Some(second), _) => Some(question(second.clone()).await),
                (None, Some(first)) => self.first.run(question(first.clone())).await,
                (None, None) => None,
            };
            match answer {
                Some(Ok(answer)) => return (Ok(answer), tries),
                Some(Err(error)) if error.code != Code::Unavailable => return (Err(error.code), tries),
                _ => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
        unreachable!("it is asked until it answers")
    }

    async fn submit(&mut self, scenario: &Scenario, acceptor: Option<&Engine>) -> RunId {
        let (tenant, source) = (self.tenant.clone(), scenario.source.clone());
        let (registered, _) = self
            .ask(move |engine| {
                let (tenant, source) = (tenant.clone(), source.clone());
                async move { engine.register(&tenant, &source).await }
            })
            .await;
        let (version, _) = registered.expect("valid");
        let submit = Submit {
            tenant: self.tenant.clone(),
            pipeline: version.name,
            version: Some(version.version),
            input: json!({ "text": "hello" }).into(),
            cache_mode: None,
            priority: 0,
            labels: Labels::new(),
            idempotency: Some(Idempotency { key: "k".to_owned(), digest: [1; 32] }),
            request_id: None,
            start_at: None,
        };
        if let (true, Some(acceptor)) = (scenario.queued, acceptor) {
            return acceptor.submit(submit).await.expect("accepted").0.id;
        }
        let (submitted, _) = self
            .ask(move |engine| {
                let submit = submit.clone();
                async move { engine.submit(submit).await }
            })
            .await;
        submitted.expect("accepted").0.id
    }

    /// Follows the run until this event, across whatever happens to the replica that is watched.
    async fn watch(&mut self, run: RunId, name: &str) {
        loop {
            if self.first.faulty.is_dead() {
                self.move_on().await;
            }
            let (engine, handle) = match (&self.second, &self.first.engine) {
                (Some(second), _) => (second.clone(), tokio::runtime::Handle::current()),
                (None, Some(first)) => (first.clone(), self.first.handle.clone()),
                (None, None) => continue,
            };
            let on_first = self.second.is_none();
            let (sender, mut batches) = mpsc::channel(16);
            let (tenant, after) = (self.tenant.clone(), self.events.last().map_or(0, |event| event.seq));
            let following = handle.spawn(async move {
                let mut events = engine.follow(tenant, run, after);
                while let Some(batch) = events.next().await {
                    if sender.send(batch).await.is_err() {
                        return;
                    }
                }
            });
            loop {
                if let Some(at) = self.events[self.looked_at..].iter().position(|event| event.kind.name() == name) {
                    self.looked_at += at + 1;
                    following.abort();
                    return;
                }
                self.looked_at = self.events.len();
                tokio::select! {
                    batch = batches.recv() => match batch {
                        Some(Ok(batch)) => self.events.extend(batch),
                        // An error of the store, or the end of a run that is only just retried: it connects anew.
                        Some(Err(_)) | None => break,
                    },
                    () = self.first.faulty.died(), if on_first => break,
                }
            }
            following.abort();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until the provider was asked for this, whoever asks.
    async fn asked(&mut self, marker: &str) {
        while self.provider.calls_where(&contains(marker)).is_empty() {
            if self.first.faulty.is_dead() {
                self.move_on().await;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn act(&mut self, run: RunId, action: &Action) {
        let (tenant, action) = (self.tenant.clone(), action.clone());
        let (acted, tries) = self
            .ask(move |engine| {
                let (tenant, action) = (tenant.clone(), action.clone());
                async move { engine.act(&tenant, run, action, None).await }
            })
            .await;
        match acted {
            Ok(_) => {}
            // Its answer was lost: it has happened, so that it cannot be asked again.
            Err(Code::WrongState) if tries > 1 => {}
            Err(code) => panic!("refused: {code}"),
        }
    }

    async fn drain(&mut self) {
        if let (None, Some(first)) = (&self.second, &self.first.engine) {
            let first = first.clone();
            self.first.run(async move { first.drain(Duration::ZERO).await }).await;
        }
        self.move_on().await;
    }
}

/// One run of a scenario, undisturbed or with a fault.
async fn play(stand: &Stand, scenario: &Scenario, injection: Option<Injection>) -> Seen {
    play_noting(stand, scenario, injection, Noted::default()).await
}

async fn play_noting(stand: &Stand, scenario: &Scenario, injection: Option<Injection>, noted: Noted) -> Seen {
    static TENANTS: AtomicUsize = AtomicUsize::new(0);
    let tenant: TenantId = format!("tenant-{}", TENANTS.fetch_add(1, Ordering::Relaxed)).parse().expect("valid");
    let provider = FakeProvider::start().await;
    let fired = watch::Sender::new(injection.is_none());
    let (moved, mended) = (watch::Sender::new(false), Arc::new(AtomicBool::new(false)));
    let timed = injection.is_some_and(|at| is_timed(at) && !WATCHING.contains(&at.method));
    let open = watch::Sender::new(true);
    let gate = if timed { fired.subscribe() } else { open.subscribe() };
    (scenario.rules)(&Rules { provider: &provider, gate, moved: moved.subscribe(), mended: Arc::clone(&mended) });

    let kills = injection.is_some_and(|at| at.how.kills());
    // Where it dies, its lease should end soon; else it should not end by a machine's being busy.
    let ttl = Duration::from_millis(if kills { 700 } else { 3_000 });
    let base = scenario.base.map(|base| (base, watch::Sender::new(false)));
    let injections = injection.map(|at| (at, fired.clone())).into_iter().chain(base).collect();
    let base_url = provider.openai_base_url();
    let elsewhere = matches!(scenario.acts.first(), Some(Act::ElsewhereWhenAsked(..)));
    let other = if scenario.queued || elsewhere {
        let full = EngineConfig { max_runs: 0, ..config(Duration::from_secs(10)) };
        Some(stand.lasting(base_url.clone(), &noted, full).await)
    } else {
        None
    };
    let first = stand.doomed(base_url, &noted, config(ttl), injections).await;
    let mut client = Client {
        stand,
        provider: &provider,
        noted,
        first,
        second: None,
        moved,
        tenant,
        events: Vec::new(),
        looked_at: 0,
    };

    let run = client.submit(scenario, other.as_ref()).await;
    for act in &scenario.acts {
        match act {
            Act::On(event, action) => {
                client.watch(run, event).await;
                mended.store(true, Ordering::SeqCst);
                client.act(run, action).await;
            }
            Act::ElsewhereWhenAsked(marker, action) => {
                client.watch(run, "stage.succeeded").await;
                client.asked(marker).await;
                let other = other.as_ref().expect("started");
                other.act(&client.tenant, run, action.clone(), None).await.expect("accepted");
            }
            Act::DrainWhenAsked(marker) => {
                client.watch(run, "stage.succeeded").await;
                client.asked(marker).await;
                client.drain().await;
            }
        }
    }
    client.watch(run, "run.finished").await;
    let seen = inspect(&client, run, *fired.borrow()).await;

    client.first.kill().await;
    for engine in client.second.iter().chain(&other) {
        engine.drain(Duration::ZERO).await;
    }
    seen
}

/// What holds however a run went, and what it is compared by.
async fn inspect(client: &Client<'_>, run: RunId, fired: bool) -> Seen {
    let (store, tenant) = (&client.stand.store, &client.tenant);
    let detail = store.run(tenant, run).await.expect("reads").expect("there");
    let events = store.events(tenant, run, 0, 1_000).await.expect("reads");
    assert_eq!(client.events, events, "who watched saw each event once, in order");
    let seqs: Vec<u64> = events.iter().map(|event| event.seq).collect();
    assert_eq!(seqs, (1..=events.len() as u64).collect::<Vec<_>>(), "gap-free from 1");
    let ends = |names: &[&str], name| names.iter().filter(|other| **other == name).count();
    let names: Vec<_> = events.iter().map(|event| event.kind.name()).collect();
    assert_eq!(ends(&names, "run.finished"), 1 + ends(&names, "run.retried"), "one end for each beginning: {names:?}");
    assert_eq!(names.last(), Some(&"run.finished"));

    let mut digests = BTreeMap::new();
    for stage in &detail.stages {
        let kept = store.stage(tenant, run, &stage.id).await.expect("reads").expect("there");
        let succeeded =
            |event: &&Event| event.kind.name() == "stage.succeeded" && event.kind.stage() == Some(&stage.id);
        assert_eq!(events.iter().filter(succeeded).count(), usize::from(kept.checkpoint.is_some()), "{}", stage.id);
        digests.extend(kept.checkpoint.map(|checkpoint| (stage.id.clone(), checkpoint.digest)));
    }
    let totals = detail.run.totals;
    let written = Rows {
        checkpoints: i64::from(detail.run.stages_done),
        calls: i64::from(totals.calls + totals.hits),
        cost_nanos: totals.cost_usd.nanos(),
        saved_nanos: totals.saved_usd.nanos(),
        bought_tokens: totals.usage.input_tokens.try_into().expect("few"),
    };
    assert_eq!(client.stand.rows(run).await, written, "the totals are the sums of the ledger");
    assert_eq!(digests.len(), usize::try_from(detail.run.stages_done).expect("few"), "one checkpoint per stage");

    let calls = client.provider.calls();
    // The provider's own count is between what is known and what is booked in all.
    let charged = CALL_NANOS * i64::try_from(calls.iter().filter(|call| call.charged).count()).expect("few");
    let known = totals.cost_usd - totals.unknown_usd;
    assert!(known.nanos() <= charged, "{charged} were charged, {totals:?}");
    assert!(totals.cost_usd.nanos() >= charged, "{charged} were charged, {totals:?}");
    for (at, again) in calls.iter().enumerate() {
        let earlier = calls[..at].iter().find(|call| call.prompt_text == again.prompt_text);
        let Some(marker) = earlier.and_then(|call| call.prompt_text.split(' ').find(|word| word.starts_with("stage-")))
        else {
            continue;
        };
        let held = client.noted.held(&format!("an-answer-to({marker})"));
        assert!(held.is_none_or(|since| since > again.started), "{marker} was in the cache, and is bought again");
    }
    let mut names: Vec<_> = names.into_iter().filter(|name| *name != "run.resumed").collect();
    names.sort_unstable();
    Seen {
        state: detail.run.state,
        output: detail.output.map(|output| output.parse()),
        digests,
        events: names,
        provider_calls: calls.len(),
        unknown_calls: totals.unknown_calls,
        counts: client.first.faulty.counts(),
        fired,
    }
}

// ---- The loops ----------------------------------------------------------------------------------------------

/// Every fault of this kind that a run of the scenario can meet.
fn injections(dry: &Seen, scenario: &Scenario, hows: [How; 2]) -> Vec<Injection> {
    let timed = TIMED.iter().copied();
    let [all, telling] = &dry.counts;
    let is_other = |method: &str| !ASIDE.contains(&method) && TIMED.iter().all(|(timed, _)| *timed != method);
    let others = all.iter().filter(|(method, _)| is_other(method));
    let others = others.map(|(method, count)| match *method {
        exact if EXACT.contains(&exact) => (exact, *count),
        watching if WATCHING.contains(&watching) => (watching, *count.min(&WATCHING_MAX)),
        other => (other, 1),
    });
    let plain = timed.chain(others).map(|(method, count)| (method, count, false));
    let telling = telling.iter().map(|(method, count)| (*method, *count, true));
    // Whether `owned` and `load` tell anything is known beforehand.
    let telling = telling.filter(|(method, ..)| ["claim", "heartbeat"].contains(method));
    let mut found = Vec::new();
    for (method, count, telling) in plain.chain(telling) {
        for nth in 1..=count {
            for how in hows {
                let at = Injection { method, nth, telling, how };
                let taken = scenario.base.is_some_and(|base| (base.method, base.nth) == (method, nth));
                if !(taken || telling && how.is_before()) {
                    found.push(at);
                }
            }
        }
    }
    found
}

/// Holds a case to the dry run. Returns whether the fault was met.
fn check(scenario: &Scenario, dry: &Seen, at: Injection, seen: &Seen) -> bool {
    assert_eq!(seen.state, scenario.ends);
    assert_eq!((&seen.output, &seen.digests), (&dry.output, &dry.digests));
    if at.how.kills() {
        let most = dry.provider_calls + scenario.unanswered(at);
        assert!(seen.provider_calls <= most, "{} calls, {} undisturbed", seen.provider_calls, dry.provider_calls);
        // What was under way when the replica died, whether or not it had been sent yet, and no more.
        let most = dry.unknown_calls + u32::try_from(scenario.side_by_side).expect("few");
        assert!(seen.unknown_calls <= most, "{} unknown, {} undisturbed", seen.unknown_calls, dry.unknown_calls);
    } else {
        assert_eq!(seen.provider_calls, dry.provider_calls, "nothing is asked again for an error of the store");
        assert_eq!(seen.events, dry.events);
        // Where the answer to the submit is lost, the run is owned and nobody drives it: whoever takes it up cannot know that
        // nothing was asked.
        let undriven = u32::from(at.method == "submit" && at.how == How::FailAfter);
        let most = dry.unknown_calls + undriven;
        assert!(
            (dry.unknown_calls..=most).contains(&seen.unknown_calls),
            "an error of the store leaves no call unheard"
        );
    }
    // Where two stages end side by side, their steps may travel as one: then the last commit has no number of its own.
    let merged = scenario.side_by_side > 1 && at.method == "commit" && at.nth == dry.counts[0]["commit"];
    assert!(seen.fired || merged || WATCHING.contains(&at.method), "the fault was never met");
    seen.fired
}

async fn play_all(kind: Kind, hows: [How; 2]) {
    let stands: Arc<Vec<_>> = Arc::new(
        stream::iter(0..AT_ONCE)
            .map(|_| async move { Arc::new(Stand::new(kind).await) })
            .buffer_unordered(4)
            .collect()
            .await,
    );
    let begun = std::time::Instant::now();
    let scenarios = scenarios();
    let mut cases = Vec::new();
    for (at, scenario) in scenarios.iter().enumerate() {
        let dry = play(&stands[at % AT_ONCE], scenario, None).await;
        assert_eq!(dry.state, scenario.ends, "{}", scenario.name);
        let injections = injections(&dry, scenario, hows);
        let dry = Arc::new(dry);
        cases.extend(injections.into_iter().map(|injection| (scenario, Arc::clone(&dry), injection)));
    }
    let (free, taken) = async_channel(&stands);
    let met: Mutex<BTreeMap<&str, [usize; 2]>> = Mutex::default();
    let (met, cases) = (&met, &cases);
    let broken: Vec<String> = stream::iter(cases)
        .map(|(scenario, dry, injection)| {
            let (free, taken) = (free.clone(), Arc::clone(&taken));
            async move {
                let stand = taken.lock().await.recv().await.expect("as many as there are cases at once");
                let work = async { check(scenario, dry, *injection, &play(&stand, scenario, Some(*injection)).await) };
                let ended = tokio::time::timeout(PATIENCE, AssertUnwindSafe(work).catch_unwind()).await;
                let Injection { method, nth, telling, how } = injection;
                let told = if *telling { ", of those that tell something" } else { "" };
                let case = format!("{}: {how:?} at call {nth} of {method}{told}", scenario.name);
                let _ = free.send(stand).await;
                let why = match ended {
                    Ok(Ok(fired)) => {
                        let mut met = met.lock().unwrap_or_else(PoisonError::into_inner);
                        let of_method: &mut [usize; 2] = met.entry(*method).or_default();
                        of_method[usize::from(fired)] += 1;
                        return None;
                    }
                    Ok(Err(panic)) => {
                        let text = panic.downcast_ref::<String>().cloned();
                        text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
                    }
                    Err(_) => "it never ended".to_owned(),
                };
                println!("BROKEN {case}: {why}");
                Some(format!("{case}: {why}"))
            }
        })
        .buffer_unordered(AT_ONCE)
        .filter_map(|broken| async move { broken })
        .collect()
        .await;
    let met = met.lock().unwrap_or_else(PoisonError::into_inner);
    println!("faults missed and met: {met:?}");
    println!("{kind:?} {hows:?}: {} cases in {} scenarios, {:?}", cases.len(), scenarios.len(), begun.elapsed());
    assert!(cases.len() > scenarios.len() * 20, "hardly a loop: {}", cases.len());
    let [missed, struck] = WATCHING
        .iter()
        .filter_map(|method| met.get(method))
        .fold([0, 0], |sum, met| [sum[0] + met[0], sum[1] + met[1]]);
    assert!(struck > missed, "a watcher's faults are hardly ever met: {missed} missed, {struck} met");
    assert!(broken.is_empty(), "{} of {} cases:\n{}", broken.len(), cases.len(), broken.join("\n"));
}

type Stands = (mpsc::Sender<Arc<Stand>>, Arc<tokio::sync::Mutex<mpsc::Receiver<Arc<Stand>>>>);

/// The stands that are free. One case at a time has one to itself: whoever takes over a dead replica's runs must find
/// no other's.
fn async_channel(stands: &[Arc<Stand>]) -> Stands {
    let (free, taken) = mpsc::channel(stands.len());
    for stand in stands {
        free.try_send(Arc::clone(stand)).expect("room for all");
    }
    (free, Arc::new(tokio::sync::Mutex::new(taken)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_sqlite_a_run_ends_the_same_whichever_call_of_its_store_fails() {
    play_all(Kind::Sqlite, [How::FailBefore, How::FailAfter]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_sqlite_a_run_ends_the_same_at_whichever_call_of_its_store_its_replica_dies() {
    play_all(Kind::Sqlite, [How::KillBefore, How::KillAfter]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgres_a_run_ends_the_same_whichever_call_of_its_store_fails() {
    play_all(Kind::Postgres, [How::FailBefore, How::FailAfter]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgres_a_run_ends_the_same_at_whichever_call_of_its_store_its_replica_dies() {
    play_all(Kind::Postgres, [How::KillBefore, How::KillAfter]).await;
}

/// What the loops stand on: were an answer not in the cache before its commit, they would see it bought again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shared_cache_that_forgets_does_not_go_unnoticed() {
    let stand = Stand::new(Kind::Sqlite).await;
    let scenario = scenarios().into_iter().find(|scenario| scenario.name == "queued").expect("there");
    let dry = play(&stand, &scenario, None).await;
    let at = Injection { method: "commit", nth: 2, telling: false, how: How::KillBefore };
    let seen = play_noting(&stand, &scenario, Some(at), Noted::forgetful()).await;
    assert!(seen.fired && seen.provider_calls > dry.provider_calls + scenario.unanswered(at));
}
