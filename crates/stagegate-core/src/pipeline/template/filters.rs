//! More filters that people know from Jinja and Ansible: owns those that the engine's library has not, or has without
//! a bound. Each pays for what it reads and makes.

use std::sync::Arc;

use minijinja::{
    Environment, Error, ErrorKind, State, Value, filters,
    value::{Kwargs, Rest, ValueKind, ValueOrKwargs},
};

use super::{
    data,
    library::{failed, items, pay, pay_for, text},
};
use crate::{
    evaluation::{self, Interrupted},
    json::Size,
    pipeline::{
        assess::OUTPUT_NODES_MAX,
        pattern::{self, Pattern},
    },
};

/// The filters of this file.
pub(super) const NAMES: &[&str] = &["batch", "format", "fromjson", "regex_replace", "truncate", "wordcount"];

/// The longest width or precision of a `format`, in digits.
const WIDTH_MAX_DIGITS: usize = 3;
/// What compiling a regular expression costs, and what each of its places adds.
const COMPILE_BYTES: usize = 8 * 1024;
const COMPILE_PLACE_BYTES: usize = 64;
/// Bytes that a search passes in the time of one unit, at least.
const SEARCH_BYTES: usize = 8;
/// The same where the search has just begun.
const SEARCH_UNITS: u64 = 16;
/// The most places of a pattern that a search is taken to be at.
const SEARCH_PLACES_MAX: u64 = 64;

/// Adds them.
pub(super) fn add(env: &mut Environment<'static>) {
    env.add_filter("truncate", truncate);
    env.add_filter("wordcount", |v: &Value| {
        let text = text(v)?;
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        Ok::<_, Error>(text.split(|c| !is_word(c)).filter(|word| !word.is_empty()).count())
    });
    env.add_filter("batch", batch);
    env.add_filter("format", format);
    env.add_filter("fromjson", fromjson);
    env.add_filter("regex_replace", regex_replace);
}

/// Arguments by position or by name; None for those that are left out.
fn named<const N: usize>(args: Rest<ValueOrKwargs>, names: [&str; N]) -> Result<[Option<Value>; N], Error> {
    let mut args = args.into_values();
    let by_name = match args.pop_if(|last| last.is_kwargs()) {
        Some(last) => Some(Kwargs::try_from(last)?),
        None => None,
    };
    if args.len() > N {
        return Err(failed(format!("it takes at most {N} arguments: {}", names.join(", "))));
    }
    let mut found = [const { None }; N];
    for (place, name) in found.iter_mut().zip(names) {
        *place = match &by_name {
            Some(kwargs) => kwargs.get::<Option<Value>>(name)?,
            None => None,
        };
    }
    for (place, value) in found.iter_mut().zip(args) {
        *place = Some(value);
    }
    if let Some(kwargs) = &by_name {
        kwargs.assert_all_used()?;
    }
    Ok(found.map(|value| value.filter(|value| !value.is_none())))
}

fn count(value: Option<&Value>, name: &str, otherwise: usize) -> Result<usize, Error> {
    match value {
        None => Ok(otherwise),
        Some(value) => value.as_usize().ok_or_else(|| failed(format!("`{name}` is a whole number of 0 or more"))),
    }
}

/// `truncate(length=255, killwords=false, end='...', leeway=5)`, in characters.
fn truncate(v: &Value, args: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let [length, killwords, end, leeway] = named(args, ["length", "killwords", "end", "leeway"])?;
    let whole = text(v)?;
    let (length, leeway) = (count(length.as_ref(), "length", 255)?, count(leeway.as_ref(), "leeway", 5)?);
    let end = end.as_ref().map(text).transpose()?.unwrap_or("...".into());
    pay(whole.len().saturating_add(end.len()))?;
    if whole.chars().count() <= length.saturating_add(leeway) {
        return Ok(whole.into_owned());
    }
    let kept = length.saturating_sub(end.chars().count());
    let mut cut = &whole[..whole.char_indices().nth(kept).map_or(whole.len(), |(at, _)| at)];
    if !killwords.is_some_and(|kill| kill.is_true()) {
        cut = cut.rsplit_once(' ').map_or(cut, |(before, _)| before);
    }
    Ok(format!("{cut}{end}"))
}

/// `batch(count, fill_with)`: the items in lists of so many.
fn batch(v: &Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let [size, fill] = named(args, ["linecount", "fill_with"])?;
    let size = count(size.as_ref(), "batch", 0)?;
    if size == 0 {
        return Err(failed("`batch` needs how many items a list has, 1 or more"));
    }
    let (mut batches, mut batch) = (Vec::new(), Vec::new());
    for item in items(v)? {
        pay(64)?;
        batch.push(item);
        if batch.len() == size {
            batches.push(Value::from(std::mem::take(&mut batch)));
        }
    }
    if !batch.is_empty() {
        if let Some(fill) = fill {
            pay((size - batch.len()).saturating_mul(32))?;
            batch.resize(size, fill);
        }
        batches.push(Value::from(batch));
    }
    Ok(Value::from(batches))
}

/// The message for a pattern of `format` that is too wide.
pub(super) const TOO_WIDE: &str = "a width or a precision of `format` is a number of at most 3 digits";

/// Whether a pattern of `format` has a width or a precision that is too large, or comes with the values.
pub(super) fn is_too_wide(pattern: &str) -> bool {
    let mut rest = pattern;
    while let Some(at) = rest.find('%') {
        rest = &rest[at + 1..];
        if rest.starts_with('(') {
            rest = rest.split_once(')').map_or("", |(_, after)| after);
        }
        let is_of_width = |c: char| c.is_ascii_digit() || "#- +.*".contains(c);
        let end = rest.find(|c: char| !is_of_width(c)).unwrap_or(rest.len());
        let (width, after) = rest.split_at(end);
        let mut numbers = width.split(|c: char| !c.is_ascii_digit()).map(|digits| digits.trim_start_matches('0'));
        if width.contains('*') || numbers.any(|digits| digits.len() > WIDTH_MAX_DIGITS) {
            return true;
        }
        // The conversion: a letter, or `%` for itself.
        rest = after.strip_prefix('%').unwrap_or(after);
    }
    false
}

/// `'%s of %d' | format(a, b)`, as in Python. What is neither text nor number is inserted as JSON.
fn format(state: &mut State<'_, '_>, v: &Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let pattern = text(v)?;
    if is_too_wide(&pattern) {
        return Err(failed(TOO_WIDE));
    }
    pay(pattern.matches('%').count().saturating_mul(1_000))?;
    let inserted = |value: Value| match value.kind() {
        ValueKind::String | ValueKind::Number => pay_for(&value, 0).map(|()| value),
        _ => text(&value).map(|text| Value::from(text.as_ref())),
    };
    let mut given = Vec::new();
    for value in args.into_values() {
        given.push(ValueOrKwargs::from(if value.is_kwargs() {
            let kwargs = Kwargs::try_from(value)?;
            let pairs = kwargs.args().map(|name| Ok((name.to_owned(), inserted(kwargs.get(name)?)?)));
            Value::from(pairs.collect::<Result<Kwargs, Error>>()?)
        } else {
            inserted(value)?
        }));
    }
    // As often as the pattern names them.
    let bytes: usize = given.iter().map(|value| value.as_str().map_or(0, str::len)).sum();
    pay(pattern.matches('%').count().saturating_mul(bytes))?;
    let function = Value::from_function(filters::format);
    let args: Vec<Value> =
        std::iter::once(Value::from(pattern.as_ref())).chain(given.into_iter().map(Value::from)).collect();
    function.call(state, &args)
}

/// A JSON text as the value that it stands for.
fn fromjson(v: &Value) -> Result<Value, Error> {
    let Some(json) = v.as_str() else {
        return Err(if v.is_undefined() {
            Error::from(ErrorKind::UndefinedError)
        } else {
            failed(format!("`fromjson` reads a text, not a value of type {}", v.kind()))
        });
    };
    let json = json.trim_start_matches('\u{feff}');
    let no_json = |error| failed(format!("`fromjson` was given a text that is no JSON: {error}"));
    pay(json.len())?;
    let size = Size::of_text(json).map_err(no_json)?;
    if size.nodes > OUTPUT_NODES_MAX {
        let nodes = size.nodes;
        return Err(failed(format!("`fromjson` was given {nodes} values, at most {OUTPUT_NODES_MAX} are allowed")));
    }
    // What it takes in memory, which can be much more than its text.
    pay(usize::try_from(size.parsed_bytes).unwrap_or(usize::MAX))?;
    let parsed: serde_json::Value = serde_json::from_str(json).map_err(no_json)?;
    Ok(data::view(&Arc::new(parsed)))
}

/// `regex_replace(pattern, replacement='', ignorecase=false, count=0)`, as in Ansible: `\1` and `\g<name>` in the
/// replacement stand for groups.
fn regex_replace(v: &Value, args: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let [pattern, replacement, ignorecase, most] = named(args, ["pattern", "replacement", "ignorecase", "count"])?;
    let whole = text(v)?;
    let pattern = pattern.ok_or_else(|| failed("`regex_replace` needs a pattern"))?;
    let mut source = text(&pattern)?.into_owned();
    if ignorecase.is_some_and(|ignore| ignore.is_true()) {
        source.insert_str(0, "(?i)");
    }
    let places = usize::try_from(pattern::places(&source)).unwrap_or(usize::MAX);
    pay(places.saturating_mul(COMPILE_PLACE_BYTES).saturating_add(COMPILE_BYTES))?;
    let pattern = Pattern::compile(&source).map_err(|error| failed(pattern::why_not(&source, &error).0))?;
    let replacement = replacement.as_ref().map(text).transpose()?.unwrap_or_default();
    pattern.claim_captures(&whole).map_err(|why| failed(format!("the pattern of `regex_replace` {why}")))?;
    let most = match count(most.as_ref(), "count", 0)? {
        0 => usize::MAX,
        most => most,
    };
    let search_places = (places as u64).clamp(1, SEARCH_PLACES_MAX);
    let (mut made, mut last) = (String::new(), 0);
    for found in pattern.captures(&whole).take(most) {
        let all = found.get_match();
        // A search may read on to the end, even where its match is short.
        let read = ((whole.len() - all.start()) / SEARCH_BYTES) as u64 + SEARCH_UNITS;
        evaluation::pay(read.saturating_mul(search_places)).map_err(|_| failed(Interrupted::TOLD))?;
        pay(all.start() - last + replacement.len() + 32)?;
        made.push_str(&whole[last..all.start()]);
        expand(&replacement, &found, &mut made)?;
        last = all.end();
    }
    pay(whole.len() - last)?;
    made.push_str(&whole[last..]);
    Ok(made)
}

/// Writes a replacement: `\1`, `\g<name>` and `\\` have a meaning, all else stands for itself.
fn expand(replacement: &str, found: &regex::Captures<'_>, made: &mut String) -> Result<(), Error> {
    let mut rest = replacement;
    while let Some(at) = rest.find('\\') {
        made.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let group = if let Some(digit) = rest.chars().next().and_then(|c| c.to_digit(10)) {
            rest = &rest[1..];
            found.get(digit as usize)
        } else if let Some((name, after)) = rest.strip_prefix("g<").and_then(|rest| rest.split_once('>')) {
            rest = after;
            name.parse().ok().map_or_else(|| found.name(name), |number| found.get(number))
        } else {
            made.push('\\');
            rest = rest.strip_prefix('\\').unwrap_or(rest);
            None
        };
        let group = group.map_or("", |group| group.as_str());
        pay(group.len())?;
        made.push_str(group);
    }
    made.push_str(rest);
    Ok(())
}
