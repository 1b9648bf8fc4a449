//! A run's budget: owns what is spent and what is reserved. A call starts only if its worst case still fits.

use std::sync::{Arc, Mutex, PoisonError};

use stagegate_core::Usd;

/// The budget of one run, shared by its attempts.
#[derive(Debug)]
pub(crate) struct Budget {
    max: Usd,
    taken: Mutex<Usd>,
}

impl Budget {
    /// A budget of which `spent` is gone.
    pub(crate) fn new(max: Usd, spent: Usd) -> Arc<Self> {
        Arc::new(Self { max, taken: Mutex::new(spent) })
    }

    /// Reserves the worst case of a call, or tells what is left.
    pub(crate) fn reserve(self: &Arc<Self>, worst: Usd) -> Result<Reservation, Usd> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if *taken + worst > self.max {
            return Err(self.max - *taken);
        }
        *taken += worst;
        Ok(Reservation { budget: Arc::clone(self), worst, cost: worst })
    }
}

/// What a call under way may cost at most. Settled with what it did cost; abandoned, its worst case stays taken,
/// for the provider may have charged it.
#[derive(Debug)]
pub(crate) struct Reservation {
    budget: Arc<Budget>,
    worst: Usd,
    cost: Usd,
}

impl Reservation {
    /// The call is over, and this is what it cost.
    pub(crate) fn settle(mut self, cost: Usd) {
        self.cost = cost;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut taken = self.budget.taken.lock().unwrap_or_else(PoisonError::into_inner);
        *taken = *taken - self.worst + self.cost;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn concurrent_calls_cannot_pass_the_budget_together() {
        let budget = Budget::new(Usd::from_dollars(1.0), Usd::from_dollars(0.2));
        let first = budget.reserve(Usd::from_dollars(0.5)).expect("fits");
        assert_eq!(budget.reserve(Usd::from_dollars(0.5)).expect_err("0.3 is left"), Usd::from_dollars(0.3));
        first.settle(Usd::from_dollars(0.1));
        assert!(budget.reserve(Usd::from_dollars(0.7)).is_ok());
    }

    #[test]
    fn an_abandoned_call_stays_taken() {
        let budget = Budget::new(Usd::from_dollars(1.0), Usd::ZERO);
        drop(budget.reserve(Usd::from_dollars(0.6)).expect("fits"));
        assert!(budget.reserve(Usd::from_dollars(0.6)).is_err());
    }
}
