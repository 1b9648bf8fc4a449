//! `stagegate man`: the manual pages, one a command.

use std::path::PathBuf;

use clap::CommandFactory as _;
use stagegate_core::{Code, Error};

use crate::{cli::Cli, output};

const EXAMPLES: &str = "\
Examples:
  stagegate man /usr/local/share/man/man1 && man stagegate-run";

/// Write the manual pages into a directory.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Man {
    /// Where to; made where it is missing
    #[arg(value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    directory: PathBuf,
}

impl Man {
    pub(crate) fn run(self) -> Result<u8, Error> {
        let place = self.directory.display().to_string();
        let failed = |error: std::io::Error| Error::new(Code::InvalidRequest, format!("{place}: {error}"));
        std::fs::create_dir_all(&self.directory).map_err(failed)?;
        clap_mangen::generate_to(Cli::command().disable_help_subcommand(true), &self.directory).map_err(failed)?;
        output::note(&format!("the manual pages are in {place}"));
        Ok(0)
    }
}
