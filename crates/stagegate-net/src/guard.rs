//! Addresses that callers wrote: owns which ones are reached. It never trusts a name: what a name resolves to is judged
//! where the connection is made, and the connection goes to the very address that was judged.

mod class;

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use futures::future::BoxFuture;
use ipnet::IpNet;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

pub use self::class::Class;
use crate::{
    address::{BadAddress, http_url},
    client::{Answer, Client, Failure, Lane, Outgoing, Setup},
};

/// The longest address of a caller, in bytes.
pub const GUARDED_MAX_BYTES: usize = 2_048;

/// What callers may name.
#[derive(Debug, Clone, Default)]
pub struct Guard {
    /// Whether `http` is taken beside `https`.
    pub allow_http: bool,
    /// Networks that are not public and may be reached all the same.
    pub allowed: Vec<IpNet>,
    /// What a proxy is for such an address. By default there is none before it: a proxy resolves names itself, and may
    /// stand where private addresses can be reached.
    pub proxy: GuardedProxy,
}

/// What the configured proxies are for addresses that callers wrote.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum GuardedProxy {
    /// They are not used.
    #[default]
    Never,
    /// They are used, since they judge addresses themselves. What is no name is judged here all the same.
    Judges,
}

/// Why an address of a caller is not reached. Says nothing of what a name resolves to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is longer than [`GUARDED_MAX_BYTES`].
    #[error("the address is longer than {max} bytes", max = GUARDED_MAX_BYTES)]
    TooLong,
    /// It cannot be an address of a server.
    #[error("the address cannot be used: {0}")]
    Bad(#[from] BadAddress),
    /// It is in the clear.
    #[error("the address must begin with https://")]
    InTheClear,
    /// The host is an IP address that is not public.
    #[error("the address leads to {0}, not to a public server")]
    NotPublic(Class),
    /// It resolves to something that is not public.
    #[error("the name of the server does not lead to a public address")]
    ResolvesElsewhere,
}

impl Guard {
    /// Reads what a caller wrote.
    pub fn read(&self, text: &str) -> Result<Guarded, Refused> {
        if text.len() > GUARDED_MAX_BYTES {
            return Err(Refused::TooLong);
        }
        let url = http_url(text)?;
        self.judge_url(&url)?;
        Ok(Guarded(url))
    }

    /// Odd forms (`0x7f.1`, `2130706433`, full-width digits) are plain addresses once a URL is parsed.
    fn judge_url(&self, url: &Url) -> Result<(), Refused> {
        if url.scheme() != "https" && !self.allow_http {
            return Err(Refused::InTheClear);
        }
        match url.host() {
            Some(Host::Ipv4(ip)) => self.judge(IpAddr::V4(ip)).map_err(Refused::NotPublic),
            Some(Host::Ipv6(ip)) => self.judge(IpAddr::V6(ip)).map_err(Refused::NotPublic),
            Some(Host::Domain(_)) | None => Ok(()),
        }
    }

    fn judge(&self, ip: IpAddr) -> Result<(), Class> {
        let class = Class::of(ip);
        // A metadata service hands out credentials: it is allowed by its very address, never with its network.
        let is_enough = |network: &IpNet| class != Class::Metadata || network.prefix_len() == network.max_prefix_len();
        let is_allowed = |ip: IpAddr| self.allowed.iter().any(|network| network.contains(&ip) && is_enough(network));
        if class == Class::Public || is_allowed(ip) || is_allowed(ip.to_canonical()) { Ok(()) } else { Err(class) }
    }
}

/// An address that a caller wrote, and that may be reached as far as it tells by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guarded(Url);

impl Guarded {
    /// The address.
    pub fn url(&self) -> &Url {
        &self.0
    }
}

/// The client for addresses that callers wrote.
#[derive(Debug)]
pub struct GuardedClient {
    guard: Guard,
    setup: Arc<Setup>,
    /// Without proxies; names are judged.
    direct: Lane,
    /// Over the proxies, where they judge. Nothing but the proxies' own names is resolved for it.
    proxied: Option<Lane>,
}

impl GuardedClient {
    pub(crate) fn new(client: &Client, guard: Guard, lookup: Lookup) -> Result<Self, stagegate_core::Error> {
        let setup = client.setup();
        let direct = setup.judging_lane(Arc::new(Checked { guard: guard.clone(), lookup }))?;
        let proxied = match guard.proxy {
            GuardedProxy::Never => None,
            GuardedProxy::Judges => Some(setup.lane()?),
        };
        Ok(Self { guard, setup, direct, proxied })
    }

    /// Reads what a caller wrote.
    pub fn address(&self, text: &str) -> Result<Guarded, Refused> {
        self.guard.read(text)
    }

    /// Sends a request, and reads the answer within its bounds.
    pub async fn send(&self, to: Guarded, request: Outgoing<'_>) -> Result<Answer, Failure> {
        // It may have been read under the rules of another client.
        self.guard.judge_url(&to.0).map_err(Failure::refused)?;
        match &self.proxied {
            Some(proxied) if self.setup.has_proxy_before(&to.0) => proxied.send(to.0, request, Some(&self.setup)).await,
            _ => self.direct.send(to.0, request, None).await,
        }
    }
}

/// How names are resolved: by the system, but in tests.
pub type Lookup = Arc<dyn Fn(String) -> BoxFuture<'static, io::Result<Vec<IpAddr>>> + Send + Sync>;

/// The system's resolver.
pub(crate) fn system_lookup() -> Lookup {
    Arc::new(|name| {
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            Ok(found.map(|address| address.ip()).collect())
        })
    })
}

/// Resolves names to addresses that were judged. The connection is made to these, so that a name that changes its mind in
/// between changes nothing.
struct Checked {
    guard: Guard,
    lookup: Lookup,
}

impl fmt::Debug for Checked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checked").field("guard", &self.guard).finish_non_exhaustive()
    }
}

impl Resolve for Checked {
    fn resolve(&self, name: Name) -> Resolving {
        let found = (self.lookup)(name.as_str().to_owned());
        let guard = self.guard.clone();
        Box::pin(async move {
            let found = found.await?;
            // One address that is not public makes the name suspicious: none of them is used.
            if found.iter().any(|ip| guard.judge(*ip).is_err()) {
                return Err(Refused::ResolvesElsewhere.into());
            }
            let addresses: Addrs = Box::new(found.into_iter().map(|ip| SocketAddr::new(ip, 0)));
            Ok(addresses)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(guard: &Guard, text: &str) -> Refused {
        guard.read(text).expect_err(text)
    }

    #[test]
    fn a_callers_address_is_public_and_encrypted_unless_the_rules_say_otherwise() {
        let strict = Guard::default();
        assert_eq!(refused(&strict, "http://example.com/hook"), Refused::InTheClear);
        assert_eq!(refused(&strict, "https://u:p@example.com"), Refused::Bad(BadAddress::Credentials));
        assert_eq!(refused(&strict, &format!("https://example.com/{}", "x".repeat(3_000))), Refused::TooLong);
        assert!(matches!(refused(&strict, "file:///etc/passwd"), Refused::Bad(BadAddress::NotHttp { .. })));
        assert!(matches!(refused(&strict, "gopher://example.com"), Refused::Bad(BadAddress::NotHttp { .. })));
        assert!(strict.read("https://example.com/hook?id=1").is_ok());
        let lenient = Guard { allow_http: true, allowed: vec!["10.1.0.0/16".parse().expect("a network")], ..strict };
        assert!(lenient.read("http://example.com").is_ok());
        assert!(lenient.read("http://10.1.2.3:8080/hook").is_ok());
        assert!(lenient.read("http://[::ffff:10.1.2.3]/hook").is_ok());
        assert_eq!(refused(&lenient, "http://10.2.0.1"), Refused::NotPublic(Class::Private));
    }

    #[test]
    fn odd_forms_of_an_address_are_that_address() {
        let guard = Guard { allow_http: true, ..Guard::default() };
        for host in [
            "127.0.0.1",
            "127.1",
            "2130706433",
            "0x7f000001",
            "0x7f.0.0.1",
            "0177.0.0.1",
            "127.0.0.1.",
            "１２７.0.0.1",
            "%31%32%37.0.0.1",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "[0:0:0:0:0:0:0:1]",
        ] {
            assert_eq!(refused(&guard, &format!("http://{host}/")), Refused::NotPublic(Class::Loopback), "{host}");
        }
        for host in ["0", "0.0.0.0", "[::]", "[::ffff:0.0.0.0]"] {
            assert_eq!(refused(&guard, &format!("http://{host}/")), Refused::NotPublic(Class::Unspecified), "{host}");
        }
        for host in ["169.254.169.254", "[::ffff:a9fe:a9fe]", "2852039166", "[64:ff9b::a9fe:a9fe]", "168.63.129.16"] {
            assert_eq!(refused(&guard, &format!("http://{host}/")), Refused::NotPublic(Class::Metadata), "{host}");
        }
    }
}
