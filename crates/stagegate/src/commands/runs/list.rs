//! `stagegate runs list`.

use std::time::Duration;

use anstyle::Style;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use serde_json::Value;
use stagegate_core::{Error, PipelineName, RunState};

use super::Remote;
use crate::{
    cli::Global,
    client::Client,
    commands::remote::Form,
    layout::{Cell, Column, KEPT, Row, Table},
    output::{self, BAD, DIM, GOOD, REUSED, WARN, time},
};

/// Runs that one page of the API holds at most.
const PAGE_MAX: usize = 200;
/// Runs that are listed at most.
const LIMIT_MAX: u64 = 10_000;

const EXAMPLES: &str = "\
Examples:
  stagegate runs list --state waiting      what waits for a person or a time
  stagegate runs list --pipeline triage --limit 5
  stagegate runs list --label customer:acme --output json";

/// List runs, the newest first.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct List {
    /// Only in these states
    #[arg(long, value_name = "STATE", value_delimiter = ',', value_parser = state())]
    state: Vec<RunState>,
    /// Only of this pipeline
    #[arg(long, value_name = "NAME")]
    pipeline: Option<PipelineName>,
    /// Only with this label, as NAME:VALUE. Repeated, all of them are needed
    #[arg(long, value_name = "NAME:VALUE")]
    label: Vec<String>,
    /// How many
    #[arg(long, default_value_t = 20, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..=LIMIT_MAX))]
    limit: u64,
    /// How it is shown
    #[arg(long, short, value_enum, default_value_t = Form::Text, value_name = "FORM")]
    output: Form,
    #[command(flatten)]
    remote: Remote,
}

fn state() -> impl TypedValueParser<Value = RunState> {
    let names: Vec<&'static str> = RunState::ALL.iter().map(|state| state.as_str()).collect();
    PossibleValuesParser::new(names).try_map(|text| RunState::known(&text).ok_or("there is no such state"))
}

const COLUMNS: [Column; 7] = [
    Column::left("run", KEPT),
    Column::left("pipeline", 80),
    Column::left("state", KEPT),
    Column::right("stages", 30),
    Column::right("cost", 50),
    Column::right("took", 40),
    Column::left("accepted", 20),
];

impl List {
    pub(super) async fn run(self, global: &Global) -> Result<u8, Error> {
        let client = self.remote.client(global)?;
        let limit = usize::try_from(self.limit).unwrap_or(PAGE_MAX);
        let runs = read(&client, &self.filters(), limit).await?;
        if self.output == Form::Json {
            output::result(&format!("{:#}\n", Value::Array(runs)))?;
        } else if runs.is_empty() {
            output::note("there is no such run");
        } else {
            output::result(&table(&runs).text(output::stdout_width()))?;
        }
        Ok(0)
    }

    fn filters(&self) -> Vec<(&'static str, String)> {
        let states = self.state.iter().map(|state| ("state", state.as_str().to_owned()));
        let pipeline = self.pipeline.iter().map(|name| ("pipeline", name.to_string()));
        states.chain(pipeline).chain(self.label.iter().map(|label| ("label", label.clone()))).collect()
    }
}

/// Up to `limit` runs that the filters let through, the newest first.
pub(crate) async fn read(client: &Client, filters: &[(&str, String)], limit: usize) -> Result<Vec<Value>, Error> {
    let mut runs: Vec<Value> = Vec::new();
    let mut cursor: Option<String> = None;
    loop {
        let mut query = url::form_urlencoded::Serializer::new(String::new());
        query.append_pair("limit", &(limit - runs.len()).min(PAGE_MAX).to_string());
        query.extend_pairs(filters);
        if let Some(cursor) = &cursor {
            query.append_pair("cursor", cursor);
        }
        let mut page = client.get(&format!("/v1/runs?{}", query.finish())).await?;
        if let Value::Array(items) = page["items"].take() {
            runs.extend(items);
        }
        cursor = page["next_cursor"].as_str().map(str::to_owned);
        if cursor.is_none() || runs.len() >= limit {
            return Ok(runs);
        }
    }
}

fn table(runs: &[Value]) -> Table {
    let mut table = Table::new(COLUMNS);
    for run in runs {
        let text = |key: &str| run[key].as_str().unwrap_or("-").to_owned();
        let stages = format!("{}/{}", run["stages_done"], run["stages_total"]);
        let took = time(Duration::from_millis(run["duration_ms"].as_u64().unwrap_or_default()));
        let accepted = text("created_at").chars().take(16).collect::<String>().replace('T', " ");
        let pipeline = format!("{} v{}", text("pipeline"), run["version"]);
        let state = Cell::styled(style(&text("state")), text("state"));
        let cost = super::show::cost(&run["totals"]);
        let row = [text("id").into(), pipeline.into(), state, stages.into(), cost.into(), took.into(), accepted.into()];
        table.push(Row::new(row));
    }
    table
}

/// How a state looks.
pub(super) fn style(state: &str) -> Style {
    match state {
        "succeeded" => GOOD,
        "failed" | "expired" => BAD,
        "waiting" | "held" | "cancelled" => WARN,
        "running" => REUSED,
        "pending" => DIM,
        _ => Style::new(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn plain(text: &str) -> String {
        anstream::adapter::strip_str(text).to_string()
    }

    #[test]
    fn a_list_fits_80_and_120_columns() {
        let run = |n: u32, state: &str| {
            json!({
                "id": format!("0198c2d0-7c3e-7b1a-8f0e-2d4c6a8b0e{n:02}"), "pipeline": "brief-to-spec", "version": 3,
                "state": state, "stages_done": 2, "stages_total": 5, "duration_ms": 61_000,
                "created_at": "2026-11-28T23:55:33.120Z",
                "totals": { "cost_usd": 0.0021, "calls": 2, "usage": {} },
            })
        };
        let runs = [run(1, "succeeded"), run(2, "waiting"), run(3, "failed")];
        for width in [80, 120] {
            insta::assert_snapshot!(format!("list_{width}"), plain(&table(&runs).text(Some(width))));
        }
    }
}
