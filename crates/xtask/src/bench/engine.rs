//! The engine: owns saturation (how many runs a second, at what price), one run alone, and half load.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::json;
use tokio::{
    sync::Semaphore,
    time::{sleep, timeout},
};

use super::{
    Options,
    figures::{Figures, Reach, Report, Times},
    latency,
    limits::{self, Echo},
    load::{Outcome, closed_loop, connections, open_loop},
    machine, progress,
    rig::{AT_ONCE, Rig, Site, Submission, submit, submit_blind},
    wire::{Connection, get_events},
};

/// Connections over which a closed loop submits.
const SUBMITTERS: usize = 64;
/// Connections of the open loop; each follower of a run keeps one meanwhile.
const OPEN_CONNECTIONS: usize = 256;
/// Of so many runs at half load, one is followed to its end.
const FOLLOWED: u64 = 10;
/// How long a yardstick is held to the machine.
const LIMIT_TIME: Duration = Duration::from_secs(2);
/// How long runs may take to end once nothing is submitted any more.
const DRAIN_LIMIT: Duration = Duration::from_mins(2);
/// The first run number at half load; those before are saturation's.
const HALF_FIRST: u64 = 20_000_000;

pub(crate) async fn run(rig: &mut Rig, options: &Options) -> anyhow::Result<Report> {
    let echo = Echo::start().await?;
    let mut rounds = Vec::new();
    for round in 1..=options.rounds {
        progress(&format!("round {round}: limits"));
        let mut limits = Figures::default();
        limits::measure(rig, &echo, LIMIT_TIME.min(options.window), &mut limits).await?;
        progress(&format!("round {round}: saturation"));
        let mut figures = Figures::default();
        let mut site = rig.site(&[]).await?;
        saturation(rig, &mut site, options, &mut figures).await?;
        let rate = figures.get("runs_per_s").unwrap_or(0.0) / 2.0;
        progress(&format!("round {round}: one run alone"));
        latency::measure(rig, &site, options, &mut figures).await?;
        progress(&format!("round {round}: half load, {rate:.0} runs/s"));
        half_load(rig, &site, options, rate, &mut figures).await?;
        figures.0.extend(limits.0);
        site.stop().await?;
        rounds.push(figures);
    }
    let parameters = json!({
        "in_flight": options.in_flight, "window_s": options.window.as_secs_f64(), "rounds": options.rounds,
        "servers": rig.servers(),
    });
    Ok(Report { cell: "engine", store: rig.store.name(), parameters, rounds })
}

/// A closed loop that keeps so many runs in flight. That a run ends is seen at the provider, which costs nothing;
/// how many have ended is read from the daemon's counter at both ends of the window.
async fn saturation(rig: &Rig, site: &mut Site, options: &Options, figures: &mut Figures) -> anyhow::Result<()> {
    let mut submitters = connections(site.address()?, SUBMITTERS).await?;
    let mut watch = rig.provider.watch().await?;
    let (room, stop) = (Semaphore::new(options.in_flight), AtomicBool::new(false));
    let submission = Submission::of(AT_ONCE);
    let shot = async |connection: &mut Connection, number| {
        if let Ok(permit) = room.acquire().await {
            permit.forget();
        }
        if stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        submit_blind(connection, &submission, number).await
    };
    let submitting = closed_loop(&mut submitters, 0, u64::MAX, &stop, shot);
    let making_room = async {
        let mut known = 0;
        loop {
            let finished: u64 = match watch.next().await {
                Ok(finished) => finished,
                Err(error) => return Err(error),
            };
            room.add_permits(usize::try_from(finished - known).unwrap_or(usize::MAX >> 4));
            known = finished;
        }
    };
    let idle = machine::resident_bytes(site.pid()?);
    let window = async {
        sleep(options.warm_up).await;
        let before = site.reading().await?;
        sleep(options.window).await;
        let after = site.reading().await?;
        after.since(&before, rig.store, figures);
        let resident = machine::resident_bytes(site.pid()?);
        figures.push("resident_mb", "resident at saturation, MB", resident / 1e6);
        figures.push("resident_idle_mb", "resident when it had started, MB", idle / 1e6);
        anyhow::Ok(())
    };
    let measuring = async {
        let measured = window.await;
        // Also where it failed: the load would never end.
        stop.store(true, Ordering::Relaxed);
        room.close();
        measured
    };
    let loading = async { tokio::join!(submitting, measuring) };
    let (outcome, measured): (Outcome, anyhow::Result<()>) = tokio::select! {
        broken = making_room => return broken,
        ended = loading => ended,
    };
    measured?;
    outcome.clean().map_err(|error| error.context(site.log()))?;
    drained(site).await
}

/// Waits until every accepted run has succeeded.
pub(crate) async fn drained(site: &Site) -> anyhow::Result<()> {
    let limit = Instant::now() + DRAIN_LIMIT;
    loop {
        // Nothing is accepted any more: the two may be read one after the other.
        let accepted = site.metrics().await?.sum("stagegate_runs_accepted_total", "");
        if site.succeeded().await? >= accepted {
            return Ok(());
        }
        if Instant::now() > limit {
            anyhow::bail!("accepted runs do not end; the daemon:\n{}", site.log());
        }
        sleep(Duration::from_millis(50)).await;
    }
}

/// An open loop at half of what saturates it.
async fn half_load(rig: &Rig, site: &Site, options: &Options, rate: f64, figures: &mut Figures) -> anyhow::Result<()> {
    let mut connections = connections(site.address()?, OPEN_CONNECTIONS).await?;
    let submission = Submission::of(AT_ONCE);
    let (epoch, epoch_nanos) = (Instant::now(), machine::now_nanos());
    let (due_at, runs) = (Mutex::new(Vec::new()), Mutex::new(Times::default()));
    let accepted = Mutex::new(Times::default());
    let shot = async |connection: &mut Connection, number: u64, due: Instant| {
        if number.is_multiple_of(FOLLOWED) {
            let id = submit(connection, &submission, number).await?;
            lock(&accepted).add(due.elapsed());
            let ended = timeout(DRAIN_LIMIT, connection.follow(&get_events(&id))).await??;
            lock(&runs).add(ended - due);
        } else {
            submit_blind(connection, &submission, number).await?;
            lock(&accepted).add(due.elapsed());
        }
        lock(&due_at).push((number, due));
        Ok(())
    };
    let before = site.succeeded().await?;
    let outcome = open_loop(&mut connections, HALF_FIRST, rate, options.window, shot).await;
    let outcome = outcome.clean().map_err(|error| error.context(site.log()))?;
    drained(site).await?;
    figures.push("half_runs_per_s", "half load: runs/s", outcome.per_second());
    figures.push("half_succeeded", "half load: runs that succeeded", site.succeeded().await? - before);
    let records = rig.provider.records().await?;
    let mut dispatch = Times::default();
    for (number, due) in due_at.into_inner().unwrap_or_else(PoisonError::into_inner) {
        let due = epoch_nanos + i64::try_from((due - epoch).as_nanos())?;
        let Some(record) = records.get(&number) else {
            anyhow::bail!("run {number} made no call");
        };
        dispatch.add_ms(milliseconds(record.first - due));
    }
    let mut runs = runs.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut accepted = accepted.into_inner().unwrap_or_else(PoisonError::into_inner);
    figures.push("half_run_p50_ms", "half load: a run, p50, ms", runs.quantile(50));
    figures.push("half_run_p95_ms", "half load: a run, p95, ms", runs.quantile(95));
    figures.push("half_run_p99_ms", "half load: a run, p99, ms", runs.quantile(99));
    figures.push("half_accepted_p50_ms", "half load: submit → 202, p50, ms", accepted.quantile(50));
    figures.push("half_accepted_p99_ms", "half load: submit → 202, p99, ms", accepted.quantile(99));
    figures.push("dispatch_p50_ms", "half load: submit → first call, p50, ms", dispatch.quantile(50));
    figures.push("dispatch_p95_ms", "half load: submit → first call, p95, ms", dispatch.quantile(95));
    let label = "half load: submit → first call, p99, ms";
    figures.goal("dispatch_p99_ms", label, dispatch.quantile(99), Reach::AtMost(10.0));
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[expect(clippy::cast_precision_loss, reason = "a span of seconds")]
pub(crate) fn milliseconds(nanos: i64) -> f64 {
    nanos as f64 / 1e6
}
