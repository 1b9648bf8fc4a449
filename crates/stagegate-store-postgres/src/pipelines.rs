//! Pipelines and their versions.

use std::fmt::Write as _;

use sqlx::postgres::PgRow;
use stagegate_core::{
    PipelineName, StoreError, StoreResult, TenantId,
    store::{NewVersion, PipelineVersion, Registered},
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

/// Makes the registrations of a tenant wait for each other, so that they do not overstep its quota together.
const LOCK_TENANT: &str = "/* pipelines.lock_tenant */
SELECT pg_advisory_xact_lock(7394117, hashtext($1))";

/// What a tenant has. No version is ever removed, so that the newest number of each pipeline is their count.
const COUNT: &str = "/* pipelines.count */
SELECT count(*) AS pipelines, coalesce(sum(latest), 0)::bigint AS versions, coalesce(bool_or(name = $2), false) AS is_known
FROM pipelines WHERE tenant = $1";

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

pub(crate) async fn register(pool: &Pool, new: &NewVersion) -> StoreResult<Registered> {
    let (tenant, name, digest) = (new.tenant.as_str(), new.name.as_str(), &new.digest[..]);
    let same = || sqlx::query(BY_DIGEST).bind(tenant).bind(name).bind(digest);
    let mut connection = pool.acquire_as_guest("pipelines.register").await?;
    // Most registrations repeat what is there, and take no lock.
    if let Some(row) = connection.row("pipelines.by_digest", same()).await? {
        return version(&row).map(Registered::Known);
    }
    let definition = rows::to_json("a definition", &new.definition)?;
    connection.begin().await?;
    connection.rows("pipelines.lock_tenant", sqlx::query(LOCK_TENANT).bind(tenant)).await?;
    let counted = connection.row("pipelines.count", sqlx::query(COUNT).bind(tenant).bind(name)).await?;
    let counted = counted.ok_or_else(|| StoreError::Defect("pipelines.count: no answer".into()))?;
    let counted = Reader::new(&counted, "pipelines", Uuid::nil());
    let (pipelines, versions) = (counted.seq("pipelines")?, counted.seq("versions")?);
    let fits = new.quota.fits(pipelines, versions, counted.get("is_known")?);
    if fits {
        connection.rows("pipelines.enter", sqlx::query(ENTER).bind(tenant).bind(name)).await?;
        // Replicas of schema 3 do not lock the tenant.
        connection.rows("pipelines.lock", sqlx::query(LOCK).bind(tenant).bind(name)).await?;
    }
    let registered = match connection.row("pipelines.by_digest", same()).await? {
        Some(row) => Registered::Known(version(&row)?),
        None if !fits => Registered::Full { pipelines, versions },
        None => {
            let add = sqlx::query(ADD).bind(tenant).bind(name).bind(digest).bind(new.now).bind(definition);
            let row = connection.row("pipelines.add", add).await?;
            let row = row.ok_or_else(|| StoreError::Defect("pipelines.add: the locked pipeline is gone".into()))?;
            Registered::New(version(&row)?)
        }
    };
    connection.commit().await?;
    Ok(registered)
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
    let found = pool.acquire_as_guest("pipelines.list").await?.rows("pipelines.list", query).await?;
    Ok(found.iter().filter_map(|row| listed(pool, row)).collect())
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
    let found = pool.acquire_as_guest("pipelines.versions").await?.rows("pipelines.versions", query).await?;
    Ok(found.iter().filter_map(|row| listed(pool, row)).collect())
}

/// A version, or what stands in its place where its row cannot be read. One whose very name or number cannot be read has
/// no place: the cursor of the next page is made of them.
fn listed(pool: &Pool, row: &PgRow) -> Option<PipelineVersion> {
    let error = match version(row) {
        Ok(version) => return Some(version),
        Err(error) => error,
    };
    pool.unreadable(&error);
    let read = Reader::new(row, "pipeline_versions", Uuid::nil());
    Some(PipelineVersion::unreadable(read.parse("name").ok()?, read.number("version").ok()?, &error))
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
        failure: None,
    })
}
