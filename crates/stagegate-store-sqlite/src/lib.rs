//! The SQLite store and cache tier.
