//! What a provider is to the rest: owns the request, the answer and the error that all of them share.
//! To add a provider, implement [`Provider`] in a file of its own and name it in [`crate::providers`].

use std::time::Duration;

use async_trait::async_trait;
use stagegate_core::{
    Code, Usage,
    pipeline::{Message, OutputFormat, Params},
};

use crate::config::DialectConfig;

/// One request to one model of one provider.
#[derive(Debug, Clone, Copy)]
pub struct ProviderRequest<'a> {
    /// The provider's own name of the model.
    pub model: &'a str,
    /// The conversation.
    pub messages: &'a [Message],
    /// Sampling parameters.
    pub params: &'a Params,
    /// What the answer must be.
    pub format: &'a OutputFormat,
    /// Which of several answers to the same question.
    pub sample: u32,
}

/// What a provider answered.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The text.
    pub content: String,
    /// Why it ended.
    pub finish: Finish,
    /// The tokens, where the provider told.
    pub usage: Option<Usage>,
    /// What is left of the provider's limits, where it told.
    pub limits: Limits,
}

/// Why an answer ended. Only one that was complete is a whole answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finish {
    /// It was complete.
    Stop,
    /// It met the limit on tokens.
    Length,
    /// It was filtered, or the model refused.
    Refused,
    /// Prompt and answer together filled what the model can hold.
    ContextFull,
    /// The model reasoned, and then ended without a word.
    Silent,
    /// The server broke off a long turn, and would go on if it were asked to.
    Paused,
    /// For a reason that is not known: the provider's name of it. Made by [`Finish::other`].
    Other(Box<str>),
}

/// The longest name of a reason that is passed on, in characters.
const REASON_MAX_CHARS: usize = 48;

impl Finish {
    /// A reason that is not known. What does not look like a name is not passed on: it might quote.
    pub fn other(name: &str) -> Self {
        let is_name = |name: &str| {
            let is_part = |c: char| c.is_ascii_alphanumeric() || "_-.:".contains(c);
            !name.is_empty() && name.len() <= REASON_MAX_CHARS && name.chars().all(is_part)
        };
        Self::Other(if is_name(name) { name.into() } else { "an unknown reason".into() })
    }
}

/// What is left of a provider's limits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Requests.
    pub requests_remaining: Option<u64>,
    /// Tokens.
    pub tokens_remaining: Option<u64>,
}

/// Why a provider did not answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct ProviderError {
    /// One of the `Provider…` codes.
    pub code: Code,
    /// A sentence for people; bounded, without keys, and without words of the provider, which may echo the prompt.
    pub message: String,
    /// What the provider said, bounded and without keys: only for who may read the prompt.
    pub detail: Option<String>,
    /// Whether the same call may succeed later.
    pub retryable: bool,
    /// What the provider asked for.
    pub retry_after: Option<Duration>,
    /// Tokens that were paid for all the same, where the provider told.
    pub usage: Option<Usage>,
    /// True where the request was sent, and what the provider made of it is not known: it may have charged for it.
    /// Vendors charge for nothing that they refuse or fail at, so that an error that was heard is no such case.
    pub unheard: bool,
    /// True where an answer of the vendor's shape came that cannot be used, or an error that does not say what it is.
    /// Prompts can bring that about, so that it is no sign that the model is ill, and no outage that is waited out.
    pub answered: bool,
    /// What is left of the provider's limits, where it told.
    pub limits: Limits,
}

/// A provider of models. Dropping the future of a call abandons it; deadlines are the caller's.
#[async_trait]
pub trait Provider: Send + Sync + std::fmt::Debug {
    /// Asks a model.
    async fn call(&self, request: ProviderRequest<'_>) -> Result<Answer, ProviderError>;

    /// `openai`, `anthropic`, `gemini` or `sim`.
    fn kind(&self) -> &'static str;

    /// Whether it has a key, or needs none.
    fn is_configured(&self) -> bool;

    /// The parameters that it has no counterpart for: the key of each, and what to do about it.
    fn unsupported(&self, _params: &Params) -> Vec<(&'static str, String)> {
        Vec::new()
    }

    /// The models that it serves, where it is known to serve no others.
    fn models(&self) -> Option<&'static [&'static str]> {
        None
    }

    /// What was found out about the dialects of its models, by model.
    fn dialects(&self) -> Vec<(String, DialectConfig)> {
        Vec::new()
    }
}
