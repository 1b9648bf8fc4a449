//! What is broken on purpose is caught, and by the check that it breaks: without that, a simulation that finds nothing
//! says nothing.

use stagegate_simulation::{Flaw, Options, Promise, simulate};

/// Seeds until a flaw must have been caught.
const SEEDS: u64 = 400;

/// Plays seeds until one fails, and tells by which promise.
fn caught(flaw: Flaw) -> Promise {
    let options = Options { flaw, record: false };
    let found = (1..=SEEDS).find_map(|seed| Some((seed, simulate(seed, options).violation?)));
    let (seed, violation) = found.expect("a promise is broken, and nobody notices");
    println!("{flaw:?} is caught at seed {seed}: {violation}");
    violation.promise
}

#[test]
fn a_store_that_ignores_the_epoch_is_caught() {
    assert_eq!(caught(Flaw::FencingOff), Promise::OneOwner);
}

#[test]
fn a_flush_that_is_not_awaited_is_caught() {
    assert_eq!(caught(Flaw::FlushNotAwaited), Promise::AcknowledgedMeansDurable);
}

#[test]
fn a_cursor_that_repeats_an_event_is_caught() {
    assert_eq!(caught(Flaw::CursorRepeats), Promise::EventsAreComplete);
}

#[test]
fn a_cursor_that_skips_an_event_is_caught() {
    assert_eq!(caught(Flaw::CursorSkips), Promise::EventsAreComplete);
}

#[test]
fn a_lease_that_never_expires_is_caught() {
    assert_eq!(caught(Flaw::LeasesNeverExpire), Promise::AcceptedMeansFinished);
}

#[test]
fn a_claim_that_keeps_the_epoch_is_caught() {
    assert_eq!(caught(Flaw::ClaimKeepsEpoch), Promise::OneOwner);
}

#[test]
fn a_repeated_step_that_is_told_to_be_stale_is_caught() {
    assert_eq!(caught(Flaw::RepetitionIsStale), Promise::OneOwner);
}

#[test]
fn a_cache_that_forgets_is_caught() {
    assert_eq!(caught(Flaw::CacheForgets), Promise::CrashBuysNothingTwice);
}

#[test]
fn a_cancel_that_no_heartbeat_tells_of_is_caught() {
    assert_eq!(caught(Flaw::CancelIsSilent), Promise::CancelIsObeyed);
}

#[test]
fn a_claim_that_ignores_limits_is_caught() {
    assert_eq!(caught(Flaw::LimitsIgnored), Promise::SlotsAreLeases);
}

#[test]
fn a_claim_before_the_start_is_caught() {
    assert_eq!(caught(Flaw::StartIgnored), Promise::StartIsKept);
}

#[test]
fn a_heartbeat_that_does_not_tell_the_time_is_caught() {
    assert_eq!(caught(Flaw::TimeUntold), Promise::DeadlineIsKept);
}

#[test]
fn a_claim_that_ignores_priorities_is_caught() {
    assert_eq!(caught(Flaw::PriorityIgnored), Promise::PriorityIsKept);
}

#[test]
fn an_outage_that_ages_is_caught() {
    assert_eq!(caught(Flaw::OutageAges), Promise::OutagesPass);
}

#[test]
fn an_edited_output_that_is_dropped_is_caught() {
    assert_eq!(caught(Flaw::EditsDropped), Promise::EditsAreKept);
}

#[test]
fn a_panic_that_the_engine_catches_is_caught() {
    assert_eq!(caught(Flaw::DriverPanics), Promise::NoPanic);
}

#[test]
fn a_provider_that_charges_more_than_is_booked_is_caught() {
    assert_eq!(caught(Flaw::ChargesTwice), Promise::MoneyIsExact);
}

#[test]
fn a_take_over_that_forgets_its_former_owners_is_caught() {
    assert_eq!(caught(Flaw::OwnersForgotten), Promise::MoneyIsExact);
}

#[test]
fn a_store_that_counts_no_crash_is_caught() {
    assert_eq!(caught(Flaw::CrashesUncounted), Promise::CrashersEnd);
}

#[test]
fn a_store_that_counts_each_take_over_as_a_crash_is_caught() {
    assert_eq!(caught(Flaw::TakeOversCount), Promise::CrashersEnd);
}
