//! `cargo xtask simulate`: plays seeds of the deterministic simulation, on every core, and tells what they met. Owns the
//! numbering of seeds and what is printed; the worlds are `stagegate-simulation`'s.

use std::{
    collections::BTreeMap,
    io::{IsTerminal, Write},
    process::ExitCode,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use clap::Args;
use stagegate_simulation::{Counts, Options, simulate};

/// How often progress is told: often to a person, seldom into a log.
const TOLD_TO_PEOPLE: Duration = Duration::from_millis(500);
const TOLD_TO_LOGS: Duration = Duration::from_secs(10);
/// A world takes milliseconds. One that takes so long spins: something is due again and again, and virtual time stands.
const SPINS_AFTER: Duration = Duration::from_secs(90);

/// Play seeded worlds: several replicas in virtual time, a fault at every border, every promise checked
///
/// A seed decides everything: pipelines, runs, what people ask, latencies, faults. Without a broken promise it prints how
/// much was met. With one it prints the seed and its whole history, one line a step: virtual time, who, what.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  cargo xtask simulate                          a thousand seeds\n  \
    cargo xtask simulate --seeds 100000 --from 7  others, and more of them\n  \
    cargo xtask simulate --seed 4711              one seed again, with its history\n\n\
    It needs nothing but this binary: no server, no file, no network.\n\n\
    Exit codes: 0 where every promise was kept; 1 where one was broken, something panicked, or a seed never ended; 2 for \
    wrong options.")]
pub(crate) struct Simulate {
    /// How many seeds to play
    #[arg(long, default_value_t = 1_000, value_name = "N")]
    seeds: u64,
    /// The first of them; the others follow one by one
    #[arg(long, default_value_t = 1, value_name = "SEED")]
    from: u64,
    /// Play this seed alone and print its history
    #[arg(long, value_name = "SEED", conflicts_with_all = ["seeds", "from"])]
    seed: Option<u64>,
    /// Worlds that are played at once [default: one on each core]
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
}

/// What all players share.
#[derive(Debug, Default)]
struct Tally {
    next: AtomicU64,
    played: AtomicU64,
    /// What is being played, and since when.
    playing: Mutex<BTreeMap<u64, Instant>>,
    counts: Mutex<Counts>,
    /// The lowest seed that failed.
    failed: Mutex<Option<u64>>,
}

impl Simulate {
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        // A world brings a runtime of its own, which cannot be started inside another.
        tokio::task::spawn_blocking(move || match self.seed {
            Some(seed) => replay(seed),
            None => self.play(),
        })
        .await?
    }

    fn play(&self) -> anyhow::Result<ExitCode> {
        let jobs = match self.jobs {
            Some(jobs) => jobs.max(1),
            None => std::thread::available_parallelism()?.get(),
        };
        let last = self.from.saturating_add(self.seeds);
        println!("seeds {} to {}, {jobs} at once", self.from, last.saturating_sub(1));
        let tally = Arc::new(Tally { next: AtomicU64::new(self.from), ..Tally::default() });
        let began = Instant::now();
        let players: Vec<_> = (0..jobs)
            .map(|_| {
                let tally = Arc::clone(&tally);
                std::thread::spawn(move || tally.play(last))
            })
            .collect();
        if let Some(seed) = tally.tell_progress(self.seeds, began, &players) {
            println!(
                "seed {seed} has been played for {SPINS_AFTER:?}: something in it is busy while virtual time stands still"
            );
            println!("attach a debugger to `cargo xtask simulate --seed {seed}`");
            return Ok(ExitCode::FAILURE);
        }
        for player in players {
            player.join().map_err(|_| tally.panicked())?;
        }
        let failed = *tally.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(seed) = failed {
            return replay(seed);
        }
        let (played, seconds) = (tally.played.load(Ordering::Relaxed), began.elapsed().as_secs_f64());
        let counts = *tally.counts.lock().unwrap_or_else(PoisonError::into_inner);
        print(played, seconds, &counts);
        Ok(ExitCode::SUCCESS)
    }
}

impl Tally {
    fn play(&self, last: u64) {
        loop {
            let seed = self.next.fetch_add(1, Ordering::Relaxed);
            let failed_before = self.failed.lock().unwrap_or_else(PoisonError::into_inner).is_some();
            if seed >= last || failed_before {
                return;
            }
            self.playing.lock().unwrap_or_else(PoisonError::into_inner).insert(seed, Instant::now());
            let outcome = simulate(seed, Options::default());
            self.playing.lock().unwrap_or_else(PoisonError::into_inner).remove(&seed);
            self.counts.lock().unwrap_or_else(PoisonError::into_inner).add(&outcome.counts);
            self.played.fetch_add(1, Ordering::Relaxed);
            if outcome.violation.is_some() {
                let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
                *failed = Some(failed.map_or(seed, |other| other.min(seed)));
            }
        }
    }

    /// A panic in a world is a broken promise of its seed; one of the player itself leaves its seed behind.
    fn panicked(&self) -> anyhow::Error {
        let playing = self.playing.lock().unwrap_or_else(PoisonError::into_inner);
        let seeds: Vec<String> = playing.keys().map(ToString::to_string).collect();
        anyhow::anyhow!("a player panicked; what was being played: seed {}", seeds.join(", seed "))
    }

    /// Until all is played; or the seed that never will be.
    fn tell_progress(&self, seeds: u64, began: Instant, players: &[std::thread::JoinHandle<()>]) -> Option<u64> {
        let watched = std::io::stderr().is_terminal();
        let pause = if watched { TOLD_TO_PEOPLE } else { TOLD_TO_LOGS };
        let mut told = began;
        while players.iter().any(|player| !player.is_finished()) {
            std::thread::sleep(Duration::from_millis(50));
            let playing = self.playing.lock().unwrap_or_else(PoisonError::into_inner);
            let spins = playing.iter().find(|(_, since)| since.elapsed() > SPINS_AFTER);
            if let Some((seed, _)) = spins {
                return Some(*seed);
            }
            drop(playing);
            if told.elapsed() >= pause {
                told = Instant::now();
                let (end, played) = (if watched { "\r" } else { "\n" }, self.played.load(Ordering::Relaxed));
                eprint!("{played} of {seeds} seeds, {:.0} s{end}", began.elapsed().as_secs_f64());
                _ = std::io::stderr().flush();
            }
        }
        None
    }
}

fn print(played: u64, seconds: f64, counts: &Counts) {
    let Counts { runs, commits, claims, resumed, calls, retries, holds, parks, .. } = counts;
    let Counts { kills, crashes, given_up, lost, pauses, drains, store_faults, duplicates, cache_faults, .. } = counts;
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let rate = played as f64 / seconds;
    println!("{played} seeds in {seconds:.1} s ({rate:.0} seeds/s), {} minutes of virtual time", counts.seconds / 60);
    println!("  {runs} runs, {commits} commits, {claims} claims ({resumed} of runs that had an owner before)");
    println!("  {calls} provider calls, {retries} retries, {holds} holds, {parks} runs parked");
    println!("  {crashes} owners crashed by their runs, {given_up} runs given up");
    println!("  {kills} kills, {lost} leases lost, {pauses} pauses, {drains} drains");
    println!("  {store_faults} store calls failed or late, {duplicates} twice, {cache_faults} cache calls failed");
    println!("every promise was kept");
}

fn replay(seed: u64) -> anyhow::Result<ExitCode> {
    let outcome = simulate(seed, Options { record: true, ..Options::default() });
    let mut out = std::io::stdout().lock();
    for line in &outcome.history {
        writeln!(out, "{line}")?;
    }
    match outcome.violation {
        None => {
            writeln!(out, "seed {seed}: every promise was kept")?;
            Ok(ExitCode::SUCCESS)
        }
        Some(violation) => {
            writeln!(out, "seed {seed}: {violation}")?;
            writeln!(out, "again, with this history: cargo xtask simulate --seed {seed}")?;
            Ok(ExitCode::FAILURE)
        }
    }
}
