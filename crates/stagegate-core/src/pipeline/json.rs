//! JSON with positions: owns reading strict JSON into a value that knows where each part stands. What is not strict
//! JSON is left to the YAML reader.

use std::collections::HashMap;

use serde_json::{Map, Value};

use super::{
    path::{Path, Segment},
    source::{DEPTH_MAX, MISTAKES_MAX, Mark, NODES_MAX, Spot, duplicate_key, too_deep, too_many_nodes},
};
use crate::Violation;

/// What was read.
pub(super) struct Read {
    pub(super) value: Value,
    pub(super) spot: Spot,
    /// Keys given twice; the first is kept.
    pub(super) mistakes: Vec<Violation>,
}

/// Why it was not read.
pub(super) enum Stop {
    /// Not JSON; perhaps YAML.
    NotJson,
    /// JSON so far, but past a limit.
    TooLarge(Violation),
}

/// Reads a whole text.
pub(super) fn read(text: &str) -> Result<Read, Stop> {
    let mut scanner = Scanner { rest: text, line: 1, column: 1, nodes: 0, trail: Vec::new(), mistakes: Vec::new() };
    scanner.space();
    let (value, spot) = scanner.value()?;
    scanner.space();
    if !scanner.rest.is_empty() {
        return Err(Stop::NotJson);
    }
    Ok(Read { value, spot, mistakes: scanner.mistakes })
}

struct Scanner<'a> {
    rest: &'a str,
    line: u32,
    column: u32,
    nodes: usize,
    /// The way to the value that is being read.
    trail: Vec<Segment>,
    mistakes: Vec<Violation>,
}

impl<'a> Scanner<'a> {
    fn mark(&self) -> Mark {
        Mark { line: self.line, column: self.column }
    }

    fn take(&mut self, bytes: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(bytes);
        for char in taken.chars() {
            if char == '\n' {
                self.line += 1;
                self.column = 1;
            } else {
                self.column += 1;
            }
        }
        self.rest = rest;
        taken
    }

    fn space(&mut self) {
        let trimmed = self.rest.trim_start_matches([' ', '\t', '\r', '\n']);
        self.take(self.rest.len() - trimmed.len());
    }

    fn is_next(&mut self, char: char) -> bool {
        self.space();
        let found = self.rest.starts_with(char);
        if found {
            self.take(1);
        }
        found
    }

    fn expect(&mut self, char: char) -> Result<(), Stop> {
        if self.is_next(char) { Ok(()) } else { Err(Stop::NotJson) }
    }

    fn value(&mut self) -> Result<(Value, Spot), Stop> {
        let at = self.mark();
        self.nodes += 1;
        if self.nodes > NODES_MAX {
            return Err(Stop::TooLarge(too_many_nodes(at)));
        }
        match self.rest.bytes().next() {
            Some(b'{' | b'[') if self.trail.len() >= DEPTH_MAX => Err(Stop::TooLarge(too_deep(at))),
            Some(b'{') => self.map(at),
            Some(b'[') => self.list(at),
            Some(b'"') => Ok((Value::String(self.string()?), Spot::leaf(at))),
            _ => {
                let end = self.rest.find(|c: char| !(c.is_ascii_alphanumeric() || "+-.".contains(c)));
                let text = self.take(end.unwrap_or(self.rest.len()));
                let value = serde_json::from_str(text).map_err(|_| Stop::NotJson)?;
                Ok((value, Spot::leaf(at)))
            }
        }
    }

    fn string(&mut self) -> Result<String, Stop> {
        let mut escaped = false;
        let body = self.rest.strip_prefix('"').ok_or(Stop::NotJson)?;
        let end = body.bytes().position(|byte| {
            let closes = byte == b'"' && !escaped;
            escaped = byte == b'\\' && !escaped;
            closes
        });
        let text = self.take(end.ok_or(Stop::NotJson)? + 2);
        serde_json::from_str(text).map_err(|_| Stop::NotJson)
    }

    fn list(&mut self, at: Mark) -> Result<(Value, Spot), Stop> {
        self.take(1);
        let (mut values, mut spots) = (Vec::new(), Vec::new());
        if self.is_next(']') {
            return Ok((Value::Array(values), Spot::list(at, spots)));
        }
        loop {
            self.space();
            self.trail.push(Segment::Index(values.len()));
            let (value, spot) = self.value()?;
            self.trail.pop();
            values.push(value);
            spots.push(spot);
            if self.is_next(']') {
                return Ok((Value::Array(values), Spot::list(at, spots)));
            }
            self.expect(',')?;
        }
    }

    fn map(&mut self, at: Mark) -> Result<(Value, Spot), Stop> {
        self.take(1);
        let (mut values, mut spots) = (Map::new(), HashMap::<String, (Mark, Spot)>::new());
        let finish = |values, spots: HashMap<String, (Mark, Spot)>| {
            let spots = spots.into_iter().map(|(key, (mark, spot))| (key, spot.keyed(mark))).collect();
            (Value::Object(values), Spot::map(at, spots))
        };
        if self.is_next('}') {
            return Ok(finish(values, spots));
        }
        loop {
            self.space();
            let key_at = self.mark();
            let key = self.string()?;
            self.expect(':')?;
            self.space();
            self.trail.push(Segment::Key(key.clone()));
            let (value, spot) = self.value()?;
            if let Some((first, _)) = spots.get(&key) {
                if self.mistakes.len() < MISTAKES_MAX {
                    let path = Path::from_segments(self.trail.clone()).to_string();
                    self.mistakes.push(duplicate_key(path, &key, key_at, Some(*first)));
                }
                self.trail.pop();
            } else {
                self.trail.pop();
                values.insert(key.clone(), value);
                spots.insert(key, (key_at, spot));
            }
            if self.is_next('}') {
                return Ok(finish(values, spots));
            }
            self.expect(',')?;
        }
    }
}
