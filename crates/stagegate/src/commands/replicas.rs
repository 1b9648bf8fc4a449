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
    output,
};

const EXAMPLES: &str = "\
Examples:
  stagegate replicas                        every replica, and the queue by tenant and pipeline
  stagegate replicas --tenant acme          counting this tenant's runs alone
  watch -n1 stagegate replicas              while a rollout goes on
  stagegate replicas --json | jq '.replicas[] | select(.alive)'

A replica that is not alive has not renewed its lease in time (engine.lease_ttl): the others
take its runs over, and it is forgotten after an hour.";

/// Show the replicas, what they own, and what waits.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Replicas {
    /// Count this tenant's runs alone
    #[arg(long)]
    tenant: Option<TenantId>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

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
        let replicas = store.replicas(self.tenant.as_ref()).await?;
        let queue = store.backlog(self.tenant.as_ref()).await?;
        if self.json {
            output::result(&format!("{:#}\n", json!({ "replicas": replicas, "queue": queue })))?;
            return Ok(0);
        }
        output::note(note);
        if replicas.is_empty() {
            output::note("no replica has been here within the last hour; start one with `stagegate serve`");
        } else {
            let heads = ["replica", "host", "version", "state", "heartbeat", "runs", "oldest lease"];
            let rows = replicas.iter().map(replica_row).collect();
            output::result(&format!("{}\n", output::table(&heads, rows, &[4, 5, 6])))?;
        }
        if queue.is_empty() {
            output::note("nothing waits, nothing runs");
        } else {
            let heads = ["tenant", "pipeline", "queued", "oldest", "waiting", "running"];
            let rows = queue.iter().map(queue_row).collect();
            output::result(&format!("\n{}\n", output::table(&heads, rows, &[2, 3, 4, 5])))?;
        }
        Ok(0)
    }
}

fn replica_row(replica: &ReplicaRecord) -> Vec<String> {
    let state = match (replica.alive, replica.draining) {
        (true, false) => "alive",
        (true, true) => "draining",
        (false, _) => "dead",
    };
    let state = replica.failure.as_ref().map_or(state, |failure| &failure.message);
    vec![
        replica.id.to_string(),
        replica.name.clone(),
        replica.version.clone(),
        state.to_owned(),
        format!("{} ago", span(replica.heartbeat_age_ms)),
        replica.runs.to_string(),
        replica.oldest_lease_ms.map_or_else(|| "-".to_owned(), span),
    ]
}

fn queue_row(line: &Backlog) -> Vec<String> {
    let oldest = if line.queued == 0 { "-".to_owned() } else { span(line.oldest_queued_ms) };
    vec![
        line.tenant.to_string(),
        line.pipeline.to_string(),
        line.queued.to_string(),
        oldest,
        line.waiting.to_string(),
        line.running.to_string(),
    ]
}

/// An age as people read it: tenths of seconds first, then whole seconds.
fn span(ms: u64) -> String {
    let rounded = if ms < 10_000 { ms / 100 * 100 } else { ms / 1_000 * 1_000 };
    Span(Duration::from_millis(rounded)).to_string()
}
