//! What the tests share: a place of their own, the binary in it, a daemon that is surely stopped, a client.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command as StdCommand, Stdio},
    sync::mpsc,
    time::Duration,
};

use assert_cmd::Command;
use futures::StreamExt as _;
use serde_json::Value;
use sse_stream::SseStream;
use stagegate_core::Event;
use tempfile::TempDir;

/// How long anything may take before a test gives up. Never a measure of success.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// A directory of its own: the working directory, home and data of the binary.
pub(crate) struct Place(TempDir);

impl Place {
    /// Fresh, with a simulator that does not dawdle.
    pub(crate) fn new() -> Self {
        let place = Self(tempfile::tempdir().expect("a temporary directory"));
        place.write("stagegate.toml", "[llm.providers.sim.sim]\nlatency = '1ms'\n");
        place
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, text).expect("writable");
        path
    }

    /// The binary with nothing of the machine's environment but the path.
    pub(crate) fn stagegate(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.current_dir(self.0.path()).env_clear().args(arguments).timeout(PATIENCE);
        for (name, value) in self.environment() {
            command.env(name, value);
        }
        command
    }

    fn environment(&self) -> Vec<(&'static str, PathBuf)> {
        let path = std::env::var_os("PATH").unwrap_or_default().into();
        vec![("PATH", path), ("HOME", self.0.path().to_owned()), ("XDG_DATA_HOME", self.path("data"))]
    }

    /// Runs it to its end: exit code, stdout, stderr.
    pub(crate) fn run(&self, arguments: &[&str]) -> (i32, String, String) {
        ended(self.stagegate(arguments).output().expect("the binary starts"))
    }

    /// Runs another program in the same place and environment.
    pub(crate) fn stagegate_in(&self, program: &str, arguments: &[&str]) -> (i32, String, String) {
        let mut command = Command::new(program);
        command.current_dir(self.0.path()).env_clear().args(arguments).timeout(PATIENCE);
        command.envs(self.environment());
        ended(command.output().expect("the program starts"))
    }

    /// Runs a line of documentation as its reader would: by the shell, in the repository. What it keeps is kept here.
    pub(crate) fn shell(&self, line: &str) -> (i32, String, String) {
        let line = format!("stagegate() {{ {} \"$@\"; }}; {line}", binary());
        let mut command = Command::new("bash");
        command.args(["-euc", &line]).current_dir(repository()).env_clear().timeout(PATIENCE);
        command.envs(self.environment()).env("STAGEGATE_CONFIG", self.path("stagegate.toml"));
        ended(command.output().expect("bash starts"))
    }

    /// Starts a daemon on a free port and waits until it is ready.
    pub(crate) async fn serve(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Daemon {
        let mut command = StdCommand::new(binary());
        command.current_dir(self.0.path()).env_clear().args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--log-format",
            "json",
        ]);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        for (name, value) in self.environment() {
            command.env(name, value);
        }
        for (name, value) in environment {
            command.env(name, value);
        }
        Daemon::start(command).await
    }
}

pub(crate) fn binary() -> &'static str {
    env!("CARGO_BIN_EXE_stagegate")
}

pub(crate) fn ended(output: std::process::Output) -> (i32, String, String) {
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

/// The repository's root.
pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A running daemon. It is killed when this is dropped.
pub(crate) struct Daemon {
    child: Child,
    /// `http://127.0.0.1:…`
    pub base: String,
    lines: mpsc::Receiver<String>,
    log: Vec<String>,
}

impl Daemon {
    async fn start(mut command: StdCommand) -> Self {
        let mut child = command.spawn().expect("the binary starts");
        let stderr = BufReader::new(child.stderr.take().expect("piped"));
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let mut daemon = Self { child, base: String::new(), lines, log: Vec::new() };
        let line = daemon.wait_for_line("listening: http://");
        let rest = line.split("listening: ").nth(1).expect("the address follows");
        daemon.base = rest.split([' ', '"', '(']).next().expect("an address").to_owned();
        daemon.wait_until_ready().await;
        daemon
    }

    /// Waits until a line that holds this is logged.
    pub(crate) fn wait_for_line(&mut self, part: &str) -> String {
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) => {
                    self.log.push(line.clone());
                    if line.contains(part) {
                        return line;
                    }
                }
                Err(error) => panic!("`{part}` was never logged ({error}): {:#?}", self.log),
            }
        }
    }

    async fn wait_until_ready(&mut self) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let probe = client().get(format!("{}/readyz", self.base)).send().await;
            if probe.is_ok_and(|response| response.status().is_success()) {
                return;
            }
            assert!(tokio::time::Instant::now() < deadline, "never ready: {:#?}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// What was logged so far.
    pub(crate) fn log(&mut self) -> &[String] {
        self.log.extend(self.lines.try_iter());
        &self.log
    }

    /// SIGKILL: no code of it runs any more.
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it is ours");
    }

    /// Sends a signal by name.
    pub(crate) fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        let sent = StdCommand::new("kill").args([&format!("-{signal}"), &pid]).status().expect("kill is there");
        assert!(sent.success());
    }

    /// Sends a signal by name and waits for its end: the exit code.
    pub(crate) fn end(mut self, signal: &str) -> (i32, Vec<String>) {
        self.signal(signal);
        let status = self.child.wait().expect("it is ours");
        // The pipe is closed with the process: what is left arrives.
        self.log.extend(self.lines.iter());
        (status.code().unwrap_or(-1), std::mem::take(&mut self.log))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client that trusts nothing of the machine's environment.
pub(crate) fn client() -> reqwest::Client {
    stagegate_net::install_tls();
    reqwest::Client::builder().no_proxy().build().expect("a client")
}

/// The API of a daemon, as one key's holder sees it.
pub(crate) struct Api {
    base: String,
    key: Option<String>,
    client: reqwest::Client,
}

impl Api {
    pub(crate) fn new(base: &str, key: Option<&str>) -> Self {
        Self { base: base.to_owned(), key: key.map(str::to_owned), client: client() }
    }

    fn request(&self, method: reqwest::Method, path: &str) -> reqwest::RequestBuilder {
        let request = self.client.request(method, format!("{}{path}", self.base));
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    async fn json(request: reqwest::RequestBuilder) -> Value {
        let response = request.send().await.expect("an answer");
        let status = response.status();
        let text = response.text().await.expect("a body");
        assert!(status.is_success(), "{status}: {text}");
        serde_json::from_str(&text).expect("JSON")
    }

    pub(crate) async fn get(&self, path: &str) -> Value {
        Self::json(self.request(reqwest::Method::GET, path)).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Value {
        Self::json(self.request(reqwest::Method::POST, path).json(body)).await
    }

    pub(crate) async fn status(&self, path: &str) -> u16 {
        self.request(reqwest::Method::GET, path).send().await.expect("an answer").status().as_u16()
    }

    /// Registers a definition and gives its version.
    pub(crate) async fn register(&self, yaml: &str) -> u64 {
        let request = self.request(reqwest::Method::POST, "/v1/pipelines").header("content-type", "application/yaml");
        Self::json(request.body(yaml.to_owned())).await["version"].as_u64().expect("a version")
    }

    /// Submits a run and gives its id.
    pub(crate) async fn submit(&self, pipeline: &str, input: Value) -> String {
        let body = serde_json::json!({ "pipeline": pipeline, "input": input });
        self.post("/v1/runs", &body).await["id"].as_str().expect("an id").to_owned()
    }

    /// Follows events after `after` until one that `enough` says is the last one wanted, or until the stream breaks.
    pub(crate) async fn follow(&self, run: &str, after: u64, enough: impl Fn(&Event) -> bool) -> Vec<Event> {
        let mut request = self.request(reqwest::Method::GET, &format!("/v1/runs/{run}/events"));
        request = request.header("accept", "text/event-stream");
        if after > 0 {
            request = request.header("last-event-id", after.to_string());
        }
        let response = request.send().await.expect("an answer");
        assert!(response.status().is_success(), "{}", response.status());
        let mut stream = SseStream::from_bytes_stream(response.bytes_stream());
        let mut events: Vec<Event> = Vec::new();
        let followed = async {
            while let Some(Ok(item)) = stream.next().await {
                let Some(data) = item.data else { continue };
                let event: Event = serde_json::from_str(&data).expect("an event");
                assert_eq!(item.id.as_deref(), Some(event.seq.to_string().as_str()), "the id is the seq");
                let last = enough(&event);
                events.push(event);
                if last {
                    break;
                }
            }
        };
        tokio::time::timeout(PATIENCE, followed).await.expect("the events come");
        events
    }

    /// Follows a run to its end and reads it.
    pub(crate) async fn finish(&self, run: &str) -> Value {
        self.follow(run, 0, |event| event.kind.name() == "run.finished").await;
        self.get(&format!("/v1/runs/{run}")).await
    }

    /// Submits a run, waits for its success, and reads it.
    pub(crate) async fn succeed(&self, pipeline: &str, input: Value) -> Value {
        let run = self.submit(pipeline, input).await;
        let detail = self.finish(&run).await;
        assert_eq!(detail["state"], "succeeded", "{detail:#}");
        detail
    }
}
