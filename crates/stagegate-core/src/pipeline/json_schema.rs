//! An author's JSON Schema: owns compiling it, and how much work a value may make for it.
//!
//! A schema may look at one value many times: branches of `anyOf` that refer to the same definition, or that each refer
//! back to the whole, double the work with every level. So the work is reckoned before any is done: for each depth of
//! a value, the most that one way from its root down to a leaf can cost. What is dear for every value is refused at
//! registration; what is dear for deep values alone refuses those. In the same way, what a schema does with each byte of
//! the texts in a value is reckoned: patterns, formats and encodings.

use std::collections::{HashMap, HashSet};

use jsonschema::{PatternOptions, ValidationError, Validator};
use serde_json::Value;

use super::{
    check::Report,
    path::{Path, Segment, cut},
    pattern::{self, REGEX_MAX_BYTES, places},
    schema,
};
use crate::{
    Code, Violation,
    evaluation::{self, Interrupted, Unclaimed},
};

/// The depth of a value that every schema must be able to check, in levels.
const DEPTH_MIN: usize = 4;
/// The deepest value whose cost is reckoned where a schema refers to itself, in levels.
const DEPTH_MAX: usize = 64;
/// The most that one way from the root to a leaf of such a value may cost, in steps of some nanoseconds.
const PATH_COST_MAX: f64 = 100_000.0;
/// The most that checking one value may cost, in such steps: about a second.
const VALUE_COST_MAX: f64 = 100_000_000.0;
/// Where a value has more than this many parts, only the first way in which it does not fit is told: each is kept in
/// memory, and there may be one for each part.
const ALL_TOLD_MAX_VALUES: usize = 50_000;
/// What reading a text as JSON or from its encoding costs, in steps for each byte.
const CONTENT_COST: f64 = 3.0;
/// What checking a text's format costs at most, in steps for each byte.
const FORMAT_COST: f64 = 10.0;
/// The most ways between the parts of a schema; it bounds the reckoning itself.
const WAYS_MAX: usize = 20_000;

/// A compiled schema.
#[derive(Debug)]
pub(super) struct Schema {
    validator: Validator,
    costs: Costs,
}

impl Schema {
    /// Valid, of a known draft, without references to elsewhere, and with regular expressions and references that
    /// cannot run away; else every reason why not is reported.
    pub(super) fn compile(schema: &Value, path: &Path, report: &mut Report<'_>) -> Option<Self> {
        let before = report.count();
        if let Some(draft) = schema.get("$schema").filter(|draft| !is_known_draft(draft)) {
            let violation = invalid(format!("{} is no known draft of JSON Schema", schema::told(draft)));
            report.at_value(&path.key("$schema"), violation.mend("remove `$schema`; 2020-12 is what is meant then"));
            return None;
        }
        let mut anchors = HashMap::new();
        look_through(schema, path, true, &mut anchors, report);
        match jsonschema::meta::validator_for(schema) {
            Ok(meta) => {
                for error in meta.iter_errors(schema).take(10) {
                    let path = path.below(error.instance_path());
                    let violation = invalid(format!("this {}", schema::sentence(&error)));
                    report.at_value(&path, with_types(&path, violation));
                }
            }
            Err(error) => report.at_value(path, invalid(cut(&error.to_string(), 300))),
        }
        if report.count() > before || report.has_too_many_regexes() {
            return None;
        }
        // What follows cannot be interrupted, and takes some microseconds for each part and pattern.
        let _ = evaluation::pay(schema_bytes(schema));
        // Before it is compiled: that follows references too.
        let costs = match Graph::of(schema, &anchors).and_then(|graph| graph.costs()) {
            Ok(costs) => costs,
            Err((message, mend)) => {
                report.at_value(path, invalid(message).mend(mend));
                return None;
            }
        };
        let patterns = PatternOptions::regex().size_limit(REGEX_MAX_BYTES).dfa_size_limit(REGEX_MAX_BYTES);
        let options = jsonschema::options().offline().with_pattern_options(patterns);
        match options.with_content_media_type("application/json", is_json).build(schema) {
            Ok(validator) => Some(Self { validator, costs }),
            Err(error) => {
                let told = error.to_string();
                let place = Path::root().below(error.instance_path());
                // The pattern itself, or the key of a map whose keys are patterns.
                let source = match place.segments() {
                    [.., Segment::Key(map), Segment::Key(pattern)] if map == "patternProperties" => {
                        Some(pattern.clone())
                    }
                    [.., Segment::Key(key)] if key == "pattern" => {
                        let pattern = schema.pointer(&error.instance_path().to_string());
                        pattern.and_then(Value::as_str).map(str::to_owned)
                    }
                    _ => None,
                };
                let violation = match source.map(|source| pattern::why_not(&source, &told)) {
                    Some((message, mend)) => invalid(cut(&message, 300)).mend(mend),
                    None => invalid(format!("the schema does not compile: {}", cut(&told, 300))),
                };
                report.at_value(&path.below(error.instance_path()), violation);
                None
            }
        }
    }

    /// Every way in which a value does not fit; or, as the rest of a sentence, why that cannot be told.
    pub(super) fn errors<'a>(
        &'a self,
        value: &'a Value,
    ) -> Result<impl Iterator<Item = ValidationError<'a>> + 'a, String> {
        let size = Size::of(value);
        self.costs.claim(&size)?;
        let (mut all, mut first) = (None, None);
        if self.validator.is_valid(value) {
            // The way of nearly every value, and by far the cheapest.
        } else if size.values <= ALL_TOLD_MAX_VALUES {
            all = Some(self.validator.iter_errors(value));
        } else {
            first = self.validator.validate(value).err();
        }
        Ok(all.into_iter().flatten().chain(first))
    }
}

/// Whether a text is JSON; draft 7 asks that. It is read as often as the schema says so, so that it may end in between.
fn is_json(text: &str) -> bool {
    !evaluation::is_wanted() || serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok()
}

fn invalid(message: String) -> Violation {
    Violation::new(Code::InvalidSchema, "", message)
}

/// What is most often wrong in a schema is the name of a type.
fn with_types(path: &Path, violation: Violation) -> Violation {
    match path.last_key() {
        Some("type") => violation.mend("types are object, array, string, number, integer, boolean and null"),
        _ => violation,
    }
}

fn is_known_draft(draft: &Value) -> bool {
    let Some(draft) = draft.as_str() else { return false };
    let draft = draft.trim_end_matches('#').trim_start_matches("https://").trim_start_matches("http://");
    matches!(
        draft,
        "json-schema.org/draft/2020-12/schema"
            | "json-schema.org/draft/2019-09/schema"
            | "json-schema.org/draft-07/schema"
            | "json-schema.org/draft-06/schema"
            | "json-schema.org/draft-04/schema"
    )
}

/// Keywords whose value is a map from the author's names to schemas.
const NAMED: [&str; 6] =
    ["properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"];

/// Reports every `$ref` that leaves the schema (nothing is ever fetched), counts the regular expressions, and collects
/// the anchors. In a map of the author's names no key is a keyword.
fn look_through<'s>(
    schema: &'s Value,
    path: &Path,
    is_root: bool,
    anchors: &mut HashMap<&'s str, Vec<&'s Value>>,
    report: &mut Report<'_>,
) {
    match schema {
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                look_through(item, &path.index(index), false, anchors, report);
            }
        }
        Value::Object(map) => {
            for (key, inner) in map {
                let at = path.key(key);
                match (key.as_str(), inner) {
                    ("pattern", Value::String(_)) => report.regex(&at),
                    // Data, not schemas.
                    ("const" | "enum" | "default" | "examples", _) => {}
                    ("$anchor" | "$dynamicAnchor", Value::String(name)) => {
                        anchors.entry(name).or_default().push(schema);
                    }
                    ("$id" | "id", Value::String(id)) if id.starts_with('#') => {
                        anchors.entry(&id[1..]).or_default().push(schema);
                    }
                    ("$id", Value::String(_)) if !is_root => {
                        let violation = invalid("only a whole schema has an `$id`, no part of one".to_owned());
                        report.at_value(&at, violation.mend("remove it, and refer to the part by its place"));
                    }
                    ("$ref" | "$dynamicRef" | "$recursiveRef", Value::String(to)) if !to.starts_with('#') => {
                        let message = format!("`{}` is outside of this schema, and nothing is fetched", cut(to, 80));
                        let mend = "put what it refers to under `$defs` and write `#/$defs/name`";
                        report.at_value(&at, invalid(message).mend(mend));
                    }
                    (key, Value::Object(schemas)) if NAMED.contains(&key) => {
                        for (name, schema) in schemas {
                            let at = at.key(name);
                            if key == "patternProperties" {
                                report.regex(&at);
                            }
                            look_through(schema, &at, false, anchors, report);
                        }
                    }
                    _ => look_through(inner, &at, false, anchors, report),
                }
            }
        }
        _ => {}
    }
}

/// About how much a schema is to compile.
fn schema_bytes(schema: &Value) -> u64 {
    let size = Size::of(schema);
    (size.values as u64).saturating_mul(100).saturating_add(size.text_bytes as u64)
}

/// A cost for each value, and one for each byte of the texts.
type Cost = [f64; 2];

fn plus(a: Cost, b: Cost, times: f64) -> Cost {
    [a[0] + b[0] * times, a[1] + b[1] * times]
}

fn larger(a: Cost, b: Cost) -> Cost {
    [a[0].max(b[0]), a[1].max(b[1])]
}

/// What one way from the root to a leaf costs at most, by the depth of the value.
#[derive(Debug)]
struct Costs {
    by_depth: Vec<Cost>,
    /// Whether deeper values than those cost no more.
    is_level: bool,
}

impl Costs {
    /// Takes the price of checking a value; else, as the rest of a sentence, why it cannot be checked.
    fn claim(&self, size: &Size) -> Result<(), String> {
        let price = self.price(size);
        let too_deep = || "is too large or nested too deeply for the branches and references of its schema".to_owned();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates, and is never negative")]
        let [values, texts] = price.map(|price| price as u64);
        if price[0] > VALUE_COST_MAX {
            return Err(too_deep());
        }
        match evaluation::claim(values.saturating_add(texts)) {
            Ok(()) => Ok(()),
            Err(Unclaimed::Interrupted) => Err(Interrupted::TOLD.to_owned()),
            Err(Unclaimed::TooDear(_)) if values > texts => Err(too_deep()),
            Err(Unclaimed::TooDear(times)) => Err(format!(
                "has {} bytes of text, which the patterns, formats and encodings of its schema could take about {times} \
                 times too long to check: write patterns that repeat less, or pass less text",
                size.text_bytes
            )),
        }
    }

    fn price(&self, size: &Size) -> Cost {
        let last = self.by_depth.len() - 1;
        if size.depth > last && !self.is_level {
            return [f64::INFINITY; 2];
        }
        let [value, byte] = self.by_depth[size.depth.min(last)];
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let (values, bytes) = (size.values as f64, size.text_bytes as f64);
        [value * values, byte * bytes]
    }
}

/// How many levels a value has below its root, how many values are in it, and how long its texts are, keys included. Its
/// depth was bounded where it was parsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Size {
    depth: usize,
    values: usize,
    text_bytes: usize,
}

impl Size {
    fn of(value: &Value) -> Self {
        let mut size = Self { depth: 0, values: 1, text_bytes: 0 };
        match value {
            Value::String(text) => size.text_bytes = text.len(),
            Value::Array(items) => items.iter().for_each(|item| size.hold(Self::of(item))),
            Value::Object(map) => map.iter().for_each(|(key, inner)| {
                size.text_bytes += key.len();
                size.hold(Self::of(inner));
            }),
            _ => {}
        }
        size
    }

    fn hold(&mut self, inner: Self) {
        self.depth = self.depth.max(inner.depth + 1);
        self.values += inner.values;
        self.text_bytes += inner.text_bytes;
    }
}

/// A part of a schema, and the parts that it holds against the same value and against the values inside.
#[derive(Debug, Default)]
struct Part<'s> {
    weight: Cost,
    same: Vec<usize>,
    /// By the key of a map.
    keyed: Vec<(&'s str, usize)>,
    /// For the keys that are not among those.
    other_key: Option<usize>,
    /// For any key.
    any_key: Vec<usize>,
    /// By the index in a list.
    indexed: Vec<usize>,
    /// For the items after those.
    other_index: Option<usize>,
    /// For any item.
    any_index: Vec<usize>,
}

impl Part<'_> {
    fn inner(&self) -> impl Iterator<Item = usize> {
        let keyed = self.keyed.iter().map(|(_, part)| *part);
        let lists = self.any_key.iter().chain(&self.indexed).chain(&self.any_index);
        keyed.chain(lists.copied()).chain(self.other_key).chain(self.other_index)
    }

    fn ways(&self) -> usize {
        1 + self.inner().count()
    }
}

/// What is wrong, and what to do about it.
type Flaw = (String, &'static str);

/// What a keyword does with each byte of a text, or of the keys of a map.
fn cost_of_texts(key: &str, inner: &Value) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    let search = |pattern: &str| places(pattern) as f64;
    match (key, inner) {
        ("pattern", Value::String(pattern)) => search(pattern),
        ("patternProperties", Value::Object(patterns)) => patterns.keys().map(|pattern| search(pattern)).sum(),
        ("contentMediaType" | "contentEncoding", _) => CONTENT_COST,
        ("format", _) => FORMAT_COST,
        ("enum", Value::Array(options)) => 0.1 * f64::from(u32::try_from(options.len()).unwrap_or(u32::MAX)),
        ("const" | "minLength" | "maxLength" | "uniqueItems", _) => 0.1,
        _ => 0.0,
    }
}

/// The parts of a schema that can be reached from its root, which is the first.
struct Graph<'s> {
    root: &'s Value,
    anchors: &'s HashMap<&'s str, Vec<&'s Value>>,
    index_of: HashMap<*const Value, usize>,
    found: Vec<&'s Value>,
    parts: Vec<Part<'s>>,
}

const ENTANGLED: &str = "use fewer branches and references, or split the schema up over several stages";

impl<'s> Graph<'s> {
    fn of(root: &'s Value, anchors: &'s HashMap<&'s str, Vec<&'s Value>>) -> Result<Self, Flaw> {
        let mut graph = Self { root, anchors, index_of: HashMap::new(), found: Vec::new(), parts: Vec::new() };
        graph.index(root);
        while let Some(schema) = graph.found.get(graph.parts.len()) {
            let part = graph.part(schema)?;
            graph.parts.push(part);
        }
        Ok(graph)
    }

    fn index(&mut self, schema: &'s Value) -> usize {
        let next = self.found.len();
        let index = *self.index_of.entry(std::ptr::from_ref(schema)).or_insert(next);
        if index == next {
            self.found.push(schema);
        }
        index
    }

    fn indexes(&mut self, schemas: impl IntoIterator<Item = &'s Value>) -> Vec<usize> {
        schemas.into_iter().map(|schema| self.index(schema)).collect()
    }

    fn part(&mut self, schema: &'s Value) -> Result<Part<'s>, Flaw> {
        let mut part = Part { weight: [1.0, 0.1], ..Part::default() };
        for (key, inner) in schema.as_object().into_iter().flatten() {
            let list = || inner.as_array().into_iter().flatten();
            let named = || inner.as_object().into_iter().flatten();
            #[expect(clippy::cast_precision_loss, reason = "an estimate")]
            let members = list().count().max(named().count()) as f64;
            part.weight[0] += 1.0 + members;
            part.weight[1] += cost_of_texts(key, inner);
            match key.as_str() {
                "allOf" | "anyOf" | "oneOf" => part.same.extend(self.indexes(list())),
                "not" | "if" | "then" | "else" => part.same.push(self.index(inner)),
                "dependentSchemas" | "dependencies" => part.same.extend(self.indexes(named().map(|(_, inner)| inner))),
                "$ref" | "$dynamicRef" | "$recursiveRef" => part.same.extend(self.refer(inner)?),
                "properties" => {
                    part.keyed = named().map(|(name, inner)| (name.as_str(), self.index(inner))).collect();
                }
                "patternProperties" => part.any_key.extend(self.indexes(named().map(|(_, inner)| inner))),
                "additionalProperties" => part.other_key = Some(self.index(inner)),
                "propertyNames" | "unevaluatedProperties" => part.any_key.push(self.index(inner)),
                "prefixItems" => part.indexed = self.indexes(list()),
                "items" if inner.is_array() => part.indexed = self.indexes(list()),
                "items" | "additionalItems" => part.other_index = Some(self.index(inner)),
                "contains" | "unevaluatedItems" => part.any_index.push(self.index(inner)),
                _ => {}
            }
        }
        Ok(part)
    }

    /// What a reference may mean: a dynamic one any of the anchors of its name.
    fn refer(&mut self, to: &'s Value) -> Result<Vec<usize>, Flaw> {
        let text = to.as_str().unwrap_or_default();
        let place = decoded(text.strip_prefix('#').unwrap_or(text));
        let targets: Vec<&'s Value> = if place.is_empty() || place.starts_with('/') {
            self.root.pointer(&place).into_iter().collect()
        } else {
            self.anchors.get(place.as_str()).into_iter().flatten().copied().collect()
        };
        if targets.is_empty() {
            return Err((
                format!("the schema does not compile: `{}` is nowhere in it", cut(text, 80)),
                "write `#/$defs/name`",
            ));
        }
        Ok(self.indexes(targets))
    }

    /// For each part all that is held against the same value, itself included, each as often as it is.
    fn closures(&self) -> Result<Vec<Vec<(usize, f64)>>, Flaw> {
        let mut users = vec![Vec::new(); self.parts.len()];
        let mut waits: Vec<usize> = self.parts.iter().map(|part| part.same.len()).collect();
        for (index, part) in self.parts.iter().enumerate() {
            part.same.iter().for_each(|used| users[*used].push(index));
        }
        let mut ready: Vec<usize> = (0..waits.len()).filter(|index| waits[*index] == 0).collect();
        let mut closures = vec![Vec::new(); self.parts.len()];
        let (mut done, mut ways) = (0, 0);
        while let Some(index) = ready.pop() {
            let mut closure = HashMap::from([(index, 1.0)]);
            for (inner, times) in self.parts[index].same.iter().flat_map(|used| &closures[*used]) {
                *closure.entry(*inner).or_insert(0.0) += times;
            }
            ways += closure.keys().map(|inner| self.parts[*inner].ways()).sum::<usize>();
            if ways > WAYS_MAX {
                return Err(("the schema has too many branches and references".to_owned(), ENTANGLED));
            }
            closures[index] = closure.into_iter().collect();
            done += 1;
            for user in &users[index] {
                waits[*user] -= 1;
                if waits[*user] == 0 {
                    ready.push(*user);
                }
            }
        }
        if done < self.parts.len() {
            let message = "a part of the schema refers to itself for the same value".to_owned();
            return Err((message, "refer to it from within `properties` or `items`"));
        }
        Ok(closures)
    }

    fn costs(&self) -> Result<Costs, Flaw> {
        let closures = self.closures()?;
        // The others only ever stand in the closure of one of these.
        let entries: HashSet<usize> = self.parts.iter().flat_map(Part::inner).chain([0]).collect();
        let mut costs = vec![[0.0; 2]; self.parts.len()];
        let (mut by_depth, mut is_level) = (Vec::new(), false);
        while !is_level && by_depth.len() <= DEPTH_MAX {
            let mut next = costs.clone();
            for entry in &entries {
                next[*entry] = self.cost(&closures[*entry], &costs);
            }
            is_level = next == costs;
            costs = next;
            by_depth.push(costs[0]);
            if costs[0][0] > VALUE_COST_MAX {
                break;
            }
        }
        if by_depth[DEPTH_MIN.min(by_depth.len() - 1)][0] > PATH_COST_MAX {
            let message = "checking a value against this schema could take too long: its branches multiply".to_owned();
            return Err((message, ENTANGLED));
        }
        Ok(Costs { by_depth, is_level })
    }

    /// What a value costs, given what the values inside do: the dearest way down, a key or an index.
    fn cost(&self, closure: &[(usize, f64)], inside: &[Cost]) -> Cost {
        let (mut own, mut any_key, mut any_index) = ([0.0; 2], [0.0; 2], [0.0; 2]);
        let (mut keys, mut indexes) = (HashMap::new(), HashMap::new());
        let sum = |parts: &[usize]| parts.iter().fold([0.0; 2], |sum, part| plus(sum, inside[*part], 1.0));
        for (index, times) in closure {
            let part = &self.parts[*index];
            let other_key = part.other_key.map_or([0.0; 2], |other| inside[other]);
            let other_index = part.other_index.map_or([0.0; 2], |other| inside[other]);
            own = plus(own, part.weight, *times);
            any_key = plus(any_key, plus(other_key, sum(&part.any_key), 1.0), *times);
            any_index = plus(any_index, plus(other_index, sum(&part.any_index), 1.0), *times);
            for (key, inner) in &part.keyed {
                let cost: &mut Cost = keys.entry(*key).or_default();
                *cost = plus(*cost, plus(inside[*inner], other_key, -1.0), *times);
            }
            for (position, inner) in part.indexed.iter().enumerate() {
                let cost: &mut Cost = indexes.entry(position).or_default();
                *cost = plus(*cost, plus(inside[*inner], other_index, -1.0), *times);
            }
        }
        let key = plus(any_key, keys.into_values().fold([0.0; 2], larger), 1.0);
        let index = plus(any_index, indexes.into_values().fold([0.0; 2], larger), 1.0);
        // Far above every limit, and far below what a float holds exactly enough to compare.
        plus(own, larger(key, index), 1.0).map(|cost| cost.min(1e15))
    }
}

/// A fragment without its percent-encoding.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let code = tail.get(..2).filter(|_| *first == b'%').and_then(|code| std::str::from_utf8(code).ok());
        if let Some(byte) = code.and_then(|code| u8::from_str_radix(code, 16).ok()) {
            bytes.push(byte);
            rest = &tail[2..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn costs(schema: &Value) -> Result<Costs, Flaw> {
        let anchors = HashMap::new();
        Graph::of(schema, &anchors)?.costs()
    }

    fn nested(levels: usize) -> Value {
        (0..levels).fold(json!(1), |inner, _| json!({ "a": inner }))
    }

    #[test]
    fn what_multiplies_is_refused_before_it_is_compiled() {
        let mut definitions = serde_json::Map::new();
        for level in 0..40 {
            let next = format!("#/$defs/d{}", level + 1);
            definitions.insert(format!("d{level}"), json!({ "allOf": [{ "$ref": next }, { "$ref": next }] }));
        }
        definitions.insert("d40".to_owned(), json!({ "type": "string" }));
        let doubling = json!({ "$ref": "#/$defs/d0", "$defs": definitions });
        assert!(costs(&doubling).expect_err("2^40 steps").0.contains("multiply"));
        let chain: Vec<_> =
            (0..400).map(|n| (format!("d{n}"), json!({ "$ref": format!("#/$defs/d{}", n + 1) }))).collect();
        let mut chain: serde_json::Map<_, _> = chain.into_iter().collect();
        chain.insert("d400".to_owned(), json!(true));
        assert!(
            costs(&json!({ "$ref": "#/$defs/d0", "$defs": chain })).expect_err("80 000 ways").0.contains("too many")
        );
        assert!(costs(&json!({ "anyOf": [{ "$ref": "#" }] })).expect_err("endless").0.contains("itself"));
        assert!(costs(&json!({ "$ref": "#/$defs/none" })).expect_err("nowhere").0.contains("nowhere"));
    }

    #[test]
    fn what_multiplies_with_the_depth_takes_shallow_values_alone() {
        let branch = json!({ "properties": { "a": { "$ref": "#" } } });
        let costs = costs(&json!({ "type": "object", "anyOf": [branch, branch] })).expect("fine for shallow values");
        let takes = |levels| costs.claim(&Size::of(&nested(levels))).is_ok();
        assert!(takes(8) && !takes(40) && !takes(120));
    }

    #[test]
    fn ordinary_schemas_take_whatever_fits_into_a_body() {
        let tree = json!({ "properties": { "left": { "$ref": "#" }, "right": { "$ref": "#" } } });
        let any_json = json!({ "anyOf": [
            { "type": "string" },
            { "type": "array", "items": { "$ref": "#" } },
            { "type": "object", "additionalProperties": { "$ref": "#" }, "properties": { "a": { "$ref": "#" } } },
        ] });
        for schema in [tree, any_json, json!({ "properties": { "b": { "type": "string" } } })] {
            let costs = costs(&schema).expect("fine");
            assert_eq!(costs.claim(&Size::of(&nested(60))), Ok(()), "{schema}");
        }
        let rows = json!({ "items": { "required": ["a"], "properties": { "a": { "type": "number" }, "b": {} } } });
        let many = Value::Array(vec![json!({ "a": 1, "b": 2 }); 200_000]);
        assert_eq!(costs(&rows).expect("fine").claim(&Size::of(&many)), Ok(()));
    }

    fn claimed(schema: &Value, value: &Value) -> Result<(), String> {
        let (costs, size) = (costs(schema).expect("fine"), Size::of(value));
        let longest = std::time::Duration::from_secs(1);
        evaluation::whole(&evaluation::Stop::default(), longest, || costs.claim(&size)).expect("finished")
    }

    #[test]
    fn patterns_and_encodings_are_priced_by_the_texts_that_they_read() {
        let text = json!({ "a": "01".repeat(50_000), "b": [{ "c": 1 }] });
        let at = |schema: Value| json!({ "properties": { "a": schema } });
        assert!(
            claimed(&at(json!({ "pattern": "^[01]*1[01]{3000}$" })), &text)
                .is_err_and(|why| why.contains("100003 bytes"))
        );
        let parses: Vec<_> = (0..500).map(|_| json!({ "contentMediaType": "application/json" })).collect();
        assert!(claimed(&at(json!({ "allOf": parses })), &text).is_err_and(|why| why.contains("encodings")));
        for schema in [json!({ "pattern": "^[a-z0-9 ,.-]{1,200}$" }), json!({ "format": "email" }), parses[0].clone()] {
            assert_eq!(claimed(&at(schema.clone()), &text), Ok(()), "{schema}");
        }
        let keys = json!({ "patternProperties": { "^[01]*1[01]{3000}$": true } });
        let many: serde_json::Map<String, Value> = (0..20_000).map(|n| (format!("key-{n}"), Value::Null)).collect();
        assert!(claimed(&keys, &Value::Object(many)).is_err(), "keys are texts too");
    }

    #[test]
    fn fragments_are_decoded() {
        assert_eq!(decoded("/$defs/a%20b%zz%"), "/$defs/a b%zz%");
    }
}
