//! The file and its schema: owns how a database is opened, told from others' files, and migrated. Owns no query.

use std::{io, path::Path, time::Duration};

use sqlx::{
    ConnectOptions, Connection, SqliteConnection,
    migrate::Migrator,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};
use stagegate_core::{StoreError, StoreResult};

use crate::error::{Sql, is_busy, is_not_a_database};

static MIGRATIONS: Migrator = sqlx::migrate!("../../migrations/sqlite");

/// Marks a database as ours (the bytes `SgDb`), so that nobody else's is migrated by mistake.
const APPLICATION_ID: i64 = 0x5367_4462;
/// SQLite's default page size, which new files get.
pub(crate) const PAGE_BYTES: u64 = 4096;
/// How long a statement waits for another process to be done writing.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Statements kept prepared per connection; there are fewer.
const STATEMENTS: usize = 512;
/// Rows that a reading connection may be ahead of its reader.
const ROWS_AHEAD: usize = 256;
/// Tries to open a file that other processes are opening too.
const OPEN_TRIES: u32 = 50;

/// How every connection to a file is opened.
pub(crate) fn file_options(path: &Path) -> StoreResult<SqliteConnectOptions> {
    // Absolute, so that SQLite never takes a name for a URI, and a later change of directory does not matter.
    let path = std::path::absolute(path).map_err(|error| cannot_open(path, &error))?;
    Ok(common(SqliteConnectOptions::new().filename(path).journal_mode(SqliteJournalMode::Wal)))
}

/// A database in memory, shared by the connections of this process that know its name.
pub(crate) fn memory_options(name: &str) -> SqliteConnectOptions {
    let options = SqliteConnectOptions::new().filename(format!("/{name}")).vfs("memdb").create_if_missing(true);
    common(options)
}

fn common(options: SqliteConnectOptions) -> SqliteConnectOptions {
    options
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(BUSY_TIMEOUT)
        .statement_cache_capacity(STATEMENTS)
        .row_buffer_size(ROWS_AHEAD)
        // A larger log is folded into the file less often, and is cut back when it was large once.
        .pragma("wal_autocheckpoint", "4000")
        .pragma("journal_size_limit", "67108864")
        .disable_statement_logging()
}

fn cannot_open(path: &Path, why: &dyn std::fmt::Display) -> StoreError {
    StoreError::Unavailable(format!("{}: {why}", path.display()))
}

/// Makes the file and its directory where they are missing, for their owner's eyes alone: runs hold prompts and outputs.
pub(crate) fn create_file(path: &Path) -> StoreResult<()> {
    let create = || -> io::Result<()> {
        if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
            create_directory(directory)?;
        }
        let mut options = std::fs::OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        options.open(path).map(drop)
    };
    create().map_err(|error| {
        let hint = "the database needs a file that it can write, in a directory where it can make others";
        cannot_open(path, &format!("{error} ({hint})"))
    })
}

fn create_directory(directory: &Path) -> io::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(directory)
}

/// Opens the writing connection and migrates; says with which migrations, number and name. Several processes may do so at
/// once.
pub(crate) async fn open(
    options: &SqliteConnectOptions,
    path: &Path,
) -> StoreResult<(SqliteConnection, Vec<(i64, String)>)> {
    let mut conn = connect(options, path).await?;
    check_ours(&mut conn, path).await?;
    let found = match check(&mut conn).await {
        Ok(()) => return Ok((conn, Vec::new())),
        Err(StoreError::SchemaBehind { found, .. }) => found,
        Err(other) => return Err(other),
    };
    migrate(&mut conn, path).await?;
    let missing = MIGRATIONS.iter().filter(|migration| migration.version > found);
    let migrated = missing.map(|migration| (migration.version, migration.description.to_string())).collect();
    Ok((conn, migrated))
}

/// Connects. Turning the write-ahead log on, or recovering one, needs the file alone for a moment, and SQLite does
/// not always wait for it; so this does.
async fn connect(options: &SqliteConnectOptions, path: &Path) -> StoreResult<SqliteConnection> {
    let mut tries = 0;
    loop {
        match options.connect().await {
            Ok(conn) => return Ok(conn),
            Err(error) if is_not_a_database(&error) => {
                return Err(cannot_open(path, &"this is not a SQLite database: name another file, or move it away"));
            }
            Err(error) if is_busy(&error) && tries < OPEN_TRIES => {
                tries += 1;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(error) => return Err(cannot_open(path, &error)),
        }
    }
}

/// Refuses a database that something else made.
async fn check_ours(conn: &mut SqliteConnection, path: &Path) -> StoreResult<()> {
    // application: one statement, so that another process cannot migrate in between.
    const APPLICATION: &str =
        "SELECT application_id, (SELECT count(*) FROM sqlite_schema) FROM pragma_application_id()";
    let (application, objects): (i64, i64) = sqlx::query_as(APPLICATION).fetch_one(conn).await.sql()?;
    if application == APPLICATION_ID || (application == 0 && objects == 0) {
        return Ok(());
    }
    let message = format!("{} is a SQLite database of something else: name another file", path.display());
    Err(StoreError::SchemaAhead(message))
}

/// Applies what is missing, whole or not at all. The write lock keeps a second process out, which then finds it done.
async fn migrate(conn: &mut SqliteConnection, path: &Path) -> StoreResult<()> {
    let mut tx = conn.begin_with("BEGIN IMMEDIATE").await.sql()?;
    check_ours(&mut tx, path).await?;
    MIGRATIONS.run_direct(None, &mut *tx, false).await.sql()?;
    // mark-application
    sqlx::query("PRAGMA application_id = 1399276642").execute(&mut *tx).await.sql()?;
    tx.commit().await.sql()
}

/// Whether the schema is the one that this binary was built with, or one that only added to it.
pub(crate) async fn check(conn: &mut SqliteConnection) -> StoreResult<()> {
    let needed = MIGRATIONS.iter().map(|migration| migration.version).max().unwrap_or(0);
    // has-migrations
    let exists: bool =
        sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE name = '_sqlx_migrations')")
            .fetch_one(&mut *conn)
            .await
            .sql()?;
    if !exists {
        return Err(StoreError::SchemaBehind { found: 0, needed });
    }
    // applied-migrations
    let applied: Vec<(i64, Vec<u8>)> =
        sqlx::query_as("SELECT version, checksum FROM _sqlx_migrations ORDER BY version")
            .fetch_all(&mut *conn)
            .await
            .sql()?;
    let mut ours = 0;
    for (version, checksum) in &applied {
        match MIGRATIONS.iter().find(|known| known.version == *version) {
            None if suits(conn, *version, needed).await? => {}
            None => {
                let message = format!(
                    "migration {version} is not known here (the newest known is {needed}); use a newer stagegate"
                );
                return Err(StoreError::SchemaAhead(message));
            }
            Some(known) if *known.checksum != **checksum => {
                let message = format!(
                    "migration {version} was changed after it had been applied; start the release that applied it"
                );
                return Err(StoreError::SchemaAhead(message));
            }
            Some(_) => ours += 1,
        }
    }
    let found = applied.last().map_or(0, |(version, _)| *version);
    if ours < MIGRATIONS.iter().count() {
        return Err(StoreError::SchemaBehind { found, needed });
    }
    Ok(())
}

/// Whether a later migration says that a binary which knows `newest` may go on: it only added.
async fn suits(conn: &mut SqliteConnection, migration: i64, newest: i64) -> StoreResult<bool> {
    // has-compat: the table came with the second migration, which another binary may not have reached.
    let exists: bool = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE name = 'schema_compat')")
        .fetch_one(&mut *conn)
        .await
        .sql()?;
    if !exists {
        return Ok(false);
    }
    // oldest-binary
    let oldest: Option<i64> = sqlx::query_scalar("SELECT oldest_binary FROM schema_compat WHERE migration = ?1")
        .bind(migration)
        .fetch_optional(conn)
        .await
        .sql()?;
    Ok(oldest.is_some_and(|oldest| oldest <= newest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_application_id_is_the_one_that_is_written() {
        assert_eq!(APPLICATION_ID, 1_399_276_642);
    }
}
