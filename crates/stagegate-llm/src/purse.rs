//! Payment for calls: owns the port through which a caller reserves the worst case of a call to a provider before it
//! makes the call, and books its outcome afterwards. Knows no run and no budget.
//!
//! Each call has a reservation of its own, made by the leader that begins it. Followers that share the answer of a call
//! under way have no reservation, and pay nothing.

use std::fmt;

use futures::future::BoxFuture;
use stagegate_core::{LedgerEntry, Usd};

/// Why there is no reservation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The call does not fit beside the money that is spent.
    TooDear {
        /// The money that is left.
        left: Usd,
    },
    /// There is a limit, and the model has no price to compare with it.
    Unpriced,
}

/// Pays for the calls of one caller.
pub trait Purse: Send + Sync + fmt::Debug {
    /// Reserves the worst case of one call: `worst` is the row that is booked if the outcome of the call stays unknown.
    /// Waits while the reservations of calls under way leave no room; fails if the money that is spent leaves no room.
    /// Dropping the future ends the wait.
    fn reserve(&self, worst: LedgerEntry) -> BoxFuture<'_, Result<Box<dyn Reservation>, Refusal>>;

    /// Whether former owners of the caller's work may have made calls whose outcome is unknown.
    fn inherits(&self) -> bool;

    /// Books an answer that a former owner bought and the caller found in the cache, as a purchase. `before` is the worst
    /// case of each model of the chain before the one that answered: each former owner may have asked those in vain,
    /// which leaves no answer. `rest` is the same for that model and those after it: former owners other than the buyer may
    /// have asked those, too.
    fn inherited(&self, bought: LedgerEntry, before: Vec<LedgerEntry>, rest: Vec<LedgerEntry>);

    /// Books the worst case of every call that a former owner's request can have led to: the cache has no answer to the
    /// request.
    fn lost(&self, worst: Vec<LedgerEntry>);
}

/// The reservation of one call. Dropped before the request is sent, it is returned. Dropped later, it books the call at
/// its worst case, as one of unknown outcome.
pub trait Reservation: Send + Sync + fmt::Debug {
    /// Marks the request as sent. False if the caller is gone: then the request has no payer and must not be sent.
    #[must_use]
    fn send(&mut self) -> bool;

    /// Ends the call with its row.
    fn settle(self: Box<Self>, row: LedgerEntry);
}
