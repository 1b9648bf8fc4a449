//! What SQLite's errors mean to a caller: owns the mapping to [`StoreError`]. Never logs.

use sqlx::migrate::MigrateError;
use stagegate_core::{StoreError, StoreResult};

// Primary result codes of SQLite, https://www.sqlite.org/rescode.html.
const SQLITE_BUSY: i32 = 5;
const SQLITE_LOCKED: i32 = 6;
const SQLITE_READONLY: i32 = 8;
const SQLITE_INTERRUPT: i32 = 9;
const SQLITE_IOERR: i32 = 10;
const SQLITE_FULL: i32 = 13;
const SQLITE_CANTOPEN: i32 = 14;
const SQLITE_PROTOCOL: i32 = 15;
const SQLITE_NOTADB: i32 = 26;

/// Turns the result of a statement into the store's.
pub(crate) trait Sql<T> {
    /// Maps the error.
    fn sql(self) -> StoreResult<T>;
}

impl<T> Sql<T> for Result<T, sqlx::Error> {
    fn sql(self) -> StoreResult<T> {
        self.map_err(|error| store_error(&error))
    }
}

impl<T> Sql<T> for Result<T, MigrateError> {
    fn sql(self) -> StoreResult<T> {
        self.map_err(|error| match error {
            MigrateError::Execute(inner) | MigrateError::ExecuteMigration(inner, _) => store_error(&inner),
            other => StoreError::SchemaAhead(other.to_string()),
        })
    }
}

/// The primary result code, where the error came from SQLite.
pub(crate) fn primary_code(error: &sqlx::Error) -> Option<i32> {
    let code = error.as_database_error()?.code()?;
    code.parse::<i32>().ok().map(|extended| extended & 0xFF)
}

/// Whether another connection was in the way.
pub(crate) fn is_busy(error: &sqlx::Error) -> bool {
    matches!(primary_code(error), Some(SQLITE_BUSY | SQLITE_LOCKED | SQLITE_PROTOCOL))
}

/// Whether the file is something else.
pub(crate) fn is_not_a_database(error: &sqlx::Error) -> bool {
    primary_code(error) == Some(SQLITE_NOTADB)
}

fn store_error(error: &sqlx::Error) -> StoreError {
    use sqlx::Error::{Io, PoolClosed, PoolTimedOut, WorkerCrashed};
    match (error, primary_code(error)) {
        (PoolTimedOut | PoolClosed | WorkerCrashed | Io(_), _) => StoreError::Unavailable(error.to_string()),
        (_, Some(SQLITE_FULL)) => StoreError::Full(error.to_string()),
        (_, Some(code)) if is_passing(code) => StoreError::Unavailable(error.to_string()),
        _ => StoreError::Defect(error.to_string()),
    }
}

/// Codes that tell of the machine or of other processes, not of our statement.
fn is_passing(code: i32) -> bool {
    [SQLITE_BUSY, SQLITE_LOCKED, SQLITE_READONLY, SQLITE_INTERRUPT, SQLITE_IOERR, SQLITE_CANTOPEN, SQLITE_PROTOCOL]
        .contains(&code)
}
