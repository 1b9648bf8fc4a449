//! The pipelines of a directory: owns which files count, when a file has changed, and that a broken one leaves the version
//! in force. Registers through the engine, as the API does.
//!
//! The directory is looked at again every second, not listened to: events of the file system do not come from network
//! file systems, from volumes of other machines, or over the swapped links of a mounted `ConfigMap`. A file that is being
//! written is not read as a definition: see [`look`].

mod look;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use stagegate_core::{Clock as _, Code, Error, SystemClock, TenantId, Violation, pipeline::Bundle};
use stagegate_engine::Engine;
use tokio::time::Instant;

use crate::commands::in_file;
use look::{Files, Moment};

/// How often the directory is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long a start waits for files that are being written; what is not done by then is registered later.
const START_PATIENCE: Duration = Duration::from_secs(15);
/// The first pause before what the engine would not take now is offered again, and the longest one.
const PAUSES: (Duration, Duration) = (Duration::from_secs(2), Duration::from_mins(5));

/// A definition, or why there is none.
type Content = Result<Bundle, String>;

/// A directory of definitions.
#[derive(Debug)]
pub(crate) struct PipelinesDir {
    path: PathBuf,
    tenant: TenantId,
    files: Files,
    /// What became of each file.
    standings: BTreeMap<PathBuf, Standing>,
    /// Why the directory could not be read at the last look.
    unread: Option<String>,
}

/// What became of a file.
#[derive(Debug, Default)]
struct Standing {
    /// The pipeline that was last registered from it.
    name: Option<String>,
    /// Whether it was refused because another file has its pipeline.
    is_twin: bool,
    /// When it is offered again, where the engine would not take it now.
    retry: Option<Retry>,
}

#[derive(Debug, Clone, Copy)]
struct Retry {
    at: Instant,
    pause: Duration,
    code: Code,
}

impl Retry {
    /// The next one: each pause is twice the one before.
    fn after(before: Option<Self>, code: Code, now: Instant) -> Self {
        let pause = before.map_or(PAUSES.0, |before| (before.pause * 2).min(PAUSES.1));
        Self { at: now + pause, pause, code }
    }
}

impl PipelinesDir {
    /// The definitions in `path`, for a tenant.
    pub(crate) fn new(path: PathBuf, tenant: TenantId) -> Self {
        Self { path, tenant, files: Files::default(), standings: BTreeMap::new(), unread: None }
    }

    /// Registers every definition, or tells every mistake of all of them and registers none. What cannot be registered now,
    /// though nothing is wrong with it, is left for [`Self::watch`].
    pub(crate) async fn register_all(mut self, engine: &Engine) -> Result<Self, Error> {
        let started = Instant::now();
        let mut all: BTreeMap<PathBuf, Content>;
        loop {
            let (next, found) = self.looked().await?;
            self = next;
            all = found?;
            let unripe = self.files.unsettled().filter(|path| !all.contains_key(*path)).count();
            if unripe == 0 {
                break;
            }
            if started.elapsed() > START_PATIENCE {
                tracing::warn!(
                    files = unripe,
                    "files of the pipelines' directory are being written; they are registered later"
                );
                break;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        self.refuse_mistakes(engine, &all).await?;
        for (path, content) in all {
            self.take(engine, &path, &content).await;
        }
        tracing::info!(directory = %self.path.display(), files = self.standings.len(), "the directory's pipelines are read");
        Ok(self)
    }

    /// Fails with every mistake of all the files.
    async fn refuse_mistakes(&self, engine: &Engine, all: &BTreeMap<PathBuf, Content>) -> Result<(), Error> {
        let mut violations = Vec::new();
        let mut names: BTreeMap<String, &Path> = BTreeMap::new();
        for (path, content) in all {
            let file = path.display().to_string();
            match self.check(engine, &file, content).await {
                Ok(name) => {
                    if let Some(other) = names.insert(name.clone(), path) {
                        violations.push(twin(&file, &name, other));
                    }
                }
                Err(error) if error.code == Code::InvalidDefinition => violations.extend(error.violations),
                // It is no mistake of the file: it is told where the file is registered.
                Err(_) => {}
            }
        }
        if violations.is_empty() { Ok(()) } else { Err(Error::violations(Code::InvalidDefinition, violations)) }
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
            let found = match self.looked().await {
                Ok((next, found)) => {
                    self = next;
                    found
                }
                Err(error) => {
                    tracing::error!(%error, "the pipelines' directory is watched no more");
                    return;
                }
            };
            match found {
                Ok(found) => {
                    self.unread = None;
                    for (path, content) in found {
                        self.take(&engine, &path, &content).await;
                    }
                }
                // Told once, not every second.
                Err(error) if self.unread.as_ref() == Some(&error.detail) => {}
                Err(error) => {
                    tracing::warn!(%error, "the pipelines' directory cannot be read; what is registered stays");
                    self.unread = Some(error.detail);
                }
            }
        }
    }

    /// Looks, on a thread that may wait for a disk.
    async fn looked(mut self) -> Result<(Self, Result<BTreeMap<PathBuf, Content>, Error>), Error> {
        let looking = tokio::task::spawn_blocking(move || {
            let now = Moment { wall: SystemClock.now().into(), at: Instant::now() };
            let found = self.look(now);
            (self, found)
        });
        looking.await.map_err(|error| Error::new(Code::Internal, format!("the pipelines' directory: {error}")))
    }

    /// The files that are to be registered now.
    fn look(&mut self, now: Moment) -> Result<BTreeMap<PathBuf, Content>, Error> {
        let refused =
            |reason: String| Error::new(Code::InvalidConfig, format!("--pipelines: {}: {reason}", self.path.display()));
        let standings = &self.standings;
        let is_paused = |path: &Path| standings.get(path).and_then(|s| s.retry).is_some_and(|retry| now.at < retry.at);
        let looked = self.files.look(&self.path, now, is_paused).map_err(refused)?;
        for path in &looked.gone {
            tracing::info!(file = %path.display(), "the file is gone; its pipeline stays registered");
            self.standings.remove(path);
        }
        if !looked.gone.is_empty() {
            self.release_twins();
        }
        for path in &looked.changed {
            // Other content has no pause yet.
            self.standings.entry(path.clone()).or_default().retry = None;
        }
        Ok(looked.ripe)
    }

    /// A file that was refused because of another one may be right now.
    fn release_twins(&mut self) {
        for (path, standing) in &mut self.standings {
            if std::mem::take(&mut standing.is_twin) {
                self.files.unsettle(path);
            }
        }
    }

    /// The other file that this pipeline was registered from.
    fn owner(&self, name: &str, but: &Path) -> Option<&Path> {
        let others = self.standings.iter().filter(|(path, _)| *path != but);
        others.filter(|(_, standing)| standing.name.as_deref() == Some(name)).map(|(path, _)| &**path).next()
    }

    async fn take(&mut self, engine: &Engine, path: &Path, content: &Content) {
        let file = path.display().to_string();
        let checked = self.check(engine, &file, content).await;
        let other = checked.as_ref().ok().and_then(|name| Some(twin(&file, name, self.owner(name, path)?)));
        let is_twin = other.is_some();
        let done = match (checked, other, content) {
            (Err(error), ..) => Err(error),
            (Ok(_), Some(twin), _) => Err(Error::violations(Code::InvalidDefinition, vec![twin])),
            (Ok(_), None, Ok(source)) => engine.register_as_newest(&self.tenant, source).await,
            (Ok(_), None, Err(reason)) => Err(Error::new(Code::Internal, reason.clone())),
        };
        match done.map_err(|error| in_file(&file, error)) {
            Ok((version, is_new)) => {
                let (name, number) = (version.name.to_string(), version.version);
                tracing::info!(%file, pipeline = %name, version = number, is_new, "pipeline registered");
                let before = self
                    .standings
                    .insert(path.to_owned(), Standing { name: Some(name.clone()), ..Standing::default() });
                if before.and_then(|before| before.name).is_some_and(|before| before != name) {
                    self.release_twins();
                }
                self.files.settle(path);
            }
            Err(error) if error.code == Code::InvalidDefinition => {
                tell(&file, &error);
                let standing = self.standings.entry(path.to_owned()).or_default();
                (standing.is_twin, standing.retry) = (is_twin, None);
                self.files.settle(path);
            }
            Err(error) => self.put_off(path, &error),
        }
    }

    /// Nothing is wrong with the file: it is offered again, with growing pauses, and told once.
    fn put_off(&mut self, path: &Path, error: &Error) {
        let standing = self.standings.entry(path.to_owned()).or_default();
        let before = standing.retry;
        let retry = Retry::after(before, error.code, Instant::now());
        standing.retry = Some(retry);
        let (file, pause_s) = (path.display(), retry.pause.as_secs());
        if before.is_some_and(|before| before.code == error.code) {
            tracing::debug!(%file, %error, pause_s, "the pipeline could still not be registered");
        } else {
            tracing::warn!(%file, %error, pause_s, "the pipeline could not be registered; it is tried again");
        }
    }
}

/// The mistake of a second file with the same pipeline.
fn twin(file: &str, name: &str, other: &Path) -> Violation {
    let message = format!("`{name}` is defined in {}, too", other.display());
    Violation::new(Code::InvalidDefinition, file, message).mend("give each pipeline a name of its own")
}

fn tell(file: &str, error: &Error) {
    for violation in &error.violations {
        let mend = violation.mend.as_ref().map_or_else(String::new, |mend| format!(" ({mend})"));
        tracing::warn!("{}: {}{mend}", violation.path, violation.message);
    }
    tracing::warn!(%file, "the file has mistakes: the version before it stays in force");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_minutes_and_no_further() {
        let now = Instant::now();
        let mut retry = Retry::after(None, Code::QuotaReached, now);
        assert_eq!(retry.pause, PAUSES.0);
        for _ in 0..20 {
            retry = Retry::after(Some(retry), Code::QuotaReached, now);
        }
        assert_eq!((retry.pause, retry.at), (PAUSES.1, now + PAUSES.1));
    }

    #[test]
    fn a_directory_that_is_none_is_told_with_the_flag() {
        let mut directory = PipelinesDir::new("/nowhere/at/all".into(), TenantId::default());
        let now = Moment { wall: std::time::UNIX_EPOCH, at: Instant::now() };
        let error = directory.look(now).expect_err("not there");
        assert!(error.code == Code::InvalidConfig && error.detail.contains("--pipelines: /nowhere"), "{error}");
    }
}
