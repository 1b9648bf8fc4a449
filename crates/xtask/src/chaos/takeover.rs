//! Take-overs: owns what is measured from a replica's end to the first event of its runs by another owner, why the others
//! were not taken over, and that a replica which only stood still for a moment keeps what it has.

use std::collections::BTreeMap;

use stagegate_testkit::audit::{Audit, EventRow};
use uuid::Uuid;

use super::{
    reconcile::Check,
    timeline::Timeline,
    world::{Orphans, Window, WindowKind},
};

/// One run that was taken over.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TakeOver {
    pub(crate) seconds: f64,
    /// No other fault of the store or of a replica was about in that time.
    pub(crate) undisturbed: bool,
}

/// What became of the runs whose owner was taken away.
#[derive(Debug, Default)]
pub(crate) struct TakeOvers {
    /// By how long they took.
    pub(crate) taken: Vec<TakeOver>,
    /// Why the others were not.
    pub(crate) not_taken: BTreeMap<&'static str, u64>,
}

/// What came next for a run that had an owner at some time.
enum Next {
    /// Another owner went on with it, then.
    Resumed(f64),
    /// Nobody had to, and why.
    Kept(&'static str),
}

fn next(audit: &Audit, timeline: &Timeline, run: Uuid, after_s: f64) -> Next {
    let told = |event: &EventRow| match (event.kind.as_str(), event.body["state"].as_str()) {
        ("run.resumed", _) => Some(Next::Resumed(timeline.of_wall(event.at))),
        ("run.finished", Some("cancelled" | "expired")) => Some(Next::Kept("its owner had ended it as cancelled")),
        ("run.finished", _) => Some(Next::Kept("its owner had come to its end")),
        ("run.waiting", _) => Some(Next::Kept("its owner had let it wait")),
        _ => None,
    };
    let events = audit.events.get(&run).into_iter().flatten();
    let mut later = events.filter(|event| timeline.of_wall(event.at) > after_s);
    later.find_map(told).unwrap_or(Next::Kept("it had ended in that moment"))
}

/// Every run that a replica owned when it was killed, frozen or cut off, with the time until it went on.
pub(crate) fn measure(orphans: &[Orphans], windows: &[Window], audit: &Audit, timeline: &Timeline) -> TakeOvers {
    let mut measured = TakeOvers::default();
    for orphans in orphans {
        for run in &orphans.runs {
            match next(audit, timeline, *run, orphans.at_s) {
                Next::Resumed(at_s) => {
                    let undisturbed = !disturbed(windows, orphans, at_s);
                    measured.taken.push(TakeOver { seconds: at_s - orphans.at_s, undisturbed });
                }
                Next::Kept(why) => *measured.not_taken.entry(why).or_default() += 1,
            }
        }
    }
    measured.taken.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    measured
}

/// Whether the store or a replica met another fault between the end of the owner and then.
fn disturbed(windows: &[Window], orphans: &Orphans, to_s: f64) -> bool {
    windows.iter().any(|window| {
        let matters = matches!(window.kind, WindowKind::Interrupted(_) | WindowKind::Paused(_) | WindowKind::StoreAway);
        matters && window.what != orphans.what && window.from_s < to_s && window.to_s > orphans.at_s
    })
}

/// Who stood still for less than its fence keeps its runs. Judged are those that another owner went on with before the
/// replica had been awake for a TTL, or the store or that replica met another fault (an end in order hands back, too);
/// not where one was about in the TTL before, and not from when on it says itself that it was fenced: then the machine stood still for longer than we asked for.
pub(crate) fn kept(
    paused: &[(Orphans, f64)],
    windows: &[Window],
    ttl_s: f64,
    audit: &Audit,
    timeline: &Timeline,
) -> Check {
    let mut check = Check::new("who is frozen for less than the fence keeps its runs");
    for (owned, awake_s) in paused {
        let replica = owned.what.split_inclusive(':').next().unwrap_or_default();
        let matters = |window: &&Window| {
            // That it stopped its own work is no excuse: a short freeze is no reason to.
            let of_it = window.what.starts_with(replica)
                && !window.what.contains("stops its own work")
                && !matches!(window.kind, WindowKind::CacheAway(_) | WindowKind::CacheLost);
            window.kind == WindowKind::StoreAway || of_it && window.what != owned.what
        };
        let others = windows.iter().filter(matters).filter(|window| window.to_s > owned.at_s - ttl_s);
        let until_s = others.map(|window| window.from_s).fold(awake_s + ttl_s, f64::min);
        if until_s <= owned.at_s {
            continue;
        }
        for run in &owned.runs {
            check.look();
            match next(audit, timeline, *run, owned.at_s) {
                Next::Resumed(at_s) if at_s < until_s => {
                    check.find(format!("run {run}: {} at {:.2} s, taken over at {at_s:.2} s", owned.what, owned.at_s));
                }
                _ => {}
            }
        }
    }
    check
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use chrono::TimeDelta;
    use serde_json::json;
    use stagegate_core::{Clock as _, SystemClock};

    use super::*;

    const RUN: Uuid = Uuid::from_u128(1);

    /// The run's events, with their times in seconds.
    fn audit(events: &[(&str, i64)]) -> Audit {
        let event = |(kind, at_s): &(&str, i64)| EventRow {
            seq: 1,
            at: SystemClock.now() + TimeDelta::seconds(*at_s),
            kind: (*kind).to_owned(),
            body: json!({ "state": "succeeded" }),
        };
        Audit {
            runs: HashMap::new(),
            keys: HashMap::new(),
            events: [(RUN, events.iter().map(event).collect())].into(),
            checkpoints: HashMap::new(),
            stages_succeeded: HashMap::new(),
            ledger: HashMap::new(),
            living: HashMap::new(),
        }
    }

    fn owned(what: &str) -> Orphans {
        Orphans { what: what.to_owned(), at_s: 10.0, runs: vec![RUN] }
    }

    #[test]
    fn only_what_another_owner_goes_on_with_is_a_take_over() {
        for (events, taken) in [
            (&[("stage.succeeded", 5), ("run.resumed", 13)][..], 1),
            (&[("run.waiting", 12), ("run.resumed", 16)], 0),
            (&[("run.finished", 12), ("run.retried", 13), ("run.resumed", 13)], 0),
            (&[("run.finished", 8)], 0),
        ] {
            let measured = measure(&[owned("r1: SIGKILL")], &[], &audit(events), &Timeline::begin());
            assert_eq!((measured.taken.len(), measured.not_taken.len()), (taken, 1 - taken), "{events:?}");
        }
    }

    #[test]
    fn who_stands_still_for_a_moment_and_loses_a_run_is_found() {
        let found = |events: &[(&str, i64)], windows: &[Window]| {
            let paused = [(owned("r1: SIGSTOP"), 10.5)];
            kept(&paused, windows, 3.0, &audit(events), &Timeline::begin()).wrong
        };
        let window = |what: &str, kind| Window { what: what.to_owned(), from_s: 11.0, to_s: 11.5, kind };
        let resumed = [("run.resumed", 12)];
        assert_eq!(found(&resumed, &[]), 1);
        assert_eq!(found(&resumed, &[window("r2: SIGKILL", WindowKind::Interrupted(1))]), 1);
        assert_eq!(found(&resumed, &[window("r1: SIGTERM", WindowKind::Other)]), 0);
        assert_eq!(found(&resumed, &[window("Postgres", WindowKind::StoreAway)]), 0);
        assert_eq!(found(&[("run.waiting", 11), ("run.resumed", 12)], &[]), 0);
        assert_eq!(found(&[("run.resumed", 30)], &[]), 0);
    }
}
