//! Several processes on one Postgres and one Redis: killed, frozen, asked for what another one owns.

use std::time::Duration;

use serde_json::json;
use sqlx::{Connection as _, PgConnection};
use stagegate_core::Event;
use stagegate_testkit::provider::{Reply, contains};
use tokio::sync::watch;

use crate::{
    crash::{PIPELINE, Stand, assert_gap_free, is_finished, written},
    support::{Api, Daemon, PATIENCE},
};

/// Long enough that a busy machine is not taken for a dead replica, short enough to wait for.
const TTL: &str = "3s";

/// `ask` is held for a person while `slow` is still under way, so that the run keeps its owner.
const HOLDS: &str = "\
name: holds
input: { type: object, required: [brief], properties: { brief: { type: string } } }
defaults: { model: fake/m, timeout: 120s }
stages:
  - { id: ask, prompt: 'ASK {{ input.brief }}', gate: { checks: [ { min_chars: 1000 } ], on_fail: hold } }
  - { id: slow, prompt: 'SLOW {{ input.brief }}' }
  - { id: after, needs: [ask], prompt: 'AFTER {{ input.brief }} {{ stages.ask.output }}' }
";

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, waiting).await.is_ok(), "never: {what}");
}

/// Follows a run from its first event to its end in a task of its own, as another client does.
fn watch_on(daemon: &Daemon, key: &str, run: &str) -> tokio::task::JoinHandle<Vec<Event>> {
    let (api, run) = (Api::new(&daemon.base, Some(key)), run.to_owned());
    tokio::spawn(async move { api.follow(&run, 0, is_finished).await })
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_held_in_the_database_while_a_model_is_awaited() {
    const RUNS: usize = 30;
    let stand = Stand::with_ttl(TTL).await;
    stand.configure("[store.pool]\nmax_connections = 2\n");
    let gate = watch::Sender::new(false);
    stand.provider.on(contains("MARK-1")).respond(Reply::text("answer 1").when(gate.subscribe()));
    stand.answer(2..=5);
    let (_daemon, api) = stand.serve().await;
    api.register(PIPELINE).await;
    let mut runs = Vec::new();
    for n in 0..RUNS {
        // Were a connection held for each call, the third submit would find none.
        runs.push(api.submit("five", json!({ "brief": format!("Build {n}.") })).await);
    }
    until("every run's call is under way", async || stand.calls_of(1) == RUNS).await;

    let mut operator = PgConnection::connect(stand.database.url()).await.expect("connects");
    let sessions = "SELECT pid::text || ' ' || xact_start::text || ' ' || state FROM pg_stat_activity
        WHERE datname = current_database() AND application_name = 'stagegate'";
    let mut transactions = async |condition: &str| -> Vec<String> {
        let sql = sqlx::AssertSqlSafe(format!("{sessions} {condition}"));
        sqlx::query_scalar(sql).fetch_all(&mut operator).await.expect("reads")
    };
    assert!(transactions("AND state LIKE 'idle in transaction%'").await.is_empty());
    // A heartbeat or a look for work may be under way, and ends while the calls go on; nothing else is open.
    let open = transactions("AND xact_start IS NOT NULL").await;
    until("each open transaction ends", async || {
        let now = transactions("AND xact_start IS NOT NULL").await;
        open.iter().all(|old| !now.contains(old))
    })
    .await;
    assert_eq!(stand.calls_of(1), RUNS);
    assert!(stand.provider.calls().iter().all(|call| call.finished.is_none()), "the calls are under way all this time");

    gate.send_replace(true);
    for run in &runs {
        assert_eq!(api.finish(run).await["state"], "succeeded");
    }
    assert_eq!(stand.calls_of(1), RUNS, "nothing was asked twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_of_another_replica_reaches_the_owner_and_its_watcher_sees_each_event_once() {
    let stand = Stand::with_ttl(TTL).await;
    let gate = watch::Sender::new(false);
    stand.provider.on(contains("SLOW")).respond(Reply::text("slowly").when(gate.subscribe()));
    let (owner, api) = stand.serve().await;
    let (other, elsewhere) = stand.serve().await;
    api.register(HOLDS).await;
    let mut runs = Vec::new();
    for brief in ["to-approve", "to-reject", "to-cancel"] {
        let run = api.submit("holds", json!({ "brief": brief })).await;
        let watchers = [watch_on(&owner, &stand.key, &run), watch_on(&other, &stand.key, &run)];
        elsewhere.follow(&run, 0, |event| event.kind.name() == "stage.held").await;
        until("its other call is under way", async || {
            !stand.provider.calls_where(&contains(format!("SLOW {brief}"))).is_empty()
        })
        .await;
        runs.push((run, watchers));
    }
    elsewhere.post(&format!("/v1/runs/{}/stages/ask/approve", runs[0].0), &json!({})).await;
    elsewhere.post(&format!("/v1/runs/{}/stages/ask/reject", runs[1].0), &json!({ "reason": "too thin" })).await;
    elsewhere.post(&format!("/v1/runs/{}/cancel", runs[2].0), &json!({})).await;
    // The owner heard of each while it was still waiting for the slow stage.
    until("the approved output is gone on with", async || {
        !stand.provider.calls_where(&contains("AFTER to-approve")).is_empty()
    })
    .await;
    until("the cancelled call is dropped", async || {
        stand.provider.calls_where(&contains("SLOW to-cancel")).iter().all(|call| call.abandoned)
    })
    .await;
    elsewhere.follow(&runs[1].0, 0, |event| event.kind.name() == "stage.failed").await;
    gate.send_replace(true);

    for ((run, watchers), state) in runs.into_iter().zip(["succeeded", "failed", "cancelled"]) {
        let mut seen = Vec::new();
        for watcher in watchers {
            seen.push(tokio::time::timeout(PATIENCE, watcher).await.expect("the run ends").expect("no panic"));
        }
        assert_eq!(elsewhere.get(&format!("/v1/runs/{run}")).await["state"], state);
        assert_gap_free(&seen[1]);
        assert_eq!(seen[0], seen[1], "on the owner and elsewhere");
        assert!(seen[1].iter().all(|event| event.kind.name() != "run.resumed"), "it never changed hands");
    }
    assert!(
        stand.provider.calls_where(&contains("AFTER")).len() == 1,
        "what was rejected or cancelled went no further"
    );
    assert_eq!(stand.provider.call_count(), 7, "nothing was asked twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_replica_that_wakes_writes_nothing_under_its_old_lease_and_goes_on_with_new_runs() {
    let stand = Stand::with_ttl(TTL).await;
    let gate = watch::Sender::new(false);
    stand
        .provider
        .on(contains("MARK-2"))
        .once(Reply::text("late").when(gate.subscribe()))
        .always(Reply::text("answer 2"));
    stand.answer(1..=5);
    let (mut frozen, api) = stand.serve().await;
    api.register(PIPELINE).await;
    let run = api.submit("five", json!({ "brief": "Build it." })).await;
    tokio::time::timeout(PATIENCE, stand.called(2)).await.expect("stage 2 is called");
    frozen.signal("STOP");

    let (heir, elsewhere) = stand.serve().await;
    let detail = elsewhere.finish(&run).await;
    assert_eq!(detail["state"], "succeeded");
    let before = (written(&stand, &run).await, elsewhere.get(&format!("/v1/runs/{run}")).await);
    assert_eq!(stand.calls(), [1, 2, 1, 1, 1], "only the call that had no answer is asked again");

    gate.send_replace(true); // The old call is answered, in the socket of a process that is not running.
    frozen.signal("CONT");
    frozen.wait_for_line("it begins a new life");
    frozen.wait_for_line("this replica goes on");
    assert_eq!((written(&stand, &run).await, elsewhere.get(&format!("/v1/runs/{run}")).await), before);

    assert_eq!(heir.end("TERM").0, 0);
    let again = api.succeed("five", json!({ "brief": "Build another." })).await;
    assert_eq!(again["state"], "succeeded", "it takes new runs");
    assert_eq!((written(&stand, &run).await, api.get(&format!("/v1/runs/{run}")).await), before);
    assert_eq!(frozen.end("TERM").0, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_replicas_runs_all_end_on_another_and_only_unanswered_calls_are_repeated() {
    const RUNS: usize = 12;
    let stand = Stand::with_ttl(TTL).await;
    stand.provider.on(contains("MARK-3")).times(RUNS, Reply::hang()).always(Reply::text("answer 3"));
    for stage in [1, 2] {
        // The answer carries the brief on, so that each run's prompts are its own.
        stand.provider.on(contains(format!("MARK-{stage}"))).respond(Reply::echo());
    }
    stand.answer(4..=5);
    let (doomed, api) = stand.serve().await;
    let (other, elsewhere) = stand.serve().await;
    let own_prompts =
        PIPELINE.replace("MARK-3 ", "MARK-3 {{ input.brief }}").replace("{{ stages.one.output }}", "{{ input.brief }}");
    let own_prompts =
        own_prompts.replace("MARK-4 ", "MARK-4 {{ input.brief }}").replace("MARK-5 ", "MARK-5 {{ input.brief }}");
    let own_prompts = own_prompts.replace("{{ stages.two.output }}", "").replace("{{ stages.three.output }}", "");
    api.register(&own_prompts).await;
    let mut runs = Vec::new();
    for n in 0..RUNS {
        let run = api.submit("five", json!({ "brief": format!("Build {n}.") })).await;
        runs.push((watch_on(&other, &stand.key, &run), run));
    }
    until("each run waits for its third answer", async || stand.calls_of(3) == RUNS).await;
    doomed.kill();
    for (watcher, run) in runs {
        let events = tokio::time::timeout(PATIENCE, watcher).await.expect("the run ends").expect("no panic");
        assert_gap_free(&events);
        assert_eq!(events.iter().filter(|event| event.kind.name() == "run.resumed").count(), 1);
        assert_eq!(elsewhere.get(&format!("/v1/runs/{run}")).await["state"], "succeeded");
        assert_eq!(written(&stand, &run).await["checkpoints"], json!(5));
    }
    assert_eq!(stand.calls(), [RUNS, RUNS, 2 * RUNS, RUNS, RUNS]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_tells_of_every_replica_and_of_what_waits() {
    let stand = Stand::with_ttl(TTL).await;
    stand.configure("[engine.tenants.default]\nmax_runs = 1\n");
    stand.provider.on(contains("MARK-1")).respond(Reply::hang());
    let (_first, api) = stand.serve().await;
    let (_second, _) = stand.serve().await;
    api.register(PIPELINE).await;
    let mut runs = Vec::new();
    for n in 0..3 {
        runs.push(api.submit("five", json!({ "brief": format!("Build {n}.") })).await);
    }
    stand.called(1).await;
    let told = |arguments: &[&str]| -> serde_json::Value {
        let (code, stdout, stderr) = stand.command(&[&["replicas", "--json"], arguments].concat());
        assert_eq!(code, 0, "{stderr}");
        serde_json::from_str(&stdout).expect("JSON")
    };
    let sum = |told: &serde_json::Value, of: &str, key: &str| -> u64 {
        told[of].as_array().expect("a list").iter().filter_map(|item| item[key].as_u64()).sum()
    };
    let all = told(&[]);
    assert_eq!(all["replicas"].as_array().map(Vec::len), Some(2), "{all}");
    assert_eq!([sum(&all, "replicas", "runs"), sum(&all, "queue", "running"), sum(&all, "queue", "queued")], [1, 1, 2]);
    assert_eq!(all["queue"][0]["pipeline"], "five", "{all}");
    let others = told(&["--tenant", "somebody"]);
    assert_eq!((sum(&others, "replicas", "runs"), &others["queue"]), (0, &json!([])), "{others}");
    let (code, table, _) = stand.command(&["replicas"]);
    assert_eq!(code, 0);
    for part in ["alive", "oldest lease", "five", "default"] {
        assert!(table.contains(part), "{part} is not in\n{table}");
    }
}
