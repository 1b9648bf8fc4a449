//! The document as generators of clients and linters want it: owns what is the same to JSON Schema, but not to them. Each
//! change names who needs it; `cargo xtask interop` asks them all.

use serde_json::{Map, Value, json};

/// The part of a name that stands for "a page of".
const PAGE: &str = "Page_";

/// Changes the whole document. What it allows stays the same.
pub(crate) fn tidy(document: &mut Value) {
    if let Some(schemas) = document.pointer_mut("/components/schemas") {
        name_items(schemas);
        name_events(schemas);
        each_schema(schemas);
    }
    if let Some(paths) = document.get_mut("paths") {
        each_schema(paths);
    }
}

/// A page's items are those of the component that they are made of, so that a generator makes one type of them and a linter
/// sees it used.
fn name_items(schemas: &mut Value) {
    for (name, schema) in schemas.as_object_mut().into_iter().flatten() {
        let item = name.strip_prefix(PAGE);
        if let (Some(item), Some(items)) = (item, schema.pointer_mut("/properties/items/items")) {
            *items = reference(item);
        }
    }
}

/// An event is one of several components, each whole. The derived form (all of the common part and of one variant) is
/// refused by generators. The last of them stands for events of newer releases, so that a typed client goes on with those.
fn name_events(schemas: &mut Value) {
    let Some(schemas) = schemas.as_object_mut() else { return };
    let variants = schemas.remove("EventKind").and_then(|mut kind| kind.get_mut("oneOf").map(Value::take));
    let Some(Value::Array(variants)) = variants else { return };
    let common = schemas.get("Event").and_then(|event| event["allOf"].as_array()?.get(1).cloned()).unwrap_or_default();
    let (mut names, mut references) = (Vec::new(), Vec::new());
    for variant in variants {
        let kind = variant.pointer("/properties/type/enum/0").and_then(Value::as_str).unwrap_or_default().to_owned();
        let name = kind.split('.').fold("Event".to_owned(), |name, word| name + &capitalised(word));
        references.push(reference(&name));
        schemas.insert(name, with_common(variant, &common));
        names.push(kind);
    }
    let other = json!({
        "type": "object",
        "description": "Something of a newer release.",
        "required": ["type"],
        "properties": { "type": { "type": "string", "not": { "enum": names }, "description": "What happened." } },
    });
    schemas.insert("EventOther".to_owned(), with_common(other, &common));
    references.push(reference("EventOther"));
    let description = "One event of a run. Read those that you know by their `type`, and pass over the others.";
    schemas.insert("Event".to_owned(), json!({ "anyOf": references, "description": description }));
}

fn reference(name: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

fn capitalised(word: &str) -> String {
    let (first, rest) = word.split_at(word.len().min(1));
    first.to_ascii_uppercase() + rest
}

/// A variant with the properties that all have, these first.
fn with_common(mut variant: Value, common: &Value) -> Value {
    let joined = |of_common: &Value, own: &Value| {
        let mut all: Map<String, Value> = of_common.as_object().cloned().unwrap_or_default();
        all.extend(own.as_object().cloned().unwrap_or_default());
        all
    };
    variant["properties"] = Value::Object(joined(&common["properties"], &variant["properties"]));
    let own = variant["required"].as_array().cloned().unwrap_or_default();
    let required: Vec<Value> =
        common["required"].as_array().cloned().unwrap_or_default().into_iter().chain(own).collect();
    variant["required"] = required.into();
    variant
}

fn each_schema(value: &mut Value) {
    match value {
        Value::Object(map) => {
            for key in ["properties", "patternProperties"] {
                map.get_mut(key)
                    .and_then(Value::as_object_mut)
                    .into_iter()
                    .flatten()
                    .for_each(|(_, part)| spell_out(part));
            }
            for key in ["items", "contains", "not", "if", "then", "else", "propertyNames"] {
                map.get_mut(key).map(spell_out);
            }
            open(map);
            if map.contains_key("properties") {
                name_required(map);
            }
            if map.get("minimum").is_some_and(Value::is_number) && map.contains_key("exclusiveMinimum") {
                map.shift_remove("minimum"); // The other one says more; Redocly wants one.
            }
            map.iter_mut().for_each(|(_, part)| each_schema(part));
        }
        Value::Array(items) => items.iter_mut().for_each(each_schema),
        _ => {}
    }
}

/// A branch that does no more than ask for keys names them; Redocly wants each required key defined beside.
fn name_required(schema: &mut Map<String, Value>) {
    for key in ["anyOf", "oneOf", "allOf"] {
        for branch in schema.get_mut(key).and_then(Value::as_array_mut).into_iter().flatten() {
            let Some(branch) = branch.as_object_mut().filter(|branch| branch.len() == 1) else { continue };
            let Some(required) = branch.get("required").and_then(Value::as_array) else { continue };
            let named: Map<String, Value> =
                required.iter().filter_map(Value::as_str).map(|key| (key.to_owned(), json!({}))).collect();
            branch.insert("properties".to_owned(), named.into());
        }
    }
}

/// `true` is a schema that takes anything; openapi-python-client reads no other than objects.
fn spell_out(schema: &mut Value) {
    if *schema == Value::Bool(true) {
        *schema = json!({});
    }
}

/// An object of which nothing is said takes any keys; openapi-typescript wants that said, else it lets none through.
fn open(schema: &mut Map<String, Value>) {
    let is_object = match schema.get("type") {
        Some(Value::Array(kinds)) => kinds.iter().any(|kind| kind == "object"),
        Some(kind) => kind == "object",
        None => false,
    };
    let says_more = ["properties", "additionalProperties", "allOf", "anyOf", "oneOf"];
    if is_object && !says_more.iter().any(|key| schema.contains_key(*key)) {
        schema.insert("additionalProperties".to_owned(), true.into());
    }
}
