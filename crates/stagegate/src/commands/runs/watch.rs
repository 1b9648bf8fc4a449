//! `stagegate runs watch`: a run's events as they come, by its event stream, over every break of it.

use std::time::Duration;

use serde_json::Value;
use stagegate_core::{Code, Error, EventKind, Failure, RunId, RunState, Totals};

use super::{Remote, show};
use crate::{
    cli::Global,
    client::Client,
    commands::{
        remote::Form,
        run::{Signals, exit_code, tell_end},
    },
    output::{self, WARN, paint},
    progress::Progress,
};

/// The exit code of a run that is held, where that is what was waited for.
const HELD: u8 = 4;
/// The exit code of a person who leaves.
const LEFT: u8 = 130;

const EXAMPLES: &str = "\
Examples:
  stagegate runs watch RUN
  stagegate runs watch RUN --until-held && echo done      4 where it waits
  stagegate runs watch RUN --output json                  an event a line

A stream that breaks is taken up after the last event that was seen. Ctrl-C stops watching; the run goes on.

Exit codes: 0 succeeded, 1 failed, 3 cancelled, 4 held (with --until-held), 5 expired, 130 left with Ctrl-C.";

/// Follow a run to its end.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Watch {
    /// The run's id
    run: RunId,
    #[command(flatten)]
    how: How,
    #[command(flatten)]
    remote: Remote,
}

/// How a run is watched.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(super) struct How {
    /// End with 4 as soon as the run waits for a person
    #[arg(long)]
    until_held: bool,
    /// How it is shown
    #[arg(long, short, value_enum, default_value_t = Form::Text, value_name = "FORM")]
    pub(super) output: Form,
}

impl Watch {
    pub(super) async fn run(self, global: &Global) -> Result<u8, Error> {
        let client = self.remote.client(global)?;
        follow(&client, self.run, self.how).await
    }
}

/// Follows a run to its end: the exit code.
pub(super) async fn follow(client: &Client, run: RunId, how: How) -> Result<u8, Error> {
    let mut signals = Signals::listen_at_terminal()?;
    let detail = show::read(client, run).await?;
    let stages = detail["stages"].as_array().map(Vec::as_slice).unwrap_or_default();
    let names: Vec<&str> = stages.iter().filter_map(|stage| stage["id"].as_str()).collect();
    let is_text = how.output == Form::Text;
    let mut progress = Progress::new(names, is_text && output::stderr_is_live());
    let mut failed = None;
    let seen = |event: &stagegate_core::Event| {
        if is_text {
            progress.event(event);
        } else {
            let line = serde_json::to_string(event).unwrap_or_default();
            failed = output::result(&format!("{line}\n")).err().or(failed.take());
        }
        !(how.until_held && matches!(event.kind, EventKind::RunWaiting { until: None, .. }))
    };
    let id = run.to_string();
    let followed = tokio::select! {
        biased;
        _ = signals.next() => None,
        followed = client.follow_while(&id, seen) => Some(followed),
    };
    progress.done();
    if let Some(error) = failed {
        return Err(error);
    }
    let Some(followed) = followed else {
        output::note(&paint(WARN, "left; the run goes on"));
        return Ok(LEFT);
    };
    if followed?.is_none() {
        output::note(&paint(WARN, &format!("the run waits for a person: stagegate runs get {run}")));
        return Ok(HELD);
    }
    let detail = show::read(client, run).await?;
    let state = detail["state"].as_str().and_then(RunState::known);
    let state =
        state.ok_or_else(|| Error::new(Code::Internal, "the run's state is not one that this release knows"))?;
    if is_text {
        tell(&detail, run, state)?;
    }
    Ok(exit_code(state))
}

fn tell(detail: &Value, run: RunId, state: RunState) -> Result<(), Error> {
    let totals: Totals = serde_json::from_value(detail["totals"].clone()).unwrap_or_default();
    let failure: Option<Failure> = serde_json::from_value(detail["failure"].clone()).unwrap_or_default();
    let took = Duration::from_millis(detail["duration_ms"].as_u64().unwrap_or_default());
    tell_end(run, state, &totals, failure.as_ref(), took);
    if state == RunState::Succeeded {
        output::result(&format!("{:#}\n", detail["output"]))?;
    }
    Ok(())
}
