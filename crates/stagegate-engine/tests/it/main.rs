//! The engine on a real store, with a provider at the other end of a real socket.

mod bench;
mod cache;
mod crashes;
mod evaluation;
mod faults;
mod faulty;
mod follow;
mod gates;
mod loops;
mod memory;
mod money;
mod order;
mod runs;
mod stand;
mod stores;
mod stuck;
mod takeover;
mod vital;
mod waits;
