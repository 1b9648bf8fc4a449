//! Addresses: owns what an address of another server may look like at all. Which of them a caller may name is
//! [`crate::guard`]'s.

use url::{Host, Url};

/// An address that the operator configured. It is reached wherever it leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trusted(Url);

impl Trusted {
    /// Reads what an operator wrote.
    pub fn parse(text: &str) -> Result<Self, BadAddress> {
        http_url(text).map(Self)
    }

    /// An address that was made of one that the operator wrote: with another path, say. Never of a caller's words.
    pub fn from_operator(url: Url) -> Self {
        Self(url)
    }

    /// The address.
    pub fn url(&self) -> &Url {
        &self.0
    }

    /// The address, to be changed.
    pub fn into_url(self) -> Url {
        self.0
    }
}

/// Why a text is no address of a server. Never repeats credentials.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadAddress {
    /// It is no URL, or has no scheme.
    #[error("it is no absolute URL")]
    NoUrl {
        /// What was probably meant.
        meant: Option<String>,
    },
    /// Its scheme is neither `http` nor `https`.
    #[error("it is no http or https address")]
    NotHttp {
        /// What was probably meant.
        meant: Option<String>,
    },
    /// It holds a user or a password.
    #[error("it holds credentials")]
    Credentials,
    /// It holds a `#`.
    #[error("it holds a fragment")]
    Fragment,
    /// Its port is 0.
    #[error("port 0 is no port to connect to")]
    PortZero,
}

impl BadAddress {
    /// What to write, where that can be told.
    pub fn meant(&self) -> Option<&str> {
        match self {
            Self::NoUrl { meant } | Self::NotHttp { meant } => meant.as_deref(),
            _ => None,
        }
    }
}

/// An absolute http or https address without credentials and fragment.
pub(crate) fn http_url(text: &str) -> Result<Url, BadAddress> {
    let text = text.trim();
    // `localhost:8000` reads as a URL with the scheme `localhost`.
    let meant = || if text.contains("://") { None } else { with_scheme(text) };
    let url = Url::parse(text).map_err(|_| BadAddress::NoUrl { meant: meant() })?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none_or(str::is_empty) {
        return Err(BadAddress::NotHttp { meant: meant() });
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(BadAddress::Credentials);
    }
    if url.fragment().is_some() {
        return Err(BadAddress::Fragment);
    }
    if url.port() == Some(0) {
        return Err(BadAddress::PortZero);
    }
    Ok(url)
}

/// The same text with the scheme that it most likely needs.
fn with_scheme(text: &str) -> Option<String> {
    let url = Url::parse(&format!("https://{text}")).ok()?;
    if !url.username().is_empty() || url.password().is_some() {
        return None;
    }
    let is_near = match url.host()? {
        Host::Domain(name) => name == "localhost" || !name.contains('.') || url.port().is_some(),
        Host::Ipv4(_) | Host::Ipv6(_) => true,
    };
    Some(format!("{}://{text}", if is_near { "http" } else { "https" }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_without_a_scheme_is_refused_with_what_was_meant() {
        for (given, meant) in [
            ("localhost:8000/v1", "http://localhost:8000/v1"),
            ("api.openai.com/v1", "https://api.openai.com/v1"),
            ("10.0.0.7:8000", "http://10.0.0.7:8000"),
            ("[::1]:8000", "http://[::1]:8000"),
            ("vllm:8000/v1", "http://vllm:8000/v1"),
        ] {
            assert_eq!(http_url(given).expect_err("refused").meant(), Some(meant), "{given}");
        }
    }

    #[test]
    fn an_address_holds_no_credentials_and_leads_to_a_port() {
        for (given, wrong) in [
            ("http://user:secret@example.com/v1", BadAddress::Credentials),
            ("http://user@example.com/v1", BadAddress::Credentials),
            ("http://example.com/v1#here", BadAddress::Fragment),
            ("http://example.com:0/v1", BadAddress::PortZero),
            ("ftp://example.com", BadAddress::NotHttp { meant: None }),
            ("http://", BadAddress::NoUrl { meant: None }),
            ("", BadAddress::NoUrl { meant: None }),
        ] {
            let error = http_url(given).expect_err("refused");
            assert_eq!(error, wrong, "{given}");
            assert!(!format!("{error} {error:?}").contains("secret"));
        }
        for good in ["http://[::1]:11434/v1", " https://example.com/v1?api-version=1 ", "HTTP://EXAMPLE.com"] {
            assert!(http_url(good).is_ok(), "{good}");
        }
    }
}
