//! Test support: throwaway servers, a fake provider, faults on the network, the contract suites of the store and of the
//! cache tier.

pub mod audit;
pub mod cache;
mod listen;
pub mod provider;
pub mod proxy;
pub mod servers;
pub mod store;
pub mod storm;
pub mod tls;

pub use provider::FakeProvider;
