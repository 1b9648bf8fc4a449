//! What commands read: definitions and inputs, from files, stdin or the command line. Owns how a text becomes a run's
//! input. Everything is bounded.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use serde_json::{Map, Value};
use stagegate_core::{
    Code, Error, Violation,
    pipeline::{Bundle, FILES_MAX, FILES_MAX_BYTES},
    text,
};

/// The largest definition or input that is read.
const MAX_BYTES: u64 = 16 * 1024 * 1024;

/// Reads a file, or stdin for `-`, as text.
pub(crate) fn read(path: &str) -> Result<String, Error> {
    let bytes = if path == "-" {
        bounded(&mut io::stdin().lock())
    } else {
        File::open(Path::new(path)).and_then(|mut file| bounded(&mut file))
    };
    let refused = |message: &str| Error::new(Code::InvalidRequest, format!("{path}: {message}"));
    let bytes = bytes.map_err(|error| refused(&reason(&error)))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(refused(&format!("the file is over {MAX_BYTES} bytes")));
    }
    text::decode(bytes).map_err(|error| refused(&error.to_string()))
}

/// Reads a definition, and the files that it names. They lie below the directory of the definition, links followed; of a
/// definition from stdin that is the current one.
pub(crate) fn bundle(path: &str) -> Result<Bundle, Error> {
    let mut bundle = Bundle { definition: read(path)?, ..Bundle::default() };
    let names = bundle.file_names();
    let refused = |name: &str, message: &str| Error::new(Code::InvalidRequest, format!("{path}: `{name}`: {message}"));
    if names.len() > FILES_MAX {
        return Err(Error::new(Code::InvalidRequest, format!("{path}: it names more than {FILES_MAX} files")));
    }
    let directory = if path == "-" { Path::new("") } else { Path::new(path).parent().unwrap_or(Path::new("")) };
    let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
    let mut bytes = 0;
    for name in names {
        let told = |error: io::Error| refused(&name, &reason(&error));
        let root = directory.canonicalize().map_err(told)?;
        let file = root.join(&name).canonicalize().map_err(told)?;
        if !file.starts_with(&root) {
            return Err(refused(&name, "it leads out of the directory of the definition"));
        }
        // Reading a pipe could wait for ever, and a device could be without an end.
        if !file.metadata().map_err(told)?.is_file() {
            return Err(refused(&name, "it is no regular file, but a directory, a pipe or a device"));
        }
        let text = read(&file.display().to_string())?;
        bytes += text.len();
        if bytes > FILES_MAX_BYTES {
            return Err(refused(&name, &format!("the files have more than {FILES_MAX_BYTES} bytes together")));
        }
        bundle.files.insert(name, text);
    }
    Ok(bundle)
}

fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "no such file".to_owned(),
        io::ErrorKind::PermissionDenied => "the file may not be read".to_owned(),
        io::ErrorKind::IsADirectory => "this is a directory, give a file".to_owned(),
        _ => error.to_string(),
    }
}

fn bounded(from: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A run's input from the command line: `@file`, `-` for stdin, JSON or text; then each `key=value` on top.
pub(crate) fn input(given: Option<&str>, sets: &[String], definition: &Value) -> Result<Value, Error> {
    let mut input = match given {
        None => Value::Object(Map::new()),
        Some("-") => from_text(read("-")?, "stdin", definition)?,
        Some(given) => match given.strip_prefix('@') {
            Some(path) => from_text(read(path)?, path, definition)?,
            None => from_text(given.to_owned(), "--input", definition)?,
        },
    };
    for set in sets {
        let Some((key, value)) = set.split_once('=').filter(|(key, _)| !key.is_empty()) else {
            let mistake = Violation::new(Code::InvalidInput, "--set", format!("`{set}` has no key or no `=`"));
            return Err(Error::violations(Code::InvalidInput, vec![mistake.mend("write --set key=value")]));
        };
        let Value::Object(map) = &mut input else {
            return Err(Error::new(Code::InvalidInput, "--set needs an input that is a JSON object"));
        };
        let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()));
        map.insert(key.to_owned(), value);
    }
    Ok(input)
}

/// A text as an input: a JSON object as it is; any other text as the one text that the pipeline asks for.
fn from_text(text: String, from: &str, definition: &Value) -> Result<Value, Error> {
    // What is named or written like JSON must be JSON, so that a slip in it is not sent to a model as prose.
    let named = Path::new(from).extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json"));
    let written = from == "--input" && text.trim_start().starts_with(['{', '[']);
    match serde_json::from_str::<Value>(&text) {
        Ok(value) if value.is_object() || named || written => return Ok(value),
        Err(error) if named || written => {
            let mut mistake = Violation::new(Code::InvalidInput, from, format!("this is no JSON: {error}"));
            (mistake.line, mistake.column) = (u32::try_from(error.line()).ok(), u32::try_from(error.column()).ok());
            return Err(Error::violations(Code::InvalidInput, vec![mistake]));
        }
        _ => {}
    }
    Ok(Value::Object(Map::from_iter([(text_key(definition), Value::String(text))])))
}

/// The one required text of a definition's input schema; else `text`.
fn text_key(definition: &Value) -> String {
    let schema = &definition["input"];
    let is_text = |key: &&str| schema["properties"][*key]["type"] == "string";
    let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    match required.filter(is_text).collect::<Vec<_>>().as_slice() {
        [only] => (*only).to_owned(),
        _ => "text".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn definition() -> Value {
        json!({ "input": { "required": ["brief", "depth"], "properties": {
            "brief": { "type": "string" }, "depth": { "type": "integer" } } } })
    }

    #[test]
    fn a_text_becomes_the_one_text_that_is_asked_for() {
        let read = |given: &str| input(Some(given), &[], &definition()).expect("an input");
        assert_eq!(read("Build a shop."), json!({ "brief": "Build a shop." }));
        assert_eq!(read("{\"a\": 1}"), json!({ "a": 1 }));
        assert_eq!(input(Some("42"), &[], &json!({})).expect("an input"), json!({ "text": "42" }));
    }

    #[test]
    fn single_keys_are_set_on_top() {
        let sets = ["depth=3".to_owned(), "brief=a=b".to_owned()];
        assert_eq!(input(None, &sets, &definition()).expect("an input"), json!({ "depth": 3, "brief": "a=b" }));
        assert_eq!(input(None, &["depth".to_owned()], &definition()).expect_err("refused").code, Code::InvalidInput);
    }

    #[test]
    fn a_slip_in_json_is_told_and_not_taken_for_prose() {
        let error = input(Some("{\"a\": }"), &[], &definition()).expect_err("refused");
        assert_eq!((error.code, error.violations[0].column), (Code::InvalidInput, Some(7)));
    }

    #[test]
    fn files_are_read_or_refused_by_name() {
        let place = tempfile::tempdir().expect("a directory");
        let path = |name: &str| place.path().join(name).display().to_string();
        std::fs::write(path("brief.md"), "# Brief\n").expect("writable");
        std::fs::write(path("bad.json"), "{").expect("writable");
        std::fs::write(path("latin.txt"), [0xe9]).expect("writable");
        let read = |name: &str| input(Some(&format!("@{}", path(name))), &[], &definition());
        assert_eq!(read("brief.md").expect("an input"), json!({ "brief": "# Brief\n" }));
        std::fs::write(path("wide.txt"), b"\xff\xfeh\0i\0").expect("writable");
        std::fs::write(path("marked.json"), b"\xef\xbb\xbf{\"brief\": \"x\"}\r\n").expect("writable");
        assert_eq!(read("marked.json").expect("an input"), json!({ "brief": "x" }));
        for (name, part) in
            [("bad.json", "no JSON"), ("latin.txt", "not UTF-8"), ("wide.txt", "UTF-16"), ("none.md", "no such file")]
        {
            let error = read(name).expect_err("refused");
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn the_files_that_a_definition_names_are_read_from_below_its_directory() {
        let place = tempfile::tempdir().expect("a directory");
        let inside = place.path().join("inside");
        std::fs::create_dir_all(inside.join("prompts")).expect("writable");
        let write = |name: &str, text: &str| std::fs::write(place.path().join(name), text).expect("writable");
        let definition =
            |file: &str| format!("name: p\nstages:\n- {{ id: a, model: sim/quick, prompt_file: {file} }}\n");
        let bundle_of = |file: &str| {
            write("inside/p.yaml", &definition(file));
            bundle(&inside.join("p.yaml").display().to_string())
        };
        write("inside/prompts/a.md", "\u{feff}Say {{ input.text }}\r\n");
        write("secret.md", "secret");
        let read = bundle_of("./prompts/a.md").expect("read");
        assert_eq!(read.files["prompts/a.md"], "Say {{ input.text }}\r\n");
        #[cfg(unix)]
        std::os::unix::fs::symlink(place.path().join("secret.md"), inside.join("link.md")).expect("writable");
        for (file, part) in [("prompts/b.md", "no such file"), ("link.md", "leads out of"), ("prompts", "directory")] {
            let error = bundle_of(file).expect_err(file);
            assert!(error.detail.contains(part), "{file}: {error}");
        }
        for file in ["../secret.md", "/etc/hostname"] {
            assert_eq!(bundle_of(file).expect("not read").files, std::collections::BTreeMap::new(), "{file}");
        }
    }
}
