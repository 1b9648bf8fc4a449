//! `stagegate schema`: the JSON Schema of a definition.

use stagegate_core::{Error, pipeline::definition_schema};

use crate::output;

const EXAMPLES: &str = "\
Examples:
  stagegate schema > stagegate.schema.json

Editors with a YAML language server complete and check pipelines when the file begins with:
  # yaml-language-server: $schema=./stagegate.schema.json";

/// Print the JSON Schema of a pipeline definition.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Schema {}

impl Schema {
    pub(crate) fn run(self) -> Result<u8, Error> {
        let Self {} = self;
        output::result(&format!("{:#}\n", definition_schema()))?;
        Ok(0)
    }
}
