//! Promises about news: the events of many runs at once.

use std::{collections::BTreeMap, sync::Arc};

use stagegate_core::{
    Event, RunId, Store,
    store::{Commit, NewRun},
};

use super::{
    Subject,
    fixtures::{commit, event, leased_run, live_replica, new_run, run_id, step, submit, submit_leased, tenant},
};

async fn news(store: &Arc<dyn Store>, seen: &[(RunId, u64)], limit: u32) -> BTreeMap<RunId, Vec<u64>> {
    let rows = store.news(seen, limit).await.expect("news");
    let count = rows.len();
    let seqs = |events: Vec<Event>| events.into_iter().map(|event| event.seq).collect();
    let found: BTreeMap<_, _> = rows.into_iter().map(|(run, events)| (run, seqs(events))).collect();
    assert_eq!(found.len(), count, "each run once");
    found
}

/// In order, each after its own seq, whole, and whosever it is; a run without any is left out.
pub async fn news_are_told_of_many_runs_at_once(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let (first, lease) = submit_leased(store, 1, owner).await;
    let (second, _) = submit_leased(store, 2, owner).await;
    let theirs = NewRun { tenant: tenant("umbrella"), ..new_run(3) };
    submit(store, &theirs).await;
    let (quiet, _) = submit_leased(store, 4, owner).await;
    let more = Commit { events: (4..9).map(|seq| event(seq, 20, "s2")).collect(), ..step(lease, 3) };
    commit(store, &more).await;
    let seen = [(quiet.id, 3), (theirs.id, 0), (first.id, 2), (run_id(9), 0), (second.id, 0)];
    let told = news(store, &seen, 100).await;
    let expected: [(RunId, Vec<u64>); 3] =
        [(first.id, (3..9).collect()), (second.id, (1..4).collect()), (theirs.id, vec![1])];
    assert_eq!(told, expected.into());
    let whole = store.news(&[(first.id, 0)], 100).await.expect("news");
    assert_eq!(whole, [(first.id, store.events(&first.tenant, first.id, 0, 100).await.expect("events"))]);
    assert_eq!(news(store, &[], 100).await, [].into());
    assert_eq!(news(store, &[(first.id, 8), (second.id, 99)], 100).await, [].into());
}

/// A run with many takes nothing from the others, and goes on where it ended.
pub async fn news_are_limited_by_run(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let (long, lease) = submit_leased(store, 1, owner).await;
    let (short, _) = submit_leased(store, 2, owner).await;
    let more = Commit { events: (4..31).map(|seq| event(seq, 20, "s2")).collect(), ..step(lease, 3) };
    commit(store, &more).await;
    let mut seen = 0;
    let mut all: Vec<u64> = Vec::new();
    while seen < 30 {
        let told = news(store, &[(long.id, seen), (short.id, 1)], 7).await;
        assert_eq!(told[&short.id], [2, 3]);
        assert!(told[&long.id].len() <= 7);
        all.extend(&told[&long.id]);
        seen = *told[&long.id].last().expect("there are more");
    }
    assert_eq!(all, (1..31).collect::<Vec<_>>());
}

/// Hundreds in one question.
pub async fn news_are_told_of_as_many_as_are_watched(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let runs: Vec<NewRun> = (0..700).map(|ms| leased_run(ms, owner)).collect();
    store.submit(&runs).await.expect("submit");
    let seen: Vec<(RunId, u64)> = (0..).zip(&runs).map(|(n, run)| (run.id, n % 4)).collect();
    let told = news(store, &seen, 2).await;
    assert_eq!(told.len(), 525, "those that were told of all three are left out");
    for (run, after) in seen {
        let expected: Vec<u64> = (after + 1..4).take(2).collect();
        assert_eq!(told.get(&run).cloned().unwrap_or_default(), expected);
    }
}
