//! `cargo xtask interop`: holds the built daemon to software that others wrote. Owns which software that is and what each
//! part must show; its versions are pinned in `.ci/requirements-interop*.txt` and `.ci/interop/package-lock.json`.

mod litellm;
mod parts;
mod proxies;
mod tools;

use std::{path::PathBuf, process::ExitCode};

use tokio::time::Instant;

use crate::{
    daemon::{self, Daemon},
    system::say,
};
use tools::Tools;

/// Hold the built daemon to clients, linters and proxies that others wrote
#[derive(Debug, clap::Args)]
#[command(after_help = "Parts:
  document     Redocly and Spectral find nothing in the OpenAPI document
  python       openapi-python-client generates a client without a warning, and it works
  typescript   openapi-typescript's types pass a strict compiler, and openapi-fetch works
  streams      httpx-sse, sseclient-py and node's eventsource follow a run, comments between its events
  haproxy      the API below a base path behind HAProxy, which leaves the path as it is
  nginx        the same behind nginx, which leaves the path or cuts it off
  litellm      runs over LiteLLM's proxy in three dialects: openai, anthropic, gemini

It needs python3 with venv, and the Python and npm registries the first time; node comes from the Python one. HAProxy and nginx \
are installed where that is possible (apt-get, as root).")]
pub(crate) struct Interop {
    /// Only these parts
    #[arg(value_name = "PART")]
    parts: Vec<Part>,
    /// Leave out what is large to install or says much the same: nginx and LiteLLM
    #[arg(long)]
    quick: bool,
    /// A binary to test, instead of building one
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

/// What is held to what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    Document,
    Python,
    Typescript,
    Streams,
    Haproxy,
    Nginx,
    Litellm,
}

impl Part {
    const QUICK: [Self; 5] = [Self::Document, Self::Python, Self::Typescript, Self::Streams, Self::Haproxy];
    const LARGE: [Self; 2] = [Self::Nginx, Self::Litellm];
}

impl Interop {
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        // Fails only where one is installed, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let chosen = match (self.parts.is_empty(), self.quick) {
            (false, _) => self.parts,
            (true, true) => Part::QUICK.to_vec(),
            (true, false) => [&Part::QUICK[..], &Part::LARGE].concat(),
        };
        let tools = Tools::install().await?;
        let binary = match self.binary {
            Some(binary) => std::path::absolute(binary)?,
            None => daemon::build("dev").await?,
        };
        let home = tempfile::tempdir()?;
        let bench = Bench { tools, binary, home };
        let mut failed = 0_u32;
        for part in chosen {
            let started = Instant::now();
            let outcome = bench.play(part).await;
            let took = started.elapsed().as_secs_f64();
            match outcome {
                Ok(()) => say(&format!("{part:?}: works ({took:.1} s)")),
                Err(error) => {
                    say(&format!("{part:?}: FAILED ({took:.1} s)\n{error:#}"));
                    failed += 1;
                }
            }
        }
        Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// What every part works with.
struct Bench {
    tools: Tools,
    binary: PathBuf,
    /// For what is generated.
    home: tempfile::TempDir,
}

impl Bench {
    async fn play(&self, part: Part) -> anyhow::Result<()> {
        match part {
            Part::Document => parts::document(self).await,
            Part::Python => parts::python(self).await,
            Part::Typescript => parts::typescript(self).await,
            Part::Streams => parts::streams(self).await,
            Part::Haproxy => proxies::haproxy(self).await,
            Part::Nginx => proxies::nginx(self).await,
            Part::Litellm => litellm::play(self).await,
        }
    }

    /// A daemon with the simulated models, comments in its streams each tenth of a second, and this environment. It is killed
    /// when it is dropped.
    async fn daemon(&self, environment: &[(&str, String)]) -> anyhow::Result<(Daemon, tempfile::TempDir)> {
        let data = tempfile::tempdir()?;
        let own = [
            ("STAGEGATE_LLM__PROVIDERS__SIM__KIND", "sim".to_owned()),
            ("STAGEGATE_LLM__PROVIDERS__SIM__SIM__LATENCY", "20ms".to_owned()),
            ("STAGEGATE_HTTP__SSE_KEEP_ALIVE", "100ms".to_owned()),
        ];
        let daemon = Daemon::start(&self.binary, data.path(), &[&own[..], environment].concat()).await?;
        Ok((daemon, data))
    }

    /// A folder for what a part makes.
    fn folder(&self, name: &str) -> anyhow::Result<PathBuf> {
        let folder = self.home.path().join(name);
        std::fs::create_dir_all(&folder)?;
        Ok(folder)
    }
}
