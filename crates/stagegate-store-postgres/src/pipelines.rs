//! Pipelines and their versions.

use std::fmt::Write as _;

use sqlx::postgres::PgRow;
use stagegate_core::{
    PipelineName, StoreError, StoreResult, TenantId,
    store::{NewVersion, PipelineVersion},
};
use uuid::Uuid;

use crate::{
    pool::Pool,
    rows::{self, Reader},
};

/// The version with this content.
const BY_DIGEST: &str = "/* pipelines.by_digest */
SELECT name, version, digest, created_at, definition FROM pipeline_versions
WHERE tenant = $1 AND name = $2 AND digest = $3";

/// Enters a pipeline without versions, where it is new.
const ENTER: &str = "/* pipelines.enter */
INSERT INTO pipelines (tenant, name, latest) VALUES ($1, $2, 0) ON CONFLICT (tenant, name) DO NOTHING";

/// Locks a pipeline, so that its numbers have no gap and no double.
const LOCK: &str = "/* pipelines.lock */
SELECT latest FROM pipelines WHERE tenant = $1 AND name = $2 FOR UPDATE";

/// Adds the next version of a locked pipeline.
const ADD: &str = "/* pipelines.add */
WITH pipeline AS (
    UPDATE pipelines SET latest = latest + 1 WHERE tenant = $1 AND name = $2 RETURNING latest
)
INSERT INTO pipeline_versions (tenant, name, version, digest, created_at, definition)
SELECT $1, $2, latest, $3, $4, $5 FROM pipeline
RETURNING name, version, digest, created_at, definition";

/// A version, or with NULL the newest.
const GET: &str = "/* pipelines.get */
SELECT v.name, v.version, v.digest, v.created_at, v.definition
FROM pipelines p JOIN pipeline_versions v USING (tenant, name)
WHERE p.tenant = $1 AND p.name = $2 AND v.version = coalesce($3, p.latest)";

/// The newest version of each pipeline, by name.
pub const LIST: &str = "/* pipelines.list */
SELECT v.name, v.version, v.digest, v.created_at, v.definition
FROM pipelines p JOIN pipeline_versions v ON v.tenant = p.tenant AND v.name = p.name AND v.version = p.latest
WHERE p.tenant = $1 AND p.name > $2
ORDER BY p.name LIMIT $3";

/// The versions of a pipeline, newest first.
pub const VERSIONS: &str = "/* pipelines.versions */
SELECT name, version, digest, created_at, definition FROM pipeline_versions
WHERE tenant = $1 AND name = $2 AND version < $3
ORDER BY version DESC LIMIT $4";

pub(crate) async fn register(pool: &Pool, new: &NewVersion) -> StoreResult<(PipelineVersion, bool)> {
    let (tenant, name, digest) = (new.tenant.as_str(), new.name.as_str(), &new.digest[..]);
    let same = || sqlx::query(BY_DIGEST).bind(tenant).bind(name).bind(digest);
    let mut connection = pool.acquire_as_guest("pipelines.register").await?;
    // Most registrations repeat what is there, and take no lock.
    if let Some(row) = connection.row("pipelines.by_digest", same()).await? {
        return Ok((version(&row)?, false));
    }
    let definition = rows::to_json("a definition", &new.definition)?;
    connection.begin().await?;
    connection.rows("pipelines.enter", sqlx::query(ENTER).bind(tenant).bind(name)).await?;
    connection.rows("pipelines.lock", sqlx::query(LOCK).bind(tenant).bind(name)).await?;
    let there = connection.row("pipelines.by_digest", same()).await?;
    let added = there.is_none();
    let row = if added {
        let add = sqlx::query(ADD).bind(tenant).bind(name).bind(digest).bind(new.now).bind(definition);
        connection.row("pipelines.add", add).await?
    } else {
        there
    };
    let row = row.ok_or_else(|| StoreError::Defect("pipelines.add: the locked pipeline is gone".into()))?;
    connection.commit().await?;
    Ok((version(&row)?, added))
}

pub(crate) async fn get(
    pool: &Pool,
    tenant: &TenantId,
    name: &PipelineName,
    number: Option<u32>,
) -> StoreResult<Option<PipelineVersion>> {
    let query = sqlx::query(GET).bind(tenant.as_str()).bind(name.as_str()).bind(number.map(rows::small));
    let row = pool.acquire("pipelines.get").await?.row("pipelines.get", query).await?;
    row.as_ref().map(version).transpose()
}

pub(crate) async fn list(
    pool: &Pool,
    tenant: &TenantId,
    after: Option<&PipelineName>,
    limit: u32,
) -> StoreResult<Vec<PipelineVersion>> {
    let after = after.map_or("", PipelineName::as_str);
    let query = sqlx::query(LIST).bind(tenant.as_str()).bind(after).bind(i64::from(limit));
    pool.acquire_as_guest("pipelines.list").await?.rows("pipelines.list", query).await?.iter().map(version).collect()
}

pub(crate) async fn versions(
    pool: &Pool,
    tenant: &TenantId,
    name: &PipelineName,
    before: Option<u32>,
    limit: u32,
) -> StoreResult<Vec<PipelineVersion>> {
    let before = before.map_or(i32::MAX, rows::small);
    let query = sqlx::query(VERSIONS).bind(tenant.as_str()).bind(name.as_str()).bind(before).bind(i64::from(limit));
    pool.acquire_as_guest("pipelines.versions")
        .await?
        .rows("pipelines.versions", query)
        .await?
        .iter()
        .map(version)
        .collect()
}

fn version(row: &PgRow) -> StoreResult<PipelineVersion> {
    // These rows are known by name and number, not by a UUID.
    let read = Reader::new(row, "pipeline_versions", Uuid::nil());
    let mut digest = String::with_capacity(64);
    for byte in read.get::<&[u8]>("digest")? {
        // Writing to a string cannot fail.
        let _ = write!(digest, "{byte:02x}");
    }
    Ok(PipelineVersion {
        name: read.parse("name")?,
        version: read.number("version")?,
        digest,
        created_at: read.get("created_at")?,
        definition: read.json("definition")?,
    })
}
