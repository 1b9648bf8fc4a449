//! `stagegate config`: the configuration in force, redacted, with where each value came from.

use stagegate_core::Error;

use crate::{
    cli::Global,
    config::{reference, show},
    output,
};

const EXAMPLES: &str = "\
Examples:
  stagegate config               what is in force, each value with its source
  stagegate config --json | jq '.[] | select(.set)'
  STAGEGATE_HTTP__LISTEN=0.0.0.0:8080 stagegate config

Mistakes in the file or in STAGEGATE_… variables are all told at once, and the exit code is 2.";

/// Show the configuration in force, and where each value came from.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ConfigCommand {
    /// As JSON: a list of { key, value, source, set }
    #[arg(long)]
    json: bool,
    /// Print docs/configuration.md
    #[arg(long, hide = true, conflicts_with = "json")]
    reference: bool,
    /// Print deploy/stagegate.example.toml
    #[arg(long, hide = true, conflicts_with_all = ["json", "reference"])]
    example: bool,
}

impl ConfigCommand {
    pub(crate) fn run(self, global: &Global) -> Result<u8, Error> {
        let text = if self.reference {
            reference::page()
        } else if self.example {
            reference::example()
        } else {
            let loaded = global.load()?;
            if self.json { format!("{:#}\n", show::json(&loaded)) } else { show::toml(&loaded) }
        };
        output::result(&text)?;
        Ok(0)
    }
}
