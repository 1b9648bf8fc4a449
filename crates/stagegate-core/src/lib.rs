//! Stagegate's pure part: ids, definitions, decisions, events, the store's contract, error codes.
//!
//! Nothing in this crate does I/O, reads a clock (but [`SystemClock`]) or draws a random number by itself: time and
//! randomness are arguments. So everything here can be tested as a function.

pub mod access;
pub mod answer;
pub mod cache;
pub mod capability;
pub mod clock;
pub mod decide;
pub mod error;
pub mod evaluation;
pub mod event;
pub mod fair;
pub mod hint;
pub mod ids;
pub mod json;
pub mod pipeline;
pub mod run;
pub mod score;
pub mod secret;
pub mod store;
pub mod text;
pub mod usage;
pub mod word;

pub use capability::{Capabilities, Capability};
pub use clock::{Clock, SystemClock};
pub use error::{Code, Error, Violation};
pub use event::{Decision, Event, EventKind};
pub use ids::{Epoch, InvalidId, KeyId, ModelRef, PipelineName, ProviderName, ReplicaId, RunId, StageId, TenantId};
pub use json::Json;
pub use pipeline::Pipeline;
pub use run::{
    Assessment, Attempt, CallPurpose, Checkpoint, Evaluator, Failure, LedgerEntry, Origin, RunState, StageState,
    Totals, Verdict,
};
pub use secret::Secret;
pub use store::{Store, StoreError, StoreResult};
pub use usage::{Usage, Usd};
pub use word::{Rest, Word};
