//! The proxy does to bytes what it is told, and nothing else.

use std::time::Duration;

use stagegate_testkit::proxy::{Mode, Proxy};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::timeout,
};

/// Long enough for what is to happen, and for what must not.
const MOMENT: Duration = Duration::from_millis(300);

/// A server that answers each message by itself, on any number of connections.
async fn echo() -> (std::net::SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    let server = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.expect("accepts");
            tokio::spawn(async move {
                let mut buffer = [0; 64];
                while let Ok(length @ 1..) = stream.read(&mut buffer).await {
                    if stream.write_all(&buffer[..length]).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    (address, server)
}

async fn asked(stream: &mut TcpStream, text: &str) -> Option<String> {
    stream.write_all(text.as_bytes()).await.ok()?;
    heard(stream).await
}

/// What comes; None where nothing does, empty where the connection ended.
async fn heard(stream: &mut TcpStream) -> Option<String> {
    let mut buffer = [0; 64];
    let length = timeout(MOMENT, stream.read(&mut buffer)).await.ok()?.unwrap_or(0);
    Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

#[tokio::test]
async fn a_blackhole_holds_back_and_gives_up_nothing() {
    let (server, _running) = echo().await;
    let proxy = Proxy::start(server).await.expect("a proxy");
    let mut old = TcpStream::connect(proxy.address()).await.expect("connects");
    assert_eq!(asked(&mut old, "one").await.as_deref(), Some("one"));
    proxy.set(Mode::Blackhole);
    let mut new = TcpStream::connect(proxy.address()).await.expect("accepts all the same");
    assert_eq!(asked(&mut old, "two").await, None);
    assert_eq!(asked(&mut new, "three").await, None);
    proxy.set(Mode::Pass);
    assert_eq!(heard(&mut old).await.as_deref(), Some("two"), "however late");
    assert_eq!(heard(&mut new).await.as_deref(), Some("three"));
}

#[tokio::test]
async fn a_cut_comes_in_the_middle_of_the_next_answer_of_the_connections_that_were_open() {
    let (server, _running) = echo().await;
    let proxy = Proxy::start(server).await.expect("a proxy");
    let mut open = TcpStream::connect(proxy.address()).await.expect("connects");
    assert_eq!(asked(&mut open, "12345678").await.as_deref(), Some("12345678"));
    proxy.cut_mid_reply();
    let mut later = TcpStream::connect(proxy.address()).await.expect("connects");
    assert_eq!(asked(&mut later, "12345678").await.as_deref(), Some("12345678"), "it was not open then");
    assert_eq!(asked(&mut open, "12345678").await.as_deref(), Some("1234"));
    assert_eq!(heard(&mut open).await.as_deref(), Some(""), "and then it ends");
    assert_eq!(proxy.cut_count(), 1);
}

#[tokio::test]
async fn refused_connections_break_at_once() {
    let (server, _running) = echo().await;
    let proxy = Proxy::start(server).await.expect("a proxy");
    let mut open = TcpStream::connect(proxy.address()).await.expect("connects");
    assert_eq!(asked(&mut open, "one").await.as_deref(), Some("one"));
    proxy.set(Mode::Refuse);
    assert_eq!(heard(&mut open).await.as_deref(), Some(""));
    let mut new = TcpStream::connect(proxy.address()).await.expect("loopback connects");
    assert_eq!(heard(&mut new).await.as_deref(), Some(""));
}
