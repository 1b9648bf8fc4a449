//! Pipelines and their versions: registered once, never changed.

use sqlx::sqlite::SqliteRow;
use stagegate_core::{
    PipelineName, StoreResult, TenantId,
    store::{NewVersion, PipelineVersion, Registered},
};

use crate::{
    db::{Db, Lane},
    error::Sql,
    rows::{Cells, hex, json, ms},
};

// version-by-digest
const BY_DIGEST: &str = "SELECT version, digest, definition, created_at FROM pipeline_versions \
    WHERE tenant = ?1 AND name = ?2 AND digest = ?3";

// count-versions: none is ever removed, so that the newest number of each pipeline is their count.
const COUNT: &str = "SELECT count(*) AS pipelines, coalesce(sum(latest), 0) AS versions, \
    coalesce(max(name = ?2), 0) AS is_known FROM pipelines WHERE tenant = ?1";

// next-version
const NEXT: &str = "INSERT INTO pipelines (tenant, name, latest) VALUES (?1, ?2, 1) \
    ON CONFLICT (tenant, name) DO UPDATE SET latest = latest + 1 RETURNING latest";

// insert-version
const INSERT: &str = "INSERT INTO pipeline_versions (tenant, name, version, digest, definition, created_at) \
    VALUES (?1, ?2, ?3, ?4, ?5, ?6) RETURNING name, version, digest, definition, created_at";

// version-by-number: with no number, the newest.
const BY_NUMBER: &str = "SELECT name, version, digest, definition, created_at FROM pipeline_versions \
    WHERE tenant = ?1 AND name = ?2 AND version = \
    coalesce(?3, (SELECT latest FROM pipelines WHERE tenant = ?1 AND name = ?2))";

// newest-versions
pub(crate) const NEWEST: &str = "SELECT v.name, v.version, v.digest, v.definition, v.created_at FROM pipelines p \
    JOIN pipeline_versions v ON v.tenant = p.tenant AND v.name = p.name AND v.version = p.latest \
    WHERE p.tenant = ?1 AND p.name > ?2 ORDER BY p.name LIMIT ?3";

// versions-of
pub(crate) const VERSIONS: &str = "SELECT name, version, digest, definition, created_at FROM pipeline_versions \
    WHERE tenant = ?1 AND name = ?2 AND version < ?3 ORDER BY version DESC LIMIT ?4";

pub(crate) async fn register(db: &Db, new: &NewVersion) -> StoreResult<Registered> {
    let definition = json(&new.definition)?;
    let mut tx = db.write(Lane::Runs).await?;
    let known = sqlx::query(BY_DIGEST)
        .bind(new.tenant.as_str())
        .bind(new.name.as_str())
        .bind(new.digest.as_slice())
        .fetch_optional(tx.conn())
        .await
        .sql()?;
    if let Some(row) = known {
        tx.commit().await?;
        return version(&row, &new.name).map(Registered::Known);
    }
    let counting = sqlx::query(COUNT).bind(new.tenant.as_str()).bind(new.name.as_str());
    let counted = counting.fetch_one(tx.conn()).await.sql()?;
    let counted = Cells::new(&counted, "pipelines", || new.tenant.to_string());
    let (pipelines, versions) = (counted.number("pipelines")?, counted.number("versions")?);
    if !new.quota.fits(pipelines, versions, counted.get("is_known")?) {
        tx.commit().await?;
        return Ok(Registered::Full { pipelines, versions });
    }
    let next: i64 =
        sqlx::query_scalar(NEXT).bind(new.tenant.as_str()).bind(new.name.as_str()).fetch_one(tx.conn()).await.sql()?;
    let row = sqlx::query(INSERT)
        .bind(new.tenant.as_str())
        .bind(new.name.as_str())
        .bind(next)
        .bind(new.digest.as_slice())
        .bind(definition)
        .bind(ms(new.now))
        .fetch_one(tx.conn())
        .await
        .sql()?;
    tx.commit().await?;
    version(&row, &new.name).map(Registered::New)
}

pub(crate) async fn pipeline(
    db: &Db,
    tenant: &TenantId,
    name: &PipelineName,
    number: Option<u32>,
) -> StoreResult<Option<PipelineVersion>> {
    let row = sqlx::query(BY_NUMBER)
        .bind(tenant.as_str())
        .bind(name.as_str())
        .bind(number)
        .fetch_optional(db.read().await?.conn())
        .await
        .sql()?;
    row.map(|row| version(&row, name)).transpose()
}

pub(crate) async fn pipelines(
    db: &Db,
    tenant: &TenantId,
    after: Option<&PipelineName>,
    limit: u32,
) -> StoreResult<Vec<PipelineVersion>> {
    // No name is empty, so that the empty text comes before all.
    let rows = sqlx::query(NEWEST)
        .bind(tenant.as_str())
        .bind(after.map_or("", PipelineName::as_str))
        .bind(limit)
        .fetch_all(db.read().await?.conn())
        .await
        .sql()?;
    let named = |row| {
        let name = db.readable(Cells::new(row, "pipeline_versions", String::new).parsed("name"))?;
        listed(db, row, &name)
    };
    Ok(rows.iter().filter_map(named).collect())
}

pub(crate) async fn versions(
    db: &Db,
    tenant: &TenantId,
    name: &PipelineName,
    before: Option<u32>,
    limit: u32,
) -> StoreResult<Vec<PipelineVersion>> {
    let rows = sqlx::query(VERSIONS)
        .bind(tenant.as_str())
        .bind(name.as_str())
        .bind(before.map_or(i64::MAX, i64::from))
        .bind(limit)
        .fetch_all(db.read().await?.conn())
        .await
        .sql()?;
    Ok(rows.iter().filter_map(|row| listed(db, row, name)).collect())
}

/// A version, or what stands in its place where its row cannot be read. One whose very name or number cannot be read has
/// no place: the cursor of the next page is made of them.
fn listed(db: &Db, row: &SqliteRow, name: &PipelineName) -> Option<PipelineVersion> {
    let error = match version(row, name) {
        Ok(version) => return Some(version),
        Err(error) => error,
    };
    db.metrics.unreadable(&error);
    let number = Cells::new(row, "pipeline_versions", || name.to_string()).number("version").ok()?;
    Some(PipelineVersion::unreadable(name.clone(), number, &error))
}

fn version(row: &SqliteRow, name: &PipelineName) -> StoreResult<PipelineVersion> {
    let cells = Cells::new(row, "pipeline_versions", || name.to_string());
    let number = cells.number("version")?;
    let cells = Cells::new(row, "pipeline_versions", || format!("{name}@{number}"));
    let digest: &[u8] = cells.get("digest")?;
    Ok(PipelineVersion {
        name: name.clone(),
        version: number,
        digest: hex(digest),
        created_at: cells.time("created_at")?,
        definition: cells.json("definition")?,
        failure: None,
    })
}
