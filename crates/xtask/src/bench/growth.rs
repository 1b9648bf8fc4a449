//! Growth: owns how submitting, claiming, reading and listing change from an empty database to one with many finished and
//! many queued runs, to the same with a transaction held open all the while, and to the same among other tenants: one
//! that has as many runs again and 100,000 that wait for tomorrow in 500 lanes and 200 priorities, 1,000 that have little,
//! and 300 with deep queues.
//!
//! Two sites stand on one Postgres; one is filled by SQL with copies of real runs, table by table as the catalogue
//! names them, so that every table has its rows. Each operation is done on both in turns:
//!
//! - submit: `POST /v1/runs`, one after another, to a daemon that has room for one run, which the provider holds;
//! - read: `GET /v1/runs/{id}`, one after another, of runs spread over all that there are;
//! - list: `GET /v1/runs`, one after another, of the daemon's own tenant;
//! - claim: a replica that starts takes runs from the queue; the time from its first run's first call to its last
//!   one's, a run. Then it hands them back.

use std::time::{Duration, Instant};

use anyhow::bail;
use serde_json::json;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tokio::time::sleep;

use super::{
    Options,
    engine::milliseconds,
    figures::{Figures, Reach, Report, Times},
    progress, read,
    rig::{HELD, Rig, Site, Submission, TINY, submit, submit_blind},
    wire::{self, Connection},
};

/// Inputs of the runs that are copied: small, so that a million of them fit a laptop's disk.
const INPUT_BYTES: usize = 64;
/// Real runs in each database, finished.
const FINISHED: u64 = 200;
/// Runs that a replica claims in one measurement.
const CLAIMED: usize = 1000;
/// Submits, and reads, of one measurement.
const SAMPLES: u32 = 400;
/// Tenants that have a few runs each, and how many.
const SMALL_TENANTS: (usize, usize) = (1_000, 10);
/// Tenants with deep queues, and how many runs wait in each.
const DEEP_TENANTS: (usize, usize) = (300, 200);
/// Runs of one tenant that wait for tomorrow.
const DELAYED: usize = 100_000;
/// Copies made by one statement.
const CHUNK: usize = 50_000;
const PATIENCE: Duration = Duration::from_mins(2);

/// One of the two databases and the daemon on it.
struct Side {
    site: Site,
    /// Requests for finished runs all over it.
    reads: Vec<Vec<u8>>,
    /// The id of the queued run that is copied, quoted.
    waiting: String,
    /// Numbers of its runs, which no other run has.
    next: u64,
}

/// What was measured on one side in one round.
struct Sample {
    submit: Times,
    read: Times,
    list: Times,
    claim_ms_per_run: f64,
}

pub(crate) async fn run(rig: &mut Rig, options: &Options) -> anyhow::Result<Report> {
    // What is claimed is fresh in each measurement, also on the database that is called empty.
    let needed = CLAIMED * (3 * options.rounds as usize + 1) + CLAIMED / 10;
    let (finished, queued) = (options.rows, (options.rows / 10).max(needed));
    progress(&format!("a database with {FINISHED} finished and {needed} queued runs"));
    let mut empty = Side::new(rig, 0, 0, needed).await?;
    progress(&format!("a database with {finished} finished and {queued} queued runs"));
    let mut full = Side::new(rig, 1_000_000_000, finished, queued).await?;
    // Nobody's caches are warm at first: these are not counted.
    full.claim(rig).await?;
    empty.claim(rig).await?;
    let mut rounds = Vec::new();
    for round in 1..=options.rounds {
        progress(&format!("round {round}"));
        let mut figures = Figures::default();
        let (before, after) = compare(rig, &mut empty, &mut full).await?;
        report(before, after, &mut figures, &PLAIN);
        rounds.push(figures);
    }
    let database = full.site.database.as_ref().map(|database| database.url().to_owned()).unwrap_or_default();
    let mut holder = PgConnection::connect(&database).await?;
    sqlx::query("BEGIN ISOLATION LEVEL REPEATABLE READ").execute(&mut holder).await?;
    sqlx::query("SELECT 1").execute(&mut holder).await?;
    for (round, figures) in (1..).zip(&mut rounds) {
        progress(&format!("round {round}, with a transaction held open"));
        let (before, after) = compare(rig, &mut empty, &mut full).await?;
        report(before, after, figures, &HELD_OPEN);
    }
    let _ = holder.close().await;
    progress("the full database among other tenants");
    full.crowd(finished).await?;
    // What was planned and cached for the smaller one is not counted.
    full.claim(rig).await?;
    for (round, figures) in (1..).zip(&mut rounds) {
        progress(&format!("round {round}, among other tenants"));
        let (before, after) = compare(rig, &mut empty, &mut full).await?;
        report(before, after, figures, &CROWDED);
    }
    let parameters = json!({
        "finished": finished, "queued": queued, "empty_queued": needed, "claimed": CLAIMED, "samples": SAMPLES, "servers": rig.servers(),
    });
    Ok(Report { cell: "growth", store: rig.store.name(), parameters, rounds })
}

impl Side {
    async fn new(rig: &Rig, next: u64, finished: usize, queued: usize) -> anyhow::Result<Self> {
        let mut site = rig.site(&[("STAGEGATE_ENGINE__DRAIN_GRACE", "1ms".to_owned())]).await?;
        let reads = read::finished_runs(&site, &Submission::sized(TINY, INPUT_BYTES), FINISHED).await?;
        site.stop().await?;
        let mut this = Self { site, reads, waiting: String::new(), next: next + FINISHED };
        // The first one takes the only place, the second one waits: it is what is copied.
        let mut connection = this.start(1).await?;
        let held = Submission::sized(HELD, INPUT_BYTES);
        submit_blind(&mut connection, &held, this.number()).await?;
        let waiting = this.number();
        let waiting_id = submit(&mut connection, &held, waiting).await?;
        this.site.stop().await?;
        if finished > 0 {
            let model = "(SELECT id FROM runs WHERE finished_at IS NOT NULL ORDER BY id LIMIT 1)";
            this.copy(model, finished, 1, &[]).await?;
            this.reads = this.some_copies(finished).await?;
        }
        // Prompts stay distinct: each names its run by ten digits.
        let first = this.next + 1;
        let input = format!("replace(t.input, '{waiting:010}', lpad(({first} + n)::text, 10, '0'))");
        this.waiting = format!("'{waiting_id}'");
        this.copy(&this.waiting.clone(), queued, 2, &[("input", &input)]).await?;
        this.next += queued as u64;
        sqlx::query("VACUUM ANALYZE").execute(this.site.database()?).await?;
        Ok(this)
    }

    /// Starts its daemon with room for so many runs.
    async fn start(&mut self, max_runs: usize) -> anyhow::Result<Connection> {
        self.site.set("STAGEGATE_ENGINE__MAX_RUNS", &max_runs.to_string());
        self.site.start().await?;
        Connection::open(self.site.address()?).await
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Puts the daemon's tenant among others.
    async fn crowd(&mut self, finished: usize) -> anyhow::Result<()> {
        let model = "(SELECT id FROM runs WHERE finished_at IS NOT NULL AND tenant = 'default' ORDER BY id LIMIT 1)";
        self.copy(model, finished, 3, &[("tenant", "'giant'")]).await?;
        let (tenants, each) = SMALL_TENANTS;
        let small = format!("'small-' || n % {tenants}");
        self.copy(model, tenants * each, 4, &[("tenant", &small)]).await?;
        let waiting = self.waiting.clone();
        let tomorrow = "now() + interval '1 day'";
        let delayed = [
            ("tenant", "'giant'"),
            ("available_at", tomorrow),
            ("start_at", tomorrow),
            ("ready", "NULL::boolean"),
            ("priority", "n / 500 % 200 - 100"),
            ("key", "'k' || n % 500"),
            ("key_max", "5"),
            ("lane", "t.pipeline || '/-/5/k' || n % 500"),
        ];
        self.copy(&waiting, DELAYED, 5, &delayed).await?;
        let (tenants, each) = DEEP_TENANTS;
        let deep = format!("'deep-' || n % {tenants}");
        // Prompts stay distinct, as those of the daemon's own.
        let input = "regexp_replace(t.input, '[0-9]{10}', '9' || lpad(n::text, 9, '0'))";
        self.copy(&waiting, tenants * each, 6, &[("tenant", &deep), ("input", input)]).await?;
        let database = self.site.database()?;
        for (table, columns) in
            [("pipelines", "name, latest"), ("pipeline_versions", "name, version, digest, created_at, definition")]
        {
            let copy = format!(
                "INSERT INTO {table} (tenant, {columns}) SELECT 'deep-' || n, {columns} FROM {table}, \
                 generate_series(0, {tenants} - 1) n WHERE tenant = 'default'"
            );
            sqlx::query(AssertSqlSafe(copy)).execute(&mut *database).await?;
        }
        sqlx::query("VACUUM ANALYZE").execute(database).await?;
        Ok(())
    }

    /// Copies the run `model` so many times, in every table that has rows of it. `kind` keeps the ids apart; `changed` are
    /// the columns that a copy does not take over, each with its expression of the model `t` and the number `n`.
    async fn copy(&mut self, model: &str, copies: usize, kind: u8, changed: &[(&str, &str)]) -> anyhow::Result<()> {
        let database = self.site.database()?;
        let tables: Vec<(String, String)> = sqlx::query_as(TABLES).fetch_all(&mut *database).await?;
        sqlx::query("SET synchronous_commit = off").execute(&mut *database).await?;
        let started = Instant::now();
        for first in (0..copies).step_by(CHUNK) {
            let last = (first + CHUNK).min(copies) - 1;
            for (table, columns) in &tables {
                let key = if table == "runs" { "id" } else { "run_id" };
                let value = |column: &str| {
                    let changed =
                        changed.iter().find(|(name, _)| *name == column).map(|(_, value)| (*value).to_owned());
                    let other = || changed.unwrap_or_else(|| format!("t.{column}"));
                    if column == key { new_id(kind) } else { other() }
                };
                let values: Vec<String> = columns.split(',').map(value).collect();
                let copy = format!(
                    "INSERT INTO {table} ({columns}) SELECT {}
                     FROM (SELECT * FROM {table} WHERE {key} = {model}) t, generate_series({first}, {last}) n",
                    values.join(", ")
                );
                sqlx::query(AssertSqlSafe(copy)).execute(&mut *database).await?;
            }
        }
        sqlx::query("RESET synchronous_commit").execute(&mut *database).await?;
        progress(&format!("{copies} copies took {:.0} s", started.elapsed().as_secs_f64()));
        Ok(())
    }

    /// Requests for some of the copied runs, spread over all of them.
    async fn some_copies(&mut self, copies: usize) -> anyhow::Result<Vec<Vec<u8>>> {
        let ids = format!(
            "SELECT {} FROM (SELECT (i * {copies}::int8 / {SPREAD})::int AS n FROM generate_series(0, {SPREAD} - 1) i) s",
            new_id(1)
        );
        let ids: Vec<uuid::Uuid> = sqlx::query_scalar(AssertSqlSafe(ids)).fetch_all(self.site.database()?).await?;
        Ok(ids.iter().map(|id| wire::get(&format!("/v1/runs/{id}"))).collect())
    }

    /// A replica that starts takes runs from the queue; milliseconds a run. It hands them back.
    async fn claim(&mut self, rig: &Rig) -> anyhow::Result<f64> {
        rig.provider.reset().await?;
        self.start(CLAIMED).await?;
        let limit = Instant::now() + PATIENCE;
        let records = loop {
            let records = rig.provider.records().await?;
            if records.len() >= CLAIMED {
                break records;
            }
            if Instant::now() > limit {
                bail!("{} of {CLAIMED} runs were claimed; the daemon:\n{}", records.len(), self.site.log());
            }
            sleep(Duration::from_millis(20)).await;
        };
        self.site.stop().await?;
        let firsts = records.values().map(|record| record.first);
        let (Some(first), Some(last)) = (firsts.clone().min(), firsts.max()) else { bail!("no call was made") };
        #[expect(clippy::cast_precision_loss, reason = "a thousand")]
        let runs = (CLAIMED - 1) as f64;
        Ok(milliseconds(last - first) / runs)
    }
}

/// Runs of the filled database that are read.
const SPREAD: usize = 1000;

/// The tables that hold rows of a run, and their columns but for those that the database fills itself.
const TABLES: &str = "SELECT c.table_name::text, string_agg(quote_ident(c.column_name), ',' ORDER BY c.ordinal_position)
    FROM information_schema.columns c JOIN information_schema.tables t USING (table_schema, table_name)
    WHERE c.table_schema = 'public' AND t.table_type = 'BASE TABLE' AND c.is_identity = 'NO' AND c.is_generated = 'NEVER'
    GROUP BY c.table_name HAVING bool_or(c.column_name = 'run_id') OR c.table_name = 'runs'";

/// An expression of `n`: the id of a copy, ordered by time as all ids are, and older than any real one.
fn new_id(kind: u8) -> String {
    let hash = format!("md5('{kind}-' || n)");
    format!(
        "(lpad(to_hex(1700000000000 + {kind} * 100000000::int8 + n), 12, '0') || '7' || substr({hash}, 1, 3) || '8' \
         || substr({hash}, 4, 15))::uuid"
    )
}

/// Each operation on both sides, in turns.
async fn compare(rig: &Rig, empty: &mut Side, full: &mut Side) -> anyhow::Result<(Sample, Sample)> {
    let claims = (empty.claim(rig).await?, full.claim(rig).await?);
    let mut before =
        Sample { submit: Times::default(), read: Times::default(), list: Times::default(), claim_ms_per_run: claims.0 };
    let mut after =
        Sample { submit: Times::default(), read: Times::default(), list: Times::default(), claim_ms_per_run: claims.1 };
    let (mut one, mut other) = (empty.start(1).await?, full.start(1).await?);
    let held = Submission::sized(HELD, INPUT_BYTES);
    let list = wire::get("/v1/runs?limit=20");
    for n in 0..WARM_UP + SAMPLES {
        let mut turns = [(&mut *empty, &mut one, &mut before), (&mut *full, &mut other, &mut after)];
        // Whoever comes second finds the cores awake.
        if n % 2 == 1 {
            turns.reverse();
        }
        for (side, connection, sample) in turns {
            let number = side.number();
            let started = Instant::now();
            submit_blind(connection, &held, number).await?;
            let submitted = started.elapsed();
            let started = Instant::now();
            read::read(connection, &side.reads, number).await?;
            let read = started.elapsed();
            let started = Instant::now();
            read::read(connection, std::slice::from_ref(&list), number).await?;
            if n >= WARM_UP {
                sample.submit.add(submitted);
                sample.read.add(read);
                sample.list.add(started.elapsed());
            }
        }
    }
    empty.site.stop().await?;
    full.site.stop().await?;
    Ok((before, after))
}

/// Submits, and reads, before those that are measured: the daemons are fresh.
const WARM_UP: u32 = 100;

/// What the figures are called: submit, read, list and claim, each on the empty database, on the full one, and as a ratio.
struct Names([[(&'static str, &'static str); 3]; 4]);

const PLAIN: Names = Names([
    [
        ("submit_empty_ms", "submit p50, empty, ms"),
        ("submit_full_ms", "submit p50, full, ms"),
        ("submit_ratio", "submit: full / empty"),
    ],
    [
        ("read_empty_ms", "read p50, empty, ms"),
        ("read_full_ms", "read p50, full, ms"),
        ("read_ratio", "read: full / empty"),
    ],
    [
        ("list_empty_ms", "list p50, empty, ms"),
        ("list_full_ms", "list p50, full, ms"),
        ("list_ratio", "list: full / empty"),
    ],
    [
        ("claim_empty_ms", "claim a run, empty, ms"),
        ("claim_full_ms", "claim a run, full, ms"),
        ("claim_ratio", "claim: full / empty"),
    ],
]);

const HELD_OPEN: Names = Names([
    [
        ("open_submit_empty_ms", "transaction open: submit p50, empty, ms"),
        ("open_submit_full_ms", "transaction open: submit p50, full, ms"),
        ("open_submit_ratio", "transaction open: submit: full / empty"),
    ],
    [
        ("open_read_empty_ms", "transaction open: read p50, empty, ms"),
        ("open_read_full_ms", "transaction open: read p50, full, ms"),
        ("open_read_ratio", "transaction open: read: full / empty"),
    ],
    [
        ("open_list_empty_ms", "transaction open: list p50, empty, ms"),
        ("open_list_full_ms", "transaction open: list p50, full, ms"),
        ("open_list_ratio", "transaction open: list: full / empty"),
    ],
    [
        ("open_claim_empty_ms", "transaction open: claim a run, empty, ms"),
        ("open_claim_full_ms", "transaction open: claim a run, full, ms"),
        ("open_claim_ratio", "transaction open: claim: full / empty"),
    ],
]);

const CROWDED: Names = Names([
    [
        ("crowd_submit_empty_ms", "among other tenants: submit p50, empty, ms"),
        ("crowd_submit_full_ms", "among other tenants: submit p50, full, ms"),
        ("crowd_submit_ratio", "among other tenants: submit: full / empty"),
    ],
    [
        ("crowd_read_empty_ms", "among other tenants: read p50, empty, ms"),
        ("crowd_read_full_ms", "among other tenants: read p50, full, ms"),
        ("crowd_read_ratio", "among other tenants: read: full / empty"),
    ],
    [
        ("crowd_list_empty_ms", "among other tenants: list p50, empty, ms"),
        ("crowd_list_full_ms", "among other tenants: list p50, full, ms"),
        ("crowd_list_ratio", "among other tenants: list: full / empty"),
    ],
    [
        ("crowd_claim_empty_ms", "among other tenants: claim a run, empty, ms"),
        ("crowd_claim_full_ms", "among other tenants: claim a run, full, ms"),
        ("crowd_claim_ratio", "among other tenants: claim: full / empty"),
    ],
]);

fn report(mut empty: Sample, mut full: Sample, figures: &mut Figures, Names(names): &Names) {
    let values = [
        (empty.submit.quantile(50), full.submit.quantile(50)),
        (empty.read.quantile(50), full.read.quantile(50)),
        (empty.list.quantile(50), full.list.quantile(50)),
        (empty.claim_ms_per_run, full.claim_ms_per_run),
    ];
    for ([on_empty, on_full, ratio], (before, after)) in names.iter().zip(values) {
        figures.push(on_empty.0, on_empty.1, before);
        figures.push(on_full.0, on_full.1, after);
        figures.goal(ratio.0, ratio.1, after / before, Reach::AtMost(1.25));
    }
}
