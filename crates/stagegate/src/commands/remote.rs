//! The daemon that a command talks to: owns how its address and its key are given. A key is never an argument: other
//! users of the machine can read those.

use std::path::PathBuf;

use stagegate_core::{Code, Error, Secret};
use url::Url;

use super::healthcheck::{reachable, without_userinfo};
use crate::{
    cli::Global,
    client::{Client, is_of_this_machine},
    config::Environment,
    files,
    output::{self, WARN, paint},
};

/// Names the daemon.
const SERVER: &str = "STAGEGATE_SERVER";
/// Holds the key.
const API_KEY: &str = "STAGEGATE_API_KEY";

/// Which daemon, and what opens it.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct Remote {
    /// The daemon's address
    #[arg(
        help = "The daemon's address [default: $STAGEGATE_SERVER, else where `http.listen` says, on this machine]",
        long,
        value_name = "URL",
        value_hint = clap::ValueHint::Url,
        help_heading = "The daemon"
    )]
    server: Option<String>,
    /// A file that holds the API key
    #[arg(
        help = "A file that holds the API key [default: the key in $STAGEGATE_API_KEY]",
        long,
        value_name = "FILE",
        value_hint = clap::ValueHint::FilePath,
        help_heading = "The daemon"
    )]
    api_key_file: Option<PathBuf>,
}

/// How answers are shown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Form {
    /// For people
    #[default]
    Text,
    /// As the API gives it
    Json,
}

impl Remote {
    /// Whether a daemon was named, in an argument or in the environment.
    pub(crate) fn is_named(&self) -> bool {
        self.named(&Environment::of_process()).is_some()
    }

    fn named(&self, environment: &Environment) -> Option<(String, &'static str)> {
        let given = self.server.clone().map(|server| (server, "--server"));
        given.or_else(|| Some((environment.variables.get(SERVER).filter(|text| !text.is_empty())?.clone(), SERVER)))
    }

    /// A client of it.
    pub(crate) fn client(&self, global: &Global) -> Result<Client, Error> {
        let environment = Environment::of_process();
        let base = match self.named(&environment) {
            Some((server, place)) => address(&server).map_err(|reason| {
                let mend = "write http://HOST:PORT, HOST:PORT, or a port on this machine";
                let server = without_userinfo(&server);
                Error::new(Code::InvalidRequest, format!("{place}: `{server}` {reason}; {mend}"))
            })?,
            None => format!("http://{}", reachable(global.load()?.config.http.listen)),
        };
        let key = self.key(&environment)?;
        if key.is_some() && base.starts_with("http://") && !is_of_this_machine(&base) {
            output::note(&paint(WARN, &format!("the key is sent to {base} unencrypted; use https:// where you can")));
        }
        Client::new(base, key)
    }

    fn key(&self, environment: &Environment) -> Result<Option<Secret>, Error> {
        let (text, place) = match &self.api_key_file {
            Some(path) => {
                let path = path.display().to_string();
                (files::read(&path)?, format!("--api-key-file: {path}"))
            }
            None => match environment.variables.get(API_KEY) {
                Some(text) => (text.clone(), API_KEY.to_owned()),
                None => return Ok(None),
            },
        };
        let key = text.trim();
        if self.api_key_file.is_none() && key.is_empty() {
            return Ok(None);
        }
        if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Error::new(
                Code::InvalidRequest,
                format!("{place} holds no API key; `stagegate keys create` makes one"),
            ));
        }
        Ok(Some(Secret::from(key.to_owned())))
    }
}

/// An address as people write it, as a URL.
fn address(text: &str) -> Result<String, &'static str> {
    let text = text.trim();
    let url = if text.contains("://") {
        text.to_owned()
    } else if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        format!("http://127.0.0.1:{text}")
    } else {
        format!("http://{text}")
    };
    let url = Url::parse(&url).map_err(|_| "is no address")?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err("is of another scheme than http and https");
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("holds a user or a password, which is not how a daemon is opened");
    }
    if url.host_str().is_none_or(str::is_empty) || url.query().is_some() || url.fragment().is_some() {
        return Err("is no address of a daemon");
    }
    Ok(url.as_str().trim_end_matches('/').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_taken_as_people_write_it() {
        for (given, url) in [
            ("8080", "http://127.0.0.1:8080"),
            ("db.example:9000", "http://db.example:9000"),
            ("http://[::1]:8080/", "http://[::1]:8080"),
            ("https://ci.example/stagegate/", "https://ci.example/stagegate"),
        ] {
            assert_eq!(address(given).as_deref(), Ok(url), "{given}");
        }
        for given in ["", "ftp://x", "http://me:secret@x", "http://x?key=1", "not an address"] {
            assert!(address(given).is_err(), "{given}");
        }
    }

    #[test]
    fn the_flag_goes_before_the_environment() {
        let variables = [(SERVER.to_owned(), "9000".to_owned())].into_iter().collect();
        let environment = Environment { variables, directory: PathBuf::new() };
        let none = Remote::default();
        assert_eq!(none.named(&environment), Some(("9000".to_owned(), SERVER)));
        let flag = Remote { server: Some("8080".to_owned()), ..Remote::default() };
        assert_eq!(flag.named(&environment).map(|(server, _)| server), Some("8080".to_owned()));
    }
}
