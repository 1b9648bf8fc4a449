//! The simulator's JSON: owns the making of a value that fits a JSON Schema, whatever words the schema uses. A value is
//! made by the words that can be followed (types, enumerations, bounds, nesting, references, patterns) and by guesses at
//! the others (`not`, `if`, `oneOf`, `contains` …); a validator says whether it fits, and the next guess differs. What no
//! guess fits is told as that, and never answered with something else.

use std::collections::{BTreeMap, BTreeSet};

use regex_syntax::hir::{Class, Hir, HirKind};
use serde_json::{Map, Number, Value, json};

use super::{
    dice::Dice,
    prose::Prose,
    schema::{flat, is_plain, matching, type_of},
};

/// Past this depth only what is required is made.
const DEPTH_ROOMY: usize = 6;

/// Past this depth nothing is made: the schema refers to itself.
const DEPTH_MAX: usize = 48;

/// Items of an array, where the schema leaves the choice.
const ITEMS_USUAL: u64 = 3;

/// The longest list and the longest text that a schema's lower bound can demand.
const DEMAND_MAX: u64 = 10_000;

/// How often a starred part of a pattern is repeated, at most.
const PATTERN_REPEAT_MAX: u32 = 40;

/// How often it is guessed. One guess is enough for nearly every schema.
const GUESSES: u32 = 40;

/// No more text than this is made in all guesses together, in bytes.
const GUESSED_MAX_BYTES: usize = 4 * 1024 * 1024;

/// How small an answer is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Size {
    /// As a model would answer.
    Usual,
    /// What is required, in few words.
    Small,
    /// What is required, as short as the schema lets it be.
    Smallest,
}

/// A value that fits the schema, as text of at most so many characters if there is one so short. Free strings begin with
/// `mark` where there is room for it. None where no guess fits.
pub(super) fn instance(
    schema: &Value,
    prose: &Prose,
    mark: &str,
    dice: &mut Dice,
    chars_max: Option<usize>,
) -> Option<Value> {
    let judge = Judge::of(schema)?;
    // Another sample or seed begins elsewhere in the material.
    let start = dice.index(prose.len());
    let mut shortest = None;
    let mut guessed_bytes = 0;
    for size in [Size::Usual, Size::Small, Size::Smallest] {
        for guess in 0..GUESSES {
            let mut maker = Maker { root: schema, prose, mark, dice, start, made: BTreeMap::new(), guess, size };
            let value = maker.value(schema, &[], 0);
            let text = value.to_string();
            guessed_bytes += text.len();
            if judge.fits(&value) {
                let Some(most) = chars_max else { return Some(value) };
                if text.chars().count() <= most {
                    return Some(value);
                }
                shortest = Some(value);
                break;
            }
            if guessed_bytes > GUESSED_MAX_BYTES || !stagegate_core::evaluation::is_wanted() {
                return shortest;
            }
        }
        if chars_max.is_none() {
            break;
        }
    }
    shortest
}

/// Whether a value can be made at all.
pub(super) fn can_be_met(schema: &Value) -> bool {
    let mut dice = Dice::new(0, "can be met", [0; 32], 0);
    is_plain(schema) || instance(schema, &Prose::spare(), "", &mut dice, None).is_some()
}

/// Says whether a value fits.
enum Judge {
    /// What is made is right by construction; a property test holds that.
    Plain,
    Strict(Box<jsonschema::Validator>),
}

impl Judge {
    fn of(schema: &Value) -> Option<Self> {
        if is_plain(schema) {
            return Some(Self::Plain);
        }
        jsonschema::options().offline().build(schema).ok().map(|validator| Self::Strict(Box::new(validator)))
    }

    fn fits(&self, value: &Value) -> bool {
        match self {
            Self::Plain => true,
            Self::Strict(validator) => validator.is_valid(value),
        }
    }
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
    /// Counted from 0: what can be chosen is chosen otherwise by each guess.
    guess: u32,
    size: Size,
}

impl Maker<'_> {
    fn value(&mut self, schema: &Value, keys: &[&str], depth: usize) -> Value {
        if depth > DEPTH_MAX || schema == &Value::Bool(false) {
            return Value::Null;
        }
        let schema = self.flat(schema);
        if let Some(constant) = schema.get("const") {
            return constant.clone();
        }
        if let Some(choices) = schema["enum"].as_array().filter(|choices| !choices.is_empty()) {
            return self.choice(choices);
        }
        match self.type_of(&schema) {
            "object" => self.object(&schema, keys, depth),
            "array" => self.array(&schema, keys, depth),
            "string" => Value::String(self.string(&schema, keys)),
            "integer" => integer(&schema, self.dice),
            "number" => number(&schema, keys, self.dice),
            "boolean" => Value::Bool(self.dice.below(4) > 0),
            _ => Value::Null,
        }
    }

    /// The schema in one piece: references followed, and a branch chosen where there are several.
    fn flat(&mut self, schema: &Value) -> Value {
        let (guess, dice) = (self.guess, &mut *self.dice);
        flat(schema, self.root, &mut |branches| if guess == 0 { 0 } else { dice.index(branches) })
    }

    /// One of the listed values. The smallest is wanted where room is short.
    fn choice(&mut self, choices: &[Value]) -> Value {
        if self.size == Size::Smallest && self.guess == 0 {
            let shortest = choices.iter().min_by_key(|choice| choice.to_string().len());
            return shortest.cloned().unwrap_or(Value::Null);
        }
        self.dice.pick(choices).clone()
    }

    /// The type of what is made: later guesses take others, where the schema leaves that open.
    fn type_of<'s>(&mut self, schema: &'s Value) -> &'s str {
        const OTHERS: [&str; 7] = ["object", "string", "integer", "boolean", "array", "null", "number"];
        match &schema["type"] {
            Value::Array(names) if self.guess > 0 && !names.is_empty() => {
                self.dice.pick(names).as_str().unwrap_or("null")
            }
            Value::Null if self.guess > 8 => self.dice.pick::<&'static str>(&OTHERS),
            _ => type_of(schema),
        }
    }

    /// Whether what is not required is made, too.
    fn is_roomy(&mut self, depth: usize) -> bool {
        let is_wanted = match self.guess {
            0 => true,
            1 => false,
            _ => self.dice.below(2) == 0,
        };
        is_wanted && depth < DEPTH_ROOMY && self.size == Size::Usual
    }

    fn object(&mut self, schema: &Value, keys: &[&str], depth: usize) -> Value {
        let mut schema = schema.clone();
        let wanted = self.wanted_keys(&mut schema, depth);
        let properties = schema["properties"].as_object();
        let patterns = schema["patternProperties"].as_object();
        let text = json!({ "type": "string" });
        let closed = |word: &str| schema.get(word) == Some(&Value::Bool(false));
        let is_open = !closed("additionalProperties") && !closed("unevaluatedProperties");
        let others = ["additionalProperties", "unevaluatedProperties"].iter().filter_map(|word| schema.get(*word));
        let other = others.into_iter().find(|other| other.is_object()).unwrap_or(&text);
        let mut object = Map::new();
        for key in &wanted {
            let own = properties.and_then(|properties| properties.get(key));
            let matched: Vec<&Value> = matching(patterns, key);
            let inner = match (own, matched.as_slice()) {
                (Some(own), []) => own.clone(),
                (None, [only]) => (*only).clone(),
                (None, []) => other.clone(),
                (own, matched) => {
                    json!({ "allOf": own.into_iter().chain(matched.iter().copied()).collect::<Vec<_>>() })
                }
            };
            let value = self.value(&inner, &[keys, &[key.as_str()]].concat(), depth + 1);
            object.insert(key.clone(), value);
        }
        let least = schema["minProperties"].as_u64().unwrap_or(0).min(DEMAND_MAX);
        if object.is_empty()
            && least == 0
            && is_open
            && properties.is_none()
            && self.size == Size::Usual
            && self.guess == 0
        {
            object.insert("summary".to_owned(), self.value(other, &[keys, &["summary"]].concat(), depth + 1));
        }
        let mut extra = 0;
        while u64::try_from(object.len()).unwrap_or(u64::MAX) < least && extra < 2 * least + 16 {
            extra += 1;
            let Some((key, inner)) = self.another_key(&schema, extra, is_open.then_some(other)) else { break };
            let value = self.value(&inner, &[keys, &[key.as_str()]].concat(), depth + 1);
            object.entry(key).or_insert(value);
        }
        Value::Object(object)
    }

    /// The keys that are made, and what depends on them: that becomes part of the schema.
    fn wanted_keys(&mut self, schema: &mut Value, depth: usize) -> Vec<String> {
        let required = |schema: &Value| -> BTreeSet<String> {
            schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
        };
        let most = schema["maxProperties"].as_u64().and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
        // What must not be there is what a schema most often says `not` about.
        let barred: BTreeSet<String> = required(&schema["not"]);
        let mut taken = required(schema);
        let named: Vec<String> =
            schema["properties"].as_object().into_iter().flatten().map(|(key, _)| key.clone()).collect();
        let is_roomy = self.is_roomy(depth);
        let is_never = |key: &String| schema["properties"][key] == Value::Bool(false) || barred.contains(key);
        for key in named.iter().filter(|key| !is_never(key)) {
            if is_roomy && taken.len() < most && (self.guess < 2 || self.dice.below(2) == 0) {
                taken.insert(key.clone());
            }
        }
        // Each round adds a key, or is the last.
        for _ in 0..DEPTH_MAX {
            let before = taken.len();
            for word in ["dependentRequired", "dependencies"] {
                for (key, needs) in schema[word].as_object().into_iter().flatten() {
                    if taken.contains(key) {
                        taken.extend(
                            needs.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned),
                        );
                    }
                }
            }
            for word in ["dependentSchemas", "dependencies"] {
                let Some(Value::Object(dependent)) = schema.get(word).cloned() else { continue };
                for (key, part) in dependent.into_iter().filter(|(key, part)| taken.contains(key) && part.is_object()) {
                    schema[word].as_object_mut().map(|words| words.remove(&key));
                    let base = std::mem::take(schema);
                    *schema = self.flat(&json!({ "allOf": [base, part] }));
                }
            }
            taken.extend(required(schema));
            if taken.len() == before {
                break;
            }
        }
        // In the order in which they are named; the others after them.
        let named = schema["properties"].as_object().into_iter().flatten().map(|(key, _)| key.clone());
        let mut keys: Vec<String> = named.filter(|key| taken.contains(key)).collect();
        keys.extend(taken.into_iter().filter(|key| !keys.contains(key)).collect::<Vec<_>>());
        keys
    }

    /// A key beyond those that are named, and what stands under it.
    fn another_key(&mut self, schema: &Value, nth: u64, other: Option<&Value>) -> Option<(String, Value)> {
        if let Some(names) = schema.get("propertyNames").filter(|names| names.is_object()) {
            // Each as if it were guessed anew, or all would be the same.
            let guess = self.guess;
            self.guess = guess.wrapping_add(u32::try_from(nth).unwrap_or(1));
            let name = self.value(&json!({ "allOf": [{ "type": "string" }, names] }), &["name"], DEPTH_ROOMY);
            self.guess = guess;
            let name = name.as_str()?.to_owned();
            let inner = matching(schema["patternProperties"].as_object(), &name).first().map(|inner| (*inner).clone());
            return inner.or_else(|| other.cloned()).map(|inner| (name, inner));
        }
        if let Some(other) = other {
            return Some((format!("item_{nth}"), other.clone()));
        }
        let patterns = schema["patternProperties"].as_object()?;
        let (pattern, inner) = patterns.iter().nth(usize::try_from(nth).unwrap_or(0) % patterns.len())?;
        let mut name = String::new();
        follow(&regex_syntax::parse(pattern).ok()?, self.dice, u32::try_from(nth).unwrap_or(1), &mut name);
        Some((name, inner.clone()))
    }

    fn array(&mut self, schema: &Value, keys: &[&str], depth: usize) -> Value {
        let least = schema["minItems"].as_u64().unwrap_or(0).min(DEMAND_MAX);
        let most = schema["maxItems"].as_u64().unwrap_or(u64::MAX);
        let (first, rest) = items_of(schema);
        let text = json!({ "type": "string" });
        let rest = match rest {
            Some(Value::Bool(false)) => None,
            Some(items) if items.is_object() => Some(items),
            _ if schema.get("unevaluatedItems") == Some(&Value::Bool(false)) => None,
            _ => schema.get("unevaluatedItems").filter(|items| items.is_object()).or(Some(&text)),
        };
        let usual = if self.is_roomy(depth) { ITEMS_USUAL + u64::from(self.dice.below(2)) } else { 0 };
        let prefix = u64::try_from(first.len()).unwrap_or(u64::MAX);
        let wanted = if rest.is_none() || prefix > 0 { prefix.max(least) } else { usual.max(least) };
        let contains = schema.get("contains").filter(|contains| contains.is_object());
        let contained =
            if contains.is_some() { schema["minContains"].as_u64().unwrap_or(1).min(DEMAND_MAX) } else { 0 };
        let wanted = wanted.max(prefix.saturating_add(contained).min(least.max(contained).max(prefix))).min(most);
        let is_unique = schema["uniqueItems"] == true;
        let mut items: Vec<Value> = Vec::new();
        // A few spare turns, where items must differ and chance repeats one.
        for _ in 0..wanted.saturating_mul(if is_unique { 20 } else { 1 }) {
            let count = u64::try_from(items.len()).unwrap_or(u64::MAX);
            if count >= wanted {
                break;
            }
            let Some(inner) = first.get(items.len()).or(rest) else { break };
            // The last ones are those that the list must contain.
            let inner = match contains {
                Some(contains) if wanted - count <= contained => json!({ "allOf": [inner, contains] }),
                _ => inner.clone(),
            };
            let mut item = self.value(&inner, keys, depth + 1);
            if is_unique && items.contains(&item) {
                item = distinct(&self.flat(&inner), &items).unwrap_or(item);
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
        let least = usize::try_from(schema["minLength"].as_u64().unwrap_or(0).min(DEMAND_MAX)).unwrap_or(0);
        let most = usize::try_from(schema["maxLength"].as_u64().unwrap_or(u64::MAX)).unwrap_or(usize::MAX);
        // Bounds that contradict each other are for the validator to tell.
        let least = least.min(most);
        if let Some(Ok(hir)) = schema["pattern"].as_str().map(regex_syntax::parse) {
            return self.matched(&hir, schema["pattern"].as_str().unwrap_or_default(), least..=most);
        }
        if schema["contentMediaType"] == "application/json" {
            return if schema["contentEncoding"] == "base64" { "e30=".to_owned() } else { "{}".to_owned() };
        }
        if schema["contentEncoding"] == "base64" {
            return "c2ltdWxhdGVk".to_owned();
        }
        if let Some(text) = schema["format"].as_str().and_then(|format| formatted(format, nth)) {
            return text;
        }
        let words = match self.size {
            Size::Usual => self.words(keys, nth),
            Size::Small => self.prose.phrase(self.start + nth),
            Size::Smallest => String::new(),
        };
        let marked = format!("{}{words}", self.mark);
        // Where the mark leaves no room for words, the words are worth more.
        let text = if most < self.mark.chars().count() + 8 || self.size == Size::Smallest { words } else { marked };
        let mut text: String = text.chars().take(most).collect();
        let mut spare = nth;
        while text.chars().count() < least {
            spare += 1;
            let room = if self.size == Size::Smallest { least } else { most };
            text = format!("{text} {}.", self.prose.sentence(self.start + spare))
                .trim_start()
                .chars()
                .take(room)
                .collect();
        }
        text
    }

    /// A text that the pattern matches, of a length between the bounds if one is found.
    fn matched(&mut self, hir: &Hir, pattern: &str, length: std::ops::RangeInclusive<usize>) -> String {
        let first = self.guess % 8;
        let mut text = String::new();
        for repeat in first..PATTERN_REPEAT_MAX {
            text.clear();
            follow(hir, self.dice, repeat, &mut text);
            if length.contains(&text.chars().count()) {
                break;
            }
        }
        let short = length.start().saturating_sub(text.chars().count());
        // A pattern that ends nowhere takes anything after it, and one that begins nowhere anything before.
        if short > 0 && !pattern.ends_with('$') {
            text.extend(std::iter::repeat_n('a', short));
        } else if short > 0 && !pattern.starts_with('^') {
            text.insert_str(0, &"a".repeat(short));
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

/// The items that have a schema each, and the schema of the others; draft 7 has words of its own for both.
fn items_of(schema: &Value) -> (&[Value], Option<&Value>) {
    match (schema["prefixItems"].as_array(), schema.get("items")) {
        (Some(first), rest) => (first, rest),
        (None, Some(Value::Array(first))) => (first, schema.get("additionalItems")),
        (None, rest) => (&[], rest),
    }
}

/// The smallest whole number of steps that is a whole number.
fn whole_step(schema: &Value) -> f64 {
    let step = schema["multipleOf"].as_f64().filter(|step| *step > 0.0).unwrap_or(1.0);
    let whole = (1..=1_000).map(|times| step * f64::from(times)).find(|step| (step - step.round()).abs() < 1e-9);
    whole.map_or(step, f64::round)
}

fn integer(schema: &Value, dice: &mut Dice) -> Value {
    let (least, most) = bounds(schema, 1.0, (1.0, 5.0));
    let step = whole_step(schema);
    let (mut low, high) = ((least / step).ceil(), (most / step).floor());
    if schema.get("minimum").is_none() && schema.get("exclusiveMinimum").is_none() && low > high {
        low = high;
    }
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
        // Decimals as a person would write them: 0.1 times 3 is 0.3.
        let picked = (low + f64::from(steps)) * step;
        return float(format!("{picked:.12}").parse().unwrap_or(picked));
    }
    let (least, most) = open_bounds(schema, usual);
    let picked = least + (most - least) * dice.unit();
    // Two decimals read better, where the bounds allow them.
    let rounded = (picked * 100.0).round() / 100.0;
    float(if (least..=most).contains(&rounded) { rounded } else { picked })
}

/// The bounds of a number without steps: an excluded one is gone from by a part of what lies between.
fn open_bounds(schema: &Value, usual: (f64, f64)) -> (f64, f64) {
    let (least, most) = bounds(schema, 0.0, usual);
    let part = ((most - least) / 4.0).min(1e-6);
    let is_excluded = |word: &str, at: f64| schema[word].as_f64() == Some(at);
    let low = if is_excluded("exclusiveMinimum", least) { least + part } else { least };
    let high = if is_excluded("exclusiveMaximum", most) { most - part } else { most };
    (low, high)
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

/// A text that the pattern matches: parts that may be repeated are, up to `repeat` times more than they must; of every
/// class the first character that is printable.
fn follow(hir: &Hir, dice: &mut Dice, repeat: u32, text: &mut String) {
    // What is far too long is of no use to anybody.
    if text.len() > 64 * 1024 {
        return;
    }
    match hir.kind() {
        HirKind::Empty | HirKind::Look(_) => {}
        HirKind::Literal(literal) => text.push_str(&String::from_utf8_lossy(&literal.0)),
        HirKind::Class(class) => text.extend(member(class, dice)),
        HirKind::Repetition(repetition) => {
            let most = repetition.max.unwrap_or(u32::MAX);
            // Once at least, where that is allowed: `\d*` reads better with a digit.
            let times = repetition.min.saturating_add(repeat).max(1).min(most).max(repetition.min);
            for _ in 0..times {
                follow(&repetition.sub, dice, repeat, text);
            }
        }
        HirKind::Capture(capture) => follow(&capture.sub, dice, repeat, text),
        HirKind::Concat(parts) => parts.iter().for_each(|part| follow(part, dice, repeat, text)),
        HirKind::Alternation(branches) => follow(dice.pick(branches), dice, repeat, text),
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
fn distinct(schema: &Value, taken: &[Value]) -> Option<Value> {
    if let Some(choices) = schema["enum"].as_array() {
        return choices.iter().find(|choice| !taken.contains(choice)).cloned();
    }
    match type_of(schema) {
        "integer" => {
            let (least, most) = bounds(schema, 1.0, (1.0, 10_000.0));
            let step = whole_step(schema);
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
