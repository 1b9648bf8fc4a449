//! `stagegate keys`: makes, lists and revokes API keys. The secret is shown once, on stdout alone; only its hash is
//! kept.

use std::{sync::Arc, time::Duration};

use chrono::{DateTime, TimeDelta, Utc};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde_json::json;
use stagegate_core::{
    Clock as _, Code, Error, KeyId, Store, SystemClock, TenantId,
    pipeline::Span,
    store::{ApiKey, NewApiKey, Role},
};
use stagegate_http::auth::generate_key;
use stagegate_telemetry::Metrics;

use super::quiet_logs;
use crate::{
    cli::Global,
    daemon::{self, Options},
    layout::{Column, KEPT, Row, Table},
    output,
};

/// The id is what `revoke` takes: it is never dropped.
const COLUMNS: [Column; 6] = [
    Column::left("id", KEPT),
    Column::left("tenant", 50),
    Column::left("role", 30),
    Column::left("name", 60),
    Column::left("made", 10),
    Column::left("state", 40),
];

const EXAMPLES: &str = "\
Examples:
  stagegate keys create --name ci --role operator --expires 90d
  export STAGEGATE_API_KEY=$(stagegate keys create --role admin --name ops)
  stagegate runs list                     the secret was all of stdout
  stagegate keys list
  stagegate keys revoke 0198c2d0-7c3e-7b1a-8f0e-2d4c6a8b0e1f

Roles: viewer reads; operator also submits, cancels, retries and approves; admin also registers pipelines and purges \
the cache. The keys are those of the configured database; a running daemon follows within seconds.";

/// Manage API keys.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Keys {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Make a key; its secret is shown once, on stdout
    Create(Create),
    /// List keys, without their secrets
    List(List),
    /// Revoke a key, by its id
    Revoke(Revoke),
}

#[derive(Debug, clap::Args)]
struct Create {
    /// The tenant that it opens
    #[arg(long, default_value = "default")]
    tenant: TenantId,
    /// What it may do
    #[arg(long, default_value = "operator", value_parser = role())]
    role: Role,
    /// What it is for, for people
    #[arg(long)]
    name: String,
    /// When it ends by itself, from now: 12h, 90d … Without it, it lasts until it is revoked
    #[arg(long, value_name = "TIME")]
    expires: Option<Span>,
}

#[derive(Debug, clap::Args)]
struct List {
    /// Only this tenant's
    #[arg(long)]
    tenant: Option<TenantId>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct Revoke {
    /// The key's id, as `list` shows it
    id: KeyId,
}

fn role() -> impl TypedValueParser<Value = Role> {
    let known = |text: String| Role::parse(&text).ok_or("write `viewer`, `operator` or `admin`");
    PossibleValuesParser::new(["viewer", "operator", "admin"]).try_map(known)
}

impl Keys {
    pub(crate) async fn run(self, global: &Global) -> Result<u8, Error> {
        let mut loaded = global.load()?;
        let _guard = quiet_logs(&mut loaded)?;
        let opened = daemon::open_store(&loaded.config, Options::default(), &Metrics::new()).await?;
        let done = match self.action {
            Action::Create(create) => create.run(&opened.store, &opened.note).await,
            Action::List(list) => list.run(&opened.store).await,
            Action::Revoke(revoke) => revoke.run(&opened.store).await,
        };
        opened.store.close().await;
        done
    }
}

impl Create {
    async fn run(self, store: &Arc<dyn Store>, note: &str) -> Result<u8, Error> {
        let name = self.name.trim();
        if name.is_empty() || name.chars().count() > 100 {
            return Err(Error::new(Code::InvalidParameter, "--name: write 1 to 100 characters"));
        }
        let mut rng = StdRng::from_os_rng();
        let now = SystemClock.now();
        let expires_at = self.expires.map(|span| now + delta(span.0));
        let id = KeyId(uuid::Builder::from_random_bytes(rng.random()).into_uuid());
        let (secret, hash) = generate_key(&mut rng);
        let key = ApiKey {
            id,
            tenant: self.tenant,
            role: self.role,
            name: name.to_owned(),
            created_at: now,
            expires_at,
            revoked_at: None,
            failure: None,
        };
        let told = format!(
            "key {id} for tenant `{}`, role {}, {}; {note}\nthe secret is shown this once:",
            key.tenant,
            key.role.as_str(),
            until(expires_at)
        );
        store.create_key(&NewApiKey { key, hash }).await?;
        output::note(&told);
        output::result(&format!("{secret}\n"))?;
        Ok(0)
    }
}

impl List {
    async fn run(self, store: &Arc<dyn Store>) -> Result<u8, Error> {
        let keys = store.keys(self.tenant.as_ref()).await?;
        let now = SystemClock.now();
        if self.json {
            let list: Vec<_> = keys.iter().map(|key| json!({ "key": key, "state": state(key, now) })).collect();
            output::result(&format!("{:#}\n", serde_json::Value::Array(list)))?;
            return Ok(0);
        }
        if keys.is_empty() {
            output::note("there are no keys; make one with `stagegate keys create --name …`");
            return Ok(0);
        }
        output::result(&table(&keys, now).text(output::stdout_width()))?;
        Ok(0)
    }
}

fn table(keys: &[ApiKey], now: DateTime<Utc>) -> Table {
    let mut table = Table::new(COLUMNS);
    for key in keys {
        let role = key.role.as_str().to_owned();
        let made = key.created_at.format("%Y-%m-%d").to_string();
        table.push(Row::new([
            key.id.to_string(),
            key.tenant.to_string(),
            role,
            key.name.clone(),
            made,
            state(key, now),
        ]));
    }
    table
}

impl Revoke {
    async fn run(self, store: &Arc<dyn Store>) -> Result<u8, Error> {
        if !store.revoke_key(self.id, SystemClock.now()).await? {
            let message = format!("there is no key {}; `stagegate keys list` shows them", self.id);
            return Err(Error::new(Code::KeyNotFound, message));
        }
        output::note(&format!("key {} is revoked", self.id));
        Ok(0)
    }
}

fn delta(span: Duration) -> TimeDelta {
    // A span is bounded to a year, far below what a delta holds.
    TimeDelta::from_std(span).unwrap_or(TimeDelta::MAX)
}

fn until(expires_at: Option<DateTime<Utc>>) -> String {
    expires_at
        .map_or_else(|| "until it is revoked".to_owned(), |at| format!("until {}", at.format("%Y-%m-%d %H:%M UTC")))
}

fn state(key: &ApiKey, now: DateTime<Utc>) -> String {
    if let Some(failure) = &key.failure {
        return failure.message.clone();
    }
    match (key.revoked_at, key.expires_at) {
        (Some(at), _) => format!("revoked {}", at.format("%Y-%m-%d")),
        (None, Some(at)) if at <= now => format!("expired {}", at.format("%Y-%m-%d")),
        (None, at) => format!("valid {}", until(at)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_fit_80_and_120_columns_and_are_whole_when_piped() {
        let now = DateTime::from_timestamp(1_795_000_000, 0).expect("in range");
        let key = |n: u128, name: &str, expires_at, revoked_at| ApiKey {
            id: KeyId(uuid::Uuid::from_u128(n)),
            tenant: TenantId::default(),
            role: Role::Operator,
            name: name.to_owned(),
            created_at: now - TimeDelta::days(30),
            expires_at,
            revoked_at,
            failure: None,
        };
        let keys = [
            key(1, "ci", Some(now + TimeDelta::days(60)), None),
            key(2, "the console of the night shift", None, None),
            key(3, "old", None, Some(now)),
        ];
        for width in [Some(80), Some(120), None] {
            let name = width.map_or_else(|| "piped".to_owned(), |width: usize| width.to_string());
            insta::assert_snapshot!(format!("keys_{name}"), table(&keys, now).text(width));
        }
    }
}
