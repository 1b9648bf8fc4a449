//! The simulator's faults: owns one of every kind that real providers have, as the rest of the layer would see it.

use std::time::Duration;

use chrono::DateTime;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use stagegate_core::Code;

use super::super::{
    http::{error, malformed, paid, retryable},
    retry_after,
};
use crate::provider::{Answer, Finish, ProviderError};

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// 429 with `Retry-After: 1`.
    RateLimitedSeconds,
    /// 429 with `Retry-After: 0.5`.
    RateLimitedFraction,
    /// 429 with an HTTP date.
    RateLimitedDate,
    /// 429 with `retry-after-ms`.
    RateLimitedMillis,
    /// 429 with nothing but when the limit is reset.
    RateLimitedReset,
    /// 429 without a word on when to come back.
    RateLimitedSilent,
    /// 429 that must not be retried.
    QuotaExhausted,
    /// 500.
    Failed,
    /// 529.
    Overloaded,
    /// An error inside a 200.
    ErrorInside,
    /// The connection breaks halfway.
    Cut,
    /// A whole answer without usage.
    MissingUsage,
    /// Cut at the limit on tokens.
    Truncated,
    /// Filtered or refused.
    Refused,
    /// JSON that is none; for text, an answer that is not of the protocol's shape.
    Malformed,
    /// No answer.
    Hang,
}

impl Fault {
    pub(super) const ALL: [Self; 16] = [
        Self::RateLimitedSeconds,
        Self::RateLimitedFraction,
        Self::RateLimitedDate,
        Self::RateLimitedMillis,
        Self::RateLimitedReset,
        Self::RateLimitedSilent,
        Self::QuotaExhausted,
        Self::Failed,
        Self::Overloaded,
        Self::ErrorInside,
        Self::Cut,
        Self::MissingUsage,
        Self::Truncated,
        Self::Refused,
        Self::Malformed,
        Self::Hang,
    ];

    /// What becomes of a good answer.
    pub(super) fn apply(self, mut answer: Answer) -> Result<Answer, ProviderError> {
        let limited = |retry_after| {
            let told = error(Code::ProviderRateLimited, "sim: simulated fault: rate limit");
            Err(retryable(ProviderError { retry_after, ..told }))
        };
        let failed = |what: &str| Err(retryable(error(Code::ProviderFailed, format!("sim: simulated fault: {what}"))));
        let unheard = |code, what: &str| {
            let told = error(code, format!("sim: simulated fault: {what}"));
            Err(retryable(ProviderError { unheard: true, ..told }))
        };
        match self {
            Self::RateLimitedSeconds => limited(asked("retry-after", "1")),
            Self::RateLimitedFraction => limited(asked("retry-after", "0.5")),
            Self::RateLimitedDate => limited(asked("retry-after", "Thu, 01 Jan 1970 00:00:01 GMT")),
            Self::RateLimitedMillis => limited(asked("retry-after-ms", "250")),
            Self::RateLimitedReset => limited(retry_after::span("0m1s")),
            Self::RateLimitedSilent => limited(None),
            Self::QuotaExhausted => Err(error(Code::ProviderQuota, "sim: simulated fault: the quota is used up")),
            Self::Failed => failed("answered 500"),
            Self::Overloaded => failed("answered 529, overloaded"),
            Self::ErrorInside => failed("an error inside a 200"),
            Self::Cut => unheard(Code::ProviderUnreachable, "the connection broke"),
            Self::MissingUsage => Ok(Answer { usage: None, ..answer }),
            Self::Truncated => {
                cut(&mut answer.content);
                Ok(Answer { finish: Finish::Length, ..answer })
            }
            Self::Refused => {
                let content = "[simulated] I can't help with that.".to_owned();
                Ok(Answer { content, finish: Finish::Refused, ..answer })
            }
            Self::Malformed if answer.content.starts_with(['{', '[', '"']) && !answer.content.starts_with("[simul") => {
                cut(&mut answer.content);
                Ok(answer)
            }
            Self::Malformed => Err(paid(malformed("sim: simulated fault: the answer was malformed"), answer.usage)),
            Self::Hang => unheard(Code::ProviderTimeout, "no answer"),
        }
    }
}

/// Half of a text.
fn cut(text: &mut String) {
    let half = text.chars().count() / 2;
    *text = text.chars().take(half).collect();
}

/// What a header asks for, read as from a real provider; dates are measured from the epoch.
fn asked(name: &'static str, value: &'static str) -> Option<Duration> {
    let headers = HeaderMap::from_iter([(HeaderName::from_static(name), HeaderValue::from_static(value))]);
    retry_after::from_headers(&headers, DateTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use stagegate_core::Usage;

    use super::*;
    use crate::provider::Limits;

    fn answer(content: &str) -> Answer {
        Answer {
            content: content.into(),
            finish: Finish::Stop,
            usage: Some(Usage::default()),
            limits: Limits::default(),
        }
    }

    #[test]
    fn every_fault_is_one() {
        for fault in Fault::ALL {
            let good = answer("{\"a\": \"[simulated] b\"}");
            assert_ne!(fault.apply(good.clone()), Ok(good), "{fault:?}");
        }
    }

    #[test]
    fn only_a_used_up_quota_is_final_among_the_errors() {
        for fault in Fault::ALL {
            if let Err(error) = fault.apply(answer("text")) {
                assert_eq!(error.retryable, fault != Fault::QuotaExhausted, "{fault:?}");
                assert!(error.message.contains("simulated fault"), "{fault:?}");
            }
        }
    }

    #[test]
    fn each_form_of_a_wait_is_read() {
        let wait = |fault: Fault| fault.apply(answer("text")).expect_err("limited").retry_after;
        assert_eq!(wait(Fault::RateLimitedSeconds), Some(Duration::from_secs(1)));
        assert_eq!(wait(Fault::RateLimitedFraction), Some(Duration::from_millis(500)));
        assert_eq!(wait(Fault::RateLimitedDate), Some(Duration::from_secs(1)));
        assert_eq!(wait(Fault::RateLimitedMillis), Some(Duration::from_millis(250)));
        assert_eq!(wait(Fault::RateLimitedReset), Some(Duration::from_secs(1)));
        assert_eq!(wait(Fault::RateLimitedSilent), None);
    }
}
