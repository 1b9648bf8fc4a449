//! Promises of the configuration: precedence, refusals, redaction, and that the documentation is the code's.

use std::{fs, path::Path};

use serde_json::json;
use tempfile::TempDir;

use super::*;

fn environment(directory: &Path, variables: &[(&str, &str)]) -> Environment {
    let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Environment { variables, directory: directory.to_owned() }
}

fn place() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

fn with_file(text: &str) -> TempDir {
    let place = place();
    fs::write(place.path().join("stagegate.toml"), text).expect("writable");
    place
}

fn mistakes(loaded: Result<Loaded, Error>) -> Vec<(String, String, Option<String>)> {
    let error = loaded.expect_err("refused");
    assert_eq!(error.code, Code::InvalidConfig);
    error.violations.into_iter().map(|v| (v.path, v.message, v.mend)).collect()
}

#[test]
fn without_any_source_everything_is_at_its_default() {
    let place = place();
    let loaded = load(&Flags::default(), &environment(place.path(), &[])).expect("valid");
    assert!(loaded.values.iter().all(|value| value.source == DEFAULT));
    assert_eq!(loaded.config.http.listen.to_string(), "127.0.0.1:8080");
    assert!(loaded.config.llm.providers.is_empty());
}

#[test]
fn flags_go_before_the_environment_before_the_file_before_the_defaults() {
    let place = with_file("[http]\nlisten = '127.0.0.1:1'\nmax_connections = 7\nbody_max_bytes = 9\n");
    let variables = [("STAGEGATE_HTTP__LISTEN", "127.0.0.1:2"), ("STAGEGATE_HTTP__MAX_CONNECTIONS", "8")];
    let mut flags = Flags::default();
    flags.set("--listen", &["http", "listen"], Some("127.0.0.1:3"));
    let loaded = load(&flags, &environment(place.path(), &variables)).expect("valid");
    let source = |key: &str| {
        let value = loaded.values.iter().find(|value| keys::dotted(&value.path) == key).expect("known");
        (value.value.clone(), value.source.clone())
    };
    let file = format!("file {}", place.path().join("stagegate.toml").display());
    assert_eq!(source("http.listen"), (json!("127.0.0.1:3"), "flag --listen".to_owned()));
    assert_eq!(source("http.max_connections"), (json!(8), "variable STAGEGATE_HTTP__MAX_CONNECTIONS".to_owned()));
    assert_eq!(source("http.body_max_bytes"), (json!(9), file));
    assert_eq!(source("http.json_max_depth"), (json!(64), "default".to_owned()));
    assert_eq!(loaded.config.http.max_connections, 8);
}

#[test]
fn every_mistake_of_every_layer_is_told_at_once_with_its_source() {
    let place = with_file("[http]\nlistn = 1\nauth = 'maybe'\nmax_connections = 'many'\n[stor]\nx = 1\n");
    let variables = [
        ("STAGEGATE_HTTP__LISTEM", "127.0.0.1:2"),
        ("STAGEGATE_HTTP__LISTEN", "here"),
        ("STAGEGATE_HTTP__JSON_MAX_DEPTH", "deep"),
        ("STAGEGATE_LLM__PROVIDERS__LOCAL__BASE_UL", "http://x"),
    ];
    let found = mistakes(load(&Flags::default(), &environment(place.path(), &variables)));
    let file = place.path().join("stagegate.toml").display().to_string();
    let has = |path: &str, part: &str| {
        let told = |(at, message, mend): &(String, String, Option<String>)| {
            at == path && format!("{message} {}", mend.as_deref().unwrap_or("")).contains(part)
        };
        assert!(found.iter().any(told), "{path}: {part} is not in {found:#?}");
    };
    has(&format!("{file}: http.listn"), "did you mean `listen`?");
    has(&format!("{file}: http.auth"), "unknown variant `maybe`");
    has(&format!("{file}: http.max_connections"), "expected a whole number, found `\"many\"`");
    has(&format!("{file}: stor"), "did you mean `store`?");
    has("STAGEGATE_HTTP__LISTEM", "did you mean `STAGEGATE_HTTP__LISTEN`?");
    has("STAGEGATE_HTTP__LISTEN", "invalid socket address");
    has("STAGEGATE_HTTP__JSON_MAX_DEPTH", "expected a whole number, found `deep`");
    has("STAGEGATE_LLM__PROVIDERS__LOCAL__BASE_UL", "did you mean `STAGEGATE_LLM__PROVIDERS__LOCAL__BASE_URL`?");
    assert_eq!(found.len(), 8, "{found:#?}");
}

#[test]
fn a_broken_file_is_told_with_its_line() {
    let place = with_file("[http]\nlisten = \n");
    let error = load(&Flags::default(), &environment(place.path(), &[])).expect_err("refused");
    assert_eq!(error.violations[0].line, Some(2));
    let mut flags = Flags { config: Some("elsewhere.toml".into()), ..Flags::default() };
    let found = mistakes(load(&flags, &environment(place.path(), &[])));
    assert!(found[0].0.starts_with("--config: ") && found[0].1 == "no such file", "{found:?}");
    fs::write(place.path().join("latin.toml"), [b'#', 0xe9]).expect("writable");
    flags.config = Some("latin.toml".into());
    let found = mistakes(load(&flags, &environment(place.path(), &[])));
    assert!(found[0].1.starts_with("it is not UTF-8 text"), "{found:?}");
}

#[test]
fn the_fields_own_variables_are_known() {
    let place = place();
    let variables = [
        ("DATABASE_URL", "postgres://u:pw@db/x"),
        ("REDIS_URL", "redis://r:6379"),
        ("OPENAI_API_KEY", "sk-1"),
        ("GOOGLE_API_KEY", "g-1"),
        ("GEMINI_API_KEY", "g-2"),
        ("RUST_LOG", "debug"),
        ("STAGEGATE_DATA_DIR", "/data"),
        ("SENTRY_DSN", ""),
    ];
    let config = load(&Flags::default(), &environment(place.path(), &variables)).expect("valid").config;
    let secret = |secret: &Option<Secret>| secret.as_ref().map(|secret| secret.expose().to_owned());
    assert_eq!(secret(&config.store.database_url).as_deref(), Some("postgres://u:pw@db/x"));
    assert_eq!(secret(&config.redis.url).as_deref(), Some("redis://r:6379"));
    assert_eq!(secret(&config.llm.providers["openai"].api_key).as_deref(), Some("sk-1"));
    assert_eq!(secret(&config.llm.providers["gemini"].api_key).as_deref(), Some("g-2"));
    assert_eq!(config.store.data_dir.as_deref(), Some(Path::new("/data")));
    assert_eq!(config.log.filter, "debug");
    assert!(config.sentry.dsn.is_none(), "an empty variable counts as unset");
}

#[test]
fn a_variable_of_ours_goes_before_the_fields_own() {
    let place = place();
    let variables = [("DATABASE_URL", "postgres://a"), ("STAGEGATE_STORE__DATABASE_URL", "postgres://b")];
    let config = load(&Flags::default(), &environment(place.path(), &variables)).expect("valid").config;
    assert_eq!(config.store.database_url.expect("set").expose(), "postgres://b");
}

#[test]
fn a_secret_is_given_inline_or_by_file_and_never_shown() {
    let place = with_file("[llm.providers.local]\nkind = 'openai'\nbase_url = 'http://x'\napi_key_file = 'key'\n");
    fs::write(place.path().join("key"), "from-a-file\n").expect("writable");
    let by_file = place.path().join("key").display().to_string();
    let variables = [("DATABASE_URL_FILE", by_file.as_str()), ("STAGEGATE_REDIS__URL_FILE", "key")];
    let loaded = load(&Flags::default(), &environment(place.path(), &variables)).expect("valid");
    let config = &loaded.config;
    assert_eq!(config.llm.providers["local"].api_key.as_ref().expect("set").expose(), "from-a-file");
    assert_eq!(config.store.database_url.as_ref().expect("set").expose(), "from-a-file");
    assert_eq!(config.redis.url.as_ref().expect("set").expose(), "from-a-file");
    let shown = format!("{}{}{config:?}", show::toml(&loaded), show::json(&loaded));
    assert!(!shown.contains("from-a-file") && shown.contains("[redacted]"), "{shown}");
    assert!(shown.contains("# variable DATABASE_URL_FILE"), "{shown}");

    let variables = [("DATABASE_URL_FILE", "key"), ("DATABASE_URL", "x"), ("REDIS_URL_FILE", "nowhere")];
    let found = mistakes(load(&Flags::default(), &environment(place.path(), &variables)));
    assert_eq!(found.iter().map(|(at, _, _)| at.as_str()).collect::<Vec<_>>(), ["DATABASE_URL_FILE", "REDIS_URL_FILE"]);
    let both = with_file("[redis]\nurl = 'redis://x'\nurl_file = 'key'\n");
    let found = mistakes(load(&Flags::default(), &environment(both.path(), &[])));
    assert_eq!((found.len(), found[0].1.as_str()), (1, "`url` is given too"));
}

#[test]
fn a_wrong_secret_is_refused_without_being_shown() {
    let place = with_file("[redis]\nurl = 12345\n");
    let found = mistakes(load(&Flags::default(), &environment(place.path(), &[])));
    assert!(!format!("{found:?}").contains("12345"), "{found:?}");
}

#[test]
fn a_built_in_provider_needs_no_kind_and_another_one_does() {
    let place = with_file("[llm.providers.sim.sim]\nlatency = '1ms'\n[llm.providers.mine]\nbase_url = 'http://x'\n");
    let found = mistakes(load(&Flags::default(), &environment(place.path(), &[])));
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].0.ends_with("llm.providers.mine") && found[0].1.contains("missing field `kind`"), "{found:?}");
}

#[test]
fn what_kubernetes_and_the_tools_put_there_is_passed_over() {
    let place = place();
    let variables = [
        ("STAGEGATE_SERVICE_HOST", "10.0.0.1"),
        ("STAGEGATE_SERVICE_PORT_HTTP", "80"),
        ("STAGEGATE_PORT", "tcp://10.0.0.1:80"),
        ("STAGEGATE_PORT_80_TCP_ADDR", "10.0.0.1"),
        ("STAGEGATE_TEST_DATABASE_URL", "postgres://x"),
    ];
    assert!(load(&Flags::default(), &environment(place.path(), &variables)).is_ok());
}

#[test]
fn values_that_make_no_sense_are_refused() {
    let place = with_file(
        "[engine]\nmax_runs = 0\nrun_crashes_max = 2\n[engine.tenants.acme]\nmax_runs = 0\n[store.pool]\nmin_connections = 99\n[llm.breaker]\nfailure_rate = 2\n",
    );
    let found = mistakes(load(&Flags::default(), &environment(place.path(), &[])));
    assert_eq!(found.len(), 5, "{found:?}");
    assert!(found.iter().any(|mistake| format!("{mistake:?}").contains("engine.tenants.acme.max_runs")), "{found:?}");
}

#[test]
fn the_variables_of_proxies_are_known_in_both_cases() {
    let place = place();
    let secret = |secret: &Option<Secret>| secret.as_ref().map(|secret| secret.expose().to_owned());
    let net = |variables: &[(&str, &str)]| {
        load(&Flags::default(), &environment(place.path(), variables)).expect("valid").config.net
    };
    let lower = net(&[
        ("http_proxy", "http://a"),
        ("https_proxy", "http://b"),
        ("all_proxy", "http://c"),
        ("no_proxy", "d, e"),
    ]);
    assert_eq!(secret(&lower.http_proxy).as_deref(), Some("http://a"));
    assert_eq!(secret(&lower.https_proxy).as_deref(), Some("http://b"));
    assert_eq!(
        (secret(&lower.proxy).as_deref(), lower.no_proxy),
        (Some("http://c"), vec!["d".to_owned(), "e".to_owned()])
    );
    let upper = net(&[("http_proxy", "http://a"), ("HTTP_PROXY", "http://b"), ("NO_PROXY", "*"), ("HTTPS_PROXY", "")]);
    assert_eq!((secret(&upper.http_proxy).as_deref(), upper.no_proxy), (Some("http://b"), vec!["*".to_owned()]));
    assert!(upper.https_proxy.is_none());
    let ours = net(&[("HTTP_PROXY", "http://a"), ("STAGEGATE_NET__HTTP_PROXY", "http://b")]);
    assert_eq!(secret(&ours.http_proxy).as_deref(), Some("http://b"));
}

#[test]
fn a_proxy_that_cannot_be_used_is_refused_by_its_variable_and_not_shown() {
    let place = place();
    let variables = [("HTTPS_PROXY", "ftp://user:hunter2@proxy"), ("HTTP_PROXY", "http://proxy"), ("NO_PROXY", "a*b")];
    let found = mistakes(load(&Flags::default(), &environment(place.path(), &variables)));
    let places: Vec<_> = found.iter().map(|(at, _, _)| at.as_str()).collect();
    assert_eq!(places, ["HTTPS_PROXY"], "an entry of NO_PROXY that is not understood stops nothing");
    assert!(!format!("{found:?}").contains("hunter2"), "{found:?}");
    let good = [("HTTPS_PROXY", "http://user:hunter2@proxy")];
    let loaded = load(&Flags::default(), &environment(place.path(), &good)).expect("valid");
    assert!(!format!("{}{}{:?}", show::toml(&loaded), show::json(&loaded), loaded.config).contains("hunter2"));
}

#[test]
fn a_providers_name_that_no_model_can_hold_is_refused_where_it_is_written() {
    let file = with_file(
        "[llm.providers.MyProv]\nkind = 'openai'\nbase_url = 'http://x'\n[llm.providers.\"my.prov\"]\nkind = 'openai'\nbase_url = 'http://x'\n",
    );
    let variables =
        [("STAGEGATE_LLM__PROVIDERS__A.B__KIND", "openai"), ("STAGEGATE_LLM__PROVIDERS__GOOD__KIND", "openai")];
    let found = mistakes(load(&Flags::default(), &environment(file.path(), &variables)));
    let shown = file.path().join("stagegate.toml").display().to_string();
    let expected = [
        (format!("{shown}: llm.providers.MyProv"), "myprov"),
        ("STAGEGATE_LLM__PROVIDERS__A.B__KIND".to_owned(), "a-b"),
        (format!("{shown}: llm.providers.\"my.prov\""), "my-prov"),
    ];
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for ((place, message, mend), (expected, near)) in found.iter().zip(&expected) {
        assert_eq!(place, expected);
        assert!(message.contains("not a valid provider name"), "{message}");
        assert_eq!(mend.as_deref(), Some(format!("write `{near}`").as_str()));
    }
}

#[test]
fn an_address_that_cannot_be_joined_is_refused_before_any_start() {
    let place = place();
    let variables = [
        ("STAGEGATE_LLM__PROVIDERS__LOCAL__KIND", "openai"),
        ("STAGEGATE_LLM__PROVIDERS__LOCAL__BASE_URL", "localhost:8000"),
    ];
    let found = mistakes(load(&Flags::default(), &environment(place.path(), &variables)));
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].0, "STAGEGATE_LLM__PROVIDERS__LOCAL__BASE_URL");
    assert_eq!(found[0].2.as_deref(), Some("write `http://localhost:8000`"));
}

#[test]
fn headers_are_given_in_the_file_by_variables_and_by_files_and_never_shown() {
    let text = "[llm.providers.local]\nkind = 'openai'\nbase_url = 'http://x'\nheaders = { X-Title = 'hunter2', x-key_file = 'key' }\n";
    let place = with_file(text);
    fs::write(place.path().join("key"), "hunter2-of-a-file\n").expect("writable");
    let by_file = place.path().join("key").display().to_string();
    let variables = [
        ("STAGEGATE_LLM__PROVIDERS__LOCAL__HEADERS__HTTP_REFERER", "hunter2-of-a-variable"),
        ("STAGEGATE_LLM__PROVIDERS__LOCAL__HEADERS__X_TEAM_KEY_FILE", by_file.as_str()),
    ];
    let loaded = load(&Flags::default(), &environment(place.path(), &variables)).expect("valid");
    let headers: Vec<_> = loaded.config.llm.providers["local"]
        .headers
        .iter()
        .map(|(name, value)| (name.as_str(), value.expose()))
        .collect();
    assert_eq!(
        headers,
        [
            ("X-Title", "hunter2"),
            ("http-referer", "hunter2-of-a-variable"),
            ("x-key", "hunter2-of-a-file"),
            ("x-team-key", "hunter2-of-a-file")
        ]
    );
    let shown = format!("{}{}{:?}", show::toml(&loaded), show::json(&loaded), loaded.config);
    assert!(!shown.contains("hunter2") && shown.contains("http-referer"), "{shown}");
    let reserved = with_file(&text.replace("X-Title", "Host"));
    fs::write(reserved.path().join("key"), "x").expect("writable");
    let found = mistakes(load(&Flags::default(), &environment(reserved.path(), &[])));
    assert!(found[0].0.ends_with("llm.providers.local.headers.Host"), "{found:?}");
}

#[test]
fn a_path_that_is_written_with_points_is_read_again() {
    for path in [&["llm", "providers", "my.prov", "base_url"][..], &["net", "proxy"], &["llm"]] {
        let path: Vec<String> = path.iter().map(|part| (*part).to_owned()).collect();
        assert_eq!(keys::undotted(&keys::dotted(&path)), path);
    }
}

#[test]
fn models_with_points_and_slashes_can_be_priced() {
    let place = with_file("[llm.prices.\"local/llama-3.1\"]\ninput = 1\noutput = 2.5\n");
    let loaded = load(&Flags::default(), &environment(place.path(), &[])).expect("valid");
    assert!((loaded.config.llm.prices["local/llama-3.1"].output - 2.5).abs() < f64::EPSILON);
    assert!(show::toml(&loaded).contains("[llm.prices.\"local/llama-3.1\"]"));
}

fn committed(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn the_reference_page_and_the_example_are_the_codes() {
    let mend = "run `cargo run -q -- config --reference > docs/configuration.md` and `… --example > deploy/…`";
    assert!(committed("docs/configuration.md") == reference::page(), "docs/configuration.md: {mend}");
    assert!(committed("deploy/stagegate.example.toml") == reference::example(), "stagegate.example.toml: {mend}");
}

#[test]
fn every_key_has_a_text() {
    for (path, leaf) in keys::tree().leaves() {
        assert!(leaf.doc.trim_end().ends_with('.'), "{}: `{}` is no sentence", keys::dotted(&path), leaf.doc);
    }
}

#[test]
fn the_example_loads_as_it_is_and_with_every_key_in_force() {
    let example = reference::example();
    let place = with_file(&example);
    let loaded = load(&Flags::default(), &environment(place.path(), &[])).expect("valid");
    assert!(loaded.values.iter().all(|value| value.source == DEFAULT));

    let in_force: Vec<&str> = example
        .lines()
        .filter_map(|line| line.strip_prefix("# "))
        .filter(|line| line.starts_with('[') || (line.contains(" = ") && line.starts_with(|c: char| c.is_lowercase())))
        .collect();
    let in_force = in_force.join("\n");
    let place = with_file(&in_force);
    let loaded = load(&Flags::default(), &environment(place.path(), &[]));
    let loaded = loaded.unwrap_or_else(|error| panic!("{:#?}\n{in_force}", error.violations));
    let set = loaded.values.iter().filter(|value| value.source != DEFAULT).count();
    assert_eq!(set, keys::tree().leaves().len(), "every key is in the example");
}

#[test]
fn what_is_printed_can_be_loaded() {
    let place = place();
    let loaded = load(&Flags::default(), &environment(place.path(), &[])).expect("valid");
    let again = with_file(&show::toml(&loaded));
    let again = load(&Flags::default(), &environment(again.path(), &[])).expect("valid TOML");
    assert_eq!(
        serde_json::to_value(&again.config).expect("plain"),
        serde_json::to_value(&loaded.config).expect("plain")
    );
}

#[test]
fn an_address_is_shown_without_its_credentials_and_query() {
    for (given, shown) in [
        ("http://localhost:11434/v1", "http://localhost:11434/v1"),
        ("https://me:hunter2@host/v1", "https://[redacted]@host/v1"),
        ("https://hunter@2@host", "https://[redacted]@host"),
        ("https://host/v1?key=hunter2", "https://host/v1?[redacted]"),
        ("https://me:hunter2@host?key=hunter2#x", "https://[redacted]@host?[redacted]"),
        ("plain text with a@b", "plain text with a@b"),
    ] {
        assert_eq!(super::without_credentials(given.to_owned()), shown);
    }
}
