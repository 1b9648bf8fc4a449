//! Methods of texts, maps and lists, as people know them from Jinja and Python: owns the list, and what each costs.
//! A template calls them as filters; nothing here changes the value that it is called on.

use minijinja::{
    Error, ErrorKind, Value,
    value::{Rest, ValueKind, ValueOrKwargs},
};

use super::library::{capitalized, failed, pay, text, titled};

/// The methods that a template can call.
pub(super) const METHODS: &[&str] = &[
    "capitalize",
    "count",
    "endswith",
    "find",
    "get",
    "index",
    "isalnum",
    "isalpha",
    "isdigit",
    "islower",
    "isspace",
    "isupper",
    "items",
    "join",
    "keys",
    "lower",
    "lstrip",
    "removeprefix",
    "removesuffix",
    "replace",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "title",
    "upper",
    "values",
];

/// What people write instead, and what to write here.
pub(super) const INSTEAD: &[(&str, &str)] = &[
    ("append", "lists cannot be changed: make a new one with `+`, as in `list + [item]`"),
    ("extend", "lists cannot be changed: make a new one with `+`"),
    ("insert", "lists cannot be changed: make a new one with `+`"),
    ("pop", "nothing can be changed here: use `[0]`, `| first` or `| last`"),
    ("update", "maps cannot be changed: write a new one"),
    ("format", "use the filter: `{{ '%s of %s' | format(a, b) }}`"),
    ("sort", "use the filter `sort`"),
    ("reverse", "use the filter `reverse`"),
    ("encode", "texts are Unicode, and need no encoding"),
];

/// Calls a method.
pub(super) fn call(value: &Value, name: &str, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    if value.is_undefined() {
        return Err(Error::from(ErrorKind::UndefinedError));
    }
    let args = args.into_values();
    if args.iter().any(Value::is_kwargs) {
        return Err(failed(format!("`{name}` takes no named arguments")));
    }
    let args = Args { name, args: &args };
    let result = match value.kind() {
        ValueKind::String => of_text(value.as_str().unwrap_or_default(), &args)?,
        ValueKind::Map => of_map(value, &args)?,
        ValueKind::Seq | ValueKind::Iterable => of_list(value, &args)?,
        _ => None,
    };
    result.ok_or_else(|| failed(format!("a value of type {} has no method `{name}`", value.kind())))
}

/// What a method is given.
struct Args<'a> {
    name: &'a str,
    args: &'a [Value],
}

impl<'a> Args<'a> {
    fn at_most(&self, most: usize) -> Result<(), Error> {
        if self.args.len() <= most {
            return Ok(());
        }
        Err(failed(format!("`{}` takes at most {most} arguments, not {}", self.name, self.args.len())))
    }

    /// An argument that may be left out.
    fn get(&self, index: usize) -> Option<&'a Value> {
        self.args.get(index).filter(|value| !value.is_none())
    }

    fn text(&self, index: usize) -> Result<Option<&'a str>, Error> {
        match self.get(index) {
            None => Ok(None),
            Some(value) => match value.as_str() {
                Some(text) => pay(text.len()).map(|()| Some(text)),
                None => Err(failed(format!("`{}` takes a text, not a value of type {}", self.name, value.kind()))),
            },
        }
    }

    fn required(&self, index: usize) -> Result<&'a str, Error> {
        self.text(index)?.ok_or_else(|| failed(format!("`{}` needs a text", self.name)))
    }

    /// How often; every time where it is left out or negative.
    fn times(&self, index: usize) -> Result<usize, Error> {
        match self.get(index) {
            None => Ok(usize::MAX),
            Some(value) => match value.as_i64() {
                Some(times) => Ok(usize::try_from(times).unwrap_or(usize::MAX)),
                None => Err(failed(format!("`{}` takes a whole number there", self.name))),
            },
        }
    }

    /// Whether one of the texts that are given fits.
    fn any(&self, fits: impl Fn(&str) -> bool) -> Result<bool, Error> {
        match self.get(0).filter(|value| matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)) {
            None => self.required(0).map(fits),
            Some(list) => {
                for item in list.try_iter()? {
                    let Some(item) = item.as_str() else {
                        return Err(failed(format!("`{}` takes texts alone", self.name)));
                    };
                    pay(item.len() + 1)?;
                    if fits(item) {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
        }
    }
}

/// A method of a text; None where texts have no such method.
fn of_text(text: &str, args: &Args<'_>) -> Result<Option<Value>, Error> {
    // Upper and lower case may take three times the bytes.
    pay(text.len().saturating_mul(3))?;
    Ok(Some(match args.name {
        "upper" => args.at_most(0).map(|()| Value::from(text.to_uppercase()))?,
        "lower" => args.at_most(0).map(|()| Value::from(text.to_lowercase()))?,
        "title" => args.at_most(0).map(|()| Value::from(titled(text)))?,
        "capitalize" => args.at_most(0).map(|()| Value::from(capitalized(text)))?,
        "strip" | "lstrip" | "rstrip" => stripped(text, args)?,
        "split" | "rsplit" => split(text, args)?,
        "splitlines" => {
            pay(text.len().saturating_mul(16))?;
            text.lines().map(Value::from).collect()
        }
        "replace" => replaced(text, args)?,
        "startswith" => Value::from(args.any(|start| text.starts_with(start))?),
        "endswith" => Value::from(args.any(|end| text.ends_with(end))?),
        "removeprefix" => args.required(0).map(|part| Value::from(text.strip_prefix(part).unwrap_or(text)))?,
        "removesuffix" => args.required(0).map(|part| Value::from(text.strip_suffix(part).unwrap_or(text)))?,
        "find" => place(text, args.required(0)?).map_or_else(|| Value::from(-1), Value::from),
        "index" => match place(text, args.required(0)?) {
            Some(place) => Value::from(place),
            None => return Err(failed("`index` did not find the text; `find` gives -1 then")),
        },
        "count" => match args.required(0)? {
            "" => return Err(failed("`count` needs a text that is not empty")),
            part => Value::from(text.matches(part).count()),
        },
        "join" => joined(text, args)?,
        "isalnum" => is_all(text, char::is_alphanumeric),
        "isalpha" => is_all(text, char::is_alphabetic),
        "isdigit" => is_all(text, |c| c.is_ascii_digit()),
        "isspace" => is_all(text, char::is_whitespace),
        "islower" => Value::from(text.chars().any(char::is_lowercase) && !text.chars().any(char::is_uppercase)),
        "isupper" => Value::from(text.chars().any(char::is_uppercase) && !text.chars().any(char::is_lowercase)),
        _ => return Ok(None),
    }))
}

fn is_all(text: &str, holds: impl Fn(char) -> bool) -> Value {
    Value::from(!text.is_empty() && text.chars().all(holds))
}

/// Where a text stands, in characters.
fn place(text: &str, part: &str) -> Option<usize> {
    text.find(part).map(|at| text[..at].chars().count())
}

fn stripped(text: &str, args: &Args<'_>) -> Result<Value, Error> {
    args.at_most(1)?;
    let chars = args.text(0)?;
    pay(text.len().saturating_mul(chars.map_or(1, str::len)))?;
    let drops = |c: char| chars.map_or_else(|| c.is_whitespace(), |chars| chars.contains(c));
    Ok(Value::from(match args.name {
        "lstrip" => text.trim_start_matches(drops),
        "rstrip" => text.trim_end_matches(drops),
        _ => text.trim_matches(drops),
    }))
}

fn split(text: &str, args: &Args<'_>) -> Result<Value, Error> {
    args.at_most(2)?;
    pay(text.len().saturating_mul(16))?;
    let pieces = args.times(1)?.saturating_add(1);
    let from_the_end = args.name == "rsplit";
    let mut parts: Vec<Value> = match args.text(0)? {
        Some("") => return Err(failed(format!("`{}` needs a text that is not empty", args.name))),
        Some(by) if from_the_end => text.rsplitn(pieces, by).map(Value::from).collect(),
        Some(by) => text.splitn(pieces, by).map(Value::from).collect(),
        None => words(text, pieces, from_the_end),
    };
    if from_the_end {
        parts.reverse();
    }
    Ok(Value::from(parts))
}

/// At most so many pieces between white space; the last one keeps its own. From the end they come last first.
fn words(text: &str, pieces: usize, from_the_end: bool) -> Vec<Value> {
    let (mut rest, mut found) = (text.trim(), Vec::new());
    while !rest.is_empty() {
        let cut = if from_the_end { rest.rfind(char::is_whitespace) } else { rest.find(char::is_whitespace) };
        let Some(at) = cut.filter(|_| found.len() + 1 < pieces) else {
            found.push(Value::from(rest));
            break;
        };
        let (before, after) = rest.split_at(at);
        if from_the_end {
            found.push(Value::from(after.trim_start()));
            rest = before.trim_end();
        } else {
            found.push(Value::from(before));
            rest = after.trim_start();
        }
    }
    found
}

fn replaced(text: &str, args: &Args<'_>) -> Result<Value, Error> {
    args.at_most(3)?;
    let (from, to, times) = (args.required(0)?, args.required(1)?, args.times(2)?);
    if from.is_empty() {
        return Err(failed("`replace` needs a text to look for"));
    }
    pay(text.matches(from).take(times).count().saturating_mul(to.len()))?;
    Ok(Value::from(text.replacen(from, to, times)))
}

/// The items of a list as one text, with this text between them.
fn joined(by: &str, args: &Args<'_>) -> Result<Value, Error> {
    args.at_most(1)?;
    let list = args.get(0).ok_or_else(|| failed("`join` needs a list"))?;
    let mut all = String::new();
    for (number, item) in list.try_iter()?.enumerate() {
        let item = text(&item)?;
        pay(by.len() + 1)?;
        if number > 0 {
            all.push_str(by);
        }
        all.push_str(&item);
    }
    Ok(Value::from(all))
}

/// A method of a map; None where maps have no such method.
fn of_map(map: &Value, args: &Args<'_>) -> Result<Option<Value>, Error> {
    if args.name == "get" {
        args.at_most(2)?;
        let key = args.args.first().ok_or_else(|| failed("`get` needs a key"))?;
        let found = map.get_item(key)?;
        let otherwise = || args.args.get(1).cloned().unwrap_or_else(|| Value::from(()));
        return Ok(Some(if found.is_undefined() { otherwise() } else { found }));
    }
    if !["items", "keys", "values"].contains(&args.name) {
        return Ok(None);
    }
    args.at_most(0)?;
    let mut list = Vec::new();
    for key in map.try_iter()? {
        pay(64 + key.as_str().map_or(0, str::len))?;
        list.push(match args.name {
            "keys" => key,
            "values" => map.get_item(&key)?,
            _ => Value::from(vec![key.clone(), map.get_item(&key)?]),
        });
    }
    Ok(Some(Value::from(list)))
}

/// A method of a list; None where lists have no such method.
fn of_list(list: &Value, args: &Args<'_>) -> Result<Option<Value>, Error> {
    if !["count", "index"].contains(&args.name) {
        return Ok(None);
    }
    args.at_most(1)?;
    let wanted = args.args.first().ok_or_else(|| failed(format!("`{}` needs an item", args.name)))?;
    super::library::pay_for(list, 0)?;
    super::library::pay_for(wanted, 0)?;
    let mut found = list.try_iter()?.enumerate().filter(|(_, item)| item == wanted).map(|(index, _)| index);
    if args.name == "count" {
        return Ok(Some(Value::from(found.count())));
    }
    let index = found.next().ok_or_else(|| failed("`index` did not find the item; ask with `in` first"))?;
    Ok(Some(Value::from(index)))
}
