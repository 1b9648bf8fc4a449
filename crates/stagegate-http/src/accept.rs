//! The `Accept` header by its rules (RFC 9110, 12.5.1): weights, wildcards, the most specific range, any letter case. Owns
//! which of the forms that a route has is answered.

use http::{HeaderMap, header::ACCEPT};

/// A range of `Accept` that names a form, and its weight in thousandths.
struct Match {
    weight: u16,
    /// How exactly it names it: `*/*`, `type/*`, `type/subtype`, or that with parameters.
    specificity: u8,
}

/// Which of `offers` the caller wants, by its index. The highest weight wins, then the most exact range, then the later
/// offer: so the first one is for callers who name none, and a caller who names two alike gets the one that only those
/// name who can take it. A caller who wants none of them, or says nothing, gets the first.
pub(crate) fn preferred(headers: &HeaderMap, offers: &[&str]) -> usize {
    let values = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let ranges: Vec<&str> = values.flat_map(split_list).collect();
    let best =
        |offer: &str| ranges.iter().filter_map(|range| of_range(range, offer)).max_by_key(|found| found.specificity);
    let found = offers.iter().enumerate().filter_map(|(index, offer)| {
        let Match { weight, specificity } = best(offer).filter(|found| found.weight > 0)?;
        Some((weight, specificity, index))
    });
    // A wildcard names no form: among the forms that it lets through the first is as good as any.
    let key = |(weight, specificity, index): &(u16, u8, usize)| {
        (*weight, *specificity, if *specificity < EXACT { usize::MAX - index } else { *index })
    };
    found.max_by_key(key).map_or(0, |(_, _, index)| index)
}

/// The specificity from which a range names one form.
const EXACT: u8 = 2;

/// The parts of a comma-separated list; commas in quotes do not separate.
fn split_list(text: &str) -> Vec<&str> {
    split_at(text, b',')
}

fn split_at(text: &str, separator: u8) -> Vec<&str> {
    let (mut parts, mut from, mut quoted, mut escaped) = (Vec::new(), 0, false, false);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            _ if byte == separator && !quoted => {
                parts.push(text[from..at].trim());
                from = at + 1;
            }
            _ => {}
        }
    }
    parts.push(text[from..].trim());
    parts.retain(|part| !part.is_empty());
    parts
}

/// How a range names an offer; None where it does not, or is no range.
fn of_range(range: &str, offer: &str) -> Option<Match> {
    let mut parts = split_at(range, b';').into_iter();
    let (kind, subtype) = parts.next()?.split_once('/')?;
    let (offered_kind, offered_subtype) = offer.split_once('/')?;
    let names = |range: &str, offered: &str| range.eq_ignore_ascii_case(offered);
    let mut specificity = match (kind, subtype) {
        ("*", "*") => 0,
        (kind, "*") if names(kind, offered_kind) => 1,
        (kind, subtype) if names(kind, offered_kind) && names(subtype, offered_subtype) => EXACT,
        _ => return None,
    };
    let mut weight = 1_000;
    for parameter in parts {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        let (name, value) = (name.trim(), value.trim().trim_matches('"'));
        if name.eq_ignore_ascii_case("q") {
            weight = weight_of(value)?;
        } else if name.eq_ignore_ascii_case("charset") && value.eq_ignore_ascii_case("utf-8") {
            specificity += u8::from(specificity == EXACT); // Whatever we answer is UTF-8.
        } else {
            return None; // Another form than ours: a version of it, or another character set.
        }
    }
    Some(Match { weight, specificity })
}

/// `0`, `0.5`, `1.000` in thousandths.
fn weight_of(text: &str) -> Option<u16> {
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    let digits = part.len() <= 3 && part.bytes().all(|byte| byte.is_ascii_digit());
    let thousandths = format!("{part:0<3}").parse::<u16>().ok().filter(|_| digits)?;
    match whole {
        "0" => Some(thousandths),
        "1" if thousandths == 0 => Some(1_000),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    const OFFERS: [&str; 2] = ["application/json", "text/event-stream"];

    fn asked(accepts: &[&str]) -> &'static str {
        let mut headers = HeaderMap::new();
        for accept in accepts {
            headers.append(ACCEPT, HeaderValue::from_str(accept).expect("a header"));
        }
        OFFERS[preferred(&headers, &OFFERS)]
    }

    #[test]
    fn the_form_of_the_highest_weight_is_answered() {
        let (json, stream) = (OFFERS[0], OFFERS[1]);
        for (accept, expected) in [
            ("text/event-stream", stream),
            ("TEXT/Event-Stream", stream),
            ("text/event-stream;q=0, application/json", json),
            ("text/event-stream;q=0", json),
            ("text/event-stream; q=0.000, */*", json),
            ("application/json, text/event-stream;q=0.5", json),
            ("application/json;q=0.4 , text/event-stream;Q=0.5", stream),
            ("application/json;q=0, */*", stream),
            ("application/json;q=0, text/*;q=0.1", stream),
            ("*/*", json),
            ("text/*", stream),
            ("text/*;q=0.9, */*;q=0.8", stream),
            ("text/event-stream, */*", stream),
            ("text/event-stream;q=0.3, */*", json),
            ("text/*, text/event-stream;q=0", json),
            ("application/json, text/event-stream", stream),
            ("text/event-stream, application/json", stream),
            ("text/html, application/xhtml+xml, */*;q=0.8", json),
            ("text/event-stream; charset=utf-8", stream),
            ("text/event-stream; charset=latin1", json),
            ("text/event-stream; version=2, application/json", json),
            ("application/xml", json),
            ("", json),
            (",, ;, text/event-stream,", stream),
            ("text/event-stream;q=2", json),
            ("text/event-stream;q=0.1234", json),
            ("text/event-stream;q=high, */*;q=0.1", json),
            ("application/x-text/event-stream", json),
            ("x; a=\"text/event-stream, text/event-stream\", application/json", json),
            ("not-text/event-stream-at-all", json),
        ] {
            assert_eq!(asked(&[accept]), expected, "{accept:?}");
        }
        assert_eq!(asked(&[]), json);
        assert_eq!(asked(&["application/json;q=0.5", "text/event-stream"]), stream, "a list may stand in two lines");
    }
}
