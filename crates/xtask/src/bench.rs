//! `cargo xtask bench`: measures what a run takes from submission to the end of its event stream, beside its critical
//! path. Owns the shape of the measurement; judges nothing.
//!
//! The canonical DAG (1→2→3→{4,5}) without judges against a provider that answers after 50 ms: four calls lie one
//! after another, so no run can take less than 200 ms. What is above that is ours.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, bail};
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use serde_json::{Value, json};
use stagegate_core::{Clock as _, SystemClock};
use stagegate_testkit::{FakeProvider, servers::Postgres};
use tokio::time::{Instant, timeout};

use crate::{
    daemon::{self, Daemon},
    system::{self, say, target_dir},
};

/// What the provider takes for an answer.
const CALL: Duration = Duration::from_millis(50);
/// Calls that lie one after another.
const CALLS_IN_ROW: u32 = 4;
/// The longest that one run may take before the measurement is given up.
const RUN_LIMIT: Duration = Duration::from_secs(30);

const PIPELINE: &str = r"
name: bench
input: { type: object, required: [n], properties: { n: { type: integer } } }
defaults: { model: fake/bench, cache: { mode: 'off' } }
stages:
  - { id: one, prompt: 'one {{ input.n }}' }
  - { id: two, needs: [one], prompt: 'two {{ stages.one.output }}' }
  - { id: three, needs: [two], prompt: 'three {{ stages.two.output }}' }
  - { id: four, needs: [three], prompt: 'four {{ stages.three.output }}' }
  - { id: five, needs: [three], prompt: 'five {{ stages.three.output }}' }
";

/// Measure what a run takes, beside its critical path.
#[derive(Debug, clap::Args)]
pub(crate) struct Bench {
    /// Runs that are measured, one after another
    #[arg(long, default_value_t = 40)]
    runs: u32,
    /// Runs before that, which are not
    #[arg(long, default_value_t = 5)]
    warmup: u32,
    /// Where the runs are kept
    #[arg(long, value_enum, default_value = "both")]
    store: Stores,
    /// A binary to measure, instead of building one with the release profile
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Stores {
    Sqlite,
    Postgres,
    Both,
}

/// One row of the table, one line of the file.
#[derive(Debug, Serialize)]
struct Row {
    at: String,
    store: &'static str,
    runs: u32,
    critical_path_ms: f64,
    provider_p50_ms: f64,
    run_p50_ms: f64,
    run_p95_ms: f64,
    ratio_p50: f64,
    ratio_p95: f64,
}

impl Bench {
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        // Fails only where one is installed, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let binary = match &self.binary {
            Some(binary) => std::path::absolute(binary)?,
            None => daemon::build("release").await?,
        };
        let provider = FakeProvider::start().await;
        provider.set_latency(CALL);
        let mut rows = Vec::new();
        if self.store != Stores::Postgres {
            say("SQLite");
            rows.push(self.measure("sqlite", &binary, &provider, Vec::new()).await?);
        }
        if self.store != Stores::Sqlite {
            say("Postgres, with every commit on disk");
            let server = Postgres::durable().await?;
            // On Postgres a listener is closed unless it is told otherwise.
            let environment =
                vec![("DATABASE_URL", server.url().to_owned()), ("STAGEGATE_HTTP__AUTH", "open".to_owned())];
            rows.push(self.measure("postgres", &binary, &provider, environment).await?);
        }
        println!("{}", table(&rows));
        println!(
            "a run is five stages, four of them in a row at {} ms each; one run at a time, no cache",
            CALL.as_millis()
        );
        let path = append(&rows)?;
        println!("appended to {}", path.display());
        Ok(system::code(0))
    }

    async fn measure(
        &self,
        store: &'static str,
        binary: &Path,
        provider: &FakeProvider,
        mut environment: Vec<(&str, String)>,
    ) -> anyhow::Result<Row> {
        environment.extend([
            ("STAGEGATE_LLM__PROVIDERS__FAKE__KIND", "openai".to_owned()),
            ("STAGEGATE_LLM__PROVIDERS__FAKE__BASE_URL", provider.openai_base_url()),
            ("STAGEGATE_LOG__FILTER", "warn".to_owned()),
        ]);
        let data = tempfile::tempdir()?;
        if store == "postgres" {
            migrate(binary, data.path(), &environment).await?;
        }
        let daemon = Daemon::start(binary, data.path(), &environment).await?;
        let client = Client::new(daemon.url())?;
        client.register().await?;
        provider.clear_calls();
        let mut took = Vec::new();
        for n in 0..self.warmup + self.runs {
            let run = client.run(n).await.with_context(|| format!("run {n}; the daemon:\n{}", daemon.log_tail()))?;
            if n >= self.warmup {
                took.push(run);
            }
        }
        let calls = provider.calls();
        let expected = 5 * usize::try_from(self.warmup + self.runs)?;
        if calls.len() != expected {
            bail!("{} model calls for {expected} stages: the measurement is not what it seems", calls.len());
        }
        daemon.stop().await?;
        let answers = calls.iter().filter_map(|call| Some(call.finished?.duration_since(call.started))).collect();
        Ok(row(store, took, answers))
    }
}

/// Brings the database's schema up to date, as a deployment would.
async fn migrate(binary: &Path, folder: &Path, environment: &[(&str, String)]) -> anyhow::Result<()> {
    let mut command = tokio::process::Command::new(binary);
    command.arg("migrate").current_dir(folder).envs(environment.iter().map(|(name, value)| (name, value)));
    system::must(&mut command, "stagegate migrate").await
}

/// A client of the daemon.
struct Client {
    http: reqwest::Client,
    url: String,
}

impl Client {
    fn new(url: &str) -> anyhow::Result<Self> {
        let http = reqwest::Client::builder().no_proxy().build()?;
        Ok(Self { http, url: url.to_owned() })
    }

    async fn register(&self) -> anyhow::Result<()> {
        let request = self.http.post(format!("{}/v1/pipelines", self.url));
        let answer = request.header("content-type", "application/yaml").body(PIPELINE).send().await?;
        let (status, text) = (answer.status(), answer.text().await?);
        if !status.is_success() {
            bail!("the pipeline was refused: {status} {text}");
        }
        Ok(())
    }

    /// Submits a run and follows its events to the end; the time from the one to the other.
    async fn run(&self, n: u32) -> anyhow::Result<Duration> {
        let body = json!({ "pipeline": "bench", "input": { "n": n } });
        let started = Instant::now();
        let answer = self.http.post(format!("{}/v1/runs", self.url)).json(&body).send().await?;
        let status = answer.status();
        let run: Value = answer.json().await?;
        let Some(id) = run.get("id").and_then(Value::as_str).filter(|_| status.as_u16() == 202) else {
            bail!("the run was refused: {status} {run}");
        };
        let url = format!("{}/v1/runs/{id}", self.url);
        let events = self.http.get(format!("{url}/events")).header("accept", "text/event-stream").send().await?;
        let took = timeout(RUN_LIMIT, finished(events, started)).await.context("the run does not end")??;
        let run: Value = self.http.get(&url).send().await?.json().await?;
        match run.get("state").and_then(Value::as_str) {
            Some("succeeded") => Ok(took),
            _ => bail!("the run ended otherwise: {run}"),
        }
    }
}

/// Reads an event stream up to the run's last event.
async fn finished(mut events: reqwest::Response, started: Instant) -> anyhow::Result<Duration> {
    let mut seen = String::new();
    while let Some(chunk) = events.chunk().await? {
        seen.push_str(&String::from_utf8_lossy(&chunk));
        if seen.lines().any(|line| line.starts_with("event:") && line.contains("run.finished")) {
            return Ok(started.elapsed());
        }
    }
    bail!("the event stream ended before the run: {seen}")
}

fn row(store: &'static str, took: Vec<Duration>, answers: Vec<Duration>) -> Row {
    let critical_path_ms = ms(CALL * CALLS_IN_ROW);
    let runs = u32::try_from(took.len()).unwrap_or(u32::MAX);
    let (took, answers) = (sorted(took), sorted(answers));
    let (run_p50_ms, run_p95_ms) = (quantile(&took, 50), quantile(&took, 95));
    Row {
        at: SystemClock.now().to_rfc3339(),
        store,
        runs,
        critical_path_ms,
        provider_p50_ms: quantile(&answers, 50),
        run_p50_ms,
        run_p95_ms,
        ratio_p50: run_p50_ms / critical_path_ms,
        ratio_p95: run_p95_ms / critical_path_ms,
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn sorted(mut durations: Vec<Duration>) -> Vec<Duration> {
    durations.sort_unstable();
    durations
}

/// The value below which `percent` of the sorted ones lie (nearest rank), in milliseconds.
fn quantile(sorted: &[Duration], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().map_or(f64::NAN, ms)
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header([
        "store",
        "runs",
        "critical path",
        "provider p50",
        "run p50",
        "run p95",
        "p50 / path",
        "p95 / path",
    ]);
    for row in rows {
        let milliseconds = |value: f64| format!("{value:.1} ms");
        table.add_row([
            row.store.to_owned(),
            row.runs.to_string(),
            milliseconds(row.critical_path_ms),
            milliseconds(row.provider_p50_ms),
            milliseconds(row.run_p50_ms),
            milliseconds(row.run_p95_ms),
            format!("{:.3}", row.ratio_p50),
            format!("{:.3}", row.ratio_p95),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Appends to the file that keeps every measurement of this machine.
fn append(rows: &[Row]) -> anyhow::Result<PathBuf> {
    let folder = target_dir().join("bench");
    std::fs::create_dir_all(&folder)?;
    let path = folder.join("run-latency.jsonl");
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(&path)?;
    for row in rows {
        writeln!(file, "{}", serde_json::to_string(row)?)?;
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_measured_values() {
        let values: Vec<_> = (1..=40).map(Duration::from_millis).collect();
        assert!((quantile(&values, 50) - 20.0).abs() < 1e-9);
        assert!((quantile(&values, 95) - 38.0).abs() < 1e-9);
        assert!((quantile(&values[..1], 95) - 1.0).abs() < 1e-9);
        assert!(quantile(&[], 50).is_nan());
    }
}
