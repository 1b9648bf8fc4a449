//! When to try again: reads what a provider asked for, in every form that is in use. Reads no clock: an HTTP date is
//! measured from the response's own `Date`, or from the time that is handed in.

use std::time::Duration;

use chrono::{DateTime, NaiveDateTime, Utc};
use http::HeaderMap;

/// The longest wait that is believed; whatever asks for more gets this.
pub const RETRY_AFTER_MAX: Duration = Duration::from_hours(24);

/// What the headers ask for: `retry-after-ms`, then `retry-after` as seconds (whole or not) or as an HTTP date.
pub(super) fn from_headers(headers: &HeaderMap, now: DateTime<Utc>) -> Option<Duration> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    let in_ms = text("retry-after-ms").and_then(|ms| ms.parse::<f64>().ok()).and_then(|ms| seconds(ms / 1_000.0));
    in_ms.or_else(|| {
        let value = text("retry-after")?;
        match value.parse::<f64>() {
            Ok(number) => seconds(number),
            Err(_) => http_date(value).map(|at| until(at, answered_at(headers, now))),
        }
    })
}

/// The moment of the answer: its `Date`, else `now`.
pub(super) fn answered_at(headers: &HeaderMap, now: DateTime<Utc>) -> DateTime<Utc> {
    headers.get("date").and_then(|value| value.to_str().ok()).and_then(http_date).unwrap_or(now)
}

/// For a limit that is told as what remains and when it is reset: the latest reset of what is used up; where nothing
/// is, the earliest of all. Each limit is (remaining, time until its reset).
pub(super) fn from_resets(limits: &[(Option<u64>, Option<Duration>)]) -> Option<Duration> {
    let used_up = limits.iter().filter(|(remaining, _)| *remaining == Some(0)).filter_map(|(_, reset)| *reset).max();
    used_up.or_else(|| limits.iter().filter_map(|(_, reset)| *reset).min())
}

/// A number of seconds, bounded; nothing for what is no length of time.
fn seconds(number: f64) -> Option<Duration> {
    if number.is_nan() || number < 0.0 {
        return None;
    }
    Some(Duration::from_secs_f64(number.min(RETRY_AFTER_MAX.as_secs_f64())))
}

/// From `now` until `at`, bounded; nothing left where it has passed.
pub(super) fn until(at: DateTime<Utc>, now: DateTime<Utc>) -> Duration {
    (at - now).to_std().unwrap_or(Duration::ZERO).min(RETRY_AFTER_MAX)
}

/// An HTTP date (RFC 9110, section 5.6.7) in any of its three forms. The day of the week is passed over: it adds
/// nothing, and some servers get it wrong.
fn http_date(text: &str) -> Option<DateTime<Utc>> {
    let (_, rest) = text.split_once(' ')?;
    let naive = |format| NaiveDateTime::parse_from_str(rest, format).ok();
    naive("%d %b %Y %H:%M:%S GMT")
        .or_else(|| naive("%d-%b-%y %H:%M:%S GMT"))
        .or_else(|| naive("%b %e %H:%M:%S %Y"))
        .map(|at| at.and_utc())
}

/// A length of time as Go and Google write it: `6m0s`, `20ms`, `1h2m3.5s`, `34s`, `34.07s`. Bounded.
pub(super) fn span(text: &str) -> Option<Duration> {
    let mut rest = text.trim();
    if rest.is_empty() {
        return None;
    }
    let mut total = 0.0;
    while !rest.is_empty() {
        let number_end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(number_end);
        let unit_end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        let unit_seconds = match unit {
            "d" => 86_400.0,
            "h" => 3_600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        total += number.parse::<f64>().ok()? * unit_seconds;
        rest = tail;
    }
    seconds(total)
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};

    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_str(value).expect("a header")))
            .collect()
    }

    fn now() -> DateTime<Utc> {
        http_date("Sun, 06 Nov 1994 08:49:37 GMT").expect("a date")
    }

    fn asked(pairs: &[(&'static str, &str)]) -> Option<Duration> {
        from_headers(&headers(pairs), now())
    }

    #[expect(clippy::unnecessary_wraps, reason = "it is compared with what may be nothing")]
    const fn ms(ms: u64) -> Option<Duration> {
        Some(Duration::from_millis(ms))
    }

    #[test]
    fn every_form_is_read() {
        assert_eq!(asked(&[("retry-after", "7")]), ms(7_000));
        assert_eq!(asked(&[("retry-after", " 0.25 ")]), ms(250));
        assert_eq!(asked(&[("retry-after-ms", "1500")]), ms(1_500));
        assert_eq!(asked(&[("retry-after-ms", "10.5"), ("retry-after", "7")]), Some(Duration::from_micros(10_500)));
        for date in ["Sun, 06 Nov 1994 08:50:07 GMT", "Sunday, 06-Nov-94 08:50:07 GMT", "Sun Nov  6 08:50:07 1994"] {
            assert_eq!(asked(&[("retry-after", date)]), ms(30_000), "{date}");
        }
        assert_eq!(asked(&[]), None);
    }

    #[test]
    fn a_date_is_measured_from_the_answers_own_date() {
        let pairs = [("retry-after", "Sun, 06 Nov 2044 08:50:07 GMT"), ("date", "Sun, 06 Nov 2044 08:50:00 GMT")];
        assert_eq!(asked(&pairs), ms(7_000));
    }

    #[test]
    fn what_has_passed_is_now_and_what_is_far_is_bounded() {
        assert_eq!(asked(&[("retry-after", "Sun, 06 Nov 1993 08:49:37 GMT")]), ms(0));
        assert_eq!(asked(&[("retry-after", "Sun, 06 Nov 2044 08:49:37 GMT")]), Some(RETRY_AFTER_MAX));
        assert_eq!(asked(&[("retry-after", "99999999999999999999")]), Some(RETRY_AFTER_MAX));
        assert_eq!(asked(&[("retry-after", "inf")]), Some(RETRY_AFTER_MAX));
    }

    #[test]
    fn nonsense_asks_for_nothing() {
        for nonsense in ["soon", "-3", "NaN", "", "1s", "Sun, 99 Nov 1994 08:49:37 GMT"] {
            assert_eq!(asked(&[("retry-after", nonsense)]), None, "{nonsense}");
        }
        // A nonsensical first form does not hide a good second one.
        assert_eq!(asked(&[("retry-after-ms", "x"), ("retry-after", "2")]), ms(2_000));
    }

    #[test]
    fn spans_read_as_go_and_google_write_them() {
        for (text, millis) in
            [("6m0s", 360_000), ("20ms", 20), ("1h2m3.5s", 3_723_500), ("34s", 34_000), ("1.5s", 1_500), ("0s", 0)]
        {
            assert_eq!(span(text), ms(millis), "{text}");
        }
        for nonsense in ["", "6", "m", "6x", "s6", "1..2s", "-1s"] {
            assert_eq!(span(nonsense), None, "{nonsense}");
        }
        assert_eq!(span("9999999h"), Some(RETRY_AFTER_MAX));
    }

    #[test]
    fn the_limit_that_is_used_up_sets_the_wait() {
        let second = Some(Duration::from_secs(1));
        let minute = Some(Duration::from_mins(1));
        assert_eq!(from_resets(&[(Some(0), second), (Some(9), minute)]), second);
        assert_eq!(from_resets(&[(Some(0), second), (Some(0), minute)]), minute);
        assert_eq!(from_resets(&[(Some(5), second), (Some(9), minute)]), second);
        assert_eq!(from_resets(&[(Some(0), None), (None, None)]), None);
    }
}
