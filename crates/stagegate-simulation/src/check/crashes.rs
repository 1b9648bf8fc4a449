//! Crashes: how many owners of a run crashed in a row, by the book, and what becomes of the run after too many of them.

use stagegate_core::{Code, Failure, ReplicaId, RunId, RunState};

use super::{Checked, Checks, Promise};
use crate::crasher::Moment;

/// Owners of a run that crashed in a row without any progress of the run between.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Streak {
    crashes: u32,
    /// Of them, those that no crasher caused.
    by_storm: u32,
    /// The run's last event at the last crash.
    last_seq: Option<u64>,
}

impl Streak {
    /// An owner's first step may be nothing but `run.resumed`; more is progress.
    fn so_far(self, last_seq: u64) -> Self {
        if self.last_seq.is_some_and(|at| last_seq <= at + 1) { self } else { Self::default() }
    }

    fn grow(&mut self, last_seq: u64, by_storm: bool) {
        let Self { crashes, by_storm: storms, .. } = self.so_far(last_seq);
        *self = Self { crashes: crashes + 1, by_storm: storms + u32::from(by_storm), last_seq: Some(last_seq) };
    }
}

/// The crashes of a run's owners.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Crashes {
    /// Those that the store must count.
    least: Streak,
    /// With those that it may count: an owner that is out of time and hands a run back may have been declared dead before.
    most: Streak,
    /// How often the run itself killed its owner.
    strikes: u32,
}

impl Checks {
    /// Whether the runs of this tag crash their owners at this moment.
    pub(crate) fn crashes_at(&self, run: RunId, moment: Moment) -> bool {
        self.crasher.as_ref().is_some_and(|crasher| crasher.moment == moment) && self.is_crasher(run)
    }

    /// A crasher killed the process that this replica is a life of.
    pub(crate) fn struck(&mut self, replica: Option<ReplicaId>, run: Option<RunId>) {
        self.struck.extend(replica.filter(|replica| self.is_alive(*replica)));
        if let Some(book) = run.and_then(|run| self.runs.get_mut(&run)) {
            book.crashes.strikes += 1;
        }
    }

    fn is_alive(&self, replica: ReplicaId) -> bool {
        self.replicas.get(&replica).is_some_and(|until| *until > self.now_ms)
    }

    /// The owner of this run died or panicked over it.
    pub(super) fn owner_crashed(&mut self, run: RunId) {
        let Some(book) = self.runs.get_mut(&run) else { return };
        let by_storm = book.holder.is_some_and(|(replica, _)| !self.struck.contains(&replica));
        book.crashes.least.grow(book.last_seq, by_storm);
        book.crashes.most.grow(book.last_seq, by_storm);
    }

    /// A run was handed back by its owner. Where the owner was out of time, the store may have counted a crash before.
    pub(super) fn owner_may_have_crashed(&mut self, run: RunId) {
        let Some((replica, _)) = self.runs.get(&run).and_then(|book| book.holder) else { return };
        if !self.is_alive(replica)
            && let Some(book) = self.runs.get_mut(&run)
        {
            book.crashes.most.grow(book.last_seq, !self.struck.contains(&replica));
        }
    }

    /// Whether this run crashes its owners.
    fn is_crasher(&self, run: RunId) -> bool {
        self.crasher.as_ref().is_some_and(|crasher| self.tags.get(&crasher.tag).is_some_and(|runs| runs.contains(&run)))
    }

    /// A run goes on: it starts a stage, or makes a call.
    pub(super) fn may_go_on(&self, run: RunId, what: &str) -> Checked {
        let Some(book) = self.runs.get(&run) else { return Ok(()) };
        let Streak { crashes, .. } = book.crashes.least.so_far(book.last_seq);
        if crashes >= self.crashes_max {
            let what = format!("{} {what} after {crashes} owners had crashed", book.name);
            return self.broken(Promise::CrashersEnd, what);
        }
        Ok(())
    }

    /// A run ends in a step that follows this event.
    pub(super) fn may_end(&mut self, run: RunId, before: u64, state: RunState, failure: Option<&Failure>) -> Checked {
        let Some(book) = self.runs.get(&run) else { return Ok(()) };
        let (name, given_up) = (&book.name, failure.is_some_and(|failure| failure.code == Code::RunCrashed));
        let crasher = self.crasher.as_ref().filter(|_| self.is_crasher(run));
        // A run that its first owner ends is never loaded.
        let crasher = crasher.filter(|crasher| crasher.moment != Moment::Loads || book.crashes.strikes > 0);
        if crasher.is_some() && !given_up && !matches!(state, RunState::Cancelled | RunState::Expired) {
            let what = format!("{name}, which crashes its owners, ended as {} with {failure:?}", state.as_str());
            return self.broken(Promise::CrashersEnd, what);
        }
        if !given_up {
            return Ok(());
        }
        let Streak { crashes, by_storm, .. } = book.crashes.most.so_far(before);
        if crashes < self.crashes_max {
            let what = format!("{name} was given up after {crashes} crashes of at most {}", self.crashes_max);
            return self.broken(Promise::CrashersEnd, what);
        }
        // Several crashers can take another run with them, and the storm can; one crasher cannot.
        let crashers = self.crasher.as_ref().and_then(|crasher| self.tags.get(&crasher.tag)).map_or(0, Vec::len);
        if crasher.is_none() && by_storm == 0 && crashers <= 1 {
            let what = format!("{name} was given up, but another run crashed its {crashes} owners");
            return self.broken(Promise::CrashersEnd, what);
        }
        if crashes > self.crashes_max {
            // It was ended by its rows alone, and nothing was booked for its owners.
            self.given_up_unbooked.insert(run);
        }
        Ok(())
    }
}
