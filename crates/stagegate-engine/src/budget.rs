//! A run's budget: owns the money that is spent, and the money that is reserved for calls under way. No call starts if the
//! two together would pass the limit; presumed costs do not count ([`Budget::pass_over`]).

use std::sync::{Mutex, MutexGuard, PoisonError};

use stagegate_core::Usd;
use tokio::sync::Notify;

/// The budget of one run, shared by its attempts.
#[derive(Debug)]
pub(crate) struct Budget {
    max: Usd,
    sums: Mutex<Sums>,
    /// Something was given back or spent.
    changed: Notify,
}

#[derive(Debug, Default)]
struct Sums {
    spent: Usd,
    set_aside: Usd,
}

/// Whether an amount fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Room {
    /// It is reserved now.
    Taken,
    /// It does not fit beside the reservations of calls under way; it may fit when they have ended.
    Later,
    /// It does not fit beside the money that is spent; this much is left.
    Never(Usd),
}

impl Budget {
    /// A budget of `max`, of which `spent` is spent already.
    pub(crate) fn new(max: Usd, spent: Usd) -> Self {
        Self { max, sums: Mutex::new(Sums { spent, set_aside: Usd::ZERO }), changed: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Sums> {
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves the worst case of a call. Waits while only the reservations of other calls are in its way. Fails, with the
    /// money that is left, if it does not fit beside the money that is spent.
    pub(crate) async fn set_aside(&self, worst: Usd) -> Result<(), Usd> {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            // Before the look, so that no change between the look and the wait is missed.
            changed.as_mut().enable();
            match self.try_set_aside(worst) {
                Room::Taken => return Ok(()),
                Room::Never(left) => return Err(left),
                Room::Later => changed.await,
            }
        }
    }

    fn try_set_aside(&self, worst: Usd) -> Room {
        let mut sums = self.lock();
        if sums.spent + worst > self.max {
            return Room::Never((self.max - sums.spent).max(Usd::ZERO));
        }
        if sums.spent + sums.set_aside + worst > self.max {
            return Room::Later;
        }
        sums.set_aside += worst;
        Room::Taken
    }

    /// Ends a call: returns its reservation, and spends its cost.
    pub(crate) fn settle(&self, worst: Usd, cost: Usd) {
        {
            let mut sums = self.lock();
            sums.set_aside = sums.set_aside - worst;
            sums.spent += cost;
        }
        self.changed.notify_waiters();
    }

    /// Marks a part of the spent money as presumed: calls that former owners of the run may have made. Former owners had
    /// reserved it, and whether they spent it stays unknown. So it refuses no call that fits beside the certain costs.
    pub(crate) fn pass_over(&self, presumed: Usd) {
        self.settle(Usd::ZERO, Usd::ZERO - presumed);
    }

    /// Spends money without a reservation.
    pub(crate) fn spend(&self, cost: Usd) {
        self.settle(Usd::ZERO, cost);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures::FutureExt;

    use super::*;

    fn usd(dollars: f64) -> Usd {
        Usd::from_dollars(dollars)
    }

    #[tokio::test]
    async fn a_call_waits_for_its_siblings_and_fails_on_spent_money() {
        let budget = Arc::new(Budget::new(usd(1.0), usd(0.2)));
        budget.set_aside(usd(0.5)).await.expect("fits");
        let mut second = std::pin::pin!(budget.set_aside(usd(0.5)));
        assert!(second.as_mut().now_or_never().is_none(), "it waits for its sibling");
        let third = budget.set_aside(usd(0.9)).await;
        assert_eq!(third, Err(usd(0.8)), "what is spent never comes back");
        budget.settle(usd(0.5), usd(0.1));
        assert_eq!(second.await, Ok(()));
    }

    #[tokio::test]
    async fn a_call_that_waited_fails_when_its_siblings_have_spent_the_budget() {
        let budget = Budget::new(usd(1.0), Usd::ZERO);
        budget.set_aside(usd(0.6)).await.expect("fits");
        let mut second = std::pin::pin!(budget.set_aside(usd(0.6)));
        assert!(second.as_mut().now_or_never().is_none());
        budget.settle(usd(0.6), usd(0.6));
        assert_eq!(second.await, Err(usd(0.4)));
    }

    #[tokio::test]
    async fn an_overspent_budget_has_nothing_left() {
        let budget = Budget::new(usd(1.0), usd(1.5));
        assert_eq!(budget.set_aside(usd(0.1)).await, Err(Usd::ZERO));
    }
}
