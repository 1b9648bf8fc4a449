//! The configuration: owns its sections and the order of its layers (defaults ← file ← environment ← flags). It
//! knows no key by heart: names, types, defaults and texts come from the sections' own types and doc comments.
//!
//! Every mistake is collected before anything is refused, and each one names the place that it came from.

mod keys;
mod layers;
pub(crate) mod reference;
pub(crate) mod show;

use std::path::PathBuf;

use config::{Value as Merged, ValueKind};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use stagegate_core::{Code, Error, Secret, Violation};
use stagegate_engine::config::{EngineConfig, TenantLimits};
use stagegate_http::config::HttpConfig;
use stagegate_llm::{RedisConfig, config::LlmConfig};
use stagegate_net::NetConfig;
use stagegate_store_postgres::config::PoolConfig;
use stagegate_telemetry::config::{LogConfig, SentryConfig};

pub(crate) use layers::{Environment, Flags, listen_address};

/// Everything that can be configured.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    /// The listener, its limits, and who may call.
    pub http: HttpConfig,
    /// How runs are executed.
    pub engine: EngineConfig,
    /// Where runs are kept.
    pub store: StoreConfig,
    /// The shared cache of a daemon on Postgres.
    pub redis: RedisSection,
    /// Providers, prices, the cache in this process, and the breaker.
    pub llm: LlmConfig,
    /// How other servers are reached: proxies, certificates, HTTP/2.
    pub net: NetConfig,
    /// Logs.
    pub log: LogConfig,
    /// Error reports.
    pub sentry: SentryConfig,
}

/// Where runs are kept.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct StoreConfig {
    /// The Postgres database, as `postgres://user:password@host/database`. Without it everything is kept in one SQLite
    /// file in the data directory: this machine alone, no replicas. Also `DATABASE_URL`.
    pub database_url: Option<Secret>,
    /// Where the SQLite file lies. Default: `$XDG_DATA_HOME/stagegate`, else `~/.local/share/stagegate`. Also
    /// `STAGEGATE_DATA_DIR`.
    pub data_dir: Option<PathBuf>,
    /// The connection pool of Postgres.
    pub pool: PoolConfig,
}

/// The shared cache of a daemon on Postgres.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub(crate) struct RedisSection {
    /// The Redis server, as `redis://host:6379` or `rediss://…`. Without it replicas do not share answers. Also
    /// `REDIS_URL`.
    pub url: Option<Secret>,
    /// Its limits.
    #[serde(flatten)]
    pub limits: RedisConfig,
}

/// A configuration and where each of its values came from.
#[derive(Debug, Clone)]
pub(crate) struct Loaded {
    /// The values.
    pub config: Config,
    /// Each value that is set, by path, with its origin.
    pub values: Vec<Effective>,
}

/// One value that is in force. Secrets are redacted here already.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Effective {
    /// Its path.
    #[serde(serialize_with = "as_dotted")]
    pub path: Vec<String>,
    /// The value; null where it is unset.
    pub value: Value,
    /// `default`, `file …`, `variable …` or `flag …`.
    pub source: String,
}

fn as_dotted<S: serde::Serializer>(path: &[String], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&keys::dotted(path))
}

/// Where a value came from that nobody set.
const DEFAULT: &str = "default";

/// Loads the configuration, or tells every mistake in it.
pub(crate) fn load(flags: &Flags, environment: &Environment) -> Result<Loaded, Error> {
    let tree = keys::tree();
    let mut mistakes = Vec::new();
    let layers = [
        layers::file(&tree, flags, environment, &mut mistakes),
        layers::environment(&tree, environment, &mut mistakes),
        layers::flags(flags),
    ];
    let defaults = layers::defaults(&tree, &layers);
    let mut builder = config::Config::builder().add_source(defaults);
    for layer in layers {
        builder = builder.add_source(layer);
    }
    let mut merged = builder.build().map_err(|error| Error::new(Code::InvalidConfig, error.to_string()))?.cache;
    let config = decode(&mut merged, &mut mistakes);
    sanity(&config, &merged, &mut mistakes);
    if !mistakes.is_empty() {
        return Err(Error::violations(Code::InvalidConfig, mistakes));
    }
    let mut values = Vec::new();
    effective(&merged, &tree, &mut Vec::new(), &mut values);
    Ok(Loaded { config, values })
}

/// Decodes what was merged. A value that does not fit is noted and taken out, and the rest is tried again, so that
/// one pass of the user suffices to mend them all.
fn decode(merged: &mut Merged, mistakes: &mut Vec<Violation>) -> Config {
    // Each round takes one value out; the bound only guards against a defect here.
    for _ in 0..1_000 {
        let error = match serde_path_to_error::deserialize::<_, Config>(json(merged)) {
            Ok(config) => return config,
            Err(error) => error,
        };
        let path: Vec<String> = error
            .path()
            .iter()
            .filter_map(|segment| match segment {
                serde_path_to_error::Segment::Map { key } => Some(key.clone()),
                serde_path_to_error::Segment::Seq { index } => Some(index.to_string()),
                _ => None,
            })
            .collect();
        let (path, origin) = remove(merged, &path);
        mistakes.push(mistake(&path, &origin, error.inner().to_string()));
        if path.is_empty() {
            break;
        }
    }
    Config::default()
}

/// A mistake in a value, under the name of the place that it came from.
fn mistake(path: &[String], origin: &str, message: impl Into<String>) -> Violation {
    Violation::new(Code::InvalidConfig, layers::place(origin, &keys::dotted(path)), message)
}

/// What a schema cannot say.
fn sanity(config: &Config, merged: &Merged, mistakes: &mut Vec<Violation>) {
    let mut refuse = |path: &[&str], wrong: bool, message: &str| {
        if wrong {
            let path: Vec<String> = path.iter().map(|part| (*part).to_owned()).collect();
            mistakes.push(mistake(&path, &origin_of(merged, &path), message));
        }
    };
    let pool = &config.store.pool;
    refuse(&["engine", "max_runs"], config.engine.max_runs == 0, "must be at least 1");
    let no_room = |limits: &TenantLimits| limits.max_runs == Some(0);
    let never = "must be at least 1: with 0 its runs would be accepted and never start";
    refuse(&["engine", "tenant_defaults", "max_runs"], no_room(&config.engine.tenant_defaults), never);
    for (tenant, limits) in &config.engine.tenants {
        refuse(&["engine", "tenants", tenant.as_str(), "max_runs"], no_room(limits), never);
    }
    refuse(&["engine", "commit_batch_max"], config.engine.commit_batch_max == 0, "must be at least 1");
    let few = "must be 0 or at least 3: a replica that dies takes all of its runs with it";
    refuse(&["engine", "run_crashes_max"], matches!(config.engine.run_crashes_max, 1 | 2), few);
    refuse(&["engine", "lease_ttl"], config.engine.lease_ttl.0.as_millis() < 100, "must be at least 100ms");
    refuse(&["store", "pool", "max_connections"], pool.max_connections == 0, "must be at least 1");
    refuse(
        &["store", "pool", "min_connections"],
        pool.min_connections > pool.max_connections,
        "must not be above `store.pool.max_connections`",
    );
    refuse(&["http", "json_max_depth"], config.http.json_max_depth == 0, "must be at least 1");
    refuse(&["http", "max_connections"], config.http.max_connections == 0, "must be at least 1");
    // Sections that check themselves; where a value came from is known here alone.
    for violation in config.llm.violations().into_iter().chain(config.net.violations()) {
        let path = keys::undotted(&violation.path);
        let place = layers::place(&origin_of(merged, &path), &violation.path);
        mistakes.push(Violation { path: place, ..violation });
    }
}

/// Where the value at a path came from; of a section, where its first value came from.
fn origin_of(merged: &Merged, path: &[String]) -> String {
    let mut here = merged;
    for part in path {
        match &here.kind {
            ValueKind::Table(table) if table.contains_key(part) => here = &table[part],
            _ => break,
        }
    }
    first_origin(here)
}

/// Takes out the value at the path, or at the longest part of it that is there. Returns that part and its origin.
fn remove(merged: &mut Merged, path: &[String]) -> (Vec<String>, String) {
    let mut here = merged;
    for (depth, part) in path.iter().enumerate() {
        let ValueKind::Table(table) = &mut here.kind else { break };
        let goes_on = match (table.get(part), path.get(depth + 1)) {
            (Some(value), Some(next)) => {
                matches!(&value.kind, ValueKind::Table(inner) if inner.contains_key(next))
            }
            _ => false,
        };
        if !goes_on {
            let gone = table.remove(part);
            let origin = gone.as_ref().map_or_else(|| DEFAULT.to_owned(), first_origin);
            return (path[..=depth].to_vec(), origin);
        }
        // Checked by `goes_on`.
        let Some(next) = table.get_mut(part) else { break };
        here = next;
    }
    (Vec::new(), DEFAULT.to_owned())
}

/// The origin of a value; of a table, the first that somebody set.
fn first_origin(value: &Merged) -> String {
    fn find(value: &Merged) -> Option<&str> {
        match &value.kind {
            ValueKind::Table(table) => {
                let mut keys: Vec<_> = table.keys().collect();
                keys.sort();
                keys.into_iter().find_map(|key| find(&table[key]))
            }
            _ => value.origin().filter(|origin| *origin != DEFAULT),
        }
    }
    find(value).unwrap_or(DEFAULT).to_owned()
}

/// The merged values as JSON.
fn json(value: &Merged) -> Value {
    match &value.kind {
        ValueKind::Nil => Value::Null,
        ValueKind::Boolean(flag) => Value::Bool(*flag),
        ValueKind::I64(number) => Value::from(*number),
        ValueKind::U64(number) => Value::from(*number),
        ValueKind::I128(number) => i64::try_from(*number).map_or(Value::Null, Value::from),
        ValueKind::U128(number) => u64::try_from(*number).map_or(Value::Null, Value::from),
        ValueKind::Float(number) => Value::from(*number),
        ValueKind::String(text) => Value::String(text.clone()),
        ValueKind::Array(items) => Value::Array(items.iter().map(json).collect()),
        ValueKind::Table(table) => Value::Object(table.iter().map(|(key, value)| (key.clone(), json(value))).collect()),
    }
}

/// Lists the values in the order of their schema.
fn effective(value: &Merged, node: &keys::Node, path: &mut Vec<String>, into: &mut Vec<Effective>) {
    let table = match &value.kind {
        ValueKind::Table(table) => Some(table),
        _ => None,
    };
    match (node, table) {
        (keys::Node::Table { keys, .. }, Some(table)) => {
            for (key, node) in keys {
                if let Some(value) = table.get(key) {
                    path.push(key.clone());
                    effective(value, node, path, into);
                    path.pop();
                }
            }
        }
        (keys::Node::Map { value: node, .. }, Some(table)) => {
            let mut names: Vec<_> = table.keys().collect();
            names.sort();
            for name in names {
                path.push(name.clone());
                effective(&table[name], node, path, into);
                path.pop();
            }
        }
        (keys::Node::Leaf(leaf), _) => {
            let plain = json(value);
            let shown = match plain {
                Value::Null => Value::Null,
                _ if leaf.secret => Value::from("[redacted]"),
                Value::String(text) => Value::from(without_credentials(text)),
                plain => plain,
            };
            let source = value.origin().unwrap_or(DEFAULT).to_owned();
            into.push(Effective { path: path.clone(), value: shown, source });
        }
        _ => {}
    }
}

/// An address without what may be a password: one that holds credentials or a query is a mistake, and is shown so that it
/// can be found.
fn without_credentials(text: String) -> String {
    let Some((scheme, rest)) = text.split_once("://") else { return text };
    let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    let path = path.split_once(['?', '#']).map(|(path, _)| path);
    let host = authority.rsplit_once('@').map(|(_, host)| host);
    if path.is_none() && host.is_none() {
        return text;
    }
    let (before, after) = (host.map_or("", |_| "[redacted]@"), path.map_or("", |_| "?[redacted]"));
    let path = path.unwrap_or_else(|| &rest[authority.len()..]);
    format!("{scheme}://{before}{}{path}{after}", host.unwrap_or(authority))
}

#[cfg(test)]
mod tests;
