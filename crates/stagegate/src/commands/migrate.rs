//! `stagegate migrate`: brings the schema up to date. Safe when several start at once.

use stagegate_core::Error;
use stagegate_telemetry::Metrics;

use super::quiet_logs;
use crate::{
    cli::Global,
    daemon::{self, Options},
    output,
};

const EXAMPLES: &str = "\
Examples:
  DATABASE_URL=postgres://stagegate@db/stagegate stagegate migrate

Each migration that was applied is a line on stdout. Several may start at once: one migrates, the others wait and find \
nothing left to do. Without a database URL it is the embedded SQLite file that is brought up to date, which `serve` and \
`run` do by themselves.";

/// Bring the database's schema up to date.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Migrate {}

impl Migrate {
    pub(crate) async fn run(self, global: &Global) -> Result<u8, Error> {
        let Self {} = self;
        let mut loaded = global.load()?;
        let _guard = quiet_logs(&mut loaded)?;
        let options = Options { migrate: true, ..Options::default() };
        let opened = daemon::open_store(&loaded.config, options, &Metrics::new()).await?;
        opened.store.close().await;
        for (number, name) in &opened.migrated {
            output::result(&format!("applied {number:04} {name}\n"))?;
        }
        let done = if opened.migrated.is_empty() {
            "nothing to apply: the schema was up to date"
        } else {
            "the schema is up to date"
        };
        output::note_wrapped(&format!("{done}; {}", opened.note));
        Ok(0)
    }
}
