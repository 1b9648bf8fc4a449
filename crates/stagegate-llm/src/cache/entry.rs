//! A cached answer: owns its stored form and its age. Whatever cannot be read as one is a miss, never an error.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use stagegate_core::{ModelRef, RunId, StageId, Usage, Usd, cache::CacheKey};

/// The version of the stored form; others are foreign.
const ENTRY_VERSION: u32 = 1;

/// How long an answer that is kept for its run alone may wait for whoever takes the run over.
pub(crate) const RUN_TTL: Duration = Duration::from_hours(24);

/// A cached answer. Serialised as JSON: small beside the answer itself, and readable by people who look into Redis.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Entry {
    v: u32,
    /// The answer's text.
    pub(crate) content: String,
    /// The model that gave it.
    pub(crate) model: ModelRef,
    /// The tokens of the call that bought it.
    pub(crate) usage: Usage,
    cost_nanos: i64,
    /// Whether the price table knew the model.
    pub(crate) priced: bool,
    /// When the answer was there, by the buyer's clock.
    stored_at_ms: i64,
    ttl_ms: u64,
    /// The run that bought it.
    pub(crate) run: RunId,
    /// The stage of that run. Entries of older versions tell of none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    stage: Option<StageId>,
    /// The attempt at that stage. Entries of older versions tell of none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    attempt: Option<u32>,
    /// The beginning of the key that it is stored under, so that an answer that comes back in another's place is told
    /// from the right one. Entries of older versions have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    under: Option<u64>,
}

/// Who buys: an attempt at a stage of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Buyer {
    pub(crate) run: RunId,
    pub(crate) stage: StageId,
    pub(crate) attempt: u32,
}

/// Whose purchases a reader accepts, where not everybody's.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Only<'a> {
    /// Those of this stage of this run, whichever attempt.
    Stage(&'a Buyer),
    /// Those of this very attempt.
    Attempt(&'a Buyer),
}

/// What an entry is made from.
pub(crate) struct NewEntry<'a> {
    pub(crate) content: &'a str,
    pub(crate) model: &'a ModelRef,
    pub(crate) usage: Usage,
    pub(crate) cost: Usd,
    pub(crate) priced: bool,
    pub(crate) stored_at_ms: i64,
    pub(crate) ttl: Duration,
    pub(crate) buyer: &'a Buyer,
}

impl Entry {
    pub(crate) fn new(new: &NewEntry<'_>) -> Self {
        let NewEntry { content, model, usage, cost, priced, stored_at_ms, ttl, buyer } = *new;
        Self {
            v: ENTRY_VERSION,
            content: content.to_owned(),
            model: model.clone(),
            usage,
            cost_nanos: cost.nanos(),
            priced,
            stored_at_ms,
            ttl_ms: u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX),
            run: buyer.run,
            stage: Some(buyer.stage.clone()),
            attempt: Some(buyer.attempt),
            under: None,
        }
    }

    /// Whether it was bought by one of these.
    pub(crate) fn is_by(&self, only: Only<'_>) -> bool {
        let (Only::Stage(buyer) | Only::Attempt(buyer)) = only;
        let same_stage = self.stage.as_ref().is_none_or(|stage| *stage == buyer.stage);
        self.run == buyer.run
            && same_stage
            && match only {
                Only::Stage(_) => true,
                Only::Attempt(_) => self.attempt == Some(buyer.attempt),
            }
    }

    /// What the call that bought it cost.
    pub(crate) fn cost(&self) -> Usd {
        Usd::from_nanos(self.cost_nanos)
    }

    /// When the answer was there, in milliseconds since the epoch.
    pub(crate) fn stored_at_ms(&self) -> i64 {
        self.stored_at_ms
    }

    /// How much longer a reader that accepts answers of this age may use it. None when its time is over, by its own
    /// TTL or by the reader's, whichever is shorter.
    pub(crate) fn life_left(&self, now_ms: i64, reader_ttl: Duration) -> Option<Duration> {
        // Clocks of replicas differ a little: an answer from the future is new.
        let age = Duration::from_millis(u64::try_from(now_ms.saturating_sub(self.stored_at_ms)).unwrap_or(0));
        let ttl = Duration::from_millis(self.ttl_ms).min(reader_ttl);
        ttl.checked_sub(age).filter(|left| !left.is_zero())
    }

    /// The same, to be stored under this key.
    pub(crate) fn under(mut self, key: CacheKey) -> Self {
        self.under = Some(beginning(key));
        self
    }

    /// As stored in a shared tier.
    pub(crate) fn encode(&self) -> Vec<u8> {
        // Strings, numbers and ids always serialise; an empty entry would be a miss for whoever reads it.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// From a shared tier: None where the bytes are no entry of this version, or answer for another model or key.
    pub(crate) fn decode(bytes: &[u8], model: &ModelRef, key: CacheKey) -> Option<Self> {
        let entry: Self = serde_json::from_slice(bytes).ok()?;
        let is_ours = entry.v == ENTRY_VERSION
            && entry.model == *model
            && entry.under.is_none_or(|under| under == beginning(key))
            && !entry.content.trim().is_empty();
        is_ours.then_some(entry)
    }
}

fn beginning(key: CacheKey) -> u64 {
    key.0.iter().take(size_of::<u64>()).fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// A TTL shortened by up to a tenth, so that what was stored together does not expire together. Never longer than
/// what was asked for. The key's own bits serve as the dice.
pub(crate) fn jittered(ttl: Duration, key: CacheKey) -> Duration {
    ttl.saturating_sub(ttl / 2_560 * u32::from(key.0[0]))
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    const KEY: CacheKey = CacheKey([7; 32]);

    fn model(name: &str) -> ModelRef {
        ModelRef::new(name).expect("a model")
    }

    fn buyer(stage: &str, attempt: u32) -> Buyer {
        Buyer { run: RunId(Uuid::from_u128(9)), stage: StageId::new(stage).expect("a slug"), attempt }
    }

    fn entry() -> Entry {
        Entry::new(&NewEntry {
            content: "an answer",
            model: &model("sim/a"),
            usage: Usage { input_tokens: 3, output_tokens: 5, ..Usage::default() },
            cost: Usd::from_nanos(7),
            priced: true,
            stored_at_ms: 1_000,
            ttl: Duration::from_millis(100),
            buyer: &buyer("one", 2),
        })
    }

    #[test]
    fn an_entry_comes_back_whole() {
        assert_eq!(Entry::decode(&entry().encode(), &model("sim/a"), KEY), Some(entry()));
    }

    #[test]
    fn an_entry_remembers_its_buyer() {
        let entry = entry();
        assert!(entry.is_by(Only::Attempt(&buyer("one", 2))) && entry.is_by(Only::Stage(&buyer("one", 7))));
        assert!(!entry.is_by(Only::Attempt(&buyer("one", 3))) && !entry.is_by(Only::Stage(&buyer("two", 2))));
        let other_run = Buyer { run: RunId(Uuid::from_u128(8)), ..buyer("one", 2) };
        assert!(!entry.is_by(Only::Attempt(&other_run)) && !entry.is_by(Only::Stage(&other_run)));
    }

    #[test]
    fn an_entry_of_an_older_version_is_read_and_names_no_purchase() {
        let text = String::from_utf8(entry().encode()).expect("JSON");
        let old = text.replace(",\"stage\":\"one\",\"attempt\":2", "");
        assert_ne!(old, text);
        let old = Entry::decode(old.as_bytes(), &model("sim/a"), KEY).expect("is read");
        assert!(!old.is_by(Only::Attempt(&buyer("one", 2))) && old.is_by(Only::Stage(&buyer("one", 2))));
    }

    #[test]
    fn an_answer_to_another_question_is_a_miss() {
        let entry = entry().under(KEY);
        assert_eq!(Entry::decode(&entry.encode(), &model("sim/a"), KEY), Some(entry.clone()));
        assert_eq!(Entry::decode(&entry.encode(), &model("sim/a"), CacheKey([8; 32])), None);
    }

    #[test]
    fn what_is_no_entry_of_ours_is_a_miss() {
        let text = String::from_utf8(entry().encode()).expect("JSON");
        let foreign = [
            String::new(),
            "null".to_owned(),
            text[..text.len() - 1].to_owned(),
            text.replace("\"v\":1", "\"v\":2"),
            text.replace("an answer", " "),
            text.replace("sim/a", "sim/b"),
            text.replace("sim/a", "none"),
        ];
        for bytes in foreign {
            assert_eq!(Entry::decode(bytes.as_bytes(), &model("sim/a"), KEY), None, "{bytes}");
        }
        assert_eq!(Entry::decode(&[0xFF, 0x00], &model("sim/a"), KEY), None);
    }

    #[test]
    fn the_shorter_of_both_times_to_live_counts() {
        let (hour, entry) = (Duration::from_hours(1), entry());
        assert_eq!(entry.life_left(1_040, hour), Some(Duration::from_millis(60)));
        assert_eq!(entry.life_left(1_040, Duration::from_millis(50)), Some(Duration::from_millis(10)));
        assert_eq!(entry.life_left(1_100, hour), None, "not even at its last millisecond");
        assert_eq!(entry.life_left(1_040, Duration::from_millis(40)), None);
        assert_eq!(entry.life_left(0, hour), Some(Duration::from_millis(100)), "a clock that is behind");
    }

    #[test]
    fn jitter_only_shortens_and_by_a_tenth_at_most() {
        let ttl = Duration::from_hours(24);
        assert_eq!(jittered(ttl, CacheKey([0; 32])), ttl);
        let shortest = jittered(ttl, CacheKey([255; 32]));
        assert!(shortest < ttl && shortest >= ttl / 10 * 9, "{shortest:?}");
    }
}
