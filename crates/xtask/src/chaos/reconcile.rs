//! The reconciliation: owns every check at the end of a run. Each is told with how much it looked at and what it found;
//! a single finding fails the run.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::Serialize;
use stagegate_testkit::audit::{Audit, EventRow, RunRow};
use uuid::Uuid;

use super::{calls::Paid, load::Done, pipelines, watch::Watched};

/// Findings of one check that are told one by one.
const TOLD_MAX: usize = 40;

/// One check.
#[derive(Debug, Serialize)]
pub(crate) struct Check {
    pub(crate) name: &'static str,
    pub(crate) looked_at: u64,
    pub(crate) wrong: u64,
    /// The first of what was found.
    pub(crate) findings: Vec<String>,
}

impl Check {
    pub(crate) fn new(name: &'static str) -> Self {
        Self { name, looked_at: 0, wrong: 0, findings: Vec::new() }
    }

    pub(crate) fn look(&mut self) {
        self.looked_at += 1;
    }

    pub(crate) fn find(&mut self, what: String) {
        self.wrong += 1;
        if self.findings.len() < TOLD_MAX {
            self.findings.push(what);
        }
    }
}

fn is_terminal(state: &str) -> bool {
    matches!(state, "succeeded" | "failed" | "cancelled" | "expired")
}

/// Every check that needs the database and what the clients saw.
///
/// `mixed` is whether replicas of the previous release took part, which book nothing for what they abandon.
pub(crate) fn reconcile(
    audit: &Audit,
    done: &Done,
    paid: &Paid,
    read: &HashMap<Uuid, String>,
    mixed: bool,
) -> Vec<Check> {
    vec![
        accepted(audit, done),
        terminal(audit, read),
        events(audit),
        order(audit),
        watchers(audit, &done.watched),
        checkpoints(audit),
        outputs(audit),
        ledger(audit),
        booked(audit, paid),
        money(audit, paid, mixed),
        leases(audit),
        bought(paid),
        refused(paid),
    ]
}

/// Every key was accepted as one run, which is there; there is no run that nobody asked for.
fn accepted(audit: &Audit, done: &Done) -> Check {
    let mut check = Check::new("accepted: one run for each idempotency key, and it is there");
    let mut wanted = HashSet::new();
    for submit in &done.submitted {
        check.look();
        if let Some(refused) = &submit.refused {
            check.find(format!("key {}: refused: {refused}", submit.key));
        }
        if submit.runs.len() > 1 {
            check.find(format!("key {}: accepted as {:?}", submit.key, submit.runs));
        }
        if submit.accepted_s.is_none() {
            check.find(format!("key {}: never accepted, in {} requests", submit.key, submit.requests));
        }
        for run in &submit.runs {
            match run.parse::<Uuid>() {
                Ok(id) if audit.runs.contains_key(&id) && audit.keys.get(&submit.key) == Some(&id) => {
                    wanted.insert(id);
                }
                _ => check.find(format!("key {}: run {run} was accepted and is not there", submit.key)),
            }
        }
    }
    for id in audit.runs.keys().filter(|id| !wanted.contains(id)) {
        check.find(format!("run {id}: nobody was told of it"));
    }
    check
}

/// Every run is terminal, and the API says the same of it as the database.
fn terminal(audit: &Audit, read: &HashMap<Uuid, String>) -> Check {
    let mut check = Check::new("accepted = terminal, by the database and by the API");
    for run in audit.runs.values() {
        check.look();
        if !is_terminal(&run.state) {
            check.find(format!("run {} ({}): still {}", run.id, run.pipeline, run.state));
        }
        match read.get(&run.id) {
            Some(state) if *state == run.state => {}
            other => check.find(format!("run {}: {} in the database, {other:?} by the API", run.id, run.state)),
        }
    }
    check
}

fn count(events: &[EventRow], kind: &str) -> usize {
    events.iter().filter(|event| event.kind == kind).count()
}

/// Gap-free from 1, begun and ended once, and nothing after the end but another try.
fn events(audit: &Audit) -> Check {
    let mut check = Check::new("events gap-free, begun and ended as they must");
    for run in audit.runs.values() {
        check.look();
        let events = audit.events.get(&run.id).map_or(&[][..], Vec::as_slice);
        if let Some(wrong) = wrong_events(run, events) {
            check.find(format!("run {} ({}, {}): {wrong}", run.id, run.pipeline, run.state));
        }
    }
    check
}

fn wrong_events(run: &RunRow, events: &[EventRow]) -> Option<String> {
    for (expected, event) in (1..).zip(events) {
        if event.seq != expected {
            return Some(format!("event {} stands where {expected} belongs", event.seq));
        }
    }
    let (Some(first), Some(last)) = (events.first(), events.last()) else { return Some("it has no events".to_owned()) };
    if i64::try_from(events.len()).ok()? != run.last_seq {
        return Some(format!("{} events, but last_seq is {}", events.len(), run.last_seq));
    }
    if first.kind != "run.accepted" || count(events, "run.accepted") != 1 {
        return Some("it does not begin with its one run.accepted".to_owned());
    }
    if count(events, "run.started") > 1 {
        return Some("it started twice".to_owned());
    }
    let (finished, retried) = (count(events, "run.finished"), count(events, "run.retried"));
    if is_terminal(&run.state) {
        if last.kind != "run.finished" || last.body["state"] != run.state.as_str() {
            return Some(format!("it is {}, its last event is {} {}", run.state, last.kind, last.body["state"]));
        }
        if finished != retried + 1 {
            return Some(format!("finished {finished} times, retried {retried} times"));
        }
    }
    for pair in events.windows(2) {
        if pair[0].kind == "run.finished" && !matches!(pair[1].kind.as_str(), "run.retried" | "run.resumed") {
            return Some(format!("{} came after run.finished", pair[1].kind));
        }
    }
    None
}

/// A stage starts only after the checkpoints of all that it needs.
fn order(audit: &Audit) -> Check {
    let mut check = Check::new("order: no stage before what it needs");
    for run in audit.runs.values() {
        let Some(spec) = pipelines::of(&run.pipeline) else { continue };
        let mut succeeded: HashMap<&str, u32> = HashMap::new();
        for event in audit.events.get(&run.id).into_iter().flatten() {
            let Some(stage) = event.body["stage"].as_str() else { continue };
            match event.kind.as_str() {
                "stage.succeeded" => *succeeded.entry(stage).or_default() += 1,
                "stage.started" => {
                    check.look();
                    let needs = spec.stages.iter().find(|(id, _)| *id == stage).map_or(&[][..], |(_, needs)| needs);
                    for need in needs.iter().filter(|need| !succeeded.contains_key(**need)) {
                        check.find(format!("run {}: {stage} started before {need} was there", run.id));
                    }
                }
                _ => {}
            }
        }
        for (stage, times) in succeeded.iter().filter(|(_, times)| **times != 1) {
            check.find(format!("run {}: {stage} succeeded {times} times", run.id));
        }
    }
    check
}

/// Each watcher saw a prefix of its run's events, to a run.finished, without gap, repeat or invention.
fn watchers(audit: &Audit, watched: &[Watched]) -> Check {
    let mut check = Check::new("watchers saw every event once, across reconnects");
    for watcher in watched {
        check.look();
        if let Some(wrong) = &watcher.wrong {
            check.find(format!("run {}: {wrong}", watcher.run));
        }
        let events = watcher.run.parse::<Uuid>().ok().and_then(|run| audit.events.get(&run));
        let Some(events) = events else {
            check.find(format!("run {}: watched, and not there", watcher.run));
            continue;
        };
        for (expected, (seq, kind, _)) in (1..).zip(&watcher.events) {
            let kept = usize::try_from(*seq).ok().and_then(|seq| events.get(seq.checked_sub(1)?));
            if *seq != expected {
                let course = watcher.course();
                check.find(format!("run {}: event {seq} came where {expected} belongs: {course}", watcher.run));
                break;
            }
            if kept.is_none_or(|kept| kept.kind != *kind) {
                check.find(format!("run {}: was shown {kind} as event {seq}, which is not kept so", watcher.run));
                break;
            }
        }
        let last = watcher.events.last().map(|(_, kind, _)| kind.as_str());
        if watcher.finished && last != Some("run.finished") {
            check.find(format!(
                "run {}: its watcher was told of the end, and saw {last:?} as the last event",
                watcher.run
            ));
        }
        if !watcher.finished {
            check.find(format!(
                "run {}: its watcher never came to the end ({} events)",
                watcher.run,
                watcher.events.len()
            ));
        }
    }
    check
}

/// One checkpoint for each succeeded stage, none for others, none missing in a succeeded run.
fn checkpoints(audit: &Audit) -> Check {
    let mut check = Check::new("exactly one checkpoint per succeeded stage");
    for run in audit.runs.values() {
        check.look();
        let kept = audit.checkpoints.get(&run.id).map_or(&[][..], Vec::as_slice);
        let stages: HashSet<&str> = kept.iter().map(|checkpoint| checkpoint.stage_id.as_str()).collect();
        let succeeded = audit.stages_succeeded.get(&run.id).copied().unwrap_or(0);
        let told: HashSet<&str> = audit
            .events
            .get(&run.id)
            .into_iter()
            .flatten()
            .filter(|event| event.kind == "stage.succeeded")
            .filter_map(|event| event.body["stage"].as_str())
            .collect();
        if stages.len() != kept.len() || stages != told || i64::try_from(kept.len()) != Ok(succeeded) {
            let counts = (kept.len(), told.len(), succeeded);
            check.find(format!("run {}: (checkpoints, told by events, succeeded stages) = {counts:?}", run.id));
        }
        if i64::from(run.stages_done) != succeeded || (run.state == "succeeded" && run.stages_done != run.stages_total)
        {
            let done = (run.stages_done, run.stages_total);
            check.find(format!(
                "run {} ({}): stages done, total = {done:?}, succeeded = {succeeded}",
                run.id, run.state
            ));
        }
    }
    check
}

/// What is kept was answered to this run and this stage: every answer says whose it is.
fn outputs(audit: &Audit) -> Check {
    let mut check = Check::new("each output is an answer to its own run and stage");
    let keys: HashMap<Uuid, &str> = audit.keys.iter().map(|(key, run)| (*run, key.as_str())).collect();
    for (run, kept) in &audit.checkpoints {
        let Some(key) = keys.get(run) else { continue };
        for checkpoint in kept {
            check.look();
            let mark = format!("stage {} of {key} answers ", checkpoint.stage_id);
            if !checkpoint.output.contains(&mark) {
                let start: String = checkpoint.output.chars().take(80).collect();
                check.find(format!("run {run}, stage {}: {start}", checkpoint.stage_id));
            }
        }
    }
    check
}

/// The ledger's rows add up to the totals of their run.
fn ledger(audit: &Audit) -> Check {
    let mut check = Check::new("ledger rows add up to the run's totals");
    for run in audit.runs.values() {
        check.look();
        let sum = audit.ledger.get(&run.id).cloned().unwrap_or_default();
        let of_ledger = (sum.calls, sum.hits, sum.input_tokens, sum.output_tokens, sum.cost_nanos, sum.saved_nanos);
        let of_run = (
            i64::from(run.calls),
            i64::from(run.hits),
            run.input_tokens,
            run.output_tokens,
            run.cost_nanos,
            run.saved_nanos,
        );
        if of_ledger != of_run {
            check.find(format!(
                "run {}: (calls, hits, tokens in, out, cost, saved) = {of_run:?}, the ledger has {of_ledger:?}",
                run.id
            ));
        }
    }
    check
}

/// Nothing is booked that the provider did not answer.
fn booked(audit: &Audit, paid: &Paid) -> Check {
    let mut check = Check::new("the ledger books no answer that the provider did not give");
    for (key, run) in &audit.keys {
        check.look();
        let booked = audit.ledger.get(run).map_or(0, |sum| sum.answered);
        let given = paid.answered.get(key).copied().unwrap_or(0);
        if i64::try_from(given).is_ok_and(|given| booked > given) {
            check.find(format!("run {run} (key {key}): {booked} answers are booked, {given} were given"));
        }
    }
    check
}

/// The ledger's sum is the provider's own count: what is booked as known was charged, and what was charged is booked, as
/// known or, where nobody heard, as unknown.
///
/// One exception, bounded by what was in flight: an attempt whose owner was lost may have had one more call charged than
/// its successor books, where the shared cache was away (its answer was lost, and its judge's verdict with it) or the owner
/// woke from past its lease and asked once more. So each take-over excuses one call.
fn money(audit: &Audit, paid: &Paid, mixed: bool) -> Check {
    let mut check = Check::new("known <= charged by the provider <= known + unknown");
    for (key, run) in &audit.keys {
        check.look();
        let (known, unknown) = audit.ledger.get(run).map_or((0, 0), |sum| (sum.charged, sum.unknown));
        let charged = i64::try_from(paid.charged_to.get(key).copied().unwrap_or(0)).unwrap_or(i64::MAX);
        let events = audit.events.get(run).into_iter().flatten();
        let take_overs = events.filter(|event| event.kind == "run.resumed").count();
        let excused = if mixed { i64::MAX } else { i64::try_from(take_overs).unwrap_or(i64::MAX) };
        if known > charged || (known + unknown).saturating_add(excused) < charged {
            check.find(format!(
                "run {run} (key {key}): {charged} charged, {known} booked as known, {unknown} as unknown"
            ));
        }
    }
    check
}

/// No lease is held when everything is terminal, least of all by a dead replica.
fn leases(audit: &Audit) -> Check {
    let mut check = Check::new("no lease is left, and none with a dead replica");
    for run in audit.runs.values() {
        check.look();
        if let Some(owner) = run.owner {
            let name = audit.living.get(&owner).map_or("a dead replica", String::as_str);
            check.find(format!("run {} ({}): its lease is with {name} ({owner})", run.id, run.state));
        }
    }
    check
}

fn bought(paid: &Paid) -> Check {
    let mut check = Check::new("calls paid = distinct needed + named exceptions");
    check.looked_at = paid.charged;
    for finding in &paid.findings {
        check.find(finding.clone());
    }
    check
}

/// What no repetition can mend is not repeated until somebody asks for it.
fn refused(paid: &Paid) -> Check {
    let mut check = Check::new("what was refused for good was not asked again by itself");
    check.looked_at = paid.refused;
    for finding in &paid.asked_again {
        check.find(finding.clone());
    }
    check
}

/// How many runs ended how.
pub(crate) fn states(audit: &Audit) -> BTreeMap<(String, String), u64> {
    let mut states = BTreeMap::new();
    for run in audit.runs.values() {
        *states.entry((run.pipeline.clone(), run.state.clone())).or_default() += 1;
    }
    states
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use serde_json::json;
    use stagegate_testkit::audit::{CheckpointRow, LedgerSum};

    use super::*;
    use crate::chaos::load::Submitted;

    const EVENTS: [(&str, &str); 7] = [
        ("run.accepted", ""),
        ("run.started", ""),
        ("stage.started", "frail"),
        ("stage.succeeded", "frail"),
        ("stage.started", "frail_after"),
        ("stage.succeeded", "frail_after"),
        ("run.finished", ""),
    ];

    /// A run of `fragile` as it should be, its submit, and its watcher.
    struct World {
        audit: Audit,
        done: Done,
        paid: Paid,
        read: HashMap<Uuid, String>,
    }

    impl World {
        fn new() -> Self {
            let id = Uuid::from_u128(1);
            let run = RunRow {
                id,
                state: "succeeded".into(),
                pipeline: "fragile".into(),
                owner: None,
                epoch: 1,
                last_seq: 7,
                stages_total: 2,
                stages_done: 2,
                calls: 2,
                hits: 0,
                input_tokens: 240,
                output_tokens: 80,
                cost_nanos: 10,
                saved_nanos: 0,
            };
            let event = |(index, (kind, stage)): (usize, &(&str, &str))| EventRow {
                seq: i64::try_from(index).expect("small") + 1,
                at: DateTime::UNIX_EPOCH,
                kind: (*kind).to_owned(),
                body: json!({ "type": kind, "stage": stage, "state": "succeeded" }),
            };
            let checkpoint = |stage: &str| CheckpointRow {
                run_id: id,
                stage_id: stage.to_owned(),
                output: format!("\"stage {stage} of k answers 1\""),
            };
            let ledger = LedgerSum {
                run_id: id,
                calls: 2,
                answered: 2,
                charged: 2,
                input_tokens: 240,
                output_tokens: 80,
                cost_nanos: 10,
                ..LedgerSum::default()
            };
            let audit = Audit {
                runs: [(id, run)].into(),
                keys: [("k".to_owned(), id)].into(),
                events: [(id, EVENTS.iter().enumerate().map(event).collect())].into(),
                checkpoints: [(id, vec![checkpoint("frail"), checkpoint("frail_after")])].into(),
                stages_succeeded: [(id, 2)].into(),
                ledger: [(id, ledger)].into(),
                living: HashMap::new(),
            };
            let watcher = Watched {
                run: id.to_string(),
                events: (1..).zip(EVENTS).map(|(seq, (kind, _))| (seq, kind.to_owned(), 1)).collect(),
                connections: 1,
                finished: true,
                wrong: None,
            };
            let submitted = Submitted {
                key: "k".to_owned(),
                runs: [id.to_string()].into(),
                accepted_s: Some(1.0),
                ..Submitted::default()
            };
            let done = Done { submitted: vec![submitted], watched: vec![watcher], actions: HashMap::new() };
            let answered: HashMap<String, u64> = [("k".to_owned(), 2)].into();
            let paid = Paid { charged_to: answered.clone(), answered, ..Paid::default() };
            Self { audit, done, paid, read: [(id, "succeeded".to_owned())].into() }
        }

        fn run(&mut self) -> &mut RunRow {
            self.audit.runs.values_mut().next().expect("one")
        }

        fn events(&mut self) -> &mut Vec<EventRow> {
            self.audit.events.values_mut().next().expect("one")
        }

        /// The checks that found something.
        fn wrong(&self) -> Vec<&'static str> {
            let checks = reconcile(&self.audit, &self.done, &self.paid, &self.read, false);
            checks.iter().filter(|check| check.wrong > 0).map(|check| check.name).collect()
        }
    }

    /// Breaks one thing and expects the check whose name has this part to find it.
    fn found(part: &str, breaks: impl FnOnce(&mut World)) {
        let mut world = World::new();
        breaks(&mut world);
        let wrong = world.wrong();
        assert!(wrong.iter().any(|name| name.contains(part)), "{part}: {wrong:?}");
    }

    #[test]
    fn a_run_as_it_should_be_passes() {
        assert_eq!(World::new().wrong(), Vec::<&str>::new());
    }

    #[test]
    fn every_broken_promise_is_found() {
        found("one run for each", |world| {
            world.done.submitted[0].runs.insert(Uuid::from_u128(2).to_string());
        });
        found("one run for each", |world| world.done.submitted[0].accepted_s = None);
        found("one run for each", |world| world.done.submitted.clear());
        found("= terminal", |world| world.run().state = "running".into());
        found("= terminal", |world| world.read.clear());
        found("gap-free", |world| drop(world.events().remove(3)));
        found("gap-free", |world| world.run().last_seq = 8);
        found("gap-free", |world| {
            let again = world.events()[6].clone();
            world.events().push(EventRow { seq: 8, ..again });
            world.run().last_seq = 8;
        });
        found("order", |world| world.events().swap(3, 4));
        found("watchers", |world| drop(world.done.watched[0].events.remove(2)));
        found("watchers", |world| world.done.watched[0].events[2].1 = "stage.held".into());
        found("watchers", |world| world.done.watched[0].finished = false);
        found("watchers", |world| drop(world.done.watched[0].events.pop()));
        found("gap-free", |world| world.events().clear());
        found("checkpoint", |world| world.audit.checkpoints.clear());
        found("checkpoint", |world| {
            let kept = world.audit.checkpoints.values_mut().next().expect("one");
            let twice = kept[0].clone();
            kept.push(twice);
        });
        found("its own run", |world| {
            let kept = world.audit.checkpoints.values_mut().next().expect("one");
            kept[1].output = "\"stage frail_after of another answers 1\"".into();
        });
        found("add up", |world| world.run().cost_nanos = 9);
        found("books no answer", |world| world.paid.answered.clear());
        found("charged by the provider", |world| world.paid.charged_to.clear());
        found("charged by the provider", |world| {
            world.paid.charged_to.insert("k".to_owned(), 3);
        });
        found("no lease", |world| world.run().owner = Some(Uuid::from_u128(9)));
        found("calls paid", |world| world.paid.findings.push("paid again".into()));
        found("refused for good", |world| world.paid.asked_again.push("asked again".into()));
    }
}
