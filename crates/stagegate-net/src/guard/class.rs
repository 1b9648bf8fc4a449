//! What an IP address is for: owns the classes (RFC 6890, IANA's special-purpose registries, and the metadata services of
//! clouds). Whatever is not known to be public is not.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// What an address leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// A server of the internet.
    Public,
    /// "This host" (`0.0.0.0`, `::`), which reaches the machine itself.
    Unspecified,
    /// The machine itself.
    Loopback,
    /// A private network (RFC 1918).
    Private,
    /// The inside of a provider's network (RFC 6598), and that of some clouds.
    SharedNat,
    /// The same link.
    LinkLocal,
    /// A cloud's metadata service, which hands out credentials.
    Metadata,
    /// A private network of IPv6 (RFC 4193).
    UniqueLocal,
    /// Many hosts at once.
    Multicast,
    /// All hosts of a link.
    Broadcast,
    /// Nothing: addresses for examples.
    Documentation,
    /// Nothing: addresses for measurements.
    Benchmarking,
    /// Protocols' own addresses, tunnels, and what is not given out.
    Reserved,
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Public => "a public address",
            Self::Unspecified => "an unspecified address",
            Self::Loopback => "a loopback address",
            Self::Private | Self::UniqueLocal => "a private network",
            Self::SharedNat => "a shared address space",
            Self::LinkLocal => "a link-local address",
            Self::Metadata => "a cloud's metadata service",
            Self::Multicast => "a multicast address",
            Self::Broadcast => "a broadcast address",
            Self::Documentation => "an address for examples",
            Self::Benchmarking => "an address for measurements",
            Self::Reserved => "a reserved address",
        })
    }
}

/// Networks of IPv4 that are not public. The first one that holds an address tells its class.
const V4: [(Ipv4Addr, u32, Class); 20] = [
    (Ipv4Addr::new(169, 254, 169, 254), 32, Class::Metadata),
    // AWS' container credentials, and Azure's wire server, which is a public address by number.
    (Ipv4Addr::new(169, 254, 170, 2), 32, Class::Metadata),
    (Ipv4Addr::new(168, 63, 129, 16), 32, Class::Metadata),
    (Ipv4Addr::new(100, 100, 100, 200), 32, Class::Metadata),
    (Ipv4Addr::BROADCAST, 32, Class::Broadcast),
    (Ipv4Addr::UNSPECIFIED, 8, Class::Unspecified),
    (Ipv4Addr::new(10, 0, 0, 0), 8, Class::Private),
    (Ipv4Addr::new(100, 64, 0, 0), 10, Class::SharedNat),
    (Ipv4Addr::new(127, 0, 0, 0), 8, Class::Loopback),
    (Ipv4Addr::new(169, 254, 0, 0), 16, Class::LinkLocal),
    (Ipv4Addr::new(172, 16, 0, 0), 12, Class::Private),
    (Ipv4Addr::new(192, 0, 0, 0), 24, Class::Reserved),
    (Ipv4Addr::new(192, 0, 2, 0), 24, Class::Documentation),
    (Ipv4Addr::new(192, 88, 99, 0), 24, Class::Reserved),
    (Ipv4Addr::new(192, 168, 0, 0), 16, Class::Private),
    (Ipv4Addr::new(198, 18, 0, 0), 15, Class::Benchmarking),
    (Ipv4Addr::new(198, 51, 100, 0), 24, Class::Documentation),
    (Ipv4Addr::new(203, 0, 113, 0), 24, Class::Documentation),
    (Ipv4Addr::new(224, 0, 0, 0), 4, Class::Multicast),
    (Ipv4Addr::new(240, 0, 0, 0), 4, Class::Reserved),
];

/// The same of IPv6. What is outside of `2000::/3` and not here is reserved.
const V6: [(Ipv6Addr, u32, Class); 10] = [
    (Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254), 128, Class::Metadata),
    (Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254), 128, Class::Metadata),
    (Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0), 7, Class::UniqueLocal),
    (Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10, Class::LinkLocal),
    (Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8, Class::Multicast),
    (Ipv6Addr::new(0x2001, 0x2, 0, 0, 0, 0, 0, 0), 48, Class::Benchmarking),
    (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32, Class::Documentation),
    (Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0), 20, Class::Documentation),
    // Teredo and other protocols; then 6to4, whose addresses hold another one that a relay would be asked for.
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 23, Class::Reserved),
    (Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16, Class::Reserved),
];

impl Class {
    /// Of an address.
    pub fn of(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => Self::of_v4(ip),
            IpAddr::V6(ip) => Self::of_v6(ip),
        }
    }

    fn of_v4(ip: Ipv4Addr) -> Self {
        let is_in = |base: Ipv4Addr, length: u32| (ip.to_bits() ^ base.to_bits()).leading_zeros() >= length;
        V4.iter().find(|(base, length, _)| is_in(*base, *length)).map_or(Self::Public, |(_, _, class)| *class)
    }

    fn of_v6(ip: Ipv6Addr) -> Self {
        if let Some(inner) = ip.to_ipv4_mapped() {
            return Self::of_v4(inner);
        }
        match ip.segments() {
            [0, 0, 0, 0, 0, 0, 0, 0] => return Self::Unspecified,
            [0, 0, 0, 0, 0, 0, 0, 1] => return Self::Loopback,
            // NAT64: the only way to servers of IPv4 from a network without it.
            [0x64, 0xff9b, 0, 0, 0, 0, high, low] => {
                return Self::of_v4(Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)));
            }
            _ => {}
        }
        let is_in = |base: Ipv6Addr, length: u32| (ip.to_bits() ^ base.to_bits()).leading_zeros() >= length;
        let known = V6.iter().find(|(base, length, _)| is_in(*base, *length)).map(|(_, _, class)| *class);
        let is_given_out = ip.segments()[0] >> 13 == 1;
        known.unwrap_or(if is_given_out { Self::Public } else { Self::Reserved })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the standard library says of an address; it knows most classes, and was written by others.
    fn is_special(ip: Ipv4Addr) -> bool {
        ip.is_unspecified()
            || ip.is_loopback()
            || ip.is_private()
            || ip.is_link_local()
            || ip.is_multicast()
            || ip.is_broadcast()
            || ip.is_documentation()
    }

    fn is_special_v6(ip: Ipv6Addr) -> bool {
        ip.is_unspecified()
            || ip.is_loopback()
            || ip.is_multicast()
            || ip.is_unique_local()
            || ip.is_unicast_link_local()
            || ip.to_ipv4_mapped().is_some_and(is_special)
    }

    /// Any address, and often one at the edge of a network that has a class.
    fn v4() -> impl Strategy<Value = Ipv4Addr> {
        let edge = (0..V4.len(), any::<bool>(), -2_i64..=2).prop_map(|(index, is_last, offset)| {
            let (base, length, _) = V4[index];
            let size = 1_u64 << (32 - length);
            let at = i64::from(base.to_bits()) + if is_last { size.cast_signed() - 1 } else { 0 } + offset;
            Ipv4Addr::from_bits(u32::try_from(at.clamp(0, i64::from(u32::MAX))).expect("clamped"))
        });
        prop_oneof![any::<u32>().prop_map(Ipv4Addr::from_bits), edge]
    }

    fn v6() -> impl Strategy<Value = Ipv6Addr> {
        let near = (0..V6.len(), any::<u128>(), 0_u32..128).prop_map(|(index, noise, keep)| {
            Ipv6Addr::from_bits(V6[index].0.to_bits() ^ noise.checked_shr(keep).unwrap_or(0))
        });
        let global = any::<u128>().prop_map(|bits| Ipv6Addr::from_bits(bits >> 3 | 1 << 125));
        prop_oneof![any::<u128>().prop_map(Ipv6Addr::from_bits), near, global]
    }

    proptest! {
        #[test]
        fn no_special_address_is_public(ip in v4(), six in v6()) {
            prop_assert!(!(is_special(ip) && Class::of(ip.into()) == Class::Public), "{ip}");
            prop_assert!(!(is_special_v6(six) && Class::of(six.into()) == Class::Public), "{six}");
        }

        #[test]
        fn an_address_is_public_exactly_outside_of_the_networks_that_are_not(ip in v4()) {
            let is_inside = V4.iter().any(|(base, length, _)| {
                let length = u8::try_from(*length).expect("at most 32");
                ipnet::Ipv4Net::new(*base, length).expect("a network").contains(&ip)
            });
            prop_assert_eq!(Class::of(ip.into()) == Class::Public, !is_inside);
        }

        #[test]
        fn an_address_of_ipv4_inside_of_ipv6_has_its_own_class(ip in v4()) {
            let class = Class::of(ip.into());
            prop_assert_eq!(Class::of(ip.to_ipv6_mapped().into()), class);
            let [a, b, c, d] = ip.octets().map(u16::from);
            let nat64 = Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, a << 8 | b, c << 8 | d);
            prop_assert_eq!(Class::of(nat64.into()), class);
            for tunnel in [
                ip.to_ipv6_compatible(),
                Ipv6Addr::new(0x2002, a << 8 | b, c << 8 | d, 0, 0, 0, 0, 1),
                Ipv6Addr::new(0x2001, 0, a << 8 | b, c << 8 | d, 0, 0, 0, 0),
                Ipv6Addr::new(0x64, 0xff9b, 1, 0, 0, 0, a << 8 | b, c << 8 | d),
            ] {
                prop_assert_ne!(Class::of(tunnel.into()), Class::Public, "{}", tunnel);
            }
        }

        #[test]
        fn only_addresses_that_are_given_out_are_public(ip in v6()) {
            if Class::of(ip.into()) == Class::Public && ip.to_ipv4_mapped().is_none() {
                let first = ip.segments()[0];
                prop_assert!((0x2000..0x4000).contains(&first) || first == 0x64, "{}", ip);
            }
        }
    }

    #[test]
    fn well_known_addresses_have_their_class() {
        for (text, class) in [
            ("8.8.8.8", Class::Public),
            ("100.63.255.255", Class::Public),
            ("100.64.0.1", Class::SharedNat),
            ("172.15.255.255", Class::Public),
            ("172.31.255.255", Class::Private),
            ("172.32.0.0", Class::Public),
            ("255.255.255.255", Class::Broadcast),
            ("239.1.2.3", Class::Multicast),
            ("198.19.0.1", Class::Benchmarking),
            ("192.0.0.192", Class::Reserved),
            ("2606:4700::1111", Class::Public),
            ("64:ff9b::8.8.8.8", Class::Public),
            ("64:ff9b::10.0.0.1", Class::Private),
            ("fd00:ec2::254", Class::Metadata),
            ("fd12::1", Class::UniqueLocal),
            ("fe80::1", Class::LinkLocal),
            ("fec0::1", Class::Reserved),
            ("ff02::1", Class::Multicast),
            ("::127.0.0.1", Class::Reserved),
            ("2001:db8::1", Class::Documentation),
            ("2001::1", Class::Reserved),
            ("5f00::1", Class::Reserved),
            ("100::1", Class::Reserved),
        ] {
            assert_eq!(Class::of(text.parse().expect("an address")), class, "{text}");
        }
    }
}
