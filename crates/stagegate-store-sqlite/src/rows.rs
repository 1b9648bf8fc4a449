//! Values to and from columns: owns how each kind of value is stored, and the error that names a row which cannot be
//! read. Knows no table.

use std::{fmt::Display, str::FromStr, time::Duration};

use chrono::{DateTime, Utc};
use serde::{
    Deserialize, Serialize,
    de::{DeserializeOwned, IntoDeserializer, value::StrDeserializer},
};
use sqlx::{Decode, Row, Sqlite, Type, sqlite::SqliteRow};
use stagegate_core::{Json, StoreError, StoreResult, Totals, Usage, Usd, store::Lease};
use uuid::Uuid;

/// The database's clock, in milliseconds.
macro_rules! now_ms {
    () => {
        "CAST(round(unixepoch('subsec') * 1000) AS INTEGER)"
    };
}
pub(crate) use now_ms;

/// The columns of [`Totals`], in the order of [`add_totals`].
macro_rules! totals_columns {
    () => {
        "input_tokens, cache_read_tokens, cache_write_tokens, output_tokens, reasoning_tokens, usage_estimated, \
         cost_nanos, saved_nanos, calls, hits, unpriced_calls, unknown_calls, unknown_nanos"
    };
}
pub(crate) use totals_columns;

/// Milliseconds since 1970.
pub(crate) fn ms(at: DateTime<Utc>) -> i64 {
    at.timestamp_millis()
}

/// A length of time in milliseconds, rounded up, so that nothing ends before its time; cut so that it can be added to
/// any time.
pub(crate) fn span_ms(span: Duration) -> i64 {
    i64::try_from(span.as_nanos().div_ceil(1_000_000)).unwrap_or(i64::MAX).min(i64::MAX / 4)
}

/// A count as SQLite's integer. What does not fit is cut: no count of ours comes near.
pub(crate) fn int(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// JSON as stored.
pub(crate) fn json<T: Serialize + ?Sized>(value: &T) -> StoreResult<String> {
    serde_json::to_string(value).map_err(|error| unencodable(&error))
}

/// A value of ours that cannot be written as JSON, which cannot happen with string keys.
pub(crate) fn unencodable(error: &serde_json::Error) -> StoreError {
    StoreError::Defect(format!("a value cannot be written as JSON: {error}"))
}

/// JSON as stored, of what may be missing.
pub(crate) fn opt_json<T: Serialize>(value: Option<&T>) -> StoreResult<Option<String>> {
    value.map(json).transpose()
}

/// Binary ids as a JSON list, for `IN (SELECT unhex(value) FROM json_each(?))`.
pub(crate) fn id_list(ids: impl IntoIterator<Item = Uuid>) -> String {
    let mut list = String::from("[");
    for id in ids {
        if list.len() > 1 {
            list.push(',');
        }
        list.push('"');
        list.push_str(id.simple().encode_lower(&mut Uuid::encode_buffer()));
        list.push('"');
    }
    list.push(']');
    list
}

/// Leases as a JSON list, for `IN (SELECT unhex(value ->> 0), value ->> 1 FROM json_each(?))`.
pub(crate) fn lease_list(leases: &[Lease]) -> StoreResult<String> {
    let pairs: Vec<(String, i64)> =
        leases.iter().map(|lease| (lease.run.0.simple().to_string(), lease.epoch.0)).collect();
    json(&pairs)
}

/// Bytes as lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]).map(|digit| char::from(DIGITS[usize::from(digit)])).collect()
}

/// The parameters of a row's usage.
pub(crate) fn add_usage(row: &mut crate::bulk::Row, usage: &Usage) {
    row.add(int(usage.input_tokens))
        .add(int(usage.cache_read_tokens))
        .add(int(usage.cache_write_tokens))
        .add(int(usage.output_tokens))
        .add(int(usage.reasoning_tokens))
        .add(usage.estimated);
}

/// The parameters of a row's totals.
pub(crate) fn add_totals(row: &mut crate::bulk::Row, totals: &Totals) {
    add_usage(row, &totals.usage);
    row.add(totals.cost_usd.nanos())
        .add(totals.saved_usd.nanos())
        .add(i64::from(totals.calls))
        .add(i64::from(totals.hits))
        .add(i64::from(totals.unpriced_calls))
        .add(i64::from(totals.unknown_calls))
        .add(totals.unknown_usd.nanos());
}

/// A row that is being read. `id` names it where something in it cannot be read.
pub(crate) struct Cells<'r, K> {
    row: &'r SqliteRow,
    table: &'static str,
    id: K,
}

impl<'r, K: Fn() -> String> Cells<'r, K> {
    /// A row of a table.
    pub(crate) fn new(row: &'r SqliteRow, table: &'static str, id: K) -> Self {
        Self { row, table, id }
    }

    fn corrupt(&self, column: &'static str, message: impl Display) -> StoreError {
        StoreError::Corrupt { table: self.table, column, id: (self.id)(), message: message.to_string() }
    }

    /// A column as SQLite has it.
    pub(crate) fn get<T: Decode<'r, Sqlite> + Type<Sqlite>>(&self, column: &'static str) -> StoreResult<T> {
        self.row.try_get(column).map_err(|error| self.corrupt(column, error))
    }

    /// A count or number that fits `T`.
    pub(crate) fn number<T: TryFrom<i64>>(&self, column: &'static str) -> StoreResult<T> {
        let stored: i64 = self.get(column)?;
        T::try_from(stored).map_err(|_| self.corrupt(column, format!("{stored} is out of range")))
    }

    /// A point in time.
    pub(crate) fn time(&self, column: &'static str) -> StoreResult<DateTime<Utc>> {
        self.opt_time(column)?.ok_or_else(|| self.corrupt(column, "there is no time"))
    }

    /// A point in time that may be missing.
    pub(crate) fn opt_time(&self, column: &'static str) -> StoreResult<Option<DateTime<Utc>>> {
        let Some(stored) = self.get::<Option<i64>>(column)? else { return Ok(None) };
        match DateTime::from_timestamp_millis(stored) {
            Some(at) => Ok(Some(at)),
            None => Err(self.corrupt(column, format!("{stored} is no time"))),
        }
    }

    /// A checked text: an id, a name.
    pub(crate) fn parsed<T: FromStr<Err: Display>>(&self, column: &'static str) -> StoreResult<T> {
        self.get::<&str>(column)?.parse().map_err(|error| self.corrupt(column, error))
    }

    /// A checked text that may be missing.
    pub(crate) fn opt_parsed<T: FromStr<Err: Display>>(&self, column: &'static str) -> StoreResult<Option<T>> {
        let stored: Option<&str> = self.get(column)?;
        stored.map(|text| text.parse().map_err(|error| self.corrupt(column, error))).transpose()
    }

    /// One of a closed set of words, spelt as in JSON.
    pub(crate) fn word<T: Deserialize<'r>>(&self, column: &'static str) -> StoreResult<T> {
        self.opt_word(column)?.ok_or_else(|| self.corrupt(column, "there is no word"))
    }

    /// One of a closed set of words, or nothing.
    pub(crate) fn opt_word<T: Deserialize<'r>>(&self, column: &'static str) -> StoreResult<Option<T>> {
        let stored: Option<&'r str> = self.get(column)?;
        let read = |text: &'r str| {
            let text: StrDeserializer<'r, serde::de::value::Error> = text.into_deserializer();
            T::deserialize(text).map_err(|error| self.corrupt(column, error))
        };
        stored.map(read).transpose()
    }

    /// JSON that is read in a way of its own.
    pub(crate) fn read<T>(
        &self,
        column: &'static str,
        read: impl Fn(&str) -> Result<T, serde_json::Error>,
    ) -> StoreResult<T> {
        read(self.get(column)?).map_err(|error| self.corrupt(column, error))
    }

    /// JSON.
    pub(crate) fn json<T: DeserializeOwned>(&self, column: &'static str) -> StoreResult<T> {
        serde_json::from_str(self.get(column)?).map_err(|error| self.corrupt(column, error))
    }

    /// A payload, which stays text.
    pub(crate) fn payload(&self, column: &'static str) -> StoreResult<Json> {
        Json::from_text(self.get(column)?).map_err(|error| self.corrupt(column, error))
    }

    /// A payload that may be missing.
    pub(crate) fn opt_payload(&self, column: &'static str) -> StoreResult<Option<Json>> {
        let stored: Option<&str> = self.get(column)?;
        stored.map(|text| Json::from_text(text).map_err(|error| self.corrupt(column, error))).transpose()
    }

    /// JSON that may be missing.
    pub(crate) fn opt_json<T: DeserializeOwned>(&self, column: &'static str) -> StoreResult<Option<T>> {
        let stored: Option<&str> = self.get(column)?;
        stored.map(|text| serde_json::from_str(text).map_err(|error| self.corrupt(column, error))).transpose()
    }

    /// The columns of a usage.
    pub(crate) fn usage(&self) -> StoreResult<Usage> {
        Ok(Usage {
            input_tokens: self.number("input_tokens")?,
            cache_read_tokens: self.number("cache_read_tokens")?,
            cache_write_tokens: self.number("cache_write_tokens")?,
            output_tokens: self.number("output_tokens")?,
            reasoning_tokens: self.number("reasoning_tokens")?,
            estimated: self.get("usage_estimated")?,
        })
    }

    /// The columns of the totals.
    pub(crate) fn totals(&self) -> StoreResult<Totals> {
        Ok(Totals {
            usage: self.usage()?,
            cost_usd: Usd::from_nanos(self.get("cost_nanos")?),
            saved_usd: Usd::from_nanos(self.get("saved_nanos")?),
            calls: self.number("calls")?,
            hits: self.number("hits")?,
            unpriced_calls: self.number("unpriced_calls")?,
            unknown_calls: self.number("unknown_calls")?,
            unknown_usd: Usd::from_nanos(self.get("unknown_nanos")?),
        })
    }
}
