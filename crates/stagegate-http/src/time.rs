//! Times in requests: owns how they are read, and in which words they are refused.

use chrono::{DateTime, Utc};
use serde::{Deserialize as _, Deserializer, de::Error as _};

/// RFC 3339.
pub(crate) fn parse(text: &str) -> Result<DateTime<Utc>, String> {
    DateTime::parse_from_rfc3339(text).map(|time| time.to_utc()).map_err(|_| {
        "write a time with its offset, as in `2026-11-05T13:00:00Z` or `2026-11-05T14:00:00+01:00`".to_owned()
    })
}

/// A time in a body, or null. It is cut to milliseconds, which is what every store keeps, so that the answer shows what is
/// stored.
pub(crate) fn optional<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<DateTime<Utc>>, D::Error> {
    let Some(text) = Option::<String>::deserialize(deserializer)? else { return Ok(None) };
    let time = parse(&text).map_err(D::Error::custom)?;
    Ok(Some(DateTime::from_timestamp_millis(time.timestamp_millis()).unwrap_or(time)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_refused_in_words_that_say_what_to_write() {
        for wrong in ["", "now", "2026-11-05", "2026-11-05T13:00:00", "2026-13-05T13:00:00Z", "1762347600", "13:00"] {
            let told = parse(wrong).expect_err(wrong);
            assert!(told.contains("2026-11-05T13:00:00Z"), "{told}");
        }
        assert_eq!(parse("2026-11-05T14:00:00+01:00"), parse("2026-11-05T13:00:00z"));
    }

    #[test]
    fn a_time_in_a_body_is_cut_to_what_is_stored() {
        let read = |text: &str| optional(&mut serde_json::Deserializer::from_str(text)).expect("a time");
        let shown = |text: &str| read(text).map(|time| time.to_rfc3339_opts(chrono::SecondsFormat::AutoSi, true));
        assert_eq!(shown("\"2026-11-05T13:00:00.123456789Z\"").as_deref(), Some("2026-11-05T13:00:00.123Z"));
        assert_eq!(shown("\"2026-12-31T23:59:60Z\"").as_deref(), Some("2027-01-01T00:00:00Z"));
        assert_eq!(shown("null"), None);
    }
}
