//! What can go wrong, told stably: owns the error codes and the violation. Never decides what to do about one.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};
use utoipa::{PartialSchema, ToSchema};

use crate::{
    StoreError, evaluation,
    word::{self, Word},
};

/// Where the pages about the codes are published.
const PAGES: &str = "https://github.com/stagegate/stagegate/blob/main/docs/errors/";

/// One line a code: `Variant = "SGnnnn", status, "title"`. Each has a page in `docs/errors/`.
macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $status:literal, $title:literal;)*) => {
        /// A stable error code. Codes are never reused or renumbered.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Code {
            $($(#[$doc])* $name,)*
            /// A code of a newer release, kept as it is.
            Unknown(Word),
        }

        impl Code {
            /// Every code, in order.
            pub const ALL: &'static [Code] = &[$(Code::$name,)*];

            /// `SG0001` and so on.
            pub fn as_str(self) -> &'static str {
                match self { $(Code::$name => $code,)* Code::Unknown(word) => word.as_str() }
            }

            /// As counted: every unknown code is `unknown`, so that the values of a label stay few.
            pub const fn label(self) -> &'static str {
                match self { $(Code::$name => $code,)* Code::Unknown(_) => "unknown" }
            }

            /// The HTTP status that it is answered with.
            pub const fn status(self) -> u16 {
                match self { $(Code::$name => $status,)* Code::Unknown(_) => 500 }
            }

            /// A short summary of the kind of problem, the same for every occurrence.
            pub const fn title(self) -> &'static str {
                match self { $(Code::$name => $title,)* Code::Unknown(_) => "An error of a newer release" }
            }
        }
    };
}

codes! {
    // Requests
    /// The body or a parameter could not be read.
    InvalidRequest = "SG0001", 400, "The request could not be read";
    /// The body is not of a type that this route takes.
    UnsupportedMediaType = "SG0002", 415, "Unsupported content type";
    /// The body is over the limit.
    BodyTooLarge = "SG0003", 413, "The body is too large";
    /// No such route.
    RouteNotFound = "SG0004", 404, "No such route";
    /// The route exists, the method does not.
    MethodNotAllowed = "SG0005", 405, "Method not allowed";
    /// The answer took longer than the request limit.
    RequestTimeout = "SG0006", 408, "The request took too long";
    /// A limit on concurrent work was reached.
    Overloaded = "SG0007", 429, "Too much at once";
    /// A defect of ours.
    Internal = "SG0008", 500, "Internal error";
    /// A dependency is away; the same request may succeed later.
    Unavailable = "SG0009", 503, "Temporarily unavailable";
    /// No valid API key.
    Unauthenticated = "SG0010", 401, "Authentication is required";
    /// The key is valid, its role is too low.
    Forbidden = "SG0011", 403, "Not allowed for this key";
    /// The draining replica takes no new work.
    Draining = "SG0012", 503, "This replica is shutting down";
    /// The connection is beyond the listener's limit, where only probes are answered.
    TooManyConnections = "SG0013", 503, "Too many connections";
    /// Too many authentications from one address failed.
    TooManyFailures = "SG0014", 429, "Too many failed authentications";

    // Definitions
    /// A definition has mistakes; each is listed as a violation with its own code.
    InvalidDefinition = "SG0100", 422, "The pipeline definition has mistakes";
    /// Not YAML or JSON at all.
    Syntax = "SG0101", 422, "The document could not be parsed";
    /// A key that the schema does not know.
    UnknownKey = "SG0102", 422, "Unknown key";
    /// A value of a wrong type, range or form.
    WrongValue = "SG0103", 422, "Wrong value";
    /// A key that is required.
    MissingKey = "SG0104", 422, "Missing key";
    /// Two things with one name.
    Duplicate = "SG0105", 422, "Duplicate";
    /// `needs` names a stage that is not there.
    UnknownNeed = "SG0106", 422, "Unknown stage in `needs`";
    /// Stages need each other in a circle.
    Cycle = "SG0107", 422, "The stages form a cycle";
    /// A template does not parse.
    TemplateSyntax = "SG0108", 422, "The template could not be parsed";
    /// A template names something that will not be there.
    TemplateReference = "SG0109", 422, "The template names something that is not available";
    /// A JSON Schema inside the definition is none.
    InvalidSchema = "SG0110", 422, "Invalid JSON Schema";
    /// A regular expression or expression does not compile.
    InvalidExpression = "SG0111", 422, "Invalid expression";
    /// No configured provider serves the model.
    UnknownModel = "SG0112", 422, "No configured provider serves this model";
    /// The provider is known, but has no key.
    ProviderWithoutKey = "SG0113", 422, "The provider has no key";
    /// Too large, too deep, or too many aliases.
    DefinitionTooLarge = "SG0114", 422, "The document is too large or too deep";
    /// A budget on a model without a price.
    BudgetUnpriced = "SG0115", 422, "A budget needs a price";

    // Runs, as a caller sees them
    /// The input does not fit the pipeline's input schema.
    InvalidInput = "SG0200", 422, "The input does not fit the pipeline's schema";
    /// No such pipeline for this tenant.
    PipelineNotFound = "SG0201", 404, "No such pipeline";
    /// The pipeline exists, the version does not.
    VersionNotFound = "SG0202", 404, "No such pipeline version";
    /// No such run for this tenant.
    RunNotFound = "SG0203", 404, "No such run";
    /// The run's pipeline has no such stage.
    StageNotFound = "SG0204", 404, "No such stage";
    /// The idempotency key was used with another body.
    IdempotencyConflict = "SG0205", 409, "The idempotency key was used with a different request";
    /// The cursor is not one that this list gave.
    InvalidCursor = "SG0206", 400, "Invalid cursor";
    /// The action does not fit the state of the run or stage.
    WrongState = "SG0207", 409, "The run is in a state that does not allow this";
    /// A filter or parameter of a list is wrong.
    InvalidParameter = "SG0208", 400, "Invalid parameter";
    /// The queue limit is reached.
    QueueFull = "SG0209", 429, "The queue is full";
    /// No such key.
    KeyNotFound = "SG0210", 404, "No such API key";
    /// Retention removed the input and the outputs.
    Purged = "SG0211", 409, "The run's input and outputs were removed";
    /// A start that is too far off, or past the run's deadline.
    InvalidStart = "SG0212", 422, "The start time is not possible";
    /// A replica of an older release still runs, which would not understand it.
    OlderReplica = "SG0213", 409, "A replica of an older release would not understand this";
    /// The tenant may have no more pipelines or versions.
    QuotaReached = "SG0214", 403, "The tenant's quota is reached";
    /// The output that a person edited is not of the stage's form, or does not pass its checks.
    OutputRefused = "SG0215", 422, "The edited output does not fit the stage";

    // Why a run ended without success
    /// The gate failed and no attempt was left.
    GateFailed = "SG0300", 422, "The output did not pass its gate";
    /// The provider failed and no attempt was left.
    AttemptsExhausted = "SG0301", 502, "The model call failed on every attempt";
    /// An attempt outlived its timeout.
    StageTimeout = "SG0302", 504, "The stage timed out";
    /// The next call could have gone over the budget.
    BudgetExhausted = "SG0303", 402, "The budget is exhausted";
    /// The run outlived its deadline.
    DeadlinePassed = "SG0304", 504, "The run's deadline passed";
    /// A template failed while rendering.
    TemplateFailed = "SG0305", 422, "A template failed to render";
    /// A person rejected a held output.
    Rejected = "SG0306", 422, "The held output was rejected";
    /// Somebody cancelled the run.
    Cancelled = "SG0307", 409, "The run was cancelled";
    /// Its owners died or panicked again and again.
    RunCrashed = "SG0308", 500, "The run crashed its replicas";

    // Providers
    /// No connection, or it broke.
    ProviderUnreachable = "SG0400", 502, "The provider could not be reached";
    /// The provider refused our key.
    ProviderAuth = "SG0401", 502, "The provider refused the key";
    /// The provider asks to slow down.
    ProviderRateLimited = "SG0402", 429, "The provider limits the rate";
    /// The provider's account has no quota left; never retried.
    ProviderQuota = "SG0403", 402, "The provider's quota is exhausted";
    /// The provider does not know the model.
    ProviderModel = "SG0404", 502, "The provider does not know the model";
    /// The provider found our request wrong.
    ProviderRejected = "SG0405", 502, "The provider rejected the request";
    /// The provider failed (5xx, overloaded).
    ProviderFailed = "SG0406", 502, "The provider failed";
    /// The provider's answer was not of its own shape.
    ProviderMalformed = "SG0407", 502, "The provider's answer was malformed";
    /// The provider did not answer in time.
    ProviderTimeout = "SG0408", 504, "The provider did not answer in time";
    /// The provider filtered the prompt or the answer, or the model refused.
    ProviderRefused = "SG0409", 422, "The model refused, or the provider filtered";
    /// The breaker for this model is open.
    BreakerOpen = "SG0410", 503, "The provider is failing and is being spared";
    /// The provider's answer is over the limit.
    ProviderTooLarge = "SG0411", 502, "The provider's answer is too large";

    // Operations
    /// The configuration has mistakes.
    InvalidConfig = "SG0500", 500, "The configuration has mistakes";
    /// The database could not be reached.
    DatabaseUnreachable = "SG0501", 503, "The database could not be reached";
    /// The database's schema is older than this binary needs.
    SchemaBehind = "SG0502", 503, "The database's schema is too old";
    /// The database's schema is newer than this binary knows, or was changed.
    SchemaAhead = "SG0503", 503, "The database's schema is not known to this binary";
    /// A listener that others can reach needs authentication.
    OpenListener = "SG0504", 500, "A listener beyond loopback needs authentication";
    /// A stored row could not be read.
    CorruptRow = "SG0505", 500, "A stored row could not be read";
    /// Redis is away; runs go on without it.
    CacheUnavailable = "SG0506", 503, "The shared cache is unavailable";
}

impl Code {
    /// The page that explains this code: the `type` of a problem, and where the command line points to.
    pub fn docs_url(self) -> String {
        format!("{PAGES}{self}.md")
    }

    /// The code with this text, such as `SG0101`. None where the text is no word at all.
    pub fn parse(text: &str) -> Option<Self> {
        let known = Self::ALL.iter().copied().find(|code| code.as_str() == text);
        known.or_else(|| Word::new(text).map(Self::Unknown))
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Code {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for Code {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        word::deserialize(deserializer, Self::parse)
    }
}

impl PartialSchema for Code {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        utoipa::openapi::ObjectBuilder::new()
            .schema_type(utoipa::openapi::schema::Type::String)
            .pattern(Some("^SG[0-9]{4}$"))
            .description(Some("A stable error code; `docs/errors/` has a page for each"))
            .into()
    }
}

impl ToSchema for Code {}

/// One mistake in a document or a request: where it is, what it is, and what to write instead.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Violation {
    /// The stable code of this kind of mistake.
    pub code: Code,
    /// Where, as a path from the root: `stages[2].gate.judge.threshold`; empty for the whole.
    pub path: String,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub mend: Option<String>,
    /// The line in the source, counted from 1, where there is a source.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub line: Option<u32>,
    /// The column in that line, counted from 1.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub column: Option<u32>,
}

impl Violation {
    /// A mistake at `path`.
    pub fn new(code: Code, path: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code, path: path.into(), message: message.into(), mend: None, line: None, column: None }
    }

    /// The same, with what to do about it.
    #[must_use]
    pub fn mend(mut self, mend: impl Into<String>) -> Self {
        self.mend = Some(mend.into());
        self
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let (Some(line), Some(column)) = (self.line, self.column) {
            write!(f, "{line}:{column}: ")?;
        }
        write!(f, "{}", self.code)?;
        if !self.path.is_empty() {
            write!(f, " {}", self.path)?;
        }
        write!(f, ": {}", self.message)?;
        match &self.mend {
            Some(mend) => write!(f, " ({mend})"),
            None => Ok(()),
        }
    }
}

/// An error on its way to a caller: a code, a sentence that names the field and the mend, and every violation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {detail}")]
pub struct Error {
    /// The stable code.
    pub code: Code,
    /// What happened this time, and what to do.
    pub detail: String,
    /// Every mistake found, where there can be several.
    pub violations: Vec<Violation>,
    /// When to try again, where that is known.
    pub retry_after: Option<Duration>,
}

impl Error {
    /// An error with a sentence.
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into(), violations: Vec::new(), retry_after: None }
    }

    /// An error that lists mistakes.
    pub fn violations(code: Code, violations: Vec<Violation>) -> Self {
        let detail = match violations.as_slice() {
            [only] => only.to_string(),
            many => format!("{} mistakes; see `violations`", many.len()),
        };
        Self { code, detail, violations, retry_after: None }
    }

    /// The same, with a time after which it is worth trying again.
    #[must_use]
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        const RETRY_AFTER: Duration = Duration::from_secs(1);
        match &error {
            StoreError::Unavailable(_) | StoreError::Full(_) => {
                Error::new(Code::Unavailable, error.to_string()).retry_after(RETRY_AFTER)
            }
            StoreError::Corrupt { .. } => Error::new(Code::CorruptRow, error.to_string()),
            StoreError::SchemaBehind { .. } => Error::new(Code::SchemaBehind, error.to_string()),
            StoreError::SchemaAhead(_) => Error::new(Code::SchemaAhead, error.to_string()),
            StoreError::Defect(_) => Error::new(Code::Internal, error.to_string()),
        }
    }
}

/// The longest word that is compared with others, in bytes: comparing costs the product of two lengths.
const COMPARED_MAX_BYTES: usize = 64;
/// The most words that one is compared with.
const COMPARED_MAX: usize = 1_000;

/// The known word that is nearest to `given`, if any is near enough to be what was meant. Long words and long lists are
/// not gone through to their end, nor is anything once an evaluation has compared enough: it is a courtesy.
pub fn nearest<'a>(given: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if given.len() > COMPARED_MAX_BYTES {
        return None;
    }
    let length = given.chars().count();
    // Less than its length, or any word would do for a short one.
    let limit = (length / 3).max(2).min(length.saturating_sub(1));
    known
        .into_iter()
        .take(COMPARED_MAX)
        .filter(|word| word.len() <= COMPARED_MAX_BYTES && word.len().abs_diff(given.len()) <= 4 * limit)
        .take_while(|_| evaluation::may_compare())
        .map(|word| (strsim::damerau_levenshtein(given, word), word))
        .filter(|(distance, _)| *distance <= limit)
        .min()
        .map(|(_, word)| word)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn codes_are_unique_and_read_back() {
        let distinct: HashSet<_> = Code::ALL.iter().map(|c| c.as_str()).collect();
        assert_eq!(distinct.len(), Code::ALL.len());
        for code in Code::ALL {
            assert_eq!(Code::parse(code.as_str()), Some(*code));
            assert!(code.docs_url().ends_with(&format!("/docs/errors/{code}.md")));
        }
    }

    #[test]
    fn the_nearest_word_is_offered_only_when_it_is_near() {
        assert_eq!(nearest("prmpt", ["prompt", "params"]), Some("prompt"));
        assert_eq!(nearest("zebra", ["prompt", "params"]), None);
        assert_eq!(nearest("zz", ["a", "of"]), None);
    }

    #[test]
    fn words_that_are_long_or_many_are_not_compared() {
        let long = "a".repeat(60_000);
        assert_eq!(nearest(&long, [long.as_str(), "a"]), None);
        assert_eq!(nearest("prmpt", [long.as_str(), "prompt"]), Some("prompt"));
        let asked = std::cell::Cell::new(0);
        let many = (0..100_000).map(|_| {
            asked.set(asked.get() + 1);
            "params"
        });
        assert_eq!(nearest("prmpt", many), None);
        assert_eq!(asked.get(), COMPARED_MAX);
    }

    #[test]
    fn an_evaluation_stops_comparing_when_it_has_compared_enough() {
        let found = evaluation::brief(|| (0..30_000).filter(|_| nearest("prmpt", ["prompt"]).is_some()).count());
        assert_eq!(found, Ok(20_000));
    }
}
