//! Hints over a real Redis: they come, they cost nobody anything, and they come back.

use std::{sync::Arc, time::Duration};

use deadpool_redis::redis::{self, Client};
use stagegate_core::{
    RunId, Secret,
    hint::{Hint, Hints as _},
};
use stagegate_llm::{RedisConfig, RedisHints};
use stagegate_testkit::servers::Redis;
use uuid::Uuid;

/// Far more than anything here may take.
const LONG: Duration = Duration::from_mins(1);

fn hints(redis: &Redis, prefix: &str) -> Arc<RedisHints> {
    let config = RedisConfig { key_prefix: prefix.to_owned(), ..RedisConfig::default() };
    Arc::new(RedisHints::start(&Secret::from(redis.url().to_owned()), &config).expect("a valid configuration"))
}

fn run(n: u128) -> RunId {
    RunId(Uuid::from_u128(n))
}

/// Says something until it is heard: a hint may be lost before both sides are connected.
async fn until_heard(from: &RedisHints, to: &RedisHints, said: Hint) {
    let heard = async { while !to.next().await.contains(&said) {} };
    let saying = async {
        loop {
            from.publish(said);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::select! {
        () = heard => {}
        () = saying => {}
        () = tokio::time::sleep(LONG) => panic!("{said:?} was never heard"),
    }
}

#[tokio::test]
async fn one_replica_hears_the_other_and_not_itself() {
    let redis = Redis::shared().await.expect("a Redis");
    let prefix = redis.unique_prefix();
    let (one, two) = (hints(&redis, &prefix), hints(&redis, &prefix));
    until_heard(&one, &two, Hint::Work).await;
    until_heard(&two, &one, Hint::Signal(run(7))).await;
    one.publish(Hint::Watching);
    one.publish(Hint::News(run(8)));
    until_heard(&two, &one, Hint::Signal(run(9))).await;
    let mut heard = Vec::new();
    while !heard.contains(&Hint::News(run(8))) {
        heard.extend(two.next().await);
    }
    assert!(heard.contains(&Hint::Watching) && !heard.contains(&Hint::Signal(run(9))), "{heard:?}");
}

#[tokio::test]
async fn other_installations_on_the_same_server_are_not_heard() {
    let redis = Redis::shared().await.expect("a Redis");
    let prefix = redis.unique_prefix();
    let (one, two, stranger) = (hints(&redis, &prefix), hints(&redis, &prefix), hints(&redis, &redis.unique_prefix()));
    until_heard(&one, &two, Hint::Work).await;
    stranger.publish(Hint::Signal(run(1)));
    let heard = tokio::time::timeout(Duration::from_millis(300), two.next()).await.unwrap_or_default();
    assert!(!heard.contains(&Hint::Signal(run(1))), "{heard:?}");
}

#[tokio::test]
async fn garbage_on_the_channel_is_ignored() {
    let redis = Redis::shared().await.expect("a Redis");
    let prefix = redis.unique_prefix();
    let (one, two) = (hints(&redis, &prefix), hints(&redis, &prefix));
    until_heard(&one, &two, Hint::Work).await;
    let client = Client::open(redis.url()).expect("a valid URL");
    let mut raw = client.get_multiplexed_async_connection().await.expect("a connection");
    let long = vec![0; 70_000];
    for garbage in [&b""[..], b"sgh1", b"sgh1sender-x\xFF\xFF", b"{\"json\":1}", &long] {
        let mut publish = redis::cmd("PUBLISH");
        let heard_by: i64 =
            publish.arg(format!("{prefix}:hints")).arg(garbage).query_async(&mut raw).await.expect("sent");
        assert_eq!(heard_by, 2);
    }
    until_heard(&one, &two, Hint::Signal(run(3))).await;
}

#[tokio::test]
async fn a_redis_that_is_killed_or_frozen_holds_nobody_up_and_is_found_again() {
    let redis = Redis::private().await.expect("a Redis");
    let (one, two) = (hints(&redis, "sg"), hints(&redis, "sg"));
    until_heard(&one, &two, Hint::Work).await;

    redis.stop().await.expect("it stops");
    // Far more than any queue holds: what does not fit is dropped, nobody waits.
    for n in 0..100_000 {
        one.publish(Hint::News(run(n)));
    }
    redis.start().await.expect("it starts");
    until_heard(&one, &two, Hint::Signal(run(1))).await;

    redis.freeze().expect("frozen");
    for n in 0..100_000 {
        one.publish(Hint::News(run(n)));
    }
    tokio::time::sleep(Duration::from_secs(1)).await; // Past the time that an answer may take.
    redis.thaw().expect("thawed");
    until_heard(&one, &two, Hint::Signal(run(2))).await;
}

#[tokio::test]
async fn a_redis_that_was_never_there_is_found_when_it_comes() {
    let redis = Redis::private().await.expect("a Redis");
    redis.stop().await.expect("it stops");
    let (one, two) = (hints(&redis, "sg"), hints(&redis, "sg"));
    one.publish(Hint::Work);
    redis.start().await.expect("it starts");
    until_heard(&one, &two, Hint::Signal(run(1))).await;
}
