//! `cargo xtask coverage`: owns how the workspace is instrumented, and what counts. rustc's own instrumentation, read by
//! the LLVM tools of the same version; only our crates are instrumented, so that dependencies are not built again.
//!
//! Not counted: tests (files under `tests/`, `tests.rs`, and what follows `#[cfg(test)] mod …` in a file), the test
//! kit and this crate.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{Command as Process, ExitCode},
    sync::OnceLock,
};

use anyhow::{Context as _, bail};
use comfy_table::{CellAlignment, Table, presets};
use tokio::process::Command;

use crate::{
    system::{self, cargo, exit_code, output_of, root, say, target_dir},
    test::{Servers, has_nextest},
};

/// Set while this binary stands in for rustc. Not a `STAGEGATE_…` name: the daemon refuses those that it does not know.
const WRAPPER_ENV: &str = "XTASK_COVERAGE_WRAPPER";
/// Crates that are not the product.
const NOT_COUNTED: [&str; 2] = ["stagegate-testkit", "xtask"];

/// Run every test and print the line coverage of the workspace.
#[derive(Debug, clap::Args)]
pub(crate) struct Coverage {
    /// Fail below this percentage of lines
    #[arg(long, value_name = "PERCENT")]
    fail_under: Option<f64>,
    /// Only this crate's tests; may be given several times
    #[arg(long, short, value_name = "CRATE")]
    package: Vec<String>,
    /// Also list each file that has lines which no test reaches, the worst first
    #[arg(long)]
    files: bool,
    /// Read what the last run left, without running the tests again
    #[arg(long)]
    no_run: bool,
    /// What follows `--` goes to the test runner
    #[arg(last = true)]
    arguments: Vec<String>,
}

impl Coverage {
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        let tools = Tools::find().await?;
        let folder = target_dir().join("coverage");
        let mut code = 0;
        if !self.no_run {
            if folder.is_dir() {
                std::fs::remove_dir_all(&folder)?;
            }
            std::fs::create_dir_all(&folder)?;
            code = self.tests(&folder).await?;
        }
        say("reading what was covered");
        let lcov = tools.lcov(&folder, &self.binaries(&folder).await?).await?;
        std::fs::write(folder.join("lcov.info"), &lcov)?;
        let files = count(&lcov, &root());
        let total = print(&files, self.files);
        println!("written for editors and services: {}", folder.join("lcov.info").display());
        if code != 0 {
            eprintln!("xtask: tests failed; what they covered is above");
        } else if let Some(limit) = self.fail_under.filter(|limit| total < *limit) {
            eprintln!("xtask: {total:.1} % of lines is under {limit} %");
            code = 1;
        }
        Ok(system::code(code))
    }

    async fn tests(&self, folder: &Path) -> anyhow::Result<u8> {
        let servers = Servers::ready().await?;
        let mut run = cargo();
        instrument(&mut run, folder)?;
        if has_nextest().await {
            run.args(["nextest", "run", "--no-fail-fast"]);
        } else {
            run.args(["test", "--all-targets", "--no-fail-fast"]);
        }
        self.select(&mut run);
        run.args(&self.arguments);
        servers.name_to(&mut run);
        exit_code(&mut run).await
    }

    fn select(&self, command: &mut Command) {
        if self.package.is_empty() {
            command.arg("--workspace");
        }
        for package in &self.package {
            command.args(["--package", package]);
        }
    }

    /// The instrumented programs: tests, and the binaries that tests start.
    async fn binaries(&self, folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
        let mut build = cargo();
        instrument(&mut build, folder)?;
        build.args(["test", "--all-targets", "--no-run", "--quiet", "--message-format=json"]);
        self.select(&mut build);
        build.stderr(std::process::Stdio::inherit());
        let messages = output_of(&mut build).await?;
        let programs = messages.lines().filter_map(|line| {
            let message: serde_json::Value = serde_json::from_str(line).ok()?;
            Some(PathBuf::from(message.get("executable")?.as_str()?))
        });
        Ok(programs.collect())
    }
}

/// Has Cargo call us in the place of rustc for the workspace's own crates, and programs write where we look.
fn instrument(command: &mut Command, folder: &Path) -> anyhow::Result<()> {
    static COPIED: OnceLock<()> = OnceLock::new();
    // A copy, for the build may replace the binary that is running. Always at the same place: it is part of what Cargo
    // takes a build to be.
    let wrapper = target_dir().join("tools").join("rustc-with-coverage");
    if COPIED.get().is_none() {
        std::fs::create_dir_all(target_dir().join("tools"))?;
        std::fs::copy(std::env::current_exe()?, &wrapper)?;
        COPIED.get_or_init(|| ());
    }
    command.env("RUSTC_WORKSPACE_WRAPPER", wrapper);
    command.env(WRAPPER_ENV, "1");
    // One file a process and binary: `%p` its id, `%m` the binary's signature.
    command.env("LLVM_PROFILE_FILE", folder.join("%p-%m.profraw"));
    Ok(())
}

/// Calls rustc with instrumentation, where Cargo called us for that; does not return then, but for the exit code.
pub(crate) fn wrap_rustc() -> Option<ExitCode> {
    std::env::var_os(WRAPPER_ENV)?;
    let mut arguments = std::env::args_os().skip(1);
    let rustc = arguments.next().filter(|first| Path::new(first).file_stem().is_some_and(|stem| stem == "rustc"))?;
    let arguments: Vec<_> = arguments.collect();
    let mut command = Process::new(rustc);
    // Build scripts and the test kit need not be measured, and this binary is running.
    let counted = arguments.windows(2).any(|pair| {
        let name = pair[1].to_string_lossy().replace('_', "-");
        pair[0] == "--crate-name" && name != "build-script-build" && !NOT_COUNTED.contains(&name.as_str())
    });
    if counted {
        command.args(["-C", "instrument-coverage"]);
    }
    let status = command.args(arguments).status();
    let code = status.ok().and_then(|status| status.code()).and_then(|code| u8::try_from(code).ok());
    Some(ExitCode::from(code.unwrap_or(1)))
}

/// The LLVM tools that read what this rustc writes.
struct Tools {
    profdata: PathBuf,
    cov: PathBuf,
}

impl Tools {
    async fn find() -> anyhow::Result<Self> {
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let version = output_of(Command::new(&rustc).arg("-vV")).await?;
        let field = |name: &str| version.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let host = field("host:").context("rustc names no host")?;
        let major = field("LLVM version:").and_then(|llvm| llvm.split('.').next()).context("rustc names no LLVM")?;
        let sysroot = output_of(Command::new(&rustc).args(["--print", "sysroot"])).await?;
        let folders = [
            Path::new(sysroot.trim()).join("lib/rustlib").join(host).join("bin"),
            PathBuf::from(format!("/usr/lib/llvm-{major}/bin")),
        ];
        if let Some(tools) = Self::among(&folders) {
            return Ok(tools);
        }
        let package = format!("llvm-{major}");
        let why = format!("coverage needs the tools of LLVM {major} (or `rustup component add llvm-tools`)");
        system::install(&[&package], &why).await?;
        Self::among(&folders).with_context(|| format!("{package} has no llvm-profdata where it was looked for"))
    }

    fn among(folders: &[PathBuf]) -> Option<Self> {
        let found = folders.iter().find(|folder| folder.join("llvm-profdata").is_file())?;
        Some(Self { profdata: found.join("llvm-profdata"), cov: found.join("llvm-cov") })
    }

    /// What was covered, line by line, in the lcov format.
    async fn lcov(&self, folder: &Path, binaries: &[PathBuf]) -> anyhow::Result<String> {
        let raw: Vec<PathBuf> = std::fs::read_dir(folder)?
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "profraw"))
            .collect();
        if raw.is_empty() || binaries.is_empty() {
            bail!("nothing was measured: {} raw files, {} binaries", raw.len(), binaries.len());
        }
        // Thousands of files are too many for a command line.
        let list = folder.join("raw-files.txt");
        let lines: Vec<_> = raw.iter().map(|path| path.to_string_lossy().into_owned()).collect();
        std::fs::write(&list, lines.join("\n"))?;
        let merged = folder.join("all.profdata");
        // A process that was killed leaves a torn file: tests do that on purpose, and lose that process's part.
        let mut merge = Command::new(&self.profdata);
        merge.args(["merge", "--sparse", "--failure-mode=all", "-o"]).arg(&merged).arg("-f").arg(&list);
        output_of(&mut merge).await?;
        let mut export = Command::new(&self.cov);
        export.args(["export", "--format=lcov", "--skip-functions"]).arg("--instr-profile").arg(&merged);
        export.args(["--ignore-filename-regex", r"/\.cargo/|/rustc/|/rustlib/"]);
        for (index, binary) in binaries.iter().enumerate() {
            if index > 0 {
                export.arg("--object");
            }
            export.arg(binary);
        }
        output_of(&mut export).await
    }
}

/// Lines of a file: those that could run, and those that did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Lines {
    all: usize,
    covered: usize,
}

impl Lines {
    #[expect(clippy::cast_precision_loss, reason = "no file has 2^52 lines")]
    fn percent(self) -> f64 {
        if self.all == 0 { 100.0 } else { 100.0 * self.covered as f64 / self.all as f64 }
    }
}

/// Counts the product's lines by file, from the lcov text.
fn count(lcov: &str, root: &Path) -> BTreeMap<PathBuf, Lines> {
    let mut files = BTreeMap::new();
    let mut current: Option<(PathBuf, usize, BTreeMap<usize, u64>)> = None;
    for line in lcov.lines() {
        if let Some(path) = line.strip_prefix("SF:") {
            let path = Path::new(path);
            let inside = path.strip_prefix(root.join("crates")).ok().filter(|path| is_counted(path));
            current = inside.map(|inside| {
                let source = std::fs::read_to_string(path).unwrap_or_default();
                (inside.to_path_buf(), first_test_line(&source), BTreeMap::new())
            });
        } else if let (Some((_, end, lines)), Some(data)) = (&mut current, line.strip_prefix("DA:")) {
            let mut parts = data.split(',');
            let number = parts.next().and_then(|part| part.parse::<usize>().ok());
            let times = parts.next().and_then(|part| part.parse::<u64>().ok());
            if let (Some(number), Some(times)) = (number, times)
                && number < *end
            {
                *lines.entry(number).or_insert(0) += times;
            }
        } else if line == "end_of_record"
            && let Some((path, _, lines)) = current.take()
        {
            let covered = lines.values().filter(|times| **times > 0).count();
            files.insert(path, Lines { all: lines.len(), covered });
        }
    }
    files
}

/// Whether a file under `crates/` is the product's.
fn is_counted(path: &Path) -> bool {
    let mut parts = path.iter().map(|part| part.to_string_lossy());
    let name = parts.next().unwrap_or_default();
    let rest: Vec<_> = parts.collect();
    !NOT_COUNTED.contains(&&*name)
        && !rest.iter().any(|part| part == "tests" || part == "tests.rs" || part == "build.rs")
}

/// The line at which a file's own tests begin, by our habit of keeping them last.
fn first_test_line(source: &str) -> usize {
    let lines: Vec<&str> = source.lines().collect();
    let test_module = |pair: &[&str]| {
        let module = pair[1].trim_start_matches("pub(crate) ");
        pair[0] == "#[cfg(test)]" && module.starts_with("mod ") && module.ends_with('{')
    };
    lines.windows(2).position(test_module).map_or(usize::MAX, |index| index + 1)
}

/// Prints the table; the answer is the total in per cent.
fn print(files: &BTreeMap<PathBuf, Lines>, each_file: bool) -> f64 {
    let mut crates: BTreeMap<String, Lines> = BTreeMap::new();
    let mut total = Lines::default();
    for (path, lines) in files {
        let name = path.iter().next().unwrap_or_default().to_string_lossy().into_owned();
        for sum in [crates.entry(name).or_default(), &mut total] {
            sum.all += lines.all;
            sum.covered += lines.covered;
        }
    }
    if each_file {
        let mut missing: Vec<_> = files.iter().filter(|(_, lines)| lines.covered < lines.all).collect();
        missing.sort_by_key(|(_, lines)| std::cmp::Reverse(lines.all - lines.covered));
        println!("{}", table(missing.into_iter().map(|(path, lines)| (path.display().to_string(), *lines))));
    }
    let rows = crates.into_iter().chain([("total".to_owned(), total)]);
    println!("{}", table(rows));
    total.percent()
}

fn table(rows: impl Iterator<Item = (String, Lines)>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(["", "lines", "covered", "%"]);
    for (name, lines) in rows {
        table.add_row([name, lines.all.to_string(), lines.covered.to_string(), format!("{:.1}", lines.percent())]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_products_lines_count() {
        let root = tempfile::tempdir().expect("a folder");
        let source = "fn a() {\n}\nfn b() {}\n#[cfg(test)]\nmod tests {\n  fn t() {}\n}\n";
        let file = root.path().join("crates/stagegate-core/src/lib.rs");
        std::fs::create_dir_all(file.parent().expect("a folder")).expect("made");
        std::fs::write(&file, source).expect("written");
        let text = |path: &str| {
            format!("SF:{}\nDA:1,4\nDA:2,4\nDA:3,0\nDA:6,1\nend_of_record\n", root.path().join(path).display())
        };
        let lcov: String = [
            "crates/stagegate-core/src/lib.rs",
            "crates/stagegate-core/tests/it/main.rs",
            "crates/stagegate-testkit/src/lib.rs",
            "crates/xtask/src/main.rs",
            "elsewhere/lib.rs",
        ]
        .map(text)
        .concat();
        let files = count(&lcov, root.path());
        assert_eq!(files.len(), 1, "{files:?}");
        let lines = files[Path::new("stagegate-core/src/lib.rs")];
        assert_eq!(lines, Lines { all: 3, covered: 2 });
        assert!((lines.percent() - 66.7).abs() < 0.1);
    }

    #[test]
    fn a_module_of_tests_in_a_file_of_its_own_ends_nothing() {
        assert_eq!(first_test_line("#[cfg(test)]\nmod tests;\nfn a() {}\n"), usize::MAX);
        assert_eq!(first_test_line("fn a() {}\n#[cfg(test)]\nmod tests {\n}\n"), 2);
    }
}
