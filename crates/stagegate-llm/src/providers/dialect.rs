//! Dialects: owns what is known of each model's way to be asked, and which mend a refusal asks for. A refusal must name what
//! the server does not know; nothing is guessed from a status alone.
//!
//! A finding is remembered only once the mended request was answered. Servers echo prompts in their errors: words that a
//! caller brought into a refusal do not make the request succeed, so that no tenant can teach a dialect to others.

use std::{
    collections::BTreeMap,
    sync::{PoisonError, RwLock},
};

use serde_json::Value;
use stagegate_core::pipeline::{OutputFormat, Params};

use super::words::Told;
use crate::{
    config::{DialectConfig, JsonForm, LimitKey, Sampling, SystemRole},
    provider::{Answer, Finish, ProviderRequest},
};

/// So many models of a provider are remembered; the refusals of others are met again with each call.
const MODELS_MAX: usize = 256;

/// How a request is said: what is set, else what was found out, else `auto`.
pub(super) type Dialect = DialectConfig;

/// What is known of the models of one provider.
#[derive(Debug)]
pub(super) struct Dialects {
    set: DialectConfig,
    found: RwLock<BTreeMap<String, Dialect>>,
}

/// What of a request can be said otherwise, as it was sent.
#[derive(Debug, Default)]
pub(super) struct Sent {
    /// How the longest answer was called, where that can be changed.
    pub(super) limit: Option<LimitKey>,
    /// How JSON was asked for, where it was.
    pub(super) json: Option<JsonForm>,
    /// Who said the system messages, where there were some.
    pub(super) system: Option<SystemRole>,
}

/// One way to say a request otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mend {
    Limit(LimitKey),
    Json(JsonForm),
    System(SystemRole),
    SayJson,
    LeaveOut(Sampling),
}

/// One call: each kind of mend is made once in it, at most.
#[derive(Debug)]
pub(super) struct Talk<'a> {
    known: &'a Dialects,
    model: &'a str,
    pub(super) dialect: Dialect,
    made: Vec<Mend>,
    /// A mend was made for this request alone, not for the model.
    is_special: bool,
}

impl Dialects {
    pub(super) fn new(set: DialectConfig) -> Self {
        Self { set, found: RwLock::default() }
    }

    /// Begins a call.
    pub(super) fn talk<'a>(&'a self, model: &'a str) -> Talk<'a> {
        let found = self.found.read().unwrap_or_else(PoisonError::into_inner);
        let mut dialect = found.get(model).cloned().unwrap_or_default();
        drop(found);
        let set = &self.set;
        if set.limit != LimitKey::Auto {
            dialect.limit = set.limit;
        }
        if set.json != JsonForm::Auto {
            dialect.json = set.json;
        }
        if set.system != SystemRole::Auto {
            dialect.system = set.system;
        }
        dialect.say_json |= set.say_json;
        dialect.leave_out.extend(&set.leave_out);
        Talk { known: self, model, dialect, made: Vec::new(), is_special: false }
    }

    /// What was found out, by model.
    pub(super) fn found(&self) -> Vec<(String, DialectConfig)> {
        let found = self.found.read().unwrap_or_else(PoisonError::into_inner);
        found.iter().map(|(model, dialect)| (model.clone(), dialect.clone())).collect()
    }

    fn remember(&self, model: &str, made: &[Mend]) {
        let mut found = self.found.write().unwrap_or_else(PoisonError::into_inner);
        if found.len() >= MODELS_MAX && !found.contains_key(model) {
            return;
        }
        let dialect = found.entry(model.to_owned()).or_default();
        for mend in made {
            mend.apply(dialect);
        }
    }
}

impl Talk<'_> {
    /// Whether the refusal names something that can be said otherwise; then the dialect is mended, and the request is to be
    /// sent again.
    pub(super) fn mend(&mut self, status: u16, told: &Told, params: &Params, sent: &Sent) -> bool {
        let refusal = Refusal::new(told);
        let Some(mend) = refusal.asks_for(status, &self.dialect, params, sent) else { return false };
        if !self.may_make(mend) {
            return false;
        }
        self.is_special |= SPECIAL.iter().any(|sign| refusal.says.contains(sign));
        mend.apply(&mut self.dialect);
        self.made.push(mend);
        true
    }

    /// The request was answered: what was mended is what the model wants. Gives the answer as it would be if the model had
    /// been told where to stop.
    pub(super) fn done(&self, provider: &str, params: &Params, answer: Answer) -> Answer {
        if !self.made.is_empty() && !self.is_special {
            tracing::info!(provider, model = self.model, dialect = ?self.made, "a model's dialect was found out");
            self.known.remember(self.model, &self.made);
        }
        if self.dialect.leave_out.contains(&Sampling::Stop) { stopped(params, answer) } else { answer }
    }

    /// What is set is not changed, and no kind of mend is made twice.
    fn may_make(&self, mend: Mend) -> bool {
        let set = &self.known.set;
        let is_made = |kind: fn(&Mend) -> bool| self.made.iter().any(kind);
        match mend {
            Mend::Limit(_) => set.limit == LimitKey::Auto && !is_made(|made| matches!(made, Mend::Limit(_))),
            Mend::Json(_) => set.json == JsonForm::Auto && !self.made.contains(&mend),
            Mend::System(_) => set.system == SystemRole::Auto && !self.made.contains(&mend),
            Mend::SayJson | Mend::LeaveOut(_) => !self.made.contains(&mend),
        }
    }
}

impl Mend {
    fn apply(self, dialect: &mut Dialect) {
        match self {
            Self::Limit(limit) => dialect.limit = limit,
            Self::Json(json) => dialect.json = json,
            Self::System(system) => dialect.system = system,
            Self::SayJson => dialect.say_json = true,
            Self::LeaveOut(param) => {
                if !dialect.leave_out.contains(&param) {
                    dialect.leave_out.push(param);
                }
            }
        }
    }
}

/// What is said where JSON is asked for in the messages. It holds the word "json", which some servers demand.
pub(super) fn in_words(schema: Option<&Value>) -> String {
    let words = "Answer with one JSON value (json) and nothing else: no introduction, no code fence.";
    match schema {
        Some(schema) => format!("{words} It must fit this JSON Schema:\n{schema}"),
        None => words.to_owned(),
    }
}

/// What must stand in the messages for the form in which JSON is asked for.
pub(super) fn addition(request: &ProviderRequest<'_>, dialect: &Dialect) -> Option<String> {
    let OutputFormat::Json { schema } = request.format else { return None };
    match (dialect.json, schema.as_deref()) {
        (JsonForm::Words, schema) | (JsonForm::Object, schema @ Some(_)) => Some(in_words(schema)),
        (JsonForm::Auto | JsonForm::Schema, Some(_)) => None,
        (_, None) => {
            let says = |text: &str| text.to_ascii_lowercase().contains("json");
            let is_said = request.messages.iter().any(|message| says(&message.content));
            (dialect.say_json && !is_said).then(|| in_words(None))
        }
    }
}

/// A value of a parameter, where it is sent.
pub(super) fn kept<T>(dialect: &Dialect, param: Sampling, value: Option<T>) -> Option<T> {
    value.filter(|_| !dialect.leave_out.contains(&param))
}

/// The texts at which the answer ends, where they are sent.
pub(super) fn kept_stop<'a>(dialect: &Dialect, params: &'a Params) -> &'a [String] {
    if dialect.leave_out.contains(&Sampling::Stop) { &[] } else { &params.stop }
}

fn stopped(params: &Params, mut answer: Answer) -> Answer {
    if let Some(end) = params.stop.iter().filter_map(|stop| answer.content.find(stop)).min() {
        answer.content.truncate(end);
        if answer.finish == Finish::Length {
            answer.finish = Finish::Stop;
        }
    }
    answer
}

/// A refusal's words, in lower case.
struct Refusal {
    says: String,
    param: String,
}

/// How servers say that they do not know something.
const REFUSES: [&str; 26] = [
    "not supported",
    "unsupported",
    "does not support",
    "doesn't support",
    "do not support",
    "only supports",
    "unavailable",
    "not available",
    "not enabled",
    "not allowed",
    "not permitted",
    "not implemented",
    "extra inputs",
    "extra fields",
    "extra_forbidden",
    "unrecognized",
    "unrecognised",
    "unknown",
    "unexpected",
    "deprecated",
    "cannot find field",
    "cannot both be",
    "supported values are",
    "only the default",
    "allowed for this model",
    "may not be",
];
/// How they say which of some values they know, or that a schema is beyond them.
const CHOICES: [&str; 5] = ["must be", "should be", "is not one of", "invalid value", "invalid schema"];
/// What is about one schema, and says nothing of others.
const SPECIAL: [&str; 2] = ["invalid schema", "response_json_schema."];
/// How they call the forms in which JSON is asked for.
const JSON_FORMS: [&str; 11] = [
    "response_format",
    "response format",
    "responseformat",
    "json_schema",
    "json_object",
    "responsejsonschema",
    "response_json_schema",
    "responsemimetype",
    "response_mime_type",
    "json mode",
    "structured output",
];
/// How they call tools, which carry Anthropic's structured answers.
const TOOLS: [&str; 4] = ["tool_choice", "tools", "tool use", "forced tool"];
/// How they call what the system says.
const SYSTEMS: [&str; 7] = [
    "system role",
    "system message",
    "system prompt",
    "system instruction",
    "system_instruction",
    "systeminstruction",
    "developer instruction",
];
/// How they call the parameters that not every model takes.
const SAMPLINGS: [(Sampling, &[&str]); 8] = [
    (Sampling::Temperature, &["temperature"]),
    (Sampling::TopP, &["top_p", "topp"]),
    (Sampling::Seed, &["seed"]),
    (Sampling::Stop, &["stop", "stop_sequences", "stopsequences"]),
    (Sampling::FrequencyPenalty, &["frequency_penalty", "frequencypenalty"]),
    (Sampling::PresencePenalty, &["presence_penalty", "presencepenalty"]),
    (Sampling::LogitBias, &["logit_bias"]),
    (Sampling::Reasoning, &["reasoning_effort", "thinkingconfig", "thinking_config", "thinking"]),
];

impl Refusal {
    fn new(told: &Told) -> Self {
        let words = told.words().unwrap_or_default();
        let param = told.param.to_lowercase();
        Self { says: format!("{words}; {}", told.code).to_lowercase(), param }
    }

    /// The mend for what it names. Validating servers say 422 for 400, and llama.cpp 500 where a template knows no system.
    fn asks_for(&self, status: u16, dialect: &Dialect, params: &Params, sent: &Sent) -> Option<Mend> {
        let is_of_template = status == 500 && self.says.contains("system role not supported");
        if !matches!(status, 400 | 422) && !is_of_template {
            return None;
        }
        let has = |signs: &[&str]| signs.iter().any(|sign| self.says.contains(sign));
        if sent.json == Some(JsonForm::Object)
            && !dialect.say_json
            && ["json", "word", "contain"].iter().all(|w| has(&[w]))
        {
            return Some(Mend::SayJson);
        }
        let (refuses, chooses) = (has(&REFUSES), has(&CHOICES));
        if !refuses && !chooses {
            return None;
        }
        let json = sent.json.and_then(|form| self.next_form(form)).map(Mend::Json);
        let mend = json.or_else(|| sent.system.and_then(|role| self.next_role(role)).map(Mend::System));
        if mend.is_some() || !refuses {
            return mend;
        }
        sent.limit.and_then(|limit| self.other_limit(limit)).map(Mend::Limit).or_else(|| {
            let is_sent = |param: Sampling| match param {
                Sampling::Temperature => kept(dialect, param, params.temperature).is_some(),
                Sampling::TopP => kept(dialect, param, params.top_p).is_some(),
                Sampling::Seed => kept(dialect, param, params.seed).is_some(),
                Sampling::Stop => !kept_stop(dialect, params).is_empty(),
                Sampling::FrequencyPenalty => kept(dialect, param, params.frequency_penalty).is_some(),
                Sampling::PresencePenalty => kept(dialect, param, params.presence_penalty).is_some(),
                Sampling::LogitBias => kept(dialect, param, (!params.logit_bias.is_empty()).then_some(())).is_some(),
                Sampling::Reasoning => kept(dialect, param, params.reasoning).is_some(),
            };
            let is_named = |names: &[&str]| names.iter().any(|name| self.names(name));
            let both = [Sampling::Temperature, Sampling::TopP].into_iter().all(is_sent);
            if both && self.says.contains("cannot both be") && is_named(&["top_p"]) {
                return Some(Mend::LeaveOut(Sampling::TopP));
            }
            let named = SAMPLINGS.iter().find(|(param, names)| is_sent(*param) && is_named(names));
            named.map(|(param, _)| Mend::LeaveOut(*param))
        })
    }

    /// The next form of asking for JSON, where this one is refused.
    fn next_form(&self, form: JsonForm) -> Option<JsonForm> {
        let names = |names: &[&str]| names.iter().any(|name| self.subject().contains(name));
        match form {
            JsonForm::Auto | JsonForm::Schema if self.says.contains("json mode") => Some(JsonForm::Words),
            JsonForm::Auto | JsonForm::Schema if names(&JSON_FORMS) => Some(JsonForm::Object),
            JsonForm::Auto | JsonForm::Schema if names(&TOOLS) => Some(JsonForm::Words),
            JsonForm::Object if names(&JSON_FORMS) => Some(JsonForm::Words),
            _ => None,
        }
    }

    /// Who else may say what the system says, where this role is refused.
    fn next_role(&self, role: SystemRole) -> Option<SystemRole> {
        let speaks_of = |names: &[&str]| names.iter().any(|name| self.says.contains(name));
        match role {
            SystemRole::Auto | SystemRole::System if self.names("system") || speaks_of(&SYSTEMS) => {
                let is_offered = self.says.contains("developer") && !self.says.contains("developer instruction");
                Some(if is_offered { SystemRole::Developer } else { SystemRole::User })
            }
            SystemRole::Developer if self.names("developer") => Some(SystemRole::User),
            _ => None,
        }
    }

    fn other_limit(&self, limit: LimitKey) -> Option<LimitKey> {
        match limit {
            LimitKey::MaxCompletionTokens => self.names("max_completion_tokens").then_some(LimitKey::MaxTokens),
            LimitKey::MaxTokens | LimitKey::Auto => self.names("max_tokens").then_some(LimitKey::MaxCompletionTokens),
        }
    }

    /// Where a name is looked for: in the parameter that the error is about, where it is one of ours, else in the words.
    fn subject(&self) -> &str {
        let ours = ["max_tokens", "max_completion_tokens"];
        let samplings = SAMPLINGS.iter().flat_map(|(_, names)| names.iter());
        let mut known = ours.iter().chain(&JSON_FORMS).chain(&TOOLS).chain(samplings);
        if known.any(|name| self.param.contains(name)) { &self.param } else { &self.says }
    }

    /// Whether a parameter is named: as a whole word, and one that is an English word too in a place for names.
    fn names(&self, name: &str) -> bool {
        let subject = self.subject();
        let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let is_english = matches!(name, "stop" | "seed" | "system" | "developer" | "thinking");
        subject.match_indices(name).any(|(at, _)| {
            let (before, after) = (&subject[..at], &subject[at + name.len()..]);
            let is_whole = !before.ends_with(is_word) && !after.starts_with(is_word);
            let is_marked = before.is_empty()
                || before.ends_with(['\'', '"', '`', '.', '['])
                || before.ends_with(": ")
                || after.starts_with(['\'', '"', '`', ':', ']']);
            is_whole && (is_marked || !is_english)
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn asked_for(status: u16, error: &Value, sent: &Sent) -> Option<Mend> {
        let params = Params {
            temperature: Some(0.5),
            top_p: Some(0.9),
            max_output_tokens: Some(7),
            seed: Some(1),
            stop: vec!["END".to_owned()],
            presence_penalty: Some(1.0),
            ..Params::default()
        };
        Refusal::new(&Told::of(error)).asks_for(status, &Dialect::default(), &params, sent)
    }

    fn everything() -> Sent {
        Sent { limit: Some(LimitKey::MaxTokens), json: Some(JsonForm::Schema), system: Some(SystemRole::System) }
    }

    #[test]
    fn each_refusal_that_names_what_it_does_not_know_asks_for_its_mend() {
        let object = || Sent { json: Some(JsonForm::Object), ..everything() };
        let completion = || Sent { limit: Some(LimitKey::MaxCompletionTokens), ..everything() };
        for (sent, words, mend) in [
            (
                everything(),
                "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
                Mend::Limit(LimitKey::MaxCompletionTokens),
            ),
            (completion(), "max_completion_tokens: Extra inputs are not permitted", Mend::Limit(LimitKey::MaxTokens)),
            (everything(), "This response_format type is unavailable now", Mend::Json(JsonForm::Object)),
            (everything(), "This model does not support response format `json_schema`.", Mend::Json(JsonForm::Object)),
            (
                everything(),
                "Invalid schema for response_format 'answer': 'oneOf' is not permitted.",
                Mend::Json(JsonForm::Object),
            ),
            (object(), "'response_format.type' must be 'json_schema' or 'text'", Mend::Json(JsonForm::Words)),
            (
                object(),
                "'messages' must contain the word 'json' in some form, to use 'response_format' of type 'json_object'.",
                Mend::SayJson,
            ),
            (everything(), "JSON mode is not enabled for models/gemma-3-27b-it", Mend::Json(JsonForm::Words)),
            (
                everything(),
                "tool_choice: type \"tool\" and \"any\" are not supported for this model.",
                Mend::Json(JsonForm::Words),
            ),
            (everything(), "System role not supported", Mend::System(SystemRole::User)),
            (
                everything(),
                "'messages[0].role' does not support 'system' with this model.",
                Mend::System(SystemRole::User),
            ),
            (
                everything(),
                "'system' is not one of ['user', 'assistant', 'developer'] - 'messages.0.role'",
                Mend::System(SystemRole::Developer),
            ),
            (
                everything(),
                "Developer instruction is not enabled for models/gemma-3-27b-it",
                Mend::System(SystemRole::User),
            ),
            (
                everything(),
                "Unsupported value: 'temperature' does not support 0.5 with this model. Only the default (1) value is supported.",
                Mend::LeaveOut(Sampling::Temperature),
            ),
            (
                everything(),
                "`temperature` and `top_p` cannot both be specified for this model.",
                Mend::LeaveOut(Sampling::TopP),
            ),
            (everything(), "Unrecognized request argument supplied: seed", Mend::LeaveOut(Sampling::Seed)),
            (everything(), "does not support parameters: ['stop'], for model=o3", Mend::LeaveOut(Sampling::Stop)),
            (
                everything(),
                "Unknown name \"topP\" at 'generation_config': Cannot find field.",
                Mend::LeaveOut(Sampling::TopP),
            ),
        ] {
            for status in [400, 422] {
                assert_eq!(asked_for(status, &json!({ "error": { "message": words } }), &sent), Some(mend), "{words}");
            }
            for status in [401, 403, 404, 429, 500, 503] {
                let is_of_template = status == 500 && words == "System role not supported";
                let mended = asked_for(status, &json!({ "error": words }), &sent);
                assert_eq!(mended.is_some(), is_of_template, "{status} {words}");
            }
            // What was not sent cannot be said otherwise.
            let plain = Refusal::new(&Told::of(&json!({ "error": words })));
            let nothing = plain.asks_for(400, &Dialect::default(), &Params::default(), &Sent::default());
            assert_eq!(nothing, None, "{words}");
        }
    }

    #[test]
    fn a_refusal_of_a_value_or_of_something_else_asks_for_nothing() {
        for words in [
            "max_tokens is too large: 300000. This model supports at most 16384 completion tokens.",
            "temperature must be between 0 and 2",
            "temperature: range: 0..1",
            "This model's maximum context length is 8192 tokens.",
            "The model `x` does not support this; please stop asking.",
            "The system is unavailable",
            "messages: text content blocks must be non-empty",
            "",
        ] {
            assert_eq!(asked_for(400, &json!({ "error": { "message": words } }), &everything()), None, "{words}");
        }
        // The parameter that the error is about decides, whatever else it lists.
        let listed = json!({ "error": {
            "message": "Unknown parameter: 'seed'. Known are 'max_tokens', 'temperature' and 'response_format'.",
            "param": "seed",
        } });
        assert_eq!(asked_for(400, &listed, &everything()), Some(Mend::LeaveOut(Sampling::Seed)));
    }
}
