//! The cache key: owns the canonical encoding of a request. Case, order of messages and every parameter count; the
//! order of a schema's keys and what the call is for do not.
//!
//! Every struct is taken apart without `..`, so that a new field does not compile until somebody decides what it means
//! here. Every part is tagged and length-prefixed, so that no two different requests have one encoding.

use blake3::Hasher;
use serde_json::Value;
use stagegate_core::{
    ModelRef, RunId, StageId, TenantId,
    cache::CacheKey,
    pipeline::{Message, OutputFormat, Params, Reasoning, Role},
};

use crate::Request;

/// The version of the encoding. Moving it on makes every cached answer unreachable, so it is done on purpose only:
/// a test pins what the encoding gives.
pub(crate) const KEY_VERSION: u32 = 1;

/// The key of one model's answer to a request, shared by every run of the tenant.
pub(crate) fn answer_key(tenant: &TenantId, model: &ModelRef, request: &Request) -> CacheKey {
    // The chain is not part of it (an answer belongs to the model that gave it); nor is what the call is for.
    let Request { models: _, messages, params, format, sample, purpose: _ } = request;
    let mut encoder = Encoder::new("answer");
    encoder.text(tenant.as_str());
    encoder.text(model.provider());
    encoder.text(model.model());
    encoder.count(messages.len());
    for message in messages {
        encoder.message(message);
    }
    encoder.params(params);
    encoder.format(format);
    encoder.number(u64::from(*sample));
    encoder.newer_params(params);
    encoder.finish()
}

/// The key of an answer that is kept for one stage of one run alone: two stages that ask the same are two questions.
/// Its attempts share it, so that one whose judge failed does not have the answer bought again.
pub(crate) fn stage_key(answer: CacheKey, run: RunId, stage: &StageId) -> CacheKey {
    let mut encoder = Encoder::new("stage");
    encoder.bytes(&answer.0);
    encoder.bytes(run.0.as_bytes());
    encoder.text(stage.as_str());
    encoder.finish()
}

/// Writes parts that can be told apart: a length before each text, a count before each list, a tag before each option.
struct Encoder(Hasher);

impl Encoder {
    fn new(domain: &str) -> Self {
        let mut encoder = Self(Hasher::new());
        encoder.text("stagegate");
        encoder.number(u64::from(KEY_VERSION));
        encoder.text(domain);
        encoder
    }

    fn finish(self) -> CacheKey {
        CacheKey(*self.0.finalize().as_bytes())
    }

    fn tag(&mut self, tag: u8) {
        self.0.update(&[tag]);
    }

    fn number(&mut self, number: u64) {
        self.0.update(&number.to_le_bytes());
    }

    fn count(&mut self, count: usize) {
        self.number(count as u64);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.count(bytes.len());
        self.0.update(bytes);
    }

    fn text(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }

    fn option<T>(&mut self, option: Option<T>, write: impl FnOnce(&mut Self, T)) {
        match option {
            None => self.tag(0),
            Some(value) => {
                self.tag(1);
                write(self, value);
            }
        }
    }

    /// By its bits; the two zeros are one number, and so are all that are none.
    fn float(&mut self, float: f64) {
        let float = if float == 0.0 {
            0.0
        } else if float.is_nan() {
            f64::NAN
        } else {
            float
        };
        self.number(float.to_bits());
    }

    fn message(&mut self, message: &Message) {
        let Message { role, content } = message;
        self.tag(match role {
            Role::System => 0,
            Role::User => 1,
            Role::Assistant => 2,
        });
        self.text(content);
    }

    fn params(&mut self, params: &Params) {
        let Params {
            temperature,
            top_p,
            max_output_tokens,
            seed,
            stop,
            // In `newer_params`, after all else.
            frequency_penalty: _,
            presence_penalty: _,
            logit_bias: _,
            reasoning: _,
            extra: _,
        } = params;
        self.option(*temperature, Self::float);
        self.option(*top_p, Self::float);
        self.option(*max_output_tokens, |encoder, tokens| encoder.number(u64::from(tokens)));
        self.option(*seed, |encoder, seed| encoder.number(seed.cast_unsigned()));
        self.count(stop.len());
        for text in stop {
            self.text(text);
        }
    }

    /// The parameters that came later. A request that has none of them has the key that it had before they were known.
    fn newer_params(&mut self, params: &Params) {
        let Params { frequency_penalty, presence_penalty, logit_bias, reasoning, extra, .. } = params;
        let has_none = frequency_penalty.is_none()
            && presence_penalty.is_none()
            && logit_bias.is_empty()
            && reasoning.is_none()
            && extra.is_empty();
        if has_none {
            return;
        }
        self.text("params");
        self.option(*frequency_penalty, Self::float);
        self.option(*presence_penalty, Self::float);
        self.count(logit_bias.len());
        for (token, bias) in logit_bias {
            self.text(token);
            self.float(*bias);
        }
        self.option(*reasoning, |encoder, Reasoning { effort }| encoder.text(effort.as_str()));
        self.count(extra.len());
        let mut extra: Vec<_> = extra.iter().collect();
        extra.sort_unstable_by_key(|(key, _)| key.as_str());
        for (key, value) in extra {
            self.text(key);
            self.json(value);
        }
    }

    fn format(&mut self, format: &OutputFormat) {
        match format {
            OutputFormat::Text => self.tag(0),
            OutputFormat::Json { schema } => {
                self.tag(1);
                self.option(schema.as_deref(), Self::json);
            }
        }
    }

    /// Objects by their sorted keys. The depth is bounded where the schema was parsed.
    fn json(&mut self, value: &Value) {
        match value {
            Value::Null => self.tag(0),
            Value::Bool(flag) => self.tag(1 + u8::from(*flag)),
            Value::Number(number) => {
                self.tag(3);
                self.text(&number.to_string());
            }
            Value::String(text) => {
                self.tag(4);
                self.text(text);
            }
            Value::Array(items) => {
                self.tag(5);
                self.count(items.len());
                for item in items {
                    self.json(item);
                }
            }
            Value::Object(members) => {
                self.tag(6);
                self.count(members.len());
                let mut members: Vec<_> = members.iter().collect();
                members.sort_unstable_by_key(|(name, _)| name.as_str());
                for (name, member) in members {
                    self.text(name);
                    self.json(member);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, sync::Arc};

    use serde_json::json;
    use stagegate_core::{CallPurpose, pipeline::Effort};
    use uuid::Uuid;

    use super::*;

    fn tenant(name: &str) -> TenantId {
        TenantId::new(name).expect("a slug")
    }

    fn model(name: &str) -> ModelRef {
        ModelRef::new(name).expect("a model")
    }

    fn request() -> Request {
        Request {
            models: vec![model("sim/quick")],
            messages: vec![
                Message { role: Role::System, content: "Be brief.".to_owned() },
                Message { role: Role::User, content: "Name a colour.".to_owned() },
            ],
            params: Params {
                temperature: Some(0.5),
                top_p: Some(0.9),
                max_output_tokens: Some(100),
                seed: Some(-7),
                stop: vec!["END".to_owned()],
                ..Params::default()
            },
            format: OutputFormat::Json { schema: Some(Arc::new(json!({"type": "object", "required": ["a", "b"]}))) },
            sample: 0,
            purpose: CallPurpose::Stage,
        }
    }

    type Change = Box<dyn Fn(&mut Request)>;

    fn key(request: &Request) -> CacheKey {
        answer_key(&tenant("acme"), &model("sim/quick"), request)
    }

    #[test]
    fn the_encoding_is_pinned() {
        // A change here makes every cached answer unreachable: move KEY_VERSION on, then pin the new value.
        assert_eq!(KEY_VERSION, 1);
        assert_eq!(key(&request()).to_string(), "a65342f8f039053c8434ebffd436dd7915d07a7c0f12b47dbe4bfcdab6bddac9");
    }

    #[test]
    fn each_field_changes_the_key() {
        let schema = |value| OutputFormat::Json { schema: Some(Arc::new(value)) };
        let changes: Vec<Change> = vec![
            Box::new(|_| ()),
            Box::new(|r| r.messages[1].content.push(' ')),
            Box::new(|r| r.messages[1].content = "name a colour.".to_owned()),
            Box::new(|r| r.messages[1].role = Role::Assistant),
            Box::new(|r| r.messages[1].role = Role::System),
            Box::new(|r| r.messages.swap(0, 1)),
            Box::new(|r| r.messages.truncate(1)),
            Box::new(|r| {
                // The same text, cut elsewhere.
                r.messages[0].content = "Be brief.N".to_owned();
                r.messages[1].content = "ame a colour.".to_owned();
            }),
            Box::new(|r| r.params.temperature = None),
            Box::new(|r| r.params.temperature = Some(0.500_000_000_000_000_1)),
            Box::new(|r| r.params.top_p = None),
            Box::new(|r| r.params.top_p = Some(0.5)),
            Box::new(|r| (r.params.temperature, r.params.top_p) = (Some(0.9), Some(0.5))),
            Box::new(|r| r.params.max_output_tokens = None),
            Box::new(|r| r.params.max_output_tokens = Some(101)),
            Box::new(|r| r.params.seed = None),
            Box::new(|r| r.params.seed = Some(7)),
            Box::new(|r| r.params.stop = vec![]),
            Box::new(|r| r.params.stop = vec!["end".to_owned()]),
            Box::new(|r| r.params.stop = vec!["E".to_owned(), "ND".to_owned()]),
            Box::new(|r| r.params.frequency_penalty = Some(0.5)),
            Box::new(|r| r.params.presence_penalty = Some(0.5)),
            Box::new(|r| r.params.logit_bias = [("7".to_owned(), 1.0)].into()),
            Box::new(|r| r.params.logit_bias = [("7".to_owned(), -1.0)].into()),
            Box::new(|r| r.params.logit_bias = [("8".to_owned(), 1.0)].into()),
            Box::new(|r| r.params.reasoning = Some(Reasoning { effort: Effort::Low })),
            Box::new(|r| r.params.reasoning = Some(Reasoning { effort: Effort::High })),
            Box::new(|r| r.params.extra = serde_json::Map::from_iter([("top_k".to_owned(), json!(1))])),
            Box::new(|r| r.params.extra = serde_json::Map::from_iter([("top_k".to_owned(), json!("1"))])),
            Box::new(|r| r.format = OutputFormat::Text),
            Box::new(|r| r.format = OutputFormat::Json { schema: None }),
            Box::new(move |r| r.format = schema(json!({"type": "object", "required": ["b", "a"]}))),
            Box::new(move |r| r.format = schema(json!({"type": "object", "required": ["a", 1]}))),
            Box::new(move |r| r.format = schema(json!({"type": "object", "required": ["a", "1"]}))),
            Box::new(move |r| r.format = schema(json!(true))),
            Box::new(move |r| r.format = schema(json!(false))),
            Box::new(|r| r.sample = 1),
        ];
        let keys: HashSet<_> = changes
            .iter()
            .map(|change| {
                let mut request = request();
                change(&mut request);
                key(&request)
            })
            .collect();
        assert_eq!(keys.len(), changes.len());
    }

    #[test]
    fn tenants_and_models_have_keys_of_their_own() {
        let request = request();
        let keys: HashSet<_> =
            [("acme", "sim/quick"), ("acme2", "sim/quick"), ("acme", "sim/Quick"), ("acme", "sim2/quick")]
                .map(|(tenant_name, model_name)| answer_key(&tenant(tenant_name), &model(model_name), &request))
                .into();
        assert_eq!(keys.len(), 4);
    }

    #[test]
    fn each_stage_of_a_run_has_keys_of_its_own() {
        let (answer, other) = (key(&request()), CacheKey([1; 32]));
        let (first, second) = (RunId(Uuid::from_u128(1)), RunId(Uuid::from_u128(2)));
        let stage = |name: &str| StageId::new(name).expect("a slug");
        let (one, two) = (stage("one"), stage("two"));
        let keys: HashSet<_> = [
            answer,
            stage_key(answer, first, &one),
            stage_key(answer, first, &two),
            stage_key(answer, second, &one),
            stage_key(other, first, &one),
        ]
        .into_iter()
        .collect();
        assert_eq!(keys.len(), 5);
        assert_eq!(stage_key(answer, first, &one), stage_key(answer, first, &one));
    }

    #[test]
    fn what_does_not_change_the_answer_does_not_change_the_key() {
        let base = key(&request());
        let mut same = request();
        same.purpose = CallPurpose::Judge;
        same.models.push(model("openai/gpt-5-mini"));
        same.format = OutputFormat::Json { schema: Some(Arc::new(json!({"required": ["a", "b"], "type": "object"}))) };
        assert_eq!(key(&same), base);

        let zero = |temperature| {
            let mut request = request();
            request.params.temperature = Some(temperature);
            key(&request)
        };
        assert_eq!(zero(0.0), zero(-0.0));
    }
}
