//! A killed replica: owns how long its runs take until they are under way on another one.

use std::{
    sync::atomic::AtomicBool,
    time::{Duration, Instant},
};

use serde_json::json;
use tokio::time::sleep;

use super::{
    Options,
    engine::milliseconds,
    figures::{Figures, Reach, Report, Times},
    load::{closed_loop, connections},
    machine, progress,
    rig::{HELD, Rig, Submission, submit_blind},
    wire::Connection,
};

/// The default lease TTL, which the daemons run with, in seconds.
const TTL_S: f64 = 10.0;
const CONNECTIONS: usize = 32;
/// How long everything may take.
const PATIENCE: Duration = Duration::from_secs(90);
/// Time for the second replica to settle: a few looks at an empty queue.
const SETTLE: Duration = Duration::from_secs(3);

pub(crate) async fn run(rig: &mut Rig, options: &Options) -> anyhow::Result<Report> {
    let mut rounds = Vec::new();
    for round in 1..=options.rounds {
        progress(&format!("round {round}"));
        let mut figures = Figures::default();
        measure(rig, options.owned, &mut figures).await?;
        rounds.push(figures);
    }
    let parameters = json!({ "runs": options.owned, "lease_ttl_s": TTL_S, "replicas": 2, "servers": rig.servers() });
    Ok(Report { cell: "recovery", store: rig.store.name(), parameters, rounds })
}

async fn measure(rig: &Rig, runs: usize, figures: &mut Figures) -> anyhow::Result<()> {
    let mut site = rig.site(&[("STAGEGATE_ENGINE__MAX_RUNS", (runs * 2).to_string())]).await?;
    let mut connections = connections(site.address()?, CONNECTIONS).await?;
    let (stop, submission) = (AtomicBool::new(false), Submission::of(HELD));
    let shot = async |connection: &mut Connection, number| submit_blind(connection, &submission, number).await;
    closed_loop(&mut connections, 0, runs as u64, &stop, shot).await.clean()?;
    under_way(rig, runs).await.map_err(|error| error.context(site.log()))?;
    let folder = tempfile::tempdir()?;
    let second = site.replica(folder.path()).await?;
    sleep(SETTLE).await;
    // Every call is held, so that none arrives between this and the kill.
    rig.provider.reset().await?;
    let killed = machine::now_nanos();
    site.kill().await?;
    under_way(rig, runs).await.map_err(|error| error.context(second.log_tail()))?;
    let mut times = Times::default();
    for record in rig.provider.records().await?.values() {
        times.add_ms(milliseconds(record.first - killed));
    }
    figures.push("first_s", "from the kill to the first run under way elsewhere, s", times.quantile(0) / 1000.0);
    figures.push("p50_s", "to half of them, s", times.quantile(50) / 1000.0);
    let all = times.quantile(100) / 1000.0;
    figures.push("all_s", "to all of them, s", all);
    figures.goal("all_after_ttl_s", "the same less the TTL, s", all - TTL_S, Reach::AtMost(2.0));
    let label = "from the first to the last of them, s";
    figures.push("spread_s", label, all - times.quantile(0) / 1000.0);
    rig.provider.release().await?;
    let limit = Instant::now() + PATIENCE;
    let address = second.address()?;
    let succeeded = loop {
        let succeeded = super::rig::metrics(address).await?.sum("stagegate_runs_finished_total", "succeeded");
        #[expect(clippy::cast_precision_loss, reason = "some thousands")]
        if succeeded >= runs as f64 {
            break succeeded;
        }
        if Instant::now() > limit {
            anyhow::bail!("{succeeded} of {runs} runs have succeeded; the daemon:\n{}", second.log_tail());
        }
        sleep(Duration::from_millis(100)).await;
    };
    figures.push("succeeded", "runs that succeeded there", succeeded);
    second.stop().await
}

/// Waits until the provider has had a call of each run.
async fn under_way(rig: &Rig, runs: usize) -> anyhow::Result<()> {
    let limit = Instant::now() + PATIENCE;
    loop {
        let called = rig.provider.records().await?.len();
        if called >= runs {
            return Ok(());
        }
        if Instant::now() > limit {
            anyhow::bail!("{called} of {runs} runs are under way");
        }
        sleep(Duration::from_millis(50)).await;
    }
}
