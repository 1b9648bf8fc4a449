//! `stagegate plan`: what a run would cost. Calls no model, registers nothing, executes nothing.

use std::{fmt::Write as _, sync::Arc, time::Duration};

use stagegate_core::{Code, Error, Pipeline, StageId, TenantId, pipeline::Bundle};
use stagegate_engine::{Plan as Planned, PlannedOutcome, PlannedStage};

use super::{in_file, quiet_logs};
use crate::{
    cli::Global,
    daemon::{Daemon, Options},
    files,
    layout::{Column, KEPT, Row, Table},
    output::{self, STRONG, grouped, paint, usd},
};

const COLUMNS: [Column; 7] = [
    Column::left("stage", KEPT),
    Column::left("outcome", KEPT),
    Column::left("model", 50),
    Column::right("tokens in", 30),
    Column::right("tokens out", 20),
    Column::right("USD", 60),
    Column::right("saved", 40),
];

const EXAMPLES: &str = "\
Examples:
  stagegate plan brief-to-spec.yaml --input @brief.md
  stagegate plan brief-to-spec.yaml --input @brief.md --json | jq .cost_usd

It looks into the same cache as `stagegate run` does: `hit` costs nothing, `buy` would be bought, `free` calls no \
model. A stage behind one that would be bought is `buy` too: its prompt is not known yet. Tokens are estimates.";

/// Tell what a run would cost, without spending.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Plan {
    /// The definition, YAML or JSON; `-` for stdin
    #[arg(value_hint = clap::ValueHint::FilePath)]
    file: String,
    /// @FILE, `-` for stdin, JSON or text, as `stagegate run` takes it
    #[arg(long, short, value_name = "INPUT", allow_hyphen_values = true)]
    input: Option<String>,
    /// Set one key of the input; the value is JSON, else text. Can be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Whose cache
    #[arg(long, default_value = "default")]
    tenant: TenantId,
    /// As JSON
    #[arg(long)]
    json: bool,
}

impl Plan {
    pub(crate) async fn run(self, global: &Global) -> Result<u8, Error> {
        if self.file == "-" && self.input.as_deref() == Some("-") {
            let message = "both the definition and the input are `-`; stdin can be read once only";
            return Err(Error::new(Code::InvalidRequest, message));
        }
        let source = files::bundle(&self.file)?;
        let mut loaded = global.load()?;
        let _guard = quiet_logs(&mut loaded)?;
        let daemon =
            Daemon::start(&loaded.config, Options { embedded: true, idle: true, ..Options::default() }).await?;
        let plan = self.plan_in(&daemon, &source).await;
        daemon.stop(Duration::ZERO).await;
        let plan = plan?;
        if self.json {
            let json = serde_json::to_value(&plan)
                .map_err(|error| Error::new(Code::Internal, format!("the plan is no JSON: {error}")))?;
            output::result(&format!("{json:#}\n"))?;
        } else {
            output::result(&as_text(&plan, output::stdout_width()))?;
        }
        Ok(0)
    }

    async fn plan_in(&self, daemon: &Daemon, source: &Bundle) -> Result<Planned, Error> {
        let refused = |error| in_file(&self.file, error);
        let pipeline = Arc::new(daemon.engine.validate(&self.tenant, source).await.map_err(refused)?);
        let input = files::input(self.input.as_deref(), &self.sets, &pipeline.definition)?;
        let version = self.version_of(daemon, &pipeline).await?;
        daemon.engine.plan(&self.tenant, pipeline, version, input.into()).await
    }

    /// The version that the definition has, or would get.
    async fn version_of(&self, daemon: &Daemon, pipeline: &Pipeline) -> Result<u32, Error> {
        let digest = hex(&pipeline.digest);
        let mut before = None;
        let mut newest = 0;
        loop {
            let page = daemon.store.versions(&self.tenant, &pipeline.name, before, 200).await?;
            newest = newest.max(page.first().map_or(0, |version| version.version));
            if let Some(known) = page.iter().find(|version| version.digest == digest) {
                return Ok(known.version);
            }
            match page.last() {
                Some(last) if page.len() == 200 => before = Some(last.version),
                _ => return Ok(newest + 1),
            }
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn as_text(plan: &Planned, width: Option<usize>) -> String {
    let mut table = Table::new(COLUMNS).indented(1);
    for stage in &plan.stages {
        table.push(row(stage));
    }
    let mut text = table.text(width);
    let of = |outcome| plan.stages.iter().filter(|stage| stage.outcome == outcome).count();
    let unpriced = plan.stages.iter().filter(|s| s.outcome == PlannedOutcome::Buy && s.cost_usd.is_none()).count();
    let unknown = if unpriced > 0 { format!(" + {unpriced} without a price") } else { String::new() };
    let path = plan.critical_path.iter().map(StageId::as_str).collect::<Vec<_>>().join(" → ");
    let _ = write!(
        text,
        "\n {} {} to buy, {} cached, {} free\n {} about {} tokens, {}{unknown}; the cache saves {}\n",
        paint(STRONG, "stages:"),
        of(PlannedOutcome::Buy),
        of(PlannedOutcome::Hit),
        of(PlannedOutcome::Free),
        paint(STRONG, "cost:"),
        grouped(plan.tokens),
        usd(plan.cost_usd),
        usd(plan.saved_usd),
    );
    let path = if path.is_empty() { "nothing would be bought".to_owned() } else { path };
    let _ = writeln!(text, " {} {path}", paint(STRONG, "critical path:"));
    if let Some(budget) = plan.budget_usd {
        let worst = plan.worst_case_usd;
        let verdict = match (plan.cost_usd > budget, worst > budget) {
            (true, _) => "too little: the run will fail with SG0303",
            (false, true) => "enough for what is likely, not for the longest answers (`params.max_output_tokens`)",
            (false, false) => "enough, retries aside",
        };
        let _ = writeln!(text, " {} {}; at worst {}: {verdict}", paint(STRONG, "budget:"), usd(budget), usd(worst));
    }
    output::fitted(&text, width).into_iter().map(|line| line + "\n").collect()
}

fn row(stage: &PlannedStage) -> Row {
    let outcome = match stage.outcome {
        PlannedOutcome::Hit => "hit",
        PlannedOutcome::Buy => "buy",
        PlannedOutcome::Free => "free",
    };
    let cost = match (stage.outcome, stage.cost_usd) {
        (PlannedOutcome::Buy, Some(cost)) => usd(cost),
        (PlannedOutcome::Buy, None) => "unknown".to_owned(),
        _ => "-".to_owned(),
    };
    let saved = if stage.outcome == PlannedOutcome::Hit { usd(stage.saved_usd) } else { "-".to_owned() };
    let model = stage.model.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string);
    let tokens = |count: u64| if stage.outcome == PlannedOutcome::Free { "-".to_owned() } else { grouped(count) };
    let id = stage.id.as_str().to_owned();
    Row::new([id, outcome.to_owned(), model, tokens(stage.input_tokens), tokens(stage.output_tokens), cost, saved])
}

#[cfg(test)]
mod tests {
    use stagegate_core::{ModelRef, PipelineName, Usd};

    use super::*;

    #[test]
    fn a_plan_fits_80_and_120_columns_and_is_whole_when_piped() {
        let stage = |name: &str, outcome, cost: Option<f64>| PlannedStage {
            id: StageId::new(name).expect("valid"),
            needs: Vec::new(),
            model: ModelRef::new("openai/gpt-5-mini").ok(),
            outcome,
            input_tokens: 12_345,
            output_tokens: 800,
            cost_usd: cost.map(Usd::from_dollars),
            saved_usd: Usd::from_dollars(0.0021),
            worst_case_usd: Usd::from_dollars(0.01),
        };
        let plan = Planned {
            pipeline: PipelineName::new("brief-to-spec").expect("valid"),
            stages: vec![
                stage("requirements", PlannedOutcome::Hit, None),
                stage("design", PlannedOutcome::Buy, Some(0.0123)),
                stage("a-stage-with-a-long-name", PlannedOutcome::Buy, None),
                stage("spec", PlannedOutcome::Free, None),
            ],
            cost_usd: Usd::from_dollars(0.0123),
            saved_usd: Usd::from_dollars(0.0021),
            worst_case_usd: Usd::from_dollars(0.9),
            budget_usd: Some(Usd::from_dollars(0.5)),
            tokens: 26_290,
            critical_path: ["requirements", "design", "a-stage-with-a-long-name", "spec"]
                .map(|name| StageId::new(name).expect("valid"))
                .to_vec(),
        };
        for width in [Some(80), Some(120), None] {
            let name = width.map_or_else(|| "piped".to_owned(), |width: usize| width.to_string());
            let text = anstream::adapter::strip_str(&as_text(&plan, width)).to_string();
            insta::assert_snapshot!(format!("plan_{name}"), text);
        }
    }
}
