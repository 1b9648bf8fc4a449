//! One look at a directory of definitions: owns what is read again, when a file is no longer being written, and that no
//! look reads without a bound.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use tokio::time::Instant;

use super::Content;
use crate::files;

/// A file counts once nothing of it has changed for so long.
const QUIET: Duration = Duration::from_secs(2);
/// Files of one directory, at most.
const FILES_MAX: usize = 1_000;
/// Bytes of all definitions of a directory, and of the files that they name, at most.
const BYTES_MAX: u64 = 64 << 20;

/// When a look happens: by the clock that files are dated by, and by one that never jumps.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moment {
    pub wall: SystemTime,
    pub at: Instant,
}

/// The definitions of a directory, as they were at the last look: never what they hold.
#[derive(Debug, Default)]
pub(super) struct Files(BTreeMap<PathBuf, Seen>);

/// What one look found.
#[derive(Debug, Default)]
pub(super) struct Looked {
    /// What is neither settled nor being written.
    pub ripe: BTreeMap<PathBuf, Content>,
    /// What is new, or holds something else than at the look before.
    pub changed: Vec<PathBuf>,
    /// What is no longer there.
    pub gone: Vec<PathBuf>,
}

/// How a definition looked.
#[derive(Debug)]
struct Seen {
    /// The definition's and those of the files that it names.
    stamps: Stamps,
    digest: blake3::Hash,
    /// Since when it looks like that.
    since: Instant,
    /// Whether it could be read; else another file may be what has to change.
    is_read: bool,
    is_settled: bool,
}

type Stamps = BTreeMap<PathBuf, Option<Stamp>>;

/// What tells without reading that a file is another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    bytes: u64,
    inode: u64,
}

impl Stamp {
    /// Of a file, over links; None where there is none.
    fn of(path: &Path) -> Option<Self> {
        let found = fs::metadata(path).ok()?;
        #[cfg(unix)]
        let inode = std::os::unix::fs::MetadataExt::ino(&found);
        #[cfg(not(unix))]
        let inode = 0;
        Some(Self { modified: found.modified().ok(), bytes: found.len(), inode })
    }
}

impl Files {
    /// Looks at a directory. What is settled and untouched is not read again, and neither is what `is_paused` and untouched.
    pub(super) fn look(
        &mut self,
        directory: &Path,
        now: Moment,
        is_paused: impl Fn(&Path) -> bool,
    ) -> Result<Looked, String> {
        let there = definitions(directory)?;
        let mut looked = Looked::default();
        looked.gone.extend(self.0.keys().filter(|path| !there.contains(*path)).cloned());
        self.0.retain(|path, _| there.contains(path));
        let mut bytes = 0;
        for path in there {
            let before = self.0.get(&path);
            let is_same =
                before.is_some_and(|seen| seen.is_read && seen.stamps.iter().all(|(p, s)| Stamp::of(p) == *s));
            if let Some(seen) = before
                && is_same
                && (seen.is_settled || is_paused(&path))
            {
                bytes += weight(&seen.stamps);
                continue;
            }
            let room = BYTES_MAX.saturating_sub(bytes);
            let (content, stamps) = read(&path, room)?;
            bytes += weight(&stamps);
            if bytes > BYTES_MAX {
                return Err(too_large());
            }
            let is_old = is_old(&stamps, now.wall);
            if self.note(&path, &content, stamps, now.at) {
                looked.changed.push(path.clone());
            }
            let Some(seen) = self.0.get(&path) else { continue };
            if !seen.is_settled && !is_paused(&path) && (is_old || now.at.duration_since(seen.since) >= QUIET) {
                looked.ripe.insert(path, content);
            }
        }
        Ok(looked)
    }

    /// Notes how a file looks; true where it holds something else than before.
    fn note(&mut self, path: &Path, content: &Content, stamps: Stamps, at: Instant) -> bool {
        let digest = digest(content);
        let is_read = content.is_ok();
        match self.0.get_mut(path) {
            Some(seen) if seen.digest == digest => {
                if seen.stamps != stamps {
                    (seen.stamps, seen.since) = (stamps, at);
                }
                false
            }
            _ => {
                let seen = Seen { stamps, digest, since: at, is_read, is_settled: false };
                self.0.insert(path.to_owned(), seen);
                true
            }
        }
    }

    /// What was registered or refused is not read again until it changes.
    pub(super) fn settle(&mut self, path: &Path) {
        if let Some(seen) = self.0.get_mut(path) {
            seen.is_settled = true;
        }
    }

    /// The file is to be looked at as if it were new.
    pub(super) fn unsettle(&mut self, path: &Path) {
        if let Some(seen) = self.0.get_mut(path) {
            seen.is_settled = false;
        }
    }

    /// What is neither registered nor refused.
    pub(super) fn unsettled(&self) -> impl Iterator<Item = &Path> {
        self.0.iter().filter(|(_, seen)| !seen.is_settled).map(|(path, _)| &**path)
    }
}

/// The definitions directly in a directory, by their ending.
fn definitions(directory: &Path) -> Result<BTreeSet<PathBuf>, String> {
    let mut there = BTreeSet::new();
    for entry in fs::read_dir(directory).map_err(|error| error.to_string())? {
        let path = entry.map_err(|error| error.to_string())?.path();
        // Over links; a pipe or a device is no definition, and could be read for ever.
        if is_definition(&path) && path.is_file() {
            if there.len() >= FILES_MAX {
                return Err(format!("it holds more than {FILES_MAX} definitions"));
            }
            there.insert(path);
        }
    }
    Ok(there)
}

/// YAML or JSON, and not hidden. A JSON Schema that lies beside definitions is none.
fn is_definition(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default().to_lowercase();
    let is_schema = name.ends_with(".schema.json") || name.ends_with(".input.json");
    !name.starts_with('.') && !is_schema && matches!(ending.as_str(), "yaml" | "yml" | "json")
}

/// Reads a definition and what it names. The stamps are taken afterwards: where all of them are old, nothing was written
/// meanwhile.
fn read(path: &Path, room_bytes: u64) -> Result<(Content, Stamps), String> {
    if Stamp::of(path).is_some_and(|stamp| stamp.bytes > room_bytes) {
        return Err(too_large());
    }
    let name = path.display().to_string();
    let content = files::bundle(&name)
        .map_err(|error| error.detail.strip_prefix(&format!("{name}: ")).unwrap_or(&error.detail).to_owned());
    let named = content.iter().flat_map(|bundle| bundle.files.keys());
    let directory = path.parent().unwrap_or(Path::new("."));
    let paths = named.map(|name| directory.join(name)).chain([path.to_owned()]);
    let stamps = paths.map(|path| (path.clone(), Stamp::of(&path))).collect();
    Ok((content, stamps))
}

fn too_large() -> String {
    format!("its definitions and the files that they name have more than {BYTES_MAX} bytes together")
}

fn weight(stamps: &Stamps) -> u64 {
    stamps.values().flatten().map(|stamp| stamp.bytes).sum()
}

/// Whether nothing of it was written just before `now`. A date in the future says nothing.
fn is_old(stamps: &Stamps, now: SystemTime) -> bool {
    stamps.values().all(|stamp| {
        let modified = stamp.and_then(|stamp| stamp.modified);
        modified.and_then(|modified| now.duration_since(modified).ok()).is_some_and(|age| age >= QUIET)
    })
}

fn digest(content: &Content) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    let mut add = |part: &str| {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    };
    match content {
        Ok(bundle) => {
            add(&bundle.definition);
            for (name, text) in &bundle.files {
                add(name);
                add(text);
            }
        }
        Err(reason) => add(reason),
    }
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory whose files were all written an hour after it was made, and what is seen of it.
    struct Scene {
        place: tempfile::TempDir,
        files: Files,
        written: SystemTime,
        start: Instant,
    }

    impl Scene {
        fn new() -> Self {
            let written = std::time::UNIX_EPOCH + Duration::from_hours(1);
            let place = tempfile::tempdir().expect("a directory");
            Self { place, files: Files::default(), written, start: Instant::now() }
        }

        /// Writes a file, dated so many seconds after the scene's beginning.
        fn write(&self, name: &str, text: &str, after_s: u64) {
            let path = self.place.path().join(name);
            fs::write(&path, text).expect("writable");
            let file = fs::File::options().write(true).open(path).expect("there");
            file.set_modified(self.written + Duration::from_secs(after_s)).expect("dated");
        }

        fn look(&mut self, after_s: u64) -> Looked {
            let after = Duration::from_secs(after_s);
            let now = Moment { wall: self.written + after, at: self.start + after };
            self.files.look(self.place.path(), now, |_| false).expect("readable")
        }

        /// The names of what is ripe, each of which is settled then.
        fn settled(&mut self, after_s: u64) -> Vec<String> {
            let ripe = self.look(after_s).ripe;
            for path in ripe.keys() {
                self.files.settle(path);
            }
            ripe.keys().map(|path| path.file_name().expect("a name").to_string_lossy().into_owned()).collect()
        }
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
    fn a_file_that_is_being_written_does_not_count() {
        let mut scene = Scene::new();
        scene.write("a.yaml", "name: ha", 10);
        assert!(scene.settled(10).is_empty() && scene.settled(11).is_empty(), "it may be half of a file");
        scene.write("a.yaml", "name: half", 11);
        assert!(scene.settled(12).is_empty(), "it still changed");
        assert_eq!(scene.settled(13), ["a.yaml"]);
        assert!(scene.settled(14).is_empty(), "it is known");
        fs::remove_file(scene.place.path().join("a.yaml")).expect("there");
        assert_eq!(scene.look(15).gone.len(), 1);
    }

    #[test]
    fn a_file_that_is_old_counts_at_once_and_one_from_the_future_once_it_is_quiet() {
        let mut scene = Scene::new();
        scene.write("old.yaml", "name: old", 0);
        scene.write("future.yaml", "name: future", 999);
        assert_eq!(scene.settled(10), ["old.yaml"]);
        assert!(scene.settled(11).is_empty());
        assert_eq!(scene.settled(12), ["future.yaml"]);
    }

    #[test]
    fn the_files_that_a_definition_names_change_it_and_must_be_quiet_as_well() {
        let mut scene = Scene::new();
        scene.write("a.yaml", "name: a\nstages: [{ id: one, prompt_file: p.md }]\n", 0);
        assert_eq!(scene.settled(10), ["a.yaml"], "a mistake is told as well: the prompt is not there");
        scene.write("p.md", "Say", 11);
        assert!(scene.settled(12).is_empty(), "half a prompt");
        scene.write("p.md", "Say hello.", 12);
        assert!(scene.settled(13).is_empty());
        assert_eq!(scene.settled(14), ["a.yaml"]);
        scene.write("p.md", "Say bye.", 20);
        assert_eq!(scene.settled(22), ["a.yaml"]);
    }

    #[test]
    fn what_is_settled_is_read_again_only_where_it_looks_different() {
        let mut scene = Scene::new();
        scene.write("a.yaml", "name: a", 0);
        assert_eq!(scene.settled(10), ["a.yaml"]);
        // The same date, size and file: nothing says that it should be read.
        scene.write("a.yaml", "name: b", 0);
        assert!(scene.settled(11).is_empty());
        scene.write("a.yaml", "name: a", 5);
        assert!(scene.settled(12).is_empty(), "touched, and the same");
        scene.write("a.yaml", "name: c", 6);
        assert_eq!(scene.settled(13), ["a.yaml"]);
    }

    #[cfg(unix)]
    #[test]
    fn a_pipe_is_never_opened() {
        let mut scene = Scene::new();
        for name in ["pipe.yaml", "pipe.md"] {
            let made = std::process::Command::new("mkfifo").arg(scene.place.path().join(name)).status();
            assert!(made.expect("mkfifo is there").success());
        }
        scene.write("a.yaml", "name: a\nstages: [{ id: one, prompt_file: pipe.md }]\n", 0);
        let ripe = scene.look(10).ripe;
        let contents: Vec<_> = ripe.into_values().collect();
        assert!(matches!(&contents[..], [Err(reason)] if reason.contains("no regular file")), "{contents:?}");
    }

    #[test]
    fn a_directory_is_read_up_to_a_bound() {
        let mut scene = Scene::new();
        scene.write("a.yaml", "", 0);
        let file = fs::File::options().write(true).open(scene.place.path().join("a.yaml")).expect("there");
        file.set_len(BYTES_MAX + 1).expect("sparse");
        let now = Moment { wall: scene.written, at: scene.start };
        let refused = scene.files.look(scene.place.path(), now, |_| false).expect_err("too large");
        assert!(refused.contains("more than"), "{refused}");
    }
}
