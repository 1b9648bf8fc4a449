//! The response cache's contract: what a shared tier (Redis, or a table of the SQLite file) must do. Owns keys and
//! scopes; knows nothing of requests or answers, which are opaque here.
//!
//! Invalidation is O(1). A tenant has one growing generation; invalidating a scope moves it on and notes it as the
//! scope's floor. An entry carries the generation that stood when its answer was asked for, and counts only while
//! that is not below the floor of any scope of its reader. Where the generation is missing (a new or a flushed
//! tier) it starts at the tier's clock in microseconds and is noted as the tenant's floor, so that nothing written
//! before, in whichever tier, counts.

use std::{fmt, time::Duration};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{ModelRef, PipelineName, StageId, TenantId};

/// 256 bits of the canonical request, under tenant and format version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CacheKey(pub [u8; 32]);

impl fmt::Display for CacheKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What can be invalidated at once, inside a tenant.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum CacheScope {
    /// Everything of the tenant.
    Tenant,
    /// What a pipeline reads.
    Pipeline(PipelineName),
    /// What one version of it reads.
    Version(PipelineName, u32),
    /// What one stage of it reads.
    Stage(PipelineName, StageId),
    /// What a model answered.
    Model(ModelRef),
}

impl fmt::Display for CacheScope {
    /// As stored: unique, and safe in a Redis key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tenant => f.write_str("t"),
            Self::Pipeline(pipeline) => write!(f, "p:{pipeline}"),
            Self::Version(pipeline, version) => write!(f, "v:{pipeline}:{version}"),
            Self::Stage(pipeline, stage) => write!(f, "s:{pipeline}:{stage}"),
            Self::Model(model) => write!(f, "m:{model}"),
        }
    }
}

/// What a look-up found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheLookup {
    /// The tenant's generation now: what an answer asked for from here on is stored under.
    pub generation: u64,
    /// The highest floor of the scopes that were asked for: entries below it do not count, in any tier.
    pub floor: u64,
    /// The entry and the generation that it was stored under, if it is there, alive, and not below the floor.
    pub entry: Option<(Vec<u8>, u64)>,
}

/// How much is kept of a tenant, what is stale by a purge of all of it left out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct CacheUsage {
    /// Answers.
    pub entries: u64,
    /// What they take, roughly.
    pub bytes: u64,
}

/// Why the tier could not answer. The caller goes on without it.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the shared cache is unavailable: {0}")]
pub struct CacheError(pub String);

/// A shared tier of the response cache.
#[async_trait]
pub trait CacheTier: Send + Sync + fmt::Debug + 'static {
    /// Looks a key up, for a reader in these scopes.
    async fn get(&self, tenant: &TenantId, key: CacheKey, scopes: &[CacheScope]) -> Result<CacheLookup, CacheError>;

    /// Stores an entry under the generation that its look-up gave. An older entry is replaced.
    async fn put(
        &self,
        tenant: &TenantId,
        key: CacheKey,
        entry: &[u8],
        generation: u64,
        ttl: Duration,
    ) -> Result<(), CacheError>;

    /// Removes an entry.
    async fn evict(&self, tenant: &TenantId, key: CacheKey) -> Result<(), CacheError>;

    /// Makes everything in a scope stale, in O(1). Returns the new generation.
    async fn invalidate(&self, tenant: &TenantId, scope: &CacheScope) -> Result<u64, CacheError>;

    /// How much it keeps of a tenant; None where only a walk over everything would tell.
    async fn usage(&self, tenant: &TenantId) -> Result<Option<CacheUsage>, CacheError> {
        let _ = tenant;
        Ok(None)
    }

    /// Answers if the tier does.
    async fn ping(&self) -> Result<(), CacheError>;

    /// `redis` or `sqlite`, for people and metrics.
    fn kind(&self) -> &'static str;
}
