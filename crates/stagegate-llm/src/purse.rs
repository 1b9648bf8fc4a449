//! What pays for calls: owns the port through which a caller sets aside the most that a call to a provider can cost,
//! before the call is made, and hears what came of it. Knows no run and no budget.
//!
//! Each call has a reservation of its own, made by the caller that begins it. Callers that share the answer of a call
//! under way have none, and pay nothing.

use std::fmt;

use futures::future::BoxFuture;
use stagegate_core::{LedgerEntry, Usd};

/// Why there is no reservation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The call does not fit beside what is spent; so much is left.
    TooDear {
        /// What is left.
        left: Usd,
    },
    /// There is a limit, and the model has no price that could be held to it.
    Unpriced,
}

/// Pays for the calls of one caller.
pub trait Purse: Send + Sync + fmt::Debug {
    /// Sets the worst case of one call aside: `worst` is the row that is booked if nobody hears what came of the call.
    /// Waits while it does not fit beside what is set aside for calls under way; fails where it does not fit beside what
    /// is spent. Dropping the future ends the wait.
    fn reserve(&self, worst: LedgerEntry) -> BoxFuture<'_, Result<Box<dyn Reservation>, Refusal>>;

    /// Whether former owners of the caller's work may have asked before it, without telling what came of it.
    fn inherits(&self) -> bool;

    /// A former owner had bought this answer, and the caller has found it. It is booked here, as a purchase. `before` is the
    /// worst case of each model of the chain before the one that gave it: each former owner may have asked those in vain,
    /// which leaves no answer. `rest` is the same of that model and those after it: former owners other than the buyer may
    /// have asked those, too.
    fn inherited(&self, bought: LedgerEntry, before: Vec<LedgerEntry>, rest: Vec<LedgerEntry>);

    /// What each former owner may have bought is not found: the worst case of every call that its request can have
    /// led to.
    fn lost(&self, worst: Vec<LedgerEntry>);
}

/// What is set aside for one call. Dropped before the request is sent, it is given back; dropped later, the call is
/// booked at its worst case, as one of unknown outcome.
pub trait Reservation: Send + Sync + fmt::Debug {
    /// The request is about to be sent. False where the caller is gone: then nobody pays, and it must not be sent.
    #[must_use]
    fn send(&mut self) -> bool;

    /// The call has ended, and this is its row.
    fn settle(self: Box<Self>, row: LedgerEntry);
}
