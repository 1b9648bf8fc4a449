//! Everything that a chaos run consists of: owns its start, its healing and its end. All of it is gone when this is
//! dropped, and when we are killed.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::Duration,
};

use anyhow::{Context as _, bail};
use stagegate_testkit::{
    audit::Auditor,
    proxy::Mode,
    servers::{Haproxy, Postgres, Redis, SmallDisk},
    storm::{Mix, Storm},
};
use tokio::process::Command;
use uuid::Uuid;

use super::{
    client::Client,
    load::Submitted,
    pipelines::PIPELINES,
    replica::{Replica, Setup},
    timeline::Timeline,
};
use crate::system;

/// The database, and its tablespace.
const DATABASE: &str = "stagegate";

/// What a world is made of.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) mix: Mix,
    pub(crate) lease_ttl_ms: u64,
    /// Each replica's binary, and its drain delay where it knows one.
    pub(crate) replicas: Vec<(PathBuf, Option<u64>)>,
    /// How many of them are started at once; the others are launched later.
    pub(crate) first: usize,
    /// The room for the database's files, in bytes; None for the machine's disk.
    pub(crate) disk_bytes: Option<u64>,
}

impl Plan {
    /// How long a lease lasts, in seconds.
    pub(crate) fn lease_ttl_s(&self) -> f64 {
        Duration::from_millis(self.lease_ttl_ms).as_secs_f64()
    }
}

/// A span of time in which something named was the case.
#[derive(Debug, Clone, serde::Serialize)]
pub(crate) struct Window {
    pub(crate) what: String,
    pub(crate) from_s: f64,
    pub(crate) to_s: f64,
    pub(crate) kind: WindowKind,
}

/// What a window excuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub(crate) enum WindowKind {
    /// This replica could not use what it received.
    Interrupted(usize),
    /// This replica had given no sign of life since, when it was interrupted: it may not have read what it received.
    Still(usize),
    /// This replica was frozen for less than its fence: it could use what it received when it went on.
    Paused(usize),
    /// This replica was frozen past its lease and has just woken, not knowing it yet.
    Woken(usize),
    /// The shared cache was away from this replica, or from all.
    CacheAway(Option<usize>),
    /// The shared cache lost what it had.
    CacheLost,
    /// The store did not answer, or broke off.
    StoreAway,
    /// Something else, for the report.
    Other,
}

/// Runs whose owner was taken away, or only stood still.
#[derive(Debug, Clone)]
pub(crate) struct Orphans {
    pub(crate) what: String,
    pub(crate) at_s: f64,
    pub(crate) runs: Vec<Uuid>,
}

/// What was seen while it ran.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) windows: Vec<Window>,
    pub(crate) orphans: Vec<Orphans>,
    /// What replicas owned that were frozen for less than their fence, and until when they were.
    pub(crate) paused: Vec<(Orphans, f64)>,
    /// SIGTERMs: the replica, when, the seconds it took, and its exit status.
    pub(crate) stops: Vec<(String, f64, f64, Option<i32>)>,
    /// Runs that something else than the load submitted.
    pub(crate) submitted: Vec<Submitted>,
    /// What broke a promise on the way.
    pub(crate) findings: Vec<String>,
    /// What could not be done, and why.
    pub(crate) notes: Vec<String>,
}

/// The world.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) timeline: Timeline,
    pub(crate) plan: Plan,
    // Dropped in this order: whoever uses something goes before it.
    pub(crate) haproxy: Haproxy,
    pub(crate) replicas: Vec<Replica>,
    pub(crate) storm: Storm,
    pub(crate) redis: Redis,
    pub(crate) postgres: Postgres,
    pub(crate) disk: Option<SmallDisk>,
    pub(crate) database_url: String,
    pub(crate) postgres_busy: tokio::sync::Mutex<()>,
    pub(crate) redis_busy: tokio::sync::Mutex<()>,
    pub(crate) provider_busy: tokio::sync::Mutex<()>,
    seen: Mutex<Seen>,
}

impl World {
    /// Starts all of it, registers the pipelines, and waits until it is ready.
    pub(crate) async fn start(plan: Plan) -> anyhow::Result<Arc<Self>> {
        let timeline = Timeline::begin();
        timeline.say("starting Postgres (fsync on), Redis, the provider and HAProxy");
        let postgres = Postgres::durable().await?;
        let mut seen = Seen::default();
        let disk = match plan.disk_bytes.map(|bytes| SmallDisk::mount(bytes, postgres.user())) {
            Some(Ok(disk)) => Some(disk),
            Some(Err(error)) => {
                seen.notes.push(format!("disk full: not run: {error:#}"));
                None
            }
            None => None,
        };
        let mut auditor = Auditor::connect(postgres.url()).await?;
        auditor.create_database(DATABASE, disk.as_ref().map(SmallDisk::data)).await?;
        let database_url = database_url(postgres.url());
        let redis = Redis::private().await?;
        let storm = Storm::start(plan.seed, plan.mix.clone()).await?;
        let mut replicas = Vec::new();
        for (index, (binary, drain_delay_ms)) in plan.replicas.iter().enumerate() {
            let name = format!("r{}", index + 1);
            let setup = Setup {
                provider_url: storm.base_url(&name),
                name,
                binary: binary.clone(),
                lease_ttl_ms: plan.lease_ttl_ms,
                drain_delay_ms: *drain_delay_ms,
                postgres: address_of(postgres.url())?,
                redis: address_of(redis.url())?,
            };
            replicas.push(Replica::prepare(setup).await?);
        }
        let backends: Vec<_> = replicas.iter().map(|replica| (replica.name().to_owned(), replica.address())).collect();
        let haproxy = Haproxy::start(&backends).await?;
        let world = Self {
            timeline,
            plan,
            haproxy,
            replicas,
            storm,
            redis,
            postgres,
            disk,
            database_url,
            postgres_busy: tokio::sync::Mutex::default(),
            redis_busy: tokio::sync::Mutex::default(),
            provider_busy: tokio::sync::Mutex::default(),
            seen: Mutex::new(seen),
        };
        world.migrate(&world.plan.replicas[0].0).await?;
        for replica in world.replicas.iter().take(world.plan.first) {
            replica.launch()?;
        }
        for replica in world.replicas.iter().take(world.plan.first) {
            replica.ready().await?;
        }
        world.register().await?;
        Ok(Arc::new(world))
    }

    /// Brings the schema up to date with this binary, as a deployment would.
    pub(crate) async fn migrate(&self, binary: &Path) -> anyhow::Result<()> {
        let mut command = Command::new(binary);
        let folder = tempfile::tempdir()?;
        command.arg("migrate").current_dir(folder.path()).env_clear().env("DATABASE_URL", &self.database_url);
        command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null()).kill_on_drop(true);
        system::must(&mut command, "stagegate migrate").await
    }

    async fn register(&self) -> anyhow::Result<()> {
        let client = Client::new(self.haproxy.url(), self.timeline)?;
        for spec in &PIPELINES {
            let mut last = None;
            for _ in 0..40 {
                last = client.register(spec.definition).await;
                if last.as_ref().is_some_and(|answer| answer.status < 500) {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(250)).await;
            }
            match last {
                Some(answer) if answer.status == 200 || answer.status == 201 => {}
                other => {
                    let log = self.haproxy.program().log_tail();
                    bail!("the pipeline {} was refused: {other:?}; HAProxy:\n{log}", spec.name)
                }
            }
        }
        Ok(())
    }

    /// A connection of our own to the database, past every proxy.
    pub(crate) async fn auditor(&self) -> anyhow::Result<Auditor> {
        let connecting = Auditor::connect(&self.database_url);
        tokio::time::timeout(Duration::from_secs(5), connecting).await.context("the database does not answer")?
    }

    pub(crate) fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a span of time from then until now.
    pub(crate) fn window(&self, what: &str, kind: WindowKind, from_s: f64, to_s: f64) {
        self.seen().windows.push(Window { what: what.to_owned(), from_s, to_s, kind });
    }

    /// Notes which runs a replica owns at this moment; what cannot be asked is not measured.
    pub(crate) async fn orphans(&self, what: &str, replica: usize) -> Option<Orphans> {
        let name = self.replicas[replica].name();
        let asked = async { self.auditor().await?.owned_by(name).await };
        let runs = tokio::time::timeout(Duration::from_secs(2), asked).await.ok()?.ok()?;
        Some(Orphans { what: what.to_owned(), at_s: self.timeline.now_s(), runs })
    }

    /// Ends every fault: proxies pass, servers and replicas run, the provider is calm, the disk has room.
    pub(crate) async fn heal(&self) -> anyhow::Result<()> {
        self.storm.set_outage(None);
        self.storm.set_rate(None);
        self.storm.set_mix(Mix::calm());
        if let Some(disk) = &self.disk {
            disk.free()?;
        }
        for replica in &self.replicas {
            replica.postgres.set(Mode::Pass);
            replica.redis.set(Mode::Pass);
        }
        self.redis.start().await?;
        if !self.postgres.is_running() {
            self.postgres.crash().await?;
        }
        self.postgres.start().await?;
        for replica in &self.replicas {
            let Ok(program) = replica.program() else { continue };
            program.thaw();
            if !program.is_running() && !replica.retired.load(Ordering::Relaxed) {
                program.stop("KILL").await?;
                replica.launch_until_ready(Duration::from_mins(1)).await?;
            }
        }
        Ok(())
    }
}

/// Our database on the server of this URL.
fn database_url(url: &str) -> String {
    match url.rsplit_once('/') {
        Some((server, _)) => format!("{server}/{DATABASE}"),
        None => url.to_owned(),
    }
}

/// Host and port of a URL on loopback.
fn address_of(url: &str) -> anyhow::Result<SocketAddr> {
    let rest = url.split("://").nth(1).unwrap_or(url);
    let host = rest.split('/').next().unwrap_or(rest);
    let host = host.rsplit('@').next().unwrap_or(host);
    host.parse().with_context(|| format!("{url} names no address"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_from_urls() {
        for url in ["postgres://stagegate@127.0.0.1:5432/postgres", "redis://127.0.0.1:5432/"] {
            assert_eq!(address_of(url).expect("an address").port(), 5432);
        }
    }
}
