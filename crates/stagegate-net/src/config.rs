//! The section `[net]` of the configuration: owns its keys and what is wrong with their values.

use std::{path::PathBuf, time::Duration};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use stagegate_core::{Secret, Violation, pipeline::Span};

use crate::proxy::Proxies;

/// How other servers are reached: providers of models above all.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct NetConfig {
    /// The proxy for `http` addresses, as `http://user:password@proxy:3128`; `https`, `socks5` and `socks5h` (names are
    /// resolved by the proxy) are known too. Also `HTTP_PROXY`.
    pub http_proxy: Option<Secret>,
    /// The proxy for `https` addresses. It passes the encrypted connection on and sees neither keys nor prompts. Also
    /// `HTTPS_PROXY`.
    pub https_proxy: Option<Secret>,
    /// The proxy for both, where they have none of their own. Also `ALL_PROXY`.
    pub proxy: Option<Secret>,
    /// What is reached directly: `*` (everything), a host with all hosts below it (`example.com`, `.example.com` and
    /// `*.example.com` mean the same), an IP address, a network (`10.0.0.0/8`, `fd00::/8`), each with a port where only
    /// that port is meant (`example.com:8443`, `[::1]:8080`). Names are compared as they are written, not resolved. Also
    /// `NO_PROXY`.
    pub no_proxy: Vec<String>,
    /// A PEM file of certificate authorities that are trusted beside the system's: that of a gateway or a proxy of your
    /// own. The system's own ones can be replaced by `SSL_CERT_FILE` and `SSL_CERT_DIR`; where there are none, Mozilla's
    /// are used.
    pub ca_file: Option<PathBuf>,
    /// How long a connection may take to be made, TLS included.
    pub connect_timeout: Span,
    /// Whether HTTP/2 is spoken with servers that offer it (over TLS).
    pub http2: bool,
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            http_proxy: None,
            https_proxy: None,
            proxy: None,
            no_proxy: Vec::new(),
            ca_file: None,
            connect_timeout: Span(Duration::from_secs(10)),
            http2: true,
        }
    }
}

impl NetConfig {
    /// Every mistake that the values show by themselves; files are read when a client is made.
    pub fn violations(&self) -> Vec<Violation> {
        Proxies::of(self).err().unwrap_or_default()
    }

    /// The proxies in force for people: `https over proxy.example:3128`. Credentials are left out.
    pub fn proxies_shown(&self) -> Vec<String> {
        Proxies::of(self).map(|proxies| proxies.shown()).unwrap_or_default()
    }
}
