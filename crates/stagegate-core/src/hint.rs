//! Hints: what replicas whisper to each other so that one wakes earlier than its next look at the store. Owns their
//! words. Nothing may ever depend on one: a hint can be lost, late, doubled or forged, and the store alone is believed.

use async_trait::async_trait;

use crate::RunId;

/// Something that another replica may want to look at now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Hint {
    /// There may be runs to claim.
    Work,
    /// Somebody asks something of this run: its owner may read its signals.
    Signal(RunId),
    /// The sender watches runs of others: it would like to hear of their news for the next seconds.
    Watching,
    /// This run has new events.
    News(RunId),
}

/// A way for hints between replicas. It never fails and nobody waits for it: when it is away or behind, hints are lost.
#[async_trait]
pub trait Hints: Send + Sync + std::fmt::Debug + 'static {
    /// Tells the other replicas, soon and perhaps.
    fn publish(&self, hint: Hint);

    /// The next hints of other replicas, at least one. Waits for ever where none comes. For one caller at a time.
    async fn next(&self) -> Vec<Hint>;
}
