//! An author's JSON Schema: owns compiling it, and how much work a value may make for it.
//!
//! A schema may look at one value many times: branches of `anyOf` that refer to the same definition, or that each refer
//! back to the whole, double the work with every level. So the work is reckoned before any is done: for each depth of
//! a value, the most that one way from its root down to a leaf can cost. What is dear for every value is refused at
//! registration; what is dear for deep values alone refuses those.

use std::collections::{HashMap, HashSet};

use jsonschema::{PatternOptions, ValidationError, Validator};
use serde_json::Value;

use super::{
    check::{REGEX_MAX_BYTES, Report},
    path::{Path, cut},
    schema,
};
use crate::{Code, Violation};

/// The depth of a value that every schema must be able to check, in levels.
const DEPTH_MIN: usize = 4;
/// The deepest value whose cost is reckoned where a schema refers to itself, in levels.
const DEPTH_MAX: usize = 64;
/// The most that one way from the root to a leaf of such a value may cost, in steps of some nanoseconds.
const PATH_COST_MAX: f64 = 100_000.0;
/// The most that checking one value may cost, in such steps: about a second.
const VALUE_COST_MAX: f64 = 100_000_000.0;
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
        // Before it is compiled: that follows references too.
        let costs = match Graph::of(schema, &anchors).and_then(|graph| graph.costs()) {
            Ok(costs) => costs,
            Err((message, mend)) => {
                report.at_value(path, invalid(message).mend(mend));
                return None;
            }
        };
        let patterns = PatternOptions::regex().size_limit(REGEX_MAX_BYTES).dfa_size_limit(REGEX_MAX_BYTES);
        match jsonschema::options().offline().with_pattern_options(patterns).build(schema) {
            Ok(validator) => Some(Self { validator, costs }),
            Err(error) => {
                let violation = invalid(format!("the schema does not compile: {}", cut(&error.to_string(), 300)));
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
        if self.costs.allow(value) {
            Ok(self.validator.iter_errors(value))
        } else {
            Err("is too large or nested too deeply for the branches and references of its schema".to_owned())
        }
    }
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

/// What one way from the root to a leaf costs at most, by the depth of the value.
#[derive(Debug)]
struct Costs {
    by_depth: Vec<f64>,
    /// Whether deeper values than those cost no more.
    is_level: bool,
}

impl Costs {
    fn allow(&self, value: &Value) -> bool {
        let (depth, values) = measure(value);
        let last = self.by_depth.len() - 1;
        let cost = if depth > last && !self.is_level { f64::INFINITY } else { self.by_depth[depth.min(last)] };
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let values = values as f64;
        cost * values <= VALUE_COST_MAX
    }
}

/// How many levels a value has below its root, and how many values are in it. Its depth was bounded where it was parsed.
fn measure(value: &Value) -> (usize, usize) {
    let all = |inner: &mut dyn Iterator<Item = &Value>| {
        inner.map(measure).fold((0, 1), |(depth, values), (inner, more)| (depth.max(inner + 1), values + more))
    };
    match value {
        Value::Array(items) => all(&mut items.iter()),
        Value::Object(map) => all(&mut map.values()),
        _ => (0, 1),
    }
}

/// A part of a schema, and the parts that it holds against the same value and against the values inside.
#[derive(Debug, Default)]
struct Part<'s> {
    weight: f64,
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
        let mut part = Part { weight: 1.0, ..Part::default() };
        for (key, inner) in schema.as_object().into_iter().flatten() {
            let list = || inner.as_array().into_iter().flatten();
            let named = || inner.as_object().into_iter().flatten();
            #[expect(clippy::cast_precision_loss, reason = "an estimate")]
            let members = list().count().max(named().count()) as f64;
            part.weight += 1.0 + members;
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
        let mut costs = vec![0.0; self.parts.len()];
        let (mut by_depth, mut is_level) = (Vec::new(), false);
        while !is_level && by_depth.len() <= DEPTH_MAX {
            let mut next = costs.clone();
            for entry in &entries {
                next[*entry] = self.cost(&closures[*entry], &costs);
            }
            is_level = next == costs;
            costs = next;
            by_depth.push(costs[0]);
            if costs[0] > VALUE_COST_MAX {
                break;
            }
        }
        if by_depth[DEPTH_MIN.min(by_depth.len() - 1)] > PATH_COST_MAX {
            let message = "checking a value against this schema could take too long: its branches multiply".to_owned();
            return Err((message, ENTANGLED));
        }
        Ok(Costs { by_depth, is_level })
    }

    /// What a value costs, given what the values inside do: the dearest way down, a key or an index.
    fn cost(&self, closure: &[(usize, f64)], inside: &[f64]) -> f64 {
        let (mut own, mut any_key, mut any_index) = (0.0, 0.0, 0.0);
        let (mut keys, mut indexes) = (HashMap::new(), HashMap::new());
        let sum = |parts: &[usize]| parts.iter().map(|part| inside[*part]).sum::<f64>();
        for (index, times) in closure {
            let part = &self.parts[*index];
            let other_key = part.other_key.map_or(0.0, |other| inside[other]);
            let other_index = part.other_index.map_or(0.0, |other| inside[other]);
            own += times * part.weight;
            any_key += times * (other_key + sum(&part.any_key));
            any_index += times * (other_index + sum(&part.any_index));
            for (key, inner) in &part.keyed {
                *keys.entry(*key).or_insert(0.0) += times * (inside[*inner] - other_key);
            }
            for (position, inner) in part.indexed.iter().enumerate() {
                *indexes.entry(position).or_insert(0.0) += times * (inside[*inner] - other_index);
            }
        }
        let key = any_key + keys.into_values().fold(0.0, f64::max);
        let index = any_index + indexes.into_values().fold(0.0, f64::max);
        // Far above every limit, and far below what a float holds exactly enough to compare.
        (own + key.max(index)).min(1e15)
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
        assert!(costs.allow(&nested(8)) && !costs.allow(&nested(40)) && !costs.allow(&nested(120)));
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
            assert!(costs.allow(&nested(60)), "{schema}");
        }
        let rows = json!({ "items": { "required": ["a"], "properties": { "a": { "type": "number" }, "b": {} } } });
        let many = Value::Array(vec![json!({ "a": 1, "b": 2 }); 200_000]);
        assert!(costs(&rows).expect("fine").allow(&many));
    }

    #[test]
    fn fragments_are_decoded() {
        assert_eq!(decoded("/$defs/a%20b%zz%"), "/$defs/a b%zz%");
    }
}
