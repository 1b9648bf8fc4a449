//! `stagegate runs`: the runs of a daemon. A client of its HTTP API as any other program could be one; each action is
//! one file here.

mod act;
pub(crate) mod list;
mod show;
mod submit;
mod watch;

use stagegate_core::Error;

use super::remote::Remote;
use crate::cli::Global;

const EXAMPLES: &str = "\
Examples:
  stagegate runs submit brief-to-spec --input @brief.md --watch
  stagegate runs list --state waiting,failed
  stagegate runs get RUN
  stagegate runs watch RUN                    live, to its end
  stagegate runs approve RUN review --comment 'reads well'
  stagegate runs list --output json | jq -r '.[].id'
  stagegate runs list --server https://stagegate.example --api-key-file key

The daemon is the one that --server or STAGEGATE_SERVER names, else the one on this machine. A daemon that asks for \
keys is opened by STAGEGATE_API_KEY or --api-key-file. A key is never an argument.

Exit codes: 0 fine, 1 failed or not reached, 2 a mistake in what was given or asked. `watch`, and `submit --watch`, end \
as the run does: 0 succeeded, 1 failed, 3 cancelled, 4 held and --until-held, 5 expired.";

/// List, watch, submit and decide runs on a daemon.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Runs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// List runs, the newest first
    List(list::List),
    /// Show a run: its stages, what it took, its output
    Get(show::Get),
    /// Follow a run to its end
    Watch(watch::Watch),
    /// Submit a run of a registered pipeline
    Submit(submit::Submit),
    /// Stop runs
    Cancel(act::Cancel),
    /// Start over what failed; checkpoints are kept
    Retry(act::Retry),
    /// Take a held output: the run goes on
    Approve(act::Approve),
    /// Do not take a held output: its stage fails
    Reject(act::Reject),
    /// Remove runs that have ended, whole
    Delete(act::Delete),
}

impl Runs {
    pub(crate) async fn run(self, global: &Global) -> Result<u8, Error> {
        match self.action {
            Action::List(action) => action.run(global).await,
            Action::Get(action) => action.run(global).await,
            Action::Watch(action) => action.run(global).await,
            Action::Submit(action) => action.run(global).await,
            Action::Cancel(action) => action.run(global).await,
            Action::Retry(action) => action.run(global).await,
            Action::Approve(action) => action.run(global).await,
            Action::Reject(action) => action.run(global).await,
            Action::Delete(action) => action.run(global).await,
        }
    }
}
