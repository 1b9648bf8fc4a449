//! Processes that die, and two that share a file.

use std::{collections::HashSet, path::Path};

use stagegate_core::{
    Epoch, ReplicaId, RunId, Store,
    fair::Shares,
    store::{Commit, Committed, Lease, NewRun},
};
use stagegate_testkit::store::fixtures::{
    checkpoint, commit, dump, full_attempt, full_stage, leased_run, live_replica, new_run, stage, step, tenant,
};

use crate::support::{child_database, folder, open, open_dyn, spawn_child, tell};

/// A step that leaves rows in every table.
fn whole(lease: Lease, last_seq: u64) -> Commit {
    let of = format!("s{last_seq}");
    Commit {
        stages: vec![full_stage(&of, "x")],
        attempts: vec![(stage(&of), full_attempt(1, "x"))],
        checkpoints: vec![(stage(&of), checkpoint(of.clone().into()))],
        ..step(lease, last_seq)
    }
}

/// Only as a child: submits and commits, batch after batch, and tells of what was acknowledged, until it is killed.
#[tokio::test]
async fn child_that_writes_until_it_is_killed() {
    let Some(path) = child_database() else { return };
    let store = open_dyn(&path).await;
    let owner = live_replica(&store).await;
    for n in 0.. {
        let runs: Vec<NewRun> = (0..8).map(|_| leased_run(n, owner)).collect();
        store.submit(&runs).await.expect("submit");
        for last_seq in 3..6 {
            let steps: Vec<Commit> =
                runs.iter().map(|run| whole(Lease { run: run.id, epoch: Epoch(1) }, last_seq)).collect();
            assert_eq!(store.commit(&steps).await.expect("commit"), vec![Committed::Now; 8]);
            for run in &runs {
                tell(&format!("{} {}", run.id, last_seq + 1));
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_a_kill() {
    let (_folder, path) = folder();
    for round in 1..=3_usize {
        let (mut child, mut told) = spawn_child("crash::child_that_writes_until_it_is_killed", &path);
        let mut acknowledged: Vec<String> = told.by_ref().take(150 * round).collect();
        child.kill().expect("SIGKILL");
        acknowledged.extend(told);
        child.wait().expect("it ended");
        let store = open(&path).await;
        assert!(acknowledged.len() >= 150 * round);
        for line in acknowledged {
            let (run, seq) = line.split_once(' ').expect("two words");
            let run: RunId = run.parse().expect("an id");
            assert_whole(&store, run, seq.parse().expect("a number")).await;
        }
    }
}

/// Every step up to there is whole, and what came after it is whole or not there.
async fn assert_whole(store: &dyn Store, run: RunId, seq: u64) {
    let of = tenant("acme");
    let detail = store.run(&of, run).await.expect("read").expect("an acknowledged run is there");
    assert!(detail.run.last_seq >= seq, "{run}: {} after {seq} was acknowledged", detail.run.last_seq);
    let events = store.events(&of, run, 0, 100).await.expect("read");
    assert!((1..).zip(&events).all(|(seq, event)| seq == event.seq));
    assert_eq!(events.len() as u64, detail.run.last_seq);
    for last_seq in 3..detail.run.last_seq {
        let found = store.stage(&of, run, &stage(&format!("s{last_seq}"))).await.expect("read").expect("a stage");
        assert_eq!(found.attempts, [full_attempt(1, "x")]);
        assert!(found.checkpoint.is_some());
    }
}

/// Claims until nothing is left, and commits on each run it got.
async fn take_all(path: &Path) -> Vec<RunId> {
    let store = open_dyn(path).await;
    let owner: ReplicaId = live_replica(&store).await;
    let mut mine = Vec::new();
    loop {
        let leases = store.claim(owner, 3, &Shares::default()).await.expect("claim");
        if leases.is_empty() {
            return mine;
        }
        for lease in leases {
            assert_eq!(lease.epoch, Epoch(1), "a run was taken twice");
            for last_seq in 1..4 {
                assert_eq!(commit(&store, &whole(lease, last_seq)).await, Committed::Now);
            }
            mine.push(lease.run);
        }
    }
}

/// Only as a child: takes what it can get and tells of it.
#[tokio::test]
async fn child_that_takes_runs() {
    let Some(path) = child_database() else { return };
    for run in take_all(&path).await {
        tell(&run.to_string());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_that_share_a_file_share_the_work() {
    let (_folder, path) = folder();
    let store = open_dyn(&path).await;
    let runs: Vec<NewRun> = (0..90).map(new_run).collect();
    store.submit(&runs).await.expect("submit");
    let children: Vec<_> = (0..2).map(|_| spawn_child("crash::child_that_takes_runs", &path)).collect();
    let mut taken = take_all(&path).await;
    for (mut child, told) in children {
        taken.extend(told.map(|run| run.parse::<RunId>().expect("an id")));
        assert!(child.wait().expect("it ended").success());
    }
    assert_eq!(taken.len(), runs.len(), "a run was taken twice or never");
    assert_eq!(taken.iter().collect::<HashSet<_>>().len(), runs.len());
    for run in &runs {
        let found = dump(&store, &run.tenant, run.id).await;
        assert_eq!(found.detail.run.last_seq, 4);
        assert_eq!(found.stages.len(), 3);
    }
}
