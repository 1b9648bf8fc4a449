//! The provider: answers by what it is asked, after a while, or fails in the ways of real ones. Each answer names its
//! call, so that it can be followed through cache and checkpoint.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use rand::Rng;
use stagegate_core::{Code, Usage, pipeline::OutputFormat};
use stagegate_llm::provider::{Answer, Finish, Limits, Provider, ProviderError, ProviderRequest};

use crate::{
    Flaw,
    crasher::{Moment, ON_PURPOSE},
    world::{Away, LIMIT_MS, World},
};

/// What an answer of a stage says that passes its gate.
pub(crate) const GOOD: &str = "GOOD";

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Good,
    Poor,
    Malformed,
    Cut,
    Empty,
    Refused,
    Limited(Duration),
    Unreachable,
    Failed,
    Rejected,
    Hangs,
}

/// The provider, as one process reaches it.
#[derive(Debug)]
pub(crate) struct Scripted {
    pub(crate) world: Arc<World>,
    pub(crate) process: usize,
}

/// Who asks what, as the prompt says: `<<tag stage>>`.
fn asked(request: &ProviderRequest<'_>) -> (String, String) {
    let heading = request.messages.iter().find_map(|message| {
        let (_, rest) = message.content.split_once("<<")?;
        rest.split_once(">>")?.0.split_once(' ')
    });
    heading.map_or_else(Default::default, |(tag, stage)| (tag.to_owned(), stage.to_owned()))
}

fn digest(request: &ProviderRequest<'_>) -> u64 {
    let mut hasher = DefaultHasher::new();
    request.model.hash(&mut hasher);
    for message in request.messages {
        (message.role as u8, &message.content).hash(&mut hasher);
    }
    hasher.finish()
}

impl Scripted {
    /// Ends the process or the driver that asks for a run that crashes its owners.
    async fn crash(&self, call: u64, tag: &str) {
        let world = &self.world;
        let Some(crasher) = world.crasher.as_ref().filter(|crasher| crasher.tag == tag) else { return };
        if !matches!(crasher.moment, Moment::Panics | Moment::Calls) {
            return;
        }
        if crasher.charged {
            world.book(|checks| checks.charges(call, tag, price(&usage(call))));
        }
        if crasher.moment == Moment::Panics {
            world.lock().counts.crashes += 1;
            std::panic::panic_any(ON_PURPOSE);
        }
        world.strike(self.process, None);
        std::future::pending::<()>().await;
    }

    fn fate(&self) -> (Fate, Duration) {
        let slowness = self.world.lock().weather.slowness;
        if let Some(away) = self.world.away() {
            let latency = self.world.between(5, 600 * slowness);
            return match away {
                Away::Fails | Away::Flaps => (Fate::Failed, latency),
                Away::Unreachable => (Fate::Unreachable, latency),
                Away::Hangs => (Fate::Hangs, latency),
                Away::Limited(_) => (Fate::Limited(Duration::from_millis(LIMIT_MS.unsigned_abs())), latency),
                Away::Absurd => (Fate::Limited(Duration::from_hours(24 * 365)), latency),
                Away::FewSlots => (Fate::Good, self.world.between(500, 3_000)),
            };
        }
        if !self.world.strikes(|weather| weather.provider) {
            return (Fate::Good, self.world.between(5, 600 * slowness));
        }
        let longest = if self.world.strikes(|_| 0.1) { 8_000 } else { 900 * slowness };
        let latency = self.world.between(5, longest);
        let fate = match self.world.lock().rng.random_range(0..100) {
            0..25 => Fate::Good,
            25..50 => Fate::Poor,
            50..55 => Fate::Malformed,
            55..59 => Fate::Cut,
            59..61 => Fate::Empty,
            61..63 => Fate::Refused,
            63..70 => Fate::Limited(Duration::from_millis(500)),
            70..80 => Fate::Limited(Duration::from_secs(9)),
            80..94 => Fate::Failed,
            94..96 => Fate::Rejected,
            _ => Fate::Hangs,
        };
        (fate, latency)
    }
}

/// What was asked and not answered yet: dropped, it was abandoned.
struct UnderWay<'a> {
    world: &'a World,
    process: usize,
    call: u64,
    over: bool,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        if !self.over {
            self.world.note_by(self.process, || format!("abandons call {}", self.call));
        }
    }
}

#[async_trait]
impl Provider for Scripted {
    async fn call(&self, request: ProviderRequest<'_>) -> Result<Answer, ProviderError> {
        let world = &self.world;
        world.gate(self.process).await;
        let (tag, stage) = asked(&request);
        let call = {
            let counts = &mut world.lock().counts;
            counts.calls += 1;
            counts.calls
        };
        let digest = digest(&request);
        world.note_by(self.process, || format!("CALL {call}: {tag}/{stage}"));
        world.check(|checks| checks.call_starts(self.process, call, digest, &tag, &stage));
        assert!(world.store.flaw != Flaw::DriverPanics || call > 1, "the first call panics on purpose");
        let mut under_way = UnderWay { world, process: self.process, call, over: false };
        self.crash(call, &tag).await;
        let (fate, latency) = self.fate();
        if !matches!(fate, Fate::Limited(_) | Fate::Unreachable | Fate::Failed | Fate::Rejected) {
            let times = if world.store.flaw == Flaw::ChargesTwice { 2 } else { 1 };
            world.book(|checks| checks.charges(call, &tag, times * price(&usage(call))));
        }
        if fate == Fate::Hangs {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(latency).await;
        world.gate(self.process).await;
        under_way.over = true;
        let answer = answer(fate, call, &stage, request.format);
        let usable = matches!(fate, Fate::Good | Fate::Poor);
        world.note_by(self.process, || format!("call {call} ends: {fate:?}"));
        world.book(|checks| checks.call_ends(call, usable, answer.is_ok()));
        answer
    }

    fn kind(&self) -> &'static str {
        "sim"
    }

    fn is_configured(&self) -> bool {
        true
    }
}

#[expect(clippy::result_large_err, reason = "the provider's contract has it so")]
fn answer(fate: Fate, call: u64, stage: &str, format: &OutputFormat) -> Result<Answer, ProviderError> {
    let word = if fate == Fate::Poor { "POOR" } else { GOOD };
    let judges = stage.starts_with("judge-");
    let score = if fate == Fate::Poor { 0.2 } else { 0.9 };
    let content = match format {
        OutputFormat::Json { .. } if judges => format!("{{\"score\":{score},\"reason\":\"{word} [c{call}]\"}}"),
        OutputFormat::Json { .. } if fate == Fate::Poor => format!("{{\"w\":\"[c{call}]\"}}"),
        OutputFormat::Json { .. } => format!("{{\"v\":\"{word} [c{call}]\"}}"),
        OutputFormat::Text => format!("{word} [c{call}]"),
    };
    let (content, finish) = match fate {
        Fate::Good | Fate::Poor => (content, Finish::Stop),
        Fate::Malformed => (format!("{{ POOR [c{call}]"), Finish::Stop),
        Fate::Cut => (content, Finish::Length),
        Fate::Empty => (String::new(), Finish::Stop),
        Fate::Refused => (content, Finish::Refused),
        Fate::Limited(wait) => return Err(error(Code::ProviderRateLimited, true, Some(wait))),
        Fate::Unreachable => return Err(error(Code::ProviderUnreachable, true, None)),
        Fate::Failed | Fate::Hangs => return Err(error(Code::ProviderFailed, true, None)),
        Fate::Rejected => return Err(error(Code::ProviderRejected, false, None)),
    };
    Ok(Answer { content, finish, usage: Some(usage(call)), limits: Limits::default() })
}

/// What a call takes.
fn usage(call: u64) -> Usage {
    Usage { input_tokens: 100 + call % 7, output_tokens: 10 + call % 5, ..Usage::default() }
}

/// What that costs, in nano-dollars, by the price that the worlds have: 1 and 2 USD per million tokens.
fn price(usage: &Usage) -> i64 {
    i64::try_from(usage.input_tokens * 1_000 + usage.output_tokens * 2_000).unwrap_or(i64::MAX)
}

fn error(code: Code, retryable: bool, retry_after: Option<Duration>) -> ProviderError {
    ProviderError {
        code,
        message: "simulated".to_owned(),
        detail: None,
        retryable,
        retry_after,
        usage: None,
        unheard: false,
        answered: false,
        limits: Limits::default(),
    }
}
