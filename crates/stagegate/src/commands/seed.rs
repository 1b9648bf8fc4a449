//! `stagegate seed`: fills a tenant with pipelines and runs that come out the same every time: for demonstrations, tests
//! and staging. It is a client of the HTTP API; without a daemon it starts one of its own on the data directory.
//!
//! A run of a seed has an idempotency key and a label, so that a second invocation adds only what is missing.

use std::{collections::BTreeMap, time::Duration};

use futures::{StreamExt as _, TryStreamExt as _};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use stagegate_core::{Code, Error, TenantId};
use tokio::time::Instant;

use super::{
    quiet_logs,
    remote::{Form, Remote},
    run::Signals,
    runs::list,
};
use crate::{
    cli::Global,
    client::Client,
    guest::Guest,
    layout::{Column, KEPT, Row, Table},
    output::{self, WARN, paint},
};

/// The pipelines: name and definition.
const PIPELINES: [(&str, &str); 4] = [
    ("seed-summary", include_str!("seed/summary.yaml")),
    ("seed-draft", include_str!("seed/draft.yaml")),
    ("seed-strict", include_str!("seed/strict.yaml")),
    ("seed-review", include_str!("seed/review.yaml")),
];
/// What the runs are about.
const TOPICS: [&str; 8] = [
    "a bakery that delivers by bicycle before seven in the morning",
    "a library whose books are lent for as long as nobody asks for them",
    "a harbour that weighs every container before it is lifted",
    "a clinic that calls patients back within the hour",
    "a bus line that tells its riders where each bus is",
    "a school kitchen that cooks for three hundred children",
    "a workshop that repairs clocks and writes down each repair",
    "a vineyard that measures the water in its soil",
];
/// Requests under way at once.
const AT_ONCE: usize = 16;
/// How often it is looked whether the runs have come to rest.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long nothing may change before it is given up.
const PATIENCE: Duration = Duration::from_mins(2);
/// How long a full queue is waited for, and how often.
const FULL: (Duration, u32) = (Duration::from_millis(500), 240);

const EXAMPLES: &str = "\
Examples:
  stagegate seed                                  40 runs, in the data directory
  stagegate seed --runs 500 --seed 7
  stagegate seed --server http://127.0.0.1:8080   on a daemon
  stagegate seed --output json | jq .states

The runs end in every state: most succeed, some after a retry; others fail, are held for a person, or are cancelled. All \
answers are simulated (models sim/…). A data directory with unfinished runs of other pipelines is refused. The same seed again adds only what is missing. To remove them: stagegate runs \
list --label seed:1 --output json | jq -r '.[].id' | xargs stagegate runs delete.";

/// Fill a tenant with simulated pipelines and runs.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Seed {
    /// How many runs
    #[arg(long, default_value_t = 40, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=5_000))]
    runs: u32,
    /// Which ones: another seed makes other runs
    #[arg(long = "seed", default_value_t = 1, value_name = "NUMBER")]
    number: u64,
    /// Whose, in the data directory [default: default]. A daemon's tenant is its key's
    #[arg(long)]
    tenant: Option<TenantId>,
    /// Leave once they are submitted, before they have come to rest
    #[arg(long)]
    no_wait: bool,
    /// How it is shown
    #[arg(long, short, value_enum, default_value_t = Form::Text, value_name = "FORM")]
    output: Form,
    #[command(flatten)]
    remote: Remote,
}

/// How a run of the seed is meant to come out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Succeeds,
    Fails,
    Held,
    Cancelled,
}

impl Fate {
    /// Of the nth run: of ten, seven succeed, and of the first five one is of each kind.
    fn of(nth: u32) -> Self {
        match nth % 10 {
            2 => Self::Fails,
            3 => Self::Held,
            4 => Self::Cancelled,
            _ => Self::Succeeds,
        }
    }

    fn pipeline(self, nth: u32) -> &'static str {
        match self {
            Self::Succeeds if nth.is_multiple_of(2) => PIPELINES[0].0,
            Self::Succeeds => PIPELINES[1].0,
            Self::Fails => PIPELINES[2].0,
            Self::Held | Self::Cancelled => PIPELINES[3].0,
        }
    }

    fn state(self) -> &'static str {
        match self {
            Self::Succeeds => "succeeded",
            Self::Fails => "failed",
            Self::Held => "waiting",
            Self::Cancelled => "cancelled",
        }
    }
}

impl Seed {
    pub(crate) async fn run(self, global: &Global) -> Result<u8, Error> {
        let mut signals = Signals::listen_at_terminal()?;
        if self.remote.is_named() {
            if self.tenant.is_some() {
                let message = "--tenant is for the data directory; on a daemon the key decides whose runs they are";
                return Err(Error::new(Code::InvalidRequest, message));
            }
            let client = self.remote.client(global)?;
            return self.fill_until(&client, &mut signals).await;
        }
        let mut loaded = global.load()?;
        let _guard = quiet_logs(&mut loaded)?;
        let own = PIPELINES.map(|(name, _)| name);
        let guest = Guest::start(&loaded.config, &self.tenant.clone().unwrap_or_default(), &own).await?;
        let done = self.fill_until(&guest.client, &mut signals).await;
        guest.stop().await;
        done
    }

    async fn fill_until(&self, client: &Client, signals: &mut Signals) -> Result<u8, Error> {
        tokio::select! {
            biased;
            code = signals.next() => {
                output::note(&paint(WARN, "left; the same command again adds what is missing"));
                Ok(u8::try_from(code).unwrap_or(1))
            }
            done = self.fill(client) => done.map(|()| 0),
        }
    }

    async fn fill(&self, client: &Client) -> Result<(), Error> {
        for (_, definition) in PIPELINES {
            client.post_text("/v1/pipelines", "application/yaml", definition.to_owned()).await?;
        }
        let there = self.there(client).await?;
        let missing: Vec<u32> = (0..self.runs).filter(|nth| !there.contains_key(nth)).collect();
        let bar = bar(u64::from(self.runs));
        bar.set_message("submitted");
        bar.set_position(u64::from(self.runs) - missing.len() as u64);
        let submits = missing.iter().map(|nth| async {
            self.submit(client, *nth).await?;
            bar.inc(1);
            Ok::<_, Error>(())
        });
        futures::stream::iter(submits).buffer_unordered(AT_ONCE).try_collect::<()>().await?;
        let runs = if self.no_wait { self.there(client).await? } else { self.settle(client, &bar).await? };
        bar.finish_and_clear();
        self.tell(&runs, missing.len())
    }

    /// The runs of this seed that are there, by their number.
    async fn there(&self, client: &Client) -> Result<BTreeMap<u32, Value>, Error> {
        let filters = [("label", format!("seed:{}", self.number))];
        let runs = list::read(client, &filters, 10_000).await?;
        let numbered =
            runs.into_iter().filter_map(|run| Some((run["labels"]["seed-run"].as_str()?.parse().ok()?, run)));
        Ok(numbered.filter(|(nth, _)| *nth < self.runs).collect())
    }

    /// The request of the nth run: the same for the same seed, always.
    fn request(&self, nth: u32) -> Value {
        let topic = TOPICS[usize::try_from((u64::from(nth) + self.number) % TOPICS.len() as u64).unwrap_or(0)];
        // Some ask what others have asked: those are answered from the cache.
        let case = nth / 16;
        json!({
            "pipeline": Fate::of(nth).pipeline(nth),
            "input": { "topic": format!("Case {case} of seed {}: {topic}.", self.number) },
            "labels": { "seed": self.number.to_string(), "seed-run": nth.to_string() },
        })
    }

    async fn submit(&self, client: &Client, nth: u32) -> Result<(), Error> {
        let key = format!("seed-{}-{nth}", self.number);
        let (pause, mut tries) = FULL;
        loop {
            match client.post_once("/v1/runs", &self.request(nth), &key).await {
                Err(error) if matches!(error.code, Code::QueueFull | Code::Overloaded) && tries > 0 => {
                    tries -= 1;
                    tokio::time::sleep(pause).await;
                }
                other => return other.map(drop),
            }
        }
    }

    /// Waits until every run has come to rest, and cancels those that are meant to be cancelled.
    async fn settle(&self, client: &Client, bar: &ProgressBar) -> Result<BTreeMap<u32, Value>, Error> {
        bar.set_message("at rest  ");
        bar.set_position(0);
        let mut last = (0, Instant::now());
        loop {
            let runs = self.there(client).await?;
            let mut rest = 0_u64;
            for (nth, run) in &runs {
                let waits = run["state"] == "waiting";
                match Fate::of(*nth) {
                    Fate::Cancelled if waits && run["cancel_requested"] != true => {
                        let id = run["id"].as_str().unwrap_or_default();
                        match client.post(&format!("/v1/runs/{id}/cancel"), &json!({})).await {
                            Err(error) if error.code != Code::WrongState => return Err(error),
                            _ => {}
                        }
                    }
                    Fate::Held if waits => rest += 1,
                    _ => rest += u64::from(!run["finished_at"].is_null()),
                }
            }
            bar.set_position(rest);
            if rest >= u64::from(self.runs) {
                return Ok(runs);
            }
            if rest > last.0 {
                last = (rest, Instant::now());
            } else if last.1.elapsed() > PATIENCE {
                let message =
                    format!("only {rest} of {} runs have come to rest; does the daemon execute runs?", self.runs);
                return Err(Error::new(Code::Unavailable, message));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    fn tell(&self, runs: &BTreeMap<u32, Value>, new: usize) -> Result<(), Error> {
        let mut states: BTreeMap<&str, u64> = BTreeMap::new();
        for run in runs.values() {
            *states.entry(run["state"].as_str().unwrap_or("unknown")).or_default() += 1;
        }
        if self.output == Form::Json {
            let names = PIPELINES.map(|(name, _)| name);
            let told =
                json!({ "seed": self.number, "runs": runs.len(), "new": new, "states": states, "pipelines": names });
            return output::result(&format!("{told:#}\n"));
        }
        let mut table = Table::new([Column::left("state", KEPT), Column::right("runs", KEPT)]);
        for (state, count) in &states {
            table.push(Row::new([(*state).to_owned(), count.to_string()]));
        }
        output::result(&table.text(output::stdout_width()))?;
        output::note_wrapped(&format!("seed {}: {} runs, {new} of them new; label seed:{0}", self.number, runs.len()));
        let other = runs.iter().filter(|(nth, run)| run["state"] != Fate::of(**nth).state()).count();
        if other > 0 && !self.no_wait {
            output::note_wrapped(&paint(
                WARN,
                &format!("{other} came out otherwise than they are meant to: does the simulator play faults?"),
            ));
        }
        Ok(())
    }
}

/// A line that moves, on a terminal.
fn bar(length: u64) -> ProgressBar {
    if !output::stderr_is_live() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("  {bar:30.cyan} {pos}/{len} {msg}");
    ProgressBar::new(length).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seed(seed: u64) -> Seed {
        Seed { runs: 40, number: seed, tenant: None, no_wait: false, output: Form::Text, remote: Remote::default() }
    }

    #[test]
    fn of_the_first_five_runs_one_is_of_each_kind() {
        let fates: Vec<Fate> = (0..5).map(Fate::of).collect();
        for fate in [Fate::Succeeds, Fate::Fails, Fate::Held, Fate::Cancelled] {
            assert!(fates.contains(&fate), "{fate:?}");
        }
    }

    #[test]
    fn the_same_seed_asks_the_same_and_another_one_does_not() {
        for nth in 0..40 {
            assert_eq!(seed(1).request(nth), seed(1).request(nth));
            assert_ne!(seed(1).request(nth), seed(2).request(nth));
        }
    }

    #[test]
    fn each_pipeline_is_named_as_it_is_listed() {
        for (name, definition) in PIPELINES {
            assert!(definition.contains(&format!("\nname: {name}\n")), "{definition}");
        }
    }
}
