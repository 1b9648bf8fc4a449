//! `cargo xtask ratchet`: measures the workspace's structure and holds each figure to a committed ceiling that may only
//! fall. Owns the command; the rules are docs/ratchet.md, and each measure is a file of its own here.

mod ceilings;
mod circles;
mod dependencies;
mod figures;
mod kinds;
mod report;
mod shape;
mod sources;
#[cfg(test)]
mod tests;
mod tree;
mod waits;

use std::{io::Write, path::Path, process::ExitCode};

use clap::{Args, ValueEnum};

use self::{ceilings::Ceilings, report::Summary};

/// Measure the structure of the code and hold it to ceilings that may only fall
///
/// Measures circles of files, type names with two meanings, lengths of files and functions, dependencies that nothing
/// uses, files that name a provider kind, and sleeps of tests. Parses sources only: it compiles nothing and needs no network.
/// The rules are in docs/ratchet.md, the ceilings in .ci/ratchet.toml.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  cargo xtask ratchet                   the table, and what to do if a figure rose\n  \
    cargo xtask ratchet files_in_circles  what one figure counts, file by file\n  \
    cargo xtask ratchet --lower           write ceilings that were reached\n  \
    cargo xtask ratchet --output json     everything, for tools\n\n\
    To raise a ceiling, edit .ci/ratchet.toml and give the reason in the commit.\n\n\
    Exit codes: 0 if every figure is at its ceiling or below; 1 if one rose or has no ceiling; 2 for wrong options."
)]
pub(crate) struct Ratchet {
    /// Show all that these figures count, instead of the table
    #[arg(value_name = "FIGURE")]
    figures: Vec<String>,
    /// Write the ceilings that can be lowered; never raises one
    #[arg(long)]
    lower: bool,
    /// Text for people, or JSON for tools
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    output: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Json,
}

impl Ratchet {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap_or_else(|| Path::new("."));
        let workspace = sources::read(root)?;
        let circles = figures::every_circle(&workspace);
        let figures = figures::measure(&workspace, &circles)?;
        for name in &self.figures {
            if !figures.iter().any(|figure| figure.name == name) {
                let names: Vec<&str> = figures.iter().map(|figure| figure.name).collect();
                eprintln!("xtask: no figure `{name}`; there are:\n  {}", names.join("\n  "));
                return Ok(ExitCode::from(2));
            }
        }
        let mut ceilings = Ceilings::read(root)?;
        let lowered = if self.lower { ceilings.lower(&figures) } else { Vec::new() };
        if self.lower {
            ceilings.write(root)?;
        }
        let lines: Vec<_> = workspace
            .crates
            .iter()
            .map(|package| {
                let (code, tests) = shape::lines(package);
                (package.name.clone(), code, tests)
            })
            .collect();
        let report = Summary { figures: &figures, ceilings: &ceilings, lines: &lines };
        let mut out = std::io::stdout().lock();
        match self.output {
            Format::Json => report.json(&mut out, &circles)?,
            Format::Text if self.figures.is_empty() => report.table(&mut out)?,
            Format::Text => self.figures.iter().try_for_each(|name| report.details(&mut out, name, &circles))?,
        }
        for name in lowered {
            writeln!(std::io::stderr(), "lowered {name} in {}", ceilings::FILE)?;
        }
        Ok(if report.fails() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}
