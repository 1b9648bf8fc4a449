//! The simulator: owns answers without a model. It needs no key, opens no socket, and every answer of it says that it
//! is simulated. For demonstrations, load tests and staging.
//!
//! An answer is a function of the seed, the model, the request and the sample: the same question gets the same answer
//! in every process. Latencies and faults are drawn from the same seed and from how often this process has asked the
//! question, so that a retry may fare better.
//!
//! Models, by the part after the slash:
//!
//! - `quick`: a good answer, after about the configured latency;
//! - `slow`: the same, ten times as late;
//! - `drafty`: a weak first draft, until the conversation holds a critique; then a revised answer;
//! - `faulty`: every second call fails with a fault drawn from every kind that real providers have.
//!
//! A request that judges (a system message that starts with [`JUDGE_GREETING`] or asks for a verdict, and a schema with
//! `score` or `verdict`, and `reason`) is answered with a low score where the judged text is a simulated first draft, else with a high one.
//! Text answers begin with a line that says that they are simulated; in JSON, every string that the schema leaves
//! free begins with `[simulated]`. (A schema without any free string leaves no place to say it.)
//!
//! An answer keeps to `max_output_tokens`: it is a shorter one, not one that is cut; only where no answer that fits the
//! schema is so short is it cut, as a model's would be. A schema that no value was found for is told when the pipeline is
//! registered ([`can_answer`]), and as an error otherwise. docs/simulator.md tells all of this to users.

mod dice;
mod faults;
mod json;
mod prose;
mod schema;

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use serde_json::{Value, json};
use stagegate_core::{
    Code, Usage,
    pipeline::{OutputFormat, Role},
};

use self::{dice::Dice, faults::Fault, prose::Prose};
use super::http::error;
use crate::{
    config::SimConfig,
    prices::{count_tokens_typical, text_tokens_typical},
    provider::{Answer, Finish, Limits, Provider, ProviderError, ProviderRequest},
};

/// The models that it plays.
pub const MODELS: &[&str] = &["quick", "slow", "drafty", "faulty"];

/// How the system message of every judge begins.
pub const JUDGE_GREETING: &str = "You are a strict reviewer";

/// Stands in the system message of every judge, also of one with words of its own.
pub const JUDGE_FORM: &str = "Answer with a JSON object with the keys `";

/// How the user message that carries a critique begins.
pub const CRITIQUE_GREETING: &str = "Your previous answer did not pass review";

/// Stands in every weak first draft; the simulated judge looks for it.
pub const DRAFT_MARK: &str = "Draft 1 (simulated first draft)";

/// Stands at the start of every free string of a JSON answer.
pub const MARK: &str = "[simulated]";

/// What is told where no value was found that fits the schema.
pub const UNANSWERABLE: &str = "the simulator found no value that fits the output's schema; use a real model for this stage, \
    or ask for less in the schema";

/// How many characters a token has, as [`text_tokens_typical`] counts.
const CHARS_PER_TOKEN: usize = 4;

/// The score of a simulated first draft.
const DRAFT_SCORE: f64 = 0.55;

/// The share of calls to `sim/faulty` that fail.
const FAULTY_RATE: f64 = 0.5;

/// How much later `sim/slow` answers.
const SLOW_FACTOR: f64 = 10.0;

/// How the latency spreads: the standard deviation of its logarithm.
const LATENCY_SIGMA: f64 = 0.35;

/// No answer takes longer than so many times the median.
const LATENCY_MAX_FACTOR: f64 = 5.0;

/// How long a hanging call takes: longer than any sane deadline.
const HANG: Duration = Duration::from_hours(1);

/// How many different questions are counted before counting begins anew.
const COUNTED_QUESTIONS_MAX: usize = 10_000;

/// The simulator.
#[derive(Debug)]
pub struct Sim {
    config: SimConfig,
    /// How often each question was asked, by its hash.
    asked: Mutex<HashMap<[u8; 32], u32>>,
}

impl Sim {
    /// From its configuration, whose shares are checked by [`super::build`].
    pub fn new(config: &SimConfig) -> Self {
        Self { config: config.clone(), asked: Mutex::default() }
    }

    fn count(&self, question: [u8; 32]) -> u32 {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if asked.len() >= COUNTED_QUESTIONS_MAX && !asked.contains_key(&question) {
            asked.clear();
        }
        let times = asked.entry(question).or_insert(0);
        *times = times.saturating_add(1);
        *times
    }

    fn latency(&self, model: &str, dice: &mut Dice) -> Duration {
        let median = self.config.latency.0.as_secs_f64() * if model == "slow" { SLOW_FACTOR } else { 1.0 };
        let factor = (LATENCY_SIGMA * dice.normal()).exp().min(LATENCY_MAX_FACTOR);
        Duration::from_secs_f64(median * factor)
    }

    fn fault(&self, request: &ProviderRequest<'_>, dice: &mut Dice) -> Option<Fault> {
        let configured = self.config.fault_rate;
        let rate = if request.model == "faulty" { configured.max(FAULTY_RATE) } else { configured };
        (dice.unit() < rate).then(|| *dice.pick(&Fault::ALL))
    }

    /// A good or a weak answer to what was asked. The same for the same question, always.
    fn answer(&self, request: &ProviderRequest<'_>, question: [u8; 32]) -> Result<Answer, ProviderError> {
        let mut dice = Dice::new(self.config.seed, "answer", question, 0);
        let content = match judged_schema(request) {
            Some(schema) => verdict(request, schema, &mut dice),
            None => self.content(request, &mut dice)?,
        };
        let usage = Usage {
            input_tokens: count_tokens_typical(request.messages),
            output_tokens: text_tokens_typical(&content),
            ..Usage::default()
        };
        let whole = Answer { content, finish: Finish::Stop, usage: Some(usage), limits: Limits::default() };
        Ok(bounded(whole, request))
    }

    fn content(&self, request: &ProviderRequest<'_>, dice: &mut Dice) -> Result<String, ProviderError> {
        let critique = critique(request);
        let is_draft = critique.is_none() && self.starts_weak(request);
        let prose = Prose::from_request(request);
        let chars_max = chars_max(request);
        match request.format {
            OutputFormat::Text => {
                let document = prose.document(self.config.seed, is_draft, critique, dice);
                Ok(chars_max.map_or_else(|| document.clone(), |most| prose.shortened(&document, most)))
            }
            OutputFormat::Json { schema } => {
                let any = json!({});
                let mark = if is_draft { format!("{MARK} {DRAFT_MARK}: ") } else { format!("{MARK} ") };
                let schema = schema.as_deref().unwrap_or(&any);
                let value = json::instance(schema, &prose, &mark, dice, chars_max);
                value.map(|value| value.to_string()).ok_or_else(|| error(Code::ProviderRejected, UNANSWERABLE))
            }
        }
    }

    /// Whether the first attempt at this stage is a weak one.
    fn starts_weak(&self, request: &ProviderRequest<'_>) -> bool {
        let rate = self.config.first_attempt_fail_rate;
        request.model == "drafty"
            || (rate > 0.0 && Dice::new(self.config.seed, "draft", hash(request), 0).unit() < rate)
    }
}

#[async_trait]
impl Provider for Sim {
    async fn call(&self, request: ProviderRequest<'_>) -> Result<Answer, ProviderError> {
        let question = hash(&request);
        let mut dice = Dice::new(self.config.seed, "call", question, self.count(question));
        let latency = self.latency(request.model, &mut dice);
        let fault = self.fault(&request, &mut dice);
        if !latency.is_zero() {
            tokio::time::sleep(latency).await;
        }
        let answer = self.answer(&request, question)?;
        match fault {
            None => Ok(answer),
            Some(Fault::Hang) => {
                tokio::time::sleep(HANG).await;
                Fault::Hang.apply(answer)
            }
            Some(fault) => fault.apply(answer),
        }
    }

    fn kind(&self) -> &'static str {
        "sim"
    }

    fn is_configured(&self) -> bool {
        true
    }

    fn models(&self) -> Option<&'static [&'static str]> {
        Some(MODELS)
    }
}

/// What a strict reviewer would say: a low score for a simulated first draft, a high one for everything else.
fn verdict(request: &ProviderRequest<'_>, schema: &Value, dice: &mut Dice) -> String {
    let is_draft = request.messages.iter().any(|m| m.role == Role::User && m.content.contains(DRAFT_MARK));
    let good = 0.85 + f64::from(dice.below(14)) / 100.0;
    let (score, reason) = if is_draft {
        (DRAFT_SCORE, "It reads as a first attempt: it names the points, but carries none of them out.")
    } else {
        (good, "Every point of the rubric is met, and each statement can be traced to the material.")
    };
    let prose = Prose::from_request(request);
    let mut verdict = json::instance(schema, &prose, &format!("{MARK} "), dice, None).unwrap_or_else(|| json!({}));
    if schema["properties"].get("verdict").is_some() {
        verdict["verdict"] = json!(if is_draft { "fail" } else { "pass" });
    } else if schema["properties"]["score"]["type"] == "integer" {
        verdict["score"] = json!(if is_draft { 2 } else { 5 });
    } else {
        // Two decimals are what a person would write.
        verdict["score"] = json!((score * 100.0).round() / 100.0);
    }
    verdict["reason"] = json!(format!("{MARK} {reason}"));
    verdict.to_string()
}

/// The question as 256 bits: everything that an answer may depend on.
fn hash(request: &ProviderRequest<'_>) -> [u8; 32] {
    let ProviderRequest { model, messages, params, format, sample } = *request;
    let format = match format {
        OutputFormat::Text => Value::Null,
        OutputFormat::Json { schema } => json!({ "schema": schema.as_deref() }),
    };
    *blake3::hash(json!([model, messages, params, format, sample]).to_string().as_bytes()).as_bytes()
}

/// The schema of a judge's verdict, where this request judges.
fn judged_schema<'a>(request: &ProviderRequest<'a>) -> Option<&'a Value> {
    let OutputFormat::Json { schema: Some(schema) } = request.format else { return None };
    let has = |key: &str| schema["properties"].get(key).is_some();
    let is_judge = |text: &str| text.starts_with(JUDGE_GREETING) || text.contains(JUDGE_FORM);
    let greeted = request.messages.iter().any(|m| m.role == Role::System && is_judge(&m.content));
    (greeted && (has("score") || has("verdict")) && has("reason")).then_some(schema.as_ref())
}

/// The last critique in the conversation.
fn critique<'a>(request: &ProviderRequest<'a>) -> Option<&'a str> {
    let users = request.messages.iter().rev().filter(|message| message.role == Role::User);
    users.map(|message| message.content.as_str()).find(|text| text.starts_with(CRITIQUE_GREETING))
}

/// Whether an answer of this format can be simulated.
pub fn can_answer(format: &OutputFormat) -> bool {
    match format {
        OutputFormat::Text | OutputFormat::Json { schema: None } => true,
        OutputFormat::Json { schema: Some(schema) } => json::can_be_met(schema),
    }
}

/// How long an answer may be, in characters: as the tokens of the simulator are counted.
fn chars_max(request: &ProviderRequest<'_>) -> Option<usize> {
    let tokens = usize::try_from(request.params.max_output_tokens?).unwrap_or(usize::MAX);
    Some(tokens.saturating_mul(CHARS_PER_TOKEN))
}

/// Cut at the first stop text and at the limit on tokens, as a real model would be.
fn bounded(mut answer: Answer, request: &ProviderRequest<'_>) -> Answer {
    let stops = request.params.stop.iter().filter(|stop| !stop.is_empty());
    if let Some(end) = stops.filter_map(|stop| answer.content.find(stop.as_str())).min() {
        answer.content.truncate(end);
    }
    let limit = u64::from(request.params.max_output_tokens.unwrap_or(u32::MAX));
    if text_tokens_typical(&answer.content) > limit {
        let chars = usize::try_from(limit).unwrap_or(usize::MAX).saturating_mul(CHARS_PER_TOKEN);
        answer.content = answer.content.chars().take(chars).collect();
        answer.finish = Finish::Length;
    }
    if let Some(usage) = &mut answer.usage {
        usage.output_tokens = text_tokens_typical(&answer.content);
    }
    answer
}
