//! Turns: whether whoever gets a lease may have it now, by the book: its start is due, nobody of a higher priority waited
//! before it, and its limits have a slot.

use stagegate_core::{RunId, store::Lease};

use super::{Checked, Checks, Promise, runs::Book};

impl Checks {
    /// A claim is about to take these.
    pub(super) fn in_turn(&self, leases: &[Lease]) -> Checked {
        let is_taken = |run: &RunId| leases.iter().any(|lease| lease.run == *run);
        // What is to be cancelled goes before all others.
        for book in leases.iter().filter_map(|lease| self.runs.get(&lease.run)).filter(|book| book.cancel_at.is_none())
        {
            // Runs of one lane have the same limits: what leaves room for one leaves it for the other.
            let lane = |book: &Book| book.limits.lane(&book.pipeline);
            let passed_over = self.runs.iter().find(|(run, other)| {
                !is_taken(run)
                    && other.priority > book.priority
                    && lane(other) == lane(book)
                    && other.holder.is_none()
                    && other.claimable_at.is_some_and(|at| at <= self.now_ms)
            });
            if let Some((_, other)) = passed_over {
                let what = format!("{} was taken and {} passed over", book.name, other.name);
                return self.broken(Promise::PriorityIsKept, what);
            }
        }
        Ok(())
    }

    /// A run that is to start later may be taken before to be cancelled, for nothing else. The store's clock counts.
    pub(super) fn is_due(&self, book: &Book) -> Checked {
        match book.starts_at {
            Some(at) if self.now_ms < at && book.cancel_at.is_none() => {
                let what = format!("{} began {} ms before it was to start", book.name, at - self.now_ms);
                self.broken(Promise::StartIsKept, what)
            }
            _ => Ok(()),
        }
    }

    /// A lease began. It must be due, and not one too many for a limit of its run, unless it is only to be cancelled:
    /// then it does no work.
    pub(super) fn may_begin(&self, run: RunId) -> Checked {
        let Some(book) = self.runs.get(&run) else { return Ok(()) };
        self.is_due(book)?;
        if book.cancel_at.is_some() {
            return Ok(());
        }
        let beside =
            |other: &&Book| other.pipeline == book.pipeline && other.cancel_at.is_none() && self.is_held(other);
        let live = || self.runs.values().filter(beside);
        let over = |max: u32, used: usize| used > max as usize;
        let used = live().count();
        if let Some(max) = book.limits.pipeline_max
            && over(max, used)
        {
            let what = format!("{} is one of {used} live runs of {}, which may have {max}", book.name, book.pipeline);
            return self.broken(Promise::SlotsAreLeases, what);
        }
        if let Some((key, max)) = &book.limits.key {
            let used = live().filter(|other| other.limits.key.as_ref().is_some_and(|(same, _)| same == key)).count();
            if over(*max, used) {
                let what = format!("{} is one of {used} live runs with the key {key}, which may have {max}", book.name);
                return self.broken(Promise::SlotsAreLeases, what);
            }
        }
        Ok(())
    }

    /// Whether a replica that counts as alive has this run.
    pub(super) fn is_held(&self, book: &Book) -> bool {
        book.holder.is_some_and(|(holder, _)| self.replicas.get(&holder).is_some_and(|until| *until > self.now_ms))
    }
}
