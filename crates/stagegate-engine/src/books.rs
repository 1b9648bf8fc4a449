//! The books of one attempt: owns which of its calls are under way and the ledger rows of those that ended, so that the
//! whole attempt can be booked whenever it ends, also when it is aborted. Decides nothing.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use futures::{FutureExt, future::BoxFuture};
use stagegate_core::{Code, LedgerEntry, Usd};
use stagegate_llm::purse::{Purse, Refusal, Reservation};
use tokio::time::Instant;

use crate::budget::Budget;

/// The calls of one attempt: bought, found in the cache, or still under way.
#[derive(Debug)]
pub(crate) struct Books {
    me: Weak<Self>,
    budget: Option<Arc<Budget>>,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    /// Calls that ended, in the order of their ends.
    calls: Vec<LedgerEntry>,
    under_way: Vec<UnderWay>,
    next_id: u64,
    /// Former owners of the attempt whose calls may not have been booked.
    former_owners: u32,
    closed: bool,
}

/// A call that was reserved and has not ended.
#[derive(Debug)]
struct UnderWay {
    id: u64,
    worst: LedgerEntry,
    sent_at: Option<Instant>,
}

impl UnderWay {
    /// Its row if its outcome stays unknown; none if it was never sent.
    fn unheard(self, error: Code) -> Option<LedgerEntry> {
        let latency = self.sent_at?.elapsed();
        let latency_ms = u64::try_from(latency.as_millis()).unwrap_or(u64::MAX);
        Some(LedgerEntry { latency_ms: latency_ms.max(1), error: Some(error), ..self.worst })
    }
}

impl Books {
    /// The books of an attempt that had `former_owners` before this owner.
    pub(crate) fn open(budget: Option<Arc<Budget>>, former_owners: u32) -> Arc<Self> {
        let kept = Mutex::new(Kept { former_owners, ..Kept::default() });
        Arc::new_cyclic(|me| Self { me: me.clone(), budget, kept })
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers that were found: they cost nothing.
    pub(crate) fn found<'a>(&self, calls: impl Iterator<Item = &'a LedgerEntry>) {
        self.lock().calls.extend(calls.cloned());
    }

    /// Ends the attempt and returns its calls. Those under way have an unknown outcome, with this code as the reason; their
    /// later results change nothing.
    pub(crate) fn close(&self, error: Code) -> Vec<LedgerEntry> {
        let (mut calls, under_way) = {
            let mut kept = self.lock();
            kept.closed = true;
            (std::mem::take(&mut kept.calls), std::mem::take(&mut kept.under_way))
        };
        for call in under_way {
            let worst = call.worst.cost_usd;
            let row = call.unheard(error);
            self.settle(worst, row.as_ref());
            calls.extend(row);
        }
        calls
    }

    /// How many former owners there are whose calls were neither found nor booked.
    pub(crate) fn former_owners(&self) -> u32 {
        self.lock().former_owners
    }

    fn settle(&self, worst: Usd, row: Option<&LedgerEntry>) {
        if let Some(budget) = &self.budget {
            budget.settle(worst, row.map_or(Usd::ZERO, |row| row.cost_usd));
        }
    }

    /// Books the calls that each of `owners` former owners may have made and no answer shows. They count against no budget.
    fn presume(&self, worst: &[LedgerEntry], owners: u32) {
        let mut kept = self.lock();
        (0..owners).for_each(|_| kept.calls.extend(worst.iter().cloned()));
    }

    fn begin(&self, worst: LedgerEntry) -> Option<Box<dyn Reservation>> {
        let mut kept = self.lock();
        let books = self.me.upgrade().filter(|_| !kept.closed)?;
        let id = kept.next_id;
        kept.next_id += 1;
        kept.under_way.push(UnderWay { id, worst, sent_at: None });
        Some(Box::new(Reserved { books, id }))
    }

    /// Ends a call, with its row if it has one. Does nothing after the books are closed.
    fn end(&self, id: u64, row: Option<LedgerEntry>) {
        let mut kept = self.lock();
        let Some(at) = kept.under_way.iter().position(|call| call.id == id) else { return };
        let call = kept.under_way.remove(at);
        let worst = call.worst.cost_usd;
        let row = row.or_else(|| call.unheard(Code::ProviderTimeout));
        kept.calls.extend(row.clone());
        drop(kept);
        self.settle(worst, row.as_ref());
    }
}

impl Purse for Books {
    fn reserve(&self, worst: LedgerEntry) -> BoxFuture<'_, Result<Box<dyn Reservation>, Refusal>> {
        async move {
            let cost = worst.cost_usd;
            if let Some(budget) = &self.budget {
                if !worst.priced {
                    return Err(Refusal::Unpriced);
                }
                budget.set_aside(cost).await.map_err(|left| Refusal::TooDear { left })?;
            }
            self.begin(worst).ok_or_else(|| {
                // The attempt has ended: no caller waits for this answer.
                self.settle(cost, None);
                Refusal::TooDear { left: Usd::ZERO }
            })
        }
        .boxed()
    }

    fn inherits(&self) -> bool {
        self.lock().former_owners > 0
    }

    fn inherited(&self, bought: LedgerEntry, before: Vec<LedgerEntry>, rest: Vec<LedgerEntry>) {
        if let Some(budget) = &self.budget {
            budget.spend(bought.cost_usd);
        }
        self.lock().calls.push(bought);
        // Whichever of them bought it: its successor found it, and asked nothing more.
        let former_owners = self.former_owners();
        self.presume(&before, former_owners);
        self.presume(&rest, former_owners.saturating_sub(1));
    }

    fn lost(&self, worst: Vec<LedgerEntry>) {
        // The first request whose answer is not found is the one that a former owner can have been at.
        let former_owners = std::mem::take(&mut self.lock().former_owners);
        self.presume(&worst, former_owners);
    }
}

/// See [`Reservation`].
#[derive(Debug)]
struct Reserved {
    books: Arc<Books>,
    id: u64,
}

impl Reservation for Reserved {
    fn send(&mut self) -> bool {
        let mut kept = self.books.lock();
        let call = kept.under_way.iter_mut().find(|call| call.id == self.id);
        call.map(|call| call.sent_at = Some(Instant::now())).is_some()
    }

    fn settle(self: Box<Self>, row: LedgerEntry) {
        self.books.end(self.id, Some(row));
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.books.end(self.id, None);
    }
}

#[cfg(test)]
mod tests {
    use stagegate_core::{CallPurpose, ModelRef, Origin, Usage};

    use super::*;

    fn row(cost: f64, unknown: bool) -> LedgerEntry {
        LedgerEntry {
            purpose: CallPurpose::Stage,
            model: ModelRef::new("sim/a").expect("a model"),
            origin: Origin::Provider,
            usage: Usage::default(),
            cost_usd: Usd::from_dollars(cost),
            saved_usd: Usd::ZERO,
            unknown,
            priced: true,
            latency_ms: 0,
            error: None,
            rest: stagegate_core::Rest::default(),
        }
    }

    fn books(former_owners: u32) -> (Arc<Budget>, Arc<Books>) {
        let budget = Arc::new(Budget::new(Usd::from_dollars(1.0), Usd::ZERO));
        (Arc::clone(&budget), Books::open(Some(budget), former_owners))
    }

    fn costs(calls: &[LedgerEntry]) -> Vec<(f64, bool)> {
        calls.iter().map(|call| (call.cost_usd.dollars(), call.unknown)).collect()
    }

    #[tokio::test]
    async fn a_call_with_a_known_outcome_is_booked_at_its_cost() {
        let (budget, books) = books(0);
        let mut call = books.reserve(row(0.6, true)).await.expect("fits");
        assert!(call.send());
        call.settle(row(0.1, false));
        assert_eq!(costs(&books.close(Code::StageTimeout)), [(0.1, false)]);
        assert_eq!(budget.set_aside(Usd::from_dollars(0.9)).await, Ok(()));
    }

    #[tokio::test]
    async fn a_call_that_was_never_sent_costs_nothing() {
        let (budget, books) = books(0);
        drop(books.reserve(row(0.6, true)).await.expect("fits"));
        assert_eq!(costs(&books.close(Code::StageTimeout)), []);
        assert_eq!(budget.set_aside(Usd::from_dollars(1.0)).await, Ok(()));
    }

    #[tokio::test]
    async fn a_call_of_unknown_outcome_is_booked_at_its_worst_case() {
        let (budget, books) = books(0);
        let mut dropped = books.reserve(row(0.3, true)).await.expect("fits");
        let mut open = books.reserve(row(0.2, true)).await.expect("fits");
        assert!(dropped.send() && open.send());
        drop(dropped);
        let calls = books.close(Code::Cancelled);
        assert_eq!(costs(&calls), [(0.3, true), (0.2, true)]);
        assert_eq!(calls[1].error, Some(Code::Cancelled));
        open.settle(row(0.1, false));
        assert_eq!(costs(&books.close(Code::Cancelled)), [], "it came too late to be booked");
        assert_eq!(budget.set_aside(Usd::from_dollars(0.6)).await, Err(Usd::from_dollars(0.5)));
    }

    #[tokio::test]
    async fn a_call_of_an_attempt_that_has_ended_is_not_sent() {
        let (_, books) = books(0);
        let mut call = books.reserve(row(0.3, true)).await.expect("fits");
        assert_eq!(costs(&books.close(Code::Cancelled)), []);
        assert!(!call.send());
    }

    #[tokio::test]
    async fn each_former_owner_is_booked_at_the_first_request_that_is_not_found() {
        let (_, books) = books(2);
        assert!(books.inherits());
        books.inherited(row(0.1, false), Vec::new(), Vec::new());
        assert!(books.inherits(), "what comes after it may be lost all the same");
        books.lost(vec![row(0.2, true), row(0.3, true)]);
        assert!(!books.inherits());
        let booked = costs(&books.close(Code::StageTimeout));
        assert_eq!(booked, [(0.1, false), (0.2, true), (0.3, true), (0.2, true), (0.3, true)]);
    }

    #[tokio::test]
    async fn beside_an_answer_that_is_found_the_other_calls_of_former_owners_are_booked() {
        let (_, books) = books(2);
        books.inherited(row(0.1, false), vec![row(0.02, true)], vec![row(0.03, true), row(0.04, true)]);
        let booked = costs(&books.close(Code::StageTimeout));
        let in_vain = (0.02, true);
        assert_eq!(booked, [(0.1, false), in_vain, in_vain, (0.03, true), (0.04, true)], "one of the two bought it");
    }

    #[tokio::test]
    async fn presumed_calls_of_former_owners_count_against_no_budget() {
        let (budget, books) = books(3);
        books.lost(vec![row(0.4, true)]);
        assert_eq!(books.close(Code::StageTimeout).len(), 3, "it is booked");
        assert_eq!(budget.set_aside(Usd::from_dollars(1.0)).await, Ok(()));
    }
}
