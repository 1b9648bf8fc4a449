//! Limits: how many live leases there are beside a new one, by the book.

use stagegate_core::RunId;

use super::{Checked, Checks, Promise, runs::Book};

impl Checks {
    /// A lease began. Where it is one too many for a limit of its run, there is no slot for it.
    pub(super) fn has_slot(&self, run: RunId) -> Checked {
        let Some(book) = self.runs.get(&run) else { return Ok(()) };
        let beside = |other: &&Book| other.pipeline == book.pipeline && self.is_held(other);
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
