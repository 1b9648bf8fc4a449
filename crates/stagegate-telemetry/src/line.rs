//! One log line: owns its two written forms, JSON (the schema of `docs/logging.md`) and pretty, and its limits. Pure:
//! it knows neither clock nor stream.

use std::fmt::{self, Write as _};

use anstyle::{AnsiColor, Style};
use chrono::{DateTime, SecondsFormat, Utc};
use tracing::{
    Level,
    field::{Field, Visit},
};

use crate::{
    redact::{self, Kind, REDACTED},
    scope::Ids,
    text::is_unsafe,
};

/// The longest line, in bytes, its newline included.
pub(crate) const LINE_MAX_BYTES: usize = 16 * 1024;
/// The longest message in a line, in bytes as written.
const MESSAGE_MAX_BYTES: usize = 8 * 1024;
/// The longest value of a field, in bytes as written.
const FIELD_MAX_BYTES: usize = 4 * 1024;
/// What a line needs at its end, whatever was cut before: the mark and the braces.
const TAIL_BYTES: usize = 64;
/// What a cut text ends with, at most: `…[9999999999 bytes more]`.
const CUT_MARK_BYTES: usize = 32;

/// A value of a field, as it was recorded.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Bool(bool),
    /// A finite number, as it is written.
    Number(String),
    Text(String),
}

/// What an event holds, redacted.
#[derive(Debug, Default)]
pub(crate) struct Record {
    pub(crate) message: String,
    pub(crate) ids: Ids,
    pub(crate) fields: Vec<(&'static str, Value)>,
    /// Whether payloads may be shown.
    payloads: bool,
}

impl Record {
    /// An empty record that will take an event's fields.
    pub(crate) fn new(payloads: bool) -> Self {
        Self { payloads, ..Self::default() }
    }

    fn text(&mut self, field: &Field, text: &str) {
        let name = field.name();
        if name == "message" {
            self.message = redact::mask(text).into_owned();
        } else if !self.ids.take(name, text) {
            let shown = match redact::kind_of(name) {
                Kind::Secret => REDACTED.into(),
                Kind::Payload if !self.payloads => REDACTED.into(),
                Kind::Payload | Kind::Plain => redact::mask(text),
            };
            self.push(name, Value::Text(shown.into_owned()));
        }
    }

    fn number(&mut self, field: &Field, number: &dyn fmt::Display) {
        let name = field.name();
        let written = number.to_string();
        if self.ids.take(name, &written) {
            return;
        }
        let secret = redact::kind_of(name) == Kind::Secret;
        self.push(name, if secret { Value::Text(REDACTED.to_owned()) } else { Value::Number(written) });
    }

    /// The last value of a name counts, so that no line has a key twice.
    fn push(&mut self, name: &'static str, value: Value) {
        match self.fields.iter_mut().find(|(known, _)| *known == name) {
            Some(known) => known.1 = value,
            None => self.fields.push((name, value)),
        }
    }
}

impl Visit for Record {
    fn record_f64(&mut self, field: &Field, value: f64) {
        if value.is_finite() {
            self.number(field, &value);
        } else {
            self.text(field, &value.to_string());
        }
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.number(field, &value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.number(field, &value);
    }

    fn record_i128(&mut self, field: &Field, value: i128) {
        self.number(field, &value);
    }

    fn record_u128(&mut self, field: &Field, value: u128) {
        self.number(field, &value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.push(field.name(), Value::Bool(value));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.text(field, value);
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        let mut text = value.to_string();
        let mut cause = value.source();
        while let Some(inner) = cause {
            // Writing into a String does not fail.
            let _ = write!(text, ": {inner}");
            cause = inner.source();
        }
        self.text(field, &text);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.text(field, &format!("{value:?}"));
    }
}

/// When, how grave, and from where.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Head<'a> {
    pub(crate) at: DateTime<Utc>,
    pub(crate) level: Level,
    pub(crate) target: &'a str,
}

/// The line as one JSON object, with its newline. Never longer than [`LINE_MAX_BYTES`].
pub(crate) fn json(head: Head<'_>, record: &Record) -> String {
    let mut out = String::with_capacity(256);
    let mut truncated = false;
    out.push_str("{\"ts\":\"");
    out.push_str(&head.at.to_rfc3339_opts(SecondsFormat::Millis, true));
    out.push_str("\",\"level\":\"");
    out.push_str(level_name(head.level));
    out.push_str("\",\"target\":");
    truncated |= push_json_text(&mut out, head.target, 256);
    out.push_str(",\"msg\":");
    truncated |= push_json_text(&mut out, &record.message, MESSAGE_MAX_BYTES);
    for (name, value) in record.ids.iter() {
        let _ = write!(out, ",\"{name}\":");
        match value.parse::<u32>() {
            Ok(number) if name == "attempt" => drop(write!(out, "{number}")),
            _ => truncated |= push_json_text(&mut out, value, 256),
        }
    }
    truncated |= push_json_fields(&mut out, &record.fields);
    if truncated {
        out.push_str(",\"truncated\":true");
    }
    out.push_str("}\n");
    debug_assert!(out.len() <= LINE_MAX_BYTES, "a line of {} bytes", out.len());
    out
}

/// The event's own fields; true if something had to be cut.
fn push_json_fields(out: &mut String, fields: &[(&'static str, Value)]) -> bool {
    let mut truncated = false;
    let mut opened = false;
    for (name, value) in fields {
        let name = &name[..name.len().min(128)];
        let room = LINE_MAX_BYTES.saturating_sub(out.len() + TAIL_BYTES + name.len() + 16);
        if room < 2 * CUT_MARK_BYTES {
            truncated = true;
            break;
        }
        out.push_str(if opened { "," } else { ",\"fields\":{" });
        opened = true;
        truncated |= push_json_text(out, name, 256);
        out.push(':');
        match value {
            Value::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
            Value::Number(number) => out.push_str(number),
            Value::Text(text) => truncated |= push_json_text(out, text, room.min(FIELD_MAX_BYTES)),
        }
    }
    if opened {
        out.push('}');
    }
    truncated
}

/// The text as a JSON string of at most `max_bytes` between its quotes; true if it had to be cut.
fn push_json_text(out: &mut String, text: &str, max_bytes: usize) -> bool {
    out.push('"');
    let start = out.len();
    // Where it can still be cut so that the mark fits.
    let mut safe = (start, 0);
    for (at, character) in text.char_indices() {
        if out.len() - start + CUT_MARK_BYTES <= max_bytes {
            safe = (out.len(), at);
        }
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            hidden if is_unsafe(hidden) => {
                for unit in hidden.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            other => out.push(other),
        }
        if out.len() - start > max_bytes {
            out.truncate(safe.0);
            let _ = write!(out, "…[{} bytes more]\"", text.len() - safe.1);
            return true;
        }
    }
    out.push('"');
    false
}

fn level_name(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

/// The line for a person at a terminal, in colours (which its writer takes out where they are not wanted). Cut like
/// the JSON form; control characters are shown, not sent, as what is logged may come from a caller or a model.
pub(crate) fn pretty(head: Head<'_>, record: &Record) -> String {
    let (word, colour) = match head.level {
        Level::ERROR => ("ERROR", AnsiColor::Red),
        Level::WARN => (" WARN", AnsiColor::Yellow),
        Level::INFO => (" INFO", AnsiColor::Green),
        Level::DEBUG => ("DEBUG", AnsiColor::Blue),
        Level::TRACE => ("TRACE", AnsiColor::Magenta),
    };
    let level = colour.on_default().bold();
    let dim = Style::new().dimmed();
    let target = head.target.strip_prefix("stagegate_").unwrap_or(head.target);
    let target = target.split("::").next().unwrap_or(target);
    let mut out = String::with_capacity(192);
    let _ = write!(out, "{dim}{}{dim:#} {level}{word}{level:#} ", head.at.format("%H:%M:%S%.3f"));
    let _ = write!(out, "{dim}{target:<9}{dim:#} ");
    push_plain_text(&mut out, &record.message, MESSAGE_MAX_BYTES);
    for (name, value) in record.ids.iter() {
        let _ = write!(out, " {dim}{name}={dim:#}");
        push_plain_text(&mut out, value, 128);
    }
    for (name, value) in &record.fields {
        let room = LINE_MAX_BYTES.saturating_sub(out.len() + TAIL_BYTES + name.len() + 16);
        if room < 2 * CUT_MARK_BYTES {
            out.push_str(" …");
            break;
        }
        let _ = write!(out, " {dim}{name}={dim:#}");
        match value {
            Value::Bool(value) => drop(write!(out, "{value}")),
            Value::Number(number) => out.push_str(number),
            Value::Text(text) => push_plain_text(&mut out, text, room.min(FIELD_MAX_BYTES)),
        }
    }
    out.push('\n');
    out
}

fn push_plain_text(out: &mut String, text: &str, max_bytes: usize) {
    let start = out.len();
    for (at, character) in text.char_indices() {
        if out.len() - start + CUT_MARK_BYTES > max_bytes {
            let _ = write!(out, "…[{} bytes more]", text.len() - at);
            return;
        }
        match character {
            '\n' => out.push_str("\n    "),
            '\t' => out.push('\t'),
            hidden if is_unsafe(hidden) => out.extend(hidden.escape_unicode()),
            other => out.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head() -> Head<'static> {
        let at = DateTime::from_timestamp_millis(1_795_000_000_123).expect("a time");
        Head { at, level: Level::WARN, target: "stagegate_engine::claim" }
    }

    fn record(message: &str, fields: Vec<(&'static str, Value)>) -> Record {
        Record { message: message.to_owned(), fields, ..Record::default() }
    }

    fn read(line: &str) -> serde_json::Value {
        assert!(line.len() <= LINE_MAX_BYTES, "{} bytes", line.len());
        assert_eq!(line.matches('\n').count(), 1, "one line");
        serde_json::from_str(line).expect("JSON")
    }

    #[test]
    fn a_line_has_the_documented_keys_in_their_order() {
        let mut record =
            record("over \"there\"\n", vec![("runs", Value::Number("3".into())), ("ok", Value::Bool(true))]);
        record.ids.take("run_id", "run_1");
        record.ids.take("attempt", "2");
        let expected = r#"{"ts":"2026-11-18T12:26:40.123Z","level":"warn","target":"stagegate_engine::claim","msg":"over \"there\"\n","run_id":"run_1","attempt":2,"fields":{"runs":3,"ok":true}}"#;
        let line = json(head(), &record);
        let value = read(&line);
        assert_eq!(value["fields"]["runs"], 3);
        assert_eq!(line.trim_end().replace(value["ts"].as_str().expect("text"), "2026-11-18T12:26:40.123Z"), expected);
    }

    #[test]
    fn no_text_makes_a_line_too_long_or_unreadable() {
        for filler in ["x", "\u{0}", "\"", "é", "𝄞", "\\", "\u{7f}"] {
            for count in [10, 3_000, 4_095, 4_096, 8_200, 50_000] {
                let long = filler.repeat(count);
                let names = ["a", "b", "c", "d", "e", "f", "g", "h"];
                let fields = names.iter().map(|name| (*name, Value::Text(long.clone()))).collect();
                let value = read(&json(head(), &record(&long, fields)));
                let whole = value["msg"] == long.as_str() && value["fields"]["h"] == long.as_str();
                assert_eq!(value.get("truncated").is_none(), whole, "{filler:?} × {count}");
                assert!(pretty(head(), &record(&long, Vec::new())).len() < LINE_MAX_BYTES + 4 * MESSAGE_MAX_BYTES);
            }
        }
    }

    #[test]
    fn a_cut_text_says_how_much_is_missing() {
        let value = read(&json(head(), &record(&"x".repeat(10_000), Vec::new())));
        let message = value["msg"].as_str().expect("text");
        let kept = message.chars().take_while(|c| *c == 'x').count();
        assert!(message.ends_with(&format!("…[{} bytes more]", 10_000 - kept)), "{message}");
        assert_eq!(value["truncated"], true);
    }

    #[test]
    fn a_terminal_is_never_sent_control_characters_of_others() {
        let line = pretty(head(), &record("\u{1b}[2Jgone\u{7}", vec![("path", Value::Text("\u{1b}]0;x".into()))]));
        let plain = anstream::adapter::strip_str(&line).to_string();
        assert!(plain.contains("\\u{1b}[2Jgone\\u{7}"), "{plain}");
        assert!(plain.contains("path=\\u{1b}]0;x"), "{plain}");
    }
}
