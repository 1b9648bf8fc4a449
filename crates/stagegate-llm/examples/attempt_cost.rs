//! What one attempt at a stage costs in CPU: renders, asks, stores and assesses against a provider on its own thread
//! and a real Redis, and prints the microseconds of CPU per attempt, part by part.
//!
//! ```text
//! cargo run --release -p stagegate-llm --example attempt_cost -- [--only PARTS] [--attempts N] [--at-once N] [--connections N]
//! ```
//!
//! The CPU is what the scheduler counted for the threads of the runtime that does the work; the provider's and Redis's
//! own are left out, the kernel's share of our system calls is in. Linux only: elsewhere it prints zeros.

#![expect(clippy::expect_used, clippy::print_stdout, reason = "a measurement, not a part of the product")]

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use futures::{StreamExt as _, stream::FuturesUnordered};
use serde_json::{Value, json};
use stagegate_core::{
    CallPurpose, Error, ModelRef, Pipeline, RunId, Secret, SystemClock, TenantId, Usage,
    cache::CacheTier,
    pipeline::{CacheMode, Message, Models, OutputFormat, RenderContext, Rendered, Role, Work},
};
use stagegate_llm::{
    CallContext, Llm, RedisConfig, RedisTier, Request,
    config::{LlmConfig, Price, ProviderConfig, ProviderKind},
    prices::Prices,
    provider::{Answer, Finish, Limits, Provider, ProviderError, ProviderRequest},
};
use stagegate_net::{Client, NetConfig};
use stagegate_telemetry::Metrics;
use stagegate_testkit::servers::Redis;
use uuid::Uuid;

/// As the daemon has it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ANSWER_BYTES: usize = 1_000;

/// Five stages as they are in production: text and JSON, checks, 1 KB prompts.
fn pipeline() -> Pipeline {
    let filler = "State each point once, plainly, and name what it rests on. ".repeat(15);
    let source = json!({
        "name": "cost",
        "input": { "type": "object", "required": ["brief"], "properties": { "brief": { "type": "string" } } },
        "defaults": { "model": "local/quick" },
        "stages": [
            { "id": "one", "prompt": format!("{filler}{{{{ input.brief }}}}"),
              "output": { "schema": { "type": "object", "required": ["items"], "properties": {
                  "items": { "type": "array", "minItems": 1, "items": { "type": "string" } } } } } },
            { "id": "two", "needs": ["one"], "prompt": format!("{filler}{{{{ stages.one.output | tojson }}}}"),
              "gate": { "checks": [ { "min_chars": 400 }, { "not_matches": "(?i)lorem ipsum" } ] } },
            { "id": "three", "needs": ["two"], "prompt": format!("Go on.\n{{{{ stages.two.output }}}}"),
              "gate": { "checks": [ { "min_chars": 400 } ] } },
            { "id": "four", "needs": ["three"], "prompt": format!("Go on.\n{{{{ stages.three.output }}}}") },
            { "id": "five", "needs": ["three"],
              "prompt": "{% for item in stages.three.output | lines %}- {{ item }}\n{% endfor %}" },
        ],
    });
    // The last one sees only what it needs; `one` is not upstream of it by name.
    Pipeline::parse(&source.to_string(), &Any).expect("a valid pipeline")
}

struct Any;

impl Models for Any {
    fn check(&self, _: &ModelRef) -> Result<(), Error> {
        Ok(())
    }

    fn is_priced(&self, _: &ModelRef) -> bool {
        true
    }
}

fn text_answer() -> String {
    "A sentence of the answer that says something.\n".repeat(ANSWER_BYTES / 47)
}

fn json_answer() -> String {
    let items: Vec<Value> = (0..20).map(|n| json!(format!("Requirement {n}: it must do what it says."))).collect();
    json!({ "items": items }).to_string()
}

/// Answers every request at once, with JSON where the request asks for it. One thread a connection, off the runtime.
fn vendor() -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    thread::Builder::new()
        .name("vendor".to_owned())
        .spawn(move || {
            for stream in listener.incoming().flatten() {
                let calls = Arc::clone(&counted);
                let serving = thread::Builder::new().name("vendor".to_owned());
                serving.stack_size(128 * 1024).spawn(move || serve(stream, &calls)).expect("a thread");
            }
        })
        .expect("a thread");
    (address, calls)
}

fn serve(mut stream: TcpStream, calls: &AtomicUsize) {
    let answer = |content: &str| {
        let body = json!({
            "id": "chatcmpl-1", "object": "chat.completion", "created": 1_700_000_000, "model": "quick",
            "choices": [{ "index": 0, "finish_reason": "stop",
                          "message": { "role": "assistant", "content": content, "refusal": null } }],
            "usage": { "prompt_tokens": 250, "completion_tokens": 250, "total_tokens": 500,
                       "prompt_tokens_details": { "cached_tokens": 0 },
                       "completion_tokens_details": { "reasoning_tokens": 0 } },
        })
        .to_string();
        format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len())
    };
    let (text, json) = (answer(&text_answer()), answer(&json_answer()));
    stream.set_nodelay(true).expect("a socket");
    let (mut buffer, mut filled) = (vec![0_u8; 64 * 1024], 0);
    loop {
        let Ok(read @ 1..) = stream.read(&mut buffer[filled..]) else { return };
        filled += read;
        let Some(head) = buffer[..filled].windows(4).position(|w| w == b"\r\n\r\n") else { continue };
        let headers = String::from_utf8_lossy(&buffer[..head]).to_ascii_lowercase();
        let length = headers.split("content-length: ").nth(1).and_then(|rest| rest.lines().next()?.parse().ok());
        let end = head + 4 + length.unwrap_or(0_usize);
        if filled < end {
            continue;
        }
        let wants_json = buffer[..end].windows(15).any(|w| w == b"response_format");
        calls.fetch_add(1, Ordering::Relaxed);
        if stream.write_all(if wants_json { json.as_bytes() } else { text.as_bytes() }).is_err() {
            return;
        }
        buffer.copy_within(end..filled, 0);
        filled -= end;
    }
}

/// Answers in the process, so that the call itself costs nothing.
#[derive(Debug)]
struct Immediate;

#[async_trait]
impl Provider for Immediate {
    async fn call(&self, request: ProviderRequest<'_>) -> Result<Answer, ProviderError> {
        let content = if matches!(request.format, OutputFormat::Text) { text_answer() } else { json_answer() };
        let usage = Some(Usage { input_tokens: 250, output_tokens: 250, ..Usage::default() });
        Ok(Answer { content, finish: Finish::Stop, usage, limits: Limits::default() })
    }

    fn kind(&self) -> &'static str {
        "openai"
    }

    fn is_configured(&self) -> bool {
        true
    }
}

fn config(vendor: SocketAddr) -> LlmConfig {
    let mut config = LlmConfig::default();
    let price = Price { input: 1.0, output: 2.0, cache_read: None, cache_write: None };
    config.prices.insert("local/quick".to_owned(), price);
    let local = ProviderConfig {
        base_url: Some(format!("http://{vendor}/v1")),
        max_concurrency: 256,
        ..ProviderConfig::new(ProviderKind::Openai)
    };
    config.providers.insert("local".to_owned(), local);
    config
}

/// What an attempt is made of.
struct Bench {
    pipeline: Arc<Pipeline>,
    http: Llm,
    http_redis: Llm,
    direct: Llm,
    direct_redis: Llm,
    outputs: Arc<Vec<Option<Arc<Value>>>>,
    next: AtomicUsize,
}

impl Bench {
    fn new(vendor: SocketAddr, redis: &str) -> Self {
        let (config, pipeline) = (config(vendor), pipeline());
        let tier = || {
            let mut settings = RedisConfig::default();
            if let Some(connections) = option("--connections") {
                settings.max_connections = connections.parse().expect("a number");
            }
            let tier = RedisTier::connect(&Secret::from(redis.to_owned()), &settings);
            Some(Arc::new(tier.expect("a Redis URL")) as Arc<dyn CacheTier>)
        };
        let client = Client::new(&NetConfig::default()).expect("a client");
        let over_http = |tier| Llm::new(&config, &client, tier, Metrics::new(), Arc::new(SystemClock)).expect("valid");
        let direct = |tier| {
            let providers = BTreeMap::from([("local".to_owned(), Arc::new(Immediate) as Arc<dyn Provider>)]);
            let prices = Prices::new(&config).expect("valid");
            Llm::with_providers(providers, prices, &config, tier, Metrics::new(), Arc::new(SystemClock))
        };
        let outputs = pipeline.stages.iter().map(|stage| {
            let text = if stage.output == OutputFormat::Text { Value::String(text_answer()) } else { Value::Null };
            Some(Arc::new(if text.is_null() { serde_json::from_str(&json_answer()).expect("JSON") } else { text }))
        });
        Self {
            outputs: Arc::new(outputs.collect()),
            http: over_http(None),
            http_redis: over_http(tier()),
            direct: direct(None),
            direct_redis: direct(tier()),
            pipeline: Arc::new(pipeline),
            next: AtomicUsize::new(0),
        }
    }

    fn render(&self, n: usize) -> Vec<Message> {
        let input = Arc::new(json!({ "brief": format!("Brief number {n}. {}", "A shop that sells tea. ".repeat(8)) }));
        let run_id = "0193";
        let context = RenderContext { run_id, input: &input, outputs: &self.outputs };
        match self.pipeline.render(n % self.pipeline.stages.len(), &context).expect("it renders") {
            Rendered::Messages(messages) => messages,
            Rendered::Text(text) => vec![Message { role: Role::User, content: text }],
        }
    }

    fn request(&self, n: usize, mut messages: Vec<Message>) -> Request {
        let stage = &self.pipeline.stages[n % self.pipeline.stages.len()];
        let Work::Model(work) = &stage.work else { unreachable!("every stage asks a model") };
        // So that no attempt finds another's answer.
        messages.push(Message { role: Role::User, content: n.to_string() });
        Request {
            models: work.models.clone(),
            messages,
            params: work.params.clone(),
            format: stage.output.clone(),
            sample: 0,
            purpose: CallPurpose::Stage,
        }
    }

    fn context(&self, n: usize) -> CallContext {
        CallContext {
            tenant: TenantId::default(),
            pipeline: self.pipeline.name.clone(),
            version: 1,
            stage: self.pipeline.stages[n % self.pipeline.stages.len()].id.clone(),
            run: RunId(Uuid::from_u128(n as u128)),
            cache_mode: CacheMode::Use,
            cache_ttl: Duration::from_hours(24),
            attempt: 1,
            purse: None,
            timeout: Duration::from_mins(1),
            outage_until: tokio::time::Instant::now() + Duration::from_mins(1),
            deadline: tokio::time::Instant::now() + Duration::from_mins(1),
        }
    }

    async fn complete(&self, llm: &Llm, n: usize) -> String {
        let request = self.request(n, vec![Message { role: Role::User, content: "x".repeat(1_000) }]);
        llm.complete(&self.context(n), &request).await.expect("an answer").content
    }

    fn assess(&self, n: usize, answer: &str) {
        let stage = n % self.pipeline.stages.len();
        let output = Arc::new(self.pipeline.read_output(stage, answer).expect("the right form"));
        let input = Arc::new(Value::Null);
        let context = RenderContext { run_id: "0193", input: &input, outputs: &self.outputs };
        let assessments = self.pipeline.assess(stage, &output, &context);
        assert!(assessments.iter().all(|assessment| assessment.passed), "{assessments:?}");
    }

    async fn part(&self, part: &str) {
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        match part {
            "nothing" => {
                let request = self.request(n, vec![Message { role: Role::User, content: "x".repeat(1_000) }]);
                std::hint::black_box((self.context(n), request));
            }
            "render" => drop(std::hint::black_box(self.render(n))),
            "assess" => {
                let is_text = self.pipeline.stages[n % self.pipeline.stages.len()].output == OutputFormat::Text;
                self.assess(n, &if is_text { text_answer() } else { json_answer() });
            }
            "layer" => drop(self.complete(&self.direct, n).await),
            "layer+redis" => drop(self.complete(&self.direct_redis, n).await),
            "layer+http" => drop(self.complete(&self.http, n).await),
            "layer+http+redis" => drop(self.complete(&self.http_redis, n).await),
            "attempt" => {
                let request = self.request(n, self.render(n));
                let reply = self.http_redis.complete(&self.context(n), &request).await.expect("an answer");
                self.assess(n, &reply.content);
            }
            other => panic!("there is no part `{other}`"),
        }
    }
}

const PARTS: [&str; 8] =
    ["nothing", "render", "assess", "layer", "layer+redis", "layer+http", "layer+http+redis", "attempt"];

/// Nanoseconds of CPU of every thread of this process but the vendor's.
fn cpu_ns() -> u64 {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return 0 };
    let cpu = |task: fs::DirEntry| {
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        let counted = fs::read_to_string(task.path().join("schedstat")).ok()?;
        (name.trim() != "vendor").then_some(counted.split(' ').next()?.parse::<u64>().ok()?)
    };
    tasks.flatten().filter_map(cpu).sum()
}

/// Runs so many of a part, so many at once, as two tasks; returns CPU and wall microseconds for each.
#[expect(clippy::cast_precision_loss, reason = "for people")]
async fn measure(bench: &Arc<Bench>, part: &'static str, attempts: usize, at_once: usize) -> (f64, f64) {
    let (started, before) = (Instant::now(), cpu_ns());
    let workers = at_once.min(2);
    let lanes = (0..workers).map(|_| {
        let bench = Arc::clone(bench);
        tokio::spawn(async move {
            let mut under_way = FuturesUnordered::new();
            for n in 0..attempts / workers {
                if n >= at_once / workers {
                    under_way.next().await;
                }
                let bench = Arc::clone(&bench);
                under_way.push(Box::pin(async move { bench.part(part).await }));
            }
            while under_way.next().await.is_some() {}
        })
    });
    for lane in lanes.collect::<Vec<_>>() {
        lane.await.expect("no panic");
    }
    let per = |ns: f64| ns / 1_000.0 / attempts as f64;
    (per((cpu_ns() - before) as f64), per(started.elapsed().as_nanos() as f64))
}

fn option(name: &str) -> Option<String> {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    arguments.nth(1)
}

fn main() {
    let number = |name: &str, default| option(name).map_or(default, |text| text.parse().expect("a number"));
    let (attempts, at_once) = (number("--attempts", 20_000), number("--at-once", 64));
    let only: Option<HashSet<String>> = option("--only").map(|parts| parts.split(',').map(str::to_owned).collect());
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let redis = Redis::private().await.expect("a Redis");
        let (address, calls) = vendor();
        let bench = Arc::new(Bench::new(address, redis.url()));
        println!("{:<18} {:>10} {:>10}   ({attempts} attempts, {at_once} at once)", "part", "CPU µs", "wall µs");
        for part in PARTS {
            if only.as_ref().is_some_and(|only| !only.contains(part)) {
                continue;
            }
            measure(&bench, part, at_once * 4, at_once).await;
            let (cpu, wall) = measure(&bench, part, attempts, at_once).await;
            println!("{part:<18} {cpu:>10.1} {wall:>10.1}");
        }
        println!("calls to the provider: {}", calls.load(Ordering::Relaxed));
    });
}
