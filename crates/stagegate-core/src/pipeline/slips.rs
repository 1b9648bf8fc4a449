//! The usual slips: owns what people write who know other tools, and what is written here instead. Judges nothing.

use serde_json::Value;

use super::path::cut;

/// Keys of model parameters that people write beside `params`.
const PARAMS: [&str; 10] = [
    "temperature",
    "top_p",
    "max_output_tokens",
    "seed",
    "stop",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "reasoning",
    "extra",
];
const CHECKS: [&str; 8] =
    ["min_chars", "max_chars", "matches", "not_matches", "contains", "not_contains", "schema", "expression"];

/// What to write instead of a key that a part of the definition does not have.
pub(super) fn key(part: Option<&str>, key: &str) -> Option<String> {
    let plain = key.to_ascii_lowercase().replace(['-', '_'], "");
    let word = plain.as_str();
    let instead = match (part?, word) {
        (_, "maxtokens" | "maxcompletiontokens" | "maxoutputtokens" | "maxlength" | "numpredict") => {
            return Some(if part == Some("Params") {
                "did you mean `max_output_tokens`?".to_owned()
            } else {
                "write `params: { max_output_tokens: … }`".to_owned()
            });
        }
        ("Definition", "steps" | "tasks" | "nodes" | "jobs" | "flow" | "pipeline") => "did you mean `stages`?",
        ("Definition", "inputs" | "inputschema" | "variables" | "arguments") => "did you mean `input`?",
        ("Definition", "outputs" | "result" | "results" | "returns") => "did you mean `output`?",
        ("Definition", "id" | "title") => "did you mean `name`?",
        ("Definition", "model" | "models") => "write `defaults: { model: … }`, or `model:` in a stage",
        ("Definition", "params" | "retry" | "cache") => "write it in `defaults:`, or in a stage",
        ("Definition", "timeout") => "write `deadline:` for the whole run, or `defaults: { timeout: … }` for each call",
        ("Definition", "version") => "leave it out: versions are counted by themselves",
        ("Definition" | "Budget", "maxcost" | "maxcostusd" | "cost" | "costlimit" | "maxusd" | "usd" | "limit") => {
            "write `budget: { max_cost_usd: … }`"
        }
        ("StageDefinition", "dependson" | "depends" | "dependencies" | "after" | "requires" | "need") => {
            "did you mean `needs`? It is a list of stage ids"
        }
        ("StageDefinition", "name") => "did you mean `id`?",
        ("StageDefinition", "user" | "userprompt" | "text" | "template" | "instructions" | "instruction" | "query") => {
            "did you mean `prompt`?"
        }
        ("StageDefinition" | "Judge", "systemprompt" | "systemmessage") => "did you mean `system`?",
        ("StageDefinition", "schema" | "responseformat" | "outputschema" | "jsonschema" | "format") => {
            "write `output: { schema: … }`"
        }
        ("StageDefinition", "checks" | "judge" | "onfail" | "evaluators" | "assert" | "assertions" | "validators") => {
            "write it in `gate: { … }`"
        }
        ("StageDefinition", "retries" | "maxretries" | "maxattempts" | "attempts") => {
            "write `retry: { max_attempts: … }`"
        }
        ("StageDefinition", "models" | "fallback" | "fallbacks") => "write `model: [first, second]`",
        ("StageDefinition", "type" | "kind" | "uses") => {
            "leave it out: a stage is known by `prompt`, `messages` or `transform`"
        }
        ("StageDefinition" | "Params", "n") => "give several stages the same prompt and each its own `sample`",
        ("Params", "topp") => "did you mean `top_p`?",
        ("Params", "stopsequences" | "stopwords") => "did you mean `stop`?",
        ("Params", "reasoningeffort" | "effort" | "thinking") => "write `reasoning: { effort: high }`",
        ("Params", "topk" | "minp" | "topa" | "repetitionpenalty" | "user" | "verbosity" | "servicetier") => {
            "write it in `extra: { … }`, which is passed on to the provider"
        }
        ("Gate", "rubric" | "threshold" | "criteria") => "write `judge: { rubric: …, threshold: … }`",
        ("Gate", "hold" | "approval" | "approve" | "review" | "manual" | "human") => "write `on_pass: hold`",
        ("Gate", "onerror" | "onfailure") => "did you mean `on_fail`?",
        ("Judge", "criteria" | "criterion" | "instructions" | "rules") => "did you mean `rubric`?",
        ("Judge", "minscore" | "passscore" | "passingscore") => "did you mean `threshold`?",
        ("Retry", "maxretries" | "attempts" | "times" | "count" | "retries") => "did you mean `max_attempts`?",
        ("Retry", "delay" | "wait" | "interval" | "pause") => "did you mean `backoff`? It is written as `1s..30s`",
        ("Cache", "enabled" | "disabled") => "write `mode: off`",
        ("MessageTemplate", "text" | "prompt") => "did you mean `content`?",
        ("Check", "regex" | "pattern" | "regexp") => "did you mean `matches`?",
        ("Check", "minlength") => "did you mean `min_chars`?",
        ("Check", "expr" | "assert" | "condition") => "did you mean `expression`?",
        ("Output" | "OutputSchema", "type" | "properties" | "required" | "items" | "$schema") => {
            "write `output: { schema: { … } }`"
        }
        ("StageDefinition" | "Definition" | "Judge", _) if PARAMS.contains(&key) => {
            return Some(format!("write `params: {{ {key}: … }}`"));
        }
        ("Gate", _) if CHECKS.contains(&key) => return Some(format!("write `checks: [ {{ {key}: … }} ]`")),
        _ => return None,
    };
    Some(instead.to_owned())
}

/// What to write instead of a value of a wrong type, by the part that it stands for and its key.
pub(super) fn value(part: Option<&str>, key: Option<&str>, value: &Value) -> Option<String> {
    let shown = || cut(&value.to_string(), 40);
    Some(match (part, key, value) {
        (Some("Span"), _, Value::Number(_)) => format!("did you mean `{}s`? A length of time has a unit", shown()),
        (Some("Span"), _, Value::String(text)) if is_digits(text) => {
            format!("did you mean `{}s`? A length of time has a unit", text.trim())
        }
        (Some("Backoff"), _, _) => "write the first pause and the longest one, such as `1s..30s`".to_owned(),
        (Some("Budget"), _, Value::Number(_) | Value::String(_)) => {
            format!("write `budget: {{ max_cost_usd: {} }}`", value.as_str().map_or_else(shown, |text| cut(text, 20)))
        }
        (Some("Retry"), _, Value::Number(_)) => format!("write `retry: {{ max_attempts: {} }}`", shown()),
        (Some("Cache"), _, Value::Bool(false)) => "write `cache: { mode: off }`".to_owned(),
        (Some("Cache"), _, Value::String(text)) if text == "off" => "write `cache: { mode: off }`".to_owned(),
        (Some("Cache"), _, Value::String(text)) => format!("write `cache: {{ ttl: {} }}`", cut(text, 20)),
        (Some("Concurrency"), _, Value::Number(_)) => format!("write `concurrency: {{ max_runs: {} }}`", shown()),
        (Some("Judge"), _, Value::String(_)) => "write `judge: { rubric: \"…\" }`".to_owned(),
        (Some("Gate"), _, _) => "write `gate: { checks: [ … ], judge: { rubric: \"…\" } }`".to_owned(),
        (Some("Reasoning"), _, Value::String(effort)) => {
            format!("write `reasoning: {{ effort: {} }}`", cut(effort, 20))
        }
        (_, Some("needs"), Value::String(id)) => format!("write a list: `needs: [{}]`", cut(id, 64)),
        (_, Some("stop"), Value::String(_)) => "write a list: `stop: [\"…\"]`".to_owned(),
        (_, Some("stages"), Value::Object(_)) => "write a list of stages, each with its `id`: `- id: first`".to_owned(),
        (_, Some("checks"), Value::Object(_)) => "write a list, one item per check: `- min_chars: 400`".to_owned(),
        (Some("StageId" | "PipelineName"), _, Value::Number(_)) => format!("put it in quotes: `\"{}\"`", shown()),
        _ => return None,
    })
}

fn is_digits(text: &str) -> bool {
    let text = text.trim();
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.')
}
