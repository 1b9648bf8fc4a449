//! Prompts and schemas that stand in files of their own: owns which keys name a file, and puts what the files hold in
//! their place. Reads no file itself: its caller passes their contents.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::{
    check::STAGES_MAX,
    path::{Path, cut},
    source::{EXPANDED_MAX_BYTES, NODES_MAX, Source},
};
use crate::{Code, Violation, evaluation};

/// The longest name of a file, in bytes.
const NAME_MAX_BYTES: usize = 255;
/// The most files of one definition.
pub const FILES_MAX: usize = 200;
/// The most bytes in all files of one definition together.
pub const FILES_MAX_BYTES: usize = EXPANDED_MAX_BYTES;

/// A definition, and the files that it names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bundle {
    /// YAML or JSON text.
    pub definition: String,
    /// What the files hold, by their names in the definition.
    pub files: BTreeMap<String, String>,
}

impl From<&str> for Bundle {
    fn from(definition: &str) -> Self {
        Self { definition: definition.to_owned(), files: BTreeMap::new() }
    }
}

impl From<&String> for Bundle {
    fn from(definition: &String) -> Self {
        definition.as_str().into()
    }
}

impl From<&Bundle> for Bundle {
    fn from(bundle: &Bundle) -> Self {
        bundle.clone()
    }
}

impl Bundle {
    /// The files that the definition names, each once. None for a text that is no definition at all, and for names that
    /// are refused anyway.
    pub fn file_names(&self) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        if let Ok((source, _)) = Source::read(&self.definition) {
            for reference in references(&source.value) {
                if let Ok(name) = checked(&reference.name)
                    && !names.iter().any(|known| known == name)
                    && names.len() <= FILES_MAX
                {
                    names.push(name.to_owned());
                }
            }
        }
        names
    }
}

/// A key that names a file.
struct Reference {
    /// The map that it stands in.
    map: Path,
    key: &'static str,
    /// The key that it stands for.
    target: &'static str,
    name: String,
}

const STAGE_KEYS: [(&str, &str); 2] = [("prompt_file", "prompt"), ("system_file", "system")];
const OUTPUT_KEYS: [(&str, &str); 1] = [("schema_file", "schema")];
const JUDGE_KEYS: [(&str, &str); 3] = [("prompt_file", "prompt"), ("system_file", "system"), ("rubric_file", "rubric")];

fn references(root: &Value) -> Vec<Reference> {
    let mut found = Vec::new();
    let stages = root.get("stages").and_then(Value::as_array).into_iter().flatten();
    // A definition of more stages is refused, whatever they name.
    for (index, stage) in stages.take(STAGES_MAX).enumerate() {
        let path = Path::root().key("stages").index(index);
        let mut each = |map: Option<&Value>, path: &Path, keys: &[(&'static str, &'static str)]| {
            let Some(map) = map.and_then(Value::as_object) else { return };
            for (key, target) in keys {
                if let Some(Value::String(name)) = map.get(*key) {
                    found.push(Reference { map: path.clone(), key, target, name: name.clone() });
                }
            }
        };
        each(Some(stage), &path, &STAGE_KEYS);
        each(stage.get("output"), &path.key("output"), &OUTPUT_KEYS);
        each(stage.pointer("/gate/judge"), &path.key("gate").key("judge"), &JUDGE_KEYS);
    }
    found
}

/// The name as files go by it, or what is wrong with it.
fn checked(name: &str) -> Result<&str, &'static str> {
    let plain = name.strip_prefix("./").unwrap_or(name);
    if plain.is_empty() || plain.len() > NAME_MAX_BYTES {
        return Err("is empty or too long");
    }
    if plain.starts_with(['/', '~']) || plain.contains(['\\', ':', '\0']) {
        return Err("is no path below the definition's own directory");
    }
    if plain.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err("leaves the definition's directory, or has an empty part");
    }
    Ok(plain)
}

/// Puts what the files hold in the place of the keys that name them. What cannot be is told; something stands there all the
/// same, so that the rest of the definition can be looked at. A file that is named often is put in its place as often: the
/// definition that this makes has the bounds of one that is written out.
pub(super) fn resolve(source: &mut Source, files: &BTreeMap<String, String>) -> Vec<Violation> {
    let mut mistakes = Vec::new();
    let mut left = Left::beside(&source.value);
    let mut schemas: BTreeMap<&str, Result<Value, String>> = BTreeMap::new();
    for Reference { map, key, target, name } in references(&source.value) {
        if !evaluation::is_wanted() {
            break; // The caller drops the partial result.
        }
        let at = map.key(key);
        let mut tell = |source: &Source, code, message: String, mend: &str| {
            let mark = source.value_mark(&at);
            let violation = Violation::new(code, at.to_string(), message).mend(mend);
            mistakes.push(Violation { line: mark.map(|m| m.line), column: mark.map(|m| m.column), ..violation });
        };
        let shown = cut(&name, 80);
        let content = match checked(&name) {
            Err(why) => {
                let mend = "write a path below the directory of the definition, such as `prompts/draft.md`";
                tell(source, Code::WrongValue, format!("`{shown}` {why}"), mend);
                None
            }
            Ok(name) => {
                let content = files.get_key_value(name);
                if content.is_none() {
                    let mend =
                        "check the path; over HTTP send `{ \"definition\": …, \"files\": { \"name\": \"text\" } }`";
                    let message = format!("the file `{shown}` did not come with the definition");
                    tell(source, Code::WrongValue, message, mend);
                }
                content
            }
        };
        let value = match (target, content) {
            (_, None) => None,
            ("schema", Some((name, text))) => match schemas.entry(name).or_insert_with(|| schema(text)) {
                Ok(schema) => Some(left.take(schema).map(|()| schema.clone())),
                Err(why) => {
                    let message = format!("the file `{shown}` is no schema: {why}");
                    tell(source, Code::InvalidSchema, message, "mend the file");
                    None
                }
            },
            // A literal block of YAML has these line ends too, whatever the document's were.
            (_, Some((_, text))) => {
                Some(left.take_text(text.len()).map(|()| Value::String(text.replace("\r\n", "\n"))))
            }
        };
        if value == Some(None) && !std::mem::replace(&mut left.is_told, true) {
            let message = format!(
                "with what its files hold, each as often as it is named, the definition has more than {NODES_MAX} values \
                 or {EXPANDED_MAX_BYTES} bytes"
            );
            tell(source, Code::DefinitionTooLarge, message, "name large files in fewer places");
        }
        let value = value.flatten().unwrap_or_else(|| match target {
            "schema" => Value::Bool(true),
            _ => Value::String(name.clone()),
        });
        if let Some(entries) = map_at(&mut source.value, &map) {
            entries.remove(key);
            let is_taken = entries.get(target).is_some_and(|there| !there.is_null());
            entries.insert(target.to_owned(), value);
            if is_taken {
                let message = format!("`{target}` and `{key}` exclude each other");
                tell(source, Code::WrongValue, message, "keep one of them");
            }
        }
        source.rename(&map, key, target);
    }
    mistakes
}

/// A schema's file as a value, or what is wrong with it.
fn schema(text: &str) -> Result<Value, String> {
    match Source::read(text) {
        Ok((schema, wrong)) if wrong.is_empty() => Ok(schema.value),
        Ok((_, wrong)) | Err(wrong) => Err(wrong.first().map(|first| cut(&first.to_string(), 200)).unwrap_or_default()),
    }
}

/// What may still be put into a definition.
struct Left {
    nodes: usize,
    bytes: usize,
    /// Whether it was told that there is not enough.
    is_told: bool,
}

impl Left {
    fn beside(value: &Value) -> Self {
        let (nodes, bytes) = weight(value);
        let (nodes, bytes) = (NODES_MAX.saturating_sub(nodes), EXPANDED_MAX_BYTES.saturating_sub(bytes));
        Self { nodes, bytes, is_told: false }
    }

    fn take(&mut self, value: &Value) -> Option<()> {
        let (nodes, bytes) = weight(value);
        (self.nodes, self.bytes) = (self.nodes.checked_sub(nodes)?, self.bytes.checked_sub(bytes)?);
        Some(())
    }

    fn take_text(&mut self, bytes: usize) -> Option<()> {
        self.bytes = self.bytes.checked_sub(bytes)?;
        Some(())
    }
}

/// The values in a value, itself included, and the bytes of their texts.
fn weight(value: &Value) -> (usize, usize) {
    let sum = |(nodes, bytes), (more_nodes, more_bytes)| (nodes + more_nodes, bytes + more_bytes);
    match value {
        Value::String(text) => (1, text.len()),
        Value::Array(items) => items.iter().map(weight).fold((1, 0), sum),
        Value::Object(map) => map.iter().map(|(key, inner)| sum(weight(inner), (1, key.len()))).fold((1, 0), sum),
        _ => (1, 0),
    }
}

fn map_at<'v>(value: &'v mut Value, path: &Path) -> Option<&'v mut Map<String, Value>> {
    let mut value = value;
    for segment in path.segments() {
        value = match segment {
            super::path::Segment::Key(key) => value.get_mut(key)?,
            super::path::Segment::Index(index) => value.get_mut(index)?,
        };
    }
    value.as_object_mut()
}
