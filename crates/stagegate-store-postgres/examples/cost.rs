//! What a run costs Postgres: plays the store calls of five-stage runs on a durable throwaway server, as the engine
//! makes them at saturation, and tells bytes of WAL by table and record, server CPU, and dead rows, per run.
//!
//! `cargo run -p stagegate-store-postgres --example cost -- [runs] [runs per batch] [batches under way]`
//!
//! The server's figures do not depend on how this program was built.

use std::{collections::BTreeMap, error::Error, process::Command, sync::Arc, time::Instant};

use serde_json::{Value, json};
use sqlx::{Connection as _, Executor as _, PgConnection, Row as _};
use stagegate_core::{
    Attempt, CallPurpose, Checkpoint, Epoch, Event, EventKind, LedgerEntry, Origin, ReplicaId, RunState, Secret,
    StageState, Store, Totals, Usage, Usd, Verdict,
    store::{Commit, Disposition, Heartbeat, Lease, NewRun, StageRecord},
};
use stagegate_store_postgres::{PoolConfig, PostgresStore};
use stagegate_telemetry::Metrics;
use stagegate_testkit::{
    servers::{Postgres, TestDatabase},
    store::fixtures::{at, checkpoint, leased_run, model, replica, stage},
};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// The stages that end with each commit, and those that start.
const STEPS: [(&str, &[&str]); 5] = [("s1", &["s2"]), ("s2", &["s3"]), ("s3", &["s4", "s5"]), ("s4", &[]), ("s5", &[])];

/// About 1 KB of JSON text that does not compress to nothing.
fn kilobyte(seed: u32) -> Value {
    let words: Vec<String> =
        (0_u32..110).map(|n| format!("{:08x}", (n + seed * 131).wrapping_mul(2_654_435_761))).collect();
    Value::String(words.join(" "))
}

fn running(of: &str) -> StageRecord {
    StageRecord { state: StageState::Running, attempt: 1, started_at: Some(at(5)), ..StageRecord::pending(stage(of)) }
}

/// What so many calls take of a provider that knows no cache of its own, as most do.
fn taken(calls: u32) -> Totals {
    let usage = Usage { input_tokens: 250, output_tokens: 260, ..Usage::default() };
    Totals { usage, cost_usd: Usd::from_nanos(612_500 * i64::from(calls)), calls, ..Totals::default() }
}

fn attempt() -> Attempt {
    let call = LedgerEntry {
        purpose: CallPurpose::Stage,
        model: model(),
        origin: Origin::Provider,
        usage: taken(1).usage,
        cost_usd: taken(1).cost_usd,
        saved_usd: Usd::ZERO,
        unknown: false,
        priced: true,
        latency_ms: 12,
        error: None,
        rest: stagegate_core::Rest::default(),
    };
    Attempt {
        number: 1,
        started_at: at(5),
        finished_at: at(17),
        verdict: Verdict::Passed,
        assessments: Vec::new(),
        calls: vec![call],
        output: None,
        failure: None,
        rest: stagegate_core::Rest::default(),
    }
}

/// The commit after `done` others.
fn step(lease: Lease, done: usize, last_seq: u64, seed: u32) -> Commit {
    let (ended, started) = STEPS[done];
    let last = done + 1 == STEPS.len();
    let mut kinds = vec![EventKind::StageSucceeded {
        stage: stage(ended),
        attempt: 1,
        verdict: Verdict::Passed,
        score: None,
        model: Some(model()),
        origin: Origin::Provider,
        latency_ms: 12,
        totals: taken(1),
        decision: None,
    }];
    kinds.extend(started.iter().map(|next| EventKind::StageStarted { stage: stage(next), attempt: 1 }));
    if last {
        kinds.push(EventKind::RunFinished { state: RunState::Succeeded, failure: None, totals: taken(5) });
    }
    let events = (last_seq + 1..).zip(kinds).map(|(seq, kind)| Event::new(seq, at(17), kind)).collect();
    let succeeded = StageRecord {
        state: StageState::Succeeded,
        verdict: Some(Verdict::Passed),
        model: Some(model()),
        origin: Some(Origin::Provider),
        totals: taken(1),
        finished_at: Some(at(17)),
        ..running(ended)
    };
    let passed = Checkpoint { verdict: Verdict::Passed, score: None, created_at: at(17), ..checkpoint(kilobyte(seed)) };
    Commit {
        lease,
        events,
        stages: std::iter::once(succeeded).chain(started.iter().map(|next| running(next))).collect(),
        attempts: vec![(stage(ended), attempt())],
        checkpoints: vec![(stage(ended), passed)],
        state: if last { RunState::Succeeded } else { RunState::Running },
        stages_done: u32::try_from(done + 1).unwrap_or(0),
        totals: taken(u32::try_from(done + 1).unwrap_or(0)),
        failure: None,
        started_at: Some(at(5)),
        finished_at: last.then(|| at(17)),
        output: last.then(|| json!({ "s4": kilobyte(seed), "s5": kilobyte(seed) }).into()),
        output_of: if last { vec![stage("s4"), stage("s5")] } else { Vec::new() },
        consumed: Vec::new(),
        then: if last { Disposition::End } else { Disposition::Keep },
    }
}

/// Runs that go through their steps together.
struct Cohort {
    runs: Vec<NewRun>,
    done: usize,
    last_seq: u64,
}

impl Cohort {
    /// Makes one store call; false once the runs are finished.
    async fn advance(&mut self, store: &PostgresStore) -> Outcome<bool> {
        if self.last_seq == 0 {
            store.submit(&self.runs).await?;
            self.last_seq = 3;
            return Ok(true);
        }
        let lease = |run: &NewRun| Lease { run: run.id, epoch: Epoch(1) };
        let commits: Vec<Commit> =
            (0..).zip(&self.runs).map(|(seed, run)| step(lease(run), self.done, self.last_seq, seed)).collect();
        self.last_seq += commits.first().map_or(0, |commit| commit.events.len() as u64);
        store.commit(&commits).await?;
        self.done += 1;
        Ok(self.done < STEPS.len())
    }
}

async fn play(store: &PostgresStore, owner: ReplicaId, runs: i64, batch: i64, width: usize) -> Outcome<()> {
    let mut begun = 0;
    let mut cohorts: Vec<Cohort> = Vec::new();
    while begun < runs || !cohorts.is_empty() {
        if cohorts.len() < width && begun < runs {
            let new =
                |n| NewRun { stages_total: 5, input: json!({ "brief": kilobyte(7) }).into(), ..leased_run(n, owner) };
            cohorts.push(Cohort { runs: (begun..begun + batch).map(new).collect(), done: 0, last_seq: 0 });
            begun += batch;
        }
        let mut going = Vec::new();
        for mut cohort in cohorts {
            if cohort.advance(store).await? {
                going.push(cohort);
            }
        }
        cohorts = going;
    }
    Ok(())
}

/// CPU of the whole server since its start, in milliseconds (a tick is ten).
fn server_cpu_ms(backend: i32) -> Outcome<u64> {
    let parent = stat(backend)?.0;
    let mut ticks = 0;
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if let Ok((of, used)) = stat(pid) {
            ticks += if of == parent { used } else { 0 };
        }
    }
    Ok(ticks * 10)
}

/// The parent of a process, and the ticks that it used.
fn stat(pid: i32) -> Outcome<(i32, u64)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = text.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    Ok((fields[1].parse()?, fields[11].parse::<u64>()? + fields[12].parse::<u64>()?))
}

/// Bytes of WAL by relation and record.
async fn wal(connection: &mut PgConnection, from: &str, to: &str) -> Outcome<BTreeMap<String, (u64, u64)>> {
    let mut names = BTreeMap::new();
    for row in sqlx::query("SELECT pg_relation_filenode(oid)::int8, relname::text FROM pg_class")
        .fetch_all(&mut *connection)
        .await?
    {
        names.insert(row.get::<Option<i64>, _>(0), row.get::<String, _>(1));
    }
    let folder: String = sqlx::query("SHOW data_directory").fetch_one(&mut *connection).await?.get(0);
    let dump = Command::new(std::env::var("PG_WALDUMP").unwrap_or("/usr/lib/postgresql/15/bin/pg_waldump".to_owned()))
        .args(["-p", &format!("{folder}/pg_wal"), "-s", from, "-e", to])
        .output()?;
    let mut sums: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    for line in String::from_utf8_lossy(&dump.stdout).lines() {
        let after = |word: &str| line.split_once(word).map(|(_, rest)| rest);
        let kind = after("rmgr: ").and_then(|rest| rest.split_whitespace().next()).unwrap_or("?");
        let what = after("desc: ").and_then(|rest| rest.split_whitespace().next()).unwrap_or("?");
        let bytes: u64 = after("len (rec/tot): ")
            .and_then(|rest| rest.split(',').next()?.rsplit('/').next()?.trim().parse().ok())
            .unwrap_or(0);
        let node =
            after("blkref #0: rel ").and_then(|rest| rest.split_whitespace().next()?.rsplit('/').next()?.parse().ok());
        let name = node.and_then(|node: i64| names.get(&Some(node)).cloned()).unwrap_or_default();
        let image = if line.contains("FPW") { " +image" } else { "" };
        let sum = sums.entry(format!("{name} {kind} {what}{image}")).or_default();
        *sum = (sum.0 + bytes, sum.1 + 1);
    }
    Ok(sums)
}

#[tokio::main]
async fn main() -> Outcome<()> {
    let numbers: Vec<i64> = std::env::args().skip(1).filter_map(|text| text.parse().ok()).collect();
    let (runs, batch) = (numbers.first().copied().unwrap_or(4_000), numbers.get(1).copied().unwrap_or(64));
    let width = numbers.get(2).copied().and_then(|width| usize::try_from(width).ok()).unwrap_or(6);
    let database = TestDatabase::on(Arc::new(Postgres::durable().await?)).await?;
    let secret = Secret::from(database.url().to_owned());
    let store = PostgresStore::connect(&secret, &PoolConfig::default(), Metrics::new()).await?;
    store.migrate().await?;
    let owner = replica();
    let ttl = std::time::Duration::from_hours(1);
    let beat = Heartbeat {
        replica: owner,
        name: "host".into(),
        version: "1".into(),
        draining: false,
        ttl,
        capabilities: stagegate_core::Capabilities::own(),
        way_back: std::time::Duration::ZERO,
    };
    store.heartbeat(&beat).await?;
    play(&store, owner, batch * 8, batch, width).await?;

    let mut connection = PgConnection::connect(database.url()).await?;
    let backend: i32 = sqlx::query("SELECT pg_backend_pid()").fetch_one(&mut connection).await?.get(0);
    let position = "SELECT pg_current_wal_insert_lsn()::text";
    connection.execute("CHECKPOINT").await?;
    // Images of pages after a checkpoint are the server's business, and the same for any statement.
    play(&store, owner, batch * 8, batch, width).await?;
    let from: String = sqlx::query(position).fetch_one(&mut connection).await?.get(0);
    let (cpu, started) = (server_cpu_ms(backend)?, Instant::now());
    play(&store, owner, runs, batch, width).await?;
    let (elapsed, cpu) = (started.elapsed(), server_cpu_ms(backend)? - cpu);
    let to: String = sqlx::query(position).fetch_one(&mut connection).await?.get(0);

    #[expect(clippy::cast_precision_loss, reason = "figures for people")]
    let per_run = |amount: u64| amount as f64 / runs as f64;
    let sums = wal(&mut connection, &from, &to).await?;
    let mut lines: Vec<(&String, &(u64, u64))> = sums.iter().collect();
    lines.sort_by_key(|(_, (bytes, _))| std::cmp::Reverse(*bytes));
    for (what, (bytes, records)) in lines.iter().take(40) {
        println!("{:9.1} B {:6.2} records  {what}", per_run(*bytes), per_run(*records));
    }
    let total = sums.values().map(|(bytes, _)| bytes).sum();
    println!("WAL {:.0} B/run, Postgres CPU {:.3} ms/run, {:.0} runs/s", per_run(total), per_run(cpu), {
        #[expect(clippy::cast_precision_loss, reason = "figures for people")]
        let runs = runs as f64;
        runs / elapsed.as_secs_f64()
    });
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    let dead = "SELECT relname::text, n_tup_ins, n_tup_upd, n_tup_hot_upd, n_dead_tup, pg_total_relation_size(relid)
                FROM pg_stat_user_tables WHERE n_tup_ins > 10 ORDER BY relname";
    for row in sqlx::query(dead).fetch_all(&mut connection).await? {
        let (name, count) = (row.get::<String, _>(0), |at: usize| row.get::<i64, _>(at));
        println!(
            "{name}: {} inserted, {} updated ({} heap-only), {} dead, {} KB",
            count(1),
            count(2),
            count(3),
            count(4),
            count(5) / 1024
        );
    }
    Ok(())
}
