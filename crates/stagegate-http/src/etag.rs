//! Entity tags and conditional GET. Tags are weak, because the same content may travel compressed or not.

use axum::response::{IntoResponse, Response};
use http::{
    HeaderMap, HeaderValue, StatusCode,
    header::{CACHE_CONTROL, ETAG, IF_NONE_MATCH, VARY},
};

/// What never changes may be kept for a year, by the one who asked alone.
pub(crate) const IMMUTABLE: &str = "private, max-age=31536000, immutable";
/// What seldom changes is asked for again, at the price of a 304.
pub(crate) const REVALIDATE: &str = "private, no-cache";

/// The tag of some content.
pub(crate) struct Tag(String);

impl Tag {
    /// From what identifies the content: digests and numbers. The binary's version is part of it, because another
    /// one may show the same content differently.
    pub(crate) fn new(content: impl std::fmt::Display) -> Self {
        Self(format!("W/\"{content}-{}\"", env!("CARGO_PKG_VERSION")))
    }

    /// Whether the caller has it already.
    pub(crate) fn is_held_by(&self, headers: &HeaderMap) -> bool {
        let own = opaque(&self.0);
        headers
            .get_all(IF_NONE_MATCH)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|list| list.split(','))
            .map(str::trim)
            .any(|given| given == "*" || opaque(given) == own)
    }

    /// The response with the tag, or 304 where the caller has it already.
    pub(crate) fn answer(
        &self,
        headers: &HeaderMap,
        cache_control: &'static str,
        full: impl FnOnce() -> Response,
    ) -> Response {
        let mut response = if self.is_held_by(headers) { StatusCode::NOT_MODIFIED.into_response() } else { full() };
        if let Ok(tag) = HeaderValue::from_str(&self.0) {
            response.headers_mut().insert(ETAG, tag);
        }
        response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static(cache_control));
        // Another key may be another tenant's.
        response.headers_mut().append(VARY, HeaderValue::from_static("authorization, x-api-key"));
        response
    }
}

fn opaque(tag: &str) -> &str {
    tag.strip_prefix("W/").unwrap_or(tag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_found_in_a_list_weak_or_not() {
        let tag = Tag::new("abc");
        let held = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(IF_NONE_MATCH, HeaderValue::from_str(text).expect("ascii"));
            tag.is_held_by(&headers)
        };
        let strong = opaque(&tag.0).to_owned();
        assert!(held(&tag.0) && held(&strong) && held(&format!("\"x\", {strong}")) && held("*"));
        assert!(!held("\"abc\"") && !tag.is_held_by(&HeaderMap::new()));
    }
}
