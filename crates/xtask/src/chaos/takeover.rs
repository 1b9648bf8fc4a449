//! Take-over times: owns what is measured from a replica's end to the first event of its runs by another owner.

use stagegate_testkit::audit::Audit;

use super::{
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

/// Every run that a replica owned when it was killed, frozen or cut off, with the time until it went on.
pub(crate) fn measure(orphans: &[Orphans], windows: &[Window], audit: &Audit, timeline: &Timeline) -> Vec<TakeOver> {
    let mut measured = Vec::new();
    for orphans in orphans {
        for run in &orphans.runs {
            let events = audit.events.get(run).into_iter().flatten();
            let mut later =
                events.map(|event| (timeline.of_wall(event.at), event)).filter(|(at, _)| *at > orphans.at_s);
            // What ended in the very moment was not taken over; whatever else comes next is another owner's.
            let Some((at, _)) = later.find(|(_, event)| event.kind == "run.resumed") else { continue };
            let (from, to) = (orphans.at_s, at);
            let other = |window: &&Window| {
                let of_others = matches!(window.kind, WindowKind::Interrupted(_) | WindowKind::StoreAway);
                let matters = of_others && window.what != orphans.what;
                matters && window.from_s < to && window.to_s > from
            };
            measured.push(TakeOver { seconds: to - from, undisturbed: windows.iter().find(other).is_none() });
        }
    }
    measured.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    measured
}
