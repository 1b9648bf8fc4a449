//! Statements of many rows: owns how rows become parameters. One statement writes up to 64 rows; the texts are made
//! once and stay prepared, so that a batch costs a handful of executions instead of one a row.

use std::sync::OnceLock;

use sqlx::{Arguments, Encode, Sqlite, SqliteConnection, Type, sqlite::SqliteArguments};
use stagegate_core::{StoreError, StoreResult};

use crate::error::Sql;

/// Rows of one execution. Any number of rows is a sum of these with at most three of each but the largest.
const SIZES: [usize; 4] = [64, 16, 4, 1];

/// A statement around a list of rows of parameters: `head (?,?),(?,?) tail`.
pub(crate) struct Bulk {
    head: &'static str,
    columns: usize,
    tail: &'static str,
    texts: [OnceLock<String>; SIZES.len()],
}

impl Bulk {
    /// A statement whose rows have so many columns.
    pub(crate) const fn new(head: &'static str, columns: usize, tail: &'static str) -> Self {
        Self { head, columns, tail, texts: [const { OnceLock::new() }; SIZES.len()] }
    }

    /// Executes it for all rows. Returns how many rows it changed.
    pub(crate) async fn execute<T>(
        &'static self,
        conn: &mut SqliteConnection,
        rows: &[T],
        bind: impl Fn(&mut Row, &T),
    ) -> StoreResult<u64> {
        let (mut rest, mut changed) = (rows, 0);
        for (n, size) in SIZES.into_iter().enumerate() {
            while rest.len() >= size {
                let (chunk, after) = rest.split_at(size);
                let mut row = Row::default();
                row.arguments.reserve(size * self.columns, 0);
                for each in chunk {
                    bind(&mut row, each);
                }
                if row.bad || row.arguments.len() != size * self.columns {
                    return Err(StoreError::Defect(format!("a row of `{}` does not fit", self.head)));
                }
                changed +=
                    sqlx::query_with(self.text(n), row.arguments).execute(&mut *conn).await.sql()?.rows_affected();
                rest = after;
            }
        }
        Ok(changed)
    }

    /// The statement for one of the sizes.
    pub(crate) fn text(&'static self, size: usize) -> &'static str {
        self.texts[size].get_or_init(|| {
            let row = format!("({})", vec!["?"; self.columns].join(","));
            format!("{} {} {}", self.head, vec![row.as_str(); SIZES[size]].join(","), self.tail)
        })
    }
}

/// The parameters of a row, in the order of its columns.
#[derive(Default)]
pub(crate) struct Row {
    arguments: SqliteArguments,
    bad: bool,
}

impl Row {
    /// The next column.
    pub(crate) fn add<'t, T: Encode<'t, Sqlite> + Type<Sqlite>>(&mut self, value: T) -> &mut Self {
        self.bad |= self.arguments.add(value).is_err();
        self
    }
}
