//! What Stagegate tells of itself: the metrics catalogue, logs, error reports.

pub mod config;
pub mod logs;
pub mod metrics;

mod line;
mod redact;
mod scope;
mod sentry;
pub mod text;

pub use logs::{Guard, init};
pub use metrics::Metrics;
