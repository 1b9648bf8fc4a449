//! The simulation's own tests: its store keeps the contract, a seed decides everything, what is broken is caught.

mod contract;
mod flaws;
mod seeds;
