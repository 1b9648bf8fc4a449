//! The stagegate binary: wiring only. It parses the command line, builds the runtime, runs one command, and turns
//! what came of it into an exit code.

mod board;
mod cli;
mod client;
mod commands;
mod config;
mod daemon;
mod files;
mod guest;
mod layout;
mod memory;
mod open_files;
mod output;
mod pipelines_dir;
mod progress;

use std::process::ExitCode;

use clap::Parser as _;

/// A run is thousands of short-lived small pieces on several threads: what the system's allocator is slowest at
/// (docs/decisions.md has the measurement).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help goes to stdout, mistakes to stderr; a closed pipe is nobody's mistake.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    stagegate_net::install_tls();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output::note(&format!("error: the runtime could not start: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(cli.command.run(&cli.global));
    // A thread that still reads stdin must not keep the process alive.
    runtime.shutdown_background();
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            output::error(&error);
            ExitCode::from(output::exit_code(error.code))
        }
    }
}
