//! Addresses that callers wrote: what they reach, and what they do not, whatever a name resolves to.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use stagegate_core::Secret;
use stagegate_net::{
    Client, Guard, GuardedClient, NetConfig, Refused, Stage,
    guard::{GuardedProxy, Lookup},
};
use stagegate_testkit::{
    FakeProvider,
    provider::{Reply, any},
};

use crate::{
    client, post,
    raw::{Act, Raw},
};

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";

/// Resolves every name to these, one list for each look-up, the last one from then on.
fn resolving(lists: &[&[IpAddr]]) -> (Lookup, Arc<AtomicUsize>) {
    let lists: Vec<Vec<IpAddr>> = lists.iter().map(|list| list.to_vec()).collect();
    let count = Arc::new(AtomicUsize::new(0));
    let asked = Arc::clone(&count);
    let lookup: Lookup = Arc::new(move |_| {
        let index = asked.fetch_add(1, Ordering::SeqCst).min(lists.len() - 1);
        let found = lists[index].clone();
        Box::pin(async move { Ok(found) })
    });
    (lookup, count)
}

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const PUBLIC: IpAddr = IpAddr::V4(Ipv4Addr::new(93, 184, 216, 34));

fn lenient() -> Guard {
    Guard { allow_http: true, allowed: vec!["127.0.0.0/8".parse().expect("a network")], ..Guard::default() }
}

async fn stage(guarded: &GuardedClient, text: &str) -> Stage {
    let address = guarded.address(text).expect("nothing is wrong with it as it stands");
    guarded.send(address, post()).await.expect_err("refused").stage
}

#[tokio::test]
async fn a_name_that_leads_inside_is_refused_before_any_connection() {
    let fake = FakeProvider::start().await;
    let (there, port) = (fake.address().port(), Guard { allow_http: true, ..Guard::default() });
    let inside: [&[IpAddr]; 5] = [
        &[LOOPBACK],
        &[PUBLIC, LOOPBACK],
        &[LOOPBACK, PUBLIC],
        &["::ffff:127.0.0.1".parse().expect("an address")],
        &["10.0.0.1".parse().expect("an address"), "fd00::1".parse().expect("an address")],
    ];
    for found in inside {
        let (lookup, _) = resolving(&[found]);
        let guarded = client().guarded_with(port.clone(), lookup).expect("a client");
        let refused = Stage::Refused(Refused::ResolvesElsewhere);
        assert_eq!(stage(&guarded, &format!("http://hook.example:{there}/")).await, refused, "{found:?}");
    }
    // The system's own names, too.
    let guarded = client().guarded(port).expect("a client");
    let refused = Stage::Refused(Refused::ResolvesElsewhere);
    assert_eq!(stage(&guarded, &format!("http://localhost:{there}/")).await, refused);
    assert_eq!(fake.call_count(), 0);
}

#[tokio::test]
async fn the_connection_goes_to_the_address_that_was_judged() {
    let server = Raw::start(Act::Answer(OK)).await;
    // A name that changes its mind: a second look-up would lead elsewhere.
    let (lookup, count) = resolving(&[&[LOOPBACK], &[IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1))]]);
    let guarded = client().guarded_with(lenient(), lookup).expect("a client");
    for _ in 0..3 {
        let address = guarded.address(&format!("http://hook.example:{}/x", server.address.port())).expect("valid");
        assert_eq!(guarded.send(address, post()).await.expect("an answer").status.as_u16(), 200);
    }
    assert_eq!((count.load(Ordering::SeqCst), server.accepted()), (1, 1));
    assert!(server.heads()[0].contains(&format!("host: hook.example:{}", server.address.port())));
}

#[tokio::test]
async fn an_address_read_under_other_rules_is_judged_again() {
    let fake = FakeProvider::start().await;
    let address = lenient().read(&fake.origin()).expect("allowed there");
    let strict = client().guarded(Guard { allow_http: true, ..Guard::default() }).expect("a client");
    let stage = strict.send(address, post()).await.expect_err("refused").stage;
    assert!(matches!(stage, Stage::Refused(Refused::NotPublic(_))), "{stage:?}");
    assert_eq!(fake.call_count(), 0);
}

#[tokio::test]
async fn a_redirect_to_the_inside_is_not_followed() {
    let (fake, inside) = (FakeProvider::start().await, FakeProvider::start().await);
    fake.on(any()).respond(Reply::status(307, "").header("location", &inside.origin()));
    let guarded = client().guarded(lenient()).expect("a client");
    let address = guarded.address(&format!("{}/chat/completions", fake.openai_base_url())).expect("valid");
    assert_eq!(guarded.send(address, post()).await.expect("an answer").status.as_u16(), 307);
    assert_eq!(inside.call_count(), 0);
}

#[tokio::test]
async fn proxies_are_used_only_where_they_judge_addresses_themselves() {
    let (server, proxy) = (Raw::start(Act::Answer(OK)).await, Raw::start(Act::Answer(OK)).await);
    let config = NetConfig { proxy: Some(Secret::from(format!("http://{}", proxy.address))), ..NetConfig::default() };
    let client = Client::new(&config).expect("a client");
    let there = format!("http://hook.example:{}/", server.address.port());
    for (rules, over_the_proxy) in [(GuardedProxy::Never, 0), (GuardedProxy::Judges, 1)] {
        let (lookup, count) = resolving(&[&[LOOPBACK]]);
        let guarded = client.guarded_with(Guard { proxy: rules, ..lenient() }, lookup).expect("a client");
        let address = guarded.address(&there).expect("valid");
        guarded.send(address, post()).await.expect("an answer");
        assert_eq!(proxy.heads().len(), over_the_proxy, "{rules:?}");
        assert_eq!(count.load(Ordering::SeqCst), 1 - over_the_proxy, "the proxy resolves what it is given");
        let strict = Guard { allow_http: true, proxy: rules, ..Guard::default() };
        assert!(matches!(strict.read("http://169.254.169.254/"), Err(Refused::NotPublic(_))));
    }
}
