//! The configuration in force, for people and programs: owns how values and their origins are printed. Secrets come
//! here redacted.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::{DEFAULT, Effective, Loaded, keys};

/// As TOML, each value with its origin as a comment; what is unset is commented out.
pub(crate) fn toml(loaded: &Loaded) -> String {
    let mut text = String::from(
        "# The configuration in force, and where each value came from. Secrets are redacted.\n\
         # Defaults < file < environment < flags; docs/configuration.md explains every key.\n",
    );
    for (section, values) in sections(&loaded.values) {
        let _ = write!(text, "\n[{}]\n", keys::dotted(&section));
        let lines: Vec<(String, &str)> =
            values.iter().map(|value| (assignment(value), value.source.as_str())).collect();
        let width = lines.iter().map(|(line, _)| line.chars().count()).filter(|width| *width <= 56).max().unwrap_or(0);
        for (line, source) in lines {
            // What is unset has no source to tell.
            let _ = if line.starts_with('#') {
                writeln!(text, "{line}")
            } else {
                writeln!(text, "{line:<width$}  # {source}")
            };
        }
    }
    text
}

fn assignment(value: &Effective) -> String {
    let key = keys::dotted(&value.path[value.path.len() - 1..]);
    if value.value.is_null() { format!("# {key} (unset)") } else { format!("{key} = {}", toml_value(&value.value)) }
}

/// A value as TOML writes it.
pub(crate) fn toml_value(value: &Value) -> String {
    match value {
        Value::Array(items) => format!("[{}]", items.iter().map(toml_value).collect::<Vec<_>>().join(", ")),
        // JSON's form of texts, numbers and flags is TOML's too, but for floats without a point.
        Value::Number(number) if number.is_f64() => {
            let text = number.to_string();
            if text.contains(['.', 'e', 'E']) { text } else { format!("{text}.0") }
        }
        other => other.to_string(),
    }
}

/// The values by section: sections in the order of the schema, a parent before its children.
fn sections(values: &[Effective]) -> Vec<(Vec<String>, Vec<&Effective>)> {
    let mut sections: Vec<(Vec<String>, Vec<&Effective>)> = Vec::new();
    for value in values {
        let name = &value.path[..value.path.len() - 1];
        match sections.iter_mut().find(|(known, _)| known == name) {
            Some((_, values)) => values.push(value),
            None => sections.push((name.to_vec(), vec![value])),
        }
    }
    let tops: Vec<String> = sections.iter().map(|(name, _)| name[0].clone()).collect();
    let rank = |name: &[String]| tops.iter().position(|top| *top == name[0]);
    sections.sort_by_key(|(name, _)| (rank(name), name.clone()));
    sections
}

/// As JSON: a list of `{ key, value, source, set }`.
pub(crate) fn json(loaded: &Loaded) -> Value {
    let entry = |value: &Effective| {
        json!({
            "key": keys::dotted(&value.path),
            "value": value.value,
            "source": value.source,
            "set": value.source != DEFAULT,
        })
    };
    Value::Array(loaded.values.iter().map(entry).collect())
}
