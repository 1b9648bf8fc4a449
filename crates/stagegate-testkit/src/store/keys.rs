//! Promises about API keys, and about the store as such.

use stagegate_core::store::{ApiKey, NewApiKey, Role};

use super::{
    Subject,
    fixtures::{at, key_id, tenant},
};

fn key(of: &str, role: Role, n: u8) -> NewApiKey {
    let key = ApiKey {
        id: key_id(),
        tenant: tenant(of),
        role,
        name: format!("key é {n}"),
        created_at: at(i64::from(n)),
        expires_at: n.is_multiple_of(2).then(|| at(1_000)),
        revoked_at: None,
        failure: None,
    };
    NewApiKey { key, hash: [n; 32] }
}

/// By its hash and by nothing else.
pub async fn a_key_is_found_by_its_hash(subject: Subject) {
    for (n, role) in (1..).zip(Role::ALL) {
        let new = key("acme", role, n);
        subject.store.create_key(&new).await.expect("create");
        assert_eq!(subject.store.key_by_hash(&[n; 32]).await.expect("read"), Some(new.key));
    }
    assert_eq!(subject.store.key_by_hash(&[99; 32]).await.expect("read"), None);
}

/// Of one tenant, or of all.
pub async fn keys_are_listed_by_tenant(subject: Subject) {
    let (a, b) = (key("acme", Role::Viewer, 1), key("umbrella", Role::Admin, 2));
    for new in [&a, &b] {
        subject.store.create_key(new).await.expect("create");
    }
    assert_eq!(subject.store.keys(Some(&tenant("acme"))).await.expect("list"), std::slice::from_ref(&a.key));
    assert_eq!(subject.store.keys(Some(&tenant("nobody"))).await.expect("list"), []);
    let mut all = subject.store.keys(None).await.expect("list");
    all.sort_by_key(|key| key.created_at);
    assert_eq!(all, [a.key, b.key]);
}

/// The first revocation counts.
pub async fn a_key_is_revoked_once(subject: Subject) {
    let new = key("acme", Role::Operator, 1);
    subject.store.create_key(&new).await.expect("create");
    assert!(!subject.store.revoke_key(key_id(), at(5)).await.expect("revoke"));
    assert!(subject.store.revoke_key(new.key.id, at(6)).await.expect("revoke"));
    assert!(subject.store.revoke_key(new.key.id, at(7)).await.expect("revoke"));
    let read = subject.store.key_by_hash(&new.hash).await.expect("read").expect("it is still there");
    assert_eq!(read, ApiKey { revoked_at: Some(at(6)), ..new.key });
}

/// It can be asked whether it is there, and closed.
pub async fn the_store_answers_and_names_itself(subject: Subject) {
    subject.store.ping().await.expect("pong");
    assert!(["postgres", "sqlite", "memory"].contains(&subject.store.kind()));
    subject.store.close().await;
    assert!(subject.store.ping().await.is_err());
}
