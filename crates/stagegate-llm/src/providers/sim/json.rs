//! The simulator's JSON: owns the making of a value that fits a JSON Schema. It knows the words that schemas of answers
//! use: types, enumerations, bounds, nesting, unions (the first branch), local references, patterns. What it does not
//! know (`not`, `if`, `dependentSchemas` …) it passes over.

use std::collections::BTreeMap;

use regex_syntax::hir::{Class, Hir, HirKind};
use serde_json::{Map, Number, Value, json};

use super::{dice::Dice, prose::Prose};

/// Past this depth only what is required is made.
const DEPTH_ROOMY: usize = 6;

/// Past this depth nothing is made: the schema refers to itself.
const DEPTH_MAX: usize = 48;

/// Items of an array, where the schema leaves the choice.
const ITEMS_USUAL: u64 = 3;

/// The longest list and the longest text that a schema's lower bound can demand.
const DEMAND_MAX: u64 = 10_000;

/// How often a starred part of a pattern is repeated.
const PATTERN_REPEAT: u32 = 3;

/// A value that fits the schema. Free strings begin with `mark`.
pub(super) fn instance(schema: &Value, prose: &Prose, mark: &str, dice: &mut Dice) -> Value {
    // Another sample or seed begins elsewhere in the material.
    let start = dice.index(prose.len());
    let mut maker = Maker { root: schema, prose, mark, dice, start, made: BTreeMap::new() };
    maker.value(schema, &[], 0)
}

struct Maker<'a> {
    root: &'a Value,
    prose: &'a Prose,
    mark: &'a str,
    dice: &'a mut Dice,
    /// The first sentence of the material that is used.
    start: usize,
    /// Counts the strings made at each place, so that the items of a list differ.
    made: BTreeMap<String, usize>,
}

impl Maker<'_> {
    fn value(&mut self, schema: &Value, keys: &[&str], depth: usize) -> Value {
        if depth > DEPTH_MAX || schema == &Value::Bool(false) {
            return Value::Null;
        }
        let schema = flat(schema, self.root);
        if let Some(constant) = schema.get("const") {
            return constant.clone();
        }
        if let Some(choices) = schema["enum"].as_array().filter(|choices| !choices.is_empty()) {
            return self.dice.pick(choices).clone();
        }
        match type_of(&schema) {
            "object" => self.object(&schema, keys, depth),
            "array" => self.array(&schema, keys, depth),
            "string" => Value::String(self.string(&schema, keys)),
            "integer" => integer(&schema, self.dice),
            "number" => number(&schema, keys, self.dice),
            "boolean" => Value::Bool(self.dice.below(4) > 0),
            _ => Value::Null,
        }
    }

    fn object(&mut self, schema: &Value, keys: &[&str], depth: usize) -> Value {
        let mut object = Map::new();
        let required: Vec<&str> =
            schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let properties = schema["properties"].as_object();
        for (key, inner) in properties.into_iter().flatten() {
            let is_wanted = required.contains(&key.as_str()) || (depth < DEPTH_ROOMY && inner != &Value::Bool(false));
            if is_wanted {
                let value = self.value(inner, &[keys, &[key.as_str()]].concat(), depth + 1);
                object.insert(key.clone(), value);
            }
        }
        let text = json!({ "type": "string" });
        let other = schema.get("additionalProperties").filter(|other| other.is_object()).unwrap_or(&text);
        for key in required {
            if !object.contains_key(key) {
                let value = self.value(other, &[keys, &[key]].concat(), depth + 1);
                object.insert(key.to_owned(), value);
            }
        }
        let is_open = schema.get("additionalProperties") != Some(&Value::Bool(false));
        let least = schema["minProperties"].as_u64().unwrap_or(0).min(DEMAND_MAX);
        if object.is_empty() && least == 0 && is_open && properties.is_none() {
            object.insert("summary".to_owned(), self.value(other, &[keys, &["summary"]].concat(), depth + 1));
        }
        let mut extra = 0;
        while is_open && u64::try_from(object.len()).unwrap_or(u64::MAX) < least {
            extra += 1;
            let key = format!("item_{extra}");
            let value = self.value(other, &[keys, &[key.as_str()]].concat(), depth + 1);
            object.insert(key, value);
        }
        Value::Object(object)
    }

    fn array(&mut self, schema: &Value, keys: &[&str], depth: usize) -> Value {
        let least = schema["minItems"].as_u64().unwrap_or(0).min(DEMAND_MAX);
        let most = schema["maxItems"].as_u64().unwrap_or(u64::MAX);
        let first = schema["prefixItems"].as_array().map(Vec::as_slice).unwrap_or_default();
        let usual = if depth < DEPTH_ROOMY { ITEMS_USUAL + u64::from(self.dice.below(2)) } else { 0 };
        let text = json!({ "type": "string" });
        let rest = match schema.get("items") {
            Some(Value::Bool(false)) => None,
            Some(items) if items.is_object() => Some(items),
            _ => Some(&text),
        };
        let prefix = u64::try_from(first.len()).unwrap_or(u64::MAX);
        let wanted = if rest.is_none() || prefix > 0 { prefix.max(least) } else { usual.max(least) }.min(most);
        let is_unique = schema["uniqueItems"] == true;
        let mut items: Vec<Value> = Vec::new();
        // A few spare turns, where items must differ and chance repeats one.
        for _ in 0..wanted.saturating_mul(if is_unique { 20 } else { 1 }) {
            let count = u64::try_from(items.len()).unwrap_or(u64::MAX);
            if count >= wanted {
                break;
            }
            let Some(inner) = first.get(items.len()).or(rest) else { break };
            let mut item = self.value(inner, keys, depth + 1);
            if is_unique && items.contains(&item) {
                item = distinct(inner, self.root, &items).unwrap_or(item);
            }
            if !is_unique || !items.contains(&item) {
                items.push(item);
            }
        }
        Value::Array(items)
    }

    fn string(&mut self, schema: &Value, keys: &[&str]) -> String {
        let made = self.made.entry(keys.join(" ")).or_insert(0);
        let nth = *made;
        *made += 1;
        if let Some(Ok(hir)) = schema["pattern"].as_str().map(regex_syntax::parse) {
            let mut text = String::new();
            follow(&hir, self.dice, &mut text);
            return text;
        }
        if let Some(text) = schema["format"].as_str().and_then(|format| formatted(format, nth)) {
            return text;
        }
        let least = usize::try_from(schema["minLength"].as_u64().unwrap_or(0).min(DEMAND_MAX)).unwrap_or(0);
        let most = usize::try_from(schema["maxLength"].as_u64().unwrap_or(u64::MAX)).unwrap_or(usize::MAX);
        let words = self.words(keys, nth);
        let marked = format!("{}{words}", self.mark);
        // Where the mark leaves no room for words, the words are worth more.
        let text = if most < self.mark.chars().count() + 8 { words } else { marked };
        let mut text: String = text.chars().take(most).collect();
        let mut spare = nth;
        while text.chars().count() < least {
            spare += 1;
            text = format!("{text} {}.", self.prose.sentence(self.start + spare)).chars().take(most).collect();
        }
        text
    }

    fn words(&self, keys: &[&str], nth: usize) -> String {
        match keys.last().map(|key| key.to_lowercase()).unwrap_or_default().as_str() {
            "id" | "key" | "code" => format!("{}-{}", letter(keys), nth + 1),
            "title" | "name" | "label" | "heading" | "component" | "owner" => self.prose.phrase(self.start + nth),
            _ => self.prose.statement_for(&keys.join(" "), self.start + nth),
        }
    }
}

/// The first letter of the list that an id belongs to: `R` for `requirements`.
fn letter(keys: &[&str]) -> char {
    let list = keys.iter().rev().nth(1).and_then(|key| key.chars().find(char::is_ascii_alphabetic));
    list.map_or('X', |letter| letter.to_ascii_uppercase())
}

/// The schema with its reference followed, the parts of `allOf` joined and the first branch of a union taken.
fn flat(schema: &Value, root: &Value) -> Value {
    let mut flat = schema.clone();
    for _ in 0..DEPTH_MAX {
        let Some(object) = flat.as_object_mut() else { return flat };
        let mut parts: Vec<Value> = Vec::new();
        if let Some(target) = object.remove("$ref") {
            let target = target.as_str().and_then(|path| path.strip_prefix('#')).and_then(|path| root.pointer(path));
            parts.extend(target.cloned());
        }
        if let Some(Value::Array(all)) = object.remove("allOf") {
            parts.extend(all);
        }
        for union in ["anyOf", "oneOf"] {
            if let Some(Value::Array(branches)) = object.remove(union) {
                parts.extend(branches.into_iter().next());
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

/// What both schemas demand, as far as it can be said by joining them.
fn merge(base: &mut Value, part: Value) {
    let (Some(base), Value::Object(part)) = (base.as_object_mut(), part) else { return };
    for (key, value) in part {
        match (base.get_mut(&key), value) {
            (Some(Value::Object(known)), Value::Object(more)) if key == "properties" => known.extend(more),
            (Some(Value::Array(known)), Value::Array(more)) if key == "required" => known.extend(more),
            (Some(known), more) if matches!(key.as_str(), "minimum" | "minLength" | "minItems" | "minProperties") => {
                if more.as_f64() > known.as_f64() {
                    *known = more;
                }
            }
            (Some(known), more) if matches!(key.as_str(), "maximum" | "maxLength" | "maxItems" | "maxProperties") => {
                if more.as_f64() < known.as_f64() {
                    *known = more;
                }
            }
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

/// The type: the first that is named and not null, else what the schema's other words speak of.
fn type_of(schema: &Value) -> &str {
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
        if speaks_of(&["properties", "required", "additionalProperties", "minProperties"]) {
            "object"
        } else if speaks_of(&["items", "prefixItems", "minItems", "maxItems", "uniqueItems"]) {
            "array"
        } else if speaks_of(&["minLength", "maxLength", "pattern", "format"]) {
            "string"
        } else if speaks_of(&["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"]) {
            "number"
        } else {
            "object"
        }
    })
}

/// The bounds of a number: (lowest, highest), both allowed, `step` away from an excluded one.
fn bounds(schema: &Value, step: f64, usual: (f64, f64)) -> (f64, f64) {
    let at = |key: &str| schema[key].as_f64();
    let least = at("minimum").into_iter().chain(at("exclusiveMinimum").map(|n| n + step)).reduce(f64::max);
    let most = at("maximum").into_iter().chain(at("exclusiveMaximum").map(|n| n - step)).reduce(f64::min);
    match (least, most) {
        (None, None) => usual,
        (Some(least), None) => (least, least + (usual.1 - usual.0)),
        (None, Some(most)) => (most - (usual.1 - usual.0), most),
        (Some(least), Some(most)) => (least, most.max(least)),
    }
}

fn integer(schema: &Value, dice: &mut Dice) -> Value {
    let (least, most) = bounds(schema, 1.0, (1.0, 5.0));
    let step = schema["multipleOf"].as_f64().filter(|step| *step >= 1.0).map_or(1.0, f64::floor);
    let (low, high) = ((least / step).ceil(), (most / step).floor());
    let span = (high - low).clamp(0.0, 1e6);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped just above; casts saturate")]
    let picked = (low + f64::from(dice.below(span as u32 + 1))) * step;
    #[expect(clippy::cast_possible_truncation, reason = "float casts saturate")]
    let whole = picked as i64;
    json!(whole)
}

fn number(schema: &Value, keys: &[&str], dice: &mut Dice) -> Value {
    let shares = ["score", "probability", "likelihood", "confidence", "share", "ratio"];
    let is_share = keys.last().is_some_and(|key| shares.contains(&key.to_lowercase().as_str()));
    let usual = if is_share { (0.0, 1.0) } else { (1.0, 5.0) };
    if let Some(step) = schema["multipleOf"].as_f64().filter(|step| *step > 0.0) {
        let (least, most) = bounds(schema, step, usual);
        let low = (least / step).ceil();
        let high = (most / step).floor().max(low);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped; casts saturate")]
        let steps = dice.below((high - low).clamp(0.0, 1e6) as u32 + 1);
        return float((low + f64::from(steps)) * step);
    }
    let (least, most) = bounds(schema, 1e-6, usual);
    let picked = least + (most - least) * dice.unit();
    // Two decimals read better, where the bounds allow them.
    let rounded = (picked * 100.0).round() / 100.0;
    float(if (least..=most).contains(&rounded) { rounded } else { picked })
}

fn float(number: f64) -> Value {
    Number::from_f64(number).map_or_else(|| json!(0), Value::Number)
}

/// A text of a well-known format.
fn formatted(format: &str, nth: usize) -> Option<String> {
    Some(match format {
        "date" => format!("2026-01-{:02}", nth % 28 + 1),
        "date-time" => format!("2026-01-{:02}T12:00:00Z", nth % 28 + 1),
        "time" => "12:00:00Z".to_owned(),
        "duration" => "P1D".to_owned(),
        "email" | "idn-email" => format!("simulated-{nth}@example.com"),
        "hostname" | "idn-hostname" => format!("simulated-{nth}.example.com"),
        "ipv4" => "192.0.2.1".to_owned(),
        "ipv6" => "2001:db8::1".to_owned(),
        "uri" | "iri" | "uri-reference" | "iri-reference" => format!("https://example.com/simulated/{nth}"),
        "uuid" => format!("00000000-0000-4000-8000-{nth:012}"),
        _ => return None,
    })
}

/// A text that the pattern matches: the shortest repetitions, the first of every class that is printable.
fn follow(hir: &Hir, dice: &mut Dice, text: &mut String) {
    match hir.kind() {
        HirKind::Empty | HirKind::Look(_) => {}
        HirKind::Literal(literal) => text.push_str(&String::from_utf8_lossy(&literal.0)),
        HirKind::Class(class) => text.extend(member(class, dice)),
        HirKind::Repetition(repetition) => {
            let most = repetition.max.unwrap_or_else(|| repetition.min.max(PATTERN_REPEAT));
            for _ in 0..repetition.min.max(most.min(1)) {
                follow(&repetition.sub, dice, text);
            }
        }
        HirKind::Capture(capture) => follow(&capture.sub, dice, text),
        HirKind::Concat(parts) => parts.iter().for_each(|part| follow(part, dice, text)),
        HirKind::Alternation(branches) => follow(dice.pick(branches), dice, text),
    }
}

/// A printable character of a class, if it has one.
fn member(class: &Class, dice: &mut Dice) -> Option<char> {
    let ranges: Vec<(char, char)> = match class {
        Class::Unicode(class) => class.ranges().iter().map(|range| (range.start(), range.end())).collect(),
        Class::Bytes(class) => {
            class.ranges().iter().map(|range| (char::from(range.start()), char::from(range.end()))).collect()
        }
    };
    let printable = |(start, end): &(char, char)| {
        let (start, end) = ((*start).max('!'), (*end).min('~'));
        (start <= end).then_some((start, end))
    };
    let friendly: Vec<(char, char)> = ranges.iter().filter_map(printable).collect();
    let (start, end) = if friendly.is_empty() { *ranges.first()? } else { *dice.pick(&friendly) };
    // Letters read better than the punctuation that a wide class begins with.
    if (start..=end).contains(&'a') {
        return Some('a');
    }
    let width = u32::from(end) - u32::from(start);
    char::from_u32(u32::from(start) + dice.below(width.min(9) + 1)).or(Some(start))
}

/// Another value of a small set, where items must differ.
fn distinct(schema: &Value, root: &Value, taken: &[Value]) -> Option<Value> {
    let schema = flat(schema, root);
    if let Some(choices) = schema["enum"].as_array() {
        return choices.iter().find(|choice| !taken.contains(choice)).cloned();
    }
    match type_of(&schema) {
        "integer" => {
            let (least, most) = bounds(&schema, 1.0, (1.0, 10_000.0));
            let step = schema["multipleOf"].as_f64().filter(|step| *step >= 1.0).unwrap_or(1.0);
            let mut next = (least / step).ceil() * step;
            while next <= most {
                #[expect(clippy::cast_possible_truncation, reason = "float casts saturate")]
                let whole = json!(next as i64);
                if !taken.contains(&whole) {
                    return Some(whole);
                }
                next += step;
            }
            None
        }
        "boolean" => [json!(true), json!(false)].into_iter().find(|value| !taken.contains(value)),
        _ => None,
    }
}
