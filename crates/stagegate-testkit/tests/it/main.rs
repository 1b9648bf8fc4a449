//! The test support's own tests.

mod proxy;
mod servers;
mod storm;
