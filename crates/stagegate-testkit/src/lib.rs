//! Test support: throwaway servers, a fake provider, the store's contract suite.

pub mod servers;
pub mod store;
