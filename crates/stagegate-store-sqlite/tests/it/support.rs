//! What the tests share: a store in a folder of its own, a raw connection beside it, and the test binary as a second
//! process.

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    sync::Arc,
};

use sqlx::{Connection as _, SqliteConnection, sqlite::SqliteConnectOptions};
use stagegate_core::Store;
use stagegate_store_sqlite::SqliteStore;
use stagegate_telemetry::Metrics;
use tempfile::TempDir;

/// Names the database that a child process is to work on.
const CHILD: &str = "STAGEGATE_TEST_CHILD_DATABASE";

/// A folder and the path of a database in it that is not there yet.
pub(crate) fn folder() -> (TempDir, PathBuf) {
    let folder = TempDir::with_prefix("stagegate-").expect("a folder");
    let path = folder.path().join("data").join("stagegate.db");
    (folder, path)
}

/// The store on this file.
pub(crate) async fn open(path: &Path) -> SqliteStore {
    SqliteStore::open(path, Metrics::new()).await.expect("the store opens")
}

/// The same, as the contract suite takes it.
pub(crate) async fn open_dyn(path: &Path) -> Arc<dyn Store> {
    Arc::new(open(path).await)
}

/// A connection that goes past the store.
pub(crate) async fn raw(path: &Path) -> SqliteConnection {
    SqliteConnection::connect_with(&SqliteConnectOptions::new().filename(path)).await.expect("a raw connection")
}

/// The database that this process is to work on as a child; None in an ordinary test run.
pub(crate) fn child_database() -> Option<PathBuf> {
    std::env::var_os(CHILD).map(PathBuf::from)
}

/// Runs one test of this binary in a process of its own, as a child on this database.
pub(crate) fn spawn_child(test: &str, database: &Path) -> (Child, impl Iterator<Item = String> + use<>) {
    let mut child = Command::new(std::env::current_exe().expect("this binary"))
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(CHILD, database)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a child");
    let output: ChildStdout = child.stdout.take().expect("it is piped");
    // A killed child may leave half a line, which is no acknowledgement: it has no end mark.
    let lines = BufReader::new(output).lines().map_while(Result::ok);
    let told = lines.filter_map(|line| Some(line.split_once("told: ")?.1.strip_suffix('.')?.to_owned()));
    (child, told)
}

/// Tells the parent something; it counts once the whole line is out.
pub(crate) fn tell(what: &str) {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    writeln!(out, "told: {what}.").and_then(|()| out.flush()).expect("the parent listens");
}
