//! Paths into a definition: owns how a place is named (`stages[2].gate.judge.threshold`). Knows no positions; those
//! are [`super::source`]'s.

use std::fmt;

use jsonschema::paths::{Location, LocationSegment};

/// One step down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Segment {
    /// Into a map.
    Key(String),
    /// Into a list, counted from 0.
    Index(usize),
}

/// Where something stands, from the root.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Path(Vec<Segment>);

impl Path {
    /// The whole document.
    pub(super) fn root() -> Self {
        Self::default()
    }

    /// By these steps.
    pub(super) fn from_segments(segments: Vec<Segment>) -> Self {
        Self(segments)
    }

    /// A value of this map.
    pub(super) fn key(&self, key: &str) -> Self {
        self.join(Segment::Key(key.to_owned()))
    }

    /// An item of this list.
    pub(super) fn index(&self, index: usize) -> Self {
        self.join(Segment::Index(index))
    }

    fn join(&self, segment: Segment) -> Self {
        let mut segments = Vec::with_capacity(self.0.len() + 1);
        segments.extend_from_slice(&self.0);
        segments.push(segment);
        Self(segments)
    }

    /// The same place, seen from below `self`: what a JSON Schema validator says of a part of the document.
    pub(super) fn below(&self, location: &Location) -> Self {
        let inner = location.segments().map(|segment| match segment {
            LocationSegment::Property(key) => Segment::Key(key.into_owned()),
            LocationSegment::Index(index) => Segment::Index(index),
        });
        Self(self.0.iter().cloned().chain(inner).collect())
    }

    /// The steps.
    pub(super) fn segments(&self) -> &[Segment] {
        &self.0
    }

    /// The last key, where the last step is one.
    pub(super) fn last_key(&self) -> Option<&str> {
        match self.0.last() {
            Some(Segment::Key(key)) => Some(key),
            _ => None,
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, segment) in self.0.iter().enumerate() {
            match segment {
                Segment::Index(index) => write!(f, "[{index}]")?,
                Segment::Key(key) if is_plain(key) => {
                    if position > 0 {
                        f.write_str(".")?;
                    }
                    f.write_str(key)?;
                }
                Segment::Key(key) => write!(f, "[{:?}]", cut(key, 80))?,
            }
        }
        Ok(())
    }
}

fn is_plain(key: &str) -> bool {
    !key.is_empty() && key.len() <= 80 && key.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-$".contains(&b))
}

/// At most `max` characters of a text that comes from outside, so that a message stays a message.
pub(super) fn cut(text: &str, max: usize) -> String {
    match text.char_indices().nth(max) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// The most names that a message lists, and the longest that it shows of one.
const LISTED_MAX: usize = 20;
const NAME_MAX_CHARS: usize = 64;

/// Names in a message: some of them where there are many.
pub(super) fn listed<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let mut names = names.into_iter();
    let mut told: Vec<String> = names.by_ref().take(LISTED_MAX).map(|name| cut(name, NAME_MAX_CHARS)).collect();
    match names.count() {
        0 => {}
        more => told.push(format!("and {more} more")),
    }
    told.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_reads_as_people_write_it() {
        let path = Path::root().key("stages").index(2).key("gate").key("a.b").key("c");
        assert_eq!(path.to_string(), r#"stages[2].gate["a.b"].c"#);
        assert_eq!(Path::root().to_string(), "");
    }

    #[test]
    fn a_long_list_of_names_is_told_in_part() {
        assert_eq!(listed(["a", "b"]), "a, b");
        let long = "x".repeat(4_000);
        let told = listed(std::iter::repeat_n(long.as_str(), 90));
        assert!(told.ends_with("and 70 more") && told.len() < 2_000, "{told}");
    }
}
