//! The API below a base path behind HAProxy and nginx: owns their configurations, which are those of `docs/operations.md`,
//! and what must work through them.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, bail, ensure};
use reqwest::Client;
use serde_json::Value;
use stagegate_testkit::servers::{Haproxy, Program, free_port};
use tokio::time::{Instant, sleep, timeout};

use super::{Bench, parts};
use crate::{daemon::Daemon, system};

/// The base path of all of these.
const BASE: &str = "/tools/gate";
/// How long anything here may take.
const LIMIT: Duration = Duration::from_secs(20);

/// A daemon that says that it lies below the base path.
async fn daemon(bench: &Bench) -> anyhow::Result<(Daemon, tempfile::TempDir)> {
    bench.daemon(&[("STAGEGATE_HTTP__BASE_PATH", BASE.to_owned())]).await
}

pub(super) async fn haproxy(bench: &Bench) -> anyhow::Result<()> {
    if Haproxy::installed().is_none() {
        system::install(&["haproxy"], "interop puts HAProxy before the daemon").await?;
    }
    let binary = Haproxy::installed().context("no haproxy")?;
    let (daemon, _data) = daemon(bench).await?;
    let (address, port) = (daemon.address()?, free_port()?);
    let config = format!(
        "defaults\n    mode http\n    timeout connect 5s\n    timeout client 1m\n    timeout server 1h\n\
         frontend web\n    bind 127.0.0.1:{port}\n    use_backend stagegate if {{ path {BASE} }} || {{ path_beg {BASE}/ }}\n\
         backend stagegate\n    option httpchk GET /readyz\n    server a {address} check inter 200ms\n"
    );
    let proxy = Program::start("haproxy", "TERM", |home| {
        let path = home.join("haproxy.cfg");
        std::fs::write(&path, config)?;
        Ok(vec![text(&binary), "-db".to_owned(), "-f".to_owned(), text(&path)])
    })?;
    through(&format!("http://127.0.0.1:{port}"), &proxy).await?;
    daemon.stop().await
}

pub(super) async fn nginx(bench: &Bench) -> anyhow::Result<()> {
    let find =
        || ["/usr/sbin/nginx", "/usr/local/sbin/nginx"].map(PathBuf::from).into_iter().find(|path| path.is_file());
    if find().is_none() {
        system::install(&["nginx-light"], "interop puts nginx before the daemon").await?;
    }
    let binary = find().context("no nginx")?;
    let (daemon, _data) = daemon(bench).await?;
    // With a path after the address nginx cuts the location off.
    for cut in ["", "/"] {
        let (address, port) = (daemon.address()?, free_port()?);
        let proxy = Program::start("nginx", "TERM", |home| {
            let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
                .map(|kind| format!("    {kind}_temp_path {}/{kind};\n", home.display()))
                .concat();
            let config = format!(
                "daemon off;\npid {home}/pid;\nerror_log stderr;\nevents {{}}\nhttp {{\n    access_log off;\n{temporary}\
                 \x20   server {{\n        listen 127.0.0.1:{port};\n        location {BASE}/ {{\n\
                 \x20           proxy_pass http://{address}{cut};\n            proxy_http_version 1.1;\n\
                 \x20           proxy_set_header Connection \"\";\n            proxy_set_header Host $http_host;\n\
                 \x20           proxy_read_timeout 1h;\n        }}\n    }}\n}}\n",
                home = home.display()
            );
            let path = home.join("nginx.conf");
            std::fs::write(&path, config)?;
            Ok(vec![text(&binary), "-e".to_owned(), "stderr".to_owned(), "-c".to_owned(), text(&path)])
        })?;
        through(&format!("http://127.0.0.1:{port}"), &proxy).await?;
    }
    daemon.stop().await
}

fn text(path: &std::path::Path) -> String {
    path.to_string_lossy().into_owned()
}

/// What must work through a proxy: every link leads on, and events come as they happen.
async fn through(origin: &str, proxy: &Program) -> anyhow::Result<()> {
    let client = Client::builder().no_proxy().timeout(LIMIT).build()?;
    let until = Instant::now() + LIMIT;
    while !client.get(format!("{origin}{BASE}/readyz")).send().await.is_ok_and(|answer| answer.status().is_success()) {
        if Instant::now() > until || !proxy.is_running() {
            bail!("nothing answers through the proxy:\n{}", proxy.log_tail());
        }
        sleep(Duration::from_millis(50)).await;
    }
    let docs = client.get(format!("{origin}{BASE}/")).send().await?;
    ensure!(
        docs.status().is_success() && docs.url().path() == format!("{BASE}/docs/"),
        "the docs are at {}",
        docs.url()
    );
    let document: Value = client.get(format!("{origin}{BASE}/openapi.json")).send().await?.json().await?;
    ensure!(document["servers"][0]["url"] == BASE, "the servers are {}", document["servers"]);
    let run = parts::held(&format!("{origin}{BASE}")).await?;
    // The first events come while the run is held: nothing on the way keeps them.
    let mut stream = client.get(format!("{run}/events")).header("accept", "text/event-stream").send().await?;
    let mut text = String::new();
    while !text.contains("event: run.waiting") {
        let chunk = timeout(LIMIT, stream.chunk()).await.context("events are kept on the way")??;
        text.push_str(&String::from_utf8_lossy(&chunk.context("the stream ended")?));
    }
    let approved = client.post(format!("{run}/stages/draft/approve")).send().await?;
    ensure!(approved.status() == 202, "approving gave {}", approved.status());
    while let Some(chunk) = timeout(LIMIT, stream.chunk()).await.context("events are kept on the way")?? {
        text.push_str(&String::from_utf8_lossy(&chunk));
    }
    ensure!(text.contains("event: run.finished"), "the stream ended with {text}");
    let detail: Value = client.get(&run).send().await?.json().await?;
    let links = detail["links"].as_object().context("links")?;
    for name in ["self", "events", "pipeline"] {
        let link = links[name].as_str().context("a link")?;
        let answer = client.get(format!("{origin}{link}")).send().await?;
        ensure!(link.starts_with(BASE) && answer.status().is_success(), "{link} gave {}", answer.status());
    }
    Ok(())
}
