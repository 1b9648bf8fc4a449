//! `cargo xtask chaos`: replicas of the built binary behind HAProxy, real Postgres and Redis, a provider that fails, an
//! open-loop load, and faults by a seed. At the end everything is reconciled: by the database, by the API, by what the
//! watchers saw and by the provider's books. How to read it: `docs/durability.md`.

mod calls;
mod client;
mod faults;
mod load;
mod logs;
mod next;
mod pipelines;
mod reconcile;
mod replica;
mod report;
mod schedule;
mod takeover;
mod timeline;
pub(crate) mod upgrade;
mod watch;
mod world;

use std::{
    collections::{HashMap, HashSet},
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use stagegate_core::pipeline::Span;
use stagegate_testkit::{servers::Haproxy, storm::Mix};
use tokio::task::JoinSet;
use uuid::Uuid;

use self::{
    calls::Known,
    client::Client,
    load::Load,
    reconcile::Check,
    report::Facts,
    schedule::Fault,
    world::{Plan, World},
};
use crate::{daemon, system};

/// How long the load runs before the first fault, and after the last one.
const CALM_S: f64 = 3.0;
/// What a replica waits between "not ready" and the end of its listener; HAProxy asks every half second, twice.
const DRAIN_DELAY_MS: u64 = 2_000;
/// Room for the database's files, in bytes: at first, and for each second of load.
const DISK_BASE_BYTES: f64 = 128e6;
const DISK_BYTES_PER_RUN: f64 = 120e3;
/// How long watchers may take to read what is there once everything is terminal.
const WATCHERS_LIMIT_S: f64 = 15.0;
/// Reads at once when the API is asked for every run.
const READS: usize = 16;

/// Break the built binary in every way that can be staged, and reconcile
///
/// Starts Postgres, Redis, HAProxy, a failing provider and three replicas on free ports of loopback, and takes them down
/// however it ends. How to read the report: docs/durability.md.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  cargo xtask chaos                                one minute of faults, seed 1
  cargo xtask chaos --minutes 3 --seed 7           other faults, and more of them
  cargo xtask chaos --only rolling --minutes 0.5   nothing but rolling restarts
  cargo xtask chaos --minutes 10 --rate 60 --profile release --report /tmp/chaos.md

It needs the binaries of Postgres and Redis, and HAProxy, which it installs where it may (apt-get, as root). A full disk \
is staged only as root, with a small tmpfs; elsewhere the report says that it was not run. Many submits a second take \
many open files: raise their limit (ulimit -n).

Exit codes: 0 where nothing was found; 1 where the reconciliation found something, or it could not be run; 2 for wrong \
options; 130 and 143 where it was interrupted or terminated.")]
pub(crate) struct Chaos {
    /// How long faults happen, in minutes; starting, settling and reconciling come on top
    #[arg(long, default_value_t = 1.0)]
    minutes: f64,
    /// The seed; it tells the schedule, the load and the provider's faults
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Submits a second
    #[arg(long, default_value_t = 12.0)]
    rate: f64,
    /// The average pause between two faults
    #[arg(long, default_value = "3s")]
    pace: Span,
    /// How long a lease lasts: short, so that there are many take-overs
    #[arg(long, default_value = "3s")]
    lease_ttl: Span,
    /// How long everything may take to come to its end once the faults are mended
    #[arg(long, default_value = "90s")]
    settle: Span,
    /// Only this scenario
    #[arg(long, value_enum)]
    only: Option<Only>,
    /// The profile to build with
    #[arg(long, default_value = "dev")]
    profile: String,
    /// A binary to break, instead of building one
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Where the report goes, as markdown; as a JSON line it is added to target/chaos/reports.jsonl
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

/// A scenario of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Only {
    /// Replicas restarted in turn by SIGTERM, under load: every request is answered, nothing is lost
    Rolling,
}

impl Chaos {
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        prepare().await?;
        let binary = match &self.binary {
            Some(binary) => std::path::absolute(binary)?,
            None => daemon::build(&self.profile).await?,
        };
        until_interrupted(Box::pin(self.scenario(&binary))).await
    }

    async fn scenario(&self, binary: &Path) -> anyhow::Result<ExitCode> {
        let length_s = self.minutes * 60.0;
        let rolling = self.only == Some(Only::Rolling);
        let mix = if rolling {
            Mix { latency: (Duration::from_millis(50), Duration::from_millis(400)), ..Mix::calm() }
        } else {
            Mix::default()
        };
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "some hundred million bytes")]
        let disk_bytes = (!rolling).then_some((DISK_BASE_BYTES + DISK_BYTES_PER_RUN * self.rate * length_s) as u64);
        let plan = Plan {
            seed: self.seed,
            mix,
            lease_ttl_ms: u64::try_from(self.lease_ttl.0.as_millis())?,
            replicas: vec![(binary.to_owned(), Some(DRAIN_DELAY_MS)); 3],
            first: 3,
            disk_bytes,
        };
        let world = World::start(plan).await?;
        let from_s = world.timeline.now_s() + CALM_S;
        let schedule = if rolling {
            schedule::rolling(from_s, from_s + length_s, 8.0)
        } else {
            let disk = world.disk.is_some();
            schedule::draw(self.seed, from_s, from_s + length_s, self.pace.0.as_secs_f64(), 3, disk)
        };
        let run = Running::begin(&world, self.seed, self.rate)?;
        Box::pin(faults::perform(&world, schedule_said(&world, schedule))).await?;
        tokio::time::sleep(Duration::from_secs_f64(CALM_S)).await;
        let title = if rolling { "Rolling restart under load" } else { "Chaos" };
        let ending = Ending {
            title: format!("{title}, seed {}", self.seed),
            settle: self.settle.0,
            strict: rolling,
            mixed: false,
        };
        let setup = vec![
            ("replicas", format!("3, {} profile, lease_ttl {}", self.profile, self.lease_ttl)),
            ("load", format!("{} submits a second for {} minutes", self.rate, self.minutes)),
        ];
        run.end(&world, ending, setup, self.report.as_deref()).await
    }
}

fn schedule_said(world: &World, schedule: Vec<Fault>) -> Vec<Fault> {
    world.timeline.say(&format!("{} faults are to come", schedule.len()));
    schedule
}

/// What every scenario needs of the machine.
async fn prepare() -> anyhow::Result<()> {
    // Fails only where one is installed, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    if Haproxy::installed().is_none() {
        system::install(&["haproxy"], "chaos puts HAProxy before the replicas").await?;
    }
    Ok(())
}

/// Runs it to its end, or until Ctrl-C or SIGTERM: then everything is torn down by being dropped.
async fn until_interrupted(scenario: impl Future<Output = anyhow::Result<ExitCode>>) -> anyhow::Result<ExitCode> {
    let mut terminated = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        ended = scenario => ended,
        _ = tokio::signal::ctrl_c() => { eprintln!("interrupted: tearing everything down"); Ok(system::code(130)) }
        _ = terminated.recv() => { eprintln!("terminated: tearing everything down"); Ok(system::code(143)) }
    }
}

/// How a scenario ends.
struct Ending {
    title: String,
    settle: Duration,
    /// A client that was not answered, or with 5xx, is a finding.
    strict: bool,
    /// Replicas of the previous release took part.
    mixed: bool,
}

/// A load on a world, and its progress lines.
struct Running {
    client: Arc<Client>,
    load: Arc<Load>,
    progress: tokio::task::JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.progress.abort();
    }
}

impl Running {
    fn begin(world: &Arc<World>, seed: u64, rate: f64) -> anyhow::Result<Self> {
        let client = Arc::new(Client::new(world.haproxy.url(), world.timeline)?);
        let load = Load::begin(Arc::clone(&client), world.timeline, load::Settings { seed, rate });
        // It must not keep the world alive: the world is torn down by being dropped.
        let (weak, counted) = (Arc::downgrade(world), Arc::clone(&load));
        let progress = tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_secs(10)).await;
                let Some(world) = weak.upgrade() else { return };
                let (submitted, accepted) = counted.counts();
                let calls = world.storm.call_count();
                world.timeline.say(&format!("{submitted} submitted, {accepted} accepted, {calls} provider calls"));
            }
        });
        Ok(Self { client, load, progress })
    }

    /// Mends everything, waits until all is terminal, reconciles, reports, and gives the verdict.
    async fn end(
        self,
        world: &Arc<World>,
        ending: Ending,
        setup: Vec<(&'static str, String)>,
        report: Option<&Path>,
    ) -> anyhow::Result<ExitCode> {
        world.timeline.say("the load ends; everything is mended");
        self.load.end();
        world.heal().await?;
        let mended_s = world.timeline.now_s();
        let settled_s = self.settle(world, ending.settle).await?.map(|at_s| at_s - mended_s);
        let mut done = self.load.finish().await;
        world.timeline.say("reconciling");
        let read = read_all(&self.client, world).await?;
        let audit = world.auditor().await?.read().await?;
        let told = logs::replicas(world)?;
        let mut seen = std::mem::take(&mut *world.seen());
        done.submitted.append(&mut seen.submitted);
        let mut windows = told.stood_still(&seen.windows);
        windows.extend_from_slice(&seen.windows);
        windows.extend(told.fences.iter().chain(&told.cache_silences).cloned());
        let paid = calls::reconcile(&world.storm.calls(), &Known::new(&world.timeline, &windows, &audit));
        let take_overs = takeover::measure(&seen.orphans, &seen.windows, &audit, &world.timeline);
        let mut checks = reconcile::reconcile(&audit, &done, &paid, &read, ending.mixed);
        checks.push(takeover::kept(&seen.paused, &windows, world.plan.lease_ttl_s(), &audit, &world.timeline));
        checks.push(stops(&seen));
        checks.push(well_being(&told, &seen));
        checks.push(no_defects(&self.client));
        if ending.strict {
            checks.push(answered(&self.client));
        }
        let (bad_answers, sent_again) = logs::haproxy(&world.haproxy.log()?);
        let facts = Facts {
            title: ending.title,
            setup,
            checks: &checks,
            seen: &seen,
            done: &done,
            paid: &paid,
            take_overs: &take_overs,
            told: &told,
            bad_answers: &bad_answers,
            sent_again,
            client: &self.client,
            states: &reconcile::states(&audit),
            settled_s,
        };
        write(&facts, world, report)?;
        Ok(system::code(u8::from(!facts.passed())))
    }

    /// Waits until every run is terminal and every submit accepted; None where that never came.
    async fn settle(&self, world: &World, limit: Duration) -> anyhow::Result<Option<f64>> {
        let limit_s = world.timeline.now_s() + limit.as_secs_f64();
        let mut auditor = world.auditor().await?;
        loop {
            let (open, _) = auditor.open_runs().await?;
            let (submitted, accepted) = self.load.counts();
            let now_s = world.timeline.now_s();
            if open == 0 && submitted == accepted {
                world.timeline.say("everything is terminal");
                let limit_s = now_s + WATCHERS_LIMIT_S;
                while self.load.watching() > 0 && world.timeline.now_s() < limit_s {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                return Ok(Some(now_s));
            }
            if now_s > limit_s {
                world.timeline.say(&format!("{open} runs are not terminal, {submitted} submits, {accepted} accepted"));
                for (id, state, pipeline, at) in auditor.unfinished().await?.into_iter().take(20) {
                    world.timeline.say(&format!("not terminal: {id} {pipeline} {state}, claimable from {at:?}"));
                }
                return Ok(None);
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    }
}

/// Each run's state as the API tells it.
async fn read_all(client: &Arc<Client>, world: &World) -> anyhow::Result<HashMap<Uuid, String>> {
    let ids: HashSet<Uuid> = world.auditor().await?.read().await?.runs.into_keys().collect();
    let (mut states, mut reading, mut ids) = (HashMap::new(), JoinSet::new(), ids.into_iter());
    loop {
        while reading.len() < READS
            && let Some(id) = ids.next()
        {
            let client = Arc::clone(client);
            reading.spawn(async move {
                let answer = client.get("read", &format!("/v1/runs/{id}")).await;
                (id, answer.map(|answer| answer.body["state"].as_str().unwrap_or_default().to_owned()))
            });
        }
        let Some(read) = reading.join_next().await else { return Ok(states) };
        if let (id, Some(state)) = read? {
            states.insert(id, state);
        }
    }
}

/// SIGTERM ends a replica in order.
fn stops(seen: &world::Seen) -> Check {
    let mut check = Check::new("SIGTERM: exit code 0");
    for (replica, at_s, _, status) in &seen.stops {
        check.look();
        if *status != Some(0) {
            check.find(format!("{replica} at {at_s:.1} s: exit status {status:?}"));
        }
    }
    check
}

/// No replica panicked, and nothing else was found on the way.
fn well_being(told: &logs::Told, seen: &world::Seen) -> Check {
    let mut check = Check::new("no panic, and nothing found on the way");
    check.look();
    told.panics.iter().chain(&seen.findings).for_each(|finding| check.find(finding.clone()));
    check
}

/// What is away for a while is told so (503), so that clients and balancers try again; 500 is a defect of ours.
fn no_defects(client: &Client) -> Check {
    let mut check = Check::new("no request was answered with 500");
    for ((asked, outcome), times) in client.outcomes() {
        check.looked_at += times;
        if outcome.starts_with("500") {
            check.find(format!("{asked}: {outcome}, {times} times"));
        }
    }
    check
}

/// Every request was answered, and not with 5xx.
fn answered(client: &Client) -> Check {
    let mut check = Check::new("every client was answered, never with 5xx");
    check.looked_at = client.outcomes().values().sum();
    for trouble in client.troubles() {
        check.find(format!("{} at {:.2} s: {}", trouble.asked, trouble.at_s, trouble.what));
    }
    check
}

fn write(facts: &Facts<'_>, world: &World, report: Option<&Path>) -> anyhow::Result<()> {
    let folder = system::target_dir().join("chaos");
    std::fs::create_dir_all(&folder)?;
    let markdown = facts.markdown();
    let path = report.map_or_else(|| folder.join("report.md"), Path::to_owned);
    std::fs::write(&path, &markdown).with_context(|| format!("cannot write {}", path.display()))?;
    let lines = folder.join("reports.jsonl");
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(lines)?;
    writeln!(file, "{}", facts.json())?;
    // Logs go with their folders; the last ones are kept.
    for replica in &world.replicas {
        if let Ok(program) = replica.program() {
            std::fs::copy(program.log_path(), folder.join(format!("{}.log", replica.name())))?;
        }
    }
    std::fs::copy(world.haproxy.program().log_path(), folder.join("haproxy.log"))?;
    if let Some(log) = world.postgres.log_path() {
        std::fs::copy(log, folder.join("postgres.log"))?;
    }
    let short: Vec<&str> = markdown.split("\n## Faults").take(1).collect();
    println!("{}", short.concat());
    println!("the whole report: {}; the logs beside it in {}", path.display(), folder.display());
    Ok(())
}
