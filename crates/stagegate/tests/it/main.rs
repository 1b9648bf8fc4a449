//! Promises of the built binary, held against real processes, sockets and servers.

mod access;
mod commands;
mod crash;
mod demo;
mod examples;
mod inside;
mod replicas;
mod running;
mod serving;
mod support;
mod terminal;
