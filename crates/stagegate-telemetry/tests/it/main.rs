//! Telemetry seen from outside: a process that logs and reports, and what arrives at its stderr and at a socket.

mod child;
mod logs;
mod metrics;
mod sentry;
