//! The schema: owns the embedded migrations, and the answer to whether the database fits this binary.

use std::time::Duration;

use sqlx::{
    Row as _,
    error::DatabaseError,
    migrate::{MigrateError, Migrator},
    postgres::PgRow,
};
use stagegate_core::{StoreError, StoreResult};

use crate::{error, pool::Pool};

/// How long a migration waits for a lock. Whoever wants the table next waits behind it, heartbeats too: it must not be
/// long beside a lease.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);
/// How often it is tried: about ten minutes.
const LOCK_TRIES: u32 = 150;

/// Every migration, embedded in the binary.
static MIGRATIONS: Migrator = sqlx::migrate!("../../migrations/postgres");

/// The newest migration of this binary.
pub(crate) fn needed() -> i64 {
    MIGRATIONS.iter().map(|migration| migration.version).max().unwrap_or(0)
}

/// Applies what is missing, and says what that was: number and name. An advisory lock makes replicas that start at once
/// wait for each other; what another one applied meanwhile is told by each.
pub(crate) async fn migrate(pool: &Pool) -> StoreResult<Vec<(i64, String)>> {
    // A newer binary may have migrated beyond us. Where its schema suits us there is nothing to do for us, else we say so
    // before we touch anything.
    let before = foreign(pool).await?;
    let mut migrator = Migrator { migrations: MIGRATIONS.migrations.clone(), ..Migrator::DEFAULT };
    migrator.set_ignore_missing(true);
    let patient = pool.patient(LOCK_TIMEOUT);
    let mut tries = 1;
    let result = loop {
        match migrator.run(&patient).await {
            Err(failure) if is_locked_out(&failure) && tries < LOCK_TRIES => {
                tracing::warn!(tries, "a migration waits for a table that somebody else uses; it is tried again");
                tokio::time::sleep(LOCK_TIMEOUT).await;
                tries += 1;
            }
            result => break result,
        }
    };
    patient.close().await;
    result.map_err(|failure| match failure {
        MigrateError::Execute(failure) => error::statement("migrate", &failure),
        MigrateError::ExecuteMigration(failure, version) => match error::statement("migrate", &failure) {
            StoreError::Defect(message) => StoreError::Defect(format!("migration {version}: {message}")),
            other => other,
        },
        MigrateError::VersionMismatch(version) => changed(version),
        MigrateError::VersionMissing(version) => unknown(version),
        MigrateError::Dirty(version) => StoreError::SchemaAhead(format!(
            "migration {version} was only partly applied; restore the database from before it, then migrate again"
        )),
        other => StoreError::Defect(other.to_string()),
    })?;
    let missing = MIGRATIONS.iter().filter(|ours| before.iter().all(|applied| applied.version != ours.version));
    Ok(missing.map(|migration| (migration.version, migration.description.to_string())).collect())
}

fn changed(version: i64) -> StoreError {
    StoreError::SchemaAhead(format!(
        "migration {version} was changed after it had been applied; start the release that applied it"
    ))
}

fn unknown(version: i64) -> StoreError {
    StoreError::SchemaAhead(format!(
        "migration {version} was applied by a newer version, which does not say that this one can work beside it; start a \
         release that knows migration {version}, or a newer one"
    ))
}

/// A migration that was applied.
struct Applied {
    version: i64,
    checksum: Vec<u8>,
}

/// What was applied.
async fn applied(pool: &Pool) -> StoreResult<Vec<Applied>> {
    // schema.check: every applied migration.
    let query = sqlx::query("/* schema.check */ SELECT version, checksum FROM _sqlx_migrations ORDER BY version");
    let found = unless_missing(pool.acquire("schema.check").await?.rows("schema.check", query).await)?;
    let read = |row: &PgRow| Ok(Applied { version: row.try_get("version")?, checksum: row.try_get("checksum")? });
    let decoded = found.iter().map(read).collect::<Result<_, sqlx::Error>>();
    decoded.map_err(|failure| error::statement("schema.check", &failure))
}

/// Nothing, where the table is not there: nobody ever migrated that far.
fn unless_missing(answer: StoreResult<Vec<PgRow>>) -> StoreResult<Vec<PgRow>> {
    match answer {
        // undefined_table
        Err(StoreError::Defect(message)) if message.contains("42P01") => Ok(Vec::new()),
        other => other,
    }
}

/// Refuses migrations that this binary does not know, unless they say that it can work beside them.
async fn foreign(pool: &Pool) -> StoreResult<Vec<Applied>> {
    let applied = applied(pool).await?;
    let known = |version: i64| MIGRATIONS.iter().any(|migration| migration.version == version);
    let foreign: Vec<i64> = applied.iter().map(|each| each.version).filter(|version| !known(*version)).collect();
    if foreign.is_empty() {
        return Ok(applied);
    }
    // schema.compat: what suits a binary of our age.
    let sql = "/* schema.compat */ SELECT migration FROM schema_compat WHERE oldest_binary <= $1";
    let query = sqlx::query(sql).bind(needed());
    let found = unless_missing(pool.acquire("schema.compat").await?.rows("schema.compat", query).await)?;
    let suits = found.iter().map(|row| row.try_get("migration")).collect::<Result<Vec<i64>, _>>();
    let suits = suits.map_err(|failure| error::statement("schema.compat", &failure))?;
    match foreign.into_iter().find(|version| !suits.contains(version)) {
        Some(version) => Err(unknown(version)),
        None => Ok(applied),
    }
}

/// Whether a lock was not to be had in time, or not at all for somebody who waited for one of ours.
fn is_locked_out(failure: &MigrateError) -> bool {
    let (MigrateError::Execute(failure) | MigrateError::ExecuteMigration(failure, _)) = failure else { return false };
    failure.as_database_error().and_then(DatabaseError::code).is_some_and(|code| code == "55P03" || code == "40P01")
}

/// Whether the database has every migration of this binary, unchanged, and no other that does not suit it.
pub(crate) async fn check(pool: &Pool) -> StoreResult<()> {
    let applied = foreign(pool).await?;
    let mut found = 0;
    for ours in MIGRATIONS.iter() {
        let Some(theirs) = applied.iter().find(|each| each.version == ours.version) else {
            return Err(StoreError::SchemaBehind { found, needed: needed() });
        };
        if *theirs.checksum != *ours.checksum {
            return Err(changed(ours.version));
        }
        found = ours.version;
    }
    Ok(())
}
