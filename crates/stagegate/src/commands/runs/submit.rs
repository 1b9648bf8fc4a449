//! `stagegate runs submit`.

use serde_json::{Map, Value, json};
use stagegate_core::{Code, Error, PipelineName, RunId};

use super::{
    Remote,
    watch::{self, How},
};
use crate::{cli::Global, commands::remote::Form, files, output};

const EXAMPLES: &str = "\
Examples:
  stagegate runs submit brief-to-spec --input @brief.md --watch
  RUN=$(stagegate runs submit triage --set ticket='It burns.')
  stagegate runs submit triage --input @t.json --idempotency-key order-4711
  stagegate runs submit report --start-at 2026-12-24T18:00:00Z

The input is @FILE, `-` for stdin, JSON, or text, as `stagegate run` takes it. The run's id is all that goes to stdout. \
The same idempotency key with the same request is the same run for 24 hours.";

/// Submit a run of a registered pipeline.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Submit {
    /// The registered pipeline's name
    pipeline: PipelineName,
    /// Its version [default: the newest one]
    #[arg(long, value_name = "NUMBER")]
    version: Option<u32>,
    /// @FILE, `-` for stdin, JSON or text
    #[arg(long, short, value_name = "INPUT", allow_hyphen_values = true)]
    input: Option<String>,
    /// Set one key of the input; the value is JSON, else text. Can be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// A label, for filters and people. Can be repeated
    #[arg(long, value_name = "NAME:VALUE")]
    label: Vec<String>,
    /// Higher goes first
    #[arg(long, value_name = "NUMBER", allow_hyphen_values = true, value_parser = clap::value_parser!(i16).range(-100..=100))]
    priority: Option<i16>,
    /// What the cache is used for
    #[arg(long, value_name = "MODE", value_parser = ["use", "refresh", "read_only", "off"])]
    cache_mode: Option<String>,
    /// Before that it does not start, as in 2026-12-24T18:00:00Z
    #[arg(long, value_name = "TIME")]
    start_at: Option<String>,
    /// The same key with the same request is the same run
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// Follow it to its end, and print its output
    #[arg(long)]
    watch: bool,
    #[command(flatten)]
    how: How,
    #[command(flatten)]
    remote: Remote,
}

impl Submit {
    pub(super) async fn run(self, global: &Global) -> Result<u8, Error> {
        let client = self.remote.client(global)?;
        let path = match self.version {
            Some(version) => format!("/v1/pipelines/{}/versions/{version}", self.pipeline),
            None => format!("/v1/pipelines/{}", self.pipeline),
        };
        let known = client.get(&path).await?;
        let input = files::input(self.input.as_deref(), &self.sets, &known["definition"])?;
        let body = self.body(&input)?;
        let accepted = match &self.idempotency_key {
            Some(key) => client.post_once("/v1/runs", &body, key).await?,
            None => client.post("/v1/runs", &body).await?,
        };
        let id = accepted["id"].as_str().unwrap_or_default();
        let run: RunId = id.parse().map_err(|_| Error::new(Code::Internal, "the accepted run has no id"))?;
        if self.watch {
            return watch::follow(&client, run, self.how).await;
        }
        let text = if self.how.output == Form::Json { format!("{accepted:#}\n") } else { format!("{run}\n") };
        output::result(&text)?;
        Ok(0)
    }

    /// What is asked: only what was given, so that it reads as the caller meant it.
    fn body(&self, input: &Value) -> Result<Value, Error> {
        let mut labels = Map::new();
        for label in &self.label {
            let Some((name, value)) = label.split_once(':').filter(|(name, _)| !name.is_empty()) else {
                let message = format!("--label: `{label}` has no name or no `:`; write --label NAME:VALUE");
                return Err(Error::new(Code::InvalidParameter, message));
            };
            labels.insert(name.to_owned(), Value::from(value));
        }
        let mut body = json!({ "pipeline": self.pipeline, "input": input });
        let given = [
            ("version", self.version.map(Value::from)),
            ("priority", self.priority.map(Value::from)),
            ("cache_mode", self.cache_mode.clone().map(Value::from)),
            ("start_at", self.start_at.clone().map(Value::from)),
            ("labels", (!labels.is_empty()).then_some(Value::Object(labels))),
        ];
        for (key, value) in given {
            if let Some(value) = value {
                body[key] = value;
            }
        }
        Ok(body)
    }
}
