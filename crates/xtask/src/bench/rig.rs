//! What a measurement stands on: owns the throwaway servers, the provider's process, and fresh sites (a database, a
//! daemon on it, the pipelines registered). Measures nothing but counters.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, bail};
use sqlx::{Connection as _, PgConnection};
use stagegate_testkit::servers::{Postgres, Redis, TestDatabase};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{
    figures::{Figures, Reach},
    machine,
    provider::ProviderProcess,
    wire::{self, Connection},
};
use crate::{daemon::Daemon, system};

/// The canonical pipeline, 1→2→3→{4,5}, once per behaviour of the provider. Every prompt names its run, so that no two
/// are alike and nothing is a cache hit; the cache is on.
const PIPELINE: &str = r"
name: NAME
input: { type: object, required: [n, text], properties: { n: { type: string }, text: { type: string } } }
defaults: { model: bench/MODEL, timeout: 15m }
stages:
  - { id: one, prompt: 'run-{{ input.n }} one {{ input.text }}' }
  - { id: two, needs: [one], prompt: 'run-{{ input.n }} two {{ stages.one.output }}' }
  - { id: three, needs: [two], prompt: 'run-{{ input.n }} three {{ stages.two.output }}' }
  - { id: four, needs: [three], prompt: 'run-{{ input.n }} four {{ stages.three.output }}' }
  - { id: five, needs: [three], prompt: 'run-{{ input.n }} five {{ stages.three.output }}' }
";
/// Model calls of one run that lie in a row.
pub(crate) const CALLS_IN_ROW: u32 = 4;
/// The pipelines by name, and how the provider answers them.
pub(crate) const AT_ONCE: &str = "at-once";
pub(crate) const AFTER_50_MS: &str = "after-50-ms";
pub(crate) const HELD: &str = "held";
pub(crate) const TINY: &str = "tiny";
const PIPELINES: [(&str, &str); 4] = [(AT_ONCE, "d0"), (AFTER_50_MS, "d50"), (HELD, "hold"), (TINY, "tiny")];
/// The size of a run's input text, in bytes.
const INPUT_BYTES: usize = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Store {
    Sqlite,
    Postgres,
}

impl Store {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Sqlite => "sqlite",
            Self::Postgres => "postgres",
        }
    }
}

/// The servers of one store, and what is needed to start daemons on them.
pub(crate) struct Rig {
    pub(crate) store: Store,
    pub(crate) provider: ProviderProcess,
    pub(crate) postgres: Option<Arc<Postgres>>,
    redis: Option<Redis>,
    redis_pid: Option<u32>,
    postgres_pid: Option<u32>,
    binary: PathBuf,
}

impl Rig {
    /// With a provider in the clear, or over TLS.
    pub(crate) async fn start(store: Store, binary: &Path, is_tls: bool) -> anyhow::Result<Self> {
        let provider = ProviderProcess::start(is_tls).await?;
        let (mut postgres, mut redis, mut redis_pid, mut postgres_pid) = (None, None, None, None);
        if store == Store::Postgres {
            let server = Arc::new(Postgres::seasoned().await?);
            let mut connection = PgConnection::connect(server.url()).await?;
            let backend: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut connection).await?;
            postgres_pid = machine::parent(u32::try_from(backend)?);
            let _ = connection.close().await;
            let cache = Redis::private().await?;
            redis_pid = Some(redis_process(cache.url()).await?);
            (postgres, redis) = (Some(server), Some(cache));
        }
        Ok(Self { store, provider, postgres, redis, redis_pid, postgres_pid, binary: binary.to_owned() })
    }

    /// Which servers these are.
    pub(crate) fn servers(&self) -> &'static str {
        match (self.store, self.provider.ca_file()) {
            (Store::Postgres, None) => "Postgres (fsync on) and Redis, both real, on this machine",
            (Store::Postgres, Some(_)) => {
                "Postgres (fsync on) and Redis, both real, on this machine; the provider over TLS"
            }
            (Store::Sqlite, None) => "SQLite (WAL, synchronous=FULL), the cache in the same file",
            (Store::Sqlite, Some(_)) => {
                "SQLite (WAL, synchronous=FULL), the cache in the same file; the provider over TLS"
            }
        }
    }

    /// The CPU time that Postgres has used so far, in seconds.
    pub(crate) fn postgres_cpu_s(&self) -> f64 {
        self.postgres_pid.map_or(0.0, machine::tree_cpu_s)
    }

    /// An empty database with a daemon on it; the provider and the cache have forgotten everything.
    pub(crate) async fn site(&self, settings: &[(&str, String)]) -> anyhow::Result<Site> {
        self.provider.reset().await?;
        if let Some(redis) = &self.redis {
            redis.flush().await?;
        }
        if let Some(postgres) = &self.postgres {
            postgres.checkpoint().await?; // What the part before has written must not be written in this one.
        }
        let database = match &self.postgres {
            Some(server) => Some(TestDatabase::on(Arc::clone(server)).await?),
            None => None,
        };
        let mut environment = vec![
            ("STAGEGATE_LLM__PROVIDERS__BENCH__KIND", "openai".to_owned()),
            ("STAGEGATE_LLM__PROVIDERS__BENCH__BASE_URL", self.provider.base_url()),
            ("STAGEGATE_LLM__PROVIDERS__BENCH__MAX_CONCURRENCY", "30000".to_owned()),
            ("STAGEGATE_LOG__FILTER", "warn".to_owned()),
        ];
        if let Some(path) = self.provider.ca_file() {
            // Every release knows this variable.
            environment.push(("SSL_CERT_FILE", path.display().to_string()));
        }
        if let (Some(database), Some(redis)) = (&database, &self.redis) {
            environment.push(("DATABASE_URL", database.url().to_owned()));
            environment.push(("REDIS_URL", redis.url().to_owned()));
            // On Postgres a listener is closed unless it is told otherwise.
            environment.push(("STAGEGATE_HTTP__AUTH", "open".to_owned()));
        }
        environment.extend(settings.iter().cloned());
        let data = tempfile::tempdir()?;
        if database.is_some() {
            migrate(&self.binary, data.path(), &environment).await?;
        }
        let environment = environment.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let mut site = Site {
            binary: self.binary.clone(),
            environment,
            daemon: None,
            observer: None,
            data,
            redis_pid: self.redis_pid,
            postgres_pid: self.postgres_pid,
            provider_pid: self.provider.pid,
            database,
        };
        site.start().await?;
        site.register().await?;
        if let Some(database) = &site.database {
            site.observer = Some(PgConnection::connect(database.url()).await?);
        }
        Ok(site)
    }
}

/// A database and the daemon on it.
pub(crate) struct Site {
    binary: PathBuf,
    environment: Vec<(String, String)>,
    daemon: Option<Daemon>,
    observer: Option<PgConnection>,
    pub(crate) data: tempfile::TempDir,
    redis_pid: Option<u32>,
    postgres_pid: Option<u32>,
    provider_pid: u32,
    pub(crate) database: Option<TestDatabase>,
}

impl Site {
    /// Starts the daemon, with what it was given first.
    pub(crate) async fn start(&mut self) -> anyhow::Result<()> {
        self.daemon = Some(self.replica(self.data.path()).await?);
        Ok(())
    }

    /// Starts one more daemon on the same database, with a folder of its own.
    pub(crate) async fn replica(&self, folder: &Path) -> anyhow::Result<Daemon> {
        let environment: Vec<_> = self.environment.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
        Daemon::start(&self.binary, folder, &environment).await
    }

    pub(crate) fn daemon(&self) -> anyhow::Result<&Daemon> {
        self.daemon.as_ref().context("the daemon is not started")
    }

    /// Ends the daemon as a crash would.
    pub(crate) async fn kill(&mut self) -> anyhow::Result<()> {
        match self.daemon.take() {
            Some(daemon) => daemon.kill().await,
            None => Ok(()),
        }
    }

    /// Changes a setting for the daemons that are started from now on.
    pub(crate) fn set(&mut self, name: &str, value: &str) {
        self.environment.retain(|(known, _)| known != name);
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    pub(crate) fn address(&self) -> anyhow::Result<SocketAddr> {
        self.daemon()?.address()
    }

    pub(crate) fn pid(&self) -> anyhow::Result<u32> {
        self.daemon()?.pid()
    }

    pub(crate) async fn stop(&mut self) -> anyhow::Result<()> {
        match self.daemon.take() {
            Some(daemon) => daemon.stop().await,
            None => Ok(()),
        }
    }

    /// For an error message.
    pub(crate) fn log(&self) -> String {
        self.daemon.as_ref().map(Daemon::log_tail).unwrap_or_default()
    }

    async fn register(&self) -> anyhow::Result<()> {
        let mut connection = Connection::open(self.address()?).await?;
        for (name, model) in PIPELINES {
            let pipeline = PIPELINE.replace("NAME", name).replace("MODEL", model);
            let answer = connection.call(&wire::post("/v1/pipelines", "application/yaml", &pipeline)).await?;
            if answer.status != 201 {
                bail!("the pipeline was refused: {} {}", answer.status, String::from_utf8_lossy(answer.body));
            }
        }
        Ok(())
    }

    /// The database itself, to be asked and filled.
    pub(crate) fn database(&mut self) -> anyhow::Result<&mut PgConnection> {
        self.observer.as_mut().context("only Postgres can be asked")
    }

    /// The daemon's own metrics at one moment.
    pub(crate) async fn metrics(&self) -> anyhow::Result<Metrics> {
        metrics(self.address()?).await
    }

    /// Runs that have succeeded on this daemon; fails where any ended otherwise.
    pub(crate) async fn succeeded(&self) -> anyhow::Result<f64> {
        let metrics = self.metrics().await?;
        let succeeded = metrics.sum("stagegate_runs_finished_total", "succeeded");
        let all = metrics.sum("stagegate_runs_finished_total", "");
        if all > succeeded {
            bail!("{} runs ended otherwise than succeeded:\n{}", all - succeeded, self.log());
        }
        Ok(succeeded)
    }

    /// Everything that is counted, at this moment.
    pub(crate) async fn reading(&mut self) -> anyhow::Result<Reading> {
        let mut reading = Reading { succeeded: self.succeeded().await?, ..Reading::default() };
        if let Some(observer) = self.observer.as_mut() {
            let row: (f64, f64, f64, f64, f64, f64, f64) = sqlx::query_as(READING).fetch_one(observer).await?;
            (reading.wal_bytes, reading.commits) = (row.0, row.1);
            (reading.inserted, reading.updated, reading.hot, reading.dead) = (row.2, row.3, row.4, row.5);
            reading.wal_records = row.6;
        }
        reading.stagegate_s = machine::cpu_s(self.pid()?);
        reading.postgres_s = self.postgres_pid.map_or(0.0, machine::tree_cpu_s);
        reading.redis_s = self.redis_pid.map_or(0.0, machine::cpu_s);
        reading.provider_s = machine::cpu_s(self.provider_pid);
        reading.load_s = machine::cpu_s(std::process::id());
        reading.machine_s = machine::machine_cpu_s();
        reading.at = Some(std::time::Instant::now());
        Ok(reading)
    }
}

/// What a daemon counts, at one moment.
pub(crate) async fn metrics(address: SocketAddr) -> anyhow::Result<Metrics> {
    let mut connection = Connection::open(address).await?;
    let answer = connection.call(&wire::get("/metrics")).await?;
    Ok(Metrics { text: String::from_utf8_lossy(answer.body).into_owned() })
}

/// What `GET /metrics` answered.
#[derive(Debug)]
pub(crate) struct Metrics {
    text: String,
}

impl Metrics {
    /// The sum over the series of this name whose labels hold this text.
    pub(crate) fn sum(&self, name: &str, label: &str) -> f64 {
        let series = self.text.lines().filter(|line| {
            let rest = line.strip_prefix(name).unwrap_or("!");
            (rest.starts_with('{') || rest.starts_with(' ')) && rest.contains(label)
        });
        series.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }
}

/// One statement of ours, so that it counts as one commit.
const READING: &str = "SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::float8,
    (SELECT xact_commit::float8 FROM pg_stat_database WHERE datname = current_database()),
    (SELECT coalesce(sum(n_tup_ins), 0)::float8 FROM pg_stat_user_tables),
    (SELECT coalesce(sum(n_tup_upd), 0)::float8 FROM pg_stat_user_tables),
    (SELECT coalesce(sum(n_tup_hot_upd), 0)::float8 FROM pg_stat_user_tables),
    (SELECT coalesce(sum(n_dead_tup), 0)::float8 FROM pg_stat_user_tables),
    (SELECT wal_records::float8 FROM pg_stat_wal)";

/// Counters at one moment; CPU in seconds.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reading {
    at: Option<std::time::Instant>,
    pub(crate) succeeded: f64,
    wal_bytes: f64,
    wal_records: f64,
    commits: f64,
    inserted: f64,
    updated: f64,
    hot: f64,
    dead: f64,
    stagegate_s: f64,
    postgres_s: f64,
    redis_s: f64,
    provider_s: f64,
    load_s: f64,
    machine_s: f64,
}

impl Reading {
    pub(crate) fn seconds_since(&self, before: &Self) -> f64 {
        match (self.at, before.at) {
            (Some(now), Some(then)) => (now - then).as_secs_f64(),
            _ => f64::NAN,
        }
    }

    /// What happened since, per run that has succeeded, with the goals of saturation.
    pub(crate) fn since(&self, before: &Self, store: Store, figures: &mut Figures) {
        let runs = self.succeeded - before.succeeded;
        let rate = runs / self.seconds_since(before);
        figures.goal("runs_per_s", "runs/s at saturation", rate, Reach::AtLeast(2000.0));
        let mut costs = Figures::default();
        self.cost_since(before, runs, store, &mut costs);
        let goals = [
            ("commits_each", 0.5),
            ("wal_kb_each", 14.0),
            ("stagegate_cpu_ms_each", 0.6),
            ("postgres_cpu_ms_each", 0.3),
        ];
        for figure in &mut costs.0 {
            let goal = goals.iter().find(|(key, _)| *key == figure.key);
            figure.reach = goal.map(|(_, bound)| Reach::AtMost(*bound));
        }
        figures.0.extend(costs.0);
    }

    /// What happened since, per piece of work.
    pub(crate) fn cost_since(&self, before: &Self, pieces: f64, store: Store, figures: &mut Figures) {
        let each = |now: f64, then: f64| (now - then) / pieces;
        if store == Store::Postgres {
            // The first reading's own statement lies between the two.
            let commits = (self.commits - before.commits - 1.0) / pieces;
            figures.push("commits_each", "commits for each", commits);
            figures.push("wal_kb_each", "WAL for each, KB", each(self.wal_bytes, before.wal_bytes) / 1000.0);
            figures.push("wal_records_each", "WAL records for each", each(self.wal_records, before.wal_records));
            figures.push("rows_inserted_each", "rows inserted for each", each(self.inserted, before.inserted));
            figures.push("rows_updated_each", "rows updated for each", each(self.updated, before.updated));
            if self.updated - before.updated > pieces / 100.0 {
                let hot = (self.hot - before.hot) / (self.updated - before.updated) * 100.0;
                figures.push("hot_updates_percent", "heap-only updates, %", hot);
            }
            let dead = each(self.dead, before.dead);
            figures.push("dead_tuples_each", "dead tuples for each, vacuum as it comes", dead);
        }
        self.cpu_since(before, pieces, store, figures);
    }

    /// The CPU time that was taken since, per piece of work.
    pub(crate) fn cpu_since(&self, before: &Self, pieces: f64, store: Store, figures: &mut Figures) {
        let ms = |now: f64, then: f64| (now - then) / pieces * 1000.0;
        figures.push("stagegate_cpu_ms_each", "CPU for each, ms: stagegate", ms(self.stagegate_s, before.stagegate_s));
        if store == Store::Postgres {
            figures.push("postgres_cpu_ms_each", "CPU for each, ms: Postgres", ms(self.postgres_s, before.postgres_s));
            figures.push("redis_cpu_ms_each", "CPU for each, ms: Redis", ms(self.redis_s, before.redis_s));
        }
        figures.push("provider_cpu_ms_each", "CPU for each, ms: provider", ms(self.provider_s, before.provider_s));
        figures.push("load_cpu_ms_each", "CPU for each, ms: load", ms(self.load_s, before.load_s));
        let ours = |reading: &Self| {
            reading.stagegate_s + reading.postgres_s + reading.redis_s + reading.provider_s + reading.load_s
        };
        let others = (self.machine_s - before.machine_s) - (ours(self) - ours(before));
        let others = others / self.seconds_since(before);
        figures.push("others_cores", "cores taken by anything else meanwhile", others);
    }
}

/// A request that submits a run, with the place where its number goes.
#[derive(Debug, Clone)]
pub(crate) struct Submission {
    request: Vec<u8>,
    digits_at: usize,
}

impl Submission {
    pub(crate) fn of(pipeline: &str) -> Self {
        Self::sized(pipeline, INPUT_BYTES)
    }

    /// With an input of so many bytes.
    pub(crate) fn sized(pipeline: &str, input_bytes: usize) -> Self {
        let mut text = String::from("brief: ");
        while text.len() < input_bytes {
            text.push_str("a tool that turns a product brief into an engineering spec; ");
        }
        text.truncate(input_bytes);
        let body = format!(r#"{{"pipeline":"{pipeline}","input":{{"n":"@@@@@@@@@@","text":"@@@@@@@@@@ {text}"}}}}"#);
        let request = wire::post("/v1/runs", "application/json", &body);
        let digits_at = wire::find(&request, b"@@@@@@@@@@").unwrap_or(0);
        Self { request, digits_at }
    }

    /// The request for run `number`.
    pub(crate) fn numbered(&self, number: u64) -> Vec<u8> {
        let mut request = self.request.clone();
        let digits = format!("{number:010}");
        for at in [self.digits_at, self.digits_at + 10 + r#"","text":""#.len()] {
            request[at..at + 10].copy_from_slice(digits.as_bytes());
        }
        request
    }
}

/// Submits a run; its id is returned.
pub(crate) async fn submit(
    connection: &mut Connection,
    submission: &Submission,
    number: u64,
) -> anyhow::Result<String> {
    let answer = connection.call(&submission.numbered(number)).await?;
    let id = wire::find(answer.body, br#""id":""#).and_then(|at| answer.body.get(at + 6..at + 42));
    match (answer.status, id) {
        (202, Some(id)) => Ok(String::from_utf8_lossy(id).into_owned()),
        _ => bail!("the run was refused: {} {}", answer.status, String::from_utf8_lossy(answer.body)),
    }
}

/// Submits a run and looks no further than at the status.
pub(crate) async fn submit_blind(
    connection: &mut Connection,
    submission: &Submission,
    number: u64,
) -> anyhow::Result<()> {
    let answer = connection.call(&submission.numbered(number)).await?;
    if answer.status != 202 {
        bail!("the run was refused: {} {}", answer.status, String::from_utf8_lossy(answer.body));
    }
    Ok(())
}

/// Brings the database's schema up to date, as a deployment would.
async fn migrate(binary: &Path, folder: &Path, environment: &[(&str, String)]) -> anyhow::Result<()> {
    let mut command = tokio::process::Command::new(binary);
    command.arg("migrate").current_dir(folder).envs(environment.iter().map(|(name, value)| (name, value)));
    command.stdout(std::process::Stdio::null());
    system::must(&mut command, "stagegate migrate").await
}

/// The process of a Redis server.
async fn redis_process(url: &str) -> anyhow::Result<u32> {
    let address = url.trim_start_matches("redis://").trim_end_matches('/');
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    stream.write_all(b"INFO server\r\n").await?;
    let mut answer = vec![0; 16 * 1024];
    let length = stream.read(&mut answer).await?;
    let text = String::from_utf8_lossy(&answer[..length]).into_owned();
    let line = text.lines().find_map(|line| line.strip_prefix("process_id:")).context("Redis tells no process id")?;
    Ok(line.trim().parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_submission_is_distinct_in_all_that_is_asked() {
        let request = Submission::of(AT_ONCE).numbered(42);
        let body = &request[wire::find(&request, b"\r\n\r\n").expect("a head") + 4..];
        let value: serde_json::Value = serde_json::from_slice(body).expect("JSON");
        assert_eq!(value["input"]["n"], "0000000042");
        assert!(value["input"]["text"].as_str().expect("a text").starts_with("0000000042 brief"));
        assert_eq!(wire::find(body, b"@"), None);
    }
}
