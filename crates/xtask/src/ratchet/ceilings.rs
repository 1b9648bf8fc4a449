//! The committed ceilings: what each figure may be at most, what it shall become, and what was found when the ceiling was
//! written. Owns the file and the comparison with what is measured now.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::figures::{Found, Measure};

/// From the workspace's folder.
pub(super) const FILE: &str = ".ci/ratchet.toml";

const HEAD: &str = "\
# Ceilings of `cargo xtask ratchet`, which measures by the rules of docs/ratchet.md. A figure may only fall:
# `cargo xtask ratchet --lower` writes what was reached. To raise one, edit it here and give the reason in the commit.
# `goal` is what it shall become; nothing but a hand changes it.
# `known` is what was found when the ceiling was written, so that a figure that rises can say what is new.

";

/// The whole file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Ceilings(pub(super) BTreeMap<String, Ceiling>);

/// One figure's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(clippy::struct_field_names, reason = "the words of the file")]
pub(super) struct Ceiling {
    pub(super) ceiling: usize,
    pub(super) goal: usize,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) known: Vec<String>,
}

/// How a figure stands to its ceiling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Verdict {
    /// It is at its goal, and its ceiling too.
    Done,
    /// It is at its ceiling.
    Holds,
    /// The ceiling can be lowered to it.
    Fell,
    /// It is above its ceiling.
    Rose,
    /// There is no ceiling.
    Unknown,
}

impl Verdict {
    /// Whether the check fails.
    pub(super) fn fails(self) -> bool {
        matches!(self, Self::Rose | Self::Unknown)
    }
}

impl Ceilings {
    pub(super) fn read(root: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(root.join(FILE)).with_context(|| FILE.to_owned())?;
        toml::from_str(&text).with_context(|| format!("{FILE} is not as `cargo xtask ratchet --lower` writes it"))
    }

    pub(super) fn write(&self, root: &Path) -> Result<()> {
        let text = toml::to_string_pretty(self).context("ceilings as TOML")?;
        std::fs::write(root.join(FILE), format!("{HEAD}{text}")).with_context(|| FILE.to_owned())
    }

    pub(super) fn judge(&self, figure: &Measure) -> Verdict {
        let Some(known) = self.0.get(figure.name) else { return Verdict::Unknown };
        match figure.value.cmp(&known.ceiling) {
            std::cmp::Ordering::Greater => Verdict::Rose,
            std::cmp::Ordering::Less => Verdict::Fell,
            std::cmp::Ordering::Equal if figure.value <= known.goal => Verdict::Done,
            std::cmp::Ordering::Equal => Verdict::Holds,
        }
    }

    /// Findings that the ceiling does not know; all findings if it knows each of them.
    pub(super) fn news<'f>(&self, figure: &'f Measure) -> Vec<&'f Found> {
        let mut known = self.0.get(figure.name).map(|ceiling| ceiling.known.clone()).unwrap_or_default();
        let is_new = |found: &&Found| match known.iter().position(|name| *name == found.name) {
            Some(place) => {
                known.swap_remove(place);
                false
            }
            None => true,
        };
        let news: Vec<&Found> = figure.found.iter().filter(is_new).collect();
        if news.is_empty() { figure.found.iter().collect() } else { news }
    }

    /// Lowers each ceiling to its figure and notes what is there; a figure that rose keeps its ceiling. Returns the names
    /// of those that were lowered.
    pub(super) fn lower(&mut self, figures: &[Measure]) -> Vec<&'static str> {
        let mut lowered = Vec::new();
        for figure in figures {
            let is_new = !self.0.contains_key(figure.name);
            let kept = self.0.entry(figure.name.to_owned()).or_insert(Ceiling {
                ceiling: figure.value,
                goal: 0,
                known: vec![],
            });
            if kept.ceiling < figure.value {
                continue;
            }
            if is_new || kept.ceiling > figure.value {
                lowered.push(figure.name);
            }
            kept.ceiling = figure.value;
            if figure.is_count {
                kept.known = figure.found.iter().map(|found| found.name.clone()).collect();
            }
        }
        self.0.retain(|name, _| figures.iter().any(|figure| figure.name == name));
        lowered
    }
}
