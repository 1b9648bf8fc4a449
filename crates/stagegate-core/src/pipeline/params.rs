//! Model parameters: owns what of them a schema cannot say, and whether the providers of a chain have them.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{ModelChain, Models, Params, check::Report, path::Path};
use crate::{Code, Violation};

/// The most bytes of `extra`, as JSON.
const EXTRA_MAX_BYTES: usize = 16 * 1024;
/// The deepest nesting in `extra`.
const EXTRA_MAX_DEPTH: usize = 16;
/// Keys of requests that are ours to write, in whichever dialect, and what to write instead.
const RESERVED: &[(&str, &str)] = &[
    ("model", "write `model:` beside `params`"),
    ("models", "write a list as `model:`, which is tried in order"),
    ("messages", "write `messages:` beside `params`"),
    ("contents", "write `messages:` beside `params`"),
    ("input", "write `messages:` beside `params`"),
    ("system", "write `system:` beside `params`"),
    ("systemInstruction", "write `system:` beside `params`"),
    ("n", "several answers to one prompt are several stages with a different `sample`"),
    ("candidateCount", "several answers to one prompt are several stages with a different `sample`"),
    ("stream", "answers are taken whole"),
    ("stream_options", "answers are taken whole"),
    ("max_tokens", "write `max_output_tokens`"),
    ("max_completion_tokens", "write `max_output_tokens`"),
    ("temperature", "write it in `params` itself"),
    ("top_p", "write it in `params` itself"),
    ("seed", "write it in `params` itself"),
    ("stop", "write it in `params` itself"),
    ("stop_sequences", "write `stop` in `params` itself"),
    ("frequency_penalty", "write it in `params` itself"),
    ("presence_penalty", "write it in `params` itself"),
    ("logit_bias", "write it in `params` itself"),
    ("reasoning_effort", "write `reasoning: { effort: … }` in `params` itself"),
    ("response_format", "write `output:` beside `params`"),
    ("tools", "a stage's answer is text or JSON; no tool is called"),
    ("tool_choice", "a stage's answer is text or JSON; no tool is called"),
    ("functions", "a stage's answer is text or JSON; no tool is called"),
    ("function_call", "a stage's answer is text or JSON; no tool is called"),
];

/// Checks the defaults' own.
pub(super) fn check_defaults(root: &Map<String, Value>, report: &mut Report<'_>) {
    if let Some(params) = root.get("defaults").and_then(|defaults| defaults.get("params")) {
        check_extra(params, &Path::root().key("defaults").key("params"), report);
    }
}

/// Checks a stage's parameters and its judge's, and whether the models that they are for have them.
pub(super) fn check(
    stage: &Map<String, Value>,
    path: &Path,
    root: &Map<String, Value>,
    models: &dyn Models,
    report: &mut Report<'_>,
) {
    let read = |value: Option<&Value>| value.and_then(|value| Params::deserialize(value).ok());
    let chain = |value: Option<&Value>| value.and_then(|value| ModelChain::deserialize(value).ok());
    let defaults = root.get("defaults");
    let models_of_stage =
        chain(stage.get("model")).or_else(|| chain(defaults.and_then(|defaults| defaults.get("model"))));
    let own = stage.get("params");
    let at = path.key("params");
    if let Some(own) = own {
        check_extra(own, &at, report);
    }
    if !stage.contains_key("transform") {
        let (own, default) = (read(own), read(defaults.and_then(|defaults| defaults.get("params"))));
        let merged = super::resolve::merged(own.as_ref(), default.as_ref());
        has_all(models_of_stage.as_ref(), &merged, &at, models, report);
    }
    let Some(judge) = stage.get("gate").and_then(|gate| gate.get("judge")) else { return };
    let Some(params) = judge.get("params") else { return };
    let at = path.key("gate").key("judge").key("params");
    check_extra(params, &at, report);
    if let Some(params) = read(Some(params)) {
        has_all(chain(judge.get("model")).or(models_of_stage).as_ref(), &params, &at, models, report);
    }
}

/// Whether each model of a chain has each parameter that is given.
fn has_all(chain: Option<&ModelChain>, params: &Params, path: &Path, models: &dyn Models, report: &mut Report<'_>) {
    for model in chain.map(ModelChain::models).unwrap_or_default() {
        for (key, mend) in models.unsupported(model, params) {
            let message = format!("the provider of `{model}` has no `{key}`");
            report.at_key(&path.key(key), Violation::new(Code::WrongValue, "", message).mend(mend));
        }
    }
}

fn check_extra(params: &Value, path: &Path, report: &mut Report<'_>) {
    let Some(extra) = params.get("extra").and_then(Value::as_object) else { return };
    let path = path.key("extra");
    for key in extra.keys() {
        if let Some((_, mend)) = RESERVED.iter().find(|(reserved, _)| reserved == key) {
            let violation = Violation::new(Code::WrongValue, "", format!("`{key}` is not passed on"));
            report.at_key(&path.key(key), violation.mend(*mend));
        }
    }
    let too_large = |message: String| Violation::new(Code::DefinitionTooLarge, "", message);
    if params.get("extra").is_some_and(|extra| depth(extra) > EXTRA_MAX_DEPTH) {
        return report.at_value(&path, too_large(format!("is nested more than {EXTRA_MAX_DEPTH} levels deep")));
    }
    let bytes = Value::Object(extra.clone()).to_string().len();
    if bytes > EXTRA_MAX_BYTES {
        report.at_value(&path, too_large(format!("has {bytes} bytes, at most {EXTRA_MAX_BYTES} are allowed")));
    }
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}
