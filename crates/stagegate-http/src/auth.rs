//! Authentication: owns API keys' form, their look-up and the guard of an open daemon. What is kept of a key is the
//! SHA-256 of its secret: 256 random bits need no slow hash, and an index look-up by hash tells nothing by its timing.
//!
//! A verified key is trusted for [`KEY_CACHE_TTL`] without asking the store, so a revocation is obeyed within that.
//!
//! A flood of wrong keys costs the store little: a wrong key is remembered as wrong, only a few look-ups are under way at
//! once, and a peer that failed too often (`failures.rs`) is told to wait instead of being looked up. A right key of
//! the same peer goes on: one that was right within `FAMILIAR_FOR` is always looked up. So only the first use of a key
//! on this replica has to wait, a second or so at a time, while somebody behind the same address guesses.

use std::{fmt::Write as _, net::IpAddr, sync::Arc, time::Duration};

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::Response,
};
use chrono::{DateTime, Utc};
use http::{
    HeaderMap, Method, Uri,
    header::{AUTHORIZATION, HOST, ORIGIN, WWW_AUTHENTICATE},
};
use moka::sync::Cache;
use sha2::{Digest, Sha256};
use stagegate_core::{
    Code, Error, StoreError, TenantId,
    store::{ApiKey, Role},
};
use tokio::time::Instant;

use crate::{context::Identity, problem::Problem, serve::Peer, state::Shared};

/// How long a look-up, found or not, is remembered: the longest time that a revoked key still works.
pub const KEY_CACHE_TTL: Duration = Duration::from_secs(5);
/// Look-ups remembered at once.
const KEY_CACHE_MAX: u64 = 10_000;
/// How long a key that was right counts as familiar.
pub(crate) const FAMILIAR_FOR: Duration = Duration::from_hours(1);
/// How every secret begins, so that scanners and people can tell what it is.
pub const KEY_PREFIX: &str = "sg_";
/// The longest credential that is looked at.
const CREDENTIAL_MAX_BYTES: usize = 256;

/// A new secret, and the hash that is kept of it.
pub fn generate_key(rng: &mut impl rand::CryptoRng) -> (String, [u8; 32]) {
    let mut random = [0_u8; 32];
    rng.fill_bytes(&mut random);
    let mut secret = String::with_capacity(KEY_PREFIX.len() + 64);
    secret.push_str(KEY_PREFIX);
    for byte in random {
        // Writing to a string cannot fail.
        let _ = write!(secret, "{byte:02x}");
    }
    let hash = hash_secret(&secret);
    (secret, hash)
}

/// SHA-256 of a secret: what the store keeps.
pub fn hash_secret(secret: &str) -> [u8; 32] {
    Sha256::digest(secret.as_bytes()).into()
}

/// The keys that were looked up lately.
pub(crate) struct KeyCache {
    right: Cache<[u8; 32], Arc<ApiKey>>,
    /// Beside the right ones, so that a flood of these displaces none of those.
    wrong: Cache<[u8; 32], ()>,
    familiar: Cache<[u8; 32], ()>,
}

/// What is remembered of a key.
enum Remembered {
    Right(Arc<ApiKey>),
    Wrong,
    Nothing,
}

impl KeyCache {
    pub(crate) fn new() -> Self {
        let cache = || Cache::builder().max_capacity(KEY_CACHE_MAX);
        Self {
            right: cache().time_to_live(KEY_CACHE_TTL).build(),
            wrong: Cache::builder().max_capacity(KEY_CACHE_MAX).time_to_live(KEY_CACHE_TTL).build(),
            familiar: Cache::builder().max_capacity(KEY_CACHE_MAX).time_to_live(FAMILIAR_FOR).build(),
        }
    }

    /// What is remembered of a key.
    fn remembered(&self, hash: &[u8; 32]) -> Remembered {
        match self.right.get(hash) {
            Some(key) => Remembered::Right(key),
            None if self.wrong.contains_key(hash) => Remembered::Wrong,
            None => Remembered::Nothing,
        }
    }

    /// A failed look-up is not remembered. Two requests may look up the same new key at once: it is one index read.
    async fn find(&self, shared: &Shared, hash: [u8; 32]) -> Result<Option<Arc<ApiKey>>, StoreError> {
        match self.remembered(&hash) {
            Remembered::Right(key) => return Ok(Some(key)),
            Remembered::Wrong => return Ok(None),
            Remembered::Nothing => {}
        }
        // Those that are familiar do not stand in line with those that may be made up.
        let is_familiar = self.familiar.contains_key(&hash);
        let _turn = if is_familiar { None } else { shared.lookups.acquire().await.ok() };
        match self.remembered(&hash) {
            Remembered::Right(key) => return Ok(Some(key)),
            Remembered::Wrong => return Ok(None),
            Remembered::Nothing => {}
        }
        let found = shared.engine.store().key_by_hash(&hash).await?.map(Arc::new);
        match &found {
            Some(key) => self.right.insert(hash, Arc::clone(key)),
            None => self.wrong.insert(hash, ()),
        }
        Ok(found)
    }
}

/// The key that a request came with, for what goes on after its answer has begun: an event stream must not outlive it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Credential([u8; 32]);

impl Credential {
    /// Whether the key may still be used. Asks the store at most once every [`KEY_CACHE_TTL`] for all streams of a key;
    /// while the store cannot say, nothing has changed.
    pub(crate) async fn is_alive(self, shared: &Shared) -> bool {
        match shared.keys.find(shared, self.0).await {
            Ok(key) => key.is_some_and(|key| check_alive(&key, shared.clock.now()).is_ok()),
            Err(error) => {
                tracing::warn!(%error, "the key of an event stream could not be looked up; the stream goes on");
                true
            }
        }
    }
}

/// Layer 9: finds out who calls, or refuses.
pub(crate) async fn authenticate(
    State(shared): State<Shared>,
    mut request: Request,
    next: Next,
) -> Result<Response, Problem> {
    let identity = if shared.open {
        Identity { tenant: TenantId::default(), role: Role::Admin, key: None }
    } else {
        let peer = request.extensions().get::<Peer>().copied();
        let (key, hash) = match presented(request.headers()) {
            Some(secret) => known_key(&shared, peer, secret).await?,
            None => return Err(missing()),
        };
        request.extensions_mut().insert(Credential(hash));
        Identity { tenant: key.tenant.clone(), role: key.role, key: Some(key.id) }
    };
    tracing::Span::current().record("tenant", identity.tenant.as_str());
    request.extensions_mut().insert(identity);
    Ok(next.run(request).await)
}

/// The key of a secret that a peer presents. One that is refused counts against the peer.
async fn known_key(shared: &Shared, peer: Option<Peer>, secret: &str) -> Result<(Arc<ApiKey>, [u8; 32]), Problem> {
    let hash = hash_secret(secret);
    let is_trusted = shared.keys.right.contains_key(&hash) || shared.keys.familiar.contains_key(&hash);
    if let Some(peer) = peer
        && !is_trusted
        && let Some(wait) = shared.failures.wait_of(peer, Instant::now())
    {
        let detail = "Too many authentications from this address failed; come back when `retry-after` says so.";
        return Err(Error::new(Code::TooManyFailures, detail).retry_after(wait).into());
    }
    let failed = |problem| {
        if let Some(peer) = peer {
            shared.failures.note(peer, Instant::now());
        }
        problem
    };
    if secret.len() > CREDENTIAL_MAX_BYTES || !secret.starts_with(KEY_PREFIX) {
        return Err(failed(refused("This is not an API key of Stagegate: one begins with `sg_`.")));
    }
    let key = shared.keys.find(shared, hash).await?;
    let key = key.ok_or_else(|| failed(refused("The API key is not known.")))?;
    if let Err(problem) = check_alive(&key, shared.clock.now()) {
        shared.keys.familiar.invalidate(&hash);
        return Err(failed(problem));
    }
    if !shared.keys.familiar.contains_key(&hash) {
        shared.keys.familiar.insert(hash, ());
    }
    Ok((key, hash))
}

fn check_alive(key: &ApiKey, now: DateTime<Utc>) -> Result<(), Problem> {
    if key.revoked_at.is_some() {
        return Err(refused("The API key was revoked."));
    }
    if key.expires_at.is_some_and(|end| end <= now) {
        return Err(refused("The API key has expired."));
    }
    Ok(())
}

/// What the caller presents as its secret; None where there is nothing of the form.
fn presented(headers: &HeaderMap) -> Option<&str> {
    match headers.get(AUTHORIZATION) {
        Some(value) => {
            let (scheme, secret) = value.to_str().ok()?.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| secret.trim())
        }
        None => headers.get("x-api-key")?.to_str().ok(),
    }
}

fn missing() -> Problem {
    Problem::new(
        Code::Unauthenticated,
        "Send an API key as `Authorization: Bearer sg_…` or `x-api-key: sg_…`; `stagegate keys create` makes one.",
    )
    .header(WWW_AUTHENTICATE, "Bearer realm=\"stagegate\"")
}

fn refused(detail: &str) -> Problem {
    Problem::new(Code::Unauthenticated, detail)
        .header(WWW_AUTHENTICATE, "Bearer realm=\"stagegate\", error=\"invalid_token\"")
}

/// The guard of an open daemon: a web page that somebody on this machine visits must not reach it, neither under a
/// name that was rebound to loopback (`Host`) nor by a form or a fetch from elsewhere (`Origin`).
pub(crate) async fn guard_open(
    State(shared): State<Shared>,
    request: Request,
    next: Next,
) -> Result<Response, Problem> {
    if shared.open {
        let host = request.headers().get(HOST).map(|value| value.to_str().unwrap_or_default());
        let host = request.uri().authority().map(http::uri::Authority::as_str).or(host).unwrap_or_default();
        if !is_local(host) {
            return Err(Problem::new(
                Code::Forbidden,
                "This daemon is open to this machine alone: call it as `localhost` or `127.0.0.1`.",
            ));
        }
        let reads = matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
        let foreign = |value: &http::HeaderValue| !value.to_str().is_ok_and(is_local_origin);
        if !reads && request.headers().get(ORIGIN).is_some_and(foreign) {
            return Err(Problem::new(Code::Forbidden, "Pages of other origins may not change anything here."));
        }
    }
    Ok(next.run(request).await)
}

fn is_local_origin(origin: &str) -> bool {
    origin.parse::<Uri>().ok().and_then(|uri| uri.authority().map(|a| is_local(a.as_str()))).unwrap_or(false)
}

fn is_local(authority: &str) -> bool {
    let Ok(authority) = authority.parse::<http::uri::Authority>() else { return false };
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;

    #[test]
    fn a_secret_is_long_prefixed_and_kept_as_its_hash() {
        let mut rng = StdRng::seed_from_u64(1);
        let (secret, hash) = generate_key(&mut rng);
        assert!(secret.starts_with(KEY_PREFIX) && secret.len() == 67);
        assert_eq!(hash, hash_secret(&secret));
        assert_ne!(secret, generate_key(&mut rng).0);
    }

    #[test]
    fn only_this_machine_is_local() {
        for local in ["localhost", "LOCALHOST:8080", "127.0.0.1:80", "[::1]:8080", "127.1.2.3"] {
            assert!(is_local(local), "{local}");
        }
        for foreign in ["", "evil.example", "localhost.evil.example", "10.0.0.1:8080", "127.0.0.1.nip.io", "[::2]"] {
            assert!(!is_local(foreign), "{foreign}");
        }
        assert!(is_local_origin("http://localhost:3000"));
        assert!(!is_local_origin("null") && !is_local_origin("https://evil.example"));
    }

    #[test]
    fn a_credential_is_read_from_either_header() {
        let read = |name: &'static str, value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(name, http::HeaderValue::from_static(value));
            presented(&headers).map(str::to_owned)
        };
        assert_eq!(read("authorization", "Bearer sg_a").as_deref(), Some("sg_a"));
        assert_eq!(read("authorization", "bearer sg_a").as_deref(), Some("sg_a"));
        assert_eq!(read("x-api-key", "sg_a").as_deref(), Some("sg_a"));
        assert_eq!(read("authorization", "Basic sg_a"), None);
    }
}
