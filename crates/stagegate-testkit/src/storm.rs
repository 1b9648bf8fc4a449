//! A provider that fails by a seeded plan and keeps books: owns what each call is answered with, and the record of what
//! was charged and what of it arrived. It speaks the OpenAI protocol under `/<caller>/v1/chat/completions`, so that each
//! replica is known by its base URL.
//!
//! A prompt begins with `key=<key> stage=<stage>`; `gate` in the stage's name has some answers fail a gate, `frail` has
//! some calls refused for good, `json` as the format asked for gets JSON. The same request fails in the same way with the same seed, whoever asks and
//! whenever.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use axum::body::{Body, Bytes};
use hyper::{Request, Response};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinHandle};

use crate::listen::{Closed, accept};

/// The largest request body that is read, in bytes.
const REQUEST_MAX_BYTES: usize = 4 * 1024 * 1024;
/// From the fourth time on a request is answered well: a run must not fail by bad luck alone for ever.
const FAULTY_ASKS: u32 = 4;
/// Words of every answer, so that it has a length.
const FILLER: &str = "This sentence is here so that an answer has about the length that real ones have. ";
/// Stands in an answer that its gate will not pass.
pub const BAD_WORD: &str = "BAD";
/// Prompt and answer tokens that every answer reports.
pub const USAGE: (u64, u64) = (120, 40);

/// What a call is answered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Answer {
    /// A good answer.
    Good,
    /// A good answer, late.
    Slow,
    /// A whole answer whose gate fails.
    Bad,
    /// A whole answer that was cut at the token limit.
    Truncated,
    /// 200 with a body that is no JSON.
    Garbled,
    /// A whole answer that says nothing.
    Empty,
    /// A good answer that does not tell what it took.
    NoUsage,
    /// 200 with an error in place of an answer; asked again, it may go well.
    ErrorInside,
    /// A refusal in the model's own words; asked again, it refuses again.
    Refused,
    /// The connection breaks in the middle of a good answer.
    Cut,
    /// 429 with a Retry-After short enough to be waited out in memory.
    LimitedShort,
    /// 429 with a Retry-After long enough to park.
    LimitedLong,
    /// 429 that no waiting helps against: there is no quota left.
    Quota,
    /// 500.
    Failed,
    /// 529: overloaded.
    Overloaded,
    /// The connection closes without a byte.
    Closed,
    /// Nothing ever; the connection stays.
    Hang,
}

impl Answer {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Slow => "slow",
            Self::Bad => "fails its gate",
            Self::Truncated => "truncated",
            Self::Garbled => "no JSON",
            Self::Empty => "empty",
            Self::NoUsage => "good, without usage",
            Self::ErrorInside => "200 with an error inside",
            Self::Refused => "refusal",
            Self::Cut => "cut halfway",
            Self::LimitedShort => "429, short",
            Self::LimitedLong => "429, long",
            Self::Quota => "429, no quota",
            Self::Failed => "500",
            Self::Overloaded => "529",
            Self::Closed => "closed without a byte",
            Self::Hang => "hang",
        }
    }

    /// Whether a real provider would charge for it: it produced an answer, whether or not that could be used.
    pub fn is_charged(self) -> bool {
        let produced =
            matches!(self, Self::Bad | Self::Truncated | Self::Garbled | Self::Empty | Self::Refused | Self::Cut);
        produced || self.is_usable()
    }

    /// Whether the whole answer, received, is one that can be reused.
    pub fn is_usable(self) -> bool {
        matches!(self, Self::Good | Self::Slow | Self::NoUsage)
    }

    /// Whether the same request must not be sent again by itself.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Quota | Self::Refused)
    }
}

/// How far a call came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It has no answer yet.
    UnderWay,
    /// All that was to be said was handed to the socket.
    Delivered,
    /// The caller went away before the answer.
    Abandoned,
}

/// One call.
#[derive(Debug, Clone)]
pub struct Call {
    /// Who asked: the first segment of the path.
    pub caller: String,
    /// The request's digest: what is the same here is the same request.
    pub fingerprint: u64,
    /// The key in its prompt.
    pub key: String,
    /// The stage in its prompt.
    pub stage: String,
    /// Which time this request was asked, from 0.
    pub nth: u32,
    /// What it is answered with.
    pub answer: Answer,
    /// How far it came.
    pub fate: Fate,
    /// When it arrived.
    pub started: Instant,
    /// When its fate was clear.
    pub ended: Option<Instant>,
}

/// How often each thing goes wrong, in thousandths, and how long answers take.
#[derive(Debug, Clone)]
pub struct Mix {
    /// In order; what is left of the thousand is good.
    pub faults: Vec<(Answer, u32)>,
    /// The same for stages that may fail for good, before the others.
    pub lasting: Vec<(Answer, u32)>,
    /// Answers of stages with a gate that fail it, in thousandths of the good ones.
    pub bad: u32,
    /// The time of a usual answer: from, to.
    pub latency: (Duration, Duration),
    /// The time of a slow answer: from, to.
    pub slow: (Duration, Duration),
    /// The Retry-After of the short and of the long 429, in seconds.
    pub retry_after_s: (u32, u32),
}

impl Default for Mix {
    fn default() -> Self {
        Self {
            faults: vec![
                (Answer::Slow, 40),
                (Answer::LimitedShort, 25),
                (Answer::LimitedLong, 12),
                (Answer::Failed, 25),
                (Answer::Overloaded, 15),
                (Answer::Cut, 20),
                (Answer::Closed, 10),
                (Answer::Garbled, 12),
                (Answer::Truncated, 12),
                (Answer::Hang, 6),
                (Answer::Empty, 10),
                (Answer::NoUsage, 20),
                (Answer::ErrorInside, 12),
            ],
            lasting: vec![(Answer::Quota, 30), (Answer::Refused, 30)],
            bad: 350,
            latency: (Duration::from_millis(20), Duration::from_millis(400)),
            slow: (Duration::from_millis(600), Duration::from_millis(1500)),
            retry_after_s: (1, 4),
        }
    }
}

impl Mix {
    /// Nothing goes wrong.
    pub fn calm() -> Self {
        Self { faults: Vec::new(), lasting: Vec::new(), bad: 0, ..Self::default() }
    }
}

#[derive(Debug)]
struct Book {
    mix: Mix,
    outage: Option<Answer>,
    rate: Option<Rate>,
    calls: Vec<Call>,
    asked: HashMap<u64, u32>,
}

/// So many calls in each window are answered; the others are told to come back when it is over.
#[derive(Debug)]
struct Rate {
    calls: u32,
    window: Duration,
    /// When the window began, and how many calls came in it.
    since: Instant,
    came: u32,
}

impl Rate {
    /// Counts a call; where it is one too many, how long the window still is.
    fn refuses(&mut self, now: Instant) -> Option<Duration> {
        if now.duration_since(self.since) >= self.window {
            (self.since, self.came) = (now, 0);
        }
        self.came += 1;
        (self.came > self.calls).then(|| self.window.saturating_sub(now.duration_since(self.since)))
    }
}

#[derive(Debug)]
struct Shared {
    seed: u64,
    book: Mutex<Book>,
}

impl Shared {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The server. It stops when this is dropped.
#[derive(Debug)]
pub struct Storm {
    address: SocketAddr,
    shared: Arc<Shared>,
    server: JoinHandle<()>,
}

impl Drop for Storm {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Storm {
    /// Starts on a free port of loopback.
    pub async fn start(seed: u64, mix: Mix) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let book = Book { mix, outage: None, rate: None, calls: Vec::new(), asked: HashMap::new() };
        let shared = Arc::new(Shared { seed, book: Mutex::new(book) });
        let asked = Arc::clone(&shared);
        let server = tokio::spawn(accept(listener, move |request| serve(Arc::clone(&asked), request)));
        Ok(Self { address, shared, server })
    }

    /// For a provider of kind `openai`; `caller` is who will use it.
    pub fn base_url(&self, caller: &str) -> String {
        format!("http://{}/{caller}/v1", self.address)
    }

    /// From now on other things go wrong.
    pub fn set_mix(&self, mix: Mix) {
        self.shared.book().mix = mix;
    }

    /// From now on every call is answered so; None ends that.
    pub fn set_outage(&self, answer: Option<Answer>) {
        self.shared.book().outage = answer;
    }

    /// From now on the provider answers so many calls of all callers together in each window; None ends that.
    pub fn set_rate(&self, rate: Option<(u32, Duration)>) {
        let rate = rate.map(|(calls, window)| Rate { calls, window, since: Instant::now(), came: 0 });
        self.shared.book().rate = rate;
    }

    /// The books: every call, in the order of arrival.
    pub fn calls(&self) -> Vec<Call> {
        self.shared.book().calls.clone()
    }

    /// How many calls there were.
    pub fn call_count(&self) -> usize {
        self.shared.book().calls.len()
    }
}

/// Keeps a call's line in the books; dropped before the answer was handed over, the caller went away.
struct Line {
    shared: Arc<Shared>,
    index: usize,
    delivered: bool,
}

impl Drop for Line {
    fn drop(&mut self) {
        let mut book = self.shared.book();
        if let Some(call) = book.calls.get_mut(self.index) {
            call.fate = if self.delivered { Fate::Delivered } else { Fate::Abandoned };
            call.ended = Some(Instant::now());
        }
    }
}

struct Planned {
    answer: Answer,
    delay: Duration,
    retry_after_s: u32,
}

async fn serve(shared: Arc<Shared>, request: Request<hyper::body::Incoming>) -> Result<Response<Body>, Closed> {
    let (head, body) = request.into_parts();
    let mut segments = head.uri.path().trim_start_matches('/').splitn(2, '/');
    let (caller, rest) = (segments.next().unwrap_or_default().to_owned(), segments.next().unwrap_or_default());
    if rest != "v1/chat/completions" {
        return Response::builder().status(404).body(Body::from("{}")).map_err(|_| Closed);
    }
    let bytes = axum::body::to_bytes(Body::new(body), REQUEST_MAX_BYTES).await.map_err(|_| Closed)?;
    let asked: Value = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
    let (planned, call, mut line) = book(&shared, caller, &bytes, &asked);
    tokio::time::sleep(planned.delay).await;
    let text = completion(&call, planned.answer, &asked);
    let response = Response::builder().header("content-type", "application/json");
    match planned.answer {
        Answer::Hang => {
            std::future::pending::<()>().await;
            Err(Closed)
        }
        Answer::Closed => {
            line.delivered = true;
            Err(Closed)
        }
        Answer::Failed | Answer::Overloaded | Answer::LimitedShort | Answer::LimitedLong | Answer::Quota => {
            line.delivered = true;
            refuse(planned.answer, planned.retry_after_s)
        }
        Answer::Cut => {
            let half = Bytes::copy_from_slice(&text.as_bytes()[..text.len() / 2]);
            let pieces = futures::stream::unfold((Some(half), line), |(half, mut line)| async move {
                if let Some(half) = half {
                    return Some((Ok(half), (None, line)));
                }
                // A moment, so that the half reaches the wire before the connection breaks.
                tokio::time::sleep(Duration::from_millis(10)).await;
                line.delivered = true;
                Some((Err(Closed), (None, line)))
            });
            response.header("content-length", text.len()).body(Body::from_stream(pieces)).map_err(|_| Closed)
        }
        _ => {
            let length = text.len();
            let whole = futures::stream::unfold((Some(text), line), |(text, mut line)| async move {
                let text = text?;
                line.delivered = true;
                Some((Ok::<_, Closed>(Bytes::from(text)), (None, line)))
            });
            response.header("content-length", length).body(Body::from_stream(whole)).map_err(|_| Closed)
        }
    }
}

/// Enters the call, and decides by the seed what it is answered with.
fn book(shared: &Arc<Shared>, caller: String, bytes: &[u8], asked: &Value) -> (Planned, Call, Line) {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    let fingerprint = hasher.finish();
    let prompt = asked["messages"].as_array().into_iter().flatten().find_map(|m| m["content"].as_str());
    let word = |name: &str| {
        let found = prompt.unwrap_or_default().split_whitespace().find_map(|word| word.strip_prefix(name));
        found.unwrap_or_default().to_owned()
    };
    let mut book = shared.book();
    let nth = *book.asked.entry(fingerprint).and_modify(|n| *n += 1).or_insert(0);
    let stage = word("stage=");
    let mut rng = StdRng::seed_from_u64(shared.seed ^ fingerprint ^ (u64::from(nth) << 48));
    let mut planned = plan(&book, &mut rng, nth, &stage);
    if let Some(left) = book.rate.as_mut().and_then(|rate| rate.refuses(Instant::now())) {
        let retry_after_s = u32::try_from(left.as_millis().div_ceil(1_000)).unwrap_or(u32::MAX);
        planned = Planned { answer: Answer::LimitedShort, delay: Duration::ZERO, retry_after_s };
    }
    let call = Call {
        caller,
        fingerprint,
        key: word("key="),
        stage,
        nth,
        answer: planned.answer,
        fate: Fate::UnderWay,
        started: Instant::now(),
        ended: None,
    };
    let index = book.calls.len();
    book.calls.push(call.clone());
    (planned, call, Line { shared: Arc::clone(shared), index, delivered: false })
}

fn plan(book: &Book, rng: &mut StdRng, nth: u32, stage: &str) -> Planned {
    let mix = &book.mix;
    let mut drawn = rng.random_range(0..1000_u32);
    let mut answer = Answer::Good;
    if nth < FAULTY_ASKS {
        let lasting = mix.lasting.iter().filter(|_| stage.contains("frail"));
        for (fault, share) in lasting.chain(&mix.faults) {
            if drawn < *share {
                answer = *fault;
                break;
            }
            drawn -= *share;
        }
    }
    if answer == Answer::Good && stage.contains("gate") && rng.random_range(0..1000_u32) < mix.bad {
        answer = Answer::Bad;
    }
    let (from, to) = if answer == Answer::Slow { mix.slow } else { mix.latency };
    let delay = from + (to.saturating_sub(from)).mul_f64(rng.random());
    let answer = book.outage.unwrap_or(answer);
    let retry_after_s = if answer == Answer::LimitedLong { mix.retry_after_s.1 } else { mix.retry_after_s.0 };
    Planned { answer, delay, retry_after_s }
}

fn refuse(answer: Answer, retry_after_s: u32) -> Result<Response<Body>, Closed> {
    let (status, kind) = match answer {
        Answer::Failed => (500, "server_error"),
        Answer::Overloaded => (529, "overloaded_error"),
        Answer::Quota => (429, "insufficient_quota"),
        _ => (429, "rate_limit_exceeded"),
    };
    let mut response = Response::builder().status(status).header("content-type", "application/json");
    if matches!(answer, Answer::LimitedShort | Answer::LimitedLong) {
        response = response.header("retry-after", retry_after_s);
    }
    let body = json!({ "error": { "message": "not now", "type": kind, "code": kind } });
    response.body(Body::from(body.to_string())).map_err(|_| Closed)
}

/// The body of a 200. What an answer says depends on the request alone.
fn completion(call: &Call, answer: Answer, asked: &Value) -> String {
    if answer == Answer::Garbled {
        return "<html>504 Gateway Timeout</html>".to_owned();
    }
    if answer == Answer::ErrorInside {
        return json!({ "error": { "message": "no capacity", "type": "server_error", "code": 503 } }).to_string();
    }
    let mark = format!("stage {} of {} answers {:016x}. ", call.stage, call.key, call.fingerprint);
    let word = if answer == Answer::Bad { BAD_WORD } else { "well" };
    let text = if asked.get("response_format").is_some_and(|format| !format.is_null()) {
        json!({ "mark": mark, "word": word, "filler": FILLER.repeat(4) }).to_string()
    } else {
        format!("{mark}{word}. {}", FILLER.repeat(6))
    };
    let (content, refusal) = match answer {
        Answer::Empty => (Some(String::new()), None),
        Answer::Refused => (None, Some("I will not help with that.")),
        _ => (Some(text), None),
    };
    let finish = if answer == Answer::Truncated { "length" } else { "stop" };
    let mut body = json!({
        "id": format!("chatcmpl-{:016x}-{}", call.fingerprint, call.nth),
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": asked["model"],
        "choices": [{
            "index": 0,
            "message": { "role": "assistant", "content": content, "refusal": refusal },
            "logprobs": null,
            "finish_reason": finish,
        }],
        "usage": { "prompt_tokens": USAGE.0, "completion_tokens": USAGE.1, "total_tokens": USAGE.0 + USAGE.1 },
    });
    if answer == Answer::NoUsage
        && let Some(body) = body.as_object_mut()
    {
        body.remove("usage");
    }
    body.to_string()
}
