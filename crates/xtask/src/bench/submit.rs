//! Submitting: owns how many runs a second are accepted, and how long an acceptance takes at half of that.
//!
//! The daemon has room for one run, which the provider holds: what is submitted waits in the queue, so that executing
//! takes no part.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use serde_json::json;
use tokio::time::sleep;

use super::{
    Options,
    figures::{Figures, Report},
    limits::Echo,
    load::{closed_loop, connections, open_loop},
    progress,
    rig::{HELD, Rig, Submission, submit_blind},
    wire::Connection,
};

const CONNECTIONS: usize = 64;
/// Numbers of the runs at half load; those before are saturation's.
const HALF_FIRST: u64 = 100_000_000;

pub(crate) async fn run(rig: &mut Rig, options: &Options) -> anyhow::Result<Report> {
    let echo = Echo::start().await?;
    let mut rounds = Vec::new();
    for round in 1..=options.rounds {
        progress(&format!("round {round}"));
        let mut figures = Figures::default();
        measure(rig, &echo, options, &mut figures).await?;
        rounds.push(figures);
    }
    let parameters = json!({
        "connections": CONNECTIONS, "window_s": options.window.as_secs_f64(), "max_runs": 1, "servers": rig.servers(),
    });
    Ok(Report { cell: "submit", store: rig.store.name(), parameters, rounds })
}

async fn measure(rig: &Rig, echo: &Echo, options: &Options, figures: &mut Figures) -> anyhow::Result<()> {
    let settings = [
        ("STAGEGATE_ENGINE__MAX_RUNS", "1".to_owned()),
        ("STAGEGATE_ENGINE__MAX_QUEUED", "100000000".to_owned()),
        ("STAGEGATE_ENGINE__TENANT_DEFAULTS__MAX_QUEUED", "100000000".to_owned()),
    ];
    let mut site = rig.site(&settings).await?;
    let mut connections = connections(site.address()?, CONNECTIONS).await?;
    let submission = Submission::of(HELD);
    submit_blind(&mut connections[0], &submission, HALF_FIRST - 1).await?;

    let stop = AtomicBool::new(false);
    let began = Instant::now();
    let loading = closed_loop(&mut connections, 0, u64::MAX, &stop, async |connection: &mut Connection, number| {
        submit_blind(connection, &submission, number).await
    });
    let timing = async {
        sleep(options.warm_up).await;
        let before = site.reading().await;
        sleep(options.window).await;
        let after = site.reading().await;
        stop.store(true, Ordering::Relaxed);
        anyhow::Ok((before?, after?))
    };
    let (outcome, readings) = tokio::join!(loading, timing);
    let mut outcome = outcome.clean().map_err(|error| error.context(site.log()))?;
    let (before, after) = readings?;
    let rate = outcome.per_second();
    figures.push("submits_per_s", "submits/s at saturation", rate);
    figures.push("saturated_p50_ms", "at saturation: p50, ms", outcome.times.quantile(50));
    figures.push("saturated_p99_ms", "at saturation: p99, ms", outcome.times.quantile(99));
    let window = rate * after.seconds_since(&before);
    after.cost_since(&before, window, rig.store, figures);

    let half = rate / 2.0;
    let shot = async |connection: &mut Connection, number, _| submit_blind(connection, &submission, number).await;
    let outcome = open_loop(&mut connections, HALF_FIRST, half, options.window, shot).await;
    let mut outcome = outcome.clean().map_err(|error| error.context(site.log()))?;
    figures.push("half_submits_per_s", "half load: submits/s", outcome.per_second());
    figures.push("half_p50_ms", "half load: p50, ms", outcome.times.quantile(50));
    figures.push("half_p95_ms", "half load: p95, ms", outcome.times.quantile(95));
    figures.push("half_p99_ms", "half load: p99, ms", outcome.times.quantile(99));
    let accepted = site.metrics().await?.sum("stagegate_runs_accepted_total", "");
    figures.push("accepted", "runs accepted in all", accepted);
    figures.push("measured_s", "seconds that it took in all", began.elapsed().as_secs_f64());
    // What is queued is of no use any more, and the run that is held would hold up a drain.
    site.kill().await?;
    let mut bare = echo.at_rate(half, options.window / 2, true).await?;
    figures.push("echo_p50_ms", "limit: bare axum echo at the same rate, p50, ms", bare.times.quantile(50));
    figures.push("echo_p95_ms", "limit: bare axum echo at the same rate, p95, ms", bare.times.quantile(95));
    figures.push("echo_p99_ms", "limit: bare axum echo at the same rate, p99, ms", bare.times.quantile(99));
    Ok(())
}
