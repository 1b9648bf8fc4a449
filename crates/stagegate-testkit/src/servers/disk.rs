//! A small disk that can be filled: a tmpfs of its own, where the machine allows it. Unmounted with us, even when we are
//! killed.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, bail};

/// Mounts, says so, and waits on a pipe from us.
const SCRIPT: &str = r#"
mount -t tmpfs -o "size=$2,mode=0777" stagegate-small "$1" || exit 1
echo mounted
read -r _
umount -l "$1"
rmdir "$1"
"#;
/// Written at once when the disk is filled, in bytes.
const CHUNK_BYTES: usize = 1 << 20;

/// A tmpfs.
#[derive(Debug)]
pub struct SmallDisk {
    folder: PathBuf,
    data: PathBuf,
    shell: Child,
}

impl SmallDisk {
    /// Mounts one; the error says why that is not possible here. `user` is whose its folder is to be.
    pub fn mount(size_bytes: u64, user: Option<(u32, u32)>) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("stagegate-disk-").tempdir()?.keep();
        let mut command = Command::new("sh");
        command.arg("-c").arg(SCRIPT).arg("disk").arg(&folder).arg(size_bytes.to_string());
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut shell = command.spawn().context("cannot start `sh`")?;
        let mut line = String::new();
        if let Some(stdout) = shell.stdout.take() {
            BufReader::new(stdout).read_line(&mut line)?;
        }
        if line.trim() != "mounted" {
            let _ = shell.wait();
            let _ = fs::remove_dir(&folder);
            bail!("no tmpfs can be mounted here (needs root, and a machine that allows it)");
        }
        let disk = Self { data: folder.join("data"), folder, shell };
        fs::create_dir(&disk.data)?;
        if let Some((uid, gid)) = user {
            std::os::unix::fs::chown(&disk.data, Some(uid), Some(gid))?;
        }
        Ok(disk)
    }

    /// An empty folder on it.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// Fills it to the last byte.
    pub fn fill(&self) -> anyhow::Result<()> {
        let mut file = fs::File::create(self.folder.join("filler"))?;
        let chunk = vec![0_u8; CHUNK_BYTES];
        loop {
            match file.write(&chunk) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::StorageFull => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Gives the room back.
    pub fn free(&self) -> anyhow::Result<()> {
        match fs::remove_file(self.folder.join("filler")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        let _ = self.shell.wait();
    }
}
