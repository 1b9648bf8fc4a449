//! The provider's books against what was needed: owns why a call may have been paid although its answer was there
//! before. Every charged call beyond the first usable one of a request needs a named reason; what has none is a finding.

use std::collections::{BTreeMap, HashMap};

use stagegate_testkit::{
    audit::{Audit, EventRow},
    storm::{Answer, Call, Fate},
};

use super::{
    pipelines::HELD,
    timeline::Timeline,
    world::{Window, WindowKind},
};

/// How long after its delivery an answer is on its way into the shared cache, at most.
const IN_HAND_S: f64 = 0.5;

/// What came of the books.
#[derive(Debug, Default)]
pub(crate) struct Paid {
    /// Calls by answer, and how many of each were abandoned by their callers.
    pub(crate) by_answer: BTreeMap<Answer, (u64, u64)>,
    /// Calls that a real provider would charge for.
    pub(crate) charged: u64,
    /// Distinct requests among them.
    pub(crate) needed: u64,
    /// Charged calls beyond that, by why.
    pub(crate) exceptions: BTreeMap<&'static str, u64>,
    /// Delivered, parseable answers by the key in their prompt: what the ledger can at most have booked as answered.
    pub(crate) answered: HashMap<String, u64>,
    /// Charged calls by the key in their prompt: what the ledger must have booked, as known or as unknown.
    pub(crate) charged_to: HashMap<String, u64>,
    pub(crate) findings: Vec<String>,
    /// Calls that were refused for good, and those that were made again all the same.
    pub(crate) refused: u64,
    pub(crate) asked_again: Vec<String>,
}

/// What the reasons are looked up in.
pub(crate) struct Known<'a> {
    pub(crate) timeline: &'a Timeline,
    pub(crate) windows: &'a [Window],
    /// By key in the prompt: what its run's events tell, and when, in seconds.
    pub(crate) told: HashMap<String, Vec<(Told, f64)>>,
}

/// What an event tells of why a call may be repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told {
    /// The run was cancelled, or expired.
    Stopped,
    /// Somebody tried it again.
    Retried,
    /// Another owner went on with it.
    Resumed,
}

impl Told {
    fn by(event: &EventRow) -> Option<Self> {
        let state = event.body["state"].as_str().unwrap_or_default();
        match event.kind.as_str() {
            "run.finished" if matches!(state, "cancelled" | "expired") => Some(Self::Stopped),
            "run.retried" => Some(Self::Retried),
            "run.resumed" => Some(Self::Resumed),
            _ => None,
        }
    }
}

impl<'a> Known<'a> {
    pub(crate) fn new(timeline: &'a Timeline, windows: &'a [Window], audit: &Audit) -> Self {
        let events = |run| audit.events.get(run).into_iter().flatten();
        let of_run = |run| {
            events(run).filter_map(|event| Some((Told::by(event)?, timeline.of_wall(event.at)))).collect::<Vec<_>>()
        };
        let told = audit.keys.iter().map(|(key, run)| (key.clone(), of_run(run))).collect();
        Self { timeline, windows, told }
    }

    /// Whether something was the case with its receiver while the call was under way or its answer on its way into the
    /// cache.
    fn befell(&self, call: &Call, kind: fn(usize) -> WindowKind) -> bool {
        let from_s = self.timeline.of(call.started);
        let to_s = call.ended.map_or(f64::INFINITY, |ended| self.timeline.of(ended) + IN_HAND_S);
        self.overlaps(of_caller(&call.caller, kind), from_s, to_s)
    }

    fn overlaps(&self, kind: Option<WindowKind>, from_s: f64, to_s: f64) -> bool {
        self.windows.iter().any(|window| Some(window.kind) == kind && window.from_s <= to_s && window.to_s >= from_s)
    }

    /// Whether the shared cache was away from all when an answer was to be written, or when it was looked for; or lost
    /// what it had in between.
    fn cache_failed(&self, written_s: f64, looked_for_s: f64) -> bool {
        let away = |from_s, to_s| self.overlaps(Some(WindowKind::CacheAway(None)), from_s, to_s);
        away(written_s - 0.1, written_s + IN_HAND_S)
            || away(looked_for_s - IN_HAND_S, looked_for_s)
            || self.overlaps(Some(WindowKind::CacheLost), written_s - 0.1, looked_for_s)
    }

    /// Whether this caller says of itself that the shared cache did not answer it around that time.
    fn cache_silent(&self, caller: &str, at_s: f64) -> bool {
        self.overlaps(of_caller(caller, |index| WindowKind::CacheAway(Some(index))), at_s, at_s)
    }

    /// Whether this call was begun by a replica that had been frozen past its lease, before it noticed.
    fn woken(&self, call: &Call) -> bool {
        let at_s = self.timeline.of(call.started);
        self.overlaps(of_caller(&call.caller, WindowKind::Woken), at_s, at_s)
    }

    /// Whether the call's run was stopped while it was under way.
    fn run_stopped(&self, call: &Call) -> bool {
        let from_s = self.timeline.of(call.started) - 0.1;
        let to_s = call.ended.map_or(f64::INFINITY, |ended| self.timeline.of(ended) + IN_HAND_S);
        self.tells(&call.key, Told::Stopped, from_s, to_s)
    }

    /// Whether the events of this key's run tell this between the two times.
    fn tells(&self, key: &str, what: Told, from_s: f64, to_s: f64) -> bool {
        let mut told = self.told.get(key).into_iter().flatten();
        told.any(|(told, at_s)| *told == what && (from_s..=to_s).contains(at_s))
    }
}

/// What a window about this caller, `r1` and so on, is.
fn of_caller(caller: &str, kind: fn(usize) -> WindowKind) -> Option<WindowKind> {
    let nth: usize = caller.strip_prefix('r')?.parse().ok()?;
    Some(kind(nth.checked_sub(1)?))
}

/// Goes through the books.
pub(crate) fn reconcile(calls: &[Call], known: &Known<'_>) -> Paid {
    let mut paid = Paid::default();
    let mut requests: HashMap<u64, Vec<&Call>> = HashMap::new();
    let mut refused: HashMap<u64, &Call> = HashMap::new();
    for call in calls {
        if let Some(before) = refused.remove(&call.fingerprint).filter(|before| !may_ask_again(before, call, known)) {
            paid.asked_again.push(repeated(before, call, "asked", known.timeline));
        }
        if call.answer.is_final() {
            paid.refused += 1;
            refused.insert(call.fingerprint, call);
        }
        let row = paid.by_answer.entry(call.answer).or_default();
        row.0 += 1;
        row.1 += u64::from(call.fate == Fate::Abandoned);
        if !call.answer.is_charged() {
            continue;
        }
        *paid.charged_to.entry(call.key.clone()).or_default() += 1;
        requests.entry(call.fingerprint).or_default().push(call);
        if call.fate == Fate::Delivered && (call.answer.is_usable() || call.answer == Answer::Bad) {
            *paid.answered.entry(call.key.clone()).or_default() += 1;
        }
    }
    paid.needed = requests.len() as u64;
    for asked in requests.values() {
        paid.charged += asked.len() as u64;
        // The reason lies with the answer before: why it could not be used instead of asking again.
        for pair in asked.windows(2) {
            let (before, again) = (pair[0], pair[1]);
            match reason(before, again, known) {
                Some(reason) => *paid.exceptions.entry(reason).or_default() += 1,
                None => paid.findings.push(repeated(before, again, "paid", known.timeline)),
            }
        }
    }
    paid
}

fn reason(before: &Call, again: &Call, known: &Known<'_>) -> Option<&'static str> {
    let ended_s = before.ended.map_or_else(|| known.timeline.of(before.started), |ended| known.timeline.of(ended));
    let again_s = known.timeline.of(again.started);
    let between = |what| known.tells(&before.key, what, ended_s, again_s);
    Some(match (before.answer, before.fate) {
        (Answer::Cut, _) => "the answer was cut on its way",
        (Answer::Garbled | Answer::Truncated | Answer::Empty, Fate::Delivered) => {
            "the answer could not be used (no JSON, truncated, or empty)"
        }
        (Answer::Refused, Fate::Delivered) if may_ask_again(before, again, known) => {
            "the model refused, and the run was retried or taken over"
        }
        (Answer::Bad, Fate::Delivered) => "the answer failed its gate and was evicted",
        (_, Fate::Delivered) if before.stage == HELD.1 && between(Told::Retried) => {
            "the output was held, hence evicted, and the run was retried"
        }
        // Whoever took it over has neither: the eviction comes before the commit that would have kept the output.
        (_, Fate::Delivered) if before.stage == HELD.1 && between(Told::Resumed) => {
            "the output was to be held, hence evicted, and its owner was lost before that was committed"
        }
        _ if known.befell(before, WindowKind::Interrupted) => {
            "its receiver was killed, frozen or fenced before the answer was cached"
        }
        _ if known.befell(before, WindowKind::Still) => {
            "its receiver had stood still until it was killed, frozen or fenced"
        }
        _ if known.run_stopped(before) => {
            "its run was cancelled or expired while the call was under way, and was retried"
        }
        (_, Fate::Delivered) if known.cache_failed(ended_s, again_s) => {
            "Redis was away when it was to be written or looked for, or lost it in between"
        }
        (_, Fate::Delivered)
            if known.cache_silent(&before.caller, ended_s) || known.cache_silent(&again.caller, again_s) =>
        {
            "Redis did not answer one of the two in time, as it says itself"
        }
        _ if known.woken(again) => "it was asked by a replica that woke from past its lease and had not noticed yet",
        _ => return None,
    })
}

/// Whether a request that was refused for good may be sent again: somebody asked for it, or whoever knew is gone.
fn may_ask_again(before: &Call, again: &Call, known: &Known<'_>) -> bool {
    let again_s = known.timeline.of(again.started);
    let Some(ended_s) = before.ended.map(|ended| known.timeline.of(ended)).filter(|at_s| *at_s <= again_s) else {
        return true;
    };
    before.fate != Fate::Delivered
        || [Told::Retried, Told::Resumed].iter().any(|told| known.tells(&before.key, *told, ended_s, again_s))
        || known.woken(again)
}

fn repeated(before: &Call, again: &Call, how: &str, timeline: &Timeline) -> String {
    let told = |call: &Call| {
        format!(
            "by {} from {:.3} to {:.3} s ({}, {:?})",
            call.caller,
            timeline.of(call.started),
            call.ended.map_or(f64::NAN, |ended| timeline.of(ended)),
            call.answer.name(),
            call.fate
        )
    };
    format!(
        "key {} stage {}: request {:016x} was {how} again without a reason: {}, then {}",
        before.key,
        before.stage,
        before.fingerprint,
        told(before),
        told(again)
    )
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn call(answer: Answer, fate: Fate, caller: &str, from_ms: u64, to_ms: u64, start: Instant) -> Call {
        Call {
            caller: caller.to_owned(),
            fingerprint: 7,
            key: "k".to_owned(),
            stage: "one".to_owned(),
            nth: 0,
            answer,
            fate,
            started: start + Duration::from_millis(from_ms),
            ended: Some(start + Duration::from_millis(to_ms)),
        }
    }

    fn check(first: (Answer, Fate), windows: &[Window]) -> Paid {
        check_told("one", first, windows, &[])
    }

    fn check_told(stage: &str, first: (Answer, Fate), windows: &[Window], told: &[(Told, f64)]) -> Paid {
        let timeline = Timeline::begin();
        let start = Instant::now();
        let mut calls = [
            call(first.0, first.1, "r1", 1_000, 1_100, start),
            call(Answer::Good, Fate::Delivered, "r2", 9_000, 9_100, start),
        ];
        for call in &mut calls {
            stage.clone_into(&mut call.stage);
        }
        let told = [("k".to_owned(), told.to_vec())].into();
        reconcile(&calls, &Known { timeline: &timeline, windows, told })
    }

    fn window(kind: WindowKind, from_s: f64, to_s: f64) -> Window {
        Window { what: String::new(), from_s, to_s, kind }
    }

    #[test]
    fn an_answer_that_was_there_and_is_paid_again_is_a_finding() {
        let paid = check((Answer::Good, Fate::Delivered), &[]);
        assert_eq!((paid.charged, paid.needed, paid.findings.len()), (2, 1, 1));
        // Another replica's end, or one that came too late to matter, is no reason.
        let others = [window(WindowKind::Interrupted(1), 0.5, 5.0), window(WindowKind::Interrupted(0), 3.0, 5.0)];
        assert_eq!(check((Answer::Good, Fate::Delivered), &others).findings.len(), 1);
        // Nor is a cache that was away, and lost nothing, before it was needed or in between.
        for away in [window(WindowKind::CacheAway(None), 0.1, 0.5), window(WindowKind::CacheAway(None), 4.0, 5.0)] {
            assert_eq!(check((Answer::Good, Fate::Delivered), &[away]).findings.len(), 1);
        }
    }

    #[test]
    fn each_reason_is_named() {
        for (first, windows) in [
            ((Answer::Cut, Fate::Delivered), vec![]),
            ((Answer::Bad, Fate::Delivered), vec![]),
            ((Answer::Truncated, Fate::Delivered), vec![]),
            ((Answer::Good, Fate::Delivered), vec![window(WindowKind::Interrupted(0), 1.2, 5.0)]),
            ((Answer::Good, Fate::Abandoned), vec![window(WindowKind::Interrupted(0), 0.9, 5.0)]),
            ((Answer::Good, Fate::Delivered), vec![window(WindowKind::Still(0), 1.5, 3.0)]),
            ((Answer::Good, Fate::Delivered), vec![window(WindowKind::CacheLost, 4.0, 5.0)]),
            ((Answer::Good, Fate::Delivered), vec![window(WindowKind::CacheAway(None), 1.5, 5.0)]),
            ((Answer::Good, Fate::Delivered), vec![window(WindowKind::CacheAway(None), 4.0, 12.0)]),
        ] {
            let paid = check(first, &windows);
            assert_eq!((paid.findings.len(), paid.exceptions.values().sum::<u64>()), (0, 1), "{first:?}");
        }
    }

    #[test]
    fn a_held_output_is_paid_again_only_after_a_retry_or_a_take_over() {
        let held = |told: &[(Told, f64)]| check_told(HELD.1, (Answer::Good, Fate::Delivered), &[], told).findings.len();
        assert_eq!((held(&[(Told::Retried, 5.0)]), held(&[(Told::Resumed, 5.0)])), (0, 0));
        assert_eq!((held(&[]), held(&[(Told::Retried, 0.5), (Told::Stopped, 5.0), (Told::Retried, 9.5)])), (1, 1));
    }

    #[test]
    fn what_was_refused_for_good_is_asked_again_only_by_somebody() {
        let again = |answer, told: &[(Told, f64)]| {
            let paid = check_told("frail", (answer, Fate::Delivered), &[], told);
            (paid.asked_again.len(), paid.findings.len())
        };
        assert_eq!((again(Answer::Quota, &[]), again(Answer::Refused, &[])), ((1, 0), (1, 1)));
        let retried = [(Told::Retried, 5.0)];
        assert_eq!((again(Answer::Quota, &retried), again(Answer::Refused, &retried)), ((0, 0), (0, 0)));
    }

    #[test]
    fn what_is_not_charged_needs_no_reason() {
        let paid = check((Answer::Failed, Fate::Delivered), &[]);
        assert_eq!((paid.charged, paid.needed, paid.findings.len()), (1, 1, 0));
    }
}
