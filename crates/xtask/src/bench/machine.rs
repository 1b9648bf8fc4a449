//! The machine and its processes, read from /proc: owns the facts that stand beside each measurement, CPU time by
//! process, resident memory, and the limit of open files. Starts nothing but `git` and `prlimit`.

use std::{collections::BTreeMap, fs, path::Path};

use serde_json::{Value, json};
use stagegate_core::{Clock as _, SystemClock};
use tokio::process::Command;

use crate::system::{self, output_of, root, say};

/// Clock ticks a second in /proc; a constant of Linux's user interface on every architecture that we run on.
const TICKS_PER_SECOND: f64 = 100.0;
/// Open files that the largest cell needs: 10,000 runs and as many watchers, each at two ends.
const OPEN_FILES: u32 = 131_072;

/// What a measurement was made on.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    pub(crate) cores: usize,
    pub(crate) cpu: String,
    pub(crate) kernel: String,
    pub(crate) memory_mb: u64,
    pub(crate) commit: String,
}

impl Machine {
    pub(crate) async fn read() -> Self {
        let first = |path: &str, name: &str| {
            let text = fs::read_to_string(path).unwrap_or_default();
            let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
            line.split_once(':').map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
        };
        let memory = first("/proc/meminfo", "MemTotal");
        let memory_kb: u64 = memory.split(' ').next().and_then(|kb| kb.parse().ok()).unwrap_or(0);
        Self {
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            cpu: first("/proc/cpuinfo", "model name"),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
            memory_mb: memory_kb / 1024,
            commit: commit().await,
        }
    }

    pub(crate) fn facts(&self) -> BTreeMap<&'static str, Value> {
        BTreeMap::from([
            ("at", json!(SystemClock.now().to_rfc3339())),
            ("commit", json!(self.commit)),
            ("cores", json!(self.cores)),
            ("cpu", json!(self.cpu)),
            ("kernel", json!(self.kernel)),
            ("memory_mb", json!(self.memory_mb)),
        ])
    }

    pub(crate) fn line(&self) -> String {
        format!(
            "{} cores of {}, {} GiB, Linux {}, commit {}",
            self.cores,
            self.cpu,
            self.memory_mb.div_ceil(1024),
            self.kernel,
            self.commit
        )
    }
}

/// The commit that is measured, marked where the sources differ from it.
async fn commit() -> String {
    let git = |arguments: &[&str]| {
        let mut command = Command::new("git");
        command.args(arguments).current_dir(root());
        command
    };
    let Ok(commit) = output_of(&mut git(&["rev-parse", "--short", "HEAD"])).await else { return "unknown".to_owned() };
    let changed = output_of(&mut git(&["status", "--porcelain", "--", "crates", "migrations", "Cargo.lock"])).await;
    let mark = if changed.is_ok_and(|changed| changed.trim().is_empty()) { "" } else { "+changes" };
    format!("{}{mark}", commit.trim())
}

/// Raises our own limit of open files, which what we start inherits.
pub(crate) async fn raise_open_files() {
    let limit = format!("--nofile={OPEN_FILES}:{OPEN_FILES}");
    let pid = std::process::id().to_string();
    if !system::succeeds("prlimit", &["--pid", &pid, &limit]).await {
        say(&format!("the limit of open files cannot be raised above {} here", open_files()));
    }
}

/// How many files we, and what we start, may open.
pub(crate) fn open_files() -> usize {
    let text = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap_or_default();
    line.split_whitespace().next().and_then(|limit| limit.parse().ok()).unwrap_or(0)
}

/// Now, in nanoseconds on the clock that all processes of this machine share.
pub(crate) fn now_nanos() -> i64 {
    // Only a year past 2262 has none.
    SystemClock.now().timestamp_nanos_opt().unwrap_or(i64::MAX)
}

/// The CPU time of a process so far, in seconds, without its children.
pub(crate) fn cpu_s(pid: u32) -> f64 {
    let fields = stat(pid);
    (ticks(&fields, 11) + ticks(&fields, 12)) / TICKS_PER_SECOND
}

/// The same with its children, those that ended included.
pub(crate) fn tree_cpu_s(pid: u32) -> f64 {
    let fields = stat(pid);
    let own: f64 = (11..=14).map(|field| ticks(&fields, field)).sum::<f64>() / TICKS_PER_SECOND;
    own + children(pid).into_iter().map(cpu_s).sum::<f64>()
}

/// The CPU time that the whole machine has spent on anything so far, in seconds.
pub(crate) fn machine_cpu_s() -> f64 {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields: Vec<f64> =
        text.lines().next().unwrap_or_default().split_whitespace().skip(1).flat_map(str::parse).collect();
    // user, nice, system, then idle and iowait, which are no work, then irq and softirq; steal is others' work.
    [0, 1, 2, 5, 6].iter().filter_map(|field| fields.get(*field)).sum::<f64>() / TICKS_PER_SECOND
}

/// Its resident memory in bytes.
pub(crate) fn resident_bytes(pid: u32) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    line.split_whitespace().next().and_then(|kb| kb.parse::<f64>().ok()).unwrap_or(f64::NAN) * 1024.0
}

/// The parent of a process.
pub(crate) fn parent(pid: u32) -> Option<u32> {
    stat(pid).get(1)?.parse().ok()
}

/// What stands after the name in /proc/PID/stat: the state, the parent, …
fn stat(pid: u32) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let rest = text.rsplit(')').next().unwrap_or_default();
    rest.split_whitespace().map(str::to_owned).collect()
}

fn ticks(fields: &[String], field: usize) -> f64 {
    fields.get(field).and_then(|ticks| ticks.parse().ok()).unwrap_or(0.0)
}

fn children(of: u32) -> Vec<u32> {
    let entries = fs::read_dir(Path::new("/proc")).into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| parent(*pid) == Some(of)).collect()
}
