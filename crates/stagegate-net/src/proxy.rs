//! Proxies: owns which one stands before an address, and every form of saying which addresses have none. Reads no
//! environment, and never shows the credentials of a proxy.

use std::{fmt, net::IpAddr};

use ipnet::IpNet;
use stagegate_core::{Code, Secret, Violation};
use url::{Host, Url};

use crate::config::NetConfig;

/// The proxies in force.
#[derive(Debug, Default)]
pub(crate) struct Proxies {
    http: Option<Proxy>,
    https: Option<Proxy>,
    direct: Vec<Direct>,
}

/// One proxy.
#[derive(Clone)]
pub(crate) struct Proxy {
    /// With its credentials.
    url: Url,
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Proxy({})", self.shown())
    }
}

impl Proxy {
    /// Its address, credentials included.
    pub(crate) fn url(&self) -> &Url {
        &self.url
    }

    /// Its host and port.
    pub(crate) fn shown(&self) -> String {
        let host = self.url.host_str().unwrap_or_default();
        self.url.port_or_known_default().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
    }

    fn parse(key: &str, text: &str) -> Result<Option<Self>, Violation> {
        let text = text.trim();
        if text.is_empty() {
            return Ok(None);
        }
        let wrong = |what: &str| {
            Violation::new(Code::InvalidConfig, format!("net.{key}"), what)
                .mend("write an address such as `http://user:password@proxy.example:3128`")
        };
        // `proxy.example:3128` is how many write it, and means http.
        let full = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
        let mut url = Url::parse(&full).map_err(|_| wrong("it is no address of a proxy"))?;
        if !matches!(url.scheme(), "http" | "https" | "socks4" | "socks4a" | "socks5" | "socks5h") {
            return Err(wrong("its scheme is not one of http, https, socks4, socks4a, socks5 and socks5h"));
        }
        if url.host_str().is_none_or(str::is_empty) {
            return Err(wrong("it names no host"));
        }
        if url.scheme().starts_with("socks") && url.port().is_none() {
            // Fails only for URLs without a host.
            let _ = url.set_port(Some(1080));
        }
        Ok(Some(Self { url }))
    }
}

impl Proxies {
    /// From the configuration, or every mistake in it.
    pub(crate) fn of(config: &NetConfig) -> Result<Self, Vec<Violation>> {
        let mut violations = Vec::new();
        let mut parse = |key: &str, value: &Option<Secret>| {
            let parsed = value.as_ref().map_or(Ok(None), |value| Proxy::parse(key, value.expose()));
            parsed.unwrap_or_else(|violation| {
                violations.push(violation);
                None
            })
        };
        let both = parse("proxy", &config.proxy);
        let http = parse("http_proxy", &config.http_proxy).or_else(|| both.clone());
        let https = parse("https_proxy", &config.https_proxy).or(both);
        let (mut direct, mut unknown) = (Vec::new(), Vec::new());
        for entry in config.no_proxy.iter().flat_map(|entry| entry.split([',', ' ', '\t', '\n', '\r'])) {
            match Direct::parse(entry.trim()) {
                Ok(parsed) => direct.extend(parsed),
                // The shell's variable is written for many programs, each of which passes over what it does not know. Not to
                // understand an entry sends more over the proxy, never less.
                Err(what) => unknown.push(what),
            }
        }
        if !violations.is_empty() {
            return Err(violations);
        }
        let proxies = Self { http, https, direct };
        if !proxies.is_empty() {
            for what in unknown {
                tracing::warn!(
                    "net.no_proxy: {what}, and is passed over: write `*`, a host, `.example.com`, an IP address or a \
                     network such as `10.0.0.0/8`"
                );
            }
        }
        Ok(proxies)
    }

    /// Whether any address has a proxy before it.
    pub(crate) fn is_empty(&self) -> bool {
        self.http.is_none() && self.https.is_none()
    }

    /// The proxy before this address.
    pub(crate) fn before(&self, url: &Url) -> Option<&Proxy> {
        let proxy = match url.scheme() {
            "http" => self.http.as_ref(),
            "https" => self.https.as_ref(),
            _ => None,
        }?;
        let (host, port) = (url.host()?, url.port_or_known_default());
        if self.direct.iter().any(|direct| direct.covers(&host, port)) { None } else { Some(proxy) }
    }

    /// Each proxy with what it is for.
    pub(crate) fn shown(&self) -> Vec<String> {
        let shown =
            |what: &str, proxy: &Option<Proxy>| proxy.as_ref().map(|proxy| format!("{what} over {}", proxy.shown()));
        shown("http", &self.http).into_iter().chain(shown("https", &self.https)).collect()
    }
}

/// One entry of `no_proxy`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Direct {
    /// `*`
    Everything,
    /// An address or a network, and the port where only one is meant.
    Network(IpNet, Option<u16>),
    /// A host with all below it, and the port where only one is meant.
    Domain(String, Option<u16>),
}

impl Direct {
    /// Reads an entry; nothing for an empty one.
    fn parse(text: &str) -> Result<Option<Self>, String> {
        let wrong = || format!("`{text}` is no host, IP address or network");
        if text.is_empty() {
            return Ok(None);
        }
        if text == "*" {
            return Ok(Some(Self::Everything));
        }
        // An IPv6 address has colons of its own; with a port it stands in brackets.
        if let Some(network) = network(text) {
            return Ok(Some(Self::Network(network, None)));
        }
        let (name, port) = match text.rsplit_once(':') {
            Some((name, port)) => {
                let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(wrong)?;
                (name, Some(port))
            }
            None => (text, None),
        };
        if let Some(network) = network(name) {
            return Ok(Some(Self::Network(network, port)));
        }
        let bare = name.strip_prefix('*').unwrap_or(name).trim_matches('.');
        if let Some(network) = octets(bare) {
            return Ok(Some(Self::Network(network, port)));
        }
        // As the names in addresses are: lower case, and the letters of other languages encoded.
        match Host::parse(bare) {
            Ok(Host::Domain(domain)) if !domain.contains('*') => Ok(Some(Self::Domain(domain, port))),
            _ => Err(wrong()),
        }
    }

    fn covers(&self, host: &Host<&str>, port: Option<u16>) -> bool {
        let is_port = |only: &Option<u16>| only.is_none() || *only == port;
        match (self, host) {
            (Self::Everything, _) => true,
            (Self::Network(network, only), Host::Ipv4(ip)) => is_port(only) && contains(network, IpAddr::V4(*ip)),
            (Self::Network(network, only), Host::Ipv6(ip)) => is_port(only) && contains(network, IpAddr::V6(*ip)),
            (Self::Domain(domain, only), Host::Domain(name)) => {
                let name = name.trim_end_matches('.');
                let is_below =
                    name.strip_suffix(domain.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
                is_port(only) && is_below
            }
            _ => false,
        }
    }
}

/// An address in either form, or a network.
fn network(text: &str) -> Option<IpNet> {
    // An address of IPv6 may stand in brackets, the length of a network behind them.
    let joined;
    let text = match text.strip_prefix('[').map(|rest| rest.split_once(']')) {
        None => text,
        Some(Some((inner, ""))) => inner,
        Some(Some((inner, length))) if length.starts_with('/') => {
            joined = format!("{inner}{length}");
            &joined
        }
        Some(_) => return None,
    };
    text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

/// `10.*`, `192.168.*.*` and `169.254/16`, as some systems write networks.
fn octets(text: &str) -> Option<IpNet> {
    let (head, length) = match text.split_once('/') {
        Some((head, length)) => (head, Some(length.parse().ok()?)),
        None => (text.trim_end_matches(".*"), None),
    };
    let parts: Vec<u8> = head.split('.').map(|part| part.parse().ok()).collect::<Option<_>>()?;
    if head == text || parts.len() > 3 {
        return None;
    }
    let mut whole = [0; 4];
    whole[..parts.len()].copy_from_slice(&parts);
    let length = length.or_else(|| u8::try_from(parts.len() * 8).ok())?;
    IpNet::new(IpAddr::from(whole), length).ok()
}

/// Whether an address is in a network, an IPv4 address in its IPv6 form included.
fn contains(network: &IpNet, ip: IpAddr) -> bool {
    network.contains(&ip) || network.contains(&ip.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(no_proxy: &[&str]) -> NetConfig {
        NetConfig {
            proxy: Some(Secret::from("http://user:hunter2@proxy.example:3128".to_owned())),
            no_proxy: no_proxy.iter().map(|entry| (*entry).to_owned()).collect(),
            ..NetConfig::default()
        }
    }

    fn is_direct(no_proxy: &str, url: &str) -> bool {
        let proxies = Proxies::of(&config(&[no_proxy])).expect("valid");
        proxies.before(&Url::parse(url).expect("an address")).is_none()
    }

    #[test]
    fn every_documented_form_of_no_proxy_is_understood() {
        let forms: &[(&str, &[&str], &[&str])] = &[
            ("*", &["http://example.com", "https://127.0.0.1:8443", "http://[::1]"], &[]),
            (
                "example.com",
                &["http://example.com", "https://a.b.example.com:99"],
                &["http://notexample.com", "http://com"],
            ),
            (".example.com", &["http://example.com", "http://a.example.com"], &["http://notexample.com"]),
            ("*.example.com", &["http://example.com", "http://a.example.com"], &["http://notexample.com"]),
            ("EXAMPLE.com.", &["http://example.COM", "http://example.com."], &["http://example.org"]),
            ("bücher.example", &["http://xn--bcher-kva.example"], &["http://bcher.example"]),
            ("example.com:8443", &["https://example.com:8443", "http://a.example.com:8443"], &["https://example.com"]),
            ("example.com:443", &["https://example.com"], &["http://example.com"]),
            ("localhost", &["http://localhost:11434"], &["http://127.0.0.1:11434"]),
            ("127.0.0.1", &["http://127.0.0.1", "http://127.0.0.1:9", "http://2130706433"], &["http://127.0.0.2"]),
            ("127.0.0.1:80", &["http://127.0.0.1"], &["http://127.0.0.1:81"]),
            ("10.0.0.0/8", &["http://10.255.1.2:8000"], &["http://11.0.0.1", "http://ten.example"]),
            ("10.*", &["http://10.255.1.2:8000"], &["http://11.0.0.1"]),
            ("192.168.*", &["http://192.168.7.2"], &["http://192.169.0.1"]),
            ("10.*.*.*", &["http://10.255.1.2:8000"], &["http://11.0.0.1"]),
            ("169.254/16", &["http://169.254.169.254"], &["http://169.255.0.1"]),
            ("10.0.*.*", &["http://10.0.7.2"], &["http://10.1.0.1"]),
            ("*.local, 169.254/16", &["http://a.local", "http://169.254.1.2"], &["http://169.255.0.1"]),
            ("<local>, fe80::1%en0, http://a.example, b.example", &["http://b.example"], &["http://a.example"]),
            ("::1", &["http://[::1]", "http://[0:0:0:0:0:0:0:1]:9"], &["http://[::2]"]),
            ("[::1]", &["http://[::1]"], &["http://[::2]"]),
            ("[::1]:8080", &["http://[::1]:8080"], &["http://[::1]"]),
            ("fd00::/8", &["http://[fd12::1]"], &["http://[fe80::1]"]),
            ("[fd00::]/8", &["http://[fd12::1]"], &["http://[fe80::1]"]),
            ("192.0.2.1", &["http://[::ffff:192.0.2.1]"], &[]),
            ("a.example, b.example", &["http://a.example", "http://b.example"], &["http://c.example"]),
            ("a.example b.example,,", &["http://a.example", "http://b.example"], &["http://c.example"]),
            ("", &[], &["http://a.example"]),
        ];
        for (no_proxy, direct, over_the_proxy) in forms {
            for url in *direct {
                assert!(is_direct(no_proxy, url), "`{no_proxy}` covers {url}");
            }
            for url in *over_the_proxy {
                assert!(!is_direct(no_proxy, url), "`{no_proxy}` does not cover {url}");
            }
        }
    }

    #[test]
    fn an_entry_that_is_not_understood_covers_nothing_and_stops_nothing() {
        for entry in ["exa*mple.com", "10.0.0.0/99", "10/99", "a.example:port", "a.example:0", "http://a.example"] {
            assert!(Direct::parse(entry).is_err(), "{entry}");
            assert!(!is_direct(entry, "http://a.example"), "{entry}");
        }
    }

    #[test]
    fn a_scheme_has_its_own_proxy_or_the_common_one() {
        let secret = |text: &str| Some(Secret::from(text.to_owned()));
        let before = |config: &NetConfig, url: &str| {
            let proxies = Proxies::of(config).expect("valid");
            proxies.before(&Url::parse(url).expect("an address")).map(Proxy::shown)
        };
        let both = NetConfig { proxy: secret("all.example:1"), ..NetConfig::default() };
        assert_eq!(before(&both, "http://x").as_deref(), Some("all.example:1"));
        assert_eq!(before(&both, "https://x").as_deref(), Some("all.example:1"));
        let split = NetConfig { http_proxy: secret("http://plain.example"), https_proxy: secret("  "), ..both };
        assert_eq!(before(&split, "http://x").as_deref(), Some("plain.example:80"));
        assert_eq!(before(&split, "https://x").as_deref(), Some("all.example:1"));
        let socks = NetConfig { proxy: secret("socks5h://s.example"), ..NetConfig::default() };
        assert_eq!(before(&socks, "https://x").as_deref(), Some("s.example:1080"));
        assert_eq!(before(&NetConfig::default(), "https://x"), None);
    }

    #[test]
    fn a_proxy_that_cannot_be_used_is_refused_and_its_credentials_are_never_shown() {
        for text in ["ftp://user:hunter2@proxy", "http://user:hunter2@", "http://user:hunter2@proxy:port"] {
            let config = NetConfig { https_proxy: Some(Secret::from(text.to_owned())), ..NetConfig::default() };
            let violations = Proxies::of(&config).expect_err("refused");
            assert_eq!(violations[0].path, "net.https_proxy");
            assert!(!format!("{violations:?}").contains("hunter2"), "{violations:?}");
        }
        let proxies = Proxies::of(&config(&[])).expect("valid");
        let shown = format!("{proxies:?} {:?} {:?}", proxies.shown(), config(&[]));
        assert!(shown.contains("proxy.example:3128") && !shown.contains("hunter2"), "{shown}");
    }
}
