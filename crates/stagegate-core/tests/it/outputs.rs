//! Inputs, prompts, outputs: what a registered pipeline makes of them.

use std::sync::Arc;

use serde_json::{Value, json};
use stagegate_core::{
    Code, Pipeline, StageId,
    pipeline::{Message, RenderContext, Rendered, Role},
};

use crate::valid;

fn context<'a>(input: &'a Arc<Value>, outputs: &'a [Option<Arc<Value>>]) -> RenderContext<'a> {
    RenderContext { run_id: "run-1", input, outputs }
}

fn pipeline() -> Pipeline {
    valid(
        "\
name: p
defaults: { model: sim/quick }
input:
  type: object
  required: [brief, size]
  additionalProperties: false
  properties:
    brief: { type: string, minLength: 2 }
    size: { type: integer, minimum: 1 }
    parts: { type: array, items: { type: object, required: [id] } }
stages:
  - id: list
    system: Be {{ input.size }}.
    prompt: \"{{ input.brief }}\"
    output: { schema: { type: object, required: [items], additionalProperties: true, properties: { items: { type: array, items: { type: string }, minItems: 1 } } } }
    gate:
      checks:
        - min_chars: 20
        - max_chars: 30
        - matches: beta
        - not_matches: \"gam+a\"
        - contains: alpha
        - not_contains: delta
        - schema: { required: [note] }
        - expression: output['items'] | length == input.size
        - expression: output.nothing > 1
      judge: { rubric: \"As good as {{ input.brief }}\" }
  - id: text
    needs: [list]
    messages:
      - { role: system, content: \"{{ stages.list.output['items'] | join('+') }}\" }
      - { role: user, content: \"{{ stages.list.output }}\" }
  - id: joined
    needs: [text]
    transform: \"<{{ stages.text.output }}> {{ run.id }}\"
output:
  words: \"{{ stages.list.output['items'] }}\"
  count: \"{{ stages.list.output['items'] | length }}\"
  line: \"{{ stages.joined.output }}!\"
  fixed: [1, null, { a: b }]
",
    )
}

#[test]
fn an_input_that_does_not_fit_is_told_whole() {
    let pipeline = pipeline();
    assert_eq!(pipeline.check_input(&json!({"brief": "ab", "size": 1})), Ok(()));
    let found = pipeline.check_input(&json!({"brief": "a", "extra": 1, "parts": [{}, 5]})).expect_err("does not fit");
    let mut told: Vec<_> = found.iter().map(|v| (v.path.as_str(), v.message.as_str())).collect();
    told.sort_unstable();
    assert_eq!(
        told,
        [
            ("input.brief", "has 1 character, but must have at least 2"),
            ("input.extra", "is not a key of this input"),
            ("input.parts[0].id", "is required"),
            ("input.parts[1]", "is `5`, but must be a map"),
            ("input.size", "is required"),
        ]
    );
    assert!(found.iter().all(|v| v.code == Code::InvalidInput));
    let open = valid("{name: p, stages: [{id: a, transform: x}]}");
    assert_eq!(open.check_input(&json!({"any": 1})), Ok(()));
    assert_eq!(open.check_input(&json!("text")).expect_err("no map")[0].path, "input");
}

#[test]
fn prompts_are_rendered_from_what_is_upstream() {
    let pipeline = pipeline();
    let input = Arc::new(json!({"brief": "the <brief>", "size": 2}));
    let outputs = [Some(Arc::new(json!({"z": 1, "items": ["b", "a"]}))), Some(Arc::new(json!("t\n"))), None];
    let context = context(&input, &outputs);
    let message = |role, content: &str| Message { role, content: content.to_owned() };
    assert_eq!(
        pipeline.render(0, &context),
        Ok(Rendered::Messages(vec![message(Role::System, "Be 2."), message(Role::User, "the <brief>")]))
    );
    assert_eq!(
        pipeline.render(1, &context),
        Ok(Rendered::Messages(vec![message(Role::System, "b+a"), message(Role::User, r#"{"items":["b","a"],"z":1}"#)]))
    );
    assert_eq!(pipeline.render(2, &context), Ok(Rendered::Text("<t\n> run-1".to_owned())));
    let none = Arc::new(Value::Null);
    let rubric = pipeline.render_judge(0, &context, &none).expect("rendered").expect("a judge");
    assert_eq!((rubric.text.as_str(), rubric.is_prompt, rubric.system), ("As good as the <brief>", false, None));
    assert_eq!(pipeline.render_judge(1, &context, &none), Ok(None));
}

#[test]
fn a_template_that_fails_names_its_stage_and_the_cause() {
    let pipeline = pipeline();
    let input = Arc::new(json!({"brief": "b", "size": 2}));
    let outputs = [Some(Arc::new(json!({"other": 1}))), None, None];
    let failure = pipeline.render(1, &context(&input, &outputs)).expect_err("no items");
    assert_eq!((failure.code, failure.stage.as_ref().map(StageId::as_str)), (Code::TemplateFailed, Some("text")));
    assert!(failure.message.contains("stage `text`"), "{}", failure.message);
    assert!(failure.detail.is_some_and(|detail| detail.contains("items")));
    let failure = pipeline.render_output(&context(&input, &outputs)).expect_err("not there");
    assert!(failure.message.contains("the run's output"), "{}", failure.message);
}

#[test]
fn an_output_mapping_keeps_the_types_of_single_expressions() {
    let pipeline = pipeline();
    let input = Arc::new(json!({"brief": "b", "size": 2}));
    let outputs = [Some(Arc::new(json!({"items": ["b", "a"]}))), None, Some(Arc::new(json!("end")))];
    assert_eq!(
        pipeline.render_output(&context(&input, &outputs)),
        Ok(json!({"words": ["b", "a"], "count": 2, "line": "end!", "fixed": [1, null, {"a": "b"}]}))
    );
    let plain = valid(
        "{name: p, stages: [{id: a, transform: x}, {id: b, needs: [a], transform: y}, {id: c, needs: [a], transform: z}]}",
    );
    let outputs: Vec<_> = ["x", "y", "z"].iter().map(|text| Some(Arc::new(json!(text)))).collect();
    assert_eq!(plain.render_output(&context(&input, &outputs)), Ok(json!({"b": "y", "c": "z"})));
    assert!(plain.render_output(&context(&input, &outputs[..2])).is_err());
}

#[test]
fn every_check_says_what_it_found() {
    let pipeline = pipeline();
    let input = Arc::new(json!({"brief": "b", "size": 2}));
    let outputs = [None, None, None];
    let told = |output: Value| -> Vec<(String, bool, String)> {
        let assessments = pipeline.assess(0, &Arc::new(output), &context(&input, &outputs));
        assert!(assessments.iter().all(|a| a.version == 1 && a.threshold >= 1.0 && (a.score >= 1.0) == a.passed));
        let quotes = |a: &stagegate_core::Assessment| {
            ["alpha", "gamma", "delta", "note"].iter().any(|word| a.reason.contains(word))
        };
        assert!(!assessments.iter().any(quotes), "a reason never quotes: {assessments:?}");
        assessments.into_iter().map(|a| (a.name, a.passed, a.detail.unwrap_or(a.reason))).collect()
    };
    let good = told(json!({"items": ["alpha", "beta"]}));
    let passed: Vec<_> = good.iter().map(|(name, passed, _)| (name.as_str(), *passed)).collect();
    assert_eq!(
        passed,
        [
            ("schema", true),
            ("min_chars", true),
            ("max_chars", true),
            ("matches", true),
            ("not_matches", true),
            ("contains", true),
            ("not_contains", true),
            ("schema", false),
            ("expression", true),
            ("expression", false),
        ]
    );
    assert!(good[7].2.contains("lacks `note`") && good[9].2.contains("could not be evaluated"), "{good:?}");
    let bad = told(json!({"items": [1, "gamma delta delta delta delta", 2, 3, 4, 5, 6], "note": 1}));
    let failed: Vec<_> = bad.iter().filter(|(_, passed, _)| !passed).map(|(name, _, _)| name.as_str()).collect();
    assert_eq!(
        failed,
        ["schema", "max_chars", "matches", "not_matches", "contains", "not_contains", "expression", "expression"]
    );
    let reasons = bad.iter().map(|(_, _, reason)| reason.as_str()).collect::<Vec<_>>().join("\n");
    for part in [
        "`items[0]` is `1`, but must be a text",
        "and more",
        "at most 30 are allowed",
        "it says `gamma`",
        "does not contain `alpha`",
        "contains `delta`",
        "does not hold",
    ] {
        assert!(reasons.contains(part), "{part}: {reasons}");
    }
    assert_eq!(told(json!({"items": []}))[1].2, "has 12 characters, at least 20 are needed");
}

#[test]
fn an_answer_is_read_as_its_stage_says() {
    let pipeline = pipeline();
    assert_eq!(pipeline.read_output(1, "```json\n{}\n```"), Ok(json!("```json\n{}\n```")));
    for answer in
        ["{\"a\": \"```\"}", " {\"a\":\"```\"}\n", "```json\n{\"a\": \"```\"}\n```", "```\n{\"a\": \"```\"}\n```\n"]
    {
        assert_eq!(pipeline.read_output(0, answer), Ok(json!({"a": "```"})), "{answer}");
    }
    let told = pipeline.read_output(0, "Sure! {").expect_err("no JSON");
    assert!(!told.passed && told.name == "json" && told.reason.contains("is not JSON"), "{told:?}");
    assert!(pipeline.read_output(0, &"[".repeat(100_000)).is_err());
}

#[test]
fn an_output_mapping_is_bounded_in_templates_and_in_bytes() {
    let text = |templates: usize| {
        let each = vec!["'{{ stages.a.output }}'"; templates].join(", ");
        format!("name: p\nstages: [{{ id: a, transform: x }}]\noutput: [{each}]\n")
    };
    let found = crate::mistakes(&text(201));
    assert_eq!(
        found.iter().map(|v| (v.code, v.path.as_str())).collect::<Vec<_>>(),
        [(Code::DefinitionTooLarge, "output")]
    );
    let pipeline = valid(&text(200));
    let render = |bytes: usize| {
        let outputs = [Some(Arc::new(json!("x".repeat(bytes))))];
        pipeline.render_output(&context(&Arc::new(json!({})), &outputs))
    };
    assert!(render(1_000).is_ok());
    let failure = render(100_000).expect_err("20 MB");
    assert_eq!(failure.code, Code::TemplateFailed);
    assert!(failure.message.contains("more than 16777216 bytes"), "{}", failure.message);
}

#[test]
fn a_conversation_made_from_data_is_checked_before_it_is_sent() {
    let pipeline = valid(
        "{name: p, stages: [{id: a, model: sim/quick, system: 'Be {{ input.mood }}.', messages: {from: input.history}}]}",
    );
    let rendered = |history: Value| {
        let input = Arc::new(json!({ "mood": "brief", "history": history }));
        pipeline.render(0, &context(&input, &[None]))
    };
    let message = |role, content: &str| Message { role, content: content.to_owned() };
    let good = json!([{ "role": "user", "content": "Hi" }, { "role": "assistant", "content": "" }, { "role": "user", "content": "And?" }]);
    assert_eq!(
        rendered(good),
        Ok(Rendered::Messages(vec![
            message(Role::System, "Be brief."),
            message(Role::User, "Hi"),
            message(Role::Assistant, ""),
            message(Role::User, "And?"),
        ]))
    );
    let many = Value::Array(vec![json!({ "role": "user", "content": "x" }); 1_001]);
    let large = json!([{ "role": "user", "content": "x".repeat(1024 * 1024 + 1) }]);
    for (history, why) in [
        (json!("Hi"), "not a list of messages"),
        (json!(["Hi"]), "message 1 is the text `Hi`"),
        (json!([{ "role": "tool", "content": "x" }]), "has the role the text `tool`"),
        (json!([{ "content": "x" }]), "message 1 has no `role`"),
        (json!([{ "role": "user" }]), "has no `content`"),
        (json!([{ "role": "user", "content": ["x"] }]), "must have a text"),
        (json!([{ "role": "user", "content": "x", "name": "y" }]), "has the key `name`"),
        (json!([]), "it is blank"),
        (json!([{ "role": "assistant", "content": "x" }]), "it is blank"),
        (many, "more than 1000 messages"),
        (large, "over the limit"),
    ] {
        let failure = rendered(history).expect_err(why);
        assert_eq!(failure.code, Code::TemplateFailed);
        assert!(failure.detail.as_deref().is_some_and(|detail| detail.contains(why)), "{why}: {failure:?}");
    }
}

#[test]
fn a_blank_prompt_is_told_and_nothing_is_put_in_its_place() {
    let pipeline = valid("{name: p, stages: [{id: a, model: sim/quick, system: s, prompt: '{{ input.x }}\t'}]}");
    for blank in ["", " \n", "\u{a0}"] {
        let input = Arc::new(json!({ "x": blank }));
        let failure = pipeline.render(0, &context(&input, &[None])).expect_err("blank");
        assert!(
            failure.message.contains("the prompt of stage `a`") && failure.message.contains("it is blank"),
            "{failure:?}"
        );
    }
    let input = Arc::new(json!({ "x": "." }));
    assert!(pipeline.render(0, &context(&input, &[None])).is_ok());
}

#[test]
fn defaults_of_the_inputs_schema_are_filled_in() {
    let pipeline = valid(
        "{name: p, input: {type: object, properties: {a: {type: integer, default: 1}, m: {type: object, properties: \
         {b: {default: [x]}}}, n: {type: string}}}, stages: [{id: s, transform: '{{ input.a }}'}]}",
    );
    let filled = |mut input: Value| {
        let any = pipeline.fill_defaults(&mut input);
        (any, input)
    };
    assert_eq!(filled(json!({})), (true, json!({ "a": 1 })));
    assert_eq!(filled(json!({ "a": 2, "m": {} })), (true, json!({ "a": 2, "m": { "b": ["x"] } })));
    assert_eq!(filled(json!({ "a": null })), (false, json!({ "a": null })), "what is given stays");
    assert_eq!(filled(json!("text")), (false, json!("text")));
}

#[test]
fn an_input_that_fits_as_it_is_is_taken_though_a_default_does_not_fit() {
    let stored = |input: Value| {
        let definition = json!({ "name": "p", "input": input, "stages": [{ "id": "s", "transform": "x" }] });
        Pipeline::from_stored(definition).expect("stored")
    };
    let null = stored(
        json!({ "type": "object", "properties": { "z": { "type": "string" }, "a": { "type": "string", "default": null } } }),
    );
    let mut input = json!({ "z": "1" });
    assert!(!null.fill_defaults(&mut input));
    assert_eq!((&input, null.check_input(&input)), (&json!({ "z": "1" }), Ok(())));
    let either = stored(json!({ "type": "object", "oneOf": [{ "required": ["a"] }, { "required": ["b"] }],
        "properties": { "a": { "default": 1 }, "b": {} } }));
    for (mut input, filled) in [(json!({ "b": 1 }), false), (json!({}), true)] {
        assert_eq!(either.fill_defaults(&mut input), filled);
        assert_eq!(either.check_input(&input), Ok(()));
    }
    let nested = stored(json!({ "type": "object", "properties": { "m": { "type": "object", "properties":
        { "n": { "default": {}, "properties": { "k": { "default": 1 } } }, "b": { "default": 2, "type": "null" } } } } }));
    let mut input = json!({ "m": { "x": 1 } });
    assert!(!nested.fill_defaults(&mut input));
    assert_eq!(input, json!({ "m": { "x": 1 } }));
}

#[test]
fn a_stored_conversation_of_instructions_alone_goes_on_and_a_new_one_is_refused() {
    let definition = json!({ "name": "p", "stages": [{ "id": "s", "model": "sim/quick",
        "messages": [{ "role": "system", "content": "Say {{ input.w }}" }] }] });
    let stored = Pipeline::from_stored(definition.clone()).expect("it was taken once");
    let input = Arc::new(json!({ "w": "hi" }));
    assert!(stored.render(0, &context(&input, &[None])).is_ok());
    let found = Pipeline::parse(&definition.to_string(), &crate::Served).expect_err("nothing is asked");
    assert!(found[0].message.contains("no message is the user's"), "{found:?}");
}

#[test]
fn a_quality_is_in_0_to_1_whatever_the_score_is() {
    let pipeline = valid("{name: p, stages: [{id: s, transform: x, gate: {checks: [{min_chars: 1}]}}]}");
    let input = Arc::new(json!({}));
    let measured = pipeline.assess(0, &Arc::new(json!("x")), &context(&input, &[None]))[0].clone();
    for (scale, score, expected) in
        [(Some("1..5"), 3.0, 0.5), (Some("1..5"), 0.0, 0.0), (Some("1..5"), 9.0, 1.0), (None, -1.0, 0.0)]
    {
        let scale = scale.map(str::to_owned);
        let quality = stagegate_core::Assessment { scale, score, ..measured.clone() }.quality();
        assert!((quality - expected).abs() < 1e-9, "{score}: {quality}");
    }
}

#[test]
fn a_judge_without_newer_keys_asks_as_every_release_does() {
    let judge = |judge: &str| {
        let text = format!("{{name: p, stages: [{{id: b, model: sim/quick, prompt: x, gate: {{judge: {judge}}}}}]}}");
        valid(&text).stages[0].gate.judge.clone().expect("a judge")
    };
    let limits = |judge: stagegate_core::pipeline::Judge| {
        (judge.params().max_output_tokens, judge.params_with_room().and_then(|params| params.max_output_tokens))
    };
    assert_eq!(limits(judge("{rubric: r, threshold: 0.5}")), (Some(1_024), Some(8_192)));
    for newer in
        ["{rubric: r, scale: 1..5}", "{prompt: '{{ output }}'}", "{rubric: r, system: s}", "{rubric: r, params: {}}"]
    {
        assert_eq!(limits(judge(newer)), (Some(8_192), None), "{newer}");
    }
    assert_eq!(limits(judge("{rubric: r, params: {max_output_tokens: 9}}")), (Some(9), None));
}

#[test]
fn a_judges_own_prompt_sees_what_it_judges() {
    let pipeline = valid(
        "{name: p, stages: [{id: a, transform: x}, {id: b, needs: [a], model: sim/quick, prompt: x, gate: {judge: {scale: 1..5, \
         system: 'For {{ input.who }}', prompt: '{{ stages.a.output }} {{ output.k }} {{ run.id }}'}}}]}",
    );
    let (input, outputs) = (Arc::new(json!({ "who": "you" })), [Some(Arc::new(json!("from a"))), None]);
    let output = Arc::new(json!({ "k": 7 }));
    let texts = pipeline.render_judge(1, &context(&input, &outputs), &output).expect("rendered").expect("a judge");
    assert_eq!((texts.text.as_str(), texts.is_prompt), ("from a 7 run-1", true));
    assert_eq!(texts.system.as_deref(), Some("For you"));
    let judge = pipeline.stages[1].gate.judge.as_ref().expect("a judge");
    assert_eq!((judge.threshold(), judge.params().max_output_tokens), (4.0, Some(8_192)));
}
