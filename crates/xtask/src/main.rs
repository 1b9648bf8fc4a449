//! Developer commands: `cargo xtask --help`. Owns how tests, coverage, measurements and fuzzing are started; never
//! anything that the product needs.

mod bench;
mod chaos;
mod coverage;
mod daemon;
mod interop;
mod quantile;
mod ratchet;
mod schemathesis;
mod simulate;
mod system;
mod test;

use std::process::ExitCode;

use clap::Parser;

/// Developer commands of Stagegate.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", disable_help_subcommand = true)]
enum Command {
    /// Run every test, with a Postgres and a Redis of its own
    Test(test::Test),
    /// Run every test and print the line coverage of the workspace
    Coverage(coverage::Coverage),
    /// Measure what the product can do, beside what the machine can do
    Bench(bench::Bench),
    #[command(hide = true)]
    BenchProvider(bench::BenchProvider),
    #[command(hide = true)]
    BenchEcho(bench::BenchEcho),
    /// Play seeded worlds in virtual time, with a fault at every border, and check every promise
    Simulate(simulate::Simulate),
    /// Measure the structure of the code and hold it to ceilings that may only fall
    Ratchet(ratchet::Ratchet),
    /// Fuzz the built daemon by its own OpenAPI document
    Schemathesis(schemathesis::Schemathesis),
    /// Hold the built daemon to clients, linters and proxies that others wrote
    Interop(interop::Interop),
    /// Break the built daemon in every way that can be staged, under load, and reconcile
    Chaos(chaos::Chaos),
    /// Run the previous binary and this one side by side while the schema is migrated, under load, and reconcile
    Upgrade(chaos::upgrade::Upgrade),
}

fn main() -> ExitCode {
    // Cargo calls this binary as a wrapper of rustc while coverage is measured.
    if let Some(code) = coverage::wrap_rustc() {
        return code;
    }
    let command = Command::parse();
    let runtime = match runtime(&command).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("xtask: no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(async {
        match command {
            Command::Test(command) => command.run().await,
            Command::Coverage(command) => command.run().await,
            Command::Bench(command) => Box::pin(command.run()).await,
            Command::BenchProvider(command) => command.run().await,
            Command::BenchEcho(command) => command.run().await,
            Command::Simulate(command) => command.run().await,
            Command::Ratchet(command) => command.run(),
            Command::Schemathesis(command) => command.run().await,
            Command::Interop(command) => Box::pin(command.run()).await,
            Command::Chaos(command) => Box::pin(command.run()).await,
            Command::Upgrade(command) => Box::pin(command.run()).await,
        }
    });
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Load and the provider that it calls run on one thread: waking another one would cost more than their work.
fn runtime(command: &Command) -> tokio::runtime::Builder {
    if matches!(command, Command::Bench(_) | Command::BenchProvider(_)) {
        return tokio::runtime::Builder::new_current_thread();
    }
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2);
    builder
}
