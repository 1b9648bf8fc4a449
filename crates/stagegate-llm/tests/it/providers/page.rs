//! docs/providers.md: each of its examples is built and asked, and what goes out is what the page says. A proxy that takes
//! everything stands for the internet, so `https` is left out of the addresses.

use std::{collections::BTreeMap, path::Path};

use serde::Deserialize;
use stagegate_core::{ModelRef, Secret};
use stagegate_llm::{config::LlmConfig, providers};
use stagegate_net::{Client, NetConfig};
use stagegate_testkit::FakeProvider;

use super::Ask;

/// Headers of every request.
const USUAL: [&str; 6] = ["accept", "accept-encoding", "content-length", "content-type", "host", "user-agent"];

/// The vendors that the page has an example for.
const VENDORS: [&str; 14] = [
    "OpenAI",
    "Azure",
    "Anthropic",
    "Gemini",
    "Vertex",
    "Bedrock",
    "OpenRouter",
    "DeepSeek",
    "Groq",
    "Together",
    "Ollama",
    "vLLM",
    "LM Studio",
    "llama.cpp",
];

#[derive(Debug, Deserialize)]
struct Section {
    llm: LlmConfig,
}

/// An example: the configuration, and the request that it says it makes.
#[derive(Debug)]
struct Example {
    vendor: String,
    config: String,
    request: String,
}

/// The text of a page's block that begins in this line of fences.
fn examples(page: &str) -> Vec<Example> {
    let (mut vendor, mut config, mut found) = (String::new(), String::new(), Vec::new());
    let mut lines = page.lines();
    while let Some(line) = lines.next() {
        let mut block = || lines.by_ref().take_while(|line| *line != "```").collect::<Vec<_>>().join("\n");
        match line {
            "```toml" => config = block(),
            "```http" => {
                let (config, request) = (std::mem::take(&mut config), block());
                assert!(!config.is_empty(), "{vendor}: a request without a configuration");
                found.push(Example { vendor: vendor.clone(), config, request });
            }
            _ => vendor = line.strip_prefix("## ").map_or(vendor, str::to_owned),
        }
    }
    found
}

#[tokio::test]
async fn each_example_of_the_page_sends_what_the_page_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/providers.md");
    let page = std::fs::read_to_string(path).expect("the page").replace("\r\n", "\n");
    let examples = examples(&page);
    for vendor in VENDORS {
        assert!(examples.iter().any(|example| example.vendor == vendor), "{vendor} has no example");
    }
    let internet = FakeProvider::start().await;
    let proxy = Some(Secret::from(internet.origin()));
    let client = Client::new(&NetConfig { http_proxy: proxy, ..NetConfig::default() }).expect("a client");
    for Example { vendor, config, request } in examples {
        let model = config.lines().next().and_then(|line| line.strip_prefix("# model: ")).expect("a model");
        let model = ModelRef::new(model).unwrap_or_else(|error| panic!("{vendor}: {error}"));
        let mut section: Section = toml::from_str(&config).unwrap_or_else(|error| panic!("{vendor}: {error}"));
        for provider in section.llm.providers.values_mut() {
            // The address that is there without being written is the vendor's own, over TLS.
            let written = provider.base_url.take().unwrap_or_else(|| origin_of(&request));
            provider.base_url = Some(written.replace("https://", "http://"));
        }
        let built = providers::build(&section.llm, &client).unwrap_or_else(|error| panic!("{vendor}: {error:?}"));
        internet.clear_calls();
        let mut ask = Ask::user("Hi");
        ask.model = model.model().to_owned().leak();
        let _ = ask.of(&built[model.provider()]).await;
        let call = super::only_call(&internet);
        let query = call.query.map(|query| format!("?{query}")).unwrap_or_default();
        let mut sent = vec![format!("POST http://{}{}{query}", call.headers["host"], call.path)];
        sent.extend(told(&call.headers));
        let mut lines: Vec<String> = request.lines().map(str::to_owned).collect();
        lines[0] = lines[0].replace("https://", "http://");
        lines[1..].sort();
        assert_eq!(sent, lines, "{vendor}");
    }
}

/// Scheme and host of the request that the page shows.
fn origin_of(request: &str) -> String {
    let url = request.lines().next().and_then(|line| line.strip_prefix("POST ")).expect("a request");
    url.split('/').take(3).collect::<Vec<_>>().join("/")
}

/// The headers that are not those of every request.
fn told(headers: &BTreeMap<String, String>) -> Vec<String> {
    let others = headers.iter().filter(|(name, _)| !USUAL.contains(&name.as_str()));
    others.map(|(name, value)| format!("{name}: {value}")).collect()
}
