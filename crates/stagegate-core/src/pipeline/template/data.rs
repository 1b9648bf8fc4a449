//! Data as templates see it: owns the view of a JSON value that copies nothing before it is used. A rendering that names
//! one key of a large input costs that key.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use minijinja::{
    Value,
    value::{Enumerator, Object, ObjectRepr},
};
use serde_json::Value as Json;
use yoke::Yoke;

/// Texts above this many bytes are copied once in a rendering, not at each use.
const KEPT_MIN_BYTES: usize = 256;

/// What a view looks at.
struct Root {
    json: Arc<Json>,
    /// Long texts in the engine's own form, by where they stand in `json`.
    texts: Mutex<HashMap<usize, Value>>,
}

/// A list or a map inside a value.
#[derive(Clone)]
struct View(Yoke<&'static Json, Arc<Root>>);

/// A view of a value.
pub(super) fn view(json: &Arc<Json>) -> Value {
    let root = Arc::new(Root { json: Arc::clone(json), texts: Mutex::default() });
    seen(&View(Yoke::attach_to_cart(root, |root| root.json.as_ref())))
}

/// What a view looks at, as a value of the engine.
fn seen(view: &View) -> Value {
    match view.json() {
        Json::Null => Value::from(()),
        Json::Bool(holds) => Value::from(*holds),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => Value::from(number),
            (None, Some(number)) => Value::from(number),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) if text.len() < KEPT_MIN_BYTES => Value::from(text.as_str()),
        Json::String(text) => {
            let mut texts = view.0.backing_cart().texts.lock().unwrap_or_else(PoisonError::into_inner);
            texts.entry(text.as_ptr().addr()).or_insert_with(|| Value::from(text.as_str())).clone()
        }
        Json::Array(_) | Json::Object(_) => Value::from_object(view.clone()),
    }
}

impl View {
    fn json(&self) -> &Json {
        self.0.get()
    }

    fn item(&self, index: usize) -> Option<Value> {
        let inner = self.0.try_map_project_cloned(|json, _| json.get(index).ok_or(())).ok()?;
        Some(seen(&Self(inner)))
    }

    fn entry(&self, key: &str) -> Option<Value> {
        let inner = self.0.try_map_project_cloned(|json, _| json.get(key).ok_or(())).ok()?;
        Some(seen(&Self(inner)))
    }
}

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("View")
    }
}

impl Object for View {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        if self.json().is_array() { ObjectRepr::Seq } else { ObjectRepr::Map }
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        match key.as_str() {
            Some(key) => self.entry(key),
            None => self.item(key.as_usize()?),
        }
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        self.entry(key)
    }

    /// A map's keys are sorted, whatever their order was.
    fn enumerate(self: &Arc<Self>) -> Enumerator {
        match self.json() {
            Json::Array(items) => Enumerator::Seq(items.len()),
            Json::Object(map) => {
                let mut keys: Vec<&String> = map.keys().collect();
                keys.sort_unstable();
                Enumerator::Values(keys.into_iter().map(|key| Value::from(key.as_str())).collect())
            }
            _ => Enumerator::Empty,
        }
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        match self.json() {
            Json::Array(items) => Some(items.len()),
            Json::Object(map) => Some(map.len()),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use minijinja::value::{Serde, ValueKind};
    use serde_json::json;

    use super::*;

    fn both(json: Json) -> (Value, Value) {
        let whole = Value::from(Serde(&json));
        (view(&Arc::new(json)), whole)
    }

    #[test]
    fn a_view_is_what_a_copy_would_be() {
        let (seen, copied) = both(json!({
            "z": 1, "a": [1, -2.5, null, true, u64::MAX, { "k": [] }], "text": "x".repeat(1_000), "m": { "b": 1, "a": "ü" },
        }));
        assert_eq!(seen, copied);
        assert_eq!(seen.to_string(), copied.to_string());
        assert_eq!(serde_json::to_string(&seen).ok(), serde_json::to_string(&copied).ok());
        assert_eq!((seen.kind(), seen.len()), (ValueKind::Map, copied.len()));
        let item = |value: &Value, index: i64| value.get_attr("a").and_then(|a| a.get_item(&Value::from(index))).ok();
        for index in -7..8 {
            assert_eq!(item(&seen, index), item(&copied, index), "{index}");
        }
        assert!(seen.get_attr("none").is_ok_and(|value| value.is_undefined()));
    }

    #[test]
    fn a_long_text_is_copied_once() {
        let (seen, _) = both(json!({ "text": "x".repeat(1_000) }));
        let place = || seen.get_attr("text").ok().and_then(|text| text.as_str().map(|text| text.as_ptr().addr()));
        assert_eq!(place(), place());
    }
}
