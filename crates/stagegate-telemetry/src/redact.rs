//! What is never told: owns the rules by which field names and texts are redacted. Knows nothing of where they go.

use std::{borrow::Cow, sync::LazyLock};

use regex::Regex;

/// What stands in the place of a secret or a payload.
pub(crate) const REDACTED: &str = "[redacted]";

/// Fields that hold secrets, alone or as the last word of a longer name (`provider_api_key`).
const SECRET_NAMES: &[&str] = &[
    "api_key",
    "apikey",
    "authorization",
    "cookie",
    "credentials",
    "dsn",
    "passphrase",
    "password",
    "private_key",
    "secret",
    "token",
];

/// Fields that hold what users and models wrote.
const PAYLOAD_NAMES: &[&str] = &["body", "completion", "content", "critique", "input", "messages", "output", "prompt"];

/// Secrets inside a text, each behind the part that may stay: an `Authorization` value, a URL's user and password, a
/// query parameter, and keys that are known by how they begin. Linear in the text, as every pattern of this crate is.
static SECRET_TEXT: LazyLock<Regex> = LazyLock::new(|| {
    let pattern = r#"(?x)
        (?P<scheme> (?i:\b(?:bearer|basic)\s+) ) [A-Za-z0-9._~+/=-]{6,}
      | (?P<url>    (?i:\b[a-z][a-z0-9+.-]{1,20}://) ) [^\s/'"]+@
      | (?P<query>  (?i:[?&](?:key|api_key|token|access_token|password)=) ) [^\s&'"]+
      | \b(?: sg_[A-Za-z0-9_-]{8,} | sk-[A-Za-z0-9_-]{8,} | AIza[A-Za-z0-9_-]{20,} )
    "#;
    // A literal pattern: a test of this module runs it.
    #[expect(clippy::unwrap_used, reason = "the pattern is a literal")]
    Regex::new(pattern).unwrap()
});

/// Why a field may not be shown as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Anything may be in it but a secret.
    Plain,
    /// What users and models wrote: shown only where payloads were asked for. Numbers under such a name (tokens of
    /// the input, say) are none.
    Payload,
    /// Never shown.
    Secret,
}

/// What a field's name says of its value.
pub(crate) fn kind_of(name: &str) -> Kind {
    let name = name.to_ascii_lowercase().replace(['-', '.'], "_");
    let is = |known: &str| name == known || name.strip_suffix(known).is_some_and(|head| head.ends_with('_'));
    if SECRET_NAMES.iter().any(|known| is(known)) {
        Kind::Secret
    } else if PAYLOAD_NAMES.iter().any(|known| is(known)) {
        Kind::Payload
    } else {
        Kind::Plain
    }
}

/// The text without the secrets that can be told from their form.
pub(crate) fn mask(text: &str) -> Cow<'_, str> {
    SECRET_TEXT.replace_all(text, |found: &regex::Captures<'_>| {
        let keep = ["scheme", "url", "query"].iter().find_map(|group| found.name(group)).map_or("", |m| m.as_str());
        let at = if found.name("url").is_some() { "@" } else { "" };
        format!("{keep}{REDACTED}{at}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_hold_secrets_are_known_with_any_prefix() {
        for name in ["token", "api_key", "provider_api_key", "Authorization", "sentry.dsn", "x-api-key", "set-cookie"] {
            assert_eq!(kind_of(name), Kind::Secret, "{name}");
        }
        for name in ["tokens", "input_tokens", "token_count", "model", "key_id", "outputs"] {
            assert_eq!(kind_of(name), Kind::Plain, "{name}");
        }
        for name in ["prompt", "stage_output", "input"] {
            assert_eq!(kind_of(name), Kind::Payload, "{name}");
        }
    }

    #[test]
    fn secrets_inside_a_text_are_masked_and_the_rest_stays() {
        for (text, masked) in [
            ("sent Authorization: Bearer abc.def-123", "sent Authorization: Bearer [redacted]"),
            ("postgres://app:hunter2@db:5432/x is away", "postgres://[redacted]@db:5432/x is away"),
            ("POSTGRES://app:p@ss@db/x is away", "POSTGRES://[redacted]@db/x is away"),
            ("GET https://h/v1?key=AIzaSecret&alt=json", "GET https://h/v1?key=[redacted]&alt=json"),
            ("key sg_live_0123456789abcdef revoked", "key [redacted] revoked"),
            ("the key sk-ant-api03-abcdef failed", "the key [redacted] failed"),
            ("AIzaSyA0123456789abcdefghij", "[redacted]"),
            ("a basic idea, the bearer of news", "a basic idea, the bearer of news"),
            ("mail a@b.c about https://h/p@2x", "mail a@b.c about https://h/p@2x"),
        ] {
            assert_eq!(mask(text), masked);
        }
    }
}
