//! What the machine can do at all, measured in the same minutes as the engine: rows of a kilobyte written by raw
//! inserts, one by one and by 64, and a bare axum echo. Owns these yardsticks; knows nothing of the product.

use std::{
    net::SocketAddr,
    process::ExitCode,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use axum::{Router, body::Bytes, routing::get};
use futures::future::try_join_all;
use sqlx::{
    Connection as _, PgConnection, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};
use stagegate_testkit::servers::TestDatabase;
use tokio::{net::TcpListener, process::Child};
use uuid::Uuid;

use super::{
    figures::{Figures, Times},
    load::{self, Outcome, closed_loop, open_loop},
    provider::{end_with_parent, helper},
    rig::Rig,
    wire::{self, Connection},
};

/// The body of a raw row, in bytes: what an answer has.
const ROW_BYTES: usize = 1024;
/// Requests and commits that are measured alone.
const ALONE: u32 = 40;
/// As long as the slow provider takes: what comes after it meets a machine that has gone idle.
const SILENCE: Duration = Duration::from_millis(50);
/// Rows of the larger commits.
const BATCH: usize = 64;
/// Writers of single rows: enough that they share the disk's flushes.
const SINGLES: usize = 64;
/// Writers of batches.
const BATCHERS: usize = 4;
/// Connections to the echo.
const ECHO_CONNECTIONS: usize = 64;

/// The bare echo's process (used by `bench` itself).
#[derive(Debug, clap::Args)]
pub(crate) struct BenchEcho {}

impl BenchEcho {
    /// Serves until it is killed. The first line of standard output is the port.
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        println!("{}", listener.local_addr()?.port());
        end_with_parent();
        let kilobyte = Bytes::from("x".repeat(ROW_BYTES));
        let router = Router::new().route("/", get(async move || kilobyte.clone()).post(async |body: Bytes| body));
        axum::serve(listener, router).await?;
        Ok(ExitCode::SUCCESS)
    }
}

/// The echo's process, seen from the measurement.
#[derive(Debug)]
pub(crate) struct Echo {
    address: SocketAddr,
    _child: Child,
}

impl Echo {
    pub(crate) async fn start() -> anyhow::Result<Self> {
        let (child, port) = helper("bench-echo", []).await?;
        Ok(Self { address: SocketAddr::from(([127, 0, 0, 1], port)), _child: child })
    }

    /// POSTs of a kilobyte, as many as it takes.
    pub(crate) async fn saturate(&self, time: Duration) -> anyhow::Result<Outcome> {
        let request = wire::post("/", "text/plain", &"x".repeat(ROW_BYTES));
        let mut connections = load::connections(self.address, ECHO_CONNECTIONS).await?;
        let until = Instant::now() + time;
        let stop = std::sync::atomic::AtomicBool::new(false);
        let shot = async |connection: &mut Connection, _| {
            connection.call(&request).await?;
            if Instant::now() > until {
                stop.store(true, Ordering::Relaxed);
            }
            Ok(())
        };
        closed_loop(&mut connections, 0, u64::MAX, &stop, shot).await.clean()
    }

    /// POSTs of a kilobyte one after another, each after such a pause.
    async fn alone(&self, pause: Duration) -> anyhow::Result<Times> {
        let request = wire::post("/", "text/plain", &"x".repeat(ROW_BYTES));
        let mut connection = Connection::open(self.address).await?;
        let mut times = Times::default();
        for _ in 0..ALONE {
            tokio::time::sleep(pause).await;
            let started = Instant::now();
            connection.call(&request).await?;
            times.add(started.elapsed());
        }
        Ok(times)
    }

    /// Requests at a rate: GETs of a kilobyte, or POSTs.
    pub(crate) async fn at_rate(&self, rate: f64, time: Duration, is_post: bool) -> anyhow::Result<Outcome> {
        let body = "x".repeat(ROW_BYTES);
        let request = if is_post { wire::post("/", "text/plain", &body) } else { wire::get("/") };
        let mut connections = load::connections(self.address, ECHO_CONNECTIONS).await?;
        let shot = async |connection: &mut Connection, _, _| connection.call(&request).await.map(|_| ());
        open_loop(&mut connections, 0, rate, time, shot).await.clean()
    }
}

/// Measures the limits that stand beside the engine.
pub(crate) async fn measure(rig: &Rig, echo: &Echo, time: Duration, figures: &mut Figures) -> anyhow::Result<()> {
    let echoed = echo.saturate(time).await?;
    figures.push("limit_echo_per_s", "limit: bare axum echo, requests/s", echoed.per_second());
    figures.push(
        "limit_echo_p50_ms",
        "limit: bare echo alone, p50, ms",
        echo.alone(Duration::ZERO).await?.quantile(50),
    );
    let silent = echo.alone(SILENCE).await?.quantile(50);
    figures.push("limit_echo_silent_p50_ms", "limit: bare echo after 50 ms of silence, p50, ms", silent);
    if let Some(server) = &rig.postgres {
        let commit = commits_alone(server.url(), Duration::ZERO).await?.quantile(50);
        figures.push("limit_commit_p50_ms", "limit: raw commit alone, p50, ms", commit);
        let silent = commits_alone(server.url(), SILENCE).await?.quantile(50);
        figures.push("limit_commit_silent_p50_ms", "limit: raw commit after 50 ms of silence, p50, ms", silent);
    }
    let (single, batched) = if rig.postgres.is_some() {
        let (single, _) = postgres(rig, SINGLES, 1, time).await?;
        let (batched, cpu_us) = postgres(rig, BATCHERS, BATCH, time).await?;
        figures.push("limit_batched_cpu_us_per_row", "limit: Postgres CPU a row by 64, µs", cpu_us);
        (single, batched)
    } else {
        (sqlite(1, time).await?, sqlite(BATCH, time).await?)
    };
    figures.push("limit_single_rows_per_s", "limit: raw commits of one 1 KB row, rows/s", single);
    figures.push("limit_batched_rows_per_s", "limit: raw commits of 64 such rows, rows/s", batched);
    Ok(())
}

const INSERT: &str = "INSERT INTO raw (run_id, stage_id, body)
    SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[])";

/// Raw commits of a kilobyte one after another, each after such a pause.
async fn commits_alone(url: &str, pause: Duration) -> anyhow::Result<Times> {
    let mut connection = PgConnection::connect(url).await?;
    sqlx::query("CREATE TABLE IF NOT EXISTS alone (body text)").execute(&mut connection).await?;
    let body = "x".repeat(ROW_BYTES);
    let mut times = Times::default();
    for _ in 0..ALONE {
        tokio::time::sleep(pause).await;
        let started = Instant::now();
        sqlx::query("INSERT INTO alone VALUES ($1)").bind(&body).execute(&mut connection).await?;
        times.add(started.elapsed());
    }
    let _ = connection.close().await;
    Ok(times)
}

/// Rows a second, and Postgres' CPU a row in microseconds.
async fn postgres(rig: &Rig, writers: usize, rows: usize, time: Duration) -> anyhow::Result<(f64, f64)> {
    let Some(server) = &rig.postgres else { anyhow::bail!("no Postgres") };
    let database = TestDatabase::on(std::sync::Arc::clone(server)).await?;
    let mut connections = Vec::new();
    for _ in 0..writers {
        connections.push(PgConnection::connect(database.url()).await?);
    }
    let create = "CREATE TABLE raw (run_id uuid, stage_id text, body text, PRIMARY KEY (run_id, stage_id))";
    sqlx::query(create).execute(&mut connections[0]).await?;
    let written = AtomicU64::new(0);
    let cpu = rig.postgres_cpu_s();
    let started = Instant::now();
    let bodies = vec!["x".repeat(ROW_BYTES); rows];
    let stages = vec!["one"; rows];
    try_join_all(connections.iter_mut().map(async |connection| {
        while started.elapsed() < time {
            let ids: Vec<Uuid> = (0..rows).map(|_| Uuid::now_v7()).collect();
            sqlx::query(INSERT).bind(ids).bind(&stages).bind(&bodies).execute(&mut *connection).await?;
            written.fetch_add(rows as u64, Ordering::Relaxed);
        }
        Ok::<_, sqlx::Error>(())
    }))
    .await?;
    let rows = count(written.load(Ordering::Relaxed));
    let per_second = rows / started.elapsed().as_secs_f64();
    for connection in connections {
        let _ = connection.close().await;
    }
    Ok((per_second, (rig.postgres_cpu_s() - cpu) / rows * 1e6))
}

async fn sqlite(rows: usize, time: Duration) -> anyhow::Result<f64> {
    let folder = tempfile::tempdir()?;
    let options = SqliteConnectOptions::new()
        .filename(folder.path().join("raw.db"))
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full);
    let mut connection = SqliteConnection::connect_with(&options).await?;
    let create =
        "CREATE TABLE raw (run_id BLOB, stage_id TEXT, body TEXT, PRIMARY KEY (run_id, stage_id)) WITHOUT ROWID";
    sqlx::query(create).execute(&mut connection).await?;
    let values = vec!["(?, ?, ?)"; rows].join(", ");
    let insert = format!("INSERT INTO raw (run_id, stage_id, body) VALUES {values}");
    let body = "x".repeat(ROW_BYTES);
    let (started, mut written) = (Instant::now(), 0);
    while started.elapsed() < time {
        let mut query = sqlx::query(sqlx::AssertSqlSafe(insert.clone()));
        for _ in 0..rows {
            query = query.bind(Uuid::now_v7()).bind("one").bind(&body);
        }
        query.execute(&mut connection).await?;
        written += rows as u64;
    }
    Ok(count(written) / started.elapsed().as_secs_f64())
}

#[expect(clippy::cast_precision_loss, reason = "far fewer than 2^52 rows")]
fn count(rows: u64) -> f64 {
    rows as f64
}
