//! The base path: owns where the API lies for its callers when a proxy serves it below a path of its own. Requests are taken
//! with it and without it, because some proxies cut it off and others do not; whatever is answered has it.

use http::{Uri, uri::PathAndQuery};
use serde::{Deserialize, Serialize};

/// The longest base path, in bytes.
const MAX_BYTES: usize = 200;
/// What our own paths begin with. A base path that began so could not be told from them.
const OWN: [&str; 8] = ["v1", "docs", "healthz", "readyz", "health", "metrics", "openapi.json", "console"];

/// Where the metrics are, for scrapers that reach the daemon without a proxy.
const METRICS: &str = "/metrics";

/// A path like `/stagegate`, without a slash at its end; empty for the root.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BasePath(String);

impl BasePath {
    /// Where a path of ours lies for callers.
    pub fn to(&self, path: &str) -> String {
        format!("{}{path}", self.0)
    }

    /// As in OpenAPI's `servers`.
    pub(crate) fn server(&self) -> &str {
        if self.0.is_empty() { "/" } else { &self.0 }
    }

    /// A path without the base path, where it begins with it. Metrics are served at the root alone: a proxy that cuts the base
    /// path off and refuses `/metrics` would else let the path with two of them through.
    pub(crate) fn below<'a>(&self, path: &'a str) -> Option<&'a str> {
        let rest = path.strip_prefix(self.0.as_str()).filter(|_| !self.0.is_empty())?;
        match rest {
            "" => Some("/"),
            METRICS => None,
            _ => rest.starts_with('/').then_some(rest),
        }
    }

    /// A request's target without the base path, where it begins with it.
    pub(crate) fn strip(&self, uri: &mut Uri) {
        let Some(path) = self.below(uri.path()) else { return };
        let target = uri.query().map_or_else(|| path.to_owned(), |query| format!("{path}?{query}"));
        let mut parts = uri.clone().into_parts();
        parts.path_and_query = PathAndQuery::try_from(target).ok();
        // A part of what was a target is one.
        if let Ok(stripped) = Uri::from_parts(parts) {
            *uri = stripped;
        }
    }
}

impl TryFrom<String> for BasePath {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let path = text.trim_end_matches('/');
        if path.is_empty() {
            return Ok(Self::default());
        }
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
        let is_segment = |part: &str| !part.is_empty() && !part.chars().all(|c| c == '.') && part.bytes().all(is_plain);
        let mut segments = path.strip_prefix('/').into_iter().flat_map(|rest| rest.split('/'));
        if !path.starts_with('/') || path.len() > MAX_BYTES || !segments.clone().all(is_segment) {
            return Err(
                "write a path as in `/stagegate`: a slash, then letters, digits, `-`, `.`, `_` or `~`".to_owned()
            );
        }
        match segments.next().filter(|first| OWN.contains(first)) {
            Some(first) => {
                Err(format!("`/{first}` is a path of the API itself; write another one, as in `/stagegate`"))
            }
            None => Ok(Self(path.to_owned())),
        }
    }
}

impl From<BasePath> for String {
    fn from(base: BasePath) -> Self {
        base.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base(text: &str) -> BasePath {
        BasePath::try_from(text.to_owned()).expect("a base path")
    }

    #[test]
    fn a_base_path_is_read_with_and_without_a_slash_at_its_end() {
        assert_eq!((base("/a/b/"), base("/"), base("")), (base("/a/b"), BasePath::default(), BasePath::default()));
        assert_eq!((base("/a").to("/v1/runs"), base("").to("/docs/")), ("/a/v1/runs".to_owned(), "/docs/".to_owned()));
        for wrong in ["a", "/a b", "/a//b", "/../x", "/a?b", "/%41", "https://x/a", "/v1", "/v1/x", "/docs/"] {
            assert!(BasePath::try_from(wrong.to_owned()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_target_is_taken_with_the_base_path_and_without_it() {
        let stripped = |from: &str| {
            let mut uri: Uri = from.parse().expect("a target");
            base("/gate").strip(&mut uri);
            uri.to_string()
        };
        for (from, to) in [
            ("/gate/v1/runs?limit=1", "/v1/runs?limit=1"),
            ("/v1/runs?limit=1", "/v1/runs?limit=1"),
            ("/gate", "/"),
            ("/gate/", "/"),
            ("/gate?x=1", "/?x=1"),
            ("/gateway/v1", "/gateway/v1"),
            ("/gate/gate/v1", "/gate/v1"),
            ("/gate/metrics", "/gate/metrics"),
            ("http://host:1/gate/healthz", "http://host:1/healthz"),
        ] {
            assert_eq!(stripped(from), to, "{from}");
        }
    }
}
