//! A daemon of one command: owns the embedded store and engine of this process, with an API on loopback that only the
//! command's own client uses. What the command does is then done as any other program would do it.

use std::{net::SocketAddr, time::Duration};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use stagegate_core::{
    Clock as _, Code, Error, KeyId, Secret, SystemClock, TenantId,
    store::{ApiKey, NewApiKey, Role},
};
use stagegate_http::{
    auth::generate_key,
    config::{AuthMode, HttpConfig},
};
use stagegate_llm::config::ProviderKind;
use stagegate_telemetry::Metrics;
use tokio::{sync::oneshot, task::JoinHandle};

use crate::{
    client::Client,
    commands::serve::bind,
    config::Config,
    daemon::{Daemon, Options, open_store},
};

/// How long what is under way may take to end.
const DRAIN_GRACE: Duration = Duration::from_secs(2);
/// How long requests under way may take to finish after that.
const CLOSE_GRACE: Duration = Duration::from_secs(2);
/// A key that a crash left behind opens nothing after this.
const KEY_LIFE: chrono::TimeDelta = chrono::TimeDelta::hours(12);

/// The daemon, and the client that it is for.
pub(crate) struct Guest {
    /// Opens the tenant's part of it.
    pub client: Client,
    daemon: Daemon,
    key: KeyId,
    stop: oneshot::Sender<()>,
    server: JoinHandle<Result<(), Error>>,
}

impl Guest {
    /// Starts it on the data directory, for a tenant and runs of these pipelines. It can call nothing but the simulator, and
    /// refuses to start where it would take up other runs, which would fail without their models.
    pub(crate) async fn start(config: &Config, tenant: &TenantId, own: &[&str]) -> Result<Self, Error> {
        refuse_foreign_runs(config, own).await?;
        let mut config = config.clone();
        config.llm.providers.retain(|_, provider| provider.kind == ProviderKind::Sim);
        let listener = bind(SocketAddr::from(([127, 0, 0, 1], 0))).await?;
        let address = listener.local_addr().map_err(|error| Error::new(Code::Internal, error.to_string()))?;
        let daemon = Daemon::start(&config, Options { embedded: true, ..Options::default() }).await?;
        let (key, secret) = make_key(&daemon, tenant).await?;
        let (stop, stopped) = oneshot::channel::<()>();
        // Other users of the machine reach loopback, too: it takes the key.
        let http = HttpConfig { listen: address, auth: AuthMode::Keys, ..HttpConfig::default() };
        let server = daemon.serve(http, listener, async move {
            // A dropped sender stops it as well.
            let _ = stopped.await;
        })?;
        let client = Client::new(format!("http://{address}"), Some(secret))?;
        Ok(Self { client, daemon, key, stop, server })
    }

    /// Lets what is under way end, and leaves.
    pub(crate) async fn stop(self) {
        let Self { daemon, key, stop, server, .. } = self;
        if let Err(error) = daemon.store.revoke_key(key, SystemClock.now()).await {
            tracing::warn!(%key, %error, "the key of this command could not be revoked; it ends by itself");
        }
        daemon.engine.drain(DRAIN_GRACE).await;
        let _ = stop.send(());
        let _ = tokio::time::timeout(CLOSE_GRACE, server).await;
        daemon.store.close().await;
    }
}

/// Whatever runs in the data directory's database would be executed here.
async fn refuse_foreign_runs(config: &Config, own: &[&str]) -> Result<(), Error> {
    let options = Options { embedded: true, ..Options::default() };
    let opened = open_store(config, options, &Metrics::new()).await?;
    let backlog = opened.store.backlog(None).await;
    opened.store.close().await;
    let foreign = backlog?.into_iter().filter(|line| !own.contains(&line.pipeline.as_str()));
    let foreign: Vec<String> = foreign
        .filter(|line| line.queued + line.waiting + line.running > 0)
        .map(|line| format!("`{}` of tenant `{}`", line.pipeline, line.tenant))
        .collect();
    if foreign.is_empty() {
        return Ok(());
    }
    let (shown, more) =
        (foreign.iter().take(5).cloned().collect::<Vec<_>>().join(", "), foreign.len().saturating_sub(5));
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let message = format!(
        "the data directory has unfinished runs of {shown}{more}, which this command must not take up: let `stagegate serve` \
         finish or cancel them, or choose another directory with --data-dir"
    );
    Err(Error::new(Code::InvalidRequest, message))
}

async fn make_key(daemon: &Daemon, tenant: &TenantId) -> Result<(KeyId, Secret), Error> {
    let mut rng = StdRng::from_os_rng();
    let now = SystemClock.now();
    let id = KeyId(uuid::Builder::from_random_bytes(rng.random()).into_uuid());
    let (secret, hash) = generate_key(&mut rng);
    let key = ApiKey {
        id,
        tenant: tenant.clone(),
        role: Role::Admin,
        name: "one command of stagegate".to_owned(),
        created_at: now,
        expires_at: Some(now + KEY_LIFE),
        revoked_at: None,
        failure: None,
    };
    daemon.store.create_key(&NewApiKey { key, hash }).await?;
    Ok((id, Secret::from(secret)))
}
