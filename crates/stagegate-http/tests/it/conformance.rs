//! Holds answers against the published document: the status is documented, and the body fits its schema.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use http::{HeaderMap, Method, StatusCode};
use jsonschema::Validator;
use serde_json::{Value, json};

/// The document, ready to be asked.
pub(crate) struct Conformance {
    document: Value,
    validators: Mutex<HashMap<String, Validator>>,
}

impl Conformance {
    pub(crate) fn new() -> Self {
        Self { document: stagegate_http::openapi_document(), validators: Mutex::default() }
    }

    /// Checks one answer. What no route answers (404, 405 of unknown paths, the pages of `/docs`) is not documented.
    pub(crate) fn check(&self, method: &Method, path: &str, status: StatusCode, headers: &HeaderMap, body: &Value) {
        let Some((template, item)) = self.item(path) else { return };
        let Some(operation) = item.get(method.as_str().to_ascii_lowercase()) else { return };
        let name = format!("{method} {template} → {status}");
        let response = &operation["responses"][status.as_str()];
        assert!(response.is_object(), "{name} is not documented; the body was {body}");
        let kind = headers.get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default();
        match response.get("content") {
            None => assert!(body.is_null(), "{name} has no documented content, but was {kind}"),
            Some(content) => {
                let content = content.get(kind);
                let content = content.unwrap_or_else(|| panic!("{name}: the type `{kind}` is not documented"));
                if kind.ends_with("json") {
                    self.fits(&format!("{name} {kind}"), &content["schema"], body);
                }
            }
        }
    }

    fn fits(&self, name: &str, schema: &Value, body: &Value) {
        let mut validators = self.validators.lock().unwrap_or_else(PoisonError::into_inner);
        let validator = validators.entry(name.to_owned()).or_insert_with(|| {
            let mut root = json!({ "allOf": [schema] });
            root["components"] = self.document["components"].clone();
            jsonschema::validator_for(&root).unwrap_or_else(|error| panic!("{name}: {error}"))
        });
        let errors: Vec<String> =
            validator.iter_errors(body).map(|e| format!("{} at `{}`", e, e.instance_path())).collect();
        assert!(errors.is_empty(), "{name} does not fit its schema: {errors:#?}\nthe body was {body:#}");
    }

    /// The path item whose template a path fits; literal segments stand above parameters.
    fn item(&self, path: &str) -> Option<(&String, &Value)> {
        let paths = self.document["paths"].as_object()?;
        paths.get_key_value(path).or_else(|| {
            paths.iter().find(|(template, _)| {
                let (a, b): (Vec<&str>, Vec<&str>) = (template.split('/').collect(), path.split('/').collect());
                a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| a == b || a.starts_with('{'))
            })
        })
    }
}
