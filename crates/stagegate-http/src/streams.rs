//! Places for event streams: owns how many there are, and how many of them may come from one peer.
//!
//! Over HTTP/1.1 a stream is a connection, and behind a proxy all tenants are one peer. If streams could take every
//! connection that a peer may have, another tenant of the same peer would find none on which to ask for its share.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use stagegate_core::TenantId;
use tokio_util::sync::CancellationToken;

use crate::{
    fair::{FairLimit, Full, Permit},
    serve::Peer,
};

/// All places.
#[derive(Debug)]
pub(crate) struct Streams {
    all: Arc<FairLimit>,
    max_per_peer: usize,
    /// Of the peers that have streams.
    of_peers: Mutex<HashMap<Peer, Weak<FairLimit>>>,
}

/// A place; given back when it is dropped.
#[derive(Debug)]
pub(crate) struct StreamPlace {
    streams: Arc<Streams>,
    peer: Option<Peer>,
    of_peer: Option<Permit>,
    of_all: Option<Permit>,
}

impl Streams {
    pub(crate) fn new(max: usize, max_per_peer: usize) -> Arc<Self> {
        Arc::new(Self { all: FairLimit::new(max, 0), max_per_peer, of_peers: Mutex::default() })
    }

    /// A place for a stream, whose holder is told to give way by `gives_way`: see [`FairLimit::take_over`].
    pub(crate) fn take(
        self: &Arc<Self>,
        peer: Option<Peer>,
        tenant: &TenantId,
        gives_way: &CancellationToken,
    ) -> Result<StreamPlace, Full> {
        let mut place = StreamPlace { streams: Arc::clone(self), peer, of_peer: None, of_all: None };
        place.of_peer = peer.map(|peer| self.of_peer(peer).take_over(tenant, gives_way)).transpose()?;
        place.of_all = Some(self.all.take_over(tenant, gives_way)?);
        Ok(place)
    }

    fn of_peer(&self, peer: Peer) -> Arc<FairLimit> {
        let mut of_peers = self.of_peers();
        let known = of_peers.get(&peer).and_then(Weak::upgrade);
        known.unwrap_or_else(|| {
            let limit = FairLimit::new(self.max_per_peer, 0);
            of_peers.insert(peer, Arc::downgrade(&limit));
            limit
        })
    }

    fn of_peers(&self) -> std::sync::MutexGuard<'_, HashMap<Peer, Weak<FairLimit>>> {
        self.of_peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for StreamPlace {
    fn drop(&mut self) {
        let Some(peer) = self.peer else { return };
        drop(self.of_peer.take());
        let mut of_peers = self.streams.of_peers();
        if of_peers.get(&peer).is_some_and(|limit| limit.strong_count() == 0) {
            of_peers.remove(&peer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_that_has_every_stream_of_a_peer_gives_way_to_another_of_it_and_other_peers_are_not_asked() {
        let streams = Streams::new(100, 4);
        let peer = |last| Some(Peer::of([10, 0, 0, last].into()));
        let [a, b] = ["a", "b"].map(|name| TenantId::new(name).expect("valid"));
        let mut held = Vec::new();
        let mut take = |from, tenant: &TenantId| {
            let token = CancellationToken::new();
            held.push(streams.take(from, tenant, &token)?);
            Ok::<_, Full>(token)
        };
        let elsewhere = take(peer(2), &a).expect("alone");
        let theirs: Vec<_> = (0..4).map(|_| take(peer(1), &a).expect("alone")).collect();
        take(peer(1), &a).expect_err("all of this peer");
        take(peer(1), &b).expect("a quarter of them");
        assert!(theirs[3].is_cancelled() && !theirs[2].is_cancelled() && !elsewhere.is_cancelled());
        take(peer(1), &b).expect_err("no more than that");
        take(peer(2), &b).expect("there is room behind another");
        drop(held);
        assert!(streams.of_peers().is_empty(), "nothing is kept of peers without streams");
    }
}
