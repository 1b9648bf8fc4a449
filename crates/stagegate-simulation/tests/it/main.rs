//! The simulation's own tests: its store keeps the contract, its checks catch what is broken.

mod contract;
