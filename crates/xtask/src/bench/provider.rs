//! The provider that measurements call: an OpenAI-compatible responder in a process of its own, so that its CPU is
//! told apart. Owns when it answers and what it remembers of each run; judges no request.
//!
//! It costs as little as it can: one thread, kept connections, one prebuilt answer in which only the digits that make
//! it distinct are written. A model's name says how it answers: `d0` at once, `d50` after 50 ms, `hold` once the gate is
//! open, `tiny` at once with a short text. A prompt names its run as `run-` and ten digits.

use std::{
    collections::HashMap,
    ffi::OsStr,
    net::SocketAddr,
    path::PathBuf,
    process::{ExitCode, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use stagegate_testkit::tls::{TestAuthority, TlsAcceptor};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    sync::watch,
};

use super::{
    machine::now_nanos,
    wire::{Connection, find, get, header, post},
};

/// Calls of one run of the canonical pipeline.
const CALLS_PER_RUN: u32 = 5;
/// The size of an answer's text, in bytes.
const ANSWER_BYTES: usize = 1024;
/// The same of `tiny`.
const TINY_BYTES: usize = 64;
/// Delays are exact while there are no more of them than this.
const EXACT_SLEEPERS: usize = 8;
/// So long before its end an exact delay is slept no more but waited out, busily: to be woken takes its time too.
const AWAKE: Duration = Duration::from_millis(1);
/// How often a watcher is told the number of finished runs.
const WATCH_EVERY: Duration = Duration::from_millis(1);
/// Digits of a run's number.
const DIGITS: usize = 10;
/// Bytes of one run's record on the wire.
const RECORD_BYTES: usize = 28;

/// The first byte of a connection that wants TLS.
const HANDSHAKE: u8 = 0x16;

/// The provider's process (used by `bench` itself).
#[derive(Debug, clap::Args)]
pub(crate) struct BenchProvider {
    /// Speak TLS, too, and write the authority's certificate into this file
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
}

/// What is remembered of a run's calls.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Record {
    /// When its first call arrived, in nanoseconds on the machine's clock; 0 where none did.
    pub(crate) first: i64,
    /// When its last call arrived.
    pub(crate) last: i64,
    /// How many arrived.
    pub(crate) calls: u32,
}

#[derive(Debug, Default)]
struct State {
    records: HashMap<u64, Record>,
    /// Runs whose last call was answered.
    finished: u64,
    /// Delays that are being slept.
    sleeping: usize,
    /// What the delays really took.
    slept: Vec<Duration>,
}

#[derive(Debug)]
struct Provider {
    state: Mutex<State>,
    /// Whether what is held may go.
    gate: watch::Sender<bool>,
    answer: Answer,
    tiny: Answer,
}

/// A whole answer, head included, and where its distinct digits stand.
#[derive(Debug)]
struct Answer {
    bytes: Vec<u8>,
    digits_at: usize,
}

impl BenchProvider {
    /// Serves until standard input is closed. The first line of standard output is the port.
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let mut tls = None;
        if let Some(path) = &self.ca_file {
            let authority = TestAuthority::new();
            tokio::fs::write(path, authority.pem()).await?;
            tls = Some(authority.acceptor(&["http/1.1"]));
        }
        println!("{}", listener.local_addr()?.port());
        let provider = Arc::new(Provider {
            state: Mutex::default(),
            gate: watch::Sender::new(false),
            answer: Answer::of(ANSWER_BYTES),
            tiny: Answer::of(TINY_BYTES),
        });
        end_with_parent();
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            let (provider, tls) = (Arc::clone(&provider), tls.clone());
            // A connection that breaks is its caller's affair: a daemon may have been killed.
            tokio::spawn(async move { provider.greet(stream, tls).await });
        }
    }
}

impl Answer {
    /// With a text of so many bytes, and zeros where the digits come.
    fn of(text_bytes: usize) -> Self {
        let zeros = "0".repeat(DIGITS + 2);
        let mut text = format!("answer {zeros}: ");
        while text.len() < text_bytes {
            text.push_str("each requirement is met by a decision that names its cost; ");
        }
        text.truncate(text_bytes);
        let body = format!(
            r#"{{"id":"bench","object":"chat.completion","model":"bench","choices":[{{"index":0,"message":{{"role":"assistant","content":"{text}"}},"finish_reason":"stop"}}],"usage":{{"prompt_tokens":260,"completion_tokens":256,"total_tokens":516}}}}"#
        );
        let head =
            format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", body.len());
        let bytes = format!("{head}{body}").into_bytes();
        let digits_at = find(&bytes, zeros.as_bytes()).unwrap_or(0);
        Self { bytes, digits_at }
    }

    fn write(&self, run: &[u8], call: u32, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.bytes);
        out[self.digits_at..self.digits_at + DIGITS].copy_from_slice(run);
        out[self.digits_at + DIGITS + 1] = b'0' + u8::try_from(call % 10).unwrap_or(0);
    }
}

impl Provider {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds out whether the connection is encrypted. What the measurement itself asks is not.
    async fn greet(&self, stream: TcpStream, tls: Option<TlsAcceptor>) -> anyhow::Result<()> {
        if let Some(tls) = tls {
            let mut first = [0];
            stream.peek(&mut first).await?;
            if first == [HANDSHAKE] {
                return self.serve(tls.accept(stream).await?).await;
            }
        }
        self.serve(stream).await
    }

    async fn serve(&self, mut stream: impl AsyncRead + AsyncWrite + Unpin) -> anyhow::Result<()> {
        let mut buffer = Vec::with_capacity(4096);
        let mut out = Vec::with_capacity(2048);
        loop {
            let (head, length) = loop {
                if let Some(end) = find(&buffer, b"\r\n\r\n") {
                    let length = header(&buffer[..end], b"content-length").unwrap_or(0);
                    if buffer.len() >= end + 4 + length {
                        break (end + 4, length);
                    }
                }
                if stream.read_buf(&mut buffer).await? == 0 {
                    return Ok(());
                }
            };
            out.clear();
            if buffer.starts_with(b"POST /v1/chat") {
                self.complete(&buffer[head..head + length], &mut out).await;
            } else if buffer.starts_with(b"GET /watch") {
                return self.watch(stream).await;
            } else {
                self.control(&buffer[..head], &mut out);
            }
            stream.write_all(&out).await?;
            buffer.drain(..head + length);
        }
    }

    /// Writes the answer to a request for a completion.
    async fn complete(&self, body: &[u8], out: &mut Vec<u8>) {
        let at = find(body, b"run-").map_or(body.len(), |at| at + 4);
        let digits = body.get(at..at + DIGITS).unwrap_or(b"0000000000");
        let run = std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok()).unwrap_or(0);
        let call = self.arrived(run);
        let model = find(body, b"\"model\":\"").map_or(&[] as &[u8], |at| &body[at + 9..]);
        let mut answer = &self.answer;
        match model {
            [b'h', ..] => self.held().await,
            [b't', ..] => answer = &self.tiny,
            [b'd', b'0', ..] => {}
            [b'd', digits @ ..] => {
                let end = digits.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(0);
                let ms = std::str::from_utf8(&digits[..end]).ok().and_then(|ms| ms.parse().ok()).unwrap_or(0);
                self.sleep(Duration::from_millis(ms)).await;
            }
            _ => {}
        }
        if call == CALLS_PER_RUN {
            self.state().finished += 1;
        }
        answer.write(digits, call, out);
    }

    /// Notes a call; which one of its run it is.
    fn arrived(&self, run: u64) -> u32 {
        let now = now_nanos();
        let mut state = self.state();
        let record = state.records.entry(run).or_default();
        if record.calls == 0 {
            record.first = now;
        }
        record.last = now;
        record.calls += 1;
        record.calls
    }

    async fn held(&self) {
        // Fails only where the sender is gone, and we are the sender.
        let _ = self.gate.subscribe().wait_for(|is_open| *is_open).await;
    }

    async fn sleep(&self, delay: Duration) {
        let arrived = Instant::now();
        let sleeping = {
            let mut state = self.state();
            state.sleeping += 1;
            state.sleeping
        };
        if sleeping <= EXACT_SLEEPERS {
            // The runtime's timer rounds up to a millisecond, four of which would be a tenth of what is measured.
            let asleep = delay.saturating_sub(AWAKE);
            let _ = tokio::task::spawn_blocking(move || std::thread::sleep(asleep)).await;
            while arrived.elapsed() < delay {
                tokio::task::yield_now().await;
            }
        } else {
            tokio::time::sleep(delay).await;
        }
        let mut state = self.state();
        state.sleeping -= 1;
        state.slept.push(arrived.elapsed());
    }

    fn control(&self, head: &[u8], out: &mut Vec<u8>) {
        let mut body = Vec::new();
        if head.starts_with(b"GET /records") {
            for (run, record) in &self.state().records {
                body.extend(run.to_le_bytes());
                body.extend(record.first.to_le_bytes());
                body.extend(record.last.to_le_bytes());
                body.extend(record.calls.to_le_bytes());
            }
        } else if head.starts_with(b"GET /slept") {
            for slept in std::mem::take(&mut self.state().slept) {
                body.extend(u64::try_from(slept.as_nanos()).unwrap_or(u64::MAX).to_le_bytes());
            }
        } else if head.starts_with(b"POST /reset") {
            let mut state = self.state();
            state.slept.clear();
            state.records.clear();
            state.finished = 0;
            self.gate.send_replace(false);
        } else if head.starts_with(b"POST /release") {
            self.gate.send_replace(true);
        }
        out.extend(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len()).bytes());
        out.extend(body);
    }

    /// Tells how many runs have had their last answer, as raw numbers, whenever it has changed.
    async fn watch(&self, mut stream: impl AsyncWrite + Unpin) -> anyhow::Result<()> {
        let mut told = u64::MAX;
        let mut ticks = tokio::time::interval(WATCH_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let finished = self.state().finished;
            if finished != told {
                stream.write_all(&finished.to_le_bytes()).await?;
                told = finished;
            }
        }
    }
}

/// The provider's process, seen from the measurement.
#[derive(Debug)]
pub(crate) struct ProviderProcess {
    _child: Child,
    pub(crate) address: SocketAddr,
    pub(crate) pid: u32,
    /// The folder of its authority's certificate, where it speaks TLS.
    authority: Option<tempfile::TempDir>,
}

/// The certificate's name in its folder.
const CA_FILE: &str = "ca.pem";

impl ProviderProcess {
    pub(crate) async fn start(is_tls: bool) -> anyhow::Result<Self> {
        let authority = if is_tls { Some(tempfile::tempdir()?) } else { None };
        let ca_file = authority.as_ref().map(|folder| folder.path().join(CA_FILE));
        let arguments = ca_file.iter().flat_map(|path| [OsStr::new("--ca-file"), path.as_os_str()]);
        let (child, port) = helper("bench-provider", arguments).await?;
        let pid = child.id().context("the provider has ended")?;
        Ok(Self { _child: child, address: SocketAddr::from(([127, 0, 0, 1], port)), pid, authority })
    }

    pub(crate) fn base_url(&self) -> String {
        format!("{}://{}/v1", if self.authority.is_some() { "https" } else { "http" }, self.address)
    }

    /// The certificate of its authority, where it speaks TLS.
    pub(crate) fn ca_file(&self) -> Option<PathBuf> {
        self.authority.as_ref().map(|folder| folder.path().join(CA_FILE))
    }

    /// Forgets every run, and holds again what is to be held.
    pub(crate) async fn reset(&self) -> anyhow::Result<()> {
        self.control(&post("/reset", "text/plain", "")).await.map(|_| ())
    }

    /// Answers whatever is held, and holds nothing any more.
    pub(crate) async fn release(&self) -> anyhow::Result<()> {
        self.control(&post("/release", "text/plain", "")).await.map(|_| ())
    }

    /// What it remembers, by the run's number.
    pub(crate) async fn records(&self) -> anyhow::Result<HashMap<u64, Record>> {
        let body = self.control(&get("/records")).await?;
        Ok(body.chunks_exact(RECORD_BYTES).filter_map(record).collect())
    }

    /// What the delays really took that were slept since this was last asked.
    pub(crate) async fn slept(&self) -> anyhow::Result<Vec<Duration>> {
        let body = self.control(&get("/slept")).await?;
        Ok(body.as_chunks().0.iter().map(|nanos| Duration::from_nanos(u64::from_le_bytes(*nanos))).collect())
    }

    /// Watches how many runs have had their last answer.
    pub(crate) async fn watch(&self) -> anyhow::Result<Watch> {
        let mut connection = Connection::open(self.address).await?;
        connection.send(&get("/watch")).await?;
        Ok(Watch { connection })
    }

    async fn control(&self, request: &[u8]) -> anyhow::Result<Vec<u8>> {
        let mut connection = Connection::open(self.address).await?;
        let answer = connection.call(request).await?;
        if answer.status != 200 {
            bail!("the provider answered {}", answer.status);
        }
        Ok(answer.body.to_vec())
    }
}

/// The number of runs that have had their last answer, as it changes.
#[derive(Debug)]
pub(crate) struct Watch {
    connection: Connection,
}

impl Watch {
    pub(crate) async fn next(&mut self) -> anyhow::Result<u64> {
        loop {
            let bytes = self.connection.raw().await?;
            let whole = bytes.len() / 8 * 8;
            let Some(last) = bytes[..whole].chunks_exact(8).last().and_then(|last| last.try_into().ok()) else {
                continue;
            };
            let finished = u64::from_le_bytes(last);
            bytes.drain(..whole);
            return Ok(finished);
        }
    }
}

fn record(bytes: &[u8]) -> Option<(u64, Record)> {
    let (run, rest) = bytes.split_first_chunk()?;
    let (first, rest) = rest.split_first_chunk()?;
    let (last, rest) = rest.split_first_chunk()?;
    let (calls, _) = rest.split_first_chunk()?;
    let record = Record {
        first: i64::from_le_bytes(*first),
        last: i64::from_le_bytes(*last),
        calls: u32::from_le_bytes(*calls),
    };
    Some((u64::from_le_bytes(*run), record))
}

/// Ends this process when whoever started it has closed its standard input, or was killed.
pub(super) fn end_with_parent() {
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(0)
    });
}

/// Starts a hidden command of our own as a process; it ends with us. Its first line is its port.
pub(super) async fn helper<'a>(
    command: &str,
    arguments: impl IntoIterator<Item = &'a OsStr>,
) -> anyhow::Result<(Child, u16)> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg(command)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot start {command}"))?;
    let stdout = child.stdout.take().context("a helper without standard output")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line).await?;
    let port = line.trim().parse().with_context(|| format!("{command} said {line:?} instead of its port"))?;
    Ok((child, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_json_of_a_kilobyte() {
        let Answer { bytes: whole, digits_at } = Answer::of(ANSWER_BYTES);
        let body = find(&whole, b"\r\n\r\n").expect("a head") + 4;
        assert_eq!(header(&whole[..body], b"content-length"), Some(whole.len() - body));
        let value: serde_json::Value = serde_json::from_slice(&whole[body..]).expect("JSON");
        let text = value["choices"][0]["message"]["content"].as_str().expect("a text");
        assert_eq!(text.len(), ANSWER_BYTES);
        assert_eq!(&whole[digits_at..digits_at + DIGITS], b"0000000000");
    }

    #[test]
    fn a_record_survives_the_wire() {
        let mut bytes = Vec::new();
        bytes.extend(5_u64.to_le_bytes());
        bytes.extend(7_i64.to_le_bytes());
        bytes.extend(9_i64.to_le_bytes());
        bytes.extend(3_u32.to_le_bytes());
        assert_eq!(bytes.len(), RECORD_BYTES);
        assert_eq!(record(&bytes), Some((5, Record { first: 7, last: 9, calls: 3 })));
    }
}
