//! Schemas in one piece, for the simulator: owns how references are followed, how parts that hold together are joined, and
//! which words of JSON Schema are plain. It makes no values.

use serde_json::{Map, Value};

/// References, parts and branches that are followed in one schema.
const STEPS_MAX: usize = 48;

/// Words whose values are right by construction. The words of a schema's own parts are looked at one by one.
const PLAIN: [&str; 24] = [
    "$comment",
    "$defs",
    "$schema",
    "additionalProperties",
    "const",
    "default",
    "definitions",
    "description",
    "enum",
    "examples",
    "exclusiveMaximum",
    "exclusiveMinimum",
    "format",
    "items",
    "maxItems",
    "maxLength",
    "maximum",
    "minItems",
    "minLength",
    "minimum",
    "properties",
    "required",
    "title",
    "type",
];

/// Whether a schema uses plain words alone, in ways that cannot contradict each other.
pub(super) fn is_plain(schema: &Value) -> bool {
    match schema {
        Value::Bool(is_open) => *is_open,
        Value::Object(words) => words.iter().all(|(word, value)| is_plain_word(words, word, value)),
        _ => false,
    }
}

fn is_plain_word(words: &Map<String, Value>, word: &str, value: &Value) -> bool {
    if !PLAIN.contains(&word) {
        return false;
    }
    match word {
        "properties" | "$defs" | "definitions" => value.as_object().is_some_and(|parts| parts.values().all(is_plain)),
        "items" => is_plain(value),
        "additionalProperties" => value.is_boolean() || is_plain(value),
        // Beside a fixed value, other words may forbid it.
        "const" | "enum" => is_free_choice(words),
        "format" => !words.contains_key("minLength") && !words.contains_key("maxLength"),
        "required" => required_are_open(words, value),
        "minLength" => is_span(value, words.get("maxLength")),
        "minItems" => is_span(value, words.get("maxItems")),
        "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum" => has_room(words),
        _ => true,
    }
}

/// Whether fixed values stand alone, or beside a type that all of them have.
fn is_free_choice(words: &Map<String, Value>) -> bool {
    const BESIDE: [&str; 5] = ["const", "enum", "type", "title", "description"];
    let choices = words.get("enum").and_then(Value::as_array);
    let is_typed = match words.get("type") {
        None => true,
        Some(name) => name == "string" && choices.is_some_and(|choices| choices.iter().all(Value::is_string)),
    };
    let is_one_word = words.contains_key("const") != words.contains_key("enum");
    is_one_word
        && is_typed
        && choices.is_none_or(|choices| !choices.is_empty())
        && words.keys().all(|key| BESIDE.contains(&key.as_str()))
}

fn is_span(least: &Value, most: Option<&Value>) -> bool {
    let most = most.map_or(Some(u64::MAX), Value::as_u64);
    least.as_u64().zip(most).is_some_and(|(least, most)| least <= 10_000 && least <= most)
}

/// Whether everything that is required can be there.
fn required_are_open(words: &Map<String, Value>, required: &Value) -> bool {
    let named = words.get("properties").and_then(Value::as_object);
    let is_closed = words.get("additionalProperties") == Some(&Value::Bool(false));
    let mut keys = required.as_array().into_iter().flatten().filter_map(Value::as_str);
    keys.all(|key| !is_closed || named.is_some_and(|named| named.contains_key(key)))
}

/// Whether numbers lie between the bounds for sure: three whole ones apart, or closed ones.
fn has_room(words: &Map<String, Value>) -> bool {
    let at = |word: &str| words.get(word).and_then(Value::as_f64);
    let low = [at("minimum"), at("exclusiveMinimum")].into_iter().flatten().reduce(f64::max);
    let high = [at("maximum"), at("exclusiveMaximum")].into_iter().flatten().reduce(f64::min);
    let is_closed = at("exclusiveMinimum").is_none() && at("exclusiveMaximum").is_none();
    match (low, high) {
        (Some(low), Some(high)) if is_closed => high >= low && low.fract() == 0.0 && low.abs() < 1e15,
        (Some(low), Some(high)) => high - low >= 3.0 && low.abs().max(high.abs()) < 1e15,
        (one, other) => one.or(other).is_none_or(|bound| bound.abs() < 1e15),
    }
}

/// The schema with its references followed, the parts of `allOf` joined, and of each union and condition the branch that
/// `choose` takes, told how many there are.
pub(super) fn flat(schema: &Value, root: &Value, choose: &mut dyn FnMut(usize) -> usize) -> Value {
    let mut flat = schema.clone();
    for _ in 0..STEPS_MAX {
        let Some(object) = flat.as_object_mut() else { return flat };
        let mut parts: Vec<Value> = Vec::new();
        for word in ["$ref", "$dynamicRef", "$recursiveRef"] {
            if let Some(Value::String(target)) = object.remove(word) {
                parts.extend(referred(&target, root).cloned());
            }
        }
        if let Some(Value::Array(all)) = object.remove("allOf") {
            parts.extend(all);
        }
        for union in ["anyOf", "oneOf"] {
            if let Some(Value::Array(branches)) = object.remove(union) {
                let chosen = choose(branches.len());
                parts.extend(branches.into_iter().nth(chosen));
            }
        }
        if let Some(condition) = object.remove("if") {
            let (then, other) = (object.remove("then"), object.remove("else"));
            if choose(2) == 0 {
                parts.push(condition);
                parts.extend(then);
            } else {
                parts.extend(other);
            }
        }
        if parts.is_empty() {
            return flat;
        }
        for part in parts {
            merge(&mut flat, part);
        }
    }
    flat
}

/// What a reference inside of the document names: by its path, or by its anchor.
fn referred<'a>(target: &str, root: &'a Value) -> Option<&'a Value> {
    let path = target.strip_prefix('#')?;
    if path.is_empty() || path.starts_with('/') {
        return root.pointer(&decoded(path));
    }
    anchored(path, root, 0)
}

/// A path as it is without the escapes of a URL.
fn decoded(path: &str) -> String {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let [first, tail @ ..] = rest {
        let escaped =
            (*first == b'%').then(|| tail.get(..2)).flatten().and_then(|digits| std::str::from_utf8(digits).ok());
        if let Some(byte) = escaped.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            bytes.push(byte);
            rest = &tail[2..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn anchored<'a>(name: &str, schema: &'a Value, depth: usize) -> Option<&'a Value> {
    if depth > STEPS_MAX {
        return None;
    }
    match schema {
        Value::Object(words) => {
            let is_it =
                ["$anchor", "$dynamicAnchor"].iter().any(|word| words.get(*word).is_some_and(|given| given == name));
            if is_it { Some(schema) } else { words.values().find_map(|part| anchored(name, part, depth + 1)) }
        }
        Value::Array(parts) => parts.iter().find_map(|part| anchored(name, part, depth + 1)),
        _ => None,
    }
}

/// What both schemas demand, as far as it can be said by joining them.
fn merge(base: &mut Value, part: Value) {
    if part == Value::Bool(false) {
        // Nothing fits: an empty choice says so.
        *base = serde_json::json!({ "not": {} });
        return;
    }
    if !base.is_object() && base != &Value::Bool(false) {
        *base = Value::Object(Map::new());
    }
    let (Some(base), Value::Object(part)) = (base.as_object_mut(), part) else { return };
    for (key, value) in part {
        match (base.get_mut(&key), value) {
            (Some(Value::Object(known)), Value::Object(more))
                if matches!(key.as_str(), "properties" | "patternProperties") =>
            {
                for (name, inner) in more {
                    match known.get_mut(&name) {
                        Some(own) if *own != inner => *own = serde_json::json!({ "allOf": [own.take(), inner] }),
                        Some(_) => {}
                        None => drop(known.insert(name, inner)),
                    }
                }
            }
            (Some(Value::Array(known)), Value::Array(more)) if key == "required" => known.extend(more),
            (Some(Value::Array(known)), Value::Array(more)) if matches!(key.as_str(), "enum" | "type") => {
                known.retain(|choice| more.contains(choice));
            }
            (Some(Value::Array(known)), Value::String(one)) if key == "type" => {
                known.retain(|choice| *choice == one.as_str());
            }
            (Some(Value::String(one)), Value::Array(_)) if key == "type" && one != "number" => {}
            (Some(Value::String(one)), more) if key == "type" && one == "integer" && more == "number" => {}
            (Some(known @ Value::Object(_)), more @ Value::Object(_))
                if matches!(key.as_str(), "items" | "additionalProperties" | "propertyNames") =>
            {
                *known = serde_json::json!({ "allOf": [known.take(), more] });
            }
            (Some(Value::Bool(false)), _)
                if matches!(key.as_str(), "items" | "additionalProperties" | "unevaluatedProperties") => {}
            (Some(known), more) if key.starts_with("min") || key == "exclusiveMinimum" => {
                if more.as_f64() > known.as_f64() {
                    *known = more;
                }
            }
            (Some(known), more) if key.starts_with("max") || key == "exclusiveMaximum" => {
                if more.as_f64() < known.as_f64() {
                    *known = more;
                }
            }
            (Some(known), more) if key == "not" => {
                *known = serde_json::json!({ "anyOf": [known.take(), more] });
            }
            // Joined in a part of its own, which the next round takes up.
            (Some(Value::Array(known)), Value::Array(more)) if key == "allOf" => known.extend(more),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

/// The type: the first that is named and not null, else what the schema's other words speak of.
pub(super) fn type_of(schema: &Value) -> &str {
    let named = match &schema["type"] {
        Value::String(name) => Some(name.as_str()),
        Value::Array(names) => {
            let names: Vec<&str> = names.iter().filter_map(Value::as_str).collect();
            names.iter().copied().find(|name| *name != "null").or_else(|| names.first().copied())
        }
        _ => None,
    };
    let speaks_of = |words: &[&str]| words.iter().any(|word| schema.get(word).is_some());
    named.unwrap_or_else(|| {
        if speaks_of(&["properties", "required", "additionalProperties", "patternProperties", "minProperties"]) {
            "object"
        } else if speaks_of(&["items", "prefixItems", "contains", "minItems", "maxItems", "uniqueItems"]) {
            "array"
        } else if speaks_of(&["minLength", "maxLength", "pattern", "format", "contentMediaType"]) {
            "string"
        } else if speaks_of(&["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"]) {
            "number"
        } else {
            "object"
        }
    })
}

/// The schemas whose pattern a key matches.
pub(super) fn matching<'a>(patterns: Option<&'a Map<String, Value>>, key: &str) -> Vec<&'a Value> {
    let matches = |pattern: &str| {
        let automaton = regex_automata::meta::Builder::new().build(pattern);
        automaton.is_ok_and(|automaton| automaton.is_match(key))
    };
    patterns.into_iter().flatten().filter(|(pattern, _)| matches(pattern)).map(|(_, schema)| schema).collect()
}
