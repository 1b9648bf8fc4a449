//! The cache over a real Redis: shared by replicas, invalidated everywhere, and never missed when it is gone.

use std::{
    future::pending,
    io::Write,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use deadpool_redis::redis::{self, Client, Script, aio::MultiplexedConnection};
use stagegate_core::{
    Code, Origin, Secret, TenantId,
    cache::{CacheError, CacheKey, CacheLookup, CacheScope, CacheTier},
    pipeline::{CacheMode, Span},
};
use stagegate_llm::{CallContext, RedisConfig, RedisTier};
use stagegate_testkit::{
    FakeProvider,
    cache::CacheFixture,
    provider::{Reply, any},
    proxy::{Mode, Proxy},
    servers::Redis,
};
use tokio::{io::AsyncReadExt, net::TcpListener, time::Instant};
use tracing_subscriber::fmt::MakeWriter;

use crate::bench::{Act, Bench, COST, Scripted, context, in_mode, last, model, request, run, scripted_over};

/// What is logged, for tests that look into it.
#[derive(Clone, Default)]
pub(crate) struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().expect("no panic")).into_owned()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("no panic").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

/// Everything that this thread logs, until the guard is dropped.
pub(crate) fn logs() -> (Log, tracing::subscriber::DefaultGuard) {
    let log = Log::default();
    let subscriber =
        tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(log.clone()).with_ansi(false);
    (log, tracing::subscriber::set_default(subscriber.finish()))
}

/// What a machine under load may take: where Redis is well, it is its answers that are tested.
const PATIENCE: Span = Span(Duration::from_secs(30));

fn connect(url: &str, config: &RedisConfig) -> Arc<RedisTier> {
    Arc::new(RedisTier::connect(&Secret::from(url.to_owned()), config).expect("a valid configuration"))
}

/// With the default timeouts: where Redis is ill.
fn tier(url: &str) -> Arc<RedisTier> {
    connect(url, &RedisConfig::default())
}

/// A replica that waits for Redis as long as it takes.
fn replica(vendor: &Arc<FakeProvider>, redis: &Redis) -> Bench {
    let config = RedisConfig { connect_timeout: PATIENCE, response_timeout: PATIENCE, ..RedisConfig::default() };
    let tier = connect(redis.url(), &config);
    Bench::at(Arc::clone(vendor), Some(tier), |config| config.shared_cache_timeout = PATIENCE)
}

async fn raw(redis: &Redis) -> MultiplexedConnection {
    let client = Client::open(redis.url()).expect("a valid URL");
    client.get_multiplexed_async_connection().await.expect("a connection")
}

mod contract {
    use super::*;

    async fn make() -> CacheFixture {
        let redis = Redis::shared().await.expect("a Redis");
        let prefix = redis.unique_prefix();
        let config = RedisConfig {
            key_prefix: prefix.clone(),
            connect_timeout: PATIENCE,
            response_timeout: PATIENCE,
            ..RedisConfig::default()
        };
        let (tier, peer) = (connect(redis.url(), &config), connect(redis.url(), &config));
        let keep = Arc::clone(&redis);
        CacheFixture {
            tier,
            peer,
            reset: Box::new(move || {
                let (redis, prefix) = (Arc::clone(&redis), prefix.clone());
                Box::pin(async move {
                    let script =
                        "for _, key in ipairs(redis.call('KEYS', ARGV[1] .. '*')) do redis.call('DEL', key) end";
                    let mut connection = raw(&redis).await;
                    let () = Script::new(script).arg(prefix).invoke_async(&mut connection).await.expect("a reset");
                })
            }),
            keep: Box::new(keep),
        }
    }

    stagegate_testkit::cache_tier_contract!(make);
}

/// A tier that counts how often it is asked.
#[derive(Debug)]
struct Counted {
    inner: Arc<RedisTier>,
    asked: AtomicUsize,
}

impl Counted {
    fn new(inner: Arc<RedisTier>) -> Arc<Self> {
        Arc::new(Self { inner, asked: AtomicUsize::new(0) })
    }

    fn count(&self) {
        self.asked.fetch_add(1, Ordering::SeqCst);
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

#[async_trait]
impl CacheTier for Counted {
    async fn get(&self, tenant: &TenantId, key: CacheKey, scopes: &[CacheScope]) -> Result<CacheLookup, CacheError> {
        self.count();
        self.inner.get(tenant, key, scopes).await
    }

    async fn put(
        &self,
        tenant: &TenantId,
        key: CacheKey,
        entry: &[u8],
        generation: u64,
        ttl: Duration,
    ) -> Result<(), CacheError> {
        self.count();
        self.inner.put(tenant, key, entry, generation, ttl).await
    }

    async fn evict(&self, tenant: &TenantId, key: CacheKey) -> Result<(), CacheError> {
        self.count();
        self.inner.evict(tenant, key).await
    }

    async fn invalidate(&self, tenant: &TenantId, scope: &CacheScope) -> Result<u64, CacheError> {
        self.inner.invalidate(tenant, scope).await
    }

    async fn ping(&self) -> Result<(), CacheError> {
        self.inner.ping().await
    }

    fn kind(&self) -> &'static str {
        self.inner.kind()
    }
}

/// A Redis of one's own and two replicas over it.
async fn alone() -> (Redis, Bench, Bench) {
    let redis = Redis::private().await.expect("a Redis");
    let vendor = Arc::new(FakeProvider::start().await);
    let (one, two) = (replica(&vendor, &redis), replica(&vendor, &redis));
    (redis, one, two)
}

/// Repeats until it is so. What is waited for is bounded by the test runner's own limit.
async fn until(mut holds: impl AsyncFnMut() -> bool) {
    let limit = Instant::now() + Duration::from_mins(1);
    while !holds().await {
        assert!(Instant::now() < limit, "it never came true");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn replicas_share_what_one_of_them_bought() {
    let (_redis, one, two) = alone().await;
    let bought = one.ask(&context(), &request("q")).await;
    let shared = two.ask(&context(), &request("q")).await;
    assert_eq!((last(&shared).origin, last(&shared).saved_usd, one.calls()), (Origin::CacheShared, COST, 1));
    assert_eq!((&shared.content, shared.key, last(&shared).usage), (&bought.content, bought.key, last(&bought).usage));
    let local = two.ask(&context(), &request("q")).await;
    assert_eq!(last(&local).origin, Origin::CacheLocal);
    let metrics = two.metrics();
    for line in [
        r#"stagegate_cache_lookups_total{outcome="hit",tier="shared"} 1"#,
        r#"stagegate_cache_lookups_total{outcome="hit",tier="local"} 1"#,
    ] {
        assert!(metrics.contains(line), "{line}\n{metrics}");
    }
}

#[tokio::test]
async fn whoever_takes_a_run_over_finds_what_it_received() {
    for mode in [CacheMode::Use, CacheMode::Refresh, CacheMode::ReadOnly, CacheMode::Off] {
        let (_redis, one, two) = alone().await;
        one.ask(&in_mode(mode, 1), &request("q")).await;
        let taken_over = two.ask(&in_mode(mode, 1), &request("q")).await;
        assert_eq!((last(&taken_over).origin, one.calls()), (Origin::CacheShared, 1), "{mode:?}");
    }
}

#[tokio::test]
async fn a_connection_that_was_cut_costs_no_hit() {
    let (redis, one, two) = alone().await;
    for n in 0..8 {
        one.ask(&context(), &request(&format!("{n}"))).await;
        // Between any two look-ups, as an idle time-out of the server or of something between would do it.
        let mut connection = raw(&redis).await;
        let _: redis::Value = redis::cmd("CLIENT")
            .arg(&["KILL", "TYPE", "normal", "SKIPME", "yes"])
            .query_async(&mut connection)
            .await
            .expect("they are cut");
        let hit = two.ask(&context(), &request(&format!("{n}"))).await;
        assert_eq!(last(&hit).origin, Origin::CacheShared);
    }
    assert_eq!(one.calls(), 8);
}

#[tokio::test]
async fn an_answer_in_redis_is_never_served_past_its_ttl() {
    let (_redis, one, two) = alone().await;
    one.ask(&context(), &request("q")).await;
    two.clock.advance(Duration::from_hours(1));
    assert_eq!(last(&two.ask(&context(), &request("q")).await).origin, Origin::Provider);
}

#[tokio::test]
async fn an_invalidation_reaches_every_replica_within_a_second_or_so() {
    let (_redis, one, two) = alone().await;
    for bench in [&one, &two, &two] {
        bench.ask(&context(), &request("q")).await;
    }
    assert_eq!(one.calls(), 1);
    one.llm
        .invalidate(&context().tenant, &CacheScope::Stage(context().pipeline, context().stage))
        .await
        .expect("Redis");
    assert_eq!(last(&one.ask(&context(), &request("r")).await).origin, Origin::Provider);
    assert!(one.llm.peek(&context(), &request("q")).await.is_none(), "here at once");
    until(async || two.llm.peek(&context(), &request("q")).await.is_none()).await;
    assert_eq!(last(&two.ask(&context(), &request("q")).await).origin, Origin::Provider);
}

#[tokio::test]
async fn a_replica_that_is_cut_off_serves_what_was_invalidated_for_the_window_at_most() {
    const WINDOW: Duration = Duration::from_millis(500);
    let (redis, one, _) = alone().await;
    let upstream = redis.url().trim_start_matches("redis://").trim_end_matches('/').parse().expect("an address");
    let proxy = Proxy::start(upstream).await.expect("a proxy");
    let cut_off = connect(&format!("redis://{}", proxy.address()), &RedisConfig::default());
    let two = Bench::at(Arc::clone(&one.vendor), Some(cut_off), |config| config.shared_cache_window = Span(WINDOW));
    one.ask(&context(), &request("q")).await;
    until(async || last(&two.ask(&context(), &request("q")).await).origin == Origin::CacheLocal).await;
    proxy.set(Mode::Refuse);
    one.llm
        .invalidate(&context().tenant, &CacheScope::Stage(context().pipeline, context().stage))
        .await
        .expect("Redis");
    // Its answer is older than the window; what it knows of invalidations soon is.
    two.clock.advance(WINDOW * 2);
    until(async || two.llm.peek(&context(), &request("q")).await.is_none()).await;
    let bought = one.calls();
    assert_eq!(last(&two.ask(&context(), &request("q")).await).origin, Origin::Provider);
    // What it buys itself meanwhile counts.
    assert_eq!(last(&two.ask(&context(), &request("q")).await).origin, Origin::CacheLocal);
    assert_eq!(one.calls(), bought + 1);
}

#[tokio::test]
async fn an_eviction_reaches_every_replica_within_a_second_or_so() {
    let (_redis, one, two) = alone().await;
    one.ask(&context(), &request("q")).await;
    let reply = two.ask(&context(), &request("q")).await;
    one.llm.evict(&context().tenant, reply.key).await;
    until(async || two.llm.peek(&context(), &request("q")).await.is_none()).await;
    assert_eq!(last(&two.ask(&context(), &request("q")).await).origin, Origin::Provider);
}

#[tokio::test]
async fn a_refresh_replaces_for_every_replica() {
    let (_redis, one, two) = alone().await;
    one.vendor.on(any()).once(Reply::text("old")).once(Reply::text("new"));
    one.ask(&context(), &request("q")).await;
    assert_eq!(two.ask(&context(), &request("q")).await.content, "old");
    one.clock.advance(Duration::from_secs(1));
    one.ask(&in_mode(CacheMode::Refresh, 2), &request("q")).await;
    until(async || two.ask(&context(), &request("q")).await.content == "new").await;
    assert_eq!(one.calls(), 2);
}

#[tokio::test]
async fn a_remembered_answer_is_shared_too() {
    let (_redis, one, two) = alone().await;
    let reply = one.ask(&context(), &request("q, with critique")).await;
    one.llm.remember(&context(), &request("q"), &reply).await;
    let hit = two.ask(&CallContext { run: run(2), ..context() }, &request("q")).await;
    assert_eq!((last(&hit).origin, one.calls()), (Origin::CacheShared, 1));
    two.llm.remember(&context(), &request("from elsewhere"), &reply).await;
    assert!(one.llm.peek(&context(), &request("from elsewhere")).await.is_some());
}

#[tokio::test]
async fn a_flush_loses_nothing_but_time() {
    let (redis, one, two) = alone().await;
    one.ask(&context(), &request("q")).await;
    two.ask(&context(), &request("q")).await;
    redis.flush().await.expect("a flush");
    for bench in [&one, &two] {
        // What the process still holds may count until it learns of the flush.
        bench.ask(&context(), &request("q")).await;
        bench.ask(&context(), &request("after")).await;
    }
    assert_eq!(last(&two.ask(&context(), &request("after")).await).origin, Origin::CacheLocal);
    until(async || one.llm.peek(&context(), &request("q")).await.is_none() || one.calls() > 2).await;
    one.ask(&context(), &request("q")).await;
    assert_eq!(one.calls(), 3, "once more each, and no more");
}

#[tokio::test]
async fn without_redis_calls_succeed_and_the_local_cache_goes_on() {
    let redis = Redis::private().await.expect("a Redis");
    let bench = Bench::with(Some(tier(redis.url())), |_| {}).await;
    bench.ask(&context(), &request("before")).await;
    redis.stop().await.expect("it stops");
    for n in 0..5 {
        bench.ask(&context(), &request(&format!("{n}"))).await;
    }
    assert_eq!(bench.calls(), 6);
    for prompt in ["before", "0", "4"] {
        assert_eq!(last(&bench.ask(&context(), &request(prompt)).await).origin, Origin::CacheLocal, "{prompt}");
    }
    let (kind, ping) = bench.llm.health().await.shared_cache.expect("there is a tier");
    assert_eq!(kind, "redis");
    assert!(ping.is_err(), "{ping:?}");
    let error = bench.llm.invalidate(&context().tenant, &CacheScope::Tenant).await.expect_err("Redis is away");
    assert_eq!(error.code, Code::CacheUnavailable);
    assert!(error.retry_after.is_some());
    bench.ask(&context(), &request("0")).await;
    assert_eq!(bench.calls(), 7, "what can be invalidated here is");

    redis.start().await.expect("it starts");
    let other = replica(&bench.vendor, &redis);
    let mut n = 0;
    until(async || {
        n += 1;
        let prompt = request(&format!("back {n}"));
        bench.ask(&context(), &prompt).await;
        other.llm.peek(&context(), &prompt).await.is_some()
    })
    .await;
    assert!(bench.llm.health().await.shared_cache.is_some_and(|(_, ping)| ping.is_ok()));
}

#[tokio::test]
async fn a_frozen_redis_costs_a_few_timeouts_and_no_more() {
    let redis = Redis::private().await.expect("a Redis");
    let counted = Counted::new(tier(redis.url()));
    let bench = Bench::with(Some(Arc::clone(&counted) as Arc<dyn CacheTier>), |_| {}).await;
    bench.ask(&context(), &request("before")).await;
    redis.freeze().expect("it freezes");
    let (before, started) = (counted.asked(), Instant::now());
    for n in 0..30 {
        bench.ask(&context(), &request(&format!("{n}"))).await;
    }
    // Three failures open the breaker; then one probe each five seconds, should the machine be that slow.
    let allowed = 3 + usize::try_from(started.elapsed().as_secs() / 5).expect("small");
    let asked = counted.asked() - before;
    assert!(asked <= allowed, "Redis was asked {asked} times");
    assert_eq!(bench.calls(), 31);
    assert_eq!(last(&bench.ask(&context(), &request("7")).await).origin, Origin::CacheLocal);

    redis.thaw().expect("it thaws");
    let other = replica(&bench.vendor, &redis);
    let mut n = 0;
    until(async || {
        n += 1;
        let prompt = request(&format!("back {n}"));
        bench.ask(&context(), &prompt).await;
        other.llm.peek(&context(), &prompt).await.is_some()
    })
    .await;
}

#[tokio::test]
async fn a_redis_that_is_away_at_the_start_is_no_reason_not_to_start() {
    let port = TcpListener::bind("127.0.0.1:0").await.expect("a port").local_addr().expect("bound").port();
    let bench = Bench::with(Some(tier(&format!("redis://127.0.0.1:{port}/"))), |_| {}).await;
    bench.ask(&context(), &request("q")).await;
    assert_eq!(last(&bench.ask(&context(), &request("q")).await).origin, Origin::CacheLocal);
    bench.llm.evict(&context().tenant, bench.ask(&context(), &request("q")).await.key).await;
    bench.ask(&context(), &request("q")).await;
    assert_eq!(bench.calls(), 2);
}

/// A server that takes every connection and answers everything with these bytes; with none it never answers.
async fn liar(answer: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut buffer = [0; 4096];
                while let Ok(1..) = stream.read(&mut buffer).await {
                    if tokio::io::AsyncWriteExt::write_all(&mut stream, answer).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    format!("redis://{address}/")
}

#[tokio::test]
async fn a_redis_that_lies_is_a_miss() {
    let answers: [&[u8]; 8] = [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"+OK\r\n+OK\r\n+OK\r\n+OK\r\n",
        b"$-1\r\n",
        b"*1\r\n$3\r\nabc\r\n",
        b"*7\r\n:1\r\n+x\r\n*0\r\n$0\r\n\r\n:-5\r\n$1\r\n7\r\n$-1\r\n",
        b"-ERR out of order\r\n",
        b"\0\xFF\xFE",
    ];
    for answer in answers {
        let bench = Bench::with(Some(tier(&liar(answer).await)), |_| {}).await;
        for n in 0..5 {
            bench.ask(&context(), &request(&format!("{n}"))).await;
        }
        assert_eq!(bench.calls(), 5);
        assert_eq!(last(&bench.ask(&context(), &request("3")).await).origin, Origin::CacheLocal);
    }
}

#[tokio::test]
async fn garbage_in_redis_is_a_miss_and_is_mended() {
    let redis = Redis::private().await.expect("a Redis");
    let bench = replica(&Arc::new(FakeProvider::start().await), &redis);
    let key = bench.ask(&context(), &request("q")).await.key;
    let entry = format!("sg:{{default}}:e:{key}");
    let mut connection = raw(&redis).await;
    let spoil: [&[&str]; 9] = [
        &["SET", &entry, "x"],
        &["SET", &entry, "12345678"],
        &["SET", &entry, "~~~~~~~~{\"v\":1}"],
        &["RPUSH", &entry, "a"],
        &["SET", "sg:{default}:g", "garbage"],
        &["SET", "sg:{default}:g", "999999999999999999999999"],
        &["RPUSH", "sg:{default}:g", "a"],
        &["RPUSH", "sg:{default}:f:t", "a"],
        &["SET", "sg:{default}:f:p:p", "garbage"],
    ];
    for command in spoil {
        let () = redis::cmd("DEL").arg(command[1]).query_async(&mut connection).await.expect("a deletion");
        let _: redis::Value =
            redis::cmd(command[0]).arg(&command[1..]).query_async(&mut connection).await.expect("garbage is stored");
        // A fresh process, which has nothing but what Redis tells it.
        let fresh = replica(&bench.vendor, &redis);
        fresh.ask(&context(), &request("q")).await;
        fresh.ask(&context(), &request("q")).await;
        let reply = fresh.ask(&context(), &request(command[1])).await;
        assert!(!reply.content.is_empty());
        fresh.llm.invalidate(&context().tenant, &CacheScope::Pipeline(context().pipeline)).await.expect("mended");
        fresh.ask(&context(), &request("q")).await;
        let peer = replica(&bench.vendor, &redis);
        assert_eq!(last(&peer.ask(&context(), &request("q")).await).origin, Origin::CacheShared, "{command:?}");
    }
}

#[tokio::test]
async fn a_lost_generation_starts_above_everything_before_it() {
    let (redis, one, two) = alone().await;
    one.ask(&context(), &request("q")).await;
    for key in ["sg:{default}:g", "sg:{default}:f:t"] {
        let mut connection = raw(&redis).await;
        let () = redis::cmd("DEL").arg(key).query_async(&mut connection).await.expect("a deletion");
        let before = one.calls();
        let fresh = replica(&two.vendor, &redis);
        assert_eq!(last(&fresh.ask(&context(), &request("q")).await).origin, Origin::Provider, "{key}");
        assert_eq!(one.calls(), before + 1);
    }
}

#[tokio::test]
async fn what_is_written_to_redis_expires_and_names_its_tenant() {
    let redis = Redis::private().await.expect("a Redis");
    let bench = replica(&Arc::new(FakeProvider::start().await), &redis);
    let key = bench.ask(&context(), &request("q")).await.key;
    let mut connection = raw(&redis).await;
    let left_ms: i64 =
        redis::cmd("PTTL").arg(format!("sg:{{default}}:e:{key}")).query_async(&mut connection).await.expect("a TTL");
    let hour_ms = 3_600_000;
    assert!(left_ms > 0 && left_ms <= hour_ms, "{left_ms}");
    let keys: Vec<String> = redis::cmd("KEYS").arg("*").query_async(&mut connection).await.expect("the keys");
    assert!(keys.iter().all(|key| key.starts_with("sg:{default}:")), "{keys:?}");
    let scope = CacheScope::Model(model("one/priced"));
    bench.llm.invalidate(&context().tenant, &scope).await.expect("Redis");
    let forever: i64 =
        redis::cmd("PTTL").arg(format!("sg:{{default}}:f:{scope}")).query_async(&mut connection).await.expect("a TTL");
    assert_eq!(forever, -1, "a floor stays");
}

/// A tier in the process that never answers what it is told to be deaf to.
#[derive(Debug)]
struct Deaf {
    to_get: bool,
    asked: AtomicUsize,
}

#[async_trait]
impl CacheTier for Deaf {
    async fn get(&self, _: &TenantId, _: CacheKey, _: &[CacheScope]) -> Result<CacheLookup, CacheError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if self.to_get { pending().await } else { Ok(CacheLookup { generation: 1, floor: 1, entry: None }) }
    }

    async fn put(&self, _: &TenantId, _: CacheKey, _: &[u8], _: u64, _: Duration) -> Result<(), CacheError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        pending().await
    }

    async fn evict(&self, _: &TenantId, _: CacheKey) -> Result<(), CacheError> {
        pending().await
    }

    async fn invalidate(&self, _: &TenantId, _: &CacheScope) -> Result<u64, CacheError> {
        pending().await
    }

    async fn ping(&self) -> Result<(), CacheError> {
        pending().await
    }

    fn kind(&self) -> &'static str {
        "deaf"
    }
}

#[tokio::test(start_paused = true)]
async fn a_tier_that_never_answers_costs_three_timeouts_and_then_one_each_five_seconds() {
    let tier = Arc::new(Deaf { to_get: true, asked: AtomicUsize::new(0) });
    let one = Scripted::new(Act::Answer("a"));
    let llm = scripted_over(&one, Arc::clone(&tier) as Arc<dyn CacheTier>);
    let started = Instant::now();
    for n in 0..100 {
        llm.complete(&context(), &request(&format!("{n}"))).await.expect("an answer");
    }
    assert_eq!((tier.asked.load(Ordering::SeqCst), one.calls()), (3, 100));
    assert_eq!(started.elapsed(), 3 * Duration::from_millis(250));
    for probes in 1..=2 {
        tokio::time::advance(Duration::from_secs(5)).await;
        for n in 0..10 {
            llm.complete(&context(), &request(&format!("{probes} {n}"))).await.expect("an answer");
        }
        assert_eq!(tier.asked.load(Ordering::SeqCst), 3 + probes, "one probe, and it is spared again");
    }
    let (kind, ping) = llm.health().await.shared_cache.expect("there is a tier");
    assert_eq!((kind, ping), ("deaf", Err("the shared cache is unavailable: no answer within 250ms".to_owned())));
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_there_is_not_lost_to_a_slow_cache() {
    let tier = Arc::new(Deaf { to_get: false, asked: AtomicUsize::new(0) });
    let one = Scripted::new(Act::Answer("paid for"));
    let llm = scripted_over(&one, tier);
    let hasty = CallContext { deadline: Instant::now() + Duration::from_millis(100), ..context() };
    let reply = llm.complete(&hasty, &request("q")).await.expect("the deadline passed while it was stored");
    assert_eq!((reply.content.as_str(), last(&reply).cost_usd), ("paid for", COST));
}
