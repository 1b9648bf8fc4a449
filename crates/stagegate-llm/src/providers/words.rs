//! What a server says of an error, in whatever shape: owns the reading of `error` (an object, a text, a list), `errors`,
//! `detail` (`FastAPI`), `message`, an error in the body of a 200, an HTML page. It decides nothing.

use std::borrow::Cow;

use serde_json::{Map, Value};
use stagegate_core::answer;

/// So many sentences of one error are told.
const PIECES_MAX: usize = 6;
/// The longest sentence, in characters; the rest tells nothing more.
const PIECE_MAX_CHARS: usize = 1_000;
/// An error inside of an error inside of an error is deep enough.
const DEPTH_MAX: usize = 4;
/// The keys under which servers put their sentence.
const SENTENCES: [&str; 9] = [
    "message",
    "msg",
    "Message",
    "error_message",
    "error_msg",
    "errorMessage",
    "status_msg",
    "faultstring",
    "error_description",
];
/// The keys under which servers put an error.
const INSIDE: [&str; 6] = ["error", "errors", "detail", "fault", "base_resp", "metadata"];

/// An error as a server told it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Told {
    /// Its sentences.
    pieces: Vec<String>,
    /// Its kind: `type`, or a `status` that is a word.
    pub(super) kind: String,
    /// Its code, as a text.
    pub(super) code: String,
    /// The parameter that it is about.
    pub(super) param: String,
    /// The status that it names.
    pub(super) status: Option<u16>,
}

impl Told {
    /// From a whole body.
    pub(super) fn of_body(bytes: &[u8]) -> Self {
        if let Some(value) = answer::body(bytes) {
            return Self::of(&value);
        }
        let text = String::from_utf8_lossy(bytes);
        Self { pieces: plain(&text).into_iter().map(cut).collect(), ..Self::default() }
    }

    /// From a part of a body.
    pub(super) fn of(value: &Value) -> Self {
        let mut told = Self::default();
        told.gather(value, 0);
        told
    }

    /// What it says, on one line; None where it has no words.
    pub(super) fn words(&self) -> Option<String> {
        (!self.pieces.is_empty()).then(|| self.pieces.join("; "))
    }

    /// Whether its code or its kind is one of these.
    pub(super) fn says(&self, words: &[&str]) -> bool {
        words.iter().any(|word| self.code == *word || self.kind == *word)
    }

    /// Everything that it says, in lower case, to look for names in.
    pub(super) fn haystack(&self) -> String {
        format!("{}; {}; {}", self.pieces.join("; "), self.code, self.kind).to_lowercase()
    }

    /// Whether it says that the prompt is longer than what the model can hold.
    pub(super) fn is_about_context(&self) -> bool {
        let says = self.haystack();
        [
            "context_length_exceeded",
            "exceed_context_size",
            "maximum context length",
            "context window",
            "context length",
            "context size",
            "prompt is too long",
            "input token count",
            "input length and `max_tokens` exceed",
        ]
        .into_iter()
        .any(|sign| says.contains(sign))
    }

    fn piece(&mut self, text: &str) {
        let text = text.trim();
        if !text.is_empty() && self.pieces.len() < PIECES_MAX && !self.pieces.iter().any(|piece| piece == text) {
            self.pieces.push(cut(text));
        }
    }

    fn gather(&mut self, value: &Value, depth: usize) {
        match value {
            Value::String(text) => self.piece(text),
            Value::Array(items) => items.iter().take(PIECES_MAX).for_each(|item| self.gather(item, depth + 1)),
            Value::Object(map) if depth <= DEPTH_MAX => self.gather_map(map, depth),
            _ => {}
        }
    }

    fn gather_map(&mut self, map: &Map<String, Value>, depth: usize) {
        // What is further inside is nearer to the cause.
        for (key, inside) in INSIDE.iter().filter_map(|key| map.get(*key).map(|inside| (*key, inside))) {
            match inside {
                // OpenRouter hands on what the vendor said; of the rest of `metadata` nothing is an error.
                Value::Object(metadata) if key == "metadata" => {
                    let raw = metadata.get("raw").and_then(Value::as_str).unwrap_or_default();
                    match serde_json::from_str::<Value>(raw) {
                        Ok(raw) => self.gather(&raw, depth + 1),
                        Err(_) => self.piece(raw),
                    }
                }
                // ASP.NET: a list of texts for each field.
                Value::Object(fields) if key == "errors" && !fields.contains_key("message") => {
                    fields.values().take(PIECES_MAX).for_each(|field| self.gather(field, depth + 1));
                }
                inside => self.gather(inside, depth + 1),
            }
        }
        let text = |key: &str| map.get(key).and_then(Value::as_str).filter(|text| !text.is_empty());
        let sentence = SENTENCES.iter().find_map(|key| text(key));
        match (sentence, place(map.get("loc"))) {
            (Some(sentence), Some(place)) => self.piece(&format!("{place}: {sentence}")),
            (Some(sentence), None) => self.piece(sentence),
            (None, _) if self.pieces.is_empty() => self.piece(text("title").unwrap_or_default()),
            (None, _) => {}
        }
        let note = |kept: &mut String, found: Option<Cow<'_, str>>| {
            if let Some(found) = found.filter(|_| kept.is_empty()) {
                kept.push_str(&found);
            }
        };
        let name = |key: &str| match map.get(key)? {
            Value::String(text) => Some(Cow::Borrowed(text.as_str())),
            Value::Number(number) => Some(Cow::Owned(number.to_string())),
            _ => None,
        };
        note(&mut self.kind, text("type").or_else(|| text("__type")).or_else(|| text("status")).map(Cow::Borrowed));
        note(&mut self.code, name("code"));
        note(&mut self.param, text("param").map(Cow::Borrowed));
        let status = |key: &str| {
            let number = name(key).and_then(|number| number.parse::<u16>().ok());
            number.filter(|status| (400..600).contains(status))
        };
        self.status = self.status.or_else(|| ["code", "status", "status_code"].iter().find_map(|key| status(key)));
    }
}

/// Whether a body says by its form that it is an error, whatever its status says.
pub(super) fn is_error(body: &Value) -> bool {
    let is_told = match &body["error"] {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !map.is_empty(),
        Value::Bool(true) | Value::Number(_) => true,
    };
    is_told || body["object"] == "error" || body["type"] == "error"
}

/// `FastAPI`'s way to a field: `body.model`.
fn place(loc: Option<&Value>) -> Option<String> {
    let parts = loc?.as_array()?.iter().take(8).map(|part| match part {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    });
    Some(parts.collect::<Vec<_>>().join("."))
}

/// What a text says that is no JSON: the title of a page, or itself.
fn plain(text: &str) -> Option<&str> {
    let text = text.trim_start_matches('\u{feff}').trim();
    if !text.starts_with('<') {
        return (!text.is_empty()).then_some(text);
    }
    ["title", "h1"].into_iter().find_map(|tag| inside(text, tag))
}

/// The text of the first element of a page with this name.
fn inside<'a>(page: &'a str, tag: &str) -> Option<&'a str> {
    // ASCII letters keep their places.
    let lower = page.to_ascii_lowercase();
    let begin = lower.find(&format!("<{tag}"))?;
    let begin = begin + lower[begin..].find('>')? + 1;
    let end = begin + lower[begin..].find(&format!("</{tag}"))?;
    Some(page[begin..end].trim()).filter(|title| !title.is_empty())
}

fn cut(text: impl AsRef<str>) -> String {
    text.as_ref().chars().take(PIECE_MAX_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_every_shape_are_found() {
        for (body, words) in [
            (r#"{"error": {"message": "no", "type": "t", "code": "c", "param": "p"}}"#, "no"),
            (r#"{"error": "no"}"#, "no"),
            (r#"{"error": ["no", {"message": "never"}]}"#, "no; never"),
            (r#"[{"error": {"message": "no"}}]"#, "no"),
            (r#"{"detail": "no"}"#, "no"),
            (r#"{"detail": {"error": {"message": "no"}}}"#, "no"),
            (r#"{"detail": [{"loc": ["body", "model"], "msg": "field required"}]}"#, "body.model: field required"),
            (r#"{"error": "wrong", "detail": ["no"]}"#, "wrong; no"),
            (r#"{"errors": [{"message": "no"}, {"message": "no"}]}"#, "no"),
            (r#"{"errors": {"model": ["is missing"]}, "title": "Bad"}"#, "is missing"),
            (r#"{"title": "Bad", "status": 400}"#, "Bad"),
            (r#"{"object": "error", "message": "no", "code": 50001}"#, "no"),
            (r#"{"message": "no"}"#, "no"),
            (r#"{"Message": "no"}"#, "no"),
            (r#"{"base_resp": {"status_code": 1004, "status_msg": "login fail"}}"#, "login fail"),
            (
                r#"{"error": {"message": "Provider returned error", "metadata": {"raw": "{\"error\":{\"message\":\"no\"}}"}}}"#,
                "no; Provider returned error",
            ),
            ("<html><head><TITLE>502 Bad\n Gateway</TITLE></head></html>", "502 Bad\n Gateway"),
            ("<!doctype html><h1 class='x'>No</h1>", "No"),
            ("upstream connect error", "upstream connect error"),
            ("\u{feff}{\"message\": \"no\"}", "no"),
        ] {
            assert_eq!(Told::of_body(body.as_bytes()).words().as_deref(), Some(words), "{body}");
        }
        for body in ["", "{}", "[]", "null", "<html>", "{\"error\": {}}", "{\"error\": null}"] {
            assert_eq!(Told::of_body(body.as_bytes()).words(), None, "{body}");
        }
    }

    #[test]
    fn codes_kinds_and_named_statuses_are_found_too() {
        let told =
            Told::of_body(br#"{"error": {"message": "no", "type": "t", "code": "c", "param": "p", "status": 429}}"#);
        assert_eq!((told.kind.as_str(), told.code.as_str(), told.param.as_str()), ("t", "c", "p"));
        assert_eq!(told.status, Some(429));
        assert_eq!(Told::of_body(br#"{"error": {"code": 502, "message": "died"}}"#).status, Some(502));
        assert_eq!(Told::of_body(br#"{"object": "error", "message": "no", "code": 50001}"#).status, None);
        assert_eq!(Told::of_body(br#"{"error": {"status": "NOT_FOUND"}}"#).kind, "NOT_FOUND");
    }

    #[test]
    fn an_endless_error_is_told_in_part() {
        let many = format!("[{}]", vec![r#"{"msg": "x"}, {"msg": "y"}"#; 10_000].join(","));
        assert_eq!(Told::of_body(many.as_bytes()).words().as_deref(), Some("x; y"));
        let long = format!(r#"{{"message": "{}"}}"#, "é".repeat(100_000));
        assert_eq!(Told::of_body(long.as_bytes()).words().expect("words").chars().count(), PIECE_MAX_CHARS);
        let deep = format!("{}\"no\"{}", r#"{"error":"#.repeat(100), "}".repeat(100));
        assert_eq!(Told::of_body(deep.as_bytes()).words(), None);
    }
}
