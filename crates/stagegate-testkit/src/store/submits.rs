//! Promises about submitting.

use std::{collections::HashSet, time::Duration};

use serde_json::json;
use stagegate_core::{
    Epoch, RunId, RunState, Totals,
    pipeline::CacheMode,
    store::{IDEMPOTENCY_TTL, Lease, NewRun, RunRecord, Submitted},
};

use super::{
    Subject,
    fixtures::{
        NASTY, at, beat, claim_all, dump, event, idempotency, large_json, leased_run, live_replica, nasty_json,
        new_run, pipeline, record, replica, submit, submit_leased, tenant,
    },
};

/// Every field.
pub async fn a_submitted_run_reads_back(subject: Subject) {
    let new = NewRun {
        pipeline: pipeline("other"),
        version: 7,
        stages_total: 5,
        cache_mode: Some(CacheMode::ReadOnly),
        priority: -3,
        labels: [("team".to_owned(), "é".to_owned()), ("env".to_owned(), String::new())].into(),
        request_id: None,
        ..new_run(1)
    };
    assert_eq!(submit(&subject.store, &new).await, Submitted::Accepted(None));
    let dump = dump(&subject.store, &new.tenant, new.id).await;
    assert_eq!(
        dump.detail.run,
        RunRecord {
            id: new.id,
            tenant: new.tenant.clone(),
            pipeline: new.pipeline.clone(),
            version: 7,
            state: RunState::Queued,
            cancel_requested: false,
            priority: -3,
            labels: new.labels.clone(),
            cache_mode: Some(CacheMode::ReadOnly),
            stages_total: 5,
            stages_done: 0,
            totals: Totals::default(),
            failure: None,
            request_id: None,
            created_at: at(1),
            start_at: None,
            started_at: None,
            finished_at: None,
            deadline_at: at(3_600_001),
            purged_at: None,
            last_seq: 1,
        }
    );
    assert_eq!((dump.detail.input, dump.detail.output), (new.input, None));
    assert_eq!(dump.events, new.events);
    assert!(dump.stages.is_empty());
    assert_eq!(subject.store.submit(&[]).await.expect("nothing to do"), []);
}

/// A try whose answer was lost is repeated, alone or inside a larger batch, with and without a key.
pub async fn submitting_again_changes_nothing(subject: Subject) {
    let keyed = NewRun { idempotency: idempotency("k", 1), ..new_run(2) };
    for run in [new_run(1), keyed] {
        submit(&subject.store, &run).await;
        let before = dump(&subject.store, &run.tenant, run.id).await;
        assert_eq!(submit(&subject.store, &run).await, Submitted::Accepted(None));
        let batch = [new_run(3), run.clone(), run.clone()];
        assert_eq!(subject.store.submit(&batch).await.expect("submit"), vec![Submitted::Accepted(None); 3]);
        assert_eq!(dump(&subject.store, &run.tenant, run.id).await, before);
    }
    let owner = live_replica(&subject.store).await;
    let (run, _) = submit_leased(&subject.store, 4, owner).await;
    assert_eq!(submit(&subject.store, &run).await, Submitted::Accepted(Some(Epoch(1))), "it is still its owner");
    subject.store.leave(owner).await.expect("leave");
    assert_eq!(submit(&subject.store, &run).await, Submitted::Accepted(None), "it is no longer");
}

/// At epoch 1, and nobody else can claim it.
pub async fn a_run_can_be_leased_with_its_insert(subject: Subject) {
    let (owner, other) = (live_replica(&subject.store).await, live_replica(&subject.store).await);
    let (run, lease) = submit_leased(&subject.store, 1, owner).await;
    assert_eq!(claim_all(&subject.store, other).await, []);
    assert_eq!(subject.store.owned(owner).await.expect("owned"), [lease]);
    let dump = dump(&subject.store, &run.tenant, run.id).await;
    let read = &dump.detail.run;
    assert_eq!((read.state, read.started_at, read.last_seq), (RunState::Running, Some(at(1)), 3));
    assert_eq!(dump.events, run.events);
    assert_eq!(dump.detail.stages, run.stages);
}

/// Unknown, out of time, or gone: the run is accepted and waits for somebody else.
pub async fn a_replica_that_is_not_alive_is_given_no_lease(subject: Subject) {
    let store = &subject.store;
    let (late, gone) = (replica(), live_replica(store).await);
    beat(store, late, Duration::from_millis(1)).await;
    store.leave(gone).await.expect("leave");
    tokio::time::sleep(Duration::from_millis(30)).await;
    for dead in [replica(), late, gone] {
        let run = leased_run(1, dead);
        assert_eq!(submit(store, &run).await, Submitted::Accepted(None));
        let read = dump(store, &run.tenant, run.id).await;
        assert_eq!((read.detail.run.state, read.detail.run.started_at), (RunState::Queued, None));
        assert_eq!((read.events.as_slice(), read.detail.run.last_seq), (&run.events[..1], 1));
        assert!(read.stages.is_empty());
        let owner = live_replica(store).await;
        let claimed = claim_all(store, owner).await;
        assert_eq!(claimed.iter().map(|lease| lease.run).collect::<Vec<_>>(), [run.id]);
    }
}

/// The same request finds the run, another one conflicts, and neither writes.
pub async fn an_idempotency_key_finds_its_run(subject: Subject) {
    let store = &subject.store;
    let first = NewRun { idempotency: idempotency(NASTY, 1), ..new_run(1) };
    assert_eq!(submit(store, &first).await, Submitted::Accepted(None));
    let same = NewRun { idempotency: idempotency(NASTY, 1), ..new_run(2) };
    assert_eq!(submit(store, &same).await, Submitted::Existing(first.id));
    let other = NewRun { idempotency: idempotency(NASTY, 2), ..new_run(3) };
    assert_eq!(submit(store, &other).await, Submitted::Conflict(first.id));
    for run in [same.id, other.id] {
        assert_eq!(store.run_record(&first.tenant, run).await.expect("read"), None);
    }
    let replay = async |run: &NewRun| {
        let asked = run.idempotency.as_ref().expect("a key");
        store.replay(&run.tenant, asked, run.created_at).await.expect("read")
    };
    assert_eq!(replay(&same).await, Some(Submitted::Existing(first.id)));
    assert_eq!(replay(&other).await, Some(Submitted::Conflict(first.id)));
    let next = NewRun { idempotency: idempotency("another", 1), ..new_run(4) };
    assert_eq!(replay(&next).await, None);
    assert_eq!(replay(&NewRun { tenant: tenant("umbrella"), ..same }).await, None);
    assert_eq!(submit(store, &next).await, Submitted::Accepted(None));
}

/// Two tenants may use one key.
pub async fn an_idempotency_key_belongs_to_its_tenant(subject: Subject) {
    let ours = NewRun { idempotency: idempotency("k", 1), ..new_run(1) };
    let theirs = NewRun { idempotency: idempotency("k", 2), tenant: tenant("umbrella"), ..new_run(2) };
    for run in [&ours, &theirs] {
        assert_eq!(submit(&subject.store, run).await, Submitted::Accepted(None));
    }
}

/// A day later the key is free, and names the new run from then on.
pub async fn an_idempotency_key_is_forgotten_after_its_time(subject: Subject) {
    let store = &subject.store;
    let ttl = i64::try_from(IDEMPOTENCY_TTL.as_millis()).expect("small");
    let first = NewRun { idempotency: idempotency("k", 1), ..new_run(0) };
    submit(store, &first).await;
    let within = NewRun { idempotency: idempotency("k", 2), ..new_run(ttl - 1) };
    assert_eq!(submit(store, &within).await, Submitted::Conflict(first.id));
    let after = NewRun { idempotency: idempotency("k", 2), ..new_run(ttl) };
    let asked = after.idempotency.as_ref().expect("a key");
    assert_eq!(store.replay(&after.tenant, asked, after.created_at).await.expect("read"), None, "its time is over");
    assert_eq!(submit(store, &after).await, Submitted::Accepted(None));
    let again = NewRun { idempotency: idempotency("k", 2), ..new_run(ttl + 1) };
    assert_eq!(submit(store, &again).await, Submitted::Existing(after.id));
    assert_eq!(record(store, first.id).await.id, first.id, "the first run stays");
}

/// One of them is accepted, the others find it.
pub async fn concurrent_submits_with_one_key_make_one_run(subject: Subject) {
    for round in 0..5 {
        let tasks: Vec<_> = (0..12)
            .map(|n| {
                let store = subject.store.clone();
                let run = NewRun { idempotency: idempotency(&format!("k{round}"), 1), ..new_run(n) };
                tokio::spawn(async move { (run.id, submit(&store, &run).await) })
            })
            .collect();
        let (mut accepted, mut found) = (HashSet::<RunId>::new(), HashSet::new());
        for task in tasks {
            match task.await.expect("no panic") {
                (id, Submitted::Accepted(None)) => assert!(accepted.insert(id)),
                (_, Submitted::Existing(id)) => assert!(found.insert(id) || found.contains(&id)),
                (_, other) => panic!("{other:?}"),
            }
        }
        assert_eq!(accepted.len(), 1);
        assert_eq!(found, accepted);
    }
}

/// Answers come in order; a key that is used twice inside the batch counts as well.
pub async fn a_conflict_leaves_the_rest_of_its_batch_alone(subject: Subject) {
    let store = &subject.store;
    let old = NewRun { idempotency: idempotency("old", 1), ..new_run(1) };
    submit(store, &old).await;
    let owner = live_replica(store).await;
    let keyed = |ms, key: &str, request| NewRun { idempotency: idempotency(key, request), ..new_run(ms) };
    let batch = [
        new_run(2),
        keyed(3, "old", 2),
        leased_run(4, owner),
        keyed(5, "new", 1),
        keyed(6, "old", 1),
        keyed(7, "new", 2),
        keyed(8, "new", 1),
        new_run(9),
    ];
    let answers = store.submit(&batch).await.expect("submit");
    let none = Submitted::Accepted(None);
    assert_eq!(
        answers,
        [
            none.clone(),
            Submitted::Conflict(old.id),
            Submitted::Accepted(Some(Epoch(1))),
            none.clone(),
            Submitted::Existing(old.id),
            Submitted::Conflict(batch[3].id),
            Submitted::Existing(batch[3].id),
            none,
        ]
    );
    for (run, there) in batch.iter().zip([true, false, true, true, false, false, false, true]) {
        assert_eq!(store.run_record(&run.tenant, run.id).await.expect("read").is_some(), there);
    }
    assert_eq!(store.owned(owner).await.expect("owned"), [Lease { run: batch[2].id, epoch: Epoch(1) }]);
}

/// Any JSON and any label.
pub async fn any_text_and_number_comes_back_as_it_was(subject: Subject) {
    let mut run =
        NewRun { input: nasty_json().into(), labels: [(NASTY.to_owned(), NASTY.to_owned())].into(), ..new_run(1) };
    run.events.push(event(2, 3, "s1"));
    submit(&subject.store, &run).await;
    for input in [json!(null), json!(NASTY), json!([]), json!(0.1), json!(u64::MAX)] {
        let run = NewRun { input: input.clone().into(), ..new_run(2) };
        submit(&subject.store, &run).await;
        assert_eq!(dump(&subject.store, &run.tenant, run.id).await.detail.input, input);
    }
    let read = dump(&subject.store, &run.tenant, run.id).await;
    assert_eq!(read.detail.input, run.input);
    assert_eq!(read.detail.run.labels, run.labels);
    assert_eq!(read.events, run.events);
}

/// A mebibyte.
pub async fn a_large_input_comes_back_as_it_was(subject: Subject) {
    let run = NewRun { input: large_json().into(), ..new_run(1) };
    submit(&subject.store, &run).await;
    let read = dump(&subject.store, &run.tenant, run.id).await;
    assert!(read.detail.input == run.input, "a large input came back changed");
}
