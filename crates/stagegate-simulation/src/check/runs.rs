//! Runs: leases, steps, events, ends.

use std::collections::{BTreeMap, BTreeSet};

use stagegate_core::{
    Code, Epoch, Event, EventKind, Failure, Json, ReplicaId, RunId, RunState, StageId, Totals,
    fair::Limits,
    store::{
        Commit, Committed, Disposition, Heartbeat, Lease, NewRun, NewSignal, Pulse, PutBack, SignalKind, Signalled,
        Submitted,
    },
};

use super::{Checked, Checks, Promise, crashes::Crashes};
use crate::store::{EPOCH_MS, State};

/// How far a replica's time may be from the database's, at most: what an answer takes that is slow.
const CLOCK_ERROR_MAX_MS: i64 = 2_000;

/// What is known of a run.
#[derive(Debug)]
pub(super) struct Book {
    pub(super) name: String,
    pub(super) pipeline: stagegate_core::PipelineName,
    /// When it expires, in milliseconds of the world.
    pub(super) deadline_ms: i64,
    pub(super) cancel_at: Option<i64>,
    pub(super) checkpoints: BTreeSet<StageId>,
    pub(super) started: BTreeSet<StageId>,
    pub(super) limits: Limits,
    pub(super) priority: i16,
    /// Before this it does not start, in milliseconds of the world; None from a retry on, which begins at once.
    pub(super) starts_at: Option<i64>,
    /// From when on it can be claimed while nobody holds it, where that is known.
    pub(super) claimable_at: Option<i64>,
    pub(super) holder: Option<(ReplicaId, Epoch)>,
    pub(super) crashes: Crashes,
    top_epoch: Epoch,
    pub(super) last_seq: u64,
    /// The newest step whose author was told that it is durable.
    acknowledged: u64,
    ended: bool,
    /// The edited outputs that were accepted, by stage and attempt.
    edits: BTreeMap<(StageId, u32), Json>,
    /// How far each watcher got.
    watchers: Vec<u64>,
}

impl Book {
    /// Nobody has it any more; it can be claimed from now on.
    fn hand_back(&mut self, now_ms: i64) {
        (self.holder, self.claimable_at) = (None, Some(now_ms));
    }
}

/// Whether a failure says that no answer came, for a reason that passes with the storm.
fn is_outage(failure: &Failure) -> bool {
    const CODES: [Code; 6] = [
        Code::ProviderUnreachable,
        Code::ProviderRateLimited,
        Code::ProviderFailed,
        Code::ProviderTimeout,
        Code::BreakerOpen,
        Code::StageTimeout,
    ];
    let exhausted = failure.code == Code::AttemptsExhausted;
    CODES.iter().any(|code| *code == failure.code || (exhausted && failure.message.contains(code.as_str())))
}

impl Checks {
    pub(crate) fn submitted(&mut self, new: &NewRun, answer: &Submitted) -> Checked {
        let Submitted::Accepted(epoch) = answer else { return Ok(()) };
        if self.runs.contains_key(&new.id) {
            return Ok(());
        }
        let leased = epoch.is_some();
        let events = if leased || new.lease_to.is_none() { &new.events[..] } else { &new.events[..1] };
        let tag = new.input.parse().get("tag").and_then(serde_json::Value::as_str).unwrap_or_default().to_owned();
        let name = format!("run{}({tag})", self.runs.len() + 1);
        let starts_at = new.start_at.map(|at| at.timestamp_millis() - EPOCH_MS);
        let mut book = Book {
            name,
            pipeline: new.pipeline.clone(),
            limits: new.limits.clone(),
            priority: new.priority,
            starts_at,
            claimable_at: Some(starts_at.map_or(self.now_ms, |at| at.max(self.now_ms))),
            deadline_ms: new.deadline_at.timestamp_millis() - EPOCH_MS,
            cancel_at: None,
            checkpoints: BTreeSet::new(),
            started: BTreeSet::new(),
            holder: new.lease_to.zip(*epoch),
            crashes: Crashes::default(),
            top_epoch: epoch.unwrap_or(Epoch(0)),
            last_seq: events.len() as u64,
            acknowledged: 0,
            ended: false,
            edits: BTreeMap::new(),
            watchers: Vec::new(),
        };
        for event in events {
            if let EventKind::StageStarted { stage, .. } = &event.kind {
                book.started.insert(stage.clone());
            }
        }
        self.tags.entry(tag).or_default().push(new.id);
        self.runs.insert(new.id, book);
        if leased { self.may_begin(new.id) } else { Ok(()) }
    }

    pub(crate) fn claimed(&mut self, replica: ReplicaId, leases: &[Lease]) -> Checked {
        self.in_turn(leases)?;
        for lease in leases {
            let Some(book) = self.runs.get(&lease.run) else { continue };
            if lease.epoch <= book.top_epoch {
                let what =
                    format!("{} was taken under epoch {}, not above {}", book.name, lease.epoch.0, book.top_epoch.0);
                return self.broken(Promise::OneOwner, what);
            }
            if let Some((_, epoch)) = book.holder.filter(|_| self.is_held(book)) {
                let what = format!("{} was taken while the lease under epoch {} was alive", book.name, epoch.0);
                return self.broken(Promise::OneOwner, what);
            }
            if book.holder.is_some() {
                // Its owner was out of time.
                self.owner_crashed(lease.run);
            }
            if let Some(book) = self.runs.get_mut(&lease.run) {
                (book.holder, book.top_epoch) = (Some((replica, lease.epoch)), lease.epoch);
            }
            self.may_begin(lease.run)?;
        }
        Ok(())
    }

    pub(crate) fn beat(&mut self, process: usize, beat: &Heartbeat, pulse: &Pulse) {
        self.processes.insert(beat.replica, process);
        if pulse.alive {
            let ttl = i64::try_from(beat.ttl.as_millis()).unwrap_or(i64::MAX);
            self.replicas.insert(beat.replica, self.now_ms + ttl);
        }
    }

    pub(crate) fn released(&mut self, leases: &[Lease]) {
        for lease in leases.iter().filter(|lease| self.is_holder(**lease)).collect::<Vec<_>>() {
            self.owner_may_have_crashed(lease.run);
            if let Some(book) = self.runs.get_mut(&lease.run) {
                book.hand_back(self.now_ms);
            }
        }
    }

    pub(crate) fn put_back(&mut self, back: &[PutBack]) {
        for PutBack { lease, after, crashed } in back {
            if !self.is_holder(*lease) {
                continue;
            }
            if *crashed {
                self.owner_crashed(lease.run);
            } else {
                self.owner_may_have_crashed(lease.run);
            }
            if let Some(book) = self.runs.get_mut(&lease.run) {
                book.hand_back(self.now_ms.saturating_add(i64::try_from(after.as_millis()).unwrap_or(i64::MAX)));
            }
        }
    }

    pub(crate) fn left(&mut self, replica: ReplicaId) {
        let is_held = |book: &Book| book.holder.is_some_and(|(holder, _)| holder == replica);
        let held: Vec<RunId> = self.runs.iter().filter(|(_, book)| is_held(book)).map(|(run, _)| *run).collect();
        for run in held {
            self.owner_may_have_crashed(run);
            if let Some(book) = self.runs.get_mut(&run) {
                book.hand_back(self.now_ms);
            }
        }
        self.replicas.remove(&replica);
    }

    fn is_holder(&self, lease: Lease) -> bool {
        let holder = self.runs.get(&lease.run).and_then(|book| book.holder);
        holder.is_some_and(|(_, epoch)| epoch == lease.epoch)
    }

    pub(crate) fn signalled(&mut self, signal: &NewSignal, answer: &Signalled) {
        let now = self.now_ms;
        if let (Some(book), Signalled::Accepted { .. }) = (self.runs.get_mut(&signal.run), answer) {
            if let SignalKind::Approve { stage, attempt: Some(attempt), output: Some(edited), .. } = &signal.kind {
                book.edits.insert((stage.clone(), *attempt), edited.clone());
            }
            match signal.kind {
                SignalKind::Retry { .. } => {
                    (book.cancel_at, book.starts_at) = (None, None);
                    book.hand_back(now);
                }
                // A second one wakes nobody.
                SignalKind::Cancel if book.cancel_at.is_some() => {}
                SignalKind::Cancel => (book.cancel_at, book.claimable_at) = (Some(now), Some(now)),
                SignalKind::Approve { .. } | SignalKind::Reject { .. } | SignalKind::Unknown(_) => {
                    book.claimable_at = Some(now);
                }
            }
        }
    }

    /// A step reached the store. `ledger` is the sum of the run's rows after it.
    pub(crate) fn committed(&mut self, commit: &Commit, answer: Committed, ledger: Option<Totals>) -> Checked {
        if answer != Committed::Now {
            return Ok(());
        }
        let (run, now) = (commit.lease.run, self.now_ms);
        let Some(book) = self.runs.get(&run) else { return Ok(()) };
        let (name, first) = (book.name.clone(), commit.events.first().map_or(0, |event| event.seq));
        if first <= book.acknowledged && book.holder.is_some_and(|(_, epoch)| epoch == commit.lease.epoch) {
            let what = format!("{name} goes on after {} though {} was acknowledged", first - 1, book.acknowledged);
            return self.broken(Promise::AcknowledgedMeansDurable, what);
        }
        if book.holder.is_none_or(|(_, epoch)| epoch != commit.lease.epoch) {
            let what = format!("{name} was written under the stale epoch {}", commit.lease.epoch.0);
            return self.broken(Promise::OneOwner, what);
        }
        if first != book.last_seq + 1 {
            let what = format!("{name} has event {first} after {}", book.last_seq);
            return self.broken(Promise::EventsAreComplete, what);
        }
        for (stage, checkpoint) in &commit.checkpoints {
            let edited = book.edits.get(&(stage.clone(), checkpoint.attempt));
            if edited.is_some_and(|edited| *edited != checkpoint.output) {
                let what = format!("{name}/{stage} was approved with an edited output, and has another");
                return self.broken(Promise::EditsAreKept, what);
            }
        }
        for event in &commit.events {
            self.event(run, event)?;
            if let EventKind::RunFinished { state, failure, .. } = &event.kind {
                self.may_end(run, first - 1, *state, failure.as_ref())?;
            }
        }
        if let Some(ledger) = ledger
            && ledger != commit.totals
        {
            let what = format!("{name} took {:?}, its ledger says {ledger:?}", commit.totals);
            return self.broken(Promise::TotalsAddUp, what);
        }
        if let Some(book) = self.runs.get_mut(&run)
            && commit.then != Disposition::Keep
        {
            book.holder = None;
            book.claimable_at = match commit.then {
                Disposition::Park(Some(delay)) => i64::try_from(delay.as_millis()).ok().map(|delay| now + delay),
                _ => None,
            };
        }
        Ok(())
    }

    fn event(&mut self, run: RunId, event: &Event) -> Checked {
        let now = self.now_ms;
        let Some(book) = self.runs.get_mut(&run) else { return Ok(()) };
        book.last_seq = event.seq;
        let name = book.name.clone();
        let retried = matches!(event.kind, EventKind::RunRetried { .. });
        if book.ended != retried {
            let what = if retried { "was retried before its end" } else { "went on after its end" };
            return self.broken(Promise::AcceptedMeansFinished, format!("{name} {what}: {}", event.kind.name()));
        }
        match &event.kind {
            EventKind::RunFinished { state, failure, .. } => {
                book.ended = true;
                // No world lasts as long as an outage is waited out.
                if *state == RunState::Failed
                    && let Some(failure) = failure.as_ref().filter(|failure| is_outage(failure))
                {
                    let what = format!("{name} failed by an outage: {}: {}", failure.code, failure.message);
                    return self.broken(Promise::OutagesPass, what);
                }
                let early_ms = book.deadline_ms - now;
                if *state == RunState::Expired && early_ms > CLOCK_ERROR_MAX_MS {
                    return self.broken(Promise::DeadlineIsKept, format!("{name} expired {early_ms} ms too early"));
                }
            }
            EventKind::RunRetried { .. } => {
                // Its new deadline is not told here: it is taken for any.
                (book.ended, book.deadline_ms) = (false, i64::MIN / 2);
            }
            EventKind::StageStarted { stage, .. } => {
                book.started.insert(stage.clone());
                if let Some(book) = self.runs.get(&run) {
                    self.is_due(book)?;
                }
                self.may_go_on(run, "started a stage")?;
                if let Some(need) = self.missing_need(run, stage) {
                    return self
                        .broken(Promise::Order, format!("{name}/{stage} started before {need} had its checkpoint"));
                }
            }
            EventKind::StageSucceeded { stage, .. } if !book.checkpoints.insert(stage.clone()) => {
                return self.broken(Promise::Order, format!("{name}/{stage} succeeded a second time"));
            }
            _ => {}
        }
        Ok(())
    }

    /// A need of a stage that has no checkpoint.
    pub(super) fn missing_need(&self, run: RunId, stage: &StageId) -> Option<StageId> {
        let book = self.runs.get(&run)?;
        let needs = self.dags.get(&book.pipeline)?.get(stage)?;
        needs.iter().find(|need| !book.checkpoints.contains(*need)).cloned()
    }

    /// The author of a step was told that it is durable.
    pub(crate) fn acknowledged(&mut self, commit: &Commit, answer: Committed) {
        if let (Some(book), Some(last)) = (self.runs.get_mut(&commit.lease.run), commit.events.last())
            && answer != Committed::Stale
        {
            book.acknowledged = book.acknowledged.max(last.seq);
        }
    }

    /// An owner was told that it is not one though its step had been committed under its lease.
    pub(crate) fn repeated(&self, commit: &Commit, answer: Committed) -> Checked {
        let Some(book) = self.runs.get(&commit.lease.run) else { return Ok(()) };
        let ours = book.holder.is_some_and(|(_, epoch)| epoch == commit.lease.epoch);
        let there = commit.events.last().is_some_and(|last| last.seq == book.last_seq);
        if answer == Committed::Stale && ours && there {
            let what = format!("{}: the owner's repeated step was told to be stale", book.name);
            return self.broken(Promise::OneOwner, what);
        }
        Ok(())
    }

    /// A new watcher of a run; it says how far it got under this number.
    pub(crate) fn watch(&mut self, run: RunId) -> usize {
        self.runs.get_mut(&run).map_or(0, |book| {
            book.watchers.push(0);
            book.watchers.len() - 1
        })
    }

    pub(crate) fn watched(&mut self, run: RunId, watcher: usize, events: &[Event]) -> Checked {
        for event in events {
            let Some(seen) = self.runs.get_mut(&run).and_then(|book| book.watchers.get_mut(watcher)) else {
                return Ok(());
            };
            let (before, now) = (*seen, event.seq);
            *seen = now;
            if now != before + 1 {
                let what = format!("a watcher of {} saw event {now} after {before}", self.name(run));
                return self.broken(Promise::EventsAreComplete, what);
            }
        }
        Ok(())
    }

    /// Everything is over.
    pub(crate) fn finish(&self, state: &State, accepted: &[RunId]) -> Checked {
        for run in accepted {
            if !state.runs.contains_key(run) {
                return self.broken(Promise::AcceptedMeansFinished, format!("{run} was accepted and is not there"));
            }
        }
        for (run, book) in &self.runs {
            let Some(row) = state.runs.get(run) else { continue };
            let gap_free = row.events.iter().zip(1..).all(|(event, seq)| event.seq == seq);
            if !gap_free || row.record.last_seq != row.events.len() as u64 {
                return self.broken(Promise::EventsAreComplete, format!("{} has gaps in its events", book.name));
            }
            if row.record.last_seq < book.acknowledged {
                let (is, was) = (row.record.last_seq, book.acknowledged);
                let what = format!("{} ends at event {is} though {was} was acknowledged", book.name);
                return self.broken(Promise::AcknowledgedMeansDurable, what);
            }
            if !book.ended || !row.record.state.is_terminal() {
                return self.broken(Promise::AcceptedMeansFinished, format!("{} has no end", book.name));
            }
            if let Some(seen) = book.watchers.iter().find(|seen| **seen != book.last_seq) {
                let what = format!("a watcher of {} saw {seen} of {} events", book.name, book.last_seq);
                return self.broken(Promise::EventsAreComplete, what);
            }
        }
        self.money(state)
    }

    /// Time is up.
    pub(crate) fn stuck(&self, state: &State) -> Checked {
        let stuck = state.runs.values().filter(|row| !row.record.state.is_terminal());
        let crashes = stuck.clone().any(|row| self.may_go_on(row.record.id, "goes on").is_err());
        let promise = if crashes { Promise::CrashersEnd } else { Promise::AcceptedMeansFinished };
        let stuck: Vec<String> = stuck
            .map(|row| {
                let stages: Vec<String> =
                    row.stages.values().map(|stage| format!("{} {}", stage.id, stage.state.as_str())).collect();
                let (state, owned) = (row.record.state.as_str(), row.owner.is_some());
                format!("{} ({state}, owned: {owned}; {})", self.name(row.record.id), stages.join(", "))
            })
            .collect();
        self.broken(promise, format!("stuck: {}", stuck.join("; ")))
    }
}
