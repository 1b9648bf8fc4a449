//! `stagegate demo`: the product's first minute. It starts a daemon in this process, and from then on is a client of
//! its HTTP API like any other program: every figure that it shows was told by the API.

use std::{fmt::Write as _, net::SocketAddr, time::Duration};

use serde_json::{Value, json};
use stagegate_core::{Code, Error, StageId, Totals, pipeline::Span};
use stagegate_http::config::{AuthMode, HttpConfig};
use stagegate_llm::config::{ProviderConfig, ProviderKind, SimConfig};
use stagegate_telemetry::{config::LogConfig, config::SentryConfig, logs};
use tokio::sync::oneshot;

use super::{run::Signals, serve::bind};
use crate::{
    cli::Global,
    client::Client,
    config::Config,
    daemon::{Daemon, Options},
    layout::{self, Column, KEPT, Row, Table},
    output::{self, DIM, GOOD, STRONG, WARN, grouped, paint, time, usd},
    progress::Progress,
};

const EXAMPLES: &str = "\
Examples:
  stagegate demo                    then stays up, to look around at /docs
  stagegate demo --once             ends when it is done
  stagegate demo --port 8080

It needs nothing: no key, no Postgres, no Redis, no network. It keeps its state in a temporary directory, which it \
removes, and takes nothing from your configuration. All answers are simulated.";

/// The pipeline that ships as the default.
const PIPELINE: &str = include_str!("../../../../docs/examples/brief-to-spec.yaml");
/// The product brief that ships with it.
const BRIEF: &str = include_str!("../../../../docs/examples/brief.md");
/// The stage whose prompt the third run changes: a late one.
const CHANGED_STAGE: &str = "risk-review";
/// What is added to its prompt.
const CHANGE: &str = "\nBegin with the one risk that could sink the project.";
/// The longest excerpt of one part of the result, in lines.
const EXCERPT_LINES: usize = 4;
/// How wide a line of it is where stdout is no terminal.
const EXCERPT_COLUMNS: usize = 100;

/// Show the whole thing at work, simulated.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Demo {
    /// End when it is done, instead of staying up
    #[arg(long)]
    once: bool,
    /// The port on loopback [default: a free one]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    port: u16,
}

const SUMMARY: [Column; 9] = [
    Column::right("run", KEPT),
    Column::left("", 40),
    Column::right("time", 50),
    Column::right("bought", 70),
    Column::right("cached", 80),
    Column::right("calls", 10),
    Column::right("tokens", 20),
    Column::right("cost", 60),
    Column::right("saved", 65),
];

/// A run as the API told it at its end.
struct Told {
    id: String,
    title: &'static str,
    state: String,
    took: Duration,
    totals: Totals,
    stages: Vec<(String, Totals)>,
    detail: Value,
}

impl Demo {
    pub(crate) async fn run(self, global: &Global) -> Result<u8, Error> {
        let mut signals = Signals::listen_at_terminal()?;
        let filter = global.log.clone().unwrap_or_else(|| "error".to_owned());
        let log = LogConfig { filter, ..LogConfig::default() };
        let _guard = logs::init(&log, &SentryConfig::default(), env!("CARGO_PKG_VERSION"))?;
        let place = tempfile::Builder::new()
            .prefix("stagegate-demo-")
            .tempdir()
            .map_err(|error| Error::new(Code::Internal, format!("a temporary directory could not be made: {error}")))?;
        let listener = bind(SocketAddr::from(([127, 0, 0, 1], self.port))).await?;
        let address = listener.local_addr().map_err(|error| Error::new(Code::Internal, error.to_string()))?;
        let mut config = Config::default();
        config.store.data_dir = Some(place.path().to_owned());
        config.llm.providers.insert("sim".to_owned(), simulator());
        let daemon = Daemon::start(&config, Options { embedded: true, ..Options::default() }).await?;
        let (stop, stopped) = oneshot::channel::<()>();
        let http = HttpConfig { listen: address, auth: AuthMode::Open, ..HttpConfig::default() };
        let server = daemon.serve(http, listener, async move {
            // A dropped sender stops it as well.
            let _ = stopped.await;
        })?;
        let base = format!("http://{address}");
        let done = tokio::select! {
            done = Box::pin(show(&base, self.once)) => done.map(|()| 0),
            code = signals.next() => Ok(u8::try_from(code).unwrap_or(1)),
        };
        let done = match done {
            Ok(0) if !self.once => {
                signals.next().await;
                output::note("stopping; the temporary directory goes with it");
                Ok(0)
            }
            other => other,
        };
        daemon.engine.drain(Duration::from_millis(200)).await;
        let _ = stop.send(());
        let _ = tokio::time::timeout(Duration::from_secs(2), server).await;
        daemon.store.close().await;
        done
    }
}

/// The simulator, at a pace that can be watched.
fn simulator() -> ProviderConfig {
    ProviderConfig {
        sim: SimConfig { latency: Span(Duration::from_millis(350)), ..SimConfig::default() },
        ..ProviderConfig::new(ProviderKind::Sim)
    }
}

/// The whole story, told through the API at this address.
async fn show(base: &str, once: bool) -> Result<(), Error> {
    let client = Client::new(base, None)?;
    say(&format!(
        "{} A product brief becomes an engineering spec, in five gated stages.\n{}\n",
        paint(STRONG, concat!("Stagegate ", env!("CARGO_PKG_VERSION"), ".")),
        paint(
            WARN,
            "All answers are simulated (models sim/…): no key, no network. Costs are what the price table charges for \
             the simulator; nothing is paid."
        )
    ))?;
    let definition = register(&client).await?;
    let input = json!({ "brief": BRIEF });

    let first = perform(&client, "the first run: every stage is bought", &definition, &input).await?;
    let retried = retried_stages(&client, &first).await?;
    say(&format!("{retried}\n{}\n", excerpt(&first)))?;

    let second = perform(&client, "the same brief again", &definition, &input).await?;
    let cached = second.cached().len();
    say(&format!(
        "  {cached} of {} stages came from the cache: {} calls were bought, {} was saved.\n\n",
        second.stages.len(),
        second.totals.calls,
        usd(second.totals.saved_usd)
    ))?;

    let changed = change(&client, &definition).await?;
    let third = perform(&client, "one late prompt changed", &changed, &input).await?;
    say(&format!("  bought: {}; from the cache: {}.\n\n", listed(&third.bought()), listed(&third.cached())))?;

    say(&summary(&[&first, &second, &third]))?;
    // Commands are broken by nothing but the terminal, so that they can be copied.
    output::result(&what_next(base, &first, once))
}

/// Writes a text that fits the terminal.
fn say(text: &str) -> Result<(), Error> {
    let lines = output::fitted(text, output::stdout_width());
    output::result(&lines.into_iter().map(|line| line + "\n").collect::<String>())
}

/// Registers the pipeline and shows its shape.
async fn register(client: &Client) -> Result<Value, Error> {
    let registered = client.post_text("/v1/pipelines", "application/yaml", PIPELINE.to_owned()).await?;
    let name = registered["name"].as_str().unwrap_or_default();
    let version = &registered["version"];
    let known = client.get(&format!("/v1/pipelines/{name}/versions/{version}")).await?;
    say(&format!(
        "\n{} {}\n{} {name} v{version}: {}\n\n",
        paint(DIM, "daemon  "),
        client.base(),
        paint(DIM, "pipeline"),
        shape(&known["definition"])
    ))?;
    Ok(known)
}

/// The DAG in one line: `a → b → {c, d}`.
fn shape(definition: &Value) -> String {
    let stages = definition["stages"].as_array().map(Vec::as_slice).unwrap_or_default();
    let mut levels: Vec<(String, usize)> = Vec::new();
    // Every round settles at least one stage: a registered pipeline has no cycle.
    for _ in 0..stages.len() {
        for stage in stages {
            let id = stage["id"].as_str().unwrap_or_default();
            let needs: Vec<&str> = stage["needs"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            let level = |need: &&str| levels.iter().find(|(known, _)| known == need).map(|(_, level)| level + 1);
            let of_needs: Option<Vec<usize>> = needs.iter().map(level).collect();
            if let Some(of_needs) = of_needs
                && levels.iter().all(|(known, _)| known != id)
            {
                levels.push((id.to_owned(), of_needs.into_iter().max().unwrap_or(0)));
            }
        }
    }
    let deepest = levels.iter().map(|(_, level)| *level).max().unwrap_or(0);
    let at = |level: usize| {
        let ids = stages.iter().filter_map(|stage| stage["id"].as_str());
        let names: Vec<&str> = ids.filter(|id| levels.iter().any(|(known, l)| known == id && *l == level)).collect();
        if names.len() == 1 { names[0].to_owned() } else { format!("{{{}}}", names.join(", ")) }
    };
    (0..=deepest).map(at).collect::<Vec<_>>().join(" → ")
}

/// Submits, follows and reads back one run.
async fn perform(client: &Client, title: &'static str, version: &Value, input: &Value) -> Result<Told, Error> {
    let body = json!({ "pipeline": version["name"], "version": version["version"], "input": input });
    let accepted = client.post("/v1/runs", &body).await?;
    let id = accepted["id"].as_str().unwrap_or_default().to_owned();
    say(&format!("{} {}\n", paint(STRONG, &capitalised(title)), paint(DIM, &format!("(run {id})"))))?;
    let read = client.get(&format!("/v1/runs/{id}")).await?;
    let names: Vec<&str> = stages_of(&read).iter().filter_map(|stage| stage["id"].as_str()).collect();
    let mut progress = Progress::new(names, output::stderr_is_live());
    let followed = client.follow(&id, |event| progress.event(event)).await;
    progress.done();
    followed?;
    let told =
        Told::new(id, title, client.get(&format!("/v1/runs/{}", read["id"].as_str().unwrap_or_default())).await?)?;
    if told.state != "succeeded" {
        let message = told.detail["failure"]["message"].as_str().unwrap_or("no reason was given").to_owned();
        return Err(Error::new(Code::Internal, format!("the run {}: {message}", told.state)));
    }
    let calls = if told.totals.calls > 0 {
        let tokens = grouped(told.totals.usage.total_tokens());
        format!("{} model calls, {tokens} tokens, {}", told.totals.calls, output::paid(&told.totals))
    } else {
        "no model call".to_owned()
    };
    say(&format!("  {} in {}: {calls}\n", paint(GOOD, &told.state), time(told.took)))?;
    Ok(told)
}

fn stages_of(detail: &Value) -> &[Value] {
    detail["stages"].as_array().map(Vec::as_slice).unwrap_or_default()
}

impl Told {
    fn new(id: String, title: &'static str, detail: Value) -> Result<Self, Error> {
        let totals = |value: &Value| {
            serde_json::from_value::<Totals>(value["totals"].clone())
                .map_err(|error| Error::new(Code::Internal, format!("the totals cannot be read: {error}")))
        };
        let stage = |stage: &Value| Ok((stage["id"].as_str().unwrap_or_default().to_owned(), totals(stage)?));
        Ok(Self {
            id,
            title,
            state: detail["state"].as_str().unwrap_or_default().to_owned(),
            took: Duration::from_millis(detail["duration_ms"].as_u64().unwrap_or_default()),
            totals: totals(&detail)?,
            stages: stages_of(&detail).iter().map(stage).collect::<Result<_, Error>>()?,
            detail,
        })
    }

    fn bought(&self) -> Vec<&str> {
        self.stages.iter().filter(|(_, totals)| totals.calls > 0).map(|(id, _)| id.as_str()).collect()
    }

    fn cached(&self) -> Vec<&str> {
        let cached = |totals: &Totals| totals.calls == 0 && totals.hits > 0;
        self.stages.iter().filter(|(_, totals)| cached(totals)).map(|(id, _)| id.as_str()).collect()
    }
}

/// What happened at the gates that failed first, from the stages' own records.
async fn retried_stages(client: &Client, told: &Told) -> Result<String, Error> {
    let mut text = String::new();
    for stage in stages_of(&told.detail).iter().filter(|stage| stage["attempt"].as_u64() > Some(1)) {
        let id = stage["id"].as_str().unwrap_or_default();
        let detail = client.get(&format!("/v1/runs/{}/stages/{id}", told.id)).await?;
        let attempts = detail["attempts"].as_array().map(Vec::as_slice).unwrap_or_default();
        let score = |attempt: &Value| {
            let scores = attempt["assessments"].as_array().into_iter().flatten().filter_map(|a| a["score"].as_f64());
            scores.min_by(f64::total_cmp).map_or_else(|| "-".to_owned(), stagegate_core::score::short)
        };
        let scores = attempts.iter().map(score).collect::<Vec<_>>().join(" → ");
        let _ = writeln!(
            text,
            "  The gate of {} sent its first answer back with the critique: {} attempts, scores {scores}.",
            paint(STRONG, id),
            attempts.len()
        );
    }
    Ok(text)
}

/// The result, cut to a few lines a part: texts first, then how many items each list has, and its first one.
fn excerpt(told: &Told) -> String {
    let lines_max = EXCERPT_LINES;
    let width = output::stdout_width().unwrap_or(EXCERPT_COLUMNS).saturating_sub(4);
    let cut = |line: &str| layout::cut(line, width);
    let mut text = format!("  {}\n", paint(STRONG, "The result (abridged; simulated):"));
    let mut parts: Vec<(&str, &Value)> = match &told.detail["output"] {
        Value::Object(map) => map.iter().map(|(key, value)| (key.as_str(), value)).collect(),
        other => vec![("output", other)],
    };
    parts.sort_by_key(|(_, value)| !value.is_string());
    for (key, value) in parts {
        let label = paint(DIM, &format!("{key}:"));
        match value {
            Value::String(body) => {
                let lines: Vec<&str> = body.lines().filter(|line| !line.trim().is_empty()).collect();
                let _ = writeln!(text, "  {label}");
                for line in lines.iter().take(lines_max) {
                    let _ = writeln!(text, "    {}", cut(line));
                }
                if lines.len() > lines_max {
                    let _ = writeln!(text, "    {}", paint(DIM, &format!("… {} more lines", lines.len() - lines_max)));
                }
            }
            Value::Array(items) if !items.is_empty() => {
                let _ = writeln!(text, "  {label} {}, such as", items.len());
                let _ = writeln!(text, "    {}", cut(&items[0].to_string()));
            }
            other => {
                let _ = writeln!(text, "  {label} {}", cut(&other.to_string()));
            }
        }
    }
    text
}

/// Registers the pipeline with one prompt changed: a new version.
async fn change(client: &Client, version: &Value) -> Result<Value, Error> {
    let mut definition = version["definition"].clone();
    let stages = definition["stages"].as_array_mut().into_iter().flatten();
    for stage in stages.filter(|stage| stage["id"] == CHANGED_STAGE) {
        let prompt = format!("{}{CHANGE}", stage["prompt"].as_str().unwrap_or_default().trim_end());
        stage["prompt"] = Value::String(prompt);
    }
    let registered = client.post("/v1/pipelines", &definition).await?;
    let (name, number) = (registered["name"].as_str().unwrap_or_default(), &registered["version"]);
    say(&format!(
        "  The prompt of {} now ends with “{}”: that is {name} v{number}.\n\n",
        paint(STRONG, CHANGED_STAGE),
        CHANGE.trim()
    ))?;
    client.get(&format!("/v1/pipelines/{name}/versions/{number}")).await
}

fn listed(names: &[&str]) -> String {
    if names.is_empty() { "nothing".to_owned() } else { names.join(", ") }
}

fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}

/// All runs side by side.
fn summary(runs: &[&Told]) -> String {
    let mut table = Table::new(SUMMARY);
    for (at, told) in runs.iter().enumerate() {
        table.push(Row::new([
            format!("{}", at + 1),
            told.title.to_owned(),
            time(told.took),
            told.bought().len().to_string(),
            told.cached().len().to_string(),
            told.totals.calls.to_string(),
            grouped(told.totals.usage.total_tokens()),
            output::paid(&told.totals),
            usd(told.totals.saved_usd),
        ]));
    }
    format!("{}\n{}", paint(STRONG, "In sum (simulated)"), table.text(output::stdout_width()))
}

fn what_next(base: &str, first: &Told, once: bool) -> String {
    // As this one was started: from a checkout the binary is on nobody's path.
    let program = std::env::args().next().unwrap_or_else(|| "stagegate".to_owned());
    let own = format!(
        "Your own:\n  {program} run docs/examples/brief-to-spec.yaml --input @docs/examples/brief.md\n  \
         {program} validate my-pipeline.yaml\n  OPENAI_API_KEY=… {program} serve\n"
    );
    if once {
        return format!("\n{own}");
    }
    let id = &first.id;
    let stage = StageId::new("design").map_or_else(|_| String::new(), |stage| stage.to_string());
    format!(
        "\n{} (Ctrl-C stops it)\n  \
         RUN={base}/v1/runs/{id}\n  \
         curl -s $RUN                                 # state, stages, cost, output\n  \
         curl -s $RUN/stages/{stage}                   # its attempts and calls\n  \
         curl -N -H 'accept: text/event-stream' $RUN/events    # what happens\n  \
         curl -s {base}/metrics\n  \
         {base}/docs                  # every route, to try in the browser\n\
         The same by command:\n  \
         export STAGEGATE_SERVER={base}\n  \
         {program} runs list\n  \
         {program} runs get {id}\n{own}",
        paint(STRONG, "The daemon stays up.")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dag_reads_as_one_line() {
        let definition = json!({ "stages": [
            { "id": "d", "needs": ["b"] }, { "id": "a" }, { "id": "b", "needs": ["a"] }, { "id": "c", "needs": ["b"] } ] });
        assert_eq!(shape(&definition), "a → b → {d, c}");
    }

    #[test]
    fn the_brief_and_the_pipeline_ship_with_the_binary() {
        assert!(PIPELINE.contains(CHANGED_STAGE) && BRIEF.len() > 200);
    }
}
