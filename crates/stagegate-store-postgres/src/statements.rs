//! The hot statements, by name, and the settings under which they run: what the tests of their plans explain.

pub use crate::{
    commit::statements::{COMMIT, COMMIT_PLAIN, COMMIT_PLAIN_END},
    gauges::{BACKLOG_OF, DEPTHS, QUEUE, REPLICAS_OF},
    keys::LIST_OF as KEYS_OF,
    lease::{CLAIM, HEARTBEAT, LOAD, OWNED, PUT_BACK, WEIGH},
    pipelines::{LIST as PIPELINES, VERSIONS},
    pool::SESSION,
    read::{EVENTS, NEWS, RUN, RUN_RECORD, STAGE},
    retention::KEPT,
    signal::READ as SIGNALS,
    submit::SUBMIT,
};

/// The statement of a list with these filters.
pub fn list(query: &stagegate_core::store::RunQuery) -> stagegate_core::StoreResult<String> {
    Ok(crate::read::list(query)?.sql().as_str().to_owned())
}
