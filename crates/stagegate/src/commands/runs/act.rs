//! `stagegate runs cancel`, `retry`, `approve`, `reject` and `delete`.

use serde_json::{Map, Value, json};
use stagegate_core::{Code, Error, RunId, StageId};

use super::{Remote, show};
use crate::{cli::Global, client::Client, commands::remote::Form, files, output};

/// Which runs, and how the answer is shown.
#[derive(Debug, clap::Args)]
struct Which {
    /// The runs' ids
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<RunId>,
    /// How it is shown
    #[arg(long, short, value_enum, default_value_t = Form::Text, value_name = "FORM")]
    output: Form,
    #[command(flatten)]
    remote: Remote,
}

/// Stop runs.
///
/// No model call starts later than one heartbeat after this.
#[derive(Debug, clap::Args)]
pub(super) struct Cancel {
    #[command(flatten)]
    which: Which,
}

/// Start over what failed; checkpoints are kept.
#[derive(Debug, clap::Args)]
pub(super) struct Retry {
    #[command(flatten)]
    which: Which,
}

/// Remove runs that have ended, whole.
///
/// What they cost stays in the ledger. A run that lives is refused: cancel it first.
#[derive(Debug, clap::Args)]
pub(super) struct Delete {
    #[command(flatten)]
    which: Which,
}

impl Cancel {
    pub(super) async fn run(self, global: &Global) -> Result<u8, Error> {
        self.which
            .each(global, "will be cancelled", async |client, run| {
                client.post(&format!("/v1/runs/{run}/cancel"), &json!({})).await
            })
            .await
    }
}

impl Retry {
    pub(super) async fn run(self, global: &Global) -> Result<u8, Error> {
        self.which
            .each(global, "goes on", async |client, run| {
                client.post(&format!("/v1/runs/{run}/retry"), &json!({})).await
            })
            .await
    }
}

impl Delete {
    pub(super) async fn run(self, global: &Global) -> Result<u8, Error> {
        self.which.each(global, "is removed", async |client, run| client.delete(&format!("/v1/runs/{run}")).await).await
    }
}

impl Which {
    /// Does it to each run. One that fails is told, and the others are done all the same.
    async fn each(
        &self,
        global: &Global,
        done: &str,
        act: impl AsyncFn(&Client, RunId) -> Result<Value, Error>,
    ) -> Result<u8, Error> {
        let client = self.remote.client(global)?;
        let mut answers = Vec::new();
        let mut worst = 0;
        for run in &self.runs {
            match act(&client, *run).await {
                Ok(answer) => {
                    if self.output == Form::Text {
                        output::note(&format!("run {run} {done}"));
                    }
                    answers.push(if answer.is_null() { json!({ "id": run }) } else { answer });
                }
                Err(error) => {
                    output::error(&error);
                    worst = output::exit_code(error.code).max(worst);
                }
            }
        }
        if self.output == Form::Json {
            output::result(&format!("{:#}\n", Value::Array(answers)))?;
        }
        Ok(worst)
    }
}

const EXAMPLES_APPROVE: &str = "\
Examples:
  stagegate runs approve RUN review
  stagegate runs approve RUN review --attempt 2 --comment 'reads well'
  stagegate runs approve RUN review --edited @better.md

An edited output is checked like any other before it is taken.";

/// Take a held output: the run goes on.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES_APPROVE)]
pub(super) struct Approve {
    /// The run's id
    run: RunId,
    /// The held stage
    stage: StageId,
    /// The attempt that is meant; refused where another one is held
    #[arg(long, value_name = "NUMBER")]
    attempt: Option<u32>,
    /// Why, for the record
    #[arg(long, value_name = "TEXT")]
    comment: Option<String>,
    /// What is taken instead of the held output: @FILE, `-` for stdin, JSON or text
    #[arg(long, value_name = "OUTPUT")]
    edited: Option<String>,
    /// How it is shown
    #[arg(long, short, value_enum, default_value_t = Form::Text, value_name = "FORM")]
    output: Form,
    #[command(flatten)]
    remote: Remote,
}

impl Approve {
    pub(super) async fn run(self, global: &Global) -> Result<u8, Error> {
        let client = self.remote.client(global)?;
        let mut body = Map::new();
        add(&mut body, "attempt", self.attempt);
        add(&mut body, "comment", self.comment.as_deref());
        if let Some(edited) = &self.edited {
            let text = match edited.as_str() {
                "-" => files::read("-")?,
                given => given.strip_prefix('@').map_or_else(|| Ok(given.to_owned()), files::read)?,
            };
            body.insert("output".to_owned(), self.edited_as_asked(&client, text).await?);
        }
        let path = format!("/v1/runs/{}/stages/{}/approve", self.run, self.stage);
        let answer = client.post(&path, &Value::Object(body)).await?;
        tell(self.output, &answer, &format!("stage {} is approved; run {} goes on", self.stage, self.run))
    }
}

impl Approve {
    /// An edited output in the stage's own format: the text as it is, or the JSON that it holds.
    async fn edited_as_asked(&self, client: &Client, text: String) -> Result<Value, Error> {
        let run = show::read(client, self.run).await?;
        let name = run["pipeline"].as_str().unwrap_or_default();
        let version = client.get(&format!("/v1/pipelines/{name}/versions/{}", run["version"])).await?;
        let stages = version["definition"]["stages"].as_array().into_iter().flatten();
        let format = stages.filter(|stage| stage["id"] == self.stage.as_str()).map(|stage| &stage["output"]).next();
        if format.is_none_or(|format| format.is_null() || format == "text") {
            return Ok(Value::String(text));
        }
        serde_json::from_str(&text).map_err(|error| {
            Error::new(Code::InvalidParameter, format!("--edited: the stage's output is JSON: {error}"))
        })
    }
}

/// Do not take a held output: its stage fails.
///
/// A retry starts the stage over.
#[derive(Debug, clap::Args)]
pub(super) struct Reject {
    /// The run's id
    run: RunId,
    /// The held stage
    stage: StageId,
    /// Why, for the record and for whoever mends it
    #[arg(long, value_name = "TEXT")]
    reason: String,
    /// The attempt that is meant; refused where another one is held
    #[arg(long, value_name = "NUMBER")]
    attempt: Option<u32>,
    /// How it is shown
    #[arg(long, short, value_enum, default_value_t = Form::Text, value_name = "FORM")]
    output: Form,
    #[command(flatten)]
    remote: Remote,
}

impl Reject {
    pub(super) async fn run(self, global: &Global) -> Result<u8, Error> {
        if self.reason.trim().is_empty() {
            return Err(Error::new(Code::InvalidParameter, "--reason: say why, in a word at least"));
        }
        let mut body = Map::new();
        add(&mut body, "reason", Some(self.reason.as_str()));
        add(&mut body, "attempt", self.attempt);
        let path = format!("/v1/runs/{}/stages/{}/reject", self.run, self.stage);
        let answer = self.remote.client(global)?.post(&path, &Value::Object(body)).await?;
        tell(self.output, &answer, &format!("stage {} is rejected; run {} will fail", self.stage, self.run))
    }
}

fn add(body: &mut Map<String, Value>, key: &str, value: Option<impl Into<Value>>) {
    if let Some(value) = value {
        body.insert(key.to_owned(), value.into());
    }
}

fn tell(form: Form, answer: &Value, line: &str) -> Result<u8, Error> {
    match form {
        Form::Json => output::result(&format!("{answer:#}\n"))?,
        Form::Text => output::note(line),
    }
    Ok(0)
}
