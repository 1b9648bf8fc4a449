//! `stagegate init`: a starter pipeline that explains itself, and the schema that editors check it with. Overwrites
//! nothing unless it is told to.

use std::{
    fs::OpenOptions,
    io::{ErrorKind, Write as _},
    path::{Path, PathBuf},
};

use stagegate_core::{Code, Error, PipelineName, pipeline::definition_schema};

use super::held::quoted;
use crate::output;

/// The starter; `@NAME@` and `@FILE@` are filled in.
const STARTER: &str = include_str!("starter.yaml");
/// The schema's file, as the starter's first line names it.
const SCHEMA_FILE: &str = "stagegate.schema.json";

const EXAMPLES: &str = "\
Examples:
  stagegate init                         pipeline.yaml and stagegate.schema.json
  stagegate init pipelines/triage.yaml
  stagegate init triage.yaml --force     also where the file is there

The schema is for editors: those with a YAML language server complete and check the pipeline as you write it.";

/// Write a starter pipeline, commented.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Init {
    /// Where to write it
    #[arg(default_value = "pipeline.yaml", value_hint = clap::ValueHint::FilePath)]
    file: PathBuf,
    /// The pipeline's name [default: the file's]
    #[arg(long)]
    name: Option<PipelineName>,
    /// Overwrite what is there
    #[arg(long)]
    force: bool,
}

impl Init {
    pub(crate) fn run(self) -> Result<u8, Error> {
        let name = match &self.name {
            Some(name) => name.clone(),
            None => name_of(&self.file),
        };
        let shown = self.file.display().to_string();
        write(&self.file, &starter(&name, &shown), self.force)?;
        let schema = self.file.with_file_name(SCHEMA_FILE);
        let text = format!("{:#}\n", definition_schema());
        // One that is there may be of another release, and is somebody's: it is left, and told.
        match write(&schema, &text, self.force) {
            Ok(()) => output::note(&format!("wrote {shown} and {}", schema.display())),
            Err(_) if schema.is_file() => {
                output::note(&format!("wrote {shown}; {} was there and is left", schema.display()));
            }
            Err(error) => return Err(error),
        }
        output::note("next:");
        output::note(&format!("  stagegate run {} --input 'Bees dance to tell where flowers are.'", quoted(&shown)));
        Ok(0)
    }
}

/// A name made of a file's: what a name may not hold becomes a hyphen.
fn name_of(file: &Path) -> PipelineName {
    let stem = file.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default().to_lowercase();
    let slug: String =
        stem.chars().map(|c| if c.is_ascii_alphanumeric() || "_-".contains(c) { c } else { '-' }).collect();
    let slug: String = slug.trim_matches(['-', '_']).chars().take(64).collect();
    PipelineName::new(&slug).or_else(|_| PipelineName::new("starter")).unwrap_or_else(|_| unreachable!("a plain word"))
}

fn starter(name: &PipelineName, file: &str) -> String {
    STARTER.replace("@NAME@", name.as_str()).replace("@FILE@", &quoted(file))
}

fn write(path: &Path, text: &str, force: bool) -> Result<(), Error> {
    let refused = |reason: String| Error::new(Code::InvalidRequest, format!("{}: {reason}", path.display()));
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).map_err(|error| refused(error.to_string()))?;
    }
    let mut options = OpenOptions::new();
    options.write(true);
    if force {
        options.create(true).truncate(true);
    } else {
        options.create_new(true);
    }
    let written = options.open(path).and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|error| match error.kind() {
        ErrorKind::AlreadyExists => {
            refused("it is there already; name another file, or overwrite it with --force".to_owned())
        }
        _ => refused(error.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_made_of_the_files() {
        for (file, name) in
            [("pipeline.yaml", "pipeline"), ("a/Triage Mails.yml", "triage-mails"), ("Ü.yaml", "starter")]
        {
            assert_eq!(name_of(Path::new(file)).as_str(), name);
        }
    }

    #[test]
    fn nothing_is_overwritten_unless_that_is_asked_for() {
        let place = tempfile::tempdir().expect("a directory");
        let file = place.path().join("deep/p.yaml");
        let init = |force| Init { file: file.clone(), name: None, force }.run();
        init(false).expect("written");
        std::fs::write(&file, "mine").expect("writable");
        assert_eq!(init(false).expect_err("it is there").code, Code::InvalidRequest);
        assert_eq!(std::fs::read_to_string(&file).expect("readable"), "mine");
        init(true).expect("overwritten");
        let text = std::fs::read_to_string(&file).expect("readable");
        assert!(text.starts_with("# yaml-language-server: $schema=./stagegate.schema.json\n"), "{text}");
        assert!(text.contains("\nname: p\n") && !text.contains('@'), "{text}");
    }
}
