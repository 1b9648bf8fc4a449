//! Compiled pipelines: owns which versions are in memory, and how the newest one is found without a query per submit.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use stagegate_core::{Code, Error, Pipeline, PipelineName, Store, TenantId, store::PipelineVersion};
use tokio_util::task::TaskTracker;

use crate::{
    batch::{Batcher, Entry},
    evaluation::Evaluations,
};

/// Compiled versions kept in memory; past it the table starts over.
const COMPILED_MAX: usize = 512;
/// Questions for a newest version that share one look.
const LOOKS_MAX: usize = 1_024;

type Name = (TenantId, PipelineName);
type Newest = Option<Arc<PipelineVersion>>;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Pipelines {
    store: Arc<dyn Store>,
    newest: Batcher<Name, Newest>,
    evaluations: Arc<Evaluations>,
    compiled: Mutex<HashMap<(TenantId, PipelineName, u32), Arc<Pipeline>>>,
}

impl Pipelines {
    pub(crate) fn new(tracker: &TaskTracker, store: Arc<dyn Store>, evaluations: Arc<Evaluations>) -> Self {
        let asked = Arc::clone(&store);
        let newest = Batcher::start(tracker, LOOKS_MAX, move |batch| look(Arc::clone(&asked), batch));
        Self { store, newest, evaluations, compiled: Mutex::default() }
    }

    /// A version, or with None the newest at this moment: one that was registered before is seen.
    pub(crate) async fn get(
        &self,
        tenant: &TenantId,
        name: &PipelineName,
        version: Option<u32>,
    ) -> Result<Option<(Arc<Pipeline>, u32)>, Error> {
        if let Some(version) = version
            && let Some(pipeline) = self.compiled(tenant, name, version)
        {
            return Ok(Some((pipeline, version)));
        }
        let record = match version {
            Some(_) => self.store.pipeline(tenant, name, version).await?.map(Arc::new),
            None => self.newest.offer((tenant.clone(), name.clone())).await?,
        };
        let Some(record) = record else { return Ok(None) };
        let version = record.version;
        if let Some(pipeline) = self.compiled(tenant, name, version) {
            return Ok(Some((pipeline, version)));
        }
        let definition = record.definition.clone();
        let compiling = self.evaluations.evaluate_large(tenant, move || Pipeline::from_stored(definition));
        let pipeline = compiling.await?.map_err(|violations| Error::violations(Code::InvalidDefinition, violations))?;
        let pipeline = Arc::new(pipeline);
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if compiled.len() >= COMPILED_MAX {
            compiled.clear();
        }
        compiled.insert((tenant.clone(), name.clone(), version), Arc::clone(&pipeline));
        Ok(Some((pipeline, version)))
    }

    fn compiled(&self, tenant: &TenantId, name: &PipelineName, version: u32) -> Option<Arc<Pipeline>> {
        let compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        compiled.get(&(tenant.clone(), name.clone(), version)).cloned()
    }
}

/// Answers a batch: one query per name, however many ask for it. Each began to wait before its query began, so that none
/// is answered with what was the newest before it asked.
async fn look(store: Arc<dyn Store>, batch: Vec<Entry<Name, Newest>>) {
    // In the order of their names, so that a simulation's seed decides that too.
    let mut askers: BTreeMap<Name, Vec<_>> = BTreeMap::new();
    for (name, answer) in batch {
        askers.entry(name).or_default().push(answer);
    }
    let looks = askers.into_iter().map(|((tenant, name), answers)| {
        let store = &store;
        async move {
            let found = store.pipeline(&tenant, &name, None).await;
            let found = found.map(|record| record.map(Arc::new)).map_err(Error::from);
            for answer in answers {
                let _ = answer.send(found.clone()); // Whoever is gone has hung up.
            }
        }
    });
    futures::future::join_all(looks).await;
}
