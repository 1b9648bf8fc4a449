//! The document, the generated clients and the followers of streams. Each part starts a daemon of its own; what a client
//! must show is written in its own language, in `clients/`.

use std::path::Path;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};
use tokio::process::Command;

use super::Bench;

const CLIENT_PY: &str = include_str!("clients/client.py");
const CLIENT_TS: &str = include_str!("clients/client.ts");
const NODE_D_TS: &str = include_str!("clients/node.d.ts");
const TSCONFIG: &str = include_str!("clients/tsconfig.json");
const STREAM_PY: &str = include_str!("clients/stream.py");
const STREAM_MJS: &str = include_str!("clients/stream.mjs");

/// A stage that is held until somebody approves it.
const HELD: &str = r#"{ "name": "held", "defaults": { "model": "sim/quick" }, "stages": [
    { "id": "draft", "prompt": "Say something", "gate": { "checks": [ { "matches": "^Never" } ], "on_fail": "hold" } } ] }"#;

/// Runs it; its output is the error where it fails, or where it says one of these words.
async fn quiet(command: &mut Command, words: &[&str]) -> anyhow::Result<String> {
    let name = command.as_std().get_program().to_string_lossy().into_owned();
    let output = command.output().await.with_context(|| format!("cannot run {name}"))?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    let lower = text.to_lowercase();
    if !output.status.success() || words.iter().any(|word| lower.contains(word)) {
        bail!("{} of {:?}:\n{text}", output.status, command.as_std());
    }
    Ok(text)
}

/// The document of an open daemon and of one that asks for keys.
async fn documents(bench: &Bench, folder: &Path) -> anyhow::Result<Vec<std::path::PathBuf>> {
    let mut files = Vec::new();
    for auth in ["open", "keys"] {
        let (daemon, _data) = bench.daemon(&[("STAGEGATE_HTTP__AUTH", auth.to_owned())]).await?;
        let file = folder.join(format!("openapi-{auth}.json"));
        std::fs::write(&file, get(&format!("{}/openapi.json", daemon.url())).await?)?;
        files.push(file);
        daemon.stop().await?;
    }
    Ok(files)
}

async fn get(url: &str) -> anyhow::Result<String> {
    let client = reqwest::Client::builder().no_proxy().build()?;
    Ok(client.get(url).send().await?.error_for_status()?.text().await?)
}

pub(super) async fn document(bench: &Bench) -> anyhow::Result<()> {
    let folder = bench.folder("document")?;
    let ruleset = folder.join("spectral.yaml");
    std::fs::write(&ruleset, "extends: [\"spectral:oas\"]\n")?;
    for file in documents(bench, &folder).await? {
        let mut redocly = bench.tools.npm("redocly");
        redocly.arg("lint").arg(&file).arg("--format=stylish").env("REDOCLY_SUPPRESS_UPDATE_NOTICE", "true");
        quiet(redocly.env("REDOCLY_TELEMETRY", "off"), &["warning", "you have"]).await?;
        let mut spectral = bench.tools.npm("spectral");
        spectral.arg("lint").arg(&file).arg("--ruleset").arg(&ruleset).args(["--fail-severity", "hint"]);
        quiet(&mut spectral, &[]).await?;
    }
    Ok(())
}

pub(super) async fn python(bench: &Bench) -> anyhow::Result<()> {
    let folder = bench.folder("python")?;
    let (daemon, _data) = bench.daemon(&[]).await?;
    let document = folder.join("openapi.json");
    std::fs::write(&document, get(&format!("{}/openapi.json", daemon.url())).await?)?;
    let mut generate = bench.tools.python("openapi-python-client");
    generate.arg("generate").arg("--path").arg(&document).args(["--meta", "none", "--overwrite", "--output-path"]);
    quiet(generate.arg(folder.join("stagegate_client")), &["warning", "skipping", "unable", "error"]).await?;
    let script = folder.join("client.py");
    std::fs::write(&script, CLIENT_PY)?;
    let said = quiet(bench.tools.python("python").arg(&script).arg(&folder).arg(daemon.url()), &[]).await?;
    print!("    {said}");
    daemon.stop().await
}

pub(super) async fn typescript(bench: &Bench) -> anyhow::Result<()> {
    let folder = bench.folder("typescript")?;
    let (daemon, _data) = bench.daemon(&[]).await?;
    let document = folder.join("openapi.json");
    std::fs::write(&document, get(&format!("{}/openapi.json", daemon.url())).await?)?;
    for (name, text) in [("client.ts", CLIENT_TS), ("node.d.ts", NODE_D_TS), ("tsconfig.json", TSCONFIG)] {
        std::fs::write(folder.join(name), text)?;
    }
    std::fs::write(folder.join("package.json"), r#"{ "type": "module" }"#)?;
    link(&bench.tools.packages(), &folder.join("node_modules"))?;
    quiet(bench.tools.npm("openapi-typescript").arg(&document).arg("-o").arg(folder.join("api.ts")), &["warn"]).await?;
    quiet(bench.tools.npm("tsc").arg("--project").arg(folder.join("tsconfig.json")), &[]).await?;
    let said = quiet(bench.tools.node().arg("client.ts").arg(daemon.url()).current_dir(&folder), &[]).await?;
    print!("    {said}");
    daemon.stop().await
}

fn link(from: &Path, to: &Path) -> anyhow::Result<()> {
    if !to.exists() {
        std::os::unix::fs::symlink(from, to)?;
    }
    Ok(())
}

pub(super) async fn streams(bench: &Bench) -> anyhow::Result<()> {
    let folder = bench.folder("streams")?;
    let (daemon, _data) = bench.daemon(&[]).await?;
    for (name, text) in [("stream.py", STREAM_PY), ("stream.mjs", STREAM_MJS)] {
        std::fs::write(folder.join(name), text)?;
    }
    link(&bench.tools.packages(), &folder.join("node_modules"))?;
    for mut follower in [bench.tools.python("python"), bench.tools.node()] {
        let run = held(daemon.url()).await?;
        let of_python = follower.as_std().get_program().to_string_lossy().ends_with("python");
        let script = folder.join(if of_python { "stream.py" } else { "stream.mjs" });
        follower.arg(script).arg(format!("{run}/events")).arg(format!("{run}/stages/draft/approve"));
        let said = quiet(&mut follower, &[]).await?;
        said.lines().for_each(|line| println!("    {line}"));
    }
    daemon.stop().await
}

/// Submits a run that will be held; its address.
pub(super) async fn held(url: &str) -> anyhow::Result<String> {
    let client = reqwest::Client::builder().no_proxy().build()?;
    let register = client.post(format!("{url}/v1/pipelines")).header("content-type", "application/json").body(HELD);
    register.send().await?.error_for_status()?;
    let body = json!({ "pipeline": "held", "input": {} });
    let run: Value = client.post(format!("{url}/v1/runs")).json(&body).send().await?.error_for_status()?.json().await?;
    Ok(format!("{url}/v1/runs/{}", run["id"].as_str().context("an id")?))
}
