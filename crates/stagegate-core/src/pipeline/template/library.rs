//! The filters, tests and functions of templates: owns the list and the budget that each draws on. Nothing here does
//! I/O or can make more than it is charged for.

use std::{borrow::Cow, cell::Cell, io, sync::LazyLock};

use minijinja::{
    Environment, Error, ErrorKind, State, UndefinedBehavior, Value, filters, tests,
    value::{Kwargs, Rest, Tuple, ValueIter, ValueKind, ValueOrKwargs},
};

use super::{
    FUEL, filters as more, methods,
    sandbox::{CHARGE, CYCLE, INDEXED, METHOD, NUMBER, SLICE, TEXT},
};
use crate::evaluation::{self, BRIEF_STEPS, Interrupted};

/// The most bytes that one rendering may copy, join or compare.
const WORK_MAX_BYTES: usize = 32 * 1024 * 1024;
/// The deepest nesting of a value.
const VALUE_MAX_DEPTH: usize = 64;

/// The most numbers of a `range`.
const RANGE_MAX: usize = 100_000;

/// The filters that a template can use.
pub(super) const FILTERS: &[&str] = &[
    "abs",
    "attr",
    "batch",
    "bool",
    "capitalize",
    "count",
    "d",
    "default",
    "dictsort",
    "first",
    "float",
    "format",
    "fromjson",
    "groupby",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "lines",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "regex_replace",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "select",
    "selectattr",
    "sort",
    "split",
    "string",
    "sum",
    "title",
    "tojson",
    "trim",
    "truncate",
    "unique",
    "upper",
    "wordcount",
];

/// The tests that a template can use.
pub(super) const TESTS: &[&str] = &[
    "boolean",
    "defined",
    "divisibleby",
    "endingwith",
    "eq",
    "equalto",
    "even",
    "false",
    "float",
    "ge",
    "gt",
    "in",
    "int",
    "integer",
    "iterable",
    "le",
    "lower",
    "lt",
    "mapping",
    "ne",
    "none",
    "number",
    "odd",
    "sequence",
    "startingwith",
    "string",
    "true",
    "undefined",
    "upper",
    "==",
    "!=",
    "<",
    "<=",
    ">",
    ">=",
];

thread_local! {
    /// What the rendering under way on this thread may still do. A rendering never suspends, so it has the thread.
    static WORK_LEFT: Cell<usize> = const { Cell::new(0) };
}

/// Runs a rendering with a full budget.
pub(super) fn charged<T>(render: impl FnOnce() -> T) -> T {
    WORK_LEFT.with(|left| left.set(WORK_MAX_BYTES));
    let result = render();
    WORK_LEFT.with(|left| left.set(0));
    result
}

pub(super) fn failed(message: impl Into<Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

/// Takes from the rendering's own budget, and from what the evaluation may spend where it runs.
pub(super) fn pay(bytes: usize) -> Result<(), Error> {
    evaluation::pay(bytes as u64).map_err(|_| failed(Interrupted::TOLD))?;
    WORK_LEFT.with(|left| {
        let rest = left.get().checked_sub(bytes);
        left.set(rest.unwrap_or(0));
        rest.map(|_| ()).ok_or_else(|| failed(format!("it handles more than {WORK_MAX_BYTES} bytes of data")))
    })
}

/// Pays for everything in a value, shared parts as often as they occur.
pub(super) fn pay_for(value: &Value, depth: usize) -> Result<(), Error> {
    if depth > VALUE_MAX_DEPTH {
        return Err(failed(format!("a value is nested more than {VALUE_MAX_DEPTH} levels deep")));
    }
    match value.kind() {
        ValueKind::String => pay(value.as_str().map_or(0, str::len)),
        ValueKind::Bytes => pay(value.as_bytes().map_or(0, <[u8]>::len)),
        ValueKind::Seq | ValueKind::Iterable => {
            for item in value.try_iter()? {
                pay(32)?;
                pay_for(&item, depth + 1)?;
            }
            Ok(())
        }
        ValueKind::Map => {
            for key in value.try_iter()? {
                pay(64)?;
                pay_for(&key, depth + 1)?;
                pay_for(&value.get_item(&key)?, depth + 1)?;
            }
            Ok(())
        }
        _ => pay(1),
    }
}

/// Pays for looking a place up: characters of a text and items of a computed list are counted from its start.
fn pay_for_index(value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::String => pay(value.as_str().map_or(0, str::len)),
        ValueKind::Iterable => pay(value.len().unwrap_or(RANGE_MAX).saturating_mul(8)),
        _ => Ok(()),
    }
}

/// `range(end)` or `range(start, end, step)`. The library's own overflows at the ends of its numbers.
fn range(lower: i64, upper: Option<i64>, step: Option<i64>) -> Result<Value, Error> {
    let (start, end, step) = (upper.map_or(0, |_| lower), upper.unwrap_or(lower), step.unwrap_or(1));
    if step == 0 {
        return Err(failed("`range` needs a step that is not 0"));
    }
    let way = (i128::from(end) - i128::from(start)) * i128::from(step.signum());
    let length = usize::try_from(way.max(0).unsigned_abs().div_ceil(u128::from(step.unsigned_abs())));
    let Some(length) = length.ok().filter(|length| *length <= RANGE_MAX) else {
        return Err(failed(format!("`range` gives at most {RANGE_MAX} numbers")));
    };
    // Each of them lies between start and end.
    let number = move |index: usize| start.wrapping_add(step.wrapping_mul(i64::try_from(index).unwrap_or(0)));
    Ok(Value::make_iterable(move || (0..length).map(move |index| Value::from(number(index)))))
}

/// `value[start:end:step]` of a text or a list, as a list that holds nothing of the one that it is a part of. The
/// library's own is computed anew at each use, one inside the other, and overflows where its numbers are extreme.
fn slice(value: &Value, start: Option<i64>, end: Option<i64>, step: Option<i64>) -> Result<Value, Error> {
    let step = step.unwrap_or(1);
    if step == 0 {
        return Err(failed("a slice needs a step that is not 0"));
    }
    match value.kind() {
        ValueKind::Undefined => Err(Error::from(ErrorKind::UndefinedError)),
        ValueKind::None => Ok(Value::from(Vec::<Value>::new())),
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            pay(text.len().saturating_mul(5))?;
            let chars: Vec<char> = text.chars().collect();
            Ok(Value::from(places(chars.len(), start, end, step).map(|place| chars[place]).collect::<String>()))
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let mut items = Vec::new();
            for item in value.try_iter()? {
                pay(32)?;
                items.push(item);
            }
            let part = places(items.len(), start, end, step).map(|place| items[place].clone());
            Ok(if value.is_tuple() { Value::from(Tuple::from(part.collect::<Vec<_>>())) } else { part.collect() })
        }
        kind => Err(failed(format!("a value of type {kind} cannot be sliced"))),
    }
}

/// The places that a slice takes, in its order; all of them below `length`.
fn places(length: usize, start: Option<i64>, end: Option<i64>, step: i64) -> impl Iterator<Item = usize> {
    let length = i128::try_from(length).unwrap_or(i128::MAX);
    let (lowest, highest) = if step > 0 { (0, length) } else { (-1, length - 1) };
    let place = |given: Option<i64>, otherwise: i128| {
        given.map_or(otherwise, |given| {
            let given = i128::from(given);
            (if given < 0 { given + length } else { given }).clamp(lowest, highest)
        })
    };
    let (start, end) =
        if step > 0 { (place(start, 0), place(end, length)) } else { (place(start, length - 1), place(end, -1)) };
    let step = i128::from(step);
    std::iter::successors(Some(start), move |place| Some(place + step))
        .take_while(move |place| if step > 0 { *place < end } else { *place > end })
        .filter_map(|place| usize::try_from(place).ok())
}

/// Writes into memory as long as the budget lasts.
struct Paid(Vec<u8>);

impl io::Write for Paid {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        pay(bytes.len()).map_err(io::Error::other)?;
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn json_text(value: &Value, indent: usize) -> Result<String, Error> {
    // Walked first: it stops on what is nested too deeply for the writer.
    pay_for(value, 0)?;
    let mut paid = Paid(Vec::new());
    let padding = " ".repeat(indent);
    let written = if indent == 0 {
        serde_json::to_writer(&mut paid, value)
    } else {
        let format = serde_json::ser::PrettyFormatter::with_indent(padding.as_bytes());
        serde::Serialize::serialize(value, &mut serde_json::Serializer::with_formatter(&mut paid, format))
    };
    written.map_err(|error| failed(format!("it is no JSON: {error}")))?;
    String::from_utf8(paid.0).map_err(|_| failed("it is no text"))
}

/// A value as text, as it would be inserted: texts as they are, all else as compact JSON.
pub(super) fn text(value: &Value) -> Result<Cow<'_, str>, Error> {
    match value.as_str() {
        Some(text) => {
            pay(text.len())?;
            Ok(Cow::Borrowed(text))
        }
        None if value.is_undefined() => Err(Error::from(ErrorKind::UndefinedError)),
        None => json_text(value, 0).map(Cow::Owned),
    }
}

/// The items of a list; what is not there has none, and is an error.
pub(super) fn items(value: &Value) -> Result<ValueIter, Error> {
    if value.is_undefined() { Err(Error::from(ErrorKind::UndefinedError)) } else { value.try_iter() }
}

/// The value of an expression as JSON.
pub(super) fn to_json(value: &Value) -> Result<serde_json::Value, Error> {
    if value.is_undefined() {
        return Err(Error::from(ErrorKind::UndefinedError));
    }
    charged(|| {
        pay_for(value, 0)?;
        serde_json::to_value(value).map_err(|error| failed(format!("it is no JSON: {error}")))
    })
}

/// An environment with everything that a template can use, and nothing else.
pub(super) fn environment() -> &'static Environment<'static> {
    static WHOLE: LazyLock<Environment<'static>> = LazyLock::new(|| library(FUEL));
    static BRIEF: LazyLock<Environment<'static>> = LazyLock::new(|| library(BRIEF_STEPS));
    if evaluation::is_brief() { &BRIEF } else { &WHOLE }
}

fn library(fuel: u64) -> Environment<'static> {
    let mut env = Environment::empty();
    env.set_undefined_behavior(UndefinedBehavior::Strict);
    env.set_recursion_limit(100);
    // Each rendering has all of it.
    env.set_fuel(Some(fuel));
    env.set_debug(true);
    env.set_formatter(|out, _, value| {
        let text = text(value)?;
        out.write_str(&text).map_err(|_| failed("the text could not be written"))
    });
    env.add_function("range", range);
    env.add_filter(CHARGE, |value: Value| pay_for(&value, 0).map(|()| value));
    env.add_filter(INDEXED, |value: Value| pay_for_index(&value).map(|()| value));
    env.add_filter(SLICE, slice);
    env.add_filter(CYCLE, |round: usize, values: Rest<Value>| match round.checked_rem(values.len()) {
        Some(which) => Ok(values[which].clone()),
        None => Err(failed("`loop.cycle` needs values to go through")),
    });
    env.add_filter(
        NUMBER,
        |value: Value| {
            if value.is_number() { Ok(value) } else { Err(failed("only numbers can be multiplied")) }
        },
    );
    env.add_filter(TEXT, |value: Value| match value.as_str() {
        Some(text) => pay(text.len()).map(|()| value),
        None => text(&value).map(|text| Value::from(text.as_ref())),
    });
    env.add_filter(METHOD, |value: &Value, name: String, args: Rest<ValueOrKwargs>| methods::call(value, &name, args));
    add_text_filters(&mut env);
    add_value_filters(&mut env);
    more::add(&mut env);
    add_tests(&mut env);
    env
}

pub(super) fn titled(text: &str) -> String {
    filters::title(Cow::Borrowed(text))
}

pub(super) fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().map(char::to_uppercase).into_iter().flatten();
    first.chain(chars.as_str().to_lowercase().chars()).collect()
}

fn add_text_filters(env: &mut Environment<'static>) {
    // Upper and lower case may take three times the bytes.
    env.add_filter("upper", |v: &Value| text(v).and_then(|t| pay(t.len() * 3).map(|()| t.to_uppercase())));
    env.add_filter("lower", |v: &Value| text(v).and_then(|t| pay(t.len() * 3).map(|()| t.to_lowercase())));
    env.add_filter("title", |v: &Value| text(v).and_then(|t| pay(t.len() * 3).map(|()| titled(&t))));
    env.add_filter("capitalize", |v: &Value| text(v).and_then(|t| pay(t.len() * 3).map(|()| capitalized(&t))));
    env.add_filter("trim", |v: &Value| text(v).map(|text| text.trim().to_owned()));
    env.add_filter("string", |v: &Value| text(v).map(Cow::into_owned));
    env.add_filter("lines", |v: &Value| {
        let text = text(v)?;
        pay(text.len() * 16)?;
        Ok::<_, Error>(text.lines().map(Value::from).collect::<Vec<_>>())
    });
    env.add_filter("split", |v: &Value, by: Option<String>| {
        let text = text(v)?;
        pay(text.len() * 16)?;
        Ok::<_, Error>(match by.filter(|by| !by.is_empty()) {
            Some(by) => text.split(by.as_str()).map(Value::from).collect::<Vec<_>>(),
            None => text.split_whitespace().map(Value::from).collect(),
        })
    });
    env.add_filter("replace", |v: &Value, from: &Value, to: &Value| {
        let (text, from, to) = (text(v)?, text(from)?, text(to)?);
        if from.is_empty() {
            return Err(failed("`replace` needs a text to look for"));
        }
        pay(text.matches(from.as_ref()).count().saturating_mul(to.len()))?;
        Ok(text.replace(from.as_ref(), &to))
    });
    env.add_filter("indent", |v: &Value, width: Option<usize>, first: Option<bool>| {
        let text = text(v)?;
        let width = width.unwrap_or(4).min(100);
        pay(text.lines().count() * width)?;
        let padding = " ".repeat(width);
        let indented = text.lines().enumerate().map(|(number, line)| {
            let skipped = line.is_empty() || (number == 0 && !first.unwrap_or(false));
            if skipped { line.to_owned() } else { format!("{padding}{line}") }
        });
        Ok::<_, Error>(indented.collect::<Vec<_>>().join("\n"))
    });
    env.add_filter("join", |v: &Value, by: Option<&Value>, named: Kwargs| {
        let (separator, attribute) = (named.get::<Option<Value>>("d")?, named.get::<Option<String>>("attribute")?);
        named.assert_all_used()?;
        let by = by.or(separator.as_ref()).map(text).transpose()?.unwrap_or_default();
        let mut joined = String::new();
        for (number, item) in items(v)?.enumerate() {
            let item = match &attribute {
                None => item,
                Some(path) => path.split('.').try_fold(item, |item, key| {
                    pay(key.len() + 1)?;
                    item.get_attr(key)
                })?,
            };
            let item = text(&item)?;
            pay(by.len() + 1)?;
            if number > 0 {
                joined.push_str(&by);
            }
            joined.push_str(&item);
        }
        Ok::<_, Error>(joined)
    });
    env.add_filter("tojson", |v: &Value, indent: Option<usize>, named: Kwargs| {
        let indent = indent.map_or_else(|| named.get::<Option<usize>>("indent").map(Option::unwrap_or_default), Ok)?;
        named.assert_all_used()?;
        if v.is_undefined() {
            return Err(Error::from(ErrorKind::UndefinedError));
        }
        json_text(v, indent.min(8))
    });
}

fn add_value_filters(env: &mut Environment<'static>) {
    env.add_filter("sum", |v: &Value| {
        let (mut whole, mut real, mut is_whole) = (0_i64, 0.0_f64, true);
        for item in items(v)? {
            pay(1)?;
            if !item.is_number() {
                return Err(failed("`sum` adds numbers alone"));
            }
            real += f64::try_from(item.clone())?;
            match item.as_i64().filter(|_| item.is_integer()).and_then(|number| whole.checked_add(number)) {
                Some(total) => whole = total,
                None => is_whole = false,
            }
        }
        Ok(if is_whole { Value::from(whole) } else { Value::from(real) })
    });
    for (name, filter) in [
        ("abs", Value::from_function(filters::abs)),
        ("attr", Value::from_function(filters::attr)),
        ("bool", Value::from_function(filters::bool)),
        ("count", Value::from_function(filters::length)),
        ("d", Value::from_function(filters::default)),
        ("default", Value::from_function(filters::default)),
        ("dictsort", Value::from_function(filters::dictsort)),
        ("first", Value::from_function(filters::first)),
        ("float", Value::from_function(filters::float)),
        ("groupby", Value::from_function(filters::groupby)),
        ("int", Value::from_function(filters::int)),
        ("items", Value::from_function(filters::items)),
        ("last", Value::from_function(filters::last)),
        ("length", Value::from_function(filters::length)),
        ("list", Value::from_function(filters::list)),
        ("map", Value::from_function(filters::map)),
        ("max", Value::from_function(filters::max)),
        ("min", Value::from_function(filters::min)),
        ("reject", Value::from_function(filters::reject)),
        ("rejectattr", Value::from_function(filters::rejectattr)),
        ("reverse", Value::from_function(filters::reverse)),
        ("round", Value::from_function(filters::round)),
        ("select", Value::from_function(filters::select)),
        ("selectattr", Value::from_function(filters::selectattr)),
        ("sort", Value::from_function(filters::sort)),
        ("unique", Value::from_function(filters::unique)),
    ] {
        env.add_filter(name, paid(filter, ["d", "default"].contains(&name)));
    }
}

/// A function that pays for its arguments before it runs. Only with `takes_undefined` may what it works on be missing.
fn paid(
    inner: Value,
    takes_undefined: bool,
) -> impl Fn(&mut State<'_, '_>, Rest<ValueOrKwargs>) -> Result<Value, Error> + Send + Sync + 'static {
    move |state: &mut State<'_, '_>, args: Rest<ValueOrKwargs>| {
        let args: Vec<Value> = args.iter().cloned().map(Value::from).collect();
        if !takes_undefined && args.first().is_some_and(Value::is_undefined) {
            return Err(Error::from(ErrorKind::UndefinedError));
        }
        args.iter().try_for_each(|arg| pay_for(arg, 0))?;
        pay_for_attributes(&args)?;
        let result = inner.call(state, &args)?;
        // What would be computed anew at each use is computed once, here, where it is paid for.
        if result.kind() == ValueKind::Iterable { result.try_iter().map(Value::from_iter) } else { Ok(result) }
    }
}

/// A text among the arguments may be the path of an attribute, which is followed for each item.
fn pay_for_attributes(args: &[Value]) -> Result<(), Error> {
    let Some((value, more)) = args.split_first() else { return Ok(()) };
    let items = if matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) { value.len().unwrap_or(1) } else { 1 };
    let followed = |path: &Value| pay(path.as_str().map_or(0, str::len).saturating_mul(items));
    for arg in more {
        followed(arg)?;
        if arg.kind() == ValueKind::Map {
            for key in arg.try_iter()? {
                followed(&arg.get_item(&key)?)?;
            }
        }
    }
    Ok(())
}

/// Whether a number can be divided by another without rest; by zero none can.
fn is_divisible(value: &Value, by: &Value) -> bool {
    match (i128::try_from(value.clone()), i128::try_from(by.clone())) {
        // There is no rest that does not fit: the smallest number divided by -1 is the only overflow, and divides.
        (Ok(value), Ok(by)) => by != 0 && value.checked_rem(by).unwrap_or(0) == 0,
        _ => match (f64::try_from(value.clone()), f64::try_from(by.clone())) {
            (Ok(value), Ok(by)) => value % by == 0.0,
            _ => false,
        },
    }
}

fn add_tests(env: &mut Environment<'static>) {
    let (eq, ne) = (Value::from_function(tests::is_eq), Value::from_function(tests::is_ne));
    let (lt, le) = (Value::from_function(tests::is_lt), Value::from_function(tests::is_le));
    let (gt, ge) = (Value::from_function(tests::is_gt), Value::from_function(tests::is_ge));
    let integer = Value::from_function(tests::is_integer);
    for (name, test) in [
        ("boolean", Value::from_function(tests::is_boolean)),
        ("defined", Value::from_function(tests::is_defined)),
        ("divisibleby", Value::from_function(is_divisible)),
        ("endingwith", Value::from_function(tests::is_endingwith)),
        ("even", Value::from_function(tests::is_even)),
        ("false", Value::from_function(tests::is_false)),
        ("float", Value::from_function(tests::is_float)),
        ("in", Value::from_function(tests::is_in)),
        ("int", integer.clone()),
        ("integer", integer),
        ("iterable", Value::from_function(tests::is_iterable)),
        ("lower", Value::from_function(tests::is_lower)),
        ("mapping", Value::from_function(tests::is_mapping)),
        ("none", Value::from_function(tests::is_none)),
        ("number", Value::from_function(tests::is_number)),
        ("odd", Value::from_function(tests::is_odd)),
        ("sequence", Value::from_function(tests::is_sequence)),
        ("startingwith", Value::from_function(tests::is_startingwith)),
        ("string", Value::from_function(tests::is_string)),
        ("true", Value::from_function(tests::is_true)),
        ("undefined", Value::from_function(tests::is_undefined)),
        ("upper", Value::from_function(tests::is_upper)),
        ("eq", eq.clone()),
        ("equalto", eq.clone()),
        ("==", eq),
        ("ne", ne.clone()),
        ("!=", ne),
        ("lt", lt.clone()),
        ("<", lt),
        ("le", le.clone()),
        ("<=", le),
        ("gt", gt.clone()),
        (">", gt),
        ("ge", ge.clone()),
        (">=", ge),
    ] {
        env.add_test(name, paid(test, ["defined", "undefined"].contains(&name)));
    }
}
