//! Test support: throwaway servers, a fake provider, the contract suites of store and cache.

pub mod cache;
pub mod servers;
pub mod store;
