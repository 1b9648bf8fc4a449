//! The published JSON Schema of a definition and what it finds: owns the way from a validator's errors to mistakes in
//! the field's words. Never judges meaning; that is [`super::check`].

use std::sync::LazyLock;

use jsonschema::{
    ValidationError, Validator,
    error::{TypeKind, ValidationErrorKind as Kind},
};
use schemars::{generate::SchemaSettings, transform::RecursiveTransform};
use serde_json::{Map, Value, json};

use super::{
    Backoff, Definition, Span,
    path::{Path, Segment, cut},
    slips,
};
use crate::{Code, ModelRef, PipelineName, StageId, Violation, error::nearest};

/// The most mistakes that one check lists.
const LISTED_MAX: usize = 100;
/// The most unknown keys among which a missing one is looked for.
const COMPARED_MAX: usize = 100;

/// A mistake of form, and where its position is to be looked for.
#[derive(Debug)]
pub(super) struct Mistake {
    pub(super) path: Path,
    /// Whether the key is at fault, not its value.
    pub(super) at_key: bool,
    pub(super) violation: Violation,
}

static SCHEMA: LazyLock<Value> = LazyLock::new(|| {
    let generator = SchemaSettings::draft2020_12().with_transform(RecursiveTransform(without_null)).into_generator();
    let mut schema = generator.into_root_schema_for::<Definition>();
    schema.insert("$id".to_owned(), json!("urn:stagegate:pipeline-definition"));
    schema.insert("title".to_owned(), json!("Stagegate pipeline definition"));
    schema.to_value()
});

static VALIDATOR: LazyLock<Validator> = LazyLock::new(|| {
    jsonschema::options()
        .with_format("span", |text: &str| text.parse::<Span>().is_ok())
        .with_format("backoff", |text: &str| Backoff::try_from(text.to_owned()).is_ok())
        .should_validate_formats(true)
        .build(&SCHEMA)
        .expect("the schema of a definition is ours and a test compiles it")
});

/// The published JSON Schema (2020-12) of a definition: as it is written, which is before [`settle`].
pub(super) fn definition_schema() -> Value {
    let mut schema = SCHEMA.clone();
    as_written(&mut schema);
    let parts = schema.get_mut("$defs").and_then(Value::as_object_mut);
    parts.into_iter().flat_map(Map::values_mut).for_each(as_written);
    schema
}

/// What may be left out may be null, and keys that begin with `x-` may be there.
fn as_written(part: &mut Value) {
    let required: Vec<String> = part
        .get("required")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(|key| key.as_str().map(str::to_owned))
        .collect();
    let Some(part) = part.as_object_mut() else { return };
    let is_closed = part.get("additionalProperties") == Some(&Value::Bool(false));
    let Some(Value::Object(properties)) = part.get_mut("properties") else { return };
    for (_, inner) in properties.iter_mut().filter(|(key, _)| !required.contains(key)) {
        let Some(schema) = inner.as_object_mut().filter(|schema| schema.keys().any(|key| key != "description")) else {
            continue; // Anything, null too.
        };
        match schema.get("type") {
            Some(Value::String(kind)) if !schema.contains_key("enum") => {
                let kind = kind.clone();
                schema.insert("type".to_owned(), json!([kind, "null"]));
            }
            _ => {
                let description = schema.remove("description");
                let given = Value::Object(std::mem::take(schema));
                schema.insert("anyOf".to_owned(), json!([given, { "type": "null" }]));
                schema.extend(description.map(|text| ("description".to_owned(), text)));
            }
        }
    }
    if is_closed {
        part.insert("patternProperties".to_owned(), json!({ "^x-": true }));
    }
}

/// Takes out what says nothing: keys of ours that are null and may be left out, and keys that begin with `x-`, which are
/// there for YAML's anchors. An author's own data (schemas, the output mapping) stays as it is.
pub(super) fn settle(value: &mut Value) {
    let root: &'static Value = &SCHEMA;
    settle_at(value, &Place::at(Some(root)));
}

fn settle_at(value: &mut Value, place: &Place<'_>) {
    match value {
        Value::Object(map) => {
            if let Some(known) = place.properties() {
                let required = place.schema.and_then(|schema| schema.get("required")).and_then(Value::as_array);
                let is_required = |key: &str| required.is_some_and(|keys| keys.iter().any(|name| name == key));
                map.retain(|key, value| {
                    if known.contains_key(key) { !value.is_null() || is_required(key) } else { !key.starts_with("x-") }
                });
            }
            for (key, inner) in map {
                settle_at(inner, &place.inner(&Segment::Key(key.clone())));
            }
        }
        Value::Array(items) if place.schema.is_some() => {
            let place = place.inner(&Segment::Index(0));
            for item in items {
                settle_at(item, &place);
            }
        }
        _ => {}
    }
}

/// The schema that definitions are held against knows no null: what may be null is taken out before.
fn without_null(schema: &mut schemars::Schema) {
    let Some(object) = schema.as_object_mut() else { return };
    let is_null = |schema: &Value| schema.get("type").is_some_and(|t| t == "null");
    if let Some(Value::Array(types)) = object.get_mut("type") {
        types.retain(|t| t != "null");
        if let [only] = types.as_slice() {
            let only = only.clone();
            object.insert("type".to_owned(), only);
        }
    }
    if let Some(Value::Array(branches)) = object.get_mut("anyOf") {
        branches.retain(|branch| !is_null(branch));
        if let [Value::Object(only)] = branches.as_slice() {
            let only = only.clone();
            object.remove("anyOf");
            for (key, value) in only {
                object.entry(key).or_insert(value);
            }
        }
    }
    object.remove("default");
}

/// Everything in a definition that is not of the right form.
pub(super) fn mistakes(value: &Value) -> Vec<Mistake> {
    let mut found = Vec::new();
    for error in VALIDATOR.iter_errors(value) {
        translate(&error, &mut found);
        if found.len() >= LISTED_MAX {
            break;
        }
    }
    found
}

fn translate(error: &ValidationError<'_>, found: &mut Vec<Mistake>) {
    let path = Path::root().below(error.instance_path());
    let value = error.instance().as_ref();
    let place = schema_at(&path);
    let mut push = |path: Path, at_key, violation| found.push(Mistake { path, at_key, violation });
    match error.kind() {
        Kind::AdditionalProperties { unexpected } => {
            let known = place.keys();
            for key in unexpected.iter().take(LISTED_MAX) {
                push(path.key(key), true, unknown_key(place.name_of(), key, &known));
            }
        }
        Kind::Required { property } => {
            let key = property.as_str().unwrap_or_default();
            let known = place.keys();
            let mut others = value.as_object().into_iter().flat_map(Map::keys).filter(|k| !known.contains(&k.as_str()));
            if others.by_ref().take(COMPARED_MAX).any(|other| nearest(&cut(other, 80), [key]).is_some()) {
                return; // Misspelt, and told as that.
            }
            let violation = Violation::new(Code::MissingKey, "", format!("`{key}` is missing"));
            push(path.key(key), false, violation.mend(format!("add `{key}:`{}", place.about(key))));
        }
        Kind::OneOfNotValid { context } | Kind::AnyOf { context } => union(&path, value, &place, context, found),
        // Which of `prompt`, `messages` and `transform` is a matter of meaning; see `check`.
        Kind::OneOfMultipleValid { .. } => {}
        _ => {
            let (message, mend) = wrong_value(&path, value, &place, error);
            push(path, false, with_mend(Violation::new(Code::WrongValue, "", message), mend));
        }
    }
}

fn with_mend(violation: Violation, mend: Option<String>) -> Violation {
    match mend {
        Some(mend) => violation.mend(mend),
        None => violation,
    }
}

fn unknown_key(part: Option<&str>, key: &str, known: &[&str]) -> Violation {
    let shown = cut(key, 80);
    let mend = match (slips::key(part, key), nearest(&shown, known.iter().copied())) {
        (Some(instead), _) => instead,
        (None, Some(near)) => format!("did you mean `{near}`?"),
        (None, None) => format!("known keys: {}", known.join(", ")),
    };
    Violation::new(Code::UnknownKey, "", format!("unknown key `{shown}`")).mend(mend)
}

/// Mistakes in a value that may have one of several shapes, told for the shape that was meant.
fn union(
    path: &Path,
    value: &Value,
    place: &Place<'_>,
    context: &[Vec<ValidationError<'static>>],
    found: &mut Vec<Mistake>,
) {
    let mut say = |at_key, path: Path, violation| found.push(Mistake { path, at_key, violation });
    let wrong = |message: String, mend: &str| Violation::new(Code::WrongValue, "", message).mend(mend);
    let branch = match (place.name, value) {
        // Exactly one of prompt, messages and transform: told by `check`, which knows all of the stage.
        (Some("StageDefinition"), _) => return,
        (Some("ModelChain"), Value::String(_) | Value::Array(_))
        | (Some("Output"), Value::Object(_))
        | (Some("Messages"), Value::Array(_) | Value::Object(_)) => place.branch(value),
        (Some("Messages"), other) => {
            let mend = "write a list, such as `- { role: user, content: \"…\" }`, or `{ from: input.history }`";
            return say(false, path.clone(), wrong(format!("is {}, which is no conversation", told(other)), mend));
        }
        (Some("ModelChain"), other) => {
            let mend = "write `provider/model`, or a list of them that is tried in order";
            return say(false, path.clone(), wrong(format!("is {}, but a model is a text", told(other)), mend));
        }
        (Some("Output"), other) => {
            let near = other.as_str().and_then(|text| nearest(text, ["text", "json"]));
            let mend = match near {
                Some(near) => format!("did you mean `{near}`?"),
                None => "write `text`, `json`, or a map with a JSON Schema: `{ schema: … }`".to_owned(),
            };
            return say(false, path.clone(), wrong(format!("is {}, which is no output format", told(other)), &mend));
        }
        (Some("Check"), Value::Object(map)) if map.len() == 1 => {
            let known = place.branch_keys();
            let Some(key) = map.keys().next() else { return };
            if !known.contains(&key.as_str()) {
                return say(true, path.key(key), unknown_key(Some("Check"), key, &known));
            }
            place.branch(value)
        }
        (Some("Check"), other) => {
            let what = match other {
                Value::Object(map) => format!("has {} keys", map.len()),
                other => format!("is {}", told(other)),
            };
            let message = format!("{what}, but a check is a map with a single key");
            let mend = format!(
                "write one item per check, such as `- min_chars: 400`; known checks: {}",
                place.branch_keys().join(", ")
            );
            return say(false, path.clone(), wrong(message, &mend));
        }
        (Some("Concurrency"), Value::Object(_)) => {
            let mend =
                "write `max_runs`, or `key` (an expression over the input, without braces: `input.customer`), or both";
            return say(false, path.clone(), wrong("limits nothing".to_owned(), mend));
        }
        _ => {
            let words = place.words();
            let near = value.as_str().and_then(|text| nearest(text, words.iter().copied()));
            let mend =
                near.map_or_else(|| format!("write one of {}", listed(&words)), |n| format!("did you mean `{n}`?"));
            return say(
                false,
                path.clone(),
                wrong(format!("is {}; one of {} is expected", told(value), listed(&words)), &mend),
            );
        }
    };
    for error in branch.and_then(|index| context.get(index)).into_iter().flatten() {
        translate(error, found);
    }
}

fn listed(words: &[&str]) -> String {
    words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", ")
}

/// What is wrong with a plain value, in the words of what it stands for where those are known.
fn wrong_value(path: &Path, value: &Value, place: &Place<'_>, error: &ValidationError<'_>) -> (String, Option<String>) {
    if value.is_null() {
        let key = path.last_key().unwrap_or("it");
        return ("is empty (null)".to_owned(), Some(format!("give `{key}` a value or leave it out")));
    }
    if let Some(mend) = slips::value(place.name, path.last_key(), value) {
        let what = match (place.name, value) {
            (Some("Span"), Value::String(text)) => format!("`{}` is not a length of time", cut(text, 40)),
            (Some("Backoff"), Value::String(text)) => format!("`{}` is no back-off", cut(text, 40)),
            _ => sentence(error),
        };
        return (what, Some(mend));
    }
    if let (Value::String(text), Kind::Pattern { .. } | Kind::Format { .. }) = (value, error.kind()) {
        let rule = match place.name {
            Some("PipelineName") => PipelineName::new(text).err().map(|e| e.to_string()),
            Some("StageId") => StageId::new(text).err().map(|e| e.to_string()),
            Some("ModelRef" | "ModelChain") => ModelRef::new(text).err().map(|e| e.to_string()),
            Some("Span") => text.parse::<Span>().err().map(|e| e.to_string()),
            _ => None,
        };
        if let Some((what, mend)) = rule.as_deref().and_then(|rule| rule.split_once(": ")) {
            return (what.to_owned(), Some(mend.to_owned()));
        }
    }
    (sentence(error), None)
}

/// What a JSON Schema validator found, as the rest of a sentence that starts with the place: "is a text, but …".
pub(super) fn sentence(error: &ValidationError<'_>) -> String {
    let value = error.instance().as_ref();
    let is = told(value);
    match error.kind() {
        Kind::Type { kind } => format!("is {is}, but must be {}", types(kind)),
        Kind::Enum { options } => match options.as_array() {
            Some(options) if options.len() <= 20 => {
                let options: Vec<_> = options.iter().map(|option| format!("`{}`", short(option))).collect();
                format!("is {is}, but must be one of {}", options.join(", "))
            }
            _ => format!("is {is}, which is not among the allowed values"),
        },
        Kind::Constant { expected_value } => format!("is {is}, but must be `{}`", short(expected_value)),
        Kind::Minimum { limit } => format!("is {is}, but must be at least {}", plain(limit)),
        Kind::Maximum { limit } => format!("is {is}, but must be at most {}", plain(limit)),
        Kind::ExclusiveMinimum { limit } => format!("is {is}, but must be more than {}", plain(limit)),
        Kind::ExclusiveMaximum { limit } => format!("is {is}, but must be less than {}", plain(limit)),
        Kind::MultipleOf { multiple_of } => format!("is {is}, but must be a multiple of {multiple_of}"),
        Kind::MinLength { limit } => {
            format!("has {}, but must have at least {limit}", counted(size(value), "character"))
        }

        Kind::MaxLength { limit } => {
            format!("has {}, but must have at most {limit}", counted(size(value), "character"))
        }

        Kind::MinItems { limit } => format!("has {}, but must have at least {limit}", counted(size(value), "item")),

        Kind::MaxItems { limit } => format!("has {}, but must have at most {limit}", counted(size(value), "item")),

        Kind::MinProperties { limit } => format!("has {}, but must have at least {limit}", counted(size(value), "key")),

        Kind::MaxProperties { limit } => format!("has {}, but must have at most {limit}", counted(size(value), "key")),

        Kind::UniqueItems => "has items that are equal, but each must be different".to_owned(),
        Kind::Contains => "has no item of the kind that it must contain".to_owned(),
        Kind::Pattern { pattern } => format!("is {is}, but must match the pattern `{}`", cut(pattern, 200)),
        Kind::Format { format } => format!("is {is}, but must be a valid {format}"),
        Kind::Required { property } => format!("`{}` is required", property.as_str().unwrap_or_default()),
        Kind::AdditionalProperties { unexpected } | Kind::UnevaluatedProperties { unexpected } => {
            let keys: Vec<_> = unexpected.iter().take(10).map(|key| format!("`{}`", cut(key, 80))).collect();
            format!("has keys that are not allowed: {}", keys.join(", "))
        }
        Kind::AdditionalItems { limit } => format!("has more than the {limit} items that are allowed"),
        Kind::FalseSchema => "must not be there".to_owned(),
        Kind::AnyOf { .. } | Kind::OneOfNotValid { .. } => format!("is {is}, which fits none of the allowed shapes"),
        Kind::OneOfMultipleValid { .. } => "fits more than one of the shapes of which it may fit only one".to_owned(),
        Kind::Not { .. } => format!("is {is}, which is just what it must not be"),
        _ => cut(&error.to_string(), 300),
    }
}

/// A limit without a needless `.0`.
fn plain(limit: &Value) -> String {
    let text = limit.to_string();
    text.strip_suffix(".0").map_or_else(|| text.clone(), str::to_owned)
}

/// `1 item`, `2 items`.
pub(super) fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

fn size(value: &Value) -> usize {
    match value {
        Value::String(text) => text.chars().count(),
        Value::Array(items) => items.len(),
        Value::Object(map) => map.len(),
        _ => 0,
    }
}

fn types(kind: &TypeKind) -> String {
    let names = match kind {
        TypeKind::Single(one) => vec![type_name(&one.to_string())],
        TypeKind::Multiple(set) => set.iter().map(|one| type_name(&one.to_string())).collect(),
    };
    names.join(" or ")
}

fn type_name(name: &str) -> &'static str {
    match name {
        "object" => "a map",
        "array" => "a list",
        "string" => "a text",
        "integer" => "a whole number",
        "number" => "a number",
        "boolean" => "true or false",
        _ => "null",
    }
}

/// A value in a message: short, and its kind where that helps.
pub(super) fn told(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(_) | Value::Number(_) => format!("`{value}`"),
        Value::String(text) if text.is_empty() => "an empty text".to_owned(),
        Value::String(text) => format!("the text `{}`", cut(text, 60)),
        Value::Array(items) if items.is_empty() => "an empty list".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "a map".to_owned(),
    }
}

fn short(value: &Value) -> String {
    match value {
        Value::String(text) => cut(text, 60),
        other => cut(&other.to_string(), 60),
    }
}

/// What the schema says at a place of the definition.
struct Place<'a> {
    /// The name of its type, where it has one.
    name: Option<&'a str>,
    schema: Option<&'a Value>,
}

impl<'a> Place<'a> {
    fn at(schema: Option<&'a Value>) -> Self {
        let mut place = Self { name: None, schema };
        while let Some(reference) = place.schema.and_then(|s| s.get("$ref")).and_then(Value::as_str) {
            place.name = reference.strip_prefix("#/$defs/");
            place.schema = place.name.and_then(|name| SCHEMA.get("$defs")?.get(name));
        }
        place
    }

    fn inner(&self, segment: &Segment) -> Self {
        let inner = self.schema.and_then(|schema| match segment {
            Segment::Key(key) => schema.get("properties")?.get(key),
            Segment::Index(_) => schema.get("items"),
        });
        // In a union it is the branch that has this key, or that is a list.
        let inner = inner.or_else(|| {
            self.branches().find_map(|branch| match segment {
                Segment::Key(key) => Self::at(Some(branch)).schema?.get("properties")?.get(key),
                Segment::Index(_) => Self::at(Some(branch)).schema?.get("items"),
            })
        });
        Self::at(inner)
    }

    fn branches(&self) -> impl Iterator<Item = &'a Value> {
        let list = |key| self.schema.and_then(|s| s.get(key)).and_then(Value::as_array);
        list("anyOf").or_else(|| list("oneOf")).into_iter().flatten()
    }

    fn properties(&self) -> Option<&'a Map<String, Value>> {
        self.schema.and_then(|schema| schema.get("properties")).and_then(Value::as_object)
    }

    /// The name of its type; the whole is the definition.
    fn name_of(&self) -> Option<&'a str> {
        self.name.or_else(|| self.properties().filter(|p| p.contains_key("stages")).map(|_| "Definition"))
    }

    fn keys(&self) -> Vec<&'a str> {
        match self.properties() {
            Some(properties) => properties.keys().map(String::as_str).collect(),
            None => self.branch_keys(),
        }
    }

    fn about(&self, key: &str) -> String {
        let description = self.properties().and_then(|p| p.get(key)?.get("description")?.as_str());
        description.map(|text| format!(" ({})", text.trim_end_matches('.'))).unwrap_or_default()
    }

    /// The keys of a union of maps with a single key each.
    fn branch_keys(&self) -> Vec<&'a str> {
        self.branches().flat_map(|branch| Self::at(Some(branch)).keys()).collect()
    }

    /// The words of a union of words.
    fn words(&self) -> Vec<&'a str> {
        let branches: Vec<_> = self.branches().collect();
        let branches = if branches.is_empty() { self.schema.into_iter().collect() } else { branches };
        let of = |schema: &'a Value| {
            let listed = schema.get("enum").and_then(Value::as_array).into_iter().flatten();
            listed.chain(schema.get("const")).filter_map(Value::as_str)
        };
        branches.into_iter().flat_map(of).collect()
    }

    /// The branch of a union that a value was meant to be, by its type and, for maps, its key.
    fn branch(&self, value: &Value) -> Option<usize> {
        let key = value.as_object().and_then(|map| map.keys().next());
        let branches: Vec<_> = self.branches().map(|branch| Self::at(Some(branch))).collect();
        let by_key = key.and_then(|key| branches.iter().position(|branch| branch.keys().contains(&key.as_str())));
        let name = match value {
            Value::String(_) => "string",
            Value::Array(_) => "array",
            _ => "object",
        };
        by_key.or_else(|| {
            branches.iter().position(|branch| branch.schema.and_then(|s| s.get("type")).is_some_and(|t| t == name))
        })
    }
}

fn schema_at(path: &Path) -> Place<'static> {
    let root: &'static Value = &SCHEMA;
    path.segments().iter().fold(Place::at(Some(root)), |place, segment| place.inner(segment))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_schema_is_itself_valid_and_takes_null_for_what_may_be_left_out() {
        let schema = definition_schema();
        assert!(jsonschema::meta::is_valid(&schema));
        assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
        assert!(!SCHEMA.to_string().contains("\"null\""), "{:#}", *SCHEMA);
        let stage = &schema["$defs"]["StageDefinition"];
        assert_eq!(stage["oneOf"].as_array().map(Vec::len), Some(4));
        assert_eq!(stage["properties"]["description"]["type"], json!(["string", "null"]));
        assert_eq!(stage["properties"]["id"].get("anyOf"), None, "{:#}", stage["properties"]["id"]);
        LazyLock::force(&VALIDATOR);
    }

    #[test]
    fn every_key_of_the_published_schema_is_described() {
        fn walk(schema: &Value, undescribed: &mut Vec<String>) {
            if let Some(properties) = schema.get("properties").and_then(Value::as_object) {
                for (key, inner) in properties {
                    let described = inner.get("description").is_some() || schema.get("description").is_some();
                    if !described {
                        undescribed.push(key.clone());
                    }
                }
            }
            match schema {
                Value::Object(map) => map.values().for_each(|inner| walk(inner, undescribed)),
                Value::Array(items) => items.iter().for_each(|inner| walk(inner, undescribed)),
                _ => {}
            }
        }
        let mut undescribed = Vec::new();
        walk(&definition_schema(), &mut undescribed);
        assert_eq!(undescribed, Vec::<String>::new());
    }
}
