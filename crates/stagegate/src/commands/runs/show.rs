//! `stagegate runs get`: one run for people, from what the API tells of it.

use std::{fmt::Write as _, time::Duration};

use serde_json::Value;
use stagegate_core::{Error, RunId, Totals};
use stagegate_telemetry::text::visible;

use super::{Remote, list::style};
use crate::{
    board::shortened,
    cli::Global,
    client::Client,
    commands::remote::Form,
    layout::{Cell, Column, KEPT, Row, Table, wrap},
    output::{self, DIM, STRONG, grouped, paint, time},
};

/// The longest reason that is shown.
const REASON_MAX: usize = 2_000;

const EXAMPLES: &str = "\
Examples:
  stagegate runs get RUN
  stagegate runs get RUN --output json | jq .output";

/// Show a run: its stages, what it took, its output.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Get {
    /// The run's id
    run: RunId,
    /// How it is shown
    #[arg(long, short, value_enum, default_value_t = Form::Text, value_name = "FORM")]
    output: Form,
    #[command(flatten)]
    remote: Remote,
}

const COLUMNS: [Column; 7] = [
    Column::left("stage", KEPT),
    Column::left("state", KEPT),
    Column::right("attempt", 20),
    Column::right("score", 30),
    Column::right("tokens", 10),
    Column::right("cost", 50),
    Column::right("time", 40),
];

impl Get {
    pub(super) async fn run(self, global: &Global) -> Result<u8, Error> {
        let client = self.remote.client(global)?;
        let detail = read(&client, self.run).await?;
        let text = match self.output {
            Form::Json => format!("{detail:#}\n"),
            Form::Text => shown(&detail, output::stdout_width()),
        };
        output::result(&text)?;
        Ok(0)
    }
}

/// A run as the API tells it.
pub(super) async fn read(client: &Client, run: RunId) -> Result<Value, Error> {
    client.get(&format!("/v1/runs/{run}")).await
}

/// What a run or a stage cost.
pub(super) fn cost(totals: &Value) -> String {
    let Ok(totals) = serde_json::from_value::<Totals>(totals.clone()) else { return "-".to_owned() };
    match (totals.calls, totals.hits) {
        (0, 0) => "-".to_owned(),
        (0, _) => "cached".to_owned(),
        _ => output::paid(&totals),
    }
}

/// A run for people.
pub(super) fn shown(run: &Value, width: Option<usize>) -> String {
    let text = |key: &str| visible(run[key].as_str().unwrap_or_default());
    let standing = &*text("state");
    let took = time(Duration::from_millis(run["duration_ms"].as_u64().unwrap_or_default()));
    let mut out = format!("{} {}\n", paint(DIM, "run     "), text("id"));
    let _ = writeln!(out, "{} {} v{}", paint(DIM, "pipeline"), text("pipeline"), run["version"]);
    let asked = if run["cancel_requested"] == true && standing != "cancelled" { ", asked to cancel" } else { "" };
    let _ = writeln!(
        out,
        "{} {}{asked}, {took}, {}",
        paint(DIM, "state   "),
        paint(style(standing), standing),
        cost(&run["totals"])
    );
    if let Some(reason) = run["waiting"]["reason"].as_str() {
        write_wrapped(&mut out, &paint(DIM, "waits   "), reason, width);
    }
    write_failure(&mut out, &run["failure"], width);
    let mut table = Table::new(COLUMNS).indented(1);
    for stage in run["stages"].as_array().into_iter().flatten() {
        table.push(row(stage));
    }
    let _ = write!(out, "\n{}", table.text(width));
    if !run["output"].is_null() {
        let output = run["output"].as_str().map_or_else(|| format!("{:#}", run["output"]), str::to_owned);
        let _ = writeln!(out, "\n{}", paint(STRONG, "output"));
        for line in wrap(&visible(&output.replace("\r\n", "\n")), width) {
            let _ = writeln!(out, "{line}");
        }
    }
    out
}

fn row(stage: &Value) -> Row {
    let standing = stage["state"].as_str().unwrap_or("-");
    let totals: Totals = serde_json::from_value(stage["totals"].clone()).unwrap_or_default();
    let tokens = if totals.calls > 0 { grouped(totals.usage.total_tokens()) } else { "-".to_owned() };
    let cells: [Cell; 7] = [
        stage["id"].as_str().unwrap_or("-").into(),
        Cell::styled(style(standing), standing),
        stage["attempt"]
            .as_u64()
            .filter(|attempt| *attempt > 0)
            .map_or_else(|| "-".to_owned(), |n| n.to_string())
            .into(),
        stage["score"].as_f64().map_or_else(|| "-".to_owned(), stagegate_core::score::short).into(),
        tokens.into(),
        cost(&stage["totals"]).into(),
        stage["duration_ms"].as_u64().map_or_else(|| "-".to_owned(), |ms| time(Duration::from_millis(ms))).into(),
    ];
    let failure = &stage["failure"];
    let reason = match (failure["code"].as_str(), failure["message"].as_str()) {
        (Some(code), Some(message)) => format!("{code} {}", shortened(message, REASON_MAX)),
        _ => shortened(stage["waiting"]["reason"].as_str().unwrap_or_default(), REASON_MAX),
    };
    Row::new(cells).with_note(Cell::styled(DIM, reason))
}

fn write_failure(out: &mut String, failure: &Value, width: Option<usize>) {
    if let (Some(code), Some(message)) = (failure["code"].as_str(), failure["message"].as_str()) {
        let stage = failure["stage"].as_str().map_or_else(String::new, |stage| format!("stage `{stage}`: "));
        write_wrapped(
            out,
            &paint(DIM, "why     "),
            &format!("{code} {stage}{}", shortened(message, REASON_MAX)),
            width,
        );
    }
}

fn write_wrapped(out: &mut String, label: &str, text: &str, width: Option<usize>) {
    const LABEL: usize = 9;
    let lines = wrap(&visible(text), width.map(|width| width.saturating_sub(LABEL)));
    for (at, line) in lines.iter().enumerate() {
        let _ = if at == 0 { writeln!(out, "{label} {line}") } else { writeln!(out, "{}{line}", " ".repeat(LABEL)) };
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nothing_of_a_run_drives_the_terminal() {
        let evil = "\u{1b}]52;c;cm0=\u{7}\u{1b}[2J\u{9b}2J";
        let run = json!({
            "id": evil, "pipeline": evil, "version": 1, "state": evil, "waiting": { "reason": evil },
            "failure": { "code": evil, "message": evil, "stage": evil }, "output": format!("one\r\n{evil}"),
            "stages": [{ "id": evil, "state": evil, "failure": { "code": evil, "message": evil } }],
        });
        for width in [Some(80), None] {
            let text = shown(&run, width);
            let foreign = |c: &char| stagegate_telemetry::text::is_unsafe(*c) && *c != '\n';
            let left: Vec<_> = anstream::adapter::strip_str(&text).to_string().chars().filter(foreign).collect();
            assert!(left.is_empty() && !text.contains("\u{1b}]") && !text.contains("\u{1b}[2J"), "{left:?} {text:?}");
        }
    }

    #[test]
    fn a_run_fits_80_and_120_columns_and_is_whole_when_piped() {
        let totals = json!({ "cost_usd": 0.0021, "calls": 2, "usage": { "input_tokens": 1200, "output_tokens": 300 } });
        let reason = "the gate failed 3 times: min_chars: 12 of 400 characters; not_matches: `lorem ipsum` is there";
        let run = json!({
            "id": "0198c2d0-7c3e-7b1a-8f0e-2d4c6a8b0e1f", "pipeline": "brief-to-spec", "version": 3, "state": "failed",
            "duration_ms": 61_000, "totals": totals, "cancel_requested": false,
            "failure": { "code": "SG0300", "message": reason, "stage": "design" },
            "stages": [
                { "id": "requirements", "state": "succeeded", "attempt": 1, "score": 0.91, "duration_ms": 1540, "totals": totals },
                { "id": "design", "state": "failed", "attempt": 3, "score": 0.4, "duration_ms": 4000, "totals": totals,
                  "failure": { "code": "SG0300", "message": reason } },
                { "id": "spec", "state": "pending", "attempt": 0, "totals": {} },
            ],
            "output": null,
        });
        for width in [Some(80), Some(120), None] {
            let name = width.map_or_else(|| "piped".to_owned(), |width: usize| width.to_string());
            let text = anstream::adapter::strip_str(&shown(&run, width)).to_string();
            insta::assert_snapshot!(format!("get_{name}"), text);
        }
    }
}
