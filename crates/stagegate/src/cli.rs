//! The command line: owns its grammar and the flags that every command knows. What a command does is in
//! [`crate::commands`], one file each.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::{
    commands,
    config::{Environment, Flags, Loaded},
};

const EXAMPLES: &str = "\
Start here:
  stagegate demo                                  see it work: no keys, no Postgres, no Redis
  stagegate run docs/examples/brief-to-spec.yaml --input @docs/examples/brief.md
  stagegate validate pipelines/*.yaml             every mistake, with line and column
  stagegate serve                                 the daemon on 127.0.0.1:8080; API docs at /docs

Configuration: flags > STAGEGATE_<SECTION>__<KEY> > stagegate.toml > defaults. `stagegate config` shows the result.
Exit codes: 0 fine, 1 failed, 2 a mistake in what was given; `stagegate run` has more.";

/// Gated, checkpointed, cached LLM pipelines.
#[derive(Debug, Parser)]
#[command(
    name = "stagegate",
    version,
    about = "Runs staged LLM pipelines: gated, checkpointed, cached, metered and resumable.",
    after_help = EXAMPLES,
    max_term_width = 110,
    arg_required_else_help = true,
    disable_help_subcommand = false
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// What every command takes.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct Global {
    /// The configuration file
    #[arg(
        help = "The configuration file [default: $STAGEGATE_CONFIG, else ./stagegate.toml if it is there]",
        long,
        global = true,
        value_name = "FILE",
        help_heading = "Everywhere"
    )]
    pub config: Option<PathBuf>,

    /// Where embedded state and the cache lie
    #[arg(
        help = "Where embedded state and the cache lie [default: $XDG_DATA_HOME/stagegate or ~/.local/share/stagegate]",
        long,
        global = true,
        value_name = "DIR",
        help_heading = "Everywhere"
    )]
    pub data_dir: Option<PathBuf>,

    /// What is logged to stderr: `warn`, `info`, `info,stagegate_engine=debug` …
    #[arg(long, global = true, value_name = "FILTER", help_heading = "Everywhere")]
    pub log: Option<String>,

    /// The form of the log: `auto`, `json` or `pretty`
    #[arg(long, global = true, value_name = "FORMAT", help_heading = "Everywhere")]
    pub log_format: Option<String>,
}

impl Global {
    /// The flags as a layer of the configuration.
    pub(crate) fn flags(&self) -> Flags {
        let mut flags = Flags { config: self.config.clone(), ..Flags::default() };
        flags.set("--data-dir", &["store", "data_dir"], self.data_dir.as_ref().map(|path| path.display()));
        flags.set("--log", &["log", "filter"], self.log.as_ref());
        flags.set("--log-format", &["log", "format"], self.log_format.as_ref());
        flags
    }

    /// The configuration of a command that adds no flags of its own.
    pub(crate) fn load(&self) -> Result<Loaded, stagegate_core::Error> {
        crate::config::load(&self.flags(), &Environment::of_process())
    }
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show the whole thing at work, simulated: a run, a cached run, a changed stage
    Demo(commands::demo::Demo),
    /// Run a pipeline once, here; the result goes to stdout
    Run(commands::run::Run),
    /// Report every mistake in pipeline definitions
    Validate(commands::validate::Validate),
    /// Tell what a run would cost, without spending
    Plan(commands::plan::Plan),
    /// Serve the HTTP API and execute runs
    Serve(commands::serve::Serve),
    /// Show the replicas, what they own, and what waits
    Replicas(commands::replicas::Replicas),
    /// Manage API keys
    Keys(commands::keys::Keys),
    /// Bring the database's schema up to date
    Migrate(commands::migrate::Migrate),
    /// Show the configuration in force, and where each value came from
    Config(commands::config::ConfigCommand),
    /// Print the JSON Schema of a pipeline definition
    Schema(commands::schema::Schema),
    /// Ask a daemon whether it is ready
    Healthcheck(commands::healthcheck::Healthcheck),
    /// Print a completion script for a shell
    Completions(commands::completions::Completions),
}

impl Command {
    /// Runs the command; the number is the exit code.
    pub(crate) async fn run(self, global: &Global) -> Result<u8, stagegate_core::Error> {
        match self {
            Self::Demo(command) => Box::pin(command.run(global)).await,
            Self::Run(command) => Box::pin(command.run(global)).await,
            Self::Validate(command) => command.run(global),
            Self::Plan(command) => Box::pin(command.run(global)).await,
            Self::Serve(command) => Box::pin(command.run(global)).await,
            Self::Replicas(command) => Box::pin(command.run(global)).await,
            Self::Keys(command) => Box::pin(command.run(global)).await,
            Self::Migrate(command) => Box::pin(command.run(global)).await,
            Self::Config(command) => command.run(global),
            Self::Schema(command) => command.run(),
            Self::Healthcheck(command) => Box::pin(command.run(global)).await,
            Self::Completions(command) => command.run(),
        }
    }
}
