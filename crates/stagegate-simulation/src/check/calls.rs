//! Calls: what was bought, whether it had to be, and whether anybody still wanted it.

use std::collections::{BTreeMap, BTreeSet};

use stagegate_core::{
    Checkpoint, Origin, RunId, StageId, Totals, Verdict,
    store::{Commit, Committed},
};

use super::{Checked, Checks, Promise};
use crate::{cache::mark, store::State};

/// What the dearest call of a simulated provider costs, in nano-dollars.
const DEAREST_CALL_NANOS: i64 = 134_000;

/// How long a process may go without the shared cache after it failed there: the breaker's time and its probe.
const CACHE_SPARED_MS: i64 = 12_000;
/// What a heartbeat and a reading of signals take where nothing is wrong.
const HEARING_MS: i64 = 150;

type Key = [u8; 32];

/// What is known of calls and of the shared cache.
#[derive(Debug, Default)]
pub(super) struct Calls {
    /// By number.
    made: BTreeMap<u64, Call>,
    /// Where the answers to a request are kept, as far as one was.
    keys: BTreeMap<u64, BTreeSet<Key>>,
    /// What the cache holds: whose answer, and since when.
    entries: BTreeMap<Key, (u64, i64)>,
    /// When a process last looked under a key.
    looked: BTreeMap<(usize, Key), i64>,
    /// When a process last failed to reach the cache.
    failed: BTreeMap<usize, i64>,
    /// What the provider charged, by the tag of the runs that asked.
    charged: BTreeMap<String, Charged>,
    /// The cache lost something, or a process did without it.
    lost: bool,
}

/// What the provider charged for the runs of one tag, in nano-dollars.
#[derive(Debug, Default, Clone, Copy)]
struct Charged {
    all: i64,
    /// For calls of processes that had lost the lease before they asked: no owner is left that could book them.
    unowned: i64,
    /// For judges.
    judges: i64,
}

#[derive(Debug)]
struct Call {
    request: u64,
    started: i64,
    judges: bool,
    /// Its process holds the lease of a run of this tag, as far as can be told.
    owned: bool,
    /// The answer arrived, and can be used.
    received: bool,
    /// It reached the shared cache.
    cached: bool,
}

impl Calls {
    /// Whether the cache was there for a process all the time since then, and not being spared.
    fn reached_cache(&self, process: usize, since: i64) -> bool {
        self.failed.get(&process).is_none_or(|at| since - at > CACHE_SPARED_MS)
    }
}

impl Checks {
    /// A request leaves a process.
    pub(crate) fn call_starts(&mut self, process: usize, call: u64, request: u64, tag: &str, stage: &str) -> Checked {
        let holds = |run: &RunId| {
            let holder = self.runs.get(run).and_then(|book| book.holder);
            holder.is_some_and(|(replica, _)| self.processes.get(&replica) == Some(&process))
        };
        let owned = self.tags.get(tag).is_some_and(|runs| runs.iter().all(holds));
        let (judges, started) = (stage.starts_with("judge-"), self.now_ms);
        self.calls.made.insert(call, Call { request, started, judges, owned, received: false, cached: false });
        self.is_needed(process, call, request)?;
        let stage = stage.strip_prefix("judge-").unwrap_or(stage);
        let Ok(stage) = StageId::new(stage) else { return Ok(()) };
        let runs = self.tags.get(tag).cloned().unwrap_or_default();
        let may = |run| {
            let started = self.runs.get(&run).is_some_and(|book| book.started.contains(&stage));
            started && self.missing_need(run, &stage).is_none()
        };
        if !runs.iter().any(|run| may(*run)) {
            let what = format!("call {call} of {tag}/{stage} started before the stage's start was durable");
            return self.broken(Promise::Order, what);
        }
        // Of a tag that two runs share, nobody knows whose call it is.
        let [run] = runs.as_slice() else { return Ok(()) };
        if owned {
            self.may_go_on(*run, "made a call")?;
        }
        let Some(cancel_at) = self.runs.get(run).and_then(|book| book.cancel_at) else { return Ok(()) };
        let heartbeat = self.ttl_ms / 3 + HEARING_MS;
        let disturbed = self.disturbed.get(&process).is_some_and(|at| *at >= cancel_at - heartbeat);
        if self.now_ms > cancel_at + heartbeat && !disturbed {
            let late = self.now_ms - cancel_at;
            return self
                .broken(Promise::CancelIsObeyed, format!("call {call} of {tag}/{stage} {late} ms after the cancel"));
        }
        Ok(())
    }

    /// Whether an answer to the same request lay in the cache where this process could have found it.
    fn is_needed(&self, process: usize, call: u64, request: u64) -> Checked {
        if !self.calls.reached_cache(process, self.now_ms) {
            return Ok(());
        }
        for key in self.calls.keys.get(&request).into_iter().flatten() {
            let Some((bought, at)) = self.calls.entries.get(key) else { continue };
            let looked_before = self.calls.looked.get(&(process, *key)).is_some_and(|looked| looked <= at);
            if self.calls.made.get(bought).is_some_and(|made| made.request == request) && !looked_before {
                let what =
                    format!("call {call} buys again what call {bought} bought and the cache holds since {at} ms");
                return self.broken(Promise::CrashBuysNothingTwice, what);
            }
        }
        Ok(())
    }

    /// The provider will charge for a call, whether or not anybody hears the answer.
    pub(crate) fn charges(&mut self, call: u64, tag: &str, nanos: i64) {
        let charged = self.calls.charged.entry(tag.to_owned()).or_default();
        charged.all += nanos;
        let Some(made) = self.calls.made.get(&call) else { return };
        if !made.owned {
            charged.unowned += nanos;
        } else if made.judges {
            charged.judges += nanos;
        }
    }

    /// After the end, for the runs of each tag: the provider charged what is booked as known, and every charge is booked, at
    /// its worst case if its answer was never received. The exceptions are those that docs/durability.md names, and no others.
    pub(super) fn money(&self, state: &State) -> Checked {
        for (tag, runs) in &self.tags {
            let rows = runs.iter().filter_map(|run| state.runs.get(run));
            let attempts = rows.flat_map(|row| row.attempts.values().flat_map(|all| all.values()));
            let mut totals = Totals::default();
            attempts.flat_map(|attempt| &attempt.calls).for_each(|call| totals.add(call));
            let known = (totals.cost_usd - totals.unknown_usd).nanos();
            let Charged { all: charged, unowned, judges } = self.calls.charged.get(tag).copied().unwrap_or_default();
            // A judge's call of an owner whose answer the cache lost, so that its successor looks no further than that: one a
            // take-over at most, times what can be under way side by side.
            let take_overs: i64 = runs.iter().filter_map(|run| state.runs.get(run)).map(|row| row.epoch.0 - 1).sum();
            let hidden = if self.calls.lost { judges.min(take_overs.max(0) * DEAREST_CALL_NANOS) } else { 0 };
            let unbooked = runs.iter().any(|run| self.given_up_unbooked.contains(run));
            if known > charged || (totals.cost_usd.nanos() + unowned + hidden < charged && !unbooked) {
                let what = format!(
                    "{charged} nano-dollars were charged to {tag} ({unowned} without a lease, {judges} for judges), whose runs \
                     are booked {totals:?}"
                );
                return self.broken(Promise::MoneyIsExact, what);
            }
        }
        Ok(())
    }

    /// An answer arrives, or the news that there is none.
    pub(crate) fn call_ends(&mut self, call: u64, usable: bool, answered: bool) {
        if let Some(made) = self.calls.made.get_mut(&call) {
            made.received = usable && answered;
        }
    }

    /// A step was written: what it bought must be in the cache by now.
    pub(crate) fn bought(&self, process: usize, commit: &Commit, answer: Committed) -> Checked {
        if answer != Committed::Now {
            return Ok(());
        }
        // What a person approved was bought by an earlier step.
        let bought_now =
            |checkpoint: &Checkpoint| checkpoint.origin == Origin::Provider && checkpoint.verdict != Verdict::Approved;
        let checkpoints = commit.checkpoints.iter().filter(|(_, checkpoint)| bought_now(checkpoint));
        let attempts = commit.attempts.iter().filter(|(_, attempt)| {
            attempt.calls.first().is_some_and(|call| call.origin == Origin::Provider && call.error.is_none())
        });
        let outputs = checkpoints.map(|(stage, checkpoint)| (stage, Some(&checkpoint.output)));
        let outputs = outputs.chain(attempts.map(|(stage, attempt)| (stage, attempt.output.as_ref())));
        for (stage, output) in outputs {
            let Some(call) = output.and_then(|output| mark(&output.to_string())) else { continue };
            let missing =
                |made: &Call| made.received && !made.cached && self.calls.reached_cache(process, made.started);
            if self.calls.made.get(&call).is_some_and(missing) {
                let run = self.name(commit.lease.run);
                let what = format!("{run}/{stage} was committed before the answer of call {call} was in the cache");
                return self.broken(Promise::CrashBuysNothingTwice, what);
            }
        }
        Ok(())
    }

    pub(crate) fn cache_failed(&mut self, process: usize) {
        self.calls.failed.insert(process, self.now_ms);
        self.calls.lost = true;
    }

    /// A look under a key, and whether it found something. What is found need not be bought, and what was acknowledged
    /// must be found.
    pub(crate) fn cache_looked(&mut self, process: usize, key: Key, found: bool) -> Checked {
        self.calls.looked.insert((process, key), self.now_ms);
        match self.calls.entries.get(&key) {
            Some((call, at)) if !found => {
                let what = format!("the answer of call {call}, cached at {at} ms, is not found");
                self.broken(Promise::CrashBuysNothingTwice, what)
            }
            _ => Ok(()),
        }
    }

    /// An answer was stored. The first time tells its own key; a copy under another request's key is passed over.
    pub(crate) fn cache_put(&mut self, key: Key, mark: Option<u64>, counts: bool) {
        let (now, calls) = (self.now_ms, &mut self.calls);
        let Some((call, made)) = mark.and_then(|mark| Some((mark, calls.made.get_mut(&mark)?))) else { return };
        if !std::mem::replace(&mut made.cached, true) {
            calls.keys.entry(made.request).or_default().insert(key);
        }
        if counts {
            calls.entries.insert(key, (call, now));
        }
    }

    pub(crate) fn cache_evicted(&mut self, key: Key) {
        self.calls.entries.remove(&key);
    }

    pub(crate) fn cache_flushed(&mut self) {
        self.calls.entries.clear();
        self.calls.lost = true;
    }
}
