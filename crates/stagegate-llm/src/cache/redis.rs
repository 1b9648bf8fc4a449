//! Redis as the shared cache tier: owns its keys, its scripts and its connections. It may be flushed at any time; a
//! Redis that is away, hangs or lies is an error or a miss, never a panic and never a wrong answer.
//!
//! Keys, all under a hash tag of the tenant, so that they share a cluster's slot:
//!
//! | key | value |
//! | --- | --- |
//! | `{prefix}:{{tenant}}:g` | the tenant's generation, decimal |
//! | `{prefix}:{{tenant}}:f:{scope}` | the floor of a scope, decimal |
//! | `{prefix}:{{tenant}}:e:{key}` | an entry: its generation (8 bytes, big endian), then what was stored; expires |
//!
//! It needs `MGET`, `SET`, `GET`, `INCR`, `TIME`, `UNLINK`, `PING` and scripts (`EVALSHA`, `SCRIPT LOAD`).
//!
//! Generations and floors do not expire. Use a `volatile-*` eviction policy (or `noeviction`), so that memory pressure
//! takes entries only. A generation or a tenant's floor that is lost starts anew at the server's clock, above
//! everything before it; a lost floor of a narrower scope would forget that invalidation.

mod lines;

use std::{
    fmt::{self, Write as _},
    time::Duration,
};

use async_trait::async_trait;
use deadpool_redis::{
    PoolError,
    redis::{self, Cmd, RedisError, Script, Value},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use stagegate_core::{
    Code, Error, Secret, TenantId,
    cache::{CacheError, CacheKey, CacheLookup, CacheScope, CacheTier},
    pipeline::Span,
};
use stagegate_net::install_tls;

use self::lines::{Lines, Question};

/// Bytes of an entry's generation before the entry.
const GENERATION_BYTES: usize = 8;

/// Makes sure that the tenant has a generation and a floor, and returns the generation.
/// KEYS: generation, tenant's floor.
const INIT: &str = r"
local function number(key)
  local value = redis.pcall('GET', key)
  if type(value) == 'string' and #value <= 18 and string.match(value, '^%d+$') then return value end
  return nil
end
local generation = number(KEYS[1])
if not generation or not number(KEYS[2]) then
  local time = redis.call('TIME')
  generation = time[1] .. string.format('%06d', tonumber(time[2]))
  redis.call('SET', KEYS[1], generation)
  redis.call('SET', KEYS[2], generation)
end
";

const RETURN_GENERATION: &str = "return generation";

/// Moves the generation on and notes it as the scope's floor. KEYS: generation, tenant's floor, scope's floor.
const INVALIDATE: &str = r"
redis.call('INCR', KEYS[1])
generation = redis.call('GET', KEYS[1])
redis.call('SET', KEYS[3], generation)
return generation
";

/// How Redis is used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RedisConfig {
    /// Connections, at most. Each is shared by everybody who asks, so that few serve many.
    pub max_connections: usize,
    /// How long a connection may take to be made.
    pub connect_timeout: Span,
    /// How long one answer may take. Keep it below `llm.shared_cache_timeout`.
    pub response_timeout: Span,
    /// What every key begins with.
    pub key_prefix: String,
}

impl Default for RedisConfig {
    fn default() -> Self {
        Self {
            max_connections: 2,
            connect_timeout: Span(Duration::from_secs(1)),
            response_timeout: Span(Duration::from_millis(200)),
            key_prefix: "sg".to_owned(),
        }
    }
}

/// Redis as a shared cache tier. Connections are made when they are needed, and anew when they break.
pub struct RedisTier {
    lines: Lines,
    prefix: String,
    init: Script,
    invalidate: Script,
}

impl fmt::Debug for RedisTier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The client knows the password.
        f.debug_struct("RedisTier")
            .field("prefix", &self.prefix)
            .field("connections", &self.lines.open())
            .finish_non_exhaustive()
    }
}

impl RedisTier {
    /// For the server at `url` (`redis://`, `rediss://`). Connects to nothing yet: a Redis that is away at the start
    /// is no reason not to start. Fails on a URL that is none, and on a prefix that would break the hash tag.
    pub fn connect(url: &Secret, config: &RedisConfig) -> Result<Self, Error> {
        let invalid = |detail: String| Error::new(Code::InvalidConfig, detail);
        install_tls();
        let prefix = &config.key_prefix;
        if prefix.is_empty()
            || prefix.len() > 64
            || !prefix.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-:".contains(&b))
        {
            return Err(invalid(format!("`{prefix}` is no key prefix: use 1 to 64 letters, digits, `_`, `-` and `:`")));
        }
        let lines = Lines::new(url, config)?;
        Ok(Self {
            lines,
            prefix: prefix.clone(),
            init: Script::new(&[INIT, RETURN_GENERATION].concat()),
            invalidate: Script::new(&[INIT, INVALIDATE].concat()),
        })
    }

    /// Makes the keys of a tenant, one after the other, in one buffer.
    fn keys(&self, tenant: &TenantId) -> Keys {
        let mut text = String::with_capacity(KEY_TYPICAL_BYTES);
        // Writing to a string cannot fail.
        let _ = write!(text, "{}:{{{}}}:", self.prefix, tenant.as_str());
        Keys { stem: text.len(), text }
    }

    async fn ask(&self, command: &Cmd) -> Result<Value, CacheError> {
        self.lines.ask(Question::Command(command)).await
    }

    async fn script(&self, script: &Script, keys: &[String]) -> Result<u64, CacheError> {
        let mut call = script.prepare_invoke();
        for key in keys {
            call.key(key);
        }
        let answer = self.lines.ask(Question::Script(&call)).await?;
        number(&answer).ok_or_else(|| CacheError("Redis answered a script with something that is no number".to_owned()))
    }
}

/// What a key takes, as a rule.
const KEY_TYPICAL_BYTES: usize = 128;

/// The keys of one tenant.
struct Keys {
    text: String,
    /// How long the part is that they have in common.
    stem: usize,
}

impl Keys {
    fn generation(&mut self) -> &str {
        self.text.truncate(self.stem);
        self.text.push('g');
        &self.text
    }

    fn floor(&mut self, scope: &CacheScope) -> &str {
        self.text.truncate(self.stem);
        let _ = write!(self.text, "f:{scope}");
        &self.text
    }

    fn entry(&mut self, key: CacheKey) -> &str {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        self.text.truncate(self.stem);
        self.text.push_str("e:");
        for byte in key.0 {
            self.text.push(char::from(DIGITS[usize::from(byte >> 4)]));
            self.text.push(char::from(DIGITS[usize::from(byte & 15)]));
        }
        &self.text
    }
}

#[async_trait]
impl CacheTier for RedisTier {
    async fn get(&self, tenant: &TenantId, key: CacheKey, scopes: &[CacheScope]) -> Result<CacheLookup, CacheError> {
        let mut keys = self.keys(tenant);
        let mut command = Cmd::with_capacity(4 + scopes.len(), KEY_TYPICAL_BYTES * (4 + scopes.len()));
        command.arg("MGET").arg(keys.entry(key)).arg(keys.generation()).arg(keys.floor(&CacheScope::Tenant));
        let mut asks_tenant = false;
        for scope in scopes {
            if *scope == CacheScope::Tenant {
                asks_tenant = true;
            } else {
                command.arg(keys.floor(scope));
            }
        }
        let Value::Array(mut values) = self.ask(&command).await? else {
            return Err(CacheError("Redis answered MGET with something that is no list".to_owned()));
        };
        let [entry, generation, tenant_floor, floors @ ..] = values.as_mut_slice() else {
            return Err(CacheError("Redis answered MGET with too few values".to_owned()));
        };
        // A floor that is there but unreadable hides an invalidation: nothing counts until it is replaced.
        let narrower = floors.iter().try_fold(0, |highest: u64, floor| match floor {
            Value::Nil => Some(highest),
            there => number(there).map(|floor| highest.max(floor)),
        });
        let (Some(generation), Some(tenant_floor)) = (number(generation), number(tenant_floor)) else {
            let both = [keys.generation().to_owned(), keys.floor(&CacheScope::Tenant).to_owned()];
            let generation = self.script(&self.init, &both).await?;
            return Ok(CacheLookup { generation, floor: generation, entry: None });
        };
        let floor = match narrower {
            Some(narrower) => narrower.max(if asks_tenant { tenant_floor } else { 0 }),
            None => generation,
        };
        // No floor is ever above the generation that it was made from.
        let floor = floor.min(generation);
        let entry = stored(std::mem::replace(entry, Value::Nil)).filter(|(_, under)| *under >= floor);
        Ok(CacheLookup { generation, floor, entry })
    }

    async fn put(
        &self,
        tenant: &TenantId,
        key: CacheKey,
        entry: &[u8],
        generation: u64,
        ttl: Duration,
    ) -> Result<(), CacheError> {
        let value = [&generation.to_be_bytes(), entry].concat();
        let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).max(1);
        let mut command = Cmd::with_capacity(5, value.len() + 2 * KEY_TYPICAL_BYTES);
        command.arg("SET").arg(self.keys(tenant).entry(key)).arg(value).arg("PX").arg(ttl_ms);
        self.ask(&command).await.map(drop)
    }

    async fn evict(&self, tenant: &TenantId, key: CacheKey) -> Result<(), CacheError> {
        let mut command = redis::cmd("UNLINK");
        command.arg(self.keys(tenant).entry(key));
        self.ask(&command).await.map(drop)
    }

    async fn invalidate(&self, tenant: &TenantId, scope: &CacheScope) -> Result<u64, CacheError> {
        let mut keys = self.keys(tenant);
        let keys =
            [keys.generation().to_owned(), keys.floor(&CacheScope::Tenant).to_owned(), keys.floor(scope).to_owned()];
        self.script(&self.invalidate, &keys).await
    }

    async fn ping(&self) -> Result<(), CacheError> {
        self.lines.ask_for_a_probe(Question::Command(&redis::cmd("PING"))).await.map(drop)
    }

    fn kind(&self) -> &'static str {
        "redis"
    }
}

/// A decimal number, as Redis keeps it.
fn number(value: &Value) -> Option<u64> {
    match value {
        Value::BulkString(bytes) => std::str::from_utf8(bytes).ok()?.parse().ok(),
        Value::SimpleString(text) => text.parse().ok(),
        Value::Int(number) => u64::try_from(*number).ok(),
        _ => None,
    }
}

/// An entry and the generation before it.
fn stored(value: Value) -> Option<(Vec<u8>, u64)> {
    let Value::BulkString(mut bytes) = value else { return None };
    let generation = u64::from_be_bytes(*bytes.first_chunk::<GENERATION_BYTES>()?);
    bytes.drain(..GENERATION_BYTES);
    Some((bytes, generation))
}

/// Why there is no connection, without the URL.
fn unconnected(error: &PoolError) -> CacheError {
    match error {
        PoolError::Backend(error) => describe(error),
        PoolError::Timeout(_) => CacheError("Redis: no connection in time".to_owned()),
        _ => CacheError("Redis: no connection".to_owned()),
    }
}

/// What went wrong, without keys and values: what Redis said in its own words could repeat them.
fn describe(error: &RedisError) -> CacheError {
    let code = error.code().map(|code| format!(" ({code})")).unwrap_or_default();
    CacheError(format!("Redis: {}{code}", error.category()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn garbage_is_no_number_and_no_entry() {
        for garbage in [
            Value::Nil,
            Value::Okay,
            Value::Int(-1),
            Value::BulkString(b"".to_vec()),
            Value::BulkString(b"12x".to_vec()),
            Value::BulkString(vec![0xFF; 4]),
            Value::Array(vec![]),
        ] {
            assert_eq!(number(&garbage), None, "{garbage:?}");
            assert_eq!(stored(garbage.clone()), None, "{garbage:?}");
        }
        assert_eq!(number(&Value::BulkString(b"1700000000000001".to_vec())), Some(1_700_000_000_000_001));
        assert_eq!(stored(Value::BulkString(b"\0\0\0\0\0\0\0\x05abc".to_vec())), Some((b"abc".to_vec(), 5)));
    }

    #[test]
    fn a_wrong_url_is_refused_without_showing_the_password() {
        let url = Secret::from("http://:hunter2@host".to_owned());
        let error = RedisTier::connect(&url, &RedisConfig::default()).expect_err("no Redis URL");
        assert_eq!(error.code, Code::InvalidConfig);
        assert!(!error.to_string().contains("hunter2"), "{error}");
        let prefixed = RedisConfig { key_prefix: "a{b".to_owned(), ..RedisConfig::default() };
        assert!(RedisTier::connect(&Secret::from("redis://host".to_owned()), &prefixed).is_err());
    }
}
