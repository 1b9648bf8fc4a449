//! `stagegate replicas`: who runs, who owns what, and what waits. Reads the database of the configuration, so that it
//! sees every tenant, and answers too where no daemon does.

use std::time::Duration;

use serde_json::json;
use stagegate_core::{
    Error, Store, TenantId,
    pipeline::Span,
    store::{Backlog, ReplicaRecord},
};
use stagegate_telemetry::Metrics;

use super::quiet_logs;
use crate::{
    cli::Global,
    daemon::{self, Options},
    layout::{Column, KEPT, Row, Table},
    output,
};

const EXAMPLES: &str = "\
Examples:
  stagegate replicas                  every replica, and the queue
  stagegate replicas --tenant acme    counting this tenant's runs alone
  stagegate replicas --all            those that left within the last hour, too
  watch -n1 stagegate replicas        while a rollout goes on
  stagegate replicas --json | jq '.replicas[] | select(.alive)'

A replica is `dead` when it has not renewed its lease in time (engine.lease_ttl): the others take its runs over. One \
that drained and said so has `left`; it is shown with --all. Both are forgotten after an hour.";

/// Show the replicas, what they own, and what waits.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Replicas {
    /// Count this tenant's runs alone
    #[arg(long)]
    tenant: Option<TenantId>,
    /// Show those, too, that drained and left
    #[arg(long)]
    all: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
}

const REPLICAS: [Column; 7] = [
    Column::left("replica", 40),
    Column::left("host", KEPT),
    Column::left("version", 30),
    Column::left("state", KEPT),
    Column::right("heartbeat", 60),
    Column::right("runs", 80),
    Column::right("oldest lease", 20),
];

const QUEUE: [Column; 6] = [
    Column::left("tenant", KEPT),
    Column::left("pipeline", KEPT),
    Column::right("queued", 80),
    Column::right("oldest", 20),
    Column::right("waiting", 70),
    Column::right("running", 60),
];

impl Replicas {
    pub(crate) async fn run(self, global: &Global) -> Result<u8, Error> {
        let mut loaded = global.load()?;
        let _guard = quiet_logs(&mut loaded)?;
        let opened = daemon::open_store(&loaded.config, Options::default(), &Metrics::new()).await?;
        let done = self.show(&*opened.store, &opened.note).await;
        opened.store.close().await;
        done
    }

    async fn show(&self, store: &dyn Store, note: &str) -> Result<u8, Error> {
        let mut replicas = store.replicas(self.tenant.as_ref()).await?;
        replicas.retain(|replica| self.all || !replica.left);
        let queue = store.backlog(self.tenant.as_ref()).await?;
        if self.json {
            output::result(&format!("{:#}\n", json!({ "replicas": replicas, "queue": queue })))?;
            return Ok(0);
        }
        output::note(note);
        let width = output::stdout_width();
        if replicas.is_empty() {
            output::note("no replica is here; start one with `stagegate serve` (--all shows those that left)");
        } else {
            output::result(&table(&REPLICAS, replicas.iter().map(replica_row)).text(width))?;
        }
        if queue.is_empty() {
            output::note("nothing waits, nothing runs");
        } else {
            output::result(&format!("\n{}", table(&QUEUE, queue.iter().map(queue_row)).text(width)))?;
        }
        Ok(0)
    }
}

fn table(columns: &[Column], rows: impl Iterator<Item = Row>) -> Table {
    let mut table = Table::new(columns.iter().copied());
    for row in rows {
        table.push(row);
    }
    table
}

fn replica_row(replica: &ReplicaRecord) -> Row {
    let state = match (replica.alive, replica.draining) {
        (true, false) => "alive",
        (true, true) => "draining",
        (false, _) if replica.left => "left",
        (false, _) => "dead",
    };
    let state = if replica.failure.is_some() { "unreadable" } else { state };
    let row = Row::new([
        replica.id.to_string(),
        replica.name.clone(),
        replica.version.clone(),
        state.to_owned(),
        format!("{} ago", span(replica.heartbeat_age_ms)),
        replica.runs.to_string(),
        replica.oldest_lease_ms.map_or_else(|| "-".to_owned(), span),
    ]);
    row.with_note(replica.failure.as_ref().map_or("", |failure| &failure.message))
}

fn queue_row(line: &Backlog) -> Row {
    let oldest = if line.queued == 0 { "-".to_owned() } else { span(line.oldest_queued_ms) };
    Row::new([
        line.tenant.to_string(),
        line.pipeline.to_string(),
        line.queued.to_string(),
        oldest,
        line.waiting.to_string(),
        line.running.to_string(),
    ])
}

/// An age as people read it: tenths of seconds first, then whole seconds.
fn span(ms: u64) -> String {
    let rounded = if ms < 10_000 { ms / 100 * 100 } else { ms / 1_000 * 1_000 };
    Span(Duration::from_millis(rounded)).to_string()
}

#[cfg(test)]
mod tests {
    use stagegate_core::{PipelineName, ReplicaId};

    use super::*;

    fn replica(n: u128, alive: bool, left: bool) -> ReplicaRecord {
        ReplicaRecord {
            id: ReplicaId(uuid::Uuid::from_u128(n)),
            name: format!("stagegate-7d9c5b6f4-{n}"),
            version: "0.1.0".to_owned(),
            alive,
            draining: false,
            left,
            started_at: chrono::DateTime::UNIX_EPOCH,
            heartbeat_age_ms: 1_234,
            runs: 12,
            oldest_lease_ms: alive.then_some(61_000),
            failure: None,
        }
    }

    #[test]
    fn replicas_and_their_queue_fit_80_and_120_columns() {
        let replicas = [replica(1, true, false), replica(2, false, false), replica(3, false, true)];
        let queue = [Backlog {
            tenant: TenantId::default(),
            pipeline: PipelineName::new("brief-to-spec").expect("valid"),
            queued: 3,
            waiting: 1,
            running: 12,
            oldest_queued_ms: 4_200,
        }];
        for width in [80, 120] {
            let text = table(&REPLICAS, replicas.iter().map(replica_row)).text(Some(width));
            let queue = table(&QUEUE, queue.iter().map(queue_row)).text(Some(width));
            insta::assert_snapshot!(format!("replicas_{width}"), format!("{text}\n{queue}"));
        }
    }
}
