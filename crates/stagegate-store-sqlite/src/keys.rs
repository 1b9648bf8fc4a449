//! API keys, without their secrets: what is kept is the SHA-256.

use chrono::{DateTime, Utc};
use sqlx::sqlite::SqliteRow;
use stagegate_core::{
    KeyId, StoreResult, TenantId,
    store::{ApiKey, NewApiKey},
};
use uuid::Uuid;

use crate::{
    db::{Db, Lane},
    error::Sql,
    rows::{Cells, ms},
};

// insert-key: repeated, it changes nothing.
const INSERT: &str = "INSERT INTO api_keys (id, tenant, role, name, hash, created_at, expires_at, revoked_at) \
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) ON CONFLICT (id) DO NOTHING";

// key-by-hash
pub(crate) const BY_HASH: &str =
    "SELECT id, tenant, role, name, created_at, expires_at, revoked_at FROM api_keys WHERE hash = ?1";

// keys-of
pub(crate) const OF_TENANT: &str = "SELECT id, tenant, role, name, created_at, expires_at, revoked_at FROM api_keys \
    WHERE tenant = ?1 ORDER BY created_at, id";

// keys-of-all
const OF_ALL: &str = "SELECT id, tenant, role, name, created_at, expires_at, revoked_at FROM api_keys \
    ORDER BY tenant, created_at, id";

// revoke-key: the first revocation stands.
const REVOKE: &str = "UPDATE api_keys SET revoked_at = coalesce(revoked_at, ?2) WHERE id = ?1";

pub(crate) async fn create(db: &Db, new: &NewApiKey) -> StoreResult<()> {
    let key = &new.key;
    let mut tx = db.write(Lane::Runs).await?;
    sqlx::query(INSERT)
        .bind(key.id.0)
        .bind(key.tenant.as_str())
        .bind(key.role.as_str())
        .bind(key.name.as_str())
        .bind(new.hash.as_slice())
        .bind(ms(key.created_at))
        .bind(key.expires_at.map(ms))
        .bind(key.revoked_at.map(ms))
        .execute(tx.conn())
        .await
        .sql()?;
    tx.commit().await
}

pub(crate) async fn by_hash(db: &Db, hash: &[u8; 32]) -> StoreResult<Option<ApiKey>> {
    let row = sqlx::query(BY_HASH).bind(hash.as_slice()).fetch_optional(db.read().await?.conn()).await.sql()?;
    row.map(|row| key(&row)).transpose()
}

pub(crate) async fn list(db: &Db, tenant: Option<&TenantId>) -> StoreResult<Vec<ApiKey>> {
    let query = match tenant {
        Some(tenant) => sqlx::query(OF_TENANT).bind(tenant.as_str()),
        None => sqlx::query(OF_ALL),
    };
    let rows = query.fetch_all(db.read().await?.conn()).await.sql()?;
    let readable = |row| {
        let id = KeyId(Cells::new(row, "api_keys", || "unknown".to_owned()).get("id")?);
        Ok(key(row).unwrap_or_else(|error| {
            db.metrics.unreadable(&error);
            ApiKey::unreadable(id, Cells::new(row, "api_keys", String::new).parsed("tenant").ok(), &error)
        }))
    };
    rows.iter().map(readable).collect()
}

pub(crate) async fn revoke(db: &Db, id: KeyId, now: DateTime<Utc>) -> StoreResult<bool> {
    let mut tx = db.write(Lane::Runs).await?;
    let done = sqlx::query(REVOKE).bind(id.0).bind(ms(now)).execute(tx.conn()).await.sql()?;
    tx.commit().await?;
    Ok(done.rows_affected() > 0)
}

fn key(row: &SqliteRow) -> StoreResult<ApiKey> {
    let id: Uuid = Cells::new(row, "api_keys", || "unknown".to_owned()).get("id")?;
    let cells = Cells::new(row, "api_keys", || id.to_string());
    Ok(ApiKey {
        id: KeyId(id),
        tenant: cells.parsed("tenant")?,
        role: cells.word("role")?,
        name: cells.get("name")?,
        created_at: cells.time("created_at")?,
        expires_at: cells.opt_time("expires_at")?,
        revoked_at: cells.opt_time("revoked_at")?,
        failure: None,
    })
}
