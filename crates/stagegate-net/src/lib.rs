//! The one way out: owns how this process reaches other servers (proxies, certificates, time-outs, HTTP/2) and how much
//! of their answers it reads. It knows no vendor, no run and no tenant, and never decides what an answer means.
//!
//! There are two kinds of addresses, and the types keep them apart. A [`Trusted`] one was written by the operator and is
//! reached wherever it leads: a model on loopback is a provider like any other. A [`Guarded`] one was written by a caller
//! and only reaches public servers; [`guard`] has the rules. No redirect is followed to either: a key goes only where it
//! was meant to go.

mod address;
mod body;
mod client;
pub mod config;
pub mod guard;
mod proxy;
mod roots;

pub use self::{
    address::{BadAddress, Trusted},
    client::{Answer, Bounds, Client, Failure, Outgoing, Stage},
    config::NetConfig,
    guard::{Guard, Guarded, GuardedClient, Refused},
    roots::install_tls,
};
