//! Runs: submit, list, read, follow, act.

pub(crate) mod actions;
pub(crate) mod delete;
pub(crate) mod events;
pub(crate) mod list;
pub(crate) mod read;
pub(crate) mod stage;
pub(crate) mod submit;

use stagegate_core::{Code, RunId};

use crate::problem::Problem;

/// Says that there is no such run.
pub(crate) fn not_found(id: RunId) -> Problem {
    Problem::new(Code::RunNotFound, format!("There is no run {id} for this tenant."))
}
