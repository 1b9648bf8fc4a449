//! A run's budget: owns what is spent and what is set aside for calls under way. Spent and set aside together never pass
//! the limit by a call that could have been held back.

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
    /// It is set aside now.
    Taken,
    /// Not beside what is set aside for calls under way; perhaps when they have ended.
    Later,
    /// Not beside what is spent; so much is left.
    Never(Usd),
}

impl Budget {
    /// A budget of which `spent` is gone.
    pub(crate) fn new(max: Usd, spent: Usd) -> Self {
        Self { max, sums: Mutex::new(Sums { spent, set_aside: Usd::ZERO }), changed: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Sums> {
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the worst case of a call aside. Waits while only what is set aside for others is in its way; fails, with what
    /// is left, where it does not fit beside what is spent.
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

    /// A call has ended: what was set aside for it is given back, and what it cost is spent.
    pub(crate) fn settle(&self, worst: Usd, cost: Usd) {
        {
            let mut sums = self.lock();
            sums.set_aside = sums.set_aside - worst;
            sums.spent += cost;
        }
        self.changed.notify_waiters();
    }

    /// So much of what is spent is presumed: calls that former owners of the run may have made. They had set it aside, so that
    /// it was theirs to spend, and whether they spent it never turns out: a call that fits beside what is certain is not
    /// refused for it.
    pub(crate) fn pass_over(&self, presumed: Usd) {
        self.settle(Usd::ZERO, Usd::ZERO - presumed);
    }

    /// Spends what nothing was set aside for.
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
    async fn a_call_waits_for_its_siblings_and_not_for_what_is_spent() {
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
    async fn what_is_overspent_leaves_nothing() {
        let budget = Budget::new(usd(1.0), usd(1.5));
        assert_eq!(budget.set_aside(usd(0.1)).await, Err(Usd::ZERO));
    }
}
