//! The test support's own tests.

mod servers;
