//! The OpenAPI document: owns what holds for every operation (errors, security, the definition's schema), so that a
//! route states only what is its own. Also holds request bodies against the published schemas.

use std::{
    collections::{BTreeSet, HashMap},
    fmt::Write as _,
};

use bytes::Bytes;
use jsonschema::{ValidationError, Validator, error::ValidationErrorKind};
use serde_json::{Map, Value, json};
use stagegate_core::{Code, Violation, error::nearest, pipeline::definition_schema};
use utoipa::{OpenApi as _, PartialSchema, ToSchema, openapi::RefOr};

use crate::{
    base::BasePath,
    etag::Tag,
    examples,
    layers::is_probe,
    problem::{PROBLEM_JSON, VIOLATIONS_MAX},
    tidy::tidy,
};

/// The longest part of an unknown key that is told, in characters.
const KEY_MAX_CHARS: usize = 80;
/// What an operation says of a body that is not required.
const MAY_BE_LEFT_OUT: &str = "May be left out.";
/// The name of the definition's schema among the components.
const DEFINITION: &str = "Definition";

/// The document's fixed part.
#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "Stagegate",
        description = "Runs staged LLM pipelines: each stage gated, checkpointed, cached, metered and resumable.\n\n\
            Errors are problem details (RFC 9457) with a stable `code`; every answer carries `x-request-id`. Lists are \
            paged by opaque cursors. `POST /v1/runs` takes an `Idempotency-Key`.",
        contact(name = "Stagegate", url = "https://github.com/stagegate/stagegate"),
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    tags(
        (name = "pipelines", description = "Definitions: immutable versions, numbered per name."),
        (name = "runs", description = "One execution of a pipeline's version on one input."),
        (name = "stages", description = "A stage of a run: attempts, assessments, checkpoint, approval."),
        (name = "plan", description = "What a run would cost, without spending."),
        (name = "cache", description = "The cache of model answers."),
        (name = "operations", description = "Replicas, what they own, and what waits."),
        (name = "probes", description = "Health and metrics. No key is asked for."),
    ),
    components(schemas(crate::problem::ProblemBody)),
)]
struct Fixed;

/// Stands for the definition's schema, which the core publishes.
pub(crate) struct DefinitionDocument;

impl PartialSchema for DefinitionDocument {
    fn schema() -> RefOr<utoipa::openapi::Schema> {
        utoipa::openapi::ObjectBuilder::new().into()
    }
}

impl ToSchema for DefinitionDocument {
    fn name() -> std::borrow::Cow<'static, str> {
        DEFINITION.into()
    }
}

/// Where the router begins to collect its routes.
pub(crate) fn fixed() -> utoipa::openapi::OpenApi {
    let mut api = Fixed::openapi();
    env!("CARGO_PKG_VERSION").clone_into(&mut api.info.version);
    api
}

/// The finished document.
pub(crate) struct Document {
    /// As `/openapi.json` answers it.
    pub(crate) json: Bytes,
    pub(crate) tag: Tag,
    checks: HashMap<String, Check>,
}

struct Check {
    validator: Validator,
    keys: Vec<String>,
    integers: Vec<String>,
    /// Those that may be left out.
    optional: Vec<String>,
}

impl Document {
    /// From what the router collected. An open daemon asks for no key.
    pub(crate) fn new(api: &utoipa::openapi::OpenApi, open: bool, base: &BasePath) -> Self {
        let value = document(api, open, base);
        let text = value.to_string();
        let tag = Tag::new(blake3::hash(text.as_bytes()).to_hex());
        Self { checks: checks(&value), json: text.into(), tag }
    }

    /// To JSON Schema `3.0` is an integer, to the decoder it is none: writes such values of a component as `3`.
    pub(crate) fn settle(&self, name: &str, value: &mut Value) {
        for key in self.checks.get(name).into_iter().flat_map(|check| &check.integers) {
            let Some(number) = value.get_mut(key).filter(|number| number.is_f64()) else { continue };
            // Within 2^53 a float holds whole numbers exactly; the schema's bounds are far below that.
            if let Some(whole) = number.as_f64().and_then(|float| format!("{float:.0}").parse::<i64>().ok()) {
                *number = whole.into();
            }
        }
    }

    /// A key that may be left out may be null: that is the same.
    pub(crate) fn leave_out_nulls(&self, name: &str, value: &mut Value) {
        let (Some(check), Some(map)) = (self.checks.get(name), value.as_object_mut()) else { return };
        for key in &check.optional {
            if map.get(key).is_some_and(Value::is_null) {
                map.remove(key);
            }
        }
    }

    /// The ways in which a value does not fit a component, up to a limit. An unknown component fits nothing.
    pub(crate) fn check(&self, name: &str, value: &Value) -> Vec<Violation> {
        match self.checks.get(name) {
            Some(check) => {
                let errors = check.validator.iter_errors(value);
                errors.flat_map(|error| violations(&error, &check.keys)).take(VIOLATIONS_MAX).collect()
            }
            None => vec![Violation::new(Code::Internal, "", format!("no schema `{name}`"))],
        }
    }
}

/// The whole document as JSON.
pub(crate) fn document(api: &utoipa::openapi::OpenApi, open: bool, base: &BasePath) -> Value {
    // The document is made of maps, strings and numbers: it always serialises.
    let mut value = serde_json::to_value(api).unwrap_or_default();
    value["servers"] = json!([{ "url": base.server(), "description": "This daemon" }]);
    add_definition(&mut value);
    close_branches(&mut value);
    take_null(&mut value);
    tidy(&mut value);
    if !open {
        value["components"]["securitySchemes"] = json!({
            "bearer": { "type": "http", "scheme": "bearer", "description": "An API key: `Authorization: Bearer sg_…`" },
            "apiKey": { "type": "apiKey", "in": "header", "name": "x-api-key", "description": "An API key" },
        });
    }
    if let Some(paths) = value.get_mut("paths").and_then(Value::as_object_mut) {
        for (path, item) in paths {
            for (_, operation) in item.as_object_mut().into_iter().flatten() {
                if operation.get("responses").is_some() {
                    complete(path, operation, open);
                }
            }
        }
    }
    examples::add(&mut value);
    value
}

/// Adds what every operation of its kind may answer, and the problem's shape to each error.
fn complete(path: &str, operation: &mut Value, open: bool) {
    let is_api = path.starts_with("/v1/");
    let mut statuses: Vec<(u16, &str)> = vec![(500, "A defect of ours (SG0008).")];
    if !is_api {
        statuses.push((400, "The head of the request could not be read (SG0001)."));
    }
    if !is_probe(path) {
        statuses.push((403, "The key's role is too low (SG0011), or an open daemon was called from elsewhere."));
    }
    if is_api {
        statuses.extend([
            (400, "The request could not be read (SG0001, SG0206, SG0208)."),
            (401, "No valid API key (SG0010)."),
            (408, "It took too long (SG0006)."),
            (429, "Too much at once (SG0007, SG0209), or too many authentications failed (SG0014)."),
            (503, "A dependency is away (SG0009), the replica is shutting down (SG0012), or too many connections are open (SG0013)."),
        ]);
        operation["security"] = if open { json!([]) } else { json!([{ "bearer": [] }, { "apiKey": [] }]) };
    } else {
        operation["security"] = json!([]);
    }
    if is_api && path.contains('{') {
        statuses.push((404, "There is no such thing for this tenant (SG0201 to SG0204)."));
    }
    if let Some(body) = operation.get_mut("requestBody") {
        if body["description"] == MAY_BE_LEFT_OUT {
            body["required"] = false.into();
        }
        statuses.extend([
            (413, "The body is too large (SG0003)."),
            (415, "The body is not of a type that this route takes (SG0002)."),
        ]);
    }
    let parameters = operation.get_mut("parameters").and_then(Value::as_array_mut);
    for schema in parameters.into_iter().flatten().filter_map(|parameter| parameter.get_mut("schema")) {
        only_present(schema);
    }
    let Some(responses) = operation.get_mut("responses").and_then(Value::as_object_mut) else { return };
    for (status, description) in statuses {
        if !responses.contains_key(&status.to_string()) {
            responses.insert(status.to_string(), json!({ "description": description }));
        }
    }
    for (status, response) in responses.iter_mut() {
        let is_error = status.starts_with('4') || status.starts_with('5');
        if is_error && response.get("content").is_none() {
            response["content"] = json!({ PROBLEM_JSON: { "schema": { "$ref": "#/components/schemas/Problem" } } });
        }
        if is_error && (status == "429" || status == "503") {
            response["headers"]["Retry-After"] =
                json!({ "schema": { "type": "integer", "minimum": 1 }, "description": "Seconds to wait" });
        }
    }
    let mut sorted: Vec<(String, Value)> = std::mem::take(responses).into_iter().collect();
    sorted.sort_by(|a, b| a.0.cmp(&b.0));
    responses.extend(sorted);
}

/// A parameter may be left out; it is never null.
fn only_present(schema: &mut Value) {
    let Some(kind) = schema.get_mut("type") else { return };
    if let Some(kinds) = kind.as_array_mut() {
        kinds.retain(|kind| kind != "null");
        if let [only] = kinds.as_slice() {
            *kind = only.clone();
        }
    }
}

/// Puts the core's schema of a definition, and the ones that it refers to, among the components.
fn add_definition(value: &mut Value) {
    let mut schema = definition_schema();
    let prefix = format!("#/components/schemas/{DEFINITION}.");
    rewrite_refs(&mut schema, &prefix);
    let parts = schema.as_object_mut().map(|root| {
        root.remove("$schema");
        root.remove("$id");
        root.remove("$defs")
    });
    let components = value.pointer_mut("/components/schemas").and_then(Value::as_object_mut);
    let Some(components) = components else { return };
    if let Some(Some(Value::Object(parts))) = parts {
        components.extend(parts.into_iter().map(|(name, part)| (format!("{DEFINITION}.{name}"), part)));
    }
    components.insert(DEFINITION.to_owned(), schema);
}

/// A body takes no other keys than its own. Of a tagged one the branches do not say so by themselves.
fn close_branches(document: &mut Value) {
    for name in bodies(document) {
        let branches = document["components"]["schemas"][&name].get_mut("oneOf").and_then(Value::as_array_mut);
        for branch in branches.into_iter().flatten().filter(|branch| branch["properties"].is_object()) {
            branch["additionalProperties"] = json!(false);
        }
    }
}

/// In a body, what may be left out may be null.
fn take_null(document: &mut Value) {
    for name in bodies(document).into_iter().filter(|name| name != DEFINITION) {
        let component = &mut document["components"]["schemas"][&name];
        take_null_in(component);
        component.get_mut("oneOf").and_then(Value::as_array_mut).into_iter().flatten().for_each(take_null_in);
    }
}

fn take_null_in(component: &mut Value) {
    let optional = optional_keys(component);
    let properties = component.get_mut("properties").and_then(Value::as_object_mut);
    for (_, schema) in properties.into_iter().flatten().filter(|(key, _)| optional.contains(key)) {
        let is_null = |kind: &Value| kind == "null" || kind["type"] == "null";
        let lists = ["type", "oneOf", "anyOf"].into_iter().filter_map(|key| schema.get(key)?.as_array());
        if lists.flatten().any(is_null) {
            continue;
        }
        match schema.get_mut("type") {
            Some(kind @ Value::String(_)) => *kind = json!([kind.take(), "null"]),
            Some(Value::Array(kinds)) => kinds.push(json!("null")),
            _ => {
                let given = schema.take();
                *schema = json!({ "anyOf": [given, { "type": "null" }] });
            }
        }
    }
}

/// The keys of a component that may be left out.
fn optional_keys(component: &Value) -> Vec<String> {
    let required = component["required"].as_array();
    let is_required = |key: &str| required.is_some_and(|keys| keys.iter().any(|name| name == key));
    let keys = component["properties"].as_object().into_iter().flat_map(Map::keys);
    keys.filter(|key| !is_required(key)).cloned().collect()
}

/// The components that JSON request bodies refer to.
fn bodies(document: &Value) -> Vec<String> {
    let operations = document["paths"].as_object().into_iter().flat_map(Map::values);
    let operations = operations.filter_map(Value::as_object).flat_map(Map::values);
    let names = operations.filter_map(|operation| {
        let schema = operation.pointer("/requestBody/content/application~1json/schema/$ref")?;
        schema.as_str()?.strip_prefix("#/components/schemas/").map(str::to_owned)
    });
    names.collect()
}

fn rewrite_refs(schema: &mut Value, prefix: &str) {
    match schema {
        Value::Object(map) => {
            for (key, value) in map {
                match value {
                    Value::String(text) if key == "$ref" => *text = text.replacen("#/$defs/", prefix, 1),
                    other => rewrite_refs(other, prefix),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| rewrite_refs(item, prefix)),
        _ => {}
    }
}

/// A validator for each component that a JSON request body refers to.
fn checks(document: &Value) -> HashMap<String, Check> {
    let mut checks = HashMap::new();
    for name in bodies(document).into_iter().filter(|name| name != DEFINITION) {
        let mut root = json!({ "$ref": format!("#/components/schemas/{name}") });
        root["components"] = document["components"].clone();
        let component = &document["components"]["schemas"][&name];
        let branches = component["oneOf"].as_array().into_iter().flatten();
        let is_integer = |schema: &Value| match &schema["type"] {
            Value::Array(kinds) => kinds.iter().any(|kind| kind == "integer"),
            kind => kind == "integer",
        };
        let properties = branches.chain([component]).filter_map(|schema| schema["properties"].as_object()).flatten();
        let names = |chosen: &dyn Fn(&Value) -> bool| {
            let names = properties.clone().filter(|(_, schema)| chosen(schema)).map(|(key, _)| key.clone());
            names.collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>()
        };
        let (keys, integers) = (names(&|_| true), names(&is_integer));
        let parts = component["oneOf"].as_array().into_iter().flatten().chain([component]);
        let optional = parts.flat_map(optional_keys).collect();
        // A component that is no schema is a defect, and a test holds each body against its own.
        if let Ok(validator) = jsonschema::validator_for(&root) {
            checks.insert(name, Check { validator, keys, integers, optional });
        }
    }
    checks
}

/// The core's words for what a schema's validator found.
fn violations(error: &ValidationError<'_>, keys: &[String]) -> Vec<Violation> {
    let path = path_of(&error.instance_path().to_string());
    let at = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    match error.kind() {
        ValidationErrorKind::Required { property } => {
            let name = property.as_str().unwrap_or_default();
            vec![Violation::new(Code::MissingKey, at(name), format!("`{name}` is required"))]
        }
        ValidationErrorKind::AdditionalProperties { unexpected }
        | ValidationErrorKind::UnevaluatedProperties { unexpected } => {
            unexpected.iter().take(VIOLATIONS_MAX).map(|name| unknown_key(name, &at, keys)).collect()
        }
        // The branch that was meant is the one of the value's own type and, where it is tagged, of its tag.
        ValidationErrorKind::OneOfNotValid { context } => {
            match context.iter().find(|errors| !errors.iter().any(is_of_another_branch)) {
                Some(meant) => meant.iter().flat_map(|error| violations(error, keys)).collect(),
                None => not_among(context).unwrap_or_else(|| {
                    let last = context.last().and_then(|errors| errors.first());
                    last.map_or_else(
                        || vec![Violation::new(Code::WrongValue, path, "the value does not fit")],
                        |error| violations(error, keys),
                    )
                }),
            }
        }
        _ => vec![Violation::new(Code::WrongValue, path, error.masked_with("the value").to_string())],
    }
}

fn is_of_another_branch(error: &ValidationError<'_>) -> bool {
    matches!(
        error.kind(),
        ValidationErrorKind::Type { .. } | ValidationErrorKind::Enum { .. } | ValidationErrorKind::Constant { .. }
    )
}

/// For a value, or a tag, that is among the words of no branch: all of these words.
fn not_among(context: &[Vec<ValidationError<'_>>]) -> Option<Vec<Violation>> {
    let mut words = Vec::new();
    let mut place = None;
    for error in context.iter().flatten() {
        if let ValidationErrorKind::Enum { options } = error.kind() {
            place.get_or_insert_with(|| path_of(&error.instance_path().to_string()));
            words.extend(options.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned));
        }
    }
    let message = format!("the value is none of {}", words.join(", "));
    Some(vec![Violation::new(Code::WrongValue, place?, message)])
}

fn unknown_key(name: &str, at: &impl Fn(&str) -> String, keys: &[String]) -> Violation {
    let shown: String = name.chars().take(KEY_MAX_CHARS).collect();
    let (path, message) = (at(&shown), format!("`{shown}` is not a key of this body"));
    let violation = Violation::new(Code::UnknownKey, path, message);
    if keys.contains(&shown) {
        return violation.mend("leave it out: it does not go with the other keys");
    }
    match nearest(&shown, keys.iter().map(String::as_str)) {
        Some(word) => violation.mend(format!("did you mean `{word}`?")),
        None => violation.mend(format!("the keys are {}", keys.join(", "))),
    }
}

/// `/labels/team/0` as `labels.team[0]`.
fn path_of(pointer: &str) -> String {
    let mut path = String::new();
    for segment in pointer.split('/').skip(1) {
        let segment = segment.replace("~1", "/").replace("~0", "~");
        if !segment.is_empty() && segment.bytes().all(|b| b.is_ascii_digit()) {
            // Writing to a string cannot fail.
            let _ = write!(path, "[{segment}]");
        } else {
            if !path.is_empty() {
                path.push('.');
            }
            path.push_str(&segment);
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_json_body_is_held_against_its_schema() {
        let document = Document::new(&crate::router::document(), false, &BasePath::default());
        let mut names: Vec<&str> = document.checks.keys().map(String::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["ApproveRequest", "InvalidateRequest", "PlanRequest", "RejectRequest", "SubmitRequest"]);
        let mistakes = document.check("SubmitRequest", &json!({ "pipelin": "p", "input": {}, "cache_mode": "often" }));
        let told: Vec<(Code, &str)> = mistakes.iter().map(|m| (m.code, m.path.as_str())).collect();
        for expected in
            [(Code::MissingKey, "pipeline"), (Code::UnknownKey, "pipelin"), (Code::WrongValue, "cache_mode")]
        {
            assert!(told.contains(&expected), "{expected:?} in {mistakes:#?}");
        }
    }

    #[test]
    fn each_scope_of_an_invalidation_says_what_it_takes() {
        let document = Document::new(&crate::router::document(), false, &BasePath::default());
        let told = |value: Value| -> Vec<(Code, String)> {
            let mistakes = document.check("InvalidateRequest", &value);
            mistakes.into_iter().map(|m| (m.code, m.path)).collect()
        };
        let tell = |code, path: &str| (code, path.to_owned());
        for good in [
            json!({ "scope": "tenant" }),
            json!({ "scope": "pipeline", "pipeline": "p" }),
            json!({ "scope": "version", "pipeline": "p", "version": 1.0 }),
            json!({ "scope": "stage", "pipeline": "p", "stage": "s" }),
            json!({ "scope": "model", "model": "sim/quick" }),
        ] {
            assert_eq!(told(good), []);
        }
        let mut mistakes = told(json!({ "scope": "stage", "version": 1 }));
        mistakes.sort_by(|a, b| a.1.cmp(&b.1));
        let all = [(Code::MissingKey, "pipeline"), (Code::MissingKey, "stage"), (Code::UnknownKey, "version")];
        assert_eq!(mistakes, all.map(|(code, path)| tell(code, path)));
        assert_eq!(told(json!({ "scope": "tenant", "pipeline": "p" })), [tell(Code::UnknownKey, "pipeline")]);
        assert_eq!(told(json!({})), [tell(Code::MissingKey, "scope")]);
        assert_eq!(
            told(json!({ "scope": "version", "pipeline": "p", "version": 0 })),
            [tell(Code::WrongValue, "version")]
        );
        let wrong = document.check("InvalidateRequest", &json!({ "scope": "everything" }));
        assert_eq!((wrong.len(), wrong[0].path.as_str()), (1, "scope"), "{wrong:?}");
        assert!(wrong[0].message.contains("tenant") && wrong[0].message.contains("model"), "{wrong:?}");

        let mut value = json!({ "scope": "version", "pipeline": "p", "version": 3.0 });
        document.settle("InvalidateRequest", &mut value);
        assert!(value["version"].is_u64());
    }

    #[test]
    fn no_more_mistakes_are_told_than_anybody_reads() {
        let document = Document::new(&crate::router::document(), false, &BasePath::default());
        let mut body: Map<String, Value> = (0..10_000).map(|n| (format!("key-{n}"), json!(n))).collect();
        body.insert("k".repeat(100_000), Value::Null);
        let mistakes = document.check("SubmitRequest", &Value::Object(body));
        assert_eq!(mistakes.len(), VIOLATIONS_MAX);
        let bytes: usize = mistakes.iter().map(|m| m.path.len() + m.message.len()).sum();
        assert!(bytes < 100 * 300, "{bytes} bytes");
    }

    #[test]
    fn a_whole_number_is_one_however_it_is_written() {
        let document = Document::new(&crate::router::document(), false, &BasePath::default());
        let mut value = json!({ "pipeline": "p", "version": 3.0, "priority": -2.0, "input": { "x": 1.0 } });
        assert_eq!(document.check("SubmitRequest", &value), []);
        document.settle("SubmitRequest", &mut value);
        let settled = json!({ "pipeline": "p", "version": 3, "priority": -2, "input": { "x": 1.0 } });
        assert_eq!(value.to_string(), settled.to_string());
    }

    #[test]
    fn null_means_left_out_for_each_key_of_a_body_that_may_be() {
        let document = Document::new(&crate::router::document(), false, &BasePath::default());
        let public: Value = serde_json::from_slice(&document.json).expect("JSON");
        for (name, check) in &document.checks {
            for key in &check.optional {
                let mut body = json!({ key: null });
                document.leave_out_nulls(name, &mut body);
                assert_eq!(body, json!({}), "{name}.{key}");
                let component = &public["components"]["schemas"][name];
                let branches = component["oneOf"].as_array().into_iter().flatten().chain([component]);
                let taken = branches.filter_map(|part| part["properties"].get(key)).any(|schema| {
                    jsonschema::validator_for(&json!({ "components": public["components"], "allOf": [schema] }))
                        .is_ok_and(|validator| validator.is_valid(&Value::Null))
                });
                assert!(taken, "{name}.{key} is published as what may be null");
            }
        }
        let optional = &document.checks["SubmitRequest"].optional;
        for key in ["version", "cache_mode", "priority", "labels", "start_at"] {
            assert!(optional.iter().any(|name| name == key), "{key} in {optional:?}");
        }
        let mut required = json!({ "pipeline": null });
        document.leave_out_nulls("SubmitRequest", &mut required);
        assert_eq!(required, json!({ "pipeline": null }));
    }

    #[test]
    fn pointers_read_as_paths() {
        assert_eq!(path_of("/stages/2/gate~1x/y"), "stages[2].gate/x.y");
        assert_eq!(path_of(""), "");
    }

    #[test]
    fn references_move_with_the_definition() {
        let mut schema =
            json!({ "properties": { "a": { "$ref": "#/$defs/Span" } }, "allOf": [{ "$ref": "#/$defs/X" }] });
        rewrite_refs(&mut schema, "#/c/D.");
        assert_eq!(
            schema,
            json!({ "properties": { "a": { "$ref": "#/c/D.Span" } }, "allOf": [{ "$ref": "#/c/D.X" }] })
        );
    }
}
