//! From what sqlx reports to what the store's callers can act on. A message names the statement and Postgres's code,
//! never a value.

use sqlx::error::DatabaseError;
use stagegate_core::StoreError;

/// What a failed statement means to the caller.
pub(crate) fn statement(name: &'static str, error: &sqlx::Error) -> StoreError {
    match error {
        sqlx::Error::Database(database) => refused(name, database.as_ref()),
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::WorkerCrashed => {
            StoreError::Unavailable(format!("{name}: {error}"))
        }
        sqlx::Error::PoolTimedOut => {
            StoreError::Unavailable(format!("{name}: no connection was free within the pool's acquire timeout"))
        }
        sqlx::Error::PoolClosed => StoreError::Unavailable(format!("{name}: the store is closed")),
        // The rest is between us and sqlx; these messages can carry values.
        sqlx::Error::Encode(_) => StoreError::Defect(format!("{name}: a parameter could not be encoded")),
        sqlx::Error::ColumnDecode { index, .. } => {
            StoreError::Defect(format!("{name}: column {index} is of no known type"))
        }
        _ => StoreError::Defect(format!("{name}: unexpected answer from the driver")),
    }
}

/// What it means that a statement got no connection. The driver calls it a mistake in the protocol when the server, or a
/// proxy before one that restarts, accepts a connection and closes it without a word; nothing was asked yet, so that the
/// next connection may do.
pub(crate) fn connecting(name: &'static str, error: &sqlx::Error) -> StoreError {
    match error {
        sqlx::Error::Protocol(_) => {
            StoreError::Unavailable(format!("{name}: the server broke off while a connection was made"))
        }
        other => statement(name, other),
    }
}

fn refused(name: &'static str, error: &dyn DatabaseError) -> StoreError {
    let code = error.code().unwrap_or_default();
    match code.as_ref() {
        // refused by the trigger of migration 0003: newer replicas write what this one cannot read
        "SG503" => StoreError::SchemaAhead(error.message().to_owned()),
        // disk_full
        "53100" => StoreError::Full(format!("{name}: {}", error.message())),
        // We slept inside a transaction for so long that the server ended it, and the session with it.
        "25P03" => StoreError::Unavailable(format!("{name}: the transaction was idle for too long")),
        // statement timeout
        "57014" => StoreError::Unavailable(format!("{name}: the statement timed out")),
        // serialization_failure, deadlock_detected, lock_not_available, read-only (a standby, during a fail-over)
        "40001" | "40P01" | "55P03" | "25006" => StoreError::Unavailable(format!("{name}: {code}")),
        // connection exceptions, too few resources, an administrator's intervention, the server's own I/O
        other if ["08", "53", "57", "58"].iter().any(|class| other.starts_with(class)) => {
            StoreError::Unavailable(format!("{name}: {} ({code})", error.message()))
        }
        // A password that was rotated, or a role that may not log in just now: the same as a database that is away. It
        // needs somebody's hand, and no run may fail meanwhile.
        other if other.starts_with("28") => StoreError::Unavailable(format!(
            "{name}: the database refuses the login: {} ({code}); is the password in the database's URL still right?",
            error.message()
        )),
        // no such database, role or right: these messages name objects, no values
        other if ["3D", "42", "3F"].iter().any(|class| other.starts_with(class)) => {
            StoreError::Defect(format!("{name}: {} ({code})", error.message()))
        }
        _ => {
            let constraint = error.constraint().map(|constraint| format!(" on {constraint}")).unwrap_or_default();
            StoreError::Defect(format!("{name}: SQLSTATE {code}{constraint}"))
        }
    }
}

/// A parameter of ours that is no JSON, which cannot happen with string keys.
pub(crate) fn unencodable(what: &'static str) -> StoreError {
    StoreError::Defect(format!("{what} could not be written as JSON"))
}
