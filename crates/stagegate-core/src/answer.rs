//! JSON that others wrote: owns how the answers of models and the bodies of their servers are read, for stages as for
//! judges. It takes off what stands around a value (a byte order mark, white space, thoughts, a code fence, words), mends
//! what loses nothing by it, and says what no JSON can hold. It never takes a part of a value for the value.

use std::{borrow::Cow, fmt};

use serde_json::Value;

use crate::json::Size;

/// More values than this in one answer are not told apart.
const VALUES_MAX: usize = 8;
/// The looks for the end of a bracket may read the text so many times in all.
const LOOKS_MAX: usize = 4;
/// Integers with fewer digits fit into 64 bits, whatever their digits are.
const SURE_DIGITS: usize = 18;
/// What other languages write for numbers that JSON does not know.
const NO_NUMBERS: [&str; 3] = ["nan", "infinity", "inf"];
/// The tags between which models think aloud.
const THOUGHTS: [(&str, &str); 3] =
    [("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<reasoning>", "</reasoning>")];

/// Why an answer is not one JSON value. Quotes nothing of it.
#[derive(Debug)]
pub enum Unread {
    /// There is no JSON value in it.
    NotJson(serde_json::Error),
    /// There is more than one.
    Several,
    /// It holds `NaN` or an infinity.
    NoNumber,
    /// It holds an integer that 64 bits do not hold.
    LongInteger {
        /// Of how many digits.
        digits: usize,
    },
}

impl fmt::Display for Unread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotJson(error) => write!(f, "the answer is not JSON ({error}); answer with the JSON value alone"),
            Self::Several => f.write_str("the answer holds more than one JSON value; answer with one alone"),
            Self::NoNumber => {
                f.write_str("the answer holds `NaN` or an infinity, which JSON does not know; write a number or null")
            }
            Self::LongInteger { digits } => write!(
                f,
                "the answer holds an integer of {digits} digits, which 64 bits do not hold; write it as a string"
            ),
        }
    }
}

/// What becomes of numbers that JSON does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Numbers {
    /// They make a text invalid.
    Refused,
    /// They are null.
    Null,
}

/// The one JSON value that an answer holds, as a text that every parser takes and that keeps each digit of its integers.
pub fn find(answer: &str) -> Result<Cow<'_, str>, Unread> {
    let found = match find_with(answer, Numbers::Refused) {
        Err(Unread::NotJson(_)) if find_with(answer, Numbers::Null).is_ok() => return Err(Unread::NoNumber),
        found => found?,
    };
    match long_integer(&found) {
        Some(digits) => Err(Unread::LongInteger { digits }),
        None => Ok(found),
    }
}

/// The same for readers of some fields alone: numbers that JSON does not know are null, and integers may be of any length.
pub fn find_loosely(answer: &str) -> Result<Cow<'_, str>, Unread> {
    find_with(answer, Numbers::Null)
}

/// A server's body. What it holds beside the fields that are read may be what no JSON can hold.
pub fn body(bytes: &[u8]) -> Option<Value> {
    if let Ok(value) = serde_json::from_slice(bytes) {
        return Some(value);
    }
    let text = String::from_utf8_lossy(bytes);
    let text = trimmed(&text);
    let mended = mended(text, Numbers::Null);
    serde_json::from_str(mended.as_deref().unwrap_or(text)).ok()
}

fn find_with(answer: &str, numbers: Numbers) -> Result<Cow<'_, str>, Unread> {
    let whole = trimmed(answer);
    let not_json = match valid(whole, numbers) {
        Ok(json) => return Ok(json),
        Err(error) => Unread::NotJson(error),
    };
    let said = without_thoughts(whole);
    if let Ok(json) = valid(said, numbers) {
        return Ok(json);
    }
    let mut found = fenced(said, numbers);
    if found.is_empty() {
        found = among_words(said, numbers);
    }
    match found.len() {
        0 => Err(not_json),
        1 => Ok(found.swap_remove(0)),
        _ => Err(Unread::Several),
    }
}

/// Without what no reader sees.
fn trimmed(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || matches!(c, '\u{feff}' | '\u{200b}' | '\u{2060}' | '\0'))
}

/// The text, mended where that makes it valid.
fn valid(text: &str, numbers: Numbers) -> Result<Cow<'_, str>, serde_json::Error> {
    let Err(error) = Size::of_text(text) else { return Ok(Cow::Borrowed(text)) };
    match mended(text, numbers) {
        Some(mended) if Size::of_text(&mended).is_ok() => Ok(Cow::Owned(mended)),
        _ => Err(error),
    }
}

/// What comes after the thoughts. Some servers leave out the tag that begins them.
fn without_thoughts(text: &str) -> &str {
    for (begin, end) in THOUGHTS {
        if text.get(..begin.len()).is_some_and(|start| start.eq_ignore_ascii_case(begin)) {
            // Thoughts that never end have said nothing.
            return trimmed(text.split_once(end).map_or("", |(_, said)| said));
        }
        if let Some((_, said)) = text.rsplit_once(end) {
            return trimmed(said);
        }
    }
    text
}

/// The values in code fences; those that are named `json`, where some are.
fn fenced(text: &str, numbers: Numbers) -> Vec<Cow<'_, str>> {
    let (mut named, mut others, mut rest) = (Vec::new(), Vec::new(), text);
    while let Some((_, after)) = rest.split_once("```") {
        rest = after;
        let Some((language, after)) = after.split_once('\n') else { break };
        let language = language.trim();
        if !language.chars().all(|c| c.is_ascii_alphanumeric() || "_+-. ".contains(c)) {
            continue;
        }
        let Some((block, after)) = after.split_once("```") else { break };
        rest = after;
        if let Ok(json) = valid(trimmed(block), numbers)
            && named.len() + others.len() < VALUES_MAX
        {
            if language.to_ascii_lowercase().starts_with("json") { named.push(json) } else { others.push(json) }
        }
    }
    if named.is_empty() { others } else { named }
}

/// The lists and maps that stand between words. None where one of them has no end: what is whole in it is but a part.
fn among_words(text: &str, numbers: Numbers) -> Vec<Cow<'_, str>> {
    let bytes = text.as_bytes();
    let (mut found, mut at, mut looks) = (Vec::new(), 0, LOOKS_MAX * bytes.len());
    let open = |from: usize| bytes[from..].iter().position(|b| matches!(b, b'{' | b'[')).map(|more| from + more);
    while let Some(start) = open(at) {
        if let Some(end) = end_of(bytes, start) {
            at = end;
            if is_candidate(text, start, end)
                && let Ok(json) = valid(&text[start..end], numbers)
            {
                found.push(json);
            }
        } else {
            let next = bytes[start + 1..].iter().find(|byte| !byte.is_ascii_whitespace());
            let read = bytes.len() - start;
            if matches!(next, Some(b'"' | b'{' | b'[')) || looks < read || found.len() >= VALUES_MAX {
                return Vec::new();
            }
            looks -= read;
            at = start + 1;
        }
        if found.len() > VALUES_MAX {
            break;
        }
    }
    found
}

/// Where the bracket at this place is closed.
fn end_of(bytes: &[u8], start: usize) -> Option<usize> {
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for (at, byte) in bytes.iter().enumerate().skip(start) {
        if in_string {
            (in_string, escaped) = (escaped || *byte != b'"', !escaped && *byte == b'\\');
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'{' | b'[' => depth += 1,
            b'}' | b']' => {
                depth -= 1;
                if depth == 0 {
                    return Some(at + 1);
                }
            }
            _ => {}
        }
    }
    None
}

/// Whether a bracket between words may be the answer: an empty one is a figure of speech, and a list of bare numbers on a
/// line with words is a reference.
fn is_candidate(text: &str, start: usize, end: usize) -> bool {
    let inner = text[start + 1..end - 1].trim();
    let is_list = text.as_bytes()[start] == b'[';
    let starts_line = text[..start].chars().rev().take_while(|c| *c != '\n').all(char::is_whitespace);
    let ends_line = text[end..].chars().take_while(|c| *c != '\n').all(char::is_whitespace);
    !inner.is_empty() && (!is_list || inner.contains(['{', '"']) || (starts_line && ends_line))
}

/// The text with what loses nothing by it mended; None where there is nothing to mend. Half a surrogate becomes the
/// replacement character, a control character inside a string its escape.
fn mended(text: &str, numbers: Numbers) -> Option<String> {
    let bytes = text.as_bytes();
    let (mut mended, mut copied, mut at, mut in_string) = (String::new(), 0, 0, false);
    while at < bytes.len() {
        let (length, instead) = match bytes[at] {
            b'"' => {
                in_string = !in_string;
                (1, None)
            }
            b'\\' if in_string => escape(&bytes[at..]),
            control @ 0..0x20 if in_string => (1, Some(format!("\\u{control:04x}"))),
            b'+' | b'-' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' if !in_string => word(&text[at..], numbers),
            _ => (1, None),
        };
        if let Some(instead) = instead {
            mended.push_str(&text[copied..at]);
            mended.push_str(&instead);
            copied = at + length;
        }
        at += length;
    }
    if copied == 0 {
        return None;
    }
    mended.push_str(&text[copied..]);
    Some(mended)
}

/// The length of an escape, and what stands for it where it is half a surrogate.
fn escape(bytes: &[u8]) -> (usize, Option<String>) {
    let unit = |from: usize| {
        let digits = bytes.get(from..from + 6).filter(|part| part.starts_with(b"\\u"))?;
        u16::from_str_radix(std::str::from_utf8(&digits[2..]).ok()?, 16).ok()
    };
    match unit(0) {
        Some(0xD800..=0xDBFF) if matches!(unit(6), Some(0xDC00..=0xDFFF)) => (12, None),
        Some(0xD800..=0xDFFF) => (6, Some("\\ufffd".to_owned())),
        Some(_) => (6, None),
        None => (2.min(bytes.len()), None),
    }
}

/// The length of a word or a number outside of strings, and what stands for it where JSON does not know it.
fn word(text: &str, numbers: Numbers) -> (usize, Option<String>) {
    let is_part = |c: char| c.is_ascii_alphanumeric() || "+-.".contains(c);
    let length = text.find(|c| !is_part(c)).unwrap_or(text.len());
    let word = &text[..length];
    let is_unknown = || {
        let name = word.trim_start_matches(['+', '-']);
        NO_NUMBERS.iter().any(|known| name.eq_ignore_ascii_case(known))
            || word.parse::<f64>().is_ok_and(|number| !number.is_finite())
    };
    (length, (numbers == Numbers::Null && is_unknown()).then(|| "null".to_owned()))
}

/// The digits of the first integer that 64 bits do not hold, in a valid text.
fn long_integer(json: &str) -> Option<usize> {
    let bytes = json.as_bytes();
    let (mut at, mut in_string) = (0, false);
    while at < bytes.len() {
        match bytes[at] {
            b'"' => in_string = !in_string,
            b'\\' => at += 1,
            b'-' | b'0'..=b'9' if !in_string => {
                let length = json[at..].find(|c: char| !(c.is_ascii_alphanumeric() || "+-.".contains(c)));
                let number = &json[at..length.map_or(json.len(), |length| at + length)];
                let digits = number.trim_start_matches('-');
                let is_integer = digits.bytes().all(|byte| byte.is_ascii_digit());
                if is_integer
                    && digits.len() > SURE_DIGITS
                    && number.parse::<i64>().is_err()
                    && number.parse::<u64>().is_err()
                {
                    return Some(digits.len());
                }
                at += number.len() - 1;
            }
            _ => {}
        }
        at += 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(answer: &str) -> Value {
        let found = find(answer).unwrap_or_else(|why| panic!("{answer:?}: {why}"));
        serde_json::from_str(&found).expect("what is found is JSON")
    }

    #[test]
    fn json_is_found_in_whatever_a_model_puts_around_it() {
        for answer in [
            "{\"a\": 1}",
            "\u{feff} \n{\"a\": 1}\r\n\u{200b}",
            "```json\n{\"a\": 1}\n```",
            "```\n{\"a\": 1}\n```\n",
            "```JSON\n{\"a\": 1}```",
            "Here it is:\n```json\n{\"a\": 1}\n```",
            "Here it is: ```json\n{\"a\": 1}\n```\nHope it helps [1].",
            "```json\n{\"a\": 1}",
            "Sure: {\"a\": 1}",
            "{\"a\": 1}\n\nI used {name} and {} as [1] says.",
            "<think>What about {\"a\": 2}?</think>\n{\"a\": 1}",
            "<THINK>\n```json\n{\"a\": 2}\n```</think>Here: {\"a\": 1}.",
            "What about {\"a\": 2}?\n</think>\n\n{\"a\": 1}",
            "First run `ls`:\n```sh\nls {a}\n```\nThen:\n```json\n{\"a\": 1}\n```",
            "```json\n{\"a\": 1}\n```\nIn short:\n```\n1\n```",
        ] {
            assert_eq!(read(answer), json!({"a": 1}), "{answer:?}");
        }
        assert_eq!(read("The list: [{\"a\": 1}]"), json!([{"a": 1}]), "a list is not its only element");
        assert_eq!(read("The numbers:\n[1, 2]\n"), json!([1, 2]));
        assert_eq!(read("{\"md\": \"```js\\nx\\n```\"}"), json!({"md": "```js\nx\n```"}));
        assert_eq!(read("Here:\n```json\n{\"md\": \"```x```\"}\n```"), json!({"md": "```x```"}));
        assert_eq!(read("\"text\""), json!("text"));
    }

    #[test]
    fn a_part_of_a_value_is_never_taken_for_it() {
        for answer in [
            "",
            "Sure!",
            "{",
            "``````",
            "```json```",
            "```json\n{\n```",
            "Sure: {}",
            "As [1] says.",
            "{\"a\": {\"b\": 1}, \"c\": ",
            "Here: [{\"a\": 1}, {\"a\": 2}, ",
            "{\"a\": {\"b\": 1}, \"c\": oops}",
            "<think>What about {\"a\": 2}?</think>\nSorry.",
            "<think>What about {\"a\": 2}?",
        ] {
            assert!(matches!(find(answer), Err(Unread::NotJson(_))), "{answer:?}: {:?}", find(answer));
        }
        for answer in ["{} {\"a\": 1} {\"a\": 2}", "```json\n1\n```\n```json\n2\n```"] {
            assert!(matches!(find(answer), Err(Unread::Several)), "{answer:?}");
        }
    }

    #[test]
    fn what_loses_nothing_is_mended() {
        assert_eq!(read(r#"{"a": "x\ud83d", "b": "\ude00y", "c": "\ud83d\ude00"}"#)["a"], "x\u{fffd}");
        assert_eq!(read(r#"{"a": "\ud83d\u0041"}"#)["a"], "\u{fffd}A");
        assert_eq!(read("{\"a\": \"two\nlines\tand a tab\"}")["a"], "two\nlines\tand a tab");
        assert_eq!(read(r#"{"a": "NaN \\u 1e999"}"#)["a"], "NaN \\u 1e999");
    }

    #[test]
    fn numbers_that_json_does_not_know_are_refused_in_outputs_and_null_beside_what_is_read() {
        for number in ["NaN", "-Infinity", "+inf", "Infinity", "nan", "1e999"] {
            let answer = format!(r#"{{"a": 1, "b": [{number}], "c": {{"d": 2}}}}"#);
            let loosely = find_loosely(&answer).expect("is read");
            let loosely: Value = serde_json::from_str(&loosely).expect("JSON");
            assert_eq!(loosely, json!({"a": 1, "b": [null], "c": {"d": 2}}), "{number}");
            assert!(matches!(find(&answer), Err(Unread::NoNumber)), "{number}");
            assert_eq!(body(answer.as_bytes()).expect("is read")["b"], json!([null]));
        }
    }

    #[test]
    fn an_integer_is_kept_to_the_digit_or_refused() {
        for (number, digits) in [
            ("18446744073709551615", None),
            ("-9223372036854775808", None),
            ("18446744073709551616", Some(20)),
            ("-9223372036854775809", Some(19)),
            ("123456789012345678901234567890", Some(30)),
            ("123456789012345678901234567890.5", None),
            ("12345678901234567890e2", None),
            ("\"123456789012345678901234567890\"", None),
            ("\"\\\"123456789012345678901234567890\"", None),
        ] {
            let answer = format!("{{\"a\": {number}}}");
            match (find(&answer), digits) {
                (Ok(found), None) => assert_eq!(found, answer),
                (Err(Unread::LongInteger { digits }), Some(expected)) => assert_eq!(digits, expected),
                (found, _) => panic!("{number}: {found:?}"),
            }
            assert!(find_loosely(&answer).is_ok());
        }
    }

    #[test]
    fn a_servers_body_is_read_whatever_stands_around_and_beside_what_is_read() {
        let plain = r#"{"a": 1}"#;
        for body_of in [
            plain.as_bytes().to_vec(),
            [b"\xef\xbb\xbf".as_slice(), plain.as_bytes()].concat(),
            [b"\r\n \0".as_slice(), plain.as_bytes(), b"\n\n"].concat(),
            br#"{"a": 1, "logprob": NaN, "x": "\ud800"}"#.to_vec(),
            b"{\"a\": 1, \"x\": \"\xff\xfe\"}".to_vec(),
        ] {
            assert_eq!(body(&body_of).expect("is read")["a"], 1, "{body_of:?}");
        }
        for none in ["", "<html>", "{", "data: {}"] {
            assert_eq!(body(none.as_bytes()), None, "{none}");
        }
    }

    #[test]
    fn an_answer_full_of_brackets_is_read_in_a_bounded_number_of_looks() {
        let (braces, opens) = ("{ ".repeat(1_000_000), "{x\"".repeat(1_000_000));
        for answer in [braces.as_str(), opens.as_str(), &"[".repeat(1_000_000)] {
            assert!(find(answer).is_err());
        }
    }
}
