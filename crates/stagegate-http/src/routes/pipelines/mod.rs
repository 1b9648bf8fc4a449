//! Pipelines: definitions and their versions.

pub(crate) mod list;
pub(crate) mod read;
pub(crate) mod register;
pub(crate) mod schema;
pub(crate) mod validate;
pub(crate) mod version;
pub(crate) mod versions;
