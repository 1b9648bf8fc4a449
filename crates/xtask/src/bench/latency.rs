//! One run alone: owns how long a run takes from submission to the end of its event stream, with nothing beside it.
//!
//! Four calls of the canonical pipeline lie one after another, so that with a provider that takes 50 ms no run can
//! take less than 200 ms. What is above that is ours.

use std::time::{Duration, Instant};

use serde_json::json;
use tokio::time::timeout;

use super::{
    Options,
    figures::{Figures, Reach, Report, Times},
    rig::{AFTER_50_MS, AT_ONCE, CALLS_IN_ROW, Rig, Site, Submission, submit},
    wire::{Connection, get_events},
};

/// The longest that one run may take before the measurement is given up.
const RUN_LIMIT: Duration = Duration::from_secs(30);
/// Runs before those that are measured.
const WARM_UP: u32 = 20;

/// The cell on its own: several rounds, each on a fresh site.
pub(crate) async fn run(rig: &mut Rig, options: &Options) -> anyhow::Result<Report> {
    let mut rounds = Vec::new();
    for _ in 0..options.rounds {
        let mut figures = Figures::default();
        let mut site = rig.site(&[]).await?;
        measure(rig, &site, options, &mut figures).await?;
        site.stop().await?;
        rounds.push(figures);
    }
    let parameters = json!({ "runs": options.alone, "runs_of_50_ms": slow(options), "servers": rig.servers() });
    Ok(Report { cell: "latency", store: rig.store.name(), parameters, rounds })
}

fn slow(options: &Options) -> u32 {
    options.alone.div_ceil(8)
}

/// Runs one after another, with a provider that answers at once and with one that takes 50 ms.
pub(crate) async fn measure(rig: &Rig, site: &Site, options: &Options, figures: &mut Figures) -> anyhow::Result<()> {
    // Numbers that no other part of a round uses.
    let mut at_once = alone(site, AT_ONCE, 90_000_000, WARM_UP, options.alone).await?;
    figures.goal("alone_p50_ms", "one run alone, p50, ms", at_once.quantile(50), Reach::AtMost(3.0));
    figures.push("alone_p95_ms", "one run alone, p95, ms", at_once.quantile(95));
    figures.push("alone_p99_ms", "one run alone, p99, ms", at_once.quantile(99));
    let mut slow = alone(site, AFTER_50_MS, 91_000_000, 2, slow(options)).await?;
    let ideal = 50.0 * f64::from(CALLS_IN_ROW);
    let label = "one run alone, 50 ms provider, p50, ms";
    figures.goal("alone_50_p50_ms", label, slow.quantile(50), Reach::AtMost(ideal + 5.0));
    figures.push("alone_50_p95_ms", "one run alone, 50 ms provider, p95, ms", slow.quantile(95));
    figures.push("alone_50_p99_ms", "one run alone, 50 ms provider, p99, ms", slow.quantile(99));
    let mut slept = Times::default();
    rig.provider.slept().await?.into_iter().for_each(|slept_for| slept.add(slept_for));
    figures.push("slept_p50_ms", "what that provider takes for an answer, p50, ms", slept.quantile(50));
    Ok(())
}

async fn alone(site: &Site, pipeline: &str, first: u64, warm_up: u32, runs: u32) -> anyhow::Result<Times> {
    let mut connection = Connection::open(site.address()?).await?;
    let submission = Submission::of(pipeline);
    let mut times = Times::default();
    for n in 0..warm_up + runs {
        let started = Instant::now();
        let id = submit(&mut connection, &submission, first + u64::from(n)).await?;
        let ended = match timeout(RUN_LIMIT, connection.follow(&get_events(&id))).await {
            Ok(ended) => ended?,
            Err(_) => anyhow::bail!("run {id} does not end; the daemon:\n{}", site.log()),
        };
        if n >= warm_up {
            times.add(ended - started);
        }
    }
    Ok(times)
}
