//! The hot statements, by name: what the tests of their plans explain.

pub use crate::{
    commit::COMMIT,
    lease::{CLAIM, HEARTBEAT, LOAD, OWNED},
    read::{EVENTS, RUN, RUN_RECORD, STAGE},
    submit::SUBMIT,
};

/// The statement of a list with these filters.
pub fn list(query: &stagegate_core::store::RunQuery) -> stagegate_core::StoreResult<String> {
    Ok(crate::read::list(query)?.sql().as_str().to_owned())
}
