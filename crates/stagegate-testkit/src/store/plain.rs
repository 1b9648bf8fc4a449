//! Promises about what most runs are: stages that pass at once. A store may keep of them only what says the rest, and
//! nobody must be able to tell.

use std::{collections::BTreeMap, sync::Arc};

use serde_json::{Value, json};
use stagegate_core::{
    Attempt, CallPurpose, Checkpoint, Event, EventKind, Json, LedgerEntry, Origin, RunState, StageState, Store, Totals,
    Usage, Usd, Verdict,
    store::{
        Commit, Committed, Disposition, Lease, NewRun, SignalKind, Signalled, StageDetail, StageRecord, Submitted,
    },
};

use super::{
    Subject,
    fixtures::{
        Dump, NASTY, at, claim_all, commit, dump, failure, leased_run, live_replica, model, signal, stage, step,
        submit, submit_leased,
    },
};

/// An answer that was paid, or one that was found.
fn call(origin: Origin) -> LedgerEntry {
    let paid = origin == Origin::Provider;
    LedgerEntry {
        purpose: CallPurpose::Stage,
        model: model(),
        origin,
        usage: Usage { input_tokens: 250, output_tokens: 260, ..Usage::default() },
        cost_usd: Usd::from_nanos(if paid { 612_500 } else { 0 }),
        saved_usd: Usd::from_nanos(if paid { 0 } else { 612_500 }),
        unknown: false,
        priced: true,
        latency_ms: 12,
        error: None,
        rest: stagegate_core::Rest::default(),
    }
}

/// A stage that passes at its first attempt: what is written of it, and the event that tells it.
fn passed(of: &str, ms: i64, output: Value) -> (StageDetail, EventKind) {
    let origin = if of == "s2" { Origin::CacheShared } else { Origin::Provider };
    let attempt = Attempt {
        number: 1,
        started_at: at(11),
        finished_at: at(ms),
        verdict: Verdict::Passed,
        assessments: Vec::new(),
        calls: vec![call(origin)],
        output: None,
        failure: None,
        rest: stagegate_core::Rest::default(),
    };
    let mut totals = Totals::default();
    totals.add(&attempt.calls[0]);
    let record = StageRecord {
        state: StageState::Succeeded,
        attempt: 1,
        verdict: Some(Verdict::Passed),
        model: Some(model()),
        origin: Some(origin),
        totals,
        started_at: Some(at(10)),
        finished_at: Some(at(ms)),
        ..StageRecord::pending(stage(of))
    };
    let checkpoint = Checkpoint {
        output: output.into(),
        digest: "cd".repeat(32),
        attempt: 1,
        verdict: Verdict::Passed,
        score: None,
        model: Some(model()),
        origin,
        created_at: at(ms),
    };
    let event = EventKind::StageSucceeded {
        stage: stage(of),
        attempt: 1,
        verdict: Verdict::Passed,
        score: None,
        model: Some(model()),
        origin,
        latency_ms: u64::try_from(ms - 11).expect("after its start"),
        totals,
        decision: None,
    };
    (StageDetail { stage: record, checkpoint: Some(checkpoint), attempts: vec![attempt] }, event)
}

/// What a stage says.
fn answer(of: &str) -> Value {
    json!({ "of": of, NASTY: [NASTY, 1e-320] })
}

/// The step in which stages pass, each at its time, and others begin at the last of these times.
pub(super) fn passing(lease: Lease, last_seq: u64, ended: &[(&str, i64)], begun: &[&str]) -> Commit {
    let mut kinds = Vec::new();
    let mut plain = Commit { stages: Vec::new(), events: Vec::new(), ..step(lease, last_seq) };
    for (of, ms) in ended {
        let (detail, event) = passed(of, *ms, answer(of));
        kinds.push((*ms, event));
        plain.stages.push(detail.stage);
        plain.attempts.extend(detail.attempts.into_iter().map(|attempt| (stage(of), attempt)));
        plain.checkpoints.extend(detail.checkpoint.map(|checkpoint| (stage(of), checkpoint)));
    }
    let last = kinds.last().map_or(10, |(ms, _)| *ms);
    for of in begun {
        kinds.push((last, EventKind::StageStarted { stage: stage(of), attempt: 1 }));
        let running = StageRecord { state: StageState::Running, attempt: 1, ..StageRecord::pending(stage(of)) };
        plain.stages.push(StageRecord { started_at: Some(at(last)), ..running });
    }
    plain.events = (last_seq + 1..).zip(kinds).map(|(seq, (ms, kind))| Event::new(seq, at(ms), kind)).collect();
    plain
}

/// The default output of these last stages.
fn output_of(stages: &[&str]) -> Value {
    Value::Object(stages.iter().map(|of| ((*of).to_owned(), answer(of))).collect())
}

/// The same, ending the run with the outputs of these stages.
fn ending(lease: Lease, last_seq: u64, ended: &[(&str, i64)], of: &[&str]) -> Commit {
    let mut last = passing(lease, last_seq, ended, &[]);
    let ms = ended.last().map_or(10, |(_, ms)| *ms);
    let seq = last_seq + 1 + last.events.len() as u64;
    let kind = EventKind::RunFinished { state: RunState::Succeeded, failure: None, totals: Totals::default() };
    last.events.push(Event::new(seq, at(ms), kind));
    Commit {
        state: RunState::Succeeded,
        finished_at: Some(at(ms)),
        output: Some(output_of(of).into()),
        output_of: of.iter().map(|of| stage(of)).collect(),
        then: Disposition::End,
        ..last
    }
}

/// What must be read of a run, made of what was written.
#[derive(Debug)]
pub struct Story {
    run: NewRun,
    lease: Lease,
    stages: BTreeMap<String, StageDetail>,
    events: Vec<Event>,
    steps: usize,
}

/// How many steps a [`Story`] has.
pub const STEPS: usize = 6;
/// The stages whose outputs are the run's, in an order that is the definition's alone.
const LAST: [&str; 2] = ["s7", "s4"];

impl Story {
    /// Submits a run that this replica owns at once.
    pub async fn begin(store: &Arc<dyn Store>, ms: i64) -> Self {
        let owner = live_replica(store).await;
        let (run, lease) = submit_leased(store, ms, owner).await;
        let running = run
            .stages
            .iter()
            .map(|of| (of.id.to_string(), StageDetail { stage: of.clone(), checkpoint: None, attempts: Vec::new() }));
        Self { stages: running.collect(), events: run.events.clone(), run, lease, steps: 0 }
    }

    /// The next step: one stage after another, then two of one time, two of different times, and one that fails once.
    fn step(&self) -> Commit {
        let (lease, last_seq) = (self.lease, self.events.len() as u64);
        match self.steps {
            0 => passing(lease, last_seq, &[("s1", 20)], &["s2", "s3"]),
            1 => passing(lease, last_seq, &[("s2", 30), ("s3", 30)], &["s4", "s5", "s6", "s7"]),
            2 => passing(lease, last_seq, &[("s5", 41), ("s4", 44)], &[]),
            3 => self.failing(last_seq),
            4 => {
                let mut mended = passing(lease, last_seq, &[("s6", 60)], &[]);
                mended.attempts[0].1.number = 2;
                mended.checkpoints[0].1.attempt = 2;
                mended.stages[0].attempt = 2;
                mended
            }
            _ => ending(lease, last_seq, &[("s7", 70)], &LAST),
        }
    }

    /// The sixth stage fails, and is begun again.
    fn failing(&self, last_seq: u64) -> Commit {
        let (mut detail, _) = passed("s6", 50, Value::Null);
        let mut attempt = detail.attempts.remove(0);
        (attempt.verdict, attempt.failure) = (Verdict::Errored, Some(failure(NASTY)));
        let again = StageRecord {
            state: StageState::Running,
            attempt: 2,
            failure: Some(failure("once")),
            finished_at: None,
            ..detail.stage
        };
        let begun = EventKind::StageStarted { stage: stage("s6"), attempt: 2 };
        Commit {
            events: vec![Event::new(last_seq + 1, at(50), begun)],
            stages: vec![again],
            attempts: vec![(stage("s6"), attempt)],
            ..step(self.lease, last_seq)
        }
    }

    /// Commits the next step.
    pub async fn advance(&mut self, store: &Arc<dyn Store>) {
        let step = self.step();
        assert_eq!(commit(store, &step).await, Committed::Now, "step {}", self.steps);
        assert_eq!(commit(store, &step).await, Committed::Already, "step {}", self.steps);
        for record in &step.stages {
            let entry = self.stages.entry(record.id.to_string());
            let new = StageDetail { stage: record.clone(), checkpoint: None, attempts: Vec::new() };
            entry.or_insert(new).stage = record.clone();
        }
        for (of, attempt) in step.attempts {
            self.stages.get_mut(of.as_str()).expect("given").attempts.push(attempt);
        }
        for (of, checkpoint) in step.checkpoints {
            self.stages.get_mut(of.as_str()).expect("given").checkpoint = Some(checkpoint);
        }
        self.events.extend(step.events);
        self.steps += 1;
    }

    /// Whatever can be read of the run is what was written: its stages, events in pages from any seq on, and output.
    pub async fn check(&self, store: &Arc<dyn Store>) {
        let (tenant, id) = (&self.run.tenant, self.run.id);
        let Dump { detail, stages, events } = dump(store, tenant, id).await;
        assert_eq!(stages, self.stages.values().cloned().collect::<Vec<_>>());
        assert_eq!(detail.stages, stages.into_iter().map(|detail| detail.stage).collect::<Vec<_>>());
        assert_eq!(events, self.events);
        let output = (self.steps == STEPS).then(|| output_of(&LAST).to_string());
        assert_eq!(detail.output.map(|output| output.to_string()), output, "to the byte");
        for after in 0..=events.len() {
            for limit in [1, 2, 3, events.len()] {
                let page: Vec<Event> = events.iter().skip(after).take(limit).cloned().collect();
                let (from, most) = (after as u64, u32::try_from(limit).unwrap_or(0));
                assert_eq!(store.events(tenant, id, from, most).await.expect("events"), page);
                let news = store.news(&[(id, from)], most).await.expect("news");
                assert_eq!(news.into_iter().flat_map(|(_, events)| events).collect::<Vec<_>>(), page);
            }
        }
    }

    /// Whoever takes the run over gets all of it.
    pub async fn hand_over(&mut self, store: &Arc<dyn Store>) {
        store.release(&[self.lease]).await.expect("release");
        let heir = live_replica(store).await;
        let taken = claim_all(store, heir).await;
        self.lease = *taken.iter().find(|lease| lease.run == self.run.id).expect("it was handed back");
        let mut loaded = store.load(&[self.lease]).await.expect("load");
        let mut snapshot = loaded.pop().expect("it is ours");
        snapshot.stages.sort_by(|a, b| a.id.cmp(&b.id));
        snapshot.checkpoints.sort_by(|(a, _), (b, _)| a.cmp(b));
        assert_eq!(snapshot.stages, self.stages.values().map(|detail| detail.stage.clone()).collect::<Vec<_>>());
        let kept = |(of, detail): (&String, &StageDetail)| Some((stage(of), detail.checkpoint.clone()?));
        assert_eq!(snapshot.checkpoints, self.stages.iter().filter_map(kept).collect::<Vec<_>>());
        assert_eq!(snapshot.last_attempts, []);
    }
}

/// Step by step: the run, each stage with its attempts and checkpoint, every event once, the default output.
pub async fn what_passes_at_once_is_read_whole(subject: Subject) {
    let store = &subject.store;
    let mut tale = Story::begin(store, 1).await;
    tale.check(store).await;
    for _ in 0..STEPS {
        tale.advance(store).await;
        tale.check(store).await;
    }
}

/// After each step.
pub async fn whoever_takes_over_gets_what_passed_at_once(subject: Subject) {
    let store = &subject.store;
    let mut tale = Story::begin(store, 1).await;
    for _ in 1..STEPS {
        tale.advance(store).await;
        tale.hand_over(store).await;
        tale.check(store).await;
    }
    tale.advance(store).await;
    tale.check(store).await;
}

/// Its outputs go with a purge, the rest stays; a delete leaves nothing.
pub async fn what_passed_at_once_is_purged_and_deleted(subject: Subject) {
    let store = &subject.store;
    let mut tale = Story::begin(store, 1).await;
    let (tenant, id) = (tale.run.tenant.clone(), tale.run.id);
    for _ in 0..STEPS {
        tale.advance(store).await;
    }
    assert_eq!(store.purge(&[id], at(90)).await.expect("purge"), 1);
    let purged = dump(store, &tenant, id).await;
    assert_eq!((purged.detail.input, purged.detail.output), (Json::null(), None));
    assert_eq!(purged.events, tale.events);
    for (after, before) in purged.stages.iter().zip(tale.stages.values()) {
        let of_digest = |detail: &StageDetail| detail.checkpoint.as_ref().map(|each| each.digest.clone());
        assert_eq!((&after.stage, &after.attempts), (&before.stage, &before.attempts));
        assert_eq!(of_digest(after), of_digest(before));
        assert_eq!(after.checkpoint.as_ref().map(|each| &each.output), Some(&Json::null()));
    }
    assert_eq!(store.delete(&[id]).await.expect("delete"), [id]);
    assert_eq!(store.run(&tenant, id).await.expect("read"), None);
    assert_eq!(store.events(&tenant, id, 0, 100).await.expect("read"), []);
    assert_eq!(store.stage(&tenant, id, &stage("s1")).await.expect("read"), None);
}

/// It has passed, so there is nothing to decide.
pub async fn what_passed_at_once_is_not_held(subject: Subject) {
    let store = &subject.store;
    let mut tale = Story::begin(store, 1).await;
    tale.advance(store).await;
    for (of, state) in [("s1", Some(StageState::Succeeded)), ("s2", Some(StageState::Running)), ("s9", None)] {
        let answer = signal(store, tale.run.id, SignalKind::approve(stage(of), None)).await;
        assert_eq!(answer, Signalled::StageNotHeld(state), "{of}");
    }
}

/// A replica that is not alive is given no lease: nothing is told of what it would have begun, and the run goes on.
pub async fn what_was_not_begun_is_not_told(subject: Subject) {
    let store = &subject.store;
    let run = leased_run(1, super::fixtures::replica());
    assert_eq!(submit(store, &run).await, Submitted::Accepted(None));
    assert_eq!(store.events(&run.tenant, run.id, 0, 10).await.expect("events"), run.events[..1]);
    let owner = live_replica(store).await;
    let lease = claim_all(store, owner).await[0];
    assert_eq!(commit(store, &passing(lease, 1, &[], &["s1"])).await, Committed::Now);
    let seqs: Vec<u64> = dump(store, &run.tenant, run.id).await.events.iter().map(|event| event.seq).collect();
    assert_eq!(seqs, [1, 2]);
}
