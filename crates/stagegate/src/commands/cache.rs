//! `stagegate cache`: what is cached on a daemon, and how it is made stale.

use std::fmt::Write as _;

use serde_json::{Value, json};
use stagegate_core::{Error, ModelRef, PipelineName, StageId};

use super::remote::{Form, Remote};
use crate::{
    cli::Global,
    output::{self, grouped},
};

const EXAMPLES: &str = "\
Examples:
  stagegate cache stats
  stagegate cache invalidate pipeline brief-to-spec
  stagegate cache invalidate stage brief-to-spec design
  stagegate cache invalidate model openai/gpt-5-mini
  stagegate cache invalidate tenant --output json

What is made stale is stale on every replica within a second; it takes the role `admin`.";

/// Show what is cached on a daemon, and make it stale.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Cache {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Show how many answers are kept, and where
    Stats(How),
    /// Make answers stale
    Invalidate(Invalidate),
}

/// Which daemon, and how its answer is shown.
#[derive(Debug, clap::Args)]
struct How {
    /// How it is shown
    #[arg(long, short, value_enum, default_value_t = Form::Text, value_name = "FORM")]
    output: Form,
    #[command(flatten)]
    remote: Remote,
}

#[derive(Debug, clap::Args)]
struct Invalidate {
    #[command(subcommand)]
    scope: Scope,
}

#[derive(Debug, clap::Subcommand)]
enum Scope {
    /// Everything of the tenant
    Tenant(How),
    /// What a pipeline reads
    Pipeline {
        /// The pipeline's name
        pipeline: PipelineName,
        #[command(flatten)]
        how: How,
    },
    /// What one version of a pipeline reads
    Version {
        /// The pipeline's name
        pipeline: PipelineName,
        /// The version
        version: u32,
        #[command(flatten)]
        how: How,
    },
    /// What one stage of a pipeline reads
    Stage {
        /// The pipeline's name
        pipeline: PipelineName,
        /// The stage's id
        stage: StageId,
        #[command(flatten)]
        how: How,
    },
    /// What a model answered
    Model {
        /// The model: `openai/gpt-5-mini`
        model: ModelRef,
        #[command(flatten)]
        how: How,
    },
}

impl Cache {
    pub(crate) async fn run(self, global: &Global) -> Result<u8, Error> {
        let (how, answer, text) = match self.action {
            Action::Stats(how) => {
                let answer = how.remote.client(global)?.get("/v1/cache").await?;
                let text = stats(&answer);
                (how, answer, text)
            }
            Action::Invalidate(invalidate) => {
                let (how, body) = invalidate.scope.request();
                let answer = how.remote.client(global)?.post("/v1/cache/invalidate", &body).await?;
                let text = invalidated(&answer);
                (how, answer, text)
            }
        };
        output::result(&if how.output == Form::Json { format!("{answer:#}\n") } else { text })?;
        Ok(0)
    }
}

impl Scope {
    fn request(self) -> (How, Value) {
        match self {
            Self::Tenant(how) => (how, json!({ "scope": "tenant" })),
            Self::Pipeline { pipeline, how } => (how, json!({ "scope": "pipeline", "pipeline": pipeline })),
            Self::Version { pipeline, version, how } => {
                (how, json!({ "scope": "version", "pipeline": pipeline, "version": version }))
            }
            Self::Stage { pipeline, stage, how } => {
                (how, json!({ "scope": "stage", "pipeline": pipeline, "stage": stage }))
            }
            Self::Model { model, how } => (how, json!({ "scope": "model", "model": model })),
        }
    }
}

fn stats(answer: &Value) -> String {
    let mut text = String::new();
    for (name, tier) in [("this replica", &answer["local"]), ("shared", &answer["shared"])] {
        let kind = tier["kind"].as_str().map_or_else(String::new, |kind| format!(" ({kind})"));
        let what = match (tier.is_null(), tier["entries"].as_u64(), tier["bytes"].as_u64()) {
            (true, ..) => "none".to_owned(),
            (_, Some(entries), Some(bytes)) => format!("{} answers, {} bytes", grouped(entries), grouped(bytes)),
            _ => "in use; it is not counted".to_owned(),
        };
        let _ = writeln!(text, "{:<21}{what}", format!("{name}{kind}"));
    }
    text
}

fn invalidated(answer: &Value) -> String {
    let scope = answer["scope"].as_str().unwrap_or_default();
    match answer["entries"].as_u64() {
        Some(1) => format!("1 answer of the {scope} is stale\n"),
        Some(entries) => format!("{} answers of the {scope} are stale\n", grouped(entries)),
        None => format!("what the {scope} reads is stale; how many answers that are is not known\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_counted_is_told_as_that() {
        let answer =
            json!({ "local": { "entries": 1200, "bytes": 34_000 }, "shared": { "kind": "redis", "entries": null } });
        let text = stats(&answer);
        assert!(
            text.contains("1,200 answers, 34,000 bytes")
                && text.contains("shared (redis)")
                && text.contains("not counted"),
            "{text}"
        );
        assert!(stats(&json!({ "local": {}, "shared": null })).contains("none"));
        assert!(invalidated(&json!({ "scope": "tenant", "entries": 3 })).starts_with("3 answers of the tenant"));
        assert!(invalidated(&json!({ "scope": "stage", "entries": null })).contains("not known"));
    }
}
