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
  stagegate demo                     see it work: no keys, no Postgres, no Redis
  stagegate init                     a starter pipeline, commented
  stagegate run pipeline.yaml --input 'Bees dance.'
  stagegate validate *.yaml          every mistake, with line and column
  stagegate serve                    the daemon on 127.0.0.1:8080; docs at /docs
  stagegate runs list                what runs on it
  stagegate explain SG0200           what an error means, and how to mend it

Configuration: flags > STAGEGATE_<SECTION>__<KEY> > stagegate.toml > defaults. `stagegate config` shows the result.

Exit codes: 0 fine, 1 failed, 2 a mistake in what was given; `stagegate run` and `stagegate runs watch` have more.";

/// Gated, checkpointed, cached LLM pipelines.
#[derive(Debug, Parser)]
#[command(
    name = "stagegate",
    version,
    about = "Runs staged LLM pipelines: gated, checkpointed, cached, metered and resumable.",
    after_help = EXAMPLES,
    max_term_width = 100,
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
        value_hint = clap::ValueHint::FilePath,
        help_heading = "Everywhere"
    )]
    pub config: Option<PathBuf>,

    /// Where embedded state and the cache lie
    #[arg(
        help = "Where embedded state and the cache lie [default: $XDG_DATA_HOME/stagegate or ~/.local/share/stagegate]",
        long,
        global = true,
        value_name = "DIR",
        value_hint = clap::ValueHint::DirPath,
        help_heading = "Everywhere"
    )]
    pub data_dir: Option<PathBuf>,

    /// Use the data directory's SQLite file, whatever database is configured
    #[arg(long, global = true, help_heading = "Everywhere")]
    pub embedded: bool,

    /// What is logged to stderr: `warn`, `info`, `info,stagegate_engine=debug` …
    #[arg(long, global = true, value_name = "FILTER", help_heading = "Everywhere")]
    pub log: Option<String>,

    /// The form of the log
    #[arg(
        long,
        global = true,
        value_name = "FORMAT",
        value_parser = ["auto", "json", "pretty"],
        help_heading = "Everywhere"
    )]
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
        self.load_with(&self.flags())
    }

    /// The configuration with these flags.
    pub(crate) fn load_with(&self, flags: &Flags) -> Result<Loaded, stagegate_core::Error> {
        let mut loaded = crate::config::load(flags, &Environment::of_process())?;
        if self.embedded {
            loaded.config.store.database_url = None;
            loaded.config.redis.url = None;
        }
        Ok(loaded)
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
    /// List, watch, submit and decide runs on a daemon
    Runs(commands::runs::Runs),
    /// Show what is cached on a daemon, and make it stale
    Cache(commands::cache::Cache),
    /// Write a starter pipeline, commented
    Init(commands::init::Init),
    /// Tell what an error code means, and how to mend it
    Explain(commands::explain::Explain),
    /// Fill a tenant with simulated pipelines and runs
    Seed(commands::seed::Seed),
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
    /// Write the manual pages into a directory
    Man(commands::man::Man),
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
            Self::Runs(command) => Box::pin(command.run(global)).await,
            Self::Cache(command) => Box::pin(command.run(global)).await,
            Self::Init(command) => command.run(),
            Self::Explain(command) => command.run(),
            Self::Seed(command) => Box::pin(command.run(global)).await,
            Self::Replicas(command) => Box::pin(command.run(global)).await,
            Self::Keys(command) => Box::pin(command.run(global)).await,
            Self::Migrate(command) => Box::pin(command.run(global)).await,
            Self::Config(command) => command.run(global),
            Self::Schema(command) => command.run(),
            Self::Healthcheck(command) => Box::pin(command.run(global)).await,
            Self::Completions(command) => command.run(),
            Self::Man(command) => command.run(),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;
    use unicode_width::UnicodeWidthStr as _;

    use super::*;

    fn helps(width: usize) -> Vec<(String, String)> {
        fn visit(command: &clap::Command, path: &str, width: usize, found: &mut Vec<(String, String)>) {
            let mut own = command.clone().term_width(width).bin_name(path);
            found.push((path.to_owned(), own.render_long_help().to_string()));
            for inner in command.get_subcommands().filter(|inner| inner.get_name() != "help") {
                visit(inner, &format!("{path} {}", inner.get_name()), width, found);
            }
        }
        let mut root = Cli::command();
        root.build();
        let mut found = Vec::new();
        visit(&root, "stagegate", width, &mut found);
        found
    }

    #[test]
    fn every_help_fits_its_terminal() {
        for width in [80, 120] {
            for (command, help) in helps(width) {
                let long = help.lines().find(|line| line.width() > width);
                assert!(long.is_none(), "{command} at {width}: {long:?}");
            }
        }
    }

    /// A text that is broken by hand would be broken a second time by a narrow terminal.
    #[test]
    fn no_prose_is_broken_by_hand() {
        for (command, help) in helps(10_000) {
            let after = help.split("\nExamples:").nth(1).unwrap_or_default();
            for line in after.lines().filter(|line| !line.is_empty() && !line.starts_with(' ')) {
                assert!(line.ends_with(['.', ':', '"', '$']), "{command}: a sentence goes on after `{line}`");
            }
        }
    }

    #[test]
    fn every_example_line_fits_80_columns() {
        for (command, help) in helps(10_000) {
            let after = help.split("\nExamples:").nth(1).unwrap_or_default();
            for line in after.lines().filter(|line| line.starts_with("  ")) {
                assert!(line.width() <= 80, "{command}: {line}");
            }
        }
    }

    #[test]
    fn the_help_of_each_command_looks_as_it_did() {
        for width in [80, 120] {
            for (command, help) in helps(width) {
                let name = command.replace(' ', "-");
                insta::with_settings!({ snapshot_path => "snapshots/help", prepend_module_to_snapshot => false }, {
                    insta::assert_snapshot!(format!("{name}_{width}"), help);
                });
            }
        }
    }
}
