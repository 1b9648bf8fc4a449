//! `stagegate completions`: a completion script.

use clap::CommandFactory as _;
use stagegate_core::Error;

use crate::{cli::Cli, output};

const EXAMPLES: &str = "\
Examples:
  stagegate completions bash > /etc/bash_completion.d/stagegate
  stagegate completions zsh > \"${fpath[1]}/_stagegate\"
  stagegate completions fish > ~/.config/fish/completions/stagegate.fish

Commands, flags, files and the values that a flag may have are completed: states, roles, error codes.";

/// Print a completion script for a shell.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Completions {
    /// The shell
    shell: clap_complete::Shell,
}

impl Completions {
    pub(crate) fn run(self) -> Result<u8, Error> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "stagegate", &mut script);
        output::result(&String::from_utf8_lossy(&script))?;
        Ok(0)
    }
}
