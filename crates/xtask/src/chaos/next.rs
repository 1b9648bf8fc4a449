//! A synthetic next release (N+1) beside this one: owns what it writes that this release cannot know, and what this
//! release must do about it. It is a replica like any other: it beats, is leased runs, claims and commits through the
//! real statements. Only its words, fields, columns and tables are made up.

use std::{
    collections::{HashMap, HashSet},
    fmt::Write as _,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};
use sqlx::{Connection as _, Executor as _, PgConnection};
use stagegate_core::{
    Attempt, CallPurpose, Capabilities, Capability, Code, Epoch, Event, EventKind, Failure, LedgerEntry, ModelRef,
    Origin, PipelineName, ReplicaId, Rest, RunId, RunState, Secret, StageId, StageState, Store as _, TenantId, Totals,
    Usage, Usd, Verdict,
    fair::{Limits, Shares},
    store::{
        Commit, Committed, Disposition, Heartbeat, Idempotency, Lease, NewRun, NewSignal, Pulse, SignalKind, Signalled,
        Snapshot, StageRecord, Submitted,
    },
};
use stagegate_store_postgres::{PoolConfig, PostgresStore};
use stagegate_telemetry::Metrics;
use stagegate_testkit::storm::Mix;
use tokio::{task::AbortHandle, time::sleep};
use uuid::Uuid;

use super::{client::Client, load, world::World};

/// What it can do and this release cannot.
const CAPABILITY: &str = "edit_outputs";
/// Words of states, verdicts, codes and so on that this release does not know.
const RUN_STATE: &str = "hibernating";
const VERDICT: &str = "deferred";
const CODE: &str = "SG9901";
const PURPOSE: &str = "embedding";
const ORIGIN: &str = "oracle";
/// Events that this release would write in no way like this: an unknown type, and a known one with an unknown field.
const DREAMT: &str = r#"{"type":"run.dreamt","why":{"b":1e2,"a":1.10},"x":18446744073709551616,"list":[ 1, 2 ]}"#;
const DEFERRED: &str = r#"{"type":"stage.deferred","stage":"one","attempt":1,"until":null,"by":"\u00e9"}"#;
const EXTENDED: &str = r#"{"type":"stage.started","stage":"one","attempt":1,"item":{"index":3.50}}"#;
const INSPECTED: &str = r#"{"type":"run.inspected","by":{"release":"next"}}"#;
/// Signals that this release does not know: what it reads of them is nothing.
const ANNOTATE: &str = r#"{"kind":"annotate","note":{"b":1,"a":[1.50]}}"#;

/// How long something may take until it is seen.
const LIMIT: Duration = Duration::from_secs(40);
/// How often it is looked.
const LOOK: Duration = Duration::from_millis(50);
/// How many runs it claims at least.
const CLAIMED: usize = 5;

/// Its own pipeline: one that waits for a person whom the load does not play.
const HELD: &str = r#"
name: next-held
input: { type: object, required: [key], properties: { key: { type: string } } }
deadline: 30m
defaults: { model: storm/m, timeout: 5s, retry: { max_attempts: 10, backoff: 100ms..1s } }
stages:
  - id: hold
    prompt: "key={{ input.key }} stage=hold begin"
    gate: { checks: [ { contains: NEVER } ], on_fail: hold }
"#;

/// What the next migration does: a column for each table, and tables of its own.
fn migration(newest: i64) -> String {
    const TABLES: [&str; 12] = [
        "replicas",
        "runs",
        "stages",
        "checkpoints",
        "run_payloads",
        "ledger",
        "attempts",
        "events",
        "signals",
        "pipelines",
        "pipeline_versions",
        "api_keys",
    ];
    let mut sql = format!("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE;\n", TABLES.join(", "));
    for table in TABLES {
        // Writing to a string cannot fail.
        let _ = writeln!(sql, "ALTER TABLE {table} ADD COLUMN of_next jsonb DEFAULT '{{\"x\": [1, null]}}';");
    }
    let next = newest + 1;
    let _ = write!(
        sql,
        "CREATE TABLE next_items (run_id uuid, item integer, body text, PRIMARY KEY (run_id, item));
         INSERT INTO schema_compat VALUES ({next}, {newest});
         INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
         VALUES ({next}, 'of the next release', true, '\\x00', 0);"
    );
    sql
}

/// The next release, while it lives.
#[derive(Debug)]
struct Next {
    store: Arc<PostgresStore>,
    replica: ReplicaId,
    beats: AbortHandle,
}

impl Drop for Next {
    fn drop(&mut self) {
        self.beats.abort();
    }
}

impl Next {
    /// Joins the others.
    async fn join(world: &World, ttl: Duration) -> anyhow::Result<Self> {
        let url = Secret::from(world.database_url.clone());
        let store = Arc::new(PostgresStore::connect(&url, &PoolConfig::default(), Metrics::new()).await?);
        let replica = ReplicaId(Uuid::new_v4());
        store.heartbeat(&beat(replica, ttl)).await.context("the next release's heartbeat")?;
        let beating = Arc::clone(&store);
        let beats = tokio::spawn(async move {
            loop {
                sleep(ttl / 4).await;
                // One that fails is followed by another.
                let _ = beating.heartbeat(&beat(replica, ttl)).await;
            }
        });
        Ok(Self { store, replica, beats: beats.abort_handle() })
    }

    async fn beat(&self, ttl: Duration) -> anyhow::Result<Pulse> {
        let pulse = self.store.heartbeat(&beat(self.replica, ttl)).await?;
        if !pulse.alive {
            bail!("the next release was declared dead while it lived");
        }
        Ok(pulse)
    }

    async fn commit(&self, commit: &Commit) -> anyhow::Result<()> {
        match self.store.commit(std::slice::from_ref(commit)).await?.first() {
            Some(Committed::Now | Committed::Already) => Ok(()),
            other => bail!("a step of the next release came out as {other:?}"),
        }
    }

    /// Claims for real, and hands back what it has claimed with an event that only it knows. Returns the runs.
    async fn inspect_some(&self, ttl: Duration) -> anyhow::Result<Vec<Snapshot>> {
        let leases = self.store.claim(self.replica, 5, &Shares::default()).await?;
        let found = self.store.load(&leases).await?;
        for snapshot in &found {
            let signals = self.store.signals(&[snapshot.lease]).await?;
            if !signals.is_empty() {
                // That comes first: a retry begins with what it says of itself. What only this release knows stays, so that
                // it is seen whether the other one keeps it.
                self.store.release(&[snapshot.lease]).await?;
                continue;
            }
            let now = self.beat(ttl).await?.now.context("the database's time")?;
            let event = Event::read(snapshot.run.last_seq + 1, now, INSPECTED)?;
            self.commit(&step_of(snapshot, vec![event], Disposition::Park(Some(Duration::ZERO)))).await?;
        }
        Ok(found)
    }
}

fn beat(replica: ReplicaId, ttl: Duration) -> Heartbeat {
    let own = Capabilities::own();
    Heartbeat {
        replica,
        name: "next".to_owned(),
        version: "99.0.0-next".to_owned(),
        draining: false,
        ttl,
        capabilities: Capabilities::of_words(own.words().chain([CAPABILITY])),
        way_back: Duration::ZERO,
    }
}

/// A step that changes nothing of a run but what is given.
fn step_of(snapshot: &Snapshot, events: Vec<Event>, then: Disposition) -> Commit {
    let run = &snapshot.run;
    Commit {
        lease: snapshot.lease,
        events,
        stages: Vec::new(),
        attempts: Vec::new(),
        checkpoints: Vec::new(),
        state: run.state,
        stages_done: run.stages_done,
        totals: run.totals,
        failure: run.failure.clone(),
        started_at: run.started_at,
        finished_at: None,
        output: None,
        output_of: Vec::new(),
        consumed: Vec::new(),
        then,
    }
}

/// Fields that this release does not know.
fn of_next() -> Rest {
    let members = json!({ "of_next": { "b": 1, "a": [null, 2.5] } });
    Rest::of(members.as_object().cloned().unwrap_or_default())
}

fn word<T>(parse: impl Fn(&str) -> Option<T>, text: &str) -> anyhow::Result<T> {
    parse(text).with_context(|| format!("{text} is no word"))
}

/// What is seen of this release.
struct Seen<'a> {
    world: &'a World,
    client: &'a Client,
    http: reqwest::Client,
}

impl Seen<'_> {
    fn expect(&self, holds: bool, what: impl Into<String>) {
        if !holds {
            self.world.seen().findings.push(format!("beside the next release: {}", what.into()));
        }
    }

    /// A document of the API, once it is as it should be; what it was at last where that never came.
    async fn once(&self, path: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        let until = self.world.timeline.now_s() + LIMIT.as_secs_f64();
        loop {
            let body = self.client.get("beside next", path).await.map(|answer| answer.body).unwrap_or_default();
            if is_so(&body) || self.world.timeline.now_s() > until {
                return body;
            }
            sleep(LOOK).await;
        }
    }

    /// The whole event stream of a run that has ended or is to end, as text.
    async fn stream(&self, run: RunId) -> anyhow::Result<String> {
        let url = format!("{}/v1/runs/{run}/events", self.world.haproxy.url());
        let request = self.http.get(url).header("accept", "text/event-stream");
        let mut response = request.send().await?;
        let mut text = String::new();
        let read = async {
            while let Some(chunk) = response.chunk().await? {
                text.push_str(&String::from_utf8_lossy(&chunk));
                if text.contains("event: run.finished") && text.ends_with("\n\n") {
                    break;
                }
            }
            anyhow::Ok(())
        };
        // What did not come is missed in the text.
        let _ = tokio::time::timeout(LIMIT, read).await;
        Ok(text)
    }

    fn expect_streamed(&self, run: RunId, text: &str, bodies: &[&str]) {
        for body in bodies {
            self.expect(text.contains(&body[1..]), format!("run {run}: {body} is not streamed byte for byte: {text}"));
        }
    }
}

/// Lets a synthetic N+1 live, work and die beside the replicas of this release, which must carry what it writes, take over
/// what they can read, leave what they cannot, and refuse what they would not understand. What is found goes to the world's
/// findings.
pub(crate) async fn beside(world: &Arc<World>, client: &Client, restarted: usize) -> anyhow::Result<()> {
    let http = reqwest::Client::builder().no_proxy().build()?;
    let seen = Seen { world, client, http };
    let ttl = Duration::from_millis(world.plan.lease_ttl_ms);
    let mut sql = PgConnection::connect(&world.database_url).await?;
    // The provider's faults are not what is looked at here.
    world.storm.set_mix(Mix { latency: (Duration::from_millis(20), Duration::from_millis(100)), ..Mix::calm() });
    // Replicas that were killed may wake for ten minutes. Those have passed.
    let aged = "UPDATE replicas SET seen_at = seen_at - interval '11 minutes' WHERE expires_at < clock_timestamp()";
    sql.execute(aged).await?;
    migrate(world, &mut sql).await?;
    world.timeline.say("the next release has migrated; a replica of this one is restarted beside its schema");
    restart(world, restarted).await?;
    world.timeline.say("the next release joins");
    let next = Next::join(world, ttl).await?;
    let mut common = next.beat(ttl).await?.common;
    for _ in 0..100 {
        if common.common(Capability::OpenVocabulary) {
            break;
        }
        sleep(LOOK).await;
        common = next.beat(ttl).await?.common;
    }
    seen.expect(common.common(Capability::OpenVocabulary), "no open vocabulary though every replica has it");
    let edits = word(Capability::parse, CAPABILITY)?;
    seen.expect(!common.common(edits), "a capability that this release lacks is common");

    let held = submit_held(&seen).await?;
    let (taken, slept) = (carried(&next, ttl).await?, asleep(&next, ttl).await?);
    note(world, "next-carried", taken);
    note(world, "next-asleep", slept);
    shown(&seen, taken, slept).await;
    edited(&seen, &held).await;
    let inspected = inspect(&seen, &next, ttl, &held).await?;
    world.timeline.say(&format!("the next release has claimed {inspected} runs; it dies"));
    drop(next);

    let path = format!("/v1/runs/{taken}");
    let detail = seen.once(&path, |body| body["state"] == "succeeded").await;
    seen.expect(detail["state"] == "succeeded", format!("run {taken} was not taken over and finished: {detail}"));
    let text = seen.stream(taken).await?;
    seen.expect_streamed(taken, &text, &[DREAMT, DEFERRED, EXTENDED]);
    attempt_carried(&seen, taken).await;
    left_alone(&seen, &mut sql, slept).await?;
    signal_kept(&seen, &mut sql, &held).await?;
    world.timeline.say("the next release returns, and ends what it alone can read");
    let next = Next::join(world, ttl).await?;
    end(&next, ttl, &mut sql, slept).await?;
    let text = seen.stream(slept).await?;
    seen.expect_streamed(slept, &text, &[DREAMT]);
    approve(&seen, &held).await;
    next.store.leave(next.replica).await?;
    Ok(())
}

/// This release starts on the schema of the next one.
async fn restart(world: &World, index: usize) -> anyhow::Result<()> {
    let replica = &world.replicas[index];
    let from_s = world.timeline.now_s();
    let status = replica.program()?.stop("TERM").await?;
    let took_s = world.timeline.now_s() - from_s;
    world.seen().stops.push((replica.name().to_owned(), from_s, took_s, status));
    super::upgrade::launch(world, index).await
}

async fn migrate(world: &World, sql: &mut PgConnection) -> anyhow::Result<()> {
    for attempt in 1.. {
        let mut tx = sql.begin().await?;
        tx.execute("SET LOCAL lock_timeout = '2s'").await?;
        let statements = sqlx::AssertSqlSafe(migration(PostgresStore::schema_version()));
        match tx.execute(sqlx::raw_sql(statements)).await {
            Ok(_) => return Ok(tx.commit().await?),
            Err(error) if attempt < 5 => world.timeline.say(&format!("the next migration waits: {error}")),
            Err(error) => return Err(error).context("the next migration"),
        }
        drop(tx);
    }
    Ok(())
}

/// A run's key, noted as submitted: the reconciliation looks at these runs as at all others.
fn note(world: &World, key: &str, run: RunId) {
    let at_s = world.timeline.now_s();
    world.seen().submitted.push(load::Submitted {
        key: key.to_owned(),
        runs: [run.to_string()].into(),
        requests: 1,
        due_s: at_s,
        accepted_s: Some(at_s),
        refused: None,
    });
}

async fn submit(seen: &Seen<'_>, key: &str, body: &Value) -> anyhow::Result<RunId> {
    for _ in 0..20 {
        let answer = seen.client.submit(key, body, None).await;
        let run =
            answer.filter(|answer| answer.status == 202).and_then(|answer| answer.body["id"].as_str()?.parse().ok());
        if let Some(run) = run {
            note(seen.world, key, run);
            return Ok(run);
        }
        sleep(LOOK * 4).await;
    }
    bail!("the run {key} was not accepted")
}

/// A run of this release that waits for a person.
async fn submit_held(seen: &Seen<'_>) -> anyhow::Result<RunId> {
    let registered = seen.client.register(HELD).await;
    if !registered.is_some_and(|answer| matches!(answer.status, 200 | 201)) {
        bail!("the next release's pipeline was refused");
    }
    submit(seen, "next-held", &json!({ "pipeline": "next-held", "input": { "key": "next-held" } })).await
}

/// A run that the next release has from its insert, with its first step.
async fn leased(next: &Next, key: &str, ttl: Duration) -> anyhow::Result<Snapshot> {
    let now = next.beat(ttl).await?.now.context("the database's time")?;
    let id = RunId::new(now, *Uuid::new_v4().as_bytes().first_chunk().context("ten bytes")?);
    let pipeline = PipelineName::new("canonical")?;
    let run = NewRun {
        id,
        tenant: TenantId::default(),
        pipeline: pipeline.clone(),
        version: 1,
        stages_total: 5,
        input: json!({ "key": key }).into(),
        cache_mode: None,
        priority: 0,
        labels: [("of".to_owned(), "next".to_owned())].into(),
        idempotency: Some(Idempotency { key: key.to_owned(), digest: [9; 32] }),
        request_id: None,
        created_at: now,
        start_at: None,
        limits: Limits::default(),
        deadline_at: now + chrono::TimeDelta::minutes(30),
        events: vec![
            Event::new(1, now, EventKind::RunAccepted { pipeline, version: 1 }),
            Event::new(2, now, EventKind::RunStarted),
        ],
        stages: Vec::new(),
        lease_to: Some(next.replica),
    };
    let lease = match next.store.submit(&[run]).await?.first() {
        Some(Submitted::Accepted(Some(epoch))) => Lease { run: id, epoch: *epoch },
        other => bail!("the next release's run came out as {other:?}"),
    };
    next.store.load(&[lease]).await?.pop().context("a leased run")
}

/// A run with everything unknown that this release can go on with: events, an attempt, its failure and its calls.
async fn carried(next: &Next, ttl: Duration) -> anyhow::Result<RunId> {
    let snapshot = leased(next, "next-carried", ttl).await?;
    let now = next.beat(ttl).await?.now.context("the database's time")?;
    let (verdict, origin) = (word(Verdict::parse, VERDICT)?, word(Origin::parse, ORIGIN)?);
    let code = word(Code::parse, CODE)?;
    let failure = Failure { rest: of_next(), ..Failure::new(code, "the next release has its reasons") };
    let call = LedgerEntry {
        purpose: word(CallPurpose::parse, PURPOSE)?,
        model: ModelRef::new("storm/m")?,
        origin,
        usage: Usage::default(),
        cost_usd: Usd::from_nanos(0),
        saved_usd: Usd::from_nanos(0),
        unknown: false,
        priced: true,
        latency_ms: 1,
        error: Some(code),
        rest: of_next(),
    };
    let mut totals = Totals::default();
    totals.add(&call);
    let one = StageId::new("one")?;
    let stage = StageRecord {
        state: StageState::Waiting,
        attempt: 1,
        not_before: Some(now),
        verdict: Some(verdict),
        origin: Some(origin),
        totals,
        outages: 1,
        outage_since: Some(now),
        failure: Some(failure.clone()),
        started_at: Some(now),
        ..StageRecord::pending(one.clone())
    };
    let attempt = Attempt {
        number: 1,
        started_at: now,
        finished_at: now,
        verdict,
        assessments: Vec::new(),
        calls: vec![call],
        output: None,
        failure: Some(failure),
        rest: of_next(),
    };
    let bodies = (snapshot.run.last_seq + 1..).zip([DREAMT, EXTENDED, DEFERRED]);
    let events = bodies.map(|(seq, body)| Event::read(seq, now, body)).collect::<Result<_, _>>()?;
    let step = Commit {
        stages: vec![stage],
        attempts: vec![(one, attempt)],
        totals,
        ..step_of(&snapshot, events, Disposition::Keep)
    };
    next.commit(&step).await?;
    Ok(snapshot.lease.run)
}

/// A run in a state that this release cannot go on with.
async fn asleep(next: &Next, ttl: Duration) -> anyhow::Result<RunId> {
    let snapshot = leased(next, "next-asleep", ttl).await?;
    let now = next.beat(ttl).await?.now.context("the database's time")?;
    let event = Event::read(snapshot.run.last_seq + 1, now, DREAMT)?;
    let failure = Failure::new(word(Code::parse, CODE)?, "the next release lets it sleep");
    let step = Commit {
        state: word(RunState::parse, RUN_STATE)?,
        failure: Some(failure),
        ..step_of(&snapshot, vec![event], Disposition::Keep)
    };
    next.commit(&step).await?;
    Ok(snapshot.lease.run)
}

/// What this release shows of them while their owner lives.
async fn shown(seen: &Seen<'_>, taken: RunId, slept: RunId) {
    let detail = seen.once(&format!("/v1/runs/{slept}"), |body| body["state"] == RUN_STATE).await;
    seen.expect(detail["state"] == RUN_STATE && detail["failure"]["code"] == CODE, format!("shown as {detail}"));
    let detail = seen.once(&format!("/v1/runs/{taken}"), |body| body["state"] == "running").await;
    let one = detail["stages"].as_array().into_iter().flatten().find(|stage| stage["id"] == "one").cloned();
    let one = one.unwrap_or_default();
    seen.expect(one["verdict"] == VERDICT && one["origin"] == ORIGIN, format!("the stage is shown as {one}"));
    let list = seen.once("/v1/runs?label=of:next&limit=10", |body| body["items"][1].is_object()).await;
    let states: HashMap<&str, &str> = list["items"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|run| Some((run["id"].as_str()?, run["state"].as_str()?)))
        .collect();
    let expected: HashMap<String, &str> =
        [(taken.to_string(), "running"), (slept.to_string(), RUN_STATE)].into_iter().collect();
    let is_listed = |(run, state): (&String, &&str)| states.get(run.as_str()) == Some(state);
    seen.expect(expected.iter().all(is_listed), format!("the list shows {list}"));
}

/// An approval with a field that this release does not know is refused with a code, and changes nothing.
async fn edited(seen: &Seen<'_>, held: &RunId) {
    let run = seen.once(&format!("/v1/runs/{held}"), |body| body["state"] == "waiting").await;
    seen.expect(run["state"] == "waiting", format!("the held run is {run}"));
    let path = format!("/v1/runs/{held}/stages/hold/approve");
    let answer = seen.client.post("approve of next", &path, Some(&json!({ "output_of_next": "better" }))).await;
    let is_refused = |answer: &super::client::Answer| {
        (400..500).contains(&answer.status) && answer.body["code"].is_string() && answer.body["detail"].is_string()
    };
    seen.expect(
        answer.as_ref().is_some_and(is_refused),
        format!("an approval with an unknown field was answered with {answer:?}"),
    );
    let run = seen.once(&format!("/v1/runs/{held}"), |body| body["state"] == "waiting").await;
    seen.expect(run["state"] == "waiting", format!("after a refused approval the held run is {run}"));
}

/// Leaves a signal that only it knows, claims beside this release, and hands back. Returns how many runs it had.
async fn inspect(seen: &Seen<'_>, next: &Next, ttl: Duration, held: &RunId) -> anyhow::Result<usize> {
    let signal = NewSignal { tenant: TenantId::default(), run: *held, kind: SignalKind::read(ANNOTATE)?, by: None };
    let answer = next.store.signal(&signal).await?;
    seen.expect(matches!(answer, Signalled::Accepted { .. }), format!("the unknown signal came out as {answer:?}"));
    let mut claimed = HashSet::new();
    let until = seen.world.timeline.now_s() + LIMIT.as_secs_f64();
    while seen.world.timeline.now_s() < until && claimed.len() < CLAIMED {
        let found = next.inspect_some(ttl).await?;
        claimed.extend(found.into_iter().map(|snapshot| snapshot.lease.run));
        sleep(LOOK / 5).await;
    }
    seen.expect(claimed.len() >= CLAIMED, format!("the next release claimed {} runs", claimed.len()));
    Ok(claimed.len())
}

/// The signal that this release does not know is still there, as it was written, although replicas have read it.
async fn signal_kept(seen: &Seen<'_>, sql: &mut PgConnection, held: &RunId) -> anyhow::Result<()> {
    let look = "SELECT body FROM signals WHERE run_id = $1";
    let bodies: Vec<(String,)> = sqlx::query_as(look).bind(held.0).fetch_all(sql).await?;
    let is_kept = bodies.iter().any(|(body,)| body == ANNOTATE);
    seen.expect(is_kept, format!("the unknown signal is lost: {bodies:?}"));
    Ok(())
}

/// The attempt of the next release, as this release shows it after it went on with its run.
async fn attempt_carried(seen: &Seen<'_>, run: RunId) {
    let stage = seen.once(&format!("/v1/runs/{run}/stages/one"), |body| body["attempts"][0].is_object()).await;
    let attempt = &stage["attempts"][0];
    let call = &attempt["calls"][0];
    let told = [&attempt["verdict"], &attempt["failure"]["code"], &call["purpose"], &call["origin"], &call["error"]];
    seen.expect(
        told.iter().zip([VERDICT, CODE, PURPOSE, ORIGIN, CODE]).all(|(told, expected)| **told == expected),
        format!("the attempt of the next release is shown as {attempt}"),
    );
    let fields = [&attempt["of_next"], &attempt["failure"]["of_next"], &call["of_next"]];
    let expected = json!({ "b": 1, "a": [null, 2.5] });
    seen.expect(
        fields.iter().all(|field| **field == expected),
        format!("fields of the next release are lost: {attempt}"),
    );
}

/// This release has not taken what it cannot read, though its owner is dead.
async fn left_alone(seen: &Seen<'_>, sql: &mut PgConnection, run: RunId) -> anyhow::Result<()> {
    let look = "SELECT epoch, owner IS NULL AND available_at IS NOT NULL, state FROM runs WHERE id = $1";
    let until = seen.world.timeline.now_s() + LIMIT.as_secs_f64();
    loop {
        let (epoch, is_free, state): (i64, bool, String) =
            sqlx::query_as(look).bind(run.0).fetch_one(&mut *sql).await?;
        let late = seen.world.timeline.now_s() > until;
        if is_free || late {
            let what = format!("run {run} in an unknown state: free {is_free}, epoch {epoch}, {state}");
            seen.expect(is_free && epoch == 1 && state == RUN_STATE, what);
            return Ok(());
        }
        sleep(LOOK).await;
    }
}

/// Takes a run in a state of its own, as its own claim would, and ends it.
async fn end(next: &Next, ttl: Duration, sql: &mut PgConnection, run: RunId) -> anyhow::Result<()> {
    let claim = "UPDATE runs SET owner = $2, epoch = epoch + 1, available_at = NULL, ready = NULL, leased_at = now()
                 WHERE id = $1 AND owner IS NULL RETURNING epoch";
    let taken: Option<(i64,)> = sqlx::query_as(claim).bind(run.0).bind(next.replica.0).fetch_optional(sql).await?;
    let (epoch,) = taken.context("the run in a state of the next release is not free")?;
    let lease = Lease { run, epoch: Epoch(epoch) };
    let snapshot = next.store.load(&[lease]).await?.pop().context("a leased run")?;
    let now = next.beat(ttl).await?.now.context("the database's time")?;
    let failure = Failure::new(Code::Cancelled, "the next release has woken and ended it");
    let (state, totals) = (RunState::Cancelled, snapshot.run.totals);
    let kind = EventKind::RunFinished { state, failure: Some(failure.clone()), totals };
    let events = vec![Event::new(snapshot.run.last_seq + 1, now, kind)];
    let step = Commit {
        state,
        failure: Some(failure),
        finished_at: Some(now),
        ..step_of(&snapshot, events, Disposition::End)
    };
    next.commit(&step).await
}

/// What was held all the time is approved, and ends.
async fn approve(seen: &Seen<'_>, held: &RunId) {
    let path = format!("/v1/runs/{held}");
    for _ in 0..20 {
        let answer = seen.client.post("approve", &format!("{path}/stages/hold/approve"), None).await;
        if answer.is_some_and(|answer| answer.status == 202) {
            break;
        }
        sleep(LOOK * 4).await;
    }
    let run = seen.once(&path, |body| body["state"] == "succeeded").await;
    seen.expect(run["state"] == "succeeded", format!("the approved run is {run}"));
}
