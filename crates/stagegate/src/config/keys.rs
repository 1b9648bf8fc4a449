//! The tree of keys, read off the sections' JSON Schema: owns which keys there are, of which type, with which text and
//! default. Never holds a value that somebody set.

use schemars::{SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value};

use super::Config;

/// A place in the configuration.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Node {
    /// Named keys.
    Table { doc: String, keys: Vec<(String, Node)> },
    /// Names that the user makes up, each with a value of one form.
    Map { doc: String, value: Box<Node> },
    /// A value.
    Leaf(Leaf),
}

/// A key that holds a value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Leaf {
    /// Its doc comment.
    pub doc: String,
    /// What it takes.
    pub kind: Kind,
    /// Never shown; can be given by file.
    pub secret: bool,
    /// Its default; null where it is unset.
    pub default: Value,
    /// True inside a map where it has no default.
    pub required: bool,
}

/// What a key takes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Kind {
    /// Text, or one of these words.
    Text(Vec<String>),
    /// A whole number.
    Integer,
    /// A number.
    Number,
    /// `true` or `false`.
    Boolean,
    /// Several values of one form.
    List(Box<Kind>),
    /// Whatever serde makes of it.
    Any,
}

/// The whole tree.
pub(crate) fn tree() -> Node {
    let generator = SchemaGenerator::from(SchemaSettings::draft2020_12());
    let schema = generator.into_root_schema_for::<Config>();
    let root = schema.as_value().clone();
    // Plain data: it always serialises.
    let defaults = serde_json::to_value(Config::default()).unwrap_or_default();
    node(&root, &root, &defaults, false)
}

/// Follows references and looks through `Option`.
fn resolve<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
    if let Some(name) = schema["$ref"].as_str().and_then(|pointer| pointer.strip_prefix('#')) {
        return root.pointer(name).map_or(schema, |target| resolve(root, target));
    }
    let options = schema["anyOf"].as_array();
    let other = options.and_then(|all| all.iter().find(|one| one["type"] != "null"));
    other.map_or(schema, |one| resolve(root, one))
}

fn text(schema: &Value) -> String {
    schema["description"].as_str().unwrap_or_default().to_owned()
}

/// A schema as a node. The text beside a reference goes before the text of what it refers to.
fn node(root: &Value, schema: &Value, default: &Value, required: bool) -> Node {
    let target = resolve(root, schema);
    let doc = if schema.get("description").is_some() { text(schema) } else { text(target) };
    if let Some(properties) = target["properties"].as_object() {
        return Node::Table { doc, keys: table(root, target, properties, default) };
    }
    if target["additionalProperties"].is_object() {
        let mut value = Box::new(node(root, &target["additionalProperties"], &Value::Null, true));
        // What is said of the map holds for its values, where these are plain.
        if let Node::Leaf(leaf) = value.as_mut() {
            leaf.doc.clone_from(&doc);
            leaf.required = false;
        }
        return Node::Map { doc, value };
    }
    let secret = target["writeOnly"] == true || schema["writeOnly"] == true;
    Node::Leaf(Leaf { doc, kind: kind(root, target), secret, default: default.clone(), required })
}

fn table(root: &Value, target: &Value, properties: &Map<String, Value>, default: &Value) -> Vec<(String, Node)> {
    let required = |key: &str| target["required"].as_array().is_some_and(|all| all.iter().any(|name| name == key));
    properties
        .iter()
        .map(|(key, schema)| {
            // Inside a map there is no default value to read from: the schema's own one stands.
            let default = match default.get(key) {
                Some(value) => value.clone(),
                None => schema.get("default").cloned().unwrap_or(Value::Null),
            };
            (key.clone(), node(root, schema, &default, required(key)))
        })
        .collect()
}

fn kind(root: &Value, schema: &Value) -> Kind {
    let words = |all: &Vec<Value>, key: Option<&str>| -> Vec<String> {
        let word = |one: &Value| key.map_or(one.as_str(), |key| one[key].as_str()).map(str::to_owned);
        all.iter().filter_map(word).collect()
    };
    if let Some(all) = schema["oneOf"].as_array() {
        return Kind::Text(words(all, Some("const")));
    }
    if let Some(all) = schema["enum"].as_array() {
        return Kind::Text(words(all, None));
    }
    let name = match &schema["type"] {
        Value::String(name) => name.as_str(),
        Value::Array(names) => names.iter().filter_map(Value::as_str).find(|name| *name != "null").unwrap_or(""),
        _ => "",
    };
    match name {
        "string" => Kind::Text(Vec::new()),
        "integer" => Kind::Integer,
        "number" => Kind::Number,
        "boolean" => Kind::Boolean,
        "array" => Kind::List(Box::new(kind(root, resolve(root, &schema["items"])))),
        _ => Kind::Any,
    }
}

impl Node {
    /// The node below, by the name that the user gave.
    pub(crate) fn child(&self, name: &str) -> Option<&Node> {
        match self {
            Self::Table { keys, .. } => keys.iter().find(|(key, _)| key == name).map(|(_, node)| node),
            Self::Map { value, .. } => Some(value),
            Self::Leaf(_) => None,
        }
    }

    /// Whether its names are the user's, each with a plain value: headers.
    pub(crate) fn is_map_of_values(&self) -> bool {
        matches!(self, Self::Map { value, .. } if matches!(**value, Self::Leaf(_)))
    }

    /// Every key with a value below, with its path; `<name>` stands for what the user makes up.
    pub(crate) fn leaves(&self) -> Vec<(Vec<String>, &Leaf)> {
        fn walk<'a>(node: &'a Node, path: &mut Vec<String>, into: &mut Vec<(Vec<String>, &'a Leaf)>) {
            let mut below = |name: &str, node: &'a Node| {
                path.push(name.to_owned());
                walk(node, path, into);
                path.pop();
            };
            match node {
                Node::Table { keys, .. } => keys.iter().for_each(|(key, node)| below(key, node)),
                Node::Map { value, .. } => below("<name>", value),
                Node::Leaf(leaf) => into.push((path.clone(), leaf)),
            }
        }
        let mut into = Vec::new();
        walk(self, &mut Vec::new(), &mut into);
        into
    }
}

/// A path as it is written in TOML.
pub(crate) fn dotted(path: &[String]) -> String {
    let bare = |part: &String| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'<' | b'>'))
    };
    let quoted = |part: &String| if bare(part) { part.clone() } else { format!("\"{part}\"") };
    path.iter().map(quoted).collect::<Vec<_>>().join(".")
}

/// The parts of a path that [`dotted`] wrote.
pub(crate) fn undotted(text: &str) -> Vec<String> {
    let (mut parts, mut last, mut is_quoted) = (Vec::new(), String::new(), false);
    for c in text.chars() {
        match c {
            '"' => is_quoted = !is_quoted,
            '.' if !is_quoted => parts.push(std::mem::take(&mut last)),
            c => last.push(c),
        }
    }
    parts.push(last);
    parts
}

/// The variable that sets a key.
pub(crate) fn variable(path: &[String]) -> String {
    let parts: Vec<String> =
        path.iter().map(|part| if part == "<name>" { "<NAME>".to_owned() } else { part.to_uppercase() }).collect();
    format!("{}{}", super::layers::PREFIX, parts.join("__"))
}
