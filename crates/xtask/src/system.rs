//! The machine: where things lie, how a program is run, and how a missing system package is installed.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, bail};
use tokio::process::Command;

/// The workspace's folder.
pub(crate) fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_path_buf()
}

/// Where Cargo builds, and where everything that we make goes.
pub(crate) fn target_dir() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => std::env::current_dir().unwrap_or_else(|_| root()).join(folder),
        None => root().join("target"),
    }
}

/// Cargo, run in the workspace.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()).kill_on_drop(true);
    command
}

/// Says what is done, so that a long silence has a reason.
pub(crate) fn say(what: &str) {
    eprintln!("==> {what}");
}

/// Runs it with our own streams; its exit code is the answer. A signal counts as 1.
pub(crate) async fn exit_code(command: &mut Command) -> anyhow::Result<u8> {
    let name = command.as_std().get_program().to_string_lossy().into_owned();
    let status = command.status().await.with_context(|| format!("cannot run {name}"))?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

/// Runs it with our own streams; fails where it does.
pub(crate) async fn must(command: &mut Command, what: &str) -> anyhow::Result<()> {
    match exit_code(command).await? {
        0 => Ok(()),
        code => bail!("{what} failed (exit code {code})"),
    }
}

/// Its standard output; fails where it does.
pub(crate) async fn output_of(command: &mut Command) -> anyhow::Result<String> {
    let name = command.as_std().get_program().to_string_lossy().into_owned();
    let output = command.output().await.with_context(|| format!("cannot run {name}"))?;
    if !output.status.success() {
        bail!("{name} failed: {}", String::from_utf8_lossy(&output.stderr).trim_end());
    }
    String::from_utf8(output.stdout).with_context(|| format!("{name} wrote no UTF-8"))
}

/// Whether it runs and succeeds; nothing is shown.
pub(crate) async fn succeeds(program: &str, arguments: &[&str]) -> bool {
    let output = Command::new(program).args(arguments).stdin(std::process::Stdio::null()).output().await;
    output.is_ok_and(|output| output.status.success())
}

/// Installs Debian packages, as root or where `sudo` asks for no password. `why` is for the message where it can't.
pub(crate) async fn install(packages: &[&str], why: &str) -> anyhow::Result<()> {
    let list = packages.join(" ");
    let mend = format!("{why}; install {list} (or what your system calls it)");
    if !succeeds("apt-get", &["--version"]).await {
        bail!("{mend}: there is no apt-get here to do it");
    }
    let root = output_of(Command::new("id").arg("-u")).await.is_ok_and(|id| id.trim() == "0");
    if !root && !succeeds("sudo", &["-n", "true"]).await {
        bail!("{mend}: neither root nor sudo without a password");
    }
    say(&format!("{why}: installing {list} (takes a minute)"));
    let apt = |arguments: &[&str]| {
        let mut command = if root { Command::new("apt-get") } else { Command::new("sudo") };
        if !root {
            command.args(["-n", "env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]);
        }
        command.env("DEBIAN_FRONTEND", "noninteractive").args(arguments).stdin(std::process::Stdio::null());
        command.kill_on_drop(true);
        command
    };
    // Old lists are tried first where the update fails: a mirror may be away.
    let _ = exit_code(&mut apt(&["update", "-qq"])).await?;
    let mut arguments = vec!["install", "-y", "-qq", "--no-install-recommends"];
    arguments.extend(packages);
    must(&mut apt(&arguments), &format!("apt-get install {list}")).await
}

/// The exit code for `main`.
pub(crate) fn code(code: u8) -> ExitCode {
    ExitCode::from(code)
}
