//! `stagegate run`: one run of a definition, here and now. Owns what a person at a terminal sees of it; the result is
//! all that goes to stdout. What to do with a held output is asked in [`super::held`].

use std::{fmt::Write as _, time::Duration};

use futures::StreamExt as _;
use serde_json::{Value, json};
use stagegate_core::{
    Code, Error, Event, EventKind, Failure, PipelineName, RunId, RunState, StageId, TenantId, Totals,
    pipeline::{Bundle, CacheMode, Labels},
    store::{RunDetail, RunQuery},
};
use stagegate_engine::{Action, Engine, Submit};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{
    held::{Decided, Held, Place},
    in_file, quiet_logs,
};
use crate::{
    cli::Global,
    daemon::{Daemon, Options},
    files,
    output::{self, BAD, DIM, GOOD, WARN, grouped, paint, time},
    progress::Progress,
};

const EXAMPLES: &str = "\
Examples:
  stagegate run brief-to-spec.yaml --input @brief.md > spec.json
  stagegate run brief-to-spec.yaml --input @brief.md    again, from the cache
  stagegate run triage.yaml --input '{\"ticket\": \"…\"}' --set language=en
  git diff | stagegate run review.yaml --input -
  stagegate run review.yaml --input @x.md --output json | jq .cost_usd

The input is @FILE, `-` for stdin, JSON, or text. A text that is no JSON object becomes the one text that the \
pipeline's input schema requires, else `text`.

The result is printed to stdout as JSON, everything else to stderr. With --output json it is the whole run: id, state, \
cost, stages and output, however it ended.

State and cache are kept in the data directory's SQLite file, whatever database is configured, so that the next run \
pays only for what changed. Ctrl-C cancels the run; a second one leaves at once.

A stage that is held for a person is shown, and you are asked; where nobody can be asked, the commands to decide with \
are printed.

Exit codes:
  0  succeeded
  1  failed
  2  a mistake in the definition, the input or the command
  3  cancelled
  4  held: a person has to decide
  5  expired";

/// How long the calls under way may take to end once the run itself has ended.
const DRAIN_GRACE: Duration = Duration::from_secs(2);

/// Run a pipeline once, here; the result goes to stdout.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Run {
    /// The definition, YAML or JSON; `-` for stdin
    #[arg(value_hint = clap::ValueHint::FilePath)]
    file: String,
    /// @FILE, `-` for stdin, JSON or text
    #[arg(long, short, value_name = "INPUT", allow_hyphen_values = true)]
    input: Option<String>,
    /// Set one key of the input; the value is JSON, else text. Can be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Buy every answer anew, and keep none
    #[arg(long, conflicts_with = "refresh")]
    no_cache: bool,
    /// Buy every answer anew, and replace what is cached
    #[arg(long)]
    refresh: bool,
    /// Whose state and cache
    #[arg(long, default_value = "default")]
    tenant: TenantId,
    /// What is printed to stdout
    #[arg(long, short, value_enum, default_value_t = Printed::Result, value_name = "FORM")]
    output: Printed,
}

/// What goes to stdout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Printed {
    /// The pipeline's output, where the run succeeded
    Result,
    /// The whole run: id, state, cost, stages and output
    Json,
}

/// How a run that was followed came to rest.
enum Rest {
    Ended(Box<(RunState, Totals, Option<Failure>)>),
    Held(Vec<StageId>),
}

impl Run {
    pub(crate) async fn run(self, global: &Global) -> Result<u8, Error> {
        if self.file == "-" && self.input.as_deref() == Some("-") {
            let message = "both the definition and the input are `-`; stdin can be read once only";
            return Err(Error::new(Code::InvalidRequest, message));
        }
        let mut signals = Signals::listen()?;
        let source = files::bundle(&self.file)?;
        let mut loaded = global.load()?;
        let _guard = quiet_logs(&mut loaded)?;
        let place = Place::new(global, &loaded.config, &self.tenant);
        let daemon = Daemon::start(&loaded.config, Options { embedded: true, ..Options::default() }).await?;
        let done = self.run_in(&daemon, &source, &place, &mut signals).await;
        daemon.stop(DRAIN_GRACE).await;
        let (code, result) = done?;
        if let Some(result) = result {
            output::result(&format!("{result:#}\n"))?;
        }
        Ok(code)
    }

    /// Submits and follows the run. Returns the exit code and what goes to stdout.
    async fn run_in(
        &self,
        daemon: &Daemon,
        source: &Bundle,
        place: &Place,
        signals: &mut Signals,
    ) -> Result<(u8, Option<Value>), Error> {
        let engine = &daemon.engine;
        let refused = |error| in_file(&self.file, error);
        let pipeline = engine.validate(&self.tenant, source).await.map_err(refused)?;
        let mut input = files::input(self.input.as_deref(), &self.sets, &pipeline.definition)?;
        pipeline.fill_defaults(&mut input);
        pipeline.check_input(&input).map_err(|violations| Error::violations(Code::InvalidInput, violations))?;
        note_unfinished(engine, &self.tenant).await;
        let (version, _) = engine.register(&self.tenant, source).await?;
        let run = self.submit(engine, version.name, version.version, input).await?;
        let stages: Vec<&str> = pipeline.stages.iter().map(|stage| stage.id.as_str()).collect();
        let started = tokio::time::Instant::now();
        let mut after = 0;
        let code = loop {
            let mut progress = Progress::new(stages.iter().copied(), output::stderr_is_live());
            let rest = self.follow(engine, run, &mut after, &mut progress, signals).await;
            progress.done();
            match rest? {
                Rest::Ended(ended) => {
                    let (state, totals, failure) = *ended;
                    tell_end(run, state, &totals, failure.as_ref(), started.elapsed());
                    if let Some(detail) = detail_of(daemon, &self.tenant, run, failure.as_ref()).await {
                        output::note(&format!("  {}", stagegate_telemetry::text::visible(&detail)));
                    }
                    break exit_code(state);
                }
                Rest::Held(stages) => {
                    let held = Held { engine, tenant: &self.tenant, run, stages: &stages, place };
                    if held.decide(signals).await? == Decided::Later {
                        break HELD;
                    }
                }
            }
        };
        Ok((code, self.printed(daemon, run, &stages).await?))
    }

    /// What goes to stdout of a run that came to rest.
    async fn printed(&self, daemon: &Daemon, run: RunId, stages: &[&str]) -> Result<Option<Value>, Error> {
        let Some(detail) = daemon.store.run(&self.tenant, run).await? else { return Ok(None) };
        let succeeded = detail.run.state == RunState::Succeeded;
        Ok(match self.output {
            Printed::Result => detail.output.filter(|_| succeeded).map(|output| output.parse()),
            Printed::Json => Some(whole(&detail, stages)),
        })
    }

    async fn submit(&self, engine: &Engine, name: PipelineName, version: u32, input: Value) -> Result<RunId, Error> {
        let cache_mode = match (self.no_cache, self.refresh) {
            (true, _) => Some(CacheMode::Off),
            (_, true) => Some(CacheMode::Refresh),
            _ => None,
        };
        let submit = Submit {
            tenant: self.tenant.clone(),
            pipeline: name,
            version: Some(version),
            input: input.into(),
            cache_mode,
            priority: 0,
            labels: Labels::new(),
            idempotency: None,
            start_at: None,
            request_id: None,
        };
        Ok(engine.submit(submit).await?.0.id)
    }

    /// Shows events until the run rests. The first signal cancels it, the second leaves.
    async fn follow(
        &self,
        engine: &Engine,
        run: RunId,
        after: &mut u64,
        progress: &mut Progress,
        signals: &mut Signals,
    ) -> Result<Rest, Error> {
        let mut events = engine.follow(self.tenant.clone(), run, 0);
        let mut held: Vec<StageId> = Vec::new();
        let mut cancelled = false;
        loop {
            tokio::select! {
                batch = events.next() => {
                    let Some(batch) = batch else {
                        return Err(Error::new(Code::Internal, format!("the events of run {run} ended before it did")));
                    };
                    for event in batch? {
                        // What was told before the person was asked fills the table, and is not told again.
                        let is_new = event.seq > *after;
                        *after = event.seq.max(*after);
                        progress.event_if(&event, is_new);
                        if let Some(rest) = rest(event, &mut held).filter(|_| is_new) {
                            return Ok(rest);
                        }
                    }
                }
                code = signals.next() => {
                    if cancelled {
                        progress.done();
                        std::process::exit(code);
                    }
                    cancelled = true;
                    progress.note(&paint(WARN, "cancelling; once more to leave at once"));
                    match engine.act(&self.tenant, run, Action::Cancel, Some("ctrl-c".to_owned())).await {
                        Ok(_) => {}
                        // It ended by itself in this moment: its last event is on its way.
                        Err(error) if error.code == Code::WrongState => {}
                        Err(error) => return Err(error),
                    }
                }
            }
        }
    }
}

/// What the event means for the one who waits.
fn rest(event: Event, held: &mut Vec<StageId>) -> Option<Rest> {
    match event.kind {
        EventKind::RunFinished { state, failure, totals } => Some(Rest::Ended(Box::new((state, totals, failure)))),
        EventKind::StageHeld { stage, .. } => {
            held.push(stage);
            None
        }
        // Somebody decided.
        EventKind::StageSucceeded { stage, .. } | EventKind::StageFailed { stage, .. } => {
            held.retain(|held| *held != stage);
            None
        }
        EventKind::RunWaiting { until: None, .. } if !held.is_empty() => Some(Rest::Held(std::mem::take(held))),
        _ => None,
    }
}

/// Runs that an earlier process left unfinished go on now that somebody executes runs: say so.
async fn note_unfinished(engine: &Engine, tenant: &TenantId) {
    let query = RunQuery {
        tenant: tenant.clone(),
        pipeline: None,
        version: None,
        states: vec![RunState::Queued, RunState::Running],
        labels: Labels::new(),
        created_from: None,
        created_before: None,
        before: None,
        limit: 200,
    };
    if let Ok(runs) = engine.store().runs(&query).await
        && !runs.is_empty()
    {
        output::note(&paint(DIM, &format!("{} unfinished before goes on meanwhile", runs_word(runs.len()))));
    }
}

fn runs_word(number: usize) -> String {
    if number == 1 { "1 run that was left".to_owned() } else { format!("{number} runs, each of which was left") }
}

/// Tells how a run ended: its state, what it took, and why it did not succeed.
pub(crate) fn tell_end(run: RunId, state: RunState, totals: &Totals, failure: Option<&Failure>, took: Duration) {
    let style = match state {
        RunState::Succeeded => GOOD,
        RunState::Cancelled => WARN,
        _ => BAD,
    };
    let mut text = format!("{} in {}", paint(style.bold(), state.as_str()), time(took));
    if totals.calls > 0 {
        let tokens = grouped(totals.usage.total_tokens());
        let calls = if totals.calls == 1 { "1 call".to_owned() } else { format!("{} calls", totals.calls) };
        let _ = write!(text, ": {calls}, {tokens} tokens, {}", output::paid(totals));
    }
    if totals.hits > 0 {
        let hits = if totals.hits == 1 { "1 cache hit".to_owned() } else { format!("{} cache hits", totals.hits) };
        let _ = write!(text, "; {hits} saved {}", output::usd(totals.saved_usd));
    }
    output::note_wrapped(&text);
    if let Some(failure) = failure.filter(|_| state != RunState::Succeeded) {
        let place = failure.stage.as_ref().map_or_else(String::new, |stage| format!("stage `{stage}`: "));
        let label = paint(style.bold(), if state == RunState::Cancelled { "why:" } else { "error:" });
        output::note_wrapped(&format!(
            "{label} {} {place}{}",
            failure.code,
            stagegate_telemetry::text::visible(&failure.message)
        ));
        if state != RunState::Cancelled {
            output::note(&paint(DIM, &format!("  see `stagegate explain {}`", failure.code)));
        }
    }
    output::note(&paint(DIM, &format!("run {run}")));
}

/// A run as JSON: what a script asks for first stands first.
fn whole(detail: &RunDetail, stages: &[&str]) -> Value {
    let RunDetail { run, output, stages: rows, .. } = detail;
    let row = |name: &&str| {
        let row = rows.iter().find(|row| row.id.as_str() == *name);
        row.map_or_else(
            || json!({ "id": name, "state": "pending" }),
            |row| {
                json!({
                    "id": row.id,
                    "state": row.state,
                    "attempt": row.attempt,
                    "verdict": row.verdict,
                    "score": row.score,
                    "model": row.model,
                    "origin": row.origin,
                    "cost_usd": row.totals.cost_usd,
                    "totals": row.totals,
                    "failure": row.failure,
                })
            },
        )
    };
    json!({
        "id": run.id,
        "pipeline": run.pipeline,
        "version": run.version,
        "state": run.state,
        "cost_usd": run.totals.cost_usd,
        "saved_usd": run.totals.saved_usd,
        "totals": run.totals,
        "failure": run.failure,
        "stages": stages.iter().map(row).collect::<Vec<_>>(),
        "output": output.as_ref().map(stagegate_core::Json::parse),
    })
}

/// What an attempt's failure says beyond the run's, which quotes nothing: the provider's own words, for example. They are for
/// who may read the prompt, as the person at this terminal may.
async fn detail_of(
    daemon: &Daemon,
    tenant: &TenantId,
    run: RunId,
    failure: Option<&stagegate_core::Failure>,
) -> Option<String> {
    let stage = daemon.store.stage(tenant, run, failure?.stage.as_ref()?).await.ok()??;
    stage.attempts.into_iter().next_back()?.failure?.detail
}

/// The exit code of a run that is held.
const HELD: u8 = 4;

/// The exit code of a run that ended so.
pub(crate) fn exit_code(state: RunState) -> u8 {
    match state {
        RunState::Succeeded => 0,
        RunState::Cancelled => 3,
        RunState::Expired => 5,
        _ => 1,
    }
}

/// Wrappers and terminals may deliver one signal twice, to the process and to its group: what follows so soon is the
/// same one.
const SAME_SIGNAL: Duration = Duration::from_millis(300);

/// SIGINT and SIGTERM, from the start, so that none is lost. A hang-up ends nothing: a daemon outlives the terminal that it
/// was started from, and a run is paid for.
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    hangup_ends: bool,
    last: Option<tokio::time::Instant>,
}

impl Signals {
    /// Begins to listen.
    pub(crate) fn listen() -> Result<Self, Error> {
        let listen = |kind| {
            signal(kind).map_err(|error| Error::new(Code::Internal, format!("signals cannot be received: {error}")))
        };
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
            hangup_ends: false,
            last: None,
        })
    }

    /// The same for what is of no use without its terminal: a hang-up ends it as SIGTERM does.
    pub(crate) fn listen_at_terminal() -> Result<Self, Error> {
        Ok(Self { hangup_ends: true, ..Self::listen()? })
    }

    /// The next signal, as the exit code of a process that it ends.
    pub(crate) async fn next(&mut self) -> i32 {
        loop {
            let code = tokio::select! {
                _ = self.interrupt.recv() => 130,
                _ = self.terminate.recv() => 143,
                _ = self.hangup.recv() => {
                    if self.hangup_ends {
                        return 129;
                    }
                    tracing::warn!("SIGHUP: a reload is not supported; restart to read the configuration again");
                    continue;
                }
            };
            if self.last.is_none_or(|last| last.elapsed() > SAME_SIGNAL) {
                self.last = Some(tokio::time::Instant::now());
                return code;
            }
        }
    }
}
