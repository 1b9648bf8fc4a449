//! What is refused when a definition is registered, and how it is told.

use proptest::prelude::*;
use serde_json::{Value, json};
use stagegate_core::{
    Code, Pipeline,
    pipeline::{Bundle, definition_schema},
};

use crate::{Served, mistakes, parse, valid};

const GOOD: &str = "\
name: p
input:
  type: object
  additionalProperties: false
  properties: { brief: { type: string, default: x } }
defaults:
  model: sim/quick
stages:
  - id: first
    prompt: Say {{ input.brief }}
  - id: second-one
    needs: [first]
    prompt: |
      Line one
      Use {{ stages.first.output }}
    output: json
    gate:
      checks:
        - min_chars: 3
        - matches: a+
        - expression: output.ok
      judge: { rubric: good, threshold: 0.5 }
output: \"{{ stages['second-one'].output }}\"
";

#[test]
fn limits_that_limit_nothing_say_what_to_write() {
    for nothing in ["concurrency: {}", "concurrency: { max_runs_per_key: 1 }"] {
        let found = mistakes(&GOOD.replace("defaults:", &format!("{nothing}\ndefaults:")));
        let of_it = found.iter().find(|violation| violation.message.contains("limits nothing"));
        let mend = of_it.and_then(|violation| violation.mend.as_deref()).unwrap_or_default();
        assert!(mend.contains("`max_runs`") && mend.contains("`key`"), "{found:?}");
    }
}

#[test]
fn a_key_that_no_schema_declares_is_refused_where_it_is_named() {
    let typed = GOOD
        .replace("    output: json", "    output: { schema: { type: object, properties: { ok: { type: boolean } } } }");
    valid(&typed);
    let told = |source: &str| {
        let found = mistakes(source);
        assert!(found.iter().all(|violation| violation.code == Code::TemplateReference), "{found:?}");
        found.into_iter().map(|violation| (violation.path, violation.mend.unwrap_or_default())).collect::<Vec<_>>()
    };
    let expression = told(&typed.replace("output.ok", "output.okay"));
    assert_eq!(
        expression,
        [("stages[1].gate.checks[2].expression".to_owned(), "did you mean `output.ok`?".to_owned())]
    );
    let mapping = told(&typed.replace("['second-one'].output }}", "['second-one'].output.verdict }}"));
    assert_eq!(mapping[0].0, "output");
    assert!(mapping[0].1.contains("which has: ok"), "{mapping:?}");
    // Where the schema says that there can be others, any may be there.
    let open = typed.replace("{ type: object, properties", "{ type: object, additionalProperties: true, properties");
    valid(&open.replace("output.ok", "output.okay"));
}

/// One edit of the good definition: what is replaced, by what, and the one mistake that it makes.
struct Case(&'static str, &'static str, Code, &'static str, (u32, u32), &'static str, &'static str);

/// What people write who know other tools.
#[rustfmt::skip] // A table.
fn slips() -> Vec<Case> {
    use Code::*;
    vec![
        Case("name: p\n", "name: p\nbudget: 5\n", WrongValue, "budget", (2, 9), "is `5`, but must be a map", "`budget: { max_cost_usd: 5 }`"),
        Case("name: p\n", "name: p\ndeadline: 60\n", WrongValue, "deadline", (2, 11), "is `60`, but must be a text", "did you mean `60s`?"),
        Case("name: p\n", "name: p\ndeadline: '60'\n", WrongValue, "deadline", (2, 11), "`60` is not a length of time", "did you mean `60s`?"),
        Case("name: p\n", "name: p\nconcurrency: 3\n", WrongValue, "concurrency", (2, 14), "must be a map", "`concurrency: { max_runs: 3 }`"),
        Case("name: p\n", "name:\n", WrongValue, "name", (1, 5), "is empty (null)", "give `name` a value"),
        Case("model: sim/quick", "model: sim/quick\n  retry: 3", WrongValue, "defaults.retry", (8, 10), "must be a map", "`retry: { max_attempts: 3 }`"),
        Case("model: sim/quick", "model: sim/quick\n  cache: false", WrongValue, "defaults.cache", (8, 10), "must be a map", "`cache: { mode: off }`"),
        Case("model: sim/quick", "model: sim/quick\n  timeout: 60", WrongValue, "defaults.timeout", (8, 12), "must be a text", "did you mean `60s`?"),
        Case("model: sim/quick", "model: sim/quick\n  params: { max_tokens: 5 }", UnknownKey, "defaults.params.max_tokens", (8, 13), "`max_tokens`", "did you mean `max_output_tokens`?"),
        Case("model: sim/quick", "model: sim/quick\n  params: { reasoning: high }", WrongValue, "defaults.params.reasoning", (8, 24), "must be a map", "`reasoning: { effort: high }`"),
        Case("model: sim/quick", "model: sim/quick\n  params: { n: 3 }", UnknownKey, "defaults.params.n", (8, 13), "`n`", "`sample`"),
        Case("model: sim/quick", "model: sim/quick\n  params: { extra: { stream: true } }", WrongValue, "defaults.params.extra.stream", (8, 22), "`stream` is not passed on", "taken whole"),
        Case("name: p\n", "name: p\nsteps: []\n", UnknownKey, "steps", (2, 1), "`steps`", "did you mean `stages`?"),
        Case("    needs: [first]\n", "    needs: [first]\n    depends_on: [first]\n", UnknownKey, "stages[1].depends_on", (13, 5), "`depends_on`", "did you mean `needs`?"),
        Case("needs: [first]", "needs: first", WrongValue, "stages[1].needs", (12, 12), "must be a list", "`needs: [first]`"),
        Case("    output: json\n", "    output: json\n    max_tokens: 9\n", UnknownKey, "stages[1].max_tokens", (17, 5), "`max_tokens`", "`params: { max_output_tokens: … }`"),
        Case("judge: { rubric: good, threshold: 0.5 }", "judge: Is it good?", WrongValue, "stages[1].gate.judge", (22, 14), "must be a map", "`judge: { rubric: \"…\" }`"),
        Case("judge: { rubric: good, threshold: 0.5 }", "approval: true", UnknownKey, "stages[1].gate.approval", (22, 7), "`approval`", "`on_pass: hold`"),
        Case("rubric: good", "rubric: good, prompt: '{{ output }}'", WrongValue, "stages[1].gate.judge.prompt", (22, 30), "exclude each other", "keep one"),
        Case("rubric: good", "prompt: good", TemplateReference, "stages[1].gate.judge.prompt", (22, 24), "does not show what is to be judged", "{{ output }}"),
        Case("threshold: 0.5", "scale: pass_fail, threshold: 0.5", WrongValue, "stages[1].gate.judge.threshold", (22, 48), "has no threshold", "remove it"),
        Case("threshold: 0.5", "scale: 1..5, threshold: 0.5", WrongValue, "stages[1].gate.judge.threshold", (22, 54), "at least 1", "the judge's scale"),
        Case("threshold: 0.5", "scale: 1..9", WrongValue, "stages[1].gate.judge.scale", (22, 37), "`1..9`", ""),
        Case("prompt: Say {{ input.brief }}", "messages: { from: input.brif }", TemplateReference, "stages[0].messages.from", (10, 23), "no `brif`", "input.brief"),
        Case("prompt: Say {{ input.brief }}", "messages: { form: input.brief }", UnknownKey, "stages[0].messages.form", (10, 17), "`form`", "did you mean `from`?"),
        Case("prompt: Say {{ input.brief }}", "messages: Say it", WrongValue, "stages[0].messages", (10, 15), "which is no conversation", "{ from: input.history }"),
        Case("prompt: Say {{ input.brief }}", "prompt_file: prompts/a.md", WrongValue, "stages[0].prompt_file", (10, 18), "did not come with the definition", "`{ \"definition\": …"),
        Case("prompt: Say {{ input.brief }}", "prompt_file: ../a.md", WrongValue, "stages[0].prompt_file", (10, 18), "leaves the definition's directory", "prompts/draft.md"),
        Case("Say {{ input.brief }}", "\"{{ input.brief.uper() }}\"", TemplateReference, "stages[0].prompt", (10, 13), "no method `uper`", "did you mean `upper`?"),
        Case("type: string, default: x", "type: string", TemplateReference, "stages[0].prompt", (10, 13), "`input.brief` may be left out", "`required`"),
        Case("type: string, default: x", "type: string, default: 5", InvalidSchema, "input.properties.brief.default", (5, 49), "the default is `5`, but must be a text", "fits its schema"),
    ]
}

#[rustfmt::skip] // A table.
fn cases() -> Vec<Case> {
    use Code::*;
    vec![
        // Form
        Case("name: p\n", "name: p\nnaem: q\n", UnknownKey, "naem", (2, 1), "unknown key `naem`", "did you mean `name`?"),
        Case("name: p\n", "name: p\nzzzzzzzz: q\n", UnknownKey, "zzzzzzzz", (2, 1), "unknown key", "known keys: name, description"),
        Case("    output: json\n", "    otuput: json\n", UnknownKey, "stages[1].otuput", (16, 5), "`otuput`", "`output`"),
        Case("prompt: Say", "prmpt: Say", UnknownKey, "stages[0].prmpt", (10, 5), "`prmpt`", "did you mean `prompt`?"),
        Case("threshold: 0.5", "treshold: 0.5", UnknownKey, "stages[1].gate.judge.treshold", (22, 30), "`treshold`", "`threshold`"),
        Case("name: p\n", "", MissingKey, "name", (1, 1), "`name` is missing", "add `name:`"),
        Case("  - id: first\n    prompt", "  - prompt", MissingKey, "stages[0].id", (9, 5), "`id` is missing", "add `id:`"),
        Case("rubric: good, ", "", MissingKey, "stages[1].gate.judge.rubric", (22, 14), "`rubric` is missing", "add `rubric:`"),
        Case("name: p\n", "name: My Pipeline\n", WrongValue, "name", (1, 7), "`My Pipeline` is not a valid pipeline name", "a-z, 0-9"),
        Case("name: p\n", "name: 7\n", WrongValue, "name", (1, 7), "is `7`, but must be a text", ""),
        Case("name: p\n", "name: p\nbudget: { max_cost_usd: 0 }\n", WrongValue, "budget.max_cost_usd", (2, 25), "must be more than 0", ""),
        Case("name: p\n", "name: p\ndeadline: soon\n", WrongValue, "deadline", (2, 11), "`soon` is not a length of time", "`30s`"),
        Case("name: p\n", "name: p\ndeadline: 5 parsecs\n", WrongValue, "deadline", (2, 11), "`5 parsecs` is not a length of time", "`30s`"),
        Case("threshold: 0.5", "threshold: 1.5", WrongValue, "stages[1].gate.judge.threshold", (22, 41), "is `1.5`, but must be at most 1", "`scale: 1..5`"),
        Case("min_chars: 3", "min_chars: three", WrongValue, "stages[1].gate.checks[0].min_chars", (19, 22), "must be a whole number", ""),
        Case("min_chars: 3", "min_chrs: 3", UnknownKey, "stages[1].gate.checks[0].min_chrs", (19, 11), "`min_chrs`", "did you mean `min_chars`?"),
        Case("min_chars: 3", "{ min_chars: 3, max_chars: 9 }", WrongValue, "stages[1].gate.checks[0]", (19, 11), "has 2 keys", "one item per check"),
        Case("- min_chars: 3", "- min_chars", WrongValue, "stages[1].gate.checks[0]", (19, 11), "a check is a map with a single key", "`- min_chars: 400`"),
        Case("output: json", "output: jsn", WrongValue, "stages[1].output", (16, 13), "no output format", "did you mean `json`?"),
        Case("output: json", "output: [1]", WrongValue, "stages[1].output", (16, 13), "no output format", "`{ schema: … }`"),
        Case("output: json", "output: { shcema: {} }", UnknownKey, "stages[1].output.shcema", (16, 15), "`shcema`", "did you mean `schema`?"),
        Case("model: sim/quick", "model: gpt-5", WrongValue, "defaults.model", (7, 10), "`gpt-5` is not a valid model", "write `provider/model`"),
        Case("model: sim/quick", "model: [sim/quick, gpt-5]", WrongValue, "defaults.model[1]", (7, 22), "`gpt-5` is not a valid model", "write `provider/model`"),
        Case("model: sim/quick", "model: []", WrongValue, "defaults.model", (7, 10), "has 0 items", ""),
        Case("model: sim/quick", "model: { a: b }", WrongValue, "defaults.model", (7, 10), "is a map, but a model is a text", "`provider/model`"),
        Case("model: sim/quick", "model: sim/quick\n  retry: { backoff: 30s..1s }", WrongValue, "defaults.retry.backoff", (8, 21), "`30s..1s` is no back-off", "`1s..30s`"),
        Case("model: sim/quick", "model: sim/quick\n  cache: { mode: of }", WrongValue, "defaults.cache.mode", (8, 18), "the text `of`", "did you mean `off`?"),
        Case("model: sim/quick", "model: sim/quick\n  params: { temperature: 3 }", WrongValue, "defaults.params.temperature", (8, 26), "at most 2", ""),
        Case("id: first", "id: First Stage", WrongValue, "stages[0].id", (9, 9), "`First Stage` is not a valid stage id", "a-z, 0-9"),
        // Meaning
        Case("id: second-one", "id: first", Duplicate, "stages[1].id", (11, 9), "given twice", "rename"),
        Case("needs: [first]", "needs: [frist]", UnknownNeed, "stages[1].needs[0]", (12, 13), "no stage `frist`", "did you mean `first`?"),
        Case("needs: [first]", "needs: [first, first]", Duplicate, "stages[1].needs[1]", (12, 20), "needed twice", "remove"),
        Case("needs: [first]", "needs: [first, second-one]", Cycle, "stages[1].needs[1]", (12, 20), "needs itself", "remove"),
        Case("id: first\n", "id: first\n    needs: [second-one]\n", Cycle, "stages[0].needs", (10, 12), "first → second-one → first", "remove one"),
        Case("    prompt: Say {{ input.brief }}\n", "", MissingKey, "stages[0]", (9, 5), "does nothing", "add `prompt:`"),
        Case("prompt: Say", "transform: x\n    prompt: Say", WrongValue, "stages[0].transform", (10, 5), "`prompt` and `transform` exclude each other", "keep one"),
        Case("prompt: Say", "system: x\n    transform: Say", WrongValue, "stages[0].system", (10, 5), "`system` goes with `prompt`", "role: system"),
        Case("prompt: Say", "params: {}\n    transform: Say", WrongValue, "stages[0].params", (10, 5), "`params` means nothing", "remove it"),
        Case("prompt: Say {{ input.brief }}", "messages: [{ role: system, content: x }]", WrongValue, "stages[0].messages", (10, 15), "nothing is asked", "role: user"),
        Case("prompt: Say {{ input.brief }}", "transform: x\n    gate: { judge: { rubric: x } }", MissingKey, "stages[0].gate.judge.model", (11, 20), "no model that its judge", "to the judge"),
        Case("model: sim/quick", "timeout: 5s", MissingKey, "stages[0].model", (9, 5), "no model is named", "in `defaults`"),
        Case("Say {{ input.brief }}", "Say {{ input.brief", TemplateSyntax, "stages[0].prompt", (10, 13), "could not be parsed", ""),
        Case("Use {{", "Use {% include 'x' %}{{", TemplateSyntax, "stages[1].prompt", (15, 7), "unknown statement", "includes"),
        Case("Use {{ stages.first", "Use {{ stages.frist", TemplateReference, "stages[1].prompt", (15, 14), "no stage `frist`", "stages.first.output"),
        Case("    needs: [first]\n", "", TemplateReference, "stages[1].prompt", (14, 14), "`first` is not upstream", "add `first` to `needs`"),
        Case("input.brief", "input.breif", TemplateReference, "stages[0].prompt", (10, 13), "no `breif`", "`input.brief`"),
        Case("rubric: good", "rubric: \"{{ stages['third'].output }}\"", TemplateReference, "stages[1].gate.judge.rubric", (22, 24), "no stage `third`", "known stages"),
        Case("stages['second-one']", "stages['second']", TemplateReference, "output", (23, 9), "no stage `second`", "stages['second-one'].output"),
        Case("expression: output.ok", "expression: outptu.ok", TemplateReference, "stages[1].gate.checks[2].expression", (21, 23), "no `outptu`", "`output`"),
        Case("expression: output.ok", "expression: output ==", InvalidExpression, "stages[1].gate.checks[2].expression", (21, 23), "the expression could not be parsed", ""),
        Case("matches: a+", "matches: \"(a\"", InvalidExpression, "stages[1].gate.checks[1].matches", (20, 20), "unclosed group", "docs.rs/regex"),
        Case("matches: a+", "matches: \"(a{1000}){1000}\"", InvalidExpression, "stages[1].gate.checks[1].matches", (20, 20), "does not compile", "docs.rs/regex"),
        Case("  type: object\n", "  type: objct\n", InvalidSchema, "input.type", (3, 9), "objct", ""),
        Case("output: json", "output: { schema: { $ref: \"https://example.com/x\" } }", InvalidSchema, "stages[1].output.schema.$ref", (16, 31), "nothing is fetched", "$defs"),
        Case("output: json", "output: { schema: { $ref: \"#/$defs/x\" } }", InvalidSchema, "stages[1].output.schema", (16, 23), "does not compile", ""),
        Case("output: json", "output: { schema: { pattern: \"(?=a)b\" } }", InvalidSchema, "stages[1].output.schema.pattern", (16, 34), "look-around is not part of this engine", "not_matches"),
        Case("output: json", "output: { schema: { pattern: \"^.{1,10000}$\" } }", InvalidSchema, "stages[1].output.schema.pattern", (16, 34), "a program of more than", "maxLength"),
        Case("output: json", "output: { schema: { pattern: \"(a)\\\\1\" } }", InvalidSchema, "stages[1].output.schema.pattern", (16, 34), "back-references", "write out"),
        Case("output: json", "output: { schema: { patternProperties: { \"(?!a)\": true } } }", InvalidSchema, "stages[1].output.schema.patternProperties[\"(?!a)\"]", (16, 55), "look-around", "must match"),
        Case("output: json", "output: {}", MissingKey, "stages[1].output.schema", (16, 13), "`schema` is missing", "JSON Schema"),
        Case("output: json", "output: { type: object }", UnknownKey, "stages[1].output.type", (16, 15), "`type`", "`output: { schema: { … } }`"),
        Case("output: json", "output: { schema: { $schema: \"https://example.com/s\" } }", InvalidSchema, "stages[1].output.schema.$schema", (16, 34), "no known draft", "2020-12"),
        Case("output: json", "output: { schema: 5 }", InvalidSchema, "stages[1].output.schema", (16, 23), "", ""),
        // Models
        Case("model: sim/quick", "model: grok/x", UnknownModel, "defaults.model", (7, 10), "no provider `grok`", ""),
        Case("model: sim/quick", "model: [sim/quick, anthropic/x]", ProviderWithoutKey, "defaults.model[1]", (7, 22), "ANTHROPIC_API_KEY", ""),
        Case("model: sim/quick", "model: [sim/quick, sim/quick]", Duplicate, "defaults.model[1]", (7, 22), "twice", "remove"),
        Case("threshold: 0.5", "model: grok/x", UnknownModel, "stages[1].gate.judge.model", (22, 37), "no provider `grok`", ""),
        Case("model: sim/quick", "model: sim/unpriced\nbudget: { max_cost_usd: 1 }", BudgetUnpriced, "defaults.model", (7, 10), "`sim/unpriced` has no price", "price table"),
        // Text
        Case("  - id: first\n", "  - id: first\n    id: other\n", Duplicate, "stages[0].id", (10, 5), "given twice, first on line 9", "remove or rename"),
        Case("name: p\n", "name: !ruby p\n", WrongValue, "", (1, 13), "the tag `!ruby`", "remove the tag"),
    ]
}

#[test]
fn every_mistake_names_its_place_and_its_mend() {
    valid(GOOD);
    let mut wrong = Vec::new();
    for Case(from, to, code, path, place, message, mend) in cases().into_iter().chain(slips()) {
        assert!(GOOD.contains(from), "{from}");
        let found = mistakes(&GOOD.replacen(from, to, 1));
        // Without its id or its model more than one stage is wrong; all else is one mistake, told once.
        let is_wide = to.contains("id: ") || to.contains("- prompt") || to == "timeout: 5s";
        let of_code: Vec<_> = found.iter().filter(|v| v.code == code && v.path == path).collect();
        let is_right = matches!(of_code.as_slice(), [violation]
            if (violation.line, violation.column) == (Some(place.0), Some(place.1))
                && violation.message.contains(message)
                && violation.mend.as_deref().unwrap_or_default().contains(mend));
        if !is_right || (found.len() > 1 && !is_wide) {
            let told: Vec<String> = found.iter().map(ToString::to_string).collect();
            wrong.push(format!("{to}\n  wanted {code} {path} {place:?}: {message} ({mend})\n  {}", told.join("\n  ")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_template_without_quotes_is_told_as_that() {
    for text in ["prompt: {{ input.brief }}", "prompt: {{ input.brief }} and more", "needs: [{{ x }}]"] {
        let found = mistakes(&GOOD.replace("prompt: Say {{ input.brief }}", text));
        let told = found.iter().any(|v| v.mend.as_deref().is_some_and(|mend| mend.contains("stands in quotes")));
        assert!(told, "{text}: {found:#?}");
    }
}

#[test]
fn null_means_left_out_and_keys_with_x_are_for_anchors() {
    let plain = valid(GOOD);
    let more = GOOD
        .replace("name: p\n", "name: p\ndescription:\nbudget: null\nconcurrency: ~\nx-note: { any: [1] }\n")
        .replace("    prompt: Say", "    needs: null\n    system: null\n    gate:\n    x-b: 1\n    prompt: Say")
        .replace("threshold: 0.5 }", "threshold: 0.5, model: null, params: null, x-c: 2 }");
    let same = valid(&more);
    assert_eq!((same.digest, &same.definition), (plain.digest, &plain.definition));
    let published = jsonschema::validator_for(&definition_schema()).expect("compiles");
    assert!(published.is_valid(&json!({
        "name": "p", "budget": null, "x-any": 1,
        "stages": [{ "id": "a", "prompt": "x", "needs": null, "output": null, "gate": null, "x-b": [] }]
    })));
    assert_eq!(mistakes(&GOOD.replace("name: p", "name: null"))[0].path, "name");
    assert_eq!(mistakes(&GOOD.replace("id: first", "id: null"))[0].path, "stages[0].id");
    let mapping = valid(&GOOD.replace("output: \"{{ stages", "output:\n  x-kept: null\n  y: \"{{ stages"));
    assert_eq!(mapping.definition["output"]["x-kept"], Value::Null, "an author's own data stays as it is");
}

#[test]
fn merge_keys_take_an_anchors_keys_and_never_replace_ones_own() {
    let text = "\
name: p
x-base: &base { model: sim/quick, timeout: 5s, needs: [] }
x-more: &more { timeout: 9s, sample: 3 }
stages:
  - { id: a, <<: *base, prompt: one, timeout: 7s }
  - { id: b, <<: [*base, *more], prompt: two }
";
    let stages = &valid(text).definition["stages"];
    assert_eq!(stages[0], json!({ "id": "a", "model": "sim/quick", "timeout": "7s", "prompt": "one", "needs": [] }));
    assert_eq!(stages[1]["timeout"], "5s");
    assert_eq!(stages[1]["sample"], 3);
    let found = mistakes(&text.replace("<<: *base", "<<: 5"));
    assert!(found.iter().any(|v| v.message.contains("merges a map") && v.line == Some(5)), "{found:#?}");
    let wrong = mistakes(&text.replace("timeout: 5s", "timeuot: 5s"));
    assert_eq!((wrong[0].path.as_str(), wrong[0].line), ("stages[0].timeuot", Some(5)), "{wrong:#?}");
    let quoted = mistakes(&text.replace("{ id: b, <<:", "{ id: b, \"<<\":"));
    assert!(
        quoted.iter().any(|v| v.code == Code::UnknownKey && v.message.contains("<<")),
        "a text is a text: {quoted:#?}"
    );
}

#[test]
fn line_ends_and_a_byte_order_mark_make_no_difference() {
    let plain = valid(GOOD);
    let json = plain.definition.to_string();
    for text in [GOOD.replace('\n', "\r\n"), format!("\u{feff}{GOOD}"), format!("\u{feff}{json}\r\n")] {
        let same = valid(&text);
        assert_eq!((same.digest, &same.definition), (plain.digest, &plain.definition));
    }
}

#[test]
fn what_a_definitions_files_hold_becomes_a_part_of_it() {
    let text = GOOD
        .replace("prompt: Say {{ input.brief }}", "prompt_file: ./a.md\n    system_file: sub/b.md")
        .replace("output: json", "output: { schema_file: c.yaml }")
        .replace("rubric: good", "rubric_file: d.md");
    let files = [
        ("a.md", "Say\r\n{{ input.brief }}"),
        ("sub/b.md", "Be brief."),
        ("c.yaml", "type: object\nrequired: [ok]\nproperties: { ok: { type: boolean } }\n"),
        ("d.md", "good"),
    ];
    let bundle = |change: (&str, &str)| Bundle {
        definition: text.clone(),
        files: files
            .iter()
            .map(|(name, text)| ((*name).to_owned(), if *name == change.0 { change.1 } else { text }.to_owned()))
            .collect(),
    };
    assert_eq!(bundle(("", "")).file_names(), ["a.md", "sub/b.md", "c.yaml", "d.md"]);
    let pipeline = Pipeline::parse_bundle(&bundle(("", "")), &Served).expect("valid");
    let stages = &pipeline.definition["stages"];
    assert_eq!(stages[0]["prompt"], "Say\n{{ input.brief }}");
    assert_eq!((&stages[0]["system"], stages[0].get("prompt_file")), (&json!("Be brief."), None));
    assert_eq!(stages[1]["output"]["schema"]["required"], json!(["ok"]));
    assert_eq!(stages[1]["gate"]["judge"]["rubric"], "good");
    Pipeline::from_stored(pipeline.definition).expect("what is stored needs no files");
    for (change, path, message) in [
        (("a.md", "one\n{{ input.breif }}"), "stages[0].prompt", "(in line 2 of the text)"),
        (("c.yaml", "type: ["), "stages[1].output.schema_file", "is no schema"),
        (("c.yaml", "type: objct"), "stages[1].output.schema.type", "objct"),
        (("d.md", "{{ x }}"), "stages[1].gate.judge.rubric", "no `x`"),
    ] {
        let found = Pipeline::parse_bundle(&bundle(change), &Served).expect_err("a mistake");
        let of_it = found.iter().find(|v| v.path == path && v.message.contains(message));
        assert!(of_it.is_some_and(|v| v.line.is_some()), "{change:?}: {found:#?}");
    }
    let both = text.replace("prompt_file", "prompt: x\n    prompt_file");
    let found = Pipeline::parse_bundle(&Bundle { definition: both, ..bundle(("", "")) }, &Served).expect_err("both");
    assert!(found.iter().any(|v| v.message.contains("exclude each other")), "{found:#?}");
}

#[test]
fn files_that_are_named_often_make_no_definition_larger_than_one_may_be() {
    let schema = format!("{{\"enum\": [{}0]}}", "0,".repeat(4_000));
    let files = [("large.md".to_owned(), "x".repeat(1024 * 1024)), ("s.json".to_owned(), schema)];
    let bundle = |stage: &str, count: usize| {
        let stages: Vec<String> =
            (0..count).map(|n| format!("{{\"id\":\"s{n}\",\"model\":\"sim/quick\",{stage}}}")).collect();
        let definition = format!("{{\"name\":\"p\",\"stages\":[{}]}}", stages.join(","));
        Bundle { definition, files: files.clone().into() }
    };
    for (stage, count) in [
        (r#""prompt_file":"large.md""#, 100),
        (r#""prompt_file":"large.md""#, 5_000),
        (r#""prompt":"x","output":{"schema_file":"s.json"}"#, 90),
    ] {
        let found = Pipeline::parse_bundle(&bundle(stage, count), &Served).expect_err("too large");
        assert!(found.len() <= 100 && found.iter().any(|v| v.code == Code::DefinitionTooLarge), "{stage}: {found:?}");
        let bytes: usize = found.iter().map(|v| v.message.len()).sum();
        assert!(bytes < 1024 * 1024, "{bytes}");
    }
    let few = Pipeline::parse_bundle(&bundle(r#""prompt":"x","output":{"schema_file":"s.json"}"#, 5), &Served);
    assert!(few.is_ok(), "{few:?}");
}

#[test]
fn defaults_that_do_not_fit_are_told_wherever_they_are_filled_in() {
    let found = |input: &str| {
        let text = format!("{{name: p, input: {input}, stages: [{{id: s, transform: x}}]}}");
        Pipeline::parse(&text, &Served)
            .map(|_| ())
            .map_err(|found| found.into_iter().map(|v| v.path).collect::<Vec<_>>())
    };
    let at = |path: &str| Err(vec![path.to_owned()]);
    assert_eq!(
        found("{type: object, properties: {a: {type: string, default: null}}}"),
        at("input.properties.a.default")
    );
    assert_eq!(
        found("{type: object, properties: {m: {type: object, properties: {a: {type: string, default: 1}}}}}"),
        at("input.properties.m.properties.a.default")
    );
    assert_eq!(
        found("{type: object, properties: {m: {type: object, required: [k], default: {}}}}"),
        at("input.properties.m.default")
    );
    assert_eq!(found("{type: object, maxProperties: 1, properties: {a: {default: 1}, b: {default: 1}}}"), at("input"));
    assert_eq!(found("{type: object, required: [k], properties: {k: {type: string}, a: {default: 1}}}"), Ok(()));
}

#[test]
fn what_relies_on_defaults_of_the_input_is_newer_than_the_release_before() {
    let newest = |template: &str| {
        let input = "{type: object, required: [r], properties: {a: {default: 1}, r: {default: 1}}}";
        let text = format!("{{name: p, input: {input}, stages: [{{id: s, transform: \"{template}\"}}]}}");
        Pipeline::parse(&text, &Served).expect("valid").newest().map(str::to_owned)
    };
    assert!(newest("{{ input.a }}").is_some_and(|what| what.contains("input.a")));
    assert_eq!(
        newest("{{ input.r }}{{ input.a | default(2) }}{% if input.a is defined %}{{ input.a }}{% endif %}"),
        None
    );
}

#[test]
fn a_judges_prompt_asks_for_what_the_output_may_leave_out() {
    let check = |prompt: &str, required: &str| {
        let text = format!(
            "{{name: p, stages: [{{id: s, model: sim/quick, prompt: x, output: {{schema: {{type: object, required: {required}, \
             properties: {{a: {{type: string}}}}}}}}, gate: {{judge: {{prompt: \"{prompt}\"}}}}}}]}}"
        );
        Pipeline::parse(&text, &Served).map(|_| ())
    };
    let found = check("{{ output.a }}", "[]").expect_err("it may be missing");
    assert!(found[0].message.contains("`output.a` may be left out"), "{found:?}");
    assert_eq!(check("{{ output.a | default('-') }}", "[]"), Ok(()));
    assert_eq!(check("{{ output.a }}", "[a]"), Ok(()));
}

#[test]
fn every_mistake_is_told_at_once_in_the_order_of_the_text() {
    use Code::*;
    let text = "\
nam: p
defaults:
  model: grok/x
  timeout: never
stages:
  - id: a
    needs: [b]
    prompt: \"{{ x }} {{ input.a }}\"
    gate: { checks: [ { matches: '(' }, { min_chars: -1 }, { schema: { type: nope } } ], judge: { threshold: 2 } }
  - id: b
    needs: [a, zz]
    retry: { max_attempts: 0 }
    prompt: \"{{ stages.c.output }}\"
  - id: b
    transform: \"{% if %}\"
    output: xml
output: { x: \"{{ stages.q.output }}\" }
";
    let found = mistakes(text);
    let places: Vec<_> = found.iter().map(|v| (v.line.unwrap_or(0), v.code)).collect();
    assert_eq!(
        places,
        [
            (1, UnknownKey),
            (3, UnknownModel),
            (4, WrongValue),
            (7, Cycle),
            (8, TemplateReference),
            (9, InvalidExpression),
            (9, WrongValue),
            (9, InvalidSchema),
            (9, MissingKey),
            (9, WrongValue),
            (11, UnknownNeed),
            (12, WrongValue),
            (13, TemplateReference),
            (14, Duplicate),
            (15, TemplateSyntax),
            (16, WrongValue),
            (17, TemplateReference),
        ],
        "{found:#?}"
    );
}

#[test]
fn what_is_no_definition_at_all_is_told_shortly() {
    for (text, code) in [
        ("", Code::Syntax),
        ("just text", Code::WrongValue),
        ("[1, 2]", Code::WrongValue),
        ("a: [", Code::Syntax),
        ("{\"name\": ]}", Code::Syntax),
        ("a: &a [*a]", Code::Syntax),
    ] {
        let found = mistakes(text);
        assert_eq!(found.iter().map(|v| v.code).collect::<Vec<_>>(), [code], "{text}: {found:?}");
    }
    let many = (0..5_000).map(|n| format!("key{n}: 1\n")).collect::<Vec<_>>().concat();
    assert!(mistakes(&many).len() <= 100);
    let stages = (0..101).map(|n| format!("- {{ id: s{n}, transform: x }}\n")).collect::<Vec<_>>().concat();
    let found = mistakes(&format!("name: p\nstages:\n{stages}"));
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].message.contains("has 101 items, but must have at most 100"), "{found:?}");
}

#[test]
fn regular_expressions_are_few_and_small() {
    let checks = vec!["{ matches: 'a+' }"; 50].join(",");
    let stage = |n| format!("- {{ id: s{n}, transform: x, gate: {{ checks: [{checks}] }} }}\n");
    let text = |stages: usize| format!("name: p\nstages:\n{}", (0..stages).map(stage).collect::<Vec<_>>().concat());
    valid(&text(4));
    let found = mistakes(&text(5));
    assert_eq!(found.iter().map(|v| v.code).collect::<Vec<_>>(), [Code::DefinitionTooLarge]);
    let properties: Vec<_> = (0..201).map(|n| format!("p{n}: {{ pattern: a }}")).collect();
    let found = mistakes(&format!(
        "name: p\ninput: {{ properties: {{ {} }} }}\nstages: [{{ id: a, transform: x }}]",
        properties.join(", ")
    ));
    assert_eq!(found.iter().map(|v| v.code).collect::<Vec<_>>(), [Code::DefinitionTooLarge]);
}

#[test]
fn yaml_and_json_in_any_order_are_the_same_content() {
    let yaml = valid(GOOD);
    let json = serde_json::to_string(&yaml.definition).expect("json");
    let pretty = serde_json::to_string_pretty(&yaml.definition).expect("json").replace("  ", "\t");
    let (head, tail) = GOOD.split_once("stages:\n").expect("stages");
    let (stages, output) = tail.split_once("output: \"").expect("output");
    let turned = format!("output: \"{output}stages:\n{stages}{head}");
    for text in [json.as_str(), pretty.as_str(), turned.as_str(), &format!("# note\n{GOOD}")] {
        let same = valid(text);
        assert_eq!((same.digest, &same.definition), (yaml.digest, &yaml.definition), "{text}");
    }
    assert_eq!(
        json,
        serde_json::to_string(&Pipeline::from_stored(yaml.definition.clone()).expect("valid").definition)
            .expect("json")
    );
    assert_ne!(valid(&GOOD.replace("Say", "Tell")).digest, yaml.digest);
}

#[test]
fn a_stored_definition_needs_no_provider() {
    let unserved = GOOD.replace("sim/quick", "grok/x");
    assert!(parse(&unserved).is_err());
    let stored = valid(GOOD).definition.to_string().replace("sim/quick", "grok/x");
    let stored: Value = serde_json::from_str(&stored).expect("json");
    assert!(Pipeline::from_stored(stored).is_ok());
    let found = Pipeline::from_stored(json!({"name": "p", "stages": [{"id": "a"}]})).expect_err("empty stage");
    assert_eq!((found[0].code, found[0].line), (Code::MissingKey, None));
}

#[test]
fn defaults_are_resolved_into_each_stage() {
    let pipeline = valid(
        "\
name: p
defaults:
  model: [sim/a, sim/b]
  params: { temperature: 0.5, max_output_tokens: 10, stop: [x] }
  timeout: 5s
  cache: { mode: read_only }
stages:
  - { id: late, needs: [early], prompt: \"{{ stages.early.output }}\", params: { temperature: 1, stop: [y] }, gate: { judge: { rubric: r } } }
  - { id: early, prompt: hello, model: sim/c, timeout: 2m, cache: { ttl: 1h } }
  - { id: fixed, transform: text }
",
    );
    let ids: Vec<_> = pipeline.stages.iter().map(|stage| stage.id.as_str()).collect();
    assert_eq!(ids, ["early", "late", "fixed"]);
    let shown = format!("{:?}", pipeline.stages[1]);
    for part in
        ["temperature: Some(1.0)", "max_output_tokens: Some(10)", "[\"y\"]", "ReadOnly", "timeout: 5s", "needs: [0]"]
    {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    assert_eq!(pipeline.stages[0].dependents, [1]);
    let judge = pipeline.stages[1].gate.judge.as_ref().and_then(|judge| judge.model.as_ref()).expect("resolved");
    assert_eq!(judge.models().iter().map(ToString::to_string).collect::<Vec<_>>(), ["sim/a", "sim/b"]);
    assert_eq!((pipeline.deadline.as_secs(), pipeline.stages[0].timeout.as_secs()), (24 * 3600, 120));
}

#[test]
fn schemas_that_refer_to_themselves_do_not_run_away() {
    for schema in [
        r##"{"$ref": "#"}"##,
        r##"{"allOf": [{"$ref": "#"}]}"##,
        r##"{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}"##,
        r##"{"type": ["object", "string"], "properties": {"a": {"$ref": "#"}}}"##,
        r##"{"anyOf": [{"$ref": "#"}, {"type": "object"}]}"##,
        r##"{"$dynamicAnchor": "x", "$dynamicRef": "#x"}"##,
    ] {
        let text =
            format!("{{\"name\": \"p\", \"input\": {schema}, \"stages\": [{{\"id\": \"a\", \"transform\": \"x\"}}]}}");
        if let Ok(pipeline) = parse(&text) {
            let _ = pipeline.check_input(&json!({"a": {"a": "x"}}));
        }
    }
}

#[test]
fn the_published_schema_takes_what_is_valid() {
    let schema = definition_schema();
    let validator = jsonschema::validator_for(&schema).expect("compiles");
    assert!(validator.is_valid(&valid(GOOD).definition));
    assert!(!validator.is_valid(&json!({"name": "p", "stages": [{"id": "a", "prompt": "x", "transform": "y"}]})));
    assert!(!validator.is_valid(&json!({"name": "p", "stages": []})));
}

#[test]
fn deep_and_explosive_documents_are_refused() {
    let mut bomb = String::from("name: p\nx0: &x0 [a,a,a,a,a,a,a,a,a]\n");
    for level in 1..12 {
        let inner = vec![format!("*x{}", level - 1); 9].join(",");
        bomb = format!("{bomb}x{level}: &x{level} [{inner}]\n");
    }
    // Each anchor keeps a copy of what is in it: forty of them around one large value would keep forty of it.
    let many = vec!["*t"; 90_000].join(",");
    let copies = format!(
        "t: &t a\nname: {}[{many}]{}",
        (0..40).map(|n| format!("&k{n} [")).collect::<Vec<_>>().concat(),
        "]".repeat(40)
    );
    for text in [
        bomb,
        copies,
        format!("name: {}{}", "[".repeat(500), "]".repeat(500)),
        format!("{{\"name\": {}", "[".repeat(100_000)),
    ] {
        let found = mistakes(&text);
        assert_eq!(found.last().map(|v| v.code), Some(Code::DefinitionTooLarge), "{found:?}");
    }
}

#[test]
fn no_more_mistakes_are_told_than_anybody_reads() {
    let tags = "  - !!none a\n".repeat(5_000);
    let found = mistakes(&format!("name:\n{tags}stages: ]\n"));
    assert!(found.len() <= 101, "{}", found.len());
    assert_eq!(found.last().map(|v| v.code), Some(Code::Syntax), "the last one is why it was given up");
}

#[test]
fn schemas_whose_branches_multiply_are_refused_or_take_shallow_values_alone() {
    let text =
        |schema: &Value| json!({"name": "p", "input": schema, "stages": [{"id": "a", "transform": "x"}]}).to_string();
    let mut definitions: serde_json::Map<String, Value> = (0..40)
        .map(|level| {
            let next = json!({"$ref": format!("#/$defs/d{}", level + 1)});
            (format!("d{level}"), json!({"allOf": [next, next]}))
        })
        .collect();
    definitions.insert("d40".to_owned(), json!({"type": "string"}));
    let found = mistakes(&text(&json!({"$ref": "#/$defs/d0", "$defs": definitions})));
    assert_eq!(found.iter().map(|v| v.code).collect::<Vec<_>>(), [Code::InvalidSchema], "{found:?}");

    let branch = json!({"properties": {"a": {"$ref": "#"}}});
    let pipeline = valid(&text(&json!({"type": "object", "anyOf": [branch, branch]})));
    let nested = |levels| (0..levels).fold(json!({}), |inner, _| json!({"a": inner}));
    assert!(pipeline.check_input(&nested(5)).is_ok());
    let refused = pipeline.check_input(&nested(60)).expect_err("2^60 steps");
    assert!(refused[0].message.contains("nested too deeply"), "{refused:?}");
    assert_eq!((refused[0].code, refused[0].path.as_str()), (Code::InvalidInput, "input"));
}

#[test]
fn properties_that_are_called_like_keywords_are_no_keywords() {
    let pipeline = valid(
        "name: p\ninput: { properties: { default: { pattern: a }, enum: { type: integer }, $ref: { type: string } } }\n\
         stages: [{ id: a, transform: x }]",
    );
    assert!(pipeline.check_input(&json!({"enum": "x"})).is_err());
    let outside =
        "name: p\ninput: { properties: { default: { $ref: 'other.json' } } }\nstages: [{ id: a, transform: x }]";
    let found = mistakes(outside);
    assert!(found[0].message.contains("nothing is fetched"), "{found:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn no_text_makes_it_panic(text in "[ -~\\n\\t{}\\[\\]:&*|>é\u{1F600}-]{0,200}") {
        let _ = parse(&text);
    }

    #[test]
    fn no_edit_of_a_definition_makes_it_panic(at in 0_usize..GOOD.len(), cut in 0_usize..12, put in "[ -~\\n{}\\[\\]:&*|>%é'\"-]{0,8}") {
        let end = (at + cut).min(GOOD.len());
        let text = format!("{}{put}{}", &GOOD[..at], &GOOD[end..]);
        if let Err(found) = parse(&text) {
            prop_assert!(!found.is_empty());
            prop_assert!(found.iter().all(|violation| !violation.message.is_empty() && violation.message.len() < 2_000));
        }
    }

    #[test]
    fn a_value_of_any_type_anywhere_is_told_not_trusted(pick in 0_usize..1000, put in 0_usize..7) {
        let mut definition = valid(GOOD).definition;
        let pointers = pointers(&definition);
        let values = [json!(null), json!(true), json!(-7), json!(1.5e300), json!("{{"), json!([[]]), json!({"a": 1})];
        if let Some(place) = definition.pointer_mut(&pointers[pick % pointers.len()]) {
            *place = values[put].clone();
        }
        let _ = Pipeline::parse(&definition.to_string(), &Served);
    }
}

/// Every place in a value, as JSON pointers.
fn pointers(value: &Value) -> Vec<String> {
    let inner: Vec<(String, &Value)> = match value {
        Value::Object(map) => map.iter().map(|(key, inner)| (key.clone(), inner)).collect(),
        Value::Array(items) => items.iter().enumerate().map(|(index, inner)| (index.to_string(), inner)).collect(),
        _ => Vec::new(),
    };
    let below = inner.iter().flat_map(|(step, inner)| pointers(inner).into_iter().map(move |p| format!("/{step}{p}")));
    std::iter::once(String::new()).chain(below).collect()
}
