//! The schema: owns the embedded migrations, and the answer to whether the database fits this binary.

use sqlx::{
    Row as _,
    migrate::{MigrateError, Migrator},
};
use stagegate_core::{StoreError, StoreResult};

use crate::{error, pool::Pool};

/// Every migration, embedded in the binary.
static MIGRATIONS: Migrator = sqlx::migrate!("../../migrations/postgres");

/// The newest migration of this binary.
pub(crate) fn needed() -> i64 {
    MIGRATIONS.iter().map(|migration| migration.version).max().unwrap_or(0)
}

/// Applies what is missing. An advisory lock makes replicas that start at once wait for each other.
pub(crate) async fn migrate(pool: &Pool) -> StoreResult<()> {
    let patient = pool.patient();
    let result = MIGRATIONS.run(&patient).await;
    patient.close().await;
    result.map_err(|failure| match failure {
        MigrateError::Execute(failure) => error::statement("migrate", &failure),
        MigrateError::ExecuteMigration(failure, version) => match error::statement("migrate", &failure) {
            StoreError::Defect(message) => StoreError::Defect(format!("migration {version}: {message}")),
            other => other,
        },
        MigrateError::VersionMismatch(version) => changed(version),
        MigrateError::VersionMissing(version) => unknown(version),
        MigrateError::Dirty(version) => StoreError::SchemaAhead(format!("migration {version} was only partly applied")),
        other => StoreError::Defect(other.to_string()),
    })
}

fn changed(version: i64) -> StoreError {
    StoreError::SchemaAhead(format!("migration {version} was changed after it had been applied"))
}

fn unknown(version: i64) -> StoreError {
    StoreError::SchemaAhead(format!("migration {version} was applied by a newer version, this binary does not know it"))
}

/// Whether the database has every migration of this binary, unchanged, and no other.
pub(crate) async fn check(pool: &Pool) -> StoreResult<()> {
    let mut connection = pool.acquire("schema.check").await?;
    // schema.check: every applied migration.
    let query = sqlx::query("/* schema.check */ SELECT version, checksum FROM _sqlx_migrations ORDER BY version");
    let applied = match connection.rows("schema.check", query).await {
        Ok(rows) => rows,
        // undefined_table: nobody ever migrated it.
        Err(StoreError::Defect(message)) if message.contains("42P01") => Vec::new(),
        Err(other) => return Err(other),
    };
    let mut found = 0;
    for row in &applied {
        let decoded = (|| Ok((row.try_get::<i64, _>("version")?, row.try_get::<Vec<u8>, _>("checksum")?)))();
        let (version, checksum) = decoded.map_err(|failure: sqlx::Error| error::statement("schema.check", &failure))?;
        match MIGRATIONS.iter().find(|migration| migration.version == version) {
            None => return Err(unknown(version)),
            Some(migration) if *migration.checksum != *checksum => return Err(changed(version)),
            Some(_) => found = version,
        }
    }
    if applied.len() < MIGRATIONS.iter().count() {
        return Err(StoreError::SchemaBehind { found, needed: needed() });
    }
    Ok(())
}
