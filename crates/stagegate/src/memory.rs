//! How much memory this process may have: owns reading the limits that the kernel holds it to. Decides nothing.

use std::{fs, path::Path};

/// The part of the least limit that may be held by what grows with what callers send.
const PART: u64 = 2;

/// The least of the limits on this process's memory, in bytes, and its name; None where none can be read.
pub(crate) fn limit() -> Option<(u64, &'static str)> {
    limit_below(Path::new("/"))
}

/// What may be held of such a limit.
pub(crate) fn budget_of(limit: u64) -> u64 {
    limit / PART
}

fn limit_below(root: &Path) -> Option<(u64, &'static str)> {
    let read = |path: &str| fs::read_to_string(root.join(path)).ok();
    let limits = read("proc/self/limits").unwrap_or_default();
    let found = [
        (read("proc/meminfo").and_then(|text| machine(&text)), "the machine's memory"),
        (rlimit(&limits, "Max address space"), "the limit of address space (ulimit -v)"),
        (rlimit(&limits, "Max data size"), "the limit of data (ulimit -d)"),
        (cgroup(&read, "0::", "sys/fs/cgroup", "memory.max"), "the container's memory (cgroup v2)"),
        (
            cgroup(&read, "memory:", "sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            "the container's memory (cgroup v1)",
        ),
    ];
    found.into_iter().filter_map(|(bytes, name)| Some((bytes?, name))).min_by_key(|(bytes, _)| *bytes)
}

/// `MemTotal` of /proc/meminfo.
fn machine(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// The soft limit of a line of /proc/self/limits; None where it is unlimited.
fn rlimit(limits: &str, name: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// The least limit from this process's group up to the root; in a container its own group often is the root.
fn cgroup(read: &impl Fn(&str) -> Option<String>, of: &str, mount: &str, file: &str) -> Option<u64> {
    let groups = read("proc/self/cgroup")?;
    let group = groups.lines().find_map(|line| Some(line.split_once(of)?.1.trim_start_matches('/')))?;
    let mut folder = Some(Path::new(group));
    let mut least: Option<u64> = None;
    while let Some(here) = folder {
        let path = Path::new(mount).join(here).join(file);
        let limit = path.to_str().and_then(read).and_then(|text| text.trim().parse::<u64>().ok());
        least = least.into_iter().chain(limit).min();
        folder = here.parent();
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine_with(files: &[(&str, &str)]) -> Option<(u64, &'static str)> {
        let root = tempfile::tempdir().expect("a folder");
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            fs::write(path, text).expect("written");
        }
        limit_below(root.path())
    }

    const MEMORY: (&str, &str) = ("proc/meminfo", "MemTotal:        8000 kB\nMemFree: 1 kB\n");

    #[test]
    fn the_least_limit_counts() {
        assert_eq!(machine_with(&[]), None);
        assert_eq!(machine_with(&[MEMORY]).expect("found").0, 8_192_000);
        let limits = "Limit                     Soft Limit           Hard Limit           Units     \n\
                      Max data size             7000000              unlimited            bytes     \n\
                      Max address space         unlimited            unlimited            bytes     \n";
        let found = machine_with(&[MEMORY, ("proc/self/limits", limits)]).expect("found");
        assert_eq!(found, (7_000_000, "the limit of data (ulimit -d)"));
    }

    #[test]
    fn a_containers_limit_is_found_in_either_version_of_cgroups_and_above_its_own_group() {
        let second = [
            MEMORY,
            ("proc/self/cgroup", "0::/pod/app\n"),
            ("sys/fs/cgroup/pod/app/memory.max", "max\n"),
            ("sys/fs/cgroup/pod/memory.max", "3000000\n"),
        ];
        assert_eq!(machine_with(&second).expect("found").0, 3_000_000);
        let first = [
            MEMORY,
            ("proc/self/cgroup", "5:cpu:/x\n4:memory:/docker/abc\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "2000000\n"),
        ];
        assert_eq!(machine_with(&first).expect("found").0, 2_000_000);
        let unlimited = [MEMORY, ("proc/self/cgroup", "0::/\n"), ("sys/fs/cgroup/memory.max", "max\n")];
        assert_eq!(machine_with(&unlimited).expect("found").1, "the machine's memory");
    }
}
