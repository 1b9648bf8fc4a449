//! What Stagegate tells of itself: the metrics catalogue, logs, error reports.

pub mod metrics;

pub use metrics::Metrics;
