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

/// The published JSON Schema (2020-12) of a definition.
pub(super) fn definition_schema() -> Value {
    SCHEMA.clone()
}

/// In a definition a key is left out, never null: `null` would only hide a forgotten value.
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
                push(path.key(key), true, unknown_key(key, &known));
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

fn unknown_key(key: &str, known: &[&str]) -> Violation {
    let shown = cut(key, 80);
    let mend = match nearest(&shown, known.iter().copied()) {
        Some(near) => format!("did you mean `{near}`?"),
        None if key == "<<" => "merge keys are not part of YAML 1.2; write the keys out".to_owned(),
        None => format!("known keys: {}", known.join(", ")),
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
        (Some("ModelChain"), Value::String(_) | Value::Array(_)) | (Some("Output"), Value::Object(_)) => {
            place.branch(value)
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
                return say(true, path.key(key), unknown_key(key, &known));
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
    if let (Value::String(text), Kind::Pattern { .. } | Kind::Format { .. }) = (value, error.kind()) {
        let rule = match place.name {
            Some("PipelineName") => PipelineName::new(text).err().map(|e| e.to_string()),
            Some("StageId") => StageId::new(text).err().map(|e| e.to_string()),
            Some("ModelRef" | "ModelChain") => ModelRef::new(text).err().map(|e| e.to_string()),
            Some("Span") => text.parse::<Span>().err().map(|e| e.to_string()),
            Some("Backoff") => {
                return (
                    format!("`{}` is no back-off", cut(text, 40)),
                    Some("write the first pause and the longest one, such as `1s..30s`".to_owned()),
                );
            }
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
    fn the_published_schema_is_itself_valid_and_knows_no_null() {
        let schema = definition_schema();
        assert!(jsonschema::meta::is_valid(&schema));
        assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
        assert!(!schema.to_string().contains("\"null\""), "{schema:#}");
        let stage = &schema["$defs"]["StageDefinition"];
        assert_eq!(stage["oneOf"].as_array().map(Vec::len), Some(3));
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
