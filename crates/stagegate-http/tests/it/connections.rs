//! The listener's limits, at the level of bytes.

use std::time::Duration;

use stagegate_core::pipeline::Span;
use stagegate_http::config::{AuthMode, HttpConfig};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::app::{Options, PIPELINE, TestApp, spawn_app};

async fn impatient() -> TestApp {
    let header_timeout = Span(Duration::from_millis(300));
    let http = HttpConfig { auth: AuthMode::Keys, header_timeout, head_max_bytes: 8 * 1024, ..HttpConfig::default() };
    TestApp::spawn(Options { http, ..Options::default() }).await
}

/// Sends bytes, and reads until the other side closes.
async fn exchange(app: &TestApp, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(app.address).await.expect("a connection");
    stream.write_all(bytes).await.expect("sent");
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn whoever_sends_headers_too_slowly_is_cut_off() {
    let app = impatient().await;
    // Nothing at all, the beginning of HTTP/2, of either, and of a head: each ends by itself.
    for beginning in ["", "PRI * HT", "P", "GET /healthz HTTP/1.1\r\nhost: x\r\n"] {
        let answer = exchange(&app, beginning.as_bytes()).await;
        assert!(!answer.contains("200 OK"), "{beginning:?} was answered: {answer}");
    }
    let whole = "GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    assert!(exchange(&app, whole.as_bytes()).await.contains("200 OK"));
}

#[tokio::test]
async fn a_head_over_the_limit_is_refused() {
    let app = impatient().await;
    let head = format!("GET /healthz HTTP/1.1\r\nhost: x\r\nx-large: {}\r\n\r\n", "x".repeat(20_000));
    assert!(exchange(&app, head.as_bytes()).await.starts_with("HTTP/1.1 431"));
}

#[tokio::test]
async fn a_slow_body_runs_into_the_time_limit() {
    let request_timeout = Span(Duration::from_millis(300));
    let http = HttpConfig { auth: AuthMode::Keys, request_timeout, ..HttpConfig::default() };
    let app = TestApp::spawn(Options { http, ..Options::default() }).await;
    let head = format!(
        "POST /v1/runs HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\n\
         content-length: 100\r\nconnection: close\r\n\r\n{{",
        app.admin
    );
    let answer = exchange(&app, head.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("SG0006"), "{answer}");
}

#[tokio::test]
async fn an_over_large_chunked_body_is_answered_while_it_is_sent() {
    let http = HttpConfig { auth: AuthMode::Keys, body_max_bytes: 1_000, ..HttpConfig::default() };
    let app = TestApp::spawn(Options { http, ..Options::default() }).await;
    let mut bytes = format!(
        "POST /v1/runs HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\n\
         transfer-encoding: chunked\r\nconnection: close\r\n\r\n",
        app.admin
    );
    // Never ended: what is over the limit is over the limit.
    let chunk = format!("200\r\n{}\r\n", "x".repeat(0x200));
    bytes.push_str(&chunk.repeat(20));
    let answer = exchange(&app, bytes.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 413") && answer.contains("SG0003"), "{answer}");
}

#[tokio::test]
async fn http_2_is_spoken_without_asking() {
    let app = spawn_app().await;
    app.register(PIPELINE).await;
    let client = reqwest::Client::builder().no_proxy().http2_prior_knowledge().build().expect("a client");
    let answer = client.get(app.url("/v1/pipelines")).bearer_auth(&app.viewer).send().await.expect("an answer");
    assert_eq!((answer.status().as_u16(), answer.version()), (200, http::Version::HTTP_2));
}

#[tokio::test]
async fn whoever_reads_nothing_is_cut_off() {
    let request_timeout = Span(Duration::from_millis(300));
    let http = HttpConfig { auth: AuthMode::Keys, request_timeout, ..HttpConfig::default() };
    let app = TestApp::spawn(Options { http, ..Options::default() }).await;
    let mut stream = TcpStream::connect(app.address).await.expect("a connection");
    // More answers than every buffer between here and there can hold.
    let requests = "GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n".repeat(2_000);
    let (mut reader, mut writer) = stream.split();
    // Ends when the other side closes: it stops reading requests while its answers are not taken.
    while writer.write_all(requests.as_bytes()).await.is_ok() {}
    let mut answers = Vec::new();
    let _ = reader.read_to_end(&mut answers).await;
}
