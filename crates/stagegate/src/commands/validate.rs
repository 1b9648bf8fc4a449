//! `stagegate validate`: every mistake of every file, as compilers tell them. Calls nothing and changes nothing.

use std::sync::Arc;

use serde_json::json;
use stagegate_core::{Code, Error, ModelRef, Pipeline, SystemClock, Violation, pipeline::Models};
use stagegate_llm::Llm;
use stagegate_net::Client;
use stagegate_telemetry::Metrics;

use crate::{
    cli::Global,
    files,
    output::{self, BAD, GOOD, paint},
};

const EXAMPLES: &str = "\
Examples:
  stagegate validate pipelines/*.yaml
  stagegate validate --any-model p.yaml    on a machine without provider keys
  cat p.yaml | stagegate validate - --json

A mistake is told as FILE:LINE:COLUMN: CODE PATH: what is wrong (what to write instead).

Exit codes: 0 no mistakes, 2 mistakes.";

/// Report every mistake in pipeline definitions.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Validate {
    /// The definitions, YAML or JSON; `-` for stdin
    #[arg(required = true, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    files: Vec<String>,
    /// As JSON: a list of { file, valid, name, stages, violations }
    #[arg(long)]
    json: bool,
    /// Take any `provider/model`, whether or not a configured provider serves it
    #[arg(long)]
    any_model: bool,
}

impl Validate {
    pub(crate) fn run(self, global: &Global) -> Result<u8, Error> {
        let config = global.load()?.config;
        let client = Client::new(&config.net)?;
        let llm = Llm::new(&config.llm, &client, None, Metrics::new(), Arc::new(SystemClock))?;
        let models = Served { llm, any: self.any_model };
        let results: Vec<_> = self.files.iter().map(|file| (file.as_str(), check(file, &models))).collect();
        let mistakes: usize = results.iter().map(|(_, result)| result.as_ref().map_or_else(Vec::len, |_| 0)).sum();
        if self.json {
            let list: Vec<_> = results.iter().map(|(file, result)| as_json(file, result)).collect();
            output::result(&format!("{:#}\n", serde_json::Value::Array(list)))?;
        } else {
            for (file, result) in &results {
                output::result(&as_text(file, result))?;
            }
        }
        if mistakes > 0 {
            let files = results.iter().filter(|(_, result)| result.is_err()).count();
            let text = format!("{}, in {}", count(mistakes, "mistake"), count(files, "file"));
            output::note(&paint(BAD, &text));
            return Ok(2);
        }
        Ok(0)
    }
}

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

fn check(file: &str, models: &Served) -> Result<Pipeline, Vec<Violation>> {
    let bundle = files::bundle(file).map_err(|error| {
        // The place is named already by the line that the mistake stands on.
        let message = error.detail.strip_prefix(&format!("{file}: ")).unwrap_or(&error.detail);
        vec![Violation::new(Code::Syntax, "", message)]
    })?;
    let pipeline = Pipeline::parse_bundle(&bundle, models)?;
    let unanswerable = if models.any { Vec::new() } else { models.llm.unanswerable(&pipeline) };
    if unanswerable.is_empty() { Ok(pipeline) } else { Err(unanswerable) }
}

fn as_text(file: &str, result: &Result<Pipeline, Vec<Violation>>) -> String {
    match result {
        Ok(pipeline) => {
            let stages = count(pipeline.stages.len(), "stage");
            format!("{} {file}: {} is valid ({stages})\n", paint(GOOD, "✓"), pipeline.name)
        }
        Err(violations) => {
            let located: Vec<String> = violations.iter().map(|violation| output::located(file, violation)).collect();
            format!("{}\n", located.join("\n"))
        }
    }
}

fn as_json(file: &str, result: &Result<Pipeline, Vec<Violation>>) -> serde_json::Value {
    match result {
        Ok(pipeline) => json!({
            "file": file,
            "valid": true,
            "name": pipeline.name.as_str(),
            "stages": pipeline.stages.iter().map(|stage| stage.id.as_str()).collect::<Vec<_>>(),
            "violations": [],
        }),
        Err(violations) => json!({ "file": file, "valid": false, "violations": violations }),
    }
}

/// What the configured providers serve, or anything.
struct Served {
    llm: Llm,
    any: bool,
}

impl Models for Served {
    fn check(&self, model: &ModelRef) -> Result<(), Error> {
        if self.any { Ok(()) } else { self.llm.check_model(model) }
    }

    fn is_priced(&self, model: &ModelRef) -> bool {
        self.any || Models::is_priced(&self.llm, model)
    }
}
