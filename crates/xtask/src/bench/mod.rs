//! `cargo xtask bench`: what the product can do, cell by cell, beside what the machine can do at all. Owns which cells
//! there are, their sizes, and where the results go; judges nothing.
//!
//! Each measurement starts the built release `stagegate serve` on throwaway servers, and a provider in a process of
//! its own. docs/benchmarks.md tells the method.

mod engine;
mod figures;
mod latency;
mod limits;
mod load;
mod machine;
mod provider;
mod rig;
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
}

const ALL: [Cell; 1] = [Cell::Engine];

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
}

impl Options {
    /// Says what is done.
    pub(crate) fn progress(&self, what: &str) {
        say(&format!("  {what}"));
    }
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
        let machine = Machine::read().await;
        let options = Options {
            rounds: self.rounds.max(1),
            window: Duration::from_secs_f64(self.seconds),
            warm_up: Duration::from_secs_f64(self.warm_up),
            in_flight: self.in_flight,
            alone: self.alone,
        };
        let cells = if self.cells.is_empty() { ALL.to_vec() } else { self.cells.clone() };
        println!("{}", machine.line());
        for cell in cells {
            for store in self.stores() {
                say(&format!("{cell:?} on {}", store.name()));
                let mut rig = Rig::start(store, &binary).await?;
                let report = measure(cell, &mut rig, &options).await?;
                println!("\n{}\n{}", report.title(), report.table());
                say(&format!("appended to {}", report.append(&machine)?.display()));
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
