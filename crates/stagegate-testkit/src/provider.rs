//! A fake provider on a real socket: owns the three vendors' protocols as a server speaks them, what it answers, and
//! the record of what it was asked. It never checks a key and never leaves loopback.
//!
//! ```no_run
//! # async fn example() {
//! use stagegate_testkit::provider::{FakeProvider, Reply, contains};
//!
//! let provider = FakeProvider::start().await;
//! provider.on(contains("risk")).once(Reply::status(500, "{}")).always(Reply::text("No risks."));
//! // … point a base URL at `provider.openai_base_url()` and run something …
//! assert_eq!(provider.calls().len(), 2);
//! # }
//! ```
//!
//! Rules are tried in the order in which they were added; one that has nothing left to say is passed over. Without a
//! rule the answer is an echo that minimally fits the JSON Schema which the request asks for: a judge's `score` is
//! [`FakeProvider::set_judge_score`]'s.

pub mod dialects;
mod shape;

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use axum::body::Body;
use hyper::{Request, Response};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};

use crate::{
    listen::{Closed, accept, accept_tls},
    tls::TestAuthority,
};

/// The largest request body that is read, in bytes.
const REQUEST_MAX_BYTES: usize = 64 * 1024 * 1024;

/// Which vendor's protocol a call spoke.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// `POST …/chat/completions`
    Openai,
    /// `POST …/messages`
    Anthropic,
    /// `POST …/models/{model}:generateContent`
    Gemini,
    /// Any other path: answered with 404.
    Unknown,
}

/// What a call seems to be for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PurposeHint {
    /// A stage's own answer.
    Stage,
    /// A judge's verdict: the schema asks for `score` and `reason`.
    Judge,
}

/// One request as it arrived.
#[derive(Debug, Clone)]
pub struct Call {
    /// Whether it came over HTTP/2.
    pub is_http2: bool,
    /// Counted from 0 in the order of arrival.
    pub index: usize,
    /// The vendor's protocol.
    pub protocol: Protocol,
    /// Method and path, without the query.
    pub path: String,
    /// The query, where there is one.
    pub query: Option<String>,
    /// The model's name.
    pub model: String,
    /// Every message's text in order, the system's first, separated by blank lines.
    pub prompt_text: String,
    /// The last user message.
    pub last_user_text: String,
    /// The schema that the answer must fit, where the request carries one.
    pub schema: Option<Value>,
    /// What it seems to be for.
    pub purpose_hint: PurposeHint,
    /// The headers, lower case; secrets included.
    pub headers: BTreeMap<String, String>,
    /// The body as JSON; null where it was none.
    pub body: Value,
    /// When it arrived.
    pub started: Instant,
    /// When its answer was handed to the socket, or when the client went away; None while it is under way.
    pub finished: Option<Instant>,
    /// The client went away before there was an answer.
    pub abandoned: bool,
    /// A vendor would charge for it: it was not refused, whether or not its client heard the answer.
    pub charged: bool,
}

impl Call {
    /// Whether both were under way at one time.
    pub fn overlaps(&self, other: &Self) -> bool {
        let before = |a: &Self, b: &Self| a.finished.is_some_and(|end| end <= b.started);
        !before(self, other) && !before(other, self)
    }
}

/// Which calls a rule is for.
pub type Matcher = Arc<dyn Fn(&Call) -> bool + Send + Sync>;

/// Every call.
pub fn any() -> Matcher {
    Arc::new(|_| true)
}

/// Calls whose messages hold this text.
pub fn contains(text: impl Into<String>) -> Matcher {
    let text = text.into();
    Arc::new(move |call| call.prompt_text.contains(&text))
}

/// Calls of this model.
pub fn model(name: impl Into<String>) -> Matcher {
    let name = name.into();
    Arc::new(move |call| call.model == name)
}

/// Calls that judge.
pub fn judges() -> Matcher {
    Arc::new(|call| call.purpose_hint == PurposeHint::Judge)
}

/// Calls of stages: those that do not judge.
pub fn stages() -> Matcher {
    Arc::new(|call| call.purpose_hint == PurposeHint::Stage)
}

/// Calls that both matchers take.
pub fn both(first: Matcher, second: Matcher) -> Matcher {
    Arc::new(move |call| first(call) && second(call))
}

/// How an answer ended, in words of no vendor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Complete.
    Stop,
    /// Cut at the token limit.
    Length,
    /// Filtered or refused.
    Refused,
}

/// What is answered, and how.
#[derive(Debug, Clone)]
pub struct Reply {
    content: Content,
    status: u16,
    headers: Vec<(String, String)>,
    usage: Option<(u64, u64)>,
    end: End,
    delivery: Delivery,
    delay: Option<Duration>,
    gate: Option<watch::Receiver<bool>>,
}

#[derive(Debug, Clone)]
enum Content {
    Echo,
    Text(String),
    Raw(String),
    Huge(usize),
}

#[derive(Debug, Clone, Copy)]
enum Delivery {
    Whole,
    CutHalfway,
    Drip { chunk_bytes: usize, pause: Duration },
    Close,
    Hang,
}

impl Reply {
    fn new(content: Content) -> Self {
        Self {
            content,
            status: 200,
            headers: Vec::new(),
            usage: Some((100, 20)),
            end: End::Stop,
            delivery: Delivery::Whole,
            delay: None,
            gate: None,
        }
    }

    /// The default answer: an echo, or what minimally fits the schema asked for.
    pub fn echo() -> Self {
        Self::new(Content::Echo)
    }

    /// An answer with this text, in the shape of whichever protocol asks.
    pub fn text(text: impl Into<String>) -> Self {
        Self::new(Content::Text(text.into()))
    }

    /// An answer with this JSON (for Anthropic: as the input of the tool that was forced).
    #[expect(clippy::needless_pass_by_value, reason = "reads better in tests: Reply::json(json!({…}))")]
    pub fn json(value: Value) -> Self {
        Self::new(Content::Text(value.to_string()))
    }

    /// A judge's verdict.
    pub fn verdict(score: f64, reason: &str) -> Self {
        Self::json(json!({ "score": score, "reason": reason }))
    }

    /// This status and body, as they are.
    pub fn status(status: u16, body: impl Into<String>) -> Self {
        Self { status, ..Self::new(Content::Raw(body.into())) }
    }

    /// 200 with this body, as it is.
    pub fn raw(body: impl Into<String>) -> Self {
        Self::status(200, body)
    }

    /// 200 with a body of so many bytes.
    pub fn huge(bytes: usize) -> Self {
        Self::new(Content::Huge(bytes))
    }

    /// No answer ever; the connection stays open.
    pub fn hang() -> Self {
        Self { delivery: Delivery::Hang, ..Self::echo() }
    }

    /// The connection is closed without a byte of answer.
    pub fn close() -> Self {
        Self { delivery: Delivery::Close, ..Self::echo() }
    }

    /// Prompt and answer tokens that are reported. Default: 100 and 20.
    #[must_use]
    pub fn usage(mut self, input: u64, output: u64) -> Self {
        self.usage = Some((input, output));
        self
    }

    /// No usage is reported.
    #[must_use]
    pub fn without_usage(mut self) -> Self {
        self.usage = None;
        self
    }

    /// How the answer ended.
    #[must_use]
    pub fn end(mut self, end: End) -> Self {
        self.end = end;
        self
    }

    /// With a header.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// After so long instead of [`FakeProvider::set_latency`]'s.
    #[must_use]
    pub fn after(mut self, delay: Duration) -> Self {
        self.delay = Some(delay);
        self
    }

    /// Not before the gate is open (or gone).
    #[must_use]
    pub fn when(mut self, gate: watch::Receiver<bool>) -> Self {
        self.gate = Some(gate);
        self
    }

    /// The connection breaks after half of the body.
    #[must_use]
    pub fn cut_halfway(mut self) -> Self {
        self.delivery = Delivery::CutHalfway;
        self
    }

    /// The body comes in small pieces, with a pause before each.
    #[must_use]
    pub fn drip(mut self, chunk_bytes: usize, pause: Duration) -> Self {
        self.delivery = Delivery::Drip { chunk_bytes: chunk_bytes.max(1), pause };
        self
    }
}

struct Rule {
    matches: Matcher,
    queue: VecDeque<Reply>,
    always: Option<Reply>,
}

#[derive(Default)]
struct Script {
    rules: Vec<Rule>,
    calls: Vec<Call>,
    latency: Duration,
    judge_score: Option<f64>,
}

#[derive(Default)]
struct Shared {
    script: Mutex<Script>,
    under_way: AtomicUsize,
    most_under_way: AtomicUsize,
}

impl Shared {
    fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The server. It stops when this is dropped.
pub struct FakeProvider {
    scheme: &'static str,
    address: SocketAddr,
    shared: Arc<Shared>,
    server: JoinHandle<()>,
}

impl std::fmt::Debug for FakeProvider {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FakeProvider").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Drop for FakeProvider {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl FakeProvider {
    /// Starts on a free port of loopback.
    ///
    /// # Panics
    /// Where loopback gives no port: nothing can be tested then.
    #[expect(clippy::expect_used, reason = "test support: without a port there is no test")]
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port on loopback");
        let address = listener.local_addr().expect("a bound listener has an address");
        let shared = Arc::new(Shared::default());
        let asked = Arc::clone(&shared);
        let server = tokio::spawn(accept(listener, move |request| serve(Arc::clone(&asked), request)));
        Self { scheme: "http", address, shared, server }
    }

    /// The same over TLS, with a certificate of this authority. It speaks these protocols (`h2`, `http/1.1`), and over HTTP/2
    /// answers so many requests of a connection at once.
    ///
    /// # Panics
    /// Where loopback gives no port: nothing can be tested then.
    #[expect(clippy::expect_used, reason = "test support: without a port there is no test")]
    pub async fn start_tls(authority: &TestAuthority, protocols: &[&str], streams_max: u32) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port on loopback");
        let address = listener.local_addr().expect("a bound listener has an address");
        let shared = Arc::new(Shared::default());
        let (asked, tls) = (Arc::clone(&shared), authority.acceptor(protocols));
        let answer = move |request| serve(Arc::clone(&asked), request);
        let server = tokio::spawn(accept_tls(listener, tls, streams_max, answer));
        Self { scheme: "https", address, shared, server }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Scheme, host and port.
    pub fn origin(&self) -> String {
        format!("{}://{}", self.scheme, self.address)
    }

    /// For a provider of kind `openai`.
    pub fn openai_base_url(&self) -> String {
        format!("{}/v1", self.origin())
    }

    /// For a provider of kind `anthropic`.
    pub fn anthropic_base_url(&self) -> String {
        self.origin()
    }

    /// For a provider of kind `gemini`.
    pub fn gemini_base_url(&self) -> String {
        self.origin()
    }

    /// How long each answer takes, where its reply does not say otherwise. Default: none.
    pub fn set_latency(&self, latency: Duration) {
        self.shared.script().latency = latency;
    }

    /// The score of judges' default verdicts. Default: 0.95.
    pub fn set_judge_score(&self, score: f64) {
        self.shared.script().judge_score = Some(score);
    }

    /// Adds a rule; say next what it answers.
    pub fn on(&self, matches: Matcher) -> RuleBuilder<'_> {
        let mut script = self.shared.script();
        script.rules.push(Rule { matches, queue: VecDeque::new(), always: None });
        RuleBuilder { provider: self, index: script.rules.len() - 1 }
    }

    /// Forgets every rule.
    pub fn clear_rules(&self) {
        self.shared.script().rules.clear();
    }

    /// What it was asked, in the order of arrival.
    pub fn calls(&self) -> Vec<Call> {
        self.shared.script().calls.clone()
    }

    /// How often it was asked.
    pub fn call_count(&self) -> usize {
        self.shared.script().calls.len()
    }

    /// The calls that a matcher takes.
    pub fn calls_where(&self, matches: &Matcher) -> Vec<Call> {
        self.shared.script().calls.iter().filter(|call| matches(call)).cloned().collect()
    }

    /// Forgets what it was asked. Calls under way are not recorded any more.
    pub fn clear_calls(&self) {
        self.shared.script().calls.clear();
        self.shared.most_under_way.store(0, Ordering::SeqCst);
    }

    /// The most calls that were under way at one time.
    pub fn most_under_way(&self) -> usize {
        self.shared.most_under_way.load(Ordering::SeqCst)
    }
}

/// Says what a rule answers. Queued replies are used up one by one, then the lasting one, if there is any.
#[derive(Debug)]
pub struct RuleBuilder<'a> {
    provider: &'a FakeProvider,
    index: usize,
}

impl RuleBuilder<'_> {
    fn change(self, change: impl FnOnce(&mut Rule)) -> Self {
        if let Some(rule) = self.provider.shared.script().rules.get_mut(self.index) {
            change(rule);
        }
        self
    }

    /// Answers so once. (The builder may be dropped: the rule stands.)
    #[expect(clippy::must_use_candidate, clippy::return_self_not_must_use, reason = "the rule is changed in place")]
    pub fn once(self, reply: Reply) -> Self {
        self.change(|rule| rule.queue.push_back(reply))
    }

    /// Answers so `n` times.
    #[expect(clippy::must_use_candidate, clippy::return_self_not_must_use, reason = "the rule is changed in place")]
    pub fn times(self, n: usize, reply: Reply) -> Self {
        self.change(|rule| rule.queue.extend(std::iter::repeat_n(reply, n)))
    }

    /// Answers so from then on. (`respond` reads better where it is all that a rule says.)
    #[expect(clippy::must_use_candidate, clippy::return_self_not_must_use, reason = "the rule is changed in place")]
    pub fn always(self, reply: Reply) -> Self {
        self.change(|rule| rule.always = Some(reply))
    }

    /// Answers so, each time.
    pub fn respond(self, reply: Reply) {
        let _ = self.always(reply);
    }
}

/// Records the end of a call, however it comes: dropping the service's future is how hyper tells of a client gone.
struct UnderWay {
    shared: Arc<Shared>,
    started: Instant,
    index: usize,
    answered: bool,
}

impl UnderWay {
    fn begin(shared: Arc<Shared>, call: &mut Call) -> Self {
        let now_under_way = shared.under_way.fetch_add(1, Ordering::SeqCst) + 1;
        shared.most_under_way.fetch_max(now_under_way, Ordering::SeqCst);
        let mut script = shared.script();
        call.index = script.calls.len();
        script.calls.push(call.clone());
        drop(script);
        Self { shared, started: call.started, index: call.index, answered: false }
    }
}

impl UnderWay {
    fn note_charged(&self, charged: bool) {
        let mut script = self.shared.script();
        if let Some(call) = script.calls.get_mut(self.index).filter(|call| call.started == self.started) {
            call.charged = charged;
        }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.shared.under_way.fetch_sub(1, Ordering::SeqCst);
        let mut script = self.shared.script();
        // After `clear_calls` another call may stand at this index.
        if let Some(call) = script.calls.get_mut(self.index).filter(|call| call.started == self.started) {
            call.finished = Some(Instant::now());
            call.abandoned = !self.answered;
        }
    }
}

async fn serve(shared: Arc<Shared>, request: Request<hyper::body::Incoming>) -> Result<Response<Body>, Closed> {
    let started = Instant::now();
    let (head, body) = request.into_parts();
    let bytes = axum::body::to_bytes(Body::new(body), REQUEST_MAX_BYTES).await.map_err(|_| Closed)?;
    let mut call = shape::read_call(&head, &bytes, started);
    let mut under_way = UnderWay::begin(Arc::clone(&shared), &mut call);
    let (reply, latency, score) = choose(&shared, &call);
    under_way.note_charged(reply.status == 200);
    let delay = reply.delay.unwrap_or(latency);
    if !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
    if let Some(gate) = &reply.gate {
        let _ = gate.clone().wait_for(|open| *open).await; // A gate whose test is over holds nobody.
    }
    if matches!(reply.delivery, Delivery::Hang) {
        std::future::pending::<()>().await;
    }
    under_way.answered = true;
    deliver(&reply, shape::body(&call, &reply, score))
}

fn choose(shared: &Shared, call: &Call) -> (Reply, Duration, f64) {
    let mut script = shared.script();
    let (latency, score) = (script.latency, script.judge_score.unwrap_or(0.95));
    if call.protocol == Protocol::Unknown {
        return (Reply::status(404, r#"{"error":{"message":"no such path"}}"#), latency, score);
    }
    let reply = script.rules.iter_mut().filter(|rule| (rule.matches)(call)).find_map(|rule| {
        let queued = rule.queue.pop_front();
        queued.or_else(|| rule.always.clone())
    });
    (reply.unwrap_or_else(Reply::echo), latency, score)
}

fn deliver(reply: &Reply, text: String) -> Result<Response<Body>, Closed> {
    let mut response = Response::builder().status(reply.status);
    if !reply.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-type")) {
        response = response.header("content-type", "application/json");
    }
    for (name, value) in &reply.headers {
        response = response.header(name, value);
    }
    let body = match reply.delivery {
        Delivery::Close | Delivery::Hang => return Err(Closed),
        Delivery::Whole => Body::from(text),
        Delivery::CutHalfway => {
            // Half of the announced length, a moment so that it reaches the wire, then an error, which breaks the
            // connection.
            response = response.header("content-length", text.len());
            let half = text.into_bytes();
            let half = half[..half.len() / 2].to_vec();
            Body::from_stream(futures::stream::unfold(Some(half), |state| async move {
                match state {
                    Some(half) if !half.is_empty() => Some((Ok(half), Some(Vec::new()))),
                    Some(_) => {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                        Some((Err(Closed), None))
                    }
                    None => None,
                }
            }))
        }
        Delivery::Drip { chunk_bytes, pause } => {
            let rest = VecDeque::from(text.into_bytes());
            Body::from_stream(futures::stream::unfold(rest, move |mut rest| async move {
                if rest.is_empty() {
                    return None;
                }
                tokio::time::sleep(pause).await;
                let piece: Vec<u8> = rest.drain(..chunk_bytes.min(rest.len())).collect();
                Some((Ok::<_, Closed>(piece), rest))
            }))
        }
    };
    response.body(body).map_err(|_| Closed)
}
