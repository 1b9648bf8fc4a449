//! The SQLite store and cache tier, against real files.

mod cache;
mod contract;
mod corrupt;
mod crash;
mod file;
mod full;
mod migrations;
mod support;
mod twins;
