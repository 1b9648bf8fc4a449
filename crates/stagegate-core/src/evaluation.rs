//! Evaluation of what a caller wrote (templates, expressions, checks, schemas, definitions): owns how much work one
//! evaluation may do, whether it should stop, and the fence around its panics. Runs no threads and reads no clock: the
//! owner of a thread pool stops an evaluation through a [`Stop`].
//!
//! The code that does the work measures it, in units of about ten nanoseconds at worst (`pay`). A step that cannot be
//! interrupted (a regular expression, a JSON Schema) states its price before it starts (`claim`).
//!
//! An evaluation stays on one thread from its beginning to its end, so that its meter is thread-local.

use std::{
    cell::RefCell,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use serde_json::Value;

use crate::Json;

/// What an evaluation may spend where it runs inline, in units: at worst about two milliseconds, mostly much less.
const BRIEF_UNITS: u64 = 256 * 1024;
/// The steps that a rendering may take inline.
pub(crate) const BRIEF_STEPS: u64 = 1_000;
/// The names that one evaluation compares to suggest what was meant.
const COMPARISONS_MAX: u32 = 20_000;
/// Units in a second, at worst.
const UNITS_PER_SECOND: u64 = 100_000_000;

/// Asks an evaluation to stop, and hears from it. It stops at its next step that can be interrupted.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<Flags>);

#[derive(Debug, Default)]
struct Flags {
    asked: AtomicBool,
    refused: AtomicBool,
}

impl Stop {
    /// Asks the evaluation to stop: no caller waits for its result any more.
    pub fn ask(&self) {
        self.0.asked.store(true, Ordering::Relaxed);
    }

    /// Whether it was asked to stop.
    pub fn is_asked(&self) -> bool {
        self.0.asked.load(Ordering::Relaxed)
    }

    /// Whether a step of the evaluation was refused for its price.
    pub fn has_refused(&self) -> bool {
        self.0.refused.load(Ordering::Relaxed)
    }
}

/// Why an evaluation has no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unfinished {
    /// It is more than may run inline: begin it again where it may take longer.
    TooLong,
    /// It was asked to stop.
    Stopped,
    /// It panicked: a defect, which the panic hook has told with its place.
    Panicked,
}

/// The meter of the evaluation that is under way on this thread.
#[derive(Debug)]
struct Meter {
    units_left: u64,
    is_brief: bool,
    comparisons_left: u32,
    /// The dearest step that cannot be interrupted.
    claim_max: u64,
    stop: Option<Stop>,
    /// Why the result must be dropped.
    broken: Option<Unfinished>,
}

thread_local! {
    static METER: RefCell<Option<Meter>> = const { RefCell::new(None) };
}

/// Puts the meter back that was there before, also after a panic.
struct Restore(Option<Meter>);

impl Drop for Restore {
    fn drop(&mut self) {
        METER.with(|meter| *meter.borrow_mut() = self.0.take());
    }
}

/// Runs a small evaluation on this thread. A larger one ends early, with [`Unfinished::TooLong`].
pub fn brief<T>(work: impl FnOnce() -> T) -> Result<T, Unfinished> {
    metered(
        Meter {
            units_left: BRIEF_UNITS,
            is_brief: true,
            comparisons_left: COMPARISONS_MAX,
            claim_max: u64::MAX,
            stop: None,
            broken: None,
        },
        work,
    )
}

/// Runs a whole evaluation, which ends early if `stop` asks it to. The evaluation refuses a step that cannot be
/// interrupted and whose price is over `longest`.
pub fn whole<T>(stop: &Stop, longest: std::time::Duration, work: impl FnOnce() -> T) -> Result<T, Unfinished> {
    metered(
        Meter {
            units_left: u64::MAX,
            is_brief: false,
            comparisons_left: COMPARISONS_MAX,
            claim_max: longest.as_secs().saturating_mul(UNITS_PER_SECOND),
            stop: Some(stop.clone()),
            broken: None,
        },
        work,
    )
}

fn metered<T>(meter: Meter, work: impl FnOnce() -> T) -> Result<T, Unfinished> {
    let restore = Restore(METER.with(|now| now.borrow_mut().replace(meter)));
    // The work owns or shares what it reads, and what it was making is thrown away.
    let result = catch_unwind(AssertUnwindSafe(work)).map_err(|_| Unfinished::Panicked)?;
    let broken = METER.with(|meter| meter.borrow().as_ref().and_then(|meter| meter.broken));
    drop(restore);
    broken.map_or(Ok(result), Err)
}

fn with<T>(otherwise: T, look: impl FnOnce(&mut Meter) -> T) -> T {
    METER.with(|meter| meter.borrow_mut().as_mut().map_or(otherwise, look))
}

/// Whether the evaluation under way on this thread is still wanted: what has long steps of its own asks between them.
pub fn is_wanted() -> bool {
    pay(0).is_ok()
}

/// The evaluation ends early; what it gives is thrown away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Interrupted;

impl Interrupted {
    /// What is told where an error must be made of it; it is thrown away with the rest.
    pub(crate) const TOLD: &str = "the evaluation was ended early";
}

/// Takes the price of the work that follows, in units.
pub(crate) fn pay(units: u64) -> Result<(), Interrupted> {
    with(Ok(()), |meter| {
        if meter.broken.is_some() {
            return Err(Interrupted);
        }
        if meter.stop.as_ref().is_some_and(Stop::is_asked) {
            meter.broken = Some(Unfinished::Stopped);
            return Err(Interrupted);
        }
        match meter.units_left.checked_sub(units) {
            Some(left) => meter.units_left = left,
            None if meter.is_brief => {
                meter.broken = Some(Unfinished::TooLong);
                return Err(Interrupted);
            }
            None => meter.units_left = 0,
        }
        Ok(())
    })
}

/// Why a step that cannot be interrupted does not start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unclaimed {
    /// The evaluation ends early.
    Interrupted,
    /// It could take too long: this many times what is allowed.
    TooDear(u64),
}

/// The same for a step that cannot be interrupted: one that is too dear is refused before it starts.
pub(crate) fn claim(units: u64) -> Result<(), Unclaimed> {
    let claim_max = with(u64::MAX, |meter| meter.claim_max);
    if units > claim_max {
        with((), |meter| {
            if let Some(stop) = &meter.stop {
                stop.0.refused.store(true, Ordering::Relaxed);
            }
        });
        return Err(Unclaimed::TooDear(units.div_ceil(claim_max.max(1))));
    }
    pay(units).map_err(|_| Unclaimed::Interrupted)
}

/// Parses a document, for its price. Null where there is not enough left for it: what follows is thrown away.
pub fn parse(json: &Json) -> Value {
    match pay(json.text_bytes()) {
        Ok(()) => json.parse(),
        Err(Interrupted) => Value::Null,
    }
}

/// Whether the evaluation runs inline, so that its renderings have [`BRIEF_STEPS`] alone.
pub(crate) fn is_brief() -> bool {
    with(false, |meter| meter.is_brief)
}

/// A rendering has used up its steps. Where it had fewer than it may take at all, it begins again where it has them.
pub(crate) fn out_of_steps() {
    with((), |meter| {
        if meter.is_brief {
            meter.broken.get_or_insert(Unfinished::TooLong);
        }
    });
}

/// Whether one name more may be compared. Suggestions are a courtesy: they end where they would become work.
pub(crate) fn may_compare() -> bool {
    with(true, |meter| {
        let left = meter.comparisons_left.checked_sub(1);
        meter.comparisons_left = left.unwrap_or(0);
        left.is_some()
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_large_evaluation_ends_early_inline_and_completes_on_the_pool() {
        let work = || (0..10_000).filter(|_| pay(1_000).is_ok()).count();
        assert_eq!(brief(work), Err(Unfinished::TooLong));
        assert_eq!(whole(&Stop::default(), Duration::from_secs(1), work), Ok(10_000));
    }

    #[test]
    fn an_evaluation_asked_to_stop_ends_at_its_next_step() {
        let stop = Stop::default();
        let asked = stop.clone();
        let mut done = 0;
        let ended = whole(&stop, Duration::from_secs(1), || {
            while pay(1).is_ok() {
                done += 1;
                if done == 3 {
                    asked.ask();
                }
            }
        });
        assert_eq!((ended, done), (Err(Unfinished::Stopped), 3));
    }

    #[test]
    fn an_uninterruptible_step_over_the_limit_is_refused_before_it_starts() {
        let price = 3 * UNITS_PER_SECOND;
        let claimed = |longest| whole(&Stop::default(), Duration::from_secs(longest), || claim(price));
        assert_eq!(claimed(2), Ok(Err(Unclaimed::TooDear(2))));
        assert_eq!(claimed(3), Ok(Ok(())));
    }

    #[test]
    fn a_panic_ends_its_own_evaluation_alone() {
        let outer = brief(|| {
            let inner = brief(|| -> u8 { std::panic::resume_unwind(Box::new("a defect")) });
            (inner, pay(1))
        });
        assert_eq!(outer, Ok((Err(Unfinished::Panicked), Ok(()))));
        assert_eq!(pay(u64::MAX), Ok(()), "no meter is left behind");
    }
}
