//! Any program under a watchdog, with a folder of its own: killed, frozen and started again at will, gone with us.

use std::{
    io::{Read as _, Seek as _},
    path::{Path, PathBuf},
};

use super::watchdog::{Server, Spec};

/// A program.
#[derive(Debug)]
pub struct Program {
    server: Server,
}

impl Program {
    /// Starts it in a fresh folder. `prepare` is told the folder, may write files there, and returns the command line;
    /// `end_signal` is what ends it when we are gone.
    pub fn start(
        kind: &str,
        end_signal: &'static str,
        prepare: impl FnOnce(&Path) -> anyhow::Result<Vec<String>>,
    ) -> anyhow::Result<Self> {
        let home = tempfile::Builder::new().prefix(&format!("stagegate-{kind}-")).tempdir()?.keep();
        let server = prepare(&home).and_then(|command| {
            Server::start(Spec { home: home.clone(), user: None, command, stop_signal: end_signal })
        });
        if server.is_err() {
            let _ = std::fs::remove_dir_all(&home);
        }
        Ok(Self { server: server? })
    }

    /// Starts it again in the same folder; does nothing where it was not stopped.
    pub fn start_again(&self) -> anyhow::Result<()> {
        self.server.start_again()
    }

    /// Ends it with a signal (`KILL`, `TERM` …) and waits; its exit status as a shell tells it: 128 and the number of
    /// the signal that ended it. None where it did not run.
    pub async fn stop(&self, signal: &str) -> anyhow::Result<Option<i32>> {
        self.server.stop(signal).await
    }

    /// Freezes it: its connections stay open and nothing answers.
    pub fn freeze(&self) -> anyhow::Result<()> {
        self.server.freeze()
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        self.server.thaw();
    }

    /// Whether it is there.
    pub fn is_running(&self) -> bool {
        self.server.is_running()
    }

    /// Its process.
    pub fn pid(&self) -> Option<u32> {
        self.server.pid()
    }

    /// Everything that it wrote, over all its starts.
    pub fn log_path(&self) -> PathBuf {
        self.server.home().join("log")
    }

    /// The end of what it wrote.
    pub fn log_tail(&self) -> String {
        self.server.log_tail()
    }

    /// What it wrote from this byte on, up to its last whole line; and where that ends.
    pub fn log_from(&self, offset: u64) -> anyhow::Result<(String, u64)> {
        let mut file = std::fs::File::open(self.log_path())?;
        file.seek(std::io::SeekFrom::Start(offset))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
        bytes.truncate(whole);
        Ok((String::from_utf8_lossy(&bytes).into_owned(), offset + whole as u64))
    }
}
