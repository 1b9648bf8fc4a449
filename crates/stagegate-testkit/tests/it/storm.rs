//! The failing provider's books say what was charged and what of it arrived.

use std::{net::SocketAddr, time::Duration};

use serde_json::{Value, json};
use stagegate_testkit::storm::{Answer, Fate, Mix, Storm};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

fn only(answer: Answer) -> Mix {
    let latency = (Duration::ZERO, Duration::ZERO);
    Mix { faults: vec![(answer, 1000)], latency, slow: latency, ..Mix::calm() }
}

fn address(storm: &Storm) -> SocketAddr {
    let url = storm.base_url("r1");
    url.trim_start_matches("http://").split('/').next().and_then(|host| host.parse().ok()).expect("an address")
}

async fn send(storm: &Storm, prompt: &str) -> TcpStream {
    let body = json!({ "model": "m", "messages": [{ "role": "user", "content": prompt }] }).to_string();
    let head = format!(
        "POST /r1/v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let mut stream = TcpStream::connect(address(storm)).await.expect("connects");
    stream.write_all(format!("{head}{body}").as_bytes()).await.expect("writes");
    stream
}

async fn answer(storm: &Storm, prompt: &str) -> String {
    let mut bytes = Vec::new();
    // A broken connection is an answer as well: what came of it.
    let _ = send(storm, prompt).await.read_to_end(&mut bytes).await;
    String::from_utf8_lossy(&bytes).into_owned()
}

#[tokio::test]
async fn an_answer_depends_on_the_request_alone() {
    let storm = Storm::start(1, only(Answer::Good)).await.expect("starts");
    let content = |text: String| {
        let body: Value = serde_json::from_str(text.split("\r\n\r\n").nth(1).expect("a body")).expect("JSON");
        body["choices"][0]["message"]["content"].as_str().expect("text").to_owned()
    };
    let first = content(answer(&storm, "key=k1 stage=one begin").await);
    assert!(first.starts_with("stage one of k1 answers "), "{first}");
    assert_eq!(first, content(answer(&storm, "key=k1 stage=one begin").await));
    assert_ne!(first, content(answer(&storm, "key=k2 stage=one begin").await));
    let calls = storm.calls();
    assert_eq!(calls[0].fingerprint, calls[1].fingerprint);
    assert_eq!((calls[1].nth, calls[1].caller.as_str(), calls[1].key.as_str()), (1, "r1", "k1"));
    assert!(calls.iter().all(|call| call.fate == Fate::Delivered && call.ended.is_some()));
}

#[tokio::test]
async fn each_fault_is_on_the_wire_as_it_is_called() {
    for (fault, status) in [
        (Answer::LimitedShort, "HTTP/1.1 429"),
        (Answer::Quota, "HTTP/1.1 429"),
        (Answer::Failed, "HTTP/1.1 500"),
        (Answer::Overloaded, "HTTP/1.1 529"),
        (Answer::Garbled, "HTTP/1.1 200"),
        (Answer::Truncated, "HTTP/1.1 200"),
        (Answer::Empty, "HTTP/1.1 200"),
        (Answer::NoUsage, "HTTP/1.1 200"),
        (Answer::ErrorInside, "HTTP/1.1 200"),
        (Answer::Refused, "HTTP/1.1 200"),
        (Answer::Closed, ""),
    ] {
        let storm = Storm::start(1, only(fault)).await.expect("starts");
        let text = answer(&storm, "key=k stage=one").await;
        assert!(text.starts_with(status), "{fault:?}: {text}");
        assert_eq!(text.is_empty(), status.is_empty(), "{fault:?}");
        assert_eq!(storm.calls()[0].answer, fault);
    }
}

#[tokio::test]
async fn only_frail_stages_are_refused_for_good() {
    let mix = Mix { lasting: vec![(Answer::Quota, 500), (Answer::Refused, 500)], ..only(Answer::Good) };
    let storm = Storm::start(1, mix).await.expect("starts");
    for key in 0..10 {
        for stage in ["one", "frail"] {
            answer(&storm, &format!("key=k{key} stage={stage}")).await;
        }
    }
    assert!(storm.calls().iter().all(|call| call.answer.is_final() == (call.stage == "frail")));
}

#[tokio::test]
async fn a_cut_answer_is_charged_and_half() {
    let storm = Storm::start(1, only(Answer::Cut)).await.expect("starts");
    let text = answer(&storm, "key=k stage=one").await;
    let announced: usize = text
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))
        .and_then(|length| length.trim().parse().ok())
        .expect("announced");
    let came = text.split("\r\n\r\n").nth(1).expect("a part").len();
    assert!(came > 0 && came < announced, "{came} of {announced}");
    assert!(storm.calls()[0].answer.is_charged());
}

#[tokio::test]
async fn a_caller_who_left_is_in_the_books() {
    let storm = Storm::start(1, only(Answer::Hang)).await.expect("starts");
    let stream = send(&storm, "key=k stage=one").await;
    while storm.call_count() == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(storm.calls()[0].fate, Fate::UnderWay);
    drop(stream);
    while storm.calls()[0].fate == Fate::UnderWay {
        tokio::task::yield_now().await;
    }
    assert_eq!(storm.calls()[0].fate, Fate::Abandoned);
}
