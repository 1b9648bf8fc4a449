//! Retention: owns the walk through what has ended, and what is too old to be kept. The store removes; this decides.
//!
//! One replica walks at a time: the one that has lived longest. It looks at every run in the order of their ids, a page
//! at a time with a pause after each, and begins anew a while after it came to the end. A page is decided by the run's
//! own pipeline version first, and by the configuration where that says nothing. Payloads go first, whole runs at the
//! end of their own time. Nothing here can remove what is alive: the store looks at the state under the row's lock.
//!
//! The release before removes payloads too, while it is the eldest, and leaves what quotes them in rows that this one wrote. So
//! what was purged is purged again, until a whole walk was made that began when none of that release could come back.

use std::{collections::HashMap, sync::Arc, time::Duration};

use chrono::{DateTime, TimeDelta, Utc};
use stagegate_core::{
    Capability, Error, PipelineName, RunId, RunState, StoreError, TenantId,
    pipeline::{Retention, Span},
    store::Kept,
};

use crate::shared::Shared;

/// Runs looked at in one step.
const PAGE: u32 = 500;
/// Runs removed in one transaction.
const BATCH: usize = 100;
/// Runs of a page that may fail on their own before the round is given up.
const FAILED_MAX: u32 = 8;
/// The pause after a page: a walk must not be felt.
const PAUSE: Duration = Duration::from_millis(50);
/// Nothing younger than this is looked at.
const YOUNG: TimeDelta = TimeDelta::seconds(1);

/// Walks until the drain begins.
pub(crate) async fn walk(shared: Arc<Shared>) {
    let mut again = true;
    loop {
        let pause = shared.config.retention_every.0.mul_f64(0.9 + shared.random::<f64>() / 5.0);
        tokio::select! {
            biased;
            () = shared.drain.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        let is_alone = shared.common(Capability::OpenVocabulary);
        match is_eldest(&shared).await {
            Ok(false) => {}
            Ok(true) => match round(&shared, again).await {
                Ok((purged, deleted)) => {
                    again &= !is_alone;
                    if purged + deleted > 0 {
                        tracing::info!(purged, deleted, "retention removed what was too old");
                    }
                }
                Err(error) => tracing::warn!(%error, "retention stopped half way; it goes on in its next round"),
            },
            Err(error) => tracing::warn!(%error, "retention did not begin; it waits for its next round"),
        }
    }
}

/// Whether this replica is the one that walks. Two that both think so do the same work twice and no harm.
async fn is_eldest(shared: &Shared) -> Result<bool, Error> {
    let replicas = shared.store.replicas(None).await?;
    let eldest = replicas.iter().filter(|replica| replica.alive && !replica.draining).map(|replica| replica.id.0).min();
    Ok(eldest == Some(shared.replica().0))
}

/// One walk from the oldest run to the youngest. Returns how many runs lost their payloads, and how many went whole.
async fn round(shared: &Shared, again: bool) -> Result<(u64, u64), Error> {
    let (mut after, mut purged, mut deleted) = (None::<RunId>, 0, 0);
    let mut kept_by = HashMap::new();
    loop {
        let now = shared.clock.now();
        let page = shared.store.kept(after, now - YOUNG, PAGE).await?;
        let (mut payloads, mut whole) = (Vec::new(), Vec::new());
        for run in &page {
            let rule = rule(shared, &mut kept_by, run).await;
            match due(run, &rule, again, now) {
                Due::Nothing => {}
                Due::Payloads => payloads.push(run.run),
                Due::Whole => whole.push(run.run),
            }
        }
        purged += remove(shared, &payloads, Due::Payloads, now).await?;
        deleted += remove(shared, &whole, Due::Whole, now).await?;
        if page.len() < PAGE as usize || shared.drain.is_cancelled() {
            return Ok((purged, deleted));
        }
        after = page.last().map(|run| run.run);
        tokio::time::sleep(PAUSE).await;
    }
}

/// Removes what is due of these runs, a batch at a time. One that fails though the database answers is halved: it may be
/// more than a statement's time allows. A run that fails alone is left to the next round, and holds up no other; where
/// many do, something else is wrong.
async fn remove(shared: &Shared, runs: &[RunId], what: Due, now: DateTime<Utc>) -> Result<u64, Error> {
    let (mut removed, mut failed) = (0, 0);
    let mut parts: Vec<&[RunId]> = runs.chunks(BATCH).rev().collect();
    while let Some(part) = parts.pop() {
        let done = match what {
            Due::Nothing => return Ok(0),
            Due::Payloads => shared.store.purge(part, now).await,
            Due::Whole => shared.store.delete(part).await.map(|gone| gone.len() as u64),
        };
        match done {
            Ok(gone) => {
                let kind = if what == Due::Whole { "run" } else { "payloads" };
                shared.metrics.retention_removed.with_label_values(&[kind]).inc_by(gone);
                removed += gone;
            }
            Err(error) if shared.drain.is_cancelled() || failed == FAILED_MAX => return Err(error.into()),
            Err(error @ StoreError::Full(_)) => return Err(error.into()),
            Err(error) if error.is_retryable() && shared.store.ping().await.is_err() => return Err(error.into()),
            Err(error) if part.len() == 1 => {
                failed += 1;
                tracing::error!(run_id = %part[0], %error, "what is too old of this run could not be removed");
            }
            Err(error) => {
                tracing::warn!(%error, runs = part.len(), "a batch of old runs could not be removed; it is halved");
                let (left, right) = part.split_at(part.len() / 2);
                parts.extend([right, left]);
            }
        }
    }
    Ok(removed)
}

type Rules = HashMap<(TenantId, PipelineName, u32), Retention>;

/// How long a run is kept, by its pipeline version and the configuration. A version that cannot be read keeps its runs
/// as the configuration says.
async fn rule(shared: &Shared, rules: &mut Rules, run: &Kept) -> Retention {
    let key = (run.tenant.clone(), run.pipeline.clone(), run.version);
    if let Some(rule) = rules.get(&key) {
        return rule.clone();
    }
    let pipeline = shared.pipeline(&run.tenant, &run.pipeline, Some(run.version)).await;
    let own = match pipeline {
        Ok(found) => found.and_then(|(pipeline, _)| pipeline.retention.clone()).unwrap_or_default(),
        Err(error) => {
            tracing::warn!(%error, pipeline = %run.pipeline, "retention goes by the configuration for this pipeline");
            Retention::default()
        }
    };
    let general = &shared.config.retention;
    let rule = Retention {
        succeeded: own.succeeded.or(general.succeeded),
        failed: own.failed.or(general.failed),
        cancelled: own.cancelled.or(general.cancelled),
        expired: own.expired.or(general.expired),
        payloads: own.payloads.or(general.payloads),
    };
    rules.insert(key, rule.clone());
    rule
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    Nothing,
    Payloads,
    Whole,
}

/// What of a run is too old; whether what was purged is purged `again`.
fn due(run: &Kept, rule: &Retention, again: bool, now: DateTime<Utc>) -> Due {
    let Some(finished_at) = run.finished_at.filter(|_| run.state.is_terminal()) else { return Due::Nothing };
    let span = match run.state {
        RunState::Succeeded => rule.succeeded,
        RunState::Failed => rule.failed,
        RunState::Cancelled => rule.cancelled,
        RunState::Expired => rule.expired,
        RunState::Queued | RunState::Running | RunState::Waiting | RunState::Unknown(_) => None,
    };
    let over =
        |span: Option<Span>| span.is_some_and(|span| (now - finished_at).to_std().is_ok_and(|age| age >= span.0));
    if over(span) {
        Due::Whole
    } else if if run.purged { again } else { over(rule.payloads) } {
        Due::Payloads
    } else {
        Due::Nothing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(state: RunState, hours_ago: i64) -> Kept {
        let now = DateTime::UNIX_EPOCH + TimeDelta::days(1000);
        Kept {
            run: RunId::new(now, [0; 10]),
            tenant: TenantId::default(),
            pipeline: PipelineName::new("p").expect("a name"),
            version: 1,
            state,
            finished_at: state.is_terminal().then(|| now - TimeDelta::hours(hours_ago)),
            purged: false,
        }
    }

    #[test]
    fn each_state_has_its_own_time_and_what_lives_has_none() {
        let now = DateTime::UNIX_EPOCH + TimeDelta::days(1000);
        let hours = |hours| Some(Span(Duration::from_hours(hours)));
        let rule = Retention { succeeded: hours(10), failed: hours(20), payloads: hours(5), ..Retention::default() };
        let decide = |state, ago| due(&kept(state, ago), &rule, false, now);
        assert_eq!(decide(RunState::Succeeded, 4), Due::Nothing);
        assert_eq!(decide(RunState::Succeeded, 5), Due::Payloads);
        assert_eq!(decide(RunState::Succeeded, 10), Due::Whole);
        assert_eq!(decide(RunState::Failed, 10), Due::Payloads);
        assert_eq!(decide(RunState::Failed, 20), Due::Whole);
        assert_eq!(decide(RunState::Cancelled, 10_000), Due::Payloads, "kept for ever, without its payloads");
        for state in [RunState::Queued, RunState::Running, RunState::Waiting] {
            assert_eq!(decide(state, 10_000), Due::Nothing);
        }
        let purged = Kept { purged: true, ..kept(RunState::Failed, 10) };
        assert_eq!(due(&purged, &rule, false, now), Due::Nothing);
        assert_eq!(due(&purged, &rule, true, now), Due::Payloads, "what another release purged is purged again");
        assert_eq!(due(&Kept { purged: true, ..kept(RunState::Failed, 20) }, &rule, true, now), Due::Whole);
        assert_eq!(due(&kept(RunState::Failed, 10_000), &Retention::default(), true, now), Due::Nothing);
    }
}
