//! Proxies over real sockets: which requests go over them, and in which form.

use stagegate_core::Secret;
use stagegate_net::{Client, NetConfig, Stage, Trusted};
use stagegate_testkit::{FakeProvider, tls::TestAuthority};

use crate::{
    post,
    raw::{Act, Raw},
};

const TEAPOT: &str = "HTTP/1.1 418 Teapot\r\ncontent-length: 0\r\n\r\n";

fn config(proxy: &Raw, no_proxy: &[&str]) -> NetConfig {
    NetConfig {
        proxy: Some(Secret::from(format!("http://user:hunter2@{}", proxy.address))),
        no_proxy: no_proxy.iter().map(|entry| (*entry).to_owned()).collect(),
        ..NetConfig::default()
    }
}

fn to(text: &str) -> Trusted {
    Trusted::parse(text).expect("an address")
}

#[tokio::test]
async fn a_request_in_the_clear_is_handed_to_the_proxy_with_its_credentials() {
    let (fake, proxy) = (FakeProvider::start().await, Raw::start(Act::Answer(TEAPOT)).await);
    let client = Client::new(&config(&proxy, &["elsewhere.example"])).expect("a client");
    let answer = client.send(to(&format!("{}/v1?x=1", fake.origin())), post()).await.expect("an answer");
    assert_eq!((answer.status.as_u16(), fake.call_count()), (418, 0));
    let head = proxy.heads().remove(0);
    assert!(head.starts_with(&format!("post {}/v1?x=1 http/1.1", fake.origin())), "{head}");
    // user:hunter2
    assert!(head.contains("proxy-authorization: basic dxnlcjpodw50zxiy"), "{head}");
}

#[tokio::test]
async fn an_encrypted_request_goes_through_a_tunnel_that_sees_only_the_host() {
    let authority = TestAuthority::new();
    let fake = FakeProvider::start_tls(&authority, &["h2", "http/1.1"], 100).await;
    let proxy = Raw::start(Act::Tunnel).await;
    let folder = tempfile::tempdir().expect("a directory");
    let ca_file = folder.path().join("ca.pem");
    std::fs::write(&ca_file, authority.pem()).expect("writable");
    let client = Client::new(&NetConfig { ca_file: Some(ca_file), ..config(&proxy, &[]) }).expect("a client");
    let answer = client.send(to(&format!("{}/v1/chat/completions", fake.origin())), post()).await.expect("an answer");
    assert_eq!((answer.status.as_u16(), fake.call_count()), (200, 1));
    assert!(!fake.calls()[0].headers.contains_key("proxy-authorization"));
    let head = proxy.heads().remove(0);
    assert!(head.starts_with(&format!("connect {} http/1.1", fake.address())), "{head}");
    assert!(head.contains("proxy-authorization: basic"), "{head}");
}

#[tokio::test]
async fn what_no_proxy_names_is_reached_directly() {
    let (fake, proxy) = (FakeProvider::start().await, Raw::start(Act::Answer(TEAPOT)).await);
    let port = format!("127.0.0.1:{}", fake.address().port());
    for entry in
        ["*", "127.0.0.1", "127.0.0.0/8", "127.*", port.as_str(), "a.example, 127.0.0.1", "a.example 127.0.0.1"]
    {
        let client = Client::new(&config(&proxy, &[entry])).expect("a client");
        let address = to(&format!("{}/chat/completions", fake.openai_base_url()));
        assert_eq!(client.proxy_before(&address), None, "{entry}");
        assert_eq!(client.send(address, post()).await.expect("an answer").status.as_u16(), 200, "{entry}");
    }
    assert_eq!(proxy.accepted(), 0);
}

#[tokio::test]
async fn a_proxy_that_is_not_there_is_named_without_its_credentials() {
    let fake = FakeProvider::start().await;
    let proxy = Raw::start(Act::Answer(TEAPOT)).await;
    let (config, gone) = (config(&proxy, &[]), proxy.address);
    drop(proxy);
    let client = Client::new(&config).expect("a client");
    let failure = loop {
        // The listener is closed by its task, some moments after it is told to end.
        match client.send(to(&fake.origin()), post()).await {
            Err(failure) if failure.stage == Stage::Connecting => break failure,
            _ => tokio::task::yield_now().await,
        }
    };
    assert_eq!(failure.proxy, Some(gone.to_string()));
    assert!(!format!("{failure} {failure:?} {client:?}").contains("hunter2"));
}
