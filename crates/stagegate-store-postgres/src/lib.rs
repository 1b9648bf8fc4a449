//! The Postgres store: owns every statement that runs on it. Implements [`stagegate_core::Store`].

pub mod config;
