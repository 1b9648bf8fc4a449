//! The hot statements, by name: what the tests of their plans explain.

pub use crate::{
    commit::COMMIT,
    lease::{CLAIM, HEARTBEAT, LOAD, OWNED},
    read::{EVENTS, RUN, RUN_RECORD, STAGE},
    submit::SUBMIT,
};
