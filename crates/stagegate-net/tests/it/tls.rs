//! TLS: whom we trust, and HTTP/2.

use std::{path::PathBuf, sync::Arc};

use stagegate_net::{Client, NetConfig, Stage, Trusted};
use stagegate_testkit::{
    FakeProvider,
    provider::{Reply, any},
    tls::TestAuthority,
};
use tokio::{sync::watch, task::JoinSet};

use crate::{client, post};

fn address(fake: &FakeProvider) -> Trusted {
    Trusted::parse(&format!("{}/chat/completions", fake.openai_base_url())).expect("an address")
}

/// A client that knows this authority beside those of the system.
fn knowing(authority: &TestAuthority, http2: bool) -> Client {
    let folder = tempfile::tempdir().expect("a directory");
    let path: PathBuf = folder.path().join("ca.pem");
    std::fs::write(&path, format!("Our own authority:\n{}", authority.pem())).expect("writable");
    Client::new(&NetConfig { ca_file: Some(path), http2, ..NetConfig::default() }).expect("a client")
}

#[tokio::test]
async fn a_server_is_trusted_once_its_authority_is_named() {
    let authority = TestAuthority::new();
    let fake = FakeProvider::start_tls(&authority, &["http/1.1"], 1).await;
    for stranger in [client(), knowing(&TestAuthority::new(), true)] {
        let failure = stranger.send(address(&fake), post()).await.expect_err("a stranger");
        assert_eq!(failure.stage, Stage::Connecting);
        assert!(failure.is_unknown_authority(), "{failure}");
    }
    assert_eq!(fake.call_count(), 0);
    let answer = knowing(&authority, true).send(address(&fake), post()).await.expect("an answer");
    assert_eq!(answer.status.as_u16(), 200);
}

#[tokio::test]
async fn http2_is_spoken_where_the_server_offers_it_unless_it_is_turned_off() {
    let authority = TestAuthority::new();
    for (offered, wanted, is_http2) in
        [(&["h2", "http/1.1"][..], true, true), (&["http/1.1"], true, false), (&["h2", "http/1.1"], false, false)]
    {
        let fake = FakeProvider::start_tls(&authority, offered, 100).await;
        knowing(&authority, wanted).send(address(&fake), post()).await.expect("an answer");
        assert_eq!(fake.calls()[0].is_http2, is_http2, "{offered:?}");
    }
}

#[tokio::test]
async fn more_exchanges_than_a_connection_takes_get_further_connections() {
    const EXCHANGES: usize = 150;
    let authority = TestAuthority::new();
    let fake = FakeProvider::start_tls(&authority, &["h2"], 64).await;
    let (open, gate) = watch::channel(false);
    fake.on(any()).respond(Reply::raw("{}").when(gate));
    let client = Arc::new(knowing(&authority, true).for_exchanges(EXCHANGES).expect("a client"));
    let mut exchanges = JoinSet::new();
    for _ in 0..EXCHANGES {
        let (client, address) = (Arc::clone(&client), address(&fake));
        exchanges.spawn(async move { client.send(address, post()).await.map(|answer| answer.status.as_u16()) });
    }
    // All are under way before any is answered.
    while fake.call_count() < EXCHANGES {
        tokio::task::yield_now().await;
    }
    open.send_replace(true);
    let answers = exchanges.join_all().await;
    assert!(answers.iter().all(|answer| *answer == Ok(200)), "{answers:?}");
}
