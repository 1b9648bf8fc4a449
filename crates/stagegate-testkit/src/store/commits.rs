//! Promises about commits.

use std::time::Duration;

use serde_json::json;
use stagegate_core::{
    Epoch, ReplicaId, RunState,
    store::{Commit, Committed, Disposition, Lease, StageDetail},
};

use super::{
    Subject,
    fixtures::{
        NASTY, at, checkpoint, claim_all, commit, dump, end, event, failure, full_attempt, full_stage, large_json,
        live_replica, nasty_json, new_run, park, record, stage, step, submit, submit_leased, totals,
    },
};

/// A step with something in every field.
fn whole(lease: Lease, last_seq: u64, text: &str) -> Commit {
    let mut step = step(lease, last_seq);
    step.events = vec![event(last_seq + 1, 31, "s1"), event(last_seq + 2, 32, "s2")];
    step.stages = vec![full_stage("s1", text), full_stage("s2", text)];
    step.attempts = vec![
        (stage("s1"), full_attempt(1, text)),
        (stage("s1"), full_attempt(2, text)),
        (stage("s2"), full_attempt(1, text)),
    ];
    step.checkpoints = vec![(stage("s1"), checkpoint(nasty_json()))];
    step.stages_done = 1;
    step.totals = totals(3);
    step.failure = Some(failure(text));
    step.started_at = Some(at(6));
    step.finished_at = Some(at(7));
    step.output = Some(nasty_json().into());
    step
}

/// Every field of it reads back, and nothing else changed.
pub async fn a_commit_happens_whole(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let (run, lease) = submit_leased(store, 1, owner).await;
    let before = dump(store, &run.tenant, run.id).await;
    let step = whole(lease, 3, "why");
    assert_eq!(commit(store, &step).await, Committed::Now);
    let after = dump(store, &run.tenant, run.id).await;

    let mut expected = before.detail.clone();
    expected.run.last_seq = 5;
    expected.run.stages_done = 1;
    expected.run.totals = totals(3);
    expected.run.failure = Some(failure("why"));
    expected.run.started_at = Some(at(6));
    expected.run.finished_at = Some(at(7));
    expected.output = Some(nasty_json().into());
    expected.stages.clone_from(&step.stages);
    assert_eq!(after.detail, expected);
    assert_eq!(after.events, [before.events, step.events].concat());
    let one = StageDetail {
        stage: full_stage("s1", "why"),
        checkpoint: Some(checkpoint(nasty_json())),
        attempts: vec![full_attempt(1, "why"), full_attempt(2, "why")],
    };
    let two = StageDetail { stage: full_stage("s2", "why"), checkpoint: None, attempts: vec![full_attempt(1, "why")] };
    assert_eq!(after.stages, [one, two]);
    assert_eq!(store.owned(owner).await.expect("owned"), [lease], "the owner goes on");
    assert_eq!(store.commit(&[]).await.expect("nothing to do"), []);
}

/// Whatever became of the lease with it; until somebody else takes the run.
pub async fn repeating_a_commit_changes_nothing(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let dispositions = [
        (RunState::Running, Disposition::Keep),
        (RunState::Succeeded, Disposition::End),
        (RunState::Waiting, Disposition::Park(None)),
        (RunState::Waiting, Disposition::Park(Some(Duration::ZERO))),
    ];
    for (state, then) in dispositions {
        let (run, lease) = submit_leased(store, 1, owner).await;
        let step = Commit { state, then, ..whole(lease, 3, "x") };
        assert_eq!(commit(store, &step).await, Committed::Now);
        let before = dump(store, &run.tenant, run.id).await;
        assert_eq!(commit(store, &step).await, Committed::Already, "{then:?}");
        assert_eq!(dump(store, &run.tenant, run.id).await, before);
    }
    // The run that is due is taken over: now its former owner must stop.
    let heir = live_replica(store).await;
    let taken = claim_all(store, heir).await;
    assert_eq!(taken.len(), 1);
    let old = Lease { epoch: Epoch(1), ..taken[0] };
    assert_eq!(commit(store, &whole(old, 3, "x")).await, Committed::Stale);
}

/// An older epoch, one that was never given, one without an owner, a run that is not there.
pub async fn a_stale_lease_changes_nothing(subject: Subject) {
    let store = &subject.store;
    let (owner, heir) = (live_replica(store).await, live_replica(store).await);
    let (run, old) = submit_leased(store, 1, owner).await;
    store.release(&[old]).await.expect("release");
    let before = dump(store, &run.tenant, run.id).await;
    assert_eq!(commit(store, &whole(old, 3, "x")).await, Committed::Stale, "released");
    let taken = claim_all(store, heir).await[0];
    for epoch in [Epoch(0), old.epoch, Epoch(taken.epoch.0 + 1), Epoch(i64::MAX), Epoch(-1)] {
        let stale = Lease { run: run.id, epoch };
        assert_eq!(commit(store, &whole(stale, 3, "x")).await, Committed::Stale, "{epoch:?}");
    }
    let nowhere = Lease { run: new_run(1).id, epoch: Epoch(1) };
    assert_eq!(commit(store, &whole(nowhere, 3, "x")).await, Committed::Stale, "no such run");
    assert_eq!(dump(store, &run.tenant, run.id).await, before);
    assert_eq!(store.owned(heir).await.expect("owned"), [taken]);
    assert_eq!(commit(store, &whole(taken, 3, "x")).await, Committed::Now, "the heir goes on");

    let queued = new_run(2);
    submit(store, &queued).await;
    let before = dump(store, &queued.tenant, queued.id).await;
    for epoch in [Epoch(0), Epoch(1)] {
        let never = Lease { run: queued.id, epoch };
        assert_eq!(commit(store, &step(never, 1)).await, Committed::Stale, "never leased");
    }
    assert_eq!(dump(store, &queued.tenant, queued.id).await, before);
}

/// The right lease, but not the next event.
pub async fn a_gap_in_the_events_changes_nothing(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let (run, lease) = submit_leased(store, 1, owner).await;
    let before = dump(store, &run.tenant, run.id).await;
    for last_seq in [0, 2, 4, 100] {
        assert_eq!(commit(store, &whole(lease, last_seq, "x")).await, Committed::Stale, "{last_seq}");
    }
    assert_eq!(dump(store, &run.tenant, run.id).await, before);
    assert_eq!(commit(store, &whole(lease, 3, "x")).await, Committed::Now);
}

/// Its neighbours in the same call happen, and answers come in order.
pub async fn a_stale_step_fails_alone(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let mut leases = Vec::new();
    for n in 0..5 {
        leases.push(submit_leased(store, n, owner).await.1);
    }
    let repeated = whole(leases[3], 3, "x");
    assert_eq!(commit(store, &repeated).await, Committed::Now);
    let batch = [
        whole(leases[4], 3, "e"),
        whole(Lease { epoch: Epoch(8), ..leases[0] }, 3, "a"),
        repeated,
        whole(leases[2], 7, "c"),
        whole(leases[1], 3, "b"),
    ];
    let answers = store.commit(&batch).await.expect("commit");
    let expected = [Committed::Now, Committed::Stale, Committed::Already, Committed::Stale, Committed::Now];
    assert_eq!(answers, expected);
    let seqs = [3, 5, 3, 5, 5];
    for (lease, last_seq) in leases.iter().zip(seqs) {
        assert_eq!(record(store, lease.run).await.last_seq, last_seq);
    }
}

/// Whoever tries again, under whatever epoch: the first one stays.
pub async fn a_stage_has_one_checkpoint_ever(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let (run, mut lease) = submit_leased(store, 1, owner).await;
    for (last_seq, output) in (3..).zip(["first", "second", "third"]) {
        let mut step = step(lease, last_seq);
        step.stages = vec![full_stage("s1", output)];
        step.checkpoints = vec![(stage("s1"), checkpoint(output.into()))];
        assert_eq!(commit(store, &step).await, Committed::Now);
        store.release(&[lease]).await.expect("release");
        lease = claim_all(store, owner).await[0];
    }
    let detail = store.stage(&run.tenant, run.id, &stage("s1")).await.expect("read").expect("there");
    assert_eq!(detail.checkpoint, Some(checkpoint("first".into())));
    assert_eq!(detail.stage, full_stage("s1", "third"), "the rest of the commit happens");
    let loaded = store.load(&[lease]).await.expect("load");
    assert_eq!(loaded[0].checkpoints, [(stage("s1"), checkpoint("first".into()))]);
}

/// Nobody owns it, nobody can claim it.
pub async fn a_finished_run_is_nobodys(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    for state in [RunState::Succeeded, RunState::Failed, RunState::Cancelled, RunState::Expired] {
        let (run, lease) = submit_leased(store, 1, owner).await;
        let last = Commit { output: Some(json!("done").into()), ..end(lease, 3, state) };
        assert_eq!(commit(store, &last).await, Committed::Now);
        assert_eq!(store.owned(owner).await.expect("owned"), []);
        assert_eq!(claim_all(store, owner).await, []);
        assert_eq!(commit(store, &step(lease, 4)).await, Committed::Stale);
        let detail = store.run(&run.tenant, run.id).await.expect("read").expect("there");
        assert_eq!((detail.run.state, detail.run.finished_at), (state, Some(at(20))));
        assert_eq!(detail.output, Some(json!("done").into()));
    }
}

/// Or for a signal only; and a run without a delay is due at once.
pub async fn a_parked_run_waits_for_its_time(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let parked = async |delay| -> Lease {
        let (_, lease) = submit_leased(store, 1, owner).await;
        assert_eq!(commit(store, &park(lease, 3, delay)).await, Committed::Now);
        lease
    };
    parked(None).await;
    parked(Some(Duration::from_hours(1))).await;
    assert_eq!(store.owned(owner).await.expect("owned"), []);
    assert_eq!(claim_all(store, owner).await, []);
    for delay in [Duration::ZERO, Duration::from_millis(15)] {
        let lease = parked(Some(delay)).await;
        assert_eq!(record(store, lease.run).await.state, RunState::Waiting);
        let mut taken = claim_all(store, owner).await;
        while taken.is_empty() {
            taken = claim_all(store, owner).await;
        }
        assert_eq!(taken, [Lease { epoch: Epoch(2), ..lease }]);
    }
}

/// More than any writer merges.
pub async fn many_steps_fit_one_commit(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let runs: Vec<_> = (0..300).map(|n| super::fixtures::leased_run(n, owner)).collect();
    store.submit(&runs).await.expect("submit");
    let steps: Vec<Commit> = runs.iter().map(|run| whole(Lease { run: run.id, epoch: Epoch(1) }, 3, "x")).collect();
    assert_eq!(store.commit(&steps).await.expect("commit"), vec![Committed::Now; 300]);
    assert_eq!(store.commit(&steps).await.expect("commit"), vec![Committed::Already; 300]);
    for run in runs.iter().step_by(37) {
        let events = store.events(&run.tenant, run.id, 0, 100).await.expect("read");
        assert_eq!(events.iter().map(|event| event.seq).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    }
}

/// One author whose first try is still under way when it tries again.
pub async fn concurrent_commits_of_one_step_happen_once(subject: Subject) {
    let store = &subject.store;
    let owner: ReplicaId = live_replica(store).await;
    for round in 0..10 {
        let (run, lease) = submit_leased(store, round, owner).await;
        let tasks: Vec<_> = (0..6)
            .map(|_| {
                let store = store.clone();
                tokio::spawn(async move { commit(&store, &whole(lease, 3, "x")).await })
            })
            .collect();
        let mut now = 0;
        for task in tasks {
            match task.await.expect("no panic") {
                Committed::Now => now += 1,
                Committed::Already => {}
                Committed::Stale => panic!("the lease is still held"),
            }
        }
        assert_eq!(now, 1);
        let events = store.events(&run.tenant, run.id, 0, 100).await.expect("read");
        assert_eq!(events.len(), 5);
    }
}

/// In failures, reasons, outputs.
pub async fn any_text_and_number_comes_back_as_it_was(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let (run, lease) = submit_leased(store, 1, owner).await;
    let mut step = whole(lease, 3, NASTY);
    step.checkpoints[0].1.score = Some(f64::MIN_POSITIVE);
    step.totals.usage.input_tokens = 1 << 62;
    step.totals.cost_usd = stagegate_core::Usd::from_nanos(i64::MAX);
    assert_eq!(commit(store, &step).await, Committed::Now);
    let read = dump(store, &run.tenant, run.id).await;
    assert_eq!(read.detail.run.failure, step.failure);
    assert_eq!(read.detail.run.totals, step.totals);
    assert_eq!(read.detail.stages, step.stages);
    assert_eq!(read.stages[0].checkpoint.as_ref(), Some(&step.checkpoints[0].1));
    assert_eq!(read.stages[0].attempts[1], step.attempts[1].1);
}

/// A mebibyte.
pub async fn a_large_output_comes_back_as_it_was(subject: Subject) {
    let store = &subject.store;
    let owner = live_replica(store).await;
    let (run, lease) = submit_leased(store, 1, owner).await;
    let mut step = step(lease, 3);
    step.stages = vec![full_stage("s1", "x")];
    step.checkpoints = vec![(stage("s1"), checkpoint(large_json()))];
    step.output = Some(large_json().into());
    assert_eq!(commit(store, &step).await, Committed::Now);
    let read = dump(store, &run.tenant, run.id).await;
    assert!(read.detail.output == step.output, "a large output came back changed");
    assert!(read.stages[0].checkpoint.as_ref() == Some(&step.checkpoints[0].1), "a large checkpoint came back changed");
}
