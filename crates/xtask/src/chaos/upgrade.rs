//! `cargo xtask upgrade`: the previous binary and this one side by side on one database, while its schema moves on; then
//! this one beside a synthetic next release ([`super::next`]). Owns how the previous binary is built and the order of the
//! steps.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use anyhow::{Context as _, bail};
use stagegate_testkit::storm::Mix;
use tokio::{process::Command, time::sleep};
use uuid::Uuid;

use super::{
    CALM_S, DRAIN_DELAY_MS, Ending, Running, next, prepare, until_interrupted,
    world::{Orphans, Plan, WindowKind, World},
};
use crate::{
    daemon,
    system::{must, output_of, root, say, target_dir},
};

/// How often it is looked who has the runs of a replica that is gone.
const LOOKS: u32 = 80;
const LOOK_PAUSE: Duration = Duration::from_millis(150);

/// Run the previous binary and this one side by side while the schema is migrated, then this one beside the next, and reconcile
///
/// The next release (N+1) is made up: a replica with one capability more, on a schema with columns and a table more, that is
/// leased runs, claims others, and writes events, fields, codes, verdicts, states and signals that this release does not
/// know. This release must carry them, go on with what it can read, leave what it cannot, and refuse what it would not
/// understand.
///
/// The previous binary is built in a worktree under target/upgrade, from what was compiled of the dependencies already,
/// and kept there.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  cargo xtask upgrade                 from before the newest migration
  cargo xtask upgrade --from v0.1.0   from another revision

It needs git with the history (no shallow clone), the binaries of Postgres and Redis, and HAProxy, which it installs \
where it may (apt-get, as root).

Exit codes: 0 where nothing was found; 1 where the reconciliation found something, no run was seen to cross from one \
version to the other, or it could not be run; 2 for wrong options; 130 and 143 where it was interrupted or terminated.")]
pub(crate) struct Upgrade {
    /// The previous revision; default: the parent of the commit that added the newest migration
    #[arg(long, value_name = "REV")]
    from: Option<String>,
    /// How long each step lasts, in seconds
    #[arg(long, default_value_t = 6.0)]
    step_s: f64,
    /// The seed of the load and of the provider's faults
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Submits a second
    #[arg(long, default_value_t = 10.0)]
    rate: f64,
    /// Where the report goes, as markdown
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

impl Upgrade {
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        prepare().await?;
        let from = match &self.from {
            Some(rev) => rev.clone(),
            None => before_newest_migration().await?,
        };
        let old = build_old(&from).await?;
        let new = daemon::build("dev").await?;
        until_interrupted(Box::pin(self.scenario(&from, &old, &new))).await
    }

    async fn scenario(&self, from: &str, old: &Path, new: &Path) -> anyhow::Result<ExitCode> {
        let (old, new) = ((old.to_owned(), None), (new.to_owned(), Some(DRAIN_DELAY_MS)));
        let plan = Plan {
            seed: self.seed,
            mix: Mix { latency: (Duration::from_millis(100), Duration::from_millis(600)), ..Mix::default() },
            lease_ttl_ms: 3_000,
            replicas: vec![old.clone(), old, new.clone(), new.clone()],
            first: 2,
            disk_bytes: None,
        };
        let world = World::start(plan).await?;
        let run = Running::begin(&world, self.seed, self.rate)?;
        let step = Duration::from_secs_f64(self.step_s);
        let (old_1, old_2, new_1, new_2) = (0, 1, 2, 3);
        sleep(Duration::from_secs_f64(CALM_S) + step).await;
        world.timeline.say("the schema is migrated under the old replicas");
        world.migrate(&new.0).await.context("migrating under load")?;
        sleep(step).await;
        world.timeline.say("a new replica joins the old ones");
        launch(&world, new_1).await?;
        sleep(step).await;
        let to_old = kill(&world, new_1).await?;
        sleep(step).await;
        world.timeline.say("both new replicas join");
        launch(&world, new_1).await?;
        launch(&world, new_2).await?;
        sleep(step).await;
        let first = stop_for_good(&world, old_1, "TERM").await?;
        sleep(step).await;
        let second = stop_for_good(&world, old_2, "KILL").await?;
        sleep(step).await;
        if let Err(error) = Box::pin(next::beside(&world, &run.client, new_2)).await {
            world.seen().findings.push(format!("beside the next release: {error:#}"));
        }
        let crossed = [
            ("of a killed new replica, finished by old ones", to_old.len(), count(&to_old, &["r1", "r2"])),
            ("of a stopped old replica, gone on with by others", first.len(), count(&first, &["r2", "r3", "r4"])),
            ("of the last old replica (killed), finished by new ones", second.len(), count(&second, &["r3", "r4"])),
        ];
        for (what, runs, seen) in crossed {
            let line = format!("runs {what}: {runs} owned, {seen} seen with their next owner");
            world.timeline.say(&line);
            world.seen().notes.push(line);
        }
        if count(&to_old, &["r1", "r2"]) == 0 || count(&second, &["r3", "r4"]) == 0 {
            let what = "no run was seen to cross from one version to the other: the scenario has proved nothing";
            world.seen().findings.push(what.to_owned());
        }
        let title = format!("Upgrade from {} under load, seed {}", &from[..from.len().min(10)], self.seed);
        let ending = Ending { title, settle: Duration::from_secs(90), strict: false, mixed: true };
        let setup = vec![
            ("replicas", "2 of the previous binary, then 2 of this one, dev profile, lease_ttl 3s".to_owned()),
            ("load", format!("{} submits a second", self.rate)),
        ];
        run.end(&world, ending, setup, self.report.as_deref()).await
    }
}

fn count(owners: &[(Uuid, Option<String>)], names: &[&str]) -> usize {
    owners.iter().filter(|(_, owner)| owner.as_deref().is_some_and(|owner| names.contains(&owner))).count()
}

pub(crate) async fn launch(world: &World, index: usize) -> anyhow::Result<()> {
    world.replicas[index].launch()?;
    world.replicas[index].ready().await
}

/// Kills a replica; who had its runs next.
async fn kill(world: &Arc<World>, index: usize) -> anyhow::Result<Vec<(Uuid, Option<String>)>> {
    stop_for_good(world, index, "KILL").await
}

/// Ends a replica that is not started again by this; who had its runs next.
async fn stop_for_good(world: &Arc<World>, index: usize, signal: &str) -> anyhow::Result<Vec<(Uuid, Option<String>)>> {
    let replica = &world.replicas[index];
    let what = format!("{}: SIG{signal}", replica.name());
    let orphans = with_runs(world, &what, index).await?;
    world.timeline.say(&format!("{what}, with {} runs", orphans.runs.len()));
    let from_s = world.timeline.now_s();
    replica.retired.store(true, Ordering::Relaxed);
    let status = replica.program()?.stop(signal).await?;
    let to_s = world.timeline.now_s();
    if signal == "TERM" {
        world.seen().stops.push((replica.name().to_owned(), from_s, to_s - from_s, status));
    }
    let kind = if signal == "KILL" { WindowKind::Interrupted(index) } else { WindowKind::Other };
    world.window(&what, kind, from_s, to_s);
    let mut owners: Vec<(Uuid, Option<String>)> = orphans.runs.iter().map(|run| (*run, None)).collect();
    let mut auditor = world.auditor().await?;
    for _ in 0..LOOKS {
        for (run, owner) in auditor.owners_of(&orphans.runs).await? {
            if owner != replica.name()
                && let Some(known) = owners.iter_mut().find(|(known, _)| *known == run)
            {
                known.1.get_or_insert(owner);
            }
        }
        sleep(LOOK_PAUSE).await;
    }
    if signal == "KILL" {
        world.seen().orphans.push(Orphans { at_s: from_s, ..orphans });
    }
    Ok(owners)
}

/// The runs of a replica, at a moment when it has some: between two submits a fast machine may have none at all, and then
/// its end would show nothing.
async fn with_runs(world: &Arc<World>, what: &str, index: usize) -> anyhow::Result<Orphans> {
    for _ in 0..LOOKS {
        if let Some(orphans) = world.orphans(what, index).await.filter(|orphans| !orphans.runs.is_empty()) {
            return Ok(orphans);
        }
        sleep(LOOK_PAUSE).await;
    }
    bail!("{what}: the replica owned no run in {:.0} s under load", (LOOK_PAUSE * LOOKS).as_secs_f64())
}

/// The parent of the commit that added the newest migration of Postgres: the one with the highest number, since commits of
/// parallel work do not land in the order of their numbers.
async fn before_newest_migration() -> anyhow::Result<String> {
    let git = |arguments: &[&str]| {
        let mut command = Command::new("git");
        command.current_dir(root()).args(arguments);
        command
    };
    let files = output_of(&mut git(&["ls-files", "--", "migrations/postgres"])).await?;
    let Some(newest) = files.lines().max().filter(|_| files.lines().count() > 1) else {
        bail!("there has been one migration only; name a revision to come from with --from");
    };
    let added = output_of(&mut git(&["log", "-1", "--format=%H", "--diff-filter=A", "--", newest])).await?;
    let parent = output_of(&mut git(&["rev-parse", &format!("{}^", added.trim())])).await?;
    Ok(parent.trim().to_owned())
}

/// Builds the binary of a revision in a worktree of its own, starting from what our own build made of the dependencies.
async fn build_old(rev: &str) -> anyhow::Result<PathBuf> {
    let mut parse = Command::new("git");
    let rev =
        output_of(parse.current_dir(root()).args(["rev-parse", "--verify", &format!("{rev}^{{commit}}")])).await?;
    let rev = rev.trim();
    let folder = target_dir().join("upgrade");
    let kept = folder.join(format!("stagegate-{rev}"));
    if kept.is_file() {
        return Ok(kept);
    }
    std::fs::create_dir_all(&folder)?;
    let (tree, build) = (folder.join("tree"), folder.join("build"));
    say(&format!("building the binary of {rev}"));
    remove_tree(&tree).await;
    let mut add = Command::new("git");
    add.current_dir(root()).args(["worktree", "add", "--detach", "--force"]).arg(&tree).arg(rev);
    must(&mut add, "git worktree add").await?;
    share_dependencies(&build).await?;
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(&tree).env("CARGO_TARGET_DIR", &build).args(["build", "--locked", "--bin", "stagegate"]);
    let outcome = must(cargo.kill_on_drop(true), "the build of the previous revision").await;
    remove_tree(&tree).await;
    outcome?;
    std::fs::copy(build.join("debug/stagegate"), &kept)?;
    Ok(kept)
}

/// Removes the worktree, where there is one.
async fn remove_tree(tree: &Path) {
    if tree.exists() {
        let mut remove = Command::new("git");
        remove.current_dir(root()).args(["worktree", "remove", "--force"]).arg(tree);
        // What is left is overwritten by the next one.
        let _ = must(&mut remove, "git worktree remove").await;
    }
}

/// The compiled dependencies do not depend on where the workspace is. They are linked, not copied: Cargo replaces files
/// of theirs and never writes into them; what it does write into is copied.
async fn share_dependencies(build: &Path) -> anyhow::Result<()> {
    let ours = target_dir().join("debug");
    let theirs = build.join("debug");
    if theirs.exists() || !ours.join("deps").exists() {
        return Ok(());
    }
    std::fs::create_dir_all(&theirs)?;
    must(Command::new("cp").arg("-al").arg(ours.join("deps")).arg(&theirs), "cp").await?;
    for part in ["build", ".fingerprint"] {
        must(Command::new("cp").arg("-a").arg(ours.join(part)).arg(&theirs), "cp").await?;
    }
    Ok(())
}
