//! Decisions, one promise a test.
