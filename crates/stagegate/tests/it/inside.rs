//! What was said stays inside: words that are planted in every place that callers, models and providers write to come out nowhere
//! but where payloads are asked for.

use serde_json::{Value, json};
use stagegate_testkit::provider::{FakeProvider, Reply, any, contains, judges};

use crate::support::{Api, Place};

/// Each begins with this, so that one search finds all.
const CANARY: &str = "CANARY";
const KEY: &str = "sk-CANARYkeyofaprovider0123456789";

const PIPELINES: [&str; 5] = [
    // A check that quotes what the output says, and one that quotes what it lacks.
    "name: checks
stages: [{ id: a, prompt: 'CHECKS {{ input.w }}', retry: { max_attempts: 2, backoff: 10ms..20ms },
           gate: { checks: [{ not_matches: '[A-Z]{6}out[a-z]*' }, { expression: 'output | int > 3' }] } }]",
    // A schema whose mistake quotes a value, and whose place in the output is made of words.
    "name: schema
stages: [{ id: a, prompt: 'SCHEMA {{ input.w }}', retry: { max_attempts: 1 },
           output: { schema: { type: object, additionalProperties: { type: integer } } } }]",
    "name: judged
stages: [{ id: a, prompt: 'JUDGED {{ input.w }}', retry: { max_attempts: 1 },
           gate: { judge: { rubric: 'It says {{ input.w }}.', threshold: 0.9 } } }]",
    "name: refused
stages: [{ id: a, prompt: 'REFUSED {{ input.w }}', retry: { max_attempts: 1 } }]",
    "name: template
stages: [{ id: a, prompt: 'TEMPLATE {{ input.w | int + input.nothing.at.all }}' }]",
];

/// No line of it, at any level, holds a planted word.
fn assert_silent(what: &str, text: &str) {
    let told: Vec<&str> = text.lines().filter(|line| line.contains(CANARY)).collect();
    assert!(told.is_empty(), "{what}: {told:#?}");
}

async fn text_of(base: &str, path: &str) -> String {
    let request = crate::support::client().get(format!("{base}{path}")).header("x-planted", "CANARYheader");
    request.send().await.expect("an answer").text().await.expect("a body")
}

#[tokio::test(flavor = "multi_thread")]
async fn planted_words_come_out_only_where_payloads_are_asked_for() {
    let provider = FakeProvider::start().await;
    let echo = |status, words: &str| Reply::status(status, json!({ "error": { "message": words } }).to_string());
    provider.on(judges()).always(Reply::verdict(0.2, "it says CANARYverdict"));
    provider.on(contains("REFUSED")).always(echo(400, "bad prompt: CANARYecho"));
    provider.on(contains("SCHEMA")).always(Reply::text(r#"{"CANARYkey":"CANARYvalue"}"#));
    provider.on(any()).always(Reply::text("CANARYoutput"));
    let place = Place::new();
    place.write(
        "stagegate.toml",
        &format!(
            "[llm.providers.fake]\nkind = 'openai'\nbase_url = '{}'\napi_key = '{KEY}'\n",
            provider.openai_base_url()
        ),
    );
    let mut daemon = place.serve(&["--log", "trace"], &[]).await;
    let api = Api::new(&daemon.base, None);
    let mut runs = Vec::new();
    for pipeline in PIPELINES {
        api.register(&pipeline.replacen("stages:", "defaults: { model: fake/m }\nstages:", 1)).await;
        let name = pipeline.lines().next().and_then(|line| line.strip_prefix("name: ")).expect("a name");
        let run = api.submit(name, json!({ "w": "CANARYinput" })).await;
        let detail = api.finish(&run).await;
        assert_eq!(detail["state"], "failed", "{detail:#}");
        runs.push((name, run, detail));
    }
    let mut details = String::new();
    for (name, run, detail) in &runs {
        assert_silent(name, &detail["failure"].to_string());
        assert_silent(name, &detail["stages"].to_string());
        assert_silent(name, &text_of(&daemon.base, &format!("/v1/runs/{run}/events")).await);
        details.push_str(&api.get(&format!("/v1/runs/{run}/stages/a")).await["attempts"].to_string());
    }
    assert_silent("the list", &text_of(&daemon.base, "/v1/runs").await);
    for path in ["/metrics", "/healthz", "/readyz", "/v1/replicas", "/CANARYpath-is-not-logged?no"] {
        if !path.contains(CANARY) {
            assert_silent(path, &text_of(&daemon.base, path).await);
        }
    }
    for word in ["CANARYoutput", "CANARYkey", "CANARYvalue", "CANARYverdict", "CANARYecho"] {
        assert!(details.contains(word), "{word} is for who may read payloads: {details}");
    }
    assert!(!details.contains(KEY));
    assert_silent("config", &place.run(&["config"]).1);
    daemon.log();
    let (_, log) = daemon.end("TERM");
    assert!(log.len() > 50, "trace tells much");
    assert_silent("the log", &log.join("\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_author_is_told_everything_that_is_wrong() {
    let provider = FakeProvider::start().await;
    provider.on(any()).always(Reply::text("CANARYoutput"));
    let place = Place::new();
    place.write(
        "stagegate.toml",
        &format!("[llm.providers.fake]\nkind = 'openai'\nbase_url = '{}'\n", provider.openai_base_url()),
    );
    let daemon = place.serve(&[], &[]).await;
    let api = Api::new(&daemon.base, None);
    api.register(&PIPELINES[0].replacen("stages:", "defaults: { model: fake/m }\nstages:", 1)).await;
    let run = api.submit("checks", json!({ "w": "x" })).await;
    let detail: Value = api.finish(&run).await;
    assert_eq!(detail["failure"]["code"], "SG0300", "{detail:#}");
    let second = provider.calls().pop().expect("two attempts").prompt_text;
    assert!(second.contains("it says `CANARYoutput`"), "{second}");
}
