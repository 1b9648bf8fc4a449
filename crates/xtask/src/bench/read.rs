//! Reading: owns how long `GET /v1/runs/{id}` takes at a given rate.

use std::sync::{Mutex, PoisonError, atomic::AtomicBool};

use serde_json::json;

use super::{
    Options,
    engine::drained,
    figures::{Figures, Reach, Report},
    limits::Echo,
    load::{closed_loop, connections, open_loop},
    progress,
    rig::{AT_ONCE, Rig, Site, Submission, submit},
    wire::{self, Connection},
};

/// The rate at which the figure is wanted, in requests a second.
const RATE: f64 = 5000.0;
const CONNECTIONS: usize = 64;
/// Finished runs that are read, one after another and over again.
const RUNS: u64 = 1000;

pub(crate) async fn run(rig: &mut Rig, options: &Options) -> anyhow::Result<Report> {
    let echo = Echo::start().await?;
    let mut rounds = Vec::new();
    for round in 1..=options.rounds {
        progress(&format!("round {round}"));
        let mut figures = Figures::default();
        let mut bare = echo.at_rate(RATE, options.window / 2, false).await?;
        measure(rig, options, &mut figures).await?;
        figures.push("echo_p50_ms", "limit: bare axum echo at the same rate, p50, ms", bare.times.quantile(50));
        figures.push("echo_p95_ms", "limit: bare axum echo at the same rate, p95, ms", bare.times.quantile(95));
        figures.push("echo_p99_ms", "limit: bare axum echo at the same rate, p99, ms", bare.times.quantile(99));
        rounds.push(figures);
    }
    let parameters = json!({
        "connections": CONNECTIONS, "rate_per_s": RATE, "runs": RUNS, "window_s": options.window.as_secs_f64(),
        "servers": rig.servers(),
    });
    Ok(Report { cell: "read", store: rig.store.name(), parameters, rounds })
}

/// Runs to their end, and a request for each.
pub(crate) async fn finished_runs(site: &Site, submission: &Submission, count: u64) -> anyhow::Result<Vec<Vec<u8>>> {
    let mut connections = connections(site.address()?, CONNECTIONS).await?;
    let requests = Mutex::new(Vec::new());
    let stop = AtomicBool::new(false);
    let outcome = closed_loop(&mut connections, 1, count, &stop, async |connection: &mut Connection, number| {
        let id = submit(connection, submission, number).await?;
        requests.lock().unwrap_or_else(PoisonError::into_inner).push(wire::get(&format!("/v1/runs/{id}")));
        Ok(())
    });
    outcome.await.clean()?;
    drained(site).await?;
    Ok(requests.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Sends one of the requests; fails on anything but a 200.
pub(crate) async fn read(connection: &mut Connection, requests: &[Vec<u8>], number: u64) -> anyhow::Result<()> {
    // A prime step, so that neighbours on a page are not read together.
    let at = usize::try_from(number.wrapping_mul(7919) % requests.len() as u64)?;
    let answer = connection.call(&requests[at]).await?;
    if answer.status != 200 {
        anyhow::bail!("a read was refused: {} {}", answer.status, String::from_utf8_lossy(answer.body));
    }
    Ok(())
}

async fn measure(rig: &Rig, options: &Options, figures: &mut Figures) -> anyhow::Result<()> {
    let mut site = rig.site(&[]).await?;
    let requests = finished_runs(&site, &Submission::of(AT_ONCE), RUNS).await?;
    let mut connections = connections(site.address()?, CONNECTIONS).await?;
    let shot = async |connection: &mut Connection, number, _| read(connection, &requests, number).await;
    let before = site.reading().await?;
    let mut outcome = open_loop(&mut connections, 0, RATE, options.window, shot).await;
    let after = site.reading().await?;
    #[expect(clippy::cast_precision_loss, reason = "far fewer than 2^52 requests")]
    let (sent, errors) = (outcome.sent() as f64, outcome.errors as f64);
    figures.push("reads_per_s", "reads/s", outcome.per_second());
    figures.push("read_p50_ms", "p50, ms", outcome.times.quantile(50));
    figures.goal("read_p95_ms", "p95, ms", outcome.times.quantile(95), Reach::AtMost(5.0));
    figures.push("read_p99_ms", "p99, ms", outcome.times.quantile(99));
    figures.goal("errors", "errors", errors, Reach::AtMost(0.0));
    after.cpu_since(&before, sent, rig.store, figures);
    site.stop().await
}
