//! Throwaway Postgres and Redis servers from the machine's binaries. Owns their life: a server never outlives the
//! process that started it, even when that process is killed. Never touches a server that it did not start, but for
//! databases of its own making.
//!
//! A test takes [`TestDatabase::fresh`] or [`Redis::shared`]: they use the server that the environment names (so that
//! one `cargo xtask test` starts one of each), else one that is started for this process. A test that stops or freezes
//! a server takes a private one.

mod disk;
mod haproxy;
mod postgres;
mod program;
mod redis;
mod watchdog;

pub use disk::SmallDisk;
pub use haproxy::Haproxy;
pub use postgres::{Postgres, TestDatabase};
pub use program::Program;
pub use redis::Redis;
pub use watchdog::free_port;

/// Names a Postgres server on which tests may create databases.
pub const DATABASE_URL_ENV: &str = "STAGEGATE_TEST_DATABASE_URL";
/// Names a Redis server that tests may fill.
pub const REDIS_URL_ENV: &str = "STAGEGATE_TEST_REDIS_URL";
