//! API keys.

use sqlx::postgres::PgRow;
use stagegate_core::{
    KeyId, StoreResult, TenantId,
    store::{ApiKey, NewApiKey, Role},
};

use crate::{
    pool::Pool,
    rows::{self, Reader, Time},
};

/// Stores a key. Repeating it changes nothing.
const CREATE: &str = "/* keys.create */
INSERT INTO api_keys (id, tenant, role, name, hash, created_at, expires_at, revoked_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
ON CONFLICT (id) DO NOTHING";

/// The key with a hash.
const BY_HASH: &str = "/* keys.by_hash */
SELECT id, tenant, role, name, created_at, expires_at, revoked_at FROM api_keys WHERE hash = $1";

/// The keys of a tenant, oldest first. A statement of its own: a plan that serves all tenants too reads all of them.
pub const LIST_OF: &str = "/* keys.list */
SELECT id, tenant, role, name, created_at, expires_at, revoked_at FROM api_keys
WHERE tenant = $1
ORDER BY tenant, created_at, id";

/// The keys of all tenants, each tenant's oldest first.
const LIST: &str = "/* keys.list */
SELECT id, tenant, role, name, created_at, expires_at, revoked_at FROM api_keys
ORDER BY tenant, created_at, id";

/// The first revocation counts.
const REVOKE: &str = "/* keys.revoke */
UPDATE api_keys SET revoked_at = coalesce(revoked_at, $2) WHERE id = $1 RETURNING id";

pub(crate) async fn create(pool: &Pool, new: &NewApiKey) -> StoreResult<()> {
    let key = &new.key;
    let query = sqlx::query(CREATE)
        .bind(key.id.0)
        .bind(key.tenant.as_str())
        .bind(key.role.as_str())
        .bind(rows::printable(&key.name))
        .bind(&new.hash[..])
        .bind(key.created_at)
        .bind(key.expires_at)
        .bind(key.revoked_at);
    pool.acquire_as_guest("keys.create").await?.rows("keys.create", query).await.map(|_| ())
}

pub(crate) async fn by_hash(pool: &Pool, hash: &[u8; 32]) -> StoreResult<Option<ApiKey>> {
    let query = sqlx::query(BY_HASH).bind(&hash[..]);
    let row = pool.acquire_as_guest("keys.by_hash").await?.row("keys.by_hash", query).await?;
    row.as_ref().map(key).transpose()
}

pub(crate) async fn list(pool: &Pool, tenant: Option<&TenantId>) -> StoreResult<Vec<ApiKey>> {
    let query = match tenant {
        Some(tenant) => sqlx::query(LIST_OF).bind(tenant.as_str()),
        None => sqlx::query(LIST),
    };
    let found = pool.acquire_as_guest("keys.list").await?.rows("keys.list", query).await?;
    let readable = |row| {
        let id = rows::id(row, "id", "api_keys")?;
        Ok(key(row).unwrap_or_else(|error| {
            pool.unreadable(&error);
            ApiKey::unreadable(KeyId(id), Reader::new(row, "api_keys", id).parse("tenant").ok(), &error)
        }))
    };
    found.iter().map(readable).collect()
}

pub(crate) async fn revoke(pool: &Pool, id: KeyId, now: Time) -> StoreResult<bool> {
    let query = sqlx::query(REVOKE).bind(id.0).bind(now);
    Ok(pool.acquire_as_guest("keys.revoke").await?.row("keys.revoke", query).await?.is_some())
}

fn key(row: &PgRow) -> StoreResult<ApiKey> {
    let id = rows::id(row, "id", "api_keys")?;
    let read = Reader::new(row, "api_keys", id);
    Ok(ApiKey {
        id: KeyId(id),
        tenant: read.parse("tenant")?,
        role: Role::parse(read.get("role")?).ok_or_else(|| read.corrupt("role", "not a known word"))?,
        name: read.get("name")?,
        created_at: read.get("created_at")?,
        expires_at: read.get("expires_at")?,
        revoked_at: read.get("revoked_at")?,
        failure: None,
    })
}
