//! JSON at rest: owns how inputs and outputs are kept in memory, namely as their text. A parsed value takes up to sixty
//! times its text (an object of one key is a map with its own allocations), so what waits, or travels to and from a
//! store, is text; whoever needs the values parses them, and drops them when done.

use std::{fmt, sync::Arc};

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Value, value::RawValue};

/// What a parsed value takes by itself, in bytes.
const VALUE_BYTES: u64 = 72;
/// What an entry of a map takes beside its value: the key's own struct, its hash, and its place in the table.
const ENTRY_BYTES: u64 = 24 + 8 + 9;
/// What an allocation takes beside what is asked of it.
const ALLOCATION_BYTES: u64 = 16;
/// The smallest room that a list or map makes once it holds anything.
const ROOM_MIN: u64 = 4;

/// A JSON document as its text. Valid; cheap to clone.
#[derive(Clone)]
pub struct Json {
    text: Arc<str>,
    size: Size,
}

/// How large a document is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Its values, those inside of others included.
    pub nodes: u64,
    /// About what it takes in memory once it is parsed, in bytes.
    pub parsed_bytes: u64,
}

impl Json {
    /// `null`.
    pub fn null() -> Self {
        Self { text: Arc::from("null"), size: Size::of(&Value::Null) }
    }

    /// From a text, which is held against the grammar but not parsed into values.
    pub fn from_text(text: &str) -> Result<Self, serde_json::Error> {
        let size = Size::of_text(text)?;
        Ok(Self { text: Arc::from(text), size })
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// How long the text is, in bytes.
    pub fn text_bytes(&self) -> u64 {
        self.text.len() as u64
    }

    /// How large it is.
    pub fn size(&self) -> Size {
        self.size
    }

    /// Whether it is a map.
    pub fn is_object(&self) -> bool {
        self.text.trim_ascii_start().starts_with('{')
    }

    /// The values. They can take much more memory than the text: see [`Size::parsed_bytes`].
    pub fn parse(&self) -> Value {
        // The text was held against the same grammar when this was made.
        serde_json::from_str(&self.text).unwrap_or_default()
    }

    /// What it says to a reader: a string's content, or the JSON.
    pub fn to_plain_text(&self) -> String {
        serde_json::from_str::<String>(&self.text).unwrap_or_else(|_| self.text.as_ref().to_owned())
    }
}

impl From<&Value> for Json {
    fn from(value: &Value) -> Self {
        Self { text: Arc::from(value.to_string()), size: Size::of(value) }
    }
}

impl From<Value> for Json {
    fn from(value: Value) -> Self {
        Self::from(&value)
    }
}

impl From<&str> for Json {
    fn from(text: &str) -> Self {
        Self::from(Value::from(text))
    }
}

impl fmt::Display for Json {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Never the text: it is a payload.
impl fmt::Debug for Json {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if cfg!(debug_assertions) {
            return f.write_str(&self.text);
        }
        write!(f, "Json({} bytes)", self.text.len())
    }
}

/// The same values, however they are written.
impl PartialEq for Json {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text || self.parse() == other.parse()
    }
}

/// JSON has no number that differs from itself.
impl Eq for Json {}

impl PartialEq<Value> for Json {
    fn eq(&self, other: &Value) -> bool {
        self.parse() == *other
    }
}

impl Serialize for Json {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let raw: &RawValue = serde_json::from_str(&self.text).map_err(serde::ser::Error::custom)?;
        raw.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Value::deserialize(deserializer).map(Self::from)
    }
}

impl Size {
    const SCALAR: Self = Self { nodes: 1, parsed_bytes: VALUE_BYTES };

    /// Of a text. Fails where it is not JSON.
    pub fn of_text(text: &str) -> Result<Self, serde_json::Error> {
        let mut reader = serde_json::Deserializer::from_str(text);
        let size = Measure.deserialize(&mut reader)?;
        reader.end()?;
        Ok(size)
    }

    /// The most that a text can take in memory once it is parsed, in bytes, whether it is JSON or not: for what is not yet
    /// known to be worth measuring.
    pub fn parsed_bytes_at_most(text: &str) -> u64 {
        // Each list or map makes room for four parts, and doubles it.
        let (mut parts, mut groups) = (1, 0);
        for byte in text.bytes() {
            match byte {
                b',' => parts += 1,
                b'[' | b'{' => groups += 1,
                _ => {}
            }
        }
        let part = VALUE_BYTES + ENTRY_BYTES;
        text.len() as u64 + 2 * (part + ALLOCATION_BYTES) * parts + (2 * part * ROOM_MIN + ALLOCATION_BYTES) * groups
    }

    /// Of a parsed value.
    pub fn of(value: &Value) -> Self {
        match value {
            Value::String(text) => Self::string(text),
            Value::Array(items) => {
                let mut list = Grow::default();
                for item in items {
                    list.item(Self::of(item));
                }
                list.list()
            }
            Value::Object(map) => {
                let mut grown = Grow::default();
                for (key, value) in map {
                    grown.entry(key.len(), Self::of(value));
                }
                grown.map()
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => Self::SCALAR,
        }
    }

    fn string(text: &str) -> Self {
        Self { nodes: 1, parsed_bytes: VALUE_BYTES + allocated(text.len()) }
    }
}

/// What so many bytes take on the heap.
fn allocated(bytes: usize) -> u64 {
    if bytes == 0 { 0 } else { bytes as u64 + ALLOCATION_BYTES }
}

/// The size of a list or map while its parts come.
#[derive(Default)]
struct Grow {
    parts: u64,
    nodes: u64,
    /// What the parts take beyond their places in the list or map.
    beyond: u64,
}

impl Grow {
    fn item(&mut self, size: Size) {
        self.parts += 1;
        self.nodes += size.nodes;
        self.beyond += size.parsed_bytes - VALUE_BYTES;
    }

    fn entry(&mut self, key_bytes: usize, size: Size) {
        self.item(size);
        self.beyond += allocated(key_bytes);
    }

    /// A list or map doubles its room when it is full.
    fn sized(&self, of_each: u64) -> Size {
        let room = if self.parts == 0 { 0 } else { self.parts.next_power_of_two().max(ROOM_MIN) };
        let parsed_bytes = VALUE_BYTES + self.beyond + room * of_each + if room > 0 { 2 * ALLOCATION_BYTES } else { 0 };
        Size { nodes: self.nodes + 1, parsed_bytes }
    }

    fn list(&self) -> Size {
        self.sized(VALUE_BYTES)
    }

    fn map(&self) -> Size {
        self.sized(VALUE_BYTES + ENTRY_BYTES)
    }
}

/// Reads a document for its size alone.
struct Measure;

impl<'de> DeserializeSeed<'de> for Measure {
    type Value = Size;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Size, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Measure {
    type Value = Size;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E: de::Error>(self, _: bool) -> Result<Size, E> {
        Ok(Size::SCALAR)
    }

    fn visit_i64<E: de::Error>(self, _: i64) -> Result<Size, E> {
        Ok(Size::SCALAR)
    }

    fn visit_u64<E: de::Error>(self, _: u64) -> Result<Size, E> {
        Ok(Size::SCALAR)
    }

    fn visit_f64<E: de::Error>(self, _: f64) -> Result<Size, E> {
        Ok(Size::SCALAR)
    }

    fn visit_unit<E: de::Error>(self) -> Result<Size, E> {
        Ok(Size::SCALAR)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
        Ok(Size::string(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Size, A::Error> {
        let mut list = Grow::default();
        while let Some(size) = items.next_element_seed(Self)? {
            list.item(size);
        }
        Ok(list.list())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Size, A::Error> {
        let mut map = Grow::default();
        while let Some(key_bytes) = entries.next_key_seed(KeyBytes)? {
            map.entry(key_bytes, entries.next_value_seed(Self)?);
        }
        Ok(map.map())
    }
}

/// Reads a key for its length alone.
struct KeyBytes;

impl<'de> DeserializeSeed<'de> for KeyBytes {
    type Value = usize;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<usize, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for KeyBytes {
    type Value = usize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<usize, E> {
        Ok(text.len())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_document_is_measured_alike_as_text_and_as_values() {
        for value in [
            json!(null),
            json!("text"),
            json!([]),
            json!([{"": 0}, {"": 0}]),
            json!({"a": [1, 2.5, true, null, "x"], "b": {"c": {}}}),
        ] {
            assert_eq!(Size::of_text(&value.to_string()).expect("valid"), Size::of(&value), "{value}");
            assert_eq!(Json::from(&value).parse(), value);
        }
        assert_eq!(Size::of(&json!([{"": 0}, {"": 0}])).nodes, 5);
    }

    #[test]
    fn many_small_objects_are_known_to_take_much_more_than_their_text() {
        let text = format!("[{}0]", r#"{"":0},"#.repeat(1_000));
        let size = Size::of_text(&text).expect("valid");
        assert!(size.parsed_bytes > 50 * text.len() as u64, "{size:?}");
        assert!(Json::from_text(&text).expect("valid").text_bytes() == text.len() as u64);
    }

    #[test]
    fn no_text_takes_more_than_its_upper_bound_says() {
        for part in [r#"{"":0}"#, "[0]", "[]", "0", r#""""#, r#"{"k":[{"":""}]}"#, r#"{"a":1,"b":2,"c":3,"d":4,"e":5}"#]
        {
            for times in [1, 3, 4, 5, 1_025] {
                let text = format!("[{}]", vec![part; times].join(","));
                let size = Size::of_text(&text).expect("valid");
                let most = Size::parsed_bytes_at_most(&text);
                assert!(size.parsed_bytes <= most, "{times} times {part}: {size:?}, {most}");
            }
        }
    }

    #[test]
    fn a_text_that_no_parser_would_take_is_refused() {
        for text in ["", "{", "1 2", r#""\ud800""#, "1e999", "nul", "{'a':1}"] {
            assert!(Json::from_text(text).is_err(), "{text}");
            assert!(serde_json::from_str::<Value>(text).is_err(), "{text}");
        }
        let deep = "[".repeat(200) + &"]".repeat(200);
        assert!(Json::from_text(&deep).is_err(), "nested deeper than a parser goes");
    }

    #[test]
    fn the_same_values_are_equal_however_they_are_written() {
        let spaced = Json::from_text(r#"{ "a" : [1, "x"] }"#).expect("valid");
        assert_eq!(spaced, Json::from(json!({"a": [1, "x"]})));
        assert_eq!(spaced, json!({"a": [1, "x"]}));
        assert_ne!(spaced, json!({"a": [1, "y"]}));
        assert_eq!(serde_json::to_value(&spaced).expect("valid"), json!({"a": [1, "x"]}));
    }

    #[test]
    fn a_text_is_read_without_its_quotes() {
        assert_eq!(Json::from("two\nlines").to_plain_text(), "two\nlines");
        assert_eq!(Json::from(json!({"a": 1})).to_plain_text(), r#"{"a":1}"#);
    }
}
