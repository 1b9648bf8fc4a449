//! One exchange: what goes out, what comes back, and where it may break.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use stagegate_net::{Answer, Bounds, Failure, Outgoing, Stage, Trusted};
use stagegate_testkit::{
    FakeProvider,
    provider::{Reply, any},
};

use crate::{
    BOUNDS, client, post,
    raw::{Act, Raw},
};

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";

fn to(text: &str) -> Trusted {
    Trusted::parse(text).expect("an address")
}

async fn ask(fake: &FakeProvider, reply: Reply) -> Result<Answer, Failure> {
    fake.on(any()).once(reply);
    client().send(to(&format!("{}/chat/completions", fake.openai_base_url())), post()).await
}

#[tokio::test]
async fn a_request_says_what_it_was_given_and_little_more() {
    let server = Raw::start(Act::Answer(OK)).await;
    let headers = HeaderMap::from_iter([
        (HeaderName::from_static("content-type"), HeaderValue::from_static("application/json")),
        (HeaderName::from_static("authorization"), HeaderValue::from_static("Bearer x")),
    ]);
    let address = to(&format!("http://{}/v1/a%2Fb?api-version=1&x=%20", server.address));
    let answer = client().send(address, Outgoing { headers: &headers, ..post() }).await.expect("an answer");
    assert_eq!((answer.status, answer.body), (StatusCode::OK, Bytes::from_static(b"{}")));
    let head = server.heads().remove(0);
    let mut lines = head.lines();
    assert_eq!(lines.next(), Some("post /v1/a%2fb?api-version=1&x=%20 http/1.1"));
    let sent: BTreeMap<_, _> = lines.filter_map(|line| line.split_once(": ")).collect();
    let host = server.address.to_string();
    let ours = concat!("stagegate/", env!("CARGO_PKG_VERSION"));
    let expected = [
        ("accept", "*/*"),
        ("accept-encoding", "identity"),
        ("authorization", "bearer x"),
        ("content-length", "2"),
        ("content-type", "application/json"),
        ("host", host.as_str()),
        ("user-agent", ours),
    ];
    assert_eq!(sent, BTreeMap::from(expected));
}

#[tokio::test]
async fn exchanges_one_after_another_share_a_connection() {
    let server = Raw::start(Act::Answer(OK)).await;
    let client = client().for_exchanges(500).expect("a client");
    for _ in 0..20 {
        client.send(to(&format!("http://{}/", server.address)), post()).await.expect("an answer");
    }
    assert_eq!((server.accepted(), server.heads().len()), (1, 20));
}

#[tokio::test]
async fn an_answer_is_read_up_to_its_bound_and_an_error_as_far_as_it_tells_something() {
    let fake = FakeProvider::start().await;
    let pause = Duration::from_millis(1);
    for (reply, length) in [
        (Reply::raw("{}"), 2),
        (Reply::raw(""), 0),
        (Reply::raw("x".repeat(10_000)), 10_000),
        (Reply::raw("x".repeat(10_000)).drip(3_000, pause), 10_000),
        (Reply::status(500, "y".repeat(100)), 100),
        (Reply::status(500, "y".repeat(5_000)), 1_000),
        (Reply::status(500, "y".repeat(5_000)).drip(700, pause), 1_000),
        // Half of it, then the connection breaks.
        (Reply::status(500, "y".repeat(100)).cut_halfway(), 50),
    ] {
        let told = format!("{reply:?}");
        assert_eq!(ask(&fake, reply).await.map(|answer| answer.body.len()), Ok(length), "{told}");
    }
    for reply in
        [Reply::huge(10_001), Reply::huge(10_001).drip(2_000, pause), Reply::huge(50_000_000).drip(9_000, pause)]
    {
        let failure = ask(&fake, reply).await.expect_err("too large");
        assert_eq!(failure.stage, Stage::TooLarge(BOUNDS.answer_max_bytes));
    }
}

#[tokio::test]
async fn a_failure_tells_where_the_exchange_broke() {
    let fake = FakeProvider::start().await;
    let cut = ask(&fake, Reply::text("Madrid.").cut_halfway()).await.expect_err("cut");
    assert_eq!(cut.stage, Stage::Reading(StatusCode::OK));
    let closed = ask(&fake, Reply::close()).await.expect_err("closed");
    assert_eq!(closed.stage, Stage::Asking);
    fake.on(any()).once(Reply::hang());
    let address = to(&format!("{}/chat/completions", fake.openai_base_url()));
    let request = Outgoing { timeout: Some(Duration::from_millis(50)), ..post() };
    assert_eq!(client().send(address, request).await.expect_err("too late").stage, Stage::Asking);

    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
    let failure = client().send(to(&format!("http://{free}/secret")), post()).await.expect_err("nobody");
    assert_eq!((failure.stage, failure.proxy), (Stage::Connecting, None));
    let reason = failure.reason.expect("a reason");
    assert!(reason.contains("refused") && !reason.contains("secret"), "{reason}");
}

#[tokio::test]
async fn no_redirect_takes_a_key_to_another_host() {
    let (fake, other) = (FakeProvider::start().await, FakeProvider::start().await);
    let elsewhere = format!("{}/chat/completions", other.openai_base_url());
    for status in [301, 302, 303, 307, 308] {
        let answer = ask(&fake, Reply::status(status, "").header("location", &elsewhere)).await.expect("an answer");
        assert_eq!((answer.status.as_u16(), answer.headers["location"].as_bytes()), (status, elsewhere.as_bytes()));
    }
    assert_eq!(other.call_count(), 0);
}

#[tokio::test]
async fn a_host_of_ipv6_is_reached() {
    let Ok(listener) = std::net::TcpListener::bind("[::1]:0") else { return };
    let address = listener.local_addr().expect("an address");
    let answering = std::thread::spawn(move || {
        use std::io::{Read as _, Write as _};
        let (mut stream, _) = listener.accept().expect("a client");
        let mut bytes = [0; 4_096];
        let read = stream.read(&mut bytes).expect("a request");
        stream.write_all(OK.as_bytes()).expect("written");
        String::from_utf8_lossy(&bytes[..read]).into_owned()
    });
    let bounds = Bounds { answer_max_bytes: 2, error_max_bytes: 0 };
    client().send(to(&format!("http://{address}/")), Outgoing { bounds, ..post() }).await.expect("an answer");
    assert!(answering.join().expect("a request").contains(&format!("host: {address}")));
}
