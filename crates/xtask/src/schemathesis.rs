//! `cargo xtask schemathesis`: fuzzes the built daemon by its own OpenAPI document. Owns the checks that are asked for
//! and the tool's version (`.ci/requirements-schemathesis.txt`).

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::bail;
use serde_json::{Value, json};
use tokio::{
    process::Command,
    time::{Instant, sleep},
};

use crate::{
    daemon::{self, Daemon},
    system::{self, exit_code, must, root, say, succeeds, target_dir},
};

/// What every answer is held to.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,\
                      response_headers_conformance,response_schema_conformance,unsupported_method";

/// Stages that end in each way: a run of it succeeds, waits for a person, or fails, by its input.
const PIPELINE: &str = r#"
name: fuzz
input: { type: object, required: [end], properties: { end: { enum: [well, held, badly] } } }
defaults: { model: sim/quick, retry: { max_attempts: 1 } }
stages:
  - { id: one, prompt: 'one {{ input.end }}' }
  - id: two
    needs: [one]
    prompt: 'two {{ stages.one.output }}'
    gate: { checks: [ { expression: "input.end != 'held'" } ], on_fail: hold }
  - id: three
    needs: [two]
    prompt: 'three {{ stages.two.output }}'
    gate: { checks: [ { expression: "input.end != 'badly'" } ], on_fail: fail }
"#;
/// Takes any input, so that submissions and plans get through.
const LOOSE: &str = "{ name: loose, defaults: { model: sim/quick }, stages: [ { id: one, prompt: 'one' } ] }";
/// How long the runs may take until they rest.
const SEED_LIMIT: Duration = Duration::from_secs(20);

/// Fuzz the built daemon by its own OpenAPI document.
#[derive(Debug, clap::Args)]
pub(crate) struct Schemathesis {
    /// Test cases for each operation, at most
    #[arg(long, default_value_t = 30)]
    max_examples: u32,
    /// The seed; the same one gives the same cases
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A binary to test, instead of building one
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// What follows `--` goes to `schemathesis run`
    #[arg(last = true)]
    arguments: Vec<String>,
}

impl Schemathesis {
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        // Fails only where one is installed, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let tool = installed().await?;
        let binary = match self.binary {
            Some(binary) => std::path::absolute(binary)?,
            None => daemon::build("dev").await?,
        };
        let data = tempfile::tempdir()?;
        let environment = [("STAGEGATE_LLM__PROVIDERS__SIM__KIND", "sim".to_owned())];
        let latency = [("STAGEGATE_LLM__PROVIDERS__SIM__SIM__LATENCY", "1ms".to_owned())];
        let daemon = Daemon::start(&binary, data.path(), &[environment, latency].concat()).await?;
        let config = data.path().join("schemathesis.toml");
        seed(daemon.url(), &config).await?;
        let mut run = Command::new(tool);
        run.arg("--config-file").arg(config).arg("run").arg(format!("{}/openapi.json", daemon.url()));
        run.args(["--checks", CHECKS, "--continue-on-failure", "--generation-database", "none"]);
        run.args(["--max-examples", &self.max_examples.to_string(), "--seed", &self.seed.to_string()]);
        // An event stream of a run that waits for a person stays open: it is read for this long.
        run.args(["--request-timeout", "20", "--warnings", "off"]).args(&self.arguments);
        run.current_dir(data.path()).env("NO_PROXY", "127.0.0.1").kill_on_drop(true);
        let code = exit_code(&mut run).await?;
        if code != 0 {
            eprintln!("the daemon's last lines:\n{}", daemon.log_tail());
        }
        daemon.stop().await?;
        Ok(system::code(code))
    }
}

/// Makes a pipeline and runs in every state, and has most requests name them: what is fuzzed with random ids alone hardly
/// ever gets past "not found".
async fn seed(url: &str, config: &Path) -> anyhow::Result<()> {
    let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(10)).build()?;
    for pipeline in [PIPELINE, LOOSE] {
        let register = client.post(format!("{url}/v1/pipelines")).header("content-type", "application/yaml");
        let answer = register.body(pipeline).send().await?;
        if !answer.status().is_success() {
            bail!("the pipeline was refused: {}", answer.text().await?);
        }
    }
    let mut runs = Vec::new();
    for end in ["well", "held", "held", "held", "held", "badly", "badly"] {
        let body = json!({ "pipeline": "fuzz", "input": { "end": end } });
        let run: Value = client.post(format!("{url}/v1/runs")).json(&body).send().await?.json().await?;
        match run.get("id").and_then(Value::as_str) {
            Some(id) => runs.push(id.to_owned()),
            None => bail!("the run was refused: {run}"),
        }
    }
    let limit = Instant::now() + SEED_LIMIT;
    for id in &runs {
        loop {
            let run: Value = client.get(format!("{url}/v1/runs/{id}")).send().await?.json().await?;
            match run.get("state").and_then(Value::as_str) {
                Some("queued" | "running") if Instant::now() < limit => sleep(Duration::from_millis(50)).await,
                Some("succeeded" | "failed" | "waiting") => break,
                _ => bail!("a run does not come to rest: {run}"),
            }
        }
    }
    let text = format!(
        "[dictionaries]\n\
         run = {{ values = {runs:?} }}\n\
         pipeline = {{ values = [\"fuzz\", \"loose\"] }}\n\
         version = {{ values = [1] }}\n\
         stage = {{ values = [\"one\", \"two\", \"two\", \"three\"] }}\n\
         [parameters]\n\
         \"path.id\" = {{ dictionary = \"run\", probability = 0.8 }}\n\
         \"path.name\" = {{ dictionary = \"pipeline\", probability = 0.8 }}\n\
         \"path.version\" = {{ dictionary = \"version\", probability = 0.8 }}\n\
         \"path.stage\" = {{ dictionary = \"stage\", probability = 0.8 }}\n\
         \"query.pipeline\" = {{ dictionary = \"pipeline\", probability = 0.5 }}\n\
         \"body.pipeline\" = {{ dictionary = \"pipeline\", probability = 0.8 }}\n"
    );
    std::fs::write(config, text)?;
    Ok(())
}

/// The tool in an environment of its own under `target/`; made again when the version that is asked for changes.
async fn installed() -> anyhow::Result<PathBuf> {
    let wanted = root().join(".ci/requirements-schemathesis.txt");
    let folder = target_dir().join("tools/schemathesis");
    let (tool, stamp) = (folder.join("bin/schemathesis"), folder.join("requirements.txt"));
    let asked = std::fs::read_to_string(&wanted)?;
    if tool.is_file() && std::fs::read_to_string(&stamp).is_ok_and(|had| had == asked) {
        return Ok(tool);
    }
    if !succeeds("python3", &["-c", "import venv, ensurepip"]).await {
        bail!("schemathesis needs python3 with venv (Debian: python3-venv)");
    }
    say("installing schemathesis (a quarter of a minute)");
    must(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder), "python3 -m venv").await?;
    let mut install = Command::new(folder.join("bin/pip"));
    install.args(["install", "--quiet", "--disable-pip-version-check", "--requirement"]).arg(&wanted);
    must(&mut install, "pip install").await?;
    std::fs::write(stamp, asked)?;
    Ok(tool)
}
