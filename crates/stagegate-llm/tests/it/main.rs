//! The model layer against real sockets.

mod bench;
mod breaker;
mod cache;
mod ends;
mod hint;
mod llm;
mod providers;
mod purse;
