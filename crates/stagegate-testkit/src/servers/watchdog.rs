//! A server process under a watchdog: a shell that starts the server and waits on a pipe from us. When the pipe closes
//! (we dropped it, panicked, or were killed) it stops the server and removes its folder.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::TcpListener,
    os::unix::{fs::MetadataExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};

/// `$1` is the signal that stops the server, `$2` its folder; the rest is its command line.
const SCRIPT: &str = r#"
signal=$1 home=$2; shift 2
"$@" </dev/null >>"$home/log" 2>&1 &
pid=$!
echo "$pid"
read -r word other
kill -s "${other:-$signal}" "$pid" 2>/dev/null
kill -s CONT "$pid" 2>/dev/null
wait "$pid"
status=$?
[ "$word" = keep ] || rm -rf "$home"
echo "$status"
"#;

/// How long a server may take to stop before it is left to its watchdog.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// What to run, where, and as whom.
#[derive(Debug)]
pub(super) struct Spec {
    pub(super) home: PathBuf,
    pub(super) user: Option<(u32, u32)>,
    pub(super) command: Vec<String>,
    pub(super) stop_signal: &'static str,
}

/// A server that can be stopped and started again on the same folder.
#[derive(Debug)]
pub(super) struct Server {
    spec: Spec,
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    shell: Child,
    pipe: Option<ChildStdin>,
    /// Where the watchdog tells the exit status at the end.
    told: Option<BufReader<ChildStdout>>,
    pid: u32,
    frozen: Vec<u32>,
}

impl Server {
    pub(super) fn start(spec: Spec) -> anyhow::Result<Self> {
        let server = Self { spec, running: Mutex::new(None) };
        server.start_again()?;
        Ok(server)
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts it on the same folder; does nothing where it runs.
    pub(super) fn start_again(&self) -> anyhow::Result<()> {
        let mut running = self.running();
        if running.is_some() {
            return Ok(());
        }
        let mut command = Command::new("sh");
        command.arg("-c").arg(SCRIPT).arg("watchdog").arg(self.spec.stop_signal).arg(&self.spec.home);
        command.args(&self.spec.command).current_dir(&self.spec.home);
        // A group of its own: a terminal's Ctrl-C, or a test runner that kills our group, leaves the watchdog to clean up.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        if let Some((uid, gid)) = self.spec.user {
            command.uid(uid).gid(gid);
        }
        let mut shell = command.spawn().context("cannot start `sh`")?;
        let pipe = shell.stdin.take();
        let mut line = String::new();
        let mut told = shell.stdout.take().map(BufReader::new);
        if let Some(told) = &mut told {
            told.read_line(&mut line)?;
        }
        let pid = line.trim().parse().with_context(|| format!("cannot start {:?}", self.spec.command.first()))?;
        *running = Some(Running { shell, pipe, told, pid, frozen: Vec::new() });
        Ok(())
    }

    /// Whom it runs as, where that is not us.
    pub(super) fn user(&self) -> Option<(u32, u32)> {
        self.spec.user
    }

    /// Its process, while it was not stopped.
    pub(super) fn pid(&self) -> Option<u32> {
        self.running().as_ref().map(|running| running.pid)
    }

    /// Where it works; its output is in the file `log` there.
    pub(super) fn home(&self) -> &Path {
        &self.spec.home
    }

    /// Whether the process is there and no zombie.
    pub(super) fn is_running(&self) -> bool {
        let Some(pid) = self.running().as_ref().map(|running| running.pid) else { return false };
        match fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(stat) => !stat.rsplit(')').next().unwrap_or_default().trim_start().starts_with('Z'),
            Err(_) => !Path::new("/proc/self/stat").exists(),
        }
    }

    /// Stops it with a signal and keeps its folder. Returns its exit status as a shell tells it (128 and the signal's
    /// number where one ended it), or None where it did not run.
    pub(super) async fn stop(&self, signal: &str) -> anyhow::Result<Option<i32>> {
        self.thaw();
        let Some(mut running) = self.running().take() else { return Ok(None) };
        if let Some(mut pipe) = running.pipe.take() {
            writeln!(pipe, "keep {signal}")?;
        }
        let limit = tokio::time::Instant::now() + STOP_LIMIT;
        while running.shell.try_wait()?.is_none() {
            if tokio::time::Instant::now() > limit {
                bail!("the server did not stop within {STOP_LIMIT:?}");
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let mut status = String::new();
        if let Some(told) = &mut running.told {
            told.read_line(&mut status)?;
        }
        Ok(status.trim().parse().ok())
    }

    /// Freezes it and its children: connections stay open and nothing answers.
    pub(super) fn freeze(&self) -> anyhow::Result<()> {
        let mut running = self.running();
        let Some(running) = running.as_mut() else { bail!("the server is stopped") };
        // The parent first, so that no child is born after we have listed them.
        send("STOP", &[running.pid])?;
        let children = children(running.pid);
        // A child that ended meanwhile is no loss.
        let _ = send("STOP", &children);
        running.frozen = children;
        running.frozen.push(running.pid);
        Ok(())
    }

    /// Lets it go on.
    pub(super) fn thaw(&self) {
        let mut running = self.running();
        for pid in running.as_mut().map(|running| std::mem::take(&mut running.frozen)).unwrap_or_default() {
            // One that ended meanwhile is no loss.
            let _ = send("CONT", &[pid]);
        }
    }

    /// The end of what it wrote, for an error message.
    pub(super) fn log_tail(&self) -> String {
        let log = fs::read(self.spec.home.join("log")).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.thaw();
        if let Some(mut running) = self.running().take() {
            drop(running.pipe.take());
            let limit = Instant::now() + Duration::from_secs(5);
            while matches!(running.shell.try_wait(), Ok(None)) && Instant::now() < limit {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        let _ = fs::remove_dir_all(&self.spec.home);
    }
}

fn send(signal: &str, pids: &[u32]) -> anyhow::Result<()> {
    if pids.is_empty() {
        return Ok(());
    }
    let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
    // The shell's own `kill`: there is one wherever there is a shell.
    let status = Command::new("sh").arg("-c").arg(format!("kill -s {signal} {}", pids.join(" "))).status()?;
    if status.success() { Ok(()) } else { bail!("cannot send {signal}") }
}

fn children(pid: u32) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let parent = |pid: u32| -> Option<u32> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()
    };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|child| parent(*child) == Some(pid)).collect()
}

/// A folder for a server, and whom it must run as: Postgres refuses root, so that root steps down.
pub(super) fn home(kind: &str) -> anyhow::Result<(PathBuf, Option<(u32, u32)>)> {
    let home = tempfile::Builder::new().prefix(&format!("stagegate-{kind}-")).tempdir()?.keep();
    if fs::metadata(&home)?.uid() != 0 {
        return Ok((home, None));
    }
    let passwd = fs::read_to_string("/etc/passwd").context("cannot read /etc/passwd")?;
    let user = ["postgres", "nobody"].iter().find_map(|name| {
        let line = passwd.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut ids = line.split(':').skip(2);
        Some((ids.next()?.parse().ok()?, ids.next()?.parse().ok()?))
    });
    let Some((uid, gid)) = user else { bail!("root needs a user `postgres` or `nobody` to run servers as") };
    std::os::unix::fs::chown(&home, Some(uid), Some(gid))?;
    Ok((home, Some((uid, gid))))
}

/// A port that was free a moment ago. Somebody else may take it first; whoever starts a server tries again.
pub fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

/// The first of these folders, then of PATH, that holds the program.
pub(super) fn find(program: &str, folders: &[PathBuf]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path);
    folders.iter().cloned().chain(in_path).map(|folder| folder.join(program)).find(|file| file.is_file())
}
