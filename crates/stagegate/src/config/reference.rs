//! What the documentation says of the configuration: owns the reference page and the example file, both made from the
//! keys themselves. A test holds the committed files to them.

use std::fmt::Write as _;

use super::{
    keys::{self, Kind, Leaf, Node},
    layers::CONVENTIONAL,
    show::toml_value,
};

const INTRODUCTION: &str = "\
# Configuration

<!-- Made by `stagegate config --reference`; a test holds this page to the code. -->

Four layers, each above the one before it:

1. **Defaults.** Without any configuration `stagegate serve` is an embedded daemon on 127.0.0.1:8080, with SQLite and
   the simulated models.
2. **A TOML file**: `--config FILE`, else `STAGEGATE_CONFIG`, else `./stagegate.toml` if it is there.
   [`deploy/stagegate.example.toml`](../deploy/stagegate.example.toml) has every key with its default.
3. **The environment**: `STAGEGATE_<SECTION>__<KEY>` (two underscores between the parts), and the variables that the
   field knows by their own names, below. An empty variable counts as unset.
4. **Flags** of the command; `stagegate help COMMAND` lists them.

`stagegate config` prints the configuration in force and where each value came from. Unknown keys and unknown
`STAGEGATE_…` variables are refused with the nearest known one, all mistakes at once
([SG0500](errors/SG0500.md)). Variables that Kubernetes makes for a service named `stagegate`
(`STAGEGATE_SERVICE_HOST`, `STAGEGATE_PORT_…`) are passed over.

**Secrets** never show in logs, errors or `stagegate config`. Each can be given by file instead: `<key>_file` in the
file, `…_FILE` in the environment; never both at once. A trailing line end is not part of it. A path in the file is
relative to that file.

Times are a number and a unit: `250ms`, `30s`, `5m`, `24h`, `7d`.
";

/// `docs/configuration.md`.
pub(crate) fn page() -> String {
    let tree = keys::tree();
    let mut text = INTRODUCTION.to_owned();
    text.push_str("\n## Variables with names of their own\n\n| variable | key |\n| --- | --- |\n");
    text.push_str("| `STAGEGATE_CONFIG` | the path of the file |\n");
    for (name, path) in CONVENTIONAL {
        let path: Vec<String> = path.iter().map(|part| (*part).to_owned()).collect();
        let _ = writeln!(text, "| `{name}` | `{}` |", keys::dotted(&path));
    }
    section(&tree, &mut Vec::new(), &mut |path, doc, keys| {
        let _ = write!(text, "\n## `[{}]`\n\n{}\n", keys::dotted(path), flat(doc));
        if keys.is_empty() {
            return;
        }
        text.push_str("\n| key | default | meaning |\n| --- | --- | --- |\n");
        for (key, leaf) in keys {
            let default = default_of(leaf);
            let meaning = meaning(leaf).replace('|', "\\|");
            let _ = writeln!(text, "| `{key}` | {default} | {meaning} |");
        }
    });
    text
}

/// `deploy/stagegate.example.toml`: every key, commented out at its default.
pub(crate) fn example() -> String {
    let tree = keys::tree();
    let mut text = String::from(
        "# Every key of Stagegate's configuration, at its default. Made by `stagegate config --example`.\n\
         # Copy it to stagegate.toml, take the `#` off a key and off the section above it, and change the value.\n",
    );
    section(&tree, &mut Vec::new(), &mut |path, doc, keys| {
        if keys.is_empty() {
            return;
        }
        text.push('\n');
        for line in wrap(&flat(doc), 116) {
            let _ = writeln!(text, "# {line}");
        }
        let path: Vec<String> = path.iter().map(|part| placeholder(part, path)).collect();
        let _ = writeln!(text, "# [{}]", keys::dotted(&path));
        for (key, leaf) in keys {
            text.push('\n');
            for line in wrap(&meaning(leaf), 114) {
                let _ = writeln!(text, "#   {line}");
            }
            let shown = if key == "<name>" { "x-team" } else { key.as_str() };
            let _ = writeln!(text, "# {shown} = {}", sample(key, leaf));
        }
    });
    text
}

/// What the example writes for a name that the user makes up.
fn placeholder(part: &str, path: &[String]) -> String {
    match part {
        "<name>" if path.iter().any(|part| part == "prices") => "local/llama-3".to_owned(),
        "<name>" if path.iter().any(|part| part == "tenants") => "acme".to_owned(),
        "<name>" => "local".to_owned(),
        other => other.to_owned(),
    }
}

/// A value for the example: the default, or where there is none something of the right form.
fn sample(key: &str, leaf: &Leaf) -> String {
    if !leaf.default.is_null() {
        return toml_value(&leaf.default);
    }
    match (key, &leaf.kind) {
        ("database_url", _) => "\"postgres://stagegate:password@localhost:5432/stagegate\"".to_owned(),
        ("url", _) => "\"redis://localhost:6379\"".to_owned(),
        ("data_dir", _) => "\"/var/lib/stagegate\"".to_owned(),
        ("key_header", _) => "\"authorization\"".to_owned(),
        ("http_proxy" | "https_proxy" | "proxy", _) => "\"http://proxy.example:3128\"".to_owned(),
        ("ca_file", _) => "\"/etc/stagegate/ca.pem\"".to_owned(),
        ("base_url", _) => "\"http://localhost:11434/v1\"".to_owned(),
        ("drain_delay", _) => "\"5s\"".to_owned(),
        ("payloads", Kind::Text(_)) => "\"30d\"".to_owned(),
        ("dsn", _) => "\"https://key@sentry.example/1\"".to_owned(),
        (_, Kind::Text(words)) => format!("\"{}\"", words.first().map_or("", String::as_str)),
        (_, Kind::Integer) => "1".to_owned(),
        (_, Kind::Number) => "1.0".to_owned(),
        (_, Kind::Boolean) => "false".to_owned(),
        (_, Kind::List(_)) => "[]".to_owned(),
        (_, Kind::Any) => "\"\"".to_owned(),
    }
}

fn default_of(leaf: &Leaf) -> String {
    match (&leaf.default, leaf.required) {
        (value, _) if !value.is_null() => format!("`{}`", toml_value(value)),
        (_, true) => "required".to_owned(),
        _ => "unset".to_owned(),
    }
}

fn meaning(leaf: &Leaf) -> String {
    let mut text = flat(&leaf.doc);
    if let Kind::Text(words) = &leaf.kind
        && !words.is_empty()
        && !words.iter().all(|word| text.contains(&format!("`{word}`")))
    {
        let quoted: Vec<String> = words.iter().map(|word| format!("`{word}`")).collect();
        let _ = write!(text, " One of {}.", quoted.join(", "));
    }
    if leaf.secret {
        text.push_str(" Secret.");
    }
    text
}

/// Visits each section with the keys that lie directly in it; a map's text tells more than its entry's.
fn section<'a>(node: &'a Node, path: &mut Vec<String>, visit: &mut impl FnMut(&[String], &str, &[(String, &'a Leaf)])) {
    let (doc, keys) = match node {
        Node::Table { doc, keys } => (doc, keys),
        Node::Map { doc, value } => {
            match value.as_ref() {
                Node::Table { keys, .. } => {
                    path.push("<name>".to_owned());
                    table(doc, keys, path, visit);
                    path.pop();
                }
                Node::Leaf(leaf) => visit(path, doc, &[("<name>".to_owned(), leaf)]),
                Node::Map { .. } => {}
            }
            return;
        }
        Node::Leaf(_) => return,
    };
    table(doc, keys, path, visit);
}

fn table<'a>(
    doc: &str,
    keys: &'a [(String, Node)],
    path: &mut Vec<String>,
    visit: &mut impl FnMut(&[String], &str, &[(String, &'a Leaf)]),
) {
    let leaf = |(key, node): &'a (String, Node)| match node {
        Node::Leaf(leaf) => Some((key.clone(), leaf)),
        _ => None,
    };
    if !path.is_empty() {
        visit(path, doc, &keys.iter().filter_map(leaf).collect::<Vec<_>>());
    }
    for (key, node) in keys {
        path.push(key.clone());
        section(node, path, visit);
        path.pop();
    }
}

/// One line, without the links of Rust's documentation.
fn flat(doc: &str) -> String {
    doc.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let last = lines.len() - 1;
        if !lines[last].is_empty() && lines[last].chars().count() + 1 + word.chars().count() > width {
            lines.push(word.to_owned());
        } else {
            if !lines[last].is_empty() {
                lines[last].push(' ');
            }
            lines[last].push_str(word);
        }
    }
    lines
}
