//! The core as its users see it.

mod pipeline;
