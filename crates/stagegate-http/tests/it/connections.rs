//! The listener's limits, at the level of bytes.

use std::time::Duration;

use futures::StreamExt as _;
use stagegate_core::pipeline::Span;
use stagegate_engine::config::EngineConfig;
use stagegate_http::config::{AuthMode, HttpConfig};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::app::{Options, PIPELINE, TestApp, spawn_app};

fn keys() -> HttpConfig {
    HttpConfig { auth: AuthMode::Keys, ..HttpConfig::default() }
}

async fn spawn(http: HttpConfig) -> TestApp {
    TestApp::spawn(Options { http, ..Options::default() }).await
}

/// A connection of HTTP/2 whose streams begin with this window.
async fn http_2(app: &TestApp, window: u32) -> h2::client::SendRequest<bytes::Bytes> {
    let stream = TcpStream::connect(app.address).await.expect("a connection");
    let (client, connection) =
        h2::client::Builder::new().initial_window_size(window).handshake(stream).await.expect("a handshake");
    tokio::spawn(connection);
    client
}

fn get(app: &TestApp, path: &str) -> http::Request<()> {
    let request = http::Request::get(app.url(path)).header("authorization", format!("Bearer {}", app.viewer));
    request.body(()).expect("a request")
}

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
    is_whole_problem(&exchange(&app, head.as_bytes()).await, 431, "SG0001");
}

/// An answer that the server gives before any route is asked.
#[track_caller]
fn is_whole_problem(answer: &str, status: u16, code: &str) {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head: {answer}"));
    assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{head}");
    let body: serde_json::Value = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {body}"));
    assert_eq!((&body["status"], &body["code"]), (&status.into(), &code.into()), "{body}");
    let id = body["request_id"].as_str().expect("an id");
    assert!(head.contains(&format!("x-request-id: {id}")), "{head}");
    for header in
        ["x-content-type-options: nosniff", "content-security-policy: default-src 'none'", "connection: close"]
    {
        assert!(head.contains(header), "{header}: {head}");
    }
}

#[tokio::test]
async fn bytes_that_are_not_http_get_a_whole_problem() {
    let app = impatient().await;
    for head in [
        "GET /healthz HTTP/9.9\r\nhost: x\r\n\r\n",
        "GET /healthz HTTP/1.1\r\nhost x\r\n\r\n",
        "G\u{0}T / HTTP/1.1\r\nhost: x\r\n\r\n",
        "POST /v1/runs HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
    ] {
        is_whole_problem(&exchange(&app, head.as_bytes()).await, 400, "SG0001");
        // Also behind another request on the same connection.
        let both = exchange(&app, format!("GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n{head}").as_bytes()).await;
        let (first, second) = both.split_at(both.rfind("HTTP/1.1 ").expect("an answer"));
        assert!(first.starts_with("HTTP/1.1 200") && first.ends_with("ok\n"), "{both}");
        is_whole_problem(second, 400, "SG0001");
    }
    let late = exchange(&app, b"GET /healthz HTTP/1.1\r\nhost: x\r\n").await;
    is_whole_problem(&late, 408, "SG0006");
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

#[tokio::test]
async fn probes_are_answered_though_idle_connections_hold_every_place() {
    let app = spawn(HttpConfig { max_connections: 4, max_connections_per_peer: Some(4), ..keys() }).await;
    let mut idle = Vec::new();
    for _ in 0..200 {
        idle.push(http_2(&app, 65_535).await);
    }
    for path in ["/healthz", "/readyz", "/health", "/metrics"] {
        let answer = exchange(&app, format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
        let mut client = http_2(&app, 65_535).await;
        let (response, _) = client.send_request(get(&app, path), true).expect("sent");
        assert_eq!(response.await.expect("an answer").status(), 200, "{path}");
    }
    let refused = exchange(&app, b"GET /v1/runs HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert!(refused.starts_with("HTTP/1.1 503") && refused.contains("SG0013"), "{refused}");
    assert!(refused.contains("retry-after") && refused.contains("connection: close"), "{refused}");
}

#[tokio::test]
async fn one_address_does_not_take_every_place() {
    let app = spawn(HttpConfig { max_connections: 4, ..keys() }).await;
    let mut idle = Vec::new();
    for _ in 0..3 {
        idle.push(http_2(&app, 65_535).await.ready().await.expect("ready"));
    }
    let refused = exchange(&app, b"GET /v1/runs HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert!(refused.contains("SG0013"), "three quarters of the places are taken by this address: {refused}");
}

#[tokio::test]
async fn a_connection_of_http_2_that_asks_nothing_is_closed() {
    let short = Span(Duration::from_millis(300));
    let app = spawn(HttpConfig { header_timeout: short, keepalive_timeout: short, ..keys() }).await;
    for asks_once in [false, true] {
        let stream = TcpStream::connect(app.address).await.expect("a connection");
        let (mut client, connection) = h2::client::handshake(stream).await.expect("a handshake");
        let connection = tokio::spawn(connection);
        if asks_once {
            let (response, _) = client.send_request(get(&app, "/healthz"), true).expect("sent");
            assert_eq!(response.await.expect("an answer").status(), 200);
        }
        // It answers pings all the while. A test that hangs here has found that this suffices.
        let _ = connection.await.expect("no panic");
    }
}

#[tokio::test]
async fn keep_alive_and_heads_have_a_time_limit_each() {
    let (short, long) = (Span(Duration::from_millis(300)), Span(Duration::from_hours(1)));
    let whole = "GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n";
    let app = spawn(HttpConfig { header_timeout: long, keepalive_timeout: short, ..keys() }).await;
    let answers = exchange(&app, whole.repeat(2).as_bytes()).await;
    assert_eq!(answers.matches("200 OK").count(), 2, "idle after two: {answers}");
    let app = spawn(HttpConfig { header_timeout: short, keepalive_timeout: long, ..keys() }).await;
    let mut stream = TcpStream::connect(app.address).await.expect("a connection");
    stream.write_all(whole.as_bytes()).await.expect("sent");
    let mut answer = vec![0; 12];
    stream.read_exact(&mut answer).await.expect("an answer");
    stream.write_all(b"GET /healthz HTTP/1.1\r\n").await.expect("sent");
    stream.read_to_end(&mut answer).await.expect("it ends by itself");
}

#[tokio::test]
async fn unread_answers_of_http_2_are_given_up_one_by_one() {
    let app = spawn(HttpConfig { request_timeout: Span(Duration::from_millis(500)), ..keys() }).await;
    // No window at all, one that takes a part, and one that takes all but the end.
    let length = app.get("/openapi.json").await.text.len();
    for window in [0, 20_000, u32::try_from(length).expect("small") - 1] {
        let mut client = http_2(&app, window).await;
        let mut unread = Vec::new();
        for _ in 0..20 {
            client = client.ready().await.expect("ready");
            let (response, _) = client.send_request(get(&app, "/openapi.json"), true).expect("sent");
            unread.push(response.await.expect("its head needs no window").into_body());
        }
        for body in &mut unread {
            let reason = loop {
                match body.data().await.expect("no clean end") {
                    Ok(_) => {}
                    Err(error) => break error.reason(),
                }
            };
            assert!(reason.is_some(), "the stream alone is reset");
        }
        client = client.ready().await.expect("the connection goes on");
        let (response, _) = client.send_request(get(&app, "/v1/runs/none"), true).expect("sent");
        assert_eq!(response.await.expect("an answer").status(), 404);
    }
}

#[tokio::test]
async fn an_answer_that_is_read_slowly_over_http_2_is_whole() {
    let app = spawn(keys()).await;
    let expected = app.get("/openapi.json").await.text;
    let mut client = http_2(&app, 1_000).await;
    let (response, _) = client.send_request(get(&app, "/openapi.json"), true).expect("sent");
    let mut body = response.await.expect("an answer").into_body();
    let mut read = Vec::new();
    while let Some(piece) = body.data().await {
        let piece = piece.expect("a piece");
        body.flow_control().release_capacity(piece.len()).expect("more");
        read.extend_from_slice(&piece);
    }
    assert_eq!(String::from_utf8(read).expect("text"), expected);
}

#[tokio::test]
async fn a_request_has_one_host_and_probes_need_none() {
    let app = spawn_app().await;
    let key = format!("authorization: Bearer {}\r\nconnection: close\r\n", app.viewer);
    for (version, hosts, status) in [
        ("1.1", "host: x\r\n", 200),
        ("1.1", "host: x:80\r\n", 200),
        ("1.1", "", 400),
        ("1.1", "host: x\r\nhost: x\r\n", 400),
        ("1.1", "host: x\r\nHost: y\r\n", 400),
        ("1.1", "host: a b\r\n", 400),
        ("1.1", "host: me@x\r\n", 400),
        ("1.0", "", 200),
        ("1.0", "host: x\r\nhost: y\r\n", 400),
    ] {
        let answer = exchange(&app, format!("GET /v1/runs HTTP/{version}\r\n{hosts}{key}\r\n").as_bytes()).await;
        assert_eq!(answer.split(' ').nth(1), Some(status.to_string().as_str()), "{version} {hosts:?}: {answer}");
        assert!(answer.contains("x-request-id"), "{answer}");
        let probe = exchange(&app, format!("GET /healthz HTTP/{version}\r\n{hosts}{key}\r\n").as_bytes()).await;
        assert!(probe.contains("200 OK"), "{version} {hosts:?}: {probe}");
    }
}

/// The head of a submit whose body is still to come.
fn submit_head(app: &TestApp, key: &str) -> http::Request<()> {
    let request = http::Request::post(app.url("/v1/runs")).header("content-type", "application/json");
    request.header("authorization", format!("Bearer {key}")).body(()).expect("a request")
}

#[tokio::test]
async fn bodies_that_do_not_come_block_no_other_request() {
    let app = spawn_app().await;
    let mut held = Vec::new();
    for _ in 0..6 {
        let mut client = http_2(&app, 65_535).await;
        for _ in 0..250 {
            client = client.ready().await.expect("ready");
            held.push(client.send_request(submit_head(&app, &app.operator), false).expect("sent"));
        }
    }
    for key in [&app.stranger, &app.viewer] {
        assert_eq!(app.send(app.http.get(app.url("/v1/runs")).bearer_auth(key)).await.status, 200);
    }
}

#[tokio::test]
async fn a_body_that_does_not_fit_waits_and_is_not_lost() {
    let app = spawn(HttpConfig { body_max_bytes: 1_000, bodies_max_bytes: Some(1_000), ..keys() }).await;
    app.register(PIPELINE).await;
    let body = serde_json::json!({ "pipeline": "two-steps", "input": { "brief": "b".repeat(500) } }).to_string();
    let mut client = http_2(&app, 65_535).await.ready().await.expect("ready");
    let (first, mut sending) = client.send_request(submit_head(&app, &app.operator), false).expect("sent");
    sending.send_data(bytes::Bytes::from(body[..1].to_owned()), false).expect("sent");
    let mut waiting = Vec::new();
    for _ in 0..5 {
        client = client.ready().await.expect("ready");
        let (answer, mut sending) = client.send_request(submit_head(&app, &app.operator), false).expect("sent");
        sending.send_data(bytes::Bytes::from(body.clone()), true).expect("sent");
        waiting.push(answer);
    }
    sending.send_data(bytes::Bytes::from(body[1..].to_owned()), true).expect("sent");
    for answer in std::iter::once(first).chain(waiting) {
        assert_eq!(answer.await.expect("an answer").status(), 202);
    }
}

#[tokio::test]
async fn a_tenant_that_fills_its_part_of_the_line_for_bodies_keeps_no_other_out_of_it() {
    let app = spawn(HttpConfig { body_max_bytes: 1_000, bodies_max_bytes: Some(1_000), ..keys() }).await;
    let register = app.http.post(app.url("/v1/pipelines")).bearer_auth(&app.stranger);
    let register = register.header("content-type", "text/yaml").body(PIPELINE).send().await.expect("an answer");
    assert_eq!(register.status(), 201);
    // The first one has all the room, and the others wait, until no more of them may.
    let (mut sending, mut answers) = (Vec::new(), futures::stream::FuturesUnordered::new());
    for _ in 0..6 {
        let mut client = http_2(&app, 65_535).await;
        for _ in 0..250 {
            client = client.ready().await.expect("ready");
            let (answer, mut body) = client.send_request(submit_head(&app, &app.operator), false).expect("sent");
            body.send_data(bytes::Bytes::from_static(b"{"), false).expect("sent");
            sending.push(body);
            answers.push(answer);
        }
    }
    let refused = answers.next().await.expect("one of many").expect("an answer");
    assert_eq!(refused.status(), 429, "the line is full for this tenant");
    let body = serde_json::json!({ "pipeline": "two-steps", "input": { "brief": "b" } });
    let other = app.http.post(app.url("/v1/runs")).bearer_auth(&app.stranger).json(&body).send();
    let ended = async {
        // The other one has come by then.
        for _ in 0..20 {
            assert_eq!(app.http.get(app.url("/healthz")).send().await.expect("an answer").status(), 200);
        }
        for mut body in sending {
            drop(body.send_data(bytes::Bytes::from_static(b"}"), true)); // Those that were refused take no more.
        }
        drop(answers.collect::<Vec<_>>().await);
    };
    let (other, ()) = futures::join!(other, ended);
    assert_eq!(other.expect("an answer").status(), 202);
}

#[tokio::test]
async fn probes_are_answered_while_every_thread_that_handles_requests_is_busy() {
    let busy = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let options = Options { http: keys(), ..Options::default() };
    let app = TestApp::spawn_with(options, EngineConfig::default(), Some(busy.handle().clone())).await;
    assert_eq!(app.get("/v1/runs").await.status, 200, "handled there");
    let (free, held) = std::sync::mpsc::channel::<()>();
    busy.spawn(async move { held.recv().is_err() });
    let mut client = http_2(&app, 65_535).await.ready().await.expect("ready");
    let (waits, _) = client.send_request(get(&app, "/v1/runs"), true).expect("sent");
    for path in ["/healthz", "/readyz", "/health", "/metrics"] {
        let answer = exchange(&app, format!("GET {path} HTTP/1.1\r\nconnection: close\r\n\r\n").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
        client = client.ready().await.expect("ready");
        let (answer, _) = client.send_request(get(&app, path), true).expect("sent");
        assert_eq!(answer.await.expect("an answer").status(), 200, "{path}, beside a request that waits");
    }
    drop(free);
    assert_eq!(waits.await.expect("an answer").status(), 200);
    busy.shutdown_background();
}
