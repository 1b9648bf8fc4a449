//! The engine on a real store, with a provider at the other end of a real socket.

mod bench;
mod cache;
mod faults;
mod faulty;
mod follow;
mod gates;
mod runs;
mod stores;
mod takeover;
