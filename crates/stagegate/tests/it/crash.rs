//! The main promise, of the built binary on real Postgres and Redis: what a crash interrupts goes on, what was bought is
//! not bought again, and nobody who follows misses anything.

use std::time::Duration;

use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection};
use stagegate_core::{Event, EventKind};
use stagegate_testkit::{
    provider::{FakeProvider, Reply, any, contains},
    servers::{Redis, TestDatabase},
};

use crate::{
    access::make_key,
    support::{Api, Daemon, PATIENCE, Place, ended},
};

/// 1 → 2 → 3 → { 4, 5 }, as the canonical pipeline. Each prompt carries a mark that no answer does.
pub(crate) const PIPELINE: &str = "\
name: five
input: { type: object, required: [brief], properties: { brief: { type: string } } }
defaults: { model: fake/m, timeout: 120s }
stages:
  - { id: one, prompt: 'MARK-1 {{ input.brief }}' }
  - { id: two, needs: [one], prompt: 'MARK-2 {{ stages.one.output }}' }
  - { id: three, needs: [two], prompt: 'MARK-3 {{ stages.two.output }}' }
  - { id: four, needs: [three], prompt: 'MARK-4 {{ stages.three.output }}' }
  - { id: five, needs: [three], prompt: 'MARK-5 {{ stages.three.output }}' }
output: { four: '{{ stages.four.output }}', five: '{{ stages.five.output }}' }
";

/// Real servers, a provider that counts, and a place to run the binary in.
pub(crate) struct Stand {
    place: Place,
    pub(crate) database: TestDatabase,
    redis: std::sync::Arc<Redis>,
    pub(crate) provider: FakeProvider,
    pub(crate) key: String,
}

impl Stand {
    /// With a lease so short that the test need not wait long for the dead process's to end.
    async fn new() -> Self {
        Self::with_ttl("2s").await
    }

    pub(crate) async fn with_ttl(ttl: &str) -> Self {
        let (database, redis) = (TestDatabase::fresh().await, Redis::shared().await.expect("a Redis"));
        let provider = FakeProvider::start().await;
        let place = Place::new();
        let config = format!(
            "[engine]\nlease_ttl = '{ttl}'\n[redis]\nkey_prefix = '{}'\n[llm.providers.fake]\nkind = 'openai'\nbase_url = '{}'\n",
            redis.unique_prefix(),
            provider.openai_base_url()
        );
        place.write("stagegate.toml", &config);
        let migrated = place.stagegate(&["migrate"]).env("DATABASE_URL", database.url()).output().expect("runs");
        assert!(migrated.status.success(), "{}", String::from_utf8_lossy(&migrated.stderr));
        let key = make_key(&place, &["--role", "admin"], &[("DATABASE_URL", database.url())]);
        Self { place, database, redis, provider, key }
    }

    /// Adds to the configuration of the processes that are started from now on.
    pub(crate) fn configure(&self, text: &str) {
        let path = self.place.path("stagegate.toml");
        let before = std::fs::read_to_string(path).expect("written");
        self.place.write("stagegate.toml", &(before + text));
    }

    pub(crate) async fn serve(&self) -> (Daemon, Api) {
        let environment = [("DATABASE_URL", self.database.url()), ("REDIS_URL", self.redis.url())];
        let daemon = self.place.serve(&[], &environment).await;
        let api = Api::new(&daemon.base, Some(&self.key));
        (daemon, api)
    }

    /// Runs a command on the same database; its exit code, stdout and stderr.
    pub(crate) fn command(&self, arguments: &[&str]) -> (i32, String, String) {
        let output = self.place.stagegate(arguments).env("DATABASE_URL", self.database.url()).output();
        ended(output.expect("runs"))
    }

    /// Answers each stage with a text of its own.
    pub(crate) fn answer(&self, stages: std::ops::RangeInclusive<u32>) {
        for stage in stages {
            self.provider.on(contains(format!("MARK-{stage}"))).respond(Reply::text(format!("answer {stage}")));
        }
    }

    pub(crate) fn calls_of(&self, stage: u32) -> usize {
        self.provider.calls_where(&contains(format!("MARK-{stage}"))).len()
    }

    /// Waits until a stage was called.
    pub(crate) async fn called(&self, stage: u32) {
        while self.calls_of(stage) == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) fn calls(&self) -> [usize; 5] {
        [1, 2, 3, 4, 5].map(|stage| self.calls_of(stage))
    }
}

/// What the tables hold of a run, read past the product: rows, and the epoch and seq that fence its writers.
pub(crate) async fn written(stand: &Stand, run: &str) -> Value {
    let mut connection = PgConnection::connect(stand.database.url()).await.expect("connects");
    let sql = "SELECT json_build_object(
        'checkpoints', (SELECT count(*) FROM checkpoints WHERE run_id = r.id),
        'stages', (SELECT count(DISTINCT stage_id) FROM checkpoints WHERE run_id = r.id),
        'events', (SELECT coalesce(sum(json_array_length(bodies)), 0) FROM (
            SELECT CASE WHEN body LIKE '[%' THEN body::json ELSE json_build_array(body::json) END AS bodies
            FROM events WHERE run_id = r.id
            UNION ALL SELECT events::json FROM checkpoints WHERE run_id = r.id AND events IS NOT NULL
        ) AS told),
        'last_seq', r.last_seq, 'epoch', r.epoch, 'state', r.state, 'owner', r.owner,
        'calls', (SELECT count(*) FROM ledger WHERE run_id = r.id),
        'attempts', (SELECT count(*) FROM attempts WHERE run_id = r.id))::text FROM runs r WHERE r.id = $1::uuid";
    let text: String = sqlx::query_scalar(sql).bind(run).fetch_one(&mut connection).await.expect("reads");
    serde_json::from_str(&text).expect("JSON")
}

pub(crate) fn assert_gap_free(events: &[Event]) {
    let seqs: Vec<u64> = events.iter().map(|event| event.seq).collect();
    assert_eq!(seqs, (1..=seqs.len() as u64).collect::<Vec<_>>(), "gap-free, nothing twice");
    assert_eq!(events.iter().filter(|event| is_finished(event)).count(), 1);
}

pub(crate) fn is_finished(event: &Event) -> bool {
    event.kind.name() == "run.finished"
}

fn is_stage(event: &Event, name: &str, stage: &str) -> bool {
    event.kind.name() == name && event.kind.stage().is_some_and(|id| id.as_str() == stage)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_process_buys_nothing_twice_and_its_run_succeeds() {
    let stand = Stand::new().await;
    // The first process never gets an answer to stage 3.
    stand.provider.on(contains("MARK-3")).once(Reply::hang()).always(Reply::text("answer 3"));
    stand.answer(1..=5);
    let (daemon, api) = stand.serve().await;
    assert_eq!(api.register(PIPELINE).await, 1);
    let run = api.submit("five", json!({ "brief": "Build it." })).await;
    let mut events = api.follow(&run, 0, |event| is_stage(event, "stage.succeeded", "two")).await;
    // The call that hangs is the first process's: it must have arrived before the kill.
    tokio::time::timeout(PATIENCE, stand.called(3)).await.expect("stage 3 is called");
    daemon.kill();

    let (_daemon, api) = stand.serve().await;
    let seen = events.last().expect("some events").seq;
    events.extend(api.follow(&run, seen, |event| event.kind.name() == "run.finished").await);

    assert_gap_free(&events); // Across the crash.
    let finished =
        |event: &Event| matches!(&event.kind, EventKind::RunFinished { state, .. } if state.as_str() == "succeeded");
    assert!(events.last().is_some_and(finished), "{:#?}", events.last());
    assert_eq!(events.iter().filter(|event| event.kind.name() == "run.resumed").count(), 1);
    for stage in ["one", "two", "three", "four", "five"] {
        let checkpoints = events.iter().filter(|event| is_stage(event, "stage.succeeded", stage)).count();
        assert_eq!(checkpoints, 1, "one checkpoint of {stage}");
    }
    assert_eq!((stand.calls_of(1), stand.calls_of(2)), (1, 1), "what was committed is not called again");
    assert_eq!(stand.calls(), [1, 1, 2, 1, 1], "the call that was under way is the only one that is repeated");

    let detail = api.get(&format!("/v1/runs/{run}")).await;
    assert_eq!(detail["output"], json!({ "four": "answer 4", "five": "answer 5" }));
    assert_eq!((&detail["stages_done"], &detail["state"]), (&json!(5), &json!("succeeded")));
    let rows = written(&stand, &run).await;
    assert_eq!((&rows["checkpoints"], &rows["stages"]), (&json!(5), &json!(5)), "one checkpoint per stage: {rows}");
    assert_eq!((&rows["events"], &rows["last_seq"]), (&json!(events.len()), &json!(events.len())), "{rows}");
    // The call that was under way when its owner died is booked at its worst case, as of unknown outcome.
    assert_eq!((&rows["calls"], &rows["epoch"], &rows["owner"]), (&json!(6), &json!(2), &json!(null)), "{rows}");
    assert_eq!(detail["totals"]["unknown_calls"], json!(1), "{}", detail["totals"]);
    let replayed = api.follow(&run, 0, |event| event.kind.name() == "run.finished").await;
    assert_eq!(replayed, events, "who comes late sees the same");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_bought_once_and_again_only_where_it_changed() {
    let stand = Stand::new().await;
    // Long enough that two calls which start together are seen together.
    for stage in [4, 5] {
        let slow = Reply::text(format!("answer {stage}")).after(Duration::from_secs(1));
        stand.provider.on(contains(format!("MARK-{stage}"))).once(slow).always(Reply::text(format!("answer {stage}")));
    }
    stand.answer(1..=3);
    let (_daemon, api) = stand.serve().await;
    api.register(PIPELINE).await;
    let input = || json!({ "brief": "Build it." });

    let first = api.succeed("five", input()).await;
    assert_eq!(stand.calls(), [1, 1, 1, 1, 1]);
    let call = |stage: u32| stand.provider.calls_where(&contains(format!("MARK-{stage}"))).remove(0);
    assert!(call(4).overlaps(&call(5)), "stages 4 and 5 are under way at one time");
    assert!(!call(2).overlaps(&call(3)), "a stage waits for what it needs");

    let second = api.succeed("five", input()).await;
    assert_eq!(stand.calls(), [1, 1, 1, 1, 1], "an identical run makes no call");
    assert_eq!(second["output"], first["output"]);
    assert_eq!((&second["totals"]["hits"], &second["totals"]["calls"]), (&json!(5), &json!(0)), "{second:#}");

    // The new text keeps the old mark, so that the rules and counts still hold.
    let edited = PIPELINE.replace("'MARK-4 ", "'Be brief. MARK-4 ");
    assert_eq!(api.register(&edited).await, 2);
    api.succeed("five", input()).await;
    assert_eq!(stand.calls(), [1, 1, 1, 2, 1], "an edit of stage 4 makes stage 4's call alone");

    let scope: Value = json!({ "scope": "pipeline", "pipeline": "five" });
    api.post("/v1/cache/invalidate", &scope).await;
    api.succeed("five", input()).await;
    assert_eq!(stand.calls(), [2, 2, 2, 3, 2], "after an invalidation everything is bought again");
    assert_eq!(stand.provider.calls_where(&any()).len(), 11, "and nothing else was asked");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cache_in_redis_outlives_the_process() {
    let stand = Stand::new().await;
    stand.answer(1..=5);
    let (daemon, api) = stand.serve().await;
    api.register(PIPELINE).await;
    api.succeed("five", json!({ "brief": "Build it." })).await;
    assert_eq!(daemon.end("TERM").0, 0);
    let (_daemon, api) = stand.serve().await;
    api.succeed("five", json!({ "brief": "Build it." })).await;
    assert_eq!(stand.calls(), [1, 1, 1, 1, 1]);
}
