//! The layers of the configuration: owns how the file, the environment and the flags are read. Each value keeps its
//! origin; what cannot be placed is a mistake, told with the nearest known name.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Read as _,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use config::{ConfigError, Map, Source, Value as Merged, ValueKind};
use serde_json::Value;
use stagegate_core::{Code, Violation, error::nearest, text};

use super::{
    Config, DEFAULT,
    keys::{self, Kind, Leaf, Node},
};

/// Begins every variable of ours.
pub(crate) const PREFIX: &str = "STAGEGATE_";
/// The file that is read if nobody names another one.
const FILE: &str = "stagegate.toml";
/// The largest configuration or secret file.
const FILE_MAX_BYTES: u64 = 1024 * 1024;
/// Variables that are ours but are no keys.
const OTHER_VARIABLES: [&str; 4] = ["STAGEGATE_CONFIG", "STAGEGATE_DATA_DIR", "STAGEGATE_SERVER", "STAGEGATE_API_KEY"];
/// Variables of the developers' tools (`cargo xtask`), not of the daemon.
const TOOLS_PREFIX: &str = "STAGEGATE_TEST_";
/// The providers that are there without being named, and what kind they are.
const BUILT_IN_PROVIDERS: [&str; 4] = ["openai", "anthropic", "gemini", "sim"];

/// Variables that the field knows by these names. A `STAGEGATE_…` variable of the same key goes before them; where two
/// names stand for one key, the later in this list goes before the earlier.
pub(crate) const CONVENTIONAL: [(&str, &[&str]); 17] = [
    ("STAGEGATE_DATA_DIR", &["store", "data_dir"]),
    ("DATABASE_URL", &["store", "database_url"]),
    ("REDIS_URL", &["redis", "url"]),
    ("OPENAI_API_KEY", &["llm", "providers", "openai", "api_key"]),
    ("ANTHROPIC_API_KEY", &["llm", "providers", "anthropic", "api_key"]),
    ("GOOGLE_API_KEY", &["llm", "providers", "gemini", "api_key"]),
    ("GEMINI_API_KEY", &["llm", "providers", "gemini", "api_key"]),
    ("http_proxy", &["net", "http_proxy"]),
    ("HTTP_PROXY", &["net", "http_proxy"]),
    ("https_proxy", &["net", "https_proxy"]),
    ("HTTPS_PROXY", &["net", "https_proxy"]),
    ("all_proxy", &["net", "proxy"]),
    ("ALL_PROXY", &["net", "proxy"]),
    ("no_proxy", &["net", "no_proxy"]),
    ("NO_PROXY", &["net", "no_proxy"]),
    ("SENTRY_DSN", &["sentry", "dsn"]),
    ("RUST_LOG", &["log", "filter"]),
];

/// What the command line says.
#[derive(Debug, Clone, Default)]
pub(crate) struct Flags {
    /// `--config`.
    pub config: Option<PathBuf>,
    /// Values by flag.
    pub values: Vec<(&'static str, &'static [&'static str], String)>,
}

impl Flags {
    /// Adds a flag's value, where it was given.
    pub(crate) fn set(&mut self, flag: &'static str, path: &'static [&'static str], value: Option<impl ToString>) {
        if let Some(value) = value {
            self.values.push((flag, path, value.to_string()));
        }
    }
}

/// The environment, and the directory that `./stagegate.toml` is looked for in.
#[derive(Debug, Clone, Default)]
pub(crate) struct Environment {
    /// The variables; empty ones count as unset.
    pub variables: BTreeMap<String, String>,
    /// Where the process runs.
    pub directory: PathBuf,
}

impl Environment {
    /// The process's own. A variable that is no text cannot be one of ours and is passed over.
    pub(crate) fn of_process() -> Self {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        let variables = std::env::vars_os().filter_map(text).filter(|(_, value)| !value.is_empty()).collect();
        Self { variables, directory: PathBuf::from(".") }
    }

    fn get(&self, name: &str) -> Option<&String> {
        self.variables.get(name).filter(|value| !value.is_empty())
    }
}

/// The values of one layer, each with its origin.
#[derive(Debug, Clone, Default)]
pub(crate) struct Layer(Vec<(Vec<String>, ValueKind, String)>);

impl Layer {
    fn put(&mut self, path: Vec<String>, value: ValueKind, origin: String) {
        self.0.push((path, value, origin));
    }

    fn has(&self, path: &[String]) -> bool {
        self.0.iter().any(|(known, _, _)| known == path)
    }
}

impl Source for Layer {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Merged>, ConfigError> {
        let mut root = Merged::new(None, ValueKind::Table(Map::new()));
        for (path, value, origin) in &self.0 {
            place_in(&mut root, path, value, origin);
        }
        root.into_table()
    }
}

fn place_in(node: &mut Merged, path: &[String], value: &ValueKind, origin: &String) {
    let Some((part, rest)) = path.split_first() else {
        *node = Merged::new(Some(origin), value.clone());
        return;
    };
    if !matches!(node.kind, ValueKind::Table(_)) {
        node.kind = ValueKind::Table(Map::new());
    }
    if let ValueKind::Table(table) = &mut node.kind {
        let empty = || Merged::new(Some(origin), ValueKind::Table(Map::new()));
        place_in(table.entry(part.clone()).or_insert_with(empty), rest, value, origin);
    }
}

/// How an origin and a key are told in a mistake: `stagegate.toml: http.listen`, or the variable or flag alone.
pub(crate) fn place(origin: &str, key: &str) -> String {
    match origin.split_once(' ') {
        Some(("file", file)) => format!("{file}: {key}"),
        Some((_, name)) => name.to_owned(),
        None => key.to_owned(),
    }
}

/// The defaults, and the kinds of the built-in providers that some layer mentions.
pub(crate) fn defaults(tree: &Node, layers: &[Layer]) -> Layer {
    let mut layer = Layer::default();
    let origin = DEFAULT.to_owned();
    for (path, leaf) in tree.leaves() {
        if !path.iter().any(|part| part == "<name>") {
            layer.put(path, kind_of(&leaf.default), origin.clone());
        }
    }
    let config = serde_json::to_value(Config::default()).unwrap_or_default();
    let mut named: BTreeSet<String> = layers
        .iter()
        .flat_map(|layer| &layer.0)
        .filter(|(path, _, _)| path.len() > 2 && path[0] == "llm" && path[1] == "providers")
        .map(|(path, _, _)| path[2].clone())
        .filter(|name| BUILT_IN_PROVIDERS.contains(&name.as_str()))
        .collect();
    named.extend(config["llm"]["providers"].as_object().into_iter().flat_map(|all| all.keys().cloned()));
    for name in named {
        let path = ["llm", "providers", name.as_str(), "kind"].map(str::to_owned).to_vec();
        layer.put(path, ValueKind::String(name.clone()), origin.clone());
    }
    layer
}

/// A JSON value as the merging crate's.
fn kind_of(value: &Value) -> ValueKind {
    match value {
        Value::Null => ValueKind::Nil,
        Value::Bool(flag) => ValueKind::Boolean(*flag),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(whole), _) => ValueKind::I64(whole),
            (None, Some(whole)) => ValueKind::U64(whole),
            (None, None) => ValueKind::Float(number.as_f64().unwrap_or_default()),
        },
        Value::String(text) => ValueKind::String(text.clone()),
        Value::Array(items) => ValueKind::Array(items.iter().map(|item| Merged::new(None, kind_of(item))).collect()),
        Value::Object(map) => {
            let entry = |(key, value): (&String, &Value)| (key.clone(), Merged::new(None, kind_of(value)));
            ValueKind::Table(map.iter().map(entry).collect())
        }
    }
}

// ---- The file -------------------------------------------------------------------------------------------------

/// Reads the file: `--config`, else `STAGEGATE_CONFIG`, else `./stagegate.toml` if it is there.
pub(crate) fn file(tree: &Node, flags: &Flags, environment: &Environment, mistakes: &mut Vec<Violation>) -> Layer {
    let mut layer = Layer::default();
    let asked = match (&flags.config, environment.get("STAGEGATE_CONFIG")) {
        (Some(path), _) => Some(("--config", path.clone())),
        (None, Some(path)) => Some(("STAGEGATE_CONFIG", PathBuf::from(path))),
        (None, None) => None,
    };
    let (named_by, path) = if let Some((by, path)) = asked {
        (by, environment.directory.join(path))
    } else {
        let path = environment.directory.join(FILE);
        if !path.is_file() {
            return layer;
        }
        ("", path)
    };
    let shown = path.strip_prefix(".").unwrap_or(&path).display().to_string();
    let text = match read(&path) {
        Ok(text) => text,
        Err(message) => {
            let place = if named_by.is_empty() { shown } else { format!("{named_by}: {shown}") };
            mistakes.push(Violation::new(Code::InvalidConfig, place, message));
            return layer;
        }
    };
    let table = match text.parse::<toml::Table>() {
        Ok(table) => table,
        Err(error) => {
            mistakes.push(syntax(&shown, &text, &error));
            return layer;
        }
    };
    let value = serde_json::to_value(&table).unwrap_or_default();
    let mut walk = FileWalk { origin: format!("file {shown}"), directory: path.parent(), layer: &mut layer, mistakes };
    walk.visit(tree, &value, &mut Vec::new());
    layer
}

/// A mistake in the form of the file, with its line and column.
fn syntax(shown: &str, text: &str, error: &toml::de::Error) -> Violation {
    let mut violation = Violation::new(Code::InvalidConfig, shown, error.message().trim().to_owned());
    if let Some(before) = error.span().and_then(|span| text.get(..span.start)) {
        let column = before.rsplit('\n').next().map_or(0, |line| line.chars().count());
        violation.line = u32::try_from(before.matches('\n').count() + 1).ok();
        violation.column = u32::try_from(column + 1).ok();
    }
    violation
}

struct FileWalk<'a> {
    origin: String,
    directory: Option<&'a Path>,
    layer: &'a mut Layer,
    mistakes: &'a mut Vec<Violation>,
}

impl FileWalk<'_> {
    fn mistake(&mut self, path: &[String], message: impl Into<String>) -> &mut Violation {
        let place = place(&self.origin, &keys::dotted(path));
        self.mistakes.push(Violation::new(Code::InvalidConfig, place, message));
        let last = self.mistakes.len() - 1;
        &mut self.mistakes[last]
    }

    fn visit(&mut self, node: &Node, value: &Value, path: &mut Vec<String>) {
        match (node, value) {
            (Node::Leaf(leaf), value) => self.leaf(leaf, value, path),
            (_, Value::Object(table)) => {
                for (key, value) in table {
                    path.push(key.clone());
                    // Any name is a name of such a map, but a secret may be given by file there, too.
                    let is_by_file = node.is_map_of_values() && key.ends_with("_file");
                    match node.child(key).filter(|_| !is_by_file) {
                        Some(below) => self.visit(below, value, path),
                        None => self.unknown(node, key, value, table, path),
                    }
                    path.pop();
                }
            }
            _ => {
                let section = keys::dotted(path);
                self.mistake(path, "expected a section").mend = Some(format!("write `[{section}]` and its keys below"));
            }
        }
    }

    fn leaf(&mut self, leaf: &Leaf, value: &Value, path: &[String]) {
        let fits = match (&leaf.kind, value) {
            (_, Value::Object(_)) => false,
            (Kind::Text(_), value) => value.is_string(),
            (Kind::Integer, value) => value.is_i64() || value.is_u64(),
            (Kind::Number, value) => value.is_number(),
            (Kind::Boolean, value) => value.is_boolean(),
            (Kind::List(_), value) => value.is_array(),
            (Kind::Any, _) => true,
        };
        if fits {
            self.layer.put(path.to_vec(), kind_of(value), self.origin.clone());
        } else {
            // A secret's value stays out of the message, of whatever type it is.
            let found = if leaf.secret { String::new() } else { format!(", found `{value}`") };
            self.mistake(path, format!("expected {}{found}", describe(&leaf.kind)));
        }
    }

    /// A key that the schema does not have: the `…_file` of a secret, or a mistake.
    fn unknown(
        &mut self,
        node: &Node,
        key: &str,
        value: &Value,
        beside: &serde_json::Map<String, Value>,
        path: &mut [String],
    ) {
        let base = key.strip_suffix("_file");
        if let Some((base, Node::Leaf(leaf))) = base.and_then(|base| Some((base, node.child(base)?)))
            && leaf.secret
        {
            let mut target = path.to_vec();
            base.clone_into(&mut target[path.len() - 1]);
            if beside.contains_key(base) {
                self.mistake(path, format!("`{base}` is given too")).mend = Some("give one of the two".to_owned());
                return;
            }
            let Value::String(file) = value else {
                self.mistake(path, "expected the path of a file");
                return;
            };
            let file = self.directory.map_or_else(|| PathBuf::from(file), |directory| directory.join(file));
            match read_secret(&file) {
                Ok(secret) => self.layer.put(target, ValueKind::String(secret), self.origin.clone()),
                Err(message) => {
                    self.mistake(path, format!("{}: {message}", file.display()));
                }
            }
            return;
        }
        let known: Vec<&str> = match node {
            Node::Table { keys, .. } => keys.iter().map(|(key, _)| key.as_str()).collect(),
            _ => Vec::new(),
        };
        let mend = match nearest(key, known.iter().copied()) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("known here: {}", known.join(", ")),
        };
        self.mistake(path, "unknown key").mend = Some(mend);
    }
}

fn describe(kind: &Kind) -> String {
    match kind {
        Kind::Text(words) if words.is_empty() => "a text".to_owned(),
        Kind::Text(words) => {
            let quoted: Vec<String> = words.iter().map(|word| format!("`{word}`")).collect();
            format!("one of {}", quoted.join(", "))
        }
        Kind::Integer => "a whole number".to_owned(),
        Kind::Number => "a number".to_owned(),
        Kind::Boolean => "`true` or `false`".to_owned(),
        Kind::List(_) => "a list".to_owned(),
        Kind::Any => "a value".to_owned(),
    }
}

/// Reads a file of bounded size.
fn read(path: &Path) -> Result<String, String> {
    let file = fs::File::open(path).map_err(|error| reason(&error))?;
    let mut bytes = Vec::new();
    file.take(FILE_MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|error| reason(&error))?;
    if bytes.len() as u64 > FILE_MAX_BYTES {
        return Err(format!("the file is over {FILE_MAX_BYTES} bytes"));
    }
    text::decode(bytes).map_err(|error| error.to_string())
}

fn reason(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => "no such file".to_owned(),
        std::io::ErrorKind::PermissionDenied => "the file may not be read".to_owned(),
        _ => error.to_string(),
    }
}

/// A secret from a file; the line's end is not part of it.
fn read_secret(path: &Path) -> Result<String, String> {
    let text = read(path)?;
    let secret = text.trim_end_matches(['\r', '\n']);
    if secret.is_empty() { Err("the file is empty".to_owned()) } else { Ok(secret.to_owned()) }
}

// ---- The environment ------------------------------------------------------------------------------------------

/// Reads the environment: the conventional variables, and `STAGEGATE_<SECTION>__<KEY>` above them.
pub(crate) fn environment(tree: &Node, environment: &Environment, mistakes: &mut Vec<Violation>) -> Layer {
    let mut layer = Layer::default();
    for (name, path) in CONVENTIONAL {
        let path: Vec<String> = path.iter().map(|part| (*part).to_owned()).collect();
        if let Some(Node::Leaf(leaf)) = descend(tree, &path) {
            variable(leaf, name, path, environment, &mut layer, mistakes);
        }
    }
    let mut own = Layer::default();
    for name in environment.variables.keys().filter(|name| environment.get(name).is_some()) {
        let Some(rest) = name.strip_prefix(PREFIX) else { continue };
        if is_not_ours(name) {
            continue;
        }
        let mut path: Vec<String> = rest.split("__").map(str::to_lowercase).collect();
        let parent = path.split_last().and_then(|(_, parent)| descend(tree, parent));
        let is_map_of_values = parent.is_some_and(Node::is_map_of_values);
        if let Some(last) = path.last_mut().filter(|_| is_map_of_values) {
            let (name, by_file) = last.strip_suffix("_file").map_or((last.as_str(), ""), |name| (name, "_file"));
            // Headers have hyphens, which shells do not take in names.
            *last = format!("{}{by_file}", name.replace('_', "-"));
        }
        let base = path.last().and_then(|last| last.strip_suffix("_file")).map(|base| {
            let mut path = path.clone();
            path.pop();
            path.push(base.to_owned());
            path
        });
        let is_by_file = is_map_of_values && base.is_some();
        match (descend(tree, &path), base.as_ref().and_then(|path| descend(tree, path))) {
            (Some(Node::Leaf(leaf)), _) if !is_by_file => {
                variable(leaf, name, path, environment, &mut own, mistakes);
            }
            (_, Some(Node::Leaf(leaf))) if leaf.secret => {
                let plain = name.trim_end_matches("_FILE");
                let path = base.unwrap_or_default();
                // With the plain one given too, that one's turn reports both.
                if environment.get(plain).is_none() {
                    variable(leaf, plain, path, environment, &mut own, mistakes);
                }
            }
            _ => mistakes.push(unknown_variable(tree, name, &path)),
        }
    }
    // Later values win.
    layer.0.extend(own.0);
    layer
}

/// Takes one variable, or the file that its `…_FILE` names, into the layer.
fn variable(
    leaf: &Leaf,
    name: &str,
    path: Vec<String>,
    environment: &Environment,
    layer: &mut Layer,
    mistakes: &mut Vec<Violation>,
) {
    let by_file = format!("{name}_FILE");
    let file = if leaf.secret { environment.get(&by_file) } else { None };
    match (environment.get(name), file) {
        (Some(_), Some(_)) => {
            let mistake = Violation::new(Code::InvalidConfig, by_file, format!("`{name}` is given too"));
            mistakes.push(mistake.mend("give one of the two"));
        }
        (Some(text), None) => {
            if let Some(value) = coerce(&leaf.kind, text) {
                layer.put(path, value, format!("variable {name}"));
            } else {
                let message = format!("expected {}, found `{text}`", describe(&leaf.kind));
                mistakes.push(Violation::new(Code::InvalidConfig, name, message));
            }
        }
        (None, Some(file)) => match read_secret(&environment.directory.join(file)) {
            Ok(secret) => layer.put(path, ValueKind::String(secret), format!("variable {by_file}")),
            Err(message) => mistakes.push(Violation::new(Code::InvalidConfig, by_file, format!("{file}: {message}"))),
        },
        (None, None) => {}
    }
}

/// A variable's text as a value of the key's type.
fn coerce(kind: &Kind, text: &str) -> Option<ValueKind> {
    let text = text.trim();
    match kind {
        Kind::Text(_) | Kind::Any => Some(ValueKind::String(text.to_owned())),
        Kind::Integer => {
            let whole = text.parse::<i64>().map(ValueKind::I64);
            whole.or_else(|_| text.parse::<u64>().map(ValueKind::U64)).ok()
        }
        Kind::Number => text.parse::<f64>().ok().filter(|number| number.is_finite()).map(ValueKind::Float),
        Kind::Boolean => match text.to_lowercase().as_str() {
            "true" | "1" | "yes" | "on" => Some(ValueKind::Boolean(true)),
            "false" | "0" | "no" | "off" => Some(ValueKind::Boolean(false)),
            _ => None,
        },
        Kind::List(item) => {
            let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
            let values: Option<Vec<Merged>> =
                parts.map(|part| coerce(item, part).map(|kind| Merged::new(None, kind))).collect();
            values.map(ValueKind::Array)
        }
    }
}

/// The node at a path.
fn descend<'a>(tree: &'a Node, path: &[String]) -> Option<&'a Node> {
    path.iter().try_fold(tree, |node, part| node.child(part))
}

/// Variables that begin like ours and are not: the tools', and what Kubernetes puts into every container for a
/// service that is called `stagegate` (`STAGEGATE_SERVICE_HOST`, `STAGEGATE_PORT_8080_TCP` …).
fn is_not_ours(name: &str) -> bool {
    let kubernetes = !name.contains("__")
        && (name.ends_with("_SERVICE_HOST")
            || name.contains("_SERVICE_PORT")
            || name.ends_with("_PORT")
            || name.contains("_TCP")
            || name.contains("_UDP"));
    OTHER_VARIABLES.contains(&name) || name.starts_with(TOOLS_PREFIX) || kubernetes
}

fn unknown_variable(tree: &Node, name: &str, path: &[String]) -> Violation {
    let known: Vec<String> = tree
        .leaves()
        .into_iter()
        .map(|(known, _)| {
            // What the user makes up is taken from what was given, so that the rest can be compared.
            let part = |(at, part): (usize, String)| match part.as_str() {
                "<name>" => path.get(at).cloned().unwrap_or(part),
                _ => part,
            };
            keys::variable(&known.into_iter().enumerate().map(part).collect::<Vec<_>>())
        })
        .chain(OTHER_VARIABLES.map(str::to_owned))
        .collect();
    let violation = Violation::new(Code::InvalidConfig, name, "unknown variable");
    match nearest(name, known.iter().map(String::as_str)) {
        Some(near) => violation.mend(format!("did you mean `{near}`?")),
        None => violation.mend("`stagegate config` lists every key; a variable is STAGEGATE_<SECTION>__<KEY>"),
    }
}

// ---- The flags ------------------------------------------------------------------------------------------------

/// The flags, which the command line has parsed already.
pub(crate) fn flags(flags: &Flags) -> Layer {
    let mut layer = Layer::default();
    for (flag, path, value) in &flags.values {
        let path: Vec<String> = path.iter().map(|part| (*part).to_owned()).collect();
        if !layer.has(&path) {
            layer.put(path, ValueKind::String(value.clone()), format!("flag {flag}"));
        }
    }
    layer
}

/// A listening address from the command line: `HOST:PORT`, or a port on loopback.
pub(crate) fn listen_address(text: &str) -> Result<SocketAddr, String> {
    if let Ok(port) = text.trim_start_matches(':').parse::<u16>() {
        return Ok(SocketAddr::from(([127, 0, 0, 1], port)));
    }
    let text = text.replace("localhost:", "127.0.0.1:");
    text.parse().map_err(|_| "write ADDRESS:PORT, such as 127.0.0.1:8080, or a port on loopback".to_owned())
}
