//! HAProxy in front of replicas, as an operator would set it up: health-checked on `/readyz`, retrying what may be
//! retried. Owns that configuration.

use std::{fmt::Write as _, net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context as _, bail};
use tokio::{net::TcpStream, time::Instant};

use super::{program::Program, watchdog};

/// How long it may take until it answers.
const START_LIMIT: Duration = Duration::from_secs(10);

/// What holds for every connection. Only a request that cannot be harmful twice is sent twice: reads, and what carries
/// an `Idempotency-Key`. A connection that could not be made at all is tried elsewhere whatever it was for.
const RULES: &str = "\
global
    maxconn 4000
    log stdout format raw local0 info
defaults
    mode http
    log global
    option dontlog-normal
    option http-buffer-request
    option redispatch 1
    retries 3
    timeout connect 1s
    timeout client 60s
    timeout server 15s
    timeout queue 2s
    timeout http-request 10s
    retry-on conn-failure empty-response 0rtt-rejected 503
";

/// A running HAProxy.
#[derive(Debug)]
pub struct Haproxy {
    program: Program,
    url: String,
}

impl Haproxy {
    /// Where it is installed.
    pub fn installed() -> Option<PathBuf> {
        watchdog::find("haproxy", &[PathBuf::from("/usr/sbin"), PathBuf::from("/usr/local/sbin")])
    }

    /// Starts it on a free port before these replicas.
    pub async fn start(replicas: &[(String, SocketAddr)]) -> anyhow::Result<Self> {
        let binary = Self::installed().context("no haproxy: `apt-get install haproxy`")?;
        let port = watchdog::free_port()?;
        let mut config = String::from(RULES);
        let _ = write!(
            config,
            "    log-format \"%Ts.%ms %ST %tsc %s %rc %TR/%Tw/%Tc/%Tr/%Ta %HM %HP\"\n\
             frontend api\n    bind 127.0.0.1:{port}\n\
             \x20   http-request disable-l7-retry if METH_POST !{{ req.hdr(idempotency-key) -m found }}\n\
             \x20   default_backend replicas\n\
             backend replicas\n    balance roundrobin\n    option httpchk\n\
             \x20   http-check send meth GET uri /readyz ver HTTP/1.1 hdr Host localhost\n\
             \x20   default-server check inter 500ms fastinter 200ms downinter 250ms fall 2 rise 1\n"
        );
        for (name, address) in replicas {
            let _ = writeln!(config, "    server {name} {address}");
        }
        let program = Program::start("haproxy", "TERM", |home| {
            let path = home.join("haproxy.cfg");
            std::fs::write(&path, config)?;
            let text = |path: &std::path::Path| path.to_string_lossy().into_owned();
            Ok(vec![text(&binary), "-db".to_owned(), "-f".to_owned(), text(&path)])
        })?;
        let limit = Instant::now() + START_LIMIT;
        while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
            if Instant::now() > limit || !program.is_running() {
                bail!("HAProxy does not answer:\n{}", program.log_tail());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(Self { program, url: format!("http://127.0.0.1:{port}") })
    }

    /// Its address, without a slash at the end.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// What it logged: the requests that did not go well, and the replicas that came and went.
    pub fn log(&self) -> anyhow::Result<String> {
        Ok(self.program.log_from(0)?.0)
    }

    /// Its program.
    pub fn program(&self) -> &Program {
        &self.program
    }
}
