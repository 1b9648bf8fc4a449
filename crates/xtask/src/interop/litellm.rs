//! LiteLLM's proxy as an upstream: runs over each dialect that it offers, with our fake provider behind it. Owns its
//! configuration.

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};
use stagegate_testkit::{
    FakeProvider,
    provider::{Reply, contains},
    servers::{Program, free_port},
};
use tokio::time::{Instant, sleep};

use super::{Bench, tools};

/// How long it may take to start: it imports much.
const START_LIMIT: Duration = Duration::from_mins(2);
/// How long a run may take.
const RUN_LIMIT: Duration = Duration::from_mins(1);
/// The key that it asks for.
const KEY: &str = "sk-interop";
/// The dialects, each with the path that a base URL has.
const DIALECTS: [(&str, &str); 3] = [("openai", "/v1"), ("anthropic", ""), ("gemini", "")];
/// What the model says.
const ANSWER: &str = "an answer through LiteLLM";

pub(super) async fn play(bench: &Bench) -> anyhow::Result<()> {
    let environment = tools::environment("interop-litellm", ".ci/requirements-interop-litellm.txt").await?;
    let upstream = FakeProvider::start().await;
    upstream.on(contains("")).respond(Reply::text(ANSWER));
    let port = free_port()?;
    // As a vLLM server: for a model of OpenAI's own LiteLLM would answer `/v1/messages` over the Responses API.
    let config = json!({
        "model_list": [{
            "model_name": "mock",
            "litellm_params": { "model": "hosted_vllm/mock", "api_base": upstream.openai_base_url(), "api_key": "of-the-fake" },
        }],
        "general_settings": { "master_key": KEY },
    });
    let program = environment.join("bin/litellm");
    let proxy = Program::start("litellm", "TERM", |home| {
        let path = home.join("config.yaml");
        // JSON is YAML.
        std::fs::write(&path, config.to_string())?;
        let text = |path: &std::path::Path| path.to_string_lossy().into_owned();
        let port = port.to_string();
        let options = ["--host", "127.0.0.1", "--port", &port, "--telemetry", "False"].map(str::to_owned);
        // It would ask for prices over the network, and wait for them.
        let command = ["/usr/bin/env", "LITELLM_LOCAL_MODEL_COST_MAP=True", "NO_PROXY=127.0.0.1"].map(str::to_owned);
        let program = vec![text(&program), "--config".to_owned(), text(&path)];
        Ok([command.to_vec(), program, options.to_vec()].concat())
    })?;
    let origin = format!("http://127.0.0.1:{port}");
    let client = reqwest::Client::builder().no_proxy().timeout(RUN_LIMIT).build()?;
    let until = Instant::now() + START_LIMIT;
    while !client.get(format!("{origin}/health/liveliness")).send().await.is_ok_and(|a| a.status().is_success()) {
        if Instant::now() > until || !proxy.is_running() {
            bail!("LiteLLM's proxy does not answer:\n{}", proxy.log_tail());
        }
        sleep(Duration::from_millis(200)).await;
    }
    let mut variables = Vec::new();
    for (kind, path) in DIALECTS {
        let section = format!("STAGEGATE_LLM__PROVIDERS__{}", kind.to_uppercase());
        let own = [("KIND", kind.to_owned()), ("BASE_URL", format!("{origin}{path}")), ("API_KEY", KEY.to_owned())];
        variables.extend(own.map(|(key, value)| (format!("{section}__{key}"), value)));
    }
    let variables: Vec<(&str, String)> = variables.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
    let (daemon, _data) = bench.daemon(&variables).await?;
    for (kind, _) in DIALECTS {
        let output = run_over(&client, daemon.url(), kind).await;
        let output = output.with_context(|| format!("over {kind}; LiteLLM wrote:\n{}", proxy.log_tail()))?;
        ensure!(output["one"] == ANSWER, "over {kind} the output is {output}");
        println!("    {kind}: works");
    }
    daemon.stop().await
}

/// A run of one stage by a provider of this name; its output.
async fn run_over(client: &reqwest::Client, url: &str, kind: &str) -> anyhow::Result<Value> {
    let name = format!("over-{kind}");
    let definition = json!({
        "name": name,
        "defaults": { "model": format!("{kind}/mock"), "retry": { "max_attempts": 1, "max_wait": "5s" } },
        "stages": [{ "id": "one", "prompt": "Say something." }],
    });
    client.post(format!("{url}/v1/pipelines")).json(&definition).send().await?.error_for_status()?;
    let body = json!({ "pipeline": name, "input": {} });
    let run: Value = client.post(format!("{url}/v1/runs")).json(&body).send().await?.error_for_status()?.json().await?;
    let address = format!("{url}/v1/runs/{}", run["id"].as_str().context("an id")?);
    let until = Instant::now() + RUN_LIMIT;
    loop {
        let run: Value = client.get(&address).send().await?.json().await?;
        match run["state"].as_str() {
            Some("succeeded") => return Ok(run["output"].clone()),
            Some("queued" | "running" | "waiting") if Instant::now() < until => sleep(Duration::from_millis(100)).await,
            _ => bail!("the run is {}: {}", run["state"], run["failure"]),
        }
    }
}
