//! A provider as it is seen from here: owns how many calls are under way at once, and what the provider last told of
//! its limits. A slot is held by the call itself, so that it cannot leak.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stagegate_core::{Code, TenantId};

use crate::{
    provider::{Limits, Provider},
    turns::{Full, Turn, Turns},
};

/// A configured provider.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) provider: Arc<dyn Provider>,
    slots: Turns,
    seen: Mutex<Seen>,
}

/// What was last seen of a provider.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Seen {
    pub(crate) limits: Limits,
    pub(crate) quota_exhausted: bool,
}

impl Served {
    pub(crate) fn new(provider: Arc<dyn Provider>, max_concurrency: usize) -> Self {
        Self { provider, slots: Turns::new(max_concurrency), seen: Mutex::default() }
    }

    /// Waits for a slot, one tenant after the other.
    pub(crate) async fn slot(&self, tenant: &TenantId) -> Result<Turn, Full> {
        self.slots.take(tenant).await
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn seen(&self) -> Seen {
        *self.lock()
    }

    /// Takes in what an answer or an error told. `error` is None for an answer.
    pub(crate) fn note(&self, limits: Limits, error: Option<Code>) {
        let mut seen = self.lock();
        if limits != Limits::default() {
            seen.limits = limits;
        }
        match error {
            None => seen.quota_exhausted = false,
            Some(Code::ProviderQuota) => seen.quota_exhausted = true,
            Some(_) => {}
        }
    }
}
