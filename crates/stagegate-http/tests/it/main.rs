//! The API over a real socket: a real store, a real engine, the simulated model.

mod access;
mod app;
mod bad_input;
mod clients;
mod conformance;
mod connections;
mod decisions;
mod examples;
mod openapi;
mod pipelines;
mod probes;
mod runs;
mod stalling;
mod streams;
mod weight;
