//! The author's text: owns the way from YAML or JSON to a value with the position of everything in it, and the
//! limits on that way. Never knows what the keys mean.

use std::{borrow::Cow, collections::HashMap};

use granit_parser::{ErrorKind, Event, Parser, ScalarStyle, Span};
use serde_json::{Map, Value};

use super::{
    json,
    path::{Path, Segment, cut},
};
use crate::{Code, Violation};

/// The longest text, in bytes.
pub(super) const TEXT_MAX_BYTES: usize = 1024 * 1024;
/// The deepest nesting, in levels.
pub(super) const DEPTH_MAX: usize = 64;
/// The most values, aliases expanded.
pub(super) const NODES_MAX: usize = 100_000;
/// The most bytes of text in all values, aliases expanded.
pub(super) const EXPANDED_MAX_BYTES: usize = 8 * 1024 * 1024;

/// The most mistakes that are told at once.
pub(super) const MISTAKES_MAX: usize = 100;

/// A place in the text: line and column, counted from 1, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Mark {
    pub(super) line: u32,
    pub(super) column: u32,
}

/// Where a value stands, and everything in it.
#[derive(Debug, Clone)]
pub(super) struct Spot {
    /// Where its key stands, if it is in a map.
    key: Option<Mark>,
    /// Where it starts itself.
    at: Mark,
    /// For a literal block (`|`), whose lines are the text's own lines: how many empty ones come before the first.
    literal: Option<u32>,
    inner: Inner,
}

#[derive(Debug, Clone)]
enum Inner {
    Leaf,
    Map(HashMap<String, Spot>),
    List(Vec<Spot>),
}

impl Spot {
    pub(super) fn leaf(at: Mark) -> Self {
        Self { key: None, at, literal: None, inner: Inner::Leaf }
    }

    pub(super) fn map(at: Mark, inner: HashMap<String, Self>) -> Self {
        Self { key: None, at, literal: None, inner: Inner::Map(inner) }
    }

    pub(super) fn list(at: Mark, inner: Vec<Self>) -> Self {
        Self { key: None, at, literal: None, inner: Inner::List(inner) }
    }

    pub(super) fn keyed(self, key: Mark) -> Self {
        Self { key: Some(key), ..self }
    }

    fn step(&self, segment: &Segment) -> Option<&Self> {
        match (&self.inner, segment) {
            (Inner::Map(map), Segment::Key(key)) => map.get(key),
            (Inner::List(list), Segment::Index(index)) => list.get(*index),
            _ => None,
        }
    }
}

/// A value, and where everything in it stands.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) value: Value,
    root: Option<Spot>,
}

impl Source {
    /// Reads YAML or JSON. Some mistakes leave a value that can be looked at further; they come along with it.
    pub(super) fn read(text: &str) -> Result<(Self, Vec<Violation>), Vec<Violation>> {
        if text.len() > TEXT_MAX_BYTES {
            let message = format!("the document has {} bytes, at most {TEXT_MAX_BYTES} are allowed", text.len());
            return Err(vec![Violation::new(Code::DefinitionTooLarge, "", message)]);
        }
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        if text.trim_start().starts_with(['{', '[']) {
            // Text that is not JSON after all may still be YAML's flow style.
            match json::read(text) {
                Ok(read) => {
                    return Ok((Self { value: read.value, root: Some(read.spot) }, read.mistakes));
                }
                Err(json::Stop::TooLarge(violation)) => return Err(vec![violation]),
                Err(json::Stop::NotJson) => {}
            }
        }
        let (node, mistakes) = Reader::default().read(text).map_err(|mistakes| quoted_templates(text, mistakes))?;
        Ok((Self { value: node.value, root: Some(node.spot) }, mistakes))
    }

    /// A value that comes from nowhere that a person could look at.
    pub(super) fn without_text(value: Value) -> Self {
        Self { value, root: None }
    }

    /// A key goes by another name from here on; what stands at it is of one piece.
    pub(super) fn rename(&mut self, map: &Path, from: &str, to: &str) {
        let mut spot = self.root.as_mut();
        for segment in map.segments() {
            spot = spot.and_then(|spot| match (&mut spot.inner, segment) {
                (Inner::Map(map), Segment::Key(key)) => map.get_mut(key),
                (Inner::List(list), Segment::Index(index)) => list.get_mut(*index),
                _ => None,
            });
        }
        if let Some(Spot { inner: Inner::Map(map), .. }) = spot
            && let Some(spot) = map.remove(from)
        {
            map.insert(to.to_owned(), Spot { inner: Inner::Leaf, literal: None, ..spot });
        }
    }

    /// Whether a person wrote it now, or it was stored before.
    pub(super) fn has_text(&self) -> bool {
        self.root.is_some()
    }

    fn spot(&self, path: &Path) -> Option<(&Spot, bool)> {
        let mut spot = self.root.as_ref()?;
        for segment in path.segments() {
            match spot.step(segment) {
                Some(inner) => spot = inner,
                None => return Some((spot, false)),
            }
        }
        Some((spot, true))
    }

    /// Where the value at `path` starts; of what is not there, where its nearest ancestor starts.
    pub(super) fn value_mark(&self, path: &Path) -> Option<Mark> {
        self.spot(path).map(|(spot, _)| spot.at)
    }

    /// Where the key that `path` ends in stands.
    pub(super) fn key_mark(&self, path: &Path) -> Option<Mark> {
        self.spot(path).map(|(spot, found)| if found { spot.key.unwrap_or(spot.at) } else { spot.at })
    }

    /// The text's own line and column for a place inside a multi-line string; None where the string is not written
    /// in a form that keeps its lines.
    pub(super) fn inner_mark(&self, path: &Path, line: usize, column: usize) -> Option<Mark> {
        let (spot, found) = self.spot(path)?;
        let blank = spot.literal.filter(|_| found)?;
        let line = (spot.at.line + u32::try_from(line).ok()?).checked_sub(blank + 1)?;
        Some(Mark { line, column: spot.at.column + u32::try_from(column).ok()? })
    }
}

/// A value that has been read, with what it weighs.
#[derive(Debug, Clone)]
struct Node {
    value: Value,
    spot: Spot,
    nodes: usize,
    bytes: usize,
    /// Whether it is a text without quotes.
    plain: bool,
}

/// A collection that is being read.
struct Frame {
    at: Mark,
    anchor: usize,
    nodes: usize,
    bytes: usize,
    build: Build,
}

enum Build {
    List(Vec<Value>, Vec<Spot>),
    Map {
        values: Map<String, Value>,
        spots: HashMap<String, Spot>,
        key: Option<(String, Mark)>,
        /// Whether the next value is merged in.
        merging: bool,
        /// The mapping that a merge key names, and its place.
        merged: Vec<(Value, Mark)>,
    },
}

/// The key that merges maps into another one: an extension of YAML that nearly every reader has.
const MERGE: &str = "<<";

#[derive(Default)]
struct Reader {
    stack: Vec<Frame>,
    anchors: HashMap<usize, Node>,
    root: Option<Node>,
    documents: usize,
    nodes: usize,
    bytes: usize,
    /// The same of the copies that anchors keep: one inside the other, they would keep the innermost as often.
    kept_nodes: usize,
    kept_bytes: usize,
    mistakes: Vec<Violation>,
}

fn mark(span: &Span) -> Mark {
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Mark { line: number(span.start.line()).max(1), column: number(span.start.col() + 1) }
}

fn violation(code: Code, at: Mark, message: impl Into<String>) -> Violation {
    Violation { line: Some(at.line), column: Some(at.column), ..Violation::new(code, "", message) }
}

pub(super) fn too_many_nodes(at: Mark) -> Violation {
    let message =
        format!("the document holds more than {NODES_MAX} values or {EXPANDED_MAX_BYTES} bytes, aliases expanded");
    violation(Code::DefinitionTooLarge, at, message)
}

pub(super) fn too_deep(at: Mark) -> Violation {
    violation(Code::DefinitionTooLarge, at, format!("the document is nested more than {DEPTH_MAX} levels deep"))
}

pub(super) fn duplicate_key(path: String, key: &str, at: Mark, first: Option<Mark>) -> Violation {
    let place = first.map(|m| format!(", first on line {}", m.line)).unwrap_or_default();
    let message = format!("the key `{}` is given twice{place}", cut(key, 80));
    Violation { path, ..violation(Code::Duplicate, at, message).mend("remove or rename one of them") }
}

impl Reader {
    fn read(mut self, text: &str) -> Result<(Node, Vec<Violation>), Vec<Violation>> {
        for next in Parser::new_from_str(text) {
            let step = match next {
                Ok((event, span)) => self.event(event, &span),
                Err(error) => {
                    let at = mark(&Span::empty(*error.marker()));
                    Err(match error.kind() {
                        ErrorKind::RecursionLimitExceeded => too_deep(at),
                        _ => violation(Code::Syntax, at, format!("this is neither YAML nor JSON: {}", error.info())),
                    })
                }
            };
            if let Err(fatal) = step {
                self.mistakes.push(fatal);
                return Err(self.mistakes);
            }
        }
        let Some(node) = self.root else {
            let empty = Violation::new(Code::Syntax, "", "the document is empty");
            self.mistakes.push(empty.mend("start with `name:` and `stages:`"));
            return Err(self.mistakes);
        };
        Ok((node, self.mistakes))
    }

    fn event(&mut self, event: Event<'_>, span: &Span) -> Result<(), Violation> {
        let at = mark(span);
        match event {
            Event::DocumentStart(..) => {
                self.documents += 1;
                if self.documents > 1 {
                    let message = "there is more than one document";
                    return Err(violation(Code::Syntax, at, message).mend("keep one pipeline per file"));
                }
            }
            Event::Scalar(text, style, anchor, tag) => {
                let text_tag = self.tag(tag.as_deref(), at);
                let value = self.scalar(&text, style, text_tag, at);
                let bytes = text.len();
                let blank = text.bytes().take_while(|byte| *byte == b'\n').count();
                let literal = u32::try_from(blank).ok().filter(|_| style == ScalarStyle::Literal);
                let spot = Spot { literal, ..Spot::leaf(at) };
                let plain = style == ScalarStyle::Plain && !text_tag;
                self.add(Node { value, spot, nodes: 1, bytes, plain }, anchor, at)?;
            }
            Event::SequenceStart(_, anchor, tag) => {
                self.tag(tag.as_deref(), at);
                self.open(at, anchor, Build::List(Vec::new(), Vec::new()))?;
            }
            Event::MappingStart(_, anchor, tag) => {
                self.tag(tag.as_deref(), at);
                let (values, spots) = (Map::new(), HashMap::new());
                self.open(at, anchor, Build::Map { values, spots, key: None, merging: false, merged: Vec::new() })?;
            }
            Event::SequenceEnd | Event::MappingEnd => self.close()?,
            Event::Alias(id) => {
                let Some(node) = self.anchors.get(&id) else {
                    return Err(violation(Code::Syntax, at, "the alias stands inside the value that it refers to"));
                };
                // Checked before the copy is made: a bomb must not go off on its way to being refused.
                if self.nodes + node.nodes > NODES_MAX || self.bytes + node.bytes > EXPANDED_MAX_BYTES {
                    return Err(too_many_nodes(at));
                }
                if self.stack.len() + depth(&node.value) > DEPTH_MAX {
                    return Err(too_deep(at));
                }
                let copy = Node { spot: Spot::leaf(at), ..node.clone() };
                self.add(copy, 0, at)?;
            }
            _ => {}
        }
        Ok(())
    }

    /// Notes a mistake, up to as many as are told.
    fn note(&mut self, mistake: Violation) {
        if self.mistakes.len() < MISTAKES_MAX {
            self.mistakes.push(mistake);
        }
    }

    /// Refuses every tag but `!!str`; says whether it was that.
    fn tag(&mut self, tag: Option<&granit_parser::Tag>, at: Mark) -> bool {
        let Some(tag) = tag else { return false };
        if tag.is_yaml_core_schema_tag("str") {
            return true;
        }
        let message = format!("the tag `{}` has no meaning here", cut(&tag.original(), 80));
        self.note(violation(Code::WrongValue, at, message).mend("remove the tag"));
        false
    }

    fn scalar(&mut self, text: &str, style: ScalarStyle, is_text: bool, at: Mark) -> Value {
        if style != ScalarStyle::Plain || is_text {
            return Value::String(text.to_owned());
        }
        resolve_plain(text).unwrap_or_else(|| {
            let message = format!("`{}` is no number that JSON knows", cut(text, 80));
            self.note(violation(Code::WrongValue, at, message).mend("quote it if it is text"));
            Value::Null
        })
    }

    fn open(&mut self, at: Mark, anchor: usize, build: Build) -> Result<(), Violation> {
        if self.stack.len() >= DEPTH_MAX {
            return Err(too_deep(at));
        }
        self.stack.push(Frame { at, anchor, nodes: 1, bytes: 0, build });
        Ok(())
    }

    fn close(&mut self) -> Result<(), Violation> {
        let Some(frame) = self.stack.pop() else { return Ok(()) };
        let (value, spot) = match frame.build {
            Build::List(values, spots) => (Value::Array(values), Spot::list(frame.at, spots)),
            Build::Map { mut values, mut spots, merged, .. } => {
                for (value, at) in merged {
                    if let Some(mistake) = merge(value, at, &mut values, &mut spots) {
                        self.note(mistake);
                    }
                }
                (Value::Object(values), Spot::map(frame.at, spots))
            }
        };
        // What is inside has been counted already; only the collection itself is new.
        self.nodes -= frame.nodes - 1;
        self.bytes -= frame.bytes;
        let node = Node { value, spot, nodes: frame.nodes, bytes: frame.bytes, plain: false };
        self.add(node, frame.anchor, frame.at)
    }

    fn add(&mut self, node: Node, anchor: usize, at: Mark) -> Result<(), Violation> {
        self.nodes += node.nodes;
        self.bytes += node.bytes;
        if self.nodes > NODES_MAX || self.bytes > EXPANDED_MAX_BYTES {
            return Err(too_many_nodes(at));
        }
        if anchor != 0 {
            self.kept_nodes += node.nodes;
            self.kept_bytes += node.bytes;
            if self.kept_nodes > NODES_MAX || self.kept_bytes > EXPANDED_MAX_BYTES {
                return Err(too_many_nodes(at));
            }
            self.anchors.insert(anchor, node.clone());
        }
        let Some(mut frame) = self.stack.pop() else {
            self.root = Some(node);
            return Ok(());
        };
        frame.nodes += node.nodes;
        frame.bytes += node.bytes;
        match &mut frame.build {
            Build::List(values, spots) => {
                values.push(node.value);
                spots.push(node.spot);
            }
            Build::Map { values, spots, key, merging, merged } => match key.take() {
                None if std::mem::take(merging) => merged.push((node.value, at)),
                None if node.plain && node.value == MERGE => *merging = true,
                None => {
                    let (text, mistake) = as_key(node.value, at);
                    *key = Some((text.into_owned(), at));
                    if let Some(mistake) = mistake {
                        self.note(mistake);
                    }
                }
                Some((text, _)) if values.contains_key(&text) && self.mistakes.len() >= MISTAKES_MAX => {}
                Some((text, key_at)) if values.contains_key(&text) => {
                    let first = spots.get(&text).and_then(|spot| spot.key);
                    self.note(duplicate_key(self.path().key(&text).to_string(), &text, key_at, first));
                }
                Some((text, key_at)) => {
                    values.insert(text.clone(), node.value);
                    spots.insert(text, node.spot.keyed(key_at));
                }
            },
        }
        self.stack.push(frame);
        Ok(())
    }

    /// The path to what is inside the open collections; for messages.
    fn path(&self) -> Path {
        self.stack.iter().fold(Path::root(), |path, frame| match &frame.build {
            Build::List(values, _) => path.index(values.len()),
            Build::Map { key: Some((key, _)), .. } => path.key(key),
            Build::Map { .. } => path,
        })
    }
}

fn as_key(value: Value, at: Mark) -> (Cow<'static, str>, Option<Violation>) {
    let text = match value {
        Value::String(text) => return (Cow::Owned(text), None),
        Value::Array(_) | Value::Object(_) => COLLECTION.to_owned(),
        plain => format!("`{plain}`"),
    };
    let message = format!("a key is a text, but this one is {text}");
    let mend = if text == COLLECTION { QUOTE_TEMPLATES } else { "put it in quotes" };
    (Cow::Owned(text), Some(violation(Code::WrongValue, at, message).mend(mend)))
}

/// How a key that is a collection is told.
const COLLECTION: &str = "a collection";
/// To YAML `{{` begins a map in a map.
const QUOTE_TEMPLATES: &str = "a text that begins with `{{` stands in quotes, `\"{{ … }}\"`, or in a block after `|`";

/// What stops the reader after a template without quotes is told as that.
fn quoted_templates(text: &str, mut mistakes: Vec<Violation>) -> Vec<Violation> {
    if let Some(last) = mistakes.last_mut().filter(|last| last.code == Code::Syntax && last.mend.is_none()) {
        let at = last.line.and_then(|line| usize::try_from(line).ok()).unwrap_or(0);
        let near = text.lines().skip(at.saturating_sub(2)).take(2);
        if near.map(str::trim_start).any(|line| line.contains(": {{") || line.starts_with("- {{")) {
            last.mend = Some(QUOTE_TEMPLATES.to_owned());
        }
    }
    mistakes
}

/// Merges a map, or the maps of a list, into one: its own keys go before those of the first, and so on.
fn merge(
    value: Value,
    at: Mark,
    values: &mut Map<String, Value>,
    spots: &mut HashMap<String, Spot>,
) -> Option<Violation> {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                if let serde_json::map::Entry::Vacant(place) = values.entry(key) {
                    spots.insert(place.key().clone(), Spot::leaf(at).keyed(at));
                    place.insert(value);
                }
            }
            None
        }
        Value::Array(maps) if maps.iter().all(Value::is_object) => {
            maps.into_iter().find_map(|map| merge(map, at, values, spots))
        }
        _ => {
            let message = "`<<` merges a map, or a list of maps, but this is neither";
            Some(violation(Code::WrongValue, at, message).mend("write `<<: *name` with the anchor of a map"))
        }
    }
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// YAML 1.2's core schema; None for what JSON has no number for.
fn resolve_plain(text: &str) -> Option<Value> {
    Some(match text {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        "true" | "True" | "TRUE" => Value::Bool(true),
        "false" | "False" | "FALSE" => Value::Bool(false),
        ".nan" | ".NaN" | ".NAN" => return None,
        _ => {
            let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
            if matches!(unsigned, ".inf" | ".Inf" | ".INF") {
                return None;
            }
            match number(text, unsigned) {
                Some(number) => number?,
                None => Value::String(text.to_owned()),
            }
        }
    })
}

/// Some(Some) for a number, Some(None) for one that is too large, None for what is none.
#[expect(clippy::option_option, reason = "three answers, in one private place")]
fn number(text: &str, unsigned: &str) -> Option<Option<Value>> {
    for (prefix, radix) in [("0x", 16), ("0o", 8)] {
        if let Some(digits) = text.strip_prefix(prefix) {
            if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
                return None;
            }
            return Some(u64::from_str_radix(digits, radix).ok().map(Value::from));
        }
    }
    if !unsigned.is_empty() && unsigned.bytes().all(|b| b.is_ascii_digit()) {
        let text = text.strip_prefix('+').unwrap_or(text);
        if let Ok(number) = text.parse::<i64>() {
            return Some(Some(Value::from(number)));
        }
        if let Ok(number) = text.parse::<u64>() {
            return Some(Some(Value::from(number)));
        }
    } else if !is_float(unsigned) {
        return None;
    }
    Some(text.parse::<f64>().ok().and_then(serde_json::Number::from_f64).map(Value::Number))
}

/// `[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?`, or with the digits after the point alone.
fn is_float(text: &str) -> bool {
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, Some(exponent.strip_prefix(['-', '+']).unwrap_or(exponent))),
        None => (text, None),
    };
    let digits = |t: &str| t.bytes().all(|b| b.is_ascii_digit());
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    digits(whole)
        && digits(fraction)
        && !(whole.is_empty() && fraction.is_empty())
        && exponent.is_none_or(|e| !e.is_empty() && digits(e))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(text: &str) -> Value {
        let (source, mistakes) = Source::read(text).expect("readable");
        assert_eq!(mistakes, []);
        source.value
    }

    fn first_mistake(text: &str) -> Violation {
        match Source::read(text) {
            Ok((_, mistakes)) => mistakes.into_iter().next().expect("a mistake"),
            Err(mistakes) => mistakes.into_iter().next_back().expect("a mistake"),
        }
    }

    #[test]
    fn plain_words_are_what_the_core_schema_says() {
        let text = "[null, ~, true, no, yes, on, 12, -3, 0x1F, 0o17, 1.5, 1e3, .5, '1', \"true\", 1.2.3, 0b1, 12a, 9223372036854775808, 1_000]";
        assert_eq!(
            read(&format!("a: {text}"))["a"],
            json!([
                null,
                null,
                true,
                "no",
                "yes",
                "on",
                12,
                -3,
                31,
                15,
                1.5,
                1000.0,
                0.5,
                "1",
                "true",
                "1.2.3",
                "0b1",
                "12a",
                9_223_372_036_854_775_808_u64,
                "1_000"
            ])
        );
        for bad in ["a: .nan", "a: -.inf", "a: 1e999"] {
            assert_eq!(first_mistake(bad).code, Code::WrongValue, "{bad}");
        }
    }

    #[test]
    fn json_is_read_as_json() {
        let text = "\t{\n\t\"a\\tb\" :\t[1,2.0,-0.5e1,true,null],\n \"smile\":\"\\ud83d\\ude00\\/\\u00e9\", \"a\"\n:{\"b\":[]}}";
        assert_eq!(read(text), serde_json::from_str::<Value>(text).expect("json"));
    }

    #[test]
    fn every_value_knows_its_place() {
        let check = |text: &str, line, column, key_column| {
            let (source, _) = Source::read(text).expect("readable");
            let path = Path::root().key("a").index(1).key("b");
            assert_eq!(source.value_mark(&path), Some(Mark { line, column }), "{text}");
            assert_eq!(source.key_mark(&path), Some(Mark { line, column: key_column }), "{text}");
        };
        check("a:\n  - 1\n  - b: 2\n", 3, 8, 5);
        check("{\"a\": [1,\n  {\"é\": 0, \"b\": 2}]}", 2, 17, 12);
        check("{a: [1,\n  {é: 0, b: 2}]}", 2, 13, 10);
    }

    #[test]
    fn a_line_inside_a_literal_block_is_a_line_of_the_text() {
        let (source, _) = Source::read("a: |\n\n   one\n   two {{\n").expect("readable");
        let path = Path::root().key("a");
        assert_eq!(source.value["a"], "\none\ntwo {{\n");
        assert_eq!(source.inner_mark(&path, 3, 4), Some(Mark { line: 4, column: 8 }));
        let (folded, _) = Source::read("a: >\n one\n two\n").expect("readable");
        assert_eq!(folded.inner_mark(&path, 1, 0), None);
    }

    #[test]
    fn what_is_no_document_says_where() {
        let bad = first_mistake("a: 1\nb: [1,\n");
        assert_eq!((bad.code, bad.line.is_some()), (Code::Syntax, true), "{bad}");
        assert_eq!(first_mistake("").code, Code::Syntax);
        assert_eq!(first_mistake("# nothing\n").code, Code::Syntax);
        assert_eq!(first_mistake("a: 1\n---\nb: 2\n").code, Code::Syntax);
        assert_eq!(first_mistake("a: &a [*a]").code, Code::Syntax);
        assert_eq!(first_mistake("a: *b").code, Code::Syntax);
        assert_eq!(first_mistake("a: !thing 1").code, Code::WrongValue);
        assert_eq!(first_mistake("1: a").code, Code::WrongValue);
        assert_eq!(first_mistake("? [a]\n: b").code, Code::WrongValue);
        assert_eq!(read("a: !!str 1"), json!({"a": "1"}));
    }

    #[test]
    fn a_key_given_twice_is_refused_in_both_languages() {
        for text in ["s:\n  - a: 1\n    a: 2\n", "{\"s\":\n [\n {\"a\": 1, \"a\": 2}]}"] {
            let bad = first_mistake(text);
            assert_eq!((bad.code, bad.path.as_str(), bad.line), (Code::Duplicate, "s[0].a", Some(3)), "{text}");
        }
    }

    #[test]
    fn bombs_and_abysses_are_refused() {
        let mut bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n".to_owned();
        for level in 1..9 {
            let before = format!("*a{}", level - 1);
            bomb = format!("{bomb}a{level}: &a{level} [{}]\n", vec![before; 10].join(","));
        }
        assert_eq!(first_mistake(&bomb).code, Code::DefinitionTooLarge);
        let long = format!("a: &a {}\nb: [{}]", "x".repeat(100_000), vec!["*a"; 1000].join(","));
        assert_eq!(first_mistake(&long).code, Code::DefinitionTooLarge);
        for deep in [
            format!("{}{}", "[".repeat(65), "]".repeat(65)),
            format!("{}1", "- ".repeat(70)),
            "{\"a\":".repeat(400_000),
        ] {
            assert_eq!(first_mistake(&deep).code, Code::DefinitionTooLarge);
        }
        assert_eq!(first_mistake(&"x".repeat(TEXT_MAX_BYTES + 1)).code, Code::DefinitionTooLarge);
        let wide = format!("[{}]", vec!["1"; 100_001].join(","));
        assert_eq!(first_mistake(&wide).code, Code::DefinitionTooLarge);
    }
}
