//! From a definition without mistakes to a [`Pipeline`]: owns order, defaults and the digest. Cannot fail.

use std::{sync::Arc, time::Duration};

use serde_json::{Map, Value};

use super::{
    Defaults, Definition, Messages, ModelChain, ModelWork, OnPass, Output, OutputFormat, OutputSchema, OutputWord,
    Params, Pipeline, Scale, Stage, StageDefinition, Work, check::Compiled, graph, pattern::REGEX_MAX_BYTES,
};
use crate::{ModelRef, json::Size};

const DEFAULT_TIMEOUT: Duration = Duration::from_mins(1);
const DEFAULT_DEADLINE: Duration = Duration::from_hours(24);

/// How many forms of a definition are in memory at most, each about as large as its values: those themselves, the resolved
/// stages, the code of templates, the validators.
const FORMS: u64 = 8;
/// What a regular expression takes that has no repetitions, classes or flags, beside what its text is.
const PLAIN_REGEX_BYTES: u64 = 8 * 1024;
/// What each byte of such a text takes.
const PLAIN_REGEX_FACTOR: u64 = 100;

/// About what the regular expressions in a definition take, never less. A small text can be a large program (`a{3000}`),
/// so that whatever is not plainly small counts as large as may be.
fn regexes_bytes(value: &Value) -> u64 {
    let bytes = |pattern: &str| {
        let largest = REGEX_MAX_BYTES as u64;
        if pattern.contains(['{', '\\', '[', '(', '.']) {
            return largest;
        }
        (PLAIN_REGEX_BYTES + PLAIN_REGEX_FACTOR * pattern.len() as u64).min(largest)
    };
    match value {
        Value::Array(items) => items.iter().map(regexes_bytes).sum(),
        Value::Object(map) => map
            .iter()
            .map(|(key, value)| match (key.as_str(), value) {
                ("matches" | "not_matches" | "pattern", Value::String(pattern)) => bytes(pattern),
                ("patternProperties", Value::Object(inner)) => {
                    inner.iter().map(|(pattern, value)| bytes(pattern) + regexes_bytes(value)).sum()
                }
                _ => regexes_bytes(value),
            })
            .sum(),
        _ => 0,
    }
}

/// The same content, always in the same form: keys sorted, all the way down.
pub(super) fn canonical(value: &Value) -> Value {
    match value {
        Value::Array(items) => Value::Array(items.iter().map(canonical).collect()),
        Value::Object(map) => {
            let mut keys: Vec<_> = map.iter().collect();
            keys.sort_unstable_by_key(|(key, _)| key.as_str());
            Value::Object(keys.into_iter().map(|(key, value)| (key.clone(), canonical(value))).collect::<Map<_, _>>())
        }
        plain => plain.clone(),
    }
}

/// Builds the pipeline. `value` is what `definition` was decoded from.
pub(super) fn resolve(definition: Definition, value: &Value, compiled: Compiled) -> Pipeline {
    let canonical = canonical(value);
    let digest = *blake3::hash(canonical.to_string().as_bytes()).as_bytes();
    let compiled_bytes = FORMS * Size::of(&canonical).parsed_bytes + regexes_bytes(&canonical);
    let position = |id| definition.stages.iter().position(|stage| &stage.id == id);
    let needs: Vec<Vec<usize>> =
        definition.stages.iter().map(|stage| stage.needs.iter().filter_map(position).collect()).collect();
    let order = graph::order(&needs);
    let mut place = vec![0; order.len()];
    for (new, old) in order.iter().enumerate() {
        place[*old] = new;
    }
    let moved = |olds: &[usize]| {
        let mut news: Vec<usize> = olds.iter().map(|old| place[*old]).collect();
        news.sort_unstable();
        news
    };
    let dependents = |old: usize| {
        let olds: Vec<usize> = (0..needs.len()).filter(|other| needs[*other].contains(&old)).collect();
        moved(&olds)
    };
    let stages = order
        .iter()
        .map(|old| {
            let stage = &definition.stages[*old];
            resolve_stage(stage, &definition.defaults, moved(&needs[*old]), dependents(*old))
        })
        .collect();
    let newest = newest_key(&definition).or_else(|| compiled.newest());
    let mut parts: Vec<_> = compiled.stages.into_iter().map(Some).collect();
    let compiled_stages = order.iter().filter_map(|old| parts.get_mut(*old).and_then(Option::take)).collect();
    Pipeline {
        name: definition.name,
        description: definition.description,
        definition: canonical,
        digest,
        stages,
        budget: definition.budget,
        deadline: definition.deadline.map_or(DEFAULT_DEADLINE, |span| span.0),
        concurrency: definition.concurrency,
        retention: definition.retention,
        newest,
        compiled: Compiled { stages: compiled_stages, ..compiled },
        compiled_bytes,
    }
}

fn resolve_stage(stage: &StageDefinition, defaults: &Defaults, needs: Vec<usize>, dependents: Vec<usize>) -> Stage {
    let models: Vec<ModelRef> =
        stage.model.as_ref().or(defaults.model.as_ref()).map(|chain| chain.models().to_vec()).unwrap_or_default();
    let mut gate = stage.gate.clone().unwrap_or_default();
    if let Some(judge) = &mut gate.judge {
        judge.model.get_or_insert_with(|| ModelChain::Chain(models.clone()));
    }
    let work = if stage.transform.is_some() {
        Work::Transform
    } else {
        Work::Model(ModelWork {
            models,
            params: merged(stage.params.as_ref(), defaults.params.as_ref()),
            sample: stage.sample,
            cache: stage.cache.clone().or_else(|| defaults.cache.clone()).unwrap_or_default(),
        })
    };
    Stage {
        id: stage.id.clone(),
        description: stage.description.clone(),
        needs,
        dependents,
        work,
        output: match &stage.output {
            Output::Word(OutputWord::Text) => OutputFormat::Text,
            Output::Word(OutputWord::Json) => OutputFormat::Json { schema: None },
            Output::Schema(OutputSchema { schema, .. }) => {
                OutputFormat::Json { schema: Some(Arc::new(schema.clone())) }
            }
        },
        gate,
        retry: stage.retry.clone().or_else(|| defaults.retry.clone()).unwrap_or_default(),
        timeout: stage.timeout.or(defaults.timeout).map_or(DEFAULT_TIMEOUT, |span| span.0),
    }
}

/// A stage's parameters over the defaults', key by key.
pub(super) fn merged(stage: Option<&Params>, defaults: Option<&Params>) -> Params {
    let (stage, defaults) = (stage.cloned().unwrap_or_default(), defaults.cloned().unwrap_or_default());
    Params {
        temperature: stage.temperature.or(defaults.temperature),
        top_p: stage.top_p.or(defaults.top_p),
        max_output_tokens: stage.max_output_tokens.or(defaults.max_output_tokens),
        seed: stage.seed.or(defaults.seed),
        stop: if stage.stop.is_empty() { defaults.stop } else { stage.stop },
        frequency_penalty: stage.frequency_penalty.or(defaults.frequency_penalty),
        presence_penalty: stage.presence_penalty.or(defaults.presence_penalty),
        logit_bias: if stage.logit_bias.is_empty() { defaults.logit_bias } else { stage.logit_bias },
        reasoning: stage.reasoning.or(defaults.reasoning),
        // Key by key here as well.
        extra: defaults.extra.into_iter().chain(stage.extra).collect(),
    }
}

/// A key that the release before this one cannot read.
fn newest_key(definition: &Definition) -> Option<String> {
    let params = definition.defaults.params.as_ref().and_then(newest_param);
    let stage = || definition.stages.iter().find_map(newest_key_of);
    params.map(|key| format!("defaults.params.{key}")).or_else(stage)
}

fn newest_param(params: &Params) -> Option<&'static str> {
    let newer = [
        ("frequency_penalty", params.frequency_penalty.is_some()),
        ("presence_penalty", params.presence_penalty.is_some()),
        ("logit_bias", !params.logit_bias.is_empty()),
        ("reasoning", params.reasoning.is_some()),
        ("extra", !params.extra.is_empty()),
    ];
    newer.into_iter().find_map(|(key, is_there)| is_there.then_some(key))
}

fn newest_key_of(stage: &StageDefinition) -> Option<String> {
    if let Some(key) = stage.params.as_ref().and_then(newest_param) {
        return Some(format!("params.{key}"));
    }
    if matches!(stage.messages, Some(Messages::From(_))) {
        return Some("messages.from".to_owned());
    }
    let gate = stage.gate.as_ref()?;
    if gate.on_pass != OnPass::Pass {
        return Some("gate.on_pass".to_owned());
    }
    let judge = gate.judge.as_ref()?;
    let newer = [
        ("prompt", judge.prompt.is_some()),
        ("system", judge.system.is_some()),
        ("scale", judge.scale != Scale::Unit),
        ("params", judge.params.is_some()),
    ];
    newer.into_iter().find_map(|(key, is_there)| is_there.then(|| format!("gate.judge.{key}")))
}
