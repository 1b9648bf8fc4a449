//! What Stagegate tells of itself: the metrics catalogue, logs, error reports.

pub mod config;
pub mod metrics;

pub use metrics::Metrics;
