//! What was said stays inside: words that are planted in every place that callers, models and providers write to come out nowhere
//! but where payloads are asked for.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpListener,
    sync::mpsc,
};

use serde_json::{Value, json};
use sqlx::{Connection as _, Executor as _, PgConnection};
use stagegate_testkit::{
    provider::{FakeProvider, Reply, any, contains, judges},
    servers::{Redis, TestDatabase},
};

use crate::support::{Api, PATIENCE, Place, ended};

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
    let mut request = crate::support::client().get(format!("{base}{path}"));
    for (name, value) in [
        ("x-planted", "CANARYheader"),
        ("authorization", "Bearer CANARYbearer"),
        ("cookie", "session=CANARYcookie"),
        ("x-webhook-secret", "CANARYsecret"),
        ("x-hub-signature-256", "sha256=CANARYsignature"),
    ] {
        request = request.header(name, value);
    }
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
    for path in ["/metrics", "/healthz", "/readyz", "/health", "/v1/replicas", "/CANARYpath-is-not-logged?no"] {
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

/// A server that takes error reports: its DSN, and the bodies as they come.
fn reports() -> (String, mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let dsn = format!("http://publickey@{}/42", listener.local_addr().expect("bound"));
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (mut reader, sender) = (BufReader::new(stream), sender.clone());
            std::thread::spawn(move || {
                let mut length = 0;
                let mut line = String::new();
                while reader.read_line(&mut line).is_ok_and(|read| read > 0) {
                    let lower = line.to_ascii_lowercase();
                    if let Some(told) = lower.strip_prefix("content-length:") {
                        length = told.trim().parse().unwrap_or(0);
                    }
                    if line.trim().is_empty() {
                        let mut body = vec![0; length];
                        let answer =
                            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}";
                        if reader.read_exact(&mut body).is_err() || reader.get_mut().write_all(answer).is_err() {
                            return;
                        }
                        let _ = sender.send(String::from_utf8_lossy(&body).into_owned());
                    }
                    line.clear();
                }
            });
        }
    });
    (dsn, receiver)
}

/// The URL with a password that is planted.
fn planted(url: &str, user: &str) -> String {
    let rest = url.split_once("://").expect("a URL").1;
    let scheme = &url[..url.len() - rest.len()];
    let host = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
    let user = rest.split_once('@').map_or(user, |(user, _)| user);
    format!("{scheme}{user}:CANARYpassword@{host}")
}

#[tokio::test(flavor = "multi_thread")]
async fn passwords_and_rows_come_out_neither_in_logs_nor_in_error_reports() {
    let (database, redis) = (TestDatabase::fresh().await, Redis::shared().await.expect("a Redis"));
    let (dsn, reports) = reports();
    // The database lets everybody in, Redis refuses who gives it a password that it has not.
    let (database_url, redis_url) = (planted(database.url(), "postgres"), planted(redis.url(), ""));
    let place = Place::new();
    let environment =
        [("DATABASE_URL", database_url.as_str()), ("REDIS_URL", redis_url.as_str()), ("SENTRY_DSN", dsn.as_str())];
    let run = |arguments: &[&str], environment: &[(&str, &str)]| {
        let mut command = place.stagegate(arguments);
        command.envs(environment.iter().copied());
        ended(command.output().expect("the binary starts"))
    };
    place.write("stagegate.toml", "[http]\nauth = 'open'\n[llm.providers.sim.sim]\nlatency = '1ms'\n");
    let (code, out, err) = run(&["migrate"], &environment);
    assert_eq!(code, 0, "{err}");
    assert_silent("migrate", &format!("{out}{err}"));
    let mut daemon = place.serve(&["--log", "trace"], &environment).await;
    let api = Api::new(&daemon.base, None);
    api.register("name: p\nstages: [{ id: a, model: sim/quick, prompt: 'x {{ input.w }}' }]").await;
    api.succeed("p", json!({ "w": "CANARYinput" })).await;
    let mut sql = PgConnection::connect(database.url()).await.expect("connects");
    sql.execute("UPDATE runs SET labels = ARRAY['CANARYlabel {']").await.expect("spoilt");
    let list = text_of(&daemon.base, "/v1/runs").await;
    assert!(list.contains("SG0505"), "{list}");
    assert_silent("the list", &list);
    let report = reports.recv_timeout(PATIENCE).expect("a report of the row");
    assert!(report.contains("runs.labels"), "{report}");
    for path in ["/health", "/healthz", "/readyz", "/metrics", "/v1/replicas", "/v1/queue"] {
        assert_silent(path, &text_of(&daemon.base, path).await);
    }
    daemon.log();
    let (_, log) = daemon.end("TERM");
    assert_silent("the log", &log.join("\n"));
    for report in std::iter::once(report).chain(reports.try_iter()) {
        assert_silent("a report", &report);
    }
    // What cannot be reached, and what is no URL.
    for (name, url) in [
        ("DATABASE_URL", "postgres://me:CANARYpassword@127.0.0.1:1/x"),
        ("DATABASE_URL", "postgres://me:CANARYpassword@127.0.0.1:port/x"),
        ("DATABASE_URL", "CANARYscheme://me:CANARYpassword@host/x"),
        ("REDIS_URL", "redis://me:CANARYpassword@127.0.0.1:port/"),
        ("REDIS_URL", "CANARYscheme://:CANARYpassword@host"),
        ("SENTRY_DSN", "https://CANARYkey@/"),
    ] {
        for command in [&["config"][..], &["keys", "list"], &["serve", "--listen", "127.0.0.1:port"]] {
            let (_, out, err) = run(command, &[(name, url)]);
            assert_silent(&format!("{command:?} with {name}"), &format!("{out}{err}"));
        }
    }
}
