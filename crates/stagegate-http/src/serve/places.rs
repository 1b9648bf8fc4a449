//! Places for connections: owns how many there are, how many one peer may hold, and the reserved ones for probes.
//!
//! A connection that finds no ordinary place gets a reserved one. The server answers its probe, or refuses any other
//! request with 503, and closes it. When all reserved places are taken, the newest connection takes the oldest place, so
//! that a probe, which needs a few milliseconds, always gets its answer.

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use tokio_util::sync::CancellationToken;

/// Places beyond the limit, for probes.
pub(crate) const RESERVED: usize = 64;

/// A peer: an IPv4 address, or the /64 network of an IPv6 address, which is what one customer of a provider gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Peer(IpAddr);

impl Peer {
    pub(crate) fn of(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            IpAddr::V6(address) => {
                let [a, b, c, d, ..] = address.segments();
                IpAddr::from([a, b, c, d, 0, 0, 0, 0])
            }
            v4 @ IpAddr::V4(_) => v4,
        })
    }
}

/// All places.
#[derive(Debug)]
pub(crate) struct Places {
    max: usize,
    max_per_peer: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    ordinary: usize,
    by_peer: HashMap<Peer, usize>,
    /// The oldest first.
    reserved: VecDeque<(u64, CancellationToken)>,
    next: u64,
}

/// A place; given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    places: Arc<Places>,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Ordinary(Peer),
    Reserved(u64, CancellationToken),
}

impl Places {
    pub(crate) fn new(max: usize, max_per_peer: usize) -> Arc<Self> {
        Arc::new(Self { max: max.max(1), max_per_peer: max_per_peer.max(1), taken: Mutex::default() })
    }

    fn taken(&self) -> std::sync::MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a connection of this peer.
    pub(crate) fn take(self: &Arc<Self>, peer: Peer) -> Place {
        let mut taken = self.taken();
        let of_peer = taken.by_peer.get(&peer).copied().unwrap_or(0);
        let kind = if taken.ordinary < self.max && of_peer < self.max_per_peer {
            taken.ordinary += 1;
            taken.by_peer.insert(peer, of_peer + 1);
            Kind::Ordinary(peer)
        } else {
            if taken.reserved.len() >= RESERVED
                && let Some((_, oldest)) = taken.reserved.pop_front()
            {
                oldest.cancel();
            }
            taken.next += 1;
            let (id, gives_way) = (taken.next, CancellationToken::new());
            taken.reserved.push_back((id, gives_way.clone()));
            Kind::Reserved(id, gives_way)
        };
        Place { places: Arc::clone(self), kind }
    }
}

impl Place {
    /// Whether it answers probes alone.
    pub(crate) fn is_reserved(&self) -> bool {
        matches!(self.kind, Kind::Reserved(..))
    }

    /// Resolves when another takes this place.
    pub(crate) async fn given_away(&self) {
        match &self.kind {
            Kind::Ordinary(_) => std::future::pending().await,
            Kind::Reserved(_, gives_way) => gives_way.cancelled().await,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken();
        match &self.kind {
            Kind::Ordinary(peer) => {
                taken.ordinary -= 1;
                if let Some(of_peer) = taken.by_peer.get_mut(peer) {
                    *of_peer -= 1;
                    if *of_peer == 0 {
                        taken.by_peer.remove(peer);
                    }
                }
            }
            Kind::Reserved(id, _) => taken.reserved.retain(|(other, _)| other != id),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(text: &str) -> Peer {
        Peer::of(text.parse().expect("an address"))
    }

    #[test]
    fn a_peer_has_no_more_ordinary_places_than_its_limit_and_gets_them_back() {
        let places = Places::new(3, 2);
        let held = [places.take(peer("10.0.0.1")), places.take(peer("::ffff:10.0.0.1"))];
        assert!(held.iter().all(|place| !place.is_reserved()));
        assert!(places.take(peer("10.0.0.1")).is_reserved(), "it has two");
        let other = places.take(peer("10.0.0.2"));
        assert!(!other.is_reserved());
        assert!(places.take(peer("10.0.0.3")).is_reserved(), "three are taken");
        drop(held);
        assert!(!places.take(peer("10.0.0.1")).is_reserved());
        drop(other);
        assert!(places.taken().by_peer.is_empty() && places.taken().reserved.is_empty());
    }

    #[test]
    fn the_oldest_reserved_place_gives_way() {
        let places = Places::new(1, 1);
        let _ordinary = places.take(peer("10.0.0.1"));
        let reserved: Vec<Place> = (0..RESERVED).map(|_| places.take(peer("10.0.0.1"))).collect();
        let given_away = |place: &Place| matches!(&place.kind, Kind::Reserved(_, token) if token.is_cancelled());
        assert!(!reserved.iter().any(given_away));
        let _newest = places.take(peer("10.0.0.1"));
        assert_eq!(reserved.iter().map(given_away).filter(|given| *given).count(), 1);
        assert!(given_away(&reserved[0]));
    }

    #[test]
    fn addresses_of_one_ipv6_network_are_one_peer() {
        assert_eq!(peer("2001:db8:1:2::1"), peer("2001:db8:1:2:ffff::9"));
        assert_ne!(peer("2001:db8:1:2::1"), peer("2001:db8:1:3::1"));
    }
}
