//! `stagegate healthcheck`: asks a daemon whether it is ready. The container's health check.

use std::{net::SocketAddr, time::Duration};

use stagegate_core::{Code, Error};

use crate::{cli::Global, client::Client, output};

const EXAMPLES: &str = "\
Examples:
  stagegate healthcheck            the daemon of this configuration
  stagegate healthcheck --url http://10.0.0.7:8080

Exit codes: 0 ready (also when degraded: the body says so), 1 not ready or not there.";

/// Ask a daemon whether it is ready.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Healthcheck {
    /// The daemon's address [default: where `http.listen` says, on this machine]
    #[arg(long, value_name = "URL", value_hint = clap::ValueHint::Url)]
    url: Option<String>,
    /// How long it may take to answer, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 3)]
    timeout: u64,
}

impl Healthcheck {
    pub(crate) async fn run(self, global: &Global) -> Result<u8, Error> {
        let url = match &self.url {
            Some(url) => url.trim_end_matches('/').to_owned(),
            None => format!("http://{}", reachable(global.load()?.config.http.listen)),
        };
        let shown = without_userinfo(&url);
        // `me:secret@host` is a URL of the scheme `me`, and would be told whole by the client that refuses it.
        if !url::Url::parse(&url).is_ok_and(|url| matches!(url.scheme(), "http" | "https")) {
            let message = format!("--url: `{shown}` is no URL; write http://HOST:PORT");
            return Err(Error::new(Code::InvalidRequest, message));
        }
        let timeout = Duration::from_secs(self.timeout.clamp(1, 60));
        let (status, body) = Client::new(&url, None)?.probe("/readyz", timeout).await?;
        output::result(&format!("{}\n", body.trim_end()))?;
        if status.is_success() {
            return Ok(0);
        }
        output::note(&format!("{shown} is not ready: {status}"));
        Ok(1)
    }
}

/// An address as it may be told: without the user and the password that it may hold, however wrong the rest is.
pub(crate) fn without_userinfo(address: &str) -> String {
    let start = address.find("://").map_or(0, |at| at + 3);
    let (scheme, rest) = address.split_at(start);
    // Of an address that cannot be read, a slash may be part of the password.
    match rest.rsplit_once('@') {
        Some((_, host)) => format!("{scheme}…@{host}"),
        None => address.to_owned(),
    }
}

/// An address that a listener can be reached at from its own machine.
pub(crate) fn reachable(listen: SocketAddr) -> SocketAddr {
    let mut address = listen;
    if listen.ip().is_unspecified() {
        address.set_ip(match listen {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_in_an_address_is_never_told() {
        for (address, shown) in [
            ("http://me:secret@host:80/x", "http://…@host:80/x"),
            ("me:secret@host", "…@host"),
            ("http://me:sec/r@et@host", "http://…@host"),
            ("http://secret@", "http://…@"),
            ("http://host:80", "http://host:80"),
        ] {
            assert_eq!(without_userinfo(address), shown);
        }
    }

    #[test]
    fn a_listener_on_every_address_is_asked_on_loopback() {
        let reach = |listen: &str| reachable(listen.parse().expect("an address")).to_string();
        assert_eq!(reach("0.0.0.0:80"), "127.0.0.1:80");
        assert_eq!(reach("[::]:80"), "[::1]:80");
        assert_eq!(reach("10.1.2.3:80"), "10.1.2.3:80");
    }
}
