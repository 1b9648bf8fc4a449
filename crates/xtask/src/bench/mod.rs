//! `cargo xtask bench`: what the product can do, cell by cell, beside what the machine can do at all. Owns which cells
//! there are, their sizes, and where the results go; judges nothing.
//!
//! Each measurement starts the built release `stagegate serve` on throwaway servers, and a provider in a process of
//! its own. docs/benchmarks.md tells the method.

mod engine;
mod figures;
mod growth;
mod latency;
mod limits;
mod load;
mod machine;
mod page;
mod provider;
mod read;
mod recovery;
mod rig;
mod sse;
mod submit;
mod wire;

use std::{path::PathBuf, process::ExitCode, time::Duration};

pub(crate) use limits::BenchEcho;
pub(crate) use provider::BenchProvider;

use self::{
    figures::Report,
    machine::Machine,
    rig::{Rig, Store},
};
use crate::{
    daemon,
    system::{self, cargo, say, target_dir},
};

/// Measure what the product can do, beside what the machine can do.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  cargo xtask bench engine --store postgres     one cell on one store
  cargo xtask bench read --rounds 1 --seconds 5 a quick look instead of a measurement
  cargo xtask bench --write-docs                all of it, into docs/benchmarks.md

It needs the binaries of Postgres and Redis, prlimit, and many open files: it raises its own limit where it may (as \
root); where it may not, `sse` wants fewer watchers (--watched).

Exit codes: 0 where everything was measured, whatever came of it; 1 where something could not be; 2 for wrong options.")]
pub(crate) struct Bench {
    /// What to measure; everything where nothing is named
    #[arg(value_enum)]
    cells: Vec<Cell>,
    /// Where the runs are kept
    #[arg(long, value_enum, default_value = "both")]
    store: Stores,
    /// Rounds, of which the medians count
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Seconds of each measured window
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Seconds of load before a window
    #[arg(long, default_value_t = 3.0)]
    warm_up: f64,
    /// Runs in flight at saturation
    #[arg(long, default_value_t = 256)]
    in_flight: usize,
    /// Runs that are measured alone, one after another
    #[arg(long, default_value_t = 300)]
    alone: u32,
    /// Runs in flight, and watchers, of the cell `sse`
    #[arg(long, default_value_t = 10_000)]
    watched: usize,
    /// Runs of the killed replica of the cell `recovery`
    #[arg(long, default_value_t = 1000)]
    owned: usize,
    /// Finished runs of the cell `growth`; a tenth as many are queued
    #[arg(long, default_value_t = 1_000_000)]
    rows: usize,
    /// Ask the provider over TLS instead of in the clear (both over HTTP/1.1)
    #[arg(long, conflicts_with = "write_docs")]
    tls: bool,
    /// Write what was measured into docs/benchmarks.md, in place of what is there of the same cells and stores
    #[arg(long)]
    write_docs: bool,
    /// The commit that the binary was built from, for the record; told by git where it is built here
    #[arg(long, requires = "binary")]
    commit: Option<String>,
    /// A stagegate binary to measure, instead of building one with the release profile
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Cell {
    /// Runs a second and their price at saturation; one run alone; half load
    Engine,
    /// One run alone
    Latency,
    /// Acceptances a second, and their times
    Submit,
    /// `GET` of a run at 5,000 requests a second
    Read,
    /// Ten thousand runs in flight with a watcher each
    Sse,
    /// What a killed replica owned, until it is under way elsewhere
    Recovery,
    /// Submit, claim and read with a million finished runs
    Growth,
}

/// What is measured where nothing is named: all but the one that is a part of `engine`.
const ALL: [Cell; 6] = [Cell::Engine, Cell::Submit, Cell::Read, Cell::Sse, Cell::Recovery, Cell::Growth];

impl Cell {
    /// Whether it can be measured there: replicas and long transactions are Postgres' alone.
    fn is_for(self, store: Store) -> bool {
        store == Store::Postgres || !matches!(self, Self::Recovery | Self::Growth)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Stores {
    Sqlite,
    Postgres,
    Both,
}

/// The sizes of the measurements.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) rounds: u32,
    pub(crate) window: Duration,
    pub(crate) warm_up: Duration,
    pub(crate) in_flight: usize,
    pub(crate) alone: u32,
    pub(crate) watched: usize,
    pub(crate) owned: usize,
    pub(crate) rows: usize,
}

/// Says what is done inside a cell.
pub(crate) fn progress(what: &str) {
    say(&format!("  {what}"));
}

impl Bench {
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        // The load's CPU counts against the same cores: it must not be that of an unoptimised build.
        if cfg!(debug_assertions) {
            return again_in_release().await;
        }
        // Fails only where one is installed, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let binary = match &self.binary {
            Some(binary) => std::path::absolute(binary)?,
            None => daemon::build("release").await?,
        };
        machine::raise_open_files().await;
        let mut machine = Machine::read().await;
        if let Some(binary) = &self.binary {
            // What git tells is the commit of this harness.
            if self.write_docs && self.commit.is_none() {
                anyhow::bail!("--write-docs with --binary needs --commit: the page tells what was measured");
            }
            machine.commit = self.commit.clone().unwrap_or_else(|| format!("unknown ({})", binary.display()));
        }
        let options = Options {
            rounds: self.rounds.max(1),
            window: Duration::from_secs_f64(self.seconds),
            warm_up: Duration::from_secs_f64(self.warm_up),
            in_flight: self.in_flight,
            alone: self.alone,
            watched: self.watched,
            owned: self.owned,
            rows: self.rows,
        };
        let cells = if self.cells.is_empty() { ALL.to_vec() } else { self.cells.clone() };
        println!("{}", machine.line());
        for cell in cells {
            for store in self.stores().into_iter().filter(|store| cell.is_for(*store)) {
                say(&format!("{cell:?} on {}", store.name()));
                let mut rig = Rig::start(store, &binary, self.tls).await?;
                let report = measure(cell, &mut rig, &options).await?;
                println!("\n{}\n{}", report.title(), report.table());
                say(&format!("appended to {}", report.append(&machine)?.display()));
                // After each cell, so that a later one that fails takes nothing away.
                if self.write_docs {
                    page::write(&report, &machine)?;
                }
            }
        }
        Ok(system::code(0))
    }

    fn stores(&self) -> Vec<Store> {
        match self.store {
            Stores::Sqlite => vec![Store::Sqlite],
            Stores::Postgres => vec![Store::Postgres],
            Stores::Both => vec![Store::Postgres, Store::Sqlite],
        }
    }
}

async fn measure(cell: Cell, rig: &mut Rig, options: &Options) -> anyhow::Result<Report> {
    match cell {
        Cell::Engine => Box::pin(engine::run(rig, options)).await,
        Cell::Latency => Box::pin(latency::run(rig, options)).await,
        Cell::Submit => Box::pin(submit::run(rig, options)).await,
        Cell::Read => Box::pin(read::run(rig, options)).await,
        Cell::Sse => Box::pin(sse::run(rig, options)).await,
        Cell::Recovery => Box::pin(recovery::run(rig, options)).await,
        Cell::Growth => Box::pin(growth::run(rig, options)).await,
    }
}

/// Builds this program with the release profile and runs the same command in it.
async fn again_in_release() -> anyhow::Result<ExitCode> {
    say("building xtask (release profile)");
    system::must(cargo().args(["build", "--release", "--package", "xtask"]), "the build").await?;
    let mut command = tokio::process::Command::new(target_dir().join("release").join("xtask"));
    command.args(std::env::args_os().skip(1)).kill_on_drop(true);
    Ok(system::code(system::exit_code(&mut command).await?))
}
