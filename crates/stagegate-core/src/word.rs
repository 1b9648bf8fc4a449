//! Words of open vocabularies: owns [`Word`], a short text that is copied like a reference, and the macro that makes an enum
//! which carries the words that it does not know.
//!
//! A newer release may write words that this one does not know. This release reads them as `Unknown`, shows them as they
//! are, and writes them back unchanged. It never treats them as corruption.

use std::{
    collections::BTreeSet,
    fmt,
    sync::{Mutex, PoisonError},
};

use serde_json::{Map, Value};

/// The longest word, in bytes. A longer one makes its row unreadable.
pub const WORD_MAX_BYTES: usize = 32;
/// How many distinct words a process keeps. They come from the database, where other releases wrote them; one more makes its row
/// unreadable.
pub const WORDS_MAX: usize = 4_096;

/// Every word that was read, kept until the process ends: so a word is as small as a reference, and copied like one.
static WORDS: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());

/// A short word that this release does not know.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Word(&'static str);

impl Word {
    /// The word, if the text is one: 1 to [`WORD_MAX_BYTES`] bytes, no space and no control character.
    pub fn new(text: &str) -> Option<Self> {
        if text.is_empty() || text.len() > WORD_MAX_BYTES || text.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return None;
        }
        let mut words = WORDS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = words.get(text) {
            return Some(Self(known));
        }
        if words.len() >= WORDS_MAX {
            return None;
        }
        let kept: &'static str = Box::leak(text.into());
        words.insert(kept);
        Some(Self(kept))
    }

    /// The word itself.
    pub fn as_str(&self) -> &'static str {
        self.0
    }
}

impl fmt::Debug for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.0)
    }
}

impl<'de> serde::Deserialize<'de> for Word {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserialize(deserializer, Self::new)
    }
}

/// Members of a JSON object that this release does not know, as a newer one wrote them. None cost nothing.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Rest(Option<Box<Map<String, Value>>>);

impl Rest {
    /// Those of an object.
    pub fn of(members: Map<String, Value>) -> Self {
        Self(Some(members).filter(|members| !members.is_empty()).map(Box::new))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }
}

/// They may quote: only how many there are is told.
impl fmt::Debug for Rest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} unknown", self.0.as_ref().map_or(0, |members| members.len()))
    }
}

impl serde::Serialize for Rest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().flat_map(|members| members.iter()))
    }
}

impl<'de> serde::Deserialize<'de> for Rest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Map::deserialize(deserializer).map(Self::of)
    }
}

/// An enum whose values are stored and shown as words, with `Unknown` for those of newer releases.
///
/// It gives `ALL` (the known ones), `as_str`, `label` (for metrics, whose label sets are closed), `known` and `parse`, and is serialized as its word.
macro_rules! open_words {
    ($(#[$doc:meta])* $vis:vis enum $name:ident { $($(#[$word_doc:meta])* $word:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        $vis enum $name {
            $($(#[$word_doc])* $word,)+
            /// A word of a newer release, kept as it is.
            Unknown($crate::word::Word),
        }

        impl $name {
            /// Every one that this release knows.
            pub const ALL: &'static [Self] = &[$(Self::$word,)+];

            /// As stored and shown.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$word => $text,)+
                    Self::Unknown(word) => word.as_str(),
                }
            }

            /// As counted: every unknown word is `unknown`, so that the values of a label stay few.
            pub fn label(self) -> &'static str {
                match self {
                    $(Self::$word => $text,)+
                    Self::Unknown(_) => "unknown",
                }
            }

            /// The one with this word, of those that this release knows.
            pub fn known(text: &str) -> Option<Self> {
                match text {
                    $($text => Some(Self::$word),)+
                    _ => None,
                }
            }

            /// From its stored form. None where the text is no word at all.
            pub fn parse(text: &str) -> Option<Self> {
                Self::known(text).or_else(|| $crate::word::Word::new(text).map(Self::Unknown))
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                $crate::word::deserialize(deserializer, Self::parse)
            }
        }

        impl utoipa::PartialSchema for $name {
            fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
                let known = [$($text),+].join("`, `");
                utoipa::openapi::ObjectBuilder::new()
                    .schema_type(utoipa::openapi::schema::Type::String)
                    .description(Some(format!("One of `{known}`. Newer releases may add others: treat them as unknown")))
                    .into()
            }
        }

        impl utoipa::ToSchema for $name {}
    };
}

pub(crate) use open_words;

/// Reads a word from text, with a clear error where it is none.
pub(crate) fn deserialize<'de, D, T>(deserializer: D, parse: fn(&str) -> Option<T>) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
{
    let text = <std::borrow::Cow<'de, str> as serde::Deserialize>::deserialize(deserializer)?;
    parse(&text).ok_or_else(|| serde::de::Error::custom("not a word of 1 to 32 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Capability;

    #[test]
    fn an_unknown_word_is_carried_unchanged() {
        let later: Capability = serde_json::from_str("\"dark-blue\"").expect("reads");
        assert_eq!(later, Capability::Unknown(Word::new("dark-blue").expect("a word")));
        assert_eq!(serde_json::to_string(&later).expect("writes"), "\"dark-blue\"");
        assert_eq!((later.as_str(), later.label()), ("dark-blue", "unknown"));
    }

    #[test]
    fn a_known_word_is_never_unknown() {
        for one in Capability::ALL {
            assert_eq!(Capability::parse(one.as_str()), Some(*one));
            assert_eq!(one.label(), one.as_str());
        }
    }

    #[test]
    fn a_text_that_is_no_word_is_refused() {
        for text in ["", "two words", "line\nbreak", "\u{1b}[31m", &"x".repeat(WORD_MAX_BYTES + 1)] {
            assert_eq!(Capability::parse(text), None, "{text:?}");
        }
        assert!(Capability::parse(&"x".repeat(WORD_MAX_BYTES)).is_some());
    }
}
