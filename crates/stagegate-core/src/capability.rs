//! Capabilities: what a replica can read and do. Each heartbeat sends them. Owns their words, and the rule for when a
//! replica may use one.
//!
//! A replica writes a new word, column or form of rows only while [`Capabilities::common`] says that every live replica
//! understands it. The answer to each heartbeat brings the common ones.
//!
//! There are two kinds:
//! - A capability that *settles*: a replica without it cannot even carry the new form. After it was common for
//!   `engine.way_back`, the database settles it: it stays common for good, and the database refuses the heartbeats of
//!   replicas that lack it.
//! - All others: a replica with [`Capability::OpenVocabulary`] carries the new words without reading them. They are common
//!   while every live replica sends them. An older replica that joins ends that at the others' next heartbeats; words that
//!   were written before stay, and the older replica carries them.

use std::collections::BTreeSet;

use crate::word::open_words;

open_words! {
    /// What a replica can read and do.
    pub enum Capability {
        /// Reads the compact form of rows. What schema 2 brought. Settles.
        CompactRows = "compact_rows",
        /// Carries unknown words and fields of events, codes, states and signals. What schema 3 brought. Settles.
        OpenVocabulary = "open_vocabulary",
        /// Reads which attempt an approval or a rejection means.
        ApprovalNamesAttempt = "approval_names_attempt",
        /// Reads definitions whose judges have a prompt, a scale and parameters of their own, with more model parameters,
        /// conversations made from data and gates that hold what passes; and renders the templates that came with them.
        OwnJudges = "own_judges",
        /// Reads the comment and the edited output of an approval.
        EditedApproval = "edited_approval",
    }
}

impl Capability {
    /// Whether the database refuses replicas without it once it was common.
    pub fn settles(self) -> bool {
        matches!(self, Self::CompactRows | Self::OpenVocabulary)
    }
}

/// A set of capabilities.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Capabilities(BTreeSet<Capability>);

impl Capabilities {
    /// Those of this release.
    pub fn own() -> Self {
        Capability::ALL.iter().copied().collect()
    }

    /// From stored words. Words of newer releases are kept; texts that are not words are left out.
    pub fn of_words<'a>(words: impl IntoIterator<Item = &'a str>) -> Self {
        words.into_iter().filter_map(Capability::parse).collect()
    }

    /// As stored.
    pub fn words(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|capability| capability.as_str())
    }

    /// Whether it is among them.
    pub fn contains(&self, capability: Capability) -> bool {
        self.0.contains(&capability)
    }

    /// Those that are in both.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        self.0.intersection(&other.0).copied().collect()
    }

    /// Whether it may be used, where these are the answer of a heartbeat. Until the vocabulary is open, replicas may return that cannot
    /// carry what the others write.
    pub fn common(&self, capability: Capability) -> bool {
        self.contains(capability) && (capability.settles() || self.contains(Capability::OpenVocabulary))
    }
}

impl FromIterator<Capability> for Capabilities {
    fn from_iter<I: IntoIterator<Item = Capability>>(capabilities: I) -> Self {
        Self(capabilities.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capability_needs_an_open_vocabulary_unless_it_settles() {
        let later = Capability::parse("later").expect("a word");
        let without: Capabilities = [later, Capability::CompactRows].into_iter().collect();
        assert!(without.common(Capability::CompactRows) && !without.common(later));
        let with: Capabilities = [later, Capability::OpenVocabulary].into_iter().collect();
        assert!(with.common(later) && !with.common(Capability::CompactRows));
    }

    #[test]
    fn words_of_newer_releases_are_kept_and_malformed_ones_left_out() {
        let told = Capabilities::of_words(["compact_rows", "of_the_future", "no word"]);
        assert_eq!(told.words().collect::<Vec<_>>(), ["compact_rows", "of_the_future"]);
        assert_eq!(told.and(&Capabilities::own()).words().collect::<Vec<_>>(), ["compact_rows"]);
    }
}
