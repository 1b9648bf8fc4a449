//! Authentication: owns API keys' form, their look-up and the guard of an open daemon. What is kept of a key is the
//! SHA-256 of its secret: 256 random bits need no slow hash, and an index look-up by hash tells nothing by its timing.
//!
//! A verified key is trusted for [`KEY_CACHE_TTL`] without asking the store, so a revocation is obeyed within that.
//!
//! A flood of wrong keys costs the store little and keeps no right key out, also behind the same address:
//! - A wrong key is remembered as wrong. A peer that failed too often (`failures.rs`) is told to wait, but only where its key
//!   is remembered as wrong, or has not the form of one.
//! - Keys that are not known here are looked up a few at once. Peers take turns at that, so that one does not stand behind
//!   the flood of another.
//! - A key that was right within `FAMILIAR_FOR` does not stand in that line.

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
    Code, Error, TenantId,
    store::{ApiKey, Role},
};
use tokio::time::Instant;

use crate::{context::Identity, fair::Permit, layers::is_probe, problem::Problem, serve::Peer, state::Shared};

/// How long a look-up, found or not, is remembered: the longest time that a revoked key still works.
pub const KEY_CACHE_TTL: Duration = Duration::from_secs(5);
/// Look-ups remembered at once.
const KEY_CACHE_MAX: u64 = 10_000;
/// How long a key counts as familiar after it was last found to be right.
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
    /// When a key was last found to be right.
    familiar: Cache<[u8; 32], Instant>,
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
            familiar: Cache::builder().max_capacity(KEY_CACHE_MAX).build(),
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
    async fn find(&self, shared: &Shared, peer: Option<Peer>, hash: [u8; 32]) -> Result<Option<Arc<ApiKey>>, Error> {
        match self.remembered(&hash) {
            Remembered::Right(key) => return Ok(Some(key)),
            Remembered::Wrong => return Ok(None),
            Remembered::Nothing => {}
        }
        // Those that are familiar do not stand in line with those that may be made up.
        let _turn = if self.is_familiar(&hash, Instant::now()) { None } else { Some(turn(shared, peer).await?) };
        match self.remembered(&hash) {
            Remembered::Right(key) => return Ok(Some(key)),
            Remembered::Wrong => return Ok(None),
            Remembered::Nothing => {}
        }
        let found = shared.engine.store().key_by_hash(&hash).await?.map(Arc::new);
        self.note(hash, found.as_ref(), shared.clock.now(), Instant::now());
        Ok(found)
    }

    fn is_familiar(&self, hash: &[u8; 32], now: Instant) -> bool {
        self.familiar.get(hash).is_some_and(|at| now.saturating_duration_since(at) < FAMILIAR_FOR)
    }

    /// Takes note of what a look-up found.
    fn note(&self, hash: [u8; 32], found: Option<&Arc<ApiKey>>, at: DateTime<Utc>, now: Instant) {
        match found {
            Some(key) => self.right.insert(hash, Arc::clone(key)),
            None => self.wrong.insert(hash, ()),
        }
        if found.is_some_and(|key| check_alive(key, at).is_ok()) {
            self.familiar.insert(hash, now);
        } else {
            self.familiar.invalidate(&hash);
        }
    }
}

/// A turn at looking up a key that is not known here.
async fn turn(shared: &Shared, peer: Option<Peer>) -> Result<Permit<Option<Peer>>, Error> {
    shared.lookups.wait_for(&peer, 1).await.map_err(|_| {
        let detail = "Too many unknown keys wait for their look-up; try again in a second.";
        Error::new(Code::Overloaded, detail).retry_after(Duration::from_secs(1))
    })
}

/// The key that a request came with, for what goes on after its answer has begun: an event stream must not outlive it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Credential {
    hash: [u8; 32],
    peer: Option<Peer>,
}

impl Credential {
    /// Whether the key may still be used. Asks the store at most once every [`KEY_CACHE_TTL`] for all streams of a key;
    /// while the store cannot say, nothing has changed.
    pub(crate) async fn is_alive(self, shared: &Shared) -> bool {
        match shared.keys.find(shared, self.peer, self.hash).await {
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
        request.extensions_mut().insert(Credential { hash, peer });
        Identity { tenant: key.tenant.clone(), role: key.role, key: Some(key.id) }
    };
    tracing::Span::current().record("tenant", identity.tenant.as_str());
    request.extensions_mut().insert(identity);
    Ok(next.run(request).await)
}

/// The key of a secret that a peer presents. One that is refused counts against the peer. A peer that failed too often is
/// told to wait instead of being told that its key is wrong; a key that may be right is looked up all the same.
async fn known_key(shared: &Shared, peer: Option<Peer>, secret: &str) -> Result<(Arc<ApiKey>, [u8; 32]), Problem> {
    let hash = hash_secret(secret);
    let is_key = secret.len() <= CREDENTIAL_MAX_BYTES && secret.starts_with(KEY_PREFIX);
    if let Some(peer) = peer
        && (!is_key || matches!(shared.keys.remembered(&hash), Remembered::Wrong))
        && let Some(wait) = shared.failures.wait_of(peer, Instant::now())
    {
        let detail = "Too many authentications from this address failed; try again after the time in `retry-after`.";
        return Err(Error::new(Code::TooManyFailures, detail).retry_after(wait).into());
    }
    let failed = |problem| {
        if let Some(peer) = peer {
            shared.failures.note(peer, Instant::now());
        }
        problem
    };
    if !is_key {
        return Err(failed(refused("This is not an API key of Stagegate: one begins with `sg_`.")));
    }
    let key = shared.keys.find(shared, peer, hash).await?;
    let key = key.ok_or_else(|| failed(refused("The API key is not known.")))?;
    check_alive(&key, shared.clock.now()).map_err(failed)?;
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

/// The most of a foreign host that is told, in characters.
const HOST_SHOWN_CHARS: usize = 120;

/// The guard of an open daemon: a web page that somebody on this machine visits must not reach it, neither under a
/// name that was rebound to loopback (`Host`) nor by a form or a fetch from elsewhere (`Origin`). Probes answer under every
/// name: load balancers and container platforms call them by an address of their own.
pub(crate) async fn guard_open(
    State(shared): State<Shared>,
    request: Request,
    next: Next,
) -> Result<Response, Problem> {
    if shared.open && !is_probe(request.uri().path()) {
        let allowed = &shared.config.allowed_hosts;
        let host = request.headers().get(HOST).map(|value| value.to_str().unwrap_or_default());
        let host = request.uri().authority().map(http::uri::Authority::as_str).or(host).unwrap_or_default();
        if !is_local(host, allowed) {
            return Err(foreign_host(host));
        }
        let reads = matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
        let foreign = |value: &http::HeaderValue| !value.to_str().is_ok_and(|origin| is_local_origin(origin, allowed));
        if !reads && request.headers().get(ORIGIN).is_some_and(foreign) {
            return Err(Problem::new(
                Code::Forbidden,
                "Pages of other origins may not change anything here. If this page is yours, add its host to \
                 `http.allowed_hosts`.",
            ));
        }
    }
    Ok(next.run(request).await)
}

fn foreign_host(host: &str) -> Problem {
    let name: String = host_of(host).unwrap_or_else(|| host.to_owned()).chars().take(HOST_SHOWN_CHARS).collect();
    let detail = if name.is_empty() {
        "The request names no `Host`. This daemon is open to this machine alone: call it as `localhost` or `127.0.0.1`."
            .to_owned()
    } else {
        format!(
            "The request's `Host` is `{name}`, and this daemon is open to this machine alone: call it as `localhost` or \
             `127.0.0.1`, add \"{name}\" to `http.allowed_hosts`, or have it ask for keys (`http.auth = \"keys\"`)."
        )
    };
    Problem::new(Code::Forbidden, detail)
}

fn is_local_origin(origin: &str, allowed: &[String]) -> bool {
    let uri = origin.parse::<Uri>().ok();
    uri.and_then(|uri| uri.authority().map(|a| is_local(a.as_str(), allowed))).unwrap_or(false)
}

/// The host without port and brackets.
fn host_of(authority: &str) -> Option<String> {
    let authority = authority.parse::<http::uri::Authority>().ok()?;
    Some(authority.host().trim_start_matches('[').trim_end_matches(']').to_owned())
}

fn is_local(authority: &str, allowed: &[String]) -> bool {
    let Some(host) = host_of(authority) else { return false };
    let named = |name: &String| host_of(name).is_some_and(|name| name.eq_ignore_ascii_case(&host));
    host.eq_ignore_ascii_case("localhost")
        || host.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
        || allowed.iter().any(named)
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng as _, rngs::StdRng};
    use stagegate_core::KeyId;

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
    fn a_key_stays_familiar_as_long_as_it_is_in_use_and_right() {
        let (keys, hash, start) = (KeyCache::new(), [1; 32], Instant::now());
        let after = |minutes| start + Duration::from_mins(minutes);
        let alive = ApiKey {
            id: KeyId(uuid::Uuid::from_u128(1)),
            tenant: TenantId::default(),
            role: Role::Viewer,
            name: "k".to_owned(),
            created_at: DateTime::UNIX_EPOCH,
            expires_at: None,
            revoked_at: None,
            failure: None,
        };
        let revoked = Arc::new(ApiKey { revoked_at: Some(DateTime::UNIX_EPOCH), ..alive.clone() });
        let alive = Arc::new(alive);
        assert!(!keys.is_familiar(&hash, start));
        for minutes in [0, 50, 100] {
            keys.note(hash, Some(&alive), DateTime::UNIX_EPOCH, after(minutes));
        }
        assert!(keys.is_familiar(&hash, after(159)), "an hour after its last use");
        assert!(!keys.is_familiar(&hash, after(160)));
        for found in [None, Some(&revoked)] {
            keys.note(hash, Some(&alive), DateTime::UNIX_EPOCH, after(200));
            keys.note(hash, found, DateTime::UNIX_EPOCH, after(201));
            assert!(!keys.is_familiar(&hash, after(202)), "it is wrong now");
        }
    }

    #[test]
    fn only_this_machine_is_local() {
        for local in ["localhost", "LOCALHOST:8080", "127.0.0.1:80", "[::1]:8080", "127.1.2.3"] {
            assert!(is_local(local, &[]), "{local}");
        }
        for foreign in ["", "evil.example", "localhost.evil.example", "10.0.0.1:8080", "127.0.0.1.nip.io", "[::2]"] {
            assert!(!is_local(foreign, &[]), "{foreign}");
        }
        assert!(is_local_origin("http://localhost:3000", &[]));
        assert!(!is_local_origin("null", &[]) && !is_local_origin("https://evil.example", &[]));
    }

    #[test]
    fn an_allowed_host_is_local_whatever_its_port_and_case() {
        let allowed = ["nas.lan".to_owned(), "10.0.0.7".to_owned(), "[fd00::7]".to_owned()];
        for local in ["nas.lan", "NAS.lan:8080", "10.0.0.7:80", "[fd00::7]:8080", "localhost"] {
            assert!(is_local(local, &allowed), "{local}");
        }
        for foreign in ["", "x.nas.lan", "nas.lan.evil.example", "10.0.0.8"] {
            assert!(!is_local(foreign, &allowed), "{foreign}");
        }
        assert!(is_local_origin("https://nas.lan", &allowed) && !is_local_origin("https://nas.lan.evil", &allowed));
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
