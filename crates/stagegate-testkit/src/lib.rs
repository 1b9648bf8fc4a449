//! Test support: throwaway servers, a fake provider, the contract suites of the store and of the cache tier.

pub mod cache;
pub mod provider;
pub mod servers;
pub mod store;

pub use provider::FakeProvider;
