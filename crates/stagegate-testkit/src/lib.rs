//! Test support: throwaway servers, a fake provider, the store's contract suite.

pub mod cache;
pub mod provider;

pub use provider::FakeProvider;
pub mod servers;
pub mod store;
