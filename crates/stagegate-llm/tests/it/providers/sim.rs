//! The simulator: deterministic, plausible, and honest about what it is.

use std::{sync::Arc, time::Duration};

use proptest::prelude::*;
use serde_json::{Value, json};
use stagegate_core::{
    Code,
    pipeline::{Role, Span},
};
use stagegate_llm::{
    config::{LlmConfig, ProviderKind, SimConfig},
    provider::{Answer, Finish, Provider},
};

use super::{Ask, build, config, message};

const BRIEF: &str = "List the testable requirements in this brief.\n\
    # Night bus alerts\n\
    Riders of the night bus wait in the cold without knowing whether the bus still comes. \
    We want to tell them by text message when their bus is more than five minutes late. \
    A rider subscribes with the number of the stop. Alerts stop at six in the morning.\n\
    - Messages must arrive within thirty seconds of the delay being known.\n\
    - A rider can unsubscribe by answering STOP at any time.";

fn sim(change: impl FnOnce(&mut SimConfig)) -> Arc<dyn Provider> {
    let mut provider = config(ProviderKind::Sim);
    provider.sim.latency = Span(Duration::ZERO);
    change(&mut provider.sim);
    let mut llm = LlmConfig::default();
    llm.providers.insert("sim".to_owned(), provider);
    build(&llm, "sim")
}

fn brief() -> Ask {
    Ask::user(BRIEF).model("quick")
}

async fn answer(provider: &Arc<dyn Provider>, ask: &Ask) -> Answer {
    ask.of(provider).await.expect("an answer")
}

fn requirements_schema() -> Value {
    json!({
        "type": "object",
        "required": ["requirements"],
        "properties": {
            "requirements": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "required": ["id", "text", "priority"],
                    "properties": {
                        "id": { "type": "string", "pattern": "^R-[0-9]{1,3}$" },
                        "text": { "type": "string", "minLength": 20 },
                        "priority": { "enum": ["must", "should", "could"] },
                    },
                    "additionalProperties": false,
                }
            }
        }
    })
}

fn judge(output: &str) -> Ask {
    let schema = json!({
        "type": "object",
        "required": ["score", "reason"],
        "properties": {
            "score": { "type": "number", "minimum": 0, "maximum": 1 },
            "reason": { "type": "string" }
        },
        "additionalProperties": false
    });
    let mut ask = Ask::user(&format!("Rubric: every requirement is answered.\n\nOutput:\n{output}")).json(Some(schema));
    ask.messages.insert(0, message(Role::System, "You are a strict reviewer. Score the output."));
    ask.model("quick")
}

async fn score(provider: &Arc<dyn Provider>, output: &str) -> f64 {
    let verdict: Value = serde_json::from_str(&answer(provider, &judge(output)).await.content).expect("a verdict");
    assert!(verdict["reason"].as_str().expect("a reason").starts_with("[simulated]"));
    verdict["score"].as_f64().expect("a score")
}

#[tokio::test]
async fn the_same_question_gets_the_same_answer_in_every_process() {
    let (one, other) = (sim(|_| {}), sim(|_| {}));
    for ask in [brief(), brief().json(Some(requirements_schema())), brief().json(None)] {
        let first = answer(&one, &ask).await;
        assert_eq!(first, answer(&one, &ask).await);
        assert_eq!(first, answer(&other, &ask).await);
    }
}

#[tokio::test]
async fn another_seed_sample_model_or_question_gets_another_answer() {
    let provider = sim(|_| {});
    let content = answer(&provider, &brief().json(Some(requirements_schema()))).await.content;
    let reseeded = sim(|config| config.seed = 2);
    let ask = brief().json(Some(requirements_schema()));
    let mut sampled = ask.clone();
    sampled.sample = 1;
    let mut asked_more = ask.clone();
    asked_more.messages.push(message(Role::User, "The fleet has forty buses and two depots."));
    assert_ne!(content, answer(&provider, &sampled).await.content);
    assert_ne!(content, answer(&provider, &asked_more).await.content);
    assert_ne!(
        answer(&provider, &brief()).await.content,
        answer(&reseeded, &brief()).await.content,
        "the seed stands in the text"
    );
}

#[tokio::test]
async fn a_text_says_first_that_it_is_simulated_and_speaks_of_the_prompt() {
    let answer = answer(&sim(|config| config.seed = 42), &brief()).await;
    assert_eq!(answer.content.lines().next(), Some("[simulated by stagegate sim, seed 42]"));
    assert!(answer.content.contains("night bus") || answer.content.contains("text message"), "{}", answer.content);
    assert!(!answer.content.contains("List the testable"), "the instruction is no material");
    assert!(answer.content.chars().count() > 800, "{}", answer.content);
    assert_eq!(answer.finish, Finish::Stop);
    let usage = answer.usage.expect("usage");
    assert!(usage.input_tokens > 100 && usage.output_tokens > 200 && !usage.estimated, "{usage:?}");
}

#[tokio::test]
async fn json_fits_its_schema_and_each_free_string_says_that_it_is_simulated() {
    let answer = answer(&sim(|_| {}), &brief().json(Some(requirements_schema()))).await;
    let value: Value = serde_json::from_str(&answer.content).expect("JSON");
    assert!(jsonschema::is_valid(&requirements_schema(), &value), "{value:#}");
    let requirements = value["requirements"].as_array().expect("a list");
    assert!(requirements.len() >= 3);
    for requirement in requirements {
        let text = requirement["text"].as_str().expect("a text");
        assert!(text.starts_with("[simulated] "), "{text}");
    }
    let texts: std::collections::BTreeSet<_> = requirements.iter().map(|r| r["text"].to_string()).collect();
    assert_eq!(texts.len(), requirements.len(), "no requirement is said twice");
}

#[tokio::test]
async fn json_without_a_schema_says_that_it_is_simulated_too() {
    let value: Value = serde_json::from_str(&answer(&sim(|_| {}), &brief().json(None)).await.content).expect("JSON");
    assert!(value.to_string().contains("[simulated]"), "{value}");
}

#[tokio::test]
async fn a_weak_first_draft_fails_review_and_its_revision_passes() {
    let provider = sim(|_| {});
    for json in [false, true] {
        let mut ask = brief().model("drafty");
        if json {
            ask = ask.json(Some(requirements_schema()));
        }
        let draft = answer(&provider, &ask).await.content;
        assert!(score(&provider, &draft).await < 0.7, "{draft}");

        ask.messages.push(message(Role::Assistant, &draft));
        let critique = "Your previous answer did not pass review: it names the points, but carries none of them out.";
        ask.messages.push(message(Role::User, critique));
        let revised = answer(&provider, &ask).await.content;
        assert!(score(&provider, &revised).await >= 0.85, "{revised}");
        if json {
            let value: Value = serde_json::from_str(&revised).expect("JSON");
            assert!(jsonschema::is_valid(&requirements_schema(), &value));
        } else {
            assert!(revised.contains("## Revised") && revised.len() > draft.len(), "{revised}");
            assert!(draft.contains("## Draft 1"), "{draft}");
        }
    }
}

#[tokio::test]
async fn what_later_stages_make_of_a_draft_is_no_draft() {
    let provider = sim(|_| {});
    let draft = answer(&provider, &brief().model("drafty")).await.content;
    let later = answer(&provider, &Ask::user(&format!("Design a system for this:\n{draft}")).model("quick")).await;
    assert!(score(&provider, &later.content).await >= 0.85, "{}", later.content);
}

#[tokio::test]
async fn the_share_of_weak_first_drafts_is_as_configured() {
    let always = sim(|config| config.first_attempt_fail_rate = 1.0);
    assert!(answer(&always, &brief()).await.content.contains("Draft 1"));
    let half = sim(|config| config.first_attempt_fail_rate = 0.5);
    let mut drafts = 0;
    for nth in 0..200 {
        let ask = Ask::user(&format!("{BRIEF}\nThis is edition {nth} of the brief.")).model("quick");
        drafts += usize::from(answer(&half, &ask).await.content.contains("Draft 1"));
    }
    assert!((60..140).contains(&drafts), "{drafts} of 200");
}

#[tokio::test]
async fn limits_on_tokens_and_stop_texts_are_kept() {
    let provider = sim(|_| {});
    let mut ask = brief();
    for limit in [1, 4, 16, 20, 64, 200, 10_000] {
        ask.params.max_output_tokens = Some(limit);
        let short = answer(&provider, &ask).await;
        let tokens = short.usage.expect("usage").output_tokens;
        assert!(short.finish == Finish::Stop && (1..=u64::from(limit)).contains(&tokens), "{limit}: {}", short.content);
        assert_eq!(limit >= 4, short.content.starts_with("[simulated"), "{limit}: {}", short.content);
    }
    ask.params.max_output_tokens = None;
    ask.params.stop = vec!["## ".to_owned()];
    let stopped = answer(&provider, &ask).await;
    assert!(stopped.finish == Finish::Stop && !stopped.content.contains("## "), "{}", stopped.content);
}

#[tokio::test(start_paused = true)]
async fn latency_follows_the_configured_median_and_slow_is_ten_times_slower() {
    let provider = sim(|config| config.latency = Span(Duration::from_millis(200)));
    for (model, low, high) in [("quick", 150, 260), ("slow", 1_500, 2_600)] {
        let mut times = Vec::new();
        for _ in 0..101 {
            let start = tokio::time::Instant::now();
            answer(&provider, &brief().model(model)).await;
            times.push(start.elapsed().as_millis());
        }
        times.sort_unstable();
        assert!((low..high).contains(&times[50]), "median {} ms", times[50]);
        assert!(times[0] < times[100], "it varies");
        assert!(times[100] <= high * 5);
    }
}

#[tokio::test(start_paused = true)]
async fn faults_come_in_every_kind_and_a_retry_may_fare_better() {
    let provider = sim(|config| config.fault_rate = 1.0);
    let mut codes = std::collections::BTreeSet::new();
    let mut waits = std::collections::BTreeSet::new();
    let (mut truncated, mut refused, mut without_usage, mut broken_json) = (0, 0, 0, 0);
    let ask = brief().json(Some(requirements_schema()));
    for _ in 0..400 {
        match ask.of(&provider).await {
            Err(error) => {
                assert_eq!(error.retryable, error.code != Code::ProviderQuota);
                codes.insert(error.code);
                waits.extend(error.retry_after);
            }
            Ok(answer) if answer.finish == Finish::Length => truncated += 1,
            Ok(answer) if answer.finish == Finish::Refused => refused += 1,
            Ok(answer) if answer.usage.is_none() => without_usage += 1,
            Ok(answer) => {
                assert!(serde_json::from_str::<Value>(&answer.content).is_err());
                broken_json += 1;
            }
        }
    }
    let expected = [
        Code::ProviderUnreachable,
        Code::ProviderRateLimited,
        Code::ProviderQuota,
        Code::ProviderFailed,
        Code::ProviderTimeout,
    ];
    assert_eq!(codes.into_iter().collect::<Vec<_>>(), expected);
    assert!(waits.len() >= 3, "{waits:?}");
    assert!(truncated > 0 && refused > 0 && without_usage > 0 && broken_json > 0);

    let faulty = sim(|_| {});
    let mut good = 0;
    for _ in 0..100 {
        good += usize::from(brief().model("faulty").of(&faulty).await.is_ok());
    }
    assert!((30..90).contains(&good), "{good} of 100: half fail, and some faults are answers");
}

/// Schemas as authors of pipelines write them.
fn schema() -> impl Strategy<Value = Value> {
    let bounded_text = (0_u64..40, 0_u64..80)
        .prop_map(|(least, more)| json!({ "type": "string", "minLength": least, "maxLength": least + more }));
    let leaf = prop_oneof![
        Just(json!({ "type": "string" })),
        Just(json!({ "type": ["string", "null"] })),
        Just(json!({ "type": "boolean" })),
        Just(json!({ "type": "null" })),
        Just(json!({ "const": { "fixed": [1, "two"] } })),
        bounded_text,
        prop_oneof![
            Just("^[A-Z]{2,4}-[0-9]+$"),
            Just("^(low|medium|high)$"),
            Just(r"^\d{4}-\d{2}$"),
            Just("^[^,]+, [a-z]*$")
        ]
        .prop_map(|pattern| json!({ "type": "string", "pattern": pattern })),
        prop::collection::vec("[a-z]{1,6}", 1..4).prop_map(|choices| json!({ "enum": choices })),
        (-50_i64..50, 0_i64..50)
            .prop_map(|(least, span)| json!({ "type": "integer", "minimum": least, "maximum": least + span })),
        (-50_i64..50, 3_i64..50).prop_map(|(least, span)| {
            json!({ "type": "number", "exclusiveMinimum": least, "exclusiveMaximum": least + span })
        }),
        (1_i64..9).prop_map(|step| json!({ "type": "integer", "multipleOf": step, "minimum": 10 })),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        let properties = prop::collection::btree_map("[a-z]{1,8}", (inner.clone(), any::<bool>()), 0..4);
        let object = (properties, any::<bool>()).prop_map(|(properties, open)| {
            let required: Vec<_> = properties.iter().filter(|(_, (_, needed))| *needed).map(|(key, _)| key).collect();
            let shapes: serde_json::Map<String, Value> =
                properties.iter().map(|(key, (shape, _))| (key.clone(), shape.clone())).collect();
            json!({ "type": "object", "required": required, "properties": shapes, "additionalProperties": open })
        });
        prop_oneof![
            4 => object,
            2 => (inner.clone(), 0_u64..3, 0_u64..4).prop_map(|(items, least, more)| {
                json!({ "type": "array", "items": items, "minItems": least, "maxItems": least + more })
            }),
            1 => (inner.clone(), inner.clone()).prop_map(|(one, two)| json!({ "anyOf": [one, two] })),
            1 => inner.prop_map(|target| json!({ "$defs": { "thing": target }, "type": "object", "required": ["thing"],
                "properties": { "thing": { "type": "string" } } })),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_json_answer_fits_the_schema_that_was_asked_for(schema in schema(), seed in any::<u64>()) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let provider = sim(|config| config.seed = seed);
        let ask = brief().json(Some(schema.clone()));
        let content = runtime.block_on(answer(&provider, &ask)).content;
        let value: Value = serde_json::from_str(&content).expect("JSON");
        let validator = jsonschema::validator_for(&schema).expect("a valid schema");
        let mistakes: Vec<_> = validator.iter_errors(&value).map(|error| error.to_string()).collect();
        prop_assert!(mistakes.is_empty(), "{mistakes:?}\nschema {schema}\nanswer {value}");
        prop_assert_eq!(content, runtime.block_on(answer(&provider, &ask)).content);
    }
}

#[tokio::test]
async fn schemas_with_references_unions_and_unique_items_are_met() {
    let provider = sim(|_| {});
    let tree = json!({
        "$defs": { "node": {
            "type": "object", "required": ["name"],
            "properties": { "name": { "type": "string" }, "children": { "type": "array", "items": { "$ref": "#/$defs/node" } } }
        } },
        "$ref": "#/$defs/node"
    });
    let unique = json!({ "type": "array", "uniqueItems": true, "minItems": 3, "items": { "enum": ["a", "b", "c"] } });
    let all = json!({ "allOf": [
        { "type": "object", "properties": { "a": { "type": "integer" } }, "required": ["a"] },
        { "properties": { "b": { "type": "string", "format": "date" } }, "required": ["b"] }
    ] });
    let tuple =
        json!({ "type": "array", "prefixItems": [{ "type": "integer" }, { "type": "string" }], "items": false });
    let map = json!({ "type": "object", "minProperties": 2, "additionalProperties": { "type": "integer" } });
    for schema in [tree, unique, all, tuple, map, json!({}), json!(true)] {
        let value: Value =
            serde_json::from_str(&answer(&provider, &brief().json(Some(schema.clone()))).await.content).expect("JSON");
        assert!(jsonschema::is_valid(&schema, &value), "{schema} {value}");
    }
}

/// What a schema's words allow, in as few tokens as were asked for.
#[tokio::test]
async fn a_json_answer_is_a_shorter_one_where_few_tokens_are_allowed() {
    let provider = sim(|_| {});
    let label =
        json!({ "type": "object", "required": ["label"], "properties": { "label": { "enum": ["yes", "no"] } } });
    for (schema, least) in [(requirements_schema(), 200), (label, 6), (json!({}), 1)] {
        for limit in [least, 2 * least, 4_000] {
            let mut ask = brief().json(Some(schema.clone()));
            ask.params.max_output_tokens = Some(limit);
            let short = answer(&provider, &ask).await;
            let value: Value = serde_json::from_str(&short.content).expect("whole JSON");
            assert!(jsonschema::is_valid(&schema, &value), "{value}");
            assert_eq!(short.finish, Finish::Stop, "{limit}: {value}");
            assert!(short.usage.expect("usage").output_tokens <= u64::from(limit), "{limit}: {value}");
        }
    }
    // No answer that fits is so short: it is cut, as a model's would be.
    let mut ask = brief().json(Some(json!({ "type": "string", "minLength": 400 })));
    ask.params.max_output_tokens = Some(5);
    assert_eq!(answer(&provider, &ask).await.finish, Finish::Length);
}

/// One of each keyword that validation takes.
fn keywords() -> Vec<Value> {
    vec![
        json!({ "type": "object", "properties": { "a": { "type": "string" }, "b": { "type": "integer" } }, "required": ["a"], "not": { "required": ["b"] } }),
        json!({ "not": { "type": "object" } }),
        json!({ "enum": ["a", "b"], "not": { "const": "a" } }),
        json!({ "type": ["string", "null"], "not": { "type": "string" } }),
        json!({ "type": "object", "required": ["kind"], "properties": { "kind": { "enum": ["x", "z"] }, "x": { "type": "integer" }, "y": { "type": "string" } },
            "if": { "properties": { "kind": { "const": "x" } } }, "then": { "required": ["x"] }, "else": { "required": ["y"] } }),
        json!({ "type": "object", "dependentRequired": { "a": ["b"] }, "properties": { "a": {}, "b": { "type": "integer" } }, "required": ["a"] }),
        json!({ "type": "object", "dependentSchemas": { "a": { "properties": { "c": { "const": 1 } }, "required": ["c"] } },
            "properties": { "a": { "type": "boolean" } }, "required": ["a"] }),
        json!({ "type": "array", "contains": { "const": "x" }, "items": { "type": "string" }, "minContains": 2, "maxContains": 2 }),
        json!({ "type": "array", "contains": { "type": "integer", "minimum": 100 } }),
        json!({ "type": "object", "patternProperties": { "^n_[a-z]+$": { "type": "integer" } }, "additionalProperties": false, "minProperties": 2 }),
        json!({ "type": "object", "propertyNames": { "pattern": "^[a-z]{3,9}$" }, "minProperties": 2 }),
        json!({ "type": "object", "maxProperties": 1, "properties": { "a": { "type": "string" }, "b": { "type": "string" } } }),
        json!({ "oneOf": [{ "type": "integer", "multipleOf": 3 }, { "type": "integer", "multipleOf": 5 }] }),
        json!({ "type": "object", "properties": { "a": { "type": "string" }, "b": { "type": "string" } },
            "oneOf": [{ "required": ["a"] }, { "required": ["b"] }] }),
        json!({ "type": "string", "pattern": "^[a-z]+$", "minLength": 20, "maxLength": 25 }),
        json!({ "type": "string", "pattern": "[0-9]", "minLength": 50 }),
        json!({ "type": "number", "multipleOf": 0.01, "minimum": 0.1, "maximum": 0.2 }),
        json!({ "type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.000_000_1 }),
        json!({ "type": "integer", "multipleOf": 1.5, "minimum": 1 }),
        json!({ "type": "object", "required": ["a"],
            "allOf": [{ "properties": { "a": { "minimum": 3 } } }, { "properties": { "a": { "type": "integer", "maximum": 4 } } }] }),
        json!({ "$defs": { "x": { "$anchor": "thing", "type": "string" } }, "type": "array", "items": { "$ref": "#thing" }, "minItems": 1 }),
        json!({ "type": "array", "uniqueItems": true, "minItems": 6, "items": { "type": "string" } }),
        json!({ "type": "array", "uniqueItems": true, "minItems": 2, "items": { "type": "boolean" } }),
        json!({ "type": "object", "unevaluatedProperties": false, "allOf": [{ "properties": { "a": { "type": "string" } } }], "required": ["a"] }),
        json!({ "type": "array", "prefixItems": [{ "const": 1 }], "unevaluatedItems": false }),
        json!({ "$schema": "http://json-schema.org/draft-07/schema#", "type": "array", "items": [{ "const": 1 }, { "type": "string" }],
            "additionalItems": false, "minItems": 2 }),
        json!({ "type": "object", "required": ["a"], "properties": { "a": { "anyOf": [{ "type": "string", "maxLength": 3 }, { "type": "integer" }] } } }),
        json!({ "type": "string", "enum": ["low", "high"], "minLength": 4 }),
        json!({ "type": "string", "contentMediaType": "application/json" }),
    ]
}

#[tokio::test]
async fn every_keyword_that_validation_takes_is_served() {
    for schema in keywords() {
        for seed in 0..5 {
            let provider = sim(|config| config.seed = seed);
            let content = answer(&provider, &brief().json(Some(schema.clone()))).await.content;
            let value: Value = serde_json::from_str(&content).expect("JSON");
            assert!(jsonschema::is_valid(&schema, &value), "{schema} {value}");
        }
    }
}

#[tokio::test]
async fn a_schema_that_nothing_fits_is_told_and_never_answered() {
    use stagegate_core::pipeline::OutputFormat;
    use stagegate_llm::providers::sim::can_answer;
    for schema in [
        json!(false),
        json!({ "not": {} }),
        json!({ "enum": ["a"], "not": { "const": "a" } }),
        json!({ "type": "string", "minLength": 5, "maxLength": 3 }),
        json!({ "allOf": [{ "type": "string" }, { "type": "integer" }] }),
    ] {
        let format = OutputFormat::Json { schema: Some(std::sync::Arc::new(schema.clone())) };
        assert!(!can_answer(&format), "{schema}");
        let error = brief().json(Some(schema.clone())).of(&sim(|_| {})).await.expect_err("nothing fits");
        assert!(error.code == Code::ProviderRejected && !error.retryable, "{schema}: {}", error.message);
    }
    for schema in keywords() {
        let format = OutputFormat::Json { schema: Some(std::sync::Arc::new(schema.clone())) };
        assert!(can_answer(&format), "{schema}");
    }
}

/// Keywords that no construction follows, in each other.
fn hard_schema() -> impl Strategy<Value = Value> {
    let keyword = (0..keywords().len()).prop_map(|at| keywords()[at].clone());
    let leaf = prop_oneof![schema(), keyword];
    (leaf.clone(), leaf.clone(), leaf, 0..6).prop_map(|(one, two, three, how)| match how {
        0 => json!({ "allOf": [one, { "not": two }] }),
        1 => json!({ "oneOf": [one, two, three] }),
        2 => json!({ "if": one, "then": two, "else": three }),
        3 => json!({ "type": "array", "items": one, "contains": two, "uniqueItems": true }),
        4 => json!({ "type": "object", "patternProperties": { "^a": one }, "properties": { "ab": two }, "required": ["ab"],
            "dependentSchemas": { "ab": { "properties": { "c": three } } } }),
        _ => json!({ "anyOf": [one, two], "not": three }),
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn an_answer_fits_its_schema_or_is_refused(schema in hard_schema(), seed in any::<u64>()) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let provider = sim(|config| config.seed = seed);
        match runtime.block_on(brief().json(Some(schema.clone())).of(&provider)) {
            Ok(answer) => {
                let value: Value = serde_json::from_str(&answer.content).expect("JSON");
                prop_assert!(jsonschema::is_valid(&schema, &value), "schema {schema}\nanswer {value}");
            }
            Err(error) => prop_assert_eq!(error.code, Code::ProviderRejected),
        }
    }
}
