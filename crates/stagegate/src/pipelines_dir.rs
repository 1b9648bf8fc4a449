//! The pipelines of a directory: owns which files count, when a file has changed, and that a broken one leaves the version
//! in force. Registers through the engine, as the API does.
//!
//! The directory is looked at again every second, not listened to: events of the file system do not come from network
//! file systems, from volumes of other machines, or over the swapped links of a mounted `ConfigMap`. A changed file counts
//! once it has looked the same twice, so that half of a file is never read as a definition.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use stagegate_core::{Code, Error, TenantId, Violation, pipeline::Bundle};
use stagegate_engine::Engine;

use crate::{commands::in_file, files};

/// How often the directory is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Files of one directory, at most.
const FILES_MAX: usize = 1_000;

/// A directory of definitions.
#[derive(Debug)]
pub(crate) struct PipelinesDir {
    path: PathBuf,
    tenant: TenantId,
    /// What was last registered or refused, by file.
    settled: BTreeMap<PathBuf, Content>,
    /// What was there at the last look and is not settled.
    fresh: BTreeMap<PathBuf, Content>,
}

/// A definition, or why there is none.
type Content = Result<Bundle, String>;

impl PipelinesDir {
    /// The definitions in `path`, for a tenant.
    pub(crate) fn new(path: PathBuf, tenant: TenantId) -> Self {
        Self { path, tenant, settled: BTreeMap::new(), fresh: BTreeMap::new() }
    }

    /// Registers every definition, or tells every mistake of all of them and registers none.
    pub(crate) async fn register_all(&mut self, engine: &Engine) -> Result<(), Error> {
        let found = self.read()?;
        let mut violations = Vec::new();
        let mut names: BTreeMap<String, PathBuf> = BTreeMap::new();
        for (path, content) in &found {
            let file = path.display().to_string();
            match self.check(engine, &file, content).await {
                Ok(name) => {
                    if let Some(other) = names.insert(name.clone(), path.clone()) {
                        let message = format!("`{name}` is defined in {}, too", other.display());
                        let mistake = Violation::new(Code::InvalidDefinition, file, message);
                        violations.push(mistake.mend("give each pipeline a name of its own"));
                    }
                }
                Err(error) if error.code == Code::InvalidDefinition => violations.extend(error.violations),
                Err(error) => return Err(error),
            }
        }
        if !violations.is_empty() {
            return Err(Error::violations(Code::InvalidDefinition, violations));
        }
        for (path, content) in found {
            if let Ok(source) = &content {
                let (version, is_new) = engine.register(&self.tenant, source).await?;
                let (name, number) = (&version.name, version.version);
                tracing::info!(file = %path.display(), pipeline = %name, version = number, is_new, "pipeline registered");
            }
            self.settled.insert(path, content);
        }
        tracing::info!(directory = %self.path.display(), files = self.settled.len(), "the directory's pipelines are in force");
        Ok(())
    }

    /// The name of a definition that is right.
    async fn check(&self, engine: &Engine, file: &str, content: &Content) -> Result<String, Error> {
        match content {
            Ok(source) => {
                let pipeline = engine.validate(&self.tenant, source).await.map_err(|error| in_file(file, error))?;
                Ok(pipeline.name.to_string())
            }
            Err(reason) => {
                let mistake = Violation::new(Code::InvalidDefinition, file, reason.clone());
                Err(Error::violations(Code::InvalidDefinition, vec![mistake]))
            }
        }
    }

    /// Registers what changes, for as long as the task lives.
    pub(crate) async fn watch(mut self, engine: Engine) {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            match self.read() {
                Ok(found) => {
                    for (path, content) in self.changes(found) {
                        self.take(&engine, path, content).await;
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "the pipelines' directory cannot be read; what is registered stays");
                }
            }
        }
    }

    /// The files whose content has changed and looked the same twice.
    fn changes(&mut self, found: BTreeMap<PathBuf, Content>) -> Vec<(PathBuf, Content)> {
        let gone: BTreeSet<PathBuf> = self.settled.keys().filter(|path| !found.contains_key(*path)).cloned().collect();
        for path in gone {
            tracing::info!(file = %path.display(), "the file is gone; its pipeline stays registered");
            self.settled.remove(&path);
        }
        let before = std::mem::take(&mut self.fresh);
        let mut changed = Vec::new();
        for (path, content) in found {
            if self.settled.get(&path) == Some(&content) {
                continue;
            }
            if before.get(&path) == Some(&content) {
                changed.push((path, content));
            } else {
                self.fresh.insert(path, content);
            }
        }
        changed
    }

    async fn take(&mut self, engine: &Engine, path: PathBuf, content: Content) {
        let file = path.display().to_string();
        let done = match &content {
            Ok(source) => engine.register(&self.tenant, source).await.map_err(|error| in_file(&file, error)),
            Err(reason) => {
                let mistake = Violation::new(Code::InvalidDefinition, &*file, reason.clone());
                Err(Error::violations(Code::InvalidDefinition, vec![mistake]))
            }
        };
        match done {
            Ok((version, is_new)) => {
                let (name, number) = (&version.name, version.version);
                tracing::info!(%file, pipeline = %name, version = number, is_new, "pipeline registered");
            }
            Err(error) if error.code == Code::InvalidDefinition => {
                for violation in &error.violations {
                    let mend = violation.mend.as_ref().map_or_else(String::new, |mend| format!(" ({mend})"));
                    tracing::warn!("{}: {}{mend}", violation.path, violation.message);
                }
                tracing::warn!(%file, "the file has mistakes: the version before it stays in force");
            }
            Err(error) => {
                // Nothing is wrong with the file: the next look tries again.
                tracing::warn!(%file, %error, "the pipeline could not be registered; it is tried again");
                return;
            }
        }
        self.settled.insert(path, content);
    }

    /// What the directory holds: definitions directly in it, by their ending.
    fn read(&self) -> Result<BTreeMap<PathBuf, Content>, Error> {
        let refused =
            |reason: String| Error::new(Code::InvalidConfig, format!("--pipelines: {}: {reason}", self.path.display()));
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(&self.path).map_err(|error| refused(error.to_string()))? {
            let path = entry.map_err(|error| refused(error.to_string()))?.path();
            if is_definition(&path) && path.is_file() {
                if found.len() >= FILES_MAX {
                    return Err(refused(format!("it holds more than {FILES_MAX} definitions")));
                }
                let name = path.display().to_string();
                let content = files::bundle(&name).map_err(|error| {
                    error.detail.strip_prefix(&format!("{name}: ")).unwrap_or(&error.detail).to_owned()
                });
                found.insert(path, content);
            }
        }
        Ok(found)
    }
}

/// YAML or JSON, and not hidden. A JSON Schema that lies beside definitions is none.
fn is_definition(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default().to_lowercase();
    let is_schema = name.ends_with(".schema.json") || name.ends_with(".input.json");
    !name.starts_with('.') && !is_schema && matches!(ending.as_str(), "yaml" | "yml" | "json")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(place: &Path) -> PipelinesDir {
        PipelinesDir::new(place.to_owned(), TenantId::default())
    }

    #[test]
    fn definitions_are_found_by_their_ending() {
        for (name, counts) in [
            ("a.yaml", true),
            ("a.yml", true),
            ("a.JSON", true),
            (".a.yaml", false),
            ("..data", false),
            ("a.yaml~", false),
            ("stagegate.schema.json", false),
            ("brief.md", false),
        ] {
            assert_eq!(is_definition(Path::new(name)), counts, "{name}");
        }
    }

    #[test]
    fn a_change_counts_once_it_has_looked_the_same_twice() {
        let place = tempfile::tempdir().expect("a directory");
        let mut directory = directory(place.path());
        let file = place.path().join("a.yaml");
        let write = |text: &str| fs::write(&file, text).expect("writable");
        let look = |directory: &mut PipelinesDir| {
            let found = directory.read().expect("readable");
            directory.changes(found)
        };
        write("name: ha");
        assert!(look(&mut directory).is_empty(), "it may be half of a file");
        write("name: half");
        assert!(look(&mut directory).is_empty(), "it still changed");
        let changed = look(&mut directory);
        assert_eq!(changed, [(file.clone(), Ok("name: half".into()))]);
        directory.settled.extend(changed);
        assert!(look(&mut directory).is_empty(), "it is known");
        fs::remove_file(&file).expect("there");
        assert!(look(&mut directory).is_empty() && directory.settled.is_empty(), "a file that is gone is forgotten");
    }

    #[test]
    fn a_directory_that_is_none_is_told_with_the_flag() {
        let error = directory(Path::new("/nowhere/at/all")).read().expect_err("not there");
        assert!(error.code == Code::InvalidConfig && error.detail.contains("--pipelines: /nowhere"), "{error}");
    }
}
