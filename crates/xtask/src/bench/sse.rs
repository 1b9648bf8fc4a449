//! Many runs in flight, each with a watcher: owns what they take in memory, and that every watcher sees its run's end.

use std::{
    sync::atomic::AtomicBool,
    time::{Duration, Instant},
};

use futures::{StreamExt as _, future::join_all, stream};
use serde_json::json;
use tokio::{
    sync::Mutex,
    task::unconstrained,
    time::{sleep, timeout},
};

use super::{
    Options,
    figures::{Figures, Reach, Report, Times},
    load::{closed_loop, connections},
    machine, progress,
    rig::{HELD, Rig, Site, Submission, submit},
    wire::{Connection, get_events},
};

const CONNECTIONS: usize = 64;
/// Watchers that connect at the same time.
const CONNECTING: usize = 128;
/// Open files of a daemon for anything but watchers and calls.
const OTHER_FILES: usize = 400;
/// How long each part may take.
const PATIENCE: Duration = Duration::from_mins(3);

pub(crate) async fn run(rig: &mut Rig, options: &Options) -> anyhow::Result<Report> {
    let runs = options.watched;
    // A call and a watcher take an open file each. Where the machine allows fewer, the runs that are left over wait for
    // their turn at the provider: they are in flight all the same.
    let calls = machine::open_files().saturating_sub(runs + OTHER_FILES).min(runs);
    if calls < runs / 2 {
        anyhow::bail!("the limit of open files allows no {runs} watchers: raise it, or ask for fewer with --watched");
    }
    let settings = [
        ("STAGEGATE_ENGINE__MAX_RUNS", (runs + 1).to_string()),
        ("STAGEGATE_LLM__PROVIDERS__BENCH__MAX_CONCURRENCY", calls.to_string()),
        ("STAGEGATE_HTTP__MAX_CONNECTIONS", (runs + 1000).to_string()),
        ("STAGEGATE_HTTP__MAX_EVENT_STREAMS", runs.to_string()),
    ];
    let mut site = rig.site(&settings).await?;
    let mut figures = Figures::default();
    measure(rig, &site, runs, calls, &mut figures).await?;
    site.kill().await?;
    let parameters = json!({ "runs": runs, "watchers": runs, "calls_held": calls, "servers": rig.servers() });
    Ok(Report { cell: "sse", store: rig.store.name(), parameters, rounds: vec![figures] })
}

async fn measure(rig: &Rig, site: &Site, runs: usize, calls: usize, figures: &mut Figures) -> anyhow::Result<()> {
    let resident = || -> anyhow::Result<f64> { Ok(machine::resident_bytes(site.pid()?) / 1e6) };
    #[expect(clippy::cast_precision_loss, reason = "some thousands")]
    let count = runs as f64;
    let idle = resident()?;
    progress(&format!("{runs} runs"));
    let ids = submitted(site, runs).await?;
    let limit = Instant::now() + PATIENCE;
    while rig.provider.records().await?.len() < calls {
        if Instant::now() > limit {
            anyhow::bail!("not all runs are under way; the daemon:\n{}", site.log());
        }
        sleep(Duration::from_millis(200)).await;
    }
    sleep(Duration::from_secs(2)).await;
    let in_flight = site.metrics().await?.sum("stagegate_runs_in_flight", "");
    let with_runs = resident()?;
    progress(&format!("{runs} watchers"));
    let mut watchers = watching(site, &ids).await?;
    sleep(Duration::from_secs(3)).await;
    let open = site.metrics().await?.sum("stagegate_sse_streams", "");
    let with_watchers = resident()?;
    figures.push("runs_in_flight", "runs in flight", in_flight);
    figures.push("watchers", "watchers", open);
    figures.push("resident_idle_mb", "resident, idle, MB", idle);
    figures.push("resident_runs_mb", "resident with the runs, MB", with_runs);
    figures.goal("resident_mb", "resident with the watchers too, MB", with_watchers, Reach::AtMost(600.0));
    figures.push("kb_per_run", "memory a run in flight, KB", (with_runs - idle) * 1000.0 / count);
    figures.push("kb_per_watcher", "memory a watcher, KB", (with_watchers - with_runs) * 1000.0 / count);
    progress("answers");
    let released = Instant::now();
    rig.provider.release().await?;
    let ends = unconstrained(join_all(watchers.iter_mut().map(|watcher| timeout(PATIENCE, watcher.last_event()))));
    let mut seen = Times::default();
    let mut errors = 0.0;
    for end in ends.await {
        match end {
            Ok(Ok(at)) => seen.add(at - released),
            _ => errors += 1.0,
        }
    }
    figures.push("all_seen_s", "from the answers to every run's end seen, s", seen.quantile(100) / 1000.0);
    figures.push("end_p50_s", "the same for half of them, s", seen.quantile(50) / 1000.0);
    figures.push("resident_after_mb", "resident after that, MB", resident()?);
    figures.push("succeeded", "runs that succeeded", site.succeeded().await?);
    figures.goal("errors", "watchers that did not see the end", errors, Reach::AtMost(0.0));
    Ok(())
}

async fn submitted(site: &Site, runs: usize) -> anyhow::Result<Vec<String>> {
    let mut connections = connections(site.address()?, CONNECTIONS).await?;
    let (ids, stop, submission) = (Mutex::new(Vec::new()), AtomicBool::new(false), Submission::of(HELD));
    let shot = async |connection: &mut Connection, number| {
        let id = submit(connection, &submission, number).await?;
        ids.lock().await.push(id);
        Ok(())
    };
    closed_loop(&mut connections, 0, runs as u64, &stop, shot).await.clean()?;
    Ok(ids.into_inner())
}

async fn watching(site: &Site, ids: &[String]) -> anyhow::Result<Vec<Connection>> {
    let address = site.address()?;
    let opening = ids.iter().map(async |id| {
        let mut connection = Connection::open(address).await?;
        connection.open_stream(&get_events(id)).await?;
        anyhow::Ok(connection)
    });
    let opened: Vec<_> = unconstrained(stream::iter(opening).buffer_unordered(CONNECTING).collect()).await;
    opened.into_iter().collect()
}
